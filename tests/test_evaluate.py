"""evaluate.py: features against the network called by hand, and the script on runs, weights and every kind of data."""
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoint import export_hf
from configurator import UserError, override
from data import Dataset, load_dataset
from evaluate import extract_features, gather, knn_accuracy, patch_probe, stream
from model import build_backbone, forward_features, pretrained_input
from metrics import knn_classify, linear_probe
from tests_support import ROOT, load_script


# ---- features ----

@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return build_backbone("dinov2_with_registers", False, 2, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                          patch_size=4, image_size=16, num_register_tokens=3).eval()


@pytest.fixture(scope="module")
def dataset():
    images = np.random.default_rng(0).integers(-1000, 1000, (11, 16, 16, 2)).astype(np.int16)
    return Dataset(images, labels=np.arange(11, dtype=np.uint8) % 3, name="made up")


PIPELINE = dict(size=16, intensity_range=(-1000.0, 1000.0), mean=(0.5, 0.25), std=(0.25, 0.5))


def by_hand(dataset):
    """The network's input, written out: to 0..1, then minus mean over std."""
    x = (torch.from_numpy(np.array(dataset.images)).permute(0, 3, 1, 2).float() + 1000) / 2000
    return (x - torch.tensor([0.5, 0.25])[:, None, None]) / torch.tensor([0.25, 0.5])[:, None, None]


@pytest.mark.parametrize("batch_size, num_workers", [(64, 0), (4, 0), (4, 2)])
def test_features_are_those_of_the_backbone_in_order(backbone, dataset, batch_size, num_workers):
    features, labels = extract_features(backbone, dataset, **PIPELINE, batch_size=batch_size, num_workers=num_workers)
    with torch.no_grad():
        expected = forward_features(backbone, by_hand(dataset))[0]
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert features.dtype == torch.float32
    assert labels.dtype == torch.int64 and labels.tolist() == [i % 3 for i in range(11)]


def test_raw_pixels_are_the_baseline(dataset):
    features, _ = extract_features(None, dataset, **PIPELINE, batch_size=3)
    torch.testing.assert_close(features, by_hand(dataset).flatten(1))


def test_labels_may_be_many_or_none(dataset):
    many = np.eye(11, 4, dtype=np.int64)
    assert torch.equal(extract_features(None, Dataset(dataset.images, many), **PIPELINE)[1], torch.from_numpy(many))
    assert extract_features(None, Dataset(dataset.images), **PIPELINE)[1] is None


def test_autocast_gives_fp32_features_close_to_those_without(backbone, dataset):
    exact = extract_features(backbone, dataset, **PIPELINE)[0]
    rough = extract_features(backbone, dataset, **PIPELINE, autocast=lambda: torch.autocast("cpu", torch.bfloat16))[0]
    assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().max() < 0.1


def test_an_unreadable_image_is_named_or_left_out(tmp_path):
    for i in range(4):
        (tmp_path / "test" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 50 * i, np.uint8)).save(tmp_path / "test" / "ab"[i % 2] / f"{i}.png")
    (tmp_path / "test" / "a" / "2.png").write_bytes(b"no png")
    dataset = load_dataset(str(tmp_path), "test", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"2\.png: cannot be read as an image.*on_bad_image=skip"):
        extract_features(None, dataset, size=8)
    plain = dict(size=8, mean=(0.0,), std=(1.0,), batch_size=1)
    features, labels = extract_features(None, dataset, **plain, on_bad_image="skip")
    assert (features[:, 0] * 255).round().tolist() == [0, 50, 150] and labels.tolist() == [0, 1, 1]


def test_gather_has_what_belongs_to_the_features(backbone, dataset):
    found = gather(backbone, dataset, with_patch_mean=True, **PIPELINE, batch_size=4)
    with torch.no_grad():
        cls, patches = forward_features(backbone, by_hand(dataset))
    torch.testing.assert_close(found["features"], torch.cat([cls, patches.mean(1)], 1), atol=1e-5, rtol=1e-5)
    assert found["rows"] == list(range(11)) and len(set(found["digests"])) == 11
    twice = gather(None, Dataset(np.asarray(dataset.images)[[3, 5, 3]]), **PIPELINE)["digests"]
    assert twice == [found["digests"][i] for i in (3, 5, 3)]   # the pixels, whatever their place


def test_raw_patches_and_masks_lie_on_the_same_grid():
    image = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
    batch = next(stream(None, Dataset(image, masks=image.astype(np.uint8)), size=8, intensity_range=(0, 64), mean=(0.0,),
                        std=(1.0,), patch=4, with_masks=True))
    cells = batch["masks"][0].reshape(2, 4, 2, 4).swapaxes(1, 2).reshape(4, 16)
    np.testing.assert_allclose(batch["patches"][0].numpy() * 64, cells)


def test_a_mask_is_cut_and_shrunk_like_its_image():
    image = np.zeros((1, 8, 12), np.uint8)
    image[0, 2:6, 4:8] = 255                                   # the centre square is columns 2..9
    batch = next(stream(None, Dataset(image, masks=image), size=4, mean=(0.0,), std=(1.0,), with_masks=True))
    shrunk = batch["cls"].reshape(4, 4) > 0.5
    assert torch.equal(shrunk, torch.from_numpy(batch["masks"][0]) > 0) and shrunk.sum() == 4


def test_the_patch_probe_finds_what_can_be_seen():
    """Bright patches are lesions; a second class that looks like the background cannot be found."""
    rng = np.random.default_rng(0)
    masks = rng.choice([0, 7, 9], size=(24, 4, 4), p=(0.6, 0.2, 0.2)).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    images = (rng.integers(0, 60, masks.shape) + 150 * (masks == 7)).astype(np.uint8)
    train, val, test = (Dataset(images[part], masks=masks[part]) for part in (slice(12), slice(12, 16), slice(16, 24)))
    dice = patch_probe(None, train, val, dict(test=test), np.array([0, 7, 9]), rng, size=16, mean=(0.5,), std=(0.2,),
                       patch=4)["test"]
    assert dice[1] == 1.0 and dice[2] < 0.6


def test_knn_accuracy_is_the_share_of_right_answers():
    images = np.zeros((8, 4, 4), np.uint8)
    images[::2, :2], images[1::2, 2:] = 200, 200               # upper or lower half bright
    bank = Dataset(images, np.arange(8) % 2)
    right, wrong = Dataset(images[:4], np.array([0, 1, 0, 1])), Dataset(images[:4], np.array([0, 1, 1, 1]))
    settings = dict(k=3, size=4, mean=(0.5,), std=(0.5,))
    assert knn_accuracy(None, bank, dict(val=right, test=wrong), **settings) == dict(val=1.0, test=0.75)
    assert knn_accuracy(None, bank, {}, **settings) == {}


# ---- the input pipeline goes with the weights ----

def test_an_export_remembers_its_intensities(tmp_path, backbone):
    export_hf(str(tmp_path / "hf"), backbone, 16, (-1000.0, 400.0), (0.3, 0.25), (0.2, 0.5), "card")
    expected = pretrained_input(str(tmp_path / "hf"))
    assert expected["intensity_range"] == (-1000.0, 400.0) and expected["size"] == 16
    assert expected["mean"] == pytest.approx((0.3, 0.25), abs=1e-5) and expected["std"] == (0.2, 0.5)
    os.remove(tmp_path / "hf" / "preprocessor_config.json")
    assert pretrained_input(str(tmp_path / "hf")) == {}


# ---- the script ----

def evaluate(*argv):
    module = load_script("evaluate")
    module.main(override(vars(module), module.config_keys, ["--bootstrap=20", "--num_workers=0", "--device=cpu",
                                                            "--mixed_precision=no", *argv]))


def report(folder, stem):
    return {network["name"]: network for network in json.load(open(f"{folder}/results/{stem}.json"))["networks"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two seeds of a tiny run on a small phantom: (folder, path of the .npz)."""
    from phantom import make_phantom
    folder = tmp_path_factory.mktemp("runs")
    arrays = dict(mask_names=np.array(["background", "calcification"]))
    for split, n, seed in (("train", 60, 0), ("val", 20, 1), ("test", 30, 2)):
        arrays.update({f"{split}_{key}": value for key, value in make_phantom(n, 32, seed).items()})
    np.savez(folder / "small.npz", **arrays)
    for seed in (0, 1):
        module = load_script("train")
        module.main(override(vars(module), module.config_keys, [
            "--use_pretrained=false", "--model_type=dinov2", "--hidden_size=32", "--num_hidden_layers=2", "--device=cpu",
            "--num_attention_heads=2", "--patch_size=8", "--global_crops_size=32", "--local_crops_size=16",
            "--local_crops_number=2", "--dino_head_out_dim=64", "--head_hidden_dim=32", "--head_bottleneck_dim=16",
            "--global_batch_size=8", "--max_iterations=4", "--warmup_iterations=1", "--eval_interval=2", "--lr=1e-2",
            "--momentum_teacher=0.5", "--num_workers=0", "--mixed_precision=no", f"--seed={seed}", "--log_interval=1",
            f"--dataset_path={folder}/small.npz", f"--cache_dir={folder}/cache", f"--out_dir={folder}/run{seed}"]))
    return str(folder), f"{folder}/small.npz"


def test_a_run_beside_its_start_and_raw_pixels(trained, capsys):
    folder, _ = trained
    run = f"{folder}/run0"
    evaluate(f"--run={run}", "--checkpoint=last", f"--cache_dir={folder}/cache")
    rows, summary = report(run, "small"), json.load(open(f"{run}/results/summary.json"))
    assert list(rows) == ["raw pixels", f"start of {run}", run]
    # the same numbers as train.py's own: raw pixels, the untouched start, the last teacher
    for name, key in (("raw pixels", "pixels"), (f"start of {run}", "untrained"), (run, "final")):
        assert rows[name]["results"]["test"]["knn"]["accuracy"] == pytest.approx(summary[key]["test"]), name
    assert rows[run]["adaptation"] == "from scratch" and rows[f"start of {run}"]["adaptation"] == "untrained"
    # the table says what the json says
    table, result = open(f"{run}/results/small.md").read(), rows[run]["results"]["test"]
    line = next(line for line in table.splitlines() if "from scratch" in line)
    assert [cell.strip() for cell in line.split("|")[3:9]] == [
        f"{result[probe][metric]:.3f}" for probe in ("linear", "knn")
        for metric in ("accuracy", "precision_weighted", "f1_weighted")]
    change = result["knn"]["accuracy"] - rows[f"start of {run}"]["results"]["test"]["knn"]["accuracy"]
    assert f"{run}: k-NN {change:+.3f} against its start" in table
    low, high = result["linear"]["accuracy_ci"]
    assert low <= result["linear"]["accuracy"] <= high and "Dice of calcification" in table and len(result["dice"]) == 2
    for name in ("curves", "test-confusion", "test-pca", "test-t-sne", "test-neighbours"):
        assert min(Image.open(f"{run}/results/small-{name}.png").size) > 200
    assert table.split("\n", 2)[2] in capsys.readouterr().out


def test_the_best_checkpoint_is_the_one_chosen_on_val(trained):
    folder, _ = trained
    evaluate(f"--run={folder}/run0", f"--cache_dir={folder}/cache", "--generate_pictures=false", f"--out_dir={folder}/best")
    best = f"{folder}/run0/checkpoints/best/hf"
    network, expected = build_backbone(best, True, 1).eval(), pretrained_input(best)
    settings = dict(size=32, intensity_range=expected["intensity_range"], mean=expected["mean"], std=expected["std"])
    splits = {split: load_dataset(f"{folder}/small.npz", split, cache_dir=f"{folder}/cache") for split in ("train", "val", "test")}
    features = {split: extract_features(network, dataset, **settings) for split, dataset in splits.items()}
    result = report(f"{folder}/best", "small")[f"{folder}/run0"]["results"]["test"]
    right = knn_classify(*features["train"], features["test"][0]) == features["test"][1]
    assert result["knn"]["accuracy"] == pytest.approx(float(right.float().mean()))
    probabilities = linear_probe(*features["train"], *features["val"], features["test"][0])
    assert result["linear"]["accuracy"] == pytest.approx(float((probabilities.argmax(1) == features["test"][1]).float().mean()))


def test_seeds_share_a_row(trained):
    folder, _ = trained
    evaluate(f"--compare={folder}/run*", "--checkpoint=last", f"--cache_dir={folder}/cache", f"--out_dir={folder}/both",
             "--generate_pictures=false", "--test_splits=test,val")
    rows, table = report(f"{folder}/both", "small"), open(f"{folder}/both/results/small.md").read()
    assert [len([line for line in table.splitlines() if what in line]) for what in ("from scratch, 2", "untrained, 2")] == [6, 6]
    values = [rows[f"{folder}/run{seed}"]["results"]["test"]["linear"]["accuracy"] for seed in (0, 1)]
    line = next(line for line in table.splitlines() if "from scratch, 2 seeds" in line)
    assert line.split("|")[3].strip() == f"{np.mean(values):.3f} ({np.std(values, ddof=1):.3f})"
    # val is measured here, so another part of train has to pick the penalty
    assert "val is measured, so 6 images of train (seed 0) pick" in table and "54 train, 6 val" not in table.split("##")[1]


def test_released_weights_on_a_folder_without_val(trained, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(60):
        folder = tmp_path / "cells" / ("test" if i % 3 == 0 else "train") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((rng.integers(0, 100, (20, 24, 3)) + 80 * (i % 2)).astype(np.uint8)).save(folder / f"{i}.png")
    for i in (0, 6):                                           # two test images that are training images as well
        shutil.copy(tmp_path / "cells" / "test" / "a" / f"{i}.png", tmp_path / "cells" / "train" / "a" / f"copy{i}.png")
    weights = build_backbone("dinov2", False, 3, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8,
                             image_size=32)
    weights.save_pretrained(tmp_path / "weights")
    evaluate(f"--model_type={tmp_path}/weights", f"--dataset_path={tmp_path}/cells", "--image_size=36",
             f"--out_dir={tmp_path}/out", f"--cache_dir={tmp_path}/cache")
    table, rows = open(tmp_path / "out/results/cells.md").read(), report(tmp_path / "out", "cells")
    assert "no val split: 4 images of train (a tenth, seed 0) pick" in table
    assert "2 of 20 test images are also in train, pixel for pixel" in table
    assert rows["raw pixels"]["results"]["test"]["linear"]["accuracy"] == 1.0              # the brighter ones are b
    assert rows[f"{tmp_path}/weights"]["size"] == 32           # floored to a multiple of the patch size
    assert [rows[name]["adaptation"] for name in rows] == ["-", "pretrained"]
    # as few images as one likes
    shutil.rmtree(tmp_path / "cells" / "test")
    shutil.rmtree(tmp_path / "cells" / "train" / "a")
    (tmp_path / "cells" / "train" / "a").mkdir()
    for path in sorted((tmp_path / "cells" / "train" / "b").iterdir())[:14]:
        path.rename(tmp_path / "cells" / "train" / "a" / path.name)
    evaluate(f"--model_type={tmp_path}/weights", f"--dataset_path={tmp_path}/cells", "--image_size=32", "--test_splits=val",
             f"--out_dir={tmp_path}/few", f"--cache_dir={tmp_path}/cache")
    assert (tmp_path / "few/results/cells-val-t-sne.png").exists()


def test_several_labels_per_image(trained, tmp_path):
    """ChestMNIST's kind: every label an output of its own; the tables stand, no confusion matrix."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 60), ("val", 20), ("test", 20)):
        labels = rng.integers(0, 2, (n, 3))
        images = rng.integers(0, 60, (n, 16, 16)) + 60 * labels[:, :1, None] + 100 * labels[:, 1:2, None] * (np.arange(16) < 8)
        arrays.update({f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels})
    np.savez(tmp_path / "chest.npz", **arrays)
    weights = build_backbone("vit", False, 1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=16)
    weights.save_pretrained(tmp_path / "weights")
    evaluate(f"--model_type={tmp_path}/weights", f"--dataset_path={tmp_path}/chest.npz", "--image_size=16",
             f"--out_dir={tmp_path}/out", f"--cache_dir={tmp_path}/cache")
    result = report(tmp_path / "out", "chest")["raw pixels"]["results"]["test"]
    # two of three labels can be seen, the third is a coin
    assert result["linear"]["auc"] > 0.75 and 0.6 < result["linear"]["accuracy"] < 1.0 and math.isfinite(result["knn"]["auc"])
    assert not os.path.exists(tmp_path / "out/results/chest-test-confusion.png")


@pytest.mark.parametrize("argv, message", [
    ([], r"nothing to evaluate: give --run"),
    (["--model_type=vit"], r"dataset_path is not given"),
    (["--run=RUN", "--checkpoint=first"], r"checkpoint='first'"),
    (["--run=RUN", "--test_splits=train"], r"test_splits='train': name splits other than train"),
    (["--run=RUN", "--test_splits=holdout"], r"has no split 'holdout'; it has"),
    (["--compare=nowhere*", "--dataset_path=DATA"], r"'nowhere\*' matches no folder"),
    (["--model_type=./nowhere", "--dataset_path=DATA"], r"model_type='./nowhere': no such directory"),
])
def test_bad_input_is_one_clear_error(trained, argv, message):
    folder, path = trained
    with pytest.raises(UserError, match=message):
        evaluate(*(arg.replace("RUN", f"{folder}/run0").replace("DATA", path) for arg in argv), f"--cache_dir={folder}/cache")


def test_a_run_that_is_not_finished_has_no_last(trained, tmp_path):
    folder, _ = trained
    shutil.copytree(f"{folder}/run0", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/last/hf")
    with pytest.raises(UserError, match=r"has no checkpoints/last/hf; 'best' is there once a run has begun"):
        evaluate(f"--run={tmp_path}/run", "--checkpoint=last")


def test_without_labels_there_is_nothing_to_measure(trained, tmp_path):
    np.savez(tmp_path / "bare.npz", train_images=np.zeros((4, 8, 8), np.uint8), test_images=np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(UserError, match="no labels to measure with"):
        evaluate(f"--run={trained[0]}/run0", f"--dataset_path={tmp_path}/bare.npz", f"--cache_dir={tmp_path}/cache")
