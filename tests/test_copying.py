"""Files that can be copied into another project, and the direction of imports between them."""

import ast
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = {path.stem for path in ROOT.glob("*.py")}
# What each file may import from this project. Those without a word stand alone.
MAY_IMPORT = {
    "sgiou": "",
    "grpo": "",
    "config": "",
    "diffuser": "",
    "report": "sgiou",
    "checker": "sgiou",
    "actor": "checker grpo",
    "editor": "grpo",
    "loop": "config diffuser checker actor editor report sgiou",
    "train": "loop config grpo report sgiou",
    "eval": "loop config checker report sgiou",
}
NO_TORCH = ("sgiou", "config", "report", "diffuser", "checker", "loop", "eval")  # when loading
HEAVY = {"transformers", "diffusers", "peft", "accelerate"}  # nothing imports them when it loads

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


def imported(component):
    """The top-level names of all modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{component}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{component}.py has a relative import"
            names.add(node.module.split(".")[0])
    return names


def run_alone(folder, component):
    """Imports a component in a folder: (modules loaded, modules named but not to be found)."""
    process = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, str(folder), component, *sorted(imported(component))],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    loaded, missing = (line.split()[1:] for line in process.stdout.splitlines())
    return set(loaded), missing


def test_imports_go_one_way():
    assert set(MAY_IMPORT) == FILES
    seen = set()
    for component, allowed in MAY_IMPORT.items():
        assert imported(component) & FILES <= set(allowed.split()) <= seen, component
        seen.add(component)


def needs(component):
    """What a file imports from this project, and what that imports."""
    names = set(MAY_IMPORT[component].split())
    return names.union(*map(needs, names))


@pytest.mark.parametrize("component", MAY_IMPORT)
def test_a_file_works_in_a_folder_with_what_it_needs(component, tmp_path):
    for name in {component} | needs(component):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    loaded, missing = run_alone(tmp_path, component)
    assert set(missing) <= {"tiny"}  # the exact metric of the embedded world is optional
    assert not loaded & HEAVY
    assert component not in NO_TORCH or "torch" not in loaded


def test_a_missing_file_is_noticed(tmp_path):
    """What makes the test above meaningful."""
    shutil.copy(ROOT / "editor.py", tmp_path)
    with pytest.raises(AssertionError, match="No module named 'grpo'"):
        run_alone(tmp_path, "editor")
