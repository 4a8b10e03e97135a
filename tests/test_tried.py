"""No instruction is carried out twice on the same image: the loop's guard and training's states."""

import random
from types import SimpleNamespace

from checker import reflect
from loop import ATTEMPTS, Loop
from report import story
from sgiou import SceneGraph
from tiny.world import render
from train import State, next_states

GRAPH = SceneGraph(["red circle"], [])
MOVE, ADD = "move the red circle", "add a red circle"


class Script:
    """All four parts of a loop. Images are the numbers in `scores`, in the order they are made."""

    def __init__(self, scores, words):
        self.scores, self.words = iter(scores), iter(words)
        self.asked = []  # (seed, tried) of every completion
        self.edits = []  # (score of the image, instruction, seed)

    def generate(self, prompts, seeds):
        return [next(self.scores) for _ in prompts]

    def check(self, images, graphs):
        return [reflect(graph, [image]) for image, graph in zip(images, graphs)]

    def propose(self, images, prompts, feedback, seeds, n=1, tried=None):
        self.asked += zip(seeds, tried)
        words = [next(self.words) for _ in images]
        return SimpleNamespace(thoughts=["because"] * len(images), instructions=words)

    def edit(self, images, instructions, seeds):
        self.edits += zip(images, instructions, seeds)
        return [next(self.scores) for _ in images]


def run(scores, words, rounds):
    parts = Script(scores, words)
    (trajectory,) = Loop(parts, parts, parts, parts, rounds).run([GRAPH], [7])
    return parts, trajectory


def test_the_actor_reads_what_was_tried_on_the_best_image():
    """Images score 0.2, then 0.1 (worse), 0.3 (better), 0.1 (worse)."""
    parts, trajectory = run([0.2, 0.1, 0.3, 0.1, 0.1], [MOVE, ADD, MOVE, "swap"], rounds=4)
    assert [tried for _, tried in parts.asked] == [[], [MOVE], [], [MOVE]]
    assert [image for image, *_ in parts.edits] == [0.2, 0.2, 0.3, 0.3]
    assert trajectory.tried == [MOVE, "swap"]


def test_an_instruction_that_was_tried_is_sampled_again_with_another_seed():
    parts, trajectory = run([0.2, 0.1, 0.1], [MOVE, MOVE, MOVE, ADD], rounds=2)
    assert [instruction for _, instruction, _ in parts.edits] == [MOVE, ADD]
    assert len({seed for seed, _ in parts.asked}) == 4
    assert not any(step.repeated for step in trajectory.steps)


def test_an_actor_that_insists_edits_nothing_and_the_story_says_so():
    parts, trajectory = run([0.2, 0.1], [MOVE] * (1 + ATTEMPTS), rounds=2)
    assert len(parts.edits) == 1
    last = trajectory.steps[-1]
    assert (last.instruction, last.repeated, last.edited, last.image) == (MOVE, True, False, 0.2)
    assert trajectory.tried == [MOVE]  # not counted twice
    for step in trajectory.steps:
        step.image = render([])
    assert f"{MOVE} (image 0) (tried before: no edit)" in story(trajectory)


def test_only_those_that_repeat_are_sampled_again():
    parts = Script([0.2, 0.2, 0.1, 0.1, 0.1, 0.1], [MOVE, ADD, MOVE, MOVE, "swap"])
    first, second = Loop(parts, parts, parts, parts, 2).run([GRAPH, GRAPH], [7, 8])
    assert [step.instruction for step in first.steps] == [None, MOVE, "swap"]
    assert [step.instruction for step in second.steps] == [None, ADD, MOVE]
    assert len(parts.asked) == 5


def test_seeds_come_from_the_trajectory_alone():
    alone, _ = run([0.2, 0.1, 0.1], [MOVE, ADD], rounds=2)
    among = Script([0.2] * 3 + [0.1] * 6, [MOVE] * 3 + [ADD] * 3)
    Loop(among, among, among, among, 2).run([GRAPH] * 3, [5, 7, 9])
    assert alone.asked == among.asked[1::3]
    assert [seed for *_, seed in alone.edits] == [seed for *_, seed in among.edits[1::3]]


# ---- training ----


def states(start, outcome, instruction):
    """`next_states` of one group whose four samples are all alike."""
    after = State(GRAPH, "after", reflect(GRAPH, [outcome]))
    return next_states([start] * 4, [after] * 4, [instruction] * 4, 4, random.Random(0))


def test_a_sample_that_did_not_help_is_remembered():
    start = State(GRAPH, "before", reflect(GRAPH, [0.3]))
    (state,) = states(start, 0.3, MOVE)
    assert (state.image, state.tried) == ("before", (MOVE,))
    (state,) = states(state, 0.1, ADD)
    assert (state.image, state.tried) == ("before", (MOVE, ADD))
    (state,) = states(state, 0.1, MOVE)
    assert state.tried == (MOVE, ADD)  # once is enough
    (state,) = states(state, 0.4, MOVE)
    assert (state.image, state.tried) == ("after", ())  # a new image
    assert states(state, 0.9, MOVE) == []  # solved


def test_what_edits_nothing_was_not_tried():
    start = State(GRAPH, "before", reflect(GRAPH, [0.3]))
    for instruction in (None, "none"):
        assert states(start, 0.3, instruction) == [start]
