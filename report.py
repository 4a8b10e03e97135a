"""Shows runs to people: an HTML page without script or network, text, and strips of images.

    python report.py runs/phase1        # writes runs/phase1/report.html

A run's folder holds some of these files:

    metrics.jsonl               one line per iteration: {"iteration": 1, "reward": 0.5, ...}
    results.json                {"tables": [{"title": str, "cells": [[str]]}]}
    samples/NNNN.json           trajectories after NNNN iterations, see `describe`
    config.yaml, command.txt    shown as they are
"""

import argparse
import base64
import io
import json
import math
import os
import shlex
import sys
import textwrap
from contextlib import suppress
from html import escape
from pathlib import Path

SHOWN = 100  # trajectories of a file that the page shows
SIDE = 224  # pixels of an image in a strip, and of the thumbnail of a large one


def record(folder, trajectories, iteration=0):
    """Write trajectories and this program's command into a run's folder. -> its page's path."""
    folder = Path(folder)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    samples = json.dumps([describe(trajectory) for trajectory in trajectories], default=data_uri)
    write(folder / "samples" / f"{iteration:04d}.json", samples)
    write(folder / "command.txt", shlex.join(["python", *sys.argv]) + "\n")
    return report([folder])[0]


def report(folders):
    """Make the page of each run, report.html in its folder. -> their paths."""
    pages = []
    for folder in map(Path, folders):
        samples = [path for path in folder.glob("samples/*.json") if path.stem.isdecimal()]
        samples.sort(key=lambda path: int(path.stem))
        first_and_last = samples[:1] + samples[1:][-1:]
        body = section("Results", tables, folder / "results.json")
        body += section("Curves", curves, folder / "metrics.jsonl")
        body += section("Trajectories", gallery, *first_and_last)
        body += section("Command", verbatim, folder / "command.txt")
        body += section("Config", verbatim, folder / "config.yaml")
        if not body:
            raise ValueError(f"{folder}: no run; name a folder of train.py, eval.py or loop.py")
        pages.append(folder / "report.html")
        write(pages[-1], PAGE.format(title=html(str(folder)), style=STYLE, body=body))
    return pages


def section(title, show, *files):
    """A part of the page: what `show` makes of the texts of those files that exist."""
    files = [file for file in files if file.exists()]
    try:
        shown = show(*(file.read_text("utf-8") for file in files)) if files else ""
    except Exception as error:  # of any type, whatever the files hold instead
        names = ", ".join(map(str, files))
        raise ValueError(f"{names}: cannot be shown ({type(error).__name__}: {error})") from None
    return f"<h2>{title}</h2>{shown}" if files else ""


def verbatim(text):
    return f"<pre>{html(text)}</pre>"


def tables(text):
    parts = ""
    for table in json.loads(text)["tables"]:
        parts += f"<table><caption>{html(table['title'])}</caption>"
        for row in table["cells"]:
            parts += "<tr>" + "".join(f"<td>{html(cell)}</td>" for cell in row)
        parts += "</table>"
    return parts


def curves(text):
    """A chart of every figure that was logged, as SVG."""
    series = {}  # name -> [(iteration, value)]
    for line in text.splitlines():
        with suppress(ValueError, AttributeError, KeyError):  # a killed run may leave half a line
            row = json.loads(line)
            iteration = row.pop("iteration")
            for name, value in row.items():
                if type(value) in (int, float) and math.isfinite(value):
                    series.setdefault(name, []).append((iteration, value))
    parts = ""
    for name, points in series.items():
        xs, ys = zip(*points)
        low, high = min(ys), max(ys)
        span = high - low if high - low > 1e-4 * abs(high) else math.inf  # rounding is no curve
        path = "L".join(
            f"{300 * (x - xs[0]) / (xs[-1] - xs[0] or 1):.1f} {90 - 90 * (y - low) / span:.1f}"
            for x, y in points[:: len(points) // 400 + 1]  # at most 400
        )
        parts += f"<figure><p><b>{ys[0]:.3g} → {ys[-1]:.3g}</b>{html(name)}"
        parts += f'<svg viewBox="0 0 300 90"><path d="M{path}h.1"/></svg>'
        parts += f"<em>{low:.3g} to {high:.3g}, iterations {xs[0]} to {xs[-1]}</em></figure>"
    return parts


def gallery(*texts):
    samples = [sample for text in texts for sample in json.loads(text)[:SHOWN]]
    parts = f"<p>The first {SHOWN}." if len(samples) >= SHOWN else ""
    if len(texts) > 1:
        parts += "<p>Each prompt before training, then at the last validation."
    for sample in sorted(samples, key=lambda sample: sample["seed"]):
        steps, best = sample["steps"], sample["best"]
        scores = f"{steps[0]['score']:.2f} → {steps[best]['score']:.2f}"
        parts += f"<h3>{html(sample['prompt'])}</h3><em>{scores} · seed {sample['seed']}</em><ol>"
        for number, step in enumerate(steps):
            mark = "best" if number == best else ""
            parts += f'<li class="{mark}"><img src="{escape(step["image"])}" alt="image {number}">'
            parts += f"<p><b>{step['score']:.2f}</b>image {number} {mark}"
            for asked, p in step["verdicts"]:
                parts += f'<p class="{"yes" if p >= 0.5 else "no"}"><b>{p:.0%}</b>{html(asked)}'
            if number:
                parts += f"<p>edit: {html(edit(step, number))}"
                parts += f"<p><em>thought: {html(step['thought'])}</em>" if step["thought"] else ""
        parts += "</ol>"
    return parts


def html(text):
    return escape(visible(text))


def visible(text):
    """The text with escapes such as \\x1b for control characters and lone surrogates."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def describe(trajectory):
    """A trajectory as data for JSON, but for its images, which `record` writes as data URIs."""
    graph, steps = trajectory.graph, []
    asked = [*graph.labels(), *map(" ".join, graph.triples)]
    for step in trajectory.steps:
        names = ("image", "source", "thought", "instruction", "repeated", "attempts")
        about = {name: getattr(step, name) for name in names}
        about["score"] = float(step.reflection.score)
        about["verdicts"] = [[text, float(p)] for text, p in zip(asked, step.reflection.probs)]
        steps.append(about)
    best = trajectory.best_index
    return {"prompt": graph.prompt(), "seed": trajectory.seed, "best": best, "steps": steps}


def data_uri(image):
    """A small image as PNG, exact; a large one as a thumbnail of a few kilobytes."""
    kind = "png" if max(image.size) <= 128 else "webp"
    file, image = io.BytesIO(), image.convert("RGB")
    image.thumbnail((SIDE, SIDE))  # leaves a smaller image as it is
    image.save(file, kind, quality=60)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def edit(step, number):
    """What made image `number`, in words."""
    if number == 0:
        return "generated"
    words = " ".join((step["instruction"] or "(malformed: no edit)").split())
    if step["source"] != number - 1:
        words += f" (image {step['source']})"
    words += f" (asked {step['attempts']} times)" if step.get("attempts", 1) > 1 else ""
    return words + (" (tried before: no edit)" if step["repeated"] else "")


def story(trajectory):
    """A trajectory as text for the terminal, in the order things happened."""
    sample = describe(trajectory)
    lines = [sample["prompt"]]
    for number, step in enumerate(sample["steps"]):
        if number:
            lines.append(f"    thinks: {' '.join(step['thought'].split())}")
            lines.append(f"    edits:  {edit(step, number)}")
        best = "  <- best" if number == sample["best"] else ""
        lines.append(f"\n  image {number}: score {step['score']:.2f}{best}")
        for asked, p in step["verdicts"]:
            lines.append(f"    {'yes' if p >= 0.5 else ' no'} {p:4.0%}  {asked}")
    return visible("\n".join(lines))


def strip(trajectory):
    """The images of a trajectory in a row, with score and edit below. -> PIL image."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    sample = describe(trajectory)
    canvas = Image.new("RGB", (len(sample["steps"]) * (SIDE + 12) + 12, SIDE + 96), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for number, step in enumerate(sample["steps"]):
        left = 12 + number * (SIDE + 12)
        small = max(step["image"].size) < SIDE  # enlarged without smoothing
        method = Image.NEAREST if small else Image.LANCZOS
        canvas.paste(ImageOps.contain(step["image"], (SIDE, SIDE), method), (left, 12))
        best = ", best" if number == sample["best"] else ""
        text = textwrap.fill(visible(edit(step, number)), 30, max_lines=3, placeholder=" …")
        draw.text((left, SIDE + 20), f"score {step['score']:.2f}{best}\n{text}", "black", font)
    return canvas


def save_images(trajectory, folder):
    """Write 0.png, 1.png, ... and strip.png."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(trajectory.steps):
        step.image.save(folder / f"{number}.png")
    strip(trajectory).save(folder / "strip.png")


def remove_images(folder):
    """Remove what `save_images` wrote in a folder and in its folders 0000, 0001, ..."""
    for path in [*Path(folder).glob("strip.png"), *Path(folder).glob("[0-9]*/strip.png")]:
        path.unlink()
        number = 0
        while (image := path.with_name(f"{number}.png")).exists():
            image.unlink()
            number += 1
        with suppress(OSError):  # it holds something else
            path.parent.rmdir()


def write(path, text):
    """Write a file aside and rename it, so that nobody ever reads half of it."""
    aside = Path(f"{path}.{os.getpid()}.aside")
    try:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(aside, path)
    except OSError as error:  # of a full disk, for example: it does not name the file
        aside.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error})") from None


def say(text):
    """Print a line. A terminal that lacks a character, or is gone, must not stop a run."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:  # "| head" has ended, or the disk is full: what follows goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


STYLE = """
:root { color-scheme: light dark }
body { font: 14px/1.5 system-ui, sans-serif; max-width: 74rem; margin: auto; padding: 2rem 1rem;
  overflow-wrap: anywhere }
h2 { margin: 3rem 0 1rem } h3 { margin: 2rem 0 0; padding-top: 1rem; border-top: 1px solid #8886 }
p { margin: .3rem 0 } em, caption { opacity: .7 } pre { white-space: pre-wrap }
b { float: right; margin-left: .5rem }
table { display: block; overflow-x: auto; white-space: nowrap; border-spacing: 0; margin: 2rem 0 }
td { text-align: right; padding: .35rem .55rem; border-bottom: 1px solid #8886 }
caption, td:first-child { text-align: left }
figure { display: inline-block; vertical-align: top; width: min(100%, 16.7rem);
  margin: 0 1.5rem 2rem 0 }
svg { display: block; overflow: visible; margin: .5rem 0; border-bottom: 1px solid #8886 }
path { stroke: light-dark(#1f6fd0, #77aef5); stroke-width: 1.75; fill: none }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 1.5rem 1rem;
  padding: 0; list-style: none }
img { width: 100% } img[src^="data:image/png"] { image-rendering: pixelated }
.best img { outline: 3px solid; outline-offset: 2px }
.no { color: light-dark(#b3372b, #f08b7c) }
"""
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · RL-RIG</title>
<style>{style}</style>
<h1>{title}</h1>
{body}
</html>
"""


def main():
    parser = argparse.ArgumentParser(description="Makes the page of runs, from their files.")
    parser.add_argument("runs", nargs="+", metavar="run", help="folder, such as runs/phase1")
    try:
        for page in report(parser.parse_args().runs):
            say(str(page))
    except (ValueError, OSError) as error:
        sys.exit(" ".join(f"report.py: {error}".split()))


if __name__ == "__main__":
    main()
