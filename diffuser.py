"""Diffuser: the frozen text-to-image model that starts the Generate-Reflect-Edit loop.

Any text-to-image pipeline of diffusers will do; a Kontext-type editing pipeline without an image
is one too, so Diffuser and Editor can share theirs. Arguments of the pipeline's call (size, steps,
guidance, text length) come from the YAML's `call:`, not from code.

    python diffuser.py "red circle left of blue square" picture.png
"""

import inspect
import sys


def text_problem(pipeline, prompt, max_length=None):
    """Why a pipeline's text encoder cannot read a prompt (str), or None where it can.

    max_length: of the call; None takes the pipeline's default, or else the tokenizer's. Pipelines
    cut a prompt that is too long and read an unknown word as noise, both silently.
    """
    if prompt != prompt.encode(errors="replace").decode():
        return "it holds half a character, a lone surrogate"
    names = ("tokenizer_3", "tokenizer_2", "tokenizer")  # the highest-numbered reads most
    found = [getattr(pipeline, name) for name in names if getattr(pipeline, name, None)]
    if not found or not hasattr(found[0], "is_fast"):  # a processor of texts and pictures
        return None
    tokenizer = found[0]
    encoded = tokenizer(prompt, return_offsets_mapping=tokenizer.is_fast)
    unknown = [
        prompt[start:end]
        for id, (start, end) in zip(encoded.input_ids, encoded.get("offset_mapping", []))
        if id == tokenizer.unk_token_id
    ]
    if unknown:
        return f"the text encoder does not know {', '.join(map(repr, unknown))}"
    length = len(encoded.input_ids)
    default = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    limit = max_length or getattr(default, "default", None) or tokenizer.model_max_length
    if length > limit:
        return f"{length} tokens, and the text encoder takes {limit}"
    return None


class Diffuser:
    """A frozen diffusers text-to-image pipeline.

    Args:
        pipeline: as `load` gives it; call: keyword arguments of its call;
        batch_size: images a call.
    """

    def __init__(self, pipeline, call=None, batch_size=64):
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        for part in self.pipeline.components.values():
            if hasattr(part, "requires_grad_"):
                part.requires_grad_(False)  # kernels differ where it is True
        self.call = call or {}
        self.batch_size = batch_size
        self.arrive = lambda: None  # `memory.take_turns` makes room on the GPU with it

    @classmethod
    def load(cls, path, device="auto", dtype="auto", **settings):
        """Loads a local folder or Hub id; auto is CUDA in bf16, else the CPU in fp32."""
        import torch
        from diffusers import DiffusionPipeline

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        pipeline = DiffusionPipeline.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True
        )
        return cls(pipeline.to(device), **settings)

    def problem(self, prompt):
        """Why the pipeline cannot read a prompt, as one clause, or None."""
        return text_problem(self.pipeline, prompt, self.call.get("max_sequence_length"))

    def readable(self, graphs, path):
        """The scene graphs whose prompts the pipeline reads; how many are left out is said aloud.

        Raises ValueError, naming the file they came from, where none is left.
        """
        problems = [self.problem(graph.prompt()) for graph in graphs]
        told = [problem for problem in problems if problem]
        if told:
            message = f"{path}: {len(told)} of {len(graphs)} prompts cannot be read ({told[0]})"
            if len(told) == len(graphs):
                raise ValueError(f"{message}; give other data or another Diffuser")
            print(f"{message} and are left out", file=sys.stderr)
        return [graph for graph, problem in zip(graphs, problems) if not problem]

    def generate(self, prompts, seeds):
        """One PIL image per prompt and seed; it does not depend on what else is in the batch.

        Raises ValueError where the pipeline gives nothing but black pictures.
        """
        import torch

        images = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            # Noise drawn on the CPU is the same on every device.
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            call = dict(self.call)
            if isinstance(call.get("negative_prompt"), str):  # some pipelines want one for each
                call["negative_prompt"] = [call["negative_prompt"]] * len(prompts[part])
            self.arrive()
            output = self.pipeline(prompt=prompts[part], generator=generators, **call)
            if all(image.getbbox() is None for image in output.images):  # as NaN becomes, too
                raise ValueError(
                    f"{type(self.pipeline).__name__} draws nothing but black: its numbers overflow "
                    "(key 'diffuser.dtype': bfloat16 or float32), or its weights are damaged"
                )
            images += output.images
        return images


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    call = {"height": 32, "width": 32, "max_area": 1024}
    call |= {"num_inference_steps": 8, "max_sequence_length": 18}
    diffuser = Diffuser.load("tiny/models/flow", call=call)
    if problem := diffuser.problem(sys.argv[1]):
        sys.exit(f"{sys.argv[1]!r}: {problem}")
    diffuser.generate([sys.argv[1]], [0])[0].save(sys.argv[2])
