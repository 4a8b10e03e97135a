"""Checker: the VLM that looks at a picture and tells which stated objects and relations hold.

Its score is the intrinsic reward of RL-RIG (arXiv 2602.19974): no gold label is ever used. One
question per object (Does the image show "red circle"?) and per triple (Does the image show "red
circle left of blue square"?); the answer is read from the logits of one forward pass, never from
sampled text:

    P(yes) = sum_{t in yes} exp(l_t) / sum_{t in yes or no} exp(l_t)    all spellings of both
    score  = 1/2 mean_objects P(yes) + 1/2 mean_triples P(yes)          in [0, 1]

`extract` and `judge` measure rather than reward: scene-graph extraction after LAION-SG (arXiv
2412.08580) and a VLM as a judge, the expectation over the ten digits.

What a model must know of its task stands in the system message, the data in the user message.
Differs from the paper: it leaves the form of the Checker's answer open; a probability carries more
signal than a sampled yes (the reward within a group is rarely flat).

    python checker.py picture.png "red circle left of blue square"
"""

from dataclasses import dataclass

from sgiou import parse_scene_graph

VERDICT = "You check images. Answer the question about the image with one word: yes or no."
EXTRACT = (
    'You list what an image shows as JSON: {"objects":[...],"triples":[["subject","relation",'
    '"object"],...]}. Use only the objects, pairs and relations named; leave out what is not there.'
)
JUDGE = "You grade images. Answer with one digit from 0 (nothing fits) to 9 (everything fits)."


@dataclass(frozen=True)
class Reflection:
    """What the Checker saw in one picture.

    probs: P(yes) per object, then per triple, in the graph's order; score: in [0, 1];
    feedback: what fails, in words that the Actor reads ("" where all is well).
    """

    probs: tuple[float, ...]
    score: float
    feedback: str

    @property
    def satisfied(self):
        """Whether every stated object and relation more likely holds than not."""
        return all(prob >= 0.5 for prob in self.probs)


def object_question(name):
    """The question whose yes means that an object is in the image."""
    return f'Does the image show "{name}"?'


def triple_question(triple):
    """The question whose yes means that a relation holds."""
    return f'Does the image show "{" ".join(triple)}"?'


def extract_request(graph, relations):
    """The user message of `extract`: the gold items, which pairs to relate, and the words."""
    pairs = ", ".join(f"{subject} - {object}" for subject, _, object in graph.triples)
    return (
        f"Objects: {', '.join(graph.objects)}. Pairs: {pairs}. Relations: {', '.join(relations)}."
    )


def judge_request(prompt):
    """The user message of `judge`."""
    return f"How well does the image fit: {prompt}?"


def feedback(graph, probs):
    """What fails at P(yes) < 0.5, as "missing: a, b. wrong: c left of d"; "" where nothing does."""
    objects = probs[: len(graph.objects)]
    triples = probs[len(graph.objects) :]
    missing = [name for name, prob in zip(graph.objects, objects) if prob < 0.5]
    wrong = [" ".join(triple) for triple, prob in zip(graph.triples, triples) if prob < 0.5]
    parts = []
    if missing:
        parts.append("missing: " + ", ".join(missing))
    if wrong:
        parts.append("wrong: " + "; ".join(wrong))
    return ". ".join(parts)


def reflect(graph, probs):
    """The `Reflection` of one picture from its P(yes) per object and triple."""
    objects = probs[: len(graph.objects)]
    triples = probs[len(graph.objects) :]
    means = [sum(part) / len(part) for part in (objects, triples) if part]
    return Reflection(tuple(probs), sum(means) / len(means), feedback(graph, probs))


class Checker:
    """A frozen `AutoModelForImageTextToText` with its processor.

    Args:
        model, processor: as `load` gives them; the model may be shared with the Actor, whose
            adapter is off whenever the Actor does not run.
        batch_size: questions a forward pass.
        relations: relation words that `extract` may use; None takes each graph's own.
    """

    def __init__(self, model, processor, batch_size=64, relations=None):
        self.model = model.eval().requires_grad_(False)  # kernels differ where it is True
        self.processor = processor
        self.processor.tokenizer.padding_side = "left"
        self.batch_size = batch_size
        self.arrive = lambda: None  # `memory.take_turns` makes room on the GPU with it
        self.relations = relations
        self.yes = self.token_ids("yes")
        self.no = self.token_ids("no")
        self.digits = [self.token_ids(str(digit))[0] for digit in range(10)]

    @classmethod
    def load(cls, path, device="auto", dtype="auto", **settings):
        """Loads a local folder or Hub id; auto is CUDA in bf16, else the CPU in fp32."""
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True
        )
        return cls(model.to(device), AutoProcessor.from_pretrained(path), **settings)

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
                f"the Checker's tokenizer has no single token for {word!r}: use another model"
            )
        return found

    def inputs(self, system, images, texts):
        """Tokenised, left-padded model inputs of one user message per image."""
        self.arrive()
        task = {"role": "system", "content": [{"type": "text", "text": system}]}
        prompts = []
        for text in texts:
            asked = [{"type": "image"}, {"type": "text", "text": text}]
            messages = [task, {"role": "user", "content": asked}]
            prompts.append(self.processor.apply_chat_template(messages, add_generation_prompt=True))
        batch = self.processor(
            images=[[image] for image in images], text=prompts, padding=True, return_tensors="pt"
        )
        return batch.to(self.model.device, self.model.dtype)

    def next_token_logits(self, system, images, texts, ids):
        """fp32 logits (B, len(ids)) of the first answer token to one question per image."""
        import torch

        logits = []
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            with torch.no_grad():
                output = self.model(
                    **self.inputs(system, images[part], texts[part]), logits_to_keep=1
                )
            logits.append(output.logits[:, -1, ids].float())
        return torch.cat(logits)

    def check(self, images, graphs):
        """Reflects on each picture. Args: PIL images and one `SceneGraph` each.

        All questions of all pictures are batched. Raises ValueError for a graph without objects,
        and for a model that answers NaN.
        """
        asked, texts = [], []
        for image, graph in zip(images, graphs, strict=True):
            if not graph.objects:
                raise ValueError(f"nothing to check: the graph {graph.id!r} names no object")
            questions = [object_question(name) for name in graph.objects]
            questions += [triple_question(triple) for triple in graph.triples]
            asked += [image] * len(questions)
            texts += questions
        if not texts:
            return []
        logits = self.next_token_logits(VERDICT, asked, texts, self.yes + self.no)
        yes, no = logits.split((len(self.yes), len(self.no)), 1)
        probs = (yes.logsumexp(-1) - no.logsumexp(-1)).sigmoid()
        if not probs.isfinite().all():
            raise ValueError("the Checker answers NaN (key 'checker.dtype': bfloat16 or float32)")
        probs = probs.tolist()
        reflections = []
        for graph in graphs:
            count = len(graph.objects) + len(graph.triples)
            reflections.append(reflect(graph, probs[:count]))
            probs = probs[count:]
        return reflections

    def extract(self, images, graphs, max_new_tokens=256):
        """The scene graph that the VLM writes down for each picture, as LAION-SG measures."""
        import torch

        answers = []
        allowed = [self.relations or list({r: 0 for _, r, _ in graph.triples}) for graph in graphs]
        texts = [extract_request(*asked) for asked in zip(graphs, allowed, strict=True)]
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            inputs = self.inputs(EXTRACT, images[part], texts[part])
            with torch.no_grad():
                ids = self.model.generate(
                    **inputs, max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.0
                )
            completions = ids[:, inputs["input_ids"].shape[1] :]
            answers += self.processor.batch_decode(completions, skip_special_tokens=True)
        return [
            parse_scene_graph(answer, graph.objects, relations)
            for answer, graph, relations in zip(answers, graphs, allowed)
        ]

    def judge(self, images, prompts):
        """How well each picture fits its prompt, in [0, 1]: the expected digit over nine."""
        import torch

        texts = [judge_request(prompt) for prompt in prompts]
        logits = self.next_token_logits(JUDGE, images, texts, self.digits)
        return (logits.softmax(-1) @ torch.arange(10.0, device=logits.device) / 9).tolist()


if __name__ == "__main__":
    import sys

    from PIL import Image

    from sgiou import parse_prompt

    if len(sys.argv) != 3:
        sys.exit(__doc__)
    relations = ["left of", "right of", "above", "below"]
    graph = parse_prompt(sys.argv[2], relations)
    checker = Checker.load("tiny/models/vlm", relations=relations)
    print(checker.check([Image.open(sys.argv[1])], [graph])[0])
