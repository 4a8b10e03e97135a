"""tiny/: the renderer and its exact parser, the shipped data, the lessons and the questions."""

# ruff: noqa: E402 (the scripts in tiny/make/ import each other by name)
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


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (14, 10, "left of"),
        (13, 10, None),  # too near
        (6, 10, "right of"),
        (10, 14, "above"),
        (10, 6, "below"),
        (18, 14, "left of"),
        (18, 15, None),  # diagonal
    ],
)
def test_relation_has_a_margin(x, y, expected):
    assert world.relation(Thing("red circle", 10, 10), Thing("sun", x, y)) == expected


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
        by_name = {thing.name: thing for thing in things}
        assert {name for a, _, b in triples for name in (a, b)} == set(by_name)
        assert len({frozenset((a, b)) for a, _, b in triples}) == relations
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


def test_every_number_of_relations_has_as_many_prompts(graphs):
    for split, total in SPLITS.items():
        counts = [len(graph.triples) for graph in graphs[split]]
        assert counts == [3, 4, 5, 6] * (total // 4)
        assert {len(graph.objects) for graph in graphs[split]} == {3, 4, 5}


def test_no_graph_appears_twice_and_splits_share_no_set_of_objects(graphs):
    everything = [frozenset(graph.triples) for split in SPLITS for graph in graphs[split]]
    assert len(set(everything)) == sum(SPLITS.values())
    sets = [{frozenset(graph.objects) for graph in graphs[split]} for split in SPLITS]
    assert len(set.union(*sets)) == sum(map(len, sets))


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


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("red circle", "move the red circle above the blue square"),
        ("yellow circle", "add a yellow circle left of the blue square"),
    ],
)
def test_move_and_add(name, instruction):
    after = lessons.perform(random.Random(0), CORNER, instruction)
    assert world.relation(one(after, name), CORNER[1]) in instruction
    assert [t for t in after if t.name != name] == [t for t in CORNER if t.name != name]


def test_remove_swap_and_change():
    red, blue, green = CORNER
    swapped = [red._replace(name="blue square"), blue._replace(name="red circle"), green]
    for text, expected in (
        ("remove the red circle", [blue, green]),
        ("swap the red circle and the blue square", swapped),
        ("change the red circle to a blue circle", [red._replace(name="blue circle"), blue, green]),
    ):
        assert sorted(lessons.perform(random.Random(0), CORNER, text)) == sorted(expected)


@pytest.mark.parametrize(
    "instruction",
    [
        "move the red circle near the blue square",
        "move the yellow circle above the blue square",  # it is not there
        "move the blue square left of the red circle",  # which is in the corner
    ],
)
def test_what_cannot_be_done_is_none(instruction):
    assert lessons.perform(random.Random(0), CORNER, instruction) is None


def test_lessons_stay_in_their_split_and_can_be_done():
    rng = random.Random(10)
    actions = set()
    for _ in range(300):
        before, instruction, after = lessons.edit(rng, "val")
        actions.add(instruction.split()[0])
        assert world.split_of(thing.name for thing in before) == "val"
        changed = sum(thing not in before for thing in after)
        assert changed <= (2 if instruction.startswith("swap") else 1)
        assert len({world.cell_of(thing) for thing in after}) == len(after)
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


def test_verdicts_are_true_of_the_image(asked):
    given = {"yes": 0, "no": 0}
    for things, texts in asked:
        names = [thing.name for thing in things]
        for text, answer, _ in texts:
            question = re.fullmatch(r'Does the image show "(.*)"\?', text)
            if not question:
                continue
            triple = re.fullmatch(rf"(.*) ({'|'.join(RELATIONS)}) (.*)", question[1])
            if triple:
                subject, word, other = triple.groups()
                truth = names.count(subject) == names.count(other) == 1
                truth = truth and world.relation(one(things, subject), one(things, other)) == word
            else:
                truth = names.count(question[1]) == 1
            assert answer == ("yes" if truth else "no"), (things, text)
            given[answer] += 1
    assert min(given.values()) > 0.25 * sum(given.values())


def test_repairs_are_well_formed_and_not_among_the_tried(asked):
    kinds, some = set(), 0
    for _, texts in asked:
        for text, answer, _ in texts:
            if text.startswith("Prompt: "):
                tried = text.partition("Tried without success: ")[2].rstrip(".").split("; ")
                thought, instruction = parse_completion(answer)
                assert thought and instruction and instruction not in tried
                kinds.add(instruction.split()[0])
                some += tried != [""]
    assert some > 100
    assert kinds == {"none", "move", "swap", "add", "remove", "change"}
