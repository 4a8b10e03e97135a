"""The shipped models, loaded once for all tests, and helpers. Nothing comes from the network."""

import copy
import os
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see train.py


@pytest.fixture(scope="session")
def shipped():
    """The `Loop` of phase1.yaml, without adapters. Tests must leave it as it is."""
    from config import TrainConfig, load_config
    from loop import build

    return build(load_config(ROOT / "phase1.yaml", TrainConfig))


@pytest.fixture
def loop(shipped):
    """A copy of the shipped loop, for tests that add adapters or change settings."""
    return copy.deepcopy(shipped)


def difference(first, second):
    """The largest difference of two images, or of two lists of images, in 1/255 per channel."""
    return np.abs(np.array(first, int) - np.array(second, int)).max()


def bytes_of(images):
    return [image.tobytes() for image in images]


def disturb(parameters, size=0.3):
    """Makes an untrained adapter, which changes nothing, one that does."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
