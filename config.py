"""Configuration: YAML over dataclasses, `key=value` over YAML, one clear line for what is wrong.

Every field's comment is its documentation. Nothing here imports a model library, so a typo in a
key is told at once.
"""

import dataclasses
import datetime
import difflib
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml


@dataclass
class ModelConfig:
    """One part of the loop: which model, and how it is run."""

    model: str  # local folder or Hub id; parts alike in model, device and dtype share weights
    device: str = "auto"  # auto: cuda if there is one, else cpu
    dtype: str = "auto"  # auto: bfloat16 on cuda, float32 on cpu
    batch_size: int = 64  # questions or images at a time; phase 1 samples group_size times as many


@dataclass
class PipelineConfig(ModelConfig):
    """The Diffuser or the Editor."""

    call: dict = field(default_factory=dict)  # keyword arguments of the pipeline's call


@dataclass
class ActorConfig(ModelConfig):
    """The Actor."""

    max_new_tokens: int = 256  # longest completion
    temperature: float = 1.0  # of sampling, above 0
    adapter: str = ""  # folder of a LoRA adapter that phase 1 trained
    checkpointing: bool = False  # phase 1 recomputes activations: less memory, a third more time


@dataclass
class EditorConfig(PipelineConfig):
    """The Editor."""

    template: str = "{}"  # what the pipeline reads; {} stands for the instruction
    adapter: str = ""  # folder of a LoRA adapter that phase 2 trained
    checkpointing: bool = False  # phase 2 recomputes activations: less memory, a third more time


@dataclass
class EvaluationConfig:
    """What `eval.py` does."""

    data: str  # LAION-SG JSON
    limit: int = 300  # graphs, the first ones of the file; --full takes all
    seed: int = 0  # of the first prompt's picture; the others' follow
    exact: bool = False  # measure by the pixel parser too: for pictures of the embedded world


@dataclass
class LoopConfig:
    """What every entry point needs; training adds to it."""

    diffuser: PipelineConfig
    checker: ModelConfig
    actor: ActorConfig
    editor: EditorConfig
    relations: list[str]  # relation words that prompts and scene-graph extraction may use
    rounds: int = 3  # most edits of a trajectory
    offload: bool = False  # models take turns on the GPU, each waits in main memory meanwhile
    evaluation: EvaluationConfig | None = None  # read by eval.py alone


LEAST = {  # of numbers that would otherwise fail late, or silently
    **dict.fromkeys(("batch_size", "max_new_tokens", "limit", "groups", "rank", "updates"), 1),
    **dict.fromkeys(("micro_batch", "window", "validate_every", "validation_limit"), 1),
    **dict.fromkeys(
        ("rounds", "seed", "iterations", "data_limit", "warmup", "window_start", "kl"), 0
    ),
    **dict.fromkeys(("clip_low", "clip_high", "flat_range", "malformed", "tolerance"), 0),
    "group_size": 2,
    **dict.fromkeys(("temperature", "learning_rate", "max_grad_norm", "noise_level"), 1e-9),
    "advantage_eps": 1e-9,
}
OURS = ("prompt", "image", "generator", "output_type", "return_dict")  # of a pipeline's call
ONE_OF = {
    "device": r"auto|cpu|mps|(cuda|xpu)(:\d+)?",
    "dtype": "auto|float32|bfloat16|float16",
}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def load_config(path, schema, overrides=()):
    """Reads a YAML file into the dataclass `schema`; `overrides` are "key.key=value" strings.

    Raises ValueError, one line that names file and key, on anything unknown, missing or mistyped.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); check the path") from None
    values = _read_yaml(text, f"{path}: ")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: the file holds no keys; write 'key: value' lines")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r}: write it as key=value")
        place = values
        *parents, last = key.split(".")
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ValueError(f"override {override!r}: {path} has no section {'.'.join(parents)!r}")
        place[last] = _read_yaml(text, f"override {override!r}: ")
    config = _fill(schema, values, path, "")
    for name in ("diffuser", "checker", "actor", "editor"):
        _check_model(getattr(config, name).model, f"{path}: key '{name}.model'")
    for name in ("diffuser", "editor"):
        for key, value in getattr(config, name).call.items():
            if key in OURS or type(key) is not str or isinstance(value, datetime.date):
                problem = f"{key!r}: {value!r} cannot be given; drop it"
                raise ValueError(f"{path}: key '{name}.call': {problem}")
    if "{}" not in config.editor.template:
        raise ValueError(f"{path}: key 'editor.template' lacks the {{}} of the instruction; add it")
    for name in ("actor", "editor"):
        adapter = getattr(config, name).adapter
        if adapter and not os.path.isdir(adapter):
            raise ValueError(f"{path}: key '{name}.adapter': there is no folder {adapter!r}")
    return config


class _Loader(yaml.SafeLoader):
    """PyYAML takes the last of equal keys, silently."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"key {twice[0]!r} stands twice")
        return super().construct_mapping(node, deep)


def _read_yaml(text, where):
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # of any kind: PyYAML's constructors let everything through
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where}this is no YAML ({reason}); correct or quote it") from None


def _fill(schema, values, path, prefix):
    if not isinstance(values, dict):
        raise ValueError(f"{path}: key '{prefix[:-1]}' holds no keys; write 'key: value' lines")
    hints = typing.get_type_hints(schema)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(hints)}"
            shown = " ".join(f"{prefix}{key}".split())
            raise ValueError(f"{path}: key '{shown}' is unknown; {hint}")
    filled = {}
    for entry in dataclasses.fields(schema):
        key = f"{prefix}{entry.name}"
        if entry.name in values:
            filled[entry.name] = _convert(hints[entry.name], values[entry.name], path, key)
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path}: key '{key}' is missing; add it")
    return schema(**filled)


def _convert(kind, value, path, key):
    if isinstance(kind, types.UnionType):  # "EvaluationConfig | None"
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    if dataclasses.is_dataclass(kind):
        return _fill(kind, value, path, f"{key}.")
    plain = typing.get_origin(kind) or kind
    if plain is str and value is None:  # "key=" on the command line
        value = ""
    # YAML 1.1 reads 1e-6 as a string and 1 as an integer; both are meant as numbers.
    if plain is float and type(value) in (str, int):
        try:
            value = float(value)
        except (ValueError, OverflowError):
            pass
    inner = typing.get_args(kind)
    if type(value) is not plain or (plain is list and any(type(v) is not inner[0] for v in value)):
        wanted = f"a list of {inner[0].__name__}" if plain is list else plain.__name__
        if plain is list and inner[0] is str:
            wanted += " (YAML takes on, off, yes and no for true or false: quote them)"
        raise ValueError(f"{path}: key '{key}' is {value!r}; make it {wanted}")
    name = key.split(".")[-1]
    if name in ONE_OF and not re.fullmatch(ONE_OF[name], value):
        raise ValueError(f"{path}: key '{key}' is {value!r}; known: {ONE_OF[name]}")
    least = LEAST.get(name)
    if least is not None and not least <= value < float("inf"):
        raise ValueError(f"{path}: key '{key}' is {value!r}; make it at least {least:g}")
    return value


def _check_model(model, where):
    """A Hub id has one slash; what looks like a folder must be one."""
    hub_id = HUB_ID.fullmatch(model) and not os.path.exists(model.split("/")[0])
    if not os.path.isdir(model) and not hub_id:
        raise ValueError(f"{where}: there is no folder {model!r}; give a model folder or a Hub id")
