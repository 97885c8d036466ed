"""Before any test: our modules can be imported and nothing asks a hub over the network. And a student small enough."""
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")                  # before transformers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")                 # before torch: on tiny tensors threads wait for each other
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pytest  # noqa: E402
import torch  # noqa: E402

from model import DINOHead, Student, build_backbone  # noqa: E402

TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
            num_register_tokens=2, pos_embed_rescale=None)


@pytest.fixture
def tiny_backbone():
    """A function (family, num_channels) -> a two-block backbone of 8-pixel patches, with the same random weights."""
    def build(family, num_channels=3, **size_keys):
        torch.manual_seed(0)
        backbone = build_backbone(family, use_pretrained=False, num_channels=num_channels, **{**TINY, **size_keys})
        with torch.no_grad():                                 # as built, biases and mask token are 0 and hide mistakes
            for param in backbone.parameters():
                param.add_(0.1 * torch.randn_like(param))
        return backbone
    return build


@pytest.fixture
def tiny_student(tiny_backbone):
    """A function (family, num_channels) -> a Student with two separate heads of 24 prototypes."""
    def build(family, num_channels=3, **size_keys):
        backbone = tiny_backbone(family, num_channels, **size_keys)
        width = backbone.config.hidden_size
        return Student(backbone, *(DINOHead(width, 24, 20, 8, norm_last_layer=False) for _ in range(2)))
    return build
