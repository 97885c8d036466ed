"""Schedules at their corners, parameter groups on real models, clipping against a computation by hand. Parity with the
references is in test_golden.py."""
import math

import pytest
import torch

from model import FAMILIES, add_lora
from optim import clip_gradients, cosine_schedule, linear_schedule, param_groups


# ---- schedules ----

def test_cosine_schedule_of_dino():
    at = [cosine_schedule(2.0, 0.5, i, 20, warmup_iterations=5, warmup_start=1.0) for i in range(25)]
    assert at[:5] == [1.0, 1.25, 1.5, 1.75, 2.0]              # the last warm-up iteration is at the peak,
    assert at[5] == 2.0                                       # and so is the first of the cosine
    assert at[12] == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi * 7 / 15)), rel=1e-12)
    assert at[19] == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi * 14 / 15)), rel=1e-12)   # one short of the end
    assert at[19] > 0.5 and at[20:] == [0.5] * 5


def test_cosine_schedule_of_dinov3():
    at = [cosine_schedule(2.0, 0.5, i, 20, warmup_iterations=5, warmup_start=1.0, reach_end=True) for i in range(25)]
    assert at[:6] == pytest.approx([1.0, 1.2, 1.4, 1.6, 1.8, 2.0], rel=1e-12)    # the peak stands once
    assert at[12] == pytest.approx(1.25, rel=1e-12)           # half of the way in the middle of 15 points
    assert at[19:] == pytest.approx([0.5] * 6, rel=1e-12)


@pytest.mark.parametrize("reach_end", [False, True])
def test_cosine_schedule_serves_values_that_rise(reach_end):
    at = [cosine_schedule(0.996, 1.0, i, 100, reach_end=reach_end) for i in range(101)]
    assert at[0] == pytest.approx(0.996, rel=1e-12) and at[100] == 1.0
    assert all(0.996 <= a < b <= 1.0 for a, b in zip(at[:99], at[1:]))


@pytest.mark.parametrize("reach_end", [False, True])
@pytest.mark.parametrize("max_iterations, warmup", [(1, 0), (1, 1), (3, 1), (2, 2), (2, 5)])
def test_cosine_schedule_of_short_runs_stays_in_range(max_iterations, warmup, reach_end):
    for i in range(max_iterations + 1):
        assert 0.0 <= cosine_schedule(1.0, 0.1, i, max_iterations, warmup, reach_end=reach_end) <= 1.0
    assert cosine_schedule(1.0, 0.1, 0, 1, reach_end=reach_end) == 1.0


def test_linear_schedule():
    at = [linear_schedule(0.04, 0.07, i, 4) for i in range(6)]
    assert at == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07], rel=1e-12)
    assert linear_schedule(0.04, 0.07, 0, 0) == 0.07
    assert [linear_schedule(0.04, 0.07, i, 1) for i in range(2)] == [0.04, 0.07]


# ---- parameter groups ----

def by_name(groups):
    return {name: group for group in groups for name in group["names"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_param_groups_take_every_trainable_parameter_once(tiny_student, family):
    student = tiny_student(family)
    next(student.backbone.parameters()).requires_grad_(False)
    groups = param_groups(student, 0.5, 0.1, layerwise_decay=0.9, patch_embed_lr_mult=0.2)
    expected = {name: param for name, param in student.named_parameters() if param.requires_grad}
    assert sorted(name for group in groups for name in group["names"]) == sorted(expected)
    for group in groups:
        assert [id(param) for param in group["params"]] == [id(expected[name]) for name in group["names"]]
        assert group["lr"] == 0.5 * group["lr_mult"] and group["weight_decay"] == 0.1 * group["wd_mult"]


def layer_of(name):
    """0 = embeddings, i + 1 = block i, 3 = after the two blocks."""
    if ".embeddings." in name:
        return 0
    return next((i + 1 for i in range(2) if f"layer.{i}." in name or f"layers.{i}." in name), 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_param_groups_of_every_family(tiny_student, family):
    """Norm and heads are not slowed down; vectors are not decayed."""
    student = tiny_student(family)
    params = dict(student.named_parameters())
    found = by_name(param_groups(student, 1.0, 1.0, layerwise_decay=0.5, patch_embed_lr_mult=0.1))
    for name, group in found.items():
        mult = 0.5 ** (3 - layer_of(name)) * (0.1 if "patch_embed" in name else 1.0)
        assert group["lr_mult"] == pytest.approx(mult), name
        assert group["wd_mult"] == (0.0 if params[name].ndim == 1 else 1.0), name
        assert group["is_backbone"] == name.startswith("backbone.") and group["is_last_layer"] == ("last_layer" in name)
        assert group["is_patch_embed"] == ("patch_embed" in name)
    assert sum("patch_embed" in name for name in found) == 2 and sum("last_layer" in name for name in found) == 4


def test_param_groups_of_a_lora_student_are_its_adapters_and_heads(tiny_student):
    student = tiny_student("dinov2")
    student.backbone = add_lora(student.backbone)
    found = by_name(param_groups(student, 1.0, 1.0, layerwise_decay=0.5))
    adapters = [name for name in found if "lora_" in name]
    assert len(adapters) == 2 * 2 * 2 and all("lora_" in name or "head" in name for name in found)
    for name in adapters:                                     # the peft wrapper's prefix does not hide the block
        assert found[name]["lr_mult"] == 0.5 ** (3 - layer_of(name)) and found[name]["is_backbone"]


# ---- clipping ----

def with_gradients(student, scale):
    """Random gradients in every parameter; returns copies of them."""
    torch.manual_seed(1)
    for param in student.parameters():
        param.grad = scale * torch.randn_like(param)
    return {name: param.grad.clone() for name, param in student.named_parameters()}


def joint_norm(gradients):
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in gradients))


@pytest.mark.parametrize("by, max_norm", [("parameter", 0.9), ("module", 5.0)])
def test_clip_gradients_by_hand(tiny_student, by, max_norm):
    student = tiny_student("vit")
    grads = with_gradients(student, 0.1)
    units = {}
    for name in grads:
        units.setdefault(name if by == "parameter" else name.split(".")[0], []).append(name)
    norms = {name: joint_norm(grads[other] for other in unit) for unit in units.values() for name in unit}
    assert min(norms.values()) < max_norm < max(norms.values())         # some are clipped, some are not
    total = clip_gradients(student, max_norm, by)
    assert float(total) == pytest.approx(joint_norm(grads.values()), rel=1e-5)     # that before clipping
    for name, param in student.named_parameters():
        factor = min(1.0, max_norm / (norms[name] + 1e-6))
        torch.testing.assert_close(param.grad, grads[name] * factor, rtol=1e-5, atol=1e-8)


def test_clip_gradients_at_zero_only_measures(tiny_student):
    student = tiny_student("vit")
    grads = with_gradients(student, 100.0)
    assert float(clip_gradients(student, 0, "module")) == pytest.approx(joint_norm(grads.values()), rel=1e-5)
    assert all(torch.equal(param.grad, grads[name]) for name, param in student.named_parameters())


def test_clip_gradients_passes_over_parameters_without_one(tiny_student):
    student = tiny_student("vit")
    grads = with_gradients(student, 1.0)
    for param in student.backbone.parameters():               # a frozen backbone
        param.grad = None
    heads = joint_norm(grad for name, grad in grads.items() if "head" in name)
    assert float(clip_gradients(student, 0, "parameter")) == pytest.approx(heads, rel=1e-5)
