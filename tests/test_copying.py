"""Files that can be copied into another project, and the direction of imports between them."""

import ast
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

# What each file may import from this project. Those without a word stand alone.
MAY_IMPORT = {
    "sgiou": "",
    "grpo": "",
    "config": "",
    "diffuser": "",
    "report": "",
    "checker": "sgiou",
    "actor": "checker grpo",
    "editor": "grpo",
    "loop": "config diffuser checker actor editor report sgiou",
    "eval": "loop config checker report sgiou",
    "train": "loop eval config grpo report sgiou",  # eval: the judge of validation images
}
NO_TORCH = ("sgiou", "config", "report", "diffuser", "checker", "loop", "eval")  # when loading
HEAVY = {"transformers", "diffusers", "peft", "accelerate"}  # nothing imports them when it loads


def imported(component):
    """The top-level names of all modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{component}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_imports_go_one_way():
    files = {path.stem for path in ROOT.glob("*.py")}
    assert set(MAY_IMPORT) == files
    seen = set()
    for component, allowed in MAY_IMPORT.items():
        assert imported(component) & files <= set(allowed.split()) <= seen, component
        seen.add(component)


def needs(component):
    """What a file imports from this project, and what that imports."""
    names = set(MAY_IMPORT[component].split())
    return names.union(*map(needs, names))


@pytest.mark.parametrize("component", MAY_IMPORT)
def test_a_file_works_in_a_folder_with_what_it_needs(component, tmp_path):
    """Imported in an isolated process, where only that folder is on the path."""
    for name in {component} | needs(component):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    program = f"import sys; sys.path.insert(0, '.'); import {component}; print(*sys.modules)"
    command = [sys.executable, "-I", "-c", program]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    loaded = set(process.stdout.split())
    assert not loaded & HEAVY
    assert component not in NO_TORCH or "torch" not in loaded
