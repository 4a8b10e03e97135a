"""Reflection-GRPO (arXiv 2602.19974): trains the Actor (phase 1) or the Editor (phase 2).

An iteration, the same in both phases:

    states   pictures of training prompts that the Checker is not satisfied with
    rollout  G samples of each state: completions of the Actor, each edited with the same seed
             (phase 1), or SDE edits that share initial latents and ODE prefix (phase 2)
    reward   the Checker's score of the edited picture against the original scene graph
    update   group-relative advantages, clipped loss, KL to the adapter switched off: `grpo.py`

A random member of each group is the state of the next round, as long as the loop would edit it.
Before the first update the recorded log-probs are compared with replayed ones: a rollout that the
update cannot reproduce stops the run. All randomness is drawn from (seed, iteration, round), so a
checkpoint is adapter, optimizer and iteration, and a resumed run continues bit for bit on the CPU.

    python train.py --phase 1 --config phase1.yaml
    python train.py --phase 2 --config phase2.yaml kl=0 --resume
"""

import argparse
import json
import os
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from config import LoopConfig, load_config
from phases import SECONDS, ActorPhase, EditorPhase, State, clock
from sgiou import SceneGraph, load_laion_sg, sg_iou


@dataclass
class TrainConfig(LoopConfig):
    """The loop's parts, and how one of them is trained."""

    data: str = "tiny/data/train.json"  # LAION-SG JSON; no label of it but the prompt is used
    validation: str = "tiny/data/val.json"  # LAION-SG JSON
    exact: bool = False  # log the exact SG-IoU of validation too: embedded world only
    run: str = "runs/phase1"  # folder of adapter, checkpoint and metrics
    seed: int = 0
    iterations: int = 50
    groups: int = 8  # states of round 1 an iteration; later rounds add to them
    group_size: int = 8  # G, samples of one state
    rank: int = 16  # of the LoRA adapter
    learning_rate: float = 1e-3
    warmup: int = 5  # iterations of linear warm-up
    max_grad_norm: float = 1.0
    clip_low: float = 0.2  # rho is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.28
    kl: float = 0.01  # weight of the KL to the adapter switched off; 0 runs no reference pass
    advantage_eps: float = 0.05  # beside the std: keeps the Checker's noise from counting as signal
    flat_range: float = 0.02  # rewards closer together than this make a flat group, left out
    updates: int = 2  # optimizer steps on a rollout; at 1 the clip never acts
    micro_batch: int = 64  # completions (phase 1) or edits (phase 2) a backward pass
    malformed: float = 0.2  # what a malformed completion loses (phase 1)
    noise_level: float = 0.8  # a of the SDE (phase 2)
    window: int = 3  # SDE steps (phase 2)
    window_start: int = 2  # the window starts at a random step up to this (phase 2)
    tolerance: float = 1e-4  # most |log-prob replayed - recorded| before the first update
    validate_every: int = 10  # iterations
    validation_limit: int = 60  # prompts


def fresh_states(loop, graphs, config, iteration):
    """`groups` pictures of the Diffuser that do not satisfy the Checker, and the share that did."""
    rng = random.Random(f"{config.seed} states {iteration}")
    states, seen = [], 0
    while len(states) < config.groups and seen < 10 * config.groups:
        chosen = rng.sample(graphs, min(config.groups, len(graphs)))
        seen += len(chosen)
        with clock("generate"):
            seeds = [rng.randrange(1 << 30) for _ in chosen]
            images = loop.diffuser.generate([graph.prompt() for graph in chosen], seeds)
            reflections = loop.checker.check(images, chosen)
        states += [
            State(*parts) for parts in zip(chosen, images, reflections) if not parts[2].satisfied
        ]
    return states[: config.groups], 1 - len(states) / max(seen, 1)


def collect(phase, states, config, iteration):
    """One batch a round; after each, a random member of every group may go on to the next."""
    batches = []
    for number in range(config.rounds):
        if not states:
            break
        rng = random.Random(f"{config.seed} round {iteration} {number}")
        batch = phase.rollout(states, rng.randrange(1 << 30))
        if not batch.rewards:
            break
        batches.append(batch)
        states = []
        for start in range(0, len(batch.rewards), config.group_size):
            member = start + rng.randrange(config.group_size)
            if not batch.reflections[member].satisfied:
                graph = batch.states[member].graph
                states.append(State(graph, batch.images[member], batch.reflections[member]))
    return batches


def update(phase, batches, optimizer, parameters, config):
    """`updates` optimizer steps on the batches; returns the logged figures."""
    import torch

    from grpo import clipped_loss, group_advantages

    work = []  # (phase piece, advantages (R, 1), mask (R, T))
    flat = total = 0
    for batch in batches:
        advantages, kept = group_advantages(
            torch.tensor(batch.rewards),
            torch.tensor(batch.groups),
            config.advantage_eps,
            config.flat_range,
        )
        flat += (~kept).sum().item() / config.group_size
        total += len(set(batch.groups))
        for replay, recorded, mask, rows in phase.pieces(batch):
            mask = mask & kept[rows, None].to(mask.device)
            work.append((replay, recorded, advantages[rows, None].to(recorded.device), mask))
    count = sum(mask.sum().item() for *_, mask in work)
    figures = {"flat_groups": flat / max(total, 1), "groups": total}
    if count == 0:
        return figures  # Adam moves even on a zero gradient
    for number in range(config.updates):
        sums = {}
        optimizer.zero_grad()
        for replay, recorded, advantages, mask in work:
            with phase.trained.adapter():
                now = replay()
                if number == 0:
                    error = torch.where(mask, now[0].detach() - recorded, 0).abs().max().item()
                    figures["replay_error"] = max(figures.get("replay_error", 0.0), error)
                loss, stats = clipped_loss(
                    now[0], recorded, advantages, mask, count, config.clip_low, config.clip_high
                )
                if config.kl > 0:
                    with torch.no_grad(), phase.trained.adapter(on=False):
                        reference = replay()
                    kl = torch.where(mask, phase.divergence(now, reference), 0).sum() / count
                    loss = loss + config.kl * kl
                    stats["kl"] = kl.item()
                loss.backward()
            for name, value in stats.items():
                highest = name == "ratio_error"
                sums[name] = max(sums.get(name, 0), value) if highest else sums.get(name, 0) + value
        if number == 0 and figures["replay_error"] > config.tolerance:
            raise ValueError(
                f"a replayed log-prob differs from the recorded one by "
                f"{figures['replay_error']:.1e}, more than tolerance {config.tolerance:.0e}: the "
                "rollout is not what the update sees; look for dropout, other batch shapes or dtype"
            )
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        figures |= sums | {"grad_norm": norm}
        optimizer.step()
    return figures


def validate(loop, phase, start, config):
    """Runs the loop with ODE edits from the same first pictures: Checker score and exact SG-IoU."""
    from loop import Trajectory

    trajectories = [Trajectory(t.graph, t.seed, list(t.steps)) for t in start]
    for _ in range(config.rounds):
        loop.advance(trajectories)
    best = [trajectory.best for trajectory in trajectories]
    figures = {"val_checker": mean([step.reflection.score for step in best])}
    if config.exact:
        from tiny.world import exact_graph, parse

        found = parse([step.image for step in best])
        graphs = [trajectory.graph for trajectory in trajectories]
        exact = [SceneGraph(*exact_graph(things, graph)) for things, graph in zip(found, graphs)]
        scores = [sg_iou(pred, gold)["sg_iou"] for pred, gold in zip(exact, graphs)]
        figures["val_sg_iou"] = mean(scores)
    return figures


def mean(values):
    return sum(values) / max(len(values), 1)


def summary(batches, solved):
    """Reward figures and the phase's own, as shares of the samples."""
    rewards = [reward for batch in batches for reward in batch.rewards]
    before = [state.reflection.score for batch in batches for state in batch.states]
    average = mean(rewards)
    figures = {
        "reward": average,
        "reward_std": mean([(reward - average) ** 2 for reward in rewards]) ** 0.5,
        "before": mean(before),
        "solved_at_once": solved,
        "samples": len(rewards),
    }
    for name in batches[0].stats if batches else ():
        figures[name] = sum(batch.stats[name] for batch in batches) / len(rewards)
    return figures


def save_checkpoint(folder, done, parameters, optimizer, config):
    """Parameters and optimizer state in one safetensors file, written aside, then renamed."""
    import torch
    from safetensors.torch import save_file

    tensors = {f"parameter.{i}": value.detach() for i, value in enumerate(parameters)}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    tensors = {name: value.clone().contiguous() for name, value in tensors.items()}
    metadata = {"iterations": str(done), "config": json.dumps(asdict(config))}
    save_file(tensors, folder / "aside.safetensors", metadata)
    os.replace(folder / "aside.safetensors", folder / "checkpoint.safetensors")


def load_checkpoint(path, parameters, optimizer, config):
    """Restores what `save_checkpoint` wrote; returns the iterations done."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); start without --resume") from None
    saved, now = json.loads(metadata["config"]), asdict(config)
    changed = [key for key in now if key != "iterations" and saved.get(key) != now[key]]
    if changed:
        raise ValueError(f"{path}: made with another config, in {', '.join(changed)}; undo that")
    state = {}
    for name, value in tensors.items():
        kind, index, *rest = name.split(".")
        if kind == "parameter":
            parameters[int(index)].data.copy_(value)
        else:
            state.setdefault(int(index), {})[rest[0]] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return int(metadata["iterations"])


def show(iteration, figures):
    """One line a person can read."""
    names = {"reward": "reward", "before": "before", "flat_groups": "flat", "kl": "kl"}
    names |= {"replay_error": "replay", "ratio_error": "max|rho-1|", "grad_norm": "grad"}
    names |= {"clipped_low": "clip-", "clipped_high": "clip+", "malformed": "malformed"}
    names |= {"val_checker": "val checker", "val_sg_iou": "val SG-IoU"}
    parts = [f"{label} {figures[name]:.3g}" for name, label in names.items() if name in figures]
    return f"{iteration:4d}  " + "  ".join(parts)


def train(loop, config, phase_class, resume):
    """Runs all iterations; writes metrics.jsonl, seconds.jsonl, the adapter and the checkpoint."""
    import torch

    torch.manual_seed(config.seed)
    folder = Path(config.run)
    folder.mkdir(parents=True, exist_ok=True)
    phase = phase_class(loop, config)
    parameters = phase.trained.add_adapter(config.rank)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    metrics = folder / "metrics.jsonl"
    first, rows = 0, []
    if resume:
        first = load_checkpoint(folder / "checkpoint.safetensors", parameters, optimizer, config)
        rows = metrics.read_text().splitlines()[:first]
    metrics.write_text("".join(row + "\n" for row in rows))
    graphs = load_laion_sg(config.data)
    held_out = load_laion_sg(config.validation, config.validation_limit)
    start = loop.start(held_out, list(range(len(held_out))))
    print(
        f"{len(parameters)} LoRA tensors, {sum(p.numel() for p in parameters):,} parameters; "
        f"{config.groups} states x {config.group_size} samples x up to {config.rounds} rounds"
    )
    for iteration in range(first, config.iterations):
        SECONDS.clear()
        states, solved = fresh_states(loop, graphs, config, iteration)
        batches = collect(phase, states, config, iteration)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1, (iteration + 1) / max(config.warmup, 1))
        with clock("update"):
            figures = summary(batches, solved) | update(
                phase, batches, optimizer, parameters, config
            )
        if (iteration + 1) % config.validate_every == 0 or iteration + 1 == config.iterations:
            with clock("validate"):
                figures |= validate(loop, phase, start, config)
        with metrics.open("a") as file:
            file.write(json.dumps({"iteration": iteration + 1} | figures) + "\n")
        with (folder / "seconds.jsonl").open("a") as file:
            file.write(json.dumps({"iteration": iteration + 1} | SECONDS) + "\n")
        save_checkpoint(folder, iteration + 1, parameters, optimizer, config)
        print(show(iteration + 1, figures), f" {sum(SECONDS.values()):.1f}s", flush=True)
    phase.trained.save_adapter(folder / "adapter")
    print(f"adapter: {folder / 'adapter'}")


def main():
    parser = argparse.ArgumentParser(description="Reflection-GRPO.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the YAML's values")
    parser.add_argument("--phase", type=int, choices=(1, 2), required=True)
    parser.add_argument("--config", help="default: phase1.yaml or phase2.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    arguments = parser.parse_args()
    try:
        path = arguments.config or f"phase{arguments.phase}.yaml"
        config = load_config(path, TrainConfig, arguments.overrides)
        if arguments.resume and not (Path(config.run) / "checkpoint.safetensors").exists():
            raise ValueError(f"{config.run}: holds no checkpoint; start without --resume")
        from loop import build

        loop = build(config)
        train(loop, config, (ActorPhase, EditorPhase)[arguments.phase - 1], arguments.resume)
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        words = [word for word in sys.argv if word != "--resume"]
        sys.exit(f"stopped; go on with: python {' '.join(words)} --resume")


if __name__ == "__main__":
    main()
