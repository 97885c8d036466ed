"""features.py against the network called by hand; evaluate.py on runs, weights and every kind of
data."""
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
from evaluate import extract_features, knn_classify, linear_probe, patch_probe
from features import collect_features, knn_accuracy, stream_features
from model import build_backbone, forward_features
from phantom import make_phantom
from tests_support import load_script
from weights import pretrained_input


# ---- features ----

@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return build_backbone("dinov2_with_registers", False, 2, hidden_size=16, num_hidden_layers=2,
                          num_attention_heads=2, patch_size=4, image_size=16,
                          num_register_tokens=3).eval()


@pytest.fixture(scope="module")
def dataset():
    images = np.random.default_rng(0).integers(-1000, 1000, (11, 16, 16, 2)).astype(np.int16)
    return Dataset(images, labels=np.arange(11, dtype=np.uint8) % 3, name="made up")


PIPELINE = dict(size=16, intensity_range=(-1000.0, 1000.0), mean=(0.5, 0.25), std=(0.25, 0.5))


def by_hand(dataset):
    """The network's input, written out: pixels to 0..1, minus mean, divided by std."""
    x = torch.from_numpy(np.array(dataset.images)).permute(0, 3, 1, 2)
    x = (x.float() + 1000) / 2000
    mean, std = torch.tensor([0.5, 0.25]), torch.tensor([0.25, 0.5])
    return (x - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("batch_size, num_workers", [(64, 0), (4, 0), (4, 2)])
def test_features_are_those_of_the_backbone_in_order(backbone, dataset, batch_size, num_workers):
    features, labels = extract_features(backbone, dataset, **PIPELINE, batch_size=batch_size,
                                        num_workers=num_workers)
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
    _, labels = extract_features(None, Dataset(dataset.images, many), **PIPELINE)
    assert torch.equal(labels, torch.from_numpy(many))
    assert extract_features(None, Dataset(dataset.images), **PIPELINE)[1] is None


def test_autocast_gives_fp32_features_close_to_those_without(backbone, dataset):
    exact = extract_features(backbone, dataset, **PIPELINE)[0]
    rough = extract_features(backbone, dataset, **PIPELINE,
                             autocast=lambda: torch.autocast("cpu", torch.bfloat16))[0]
    assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().max() < 0.1


def test_an_unreadable_image_is_named_or_left_out(tmp_path):
    for i in range(4):
        folder = tmp_path / "test" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 50 * i, np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "test" / "a" / "2.png").write_bytes(b"no png")
    dataset = load_dataset(str(tmp_path), "test", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"2\.png: cannot be read as an image.*on_bad_image=skip"):
        extract_features(None, dataset, size=8)
    plain = dict(size=8, mean=(0.0,), std=(1.0,), batch_size=1)
    features, labels = extract_features(None, dataset, **plain, on_bad_image="skip")
    assert (features[:, 0] * 255).round().tolist() == [0, 50, 150]
    assert labels.tolist() == [0, 1, 1]


def test_features_come_with_indices_and_digests(backbone, dataset):
    found = collect_features(backbone, dataset, with_patch_mean=True, **PIPELINE, batch_size=4)
    with torch.no_grad():
        cls, patches = forward_features(backbone, by_hand(dataset))
    expected = torch.cat([cls, patches.mean(1)], 1)
    torch.testing.assert_close(found["features"], expected, atol=1e-5, rtol=1e-5)
    assert found["indices"] == list(range(11)) and len(set(found["digests"])) == 11
    repeated = Dataset(np.asarray(dataset.images)[[3, 5, 3]])
    digests = collect_features(None, repeated, **PIPELINE)["digests"]
    assert digests == [found["digests"][i] for i in (3, 5, 3)]  # they depend on the pixels only


def test_raw_patches_and_masks_lie_on_the_same_grid():
    image = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
    dataset = Dataset(image, masks=image.astype(np.uint8))
    batch = next(stream_features(None, dataset, size=8, intensity_range=(0, 64), mean=(0.0,),
                                 std=(1.0,), patch=4, with_masks=True))
    cells = batch["masks"][0].reshape(2, 4, 2, 4).swapaxes(1, 2).reshape(4, 16)
    np.testing.assert_allclose(batch["patches"][0].numpy() * 64, cells)


def test_a_mask_is_cut_and_shrunk_like_its_image():
    image = np.zeros((1, 8, 12), np.uint8)
    image[0, 2:6, 4:8] = 255  # the central square is columns 2..9
    dataset = Dataset(image, masks=image)
    batch = next(stream_features(None, dataset, size=4, mean=(0.0,), std=(1.0,), with_masks=True))
    shrunk = batch["cls"].reshape(4, 4) > 0.5
    assert torch.equal(shrunk, torch.from_numpy(batch["masks"][0]) > 0) and shrunk.sum() == 4


def test_the_patch_probe_finds_what_can_be_seen():
    """Bright patches are lesions; a second class that looks like the background cannot be found."""
    rng = np.random.default_rng(0)
    values = np.array([0, 7, 9])
    masks = rng.choice(values, size=(24, 4, 4), p=(0.6, 0.2, 0.2)).astype(np.uint8)
    masks = masks.repeat(4, 1).repeat(4, 2)
    images = (rng.integers(0, 60, masks.shape) + 150 * (masks == 7)).astype(np.uint8)
    train, val, test = (Dataset(images[part], masks=masks[part])
                        for part in (slice(12), slice(12, 16), slice(16, 24)))
    dice = patch_probe(None, train, val, dict(test=test), values, rng, size=16, mean=(0.5,),
                       std=(0.2,), patch=4)["test"]
    assert dice[1] == 1.0 and dice[2] < 0.6


def test_knn_accuracy_is_the_share_of_correct_predictions():
    images = np.zeros((8, 4, 4), np.uint8)
    images[::2, :2], images[1::2, 2:] = 200, 200  # the upper or the lower half is bright
    bank = Dataset(images, np.arange(8) % 2)
    queries = dict(val=Dataset(images[:4], np.array([0, 1, 0, 1])),
                   test=Dataset(images[:4], np.array([0, 1, 1, 1])))
    settings = dict(k=3, size=4, mean=(0.5,), std=(0.5,))
    assert knn_accuracy(None, bank, queries, **settings) == dict(val=1.0, test=0.75)
    assert knn_accuracy(None, bank, {}, **settings) == {}


# ---- the input pipeline goes with the weights ----

def test_an_export_remembers_its_intensities(tmp_path, backbone):
    export_hf(str(tmp_path / "hf"), backbone, 16, (-1000.0, 400.0), (0.3, 0.25), (0.2, 0.5), "card")
    expected = pretrained_input(str(tmp_path / "hf"))
    assert expected["intensity_range"] == (-1000.0, 400.0) and expected["size"] == 16
    assert expected["mean"] == pytest.approx((0.3, 0.25), abs=1e-5)
    assert expected["std"] == (0.2, 0.5)
    os.remove(tmp_path / "hf" / "preprocessor_config.json")
    assert pretrained_input(str(tmp_path / "hf")) == {}


# ---- the script ----

def evaluate(*argv):
    module = load_script("evaluate")
    flags = ["--bootstrap=20", "--num_workers=0", "--device=cpu", "--mixed_precision=no",
             "--blocks=last"]  # auto fits four more probes for each network
    module.main(override(vars(module), module.config_keys, [*flags, *argv]))


def report(folder, name):
    """{network: its entry} of the .json file that a script wrote."""
    with open(f"{folder}/results/{name}.json") as file:
        return {network["name"]: network for network in json.load(file)["networks"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two seeds of a tiny run on a small phantom: (folder, path of the .npz)."""
    folder = tmp_path_factory.mktemp("runs")
    arrays = dict(mask_names=np.array(["background", "calcification"]))
    for split, n, seed in (("train", 60, 0), ("val", 20, 1), ("test", 30, 2)):
        for key, value in make_phantom(n, 32, seed).items():
            arrays[f"{split}_{key}"] = value
    np.savez(folder / "small.npz", **arrays)
    for seed in (0, 1):
        module = load_script("train")
        module.main(override(vars(module), module.config_keys, [
            "--use_pretrained=false", "--model_type=dinov2", "--hidden_size=32",
            "--num_hidden_layers=2", "--device=cpu", "--num_attention_heads=2", "--patch_size=8",
            "--global_crops_size=32", "--local_crops_size=16", "--local_crops_number=2",
            "--dino_head_out_dim=64", "--head_hidden_dim=32", "--head_bottleneck_dim=16",
            "--global_batch_size=8", "--max_iterations=4", "--warmup_iterations=1",
            "--eval_interval=2", "--lr=1e-2", "--momentum_teacher=0.5", "--num_workers=0",
            "--mixed_precision=no", f"--seed={seed}", "--log_interval=1",
            f"--dataset_path={folder}/small.npz", f"--cache_dir={folder}/cache",
            f"--out_dir={folder}/run{seed}"]))
    return str(folder), f"{folder}/small.npz"


def test_a_run_beside_its_start_and_raw_pixels(trained, capsys):
    folder, _ = trained
    run = f"{folder}/run0"
    start = f"start of {run}"
    evaluate(f"--run={run}", "--checkpoint=last", f"--cache_dir={folder}/cache")
    networks, summary = report(run, "small"), json.load(open(f"{run}/results/summary.json"))
    assert list(networks) == ["raw pixels", start, run]
    results = {name: network["results"]["test"] for name, network in networks.items()}
    # the same numbers as train.py's own: raw pixels, the network before training, the last teacher
    for name, key in (("raw pixels", "pixels"), (start, "untrained"), (run, "final")):
        assert results[name]["knn"]["accuracy"] == pytest.approx(summary[key]["test"]), name
    assert networks[run]["adaptation"] == "from scratch: DINO"
    assert networks[run]["losses"] == "DINO" and networks[run]["start"] == start
    assert networks[start]["adaptation"] == "untrained"
    # the table has the numbers of the json
    table, result = open(f"{run}/results/small.md").read(), results[run]
    line = next(line for line in table.splitlines() if "from scratch" in line)
    expected = []
    for probe in ("linear", "knn"):
        for metric in ("accuracy", "precision_weighted", "f1_weighted"):
            expected.append(f"{result[probe][metric]:.3f}")
    assert [cell.strip() for cell in line.split("|")[3:9]] == expected
    change = result["knn"]["accuracy"] - results[start]["knn"]["accuracy"]
    assert f"{run}: k-NN {change:+.3f} against its start" in table
    low, high = result["linear"]["accuracy_ci"]
    assert low <= result["linear"]["accuracy"] <= high
    assert "Dice of calcification" in table and len(result["dice"]) == 2
    for name in ("curves", "test-confusion", "test-pca", "test-t-sne", "test-neighbours"):
        assert min(Image.open(f"{run}/results/small-{name}.png").size) > 200
    assert table.split("\n", 2)[2] in capsys.readouterr().out


def test_the_best_checkpoint_is_the_one_chosen_on_val(trained):
    folder, path = trained
    evaluate(f"--run={folder}/run0", f"--cache_dir={folder}/cache", "--generate_pictures=false",
             f"--out_dir={folder}/best")
    best = f"{folder}/run0/checkpoints/best/hf"
    network, expected = build_backbone(best, True, 1).eval(), pretrained_input(best)
    settings = {key: expected[key] for key in ("intensity_range", "mean", "std")}
    features = {}
    for split in ("train", "val", "test"):
        dataset = load_dataset(path, split, cache_dir=f"{folder}/cache")
        features[split] = extract_features(network, dataset, size=32, **settings)
    test_features, test_labels = features["test"]
    result = report(f"{folder}/best", "small")[f"{folder}/run0"]["results"]["test"]
    correct = knn_classify(*features["train"], test_features) == test_labels
    assert result["knn"]["accuracy"] == pytest.approx(float(correct.float().mean()))
    probs = linear_probe(*features["train"], *features["val"], test_features)
    correct = probs.argmax(1) == test_labels
    assert result["linear"]["accuracy"] == pytest.approx(float(correct.float().mean()))


def test_seeds_share_a_row(trained):
    folder, _ = trained
    evaluate(f"--compare={folder}/run*", "--checkpoint=last", f"--cache_dir={folder}/cache",
             f"--out_dir={folder}/both", "--generate_pictures=false", "--test_splits=test,val")
    networks = report(f"{folder}/both", "small")
    table = open(f"{folder}/both/results/small.md").read()
    for words in ("from scratch: DINO, 2", "untrained, 2"):
        lines = [line for line in table.splitlines() if words in line]
        lines = [line for line in lines if "several blocks" not in line]
        assert len(lines) == 8  # four tables for each split
    values = []
    for seed in (0, 1):
        result = networks[f"{folder}/run{seed}"]["results"]["test"]
        values.append(result["linear"]["accuracy"])
    line = next(line for line in table.splitlines() if "from scratch: DINO, 2 seeds" in line)
    expected = f"{np.mean(values):.3f} ({np.std(values, ddof=1):.3f})"
    assert line.split("|")[3].strip() == expected
    # val is measured here, so another part of train has to choose the penalty
    assert "val is measured, so 6 images of train (seed 0) pick" in table
    assert "54 train, 6 val" not in table.split("##")[1]


def test_released_weights_on_a_folder_without_val(trained, tmp_path, capsys):
    rng, cells = np.random.default_rng(0), tmp_path / "cells"
    for i in range(60):
        folder = cells / ("test" if i % 3 == 0 else "train") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 100, (20, 24, 3)) + 80 * (i % 2)  # images of b are brighter
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")
    for i in (0, 6):  # two test images that are training images as well
        shutil.copy(cells / "test" / "a" / f"{i}.png", cells / "train" / "a" / f"copy{i}.png")
    weights = build_backbone("dinov2", False, 3, hidden_size=16, num_hidden_layers=1,
                             num_attention_heads=2, patch_size=8, image_size=32)
    weights.save_pretrained(tmp_path / "weights")
    flags = [f"--model_type={tmp_path}/weights", f"--dataset_path={cells}",
             f"--cache_dir={tmp_path}/cache"]
    evaluate(*flags, "--image_size=36", f"--out_dir={tmp_path}/out")
    table = open(tmp_path / "out/results/cells.md").read()
    networks = report(tmp_path / "out", "cells")
    assert "no val split: 4 images of train (a tenth, seed 0) pick" in table
    assert "2 of 20 test images are also in train, pixel for pixel" in table
    assert networks["raw pixels"]["results"]["test"]["linear"]["accuracy"] == 1.0
    assert networks[f"{tmp_path}/weights"]["size"] == 32  # the patch size divides it
    assert [network["adaptation"] for network in networks.values()] == ["-", "pretrained"]
    # a handful of images is enough
    shutil.rmtree(cells / "test")
    shutil.rmtree(cells / "train" / "a")
    (cells / "train" / "a").mkdir()
    for path in sorted((cells / "train" / "b").iterdir())[:14]:
        path.rename(cells / "train" / "a" / path.name)
    evaluate(*flags, "--image_size=32", "--test_splits=val", f"--out_dir={tmp_path}/few")
    assert (tmp_path / "few/results/cells-val-t-sne.png").exists()


def test_several_labels_per_image(trained, tmp_path):
    """As in ChestMNIST, every label is an output of its own. There are tables, but no confusion
    matrix."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 60), ("val", 20), ("test", 20)):
        labels = rng.integers(0, 2, (n, 3))
        images = rng.integers(0, 60, (n, 16, 16)) + 60 * labels[:, :1, None]
        images = images + 100 * labels[:, 1:2, None] * (np.arange(16) < 8)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images.astype(np.uint8), labels
    np.savez(tmp_path / "chest.npz", **arrays)
    weights = build_backbone("vit", False, 1, hidden_size=16, num_hidden_layers=1,
                             num_attention_heads=2, patch_size=8, image_size=16)
    weights.save_pretrained(tmp_path / "weights")
    evaluate(f"--model_type={tmp_path}/weights", f"--dataset_path={tmp_path}/chest.npz",
             "--image_size=16", f"--out_dir={tmp_path}/out", f"--cache_dir={tmp_path}/cache")
    result = report(tmp_path / "out", "chest")["raw pixels"]["results"]["test"]
    # two of three labels can be seen, the third is random
    assert result["linear"]["auc"] > 0.75 and 0.6 < result["linear"]["accuracy"] < 1.0
    assert math.isfinite(result["knn"]["auc"])
    assert not os.path.exists(tmp_path / "out/results/chest-test-confusion.png")


def test_the_row_of_several_blocks(trained):
    """Its numbers are those of the readout by hand: blocks 0 and 1, unit length, side by side."""
    folder, path = trained
    evaluate(f"--run={folder}/run0", "--blocks=0,1", f"--out_dir={folder}/blocks",
             f"--cache_dir={folder}/cache", "--generate_pictures=false")
    networks = report(f"{folder}/blocks", "small")
    best = f"{folder}/run0/checkpoints/best/hf"
    network, expected = build_backbone(best, True, 1).eval(), pretrained_input(best)
    settings = {key: expected[key] for key in ("intensity_range", "mean", "std")}
    x, y = {}, {}
    for split in ("train", "val", "test"):
        dataset = load_dataset(path, split, cache_dir=f"{folder}/cache")
        found = collect_features(network, dataset, size=32, block_numbers=[0, 1], **settings)
        x[split], y[split] = found["readout"], found["labels"]
    probs = linear_probe(x["train"], y["train"], x["val"], y["val"], x["test"])
    result = networks[f"{folder}/run0"]["results"]["test"]
    assert networks[f"{folder}/run0"]["blocks"] == [0, 1]
    wanted = float((probs.argmax(1) == y["test"]).float().mean())
    assert result["linear_blocks"]["accuracy"] == pytest.approx(wanted)
    votes = knn_classify(x["train"], y["train"], x["test"])
    wanted = float((votes == y["test"]).float().mean())
    assert result["knn_blocks"]["accuracy"] == pytest.approx(wanted)
    table = open(f"{folder}/blocks/results/small.md").read()
    lines = [line for line in table.splitlines() if "from scratch: DINO, several blocks" in line]
    assert len(lines) == 2
    assert f"{result['linear_blocks']['accuracy']:.3f}" == lines[0].split("|")[3].strip()


def test_a_teacher_with_a_grid_of_its_own_meets_masks(trained, monkeypatch):
    """timm at 32 pixels: the teacher sees 224 and has 14 x 14 patches, the masks have 32 pixels."""
    timm = pytest.importorskip("timm")
    folder, path = trained
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **keys: create(
        name, pretrained=False, img_size=56, **keys))
    monkeypatch.setattr("teachers.IMAGENET", dict(mean=(0.5,) * 3, std=(0.5,) * 3))
    evaluate("--model_type=timm:vit_tiny_patch16_224", f"--dataset_path={path}",
             f"--cache_dir={folder}/cache", "--image_size=32", "--generate_pictures=false",
             "--blocks=last", f"--out_dir={folder}/timm")
    result = report(f"{folder}/timm", "small")["timm:vit_tiny_patch16_224"]["results"]["test"]
    assert len(result["dice"]) == 2


def test_a_comma_in_the_name_of_a_run(trained):
    folder, _ = trained
    run = shutil.copytree(f"{folder}/run0", f"{folder}/run,5")
    shutil.rmtree(f"{run}/results")
    os.remove(f"{run}/log.jsonl")  # then there are no training curves
    evaluate(f"--run={run}", f"--cache_dir={folder}/cache", "--test_splits=val")
    assert f"{folder}/run,5" in report(run, "small")
    assert not os.path.exists(f"{run}/results/small-curves.png")


def test_results_that_cannot_be_written_are_refused_before_the_measurements(trained, monkeypatch):
    folder, _ = trained
    with open(f"{folder}/file", "w") as file:
        file.write("mine")
    with pytest.raises(UserError, match="file/results.*is a file; name a folder"):
        evaluate(f"--run={folder}/run0", f"--out_dir={folder}/file", f"--cache_dir={folder}/cache")


def test_data_and_a_start_that_are_gone_are_named_as_the_runs(trained, tmp_path):
    folder, _ = trained
    run = str(shutil.copytree(f"{folder}/run0", tmp_path / "run"))
    config = open(f"{run}/config.py").read()

    def evaluate_with(key, value):
        lines = [line for line in config.split("\n") if not line.startswith(f"{key} =")]
        with open(f"{run}/config.py", "w") as file:
            file.write("\n".join([*lines, f"{key} = {value!r}\n"]))
        evaluate(f"--run={run}", f"--cache_dir={folder}/cache")
    with pytest.raises(UserError, match="'./gone.npz' does not exist.*the run was trained on it"):
        evaluate_with("dataset_path", "./gone.npz")
    config += "\nmodel_type = './gone'\n"
    with pytest.raises(UserError, match="run started from './gone'"):
        evaluate_with("use_pretrained", True)


@pytest.mark.parametrize("argv, message", [
    ([], r"nothing to evaluate: give --run"),
    (["--run=RUNS"], r"run='.*/runs': no such directory, did you mean .*run0"),
    (["--run=RUN", "--blocks=7"], r"blocks='7': give 'last', 'auto', or numbers from 0 to 1"),
    (["--model_type=vit"], r"dataset_path is not given"),
    (["--run=RUN", "--checkpoint=first"], r"checkpoint='first'"),
    (["--run=RUN", "--image_size=3"], r"image_size=3: .* has patches of 8 pixels"),
    (["--run=RUN", "--test_splits=train"], r"test_splits='train': name splits other than train"),
    (["--run=RUN", "--test_splits=holdout"], r"has no split 'holdout'; it has"),
    (["--compare=nowhere*", "--dataset_path=DATA"], r"'nowhere\*' matches no folder"),
    (["--model_type=./nowhere", "--dataset_path=DATA"],
     r"'./nowhere': no such directory"),
])
def test_bad_input_is_one_clear_error(trained, argv, message):
    folder, path = trained
    words = {"RUNS": f"{folder}/runs", "RUN": f"{folder}/run0", "DATA": path}
    for word, value in words.items():
        argv = [arg.replace(word, value) for arg in argv]
    with pytest.raises(UserError, match=message):
        evaluate(*argv, f"--cache_dir={folder}/cache")


def test_a_run_that_is_not_finished_has_no_last(trained, tmp_path):
    folder, _ = trained
    shutil.copytree(f"{folder}/run0", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/last/hf")
    message = r"has no checkpoints/last/hf; 'best' is there once a run has begun"
    with pytest.raises(UserError, match=message):
        evaluate(f"--run={tmp_path}/run", "--checkpoint=last")


def test_without_labels_there_is_nothing_to_measure(trained, tmp_path):
    images = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "bare.npz", train_images=images, test_images=images)
    with pytest.raises(UserError, match="no labels to measure with"):
        evaluate(f"--run={trained[0]}/run0", f"--dataset_path={tmp_path}/bare.npz",
                 f"--cache_dir={tmp_path}/cache")
