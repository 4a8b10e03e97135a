"""One component, one file: each works in an empty folder with only what it may import."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "sgiou": [],
    "grpo": [],
    "config": [],
    "charts": [],
    "story": [],
    "table": ["charts"],
    "report": ["charts", "story", "table"],
    "diffuser": [],
    "checker": ["sgiou"],
    "actor": ["grpo", "sgiou"],
    "rollout": ["grpo"],
    "editor": ["diffuser", "grpo", "rollout"],
    "memory": [],
    "loop": [
        "actor",
        "charts",
        "checker",
        "checkpoint",
        "config",
        "diffuser",
        "editor",
        "grpo",
        "memory",
        "report",
        "rollout",
        "sgiou",
        "story",
        "table",
    ],
}
HEAVY = {"transformers", "diffusers", "peft", "accelerate"}

# Isolated: no environment variable and no working directory puts the project on the path.
PROGRAM = """
import importlib, importlib.util, sys
folder, component, *named = sys.argv[1:]
sys.path.insert(0, folder)
module = importlib.import_module(component)
assert module.__file__.startswith(folder), module.__file__
print("loaded", *sys.modules)
print("missing", *(name for name in named if importlib.util.find_spec(name) is None))
"""


def imported(path):
    """The top-level names of all modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names.add(node.module.split(".")[0])
    return names


def run_alone(folder, component, named):
    """Imports a component in a folder: (modules loaded, modules named but not to be found)."""
    process = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, str(folder), component, *sorted(named)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    loaded, missing = (line.split()[1:] for line in process.stdout.splitlines())
    return set(loaded), missing


@pytest.mark.parametrize("component", MAY_IMPORT)
def test_a_component_works_alone(component, tmp_path):
    for name in [component, *MAY_IMPORT[component]]:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    loaded, missing = run_alone(tmp_path, component, imported(ROOT / f"{component}.py"))
    assert not missing
    assert not loaded & HEAVY


@pytest.mark.parametrize("component", ["charts", "config", "report", "sgiou", "story", "table"])
def test_what_needs_no_model_loads_no_torch(component):
    loaded, _ = run_alone(ROOT, component, [])
    assert not loaded & (HEAVY | {"torch"})


PROMPT = "red circle left of blue square"
DEMOS = {  # in this order: the picture that one makes is what the next ones take
    "sgiou": [],
    "grpo": [],
    "diffuser": [PROMPT, "picture.png"],
    "checker": ["picture.png", PROMPT],
    "actor": ["picture.png", PROMPT],
    "editor": ["picture.png", "move the red circle left of the blue square", "edited.png"],
}


def test_a_component_runs_its_demo_alone(tmp_path):
    picture = None
    for component, arguments in DEMOS.items():
        folder = tmp_path / component
        folder.mkdir()
        (folder / "tiny").symlink_to(ROOT / "tiny")  # the weights
        for name in [component, *MAY_IMPORT[component]]:
            shutil.copy(ROOT / f"{name}.py", folder)
        if picture:
            shutil.copy(picture, folder)
        process = subprocess.run(
            [sys.executable, f"{component}.py", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": ""},
        )
        assert process.returncode == 0, process.stderr
        if component == "diffuser":
            picture = folder / "picture.png"
        assert process.stdout or any(folder.glob("*.png")), component


def test_a_missing_file_is_noticed(tmp_path):
    """What makes the test above meaningful: without its neighbour a component does not import."""
    shutil.copy(ROOT / "checker.py", tmp_path)
    with pytest.raises(AssertionError, match="No module named 'sgiou'"):
        run_alone(tmp_path, "checker", [])
    shutil.copy(ROOT / "sgiou.py", tmp_path)
    _, missing = run_alone(tmp_path, "checker", ["re", "actor"])
    assert missing == ["actor"]
