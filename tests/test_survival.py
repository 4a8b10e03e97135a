"""Training runs that are killed, starved, changed or sick: nothing is lost, one line says why."""

import contextlib
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpoint import NAME, load_checkpoint, save_checkpoint
from config import load_config
from train import PATIENCE, TrainConfig, trouble, update

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config(monkeypatch):
    monkeypatch.chdir(ROOT)
    return load_config("phase1.yaml", TrainConfig)


def adapter(seed=0, shape=(64, 64)):
    """A parameter and an optimizer that has made a step."""
    generator = torch.Generator().manual_seed(seed)
    parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = torch.optim.AdamW([parameter])
    parameter.square().sum().backward()
    optimizer.step()
    return [parameter], optimizer


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


def test_checkpoint_restores_parameters_and_optimizer(tmp_path, config):
    parameters, optimizer = adapter()
    save_checkpoint(tmp_path, 7, parameters, optimizer, config)
    others, fresh = adapter(1)
    assert load_checkpoint(tmp_path, others, fresh, config) == 7
    assert torch.equal(others[0], parameters[0])
    state, expected = fresh.state[others[0]], optimizer.state[parameters[0]]
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_full_disk_leaves_the_last_checkpoint(tmp_path, config):
    parameters, optimizer = adapter()
    save_checkpoint(tmp_path, 1, parameters, optimizer, config)
    with full_disk(20_000), pytest.raises(OSError, match="the last one stays") as caught:
        save_checkpoint(tmp_path, 2, parameters, optimizer, config)
    assert str(tmp_path / NAME) in str(caught.value)
    assert load_checkpoint(tmp_path, *adapter(1), config) == 1
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("keep", (0, 5, 100, 3000, -1))
def test_truncated_checkpoint_is_named(tmp_path, config, keep):
    save_checkpoint(tmp_path, 1, *adapter(), config)
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is damaged") as caught:
        load_checkpoint(tmp_path, *adapter(), config)
    assert str(path) in str(caught.value)


def test_garbled_checkpoint_is_named(tmp_path, config):
    save_checkpoint(tmp_path, 1, *adapter(), config)
    path = tmp_path / NAME
    content = bytearray(path.read_bytes())
    content[8:60] = bytes(reversed(content[8:60]))
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(tmp_path, *adapter(), config)


def test_changed_config_is_told_and_may_be_meant(tmp_path, config):
    save_checkpoint(tmp_path, 3, *adapter(), config)
    other = replace(config, kl=0.5, iterations=99)
    with pytest.raises(ValueError, match=r"kl \(0.03 then, 0.5 now\)") as caught:
        load_checkpoint(tmp_path, *adapter(), other)
    assert "iterations" not in str(caught.value)
    assert load_checkpoint(tmp_path, *adapter(), other, changed=True) == 3


def test_checkpoint_of_another_adapter_is_refused(tmp_path, config):
    save_checkpoint(tmp_path, 3, *adapter(), config)
    with pytest.raises(ValueError, match="another adapter"):
        load_checkpoint(tmp_path, *adapter(shape=(64, 32)), config)


def sick_phase(parameter):
    """A phase whose log-probs are fine and whose gradient is infinite."""

    def replay():
        return torch.zeros(4, 1) + parameter.abs().sqrt().sum(), None

    ones = torch.ones(4, 1, dtype=torch.bool)
    return SimpleNamespace(
        trained=SimpleNamespace(adapter=contextlib.nullcontext),
        disagreement=lambda errors: errors.max().item(),
        pieces=lambda batch: [(replay, torch.zeros(4, 1), ones, slice(0, 4))],
    )


def test_infinite_gradient_skips_the_update_and_is_counted(config):
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    batch = SimpleNamespace(rewards=[0.0, 1.0, 0.2, 0.7], groups=[0, 0, 0, 0])
    settings = replace(config, kl=0.0, updates=1, group_size=4)
    figures = update(sick_phase(parameter), [batch], optimizer, [parameter], settings)
    assert figures["skipped"] == 1
    assert torch.equal(parameter, torch.zeros(3))


def test_rollout_of_nan_stops_the_run(config):
    parameter = torch.nn.Parameter(torch.full((3,), torch.nan))
    batch = SimpleNamespace(rewards=[0.0, 1.0, 0.2, 0.7], groups=[0, 0, 0, 0])
    optimizer = torch.optim.AdamW([parameter])
    settings = replace(config, kl=0.0, group_size=4)
    with pytest.raises(ValueError, match="differs from the recorded one by nan"):
        update(sick_phase(parameter), [batch], optimizer, [parameter], settings)


def iterations(**figures):
    healthy = {"skipped": 0, "samples": 64, "flat_groups": 0.2, "none": 0.1, "malformed": 0.0}
    return [healthy | figures] * PATIENCE


def test_trouble_is_told():
    assert trouble(iterations()) == ""
    assert "nothing to learn from" in trouble(iterations(samples=0))
    assert "name no edit" in trouble(iterations(flat_groups=1.0, none=0.99))
    assert "alike" in trouble(iterations(flat_groups=1.0))
    assert trouble(iterations(flat_groups=1.0)[:-1]) == ""  # too early to tell
    with pytest.raises(FloatingPointError, match="not finite"):
        trouble(iterations(skipped=2))


needs_models = pytest.mark.skipif(
    not (ROOT / "tiny/models/flow").exists(), reason="the embedded models are not there"
)


@needs_models
@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_interrupted_run_says_how_to_resume(number, tmp_path):
    command = [sys.executable, "train.py", "--phase", "2", f"run={tmp_path}", "groups=2"]
    command += ["group_size=2", "rounds=1", "validation_limit=2", "micro_batch=4"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while not (tmp_path / NAME).exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert errors.splitlines()[-1].endswith(" --resume")
    assert "Traceback" not in errors
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode != 0
    assert "--resume" in again.stderr
    assert again.stderr.count("\n") == 1
