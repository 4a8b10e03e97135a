"""Draws docs/curves.png: the curves of a healthy and of a broken run of phase 1.

All curves but the last are means of five iterations.

    pip install matplotlib
    python train.py --phase 1 seed=1 run=runs/healthy
    python train.py --phase 1 seed=1 run=runs/broken learning_rate=2e-2 iterations=40
    python tiny/make/curves.py runs/healthy runs/broken
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
AVERAGED = 5  # iterations
PANELS = {  # title -> the figure that it shows
    "reward - before": lambda row: row["reward"] - row["before"],
    "KL": lambda row: row["kl"],
    "flat groups": lambda row: row["flat_groups"],
    "malformed": lambda row: row["malformed"],
}


def main():
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 5, figsize=(15, 3), layout="constrained")
    looks = {"healthy": {"color": "#2f6fb5"}, "broken": {"color": "#c8501e", "ls": "--"}}
    for folder, (label, look) in zip(sys.argv[1:], looks.items()):
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
        for axis, (title, figure_of) in zip(axes, PANELS.items()):
            points = []  # (iteration, mean of the last few)
            for last in range(AVERAGED, len(rows)):
                values = [figure_of(row) for row in rows[last - AVERAGED + 1 : last + 1]]
                points.append((rows[last]["iteration"], sum(values) / len(values)))
            axis.plot(*zip(*points), label=label, **look)
            axis.set_title(title)
        validated = [(row["iteration"], row["val_sg_iou"]) for row in rows if "val_sg_iou" in row]
        axes[4].plot(*zip(*validated), marker=".", **look)
    axes[4].set_title("val_sg_iou (60 prompts)")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.2)
    figure.savefig(ROOT / "docs/curves.png", dpi=130)


if __name__ == "__main__":
    main()
