"""What training costs on this GPU: both phases at the sizes of `gpu/*.yaml`, with random weights.

Builds the real architectures (`architectures.yaml`) directly on the device, downloads nothing, runs
two iterations of each phase with the code of `train.py`, and prints one table. Without a GPU it
runs at tiny size on the CPU instead. Images and completions are noise, so instructions and verdicts
are made up; everything else is what a training run does.

    python gpu/check.py                 # gpu/phase1.yaml and gpu/phase2.yaml, 80 GB
    python gpu/check.py --size 24gb     # gpu/phase1_24gb.yaml and gpu/phase2_24gb.yaml
"""

import argparse
import gc
import itertools
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "gpu")]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import architectures  # noqa: E402
import torch  # noqa: E402

from actor import Actor  # noqa: E402
from checker import Checker, reflect  # noqa: E402
from config import TrainConfig, load_config  # noqa: E402
from diffuser import Diffuser  # noqa: E402
from editor import Editor  # noqa: E402
from loop import Loop  # noqa: E402
from train import phase1, phase2  # noqa: E402

VLMS = {
    "Qwen/Qwen3-VL-8B-Instruct": "Qwen3VLForConditionalGeneration 8B",
    "Qwen/Qwen3-VL-4B-Instruct": "Qwen3VLForConditionalGeneration",
}
SMALL = ["groups=2", "group_size=2", "micro_batch=2", "rank=4", "actor.max_new_tokens=8"]
SMALL += ["latest_window_start=1"]  # of 4 steps
SMALL_CALL = "{height: 64, width: 64, guidance_scale: %s, num_inference_steps: 4, "
SMALL_CALL += "max_sequence_length: 24, text_encoder_out_layers: [1, 2, 3]}"
ENTRY = {  # in LAION-SG's format; the stand-in tokenizers know these words
    "img_id": 0,
    "items": [
        {"item_id": 0, "label": "circle", "attributes": ["red"]},
        {"item_id": 1, "label": "square", "attributes": ["blue"]},
    ],
    "relations": [{"item1": 0, "relation": "left of", "item2": 1}],
}


class InventiveActor(Actor):
    """Its weights are random, so every completion counts as an instruction of its own."""

    numbers = itertools.count()

    def propose(self, *arguments, **settings):
        proposals = super().propose(*arguments, **settings)
        count = len(proposals.instructions)
        proposals.instructions = [f"move the circle {next(self.numbers)}" for _ in range(count)]
        return proposals


class RisingChecker(Checker):
    """Asks the model and ignores its random answers: every image is better than all before it.

    So no group is flat, and no image satisfies.
    """

    numbers = itertools.count(2)

    def check(self, images, graphs):
        super().check(images, graphs)
        scores = [0.49 - 0.49 / next(self.numbers) for _ in graphs]
        return [
            reflect(graph, [score] * (len(graph.objects) + len(graph.triples)))
            for graph, score in zip(graphs, scores)
        ]


def build(config, tiny, device):
    """`loop.build` with random weights."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest" if device == "cpu" else "high")  # as loop.build
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    distilled = "base" not in config.editor.model
    with torch.device("cpu" if config.offload else device):
        pipeline = architectures.klein(tiny, distilled)
    with torch.device(device):
        vlm = architectures.qwen_vl(VLMS[config.actor.model], tiny)
    torch.set_default_dtype(torch.float32)
    diffuser = Diffuser(pipeline, config.diffuser.call, config.diffuser.batch_size)
    editor = Editor(pipeline, config.editor.call, config.editor.batch_size)
    checker = RisingChecker(*vlm, config.checker.batch_size)
    actor = InventiveActor(
        *vlm,
        config.actor.batch_size,
        config.actor.max_new_tokens,
        checkpointing=config.actor.checkpointing,
    )
    if config.editor.checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    if config.offload and device != "cpu":
        pipeline.enable_model_cpu_offload()
    return Loop(diffuser, checker, actor, editor, config.rounds)


def time_stages(loop):
    """{stage: seconds}, which grows whenever a part of the loop works."""
    seconds = {}

    def watch(part, method, stage):
        work = getattr(part, method)
        seconds[stage] = 0.0

        def timed(*arguments, **options):
            began = time.perf_counter()
            try:
                return work(*arguments, **options)
            finally:
                seconds[stage] += time.perf_counter() - began

        setattr(part, method, timed)

    watch(loop.diffuser, "generate", "generate")
    watch(loop.actor, "propose", "act")
    watch(loop.editor, "edit", "edit")
    watch(loop.editor, "rollout", "rollout")
    watch(loop.checker, "check", "check")
    return seconds


def measure(phase, size, tiny, device):
    """Two iterations of a phase: a column of the table, {name: text}."""
    small = []
    if tiny:
        call = SMALL_CALL % ("1.0" if phase == 1 else "4.0")
        small = [*SMALL, f"diffuser.call={call}", f"editor.call={call}"]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.json"
        data.write_text(json.dumps([ENTRY | {"img_id": number} for number in range(8)]))
        paths = [f"data={data}", f"validation={data}", f"run={folder}/run"]
        few = ["flat_range=0", "iterations=2", "validate_every=1000", "validation_limit=1"]
        overrides = ["judge=", *paths, *few, *small]  # a judge would be downloaded
        config = load_config(ROOT / "gpu" / f"phase{phase}{size}.yaml", TrainConfig, overrides)
        tolerance, config.tolerance = config.tolerance, math.inf  # measured, not enforced
        loop = build(config, tiny, device)
        stages = time_stages(loop)
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        (phase1, phase2)[phase - 1](loop, config)
        texts = [
            Path(folder, "run", name).read_text() for name in ("seconds.jsonl", "metrics.jsonl")
        ]
        seconds, metrics = (json.loads(text.splitlines()[-1]) for text in texts)  # 2nd iteration
    parts = [loop.actor.model, *loop.editor.pipeline.components.values()]
    parts = [part for part in parts if isinstance(part, torch.nn.Module)]
    count = sum(p.numel() for part in parts for p in part.parameters())
    peak = 0 if device == "cpu" else torch.cuda.max_memory_allocated() / 2**30
    column = {
        "parameters, billions": f"{count / 1e9:.3g}",
        "peak GPU memory, GiB": f"{peak:.1f}" if peak else "-",
        "samples": str(metrics["samples"]),
    }
    column |= {f"seconds with validation: {name}": f"{t:.2f}" for name, t in stages.items()}
    return column | {
        "seconds: second iteration": f"{seconds['seconds']:.2f}",
        "mean replay error": f"{metrics['replay_error']:.1e}",
        "tolerance": f"{tolerance:.1e}",
    }


def main():
    parser = argparse.ArgumentParser(description="What training costs on this GPU.")
    parser.add_argument("--size", choices=("80gb", "24gb"), default="80gb", help="which gpu/*.yaml")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU, GPU or not")
    arguments = parser.parse_args()
    size = "" if arguments.size == "80gb" else "_24gb"
    tiny = arguments.tiny or not torch.cuda.is_available()
    if not torch.cuda.is_available():
        print("There is no CUDA GPU here: the same at tiny size on the CPU, to see that it runs.")
    device = "cpu" if tiny else "cuda"
    columns = []
    for phase in (1, 2):
        columns.append(measure(phase, size, tiny, device))
        gc.collect()
        if not tiny:
            torch.cuda.empty_cache()
    name = "CPU" if tiny else torch.cuda.get_device_name()
    print(f"\n{name}, --size {arguments.size}\n\n| | phase 1 | phase 2 |\n|---|---|---|")
    for row in columns[0]:
        print(f"| {row} | {columns[0][row]} | {columns[1][row]} |")


if __name__ == "__main__":
    main()
