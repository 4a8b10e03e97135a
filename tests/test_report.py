"""report.py: the page of a run, the story and the strip of a trajectory."""

import contextlib
import html
import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image

import report
from sgiou import SceneGraph

GRAPH = SceneGraph(["red circle", "blue square"], [("red circle", "left of", "blue square")])
EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(2)>&amp;'
MOVE = "move the red circle"


def trajectory(scores, graph=GRAPH, thought="a thought", edits=(MOVE,) * 3, size=(32, 32), seed=0):
    """One image per score, which is P(yes) of every question; each edit is of the best so far."""
    steps, best = [], 0
    for number, score in enumerate(scores):
        probs = [score] * (len(graph.objects) + len(graph.triples))
        step = SimpleNamespace(
            image=Image.effect_noise(size, 50).convert("RGB"),
            reflection=SimpleNamespace(probs=probs, score=score),
            source=best,
            thought=thought,
            instruction=[None, *edits][number],
            repeated=False,
            attempts=1,
        )
        steps.append(step)
        best = scores.index(max(scores[: number + 1]))
    return SimpleNamespace(graph=graph, seed=seed, steps=steps, best_index=best)


def training(folder, iterations=12):
    """A training run's folder with all that one holds."""
    folder.mkdir()
    odd = {"a": float("nan"), "b": None, "c": "x"}  # not drawn
    rows = [{"iteration": n, "reward": n / 100, "kl": n} | odd for n in range(iterations)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text("rounds: 3\n")
    report.record(folder, [trajectory([0.2, 0.4], seed=1), trajectory([0.6], seed=2)])
    report.record(folder, [trajectory([0.2, 0.7], seed=1)], iterations)
    return folder


def page_of(folder):
    """The page of a run as HTML, and the text that it shows."""
    page = report.report([folder])[0].read_text(encoding="utf-8")
    return page, html.unescape(re.sub("<.*?>", "", page.partition("</style>")[2]))


# ---- what a page shows ----


def test_a_training_run(tmp_path):
    page, text = page_of(training(tmp_path / "phase1"))
    assert page.count("<svg") == 2  # one chart for every figure that can be drawn
    assert "0 → 0.11reward" in text and "0 to 0.11, iterations 0 to 11" in text
    prompt = "red circle left of blue square"
    before, after, other = (f"{prompt}{s}" for s in ("0.20 → 0.40", "0.20 → 0.70", "0.60 → 0.60"))
    assert text.index(before) < text.index(after) < text.index(other)
    assert "rounds: 3" in text and "python " in text


def test_rounding_is_no_curve():
    text = '{"iteration": 0, "kl": 1.0}\n{"iteration": 1, "kl": 1.00001}'
    assert 'd="M0.0 90.0L300.0 90.0h.1"' in report.curves(text)


def test_a_trajectory(tmp_path):
    report.record(tmp_path, [trajectory([0.25, 0.75, 0.5, 0.4], edits=(MOVE, "none", None))])
    page, text = page_of(tmp_path)
    assert re.findall('<li class="(.*?)">', page) == ["", "best", "", ""]
    assert re.findall('<p class="(.*?)">', page) == ["no"] * 3 + ["yes"] * 6 + ["no"] * 3
    edits = [f"edit: {MOVE}thought: a thought", "edit: nonethought: a thought"]
    edits += ["(malformed: no edit) (image 1)"]
    assert all(edit in text for edit in edits)
    assert "0.25 → 0.75 · seed 0" in text and "75%red circle" in text


def test_the_tables_of_an_evaluation(tmp_path):
    tables = [{"title": "All", "cells": [["", "SG-IoU"], ["loop", "0.5"]]}] * 2
    (tmp_path / "results.json").write_text(json.dumps({"tables": tables, "rows": []}))
    page, text = page_of(tmp_path)
    assert page.count("<table>") == 2 and page.count("<td>") == 8
    assert "AllSG-IoUloop0.5" in text


def test_a_long_run_costs_linear_time(tmp_path):
    folder = training(tmp_path / "run", 10_000)
    start = time.process_time()
    page, _ = page_of(folder)
    assert time.process_time() - start < 5  # 0.1 s on an idle core
    assert len(page) < 100_000  # a curve has a few hundred points


def test_a_half_written_line_is_left_out(tmp_path):
    folder = training(tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes()[:-9])
    assert "0 → 0.1reward" in page_of(folder)[1]


# ---- text of models and people ----


def test_text_is_escaped(tmp_path):
    folder = tmp_path / "<script>1 & 'co'"
    graph = SceneGraph([EVIL, "owl"], [(EVIL, "above", "owl")])
    report.record(folder, [trajectory([0.2, 0.3], graph, EVIL, [EVIL])])
    (folder / "metrics.jsonl").write_text(json.dumps({"iteration": 1, EVIL: 1}))
    tables = [{"title": EVIL, "cells": [[EVIL]]}]
    (folder / "results.json").write_text(json.dumps({"tables": tables}))
    for name in ("config.yaml", "command.txt"):
        (folder / name).write_text(EVIL)
    page, text = page_of(folder)
    # in the prompt, verdicts, thought and edit, curve, table, and files
    assert text.count(EVIL) == 1 + 2 * 2 + 2 + 1 + 2 + 2
    assert "<script" not in page and page.count("<img") == page.count('<img src="data:image/') == 2


def test_control_characters_and_lone_surrogates_are_visible(tmp_path):
    odd = trajectory([0.2, 0.3], thought="red \x1b[31m \ud800 \u202e end", edits=["a\x00b"])
    report.record(tmp_path, [odd])
    for text in (page_of(tmp_path)[1], report.story(odd)):
        assert r"red \x1b[31m \ud800 \u202e end" in text and r"a\x00b" in text
    report.strip(odd)


def test_numbers_may_be_tensors(tmp_path):
    odd = trajectory([0.25, 0.75])
    for step in odd.steps:
        step.reflection.probs = torch.tensor(step.reflection.probs)
        step.reflection.score = torch.tensor(step.reflection.score)
    report.record(tmp_path, [odd])
    assert "0.25 → 0.75" in page_of(tmp_path)[1]


# ---- files and the command ----


def test_nobody_reads_half_a_file(tmp_path, monkeypatch):
    report.write(tmp_path / "page.html", "old")
    monkeypatch.setattr(os, "replace", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit):
        report.write(tmp_path / "page.html", "new")
    assert (tmp_path / "page.html").read_text() == "old"


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "report.py", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_the_command_in_a_locale_without_unicode(tmp_path):
    folder = training(tmp_path / "läuft", 2)
    (folder / "config.yaml").write_text("läuft: →", encoding="utf-8")
    (folder / "report.html").unlink()
    process = command(folder, LC_ALL="C", PYTHONUTF8="0")
    assert process.returncode == 0 and process.stdout.endswith("report.html\n"), process.stderr
    assert "läuft: →" in (folder / "report.html").read_text(encoding="utf-8")
    assert not list(folder.rglob("*.aside"))


def test_a_folder_that_is_no_run(tmp_path):
    process = command(tmp_path)
    assert process.returncode == 1
    assert process.stderr.startswith(f"report.py: {tmp_path}") and process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.json", "[]"),
        ("results.json", ""),
        ("metrics.jsonl", '{"iteration": "1", "reward": 1}\n{"iteration": [2], "reward": 2}'),
        ("samples/0000.json", "[{}]"),
    ],
)
def test_a_file_that_cannot_be_shown_is_named(tmp_path, name, text):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "2024_photo.json").touch()  # not ours
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: cannot be shown"):
        report.report([tmp_path])


@pytest.mark.parametrize("closed", [None, "/dev/full"])
def test_a_terminal_that_is_gone_stops_nothing(monkeypatch, closed):
    with open(closed, "w") if closed else contextlib.nullcontext() as stream:
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setattr("os.dup2", lambda *_: None)
        report.say("on we go")
        with contextlib.suppress(OSError):  # what could not be written
            stream and stream.close()


# ---- one trajectory ----


def test_story():
    told = report.story(trajectory([0.25, 0.5, 0.4, 0.45], edits=(MOVE, "none", None)))
    assert "no  25%  red circle left of blue square" in told and "yes  50%  red circle" in told
    assert "thinks: a thought" in told and "edits:  move the red circle" in told
    assert "image 1: score 0.50  <- best" in told
    assert "edits:  none\n" in told and "edits:  (malformed: no edit) (image 1)\n" in told


def test_strip():
    shown = trajectory([0.2, 0.9, 0.3], size=(32, 16))
    strip = report.strip(shown)
    for number, step in enumerate(shown.steps):  # enlarged sevenfold, the aspect ratio kept
        left = 12 + number * 236
        large = strip.crop((left, 12, left + 224, 12 + 112))
        assert large.resize((32, 16), Image.NEAREST).tobytes() == step.image.tobytes()


def test_only_the_images_of_an_earlier_run_are_removed(tmp_path):
    long = trajectory([0.1, 0.2, 0.3, 0.4])
    for folder in (tmp_path, tmp_path / "0000", tmp_path / "0001"):
        report.save_images(long, folder)
        assert Image.open(folder / "3.png").tobytes() == long.steps[3].image.tobytes()
    mine = [tmp_path / "7.png", tmp_path / "0001" / "notes.txt", tmp_path / "2025" / "0.png"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    report.remove_images(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(mine)
    assert not (tmp_path / "0000").exists()
