"""Tables, as grids of cells: of an evaluation, with bootstrap intervals, and of training runs.

An evaluation's row has a name, "values" (column -> a value a prompt, NaN where there is none), the
name of the row it builds on, and flow-model evaluations, tokens and seconds a prompt: `eval.Row`.
"""

import math
import re
from html import escape

from charts import points

RESAMPLES = 2000  # of the bootstrap
HEADINGS = {
    "sg_iou": "SG-IoU",
    "entity_iou": "Entity-IoU",
    "relation_iou": "Relation-IoU",
    "vlm_sg_iou": "SG-IoU (VLM)",
    "vlm_entity_iou": "Entity-IoU (VLM)",
    "vlm_relation_iou": "Relation-IoU (VLM)",
    "judge": "Judge",
    "checker": "Checker",
    "kept": "Kept",
    "edits": "Edits",
}


def bootstrap(values, others=None):
    """(mean, low, high): the mean and its 95% percentile-bootstrap interval.

    With `others`, of the paired differences. Prompts that lack a value in either are left out.
    """
    import numpy as np

    values = np.array(values) - (np.array(others) if others is not None else 0)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan, math.nan
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def grids(rows):
    """Two grids of cells, headings first: every column's mean; the main column with intervals."""
    columns = [name for name in HEADINGS if name in rows[0].values]
    costs = ["flow evals", "flow tokens", "s/prompt"]
    means = [["", *(HEADINGS[name] for name in columns), *costs]]
    for result in rows:
        values = [bootstrap(result.values[name])[0] for name in columns]
        cells = ["–" if math.isnan(value) else f"{value:.3f}" for value in values]
        cells += [f"{result.evaluations:.1f}", f"{result.tokens:,.0f}", f"{result.seconds:.2f}"]
        means.append([result.name, *cells])
    main = "sg_iou" if "sg_iou" in columns else "vlm_sg_iou"
    by_name = {result.name: result for result in rows}
    yardsticks = [rows[0], *(result for result in rows if result.name.startswith("best of"))]
    against = [f"against {result.name}" for result in yardsticks]
    gains = [[HEADINGS[main], "mean", *against, "against the row it builds on"]]
    for result in rows:
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*bootstrap(result.values[main]))]
        for other in (*yardsticks, by_name.get(result.builds_on)):
            if other is None or other is result:
                cells.append("–")
                continue
            difference = bootstrap(result.values[main], other.values[main])
            cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference))
        gains.append([result.name, *cells])
    return means, gains


def table(rows):
    """The results in Markdown."""
    means, gains = grids(rows)
    title = f"{gains[0][0]}, with 95% intervals of the paired bootstrap:"
    gains[0][0] = ""
    texts = []
    for cells in (means, gains):
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        texts.append("\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]]))
    return f"{texts[0]}\n\n{title}\n\n{texts[1]}"


def key_figures(runs):
    """Grids of training runs: first and last figures, and seconds by stage; none without runs.

    Args: runs: `report.Run`s; those of no training are left out.
    """
    runs = [run for run in runs if run.metrics]
    if not runs:
        return []
    stages = dict.fromkeys(name for run in runs for row in run.seconds for name in row)
    stages.pop("iteration", None)
    figures = {"reward": "reward", "val_checker": "validation: Checker"}
    figures["val_sg_iou"] = "validation: exact SG-IoU"
    first = [["", "iterations", *figures.values()]]
    second = [["seconds an iteration", *stages, "all"]]
    for run in runs:
        planned = re.search(r"^iterations: (\d+)$", run.config, re.MULTILINE)
        done = str(run.metrics[-1]["iteration"]) + (f" of {planned[1]}" if planned else "")
        values = [[y for _, y in points(run.metrics, name)] for name in figures]
        first.append([run.name, done, *(f"{v[0]:.3f} → {v[-1]:.3f}" if v else "–" for v in values)])
        spent = [sum(y for _, y in points(run.seconds, stage)) for stage in stages]
        means = [total / max(len(run.seconds), 1) for total in spent]
        share = [f"{m:.2f} ({m / max(sum(means), 1e-9):.0%})" for m in means]
        second.append([run.name, *share, f"{sum(means):.2f}"])
    return [first, second] if stages else [first]


def html(cells):
    """An HTML table of strings: headings above and at the left."""
    head, *rows = [[escape(cell) for cell in row] for row in cells]
    body = "".join(f"<tr><th>{first}</th><td>{'</td><td>'.join(row)}</td>" for first, *row in rows)
    return f'<div class="wide"><table><tr><th>{"</th><th>".join(head)}</th>{body}</table></div>'
