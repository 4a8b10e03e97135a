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
        labels, known = [], set()
        for name in self.objects:
            labels.append(f"another {name}" if normalize(name) in known else name)
            known.add(normalize(name))
        return labels

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
    """Compares two SceneGraphs: {"sg_iou", "entity_iou", "relation_iou"}, floats in [0, 1]."""
    pairs = zip(comparable_sets(pred), comparable_sets(gold))
    scores = [len(p & g) / max(len(p | g), 1) for p, g in pairs]  # max: two empty sets score 0
    return dict(zip(("sg_iou", "entity_iou", "relation_iou"), scores))


def comparable_sets(graph):
    triples = {tuple(normalize(part) for part in triple) for triple in graph.triples}
    entities = {normalize(name) for name in [*graph.objects, *names_in(graph.triples)]}
    return triples, entities, {relation for _, relation, _ in triples}


# ---- prompts ----


def parse_prompt(text, relations):
    """Read what `SceneGraph.prompt()` writes.

    A name is one object, however often it appears, unless it says "another dog".

    relations: the known relation words. Raises ValueError, one line that shows the right form, for
    whatever is not understood.
    """
    form = "write e.g. 'red circle left of blue square; green triangle'"
    if not relations:
        raise ValueError(f"prompt {text!r}: list your relation words under `relations`")
    objects, triples = [], []
    for clause in text.split(";"):
        clause = " ".join(clause.split()).strip(" .!?'“”\ufeff")
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
        known = {normalize(name) for name in objects}
        for mention, name in zip(mentions, names):
            if normalize(name) not in known or normalize(mention).startswith("another "):
                objects.append(name)
        if found:
            triples.append((names[0], found[1], names[1]))
    if not objects:
        raise ValueError(f"the prompt is empty; {form}")
    return SceneGraph(objects, triples, caption=text)


def find_relation(text, relations):
    """Splits text at its first relation: (subject, relation as listed, object), or None.

    "left of" is also found as "is to the left of", and "on top of" as "on the top of".
    """
    listed = {without_the(relation): relation for relation in relations}
    before = "(?:(?:that|which|is|are|was|were|directly|to|on|at|the) )*"
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
    words = sorted(words, key=len, reverse=True)
    patterns = [re.escape(word).replace(r"\ ", r"\s+(?:the\s+)?") for word in words]
    return "|".join(patterns) or "(?!)"  # which matches nothing


def is_name(text, relations):
    """Whether a part of a prompt can be the name of one object."""
    small_words = "an?|the|is|are|was|were|be|and|or|not|no|that|which|between"
    sentence = re.search(rf"(?i)[,&/|!?:()\[\]{{}}\"]| (?:{small_words}) |n['’]t\b| not$", text)
    return text and not sentence and not find_relation(text, [*SPATIAL, *relations])


def clean_name(text):
    """An object's name without "a", "an", "the" or "another" in front of it."""
    return re.sub(r"(?i)^(?:(?:an?|the|another) )+(?=.)", "", " ".join(text.split()))


# ---- data sets ----


def load_graphs(path, relations=(), limit=None):
    """Reads a data set into list[SceneGraph]: a JSON list of entries, or an entry per line.

    LAION-SG (arXiv 2412.08580): {"img_id", "caption_ori", "items", "relations"}
    GenEval (arXiv 2310.11513): {"include": [{"class", "count", "color", "position"}], "prompt"}
    T2I-CompBench (arXiv 2307.06350), and your own: a prompt

    relations: words that split a prompt, besides SPATIAL; limit: stop after so many graphs.
    Entries that cannot be read are skipped; stderr says how many and why. Raises ValueError, one
    line, if none can be read or a JSON list is broken or cut off.
    """
    graphs, skipped = [], []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for place, entry in entries(file):
                if len(graphs) == limit:
                    break
                try:
                    graphs.append(read_entry(entry, place, relations))
                except Exception as error:  # of any type, whatever the entry is instead
                    skipped.append(f"{place}: {type(error).__name__}: {error}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; give a complete file in UTF-8") from None
    if not graphs:
        raise ValueError(f"{path}: no scene graph in it; {'; '.join(skipped[:1]) or 'it is empty'}")
    if skipped:
        print(f"{path}: skipped {len(skipped)} entries; the first: {skipped[0]}", file=sys.stderr)
    return graphs


def entries(file):
    """Yields (place, entry): a line as text, or a value of a JSON list, read piece by piece."""
    text = file.read(2**16).lstrip()
    if not text.startswith("["):
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", line.strip()
        return
    text, number = text[1:], 0
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
    if (text[1:] + file.read()).strip():
        raise ValueError("something follows its list")


def read_entry(entry, place, relations):
    """The SceneGraph of an entry. Raises whatever goes wrong."""
    if isinstance(entry, str) and entry.startswith("{"):
        entry = json.loads(entry)
    if isinstance(entry, dict):
        return read_geneval(entry, place) if "include" in entry else read_laion(entry, place)
    graph = parse_prompt(entry, [*SPATIAL, *relations])  # yours win over an equal one
    if not relations and not graph.triples:
        raise ValueError("no known relation; list your relation words under `relations`")
    return graph


def read_laion(entry, place):
    names, triples = {}, []  # names by item id as text: ids are written as 0 and as "0"
    for item in entry["items"]:
        id, label = str(item["item_id"]), clean_name(item["label"])
        attributes = item.get("attributes") or []
        if isinstance(attributes, str):
            attributes = [attributes]
        if id in names:
            raise ValueError(f"two items have the id {id}")
        if label:
            names[id] = clean_name(" ".join([*filter(None, attributes), label]))
    for record in entry["relations"] or ():
        subject, object = str(record["item1"]), str(record["item2"])
        relation = re.sub("(?i)^(is|are)[ _](?=.)", "", " ".join(record["relation"].split()))
        if subject == object or not relation:
            raise ValueError("a relation of an item to itself, or without a word")
        if missing := {subject, object} - names.keys():
            raise ValueError(f"a relation with item {missing.pop()}, which is missing or unnamed")
        triples.append((names[subject], relation, names[object]))
    if not triples:
        raise ValueError("it has no relations")
    name = str(entry.get("img_id", place))
    return SceneGraph(names.values(), triples, entry.get("caption_ori") or "", name)


def read_geneval(entry, place):
    groups = entry["include"]
    if not groups:
        raise ValueError("it includes nothing")
    names = [clean_name(f"{group.get('color') or ''} {group['class']}") for group in groups]
    objects, triples = [], []
    for number, (name, group) in enumerate(zip(names, groups)):
        count = group.get("count", 1)
        if count not in range(1, 100):
            raise ValueError(f"count {count!r}; make it 1 to 99")
        objects += [name] * count
        if group.get("position"):
            relation, other = group["position"]
            if other == number or other not in range(len(groups)):
                raise ValueError(f"position {group['position']} names no other object")
            triples.append((name, relation, names[other]))
    return SceneGraph(objects, triples, entry.get("prompt") or "", place)


# ---- answers of VLMs ----

# The key in front of a subject's name ("_" is a space by then).
SUBJECT = r"\b(?:subj(?:ect)?|head|source|from|s|[a-z]+ ?1)(?: ?\d| name)?\W{0,2}[:=]\W*$"
# A denial in front of a triple, in the same clause.
DENIAL = re.compile(r"\b(?:no|not|never)\b[^.,;\n\[\](){}]*$")
# One that answers it, after one key at most: "sun above sea: no", {..., "present": false}.
ANSWER_NO = re.compile(r"[^\w\[\]{}.;]*(?:\b\w+[\"']?)?: ?[\"']?(?:no|not|false)\b|\? *no\b")
# What may stand between the words of a triple: keys that do not end in "s" ("relations:" begins a
# list), small words, numbers, and marks other than brackets.
FILLER = r"\b(?:s|(?:[a-z]+ )?\w*[^\Ws])[\"'”’]?\s?[:=]"
FILLER += r"|\b(?:is|are|be|to|on|at|the|an?|that|which|appears|located|positioned|placed|directly"
FILLER += r"|slightly|\d+)\b|[^\w\[\]]"


def parse_scene_graph(text, objects, relations):
    """The SceneGraph in a VLM's answer, or None if it has none of the words and no empty list.

    Looks for the given words in any notation: JSON, (s, r, o), s -> r -> o, "s is r o", "s - o: r".
    Thoughts, which end at "</think>" or start at a last "<think>", are not part of the answer.
    objects, relations: the words to look for; the graph has them in the spelling given here.
    """
    names = {without_the(clean_name(name)): name for name in objects}
    words = {without_the(relation): relation for relation in relations}
    known = re.compile(rf"(?<!\w)(?:({either(names)})|({either(words)}))(?!\w)")

    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)  # of JSON
    text = text.lower().replace("_", " ")
    text = re.split(r"</(?:think|reason)\w*>", text)[-1]
    text = re.split(r"<(?:think|reason)\w*>", text)[0]

    # A triple is two names and a relation with little between them.
    found = list(known.finditer(text))
    triples = {}  # by place of the relation word
    for first, second, third in zip(found, found[1:], found[2:]):
        gaps = text[first.end() : second.start()], text[second.end() : third.start()]
        if not all(map(is_filler, gaps)):
            continue
        colons = [re.search(r"[:=]\W*$", gap) for gap in gaps]
        if second[2]:
            subject, relation, object = first, second, third
        # "sun - sea: above", but not a line or braces further on
        elif third[2] and colons[1] and (colons[0] or not re.search(r"[\n}]", gaps[0])):
            subject, object, relation = first, second, third
        elif first[2] and all(colons):  # {"relation": "above", "subject": "sun", "object": "sea"}
            relation, subject, object = first, second, third
        else:
            continue
        if not (subject[1] and object[1]) or relation.start() in triples:
            continue
        denied = DENIAL.search(text, max(first.start() - 60, 0), first.start())
        if denied or ANSWER_NO.match(text, third.end(), third.end() + 60):
            continue
        called_subject = [
            re.search(SUBJECT, text[max(name.start() - 20, 0) : name.start()])
            for name in (subject, object)
        ]
        if called_subject[1] and not called_subject[0]:
            subject, object = object, subject
        triple = [without_the(match[0]) for match in (subject, relation, object)]
        triples[relation.start()] = names[triple[0]], words[triple[1]], names[triple[2]]

    # Objects may be listed apart from triples: in brackets, on the line, or below it.
    in_brackets = r"\W{0,9}\[(?:[^\[\]]|\[[^\[\]]*\])*"  # with bounding boxes
    pattern = rf"\b(?:objects|object list|entities)\b({in_brackets}|.*(?:\n *[-*\d].*)*)"
    listed = " ".join(re.findall(pattern, text))
    seen = [names[without_the(name)] for name, _ in known.findall(listed) if name]
    seen += names_in(triples.values())
    if not seen and not re.search(r"\[\s*\]", text):
        return None
    return SceneGraph(dict.fromkeys(seen), triples.values())


def is_filler(gap):
    """Whether two words with this text between them can belong to the same triple."""
    if len(gap) >= 80 or re.search(r"\}\W*\{|\n *[-*\d]\W* \w+ ?:", gap):  # another record begins
        return False
    return not re.sub(FILLER, "", gap)
