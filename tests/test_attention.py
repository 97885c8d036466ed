"""Attention maps against the full matrix of transformers; detection and its scores against cases
counted by hand."""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from attention import cls_attention, detect, detection_metrics, pca_heads
from configurator import UserError, override
from data import load_dataset
from detection import clusters, labelled_patches, patch_metrics, pool_detections, scaled
from metrics import average_precision, weighted_auc
from model import FAMILIES, add_lora, core
from phantom import make_phantom
from tests_support import ROOT, load_script


def full_matrix(backbone, pixels):
    """[B,heads,h,w] as transformers itself computes it: eager attention, all layers, all rows."""
    model, extra = core(backbone), {}
    model.set_attn_implementation("eager")
    if model.config.model_type == "vit":
        extra = dict(interpolate_pos_encoding=True)
    attention = model(pixels, output_attentions=True, **extra).attentions[-1]  # [B,heads,N,N]
    model.set_attn_implementation("sdpa")
    first_patch = 1 + getattr(model.config, "num_register_tokens", 0)
    grid = [side // model.config.patch_size for side in pixels.shape[-2:]]
    return attention[:, :, 0, first_patch:].unflatten(-1, grid)


# ---- maps ----

@pytest.mark.parametrize("lora", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cls_attention_is_the_row_of_the_full_matrix(tiny_backbone, family, lora):
    for channels, size in ((1, (32, 32)), (2, (24, 56)), (3, (40, 8))):
        backbone = tiny_backbone(family, channels)
        if lora:
            backbone = add_lora(backbone, r=2, dropout=0.5)
            for name, param in backbone.named_parameters():
                if "lora_B" in name:  # 0 at the start: then adapters could be forgotten
                    param.normal_()
        backbone.eval()
        pixels = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))
        attention = cls_attention(backbone, pixels)
        expected = full_matrix(backbone, pixels)
        assert attention.shape == expected.shape == (2, 2, size[0] // 8, size[1] // 8)
        torch.testing.assert_close(attention, expected, atol=1e-6, rtol=1e-4)
        assert (attention.sum(dim=(2, 3)) < 1).all()  # the rest went to CLS and registers


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(item):
                self.elements = max(self.elements, item.numel())
        return result


@torch.no_grad()
@pytest.mark.parametrize("family", ("vit", "dinov3_vit"))
def test_memory_of_4096_patches_at_12_heads(tiny_backbone, family):
    backbone = tiny_backbone(family, 1, hidden_size=48, num_attention_heads=12, patch_size=2,
                             image_size=32).eval()
    pixels = torch.randn(1, 1, 128, 128)
    with LargestTensor() as largest:
        attention = cls_attention(backbone, pixels)
    assert attention.shape == (1, 12, 64, 64)
    # the largest is of the MLP, tokens times 4 widths; the matrix would have 12 * 4097 ** 2
    assert largest.elements <= 4 * 48 * 4200
    assert attention.numel() * 4 < 1e6  # 0.2 MB; the matrix has 0.8 GB


def test_pca_heads_against_numpy():
    attention = torch.rand(3, 5, 4, 6, generator=torch.Generator().manual_seed(0)) / 24
    components = pca_heads(attention, 3)
    assert components.shape == (3, 3, 4, 6)
    assert components.amin(dim=(2, 3)).abs().max() == 0
    assert (components.amax(dim=(2, 3)) == 1).all()
    for image, mine in zip(attention.flatten(2).numpy(), components.flatten(2).numpy()):
        centered = image - image.mean(axis=1, keepdims=True)  # [heads,P]
        left, _, _ = np.linalg.svd(centered.T.astype(float), full_matrices=False)
        for theirs, ours in zip(left[:, :3].T, mine):  # [P] each, free sign and scale
            assert abs(np.corrcoef(theirs, ours)[0, 1]) > 0.9999
            assert np.corrcoef(ours, image.mean(axis=0))[0, 1] >= 0
    # by image: the same alone
    assert torch.equal(pca_heads(attention[1:2], 3), components[1:2])


def test_pca_heads_of_one_head_and_of_nothing():
    attention = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    one = pca_heads(attention, 3)
    expected = attention - attention.amin(dim=(2, 3), keepdim=True)
    expected = expected / expected.amax(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(one[:, :1], expected)
    assert one[:, 1:].abs().max() == 0
    assert pca_heads(torch.full((1, 4, 2, 2), 0.1)).abs().max() == 0


# ---- detection ----

def test_clusters_touch_at_corners():
    on = np.array([[1, 0, 0, 1],
                   [0, 1, 0, 1],
                   [0, 0, 0, 0],
                   [1, 0, 0, 1]], bool)
    found = [cluster.tolist() for cluster in clusters(on)]
    assert found == [[[0, 0], [1, 1]], [[0, 3], [1, 3]], [[3, 0]], [[3, 3]]]
    assert clusters(np.zeros((3, 3), bool)) == []


def test_detect_is_hysteresis():
    heat = np.array([[0.8, 0.3, 0.0, 0.6, 0.6],
                     [0.0, 0.0, 0.0, 0.0, 0.0],
                     [0.2, 0.0, 0.7, 0.0, 0.29]])
    regions = detect(heat)
    # 0.6 is connected to nothing of 0.7; 0.3 belongs to 0.8; both ends count; 0.29 does not
    found = [(region["box"], region["area"], region["score"]) for region in regions]
    assert found == [((0, 0, 2, 1), 2, 0.8), ((2, 2, 3, 3), 1, 0.7)]
    assert regions[0]["values"].tolist() == [0.8, 0.3] and regions[0]["grid"] == (3, 5)
    assert detect(torch.tensor(heat), 0.5, 0.5)[1]["box"] == (2, 2, 3, 3)
    assert len(detect(heat, 0.5, 0.5)) == 3
    assert detect(np.zeros((2, 2))) == []


def test_scaled_heat_lies_in_0_to_1():
    heat = np.array([[1.0, 2.0, 5.0]])
    assert scaled(heat, ()).tolist() == [[0, 0.25, 1]]
    assert scaled(heat, (2.0, 3.0)).tolist() == [[0, 0, 1]]
    assert scaled(np.ones((1, 2)), ()).tolist() == [[0, 0]]


def test_labelled_patches_one_pixel_suffices():
    mask = np.zeros((8, 12), np.uint8)
    mask[3, 4] = mask[7, 11] = 2
    assert np.argwhere(labelled_patches(mask, (2, 3))).tolist() == [[0, 1], [1, 2]]
    # patches 2.4 pixels wide: two of them share pixel 4
    assert np.argwhere(labelled_patches(mask, (1, 5))).tolist() == [[0, 1], [0, 2], [0, 4]]
    # a mask of fewer pixels than patches
    enlarged = np.kron(np.eye(2), np.ones((2, 2)))
    assert (labelled_patches(np.eye(2), (4, 4)) == enlarged).all()


def counts(result, keys=("tp", "fp", "fn")):
    return [result[key] for key in keys]


def test_detection_metrics_by_hand():
    mask = np.zeros((16, 20), np.uint8)  # a grid of 4 x 5 patches of 4 pixels
    mask[0:2, 0:6] = 1  # patches (0,0) (0,1)
    mask[15, 19] = 1  # patch (3,4)
    mask[8, 8] = 1  # patch (2,2): nothing finds it
    heat = np.zeros((4, 5))
    heat[0, 1], heat[1, 1] = 0.9, 0.6  # IoU with the first lesion 1 / 3
    heat[3, 4] = 0.8  # exact
    heat[3, 0] = 0.7  # nothing there
    result = detection_metrics(detect(heat), mask)
    assert counts(result) == [2, 1, 1]
    assert result["precision"] == result["recall"] == result["f1"] == pytest.approx(2 / 3)
    assert result["localization"] == pytest.approx((0.9 + 0.8) / (0.9 + 0.6 + 0.8 + 0.7))
    by_patch = detection_metrics(detect(heat), labelled_patches(mask, (4, 5)))
    assert by_patch == result


def test_one_region_finds_one_lesion_and_a_huge_one_none():
    mask = np.zeros((6, 6), bool)
    mask[0, 0] = mask[0, 2] = True
    heat = np.zeros((6, 6))
    heat[0, :3] = 1  # one region over both: the other is missed
    assert counts(detection_metrics(detect(heat), mask)) == [1, 0, 1]
    everywhere = detection_metrics(detect(np.ones((6, 6))), mask)
    assert counts(everywhere) == [0, 1, 2]
    assert everywhere["localization"] == pytest.approx(2 / 36) and everywhere["f1"] == 0
    # two regions, one lesion: the better one has it
    heat, mask = np.zeros((3, 6)), np.zeros((3, 6), bool)
    mask[1, 0:5] = True
    heat[1, 0] = heat[1, 2:5] = 1
    result = detection_metrics(detect(heat), mask)
    assert counts(result) == [1, 1, 0] and result["localization"] == 1


def test_nothing_to_find():
    empty, mask = np.zeros((4, 4)), np.zeros((4, 4), bool)
    result = detection_metrics([], mask)
    assert counts(result) == [0, 0, 0]
    assert math.isnan(result["f1"]) and math.isnan(result["localization"])
    ratios = ("precision", "recall", "f1", "localization")
    false_alarm = detection_metrics(detect(empty + np.eye(4)), mask)
    assert counts(false_alarm) == [0, 1, 0] and counts(false_alarm, ratios) == [0, 0, 0, 0]
    missed = detection_metrics([], np.eye(4))
    assert counts(missed) == [0, 0, 1] and counts(missed, ("precision", "f1")) == [0, 0]
    pooled = pool_detections([result, false_alarm, missed])
    assert pooled["micro"]["fp"] == pooled["micro"]["fn"] == 1 and pooled["macro"]["f1"] == 0
    assert pooled["macro"]["localization"] == 0


def test_pool_is_micro_and_macro():
    regions = detect(np.array([[1.0, 0, 1, 0, 1]]))
    one = detection_metrics(regions, np.array([[1, 0, 0, 0, 0]]))  # precision 1/3, recall 1
    regions = detect(np.array([[1.0, 0, 0, 0, 0]]))
    two = detection_metrics(regions, np.array([[1, 0, 1, 0, 0]]))  # precision 1, recall 1/2
    pooled = pool_detections([one, two])
    assert counts(pooled["micro"]) == [2, 2, 1]
    assert pooled["micro"]["precision"] == 0.5
    assert pooled["micro"]["recall"] == pytest.approx(2 / 3)
    assert pooled["micro"]["localization"] == 0.5
    assert pooled["macro"]["precision"] == pytest.approx(2 / 3)
    assert pooled["macro"]["recall"] == 0.75
    assert pooled["macro"]["f1"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert pooled["macro"]["localization"] == pytest.approx((1 / 3 + 1) / 2)


def test_patch_metrics_by_hand():
    # in order of heat: + - + -; three of the four pairs (+,-) are in the correct order
    heat = np.array([[0.9, 0.8], [0.7, 0.1]])
    labelled = np.array([[True, False], [True, False]])
    result = patch_metrics([heat], [labelled])
    assert result["auroc"] == 0.75 and result["chance"] == 0.5 and result["pointing"] == 1
    assert result["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    # all alike is chance level; the hottest patch is any of the four
    alike = patch_metrics([np.ones((2, 2))], [labelled])
    assert alike["auroc"] == alike["average_precision"] == alike["pointing"] == 0.5
    # an image without lesion counts for the patches, not for pointing
    nothing = np.zeros((2, 2), bool)
    two_images = patch_metrics([heat, np.ones((2, 2))], [labelled, nothing])
    assert two_images["pointing"] == 1 and two_images["auroc"] == 3 / 12
    assert math.isnan(patch_metrics([heat], [nothing])["auroc"])


def test_average_precision_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 20, 300) / 20, rng.random(300) < 0.2  # with many ties
    expected = metrics.average_precision_score(positive, scores)
    assert average_precision(scores, positive) == pytest.approx(expected)
    assert math.isnan(average_precision(scores, np.zeros(300, bool)))


# ---- the script ----

def run_script(name, *argv):
    module = load_script(name)
    module.main(override(vars(module), module.config_keys, list(argv)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two seeds of a two-iteration run on a phantom of 40 pixels, and the phantom as an .npz."""
    root = tmp_path_factory.mktemp("attention")
    arrays = {}
    for split, n, seed in (("train", 16, 0), ("val", 12, 1), ("test", 12, 2)):
        for key, value in make_phantom(n, 40, seed).items():
            arrays[f"{split}_{key}"] = value
    np.savez(root / "phantom40.npz", **arrays)
    for seed in (0, 1):
        run_script(
            "train", f"--dataset_path={root}/phantom40.npz", f"--out_dir={root}/lg{seed}",
            f"--cache_dir={root}/cache", f"--seed={seed}", "--use_pretrained=false",
            "--model_type=dinov2_with_registers", "--hidden_size=24", "--num_hidden_layers=2",
            "--num_attention_heads=3", "--patch_size=8", "--num_register_tokens=2",
            "--global_crops_size=40", "--local_crops_size=16", "--local_crops_number=1",
            "--label_guided_crops_number=2", "--dino_head_out_dim=32", "--head_hidden_dim=16",
            "--head_bottleneck_dim=8", "--global_batch_size=8", "--max_iterations=2",
            "--warmup_iterations=1", "--num_workers=0", "--device=cpu",
            "--intensity_range=-100,900")
    return root


def test_detection_of_two_seeds_and_the_brightest_patch(trained, capsys):
    run_script("attention", f"--run={trained}/lg*", "--detection=true", f"--out_dir={trained}/out",
               f"--cache_dir={trained}/cache", "--n_images=2", "--device=cpu")
    assert sorted(os.listdir(trained / "out")) == [  # no clusters.png: these two have no label
        "detection.json", "detection.md", "sheet.png", "test-0000-heads.png",
        "test-0001-heads.png"]
    table = (trained / "out/detection.md").read_text()
    result = json.loads((trained / "out/detection.json").read_text())
    for text in ("| brightest patch", "| lg, 2 seeds", "| start of lg, 2 seeds",
                 "| True positives"):
        assert text in table
    assert "nan" not in table
    networks = {network["name"]: network for network in result["networks"]}
    assert len(networks) == 5  # brightest patch, two starts, two runs
    test = load_dataset(f"{trained}/phantom40.npz", "test", cache_dir=f"{trained}/cache")
    labelled = np.stack([labelled_patches(np.array(mask), (5, 5)) for mask in test.masks])
    bright = np.array(test.images).reshape(12, 5, 8, 5, 8).max(axis=(2, 4)).ravel().astype(float)
    expected = weighted_auc(bright, labelled.ravel(), np.ones((1, labelled.size)))[0]
    baseline = networks["brightest patch"]["results"]["patches"]
    assert baseline["auroc"] == pytest.approx(expected)
    n_lesions = sum(len(clusters(lesion)) for lesion in labelled)
    for network in networks.values():
        totals = network["results"]["all"]["micro"]
        assert totals["tp"] + totals["fn"] == n_lesions and len(network["images"]) == 12
        n_regions = sum(len(image["regions"]) for image in network["images"])
        assert totals["tp"] + totals["fp"] == n_regions
        assert "F1 on val" in network["chosen"]
        for image in network["images"]:
            for region in image["regions"]:
                left, top, right, bottom = region["box"]
                assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
                assert region["score"] >= 0.7


def test_pictures_of_files_of_any_size(trained, tmp_path):
    (tmp_path / "masks").mkdir()
    for i, shape in enumerate(((30, 50), (64, 33))):
        image = make_phantom(1, 64, i)["images"][0][:shape[0], :shape[1]]
        np.save(tmp_path / f"scan{i}.npy", image)
        mask = Image.fromarray((image > 300).astype(np.uint8) * 255)
        mask.save(tmp_path / "masks" / f"scan{i}.png")
    run_script("attention", f"--run={trained}/lg0", f"--images={tmp_path}",
               f"--masks={tmp_path}/masks", f"--out_dir={tmp_path}/out", "--heat=head2",
               "--device=cpu", "--pca_components=2", "--save_arrays=true")
    files = ["clusters.png", "scan0-heads.png", "scan0.npz", "scan1-heads.png", "scan1.npz",
             "sheet.png"]
    assert sorted(os.listdir(tmp_path / "out")) == files
    arrays = np.load(tmp_path / "out/scan0.npz")
    attention = arrays["attention"]
    assert attention.shape == (3, 5, 8)  # 30 x 50 pixels at 40 on the shorter side, patch 8
    expected = pca_heads(torch.from_numpy(attention)[None], 2)[0].numpy()
    np.testing.assert_array_equal(arrays["pca"], expected)
    low, high = attention[2].min(), attention[2].max()
    np.testing.assert_allclose(arrays["heat"], (attention[2] - low) / (high - low), rtol=1e-5)
    pixels = np.asarray(Image.open(tmp_path / "out/sheet.png")).astype(int)
    assert (pixels == (0, 229, 255)).all(axis=2).sum() > 100  # the outline of the masks
    # one file, released weights: here those of the run
    run_script("attention", f"--model_type={trained}/lg0/checkpoints/last/hf",
               f"--images={tmp_path}/scan0.npy", f"--out_dir={tmp_path}/one", "--image_size=80",
               "--device=cpu")
    assert sorted(os.listdir(tmp_path / "one")) == ["scan0-heads.png", "sheet.png"]


@pytest.mark.parametrize("argv, message", [
    ([], "nothing to look at: give --run"),
    (["--heat=heads"], "heat='heads': choose one of auto, mean, pca, headN; N is 0, 1"),
    (["--run={root}/lg0", "--heat=head3"], "has 3 heads, head0 to head2"),
    (["--run={root}/lg0", "--images={root}/no"], "no: no such file or folder"),
    (["--run={root}/lg0", "--low_threshold=0.8"], "0 <= low <= high <= 1"),
    (["--run={root}/lg0", "--images={root}/lg0"], "no image; left out"),
    (["--run={root}/lg0", "--split=nowhere"], "has no split 'nowhere'"),
    (["--model_type=timm:vit_tiny"], "a timm network does not show its attention"),
    (["--model_type={root}/lg0/checkpoints/last/hf"], "add --images=... or --dataset_path")])
def test_bad_input_is_one_clear_error(trained, argv, message):
    argv = [flag.format(root=trained) for flag in argv]
    if argv and "lg0" not in str(argv):
        argv.append(f"--run={trained}/lg0")
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        run_script("attention", *argv, f"--out_dir={trained}/bad", f"--cache_dir={trained}/cache")


@pytest.mark.parametrize("flag", ["--detect", "--detect=true"])
def test_detect_is_an_unknown_key_like_any_other(flag):
    """The key is `detection`. attention.detect is a function, and no flag stands for it."""
    script = os.path.join(ROOT, "attention.py")
    process = subprocess.run([sys.executable, script, flag], capture_output=True, text=True)
    assert process.returncode == 1
    error = "error: command line: unknown key 'detect', did you mean 'detection'?\n"
    assert process.stderr == error
