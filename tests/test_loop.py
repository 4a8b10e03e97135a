"""loop.py, report.py, eval.py and the model-free halves of checker.py and actor.py."""

import json
import math
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import eval
import loop
from actor import parse_completion, request
from checker import feedback, object_question, reflect
from loop import Loop, Step, Trajectory
from sgiou import SceneGraph, load_laion_sg
from story import story, strip, tell, write
from table import HEADINGS, bootstrap, table
from tiny.world import Thing, render

GRAPH = SceneGraph(["red circle", "blue square"], [("red circle", "left of", "blue square")])
RIGHT = [Thing("red circle", 1, 1), Thing("blue square", 17, 1)]
WRONG = [Thing("red circle", 17, 1), Thing("blue square", 1, 1)]
MOVE = "move the red circle left of the blue square"


class Script:
    """All four parts of a loop, played from a script; every call is recorded.

    Args:
        scores: seed -> the Checker's verdict (on all questions) on the generated picture, then on
            each round's edit; answers: seed -> the Actor's instructions, one a round.
    """

    def __init__(self, scores, answers=None, flow=None):
        self.scores = scores
        self.answers = answers or {}
        self.pipeline = SimpleNamespace(transformer=flow)
        self.misread = 0
        self.calls = []
        self.has_adapter = False
        self.use_adapter = True
        self.adapter_used = []  # at every call of `propose` or `edit`

    def picture(self, seed, number):
        score = self.scores[seed][number]
        image = Image.fromarray(render(RIGHT if score >= 0.5 else WRONG))
        image.key, image.score = (seed, number), score
        return image

    def generate(self, prompts, seeds):
        self.calls.append(("generate", prompts, seeds))
        if self.pipeline.transformer:
            self.pipeline.transformer(
                hidden_states=torch.zeros(len(seeds), 16, 4),
                encoder_hidden_states=torch.zeros(len(seeds), 20, 4),
            )
        return [self.picture(seed, 0) for seed in seeds]

    def check(self, images, graphs):
        self.calls.append(("check", images, graphs))
        return [
            reflect(graph, [image.score] * (len(graph.objects) + len(graph.triples)))
            for image, graph in zip(images, graphs, strict=True)
        ]

    def propose(self, images, graphs, reflections, n=1, seed=0):
        self.calls.append(("propose", images, graphs, reflections, seed))
        self.adapter_used.append(self.use_adapter)
        assert n == 1
        told = []
        for image in images:
            rounds = self.answers.get(image.key[0])
            told.append(rounds.pop(0) if rounds else MOVE)
        return SimpleNamespace(thoughts=["a thought"] * len(told), instructions=told)

    def edit(self, images, instructions, seeds):
        self.calls.append(("edit", images, instructions, seeds))
        self.adapter_used.append(self.use_adapter)
        if self.pipeline.transformer and images:
            self.pipeline.transformer(
                torch.zeros(len(seeds), 32, 4),
                encoder_hidden_states=torch.zeros(len(seeds), 10, 4),
            )
        first = [image.key[0] for image in images]
        return [self.picture(f, (seed - f) // 1_000_003) for f, seed in zip(first, seeds)]

    def extract(self, images, graphs):
        return [g if i.score >= 0.5 else SceneGraph((), ()) for i, g in zip(images, graphs)]

    def judge(self, images, prompts):
        return [image.score for image in images]

    def made(self, kind):
        """The recorded calls of one kind that had something to do."""
        return [call[1:] for call in self.calls if call[0] == kind and call[1]]


def run(scores, rounds=3, answers=None):
    """Runs a loop over a script: (trajectories, script)."""
    script = Script(scores, answers)
    composed = Loop(script, script, script, script, rounds)
    return composed.run([GRAPH] * len(scores), list(scores)), script


def shown(trajectory):
    return [step.image.key[1] for step in trajectory.steps]


# ---- the loop ----


def test_a_satisfied_checker_ends_it_at_once():
    (trajectory,), script = run({5: [0.5]})
    assert shown(trajectory) == [0] and trajectory.best is trajectory.steps[0]
    assert trajectory.steps[0].instruction is None
    assert not script.made("propose") and not script.made("edit")
    assert script.made("generate") == [(["red circle left of blue square"], [5])]


def test_it_stops_when_satisfied_and_others_go_on():
    scores = {1: [0.1, 0.2, 0.3, 0.4], 2: [0.1, 0.7], 3: [0.9]}
    trajectories, script = run(scores)
    assert [shown(t) for t in trajectories] == [[0, 1, 2, 3], [0, 1], [0]]
    assert [t.best.image.score for t in trajectories] == [0.4, 0.7, 0.9]
    asked = [[image.key for image in call[0]] for call in script.made("propose")]
    assert asked == [[(1, 0), (2, 0)], [(1, 1)], [(1, 2)]]


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_rounds_are_respected(rounds):
    (trajectory,), script = run({1: [0.1] * 9}, rounds)
    assert shown(trajectory) == list(range(rounds + 1))
    assert len(script.made("propose")) == len(script.made("edit")) == rounds


@pytest.mark.parametrize(
    ("scores", "best"),
    [([0.1, 0.4, 0.3, 0.2], 1), ([0.2, 0.4, 0.4, 0.1], 1), ([0.3, 0.3, 0.3, 0.3], 0)],
)
def test_the_answer_is_the_best_and_the_earliest_of_equals(scores, best):
    (trajectory,), _ = run({1: scores})
    assert trajectory.best is trajectory.steps[best]
    assert tell(trajectory)["best"] == best


def test_every_part_gets_the_best_picture_so_far_and_the_original_graph():
    (trajectory,), script = run({1: [0.1, 0.4, 0.3, 0.45, 0.2]}, rounds=4)
    steps = trajectory.steps
    best_so_far = [0, 1, 1, 3]
    assert [trajectory.source(number) for number in (1, 2, 3, 4)] == best_so_far
    for number, (images, graphs, reflections, _) in zip(best_so_far, script.made("propose")):
        assert images == [steps[number].image] and graphs == [GRAPH]
        assert reflections == [steps[number].reflection]
    for number, (images, instructions, _) in zip(best_so_far, script.made("edit")):
        assert images == [steps[number].image] and instructions == [MOVE]
    assert [call[0][0].key[1] for call in script.made("check")] == [0, 1, 2, 3, 4]
    assert all(call[1] == [GRAPH] for call in script.made("check"))
    assert [step.instruction for step in steps] == [MOVE] * 4 + [None]
    assert [step.thought for step in steps] == ["a thought"] * 4 + [""]
    assert [step["source"] for step in tell(trajectory)["steps"][:-1]] == best_so_far
    assert re.findall(r"edits: +(.*)", story(trajectory)) == [MOVE, MOVE, f"{MOVE} (image 1)", MOVE]


def test_malformed_and_none_edit_nothing():
    answers = {1: [None, "none", MOVE], 2: [MOVE, None, "none"]}
    (first, second), script = run({1: [0.1] * 4, 2: [0.3, 0.4]}, answers=answers)
    assert [step.instruction for step in first.steps] == [None, "none", MOVE, None]
    assert shown(first) == [0, 0, 0, 3] and shown(second) == [0, 1, 1, 1]
    for before, after in ((first.steps[0], first.steps[2]), (second.steps[1], second.steps[3])):
        assert after.image is before.image and after.reflection is before.reflection
    edited = [[image.key for image in call[0]] for call in script.made("edit")]
    assert edited == [[(2, 0)], [(1, 0)]]
    assert [len(call[0]) for call in script.made("check")] == [2, 1, 1]


def test_every_edit_has_its_own_seed():
    answers = {7: [None, MOVE, MOVE]}
    _, script = run({7: [0.1] * 4, 8: [0.1] * 4, 9: [0.1] * 4}, answers=answers)
    edits = [seed for call in script.made("edit") for seed in call[2]]
    assert len(edits) == 8
    assert len(set(edits) | {7, 8, 9}) == 11
    draws = [call[3] for call in script.made("propose")]
    assert len(set(draws)) == 3


def test_a_run_can_be_repeated():
    def seeds():
        _, script = run({3: [0.1] * 4, 4: [0.2] * 4})
        return [call[-1] for kind in ("generate", "edit", "propose") for call in script.made(kind)]

    assert seeds() == seeds()


def test_advance_leaves_the_satisfied_alone():
    trajectories, script = run({1: [0.8], 2: [0.6]}, rounds=0)
    before = [list(t.steps) for t in trajectories]
    script.calls.clear()
    Loop(script, script, script, script).advance(trajectories)
    assert [t.steps for t in trajectories] == before and script.calls == []


def test_no_prompts_no_pictures():
    trajectories, _ = run({})
    assert trajectories == []


# ---- report ----


@pytest.fixture
def trajectory():
    answers = {1: [None, MOVE, "none"]}
    (made,), _ = run({1: [0.1, 0.1, 0.4, 0.3]}, answers=answers)
    return made


def test_tell(trajectory):
    told = json.loads(json.dumps(tell(trajectory)))
    assert told["prompt"] == "red circle left of blue square" and told["seed"] == 1
    assert told["best"] == 2 and len(told["steps"]) == 4
    assert dict(told["steps"][2]["verdicts"]) == {
        "red circle": 0.4,
        "blue square": 0.4,
        "red circle left of blue square": 0.4,
    }
    assert [step["instruction"] for step in told["steps"]] == [None, MOVE, "none", None]
    assert [step["score"] for step in told["steps"]] == [0.1, 0.1, 0.4, 0.4]


def test_story(trajectory):
    text = story(trajectory)
    marked = [line for line in text.splitlines() if "best" in line]
    assert len(marked) == 1 and "image 2" in marked[0] and "0.40" in marked[0]
    assert text.count("thinks: a thought") == 3
    edits = ["(malformed: nothing is edited)", f"{MOVE} (image 0)", "none"]
    assert re.findall(r"edits: +(.*)", text) == edits
    assert text.splitlines()[0] == "red circle left of blue square"


def test_a_story_tells_every_verdict_of_twins():
    graph = SceneGraph(["man", "man", "dog"], [("man", "near", "dog"), ("man", "near", "dog")])
    image = Image.new("RGB", (8, 8))
    twins = Trajectory(graph, 0, [Step(image, reflect(graph, [0.5, 0.2, 0.8, 0.1, 0.7]))])
    verdicts = re.findall(r"^ +(yes|no) +(\d+)%", story(twins), re.MULTILINE)
    assert verdicts == [("yes", "50"), ("no", "20"), ("yes", "80"), ("no", "10"), ("yes", "70")]


@pytest.mark.parametrize(("size", "side"), [(32, 224), (32, 64), (300, 224)])
def test_strip(trajectory, size, side):
    for step in trajectory.steps:
        step.image = step.image.resize((size, size))
    canvas = strip(trajectory, side) if side != 224 else strip(trajectory)
    assert canvas.size == (4 * (side + 12) + 12, side + 72 + 2 * 12)
    pixels = np.asarray(canvas)
    red = [0xC5, 0x22, 0x1F]
    for number in range(4):
        left = 12 + number * (side + 12)
        assert (pixels[side, left + side // 2] == [245, 245, 245]).all()  # the picture's ground
        assert (pixels[40, left - 3] == red).all()  # a frame around every picture
        assert (pixels[40, left - 1] == red).all() == (number == 2)  # a thick one: the best


def test_a_satisfied_picture_has_a_frame_of_another_colour():
    (trajectory,), _ = run({1: [0.1, 0.9]})
    pixels = np.asarray(strip(trajectory))
    assert (pixels[40, 12 + 236 - 3] == [0x18, 0x80, 0x38]).all()
    assert (pixels[40, 12 - 3] == [0xC5, 0x22, 0x1F]).all()


# ---- loop.py as a program ----


def test_write(trajectory, tmp_path):
    folder = tmp_path / "new" / "folder"
    write(trajectory, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["image_0.png", "image_1.png", "image_2.png", "image_3.png"]
        + ["strip.png", "story.json", "story.txt"]
    )
    for number, step in enumerate(trajectory.steps):
        with Image.open(folder / f"image_{number}.png") as image:
            assert image.tobytes() == step.image.tobytes()
    assert json.loads((folder / "story.json").read_text()) == json.loads(
        json.dumps(tell(trajectory))
    )
    assert (folder / "story.txt").read_text() == story(trajectory) + "\n"
    with Image.open(folder / "strip.png") as image:
        assert image.size == strip(trajectory).size


def test_write_leaves_other_files_alone(trajectory, tmp_path):
    """Pictures of a longer story that stood there go; what nobody here wrote stays."""
    (tmp_path / "image_7.png").write_bytes(b"mine")
    write(trajectory, tmp_path)
    assert (tmp_path / "image_7.png").exists()
    (tmp_path / "image_holiday.png").write_bytes(b"mine")
    trajectory.steps = trajectory.steps[:2]
    write(trajectory, tmp_path)
    left = sorted(path.name for path in tmp_path.glob("image_*.png"))
    assert left == ["image_0.png", "image_1.png", "image_holiday.png"]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    parts = "".join(
        f"{p}: {{model: {tmp_path}}}\n" for p in "diffuser checker actor editor".split()
    )
    path.write_text(
        f"{parts}relations: [left of, above]\nrounds: 2\n"
        f"evaluation: {{data: {tmp_path / 'data.json'}, exact: true, limit: 3}}\n"
    )
    return path


@pytest.fixture
def program(monkeypatch, config_file, tmp_path):
    """Runs loop.py or eval.py with a script in the place of the models; returns what it wrote."""

    def run_program(module, script, *arguments):
        def build(config):
            return Loop(script, script, script, script, config.rounds)

        script.problem = lambda prompt: "too hard" if "dog" in prompt else None
        script.readable = lambda graphs, path: graphs
        monkeypatch.setattr(module, "build", build)
        out = tmp_path / "out"
        command = [f"{module.__name__}.py", *arguments]
        command += ["--config", str(config_file), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", command)
        module.main()
        return out

    return run_program


def test_one_prompt(program, capsys):
    script = Script({4: [0.1, 0.2, 0.3, 0.4, 0.5]})
    out = program(loop, script, "red circle LEFT_OF blue square", "--seed", "4")
    told = json.loads((out / "story.json").read_text())
    assert told["seed"] == 4 and len(told["steps"]) == 3  # the config's two rounds
    told = capsys.readouterr().out
    assert "image 2: score 0.30  <- best" in told and str(out / "report.html") in told
    assert "--seed 4" in (out / "report.html").read_text()  # the command that made it
    assert script.made("check")[0][1][0].triples == (("red circle", "left of", "blue square"),)


def test_rounds_on_the_command_line(program):
    for rounds in (0, 1):
        for words in (["--rounds", str(rounds)], [f"rounds={rounds}"]):
            out = program(loop, Script({0: [0.1] * 4}), "sun above sea", *words)
            assert len(json.loads((out / "story.json").read_text())["steps"]) == rounds + 1


def test_many_prompts(program, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("sun above sea\n\n  tree left of house; moon\n")
    out = program(loop, Script({0: [0.7], 1: [0.8]}), "--prompts", str(path))
    prompts = [json.loads((out / n / "story.json").read_text())["prompt"] for n in ("0000", "0001")]
    assert prompts == ["sun above sea", "tree left of house; moon"]
    page = (out / "report.html").read_text()
    assert all(f"<h3>{prompt}</h3>" in page for prompt in prompts)


def test_what_the_diffuser_cannot_read_is_told_before_anything_runs(program):
    script = Script({})
    with pytest.raises(SystemExit) as caught:
        program(loop, script, "dog above sea")
    assert "too hard" in str(caught.value) and "dog above sea" in str(caught.value)
    assert script.calls == []


def test_neither_or_both_prompts(program):
    for arguments in ([], ["sun above sea", "--prompts", "x.txt"]):
        with pytest.raises(SystemExit) as caught:
            program(loop, Script({}), *arguments)
        assert caught.value.code == 2


# ---- checker.py and actor.py without a model ----

THREE = SceneGraph(
    ["red circle", "blue square", "owl"],
    [("red circle", "left of", "blue square"), ("owl", "above", "red circle")],
)


def test_score_and_feedback_by_hand():
    reflection = reflect(THREE, [0.9, 0.3, 0.6, 0.2, 0.5])
    assert reflection.score == pytest.approx((0.6 + 0.35) / 2)
    assert reflection.probs == (0.9, 0.3, 0.6, 0.2, 0.5)
    assert reflection.feedback == "missing: blue square. wrong: red circle left of blue square"
    assert not reflection.satisfied


def test_objects_alone_make_the_score():
    alone = SceneGraph(["red circle", "blue square"], [])
    assert reflect(alone, [0.9, 0.3]).score == pytest.approx(0.6)


def test_a_half_is_enough():
    reflection = reflect(THREE, [0.5] * 5)
    assert reflection.satisfied and reflection.feedback == "" and reflection.score == 0.5
    assert not reflect(THREE, [1, 1, 1, 1, 0.4999]).satisfied


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_feedback_is_empty_exactly_when_satisfied(probs):
    reflection = reflect(THREE, probs)
    assert (reflection.feedback == "") == reflection.satisfied
    assert 0 <= reflection.score <= 1
    for name, prob in zip(THREE.objects, probs):
        listed = reflection.feedback.partition("wrong: ")[0]
        assert (name in listed) == (prob < 0.5)


def test_the_words_between_the_parts():
    assert feedback(THREE, [0, 1, 0, 0, 0]) == (
        "missing: red circle, owl. wrong: red circle left of blue square; owl above red circle"
    )
    assert object_question("red circle") == 'Does the image show "red circle"?'
    prompt = GRAPH.prompt()
    assert request(prompt, "") == "Prompt: red circle left of blue square. nothing is wrong."
    assert request(prompt, "missing: owl").endswith("blue square. missing: owl.")
    tried = ("remove the owl", "move the red circle left of the blue square")
    assert request(prompt, "missing: owl", tried).endswith(
        "missing: owl. Tried without success: remove the owl; "
        "move the red circle left of the blue square."
    )


@pytest.mark.parametrize(
    ("text", "thought", "instruction"),
    [
        ("<think>a</think><edit>b</edit>", "a", "b"),
        (" <think> a\nb </think>\n\n<edit>\n move  the\tcup </edit>\n", "a\nb", "move the cup"),
        ("<think></think><edit>none</edit>", "", "none"),
        ("<think>a</think><edit> none </edit>", "a", "none"),
        ("<think>a</think><edit>None.</edit>", "a", "none"),
    ],
)
def test_well_formed_completions(text, thought, instruction):
    assert parse_completion(text) == (thought, instruction)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "move the cup",
        "<edit>b</edit>",
        "<think>a</think>",
        "<think>a</think><edit></edit>",
        "<think>a</think><edit> \n </edit>",
        "<think>a</think><edit>b",
        "<think>a<edit>b</edit>",
        "<edit>b</edit><think>a</think>",
        "Sure! <think>a</think><edit>b</edit>",
        "<think>a</think> so <edit>b</edit>",
        "<think>a</think><edit>b</edit> done",
        "<think>a</think><edit>b</edit><edit>c</edit>",
        "<think>a</think><think>b</think><edit>c</edit>",
        "<think>a</think><edit>b</think></edit>",
        "<think>a<b</think><edit>c</edit>",
        "<THINK>a</THINK><EDIT>b</EDIT>",
    ],
)
def test_malformed_completions(text):
    assert parse_completion(text) == (text.strip(), None)


tags = st.sampled_from(["<think>", "</think>", "<edit>", "</edit>", "a", " ", "\n", "<", "none"])


@settings(max_examples=300, deadline=None)
@given(st.text() | st.lists(tags, max_size=8).map("".join))
def test_any_completion_parses(text):
    thought, instruction = parse_completion(text)
    assert isinstance(thought, str)
    if instruction is not None:
        assert instruction == " ".join(instruction.split()) != ""
        assert "<" not in instruction + thought
        assert instruction in " ".join(text.split())
        assert text.strip().startswith("<think>") and text.strip().endswith("</edit>")


# ---- eval.py ----


def naive_bootstrap(values, resamples=4000):
    """Percentile bootstrap with Python's own generator, one draw at a time."""
    rng = random.Random(1)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(resamples))
    return means[int(0.025 * resamples)], means[int(0.975 * resamples)]


def test_bootstrap_against_a_naive_one():
    rng = random.Random(2)
    values = [rng.random() ** 3 for _ in range(60)]
    mean, low, high = bootstrap(values)
    naive_low, naive_high = naive_bootstrap(values)
    assert mean == pytest.approx(sum(values) / 60)
    assert low == pytest.approx(naive_low, abs=0.08 * (high - low))
    assert high == pytest.approx(naive_high, abs=0.08 * (high - low))


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        _, low, high = bootstrap(rng.normal(0.3, 1.0, 60).tolist())
        hits += low <= 0.3 <= high
    assert 0.89 <= hits / 200 <= 0.985


def test_bootstrap_pairs():
    rng = random.Random(4)
    luck = [rng.gauss(0, 10) for _ in range(40)]
    better = [value + 1 + rng.gauss(0, 0.1) for value in luck]
    mean, low, high = bootstrap(better, luck)
    assert 0.9 < low < mean < high < 1.1
    assert bootstrap(luck, luck) == (0, 0, 0)


def test_bootstrap_leaves_out_what_has_no_value():
    nan = math.nan
    assert bootstrap([1.0, nan, 1.0]) == (1, 1, 1)
    assert bootstrap([3.0, nan, 5.0], [1.0, 1.0, nan]) == (2, 2, 2)
    assert all(math.isnan(number) for number in bootstrap([nan, nan]))
    assert all(math.isnan(number) for number in bootstrap([]))


class Flow(torch.nn.Module):
    def forward(self, hidden_states, encoder_hidden_states=None):
        return hidden_states


def two_parts(first, second):
    def part(flow):
        return SimpleNamespace(pipeline=SimpleNamespace(transformer=flow))

    return SimpleNamespace(diffuser=part(first), editor=part(second))


def test_flow_meter_counts_evaluations_and_tokens():
    flow = Flow()
    with eval.FlowMeter(two_parts(flow, flow)) as meter:  # shared: counted once
        flow(torch.zeros(3, 16, 8), encoder_hidden_states=torch.zeros(3, 20, 8))
        flow(hidden_states=torch.zeros(2, 32, 8), encoder_hidden_states=torch.zeros(2, 10, 8))
        flow(torch.zeros(5, 4, 6, 7))  # unpacked latents, no text
    assert meter.evaluations == 3 + 2 + 5
    assert meter.tokens == 3 * 36 + 2 * 42 + 5 * 42
    assert meter.seconds >= 0
    flow(torch.zeros(1, 16, 8))
    assert meter.evaluations == 10 and not flow._forward_pre_hooks


def test_flow_meter_counts_both_models_and_lets_go_on_an_error():
    first, second = Flow(), Flow()
    with pytest.raises(KeyError), eval.FlowMeter(two_parts(first, second)) as meter:
        first(torch.zeros(1, 16, 8))
        second(torch.zeros(1, 32, 8))
        raise KeyError
    assert (meter.evaluations, meter.tokens) == (2, 48)
    assert not first._forward_pre_hooks and not second._forward_pre_hooks


def edited(*scenes, instruction=MOVE):
    """A trajectory of drawn pictures, one edit between each."""
    steps = [
        Step(Image.fromarray(render(things)), reflect(GRAPH, [number / 10] * 3), "", instruction)
        for number, things in enumerate(scenes)
    ]
    steps[-1].instruction = None
    return Trajectory(GRAPH, 0, steps)


def test_kept_share_by_hand():
    owl, fox = Thing("green circle", 9, 17), Thing("yellow square", 25, 25)
    scene = [*WRONG, owl, fox]
    near, far = owl._replace(x=11, y=15), owl._replace(x=12)
    assert eval.kept_share(edited(scene, [*RIGHT, owl, fox])) == 1
    assert eval.kept_share(edited(scene, [*RIGHT, near, fox])) == 1
    assert eval.kept_share(edited(scene, [*RIGHT, far, fox])) == 0.5
    assert eval.kept_share(edited(scene, [*RIGHT, fox])) == 0.5
    assert eval.kept_share(edited(scene, [*RIGHT, owl._replace(name="red square"), fox])) == 0.5
    assert eval.kept_share(edited(scene, RIGHT)) == 0
    assert eval.kept_share(edited(scene, [*RIGHT, owl, fox], [*RIGHT, fox])) == 0.75
    # An edit that did harm is not built upon: the third picture is compared with the first.
    back = edited(scene, [*RIGHT, fox], [*RIGHT, owl, fox])
    back.steps[1].reflection = reflect(GRAPH, [0.0] * 3)
    assert eval.kept_share(back) == 0.75


def test_kept_share_needs_an_edit():
    owl = Thing("green circle", 9, 17)
    for instruction in (None, "none"):
        same = edited([*WRONG, owl], [*WRONG, owl], instruction=instruction)
        assert math.isnan(eval.kept_share(same))
    assert math.isnan(eval.kept_share(edited(WRONG)))
    assert math.isnan(eval.kept_share(edited(WRONG, RIGHT)))  # both things are named


def test_best_of_stops_as_the_loop_does():
    """A picture that satisfies and scores lower than one that does not ends neither."""

    def uneven(image, graph):
        return reflect(graph, [1.0, 1.0, 0.4] if image.key[0] == 1 else [image.score] * 3)

    script = Script({1: [0.8, 0.6, 0.6, 0.6], **{1 + n * 1_000_003: [0.6] for n in range(1, 4)}})
    script.check = lambda images, graphs: [uneven(*pair) for pair in zip(images, graphs)]
    composed = Loop(script, script, script, script)
    first = composed.start([GRAPH], [1])
    assert not first[0].best.reflection.satisfied
    assert len(eval.best_of(composed, first, 4)[0].steps) == 4
    (trajectory,) = composed.run([GRAPH], [1])
    assert len(trajectory.steps) == 4


def test_best_of_stops_early_and_leaves_the_start_alone():
    far = 1_000_003
    script = Script(
        {1: [0.2], 1 + far: [0.4], 1 + 2 * far: [0.3], 2: [0.1], 2 + far: [0.6], 3: [0.9]}
    )
    composed = Loop(script, script, script, script)
    first = composed.start([GRAPH] * 3, [1, 2, 3])
    sampled = eval.best_of(composed, first, 3)
    assert [[s.reflection.score for s in t.steps] for t in sampled] == [
        pytest.approx([0.2, 0.4, 0.3]),
        pytest.approx([0.1, 0.6]),
        pytest.approx([0.9]),
    ]
    assert [t.best.reflection.score for t in sampled] == pytest.approx([0.4, 0.6, 0.9])
    assert all(len(t.steps) == 1 for t in first)
    calls = len(script.calls)
    assert [len(t.steps) for t in eval.best_of(composed, first, 1)] == [1, 1, 1]
    assert len(script.calls) == calls


FAR = 1_000_003
SCORES = {10: [0.1, 0.2, 0.9], 11: [0.3, 0.6], 12: [0.8], 13: [0.2, 0.1, 0.1, 0.1]}
SCORES |= {seed + FAR * k: [0.15 + 0.1 * k] for seed in (10, 11, 13) for k in range(1, 9)}


def evaluated(rounds):
    flow = Flow()
    script = Script(SCORES, {13: [None, "none", MOVE]}, flow)
    composed = Loop(script, script, script, script, rounds)
    names = []
    rows, last = eval.evaluate(composed, [GRAPH] * 4, 10, True, names.append)
    assert rows[-1].values["checker"] == [t.best.reflection.score for t in last]
    assert sorted(names) == sorted(row.name for row in rows)
    return {row.name: row for row in rows}


def test_rows():
    rows = evaluated(rounds=3)
    # 36 tokens a picture, 42 an edit: (36 + 3 * 42) / 36 = 4.5 pictures.
    assert list(rows) == ["Diffuser", "best of 5", "1 round", "loop"]
    assert [row.builds_on for row in rows.values()] == [
        None,
        "Diffuser",
        "Diffuser",
        "1 round",
    ]
    scores = {name: row.values["checker"] for name, row in rows.items()}
    assert scores["Diffuser"] == pytest.approx([0.1, 0.3, 0.8, 0.2])
    assert scores["1 round"] == pytest.approx([0.2, 0.6, 0.8, 0.2])
    assert scores["loop"] == pytest.approx([0.9, 0.6, 0.8, 0.2])
    assert scores["best of 5"] == pytest.approx([0.55, 0.55, 0.8, 0.55])
    assert rows["1 round"].values["edits"] == [1, 1, 0, 0]
    assert rows["loop"].values["edits"] == [2, 1, 0, 1]
    assert rows["Diffuser"].values["edits"] == rows["best of 5"].values["edits"] == [0] * 4
    for name, row in rows.items():
        right = [float(score >= 0.5) for score in scores[name]]
        assert row.values["sg_iou"] == row.values["vlm_sg_iou"] == right
        assert row.values["judge"] == pytest.approx(scores[name])
        assert row.values["entity_iou"] == [1.0] * 4
        assert all(map(math.isnan, row.values["kept"]))


def test_compute_is_counted():
    rows = evaluated(rounds=3)
    assert rows["Diffuser"].evaluations == 1 and rows["Diffuser"].tokens == 36
    assert rows["1 round"].evaluations == (4 + 2) / 4
    assert rows["loop"].evaluations == (4 + 4) / 4
    assert rows["loop"].tokens == (4 * 36 + 4 * 42) / 4
    assert rows["best of 5"].evaluations == (4 + 3 * 4) / 4
    assert rows["loop"].seconds >= rows["1 round"].seconds > 0


@pytest.mark.parametrize(
    ("actor_has", "editor_has", "suffixes"),
    [
        (True, False, ["", " + phase 1"]),
        (True, True, ["", " + phase 1", " + phase 1 + 2"]),
        (False, True, ["", " + phase 2"]),
    ],
)
def test_trained_adapters_have_rows_of_their_own(actor_has, editor_has, suffixes):
    flow = Flow()
    actor, editor, others = (Script(SCORES, flow=flow) for _ in range(3))
    actor.has_adapter, editor.has_adapter = actor_has, editor_has
    composed = Loop(others, others, actor, editor, 2)
    rows, _ = eval.evaluate(composed, [GRAPH] * 4, 10, True, lambda name: None)
    names = [f"{kind}{suffix}" for suffix in suffixes for kind in ("1 round", "loop")]
    assert [row.name for row in rows[2:]] == names
    bases = {row.name: row.builds_on for row in rows}
    assert bases["1 round"] == "Diffuser" and bases["loop"] == "1 round"
    for earlier, later in zip(suffixes, suffixes[1:]):
        assert bases[f"1 round{later}"] == f"1 round{earlier}"
        assert bases[f"loop{later}"] == f"loop{earlier}"
    # Two rounds of each system, in this order.
    assert actor.adapter_used == ["phase" in suffix for suffix in suffixes for _ in "12"]
    assert editor.adapter_used == ["2" in suffix for suffix in suffixes for _ in "12"]
    assert len({str(row.values) for row in rows if row.name.startswith("loop")}) == 1


def test_with_one_round_the_full_loop_is_the_one_round_loop():
    rows = evaluated(rounds=1)
    one, full = rows["1 round"], rows["loop"]
    assert str(one.values) == str(full.values)
    assert (one.evaluations, one.tokens) == (full.evaluations, full.tokens)


def test_the_start_is_shared_and_not_changed():
    rows = evaluated(rounds=3)
    again = evaluated(rounds=1)
    assert str(rows["Diffuser"].values) == str(again["Diffuser"].values)
    assert str(rows["1 round"].values) == str(again["1 round"].values)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table():
    base = eval.Row("Diffuser", {"vlm_sg_iou": [0.25] * 4, "kept": [math.nan] * 4}, None, 8, 288, 1)
    better = eval.Row(
        "1 round",
        {"vlm_sg_iou": [0.75] * 4, "kept": [math.nan, 0.5, 1, math.nan]},
        "Diffuser",
        16,
        600,
        2.5,
    )
    values = {"vlm_sg_iou": [1.0] * 4, "kept": [math.nan] * 4}
    best = eval.Row("best of 3", values, "Diffuser", 24, 864, 3)
    lines = table([base, best, better]).splitlines()
    costs = ["flow evals", "flow tokens", "s/prompt"]
    assert cells(lines[0]) == ["", "SG-IoU (VLM)", "Kept", *costs]
    assert lines[1].count("---") == 6 and lines[1].count("|") == lines[0].count("|")
    assert cells(lines[2]) == ["Diffuser", "0.250", "–", "8.0", "288", "1.00"]
    assert cells(lines[4]) == ["1 round", "0.750", "0.750", "16.0", "600", "2.50"]
    heads = ["against Diffuser", "against best of 3", "against the row it builds on"]
    assert cells(lines[-5]) == ["", "mean", *heads]
    assert cells(lines[-3]) == [
        "Diffuser",
        "0.250 [0.250, 0.250]",
        "–",
        "-0.750 [-0.750, -0.750]",
        "–",
    ]
    gain, loss = "+0.500 [+0.500, +0.500]", "-0.250 [-0.250, -0.250]"
    assert cells(lines[-1]) == ["1 round", "0.750 [0.750, 0.750]", gain, loss, gain]


def no_constant(name):
    raise ValueError(f"{name} is no JSON")


def test_eval_writes_its_table_and_results(program, tmp_path, capsys):
    from tiny.world import laion_entry

    entries = [laion_entry(number, GRAPH.triples) for number in range(5)]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    scores = {seed: [0.1, 0.9] for seed in range(3)}
    scores |= {seed + FAR * k: [0.2] for seed in range(3) for k in range(1, 9)}
    out = program(eval, Script(scores, flow=Flow()))
    text = (out / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert page.count("<th>loop</th>") == 2 and page.count("<article") == 3
    results = json.loads((out / "results.json").read_text(), parse_constant=no_constant)
    assert [result["name"] for result in results] == [
        "Diffuser",
        "best of 4",
        "1 round",
        "loop",
    ]
    for result in results:
        assert set(result["values"]) == set(HEADINGS)
        assert all(len(column) == 3 for column in result["values"].values())  # the limit
    assert len(load_laion_sg(tmp_path / "data.json")) == 5
