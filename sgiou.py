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

import difflib
import io
import json
import logging
import re
from dataclasses import dataclass
from unicodedata import category

LOG = logging.getLogger(__name__)  # a stderr that is gone stops print, but not this
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
        triples = [() if isinstance(triple, str) else tuple(triple) for triple in self.triples]
        if isinstance(self.objects, str) or any(len(triple) != 3 for triple in triples):
            raise ValueError("give a list of names, and a list of (subject, relation, object)")
        unique = {}
        for triple in triples:
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
        # "person next to person" mentions both.
        pairs = [(normalize(subject), normalize(object)) for subject, _, object in self.triples]
        mentioned |= {f"another {subject}" for subject, object in pairs if subject == object}
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

    Of graphs without triples, even equal ones, sg_iou and relation_iou are 0: leave them out.
    """
    names = ("sg_iou", "entity_iou", "relation_iou")
    sets = zip(names, triples_entities_relations(pred), triples_entities_relations(gold))
    return {name: len(p & g) / max(len(p | g), 1) for name, p, g in sets}  # two empty sets: 0


def triples_entities_relations(graph):
    triples = {tuple(normalize(part) for part in triple) for triple in graph.triples}
    entities = {normalize(name) for name in [*graph.objects, *names_in(graph.triples)]}
    return triples, entities, {relation for _, relation, _ in triples}


# ---- prompts ----

# Between two clauses: a semicolon, a tab, or the end of a line.
CLAUSE_END = r"[;；\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]"
# In front of a clause: the mark of a list, and words that say nothing.
CLAUSE_START = (
    r"(?i)^(?:[-*•] |\d+[.)] )?(?:(?:an? )?(?:photo|picture|image|painting|drawing) of )?"
)
# Verbs that may stand in front of a preposition: "cat sitting on mat" is "cat on mat".
POSE = "(?:sitting|standing|lying|hanging|floating|resting|sits|stands|lies|hangs|hung|rests)"
# Shows that a text is not the name of one object. ("St. Bernard" and "black-and-white cat" are.)
SENTENCE = re.compile(
    r"(?i) (?:an?|the) |^(?:an|the|another)$|^(?:of|to|on|in|at|by|from) |n['’]t\b|\w{3}\. |"
    rf" {POSE} (?:in|on|at|by|with) |"
    r"^(?:move|add|remove|swap|replace|put|make|avoid|\d+|two|three|several) |"
    r"(?<!-)\b(?:over|beneath|underneath|slightly|just|but|is|are|was|were|be|"
    r"should|must|no|not|nor|never|cannot|without|and|or|plus|then|that|which|who|between|it|itself|"
    r"himself|herself|themselves|nothing)\b(?!-)"
)


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
    for clause in re.split(CLAUSE_END, text):
        clause = " ".join(clause.split()).strip(" .,:!?'“”。…\ufeff")
        clause = re.sub(CLAUSE_START, "", clause)
        if not clause:
            continue
        found = find_relation(clause, relations)
        mentions = [found[0], found[2]] if found else [clause]
        names = [clean_name(mention) for mention in mentions]
        distinct = {normalize(name) for name in names}
        listed = not found or found[1] in relations
        named_well = len(distinct) == len(names) and all(is_name(n, relations) for n in names)
        if not (listed and named_well):
            raise ValueError(
                f"prompt clause {clause!r} is not understood; {form}: between semicolons one object"
                f" or one relation of two different objects. Relations: {', '.join(relations)}"
            )
        named = {normalize(name) for name in objects}
        for mention, name in zip(mentions, names):
            if normalize(name) not in named or normalize(mention).startswith("another "):
                objects.append(name)
        if found:
            triples.append((names[0], found[1], names[1]))
    if not objects:
        raise ValueError(f"the prompt is empty; {form}")
    return SceneGraph(objects, triples, caption=text)


# Words in front of a relation that are not part of it.
BEFORE = "(?:(?:that|which|who|is|are|was|were|located|positioned|placed|situated|directly|"
BEFORE += "immediately|exactly|right|far|to|on|at|the) )*"


def find_relation(text, relations):
    """Splits text at its first relation: (subject, relation as listed, object), or None.

    "left of" is also found as "is to the left of" or "left-of", "on top of" as "on the top of".
    SPATIAL relations are known even if they are not listed.
    """
    listed = {}
    for relation in [*SPATIAL, *relations]:
        listed[re.sub("^(to|on|at) ", "", without_the(relation))] = relation
    listed |= {without_the(relation): relation for relation in relations}
    # `??`: a listed "sitting on" wins over "on".
    pattern = rf"(?ai)(?<!\S){BEFORE}(?:{POSE} {BEFORE})??({either(listed)})(?!\S)"
    match = re.search(pattern, text.replace("_", " "))  # as long as text
    if not match:
        return None
    subject, object = text[: match.start()], text[match.end() :]
    return subject.strip(), listed[without_the(match[1])], object.strip()


def misspelled(text, relations):
    """Whether a text has words inside that are nearly one of the relations: "sun abov sea"."""
    long = [without_the(relation) for relation in relations if len(relation) > 4]
    words = without_the(text).split()
    parts = [" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(1, len(words) - n)]
    swapped = {"".join(sorted(relation)) for relation in long}  # such as "abvoe"
    return any(
        difflib.get_close_matches(part, long, 1, cutoff=0.88) or "".join(sorted(part)) in swapped
        for part in parts
    )


def without_the(text):
    """The spelling in which texts are searched: also without hyphens."""
    return re.sub(r"\bthe ", "", normalize(text.replace("-", " ")))


def either(words):
    """A pattern for any of some words that `without_the` returned, the longest first."""
    words = sorted(words, key=len, reverse=True)
    patterns = [re.escape(word).replace(r"\ ", r"(?:\s+|-)(?:the\s+)?") for word in words]
    return "|".join(patterns) or "(?!)"  # which matches nothing


def is_name(text, relations):
    """Whether a text can be the name of one object: letters, marks, and digits, but no sentence."""
    plain = all(category(sign)[0] in "LMN" or sign in " _-.'’\u200c\u200d" for sign in text)
    lettered = any(category(sign)[0] == "L" for sign in text)
    sentence = SENTENCE.search(text) or find_relation(text, relations)
    return plain and lettered and not sentence and not misspelled(text, relations)


def clean_name(text):
    """An object's name without "a", "an", "the" or "another" in front of it."""
    return re.sub(r"(?i)^(?:(?:an?|the|another) )+(?=.)", "", " ".join(text.split()).strip(" -–"))


# ---- data sets ----


def load_graphs(path, relations=(), limit=None):
    """Reads a data set into list[SceneGraph]: a JSON list of entries, or an entry per line.

    LAION-SG (arXiv 2412.08580): {"img_id", "caption_ori", "items", "relations"}
    GenEval (arXiv 2310.11513): {"include": [{"class", "count", "color", "position"}], "prompt"}
    T2I-CompBench (arXiv 2307.06350), and your own: a prompt, or {"prompt"}

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
                except Exception as error:  # an entry can be anything
                    skipped.append(f"{place}: {type(error).__name__}: {error}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; give a complete file in UTF-8") from None
    if not graphs:
        raise ValueError(f"{path}: no scene graph in it; {'; '.join(skipped[:1]) or 'it is empty'}")
    if skipped:
        number = f"{len(skipped)} of {len(skipped) + len(graphs)} entries"
        LOG.warning(f"{path}: skipped {number}; the first: {skipped[0]}")
    return graphs


def entries(file):
    """Yields (place, entry): a line as text, or a value of a JSON list, read piece by piece."""
    text = file.read(2**16)
    if not text.lstrip().startswith("["):
        for number, line in enumerate(io.StringIO(text + file.read()), 1):
            if line.strip():
                yield f"line {number}", line.strip()
        return
    text, number = text.lstrip()[1:], 0
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
        try:
            entry = json.loads(entry)
        except ValueError as error:
            raise ValueError(f"{error}; write a JSON list, or one entry per line") from None
    if isinstance(entry, dict) and "include" in entry:
        return read_geneval(entry, place)
    if isinstance(entry, dict) and "items" in entry:
        return read_laion(entry, place)
    if isinstance(entry, dict):
        if "prompt" not in entry:
            raise ValueError("it has none of the keys 'items', 'include', and 'prompt'")
        entry = entry["prompt"]
    graph = parse_prompt(entry, [*SPATIAL, *relations])  # yours win over an equal one
    if not relations and not graph.triples:
        raise ValueError("no known relation; list your relation words under `relations`")
    return graph


def checked(*words):
    """Words of an entry as one text. Raises ValueError if that can be no name or relation."""
    text = " ".join(" ".join(words).split())
    plain = re.sub("[\u200c\u200d]", "", text)  # without joiners, which Persian and Hindi need
    if not text or ";" in text or not plain.isprintable():
        raise ValueError(f"{text!r} is no name or relation")
    return text


def read_laion(entry, place):
    names, triples = {}, []  # names by item id as text: ids are written as 0 and as "0"
    for item in entry["items"]:
        id, attributes = str(item["item_id"]), item.get("attributes") or []
        if isinstance(attributes, str):
            attributes = [attributes]
        if id in names:
            raise ValueError(f"two items have the id {id}")
        if not isinstance(attributes, list):
            raise ValueError("attributes are not a list")
        if clean_name(item["label"]):
            names[id] = clean_name(checked(*filter(None, attributes), item["label"]))
    if "relations" not in entry:
        raise ValueError("it has no key 'relations'")
    for record in entry["relations"] or ():
        subject, object = str(record["item1"]), str(record["item2"])
        relation = re.sub("(?i)^(is|are)[ _](?=.)", "", checked(record["relation"]))
        if subject == object:
            raise ValueError(f"a relation of item {subject} to itself")
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
    names = [
        clean_name(checked(each.get("color") or "", checked(each["class"]))) for each in groups
    ]
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
            triples.append((name, checked(relation), names[other]))
    return SceneGraph(objects, triples, entry.get("prompt") or "", place)


# ---- answers of VLMs ----

# Tags around a thought, such as <think>, [THINK], or <|thought|>: those that begin it and end it.
THOUGHT = r"[<\[◁]\W?(?:think|thought|reason|scratch)\w*\W?[>\]▷]"
THOUGHT_END = r"[<\[◁]\W?/(?:think|thought|reason|scratch|analys)\w*\W?[>\]▷]"
LINE_OR_SENTENCE = r"\n|[.;!。；](?:\s|$)"
# Brackets without others inside, the key in front of them, and a verdict after them.
BRACKETS = r'("[^"\n]{1,40}": ?|\b\w{1,20} ?\w{0,20}: ?)?(?:\[[^][{}]*\]|\{[^][{}]*\})'
BRACKETS += r'(?: ?[:=-]+>? ?\w+| ?[❌✗✘]|, ?"\w{1,20}": ?\w+\s*(?=\}))?'
# In the text each given name becomes a single character of the range N, each relation one of R.
N, R = "[\U000f0000-\U000fffff]", "[\U00100000-\U0010ffff]"

NO = r"(?:\b(?:no|not|never|cannot|neither|none|false|null|missing|absent|negated|omitted|excluded|"
NO += r"left out|violated|wrong|incorrect|invalid|un(?:known|matched|satisfied|supported))\b|n't\b)"
# A piece of text in which this is found counts for nothing.
DENIAL = rf"{NO}|\b(?:whether|if|unclear|uncertain|should|would|might|hardly)\b|[❌✗✘]|\?\W*$"
DENIAL = re.compile(DENIAL)

LEFT_OUT = (  # of an answer, one after the other
    # A relation or a name that is only part of what is said: "on the side of", "holding up",
    # "car seat". But "on top of a" and "holding a glass of" are "on" and "holding".
    rf"{R}(?= (?:the )?(?!an? |top )\w+(?: \w+)? of\b)",
    rf'{R}(?= (?!(?:an?|the)")[a-z][a-z ]*")',
    rf'{N}(?= [a-z]+"(?!:))',
    # What a model says about its answer: "note": "the sun is ...", or // the sun is ...
    r'"[\w ]{0,13}(?:reason|thought|think|expla|note|comment|analys)\w*": ?"[^"\n]*"|//.*',
    # Keys that deny nothing: "missing": false, "note": null.
    (
        rf'(?:{NO}|occluded|hidden|truncated|partial|uncertain)[\w ]{{0,20}}"?: ?'
        r'"?(?:false|null|no|none)\b'
    ),
    r'\b\w+": ?"?(?:null|none)\b',
    # What is listed as missing, under a key or a heading: "not_seen": [...], or Not seen: - ...
    rf'"[^"\n]{{0,40}}{NO}[^"\n]{{0,40}}": ?(?:\[(?:[^][]|\[[^][]*\])*\]|\{{[^{{}}]*\}})',
    rf"(?m:^\W{{0,3}}(?:\w+ )?{NO}.{{0,40}}:\W{{0,3}}\n(?: *[-*\d].*\n?)+)",
    # Entries that say no: "dog - cat": none, "dog left of cat": false, "dog": false.
    rf'(?:{N} ?(?:[-–]|{R}) ?)?{N}"?: ?"?{NO}',
)

# After an object: the sentence goes on about the subject.
GOES_ON = r"\W*(?:,|\)|(?:and|while|but|as well as)\b)(?!.*\b(?:which|that|who)\b)"
IS = r"\b(?:is|are|was|were)\b"
# A key that says that a triple's subject comes next, although it is the second of the two names.
SUBJECT_KEY = re.compile(r"\b(?:subject|subj?|source|from|head|s)\W{0,2}[:=>]\W*$")


def parse_scene_graph(text, objects, relations):
    """The SceneGraph in a VLM's answer, or None if it states no given name and no empty list.

    eval.py asks for JSON, but models answer in many ways. So a triple is two of the given names and
    one of the given relations close to each other: in the same brackets, line, or sentence. Such a
    piece counts for nothing if it denies or asks anything ("no", "false", "?"). If the brackets
    hold triples or an empty list, the text around them counts for nothing either. Thoughts, which
    end at "</think>" or start at a last "<think>", are not part of the answer.
    objects, relations: the words to look for; the graph has them in the spelling given here.
    """
    names = {chr(0xF0000 + number): name for number, name in enumerate(objects)}
    words = {chr(0x100000 + number): relation for number, relation in enumerate(relations)}
    signs = {without_the(word): sign for sign, word in words.items()}
    signs |= {without_the(clean_name(name)).replace("’", "'"): sign for sign, name in names.items()}

    text = re.sub(rf"{N}|{R}", " ", text)
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)  # of JSON
    text = re.sub(r"\\?[’']", "'", re.sub(r"\\?_", " ", text.lower()))
    text = re.split(THOUGHT, re.split(THOUGHT_END, text)[-1])[0]
    # "on" is no relation in "on the left of". A name may be plural.
    relation = rf"(?:{either(without_the(word) for word in words.values())})(?!\w)"
    known = rf"(?<!\w)(?:(?:on|to|at) (?:the )?(?={relation}))?({either(signs)})(?:e?s)?(?!\w)"
    text = re.sub(known, lambda match: signs[without_the(match[1])], text)

    # Quotes of Python's lists; not in "isn't", and not inside double quotes.
    quotes = r"""\"[^"\n]*"|(?<!\w)'|'(?!\w)"""
    text = re.sub(quotes, lambda match: '"' if match[0] == "'" else match[0], text)
    for pattern in LEFT_OUT:
        text = re.sub(pattern, " ", text)
    text = re.sub(rf'\[\s*("?(?:{N}|{R})"?)\s*\]', r"\1", text)  # a list of one word
    has_empty_list = re.search(r"\[\s*\]", text)
    in_brackets = []  # the innermost first
    for _ in range(9):  # as deep as brackets may be nested
        in_brackets += [match[0] for match in re.finditer(BRACKETS, text)]
        text = re.sub(BRACKETS, names_of_brackets, text)

    seen, triples = [], []
    for pieces in (in_brackets, re.split(LINE_OR_SENTENCE, text)):
        for piece in pieces:
            if not DENIAL.search(piece):
                seen += [names[sign] for sign in re.findall(N, piece)]
                triples += [(names[s], words[r], names[o]) for s, r, o in triples_in(piece)]
        if triples or has_empty_list:
            break
    return SceneGraph(dict.fromkeys(seen), triples) if seen or has_empty_list else None


def names_of_brackets(match):
    """What stays of brackets when those around them are read: their key and the names in them.

    So {"subject": {"name": "sun"}} names a subject. Brackets with a relation or a denial leave
    nothing.
    """
    if re.search(R, match[0]) or DENIAL.search(match[0]):
        return " "
    key = match[1] or ""
    return key + "".join(re.findall(N, match[0][len(key) :]))


def triples_in(piece):
    """The triples (list) of a piece of text: characters of N, R, and N."""
    found = list(re.finditer(rf"{N}|{R}", piece))
    kinds = "".join("N" if re.match(N, match[0]) else "R" for match in found)
    gaps = [piece[one.end() : next.start()] for one, next in zip(found, found[1:])]
    # Written formally: "sun - sea: above" and above(sun, sea). But not "the sun and the sea are
    # near the edge" and "above the sea is the sun".
    formal = [re.match(r"\W*[:,(|=>]", gap) for gap in gaps]
    # The relation is of something else: "sun near the edge, sea".
    broken = [re.search(r"[a-z](?:,| and | but | while )|\bit\b", gap) for gap in gaps]
    numbers = range(len(found))
    if re.fullmatch("(NNR?)+", kinds):  # "dog - cat: , sun - sea: above"
        starts = [match.start() for match in re.finditer("NNR", kinds)]
        places = [(i, i + 2, i + 1) for i in starts if formal[i + 1]]
    elif re.fullmatch("(RNN)+", kinds):  # "above: [sun, sea]" may be of another object
        places = [(i + 1, i, i + 2) for i in numbers[::3] if formal[i] and "[" not in gaps[i]]
    else:
        places = [
            (i, i + 1, i + 2)
            for i in numbers
            if kinds[i : i + 3] == "NRN"
            and not broken[i + 1]
            # Of another object: "above sea, below dog".
            and not (kinds[0] == "R" and re.match(r"\W*[,\n]", gaps[i]))
        ]
    triples = []
    subject_of = {}  # number of an object -> that of its subject
    for subject, relation, object in places:
        goes_on = re.match(GOES_ON, gaps[subject])  # "sun above sea, left of dog"
        if subject > 1 and re.match(f" {IS}", gaps[subject]):
            # "the sun above the sea is left of the dog", but not "sun is above sea is left of dog"
            goes_on = not re.search(rf"{IS}|[^\w ]", gaps[subject - 2])
        if goes_on:
            subject = subject_of.get(subject, subject)
        subject_of[object] = subject
        end = found[object].start()
        if SUBJECT_KEY.search(piece, max(end - 20, 0), end):
            subject, object = object, subject
        triples.append(tuple(found[i][0] for i in (subject, relation, object)))
    return triples
