"""loader.py and data.py: values of any kind on their way into crops, images scaled by themselves,
what the log says of a data set, and errors that name their cause."""
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from augment import MultiCrop
from configurator import UserError, own_advice
from data import READING, Dataset, describe_source, load_dataset, scale_image
from features import knn_accuracy, stream_features
from loader import (CropDataset, describe_data, input_settings, measure_intensities, open_splits,
                    reading_keys)
from metrics import classification_metrics, knn_classify


def crops_of(dataset, **settings):
    return CropDataset(dataset, MultiCrop(16, local_crops_size=8, local_crops_number=2), 0, 2, 2,
                       **settings)


@pytest.fixture
def load(tmp_path):
    def load(path, split="train", **settings):
        return load_dataset(str(path), split, cache_dir=str(tmp_path / "cache"), **settings)
    return load


# ---- values ----

@pytest.mark.parametrize("dtype", [">u2", ">i2", ">f4", "?", "g", "<f2", "<f8", "<u4"])
def test_arrays_of_any_type_can_be_cropped(load, tmp_path, dtype):
    array = np.random.default_rng(0).integers(0, 2, (3, 20, 20)).astype(dtype)
    np.savez(tmp_path / "s.npz", train_images=array)
    dataset = load(tmp_path / "s.npz")
    image = dataset[1][0]
    assert (image[..., 0] == array[1]).all() and image.dtype.isnative
    assert crops_of(dataset)[0, 1]["global_crops"].shape == (2, 1, 16, 16)


def test_volumes_in_an_npz_are_slices_of_one_group(load, tmp_path):
    volumes = np.random.default_rng(0).integers(0, 256, (6, 12, 14, 14)).astype(np.uint8)
    masks, labels = (volumes > 128).astype(np.uint8), np.arange(6)[:, None] % 2
    np.savez(tmp_path / "s.npz", train_images=volumes, train_labels=labels, train_masks=masks)
    train, val = load(tmp_path / "s.npz"), load(tmp_path / "s.npz", "val")
    assert len(train) + len(val) == 72 and len(val) == 12 and train.num_channels == 1
    assert len(set(val.volume)) == 1 and not set(val.groups) & set(train.groups)
    v = int(val.volume[0])
    assert (val.labels == v % 2).all() and np.isnan(val.position_mm).all()  # nothing says how far
    for i in (0, 11):
        assert (val[i][0][..., 0] == volumes[v, i]).all() and (val[i][1] == masks[v, i]).all()
    assert "6 volumes of 12 slices along axis 0" in describe_source(train)
    other = load(tmp_path / "s.npz", volume_axis=2)
    v = int(other.volume[20])  # the seventh slice of the second volume of train
    assert (other[20][0][..., 0] == volumes[v, :, :, 6]).all()


def test_channels_first_are_moved_last_and_said(load, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (4, 3, 28, 28)).astype(np.uint8)
    np.savez(tmp_path / "s.npz", train_images=array)
    dataset = load(tmp_path / "s.npz")
    assert dataset.num_channels == 3 and (dataset[2][0] == array[2].transpose(1, 2, 0)).all()
    assert "train_images [4, 3, 28, 28]: axis 1 is its channels" in describe_source(dataset)


def test_the_names_of_an_npz_are_said_when_they_do_not_fit(load, tmp_path):
    images = np.zeros((4, 8, 8), np.uint8)
    for arrays in (dict(x_train=images, y_train=images), dict(images=images, labels=images)):
        np.savez(tmp_path / "s.npz", **arrays)
        message = f"s.npz: has the arrays {', '.join(sorted(arrays))}; needs train_images"
        with pytest.raises(UserError, match=message):
            load(tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", train_images=images, valid_images=images[:3], Test_images=images,
             extra=images)
    assert load(tmp_path / "s.npz", "valid").split == "val"
    assert [len(load(tmp_path / "s.npz", split)) for split in ("val", "test")] == [3, 4]
    assert "arrays left out: extra" in describe_source(load(tmp_path / "s.npz"))
    np.savez(tmp_path / "s.npz", train_images=images, valid_images=images, val_images=images)
    with pytest.raises(UserError, match="val_images and valid_images are both val; rename one"):
        load(tmp_path / "s.npz")


# ---- intensities ----

def test_images_are_scaled_by_themselves(tmp_path, load):
    """Two scanners, 0 to 250 and 0 to 2900: with one range the first one is nearly black."""
    rng = np.random.default_rng(0)
    array = rng.uniform(0, 1, (8, 24, 24)) * np.where(np.arange(8) % 2, 250, 2900)[:, None, None]
    np.savez(tmp_path / "s.npz", train_images=array.astype(np.int16))
    together, alone = load(tmp_path / "s.npz"), load(tmp_path / "s.npz", intensity_scaling="image")
    assert together[1][0].max() < 0.1 * together[0][0].max()
    for i in range(8):
        image, raw = alone[i][0], together[i][0].astype(float)
        low, high = np.percentile(raw, (0.5, 99.5))
        assert image.dtype == np.float32 and image.min() == 0 and image.max() == 1
        assert image == pytest.approx(np.clip((raw - low) / (high - low), 0, 1), abs=1e-5)
    inputs, _ = input_settings(alone, {}, (-100.0, 500.0))
    assert inputs["intensity_range"] == (0.0, 1.0)
    crops = crops_of(alone)[0, 1]["global_crops"]
    assert crops.dtype == torch.float32 and crops.min() > -0.2 and crops.max() < 1.2
    features = [next(stream_features(None, data, 16, **inputs))["cls"] for data in
                (alone, alone.subset(np.arange(8), "train"))]
    assert torch.equal(*features)
    # weights that were trained so are not fed anything else
    with pytest.raises(UserError, match="trained with 'image'; set --intensity_scaling=image"):
        input_settings(together, dict(intensity_scaling="image", mean=(0,), std=(1,)))


@pytest.mark.parametrize("dtype, low, high", [
    (np.uint8, 0, 255), (np.uint16, 0, 65535), (np.int16, -32768, 32767), (np.float32, 0, 1)])
def test_scaling_by_the_range_of_the_type(dtype, low, high):
    image = np.array([[low, high]]).astype(dtype)[..., None]
    assert scale_image(image, "dtype", "a.png").ravel().tolist() == [0, 1]
    with pytest.raises(UserError, match=r"a\.png: numbers from -3 to 0, float32"):
        scale_image(np.array([[[-3.0], [0.0]]], np.float32), "dtype", "a.png")


def test_eight_and_sixteen_bits_in_one_folder_are_refused_with_their_counts(tmp_path, load):
    rng = np.random.default_rng(0)
    (tmp_path / "s").mkdir()
    for i in range(6):
        dtype, high = [(np.uint8, 256), (np.uint16, 65536)][i // 4]
        image = Image.fromarray(rng.integers(0, high, (16, 16)).astype(dtype))
        image.save(tmp_path / "s" / f"{i}.png")
    dataset = load(tmp_path / "s")
    with pytest.raises(UserError, match="4 uint8, 2 .*16.*--intensity_scaling=dtype"):
        measure_intensities(dataset)
    assert measure_intensities(dataset, (0.0, 255.0))[0] == (0.0, 255.0)
    scaled = load(tmp_path / "s", intensity_scaling="dtype")
    assert measure_intensities(scaled)[1][0] == pytest.approx(0.5, abs=0.05)


def test_one_grey_file_does_not_make_a_colour_folder_grey(tmp_path, load):
    (tmp_path / "s").mkdir()
    for i in range(6):
        shape = (8, 8) if i == 0 else (8, 8, 3)
        Image.fromarray(np.full(shape, i, np.uint8)).save(tmp_path / "s" / f"{i}.png")
    assert load(tmp_path / "s").num_channels == 3
    assert load(tmp_path / "s")[0][0].shape == (8, 8, 3)


# ---- errors name their cause ----

@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_named(tmp_path, load, bad):
    array = np.ones((4, 8, 8), np.float32)
    array[2, 3, :2] = bad
    np.savez(tmp_path / "s.npz", train_images=array)
    dataset = load(tmp_path / "s.npz")
    message = r"s\.npz, train image 2: 2 of 64 pixels are NaN or infinite"
    with pytest.raises(UserError, match=message):
        measure_intensities(dataset)
    measure_intensities(dataset, on_bad_image="skip")
    assert re.search(message, crops_of(dataset)[0, 2]["error"])
    skipped = crops_of(dataset, on_bad_image="skip")[0, 2]
    assert skipped["index"] == 3 and re.search(message, skipped["bad"][0])


def test_whatever_a_crop_raises_is_one_line(monkeypatch):
    dataset = Dataset(np.zeros((3, 20, 20), np.uint8), name="made up")
    crops = crops_of(dataset)

    def broken(*args):
        raise RuntimeError("no such kernel\nand a page more")
    monkeypatch.setattr(crops.multi_crop, "plan", broken)
    text = crops[0, 1]["error"]
    assert text.startswith("made up, train image 1: cannot be used (RuntimeError: no such kernel)")
    assert "\n" not in text


def test_the_reason_is_kept_if_all_images_are_skipped():
    dataset = Dataset(np.zeros((3, 8, 8), np.uint8), masks=np.zeros((3, 8, 9), np.uint8), name="x")
    with pytest.raises(UserError, match=r"none of 3 sampled .* image 0: the mask has shape \(8, 9"):
        measure_intensities(dataset, on_bad_image="skip")


def test_a_script_gives_no_advice_on_keys_that_it_lacks():
    message = "a.png: cannot be read (x); mend or remove it, or set --on_bad_image=skip"
    assert own_advice(message, ["images"]) == "a.png: cannot be read (x); mend or remove it"
    assert own_advice(message, ["on_bad_image"]) == message == own_advice(message, None)
    message = "s: images have 1 channel(s), num_channels=3; set --num_channels=1, or 0 to take it"
    assert own_advice(message, []) == "s: images have 1 channel(s), num_channels=3"


# ---- what a run says and takes ----

def test_the_lines_on_the_data(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (44, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "s.npz", train_images=images[:40], train_labels=np.arange(40) % 2,
             train_patients=np.repeat(np.arange(10), 4), test_images=images[40:],
             test_labels=np.array([0, 1, -1, 1]), test_patients=np.array([0, 0, 0, 99]))
    config = SimpleNamespace(dataset_path=str(tmp_path / "s.npz"), dataset_size=28, seed=0,
                             cache_dir=str(tmp_path / "cache"), download_url="", num_channels=0,
                             eval_split="val")
    train, measured, _ = open_splits(config)
    assert {split: len(data) for split, data in measured.items()} == {"val": 4, "test": 3}
    inputs, source = input_settings(train, {})
    lines = describe_data(train, measured, inputs, source).split("\n")
    assert len(lines) == 3 and lines[0].startswith(f"data: {tmp_path}/s.npz: 1 label(s) unknown")
    assert "2 classes in train: 0 18, 1 18; 9 group(s) in train" in lines[0]
    assert "val: a tenth of train by group (patient or volume), seed 0" in lines[0]
    assert "36 train images, 1 channel(s), uint8; 4 val, 3 test; " in lines[1]
    shared = set(train.groups) & set(measured["test"].groups)
    assert ("of test are also in train" in lines[1]) == bool(shared)
    assert "measured on 36 images" in lines[2]


def test_a_regression_target_is_named_and_not_measured(tmp_path):
    np.savez(tmp_path / "s.npz", train_images=np.zeros((6, 8, 8), np.uint8),
             train_labels=np.linspace(0, 1, 6))
    config = SimpleNamespace(dataset_path=str(tmp_path / "s.npz"), dataset_size=28, seed=0,
                             cache_dir=str(tmp_path / "cache"), download_url="", num_channels=0,
                             eval_split="val")
    train, measured, _ = open_splits(config)
    text = describe_data(train, measured, *input_settings(train, {}))
    assert measured == {} and "a regression target and no classes" in text and "no k-NN" in text


def test_keys_of_reading_come_from_the_run_unless_they_are_given():
    mine = SimpleNamespace(**READING | dict(group_level=2), dataset_path="")
    run = dict(dataset_path="a", group_level=1, series="CT", intensity_scaling="image")
    assert reading_keys(mine, run) == READING | dict(group_level=2, series="CT",
                                                     intensity_scaling="image")
    mine.dataset_path = "b"  # how the run's folder was read says nothing of another one
    assert reading_keys(mine, run) == READING | dict(group_level=2, intensity_scaling="image")
    assert reading_keys(SimpleNamespace(series="MR", other=1)) == dict(series="MR")


# ---- groups in measurements ----

def test_neighbours_of_the_own_group_do_not_vote():
    train, labels = torch.eye(4)[[0, 0, 1]] + 0.01, torch.tensor([7, 7, 20250101])
    query = torch.tensor([[1.0, 0.1, 0, 0]])
    assert knn_classify(train, labels, query, k=2).tolist() == [7]
    groups = dict(train_groups=torch.tensor([5, 5, 6]), test_groups=torch.tensor([5]))
    for k, temperature in ((2, None), (3, 0.07)):
        assert knn_classify(train, labels, query, k, temperature, **groups).tolist() == [20250101]
    # a split that shares patients with train is no longer easy
    rng = np.random.default_rng(0)
    patients = rng.uniform(0, 255, (12, 8, 8))
    images = (np.repeat(patients, 2, axis=0) + rng.normal(0, 2, (24, 8, 8))).clip(0, 255)
    labels, groups = np.repeat(rng.permutation(12) % 2, 2), np.repeat(np.arange(12), 2)
    first, second = np.arange(24) % 2 == 0, np.arange(24) % 2 == 1
    accuracy = {}
    for name, own in (("memory", None), ("honest", groups)):
        parts = [Dataset(images[rows].astype(np.uint8), labels[rows],
                         groups=None if own is None else own[rows]) for rows in (first, second)]
        accuracy.update({name: knn_accuracy(None, parts[0], {"test": parts[1]}, 1, size=8)["test"]})
    assert accuracy["memory"] == 1.0 and accuracy["honest"] < 0.9


def test_intervals_resample_groups():
    """Ten patients with twenty equal images each: the interval is that of ten, not of 200."""
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.integers(0, 2, 10), 20)
    predictions = np.where(np.repeat(np.arange(10) < 7, 20), labels, 1 - labels)
    by_image = classification_metrics(predictions, labels, bootstrap=500)["accuracy_ci"]
    groups = np.repeat(np.arange(10) * 10**12, 20)
    by_group = classification_metrics(predictions, labels, bootstrap=500, groups=groups)
    low, high = by_group["accuracy_ci"]
    assert by_group["accuracy"] == pytest.approx(0.7)
    assert (low, high) == pytest.approx((0.4, 1.0), abs=0.11)
    assert high - low > 3 * (by_image[1] - by_image[0])
    alone = classification_metrics(predictions, labels, bootstrap=20, groups=np.zeros(200, int))
    assert np.isnan(alone["accuracy_ci"]).all()  # of one patient nothing is known


def test_metrics_of_codes_need_no_memory_for_the_largest():
    labels = np.array([110, 20250101, 110, 7])
    metrics = classification_metrics(np.array([110, 20250101, 7, 7]), labels)
    assert metrics["accuracy"] == 0.75 and metrics["balanced_accuracy"] == pytest.approx(5 / 6)
