"""config.py and the command lines: what is wrong is told in one line, before any model loads."""

import contextlib
import importlib
import io
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from config import ActorConfig, EvaluationConfig, LoopConfig, load_config

ROOT = Path(__file__).resolve().parent.parent
GOOD = """
diffuser: {model: MODEL, call: {height: 32}}
checker: {model: MODEL}
actor: {model: MODEL, temperature: 1e-6}
editor: {model: MODEL}
relations: [left of, above]
evaluation: {data: DATA}
"""


@pytest.fixture
def good(tmp_path):
    """The text of a config that loads: its model folder exists."""
    return GOOD.replace("MODEL", str(tmp_path)).replace("DATA", str(tmp_path / "data.json"))


@pytest.fixture
def load(tmp_path):
    """Loads a config from its text."""

    def load_text(text, *overrides):
        path = tmp_path / "some.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        return load_config(path, LoopConfig, overrides)

    return load_text


def told(load, text, *overrides):
    """The one line with which a config is refused."""
    with pytest.raises(ValueError) as caught:
        load(text, *overrides)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line


# ---- what loads ----


def test_values_defaults_and_types(load, good, tmp_path):
    config = load(good)
    assert config.diffuser.model == str(tmp_path)
    assert config.diffuser.call == {"height": 32}
    assert config.checker.batch_size == 64 and config.rounds == 3
    assert config.relations == ["left of", "above"]
    assert isinstance(config.actor, ActorConfig) and config.actor.temperature == 1e-6
    assert isinstance(config.evaluation, EvaluationConfig) and config.evaluation.limit == 300


@pytest.mark.parametrize("text", ["1e-6", "0.000001", "'1e-6'"])
def test_floats_as_yaml_reads_them(load, good, text):
    assert load(good.replace("1e-6", text)).actor.temperature == 1e-6


def test_an_integer_is_a_float_too(load, good):
    temperature = load(good, "actor.temperature=2").actor.temperature
    assert temperature == 2.0 and isinstance(temperature, float)


def test_overrides_win_in_order(load, good):
    config = load(
        good, "rounds=5", "rounds=7", "evaluation.limit=8", "relations=[below]", "diffuser.call.a=1"
    )
    assert (config.rounds, config.evaluation.limit, config.relations) == (7, 8, ["below"])
    assert config.diffuser.call == {"height": 32, "a": 1}


def test_a_value_may_hold_an_equals_sign(load, good):
    assert load(good, "evaluation.data=a=b.json").evaluation.data == "a=b.json"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("editor.template=mend it", "editor.template"),
        ("diffuser.call.generator=1", "diffuser.call"),
        ("editor.call.prompt=x", "editor.call"),
        ("diffuser.call={1: 2}", "diffuser.call"),
        ("diffuser.call.height=2024-01-01", "diffuser.call"),
        ("evaluation={limit: 1, limit: 2, data: x}", "'limit' stands twice"),
    ],
)
def test_what_would_fail_later_is_told_at_once(load, good, override, told):
    with pytest.raises(ValueError, match=told):
        load(good, override)


def test_an_empty_value_is_an_empty_string(load, good):
    assert load(good, "actor.adapter=nowhere", "actor.adapter=").actor.adapter == ""


def test_an_optional_section_may_be_missing_or_null(load, good):
    text = good[: good.index("evaluation")]
    assert load(text).evaluation is None
    assert load(text + "evaluation:\n").evaluation is None


def test_a_default_is_not_shared(load, good):
    first, second = load(good), load(good)
    assert first.editor.call == {}
    first.editor.call["height"] = 1
    assert second.editor.call == {}


@pytest.mark.parametrize("name", ["eval.yaml"])
def test_the_shipped_configs_load(monkeypatch, name, tmp_path):
    monkeypatch.chdir(ROOT)
    parts = ("diffuser", "checker", "actor", "editor")
    config = load_config(name, LoopConfig, [f"{part}.model={tmp_path}" for part in parts])
    assert Path(config.evaluation.data).is_file()
    assert config.diffuser.call["num_inference_steps"] == 8


# ---- what does not: file and key in one line ----


@pytest.mark.parametrize(
    ("change", "key", "hint"),
    [
        (("relations:", "rouns: 1\nrelations:"), "'rouns'", "'rounds'"),
        (("relations:", "xyzzy: 1\nrelations:"), "'xyzzy'", "relations"),
        (("checker: {", "checker: {batchsize: 1, "), "'checker.batchsize'", "'checker.batch_size'"),
        (("evaluation: {", "evaluation: {limt: 1, "), "'evaluation.limt'", "'evaluation.limit'"),
        (("relations:", "1: 2\nrelations:"), "'1'", "unknown"),
        (("relations: [left of, above]", ""), "'relations'", "missing"),
        (("evaluation: {data", "evaluation: {seed: 1} #"), "'evaluation.data'", "missing"),
        (("actor: {model", "actor: {} #"), "'actor.model'", "missing"),
        (("checker: {model", "checker: 3 #"), "'checker'", "holds no keys"),
        (("checker: {model", "checker: #"), "'checker'", "holds no keys"),
        (("[left of, above]", "left of"), "'relations'", "a list of str"),
        (("[left of, above]", "[left of, 3]"), "'relations'", "a list of str"),
        (("[left of, above]", "[left of, [above]]"), "'relations'", "a list of str"),
        (("relations:", "rounds: '3'\nrelations:"), "'rounds'", "int"),
        (("relations:", "rounds: 3.0\nrelations:"), "'rounds'", "int"),
        (("relations:", "rounds: yes\nrelations:"), "'rounds'", "int"),
        (("relations:", "rounds:\nrelations:"), "'rounds'", "int"),
        (("temperature: 1e-6", "temperature: warm"), "'actor.temperature'", "float"),
        (("temperature: 1e-6", "temperature: true"), "'actor.temperature'", "float"),
        (("temperature: 1e-6", "temperature: [1]"), "'actor.temperature'", "float"),
        (("temperature: 1e-6", f"temperature: 1{'0' * 400}"), "'actor.temperature'", "float"),
        (("call: {height: 32}", "call: 32"), "'diffuser.call'", "dict"),
        (("evaluation: {", "evaluation: {exact: 1, "), "'evaluation.exact'", "bool"),
        (("evaluation: {data", "evaluation: {data: 1} #"), "'evaluation.data'", "str"),
        (("editor: {model", "editor: {adapter: no, model"), "'editor.adapter'", "str"),
        (("[left of, above]", "[on, above]"), "'relations'", "quote them"),
        (("relations:", "rounds: -1\nrelations:"), "'rounds'", "at least 0"),
        (("checker: {", "checker: {batch_size: 0, "), "'checker.batch_size'", "at least 1"),
        (("temperature: 1e-6", "temperature: 0"), "'actor.temperature'", "at least"),
        (("temperature: 1e-6", "temperature: .nan"), "'actor.temperature'", "at least"),
        (("temperature: 1e-6", "temperature: .inf"), "'actor.temperature'", "at least"),
    ],
)
def test_a_bad_key_is_named(load, good, change, key, hint):
    assert change[0] in good
    line = told(load, good.replace(*change))
    assert "some.yaml" in line and key in line and hint in line


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment",
        "- diffuser",
        "[]",
        "just words",
        "3",
        "a: b: c",
        "[" * 5000,
        "a: [1, 2",
        "\x00",
        "a: !!bool maybe",
        "a: !!timestamp soon",
        "a: 2001-99-99",
        "a: !!int ''",
        "a: 0b_",
        "a: " + "1" * 5000,
        '"a\\nb": 1',
        "!!python/object/apply:os.system [true]",
    ],
)
def test_a_file_that_is_no_config(load, text):
    assert "some.yaml" in told(load, text)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\xff")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ValueError, match=path.name) as caught:
            load_config(path, LoopConfig)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("rounds", "key=value"),
        ("rounds=[1", "YAML"),
        ("rounds=2001-99-99", "YAML"),
        ("rounds=" + "[" * 5000, "YAML"),
        ("rounds=two", "'rounds'"),
        ("rouns=2", "'rounds'"),
        ("evaluation.limt=2", "'evaluation.limit'"),
        ("evalution.limit=2", "'evalution'"),
        ("rounds.limit=2", "'rounds'"),
        ("a.b.c=2", "'a.b'"),
        ("=2", "unknown"),
        ("a\nb=2", "unknown"),
    ],
)
def test_a_bad_override_is_told(load, good, override, hint):
    assert hint in told(load, good, override)


def test_an_override_of_an_empty_file_tells_of_the_file(load):
    assert "holds no keys" in told(load, "", "rounds=1")


# ---- model folders and Hub ids ----


@pytest.mark.parametrize(
    "model", ["missing/folder/x", "./missing", "../gone", "/gone", "gpt2", "''", "x" * 5000]
)
def test_a_missing_model_folder_is_told(load, good, model):
    line = told(load, good, f"editor.model={model}")
    assert "some.yaml" in line and "'editor.model'" in line and "folder" in line


def test_a_folder_misspelt_below_one_that_exists_is_no_hub_id(load, good, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "'actor.model'" in told(load, good, "actor.model=models/vml")


@pytest.mark.parametrize("part", ["actor", "editor"])
def test_an_adapter_is_a_folder(load, good, tmp_path, part):
    assert getattr(load(good), part).adapter == ""
    assert getattr(load(good, f"{part}.adapter={tmp_path}"), part).adapter == str(tmp_path)
    line = told(load, good, f"{part}.adapter=owner/name")
    assert f"'{part}.adapter'" in line and "'owner/name'" in line and "some.yaml" in line


def test_only_what_is_trained_takes_an_adapter(load, good):
    for part in ("diffuser", "checker"):
        assert f"'{part}.adapter'" in told(load, good, f"{part}.adapter=x")


@pytest.mark.parametrize("override", ["checker.dtype=fp16", "actor.device=gpu", "editor.dtype=nn"])
def test_dtype_and_device_are_known_ones(load, good, override):
    key, value = override.split("=")
    with pytest.raises(ValueError, match=f"key '{key}' is '{value}'; known: auto"):
        load(good, override)


def test_a_hub_id_passes(load, good):
    assert load(good, "actor.model=some-owner/some-model").actor.model == "some-owner/some-model"


# ---- whatever the text ----

texts = st.text("ab/. \n\r\x85\0'\"é") | st.text()
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=8
)
known = st.sampled_from(
    ["diffuser", "checker", "actor", "editor", "relations", "rounds", "evaluation", "model", "call"]
)
sections = st.dictionaries(
    known | texts, values | st.dictionaries(known, values, max_size=4), max_size=7
)


def survives(text):
    """Loads a text that may be anything: nothing but a one-line ValueError may come out."""
    path = Path("some.yaml")
    try:
        load_config(path, LoopConfig)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and "some.yaml" in str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("random"))
        yield Path("some.yaml")


@settings(max_examples=150, deadline=None)
@given(sections | values)
def test_random_values_raise_nothing_else(folder, content):
    folder.write_text(yaml.safe_dump(content), encoding="utf-8")
    survives(folder)


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text("[]{}:,-#&*!|>'\"% \n\tab1"))
def test_random_text_raises_nothing_else(folder, text):
    folder.write_text(text, encoding="utf-8")
    survives(folder)


@settings(max_examples=100, deadline=None)
@given(texts, values)
def test_random_models_and_overrides_raise_nothing_else(folder, model, value):
    content = {part: {"model": model} for part in ("diffuser", "checker", "actor", "editor")}
    folder.write_text(yaml.safe_dump(content | {"relations": [], "rounds": value}))
    survives(folder)


# ---- command lines: no model library may load before an error is told ----


@pytest.fixture(scope="module")
def poison(tmp_path_factory):
    """A folder whose torch, transformers and diffusers end the process at import, exit code 97."""
    folder = tmp_path_factory.mktemp("poison")
    for name in ("torch", "transformers", "diffusers"):
        (folder / f"{name}.py").write_text(
            f"import os\nos.write(2, b'{name} was imported\\n')\nos._exit(97)\n"
        )
    return folder


@pytest.fixture
def run(poison, tmp_path):
    """Runs a script of the project; returns the finished process."""

    def run_script(*arguments):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env={"PYTHONPATH": str(poison), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run_script


@pytest.fixture
def configured(good, tmp_path):
    """A config file that loads; its data file is yet to be written."""
    path = tmp_path / "models.yaml"
    path.write_text(good)
    return path


def refused(process, *hints):
    """Asserts that a process ended with one clear line on stderr."""
    assert process.returncode not in (0, 97), process.stderr
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert "Traceback" not in process.stderr
    for hint in hints:
        assert hint in process.stderr


def test_the_poison_works(run):
    for name in ("torch", "transformers", "diffusers"):
        assert run("-c", f"import {name}").returncode == 97


@pytest.mark.parametrize(
    ("script", "option"),
    [("loop.py", "--prompts"), ("eval.py", "--full"), ("eval.py", "key=value")],
)
def test_help_is_cheap(run, script, option):
    process = run(script, "--help")
    assert process.returncode == 0 and process.stderr == ""
    assert option in process.stdout


def test_good_arguments_do_reach_the_models(run, configured):
    """What makes the tests below meaningful: without a fault the poison is reached."""
    process = run("loop.py", "a above b", "--config", configured)
    assert process.returncode == 97, process.stderr


@pytest.mark.parametrize("script", [("loop.py", "a above b"), ("eval.py",)])
def test_a_typo_in_a_key(run, good, tmp_path, script):
    path = tmp_path / "typo.yaml"
    path.write_text(good.replace("relations", "relatons"))
    refused(run(*script, "--config", path), "typo.yaml", "'relatons'", "'relations'")


@pytest.mark.parametrize("script", [("loop.py", "a above b"), ("eval.py",)])
def test_a_missing_model_folder(run, good, tmp_path, script):
    path = tmp_path / "models.yaml"
    path.write_text(good.replace("checker: {model: ", "checker: {model: /no/such"))
    refused(run(*script, "--config", path), "models.yaml", "'checker.model'", "/no/such")


@pytest.mark.parametrize("script", [("loop.py", "a above b"), ("eval.py",)])
def test_a_missing_config(run, script):
    refused(run(*script, "--config", "no.yaml"), "no.yaml")


def test_a_bad_override_on_the_command_line(run, configured):
    refused(run("eval.py", "evaluation.limt=3", "--config", configured), "'evaluation.limit'")


@pytest.mark.parametrize("prompt", ["", " ; ", "above b", "a above"])
def test_a_prompt_that_says_nothing(run, configured, prompt):
    refused(run("loop.py", prompt, "--config", configured), "loop.py", "prompt")


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_a_prompts_file_without_prompts(run, configured, tmp_path, content):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_text(content)
    refused(run("loop.py", "--prompts", path, "--config", configured), "prompts.txt")


def test_a_prompt_of_a_file_is_named_by_its_line(run, configured, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a left of b\n\nabove b\n")
    refused(run("loop.py", "--prompts", path, "--config", configured), "prompts.txt, line 3")


def test_negative_rounds(run, configured):
    process = run("loop.py", "a left of b", "--rounds", "-1", "--config", configured)
    assert process.returncode != 0
    assert "rounds" in process.stderr


BROKEN = '[{"img_id": 1, "items": [{"item_id": 0, "label": "sun"}], "relations": [{"item1": 0}]}]'


@pytest.mark.parametrize(
    ("content", "hint"),
    [(BROKEN, "item2"), ("{", "JSON"), ("{}", "list"), ("[]", "no scene graph"), (None, "JSON")],
)
def test_broken_data(run, configured, tmp_path, content, hint):
    path = tmp_path / "data.json"
    if content is not None:
        path.write_text(content)
    refused(run("eval.py", "--config", configured), "data.json", hint)
    if content == BROKEN:
        other = tmp_path / "other.json"
        path.rename(other)
        process = run("eval.py", f"evaluation.data={other}", "--config", configured)
        refused(process, "other.json: entry 0", "relations[0].item2")
        refused(run("loop.py", "--prompts", other, "--config", configured), "entry 0", "item2")


def test_eval_needs_its_section(run, good, tmp_path):
    path = tmp_path / "bare.yaml"
    path.write_text(good[: good.index("evaluation")])
    refused(run("eval.py", "--config", path), "bare.yaml", "'evaluation'")


# ---- command lines at random ----

options = st.sampled_from(
    "--phase --config --resume --changed --prompts --rounds --seed --out --full --help -h -- 1 2 "
    "eval.yaml phase1.yaml phase2.yaml rounds=2 kl=1e-3 seed=-1 run= run=runs/x =".split()
)
words = st.text(st.characters(exclude_characters="\0"), max_size=12)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder with the project's configs and data, in which building the models is refused."""

    def refuse(_):
        raise ValueError("no models here")

    folder = tmp_path_factory.mktemp("bench")
    for name in ("eval.yaml", "phase1.yaml", "phase2.yaml"):
        shutil.copy(ROOT / name, folder)
    (folder / "tiny").symlink_to(ROOT / "tiny")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for program in ("loop", "eval", "train"):
            patch.setattr(f"{program}.build", refuse)
        yield patch
    signal.signal(signal.SIGTERM, handler)  # train.py sets its own


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["loop", "eval", "train", "report"]), st.lists(options | words, max_size=6))
def test_random_command_lines_end_in_one_line(bench, script, arguments):
    bench.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stderr(io.StringIO()):
        importlib.import_module(script).main()
    code = ended.value.code
    asked = any(a.startswith(("-h", "--h")) for a in arguments)
    assert code not in (0, None) or asked
    assert not isinstance(code, str) or len(code.splitlines()) == 1


@pytest.mark.slow
def test_fuzzing_with_ten_more_seeds():
    """Every test of random texts, figures, files and command lines, in all files."""
    chosen = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "any or random"]
    for seed in range(10):
        process = subprocess.run(
            [*chosen, f"--hypothesis-seed={seed}"], cwd=ROOT, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stdout
