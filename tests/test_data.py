"""images.py, data.py, loader.py: every kind of input and the message when it is wrong; downloads
from a server on loopback; the order of reading, a function of (seed, sample number), whatever the
number of ranks, workers and resumes."""
import hashlib
import http.server
import json
import math
import multiprocessing
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import archives
import data
import folders
from augment import MultiCrop
from configurator import UserError
from data import Dataset, load_dataset
from images import ImageFiles, Rows, load_image
from loader import BatchOrder, CropDataset, input_settings, measure_intensities
from phantom import PHANTOM_CLASSES, make_phantom
from tests_support import ROOT, assert_same


def pixels(*shape, dtype=np.uint8, low=0, high=256, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


@pytest.fixture
def load(tmp_path):
    """load_dataset with a cache of its own."""

    def load(path, split="train", **settings):
        return load_dataset(str(path), split, cache_dir=str(tmp_path / "cache"), **settings)

    return load


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def wrong(load, message, *args, **settings):
    """load(...) says `message` (a pattern), in one line."""
    with pytest.raises(UserError, match=message) as error:
        load(*args, **settings)
    assert "\n" not in str(error.value)


# ---- .npz ----

@pytest.mark.parametrize("shape", [(6, 9, 7), (6, 9, 7, 1), (6, 9, 7, 3), (6, 9, 7, 5)])
@pytest.mark.parametrize(
    "dtype, low, high",
    [(np.uint8, 0, 256), (np.int16, -1024, 3072), (np.uint16, 0, 65536), (np.float32, -3, 3)],
)
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_round_trip(load, tmp_path, shape, dtype, low, high, write):
    images, masks = pixels(*shape, dtype=dtype, low=low, high=high), pixels(6, 9, 7, high=2)
    labels = np.arange(6)[:, None] % 2
    write(tmp_path / "set.npz", train_images=images, train_labels=labels,
          train_masks=masks, val_images=images[::-1], class_names=np.array(["a", "bc"]))
    train, val = load(tmp_path / "set.npz"), load(tmp_path / "set.npz", "val")
    assert train.num_channels == (shape + (1,))[3]
    assert train.class_names == ["a", "bc"] and train.labels.shape == (6,)
    assert len(train) == len(val) == 6 and val.labels is None and val.masks is None
    for i in range(6):
        image, mask = train[i]
        assert image.dtype == dtype and (image == images[i].reshape(9, 7, -1)).all()
        assert (mask == masks[i]).all() and train.labels[i] == i % 2
        assert (val[i][0] == images[5 - i].reshape(9, 7, -1)).all() and val[i][1] is None


def test_npz_with_many_labels_per_image(load, tmp_path):
    labels = pixels(6, 4, high=2)
    np.savez(tmp_path / "set.npz", train_images=pixels(6, 8, 8), train_labels=labels,
             val_images=pixels(2, 8, 8))
    assert (load(tmp_path / "set.npz").labels == labels).all()


def test_npz_is_unpacked_once_and_mapped(load, tmp_path):
    np.savez_compressed(tmp_path / "set.npz", train_images=pixels(200, 32, 32),
                        val_images=pixels(2, 8, 8))
    assert isinstance(load(tmp_path / "set.npz").images, np.memmap)
    (folder,) = (tmp_path / "cache").iterdir()
    before = os.stat(folder / "train_images.npy").st_mtime_ns
    load(tmp_path / "set.npz")
    assert os.stat(folder / "train_images.npy").st_mtime_ns == before


def test_a_changed_npz_is_read_anew(load, tmp_path):
    for value in (1, 2):
        np.savez(tmp_path / "set.npz", train_images=np.full((3, 8, 8), value, np.uint8))
        os.utime(tmp_path / "set.npz", ns=(value * 10**9,) * 2)
        assert (load(tmp_path / "set.npz")[0][0] == value).all()
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("has_val", [True, False])
def test_spawned_workers_map_the_file_again(load, tmp_path, split, has_val):
    """Pickle would send the content of a memory map: GBs for every worker. This also holds when val
    is cut from train."""
    images, masks = pixels(500, 32, 32), pixels(500, 32, 32, high=2)
    arrays = {}
    for name in ("train", "val")[: 1 + has_val]:
        arrays[f"{name}_images"], arrays[f"{name}_masks"] = images, masks
        arrays[f"{name}_labels"] = np.arange(500)
    np.savez(tmp_path / "set.npz", **arrays)
    dataset = load(tmp_path / "set.npz", split)
    sent = pickle.dumps(dataset)
    assert len(sent) < 20_000
    arrived = pickle.loads(sent)
    assert len(arrived) == len(dataset) and (arrived.labels == dataset.labels).all()
    for i in (0, len(dataset) - 1):
        assert all((a == b).all() for a, b in zip(arrived[i], dataset[i]))


def test_damaged_npz_leaves_nothing_behind(load, tmp_path):
    path = tmp_path / "set.npz"
    np.savez_compressed(path, train_images=pixels(50, 32, 32, high=20))
    whole = path.read_bytes()
    flipped = bytes(255 - byte for byte in whole[2000:2200])
    for damaged in (whole[: len(whole) // 2], b"", b"not a zip at all",
                    whole[:2000] + bytes(200) + whole[2200:],
                    whole[:2000] + flipped + whole[2200:]):
        path.write_bytes(damaged)
        wrong(load, r"set\.npz.*(not a complete|damaged).*again", path)
        assert os.listdir(tmp_path / "cache") == []
    path.write_bytes(whole)
    assert len(load(path)) == 50


def test_nothing_is_unpickled(load, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    objects = np.array([Trap(), Trap()], dtype=object)
    plain = pixels(2, 8, 8)
    cases = [dict(train_images=objects), dict(train_images=plain, train_labels=objects),
             dict(train_images=plain, class_names=objects)]
    for i, arrays in enumerate(cases):
        np.savez(tmp_path / f"{i}.npz", **arrays)
        with pytest.raises(ValueError, match="(?i)object"):
            load(tmp_path / f"{i}.npz")
    save(tmp_path / "folder" / "a.npy", objects)
    wrong(load, r"a\.npy: cannot be read", tmp_path / "folder")
    assert not (tmp_path / "executed").exists()


def test_object_arrays_are_an_error_of_one_line(load, tmp_path):
    np.savez(tmp_path / "set.npz", train_images=np.array([[1], "a"], dtype=object))
    wrong(load, "set.*object", tmp_path / "set.npz")


def test_a_member_cannot_leave_the_folder(load, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("../escaped.npy", b"")
    wrong(load, r"member '\.\./escaped\.npy' is not a plain \.npy", tmp_path / "set.npz")
    assert not (tmp_path / "escaped.npy").exists() and os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize("message, arrays", [
    (r"5 labels for 6 images; there must be one each", dict(train_labels=np.arange(5))),
    (r"5 masks for 6 images; there must be one each", dict(train_masks=pixels(5, 8, 8))),
    (r"train_masks has shape \(6, 8, 9\), train_images \(6, 8, 8\); height",
     dict(train_masks=pixels(6, 8, 9))),
    (r"train_images has shape \(6, 8\), uint8; needs numbers \[N,H,W\]",
     dict(train_images=pixels(6, 8))),
    (r"train_images has shape \(6, 8, 8\), <U1; needs numbers",
     dict(train_images=np.full((6, 8, 8), "a"))),
    (r"split 'train': no images", dict(train_images=pixels(0, 8, 8))),
])
def test_arrays_that_do_not_fit(load, tmp_path, message, arrays):
    np.savez(tmp_path / "set.npz", **{"train_images": pixels(6, 8, 8), **arrays})
    wrong(load, message, tmp_path / "set.npz")


def test_what_is_missing_is_named(load, tmp_path):
    kinds = r"give 'phantom', a MedMNIST name \(pathmnist, .*\.npz"
    wrong(load, rf"dataset_path='.*nowhere' does not exist; {kinds}", tmp_path / "nowhere")
    wrong(load, r"dataset_path='pathmnits' does not exist", "pathmnits")
    np.savez(tmp_path / "set.npz", train_images=pixels(6, 8, 8, 3), test_images=pixels(6, 8, 8, 3))
    wrong(load, r"has no split 'extra'; it has test, train", tmp_path / "set.npz", "extra")
    wrong(load, r"no val, and no labels to measure with", tmp_path / "set.npz", "val")
    wrong(load, r"images have 3 channel\(s\), num_channels=1; set --num_channels=3, or 0",
          tmp_path / "set.npz", num_channels=1)
    np.savez(tmp_path / "bare.npz", images=pixels(6, 8, 8))
    wrong(load, r"bare\.npz: has the arrays images; needs train_images \[N,H,W\]",
          tmp_path / "bare.npz")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    wrong(load, r"empty': no images; looked for pictures .*: 1 file\(s\) seen, 0 image.*1 \.txt",
          tmp_path / "empty")


def test_val_is_cut_from_train_if_there_is_none(load, tmp_path):
    # image, mask and label have the same number
    numbered = np.arange(57, dtype=np.uint8)[:, None, None].repeat(8, 1)
    np.savez(tmp_path / "set.npz", train_images=numbered, train_masks=numbered,
             train_labels=np.arange(57))

    def labels(split, seed=0):
        part = load(tmp_path / "set.npz", split, seed=seed)
        for i, label in enumerate(part.labels):
            assert all((array == label).all() for array in part[i])
        return part.labels.tolist()

    assert len(labels("val")) == 5 and sorted(labels("train") + labels("val")) == list(range(57))
    assert labels("val") == labels("val") != labels("val", seed=1)
    part = load(tmp_path / "set.npz", "val")
    assert part.path(0).endswith(f"set.npz, val image {part.labels[0]}")  # the number in the file


# ---- folders ----

def test_class_folders(load, tmp_path):
    def flat(value):
        return np.full((8, 9), value, np.uint8)

    for name, count, value in (("tumour", 3, 200), ("benign", 4, 50)):
        for i in range(count):
            save(tmp_path / "set" / "train" / name / "deep" / f"{i}.png", flat(value))
            save(tmp_path / "set" / "val" / name / f"{i}.png", flat(value + 1))
    save(tmp_path / "set" / "test" / "tumour" / "0.png", flat(7))
    train, val, test = (load(tmp_path / "set", split) for split in ("train", "val", "test"))
    assert train.class_names == test.class_names == ["benign", "tumour"] and train.num_channels == 1
    assert train.labels.tolist() == val.labels.tolist() == [0] * 4 + [1] * 3
    assert test.labels.tolist() == [1]  # numbered over all splits, not within one
    assert [int(train[i][0][0, 0, 0]) for i in range(7)] == [50] * 4 + [200] * 3
    assert train[0][0].shape == (8, 9, 1) and train.path(6).endswith("train/tumour/deep/2.png")


def test_flat_folder_without_labels(load, tmp_path):
    for i in range(5):
        save(tmp_path / "set" / f"{i}.PNG", np.full((8, 8, 3), i, np.uint8))
    train = load(tmp_path / "set")
    assert train.labels is None and train.class_names == []
    assert len(train) == 5 and train.num_channels == 3
    assert [int(train[i][0].max()) for i in range(5)] == list(range(5))
    save(tmp_path / "set" / "a" / "b.png", np.zeros((8, 8, 3), np.uint8))
    # if some files lie at the top, folders are no classes
    assert load(tmp_path / "set").labels is None
    wrong(load, "has no split 'test'; it has train", tmp_path / "set", "test")


def test_masks_beside_the_images(load, tmp_path):
    root = tmp_path / "set"
    for i, suffix in enumerate((".png", ".npy", ".tif", ".bmp")):
        save(root / "images" / "x" / f"{i}.jpg", np.full((16, 24), 100, np.uint8))
        save(root / "masks" / "x" / f"{i}{suffix}", np.eye(16, 24, k=i, dtype=np.uint8) * 255)
    save(root / "images" / "x" / "9.jpg", np.full((16, 24), 100, np.uint8))
    dataset = load(root)
    whole = {dataset.path(i)[-5]: dataset[i][1] for i in range(5)}
    assert whole.pop("9") is None  # an image without a mask has nothing labelled
    for i, mask in whole.items():
        assert ((mask > 0) == np.eye(16, 24, k=int(i), dtype=bool)).all()
    save(root / "masks" / "x" / "0.png", np.ones((16, 16), np.uint8))
    message = r"0\.jpg: the mask has shape \(16, 16\), its image \(16, 24\); both must agree"
    with pytest.raises(UserError, match=message):
        load(root)[0]


BOXES = [[[2, 1, 5, 3], [10.5, 4, 11.2, 6, 7]], [], None, [[-3, 14, 2, 99]]]


def drawn(boxes, shape):
    """Masks from boxes by the plain loop: a pixel is labelled if any part of it is in the box."""
    if boxes is None:
        return None
    mask = np.zeros(shape, np.uint8)
    for left, top, right, bottom, *value in boxes:
        for y in range(shape[0]):
            for x in range(shape[1]):
                if left < x + 1 and x < right and top < y + 1 and y < bottom:
                    mask[y, x] = (value or [1])[0]
    return mask


@pytest.mark.parametrize("folder", ("set", "set/images", "set/train"))
def test_boxes_in_a_folder(load, tmp_path, folder):
    for i in range(4):
        save(tmp_path / folder / f"{i}.png", pixels(16, 24))
    places = tmp_path / ("set" if folder == "set/images" else folder)
    listed = {f"{i}.png": boxes for i, boxes in enumerate(BOXES) if boxes is not None}
    (places / "boxes.json").write_text(json.dumps(listed))
    dataset = pickle.loads(pickle.dumps(load(str(tmp_path / "set"))))
    for i, boxes in enumerate(BOXES):
        mask = dataset[i][1]
        if boxes is None:
            assert mask is None
        else:
            assert (mask == drawn(boxes, (16, 24))).all() and mask.dtype == np.uint8
    assert drawn(BOXES[0], (16, 24)).sum() == 3 * 2 + 2 * 2 * 7
    assert drawn(BOXES[3], (16, 24)).sum() == 2 * 2


def test_boxes_in_an_npz(load, tmp_path):
    rows = []
    for i, boxes in enumerate(BOXES):
        rows += [[i, *box[:4], (*box, 1)[4]] for box in boxes or ()]
    np.savez(tmp_path / "set.npz", train_images=pixels(4, 16, 24), train_boxes=np.array(rows))
    dataset = load(str(tmp_path / "set.npz"))
    for i, boxes in enumerate(BOXES):  # without a row an image has no lesion: somebody looked
        assert (dataset[i][1] == drawn(boxes or [], (16, 24))).all()


@pytest.mark.parametrize("message, boxes", [
    (r"boxes.json: there is no image 'x.png'; names are as in the folder, like '0.png'",
     {"x.png": []}),
    (r"image 0 has the box \[1, 2, 3\]; needs \[left, top, right, bottom\]",
     {"0.png": [[1, 2, 3]]}),
    (r"has the box \[5, 1, 2, 3\]", {"0.png": [[5, 1, 2, 3]]}),
    (r"has the box 7", {"0.png": [7]}),
    (r"has the box \[0, 0, 2, 2, 300\]; .* mask value from 1 to 255",
     {"0.png": [[0, 0, 2, 2, 300]]}),
    (r"has the box \['a', 0, 2, 2\]", {"0.png": [["a", 0, 2, 2]]}),
    (r"boxes.json: needs ", [[0, 0, 1, 1]]),
    (r"image 0, 24 pixels wide and 16 high, has a box outside of it, \[30, 2, 40, 4\]",
     {"0.png": [[30, 2, 40, 4]]}),
])
def test_bad_boxes_are_named(load, tmp_path, message, boxes):
    save(tmp_path / "set" / "0.png", pixels(16, 24))
    (tmp_path / "set" / "boxes.json").write_text(json.dumps(boxes))
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "set"))[0]


def test_masks_of_any_kind_keep_what_is_labelled(load, tmp_path):
    """Annotation tools write colours and numbers: a label stays if it is green, or 300, or black in
    a palette."""
    label, masks = np.eye(8, dtype=np.uint8), tmp_path / "set" / "masks"
    save(masks / "0.png", np.stack([0 * label, 255 * label, 0 * label], axis=-1))
    save(masks / "1.png", label.astype(np.uint16) * 300)
    save(masks / "2.tif", label.astype(np.int32))
    save(masks / "3.png", label > 0)
    for i, color in ((4, (0, 255, 0)), (5, (0, 0, 0))):
        palette = Image.fromarray(label)
        palette.putpalette([0, 0, 0, *color])
        palette.save(masks / f"{i}.png")
    for i in range(6):
        save(tmp_path / "set" / "images" / f"{i}.png", np.zeros((8, 8), np.uint8))
    dataset = load(tmp_path / "set")
    for i in range(6):
        assert ((dataset[i][1] > 0) == (label > 0)).all(), i


@pytest.fixture
def settled(monkeypatch):
    """The clock is an hour ahead: files that a test has just written count as old, and their index
    is kept."""
    clock = folders.time.time_ns
    monkeypatch.setattr(folders.time, "time_ns", lambda: clock() + 3600 * 10**9)


def listing(root, cache_dir):
    """(paths, labels, class names, masks) of train, as open_folder finds them."""
    settings = SimpleNamespace(**data.READING, cache_dir=str(cache_dir), num_channels=0)
    source = folders.open_folder(str(root), settings)
    parts, labels = source.read("train"), source.labels["train"]
    images, masks = parts["images"], parts["masks"]
    if masks is not None:
        masks = [masks.path(i) if masks.names[i] else None for i in range(len(masks))]
    labels = None if labels is None else labels.tolist()
    return [images.path(i) for i in range(len(images))], labels, source.class_names, masks


def plain_listing(root):
    """The same of a folder of images/CLASS/ and masks/CLASS/, by looking at every file."""
    pictures = root / "images" if (root / "images").is_dir() else root
    paths = sorted((path for path in pictures.rglob("*.png")), key=str)
    folder_names = [path.relative_to(pictures).parts[0] for path in paths]
    names = sorted(set(folder_names))
    masks = None
    if (root / "masks").is_dir():
        masks = []
        for path in paths:
            mask = root / "masks" / path.relative_to(pictures)
            masks.append(str(mask) if mask.is_file() else None)
    return ([str(path) for path in paths], [names.index(name) for name in folder_names], names,
            masks)


def test_an_index_is_used_until_a_directory_changes(load, tmp_path, settled, monkeypatch):
    root, walks, walk = tmp_path / "set", [], folders.list_folder
    images, masks = root / "images", root / "masks"
    monkeypatch.setattr(folders, "list_folder",
                        lambda root, *more: walks.append(root) or walk(root, *more))
    for name in ("images/a/deep/1", "images/b/1", "images/b/2", "images/b/3", "masks/a/deep/1"):
        save(root / f"{name}.png", np.zeros((4, 4), np.uint8))

    def check(n_walks):
        assert listing(root, tmp_path / "cache") == plain_listing(root)
        assert len(walks) == n_walks

    check(1)
    check(1)
    times = [(folder, os.stat(folder).st_mtime_ns) for folder, _, _ in os.walk(root)]
    changes = [
        lambda: save(images / "a" / "deep" / "2.png", np.zeros((4, 4), np.uint8)),
        lambda: save(masks / "b" / "2.png", np.zeros((4, 4), np.uint8)),
        lambda: (images / "a" / "deep" / "1.png").rename(images / "a" / "deep" / "3.png"),
        lambda: (images / "a" / "deep").rename(images / "a" / "deeper"),
        lambda: (images / "b" / "1.png").unlink(),
        lambda: (masks / "b" / "2.png").rename(masks / "b" / "3.png"),
        lambda: masks.rename(root / "masques"),
    ]
    for number, change in enumerate(changes, start=2):
        change()
        for folder, time in times:  # as copying tools do
            if os.path.isdir(folder):
                os.utime(folder, ns=(time, time))
        check(number)
        check(number)
    # another content, no other name
    Image.fromarray(np.ones((4, 4), np.uint8)).save(images / "b" / "2.png")
    assert load(root, "val")[0][0].max() in (0, 1) and len(walks) == len(changes) + 1


def test_an_index_of_a_folder_that_is_being_written_is_not_kept(tmp_path):
    for i in range(3):
        save(tmp_path / "set" / f"{i}.png", np.zeros((4, 4), np.uint8))
        assert len(listing(tmp_path / "set", tmp_path / "cache")[0]) == i + 1
    assert not (tmp_path / "cache").exists()


def test_half_an_index_is_never_used(tmp_path, settled, monkeypatch):
    """A run is killed at any array: no part lies under the index's name, and the next start makes a
    whole one."""
    for name in ("x/1", "y/2", "y/3"):
        save(tmp_path / "set" / f"{name}.png", np.zeros((4, 4), np.uint8))
    write, written = np.save, []

    def killed(path, array):
        if len(written) == limit:
            raise KeyboardInterrupt
        written.append(path)
        write(path, array)

    monkeypatch.setattr(archives.np, "save", killed)
    # after kill -9 nothing is tidied up
    monkeypatch.setattr(archives.shutil, "rmtree", lambda *_, **__: None)
    for limit in range(5):
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            listing(tmp_path / "set", tmp_path / "cache")
    assert all(folder.name.endswith(".part") for folder in (tmp_path / "cache").iterdir())
    limit = 99
    assert listing(tmp_path / "set", tmp_path / "cache") == plain_listing(tmp_path / "set")


def test_processes_that_start_together_make_one_index(tmp_path, settled):
    for i in range(200):
        save(tmp_path / "set" / f"c{i % 2}" / f"{i}.png", np.zeros((4, 4), np.uint8))
    caches = [tmp_path / "caches" / str(i) for i in range(8)]
    calls = [(tmp_path / "set", caches[i // 3]) for i in range(24)]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.starmap(listing, calls, chunksize=1)
    assert found == [plain_listing(tmp_path / "set")] * 24
    assert [len(list(cache.iterdir())) for cache in caches] == [1] * 8


def test_spawned_workers_map_the_index(load, tmp_path, settled):
    for i in range(600):
        path = tmp_path / "set" / ("train" if i % 2 else "val") / "one" / f"{i:0100d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i > 1:
            path.write_bytes(b"")
        else:
            save(path, np.full((4, 4), i, np.uint8))
    train = load(tmp_path / "set")
    sent = pickle.dumps(train)
    assert isinstance(train.images.names, np.memmap) and len(sent) < 4000 < 100 * len(train)
    arrived = pickle.loads(sent)
    assert isinstance(arrived.images.names, np.memmap) and arrived.labels is None  # one folder
    assert [arrived.path(i) for i in range(300)] == [train.path(i) for i in range(300)]
    assert arrived[0][0].max() == 1


# ---- one image ----

def test_pixels_stay_what_they_are(tmp_path):
    grey, color = pixels(9, 7), pixels(9, 7, 3)
    for suffix in (".png", ".bmp", ".tif", ".tiff", ".npy"):
        for array in (grey, color):
            save(tmp_path / f"a{suffix}", array)
            image = load_image(str(tmp_path / f"a{suffix}"))
            assert image.dtype == np.uint8 and (image == array.reshape(9, 7, -1)).all()
    sixteen = pixels(9, 7, dtype=np.uint16, high=65536)
    for suffix in (".png", ".tif"):
        save(tmp_path / f"a{suffix}", sixteen)
        image = load_image(str(tmp_path / f"a{suffix}"))
        assert image.dtype.itemsize >= 2 and (image[..., 0] == sixteen).all()
    hounsfield = pixels(9, 7, 5, dtype=np.int16, low=-1024, high=3000)
    for array in (hounsfield, pixels(9, 7, dtype=np.float32)):
        save(tmp_path / "a.npy", array)
        image = load_image(str(tmp_path / "a.npy"))
        assert image.dtype == array.dtype and (image == array.reshape(9, 7, -1)).all()
    save(tmp_path / "a.jpg", np.full((16, 16, 3), (200, 100, 50), np.uint8))
    assert np.abs(load_image(str(tmp_path / "a.jpg")).astype(int) - (200, 100, 50)).max() <= 3


def test_a_large_jpeg_is_decoded_only_as_large_as_its_crops_need(tmp_path):
    """At half, a quarter, an eighth of its size, never below the side that is asked for. An image
    stays whole if it is smaller, no JPEG, or has a mask."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    small.resize((1500, 1000), Image.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    small.resize((1500, 1000), Image.BICUBIC).save(tmp_path / "a.png")
    expected = {0: (1000, 1500), 100: (125, 188), 125: (125, 188), 126: (250, 375),
                250: (250, 375), 251: (500, 750), 500: (500, 750), 501: (1000, 1500),
                2000: (1000, 1500)}
    for side, shape in expected.items():
        assert load_image(str(tmp_path / "a.jpg"), least_side=side).shape[:2] == shape, side
    assert load_image(str(tmp_path / "a.png"), least_side=100).shape == (1000, 1500, 3)

    crop = MultiCrop(64, (0.4, 1.0), 2, 32, (0.05, 0.4), 4)
    assert crop.least_side() == 166 == math.ceil(32 / math.sqrt(3 / 4 * 0.05))
    only_global = MultiCrop(64, (0.4, 1.0), 2, 32, (0.05, 0.4), 0)
    assert only_global.least_side() == 117 == math.ceil(64 / math.sqrt(3 / 4 * 0.4))
    assert MultiCrop(64, (0.4, 1.0), 2, 32, (0.05, 0.4), 0, gram_crops_size=128).least_side() == 234
    for size, share in ((64, 0.4), (32, 0.05)):
        for _ in range(2000):
            box = MultiCrop.random_box((166, 249), (share, share), rng)
            assert min(box[2:]) >= size  # nothing is enlarged

    files = ImageFiles(str(tmp_path), ["a.png", "a.jpg"], 3)
    dataset = Dataset(Rows(files, np.array([1, 0])), name="two")
    whole, drafted = (CropDataset(dataset, crop, 0, 2, 8) for _ in range(2))
    assert drafted.dataset[0][0].shape == (250, 375, 3)
    assert drafted.dataset[1][0].shape == (1000, 1500, 3) == dataset[0][0].shape
    assert pickle.loads(pickle.dumps(drafted)).dataset[0][0].shape == (250, 375, 3)
    whole.dataset = dataset
    for key in ("global_crops", "local_crops"):
        full, half = whole[0, 0][key].float(), drafted[0, 0][key].float()
        other = whole[1, 0][key].float()
        # measured: 1.2 and 1.0 of 255, because boxes are rounded to pixels of another size; another
        # box is 50 away
        assert (full - half).abs().mean() < 1.6 < 0.1 * (full - other).abs().mean()
        assert (whole[0, 1][key] == drafted[0, 1][key]).all()
    masked = Dataset(dataset.images, masks=np.zeros((2, 1000, 1500), np.uint8))
    assert CropDataset(masked, crop, 0, 2, 8).dataset is masked


def test_eight_bit_pictures_follow_the_rest_of_the_folder(tmp_path):
    color = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    Image.fromarray(color).quantize(4).save(tmp_path / "palette.png")
    Image.fromarray(np.dstack([color, np.full((8, 8), 255, np.uint8)])).save(tmp_path / "alpha.png")
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(tmp_path / "grey.jpg")
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / "bits.png")

    def image(name, channels=0):
        return load_image(str(tmp_path / name), channels)

    for name in ("palette.png", "alpha.png"):
        assert image(name).shape == (8, 8, 3)
        assert np.abs(image(name).astype(int) - (200, 100, 50)).max() <= 2
        # 0.299 * 200 + 0.587 * 100 + 0.114 * 50
        assert np.abs(image(name, 1).astype(int) - 124).max() <= 2
    assert image("grey.jpg").shape == (8, 8, 1)
    assert image("grey.jpg", 3).shape == (8, 8, 3) and (image("grey.jpg", 3) == 90).all()
    assert (image("bits.png")[..., 0] == 255 * np.eye(8)).all()


def test_a_grey_jpg_among_rgb(load, tmp_path):
    save(tmp_path / "set" / "a.png", np.full((8, 8, 3), (200, 100, 50), np.uint8))
    save(tmp_path / "set" / "b.jpg", np.full((8, 8), 90, np.uint8))
    train = load(tmp_path / "set")
    assert train.num_channels == 3 and train[0][0].shape == train[1][0].shape == (8, 8, 3)
    wrong(load, r"images have 3 channel\(s\), num_channels=1; set --num_channels=0",
          tmp_path / "set", num_channels=1)
    wrong(load, r"shape \(8, 8, 3\), uint8; needs .* with 5 channels", tmp_path / "set",
          num_channels=5)
    save(tmp_path / "set" / "c.npy", pixels(8, 8, 5, dtype=np.int16))
    message = r"a\.png: shape \(8, 8, 3\), uint8; needs .* with 5 channels as the rest"
    with pytest.raises(UserError, match=message):  # the most channels decide
        load(tmp_path / "set")[0]


def test_rgb_can_be_asked_for_if_the_first_file_is_grey(load, tmp_path):
    save(tmp_path / "set" / "a.jpg", np.full((8, 8), 90, np.uint8))
    save(tmp_path / "set" / "b.png", np.full((8, 8, 3), (200, 100, 50), np.uint8))
    train = load(tmp_path / "set", num_channels=3)
    assert train[0][0].shape == (8, 8, 3) and (train[1][0] == (200, 100, 50)).all()


@pytest.mark.parametrize("slope, intercept, dtype", [
    (2, -1024, np.int16), (1, 0, np.int16), (10, 0, np.float32)])
def test_dicom_comes_in_the_units_of_its_rescale(tmp_path, slope, intercept, dtype):
    pydicom = pytest.importorskip("pydicom")
    stored = pixels(12, 10, dtype=np.uint16, high=2000 if slope < 10 else 60000)
    stored[0, 0] = 5000  # 5000 * 10 does not fit into int16
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    file = pydicom.Dataset()
    file.file_meta, file.PixelData = meta, stored.tobytes()
    file.Rows, file.Columns = 12, 10
    file.BitsAllocated = file.BitsStored = 16
    file.HighBit, file.PixelRepresentation, file.SamplesPerPixel = 15, 0, 1
    file.PhotometricInterpretation = "MONOCHROME2"
    file.RescaleSlope, file.RescaleIntercept = slope, intercept
    file.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    image = load_image(str(tmp_path / "a.dcm"))
    assert image.dtype == dtype
    assert (image[..., 0] == stored.astype(float) * slope + intercept).all()


def test_unreadable_images_are_named(tmp_path):
    save(tmp_path / "a.png", pixels(64, 64))
    whole = (tmp_path / "a.png").read_bytes()
    damaged = {"cut.png": whole[:1000], "text.jpg": b"hello", "empty.tif": b"",
               "a.npy": b"\x93NUMPY"}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        message = re.escape(name) + ": cannot be read as an image .*set --on_bad_image=skip"
        with pytest.raises(UserError, match=message):
            load_image(str(tmp_path / name))
    save(tmp_path / "b.npy", pixels(4, 4, 4, 4))
    message = r"b\.npy: shape \(4, 4, 4, 4\), uint8; needs \[height, width, channels\]"
    with pytest.raises(UserError, match=message):
        load_image(str(tmp_path / "b.npy"))


@pytest.mark.parametrize("limit", [100, 600])
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, limit):
    """Pillow warns above the limit and raises above twice the limit; both are refused."""
    save(tmp_path / "a.png", pixels(30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match=r"a\.png: cannot be read as an image \(DecompressionBomb"):
        load_image(str(tmp_path / "a.png"))


def test_an_import_leaves_the_warnings_as_they_are():
    """A program that imports load_dataset keeps its own filters; the libraries' are set before."""
    code = ("import warnings, numpy, torch, tqdm, PIL.Image, configurator, phantom\n"
            "before = list(warnings.filters)\n"
            "import images, data\n"
            "assert warnings.filters == before, warnings.filters")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- phantom ----

def test_phantom_is_three_disjoint_splits(load, tmp_path, monkeypatch):
    def fewer(n, size, seed):  # for speed
        return make_phantom(n // 100, size, seed)

    monkeypatch.setattr(archives.phantom, "make_phantom", fewer)
    sets = {split: load("phantom", split, size=32) for split in archives.SPLITS}
    assert [len(sets[split]) for split in archives.SPLITS] == [24, 6, 6]
    for seed, split in enumerate(archives.SPLITS):
        expected, dataset = make_phantom(6, 32, seed), sets[split]
        assert isinstance(dataset.images, np.memmap) and dataset.num_channels == 1
        assert dataset.class_names == PHANTOM_CLASSES
        assert (dataset.labels[:6] == expected["labels"]).all()
        assert (dataset.images[:6] == expected["images"]).all()
        assert (dataset[5][1] == expected["masks"][5]).all() and dataset[5][0].dtype == np.int16
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("phantom-32-")


# ---- MedMNIST, from a server on loopback ----

class Server(http.server.ThreadingHTTPServer):
    """Serves .replies {path: (status, headers, body)} and remembers the paths asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.asked = {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        status, headers, body = self.server.replies.get(self.path, (404, {}, b"no such file"))
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def archive(server, tmp_path, monkeypatch):
    """The content of tinymnist.npz, a made-up MedMNIST set of size 28 that the server offers."""
    arrays = {}
    for i, split in enumerate(archives.SPLITS):
        arrays[f"{split}_images"] = pixels(5 + i, 28, 28, 3, seed=i)
        arrays[f"{split}_labels"] = pixels(5 + i, 1, high=2, seed=i)
    np.savez_compressed(tmp_path / "original.npz", **arrays)
    content = (tmp_path / "original.npz").read_bytes()
    for path in ("/files/tinymnist.npz?download=1", "/mirror/tinymnist.npz"):
        server.replies[path] = (200, {}, content)
    file = dict(url=f"{server.url}/files/tinymnist.npz?download=1",
                md5=hashlib.md5(content).hexdigest())
    entry = dict(label={"0": "no", "1": "yes"}, files={"28": file})
    monkeypatch.setitem(archives.MEDMNIST, "tinymnist", entry)
    return content


def test_a_download_says_its_size_before_and_the_time_left(load, tmp_path, server, archive,
                                                            capsys):
    load("tinymnist", size=28)
    said = capsys.readouterr().err
    megabytes = f"{len(archive) / 1e6:.1f} MB"
    begin = f"downloading tinymnist.npz, {megabytes}, to {tmp_path}/cache. A smaller --dataset_size"
    assert said.startswith(begin)
    assert re.search(r"tinymnist.npz: 100%.*\d\d:\d\d<\d\d:\d\d", said)
    assert archives.in_words(12_600_000_000) == "12.6 GB"
    assert archives.in_words(0) == "of unknown size"


def test_a_download_that_the_disk_cannot_hold_does_not_begin(load, server, archive, monkeypatch,
                                                             capsys):
    free = SimpleNamespace(free=2 * len(archive) - 1)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda folder: free)
    words = r"has 0.\d MB and is unpacked to more, but .*cache has 0.\d MB free"
    wrong(load, rf"tinymnist.npz.*: {words}", "tinymnist", size=28)
    assert "downloading" not in capsys.readouterr().err


def test_medmnist_is_downloaded_once(load, tmp_path, server, archive):
    for split, n in zip(archives.SPLITS, (5, 6, 7)):
        dataset = load("tinymnist", split, size=28)
        assert len(dataset) == n and dataset.num_channels == 3
        assert dataset.class_names == ["no", "yes"]
        assert (dataset.images == pixels(n, 28, 28, 3, seed=n - 5)).all()
        assert (dataset.labels == pixels(n, 1, high=2, seed=n - 5)[:, 0]).all()
    assert server.asked == ["/files/tinymnist.npz?download=1"]
    # the archive is gone, its arrays are there
    assert os.listdir(tmp_path / "cache") == ["tinymnist_28"]
    wrong(load, "dataset_size=32: tinymnist exists at 28 pixels", "tinymnist", size=32)


def test_medmnist_from_a_mirror(load, server, archive):
    assert len(load("tinymnist", size=28, download_url=f"{server.url}/mirror/")) == 5
    assert server.asked == ["/mirror/tinymnist.npz"]


def test_an_archive_put_there_by_hand_is_used_and_kept(load, tmp_path, server, archive):
    (tmp_path / "cache").mkdir()
    own = tmp_path / "cache" / "tinymnist.npz"
    own.write_bytes(archive[:-1] + b"x")
    wrong(load, r"tinymnist\.npz has MD5 \w{32}, should be \w{32}; remove it", "tinymnist", size=28)
    assert own.exists() and os.listdir(tmp_path / "cache") == ["tinymnist.npz"]
    own.write_bytes(archive)
    assert len(load("tinymnist", size=28)) == 5
    assert server.asked == [] and own.read_bytes() == archive


FAILURES = {
    "another file": ((200, {}, b"something else"),
                     r"MD5 is \w{32}, should be \w{32}: a damaged or another file"),
    "cut connection": ((200, {"Content-Length": 5000}, bytes(3000)),
                       "connection was cut after 3000 of 5000 bytes"),
    "nothing there": ((404, {}, b""), r"cannot be downloaded \(.*Not Found\)"),
    "server in trouble": ((503, {}, b""), "cannot be downloaded"),
}


@pytest.mark.parametrize("reply, message", FAILURES.values(), ids=list(FAILURES))
def test_a_failed_download_says_why_and_leaves_nothing(load, tmp_path, server, archive, reply,
                                                          message):
    path = "/files/tinymnist.npz?download=1"
    good, server.replies[path] = server.replies[path], reply
    advice = "try again, name a mirror with --download_url, or put the file"
    wrong(load, rf"{server.url}/files/tinymnist.npz.*{message}.*{advice}", "tinymnist", size=28)
    assert os.listdir(tmp_path / "cache") == []
    server.replies[path] = good  # and the next attempt starts from nothing
    assert len(load("tinymnist", size=28)) == 5


def test_no_server_listening(load, tmp_path, server, archive):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message = r"tinymnist\.npz: cannot be downloaded \(.*refused.*\); try again"
    wrong(load, rf"127\.0\.0\.1:{port}/{message}", "tinymnist", size=28,
          download_url=f"http://127.0.0.1:{port}")
    assert os.listdir(tmp_path / "cache") == []


def test_medmnist_json_is_complete():
    with open(os.path.join(ROOT, "config", "medmnist.json")) as file:
        sets = json.load(file)
    assert len(sets) == 12
    md5s = []
    for name, entry in sets.items():
        assert set(entry) - {"published"} == {"label", "files"}
        for auc, accuracy in entry.get("published", {}).values():
            assert 0.5 < accuracy <= 1 and 0.5 < auc <= 1
        assert list(entry["files"]) == ["28", "64", "128", "224"]
        assert list(entry["label"]) == [str(i) for i in range(len(entry["label"]))]
        for size, file in entry["files"].items():
            assert re.fullmatch("[0-9a-f]{32}", file["md5"]) and file["url"].startswith("https://")
            assert (name if size == "28" else f"{name}_{size}") + ".npz" in file["url"]
            md5s.append(file["md5"])
    assert len(set(md5s)) == 48


# ---- what a run reads, and when ----

def order(n_images=10, batch=8, micro=1, rank=0, world=1, start=0, stop=10, seed=0, shuffle=True):
    return list(BatchOrder(n_images, batch, micro, rank, world, start, stop, seed, shuffle))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_ranks_and_micro_batches_share_the_same_global_batches(world, micro):
    whole = order()
    parts = [order(micro=micro, rank=rank, world=world) for rank in range(world)]
    for part in parts:
        assert len(part) == 10 * micro
        assert all(len(samples) == 8 // world // micro for samples in part)
    for iteration in range(10):
        joined = []
        for i in range(iteration * micro, (iteration + 1) * micro):
            joined += sum([part[i] for part in parts], [])
        assert joined == whole[iteration]  # in order: rank r has the r-th part of a micro-batch


@pytest.mark.parametrize("n_images, batch", [(10, 4), (10, 8), (3, 8), (1, 4), (64, 8)])
def test_every_image_once_per_epoch(n_images, batch):
    samples = sum(order(n_images, batch, stop=n_images), [])
    assert [n for n, _ in samples] == list(range(n_images * batch))
    epochs = np.array([index for _, index in samples]).reshape(batch, n_images)
    assert (np.sort(epochs, axis=1) == np.arange(n_images)).all()
    if n_images >= 10:
        assert len({tuple(epoch) for epoch in epochs}) == batch  # each in an order of its own
        assert order(n_images, batch, seed=1) != order(n_images, batch)


def test_a_resumed_order_goes_on_where_it_was():
    for start in (1, 4, 9):
        assert order(micro=2, start=start) == order(micro=2)[2 * start :]
    assert len(BatchOrder(10, 8, 2, 0, 1, 4, 10, 0)) == 12


def test_without_shuffle_the_order_is_that_of_the_files():
    assert [index for _, index in sum(order(shuffle=False), [])] == [n % 10 for n in range(80)]


def crop_set(dataset, **settings):
    crop = MultiCrop(16, local_crops_size=8, local_crops_number=3, label_guided_crops_number=1)
    defaults = dict(seed=5, global_batch_size=6, grid=4, mask_settings=dict(sample_probability=0.5))
    return CropDataset(dataset, crop, **{**defaults, **settings})


@pytest.fixture
def images():
    hounsfield = pixels(10, 20, 24, dtype=np.int16, low=-1000, high=2000)
    return Dataset(hounsfield, masks=pixels(10, 20, 24, high=2), name="made up")


def batches(crops, n_images, workers=0, **settings):
    defaults = dict(micro_batches=1, rank=0, world_size=1, start=0, stop=3, seed=5)
    sampler = BatchOrder(n_images, 6, **{**defaults, **settings})
    return list(DataLoader(crops, batch_sampler=sampler, collate_fn=crops.collate,
                           num_workers=workers))


def test_batches_are_view_major(images):
    crops = crop_set(images)
    samples = [crops[n, index] for n, index in order(batch=6)[1]]
    batch = crops.collate(samples)
    assert batch["index"] == [index for _, index in order(batch=6)[1]] and batch["bad"] == []
    assert batch["global_crops"].shape == (12, 1, 16, 16)
    assert batch["local_crops"].shape == (24, 1, 8, 8)
    assert batch["masks"].shape == (12, 16) and batch["masks"].any(dim=1).sum() == 6
    for b, sample in enumerate(samples):
        for views, name in ((2, "global"), (4, "local")):
            for v in range(views):
                assert torch.equal(batch[f"{name}_crops"][v * 6 + b], sample[f"{name}_crops"][v])
                assert batch[f"{name}_seeds"][v * 6 + b] == sample[f"{name}_seeds"][v]


@pytest.mark.parametrize("world_size, micro_batches", [(2, 1), (3, 1), (1, 2), (3, 2)])
def test_batches_of_all_ranks_joined_are_the_batch_of_one(images, world_size, micro_batches):
    crops, split = crop_set(images), dict(world_size=world_size, micro_batches=micro_batches)
    parts = [batches(crops, 10, rank=rank, **split) for rank in range(world_size)]
    for iteration, whole in enumerate(batches(crops, 10)):
        pieces = []
        for i in range(iteration * micro_batches, (iteration + 1) * micro_batches):
            pieces += [part[i] for part in parts]
        for key in ("global_crops", "local_crops", "global_seeds", "local_seeds", "masks"):
            share = 6 // len(pieces)
            views = [piece[key].unflatten(0, (-1, share)) for piece in pieces]
            joined = torch.cat(views, dim=1)  # [V,B,...]
            assert torch.equal(joined.flatten(0, 1), whole[key]), key


def test_workers_change_nothing(images):
    crops = crop_set(images)
    assert_same(batches(crops, 10), batches(crops, 10, workers=2))


def test_crops_depend_on_seed_and_sample_number(images):
    a, b, c = crop_set(images)[7, 2], crop_set(images)[8, 2], crop_set(images, seed=6)[7, 2]
    assert_same(a, crop_set(images)[7, 2])
    for other in (b, c):
        for key in ("global_crops", "local_crops", "global_seeds", "local_seeds"):
            assert not torch.equal(a[key], other[key])
    assert "masks" not in crop_set(images, mask_settings=None).collate([a, b])


@pytest.fixture
def damaged(load, tmp_path):
    """Five files, of which 1 and 2 cannot be read."""
    for i in range(5):
        save(tmp_path / "set" / f"{i}.png", np.full((20, 20), 10 * i, np.uint8))
    for i in (1, 2):
        (tmp_path / "set" / f"{i}.png").write_bytes(b"no png")
    return load(tmp_path / "set")


def test_a_bad_image_is_an_error_that_names_it(damaged):
    (batch,) = batches(crop_set(damaged), 5, stop=1)
    assert list(batch) == ["error"]
    assert re.search(r"[12]\.png: cannot be read as an image", batch["error"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_replaced_by_its_neighbour_and_listed(damaged, workers):
    (batch,) = batches(crop_set(damaged, on_bad_image="skip"), 5, workers, stop=1, shuffle=False)
    assert batch["index"] == [0, 3, 3, 3, 4, 0]
    assert batch["global_crops"][:6].amax(dim=(1, 2, 3)).tolist() == [0, 30, 30, 30, 40, 0]
    names = [re.search(r"(\d\.png): cannot be read", reason)[1] for reason in batch["bad"]]
    assert names == ["1.png", "2.png", "2.png"]


def test_a_folder_of_bad_images_ends(load, tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(3):
        (tmp_path / "set" / f"{i}.png").write_bytes(b"no png")
    wrong(load, r"\d\.png: cannot be read", tmp_path / "set")
    files = ImageFiles(tmp_path / "set", [f"{i}.png" for i in range(3)], 1)
    bad = crop_set(Dataset(files), on_bad_image="skip")
    assert "cannot be read" in bad[0, 0]["error"]


# ---- intensities ----

def test_intensities_of_eight_bit():
    array = pixels(20, 8, 9, 3) // np.array([1, 2, 4], np.uint8)
    value_range, mean, std = measure_intensities(Dataset(array))
    assert value_range == (0.0, 255.0)
    assert mean == pytest.approx(array.mean(axis=(0, 1, 2)) / 255, abs=1e-4)
    assert std == pytest.approx(array.std(axis=(0, 1, 2)) / 255, abs=1e-4)


def test_intensities_of_hounsfield_units():
    array = np.random.default_rng(0).normal(100, 200, (40, 32, 32)).astype(np.int16)
    array[0, 0, :2] = -30000, 30000  # two dead pixels do not decide the range
    (low, high), mean, std = measure_intensities(Dataset(array))
    assert (low, high) == pytest.approx((100 - 2.576 * 200, 100 + 2.576 * 200), abs=25)
    assert low == round(low)
    unit = (array.clip(low, high) - low) / (high - low)
    assert mean == pytest.approx((unit.mean(),), abs=1e-4)
    assert std == pytest.approx((unit.std(),), abs=1e-4)


def test_intensities_of_a_given_range_and_of_floats():
    array = np.random.default_rng(0).uniform(0, 2, (10, 16, 16)).astype(np.float32)
    value_range, mean, std = measure_intensities(Dataset(array), (0.0, 1.0))
    unit = array.clip(0, 1)  # half of the pixels are clipped to 1
    assert value_range == (0.0, 1.0)
    assert mean == pytest.approx((unit.mean(),), abs=1e-4)
    assert std == pytest.approx((unit.std(),), abs=1e-4)
    (low, high), _, _ = measure_intensities(Dataset(array))
    # percentiles 0.5 and 99.5, not rounded to whole numbers
    assert 0.005 < low < 0.015 and 1.985 < high < 1.995


@pytest.mark.parametrize("value", [0, -1000])
def test_intensities_of_nothing_but_air(value):
    (low, high), mean, std = measure_intensities(Dataset(np.full((3, 8, 8), value, np.int16)))
    assert high > low and std[0] > 0 and 0 <= mean[0] <= 1  # nothing is divided by zero


def test_intensities_are_measured_on_a_seeded_sample():
    array = np.arange(100, dtype=np.uint8)[:, None, None].repeat(4, 1)
    a, b, c = (measure_intensities(Dataset(array), n_images=5, seed=seed) for seed in (0, 0, 1))
    assert a == b != c


def test_intensities_name_or_leave_out_bad_images(damaged):
    with pytest.raises(UserError, match=r"1\.png: cannot be read"):
        measure_intensities(damaged)
    _, mean, _ = measure_intensities(damaged, on_bad_image="skip")
    assert mean == pytest.approx((70 / 3 / 255,), abs=1e-4)


WEIGHTS = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


@pytest.mark.parametrize("pretrained, source", [
    ({}, "measured on 5 images"), (WEIGHTS, "of the pretrained weights")])
def test_input_settings_say_where_mean_and_std_come_from(pretrained, source):
    dataset = Dataset(pixels(5, 8, 8, 3))
    _, mean, std = measure_intensities(dataset)
    if pretrained:
        mean, std = pretrained["mean"], pretrained["std"]
    own_mean, own_std = (0.7, 0.7, 0.7), (0.9, 0.9, 0.9)
    cases = [((), (), source), (own_mean, (), f"mean given, std {source}"),
             ((), own_std, f"std given, mean {source}"), (own_mean, own_std, "given")]
    for given_mean, given_std, text in cases:
        inputs, said = input_settings(dataset, pretrained, mean=given_mean, std=given_std)
        assert inputs == dict(intensity_range=(0.0, 255.0), mean=given_mean or mean,
                              std=given_std or std)
        assert said == text


def test_grey_images_get_the_average_of_the_weights_channels():
    inputs, source = input_settings(Dataset(pixels(5, 8, 8)), WEIGHTS, mean=(0.7,))
    assert inputs["mean"] == (0.7,) and inputs["std"] == pytest.approx((0.5,))
    assert source == "mean given, std of the pretrained weights, averaged over their channels"


def test_an_empty_split_of_a_folder_is_said(load, tmp_path):
    save(tmp_path / "set" / "train" / "a.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "set" / "test").mkdir()
    wrong(load, r"has no split 'test'; it has train", tmp_path / "set", "test")
