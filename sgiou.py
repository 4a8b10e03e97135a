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
from dataclasses import dataclass

# Relation words of GenEval (arXiv 2310.11513) and T2I-CompBench (arXiv 2307.06350), and three more.
SPATIAL = ("left of", "right of", "above", "below", "next to", "near", "on side of", "on top of")
SPATIAL += ("on bottom of", "in front of", "behind", "hidden by", "under", "inside", "beside")
EXAMPLE = "write e.g. 'red circle left of blue square; green triangle'"


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
    listed = {without_the(relation): relation for relation in relations if normalise(relation)}
    before = "(?:(?:is|are|was|were)[ _])?(?:(?:to|on)[ _])?(?:the[ _])?"
    pattern = rf"(?i)(?<!\S){before}({either(listed)})(?!\S)"
    match = re.search(pattern, text) if listed else None
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
    if match := re.search(r"(?i) (an?|the|is|are|was|were) ", name):
        return f"{match[1]!r} inside a name"
    return None


def load_graphs(path, relations=(), limit=None):
    """Reads a data set into list[SceneGraph]. Its content, not its name, says which it is.

    LAION-SG (arXiv 2412.08580): {"img_id", "caption_ori", "items", "relations"} per image.
        Entries without relations are skipped, as in its own loader.
    GenEval (arXiv 2310.11513): {"include": [{"class", "count", "color", "position"}], "prompt"}.
    Both as a JSON list, which is read piece by piece, or as JSON Lines. Any other file is text,
    one prompt a line, such as T2I-CompBench's (arXiv 2307.06350): "a bee on the top of a boy".

    relations: words that split a prompt, besides SPATIAL; limit: stop after so many graphs.
    What cannot be read is skipped and counted on stderr, with the first reasons.
    Raises ValueError, one line, if nothing can be read or a JSON list is broken or cut off.
    """
    graphs, skipped = [], []
    for place, entry in read_entries(path):
        if len(graphs) == limit:
            break
        try:
            graphs.append(read_graph(entry, relations, place, skipped))
        except (ValueError, RecursionError) as error:
            skipped.append(f"{place}: {error}")
    if not graphs and limit != 0:
        raise ValueError(f"{path}: no scene graph in it; {'; '.join(skipped[:1]) or 'it is empty'}")
    if skipped:
        reasons = "; ".join(skipped[:3]) + "; ..." * (len(skipped) > 3)
        print(f"{path}: skipped {len(skipped)} entries or relations: {reasons}", file=sys.stderr)
    return graphs


def read_entries(path):
    """Yields (place, entry): the values of a JSON list, or the lines that are not blank (str)."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            while (first := file.read(1)).isspace():
                pass
            if first == "[":
                yield from read_json_list(file)
            else:
                file.seek(0)
                for number, line in enumerate(file, 1):
                    if line.strip() == "{":  # else its lines would pass for prompts
                        raise ValueError(
                            "no scene graph in a JSON object over several lines; make it a list"
                        )
                    if line.strip():
                        yield f"line {number}", line.strip()
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; give a complete file in UTF-8") from None


def read_json_list(file):
    """The same for a file after its first "[", of which it holds about a megabyte at a time."""
    buffer, number = "", 0
    start = 0  # of the next entry in the buffer
    while True:
        start = re.compile(r"[\s,]*").match(buffer, start).end()
        if buffer.startswith("]", start):
            return
        try:
            entry, start = json.JSONDecoder().raw_decode(buffer, start)
            yield f"entry {number}", entry
            number += 1
        except ValueError as error:  # the entry goes on after the buffer, or it is broken
            buffer, start = buffer[start:], 0
            chunk = file.read(max(len(buffer), 2**20)) if len(buffer) < 2**26 else ""
            if not chunk:
                raise ValueError(f"entry {number} is broken or cut off ({error})") from None
            buffer += chunk


def read_graph(entry, relations, place, skipped):
    """The SceneGraph of one entry. Adds a reason to `skipped` for each relation left out."""
    if isinstance(entry, str) and entry.startswith("{"):
        entry = json.loads(entry)
    if isinstance(entry, str):
        graph = parse_prompt(entry, [*SPATIAL, *relations])  # yours replace an equal one
        if not relations and not graph.triples:
            raise ValueError("no known relation; list your relation words under `relations`")
        return graph
    if field(entry, "include", list, []):
        return read_geneval(entry, place)
    names, triples = {}, []  # names by item id as text: ids are written as 0 and as "0"
    for item in field(entry, "items", list):
        item_id = str(field(item, "item_id", int | str))
        if item_id in names:
            raise ValueError(f"two items have the id {item_id}")
        label = field(item, "label", str, "").strip()
        words = [str(word) for word in field(item, "attributes", list, []) if word]
        names[item_id] = clean_name(" ".join([*words, label])) if label else ""
    for number, record in enumerate(field(entry, "relations", list, [])):
        ends = [names.get(str(field(record, end, int | str, ""))) for end in ("item1", "item2")]
        relation = clean_relation(field(record, "relation", str, ""), relations)
        if relation and all(ends):
            triples.append((ends[0], relation, ends[1]))
        else:
            skipped.append(f"{place}: relations[{number}] lacks a word, or an item with a label")
    if not triples:
        raise ValueError("it has no relations")
    image_id = str(field(entry, "img_id", int | str, place))
    objects = filter(None, names.values())
    return SceneGraph(objects, triples, field(entry, "caption_ori", str, ""), image_id)


def read_geneval(entry, place):
    groups = field(entry, "include", list)
    names, objects, triples = [], [], []
    for group in groups:
        names.append(clean_name(f"{field(group, 'color', str, '')} {field(group, 'class', str)}"))
        count = field(group, "count", int, 1)
        if not names[-1] or count not in range(1, 100):
            raise ValueError(f"include {names[-1]!r} times {count}; name 1 to 99 things")
        objects += names[-1:] * count
    for name, group in zip(names, groups):
        if position := field(group, "position", list, []):
            if len(position) != 2 or position[1] not in range(len(names)):
                raise ValueError(f"position {position!r}; make it [relation, index]")
            triples.append((name, str(position[0]), names[position[1]]))
    return SceneGraph(objects, triples, field(entry, "prompt", str, ""), place)


def field(record, name, kind, default=None):
    """record[name], of this kind; with a default it may be missing or null."""
    value = record.get(name) if isinstance(record, dict) else None
    if value is None and default is not None:
        return default
    if not isinstance(value, kind):
        wanted = getattr(kind, "__name__", kind)
        raise ValueError(f"{name!r} is {type(value).__name__}; make it {wanted}")
    return value


ROLES = {"subject": 0, "item1": 0, "head": 0, "source": 0, "s": 0}
ROLES |= {"relation": 1, "relationship": 1, "predicate": 1, "r": 1, "p": 1}
ROLES |= {"object": 2, "item2": 2, "tail": 2, "target": 2, "o": 2}
OBJECT_KEYS = ("objects", "object list", "entities")
GRAPH_KEYS = (*OBJECT_KEYS, "triples", "relations", "relationships", "scene graph")


def parse_scene_graph(text, objects=None, relations=None):
    """The SceneGraph in a VLM's answer, or None if no graph can be read from it.

    Reads JSON, whatever text is around it: {"objects": [str, ...], "triples": [[s, r, o] or
    {"subject", "relation", "object"}, ...]}, or similar keys. Where that gives no triple and the
    words are given, `search_text` finds them in broken JSON and in any other notation.
    Thoughts, which end at "</think>" or start at a last "<think>", are not part of the answer.
    objects, relations: the words allowed (None: any), returned in the spelling given here.
    Never raises on a str; takes time linear in its length.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    names, triples, is_graph = read_json(text)
    graph = restrict(names, triples, objects, relations)
    if not graph.triples and objects and relations:
        more_names, triples = search_text(text, objects, relations)
        graph = restrict(names + more_names, triples, objects, relations)
    return graph if is_graph or graph.objects else None


def read_json(text):
    """(names, triples, is_graph) of the JSON values in the text, up to the first broken one.

    is_graph: whether there is a triple, a key of a graph, or an empty list, which says "nothing".
    """
    names, triples, is_graph, position = [], [], False, 0
    todo = []  # (the key in front of it or None, a JSON value)
    try:
        while start := re.compile(r"[\[{]").search(text, position):
            value, position = json.JSONDecoder(strict=False).raw_decode(text, start.start())
            todo.append((None, value))
            is_graph |= not value
    except (ValueError, RecursionError):
        pass
    todo.reverse()
    while todo:
        key, value = todo.pop()
        is_graph |= key in GRAPH_KEYS
        if isinstance(value, dict):
            parts = [(normalise(own_key), part) for own_key, part in value.items()]
            roles = {ROLES[own_key]: part for own_key, part in parts if own_key in ROLES}
            triple = [roles.get(0), roles.get(1), roles.get(2)]
        elif isinstance(value, list):
            parts = [(None, part) for part in value]
            triple = [part for part in value if not isinstance(part, int | float)]  # no score
            if key in OBJECT_KEYS:
                names += [part for part in value if isinstance(part, str)]
            if key not in (None, "triple"):
                triple = []
        else:
            continue
        if len(triple) == 3 and all(isinstance(part, str) and part.strip() for part in triple):
            triples.append(triple)
        todo += reversed(parts)
    return names, triples, is_graph or bool(triples)


def search_text(text, objects, relations):
    """(names, triples) of the given words, as "objects: s, o", (s, r, o), s -> r -> o, s is r o."""
    name = rf"(?<!\w)({either(normalise(clean_name(name)) for name in objects)})(?!\w)"
    relation = either(without_the(relation) for relation in relations)
    # Between the words of a triple there may be up to 40 of these: punctuation, small words, keys
    # like "tail":. No two of them match the same text, which keeps the search linear.
    small = r"\b(?:is|are|to|on|the|an?)\b(?![\"'”’]?\s?:)"
    gap = rf"(?:[\W_]|{small}|[^\W_]\w{{0,19}}[\"'”’]?\s?:){{1,40}}?"
    triples = re.findall(rf"(?i){name}{gap}(?<!\w)({relation})(?!\w)(?={gap}{name})", text)
    listed = re.search(rf"(?i)\b(?:{either(OBJECT_KEYS)})\b(?:\W{{0,9}}\[[^\]]*|.*)", text)
    return re.findall(rf"(?i){name}", listed[0]) if listed else [], triples


def restrict(names, triples, objects, relations):
    """The SceneGraph of what is allowed, in the allowed spelling (None: everything is)."""
    spellings = {normalise(clean_name(name)): name for name in objects or ()}

    def spell(name):
        name = clean_name(name)
        return name if objects is None else spellings.get(normalise(name))

    kept = []
    for subject, relation, object in triples:
        triple = spell(subject), clean_relation(relation, relations or ()), spell(object)
        if all(triple) and (relations is None or triple[1] in relations):
            kept.append(triple)
    found = {}
    for name in [*map(spell, names), *names_in(kept)]:
        found.setdefault(normalise(name or ""), name)
    return SceneGraph(filter(None, found.values()), kept)


if __name__ == "__main__":
    gold = parse_prompt("a red circle to the left of a blue square; sun", ["left of", "above"])
    answer = "Sure! {'triples': [['the red circle', 'is left of', 'blue square'], ['sun', 'abo"
    seen = parse_scene_graph(answer, gold.objects, gold.vocabulary(["above"]))
    print(f"asked: {gold.prompt()}\nVLM: {answer}\nread as: {seen.prompt()}")
    for name, score in sg_iou(seen, gold).items():
        print(f"{name:13} {score:.2f}")
