"""Editor: the inverse Diffuser of RL-RIG, an instruction editor that keeps the rest of a picture.

Any instruction-editing flow-matching pipeline of diffusers (Kontext type) that takes `image` and
`prompt`; trained in phase 2 of arXiv 2602.19974 through a LoRA adapter. `edit` integrates the
flow's ODE. `rollout` makes the same call while `rollout.recorded` turns a window of its steps into
those of an SDE and keeps what the transformer was called with. `log_probs` calls it again with
that: replay, with gradient. So no pipeline is copied, and what is replayed is what was run.

The adapter is off but inside `edit`, `rollout` and `adapter()`: a Diffuser that shares the
pipeline never meets it.

    python editor.py picture.png "move the red circle left of the blue square" edited.png
"""

from contextlib import contextmanager

import torch

from diffuser import text_problem
from rollout import Rollout, recorded, replayed

ADAPTER = "editor"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
TARGETS += ("to_qkv_mlp_proj",)  # FLUX.2's single blocks, which have q, k and v in one
# This one reads a list of pictures as a batch; all others get one picture a call, because most read
# a list as references of one and the same edit.
BATCHED = ("FluxKontextPipeline",)
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
CACHED = ("Flux2KleinKVPipeline",)  # its steps share the picture's keys and values


class Editor:
    """An instruction-editing pipeline.

    Args:
        pipeline: as `load` gives it, or the Diffuser's; call: keyword arguments of its call;
        batch_size: images a call; template: what it reads, {} standing for the instruction.
    """

    def __init__(self, pipeline, call=None, batch_size=64, template="{}"):
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.transformer.requires_grad_(False)  # kernels differ where it is True
        self.batched = type(pipeline).__name__ in BATCHED
        self.call = call or {}
        self.batch_size = batch_size
        self.template = template
        self.arrive = lambda training=False: None  # `memory.take_turns` makes room with it
        self.has_adapter = False
        self.adapter_on = False  # but inside `adapter()`
        self.use_adapter = True  # whether `edit` and `rollout` turn it on
        self.misread = 0  # instructions too long, or with unknown words: pipelines do not say so

    @staticmethod
    def check(path):
        """Raises ValueError for a pipeline that cannot be the Editor; reads its index alone."""
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
            "it takes no picture": "image" not in takes or "prompt" not in takes,
            "it starts from a noised picture and follows no instruction": "strength" in takes,
            "it makes videos": "num_frames" in takes,
            "it has no transformer": "transformer" not in index,
            f"{scheduler} is not the Euler steps of a flow": scheduler != SCHEDULER,
            "its steps share a cache, so that none can be replayed alone": name in CACHED,
            "diffusers cannot load a LoRA into it": not hasattr(kind, "save_lora_weights"),
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(f"{name} cannot be trained as the Editor: {reason}")

    @classmethod
    def load(cls, path, device="auto", dtype="auto", **settings):
        """Loads a local folder or Hub id; auto is CUDA in bf16, else the CPU in fp32."""
        from diffusers import DiffusionPipeline

        cls.check(path)
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
        self.arrive(training=True)  # the optimizer's state will be where its parameters are now
        return trained

    def load_adapter(self, folder):
        """Loads a folder that `save_adapter` wrote; it is off until `adapter()`."""
        self.pipeline.load_lora_weights(folder, adapter_name=ADAPTER)
        self.pipeline.transformer.eval()  # what is added comes in training mode: dropout
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
        """One edited PIL image per image, instruction and seed, whatever else is in the batch.

        Raises ValueError where the pipeline gives nothing but black pictures.
        """
        edited = []
        start = 0
        while start < len(images):
            stop = start + 1
            while stop < min(start + self.batch_size, len(images)) and (
                self.batched or _alike(images[start : stop + 1], instructions[start : stop + 1])
            ):
                stop += 1
            part = slice(start, stop)
            edited += self._call(images[part], instructions[part], seeds[part])
            start = stop
        return edited

    def _call(self, images, instructions, seeds):
        call = dict(self.call)
        if _alike(images, instructions):  # read the picture and encode the text once
            call["num_images_per_prompt"] = len(images)
            images, instructions = images[0], instructions[:1]
        elif not self.batched:
            name = type(self.pipeline).__name__
            raise ValueError(f"{name} edits one picture by one instruction a call")
        if isinstance(call.get("negative_prompt"), str):  # some pipelines want one for each prompt
            call["negative_prompt"] = [call["negative_prompt"]] * len(instructions)
        # A template may be JSON, which a quotation mark would end.
        prompts = [self.template.replace("{}", text.replace('"', "'")) for text in instructions]
        longest = call.get("max_sequence_length")
        self.misread += sum(bool(text_problem(self.pipeline, p, longest)) for p in set(prompts))
        # Noise drawn on the CPU is the same on every device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.arrive()
        with self.adapter(self.use_adapter):
            output = self.pipeline(image=images, prompt=prompts, generator=generators, **call)
        if all(image.getbbox() is None for image in output.images):  # as NaN becomes, too
            raise ValueError(
                f"{type(self.pipeline).__name__} draws nothing but black: its numbers overflow "
                "(key 'editor.dtype': bfloat16 or float32), or its weights are damaged"
            )
        return output.images

    def rollout(self, images, instructions, seeds, noise_seeds, window, noise_level):
        """Edits B pictures in one call, by the SDE on the steps in `window`, and records those.

        Args: seeds: of the initial latents, equal within a group, whose members then share the
        ODE prefix too; noise_seeds: of the window's noise, all distinct; window: a range of steps.
        Raises ValueError for a pipeline whose steps cannot be replayed.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in noise_seeds]
        with recorded(self.pipeline, generators, window, noise_level) as steps:
            edited = self._call(images, instructions, seeds)
        return Rollout(edited, steps)

    def log_probs(self, recorded_step):
        """Replays one step of the window with gradient: (log_prob (B,), mean, std)."""
        self.arrive(training=True)
        return replayed(self.pipeline.transformer, recorded_step)


def _alike(images, instructions):
    """Whether all rows are one edit."""
    return all(image is images[0] for image in images) and len(set(instructions)) == 1


if __name__ == "__main__":
    import sys

    from PIL import Image

    if len(sys.argv) != 4:
        sys.exit(__doc__)
    call = {"height": 32, "width": 32, "max_area": 1024, "_auto_resize": False}
    call |= {"num_inference_steps": 4, "max_sequence_length": 8}
    editor = Editor.load("tiny/models/flow", call=call)
    picture = Image.open(sys.argv[1]).convert("RGB")
    editor.edit([picture], [sys.argv[2]], [0])[0].save(sys.argv[3])
