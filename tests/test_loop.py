"""loop.py: what a trajectory consists of, and the command line. The parts are scripted."""

import json
import shutil
import sys

import pytest
from conftest import ROOT
from PIL import Image
from scripted import GRAPH, MOVE, Script, move, run

import loop
from config import LoopConfig, load_config
from loop import build
from report import story
from sgiou import load_graphs


def numbers(trajectory):
    """Which edit each step shows: 0 is the generated image."""
    return [step.image.number for step in trajectory.steps]


def test_each_round_edits_the_image_and_checks_it_against_the_original_graph():
    (trajectory,), script = run({5: [0.1, 0.2, 0.3]}, rounds=2)
    assert numbers(trajectory) == [0, 1, 2]
    (generated,) = script.made("generate")
    assert (generated.prompts, generated.seeds) == (["red circle left of blue square"], [5])
    first, second = script.made("propose")
    assert first.prompts == second.prompts == ["red circle left of blue square"]
    assert (
        first.feedback == [trajectory.steps[0].reflection.feedback] and "wrong" in first.feedback[0]
    )
    assert [call.instructions for call in script.made("edit")] == [[move(1)], [move(2)]]
    assert [call.graphs for call in script.made("check")] == [[GRAPH]] * 3
    assert [step.source for step in trajectory.steps] == [None, 0, 1]
    assert [step.instruction for step in trajectory.steps] == [None, move(1), move(2)]
    assert [step.thought for step in trajectory.steps] == ["", "a thought", "a thought"]


def test_a_satisfied_checker_ends_it_at_once():
    (trajectory,), script = run({5: [0.5]})
    assert numbers(trajectory) == [0]
    assert not script.made("propose") and not script.made("edit")


def test_a_trajectory_stops_when_satisfied_and_others_go_on():
    trajectories, script = run({1: [0.1, 0.2, 0.3, 0.4], 2: [0.1, 0.7], 3: [0.9]})
    assert [numbers(t) for t in trajectories] == [[0, 1, 2, 3], [0, 1], [0]]
    assert [[image.seed for image in call.images] for call in script.made("propose")] == [
        [1, 2],
        [1],
        [1],
    ]


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_there_are_no_more_edits_than_rounds(rounds):
    (trajectory,), script = run({1: [0.1] * 9}, rounds)
    assert numbers(trajectory) == list(range(rounds + 1))
    assert len(script.made("edit")) == rounds


@pytest.mark.parametrize(
    ("scores", "best"),
    [([0.1, 0.4, 0.3, 0.2], 1), ([0.2, 0.4, 0.4, 0.1], 1), ([0.3, 0.3, 0.3, 0.3], 0)],
)
def test_the_answer_is_the_best_image_and_the_earliest_of_equals(scores, best):
    (trajectory,), _ = run({1: scores})
    assert trajectory.best_index == best and trajectory.best is trajectory.steps[best]


def test_an_edit_starts_from_the_best_image_so_far():
    (trajectory,), script = run({1: [0.1, 0.4, 0.3, 0.45, 0.2]}, rounds=4)
    best_so_far = [0, 1, 1, 3]
    assert [step.source for step in trajectory.steps] == [None, *best_so_far]
    sources = [[trajectory.steps[index].image] for index in best_so_far]
    assert [call.images for call in script.made("propose")] == sources
    assert [call.images for call in script.made("edit")] == sources


def test_malformed_and_none_edit_nothing():
    written = {1: [None, "none", MOVE], 2: [MOVE, None, "none"]}
    (first, second), script = run({1: [0.1] * 4, 2: [0.3, 0.4]}, instructions=written)
    assert [step.instruction for step in first.steps] == [None, None, "none", MOVE]
    assert [step.edited for step in first.steps] == [False, False, False, True]
    assert numbers(first) == [0, 0, 0, 3] and numbers(second) == [0, 1, 1, 1]
    assert first.steps[2].reflection is first.steps[0].reflection
    assert [step.source for step in second.steps] == [None, 0, 1, 1]
    assert [[i.seed for i in call.images] for call in script.made("edit")] == [[2], [1]]


def test_every_edit_has_a_seed_of_its_own():
    _, script = run({7: [0.1] * 4, 8: [0.1] * 4, 9: [0.1] * 4}, instructions={7: [None]})
    seeds = [seed for call in script.made("edit") for seed in call.seeds]
    assert len(seeds) == 8 and len({7, 8, 9, *seeds}) == 11
    asked = [seed for call in script.made("propose") for seed in call.seeds]
    assert len(asked) == len(set(asked)) == 9


def test_a_trajectory_has_the_same_seeds_alone_and_among_others():
    def seeds_of(prompt, scores):
        _, script = run(scores)
        calls = [*script.made("propose"), *script.made("edit")]
        return [
            seed
            for call in calls
            for image, seed in zip(call.images, call.seeds)
            if image.seed == prompt
        ]

    assert seeds_of(7, {7: [0.1] * 4}) == seeds_of(7, {5: [0.2] * 4, 7: [0.1] * 4, 9: [0.1, 0.9]})


def test_no_prompts_no_images():
    assert run({})[0] == []


# ---- no instruction is carried out twice on the same image ----


def test_the_actor_reads_what_was_tried_on_the_best_image():
    """Edits that do not help are remembered until a better image takes over."""
    (trajectory,), script = run({1: [0.2, 0.1, 0.3, 0.1, 0.1]}, rounds=4)
    tried = [call.tried for call in script.made("propose")]
    assert tried == [[[]], [[move(1)]], [[]], [[move(3)]]]
    assert trajectory.tried == [move(3), move(4)]


def test_an_instruction_that_was_tried_is_asked_for_again_with_other_seeds():
    written = {1: [MOVE, MOVE, MOVE, "swap"], 2: ["add", "remove"]}
    (first, second), script = run({1: [0.2, 0.1, 0.1], 2: [0.2, 0.1, 0.1]}, 2, written)
    assert [step.instruction for step in first.steps] == [None, MOVE, "swap"]
    assert [step.instruction for step in second.steps] == [None, "add", "remove"]
    calls = script.made("propose")
    assert [len(call.images) for call in calls] == [2, 2, 1, 1]  # only the one that repeats
    seeds = [seed for call in calls for seed in call.seeds]
    assert len(set(seeds)) == 6


def test_an_actor_that_insists_edits_nothing():
    (trajectory,), script = run({1: [0.2, 0.1]}, 2, {1: [MOVE] * (1 + loop.ATTEMPTS)})
    assert len(script.made("edit")) == 1
    last = trajectory.steps[-1]
    assert (last.instruction, last.repeated, last.edited) == (MOVE, True, False)
    assert last.image is trajectory.steps[0].image
    assert trajectory.tried == [MOVE]  # not counted twice
    assert "tried before: no edit" in story(trajectory)


# ---- the command line ----


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Runs loop.py with a script in place of the models; returns the output folder."""
    config = tmp_path / "config.yaml"
    parts = [
        f"{part}: {{model: {tmp_path}}}" for part in ("diffuser", "checker", "actor", "editor")
    ]
    config.write_text("\n".join([*parts, "relations: [left of, above]", "rounds: 2"]))
    out = tmp_path / "out"

    def run_program(script, *arguments):
        monkeypatch.setattr(loop, "build", lambda config: script.loop(config.rounds))
        monkeypatch.setattr(
            sys, "argv", ["loop.py", *arguments, "--config", str(config), "--out", str(out)]
        )
        loop.main()
        return out

    return run_program


def samples(out):
    return json.loads((out / "samples" / "0000.json").read_text())


def test_one_prompt(program, capsys):
    out = program(Script({4: [0.1, 0.2, 0.3]}), "red circle LEFT_OF blue square", "--seed", "4")
    printed = capsys.readouterr().out
    assert "red circle left of blue square" in printed and "image 2: score 0.30" in printed
    assert str(out / "strip.png") in printed and str(out / "report.html") in printed
    assert {path.name for path in out.glob("*.png")} == {"0.png", "1.png", "2.png", "strip.png"}
    assert Image.open(out / "0.png").size == (32, 32)
    (sample,) = samples(out)
    assert sample["seed"] == 4 and len(sample["steps"]) == 3  # the config's two rounds


@pytest.mark.parametrize(
    "words",
    [
        ["sun above sea", "rounds=1"],
        ["rounds=1", "sun above sea"],
        ["--seed", "0", "rounds=1", "--seed", "0", "sun above sea", "actor.temperature=0.5"],
    ],
)
def test_options_and_overrides_in_any_order(program, words):
    out = program(Script({0: [0.1] * 4}), *words)
    assert len(samples(out)[0]["steps"]) == 2


def test_a_file_of_prompts(program, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("sun above sea\n\n  tree left of house; moon\n")
    out = program(Script({0: [0.7], 1: [0.8]}), "--prompts", str(path))
    assert [s["prompt"] for s in samples(out)] == ["sun above sea", "tree left of house; moon"]
    assert [s["seed"] for s in samples(out)] == [0, 1]
    for folder in ("0000", "0001"):
        assert (out / folder / "strip.png").exists()


def test_a_prompt_that_the_diffuser_cannot_read_is_refused_before_anything_runs(program):
    script = Script({})
    with pytest.raises(SystemExit) as ended:
        program(script, "dog above sea")
    assert "too hard" in ended.value.code and "dog above sea" in ended.value.code
    assert script.calls == []


@pytest.mark.parametrize("words", [[], ["sun above sea", "--prompts", "x.txt"], ["a", "b"]])
def test_neither_or_more_than_one_prompt(program, words):
    with pytest.raises(SystemExit) as ended:
        program(Script({}), *words)
    assert ended.value.code == 2


# ---- the shipped models ----


def test_the_shipped_loop_ends_better_than_it_starts(shipped):
    graphs = load_graphs(ROOT / "tiny/data/val.json", limit=12)
    trajectories = shipped.run(graphs, list(range(12)))
    before = sum(t.steps[0].reflection.score for t in trajectories)
    assert sum(t.best.reflection.score for t in trajectories) > before + 0.5


def test_parts_with_the_same_model_share_its_weights(shipped):
    assert shipped.checker.model is shipped.actor.model
    assert shipped.diffuser.pipeline is shipped.editor.pipeline


@pytest.mark.parametrize("part, folder", [("actor", "phase1"), ("editor", "phase2")])
def test_an_adapter_with_a_flipped_bit_is_refused(part, folder, tmp_path, monkeypatch):
    """train.py writes SHA256SUMS beside every adapter, as `sha256sum` would."""
    monkeypatch.chdir(ROOT)
    copy = shutil.copytree(ROOT / "tiny/adapters" / folder, tmp_path / "adapter")
    config = load_config("eval.yaml", LoopConfig, [f"{part}.adapter={copy}"])
    assert getattr(build(config), part).has_adapter
    (path,) = copy.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"key '{part}.adapter'.*SHA256SUMS does not match"):
        build(config)
