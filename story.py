"""Trajectories as data, words, pictures and HTML: what the loop leaves for a person to look at."""

import base64
import io
import json
import textwrap
from html import escape

EXACT_SIDE = 128  # pictures up to this size are kept pixel by pixel in an album
THUMBNAIL_SIDE = 224  # larger ones are shrunk to this
ALIKE = 0.005  # scores closer than this are alike
STYLE = """
.filter { display: flex; flex-wrap: wrap; gap: .5rem; margin: 0 0 1.5rem }
.filter label { border: 1px solid var(--rule); border-radius: 2rem; cursor: pointer }
.filter label { padding: .3rem .9rem }
.filter label:has(:checked) { background: var(--ink); color: var(--paper) }
.filter label:has(:focus-visible) { outline: 2px solid var(--yes); outline-offset: 2px }
.filter input { position: absolute; opacity: 0 } section > form + p { color: var(--muted) }
section:has([value=solved]:checked) article:not(.solved),
section:has([value=unsolved]:checked) article:not(.unsolved),
section:has([value=worse]:checked) article:not(.worse) { display: none }
article { border-top: 1px solid var(--rule); padding: 1rem 0 1.5rem }
article header { display: flex; flex-wrap: wrap; gap: 0 1rem; justify-content: space-between }
article header p { margin: 0; color: var(--muted) } article li { break-inside: avoid }
article ol { list-style: none; margin: 1rem 0 0; padding: 0; display: grid; gap: 1.5rem }
article ol { grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)) }
main img { width: 100%; aspect-ratio: auto 1; display: block; border-radius: 3px }
main img[src^="data:image/png"] { image-rendering: pixelated }
.best img { outline: 3px solid var(--ink); outline-offset: 2px }
.score { margin: .6rem 0 .3rem; display: flex; justify-content: space-between }
.verdicts { list-style: none; margin: 0; padding: 0 } .verdicts span { flex: 1 }
.verdicts li { display: flex; flex-wrap: wrap; gap: 0 .5rem; padding: .15rem 0 }
.verdicts i { flex: 100%; height: 3px; margin-top: .15rem; background:
  linear-gradient(var(--paper) 0 0) 50% / 2px 100% no-repeat,
  linear-gradient(var(--c) 0 0) 0 / var(--p) 100% no-repeat var(--rule) }
.yes { --c: var(--yes) } .no { --c: var(--no); color: var(--no) } .edit { margin-top: .6rem }
.edit p { margin: 0 } .edit p + p::before { content: "→ "; color: var(--muted) }
.thought { color: var(--muted); font-style: italic }
.pairs { list-style: none; padding: 0; display: grid; gap: 1.5rem }
.pairs { grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)) }
.pairs li { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; align-content: start }
.pairs p { grid-column: 1 / 3; margin: 0; color: var(--muted) }
.pairs b { display: block; color: var(--ink) } .pairs li { break-inside: avoid }
@media (max-width: 40rem) {
  article ol { grid-template-columns: 1fr } .score { margin-top: 0 } .edit { grid-column: 1 / 3 }
  article li { display: grid; grid-template-columns: 2fr 3fr; gap: 0 1rem; align-items: start }
}
@media print {
  .filter { display: none } article img { width: 60% }
  article { break-inside: avoid; line-height: 1.25; padding: .5rem 0 }
  article ol { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); font-size: 7pt }
}
"""


def tell(trajectory):
    """A trajectory for JSON; "source": number of the picture that the instruction is for."""
    graph = trajectory.graph
    asked = [*graph.objects, *(" ".join(triple) for triple in graph.triples)]
    steps = [
        {
            "score": round(step.reflection.score, 4),
            "verdicts": [[text, round(p, 4)] for text, p in zip(asked, step.reflection.probs)],
            "thought": step.thought,
            "instruction": step.instruction,
            "source": trajectory.source(number),
        }
        for number, step in enumerate(trajectory.steps, 1)
    ]
    best = trajectory.source(len(steps))
    return {"prompt": graph.prompt(), "seed": trajectory.seed, "best": best, "steps": steps}


def album(trajectories):
    """Trajectories with their pictures, for JSON: `tell`, and every step's "image", a data URI."""
    told = [tell(trajectory) for trajectory in trajectories]
    for data, trajectory in zip(told, trajectories):
        for words, step in zip(data["steps"], trajectory.steps):
            words["image"] = data_uri(step.image)
    return told


def data_uri(image):
    """A small picture as PNG, exact; a larger one as a WebP thumbnail of a few kilobytes."""
    file, image = io.BytesIO(), image.convert("RGB")
    kind = "png" if max(image.size) <= EXACT_SIDE else "webp"
    if kind == "webp":
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    image.save(file, kind, quality=60)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


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
            instruction = step["instruction"] or "(malformed: nothing is edited)"
            lines.append(f"    edits:  {instruction}{elsewhere(step, number)}")
    return "\n".join(lines)


def elsewhere(step, number):
    """Which picture was edited after image `number`, where it is another one."""
    source = step.get("source", number)
    return f" (image {source})" * (source != number and step["instruction"] not in (None, "none"))


def strip(trajectory, side=224):
    """All pictures of a trajectory in a row with score and instruction below; a PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    told, margin, below = tell(trajectory), 12, 72
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
            text = (words["instruction"] or "(malformed)") + elsewhere(words, number)
            text = textwrap.fill(text, 30, max_lines=3, placeholder=" …")
            draw.text((left, margin + side + 28), text, "#202124", font)
    return canvas


def write(trajectory, folder):
    """Writes every image, the strip, story.json and story.txt into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "story.json").exists():  # of an earlier, longer trajectory
        for number in range(len(trajectory.steps), 100):
            (folder / f"image_{number}.png").unlink(missing_ok=True)
    for number, step in enumerate(trajectory.steps):
        step.image.save(folder / f"image_{number}.png")
    strip(trajectory).save(folder / "strip.png")
    (folder / "story.json").write_text(json.dumps(tell(trajectory), indent=1) + "\n")
    (folder / "story.txt").write_text(story(trajectory) + "\n")


def kinds(told):
    """Of an album's trajectory: "solved" or "unsolved", and "worse" if an edit lost score."""
    steps = told["steps"]
    solved = all(prob >= 0.5 for _, prob in steps[told["best"]]["verdicts"])
    sources = [steps[step.get("source", number)] for number, step in enumerate(steps)]
    pairs = zip(sources, steps[1:])
    worse = any(source["score"] - after["score"] > ALIKE for source, after in pairs)
    return ["solved" if solved else "unsolved"] + ["worse"] * worse


def picture(told, number):
    """The <img> of one step of an album's trajectory."""
    step = told["steps"][number]
    failing = [text for text, prob in step["verdicts"] if not prob >= 0.5]
    missing = f"the Checker misses {', '.join(failing)}" if failing else "nothing is missing"
    alt = f"Image {number} of “{told['prompt']}”, score {step['score']:.2f}: {missing}"
    return f'<img src="{escape(step["image"])}" alt="{escape(alt)}" decoding="async">'


def article(told):
    """An album's trajectory as HTML: image, verdicts, thought, instruction, next image."""
    steps, best = told["steps"], told["best"]
    items = []
    for number, step in enumerate(steps):
        verdicts = "".join(
            f'<li class="{"yes" if prob >= 0.5 else "no"}"><span>{escape(text)}</span>'
            f'<b>{prob:.0%}</b><i style="--p:{100 * prob:.0f}%"></i></li>'
            for text, prob in step["verdicts"]
        )
        edit = ""
        if number + 1 < len(steps):
            unedited = {None: "(malformed: nothing is edited)", "none": "(none: no edit is wanted)"}
            words = unedited.get(step["instruction"], step["instruction"])
            words += elsewhere(step, number)
            edit = f'<p class="thought">{escape(step["thought"])}</p><p>{escape(words)}</p>'
        mark, answer = (' class="best"', ", the answer") if number == best else ("", "")
        items.append(
            f"<li{mark}>{picture(told, number)}"
            f'<div><p class="score">image {number}{answer} <b>{step["score"]:.2f}</b></p>'
            f'<ul class="verdicts">{verdicts}</ul></div><div class="edit">{edit}</div></li>'
        )
    names = kinds(told)
    outcome = ", ".join(names).replace("worse", "made worse")
    return (
        f'<article class="{" ".join(names)}"><header><h3>{escape(told["prompt"])}</h3>'
        f"<p>{outcome} · {steps[0]['score']:.2f} → {steps[best]['score']:.2f} · "
        f"seed {told['seed']:d}</p></header><ol>{''.join(items)}</ol></article>"
    )


def gallery(album, group, budget):
    """An album as HTML of at most `budget` characters, with a filter that needs no script.

    group: a name for the filter, its own on a page.
    """
    articles, size = [], 0
    for told in album:
        articles.append(article(told))
        size += len(articles[-1])
        if size > budget:
            articles.pop()
            break
    found = [kind for told in album[: len(articles)] for kind in ["all", *kinds(told)]]
    radios = "".join(
        f'<label><input type="radio" name="{group}" value="{kind}"{" checked" * (kind == "all")}>'
        f"{kind.replace('worse', 'made worse')} <b>{found.count(kind)}</b></label>"
        for kind in ("all", "solved", "unsolved", "worse")
    )
    html = ""
    if len(articles) > 1:
        note = "Made worse: an edit lost score; the next one starts from the best image again."
        html = f'<form class="filter">{radios}</form><p>{note}</p>'
    if len(articles) < len(album):
        html += f"<p>The first {len(articles)} of {len(album)}: the page is full.</p>"
    return html + "".join(articles)


def before_and_after(first, last):
    """The answers to the same prompts in two albums, as HTML."""
    known = {(told["prompt"], told["seed"]): told for told in first}
    pairs = [(known.get((new["prompt"], new["seed"])), new) for new in last]
    pairs = [(old, new) for old, new in pairs if old]
    items, better = [], 0
    for old, new in pairs:
        before, after = (told["steps"][told["best"]]["score"] for told in (old, new))
        if abs(after - before) >= ALIKE:
            better += after > before
            items.append(
                f"<li>{picture(old, old['best'])}{picture(new, new['best'])}"
                f"<p><b>{before:.2f} → {after:.2f}</b> {escape(new['prompt'])}</p></li>"
            )
    note = (
        f"The answers to {len(pairs)} validation prompts, by the Checker’s score: {better} better, "
        f"{len(items) - better} worse, {len(pairs) - len(items)} alike and not shown."
    )
    return f'<p>{note}</p><ul class="pairs">{"".join(items)}</ul>'
