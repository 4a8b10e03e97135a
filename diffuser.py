"""Diffuser: the frozen text-to-image model that starts the Generate-Reflect-Edit loop.

Any diffusers text-to-image pipeline works. An editing pipeline of the Kontext type that is called
without an image is one too, so Diffuser and Editor can share one set of weights. The arguments of
the pipeline call (size, steps, guidance, text length) come from `call:` in the YAML, not from code.
"""

import difflib
import inspect
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
        self.size_reported = False

    @classmethod
    def load(cls, path, device="cpu", dtype="float32", **settings):
        """Load a local folder or Hub id; dtype is the name of a torch dtype."""
        import torch

        return cls(load_pipeline(path, getattr(torch, dtype)).to(device), **settings)

    def problem(self, prompt):
        """Why the text encoder cannot read a prompt, as one clause, or None if it can.

        Pipelines silently cut a prompt that is too long and read an unknown word as noise.
        """
        if prompt != prompt.encode(errors="replace").decode():
            return "it holds a lone surrogate (half a character)"
        names = ("tokenizer_3", "tokenizer_2", "tokenizer")  # the highest-numbered reads the most
        found = [
            getattr(self.pipeline, name) for name in names if getattr(self.pipeline, name, None)
        ]
        if not found or not hasattr(found[0], "is_fast"):  # a processor of text and images
            return None
        tokenizer = found[0]
        encoded = tokenizer(prompt, return_offsets_mapping=tokenizer.is_fast)
        offsets = encoded.get("offset_mapping", [])
        unknown = [
            (start, end)
            for id, (start, end) in zip(encoded.input_ids, offsets)
            if id == tokenizer.unk_token_id
        ]
        if unknown:
            text = prompt[unknown[0][0] : unknown[0][1]]
            for (_, end), (start, next_end) in zip(unknown, unknown[1:]):
                if prompt[end:start].strip():  # the first run of unknown words ends
                    break
                text += prompt[end:next_end]
            return f"the text encoder does not know {text!r}"
        takes = inspect.signature(type(self.pipeline).__call__).parameters
        default = getattr(takes.get("max_sequence_length"), "default", None)
        limit = self.call.get("max_sequence_length") or default or tokenizer.model_max_length
        if len(encoded.input_ids) > limit:
            return f"it has {len(encoded.input_ids)} tokens, and the text encoder takes {limit}"
        return None

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

        Raises ValueError if the pipeline fails or returns only black images.
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
            except Exception as error:  # of any kind: it comes from the depths of the pipeline
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"{name} fails with this 'diffuser.call': {reason}") from error
            if all(image.getbbox() is None for image in made):  # NaN becomes black, too
                raise ValueError(
                    f"{name} returns only black images: its numbers overflow (set 'diffuser.dtype' "
                    "to bfloat16 or float32) or its weights are damaged"
                )
            images += made
        asked = (self.call.get("width"), self.call.get("height"))
        if images and all(asked) and images[0].size != asked and not self.size_reported:
            self.size_reported = True
            print(
                f"key 'diffuser.call': asked for width and height {asked}, and the images have "
                f"{images[0].size}; ask for a size that the model makes",
                file=sys.stderr,
            )
        return images


def load_pipeline(path, dtype):
    """A diffusers pipeline from safetensors. Raises ValueError if weights are missing.

    diffusers alone would fill the gaps of a text encoder with random numbers.
    """
    import torch
    from diffusers import DiffusionPipeline

    options = {"dtype": dtype, "use_safetensors": True}
    models = {}
    for name, entry in DiffusionPipeline.load_config(path).items():
        library, kind = entry if isinstance(entry, list) else (None, None)
        if library not in ("diffusers", "transformers"):
            continue
        kind = getattr(import_module(library), kind)
        if not issubclass(kind, torch.nn.Module):
            continue
        models[name], info = kind.from_pretrained(
            path, subfolder=name, output_loading_info=True, **options
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{name} lacks {len(missing)} weights, such as {missing[0]}")
    return DiffusionPipeline.from_pretrained(path, trust_remote_code=False, **models, **options)


def check_call(key, kind, call):
    """Compare the arguments of a pipeline's call with the signature of its class.

    Raises ValueError for one that is unknown, of another type than its default, or without effect.
    Dictionaries are refused because no pipeline checks their keys, tensors because YAML has none.
    """
    takes = inspect.signature(kind.__call__).parameters
    for name, value in call.items():
        if name not in takes or re.search("embeds|latents|callback", name):
            near = difflib.get_close_matches(name, takes.keys() - {name}, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"key '{key}': {kind.__name__} takes no {name} from a file{hint}")
        default = takes[name].default
        fits = {float: (int, float), tuple: (list, tuple), type(None): (int, float, str, list)}
        fits = fits.get(type(default), (type(default),))
        # Not isinstance, which takes True for an int.
        if (type(value) not in fits and value is not default) or value == []:
            wanted = " or ".join(each.__name__ for each in fits)
            raise ValueError(f"key '{key}.{name}' is {value!r:.100}; make it {wanted}")
    if "true_cfg_scale" in takes:
        negative = any(call[name] is not None for name in call if name.startswith("negative_pr"))
        default = takes["true_cfg_scale"].default if negative else 1
        guided = call.get("true_cfg_scale", default) > 1
        if (guided or negative) and not (guided and call.get("negative_prompt") is not None):
            raise ValueError(
                f"key '{key}': true_cfg_scale above 1 and negative_prompt have no effect without "
                "each other; give both or neither"
            )
