"""report.py: the page of a run, the story and the strip of a trajectory."""

import html.parser
import io
import json
import math
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import report
from sgiou import SceneGraph

ROOT = Path(report.__file__).parent
GRAPH = SceneGraph(["red circle", "blue square"], [("red circle", "left of", "blue square")])
EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(2)>&amp;'
MOVE = "move the red circle"


def trajectory(scores, graph=GRAPH, thought="a thought", edits=(), size=(32, 32), seed=0):
    """One image per score, which is P(yes) of every question; each edit is of the best so far."""
    steps = []
    for number, score in enumerate(scores):
        probs = (score,) * (len(graph.objects) + len(graph.triples))
        source = max(range(number), key=lambda n: scores[n]) if number else None
        step = SimpleNamespace(
            image=Image.effect_noise(size, 50).convert("RGB"),
            reflection=SimpleNamespace(probs=probs, score=score, satisfied=score >= 0.5),
            source=source,
            thought=thought if number else "",
            instruction=(*edits, *[MOVE] * number)[number - 1] if number else None,
            repeated=False,
        )
        steps.append(step)
    best = max(range(len(scores)), key=lambda n: scores[n])
    return SimpleNamespace(graph=graph, seed=seed, steps=steps, best_index=best)


def training(folder, iterations=12, **figures):
    """A training run's folder with all that one holds, every figure included."""
    folder.mkdir(parents=True)
    names = [name for labels in report.CHARTS.values() for name in labels]
    rows = [{"iteration": n, **dict.fromkeys(names, n / 100), **figures} for n in range(iterations)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text("rounds: 3\n")
    report.record(folder, [trajectory([0.2, 0.4], seed=1), trajectory([0.6], seed=2)])
    report.record(folder, [trajectory([0.2, 0.7], seed=1)], iterations)
    return folder


class Page(html.parser.HTMLParser):
    """The page of some runs: all tags with their attributes, and the visible text."""

    def __init__(self, *folders):
        super().__init__()
        self.tags, self.text = [], ""
        self.html = report.report(folders).read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


# ---- what a page shows ----


def test_a_training_run(tmp_path):
    page = Page(training(tmp_path / "phase1"))
    assert len(page.all("svg")) == len(report.CHARTS)
    assert all(title in page.text for title in report.CHARTS)
    assert "after the edit 0 → 0.11" in page.text  # the reward, first and last
    assert "0 to 0.11, iterations 0 to 11" in page.text
    assert "phase1 before and after training" in page.text
    prompt = "red circle left of blue square"
    before, after, other = (f"{prompt}{s}" for s in ("0.20 → 0.40", "0.20 → 0.70", "0.60 → 0.60"))
    assert page.text.index(before) < page.text.index(after) < page.text.index(other)
    assert "rounds: 3" in page.text and "python " in page.text
    assert "Damaged" not in page.text


def test_a_trajectory(tmp_path):
    report.record(tmp_path, [trajectory([0.25, 0.75, 0.5, 0.4], edits=(MOVE, "none", None))])
    page = Page(tmp_path)
    bars = [bar["style"] for bar in page.all("i")]
    assert bars == [f"--p:{percent}%" for percent in (25, 75, 50, 40) for _ in range(3)]
    assert [item["class"] for item in page.all("li")] == ["", "best", "", ""]
    verdicts = [item["class"] for item in page.all("p") if item.get("class") in ("yes", "no")]
    assert verdicts == ["no"] * 3 + ["yes"] * 6 + ["no"] * 3
    assert "image 1, the answer" in page.text and page.text.count("the answer") == 1
    for made in (
        "generated",
        f"{MOVE}a thought",
        "nonea thought",
        "(malformed: no edit) (image 1)",
    ):
        assert made in page.text
    assert "0.25 → 0.75 · seed 0" in page.text


def test_a_repeated_instruction_is_marked(tmp_path):
    odd = trajectory([0.25, 0.75])
    odd.steps[1].repeated = True
    report.record(tmp_path, [odd])
    for text in (Page(tmp_path).text, report.story(odd)):
        assert f"{MOVE} (tried before: no edit)" in text


def test_every_figure_on_the_page_is_one_that_training_logs():
    code = "".join(p.read_text() for p in ROOT.glob("*.py") if p.name != "report.py")
    names = [name for figures in report.CHARTS.values() for name in figures]
    assert len(names) == len(set(names))
    assert all(f'"{name}"' in code for name in names)


def test_runs_are_compared(tmp_path):
    one, two = training(tmp_path / "phase1"), training(tmp_path / "phase2", 5)
    page = Page(one, two)
    assert (tmp_path / "report.html").exists()
    assert len(page.all("svg")) == len(report.CHARTS)
    assert "phase1: before 0 → 0.11" in page.text and "phase2: before 0 → 0.04" in page.text
    other = training(tmp_path / "other" / "phase1")  # of the same name
    assert "other/phase1: before" in Page(one, other).text


def test_the_tables_of_an_evaluation(tmp_path):
    tables = [{"title": "All <b>", "cells": [["", "SG-IoU"], ["loop <i>", "0.5"]]}] * 2
    (tmp_path / "results.json").write_text(json.dumps({"tables": tables, "rows": []}))
    page = Page(tmp_path)
    assert len(page.all("table")) == 2 and len(page.all("td")) == 8
    assert "All <b>" in page.text and "loop <i>0.5" in page.text


def test_only_the_first_trajectories_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SHOWN", 3)
    report.record(tmp_path, [trajectory([0.1])] * 4)
    page = Page(tmp_path)
    assert len(page.all("article")) == 3 and "the first 3" in page.text


def test_small_images_are_exact_and_large_ones_thumbnails():
    def decoded(image):
        return Image.open(io.BytesIO(urllib.request.urlopen(report.data_uri(image)).read()))

    small = Image.effect_noise((32, 20), 50).convert("RGB")
    assert decoded(small).tobytes() == small.tobytes()
    large = decoded(Image.effect_noise((512, 256), 50).convert("RGBA"))
    assert large.format == "WEBP" and large.size == (224, 112)


def test_a_long_run_costs_linear_time(tmp_path):
    folder = training(tmp_path / "run", 10_000)
    start = time.process_time()
    page = Page(folder)
    assert time.process_time() - start < 5  # 0.5 s on an idle core
    curves = [path["d"] for path in page.all("path") if "style" in path]
    assert 300 < max(curve.count("L") for curve in curves) < 400


# ---- text of models and people ----


def test_text_is_escaped(tmp_path):
    folder = tmp_path / "<script>1 & 'co'"
    graph = SceneGraph([EVIL, "owl"], [(EVIL, "above", "owl")])
    report.record(folder, [trajectory([0.2, 0.3], graph, EVIL, [EVIL])])
    (folder / "metrics.jsonl").write_text(json.dumps({"iteration": 1, "kl": 1, EVIL: EVIL}))
    tables = [{"title": EVIL, "cells": [[EVIL]]}]
    (folder / "results.json").write_text(json.dumps({"tables": tables}))
    for name in ("config.yaml", "command.txt"):
        (folder / name).write_text(EVIL)
    page = Page(folder)
    assert page.text.count(EVIL) == 1 + 2 * 2 + 2 + 2 + 2  # prompt, verdicts, edit, table, files
    assert "<script" not in page.html and "onerror=alert(2)>" not in page.html
    assert page.text.count(folder.name) >= 3


def test_control_characters_and_lone_surrogates_are_visible(tmp_path):
    odd = trajectory([0.2, 0.3], thought="red \x1b[31m \ud800 \u202e end", edits=["a\x00b"])
    report.record(tmp_path, [odd])
    for text in (Page(tmp_path).text, report.story(odd)):
        assert r"red \x1b[31m \ud800 \u202e end" in text and r"a\x00b" in text
    report.strip(odd)


def test_nothing_comes_from_the_network(tmp_path):
    page = Page(training(tmp_path / "run"))
    assert "default-src 'none'" in page.all("meta")[2]["content"]
    links = [value for _, a in page.tags for key, value in a.items() if key in ("src", "href")]
    assert links and all(link.startswith("data:image/") for link in links)
    assert not any(word in page.html for word in ("http:", "https:", "url(", "<script", "@import"))


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor])
def test_numbers_of_any_kind(tmp_path, kind):
    odd = trajectory([0.25, 0.75])
    for step in odd.steps:
        step.reflection.probs = [kind(p) for p in step.reflection.probs]
        step.reflection.score = kind(step.reflection.score)
    report.record(tmp_path, [odd])
    assert "0.25 → 0.75" in Page(tmp_path).text
    assert "score 0.75  <- best" in report.story(odd)


# ---- what is missing or damaged ----


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert not Page(tmp_path).all("h2")


def test_a_half_written_line(tmp_path):
    folder = training(tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes()[:-9])
    page = Page(folder)
    assert "after the edit 0 → 0.1" in page.text
    assert f"Damaged files{folder / 'metrics.jsonl'}" in page.text


SAMPLE = '[{"prompt": "p", "seed": %s, "best": %s, "steps": [{"score": %s, "verdicts": []}]}]'
GARBLED = ["", "[", "{}", "[1]", "[{}]", "null", '"samples"', "\x00", "[" * 10**5]
GARBLED += ['[{"steps": []}]', '{"tables": 3}', '{"tables": [{"title": 1}]}', '{"iteration": []}']
GARBLED += [SAMPLE % (0, 4, 1), SAMPLE % ('"<b>"', 0, 1), SAMPLE % (0, 0, "1" + "0" * 400)]
GARBLED += [f'{{"iteration": {n}}}' for n in ("1" + "0" * 400, "NaN", "Infinity", '"one"')]


@pytest.mark.parametrize("text", GARBLED)
@pytest.mark.parametrize("file", ["samples/0012.json", "results.json", "metrics.jsonl"])
def test_garbled_files(tmp_path, file, text):
    folder = training(tmp_path / "run")
    (folder / file).write_text(text)
    page = Page(folder)
    assert (f"Damaged files{folder / file}" in page.text) == (text != "" or "jsonl" not in file)
    assert len(page.all("article")) == (2 if "samples" in file else 3)
    assert bool(page.all("figure")) == ("metrics" not in file)


@pytest.mark.parametrize("value", [math.nan, -math.inf, None, "x", [], True, 10**400])
def test_values_that_cannot_be_drawn(tmp_path, value):
    page = Page(training(tmp_path / "run", kl=value))
    assert len(page.all("svg")) == len(report.CHARTS) - 1 and "KL" not in page.text


# ---- files and the command ----


def test_nobody_reads_half_a_file(tmp_path, monkeypatch):
    mask = os.umask(0o027)
    report.write(tmp_path / "page.html", "old")
    os.umask(mask)
    assert (tmp_path / "page.html").stat().st_mode & 0o777 == 0o640
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


@pytest.mark.parametrize("kind", ["missing", "a file", "no run"])
def test_an_error_is_one_line(tmp_path, kind):
    folder = tmp_path / "other"
    if kind == "a file":
        folder.write_text("text")
    elif kind == "no run":
        folder.mkdir()
    process = command(training(tmp_path / "run", 2), folder)
    assert process.returncode == 1
    assert process.stderr.startswith(f"report.py: {folder}") and process.stderr.count("\n") == 1


# ---- one trajectory ----


def test_story():
    told = report.story(trajectory([0.25, 0.5, 0.4, 0.45], edits=(MOVE, "none", None)))
    start = """red circle left of blue square

  image 0: score 0.25
     no  25%  red circle
     no  25%  blue square
     no  25%  red circle left of blue square
    thinks: a thought
    edits:  move the red circle

  image 1: score 0.50  <- best
    yes  50%  red circle"""
    assert told.startswith(start)
    assert "edits:  none\n" in told and "edits:  (malformed: no edit) (image 1)\n" in told


def test_strip():
    shown = trajectory([0.2, 0.9, 0.3], size=(32, 16))
    strip = report.strip(shown)
    assert strip.size == (3 * (224 + 12) + 12, 12 + 224 + 84)
    for number, step in enumerate(shown.steps):  # enlarged sevenfold, the aspect ratio kept
        left = 12 + number * 236
        large = strip.crop((left, 12 + 112, left + 224, 12 + 224))
        assert large.resize((32, 16), Image.NEAREST).tobytes() == step.image.tobytes()
    colors = [(197, 34, 31), (24, 128, 56), (197, 34, 31)]  # of the score: red, green if satisfied
    for number, color in enumerate(colors):
        left = 12 + number * 236
        text = strip.crop((left, 236, left + 224, 256))
        assert color in [found for _, found in text.getcolors()]
    assert report.strip(trajectory([0.2], size=(300, 400))).size == (248, 320)


def test_save_images_removes_only_what_a_longer_trajectory_left(tmp_path):
    for name in ("7.png", "holiday.png", "notes.txt"):
        (tmp_path / name).write_text("mine")
    long, short = trajectory([0.1, 0.2, 0.3, 0.4]), trajectory([0.1, 0.9])
    report.save_images(long, tmp_path)
    report.save_images(short, tmp_path)
    names = ["0.png", "1.png", "7.png", "holiday.png", "notes.txt", "strip.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert Image.open(tmp_path / "1.png").tobytes() == short.steps[1].image.tobytes()
    assert Image.open(tmp_path / "strip.png").size == report.strip(short).size
