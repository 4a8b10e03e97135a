"""Shows runs to a person: one self-contained HTML page, without script or network.

    python report.py runs/phase1                  # writes runs/phase1/report.html
    python report.py runs/phase1 runs/phase2      # writes runs/report.html: both, compared

Made by `record` of `train.py`, `eval.py`, `loop.py`, too. A run may lack any of these:

    metrics.jsonl           a line an iteration: {"iteration": 1, "reward": 0.5, ...}
    seconds.jsonl           a line an iteration: {"iteration": 1, "generate": 0.2, ...}
    results.json            the rows of eval.py
    samples/<number>.json   trajectories after so many iterations, as `story.album` gives them:
                            [{"prompt", "seed", "best": index of the answer, "steps": [{"score",
                            "verdicts": [[text, P(yes)]], "thought", "instruction", "source":
                            index of the picture it edits, "image": data URI}]}]; the first set
                            and the last are shown
    config.yaml, command.txt
"""

import argparse
import json
import math
import operator
import os
import shlex
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import SimpleNamespace

import charts
import story
from table import grids, html, key_figures

BUDGET = 8_000_000  # characters of trajectories in a page
UNREADABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
INTERVALS = "<p>With 95% intervals of the paired bootstrap:</p>"


@dataclass
class Run:
    """What a run's folder holds, as far as it can be read."""

    name: str
    metrics: list  # dicts, by iteration
    seconds: list  # dicts, by iteration
    results: list  # HTML tables of eval.py's rows
    albums: dict  # iteration -> trajectories: the first set and the last
    config: str
    command: str
    broken: list  # names of files that cannot be read, or not to the end


def read_run(folder, name):
    """Reads a folder. Raises ValueError if it holds no run."""
    sets = {int(p.stem): p for p in folder.glob("samples/*.json") if p.stem.isdecimal()}
    if not sets and not any((folder / n).is_file() for n in ("metrics.jsonl", "results.json")):
        what = "holds no metrics, results or samples" if folder.is_dir() else "there is no folder"
        raise ValueError(f"{folder}: {what}; name one that train.py, eval.py or loop.py wrote")
    broken = []

    def text(path):
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def decode(path, text, use):
        try:
            return use(json.loads(text))
        except UNREADABLE:
            broken.append(path.relative_to(folder).as_posix())

    def lines(path):
        pairs = [
            decode(path, line, lambda row: (float(operator.index(row["iteration"])), row))
            for line in text(path).splitlines()
        ]
        return [row for _, row in sorted(dict(filter(None, pairs)).items())]

    def results(rows):
        for row in rows:
            for column, values in row["values"].items():
                row["values"][column] = [math.nan if v is None else float(v) for v in values]
        return [html(cells) for cells in grids([SimpleNamespace(**row) for row in rows])]

    def trajectories(told):
        return [each for each in told if story.article(each)]  # told in full, or it raises

    ends = sorted({min(sets), max(sets)}) if sets else []
    albums = {n: decode(sets[n], text(sets[n]), trajectories) for n in ends}
    rows = folder / "results.json"
    return Run(
        name=name,
        metrics=lines(folder / "metrics.jsonl"),
        seconds=lines(folder / "seconds.jsonl"),
        results=decode(rows, text(rows), results) or [] if rows.is_file() else [],
        albums={number: told for number, told in albums.items() if told},
        config=text(folder / "config.yaml"),
        command=text(folder / "command.txt").strip(),
        broken=list(dict.fromkeys(broken)),
    )


def section(title, content, about=""):
    """A part of the page; "" if it has nothing to show."""
    about = f" <small>{escape(about)}</small>" * bool(about)
    return f"<section><h2>{title}{about}</h2>{content}</section>" if content else ""


def origin(run, runs):
    """The command and the config that made a run; what other runs have otherwise is marked."""
    others = [set(other.config.splitlines()) for other in runs if other is not run and other.config]
    config = "\n".join(
        escape(line) if all(line in other for other in others) else f"<mark>{escape(line)}</mark>"
        for line in run.config.splitlines()
    )
    summary = "config.yaml" + ", differences marked" * bool(others)
    content = f"<pre>{escape(run.command)}</pre>" * bool(run.command)
    if config:
        content += f"<details><summary>{summary}</summary><pre>{config}</pre></details>"
    return section("Made by", content, run.name * (len(runs) > 1))


def page(runs):
    """The HTML of some runs."""
    title = escape(", ".join(run.name for run in runs))
    figures = {run.name: run.metrics for run in runs if run.metrics}
    if len(runs) == 1:  # of several, colours tell the runs apart, not the stages
        seconds = {row["iteration"]: row for row in runs[0].seconds}
        figures = {n: [r | seconds.get(r["iteration"], {}) for r in m] for n, m in figures.items()}
    curves = charts.charts(figures)
    curves = f'<div class="charts">{curves}</div>' * bool(curves)
    overview = "".join(map(html, key_figures(runs)))
    parts = [section("Overview", overview), section("Curves", curves, "by iteration")]
    for number, run in enumerate(runs):
        name = run.name * (len(runs) > 1)
        broken = f"<p>{', '.join(run.broken)}</p>" * bool(run.broken)
        parts.append(section("Not read, or not in full", broken, name))
        parts.append(section("Results", INTERVALS.join(run.results), name))
        albums = list(run.albums.items())  # at most two, by iteration
        if len(albums) > 1:
            (begin, first), (end, last) = albums
            pairs = story.before_and_after(first, last)
            about = f"{name} after {begin} and after {end} iterations"
            parts.append(section("Before and after", pairs, about))
        if albums:
            cards = story.gallery(albums[-1][1], f"filter{number}", BUDGET // len(runs))
            when = f" after {albums[-1][0]} iterations" * bool(run.metrics)
            about = name + when + " of the last row" * bool(run.results)
            parts.append(section("Trajectories", cards, about))
    parts += [origin(run, runs) for run in runs]
    style = STYLE + charts.STYLE + story.STYLE
    return TEMPLATE.format(title=title, style=style, body="".join(parts))


def write(path, text):
    """Written aside and renamed, so that nobody ever sees half of it."""
    aside = path.with_name(f"{path.name}.aside")
    aside.write_text(text, encoding="utf-8", errors="replace")
    os.replace(aside, path)


def report(folders):
    """Makes the page of some runs: in the only one's folder, or beside the first. -> its path."""
    folders = list(dict.fromkeys(map(Path, folders)))
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [read_run(folder, name) for folder, name in zip(folders, names)]
    path = (folders[0] if len(runs) == 1 else folders[0].parent) / "report.html"
    write(path, page(runs))
    return path


def record(folder, trajectories, iteration=0):
    """Writes samples and this program's command into a run's folder; makes its page; -> path."""
    folder = Path(folder)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    told = json.dumps(story.album(trajectories))
    write(folder / "samples" / f"{iteration:04d}.json", told)
    write(folder / "command.txt", shlex.join(["python", *sys.argv]) + "\n")
    return report([folder])


STYLE = """
:root {
  color-scheme: light dark; --paper: #fdfcf9; --ink: #22201c; --muted: #6f6a61; --rule: #e4dfd5;
  --yes: #2c7a4b; --no: #b3372b;
}
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #17181b; --ink: #e7e4dd; --muted: #9d988e; --rule: #34363b }
  :root { --yes: #6cc493; --no: #f08b7c }
}
* { box-sizing: border-box }
body {
  background: var(--paper); color: var(--ink); margin: 0 auto; padding: 3rem 1.25rem;
  max-width: 72rem; font: 14px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere;
}
h1, h2, h3 {
  font-family: "Iowan Old Style", Palatino, "Palatino Linotype", Georgia, serif; font-weight: 500;
  line-height: 1.25; margin: 0;
}
h1 { font-size: 2.6rem } h3 { font-size: 1.1rem }
h2 { font-size: 1.6rem; margin: 0 0 1.25rem }
small { color: var(--muted); font-size: .9rem; margin-left: .5rem }
b { font-weight: 600; white-space: nowrap } summary { cursor: pointer }
body > header p { color: var(--muted); margin: 0; letter-spacing: .04em }
section { margin-top: 3.5rem } .wide { overflow-x: auto; margin: 0 0 1.5rem }
table { border-collapse: collapse; white-space: nowrap; overflow-wrap: normal }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--rule) }
th { font-weight: 500; color: var(--muted) }
th:first-child { text-align: left; padding-left: 0 }
tr:first-child th { white-space: normal; vertical-align: bottom }
pre { white-space: pre-wrap; padding: 1rem; border: 1px solid var(--rule); font-size: 12.5px }
mark { background: color-mix(in srgb, var(--no) 22%, transparent); color: inherit }
@media print {
  :root { color-scheme: light; --paper: #fff }
  body { padding: 0 5px; font-size: 8pt } h2 { break-after: avoid }
  details::details-content { content-visibility: visible; block-size: auto }
}
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title} · RL-RIG</title>
<style>{style}</style>
<body>
<header><p>RL-RIG · Generate, Reflect, Edit</p><h1>{title}</h1></header>
<main>{body}</main>
</body>
</html>
"""


def main():
    parser = argparse.ArgumentParser(description="Makes the page of runs; compares several.")
    parser.add_argument("runs", nargs="+", metavar="run", help="folder, such as runs/phase1")
    try:
        print(report(parser.parse_args().runs))
    except (ValueError, OSError) as error:
        sys.exit(" ".join(f"report.py: {error}".split()))


if __name__ == "__main__":
    main()
