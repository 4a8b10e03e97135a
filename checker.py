"""Checker: the VLM that looks at an image and says which stated objects and relations it shows.

Its score is the intrinsic reward of RL-RIG (arXiv 2602.19974): no label is ever used. There is one
question per object and one per triple, and the answer is read from the logits of the first answer
token, never from sampled text:

    P(yes) = sum_{t in yes} exp(l_t) / sum_{t in yes or no} exp(l_t)    over all spellings of both
    score  = mean P(yes) over all triples and the objects that no triple names        in [0, 1]

A triple's question asks for its two objects too, so these are not counted a second time. Otherwise
adding a missing object in the wrong place would raise the score, while SG-IoU falls because of the
wrong triple.

What is public of the paper does not say which form the answer has. A probability carries more
signal than a sampled yes: the rewards of a group are rarely all the same.
"""

import re
import sys
from dataclasses import dataclass

SYSTEM = "You check images. Answer the question about the image with one word: yes or no."
LEAST_MASS = 0.5  # of yes and no together, on blank images
# At the end of a prompt: <think>, [THINK], <|think|>, or <think> and more without </think>.
OPEN_THOUGHT = re.compile(r"(?is)[^/\w](\w+:)?(think|thought)\w*\W*$|<think>(?!.*</think>)")


@dataclass(frozen=True)
class Reflection:
    """What the Checker saw in one image.

    probs: P(yes) per object, then per triple, in the order of the graph.
    score: the reward, in [0, 1].
    feedback: what is missing or wrong, in words that the Actor reads; "" if nothing is.
    mass: mean probability of yes and no together. Where it is low, `probs` mean little.
    """

    probs: tuple[float, ...]
    score: float
    feedback: str
    mass: float = 1.0

    @property
    def satisfied(self):
        """Whether every stated object and relation is more likely there than not."""
        return all(prob >= 0.5 for prob in self.probs)


def object_question(name):
    """The question whose yes means that the object is in the image."""
    return f'Does the image show "{name}"?'


def triple_question(triple):
    """The question whose yes means that the relation holds. Any relation word fits, verbs too."""
    return f'Does the image show "{" ".join(triple)}"?'


def questions(graph):
    """One question per object, then one per triple."""
    return [*map(object_question, graph.labels()), *map(triple_question, graph.triples)]


def reflect(graph, probs, mass=1.0):
    """The `Reflection` made of P(yes) per object and triple of a graph; numbers or tensors.

    Raises ValueError if there is not one probability for each, from 0 to 1.
    """
    probs = tuple(float(prob) for prob in probs)
    if not all(0 <= prob <= 1 for prob in probs):  # refuses NaN, too
        raise ValueError(f"{probs} are no probabilities: make them 0 to 1")
    if not 0 < len(probs) == len(graph.objects) + len(graph.triples):
        raise ValueError(f"{len(probs)} probabilities, for {len(questions(graph))} questions")
    objects = list(zip(graph.labels(), probs))
    triples = list(zip(graph.triples, probs[len(objects) :]))
    alone = graph.alone()
    required = [p for _, p in triples] + [p for name, p in objects if name in alone]
    missing = [name for name, p in objects if p < 0.5]
    wrong = [" ".join(triple) for triple, p in triples if p < 0.5]
    feedback = []
    if missing:
        feedback.append("missing: " + ", ".join(missing))
    if wrong:
        feedback.append("wrong: " + "; ".join(wrong))
    return Reflection(probs, sum(required) / len(required), ". ".join(feedback), float(mass))


# Also in editor.py, so that neither file needs the other.
def normalize_image(image):
    """A PIL image from anywhere as the models read it: upright, RGB, over white.

    Raises ValueError for modes I and F, of which nobody knows the range.
    """
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image) or image.mode in ("I", "F"):
        kind = getattr(image, "mode", type(image).__name__)
        raise ValueError(f"give a PIL image of 8 bits per channel, such as RGB, not {kind}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which `convert` would clip to white
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


class VLM:
    """A frozen vision-language model and its processor: what Checker and Actor have in common.

    The model's parameters are frozen here and its tokenizer is set to pad on the left. Several VLMs
    may share them. batch_size: texts per forward pass or `generate` call.
    """

    def __init__(self, model, processor, batch_size=64):
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.processor.tokenizer.padding_side = "left"
        self.batch_size = batch_size
        self.share = False  # one encoding of an image for all texts about it; see `try_sharing`

    @classmethod
    def load(cls, path, device="cpu", dtype="float32", attention="", **settings):
        """Load a local folder or Hub id; attention: `attn_implementation`, "" for the default.

        Raises ValueError if the folder lacks weights, which would silently be random.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        model, info = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention or None,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if lacking := sorted(info["missing_keys"]):
            raise ValueError(f"the weights of {path} lack {len(lacking)} tensors: {lacking[:3]}")
        if unused := sorted(info["unexpected_keys"]):
            reason = f"{path}: {len(unused)} tensors are not used, such as {unused[0]}"
            print(f"{reason}; config.json may be of another model", file=sys.stderr)
        return cls(model.to(device), processor, **settings)

    def chat(self, system, text):
        """The chat prompt (str) of one user message about an image.

        Templates take a system message as a list of parts or as a string, or refuse one; then it
        comes first in the user's message. Raises ValueError if a template takes none of these.
        """

        def user(text):
            return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}

        template = str(getattr(self.processor, "chat_template", ""))
        settings = {flag: False for flag in ("enable_thinking", "thinking") if flag in template}
        for messages in (
            [{"role": "system", "content": [{"type": "text", "text": system}]}, user(text)],
            [{"role": "system", "content": system}, user(text)],
            [user(f"{system} {text}")],
        ):
            try:
                chat = self.processor.apply_chat_template(
                    messages, add_generation_prompt=True, **settings
                )
            except Exception as error:  # of any kind: templates are programs
                reason = error
                continue
            if "{'type': 'text'" not in chat:  # the list of parts as a string
                return chat
        raise ValueError(f"its chat template fails: {reason}")

    def inputs(self, system, images, texts):
        """Tokenized, left-padded model inputs of one user message per image."""
        chats = [self.chat(system, text) for text in texts]
        settings = {"padding": True, "return_tensors": "pt"}
        bos = self.processor.tokenizer.bos_token
        if bos and chats[0].startswith(bos):  # the template gave it already
            settings["add_special_tokens"] = False
        images = [[normalize_image(image)] for image in images]
        batch = self.processor(images=images, text=chats, **settings)
        return batch.to(self.model.device, self.model.dtype)

    def try_sharing(self, *inputs):
        """Share from now on if `shared_logits` finds what `single_logits` does, else say why not.

        Both belong to the subclass and take `inputs`. Returns what `single_logits` found.
        """
        single = self.single_logits(*inputs)
        try:
            log_probs = single.float().log_softmax(-1)
            error = (self.shared_logits(*inputs).float().log_softmax(-1) - log_probs).abs().mean()
            # The first input and the last differ in image and text. On tiny models rounding in bf16
            # is at most 3% of how far apart they are, a wrong attention window 15% or more.
            self.share = bool(error < 0.1 * (log_probs[0] - log_probs[-1]).abs().mean())
            reason = f"else the log-probs would differ by {error:.1e}"
        except Exception as failure:  # of any kind: it comes from the depths of transformers
            reason = " ".join(str(failure).split())[:200]
        if not self.share:
            kind, name = type(self).__name__, self.processor.tokenizer.name_or_path
            print(f"{kind} {name}: every text encodes its image anew; {reason}", file=sys.stderr)
        return single

    def read_on(self, head, owner, ids, mask, keep):
        """Read tails that continue one of B heads each, reading every head only once.

        A head is read into a key-value cache (with gradient, unless that is off). A tail continues
        from a copy of it, at the positions that it would have in a sequence of its own.

        Args: head: the model's inputs for the B heads, padded on the left; owner (R): index of the
        head of each tail; ids (R, T): the tails, padded on the right, because padding between head
        and tail would count in a sliding window; mask (R, T): False for padding.
        Returns the logits (R, V) after each tail's head, and (R, keep, V) of the last `keep` tokens
        of the tails.
        """
        import torch

        head_mask = head["attention_mask"]  # (B, head tokens)
        has_rope_index = hasattr(self.model.model, "get_rope_index")  # Qwen-VL: 3-D positions
        if not has_rope_index:
            head["position_ids"] = (head_mask.cumsum(1) - 1).clamp(min=0)
        read = self.model(**head, logits_to_keep=1, use_cache=True)
        cache = read.past_key_values
        cache.batch_select_indices(owner)
        mask = torch.cat([head_mask[owner], mask.to(head_mask)], 1)  # (R, head tokens + T)
        positions = mask.cumsum(1)[:, -ids.shape[1] :] - 1
        if has_rope_index:
            positions = (positions + self.model.model.rope_deltas[owner]).expand(3, *ids.shape)
        tails = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=keep,
        )
        return read.logits[owner, -1], tails.logits


class Checker(VLM):
    """Says what an image shows: one question per object and triple of the graph."""

    def __init__(self, model, processor, batch_size=64):
        super().__init__(model, processor, batch_size)
        self.yes_no = self.token_ids("yes", "no")

    def probe(self):
        """Call once after loading: try two blank images, and turn sharing on if it works.

        Raises ValueError if the chat template drops the question or ends inside a thought, or if
        yes and no together have little probability: the reward would be noise.
        """
        import torch
        from PIL import Image

        yes, no = self.yes_no
        name = self.processor.tokenizer.name_or_path
        blank = [Image.new("RGB", (64, 64), "white"), Image.new("RGB", (96, 64), "gray")]
        asked = [object_question("red circle"), triple_question(("cup", "left of", "red book"))]
        questions = SYSTEM, [blank[0], blank[0], blank[1], blank[1]], asked * 2
        with torch.no_grad():
            log_probs = self.try_sharing(*questions).log_softmax(-1)  # (4, V)
        mass = log_probs[:, yes + no].exp().sum(1).min().item()
        if OPEN_THOUGHT.search(self.chat(SYSTEM, "")):
            raise ValueError(f"the chat template of {name} ends inside a thought")
        if self.chat(SYSTEM, asked[0]) == self.chat(SYSTEM, asked[1]):
            raise ValueError(f"the chat template of {name} drops the question")
        if not mass >= LEAST_MASS:  # `not >=` also catches NaN
            raise ValueError(
                f"{name} gives yes and no together a probability of {mass:.1e} on a blank image: "
                "its chat template is of another model, or its weights are broken"
            )

    def check(self, images, graphs):
        """One `Reflection` per image. Args: B PIL images and one `SceneGraph` each.

        Raises ValueError if the model answers NaN.
        """
        asked = [questions(graph) for graph in graphs]
        counts = [len(texts) for texts in asked]
        pairs = zip(images, counts, strict=True)
        image_of = [image for image, count in pairs for _ in range(count)]  # (Q)
        log_probs = self.answers(SYSTEM, image_of, sum(asked, []), self.yes_no)  # (Q, 2)
        if not log_probs.isfinite().all():
            raise ValueError("the Checker answers NaN; set 'checker.dtype' to bfloat16 or float32")
        probs = (log_probs[:, 0] - log_probs[:, 1]).sigmoid()  # (Q,) P(yes) / P(yes or no)
        masses = log_probs.exp().sum(1)  # (Q,) P(yes or no)
        parts = zip(graphs, probs.split(counts), masses.split(counts))
        return [reflect(graph, probs, masses.mean()) for graph, probs, masses in parts]

    def answers(self, system, images, texts, words):
        """fp32 log-probs (Q, len(words)) that the answer begins with a spelling of each word.

        Args: Q images and one text each; words: lists of token ids, as of `token_ids`.
        """
        import torch

        logits_of = self.shared_logits if self.share else self.single_logits
        batches = [torch.zeros(0, len(words))]
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            with torch.no_grad():
                logits = logits_of(system, images[part], texts[part])  # (R, V)
            log_probs = logits.log_softmax(-1)
            per_word = [log_probs[:, ids].logsumexp(1) for ids in words]  # (R) each
            batches.append(torch.stack(per_word, 1).cpu())
        return torch.cat(batches)

    def single_logits(self, system, images, texts):
        """fp32 logits (Q, V) of the first answer token, one sequence per question."""
        inputs = self.inputs(system, images, texts)
        output = self.model(**inputs, logits_to_keep=1, use_cache=False)
        return output.logits[:, -1].float()

    def shared_logits(self, system, images, texts):
        """The same, with one encoding of an image for all its questions.

        The head of a question is its prompt up to the last image token, the tail is the rest.
        """
        import torch
        from PIL import Image
        from torch.nn.utils.rnn import pad_sequence

        numbers = {}  # of the B distinct images, by object
        owner = [numbers.setdefault(id(image), len(numbers)) for image in images]  # (Q)
        distinct = [images[owner.index(number)] for number in range(len(numbers))]

        def after_image(ids):
            """True for the tokens after the last image token."""
            return (ids == self.model.config.image_token_id).flip(1).cumsum(1).flip(1) == 0

        head = self.inputs(system, distinct, [""] * len(distinct))
        shape = head["input_ids"].shape  # (B, tokens), of which the last few come after the image
        length = shape[1] - after_image(head["input_ids"])[0].sum()
        head = {k: v[:, :length] if v.shape == shape else v for k, v in head.items()}
        # The tail does not depend on the image, so a small blank one serves here.
        ids = self.inputs(system, [Image.new("RGB", (64, 64))] * len(texts), texts)["input_ids"]
        tails = [row[own] for row, own in zip(ids, after_image(ids))]
        lengths = torch.tensor([len(tail) for tail in tails], device=ids.device)
        ids = pad_sequence(tails, batch_first=True)  # (Q, T)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        owner = torch.tensor(owner, device=ids.device)
        from_shortest = ids.shape[1] - int(lengths.min()) + 1  # from the shortest tail's end on
        _, logits = self.read_on(head, owner, ids, mask, keep=from_shortest)
        return logits[torch.arange(len(ids)), lengths - lengths.min()].float()

    def token_ids(self, *words):
        """For each word the ids of the vocabulary entries that decode to a spelling of it.

        Spellings are yes, Yes and YES, each with or without a space before it. One that not every
        word has is left out, so that no word has an advantage. Raises ValueError if none is left.
        """
        tokenizer = self.processor.tokenizer
        found = []  # per word: the ids of its lower-case, capitalized and upper-case tokens
        for word in words:
            near = [id for token, id in tokenizer.get_vocab().items() if word in token.lower()]
            texts = [tokenizer.decode([id]).strip(" \u2581") for id in near]
            cases = (word, word.capitalize(), word.upper())
            found.append([{id for id, text in zip(near, texts) if text == case} for case in cases])
        common = [case for case in range(3) if all(ids[case] for ids in found)]
        if not common:
            raise ValueError(f"the tokenizer lacks single tokens for {', '.join(words)}")
        return [sorted(set.union(*(ids[case] for case in common))) for ids in found]
