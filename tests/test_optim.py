"""Schedules at their corners, parameter groups on real models, clipping against a computation by
hand. test_golden.py compares with the references."""
import math

import pytest
import torch
from torch import nn

from model import FAMILIES, add_lora
from optim import clip_gradients, cosine_schedule, linear_schedule, param_groups


# ---- schedules ----

def test_cosine_schedule_of_dino():
    settings = dict(max_iterations=20, warmup_iterations=5, warmup_start=1.0)
    at = [cosine_schedule(2.0, 0.5, i, **settings) for i in range(25)]
    assert at[:5] == [1.0, 1.25, 1.5, 1.75, 2.0]  # the last warm-up iteration is at the peak,
    assert at[5] == 2.0  # and so is the first of the cosine
    for i in (12, 19):  # iteration 19 is one short of the end
        angle = math.pi * (i - 5) / 15
        assert at[i] == pytest.approx(0.5 + 0.75 * (1 + math.cos(angle)), rel=1e-12)
    assert at[19] > 0.5 and at[20:] == [0.5] * 5


def test_cosine_schedule_of_dinov3():
    settings = dict(max_iterations=20, warmup_iterations=5, warmup_start=1.0, reach_end=True)
    at = [cosine_schedule(2.0, 0.5, i, **settings) for i in range(25)]
    warmup = [1.0, 1.2, 1.4, 1.6, 1.8]
    assert at[:6] == pytest.approx([*warmup, 2.0], rel=1e-12)  # one iteration has the peak
    assert at[12] == pytest.approx(1.25, rel=1e-12)  # half of the way in the middle of 15 points
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
        value = cosine_schedule(1.0, 0.1, i, max_iterations, warmup, reach_end=reach_end)
        assert 0.0 <= value <= 1.0
    assert cosine_schedule(1.0, 0.1, 0, 1, reach_end=reach_end) == 1.0


def test_linear_schedule():
    at = [linear_schedule(0.04, 0.07, i, 4) for i in range(6)]
    assert at == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07], rel=1e-12)
    assert linear_schedule(0.04, 0.07, 0, 0) == 0.07
    assert [linear_schedule(0.04, 0.07, i, 1) for i in range(2)] == [0.04, 0.07]


# ---- parameter groups ----

def by_name(groups):
    found = {}
    for group in groups:
        found.update(dict.fromkeys(group["names"], group))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_param_groups_take_every_trainable_parameter_once(tiny_student, family):
    student = tiny_student(family)
    next(student.backbone.parameters()).requires_grad_(False)
    groups = param_groups(student, 0.5, 0.1, layerwise_decay=0.9, patch_embed_lr_mult=0.2)
    params = {name: param for name, param in student.named_parameters() if param.requires_grad}
    names = []
    for group in groups:
        names += group["names"]
        expected = [id(params[name]) for name in group["names"]]
        assert [id(param) for param in group["params"]] == expected
        assert group["lr"] == 0.5 * group["lr_mult"]
        assert group["weight_decay"] == 0.1 * group["wd_mult"]
    assert sorted(names) == sorted(params)


def layer_of(name):
    """0 = embeddings, i + 1 = block i, 3 = after the two blocks."""
    if ".embeddings." in name:
        return 0
    for i in range(2):
        if f"layer.{i}." in name or f"layers.{i}." in name:
            return i + 1
    return 3


@pytest.mark.parametrize("family", FAMILIES)
def test_param_groups_of_every_family(tiny_student, family):
    """Norm and heads are not slowed down; heads have a factor; vectors are not decayed."""
    student = tiny_student(family)
    params = dict(student.named_parameters())
    groups = param_groups(student, 1.0, 1.0, layerwise_decay=0.5, patch_embed_lr_mult=0.1,
                          head_lr_mult=8.0)
    found = by_name(groups)
    for name, group in found.items():
        mult = 0.5 ** (3 - layer_of(name))
        if "patch_embed" in name:
            mult *= 0.1
        if not name.startswith("backbone."):
            mult *= 8
        assert group["lr_mult"] == pytest.approx(mult), name
        assert group["wd_mult"] == (0.0 if params[name].ndim == 1 else 1.0), name
        assert group["is_backbone"] == name.startswith("backbone.")
        assert group["is_last_layer"] == ("last_layer" in name)
        assert group["is_patch_embed"] == ("patch_embed" in name)
    assert sum("patch_embed" in name for name in found) == 2
    assert sum("last_layer" in name for name in found) == 4


def test_an_added_head_is_no_backbone(tiny_student):
    """Also if its name looks like that of a block or of an embedding."""
    student = tiny_student("dinov2")
    student.rotation_head = nn.Linear(16, 4)
    student.deep_rotation_head = nn.ModuleDict(dict(layers=nn.Sequential(nn.Linear(16, 4))))
    student.patch_embed_head = nn.Linear(16, 4)
    groups = param_groups(student, 1.0, 1.0, layerwise_decay=0.5, patch_embed_lr_mult=0.1)
    found = by_name(groups)
    for name in ("rotation_head", "deep_rotation_head.layers.0", "patch_embed_head"):
        group = found[f"{name}.weight"]
        assert group["lr_mult"] == 1.0, name
        assert not group["is_backbone"] and not group["is_patch_embed"], name
    first_block = found["backbone.encoder.layer.0.mlp.fc1.weight"]
    assert first_block["lr_mult"] == 0.5 ** 2  # the added `layers` do not count as blocks
    student.deep_rotation_head.layers.extend(nn.Linear(4, 4) for _ in range(5))
    deeper = by_name(param_groups(student, 1.0, 1.0, layerwise_decay=0.5))
    assert deeper["backbone.encoder.layer.0.mlp.fc1.weight"]["lr_mult"] == 0.5 ** 2


def test_param_groups_of_a_lora_student_are_its_adapters_and_heads(tiny_student):
    student = tiny_student("dinov2")
    student.backbone = add_lora(student.backbone)
    found = by_name(param_groups(student, 1.0, 1.0, layerwise_decay=0.5))
    adapters = [name for name in found if "lora_" in name]
    assert len(adapters) == 2 * 2 * 2
    assert all("lora_" in name or "head" in name for name in found)
    for name in adapters:  # the peft wrapper's prefix does not hide the block
        assert found[name]["lr_mult"] == 0.5 ** (3 - layer_of(name))
        assert found[name]["is_backbone"]


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
        unit = name if by == "parameter" else name.split(".")[0]
        units.setdefault(unit, []).append(name)
    norms = {}
    for names in units.values():
        norms.update(dict.fromkeys(names, joint_norm(grads[name] for name in names)))
    assert min(norms.values()) < max_norm < max(norms.values())  # not all units are clipped
    total = clip_gradients(student, max_norm, by)
    before = joint_norm(grads.values())
    assert float(total) == pytest.approx(before, rel=1e-5)
    for name, param in student.named_parameters():
        factor = min(1.0, max_norm / (norms[name] + 1e-6))
        torch.testing.assert_close(param.grad, grads[name] * factor, rtol=1e-5, atol=1e-8)


def test_clip_gradients_at_zero_only_measures(tiny_student):
    student = tiny_student("vit")
    grads = with_gradients(student, 100.0)
    norm = float(clip_gradients(student, 0, "module"))
    assert norm == pytest.approx(joint_norm(grads.values()), rel=1e-5)
    for name, param in student.named_parameters():
        assert torch.equal(param.grad, grads[name])


def test_clip_gradients_passes_over_parameters_without_one(tiny_student):
    student = tiny_student("vit")
    grads = with_gradients(student, 1.0)
    for param in student.backbone.parameters():  # a frozen backbone
        param.grad = None
    heads = joint_norm(grad for name, grad in grads.items() if "head" in name)
    assert float(clip_gradients(student, 0, "parameter")) == pytest.approx(heads, rel=1e-5)
