"""eval.py: rows, columns, intervals and costs of the table; the two measurements of a VLM."""

import json
import math
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scripted import EDIT_SEEDS, GRAPH, MOVE, RIGHT, WRONG, Script, move

import eval
from checker import reflect
from loop import Loop, Step, Trajectory
from sgiou import SceneGraph, sg_iou
from tiny.world import Thing, kept_share, laion_entry, random_prompt, render

SETTINGS = SimpleNamespace(seed=10, exact=True, untrained_temperature=None)


class Flow(torch.nn.Module):
    """A flow model: what `Meter` counts."""

    def forward(self, hidden_states, encoder_hidden_states=None):
        return hidden_states


@pytest.fixture(autouse=True)
def measuring(monkeypatch):
    """The VLM's measurements, scripted: an image of a score from 0.5 on shows the whole graph."""

    def extract(vlm, images, graphs, relations=None):
        return [g if image.score >= 0.5 else SceneGraph((), ()) for image, g in zip(images, graphs)]

    real = eval.extract, eval.grade
    monkeypatch.setattr(eval, "extract", extract)
    monkeypatch.setattr(eval, "grade", lambda vlm, images, prompts: [i.score for i in images])
    return real


# ---- the rows ----

# A prompt's further images for `best of N` have its seed plus multiples of EDIT_SEEDS.
SCORES = {10: [0.1, 0.2, 0.9], 11: [0.3, 0.6], 12: [0.8], 13: [0.2, 0.1, 0.1, 0.1]}
SCORES |= {seed + EDIT_SEEDS * k: [0.15 + 0.1 * k] for seed in (10, 11, 13) for k in range(1, 9)}


def evaluated(rounds=3, **parts):
    """{name: row}"""
    script = Script(SCORES, {13: [None, "none", MOVE]}, Flow())
    actor, editor = parts.get("actor", script), parts.get("editor", script)
    loop = Loop(script, script, actor, editor, rounds)
    rows = []
    for _ in eval.evaluate(loop, [GRAPH] * 4, SETTINGS, ["left of"], script, rows):
        pass
    return {row.name: row for row in rows}


def test_rows():
    rows = evaluated()
    assert list(rows) == ["Diffuser", "loop", "best of 3"]
    scores = {name: row.values["checker"] for name, row in rows.items()}
    assert scores["Diffuser"] == pytest.approx([0.1, 0.3, 0.8, 0.2])
    assert scores["loop"] == pytest.approx([0.9, 0.6, 0.8, 0.2])
    assert scores["best of 3"] == pytest.approx([0.35, 0.35, 0.8, 0.35])
    assert rows["loop"].values["edits"] == [2, 1, 0, 1]
    for name, row in rows.items():
        right = [float(score >= 0.5) for score in scores[name]]
        assert row.values["sg_iou"] == row.values["vlm_sg_iou"] == right
        assert row.values["judge"] == pytest.approx(scores[name])


def test_best_of_n_costs_at_least_what_the_loop_costs_and_one_image_less_costs_less():
    """A generated image takes 36 tokens in the scripted flow model, an edit 42."""
    rows = evaluated()
    assert rows["Diffuser"].flow_tokens == 36
    assert rows["loop"].flow_tokens == 36 + 42  # 4 edits of 4 prompts
    # Prompt 12 is satisfied at once and gets no more images.
    assert rows["best of 3"].flow_tokens == 36 + 36 * 2 * 3 / 4
    assert rows["loop"].seconds > rows["Diffuser"].seconds > 0


@pytest.mark.parametrize(
    ("actor_has_adapter", "names"),
    [
        (True, ["loop", "loop + phase 1", "loop + phase 1 + 2"]),
        (False, ["loop", "loop + phase 2"]),
    ],
)
def test_every_adapter_adds_a_row(actor_has_adapter, names):
    actor, editor = Script(SCORES, transformer=Flow()), Script(SCORES, transformer=Flow())
    actor.has_adapter, editor.has_adapter = actor_has_adapter, True
    rows = evaluated(1, actor=actor, editor=editor)
    assert list(rows)[1:-1] == names
    # One round of each system, in this order.
    assert [call.adapter for call in actor.made("propose")] == ["phase 1" in n for n in names]
    assert [call.adapter for call in editor.made("edit")] == ["2" in n for n in names]


def test_the_untrained_actor_has_its_own_temperature():
    actor = Script(SCORES, transformer=Flow())
    actor.has_adapter = True
    loop = Loop(actor, actor, actor, actor)
    temperatures = {name: system.actor.temperature for name, system in eval.systems(loop, 0.5)}
    assert temperatures["loop"] == 0.5 and temperatures["loop + phase 1"] == 1.0


# ---- the columns ----


def test_meter_counts_the_tokens_of_all_models():
    flow, vlm = Flow(), Flow()
    vlm.forward = lambda input_ids: input_ids
    part = SimpleNamespace(pipeline=SimpleNamespace(transformer=flow), model=vlm)
    with eval.Meter(Loop(part, part, part, part)) as meter:  # a shared model is counted once
        flow(torch.zeros(3, 16, 8), encoder_hidden_states=torch.zeros(3, 20, 8))
        flow(hidden_states=torch.zeros(2, 32, 8), encoder_hidden_states=torch.zeros(2, 10, 8))
        flow(torch.zeros(5, 4, 6, 7))  # latents that are not packed, without text
        vlm(input_ids=torch.zeros(3, 50))  # padding included
        vlm(input_ids=torch.zeros(3, 1))
    flow(torch.zeros(1, 16, 8))  # not any more
    assert meter.flow_tokens == 3 * 36 + 2 * 42 + 5 * 42
    assert meter.vlm_tokens == 153


def edited(*scenes, sources=(0, 1)):
    """A trajectory of drawn images, each edited from the step that `sources` says."""
    images = [Image.fromarray(render(things)) for things in scenes]
    steps = [Step(images[0], reflect(GRAPH, [0] * 3))]
    for source, image in zip(sources, images[1:]):
        steps.append(Step(image, reflect(GRAPH, [0] * 3), source, "", MOVE))
    return Trajectory(GRAPH, 0, steps)


def test_kept_is_the_share_of_unnamed_things_that_stay_within_two_pixels():
    owl, fox = Thing("green circle", 9, 17), Thing("yellow square", 25, 25)
    before = [*WRONG, owl, fox]
    assert kept_share(edited(before, [*RIGHT, owl._replace(x=11, y=15), fox])) == 1
    assert kept_share(edited(before, [*RIGHT, owl._replace(x=12), fox])) == 0.5
    assert kept_share(edited(before, [*RIGHT, fox])) == 0.5
    # The second edit did not start from the first: the third image is compared with the first one.
    twice = [[*RIGHT, fox], [*RIGHT, owl, fox]]
    assert kept_share(edited(before, *twice, sources=(0, 0))) == 0.75
    assert kept_share(edited(before)) is None  # no edit


def test_prompts_without_relations_have_no_overlap_of_relations():
    alone, pair = SceneGraph(["sun"], ()), SceneGraph([], [("sun", "above", "sea")])
    found = eval.overlaps([alone, pair], [alone, pair])
    assert found == {"sg_iou": [None, 1], "entity_iou": [1, 1], "relation_iou": [None, 1]}


def test_a_vlm_extracts_and_grades(shipped, measuring):
    """12 random scenes, drawn exactly, each with a graph that is true of it."""
    extract, grade = measuring
    rng = random.Random(0)
    images, graphs = [], []
    for _ in range(12):
        things, triples = random_prompt(rng, 3, "val")
        graphs.append(SceneGraph([thing.name for thing in things], triples))
        images.append(Image.fromarray(render(things)))
    relations = ["left of", "right of", "above", "below"]
    seen = extract(shipped.checker, images, graphs, relations)
    scores = [sg_iou(*pair)["sg_iou"] for pair in zip(seen, graphs)]
    assert sum(scores) / len(scores) > 0.7, scores

    prompts = [graph.prompt() for graph in graphs]
    right = grade(shipped.checker, images, prompts)
    wrong = grade(shipped.checker, images[1:] + images[:1], prompts)
    assert all(0 <= score <= 1 for score in right + wrong)
    assert sum(right) > sum(wrong) + 1


def test_unreadable_answers_are_counted(shipped, measuring, monkeypatch, capsys):
    extract, _ = measuring
    answers = ["I see nothing.", "red circle left of blue square"]
    processor = type(shipped.checker.processor)
    monkeypatch.setattr(processor, "batch_decode", lambda *ids, **settings: answers)
    blank = Image.new("RGB", (32, 32))
    seen = extract(shipped.checker, [blank, blank], [GRAPH, GRAPH])
    assert [graph.triples for graph in seen] == [(), GRAPH.triples]
    assert "1 of 2 answers of the judge hold no scene graph" in capsys.readouterr().out


# ---- the intervals ----


def test_bootstrap_agrees_with_a_naive_one():
    """With Python's own generator, one resample at a time."""
    rng = random.Random(2)
    values = [rng.random() ** 3 for _ in range(60)]
    means = sorted(sum(rng.choices(values, k=60)) / 60 for _ in range(4000))
    mean, low, high = eval.bootstrap(values)
    assert mean == pytest.approx(sum(values) / 60)
    assert low == pytest.approx(means[100], abs=0.08 * (high - low))
    assert high == pytest.approx(means[3900], abs=0.08 * (high - low))


def test_bootstrap_of_paired_differences():
    rng = random.Random(4)
    luck = [rng.gauss(0, 10) for _ in range(40)]
    _, low, high = eval.bootstrap([value + rng.gauss(1, 0.1) for value in luck], luck)
    assert 0.9 < low < 1 < high < 1.1


def test_bootstrap_leaves_out_what_has_no_value():
    nan = math.nan
    assert eval.bootstrap([1.0, nan, 1.0]) == (1, 1, 1)
    assert eval.bootstrap([3.0, None, 5.0], [1.0, 1.0, nan]) == (2, 2, 2)
    assert all(map(math.isnan, eval.bootstrap([nan, None])))


# ---- the tables ----


def test_tables():
    base = eval.Row("Diffuser", {"vlm_sg_iou": [0.25] * 4, "kept": [None] * 4}, 288, 90, 1)
    values = {"vlm_sg_iou": [0.75] * 4, "kept": [None, 0.5, 1, None]}
    loop = eval.Row("loop", values, 1600, 2000, 2.5)
    trained = eval.Row("loop + phase 1", {"vlm_sg_iou": [0.5] * 4, "kept": [1] * 4}, 1600, 2000, 3)
    best = eval.Row("best of 3", {"vlm_sg_iou": [1.0] * 4, "kept": [None] * 4}, 864, 300, 3)
    means, gains, by_count = eval.tables([base, loop, trained, best], [3, 3, 4, 4], "me")
    names = ["Diffuser", "best of 3", "loop", "loop + phase 1"]  # the loops come last
    assert [row[0] for row in means["cells"][1:]] == names
    assert means["cells"][1] == ["Diffuser", "0.250", "–", "288", "90", "1.00"]
    assert means["cells"][3] == ["loop", "0.750", "0.750", "1,600", "2,000", "2.50"]
    gain, loss = "+0.500 [+0.500, +0.500]", "-0.250 [-0.250, -0.250]"
    assert gains["cells"][3] == ["loop", "0.750 [0.750, 0.750]", gain, loss, gain]
    assert gains["cells"][4][-1] == loss  # against the loop, whose row it adds to
    assert by_count["cells"][0] == ["", "3 (2 prompts)", "4 (2 prompts)"]
    assert by_count["cells"][3] == ["loop", "0.750", "0.750"]
    loss = "-0.500 [-0.500, -0.500]"
    assert by_count["cells"][5] == ["loop + phase 1 against best of 3", loss, loss]


# ---- the command line ----

CONFIG = """
diffuser: {model: MODEL}
checker: {model: MODEL}
actor: {model: MODEL}
editor: {model: MODEL}
relations: [left of, above]
rounds: 2
evaluation: {data: data.json, exact: true, limit: 3}
"""


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Runs eval.py on 5 prompts with a script in place of the models; returns the output folder."""
    entries = [laion_entry(number, GRAPH.triples) for number in range(5)]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    scores = {seed: [0.1, 0.9] for seed in range(5)}
    scores |= {seed + EDIT_SEEDS * k: [0.2] for seed in range(5) for k in range(1, 9)}
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(CONFIG.replace("MODEL", str(tmp_path)))

    def run_program(*arguments):
        script = Script(scores, transformer=Flow())
        monkeypatch.setattr(eval, "build", lambda config: script.loop(config.rounds))
        command = ["eval.py", *arguments, "--config", str(config), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", command)
        eval.main()
        return out

    return run_program


def results(out):
    return json.loads((out / "results.json").read_text())


def test_the_command_writes_table_results_and_page(program, capsys):
    out = program()
    table = (out / "table.md").read_text()
    printed = capsys.readouterr().out
    assert "evaluating 3 prompts of " in printed and table in printed  # 3: the limit
    assert [row["name"] for row in results(out)["rows"]] == ["Diffuser", "loop", "best of 3"]
    assert eval.markdown(results(out)["tables"]) == table
    assert "the columns (VLM) and Judge are by the Checker's own model:" in table
    for row in results(out)["rows"]:
        assert set(row["values"]) == set(eval.HEADINGS)
        assert all(len(column) == 3 for column in row["values"].values())
    # The page shows the trajectories of the last loop, not those of best of N.
    samples = json.loads((out / "samples" / "0000.json").read_text())
    assert [step["instruction"] for step in samples[0]["steps"]] == [None, move(1)]
    assert (out / "report.html").exists()


def test_full_takes_all_prompts_and_options_mix_with_overrides(program, capsys):
    program("evaluation.exact=false", "--full", "evaluation.seed=0")
    assert "evaluating 5 prompts of " in capsys.readouterr().out


def test_an_interrupted_evaluation_keeps_its_rows_and_can_be_resumed(program, monkeypatch):
    measure, measured = eval.measure, []

    def interrupted(*arguments):
        measured.append(arguments)
        if len(measured) == 2:
            raise RuntimeError("the power is gone")
        return measure(*arguments)

    monkeypatch.setattr(eval, "measure", interrupted)
    with pytest.raises(SystemExit, match="eval.py: the power is gone"):
        program("--resume")  # there is nothing to resume, so it begins
    with pytest.raises(SystemExit, match="is unfinished; add --resume"):
        program()
    out = program("--resume")
    assert [row["name"] for row in results(out)["rows"]] == ["Diffuser", "loop", "best of 3"]
    assert len(measured) == 4  # one row, the interruption, two more rows
    for words in (["--resume", "rounds=3"], ["rounds=3"]):
        changed = r"another config: rounds \(2 then, 3 now\); remove it, or set another --out"
        with pytest.raises(SystemExit, match=changed):
            program(*words)
    whole = json.dumps(results(out))
    for damage in (dict.clear, lambda values: values["checker"].pop()):
        damaged = json.loads(whole)
        damage(damaged["rows"][1]["values"])
        (out / "results.json").write_text(json.dumps(damaged))
        with pytest.raises(SystemExit, match="results.json: cannot be read .*; remove it"):
            program("--resume")


def test_another_vlm_can_measure(program, monkeypatch, tmp_path):
    """evaluation.judge: the loop's Checker scores, the judge measures."""
    judges = []
    loaded = SimpleNamespace(probe=lambda: None)
    monkeypatch.setattr(eval.Checker, "load", lambda *weights, **settings: loaded)
    monkeypatch.setattr(
        eval, "grade", lambda vlm, images, prompts: judges.append(vlm) or [0.0] * len(images)
    )
    with pytest.raises(SystemExit, match="key 'evaluation.judge.device': .*'tpu9'"):
        program(f"evaluation.judge={{model: {tmp_path}, device: tpu9}}")
    program(f"evaluation.judge={{model: {tmp_path}}}")
    assert judges and all(vlm is loaded for vlm in judges)


def test_an_evaluation_keeps_out_of_a_training_run(program, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit, match="--out: .* holds another run"):
        program()


def test_a_config_without_evaluation_is_refused(program):
    with pytest.raises(SystemExit, match="'evaluation' is missing"):
        program("evaluation=null")
