"""Prints the quality of each embedded model, measured by the exact parser on validation scenes.

    python tiny/make/quality.py

Pictures of the Diffuser and the Editor come from validation prompts; the Checker and the Actor
are measured on those pictures, where the loop uses them.
"""

import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
import numpy as np
import world
from lessons import edit, perform
from questions import count, shows
from world import kept

from config import LoopConfig, load_config
from eval import extract, grade
from loop import build
from sgiou import SceneGraph, load_graphs, sg_iou


def auc(scores, labels):
    """Area under the ROC curve: the chance that a yes scores above a no (ties count half)."""
    scores, labels = np.array(scores), np.array(labels, bool)
    yes, no = scores[labels][:, None], scores[~labels][None]
    return float((yes > no).mean() + (yes == no).mean() / 2)


def calibration_error(probs, labels, bins=10):
    """Expected calibration error over equal-width bins."""
    probs, labels = np.array(probs), np.array(labels, float)
    index = np.minimum((probs * bins).astype(int), bins - 1)
    gaps = [
        abs(probs[index == b].mean() - labels[index == b].mean()) * (index == b).mean()
        for b in range(bins)
        if (index == b).any()
    ]
    return float(sum(gaps))


def rank_correlation(a, b):
    """Spearman's rho, equal values sharing their mean rank."""

    def ranks(values):
        values = np.array(values)
        below = (values[None] < values[:, None]).sum(1)
        equal = (values[None] == values[:, None]).sum(1)
        return below + (equal - 1) / 2

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def share(pairs):
    """Ratio of summed (part, whole) pairs."""
    parts, wholes = zip(*pairs)
    return sum(parts) / max(sum(wholes), 1)


def editor_lessons(editor, seed=3, total=400):
    """How often each kind of instruction does what it says, on drawn validation scenes."""
    from PIL import Image

    rng = random.Random(seed)
    lessons = [edit(rng, "val") for _ in range(total)]
    images = [Image.fromarray(world.render(before)) for before, _, _ in lessons]
    texts = [text for _, text, _ in lessons]
    outcomes = {}
    for (before, text, target), after in zip(
        lessons, world.parse(editor.edit(images, texts, list(range(total))))
    ):
        names = sorted(thing.name for thing in after)
        done = names == sorted(thing.name for thing in target)
        if text.startswith(("move", "add")):
            word = next(word for word in world.RELATIONS if f" {word} " in text)
            first, second = text.split(f" {word} the ")
            name = " ".join(first.split()[-2:])
            done = shows(after, (name, word, second))
        if text.startswith("swap"):
            named = [t for t in target if t.name in text]
            done = all(kept([t], after, "")[0] for t in named)
        outcomes.setdefault(text.split()[0], []).append((done, 1))
        outcomes.setdefault("others kept", []).append(kept(before, after, text))
    return {name: share(pairs) for name, pairs in sorted(outcomes.items())}


def main():
    loop = build(load_config("eval.yaml", LoopConfig))
    # The base models, not what RL makes of them.
    loop.actor, loop.editor = loop.actor.without_adapter(), loop.editor.without_adapter()
    graphs = load_graphs("tiny/data/val.json")
    rng = random.Random(0)

    drawn = [world.random_scene(rng, rng.choice((2, 3, 4)), "val") for _ in range(200)]
    images = np.stack([world.render(things) for things in drawn])
    round_trip = world.parse(vae_round_trip(loop.diffuser.pipeline, images))
    survived = share([kept(a, b, "") for a, b in zip(drawn, round_trip)])
    print(f"VAE: objects that survive {survived:.3f}")

    images = loop.diffuser.generate([g.prompt() for g in graphs], list(range(len(graphs))))
    seen = world.parse(images)
    named = [
        (sum(count(t, n) > 0 for n in g.objects), len(g.objects)) for t, g in zip(seen, graphs)
    ]
    once = [
        (sum(count(t, n) == 1 for n in g.objects), len(g.objects)) for t, g in zip(seen, graphs)
    ]
    right = [(sum(shows(t, r) for r in g.triples), len(g.triples)) for t, g in zip(seen, graphs)]
    print(
        f"Diffuser: named objects drawn {share(named):.3f}, exactly once {share(once):.3f}, "
        f"relations right {share(right):.3f}"
    )

    # The Editor where the loop uses it: generated pictures with a violated triple, both there once.
    cases = [
        (image, things, graph, triple)
        for image, things, graph in zip(images, seen, graphs)
        if len(graph.objects) >= 3
        for triple in graph.triples
        if not shows(things, triple) and count(things, triple[0]) == count(things, triple[2]) == 1
    ]
    texts = [f"move the {s} {w} the {o}" for *_, (s, w, o) in cases]
    edited = loop.editor.edit([case[0] for case in cases], texts, list(range(len(cases))))
    after = world.parse(edited)
    moved = share([(shows(t, case[3]), 1) for t, case in zip(after, cases)])
    stay = share([kept(case[1], t, text) for t, case, text in zip(after, cases, texts)])
    possible = share([(perform(rng, c[1], text) is not None, 1) for c, text in zip(cases, texts)])
    print(
        f"Editor, {len(cases)} violated triples: move reaches {moved:.3f} "
        f"(possible {possible:.3f}), others kept {stay:.3f}"
    )
    lessons = editor_lessons(loop.editor)
    print("Editor, drawn scenes: " + ", ".join(f"{k} {v:.3f}" for k, v in lessons.items()))

    pictures = [*images, *edited]
    asked = [*graphs, *(case[2] for case in cases)]
    found = [*seen, *after]
    reflections = loop.checker.check(pictures, asked)
    for kind in ("objects", "triples"):
        probs, labels = [], []
        for reflection, graph, things in zip(reflections, asked, found):
            split = len(graph.objects)
            if kind == "objects":
                probs += reflection.probs[:split]
                labels += [count(things, name) == 1 for name in graph.objects]
            else:
                probs += reflection.probs[split:]
                labels += [shows(things, triple) for triple in graph.triples]
        right = np.mean((np.array(probs) >= 0.5) == np.array(labels))
        print(
            f"Checker, {kind}: ROC-AUC {auc(probs, labels):.3f}, "
            f"calibration error {calibration_error(probs, labels):.3f}, "
            f"accuracy {right:.3f}, yes {np.mean(labels):.3f}"
        )
    exact = [SceneGraph(*world.exact_graph(t, g)) for t, g in zip(found, asked)]
    extracted = extract(loop.checker, pictures, asked, world.RELATIONS)
    agreement = np.mean([sg_iou(a, b)["sg_iou"] for a, b in zip(extracted, exact) if b.triples])
    held = [np.mean([shows(t, r) for r in g.triples]) for t, g in zip(found, asked)]
    judged = grade(loop.checker, pictures, [graph.prompt() for graph in asked])
    print(
        f"Checker, extract: SG-IoU with the exact graph {agreement:.3f}; "
        f"judge: rank correlation {rank_correlation(judged, held):.3f}"
    )

    flawed = [i for i, r in enumerate(reflections[: len(images)]) if not r.satisfied]
    proposals = loop.actor.propose(
        [images[i] for i in flawed],
        [graphs[i].prompt() for i in flawed],
        [reflections[i].feedback for i in flawed],
        seeds=flawed,
    )
    formed = np.mean([instruction is not None for instruction in proposals.instructions])
    fixed = []
    for i, instruction in zip(flawed, proposals.instructions):
        wrong = [triple for triple in graphs[i].triples if not shows(seen[i], triple)]
        if not wrong or any(count(seen[i], name) != 1 for name in graphs[i].objects):
            continue
        result = perform(rng, seen[i], instruction or "")
        fixed.append(result is not None and any(shows(result, triple) for triple in wrong))
    print(
        f"Actor: well-formed {formed:.3f}; a perfect editor would fix a violated triple "
        f"{np.mean(fixed):.3f} of {len(fixed)}"
    )


def vae_round_trip(pipeline, images):
    """Encodes and decodes (N, 32, 32, 3) uint8 pictures."""
    import torch

    pixels = pipeline.image_processor.preprocess((images / 255).astype("float32"))
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mode()
        return pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample)


if __name__ == "__main__":
    main()
