"""Frozen teachers: every family of transformers and every pathology teacher of timm, tiny and
offline; prototypes; the cache."""
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import model
from augment import Photometrics
from checkpoint import export_hf
from configurator import UserError
from model import FAMILIES, forward_features, inflate_patch_embed
from teachers import (PATHOLOGY_TEACHERS, FeatureCache, FeatureStatistics, FrozenTeacher,
                      build_teacher, load_weights, spherical_kmeans)
from tests_support import TINY

SIZES = {key: value for key, value in TINY.items() if key != "pos_embed_rescale"}
TIMM = dict(embed_dim=24, depth=2, num_heads=2)
MEAN = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
STD = torch.tensor((0.229, 0.224, 0.225))[:, None, None]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(n=2, channels=3, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=generator)


def tiny_teacher(name, size=0, **keys):
    torch.manual_seed(0)
    return build_teacher(name, size=size, fallback_size=32, dtype=torch.float32, **keys)


# ---- one wrapper for all ----

@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_is_its_network_on_normalised_crops(family):
    teacher = tiny_teacher(family, **SIZES)
    x = pixels()
    cls, patches = teacher(x)
    with torch.no_grad():
        expected = forward_features(teacher.network, (x - MEAN) / STD)
    assert torch.equal(cls, expected[0]) and torch.equal(patches, expected[1])
    assert patches.shape == (2, 16, 16)
    teacher.train()
    assert not teacher.network.training
    assert not any(param.requires_grad for param in teacher.parameters())
    assert torch.equal(teacher(x)[0], cls)  # DINOv3's random positions would show here
    grey = x[:, :1]  # is copied into RGB
    assert torch.equal(teacher(grey)[0], teacher(grey.expand(-1, 3, -1, -1))[0])


def test_many_channels_are_what_inflated_filters_compute():
    """Without mean and std, the mean of five channels in RGB gives what model.inflate_patch_embed
    gives on five."""
    teacher, x = tiny_teacher("dinov2", **SIZES), pixels(channels=5)
    teacher.mean.zero_()
    teacher.std.fill_(1)
    conv = teacher.network.embeddings.patch_embeddings.projection
    expected = F.conv2d(x, inflate_patch_embed(conv.weight, 5), conv.bias, stride=8)
    found = []
    conv.register_forward_hook(lambda module, args, out: found.append(out))
    teacher(x)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_resizes_to_its_own_size():
    teacher, x = tiny_teacher("vit", size=48, **SIZES), pixels(size=40)
    assert teacher.grid == 6 and teacher(x)[1].shape == (2, 36, 16)
    resized = F.interpolate(x, size=(48, 48), mode="bicubic", antialias=True)
    assert torch.equal(teacher(x)[0], teacher(resized.clamp(0, 1))[0])
    message = "distilled_crops_size=36 is not a multiple of patch_size=8 of vit; use 32 or 40"
    with pytest.raises(UserError, match=message):
        tiny_teacher("vit", size=36, **SIZES)


def test_half_precision_weights_stay_near():
    whole, x = tiny_teacher("dinov2", **SIZES), pixels()
    torch.manual_seed(0)
    half = build_teacher("dinov2", fallback_size=32, **SIZES)
    assert next(half.network.parameters()).dtype == torch.bfloat16
    assert half(x)[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half(x)[0], half(x)[0])
    assert F.cosine_similarity(half(x)[0], whole(x)[0]).min() > 0.999


def test_a_teacher_keeps_the_input_of_its_weights(tmp_path):
    network, folder = tiny_teacher("dinov2", **SIZES).network, str(tmp_path / "hf")
    mean, std, x = (0.4,) * 3, (0.2,) * 3, pixels(size=24)
    export_hf(folder, network, 24, (-100, 300), mean, std, "card")
    teacher = build_teacher(folder, load_from_disk=True, dtype=torch.float32)
    assert teacher.size == 24 and teacher.intensity_range == (-100, 300)
    own = Photometrics("medical", (0, 1), mean, std).normalize(x)
    with torch.no_grad():
        expected = forward_features(network, own)[0]
    torch.testing.assert_close(teacher(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_frozen_teacher_is_a_module_without_trainables():
    network, half = tiny_teacher("vit", **SIZES).network, (0.5,) * 3
    teacher = FrozenTeacher(network, 32, 8, half, half, cls_mean=True)
    assert teacher.cls_width == 32 and teacher(pixels())[0].shape == (2, 32)
    cls, patches = teacher(pixels())
    torch.testing.assert_close(cls[:, 16:], patches.mean(dim=1))


# ---- checkpoint files ----

@pytest.mark.parametrize("wrapped", [False, True])
def test_a_weights_file_replaces_the_weights(tmp_path, wrapped):
    source = tiny_teacher("dinov2", **SIZES).network
    values = {name: value + 0.1 for name, value in source.state_dict().items()}
    path = str(tmp_path / ("w.pt" if wrapped else "w.safetensors"))
    if wrapped:
        inner = {f"module.backbone.{name}": value for name, value in values.items()}
        torch.save(dict(teacher=inner), path)
    else:
        save_file(values, path)
    source.save_pretrained(tmp_path / "shape")
    teacher = build_teacher(str(tmp_path / "shape"), path, load_from_disk=True, fallback_size=32,
                            dtype=torch.float32)
    found = teacher.network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in values.items())


def test_a_weights_file_that_does_not_fit_is_refused(tmp_path):
    source, path = tiny_teacher("dinov2", **SIZES).network, str(tmp_path / "part.pt")
    values = dict(source.state_dict())
    del values["layernorm.bias"]
    torch.save(values, path)
    message = (r"1 tensors differ, the first is layernorm.bias: absent in the file, \(16,\) in the "
               "network")
    with pytest.raises(UserError, match=message):
        load_weights(source, path)
    torch.save(source.state_dict() | dict(epoch=3), path)
    with pytest.raises(UserError, match=r"1 tensors differ, the first is epoch: \(\) in the file"):
        load_weights(source, path)
    (tmp_path / "no.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(source, str(tmp_path / "no.pt"))


def test_load_from_disk_asks_no_hub():
    message = ("load_from_disk=true with distilled_model_type='facebook/dinov2-large': give a "
               "local directory")
    with pytest.raises(UserError, match=message):
        build_teacher("facebook/dinov2-large", load_from_disk=True)
    with pytest.raises(UserError, match="distilled_model_weights='nowhere.pt': no such file"):
        build_teacher("vit", "nowhere.pt")


# ---- gated weights ----

class GatedRepoError(Exception):
    """As the hub's client raises it."""


def test_gated_weights_say_how_to_get_them(monkeypatch):
    def refuse(*args, **kwargs):
        text = "You are trying to access a gated repo.\nMake sure to have access to it"
        raise OSError(text) from GatedRepoError("403")
    monkeypatch.setattr(model.transformers.AutoConfig, "from_pretrained", refuse)
    message = ("'owkin/secret' is gated, or private.*`hf auth login`, accept the licence at "
               "https://huggingface.co/owkin/secret")
    with pytest.raises(UserError, match=message) as error:
        build_teacher("owkin/secret")
    assert "\n" not in str(error.value)


def test_gated_timm_weights_say_so_too(monkeypatch):
    timm = pytest.importorskip("timm")

    def refuse(*args, **kwargs):
        raise GatedRepoError("403 Client Error. (Request ID: 1)\n\nCannot access gated repo")
    monkeypatch.setattr(timm, "create_model", refuse)
    message = "'MahmoodLab/UNI2-h' is gated.*https://huggingface.co/MahmoodLab/UNI2-h"
    with pytest.raises(UserError, match=message):
        build_teacher("timm:hf_hub:MahmoodLab/UNI2-h")


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="needs timm; pip install timm"):
        build_teacher("timm:vit_tiny_patch16_224")


# ---- timm's architectures ----

@pytest.mark.parametrize("name", PATHOLOGY_TEACHERS)
def test_pathology_teachers_in_small(name):
    pytest.importorskip("timm")
    has_16_pixels = name.endswith(("UNI", "gigapath"))
    size = 48 if has_16_pixels else 42
    teacher = tiny_teacher(f"timm:hf_hub:{name}", size=size, **TIMM)
    known, network = PATHOLOGY_TEACHERS[name], teacher.network
    reg4 = 4 if "reg4" in known["architecture"] else 0
    registers = known["arguments"].get("reg_tokens", reg4)
    assert teacher.n_prefix == 1 + registers and teacher.grid == 3
    is_gated_mlp = type(network.blocks[0].mlp).__name__ == "GluMlp"
    assert is_gated_mlp == (name.split("/")[1] != "UNI")
    assert teacher.patch_size == (16 if has_16_pixels else 14)
    mean, std, x = MEAN, STD, pixels(size=teacher.size)
    if "mean" in known:
        mean = torch.tensor(known["mean"])[:, None, None]
        std = torch.tensor(known["std"])[:, None, None]
    with torch.no_grad():
        tokens = network.forward_features((x - mean) / std)
    expected = tokens[:, 0]
    if known.get("cls_mean"):
        patch_mean = tokens[:, teacher.n_prefix:].mean(dim=1)
        expected = torch.cat([expected, patch_mean], dim=1)
    cls, patches = teacher(x)
    torch.testing.assert_close(cls, expected)
    torch.testing.assert_close(patches, tokens[:, 1 + registers:])
    assert cls.shape == (2, teacher.cls_width) and patches.shape == (2, 9, teacher.patch_width)


def test_pathology_teachers_have_the_published_numbers_of_parameters():
    timm = pytest.importorskip("timm")
    millions = {}
    for name, known in PATHOLOGY_TEACHERS.items():
        arguments = dict(known["arguments"], num_classes=0, img_size=224)
        for key, home in (("mlp_layer", timm.layers), ("act_layer", torch.nn)):
            if key in arguments:
                arguments[key] = getattr(home, arguments[key])
        with torch.device("meta"):
            network = timm.create_model(known["architecture"], **arguments)
        count = sum(param.numel() for param in network.parameters())
        millions[name.split("/")[1]] = round(count / 1e6)
    assert millions == {"UNI": 303, "UNI2-h": 681, "prov-gigapath": 1135, "Virchow": 631,
                        "Virchow2": 631, "H-optimus-0": 1135, "H-optimus-1": 1135,
                        "H0-mini": 86}


def test_timm_weights_file_without_a_hub(tmp_path):
    timm = pytest.importorskip("timm")
    source = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    values, path = dict(source.state_dict()), str(tmp_path / "w.safetensors")
    values["head.weight"] = torch.zeros(3, 192)
    save_file(values, path)
    teacher = build_teacher("timm:vit_tiny_patch16_224", path, load_from_disk=True,
                            dtype=torch.float32)
    assert teacher.size == 224
    found = teacher.network.blocks[3].mlp.fc1.weight
    assert torch.equal(found, source.blocks[3].mlp.fc1.weight)
    with pytest.raises(UserError, match="'timm:resnet18' cannot be loaded as a ViT"):
        build_teacher("timm:resnet18", path)


# ---- statistics and prototypes ----

def planted(n=60, seed=0):
    """Rows around three directions, [n,8], unit length, and which of the three."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(3, 8, generator=generator), dim=1)
    which = torch.arange(n) % 3
    noise = 0.1 * torch.randn(n, 8, generator=generator)
    return F.normalize(centres[which] + noise, dim=1), which


def test_kmeans_finds_planted_directions():
    """From a start with one row of each. If two starts share a group, k-means may stay in a local
    optimum."""
    x, which = planted()
    groups = [which == group for group in range(3)]
    for seed in range(50):
        centres = spherical_kmeans(x, 3, seed)
        assert torch.allclose(centres.norm(dim=1), torch.ones(3))
        found = (x @ centres.T).argmax(dim=1)
        of_group = [found[group].unique() for group in groups]
        if all(len(one) == 1 for one in of_group) and len(found.unique()) == 3:
            for group, one in zip(groups, of_group):
                expected = F.normalize(x[group].sum(dim=0), dim=0)
                torch.testing.assert_close(centres[one[0]], expected)
            return
    raise AssertionError("not one of 50 starts found the three directions")


def view_major(values, images):
    """The given images of [n,V,...] as the network sees them, [V*B,...]."""
    return values[list(images)].transpose(0, 1).flatten(0, 1)


def test_statistics_are_those_of_all_views_and_do_not_depend_on_the_batches():
    x = 3 + 2 * normal(24, 2, 8)  # [n,V,D]
    patches = normal(24, 2, 4, 6, seed=1) - 1
    found = []
    for size, order in ((24, range(1)), (6, (2, 0, 3, 1))):
        images = [range(i * size, i * size + size) for i in order]
        statistics = FeatureStatistics(8, 6, 5)
        batches = [(list(n), view_major(x, n), view_major(patches, n)) for n in images]
        statistics.measure(batches, seed=3)
        found.append(statistics.state_dict())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])
    cls, flat = x.flatten(0, 1), patches.flatten(0, 2)
    torch.testing.assert_close(found[0]["cls_std"], cls.std(dim=0, correction=0))
    torch.testing.assert_close(found[0]["patch_mean"], flat.mean(dim=0))
    torch.testing.assert_close(found[0]["patch_std"], flat.std(dim=0, correction=0))
    standard = statistics.standardise(cls, patches.flatten(0, 1))
    assert standard[0].mean().abs() < 1e-5 and abs(standard[1].std() - 1) < 0.01
    logits, unit = statistics.logits(cls), F.normalize(standard[0], dim=1)
    torch.testing.assert_close(logits, unit @ statistics.prototypes.T)
    torch.testing.assert_close(logits.mean(dim=0, keepdim=True), statistics.center)


def test_more_prototypes_than_views_are_refused():
    x = 3 + 2 * normal(4, 2, 8)
    message = "dino_head_out_dim=9 prototypes cannot be found among 8 teacher features"
    with pytest.raises(UserError, match=message):
        FeatureStatistics(8, 6, 9).measure([(range(4), view_major(x, range(4)), None)], 0)


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_whitening_flattens_the_spectrum_by_its_power(whitening):
    """Correlated dimensions: the covariance of the targets has the old eigenvalues to the power
    1 - whitening, mean 1."""
    generator = torch.Generator().manual_seed(0)
    cls = torch.randn(200, 8, generator=generator)
    cls = 2 + cls @ torch.randn(8, 8, generator=generator)
    statistics = FeatureStatistics(8, 6, whitening=whitening)
    statistics.measure([(range(200), cls, None)], seed=0)
    standard, targets = statistics.standardise(cls)[0], statistics.features(cls)[0]
    before, after = (torch.linalg.eigvalsh(x.T @ x / len(x)) for x in (standard, targets))
    assert before[-1] > 20 * before[0]
    expected = before ** (1 - whitening)
    torch.testing.assert_close(after, expected / expected.mean(), rtol=1e-4, atol=1e-5)
    if whitening == 0:
        torch.testing.assert_close(targets, standard, rtol=1e-4, atol=1e-5)


# ---- the cache ----

def test_the_cache_computes_each_row_once_and_survives_a_kill(tmp_path):
    cls = torch.randn(6, 2, 8).bfloat16().float()  # [rows,V,...]
    patches = torch.randn(6, 2, 4, 3).bfloat16().float()
    folder, about, asked = str(tmp_path / "cache"), dict(seed=0, crops=(1, 2)), []

    def check(cache, rows):
        def compute(positions):
            missing = [rows[position] for position in positions]
            asked.extend(missing)
            return view_major(cls, missing), view_major(patches, missing)
        found = cache(rows, compute, "cpu")
        assert torch.equal(found[0], view_major(cls, rows))  # fp16 keeps what bf16 has
        assert torch.equal(found[1], view_major(patches, rows))
    cache = FeatureCache(folder, 6, 2, 8, (4, 3), about)
    check(cache, [0, 3])
    check(cache, [3, 5, 0])
    assert asked == [0, 3, 5]
    cache.files["cls"][4] = 7  # killed between writing a row and marking it
    check(FeatureCache(folder, 6, 2, 8, (4, 3), about), [4, 5, 3])
    assert asked == [0, 3, 5, 4]
    message = (r"holds features of another run: crops differ \(crops: \[1, 2\] there, \[1, 3\] "
               r"here\)")
    with pytest.raises(UserError, match=message):
        FeatureCache(folder, 6, 2, 8, (4, 3), dict(seed=0, crops=(1, 3)))
    found = sorted(os.listdir(folder))
    assert found == ["about.json", "cls.npy", "done.npy", "patches.npy"]


def test_a_cache_filled_without_patches_is_filled_again_with_them(tmp_path):
    """It once answered zeros: its rows were marked as done. The other way round nothing is computed
    again."""
    cls = torch.randn(2, 8).bfloat16().float()
    patches = torch.randn(2, 4, 3).bfloat16().float()

    def read(patches_shape, compute):
        cache = FeatureCache(str(tmp_path / "cache"), 2, 1, 8, patches_shape, {})
        return cache([0, 1], compute, "cpu")
    found = read((), lambda positions: (cls, None))
    assert torch.equal(found[0], cls) and found[1] is None
    assert torch.equal(read((4, 3), lambda positions: (cls, patches))[1], patches)
    assert torch.equal(read((), None)[0], cls)
