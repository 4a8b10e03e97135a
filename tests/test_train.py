"""train.py: what both phases compute, checked against loops written out; runs that are stopped.

Most tests train the policies of toys.py, which have four numbers. At the end, the shipped models.
"""

import contextlib
import copy
import json
import math
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import toys
from conftest import ROOT
from safetensors import safe_open
from scripted import GRAPH

import train
from checker import reflect
from config import TrainConfig, load_config
from train import phase1, phase2

SMALL = [
    "exact=false",
    "groups=3",
    "group_size=4",
    "rounds=2",
    "iterations=1",
    "validation_limit=2",
]
PHASES = pytest.mark.parametrize("phase", [phase1, phase2])


def settings(phase, folder, *overrides):
    """A small config for toys."""
    path = ROOT / f"{phase.__name__}.yaml"
    more = ["window=2", "clip_low=0.2", "clip_high=0.3"] if phase is phase2 else []
    return load_config(path, TrainConfig, [*SMALL, *more, f"run={folder}", *overrides])


def trained(loop, phase):
    return loop.actor if phase is phase1 else loop.editor


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def watched(monkeypatch):
    """Notes the rounds of every iteration, and weights and gradient before every step."""
    seen = {"rounds": [], "weights": [], "gradients": []}
    describe, optimizer_step = train.describe, train.optimizer_step

    def note_rounds(rounds, *rest):
        seen["rounds"].append(rounds)
        return describe(rounds, *rest)

    def note_gradient(optimizer, parameters, *rest):
        seen["weights"].append(parameters[0].detach().clone())
        seen["gradients"].append(parameters[0].grad.clone())
        return optimizer_step(optimizer, parameters, *rest)

    monkeypatch.setattr(train, "describe", note_rounds)
    monkeypatch.setattr(train, "optimizer_step", note_gradient)
    return seen


# ---- what is trained on ----


def test_phase1_a_group_shares_state_and_edit_seed(tmp_path, watched):
    loop = toys.loop()
    phase1(loop, settings(phase1, tmp_path, "rounds=1"))
    ((samples,),) = watched["rounds"]
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


def test_phase1_none_and_malformed_leave_the_image_and_malformed_costs(tmp_path, watched):
    phase1(toys.loop(), settings(phase1, tmp_path, "rounds=1", "groups=8", "malformed=0.2"))
    ((samples,),) = watched["rounds"]
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
            assert reward == after.reflection.score == pytest.approx(after.image.score)
    row = metrics(tmp_path)[1]
    assert row["malformed"] == instructions.count(None) / 32
    assert row["none"] == instructions.count("none") / 32
    assert row["length"] == pytest.approx(samples.recorded.mask.sum().item() / 32)


def test_phase2_a_group_shares_all_but_the_noise(tmp_path, watched):
    loop = toys.loop()
    phase2(loop, settings(phase2, tmp_path, "groups=6"))
    for samples, call in zip(watched["rounds"][0], loop.editor.rollouts):
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


def test_phase2_leaves_out_states_without_an_instruction(tmp_path, watched, monkeypatch):
    loop = toys.loop()
    propose = loop.actor.propose

    def first_only(images, *rest, **more):
        proposals = propose(images, *rest, **more)
        proposals.instructions = ["good"] + [None, "none"] * len(images)
        del proposals.instructions[len(images) :]
        return proposals

    monkeypatch.setattr(loop.actor, "propose", first_only)
    phase2(loop, settings(phase2, tmp_path / "some", "rounds=1"))
    ((samples,),) = watched["rounds"]
    assert len(samples.rewards) == 4
    assert metrics(tmp_path / "some")[1]["unedited"] == pytest.approx(2 / 3)
    loop.actor.propose = lambda images, *_, **__: SimpleNamespace(
        thoughts=[""] * len(images), instructions=["none"] * len(images)
    )
    phase2(loop, settings(phase2, tmp_path / "none"))
    assert metrics(tmp_path / "none")[1]["unedited"] == 1


def test_phase2_takes_one_group_per_call_where_the_pipeline_takes_one_image(tmp_path):
    loop = toys.loop()
    loop.editor.batched = False
    phase2(loop, settings(phase2, tmp_path))
    assert all(len(images) == 4 for images, *_ in loop.editor.rollouts)


def test_phase2_refuses_a_window_that_may_reach_the_last_step(tmp_path):
    for first, length in ((7, 1), (0, 8), (4, 4)):
        overrides = [f"latest_window_start={first}", f"window={length}"]
        with pytest.raises(ValueError, match="before the last step"):
            phase2(toys.loop(), settings(phase2, tmp_path, *overrides))
    phase2(toys.loop(), settings(phase2, tmp_path, "latest_window_start=0", "window=7"))


def state(score, tried=()):
    return train.State(GRAPH, None, reflect(GRAPH, [score] * 3), tried)


def next_state(before, after, instruction="good"):
    """The state that follows a group of four samples that are all the same."""
    states = train.next_states([before] * 4, [after] * 4, [instruction] * 4, 4, random.Random(0))
    return states[0] if states else None


def test_a_later_round_continues_from_a_sample_if_it_is_better():
    before, better = state(0.2, tried=("bad",)), state(0.3)
    assert next_state(before, better) is better  # nothing was tried on the new image
    assert next_state(before, state(0.6)) is None  # it satisfies the Checker: done
    worse = next_state(before, state(0.1))
    assert worse.reflection is before.reflection and worse.tried == ("bad", "good")
    assert next_state(before, before, "bad") is before  # tried before: not carried out, not noted
    assert next_state(before, before, "none") is next_state(before, before, None) is before


def test_a_later_round_has_one_state_per_group_from_a_random_sample():
    before, better = [state(0.2)] * 8, [state(0.3)] + [state(0.1)] * 7
    for sample, score in ((0, 0.3), (1, 0.2)):
        rng = SimpleNamespace(randrange=lambda size, sample=sample: sample)
        states = train.next_states(before, better, ["good"] * 8, 4, rng)
        assert [s.reflection.score for s in states] == pytest.approx([score, 0.2])


@PHASES
def test_the_actor_reads_what_was_tried_and_that_is_not_carried_out_again(tmp_path, phase):
    loop = toys.loop()
    propose, told = loop.actor.propose, []

    def bad_only(*arguments, tried, **settings):
        told.append([list(t) for t in tried])
        proposals = propose(*arguments, tried=tried, **settings)
        proposals.instructions = ["bad"] * len(proposals.instructions)
        return proposals

    loop.actor.propose = bad_only
    phase(loop, settings(phase, tmp_path, "validation_limit=1", "rounds=2"))
    told = [tried for tried in told if len(tried) == 3]  # of training, not of validation
    assert told[0] == [[], [], []]
    if phase is phase1:
        assert told[1] == [["bad"]] * 3  # in the toy it always makes the image worse
        assert sum(len(images) == 3 for images, *_ in loop.editor.edits) == 1


@PHASES
def test_the_states_of_round_2_are_those_that_round_1_left(tmp_path, watched, monkeypatch, phase):
    left, next_states = [], train.next_states
    monkeypatch.setattr(
        train, "next_states", lambda *given: left.append(next_states(*given)) or left[-1]
    )
    phase(toys.loop(), settings(phase, tmp_path, "groups=8"))
    ((_, second),) = watched["rounds"]
    states = second.before[::4]
    assert second.before == [state for state in states for _ in range(4)] != []
    # Phase 2 leaves out those for which the Actor writes no edit.
    assert all(state in left[0] for state in states)
    assert phase is phase2 or states == left[0]


def test_the_states_of_round_1_do_not_satisfy_the_checker(tmp_path):
    loop, config = toys.loop(), settings(phase1, tmp_path, "groups=5")
    graphs = train.load_graphs(config.data, limit=20)
    states, solved = train.unsatisfied_images(loop, graphs, config, iteration=0)
    assert len(states) == 5 and not any(state.reflection.satisfied for state in states)
    assert 0 <= solved < 1
    again, _ = train.unsatisfied_images(loop, graphs, config, iteration=0)
    other, _ = train.unsatisfied_images(loop, graphs, config, iteration=1)
    scores = [[s.image.score for s in each] for each in (states, again, other)]
    assert scores[0] == scores[1] != scores[2]
    # If every image is right at once, the search ends.
    loop.diffuser.generate = lambda prompts, seeds: [toys.image(0.9) for _ in seeds]
    assert train.unsatisfied_images(loop, graphs, config, 0) == ([], 1.0)
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
    assert len(watched["gradients"]) == 9
    steps = zip(watched["weights"], watched["gradients"])
    for number, (weights, gradient) in enumerate(steps):
        expected, _ = naive_gradient(phase, watched["rounds"][number // 3], config, weights)
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
    first, *others = watched["gradients"]
    for other in others:
        assert other == pytest.approx(first, abs=1e-6)


@PHASES
def test_the_reference_is_the_base_model_evaluated_once_before_the_updates(tmp_path, phase):
    loop = toys.loop()
    part = trained(loop, phase)
    log_probs, active = part.log_probs, []
    part.log_probs = lambda *arguments: active.append(part.active) or log_probs(*arguments)
    for kl in (0, 0.1):
        active.clear()
        overrides = ["rounds=1", "updates=3", f"kl={kl}", "micro_batch=64"]
        phase(loop, settings(phase, tmp_path / str(kl), *overrides))
        steps = 2 if phase is phase2 else 1  # of the window; phase 1 has one micro-batch
        if phase is phase2:
            active = active[steps:]  # the toy also calls it while sampling
        assert active == [False] * (steps if kl else 0) + [True] * 3 * steps


@PHASES
def test_flat_groups_are_left_out_and_nothing_moves_if_all_are_flat(tmp_path, watched, phase):
    phase(toys.loop(), settings(phase, tmp_path, "flat_range=2"))
    assert watched["gradients"] == []
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


def test_learning_rate_warms_up():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    config = settings(phase1, "x", "learning_rate=0.5", "warmup=4")
    rates = []
    for iteration in range(6):
        train.set_learning_rate(optimizer, config, iteration)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


# ---- the on-policy check and gradients that are not finite ----


def off_by(part, error):
    """Add errors, one per sample of a micro-batch, to what the part replays with gradient."""
    log_probs = part.log_probs

    def wrong(*arguments):
        found = log_probs(*arguments)
        if not part.active or not torch.is_grad_enabled():
            return found
        if isinstance(found, tuple):
            return found[0] + error[: len(found[0])], *found[1:]
        return found + error[: len(found)]

    part.log_probs = wrong


@PHASES
@pytest.mark.parametrize("error", [1e-3, -1e-3, math.nan, math.inf])
def test_a_rollout_that_cannot_be_replayed_stops_the_run(tmp_path, phase, error):
    loop = toys.loop()
    errors = torch.full((64, 1) if phase is phase1 else (64,), error)
    off_by(trained(loop, phase), errors)
    with pytest.raises(ValueError, match="differ from the recorded ones by"):
        phase(loop, settings(phase, tmp_path, "tolerance=1e-4"))
    assert len(metrics(tmp_path)) == 1  # iteration 0


@PHASES
@pytest.mark.parametrize(("error", "refused"), [(3e-4, False), (5e-2, True)])
def test_the_mean_over_the_iteration_counts_not_single_actions(tmp_path, phase, error, refused):
    """With a bf16 cache, log-probs of single tokens differ although nothing is wrong."""
    loop = toys.loop()
    errors = torch.zeros((64, 1) if phase is phase1 else (64,))
    errors[0] = error
    off_by(trained(loop, phase), errors)
    overrides = ["tolerance=1e-4", "rounds=1", "groups=16", "micro_batch=64", "flat_range=0"]
    overrides += ["group_size=4", "updates=1"]
    with pytest.raises(ValueError, match="differ from") if refused else contextlib.nullcontext():
        phase(loop, settings(phase, tmp_path, *overrides))


def with_infinite_gradient(part):
    """The log-probs are right, but the derivative of the square root at 0 is infinite."""
    log_probs = part.log_probs

    def sick(*arguments):
        found = log_probs(*arguments)
        extra = part.current().sub(part.current().detach()).abs().sqrt().sum()
        return (found[0] + extra, *found[1:]) if isinstance(found, tuple) else found + extra

    part.log_probs = sick


@PHASES
def test_gradients_that_are_not_finite_are_skipped_and_counted(tmp_path, phase, capsys):
    loop = toys.loop()
    with_infinite_gradient(trained(loop, phase))
    phase(loop, settings(phase, tmp_path, "iterations=5", "updates=2", "kl=0", "groups=9"))
    assert all(row["skipped"] == 2 for row in metrics(tmp_path)[1:])
    assert torch.equal(trained(loop, phase).weights, torch.zeros(4))
    assert "nothing was learned in 5 iterations" in capsys.readouterr().out


def test_five_iterations_with_nothing_to_learn_are_reported(tmp_path, capsys):
    phase1(toys.loop(), settings(phase1, tmp_path, "iterations=4", "flat_range=2"))
    assert "nothing was learned" not in capsys.readouterr().out
    phase1(toys.loop(), settings(phase1, tmp_path, "iterations=5", "flat_range=2"), resume=True)
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
    assert {"generate", "act", "edit", "check", "update"} <= set(seconds[0])
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == [
        "0000.json",
        "0002.json",
        "0003.json",
    ]
    assert load_config(tmp_path / "config.yaml", TrainConfig) == config
    assert (tmp_path / "report.html").exists() and (tmp_path / "command.txt").exists()
    assert torch.equal(toys.saved(tmp_path), trained_weights(tmp_path))
    printed = capsys.readouterr().out
    assert "training" in printed and "reward" in printed


def trained_weights(folder):
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        return file.get_tensor("parameter.0")


def test_validation_always_starts_from_the_same_images(tmp_path):
    phase1(toys.loop(), settings(phase1, tmp_path, "iterations=4", "validate_every=1"))
    starts = []
    for path in sorted((tmp_path / "samples").iterdir()):
        starts.append([sample["steps"][0]["image"] for sample in json.loads(path.read_text())])
    assert len(starts) == 5 and all(start == starts[0] for start in starts)


@PHASES
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, phase, iterations):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    phase(toys.loop(), settings(phase, whole, "iterations=4"))
    phase(toys.loop(), settings(phase, parts, f"iterations={iterations}"))
    phase(toys.loop(), settings(phase, parts, "iterations=4"), resume=True)
    assert torch.equal(toys.saved(whole), toys.saved(parts))
    final = [metrics(folder) for folder in (whole, parts)]
    final[1][iterations].pop("val_checker")  # its last iteration is always validated
    assert final[0] == final[1]


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


def flip(content):
    content = bytearray(content)
    content[8:60] = bytes(reversed(content[8:60]))
    return content


@pytest.mark.parametrize(
    "damage",
    [lambda c, n=n: c[:n] for n in (0, 5, 100, 3000, -1)] + [flip, lambda c: b"x" * len(c)],
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    phase1(toys.loop(), settings(phase1, tmp_path))
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is damaged") as caught:
        phase1(toys.loop(), settings(phase1, tmp_path, "iterations=2"), resume=True)
    assert str(path) in str(caught.value)


def test_a_changed_config_is_refused(tmp_path):
    phase1(toys.loop(), settings(phase1, tmp_path))
    with pytest.raises(ValueError, match=r"kl \(0.03 then, 0.5 now\)") as caught:
        phase1(toys.loop(), settings(phase1, tmp_path, "kl=0.5", "iterations=2"), resume=True)
    assert "iterations" not in str(caught.value)


def test_changed_input_files_are_refused(tmp_path):
    data = tmp_path / "data.json"
    content = (ROOT / "tiny/data/val.json").read_text()
    data.write_text(content)
    config = settings(phase1, tmp_path / "run", f"data={data}")
    phase1(toys.loop(), config)
    data.write_text(content + " ")
    with pytest.raises(ValueError, match=f"content of {data}"):
        phase1(toys.loop(), config, resume=True)


def test_metrics_are_restored_from_the_checkpoint(tmp_path):
    phase1(toys.loop(), settings(phase1, tmp_path))
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    for damaged in (b"", before[:-20], before * 2, b"garbage"):
        path.write_bytes(damaged)
        phase1(toys.loop(), settings(phase1, tmp_path), resume=True)
        assert path.read_bytes() == before


def test_a_folder_that_holds_a_run_is_protected(tmp_path):
    phase1(toys.loop(), settings(phase1, tmp_path))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds a run; continue it with --resume"):
        phase1(toys.loop(), settings(phase1, tmp_path))
    with pytest.raises(ValueError, match="holds no checkpoint; start without --resume"):
        phase1(toys.loop(), settings(phase1, tmp_path / "new"), resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


# ---- processes that are stopped ----


@contextlib.contextmanager
def running(phase, folder, *overrides, script="tests/toys.py"):
    """train.py in another process, entered once its first checkpoint is there."""
    number = phase.__name__[-1]
    command = [sys.executable, script, "--phase", number, f"run={folder}", *overrides]
    threads = str(torch.get_num_threads())  # of this process: the number changes the last bits
    process = subprocess.Popen(
        command,
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


def toy_words(phase, *overrides):
    more = ["window=2", "clip_low=0.2", "clip_high=0.3"] if phase is phase2 else []
    return [*SMALL, *more, *overrides]


@PHASES
def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path, phase):
    with running(phase, tmp_path / "parts", *toy_words(phase, "iterations=1000")) as process:
        time.sleep(0.25)
        process.kill()
    done = len(whole_lines(tmp_path / "parts"))
    for folder in ("parts", "whole"):
        config = settings(phase, tmp_path / folder, f"iterations={done + 2}")
        phase(toys.loop(), config, resume=folder == "parts")
    assert torch.equal(*(toys.saved(tmp_path / folder) for folder in ("parts", "whole")))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def whole_lines(folder):
    return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if line[-1] == "}"]


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    with running(phase1, tmp_path, *toy_words(phase1, "iterations=1000")) as process:
        with pytest.raises(ValueError, match="another process is training") as caught:
            phase1(toys.loop(), settings(phase1, tmp_path), resume=True)
        assert str(tmp_path) in str(caught.value) and process.poll() is None
    # In a notebook, a run that failed does not bar the next one.
    with pytest.raises(ValueError, match="was saved with a different config"):
        phase1(toys.loop(), settings(phase1, tmp_path, "kl=0.5"), resume=True)
    done = len(whole_lines(tmp_path))
    phase1(toys.loop(), settings(phase1, tmp_path, f"iterations={done + 1}"), resume=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_how_to_resume(tmp_path, number):
    folder = tmp_path / "a run"
    with running(phase1, folder, *toy_words(phase1, "iterations=1000")) as process:
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, None) and errors == ""
    line = printed.splitlines()[-1]
    assert line.startswith("stopped; continue with: python ") and line.endswith(" --resume")
    assert shlex.split(line.partition(": ")[2])[4] == f"run={folder}"


# ---- the shipped models ----

TINY = ["groups=2", "group_size=4", "rounds=1", "validation_limit=2", "iterations=2"]


@PHASES
def test_the_shipped_models_train_and_resume_bit_for_bit(tmp_path, phase, shipped):
    """Also between processes: one run is killed by signal 9 after its first iteration."""
    with running(phase, tmp_path / "parts", *TINY, script="train.py") as process:
        process.kill()
    for folder in ("whole", "parts"):
        path, loop = ROOT / f"{phase.__name__}.yaml", copy.deepcopy(shipped)
        config = load_config(path, TrainConfig, [*TINY, f"run={tmp_path / folder}"])
        loop.actor.temperature = config.actor.temperature
        if config.actor.adapter:
            loop.actor.load_adapter(config.actor.adapter)
        phase(loop, config, resume=folder == "parts")
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    assert metrics(whole) == metrics(parts)
    assert "val_sg_iou" in metrics(whole)[0] and "val_sg_iou" in metrics(whole)[2]
    assert adapter(whole)[1] == adapter(parts)[1]
    for name, tensor in adapter(whole)[0].items():
        assert torch.equal(tensor, adapter(parts)[0][name])


def adapter(folder):
    """(tensors, metadata). Not the file's bytes: safetensors orders its metadata at random."""
    with safe_open(next((folder / "adapter").glob("*.safetensors")), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
