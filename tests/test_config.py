"""config.py: what loads, and that everything else is one clear line naming file and key."""

import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from config import EvaluationConfig, LoopConfig, TrainConfig, fingerprint, load_config

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
        (tmp_path / name).mkdir()
    (tmp_path / "prompts.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(folder):
    """Loads GOOD, or another text, with overrides."""

    def load_text(*overrides, text=GOOD, schema=TrainConfig):
        (folder / "some.yaml").write_text(text)
        return load_config("some.yaml", schema, overrides)

    return load_text


def refusal(load, *arguments, **texts):
    """The one line with which `load` refuses."""
    with pytest.raises(ValueError, match=r"^some.yaml: .*$") as caught:
        load(*arguments, **texts)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---- what loads ----


def test_values_and_defaults(load):
    config = load()
    assert config.diffuser.call == {"height": 32} and config.editor.call == {}
    assert config.relations == ["left of", "above"] and config.checker.batch_size == 64
    assert config.evaluation == EvaluationConfig(data="prompts.json", limit=300, judge=None)
    assert config.actor.temperature == 1e-6  # which PyYAML alone would read as text
    text = GOOD[: GOOD.index("evaluation")]
    assert load("rounds=0", text=text, schema=LoopConfig).rounds == 0  # needs no training keys


def test_overrides(load):
    config = load(
        *("rounds=5", "rounds=7", "relations=[below]", "kl=.1E-5", "run=a=b"),
        *("actor.adapter=adapter", "actor.adapter=", "editor.call.height=16"),
        "evaluation.judge.model=owner/judge",  # its section is not in the file
    )
    assert (config.rounds, config.relations, config.kl) == (7, ["below"], 1e-6)
    assert config.run == "a=b" and config.actor.adapter == ""
    assert config.editor.call == {"height": 16} and config.diffuser.call == {"height": 32}
    assert config.evaluation.judge.model == "owner/judge"


def test_an_override_leaves_the_other_sections_of_an_alias_alone(load):
    text = GOOD.replace("diffuser: ", "diffuser: &flow ").replace("{model: flow}", "*flow")
    config = load("editor.call.height=16", text=text)
    assert config.diffuser.call == {"height": 32} and config.editor.call == {"height": 16}


@pytest.mark.parametrize("path", [*ROOT.glob("*.yaml"), *ROOT.glob("gpu/[ep][vh]*.yaml")], ids=str)
def test_every_shipped_file_loads(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)  # the models and data that ship are found from anywhere
    for data in re.findall(": (laion-sg/.+json)", path.read_text()):
        (tmp_path / data).parent.mkdir(exist_ok=True)
        (tmp_path / data).write_text("[]")
    phase = int(path.name[5]) if "phase" in path.name else None
    config = load_config(path, TrainConfig if phase else LoopConfig)
    assert phase is None or config.phase == phase and f"phase{phase}" in config.run


# ---- what does not ----


@pytest.mark.parametrize(
    "override",
    [
        # types
        "checker=3",
        "rounds=3.0",
        "rounds=010",  # YAML 1.1 reads 8
        "rounds=1:30",  # YAML 1.1 reads 90
        "relations=[on, above]",  # YAML reads on as true
        # ranges
        "rounds=0",
        "group_size=1",
        "seed=2147483648",
        "kl=.nan",
        "rank=100000",
        "checker.dtype=fp16",
        "editor.template=mend it",  # no place for the instruction
        # paths
        "checker.model=gone",
        "checker.model=flow/vml",  # no Hub id: there is a folder flow
        "actor.adapter=a/b",
        "data=gone.json",
        "run=",
        "run=$NO_SUCH/run",
        "run=prompts.json",
        # arguments of a pipeline's call
        "diffuser.call.num_inference_steps=8.0",
        "diffuser.call.height=0",
    ],
)
def test_a_wrong_value_is_refused_with_its_key(load, override):
    assert f"'{override.partition('=')[0]}' is " in refusal(load, override)


def test_a_training_file_is_recognized(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="phase1.yaml: key 'data' .* file for train.py"):
        load_config("phase1.yaml", LoopConfig)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rouns=1", "'rouns' is unknown; did you mean 'rounds'?"),
        ("diffuser.attention=sdpa", "'diffuser.attention' is unknown"),  # a key of VLMs
        ("evaluation={limit: 1}", "'evaluation.data' is missing"),
        ("evaluation={limit: 1, limit: 2}", "'limit' appears twice"),
        ("diffuser.call.prompt=x", "'diffuser.call' holds 'prompt'"),  # the program sets it
        ("editor.call.sigmas=[1.0, 0.5]", "'editor.call' holds 'sigmas'"),
        ("rounds", "'rounds': write it as key=value"),
    ],
)
def test_a_key_that_cannot_be_meant_is_refused(load, override, line):
    assert line in refusal(load, override)


@pytest.mark.parametrize("text", ["", "- diffuser", "a: b: c", "[" * 5000, "a: 2001-99-99", "\x00"])
def test_a_text_that_is_no_config(load, text):
    assert refusal(load, text=text)


def test_a_file_that_cannot_be_read(folder):
    (folder / "latin.yaml").write_bytes(b"a: \xe9\xff")
    for path in (folder / "missing.yaml", folder / "vlm", folder / "latin.yaml"):
        with pytest.raises(ValueError, match=f"^{path}: .*$"):
            load_config(path, LoopConfig)


# ---- paths ----


def test_home_and_variables_are_expanded(load, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("PLACE", "place")
    config = load("checker.model=~/vlm", "data=${HOME}/prompts.json", "run=~/$PLACE")
    assert config.checker.model == f"{folder}/vlm" and config.data == f"{folder}/prompts.json"
    assert config.run == f"{folder}/place"


def test_what_is_not_here_is_looked_for_beside_the_file(load, folder, monkeypatch):
    load()
    (folder / "elsewhere" / "vlm").mkdir(parents=True)
    (folder / "old_run").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    config = load_config("../some.yaml", TrainConfig, ["run=old_run", "editor.adapter=adapter"])
    assert config.checker.model == "vlm"  # found here
    assert config.editor.model == "../flow" and config.evaluation.data == "../prompts.json"
    assert config.editor.adapter == "../adapter" and config.actor.adapter == ""
    assert config.run == "old_run"  # is written, so always here


def test_the_fingerprint_follows_the_content_of_files(load, folder):
    words = ["actor.adapter=adapter", "checker.model=owner/vlm"]
    before = fingerprint(load(*words), ["rounds"])
    assert before["checker.model"] == "owner/vlm" and before["diffuser.call.height"] == 32
    assert "rounds" not in before
    (folder / "adapter").rename(folder / "moved")
    words[0] = "actor.adapter=moved"
    assert fingerprint(load(*words), ["rounds"]) == before
    (folder / "moved" / "weights.safetensors").write_text("other weights")
    after = fingerprint(load(*words), ["rounds"])
    assert [key for key in before if before[key] != after[key]] == ["actor.adapter"]


def test_the_fingerprint_of_a_model_is_the_same_however_its_path_is_written(load, folder):
    one, two = fingerprint(load()), fingerprint(load(f"checker.model={folder}/vlm"))
    assert one == two and one["checker.model"] == f"{folder}/vlm"
    inside = f"checker.model={ROOT}/tiny/models/vlm"
    assert fingerprint(load(inside))["checker.model"] == "tiny/models/vlm"


# ---- anything at all ----

texts = st.text("ab/. ~$\n\r\x85\0'\"é") | st.text()
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=8
)
names = st.sampled_from([field.name for field in fields(TrainConfig)])


@settings(max_examples=300, deadline=None)
@given(names, values, texts, st.lists(texts, max_size=1))
def test_random_values_load_or_raise_one_line(tmp_path_factory, name, value, text, overrides):
    path = tmp_path_factory.getbasetemp() / "some.yaml"
    good = {part: {"model": "."} for part in ("diffuser", "checker", "actor")}
    good |= {"editor": {"model": ".", "call": {text: value}}, "relations": [], "run": text}
    good |= dict.fromkeys(("data", "validation"), str(ROOT / "tiny/data/val.json"))
    for content in (text, yaml.safe_dump(value), yaml.safe_dump(good | {name: value})):
        path.write_text(content, encoding="utf-8", errors="replace")
        try:
            config = load_config(path, TrainConfig, overrides)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1 and "some.yaml: " in str(error)
        else:
            path.write_text(yaml.safe_dump(asdict(config)))
            assert load_config(path, TrainConfig) == config
