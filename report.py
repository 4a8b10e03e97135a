"""Shows results to a person: a trajectory as data, words and pictures; rows as a table."""

import math
import textwrap

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


def tell(trajectory):
    """A trajectory as data for JSON: every step's verdicts, thought and instruction."""
    graph = trajectory.graph
    asked = [*graph.objects, *(" ".join(triple) for triple in graph.triples)]
    steps = [
        {
            "score": round(step.reflection.score, 4),
            "verdicts": [[text, round(p, 4)] for text, p in zip(asked, step.reflection.probs)],
            "thought": step.thought,
            "instruction": step.instruction,
        }
        for step in trajectory.steps
    ]
    best = next(i for i, step in enumerate(trajectory.steps) if step is trajectory.best)
    return {"prompt": graph.prompt(), "seed": trajectory.seed, "best": best, "steps": steps}


def story(trajectory):
    """A trajectory in words."""
    told = tell(trajectory)
    lines = [told["prompt"]]
    for number, step in enumerate(told["steps"]):
        best = "  <- best" if number == told["best"] else ""
        lines.append(f"\n  image {number}: score {step['score']:.2f}{best}")
        for text, prob in step["verdicts"]:
            lines.append(f"    {'yes' if prob >= 0.5 else ' no'} {prob:4.0%}  {text}")
        if number + 1 < len(told["steps"]):
            lines.append(f"    thinks: {step['thought']}")
            lines.append(f"    edits:  {step['instruction'] or '(malformed: nothing is edited)'}")
    return "\n".join(lines)


def strip(trajectory, side=224):
    """All pictures of a trajectory in a row with score and instruction below; a PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    told = tell(trajectory)
    margin, below = 12, 72
    width = len(told["steps"]) * (side + margin) + margin
    canvas = Image.new("RGB", (width, side + below + 2 * margin), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13)
    for number, (step, words) in enumerate(zip(trajectory.steps, told["steps"])):
        left = margin + number * (side + margin)
        # A picture smaller than its place shows its pixels.
        resampling = Image.NEAREST if step.image.width < side else Image.LANCZOS
        canvas.paste(step.image.resize((side, side), resampling), (left, margin))
        color = "#188038" if step.reflection.satisfied else "#c5221f"
        best = number == told["best"]
        frame = (left - 3, margin - 3, left + side + 2, margin + side + 2)
        draw.rectangle(frame, outline=color, width=3 if best else 1)
        verdict = f"score {words['score']:.2f}{', best' if best else ''}"
        draw.text((left, margin + side + 8), verdict, color, font)
        if number + 1 < len(told["steps"]):
            text = textwrap.fill(words["instruction"] or "(malformed)", 30)
            draw.text((left, margin + side + 28), text, "#202124", font)
    return canvas


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


def table(rows):
    """The results in Markdown."""
    columns = [name for name in HEADINGS if name in rows[0].values]
    lines = [
        "| | " + " | ".join(HEADINGS[name] for name in columns) + " | flow evals | s/prompt |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for result in rows:
        cells = [bootstrap(result.values[name])[0] for name in columns]
        shown = ["–" if math.isnan(cell) else f"{cell:.3f}" for cell in cells]
        shown += [f"{result.evaluations:.1f}", f"{result.seconds:.2f}"]
        lines.append(f"| {result.name} | " + " | ".join(shown) + " |")
    main = "sg_iou" if "sg_iou" in columns else "vlm_sg_iou"
    lines += ["", f"{HEADINGS[main]}, with 95% intervals of the paired bootstrap:", ""]
    lines += ["| | mean | against Diffuser | against the row it builds on |", "|---|---|---|---|"]
    by_name = {result.name: result for result in rows}
    for result in rows:
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*bootstrap(result.values[main]))]
        for other in (rows[0] if result is not rows[0] else None, by_name.get(result.builds_on)):
            if other is None:
                cells.append("–")
                continue
            difference = bootstrap(result.values[main], other.values[main])
            cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference))
        lines.append(f"| {result.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
