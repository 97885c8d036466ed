"""The networks of the paper (DINO ViT-B/8 and B/16, DINOv2 base, large and giant): their published
config.json, shrunk in depth and width, trains a step; at full size they have the published number
of parameters. And the GPU memory that headers of config files name is what is counted."""
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
import transformers

from bench import RELEASED, bench_memory, counted_gb
from checks import step_bytes
from configurator import override
from model import blocks, build_backbone
from tests_support import ROOT, SHRUNK, load_script, log

# facebook/dino-vitb8 and so on, as on the hub, except for what no network reads
VIT = dict(
    model_type="vit", hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
    intermediate_size=3072, image_size=224, num_channels=3, qkv_bias=True, hidden_act="gelu",
    layer_norm_eps=1e-12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    initializer_range=0.02, architectures=["ViTModel"])
DINOV2 = dict(
    model_type="dinov2", hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
    mlp_ratio=4, image_size=518, patch_size=14, num_channels=3, qkv_bias=True, hidden_act="gelu",
    layer_norm_eps=1e-6, layerscale_value=1.0, use_swiglu_ffn=False, drop_path_rate=0.0,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.02,
    architectures=["Dinov2Model"])
PUBLISHED = {
    "dino-vitb8": dict(VIT, patch_size=8),
    "dino-vitb16": dict(VIT, patch_size=16),
    "dinov2-base": DINOV2,
    "dinov2-large": dict(DINOV2, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
    "dinov2-giant": dict(DINOV2, hidden_size=1536, num_hidden_layers=40, num_attention_heads=24,
                         use_swiglu_ffn=True)}
# without the classifier and pooler; millions
PARAMETERS = {"dino-vitb8": 85.81, "dino-vitb16": 85.80, "dinov2-base": 86.58,
              "dinov2-large": 304.37, "dinov2-giant": 1136.48}
every_network = pytest.mark.parametrize("name", PUBLISHED)


@pytest.fixture
def folder(tmp_path):
    """A function (name) -> a folder with the shrunk config.json: two blocks, two dimensions to a
    head. Everything else is as published."""
    def write(name):
        config = dict(PUBLISHED[name], num_hidden_layers=2)
        config["hidden_size"] = width = 2 * config["num_attention_heads"]
        if "intermediate_size" in config:
            config["intermediate_size"] = 4 * width
        os.makedirs(tmp_path / name)
        with open(tmp_path / name / "config.json", "w") as file:
            json.dump(config, file)
        return str(tmp_path / name)
    return write


@every_network
def test_a_released_network_trains_a_step_with_its_own_shape(folder, npz, tmp_path, name):
    """Random weights of the shape, exported as the hub has them, then read as released ones."""
    torch.manual_seed(0)
    path, published = folder(name), PUBLISHED[name]
    backbone = build_backbone(path, use_pretrained=False)
    patch, width = published["patch_size"], backbone.config.hidden_size
    params = dict(blocks(backbone)[0].named_parameters())
    n_mlp = sum(param.numel() for key, param in params.items() if "mlp" in key)
    hidden = 4 * width
    if name == "dinov2-giant":  # SwiGLU: three matrices of two thirds, up to a multiple of 8
        hidden = -(-int(hidden * 2 / 3) // 8) * 8
        assert n_mlp == 3 * width * hidden + 2 * hidden + width
    else:
        assert n_mlp == 2 * width * hidden + hidden + width
    scales = [param for key, param in params.items() if "layer_scale" in key]
    assert len(scales) == (2 if published["model_type"] == "dinov2" else 0)
    for scale in scales:
        assert torch.equal(scale, torch.ones(width))
    positions = backbone.embeddings.position_embeddings
    assert positions.shape == (1, 1 + (published["image_size"] // patch) ** 2, width)
    backbone.save_pretrained(path)

    module = load_script("train")
    argv = [*SHRUNK, f"--dataset_path={npz}", f"--out_dir={tmp_path}/run", "--eval_max_images=4",
            f"--cache_dir={tmp_path}/cache", "--max_iterations=1", "--eval_interval=0",
            f"--model_type={path}", "--use_pretrained=true", f"--global_crops_size={4 * patch}",
            f"--local_crops_size={2 * patch}", "--ibot_loss_weight=1",
            "--freeze_backbone_iterations=0", "--warmup_iterations=0"]
    module.main(override(vars(module), module.config_keys, argv))
    record = log(tmp_path / "run")[-1]
    assert record["iteration"] == 1 and record["ibot_loss"] > 0
    trained = transformers.AutoModel.from_pretrained(f"{tmp_path}/run/checkpoints/last/hf")
    ours, theirs = trained.config.to_dict(), json.load(open(f"{path}/config.json"))
    for key in published.keys() - {"num_channels", "architectures", "image_size"}:
        assert ours[key] == theirs[key], key
    moved = [name for name, param in trained.named_parameters()
             if "layer" in name and not torch.equal(param, backbone.state_dict()[name])]
    assert len(moved) >= 20  # all of both blocks


@every_network
def test_the_published_config_has_the_published_number_of_parameters(name):
    settings = {key: value for key, value in PUBLISHED[name].items() if key != "architectures"}
    config = transformers.AutoConfig.for_model(**settings)
    extra = dict(add_pooling_layer=False) if config.model_type == "vit" else {}
    with torch.device("meta"):
        network = transformers.AutoModel.from_config(config, **extra)
    n = sum(param.numel() for param in network.parameters()) / 1e6
    assert n == pytest.approx(PARAMETERS[name], abs=0.01)
    keys = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    assert RELEASED[name] == tuple(getattr(config, key) for key in keys)
    width = config.hidden_size
    train = load_script("train")
    train.freeze_backbone_iterations = 0
    keys = {key: getattr(train, key) for key in train.config_keys}
    held, _ = step_bytes(SimpleNamespace(**keys), config, 3, 8)
    heads_m = (2048 * (width + 2048 + 256) + 256 * 65536) / 1e6
    assert held / 4e6 / 5 == pytest.approx(n + heads_m, rel=0.03)  # weight, 4 more


# ---- GPU memory in headers ----

def test_the_memory_in_config_headers_is_what_is_counted():
    found = []
    for file in sorted(os.listdir(f"{ROOT}/config")):
        if not file.endswith(".py"):
            continue
        with open(f"{ROOT}/config/{file}") as opened:
            text = " ".join(opened.read().split())
        pattern = (r"--what=memory: ([\w-]+) (\w+) ([\d.]+) GB on one GPU[^,]*, ([\d.]+) on each "
                   r"of two[^,]*, ([\d.]+) on each of four")
        for name, strategy, *numbers in re.findall(pattern, text):
            kind = "fsdp" if file == "fsdp.py" else "ddp"
            counted = [counted_gb(name, strategy, n, kind if n > 1 else "ddp") for n in (1, 2, 4)]
            assert [f"{gb:.1f}" for gb in counted] == numbers, file
            found.append(file)
    assert found == ["freeze.py", "fsdp.py", "listing8.py", "lora.py", "medmnist.py",
                     "pathmnist.py"]


def test_the_table_of_memory(capsys):
    bench_memory()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("dino")]
    assert len(rows) == 3 * len(RELEASED)
    for name, strategy, *cells in rows:
        one, two, four, two_fsdp, four_fsdp = map(float, cells)
        assert one > two > four and two_fsdp > four_fsdp and two_fsdp < two, (name, strategy)
    assert counted_gb("dinov2-base", "lora") < counted_gb("dinov2-base", "standard")
    # a DDP step of half the images needs half of what the images need
    full, half, quarter = (counted_gb("dinov2-base", "standard", n) for n in (1, 2, 4))
    assert (full - half) / (half - quarter) == pytest.approx(2, rel=0.02)
