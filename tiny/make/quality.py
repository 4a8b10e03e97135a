"""Prints the quality of each tiny model, measured by the exact parser on validation scenes.

    python tiny/make/quality.py                    # all parts
    python tiny/make/quality.py vae flow           # or only these, of: vae, flow, checker, actor

Images of the Diffuser and the Editor come from validation prompts; the Checker and the Actor are
measured on those images, where the loop uses them. Any further `key=value` changes `eval.yaml`.
"""

import os
import random
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
import numpy as np
import world
from lessons import edit, perform
from questions import count, failed, shows
from world import debris, kept

from config import LoopConfig, load_config
from eval import extract, grade
from loop import build
from sgiou import SceneGraph, load_graphs, sg_iou

PARTS = ("vae", "flow", "checker", "actor")


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
        if text.startswith(("move", "add")) and names == sorted(set(names)):
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


def vae_round_trip(pipeline, images):
    """Encodes and decodes (N, 32, 32, 3) uint8 images."""
    import torch

    pixels = pipeline.image_processor.preprocess((images / 255).astype("float32"))
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mode()
        return pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample)


def exact_score(things, graph):
    """SG-IoU of what an image shows with what it should show, by the parser."""
    return sg_iou(SceneGraph(*world.exact_graph(things, graph)), graph)["sg_iou"]


def diffuser_figures(graphs, found):
    """One line: what the Diffuser's images show of their prompts."""
    named = share(
        (sum(count(t, n) > 0 for n in g.objects), len(g.objects)) for t, g in zip(found, graphs)
    )
    once = share(
        (sum(count(t, n) == 1 for n in g.objects), len(g.objects)) for t, g in zip(found, graphs)
    )
    right = share(
        (sum(shows(t, r) for r in g.triples), len(g.triples)) for t, g in zip(found, graphs)
    )
    score = np.mean([exact_score(t, g) for t, g in zip(found, graphs)])
    return (
        f"named objects drawn {named:.3f}, exactly once {once:.3f}, "
        f"relations right {right:.3f}, SG-IoU {score:.3f}"
    )


def violated(images, found, graphs):
    """(image, things, graph, triple) for each violated triple whose two ends are there once."""
    return [
        (image, things, graph, triple)
        for image, things, graph in zip(images, found, graphs)
        for triple in graph.triples
        if not shows(things, triple) and count(things, triple[0]) == count(things, triple[2]) == 1
    ]


def editor_figures(editor, cases):
    """(one line, edited images): moves on generated images; every kind on drawn ones."""
    rng = random.Random(0)
    texts = [f"move the {s} {w} the {o}" for *_, (s, w, o) in cases]
    edited = editor.edit([case[0] for case in cases], texts, list(range(len(cases))))
    after = world.parse(edited)
    moved = share((shows(t, case[3]), 1) for t, case in zip(after, cases))
    stay = share(kept(case[1], t, text) for t, case, text in zip(after, cases, texts))
    possible = share((perform(rng, c[1], text) is not None, 1) for c, text in zip(cases, texts))
    dirt = np.mean([debris(image) for image in edited])
    kinds = ", ".join(f"{k} {v:.3f}" for k, v in editor_lessons(editor).items())
    line = (
        f"{len(cases)} violated triples: move reaches {moved:.3f} (possible {possible:.3f}), "
        f"others kept {stay:.3f}, debris {dirt:.3f}; drawn scenes: {kinds}"
    )
    return line, edited


def checker_figures(checker, images, graphs, found):
    """Prints how well the Checker's probabilities, lists and grades agree with the parser."""
    reflections = checker.check(images, graphs)
    for kind in ("objects", "triples"):
        probs, labels = [], []
        for reflection, graph, things in zip(reflections, graphs, found):
            split = len(graph.objects)
            if kind == "objects":
                probs += reflection.probs[:split]
                labels += [count(things, name) == 1 for name in graph.objects]
            else:
                probs += reflection.probs[split:]
                labels += [shows(things, triple) for triple in graph.triples]
        right = np.mean((np.array(probs) >= 0.5) == np.array(labels))
        print(
            f"Checker, {kind}: ROC-AUC {auc(probs, labels):.4f}, "
            f"calibration error {calibration_error(probs, labels):.4f}, "
            f"accuracy {right:.4f}, yes {np.mean(labels):.3f} of {len(labels)}"
        )
    exact = [SceneGraph(*world.exact_graph(t, g)) for t, g in zip(found, graphs)]
    extracted = extract(checker, images, graphs, world.RELATIONS)
    agreement = np.mean([sg_iou(a, b)["sg_iou"] for a, b in zip(extracted, exact) if b.triples])
    held = [np.mean([shows(t, r) for r in g.triples]) for t, g in zip(found, graphs)]
    judged = grade(checker, images, [graph.prompt() for graph in graphs])
    print(
        f"Checker, extract: SG-IoU with the exact graph {agreement:.3f}; "
        f"judge: rank correlation {rank_correlation(judged, held):.3f}"
    )


def actor_figures(actor, images, graphs, found, reflections):
    """Prints what the Actor's instructions are worth, with and without tried instructions."""
    rng = random.Random(0)
    flawed = [i for i, r in enumerate(reflections) if not r.satisfied]
    for told in (False, True):
        tried = [failed(rng, found[i], graphs[i]) if told else () for i in flawed]
        # Half of `failed` is empty: keep those that say something.
        rows = [n for n, texts in enumerate(tried) if texts or not told]
        chosen = [flawed[n] for n in rows]
        tried = [tried[n] for n in rows]
        proposals = actor.propose(
            [images[i] for i in chosen],
            [graphs[i].prompt() for i in chosen],
            [reflections[i].feedback for i in chosen],
            seeds=chosen,
            tried=tried,
        )
        instructions = proposals.instructions
        formed = np.mean([text is not None for text in instructions])
        again = np.mean([text in texts for text, texts in zip(instructions, tried)])
        done, mended, better, kinds = [], [], [], {}
        for i, text in zip(chosen, instructions):
            after = perform(rng, found[i], text or "")
            wrong = [triple for triple in graphs[i].triples if not shows(found[i], triple)]
            done.append(after is not None)
            mended.append(after is not None and any(shows(after, triple) for triple in wrong))
            gain = after is not None and exact_score(after, graphs[i])
            better.append(gain > exact_score(found[i], graphs[i]))
            kind = (text or "malformed").split()[0]
            kinds[kind] = kinds.get(kind, 0) + 1
        print(
            f"Actor, {len(chosen)} images, {'some' if told else 'nothing'} tried: "
            f"well-formed {formed:.3f}, a tried instruction again {again:.3f}; by a perfect editor "
            f"can be done {np.mean(done):.3f}, mends a violated triple {np.mean(mended):.3f}, "
            f"raises SG-IoU {np.mean(better):.3f}; "
            + ", ".join(f"{k} {v / len(chosen):.2f}" for k, v in sorted(kinds.items()))
        )


def main():
    overrides = [word for word in sys.argv[1:] if "=" in word]
    parts = [word for word in sys.argv[1:] if word not in overrides] or PARTS
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"unknown part {', '.join(unknown)}; known: {', '.join(PARTS)}")
    # The base is measured, not what RL makes of it.
    base = ["actor.adapter=", "editor.adapter="]
    loop = build(load_config("eval.yaml", LoopConfig, [*base, *overrides]))
    graphs = load_graphs("tiny/data/val.json")
    rng = random.Random(0)

    if "vae" in parts:
        drawn = [world.random_scene(rng, rng.choice((2, 3, 4, 5)), "val") for _ in range(200)]
        images = np.stack([world.render(things) for things in drawn])
        after = vae_round_trip(loop.diffuser.pipeline, images)
        survived = share(kept(a, b, "") for a, b in zip(drawn, world.parse(after)))
        dirt = np.mean([debris(image) for image in after])
        print(f"VAE: objects that survive {survived:.4f}, debris {dirt:.4f}")

    images = loop.diffuser.generate([g.prompt() for g in graphs], list(range(len(graphs))))
    found = world.parse(images)
    cases = violated(images, found, graphs)
    if "flow" in parts:
        steps = loop.diffuser.call["num_inference_steps"]
        dirt = np.mean([debris(image) for image in images])
        print(f"Diffuser, {steps} steps: {diffuser_figures(graphs, found)}, debris {dirt:.3f}")
        for relations in (3, 4, 5, 6):
            chosen = [i for i, graph in enumerate(graphs) if len(graph.triples) == relations]
            line = diffuser_figures([graphs[i] for i in chosen], [found[i] for i in chosen])
            print(f"    {relations} relations: {line}")
        used = loop.editor.call
        for steps in (4, 8):
            loop.editor.call = used | {"num_inference_steps": steps}
            print(f"Editor, {steps} steps: {editor_figures(loop.editor, cases)[0]}")
        loop.editor.call = used

    if "checker" in parts:
        # Generated and edited images of the hardest prompts, those of five objects.
        _, edited = editor_figures(loop.editor, cases)
        hard = [i for i, graph in enumerate(graphs) if len(graph.objects) == 5]
        shown = [images[i] for i in hard]
        asked = [graphs[i] for i in hard]
        for case, image in zip(cases, edited):
            if len(case[2].objects) == 5:
                shown.append(image)
                asked.append(case[2])
        checker_figures(loop.checker, shown, asked, world.parse(shown))

    if "actor" in parts:
        actor_figures(loop.actor, images, graphs, found, loop.checker.check(images, graphs))


if __name__ == "__main__":
    main()
