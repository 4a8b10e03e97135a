"""gpu/: the configs load, the architectures are the published ones, check.py runs at tiny size."""

import sys
from pathlib import Path

import pytest
import torch

from config import LoopConfig, load_config
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "gpu"))

import architectures  # noqa: E402
import check  # noqa: E402


@pytest.mark.parametrize("size", ["", "_24gb"])
def test_configs_load_and_fit_together(size):
    evaluated = load_config(ROOT / "gpu" / f"eval{size}.yaml", LoopConfig)
    assert evaluated.evaluation.data
    for phase in (1, 2):
        config = load_config(ROOT / "gpu" / f"phase{phase}{size}.yaml", TrainConfig)
        assert config.actor.model == config.checker.model == evaluated.actor.model
        assert config.editor.model == config.diffuser.model == evaluated.editor.model
        assert config.offload == evaluated.offload == bool(size)
        trained = (config.actor, config.editor)[phase - 1]
        assert trained.checkpointing
    # Pipelines that take one picture a call want one group a backward pass.
    assert config.micro_batch == config.group_size
    assert config.clip_low == config.clip_high == pytest.approx(5 * config.tolerance)


@pytest.mark.parametrize(
    "name, billions",
    [
        ("FluxTransformer2DModel", 11.90),
        ("T5EncoderModel", 4.76),
        ("Flux2Transformer2DModel", 3.88),
        ("Qwen3ForCausalLM", 4.02),
        ("Qwen2_5_VLForConditionalGeneration", 8.29),
        ("Qwen3VLForConditionalGeneration", 4.44),
    ],
)
def test_architectures_have_the_published_size(name, billions):
    with torch.device("meta"):
        model = architectures.build(name, tiny=False)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize("size", ["80gb", "24gb"])
def test_check_runs_at_tiny_size(size, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check.py", "--tiny", "--size", size])
    check.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    values = {cells[1].strip(): cells[2:4] for cells in (line.split("|") for line in table)}
    for phase in (0, 1):
        assert float(values["seconds: update"][phase]) > 0
        assert float(values["training pass, TFLOP/s"][phase]) > 0
    errors = [line.split("|") for line in table if "rho" in line][0]
    assert all(float(cell.split()[0]) < 1e-4 for cell in errors[-3:-1])
