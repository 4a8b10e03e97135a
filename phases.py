"""The two phases of Reflection-GRPO (arXiv 2602.19974): what is sampled, and how it is replayed.

Both turn states (pictures that do not satisfy the Checker) into a `Batch` of samples in groups with
a reward each, and then yield micro-batches whose log-probs can be computed again, with gradient:
`replay()` gives (log-probs (R, T), what the KL needs beside them).

    ActorPhase    a sample is a completion, an action a token; all completions of a group are
                  edited with the same seed, so that the group compares instructions, not luck
    EditorPhase   a sample is an edited picture, an action a denoising step of the SDE window; a
                  group shares initial latents and ODE prefix, its members differ in the window's
                  noise, so what is rewarded is what is trained

Reward: the Checker's score of the edited picture against the original graph. A malformed
completion earns the score before minus a penalty, an explicit "none" the score before.
"""

import math
import random
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from checker import reflect
from grpo import gaussian_kl, k3_kl
from sgiou import SceneGraph

SECONDS = {}  # by stage, of the iteration under way
EDITS, NOISE = 2_000_000, 1_000_000  # added to a rollout's seed: of initial latents, of SDE steps


@contextmanager
def clock(stage):
    """Adds the time spent inside to SECONDS."""
    began = time.perf_counter()
    try:
        yield
    finally:
        SECONDS[stage] = SECONDS.get(stage, 0.0) + time.perf_counter() - began


@dataclass
class State:
    """What a group starts from: a picture that does not satisfy the Checker."""

    graph: SceneGraph
    image: object
    reflection: object


@dataclass
class Batch:
    """The samples of one round: N in groups that stand together."""

    rewards: list[float]
    groups: list[int]
    images: list  # edited pictures
    reflections: list
    states: list[State]  # (N) where each sample started
    record: object  # what the phase replays
    stats: dict  # name -> (sum, how many it is a sum of)


def propose(actor, states, n, seed):
    """The Actor's `Proposals`, n for each state."""
    images, graphs, reflections = zip(*((s.image, s.graph, s.reflection) for s in states))
    with clock("act"):
        return actor.propose(images, graphs, reflections, n=n, seed=seed)


def score(reflections, starts, seed, sampled=False):
    """The reward: the Checker's score in P(yes), or (sampled) in one draw of yes or no each."""
    if not sampled:
        return [reflection.score for reflection in reflections]
    rng = random.Random(f"{seed} verdicts")
    drawn = [[float(rng.random() < prob) for prob in r.probs] for r in reflections]
    return [reflect(start.graph, probs).score for start, probs in zip(starts, drawn)]


class ActorPhase:
    """Phase 1: a sample is a completion, an action a token."""

    def __init__(self, loop, config):
        self.loop = loop
        self.config = config
        self.trained = loop.actor

    def cost(self):
        """What an iteration costs at most, in words."""
        config = self.config
        samples = config.groups * config.group_size * config.rounds
        return f"at most {samples * config.actor.max_new_tokens:,} tokens and {samples} edits"

    def rollout(self, states, seed):
        """G completions a state; each distinct instruction of a group is edited once."""
        loop, size = self.loop, self.config.group_size
        proposals = propose(loop.actor, states, size, seed)
        starts = [state for state in states for _ in range(size)]
        groups = [number for number in range(len(states)) for _ in range(size)]
        # One seed a group: it compares instructions, not luck.
        numbers = groups if self.config.shared_noise else range(len(starts))
        seeds = [seed + EDITS + number for number in numbers]
        keys = list(zip(groups, proposals.instructions, seeds))
        todo = [key for key in dict.fromkeys(keys) if key[1] not in (None, "none")]
        with clock("edit"):
            images = loop.editor.edit(
                [states[group].image for group, _, _ in todo],
                [instruction for _, instruction, _ in todo],
                [noise for _, _, noise in todo],
            )
        with clock("check"):
            checked = loop.checker.check(images, [states[group].graph for group, _, _ in todo])
        done = dict(zip(todo, zip(images, checked)))
        results = [
            done.get(key, (start.image, start.reflection)) for key, start in zip(keys, starts)
        ]
        malformed = [instruction is None for instruction in proposals.instructions]
        stats = {
            "malformed": (sum(malformed), len(starts)),
            "none": (proposals.instructions.count("none"), len(starts)),
            "truncated": (sum(proposals.truncated), len(starts)),
            "length": (proposals.mask.sum().item(), len(starts)),
        }
        pictures, reflections = zip(*results)
        scores = score(reflections, starts, seed, self.config.sampled_reward)
        rewards = [s - self.config.malformed * bad for s, bad in zip(scores, malformed)]
        return Batch(rewards, groups, pictures, reflections, starts, proposals, stats)

    def pieces(self, batch):
        """Micro-batches of one batch: (replay, recorded log-probs (R, T), mask (R, T), rows)."""
        proposals = batch.record
        for start in range(0, len(batch.rewards), self.config.micro_batch):
            rows = slice(start, start + self.config.micro_batch)

            def replay(rows=rows):
                return self.loop.actor.log_probs(proposals, rows), None

            yield replay, proposals.sampled_log_probs[rows], proposals.mask[rows], rows

    def disagreement(self, errors):
        """Of replay and rollout: the mean, for in bf16 the sampler's cache rounds single tokens."""
        return errors.mean().item()

    def divergence(self, now, reference):
        """k3 per token."""
        return k3_kl(now[0], reference[0])


class EditorPhase:
    """Phase 2: a sample is an edited picture, an action a denoising step of the window."""

    def __init__(self, loop, config):
        steps = loop.editor.call.get("num_inference_steps", math.inf)
        if config.window_start + config.window >= steps:  # the last step is the ODE's
            raise ValueError(
                f"keys 'window_start', 'window': the window may reach step {config.window_start} + "
                f"{config.window} of {steps}; make it end before the last step"
            )
        self.loop = loop
        self.config = config
        self.trained = loop.editor

    def cost(self):
        """What an iteration costs at most, in words."""
        config = self.config
        samples = config.groups * config.group_size * config.rounds
        return f"at most {samples} edits, of which {samples * config.window:,} steps are trained"

    def rollout(self, states, seed):
        """G edits of each state by one instruction of the trained Actor, if it wrote one."""
        loop, size = self.loop, self.config.group_size
        proposals = propose(loop.actor, states, 1, seed)
        pairs = [
            (state, instruction)
            for state, instruction in zip(states, proposals.instructions)
            if instruction not in (None, "none")
        ]
        starts = [state for state, _ in pairs for _ in range(size)]
        texts = [instruction for _, instruction in pairs for _ in range(size)]
        groups = [number for number in range(len(pairs)) for _ in range(size)]
        numbers = groups if self.config.shared_noise else range(len(starts))
        first = random.Random(f"{seed} window").randint(0, self.config.window_start)
        window = range(first, first + self.config.window)
        together = max(self.config.micro_batch // size, 1) if loop.editor.batched else 1
        chunk = together * size  # whole groups
        rollouts = []
        with clock("edit"):
            for start in range(0, len(starts), chunk):
                rows = range(start, min(start + chunk, len(starts)))
                with torch.no_grad():
                    rollout = loop.editor.rollout(
                        [starts[row].image for row in rows],
                        [texts[row] for row in rows],
                        [seed + EDITS + numbers[row] for row in rows],
                        [seed + NOISE + row for row in rows],
                        window,
                        self.config.noise_level,
                    )
                rollouts.append(rollout)
        images = [image for rollout in rollouts for image in rollout.images]
        with clock("check"):
            reflections = loop.checker.check(images, [state.graph for state in starts])
        rewards = score(reflections, starts, seed, self.config.sampled_reward)
        stats = {"unedited": (len(states) - len(pairs), len(states))}
        return Batch(rewards, groups, images, reflections, starts, rollouts, stats)

    def pieces(self, batch):
        """Micro-batches: one step of one rollout: (replay, recorded (R, 1), mask (R, 1), rows)."""
        start = 0
        for rollout in batch.record:
            rows = slice(start, start + len(rollout.images))
            start = rows.stop
            for step in rollout.steps:

                def replay(step=step):
                    log_prob, mean, std = self.loop.editor.log_probs(step)
                    return log_prob[:, None], (mean, std)

                recorded = step.log_prob[:, None]
                yield replay, recorded, torch.ones_like(recorded, dtype=torch.bool), rows

    def disagreement(self, errors):
        """Of replay and rollout: the largest."""
        return errors.max().item()

    def divergence(self, now, reference):
        """The Gaussians' exact KL per step."""
        (_, (mean, std)), (_, (mean_ref, _)) = now, reference
        return gaussian_kl(mean, mean_ref, std)[:, None]
