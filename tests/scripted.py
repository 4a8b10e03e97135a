"""A loop without models: `Script` plays all four parts and records every call."""

import copy
from types import SimpleNamespace

import torch
from PIL import Image

from checker import reflect
from diffuser import Diffuser
from loop import Loop
from sgiou import SceneGraph
from tiny.world import Thing, render

GRAPH = SceneGraph(["red circle", "blue square"], [("red circle", "left of", "blue square")])
RIGHT = [Thing("red circle", 1, 1), Thing("blue square", 17, 1)]
WRONG = [Thing("red circle", 17, 1), Thing("blue square", 1, 1)]
MOVE = "move the red circle left of the blue square"
EDIT_SEEDS = 1_000_003  # the loop adds this times the index of the step to the seed of an edit


def move(number):
    """The instruction of a round."""
    return f"{MOVE} ({number})"


class Script:
    """Plays Diffuser, Checker, Actor and Editor.

    scores: {seed: [the Checker's score of the generated image, then of the edit in each round]}
    instructions: {seed: [what the Actor writes, one by one]}; afterwards and by default `move(1)`
        in the first round, `move(2)` in the second
    transformer: the flow model that is called for every generation and edit, if any
    """

    def __init__(self, scores, instructions=None, transformer=None):
        self.scores = scores
        self.instructions = instructions or {}
        self.pipeline = SimpleNamespace(transformer=transformer)
        self.model, self.temperature = torch.nn.Identity(), 1.0
        self.has_adapter = False
        self.calls = []  # (name, arguments by name)

    def image(self, seed, number):
        score = self.scores[seed][number]
        image = Image.fromarray(render(RIGHT if score >= 0.5 else WRONG))
        image.seed, image.number, image.score = seed, number, score
        return image

    def generate(self, prompts, seeds):
        self.calls.append(("generate", SimpleNamespace(prompts=prompts, seeds=seeds)))
        self.pass_through_model(len(seeds), image_tokens=16, text_tokens=20)
        return [self.image(seed, 0) for seed in seeds]

    def check(self, images, graphs):
        self.calls.append(("check", SimpleNamespace(images=images, graphs=graphs)))
        return [
            reflect(graph, [image.score] * (len(graph.objects) + len(graph.triples)))
            for image, graph in zip(images, graphs, strict=True)
        ]

    def propose(self, images, prompts, feedback, seeds, n=1, tried=None, temperature=None):
        call = SimpleNamespace(images=images, prompts=prompts, feedback=feedback, seeds=seeds)
        call.tried, call.adapter, call.temperature = tried, self.has_adapter, temperature
        self.calls.append(("propose", call))
        left = [self.instructions.get(image.seed) for image in images]
        number = len(self.made("propose"))
        written = [some.pop(0) if some else move(number) for some in left]
        return SimpleNamespace(thoughts=["a thought"] * len(images), instructions=written)

    def edit(self, images, instructions, seeds):
        call = SimpleNamespace(images=images, instructions=instructions, seeds=seeds)
        call.adapter = self.has_adapter
        self.calls.append(("edit", call))
        self.pass_through_model(len(seeds), image_tokens=32, text_tokens=10)
        return [
            self.image(image.seed, (seed - image.seed) // EDIT_SEEDS)
            for image, seed in zip(images, seeds)
        ]

    def pass_through_model(self, batch, image_tokens, text_tokens):
        if self.pipeline.transformer and batch:
            self.pipeline.transformer(
                hidden_states=torch.zeros(batch, image_tokens, 4),
                encoder_hidden_states=torch.zeros(batch, text_tokens, 4),
            )

    def without_adapter(self):
        untrained = copy.copy(self)  # it shares the list of calls
        untrained.has_adapter = False
        return untrained

    def problem(self, prompt):
        return "too hard" if "dog" in prompt else None

    readable = Diffuser.readable  # asks `problem`

    def made(self, name):
        """The recorded calls of one method, without those that had nothing to do."""
        return [call for n, call in self.calls if n == name and any(vars(call).values())]

    def loop(self, rounds=3):
        return Loop(self, self, self, self, rounds)


def run(scores, rounds=3, instructions=None):
    """Run a scripted loop: (trajectories, script)."""
    script = Script(scores, instructions)
    return script.loop(rounds).run([GRAPH] * len(scores), list(scores)), script
