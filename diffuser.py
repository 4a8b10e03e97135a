"""Diffuser: the frozen text-to-image model that starts the Generate-Reflect-Edit loop.

Any diffusers text-to-image pipeline works, also an editing pipeline that needs no image, such as
FLUX.1 Kontext; then Diffuser and Editor can share one set of weights. The arguments of the pipeline
call (size, steps, guidance, text length) come from `call:` in the YAML.
"""

import inspect
import logging
import math
import re
from importlib import import_module

LOG = logging.getLogger(__name__)  # a stderr that is gone stops print, but not this


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
    def load(cls, path, device="cpu", dtype="float32"):
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
                more = {"subfolder": name, "output_loading_info": True}
                if entry[0] == "transformers":  # diffusers itself names mismatched tensors
                    more["ignore_mismatched_sizes"] = True
                models[name], info = kind.from_pretrained(path, **more, **options)
                for key, stored, needed in info["mismatched_keys"]:
                    shapes = f"shape {[*stored]}; its config.json says {[*needed]}"
                    raise ValueError(f"{name}: {key} has {shapes}")
                if missing := sorted(info["missing_keys"]):
                    raise ValueError(f"{name} lacks {len(missing)} weights, such as {missing[0]}")
                if unused := sorted(info["unexpected_keys"]):
                    reason = f"{path}: {name}: {len(unused)} tensors are not used, such as "
                    reason += f"{unused[0]}; config.json may be of another model"
                    LOG.warning(reason)
        options |= {"trust_remote_code": False, **models}
        return cls(DiffusionPipeline.from_pretrained(path, **options).to(device))

    def generate(self, prompts, seeds):
        """One PIL image per prompt and seed, independent of what else is in the batch.

        Raises ValueError if the pipeline fails, or returns images of another size or only black.
        """
        import torch

        # With `offload: true` an update leaves the transformer on the GPU: make room for the text
        # encoder. Without, this does nothing.
        self.pipeline.maybe_free_model_hooks()
        asked = self.call.get("width"), self.call.get("height")
        images = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            # Noise drawn on the CPU is the same on every device.
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            call = dict(self.call)
            if isinstance(call.get("negative_prompt"), str):  # some pipelines want one per prompt
                call["negative_prompt"] = [call["negative_prompt"]] * len(prompts[part])
            try:
                made = self.pipeline(prompt=prompts[part], generator=generators, **call).images
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise ValueError(f"key 'diffuser.call': {reason}") from error
            if all(asked) and made[0].size != asked:
                raise ValueError(
                    f"key 'diffuser.call': width and height {asked} become {made[0].size}; set "
                    "them to that, or max_area to their product"
                )
            if any(image.getbbox() is None for image in made):  # NaN becomes black, too
                raise ValueError("a black image; if 'diffuser.dtype' is float16, set another")
            images += made
        return images

    def problem(self, prompt):
        """Why the text encoder cannot read a prompt, as one clause, or None if it can.

        Pipelines silently cut a prompt that is too long and read an unknown word as noise.
        """
        if re.search("[\ud800-\udfff]", prompt):
            return "it holds a lone surrogate, half of a character"
        if special := re.search(r"<\W?\w+\W?>", prompt):  # a VLM would look for an image
            return f"it holds {special[0]!r}, which may be a special token"
        names = ("tokenizer_3", "tokenizer_2", "tokenizer")  # the highest-numbered reads the most
        found = [getattr(self.pipeline, name, None) for name in names]
        found = [part for part in found if hasattr(part, "is_fast")]
        if not found:  # such as a processor of text and images
            return None
        tokenizer = found[0]
        encoded = tokenizer(prompt, return_offsets_mapping=tokenizer.is_fast)
        ids, unknown = encoded["input_ids"], []
        for id, (start, end) in zip(ids, encoded.get("offset_mapping", [])):
            if id == tokenizer.unk_token_id and start < end:  # CLIP's end token has the same id
                unknown.append(prompt[start:end])
        if unknown:
            return f"the text encoder does not know {' '.join(unknown)!r}"
        parameters = inspect.signature(type(self.pipeline).__call__).parameters
        default = getattr(parameters.get("max_sequence_length"), "default", None)
        limit = self.call.get("max_sequence_length") or default or tokenizer.model_max_length
        if len(ids) > limit:
            return f"it has {len(ids)} tokens, and the text encoder takes {limit}"
        return None

    def readable(self, graphs, path):
        """The scene graphs whose prompts the pipeline can read; prints how many are left out.

        Raises ValueError, naming the file they came from, if none is left.
        """
        problems = [self.problem(graph.prompt()) for graph in graphs]
        found = [
            f"{graph.prompt()!r:.99}: {problem}"
            for graph, problem in zip(graphs, problems)
            if problem
        ]
        if found:
            message = f"{path}: {len(found)} of {len(graphs)} prompts cannot be read ({found[0]})"
            if len(found) == len(graphs):
                raise ValueError(f"{message}; use other data or another Diffuser")
            LOG.warning(f"{message} and are left out")
        return [graph for graph, problem in zip(graphs, problems) if not problem]


def check_call(key, kind, call):
    """Compare the arguments of a pipeline's call with the signature of its class.

    Raises ValueError for one that is unknown or of another type than its default.
    Dictionaries are refused because no pipeline checks their keys, tensors because YAML has none.
    """
    takes = inspect.signature(kind.__call__).parameters
    several = {float: (int, float), tuple: (list, tuple), type(None): (int, float, str, list)}
    for name, value in call.items():
        if name not in takes or re.search("embeds|latents|callback|^self$", name):
            raise ValueError(f"key '{key}': {kind.__name__} takes no {name} from a file")
        default = takes[name].default
        accepted = several.get(type(default), (type(default),))
        if name.endswith("_scale") and type(default) is int:  # Bria's guidance_scale
            accepted = (int, float)
        wrong = type(value) not in accepted  # not isinstance, which takes True for an int
        wanted = " or ".join(each.__name__ for each in accepted)
        if isinstance(value, float) and not math.isfinite(value):
            wrong, wanted = True, "finite"
        if wrong and value is not default:
            raise ValueError(f"key '{key}.{name}' is {value!r:.100}; make it {wanted}")
    if bool(call.get("width")) != bool(call.get("height")):
        raise ValueError(f"key '{key}': give width and height together, or neither")
    if "true_cfg_scale" in takes:
        negative = call.get("negative_prompt") is not None
        scale = call.get("true_cfg_scale", takes["true_cfg_scale"].default if negative else 1)
        if (scale > 1) != negative:
            raise ValueError(
                f"key '{key}': give true_cfg_scale above 1 and negative_prompt together, or neither"
            )
