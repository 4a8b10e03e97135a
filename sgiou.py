"""Scene graphs: read them from prompts, data sets and VLM answers, write prompts, score (SG-IoU).

In the Generate-Reflect-Edit loop a scene graph says what the image has to show: objects such as
"red circle", and triples such as ("red circle", "left of", "blue square"). `SceneGraph.prompt()`
goes to the text-to-image model, `parse_scene_graph` reads the graph that a VLM saw in the image,
and `sg_iou` compares the two as sets P and G (duplicates count once):

    IoU(P, G) = |P and G| / |P or G|, and 0 if both are empty
    sg_iou compares triples, entity_iou object names, relation_iou relation words

Source: LAION-SG, arXiv 2412.08580, section S5, and test/test_iou.py of its repository.
Differences: names are normalised (case, spaces, "_"), objects in no triple are entities too.
Standard library only; this file works alone. Demo: python sgiou.py
"""

import json
import re
import sys
from collections import deque
from dataclasses import dataclass

# Relation words of GenEval (arXiv 2310.11513) and T2I-CompBench (arXiv 2307.06350), and three more.
SPATIAL = ("left of", "right of", "above", "below", "next to", "near", "on side of", "on top of")
SPATIAL += ("on bottom of", "in front of", "behind", "hidden by", "under", "inside", "beside")
EXAMPLE = "write e.g. 'red circle left of blue square; sun'"


@dataclass(frozen=True)
class SceneGraph:
    """What an image has to show. Any iterables will do; they are stored as tuples."""

    objects: tuple  # of names like "red circle"; two such circles are the same name twice
    triples: tuple  # of (subject, relation, object), three strings; a repeated one is dropped
    caption: str = ""
    id: str = ""

    def __post_init__(self):
        unique = {}
        for triple in map(tuple, self.triples):
            unique.setdefault(tuple(normalise(part) for part in triple), triple)
        object.__setattr__(self, "objects", tuple(self.objects))
        object.__setattr__(self, "triples", tuple(unique.values()))

    def labels(self):
        """`objects` as prompts and questions call them (list): a second dog is "another dog"."""
        names = [normalise(name) for name in self.objects]
        again = [name in names[:n] for n, name in enumerate(names)]
        return [f"another {x}" if twice else x for x, twice in zip(self.objects, again)]

    def prompt(self):
        """The graph as text (str): its triples, then the labels that no triple mentions.

        Two dogs, one of them near a cat, are "dog near cat; another dog".
        """
        mentioned = {normalise(name) for name in names_in(self.triples)}
        alone = [label for label in self.labels() if normalise(label) not in mentioned]
        return "; ".join([" ".join(triple) for triple in self.triples] + alone)

    def vocabulary(self, relations=()):
        """The relation words (list) that an answer about this graph may use: these and its own."""
        words = {}
        for word in [*relations, *(relation for _, relation, _ in self.triples)]:
            words.setdefault(normalise(word), word)
        return list(words.values())


def names_in(triples):
    """The subjects and objects of triples, in order, repetitions included."""
    return [name for subject, _, object in triples for name in (subject, object)]


def normalise(text):
    """The spelling in which names and relations are compared: " Left_of" becomes "left of"."""
    return " ".join(text.lower().replace("_", " ").split())


def sg_iou(pred, gold):
    """Compares two SceneGraphs: {"sg_iou", "entity_iou", "relation_iou"}, floats in [0, 1].

    Symmetric. Source: LAION-SG, arXiv 2412.08580, section S5.
    """
    pairs = zip(comparable_sets(pred), comparable_sets(gold))
    scores = [len(p & g) / max(len(p | g), 1) for p, g in pairs]  # max: two empty sets score 0
    return dict(zip(("sg_iou", "entity_iou", "relation_iou"), scores))


def comparable_sets(graph):
    triples = {tuple(normalise(part) for part in triple) for triple in graph.triples}
    entities = {normalise(name) for name in [*graph.objects, *names_in(graph.triples)]}
    return triples, entities, {relation for _, relation, _ in triples}


def clean_name(text):
    """An object's name without "a", "an", "the" or "another" in front of it."""
    return re.sub(r"(?i)^(?:(?:an?|the|another) )+(?=.)", "", " ".join(text.split()))


def clean_relation(text, relations=()):
    """The listed relation that the text means, else the text without "is" or "are" in front."""
    text = " ".join(text.split())
    found = find_relation(text, relations)
    if found and not found[0] and not found[2]:
        return found[1]
    return re.sub(r"(?i)^(?:is|are) (?=.)", "", text)


def find_relation(text, relations):
    """Splits text at its first relation: (subject, relation as listed, object), or None.

    "left of" is also found as "is to the left of", and "on top of" as "on the top of"; of
    relations that start at the same place the longest is taken.
    """
    listed = {without_the(relation): relation for relation in reversed(relations)}
    before = "(?:(?:is|are)[ _])?(?:(?:to|on)[ _])?(?:the[ _])?"
    match = listed and re.search(rf"(?i)(?<!\S){before}({either(listed)})(?!\S)", text)
    if not match:
        return None
    subject, object = text[: match.start()], text[match.end() :]
    return subject.strip(), listed[without_the(match[1])], object.strip()


def without_the(relation):
    return re.sub(r"\bthe (?=.)", "", normalise(relation))


def either(words):
    """A pattern for any of the normalised words, the longest first."""
    ordered = sorted(filter(None, words), key=len, reverse=True)
    return "|".join(re.escape(word).replace(r"\ ", r"[\s_]+(?:the[\s_]+)?") for word in ordered)


def parse_prompt(text, relations):
    """The inverse of `SceneGraph.prompt()`. A name is one object, however often it appears.

    relations: the known relation words, at least one; `find_relation` says how they are found.
    Raises ValueError for whatever is not understood, in one line that shows the right form.
    """
    if not relations:
        raise ValueError(f"prompt {text!r}: list your relation words under `relations`")
    objects, triples, known = [], [], set()
    for clause in text.replace("\ufeff", "").split(";"):
        clause = " ".join(clause.split()).rstrip(" .")
        if not clause:
            continue
        found = find_relation(clause, relations)
        mentions = [found[0], found[2]] if found else [clause]
        names = [clean_name(mention) for mention in mentions]
        problem = next(filter(None, [misread(name, relations) for name in names]), "")
        if found and normalise(names[0]) == normalise(names[1]):
            problem = problem or "the same name on both sides"
        if problem:
            raise ValueError(f"prompt clause {clause!r}: {problem}; {EXAMPLE}")
        for mention, name in zip(mentions, names):
            if normalise(name) not in known or normalise(mention).startswith("another "):
                objects.append(name)
            known.add(normalise(name))
        if found:
            triples.append((names[0], found[1], names[1]))
    if not objects:
        raise ValueError(f"the prompt is empty; {EXAMPLE}")
    return SceneGraph(objects, triples, caption=text)


def misread(name, relations):
    """Why a name in a prompt cannot be meant as one, or None."""
    if not name:
        return "a relation needs an object on each side"
    if "," in name:
        return "use ; instead of a comma"
    if find_relation(name, relations):
        return "two relations in one clause"
    if found := find_relation(name, SPATIAL):
        return f"{found[1]!r} is not listed under `relations`"
    if match := re.search(r"(?i) (an?|the|is|are) ", name):
        return f"{match[1]!r} inside a name"
    return None


def load_laion_sg(path, limit=None):
    """Reads a JSON list of {img_id, caption_ori, items, relations, ...} into list[SceneGraph].

    An object's name is its attributes and its label, joined by spaces. Entries without relations
    are dropped, as in LAION-SG's own loader, and counted on stderr.
    limit: keep only the first so many.
    Raises ValueError: one line that names file, entry and field, and says what to do.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            entries = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON to read ({error}); check path and content") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: is no JSON list; make it a list with one object per image")
    graphs = [read_entry(entry, f"{path}: entry {n}, field ") for n, entry in enumerate(entries)]
    kept = [graph for graph in graphs if graph.triples]
    if not kept:
        raise ValueError(f"{path}: holds no scene graph with relations; give other data")
    if len(kept) < len(graphs):
        print(f"{path}: {len(graphs) - len(kept)} entries dropped: no relations", file=sys.stderr)
    return kept[:limit]


def read_entry(entry, where):
    names = {}  # by item id
    for number, item in enumerate(read_field(entry, "items", list, where)):
        place = f"{where}items[{number}]."
        item_id = read_field(item, "item_id", int | str, place)
        if item_id in names:
            raise ValueError(f"{place}item_id: {item_id!r} is taken; give every item its own id")
        attributes = read_field(item, "attributes", list, place, default=[])
        if not all(isinstance(word, str) for word in attributes):
            raise ValueError(f"{place}attributes: not all are str; quote them or leave them out")
        label = read_field(item, "label", str, place)
        names[item_id] = " ".join(" ".join([*attributes, label]).split())

    triples = []
    for number, record in enumerate(read_field(entry, "relations", list, where)):
        place = f"{where}relations[{number}]."
        for end in ("item1", "item2"):
            if read_field(record, end, int | str, place) not in names:
                raise ValueError(f"{place}{end}: no item has id {record[end]!r}; correct the id")
        relation = read_field(record, "relation", str, place).strip()
        triples.append((names[record["item1"]], relation, names[record["item2"]]))

    image_id = read_field(entry, "img_id", int | str, where)
    caption = read_field(entry, "caption_ori", str, where, default="")
    return SceneGraph(names.values(), triples, caption, str(image_id))


def read_field(record, name, kind, where, default=None):
    """record[name], checked. With a default the field may be missing or blank."""
    value = record.get(name, default) if isinstance(record, dict) else None
    if not isinstance(record, dict):
        problem = "is not inside a JSON object; put {...} around it"
    elif value is None and default is not None:
        return default
    elif value is None:
        problem = "is missing; add it, or remove the entry"
    elif not isinstance(value, kind):
        problem = f"is {type(value).__name__}; make it {getattr(kind, '__name__', kind)}"
    elif default is None and not str(value).strip():
        problem = "is empty; fill it in, or remove the entry"
    else:
        return value
    raise ValueError(f"{where}{name}: {problem}")


ROLES = {"subject": 0, "item1": 0, "relation": 1, "predicate": 1, "object": 2, "item2": 2}


def parse_scene_graph(text, objects=None, relations=None):
    """The SceneGraph in a VLM's answer. Never raises on a str; takes time linear in its length.

    Reads {"objects": [str, ...], "triples": [[s, r, o] or {"subject", "relation", "object"}, ...]}
    and anything close to it: prose and code fences around it, any quotes, missing commas or
    brackets, an answer that was cut off.
    objects, relations: the words allowed (None: any), returned in the spelling given here.
    """
    names, triples = [], []
    for key, pairs, closed in containers(text):
        if key == "objects":
            names += [value for own_key, value in pairs if own_key is None]
        elif closed:
            triples += find_triple(key, pairs)

    spell_name, spell_relation = speller(objects), speller(relations)
    triples = [(spell_name(s), spell_relation(r), spell_name(o)) for s, r, o in triples]
    triples = [triple for triple in triples if all(triple)]
    names = [spell_name(name) for name in names if name and spell_name(name)]
    listed = {normalise(name) for name in names}
    names += [name for name in dict.fromkeys(names_in(triples)) if normalise(name) not in listed]
    return SceneGraph(names, triples)


def find_triple(key, pairs):
    """A list with the triple in a container, or an empty list."""
    if key is None and all(own_key is None for own_key, _ in pairs):  # not {"key": [a, b, c]}
        parts = [value for _, value in pairs]
    else:
        fields = {ROLES[own_key]: value for own_key, value in pairs if own_key in ROLES}
        parts = [fields.get(role) for role in range(3)]
    return [tuple(parts)] if len(parts) == 3 and all(parts) else []


def speller(allowed):
    """A function from a word to its spelling among those allowed, or to None if it is not."""
    if allowed is None:
        return lambda word: word
    spellings = {normalise(word): word for word in allowed}
    return lambda word: spellings.get(normalise(word))


OPENING = re.compile(r"(?P<opening>[\[({])")
TOKEN = re.compile(
    r"""
      (?P<opening> [\[({] )
    | (?P<closing> [\])}] )
    | (?: (?P<string>                         # an apostrophe before a letter ends no string
            " (?: [^"\\\n] | \\. )*           "
          | ' (?: [^'\\\n] | \\. | '(?=\w) )* '(?!\w)
          | [“”] [^“”\n]*                     [“”]
          | [‘’] (?: [^‘’\n] | ’(?=\w) )*     ’(?!\w) )
        | (?P<broken> ["'“”‘’] [^\n]* )       # never closed: skip the rest of the line
        | (?P<word> [^\s\[\](){}:,"“”]+ )     # an unquoted key, a number, None, true
      ) (?P<colon> \s*: )?
    """,
    re.VERBOSE,
)


def containers(text):
    """Yields (key, pairs, closed) for each [...], (...) or {...} in the text, inner ones first.

    key: the key in front of it, or None; pairs: the (key or None, value) inside it, where a value
    that is no string becomes None; closed: False if the text ends before its bracket does.
    """
    open_containers = deque(maxlen=64)  # (key, pairs); nothing that we look for is nested deeper
    key = None  # the key that belongs to the next value
    position = 0
    while match := (TOKEN if open_containers else OPENING).search(text, position):
        position = match.end()
        kind = match.lastgroup
        if kind == "colon":
            key = normalise(match[0]).strip(": \"'“”‘’")
            continue
        if kind == "opening":
            open_containers.append((key, []))
        elif kind == "closing":
            yield *open_containers.pop(), True
        else:
            open_containers[-1][1].append((key, unquote(match[0]) if kind == "string" else None))
        key = None
    while open_containers:
        yield *open_containers.pop(), False


def unquote(string):
    try:
        return json.loads(f'"{string[1:-1]}"', strict=False).strip()
    except ValueError:  # an escape or a quote that JSON does not know: 'man\'s "hat"'
        return string[1:-1].replace("\\", "").strip()


if __name__ == "__main__":
    gold = parse_prompt("red circle left of blue square; sun above sea", ["left of", "above"])
    answer = "Sure! {'triples': [['Red circle', 'left_of', 'blue square'], ['sun', 'abo"
    seen = parse_scene_graph(answer)
    print(f"asked: {gold.prompt()}\nVLM: {answer}\nread as: {seen.prompt()}")
    for name, score in sg_iou(seen, gold).items():
        print(f"{name:13} {score:.2f}")
