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

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tiny" / "make"), str(ROOT / "tiny")]

import lessons
import models
import questions
import world
from world import GRID, GROUND, NAMES, RELATIONS, SIZE, Thing

from actor import parse_completion
from sgiou import SceneGraph, load_graphs, sg_iou

SPLITS = {"train": 2000, "val": 720, "test": 1000}


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


def test_parse_finds_exactly_what_is_drawn():
    """In crowds too, with several things of the same name."""
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


def test_relation_has_a_margin():
    here = Thing("red circle", 10, 10)
    assert world.relation(here, Thing("sun", 14, 10)) == "left of"
    assert world.relation(here, Thing("sun", 13, 10)) is None
    assert world.relation(here, Thing("sun", 6, 10)) == "right of"
    assert world.relation(here, Thing("sun", 10, 14)) == "above"
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
        Thing("blue square", 17, 2),
        Thing("green circle", 25, 10),  # diagonal to the square: no relation
        Thing("yellow circle", 9, 9),
    ]
    objects, triples = world.exact_graph(things, gold)
    assert objects == ["red circle", "blue square", "green circle", "yellow circle"]
    assert triples == [("red circle", "left of", "blue square")]


def test_contradictory_twins_cost():
    gold = SceneGraph(["red circle", "blue square"], [("red circle", "left of", "blue square")])
    things = [Thing("red circle", 1, 9), Thing("blue square", 9, 9), Thing("red circle", 25, 9)]
    objects, triples = world.exact_graph(things, gold)
    assert sorted(objects) == ["blue square", "red circle", "red circle"]
    assert [word for _, word, _ in triples] == ["left of", "right of"]
    assert sg_iou(SceneGraph(objects, triples), gold)["sg_iou"] == 0.5


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


# ---- the shipped data ----


@pytest.fixture(scope="module")
def graphs():
    return {split: load_graphs(ROOT / "tiny" / "data" / f"{split}.json") for split in SPLITS}


def test_the_data_are_what_the_generator_makes(tmp_path):
    world.write_data(tmp_path / "again")
    for split in SPLITS:
        shipped = (ROOT / "tiny" / "data" / f"{split}.json").read_bytes()
        assert (tmp_path / "again" / f"{split}.json").read_bytes() == shipped


def test_the_data_load_whole_and_no_graph_stands_twice(graphs, capsys):
    for split, total in SPLITS.items():
        path = ROOT / "tiny" / "data" / f"{split}.json"
        assert len(load_graphs(path)) == total == len(json.loads(path.read_text()))
    assert capsys.readouterr().err == ""
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

CORNER = [Thing("red circle", 1, 1), Thing("blue square", 26, 26), Thing("green square", 9, 1)]


def one(things, name):
    (thing,) = [thing for thing in things if thing.name == name]
    return thing


def test_move_and_add():
    for name, text in (
        ("red circle", "move the red circle above the blue square"),
        ("yellow circle", "add a yellow circle left of the blue square"),
    ):
        after = lessons.perform(random.Random(0), CORNER, text)
        assert world.relation(one(after, name), CORNER[1]) in text
        assert [t for t in after if t.name != name] == [t for t in CORNER if t.name != name]


def test_remove_swap_and_change():
    red, blue, green = CORNER
    for text, expected in (
        ("remove the red circle", [blue, green]),
        (
            "swap the red circle and the blue square",
            [red._replace(name="blue square"), blue._replace(name="red circle"), green],
        ),
        (
            "change the red circle to a blue circle",
            [red._replace(name="blue circle"), blue, green],
        ),
    ):
        assert sorted(lessons.perform(random.Random(0), CORNER, text)) == sorted(expected)


@pytest.mark.parametrize(
    "instruction",
    [
        "none",
        "move the red circle near the blue square",
        "move the yellow circle above the blue square",  # it is not there
        "move the blue square left of the red circle",  # it stands in the corner
        "change the red circle to a purple dog",
    ],
)
def test_what_cannot_be_done_is_none(instruction):
    for seed in range(5):
        assert lessons.perform(random.Random(seed), CORNER, instruction) is None


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


# ---- questions: what the VLM is taught ----


@pytest.fixture(scope="module")
def asked():
    """(things, questions) of 300 faulty images."""
    rng = random.Random(15)
    found = []
    for _ in range(300):
        image, graph = questions.faulty_image(rng)
        (things,) = world.parse([image])
        found.append((things, list(questions.questions(rng, things, graph, "repair"))))
    return found


def test_verdicts_are_true_of_the_picture(asked):
    told = {"yes": 0, "no": 0}
    for things, texts in asked:
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


def test_repairs_are_well_formed_and_not_among_the_tried(asked):
    kinds, some = set(), 0
    for _, texts in asked:
        for text, answer, _ in texts:
            if not text.startswith("Prompt: "):
                continue
            tried = text.partition("Tried without success: ")[2].rstrip(".").split("; ")
            thought, instruction = parse_completion(answer)
            assert thought and instruction and instruction not in tried
            kinds.add(instruction.split()[0])
            some += tried != [""]
    assert some > 100
    assert kinds == {"none", "move", "swap", "add", "remove", "change"}


def test_faulty_images_are_seeded_and_stay_in_their_split():
    for split in SPLITS:
        first, second = random.Random(14), random.Random(14)
        for _ in range(20):
            image, graph = questions.faulty_image(first, split)
            again, same = questions.faulty_image(second, split)
            assert (image == again).all() and graph == same
            assert world.split_of(graph.objects) == split
