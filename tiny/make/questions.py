"""What the tiny VLM is taught: images with faults, and everything one can ask about them.

The texts are those of `checker.py`, `actor.py` and `eval.py`; the answers come from the exact
parser. That is pre-training, as a real VLM has seen captioned images; no label enters the RL.
"""

import json
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
import models
import world
from lessons import RELATED, free_cells, perform, random_instruction
from world import GROUND, NAMES, OPPOSITE, RELATIONS, SPRITE

import actor
import checker
import eval as evaluation
from sgiou import SceneGraph


def faulty_image(rng, split="train"):
    """A drawn image and the graph it should show: (array, `SceneGraph`).

    The scene that made the graph then suffers up to four accidents: a thing moved, changed, lost,
    added, doubled, or half erased.
    """
    triples = None
    while triples is None:
        things = world.random_scene(rng, rng.choices((2, 3, 4, 5), (1, 2, 4, 5))[0], split)
        triples = world.random_triples(rng, things, rng.choice(RELATED[len(things)]))
    graph = SceneGraph([thing.name for thing in things], triples)
    erased = []
    for _ in range(rng.choices((0, 1, 2, 3, 4), (2, 3, 3, 2, 1))[0]):
        accident = rng.choices(("edit", "move", "double", "erase"), (2, 5, 1, 1))[0]
        if accident == "edit" and len(things) > 1:
            things = perform(rng, things, random_instruction(rng, things)) or things
        elif accident == "move" and things:
            thing = rng.choice(things)
            rest = [other for other in things if other != thing]
            things = [*rest, world.place(rng, thing.name, rng.choice(free_cells(things)))]
        elif accident == "double" and things:
            things = [
                *things,
                world.place(rng, rng.choice(things).name, rng.choice(free_cells(things))),
            ]
        elif accident == "erase" and things:
            erased.append(rng.choice(things))
    image = world.render(things)
    for thing in erased:
        top, left = rng.choice(((0, 0), (3, 0), (0, 3)))
        bottom, right = (3, SPRITE) if (top, left) == (0, 0) else (SPRITE, SPRITE)
        image[thing.y + top : thing.y + bottom, thing.x + left : thing.x + right] = GROUND
    return image, graph


def count(things, name):
    return sum(thing.name == name for thing in things)


def shows(things, triple):
    """Whether an image shows a triple: each of the two things exactly once, and so related."""
    subject, word, object = triple
    found = {thing.name: thing for thing in things}
    if count(things, subject) != 1 or count(things, object) != 1:
        return False
    return world.relation(found[subject], found[object]) == word


def verdict(holds):
    return "yes" if holds else "no"


def finding(rng, things):
    """Where is it, and how do two relate?

    Learnt first on images of two things: among more, it starts very slowly.
    """
    # In no order: a model that knows a name then has to look for its place.
    shuffled = rng.sample(things, len(things))
    listed = " ; ".join(f"{thing.name} {world.cell_of(thing)}" for thing in shuffled)
    yield "list what you see.", listed or "nothing", 0.5
    single = [thing for thing in things if count(things, thing.name) == 1]
    for thing in rng.sample(single, min(3, len(single))):
        yield f"where is the {thing.name}?", str(world.cell_of(thing)), 1.0
    for _ in range(3 if len(single) > 1 else 0):
        subject, object = rng.sample(single, 2)
        word = world.relation(subject, object) or "nothing"
        yield f"relate the {subject.name} and the {object.name}.", word, 1.0
        triple = (subject.name, rng.choice(RELATIONS), object.name)
        yield checker.question(" ".join(triple)), verdict(shows(things, triple)), 1.0


def drill(rng, things):
    """Questions the system never asks, which teach to see: what is where, how is it related.

    And to repeat what was said, where all writing begins: learnt first, it takes 200 steps; learnt
    late, by a model already set in its ways, it takes thousands.
    """
    yield copying(rng)
    yield from finding(rng, things)
    for thing in rng.sample(things, min(2, len(things))):
        yield f"what is at {world.cell_of(thing)}?", thing.name, 0.3


def copying(rng):
    """(user message, answer, weight): a prompt of up to six triples, to be repeated."""
    pairs = [rng.sample(NAMES, 2) for _ in range(rng.randint(1, 6))]
    text = "; ".join(f"{a} {rng.choice(RELATIONS)} {b}" for a, b in pairs)
    return f"list the prompt: {text}.", text, 0.05


def part_of(graph, rng):
    """A graph of some of a graph's triples, one to all."""
    triples = rng.sample(graph.triples, rng.randint(1, len(graph.triples)))
    return SceneGraph(dict.fromkeys(name for a, _, b in triples for name in (a, b)), triples)


def questions(rng, things, graph, writing=None, short=0):
    """(user message, answer, weight) of what is asked about one image.

    A few of all possible questions: another image teaches more than another question on this one.
    Half of the long ones are about a part of the graph: what is learnt of one triple carries over.

    Args: things: as the exact parser finds them; graph: what the image should show;
    writing: "extract" or "repair" for long answers, None for the drill instead; short: how many
    lists of one triple alone come with "extract".
    """
    for name in [*rng.sample(graph.objects, 2), rng.choice(NAMES)]:
        yield checker.question(name), verdict(count(things, name) == 1), 1.0
    names = sorted({thing.name for thing in things} | set(graph.objects))
    extra = []
    for _ in range(2):
        subject, object = rng.sample(names, 2)
        extra.append((subject, rng.choice(RELATIONS), object))
    triples = list(dict.fromkeys([*graph.triples, *extra]))
    for triple in rng.sample(triples, min(6, len(triples))):
        yield checker.question(" ".join(triple)), verdict(shows(things, triple)), 1.0
    part = part_of(SceneGraph(names, triples), rng)
    asked = rng.choice((graph, part))
    held = [shows(things, triple) for triple in asked.triples]
    yield evaluation.judge_request(asked.prompt()), str(round(9 * sum(held) / len(held))), 1.0
    if writing is None:
        yield from drill(rng, things)
    asked = rng.choice((graph, graph, part))
    if writing == "extract":
        single = [triple for triple in triples if all(count(things, n) == 1 for n in triple[::2])]
        chosen = rng.sample(single, min(short, len(single)))
        for listed in [asked, *(SceneGraph((t[0], t[2]), [t]) for t in chosen)]:
            yield evaluation.extract_request(listed, RELATIONS), extraction(things, listed), 0.5
    if writing == "repair":
        feedback = verdicts(rng, things, asked)
        tried = failed(rng, things, asked)
        thought, instruction = repair(rng, things, asked, tried)
        answer = f"<think>{thought}</think><edit>{instruction}</edit>"
        yield actor.request(asked.prompt(), feedback, tried), answer, 0.5


def extraction(things, graph):
    """The JSON that `eval.py:extract` hopes for."""
    objects, triples = world.exact_graph(things, graph)
    named = [name for name in graph.objects if name in objects]
    listed = {"objects": named, "triples": list(dict.fromkeys(triples))}
    return json.dumps(listed, separators=(",", ":"))


def verdicts(rng, things, graph):
    """The Checker's feedback, one verdict in twenty wrong."""
    holds = [count(things, name) == 1 for name in graph.objects]
    holds += [shows(things, triple) for triple in graph.triples]
    return checker.reflect(graph, [float(held != (rng.random() < 0.05)) for held in holds]).feedback


# ---- the Actor's supervised start ----


def repair(rng, things, graph, tried=()):
    """(thought, instruction): a plausible repair of one fault that is not among `tried`."""
    found = faults(rng, things, graph)
    rng.shuffle(found)
    for thought, kinds in found:
        rest = [[text for text in texts if text not in tried] for texts in kinds]
        if any(rest):
            return thought, rng.choice(rng.choice([texts for texts in rest if texts]))
    return "nothing is wrong", "none"


def failed(rng, things, graph):
    """Instructions as if tried without success: in half of the lessons some, up to six."""
    found = faults(rng, things, graph)
    tried = []
    if found and rng.random() < 0.5:
        for _ in range(rng.choice((1, 1, 2, 2, 3, 3, 4, 4, 5, 6))):
            _, kinds = rng.choice(found)
            tried.append(rng.choice(rng.choice(kinds)))
    return tuple(dict.fromkeys(tried))


def faults(rng, things, graph):
    """What is wrong with an image, each as (thought, kinds of repair).

    A kind is a list of instructions of one sort. All are plausible, and none looks at what it
    breaks or whether there is room for it: so a model writes that has never seen the outcome of
    an edit. Which kinds work, and which thing is cheap to move, is what phase 1 can learn. No noise
    is added beyond that.
    """
    found = []
    for name in graph.objects:
        others = [other for other in graph.objects if other != name]
        related = [(w, o) for s, w, o in graph.triples if s == name]
        related += [(OPPOSITE[w], s) for s, w, o in graph.triples if o == name]
        if count(things, name) > 1:
            kinds = [
                [f"remove the {name}"],
                [f"move the {name} {word} the {other}" for word, other in related],
            ]
            found.append((f"the {name} is there twice", kinds))
        elif count(things, name) == 0:
            unasked = {thing.name for thing in things} - set(graph.objects)
            kinds = [
                [f"add a {name} {word} the {other}" for word, other in related],
                [f"add a {name} {rng.choice(RELATIONS)} the {other}" for other in others],
                [f"move the {name} {word} the {other}" for word, other in related],
                [f"change the {other} to a {name}" for other in sorted(unasked)],
            ]
            found.append((f"the {name} is missing", [kind for kind in kinds if kind]))
    shown = {thing.name: thing for thing in things}
    for triple in graph.triples:
        a, word, b = triple
        both = count(things, a) == count(things, b) == 1
        if not both or shows(things, triple):
            continue
        actual = world.relation(shown[a], shown[b])
        # First as the feedback has it, then what is seen, then what follows.
        thought = f"{a} {word} {b} is wrong; it is {actual or 'beside'} it"
        elsewhere = []  # one of the two, moved to where the prompt wants it of a third thing
        for subject, other_word, object in graph.triples:
            if (subject, other_word, object) == triple:
                continue
            if subject in (a, b):
                elsewhere.append(f"move the {subject} {other_word} the {object}")
            if object in (a, b):
                elsewhere.append(f"move the {object} {OPPOSITE[other_word]} the {subject}")
        kinds = [
            [f"move the {a} {word} the {b}"],
            [f"move the {b} {OPPOSITE[word]} the {a}"],
            [f"swap the {a} and the {b}"],
            elsewhere,
            [f"remove the {a}"],
            [f"add a {a} {word} the {b}"],
        ]
        found.append((thought, [kind for kind in kinds if kind]))
    return found


def vocabulary():
    """Every token of the texts above, found by asking a few thousand questions."""
    rng = random.Random(0)
    words = {str(number) for number in range(world.GRID**2)} | {"change", "to"}
    for _ in range(1000):
        _, graph = faulty_image(rng)
        things = world.random_scene(rng, 4)
        if rng.random() < 0.3:
            things = [world.place(rng, name, 0) for name in graph.objects * 2]
        for writing in (None, "extract", "repair"):
            asked = questions(rng, things, graph, writing)
            for text, answer, _ in asked:
                words.update(re.findall(models.TOKEN, f"{text} {answer} nothing none".lower()))
    return sorted(words - {"<image>", "<answer>"})
