"""A loop with policies of a few numbers: trains in milliseconds, and its losses can be written out.

An image is gray, and its `score` is what the Checker says. The Actor draws words from one softmax;
the first word is its instruction. The Editor adds to the score what the instruction is worth; in a
rollout it adds the mean of noisy latents to it.

    python tests/toys.py --phase 1 ...      # train.py with these parts in place of the models
"""

import math
import os
import random
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from safetensors.torch import load_file, save

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checker import reflect
from editor import Rollout
from loop import Loop

GAINS = {"good": 0.3, "bad": -0.1, "none": 0.0, None: 0.0}  # what an instruction is worth
WORDS = list(GAINS)
LENGTH = 3  # tokens of a completion, of which the instruction's number + 1 are not padding
STD = 0.5  # of the Editor's noise
made = []  # all `Proposals` and `Rollout`s, in order; tests clear it


def image(score):
    made = Image.new("RGB", (8, 8), (round(255 * score),) * 3)
    made.score = score
    return made


class Diffuser:
    def generate(self, prompts, seeds):
        time.sleep(float(os.environ.get("TOY_SECONDS", 0)))
        return [image(0.1 + 0.45 * random.Random(seed).random()) for seed in seeds]

    def readable(self, graphs, path):
        return graphs


class Checker:
    def check(self, images, graphs):
        return [
            reflect(graph, [image.score] * (len(graph.objects) + len(graph.triples)))
            for image, graph in zip(images, graphs, strict=True)
        ]


class Policy:
    """What both trained parts have in common: parameters that act only inside `adapter()`."""

    has_adapter = False
    temperature = 1.0
    active = False

    def add_adapter(self, rank):
        self.has_adapter = True
        self.weights = torch.nn.Parameter(torch.zeros(4))
        self.ballast = torch.nn.Parameter(torch.ones(rank, 4096))  # gets no gradient
        return [self.weights, self.ballast]

    def save_adapter(self, folder):
        (folder / "adapter.safetensors").write_bytes(save({"weights": self.weights.data}))

    @contextmanager
    def adapter(self):
        self.active = self.has_adapter
        yield
        self.active = False

    def current(self):
        """The weights that act now, (4,); those of the base model are zeros."""
        return self.weights if self.active else torch.zeros(4)


class Actor(Policy):
    def propose(self, images, prompts, feedback, seeds, n=1, tried=None, temperature=None):
        count = len(images) * n
        with self.adapter(), torch.no_grad():
            table = self.current().log_softmax(0)
        draws = [
            torch.multinomial(table.exp(), n * LENGTH, True, generator=generator(seed))
            for seed in seeds
        ]
        ids = torch.cat(draws).view(count, LENGTH)
        instructions = [WORDS[first] for first in ids[:, 0].tolist()]
        proposals = SimpleNamespace(  # what train.py needs of `Proposals`
            ids=ids,
            mask=torch.arange(LENGTH) <= ids[:, :1],
            log_probs=table[ids],
            thoughts=[""] * count,
            instructions=instructions,
            truncated=[False] * count,
        )
        made.append(proposals)
        return proposals

    def replay(self, proposals, rows):
        return self.current().log_softmax(0)[proposals.ids[rows]]


class Editor(Policy):
    batched = True

    def __init__(self):
        self.call = {"num_inference_steps": 8}
        self.edits, self.rollouts = [], []  # the arguments of all calls

    def edit(self, images, instructions, seeds):
        self.edits.append((images, instructions, seeds))
        return [
            image(before.score + GAINS[text] + 0.02 * random.Random(seed).random())
            for before, text, seed in zip(images, instructions, seeds)
        ]

    def rollout(self, images, instructions, seeds, noise_seeds, window, noise_level):
        self.rollouts.append((images, instructions, seeds, noise_seeds, window))
        steps = []
        x = torch.stack([torch.randn(4, generator=generator(seed)) for seed in seeds])  # (B, 4)
        for number in window:
            noise = [torch.randn(4, generator=generator(seed + number)) for seed in noise_seeds]
            with self.adapter(), torch.no_grad():
                after = x + self.current() + STD * torch.stack(noise)
                step = SimpleNamespace(sample=x, next_sample=after)
                step.log_prob, step.mean, _ = self.replay(step)
            steps.append(step)
            x = after
        scores = [
            before.score + 0.2 * moved.item()
            for before, moved in zip(images, (x - steps[0].sample).mean(1))
        ]
        made.append(Rollout([image(min(max(score, 0.0), 1.0)) for score in scores], steps))
        return made[-1]

    def replay(self, step):
        mean = step.sample + self.current()  # (B, 4)
        normal = torch.distributions.Normal(mean, STD)
        return normal.log_prob(step.next_sample).mean(1), mean, STD


def generator(seed):
    return torch.Generator().manual_seed(seed)


def loop():
    return Loop(Diffuser(), Checker(), Actor(), Editor())


def saved(folder):
    """The weights of a run's adapter."""
    return load_file(Path(folder) / "adapter" / "adapter.safetensors")["weights"]


def gaussian(x, mean):
    """log N(x; mean, STD^2), one number."""
    return -0.5 * ((x - mean) / STD) ** 2 - math.log(STD * math.sqrt(2 * math.pi))


if __name__ == "__main__":
    import train

    train.build = lambda config: loop()
    train.main()
