"""Reflection-GRPO (RL-RIG, arXiv 2602.19974): trains the Actor (phase 1) or the Editor (phase 2).

Read `phase1`, then `phase2`, then the functions they call. `Run`, at the end, only keeps files.
Both phases repeat the same seven steps in every iteration:

    1 states      images of training prompts that the Checker is not satisfied with
    2 sample      a group of G samples per state
    3 reward      the Checker's score of the edited image against the prompt's scene graph; in
                  phase 1 of the better of the two images, the one that the loop keeps
    4 advantages  each sample compared with the other samples of its group
    5 reference   log-probs or means of the base model, for the KL
    6 replay      log-probs of the recorded actions again, now with gradient
    7 update      clipped loss + KL, then an optimizer step; steps 6 and 7 run `updates` times

                   phase 1: the Actor                 phase 2: the Editor
    a sample       a completion, and the edit         an edited image
                   that it asks for
    an action      a token                            a denoising step in a random SDE window
    a group        one image, one seed of the         one image, one instruction, one seed of the
    shares         edits: instructions are compared,  latents and all steps before the window: the
                   not the Editor's luck              noise in the window is compared

Steps 2-4 run `rounds` times: a later round starts from what the one before made, as in the loop.
All randomness is drawn from the seed, the iteration and the round, so a resumed run ends with the
same adapter, on a CPU bit for bit. What a `config.` key means stands at its field in config.py.

    python train.py --phase 1 --config phase1.yaml
    python train.py --phase 2 --config phase2.yaml kl=0 --resume
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import random
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# Waiting OpenMP threads spin. By default they do it for so long that a second busy process makes an
# iteration ten times slower. Has to be set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if __name__ == "__main__":  # Ctrl-C before training has begun: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import TrainConfig, load_config
from grpo import clipped_loss, gaussian_kl, group_advantages, k3_kl
from loop import Trajectory, build, sha256_sums
from report import record, say, write
from sgiou import SceneGraph, load_graphs

# Added to the seed of a round, so that its edits and their noise have seeds of their own.
EDIT_SEEDS, NOISE_SEEDS = 2_000_000, 1_000_000


@dataclass
class State:
    """An image for a scene graph, and what the Checker says about it."""

    graph: SceneGraph
    image: object
    reflection: object
    tried: tuple = ()  # instructions that were carried out on this image and did not help


@dataclass
class Samples:
    """The N = states * G samples of one round; those of a group are neighbors."""

    before: list[State]  # (N) where each sample started
    after: list[State]  # (N) what it led to
    rewards: list[float]  # (N)
    advantages: torch.Tensor  # (N, 1)
    kept: torch.Tensor  # (N, 1) bool, False in flat groups
    recorded: object  # `Proposals` (phase 1) or a list of `Rollout`s (phase 2)


def phase1(loop, config, resume=False):
    """Train the Actor through the frozen Editor."""
    actor, G = loop.actor, config.group_size
    torch.manual_seed(config.seed)
    parameters = actor.add_adapter(config.rank)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    # Locks the folder, loads the data and, to resume, the checkpoint; validates the start.
    run = Run(loop, config, actor, parameters, optimizer, resume)

    for iteration in range(run.first, config.iterations):
        # 1. States: new images that do not satisfy the Checker.
        states, satisfied = unsatisfied_images(loop, run.graphs, config, iteration)
        run.lap("generate")
        rounds = []  # the `Samples` of each round
        for round in range(config.rounds):
            if not states:
                break
            rng = random.Random(f"{config.seed} round {iteration} {round}")
            seed = rng.randrange(1 << 30)

            # 2. Sample G completions per state.
            proposals = actor.propose(
                [state.image for state in states],
                [state.graph.prompt() for state in states],
                [state.reflection.feedback for state in states],
                seeds=range(seed, seed + len(states)),
                tried=[state.tried for state in states],
                n=G,
            )
            before = [state for state in states for _ in range(G)]  # (N)
            groups = [group for group in range(len(states)) for _ in range(G)]  # (N)
            run.lap("act")

            # Carry out the instructions. All edits of a group have one seed, so that their rewards
            # differ only by the instruction; equal instructions of a group are edited only once,
            # and those that were tried on this image before not at all.
            pairs = list(zip(groups, proposals.instructions))  # (N)
            edits = [pair for pair in dict.fromkeys(pairs) if is_new_edit(states[pair[0]], pair[1])]
            images = loop.editor.edit(
                [states[group].image for group, _ in edits],
                [instruction for _, instruction in edits],
                [seed + EDIT_SEEDS + group for group, _ in edits],
            )
            run.lap("edit")
            reflections = loop.checker.check(images, [states[group].graph for group, _ in edits])
            run.lap("check")

            # 3. Reward: the Checker's score of the better of the two images, because the loop keeps
            # that one. An edit that makes things worse costs nothing then; if it did, the Actor
            # would learn to write "none". That, malformed completions, and repeated instructions
            # leave the image as it was; a malformed one also loses a penalty.
            edited = {
                pair: State(states[pair[0]].graph, image, reflection)
                for pair, image, reflection in zip(edits, images, reflections)
            }
            after = [edited.get(pair, states[pair[0]]) for pair in pairs]  # (N)
            rewards = [
                max(old.reflection.score, new.reflection.score)
                - config.malformed * (instruction is None)
                for old, new, instruction in zip(before, after, proposals.instructions)
            ]  # (N)

            # 4. Advantages within each group.
            advantages, kept = compare(rewards, config)  # (N, 1) each
            rounds.append(Samples(before, after, rewards, advantages, kept, proposals))
            states = next_states(before, after, proposals.instructions, G, rng)

        # Micro-batches of R completions. Padding and flat groups are masked out.
        batches = []  # (proposals, rows, advantages (R, 1), mask (R, T))
        for samples in rounds:
            proposals = samples.recorded
            for first in range(0, len(samples.rewards), config.micro_batch):
                rows = slice(first, first + config.micro_batch)
                advantages, kept = samples.advantages[rows], samples.kept[rows]
                mask = proposals.mask[rows] & kept.to(proposals.mask.device)
                if mask.any():
                    batches.append((proposals, rows, advantages.to(mask.device), mask))
        count = sum(mask.sum().item() for *_, mask in batches)  # trained tokens of the iteration

        # 5. Reference. Outside `adapter()` the Actor is the base model.
        references = []  # (R, T) each, the same for all updates
        if config.kl > 0:
            with torch.no_grad():
                references = [actor.log_probs(proposals, rows) for proposals, rows, *_ in batches]

        metrics = describe(rounds, satisfied, config) | describe_completions(rounds)
        set_learning_rate(optimizer, config, iteration)
        for update in range(config.updates if batches else 0):  # no kept group: no step
            optimizer.zero_grad()
            stats = {}
            for index, (proposals, rows, advantages, mask) in enumerate(batches):
                old_log_probs = proposals.log_probs[rows]  # (R, T)
                with actor.adapter():
                    # 6. Replay. In the first update the policy is still the one that sampled, so
                    # these must be the recorded log-probs. `backward` has to be inside `adapter()`.
                    log_probs = actor.log_probs(proposals, rows)  # (R, T)
                    if update == 0:
                        check_on_policy(log_probs, old_log_probs, mask, count, config, metrics)
                    # 7. Update. Dividing by the count of the whole iteration makes the gradients
                    # of the micro-batches add up to that of one large batch.
                    kl = k3_kl(log_probs, references[index]) if references else None  # (R, T)
                    loss = policy_loss(
                        log_probs, old_log_probs, advantages, mask, count, kl, config, stats
                    )
                    loss.backward()
            optimizer_step(optimizer, parameters, config, stats, metrics)
        run.lap("update")
        run.finish(iteration, metrics)
    run.close()


def phase2(loop, config, resume=False):
    """Train the Editor on the instructions that the Actor writes."""
    editor, G = loop.editor, config.group_size
    check_window(editor, config)
    torch.manual_seed(config.seed)
    parameters = editor.add_adapter(config.rank)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    run = Run(loop, config, editor, parameters, optimizer, resume)

    for iteration in range(run.first, config.iterations):
        # 1. States: new images that do not satisfy the Checker.
        states, satisfied = unsatisfied_images(loop, run.graphs, config, iteration)
        run.lap("generate")
        rounds = []  # the `Samples` of each round
        states_asked = 0  # of the Actor, for an instruction
        for round in range(config.rounds):
            if not states:
                break
            rng = random.Random(f"{config.seed} round {iteration} {round}")
            seed = rng.randrange(1 << 30)

            # 2. One instruction per state. A state for which the Actor writes none, or one that was
            # tried, is dropped for this iteration.
            proposals = loop.actor.propose(
                [state.image for state in states],
                [state.graph.prompt() for state in states],
                [state.reflection.feedback for state in states],
                seeds=range(seed, seed + len(states)),
                tried=[state.tried for state in states],
            )
            edits = [
                (state, instruction)
                for state, instruction in zip(states, proposals.instructions)
                if is_new_edit(state, instruction)
            ]
            states_asked += len(states)
            run.lap("act")
            if not edits:
                break

            # Sample G edits per state. A group shares the instruction, the initial latents and all
            # steps before the window; its members differ only by the noise in the window.
            before = [state for state, _ in edits for _ in range(G)]  # (N)
            instructions = [instruction for _, instruction in edits for _ in range(G)]  # (N)
            groups = [group for group in range(len(edits)) for _ in range(G)]  # (N)
            start = rng.randint(0, config.latest_window_start)
            window = range(start, start + config.window)
            # A call takes whole groups: as many as `micro_batch` allows but at least one, and just
            # one if the pipeline cannot edit different images together.
            chunk = G * (max(config.micro_batch // G, 1) if editor.batched else 1)
            rollouts = []
            for first in range(0, len(before), chunk):
                rows = range(first, min(first + chunk, len(before)))
                with torch.no_grad():
                    rollout = editor.rollout(
                        [before[row].image for row in rows],
                        [instructions[row] for row in rows],
                        [seed + EDIT_SEEDS + groups[row] for row in rows],
                        [seed + NOISE_SEEDS + row for row in rows],
                        window,
                        config.noise_level,
                    )
                rollouts.append(rollout)
            run.lap("edit")

            # 3. Reward: the Checker's score of the edited image.
            images = [image for rollout in rollouts for image in rollout.images]  # (N)
            graphs = [state.graph for state in before]
            reflections = loop.checker.check(images, graphs)
            run.lap("check")
            after = [State(*parts) for parts in zip(graphs, images, reflections)]  # (N)
            rewards = [reflection.score for reflection in reflections]  # (N)

            # 4. Advantages within each group.
            advantages, kept = compare(rewards, config)  # (N, 1) each
            rounds.append(Samples(before, after, rewards, advantages, kept, rollouts))
            states = next_states(before, after, instructions, G, rng)

        # Micro-batches: one recorded step of the R edits of a rollout. Flat groups are masked out.
        batches = []  # (step, advantages (R, 1), mask (R, 1))
        for samples in rounds:
            first = 0
            for rollout in samples.recorded:
                rows = slice(first, first + len(rollout.images))
                first = rows.stop
                if samples.kept[rows].any():
                    device = rollout.steps[0].log_prob.device
                    advantages = samples.advantages[rows].to(device)
                    mask = samples.kept[rows].to(device)
                    batches += [(step, advantages, mask) for step in rollout.steps]
        count = sum(mask.sum().item() for *_, mask in batches)  # trained steps of the iteration

        # 5. Reference. Outside `adapter()` the Editor is the base model.
        references = []  # means of the base model's steps, (R, tokens, channels) each
        if config.kl > 0:
            with torch.no_grad():
                references = [editor.log_probs(step)[1] for step, *_ in batches]

        metrics = describe(rounds, satisfied, config)
        metrics["unedited"] = (states_asked - metrics["groups"]) / max(states_asked, 1)
        set_learning_rate(optimizer, config, iteration)
        for update in range(config.updates if batches else 0):  # no kept group: no step
            optimizer.zero_grad()
            stats = {}
            for index, (step, advantages, mask) in enumerate(batches):
                old_log_probs = step.log_prob[:, None]  # (R, 1)
                with editor.adapter():
                    # 6. Replay. In the first update the policy is still the one that sampled, so
                    # these must be the recorded log-probs. `backward` has to be inside `adapter()`.
                    log_prob, mean, std = editor.log_probs(step)  # (R,), (R, tokens, channels)
                    log_probs = log_prob[:, None]  # (R, 1)
                    if update == 0:
                        check_on_policy(log_probs, old_log_probs, mask, count, config, metrics)
                    # 7. Update, as in phase 1. But log rho averages to -KL(old, new), not to 0,
                    # even for an unbiased change. Over thousands of dimensions that is more than
                    # the clip range, so the KL is added back (GRPO-Guard, arXiv 2510.22319).
                    log_probs = log_probs + gaussian_kl(mean, step.mean, std)[:, None]
                    kl = gaussian_kl(mean, references[index], std)[:, None] if references else None
                    loss = policy_loss(
                        log_probs, old_log_probs, advantages, mask, count, kl, config, stats
                    )
                    loss.backward()
            optimizer_step(optimizer, parameters, config, stats, metrics)
        run.lap("update")
        run.finish(iteration, metrics)
    run.close()


def unsatisfied_images(loop, graphs, config, iteration):
    """Up to `groups` states for round 1, and the share of new images that satisfy the Checker."""
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


def is_new_edit(state, instruction):
    """Whether the loop would carry it out: it asks for an edit that was not tried here before."""
    return instruction not in (None, "none", *state.tried)


def next_states(before, after, instructions, group_size, rng):
    """The states of the next round: one per group, as the loop continues from its best image.

    Continue from one random sample of the group if it scored higher than the image it started from.
    Otherwise continue from that image, and let the Actor read that the instruction did not help.
    A state that satisfies the Checker is done.
    """
    states = []
    for first in range(0, len(before), group_size):
        member = first + rng.randrange(group_size)
        state, new, instruction = before[member], after[member], instructions[member]
        if new.reflection.score > state.reflection.score:
            state = new
        elif is_new_edit(state, instruction):
            state = replace(state, tried=(*state.tried, instruction))
        if not state.reflection.satisfied:
            states.append(state)
    return states


def compare(rewards, config):
    """Advantages (N, 1), and which samples are kept (N, 1): False in flat groups."""
    groups = len(rewards) // config.group_size
    rewards = torch.tensor(rewards).view(groups, config.group_size)
    advantages, kept = group_advantages(rewards, config.advantage_eps, config.flat_range)
    return advantages.reshape(-1, 1), kept.expand_as(rewards).reshape(-1, 1)


def check_on_policy(log_probs, old_log_probs, mask, count, config, metrics):
    """Raise ValueError if an iteration's first replay does not give the recorded log-probs.

    Then the update would train on something other than what was sampled. Never set old = new
    instead: this check is where the bugs of a rollout show. What must stay within the tolerance is
    the mean difference over all trained actions of the iteration (count), summed up over the
    micro-batches: with a bf16 KV cache single tokens differ a lot although nothing is wrong.
    """
    error = (log_probs.detach() - old_log_probs).abs()[mask].sum().item() / count
    metrics["replay_error"] = metrics.get("replay_error", 0.0) + error
    if not metrics["replay_error"] <= config.tolerance:  # `not <=` also catches NaN
        raise ValueError(
            f"replayed log-probs differ from the recorded ones by {metrics['replay_error']:.1e} on "
            f"average, more than tolerance {config.tolerance:.0e}: the update does not see what "
            "was sampled; look for dropout, other batch shapes or another dtype"
        )


def policy_loss(log_probs, old_log_probs, advantages, mask, count, kl, config, stats):
    """Clipped loss plus weighted KL of one micro-batch, and its share of the step's stats.

    Shapes as in `clipped_loss`; kl: (R, T) per action, or None. Both terms are sums over the
    trained actions divided by count, the trained actions of the whole iteration.
    """
    loss, found = clipped_loss(
        log_probs, old_log_probs, advantages, mask, count, config.clip_low, config.clip_high
    )
    if kl is not None:
        kl = torch.where(mask, kl, 0).sum()
        loss = loss + config.kl * kl / count
        found["kl"] = kl.item() / count
    for name, value in found.items():
        before = stats.get(name, 0)
        stats[name] = max(before, value) if name == "ratio_error" else before + value
    return loss


def set_learning_rate(optimizer, config, iteration):
    """Linear warm-up over the first `warmup` iterations."""
    scale = min(1, (iteration + 1) / max(config.warmup, 1))
    optimizer.param_groups[0]["lr"] = config.learning_rate * scale


def optimizer_step(optimizer, parameters, config, stats, metrics):
    """Clip the gradient and step, or skip a step whose gradient is not finite.

    Adds the stats of the step to the metrics, so that those of the last step remain.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
    if config.offload:  # a resumed run has Adam's state in main memory, where the parameters were
        for parameter, state in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(parameter.device)
    if math.isfinite(norm):
        optimizer.step()
        metrics |= stats | {"grad_norm": norm}
    else:
        metrics["skipped"] += 1


def describe(rounds, satisfied, config):
    """The metrics of an iteration's samples, for both phases (docs/training.md explains each)."""
    rewards = [reward for samples in rounds for reward in samples.rewards]
    before = [state.reflection.score for samples in rounds for state in samples.before]
    masses = [state.reflection.mass for samples in rounds for state in samples.after]
    if not rewards:  # nothing was sampled, so there is nothing to average
        return {"solved_at_once": satisfied, "samples": 0, "groups": 0, "skipped": 0}
    kept = [flag for samples in rounds for flag in samples.kept.flatten().tolist()]
    center = average(rewards)
    return {
        "reward": center,
        "reward_std": average([(reward - center) ** 2 for reward in rewards]) ** 0.5,
        "before": average(before),
        "answered": average(masses),
        "solved_at_once": satisfied,
        "samples": len(rewards),
        "groups": len(rewards) // config.group_size,
        "flat_groups": 1 - average(kept),
        "skipped": 0,
    }


def describe_completions(rounds):
    """Metrics of phase 1: shares of completions, and their mean length in tokens."""
    if not rounds:
        return {}
    proposals = [samples.recorded for samples in rounds]
    instructions = [instruction for each in proposals for instruction in each.instructions]
    return {
        "malformed": average([instruction is None for instruction in instructions]),
        "none": average([instruction == "none" for instruction in instructions]),
        "truncated": average([cut for each in proposals for cut in each.truncated]),
        "length": sum(each.mask.sum().item() for each in proposals) / len(instructions),
    }


def average(values):
    return sum(values) / max(len(values), 1)


def check_window(editor, config):
    """Raise ValueError if the SDE window may reach the last denoising step, which is the ODE's."""
    steps = editor.call.get("num_inference_steps")
    end = config.latest_window_start + config.window
    if steps is None or end >= steps:
        raise ValueError(
            f"keys 'latest_window_start', 'window': the window may end at step {end}, and "
            f"'editor.call.num_inference_steps' is {steps}; make it end before the last step"
        )


def validate(loop, first, config):
    """Run the loop on the validation prompts, always from the same generated images.

    Returns the metrics and the trajectories. val_checker: the Checker's score of the best images.
    val_sg_iou: their exact metric, which nothing is trained on; embedded world only.
    """
    trajectories = [Trajectory(t.graph, t.seed, list(t.steps)) for t in first]
    for _ in range(config.rounds):
        loop.advance(trajectories)
    metrics = {"val_checker": average([t.best.reflection.score for t in trajectories])}
    if config.exact:
        from tiny.world import exact_scores

        scores = exact_scores([t.best.image for t in trajectories], [t.graph for t in trajectories])
        metrics["val_sg_iou"] = average([score["sg_iou"] for score in scores])
    return metrics, trajectories


class Run:
    """The files of a run: data, validation, metrics, checkpoint, adapter. No algorithm in here.

    The checkpoint holds all that a resumed run needs: parameters, optimizer state, metrics so far
    and config. It is written aside and renamed after every iteration, so a kill or a full disk
    leaves the previous one.
    """

    MAY_CHANGE = ("iterations", "validate_every", "run")  # keys that a resumed run may change

    def __init__(self, loop, config, trained, parameters, optimizer, resume):
        self.loop, self.config, self.trained = loop, config, trained
        self.parameters, self.optimizer = parameters, optimizer
        self.folder = Path(config.run)
        self.checkpoint = self.folder / "checkpoint.safetensors"
        (self.folder / "adapter").mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "a")
        try:
            # Released when this process exits for any reason. A notebook may lock it again.
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.folder}: another process is training in this folder") from None
        if resume != self.checkpoint.exists():
            raise ValueError(
                f"{self.folder}: holds no checkpoint; start without --resume"
                if resume
                else f"{self.folder}: holds a run; continue it with --resume, or set run=another"
            )
        self.graphs = self.read(config.data, config.data_limit or None)
        held_out = self.read(config.validation, config.validation_limit)
        self.rows = self.load_checkpoint() if resume else []  # metrics by iteration, from 0 on
        self.first = max(len(self.rows) - 1, 0)
        write(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        write(self.folder / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        self.first_images = loop.start(held_out, list(range(len(held_out))))
        if not resume:
            metrics, trajectories = validate(loop, self.first_images, config)
            self.log(0, metrics)
            record(self.folder, trajectories)
        say(
            f"training {sum(p.numel() for p in parameters):,} parameters; an iteration: up to "
            f"{config.groups} states x {config.group_size} samples in each of {config.rounds} "
            f"rounds, {config.updates} updates"
        )
        self.seconds, self.began = {}, time.perf_counter()

    def read(self, path, limit):
        graphs = load_graphs(path, self.config.relations, limit)
        return self.loop.diffuser.readable(graphs, path)

    def lap(self, stage):
        """Add the time since the last lap to a stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.began
        self.began = now

    def finish(self, iteration, metrics):
        """End an iteration: validate if it is time, log, and save."""
        done, config = iteration + 1, self.config
        validated = done % config.validate_every == 0 or done == config.iterations
        if validated:
            scores, trajectories = validate(self.loop, self.first_images, config)
            metrics |= scores
            self.lap("validate")
        self.log(done, metrics, f"  {sum(self.seconds.values()):.1f}s")
        with (self.folder / "seconds.jsonl").open("a") as file:
            file.write(json.dumps({"iteration": done} | self.seconds) + "\n")
        recent = self.rows[1:][-5:]  # row 0 is from before training
        if len(recent) == 5 and all(
            row.get("flat_groups", 1) > 0.95 or row["skipped"] for row in recent
        ):
            say(
                "warning: nothing was learned in 5 iterations: no image fails the Checker, rewards "
                "within each group are the same, or gradients are not finite; look at the report"
            )
        if validated:
            self.save_adapter()
            record(self.folder, trajectories, done)
        self.save_checkpoint()
        self.seconds, self.began = {}, time.perf_counter()

    def save_adapter(self):
        self.trained.save_adapter(self.folder / "adapter")
        write(self.folder / "adapter" / "SHA256SUMS", sha256_sums(self.folder / "adapter"))

    def close(self):
        self.save_adapter()  # a killed run may not have got there
        say(f"adapter: {self.folder / 'adapter'}")
        self.lock.close()

    def log(self, done, metrics, end=""):
        """One line of metrics.jsonl, and one that a person can read."""
        self.rows.append({"iteration": done} | metrics)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        names = "reward before kl malformed flat_groups replay_error ratio_error grad_norm"
        names += " clipped_low clipped_high val_checker val_sg_iou"
        shown = [f"{name} {metrics[name]:.3g}" for name in names.split() if name in metrics]
        say(f"{done:4d}  {'  '.join(shown)}{end}")

    def fingerprint(self):
        """What a resumed run must share: the config and the content of the files it reads."""
        config = {k: v for k, v in asdict(self.config).items() if k not in self.MAY_CHANGE}
        files = [self.config.data, self.config.validation]
        for folder in filter(None, (self.config.actor.adapter, self.config.editor.adapter)):
            files += sorted(map(str, Path(folder).glob("*.safetensors")))
        hashes = {
            f"content of {f}": hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files
        }
        return json.loads(json.dumps(config | hashes))

    def save_checkpoint(self):
        """Raises OSError if it cannot be written; the previous checkpoint is then still there."""
        tensors = {f"parameter.{i}": value for i, value in enumerate(self.parameters)}
        for index, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        metadata = {"metrics": self.rows, "made with": self.fingerprint()}
        metadata["checksum"] = checksum(tensors)
        metadata = {name: json.dumps(value) for name, value in metadata.items()}
        aside = self.folder / "aside.safetensors"
        try:
            save_file(tensors, aside, metadata)
            os.replace(aside, self.checkpoint)
        except (OSError, SafetensorError) as error:  # the latter does not name the file
            aside.unlink(missing_ok=True)
            raise OSError(f"{self.checkpoint}: cannot be written ({error})") from None

    def load_checkpoint(self):
        """Restore parameters and optimizer; returns the metrics so far.

        Raises ValueError for a damaged file, and for one of another config or other input files.
        """
        path = self.checkpoint
        try:
            with safe_open(path, "pt") as file:
                saved = {name: json.loads(value) for name, value in file.metadata().items()}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if saved["checksum"] != checksum(tensors):
                raise ValueError("its checksum does not match")
            if sum(name.startswith("parameter.") for name in tensors) != len(self.parameters):
                raise ValueError("it is of another model")
            then, now = saved["made with"], self.fingerprint()
        except (OSError, SafetensorError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: is damaged ({error}); start in another folder") from None
        differences = [
            f"{key} ({then.get(key)!r} then, {now.get(key)!r} now)"
            for key in {**then, **now}
            if then.get(key) != now.get(key)
        ]
        if differences:
            raise ValueError(
                f"{path}: was saved with a different config: {'; '.join(differences)}; undo that, "
                "or start a new run that continues from this adapter"
            )
        state = {}  # of AdamW: {parameter index: {"step", "exp_avg", "exp_avg_sq"}}
        for name, value in tensors.items():
            kind, index, *key = name.split(".")
            if kind == "parameter":
                self.parameters[int(index)].data.copy_(value)
            else:
                state.setdefault(int(index), {})[key[0]] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        return saved["metrics"]


def checksum(tensors):
    """sha256 of named tensors. Disks and copies do flip bits, which safetensors does not notice."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def main():
    parser = argparse.ArgumentParser(description="Reflection-GRPO.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a YAML value")
    parser.add_argument("--phase", type=int, choices=(1, 2), required=True)
    parser.add_argument("--config", help="default: phase1.yaml or phase2.yaml")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    arguments = parser.parse_intermixed_args()
    path = arguments.config or f"phase{arguments.phase}.yaml"

    def stop(*_):
        """End at once. Nothing is lost but this iteration: the checkpoint is complete."""
        words = ["python", *(word for word in sys.argv if word != "--resume"), "--resume"]
        if (Path(config.run) / "checkpoint.safetensors").exists():
            say(f"stopped; continue with: {shlex.join(words)}")
        else:
            say("stopped before the first checkpoint")
        os._exit(1)

    try:
        config = load_config(path, TrainConfig, arguments.overrides)
        if config.phase not in (None, arguments.phase):
            raise ValueError(f"{path}: is for phase {config.phase}; use --phase {config.phase}")
        loop = build(config)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        (phase1, phase2)[arguments.phase - 1](loop, config, arguments.resume)
    except (ValueError, FloatingPointError, RuntimeError, OSError, SafetensorError) as error:
        sys.exit(" ".join(f"train.py: {error}".split()))


if __name__ == "__main__":
    main()
