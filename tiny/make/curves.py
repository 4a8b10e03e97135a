"""Draws the training curves of docs/training.md from the metrics of a run.

docs/healthy.png and docs/broken.png were made by:

    pip install matplotlib
    python train.py --phase 1
    python tiny/make/curves.py runs/phase1 docs/healthy.png
    python train.py --phase 1 run=runs/broken learning_rate=2e-2 iterations=12 validate_every=2
    python tiny/make/curves.py runs/broken docs/broken.png
"""

import json
import sys
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE = "#2f6fb5", "#c8501e"
PANELS = (  # metrics that share a panel
    ("reward", "before"),
    ("val_checker", "val_sg_iou"),
    ("kl",),
    ("flat_groups",),
    ("malformed", "none"),
)


def main():
    run, path = sys.argv[1:]
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").open()]
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, len(PANELS), figsize=(3.4 * len(PANELS), 3))
    for panel, names in zip(panels, PANELS):
        for name, color, line in zip(names, (BLUE, ORANGE), ("-", "--")):
            points = [(row["iteration"], row[name]) for row in rows if name in row]
            times, values = zip(*points)
            # In a long run, each point is the mean of the values around it.
            reach = len(values) // 40
            means = [fmean(values[max(i - reach, 0) : i + reach + 1]) for i in range(len(values))]
            panel.plot(
                times, means, line, color=color, marker="" if reach else "o", ms=3, label=name
            )
        panel.set_ylim(bottom=0)
        panel.set_xlabel("iteration")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
