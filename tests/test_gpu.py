"""gpu/: the YAML files fit together, the architectures have the right sizes, the scripts run."""

import sys
from pathlib import Path

import pytest
import torch

from config import LoopConfig, TrainConfig, load_config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "gpu"))

import architectures  # noqa: E402
import check  # noqa: E402
import memory  # noqa: E402

VAL = ROOT / "tiny" / "data" / "val.json"  # exists, unlike the data the files name
DATA = [f"data={VAL}", f"validation={VAL}"]


@pytest.mark.parametrize("size", ["", "_24gb"])
def test_the_files_of_a_size_fit_together(size):
    overrides = [f"evaluation.data={VAL}"]
    evaluated = load_config(ROOT / "gpu" / f"eval{size}.yaml", LoopConfig, overrides)
    for phase in (1, 2):
        config = load_config(ROOT / "gpu" / f"phase{phase}{size}.yaml", TrainConfig, DATA)
        assert config.phase == phase
        assert config.actor.model == config.checker.model == evaluated.actor.model
        assert config.editor.model == config.diffuser.model  # one set of weights
        assert not config.judge or config.judge.model == evaluated.evaluation.judge.model
        assert config.offload == evaluated.offload == bool(size)
        assert (config.actor, config.editor)[phase - 1].checkpointing
        assert config.data_limit  # 480,005 entries would only fill memory
    # Phase 2: the model that is evaluated, whole groups per backward pass, and a clip for its
    # 1,024 x 128 latent dimensions.
    assert config.editor.model == evaluated.editor.model
    assert config.micro_batch == config.group_size
    assert (
        config.clip_low == config.clip_high == pytest.approx(0.026 / (1024 * 128) ** 0.5, rel=0.05)
    )
    assert config.clip_low == pytest.approx(5 * config.tolerance)


@pytest.mark.parametrize(
    "name, billions",
    [
        ("FluxTransformer2DModel", 11.90),
        ("T5EncoderModel", 4.76),
        ("Flux2Transformer2DModel", 3.88),
        ("Qwen3ForCausalLM", 4.02),
        ("QwenImageTransformer2DModel", 20.43),
        ("Qwen2_5_VLForConditionalGeneration", 8.29),
        ("Qwen3VLForConditionalGeneration", 4.44),
        ("Qwen3VLForConditionalGeneration 8B", 8.77),
    ],
)
def test_architectures_have_the_published_size(name, billions):
    with torch.device("meta"):
        model = architectures.build(name, tiny=False)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)


def test_memory_counts_what_is_alive_at_once():
    with torch.device("meta"):
        layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(3)))
        image = torch.empty(1000, 64)
    row = image.nbytes

    def forward():
        with torch.no_grad():
            layers(image)

    # Without gradients an input of the next layer is freed with it. The image was there before.
    with memory.LiveBytes([*layers.parameters(), image]) as counter:
        forward()
    assert counter.peak == 2 * row and counter.live == 0
    # With gradients the inputs of layers 2 and 3 wait for the backward pass.
    with memory.LiveBytes([*layers.parameters(), image]) as counter:
        loss = layers(image).sum()
        waiting = counter.live
        loss.backward()
    assert 2 * row <= waiting <= 2 * row + 8
    assert counter.peak >= 3 * row


@pytest.mark.parametrize("size", ["80gb", "24gb"])
def test_check_runs_at_tiny_size(size, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check.py", "--tiny", "--size", size])
    check.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    values = {cells[1].strip(): cells[2:4] for cells in (line.split("|") for line in table)}
    for phase in (0, 1):
        assert float(values["seconds: second iteration"][phase]) > 0
        assert float(values["mean replay error"][phase]) < 1e-4
