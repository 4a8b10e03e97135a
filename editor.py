"""Editor: the inverse Diffuser of RL-RIG, an instruction editor that keeps the rest of a picture.

Any instruction-editing flow-matching pipeline of diffusers (Kontext type) that takes `image` and
`prompt`; trained in phase 2 of arXiv 2602.19974 through a LoRA adapter. `edit` integrates the
flow's ODE. `rollout` makes the same call, but on a window of steps the scheduler's `step` becomes
`grpo.sde_step` (Flow-GRPO, arXiv 2505.05470; a window: MixGRPO, arXiv 2507.21802), and a hook
keeps what the transformer was called with. `log_probs` calls it again with that: replay, with
gradient. So no pipeline is copied, and what is replayed is what was run.

The adapter is off but inside `edit`, `rollout` and `adapter()`: a Diffuser that shares the
pipeline never meets it.

    python editor.py picture.png "move the red circle left of the blue square" edited.png
"""

from contextlib import contextmanager
from dataclasses import dataclass

from grpo import sde_step

ADAPTER = "editor"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")


@dataclass
class RecordedStep:
    """One SDE step of a rollout of B pictures; all tensors fp32 but those in `call`."""

    call: dict  # keyword arguments of the transformer
    sample: object  # (B, tokens, channels) latents before the step
    next_sample: object  # the same after it
    sigma: float
    sigma_next: float
    noise_level: float
    log_prob: object  # (B,) as sampled


@dataclass
class Rollout:
    """Edited pictures, and the steps of the window that can be replayed."""

    images: list
    steps: list[RecordedStep]


class Editor:
    """An instruction-editing pipeline.

    Args:
        pipeline: as `load` gives it, or the Diffuser's; call: keyword arguments of its call;
        batch_size: images a call.
    """

    def __init__(self, pipeline, call=None, batch_size=64):
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.transformer.requires_grad_(False)  # kernels differ where it is True
        self.call = call or {}
        self.batch_size = batch_size
        self.has_adapter = False
        self.adapter_on = False  # but inside `adapter()`
        self.use_adapter = True  # whether `edit` and `rollout` turn it on

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

    def add_adapter(self, rank, targets=TARGETS):
        """Adds an untrained LoRA adapter (it changes nothing yet); returns its parameters."""
        from peft import LoraConfig

        transformer = self.pipeline.transformer
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
        transformer.add_adapter(config, adapter_name=ADAPTER)
        self.has_adapter = True
        trained = [p for n, p in transformer.named_parameters() if f".{ADAPTER}." in n]
        for parameter in trained:
            parameter.data = parameter.data.float()
        transformer.disable_adapters()
        return trained

    def load_adapter(self, folder):
        """Loads a folder that `save_adapter` wrote; it is off until `adapter()`."""
        self.pipeline.load_lora_weights(folder, adapter_name=ADAPTER)
        self.pipeline.transformer.disable_adapters()
        self.has_adapter = True

    def save_adapter(self, folder):
        """Writes what `pipeline.load_lora_weights(folder)` reads, alpha included."""
        from peft.utils import get_peft_model_state_dict

        transformer = self.pipeline.transformer
        metadata = transformer.peft_config[ADAPTER].to_dict()
        # A set's order changes from run to run, and with it the file.
        metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in metadata.items()}
        self.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=ADAPTER),
            transformer_lora_adapter_metadata=metadata,
        )

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
            transformer = self.pipeline.transformer
            transformer.enable_adapters() if on else transformer.disable_adapters()
            self.adapter_on = on

    def edit(self, images, instructions, seeds):
        """One edited PIL image per image, instruction and seed, whatever else is in the batch."""
        edited = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            edited += self._call(images[part], instructions[part], seeds[part])
        return edited

    def _call(self, images, instructions, seeds):
        import torch

        # Noise drawn on the CPU is the same on every device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with self.adapter(self.use_adapter):
            output = self.pipeline(
                image=images, prompt=instructions, generator=generators, **self.call
            )
        return output.images

    def rollout(self, images, instructions, seeds, noise_seeds, window, noise_level):
        """Edits B pictures in one call, by the SDE on the steps in `window`, and records those.

        Args: seeds: of the initial latents, equal within a group, whose members then share the
        ODE prefix too; noise_seeds: of the window's noise, all distinct; window: a range of steps.
        Raises ValueError for a pipeline that calls its transformer more than once a step.
        """
        import torch

        generators = [torch.Generator().manual_seed(seed) for seed in noise_seeds]
        scheduler = self.pipeline.scheduler
        calls = []
        steps = []
        latents = None  # fp32, whatever the pipeline's dtype
        done = 0

        def keep(_, arguments, keywords):
            calls.append(keywords)

        def step(velocity, timestep, sample, **_):
            nonlocal latents, done
            if len(calls) != 1:
                name = type(self.pipeline).__name__
                raise ValueError(
                    f"{name} calls its transformer {len(calls)} times a step: turn "
                    "classifier-free guidance off, it cannot be trained"
                )
            latents = sample.float() if latents is None else latents
            sigma, sigma_next = scheduler.sigmas[done : done + 2].tolist()
            level = noise_level if done in window else 0.0
            next_latents, log_prob, _, _ = sde_step(
                velocity, latents, sigma, sigma_next, level, generator=generators
            )
            if log_prob is not None:
                steps.append(
                    RecordedStep(
                        calls[0], latents, next_latents, sigma, sigma_next, level, log_prob
                    )
                )
            calls.clear()
            latents = next_latents
            done += 1
            return (next_latents.to(sample.dtype),)

        hook = self.pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
        scheduler.step = step
        try:
            edited = self._call(images, instructions, seeds)
        finally:
            hook.remove()
            del scheduler.step
        return Rollout(edited, steps)

    def log_probs(self, recorded):
        """Replays one step of the window with gradient: (log_prob (B,), mean, std)."""
        prediction = self.pipeline.transformer(**recorded.call)[0]
        velocity = prediction[:, : recorded.sample.shape[1]]  # without the picture's own tokens
        _, log_prob, mean, std = sde_step(
            velocity,
            recorded.sample,
            recorded.sigma,
            recorded.sigma_next,
            recorded.noise_level,
            next_sample=recorded.next_sample,
        )
        return log_prob, mean, std


if __name__ == "__main__":
    import sys

    from PIL import Image

    call = {"height": 32, "width": 32, "max_area": 1024, "_auto_resize": False}
    call |= {"num_inference_steps": 8, "max_sequence_length": 8}
    editor = Editor.load("tiny/models/flow", call=call)
    picture = Image.open(sys.argv[1]).convert("RGB")
    editor.edit([picture], [sys.argv[2]], [0])[0].save(sys.argv[3])
