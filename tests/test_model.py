"""Backbones of every family, channel inflation, what is frozen, and the teacher that is not a second network."""
import copy

import pytest
import torch

from configurator import UserError
from model import FAMILIES, DINOHead, EMATeacher, Student, add_lora, blocks, build_backbone, forward_features, freeze_layers, inflate_patch_embed

TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32, num_register_tokens=2)


def make_student(family="dinov2", channels=1):
    torch.manual_seed(0)
    return Student(build_backbone(family, False, channels, **TINY), DINOHead(16, 12, 8, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_transformers_and_masks_replace_tokens(family):
    backbone = build_backbone(family, False, 1, **TINY).eval()
    pixels = torch.randn(2, 1, 32, 32)
    cls, patches = forward_features(backbone, pixels)
    hidden = backbone(pixel_values=pixels).last_hidden_state
    assert torch.equal(cls, hidden[:, 0]) and torch.equal(patches, hidden[:, -16:])
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, 5] = True
    changed = pixels.clone()
    changed[0, :, 8:16, 8:16] += 1                             # patch 5: masked, so nobody can see the change
    assert torch.equal(forward_features(backbone, pixels, masks)[0], forward_features(backbone, changed, masks)[0])
    assert not torch.equal(forward_features(backbone, pixels, masks)[0][0], cls[0])
    assert forward_features(backbone, torch.randn(2, 1, 16, 48))[1].shape == (2, 12, 16)    # any size, also not square
    with pytest.raises(UserError, match="20x32 pixels is not a multiple of patch_size=8"):
        forward_features(backbone, torch.randn(1, 1, 20, 32))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_channel_meets_what_three_copies_met(family, tmp_path):
    rgb = build_backbone(family, False, 3, **TINY).eval()
    rgb.save_pretrained(tmp_path)
    grey = torch.randn(2, 1, 32, 32)
    reference = forward_features(rgb, grey.repeat(1, 3, 1, 1))[0]
    for channels in (1, 2, 5):                                 # the same pattern in all channels keeps its response
        inflated = build_backbone(str(tmp_path), True, channels).eval()
        assert torch.allclose(forward_features(inflated, grey.repeat(1, channels, 1, 1))[0], reference, atol=1e-5)
        assert inflated.config.num_channels == channels
    assert torch.equal(forward_features(build_backbone(str(tmp_path)).eval(), grey.repeat(1, 3, 1, 1))[0], reference)


def test_inflation_numbers():
    weight = torch.arange(6.0).view(1, 3, 1, 2)                # channel filters [0,1], [2,3], [4,5]
    assert inflate_patch_embed(weight, 1).flatten().tolist() == [6, 9]
    assert inflate_patch_embed(weight, 2)[0, :, 0].tolist() == [[3, 4.5]] * 2
    assert inflate_patch_embed(weight, 3) is weight


def test_freezing_and_lora():
    backbone = build_backbone("dinov3_vit", False, 1, **TINY)
    freeze_layers(backbone, 1)
    trainable = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in backbone.named_parameters() if "embeddings" not in name and ".layer.0." not in name}
    with pytest.raises(UserError, match="freeze_backbone_layers=3, but the backbone has 2 blocks"):
        freeze_layers(backbone, 3)
    for family in FAMILIES:
        lora = add_lora(build_backbone(family, False, 1, **TINY), r=2)
        names = {name for name, p in lora.named_parameters() if p.requires_grad}
        assert len(names) == 2 * 2 * 2 and all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in names)
        assert len(blocks(lora)) == 2


def test_ema_by_hand():
    student = make_student()
    teacher = EMATeacher(student)
    start = {name: value.clone() for name, value in teacher.values.items()}
    with torch.no_grad():
        for param in student.parameters():
            param.add_(1)
    for momentum, expected in ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0)):
        teacher.update(student, momentum)
        assert all(torch.allclose(value, start[name] + expected, atol=1e-6) for name, value in teacher.values.items())


@pytest.mark.parametrize("bf16", [False, True])
def test_teacher_is_what_a_second_network_would_be(bf16):
    student = make_student().train()
    teacher = EMATeacher(student)
    for value in teacher.values.values():
        value.add_(torch.randn_like(value) * 0.1)
    second = copy.deepcopy(student).eval()
    second.load_state_dict(teacher.values, strict=False)
    pixels, before = torch.randn(4, 1, 32, 32), {name: p.clone() for name, p in student.named_parameters()}

    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with teacher.teacher_weights(student) as network, autocast():
        ours = network(pixels)["global_logits"]
        assert not network.training and not ours.requires_grad
    with torch.no_grad(), autocast():
        assert torch.equal(ours, second(pixels)["global_logits"])
    with autocast():                                           # and afterwards the student is itself again, in bf16 too
        after = student(pixels)["global_logits"]
        with torch.no_grad():
            reference = copy.deepcopy(student)(pixels)["global_logits"]
    assert torch.equal(after, reference) and student.training
    assert all(torch.equal(before[name], p) for name, p in student.named_parameters())


def test_a_step_moves_what_is_trained_and_nothing_else():
    student = make_student()
    student.backbone = add_lora(student.backbone)
    before = {name: p.clone() for name, p in student.named_parameters()}
    teacher = EMATeacher(student)
    assert all("lora_" in name or "head" in name for name in teacher.values)               # the base exists once
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):                                         # lora A waits for B, which starts at 0
        student(torch.randn(4, 1, 32, 32))["global_logits"].square().sum().backward()
        optimizer.step()
    gain = "dino_head.last_layer.parametrizations.weight.original0"
    for name, param in student.named_parameters():
        assert torch.equal(param, before[name]) == (name not in teacher.values or name == gain), name


def test_head_has_unit_prototypes_and_fp32_length():
    head = DINOHead(16, 12, 8, 4)
    assert torch.allclose(head.last_layer.weight.norm(dim=1), torch.ones(12), atol=1e-5)
    assert float(head(torch.randn(5, 16)).detach().abs().max()) <= 1 + 1e-5                # unit features, unit prototypes


@pytest.mark.parametrize("arguments, message", [
    (dict(model_type="vit"), "is a family and has no weights"),
    (dict(model_type="./nowhere"), "no such directory"),
    (dict(model_type="nobody/nothing"), "cannot be loaded: neither a local directory"),
])
def test_what_cannot_be_loaded_is_said(arguments, message):
    with pytest.raises(UserError, match=message):
        build_backbone(**arguments)


def test_shapes_of_pretrained_weights_stay(tmp_path):
    build_backbone("dinov2", False, 3, **TINY).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="hidden_size=32 would change the shape"):
        build_backbone(str(tmp_path), hidden_size=32)
    assert build_backbone(str(tmp_path), drop_path_rate=0.3).config.drop_path_rate == 0.3
