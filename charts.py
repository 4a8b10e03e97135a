"""Curves of training runs as SVG, by hand: nothing to install, nothing to run in the browser.

A row is a dict of figures with its "iteration". Colours are classes c0 to c5, dashes d0 and d1; the
page defines --ink, --muted and --rule beside STYLE.
"""

import math
from html import escape

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24  # margins
CHARTS = [  # title, note, figure -> label
    (
        "Reward",
        "The Checker’s score after the edit; band: one standard deviation of the samples.",
        {"reward": "reward", "before": "before the edit"},
    ),
    (
        "Validation",
        "Where the exact metric parts from the Checker’s score, the reward is being hacked.",
        {"val_checker": "Checker", "val_sg_iou": "exact SG-IoU"},
    ),
    ("KL", "To the policy with its adapter switched off.", {"kl": "KL"}),
    (
        "Clipped",
        "Share of tokens or denoising steps whose ratio the clip held.",
        {"clipped_low": "below", "clipped_high": "above"},
    ),
    (
        "Ratio",
        "How far the updates of an iteration move the policy.",
        {"ratio_error": "max |ρ − 1|"},
    ),
    (
        "Replay error",
        "Log-probs replayed before the first update, against the recorded ones.",
        {"replay_error": "max |Δ log-prob|"},
    ),
    ("Gradient norm", "Before it is cut to its maximum.", {"grad_norm": "norm"}),
    ("Flat groups", "Share of groups with nothing to learn from.", {"flat_groups": "flat"}),
    ("No edit", "Share of completions.", {"malformed": "malformed", "none": "“none”"}),
    (
        "Seconds",
        "Of an iteration, by stage.",
        {name: name for name in ("generate", "act", "edit", "check", "update")},
    ),
]
BANDS = {"reward": "reward_std"}
LOGARITHMIC = ("ratio_error", "replay_error")
STYLE = """
:root {
  --c0: #2563a8; --c1: #c05621; --c2: #2f855a; --c3: #8a4fa3; --c4: #a07a1c; --c5: #3f8791;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --c0: #74abe8; --c1: #ee9a62; --c2: #6cc493; --c3: #c495dc; --c4: #dcb85a; --c5: #7cc5cf;
  }
}
.c0 { --c: var(--c0) } .c1 { --c: var(--c1) } .c2 { --c: var(--c2) }
.c3 { --c: var(--c3) } .c4 { --c: var(--c4) } .c5 { --c: var(--c5) }
.charts { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)) }
.charts figure { margin: 0; break-inside: avoid }
.charts svg { width: 100%; display: block; margin: .5rem 0; overflow: visible }
.charts text { font-size: 10.5px; fill: var(--muted) }
.charts .x { text-anchor: middle }
.charts .y { text-anchor: end }
.charts .grid { stroke: var(--rule) }
.charts .line { stroke: var(--c); fill: none; stroke-width: 1.75; stroke-linejoin: round }
.charts .line.d1 { stroke-dasharray: 5 3 }
.charts .band { fill: var(--c); opacity: .14 }
.charts circle { fill: var(--c) }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; list-style: none; padding: 0; margin: 0 }
.legend i { display: inline-block; width: 1.5em; margin: 0 .4em .25em 0; border-top: 2px solid }
.legend i { border-color: var(--c) }
.legend .d1 { border-top-style: dashed }
.charts figcaption { color: var(--muted); margin-top: .25rem }
"""


def charts(runs):
    """SVG figures of all that is logged. Args: runs: name -> rows, by iteration."""
    return "".join(chart(*words, runs) for words in CHARTS)


def points(rows, name):
    """[(iteration, value)] of one figure, where it is a number that can be drawn."""
    pairs = [(row["iteration"], row.get(name)) for row in rows]
    numbers = [(x, y) for x, y in pairs if type(y) in (int, float)]
    return [(x, y) for x, y in numbers if y == 0 or 1e-300 < abs(y) < 1e300]


def ticks(low, high, log=False):
    """Round numbers, about four steps apart, from at most `low` to at least `high`."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return [10.0**power for power in range(first, max(last, first + 1) + 1)]
    span = high - low
    if span <= 1e-6 * abs(high):  # all but alike
        span = abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 4)
    first = math.floor(low / step)
    return [step * count for count in range(first, max(math.ceil(high / step), first + 1) + 1)]


def chart(title, note, figures, runs):
    """One SVG and its legend; "" where no run logged any of the figures."""
    log = any(name in LOGARITHMIC for name in figures)
    curves = []  # (label, classes, points, band as (x, low, high))
    for number, (run, rows) in enumerate(runs.items()):
        for index, (name, label) in enumerate(figures.items()):
            line = [(x, y) for x, y in points(rows, name) if y > 0 or not log]
            spread = dict(points(rows, BANDS.get(name)))
            band = [(x, y - spread[x], y + spread[x]) for x, y in line if x in spread]
            color = number if len(runs) > 1 else index
            label = f"{run}: {label}" if len(runs) > 1 else label
            if line:
                curves.append((label, f"c{color % 6} d{index}", line, band))
    if not curves:
        return ""
    xs = [x for _, _, line, _ in curves for x, _ in line]
    ys = [y for _, _, line, _ in curves for _, y in line]
    ys += [y for *_, band in curves for _, *edges in band for y in edges]
    marks = ticks(min(ys), max(ys), log)

    def across(x):
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - min(xs)) / (max(xs) - min(xs) or 1)

    def up(y):
        low, high, y = (math.log10(v) if log else v for v in (marks[0], marks[-1], y))
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)

    def path(pairs):
        return "M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in pairs)

    parts, legend, words = [], [], []
    for mark in marks[:: len(marks) // 7 + 1]:
        parts.append(f'<path class="grid" d="M{LEFT} {up(mark):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{up(mark) + 3.5:.1f}">{mark:.3g}</text>')
    for mark in sorted({round(x) for x in ticks(min(xs), max(xs)) if min(xs) <= x <= max(xs)}):
        parts.append(f'<text class="x" x="{across(mark):.1f}" y="{HEIGHT - 6}">{mark}</text>')
    for label, style, line, band in curves:
        if band:
            edge = [(x, low) for x, low, _ in band] + [(x, high) for x, _, high in band[::-1]]
            parts.append(f'<path class="band {style}" d="{path(edge)}Z"/>')
        parts.append(f'<path class="line {style}" d="{path(line)}"/>')
        for x, y in line if len(line) <= 12 else ():
            parts.append(f'<circle class="{style}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.2"/>')
        (start, first), (end, last) = line[0], line[-1]
        words.append(f"{label} from {first:.3g} (iteration {start}) to {last:.3g} ({end})")
        legend.append(f'<li><i class="{style}"></i>{escape(label)} <b>{last:.3g}</b></li>')
    told = escape(f"{title}: {'; '.join(words)}")
    return (
        f'<figure><h3>{title}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{told}">{"".join(parts)}</svg><ul class="legend">{"".join(legend)}</ul>'
        f"<figcaption>{note}</figcaption></figure>"
    )
