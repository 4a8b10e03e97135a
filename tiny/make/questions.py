"""What the embedded VLM is taught: pictures with faults, and everything one can ask about them.

The texts are those of `checker.py`, `actor.py` and `eval.py`; the answers come from the exact
parser. That is pre-training, as a real VLM has seen captioned pictures; no label enters the RL.
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
from lessons import free_cells, perform, random_instruction
from world import GROUND, NAMES, OPPOSITE, RELATIONS, SPRITE

import actor
import checker
import eval as evaluation
from sgiou import SceneGraph

NOISE = 0.35  # share of the Actor's model answers in which a word or thing is drawn anew


def faulty_picture(rng, split="train"):
    """A drawn picture and the graph it should show: (array, `SceneGraph`).

    The scene that made the graph then suffers up to three accidents: a thing moved, changed, lost,
    added, doubled, or half erased.
    """
    triples = None
    while triples is None:
        things = world.random_scene(rng, rng.choices((2, 3, 4), (2, 4, 4))[0], split)
        triples = world.random_triples(rng, things)
    graph = SceneGraph([thing.name for thing in things], triples)
    erased = []
    for _ in range(rng.choices((0, 1, 2, 3), (2, 3, 3, 2))[0]):
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
    """Whether a picture shows a triple: each of the two things exactly once, and so related."""
    subject, word, object = triple
    found = {thing.name: thing for thing in things}
    if count(things, subject) != 1 or count(things, object) != 1:
        return False
    return world.relation(found[subject], found[object]) == word


def verdict(holds):
    return "yes" if holds else "no"


def finding(rng, things):
    """Where is it, and how do two relate?

    Learnt first on pictures of two things: among more, it starts very slowly.
    """
    # In no order: whoever knows a name has to look for its place.
    shuffled = rng.sample(things, len(things))
    listed = " ; ".join(f"{thing.name} {world.cell_of(thing)}" for thing in shuffled)
    yield "list what you see.", listed or "nothing", 0.5
    for thing in things:
        if count(things, thing.name) == 1:
            yield f"where is the {thing.name}?", str(world.cell_of(thing)), 1.0
    single = [thing for thing in things if count(things, thing.name) == 1]
    for _ in range(4 if len(single) > 1 else 0):
        subject, object = rng.sample(single, 2)
        word = world.relation(subject, object) or "nothing"
        yield f"relate the {subject.name} and the {object.name}.", word, 1.0
        triple = (subject.name, rng.choice(RELATIONS), object.name)
        yield checker.triple_question(triple), verdict(shows(things, triple)), 1.0


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


def questions(rng, things, graph, writing=None):
    """(user message, answer, weight) of what is asked about one picture.

    Short graphs are asked about besides the whole one: what is learnt of one triple carries over.

    Args: things: as the exact parser finds them; graph: what the picture should show;
    writing: "extract" or "repair" for long answers, None for the drill instead.
    """
    for name in [*graph.objects, rng.choice(NAMES)]:
        yield checker.object_question(name), verdict(count(things, name) == 1), 1.0
    names = sorted({thing.name for thing in things} | set(graph.objects))
    extra = []
    for _ in range(3):
        subject, object = rng.sample(names, 2)
        extra.append((subject, rng.choice(RELATIONS), object))
    triples = list(dict.fromkeys([*graph.triples, *extra]))
    for triple in triples:
        yield checker.triple_question(triple), verdict(shows(things, triple)), 1.0
    part = part_of(SceneGraph(names, triples), rng)
    for asked in (graph, part):
        held = [shows(things, triple) for triple in asked.triples]
        digit = round(9 * sum(held) / len(held))
        yield evaluation.judge_request(asked.prompt()), str(digit), 1.0
    if writing is None:
        yield from drill(rng, things)
    if writing == "extract":
        for asked in (graph, part):
            yield evaluation.extract_request(asked, RELATIONS), extraction(things, asked), 0.3
    if writing == "repair":
        for asked in (graph, part):
            feedback = verdicts(rng, things, asked)
            yield actor.request(asked.prompt(), feedback), repair(rng, things, asked), 0.4


def extraction(things, graph):
    """The JSON that `eval.py:extract` hopes for."""
    objects, triples = world.exact_graph(things, graph)
    named = [name for name in graph.objects if name in objects]
    listed = {"objects": named, "triples": list(dict.fromkeys(triples))}
    return json.dumps(listed, separators=(",", ":"))


def verdicts(rng, things, graph):
    """The Checker's feedback, a twentieth of its verdicts wrong."""
    holds = [count(things, name) == 1 for name in graph.objects]
    holds += [shows(things, triple) for triple in graph.triples]
    return checker.reflect(graph, [float(held != (rng.random() < 0.05)) for held in holds]).feedback


def repair(rng, things, graph):
    """A model answer of the Actor; in NOISE of them a word or thing is drawn anew, mostly wrong."""
    thought, instruction = sound_repair(rng, things, graph)
    if rng.random() < NOISE:
        subject, word, object = rng.choice(graph.triples)
        fault = rng.choice(("word", "word", "thing", "any"))
        if fault == "word":
            instruction = f"move the {subject} {rng.choice(RELATIONS)} the {object}"
        elif fault == "thing":
            subject = rng.choice([name for name in graph.objects if name != object])
            instruction = f"move the {subject} {word} the {object}"
        else:
            subject, object = rng.sample(graph.objects, 2)
            instruction = f"move the {subject} {rng.choice(RELATIONS)} the {object}"
    return f"<think>{thought}</think><edit>{instruction}</edit>"


def sound_repair(rng, things, graph):
    """(thought, instruction) that would mend one fault of the picture, if it can be done."""
    problems = [("object", name) for name in graph.objects if count(things, name) != 1]
    problems += [
        ("triple", triple)
        for triple in graph.triples
        if not shows(things, triple)
        and count(things, triple[0]) == 1
        and count(things, triple[2]) == 1
    ]
    if not problems:
        return "nothing is wrong", "none"
    kind, problem = rng.choice(problems)
    if kind == "triple":
        subject, word, object = problem
        found = {thing.name: thing for thing in things}
        actual = world.relation(found[subject], found[object])
        # First as the feedback has it, then what is seen, then what follows.
        thought = f"{subject} {word} {object} is wrong; it is {actual or 'beside'} it"
        if actual == OPPOSITE[word] and rng.random() < 0.3:
            return thought, f"swap the {subject} and the {object}"
        if rng.random() < 0.5:
            return thought, f"move the {subject} {word} the {object}"
        return thought, f"move the {object} {OPPOSITE[word]} the {subject}"
    if count(things, problem) > 1:
        return f"the {problem} is there twice", f"remove the {problem}"
    thought = f"the {problem} is missing"
    for subject, word, object in graph.triples:
        if problem == subject:
            return thought, f"add a {subject} {word} the {object}"
        if problem == object:
            return thought, f"add a {object} {OPPOSITE[word]} the {subject}"
    return thought, f"add a {problem} above the {graph.objects[0]}"


def vocabulary():
    """Every token of the texts above, found by asking a few thousand questions."""
    rng = random.Random(0)
    words = {str(number) for number in range(world.GRID**2)} | {"change", "to"}
    for _ in range(1000):
        image, graph = faulty_picture(rng)
        things = world.random_scene(rng, 4)
        if rng.random() < 0.3:
            things = [world.place(rng, name, 0) for name in graph.objects * 2]
        for writing in (None, "extract", "repair"):
            asked = questions(rng, things, graph, writing)
            for text, answer, _ in asked:
                words.update(re.findall(models.TOKEN, f"{text} {answer} nothing".lower()))
    return sorted(words - {"<image>", "<answer>"})
