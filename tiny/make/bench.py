"""Where the time goes, side by side in one run: `python bench.py`.

Both phases of the embedded default for a few iterations: the share of wall time inside the models'
forward and backward passes, and iterations a minute. Then `grpo.token_log_probs` against
`log_softmax` and `gather` at a real vocabulary. No figure is a pass mark: machines differ, ratios
within one run less so.
"""

import argparse
import functools
import time
from contextlib import contextmanager

import torch
from phases import ActorPhase, EditorPhase

from config import load_config
from grpo import token_log_probs
from loop import build
from sgiou import load_graphs
from train import TrainConfig, collect, fresh_states, update

VOCABULARY = 151_936  # Qwen2.5-VL's


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
    """A `Stopwatch` on every forward and backward pass."""
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
    """Prints one phase's share of model passes and its pace."""
    config = load_config(f"phase{number}.yaml", TrainConfig)
    loop = build(config)
    phase = (ActorPhase, EditorPhase)[number - 1](loop, config)
    parameters = phase.trained.add_adapter(config.rank)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate)
    graphs = load_graphs(config.data)
    began, samples = time.perf_counter(), 0
    with passes(loop) as watch:
        for iteration in range(iterations):
            states, _ = fresh_states(loop, graphs, config, iteration)
            batches = collect(phase, states, config, iteration)
            update(phase, batches, optimizer, parameters, config)
            samples += sum(len(batch.rewards) for batch in batches)
    total = time.perf_counter() - began
    print(
        f"phase {number}: {iterations / total * 60:.1f} iterations a minute of "
        f"{samples / iterations:.0f} samples; {watch.seconds / total:.0%} of it in model passes"
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


def naive_token_log_probs(logits, ids):
    """What `token_log_probs` is spared."""
    return logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def bench_log_probs(tokens=64):
    """Prints time and memory, forward and backward, of both ways to the same log-probs."""
    torch.manual_seed(0)
    logits = torch.randn(1, tokens, VOCABULARY, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(VOCABULARY, (1, tokens))
    own = logits.numel() * logits.element_size()  # the gradient, which both must make
    found = []
    for function in (naive_token_log_probs, token_log_probs):
        times = []

        def both_passes(function=function, times=times):
            logits.grad = None
            began = time.perf_counter()
            function(logits, ids).sum().backward()
            times.append(time.perf_counter() - began)

        for _ in range(3):
            both_passes()
        found.append((min(times), peak_bytes(both_passes) - own))
        seconds, memory = found[-1]
        print(f"  {function.__name__:22} {seconds * 1e3:7.0f} ms {memory / 2**20:7.1f} MiB")
    (slow, large), (fast, small) = found
    print(f"  ratio                  {fast / slow:7.2f}    {small / large:7.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=3, help="of each phase")
    arguments = parser.parse_args()
    if arguments.iterations < 1:
        parser.error("--iterations: give 1 or more")
    for number in (1, 2):
        bench_phase(number, arguments.iterations)
    print(
        f"log-probs of 64 tokens at V = {VOCABULARY:,}, forward and backward, beside the gradient:"
    )
    bench_log_probs()
