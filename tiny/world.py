"""The tiny world: 32 x 32 images of colored shapes, small enough to be measured exactly.

A scene is a list of `Thing`s (name, x, y), each a 6 x 6 sprite in a cell of a 4 x 4 grid with one
pixel of jitter. `render` draws a scene, `parse` finds the things in any image again, and
`exact_graph` says which relations an image shows. The parser is the project's *measure* (and
labels pre-training images); it is never a reward.

The data come in LAION-SG's JSON format: 3 to 5 objects and 3 to 6 relations a prompt, as many
prompts of each number of relations. A prompt belongs to one split by its set of objects, so
validation and test show combinations of objects that no training image holds.

    python tiny/world.py          # writes tiny/data/{train,val,test}.json, the same bytes each time
"""

import json
import random
import zlib
from collections import namedtuple
from itertools import combinations
from pathlib import Path

GRID = 4  # cells a side
CELL = 8  # pixels a cell
SIZE = GRID * CELL  # pixels a side
SPRITE = 6  # pixels a thing's side
JITTER = (1, 2)  # offset of a sprite inside its cell, pixels
MARGIN = 4  # pixels by which one axis must dominate for a relation to hold
FOUND = 0.7  # IoU with a sprite from which the parser accepts a thing

GROUND = (245, 245, 245)
COLORS = {
    "red": (220, 40, 45),
    "green": (35, 165, 80),
    "blue": (45, 85, 230),
    "yellow": (250, 200, 30),
}
SHAPES = {  # width of each of the six rows
    "circle": (2, 4, 6, 6, 4, 2),
    "square": (6, 6, 6, 6, 6, 6),
    "triangle": (2, 2, 4, 4, 6, 6),
}
NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = list(OPPOSITE)
CROWDS = {  # number of relations in a prompt: weights of 3, 4 and 5 objects
    3: (1, 2, 1),
    4: (0, 1, 1),
    5: (0, 1, 2),
    6: (0, 1, 3),
}

Thing = namedtuple("Thing", "name x y")  # x, y: the sprite's top left corner, pixels


def sprite(shape):
    """The (6, 6) boolean mask of a shape, as nested lists."""
    rows = []
    for width in SHAPES[shape]:
        left = (SPRITE - width) // 2
        rows.append([left <= column < left + width for column in range(SPRITE)])
    return rows


def render(things):
    """Draws things in order (later over earlier); returns a (32, 32, 3) uint8 array."""
    import numpy as np

    image = np.empty((SIZE, SIZE, 3), np.uint8)
    image[:] = GROUND
    for thing in things:
        color, shape = thing.name.split()
        mask = np.array(sprite(shape))
        image[thing.y : thing.y + SPRITE, thing.x : thing.x + SPRITE][mask] = COLORS[color]
    return image


def parse(images):
    """Finds the things in images.

    Every pixel takes the nearest palette colour; a thing is found where the pixels of a colour
    agree with a sprite (IoU >= 0.7), best first, no two of them closer than four pixels.

    Args: images: PIL images, 32 x 32, or an (N, 32, 32, 3) uint8 array.
    Returns: one list of `Thing`s per image, in reading order.
    """
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).float()
    if pixels.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError("key 'exact': images that are not of the tiny world; make it false")
    palette = torch.tensor([GROUND, *COLORS.values()], dtype=torch.float32)
    nearest = torch.cdist(pixels.flatten(1, 2), palette).argmin(-1)  # (N, 1024)
    nearest = nearest.view(-1, SIZE, SIZE)
    masks = torch.stack([nearest == i + 1 for i in range(len(COLORS))], 1)  # (N, colours, 32, 32)
    masks = masks.float().flatten(0, 1)[:, None]
    sprites = torch.tensor([sprite(shape) for shape in SHAPES]).float()[
        :, None
    ]  # (shapes, 1, 6, 6)
    overlap = torch.nn.functional.conv2d(masks, sprites)  # (N * colours, shapes, 27, 27)
    area = torch.nn.functional.conv2d(masks, torch.ones(1, 1, SPRITE, SPRITE))
    iou = overlap / (area + sprites.sum((1, 2, 3))[:, None, None] - overlap)
    iou = iou.unflatten(0, (-1, len(COLORS))).flatten(1, 2)  # (N, 12 names, 27, 27)

    found = [[] for _ in images]
    candidates = (iou >= FOUND).nonzero()
    scores = iou[tuple(candidates.T)]
    for index in scores.argsort(descending=True, stable=True).tolist():
        image, name, y, x = candidates[index].tolist()
        if all(max(abs(other.x - x), abs(other.y - y)) >= 4 for other in found[image]):
            found[image].append(Thing(NAMES[name], x, y))
    return [sorted(things, key=lambda thing: (thing.y // CELL, thing.x)) for things in found]


def debris(image):
    """The share of non-ground pixels that belong to no found thing: half-erased or smeared blobs.

    A thing owns the pixels of its sprite and the ring of one pixel around it, which a decoder
    blurs. Args: image: PIL image, 32 x 32, or uint8 array. Returns: in [0, 1]; 0 if all is ground.
    """
    import numpy as np

    pixels = np.asarray(image).astype(int)  # (32, 32, 3)
    palette = np.array([GROUND, *COLORS.values()])
    nearest = np.square(pixels[:, :, None] - palette).sum(-1).argmin(-1)  # (32, 32)
    painted = nearest > 0
    owned = np.zeros_like(painted)
    for thing in parse([image])[0]:
        for row, line in enumerate(sprite(thing.name.split()[1])):
            for column, inside in enumerate(line):
                if inside:
                    top, left = max(thing.y + row - 1, 0), max(thing.x + column - 1, 0)
                    owned[top : thing.y + row + 2, left : thing.x + column + 2] = True
    return float((painted & ~owned).sum() / max(painted.sum(), 1))


def kept(before, after, instruction):
    """(kept, total) of the things that an instruction does not name: in place within 2 px."""
    others = [thing for thing in before if thing.name not in instruction]
    still = [
        any(o.name == t.name and max(abs(o.x - t.x), abs(o.y - t.y)) <= 2 for o in after)
        for t in others
    ]
    return sum(still), len(still)


def relation(subject, object):
    """The relation word between two things by the dominant axis, or None where neither wins."""
    dx = object.x - subject.x
    dy = object.y - subject.y
    if abs(dx) - abs(dy) >= MARGIN:
        return "left of" if dx > 0 else "right of"
    if abs(dy) - abs(dx) >= MARGIN:
        return "above" if dy > 0 else "below"
    return None


def exact_graph(things, gold):
    """What a parsed image shows of a gold graph, as (objects, triples).

    For each gold (subject, object) pair the relation found, one triple per pair of copies, so
    contradictory duplicates cost; objects are all that were found, unasked ones too.
    """
    triples = []
    for subject_name, _, object_name in gold.triples:
        for subject in things:
            for object in things:
                if subject.name == subject_name and object.name == object_name:
                    word = relation(subject, object)
                    if word:
                        triples.append((subject_name, word, object_name))
    return [thing.name for thing in things], triples


def exact_scores(images, graphs):
    """`sg_iou` of each image with its graph, as the parser sees the image (the exact metric)."""
    from sgiou import sg_iou

    return [sg_iou(pred, gold) for pred, gold in zip(exact_graphs(images, graphs), graphs)]


def exact_graphs(images, graphs):
    """The `SceneGraph` that the parser sees in each image, as far as its own graph asks."""
    from sgiou import SceneGraph

    return [SceneGraph(*exact_graph(things, gold)) for things, gold in zip(parse(images), graphs)]


def kept_share(trajectory):
    """Of the things that no instruction named, the share still in place after its edit.

    None if nothing was edited.
    """
    found = parse([step.image for step in trajectory.steps])
    pairs = [
        kept(found[step.source], things, step.instruction)
        for step, things in zip(trajectory.steps, found)
        if step.is_edit
    ]
    total = sum(whole for _, whole in pairs)
    return sum(part for part, _ in pairs) / total if total else None


def split_of(names):
    """'train' (70%), 'val' (10%) or 'test' (20%), by the set of object names alone."""
    bucket = zlib.crc32(",".join(sorted(set(names))).encode()) % 10
    return "test" if bucket < 2 else "val" if bucket == 2 else "train"


def place(rng, name, cell):
    """A thing in a cell (0..15, reading order), jittered."""
    row, column = divmod(cell, GRID)
    return Thing(name, column * CELL + rng.choice(JITTER), row * CELL + rng.choice(JITTER))


def cell_of(thing):
    """The cell (0..15) that holds a thing's centre."""
    return (thing.y + SPRITE // 2) // CELL * GRID + (thing.x + SPRITE // 2) // CELL


def random_scene(rng, count, split="train"):
    """`count` different things in different cells, their set of names in `split`."""
    while True:
        names = rng.sample(NAMES, count)
        if split_of(names) == split:
            break
    cells = rng.sample(range(GRID * GRID), count)
    return [place(rng, name, cell) for name, cell in zip(names, cells)]


def random_triples(rng, things, count):
    """`count` triples true of a scene, one a pair, that mention every thing; None if impossible."""
    pairs = [pair for pair in combinations(things, 2) if relation(*pair)]
    rng.shuffle(pairs)
    for chosen in combinations(pairs, count):
        if len({thing.name for pair in chosen for thing in pair}) == len(things):
            break
    else:
        return None
    ordered = [rng.sample(pair, 2) for pair in chosen]
    return [(a.name, relation(a, b), b.name) for a, b in ordered]


def random_prompt(rng, relations, split="train"):
    """A scene and `relations` (3..6) triples true of it, as prompts are: (things, triples)."""
    while True:
        things = random_scene(rng, rng.choices((3, 4, 5), CROWDS[relations])[0], split)
        if triples := random_triples(rng, things, relations):
            return things, triples


def laion_entry(index, triples):
    """One entry of LAION-SG's JSON; the sentence that the triples make is its caption."""
    names = list(dict.fromkeys(name for a, _, b in triples for name in (a, b)))
    items = []
    for number, name in enumerate(names):
        color, shape = name.split()
        items.append(
            {
                "item_id": number,
                "label": shape,
                "attributes": [color],
                "global_item_id": index * 10 + number,
            }
        )
    relations = [
        {
            "triple_id": number,
            "item1": names.index(a),
            "relation": word,
            "item2": names.index(b),
            "global_relation_id": index * 10 + number,
        }
        for number, (a, word, b) in enumerate(triples)
    ]
    return {
        "img_id": index,
        "name": f"{index:06d}.png",
        "caption_ori": "; ".join(" ".join(triple) for triple in triples),
        "score": "",
        "url": "",
        "items": items,
        "relations": relations,
    }


def write_data(folder):
    """Writes train (2,000 graphs), val (720) and test (1,000); no graph appears twice.

    The numbers of relations take turns (3, 4, 5, 6, 3, ...), so the first N graphs of a file, which
    `limit` takes, are of the same mix.
    """
    folder.mkdir(exist_ok=True)
    seen = set()
    for split, total, seed in (("train", 2000, 1), ("val", 720, 2), ("test", 1000, 11)):
        rng = random.Random(seed)
        entries = []
        while len(entries) < total:
            _, triples = random_prompt(rng, 3 + len(entries) % 4, split)
            if frozenset(triples) not in seen:
                seen.add(frozenset(triples))
                entries.append(laion_entry(len(seen), triples))
        lines = ",\n".join(json.dumps(entry) for entry in entries)
        (folder / f"{split}.json").write_text(f"[\n{lines}\n]\n")
        sets = {frozenset(i["label"] + i["attributes"][0] for i in e["items"]) for e in entries}
        print(f"{split}: {total} graphs of {len(sets)} sets of objects")


if __name__ == "__main__":
    write_data(Path(__file__).parent / "data")
