"""sgiou.py: the metric, typed prompts, data sets, and the answers of VLMs."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sgiou
from sgiou import SceneGraph, load_graphs, normalize, parse_prompt, parse_scene_graph, sg_iou

RELATIONS = ["left of", "right of", "above", "on", "on top of"]
GOLD = SceneGraph(
    ["red circle", "blue square", "green triangle"],
    [("red circle", "left of", "blue square"), ("green triangle", "above", "red circle")],
)


# ---- the metric ----


def test_metric_by_hand():
    seen = SceneGraph(
        ["Red_Circle", "blue square", "yellow star"],
        [("red circle", "LEFT_OF", "blue  square"), ("blue square", "below", "red circle")],
    )
    # 1 triple of 3 in common, 2 objects of 4, 1 relation ("left of") of 3
    expected = {"sg_iou": 1 / 3, "entity_iou": 2 / 4, "relation_iou": 1 / 3}
    assert sg_iou(seen, GOLD) == pytest.approx(expected)
    assert sg_iou(GOLD, GOLD) == {"sg_iou": 1.0, "entity_iou": 1.0, "relation_iou": 1.0}
    empty = SceneGraph([], [])
    assert sg_iou(empty, empty) == {"sg_iou": 0.0, "entity_iou": 0.0, "relation_iou": 0.0}
    mirrored = SceneGraph([], [("blue square", "left of", "red circle")])
    assert sg_iou(mirrored, GOLD)["sg_iou"] == 0.0


SPELLINGS = ["red circle", "Red_Circle", "blue square", "  blue   SQUARE ", "sun", "É"]
WORDS = ["left of", "Left_of", "above", "on top of"]
name_lists = st.lists(st.sampled_from(SPELLINGS), max_size=5)
triple_lists = st.lists(st.tuples(*map(st.sampled_from, [SPELLINGS, WORDS, SPELLINGS])), max_size=5)
graphs = st.builds(SceneGraph, name_lists, triple_lists)


def reference_iou(first, second):
    """LAION-SG's calculate_iou, counted on lists: it shares no set operation with sg_iou."""
    first = [x for n, x in enumerate(first) if x not in first[:n]]
    second = [x for n, x in enumerate(second) if x not in second[:n]]
    common = sum(x in second for x in first)
    total = len(first) + len(second) - common
    return common / total if total else 0.0


def reference_lists(graph):
    def plain(text):
        return text.strip().lower().replace("_", " ").replace("   ", " ")

    triples = [[plain(part) for part in triple] for triple in graph.triples]
    entities = [plain(name) for name in graph.objects]
    entities += [triple[0] for triple in triples] + [triple[2] for triple in triples]
    return triples, entities, [triple[1] for triple in triples]


@settings(max_examples=500, deadline=None)
@given(graphs, graphs)
def test_metric_equals_the_reference_on_random_pairs(pred, gold):
    pairs = zip(reference_lists(pred), reference_lists(gold))
    expected = [reference_iou(p, g) for p, g in pairs]
    assert list(sg_iou(pred, gold).values()) == pytest.approx(expected)
    assert sg_iou(pred, gold) == sg_iou(gold, pred)


def test_a_graph_holds_each_triple_once():
    listed = SceneGraph(["a", "b"], [["a", "on", "b"], ["A", "on", "b"], ["a", "under", "b"]])
    assert listed.triples == (("a", "on", "b"), ("a", "under", "b"))


def test_a_graph_brings_its_own_relations_to_the_listed_ones():
    graph = SceneGraph([], [("man", "riding", "horse"), ("man", "Left_of", "sun")])
    assert graph.vocabulary(["above", "left of"]) == ["above", "left of", "riding"]


# ---- prompts ----


def test_prompt_names_every_object_once():
    assert GOLD.prompt() == "red circle left of blue square; green triangle above red circle"
    dogs = SceneGraph(["dog", "cat", "Dog", "sun"], [("dog", "near", "cat")])
    assert dogs.labels() == ["dog", "cat", "another Dog", "sun"]
    assert dogs.prompt() == "dog near cat; another Dog; sun"
    assert SceneGraph(["dog", "dog"], [("dog", "near", "dog")]).prompt() == "dog near dog"


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("A red circle to the left of the blue square.", "red circle left of blue square"),
        ("the sun was directly above the sea!", "sun above sea"),
        ("Red_Circle  LEFT_OF\u00a0an owl; sun", "Red_Circle left of owl; sun"),
        ("\ufeffsun on the top of rug;; sun on top of rug;", "sun on top of rug"),
        ("sun left-of sea; sun far to the left of rug", "sun left of sea; sun left of rug"),
        ("dog; another dog; dog", "dog; another dog"),
        ("sun left of sea\nMoon above sea\tdog", "sun left of sea; Moon above sea; dog"),
        ("black-and-white cat above trash can", "black-and-white cat above trash can"),
        ("“sun left of sea”", "sun left of sea"),
        ("می‌خواهم above sun", "می‌خواهم above sun"),
        ("1. sun left of St. Bernard", "sun left of St. Bernard"),
        ("हिन्दी left of sun", "हिन्दी left of sun"),
        ("sun is located right above sea", "sun above sea"),
        ("sun - left of - sea; moon", "sun left of sea; moon"),
        ("A painting of the sun that is sitting above the sea", "sun above sea"),
        ("owl sitting on branch; standing lamp", "owl on branch; standing lamp"),
        ("place mat left of change purse", "place mat left of change purse"),
        ("boveab left of sun; abovey lamp", "boveab left of sun; abovey lamp"),
    ],
)
def test_what_a_prompt_means(text, prompt):
    assert parse_prompt(text, RELATIONS).prompt() == prompt


@pytest.mark.parametrize(
    "text",
    ["", "left of blue square"]
    + ["sun left of sea above moon"]  # two relations
    + ["sun left of sea, moon above sea", "red circle left of a Red_circle"]
    + ["a boy riding a horse", "dog behind tree", "the sun isn't above the sea", "no sun"]
    + ["sun cannot be above sea", "sun left of it", "sun + sea", "“sun” left of sea", "sun\0"]
    + ["the", "sun left of sea. moon above sea"]
    + ["move sun left of sea", "remove moon", "1 above sun"]  # an instruction, no prompt; a list
    + ["sun lef of sea", "sun abov sea", "sun leftof sea", "sun abvoe sea"]  # misspelled relations
    + ["sun above moon abov sea"]
    + ["3 owls above sun", "two owls", "owl looking at himself", "cat lying in box"]
    + ["cat in front of table", "of blue square", "red circle over blue square", "sun but moon"],
)
def test_what_is_not_understood_is_refused_and_the_right_form_shown(text):
    with pytest.raises(ValueError, match="^prompt clause|^the prompt is empty") as caught:
        parse_prompt(text, RELATIONS)
    assert "write e.g. 'red circle left of blue square; green triangle'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_relations_may_be_listed_with_the_words_in_front_of_them():
    for text in ("sun to the left of sea", "sun left of sea", "sun is on the left of sea"):
        assert parse_prompt(text, ["to the left of"]).triples == (("sun", "to the left of", "sea"),)


@pytest.mark.parametrize(
    "parts",
    [("dog", []), (["dog"], ("dog", "on", "cat")), ([], ["dog on"]), ([], [("dog", "on")])],
)
def test_forgotten_brackets_are_refused(parts):
    with pytest.raises(ValueError, match="give a list of names"):
        SceneGraph(*parts)


def test_names_that_resemble_a_relation():
    for name in ("bedside table", "heating pad", "diving board"):
        assert parse_prompt(name, ["beside", "eating", "driving"]).objects == (name,)


def test_without_relation_words_no_prompt_can_be_split():
    with pytest.raises(ValueError, match="list your relation words under `relations`"):
        parse_prompt("red circle left of blue square", [])


PHRASES = st.lists(
    st.sampled_from(["red", "Square", "off", "lefty", "ab-on", "été"]), min_size=1, max_size=3
).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(PHRASES, st.sampled_from(RELATIONS), PHRASES), max_size=4),
    st.lists(PHRASES, max_size=3),
)
def test_parse_prompt_inverts_prompt(triples, alone):
    triples = [triple for triple in triples if normalize(triple[0]) != normalize(triple[2])]
    graph = SceneGraph([*dict.fromkeys(sgiou.names_in(triples)), *alone], triples)
    if graph.objects:
        parsed = parse_prompt(graph.prompt(), RELATIONS)
        assert parsed.prompt() == graph.prompt()
        assert sorted(map(normalize, parsed.objects)) == sorted(map(normalize, graph.objects))


# ---- data sets ----

LAION = {
    "img_id": "482063",
    "caption_ori": "Page 90 — Girl",
    "items": [
        {"item_id": 0, "label": "person", "attributes": ["the", "young", "female"]},
        {"item_id": "7", "label": "a café", "attributes": None},
        {"item_id": 2, "label": " "},
    ],
    "relations": [
        {"triple_id": 0, "item1": 0, "relation": "is in front of", "item2": 7},
        {"triple_id": 1, "item1": 7, "relation": "behind", "item2": 0},
    ],
}


def write(tmp_path, content, name="data.json"):
    path = tmp_path / name
    if not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)
    path.write_text(content, encoding="utf-8")
    return path


def test_laion_sg(tmp_path, caplog):
    expected = SceneGraph(
        ("young female person", "café"),
        (("young female person", "in front of", "café"), ("café", "behind", "young female person")),
        "Page 90 — Girl",
        "482063",
    )
    assert load_graphs(write(tmp_path, [LAION] * 5), limit=2) == [expected] * 2
    indented = write(tmp_path, json.dumps([LAION], indent=4), "DATA.JSON")
    assert load_graphs(indented) == [expected]
    lines = "\ufeff\n" + json.dumps(LAION) + "\n\n" + json.dumps(LAION) + "\n"
    assert load_graphs(write(tmp_path, lines)) == [expected] * 2
    assert caplog.text == ""


@pytest.mark.parametrize(
    "entry",
    [
        3,
        {**LAION, "relations": None},
        {**LAION, "relations": [{"item1": 0, "relation": "on", "item2": 99}]},
        {**LAION, "relations": [{"item1": 0, "relation": "on", "item2": 0}]},
        {**LAION, "relations": [{"item1": 0, "relation": "on", "item2": 2}]},  # without a label
        {**LAION, "items": LAION["items"] * 2},  # two items with the same id
        {"include": []},
        {"include": [{"class": "cat", "position": ["above", 5]}]},
        {"include": [{"class": "cat", "position": ["above", 0]}]},  # itself
        {"include": [{"class": "cat", "count": 10**9}]},
        {"include": [{"class": "", "color": "red"}]},
        {"include": [{"class": None}]},
        {**LAION, "items": [{"item_id": 0, "label": "sun", "attributes": {"color": "red"}}]},
        {**LAION, "items": [{"item_id": 0, "label": "sun; sea"}]},
        {"caption": "sun above sea"},
    ],
)
def test_a_bad_entry_is_skipped_and_counted(tmp_path, caplog, entry):
    path = write(tmp_path, [LAION, entry, LAION])
    assert [graph.id for graph in load_graphs(path)] == ["482063"] * 2
    (message,) = caplog.messages
    assert message.startswith(f"{path}: skipped 1 of 3 entries; the first: entry 1: ")
    assert "\n" not in message
    with pytest.raises(ValueError, match="data.json: no scene graph in it; entry 0: "):
        load_graphs(write(tmp_path, [entry]))


@pytest.mark.parametrize("item", [99, 2])  # not there; without a label
def test_a_relation_to_no_item_is_named(tmp_path, item):
    entry = {**LAION, "relations": [{"item1": item, "relation": "on", "item2": 0}]}
    with pytest.raises(ValueError, match=f"relation with item {item}, which is missing or unnamed"):
        load_graphs(write(tmp_path, [entry]))


def test_geneval(tmp_path, caplog):
    lines = """
{"tag": "position", "include": [{"class": "horse", "count": 1},
 {"class": "vase", "count": 1, "position": ["right of", 0]}], "prompt": "a vase right of a horse"}
{"tag": "color_attr", "include": [{"class": "bowl", "count": 1, "color": "yellow"},
 {"class": "cup", "count": 1, "color": "white"}], "prompt": "a photo of ..."}
{"tag": "counting", "include": [{"class": "donut", "count": 3}],
 "exclude": [{"class": "donut", "count": 4}], "prompt": "a photo of three donuts"}
{"broken": """
    lines = lines.replace("\n ", " ")  # one entry a line, as published
    loaded = load_graphs(write(tmp_path, lines, "evaluation_metadata.jsonl"))
    prompts = ["vase right of horse", "yellow bowl; white cup"]
    assert [graph.prompt() for graph in loaded] == [*prompts, "donut; another donut; another donut"]
    assert loaded[0].caption == "a vase right of a horse"
    assert "skipped 1 of 4 entries; the first: line 5: " in caplog.text


def test_t2i_compbench_and_plain_prompts(tmp_path, caplog):
    lines = (
        "\ufeffa balloon on the top of a giraffe\r\na bird on side of a airplane\r\n\r\n"
        "a vase hidden by a clock\r\na bee on the left of a key; a frog near a cup\r\n"
        "a desk hidden by a desk\r\na man riding horse\r\n"
    )
    path = write(tmp_path, lines, "spatial.txt")
    prompts = ["balloon on top of giraffe", "bird on side of airplane", "vase hidden by clock"]
    prompts += ["bee left of key; frog near cup"]
    assert [graph.prompt() for graph in load_graphs(path)] == prompts
    assert "skipped 2 of 6 entries; the first: line 6: " in caplog.text
    assert load_graphs(path, ["riding"])[-1].prompt() == "man riding horse"


SUN = ("sun", "above", "sea")
BOTH = [SUN, ("dog", "below", "sun")]


@pytest.mark.parametrize(
    ("answer", "triples"),
    [
        ("sun: above sea\ndog: below sun", [("sun", "above", "sea"), ("dog", "below", "sun")]),
        ("sun - sea: above; dog - sea: not above", [("sun", "above", "sea")]),
        ("The sun is above the sea. Dog: not visible.", [("sun", "above", "sea")]),
        ("Is the sun above the sea? No. Is the dog below the sun? Yes", [("dog", "below", "sun")]),
        ('{"subject1": "sun", "relation1": "above", "object1": "sea"}', [("sun", "above", "sea")]),
        ("The sun is positioned slightly above the sea.", [("sun", "above", "sea")]),
        ("Objects: dog, sea\nabove(sun, sea), below(dog, sun)", [SUN, ("dog", "below", "sun")]),
        ('{"sun": {"above": "sea", "below": "dog"}}', [SUN, ("sun", "below", "dog")]),
        ("sun: above sea, below dog", [SUN, ("sun", "below", "dog")]),
        ("sun is above sea and below dog", [SUN, ("sun", "below", "dog")]),
        ("There is a sun. Above the sea is a dog.", []),
        ("Above the sea is the sun. Below the sun is the dog.", []),
        ('{"triples": [["sun", "above", "sea"]], "not_seen": ["dog below sun"]}', [SUN]),
        ('{"triples": [["sun", "above", "sea"]], "absent": [["dog", "below", "sun"]]}', [SUN]),
        ('{"seen": ["sun above sea"], "wrong": {"triples": [["dog", "below", "sun"]]}}', [SUN]),
        ("Not present:\n- dog below sun\n- sea above dog\n\nPresent:\n- sun above sea", [SUN]),
        ("[THINK]dog below sun[/THINK]sun above sea", [SUN]),
        ("<analysis>[[dog, below, sun]]</analysis>[[sun, above, sea]]", [SUN]),
        ("[Analysis]: sun above sea", [SUN]),
        ('{"note": "the \'dog\' is below the sun", "triples": [["sun", "above", "sea"]]}', [SUN]),
        ("<|thought|>dog below sun<|/thought|>sun above sea", [SUN]),
        ("dog below sun: no\nsun above sea: yes", [SUN]),
        ('{"missing": null, "triples": [["sun", "above", "sea"]], "error": false}', [SUN]),
        ('{"subject": "sun", "relation": "above", "object": "sea", "negated": false}', [SUN]),
        ('{"subject": "sun", "relation": "above", "object": "sea", "negated": true}', []),
        ('{"s": "sun", "r": "above", "o": "sea", "not_visible": false, "note": null}', [SUN]),
        ("sun above sea (missing: no); dog below sun (missing: yes)", [SUN]),
        ('{"pairs": {"sun - sea": "above", "dog - sea": "none"}}', [SUN]),
        ("sun - sea: above, dog - sea: unknown", [SUN]),
        ('{"sun": {"above": ["sea", "dog"]}}', []),
        ('{"name": "sun", "relations": ["above sea", "below dog"]}', []),
        ("1. [sun, above, sea]: Yes\n2. [dog, below, sun]: No", [SUN]),
        ("[sun, above, sea] -> true\n[dog, below, sun] -> false", [SUN]),
        ("Omitted: dog below sun\nsun above sea", [SUN]),
        ('{"triples": [["sun", "above", "sea"]], "left_out": [["dog", "below", "sun"]]}', [SUN]),
        ('{"subject": {"name": "sun"}, "relation": "above", "object": {"name": "sea"}}', [SUN]),
        ('{"object": {"name": "sea"}, "relation": "above", "subject": {"name": "sun"}}', [SUN]),
        ('{"subject": {"name": "sun", "seen": false}, "above": {"name": "sea"}}', []),
        ('{"pair": ["sun", "sea"], "relation": "above"}', [SUN]),
        ('{"objects": ["dog", "sun"], "triples": [["sun", "above", "sea"]]}', [SUN]),
        ("The sun (below the dog) is above the sea.", [("sun", "below", "dog"), SUN]),
        ("The sun is below the dog while above the sea.", [("sun", "below", "dog"), SUN]),
        ('["sun", "above", "sea level"], ["dog", "below", "sun"]', [("dog", "below", "sun")]),
        ('{"reason": "sun above sea?", "note": "sun below dog", "triples": []}', []),
        ('[{"triple": ["sun", "above", "sea"], "present": false}]', []),
        ("I cannot see it. Tell me whether the sun is above the sea.", []),
        ("The sun is above the sea but below the dog.", [SUN, ("sun", "below", "dog")]),
        ('{"sub": "sun", "rel": "above", "obj": "sea"}', [SUN]),
        ('{"obj": "sea", "rel": "above", "sub": "sun"}', [SUN]),
        ('{"sun above sea": true, "dog below sun": false}', [SUN]),
        ('{"subject": "sun", "relation": "above", "object": "sea", "occluded": false}', [SUN]),
        ('{"sun": {"above": ["sea"]}}', [SUN]),
        ('["sun", ["above"], "sea"]', [SUN]),
        ("Two suns are above the sea.", [SUN]),
        ("The sun above the sea is below the dog.", [SUN, ("sun", "below", "dog")]),
        ("{'note': 'dog below sun', 'triples': [['sun', 'above', 'sea']]}", [SUN]),
        ("The sun is above the edge and the sea is wide.", []),
        ("not present: [dog, below, sun]", []),
        ("[sun, above, sea] ❌", []),
        ("The sun is above the surface of the sea.", []),
        ("The sun is above a lot of sea.", [SUN]),
        ("Leaving out what is not there:\n- sun above sea", [SUN]),
        ("I cannot see the dog and the sun is above the sea.", []),
        ("sun above sea, not below. sun above dog", [("sun", "above", "dog")]),
        ("Subject: sun\nRelation: above\nObject: sea", []),
        ("Sun: above sea; dog: below sun", BOTH),
        ("| sun | sea | above |\n| dog | sun | below |", BOTH),
        ("sun above sea, which is below dog", [SUN, ("sea", "below", "dog")]),
        ("above(sun, sea): true; below(dog, sun): false", [SUN]),
        ("(sun, sea): above\n(dog, sun): below", BOTH),
        ("The sun stands above the sea", [SUN]),
        ('{"object1": "sun", "relation": "above", "object2": "sea"}', [SUN]),
        ('{"object": "sun", "position": "above", "relative_to": "sea"}', [SUN]),
        ('{"relation": "above", "object": "sea", "subject": "sun"}', [SUN]),
        ('{"triples": [["sun", "above", "sea"]]} You asked for dog below sun.', [SUN]),
        ('{"triples": []} You asked for dog below sun.', []),
        ("Note: above the sea is the sun.", []),
        ("The sun and the sea are below the edge.", []),
        ("The sun is above the edge, the sea is wide.", []),
        ("The dog is below it and the sun is above the sea.", [SUN]),
        ("Is the dog below the sun?\nThe sun is above the sea.", [SUN]),
    ],
)
def test_answers_that_are_easily_mixed_up(answer, triples):
    graph = parse_scene_graph(answer, ["sun", "sea", "dog"], ["above", "below"])
    assert list(graph.triples if graph else []) == triples


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is empty"),
        (b'{"data": [\n"sun"\n]}', "line 1: "),  # not a prompt in line 2
        (b'["\xff\xfe"]', "give a complete file in UTF-8"),
        (b'["a sun above a sea"]\n["a sea above a sun"]', "something follows its list"),
    ],
)
def test_a_file_without_any_graph_is_refused(tmp_path, content, problem):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_graphs(path, RELATIONS)
    assert problem in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_large_list_is_read_piece_by_piece_and_a_cut_one_is_refused(tmp_path):
    path = write(tmp_path, [{**LAION, "img_id": n} for n in range(2000)])  # 1 MB
    assert [graph.id for graph in load_graphs(path)] == [str(n) for n in range(2000)]
    write(tmp_path, path.read_text(encoding="utf-8")[:-100])
    assert len(load_graphs(path, limit=3)) == 3
    with pytest.raises(ValueError, match="entry 1999 is broken or cut off"):
        load_graphs(path)


# ---- answers of VLMs ----


JSON = json.dumps({"objects": GOLD.objects, "triples": GOLD.triples})


def as_objects(*keys):
    return json.dumps([dict(zip(keys, triple)) | {"score": 0.9} for triple in GOLD.triples])


def as_lines(form):
    return "Sure, look:\n" + "\n".join(form.format(*triple) for triple in GOLD.triples)


ANSWERS = {  # each of them says GOLD
    "json": JSON,
    "prose": f"Here's the user's graph (it isn't \"hard\") :( {JSON} I hope it's right!",
    "thoughts": f'<think>Is it [["sun", "on", "sea"]]?</think>{JSON}',
    "prefilled thoughts": f'Is it [["red circle", "on", "blue square"]]? </thinking> {JSON}',
    "python": repr({"objects": list(GOLD.objects), "triples": list(GOLD.triples)}),
    "cut off": JSON[:-2],
    "laion-sg's keys": json.dumps({"scene_graph": GOLD.triples, "object_list": GOLD.objects}),
    "articles": JSON.replace('"red', '"The red').replace('"left of', '"is to the left_of'),
    "scores": JSON.replace('"blue square"], [', '"blue square", 0.9], [').replace("]]", ", 95%]]"),
    "head, relationship, tail": as_objects("head", "relationship", "tail"),
    "s, r, o": as_objects("s", "r", "o"),
    "tail first": json.dumps([{"tail": o, "type": r, "head": s} for s, r, o in GOLD.triples]),
    "relation first": json.dumps([{"r": r, "subject": s, "object": o} for s, r, o in GOLD.triples]),
    "relation last": json.dumps([{"item1": s, "item2": o, "r": r} for s, r, o in GOLD.triples]),
    "strings": json.dumps({"triples": [" - ".join(triple) for triple in GOLD.triples]}),
    "pairs, as in the request": "\n".join(f"{s} - {o}: {r}" for s, r, o in GOLD.triples),
    "sentences": ". ".join(f"The {s} is located directly {r} the {o}" for s, r, o in GOLD.triples),
    "tuples": as_lines("({}, {}, {})"),
    "angles": as_lines("<{}, {}, {}>"),
    "arrows": as_lines("{} -> {} -> {}"),
    "numbered, bold": as_lines("1. **{}** {} **{}**"),
}


@pytest.mark.parametrize("style", ANSWERS)
def test_answers_as_vlms_write_them(style):
    answer = parse_scene_graph(ANSWERS[style], GOLD.objects, ["left of", "above", "on"])
    assert answer.triples == GOLD.triples
    if "objects" in ANSWERS[style] or "object_list" in ANSWERS[style]:
        assert sorted(answer.objects) == sorted(GOLD.objects)


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ('{"objects": [ ], "triples": [ ]}', ()),
        ('{"objects": ["Sun", "the man\'s_hat", "moon", 3]}', ("sun", "man's hat")),
        ('{"objects": [{"name": "sun", "bbox": [1, 2]}, {"name": "sea"}]}', ("sun", "sea")),
        ("**Objects:**\n- sun\n- sea\n\n**Triples:**\n(none)", ("sun", "sea")),
        ("Objects: sun, sea. Pairs: sun - sea. Relations: left of.", ("sun", "sea")),
        ('{"objects": ["sun"], "missing_objects": ["man\'s hat"]}', ("sun",)),
        ("Objects: sun\nsea: no", ("sun",)),
        ("Objects: sun. Objects not in the image: sea", ("sun",)),
    ],
)
def test_objects_of_an_answer(text, objects):
    graph = parse_scene_graph(text, ["man's hat", "sun", "sea"], ["left of"])
    assert graph.triples == () and sorted(graph.objects) == sorted(objects)


@pytest.mark.parametrize(
    "text",
    ["", "I see no graph [here], none {there}.", "<think>[['a', 'on', 'b']]"]
    + ['[["mat", "on", "hat"]]'],
)
def test_an_answer_without_a_graph_is_none(text):
    assert parse_scene_graph(text, ["dog", "cat", "a", "b"], ["on"]) is None


@pytest.mark.parametrize(
    "text",
    ['["sun", "on", null, "sea"]', '["sun", "on", "se', '[["sun", "on"], ["sea", "on"]]']
    + ['{"subject": "sun", "relation": "on"}, {"object": "sea"}', "sun eats sea"]
    + ["The sun isn't on the sea.", "There is no sun on the sea.", "sun - on - sea: No"]
    + ['{"subject": "sun", "relation": "on", "object": "sea", "present": false}']
    + ['["sun", "on", "sea", false]', "| sun | on | sea | no |", "sun on sea ❌"]
    + ["sun on sea" + no for no in (" - no", " (no)", " -> false", ": incorrect", " is not true")]
    + ["I cannot see the sun on the sea", "It is false that the sun is on the sea"],
)
def test_an_incomplete_or_denied_triple_is_no_triple(text):
    graph = parse_scene_graph(text, ["sun", "sea"], ["on"])
    assert not graph or graph.triples == ()


def test_a_listed_verb_wins_over_its_preposition():
    for relations, relation in ((["on"], "on"), (["on", "sitting on"], "sitting on")):
        assert parse_prompt("owl sitting on branch", relations).triples[0][1] == relation


def test_on_is_no_relation_in_on_the_left_of():
    text = "The dog is on the left of the cat. The sun is on the dog."
    graph = parse_scene_graph(text, ["dog", "cat", "sun"], ["on", "left of"])
    assert graph.triples == (("dog", "left of", "cat"), ("sun", "on", "dog"))
    for longer in ("on the left side of", "on the right of", "on top of a"):
        graph = parse_scene_graph(f'[["dog", "{longer}", "cat"]]', ["dog", "cat"], ["on"])
        assert graph.triples == ()


def test_the_words_come_back_in_the_spelling_given():
    text = '[["RED_circle", "to the left_of", "the caf\\u00e9"], ["cow", "left of", "it"]]'
    graph = parse_scene_graph(text, ["Red Circle", "the Café"], ["Left_of"])
    assert graph.triples == (("Red Circle", "Left_of", "the Café"),)
    assert parse_scene_graph(text, [], []) is None


NAMES = st.lists(PHRASES, min_size=2, max_size=5, unique_by=normalize)


@settings(max_examples=300, deadline=None)
@given(NAMES, st.data())
def test_what_is_written_is_read(names, data):
    triple = st.tuples(*map(st.sampled_from, (names, RELATIONS, names)))
    graph = SceneGraph(names, data.draw(st.lists(triple, min_size=1, max_size=5)))
    text = json.dumps({"objects": names, "triples": graph.triples}, ensure_ascii=False)
    assert parse_scene_graph(text, names, RELATIONS) == graph


SHARDS = st.sampled_from(
    [*"[]{}()<>\"'“”:,\\\n "]
    + ["objects", '"triples":', '"red circle"', "left of", "None", "\\u12", "é", "0.9", "->", "no"]
    + ['["red circle", "left of", "sun"]', '{"subject": "sun", "relation": "left of",', "1. "]
    + ["<think>", "</think>", JSON, "- sun - left of - red circle\n"]
)


@settings(max_examples=2000, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(SHARDS, max_size=40).map("".join)))
def test_any_text_gives_a_graph_of_the_words_or_none(text):
    graph = parse_scene_graph(text, ["red circle", "sun"], ["left of"]) or SceneGraph((), ())
    assert {*sgiou.names_in(graph.triples)} <= {*graph.objects} <= {"red circle", "sun"}
    assert {relation for _, relation, _ in graph.triples} <= {"left of"}


@pytest.mark.parametrize(
    "shard", ["[", "objects", ":", "<think>", "red circle left of ", "not ", "missing:", JSON]
)
def test_a_long_answer_takes_seconds_at_most(shard):
    text = shard * (200_000 // len(shard))  # in quadratic time it would take minutes
    start = time.process_time()
    parse_scene_graph(text, GOLD.objects, RELATIONS)
    assert time.process_time() - start < 10
