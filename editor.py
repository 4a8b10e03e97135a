"""Editor: the model that carries out an instruction on an image and keeps the rest of it.

RL-RIG (arXiv 2602.19974) calls it the Inverse Diffuser. It is an instruction-editing pipeline of
diffusers with flow matching. Phase 2 trains a LoRA adapter of its transformer.

`edit` is an ordinary pipeline call, which integrates the flow's ODE. `rollout` makes the same call,
but a window of its denoising steps becomes stochastic (`sde_step` in grpo.py) and is recorded:

    recorded step = what the transformer was called with, x, x', sigma, sigma_next, log-prob, mean

`log_probs` calls the transformer again with just that, now with gradient. No pipeline code is
copied, so every replayed step is the step that was run. Stochastic steps are those of Flow-GRPO
(arXiv 2505.05470), the window that of MixGRPO (arXiv 2507.21802).

The adapter is active only inside `edit`, `rollout` and `adapter()`. A Diffuser that shares the
pipeline never sees it.
"""

import copy
import inspect
import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from grpo import sde_step

ADAPTER = "editor"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
TARGETS += ("to_qkv_mlp_proj",)  # FLUX.2's single blocks have q, k and v in one matrix
SCHEDULER = "FlowMatchEulerDiscreteScheduler"


class Kind(NamedTuple):
    """What differs between the pipelines that can be the Editor."""

    scale: str  # the argument of its call that is the guidance scale
    rescaled: bool = False  # guidance keeps the length of the conditional answer, per token
    batched: bool = False  # edits different images in one call; to the others they are references
    last: bool = False  # the latents' tokens come after those of the image that is edited
    call: dict = {}  # arguments of its call that are always set


# Recorded, replayed and checked against finite differences in tests/test_pipeline_families.py. Add
# a pipeline here only together with that test: a wrong gradient shows nowhere else.
PIPELINES = {
    "FluxKontextPipeline": Kind("true_cfg_scale", batched=True),
    "Flux2KleinPipeline": Kind("guidance_scale"),
    "QwenImageEditPipeline": Kind("true_cfg_scale", rescaled=True),
    "QwenImageEditPlusPipeline": Kind("true_cfg_scale", rescaled=True),
    # By default its later steps read keys and values that the first one cached. A replay would read
    # them too, and the gradient through the cached tokens would be missing.
    "QwenImage21Pipeline": Kind("true_cfg_scale", last=True, call={"use_kv_cache": False}),
    "BriaFiboEditPipeline": Kind("guidance_scale"),
    "BriaFibo2Pipeline": Kind("guidance_scale"),
}


@dataclass
class RecordedStep:
    """One stochastic denoising step of B images; tensors in fp32 except those in `calls`."""

    calls: list[tuple]  # (positional, keyword) arguments of the transformer; one call is common
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
        pipeline: a loaded pipeline of a class in PIPELINES; may be the Diffuser's. Its transformer
            is frozen here.
        call: keyword arguments of every pipeline call.
        batch_size: images per call.
        template: what the pipeline reads; {} stands for the instruction.
    """

    def __init__(self, pipeline, call=None, batch_size=64, template="{}"):
        self.kind = find_kind(type(pipeline).__name__, type(pipeline.scheduler).__name__)
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.transformer.requires_grad_(False)
        self.batched = self.kind.batched
        self.call = self.kind.call | (call or {})
        for name, value in self.kind.call.items():
            if self.call[name] != value:
                raise ValueError(f"key 'editor.call.{name}' has to be {value}; leave it out")
        self.batch_size = batch_size
        self.template = template
        self.has_adapter = False

    @staticmethod
    def check(path):
        """Raise ValueError for a pipeline that cannot be the Editor; reads only its index file."""
        from diffusers import DiffusionPipeline

        index = DiffusionPipeline.load_config(path)
        find_kind(index["_class_name"], (index.get("scheduler") or [None, None])[1])

    def edit(self, images, instructions, seeds):
        """One edited PIL image per image, instruction and seed, whatever else is in the batch.

        Images of any mode are read upright and over white. Where `call` has height and width, an
        image of another size is stretched to that size first.
        Raises ValueError if the pipeline fails or returns only black images.
        """
        edited = []
        size = self.batch_size if self.batched else 1
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            edited += self._call(images[part], instructions[part], seeds[part])
        return edited

    def rollout(self, images, instructions, seeds, noise_seeds, window, noise_level):
        """Edit B images with stochastic steps; call it under `torch.no_grad()`.

        Args:
            seeds: of the initial latents. Samples of a group have the same seed, so they also
                share all steps before the window.
            noise_seeds: of the noise in the window, all different.
            window: range of step indices, without the last step.
            noise_level: a in `sde_step`.
        Raises ValueError as `edit` does, and if a step cannot be replayed.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in noise_seeds]
        with self._recording(generators, window, noise_level) as steps:
            edited = self._call(images, instructions, seeds)
        return Rollout(edited, steps)

    def log_probs(self, step):
        """Replay a `RecordedStep` with gradient: (log_prob (B,), mean (B, tokens, C), std)."""
        transformer = self.pipeline.transformer
        predictions = [transformer(*given, **named)[0] for given, named in step.calls]
        velocity = self._velocity(predictions, step.sample)
        sigmas = step.sigma, step.sigma_next
        return sde_step(velocity, step.sample, *sigmas, step.noise_level, step.next_sample)[1:]

    def _call(self, images, instructions, seeds):
        """One pipeline call with the adapter active."""
        name, call = type(self.pipeline).__name__, dict(self.call)
        if all(image is images[0] for image in images) and len(set(instructions)) == 1:
            call["num_images_per_prompt"] = len(images)  # encode the image and the text once
            images, instructions = images[:1], instructions[:1]
        elif not self.batched:
            raise ValueError(f"{name} takes one image and one instruction per call")
        images = [normalize_image(image) for image in images]
        asked = call.get("width"), call.get("height")
        if all(asked):
            images = [image if image.size == asked else image.resize(asked) for image in images]
        if isinstance(call.get("negative_prompt"), str):  # some pipelines want one per prompt
            call["negative_prompt"] = [call["negative_prompt"]] * len(instructions)
        # A template may be JSON, where a quotation mark would end the string.
        prompts = [self.template.replace("{}", text.replace('"', "'")) for text in instructions]
        call["image"] = images if len(images) > 1 else images[0]
        # Noise drawn on the CPU is the same on every device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        try:
            with self.adapter():
                made = self.pipeline(prompt=prompts, generator=generators, **call).images
        except Exception as error:  # of any kind: it comes from the depths of the pipeline
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{name} fails with this 'editor.call': {reason}") from error
        if all(image.getbbox() is None for image in made):  # NaN becomes black, too
            reason = (
                "numbers overflow (set 'editor.dtype' to bfloat16 or float32) or weights are bad"
            )
            raise ValueError(f"{name} returns only black images: {reason}")
        return made

    # ---- recording ----

    @contextmanager
    def _recording(self, generators, window, noise_level):
        """Inside this block the pipeline takes SDE steps in the window; yields the list of them.

        A forward hook keeps the transformer's inputs and answers. The scheduler's `step` is
        replaced by `sde_step`, which is Euler's ODE step outside the window.
        """
        scheduler = self.pipeline.scheduler
        calls, predictions, steps = [], [], []
        latents = None  # kept in fp32, whatever the pipeline's dtype
        index = 0  # of the denoising step

        def keep(_, positional, keywords, output):
            calls.append((positional, keywords))
            predictions.append(output[0])

        def step(velocity, timestep, sample, **_):
            nonlocal latents, index
            latents = sample.float() if latents is None else latents
            last = len(scheduler.sigmas) - 2
            if window and window[-1] >= last:
                raise ValueError(f"window {window} has to end before the last step, {last}")
            sigma, sigma_next = scheduler.sigmas[index : index + 2].tolist()
            level = noise_level if index in window else 0.0
            velocity = velocity.float()
            if level > 0:  # use what a replay will compute, which has to be the same
                replayed = self._velocity(predictions, velocity)
                tolerance = max(1e-4, 2 * torch.finfo(predictions[0].dtype).eps)
                if not (replayed - velocity).norm() <= tolerance * velocity.norm():  # or NaN
                    raise ValueError("its guidance cannot be replayed; turn it off")
                velocity = replayed
            next_latents, log_prob, mean, _ = sde_step(
                velocity, latents, sigma, sigma_next, level, generator=generators
            )
            if log_prob is not None:
                move = (latents, next_latents, sigma, sigma_next, level, log_prob, mean)
                steps.append(RecordedStep(list(calls), *move))
            calls.clear()
            predictions.clear()
            latents = next_latents
            index += 1
            return (next_latents.to(sample.dtype),)

        hook = self.pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
        scheduler.step = step
        try:
            yield steps
        finally:
            hook.remove()
            del scheduler.step

    def _velocity(self, predictions, sample):
        """What the transformer answered to the velocity of B latents: (B, tokens, channels) fp32.

        The other tokens belong to the image that is edited. One answer per image is the velocity.
        """
        tokens = sample.shape[1]
        part = slice(-tokens, None) if self.kind.last else slice(tokens)
        answers = [prediction[:, part].float() for prediction in predictions]
        if len(answers) == 1 and len(answers[0]) == len(sample):
            return answers[0]
        return self._guided_velocity(answers)

    def _guided_velocity(self, answers):
        """Classifier-free guidance, as the pipelines of PIPELINES do it; skip on a first reading.

        v = u + s (c - u)            c: answer to the instruction, u: without it, s: scale
        v = (u + s (c - u)) |c| / |u + s (c - u)|    rescaled, per token
        """
        if len(answers) == 1:  # one call with a batch twice as large
            unconditional, conditional = answers[0].chunk(2)
        else:
            conditional, unconditional = answers
        default = inspect.signature(self.pipeline.__call__).parameters[self.kind.scale].default
        scale = self.call.get(self.kind.scale, default)
        velocity = unconditional + scale * (conditional - unconditional)
        if self.kind.rescaled:
            length = velocity.norm(dim=-1, keepdim=True)
            velocity = velocity * (conditional.norm(dim=-1, keepdim=True) / length)
        return velocity

    # ---- the adapter ----

    def add_adapter(self, rank):
        """The parameters of the adapter that is loaded, or of a new one, which changes nothing yet.

        Either way the KL reference of phase 2 is the base model, without adapter.
        """
        from peft import LoraConfig

        transformer = self.pipeline.transformer
        if not self.has_adapter:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS))
            transformer.add_adapter(config, adapter_name=ADAPTER)
        found = transformer.peft_config[ADAPTER].r
        if found != rank:
            raise ValueError(f"the loaded adapter has rank {found}; set rank={found}")
        parameters = [p for n, p in transformer.named_parameters() if f".{ADAPTER}." in n]
        for parameter in parameters:
            parameter.data = parameter.data.float()  # Adam needs fp32 even if the model is bf16
        transformer.disable_adapters()
        self.has_adapter = True
        return parameters

    def load_adapter(self, folder):
        """Load a folder that `save_adapter` wrote, or any LoRA that diffusers reads, in fp32.

        Raises ValueError if a tensor is missing, unknown or not finite.
        """
        tensors = self.pipeline.lora_state_dict(folder, use_safetensors=True)
        transformer = self.pipeline.transformer
        self.pipeline.load_lora_weights(folder, adapter_name=ADAPTER, use_safetensors=True)
        transformer.eval()  # new LoRA layers come in training mode
        for name, parameter in transformer.named_parameters():
            if f".{ADAPTER}." not in name:
                continue
            key = f"transformer.{name.replace(f'.{ADAPTER}.', '.')}"
            if key not in tensors:
                raise ValueError(f"{folder} lacks {key}; it is damaged or of another model")
            # Again, because diffusers has rounded it to the model's dtype.
            parameter.data = tensors.pop(key).to(parameter.device, torch.float32)
            if not parameter.isfinite().all():
                raise ValueError(f"{folder}: {key} holds NaN or infinity")
        if unknown := [key for key in tensors if "alpha" not in key]:
            raise ValueError(f"{folder} holds {unknown[0]}, which the Editor does not know")
        transformer.disable_adapters()
        self.has_adapter = True

    def save_adapter(self, folder):
        """Write what `pipeline.load_lora_weights(folder)` reads, the LoRA alpha included."""
        from peft.utils import get_peft_model_state_dict

        transformer = self.pipeline.transformer
        tensors = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
        tensors = {f"transformer.{k}": v.detach().contiguous() for k, v in tensors.items()}
        config = transformer.peft_config[ADAPTER].to_dict()
        config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        config = {f"transformer.{key}": value for key, value in config.items()}
        # One entry only: safetensors writes several in random order.
        metadata = {"lora_adapter_metadata": json.dumps(config, sort_keys=True)}
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / "pytorch_lora_weights.safetensors"
        path.write_bytes(safetensors.torch.save(tensors, metadata))

    def without_adapter(self):
        """The untrained Editor: the same pipeline, but `edit` leaves the adapter off."""
        untrained = copy.copy(self)
        untrained.has_adapter = False
        return untrained

    @contextmanager
    def adapter(self):
        """The adapter is active inside this block.

        Call `backward` inside it too: peft freezes the parameters of an inactive adapter.
        """
        if self.has_adapter:
            self.pipeline.transformer.enable_adapters()
        try:
            yield
        finally:
            if self.has_adapter:
                self.pipeline.transformer.disable_adapters()


def find_kind(pipeline, scheduler):
    """The `Kind` of a pipeline, by its name. Raises ValueError if it cannot be the Editor."""
    if pipeline not in PIPELINES:
        names = ", ".join(PIPELINES)
        raise ValueError(f"{pipeline} cannot be trained as the Editor; use one of {names}")
    if scheduler != SCHEDULER:
        raise ValueError(f"{pipeline} with {scheduler} cannot be trained; give it a {SCHEDULER}")
    return PIPELINES[pipeline]


# Also in checker.py, so that both files work alone.
def normalize_image(image):
    """An image from anywhere as the models read it: upright, RGB, over white."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which `convert` would clip to white
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
