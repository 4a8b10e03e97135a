"""Reflection-GRPO (RL-RIG, arXiv 2602.19974): trains the Actor (phase 1) or the Editor (phase 2).

Read `phase1`, then `phase2`; everything below them is bookkeeping. Both go through the same steps:

    states      images of training prompts that the Checker is not satisfied with
    sample      a group of G samples per state
    reward      the Checker's score of the edited image against the prompt's original scene graph
    advantages  each sample compared with its own group
    update      replay the recorded actions with gradient, clipped loss, KL to the base model

                phase 1: the Actor                    phase 2: the Editor
    sample      a completion, then edited             an edited image
    action      a token                               a denoising step in a random SDE window
    a group     one state, one edit seed: it          one state, one instruction, one latent seed:
    shares      compares instructions, not luck       it compares the noise in the window

Each iteration has `rounds` rounds, like the loop: a later round starts from what an earlier one
made. All randomness is drawn from (seed, iteration, round), so a resumed run gives the same adapter
bit for bit on a CPU.

    python train.py --phase 1 --config phase1.yaml
    python train.py --phase 2 --config phase2.yaml kl=0 --resume
"""

import argparse
import fcntl
import json
import math
import os
import random
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import TrainConfig, load_config
from grpo import clipped_loss, gaussian_kl, group_advantages, k3_kl
from loop import Trajectory, build
from report import record, write
from sgiou import SceneGraph, load_laion_sg, sg_iou

# Added to the seed of a round, so that its edits and their noise have seeds of their own.
EDIT_SEEDS, NOISE_SEEDS = 2_000_000, 1_000_000


@dataclass
class State:
    """An image for a scene graph, and what the Checker says about it."""

    graph: SceneGraph
    image: object
    reflection: object


@dataclass
class Samples:
    """The N = states * G samples of one round; those of a group are neighbors."""

    starts: list[State]  # (N) where each sample started
    outcomes: list[State]  # (N) what it led to
    rewards: list[float]  # (N)
    groups: list[int]  # (N)
    actions: object  # what was recorded: `Proposals` (phase 1) or a list of `Rollout`s (phase 2)

    def advantages(self, config, device="cpu"):
        """Advantages (N, 1) and kept (N, 1), which is False in flat groups."""
        rewards, groups = torch.tensor(self.rewards), torch.tensor(self.groups)
        pair = group_advantages(rewards, groups, config.advantage_eps, config.flat_range)
        return [each[:, None].to(device) for each in pair]


def phase1(loop, config, resume=False, changed=False):
    """Train the Actor through the frozen Editor."""
    actor, G = loop.actor, config.group_size
    clip_bounds = (config.clip_low, config.clip_high)
    torch.manual_seed(config.seed)
    parameters = actor.add_adapter(config.rank)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    run = Run(loop, config, actor, parameters, optimizer, resume, changed)

    for iteration in range(run.first, config.iterations):
        # 1. States: new images that do not satisfy the Checker.
        states, solved = unsatisfied_images(loop, run.graphs, config, iteration)
        run.lap("generate")
        rounds = []  # the `Samples` of each round
        for number in range(config.rounds):
            if not states:
                break
            rng = random.Random(f"{config.seed} round {iteration} {number}")
            seed = rng.randrange(1 << 30)

            # 2. Sample: G completions per state.
            proposals = actor.propose(
                [state.image for state in states],
                [state.graph.prompt() for state in states],
                [state.reflection.feedback for state in states],
                n=G,
                seed=seed,
            )
            starts = [state for state in states for _ in range(G)]  # (N)
            groups = [group for group in range(len(states)) for _ in range(G)]  # (N)
            run.lap("act")

            # 3. Edit and check. All edits of a group have one seed, so that their rewards differ
            # only by the instruction. Equal instructions of a group are therefore edited once.
            keys = list(zip(groups, proposals.instructions))  # (N)
            todo = [key for key in dict.fromkeys(keys) if key[1] not in (None, "none")]
            images = loop.editor.edit(
                [states[group].image for group, _ in todo],
                [instruction for _, instruction in todo],
                [seed + EDIT_SEEDS + group for group, _ in todo],
            )
            run.lap("edit")
            reflections = loop.checker.check(images, [states[group].graph for group, _ in todo])
            run.lap("check")
            made = dict(zip(todo, zip(images, reflections)))

            # 4. Reward: the Checker's score of the edited image. "none" and malformed completions
            # leave the image as it was; a malformed one loses a penalty as well.
            outcomes = [
                State(start.graph, *made.get(key, (start.image, start.reflection)))
                for key, start in zip(keys, starts)
            ]
            rewards = [
                outcome.reflection.score - config.malformed * (instruction is None)
                for outcome, instruction in zip(outcomes, proposals.instructions)
            ]  # (N)
            rounds.append(Samples(starts, outcomes, rewards, groups, proposals))
            states = next_states(starts, outcomes, G, rng)

        # 5. Advantages, and micro-batches of R completions. Flat groups and padding are masked out.
        batches = []  # (proposals, rows, advantages (R, 1), mask (R, T))
        for samples in rounds:
            proposals = samples.actions
            advantages, kept = samples.advantages(config, proposals.ids.device)  # (N, 1) each
            for start in range(0, len(samples.rewards), config.micro_batch):
                rows = slice(start, start + config.micro_batch)
                mask = proposals.mask[rows] & kept[rows]
                if mask.any():
                    batches.append((proposals, rows, advantages[rows], mask))
        count = sum(mask.sum().item() for *_, mask in batches)  # trained tokens of the iteration

        # 6. The KL reference is the base model. Outside `adapter()` that is what the Actor is.
        references = []  # (R, T) each, the same for all updates
        if config.kl > 0:
            with torch.no_grad():
                references = [actor.log_probs(proposals, rows) for proposals, rows, *_ in batches]

        # 7. Update. The loss of every micro-batch is divided by the count of the whole step.
        figures = summarize(rounds, solved, config) | completion_figures(rounds)
        set_learning_rate(optimizer, config, iteration)
        for update in range(config.updates if batches else 0):  # Adam moves even on a zero gradient
            optimizer.zero_grad()
            totals = {}
            for index, (proposals, rows, advantages, mask) in enumerate(batches):
                recorded = proposals.log_probs[rows]  # (R, T)
                with actor.adapter():
                    log_probs = actor.log_probs(proposals, rows)  # (R, T)
                    if update == 0:
                        errors = (log_probs.detach() - recorded).abs()[mask]
                        # The mean: with a bf16 KV cache single tokens can differ a lot.
                        check_on_policy(errors, errors.mean().item(), config, figures)
                    loss, stats = clipped_loss(
                        log_probs, recorded, advantages, mask, count, *clip_bounds
                    )
                    if config.kl > 0:
                        kl = torch.where(mask, k3_kl(log_probs, references[index]), 0).sum()
                        loss = loss + config.kl * kl / count
                        stats["kl"] = kl.item() / count
                    loss.backward()
                add_stats(totals, stats)
            optimizer_step(optimizer, parameters, config, figures, totals)
        run.lap("update")
        run.finish(iteration, figures)
    run.close()


def phase2(loop, config, resume=False, changed=False):
    """Train the Editor on the instructions of the Actor, as phase 1 left it."""
    editor, G = loop.editor, config.group_size
    clip_bounds = (config.clip_low, config.clip_high)
    check_window(editor, config)
    torch.manual_seed(config.seed)
    parameters = editor.add_adapter(config.rank)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    run = Run(loop, config, editor, parameters, optimizer, resume, changed)

    for iteration in range(run.first, config.iterations):
        # 1. States: new images that do not satisfy the Checker.
        states, solved = unsatisfied_images(loop, run.graphs, config, iteration)
        run.lap("generate")
        rounds = []  # the `Samples` of each round
        asked = unedited = 0
        for number in range(config.rounds):
            if not states:
                break
            rng = random.Random(f"{config.seed} round {iteration} {number}")
            seed = rng.randrange(1 << 30)

            # 2. One instruction per state. States for which the Actor wrote none are left out.
            proposals = loop.actor.propose(
                [state.image for state in states],
                [state.graph.prompt() for state in states],
                [state.reflection.feedback for state in states],
                seed=seed,
            )
            pairs = [
                (state, instruction)
                for state, instruction in zip(states, proposals.instructions)
                if instruction not in (None, "none")
            ]
            asked += len(states)
            unedited += len(states) - len(pairs)
            run.lap("act")

            # 3. Sample: G edits per state. A group shares the instruction, the initial latents and
            # all steps before the window; its members differ by the noise in the window alone.
            starts = [state for state, _ in pairs for _ in range(G)]  # (N)
            instructions = [instruction for _, instruction in pairs for _ in range(G)]  # (N)
            groups = [group for group in range(len(pairs)) for _ in range(G)]  # (N)
            first = random.Random(f"{seed} window").randint(0, config.window_start)
            window = range(first, first + config.window)
            # Whole groups per call; a pipeline that takes one image per call gets one group.
            chunk = G * (max(config.micro_batch // G, 1) if editor.batched else 1)
            rollouts = []
            with torch.no_grad():
                for start in range(0, len(starts), chunk):
                    rows = range(start, min(start + chunk, len(starts)))
                    rollout = editor.rollout(
                        [starts[row].image for row in rows],
                        [instructions[row] for row in rows],
                        [seed + EDIT_SEEDS + groups[row] for row in rows],
                        [seed + NOISE_SEEDS + row for row in rows],
                        window,
                        config.noise_level,
                    )
                    rollouts.append(rollout)
            run.lap("edit")

            # 4. Reward: the Checker's score of the edited image.
            images = [image for rollout in rollouts for image in rollout.images]  # (N)
            reflections = loop.checker.check(images, [start.graph for start in starts])
            run.lap("check")
            outcomes = [
                State(start.graph, image, reflection)
                for start, image, reflection in zip(starts, images, reflections)
            ]
            rewards = [reflection.score for reflection in reflections]  # (N)
            rounds.append(Samples(starts, outcomes, rewards, groups, rollouts))
            states = next_states(starts, outcomes, G, rng)

        # 5. Advantages, and micro-batches: one recorded step of R edits each. Flat groups are
        # masked out.
        batches = []  # (step, advantages (R, 1), mask (R, 1))
        for samples in rounds:
            start = 0
            for rollout in samples.actions:
                rows = slice(start, start + len(rollout.images))
                start = rows.stop
                device = rollout.steps[0].log_prob.device
                advantages, kept = samples.advantages(config, device)  # (N, 1) each
                if kept[rows].any():
                    batches += [(step, advantages[rows], kept[rows]) for step in rollout.steps]
        count = sum(mask.sum().item() for *_, mask in batches)  # trained steps of the iteration

        # 6. The KL reference is the base model. Outside `adapter()` that is what the Editor is.
        references = []  # the means of the base model's steps, (R, tokens, channels) each
        if config.kl > 0:
            with torch.no_grad():
                references = [editor.log_probs(step)[1] for step, *_ in batches]

        # 7. Update. The loss of every micro-batch is divided by the count of the whole step.
        figures = summarize(rounds, solved, config) | {"unedited": unedited / max(asked, 1)}
        set_learning_rate(optimizer, config, iteration)
        for update in range(config.updates if batches else 0):  # Adam moves even on a zero gradient
            optimizer.zero_grad()
            totals = {}
            for index, (step, advantages, mask) in enumerate(batches):
                recorded = step.log_prob[:, None]  # (R, 1)
                with editor.adapter():
                    log_probs, mean, std = editor.log_probs(step)
                    log_probs = log_probs[:, None]  # (R, 1)
                    if update == 0:
                        errors = (log_probs.detach() - recorded).abs()[mask]
                        check_on_policy(errors, errors.max().item(), config, figures)
                    # E[log rho] = -KL(old, new): with thousands of dimensions rho falls below the
                    # clip range whatever the advantage. GRPO-Guard (2510.22319) adds the KL back.
                    log_probs = log_probs + gaussian_kl(mean, step.mean, std)[:, None]
                    loss, stats = clipped_loss(
                        log_probs, recorded, advantages, mask, count, *clip_bounds
                    )
                    if config.kl > 0:
                        kl = gaussian_kl(mean, references[index], std)[:, None]  # (R, 1)
                        kl = torch.where(mask, kl, 0).sum()
                        loss = loss + config.kl * kl / count
                        stats["kl"] = kl.item() / count
                    loss.backward()
                add_stats(totals, stats)
            optimizer_step(optimizer, parameters, config, figures, totals)
        run.lap("update")
        run.finish(iteration, figures)
    run.close()


def unsatisfied_images(loop, graphs, config, iteration):
    """Up to `groups` states for round 1, and the share of new images that were right at once."""
    rng = random.Random(f"{config.seed} states {iteration}")
    states, generated = [], 0
    while len(states) < config.groups and generated < 10 * config.groups:
        chosen = rng.sample(graphs, min(config.groups, len(graphs)))
        generated += len(chosen)
        seeds = [rng.randrange(1 << 30) for _ in chosen]
        images = loop.diffuser.generate([graph.prompt() for graph in chosen], seeds)
        reflections = loop.checker.check(images, chosen)
        made = [State(*parts) for parts in zip(chosen, images, reflections)]
        states += [state for state in made if not state.reflection.satisfied]
    return states[: config.groups], 1 - len(states) / max(generated, 1)


def next_states(starts, outcomes, group_size, rng):
    """The states of the next round: one per group, as the loop would go on.

    Continue from one random sample of the group if it scored higher than the image it started from,
    otherwise from that image. A state that satisfies the Checker is done.
    """
    states = []
    for start in range(0, len(starts), group_size):
        member = start + rng.randrange(group_size)
        before, after = starts[member], outcomes[member]
        better = after if after.reflection.score > before.reflection.score else before
        if not better.reflection.satisfied:
            states.append(better)
    return states


def check_on_policy(errors, error, config, figures):
    """Before the first update the policy is still the one that sampled, so replay = recording.

    errors: |replayed - recorded log-prob| of a micro-batch; error: what of them must stay within
    the tolerance. Raises ValueError otherwise: the update would train on something else than what
    was sampled. Never assume old = new here; this is where bugs of a rollout show.
    """
    figures["replay_error"] = max(figures.get("replay_error", 0.0), errors.max().item())
    if not error <= config.tolerance:  # `not <=` also catches NaN
        raise ValueError(
            f"a replayed log-prob differs from the recorded one by {error:.1e}, more than "
            f"tolerance {config.tolerance:.0e}: the update does not see what was sampled; look for "
            "dropout, other batch shapes or another dtype"
        )


def set_learning_rate(optimizer, config, iteration):
    """Linear warm-up over the first `warmup` iterations."""
    warmth = min(1, (iteration + 1) / max(config.warmup, 1))
    optimizer.param_groups[0]["lr"] = config.learning_rate * warmth


def add_stats(totals, stats):
    """Sum the stats of a micro-batch into those of the step; of ratio_error keep the maximum."""
    for name, value in stats.items():
        before = totals.get(name, 0)
        totals[name] = max(before, value) if name == "ratio_error" else before + value


def optimizer_step(optimizer, parameters, config, figures, totals):
    """Clip the gradient and step, or skip the step if the gradient is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
    if math.isfinite(norm):
        optimizer.step()
        figures |= totals | {"grad_norm": norm}
    else:
        figures["skipped"] += 1


def summarize(rounds, solved, config):
    """The figures that both phases log."""
    rewards = [reward for samples in rounds for reward in samples.rewards]
    before = [start.reflection.score for samples in rounds for start in samples.starts]
    average = mean(rewards)
    return {
        "reward": average,
        "reward_std": mean([(reward - average) ** 2 for reward in rewards]) ** 0.5,
        "before": mean(before),
        "solved_at_once": solved,
        "samples": len(rewards),
        "groups": len(rewards) // config.group_size,
        "flat_groups": mean(
            [not kept for samples in rounds for kept in samples.advantages(config)[1]]
        ),
        "skipped": 0,
    }


def completion_figures(rounds):
    """What phase 1 logs about its completions: shares, and the mean length in tokens."""
    if not rounds:
        return {}
    proposals = [samples.actions for samples in rounds]
    instructions = [text for each in proposals for text in each.instructions]
    return {
        "malformed": mean([text is None for text in instructions]),
        "none": mean([text == "none" for text in instructions]),
        "truncated": mean([cut for each in proposals for cut in each.truncated]),
        "length": sum(each.mask.sum().item() for each in proposals) / len(instructions),
    }


def mean(values):
    return sum(values) / max(len(values), 1)


def check_window(editor, config):
    """Raise ValueError if the SDE window may reach the last denoising step, which is the ODE's."""
    steps = len(editor.call.get("sigmas") or "") or editor.call.get("num_inference_steps", math.inf)
    if config.window_start + config.window >= steps:
        raise ValueError(
            f"keys 'window_start', 'window': the window may reach step {config.window_start} + "
            f"{config.window} of {steps}; make it end before the last step"
        )


def validate(loop, start, config):
    """Run the loop on the validation prompts, always from the same generated images.

    Returns ({"val_checker", "val_sg_iou"}: the Checker's score and, in the embedded world, the exact
    metric of the best images, which nothing is trained on; the trajectories).
    """
    trajectories = [Trajectory(t.graph, t.seed, list(t.steps)) for t in start]
    for _ in range(config.rounds):
        loop.advance(trajectories)
    figures = {"val_checker": mean([t.best.reflection.score for t in trajectories])}
    if config.exact:
        from tiny.world import exact_graph, parse

        found = parse([t.best.image for t in trajectories])
        exact = [SceneGraph(*exact_graph(f, t.graph)) for f, t in zip(found, trajectories)]
        scores = [sg_iou(seen, t.graph)["sg_iou"] for seen, t in zip(exact, trajectories)]
        figures["val_sg_iou"] = mean(scores)
    return figures, trajectories


class Run:
    """The folder of a run: data, metrics, validation, checkpoint, adapter. No algorithm in here.

    The checkpoint is complete after every iteration: parameters, optimizer state, config, number of
    iterations. It is written aside and renamed, so a kill or a full disk leaves the previous one.
    """

    MAY_CHANGE = ("iterations", "validate_every", "run")  # keys that a resumed run may change
    PATIENCE = 5  # iterations in a row with nothing to learn before the run says so

    def __init__(self, loop, config, trained, parameters, optimizer, resume, changed):
        self.loop, self.config, self.trained = loop, config, trained
        self.parameters, self.optimizer = parameters, optimizer
        self.folder = Path(config.run)
        self.checkpoint = self.folder / "checkpoint.safetensors"
        (self.folder / "adapter").mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "a")  # released when this process ends, however
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.folder}: another process is training in this folder") from None
        if resume and not self.checkpoint.exists():
            raise ValueError(f"{self.folder}: holds no checkpoint; start without --resume")
        if self.checkpoint.exists() and not resume:
            raise ValueError(
                f"{self.folder}: holds a run; continue it with --resume, or set run=another/folder"
            )
        self.graphs = self.read(config.data, config.data_limit or None)
        held_out = self.read(config.validation, config.validation_limit)
        self.first = self.load_checkpoint(changed) if resume else 0
        self.rows = self.read_metrics() if self.first else []
        write(self.folder / "metrics.jsonl", "".join(row + "\n" for row in self.rows))
        write(self.folder / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        self.start = loop.start(held_out, list(range(len(held_out))))
        if not self.first:
            self.save_checkpoint(0)
            figures, trajectories = validate(loop, self.start, config)
            self.log(0, figures)
            record(self.folder, trajectories)
        self.say(
            f"training {sum(p.numel() for p in parameters):,} parameters; an iteration: up to "
            f"{config.groups} states x {config.group_size} samples in each of {config.rounds} "
            f"rounds, {config.updates} updates"
        )
        self.seconds, self.began = {}, time.perf_counter()

    def read(self, path, limit):
        return self.loop.diffuser.readable(load_laion_sg(path, limit), path)

    def lap(self, stage):
        """Add the time since the last lap to a stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.began
        self.began = now

    def finish(self, iteration, figures):
        """End an iteration: validate if it is time, log, and save all that a resumed run needs."""
        done, config = iteration + 1, self.config
        due = done % config.validate_every == 0 or done == config.iterations
        if due:
            scores, trajectories = validate(self.loop, self.start, config)
            figures |= scores
            self.lap("validate")
        self.log(done, figures, f"  {sum(self.seconds.values()):.1f}s")
        with (self.folder / "seconds.jsonl").open("a") as file:
            file.write(json.dumps({"iteration": done} | self.seconds) + "\n")
        self.warn()
        if due:
            self.trained.save_adapter(self.folder / "adapter")
            record(self.folder, trajectories, done)
        self.save_checkpoint(done)
        self.seconds, self.began = {}, time.perf_counter()

    def close(self):
        self.trained.save_adapter(self.folder / "adapter")  # a killed run may not have saved it
        self.say(f"adapter: {self.folder / 'adapter'}")

    def warn(self):
        """Say so if nothing was learned for some time; raise if no gradient was finite."""
        recent = [json.loads(row) for row in self.rows[1:][-self.PATIENCE :]]
        if len(recent) < self.PATIENCE:
            return
        if all(row["skipped"] for row in recent):
            raise FloatingPointError(
                f"gradients were not finite in {self.PATIENCE} iterations in a row; the checkpoint "
                "is from before any harm: lower learning_rate, or use a wider dtype"
            )
        if all(row["flat_groups"] > 0.95 or not row["samples"] for row in recent):
            self.say(
                f"warning: nothing to learn from in {self.PATIENCE} iterations: the rewards within "
                "each group are the same, or no image fails the Checker; look at the report"
            )

    def log(self, done, figures, end=""):
        """One line of metrics.jsonl, and one that a person can read."""
        self.rows.append(json.dumps({"iteration": done} | figures))
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(self.rows[-1] + "\n")
        short = {"flat_groups": "flat", "replay_error": "replay", "ratio_error": "max|rho-1|"}
        short |= {"grad_norm": "grad", "clipped_low": "clip-", "clipped_high": "clip+"}
        names = ["reward", "before", "kl", "malformed", *short, "val_checker", "val_sg_iou"]
        shown = [
            f"{short.get(name, name)} {figures[name]:.3g}" for name in names if name in figures
        ]
        self.say(f"{done:4d}  {'  '.join(shown)}{end}")

    def say(self, line):
        print(line, flush=True)
        with (self.folder / "log").open("a") as file:
            file.write(line + "\n")

    def read_metrics(self):
        """The lines up to the checkpoint's iteration; later ones will be made again."""
        path = self.folder / "metrics.jsonl"
        rows = path.read_text().splitlines()[: self.first + 1]
        if len(rows) <= self.first or not rows[-1].endswith("}"):
            raise ValueError(f"{path}: lacks iterations of the checkpoint; start a new run")
        return rows

    def save_checkpoint(self, done):
        """Raises OSError if it cannot be written; the previous checkpoint is then still there."""
        tensors = {f"parameter.{i}": value for i, value in enumerate(self.parameters)}
        for index, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
        tensors = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
        metadata = {"iterations": str(done), "config": json.dumps(asdict(self.config))}
        aside = self.folder / "aside.safetensors"
        try:
            save_file(tensors, aside, metadata)
            os.replace(aside, self.checkpoint)
        except (OSError, SafetensorError) as error:  # the latter does not name the file
            aside.unlink(missing_ok=True)
            raise OSError(f"{self.checkpoint}: cannot be written ({error})") from None

    def load_checkpoint(self, changed):
        """Restore parameters and optimizer; returns the number of iterations done.

        Raises ValueError for a damaged file and, unless `changed`, for one of another config.
        """
        path = self.checkpoint
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            saved, done = json.loads(metadata["config"]), int(metadata["iterations"])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: is damaged ({error}); start in another folder") from None
        now = json.loads(json.dumps(asdict(self.config)))
        differences = [
            f"{key} ({saved.get(key)!r} then, {now.get(key)!r} now)"
            for key in {**saved, **now}
            if key not in self.MAY_CHANGE and saved.get(key) != now.get(key)
        ]
        if differences and not changed:
            raise ValueError(
                f"{path}: was made with another config: {'; '.join(differences)}; undo that, or "
                "add --changed to continue with the new one"
            )
        shapes = [tensors[n].shape for n in tensors if n.startswith("parameter.")]
        if sorted(shapes) != sorted(parameter.shape for parameter in self.parameters):
            raise ValueError(f"{path}: holds another adapter (model or rank); start a new run")
        for index, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors.pop(f"parameter.{index}"))
        state = {}  # of AdamW: {parameter index: {"step", "exp_avg", "exp_avg_sq"}}
        for name, value in tensors.items():
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        return done


def main():
    parser = argparse.ArgumentParser(description="Reflection-GRPO.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a YAML value")
    parser.add_argument("--phase", type=int, choices=(1, 2), required=True)
    parser.add_argument("--config", help="default: phase1.yaml or phase2.yaml")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--changed", action="store_true", help="resume with a changed config")
    arguments = parser.parse_intermixed_args()
    path = arguments.config or f"phase{arguments.phase}.yaml"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    folder = None
    try:
        config = load_config(path, TrainConfig, arguments.overrides)
        folder = Path(config.run)
        if config.phase not in (None, arguments.phase):
            raise ValueError(f"{path}: is for phase {config.phase}; use --phase {config.phase}")
        name, train = (("actor", phase1), ("editor", phase2))[arguments.phase - 1]
        if getattr(config, name).adapter:
            raise ValueError(f"{path}: key '{name}.adapter': this phase trains a new one; drop it")
        train(build(config), config, arguments.resume, arguments.changed)
    except (ValueError, FloatingPointError, RuntimeError) as error:
        sys.exit(" ".join(f"train.py: {error}".split()))
    except (OSError, SafetensorError) as error:  # SafetensorError does not name the file
        sys.exit(" ".join(f"train.py: {folder}: {error}".split()))
    except KeyboardInterrupt:
        if folder is None or not (folder / "checkpoint.safetensors").exists():
            sys.exit("stopped before the first checkpoint")
        words = ["python", *(word for word in sys.argv if word != "--resume"), "--resume"]
        sys.exit(f"stopped; continue with: {shlex.join(words)}")


if __name__ == "__main__":
    main()
