"""layouts.py, folders.py, annotations.py: what names of folders and files, and tables, mean. Every
layout that labs have is written with tiny pictures and read back."""
import io
import json
import os

import numpy as np
import pytest
from PIL import Image

import folders
from configurator import UserError, override
from data import Dataset, check_groups, describe_source, load_dataset
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
    ("COVID/images/{}.png", "COVID/masks/{}.png"), ("images/a/{}.png", "masks/{}.png")])
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


def test_one_mask_is_not_given_to_two_images_of_one_name(layout):
    root = layout("images/a/1.png", "images/a/2.png", "images/b/1.png", "images/b/3.png",
                  "masks/1.png", "masks/2.png", "masks/3.png")
    found = {**content(root), **content(root, "val")}
    assert {name[7:]: mask for name, (_, mask) in found.items()} == {
        "a/1.png": None, "b/1.png": None, "a/2.png": "masks/2.png", "b/3.png": "masks/3.png"}


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


# ---- tables, parquet, one file ----

def table(root, *lines, name="labels.csv", separator=","):
    (root / name).write_text("\n".join(separator.join(line) for line in lines) + "\n")


@pytest.mark.parametrize("header, separator", [
    (("file", "label", "group"), ","), (("Label", "File_Name", "Patient ID"), ";"),
    (("image_id", "patient", "diagnosis"), "\t")])
def test_a_table_gives_labels_and_groups(layout, header, separator):
    root = layout(*(f"images/{i}.png" for i in range(6)))
    cells = [("0.png", "2", "p1"), ("images/1.png", "10", "p1"), ("2", "2", "p2"),
             ("3.png", "10", "p2"), ("4.png", "", "p3"), ("gone.png", "2", "p3")]
    order = {"file": (0, 1, 2), "Label": (1, 0, 2), "image_id": (0, 2, 1)}[header[0]]
    table(root, header, *([row[k] for k in order] for row in cells), separator=separator)
    train, val = load(root), load(root, "val")
    assert train.class_names == ["2", "10"]  # by value, not by letter
    assert not set(train.groups) & set(val.groups)
    found = {}
    for part in (train, val):
        found.update({os.path.basename(part.path(i)): int(part.labels[i])
                      for i in range(len(part))})
    assert found == {"0.png": 0, "1.png": 1, "2.png": 0, "3.png": 1, "4.png": -1, "5.png": -1}
    assert (val.labels >= 0).all() or len(val.labelled()) > 0
    line = describe_source(train)
    assert "1 line(s) name no image, 1 image(s) have no line" in line
    assert "2 label(s) unknown" in line


def test_a_table_gives_splits(layout):
    root = layout(*(f"{i}.png" for i in range(6)))
    rows = [(f"{i}.png", "ab"[i % 2], split) for i, split in enumerate(
        ("train", "Training", "valid", "dev", "testing", ""))]
    table(root, ("file", "label", "split"), *rows, name="metadata.csv")
    assert [len(load(root, split)) for split in ("train", "val", "test")] == [2, 2, 1]
    assert "1 image(s) in no split" in describe_source(load(root))


@pytest.mark.parametrize("lines, message", [
    ([("a", "b"), ("0.png", "x")], "its first line is 'a, b'; needs a column 'file'"),
    ([("file", "label"), ("x.png", "b")], "none of its 1 files is there, like 'x.png'"),
    ([("file", "label"), ("0.png", "b"), ("0.png", "c")], "line 3: '0.png' has two values"),
    ([("file", "split"), ("0.png", "fold 3")], "line 2: split 'fold 3'; use train, val or test"),
    ([("file", "label"), ("0.png",)], "line 2: 1 values for 2 columns"),
    ([("file", "label"), ("same.png", "b")], "line 2: several files are named 'same.png'")])
def test_a_wrong_table_is_one_line(layout, lines, message):
    root = layout("0.png", "a/same.png", "b/same.png")
    table(root, *lines)
    with pytest.raises(UserError, match=message) as error:
        load(root)
    assert "\n" not in str(error.value)


def test_a_table_labels_folders_and_fractions_are_a_regression(layout):
    root = layout("s1/1.png", "s1/2.png", "s2/1.png", "s3/1.png")
    table(root, ("file", "label"), ("s1", "x"), ("s2", "y"), ("s3/1.png", "y"))
    assert load(root).class_names == ["x", "y"]
    table(root, ("file", "label"), ("s1", "0.5"), ("s2", "1.5"), ("s3", "2"))
    dataset = load(root)
    assert dataset.labels is None and "fractions from 0.5 to 2, a regression" in dataset.notes[-1]


def test_parquet_with_pictures(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split, n in (("train", 5), ("validation", 2)):
        images = []
        for i in range(n):
            file = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(file, "PNG")
            images.append(dict(bytes=file.getvalue(), path=f"{i}.png"))
        rows = pa.table(dict(file_name=[f"{i}.png" for i in range(n)], image=pa.array(images),
                             label=[i % 2 for i in range(n)], patient=["Mueller"] * n))
        features = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
        rows = rows.replace_schema_metadata({b"huggingface": json.dumps(features).encode()})
        pa.parquet.write_table(rows, tmp_path / f"set/data/{split}-00000-of-00001.parquet")
    train, val = load(tmp_path / "set"), load(tmp_path / "set", "val")
    assert train.class_names == ["cat", "dog"] and train.labels.tolist() == [0, 1, 0, 1, 0]
    assert [int(train[i][0].max()) for i in range(5)] == [0, 1, 2, 3, 4] and len(val) == 2
    assert len(set(train.groups)) == 1 and written_texts(tmp_path / "set-cache", ["Mueller"]) == []


def written_texts(folder, texts):
    """[(text, path)] of each text that a file, or the name of a file, below a folder contains."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for text in texts:
            if text.encode() in content or text in os.path.relpath(path, folder):
                found.append((text, str(path)))
    return found


def test_one_file_is_a_data_set_of_its_slices(tmp_path):
    volume = np.arange(5 * 20 * 21, dtype=np.int16).reshape(5, 20, 21)
    np.save(tmp_path / "v.npy", volume)
    dataset = load_dataset(str(tmp_path / "v.npy"), cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == 5 and (dataset[3][0][..., 0] == volume[3]).all()
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "a.txt").write_text("x")
    for name, message in (("a.zip", "is an archive; unpack it"), ("a.txt", "is no data set")):
        with pytest.raises(UserError, match=message):
            load_dataset(str(tmp_path / name))


def test_coco_is_said_not_to_be_read(layout):
    root = layout("1.png", "2.png")
    (root / "annotations.json").write_text('{"images": [{"id": 1, "file_name": "1.png"}]}')
    assert "annotations.json looks like COCO and is not read" in describe_source(load(root))


# ---- labels ----

@pytest.mark.parametrize("train, test, names, labels, said", [
    ([110, 20250101, 110], [7], ["7", "110", "20250101"], [1, 2, 1], ""),
    (["none", "mild", "nan"], ["none"], ["mild", "none"], [1, 0, -1], "1 label(s) unknown"),
    (["dog", "cat", ""], ["dog"], ["cat", "dog"], [1, 0, -1], "1 label(s) unknown"),
    ([0.0, 1.0, np.nan], [0.0], ["0", "1"], [0, 1, -1], "1 label(s) unknown"),
    ([0, -1, 3], [3], ["0", "3"], [0, -1, 1], "1 label(s) unknown"),
    ([-1, 1, -1], [1], ["-1", "1"], [0, 1, 0], ""),
    ([True, False, True], [True], ["0", "1"], [1, 0, 1], ""),
    (["10", "2", "-1"], ["2"], ["2", "10"], [1, 0, -1], "1 label(s) unknown"),
    ([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], [[1, 0]], ["0", "1"], [1, 0, 1], "rows with one 1"),
    ([[2], [1], [2]], [[1]], ["1", "2"], [1, 0, 1], "")])
def test_labels_of_any_kind_are_classes_of_all_splits(train, test, names, labels, said):
    raw = dict(train=np.array(train), test=np.array(test), val=None)
    found, class_names, notes = find_classes(raw)
    assert class_names == names and found["val"] is None
    assert found["train"].tolist() == labels and found["train"].dtype == np.int64
    expected = int(np.argmax(test[0])) if isinstance(test[0], list) and len(test[0]) > 1 else None
    assert expected is None or found["test"].tolist() == [expected]
    assert said in " ".join(notes) and bool(said) == bool(notes)


@pytest.mark.parametrize("labels, why", [
    ([0.06, 0.99, 0.5], "fractions from 0.06 to 0.99, a regression target"),
    ([3, 3, 3], "all known labels are '3'"), ([-1, -1], "none is known"),
    ([[0.2, 0.8], [0.1, 3.2]], "2 numbers per image from 0.1 to 3.2 are a regression target"),
    ([[0, 5], [1, 7]], "neither 0 and 1 nor one class per image")])
def test_labels_that_are_no_classes_are_named(labels, why):
    found, names, notes = find_classes(dict(train=np.array(labels)))
    assert found["train"] is None and names == [] and why in notes[0] and "no labels" in notes[0]


def test_names_of_classes():
    def names_of(labels, names):
        found, result, notes = find_classes(dict(train=np.array(labels)), names)
        return found["train"].tolist(), result, len(notes)
    assert names_of([0, 2, 0], ["a", "b", "c"]) == ([0, 2, 0], ["a", "b", "c"], 0)  # b is kept
    assert names_of([1, 2, 3], ["a", "b", "c"]) == ([0, 1, 2], ["a", "b", "c"], 2)  # and is said
    assert names_of([0, 1, 5, 5], ["a", "b"]) == ([0, 1, 2, 2], ["a", "b", "5"], 1)
    assert names_of(["b", "a", "b"], ["b", "a"]) == ([0, 1, 0], ["b", "a"], 0)
    many = np.array([[1, 1, 0], [0, 0, 0], [0, 1, -1]])
    found, names, notes = find_classes(dict(train=many))
    assert found["train"].tolist() == [[1, 1, 0], [0, 0, 0], [-1, -1, -1]] and len(notes) == 1
    with pytest.raises(UserError, match="the labels of the splits differ in kind"):
        find_classes(dict(train=np.arange(3), test=np.array(["a", "b"])))


# ---- groups ----

def test_groups_are_hashes_and_equal_over_splits_and_types():
    a = group_numbers(np.array([3, 5, -1, -1]), "abcd")
    b = group_numbers(np.array(["3", "5 ", "", "nan"]), "abxy")
    c = group_numbers(np.array([[3.0], [5.0]]), "ab")
    assert a[:2].tolist() == b[:2].tolist() == c.tolist() and (a >= 0).all()
    assert len(set(a) | set(b)) == 6  # whose group is unknown is alone


@pytest.mark.parametrize("seed", range(5))
def test_val_is_cut_by_group(seed):
    groups = np.random.default_rng(0).integers(0, 12, 120)
    rest, tenth = cut_tenth(120, seed, groups)
    assert not set(groups[rest]) & set(groups[tenth]) and len(rest) + len(tenth) == 120
    assert 12 <= len(tenth) <= 35
    assert (cut_tenth(120, seed, groups)[1] == tenth).all()
    assert len(cut_tenth(120, seed, np.zeros(120))[1]) == 12  # one group: image by image


def test_groups_of_an_npz(tmp_path):
    images = np.zeros((20, 8, 8), np.uint8)
    for key in ("train_groups", "train_patients", "groups", "patients"):
        np.savez(tmp_path / "s.npz", train_images=images, train_labels=np.arange(20) % 2,
                 **{key: np.repeat(np.arange(5), 4)})
        parts = [load_dataset(str(tmp_path / "s.npz"), split, cache_dir=str(tmp_path / "cache"))
                 for split in ("train", "val")]
        assert [len(np.unique(part.groups)) for part in parts] == [4, 1], key
        assert "val: a tenth of train by group" in describe_source(parts[0])


def test_a_test_patient_who_is_also_in_train_is_refused(layout):
    def dataset(groups, split):
        return Dataset(np.zeros((len(groups), 4, 4), np.uint8), groups=np.array(groups),
                       split=split)
    train, test = dataset([1, 1, 2], "train"), dataset([2, 3, 3, 4], "test")
    with pytest.raises(UserError, match=r"1 of 3 groups \(patients or volumes\) of test are also in"
                                        ".*allow_shared_groups=true"):
        check_groups(train, dict(test=test), allowed=False)
    assert "!!!!" in check_groups(train, dict(test=test), allowed=True)[1]
    assert len(check_groups(train, dict(test=dataset([3], "test")), allowed=False)) == 1


# ---- nothing of a patient is written ----

def test_no_name_and_no_path_of_a_patient_leaves_the_folder(tmp_path):
    """Groups by folders and by a table, an unreadable image, a whole run: neither its folder nor
    the cache contains names, in text or in file names."""
    from tests_support import load_script, run
    root, out = tmp_path / "set", tmp_path / "out"
    for split, patients in (("train", ("MUELLER_ANNA", "SMITH_JOHN")), ("test", ("DOE_JANE",))):
        for patient in patients:
            for name, value in (("benign", 50), ("tumour", 150)):
                for i in range(4):
                    path = root / split / patient / name / f"{patient[:3]}scan{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    noise = np.random.default_rng(i).integers(0, 50, (40, 40))
                    Image.fromarray((noise + value).astype(np.uint8)).save(path)
    (root / "train" / "SMITH_JOHN" / "tumour" / "SMIscan3.png").write_bytes(b"damaged")
    os.utime(root, (1, 1))
    run(str(out), f"--dataset_path={root}", "--group_level=1", "--on_bad_image=skip")
    secrets = ["MUELLER", "ANNA", "SMITH", "JOHN", "DOE_J", "JANE", "MUEscan", "SMIscan", "DOEscan"]
    log = (out / "logs" / "train.log").read_text()
    assert "1 image(s) could not be read" in log and "cannot be read" in log
    assert "2 group(s) in train" in log or "1 group(s) in train" in log
    evaluate = load_script("evaluate")
    sources = override(vars(evaluate), evaluate.config_keys, [
        f"--run={out}", "--bootstrap=10", "--num_workers=0", "--device=cpu",
        f"--cache_dir={out}-cache", "--mixed_precision=no", "--on_bad_image=skip"])
    evaluate.main(sources)
    attention = load_script("attention")
    attention.main(override(vars(attention), attention.config_keys, [
        f"--run={out}", f"--cache_dir={out}-cache", "--n_images=2", "--device=cpu"]))
    assert written_texts(out, secrets) == []
    cache = tmp_path / "out-cache"
    assert not cache.exists() or written_texts(cache, secrets) == []


def test_headers_of_volumes_are_read_once_and_no_name_is_kept(layout, monkeypatch):
    """The list of volumes comes from the cache until a directory changes."""
    root = layout("MUELLER/note.txt", "SMITH/note.txt")
    for number, name in enumerate(("MUELLER/b", "MUELLER/a", "SMITH/c")):
        np.save(root / f"{name}.npy", np.full((5, 20, 20 + number), number, np.uint8))
    clock, calls, real = folders.time.time_ns, [], folders.list_images
    monkeypatch.setattr(folders.time, "time_ns", lambda: clock() + 3600 * 10**9)
    monkeypatch.setattr(folders, "list_images", lambda *args: calls.append(1) or real(*args))

    def values():
        dataset = load(root, group_level=1)
        assert len(set(dataset.groups)) == 2
        return [int(dataset[i][0].max()) for i in range(len(dataset))], dataset.notes
    first = values()
    assert first[0] == [1] * 5 + [0] * 5 + [2] * 5 and values() == first and len(calls) == 1
    load(root, group_level=1, volume_axis=0)
    assert len(calls) == 2  # read in another way
    np.save(root / "SMITH" / "d.npy", np.full((5, 20, 20), 9, np.uint8))
    assert values()[0] == first[0] + [9] * 5 and len(calls) == 3
    assert written_texts(root.parent / "set-cache", ["MUELLER", "SMITH"]) == []


def test_an_npz_of_one_case_has_its_mask(tmp_path):
    (tmp_path / "set").mkdir()
    masks = np.random.default_rng(0).integers(0, 2, (3, 5, 20, 21)).astype(np.uint8)
    for i, mask in enumerate(masks):
        np.savez_compressed(tmp_path / "set" / f"{i}.npz", image=mask.astype(np.int16) * 7,
                            label=mask)
    dataset = load(tmp_path / "set")
    assert len(dataset) == 15 and dataset.volume.tolist() == np.repeat(np.arange(3), 5).tolist()
    for i in range(15):
        image, mask = dataset[i]
        assert (mask == masks[i // 5, i % 5]).all() and (image[..., 0] == mask * 7).all()
