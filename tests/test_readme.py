"""README.md keeps its word: commands, options, keys, paths, links and `file:function` all exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from config import load_config
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```(?:bash|text|python)\n(.*?)```", README, re.DOTALL)
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
LINES = [line for block in CODE for line in block.splitlines()] + SPANS
COMMANDS = [line for line in LINES if line.startswith("python ")]
MADE = ("runs/", "out/", "adapter/", "samples/", "laion-sg")  # by the commands themselves
FIGURE = re.compile(r"\d\.\d")


def defined(path):
    """The names of a file's functions and classes, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            inner = [child for child in getattr(node, "body", ()) if hasattr(child, "name")]
            names |= {f"{node.name}.{child.name}" for child in inner}
    return names


def test_there_is_something_to_check():
    assert len(COMMANDS) > 10 and len(SPANS) > 100
    assert "@@" not in README  # a place left to fill in


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_a_command_can_be_given(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)[1:]
    if words[0] == "-m":
        return
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word}"' in source
        elif re.fullmatch(r"[a-z_.]+=\S*", word):
            key, value = word.split("=")
            schema_keeps = load_config("phase1.yaml", TrainConfig)
            for part in key.split("."):
                assert hasattr(schema_keeps, part), word
                schema_keeps = getattr(schema_keeps, part)
        elif word.endswith(".yaml"):
            assert (ROOT / word).is_file()


@pytest.mark.parametrize(
    "span", dict.fromkeys(s for s in SPANS if re.fullmatch(r"[\w.*/-]+(\.\w+|/)", s))
)
def test_a_path_exists(span):
    if "/" not in span and not span.endswith((".py", ".yaml")):
        return  # a key of the YAML, or a file of a run
    if span.startswith(MADE) or span == "config.yaml":
        return
    assert list(ROOT.glob(span.rstrip("/"))), span


@pytest.mark.parametrize(
    "span", dict.fromkeys(s for s in SPANS if re.fullmatch(r"[\w/]+\.py:[\w.]+", s))
)
def test_a_function_stands_where_it_is_said_to(span):
    path, name = span.split(":")
    assert name in defined(ROOT / path)


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)]+)\)", README))
def test_a_link_leads_somewhere(target):
    assert target.startswith("https://") or (ROOT / target).is_file()


def test_tables_of_figures_name_the_command_that_made_them():
    for section in re.split(r"^#+ ", README, flags=re.MULTILINE):
        before, *_ = re.split(r"^\|", section, maxsplit=1, flags=re.MULTILINE)
        rows = [line for line in section.splitlines() if line.startswith("|")]
        if sum(bool(FIGURE.search(row)) for row in rows) > 2:
            assert "`python " in before or "`python " in section, section.splitlines()[0]
