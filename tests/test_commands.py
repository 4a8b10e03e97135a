"""Command lines: what is wrong is one line on stderr, before any model library is imported."""

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

HEAVY = ("torch", "transformers", "diffusers", "peft")
GOOD = """
diffuser: {model: model}
checker: {model: model}
actor: {model: model}
editor: {model: model}
relations: [left of, above]
"""


@pytest.fixture(scope="module")
def poison(tmp_path_factory):
    """A folder whose torch, transformers, ... end the process at import, with exit code 97."""
    folder = tmp_path_factory.mktemp("poison")
    for name in HEAVY:
        (folder / f"{name}.py").write_text("import os\nos._exit(97)\n")
    return folder


@pytest.fixture
def run(poison, tmp_path):
    """Runs a script in a folder with a model folder and config.yaml; returns the process."""
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text(GOOD)

    def run_script(script, *arguments):
        path = ROOT / script if script.endswith(".py") else script
        return subprocess.run(
            [sys.executable, path, *map(str, arguments)],
            cwd=tmp_path,
            env={"PYTHONPATH": str(poison), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run_script


def refused(process, *hints):
    """Asserts that a process ended with one line on stderr, and nothing heavy was imported."""
    assert process.returncode not in (0, 97), process.stderr
    assert len(process.stderr.splitlines()) == 1, process.stderr
    for hint in hints:
        assert hint in process.stderr


def test_without_a_mistake_the_model_libraries_are_reached(run):
    """What makes the tests below meaningful."""
    for name in HEAVY:
        assert run("-c", f"import {name}").returncode == 97
    process = run("loop.py", "a above b", "--config", "config.yaml")
    assert process.returncode == 97, process.stderr


def test_help_is_cheap(run):
    process = run("loop.py", "--help")
    assert process.returncode == 0 and process.stderr == ""
    assert "--prompts" in process.stdout


def test_the_shipped_config_is_found_from_another_folder(run):
    assert run("loop.py", "red circle").returncode == 97  # the model libraries are reached


def test_folders_for_results(run, tmp_path):
    words = "loop.py", "a above b", "--config", "config.yaml"
    refused(run(*words, "--out", ""), "--out", "a folder")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.safetensors").touch()
    refused(run(*words, "--out", "run"), "run holds another run")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").touch()
    refused(run(*words, "--out", "evaluation"), "evaluation holds another run")
    refused(run(*words, "--out", "config.yaml"), "--out", "make it a folder")
    refused(run(*words, "--out", "config.yaml/results"), "--out", "name another folder")


@pytest.mark.parametrize("script", [("loop.py", "a above b"), ("eval.py",)])
def test_mistakes_in_the_config(run, script, tmp_path):
    path = tmp_path / "wrong.yaml"
    refused(run(*script, "--config", path), "wrong.yaml")
    path.write_text(GOOD.replace("relations", "relatons"))
    refused(run(*script, "--config", path), "wrong.yaml", "'relatons'", "'relations'")
    refused(run(*script, "--config", "config.yaml", "ronds=1"), "'ronds'", "'rounds'")


@pytest.mark.parametrize("script", ["loop.py sun", "eval.py"])
def test_what_is_no_option_is_named(run, script):
    process = run(*script.split(), "--rounds", "1", "actor.adapter=")
    assert process.returncode and "--rounds is no option" in process.stderr


@pytest.mark.parametrize("prompt", ["", "above b"])
def test_prompts_that_say_nothing(run, prompt):
    refused(run("loop.py", prompt, "--config", "config.yaml"), "loop.py", "prompt")


@pytest.mark.parametrize("command", ["loop.py --prompts=", "eval.py evaluation.data="])
def test_broken_files_of_prompts(run, tmp_path, command):
    script, argument = command.split()
    for name in ("prompts.txt", "data.json"):
        words = (script, "--config", "config.yaml", f"{argument}{name}")
        refused(run(*words), name)  # it does not exist
        (tmp_path / name).write_text("{")
        refused(run(*words), f"{name}: no scene graph")


# ---- anything at all ----

options = st.sampled_from(
    "--phase --config --resume --prompts --seed --out --full --help -h -- 1 2 eval.yaml "
    "phase1.yaml phase2.yaml rounds=2 kl=1e-3 seed=-1 run= run=runs/x a=b=c =".split()
)
words = st.text(st.characters(exclude_characters="\0"), max_size=12)


@pytest.fixture(scope="module")
def without_models(tmp_path_factory):
    """A folder with the project's configs and data, in which no model can be built."""

    def refuse(_):
        raise ValueError("no models here")

    folder = tmp_path_factory.mktemp("commands")
    for name in ("eval.yaml", "phase1.yaml", "phase2.yaml", "tiny"):
        (folder / name).symlink_to(ROOT / name)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for program in ("loop", "eval", "train"):
            patch.setattr(f"{program}.build", refuse)
        yield patch
    for number, handler in handlers.items():
        signal.signal(number, handler)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["loop", "eval", "train", "report"]), st.lists(options | words, max_size=6))
def test_random_command_lines_end_in_one_line(without_models, script, arguments):
    without_models.setattr(sys, "argv", [f"{script}.py", *arguments])
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(printed):
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(script).main()
    code = ended.value.code
    asked = any(argument.startswith(("-h", "--h")) for argument in arguments)
    assert code not in (0, None) or asked
    assert not isinstance(code, str) or len(code.splitlines()) == 1


@pytest.mark.parametrize("module", ["train", "loop", "eval"])
def test_idle_threads_do_not_spin_for_long(module):
    """Set before torch is imported; see docs/training.md."""
    program = f"import {module}, os; print(os.environ['GOMP_SPINCOUNT'])"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", program]
    assert subprocess.check_output(command, cwd=ROOT, env=environment, text=True) == "1000\n"
