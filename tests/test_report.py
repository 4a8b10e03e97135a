"""report.py, charts.py and the HTML of story.py."""

import html.parser
import json
import math
import os
import random
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import charts
import report
import story
from checker import reflect
from loop import Step, Trajectory
from sgiou import SceneGraph

ROOT = Path(report.__file__).parent
GRAPH = SceneGraph(["red circle", "blue square"], [("red circle", "left of", "blue square")])
EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(2)>&amp;'


def trajectory(scores, seed=0, side=32, graph=GRAPH, thought="a thought", instruction="an edit"):
    """One picture a score, which is the verdict on every question."""
    asked = len(graph.objects) + len(graph.triples)
    steps = [
        Step(picture(side, f"{seed} {i}"), reflect(graph, [p] * asked), thought, instruction)
        for i, p in enumerate(scores)
    ]
    steps[-1].thought, steps[-1].instruction = "", None
    return Trajectory(graph, seed, steps)


def picture(side, seed):
    """As hard to compress as a photograph: an upscaled mosaic with fine noise over it."""
    rng = random.Random(seed)
    cells = Image.frombytes("RGB", (16, 16), rng.randbytes(768)).resize((side, side), Image.BICUBIC)
    noise = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
    return Image.blend(cells, noise, 0.1)


def row(iteration, **figures):
    return {"iteration": iteration, "reward": 0.4 + iteration / 100, "reward_std": 0.1} | figures


@pytest.fixture(autouse=True)
def called_by_its_name(monkeypatch):
    """The page shows the command: with this one, not with whatever letters pytest's path holds."""
    monkeypatch.setattr(sys, "argv", ["train.py"])


def training(folder, iterations=12, **figures):
    """A training run's folder with all that one holds."""
    folder.mkdir(parents=True)
    rows = [
        row(i, before=0.4, kl=0.01 * i, clipped_low=0.01, clipped_high=0, ratio_error=0.1 / i)
        | {"replay_error": 1e-5, "grad_norm": 0.1, "flat_groups": 0.2, "malformed": 0.1, "none": 0}
        | ({"val_checker": 0.5, "val_sg_iou": 0.3} if i % 4 == 0 else {})
        | figures
        for i in range(1, iterations + 1)
    ]
    seconds = [{"iteration": row["iteration"], "edit": 3.0, "update": 1.0} for row in rows]
    for name, lines in (("metrics", rows), ("seconds", seconds)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "config.yaml").write_text(f"run: {folder.name}\niterations: {iterations + 8}\n")
    report.record(folder, [trajectory([0.2, 0.4], 1), trajectory([0.6], 2)])
    report.record(folder, [trajectory([0.2, 0.7], 1), trajectory([0.6], 2)], iterations)
    return folder


class Page(html.parser.HTMLParser):
    """All tags with their attributes, and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def made(*folders):
    """The page of some runs' folders."""
    return Page(report.report(folders).read_text(encoding="utf-8"))


def titles(page):
    return [title for title, *_ in charts.CHARTS if title in page.text]


# ---- what a page shows ----


def test_a_training_run(tmp_path):
    page = made(training(tmp_path / "phase1"))
    assert titles(page) == [title for title, *_ in charts.CHARTS]
    assert len(page.all("svg")) == len(charts.CHARTS)
    assert "12 of 20" in page.text and "0.410 → 0.520" in page.text
    assert "3.00 (75%)" in page.text and "4.00" in page.text  # seconds
    assert "after 0 and after 12 iterations" in page.text
    assert "1 better, 0 worse, 1 alike" in page.text
    assert "0.40 → 0.70" in page.text
    assert "a thought" in page.text and "an edit" in page.text
    assert "iterations: 20" in page.text and "python " in page.text


def test_every_figure_of_the_report_is_one_that_training_logs():
    source = "".join((ROOT / f"{name}.py").read_text() for name in ("train", "phases", "grpo"))
    names = [name for _, _, figures in charts.CHARTS for name in figures]
    assert len(names) == len(set(names))
    for name in [*names, *charts.BANDS.values()]:
        assert f'"{name}"' in source, name


def test_verdicts_bars_and_the_answer():
    album = story.album([trajectory([0.25, 0.75, 0.5], seed=7)])
    text = story.article(album[0])
    page = Page(text)
    widths = [f"--p:{percent}%" for percent in (25, 75, 50) for _ in range(3)]
    assert [bar["style"] for bar in page.all("i")] == widths
    classes = [item.get("class") for item in page.all("li")]
    assert classes == [None, *["no"] * 3, "best", *["yes"] * 3, None, *["yes"] * 3]
    assert page.text.count("the answer") == 1 and "image 1, the answer" in page.text
    assert "solved, made worse · 0.25 → 0.75 · seed 7" in page.text


@pytest.mark.parametrize(
    ("instruction", "told"), [(None, "malformed"), ("none", "no edit"), ("a <b>", "a <b>")]
)
def test_every_kind_of_instruction(instruction, told):
    album = story.album([trajectory([0.2, 0.3], instruction=instruction)])
    assert told in Page(story.article(album[0])).text


@pytest.mark.parametrize(
    ("scores", "kinds"),
    [
        ([0.5], ["solved"]),
        ([0.2, 0.9], ["solved"]),
        ([0.2, 0.2], ["unsolved"]),
        ([0.2, 0.4, 0.5], ["solved"]),
        ([0.2, 0.4, 0.3], ["unsolved", "worse"]),
        ([0.4, 0.2, 0.3], ["unsolved", "worse"]),
        ([0.4, 0.397], ["unsolved"]),
    ],
)
def test_kinds(scores, kinds):
    assert story.kinds(story.album([trajectory(scores)])[0]) == kinds


def test_the_filter_counts_and_needs_no_script():
    album = story.album([trajectory(s) for s in ([0.9], [0.2, 0.1], [0.1, 0.2])])
    page = Page(story.gallery(album, "f0", 10**6))
    radios = page.all("input")
    assert [radio["value"] for radio in radios] == ["all", "solved", "unsolved", "worse"]
    assert {radio["name"] for radio in radios} == {"f0"} and "checked" in radios[0]
    assert "all 3solved 1unsolved 2made worse 1" in page.text
    assert [a["class"] for a in page.all("article")] == ["solved", "unsolved worse", "unsolved"]
    for kind in ("solved", "unsolved", "worse"):
        assert f"[value={kind}]:checked) article:not(.{kind})" in story.STYLE


def test_runs_are_compared(tmp_path):
    one, two = training(tmp_path / "phase1"), training(tmp_path / "phase2", 5)
    (two / "config.yaml").write_text("run: phase2\niterations: 20\nkl: 0\n")
    assert report.report([one, two]) == tmp_path / "report.html"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("svg")) == len(charts.CHARTS) - 1  # not the seconds
    assert "phase1: reward 0.52" in page.text and "phase2: reward 0.45" in page.text
    assert "<mark>kl: 0</mark>" in text and "<mark>iterations: 20</mark>" not in text
    assert len({radio["name"] for radio in page.all("input")}) == 2  # a filter of its own each
    same = report.report([one, f"{one}/"])
    assert same == one / "report.html"  # one run, named twice


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    folders = [training(tmp_path / parent / "phase1", 2) for parent in "ab"]
    page = made(*folders)
    assert all(f"{folder}: reward" in page.text for folder in folders)


def test_the_results_of_an_evaluation(tmp_path):
    values = {"sg_iou": [0.25] * 4, "kept": [None] * 4}
    base = {"name": "Diffuser", "values": values, "builds_on": None}
    better = base | {"name": "loop <i>", "builds_on": "Diffuser"}
    better["values"] = {"sg_iou": [0.75] * 4, "kept": [None, 0.5, 1, None]}
    rows = [r | {"evaluations": 8, "tokens": 9, "seconds": 1} for r in (base, better)]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    page = made(tmp_path)
    assert "+0.500 [+0.500, +0.500]" in page.text and "loop <i>" in page.text
    assert len(page.all("table")) == 2


# ---- pictures ----


def test_a_small_picture_is_kept_exactly_and_a_large_one_shrunk():
    small, large = picture(32, "small"), picture(512, "large")
    with Image.open(opened(story.data_uri(small))) as image:
        assert image.format == "PNG" and image.tobytes() == small.tobytes()
    with Image.open(opened(story.data_uri(large.resize((512, 256))))) as image:
        assert image.format == "WEBP" and image.size == (224, 112)
    story.data_uri(small.convert("RGBA"))
    assert large.size == (512, 512)  # the picture itself is left alone


def opened(uri):
    return urllib.request.urlopen(uri)


def test_200_trajectories_stay_under_10_mb(tmp_path):
    tiny = story.album([trajectory([0.1, 0.2, 0.3, 0.4], seed) for seed in range(200)])
    large = story.album([trajectory([0.1], seed, 512) for seed in range(8)])
    for album in (tiny, [large[i % 8] | {"steps": large[i % 8]["steps"] * 4} for i in range(200)]):
        (tmp_path / "samples").mkdir(exist_ok=True)
        (tmp_path / "samples" / "0000.json").write_text(json.dumps(album))
        path = report.report([tmp_path])
        assert path.stat().st_size < 10_000_000
        assert len(Page(path.read_text(encoding="utf-8")).all("article")) == 200


def test_a_page_that_would_grow_too_large_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "BUDGET", 30_000)
    report.record(tmp_path, [trajectory([0.1, 0.2], seed) for seed in range(9)])
    page = made(tmp_path)
    shown = len(page.all("article"))
    assert 0 < shown < 9 and f"The first {shown} of 9: the page is full" in page.text
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name} more")
    page = made(tmp_path, tmp_path.parent / f"{tmp_path.name} more")  # share what a page may hold
    assert 0 < len(page.all("article")) <= shown


def test_every_picture_has_words(tmp_path):
    page = made(training(tmp_path / "run"))
    alts = [image["alt"] for image in page.all("img")]
    assert len(alts) == 3 + 2
    assert all("red circle left of blue square" in alt and "score" in alt for alt in alts)
    assert any("the Checker misses red circle, blue square, red circle left" in a for a in alts)
    assert any(alt.endswith("nothing is missing") for alt in alts)
    for drawing in page.all("svg"):
        assert drawing["role"] == "img" and drawing["aria-label"]
    assert page.all("svg")[0]["aria-label"].startswith("Reward: reward from 0.41 (iteration 1) to")


# ---- what others wrote stays text ----


@pytest.mark.parametrize("count", [1, 2])
def test_strings_of_models_prompts_and_folders_are_escaped(tmp_path, count):
    folders = [tmp_path / f"<script>{number} & 'co'" for number in range(count)]
    graph = SceneGraph([EVIL, "owl"], [(EVIL, "above", "owl")])
    told = trajectory([0.2, 0.3], graph=graph, thought=EVIL, instruction=EVIL)
    album = story.album([told, told])
    album[0]["steps"][0]["image"] = EVIL
    for folder in folders:
        report.record(folder, [trajectory([0.2], graph=graph)])
        (folder / "samples" / "0005.json").write_text(json.dumps(album))
        (folder / "metrics.jsonl").write_text(json.dumps(row(1)))
        (folder / "seconds.jsonl").write_text(json.dumps({"iteration": 1, EVIL: 1.0}))
        (folder / "config.yaml").write_text(f"{folder.name}: {EVIL}\n")
        (folder / "command.txt").write_text(f"python train.py {EVIL}\n")
    text = report.report(folders).read_text(encoding="utf-8")
    page = Page(text)
    assert page.text.count(EVIL) >= 8 * count
    assert "<script" not in text and not page.all("script")
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert page.text.count("<script>0 & 'co'") >= 2  # title, heading, ...
    assert all(image["src"] == EVIL or "png;base64" in image["src"] for image in page.all("img"))


def test_nothing_is_asked_of_the_network(tmp_path):
    text = report.report([training(tmp_path / "run")]).read_text(encoding="utf-8")
    page = Page(text)
    assert "default-src 'none'" in page.all("meta")[2]["content"]
    links = [value for _, a in page.tags for key, value in a.items() if key in ("src", "href")]
    assert links and all(link.startswith("data:") for link in links)
    assert "http:" not in text and "https:" not in text and "url(" not in text


def test_a_lone_surrogate_can_be_written(tmp_path):
    report.record(tmp_path, [trajectory([0.2, 0.3], thought="\ud800 and on")])
    assert "? and on" in made(tmp_path).text


# ---- what is missing or broken ----


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    page = made(tmp_path)
    assert not page.all("svg") and not page.all("h2")


def test_one_iteration_and_one_figure(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1)) + "\n")
    assert titles(made(tmp_path))[0] == "Reward"


def test_a_line_that_is_cut_off(tmp_path):
    folder = training(tmp_path / "run")
    for name in ("metrics.jsonl", "seconds.jsonl"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-20])
    page = made(folder)
    assert "11 of 20" in page.text
    assert "metrics.jsonl, seconds.jsonl" in page.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "x", [], True, 10**400])
def test_figures_that_are_no_numbers(tmp_path, value):
    page = made(training(tmp_path / "run", kl=value, reward_std=value, replay_error=value))
    left_out = {"KL", "Replay error"}
    assert set(titles(page)) == {title for title, *_ in charts.CHARTS} - left_out
    assert not any("band" in path.get("class", "") for path in page.all("path"))


def test_zero_has_no_place_on_a_logarithmic_axis(tmp_path):
    page = made(training(tmp_path / "run", replay_error=0, ratio_error=0))
    assert len(page.all("svg")) == len(charts.CHARTS) - 2


GARBLED = ["[", "{}", "[1]", "[{}]", "null", '[{"steps": []}]', "[" * 10**5, "\x00", '"samples"']
GARBLED += [
    '[{"prompt": "p", "seed": 0, "best": 0, "steps": [{"score": 1%s, "verdicts": []}]}]'
    % ("0" * 400)
]
NO_SUCH_STEP = '[{"prompt": "p", "seed": 0, "best": 4, "steps": [{"score": 1, "verdicts": []}]}]'


@pytest.mark.parametrize("text", [*GARBLED, NO_SUCH_STEP])
@pytest.mark.parametrize("file", ["samples/0012.json", "results.json", "metrics.jsonl"])
def test_garbled_files(tmp_path, file, text):
    folder = training(tmp_path / "run")
    (folder / file).write_text(text)
    page = made(folder)
    is_empty = file.startswith("samples") and text == "{}"  # no trajectories, in a way
    assert ("Not read, or not in full" in page.text and file in page.text) != is_empty
    assert len(page.all("article")) == 2  # of the first set, if the last is broken
    assert bool(page.all("svg")) == (file != "metrics.jsonl")


def test_no_more_than_a_folder_of_pictures_is_needed(tmp_path):
    report.record(tmp_path / "out", [trajectory([0.2, 0.9])])
    page = made(tmp_path / "out")
    assert len(page.all("article")) == 1 and not page.all("input")  # nothing to filter


figures = st.dictionaries(
    st.sampled_from([n for _, _, names in charts.CHARTS for n in names] + ["reward_std"]),
    st.floats() | st.integers(),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(figures, max_size=4))
def test_any_figures_make_charts(rows):
    text = charts.charts({"run": [row | {"iteration": i} for i, row in enumerate(rows)]})
    assert "nan" not in text and "inf" not in text


numbers = st.floats(0, 1e9).map(lambda number: round(number, 9))


@settings(deadline=None)
@given(numbers, numbers)
def test_ticks_enclose_what_they_measure(low, span):
    low -= 1e3
    marks = charts.ticks(low, low + span)
    assert 2 <= len(marks) <= 7
    slack = 1e-9 * max(abs(low), abs(low + span), 1)
    assert marks[0] <= low + slack and marks[-1] >= low + span - slack


def test_ticks_by_hand():
    assert charts.ticks(0.1, 3.7) == [0, 1, 2, 3, 4]
    assert charts.ticks(0.41, 0.52) == pytest.approx([0.4, 0.45, 0.5, 0.55])
    assert charts.ticks(0, 0)[0] == 0 and len(charts.ticks(0, 0)) > 1
    assert charts.ticks(0.42, 0.42)[0] < 0.42 < charts.ticks(0.42, 0.42)[-1]
    assert charts.ticks(3e-6, 2e-4, log=True) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3])


# ---- the command ----


def command(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "report.py", *map(str, arguments)], capture_output=True, text=True
    )


def test_the_command_makes_the_page_again(tmp_path):
    folder = training(tmp_path / "run", 2)
    (folder / "report.html").unlink()
    process = command(folder)
    assert process.returncode == 0 and process.stdout.strip() == str(folder / "report.html")
    assert (folder / "report.html").exists()
    assert not list(tmp_path.rglob("*.aside"))


@pytest.mark.parametrize("kind", ["nothing", "no run", "a file", "a run and no run"])
def test_what_is_no_run_is_told_in_a_line(tmp_path, kind):
    folders = [tmp_path / "other"]
    if kind == "a file":
        folders[0].write_text("text")
    elif kind != "nothing":
        folders[0].mkdir()
        (folders[0] / "notes.txt").write_text("text")
    if kind == "a run and no run":
        folders.insert(0, training(tmp_path / "run", 2))
    process = command(*folders)
    assert process.returncode not in (0, None)
    assert len(process.stderr.splitlines()) == 1 and process.stderr.startswith("report.py: ")
    assert str(folders[-1]) in process.stderr


def test_a_page_that_cannot_be_written(tmp_path):
    folder = training(tmp_path / "run", 2)
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    process = command(folder)
    assert process.returncode not in (0, None) and len(process.stderr.splitlines()) == 1


# ---- in a browser ----


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--blink-settings=preferredColorScheme=0"]])
def test_a_browser_has_nothing_to_complain_of(tmp_path, arguments):
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None
    )
    if not browser:
        pytest.skip("no Chromium here: apt-get install chromium")
    path = report.report([training(tmp_path / "one"), training(tmp_path / "two")])
    shot = tmp_path / "page.png"
    process = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        + ["--window-size=390,3000", f"--screenshot={shot}", *arguments, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert process.returncode == 0, process.stderr
    assert "CONSOLE" not in process.stderr
    with Image.open(shot) as image:
        colors = image.convert("RGB").resize((39, 300)).getcolors(39 * 300)
    ground = max(colors)[1]
    assert ground == ((23, 24, 27) if arguments else (253, 252, 249))
    assert len(colors) > 50  # there is something on it
