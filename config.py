"""Configuration: a YAML file read into dataclasses, with "key=value" overrides on top.

    config = load_config("eval.yaml", LoopConfig, ["rounds=5", "actor.temperature=0.7"])

A field's comment is its documentation; its type says which values it accepts. Anything wrong is a
ValueError of one line that names file and key. No model library is imported here, so a typo is
reported at once and not after a minute of loading weights.

Paths: `~` and `$VARS` are expanded. A relative path starts at the current folder; a model, adapter
or data file that is not there is looked for in the folder of the YAML file.
"""

import difflib
import json
import math
import re
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from os.path import dirname, exists, expanduser, expandvars, isdir, isfile, join
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import yaml


class Rule(NamedTuple):
    """What a field accepts beyond its Python type."""

    wanted: str  # for the message: "make it int (at least 1)"
    accepts: Any  # function of the value
    path: str = ""  # "input": a path to read; "output": to write


def at_least(least):
    return Rule(f"at least {least:g}", lambda number: least <= number < math.inf)  # refuses NaN


def one_of(pattern):
    return Rule(pattern, re.compile(pattern).fullmatch)


def is_model(path):
    """A folder or a Hub id. A wrong path into an existing folder is not mistaken for a Hub id."""
    hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path, re.ASCII)
    return isdir(path) or (hub_id and not exists(path.split("/")[0]))


def is_run(path):
    """Not empty, and without a `~` or `$VAR` that could not be expanded."""
    return re.fullmatch(r"[^~$\s][^$]*", path)


Natural = Annotated[int, at_least(0)]
Count = Annotated[int, at_least(1)]
Phase = Annotated[int, Rule("1 or 2", lambda phase: phase in (1, 2))]
Seed = Annotated[int, Rule("from 0 to 2**31 - 1", lambda seed: 0 <= seed < 2**31)]
NonNegative = Annotated[float, at_least(0)]
Positive = Annotated[float, at_least(1e-9)]
Template = Annotated[str, Rule("with {} where the instruction goes", lambda text: "{}" in text)]
Words = Annotated[list, Rule("of str; quote on and off", lambda v: all(type(w) is str for w in v))]
Model = Annotated[str, Rule("an existing folder, or a Hub id owner/name", is_model, "input")]
Adapter = Annotated[str, Rule("an existing folder", lambda p: not p or isdir(p), "input")]
DataFile = Annotated[str, Rule("an existing file; LAION-SG: see gpu/phase1.yaml", isfile, "input")]
RunFolder = Annotated[str, Rule("a folder's name; every $VAR in it must be set", is_run, "output")]


@dataclass
class PartConfig:  # one part of the loop: which model, and how it runs
    model: Model  # folder or Hub id; parts with equal model, device and dtype share weights
    device: Annotated[str, one_of(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")] = "auto"  # auto: cuda or cpu
    dtype: Annotated[str, one_of("auto|float32|bfloat16|float16")] = "auto"  # auto: bf16 on cuda
    batch_size: Count = 64  # images or questions at a time (phase 1 samples: times group_size)


@dataclass
class ModelConfig(PartConfig):  # a VLM: the Checker, or a judge
    attention: str = ""  # attn_implementation, for example sdpa; "": the model's default


@dataclass
class ActorConfig(ModelConfig):
    max_new_tokens: Count = 256  # longest completion, in tokens
    temperature: Positive = 1.0  # of sampling
    adapter: Adapter = ""  # folder of a LoRA adapter that phase 1 trained; "": none
    checkpointing: bool = False  # phase 1 recomputes activations: less memory, a third more time


@dataclass
class PipelineConfig(PartConfig):  # the Diffuser
    call: dict = field(default_factory=dict)  # arguments of the pipeline's call: size, steps, ...


@dataclass
class EditorConfig(PipelineConfig):
    template: Template = "{}"  # text that the pipeline reads; {} stands for the instruction
    adapter: Adapter = ""  # folder of a LoRA adapter that phase 2 trained; "": none
    checkpointing: bool = False  # phase 2 recomputes activations: less memory, a third more time


@dataclass
class EvaluationConfig:
    data: DataFile  # prompts, in any format that sgiou.load_graphs reads
    limit: Count = 300  # the first prompts of the file; --full takes all
    seed: Seed = 0  # of the first prompt's image; the next prompts take the next seeds
    exact: bool = False  # also measure by the pixel parser: embedded world only
    judge: ModelConfig | None = None  # VLM that extracts scene graphs and judges; null: the Checker


@dataclass
class LoopConfig:  # what every entry point needs (eval.yaml)
    diffuser: PipelineConfig  # prompt -> image; frozen
    checker: ModelConfig  # image -> verdicts and score; frozen
    actor: ActorConfig  # image, prompt, verdicts -> instruction; trained in phase 1
    editor: EditorConfig  # image, instruction -> image; trained in phase 2
    relations: Words  # the relation words of typed prompts and of scene-graph extraction
    rounds: Natural = 3  # most edits of a trajectory; 0: generate only
    offload: bool = False  # models take turns on the GPU; the others wait in main memory
    evaluation: EvaluationConfig | None = None  # used by eval.py only


@dataclass
class TrainConfig(LoopConfig):  # what train.py needs (phase1.yaml, phase2.yaml)
    phase: Phase | None = None  # which phase this file is for; null: either
    rounds: Count = 3  # rollouts of a trajectory, each from the best image so far
    data: DataFile = "tiny/data/train.json"  # training prompts; no label is used
    data_limit: Natural = 0  # the first prompts of the file; 0: all
    validation: DataFile = "tiny/data/val.json"  # validation prompts
    validation_limit: Count = 60  # the first prompts of the file
    validate_every: Count = 10  # iterations
    exact: bool = False  # also log the exact SG-IoU of validation: embedded world only
    run: RunFolder = "runs/phase1"  # folder for adapter, checkpoint and metrics
    seed: Seed = 0  # of all randomness of the run
    iterations: Natural = 50  # each of `rounds` rollouts and `updates` optimizer steps
    groups: Count = 8  # states of round 1 in an iteration; later rounds add to them
    group_size: Annotated[int, at_least(2)] = 8  # G, samples of one state
    rank: Count = 16  # of the LoRA adapter
    learning_rate: Positive = 1e-3  # of AdamW
    warmup: Natural = 5  # iterations of linear warm-up
    max_grad_norm: Positive = 1.0  # larger gradients are scaled down to this norm
    clip_low: NonNegative = 0.2  # the ratio rho is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: NonNegative = 0.28  # see clip_low
    kl: NonNegative = 0.01  # weight of the KL to the model without adapter; 0 skips that pass
    advantage_eps: Positive = 0.05  # added to the std so that Checker noise is not amplified
    flat_range: NonNegative = 0.02  # groups whose rewards span no more than this are left out
    updates: Count = 2  # optimizer steps on a rollout; at 1 the clip never acts
    micro_batch: Count = 64  # samples of a backward pass; phase 2 takes whole groups
    malformed: NonNegative = 0.2  # what a malformed completion costs, in reward (phase 1)
    noise_level: Positive = 0.8  # a of the SDE (phase 2)
    window: Count = 3  # SDE steps of an edit (phase 2)
    window_start: Natural = 2  # the window starts at a random step, at most this one (phase 2)
    tolerance: NonNegative = 1e-4  # |replayed - recorded log-prob|: phase 1 mean, phase 2 max


# Arguments of a pipeline's call. `loop.build` compares the others with the pipeline's signature.
CALL = {"num_inference_steps": Count, "max_sequence_length": Count, "max_area": Count}
CALL |= dict.fromkeys(("height", "width"), Annotated[int, at_least(8)])
SET_BY_US = "prompt image generator output_type return_dict num_images_per_prompt".split()


def load_config(path, schema, overrides=()):
    """Reads a YAML file into the dataclass `schema`; `overrides` are "key.key=value" strings."""
    try:
        values = read_yaml(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("holds no keys; write 'key: value' lines")
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise ValueError(f"override {override!r}: write it as key=value")
            *sections, last = key.split(".")
            place = values
            for name in sections:
                inner = place.get(name)  # copied below, because YAML aliases may share it
                place[name] = dict(inner) if isinstance(inner, dict) else {}
                place = place[name]
            place[last] = read_yaml(text, f"override {override!r}: ")
        return fill(schema, values, "", dirname(path))
    except (OSError, ValueError) as error:
        raise ValueError(" ".join(f"{path}: {error}".split())) from None  # one line


class Loader(yaml.SafeLoader):
    """Refuses equal keys, of which PyYAML keeps the last, and reads 1e-6 as a number, not text."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} appears twice")
        return node


EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def read_yaml(text, where=""):
    try:
        return yaml.load(text, Loader)
    except Exception as error:  # PyYAML also lets TypeError, RecursionError and others through
        raise ValueError(f"{where}not valid YAML ({error}); correct or quote it") from None


def fill(schema, values, prefix, folder):
    """Dictionary -> dataclass. `prefix`: of its keys in messages; `folder`: the YAML file's."""
    if not isinstance(values, dict):
        raise ValueError(f"key '{prefix[:-1]}' is {values!r:.200}; make it 'key: value' lines")
    kinds = get_type_hints(schema, include_extras=True)
    for key in values:
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, 1)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(kinds)}"
            raise ValueError(f"key '{prefix}{key}' is unknown; {hint}")
    for entry in fields(schema):
        optional = entry.default is not MISSING or entry.default_factory is not MISSING
        if entry.name not in values and not optional:
            raise ValueError(f"key '{prefix}{entry.name}' is missing; add it")
    config = schema(**values)
    for name, kind in kinds.items():
        setattr(config, name, check(kind, getattr(config, name), prefix + name, folder))
    return config


def check(kind, value, key, folder):
    """The value of one field, converted; ValueError if the field does not accept it."""
    if type(None) in get_args(kind):  # kind | None
        if value is None:
            return None
        kind = get_args(kind)[0]
    if is_dataclass(kind):
        return fill(kind, value, f"{key}.", folder)
    kind, rule = get_args(kind) or (kind, Rule("", lambda value: True))  # a plain bool, str, dict
    if kind is str and value is None:  # "key:" or, on the command line, "key="
        value = ""
    if kind is float and type(value) is int and abs(value) < 1e300:
        value = float(value)
    if rule.path and type(value) is str:
        value = expanduser(expandvars(value))
        beside = join(folder, value)  # `value` itself if it is absolute
        if rule.path == "input" and value and not exists(value) and exists(beside):
            value = beside
    if type(value) is not kind or not rule.accepts(value):  # isinstance takes True for an int
        wanted = f"{kind.__name__} ({rule.wanted})" if rule.wanted else kind.__name__
        raise ValueError(f"key '{key}' is {value!r:.200}; make it {wanted}")
    return check_call(value, key) if kind is dict else value


def check_call(call, key):
    """The arguments of a pipeline's call, as far as they can be checked without diffusers."""
    for name in call:
        if type(name) is not str or name in SET_BY_US:
            raise ValueError(f"key '{key}' holds {name!r}, which cannot be set; remove it")
    try:
        json.dumps(call, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:  # a date, NaN, an alias of itself
        raise ValueError(f"key '{key}' has a value that cannot be passed on: {error}") from None
    return call | {n: check(CALL[n], call[n], f"{key}.{n}", "") for n in CALL if n in call}
