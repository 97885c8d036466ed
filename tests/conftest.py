"""Before any test: our modules can be imported, and no test asks a hub over the network.

Fixtures that several tests share: a small phantom, a tiny backbone, a tiny student. They import
torch and transformers themselves, so that the settings below are made before.
"""
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors threads wait for each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # and do not spin while they wait
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    """A small phantom as a user's .npz: int16 HU, labels, masks, three splits."""
    import numpy as np

    from phantom import make_phantom
    arrays = {}
    sizes = dict(train=40, val=12, test=12)
    for seed, (split, n) in enumerate(sizes.items()):
        for key, value in make_phantom(n, 40, seed).items():
            arrays[f"{split}_{key}"] = value
    path = str(tmp_path_factory.mktemp("data") / "phantom40.npz")
    np.savez_compressed(path, **arrays)
    return path


@pytest.fixture
def tiny_backbone():
    """A function (family, num_channels) -> a two-block backbone of 8-pixel patches. It has the
    same random weights in every test."""
    import torch

    from model import build_backbone
    from tests_support import TINY

    def build(family, num_channels=3, **size_keys):
        torch.manual_seed(0)
        backbone = build_backbone(family, use_pretrained=False, num_channels=num_channels,
                                  **{**TINY, **size_keys})
        with torch.no_grad():  # as built, biases and mask token are 0 and hide mistakes
            for param in backbone.parameters():
                param.add_(0.1 * torch.randn_like(param))
        return backbone
    return build


@pytest.fixture
def tiny_student(tiny_backbone):
    """A function (family, num_channels) -> a Student with two separate heads of 24 prototypes."""
    from model import DINOHead, Student

    def build(family, num_channels=3, **size_keys):
        backbone = tiny_backbone(family, num_channels, **size_keys)
        width = backbone.config.hidden_size
        heads = [DINOHead(width, 24, 20, 8, norm_last_layer=False) for _ in range(2)]
        return Student(backbone, *heads)
    return build
