"""Configuration: a YAML file read into dataclasses, with "key=value" overrides on top.

    config = load_config("eval.yaml", LoopConfig, ["rounds=5", "actor.temperature=0.7"])

A field's comment is its documentation; its type says which values it accepts. Anything wrong is a
ValueError of one line that names file and key.

`~` and `$VARS` in paths are expanded. A relative path starts at the current folder; a model,
adapter, or data file that is not there is looked for in the folder of the YAML file.
"""

import difflib
import hashlib
import json
import re
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from os.path import dirname, exists, expanduser, expandvars, isdir, isfile, join
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import yaml


def is_model(path):
    """A folder or a Hub id, but no mistyped path a/b into an existing folder a."""
    hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)
    return isdir(path) or (hub_id and not exists(path.split("/")[0]))


# Annotated[Python type, what is accepted, check of the value]
Natural = Annotated[int, "an integer, 0 or more", lambda n: 0 <= n < 2**31]
Count = Annotated[int, "an integer, 1 or more", lambda n: 1 <= n < 2**31]
GroupSize = Annotated[int, "an integer, 2 or more", lambda n: 2 <= n < 2**31]
Rank = Annotated[int, "an integer from 1 to 1024", lambda n: 1 <= n <= 1024]
Phase = Annotated[int, "1 or 2", lambda n: n in (1, 2)]
Seed = Annotated[int, "an integer from 0 to 2**31 - 1", lambda n: 0 <= n < 2**31]
Share = Annotated[float, "a number, 0 or more and below 1", lambda x: 0 <= x < 1]
# `<` is false for NaN, so these refuse it.
NonNegative = Annotated[float, "a number from 0 to 1e9", lambda x: 0 <= x <= 1e9]
Positive = Annotated[float, "a number from 1e-9 to 1e9", lambda x: 1e-9 <= x <= 1e9]
DTYPES = ("auto", "float32", "bfloat16", "float16")
Dtype = Annotated[str, f"one of {DTYPES}", lambda name: name in DTYPES]
Template = Annotated[str, "text with {} where the instruction goes", lambda text: "{}" in text]
Words = Annotated[
    list,
    "a list of words ('on' in quotes)",
    lambda words: all(type(word) is str and word.strip(" ;,") for word in words),
]
Model = Annotated[str, "an existing folder, or a Hub id owner/name", is_model]
Adapter = Annotated[str, "an existing folder", lambda path: not path or isdir(path)]
DataFile = Annotated[str, "an existing file (LAION-SG: see docs/models.md)", isfile]
RunFolder = Annotated[
    str,
    "a folder (set all $VARS)",
    lambda path: re.fullmatch(r"[^~$\s][^$\0]*", path) and not isfile(path),
]


@dataclass
class PartConfig:  # one part of the loop: which model, and how it runs
    model: Model  # parts with equal model, device, dtype and attention share weights
    device: str = "auto"  # cuda if there is a GPU, else cpu
    dtype: Dtype = "auto"  # bfloat16 on cuda, else float32
    batch_size: Count = 64  # images or questions per call (the Actor: group_size texts for each)


@dataclass
class ModelConfig(PartConfig):  # a VLM: the Checker, or a judge
    attention: str = ""  # attn_implementation, such as sdpa; "": the model's default


@dataclass
class ActorConfig(ModelConfig):
    max_new_tokens: Count = 256  # longest completion
    temperature: Positive = 1.0
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
    exact: bool = False  # also by the pixel parser: tiny world only
    untrained_temperature: Positive | None = None  # of the Actor without adapter; null: its own
    judge: ModelConfig | None = None  # VLM that extracts scene graphs and judges; null: the Checker


@dataclass
class LoopConfig:  # what every entry point needs (eval.yaml)
    diffuser: PipelineConfig  # prompt -> image; frozen
    checker: ModelConfig  # image -> verdicts and score; frozen
    actor: ActorConfig  # image, prompt, verdicts -> instruction; trained in phase 1
    editor: EditorConfig  # image, instruction -> image; trained in phase 2
    relations: Words  # the relation words of typed prompts and of scene-graph extraction
    rounds: Natural = 3  # a trajectory has at most this many edits; 0: generate only
    offload: bool = False  # the models of a pipeline take turns on the GPU; VLMs stay there
    evaluation: EvaluationConfig | None = None  # used by eval.py only


@dataclass(kw_only=True)
class TrainConfig(LoopConfig):  # what train.py needs (phase1.yaml, phase2.yaml)
    phase: Phase | None = None  # which phase this file is for; null: either
    rounds: Count = 3  # of sampling; later ones continue one sample of each group
    data: DataFile  # training prompts; no label is used
    data_limit: Natural = 0  # the first prompts of the file; 0: all
    validation: DataFile
    validation_limit: Count = 60
    validate_every: Count = 10  # iterations
    exact: bool = False  # also validate by the pixel parser: tiny world only
    judge: ModelConfig | None = None  # also validate by another VLM than the Checker; null: none
    run: RunFolder  # folder for adapter, checkpoint and metrics
    seed: Seed = 0  # of all randomness of the run
    iterations: Count = 50  # each of `rounds` rounds and `updates` optimizer steps
    groups: Count = 8  # states of round 1 in an iteration; later rounds continue them
    group_size: GroupSize = 8  # G, samples of one state
    rank: Rank = 16  # of the LoRA adapter
    learning_rate: Positive = 1e-3  # of AdamW
    warmup: Natural = 5  # iterations of linear warm-up
    max_grad_norm: Positive = 1.0
    ema: Share = 0.0  # decay per iteration of the moving average that is saved; 0: no average
    clip_low: NonNegative = 0.2  # rho is clipped to [1 - clip_low, 1 + clip_high]; in phase 2
    clip_high: NonNegative = 0.28  # about 0.026 / sqrt(latent dimensions), see `sde_step`
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
    tolerance: NonNegative = 1e-4  # of mean |log-prob replayed - recorded|, or it stops


# Arguments of a pipeline's call that the program sets. `sigmas` would move the steps of a window.
REFUSED = "prompt prompt_2 prompt_3 image generator output_type return_dict sigmas".split()
REFUSED += ["num_images_per_prompt", "timesteps", "seed"]
# Arguments that have to be whole numbers, 1 or more, if they are given.
COUNTS = "num_inference_steps max_sequence_length max_area height width".split()


def load_config(path, schema, overrides=()):
    """Read a YAML file, here or beside this module, with "key.key=value" overrides on top."""
    path = expanduser(path)
    beside = join(dirname(__file__), path)
    if exists(beside) and not exists(path):
        path = beside
    try:
        values = read_yaml(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("holds no keys; write 'key: value' lines")
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise ValueError(f"override {override!r}: write it as key=value")
            *sections, last = key.split(".")
            section = values
            for name in sections:
                if not isinstance(section.get(name), dict):
                    section[name] = {}
                section = section[name]
            section[last] = read_yaml(text, f"override {override!r}: ")
        return fill(schema, values, "", dirname(path))
    except (OSError, ValueError) as error:
        raise ValueError(" ".join(f"{path}: {error}".split())) from None  # one line


class Loader(yaml.SafeLoader):
    """Refuses equal keys, of which PyYAML keeps the last. Reads 1e-6 as a number, and 010 as text.

    PyYAML reads YAML 1.1, where 1e-6 is text, 010 is 8, and 1:30 is 90.
    """

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} appears twice")
        return node


EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
# In place of the integers of YAML 1.1:
INTEGER = re.compile(r"[-+]?(0|[1-9]\d*)$")
for signs, resolvers in Loader.yaml_implicit_resolvers.copy().items():
    Loader.yaml_implicit_resolvers[signs] = [r for r in resolvers if not r[0].endswith(":int")]
Loader.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))


def read_yaml(text, where=""):
    try:
        # By way of JSON: sections that share an alias become copies, a date becomes text.
        return json.loads(json.dumps(yaml.load(text, Loader), default=str))
    except Exception as error:  # of any type, RecursionError included
        raise ValueError(f"{where}not valid YAML ({error}); correct or quote it") from None


def fill(schema, values, prefix, folder):
    """Dictionary -> dataclass. prefix: of its keys in messages; folder: of the YAML file."""
    if not isinstance(values, dict):
        raise ValueError(f"key '{prefix[:-1]}' is {values!r}; make it 'key: value' lines")
    kinds = get_type_hints(schema, include_extras=True)
    for key in values:
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, 1)
            hint = f"; did you mean '{prefix}{near[0]}'?" if near else ""
            if key in get_type_hints(TrainConfig) and not prefix:
                hint = "; it belongs in a file for train.py, give loop.py and eval.py eval.yaml"
            raise ValueError(f"key '{prefix}{key}' is unknown{hint}")
    filled = {}
    for entry in fields(schema):
        name = entry.name
        if name in values:
            filled[name] = check(kinds[name], values[name], prefix + name, folder)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"key '{prefix}{name}' is missing; add it")
    return schema(**filled)


def check(kind, value, key, folder):
    """The value of one field, converted. Raises ValueError if the field does not accept it."""
    if type(None) in get_args(kind):  # kind | None
        if value is None:
            return None
        kind = get_args(kind)[0]
    if is_dataclass(kind):
        return fill(kind, value, f"{key}.", folder)
    python_type, wanted, accepts = get_args(kind) or (kind, kind.__name__, lambda value: True)
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
        raise ValueError(f"key '{key}' is {value!r}; make it {wanted}")
    if kind is dict:  # the arguments of a pipeline's call
        for name in value:
            if name in REFUSED:
                raise ValueError(f"key '{key}' holds {name!r}, which cannot be set; remove it")
            if name in COUNTS:
                check(Count, value[name], f"{key}.{name}", folder)
    return value


def fingerprint(config, leave_out=()):
    """What a resumed run must share: {dotted key: value}, without the keys to leave out.

    An adapter or data file is given as a hash of its content, a model as its Hub id or its path:
    relative to the folder of this file if it lies in it, else absolute.
    """
    values = flatten(asdict(config))
    return {key: value for key, value in values.items() if key not in leave_out}


def differences(then, now):
    """What differs between two fingerprints, as text: "" if nothing does."""
    return ", ".join(
        f"{key} ({then.get(key, 'unset')} then, {now.get(key, 'unset')} now)"
        for key in then | now
        if then.get(key) != now.get(key)
    )


def flatten(values, prefix=""):
    """{"actor": {"temperature": 1.0}} -> {"actor.temperature": 1.0}"""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif key in ("adapter", "data", "validation") and value:
            flat[prefix + key] = f"content {content_hash(Path(value))}"
        elif key == "model" and isdir(value):
            path, here = Path(value).resolve(), Path(__file__).resolve().parent
            inside = path.is_relative_to(here)
            flat[prefix + key] = str(path.relative_to(here) if inside else path)
        else:
            flat[prefix + key] = value
    return flat


def content_hash(path):
    """A hash of a data file, or of the files in an adapter's folder."""
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]
