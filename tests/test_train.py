"""train.py: what both phases compute, checked against loops written out; runs that are stopped.

Most tests train the policies of toys.py, which have four numbers. At the end, the shipped models.
"""

import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import toys
from conftest import ROOT
from safetensors import safe_open
from scripted import GRAPH

import train
from checker import reflect
from config import TrainConfig, load_config
from editor import Rollout
from loop import build
from train import phase1, phase2

SMALL = [
    "exact=false",
    "groups=3",
    "group_size=4",
    "rounds=2",
    "iterations=1",
    "ema=0",
    "validation_limit=2",
]
PHASES = pytest.mark.parametrize("phase", [phase1, phase2])


def settings(phase, folder, *overrides):
    """A small config for toys."""
    path = ROOT / f"{phase.__name__}.yaml"
    return load_config(path, TrainConfig, [*toy_words(phase), f"run={folder}", *overrides])


def toy_words(phase):
    more = ["window=2", "clip_low=0.2", "clip_high=0.3", "editor.call.num_inference_steps=8"]
    return [*SMALL, *(more if phase is phase2 else [])]


def trained(loop, phase):
    return loop.actor if phase is phase1 else loop.editor


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def watched(monkeypatch):
    """Notes the samples of every round, and weights and gradient before every step."""
    seen = SimpleNamespace(rounds=[[]], weights=[], gradients=[])  # rounds: a list per iteration
    note, optimizer_step = train.add_figures, train.optimizer_step
    end_iteration = train.Run.end_iteration
    toys.made.clear()

    def note_samples(figures, before, after, rewards, kept):
        rollouts = [made for made in toys.made if isinstance(made, Rollout)]
        recorded = rollouts or toys.made[-1]  # `Proposals`
        seen.rounds[-1].append(SimpleNamespace(**locals()))
        toys.made.clear()
        note(figures, before, after, rewards, kept)

    def note_gradient(optimizer, parameters, *rest):
        seen.weights.append(parameters[0].detach().clone())
        seen.gradients.append(parameters[0].grad.clone())
        optimizer_step(optimizer, parameters, *rest)

    def note_iteration(run, done, metrics):
        end_iteration(run, done, metrics)
        toys.made.clear()
        seen.rounds += [[]] if done else []

    monkeypatch.setattr(train, "add_figures", note_samples)
    monkeypatch.setattr(train, "optimizer_step", note_gradient)
    monkeypatch.setattr(train.Run, "end_iteration", note_iteration)
    return seen


# ---- what is trained on ----


@PHASES
def test_the_header_has_the_values_of_the_yaml_files(phase):
    c = load_config(ROOT / f"{phase.__name__}.yaml", TrainConfig)
    assert f" {c.groups} groups of {c.group_size}, {c.rounds} rounds," in train.__doc__
    assert f" {c.updates} update" in train.__doc__


def test_phase1_a_group_shares_state_and_edit_seed(tmp_path, watched):
    loop = toys.loop()
    phase1(loop, settings(phase1, tmp_path, "rounds=1"))
    samples = watched.rounds[0][0]
    instructions, states = samples.recorded.instructions, samples.before[::4]
    assert len(instructions) == 12 and len(set(map(id, states))) == 3
    assert samples.before == [state for state in states for _ in range(4)]
    known = [state.image for state in states]
    images, edited, seeds = next(
        call for call in loop.editor.edits if call[0] and call[0][0] in known
    )
    groups = [known.index(image) for image in images]
    assert len(set(zip(groups, seeds))) == len(set(groups)) == len(set(seeds))  # one seed a group
    # Equal instructions of a group are edited only once, so only the instruction decides.
    expected = {(row // 4, instructions[row]) for row in range(12)}
    assert sorted(zip(groups, edited)) == sorted(p for p in expected if p[1] in ("good", "bad"))
    rewards = {}
    for row, reward in enumerate(samples.rewards):
        assert rewards.setdefault((row // 4, instructions[row]), reward) == reward


def test_phase1_rewards_the_better_image_and_malformed_costs(tmp_path, watched):
    phase1(toys.loop(), settings(phase1, tmp_path, "rounds=1", "groups=8", "malformed_penalty=0.2"))
    samples = watched.rounds[0][0]
    instructions = samples.recorded.instructions
    assert set(instructions) == {"good", "bad", "none", None}
    for before, after, reward, text in zip(
        samples.before, samples.after, samples.rewards, instructions
    ):
        if text in ("none", None):
            assert after is before
            assert reward == pytest.approx(before.reflection.score - 0.2 * (text is None))
        else:
            assert after.image is not before.image
            assert reward == max(before.reflection.score, after.reflection.score)
    row = metrics(tmp_path)[1]
    assert row["malformed"] == instructions.count(None) / 32
    assert row["none"] == instructions.count("none") / 32
    assert row["length"] == pytest.approx(samples.recorded.mask.sum().item() / 32)


def test_phase1_a_repeated_instruction_is_not_carried_out(tmp_path, watched):
    phase1(toys.loop(), settings(phase1, tmp_path, "rounds=4", "groups=8"))
    seen = 0
    for samples in watched.rounds[0]:
        for before, after, reward, text in zip(
            samples.before, samples.after, samples.rewards, samples.recorded.instructions
        ):
            if text in before.tried:
                assert after is before and reward == before.reflection.score
                seen += 1
    assert seen  # later rounds start from images on which something was tried
    assert metrics(tmp_path)[1]["repeated"] == seen / metrics(tmp_path)[1]["samples"]


def test_phase2_a_group_shares_all_but_the_noise(tmp_path, watched):
    loop = toys.loop()
    phase2(loop, settings(phase2, tmp_path, "groups=6"))
    for samples, call in zip(watched.rounds[0], loop.editor.rollouts):
        images, instructions, seeds, noise_seeds, window = call
        assert len(window) == 2 and window.stop < 8
        for start in range(0, len(images), 4):
            group = slice(start, start + 4)
            assert images[start] is samples.before[start].image
            assert len({id(image) for image in images[group]}) == 1
            assert len(set(instructions[group])) == len(set(seeds[group])) == 1
        assert len(set(seeds)) == len(images) // 4
        assert len(set(noise_seeds) | set(seeds)) == len(images) + len(images) // 4
        assert not {"none", None} & set(instructions)


def test_phase2_leaves_out_states_without_an_instruction(tmp_path, watched):
    loop = toys.loop()
    propose = loop.actor.propose

    def write(images, *arguments, **settings):
        proposals = propose(images, *arguments, **settings)
        proposals.instructions = ["good", None, "none"][: len(images)]
        return proposals

    loop.actor.propose = write
    phase2(loop, settings(phase2, tmp_path, "rounds=1"))
    assert [len(samples.rewards) for samples in watched.rounds[0]] == [4]
    row = metrics(tmp_path)[1]
    assert row["malformed"] == row["none"] == pytest.approx(1 / 3) and row["repeated"] == 0


def test_phase2_takes_one_group_per_call_where_the_pipeline_takes_one_image(tmp_path):
    loop = toys.loop()
    loop.editor.batched = False
    phase2(loop, settings(phase2, tmp_path))
    assert all(len(images) == 4 for images, *_ in loop.editor.rollouts)


def state(score, tried=()):
    return train.State(GRAPH, None, reflect(GRAPH, [score] * 3), tried)


def next_states(before, after, instructions, rng, kept=True, refill=False):
    """`train.next_states` for groups of four samples."""
    config = SimpleNamespace(group_size=4, refill=refill)
    return train.next_states(before, after, instructions, [kept] * len(before), config, rng)


def next_state(before, after, instruction="good", **settings):
    """The state that follows a group of four samples that are all the same."""
    rng = random.Random(0)
    states = next_states([before] * 4, [after] * 4, [instruction] * 4, rng, **settings)
    return states[0] if states else None


def test_a_later_round_continues_from_a_random_sample_if_it_is_better():
    before, better = state(0.2, tried=("bad",)), state(0.3)
    assert next_state(before, better) is better  # nothing was tried on the new image
    assert next_state(before, state(0.6)) is None  # it satisfies the Checker: done
    worse = next_state(before, state(0.1))
    assert worse.reflection is before.reflection and worse.tried == ("bad", "good")
    assert next_state(before, before, "bad") is before  # tried before: not carried out, not noted
    assert next_state(before, before, "none") is next_state(before, before, None) is before
    assert next_state(before, better, kept=False) is better
    assert next_state(before, better, kept=False, refill=True) is None

    before, after = [state(0.2)] * 8, [state(0.3)] + [state(0.1)] * 7  # two groups
    for sample, score in ((0, 0.3), (1, 0.2)):
        rng = SimpleNamespace(randrange=lambda size, sample=sample: sample)
        states = next_states(before, after, ["good"] * 8, rng)
        assert [s.reflection.score for s in states] == pytest.approx([score, 0.2])


@PHASES
def test_the_actor_reads_what_was_tried(tmp_path, phase):
    loop, told = toys.loop(), []
    propose = loop.actor.propose

    def note_tried(*arguments, tried, **settings):
        if len(tried) > 1:  # not in validation
            told.extend(map(tuple, tried))
        return propose(*arguments, tried=tried, **settings)

    loop.actor.propose = note_tried
    phase(loop, settings(phase, tmp_path, "rounds=3", "groups=8", "validation_limit=1"))
    assert () in told and ("bad",) in told  # in the toy it always makes the image worse


@PHASES
def test_new_images_take_the_places_of_flat_groups(tmp_path, phase):
    def states_per_round(folder, *options):
        loop, counts = toys.loop(), []
        propose = loop.actor.propose

        def count_states(images, *arguments, **settings):
            counts.append(len(images))
            return propose(images, *arguments, **settings)

        loop.actor.propose = count_states
        options = "rounds=3", "groups=8", "flat_range=0.99", "validation_limit=1", *options
        phase(loop, settings(phase, tmp_path / folder, *options))
        return [count for count in counts if count > 1]  # one image: validation

    assert states_per_round("on", "refill=true") == [8, 8, 8]  # every group is flat here
    assert states_per_round("off")[2] < 8


def test_the_states_of_round_1_do_not_satisfy_the_checker(tmp_path):
    loop, config = toys.loop(), settings(phase1, tmp_path, "groups=5")
    graphs = train.load_graphs(config.data, limit=20)
    states, solved = train.new_states(loop, graphs, 5, random.Random(0))
    assert len(states) == 5 and not any(state.reflection.satisfied for state in states)
    assert 0 <= solved < 1
    again, _ = train.new_states(loop, graphs, 5, random.Random(0))
    other, _ = train.new_states(loop, graphs, 5, random.Random(1))
    scores = [[s.image.score for s in each] for each in (states, again, other)]
    assert scores[0] == scores[1] != scores[2]
    # If every image is right at once, the search ends.
    loop.diffuser.generate = lambda prompts, seeds: [toys.image(0.9) for _ in seeds]
    assert train.new_states(loop, graphs, 5, random.Random(0)) == ([], 1.0)
    phase1(loop, config)
    assert metrics(tmp_path)[1]["samples"] == 0


# ---- the update ----


def naive_advantages(samples, config):
    """{row: advantage} of all samples that are not in a flat group."""
    found = {}
    for first in range(0, len(samples.rewards), 4):
        rows = range(first, first + 4)
        rewards = [samples.rewards[row] for row in rows]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
        if max(rewards) - min(rewards) > config.flat_range:
            found |= {r: (samples.rewards[r] - mean) / (std + config.advantage_eps) for r in rows}
    return found


def clipped_gain(rho, advantage, config):
    """PPO's objective: beyond the bound, a constant."""
    if advantage > 0 and rho > 1 + config.clip_high:
        return torch.tensor((1 + config.clip_high) * advantage)
    if advantage < 0 and rho < 1 - config.clip_low:
        return torch.tensor((1 - config.clip_low) * advantage)
    return rho * advantage


def naive_gradient(phase, rounds, config, weights):
    """The gradient of the loss, action by action, in one piece. Also the number of actions."""
    weights = weights.clone().requires_grad_()
    losses = []
    for samples in rounds:
        advantages = naive_advantages(samples, config)
        if phase is phase1:
            now, base = weights.log_softmax(0), torch.zeros(4).log_softmax(0)
            for row, advantage in advantages.items():
                for token in range(toys.LENGTH):
                    if samples.recorded.mask[row, token]:
                        word = samples.recorded.ids[row, token]
                        rho = (now[word] - samples.recorded.log_probs[row, token]).exp()
                        ratio = (base[word] - now[word]).exp()
                        kl = ratio - ratio.log() - 1
                        losses.append(config.kl * kl - clipped_gain(rho, advantage, config))
        else:
            first = 0  # row of the rollout's first image
            for rollout in samples.recorded:
                for row in range(len(rollout.images)):
                    if first + row not in advantages:
                        continue
                    for step in rollout.steps:
                        mean = step.sample[row] + weights
                        log_prob = toys.gaussian(step.next_sample[row], mean).mean()
                        # GRPO-Guard: KL(old, new), so that log rho is zero on average.
                        drift = ((mean - step.mean[row]) ** 2).mean() / (2 * toys.STD**2)
                        rho = (log_prob + drift - step.log_prob[row]).exp()
                        kl = (weights**2).mean() / (2 * toys.STD**2)
                        gain = clipped_gain(rho, advantages[first + row], config)
                        losses.append(config.kl * kl - gain)
                first += len(rollout.images)
    (sum(losses) / len(losses)).backward()
    return weights.grad, len(losses)


@PHASES
@pytest.mark.parametrize("kl", [0, 0.5])
def test_every_gradient_is_that_of_the_loss_written_out(tmp_path, watched, phase, kl):
    """All rounds in one mean over the trained actions: no flat group, no padding, no prefix."""
    config = settings(phase, tmp_path, "iterations=3", "updates=3", f"kl={kl}", "learning_rate=0.1")
    phase(toys.loop(), config)
    assert len(watched.gradients) == 9
    steps = zip(watched.weights, watched.gradients)
    for number, (weights, gradient) in enumerate(steps):
        expected, _ = naive_gradient(phase, watched.rounds[number // 3], config, weights)
        assert gradient == pytest.approx(expected, abs=2e-6)
        assert gradient.abs().max() > 1e-4
    rows = metrics(tmp_path)[1:]
    assert all(row["ratio_error"] > 0.01 for row in rows)  # of the last update
    assert all(("kl" in row) == (kl > 0) for row in rows)


@PHASES
def test_micro_batches_do_not_change_the_update(tmp_path, watched, phase):
    for size in (4, 8, 64) if phase is phase2 else (1, 5, 64):
        phase(
            toys.loop(), settings(phase, tmp_path / str(size), f"micro_batch={size}", "updates=1")
        )
    first, *others = watched.gradients
    for other in others:
        assert other == pytest.approx(first, abs=1e-6)


@PHASES
def test_flat_groups_are_left_out_and_nothing_moves_if_all_are_flat(tmp_path, watched, phase):
    phase(toys.loop(), settings(phase, tmp_path, "flat_range=0.99"))
    assert watched.gradients == []
    row = metrics(tmp_path)[1]
    assert row["flat_groups"] == 1 and "grad_norm" not in row
    assert torch.equal(toys.saved(tmp_path), torch.zeros(4))


@PHASES
def test_training_raises_the_reward(tmp_path, phase):
    loop = toys.loop()
    overrides = ["iterations=40", "learning_rate=0.05", "kl=0.001", "updates=1", "groups=8"]
    phase(loop, settings(phase, tmp_path, *overrides))
    rows = metrics(tmp_path)
    gains = [row["reward"] - row["before"] for row in rows[1:]]
    assert sum(gains[-5:]) / 5 > sum(gains[:5]) / 5 + 0.1
    if phase is phase1:
        assert toys.saved(tmp_path).argmax() == toys.WORDS.index("good")
        assert rows[-1]["val_checker"] >= rows[0]["val_checker"]
    else:
        assert toys.saved(tmp_path).mean() > 0.2


def test_the_learning_rate_warms_up():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter])
    config = settings(phase1, "x", "learning_rate=0.5", "warmup=4")
    rates = []
    for iteration in range(5):
        parameter.grad = torch.ones(1)
        train.optimizer_step(optimizer, [parameter], iteration, config, [{}], {})
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.5]


# ---- the on-policy check and gradients that are not finite ----


@PHASES
@pytest.mark.parametrize(
    ("samples", "error", "refused"),
    [(64, 1e-3, True), (64, math.nan, True), (1, 3e-4, False)],
)
def test_a_rollout_that_cannot_be_replayed_stops_the_run(tmp_path, phase, samples, error, refused):
    """The mean over the iteration counts: with a bf16 cache, single tokens may differ more."""
    loop = toys.loop()
    part = trained(loop, phase)
    replay = part.replay
    errors = torch.zeros((64, 1) if phase is phase1 else (64,))
    errors[:samples] = error

    def wrong(*arguments):
        found = replay(*arguments)
        if not part.active or not torch.is_grad_enabled():
            return found
        if isinstance(found, tuple):
            return found[0] + errors[: len(found[0])], *found[1:]
        return found + errors[: len(found)]

    part.replay = wrong
    overrides = ["tolerance=1e-4", "rounds=1", "groups=16", "flat_range=0", "updates=1"]
    with pytest.raises(ValueError, match="differ from") if refused else contextlib.nullcontext():
        phase(loop, settings(phase, tmp_path, *overrides))
    assert len(metrics(tmp_path)) == (1 if refused else 2)


@PHASES
def test_gradients_that_are_not_finite_are_skipped_and_counted(tmp_path, phase, capsys):
    loop = toys.loop()
    part = trained(loop, phase)
    replay = part.replay

    def sick(*arguments):
        """The log-probs are right, but the derivative of the square root at 0 is infinite."""
        found = replay(*arguments)
        extra = part.current().sub(part.current().detach()).abs().sqrt().sum()
        return (found[0] + extra, *found[1:]) if isinstance(found, tuple) else found + extra

    part.replay = sick
    phase(loop, settings(phase, tmp_path, "iterations=5", "kl=0", "groups=9"))
    assert all(row["skipped"] > 0 for row in metrics(tmp_path)[1:])
    assert torch.equal(part.weights, torch.zeros(4))
    assert "nothing was learned in 5 iterations" in capsys.readouterr().out


# ---- the folder of a run ----


@PHASES
def test_what_a_run_writes(tmp_path, phase, capsys):
    config = settings(phase, tmp_path, "iterations=3", "validate_every=2")
    phase(toys.loop(), config)
    rows = metrics(tmp_path)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    assert set(rows[0]) == {"iteration", "val_checker"}  # before training
    assert ["val_checker" in row for row in rows] == [True, False, True, True]
    seconds = [json.loads(line) for line in (tmp_path / "seconds.jsonl").open()]
    assert [row["iteration"] for row in seconds] == [1, 2, 3]
    assert all(row["seconds"] > 0 for row in seconds)
    assert len(list((tmp_path / "samples").iterdir())) == 3  # of iterations 0, 2 and 3
    assert load_config(tmp_path / "config.yaml", TrainConfig) == config
    assert (tmp_path / "report.html").exists() and (tmp_path / "command.txt").exists()
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert torch.equal(toys.saved(tmp_path), file.get_tensor("0 parameter"))
    assert "reward" in capsys.readouterr().out


@PHASES
def test_ema_saves_and_validates_the_average_of_the_parameters(tmp_path, monkeypatch, phase):
    """Also in a run that was interrupted. The samples are drawn by the parameters themselves."""
    trained, validated = [], []
    end_iteration, validate = train.Run.end_iteration, train.validate

    def note(run, done, metrics):
        trained.append(run.parameters[0].detach().clone())
        end_iteration(run, done, metrics)
        assert torch.equal(run.parameters[0], trained[-1])

    def note_validated(loop, *rest):
        part = loop.actor if phase is phase1 else loop.editor
        validated.append(part.weights.detach().clone())
        return validate(loop, *rest)

    monkeypatch.setattr(train.Run, "end_iteration", note)
    monkeypatch.setattr(train, "validate", note_validated)
    words = ["ema=0.5", "validate_every=1", "warmup=0"]
    loop = toys.loop()
    phase(loop, settings(phase, tmp_path / "ema", *words, "iterations=4"))
    average = trained[0]
    for done, parameters in enumerate(trained):
        decay = [0.1, 2 / 11, 3 / 12, 4 / 13, 5 / 14][done]
        average = decay * average + (1 - decay) * parameters
        torch.testing.assert_close(validated[done], average)
    part = loop.actor if phase is phase1 else loop.editor
    assert torch.equal(part.weights, validated[-1]) and not torch.equal(average, trained[-1])
    assert torch.equal(toys.saved(tmp_path / "ema"), validated[-1])
    for done in (2, 4):
        words[3:] = [f"iterations={done}"]
        phase(toys.loop(), settings(phase, tmp_path / "again", *words), resume=done == 4)
    assert torch.equal(toys.saved(tmp_path / "again"), validated[4])
    before = trained[:5]
    phase(toys.loop(), settings(phase, tmp_path / "plain", "iterations=4", "warmup=0"))
    assert all(map(torch.equal, before, trained[-5:]))


@PHASES
def test_a_new_run_needs_a_new_loop(tmp_path, phase):
    """The adapter of the first run would be where the second one starts."""
    loop = toys.loop()
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(ValueError, match="broken.json"):  # which trains nothing
        phase(loop, settings(phase, tmp_path / "0", f"data={tmp_path / 'broken.json'}"))
    phase(loop, settings(phase, tmp_path / "1"))
    with pytest.raises(ValueError, match="trained before"):
        phase(loop, settings(phase, tmp_path / "2"))
    phase(loop, settings(phase, tmp_path / "1", "iterations=2"), resume=True)


def test_files_have_the_mode_of_the_umask(tmp_path, loop):
    old = os.umask(0o022)
    try:
        phase1(toys.loop(), settings(phase1, tmp_path))
        for part in (loop.actor, loop.editor):
            part.add_adapter(2)
            part.save_adapter(tmp_path / "adapter")
    finally:
        os.umask(old)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10 and {path.stat().st_mode & 0o777 for path in files} == {0o644}


@contextlib.contextmanager
def full_disk(after):
    """No file may grow beyond `after` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    phase1(toys.loop(), settings(phase1, tmp_path))
    before = path.read_bytes()
    with full_disk(200_000), pytest.raises(OSError, match="cannot be written") as caught:
        phase1(toys.loop(), settings(phase1, tmp_path, "iterations=3"), resume=True)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before and not (tmp_path / "aside.safetensors").exists()
    phase1(toys.loop(), settings(phase1, tmp_path, "iterations=3"), resume=True)
    assert len(metrics(tmp_path)) == 4


def flip(content, at):
    content = bytearray(content)
    content[at] ^= 1
    return content


@pytest.mark.parametrize(
    "damage",
    [lambda c, n=n: c[:n] for n in (0, 100, -1)]
    + [lambda c, n=n: flip(c, n) for n in (0, 300, -1)],
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    phase1(toys.loop(), settings(phase1, tmp_path))
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is damaged") as caught:
        phase1(toys.loop(), settings(phase1, tmp_path, "iterations=2"), resume=True)
    assert str(path) in str(caught.value)


def test_metrics_are_restored_from_the_checkpoint(tmp_path):
    phase1(toys.loop(), settings(phase1, tmp_path))
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    for damaged in (before[:-20], before * 2):
        path.write_bytes(damaged)
        phase1(toys.loop(), settings(phase1, tmp_path), resume=True)
        assert path.read_bytes() == before


# ---- what is refused, before any model is loaded ----


def refusal(*words):
    """The one line with which the command ends; it loads no models."""
    words = ["train.py", *words]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", words)
        patch.setattr(train, "build", None)
        train.main()
    assert len(ended.value.code.splitlines()) == 1
    return ended.value.code


def command(folder, *overrides, phase=phase1):
    return ["--phase", phase.__name__[-1], f"run={folder}", *toy_words(phase), *overrides]


def test_a_folder_that_holds_a_run_is_protected(tmp_path):
    phase1(toys.loop(), settings(phase1, tmp_path))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert "holds a run; continue it with --resume" in refusal(*command(tmp_path))
    with pytest.raises(ValueError, match="holds a run"):  # in a notebook
        phase1(toys.loop(), settings(phase1, tmp_path))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_run_does_not_overwrite_what_it_starts_from_nor_an_evaluation(tmp_path):
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    words = command(tmp_path / "run", f"actor.adapter={adapter}")
    assert f"training would overwrite {adapter}; set run=another" in refusal(*words)
    for name in ("results.json", "strip.png", "0000"):
        (tmp_path / "run" / name).touch()
        assert "holds results of eval.py or loop.py; set run=another" in refusal(*words)
        (tmp_path / "run" / name).unlink()
    (adapter / "adapter_model.safetensors").touch()
    assert "holds an adapter; set run=another" in refusal(*words)


def test_a_finished_run_says_so_and_cannot_become_shorter(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    phase1(toys.loop(), settings(phase1, tmp_path, "iterations=2"))
    monkeypatch.setattr(sys, "argv", ["train.py", *command(tmp_path, "iterations=2"), "--resume"])
    monkeypatch.setattr(train, "build", None)
    train.main()
    assert "is finished; to train longer" in capsys.readouterr().out
    line = refusal(*command(tmp_path, "iterations=1"), "--resume")
    assert "2 iterations are done; set iterations=2 or more" in line


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        lambda adapter: (adapter / "adapter.safetensors").unlink(),
        lambda adapter: (adapter / "adapter.safetensors").write_bytes(b"half"),
    ],
)
def test_resuming_a_finished_run_mends_its_adapter(tmp_path, damage, monkeypatch):
    monkeypatch.chdir(ROOT)
    phase1(toys.loop(), settings(phase1, tmp_path, "iterations=2"))
    adapter = tmp_path / "adapter"
    files = {path.name: path.read_bytes() for path in adapter.iterdir()}
    damage(adapter)
    monkeypatch.setattr(sys, "argv", ["train.py", *command(tmp_path, "iterations=2"), "--resume"])
    monkeypatch.setattr(train, "build", lambda config: toys.loop())
    train.main()
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == files


def test_a_run_goes_on_with_the_reward_it_had_only(tmp_path):
    class Dark(toys.Checker):
        pass

    loop = toys.loop()
    loop.checker = Dark()
    phase1(loop, settings(phase1, tmp_path))
    with pytest.raises(ValueError, match="its reward was Dark, not Checker"):
        phase1(toys.loop(), settings(phase1, tmp_path, "iterations=2"), resume=True)


def test_nothing_of_an_earlier_run_stays_in_the_report(tmp_path):
    phase1(toys.loop(), settings(phase1, tmp_path, "iterations=2", "validate_every=1"))
    shutil.rmtree(tmp_path / "adapter")
    (tmp_path / "checkpoint.safetensors").unlink()
    (tmp_path / "samples" / "mine.json").touch()
    phase1(toys.loop(), settings(phase1, tmp_path, "iterations=1"))
    left = {"0000.json", "0001.json", "mine.json"}
    assert {path.name for path in tmp_path.glob("samples/*")} == left
    assert len((tmp_path / "seconds.jsonl").read_text().splitlines()) == 1


def test_a_report_that_cannot_be_made_does_not_stop_a_run(tmp_path, capsys):
    phase1(toys.loop(), settings(phase1, tmp_path))
    (tmp_path / "samples" / "0000.json").write_text("{half")
    config = settings(phase1, tmp_path, "iterations=2", "validate_every=1")
    phase1(toys.loop(), config, resume=True)
    assert "0000.json" in capsys.readouterr().out and len(metrics(tmp_path)) == 3


def test_a_lock_holds_while_the_same_process_looks_at_the_folder(tmp_path):
    def other_process():
        program = f"from pathlib import Path; from loop import lock; lock(Path({str(tmp_path)!r}))"
        words = [sys.executable, "-c", program]
        return subprocess.run(words, cwd=ROOT, stderr=subprocess.PIPE).stderr

    train.lock(tmp_path)
    train.lock(tmp_path)  # as `Run` does after `check_run`, or a second run in a notebook
    assert b"another process is writing" in other_process()
    train.unlock(tmp_path)
    assert other_process() == b""


def test_a_refused_run_keeps_no_lock(tmp_path):
    phase1(toys.loop(), settings(phase1, tmp_path))
    with pytest.raises(ValueError, match="different config"):
        phase1(toys.loop(), settings(phase1, tmp_path, "kl=0.5"), resume=True)
    assert tmp_path.resolve() not in train.LOCKS


def test_a_changed_config_is_refused_key_by_key(tmp_path):
    phase1(toys.loop(), settings(phase1, tmp_path))
    changed = ["actor.temperature=2", "kl=0.5", "editor.call.new=3", "iterations=2"]
    line = refusal(*command(tmp_path, *changed), "--resume")
    assert "actor.temperature (1.0 then, 2.0 now)" in line
    assert "editor.call.new (unset then, 3 now)" in line
    assert "iterations" not in line and line.count(" then, ") == 3


def test_changed_files_are_refused(tmp_path):
    paths = {"data": tmp_path / "data.json", "actor.adapter": tmp_path / "adapter"}
    shutil.copy(ROOT / "tiny/data/val.json", paths["data"])
    shutil.copytree(ROOT / "tiny/adapters/phase1", paths["actor.adapter"])
    words = [f"{key}={path}" for key, path in paths.items()]
    phase1(toys.loop(), settings(phase1, tmp_path / "run", *words))
    weights = paths["actor.adapter"] / "adapter_model.safetensors"
    for key, path in (("data", paths["data"]), ("actor.adapter", weights)):
        content = path.read_bytes()
        path.write_bytes(flip(content, -2))
        line = refusal(*command(tmp_path / "run", *words), "--resume")
        assert f"{key} (content " in line and line.count(" then, ") == 1
        path.write_bytes(content)
    moved = paths["data"].rename(tmp_path / "moved.json")  # the same content somewhere else
    words[0] = f"data={moved}"
    phase1(toys.loop(), settings(phase1, tmp_path / "run", *words), resume=True)


def test_a_window_that_may_reach_the_last_step(tmp_path):
    words = ["latest_window_start=4", "window=4"]  # of 8 steps
    assert "before the last step" in refusal(*command(tmp_path, *words, phase=phase2))


def test_a_config_of_the_other_phase(tmp_path):
    assert "is for phase 1; use --phase 1" in refusal("--phase", "2", "--config", "phase1.yaml")
    with pytest.raises(ValueError, match="is for phase 2"):
        phase1(toys.loop(), settings(phase2, tmp_path))


# ---- processes that are stopped ----


@contextlib.contextmanager
def running(folder, *words, script="tests/toys.py"):
    """train.py in another process, entered once its first checkpoint is there."""
    threads = str(torch.get_num_threads())  # of this process: the number changes the last bits
    process = subprocess.Popen(
        [sys.executable, script, *words],
        cwd=ROOT,
        env={"TOY_SECONDS": "0.1", "OMP_NUM_THREADS": threads, "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not (folder / "checkpoint.safetensors").exists():
        time.sleep(0.02)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@PHASES
def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path, phase):
    folder = tmp_path / "parts"
    with running(folder, *command(folder, "iterations=1000", phase=phase)) as process:
        time.sleep(0.25)
        process.kill()
    done = len(whole_lines(folder))
    for name in ("parts", "whole"):
        config = settings(phase, tmp_path / name, f"iterations={done + 2}")
        phase(toys.loop(), config, resume=name == "parts")
    assert torch.equal(toys.saved(folder), toys.saved(tmp_path / "whole"))
    assert metrics(folder) == metrics(tmp_path / "whole")


def whole_lines(folder):
    return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if line[-1] == "}"]


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    with running(tmp_path, *command(tmp_path, "iterations=1000")) as process:
        line = refusal(*command(tmp_path, "iterations=1000"), "--resume")
        assert f"{tmp_path}: another process is writing" in line and process.poll() is None
    done = len(whole_lines(tmp_path))  # the lock ended with the process
    phase1(toys.loop(), settings(phase1, tmp_path, f"iterations={done + 1}"), resume=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_how_to_go_on(tmp_path, number):
    with running(tmp_path, *command(tmp_path, "iterations=1000")) as process:
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, None) and errors == ""
    assert printed.splitlines()[-1] == "stopped; continue with --resume"


def test_a_full_stderr_does_not_stop_a_run(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("no sun\nred circle left of blue square\n")  # the first line is skipped
    words = command(tmp_path / "run", f"data={path}", "relations=[left of]")
    with open("/dev/full", "w") as full:
        words = [sys.executable, "tests/toys.py", *words]
        process = subprocess.run(words, cwd=ROOT, stderr=full, stdout=subprocess.PIPE)
    assert process.returncode == 0 and (tmp_path / "run" / "adapter").exists()


def test_a_pipe_that_breaks_does_not_stop_a_run(tmp_path):
    with running(tmp_path, *command(tmp_path, "iterations=12")) as process:
        process.stdout.close()  # "| head" has seen enough
        errors = process.stderr.read()
        assert process.wait(60) == 0 and errors == ""
    assert len(whole_lines(tmp_path)) == 1 + 12


@PHASES
def test_a_start_that_failed_does_not_block_the_corrected_one(tmp_path, phase, monkeypatch):
    """Before the first checkpoint there is nothing to protect."""
    for step in ("check_on_policy", "save_checkpoint"):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="no room"):
            patch.setattr(train, step, Mock(side_effect=ValueError("no room")))
            phase(toys.loop(), settings(phase, tmp_path))
    folder = tmp_path / "never failed"
    for run in (tmp_path, folder):
        phase(toys.loop(), settings(phase, run))
    assert metrics(tmp_path) == metrics(folder)
    assert torch.equal(toys.saved(tmp_path), toys.saved(folder))


def test_ctrl_c_during_the_imports_shows_no_traceback(tmp_path):
    """A torch.py that takes forever stands for the libraries."""
    shutil.copy(ROOT / "train.py", tmp_path)
    (tmp_path / "torch.py").write_text("print(flush=True)\nwhile True: pass\n")
    command = [sys.executable, "train.py", "--phase", "1"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == -signal.SIGINT


def test_another_vlm_can_judge_the_validation_images(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "load_judge", lambda config, key: (config.judge.model, key))

    def grade(judge, images, prompts):
        asked.append((judge, len(images), prompts))
        return [0.25, 0.75]

    monkeypatch.setattr(train, "grade", grade)
    config = settings(phase1, tmp_path, "judge.model=owner/judge")
    phase1(toys.loop(), config)
    assert [row["val_judge"] for row in metrics(tmp_path)] == [0.5, 0.5]
    (judge, count, prompts), _ = asked
    assert (judge, count) == (("owner/judge", "judge"), 2) and all(prompts)


# ---- the shipped models ----

TINY = ["groups=2", "group_size=4", "rounds=1", "validation_limit=2", "iterations=2"]


@PHASES
def test_the_shipped_models_train_and_resume_bit_for_bit(tmp_path, phase):
    """Also between processes: one run is killed by signal 9 after its first iteration."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    start = ["--phase", phase.__name__[-1], f"run={parts}", *TINY]
    with running(parts, *start, script="train.py") as process:
        process.kill()
    for folder in (whole, parts):
        path = ROOT / f"{phase.__name__}.yaml"
        config = load_config(path, TrainConfig, [*TINY, f"run={folder}"])
        phase(build(config), config, resume=folder == parts)
    assert metrics(whole) == metrics(parts)
    assert "val_sg_iou" in metrics(whole)[0] and "val_sg_iou" in metrics(whole)[2]
    assert adapter(whole) == adapter(parts)


def adapter(folder):
    (path,) = (folder / "adapter").glob("*.safetensors")
    return path.read_bytes()
