"""Shows a trajectory to a person: as data, in words, and as a strip of pictures."""

import textwrap


def tell(trajectory):
    """A trajectory as data for JSON: every step's verdicts, thought and instruction."""
    graph = trajectory.graph
    asked = [*graph.objects, *(" ".join(triple) for triple in graph.triples)]
    steps = [
        {
            "score": round(step.reflection.score, 4),
            "verdicts": {text: round(prob, 4) for text, prob in zip(asked, step.reflection.probs)},
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
        for text, prob in step["verdicts"].items():
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
