"""Draws docs/scaling.png: what more compute buys, for best-of-N and for the three loops.

Left: exact SG-IoU against flow-model tokens per prompt, after every round of a loop and after every
further image of best-of-N. Right: the same at equal tokens, by the number of relations in a prompt.
The numbers are kept in docs/scaling.json, so that the picture can be drawn again without measuring.
Also prints which system is ahead at equal seconds; for that, let nothing else run.

    pip install matplotlib
    python tiny/make/scaling.py                     # measure on the test prompts of eval.yaml, draw
    python tiny/make/scaling.py --draw              # only draw
    python tiny/make/scaling.py evaluation.data=tiny/data/val.json --out runs/val
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
from tqdm import tqdm

from config import LoopConfig, load_config
from eval import Meter, bootstrap, first_images, interval_text, systems
from loop import build
from sgiou import load_graphs
from tiny.world import exact_scores

ROUNDS = 12
IMAGES = 40  # at most, of best-of-N
TICKS = 200, 300, 400, 600, 800, 1000
COLORS = {"best of N": "#8a8577", "loop": "#74a0d8", "loop + phase 1": "#2f6fb5"}
COLORS["loop + phase 1 + 2"] = "#c8501e"


def scores(trajectories):
    """Exact SG-IoU of every trajectory's best image so far."""
    images = [t.best.image for t in trajectories]
    measured = exact_scores(images, [t.graph for t in trajectories])
    return [round(score["sg_iou"], 4) for score in measured]


def measure(loop, graphs, settings, rounds):
    """{curve: [{"tokens": per prompt, "seconds": per prompt, "scores": one per prompt}, ...]}"""

    def point(meter, before, trajectories):
        """A point of a curve, after what the meter counted."""
        costs = {"tokens": meter.flow_tokens, "seconds": meter.seconds}
        costs = {name: before[name] + cost / len(graphs) for name, cost in costs.items()}
        return costs | {"scores": scores(trajectories)}

    with Meter(loop) as generation:
        first = loop.start(graphs, [settings.seed + number for number in range(len(graphs))])
    start = point(generation, {"tokens": 0, "seconds": 0}, first)
    curves = {}
    for name, system in systems(loop, settings.untrained_temperature):
        trajectories, curve = first_images(first), [start]
        for _ in tqdm(range(ROUNDS), desc=name):
            with Meter(loop) as meter:
                system.advance(trajectories)
            curve.append(point(meter, curve[-1], trajectories))
        curves[name] = curve
    trajectories, curve = first_images(first), [start]
    tokens = max(curve[-1]["tokens"] for curve in curves.values())
    seconds = max(curve[rounds]["seconds"] for curve in curves.values())
    for number in tqdm(range(1, IMAGES), desc="best of N"):
        active = [t for t in trajectories if not t.best.reflection.satisfied]
        if not active or (curve[-1]["tokens"] > tokens and curve[-1]["seconds"] > seconds):
            break
        with Meter(loop) as meter:
            seeds = [t.seed + 1_000_003 * number for t in active]
            more = loop.start([t.graph for t in active], seeds)
        for trajectory, made in zip(active, more):
            trajectory.steps += made.steps
        curve.append(point(meter, curve[-1], trajectories))
    return {"best of N": curve} | curves


def at(curve, unit, amount):
    """Scores per prompt at so many "tokens" or "seconds", between the nearest points of a curve."""
    for left, right in zip(curve, curve[1:]):
        if left[unit] <= amount <= right[unit]:
            part = (amount - left[unit]) / (right[unit] - left[unit])
            return [(1 - part) * a + part * b for a, b in zip(left["scores"], right["scores"])]
    return curve[-1 if amount > curve[-1][unit] else 0]["scores"]


def print_equal_seconds(curves, rounds):
    """Each loop after so many rounds, against best-of-N in as many seconds."""
    print("| | seconds | SG-IoU | best of N in these seconds | difference |\n|---|---|---|---|---|")
    for name, curve in curves.items():
        if name != "best of N":
            seconds, scores = curve[rounds]["seconds"], curve[rounds]["scores"]
            other = at(curves["best of N"], "seconds", seconds)
            means = [f"{bootstrap(values)[0]:.3f}" for values in (scores, other)]
            cells = [f"{seconds:.3f}", *means, interval_text(scores, other)]
            print(f"| {name} | {' | '.join(cells)} |")


def draw(data, rounds, path):
    """rounds: of the loop that the right panel compares, at that loop's tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(3, 2))
    last = max(curve[-1]["tokens"] for n, curve in data["curves"].items() if n != "best of N")
    for name, curve in data["curves"].items():
        curve = [point for point in curve if point["tokens"] < 1.1 * last]
        means = [bootstrap(point["scores"]) for point in curve]
        tokens = [point["tokens"] for point in curve]
        left.plot(tokens, [m for m, *_ in means], "o-", color=COLORS[name], ms=4, label=name)
        left.fill_between(
            tokens,
            [low for _, low, _ in means],
            [high for *_, high in means],
            color=COLORS[name],
            alpha=0.15,
            lw=0,
        )
    left.set_xscale("log")
    left.set_xticks(TICKS, [f"{tick:,}" for tick in TICKS])
    left.minorticks_off()
    left.set_xlabel("flow-model tokens per prompt")
    left.set_ylabel("SG-IoU (exact)")
    left.legend(frameon=False, loc="lower right")
    left.grid(alpha=0.25)
    budget = max(curve[rounds]["tokens"] for n, curve in data["curves"].items() if n != "best of N")
    left.axvline(budget, color="#bbbbbb", lw=1, ls=":")
    counts = sorted(set(data["relations"]))
    width = 0.8 / len(data["curves"])
    for index, (name, curve) in enumerate(data["curves"].items()):
        values = at(curve, "tokens", budget)
        bars = [
            bootstrap([v for v, n in zip(values, data["relations"]) if n == count])
            for count in counts
        ]
        xs = [x + (index - (len(data["curves"]) - 1) / 2) * width for x in range(len(counts))]
        errors = [[m - low for m, low, _ in bars], [high - m for m, _, high in bars]]
        right.bar(xs, [m for m, *_ in bars], width, color=COLORS[name], yerr=errors, ecolor="#555")
    right.set_xticks(range(len(counts)), counts)
    right.set_xlabel("relations in the prompt")
    right.set_title(f"at {budget:,.0f} tokens per prompt", fontsize=11)
    right.grid(axis="y", alpha=0.25)
    right.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path, dpi=160)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--config", default="eval.yaml")
    parser.add_argument("--draw", action="store_true", help="from the numbers that are there")
    parser.add_argument("--out", default="docs/scaling", help="path without its ending")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, LoopConfig, arguments.overrides)
    numbers = Path(f"{arguments.out}.json")
    if not arguments.draw:
        graphs = load_graphs(config.evaluation.data, config.relations)
        curves = measure(build(config), graphs, config.evaluation, config.rounds)
        relations = [len(graph.triples) for graph in graphs]
        numbers.parent.mkdir(parents=True, exist_ok=True)
        numbers.write_text(json.dumps({"curves": curves, "relations": relations}))
        print_equal_seconds(curves, config.rounds)
    draw(json.loads(numbers.read_text()), config.rounds, f"{arguments.out}.png")
    print(f"{arguments.out}.png")


if __name__ == "__main__":
    main()
