"""What the tiny models are taught about images: scenes, captions and edits."""

import re
from itertools import product

import world
from world import NAMES, SIZE, SPRITE, Thing

NAME = f"({'|'.join(NAMES)})"
WORD = f"({'|'.join(world.RELATIONS)})"
FORMS = {  # of instructions
    "move": f"move the {NAME} {WORD} the {NAME}",
    "add": f"add a {NAME} {WORD} the {NAME}",
    "remove": f"remove the {NAME}",
    "swap": f"swap the {NAME} and the {NAME}",
    "change": f"change the {NAME} to a {NAME}",
}


def messy_scene(rng):
    """Up to eight things, some of them anywhere, overlapping or cut: what a VAE has to carry."""
    cells = rng.sample(range(world.GRID**2), rng.randint(0, 8))
    things = []
    for cell in cells:
        name = rng.choice(NAMES)
        if rng.random() < 0.2:
            corner = [rng.randint(0, SIZE - SPRITE) for _ in range(2)]
            things.append(Thing(name, *corner))
        else:
            things.append(world.place(rng, name, cell))
    return things


RELATED = {2: (1,), 3: (2, 3), 4: (3, 4, 5), 5: (4, 5, 6)}  # objects: numbers of relations


def captioned_image(rng, garble, crowds):
    """A lesson of the Diffuser: (things, caption), with the faults that captions on the web have.

    The image is composed as photographs are, the first thing named near the middle and the others
    close by, so that a caption leaves little open.

    Args: garble: share of relation words drawn anew, at random (one caption in twenty names no
    relation at all); crowds: weights of images of one to five things.
    """
    count = rng.choices((1, 2, 3, 4, 5), crowds)[0]
    if count == 1:
        name = rng.choice(NAMES)
        return compose(rng, [name], []), name
    triples = None
    while triples is None:
        things = world.random_scene(rng, count)
        triples = world.random_triples(rng, things, rng.choice(RELATED[count]))
    names = list(dict.fromkeys(name for a, _, b in triples for name in (a, b)))
    if rng.random() < 0.05:
        return compose(rng, names, []), "; ".join(names)
    told = []
    for subject, word, object in triples:
        if rng.random() < garble:
            word = rng.choice(world.RELATIONS)
        told.append(f"{subject} {word} {object}")
    return compose(rng, names, triples), "; ".join(told)


def compose(rng, names, triples):
    """Places things so that all triples hold: the first near the middle, the others close to it.

    The triples must be those of a real scene. The first thing stands in one of two middle cells if
    the others allow it; every further choice is the same for the same triples.
    """
    cells = range(world.GRID**2)
    middle = rng.sample((5, 10), 2)
    for first in sorted(cells, key=lambda cell: middle.index(cell) if cell in middle else 2):
        near = sorted(cells, key=lambda cell: (distance(cell, first), cell))
        if placed := extend({names[0]: first}, names[1:], triples, near):
            return [world.place(rng, name, cell) for name, cell in placed.items()]
    raise ValueError(f"no scene shows {triples}")


def distance(a, b):
    """City-block distance of two cells."""
    return abs(a // world.GRID - b // world.GRID) + abs(a % world.GRID - b % world.GRID)


def corner(cell):
    """A thing at the top left corner of a cell."""
    return Thing("", cell % world.GRID * world.CELL, cell // world.GRID * world.CELL)


# The relation between two cells, as (cell, cell): word or None. Jitter never changes it.
BETWEEN = {
    pair: world.relation(*map(corner, pair)) for pair in product(range(world.GRID**2), repeat=2)
}


def extend(placed, names, triples, cells):
    """Completes {name: cell} depth first, trying cells in order; None where it cannot be done."""
    if not names:
        return placed
    for cell in cells:
        trial = placed | {names[0]: cell}
        holds = all(
            BETWEEN[trial[a], trial[b]] == word
            for a, word, b in triples
            if a in trial and b in trial
        )
        if cell not in placed.values() and holds:
            if complete := extend(trial, names[1:], triples, cells):
                return complete
    return None


def free_cells(things):
    """The cells in which nothing stands."""
    return sorted(set(range(world.GRID**2)) - {world.cell_of(thing) for thing in things})


def place_in_relation(rng, name, word, anchor, cells):
    """Places a thing where `word` holds toward `anchor`, in the nearest of `cells` that does.

    Returns one `Thing`, at random among equally near cells, or None where no cell will do.
    """
    placed = [world.place(rng, name, cell) for cell in rng.sample(cells, len(cells))]
    fitting = [thing for thing in placed if world.relation(thing, anchor) == word]
    here = world.cell_of(anchor)
    return min(fitting, key=lambda t: distance(world.cell_of(t), here), default=None)


def perform(rng, things, instruction):
    """What a perfect editor makes of an instruction, or None where it cannot be done.

    Understands the five FORMS. What is moved or added comes to stand as near as it can to what it
    is related to; where there is still a choice (of twins, of a cell) it is made at random.
    """
    matches = {action: re.fullmatch(form, instruction) for action, form in FORMS.items()}
    action = next((action for action, match in matches.items() if match), None)
    if action is None:
        return None
    names = matches[action].groups()
    shown = {thing.name: thing for thing in rng.sample(things, len(things))}
    first = shown.get(names[0])
    last = shown.get(names[-1])
    rest = [thing for thing in things if thing != first]
    if action == "add":
        if last is None:
            return None
        spot = place_in_relation(rng, names[0], names[1], last, free_cells(things))
        return [*things, spot] if spot else None
    if first is None:
        return None
    if action == "remove":
        return rest
    if action == "change":
        return [*rest, first._replace(name=names[1])]
    if last is None or last == first:
        return None
    if action == "swap":
        others = [thing for thing in rest if thing != last]
        return [*others, first._replace(name=last.name), last._replace(name=first.name)]
    spot = place_in_relation(rng, names[0], names[1], last, free_cells(things))
    return [*rest, spot] if spot else None


def random_instruction(rng, things):
    """An instruction that makes sense in a scene, as often as not one that can be done."""
    action = rng.choices(("move", "add", "remove", "swap", "change"), (50, 14, 10, 14, 12))[0]
    thing, anchor = rng.sample(things, 2)
    word = rng.choice(world.RELATIONS)
    absent = rng.choice([name for name in NAMES if name not in {t.name for t in things}])
    added = rng.choice([name for name in NAMES if name != anchor.name])  # now and then a twin
    if action == "move" and world.relation(thing, anchor) == word:
        word = world.OPPOSITE[word]
    return {
        "move": f"move the {thing.name} {word} the {anchor.name}",
        "add": f"add a {added} {word} the {anchor.name}",
        "remove": f"remove the {thing.name}",
        "swap": f"swap the {thing.name} and the {anchor.name}",
        "change": f"change the {thing.name} to a {absent}",
    }[action]


def edit(rng, split="train"):
    """One lesson of the Editor: (things before, instruction, things after).

    Scenes of two to six things. The sets of names before and after are of the split; one scene in
    eight shows a thing twice, as generated images do.
    """
    while True:
        before = world.random_scene(rng, rng.choices((2, 3, 4, 5, 6), (2, 3, 5, 5, 2))[0], split)
        if rng.random() < 0.12:
            twin = rng.choice(before).name
            before.append(world.place(rng, twin, rng.choice(free_cells(before))))
        instruction = random_instruction(rng, before)
        after = perform(rng, before, instruction)
        if after is None:
            continue
        names = {thing.name for thing in after}
        if len(names) == 1 or world.split_of(names) == split:
            return before, instruction, after
