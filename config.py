"""Configuration: a YAML file read into dataclasses, with "key=value" overrides on top.

    config = load_config("eval.yaml", LoopConfig, ["rounds=5", "actor.temperature=0.7"])

A field's comment is its documentation; its type says which values it accepts. Anything wrong is a
ValueError of one line that names file and key. Importing this module loads no model library.

Paths: `~` and `$VARS` are expanded. A relative path starts at the current folder; a model, adapter
or data file that is not there is looked for in the folder of the YAML file.
"""

import difflib
import hashlib
import json
import math
import re
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from os.path import dirname, exists, expanduser, expandvars, isdir, isfile, join
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import yaml


def is_model(path):
    """A folder or a Hub id; not a wrong path into an existing folder, which looks like one."""
    hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path, re.ASCII)
    return isdir(path) or (hub_id and not exists(path.split("/")[0]))


# Annotated[Python type, what is wanted (for the error message), check of the value]
Natural = Annotated[int, "0 or more", lambda n: n >= 0]
Count = Annotated[int, "1 or more", lambda n: n >= 1]
GroupSize = Annotated[int, "2 or more", lambda n: n >= 2]
Phase = Annotated[int, "1 or 2", lambda n: n in (1, 2)]
Seed = Annotated[int, "from 0 to 2**31 - 1", lambda n: 0 <= n < 2**31]
NonNegative = Annotated[float, "0 or more", lambda x: 0 <= x < math.inf]  # refuses NaN, too
Positive = Annotated[float, "above 0", lambda x: 0 < x < math.inf]
DEVICE, DTYPE = r"auto|cpu|mps|(cuda|xpu)(:\d+)?", "auto|float32|bfloat16|float16"
Device = Annotated[str, DEVICE, re.compile(DEVICE).fullmatch]
Dtype = Annotated[str, DTYPE, re.compile(DTYPE).fullmatch]
Template = Annotated[str, "with {} where the instruction goes", lambda text: "{}" in text]
Temperature = Annotated[float, "from 1e-6 to 100", lambda x: 1e-6 <= x <= 100]
Rate = Annotated[float, "above 0 and below 1", lambda x: 0 < x < 1]
Share = Annotated[float, "0 or more and below 1", lambda x: 0 <= x < 1]
Words = Annotated[
    list,
    "of words; quote on, off, yes",
    lambda words: all(type(word) is str and word.strip(" ;,") for word in words),
]
Model = Annotated[str, "an existing folder, or a Hub id owner/name", is_model]
Adapter = Annotated[str, "an existing folder", lambda path: not path or isdir(path)]
DataFile = Annotated[str, "an existing file; LAION-SG: see gpu/phase1.yaml", isfile]
RunFolder = Annotated[str, "a folder; set all $VARS", re.compile(r"[^~$\s][^$]*").fullmatch]


@dataclass
class PartConfig:  # one part of the loop: which model, and how it runs
    model: Model  # parts with equal model, device, dtype and attention share weights
    device: Device = "auto"  # cuda if there is a GPU, else cpu
    dtype: Dtype = "auto"  # bfloat16 on cuda, else float32
    batch_size: Count = 64  # images or questions per call (the Actor: group_size texts for each)


@dataclass
class ModelConfig(PartConfig):  # a VLM: the Checker, or a judge
    attention: str = ""  # attn_implementation, such as sdpa; "": the model's default


@dataclass
class ActorConfig(ModelConfig):
    max_new_tokens: Count = 256  # longest completion
    temperature: Temperature = 1.0
    adapter: Adapter = ""  # folder of a LoRA adapter, trained in phase 1
    checkpointing: bool = False  # phase 1 takes less memory and a third more time


@dataclass
class PipelineConfig(PartConfig):  # the Diffuser
    call: dict = field(default_factory=dict)  # arguments of the pipeline's call: size, steps, ...


@dataclass
class EditorConfig(PipelineConfig):
    template: Template = "{}"  # text that the pipeline reads; {} stands for the instruction
    adapter: Adapter = ""  # folder of a LoRA adapter, trained in phase 2
    checkpointing: bool = False  # phase 2 takes less memory and a third more time


@dataclass
class EvaluationConfig:
    data: DataFile  # prompts, in any format that sgiou.load_graphs reads
    limit: Count = 300  # the first prompts of the file; --full takes all
    seed: Seed = 0  # of the first prompt's image; the next prompts take the next seeds
    exact: bool = False  # also by the pixel parser: embedded world only
    untrained_temperature: Temperature | None = None  # of the Actor without adapter; null: its own
    judge: ModelConfig | None = None  # VLM that extracts scene graphs and judges; null: the Checker


@dataclass
class LoopConfig:  # what every entry point needs (eval.yaml)
    diffuser: PipelineConfig  # prompt -> image; frozen
    checker: ModelConfig  # image -> verdicts and score; frozen
    actor: ActorConfig  # image, prompt, verdicts -> instruction; trained in phase 1
    editor: EditorConfig  # image, instruction -> image; trained in phase 2
    relations: Words  # the relation words of typed prompts and of scene-graph extraction
    rounds: Natural = 3  # a trajectory has at most so many edits; 0: generate only
    offload: bool = False  # the models of a pipeline take turns on the GPU; VLMs stay there
    evaluation: EvaluationConfig | None = None  # used by eval.py only


@dataclass
class TrainConfig(LoopConfig):  # what train.py needs (phase1.yaml, phase2.yaml)
    phase: Phase | None = None  # which phase this file is for; null: either
    rounds: Count = 3  # of samples; a later round goes on from one sample of each group
    data: DataFile = field(kw_only=True)  # training prompts; no label is used
    data_limit: Natural = 0  # the first prompts of the file; 0: all
    validation: DataFile = field(kw_only=True)
    validation_limit: Count = 60
    validate_every: Count = 10  # iterations
    exact: bool = False  # also validate by the pixel parser: embedded world only
    run: RunFolder = field(kw_only=True)  # folder for adapter, checkpoint and metrics
    seed: Seed = 0  # of all randomness of the run
    iterations: Count = 50  # each of `rounds` rounds and `updates` optimizer steps
    groups: Count = 8  # states of round 1 in an iteration; later rounds continue them
    group_size: GroupSize = 8  # G, samples of one state
    rank: Count = 16  # of the LoRA adapter
    learning_rate: Rate = 1e-3  # of AdamW
    warmup: Natural = 5  # iterations of linear warm-up
    max_grad_norm: Positive = 1.0
    clip_low: NonNegative = 0.2  # rho is clipped to [1 - clip_low, 1 + clip_high]. Phase 2: set
    # both to about 0.026 / sqrt(latent dimensions), see `sde_step` in grpo.py
    clip_high: NonNegative = 0.28
    kl: NonNegative = 0.01  # weight of the KL to the model without adapter; 0 skips that pass
    advantage_eps: Positive = 0.05  # added to the std so that Checker noise is not amplified
    flat_range: Share = 0.02  # groups whose rewards span no more than this are left out
    refill: bool = False  # later rounds drop the states of flat groups and fill up with new images
    updates: Count = 2  # optimizer steps on the samples of an iteration; at 1 the clip never acts
    micro_batch: Count = 64  # samples of a backward pass; phase 2 takes whole groups
    malformed_penalty: NonNegative = 0.2  # what a malformed completion costs, in reward (phase 1)
    noise_level: Positive = 0.8  # a of the SDE (phase 2)
    window: Count = 3  # SDE steps of an edit (phase 2)
    latest_window_start: Natural = 2  # the window's first step is drawn from 0 to this (phase 2)
    tolerance: NonNegative = 1e-4  # mean |log-prob replayed - recorded| of an iteration


# Arguments of a pipeline's call. Sigmas would move the steps that the phase 2 window counts.
REFUSED = "prompt prompt_2 prompt_3 image generator output_type return_dict sigmas".split()
REFUSED += ["num_images_per_prompt"]
# Whole numbers of 1 or more, where they are given.
COUNTS = "num_inference_steps max_sequence_length max_area height width".split()


def load_config(path, schema, overrides=()):
    """Reads a YAML file into the dataclass `schema`, with "key.key=value" overrides on top.

    A file that is not there is looked for beside this one, where the shipped ones are.
    """
    beside = join(dirname(__file__), path)
    path = beside if exists(beside) and not exists(path) else path
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
                if not isinstance(place.get(name), dict):
                    place[name] = {}
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
        # By way of JSON: sections that share an alias become copies, a date becomes text.
        return json.loads(json.dumps(yaml.load(text, Loader), default=str))
    except Exception as error:  # of any type, RecursionError included
        raise ValueError(f"{where}not valid YAML ({error}); correct or quote it") from None


def fill(schema, values, prefix, folder):
    """Dictionary -> dataclass. `prefix`: of its keys in messages; `folder`: the YAML file's."""
    if not isinstance(values, dict):
        raise ValueError(f"key '{prefix[:-1]}' is {values!r:.200}; make it 'key: value' lines")
    kinds = get_type_hints(schema, include_extras=True)
    for key in [key for key in values if key not in kinds]:
        near = difflib.get_close_matches(str(key), kinds, 1)
        hint = f"; did you mean '{prefix}{near[0]}'?" if near else ""
        raise ValueError(f"key '{prefix}{key}' is unknown{hint}")
    for entry in fields(schema):
        if entry.name not in values and entry.default is entry.default_factory is MISSING:
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
    python_type, wanted, accepts = get_args(kind) or (kind, "", lambda value: True)
    if python_type is str and value is None:  # "key:" or, on the command line, "key="
        value = ""
    if python_type is float and type(value) is int and abs(value) < 1e300:
        value = float(value)
    if kind in (Model, Adapter, DataFile, RunFolder) and type(value) is str:
        value = expanduser(expandvars(value))
        beside = join(folder, value)  # `value` itself if it is absolute
        if kind is not RunFolder and value and not exists(value) and exists(beside):
            value = beside
    if type(value) is not python_type or not accepts(value):  # isinstance takes True for an int
        wanted = f"{python_type.__name__} ({wanted})" if wanted else python_type.__name__
        raise ValueError(f"key '{key}' is {value!r:.200}; make it {wanted}")
    for name in value if kind is dict else ():  # the arguments of a pipeline's call
        if name in REFUSED:
            raise ValueError(f"key '{key}' holds {name!r}, which cannot be set; remove it")
        if name in COUNTS:
            check(Count, value[name], f"{key}.{name}", folder)
    return value


def fingerprint(config, leave_out=()):
    """What a resumed run must share: {dotted key: value}, without the keys to leave out.

    For a model, adapter or data file on this disk the value is a hash of its content, not its path.
    """
    values = flatten(asdict(config))
    for key, value in values.items():
        is_path = key.split(".")[-1] in ("model", "adapter", "data", "validation")
        if is_path and value and exists(value):
            values[key] = f"content {sample_hash(value)}"
    values = {key: value for key, value in values.items() if key not in leave_out}
    return json.loads(json.dumps(values))


def flatten(values, prefix=""):
    """{"actor": {"temperature": 1.0}} -> {"actor.temperature": 1.0}"""
    flat = {}
    for key, value in values.items():
        inner = flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat |= inner or {prefix + key: value}
    return flat


def sample_hash(path):
    """A hash of a file, or of the config, tokenizer and weight files of a model's folder.

    Files up to 64 MiB are read; of larger ones the size and 64 evenly spread samples of 1 MiB.
    """
    path, block, digest = Path(path), 1 << 20, hashlib.sha256()
    suffixes = (".json", ".jinja", ".model", ".txt", ".safetensors")
    inside = [file for file in path.rglob("*") if file.suffix in suffixes]
    for file in [path] if path.is_file() else sorted(inside):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size} ".encode())
        with file.open("rb") as content:
            for start in range(0, size, max(block, size // 64)):
                content.seek(start)
                digest.update(content.read(block))
    return digest.hexdigest()[:12]
