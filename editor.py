"""Editor: the model that carries out an instruction on an image and keeps the rest of it.

RL-RIG (arXiv 2602.19974) calls it the Inverse Diffuser. Any diffusers instruction-editing pipeline
with flow matching works. Phase 2 trains a LoRA adapter of its transformer.

`edit` is an ordinary pipeline call, which integrates the flow's ODE. `rollout` makes the same call,
but a window of its denoising steps becomes stochastic (`sde_step` in grpo.py) and is recorded:

    recorded step = what the transformer was called with, x, x', sigma, sigma_next, log-prob

`log_probs` calls the transformer again with just that, now with gradient. No pipeline code is
copied, so every replayed step is the step that was run. Stochastic steps are those of Flow-GRPO
(arXiv 2505.05470); limiting them to a window follows MixGRPO (arXiv 2507.21802).

The adapter is active only inside `edit`, `rollout` and `adapter()`. A Diffuser that shares the
pipeline never sees it.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from grpo import sde_step

ADAPTER = "editor"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
TARGETS += ("to_qkv_mlp_proj",)  # FLUX.2's single blocks have q, k and v in one matrix
# This pipeline edits a batch of different images. The others read a list of images as references
# for one edit, so they get one image and instruction per call.
BATCHED = ("FluxKontextPipeline",)
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
CACHED = ("Flux2KleinKVPipeline",)  # its steps share keys and values, so none can be replayed alone


@dataclass
class RecordedStep:
    """One stochastic denoising step of B images; tensors in fp32 except those in `calls`."""

    calls: list[tuple]  # (positional, keyword) arguments of the transformer; one call is common
    guidance: tuple | None  # None for one plain answer per image, otherwise see `find_guidance`
    sample: torch.Tensor  # (B, tokens, channels) latents x before the step
    next_sample: torch.Tensor  # (B, tokens, channels) latents x' after it
    sigma: float
    sigma_next: float
    noise_level: float
    log_prob: torch.Tensor  # (B,) recorded while sampling


@dataclass
class Rollout:
    """B edited images, and the steps of the window that made them."""

    images: list
    steps: list[RecordedStep]


class Editor:
    """An instruction-editing pipeline.

    Args:
        pipeline: the loaded pipeline; may be the Diffuser's. Its transformer is frozen here.
        call: keyword arguments of every pipeline call.
        batch_size: images per call.
        template: what the pipeline reads; {} stands for the instruction.
    """

    def __init__(self, pipeline, call=None, batch_size=64, template="{}"):
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.transformer.requires_grad_(False)
        self.batched = type(pipeline).__name__ in BATCHED
        self.call = call or {}
        self.batch_size = batch_size
        self.template = template
        self.has_adapter = False

    @classmethod
    def load(cls, path, device="cpu", dtype="float32", **settings):
        """Load a local folder or Hub id; dtype is the name of a torch dtype."""
        from diffusers import DiffusionPipeline

        cls.check(path)
        pipeline = DiffusionPipeline.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True
        )
        return cls(pipeline.to(device), **settings)

    def edit(self, images, instructions, seeds):
        """One edited PIL image per image, instruction and seed, whatever else is in the batch.

        Raises ValueError if the pipeline returns only black images.
        """
        edited = []
        start = 0
        while start < len(images):
            stop = start + 1  # grow the batch while the pipeline can take it in one call
            while stop < min(start + self.batch_size, len(images)) and (
                self.batched or _same_edit(images[start : stop + 1], instructions[start : stop + 1])
            ):
                stop += 1
            part = slice(start, stop)
            edited += self._call(images[part], instructions[part], seeds[part])
            start = stop
        return edited

    def rollout(self, images, instructions, seeds, noise_seeds, window, noise_level):
        """Edit B images in one call, with stochastic steps in the window; records those steps.

        Args:
            seeds: of the initial latents. Samples of a group have the same seed, so they also
                share all steps before the window.
            noise_seeds: of the noise in the window, all different.
            window: range of step indices, without the last step.
            noise_level: a in `sde_step`.
        Raises ValueError for a pipeline whose steps cannot be replayed.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in noise_seeds]
        with _recording(self.pipeline, generators, window, noise_level) as steps:
            edited = self._call(images, instructions, seeds)
        return Rollout(edited, steps)

    def log_probs(self, step):
        """Replay a `RecordedStep` with gradient: (log_prob (B,), mean (B, tokens, C), std)."""
        predictions = [
            self.pipeline.transformer(*positional, **keywords)[0]
            for positional, keywords in step.calls
        ]
        velocity = _velocity(predictions, step.sample, step.guidance)
        _, log_prob, mean, std = sde_step(
            velocity,
            step.sample,
            step.sigma,
            step.sigma_next,
            step.noise_level,
            next_sample=step.next_sample,
        )
        return log_prob, mean, std

    def _call(self, images, instructions, seeds):
        """One pipeline call with the adapter active."""
        call = dict(self.call)
        if _same_edit(images, instructions):  # encode the image and the text once
            call["num_images_per_prompt"] = len(images)
            images, instructions = images[0], instructions[:1]
        elif not self.batched:
            name = type(self.pipeline).__name__
            raise ValueError(f"{name} takes one image and one instruction per call")
        if isinstance(call.get("negative_prompt"), str):  # some pipelines want one per prompt
            call["negative_prompt"] = [call["negative_prompt"]] * len(instructions)
        # A template may be JSON, where a quotation mark would end the string.
        prompts = [self.template.replace("{}", text.replace('"', "'")) for text in instructions]
        # Noise drawn on the CPU is the same on every device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with self.adapter():
            output = self.pipeline(image=images, prompt=prompts, generator=generators, **call)
        if all(image.getbbox() is None for image in output.images):  # NaN becomes black, too
            raise ValueError(
                f"{type(self.pipeline).__name__} returns only black images: its numbers overflow "
                "(set 'editor.dtype' to bfloat16 or float32) or its weights are damaged"
            )
        return output.images

    def add_adapter(self, rank, targets=TARGETS):
        """Add an untrained LoRA adapter, which changes nothing yet; returns its parameters."""
        from peft import LoraConfig

        transformer = self.pipeline.transformer
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
        transformer.add_adapter(config, adapter_name=ADAPTER)
        parameters = [p for n, p in transformer.named_parameters() if f".{ADAPTER}." in n]
        for parameter in parameters:
            parameter.data = parameter.data.float()  # Adam needs fp32 even if the model is bf16
        transformer.disable_adapters()
        self.has_adapter = True
        return parameters

    def load_adapter(self, folder):
        """Load a folder that `save_adapter` wrote."""
        self.pipeline.load_lora_weights(folder, adapter_name=ADAPTER)
        self.pipeline.transformer.eval()  # new LoRA layers come in training mode
        self.pipeline.transformer.disable_adapters()
        self.has_adapter = True

    def save_adapter(self, folder):
        """Write what `pipeline.load_lora_weights(folder)` reads, the LoRA alpha included."""
        from peft.utils import get_peft_model_state_dict

        transformer = self.pipeline.transformer
        metadata = transformer.peft_config[ADAPTER].to_dict()
        metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in metadata.items()}
        self.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=ADAPTER),
            transformer_lora_adapter_metadata=metadata,
        )

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

    @staticmethod
    def check(path):
        """Raise ValueError for a pipeline that cannot be the Editor; reads only its index file."""
        import inspect

        import diffusers

        index = diffusers.DiffusionPipeline.load_config(path)
        name = index["_class_name"]
        kind = getattr(diffusers, name, None)
        if kind is None:
            raise ValueError(f"diffusers {diffusers.__version__} has no {name}")
        takes = inspect.signature(kind.__call__).parameters
        scheduler = index.get("scheduler", [None, "no scheduler"])[1]
        reasons = {
            "it takes no image": "image" not in takes or "prompt" not in takes,
            "it starts from a noised image and follows no instruction": "strength" in takes,
            "it makes videos": "num_frames" in takes,
            "it has no transformer": "transformer" not in index,
            f"{scheduler} is not the Euler method of a flow": scheduler != SCHEDULER,
            "its steps share a cache, so none can be replayed alone": name in CACHED,
            "diffusers cannot load a LoRA into it": not hasattr(kind, "save_lora_weights"),
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(f"{name} cannot be trained as the Editor: {reason}")


def _same_edit(images, instructions):
    """Whether all rows are the same image and the same instruction."""
    return all(image is images[0] for image in images) and len(set(instructions)) == 1


@contextmanager
def _recording(pipeline, generators, window, noise_level):
    """Inside this block the pipeline takes SDE steps in the window; yields the list of them.

    A forward hook keeps what the transformer is called with and what it answers. The scheduler's
    `step` is replaced by `sde_step`, which is Euler's ODE step outside the window.
    """
    scheduler, transformer = pipeline.scheduler, pipeline.transformer
    calls, predictions, steps = [], [], []
    latents = None  # kept in fp32, whatever the pipeline's dtype
    index = 0  # of the denoising step

    def keep(_, positional, keywords, output):
        calls.append((positional, keywords))
        predictions.append(output[0])

    def step(velocity, timestep, sample, **_):
        nonlocal latents, index
        latents = sample.float() if latents is None else latents
        sigma, sigma_next = scheduler.sigmas[index : index + 2].tolist()
        level = noise_level if index in window else 0.0
        velocity, guidance = velocity.float(), None
        if level > 0:  # what a replay will compute has to be what the pipeline computed
            guidance = find_guidance(predictions, velocity, type(pipeline).__name__)
            velocity = _velocity(predictions, velocity, guidance)
        next_latents, log_prob, _, _ = sde_step(
            velocity, latents, sigma, sigma_next, level, generator=generators
        )
        if log_prob is not None:
            move = (latents, next_latents, sigma, sigma_next, level, log_prob)
            steps.append(RecordedStep(list(calls), guidance, *move))
        calls.clear()
        predictions.clear()
        latents = next_latents
        index += 1
        return (next_latents.to(sample.dtype),)

    hook = transformer.register_forward_hook(keep, with_kwargs=True)
    scheduler.step = step
    try:
        yield steps
    finally:
        hook.remove()
        del scheduler.step


def _velocity(predictions, sample, guidance):
    """What the transformer answered to the velocity of B latents: (B, tokens, channels) fp32.

    Tokens after those of the latents belong to the image that is edited.
    """
    if guidance is None:
        return predictions[0][:, : sample.shape[1]].float()
    weights, rescaled = guidance
    answers = _answers(predictions, sample)
    velocity = weights[0] * answers[0] + weights[1] * answers[1]
    if rescaled:
        length = velocity.norm(dim=-1, keepdim=True)
        velocity = velocity * (answers[0].norm(dim=-1, keepdim=True) / length)
    return velocity


def _answers(predictions, sample):
    """The transformer's answers o_k about B latents, each (B, tokens, channels) fp32."""
    rows = [part for prediction in predictions for part in prediction.split(len(sample))]
    return [part[:, : sample.shape[1]].float() for part in rows]


def find_guidance(predictions, velocity, name):
    """How a pipeline with guidance combined its transformer's answers; skip on a first reading.

    Without guidance there is one answer per image, the velocity itself: returns None. With guidance
    there are two, o_0 and o_1, from two calls or from a batch twice as large. Pipelines combine
    them in one of two ways, and which one, with which scale s, is read off the numbers:

        v = c = o_1 + s (o_0 - o_1)      classifier-free guidance
        v = c |o_0| / |c|                rescaled, per token, to the length of o_0

    Returns ((s, 1 - s), rescaled). Raises ValueError if neither gives the velocity.
    """
    answers = _answers(predictions, velocity)
    tolerance = max(1e-4, 2 * torch.finfo(predictions[0].dtype).eps)

    def explains(guidance):
        error = _velocity(predictions, velocity, guidance) - velocity
        return error.norm() / velocity.norm() <= tolerance

    if len(answers) == 1 and explains(None):
        return None
    if len(answers) == 2:
        o_1 = answers[1].double()
        change = answers[0].double() - o_1
        unit = velocity.double() / velocity.double().norm(dim=-1, keepdim=True)

        def across(x):
            """The part of x at a right angle to the velocity, which no rescaling can change."""
            return x - (x * unit).sum(-1, keepdim=True) * unit

        plain = ((velocity.double() - o_1) * change).sum() / change.square().sum()
        rescaled = -(across(o_1) * across(change)).sum() / across(change).square().sum()
        for scale, is_rescaled in ((plain, False), (rescaled, True)):
            # Guidance scales in YAML have few decimals; rounding removes bf16 noise.
            scale = round(scale.item(), 4)
            if explains(((scale, 1 - scale), is_rescaled)):
                return (scale, 1 - scale), is_rescaled
    raise ValueError(
        f"{name} combines the {len(answers)} answers of its transformer in a way that cannot be "
        "replayed; turn its guidance off"
    )
