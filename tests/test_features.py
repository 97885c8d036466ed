"""features.py: the readout of several blocks. networks.py: which network a name means, adapters,
and what is said when something is gone."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checkpoint import export_hf
from configurator import UserError
from data import Dataset
from features import (block_choices, choose_blocks, collect_features, extract_features,
                      parse_blocks, stack_tensors, stream_features)
from model import (FAMILIES, add_lora, build_backbone, embed, final_norm, forward_features,
                   run_blocks)
from networks import (find_networks, find_runs, load_adapter, load_network, load_probe, read_run,
                      save_probe, split_names, weights_hash)
from probe import Probe, fit_probe
from teachers import build_teacher
from tests_support import TINY

INPUT = dict(size=32, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture(scope="module")
def dataset():
    images = np.random.default_rng(0).integers(0, 255, (10, 32, 32, 3)).astype(np.uint8)
    return Dataset(images, np.arange(10) % 2, name="made up")


def pixels_of(dataset):
    x = torch.from_numpy(np.array(dataset.images)).permute(0, 3, 1, 2)
    return (x / 255 - 0.5) / 0.25


# ---- readout of several blocks ----

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_the_readout_is_the_normed_cls_token_of_each_block(tiny_backbone, dataset, family, lora):
    backbone = tiny_backbone(family, num_hidden_layers=4).eval()
    if lora:
        backbone = add_lora(backbone).eval()
    found = collect_features(backbone, dataset, block_numbers=[0, 2, 3], batch_size=4, **INPUT)
    tokens = []
    with torch.no_grad():
        first, rope = embed(backbone, pixels_of(dataset))
        for number in (0, 2, 3):
            after = run_blocks(backbone, first, rope, last=number + 1)
            tokens.append(F.normalize(final_norm(backbone)(after)[:, 0], dim=1))
    expected = torch.cat(tokens, dim=1)
    torch.testing.assert_close(found["readout"], expected, atol=1e-5, rtol=1e-5)
    plain, _ = extract_features(backbone, dataset, batch_size=4, **INPUT)
    assert torch.equal(found["features"], plain)  # hooks change nothing, and do not stay
    width = backbone.config.hidden_size
    last = F.normalize(plain, dim=1)
    torch.testing.assert_close(found["readout"][:, -width:], last, atol=1e-6, rtol=1e-5)


def test_a_timm_network_has_a_readout_as_well(dataset, monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model",
                        lambda name, pretrained, **keys: create(name, pretrained=False, **keys))
    teacher = build_teacher("timm:vit_tiny_patch16_224", dtype=torch.float32)
    settings = dict(size=32, mean=(0.0,) * 3, std=(1.0,) * 3)
    [batch] = stream_features(teacher, dataset.subset(np.arange(2), "train"), block_numbers=[5, 11],
                              **settings)
    assert batch["readout"].shape == (2, 2 * 192)
    last = F.normalize(batch["cls"], dim=1)
    torch.testing.assert_close(batch["readout"][:, 192:], last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n, choices", [
    (12, [[11], [6, 11], [4, 6, 8, 11], [8, 9, 10, 11]]),
    (24, [[23], [12, 23], [8, 12, 16, 23], [20, 21, 22, 23]]),
    (2, [[1], [0, 1]]), (1, [[0]])])
def test_the_short_list_of_readouts(n, choices):
    assert block_choices(n) == choices


def test_blocks_of_a_key():
    assert parse_blocks("last", 12) == [11] and parse_blocks("8, 4,11", 12) == [4, 8, 11]
    for text in ("12", "-1,3", "four", "", "1.5"):
        with pytest.raises(UserError, match="numbers from 0 to 11, the last block"):
            parse_blocks(text, 12)


def test_the_blocks_with_the_lowest_probe_loss_on_val_are_chosen(tiny_backbone):
    """The last blocks are made blind: they put the same token in the place of every CLS token. So
    only a list with an earlier block can see the label."""
    backbone = tiny_backbone("dinov2", num_hidden_layers=12).eval()
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = rng.integers(0, 80, (60, 32, 32, 3)) + 120 * labels[:, None, None, None]
    data = Dataset(images.astype(np.uint8), labels)
    train, val = data.subset(np.arange(40), "train"), data.subset(np.arange(40, 60), "val")
    blind = backbone.encoder.layer[7]
    blind.register_forward_hook(lambda _, inputs, tokens: torch.ones_like(tokens))
    numbers, why = choose_blocks(backbone, train, val, 0, **INPUT)
    assert numbers in ([6, 11], [4, 6, 8, 11]) and "8,9,10,11: 0.69" in why
    assert len(why.split(";")) == 4


# ---- names ----

def test_a_comma_separates_unless_it_is_in_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b,c", "d[1],e"):
        os.makedirs(folder)
    assert split_names("a, b,c ,facebook/dinov2-small") == ["a", "b,c", "facebook/dinov2-small"]
    assert split_names("d[1],e,a") == ["d[1],e", "a"]
    assert split_names("d[1],*,b,*") == ["d[1],*", "b,*"]
    assert split_names(" ,") == []


def make_run(folder, **changes):
    """A folder that looks like a run: config.py, and checkpoints/best/hf if weights are given."""
    config = dict(model_type="dinov2", use_pretrained=True, use_lora=False, seed=0,
                  freeze_backbone_layers=0, global_crops_size=32, intensity_range=(0.0, 255.0),
                  image_mean=(0.5,), image_std=(0.5,), drop_path_rate=0.0, pos_embed_rescale=0.0)
    os.makedirs(f"{folder}/checkpoints/best/hf")
    with open(f"{folder}/config.py", "w") as file:
        file.writelines(f"{key} = {value!r}\n" for key, value in {**config, **changes}.items())
    return str(folder)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run("out/phantom")
    make_run("out/bloodcells")
    os.makedirs("weights/dinov2-small")
    open("weights/dinov2-small/config.json", "w").close()
    os.makedirs("empty")


@pytest.mark.parametrize("name, message", [
    ("out/phantm", r"run='out/phantm': no such directory, did you mean out/phantom\?"),
    ("phantom", r"run='phantom': no such run, did you mean out/phantom\?"),
    ("out", r"it is no run \(no config.py\).*did you mean out/bloodcells or out/phantom\?"),
    ("out/phantom/checkpoints/best", r"did you mean out/phantom/checkpoints/best/hf\?"),
    ("out/phantom/checkpoints", r"its run is out/phantom"),
    ("weights/dinov2-small", r"these are weights, and no run: name them with --model_type"),
    ("out/x*", r"run='out/x\*': no run has such a name"),
    ("empty", r"run='empty': it is no run \(no config.py\) and has no weights")])
def test_a_misspelt_run_is_named_with_near_ones(runs, name, message):
    os.makedirs("out/phantom/checkpoints/best/hf", exist_ok=True)
    open("out/phantom/checkpoints/best/hf/config.json", "w").close()
    with pytest.raises(UserError, match=message):
        find_runs([name])


def test_a_misspelt_name_among_several(runs):
    with pytest.raises(UserError, match=r"'out/phantm': no such directory, did you mean out/ph"):
        find_networks(["out/phantm"], "best")
    with pytest.raises(UserError, match=r"'./weights/dinov2-smal': no such directory, did you "
                       r"mean ./weights/dinov2-small\?"):
        find_networks(["./weights/dinov2-smal"], "best")
    [hub] = find_networks(["facebook/dinov2-small"], "best")  # a hub id stays one
    assert hub["weights_path"] == "facebook/dinov2-small"


def test_what_the_hub_does_not_have_is_named_with_near_runs(runs, dataset):
    [network] = find_networks(["bloodcell"], "best")
    with pytest.raises(UserError, match=r"cannot be loaded.*did you mean out/bloodcells\?"):
        load_network(network, {}, dataset, torch.device("cpu"))


def test_a_start_that_is_gone_is_named_as_the_start(runs, dataset):
    make_run("out/moved", model_type="./weights/gone")
    start, trained = find_networks(["out/moved"], "best")
    with pytest.raises(UserError, match=r"out/moved started from './weights/gone' \(model_type in "
                       r"its config.py\), which cannot be loaded now:.*measure the run without it: "
                       r"--model_type=out/moved/checkpoints/best/hf"):
        load_network(start, start["config"], dataset, torch.device("cpu"))
    assert trained["weights_path"] == "out/moved/checkpoints/best/hf"


@pytest.mark.parametrize("text", ["import os\nroot = os.getcwd()\n", "def f(:\n", "lr = 1e-3\n",
                                  "a.b = 1\n"])
def test_a_config_of_something_else_is_no_run(tmp_path, text):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(UserError, match="config.py is no config of a run"):
        read_run(str(tmp_path))


# ---- adapters ----

@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """(folder, export of a LoRA run on a base in that folder)."""
    folder = str(tmp_path_factory.mktemp("lora"))
    torch.manual_seed(0)
    base = build_backbone("dinov2", False, 3, **TINY)
    base.save_pretrained(f"{folder}/base")
    backbone = add_lora(build_backbone(f"{folder}/base", True, 3))
    with torch.no_grad():
        for name, param in backbone.named_parameters():
            if "lora_B" in name:
                param.normal_()
    hf = f"{folder}/run/checkpoints/best/hf"
    export_hf(hf, backbone, 32, (0.0, 200.0), (0.4,) * 3, (0.3,) * 3, "card")
    return folder, hf


def test_an_adapter_is_its_export_to_the_bit(lora, dataset):
    _, hf = lora
    features = []
    for name in (hf, f"{hf}/adapter"):
        [network] = find_networks([name], "best")
        backbone, inputs = load_network(network, {}, dataset, torch.device("cpu"))
        assert inputs["intensity_range"] == (0.0, 200.0) and inputs["size"] == 32
        features.append(extract_features(backbone, dataset, **inputs)[0])
    assert network["adaptation"] == "LoRA adapter" and network["model"] == "run"
    assert torch.equal(*features)
    start = build_backbone(f"{lora[0]}/base", True, 3).eval()
    assert not torch.allclose(features[0], extract_features(start, dataset, **inputs)[0], atol=0.1)


def test_a_missing_base_and_a_foreign_adapter_are_one_line(lora, tmp_path):
    _, hf = lora
    export = shutil.copytree(hf, tmp_path / "hf")
    folder, path = str(export / "adapter"), export / "adapter/adapter_config.json"
    config = json.loads(path.read_text())

    def with_base(base):
        path.write_text(json.dumps(dict(config, base_model_name_or_path=base)))
        return pytest.raises(UserError)
    with with_base("./gone") as error:
        load_adapter(folder)
    assert "is an adapter of './gone', which cannot be loaded" in str(error.value)
    assert f"{export} has the merged weights, which need no base" in str(error.value)
    with with_base(None) as error:
        load_adapter(folder)
    assert "names no base" in str(error.value) and "\n" not in str(error.value)
    wider = build_backbone("dinov2", False, 3, **{**TINY, "hidden_size": 32})
    wider.save_pretrained(tmp_path / "wider")
    with with_base(str(tmp_path / "wider")) as error:
        load_adapter(folder)
    assert "cannot be loaded onto its base" in str(error.value) and "\n" not in str(error.value)
    fewer = build_backbone("dinov2", False, 3, **{**TINY, "num_hidden_layers": 1})
    fewer.save_pretrained(tmp_path / "fewer")
    with with_base(str(tmp_path / "fewer")) as error:
        load_adapter(folder)
    path.write_text("{")
    with pytest.raises(UserError, match="adapter_config.json cannot be read"):
        load_adapter(folder)


def test_the_hash_names_the_weights(tiny_backbone, lora):
    folder, hf = lora
    backbone = tiny_backbone("vit")
    before = weights_hash(backbone)
    assert len(before) == 16 and before == weights_hash(tiny_backbone("vit"))
    with torch.no_grad():
        next(backbone.parameters()).add_(1)  # CLS token
    assert weights_hash(backbone) != before
    same = build_backbone(hf, True, 3)
    assert weights_hash(same) == weights_hash(load_adapter(f"{hf}/adapter"))
    assert weights_hash(same) != weights_hash(build_backbone(f"{folder}/base", True, 3))
    assert weights_hash(same.half()) != weights_hash(load_adapter(f"{hf}/adapter"))


# ---- kept probes ----

@pytest.mark.parametrize("multi_label", [False, True])
def test_a_kept_probe_gives_the_same_probabilities(tmp_path, multi_label):
    x = torch.randn(50, 60, generator=torch.Generator().manual_seed(0))
    y = (x[:, :3] > 0).long() if multi_label else (x[:, 0] > 0).long()
    probe, _ = fit_probe(x[:30], y[:30], x[30:], y[30:])
    about = dict(model="w", model_hash="0", features="cls", blocks=[], size=32, mean=(0.5,),
                 intensity_range=(0, 255), intensity_scaling="set", std=(0.5,),
                 classes=["a", "b"])
    save_probe(str(tmp_path / "probe"), probe, about)
    for name in ("probe", "probe.safetensors", "probe.json"):
        kept, found = load_probe(str(tmp_path / name))
        assert torch.equal(kept(x), probe(x)) and isinstance(kept, Probe)
    assert found["mean"] == [0.5] and found["multi_label"] == multi_label
    with open(tmp_path / "probe.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="cannot be read .*evaluate.py writes"):
        load_probe(str(tmp_path / "probe"))
    with pytest.raises(UserError, match="cannot be read"):
        load_probe(str(tmp_path / "nowhere"))


def test_forward_features_are_those_of_stream_features(tiny_backbone, dataset):
    backbone = tiny_backbone("dinov2").eval()
    with torch.no_grad():
        expected = forward_features(backbone, pixels_of(dataset))[0]
    [batch] = stream_features(backbone, dataset, **INPUT)
    torch.testing.assert_close(batch["cls"], expected, atol=1e-5, rtol=1e-5)
    assert batch["readout"] is None


def test_a_worker_sends_one_tensor_for_a_batch():
    pixels = torch.arange(8.0).reshape(2, 1, 2, 2)
    items = [dict(i=3, pixels=pixels[0], digest=b"a"), dict(i=4, error="torn"),
             dict(i=5, pixels=pixels[1], digest=b"b")]
    readable, errors, tensors = stack_tensors(items)
    assert readable == [dict(i=3, digest=b"a"), dict(i=5, digest=b"b")] and errors == ["torn"]
    assert list(tensors) == ["pixels"] and torch.equal(tensors["pixels"], pixels)
    assert stack_tensors([dict(i=4, error="torn")]) == ([], ["torn"], {})
