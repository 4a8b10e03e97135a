"""Trains one model: optimizers, moving average, schedule, checkpoints that a kill cannot break.

A step's data depend on the seed and the step alone, so a run that was killed goes on from its last
checkpoint as if nothing had happened.
"""

import json
import os
import random
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

WORK = Path(__file__).parent.parent / "work"  # checkpoints; not shipped
SEED = 0


def optimizers(modules, muon):
    """Muon for the matrices inside the blocks, AdamW for embeddings, modulations and vectors.

    Each group's "scale" is its learning rate over the schedule's. Text encoders learn slowly: their
    attention has no norm, and where its logits grow it stops learning (order of words comes last).
    """
    matrices, others, encoders = [], [], []
    for name, parameter in modules.named_parameters():
        inner = parameter.ndim == 2 and ("block" in name or "layers" in name)
        inner = inner and "norm" not in name and "bias" not in name
        encoder = name.startswith("text_encoder")
        (encoders if encoder else matrices if inner else others).append(parameter)
    groups = [{"params": others, "scale": 1.0}]
    if encoders:
        groups.append({"params": encoders, "scale": 0.2})
    found = [torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)]
    if matrices:
        group = {"params": matrices, "scale": muon}
        found.append(torch.optim.Muon([group], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    return found


def save_checkpoint(folder, step, modules, average, optimizers):
    """Writes weights, their average and the optimizers' state aside, then renames."""
    tensors = {f"weight.{name}": value for name, value in modules.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / "aside.safetensors", metadata={"step": json.dumps(step)})
    os.replace(folder / "aside.safetensors", folder / "checkpoint.safetensors")


def load_checkpoint(folder, modules, average, optimizers):
    """Restores what `save_checkpoint` wrote; returns the step to go on from (0 if none)."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        step = json.loads(file.metadata()["step"])
    tensors = load_file(path)

    def part(prefix):
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    modules.load_state_dict(part("weight."))
    average.update(part("average."))
    for number, optimizer in enumerate(optimizers):
        state = {}
        for name, value in part(f"optimizer.{number}.").items():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return step


def fit(stage, modules, loss_of, steps, learning_rate, save, last, muon, seed=SEED, work=WORK):
    """Minimizes `loss_of(rng, step)`; saves the moving average of the weights with `save()`.

    muon: Muon's learning rate over AdamW's; last: share of the steps, at the end, over which the
    learning rate falls to zero; work: folder of the stage's folder with its checkpoint.
    """
    folder = work / stage
    chosen = optimizers(modules, muon)
    average = {name: value.clone() for name, value in modules.state_dict().items()}
    first = load_checkpoint(folder, modules, average, chosen)
    if first:
        print(f"{stage}: goes on from step {first} of {steps}; delete {folder} to start anew")
    bar = tqdm(range(first, steps), desc=stage, initial=first, total=steps, mininterval=5)
    for step in bar:
        rate = learning_rate * min(1, (step + 1) / 200)
        if step > steps * (1 - last):
            rate *= (steps - step) / (steps * last)
        torch.manual_seed(seed * 1_000_003 + step)
        loss, shown = loss_of(random.Random(f"{seed} {stage} {step}"), step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.step()
        modules.zero_grad(set_to_none=True)
        decay = min(0.998, (step + 1) / (step + 100))
        with torch.no_grad():
            for name, value in modules.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        if step % 20 == 0:
            bar.set_postfix(shown)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_checkpoint(folder, step + 1, modules, average, chosen)
            tqdm.write(f"{stage} {step + 1} {shown}")
    modules.load_state_dict(average)
    save()
