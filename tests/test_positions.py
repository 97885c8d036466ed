"""Slice position from features: ridge regression, its penalty, R2 and Kendall's tau."""
import json
import math
import types

import numpy as np
import pytest
import torch

from configurator import UserError, override
from model import build_backbone
from phantom import make_phantom_volumes
from positions import (PENALTIES, fit_positions, kendall_tau, position_r2, r_squared,
                       relative_positions, rows_of_volumes, slice_position)
from tests_support import load_script


def make_slices(n_volumes, n_slices=8, width=6, noise=0.3, seed=0):
    """Features [N,width] in which a line tells the position, positions 0..1, volumes."""
    rng = np.random.default_rng(seed)
    volume = np.repeat(np.arange(n_volumes), n_slices).astype(np.int32)
    positions = np.tile(np.linspace(0, 1, n_slices), n_volumes)
    style = rng.normal(size=(n_volumes, width))[volume]  # of the patient: the same in all slices
    direction = np.random.default_rng(99).normal(size=width)
    x = positions[:, None] * direction + noise * style + noise * rng.normal(size=style.shape)
    return x.astype(np.float32), positions, volume


def test_rows_of_volumes_finds_each_slice_once():
    rows = rows_of_volumes(np.array([3, -1, 0, 3, 0, -1, 7]))
    assert [part.tolist() for part in rows] == [[2, 4], [0, 3], [6]]
    assert rows_of_volumes(np.array([], int)) == [] and rows_of_volumes(np.array([-1])) == []


def test_relative_positions():
    mm = np.array([10, 30, 20, 5, -4, 0, 4, np.nan, 1], np.float32)
    volume = np.array([0, 0, 0, 1, 2, 2, 2, 2, -1])
    expected = [0, 1, 0.5, np.nan, 0, 0.5, 1, np.nan, np.nan]
    assert np.allclose(relative_positions(mm, volume), expected, equal_nan=True)
    order_only = relative_positions(np.full(9, np.nan), np.array([7, 7, -1, 7, 5, 5, 5, 7, 7]))
    expected = [0, 0.25, np.nan, 0.5, 0, 0.5, 1, 0.75, 1]
    assert np.allclose(order_only, expected, equal_nan=True)


def test_ridge_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, positions, volume = make_slices(6)
    test, truth, _ = make_slices(3, seed=1)
    predict, penalty = fit_positions(x, positions, volume)
    mean, std = x.mean(0), x.std(0)
    ridge = linear_model.Ridge(penalty * len(x)).fit((x - mean) / std, positions)
    assert np.allclose(predict(test), ridge.predict((test - mean) / std), atol=1e-5)
    assert position_r2(x, positions, volume, test, truth) == pytest.approx(
        ridge.score((test - mean) / std, truth), abs=1e-5)


def test_the_penalty_is_the_best_when_each_volume_is_left_out():
    """By fits anew: standardised once, then without the volume."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    for seed, noise in ((0, 0.1), (1, 0.6), (2, 3.0)):
        x, positions, volume = make_slices(5, noise=noise, seed=seed)
        _, penalty = fit_positions(x, positions, volume)
        x = (x - x.mean(0)) / x.std(0)
        errors = []
        for candidate in PENALTIES:
            error = 0
            for v in range(5):
                ridge = linear_model.Ridge(candidate * len(x))
                ridge.fit(x[volume != v], positions[volume != v])
                error += ((ridge.predict(x[volume == v]) - positions[volume == v])**2).sum()
            errors.append(error)
        assert penalty == pytest.approx(PENALTIES[np.argmin(errors)])


def test_leaving_out_slices_would_choose_a_smaller_penalty():
    """Slices of one volume resemble each other. So the penalty is chosen by volumes: with as many
    features as slices, one slice left out is predicted well from its neighbours."""
    x, positions, volume = make_slices(4, n_slices=12, width=40, noise=0.5)
    _, by_volume = fit_positions(x, positions, volume)
    _, by_slice = fit_positions(x, positions, np.arange(len(x)))
    assert by_volume > by_slice


def test_features_of_more_dimensions_than_slices_and_constant_ones():
    x, positions, volume = make_slices(3, n_slices=4, width=50, noise=0.01)
    x[:, 0] = 7
    test, truth, _ = make_slices(2, n_slices=4, width=50, noise=0.01, seed=1)
    test[:, 0] = 7
    assert position_r2(x, positions, volume, test, truth) > 0.98


def test_r_squared_of_exact_mean_and_reversed():
    truth = np.array([0.0, 0.5, 1.0])
    assert r_squared(truth, truth) == 1 and r_squared(np.full(3, 0.5), truth) == 0
    assert r_squared(1 - truth, truth) == -3


def test_kendall_tau_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    volume = np.repeat([4, 1, 2], [9, 5, 12])
    positions = rng.permutation(26).astype(float)
    predictions = positions + 6 * rng.normal(size=26)
    predictions[9:14] = predictions[9:14].round(-1)  # some are equal
    expected = [stats.kendalltau(predictions[volume == v], positions[volume == v]).statistic
                for v in (1, 2, 4)]
    assert kendall_tau(predictions, positions, volume) == pytest.approx(np.mean(expected))
    assert kendall_tau(-positions, positions, volume) == -1
    assert math.isnan(kendall_tau(np.zeros(26), positions, volume))


def collected(x, position_mm, volume):
    """Features as collect_features gives them, and the part of a Dataset that counts here."""
    dataset = types.SimpleNamespace(position_mm=position_mm, volume=volume)
    return dict(cls=torch.from_numpy(x), indices=list(range(len(x)))), dataset


def test_slice_position_leaves_pictures_out_and_says_what_it_saw():
    x, positions, volume = make_slices(6, noise=0.1)
    test, truth, test_volume = make_slices(3, noise=0.1, seed=1)
    held_out = collected(test, 7 * truth, test_volume)
    result = slice_position(*collected(x, 40 * positions - 9, volume), *held_out)
    assert result["r2"] == pytest.approx(position_r2(x, positions, volume, test, truth))
    assert result["r2"] > 0.9 and result["tau"] > 0.8 and result["n_volumes"] == 3
    pictures = np.full((5, 6), 1e6, np.float32)  # would ruin any fit
    train = collected(np.concatenate([x, pictures]), np.r_[40 * positions - 9, np.full(5, np.nan)],
                      np.r_[volume, np.full(5, -1)])
    assert slice_position(*train, *held_out)["r2"] == pytest.approx(result["r2"])
    one = collected(x[:8], positions[:8], volume[:8])
    assert slice_position(*one, *held_out) == {}
    assert slice_position(*train, *collected(test, truth, np.full(len(test), -1))) == {}
    assert slice_position(*train, *collected(test, None, None)) == {}


def test_places_are_those_of_the_whole_volume_when_slices_could_not_be_read():
    x, positions, volume = make_slices(6, noise=0.1)
    train = collected(x, positions, volume)
    features, dataset = collected(*make_slices(2, noise=0.01, seed=1))
    kept = [i for i in range(16) if i % 8 > 2]  # the first slices are missing
    part = dict(cls=features["cls"][kept], indices=kept)
    truth = np.tile(np.linspace(0, 1, 8), 2)[kept]
    expected = position_r2(x, positions, volume, part["cls"].numpy(), truth)
    assert slice_position(*train, part, dataset)["r2"] == pytest.approx(expected)


# ---- evaluate.py ----

def evaluated(tmp_path, monkeypatch, arrays):
    """evaluate.py on an .npz of such arrays, by a network that is built from scratch: the text of
    its tables, and their numbers {name of the network: {split: {probe: {metric: value}}}}."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, weights = tmp_path / "volumes.npz", tmp_path / "weights"
    np.savez(path, **arrays)
    torch.manual_seed(0)
    build_backbone("vit", False, 1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                   patch_size=8, image_size=32).save_pretrained(weights)
    script = load_script("evaluate")
    script.main(override(vars(script), script.config_keys, [
        f"--model_type={weights}", f"--dataset_path={path}", f"--out_dir={tmp_path}",
        "--image_size=32", "--intensity_range=-200,600", "--num_workers=0", "--bootstrap=0",
        "--generate_pictures=false", "--device=cpu", "--mixed_precision=no"]))
    report = json.loads((tmp_path / "results" / "volumes.json").read_text())
    text = (tmp_path / "results" / "volumes.md").read_text()
    return text, {network["model"]: network["results"] for network in report["networks"]}


def drawn_volumes(splits, without=()):
    arrays = {}
    for seed, split in enumerate(splits):
        for key, value in make_phantom_volumes(4, 32, seed, n_slices=6).items():
            if key not in without:
                arrays[f"{split}_{key}"] = value
    return arrays


def test_evaluate_measures_places_beside_the_labels(tmp_path, monkeypatch):
    arrays = drawn_volumes(("train", "val", "test"), ("masks",))
    text, results = evaluated(tmp_path, monkeypatch, arrays)
    assert "R2 of slice position" in text and "on 4 other volumes" in text
    raw = results["raw pixels"]["test"]
    assert {"knn", "linear", "position"} <= set(raw)
    place, volume = np.tile(np.linspace(0, 1, 6), 4), np.repeat(np.arange(4), 6)
    pixels = {split: np.clip(arrays[f"{split}_images"].reshape(24, -1), -200, 600)
              for split in ("train", "test")}
    expected = position_r2(pixels["train"], place, volume, pixels["test"], place)
    assert raw["position"]["r2"] == pytest.approx(expected, abs=1e-4)
    assert raw["position"]["n_volumes"] == 4
    assert set(results["weights"]["test"]["position"]) == set(raw["position"])


def test_evaluate_needs_no_labels_for_places(tmp_path, monkeypatch):
    """Volumes without labels and without a test split: a tenth by patient is held out."""
    arrays = drawn_volumes(("train",), ("labels", "masks"))
    text, results = evaluated(tmp_path, monkeypatch, arrays)
    assert "no labels: only what needs none is measured" in text
    assert "no test split: a tenth of train by patient, 6 images" in text
    assert set(results["raw pixels"]["test"]) == set(results["weights"]["test"]) == {"position"}
    assert results["weights"]["test"]["position"]["n_volumes"] == 1


def test_evaluate_without_labels_and_volumes_is_refused(tmp_path, monkeypatch):
    images = make_phantom_volumes(1, 32, n_slices=6)["images"]
    with pytest.raises(UserError, match="has no labels to measure with"):
        evaluated(tmp_path, monkeypatch, dict(train_images=images, test_images=images))
