"""Backbones of every family, channel inflation, heads, LoRA and freezing, and the teacher, which is
no second network."""
import contextlib
import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers

from augment import masked_tokens
from configurator import UserError
from last_block import use_plain_attention
from losses import dino_loss, ibot_loss, koleo_loss, softmax_center
from model import (FAMILIES, SIZE_KEYS, DINOHead, EMATeacher, Student, add_lora, blocks,
                   build_backbone, check_crop_sizes, forward_features, freeze_layers,
                   inflate_patch_embed, keys_without_effect)
from tests_support import ROOT

every_family = pytest.mark.parametrize("family", FAMILIES)


def pixels(n=2, channels=3, size=32, width=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, size, width or size, generator=generator)


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
    """CLS first, then registers, then patches. The crops have the size of the config, or are
    smaller, or are no square."""
    backbone = tiny_backbone(family)
    for size, width in ((32, 32), (16, 16), (16, 48)):
        images = pixels(size=size, width=width)
        cls, patches = features(backbone, images)
        extra = dict(interpolate_pos_encoding=True) if family == "vit" else {}
        with torch.no_grad():
            tokens = backbone(images, **extra).last_hidden_state
        n_patches = (size // 8) * (width // 8)
        n_registers = 2 if family in ("dinov2_with_registers", "dinov3_vit") else 0
        assert tokens.shape[1] == 1 + n_registers + n_patches
        assert torch.equal(cls, tokens[:, 0])
        assert torch.equal(patches, tokens[:, -n_patches:])


@every_family
def test_a_masked_patch_is_not_seen(tiny_backbone, family):
    """Pixels under the mask change nothing. Pixels beside it and the mask itself do."""
    backbone, images, masks = tiny_backbone(family), pixels(), some_masks()
    other = images.clone()
    other[0, :, 0:8, 8:24] = 5.0  # patches 1 and 2 of crop 0, which are masked
    same, seen = features(backbone, images, masks), features(backbone, other, masks)
    assert torch.equal(same[0], seen[0])
    assert torch.equal(same[1], seen[1])
    plain = features(backbone, images)
    assert not torch.allclose(plain[1][0], same[1][0], atol=1e-3)
    torch.testing.assert_close(plain[1][1], same[1][1])  # the other crop is not touched
    other[0, :, 0:8, 0:8] = 5.0  # patch 0 is not masked
    cls, _ = features(backbone, other, masks)
    assert not torch.allclose(cls[0], same[0][0], atol=1e-3)


@every_family
def test_the_mask_token_has_a_gradient(tiny_backbone, family):
    backbone = tiny_backbone(family)
    cls, _ = forward_features(backbone, pixels(), some_masks())
    cls.sum().backward()
    grads = [param.grad for name, param in backbone.named_parameters() if "mask_token" in name]
    assert len(grads) == 1 and float(grads[0].abs().sum()) > 0


@every_family
def test_crop_that_is_no_multiple_of_the_patch_is_refused(tiny_backbone, family):
    with pytest.raises(UserError, match="36x36 pixels is not a multiple of patch_size=8"):
        forward_features(tiny_backbone(family), pixels(size=36))


@pytest.mark.parametrize("model_type, options, message", [
    ("vit", {}, "is a family and has no weights"),
    ("./nowhere", {}, "no such directory"),
    ("nobody/nothing", {}, "cannot be loaded"),
    ("nobody/nothing", dict(use_pretrained=False), "cannot be loaded")])
def test_model_type_that_cannot_be_loaded(model_type, options, message):
    with pytest.raises(UserError, match=message) as error:
        build_backbone(model_type, **options)
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
    weights = backbone.state_dict()
    half = {name: weight for name, weight in weights.items() if "layer.1." not in name}
    backbone.save_pretrained(tmp_path, state_dict=half)
    with pytest.raises(UserError, match="do not fit its config.json; missing"):
        build_backbone(str(tmp_path))


@every_family
def test_shape_of_a_folder_with_random_weights(tiny_backbone, tmp_path, family):
    saved = tiny_backbone(family)
    saved.save_pretrained(tmp_path)
    fresh = build_backbone(str(tmp_path), use_pretrained=False, num_channels=2)
    expected = values_of(saved)
    for name, value in values_of(fresh).items():
        shape = expected.pop(name).shape
        assert "patch_embeddings" in name or value.shape == shape
    assert not expected and len(blocks(fresh)) == 2
    assert not torch.equal(fresh.embeddings.cls_token, saved.embeddings.cls_token)
    assert features(fresh, pixels(channels=2))[0].isfinite().all()


# ---- channels ----

def test_inflated_filters():
    weight = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert inflate_patch_embed(weight, 3) is weight
    one, six = inflate_patch_embed(weight, 1), inflate_patch_embed(weight, 6)
    torch.testing.assert_close(one, weight.sum(dim=1, keepdim=True))
    mean = weight.mean(dim=1, keepdim=True)
    torch.testing.assert_close(six, mean.expand(5, 6, 4, 4) / 2)
    filters = torch.arange(6.0).view(1, 3, 1, 2)  # of the channels: [0,1], [2,3], [4,5]
    assert inflate_patch_embed(filters, 2)[0, :, 0].tolist() == [[3, 4.5], [3, 4.5]]


@every_family
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_inflation_keeps_the_response_and_survives_a_reload(tiny_backbone, tmp_path, family,
                                                            channels):
    """For an image copied into all channels, the RGB network, the inflated one and its reload have
    equal features."""
    rgb = tiny_backbone(family)
    rgb.save_pretrained(tmp_path / "rgb")
    inflated = build_backbone(str(tmp_path / "rgb"), num_channels=channels)
    inflated.save_pretrained(tmp_path / "inflated")
    reloaded = build_backbone(str(tmp_path / "inflated"), num_channels=channels)
    assert reloaded.config.num_channels == channels
    grey = pixels(channels=1)
    expected = features(rgb, grey.repeat(1, 3, 1, 1))
    for backbone in (inflated, reloaded):
        found = features(backbone, grey.repeat(1, channels, 1, 1))
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # the export works without our code
        plain = transformers.AutoModel.from_pretrained(tmp_path / "inflated").eval()
        cls = plain(grey.repeat(1, channels, 1, 1)).last_hidden_state[:, 0]
    torch.testing.assert_close(cls, expected[0], rtol=1e-4, atol=1e-5)


@every_family
def test_from_scratch_with_other_channels(tiny_backbone, family):
    backbone = tiny_backbone(family, num_channels=4)
    assert backbone.config.num_channels == 4
    assert features(backbone, pixels(channels=4))[0].isfinite().all()


# ---- what of a script's config acts on a model ----

@pytest.mark.parametrize("family, entries, n_mlp", [  # width 16
    ("vit", dict(intermediate_size=24), 2 * 16 * 24 + 24 + 16),
    ("dinov2", dict(mlp_ratio=2), 2 * 16 * 32 + 32 + 16),
    ("dinov2", dict(use_swiglu_ffn=True), 3 * 16 * 48 + 2 * 48 + 16),  # 48: 64 * 2 / 3 up to 8s
    ("dinov2_with_registers", dict(mlp_ratio=3.0, qkv_bias=False), 2 * 16 * 48 + 48 + 16),
    ("dinov3_vit", dict(use_gated_mlp=True, intermediate_size=40), 3 * 16 * 40 + 2 * 40 + 16),
    ("dinov3_vit", dict(layerscale_value=1, key_bias=True), 2 * 16 * 64 + 64 + 16)])
def test_other_keys_of_the_hf_config_shape_the_network(tiny_backbone, family, entries, n_mlp):
    backbone = tiny_backbone(family, backbone_config=entries)
    params = dict(blocks(backbone)[0].named_parameters())
    assert sum(param.numel() for name, param in params.items() if "mlp" in name) == n_mlp
    biases = {name for name in params if "k_proj.bias" in name}
    assert bool(biases) == (family != "dinov2_with_registers" and entries.get("key_bias", True)
                            and (family != "dinov3_vit" or "key_bias" in entries))
    for key, value in entries.items():
        default = getattr(transformers.AutoConfig.for_model(family), key)
        assert getattr(backbone.config, key) == value
        assert type(getattr(backbone.config, key)) is type(default)
    cls, patches = forward_features(backbone, torch.randn(2, 3, 32, 32))
    assert cls.shape == (2, 16) and patches.shape == (2, 16, 16)


def test_image_size_and_norm_of_the_hf_config(tiny_backbone):
    backbone = tiny_backbone("vit", backbone_config=dict(image_size=64, layer_norm_eps=1e-3))
    assert backbone.embeddings.position_embeddings.shape == (1, 1 + 64, 16)
    assert {m.eps for m in backbone.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-3}


def test_keys_of_the_hf_config_for_the_shape_of_a_folder(tiny_backbone, tmp_path):
    tiny_backbone("dinov2").save_pretrained(tmp_path)
    backbone = build_backbone(str(tmp_path), False, 3, dict(mlp_ratio=1))
    assert backbone.config.mlp_ratio == 1 and backbone.config.num_hidden_layers == 2


@pytest.mark.parametrize("family, entries, words", [
    ("vit", dict(mlp_ratio=2), "vit has no key 'mlp_ratio'; it has attention_probs_dropout_prob"),
    ("dinov2", dict(mlp_ration=2), "dinov2 has no key 'mlp_ration'; did you mean 'mlp_ratio'?"),
    ("dinov2", dict(mlp_ratio=2.5), r"mlp_ratio = 2.5, needs int like 4"),
    ("dinov2", dict(mlp_ratio="two"), r"mlp_ratio = 'two', needs int like 4"),
    ("dinov2", dict(mlp_ratio=0), r"mlp_ratio = 0: must be in 1..65536"),
    ("dinov2", dict(use_swiglu_ffn=1), r"use_swiglu_ffn = 1, needs true or false"),
    ("dinov2", dict(layer_norm_eps=-1), r"layer_norm_eps = -1: must be in 0..65536"),
    ("dinov2", dict(use_mask_token=False), "has no key 'use_mask_token'"),
    ("dinov3_vit", dict(attention_dropout=7), r"attention_dropout = 7: must be in 0..0.99"),
    ("dinov3_vit", dict(pos_embed_shift="a"), r"backbone_config=.*pos_embed_shift"),
    ("vit", dict(hidden_act="geluu"), "hidden_act = 'geluu': choose one of .*gelu, "),
    ("vit", dict(image_size=[32, 64]), "image_size = .32, 64., needs int like")])
def test_what_the_hf_config_does_not_have_is_one_line(tiny_backbone, family, entries, words):
    with pytest.raises(UserError, match=words) as error:
        tiny_backbone(family, backbone_config=entries)
    assert "\n" not in str(error.value)


def settings(**changed):
    """The keys that check_crop_sizes and keys_without_effect read."""
    return SimpleNamespace(**{**dict(
        model_type="vit", global_crops_size=32, local_crops_size=16, local_crops_number=2,
        label_guided_crops_number=0, gram_loss_weight=0.0, gram_crops_size=0, drop_path_rate=0.0,
        pos_embed_rescale=0.0, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        patch_size=8, num_register_tokens=2, train_last_blocks=0), **changed})


@pytest.mark.parametrize("changed, key", [
    (dict(global_crops_size=33), "global_crops_size"),
    (dict(local_crops_size=7), "local_crops_size"),
    (dict(local_crops_size=7, local_crops_number=0, label_guided_crops_number=1),
     "local_crops_size"),
    (dict(gram_crops_size=44, gram_loss_weight=1.0), "gram_crops_size")])
def test_the_size_of_every_crop_that_exists_is_checked(changed, key):
    with pytest.raises(UserError, match=f"{key}=.*is not a multiple of patch_size=8 of vit; use"):
        check_crop_sizes(settings(**changed), 8)


def test_local_crops_are_made_a_multiple_of_the_patch():
    """As in the paper's Listings: 96 pixels for a network of 14-pixel patches."""
    said = []
    check_crop_sizes(settings(local_crops_size=96, global_crops_size=224), 14, said.append)
    [note] = said
    assert note.startswith("note: local_crops_size=96 is not a multiple of patch_size=14: ")
    assert note.endswith("local crops have 84 pixels; 98 is the next size")


@pytest.mark.parametrize("changed", [{}, dict(local_crops_size=17, local_crops_number=0),
                                     dict(gram_crops_size=44), dict(gram_loss_weight=1.0)])
def test_the_size_of_crops_that_do_not_exist_is_not_checked(changed):
    check_crop_sizes(settings(**changed), 8)


@every_family
def test_a_size_key_that_a_family_lacks_is_noted_if_it_was_changed(tiny_backbone, family):
    config, backbone = settings(model_type=family), tiny_backbone(family)
    assert keys_without_effect(config, backbone.config) == []
    notes = keys_without_effect(config, backbone.config, changed=SIZE_KEYS)
    expected = []
    if family in ("vit", "dinov2"):
        expected = [f"{family} has no num_register_tokens in transformers; "
                    "num_register_tokens=2 has no effect"]
    assert notes == expected


def test_every_changed_size_key_is_noted_if_the_model_has_sizes_of_its_own(tiny_backbone):
    config = settings(model_type="facebook/dinov2-small")
    backbone = tiny_backbone("dinov2")
    assert keys_without_effect(config, backbone.config) == []
    notes = keys_without_effect(config, backbone.config, changed=("patch_size", "lr"))
    assert notes == ["facebook/dinov2-small has sizes of its own; patch_size=8 has no effect"]
    notes = keys_without_effect(config, backbone.config, changed=dict.fromkeys(SIZE_KEYS))
    assert len(notes) == len(SIZE_KEYS)
    for key, note in zip(SIZE_KEYS, notes):
        assert f"; {key}={getattr(config, key)} has no effect" in note


def test_keys_that_act_only_on_other_families_are_noted(tiny_backbone):
    config = settings(drop_path_rate=0.5, pos_embed_rescale=2.0)
    notes = keys_without_effect(config, tiny_backbone("vit").config)
    assert notes == [
        "vit has no stochastic depth in transformers; drop_path_rate=0.5 has no effect",
        "vit has no random scale of positions in transformers; pos_embed_rescale=2.0 has no effect"]
    assert keys_without_effect(config, tiny_backbone("dinov3_vit").config) == []


# ---- heads ----

def test_head_is_its_formula():
    """Unit-length bottleneck times unit-length prototypes times the gain: cosines if it is 1."""
    torch.manual_seed(0)
    head = DINOHead(6, 9, hidden_dim=7, bottleneck_dim=4)
    x = torch.randn(5, 6)
    hidden = F.gelu(head.mlp[0](x))
    hidden = F.gelu(head.mlp[2](hidden))
    bottleneck = head.mlp[4](hidden)
    direction = head.last_layer.parametrizations.weight.original1
    cosine = F.cosine_similarity(bottleneck[:, None], direction[None], dim=-1)
    torch.testing.assert_close(head(x), cosine, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        head.last_layer.parametrizations.weight.original0.mul_(3)
    torch.testing.assert_close(head(x), 3 * cosine, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options, n_frozen", [
    (dict(norm_last_layer=True), 1), (dict(norm_last_layer=False), 0),
    (dict(weight_norm=False), 0)])
def test_head_gain_is_frozen_with_norm_last_layer(options, n_frozen):
    head = DINOHead(6, 9, 7, 4, **options)
    frozen = [name for name, param in head.named_parameters() if not param.requires_grad]
    assert frozen == ["last_layer.parametrizations.weight.original0"][:n_frozen]


def features_and_gradients(backbone, half):
    """One vector of the CLS features and of all gradients."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        cls, patches = forward_features(backbone, pixels())
    loss = cls.float().square().sum() + patches.float().pow(3).sum()
    loss.backward()
    parts = [param.grad.flatten() for param in backbone.parameters() if param.grad is not None]
    return torch.cat([cls.flatten().float(), *parts]).detach()


@every_family
def test_attention_of_training_on_a_cpu_is_that_of_transformers(tiny_backbone, family):
    """fp32: to rounding, features and gradients. Under bf16 autocast, with norms that round once:
    no further from fp32 than eager attention is."""
    found = {}
    for half in (False, True):
        eager, plain = tiny_backbone(family), tiny_backbone(family)
        eager.set_attn_implementation("eager")
        use_plain_attention(plain)
        found["eager", half] = features_and_gradients(eager, half)
        found["plain", half] = features_and_gradients(plain, half)
    exact = found["eager", False]
    torch.testing.assert_close(found["plain", False], exact, rtol=1e-4, atol=1e-4)
    eager = (found["eager", True] - exact).norm() / exact.norm()
    plain = (found["plain", True] - exact).norm() / exact.norm()
    assert 0 < plain < 1.5 * eager


def test_importing_model_registers_no_attention():
    """Only use_plain_attention does: an import must not change another library."""
    code = """
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
before = set(functions.valid_keys())
import model, last_block
assert set(functions.valid_keys()) == before and "plain" not in before
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)
model.use_plain_attention(model.build_backbone("vit", use_pretrained=False, **sizes))
assert set(functions.valid_keys()) == before | {"plain"}
assert functions["plain"] is last_block.plain_attention
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


# ---- student ----

@every_family
def test_one_forward_is_its_parts(tiny_student, family):
    """Global crops are masked, local crops are not. The DINO head gets every CLS token, the iBOT
    head the masked patches in row-major order."""
    student, masks = tiny_student(family).eval(), some_masks(4)
    masks[3, 5] = True
    global_crops, local_crops = pixels(4), pixels(6, size=16, seed=1)
    with torch.no_grad():
        out = student(global_crops, local_crops, masks)
        teacher_out = student(global_crops, masked=masked_tokens(masks))
    cls, patches = features(student.backbone, global_crops, masks)
    local_cls = features(student.backbone, local_crops)[0]
    tokens = []
    for crop in range(4):
        tokens += [patches[crop, patch] for patch in range(16) if masks[crop, patch]]
    with torch.no_grad():
        expected = dict(global_cls=cls, patches=patches, local_cls=local_cls,
                        global_logits=student.dino_head(cls),
                        local_logits=student.dino_head(local_cls),
                        masked_logits=student.ibot_head(torch.stack(tokens)))
        cls, patches = features(student.backbone, global_crops)
        expected_teacher = dict(global_cls=cls, patches=patches,
                                global_logits=student.dino_head(cls),
                                masked_logits=student.ibot_head(patches[masks]))
    for found, wanted in ((out, expected), (teacher_out, expected_teacher)):
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)


def test_shared_head_serves_the_patches(tiny_backbone):
    student = Student(tiny_backbone("dinov2"), DINOHead(16, 24, 20, 8)).eval()
    masks = some_masks()
    with torch.no_grad():
        out = student(pixels(), masks=masks)
        expected = student.dino_head(out["patches"][masks])
        torch.testing.assert_close(out["masked_logits"], expected)


# ---- LoRA and freezing ----

def training_step(student, optimizer):
    """One AdamW step on a loss that reaches every parameter, with large gradients."""
    student.train()
    teacher, masks = EMATeacher(student), some_masks(4)
    crops = pixels(4)
    with teacher.teacher_weights(student) as network:
        teacher_out = network(crops, masked=masked_tokens(masks))
    center = torch.zeros(1, teacher_out["global_logits"].shape[1])
    out = student(crops, pixels(4, size=16, seed=1), masks)
    probs = softmax_center(teacher_out["global_logits"], center, 0.04)
    probs = probs.unflatten(0, (2, -1))
    patch_probs = softmax_center(teacher_out["masked_logits"], center, 0.04)
    logits = torch.cat([out["global_logits"], out["local_logits"]])
    logits = logits.unflatten(0, (4, -1))
    loss = dino_loss(logits, probs) + ibot_loss(out["masked_logits"], patch_probs, masks)
    loss = loss + koleo_loss(out["global_cls"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def adamw(student, lr=1e-2):
    params = [param for param in student.parameters() if param.requires_grad]
    return torch.optim.AdamW(params, lr=lr)


@every_family
def test_lora_trains_adapters_and_heads_only(tiny_student, family):
    student = tiny_student(family)
    before = features(student.backbone, pixels())
    student.backbone = add_lora(student.backbone, r=2, alpha=4, dropout=0.0)
    for ours, theirs in zip(features(student.backbone, pixels()), before):
        assert torch.equal(ours, theirs)  # B starts at 0: adding adapters changes nothing
    start, optimizer = values_of(student), adamw(student)
    training_step(student, optimizer)
    training_step(student, optimizer)  # A has no gradient while B is 0
    moved = changed(start, values_of(student))
    assert moved == {name for name in start if "lora_" in name or "_head" in name}
    adapters = [name for name in moved if "lora_" in name]
    assert len(adapters) == 2 * 2 * 2
    assert all("q_proj" in name or "v_proj" in name for name in adapters)


@every_family
def test_lora_teacher_holds_adapters_and_heads_only(tiny_student, family):
    student = tiny_student(family)
    student.backbone = add_lora(student.backbone, r=2)
    teacher = EMATeacher(student)
    assert all("lora_" in name or "_head" in name for name in teacher.values)
    names = [name for name, _ in student.named_parameters() if name not in teacher.values]
    base = student.get_parameter(names[0])
    with teacher.teacher_weights(student) as network:  # the base exists once
        assert any(param.data_ptr() == base.data_ptr() for param in network.parameters())


@every_family
@pytest.mark.parametrize("n", [0, 1, 2])
def test_frozen_layers_do_not_move(tiny_student, family, n):
    student = tiny_student(family)
    freeze_layers(student.backbone, n)
    start, optimizer = values_of(student), adamw(student)
    training_step(student, optimizer)
    moved = changed(start, values_of(student))
    frozen = [".embeddings."] if n > 0 else []
    for i in range(n):
        frozen += [f".layer.{i}.", f".layers.{i}."]
    still = {name for name in start if any(part in name for part in frozen)}
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
        expected = momentum * old[name] + (1 - momentum) * new[name]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
        if momentum == 0.0:
            assert torch.equal(value, new[name])
        if momentum == 1.0:
            assert torch.equal(value, old[name])


def different_teacher(student):
    """An EMA teacher whose values all differ from the student's."""
    teacher = EMATeacher(student)
    torch.manual_seed(3)
    for value in teacher.values.values():
        value.add_(0.1 * torch.randn_like(value))
    return teacher


@every_family
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_teacher_weights_are_a_second_network(tiny_student, family, mixed_precision):
    """The output is that of a deep copy with the EMA values. Afterwards the student is
    bit-identical, output included, although autocast keeps a cache of bf16 weights."""
    student = tiny_student(family)
    teacher = different_teacher(student)
    second = copy.deepcopy(student)
    second.load_state_dict(teacher.values, strict=False)
    crops, masks = pixels(), some_masks()

    def autocast():
        if mixed_precision == "bf16":
            return torch.autocast("cpu", dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def output(network):
        with autocast():
            return network(crops, masks=masks)
    with torch.no_grad():
        expected, own = output(second.eval()), output(copy.deepcopy(student).eval())
    start = values_of(student)
    pointers = [param.data_ptr() for param in student.parameters()]
    output(student.eval())  # fills all caches with student values
    student.train()
    with teacher.teacher_weights(student) as network:
        assert not network.training and not torch.is_grad_enabled()
        found = output(network)
    assert changed(expected, found) == set()
    assert student.training and torch.is_grad_enabled()
    assert changed(start, values_of(student)) == set()
    assert pointers == [param.data_ptr() for param in student.parameters()]
    assert changed(own, output(student.eval())) == set()
    assert changed(expected, own) == set(own)  # the two do differ


def test_student_comes_back_after_an_error(tiny_student):
    student = tiny_student("vit").train()
    teacher, start = different_teacher(student), values_of(student)
    with pytest.raises(RuntimeError, match="inside"):
        with teacher.teacher_weights(student):
            raise RuntimeError("inside")
    assert changed(start, values_of(student)) == set()
    assert student.training and torch.is_grad_enabled()


def test_no_gradient_reaches_the_teacher(tiny_student):
    student = tiny_student("vit")
    teacher = different_teacher(student)
    start = {name: value.clone() for name, value in teacher.values.items()}
    with teacher.teacher_weights(student) as network:
        teacher_out = network(pixels(4))
    assert not any(value.requires_grad for value in teacher_out.values())
    training_step(student, adamw(student))
    assert changed(start, teacher.values) == set()  # only update moves it
    assert all(value.grad is None and not value.requires_grad for value in teacher.values.values())


def test_teacher_state_makes_a_round_trip(tiny_student):
    student = tiny_student("vit")
    teacher = different_teacher(student)
    fresh = EMATeacher(student)
    fresh.load_state_dict(copy.deepcopy(teacher.state_dict()))
    assert changed(fresh.values, teacher.values) == set()
    with pytest.raises(KeyError):
        fresh.load_state_dict({})
