"""Backbones of every family, channel inflation, heads, LoRA and freezing, and the teacher that is no second network."""
import contextlib
import copy

import pytest
import torch
import transformers

from configurator import UserError
from losses import dino_loss, ibot_loss, koleo_loss, softmax_center
from model import (FAMILIES, DINOHead, EMATeacher, Student, add_lora, blocks, build_backbone, forward_features,
                   freeze_layers, inflate_patch_embed)

every_family = pytest.mark.parametrize("family", FAMILIES)


def pixels(n=2, channels=3, size=32, width=None, seed=0):
    return torch.randn(n, channels, size, width or size, generator=torch.Generator().manual_seed(seed))


def some_masks(n=2, patches=16):
    """The first crop is masked in part, the others are not."""
    masks = torch.zeros(n, patches, dtype=torch.bool)
    masks[0, [1, 2, 7, 15]] = True
    return masks


def features(backbone, images, masks=None):
    with torch.no_grad():
        return forward_features(backbone.eval(), images, masks)


def changed(before, after):
    """Names whose values are not bit-identical."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def values_of(module):
    return {name: param.detach().clone() for name, param in module.named_parameters()}


# ---- backbone ----

@every_family
def test_features_are_tokens_of_the_last_norm(tiny_backbone, family):
    """CLS first, then registers, then patches; for the size of the config, a smaller crop and one that is no square."""
    backbone = tiny_backbone(family)
    for size, width in ((32, 32), (16, 16), (16, 48)):
        images = pixels(size=size, width=width)
        cls, patches = features(backbone, images)
        extra = dict(interpolate_pos_encoding=True) if family == "vit" else {}
        with torch.no_grad():
            tokens = backbone(images, **extra).last_hidden_state
        n_patches = (size // 8) * (width // 8)
        assert tokens.shape[1] == 1 + n_patches + (2 if family in ("dinov2_with_registers", "dinov3_vit") else 0)
        assert torch.equal(cls, tokens[:, 0]) and torch.equal(patches, tokens[:, -n_patches:])


@every_family
def test_a_masked_patch_is_not_seen(tiny_backbone, family):
    """Pixels under the mask change nothing, pixels beside it do, and the mask itself does."""
    backbone, images, masks = tiny_backbone(family), pixels(), some_masks()
    other = images.clone()
    other[0, :, 0:8, 8:24] = 5.0                              # patches 1 and 2 of crop 0, which are masked
    same, seen = features(backbone, images, masks), features(backbone, other, masks)
    assert torch.equal(same[0], seen[0]) and torch.equal(same[1], seen[1])
    plain = features(backbone, images)
    assert not torch.allclose(plain[1][0], same[1][0], atol=1e-3)
    torch.testing.assert_close(plain[1][1], same[1][1])       # the other crop is not touched
    other[0, :, 0:8, 0:8] = 5.0                               # patch 0 is not masked
    assert not torch.allclose(features(backbone, other, masks)[0][0], same[0][0], atol=1e-3)


@every_family
def test_the_mask_token_learns(tiny_backbone, family):
    backbone = tiny_backbone(family)
    forward_features(backbone, pixels(), some_masks())[0].sum().backward()
    grads = [param.grad for name, param in backbone.named_parameters() if "mask_token" in name]
    assert len(grads) == 1 and float(grads[0].abs().sum()) > 0


@every_family
def test_crop_that_is_no_multiple_of_the_patch_is_refused(tiny_backbone, family):
    with pytest.raises(UserError, match="36x36 pixels is not a multiple of patch_size=8"):
        forward_features(tiny_backbone(family), pixels(size=36))


@pytest.mark.parametrize("model_type, settings, message", [
    ("vit", {}, "is a family and has no weights"),
    ("./nowhere", {}, "no such directory"),
    ("nobody/nothing", {}, "cannot be loaded"),
    ("nobody/nothing", dict(use_pretrained=False), "cannot be loaded")])
def test_model_type_that_cannot_be_had(model_type, settings, message):
    with pytest.raises(UserError, match=message) as error:
        build_backbone(model_type, **settings)
    assert "\n" not in str(error.value)


def test_folder_with_another_kind_of_model(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a 'bert' model; supported are vit"):
        build_backbone(str(tmp_path))


def test_shape_of_pretrained_weights_cannot_be_changed(tiny_backbone, tmp_path):
    tiny_backbone("dinov2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="hidden_size=32 would change the shape"):
        build_backbone(str(tmp_path), hidden_size=32)
    assert build_backbone(str(tmp_path), drop_path_rate=0.2).config.drop_path_rate == 0.2


def test_weights_that_do_not_fit_their_config_are_refused(tiny_backbone, tmp_path):
    backbone = tiny_backbone("dinov2")
    half = {name: weight for name, weight in backbone.state_dict().items() if "layer.1." not in name}
    backbone.save_pretrained(tmp_path, state_dict=half)
    with pytest.raises(UserError, match="do not fit its config.json; missing"):
        build_backbone(str(tmp_path))


@every_family
def test_shape_of_a_folder_with_random_weights(tiny_backbone, tmp_path, family):
    saved = tiny_backbone(family)
    saved.save_pretrained(tmp_path)
    fresh = build_backbone(str(tmp_path), use_pretrained=False, num_channels=2)
    shapes, theirs = ({name: w.shape for name, w in backbone.named_parameters() if "patch_embeddings" not in name}
                      for backbone in (fresh, saved))
    assert shapes == theirs and len(blocks(fresh)) == 2
    assert not torch.equal(values_of(fresh)["embeddings.cls_token"], values_of(saved)["embeddings.cls_token"])
    assert features(fresh, pixels(channels=2))[0].isfinite().all()


# ---- channels ----

def test_inflated_filters():
    weight = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert inflate_patch_embed(weight, 3) is weight
    torch.testing.assert_close(inflate_patch_embed(weight, 1), weight.sum(dim=1, keepdim=True))
    six = inflate_patch_embed(weight, 6)
    torch.testing.assert_close(six, weight.mean(dim=1, keepdim=True).expand(5, 6, 4, 4) / 2)
    filters = torch.arange(6.0).view(1, 3, 1, 2)               # of the channels: [0,1], [2,3], [4,5]
    assert inflate_patch_embed(filters, 2)[0, :, 0].tolist() == [[3, 4.5], [3, 4.5]]


@every_family
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_inflation_keeps_the_response_and_survives_a_reload(tiny_backbone, tmp_path, family, channels):
    """An image copied into all channels looks the same to the RGB network and the inflated one, and after a reload."""
    rgb = tiny_backbone(family)
    rgb.save_pretrained(tmp_path / "rgb")
    inflated = build_backbone(str(tmp_path / "rgb"), num_channels=channels)
    inflated.save_pretrained(tmp_path / "inflated")
    reloaded = build_backbone(str(tmp_path / "inflated"), num_channels=channels)
    assert reloaded.config.num_channels == channels
    grey = pixels(channels=1)
    expected = features(rgb, grey.repeat(1, 3, 1, 1))
    for backbone in (inflated, reloaded):
        for ours, theirs in zip(features(backbone, grey.repeat(1, channels, 1, 1)), expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():                                     # nothing of ours is needed to use the export
        plain = transformers.AutoModel.from_pretrained(tmp_path / "inflated").eval()
        cls = plain(grey.repeat(1, channels, 1, 1)).last_hidden_state[:, 0]
    torch.testing.assert_close(cls, expected[0], rtol=1e-4, atol=1e-5)


@every_family
def test_from_scratch_with_other_channels(tiny_backbone, family):
    backbone = tiny_backbone(family, num_channels=4)
    assert backbone.config.num_channels == 4 and features(backbone, pixels(channels=4))[0].isfinite().all()


# ---- heads ----

def test_head_is_its_formula():
    """Unit-length bottleneck times unit-length prototypes times the gain: cosines, for any gain of 1."""
    torch.manual_seed(0)
    head = DINOHead(6, 9, hidden_dim=7, bottleneck_dim=4)
    x = torch.randn(5, 6)
    hidden = torch.nn.functional.gelu(head.mlp[2](torch.nn.functional.gelu(head.mlp[0](x))))
    bottleneck = head.mlp[4](hidden)
    direction = head.last_layer.parametrizations.weight.original1
    cosine = torch.nn.functional.cosine_similarity(bottleneck[:, None], direction[None], dim=-1)
    torch.testing.assert_close(head(x), cosine, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        head.last_layer.parametrizations.weight.original0.mul_(3)
    torch.testing.assert_close(head(x), 3 * cosine, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings, n_frozen", [(dict(norm_last_layer=True), 1), (dict(norm_last_layer=False), 0),
                                                (dict(weight_norm=False), 0)])
def test_head_gain_is_frozen_with_norm_last_layer(settings, n_frozen):
    head = DINOHead(6, 9, 7, 4, **settings)
    frozen = [name for name, param in head.named_parameters() if not param.requires_grad]
    assert frozen == ["last_layer.parametrizations.weight.original0"][:n_frozen]


@every_family
def test_attention_of_training_on_a_cpu_is_that_of_transformers(tiny_backbone, family):
    """fp32: to rounding, features and gradients. Under bf16 autocast, with norms that round once, no further from fp32 than eager is."""
    found = {}
    for attention, half in (("eager", False), ("plain", False), ("eager", True), ("plain", True)):
        backbone = tiny_backbone(family)
        backbone.set_attn_implementation(attention)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            cls, patches = forward_features(backbone, pixels())
        (cls.float().square().sum() + patches.float().pow(3).sum()).backward()
        gradients = [param.grad.flatten() for param in backbone.parameters() if param.grad is not None]
        found[attention, half] = torch.cat([cls.flatten().float(), *gradients]).detach()
    exact = found["eager", False]
    torch.testing.assert_close(found["plain", False], exact, rtol=1e-4, atol=1e-4)
    eager, plain = ((found[attention, True] - exact).norm() / exact.norm() for attention in ("eager", "plain"))
    assert 0 < plain < 1.5 * eager


# ---- student ----

@every_family
def test_one_forward_is_its_parts(tiny_student, family):
    """Global crops masked, local crops not; the DINO head on every CLS token, the iBOT head on the masked patches, in
    row-major order."""
    student, masks = tiny_student(family).eval(), some_masks(4)
    masks[3, 5] = True
    global_crops, local_crops = pixels(4), pixels(6, size=16, seed=1)
    with torch.no_grad():
        out = student(global_crops, local_crops, masks)
        teacher_out = student(global_crops, masks=masks, apply_masks=False)
    cls, patches = features(student.backbone, global_crops, masks)
    local_cls = features(student.backbone, local_crops)[0]
    tokens = torch.stack([patches[crop, patch] for crop in range(4) for patch in range(16) if masks[crop, patch]])
    with torch.no_grad():
        expected = dict(global_cls=cls, patches=patches, local_cls=local_cls, global_logits=student.dino_head(cls),
                        local_logits=student.dino_head(local_cls), masked_logits=student.ibot_head(tokens))
        cls, patches = features(student.backbone, global_crops)
        expected_teacher = dict(global_cls=cls, patches=patches, global_logits=student.dino_head(cls),
                                masked_logits=student.ibot_head(patches[masks]))
    for found, wanted in ((out, expected), (teacher_out, expected_teacher)):
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)


def test_shared_head_serves_the_patches(tiny_backbone):
    student, masks = Student(tiny_backbone("dinov2"), DINOHead(16, 24, 20, 8)).eval(), some_masks()
    with torch.no_grad():
        out = student(pixels(), masks=masks)
        torch.testing.assert_close(out["masked_logits"], student.dino_head(out["patches"][masks]))


# ---- LoRA and freezing ----

def training_step(student, optimizer):
    """One AdamW step on a loss that reaches everything, with large gradients so that whatever can move does."""
    student.train()
    teacher, masks = EMATeacher(student), some_masks(4)
    crops = pixels(4)
    with teacher.teacher_weights(student) as network:
        teacher_out = network(crops, masks=masks, apply_masks=False)
    center = torch.zeros(1, teacher_out["global_logits"].shape[1])
    out = student(crops, pixels(4, size=16, seed=1), masks)
    probs = softmax_center(teacher_out["global_logits"], center, 0.04).unflatten(0, (2, -1))
    patch_probs = softmax_center(teacher_out["masked_logits"], center, 0.04)
    logits = torch.cat([out["global_logits"], out["local_logits"]]).unflatten(0, (4, -1))
    loss = dino_loss(logits, probs) + ibot_loss(out["masked_logits"], patch_probs, masks)
    loss = loss + koleo_loss(out["global_cls"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def adamw(student, lr=1e-2):
    return torch.optim.AdamW([param for param in student.parameters() if param.requires_grad], lr=lr)


@every_family
def test_lora_trains_adapters_and_heads_only(tiny_student, family):
    student = tiny_student(family)
    before = features(student.backbone, pixels())
    student.backbone = add_lora(student.backbone, r=2, alpha=4, dropout=0.0)
    for ours, theirs in zip(features(student.backbone, pixels()), before):
        assert torch.equal(ours, theirs)                      # B starts at 0: adding adapters changes nothing
    start, optimizer = values_of(student), adamw(student)
    training_step(student, optimizer)
    training_step(student, optimizer)                         # A has no gradient while B is 0
    moved = changed(start, values_of(student))
    assert moved == {name for name in start if "lora_" in name or "_head" in name}
    adapters = [name for name in moved if "lora_" in name]
    assert len(adapters) == 2 * 2 * 2 and all("q_proj" in name or "v_proj" in name for name in adapters)


@every_family
def test_lora_teacher_holds_adapters_and_heads_only(tiny_student, family):
    student = tiny_student(family)
    student.backbone = add_lora(student.backbone, r=2)
    teacher = EMATeacher(student)
    assert all("lora_" in name or "_head" in name for name in teacher.values)
    base = next(param for name, param in student.named_parameters() if name not in teacher.values)
    with teacher.teacher_weights(student) as network:
        assert any(param.data_ptr() == base.data_ptr() for param in network.parameters())    # the base exists once


@every_family
@pytest.mark.parametrize("n", [0, 1, 2])
def test_frozen_layers_stand_still(tiny_student, family, n):
    student = tiny_student(family)
    freeze_layers(student.backbone, n)
    start, optimizer = values_of(student), adamw(student)
    training_step(student, optimizer)
    moved = changed(start, values_of(student))
    still = {name for name in start if n and ".embeddings." in name}
    still |= {name for name in start for i in range(n) if f".layer.{i}." in name or f".layers.{i}." in name}
    assert moved == set(start) - still


def test_freezing_more_blocks_than_there_are(tiny_backbone):
    with pytest.raises(UserError, match="freeze_backbone_layers=3, but the backbone has 2 blocks"):
        freeze_layers(tiny_backbone("vit"), 3)


# ---- teacher ----

@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_ema_is_its_formula(tiny_student, momentum):
    student = tiny_student("vit")
    teacher, old = EMATeacher(student), values_of(student)
    training_step(student, adamw(student))
    new = values_of(student)
    teacher.update(student, momentum)
    for name, value in teacher.values.items():
        torch.testing.assert_close(value, momentum * old[name] + (1 - momentum) * new[name], rtol=1e-6, atol=1e-7)
        if momentum in (0.0, 1.0):
            assert torch.equal(value, (new if momentum == 0.0 else old)[name])


def different_teacher(student):
    """An EMA teacher whose values are none of the student's."""
    teacher = EMATeacher(student)
    torch.manual_seed(3)
    for value in teacher.values.values():
        value.add_(0.1 * torch.randn_like(value))
    return teacher


@every_family
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_teacher_weights_are_a_second_network(tiny_student, family, mixed_precision):
    """Exactly the output of a deep copy with the EMA values; afterwards the student is bit-identical, output included,
    though autocast keeps a cache of bf16 weights."""
    student = tiny_student(family)
    teacher = different_teacher(student)
    second = copy.deepcopy(student)
    second.load_state_dict(teacher.values, strict=False)
    crops, masks = pixels(), some_masks()

    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16) if mixed_precision == "bf16" else contextlib.nullcontext()

    def output(network):
        with autocast():
            return network(crops, masks=masks)
    with torch.no_grad():
        expected, own = output(second.eval()), output(copy.deepcopy(student).eval())
    start = values_of(student)
    pointers = [param.data_ptr() for param in student.parameters()]
    output(student.eval())                                    # fills whatever caches there are with student values
    student.train()
    with teacher.teacher_weights(student) as network:
        assert not network.training and not torch.is_grad_enabled()
        found = output(network)
    assert changed(expected, found) == set()
    assert student.training and torch.is_grad_enabled()
    assert changed(start, values_of(student)) == set()
    assert pointers == [param.data_ptr() for param in student.parameters()]
    assert changed(own, output(student.eval())) == set()
    assert changed(expected, own) == set(own)                 # the two do differ


def test_student_comes_back_after_an_error(tiny_student):
    student = tiny_student("vit").train()
    teacher, start = different_teacher(student), values_of(student)
    with pytest.raises(RuntimeError, match="inside"):
        with teacher.teacher_weights(student):
            raise RuntimeError("inside")
    assert changed(start, values_of(student)) == set() and student.training and torch.is_grad_enabled()


def test_no_gradient_reaches_the_teacher(tiny_student):
    student = tiny_student("vit")
    teacher = different_teacher(student)
    start = {name: value.clone() for name, value in teacher.values.items()}
    with teacher.teacher_weights(student) as network:
        teacher_out = network(pixels(4))
    assert not any(value.requires_grad for value in teacher_out.values())
    training_step(student, adamw(student))
    assert changed(start, teacher.values) == set()            # only update moves it
    assert all(value.grad is None and not value.requires_grad for value in teacher.values.values())


def test_teacher_state_makes_a_round_trip(tiny_student):
    student = tiny_student("vit")
    teacher = different_teacher(student)
    fresh = EMATeacher(student)
    fresh.load_state_dict(copy.deepcopy(teacher.state_dict()))
    assert changed(fresh.values, teacher.values) == set()
    with pytest.raises(KeyError):
        fresh.load_state_dict({})
