"""Actor: the VLM that reasons over picture, prompt and verdicts, and writes one edit instruction.

It sees what the Checker's `Reflection` says and answers

    <think>the red circle is right of the blue square</think>
    <edit>move the red circle left of the blue square</edit>

(arXiv 2602.19974, where it is trained in phase 1). A completion without exactly this form is
malformed and edits nothing; `<edit>none</edit>` says that nothing should change.

Differs from the paper: it leaves the form of the completion open.

    python actor.py picture.png "red circle left of blue square" "wrong: red circle left of blue square"
"""

import re
from dataclasses import dataclass

INSTRUCT = (
    "You repair pictures that do not fit their prompt. Think about what is wrong and how one edit "
    "can mend it without breaking the rest. Answer with <think>your reasoning</think><edit>one "
    "instruction to an image editor</edit>, such as <edit>move the red cup left of the blue book"
    "</edit>, or <edit>none</edit> if nothing should change."
)
FORM = re.compile(r"\s*<think>(.*?)</think>\s*<edit>(.*?)</edit>\s*", re.DOTALL)


def request(graph, feedback):
    """The user message: the prompt and what fails."""
    return f"Prompt: {graph.prompt()}. {feedback or 'nothing is wrong'}."


def parse_completion(text):
    """(thought, instruction) of a completion; (text, None) where it is malformed."""
    match = FORM.fullmatch(text)
    if match is None or not match[2].strip() or "<" in match[1] + match[2]:
        return text.strip(), None
    return match[1].strip(), " ".join(match[2].split())


@dataclass
class Proposals:
    """Completions of a batch of B images, n each; the n of one image stand together.

    thoughts, instructions: (B * n) strings; an instruction is None where the completion is
    malformed and "none" where the Actor wants no edit. truncated: (B * n) bools, no end was
    written within `max_new_tokens`.
    """

    thoughts: list[str]
    instructions: list[str | None]
    truncated: list[bool]


class Actor:
    """An `AutoModelForImageTextToText` with its processor, shared with the Checker or its own.

    Args:
        batch_size: prompts a call of `generate`; max_new_tokens: completion length in tokens;
        temperature: of sampling, > 0, or 0 for the likeliest token.
    """

    def __init__(self, model, processor, batch_size=64, max_new_tokens=256, temperature=1.0):
        self.model = model.eval()
        self.processor = processor
        self.processor.tokenizer.padding_side = "left"
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

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

    def inputs(self, images, graphs, reflections):
        """Tokenised, left-padded model inputs, one row per image."""
        prompts = [
            self.processor.apply_chat_template(
                [
                    {"role": "system", "content": [{"type": "text", "text": INSTRUCT}]},
                    {
                        "role": "user",
                        "content": [
                            {"type": "image"},
                            {"type": "text", "text": request(graph, reflection.feedback)},
                        ],
                    },
                ],
                add_generation_prompt=True,
            )
            for graph, reflection in zip(graphs, reflections, strict=True)
        ]
        batch = self.processor(
            images=[[image] for image in images], text=prompts, padding=True, return_tensors="pt"
        )
        return batch.to(self.model.device, self.model.dtype)

    def propose(self, images, graphs, reflections, n=1, seed=0):
        """Samples `n` completions for each of B images; returns `Proposals` of B * n.

        Args: PIL images, `SceneGraph`s, Checker `Reflection`s (B each). The draw depends on the
        seed and on the batch: one generator serves all rows.
        """
        import torch

        # Model folders carry sampling defaults of their own (top-k, repetition penalty): outdo them.
        sampling = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "num_return_sequences": n}
        sampling |= {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            sampling["temperature"] = self.temperature
        texts, truncated = [], []
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for start in range(0, len(images), self.batch_size):
                part = slice(start, start + self.batch_size)
                inputs = self.inputs(images[part], graphs[part], reflections[part])
                ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, **sampling)
                completions = ids[:, inputs["input_ids"].shape[1] :]
                texts += self.processor.batch_decode(completions, skip_special_tokens=True)
                ends = torch.tensor(self.end_ids(), device=ids.device)
                truncated += (~torch.isin(completions, ends).any(1)).tolist()
        parsed = [parse_completion(text) for text in texts]
        return Proposals(
            thoughts=[thought for thought, _ in parsed],
            instructions=[instruction for _, instruction in parsed],
            truncated=truncated,
        )

    def end_ids(self):
        """The end-of-sequence ids: a model may have several."""
        ids = self.model.generation_config.eos_token_id
        return ids if isinstance(ids, list) else [ids]
