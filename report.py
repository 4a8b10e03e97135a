"""Shows runs to people: an HTML page without script or network, text, and strips of images.

    python report.py runs/phase1                  # writes runs/phase1/report.html
    python report.py runs/phase1 runs/phase2      # writes runs/report.html: both, compared

A run's folder holds some of these files. The page shows what it can of damaged ones and names them.

    metrics.jsonl               one line per iteration: {"iteration": 1, "reward": 0.5, ...}
    results.json                {"tables": [{"title": str, "cells": [[str]]}]}
    samples/NNNN.json           trajectories after NNNN iterations, see `describe`
    config.yaml, command.txt    shown as they are
"""

import argparse
import base64
import io
import json
import os
import shlex
import sys
import textwrap
from html import escape
from pathlib import Path

SHOWN = 100  # trajectories of a file that the page shows
SIDE = 224  # pixels of an image in a strip, and of the thumbnail of a large one
CHARTS = {  # title -> {figure: label}
    "Reward": {"reward": "after the edit", "before": "before"},
    "Validation": {"val_checker": "Checker", "val_sg_iou": "exact SG-IoU"},
    "KL": {"kl": "to the policy without its adapter"},
    "Clipped": {"clipped_low": "below", "clipped_high": "above"},
    "Ratio": {"ratio_error": "max |ρ − 1|"},
    "Replay error": {"replay_error": "max |Δ log-prob|"},
    "Gradient norm": {"grad_norm": "before clipping"},
    "Flat groups": {"flat_groups": "share of groups"},
    "No edit": {"malformed": "malformed", "none": "“none”"},
}


def record(folder, trajectories, iteration=0):
    """Writes trajectories and this program's command into a run's folder. -> its page's path."""
    folder = Path(folder)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    samples = json.dumps([describe(trajectory) for trajectory in trajectories], default=data_uri)
    write(folder / "samples" / f"{iteration:04d}.json", samples)
    write(folder / "command.txt", shlex.join(["python", *sys.argv]) + "\n")
    return report([folder])


def report(folders):
    """Makes the page of some runs, in the only one's folder or beside the first. -> its path."""
    folders = [Path(folder) for folder in folders]
    runs, sections, damaged = {}, [], []
    for folder in folders:
        if not any((folder / n).exists() for n in ("metrics.jsonl", "results.json", "samples")):
            raise ValueError(f"{folder}: no run; name a folder of train.py, eval.py or loop.py")
        runs[str(folder)] = read(folder / "metrics.jsonl", numbered, damaged)
        files = sorted(folder.glob("samples/*.json"), key=lambda path: (len(path.name), path.name))
        when = " before and after training" if len(files) > 1 else ""
        cards = []
        for file in files[:1] + files[1:][-1:]:  # the first and the last
            cards += sum(read(file, gallery, damaged), [])
        cards.sort(key=lambda card: card[0])  # by seed: a prompt before training, then after it
        when += f" (the first {SHOWN})" if len(cards) >= SHOWN else ""
        sections += [
            (f"Results of {folder}", read(folder / "results.json", tables, damaged)),
            (f"Trajectories of {folder}{when}", [card for _, card in cards]),
            (f"Command of {folder}", read(folder / "command.txt", verbatim, damaged)),
            (f"Config of {folder}", read(folder / "config.yaml", verbatim, damaged)),
        ]
    curves = [chart(title, figures, runs) for title, figures in CHARTS.items()]
    names = html(", ".join(dict.fromkeys(damaged)))
    body = ""
    for title, parts in [("Damaged files", names), ("Curves", curves), *sections]:
        content = "".join(parts)
        body += f"<h2>{html(title)}</h2>{content}" if content else ""
    path = (folders[0] if len(folders) == 1 else folders[0].parent) / "report.html"
    write(path, PAGE.format(title=html(", ".join(runs)), style=STYLE, body=body))
    return path


def read(path, use, damaged):
    """[use(text)] of a file, or of each line of a .jsonl file, without what is damaged."""
    if not path.is_file():
        return []
    text, found = path.read_text("utf-8", "replace"), []
    for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
        try:
            found.append(use(part))
        except Exception:  # a damaged file can break anything
            damaged.append(str(path))
    return found


def numbered(line):
    row = json.loads(line)
    return int(float(row["iteration"])), row


def verbatim(text):
    return f"<pre>{html(text)}</pre>"


def tables(text):
    parts = []
    for table in json.loads(text)["tables"]:
        rows = "".join(f"<tr><td>{'<td>'.join(map(html, row))}" for row in table["cells"])
        title = html(table["title"])
        parts.append(f'<div class="wide"><table><caption>{title}</caption>{rows}</table></div>')
    return "".join(parts)


def gallery(text):
    """Trajectories of a file in samples/, as (seed, HTML)."""
    return [(sample["seed"], article(sample)) for sample in json.loads(text)[:SHOWN]]


def article(sample):
    """A trajectory: of every step the image, its verdicts, and the edit that made it."""
    steps, best, items = sample["steps"], sample["best"], []
    for number, step in enumerate(steps):
        verdicts = "".join(
            f'<p class="{"yes" if p >= 0.5 else "no"}"><b>{p:.0%}</b>{html(asked)}'
            f'<i style="--p:{p:.0%}"></i></p>'
            for asked, p in step["verdicts"]
        )
        kind, answer = ("best", ", the answer") if number == best else ("", "")
        items.append(
            f'<li class="{kind}"><img src="{escape(step["image"])}" alt=""><div>'
            f"<p><b>{step['score']:.2f}</b>image {number}{answer}</p>{verdicts}"
            f"<p>{html(edit(step, number))}</p><em>{html(step['thought'])}</em></div>"
        )
    scores = f"{steps[0]['score']:.2f} → {steps[best]['score']:.2f}"
    return (
        f"<article><h3>{html(sample['prompt'])}</h3><em>{scores} · seed {sample['seed']:d}</em>"
        f"<ol>{''.join(items)}</ol></article>"
    )


def chart(title, figures, runs):
    """The curves of some figures of all runs, as SVG; "" if no run logged any."""
    curves = {}  # label -> [(iteration, value)]
    for name, label in figures.items():
        for run, rows in runs.items():
            line = [(x, row[name]) for x, row in rows if type(row.get(name)) in (int, float)]
            line = [(x, y) for x, y in line if abs(y) < 1e99]  # without NaN, too
            if line:
                curves[f"{run}: {label}" if len(runs) > 1 else label] = line
    if not curves:
        return ""
    xs, ys = zip(*sum(curves.values(), []))
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    paths, legend = "", ""
    for number, (label, line) in enumerate(curves.items()):
        look = f'class="curve" style="--hue:{255 + 137.5 * number}"'
        points = [
            f"{340 * (x - left) / (right - left or 1):.1f} "
            f"{150 * (high - y) / (high - low or 1):.1f}"
            for x, y in line[:: len(line) // 400 + 1]  # at most 400
        ]
        paths += f'<path {look} d="M{"L".join(points)}h.1"/>'
        ends = f"{line[0][1]:.3g} → {line[-1][1]:.3g}"
        legend += f"<p {look}>{html(label)} <b>{ends}</b></p>"
    return (
        f"<figure><h3>{title}</h3><em>{low:.3g} to {high:.3g}, iterations {left} to {right}</em>"
        f'<svg viewBox="0 0 340 150">{paths}</svg>{legend}</figure>'
    )


def html(text):
    return escape(visible(text))


def visible(text):
    """The text with escapes such as \\x1b for control characters and lone surrogates."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def describe(trajectory):
    """A trajectory as data for JSON, but for its images, which `record` writes as data URIs."""
    graph = trajectory.graph
    asked = [*graph.labels(), *map(" ".join, graph.triples)]
    steps = [
        {
            "score": float(step.reflection.score),
            "verdicts": [[text, float(p)] for text, p in zip(asked, step.reflection.probs)],
            "source": step.source,
            "thought": step.thought,
            "instruction": step.instruction,
            "repeated": step.repeated,
            "image": step.image,
        }
        for step in trajectory.steps
    ]
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
    return words + (" (tried before: no edit)" if step.get("repeated") else "")


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

    sample, margin = describe(trajectory), 12
    width = len(sample["steps"]) * (SIDE + margin) + margin
    canvas = Image.new("RGB", (width, SIDE + margin + 84), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for number, step in enumerate(sample["steps"]):
        left = margin + number * (SIDE + margin)
        small = max(step["image"].size) < SIDE  # enlarged without smoothing
        method = Image.NEAREST if small else Image.LANCZOS
        image = ImageOps.contain(step["image"], (SIDE, SIDE), method)
        canvas.paste(image, (left, margin + SIDE - image.height))
        color = "#188038" if all(p >= 0.5 for _, p in step["verdicts"]) else "#c5221f"
        best = ", best" if number == sample["best"] else ""
        draw.text((left, SIDE + 20), f"score {step['score']:.2f}{best}", color, font)
        text = textwrap.fill(visible(edit(step, number)), 30, max_lines=3, placeholder=" …")
        draw.text((left, SIDE + 40), text, "#202124", font)
    return canvas


def save_images(trajectory, folder):
    """Writes 0.png, 1.png, ... and strip.png; removes what a longer trajectory left there."""
    folder, number = Path(folder), len(trajectory.steps)
    folder.mkdir(parents=True, exist_ok=True)
    while (folder / "strip.png").exists() and (folder / f"{number}.png").exists():
        (folder / f"{number}.png").unlink()
        number += 1
    for number, step in enumerate(trajectory.steps):
        step.image.save(folder / f"{number}.png")
    strip(trajectory).save(folder / "strip.png")


def write(path, text):
    """Writes a file aside and renames it, so that nobody ever reads half of it."""
    aside = Path(f"{path}.{os.getpid()}.aside")
    aside.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(aside, path)


def say(text):
    """Prints a line. A terminal that lacks a character, or is gone, must not stop a run."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:  # "| head" has ended: what follows goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


STYLE = """
:root { color-scheme: light dark; --muted: color-mix(in srgb, CanvasText 60%, Canvas);
  --rule: color-mix(in srgb, CanvasText 15%, Canvas) }
* { box-sizing: border-box; margin: 0; padding: 0 }
body { font: 14px/1.5 system-ui, sans-serif; max-width: 72rem; margin: auto; padding: 3rem 1.25rem;
  overflow-wrap: anywhere }
h1, h2, h3 { font: 500 1.1rem/1.25 Palatino, Georgia, serif }
h1 { font-size: 2.6rem } h2 { font-size: 1.6rem; margin: 3rem 0 1.25rem }
em, caption { color: var(--muted) } pre { white-space: pre-wrap }
.wide { overflow-x: auto; margin-bottom: 2rem }
table { border-collapse: collapse; white-space: nowrap }
td { text-align: right; padding: .35rem .55rem; border-bottom: 1px solid var(--rule) }
caption, td:first-child { text-align: left }
figure { display: inline-block; vertical-align: top; width: min(100%, 21.5rem);
  margin: 0 1.5rem 2rem 0 }
svg { overflow: visible; margin: .5rem 0; border-bottom: 1px solid var(--rule) }
.curve { color: oklch(.6 .14 var(--hue)) }
path { stroke: currentColor; stroke-width: 1.75; fill: none; stroke-linecap: round }
article { border-top: 1px solid var(--rule); padding: 1rem 0 2rem }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 230px), 1fr));
  gap: 1.5rem; margin-top: 1rem; list-style: none }
img { width: 100% } img[src^="data:image/png"] { image-rendering: pixelated }
.best img { outline: 3px solid; outline-offset: 2px }
li p { margin: .3rem 0 } li b { float: right; margin-left: .5rem }
i { display: block; clear: both; height: 3px; background:
  linear-gradient(currentColor 0 0) 0 / var(--p) 100% no-repeat var(--rule) }
.no { color: light-dark(#b3372b, #f08b7c) } .yes i { color: #2c9a5b }
@media (max-width: 40rem) {
  li { display: grid; grid-template-columns: 2fr 3fr; gap: 1rem; align-items: start } }
"""
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title} · RL-RIG</title>
<style>{style}</style>
<em>RL-RIG · Generate, Reflect, Edit</em>
<h1>{title}</h1>
{body}
</html>
"""


def main():
    parser = argparse.ArgumentParser(description="Makes the page of a run, or compares several.")
    parser.add_argument("runs", nargs="+", metavar="run", help="folder, such as runs/phase1")
    try:
        say(str(report(parser.parse_args().runs)))
    except (ValueError, OSError) as error:
        sys.exit(" ".join(f"report.py: {error}".split()))


if __name__ == "__main__":
    main()
