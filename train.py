"""Reflection-GRPO (arXiv 2602.19974): trains the Actor (phase 1) or the Editor (phase 2).

An iteration, the same in both phases:

    states   pictures of training prompts that the Checker is not satisfied with
    rollout  G samples of each state: completions of the Actor, each edited with the same seed
             (phase 1), or SDE edits that share initial latents and ODE prefix (phase 2)
    reward   the Checker's score of the edited picture against the original scene graph
    update   group-relative advantages, clipped loss, KL to the adapter switched off: `grpo.py`

As in the loop, a state or a random member of its group, the better, is a state of the next round.
Before the first update the recorded log-probs are compared with replayed ones: a rollout that the
update cannot reproduce stops the run. All randomness is drawn from (seed, iteration, round): a
resumed run continues bit for bit on the CPU.

    python train.py --phase 1 --config phase1.yaml
    python train.py --phase 2 --config phase2.yaml kl=0 --resume
"""

import argparse
import json
import math
import random
import shlex
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError

from checkpoint import NAME, load_checkpoint, save_checkpoint
from config import LoopConfig, load_config
from grpo import clipped_loss, group_advantages
from loop import Trajectory, build
from phases import SECONDS, ActorPhase, EditorPhase, State, clock
from report import record, write
from sgiou import SceneGraph, load_laion_sg, sg_iou

PATIENCE = 5  # iterations after which trouble is told


@dataclass
class TrainConfig(LoopConfig):
    """The loop's parts, and how one of them is trained."""

    data: str = "tiny/data/train.json"  # LAION-SG JSON; no label of it but the prompt is used
    data_limit: int = 0  # graphs, the first ones of the file; 0 takes all
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
    flat_range: float = 0.02  # rewards no further apart than this make a flat group, left out
    updates: int = 2  # optimizer steps on a rollout; at 1 the clip never acts
    micro_batch: int = 64  # completions (phase 1), or edits in whole groups (phase 2), a backward
    malformed: float = 0.2  # what a malformed completion loses (phase 1)
    shared_noise: bool = True  # within a group: of the edits (phase 1), initial latents (phase 2)
    sampled_reward: bool = False  # sampled yes or no in place of P(yes): for comparison
    noise_level: float = 0.8  # a of the SDE (phase 2)
    window: int = 3  # SDE steps (phase 2)
    window_start: int = 2  # the window starts at a random step up to this (phase 2)
    tolerance: float = 1e-4  # |log-prob replayed - recorded|: mean (phase 1), most (phase 2)
    validate_every: int = 10  # iterations
    validation_limit: int = 60  # prompts


def fresh_states(loop, graphs, config, iteration):
    """Up to `groups` pictures that do not satisfy the Checker; the share of those drawn that do."""
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
    """One batch a round; as in the loop, the best picture so far goes on, unless it satisfies."""
    batches = []
    for number in range(config.rounds):
        if not states:
            break
        rng = random.Random(f"{config.seed} round {iteration} {number}")
        batch = phase.rollout(states, rng.randrange(1 << 30))
        batches.append(batch)
        states = []
        for start in range(0, len(batch.rewards), config.group_size):
            member = start + rng.randrange(config.group_size)
            before = batch.states[member]
            after = State(before.graph, batch.images[member], batch.reflections[member])
            better = after if after.reflection.score > before.reflection.score else before
            if not better.reflection.satisfied:
                states.append(better)
    return batches


def update(phase, batches, optimizer, parameters, config):
    """`updates` optimizer steps on the batches; returns the logged figures."""
    work = []  # (replay, recorded log-probs (R, T), advantages (R, 1), mask (R, T))
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
            if mask.any():
                work.append((replay, recorded, advantages[rows, None].to(recorded.device), mask))
    count = sum(mask.sum().item() for *_, mask in work)
    figures = {"flat_groups": flat / max(total, 1), "groups": total, "skipped": 0}
    references = []  # what the policy without its adapter says: the same for all updates
    for number in range(config.updates if work else 0):  # Adam moves even on a zero gradient
        sums = {}
        optimizer.zero_grad()
        for index, (replay, recorded, advantages, mask) in enumerate(work):
            with phase.trained.adapter():
                now = replay()
                if number == 0:
                    errors = (now[0].detach() - recorded).abs()[mask]
                    largest = max(figures.get("replay_error", 0.0), errors.max().item())
                    figures["replay_error"] = largest
                    error = phase.disagreement(errors)
                    if not error <= config.tolerance:  # nor is it if it is no number
                        raise ValueError(
                            f"a replayed log-prob differs from the recorded one by {error:.1e}, "
                            f"more than tolerance {config.tolerance:.0e}: the rollout is not what "
                            "the update sees; look for dropout, other batch shapes or dtype"
                        )
                loss, stats = clipped_loss(
                    now[0], recorded, advantages, mask, count, config.clip_low, config.clip_high
                )
                if config.kl > 0:
                    if number == 0:
                        with torch.no_grad(), phase.trained.adapter(on=False):
                            references.append(replay())
                    kl = torch.where(mask, phase.divergence(now, references[index]), 0).sum()
                    loss = loss + config.kl * kl / count
                    stats["kl"] = kl.item() / count
                loss.backward()
            for name, value in stats.items():
                highest = name == "ratio_error"
                sums[name] = max(sums.get(name, 0), value) if highest else sums.get(name, 0) + value
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        if math.isfinite(norm):
            figures |= sums | {"grad_norm": norm}
            optimizer.step()
        else:
            figures["skipped"] += 1
    return figures


def validate(loop, start, config):
    """The loop with ODE edits from the same first pictures: (Checker and exact score, its runs)."""
    trajectories = [Trajectory(t.graph, t.seed, list(t.steps)) for t in start]
    for _ in range(config.rounds):
        loop.advance(trajectories)
    best = [trajectory.best for trajectory in trajectories]
    figures = {"val_checker": mean([step.reflection.score for step in best])}
    if config.exact:
        from tiny.world import exact_graph, parse

        found = parse([step.image for step in best])
        exact = [SceneGraph(*exact_graph(f, t.graph)) for f, t in zip(found, trajectories)]
        scores = [sg_iou(seen, t.graph)["sg_iou"] for seen, t in zip(exact, trajectories)]
        figures["val_sg_iou"] = mean(scores)
    return figures, trajectories


def mean(values):
    return sum(values) / max(len(values), 1)


def summary(batches, solved):
    """Reward figures and the phase's own."""
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
        sums, counts = zip(*(batch.stats[name] for batch in batches))
        figures[name] = sum(sums) / sum(counts)
    return figures


def show(iteration, figures):
    """One line a person can read."""
    names = {"flat_groups": "flat", "replay_error": "replay", "ratio_error": "max|rho-1|"}
    names |= {"grad_norm": "grad", "clipped_low": "clip-", "clipped_high": "clip+"}
    shown = ["reward", "before", "kl", "malformed", *names, "val_checker", "val_sg_iou"]
    parts = [f"{names.get(name, name)} {figures[name]:.3g}" for name in shown if name in figures]
    return f"{iteration:4d}  " + "  ".join(parts)


def trouble(recent):
    """What is wrong with a run, in one line ("" if nothing), told by its last iterations."""
    if len(recent) < PATIENCE:
        return ""
    if all(figures["skipped"] for figures in recent):
        raise FloatingPointError(
            f"gradients were not finite in {PATIENCE} iterations in a row; the checkpoint is from "
            "before any harm: lower learning_rate, or use a wider dtype"
        )
    if all(not figures["samples"] for figures in recent):
        return "nothing to learn from: no picture fails the Checker, or the Actor wants no edit"
    if all(figures["flat_groups"] > 0.95 for figures in recent):
        unused = mean([figures.get("none", 0) + figures.get("malformed", 0) for figures in recent])
        if unused > 0.9:
            return f"{unused:.0%} of the completions name no edit: see max_new_tokens, the prompt"
        return "all rewards of a group are alike: see the Checker, or raise temperature or noise"
    return ""


def train(loop, config, phase_class, resume=False, changed=False):
    """Runs all iterations; writes all that the run's folder holds (README: what a run leaves)."""
    graphs = load_laion_sg(config.data, config.data_limit or None)
    graphs = loop.diffuser.readable(graphs, config.data)
    held_out = load_laion_sg(config.validation, config.validation_limit)
    held_out = loop.diffuser.readable(held_out, config.validation)
    torch.manual_seed(config.seed)
    folder = Path(config.run)
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    phase = phase_class(loop, config)
    parameters = phase.trained.add_adapter(config.rank)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    metrics, log = folder / "metrics.jsonl", folder / "log"
    if not resume:
        save_checkpoint(folder, 0, parameters, optimizer, config)
    first = load_checkpoint(folder, parameters, optimizer, config, changed)
    rows = metrics.read_text().splitlines()[: first + 1] if first else []
    if first and (len(rows) <= first or not rows[first].endswith("}")):
        raise ValueError(f"{metrics}: lacks iterations of the checkpoint; start anew elsewhere")
    write(metrics, "".join(row + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))

    def say(line):
        print(line, flush=True)
        with log.open("a") as file:
            file.write(line + "\n")

    start = loop.start(held_out, list(range(len(held_out))))
    if first == 0:
        scores, trajectories = validate(loop, start, config)
        rows = [json.dumps({"iteration": 0} | scores)]
        write(metrics, rows[0] + "\n")
        say(show(0, scores))
        record(folder, trajectories)
    say(
        f"{sum(p.numel() for p in parameters):,} parameters of {len(parameters)} LoRA tensors; an "
        f"iteration: up to {config.groups} states x {config.group_size} samples in each of "
        f"{config.rounds} rounds; {phase.cost()}; {config.updates} updates"
    )
    for iteration in range(first, config.iterations):
        SECONDS.clear()
        loop.editor.misread = 0
        states, solved = fresh_states(loop, graphs, config, iteration)
        batches = collect(phase, states, config, iteration)
        warmth = min(1, (iteration + 1) / max(config.warmup, 1))
        optimizer.param_groups[0]["lr"] = config.learning_rate * warmth
        with clock("update"):
            figures = summary(batches, solved) | {"misread": loop.editor.misread}
            figures |= update(phase, batches, optimizer, parameters, config)
        if (iteration + 1) % config.validate_every == 0 or iteration + 1 == config.iterations:
            with clock("validate"):
                scores, trajectories = validate(loop, start, config)
                figures |= scores
        rows.append(json.dumps({"iteration": iteration + 1} | figures))
        with metrics.open("a") as file:
            file.write(rows[-1] + "\n")
        with (folder / "seconds.jsonl").open("a") as file:
            file.write(json.dumps({"iteration": iteration + 1} | SECONDS) + "\n")
        say(f"{show(iteration + 1, figures)}  {sum(SECONDS.values()):.1f}s")
        if warning := trouble([json.loads(line) for line in rows[1:][-PATIENCE:]]):
            say(f"warning: {warning}")
        if "val_checker" in figures:
            phase.trained.save_adapter(folder / "adapter")
            record(folder, trajectories, iteration + 1)
        save_checkpoint(folder, iteration + 1, parameters, optimizer, config)
    phase.trained.save_adapter(folder / "adapter")  # of a run that was killed before it could
    say(f"adapter: {folder / 'adapter'}")


def main():
    parser = argparse.ArgumentParser(description="Reflection-GRPO.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the YAML's values")
    parser.add_argument("--phase", type=int, choices=(1, 2), required=True)
    parser.add_argument("--config", help="default: phase1.yaml or phase2.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    parser.add_argument("--changed", action="store_true", help="resume with a changed config")
    arguments = parser.parse_args()
    path = arguments.config or f"phase{arguments.phase}.yaml"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    checkpoint = None
    try:
        config = load_config(path, TrainConfig, arguments.overrides)
        checkpoint = Path(config.run) / NAME
        name = ("actor", "editor")[arguments.phase - 1]
        if getattr(config, name).adapter:
            raise ValueError(f"{path}: key '{name}.adapter': this phase trains a new one; drop it")
        if arguments.resume and not checkpoint.exists():
            raise ValueError(f"{config.run}: holds no checkpoint; start without --resume")
        if checkpoint.exists() and not arguments.resume:
            raise ValueError(
                f"{config.run}: holds a run; go on with it by --resume, or give run=another/folder"
            )
        phase_class = (ActorPhase, EditorPhase)[arguments.phase - 1]
        train(build(config), config, phase_class, arguments.resume, arguments.changed)
    except (ValueError, FloatingPointError, RuntimeError) as error:
        sys.exit(" ".join(f"train.py: {error}".split()))
    except (OSError, SafetensorError) as error:  # of a full disk, the latter names no file
        sys.exit(" ".join(f"train.py: {checkpoint and checkpoint.parent}: {error}".split()))
    except KeyboardInterrupt:
        if checkpoint is None or not checkpoint.exists():
            sys.exit("stopped before the first checkpoint")
        words = ["python", *(word for word in sys.argv if word != "--resume"), "--resume"]
        sys.exit(f"stopped; go on with: {shlex.join(words)}")


if __name__ == "__main__":
    main()
