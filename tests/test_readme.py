"""README.md and docs/*.md keep their word: what they name exists; figures name their command."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from config import TrainConfig, load_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Paths that commands and users make.
MADE = ("runs/", "out/", "adapter/", "samples/", "laion-sg", "dataset/", "path/", "examples/")
FIGURE = re.compile(r"\| [+−-]?\d+\.\d+")  # a cell that starts with one

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page, *languages):
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", text, re.DOTALL)


def spans(page):
    """What stands between single backticks."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return list(dict.fromkeys(re.findall(r"`([^`\n]+)`", text)))


def commands(page):
    lines = [line for block in blocks(page, "bash", "text") for line in block.splitlines()]
    return [line for line in lines + spans(page) if line.startswith("python ")]


def resolve(name):
    """The object of a dotted name: a module of this project, then attributes."""
    module, *attributes = name.split(".")
    found = importlib.import_module(module)
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


def test_an_own_reward_trains(tmp_path, monkeypatch):
    """The program in docs/training.md, on fewer states."""
    monkeypatch.chdir(ROOT)
    (program,) = [text for text in blocks(ROOT / "docs/training.md", "python") if "Dark" in text]
    small = f"'run={tmp_path}', 'groups=4', 'group_size=4', 'rounds=1', 'iterations=1'"
    exec(program.replace('"run=runs/dark"', f"{small}, 'validation_limit=1'"), {})
    metrics = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert "grad_norm" in json.loads(metrics[1])


def test_there_is_something_to_check():
    assert len(PAGES) == 5
    assert sum(len(commands(page)) for page in PAGES) > 20
    assert sum(len(spans(page)) for page in PAGES) > 100


@every_page
def test_commands_options_and_keys_exist(page):
    config = load_config(ROOT / "phase1.yaml", TrainConfig)
    config.evaluation = load_config(ROOT / "eval.yaml", type(config).__mro__[1]).evaluation
    for command in commands(page):
        script, *words = shlex.split(command, comments=True)[1:]
        if script == "-m":
            continue
        source = (ROOT / script).read_text(encoding="utf-8")
        for word in words:
            if word.startswith("--"):
                assert f'"{word}"' in source, command
            elif re.fullmatch(r"[a-z_.]+=\S*", word):
                place = config
                for key in word.partition("=")[0].split("."):
                    inside = place if isinstance(place, dict) else vars(place)
                    assert key in inside, command
                    place = inside[key]
            elif word.endswith(".yaml"):
                assert (ROOT / word).is_file(), command


@every_page
def test_keys_in_the_text_exist(page):
    """`key=value`, `key: value` and `part.key`."""
    config = load_config(ROOT / "phase1.yaml", TrainConfig)
    for span in spans(page):
        match = re.fullmatch(r"(diffuser|checker|actor|editor)\.([a-z_]+)(=.*|: .*)?", span)
        if match and not (ROOT / span).exists():
            assert hasattr(getattr(config, match[1]), match[2]), span


@every_page
def test_paths_exist(page):
    for span in spans(page):
        if not re.fullmatch(r"[\w.*/-]+(\.\w+|/)", span) or span.startswith((*MADE, "config.yaml")):
            continue
        if "/" in span or span.endswith((".py", ".yaml")):  # others are keys, or files of a run
            assert list(ROOT.glob(span.rstrip("/"))), span


@every_page
def test_functions_are_where_they_are_said_to_be(page):
    for span in spans(page):
        if match := re.fullmatch(r"([\w/]+)\.py:([\w.]+)", span):
            resolve(f"{match[1].replace('/', '.')}.{match[2]}")


@every_page
def test_python_examples_import_what_exists(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    resolve(f"{node.module}.{alias.name}")


@every_page
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith("https://"):
            continue
        linked = page.parent / path if path else page
        assert linked.is_file(), target
        headings = re.findall(r"^#+ (.*)", Path(linked).read_text("utf-8", "ignore"), re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, target


@every_page
def test_tables_of_figures_name_the_command_that_made_them(page):
    for section in re.split(r"^#+ ", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        rows = [line for line in section.splitlines() if line.startswith("|")]
        if sum(bool(FIGURE.search(row)) for row in rows) > 2:
            assert "`python " in section, section.splitlines()[0]
