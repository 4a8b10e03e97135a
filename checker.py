"""Checker: the VLM that looks at an image and says which stated objects and relations it shows.

Its score is the intrinsic reward of RL-RIG (arXiv 2602.19974): no label is ever used. There is one
question per object and one per triple, and the answer is read from the logits of one forward pass,
never from sampled text:

    P(yes) = sum_{t in yes} exp(l_t) / sum_{t in yes or no} exp(l_t)    over all spellings of both
    score  = 1/2 mean_objects P(yes) + 1/2 mean_triples P(yes)          in [0, 1]

The paper leaves the form of the answer open. A probability carries more signal than a sampled yes:
the rewards of a group are rarely all the same.
"""

from dataclasses import dataclass

SYSTEM = "You check pictures. Answer the question about the picture with one word: yes or no."


@dataclass(frozen=True)
class Reflection:
    """What the Checker saw in one image.

    probs: P(yes) per object, then per triple, in the order of the graph.
    score: the reward, in [0, 1].
    feedback: what is missing or wrong, in words that the Actor reads; "" if nothing is.
    """

    probs: tuple[float, ...]
    score: float
    feedback: str

    @property
    def satisfied(self):
        """Whether every stated object and relation is more likely there than not."""
        return all(prob >= 0.5 for prob in self.probs)


def object_question(name):
    """The question whose yes means that the object is in the image."""
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return f"Is there {article} {name}?"


def triple_question(triple):
    """The question whose yes means that the relation holds."""
    subject, relation, object = triple
    return f"Is the {subject} {relation} the {object}?"


def reflect(graph, probs):
    """The `Reflection` made of P(yes) per object and triple of a graph."""
    objects = list(zip(graph.objects, probs))
    triples = list(zip(graph.triples, probs[len(objects) :]))
    means = [sum(p for _, p in part) / len(part) for part in (objects, triples) if part]
    missing = [name for name, p in objects if p < 0.5]
    wrong = [" ".join(triple) for triple, p in triples if p < 0.5]
    feedback = []
    if missing:
        feedback.append("missing: " + ", ".join(missing))
    if wrong:
        feedback.append("wrong: " + "; ".join(wrong))
    return Reflection(tuple(probs), sum(means) / len(means), ". ".join(feedback))


class Checker:
    """A frozen VLM and its processor.

    Args:
        model, processor: an `AutoModelForImageTextToText` and its `AutoProcessor`. The parameters
            are frozen and the tokenizer is set to pad on the left. The model may be shared with
            the Actor, whose adapter is only active while the Actor runs.
        batch_size: questions per forward pass.
    """

    def __init__(self, model, processor, batch_size=64):
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.processor.tokenizer.padding_side = "left"
        self.batch_size = batch_size
        self.yes = self.token_ids("yes")
        self.no = self.token_ids("no")

    @classmethod
    def load(cls, path, device="cpu", dtype="float32", **settings):
        """Load a local folder or Hub id; dtype is the name of a torch dtype."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, use_safetensors=True)
        return cls(model.to(device), AutoProcessor.from_pretrained(path), **settings)

    def check(self, images, graphs):
        """Reflect on each image. Args: B PIL images and one `SceneGraph` each.

        Raises ValueError for a graph without objects and for a model that answers NaN.
        """
        asked, questions = [], []  # one question per object and triple of every image
        for image, graph in zip(images, graphs, strict=True):
            if not graph.objects:
                raise ValueError(f"nothing to check: the graph {graph.id!r} names no object")
            questions += [object_question(name) for name in graph.objects]
            questions += [triple_question(triple) for triple in graph.triples]
            asked += [image] * (len(graph.objects) + len(graph.triples))
        if not questions:
            return []
        logits = self.next_token_logits(SYSTEM, asked, questions, self.yes + self.no)
        yes, no = logits.split((len(self.yes), len(self.no)), 1)
        probs = (yes.logsumexp(-1) - no.logsumexp(-1)).sigmoid()  # (questions,)
        if not probs.isfinite().all():
            raise ValueError("the Checker answers NaN; set 'checker.dtype' to bfloat16 or float32")
        probs = probs.tolist()
        reflections = []
        for graph in graphs:
            count = len(graph.objects) + len(graph.triples)
            reflections.append(reflect(graph, probs[:count]))
            probs = probs[count:]
        return reflections

    def next_token_logits(self, system, images, texts, ids):
        """fp32 logits (B, len(ids)) of the first answer token to one text per image."""
        import torch

        logits = []
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            inputs = self.inputs(system, images[part], texts[part])
            with torch.no_grad():
                output = self.model(**inputs, logits_to_keep=1)
            logits.append(output.logits[:, -1, ids].float())
        return torch.cat(logits)

    def inputs(self, system, images, texts):
        """Tokenized, left-padded model inputs of one user message per image."""
        prompts = []
        for text in texts:
            messages = [
                {"role": "system", "content": [{"type": "text", "text": system}]},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]},
            ]
            prompts.append(self.processor.apply_chat_template(messages, add_generation_prompt=True))
        batch = self.processor(
            images=[[image] for image in images], text=prompts, padding=True, return_tensors="pt"
        )
        return batch.to(self.model.device, self.model.dtype)

    def token_ids(self, word):
        """The ids of all spellings of a word that are one token. Raises ValueError if none is."""
        tokenizer = self.processor.tokenizer
        found = []
        spaced = (f" {word}", f" {word.capitalize()}")
        for spelling in (word, word.capitalize(), word.upper(), *spaced):
            ids = tokenizer.encode(spelling, add_special_tokens=False)
            if len(ids) == 1 and ids[0] != tokenizer.unk_token_id and ids[0] not in found:
                found.append(ids[0])
        if not found:
            raise ValueError(
                f"the tokenizer has no single token for {word!r}; use another VLM as the Checker"
            )
        return found
