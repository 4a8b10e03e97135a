"""Where the time goes, measured side by side in one run: `python tiny/make/bench.py`.

Both phases with the tiny models for a few iterations: iterations per minute, and the share of
the time that is spent inside the models' forward and backward passes. Then what it saves to read an
image once: for all questions of the Checker, and for all completions of a group in the Actor's
update. Then the log-probs of grpo.py, both ways, at the vocabulary of a real model. Machines
differ, so nothing here is a requirement; ratios within one run differ less.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch

from checker import questions
from config import TrainConfig, load_config
from grpo import chunked_token_log_probs, token_log_probs
from loop import build
from sgiou import load_graphs
from train import phase1, phase2

VOCABULARY = 151_936  # Qwen-VL's


class Stopwatch:
    """Seconds inside wrapped functions; of nested ones the outermost counts."""

    def __init__(self):
        self.seconds = 0.0
        self.depth = 0

    def wrap(self, owner, name):
        function = getattr(owner, name)

        @functools.wraps(function)  # `generate` reads the signature of what it calls
        def timed(*arguments, **keywords):
            self.depth += 1
            began = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.seconds += time.perf_counter() - began

        setattr(owner, name, timed)


@contextmanager
def passes(loop):
    """A `Stopwatch` on every forward and backward pass of the shipped models."""
    watch = Stopwatch()
    pipeline = loop.editor.pipeline
    parts = [(loop.checker.model, "forward"), (pipeline.transformer, "forward")]
    parts += [(pipeline.vae, "encode"), (pipeline.vae, "decode")]
    parts += [(pipeline.text_encoder, "forward"), (pipeline.text_encoder_2, "forward")]
    backward = torch.Tensor.backward
    for owner, name in [*parts, (torch.Tensor, "backward")]:
        watch.wrap(owner, name)
    try:
        yield watch
    finally:
        torch.Tensor.backward = backward
        for owner, name in parts:
            delattr(owner, name)  # the class's own is found again


def bench_phase(number, iterations):
    """Prints the speed of a phase and its share of model passes."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"iterations={iterations}", f"run={folder}", "validation_limit=1"]
        config = load_config(ROOT / f"phase{number}.yaml", TrainConfig, settings)
        loop = build(config)
        with passes(loop) as watch:
            began = time.perf_counter()
            (phase1, phase2)[number - 1](loop, config)
            total = time.perf_counter() - began
        seconds = [json.loads(line)["seconds"] for line in (Path(folder) / "seconds.jsonl").open()]
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()][1:]
    samples = sum(row["samples"] for row in rows) / iterations
    print(
        f"phase {number}: {60 * iterations / sum(seconds):.1f} iterations per minute of "
        f"{samples:.0f} samples; {watch.seconds / total:.0%} of the time in model passes"
    )


def cpu_seconds(run):
    """The least CPU time of five runs (a busy neighbor does not count), the first one left out."""
    times = []
    for _ in range(6):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times[1:])


def bench_vlm(loop, groups=8, group_size=8):
    """Prints what one reading of an image for all texts about it saves."""
    checker, actor = loop.checker, loop.actor
    graphs = load_graphs(ROOT / "tiny" / "data" / "val.json", (), 64)
    images = loop.diffuser.generate([graph.prompt() for graph in graphs], range(len(graphs)))
    compare(
        checker,
        f"Checker, {len(images)} images, {sum(len(questions(g)) for g in graphs)} questions",
        lambda: checker.check(images, graphs),
    )

    actor.add_adapter(16)
    prompts = [graph.prompt() for graph in graphs[:groups]]
    feedback = [f"wrong: {prompt}" for prompt in prompts]
    proposals = actor.propose(images[:groups], prompts, feedback, range(groups), group_size)

    def update():
        with actor.adapter():
            actor.replay(proposals, slice(None)).sum().backward()

    compare(actor, f"Actor, update of {groups} groups of {group_size} completions", update)


def compare(part, what, run):
    """Prints the time of `run` if the part reads an image anew for every text, and if it shares."""
    seconds = []
    for part.share in (False, True):
        seconds.append(cpu_seconds(run))
    print(
        f"{what}: one by one {seconds[0]:.2f} s, shared {seconds[1]:.2f} s, "
        f"ratio {seconds[0] / seconds[1]:.2f}"
    )


def peak_bytes(function):
    """The highest sum of live CPU allocations that `function` makes, as the allocator saw them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()  # events() lacks allocations inside an op
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, live)
    return peak


def bench_log_probs(batch=8, tokens=16):
    """Prints time and memory, forward and backward, of both ways to the same log-probs."""
    torch.manual_seed(0)
    logits = torch.randn(batch, tokens, VOCABULARY, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(VOCABULARY, (batch, tokens))
    gradient = logits.numel() * logits.element_size()  # both ways have to make it
    found = []
    for function in (token_log_probs, chunked_token_log_probs):
        times = []

        def both_passes(function=function, times=times):
            logits.grad = None
            began = time.perf_counter()
            function(logits, ids).sum().backward()
            times.append(time.perf_counter() - began)

        for _ in range(3):
            both_passes()
        logits.grad = None  # freed before the count begins
        found.append((min(times), peak_bytes(both_passes) - gradient))
        seconds, memory = found[-1]
        print(f"  {function.__name__:24} {seconds * 1e3:7.0f} ms {memory / 2**20:7.1f} MiB")
    (slow, large), (fast, small) = found
    print(f"  ratio                    {fast / slow:7.2f}    {small / large:7.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=3, help="of each phase")
    arguments = parser.parse_args()
    if arguments.iterations < 1:
        parser.error("--iterations: give 1 or more")
    for number in (1, 2):
        bench_phase(number, arguments.iterations)
    bench_vlm(build(load_config(ROOT / "phase1.yaml", TrainConfig)))
    print(f"log-probs at V = {VOCABULARY:,}, forward and backward, memory beside the gradient:")
    bench_log_probs()
