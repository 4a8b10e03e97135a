"""Diffuser: the frozen text-to-image model that starts the Generate-Reflect-Edit loop.

Any diffusers text-to-image pipeline works. An editing pipeline of the Kontext type that is called
without an image is one too, so Diffuser and Editor can share one set of weights. The arguments of
the pipeline call (size, steps, guidance, text length) come from `call:` in the YAML, not from code.
"""

import inspect
import math
import re
import sys
from importlib import import_module


class Diffuser:
    """A diffusers text-to-image pipeline.

    Args:
        pipeline: the loaded pipeline. Its parameters are frozen here.
        call: keyword arguments of every pipeline call.
        batch_size: images per call.
    """

    def __init__(self, pipeline, call=None, batch_size=64):
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        for part in self.pipeline.components.values():
            if hasattr(part, "requires_grad_"):
                part.requires_grad_(False)
        self.call = call or {}
        self.batch_size = batch_size

    @classmethod
    def load(cls, path, device="cpu", dtype="float32", **settings):
        """Load a local folder or Hub id from safetensors; dtype is the name of a torch dtype.

        Raises ValueError if weights are missing, which diffusers alone would make random.
        """
        import torch
        from diffusers import DiffusionPipeline

        options = {"dtype": getattr(torch, dtype), "use_safetensors": True}
        models = {}
        for name, entry in DiffusionPipeline.load_config(path).items():
            if not isinstance(entry, list) or entry[0] not in ("diffusers", "transformers"):
                continue
            kind = getattr(import_module(entry[0]), entry[1])
            if issubclass(kind, torch.nn.Module):
                models[name], info = kind.from_pretrained(
                    path, subfolder=name, output_loading_info=True, **options
                )
                if missing := sorted(info["missing_keys"]):
                    raise ValueError(f"{name} lacks {len(missing)} weights, such as {missing[0]}")
                if unused := sorted(info["unexpected_keys"]):
                    reason = f"{name}: {len(unused)} tensors are not used, such as {unused[0]}"
                    reason += "; its config.json may be of another model"
                    print(f"{path}: {reason}", file=sys.stderr)
        options |= {"trust_remote_code": False, **models}
        return cls(DiffusionPipeline.from_pretrained(path, **options).to(device), **settings)

    def problem(self, prompt):
        """Why the text encoder cannot read a prompt, as one clause, or None if it can."""
        return text_problem(self.pipeline, self.call, prompt)

    def readable(self, graphs, path):
        """The scene graphs whose prompts the pipeline can read; prints how many are left out.

        Raises ValueError, naming the file they came from, if none is left.
        """
        problems = [self.problem(graph.prompt()) for graph in graphs]
        found = [problem for problem in problems if problem]
        if found:
            message = f"{path}: {len(found)} of {len(graphs)} prompts cannot be read ({found[0]})"
            if len(found) == len(graphs):
                raise ValueError(f"{message}; use other data or another Diffuser")
            print(f"{message} and are left out", file=sys.stderr)
        return [graph for graph, problem in zip(graphs, problems) if not problem]

    def generate(self, prompts, seeds):
        """One PIL image per prompt and seed, independent of what else is in the batch.

        Raises ValueError if the pipeline fails, or returns images of another size or only black.
        """
        import torch

        # With `offload: true` an update leaves the transformer on the GPU. The text encoder needs
        # the room. Without offload this does nothing.
        self.pipeline.maybe_free_model_hooks()
        name, images = type(self.pipeline).__name__, []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            # Noise drawn on the CPU is the same on every device.
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            call = dict(self.call)
            if isinstance(call.get("negative_prompt"), str):  # some pipelines want one per prompt
                call["negative_prompt"] = [call["negative_prompt"]] * len(prompts[part])
            try:
                made = self.pipeline(prompt=prompts[part], generator=generators, **call).images
                if all(image.getbbox() is None for image in made):  # NaN becomes black, too
                    raise ValueError(
                        "it returns only black images; set 'diffuser.dtype' to bfloat16 or float32"
                    )
                asked = call.get("width"), call.get("height")
                if all(asked) and made[0].size != asked:
                    raise ValueError(f"asked for width and height {asked}, it makes {made[0].size}")
            except Exception as error:  # of any kind: it comes from the depths of the pipeline
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"key 'diffuser.call': {name} fails: {reason}") from error
            images += made
        return images


def text_problem(pipeline, call, text):
    """Why a pipeline's text encoder cannot read a text, as one clause, or None if it can.

    Pipelines silently cut a text that is too long and read an unknown word as noise.
    call: the arguments of the pipeline's call, such as max_sequence_length.
    """
    if re.search("[\ud800-\udfff]", text):
        return "it holds a lone surrogate, half of a character"
    if special := re.search(r"<\W?\w+\W?>", text):  # a VLM would look for an image in "<image>"
        return f"it holds {special[0]!r}, which may be a special token"
    names = ("tokenizer_3", "tokenizer_2", "tokenizer")  # the highest-numbered reads the most
    found = [getattr(pipeline, name, None) for name in names]
    tokenizer = next((part for part in found if hasattr(part, "is_fast")), None)
    if tokenizer is None:  # such as a processor of text and images
        return None
    read = tokenizer(text, return_offsets_mapping=tokenizer.is_fast)
    ids, unknown = read["input_ids"], []
    for id, (start, end) in zip(ids, read.get("offset_mapping", [])):
        if id == tokenizer.unk_token_id and start < end:  # CLIP's end token has the same id
            unknown.append(text[start:end])
    if unknown:
        return f"the text encoder does not know {' '.join(unknown)!r}"
    takes = inspect.signature(type(pipeline).__call__).parameters
    default = getattr(takes.get("max_sequence_length"), "default", None)
    limit = call.get("max_sequence_length") or default or tokenizer.model_max_length
    if len(ids) > limit:
        return f"it has {len(ids)} tokens, and the text encoder takes {limit}"
    return None


def check_call(key, kind, call):
    """Compare the arguments of a pipeline's call with the signature of its class.

    Raises ValueError for one that is unknown, of another type than its default, or without effect.
    Dictionaries are refused because no pipeline checks their keys, tensors because YAML has none.
    """
    takes = inspect.signature(kind.__call__).parameters
    for name, value in call.items():
        if name not in takes or re.search("embeds|latents|callback|^self$", name):
            raise ValueError(f"key '{key}': {kind.__name__} takes no {name} from a file")
        default = takes[name].default
        several = {float: (int, float), tuple: (list, tuple), type(None): (int, float, str, list)}
        accepted = several.get(type(default), (type(default),))
        # Not isinstance, which takes True for an int.
        finite = type(value) is not float or math.isfinite(value)
        if (type(value) not in accepted and value is not default) or value == [] or not finite:
            wanted = " or ".join(each.__name__ for each in accepted)
            raise ValueError(f"key '{key}.{name}' is {value!r:.100}; make it {wanted}")
    if "true_cfg_scale" in takes:
        negative = [n for n in call if n.startswith("negative_prompt") and call[n] is not None]
        scale = call.get("true_cfg_scale", takes["true_cfg_scale"].default if negative else 1)
        if not (scale > 1) == bool(negative) == ("negative_prompt" in negative):
            raise ValueError(
                f"key '{key}': give true_cfg_scale above 1 with negative_prompt or none"
            )
