"""Rollout and replay, adapters, training and resuming, on the shipped models."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint import check_adapter
from config import load_config
from loop import build
from phases import ActorPhase, EditorPhase, State
from sgiou import load_laion_sg
from train import PATIENCE, TrainConfig, summary, train, update

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "tiny/models/flow").exists(), reason="the embedded models are not there"
)


@pytest.fixture
def loop(monkeypatch):
    monkeypatch.chdir(ROOT)
    return build(load_config("phase1.yaml", TrainConfig))


@pytest.fixture
def start(loop):
    graphs = load_laion_sg("tiny/data/val.json", 6)
    return loop.start(graphs, list(range(6)))


def disturb(parameters, size=0.05):
    """Makes an untrained adapter, which changes nothing, one that does."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def propose(loop, start, n):
    return loop.actor.propose(
        [t.steps[0].image for t in start],
        [t.graph for t in start],
        [t.steps[0].reflection for t in start],
        n=n,
        seed=3,
    )


def rollout(loop, start, size=4):
    count = len(start) * size
    return loop.editor.rollout(
        [t.steps[0].image for t in start for _ in range(size)],
        ["move the red circle left of the blue square"] * count,
        [number // size for number in range(count)],
        list(range(100, 100 + count)),
        range(1, 4),
        0.8,
    )


def test_actor_replays_what_it_sampled(loop, start):
    disturb(loop.actor.add_adapter(4))
    proposals = propose(loop, start, 4)
    assert proposals.mask.any(1).all()
    for rows in (slice(0, 24), slice(5, 12)):
        with loop.actor.adapter(), torch.no_grad():
            now = loop.actor.log_probs(proposals, rows)
        with torch.no_grad():
            base = loop.actor.log_probs(proposals, rows)
        mask = proposals.mask[rows]
        recorded = proposals.sampled_log_probs[rows]
        assert (now - recorded)[mask].abs().max() < 1e-4
        assert (base - recorded)[mask].abs().max() > 1e-3


def test_sampling_defaults_of_a_folder_are_outdone(loop, start):
    """What they cut after the log-probs are kept would show in no replay."""
    plain = propose(loop, start, 3).ids
    defaults = {"min_p": 0.9, "typical_p": 0.1, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1}
    defaults |= {"top_k": 1, "top_p": 0.1, "top_h": 0.1, "repetition_penalty": 3.0}
    for name, value in defaults.items():
        setattr(loop.actor.model.generation_config, name, value)
    assert torch.equal(propose(loop, start, 3).ids, plain)


def test_frozen_parts_never_meet_an_adapter(loop, start):
    images = [t.steps[0].image for t in start]
    graphs = [t.graph for t in start]
    prompts = [graph.prompt() for graph in graphs]
    before = loop.checker.check(images, graphs), loop.diffuser.generate(prompts, [7] * 6)
    disturb(loop.actor.add_adapter(4))
    disturb(loop.editor.add_adapter(4))
    propose(loop, start, 2)
    rollout(loop, start)

    def fail(*_):
        raise RuntimeError("in the middle of a rollout")

    hook = loop.editor.pipeline.transformer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="middle"):
        rollout(loop, start)
    hook.remove()
    model_hook = loop.actor.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="middle"):
        propose(loop, start, 2)
    model_hook.remove()
    after = loop.checker.check(images, graphs), loop.diffuser.generate(prompts, [7] * 6)
    assert before[0] == after[0]
    assert [a.tobytes() for a in before[1]] == [b.tobytes() for b in after[1]]


def test_saved_actor_adapter_loads_in_peft(loop, start, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    disturb(loop.actor.add_adapter(4))
    proposals = propose(loop, start, 1)
    with loop.actor.adapter(), torch.no_grad():
        expected = loop.actor.log_probs(proposals, slice(None))
    loop.actor.save_adapter(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained("tiny/models/vlm", dtype=torch.float32)
    loop.actor.model = PeftModel.from_pretrained(model, tmp_path).base_model.model.eval()
    with torch.no_grad():
        assert torch.equal(loop.actor.log_probs(proposals, slice(None)), expected)


def command(phase, folder, *more):
    settings = ["groups=2", "group_size=4", "rounds=2", "validation_limit=4", "validate_every=2"]
    return [sys.executable, "train.py", "--phase", str(phase), f"run={folder}", *settings, *more]


def run(*arguments):
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def contents(folder):
    """(tensors, metadata) of an adapter."""
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


@pytest.mark.parametrize("phase", (1, 2))
def test_killed_and_resumed_run_equals_an_uninterrupted_one(phase, tmp_path):
    run(phase, tmp_path / "whole", "iterations=3")
    metrics = [tmp_path / name / "metrics.jsonl" for name in ("whole", "parts")]
    with subprocess.Popen(command(phase, tmp_path / "parts", "iterations=3")) as process:
        while process.poll() is None and not (metrics[1].exists() and metrics[1].stat().st_size):
            time.sleep(0.02)
        process.kill()  # between the first row of metrics and the end
    run(phase, tmp_path / "parts", "iterations=3", "--resume")
    assert len(metrics[0].read_text().splitlines()) == 4  # before the first, and each
    assert metrics[0].read_bytes() == metrics[1].read_bytes()
    # Not by the file's bytes: safetensors writes its metadata's keys in any order.
    whole, parts = (contents(tmp_path / name / "adapter") for name in ("whole", "parts"))
    assert whole[1] == parts[1]
    assert whole[0].keys() == parts[0].keys()
    assert all(torch.equal(whole[0][name], parts[0][name]) for name in whole[0])


def test_an_actor_that_never_writes_an_edit_is_told(loop, tmp_path, capsys):
    """Completions without an end are malformed: nothing is edited, and all rewards are alike."""
    config = load_config(
        "phase1.yaml",
        TrainConfig,
        ["groups=2", "group_size=2", "rounds=1", "validation_limit=2", f"run={tmp_path}"]
        + [f"iterations={PATIENCE}"],
    )
    loop.actor.max_new_tokens = 3
    train(loop, config, ActorPhase)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["malformed"] == last["truncated"] == last["flat_groups"] == 1
    assert "100% of the completions name no edit" in capsys.readouterr().out


def test_a_window_that_may_reach_the_last_step_is_told_at_once(loop):
    for first, length in ((7, 1), (0, 8), (4, 4)):
        settings = [f"window_start={first}", f"window={length}"]
        with pytest.raises(ValueError, match="before the last step"):
            EditorPhase(loop, load_config("phase2.yaml", TrainConfig, settings))
    config = load_config("phase2.yaml", TrainConfig, ["window_start=0", "window=7"])
    EditorPhase(loop, config)


def test_states_that_the_actor_leaves_unedited_are_counted(loop, start, monkeypatch):
    config = load_config("phase2.yaml", TrainConfig, ["group_size=2", "groups=3", "micro_batch=4"])
    states = [State(t.graph, t.steps[0].image, t.steps[0].reflection) for t in start[:3]]
    phase = EditorPhase(loop, config)
    told = iter((["none", "remove the red circle", None], [None, "none", None]))
    monkeypatch.setattr(
        loop.actor, "propose", lambda *_, **__: SimpleNamespace(instructions=next(told))
    )
    some, nothing = phase.rollout(states, 0), phase.rollout(states, 0)
    assert len(some.rewards) == 2 and len(nothing.rewards) == 0
    assert summary([some, nothing], 0.0)["unedited"] == pytest.approx(5 / 6)
    assert update(phase, [nothing], None, [], config)["groups"] == 0


def test_an_adapter_of_another_model_is_told(loop, tmp_path):
    loop.actor.add_adapter(4)
    loop.editor.add_adapter(4)
    for part in (loop.actor, loop.editor):
        model = part.pipeline.transformer if hasattr(part, "pipeline") else part.model
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.01)
        folder = tmp_path / type(part).__name__
        part.save_adapter(folder)
        check_adapter(folder, part)
        path = next(folder.glob("*.safetensors"))
        tensors = {k: v for k, v in load_file(path).items()}
        save_file(dict(list(tensors.items())[:4]), path)
        with pytest.raises(ValueError, match="of another model"):
            check_adapter(folder, part)
        save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, path)
        with pytest.raises(ValueError, match="NaN"):
            check_adapter(folder, part)


def test_metrics_that_lack_iterations_are_told(loop, tmp_path):
    settings = ["groups=2", "group_size=2", "micro_batch=4", "rounds=1", "validation_limit=1"]
    settings += [f"run={tmp_path}", "iterations=1"]
    config = load_config("phase2.yaml", TrainConfig, settings)
    train(loop, config, EditorPhase)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    with pytest.raises(ValueError, match="metrics.jsonl: lacks iterations"):
        train(build(config), config, EditorPhase, resume=True)
