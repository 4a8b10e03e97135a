"""Where the time of the VLM goes, as ratios within one run: `python tiny/make/bench.py`.

    Checker     one encoding of an image for all its questions, against one for each question
    replay      the share of the vision tower in forward and backward of `Actor.log_probs`, which
                encodes the image of a group once per completion
    log-probs   `chunked_token_log_probs` against `token_log_probs` at a real vocabulary

No figure is a pass mark: machines differ, ratios within one run less so.
"""

import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from PIL import Image
from test_grpo import peak_bytes

from actor import Actor
from checker import Checker, questions
from grpo import chunked_token_log_probs, token_log_probs
from sgiou import SceneGraph
from tiny import world

VLM = ROOT / "tiny" / "models" / "vlm"
VOCABULARY = 151_936  # Qwen-VL's


def seconds(run, repeats=5):
    """Least CPU time of several runs (a busy neighbor does not count), the first one left out."""
    times = []
    for _ in range(1 + repeats):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times[1:])


def drawings(count):
    """Images and their scene graphs."""
    rng = random.Random(0)
    images, graphs = [], []
    while len(images) < count:
        things = world.random_scene(rng, 4, "val")
        triples = world.random_triples(rng, things)
        if triples:
            images.append(Image.fromarray(world.render(things)))
            graphs.append(SceneGraph([thing.name for thing in things], triples))
    return images, graphs


def bench_checker(images, graphs):
    checker = Checker.load(VLM)
    checker.probe()
    times = {}
    for share in (False, True):
        checker.share = share
        times[share] = seconds(lambda: checker.check(images, graphs))
    asked = sum(len(questions(graph)) for graph in graphs)
    print(
        f"Checker, {len(images)} images, {asked} questions: one by one {times[False]:.2f} s, "
        f"shared {times[True]:.2f} s, ratio {times[False] / times[True]:.2f}"
    )


def bench_replay(images, graphs, group_size=8):
    actor = Actor.load(VLM, max_new_tokens=64)
    actor.add_adapter(16)
    prompts = [graph.prompt() for graph in graphs]
    feedback = [f"wrong: {prompt}" for prompt in prompts]
    proposals = actor.propose(images, prompts, feedback, range(len(images)), n=group_size)
    watched = []
    encode = actor.model.model.get_image_features

    def timed(*arguments, **settings):
        began = time.process_time()
        features = encode(*arguments, **settings)
        watched.append(time.process_time() - began)
        return features

    actor.model.model.get_image_features = timed

    def run():
        watched.clear()
        with actor.adapter():
            actor.log_probs(proposals, slice(None)).sum().backward()

    total = seconds(run)
    share = watched[0] / total
    print(
        f"replay of {len(proposals.ids)} completions, groups of {group_size}: {total:.2f} s, "
        f"vision tower {share:.1%}; once per group would save {share * (1 - 1 / group_size):.1%}"
    )


def bench_log_probs(rows=16, tokens=4):
    logits = torch.randn(rows, tokens, VOCABULARY).bfloat16().requires_grad_()
    ids = torch.randint(VOCABULARY, (rows, tokens))
    found = []
    for function in (token_log_probs, chunked_token_log_probs):

        def run(function=function):
            logits.grad = None
            function(logits, ids).sum().backward()

        times = seconds(run, 3)
        logits.grad = None  # freed before the count begins
        found.append((times, peak_bytes(run)))
    (plain, large), (chunked, small) = found
    print(
        f"log-probs of {rows} x {tokens} tokens, forward and backward: time ratio "
        f"{plain / chunked:.2f}, memory {large / 2**20:.0f} and {small / 2**20:.0f} MiB, the "
        f"gradient included ({logits.numel() * 2 / 2**20:.0f})"
    )


if __name__ == "__main__":
    bench_checker(*drawings(64))
    bench_replay(*drawings(8))
    bench_log_probs()
