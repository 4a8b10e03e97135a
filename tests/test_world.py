"""tiny/: the renderer and its exact parser, the shipped data, the lessons and the questions."""

# ruff: noqa: E402 (the scripts in tiny/make/ import each other by name)
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tiny" / "make"), str(ROOT / "tiny")]

import lessons
import models
import questions
import world
from world import CELL, GRID, GROUND, NAMES, OPPOSITE, RELATIONS, SIZE, SPRITE, Thing

from actor import parse_completion
from sgiou import SceneGraph, load_graphs, parse_prompt, parse_scene_graph, sg_iou

SPLITS = {"train": 2000, "val": 240, "test": 1000}
positions = st.builds(Thing, st.sampled_from(NAMES), st.integers(0, 26), st.integers(0, 26))


def drawn(*scenes):
    """What the parser finds in drawn scenes."""
    return world.parse([world.render(things) for things in scenes])


# ---- renderer and parser ----


def test_a_picture_by_hand():
    image = world.render([Thing("red square", 9, 2)])
    assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
    red = (image == (220, 40, 45)).all(-1)
    assert red.sum() == 36 and red[2:8, 9:15].all()
    assert (image[~red] == GROUND).all()


def test_later_things_cover_earlier_ones():
    image = world.render([Thing("red square", 0, 0), Thing("blue square", 0, 0)])
    assert (image[3, 3] == (45, 85, 230)).all()


def test_parse_finds_exactly_what_is_drawn():
    rng = random.Random(0)
    scenes = [world.random_scene(rng, rng.randint(2, 6)) for _ in range(1000)]
    for scene, found in zip(scenes, drawn(*scenes)):
        assert sorted(found) == sorted(scene)


def test_parse_of_crowds_with_twins():
    rng = random.Random(1)
    scenes = [
        [
            world.place(rng, rng.choice(NAMES), cell)
            for cell in rng.sample(range(GRID**2), rng.randint(0, GRID**2))
        ]
        for _ in range(300)
    ]
    for scene, found in zip(scenes, drawn(*scenes)):
        assert sorted(found) == sorted(scene)


def test_parse_reads_in_reading_order_and_takes_pil_images():
    from PIL import Image

    scene = [Thing("red circle", 17, 2), Thing("blue square", 1, 9), Thing("green triangle", 2, 1)]
    found = world.parse([Image.fromarray(world.render(scene))])[0]
    assert found == [scene[2], scene[0], scene[1]]


def test_parse_stands_noise_but_finds_nothing_in_it():
    rng = np.random.default_rng(0)
    scene = [Thing("red circle", 1, 2), Thing("yellow square", 17, 10), Thing("blue circle", 9, 26)]
    noisy = world.render(scene) + rng.integers(-20, 21, (SIZE, SIZE, 3))
    blank = rng.integers(225, 256, (SIZE, SIZE, 3))
    assert world.parse([noisy.clip(0, 255), blank]) == [sorted(scene, key=lambda t: t.y), []]


def test_a_half_erased_sprite_is_not_found():
    halves = [np.s_[:3, :], np.s_[3:, :], np.s_[:, :3], np.s_[:, 3:]]
    images = []
    for name in NAMES:
        for half in halves:
            image = world.render([Thing(name, 9, 10)])
            image[10:16, 9:15][half] = GROUND
            images.append(image)
    assert world.parse(images) == [[]] * len(images)
    assert {world.debris(image) for image in images} == {1.0}  # all that is left of it is debris


def test_debris_is_what_belongs_to_no_thing():
    rng = random.Random(16)
    for scene in [[], *(world.random_scene(rng, rng.randint(2, 6)) for _ in range(50))]:
        assert world.debris(world.render(scene)) == 0
    image = world.render([Thing("red square", 9, 2)])
    image[20:23, 20:23] = (45, 85, 230)
    assert world.debris(image) == 9 / (36 + 9)
    image[2:8, 15] = (220, 40, 45)  # one pixel beside the square: as blurred edges are
    assert world.debris(image) == 9 / (36 + 6 + 9)


@settings(deadline=None)
@given(positions, positions)
def test_relation_is_antisymmetric_and_true(first, second):
    word = world.relation(first, second)
    back = world.relation(second, first)
    assert back == (OPPOSITE[word] if word else None)
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) == abs(dy):
        assert word is None
    if word in ("left of", "right of"):
        assert abs(dx) > abs(dy) and (dx > 0) == (word == "left of")
    if word in ("above", "below"):
        assert abs(dy) > abs(dx) and (dy > 0) == (word == "above")


def test_relation_has_a_margin():
    here = Thing("red circle", 10, 10)
    assert world.relation(here, Thing("sun", 14, 10)) == "left of"
    assert world.relation(here, Thing("sun", 13, 10)) is None
    assert world.relation(here, Thing("sun", 10, 6)) == "below"
    assert world.relation(here, Thing("sun", 18, 14)) == "left of"
    assert world.relation(here, Thing("sun", 18, 15)) is None


def test_exact_graph_by_hand():
    gold = SceneGraph(
        ["red circle", "blue square", "green circle"],
        [("red circle", "above", "blue square"), ("blue square", "left of", "green circle")],
    )
    things = [
        Thing("red circle", 1, 1),
        Thing("blue square", 25, 2),
        Thing("yellow circle", 9, 9),
    ]
    objects, triples = world.exact_graph(things, gold)
    assert objects == ["red circle", "blue square", "yellow circle"]
    assert triples == [("red circle", "left of", "blue square")]


def test_contradictory_twins_cost():
    gold = SceneGraph(["red circle", "blue square"], [("red circle", "left of", "blue square")])
    things = [Thing("red circle", 1, 9), Thing("blue square", 9, 9), Thing("red circle", 25, 9)]
    objects, triples = world.exact_graph(things, gold)
    assert sorted(objects) == ["blue square", "red circle", "red circle"]
    assert [word for _, word, _ in triples] == ["left of", "right of"]
    assert sg_iou(SceneGraph(objects, triples), gold)["sg_iou"] == 0.5


def test_a_diagonal_pair_has_no_triple():
    gold = SceneGraph(["red circle", "blue square"], [("red circle", "left of", "blue square")])
    things = [Thing("red circle", 1, 1), Thing("blue square", 9, 9)]
    assert world.exact_graph(things, gold)[1] == []


def test_random_triples_are_true_and_name_every_thing():
    rng = random.Random(2)
    for number in range(300):
        relations = 3 + number % 4
        things, triples = world.random_prompt(rng, relations)
        assert len(triples) == relations and 3 <= len(things) <= 5
        by_name = {thing.name: thing for thing in things}
        assert {name for a, _, b in triples for name in (a, b)} == set(by_name)
        assert len({frozenset((a, b)) for a, _, b in triples}) == len(triples)
        assert all(world.relation(by_name[a], by_name[b]) == word for a, word, b in triples)


def test_cells():
    rng = random.Random(3)
    for cell in range(GRID**2):
        for _ in range(8):
            thing = world.place(rng, "red circle", cell)
            assert world.cell_of(thing) == cell
            assert thing.x // CELL == (thing.x + SPRITE - 1) // CELL == cell % GRID


# ---- the shipped data ----


@pytest.fixture(scope="module")
def graphs():
    return {split: load_graphs(ROOT / "tiny" / "data" / f"{split}.json") for split in SPLITS}


def test_the_data_are_what_the_generator_makes(tmp_path):
    world.write_data(tmp_path / "again")
    for split in SPLITS:
        shipped = (ROOT / "tiny" / "data" / f"{split}.json").read_bytes()
        assert (tmp_path / "again" / f"{split}.json").read_bytes() == shipped


def test_the_data_load_whole(graphs, capsys):
    for split, total in SPLITS.items():
        path = ROOT / "tiny" / "data" / f"{split}.json"
        assert len(load_graphs(path)) == total == len(json.loads(path.read_text()))
    assert capsys.readouterr().err == ""
    ids = [graph.id for split in SPLITS for graph in graphs[split]]
    assert len(set(ids)) == len(ids)


def test_captions_and_prompts_agree(graphs):
    for graph in graphs["val"]:
        assert graph.prompt() == graph.caption


def test_no_graph_stands_twice(graphs):
    everything = [frozenset(graph.triples) for split in SPLITS for graph in graphs[split]]
    assert len(set(everything)) == sum(SPLITS.values())


def test_every_number_of_relations_has_as_many_prompts(graphs):
    for split, total in SPLITS.items():
        counts = [len(graph.triples) for graph in graphs[split]]
        assert counts == [3, 4, 5, 6] * (total // 4)
        assert {len(graph.objects) for graph in graphs[split]} == {3, 4, 5}


def test_splits_share_no_set_of_objects(graphs):
    sets = {split: {frozenset(graph.objects) for graph in graphs[split]} for split in SPLITS}
    assert not sets["train"] & sets["test"]
    assert not sets["train"] & sets["val"]
    assert not sets["val"] & sets["test"]
    for split in SPLITS:
        assert {world.split_of(objects) for objects in sets[split]} == {split}


def test_split_depends_on_the_set_alone():
    rng = random.Random(4)
    for _ in range(50):
        names = rng.sample(NAMES, 3)
        assert len({world.split_of(rng.sample(names, 3) + names[:1]) for _ in range(5)}) == 1


def test_prompts_and_instructions_fit_the_text_encoder(graphs):
    """The lengths of eval.yaml hold every prompt and instruction, and every word is known."""
    config = yaml.safe_load((ROOT / "eval.yaml").read_text())
    pipeline = models.build_pipeline()
    rng = random.Random(5)
    instructions = {lessons.edit(rng)[1] for _ in range(300)}
    prompts = [graph.prompt() for split in SPLITS for graph in graphs[split]]
    for texts, part in ((instructions, "editor"), (prompts, "diffuser")):
        limit = config[part]["call"]["max_sequence_length"]
        pooled = pipeline.tokenizer
        for tokenizer, most in ((pipeline.tokenizer_2, limit), (pooled, pooled.model_max_length)):
            ids = tokenizer(list(texts)).input_ids
            assert tokenizer.unk_token_id not in {number for row in ids for number in row}
            assert max(map(len, ids)) <= most


# ---- lessons: what a perfect editor makes of an instruction ----


def performed(rng, things, instruction):
    """Performs, draws and parses: (things before, things after) as the parser sees them."""
    result = lessons.perform(rng, things, instruction)
    assert result is not None
    before, after = drawn(things, result)
    assert sorted(before) == sorted(things)
    return before, after


def scenes(count, seed):
    rng = random.Random(seed)
    return [(rng, world.random_scene(rng, rng.choice((3, 4)))) for _ in range(count)]


def one(things, name):
    (thing,) = [thing for thing in things if thing.name == name]
    return thing


def free_spot(things, anchor, word):
    """Whether the next cell in the direction of a relation is on the grid and free."""
    dx, dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[word]
    column, row = anchor.x // CELL + dx, anchor.y // CELL + dy
    taken = {(thing.x // CELL, thing.y // CELL) for thing in things}
    return 0 <= column < GRID and 0 <= row < GRID and (column, row) not in taken


def test_move_and_add():
    done = {"move": 0, "add": 0}
    for rng, things in scenes(150, 6):
        first, anchor = things[:2]
        word = rng.choice(RELATIONS)
        absent = next(name for name in NAMES if name not in {thing.name for thing in things})
        for action, text, name in (
            ("move", f"move the {first.name} {word} the {anchor.name}", first.name),
            ("add", f"add a {absent} {word} the {anchor.name}", absent),
        ):
            if lessons.perform(rng, things, text) is None and not free_spot(things, anchor, word):
                continue
            before, after = performed(rng, things, text)
            done[action] += 1
            assert world.relation(one(after, name), anchor) == word
            assert [t for t in after if t.name != name] == [t for t in before if t.name != name]
    assert min(done.values()) >= 75


def test_remove():
    for rng, things in scenes(50, 7):
        before, after = performed(rng, things, f"remove the {things[0].name}")
        assert after == [thing for thing in before if thing != things[0]]


def test_remove_takes_one_of_twins():
    twins = [Thing("red circle", 1, 1), Thing("red circle", 17, 1), Thing("blue square", 9, 9)]
    left = {
        tuple(lessons.perform(random.Random(i), twins, "remove the red circle")) for i in range(9)
    }
    assert left == {(twins[1], twins[2]), (twins[0], twins[2])}


def test_swap():
    for rng, things in scenes(50, 8):
        first, second = things[:2]
        before, after = performed(rng, things, f"swap the {first.name} and the {second.name}")
        assert one(after, first.name) == second._replace(name=first.name)
        assert one(after, second.name) == first._replace(name=second.name)
        assert set(things[2:]) < set(after) and len(after) == len(before)


def test_change():
    for rng, things in scenes(50, 9):
        absent = next(name for name in NAMES if name not in {thing.name for thing in things})
        before, after = performed(rng, things, f"change the {things[0].name} to a {absent}")
        assert one(after, absent) == things[0]._replace(name=absent)
        assert set(things[1:]) < set(after) and len(after) == len(before)


CORNER = [Thing("red circle", 1, 1), Thing("blue square", 26, 26), Thing("green square", 9, 1)]
TEMPLATES = "move the {} {} the {}|add a {} {} the {}|swap the {} {} the {}|change the {} {} a {}"


@pytest.mark.parametrize(
    "instruction",
    [
        "",
        "none",
        "paint the red circle",
        "move the red circle",
        "move the red circle left of",
        "move the red circle near the blue square",
        "move the red circle None the blue square",
        "move left of the blue square",
        "move the yellow circle above the blue square",
        "move the red circle left of the yellow circle",
        "move the red circle left of the red circle",
        "move the blue square left of the red circle",  # it stands in the corner
        "please move the red circle above the blue square",
        "move the red circle above the blue square now",
        "move the red circle above the blue square green square",
        "add a yellow circle above the red circle",
        "add a yellow circle left of the yellow square",
        "add a yellow circle None the blue square",
        "add a yellow circle above the blue square green square",
        "add a yellow circle",
        "remove the yellow circle",
        "remove the red circle and the blue square",
        "remove",
        "swap the red circle and the yellow circle",
        "swap the red circle and the red circle",
        "swap the red circle",
        "change the yellow circle to a yellow square",
        "change the red circle to a purple dog",
        "change the red circle",
    ],
)
def test_what_cannot_be_done_is_none(instruction):
    for seed in range(5):
        assert lessons.perform(random.Random(seed), CORNER, instruction) is None


def test_nothing_can_be_done_in_an_empty_scene():
    for text in ("remove the red circle", "add a red circle above the blue square", "none"):
        assert lessons.perform(random.Random(0), [], text) is None


words = st.sampled_from(
    "move add remove swap change the a to and None".split() + RELATIONS + NAMES[:2] + NAMES[7:8]
)
texts_near = st.lists(words, max_size=9).map(" ".join) | st.builds(
    str.format, st.sampled_from(TEMPLATES.split("|")), words, words, words
)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | texts_near, st.integers(0, 3))
def test_perform_takes_any_text(text, count):
    result = lessons.perform(random.Random(0), CORNER[:count], text)
    assert result is None or all(isinstance(thing, Thing) for thing in result)
    if result is not None:
        assert len({(thing.x, thing.y) for thing in result}) == len(result)


def test_lessons_stay_in_their_split_and_can_be_done():
    rng = random.Random(10)
    actions = set()
    for _ in range(300):
        before, instruction, after = lessons.edit(rng, "val")
        actions.add(instruction.split()[0])
        assert world.split_of(thing.name for thing in before) == "val"
        changed = sum(thing not in before for thing in after)
        assert changed <= (2 if instruction.startswith("swap") else 1)
        cells = [world.cell_of(thing) for thing in after]
        assert len(set(cells)) == len(cells)
    assert actions == {"move", "add", "remove", "swap", "change"}


def holding(things, triples):
    """How many of some triples a scene shows, as the parser sees it."""
    (seen,) = drawn(things)
    return sum(questions.shows(seen, triple) for triple in triples)


def test_composed_images_show_every_triple(graphs):
    rng = random.Random(11)
    for graph in graphs["train"][:200]:
        things = lessons.compose(rng, list(graph.objects), graph.triples)
        assert [thing.name for thing in things] == list(graph.objects)
        assert len({world.cell_of(thing) for thing in things}) == len(things)
        assert holding(things, graph.triples) == len(graph.triples)
    with pytest.raises(ValueError):
        contradiction = [("red circle", word, "blue square") for word in RELATIONS]
        lessons.compose(rng, ["red circle", "blue square"], contradiction)


def test_captions_garble_as_told():
    rng = random.Random(12)
    bare, total, right = 0, {0.0: 0, 1.0: 0}, {0.0: 0, 1.0: 0}
    for garble in total:
        for _ in range(200):
            things, text = lessons.captioned_image(rng, garble, (0, 3, 4, 4, 3))
            told = parse_prompt(text, RELATIONS)
            assert set(told.objects) == {thing.name for thing in things}
            assert world.split_of(told.objects) == "train"
            bare += not told.triples
            total[garble] += len(told.triples)
            right[garble] += holding(things, told.triples)
    assert 4 <= bare <= 45  # of 400, one in twenty
    things, text = lessons.captioned_image(rng, 0.5, (1, 0, 0, 0, 0))
    assert [thing.name for thing in things] == [text]
    assert right[0.0] == total[0.0]
    assert 0.15 < right[1.0] / total[1.0] < 0.35  # a random word is right one time in four


# ---- questions: what the VLM is taught ----


@pytest.fixture(scope="module")
def asked():
    """(things, graph, drill and questions) of faulty images of every split."""
    rng = random.Random(15)
    found = []
    for number in range(450):
        image, graph = questions.faulty_image(rng, tuple(SPLITS)[number % 3])
        (things,) = world.parse([image])
        texts = list(questions.drill(rng, things))
        for writing in ("extract", "repair"):
            texts += questions.questions(rng, things, graph, writing)
        found.append((things, graph, texts))
    return found


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<image>", "<answer>", *questions.vocabulary()]
    return models.word_tokenizer(words, 512, end=False)


def test_every_word_is_known(asked, tokenizer):
    texts = {text for _, _, triples in asked for pair in triples for text in pair[:2]}
    unknown = {
        text for text in texts if tokenizer.unk_token_id in tokenizer(text.lower()).input_ids
    }
    assert not unknown, sorted(unknown)[:5]


def test_verdicts_are_true_of_the_picture(asked):
    told = {"yes": 0, "no": 0}
    for things, _, texts in asked:
        names = [thing.name for thing in things]
        for text, answer, _ in texts:
            asked_for = re.fullmatch(r'Does the image show "(.*)"\?', text)
            if not asked_for:
                continue
            if asked_for[1] in NAMES:
                truth = names.count(asked_for[1]) == 1
            else:
                triple = rf"(.*) ({'|'.join(RELATIONS)}) (.*)"
                subject, word, other = re.fullmatch(triple, asked_for[1]).groups()
                truth = names.count(subject) == names.count(other) == 1
                truth = truth and world.relation(one(things, subject), one(things, other)) == word
            assert answer == ("yes" if truth else "no"), (things, text)
            told[answer] += 1
    assert min(told.values()) > 0.25 * sum(told.values())


def last(texts, start):
    return next(answer for text, answer, _ in texts if text.startswith(start))


def spoken(tokenizer, answer):
    """An answer after the tokenizer's round trip: lower case, tokens apart."""
    return tokenizer.decode(tokenizer(answer).input_ids, skip_special_tokens=True)


def test_extraction_reads_back_as_the_exact_graph(asked, tokenizer):
    some = 0
    for things, _, texts in asked:
        for text, answer, _ in texts:
            if not (match := re.fullmatch(r"Objects: (.*)\. Pairs: (.*)\. Relations: .*", text)):
                continue
            names, pairs = match[1].split(", "), [p.split(" - ") for p in match[2].split(", ")]
            graph = SceneGraph(names, [(a, "left of", b) for a, b in pairs])
            objects, triples = world.exact_graph(things, graph)
            for written in (answer, spoken(tokenizer, answer)):
                read = parse_scene_graph(written, names, RELATIONS)
                assert set(read.objects) == set(objects) & set(names), written
                assert set(read.triples) == set(triples), written
            some += len(triples)
    assert some > 300


def repairs(texts):
    """(prompt, tried instructions, completion) of what the Actor is taught in some questions."""
    for text, answer, _ in texts:
        if match := re.fullmatch(r"Prompt: (.*?)\. (.*?)\.( Tried without success: (.*)\.)?", text):
            yield match[1], match[4].split("; ") if match[4] else [], answer


def test_repairs_are_well_formed_and_not_among_the_tried(asked, tokenizer):
    kinds, lengths = set(), []
    for _, _, texts in asked:
        for _, tried, answer in repairs(texts):
            thought, instruction = parse_completion(answer)
            assert thought and instruction and instruction not in tried
            assert parse_completion(spoken(tokenizer, answer)) == (thought, instruction)
            kinds.add(instruction.split()[0])
            lengths.append(len(tried))
    assert kinds == {"none", "move", "swap", "add", "remove", "change"}
    assert set(lengths) == set(range(7)) and 0.3 < np.mean([n > 0 for n in lengths]) < 0.6


def test_repairs_of_a_violated_relation_are_plausible_not_wise():
    """Red stands in the right margin: neither kind looks whether there is room."""
    things = [Thing("red circle", 25, 1), Thing("blue square", 9, 1), Thing("green square", 1, 25)]
    triples = [("red circle", "left of", "blue square"), ("green square", "below", "red circle")]
    graph = SceneGraph(["red circle", "blue square", "green square"], triples)
    ((thought, kinds), _) = questions.faults(random.Random(0), things, graph)
    assert thought == "red circle left of blue square is wrong; it is right of it"
    assert kinds == [
        ["move the red circle left of the blue square"],
        ["move the blue square right of the red circle"],
        ["swap the red circle and the blue square"],
        ["move the red circle above the green square"],
        ["remove the red circle"],
        ["add a red circle left of the blue square"],
    ]
    texts = {text for kind in kinds for text in kind}
    told = {questions.repair(random.Random(seed), things, graph)[1] for seed in range(200)}
    assert texts <= told
    left = {questions.repair(random.Random(s), things, graph, texts)[1] for s in range(50)}
    assert left and not left & texts


def test_repairs_mend_some_faults():
    """Carried out to perfection, a part of them mends a fault: what phase 1 starts from."""
    rng = random.Random(13)
    outcomes = []
    for _ in range(300):
        image, graph = questions.faulty_image(rng)
        (things,) = world.parse([image])

        def faults(shown, graph=graph):
            missing = sum(questions.count(shown, name) != 1 for name in graph.objects)
            return missing + sum(not questions.shows(shown, triple) for triple in graph.triples)

        _, instruction = questions.repair(rng, things, graph)
        assert (instruction == "none") == (faults(things) == 0)
        if instruction != "none":
            result = lessons.perform(rng, things, instruction)
            outcomes.append(result is not None and faults(result) < faults(things))
    assert 0.25 < np.mean(outcomes) < 0.6


def test_judgments_count_the_triples_that_hold(asked):
    digits = set()
    for things, _, texts in asked:
        for text, answer, _ in texts:
            if match := re.fullmatch(r"How well does the image fit: (.*)\?", text):
                triples = parse_prompt(match[1], RELATIONS).triples
                held = np.mean([questions.shows(things, triple) for triple in triples])
                assert abs(int(answer) - 9 * held) <= 0.5
                digits.add(answer)
    assert {"0", "9"} < digits


def test_drills_tell_what_is_there(asked):
    kinds = set()
    for things, _, texts in asked:
        names = [thing.name for thing in things]
        cells = [world.cell_of(thing) for thing in things]
        for text, answer, _ in texts:
            if match := re.fullmatch(r"where is the (.*)\?", text):
                assert names.count(match[1]) == 1
                assert int(answer) == cells[names.index(match[1])]
            elif match := re.fullmatch(r"what is at (\d+)\?", text):
                assert answer in [n for n, cell in zip(names, cells) if cell == int(match[1])]
            elif match := re.fullmatch(r"relate the (.*) and the (.*)\.", text):
                word = world.relation(one(things, match[1]), one(things, match[2]))
                assert answer == (word or "nothing")
            elif text == "list what you see.":
                listed = sorted(f"{name} {cell}" for name, cell in zip(names, cells))
                assert sorted(answer.split(" ; ")) == (listed or ["nothing"])
            elif match := re.fullmatch(r"list the prompt: (.*)\.", text):
                assert answer == match[1]
            else:
                continue
            kinds.add(text.split()[0])
    assert kinds == {"where", "what", "relate", "list"}


def test_faulty_images_are_seeded_and_stay_in_their_split():
    for split in SPLITS:
        first, second = random.Random(14), random.Random(14)
        for _ in range(20):
            image, graph = questions.faulty_image(first, split)
            again, same = questions.faulty_image(second, split)
            assert (image == again).all() and graph == same
            assert world.split_of(graph.objects) == split
