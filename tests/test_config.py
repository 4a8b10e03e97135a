"""config.py: what loads, and that everything else is one clear line naming file and key."""

import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from config import EvaluationConfig, LoopConfig, TrainConfig, load_config

ROOT = Path(__file__).resolve().parent.parent
GOOD = """
diffuser: {model: flow, call: {height: 32}}
checker: {model: vlm}
actor: {model: vlm, temperature: 1e-6}
editor: {model: flow}
relations: [left of, above]
evaluation: {data: prompts.json}
data: prompts.json
validation: prompts.json
run: some_run
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with all that GOOD names."""
    for name in ("vlm", "flow", "adapter"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "prompts.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(folder):
    """Loads a text, as the config of a training run or of a loop."""

    def load_text(text, *overrides, schema=TrainConfig):
        (folder / "some.yaml").write_text(text, encoding="utf-8")
        return load_config("some.yaml", schema, overrides)

    return load_text


@pytest.fixture
def refusal(load):
    """The line with which a text or an override is refused."""

    def refuse(text, *overrides):
        with pytest.raises(ValueError) as caught:
            load(text, *overrides)
        assert str(caught.value).startswith("some.yaml: ")
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    return refuse


# ---- what loads ----


def test_values_and_defaults(load):
    config = load(GOOD)
    assert config.diffuser.call == {"height": 32} and config.editor.call == {}
    assert config.checker.batch_size == 64 and config.checker.attention == ""
    assert config.relations == ["left of", "above"] and config.rounds == 3
    assert config.evaluation == EvaluationConfig(data="prompts.json", limit=300, judge=None)
    assert config.phase is None and config.run == "some_run"


def test_a_loop_needs_no_training_keys(load):
    text = GOOD[: GOOD.index("evaluation")]
    config = load(text, "rounds=0", schema=LoopConfig)
    assert config.rounds == 0 and config.evaluation is None


@pytest.mark.parametrize("text", ["1e-6", "0.000001", ".1E-5"])
def test_every_spelling_of_a_float(load, text):
    assert load(GOOD.replace("1e-6", text)).actor.temperature == 1e-6
    assert isinstance(load(GOOD, "kl=2").kl, float)


def test_overrides(load):
    config = load(
        GOOD,
        *("rounds=5", "rounds=7", "relations=[below]", "phase=2", "run=a=b"),
        *("actor.adapter=adapter", "actor.adapter=", "editor.call.height=16"),
        "evaluation.judge.model=owner/judge",  # its section is not in the file
    )
    assert (config.rounds, config.relations, config.phase) == (7, ["below"], 2)
    assert config.run == "a=b" and config.actor.adapter == ""
    assert config.editor.call == {"height": 16} and config.diffuser.call == {"height": 32}
    assert config.evaluation.judge.model == "owner/judge"


def test_an_override_leaves_the_other_sections_of_an_alias_alone(load):
    text = GOOD.replace("diffuser: ", "diffuser: &flow ").replace("{model: flow}", "*flow")
    config = load(text, "editor.call.height=16")
    assert config.diffuser.call == {"height": 32} and config.editor.call == {"height": 16}


@pytest.mark.parametrize("path", [*ROOT.glob("*.yaml"), *ROOT.glob("gpu/[ep][vh]*.yaml")], ids=str)
def test_every_shipped_file_loads(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)  # the models and data that ship are found from anywhere
    for data in re.findall(": (laion-sg/.+json)", path.read_text()):
        (tmp_path / data).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / data).write_text("[]")
    phase = int(path.name[5]) if "phase" in path.name else None
    config = load_config(path, TrainConfig if phase else LoopConfig)
    assert config.diffuser.call["num_inference_steps"] > 0
    if phase:
        assert config.phase == phase and f"phase{phase}" in config.run


# ---- what does not ----


def test_a_typo_is_refused_with_the_right_key(refusal):
    assert "'rouns' is unknown; did you mean 'rounds'?" in refusal(GOOD, "rouns=1")


@pytest.mark.parametrize(
    "override",
    [
        "diffuser.attention=sdpa",  # a key of VLMs only
        # types
        "checker=3",
        "rounds=3.0",
        "kl='1e-6'",
        "exact=1",
        "relations=[on, above]",  # YAML reads on as true
        # ranges
        "rounds=0",
        "seed=-1",
        "kl=.nan",
        "checker.dtype=fp16",
        "editor.template=mend it",  # no place for the instruction
        # paths
        "actor.adapter=a/b",
        "data=gone.json",
        "run=",
        "run=$NO_SUCH/run",
        # arguments of a pipeline's call
        "diffuser.call.num_inference_steps=8.0",
        "diffuser.call.height=0",
        "diffuser.call.max_area=",
    ],
)
def test_a_wrong_value_is_refused_with_its_key(refusal, override):
    assert f"'{override.partition('=')[0]}' is " in refusal(GOOD, override)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("evaluation={limit: 1}", "'evaluation.data' is missing"),
        ("diffuser.call.prompt=x", "'diffuser.call' holds 'prompt'"),  # the program sets it
        ("editor.call.sigmas=[1.0, 0.5]", "'editor.call' holds 'sigmas'"),
        ("diffuser.call.self=&a {x: *a}", "'diffuser.call.self"),
        ("rounds", "'rounds': write it as key=value"),
        ("evaluation={limit: 1, limit: 2}", "'limit' appears twice"),
    ],
)
def test_an_override_that_cannot_be_meant_is_refused(refusal, override, line):
    assert line in refusal(GOOD, override)


@pytest.mark.parametrize(
    "text",
    ["", "- diffuser", "just words", "a: b: c", "[" * 5000, "a: 2001-99-99", "\x00"]
    + ["!!python/object/apply:os.system [true]"],
)
def test_a_text_that_is_no_config(refusal, text):
    assert refusal(text)


def test_a_file_that_cannot_be_read(folder):
    (folder / "latin.yaml").write_bytes(b"a: \xe9\xff")
    for path in (folder / "missing.yaml", folder / "vlm", folder / "latin.yaml"):
        with pytest.raises(ValueError, match=str(path)) as caught:
            load_config(path, LoopConfig)
        assert len(str(caught.value).splitlines()) == 1


# ---- paths ----


@pytest.mark.parametrize("key", ["checker.model", "evaluation.judge.model"])
def test_a_model_is_a_folder_or_a_hub_id(load, refusal, key):
    for model in ("flow", "./flow", "owner/some-model_1.5"):
        assert load(GOOD, f"{key}={model}")
    for model in ("gone", "/gone", "a/b/c", "", "flow/vml", "prompts.json"):
        assert f"'{key}' is" in refusal(GOOD, f"{key}={model}")


def test_home_and_variables_are_expanded(load, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("PLACE", "place")
    paths = ["checker.model=~/vlm", "actor.adapter=$HOME/adapter", "run=~/$PLACE/run"]
    config = load(GOOD, *paths, "data=${HOME}/prompts.json")
    assert config.checker.model == f"{folder}/vlm" and config.run == f"{folder}/place/run"
    assert config.actor.adapter == f"{folder}/adapter"
    assert config.data == f"{folder}/prompts.json"


def test_what_is_not_here_is_looked_for_beside_the_file(load, folder, monkeypatch):
    load(GOOD)
    (folder / "elsewhere" / "vlm").mkdir(parents=True)
    (folder / "runs" / "old").mkdir(parents=True)
    monkeypatch.chdir(folder / "elsewhere")
    config = load_config("../some.yaml", TrainConfig, ["run=runs/old", "editor.adapter=adapter"])
    assert config.checker.model == "vlm"  # found here
    assert config.editor.model == "../flow" and config.evaluation.data == "../prompts.json"
    assert config.editor.adapter == "../adapter" and config.actor.adapter == ""
    assert config.run == "runs/old"  # is written, so always here


# ---- anything at all ----

texts = st.text("ab/. ~$\n\r\x85\0'\"é") | st.text()
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=8
)
keys = st.sampled_from(sorted(yaml.safe_load(GOOD)) + ["rounds", "model", "call", "data", "run"])


@settings(max_examples=200, deadline=None)
@given(
    st.text() | values.map(yaml.safe_dump),
    st.lists(st.text() | st.builds("{}={}".format, keys, texts | values), max_size=2),
)
def test_random_files_raise_nothing_but_one_line(tmp_path_factory, text, overrides):
    path = tmp_path_factory.getbasetemp() / "some.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:  # a random text is never a complete config
        load_config(path, TrainConfig, overrides)
    assert len(str(caught.value).splitlines()) == 1 and "some.yaml: " in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([f.name for f in fields(TrainConfig)]), values, st.just(".") | texts)
def test_random_values_load_or_raise_one_line(tmp_path_factory, key, value, model):
    path = tmp_path_factory.getbasetemp() / "some.yaml"
    parts = {part: {"model": "."} for part in ("diffuser", "checker", "actor")}
    parts |= {"editor": {"model": model, "call": {"x": value}}, "relations": []}
    data = dict.fromkeys(("data", "validation"), str(ROOT / "tiny/data/val.json"))
    path.write_text(yaml.safe_dump(parts | data | {key: value}))
    try:
        config = load_config(path, TrainConfig)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and "some.yaml: " in str(error)
    else:
        path.write_text(yaml.safe_dump(asdict(config)))
        assert load_config(path, TrainConfig) == config
