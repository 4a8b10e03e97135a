"""Editor: the inverse Diffuser of RL-RIG, an instruction editor that keeps the rest of a picture.

Any instruction-editing flow-matching pipeline of diffusers (Kontext type) that takes `image` and
`prompt`. `edit` integrates the flow's ODE with the pipeline's own scheduler (arXiv 2602.19974;
trained in its phase 2). Arguments of the pipeline's call come from the YAML's `call:`.

    python editor.py picture.png "move the red circle left of the blue square" edited.png
"""


class Editor:
    """An instruction-editing pipeline.

    Args:
        pipeline: as `load` gives it, or the Diffuser's; call: keyword arguments of its call;
        batch_size: images a call.
    """

    def __init__(self, pipeline, call=None, batch_size=64):
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.call = call or {}
        self.batch_size = batch_size

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
            path, torch_dtype=getattr(torch, dtype), use_safetensors=True
        )
        return cls(pipeline.to(device), **settings)

    def edit(self, images, instructions, seeds):
        """One edited PIL image per image, instruction and seed, whatever else is in the batch."""
        import torch

        edited = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            # Noise drawn on the CPU is the same on every device.
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            output = self.pipeline(
                image=images[part], prompt=instructions[part], generator=generators, **self.call
            )
            edited += output.images
        return edited


if __name__ == "__main__":
    import sys

    from PIL import Image

    call = {"height": 32, "width": 32, "max_area": 1024, "_auto_resize": False}
    call |= {"num_inference_steps": 8, "max_sequence_length": 10}
    editor = Editor.load("tiny/models/flow", call=call)
    picture = Image.open(sys.argv[1]).convert("RGB")
    editor.edit([picture], [sys.argv[2]], [0])[0].save(sys.argv[3])
