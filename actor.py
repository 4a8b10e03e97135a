"""Actor: the VLM that reasons over picture, prompt and verdicts, and writes one edit instruction.

It sees what the Checker's `Reflection` says and answers

    <think>the red circle is right of the blue square</think>
    <edit>move the red circle left of the blue square</edit>

Any other form is malformed and edits nothing; `<edit>none</edit>` wants no edit. (The paper, arXiv
2602.19974, leaves the form open.) Phase 1 trains a LoRA adapter: `propose` keeps ids and log-probs
of what it samples, `log_probs` scores the same ids again, with gradient.

The adapter is off but inside `propose` and `adapter()`: a Checker that shares the model never
meets it, or the policy would grade itself.

    python actor.py picture.png "red circle left of blue square"
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from grpo import completion_mask, token_log_probs

INSTRUCT = (
    "You repair images that do not fit their prompt. Think about what is wrong and how one edit "
    "can mend it without breaking the rest. Answer with <think>your reasoning</think><edit>one "
    "instruction to an image editor</edit>, such as <edit>move the red cup left of the blue book"
    "</edit>, or <edit>none</edit> if nothing should change."
)
FORM = re.compile(r"\s*<think>(.*?)</think>\s*<edit>(.*?)</edit>\s*", re.DOTALL)
ADAPTER = "actor"
TARGETS = r".*(language|text)_model\..*(q|k|v|o|gate|up|down)_proj"  # the Checker sees alike


def request(prompt, feedback, tried=()):
    """The user message: the prompt, what fails, and the instructions that did not help so far."""
    text = f"Prompt: {prompt}. {feedback or 'nothing is wrong'}."
    return text + f" Tried without success: {'; '.join(tried)}." if tried else text


def parse_completion(text):
    """(thought, instruction) of a completion; (text, None) where it is malformed."""
    match = FORM.fullmatch(text)
    if match is None or not match[2].strip() or "<" in match[1] + match[2]:
        return text.strip(), None
    instruction = " ".join(match[2].split())
    return match[1].strip(), "none" if instruction.lower() in ("none", "none.") else instruction


@dataclass
class Proposals:
    """N completions; those of one image stand together."""

    images: list  # (N) PIL images, and
    prompts: list[str]  # (N) chat prompts: what was answered
    ids: object  # (N, T) completion token ids, padded on the right
    mask: object  # (N, T) bool: up to and including the first end
    sampled_log_probs: object  # (N, T) fp32, as sampled
    thoughts: list[str]
    instructions: list[str | None]  # None: malformed; "none": no edit wanted
    truncated: list[bool]  # no end within `max_new_tokens`


class SampledLogProbs:
    """A logits processor that changes nothing and keeps the log-probs of what is sampled."""

    def __init__(self, temperature):
        self.temperature = temperature
        self.logits, self.columns = None, []

    def __call__(self, input_ids, logits):
        self.take(input_ids[:, -1])
        self.logits = logits
        return logits

    def take(self, ids):
        """ids (N,): drawn from the logits seen last."""
        if self.logits is not None:
            logits, ids = self.logits[:, None], ids[:, None]  # (N, 1, V), (N, 1)
            self.columns.append(token_log_probs(logits, ids, self.temperature))


class Actor:
    """An `AutoModelForImageTextToText` and its processor; batch_size: prompts a `generate`."""

    def __init__(self, model, processor, batch_size=64, max_new_tokens=256, temperature=1.0):
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.processor.tokenizer.padding_side = "left"
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        ends = self.model.generation_config.eos_token_id
        # A sampled picture token ends a completion: in a replay it would ask for a picture.
        visual = {getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video")}
        self.visual_ids = list(visual - {None})
        self.end_ids = [*(ends if isinstance(ends, list) else [ends]), *self.visual_ids]
        self.arrive = lambda: None  # `memory.take_turns` makes room on the GPU with it
        self.has_adapter = self.adapter_on = False  # the latter but inside `adapter()`
        self.use_adapter = True  # whether `propose` turns it on

    @classmethod
    def load(cls, path, device="auto", dtype="auto", **settings):
        """Loads a local folder or Hub id; auto is CUDA in bf16, else the CPU in fp32."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True
        )
        return cls(model.to(device), AutoProcessor.from_pretrained(path), **settings)

    def add_adapter(self, rank):
        """Adds an untrained LoRA to the language model (it changes nothing yet): its parameters."""
        from peft import LoraConfig

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
        self.model.add_adapter(config, adapter_name=ADAPTER)
        self.has_adapter = True
        trained = [p for n, p in self.model.named_parameters() if f".{ADAPTER}." in n]
        for parameter in trained:
            parameter.data = parameter.data.float()
        self.model.disable_adapters()
        self.arrive()  # the optimizer's state will be where its parameters are now
        return trained

    def load_adapter(self, folder):
        """Loads a folder that `save_adapter` wrote; it is off until `adapter()`."""
        self.model.load_adapter(str(folder), adapter_name=ADAPTER)
        self.model.disable_adapters()
        self.has_adapter = True

    def save_adapter(self, folder):
        """Writes what `PeftModel.from_pretrained(model, folder)` reads."""
        with self.adapter():
            self.model.save_pretrained(folder)

    @contextmanager
    def adapter(self, on=True):
        """The adapter is on (or off) inside, and afterwards as it was, whatever happens.

        peft freezes what is off: `backward` has to happen inside, too.
        """
        before = self.adapter_on
        self._switch(on)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, on):
        if self.has_adapter and on != self.adapter_on:
            self.model.enable_adapters() if on else self.model.disable_adapters()
            self.adapter_on = on

    def prompts(self, graphs, reflections, tried=None):
        """The chat prompts (str). tried: for each graph, instructions that did not help."""
        system = {"role": "system", "content": [{"type": "text", "text": INSTRUCT}]}
        prompts = []
        tried = tried or [()] * len(graphs)
        for graph, reflection, without in zip(graphs, reflections, tried, strict=True):
            text = {"type": "text", "text": request(graph.prompt(), reflection.feedback, without)}
            chat = [system, {"role": "user", "content": [{"type": "image"}, text]}]
            prompts.append(self.processor.apply_chat_template(chat, add_generation_prompt=True))
        return prompts

    def inputs(self, images, prompts):
        """Tokenised, left-padded model inputs, one row per image and prompt."""
        self.arrive()
        pictures = [[image] for image in images]
        batch = self.processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
        return batch.to(self.model.device, self.model.dtype)

    def propose(self, images, graphs, reflections, n=1, seed=0, tried=None):
        """Samples `n` completions for each of B images, `SceneGraph`s and `Reflection`s.

        Returns `Proposals` of N = B * n. One generator serves all rows: the batch matters.
        """
        from torch.nn.functional import pad

        prompts = self.prompts(graphs, reflections, tried)
        # Outdoes the folder's defaults: what they cut, once log-probs are kept, shows in no replay.
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        sampling |= {"min_p": None, "top_h": None, "typical_p": 1.0, "repetition_penalty": 1.0}
        sampling |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "eos_token_id": self.end_ids}
        sampling |= {"max_new_tokens": self.max_new_tokens, "num_return_sequences": n}
        ids, log_probs = [], []
        with self.adapter(self.use_adapter), torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for start in range(0, len(images), self.batch_size):
                part = slice(start, start + self.batch_size)
                inputs = self.inputs(images[part], prompts[part])
                recorder = SampledLogProbs(self.temperature)
                output = self.model.generate(**inputs, **sampling, logits_processor=[recorder])
                recorder.take(output[:, -1])
                ids.append(output[:, inputs["input_ids"].shape[1] :])
                log_probs.append(torch.cat(recorder.columns, 1))
        longest = max(part.shape[1] for part in ids)
        padding = [(0, longest - part.shape[1]) for part in ids]
        ids = torch.cat([pad(*row, value=self.end_ids[0]) for row in zip(ids, padding)])
        log_probs = torch.cat([pad(*row) for row in zip(log_probs, padding)])
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        parsed = [parse_completion(text) for text in texts]
        return Proposals(
            images=[image for image in images for _ in range(n)],
            prompts=[prompt for prompt in prompts for _ in range(n)],
            ids=ids,
            mask=completion_mask(ids, self.end_ids),
            sampled_log_probs=log_probs,
            thoughts=[thought for thought, _ in parsed],
            instructions=[instruction for _, instruction in parsed],
            truncated=(~torch.isin(ids, ids.new_tensor(self.end_ids)).any(1)).tolist(),
        )

    def log_probs(self, proposals, rows):
        """log pi of the completions in `rows` (a slice) again, with gradient: (R, T) fp32."""
        inputs = self.inputs(proposals.images[rows], proposals.prompts[rows])
        ids, mask = proposals.ids[rows], proposals.mask[rows]  # (R, T)
        shape = inputs["input_ids"].shape  # (R, prompt tokens)
        seen = ids.masked_fill(torch.isin(ids, ids.new_tensor(self.visual_ids)), self.end_ids[0])
        answers = {"input_ids": seen, "attention_mask": mask}
        for name, value in inputs.items():
            if value.shape == shape:  # one per token; of others, such as token types, zeros
                inputs[name] = torch.cat([value, answers.get(name, ids * 0).to(value)], 1)
        if not hasattr(self.model.model, "get_rope_index"):  # Qwen-VL type models count in 3-D
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = self.model(**inputs, logits_to_keep=ids.shape[1] + 1, use_cache=False).logits
        return token_log_probs(logits[:, :-1], ids, self.temperature)


if __name__ == "__main__":
    import sys
    from types import SimpleNamespace

    from PIL import Image

    from sgiou import parse_prompt

    if len(sys.argv) != 3:
        sys.exit(__doc__)
    graph = parse_prompt(sys.argv[2], ["left of", "right of", "above", "below"])
    told = SimpleNamespace(feedback=f"wrong: {graph.prompt()}")
    actor = Actor.load("tiny/models/vlm", max_new_tokens=40)
    proposals = actor.propose([Image.open(sys.argv[1]).convert("RGB")], [graph], [told], n=4)
    for thought, instruction in zip(proposals.thoughts, proposals.instructions):
        print(f"{thought} -> {instruction}")
