"""Reflection-GRPO (RL-RIG, arXiv 2602.19974): trains the Actor (phase 1) or the Editor (phase 2).

Read `phase1`, then `phase2`, then on to `add_figures`: the rest is log, validation, files, and the
command line. Both phases do this:

    for every iteration:
        1 states          newly generated images that the Checker is not satisfied with
        for every round:
            2 sample      a group of G samples per state
            3 reward      from the Checker's score
            4 advantages  each sample compared with its group
              then        the states of the next round: `next_states`
        5 reference       the recorded actions under the base model, for the KL
        for every update, on all samples of the iteration:
            6 replay      log-probs of the recorded actions again, now with gradient; before the
                          first update they have to be the recorded ones: `check_on_policy`
            7 update      clipped loss + KL, then an optimizer step

                    phase 1: the Actor                   phase 2: the Editor
    a sample        a completion, and the edit that      an edited image
                    it asks for
    an action       a token                              a noisy (SDE) denoising step
    a group shares  the state, the seed of its edits     the state, the instruction, the initial
                                                         latents
    the reward      score of the better image, edited    score of the edited image
                    or old, minus a penalty for a
                    malformed completion
    the YAML files  16 groups of 8, 4 rounds,            16 groups of 12, 4 rounds,
    in this folder  1 update                             1 update

Shapes: a round has N samples, G per state. A backward pass takes B of them with T actions each (in
phase 2 T = 1: each recorded step is a batch of its own). Gradients add up over all batches before
an optimizer step. `TrainConfig` in config.py explains every `config.` key. `figures`, `stats` and
`metrics` are for the log.

    python train.py --phase 1 --config phase1.yaml
    python train.py --phase 2 --config phase2.yaml actor.adapter=runs/phase1/adapter
"""

import signal

if __name__ == "__main__":  # Ctrl-C before training has begun: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import hashlib
import json
import math
import os
import random
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

# Idle OpenMP threads spin, by default for so long that a second busy process makes an iteration
# five times slower. Has to be set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from config import TrainConfig, differences, fingerprint, load_config
from eval import grade, load_judge
from grpo import clipped_loss, gaussian_kl, group_advantages, k3_kl
from loop import LOCKS, Trajectory, build, lock, sha256_sums, unlock
from report import record, say, write
from sgiou import SceneGraph, load_graphs

# Added to the seed of a round, so that completions, noise and edits never share a seed.
NOISE_OFFSET, EDIT_OFFSET = 1_000_000, 2_000_000
CHECKPOINT = "checkpoint.safetensors"  # in a run's folder
MAY_CHANGE = ("iterations", "validate_every", "run")  # keys that a resumed run may change


@dataclass
class State:
    """An image for a scene graph, and what the Checker says about it."""

    graph: SceneGraph
    image: object
    reflection: object
    tried: tuple = ()  # instructions that were carried out on this image and did not help


@dataclass
class Batch:
    """What one backward pass trains on: B samples of up to T actions each."""

    recorded: object  # phase 1: (Proposals, rows) of actor.py, phase 2: editor.py's RecordedStep
    old_log_probs: torch.Tensor  # (B, T) of the policy that sampled
    advantages: torch.Tensor  # (B, 1)
    mask: torch.Tensor  # (B, T) True for the actions that are trained
    reference: object = None  # phase 1: log-probs (B, T), phase 2: means, of the base model


def phase1(loop, config, resume=False):
    """Train the Actor. The Editor is frozen and only makes the images that are rewarded."""
    actor, G = loop.actor, config.group_size
    saved = check_run(config, 1, resume)  # the checkpoint to resume; None for a new run
    torch.manual_seed(config.seed)  # for the weights of a new adapter
    parameters = actor.add_adapter(config.rank)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    # Locks the folder, reads the data, and restores the checkpoint or, in a new run, validates.
    run = Run(loop, config, actor, parameters, optimizer, saved)

    for iteration in range(run.first_iteration, config.iterations):
        # 1. States: new images that do not satisfy the Checker. (`rng` starts anew each time, so
        # that a resumed run draws the same.)
        rng = random.Random(f"{config.seed} states {iteration}")
        states, solved_at_once = new_states(loop, run.graphs, config.groups, rng)
        batches = []
        figures = defaultdict(list)  # name -> values to be averaged
        for round in range(config.rounds):
            rng = random.Random(f"{config.seed} round {iteration} {round}")
            if round > 0 and config.refill:  # new states in place of those that left
                states += new_states(loop, run.graphs, config.groups - len(states), rng)[0]
            if not states:
                break
            seed = rng.randrange(1 << 30)

            # 2. Sample G completions per state, and carry out their instructions.
            proposals = sample_completions(actor, states, seed, G)
            instructions = proposals.instructions  # (N); None: malformed, "none": no edit wanted
            before = [state for state in states for _ in range(G)]  # (N)
            after = carry_out(loop, states, instructions, seed + EDIT_OFFSET, G)  # (N)

            # 3. Reward: the score of the better image, old or edited, which the loop keeps. If bad
            # edits were punished, the Actor would learn to write "none". "none" and repeats earn
            # the old score, malformed completions the old score minus `malformed_penalty`.
            rewards = []  # (N)
            for state, new, text in zip(before, after, instructions):
                score = max(state.reflection.score, new.reflection.score)
                rewards.append(score - (config.malformed_penalty if text is None else 0))

            # 4. Advantages within each group.
            device = proposals.mask.device
            advantages, kept = per_sample_advantages(rewards, config, device)  # (N, 1) each

            # Micro-batches of B completions. Padding and flat groups are masked out.
            for first in range(0, len(rewards), config.micro_batch):
                rows = slice(first, first + config.micro_batch)
                mask = proposals.mask[rows] & kept[rows]
                if mask.any():
                    old_log_probs = proposals.log_probs[rows]
                    batches.append(Batch((proposals, rows), old_log_probs, advantages[rows], mask))

            states = next_states(before, after, instructions, kept, config, rng)
            add_figures(figures, before, after, rewards, kept)
            add_completion_figures(figures, before, proposals)
        metrics = averages(figures, solved_at_once, config)
        count = sum(b.mask.sum().item() for b in batches)  # trained tokens of the iteration

        # 5. Reference: sampling turned the adapter on, `replay` does not: this is the base model.
        if config.kl > 0:
            with torch.no_grad():
                for batch in batches:
                    batch.reference = actor.replay(*batch.recorded)  # (B, T)

        updates = config.updates if batches else 0  # none if there is nothing to learn from
        for update in range(updates):
            optimizer.zero_grad()
            all_stats = []  # one per batch
            for batch in batches:
                with actor.adapter():  # around `backward` too: peft freezes the adapter on leaving
                    # 6. Replay. In the first update the policy is still the one that sampled, so
                    # the log-probs must be the recorded ones. (So with `updates: 1`, as in
                    # phase1.yaml, the ratio of new to old is 1, and the clip never acts.)
                    log_probs = actor.replay(*batch.recorded)  # (B, T)
                    if update == 0:
                        check_on_policy(log_probs, batch, count, config, metrics)

                    # 7. Update.
                    kl = k3_kl(log_probs, batch.reference) if config.kl > 0 else None  # (B, T)
                    loss, stats = loss_with_kl(log_probs, kl, batch, count, config)
                    loss.backward()
                all_stats.append(stats)
            optimizer_step(optimizer, parameters, iteration, config, all_stats, metrics)
        run.end_iteration(iteration + 1, metrics)
    run.finish()


def phase2(loop, config, resume=False):
    """Train the Editor on the frozen Actor's instructions.

    As phase 1, except for 2, 3, what a `Batch` holds, the KL of Gaussians, and `drift` in 7.
    """
    editor, G = loop.editor, config.group_size
    saved = check_run(config, 2, resume)
    torch.manual_seed(config.seed)
    parameters = editor.add_adapter(config.rank)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    run = Run(loop, config, editor, parameters, optimizer, saved)

    for iteration in range(run.first_iteration, config.iterations):
        # 1. States: new images that do not satisfy the Checker.
        rng = random.Random(f"{config.seed} states {iteration}")
        states, solved_at_once = new_states(loop, run.graphs, config.groups, rng)
        batches = []
        figures = defaultdict(list)  # name -> values to be averaged
        for round in range(config.rounds):
            rng = random.Random(f"{config.seed} round {iteration} {round}")
            if round > 0 and config.refill:
                states += new_states(loop, run.graphs, config.groups - len(states), rng)[0]
            if not states:
                break
            seed = rng.randrange(1 << 30)

            # 2. One instruction per state. States whose completion is malformed, "none" or a repeat
            # are dropped; if none is left, the iteration has no more rounds, even with `refill`.
            proposals = sample_completions(loop.actor, states, seed)
            add_completion_figures(figures, states, proposals)
            pairs = zip(states, proposals.instructions)
            edits = [(state, text) for state, text in pairs if is_new_edit(state, text)]
            if not edits:
                break

            # Sample G edits per state. Only the steps in the window have noise, so the members of a
            # group are the same up to there.
            before = [state for state, _ in edits for _ in range(G)]  # (N)
            instructions = [text for _, text in edits for _ in range(G)]  # (N)
            latent_seeds = [seed + EDIT_OFFSET + n // G for n in range(len(before))]  # (N)
            noise_seeds = range(seed + NOISE_OFFSET, seed + NOISE_OFFSET + len(before))  # (N)
            start = rng.randint(0, config.latest_window_start)  # one window for the whole round
            window = range(start, start + config.window)
            slices = slices_of_groups(editor, len(before), config)  # one per pipeline call
            rollouts = [
                editor.rollout(
                    [state.image for state in before[rows]],
                    instructions[rows],
                    latent_seeds[rows],
                    noise_seeds[rows],
                    window,
                    config.noise_level,
                )
                for rows in slices
            ]

            # 3. Reward: the score of the edited image, even if it is worse than the old one.
            # Otherwise the Editor could break images at no cost.
            images = [image for rollout in rollouts for image in rollout.images]  # (N)
            graphs = [state.graph for state in before]
            after = checked_states(loop.checker, graphs, images)
            rewards = [state.reflection.score for state in after]  # (N)

            # 4. Advantages within each group.
            device = rollouts[0].steps[0].log_prob.device
            advantages, kept = per_sample_advantages(rewards, config, device)  # (N, 1) each

            # A batch: one recorded step of a slice, B edits. Flat groups are masked out.
            for rows, rollout in zip(slices, rollouts):
                if kept[rows].any():
                    for step in rollout.steps:
                        old_log_probs = step.log_prob[:, None]  # (B, 1)
                        batches.append(Batch(step, old_log_probs, advantages[rows], kept[rows]))

            states = next_states(before, after, instructions, kept, config, rng)
            add_figures(figures, before, after, rewards, kept)
        metrics = averages(figures, solved_at_once, config)
        count = sum(b.mask.sum().item() for b in batches)  # trained steps of the iteration

        # 5. Reference: each step's mean with the adapter off. (`rollout` had turned it on.)
        if config.kl > 0:
            with torch.no_grad():
                for batch in batches:
                    _, batch.reference, _ = editor.replay(batch.recorded)

        updates = config.updates if batches else 0
        for update in range(updates):
            optimizer.zero_grad()
            all_stats = []  # one per batch
            for batch in batches:
                with editor.adapter():
                    # 6. Replay. Shapes (B,), (B, tokens, C), and a float.
                    log_prob, mean, std = editor.replay(batch.recorded)
                    log_probs = log_prob[:, None]  # (B, 1)
                    if update == 0:
                        check_on_policy(log_probs, batch, count, config, metrics)

                    # 7. Update. In the first, `drift` is 0 (phase2.yaml makes no other). From the
                    # second on, log rho of the old policy's samples averages -KL(old || new), not
                    # 0, and the clip, narrow because of the mean in `sde_step`, would act on that
                    # alone. So add that KL, gradient included (GRPO-Guard, arXiv 2510.22319).
                    drift = gaussian_kl(batch.recorded.mean, mean, std)[:, None]  # (B, 1)
                    kl = gaussian_kl(mean, batch.reference, std)[:, None] if config.kl > 0 else None
                    loss, stats = loss_with_kl(log_probs + drift, kl, batch, count, config)
                    loss.backward()
                all_stats.append(stats)
            optimizer_step(optimizer, parameters, iteration, config, all_stats, metrics)
        run.end_iteration(iteration + 1, metrics)
    run.finish()


def new_states(loop, graphs, count, rng):
    """Up to `count` states, and the share of generated images that satisfied the Checker.

    Stops when it has `count`, or after generating 10 * `count` images.
    """
    states, generated = [], 0
    while len(states) < count and generated < 10 * count:
        chosen = rng.sample(graphs, min(count, len(graphs)))
        generated += len(chosen)
        seeds = [rng.randrange(1 << 30) for _ in chosen]
        images = loop.diffuser.generate([graph.prompt() for graph in chosen], seeds)
        made = checked_states(loop.checker, chosen, images)
        states += [state for state in made if not state.reflection.satisfied]
    return states[:count], 1 - len(states) / max(generated, 1)


def checked_states(checker, graphs, images):
    """A new `State` for each graph and image."""
    reflections = checker.check(images, graphs)
    return [State(*parts) for parts in zip(graphs, images, reflections, strict=True)]


def sample_completions(actor, states, seed, n=1):
    """n completions of the Actor for each state: `Proposals` of len(states) * n rows."""
    return actor.propose(
        [state.image for state in states],
        [state.graph.prompt() for state in states],
        [state.reflection.feedback for state in states],
        seeds=range(seed, seed + len(states)),
        tried=[state.tried for state in states],
        n=n,
    )


def carry_out(loop, states, instructions, seed, G):
    """The state after each of N = len(states) * G instructions; the old one if nothing is edited.

    All edits of a group have one seed, so that their rewards differ only by the instruction, and
    equal instructions need to be carried out only once.
    """
    pairs = [(n // G, text) for n, text in enumerate(instructions)]  # (N): group, instruction
    distinct = dict.fromkeys(pairs)  # without repeats, in order
    edits = [(g, text) for g, text in distinct if is_new_edit(states[g], text)]
    images = loop.editor.edit(
        [states[g].image for g, _ in edits],
        [text for _, text in edits],
        [seed + g for g, _ in edits],
    )
    graphs = [states[g].graph for g, _ in edits]
    made = checked_states(loop.checker, graphs, images)
    edited = dict(zip(edits, made))  # (group, instruction) -> State
    return [edited.get((g, text), states[g]) for g, text in pairs]


def is_new_edit(state, instruction):
    """Whether the loop would carry it out: it asks for an edit, and was not tried on this image."""
    return instruction not in (None, "none", *state.tried)


def slices_of_groups(editor, n, config):
    """Slices of n samples, one per pipeline call: as many whole groups as fit in `micro_batch`.

    At least one group; exactly one if the pipeline cannot edit different images together.
    """
    G = config.group_size
    size = G * (max(config.micro_batch // G, 1) if editor.batched else 1)
    return [slice(first, first + size) for first in range(0, n, size)]


def per_sample_advantages(rewards, config, device):
    """Advantages (N, 1), and which samples are kept (N, 1): False in flat groups."""
    rewards = torch.tensor(rewards, device=device).view(-1, config.group_size)
    advantages, kept = group_advantages(rewards, config.advantage_eps, config.flat_range)
    return advantages.reshape(-1, 1), kept.expand_as(rewards).reshape(-1, 1)


def next_states(before, after, instructions, kept, config, rng):
    """The states of the next round: each group goes on with one random member.

    Not with its best, because the loop samples only once per state. If the edited image scored
    higher, it is the new state. Otherwise the old one stays; an instruction that was carried out
    joins its `tried`. States that satisfy the Checker leave; with `refill`, so do those of flat
    groups.
    """
    states = []
    for first in range(0, len(before), config.group_size):
        member = first + rng.randrange(config.group_size)
        if config.refill and not kept[first]:
            continue
        state, new, instruction = before[member], after[member], instructions[member]
        if new.reflection.score > state.reflection.score:
            state = new
        elif is_new_edit(state, instruction):
            state = replace(state, tried=(*state.tried, instruction))
        if not state.reflection.satisfied:
            states.append(state)
    return states


def check_on_policy(log_probs, batch, count, config, metrics):
    """Raise ValueError if an iteration's first replay does not give the recorded log-probs.

    Each batch adds its share to `replay_error`, the mean |replayed - recorded| over all `count`
    actions. The mean, not the maximum, because with a bf16 KV cache single tokens differ a lot
    although nothing is wrong.
    """
    difference = (log_probs.detach() - batch.old_log_probs).abs()
    error = difference[batch.mask].sum().item() / count
    metrics["replay_error"] = metrics.get("replay_error", 0.0) + error
    if not metrics["replay_error"] <= config.tolerance:  # `not <=` also catches NaN
        raise ValueError(
            f"replayed log-probs differ from the recorded ones by {metrics['replay_error']:.1e} on "
            "average, more than 'tolerance': the update does not see what was sampled; look for "
            "dropout, other batch shapes or another dtype"
        )


def loss_with_kl(log_probs, kl, batch, count, config):
    """(loss, stats): the clipped loss plus `config.kl` times the KL, each a sum over the trained
    actions divided by `count`. Args: log_probs: (B, T); kl: (B, T) or None.
    """
    loss, stats = clipped_loss(
        log_probs,
        batch.old_log_probs,
        batch.advantages,
        batch.mask,
        count,
        config.clip_low,
        config.clip_high,
    )
    if kl is not None:
        kl_sum = torch.where(batch.mask, kl, 0).sum()
        loss = loss + config.kl * kl_sum / count
        stats["kl"] = kl_sum.item() / count
    return loss, stats


def optimizer_step(optimizer, parameters, iteration, config, all_stats, metrics):
    """Clip the gradient and step, or skip a step whose gradient is not finite.

    all_stats: one per batch. `metrics` keeps those of the iteration's last step.
    """
    # Linear warm-up, in iterations.
    warm_up = min(1, (iteration + 1) / max(config.warmup, 1))
    optimizer.param_groups[0]["lr"] = config.learning_rate * warm_up
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
    if not math.isfinite(norm):
        metrics["skipped"] += 1  # 0 at first, see `averages`
        return
    move_moments(optimizer)  # matters only with `offload`
    optimizer.step()
    for name in all_stats[0]:
        combine = max if name == "ratio_error" else sum  # the others are parts of a mean
        metrics[name] = combine(stats[name] for stats in all_stats)
    metrics["grad_norm"] = norm


def add_figures(figures, before, after, rewards, kept):
    """Add the N samples of a round."""
    figures["reward"] += rewards
    figures["before"] += [state.reflection.score for state in before]
    figures["answered"] += [state.reflection.mass for state in after]  # P(yes) + P(no)
    figures["flat_groups"] += (~kept).flatten().tolist()


def add_completion_figures(figures, before, proposals):
    """Add the completions of a round, one for each of the states `before`."""
    texts = proposals.instructions
    figures["malformed"] += [text is None for text in texts]
    figures["none"] += [text == "none" for text in texts]
    figures["repeated"] += [text in state.tried for state, text in zip(before, texts)]
    figures["truncated"] += proposals.truncated
    figures["length"] += proposals.mask.sum(1).tolist()  # tokens
    figures["entropy"] += (-proposals.log_probs[proposals.mask]).tolist()  # one per token


def averages(figures, solved_at_once, config):
    """The metrics of an iteration (docs/training.md explains each)."""
    samples = len(figures["reward"])
    metrics = {"solved_at_once": solved_at_once, "samples": samples, "skipped": 0}
    metrics["groups"] = samples // config.group_size
    return metrics | {name: fmean(values) for name, values in figures.items() if values}


def validate(loop, first_trajectories, config, judge=None):
    """Run the loop from images that were generated before training. Returns metrics, trajectories.

    It uses the rounds and the temperature of training, so it is not comparable with eval.py.
    """
    trajectories = [Trajectory(t.graph, t.seed, list(t.steps)) for t in first_trajectories]
    for _ in range(config.rounds):
        loop.advance(trajectories)
    metrics = {"val_checker": fmean(t.best.reflection.score for t in trajectories)}
    images, graphs = [t.best.image for t in trajectories], [t.graph for t in trajectories]
    # Nothing is trained on these two measures.
    if judge:
        metrics["val_judge"] = fmean(grade(judge, images, [graph.prompt() for graph in graphs]))
    if config.exact:  # tiny world only
        from tiny.world import exact_scores

        scores = zip(exact_scores(images, graphs), graphs)
        if with_triples := [score["sg_iou"] for score, graph in scores if graph.triples]:
            metrics["val_sg_iou"] = fmean(with_triples)
    return metrics, trajectories


class Run:
    """The data, validation, log and files of a run. saved: what `check_run` returned."""

    def __init__(self, loop, config, trained, parameters, optimizer, saved):
        self.loop, self.config, self.trained = loop, config, trained
        self.parameters, self.optimizer = parameters, optimizer
        # With `ema`: the moving average of the parameters, which is what is validated and saved.
        self.averages = [p.detach().cpu().clone() for p in parameters] if config.ema else []
        self.folder = Path(config.run)
        if not saved and getattr(loop, "trained", False):
            raise ValueError("this loop was trained before; `build(config)` another for a new run")
        (self.folder / "adapter").mkdir(parents=True, exist_ok=True)
        lock(self.folder)
        self.reward = type(loop.checker).__name__
        if saved and (then := saved.get("reward", self.reward)) != self.reward:
            reason = f"its reward was {then}, not {self.reward}"
            raise ValueError(f"{self.folder}: {reason}; resume it with the program that began it")
        self.graphs = self.read(config.data, config.data_limit or None)
        self.judge = load_judge(config, "judge") if config.judge else None
        held_out = self.read(config.validation, config.validation_limit)
        self.first_trajectories = loop.start(held_out, list(range(len(held_out))))
        self.made_with = fingerprint(config, MAY_CHANGE)
        self.rows = saved["metrics"] if saved else []  # by iteration; row 0: before training
        lines = [json.dumps(row) + "\n" for row in self.rows]
        write(self.folder / "metrics.jsonl", "".join(lines))
        write(self.folder / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        if not saved:  # of an earlier run, whose checkpoint and adapter were removed
            for file in [*self.folder.glob("samples/[0-9]*.json"), self.folder / "seconds.jsonl"]:
                file.unlink(missing_ok=True)
        self.began = time.perf_counter()
        if saved:
            restore(saved["tensors"], parameters, optimizer, self.averages)
            self.save_adapter()  # it may have been deleted
        else:
            self.end_iteration(0, {})
        loop.trained = True  # from here on; a start that fails before leaves the loop as it was
        self.first_iteration = len(self.rows) - 1

    def read(self, path, limit):
        graphs = load_graphs(path, self.config.relations, limit)
        return self.loop.diffuser.readable(graphs, path)

    def end_iteration(self, done, metrics):
        """End iteration `done`, 0 being the start: validate if it is time, log, and save."""
        config, folder = self.config, self.folder
        decay = min(config.ema, (1 + done) / (10 + done))  # the average starts with a short memory
        for average, parameter in zip(self.averages, self.parameters):
            average.lerp_(parameter.detach().cpu(), 1 - decay)
        seconds = time.perf_counter() - self.began
        validated = done % config.validate_every == 0 or done == config.iterations
        if validated:
            with self.averaged():
                judge = self.judge
                scores, trajectories = validate(self.loop, self.first_trajectories, config, judge)
            metrics = metrics | scores
        self.rows.append({"iteration": done} | metrics)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        names = "reward before kl flat_groups malformed grad_norm".split()
        names += "val_checker val_judge val_sg_iou".split()
        shown = [f"{name} {metrics[name]:.3g}" for name in names if name in metrics]
        say(f"{done:4d}  {'  '.join(shown)}" + (f"  {seconds:.1f}s" if done else ""))
        recent = self.rows[1:][-5:]
        if len(recent) == 5 and not any("grad_norm" in row for row in recent):
            say(
                "warning: nothing was learned in 5 iterations: no image fails the Checker, rewards "
                "within each group are the same, or gradients are not finite; look at the report"
            )
        if validated:
            try:
                record(folder, trajectories, done)
            except ValueError as error:  # an unreadable file of the report must not stop training
                say(f"warning: {error}; remove it")
        if done > 0:  # before that there is nothing to resume
            with (folder / "seconds.jsonl").open("a") as file:
                file.write(json.dumps({"iteration": done, "seconds": seconds}) + "\n")
            about = {"metrics": self.rows, "made with": self.made_with, "reward": self.reward}
            state = self.parameters, self.optimizer, self.averages
            self.save_adapter()
            save_checkpoint(folder / CHECKPOINT, *state, about)
        self.began = time.perf_counter()

    @contextmanager
    def averaged(self):
        """Inside, the adapter has the averaged parameters. Without `ema` it stays as it is."""
        own = [p.detach().clone() for p in self.parameters] if self.averages else []
        copy_to(self.parameters, self.averages)
        try:
            yield
        finally:
            copy_to(self.parameters, own)

    def finish(self):
        """Leave the loop with the adapter that was saved."""
        copy_to(self.parameters, self.averages)
        unlock(self.folder)

    def save_adapter(self):
        folder = self.folder / "adapter"
        with self.averaged():
            self.trained.save_adapter(folder)
        write(folder / "SHA256SUMS", sha256_sums(folder))


def check_run(config, phase, resume):
    """Raise ValueError if a run cannot start or go on. Needs no models, so comes before them.

    Returns None for a new run, else what `read_checkpoint` returns. Notes the phase in the config.
    """
    if config.phase not in (None, phase):
        raise ValueError(f"the config is for phase {config.phase}; use --phase {config.phase}")
    config.phase = phase  # so that the checkpoint tells
    steps = config.editor.call.get("num_inference_steps")
    end = config.latest_window_start + config.window
    if phase == 2 and (steps is None or end >= steps):
        raise ValueError(
            f"keys 'latest_window_start', 'window': the window may end at step {end}, and "
            f"'editor.call.num_inference_steps' is {steps}; make it end before the last step"
        )
    folder, path = Path(config.run), Path(config.run) / CHECKPOINT
    if path.exists() and not resume:
        raise ValueError(f"{folder}: holds a run; continue it with --resume, or set run=another")
    metrics = folder / "metrics.jsonl"
    # A start that fails before its first checkpoint may leave an adapter of one iteration.
    failed_start = metrics.exists() and len(metrics.read_bytes().splitlines()) <= 2
    if not (resume or failed_start) and any((folder / "adapter").glob("*.safetensors")):
        raise ValueError(f"{folder}: holds an adapter; set run=another, or remove the folder")
    if any((folder / name).exists() for name in ("results.json", "strip.png", "0000")):
        raise ValueError(f"{folder}: holds results of eval.py or loop.py; set run=another")
    for adapter in filter(None, (config.actor.adapter, config.editor.adapter)):
        if folder.resolve() in (Path(adapter).resolve(), *Path(adapter).resolve().parents):
            raise ValueError(f"{folder}: training would overwrite {adapter}; set run=another")
    if resume and not path.exists():
        raise ValueError(f"{folder}: holds no checkpoint; start without --resume")
    if folder.exists() and folder.resolve() not in LOCKS:
        lock(folder)  # raises if another process holds it
        unlock(folder)
    if not resume:
        return None
    saved = read_checkpoint(path)
    if changed := differences(saved["made with"], fingerprint(config, MAY_CHANGE)):
        raise ValueError(
            f"{folder}: was started with a different config: {changed}; undo that, or start a new "
            "run that continues from this adapter"
        )
    done = len(saved["metrics"]) - 1
    if config.iterations < done:
        raise ValueError(f"{folder}: {done} iterations are done; set iterations={done} or more")
    return saved


def copy_to(parameters, values):
    """values: one for each parameter, or none at all: then nothing is done."""
    for parameter, value in zip(parameters, values):
        parameter.data.copy_(value)


def save_checkpoint(path, parameters, optimizer, averages, about):
    """Write aside, then rename: a kill or a full disk (OSError) leaves the previous checkpoint."""
    tensors = {}
    for index, parameter in enumerate(parameters):
        tensors[f"{index} parameter"] = parameter
        for name, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{index} {name}"] = value
    tensors |= {f"{index} average": average for index, average in enumerate(averages)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(about)
    metadata = {"about": text, "checksum": checksum(text, tensors)}
    aside = path.with_name("aside.safetensors")
    try:
        with aside.open("wb") as file:
            file.write(save(tensors, metadata))  # `save_file` gives mode 0600
            os.fsync(file.fileno())  # on the disk before the rename is
        os.replace(aside, path)
    except OSError as error:  # it does not name the file
        aside.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error})") from None


def read_checkpoint(path):
    """{"metrics", "made with", "tensors"}. Raises ValueError if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata["checksum"] != checksum(metadata["about"], tensors):
            raise ValueError("its checksum does not match")
        return json.loads(metadata["about"]) | {"tensors": tensors}
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path}: is damaged ({error}); start in another folder") from None


def restore(tensors, parameters, optimizer, averages):
    """Put the tensors of a checkpoint back where `save_checkpoint` found them."""
    for key, value in tensors.items():
        index, name = key.split()
        parameter = parameters[int(index)]
        if name == "parameter":
            parameter.data.copy_(value)
        elif name == "average":
            averages[int(index)].copy_(value)
        else:
            optimizer.state[parameter][name] = value


def move_moments(optimizer):
    """Move Adam's moments to the parameters, which were on the CPU if `offload` is on."""
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].to(parameter.device)


def checksum(text, tensors):
    """sha256: disks and copies flip bits, which safetensors does not notice."""
    return hashlib.sha256(text.encode() + save(tensors)).hexdigest()


def main():
    parser = argparse.ArgumentParser(description="Reflection-GRPO.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a YAML value")
    parser.add_argument("--phase", type=int, choices=(1, 2), required=True)
    parser.add_argument("--config", help="default: phase1.yaml or phase2.yaml")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    arguments, unknown = parser.parse_known_intermixed_args()
    if unknown:
        parser.error(f"{unknown[0]} is no option; values of the YAML file are set as rounds=1")
    phase, path = arguments.phase, arguments.config or f"phase{arguments.phase}.yaml"

    def stop(*_):
        """End at once. Nothing is lost but this iteration: the checkpoint is complete."""
        begun = (Path(config.run) / CHECKPOINT).exists()
        say("stopped; continue with --resume" if begun else "stopped before the first checkpoint")
        os._exit(1)

    try:
        config = load_config(path, TrainConfig, arguments.overrides)
        saved = check_run(config, phase, arguments.resume)
        finished = saved and len(saved["metrics"]) > config.iterations
        adapter = Path(config.run) / "adapter"
        sums = adapter / "SHA256SUMS"
        if finished and sums.exists() and sums.read_text() == sha256_sums(adapter):
            say(f"{config.run}: is finished; to train longer, set more iterations")
            return
        for path in (config.data, config.validation):  # a wrong file shows before models are loaded
            load_graphs(path, config.relations, 1)
        loop = build(config)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        train = phase1 if phase == 1 else phase2
        train(loop, config, arguments.resume)
        say(f"adapter: {adapter}")
    except (ValueError, FloatingPointError, RuntimeError, OSError, SafetensorError) as error:
        if isinstance(error, OSError) and config.run not in str(error):  # of a full disk
            error = f"{config.run}: {error}"
        sys.exit(" ".join(f"train.py: {error}".split()))


if __name__ == "__main__":
    main()
