"""What the embedded models are taught: scenes, edits and questions, made by the thousand."""

import re

import world
from world import NAMES, SIZE, SPRITE, Thing

NAME = "|".join(NAMES)


def messy_scene(rng):
    """Up to six things, some of them anywhere, overlapping or cut: what a VAE has to carry."""
    cells = rng.sample(range(world.GRID**2), rng.randint(0, 6))
    things = []
    for cell in cells:
        name = rng.choice(NAMES)
        if rng.random() < 0.2:
            corner = [rng.randint(0, SIZE - SPRITE) for _ in range(2)]
            things.append(Thing(name, *corner))
        else:
            things.append(world.place(rng, name, cell))
    return things


def caption(rng, things, garble):
    """A caption as the web writes them: some relations wrong, some captions without any.

    Args: garble: share of relation words replaced by a random one.
    """
    triples = None
    if len({thing.name for thing in things}) == len(things) and len(things) > 1:
        triples = world.random_triples(rng, things)
    if triples is None or rng.random() < 0.05:
        return "; ".join(thing.name for thing in rng.sample(things, len(things)))
    told = []
    for subject, word, object in triples:
        if rng.random() < garble:
            word = rng.choice(world.RELATIONS)
        told.append(f"{subject} {word} {object}")
    return "; ".join(told)


def free_cells(things):
    """The cells in which nothing stands."""
    return sorted(set(range(world.GRID**2)) - {world.cell_of(thing) for thing in things})


def cells_in_relation(rng, name, word, anchor, cells):
    """Of `cells`, things called `name` placed where `word` holds towards `anchor`."""
    placed = [world.place(rng, name, cell) for cell in cells]
    return [thing for thing in placed if world.relation(thing, anchor) == word]


def perform(rng, things, instruction):
    """What a perfect editor makes of an instruction, or None where it cannot be done.

    Understands "move the A <relation> the B", "add a A <relation> the B", "remove the A",
    "swap the A and the B" and "change the A to a B"; a free choice of cell is made at random.
    """
    text = re.sub(r"\b(the|a) ", "", instruction)
    names = re.findall(NAME, text)
    shown = {thing.name: thing for thing in rng.sample(things, len(things))}
    word = next((word for word in world.RELATIONS if f" {word} " in text), None)
    first = shown.get(names[0]) if names else None
    second = shown.get(names[1]) if len(names) > 1 else None
    if text == f"move {' '.join(names[:1])} {word} {' '.join(names[1:])}":
        if first is None or second is None or first == second:
            return None
        spots = cells_in_relation(rng, first.name, word, second, free_cells(things))
        return [t for t in things if t != first] + [rng.choice(spots)] if spots else None
    if text == f"add {' '.join(names[:1])} {word} {' '.join(names[1:])}":
        if second is None:
            return None
        spots = cells_in_relation(rng, names[0], word, second, free_cells(things))
        return [*things, rng.choice(spots)] if spots else None
    if first and text == f"remove {first.name}":
        return [thing for thing in things if thing != first]
    if first and second and text == f"swap {first.name} and {second.name}":
        others = [thing for thing in things if thing not in (first, second)]
        return [*others, first._replace(name=second.name), second._replace(name=first.name)]
    if first and len(names) == 2 and text == f"change {first.name} to {names[1]}":
        return [thing for thing in things if thing != first] + [first._replace(name=names[1])]
    return None


def random_instruction(rng, things):
    """An instruction that makes sense in a scene, as often as not one that can be done."""
    action = rng.choices(("move", "add", "remove", "swap", "change"), (58, 10, 10, 10, 12))[0]
    thing, anchor = rng.sample(things, 2)
    word = rng.choice(world.RELATIONS)
    absent = rng.choice([name for name in NAMES if name not in {t.name for t in things}])
    if action == "move" and world.relation(thing, anchor) == word:
        word = world.OPPOSITE[word]
    return {
        "move": f"move the {thing.name} {word} the {anchor.name}",
        "add": f"add a {absent} {word} the {anchor.name}",
        "remove": f"remove the {thing.name}",
        "swap": f"swap the {thing.name} and the {anchor.name}",
        "change": f"change the {thing.name} to a {absent}",
    }[action]


def edit(rng, split="train"):
    """One lesson of the Editor: (things before, instruction, things after).

    Both scenes are combinations of the split; one scene in eight shows a thing twice, as generated
    pictures do.
    """
    while True:
        before = world.random_scene(rng, rng.choices((2, 3, 4), (2, 4, 4))[0], split)
        if rng.random() < 0.12:
            twin = rng.choice(before).name
            before.append(world.place(rng, twin, rng.choice(free_cells(before))))
        instruction = random_instruction(rng, before)
        after = perform(rng, before, instruction)
        if after is None:
            continue
        names = {thing.name for thing in after}
        if not 2 <= len(names) <= 4 or world.split_of(names) == split:
            return before, instruction, after
