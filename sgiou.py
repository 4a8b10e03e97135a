"""Scene graphs: read them from prompts, data sets and VLM answers, write prompts, score (SG-IoU).

In the Generate-Reflect-Edit loop a scene graph says what the image has to show: objects such as
"red circle", and triples such as ("red circle", "left of", "blue square"). `SceneGraph.prompt()`
goes to the text-to-image model, `parse_scene_graph` reads the graph that a VLM saw in the image,
and `sg_iou` compares the two as sets P and G (duplicates count once):

    IoU(P, G) = |P and G| / |P or G|, and 0 if both are empty
    sg_iou compares triples, entity_iou object names, relation_iou relation words

Source: LAION-SG, arXiv 2412.08580, section S5, and test/test_iou.py of its repository.
Differences: names are normalized (case, spaces, "_"), objects in no triple are entities too.
Standard library only; this file works alone.
"""

import json
import re
import sys
from dataclasses import dataclass

# Relation words of GenEval (arXiv 2310.11513) and T2I-CompBench (arXiv 2307.06350), and three more.
SPATIAL = ("left of", "right of", "above", "below", "next to", "near", "on side of", "on top of")
SPATIAL += ("on bottom of", "in front of", "behind", "hidden by", "under", "inside", "beside")


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
            unique.setdefault(tuple(normalize(part) for part in triple), triple)
        object.__setattr__(self, "objects", tuple(self.objects))
        object.__setattr__(self, "triples", tuple(unique.values()))

    def labels(self):
        """`objects` as prompts and questions call them (list): a second dog is "another dog"."""
        names = [normalize(name) for name in self.objects]
        again = [name in names[:n] for n, name in enumerate(names)]
        return [f"another {x}" if twice else x for x, twice in zip(self.objects, again)]

    def prompt(self):
        """The graph as text (str): its triples, then the labels that no triple mentions.

        Two dogs, one of them near a cat, are "dog near cat; another dog".
        """
        return "; ".join([" ".join(triple) for triple in self.triples] + self.alone())

    def alone(self):
        """The labels (list) that no triple mentions."""
        mentioned = {normalize(name) for name in names_in(self.triples)}
        return [label for label in self.labels() if normalize(label) not in mentioned]

    def vocabulary(self, relations=()):
        """The relation words (list) that an answer about this graph may use: these and its own."""
        words = {}
        for word in [*relations, *(relation for _, relation, _ in self.triples)]:
            words.setdefault(normalize(word), word)
        return list(words.values())


def names_in(triples):
    """The subjects and objects of triples, in order, repetitions included."""
    return [name for subject, _, object in triples for name in (subject, object)]


def normalize(text):
    """The spelling in which names and relations are compared: " Left_of" becomes "left of"."""
    return " ".join(text.lower().replace("_", " ").split())


# ---- the metric ----


def sg_iou(pred, gold):
    """Compares two SceneGraphs: {"sg_iou", "entity_iou", "relation_iou"}, floats in [0, 1].

    Symmetric. Source: LAION-SG, arXiv 2412.08580, section S5.
    """
    pairs = zip(comparable_sets(pred), comparable_sets(gold))
    scores = [len(p & g) / max(len(p | g), 1) for p, g in pairs]  # max: two empty sets score 0
    return dict(zip(("sg_iou", "entity_iou", "relation_iou"), scores))


def comparable_sets(graph):
    triples = {tuple(normalize(part) for part in triple) for triple in graph.triples}
    entities = {normalize(name) for name in [*graph.objects, *names_in(graph.triples)]}
    return triples, entities, {relation for _, relation, _ in triples}


# ---- prompts ----


def parse_prompt(text, relations):
    """Read what `SceneGraph.prompt()` writes. A name is one object, however often it appears.

    relations: the known relation words; `find_relation` says in which forms they are found.
    Raises ValueError, one line that shows the right form, for whatever is not understood.
    """
    form = "write e.g. 'red circle left of blue square; green triangle'"
    if not relations:
        raise ValueError(f"prompt {text!r}: list your relation words under `relations`")
    objects, triples, known = [], [], set()
    for clause in text.replace("\ufeff", "").split(";"):
        clause = " ".join(clause.split()).strip(" .!?\"'“”")
        clause = re.sub("(?i)^an? (?:photo|picture|image) of ", "", clause)
        if not clause:
            continue
        found = find_relation(clause, relations)
        mentions = [found[0], found[2]] if found else [clause]
        names = [clean_name(mention) for mention in mentions]
        distinct = {normalize(name) for name in names}
        if len(distinct) < len(names) or not all(is_name(name, relations) for name in names):
            raise ValueError(
                f"prompt clause {clause!r} is not understood; {form}: between semicolons one object"
                f" or one relation of two different objects. Relations: {', '.join(relations)}"
            )
        for mention, name in zip(mentions, names):
            if normalize(name) not in known or normalize(mention).startswith("another "):
                objects.append(name)
        known |= distinct
        if found:
            triples.append((names[0], found[1], names[1]))
    if not objects:
        raise ValueError(f"the prompt is empty; {form}")
    return SceneGraph(objects, triples, caption=text)


def find_relation(text, relations):
    """Splits text at its first relation: (subject, relation as listed, object), or None.

    "left of" is also found as "is to the left of", and "on top of" as "on the top of"; of
    relations that start at the same place the longest is taken.
    """
    listed = {without_the(relation): relation for relation in relations}
    before = (
        "(?:(?:that|which) )?(?:(?:is|are|was|were) )?(?:directly )?(?:(?:to|on|at) )?(?:the )?"
    )
    pattern = rf"(?ai)(?<!\S){before}({either(listed)})(?!\S)"
    match = re.search(pattern, text.replace("_", " "))  # of the same length as text
    if not match:
        return None
    subject, object = text[: match.start()], text[match.end() :]
    return subject.strip(), listed[without_the(match[1])], object.strip()


def without_the(text):
    return re.sub(r"\bthe ", "", normalize(text))


def either(words):
    """A pattern for any of some words that `without_the` returned, the longest first."""
    words = sorted(filter(None, words), key=len, reverse=True)
    patterns = [re.escape(word).replace(r"\ ", r"\s+(?:the\s+)?") for word in words]
    return "|".join(patterns) or "(?!)"  # which matches nothing


def is_name(text, relations):
    """Whether a part of a prompt can be the name of one object."""
    small_words = "an?|the|is|are|was|were|be|and|or|not|no|that|which|between"
    sentence = re.search(rf"(?i)[,&/|!?:()\"]| (?:{small_words}) |n['’]t\b| not$", text)
    return text and not sentence and not find_relation(text, [*SPATIAL, *relations])


def clean_name(text):
    """An object's name without "a", "an", "the" or "another" in front of it."""
    return re.sub(r"(?i)^(?:(?:an?|the|another) )+(?=.)", "", " ".join(text.split()))


# ---- data sets ----


def load_graphs(path, relations=(), limit=None):
    """Reads a data set into list[SceneGraph]. The first character of the file says which it is.

    "[": a JSON list of entries or prompts, read piece by piece; "{": JSON Lines, an entry a line.
        LAION-SG (arXiv 2412.08580): {"img_id", "caption_ori", "items", "relations"}
        GenEval (arXiv 2310.11513): {"include": [{"class", "count", "color", "position"}], "prompt"}
    Anything else: a prompt a line, as in T2I-CompBench (arXiv 2307.06350): "a bee on top of a boy".

    relations: words that split a prompt, besides SPATIAL; limit: stop after so many graphs.
    Entries that cannot be read or lack relations are skipped; stderr says how many and why.
    Raises ValueError, one line, if nothing can be read or a JSON list is broken or cut off.
    """
    graphs, skipped = [], []
    try:
        with open(path, encoding="utf-8-sig") as file:
            while (first := file.read(1)).isspace():
                pass
            if first != "[":
                file.seek(0)
            for place, entry in json_list(file) if first == "[" else lines(file):
                if len(graphs) == limit:
                    break
                try:
                    is_prompt = type(entry) is str and not entry.lstrip().startswith("{")
                    if is_prompt and first != "{":
                        graphs.append(read_line(entry, relations))
                    else:
                        graphs.append(read_entry(entry, place))
                except Exception as error:  # of any type: it is in none of these forms
                    skipped.append(f"{place}: {type(error).__name__}: {error}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; give a complete file in UTF-8") from None
    if not graphs and limit != 0:
        raise ValueError(f"{path}: no scene graph in it; {'; '.join(skipped[:1]) or 'it is empty'}")
    if skipped:
        print(f"{path}: skipped {len(skipped)} entries; the first: {skipped[0]}", file=sys.stderr)
    return graphs


def lines(file):
    """Yields (place, line) for the lines that are not blank."""
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"line {number}", line.strip()


def json_list(file):
    """Yields (place, value) of a JSON list, of which the "[" is read already."""
    text, number = "", 0
    while not (text := text.lstrip(", \t\r\n")).startswith("]"):
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except ValueError as error:  # the value goes on after the text read so far, or it is broken
            more = file.read(max(len(text), 2**16))
            if not more:
                raise ValueError(f"entry {number} is broken or cut off ({error})") from None
            text += more
            continue
        yield f"entry {number}", value
        text, number = text[end:], number + 1
    if (text[1:] + file.read(2**16)).strip():
        raise ValueError("something follows its list")


def read_line(text, relations):
    graph = parse_prompt(text, [*SPATIAL, *relations])  # yours win over an equal one of SPATIAL
    if not relations and not graph.triples:
        raise ValueError("no known relation; list your relation words under `relations`")
    return graph


def read_entry(entry, place):
    """The SceneGraph of a JSON entry, as text or decoded. Raises whatever goes wrong."""
    if isinstance(entry, str):
        entry = json.loads(entry)
    if entry.get("include"):
        return read_geneval(entry, place)
    names, triples = {}, []  # names by item id as text: ids are written as 0 and as "0"
    for item in entry["items"]:
        attributes = item.get("attributes") or []
        words = [attributes] if isinstance(attributes, str) else attributes
        words = [*filter(None, words), clean_name(item["label"])]
        names[str(item["item_id"])] = clean_name(" ".join(words)) if item["label"].strip() else ""
    if len(names) < len(entry["items"]):
        raise ValueError("two items have the same id")
    for record in entry["relations"] or ():
        if record["item1"] == record["item2"]:
            raise ValueError("a relation of an item to itself")
        subject, object = names[str(record["item1"])], names[str(record["item2"])]
        relation = re.sub("(?i)^(is|are)[ _](?=.)", "", " ".join(record["relation"].split()))
        if not (subject and relation and object):
            raise ValueError("a relation without a word, or of an item without a label")
        triples.append((subject, relation, object))
    if not triples:
        raise ValueError("it has no relations")
    objects = filter(None, names.values())
    caption = entry.get("caption_ori") or ""
    return SceneGraph(objects, triples, caption, str(entry.get("img_id", place)))


def read_geneval(entry, place):
    names, objects, triples = {}, [], []  # names by place in the list
    for number, group in enumerate(entry["include"]):
        names[number] = clean_name(f"{group.get('color') or ''} {group['class']}")
        count = group.get("count", 1)
        if count not in range(1, 100):
            raise ValueError(f"{count!r} is no count; make it 1 to 99")
        objects += [names[number]] * count
    for number, group in enumerate(entry["include"]):
        if group.get("position"):
            relation, other = group["position"]
            if other == number:
                raise ValueError("a position of an object next to itself")
            triples.append((names[number], relation, names[other]))
    return SceneGraph(objects, triples, entry.get("prompt") or "", place)


# ---- answers of VLMs ----

OBJECT_LIST = r"\b(?:objects|object list|object names|entities|nodes)\b"  # a key
SECOND = r"\b(?:object|obj|tail|target|to|o|[a-z]+ ?2)\b"  # keys of a triple's second name
NEGATION = r"\b(?:no|not|never|cannot|false)\b|n['’]t\b"
CLAUSE_END = r"[.,;\n\[\](){}]"
# What may stand between the words of a triple: keys, tags, marks but for brackets, small words.
FILLER = r"\w+[\"'”’]?\s?[:=]|</?\w+>|&\w+;|[^\w{}\[\]]|\b(?:\d+|is|are|be|to|on|at|the|an?"
FILLER += r"|that|which|appears|seems|located|positioned|placed|directly|slightly)\b"


def parse_scene_graph(text, objects, relations):
    """The SceneGraph in a VLM's answer, or None if it has none of the words and no empty list.

    Looks for the given words in any notation: JSON, (s, r, o), s -> r -> o, "s is r o", "s - o: r".
    Thoughts, which end at "</think>" or start at a last "<think>" (also <thinking>, <reasoning>),
    are not part of the answer, and what a sentence denies is no triple.
    objects, relations: the words to look for; the graph has them in the spelling given here.
    """
    names = {without_the(clean_name(name)): name for name in objects}
    words = {without_the(relation): relation for relation in relations}
    known = re.compile(rf"(?<!\w)(?:({either(names)})|({either(words)}))(?!\w)")
    # 1. Leave out thoughts, undo JSON escapes, bring JSON triples into order.
    text = re.split(r"(?i)</(?:think\w*|reasoning)>", text)[-1]
    text = re.split(r"(?i)<(?:think\w*|reasoning)>", text)[0]
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    text = text.lower().replace("_", " ")
    for _ in range(2):  # first what is inside, such as {"name": "red circle"}
        text = re.sub(r"\{[^{}]*\}", lambda match: in_order(match[0], known), text)
    # 2. Find triples: a name, a relation and a name with only filler between them.
    found = list(known.finditer(text))
    triples = {}  # by place of the relation word
    for first, second, third in zip(found, found[1:], found[2:]):
        gaps = text[first.end() : second.start()], text[second.end() : third.start()]
        s, r, o = first, second, third
        if re.fullmatch(r"[^\w\n{}\[\]]*", gaps[0]) and re.fullmatch(r"\W?:\W*", gaps[1]):
            s, o, r = first, second, third  # "red circle - blue square: left of"
        if not (s[1] and r[2] and o[1]) or r.start() in triples:
            continue
        if re.search(rf"{SECOND}[\"'”’]?\s?[:=]\W*$", text[max(s.start() - 20, 0) : s.start()]):
            s, o = o, s
        gap = " ".join(gaps)
        before = re.split(CLAUSE_END, text[max(first.start() - 60, 0) : first.start()])[-1]
        after = re.split(CLAUSE_END, text[third.end() : third.end() + 60])[0]
        if len(gap) > 80 or re.sub(FILLER, "", gap) or re.search(NEGATION, f"{before} {after}"):
            continue
        subject, relation, object = (without_the(match[0]) for match in (s, r, o))
        triples[r.start()] = names[subject], words[relation], names[object]
    # 3. Find objects that are listed apart from triples: in brackets, on the line, or below it.
    below = r"(?:\n[ \t]*(?:[-•]|\*\s|\d).*)*"
    listed = re.search(rf"{OBJECT_LIST}(?:\W{{0,9}}\[[^\]]*|.*{below})", text)
    seen = [m for m in found if m[1] and listed and listed.start() < m.start() < listed.end()]
    seen = [names[without_the(match[0])] for match in seen] + names_in(triples.values())
    if not seen and not re.search(r"\[\s*\]", text):
        return None
    return SceneGraph(dict.fromkeys(seen), triples.values())


def in_order(text, known):
    """A JSON object, without others inside, as "<subject, relation, object>" if it is a triple.

    One that holds a single name becomes this name. Any other stays as it is.
    """
    found = list(known.finditer(text))
    if re.search(rf"{OBJECT_LIST}|\b(?:triples|relations)\b", text):
        return text
    if len(found) == 1 and found[0][1]:
        return found[0][0]
    named = [match for match in found if match[1]]
    if len(found) != 3 or len(named) != 2:
        return text
    if re.search(NEGATION, known.sub("", text)):  # such as "holds": false
        return ""
    subject, object = named
    relation = next(match for match in found if match[2])
    if re.search(SECOND, re.split("[{,]", text[: subject.start()])[-1]):  # its key
        subject, object = object, subject
    return f"<{subject[0]}, {relation[0]}, {object[0]}>"
