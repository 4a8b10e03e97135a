"""Checkpoints of a training run: safetensors and JSON, written aside and renamed.

All randomness of `train.py` is drawn from (seed, iteration, round), so trained parameters,
optimizer state, the number of iterations done and the config are all there is to keep. A kill or a
full disk during a write leaves the last checkpoint as it was.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

NAME = "checkpoint.safetensors"
MAY_CHANGE = ("iterations", "validate_every", "run")  # between a checkpoint and its resumption


def save_checkpoint(folder, done, parameters, optimizer, config):
    """Writes `done` iterations' outcome. Raises OSError where the disk is full."""
    tensors = {f"parameter.{i}": value.detach() for i, value in enumerate(parameters)}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    tensors = {name: value.clone().contiguous() for name, value in tensors.items()}
    metadata = {"iterations": str(done), "config": json.dumps(asdict(config))}
    aside = folder / "aside.safetensors"
    try:
        save_file(tensors, aside, metadata)
        os.replace(aside, folder / NAME)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{folder / NAME}: cannot be written ({error}); the last one stays") from None


def check_adapter(folder, part):
    """Raises ValueError unless the LoRA that Actor or Editor just loaded is what the folder holds.

    peft leaves what it does not find in a file untrained, and passes over what it does not know.
    """
    model = part.pipeline.transformer if hasattr(part, "pipeline") else part.model
    path = next(Path(folder).glob("*.safetensors"))
    with safe_open(path, "pt") as file:
        held = [file.get_tensor(name) for name in file.keys()]
    loaded = [p for name, p in model.named_parameters() if ".lora_" in name]
    if not all(value.isfinite().all() for value in held):
        raise ValueError(f"{path.name} holds NaN or infinite numbers")
    used, given = (sum(bool(v.any()) for v in values) for values in (loaded, held))
    if used != given:
        raise ValueError(f"{path.name} is of another model: {given} tensors, {used} taken up")


def load_checkpoint(folder, parameters, optimizer, config, changed=False):
    """Restores what `save_checkpoint` wrote; returns the iterations done.

    Raises ValueError where the file is damaged, or, unless `changed`, made with another config.
    """
    path = folder / NAME
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        saved = json.loads(metadata["config"])
        done = int(metadata["iterations"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: is damaged ({error}); start anew in another folder") from None
    now = json.loads(json.dumps(asdict(config)))
    differ = [
        f"{key} ({saved.get(key)!r} then, {now.get(key)!r} now)"
        for key in {**saved, **now}
        if key not in MAY_CHANGE and saved.get(key) != now.get(key)
    ]
    if differ and not changed:
        raise ValueError(
            f"{path}: was made with another config: {'; '.join(differ)}; undo that, or add "
            "--changed to go on with the new one"
        )
    expected = {f"parameter.{i}": value.shape for i, value in enumerate(parameters)}
    if expected != {name: v.shape for name, v in tensors.items() if name.startswith("parameter.")}:
        raise ValueError(f"{path}: holds another adapter (model or rank); start anew")
    state = {}
    for name, value in tensors.items():
        kind, index, *rest = name.split(".")
        if kind == "parameter":
            parameters[int(index)].data.copy_(value)
        else:
            state.setdefault(int(index), {})[rest[0]] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return done
