"""Editor: the model that carries out an instruction on an image and keeps the rest of it.

RL-RIG (arXiv 2602.19974) calls it the Inverse Diffuser. It is an instruction-editing flow-matching
pipeline of diffusers. Phase 2 trains a LoRA adapter of its transformer, which is active only inside
`edit`, `rollout` and `adapter()`: a Diffuser that shares the pipeline never sees it.

`edit` is an ordinary pipeline call, which integrates the flow's ODE. `rollout` makes the same call,
but a window of its denoising steps becomes stochastic (`sde_step` in grpo.py) and is recorded:

    recorded step = what the transformer was called with, x, x', sigma, sigma_next, log-prob, mean

`replay` calls the transformer again with just that, now with gradient. No pipeline code is
copied. Stochastic steps: Flow-GRPO (arXiv 2505.05470); the window: MixGRPO (arXiv 2507.21802).
"""

import copy
import inspect
import json
import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from grpo import sde_step

LOG = logging.getLogger(__name__)  # a stderr that is gone stops print, but not this
ADAPTER = "editor"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
TARGETS += ["to_qkv_mlp_proj"]  # FLUX.2's single blocks have q, k and v in one matrix


class Kind(NamedTuple):
    """What differs between the pipelines that can be the Editor."""

    batched: bool = False  # one call can edit different images
    rescaled: bool = False  # guidance keeps the norm of the conditional output, per token
    latents_last: bool = False  # the latents' tokens come after those of the image that is edited
    call: dict = {}  # arguments set in its call; other values of them are refused


# Recorded, replayed and checked against finite differences in tests/test_pipeline_families.py. Add
# a pipeline only with that test: nothing else would show a wrong gradient.
PIPELINES = {
    "FluxKontextPipeline": Kind(batched=True),
    "Flux2KleinPipeline": Kind(),
    "QwenImageEditPipeline": Kind(rescaled=True),
    "QwenImageEditPlusPipeline": Kind(rescaled=True),
    # With its cache, later steps read keys and values of the first one. So would a replay, and the
    # gradient through them would be missing.
    "QwenImage21Pipeline": Kind(latents_last=True, call={"use_kv_cache": False}),
    "BriaFiboEditPipeline": Kind(),
    "BriaFibo2Pipeline": Kind(),
}


@dataclass
class RecordedStep:
    """One stochastic denoising step of B images; tensors in fp32 except those in `calls`."""

    calls: list[tuple]  # (positional, keyword) arguments; guidance may take two calls
    sample: torch.Tensor  # (B, tokens, channels) latents x before the step
    next_sample: torch.Tensor  # (B, tokens, channels) latents x' after it
    sigma: float
    sigma_next: float
    noise_level: float
    log_prob: torch.Tensor  # (B,) recorded while sampling
    mean: torch.Tensor  # (B, tokens, channels) of x' while sampling


@dataclass
class Rollout:
    """B edited images, and the steps of the window that made them."""

    images: list
    steps: list[RecordedStep]


class Editor:
    """An instruction-editing pipeline.

    Args:
        pipeline: of a class in PIPELINES; may be the Diffuser's. Its transformer is frozen here.
            All parts need one dtype, as `from_pretrained(path, dtype=torch.float32)` gives.
        call: keyword arguments of every pipeline call.
        batch_size: images per call of `edit`, if the pipeline is `batched`; else one.
        template: what the pipeline reads; {} stands for the instruction.
    """

    def __init__(self, pipeline, call=None, batch_size=64, template="{}"):
        self.kind = find_kind(type(pipeline).__name__)
        scheduler = type(pipeline.scheduler).__name__
        if scheduler != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(
                f"key 'editor.model': {scheduler} cannot be recorded; give the pipeline a "
                "FlowMatchEulerDiscreteScheduler"
            )
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.transformer.requires_grad_(False)
        self.batched = self.kind.batched
        self.call = self.kind.call | (call or {})
        if self.call | self.kind.call != self.call:
            raise ValueError(f"'editor.call' has to hold {self.kind.call}")
        parameters = inspect.signature(pipeline.__call__).parameters.values()
        self.defaults = {parameter.name: parameter.default for parameter in parameters}
        self.batch_size = batch_size
        self.template = template
        self.has_adapter = False
        self.cut_reported = False

    @staticmethod
    def check(path):
        """Raise ValueError for a pipeline that cannot be the Editor; reads only its index file."""
        from diffusers import DiffusionPipeline

        find_kind(DiffusionPipeline.load_config(path)["_class_name"])

    def edit(self, images, instructions, seeds):
        """One edited PIL image per image, instruction and seed, whatever else is in the batch."""
        if not len(images) == len(instructions) == len(seeds):
            raise ValueError(f"{len(images)=}, {len(instructions)=}, {len(seeds)=}: need the same")
        edited = []
        size = self.batch_size if self.batched else 1
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            edited += self._call(images[part], instructions[part], seeds[part])
        return edited

    @torch.no_grad()
    def rollout(self, images, instructions, seeds, noise_seeds, window, noise_level):
        """Edit B images with stochastic steps: `Rollout`.

        Args:
            seeds: of the initial latents. Samples of a group have the same seed, so they also
                share all steps before the window.
            noise_seeds: of the noise in the window, all different.
            window: range of step indices. The last step is an ODE step and never recorded.
            noise_level: a in `sde_step`.

        A hook keeps what goes into the transformer and what comes out. `sde_step` replaces the
        scheduler's step, which it equals outside the window.
        """
        if not images:
            return Rollout([], [])
        if not len(images) == len(instructions) == len(seeds) == len(noise_seeds):
            raise ValueError("images, instructions, seeds, and noise_seeds: need the same number")
        scheduler, transformer = self.pipeline.scheduler, self.pipeline.transformer
        generators = [torch.Generator().manual_seed(seed) for seed in noise_seeds]
        steps = []
        index = 0  # of the current denoising step
        calls, outputs = [], []  # of the transformer in this step
        latents = None  # kept in fp32, whatever the pipeline's dtype

        def keep(_, positional, keywords, output):
            calls.append((positional, keywords))
            outputs.append(output[0])

        def step(velocity, timestep, sample, **_):
            nonlocal index, calls, outputs, latents
            if latents is None:
                latents = sample.float()
            sigma, sigma_next = scheduler.sigmas[index : index + 2].tolist()
            level = noise_level if index in window else 0.0
            if level > 0:  # go on with exactly the velocity that a replay will compute
                replayed = self._velocity(outputs, velocity)
                tolerance = max(1e-4, 2 * torch.finfo(outputs[0].dtype).eps)
                difference = (replayed - velocity.float()).norm()
                if not difference <= tolerance * replayed.norm():  # or NaN
                    raise ValueError("its guidance cannot be replayed; turn it off")
                velocity = replayed
            next_latents, log_prob, mean, _ = sde_step(
                velocity, latents, sigma, sigma_next, level, generator=generators
            )
            if log_prob is not None:
                recorded = RecordedStep(
                    calls, latents, next_latents, sigma, sigma_next, level, log_prob, mean
                )
                steps.append(recorded)
            index, calls, outputs, latents = index + 1, [], [], next_latents
            return (next_latents.to(sample.dtype),)

        hook = transformer.register_forward_hook(keep, with_kwargs=True)
        scheduler.step = step
        try:
            edited = self._call(images, instructions, seeds)
        finally:
            hook.remove()
            del scheduler.step  # the method of its class comes back
        if not steps:
            raise ValueError(
                f"{window=}, {noise_level=}: no step before the last one is stochastic"
            )
        return Rollout(edited, steps)

    def replay(self, step):
        """A `RecordedStep` again, with gradient: (log_prob (B,), mean (B, tokens, C), std).

        Call it and `backward` inside `adapter()`; outside, it is the base model, the KL reference.
        """
        transformer = self.pipeline.transformer
        outputs = [transformer(*given, **named)[0] for given, named in step.calls]
        velocity = self._velocity(outputs, step.sample)
        _, log_prob, mean, std = sde_step(
            velocity, step.sample, step.sigma, step.sigma_next, step.noise_level, step.next_sample
        )
        return log_prob, mean, std

    def _velocity(self, outputs, like):
        """The velocity (B, tokens, channels) in fp32 from what the transformer returned in a step.

        An output has the tokens of `like` and those of the edited image. One output for B samples
        is the velocity; more outputs, or one for 2 B, are guidance.
        """
        tokens = like.shape[1]
        part = slice(-tokens, None) if self.kind.latents_last else slice(tokens)
        outputs = [output[:, part].float() for output in outputs]
        if len(outputs) == 1 and len(outputs[0]) == len(like):
            return outputs[0]
        return self._guided_velocity(outputs)

    def _guided_velocity(self, outputs):
        """Classifier-free guidance, as the pipelines of PIPELINES do it; skip on a first reading.

        v = u + s (c - u)    c: output for the instruction, u: without it, s: scale
        rescaled: v |c| / |v|, per token
        """
        if len(outputs) == 1:  # one call: u is its first half
            unconditional, conditional = outputs[0].chunk(2)
        else:  # two calls: c comes first
            conditional, unconditional = outputs
        name = "true_cfg_scale" if "true_cfg_scale" in self.defaults else "guidance_scale"
        scale = (self.defaults | self.call)[name]
        velocity = unconditional + scale * (conditional - unconditional)
        if self.kind.rescaled:
            length = velocity.norm(dim=-1, keepdim=True)
            velocity = velocity * (conditional.norm(dim=-1, keepdim=True) / length)
        return velocity

    def _call(self, images, instructions, seeds):
        """One pipeline call with the adapter active. Raises ValueError if it fails."""
        call = dict(self.call)
        if all(image is images[0] for image in images) and len(set(instructions)) == 1:
            call["num_images_per_prompt"] = len(images)  # encode the image and the text once
            images, instructions = images[:1], instructions[:1]
        elif not self.batched:
            raise ValueError("this pipeline takes one image and one instruction per call")
        images = [normalize_image(image) for image in images]
        asked = call.get("width"), call.get("height")
        if all(asked):
            images = [image.resize(asked) for image in images]
        call["image"] = images if len(images) > 1 else images[0]
        # A template may be JSON, where a quotation mark would end the string.
        prompts = [self.template.replace("{}", text.replace('"', "'")) for text in instructions]
        self._report_cut(prompts)
        if isinstance(call.get("negative_prompt"), str):  # some pipelines want one per prompt
            call["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
        # Noise drawn on the CPU is the same on every device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        try:
            with self.adapter():
                made = self.pipeline(prompt=prompts, generator=generators, **call).images
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ValueError(f"key 'editor.call': {reason}") from error
        if all(asked) and made[0].size != asked:
            raise ValueError(
                f"key 'editor.call': width and height {asked} become {made[0].size}; set them to "
                "that, or max_area to their product"
            )
        if any(image.getbbox() is None for image in made):  # NaN becomes black, too
            raise ValueError("a black image; if 'editor.dtype' is float16, set another")
        return made

    def _report_cut(self, prompts):
        """Say once that an instruction is too long, because pipelines cut it silently."""
        parts = self.pipeline.components
        tokenizer = parts.get("tokenizer_2") or parts.get("tokenizer")
        limit = (self.defaults | self.call).get("max_sequence_length")
        if self.cut_reported or not tokenizer or not limit:
            return
        if max(len(ids) for ids in tokenizer(prompts).input_ids) > limit:
            message = f"the Editor reads only {limit} tokens of an instruction"
            LOG.warning(f"{message}; raise 'editor.call.max_sequence_length'")
            self.cut_reported = True

    # ---- the adapter ----

    def add_adapter(self, rank):
        """Add an adapter unless one is loaded; return its parameters (list, fp32).

        A new one changes nothing yet. The parameters are frozen outside `adapter()`; give them to
        the optimizer as they are. Raises ValueError if the loaded one has another rank.
        """
        from peft import LoraConfig

        transformer = self.pipeline.transformer
        if ADAPTER not in getattr(transformer, "peft_config", {}):
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
            transformer.add_adapter(config, ADAPTER)
        loaded = transformer.peft_config[ADAPTER].r
        if loaded != rank:
            raise ValueError(f"the loaded adapter has rank {loaded}; set rank={loaded}")
        transformer.eval().disable_adapters()  # a new adapter comes active and in training mode
        parameters = [p for name, p in transformer.named_parameters() if f".{ADAPTER}." in name]
        for parameter in parameters:
            parameter.data = parameter.data.float()  # Adam needs fp32 even if the model is bf16
        self.has_adapter = True
        return parameters

    def load_adapter(self, folder):
        """Load a folder that `save_adapter` wrote, or another LoRA of diffusers or kohya, in fp32.

        Raises ValueError if it is damaged or of another model.
        """
        from peft import set_peft_model_state_dict

        transformer = self.pipeline.transformer
        try:
            files = list(Path(folder).glob("*.safetensors"))
            if len(files) != 1:  # of several, diffusers would take one
                raise ValueError(f"holds {len(files)} safetensors files; it needs exactly one")
            if any("dora_scale" in name for name in safetensors.torch.load_file(files[0])):
                raise ValueError("it is a DoRA of kohya, of which diffusers reads only a part")
            tensors = self.pipeline.lora_state_dict(folder, use_safetensors=True)
            tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
            # Check before loading: tensors of the base model would change it, for the Diffuser too.
            wrong = [name for name in tensors if "lora_" not in name and ".alpha" not in name]
            wrong += [
                n for n, x in tensors.items() if not x.is_floating_point() or not x.isfinite().all()
            ]
            if wrong:
                raise ValueError(f"unknown or not finite: {', '.join(wrong[:3])}")
            with warnings.catch_warnings():
                # peft only warns of layers that the file's config names and its tensors lack.
                warnings.simplefilter("error", RuntimeWarning)
                self.pipeline.load_lora_weights(folder, adapter_name=ADAPTER, use_safetensors=True)
            if ADAPTER not in getattr(transformer, "peft_config", {}):
                raise ValueError("no tensor's name begins with 'transformer.'")
            self.add_adapter(transformer.peft_config[ADAPTER].r)
            # Set the tensors again, because diffusers rounds them to the model's dtype.
            found = set_peft_model_state_dict(transformer, tensors, ADAPTER)
            wrong = [name for name in found.missing_keys if f".{ADAPTER}." in name]
            wrong += [name for name in found.unexpected_keys if not name.endswith(".alpha")]
            if wrong:
                raise ValueError(f"missing or unknown: {', '.join(wrong[:3])}")
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{folder} is no adapter of this Editor: {reason}") from error

    def save_adapter(self, folder):
        """Write what `pipeline.load_lora_weights(folder)` reads, the LoRA alpha included."""
        from peft import get_peft_model_state_dict

        transformer = self.pipeline.transformer
        tensors = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
        tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
        config = transformer.peft_config[ADAPTER].to_dict()
        config = {f"transformer.{key}": value for key, value in config.items()}

        def plain(value):  # a set of names, or the alpha of a loaded LoRA, which is a tensor
            return sorted(value) if isinstance(value, set) else value.item()

        # One entry only: safetensors writes several in random order.
        metadata = {"lora_adapter_metadata": json.dumps(config, sort_keys=True, default=plain)}
        Path(folder).mkdir(parents=True, exist_ok=True)
        # `safetensors.torch.save_file` would give the file mode 0600.
        data = safetensors.torch.save(tensors, metadata)
        (Path(folder) / "pytorch_lora_weights.safetensors").write_bytes(data)

    def without_adapter(self):
        """The untrained Editor: the same pipeline, but `edit` leaves the adapter off."""
        untrained = copy.copy(self)
        untrained.has_adapter = False
        return untrained

    @contextmanager
    def adapter(self):
        """The adapter is active in this block. Call `backward` in it too: outside, it is frozen."""
        if self.has_adapter:
            self.pipeline.transformer.enable_adapters()
        try:
            yield
        finally:
            if self.has_adapter:
                self.pipeline.transformer.disable_adapters()


def find_kind(name):
    """The `Kind` of a pipeline class. Raises ValueError if it cannot be the Editor."""
    if name not in PIPELINES:
        known = ", ".join(PIPELINES)
        raise ValueError(f"{name} cannot be trained as the Editor; use one of {known}")
    return PIPELINES[name]


# Also in checker.py, so that neither file needs the other.
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
