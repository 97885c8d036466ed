"""layouts.py, folders.py, annotations.py: what names of folders and files, and tables, mean. Every
layout that labs have is written with tiny pictures and read back."""
import os

import numpy as np
import pytest
from PIL import Image

from configurator import UserError
from data import describe_source, load_dataset
from images import Rows
from labels import cut_tenth, find_classes, folder_words, group_numbers
from layouts import PATIENT


@pytest.fixture
def layout(tmp_path):
    """A function: names of files -> the folder with them. Pictures differ by their number."""
    def write(*names):
        for number, name in enumerate(names):
            path = tmp_path / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".png", ".jpg", ".webp", ".PNG"):
                Image.fromarray(np.full((8, 8), number, np.uint8)).save(path)
            else:
                path.write_text("no picture")
        return tmp_path / "set"
    return write


def load(root, split="train", **settings):
    return load_dataset(str(root), split, cache_dir=f"{root}-cache", **settings)


def content(root, split="train"):
    """{name below the root: (class or None, name of the mask or None)} of a split."""
    dataset, found = load(root, split), {}
    for i in range(len(dataset)):
        label = None if dataset.labels is None else dataset.class_names[dataset.labels[i]]
        mask = None
        if dataset.masks is not None and dataset.masks[i] is not None:
            masks, row = dataset.masks, i
            if isinstance(masks, Rows):
                masks, row = masks.items, masks.indices[i]
            mask = os.path.relpath(masks.path(row), root)
        found[os.path.relpath(dataset.path(i), root)] = label, mask
    return found


# ---- words ----

@pytest.mark.parametrize("name, meaning", [
    ("train", ("train", "")), ("Training", ("train", "")), ("VAL", ("val", "")),
    ("valid", ("val", "")), ("Validation", ("val", "")), ("dev", ("val", "")),
    ("Testing", ("test", "")), ("Images", ("", "images")), ("img", ("", "images")),
    ("JPEGImages", ("", "images")), ("Masks", ("", "masks")), ("labels", ("", "masks")),
    ("ground_truth", ("", "masks")), ("imagesTr", ("train", "images")),
    ("labelsTs", ("test", "masks")), ("train_images", ("train", "images")),
    ("masks-val", ("val", "masks")), ("benign", None), ("no_mask", None), ("trainer", None),
    ("train2", None), ("test_train", None)])
def test_words_in_any_case(name, meaning):
    assert folder_words(name) == meaning


def test_names_of_patients():
    for name in ("PAT000", "patient 7", "Case_12", "sub-control01", "ST1", "TCGA_CS_4941_1996"):
        assert PATIENT.fullmatch(name), name
    for name in ("benign", "grade1", "stage_2", "class 3", "0", "10", "n01440764", "subtle"):
        assert not PATIENT.fullmatch(name), name


# ---- splits and classes ----

@pytest.mark.parametrize("train, val, test", [
    ("train", "val", "test"), ("Train", "valid", "Test"), ("Training", "Validation", "Testing"),
    ("TRAIN", "dev", "testing"), ("wrapper/train", "wrapper/valid", "wrapper/test"),
    ("images/train", "images/val", "images/test"), ("train/images", "val/images", "test/images")])
def test_splits_by_any_spelling(layout, train, val, test):
    root = layout(f"{train}/a/1.png", f"{train}/a/2.png", f"{train}/b/3.png", f"{val}/b/4.png",
                  f"{val}/a/5.png", f"{test}/b/6.png")
    assert content(root) == {f"{train}/a/1.png": ("a", None), f"{train}/a/2.png": ("a", None),
                             f"{train}/b/3.png": ("b", None)}
    assert content(root, "val") == {f"{val}/a/5.png": ("a", None), f"{val}/b/4.png": ("b", None)}
    assert content(root, "test") == {f"{test}/b/6.png": ("b", None)}
    assert "val: a tenth" not in describe_source(load(root))


def test_a_class_folder_may_come_before_the_split(layout):
    root = layout("a/train/1.png", "b/train/2.png", "b/train/3.png", "a/test/4.png")
    assert content(root, "test") == {"a/test/4.png": ("a", None)}
    assert load(root).splits == ["train", "test"]
    # patients of whom some have a folder 'test' are no splits
    assert "val" not in load(layout("c/5.png", "c/6.png")).splits


def test_two_spellings_of_one_split_are_refused(layout):
    with pytest.raises(UserError, match="the folders val and validation have one meaning, val; k"):
        load(layout("train/a/1.png", "val/a/1.png", "validation/a/2.png"))


@pytest.mark.parametrize("files, why", [
    (["JPEGImages/1.png", "JPEGImages/2.png"], ""),
    (["scans1/1.png", "scans1/2.png"], "a single folder is no class"),
    (["a/1.png", "b/2.png", "c/3.png"], "each folder has one image or volume only"),
    (["PAT000/ST1/SE1/1.png", "PAT000/ST1/SE1/2.png", "PAT001/ST1/SE1/1.png"],
     "the folders are named like patients, visits or series"),
    (["a/1.png", "a/2.png", "b/1.png", "3.png"], "some images lie beside the folders")])
def test_folders_that_are_no_classes(layout, files, why):
    dataset = load(layout(*files))
    assert dataset.labels is None and dataset.class_names == [] and len(dataset) == len(files)
    assert (f"no labels: {why}" in describe_source(dataset)) == bool(why)


def test_classes_behind_patients_and_behind_a_single_folder(layout):
    root = layout("all/PAT1/benign/1.png", "all/PAT1/tumour/2.png", "all/PAT2/benign/3.png")
    assert load(root).labels is None and len(set(load(root).groups)) == 2
    train, val = load(root, group_level=2), load(root, "val", group_level=2)
    assert train.class_names == ["benign", "tumour"]
    assert not set(train.groups) & set(val.groups) and len(train) + len(val) == 3


def test_patients_in_class_folders(layout):
    files = []
    for patient in range(8):
        name = ("benign", "tumour")[patient // 4]
        files += [f"{name}/PAT{patient}/{i}.png" for i in range(3)]
    root = layout(*files)
    train, val = load(root), load(root, "val")
    assert train.class_names == ["benign", "tumour"] and len(train) + len(val) == 24
    assert not set(train.groups) & set(val.groups) and len(val) >= 3


def test_numbers_as_names_keep_the_order_of_torchvision_which_is_said(layout):
    root = layout(*(f"{i % 3 if i < 9 else 10}/{i}.png" for i in range(12)))
    dataset = load(root)
    assert dataset.class_names == ["0", "1", "10", "2"]
    assert "4 classes in train: 0 " in describe_source(dataset)


# ---- what is left out is counted ----

def test_system_files_are_left_out_and_counted(layout):
    root = layout("a/1.png", "a/2.png", "b/1.png", "a/._1.png", ".DS_Store", "Thumbs.db",
                  "__MACOSX/a/._1.png", ".ipynb_checkpoints/1.png", "b/@eaDir/1.png",
                  "b/thumbnails/1.png", "notes.txt", "b/scan.webp", "b/x.docx")
    dataset, val = load(root), load(root, "val")
    assert dataset.class_names == ["a", "b"] and len(dataset) + len(val) == 4
    line = describe_source(dataset)
    assert "6 file(s) seen, 4 image(s)" in line and "7 of the system" in line
    assert "1 .docx" in line and "1 .txt" in line and "\n" not in line


def test_links_are_followed_but_not_in_circles(layout, tmp_path):
    root = layout("a/1.png", "a/2.png")
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    for name in ("3.png", "deep/4.png"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "elsewhere" / name)
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "deep" / "again").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "top").symlink_to(root)
    dataset, val = load(root), load(root, "val")
    assert dataset.class_names == ["a", "b"] and len(dataset) + len(val) == 4
    assert "1 linked folder(s) followed" in describe_source(dataset)
    assert "2 link to a folder that it lies in" in describe_source(dataset)


def test_images_in_no_split_and_beside_images_are_counted(layout):
    dataset = load(layout("train/1.png", "other/2.png", "other/3.png"))
    assert len(dataset) == 1 and "2 image(s) in no split" in describe_source(dataset)


def test_everything_left_out_is_said_when_nothing_is_left(layout):
    with pytest.raises(UserError, match=r"no images; .*2 file\(s\) seen.*1 \.docx, 1 \.txt"):
        load(layout("a.txt", "b.docx"))


# ---- masks ----

@pytest.mark.parametrize("images, masks", [
    ("images/{}.png", "masks/{}.png"), ("Images/{}.png", "Masks/{}.png"),
    ("image/{}.jpg", "mask/{}.png"), ("images/{}.png", "labels/{}.png"),
    ("img/{}.png", "Segmentations/{}_seg.png"), ("images/{}.jpg", "masks/{}_segmentation.png"),
    ("{}.png", "masks/{}.png"), ("{}.png", "{}_mask.png"), ("a/{}.png", "a/{}_mask.png"),
    ("{}.jpg", "{}_Segmentation.png"), ("train/images/{}.png", "train/masks/{}.png"),
    ("images/train/{}.png", "masks/train/{}.png"), ("train_images/{}.png", "train_masks/{}.png"),
    ("COVID/images/{}.png", "COVID/masks/{}.png")])
def test_masks_by_any_name(layout, images, masks):
    names = ["scan (1)", "b", "c.d"]
    root = layout(*map(images.format, names), *map(masks.format, names))
    expected = {images.format(name): (None, masks.format(name)) for name in names}
    assert content(root) == expected


def test_masks_of_two_classes(layout):
    """COVID-19 Radiography: CLASS/images and CLASS/masks, with equal names in both classes."""
    expected = {}
    for i in range(6):
        name = ("COVID", "Normal")[i % 2]
        expected[f"{name}/images/{i // 2}.png"] = name, f"{name}/masks/{i // 2}.png"
    root = layout(*expected, *(mask for _, mask in expected.values()))
    assert {**content(root), **content(root, "val")} == expected


def test_several_masks_of_one_image_are_joined_and_others_are_counted(tmp_path):
    """BUSI: `benign (1)_mask.png` and `benign (1)_mask_1.png` of `benign (1).png`."""
    root = tmp_path / "set"
    root.mkdir()
    left, right = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    left[:, :2], right[:, 5:] = 255, 255
    for name, array in (("benign (1)", right + 7), ("benign (1)_mask", left), ("a", left),
                        ("benign (1)_mask_1", right), ("gone_mask", left)):
        Image.fromarray(array).save(root / f"{name}.png")
    dataset = load(root)
    assert len(dataset) == 2 and dataset[0][1] is None  # a.png
    assert (dataset[1][1] == np.maximum(left, right)).all()
    assert "1 mask(s) without an image" in describe_source(dataset)


def test_classes_called_mask_are_classes(layout):
    root = layout("mask/1.png", "mask/2.png", "no_mask/3.png", "no_mask/4.png", "no_mask/1.png")
    names = {label for label, mask in content(root).values()}
    assert names == {"mask", "no_mask"} and load(root).masks is None


def test_boxes_of_yolo_are_no_masks_and_this_is_said(layout):
    dataset = load(layout("images/1.png", "images/2.png", "labels/1.txt", "labels/2.txt"))
    assert dataset.masks is None and len(dataset) == 2
    assert "2 .txt in labels/ (boxes of YOLO are not read" in describe_source(dataset)


def test_nnunet_and_bids(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)

    def write(name, array):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 4.0, 1.0])), path)
    for case in range(2):
        volume = rng.integers(-1000, 1000, (12, 14, 3)).astype(np.int16)
        write(f"nn/imagesTr/case_{case}_0000.nii.gz", volume)
        write(f"nn/labelsTr/case_{case}.nii.gz", (volume > 0).astype(np.uint8))
        for part in ("anat", "func"):
            write(f"bids/sub-{case:02d}/{part}/sub-{case:02d}_{part}.nii.gz", volume)
    write("nn/imagesTs/case_7_0000.nii.gz", np.zeros((12, 14, 3), np.int16))
    train, test = load(tmp_path / "nn"), load(tmp_path / "nn", "test")
    assert len(train) == 6 and len(test) == 3 and test.masks is None and train.labels is None
    for image, mask in (train[i] for i in range(6)):
        assert ((image[..., 0] > 0) == mask).all()
    assert train.volume.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.diff(train.position_mm[:3]).tolist() == [4, 4]
    bids = load(tmp_path / "bids")
    assert bids.labels is None and len(np.unique(bids.groups)) == 2 and len(bids) == 12
    groups = {os.path.relpath(bids.path(i), tmp_path)[5:11]: bids.groups[i] for i in range(12)}
    assert len(groups) == 2 and len(set(groups.values())) == 2
