"""Schedules at their corners, groups and clipping by hand; their parity with the references is in test_golden.py."""
import math

import pytest
import torch

from model import DINOHead, Student, add_lora, build_backbone
from optim import clip_gradients, cosine_schedule, linear_schedule, param_groups


def test_schedule_corners():
    def lr(i, **kw):
        return cosine_schedule(1.0, 0.1, i, 100, 10, **kw)
    assert lr(0) == 0 and lr(9) == 1 and lr(10) == 1 and lr(55) == pytest.approx(0.55) and 0.1 < lr(99) < 0.101 and lr(100) == lr(10**6) == 0.1
    assert lr(10, reach_end=True) == 1 and lr(9, reach_end=True) == pytest.approx(0.9) and lr(99, reach_end=True) == pytest.approx(0.1)
    assert cosine_schedule(0.9, 1.0, 50, 100) == pytest.approx(0.95) and cosine_schedule(1, 0.5, 0, 1) == 1
    assert [linear_schedule(0, 1, i, 3) for i in range(5)] == [0, 0.5, 1, 1, 1]
    assert linear_schedule(0.04, 0.07, 0, 1) == 0.04 and linear_schedule(0.04, 0.07, 0, 0) == 0.07


def student(lora=False):
    backbone = build_backbone("dinov2", False, 3, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, patch_size=8, image_size=32)
    return Student(add_lora(backbone) if lora else backbone, DINOHead(16, 12, 8, 4, norm_last_layer=False), DINOHead(16, 12, 8, 4))


def test_every_trainable_parameter_is_in_one_group():
    for network in (student(), student(lora=True)):
        groups = param_groups(network, 0.1, 0.2, layerwise_decay=0.5, patch_embed_lr_mult=0.2)
        names = [name for group in groups for name in group["names"]]
        assert sorted(names) == sorted(name for name, p in network.named_parameters() if p.requires_grad) and len(set(names)) == len(names)
        for group in groups:
            assert group["lr"] == 0.1 * group["lr_mult"] and group["weight_decay"] == 0.2 * group["wd_mult"]
            assert all(name.startswith("backbone.") == group["is_backbone"] for name in group["names"])


def test_layer_decay_by_hand():
    mult = {name: group["lr_mult"] for group in param_groups(student(), 1, 1, 0.5, 0.2) for name in group["names"]}
    assert mult["backbone.embeddings.cls_token"] == 0.5**4 and mult["backbone.embeddings.patch_embeddings.projection.weight"] == pytest.approx(0.2 * 0.5**4)
    assert [mult[f"backbone.encoder.layer.{i}.mlp.fc1.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert mult["backbone.layernorm.weight"] == mult["dino_head.mlp.0.weight"] == mult["ibot_head.last_layer.parametrizations.weight.original1"] == 1


@pytest.mark.parametrize("by", ["parameter", "module"])
def test_clipping_by_hand(by):
    network = student()
    torch.manual_seed(0)
    before = {}
    for name, param in network.named_parameters():
        param.grad = torch.randn_like(param)
        before[name] = param.grad.clone()
    network.backbone.embeddings.mask_token.grad = None         # a parameter without gradient is passed over
    before.pop("backbone.embeddings.mask_token")
    total = clip_gradients(network, 3.0, by)
    assert total == pytest.approx(math.sqrt(sum(float(g.double().square().sum()) for g in before.values())), rel=1e-5)
    params = dict(network.named_parameters())
    for name, gradient in before.items():
        unit = [name] if by == "parameter" else [other for other in before if other.split(".")[0] == name.split(".")[0]]
        norm = math.sqrt(sum(float(before[other].double().square().sum()) for other in unit))
        assert torch.allclose(params[name].grad, gradient * min(1.0, 3.0 / (norm + 1e-6)), rtol=1e-5)
