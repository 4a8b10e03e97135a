"""Scene graphs: read them, write them as prompts, score them (SG-IoU).

In the Generate-Reflect-Edit loop a scene graph says what the image has to show: objects
("red circle") and triples ("red circle", "left of", "blue square"). Its `prompt` goes to the
text-to-image model, `parse_scene_graph` reads the graph that a VLM saw in the image, and `sg_iou`
compares the two as sets P and G (so duplicates collapse):

    IoU(P, G) = |P and G| / |P or G|, and 0 if both are empty
    sg_iou: triples; entity_iou: object names; relation_iou: relation words

Source: LAION-SG, arXiv 2412.08580, section S5 and its test_iou.py.
Differs from it: names are normalised (case, spaces, "_"); objects in no triple are entities too.

Standard library only: this file works alone, anywhere. Demo: python sgiou.py
"""

import json
import re
import sys
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class SceneGraph:
    """What an image has to show, as strings. Any iterables will do; they are stored as tuples."""

    objects: tuple  # of "attributes label", e.g. "red circle"; a name may occur more than once
    triples: tuple  # of (subject, relation, object)
    caption: str = ""
    id: str = ""

    def __post_init__(self):
        object.__setattr__(self, "objects", tuple(self.objects))
        object.__setattr__(self, "triples", tuple(tuple(triple) for triple in self.triples))

    def prompt(self):
        """The triples, then every object that stands in none: nothing asked is lost (str)."""
        mentioned = {normalise(name) for name in _ends(self.triples)}
        alone = [name for name in self.objects if normalise(name) not in mentioned]
        return "; ".join([" ".join(triple) for triple in self.triples] + alone)


def _ends(triples):
    return [name for subject, _, other in triples for name in (subject, other)]


def normalise(text):
    """The spelling in which names are compared: " Left_of" becomes "left of" (str to str)."""
    return " ".join(text.lower().replace("_", " ").split())


def sg_iou(pred, gold):
    """Two SceneGraphs to {"sg_iou", "entity_iou", "relation_iou"}: floats in [0, 1].

    Symmetric. Source: LAION-SG, arXiv 2412.08580, section S5.
    """
    pairs = zip(_comparable_sets(pred), _comparable_sets(gold), strict=True)
    scores = [len(p & g) / max(len(p | g), 1) for p, g in pairs]  # max: an empty union scores 0
    return dict(zip(("sg_iou", "entity_iou", "relation_iou"), scores, strict=True))


def _comparable_sets(graph):
    triples = {tuple(normalise(part) for part in triple) for triple in graph.triples}
    entities = {normalise(name) for name in graph.objects}.union(_ends(triples))
    relations = {relation for _, relation, _ in triples}
    return triples, entities, relations


def load_laion_sg(path, limit=None):
    """Read a JSON list of {img_id, caption_ori, items, relations, ...} into list[SceneGraph].

    An object is its attributes and its label, joined by spaces. Entries without relations are
    dropped, as LAION-SG's own loader does, and counted on stderr. limit: keep the first few only.
    Raises ValueError: one line that names file, entry index and field, and says what to do.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            entries = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON to read ({error}); check path and content") from None
    if type(entries) is not list:
        raise ValueError(f"{path}: is no JSON list; make it a list with one object per image")
    graphs = [_read_entry(entry, index, path) for index, entry in enumerate(entries)]
    kept = [graph for graph in graphs if graph.triples]
    if not kept:
        raise ValueError(f"{path}: holds no scene graph with relations; give other data")
    if len(kept) < len(graphs):
        print(f"{path}: {len(graphs) - len(kept)} entries dropped: no relations", file=sys.stderr)
    return kept[:limit]


def _read_entry(entry, index, path):
    where = f"{path}: entry {index}, field "
    names = {}  # by item id
    for number, item in enumerate(_read_field(entry, "items", list, where)):
        place = f"{where}items[{number}]."
        item_id = _read_field(item, "item_id", int | str, place)
        if item_id in names:
            raise ValueError(f"{place}item_id: {item_id!r} is taken; give every item its own id")
        words = _read_field(item, "attributes", list, place, default=[])
        if not all(isinstance(word, str) for word in words):
            raise ValueError(f"{place}attributes: not all are str; quote them or leave them out")
        words = [*words, _read_field(item, "label", str, place)]
        names[item_id] = " ".join(" ".join(words).split())

    triples = []
    for number, record in enumerate(_read_field(entry, "relations", list, where)):
        place = f"{where}relations[{number}]."
        for end in ("item1", "item2"):
            if _read_field(record, end, int | str, place) not in names:
                raise ValueError(f"{place}{end}: no item has id {record[end]!r}; correct the id")
        relation = _read_field(record, "relation", str, place).strip()
        triples.append((names[record["item1"]], relation, names[record["item2"]]))

    image_id = _read_field(entry, "img_id", int | str, where)
    caption = _read_field(entry, "caption_ori", str, where, default="")
    return SceneGraph(names.values(), triples, caption, str(image_id))


def _read_field(record, name, kind, where, default=None):
    """Optional if there is a default; else it must be there, and a string must not be blank."""
    value = record.get(name) if isinstance(record, dict) else None
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


def parse_prompt(text, relations):
    """The inverse of `SceneGraph.prompt`: a SceneGraph with each object once, by first mention.

    relations: the known relation words; the longest one in a clause splits it (names hold none).
    Raises ValueError on an empty prompt and on a clause that lacks its subject or object.
    """
    clauses = [" ".join(clause.split()) for clause in text.split(";")]
    parts = [_split_clause(clause, relations) for clause in clauses if clause]
    triples = [part for part in parts if len(part) == 3]
    objects = [name for part in parts for name in part[::2]]
    if not objects:
        raise ValueError("the prompt is empty; write e.g. 'red circle left of blue square'")
    return SceneGraph(dict.fromkeys(objects), triples, caption=text)


def _split_clause(clause, relations):
    for relation in sorted(relations, key=len, reverse=True):
        words = re.escape(normalise(relation)).replace(r"\ ", "[ _]")
        parts = re.split(rf"(?<!\S){words}(?!\S)", clause, flags=re.IGNORECASE)
        if not all(parts) or len(parts) > 2:
            raise ValueError(f"prompt clause {clause!r}: {relation!r} needs one object a side")
        if len(parts) == 2:
            return parts[0].strip(), relation, parts[1].strip()
    return (clause,)


TRIPLE_KEYS = (("subject", "item1"), ("relation", "predicate"), ("object", "item2"))
OPENING = re.compile(r"(?P<opening>[\[({])")
TOKEN = re.compile(r"""(?x)
      (?P<opening> [\[({] )
    | (?P<closing> [\])}] )
    | (?: (?P<string>                         # an apostrophe before a letter closes nothing
            " (?: [^"\\\n] | \\. )*           "
          | ' (?: [^'\\\n] | \\. | '(?=\w) )* '(?!\w)
          | [“”] [^“”\n]*                     [“”]
          | [‘’] (?: [^‘’\n] | ’(?=\w) )*     ’(?!\w) )
        | (?P<broken> ["'“”‘’] [^\n]* )       # never closed: costs the rest of its line
        | (?P<word> [^\s\[\](){}:,"“”]+ )     # an unquoted key, a number, None, true
      ) (?P<colon> \s*: )?
""")


def parse_scene_graph(text, objects=None, relations=None):
    """The SceneGraph in a VLM's answer. Never raises on a str; time is linear in its length.

    Reads {"objects": [str, ...], "triples": [[s, r, o] or {"subject", "relation", "object"}, ...]}
    and what is near it: prose and fences around, any quotes, lost commas or brackets, a cut tail.
    objects, relations: the words allowed (None: any); they return in the spelling given here.
    """
    names = []
    triples = []
    key = None  # of the next value
    stack = deque(maxlen=64)  # open containers: (own key, [(key, value), ...]); no graph is deeper
    position = 0
    while match := (TOKEN if stack else OPENING).search(text, position):
        position = match.end()
        kind = match.lastgroup
        if kind == "colon":
            key = normalise(match[0]).strip(": \"'“”‘’")
            continue
        if kind == "opening":
            stack.append((key, []))
        elif kind == "closing":
            triples += _find_triple(*stack.pop())
        else:
            value = _unquote(match[0]) if kind == "string" else None
            own_key, pairs = stack[-1]
            pairs.append((key, value))
            if own_key == "objects" and key is None:
                names.append(value)
        key = None

    spell = _spelling(objects)
    spell_relation = _spelling(relations)
    triples = [(spell(a), spell_relation(relation), spell(b)) for a, relation, b in triples]
    triples = [triple for triple in triples if all(triple)]
    names = [spell(name) for name in names if name and spell(name)]
    listed = {normalise(name) for name in names}
    names += [name for name in dict.fromkeys(_ends(triples)) if normalise(name) not in listed]
    return SceneGraph(names, triples)


def _find_triple(own_key, pairs):
    fields = dict(pairs)
    parts = [fields.get(name) or fields.get(item) for name, item in TRIPLE_KEYS]
    if own_key is None and set(fields) == {None}:  # a list in a list, not {"key": [a, b, c]}
        parts = [value for _, value in pairs]
    return [tuple(parts)] if len(parts) == 3 and all(parts) else []


def _unquote(string):
    try:
        return json.loads(f'"{string[1:-1]}"', strict=False).strip()
    except ValueError:  # an escape or a quote that JSON does not know: 'man\'s "hat"'
        return string[1:-1].replace("\\", "").strip()


def _spelling(allowed):
    """A function from a word to its spelling among those allowed, None if it is not."""
    if allowed is None:
        return lambda word: word
    spellings = {normalise(word): word for word in allowed}
    return lambda word: spellings.get(normalise(word))


if __name__ == "__main__":
    gold = parse_prompt("red circle left of blue square; sun above sea", ["left of", "above"])
    answer = "Sure! {'triples': [['Red circle', 'left_of', 'blue square'], ['sun', 'abo"
    seen = parse_scene_graph(answer)
    print(f"asked: {gold.prompt()}\nVLM: {answer}\nread as: {seen.prompt()}")
    for name, score in sg_iou(seen, gold).items():
        print(f"{name:13} {score:.2f}")
