"""Weights as strangers have them: configs of released models, original .pth files, broken files."""
import argparse
import json
import os
import pickle
import re

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from configurator import UserError
from convert import convert
from model import build_backbone, forward_features
from teachers import build_teacher, load_weights
from tests_support import TINY
from weights import pretrained_input, read_tensors

WIDTH, PATCH, GRID = 128, 8, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(channels=3, size=PATCH * GRID):
    return normal(2, channels, size, size, seed=9)


# ---- original files ----

def original(family, inner=4 * WIDTH, depth=2):
    """Random tensors with the names and shapes of a file of Meta's: 'dino', 'dinov2', 'reg4',
    'giant' (DINOv2 with SwiGLU), 'dinov3', 'dinov3_plus' (SwiGLU)."""
    generator = torch.Generator().manual_seed(1)

    def some(*shape):
        return 0.2 * torch.randn(*shape, generator=generator)
    is_v3, is_gated = family.startswith("dinov3"), family in ("giant", "dinov3_plus")
    values = {"cls_token": some(1, 1, WIDTH), "norm.weight": 1 + some(WIDTH),
              "norm.bias": some(WIDTH), "patch_embed.proj.weight": some(WIDTH, 3, PATCH, PATCH),
              "patch_embed.proj.bias": some(WIDTH)}
    if not is_v3:
        values["pos_embed"] = some(1, 1 + GRID**2, WIDTH)
    if family != "dino":
        values["mask_token"] = some(1, WIDTH)
    if family == "reg4":
        values["register_tokens"] = some(1, 4, WIDTH)
    if is_v3:
        periods = 100 ** (torch.arange(16) / 16)  # heads of 64 numbers
        values.update({"rope_embed.periods": periods.bfloat16(),  # as the files keep them
                       "storage_tokens": some(1, 4, WIDTH),
                       "local_cls_norm.weight": some(WIDTH)})
    for i in range(depth):
        block = {"attn.qkv.weight": some(3 * WIDTH, WIDTH), "attn.qkv.bias": some(3 * WIDTH),
                 "attn.proj.weight": some(WIDTH, WIDTH), "attn.proj.bias": some(WIDTH)}
        for norm in ("norm1", "norm2"):
            block.update({f"{norm}.weight": 1 + some(WIDTH), f"{norm}.bias": some(WIDTH)})
        if family != "dino":
            block.update({"ls1.gamma": some(WIDTH), "ls2.gamma": some(WIDTH)})
        if is_v3:
            block["attn.qkv.bias_mask"] = torch.ones(3, WIDTH)
            block["attn.qkv.bias_mask"][1] = 0
            block["attn.qkv.bias_mask"] = block["attn.qkv.bias_mask"].flatten()
        layers = dict(fc1=(inner, WIDTH), fc2=(WIDTH, inner))
        if family == "giant":
            layers = dict(w12=(2 * inner, WIDTH), w3=(WIDTH, inner))
        elif is_gated:
            layers = dict(w1=(inner, WIDTH), w2=(inner, WIDTH), w3=(WIDTH, inner))
        for layer, shape in layers.items():
            block.update({f"mlp.{layer}.weight": some(*shape), f"mlp.{layer}.bias": some(shape[0])})
        values.update({f"blocks.{i}.{name}": value for name, value in block.items()})
    return values


INNER = dict(giant=344)  # transformers' rule: two thirds of 4 * 128, a multiple of 8


def reference(family, values):
    """Features of timm's own code for the same tensors: (CLS, patches) after the last norm."""
    timm = pytest.importorskip("timm")
    from timm.models import eva, vision_transformer
    names = dict(dino="vit_small_patch16_224", dinov2="vit_small_patch14_dinov2",
                 reg4="vit_small_patch14_reg4_dinov2", giant="vit_giant_patch14_dinov2",
                 dinov3="vit_small_patch16_dinov3_qkvb",
                 dinov3_plus="vit_small_plus_patch16_dinov3_qkvb")
    sizes = dict(embed_dim=WIDTH, depth=2, num_heads=2, patch_size=PATCH, img_size=PATCH * GRID)
    if family == "giant":
        sizes["mlp_ratio"] = 2 * INNER["giant"] / WIDTH
    elif family == "dinov3_plus":
        sizes["mlp_ratio"] = 4
    network = timm.create_model(names[family], num_classes=0, **sizes).eval()
    home = eva if family.startswith("dinov3") else vision_transformer
    renamed = home.checkpoint_filter_fn(dict(values), network)
    missing, left = network.load_state_dict(renamed, strict=False)
    assert not missing and set(left) <= {"mask_token"}
    with torch.no_grad():
        tokens = network.forward_features(pixels())
    return tokens[:, 0], tokens[:, network.num_prefix_tokens:]


@pytest.mark.parametrize("family", ["dino", "dinov2", "reg4", "giant", "dinov3", "dinov3_plus"])
def test_an_original_file_gives_the_features_of_timms_code(tmp_path, family):
    values = original(family, INNER.get(family, 4 * WIDTH))
    torch.save(values, tmp_path / "w.pth")
    network = build_backbone(str(tmp_path / "w.pth")).eval()
    with torch.no_grad():
        found = forward_features(network, pixels())
    for ours, theirs in zip(found, reference(family, values)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    if "mask_token" in values:
        mask_token = network.get_parameter("embeddings.mask_token")
        assert torch.equal(mask_token.flatten(), values["mask_token"].flatten())


def wrapped(kind):
    """The tensors of a DINOv2 file as training code keeps them."""
    values = original("dinov2")
    heads = {"dino_head.mlp.0.weight": torch.zeros(3), "head.last_layer.weight": torch.zeros(3)}

    def named(prefix, tensors):
        return {prefix + name: value for name, value in tensors.items()}
    other = {name: value + 1 for name, value in values.items()}  # a student
    if kind == "argparse":  # DINO's checkpoint.pth
        return dict(student=named("module.backbone.", other), epoch=3, loss=np.float64(0.5),
                    teacher=named("backbone.", values) | heads, args=argparse.Namespace(lr=1e-3))
    if kind == "flat":  # one network that has both
        return dict(model=named("student.backbone.", other) | named("teacher.backbone.", values)
                    | named("teacher.", heads), iteration=7)
    if kind == "chunks":  # FSDP's chunks of blocks, in DINOv2's own runs
        return dict(teacher={f"backbone.{name}".replace("blocks.", "blocks.0."): value
                             for name, value in values.items()})
    return dict(state_dict=named("module.", values) | {"module.fc.weight": torch.zeros(2)})


@pytest.mark.parametrize("kind", ["argparse", "flat", "chunks", "state_dict"])
def test_prefixes_and_wrappers_are_taken_off_and_a_teacher_comes_first(tmp_path, kind):
    path = str(tmp_path / "checkpoint.pth")
    torch.save(wrapped(kind), path)
    network = build_backbone(path).eval()
    expected = convert(original("dinov2"), "")[1]
    position = network.get_parameter("embeddings.position_embeddings")
    assert torch.equal(position, expected["embeddings.position_embeddings"])
    assert network.config.model_type == "dinov2" and network.config.num_hidden_layers == 2


def test_an_original_file_is_a_teacher_with_its_normalisation(tmp_path):
    """As distilled_model_type, and as distilled_model_weights of a folder's architecture."""
    path = str(tmp_path / "dinov2_vits14_pretrain.pth")
    torch.save(original("dinov2"), path)
    network, x = build_backbone(path).eval(), torch.rand(2, 3, 32, 32)
    teacher = build_teacher(path, load_from_disk=True, size=32, dtype=torch.float32)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.no_grad():
        expected = forward_features(network, (x - mean) / std)[0]
    torch.testing.assert_close(teacher(x)[0], expected)
    assert pretrained_input(path)["size"] == 224
    satellite = pretrained_input("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth")
    assert satellite["mean"] == (0.430, 0.411, 0.296)
    fresh = build_backbone(path, use_pretrained=False)
    fresh.save_pretrained(tmp_path / "shape")
    teacher = build_teacher(str(tmp_path / "shape"), path, size=32, dtype=torch.float32)
    torch.testing.assert_close(teacher(x)[0], expected)
    values = convert(original("dinov2"), "")[1]  # as a folder of transformers 4 names them
    load_weights(fresh, save(values, tmp_path / "hub.safetensors"))
    for ours, theirs in zip(fresh.state_dict().values(), network.state_dict().values()):
        assert torch.equal(ours, theirs)


def save(values, path):
    save_file(values, path)
    return str(path)


def one_line(function, *args):
    """The message of the UserError that a call raises."""
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


@pytest.mark.parametrize("changed, message", [
    (dict(other=torch.zeros(2)), "looks like dinov2, but other has no place there"),
    ({"reg_token": torch.zeros(1, 4, WIDTH)}, "but reg_token has no place there.*timm:NAME"),
    ({"pos_embed": torch.zeros(1, 13, WIDTH)}, "13 positions are not CLS and a square"),
    ({"norm.weight": torch.zeros(3)}, "do not fit .*of other shape .*layernorm.weight"),
    ({"norm.weight": None}, "missing .*layernorm.weight"),
    ({"blocks.0.mlp.fc2.weight": None}, "is no ViT of DINO's, DINOv2's or DINOv3's code"),
    ({"pos_embed": None}, "is no ViT of DINO's, DINOv2's or DINOv3's code"),
    ({"cls_token": None}, "is no ViT of DINO's, DINOv2's or DINOv3's code"),
    ({"embeddings.cls_token": torch.zeros(1)}, "has the names of transformers")])
def test_what_is_no_such_file_is_said_in_one_line(tmp_path, changed, message):
    values = {name: value for name, value in (original("dinov2") | changed).items()
              if value is not None}
    torch.save(values, tmp_path / "w.pth")
    assert re.search(message, one_line(build_backbone, str(tmp_path / "w.pth")))


def test_widths_that_do_not_tell_the_heads_are_refused(tmp_path):
    values = {name: value[..., :96] if value.shape[-1] == WIDTH else value
              for name, value in original("dino").items()}
    values["patch_embed.proj.weight"] = torch.zeros(96, 3, 8, 8)
    torch.save(values, tmp_path / "w.pth")
    assert "96 wide" in one_line(build_backbone, str(tmp_path / "w.pth"))


# ---- files that are not what they seem ----

def test_no_code_in_a_weights_file_runs(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    torch.save(dict(teacher=original("dinov2"), args=Trap()), tmp_path / "a.pth")
    with open(tmp_path / "b.pth", "wb") as file:
        pickle.dump(Trap(), file, protocol=2)
    for name in "ab":
        assert "cannot be read" in one_line(read_tensors, str(tmp_path / f"{name}.pth"))
    assert "could run code" in one_line(read_tensors, str(tmp_path / "a.pth"))
    assert not (tmp_path / "executed").exists()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 88000000\n"


def broken(path, how):
    """Break a weights file, in place."""
    whole = path.read_bytes() if path.exists() else b""
    path.unlink(missing_ok=True)
    contents = dict(lfs=LFS, empty=b"", html=b"<!DOCTYPE html><html>", half=whole[:len(whole) // 2],
                    head=whole[:20], text=b"hello, these are no weights")
    if how != "missing":
        path.write_bytes(contents[how])


FAULTS = [("lfs", "is a Git LFS pointer, not the weights; `git lfs pull`"), ("empty", "is empty"),
          ("html", "is a web page"), ("missing", "is missing"), ("half", "is .*whole"),
          ("head", "is .*whole"), ("text", "is .*whole")]


@pytest.mark.parametrize("how, message", FAULTS)
def test_broken_weights_are_named(tiny_backbone, tmp_path, how, message):
    folder, file = tmp_path / "hf", tmp_path / "w.pth"
    tiny_backbone("dinov2").save_pretrained(folder)
    torch.save(original("dinov2"), file)
    for path, name in ((folder / "model.safetensors", folder), (file, file)):
        broken(path, how)
        found = one_line(build_backbone, str(name))
        assert found.startswith(f"model_type={str(name)!r}") and re.search(message, found)
        found = one_line(build_teacher, str(name))
        assert found.startswith(f"distilled_model_type={str(name)!r}")
        assert re.search(message, found)
    if how != "missing":
        with pytest.raises(UserError) as error:
            build_teacher("vit", str(file), **TINY)
        found = str(error.value)
        assert found.startswith("distilled_model_weights=") and re.search(message, found)


def test_a_pickled_bin_is_read_without_code(tiny_backbone, tmp_path):
    network = tiny_backbone("dinov2")
    network.config.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(build_backbone(str(tmp_path)).layernorm.weight, network.layernorm.weight)

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    torch.save(dict(network.state_dict(), trap=Trap()), tmp_path / "pytorch_model.bin")
    assert "cannot be read" in one_line(build_backbone, str(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_weights_of_a_deeper_network_than_the_config_are_refused(tiny_backbone, tmp_path):
    """transformers would leave the upper blocks out without a word."""
    tiny_backbone("dinov2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("out_features", "out_indices", "stage_names"):
        config.pop(key)
    (tmp_path / "config.json").write_text(json.dumps(config | dict(num_hidden_layers=1)))
    assert "without a place ['encoder.layer.1" in one_line(build_backbone, str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | dict(hidden_size=24)))
    assert "of other shape" in one_line(build_backbone, str(tmp_path))


# ---- configs of released models ----

BIT = dict(image_processor_type="BitImageProcessor", size={"shortest_edge": 256}, resample=3,
           crop_size={"height": 224, "width": 224}, do_center_crop=True, do_convert_rgb=True,
           do_normalize=True, do_rescale=True, do_resize=True, rescale_factor=0.00392156862745098,
           image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
OLD = dict(do_normalize=True, do_resize=True, feature_extractor_type="ViTFeatureExtractor",
           resample=2, size=224)
V3 = dict(BIT, image_processor_type="DINOv3ViTImageProcessorFast", crop_size=None, resample=2,
          do_center_crop=None, size={"height": 224, "width": 224}, data_format="channels_first")
VIT = dict(architectures=["ViTModel"], model_type="vit", image_size=224, layer_norm_eps=1e-12,
           qkv_bias=True, num_channels=3, hidden_act="gelu", attention_probs_dropout_prob=0.0)
DINOV2 = dict(architectures=["Dinov2Model"], model_type="dinov2", image_size=518, mlp_ratio=4,
              patch_size=14, layerscale_value=1.0, use_swiglu_ffn=False, qkv_bias=True,
              torch_dtype="float32", transformers_version="4.32.0.dev0", drop_path_rate=0.0)
REG = dict(DINOV2, architectures=["Dinov2WithRegistersModel"], num_register_tokens=4,
           model_type="dinov2_with_registers", interpolate_antialias=True, interpolate_offset=0.0)
DINOV3 = dict(architectures=["DINOv3ViTModel"], model_type="dinov3_vit", image_size=224,
              patch_size=16, num_register_tokens=4, layer_norm_eps=1e-5, rope_theta=100.0,
              query_bias=True, key_bias=False, value_bias=True, proj_bias=True, mlp_bias=True,
              use_gated_mlp=False, pos_embed_rescale=2.0, intermediate_size=32, hidden_act="gelu",
              pos_embed_shift=None, pos_embed_jitter=None, transformers_version="4.56.0.dev0")
IMAGENET, HALF = [0.485, 0.456, 0.406], [0.5, 0.5, 0.5]
RELEASED = {  # config.json, preprocessor_config.json, mean; depth and width are shrunk
    "facebook/dino-vits16": (dict(VIT, patch_size=16, intermediate_size=32),
                             dict(OLD, image_mean=IMAGENET, image_std=BIT["image_std"]), IMAGENET),
    "facebook/dino-vitb8": (dict(VIT, patch_size=8, intermediate_size=32),
                            dict(OLD, image_mean=IMAGENET, image_std=BIT["image_std"]), IMAGENET),
    "google/vit-base-patch16-224": (
        dict(VIT, patch_size=16, intermediate_size=32, id2label={"0": "tench", "1": "goldfish"},
             architectures=["ViTForImageClassification"]),
        dict(OLD, size={"height": 224, "width": 224}, image_mean=HALF, image_std=HALF), HALF),
    "google/vit-base-patch16-224-in21k": (dict(VIT, patch_size=16, intermediate_size=32),
                                          dict(OLD, image_mean=HALF, image_std=HALF), HALF),
    "facebook/dinov2-base": (DINOV2, BIT, IMAGENET),
    "facebook/dinov2-giant": (dict(DINOV2, use_swiglu_ffn=True), BIT, IMAGENET),
    "facebook/dinov2-with-registers-large": (REG, BIT, IMAGENET),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": (DINOV3, V3, IMAGENET),
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": (
        dict(DINOV3, use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False),
        V3, IMAGENET),
    "lists": (dict(VIT, patch_size=[8, 8], image_size=[32, 32], intermediate_size=32),
              dict(OLD, image_mean=IMAGENET, image_std=BIT["image_std"]), IMAGENET),
    "no mask token": (dict(DINOV2, use_mask_token=False), BIT, IMAGENET),
    "no mean": (dict(VIT, patch_size=16, intermediate_size=32), OLD, HALF)}


@pytest.mark.parametrize("name", RELEASED)
def test_configs_of_released_models(tmp_path, name):
    config, processor, mean = RELEASED[name]
    folder = str(tmp_path)
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(config | small))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    built = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))
    weights = {key: value for key, value in built.state_dict().items() if "mask" not in key}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    network = build_backbone(folder).eval()
    expected = pretrained_input(folder)
    assert expected["size"] == 224 and list(expected["mean"]) == mean
    patch = network.config.patch_size
    masks = torch.zeros(2, 4, dtype=torch.bool)
    masks[:, 1] = True
    with torch.no_grad():
        found = forward_features(network, pixels(size=2 * patch), masks)[0]
    assert found.isfinite().all()
    teacher = build_teacher(folder, dtype=torch.float32)
    assert teacher.size == 224 and teacher.mean.flatten().tolist() == pytest.approx(mean)


@pytest.mark.parametrize("settings, expected", [
    (dict(size=96, crop_size=64), 64), (dict(size={"shortest_edge": 96}, crop_size=None), 96),
    (dict(size={"height": 64, "width": 64}), 64), (dict(size={"longest_edge": 80}), 80),
    (dict(size=96, crop_size=64, do_center_crop=False), 96), ({}, 0)])
def test_sizes_of_old_and_new_processors(tmp_path, settings, expected):
    settings = dict(settings, image_mean=IMAGENET, image_std=BIT["image_std"])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    found = pretrained_input(str(tmp_path))
    assert found["size"] == expected and found["intensity_range"] is None


@pytest.mark.parametrize("settings, mean, std", [
    (dict(image_mean=0.4, image_std=0.2), (0.4,) * 3, (0.2,) * 3),
    (dict(do_normalize=False), (0.0,) * 3, (1.0,) * 3),
    (dict(do_rescale=False, image_mean=[127.5], image_std=[51.0]), (0.5,), (0.2,)),
    (dict(rescale_factor=1.0, image_mean=[127.5], image_std=[51.0]), (0.5,), (0.2,))])
def test_mean_and_std_are_of_pixels_in_0_to_1(tmp_path, settings, mean, std):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    found = pretrained_input(str(tmp_path))
    assert found["mean"] == pytest.approx(mean) and found["std"] == pytest.approx(std)


def test_a_damaged_or_absent_processor(tmp_path):
    assert pretrained_input(str(tmp_path)) == {}
    file = tmp_path / "preprocessor_config.json"
    for content in ("{", LFS.decode(), "[]", '{"image_mean": "x", "image_std": [1]}',
                    '{"image_mean": [0.5], "image_std": [1], "intensity_range": [0, 0]}'):
        file.write_text(content)
        found = one_line(pretrained_input, str(tmp_path))
        assert "preprocessor_config.json" in found
    file.write_text("{}")
    assert pretrained_input(str(tmp_path)) == {}


# ---- what is none of the families ----

FOREIGN = {"clip": transformers.CLIPConfig, "siglip": transformers.SiglipConfig,
           "clip_vision_model": transformers.CLIPVisionConfig, "swin": transformers.SwinConfig,
           "beit": transformers.BeitConfig, "convnext": transformers.ConvNextConfig,
           "vit_msn": transformers.ViTMSNConfig, "vit_mae": transformers.ViTMAEConfig,
           "bert": transformers.BertConfig}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_architecture_is_refused_by_all(tmp_path, name):
    FOREIGN[name]().save_pretrained(tmp_path)
    for function, key in ((build_backbone, "model_type"), (build_teacher, "distilled_model_type")):
        found = one_line(function, str(tmp_path))
        assert found.startswith(f"{key}={str(tmp_path)!r} is a {name!r} model; supported are vit, "
                                "dinov2, dinov2_with_registers, dinov3_vit")


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("files, message", [
    ({"config.json": '{"architecture": "vit_small_patch14_dinov2", "num_classes": 0,'
                     ' "pretrained_cfg": {"num_classes": 0}}'},
     "is a 'timm_wrapper' model; supported are .*timm:hf_hub:"),
    ({"config.json": '{"hidden_size": 16}'}, "config.json that cannot be used"),
    ({"config.json": "{"}, "config.json that cannot be used"),
    ({"config.json": LFS.decode()}, "config.json that cannot be used"),
    ({"config.json": '{"model_type": "vit", "hidden_size": "wide"}'}, "config.json"),
    ({"config.json": '{"model_type": "vit", "hidden_size": 16, "num_attention_heads": 0}'},
     "config.json"),
    ({"config.json": '{"model_type": "vit", "image_size": [64, 32]}'}, "is no square"),
    ({"config.json": '{"model_type": "dinov3_vit", "patch_size": [16, 8]}'}, "is no square"),
    ({"config.json": '{"model_type": "of_tomorrow"}'}, "is a 'of_tomorrow' model; supported are"),
    ({"config.json": '{"model_type": "vit"}'}, "no weights; model.safetensors is missing"),
    ({"config.py": "lr = 1\n"}, "this is a run; its weights are in .*checkpoints/best/hf"),
    ({"adapter_config.json": "{}"}, "this is an adapter alone"),
    ({"notes.txt": ""}, "a directory without config.json")])
def test_folders_without_a_model(tmp_path, files, message):
    for name, text in files.items():
        write(tmp_path / "m" / name, text)
    found = one_line(build_backbone, str(tmp_path / "m"))
    assert re.search(message, found), found


def test_timm_names_are_not_trained():
    assert "a model of timm, which can be distill.py's teacher" in one_line(
        build_backbone, "timm:vit_small_patch14_dinov2")


def test_a_rectangle_without_positions_is_fine(tmp_path):
    """DINOv3 has no table of positions: image_size is only what it was trained at."""
    sizes = {key: value for key, value in TINY.items() if key != "image_size"}
    network = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model("dinov3_vit", image_size=[64, 32], **sizes))
    network.save_pretrained(tmp_path)
    assert build_backbone(str(tmp_path)).config.image_size == 64
