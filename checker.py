"""Checker: the VLM that looks at an image and says which stated objects and relations it shows.

Its score is the intrinsic reward of RL-RIG (arXiv 2602.19974): no label is ever used. There is one
question per object and one per triple. P(yes) is read from the logits of the first answer token,
which the public text of the paper leaves open: with sampled answers instead of probabilities, more
groups would have equal rewards.

    P(yes) = sum_{t in yes} exp(l_t) / sum_{t in yes or no} exp(l_t)    yes, no: all spellings
    score  = mean P(yes) over all triples and the objects that no triple names        in [0, 1]

A triple's question asks for its two objects too, so these are not counted a second time. Otherwise
adding a missing object in the wrong place would raise the score, while SG-IoU falls.
"""

import logging
import math
import re
from dataclasses import dataclass

LOG = logging.getLogger(__name__)  # a stderr that is gone stops print, but not this
SYSTEM = "You check images. Answer the question about the image with one word: yes or no."
LEAST_MASS = 0.5  # of yes and no together; below it, scores are noise
# At the end of a prompt, such as <think>, [THINK] or <|think|>.
OPEN_THOUGHT = re.compile(r"(?i)[^/\w](start_|begin_)?(think|thought|reason)\w*\W*$")


@dataclass(frozen=True)
class Reflection:
    """What the Checker saw in one image."""

    probs: tuple[float, ...]  # P(yes) per object, then per triple, in the order of the graph
    score: float  # the reward, in [0, 1]
    feedback: str  # what is missing or wrong, in words that the Actor reads; "" if nothing is
    mass: float = 1.0  # P(yes or no), mean over the questions; if low, do not trust `probs`

    def __post_init__(self):
        fine = all(0 <= prob <= 1 for prob in self.probs) and math.isfinite(self.score + self.mass)
        if not self.probs or not fine:
            raise ValueError(
                f"{self}: probabilities have to be 0 to 1 and the score finite; if they are NaN, "
                "set 'checker.dtype' to bfloat16 or float32"
            )

    @property
    def satisfied(self):
        """Whether every stated object and relation is more likely there than not."""
        return all(prob >= 0.5 for prob in self.probs)


def question(text):
    """The question whose yes means that the image shows it. Any relation word fits, verbs too."""
    return f'Does the image show "{text}"?'


def questions(graph):
    """One question per object, then one per triple."""
    return [question(text) for text in [*graph.labels(), *map(" ".join, graph.triples)]]


def reflect(graph, probs, mass=1.0):
    """The `Reflection` made of P(yes) per object and triple of a graph; numbers or tensors.

    Raises ValueError if there is not one probability for each, from 0 to 1, or nothing to ask.
    """
    probs = tuple(float(prob) for prob in probs)
    count = len(graph.objects) + len(graph.triples)
    if count == 0:
        raise ValueError("the graph has no objects: there is nothing to ask")
    if len(probs) != count:
        raise ValueError(f"give {count} probabilities, not {len(probs)}")
    objects = list(zip(graph.labels(), probs))
    triples = list(zip(graph.triples, probs[len(objects) :]))
    alone = graph.alone()
    required = [p for _, p in triples] + [p for label, p in objects if label in alone]
    missing = ", ".join(label for label, p in objects if p < 0.5)
    wrong = "; ".join(" ".join(triple) for triple, p in triples if p < 0.5)
    feedback = [f"missing: {missing}"] if missing else []
    feedback += [f"wrong: {wrong}"] if wrong else []
    return Reflection(probs, sum(required) / len(required), ". ".join(feedback), float(mass))


# Also in editor.py, so that neither file needs the other.
def normalize_image(image):
    """A PIL image from anywhere as the models read it: upright, RGB, over white.

    Raises ValueError for more than 8 bits per channel, of which nobody knows the range.
    """
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image) or image.mode[0] in "IF":
        raise ValueError("give a PIL image of 8 bits per channel, such as RGB")
    image = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


class VLM:
    """A frozen vision-language model and its processor: what Checker and Actor have in common.

    Freezes the model and sets its tokenizer to pad on the left; several VLMs may share both. Of the
    model's generation config only the end tokens are kept.
    batch_size: texts per forward pass; in `Actor.propose` images, with n completions each.
    """

    def __init__(self, model, processor, batch_size=64):
        from transformers import GenerationConfig

        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.processor.tokenizer.padding_side = "left"
        self.batch_size = batch_size
        self.share = False  # one encoding of an image for all texts about it; see `try_sharing`
        self.checkpointing = False  # see `Actor`
        ends = model.generation_config.eos_token_id
        if ends is None:
            raise ValueError("generation_config.json names no eos_token_id: nothing would end")
        ends = ends if isinstance(ends, list) else [ends]
        size = model.get_input_embeddings().num_embeddings
        if not ends or not all(isinstance(end, int) and 0 <= end < size for end in ends):
            raise ValueError(f"eos_token_id {ends} is not in the vocabulary: nothing would end")
        # Drop the folder's sampling defaults, such as a repetition penalty: they would change the
        # distribution whose log-probs the Actor records, and the answers of a judge.
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[0])
        self.end_ids = ends

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
            ignore_mismatched_sizes=True,  # to name them below
        )
        for name, stored, needed in info["mismatched_keys"]:
            raise ValueError(f"{path}: {name} has shape {[*stored]}; config.json says {[*needed]}")
        if lacking := sorted(info["missing_keys"]):
            raise ValueError(f"{path} lacks the weights of {', '.join(lacking[:3])}")
        if unused := sorted(info["unexpected_keys"]):  # `build` turns transformers' report off
            reason = f"{path}: {len(unused)} tensors are not used, such as {unused[0]}"
            LOG.warning(f"{reason}; config.json may be of another model")
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
        reason = "it prints the list of image and text instead of reading it"
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
            else:
                if "{'type':" not in chat:  # a list that the template took for a string
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

    def add_positions(self, inputs):
        """Add positions that do not count padding. Qwen-VL makes its own, in 3-D."""
        if not hasattr(self.model.model, "get_rope_index"):
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)

    def try_sharing(self, system, texts, *more):
        """Set `share` if the subclass's `shared_logits` agrees with `single_logits`; else say why.

        Args: four texts, two about each of two blank images. Returns the single log-probs. Raises
        ValueError for a chat template that drops the text, and for NaN.
        """
        import torch
        from PIL import Image

        if self.chat(system, texts[0]) == self.chat(system, ""):
            raise ValueError("its chat template drops the text of the message")
        white, gray = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (96, 64), "gray")
        inputs = system, [white, white, gray, gray], texts, *more
        with torch.no_grad():
            single = self.single_logits(*inputs).float().log_softmax(-1)
            if single.isnan().any():
                raise ValueError("it answers NaN; set its dtype to bfloat16 or float32")
            if self.checkpointing:  # transformers then keeps no key-value cache
                return single
            try:
                shared = self.shared_logits(*inputs).float().log_softmax(-1)
                # Relative to the difference between two texts. On tiny models bf16 rounding gives
                # 3%, a wrong attention window 15%.
                apart = (single[0] - single[-1]).abs().mean()
                error = (shared - single).abs().mean() / apart
                if not error < 0.1:
                    raise ValueError(f"sharing would change the log-probs by {error:.0%}")
                self.share = True
            except Exception as failure:
                part, reason = type(self).__name__, " ".join(str(failure).split())[:200]
                LOG.warning(f"{part}: every text encodes its image anew; {reason}")
        return single

    def read_on(self, system, images, texts, ids, mask, keep, cut=0):
        """Logits for R prompts, each followed by a tail: the Actor's completion, or the Checker's
        question. Equal prompts run once, and each tail continues from a copy of their KV cache.

        Args: ids (R, T): the tails, padded on the right, because padding on the left would count in
        a sliding window; mask (R, T): False for padding; cut: tokens to drop at a prompt's end.
        Returns logits (R, 1 + keep, V): after the prompt and the last `keep` tokens of the tail.
        """
        import torch

        pairs = [(id(image), text) for image, text in zip(images, texts)]  # (R)
        distinct = list(dict.fromkeys(pairs))  # (B)
        first = [pairs.index(pair) for pair in distinct]
        owner = torch.tensor([distinct.index(pair) for pair in pairs], device=ids.device)  # (R)
        inputs = self.inputs(system, [images[i] for i in first], [texts[i] for i in first])
        shape = inputs["input_ids"].shape  # (B, tokens)
        for name, value in inputs.items():
            if value.shape == shape:  # an input per token
                inputs[name] = value[:, : shape[1] - cut]
        prompt_mask = inputs["attention_mask"]
        self.add_positions(inputs)
        prompts = self.model(**inputs, logits_to_keep=1, use_cache=True)

        cache = prompts.past_key_values
        cache.batch_select_indices(owner)
        mask = torch.cat([prompt_mask[owner], mask.to(prompt_mask)], 1)  # (R, tokens - cut + T)
        positions = mask.cumsum(1)[:, -ids.shape[1] :] - 1  # (R, T)
        if "position_ids" not in inputs:
            positions = (positions + self.model.model.rope_deltas[owner]).expand(3, *ids.shape)
        tails = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=keep,
        )
        return torch.cat([prompts.logits[owner], tails.logits], 1)


class Checker(VLM):
    """Says what an image shows: one question per object and triple of the graph."""

    def __init__(self, model, processor, batch_size=64):
        super().__init__(model, processor, batch_size)
        self.yes_no = self.token_ids("yes", "no")
        self.low_mass_reported = False

    def probe(self):
        """Call once after loading: try two blank images, and turn sharing on if it works.

        Raises ValueError if the chat template ends inside a thought, or if yes and no together have
        little probability: the reward would be noise.
        """
        name = self.processor.tokenizer.name_or_path
        asked = [question("red circle"), question("cup left of red book")]
        if OPEN_THOUGHT.search(self.chat(SYSTEM, "")):
            raise ValueError(f"the chat template of {name} ends inside a thought")
        probs = self.try_sharing(SYSTEM, asked * 2).exp()  # (4, V)
        mass = probs[:, sum(self.yes_no, [])].sum(1).min()
        if not mass >= LEAST_MASS:  # `not >=` also catches NaN
            raise ValueError(
                f"{name} gives yes and no together a probability of {mass:.1e} on a blank image: "
                "its chat template is of another model, or its weights are broken"
            )

    def check(self, images, graphs):
        """One `Reflection` per image. Args: B PIL images and one `SceneGraph` each."""
        asked = [questions(graph) for graph in graphs]
        counts = [len(texts) for texts in asked]
        image_of = [image for image, texts in zip(images, asked, strict=True) for _ in texts]  # (Q)
        log_probs = self.answers(SYSTEM, image_of, sum(asked, []), self.yes_no)  # (Q, 2)
        probs = (log_probs[:, 0] - log_probs[:, 1]).sigmoid()  # (Q,) P(yes) / P(yes or no)
        masses = log_probs.exp().sum(1)  # (Q,) P(yes or no)
        if len(masses) and masses.mean() < LEAST_MASS and not self.low_mass_reported:
            name = self.processor.tokenizer.name_or_path
            said = f"{name} gives yes and no together a probability of {masses.mean():.0%}"
            LOG.warning(f"Checker: {said}: its scores are noise")
            self.low_mass_reported = True
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
        """The same, but an image is encoded once for all its questions.

        The shared prompt is that of the question "", cut after the last image token; the tails are
        the rest of each question's prompt.
        """
        import torch
        from PIL import Image
        from torch.nn.utils.rnn import pad_sequence

        # What comes after an image does not depend on it, so a small blank one serves here.
        blank = [Image.new("RGB", (64, 64))] * (1 + len(texts))
        ids = self.inputs(system, blank, ["", *texts])["input_ids"]
        is_image = ids == self.model.config.image_token_id
        # Numbers of tokens after the last image token: `argmax` finds the first of many maxima.
        cut, *lengths = is_image.flip(1).int().argmax(1).tolist()
        tails = [row[-length:] for row, length in zip(ids[1:], lengths)]
        mask = pad_sequence([torch.ones_like(tail) for tail in tails], batch_first=True)  # (Q, T)
        tails = pad_sequence(tails, batch_first=True)  # (Q, T)
        shortest = min(lengths)
        keep = tails.shape[1] - shortest + 1  # from the last token of the shortest tail on
        logits = self.read_on(system, images, [""] * len(texts), tails, mask, keep, cut)
        return logits[range(len(texts)), [1 + length - shortest for length in lengths]].float()

    def token_ids(self, *words):
        """For each word the ids of all tokens that decode to a spelling of it.

        Spellings are yes, Yes, and YES, with or without a space before them. One that not every
        word has is left out, so that no word has an advantage. Raises ValueError if none is left.
        """
        tokenizer = self.processor.tokenizer
        ids_of = {}  # by decoded text
        for token, id in tokenizer.get_vocab().items():
            if any(word in token.lower() for word in words):
                text = tokenizer.decode([id]).strip(" \u2581")
                ids_of.setdefault(text, []).append(id)
        cases = [
            case
            for case in (str.lower, str.capitalize, str.upper)
            if all(case(word) in ids_of for word in words)
        ]
        if not cases:
            raise ValueError(f"the tokenizer lacks single tokens for {', '.join(words)}")
        return [sorted({id for case in cases for id in ids_of[case(word)]}) for word in words]
