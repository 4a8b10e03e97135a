"""What training costs on this GPU: both phases at the sizes of `gpu/*.yaml`, with random weights.

Builds the real architectures (`architectures.yaml`) straight on the device, with nothing from the
Hub, runs two iterations of each phase and prints one table. Without a GPU it says so and runs the
same at tiny size on the CPU. Pictures and completions are noise, so instructions and rewards are
made up; all else is what `train.py` runs.

    python gpu/check.py                 # gpu/phase1.yaml and gpu/phase2.yaml, 80 GB
    python gpu/check.py --size 24gb     # gpu/phase1_24gb.yaml and gpu/phase2_24gb.yaml
"""

import argparse
import gc
import math
import os
import sys
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
from config import load_config  # noqa: E402
from diffuser import Diffuser  # noqa: E402
from editor import Editor  # noqa: E402
from loop import Loop  # noqa: E402
from memory import checkpoint_vlm, take_turns  # noqa: E402
from phases import SECONDS, ActorPhase, EditorPhase, State, clock  # noqa: E402
from sgiou import SceneGraph  # noqa: E402
from train import TrainConfig, update  # noqa: E402

PIPELINES = {
    "black-forest-labs/FLUX.1-Kontext-dev": architectures.kontext,
    "black-forest-labs/FLUX.2-klein-base-4B": architectures.klein,
}
VLMS = {
    "Qwen/Qwen2.5-VL-7B-Instruct": "Qwen2_5_VLForConditionalGeneration",
    "Qwen/Qwen3-VL-4B-Instruct": "Qwen3VLForConditionalGeneration",
}
SMALL = ["groups=1", "group_size=2", "micro_batch=2", "rank=4", "actor.max_new_tokens=8"]
SMALL_CALLS = {
    "": "{height: 32, width: 32, max_area: 1024, num_inference_steps: 4, max_sequence_length: 12}",
    "_24gb": "{height: 64, width: 64, guidance_scale: 4.0, num_inference_steps: 4,"
    " max_sequence_length: 24, text_encoder_out_layers: [1, 2, 3]}",
}
GRAPH = SceneGraph(
    ("red circle", "blue square", "green triangle"),
    (("red circle", "left of", "blue square"), ("green triangle", "above", "red circle")),
)


class TalkingActor(Actor):
    """Its weights are random: whatever it says is taken for an instruction, each another."""

    def propose(self, *arguments, **settings):
        proposals = super().propose(*arguments, **settings)
        move = "move the red circle left of the blue square "
        proposals.instructions = [move * (1 + i % 2) + str(i) for i in range(len(proposals.ids))]
        return proposals


def build(config, tiny, device):
    """`loop.build` with random weights: a `Loop`."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    with torch.device(device):
        pipeline = PIPELINES[config.editor.model](tiny)
        if config.offload:
            pipeline.to("cpu")
        model, processor = architectures.qwen_vl(VLMS[config.actor.model], tiny)
    torch.set_default_dtype(torch.float32)
    diffuser = Diffuser(pipeline, config.diffuser.call, config.diffuser.batch_size)
    editor = Editor(pipeline, config.editor.call, config.editor.batch_size)
    checker = Checker(model, processor, config.checker.batch_size)
    actor = TalkingActor(model, processor, config.actor.batch_size, config.actor.max_new_tokens)
    if config.actor.checkpointing:
        checkpoint_vlm(model)
    if config.editor.checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    if config.offload:
        take_turns((diffuser, checker, actor, editor), device)
    return Loop(diffuser, checker, actor, editor)


def matrix_rate(device):
    """FLOP/s of a large matrix product, bf16 on a GPU, fp32 on a CPU."""
    size = 1024 if device == "cpu" else 8192
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = [timed(lambda: left @ right, device) for _ in range(10)]
    return 2 * size**3 / min(seconds)


def timed(run, device):
    """Seconds that a function takes."""
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def training_rate(phase, batch, device):
    """FLOP/s of one forward and backward pass of a phase, what is recomputed included."""
    from torch.utils.flop_counter import FlopCounterMode

    replay = next(phase.pieces(batch))[0]

    def run():
        with phase.trained.adapter():
            replay()[0].sum().backward()

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / timed(run, device)


def measure(number, size, tiny, device, rate):
    """Two iterations of a phase: the table's column, name to text."""
    small = []
    if tiny:
        call = SMALL_CALLS[size]
        edit = call if size else call[:-1] + ", _auto_resize: false}"
        small = [*SMALL, f"diffuser.call={call}", f"editor.call={edit}"]
    config = load_config(ROOT / "gpu" / f"phase{number}{size}.yaml", TrainConfig, small)
    tolerance, config.tolerance = config.tolerance, math.inf  # measured, not enforced
    loop = build(config, tiny, device)
    phase = (ActorPhase, EditorPhase)[number - 1](loop, config)
    parameters = phase.trained.add_adapter(config.rank)
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=0.0)
    parts = [loop.actor.model, *loop.editor.pipeline.components.values()]
    parts = [part for part in parts if isinstance(part, torch.nn.Module)]
    total = sum(p.numel() for part in parts for p in part.parameters())
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for iteration in range(2):  # the first one warms up
        SECONDS.clear()
        with clock("generate"):
            prompts = [GRAPH.prompt()] * config.groups
            images = loop.diffuser.generate(prompts, list(range(config.groups)))
        reflection = reflect(GRAPH, [0.4] * 5)
        states = [State(GRAPH, image, reflection) for image in images]
        batch = phase.rollout(states, iteration)
        batch.rewards = [float(i % 2) for i in range(len(batch.rewards))]  # no group is flat
        with clock("update"):
            figures = update(phase, [batch], optimizer, parameters, config)
    peak = 0 if device == "cpu" else torch.cuda.max_memory_allocated() / 2**30
    tokens = loop.actor.max_new_tokens * config.groups * (config.group_size if number == 1 else 1)
    reached = training_rate(phase, batch, device)
    error = math.expm1(figures["replay_error"])
    column = {
        "parameters, billions": f"{total / 1e9:.3g}",
        "trained, millions": f"{sum(p.numel() for p in parameters) / 1e6:.3g}",
        "peak GPU memory, GiB": f"{peak:.1f}" if peak else "-",
        "samples": str(len(batch.rewards)),
    }
    column |= {f"seconds: {stage}": f"{seconds:.2f}" for stage, seconds in SECONDS.items()}
    return column | {
        "seconds: iteration": f"{sum(SECONDS.values()):.2f}",
        "tokens a second": f"{tokens / SECONDS['act']:.4g}",
        "edits a second": f"{len(batch.rewards) / SECONDS['edit']:.3g}",
        "training pass, TFLOP/s": f"{reached / 1e12:.3g}",
        "share of the matrix rate": f"{reached / rate:.0%}",
        "max abs(rho - 1) (tolerance; of the mean in phase 1)": f"{error:.1e} ({tolerance:.1e})",
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
    rate = matrix_rate(device)
    name = "CPU" if tiny else torch.cuda.get_device_name()
    print(f"{name}; a matrix product reaches {rate / 1e12:.3g} TFLOP/s; --size {arguments.size}\n")
    columns = []
    for number in (1, 2):
        columns.append(measure(number, size, tiny, device, rate))
        gc.collect()
        if not tiny:
            torch.cuda.empty_cache()
    print("| | phase 1 | phase 2 |\n|---|---|---|")
    for row in dict.fromkeys([*columns[0], *columns[1]]):
        print(f"| {row} | {columns[0].get(row, '-')} | {columns[1].get(row, '-')} |")


if __name__ == "__main__":
    main()
