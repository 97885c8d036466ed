"""Drawn volumes: anatomy changes along the body, slices know their place; and the files that the
readers are tested on hold the pixels that were drawn."""
import hashlib

import numpy as np
import pytest

from data import load_dataset
from phantom import VOLUME_CLASSES, make_phantom_volumes
from volume_files import (AXIAL, COMPRESSED, CORONAL, SAGITTAL, UNCOMPRESSED, skip_without_encoder,
                          slice_position, write_enhanced, write_nifti, write_series)


@pytest.fixture(scope="module")
def bodies():
    """Six bodies of 24 slices, 32 pixels."""
    return make_phantom_volumes(6, 32, 3)


# ---- what is drawn ----

def test_the_same_bytes_on_every_machine():
    images = make_phantom_volumes(2, 32, 0, n_slices=4)["images"]
    assert hashlib.sha256(images.tobytes()).hexdigest().startswith("a23f85e3d3acfee4")


def test_a_body_depends_on_its_seed_and_number_only(bodies):
    again = make_phantom_volumes(2, 32, 3)
    for key in ("images", "masks", "labels", "volume", "position_mm", "groups"):
        assert (again[key] == bodies[key][:48]).all(), key
    other = make_phantom_volumes(1, 32, 4)
    assert (other["images"] != bodies["images"][:24]).mean() > 0.5
    assert set(other["groups"]).isdisjoint(bodies["groups"])
    assert len(make_phantom_volumes(0, 32)["images"]) == 0


def test_types_shapes_and_places(bodies):
    assert bodies["images"].shape == bodies["masks"].shape == (144, 32, 32)
    assert bodies["images"].dtype == np.int16 and bodies["masks"].dtype == np.uint8
    assert -1024 <= bodies["images"].min() and bodies["images"].max() <= 3071
    assert bodies["volume"].dtype == np.int32 and bodies["position_mm"].dtype == np.float32
    assert (bodies["volume"] == np.repeat(np.arange(6), 24)).all()
    assert len(set(bodies["groups"])) == 6 and bodies["groups"].shape == (144,)
    assert bodies["spacing_mm"].shape == (6, 3)
    steps = np.diff(bodies["position_mm"].reshape(6, 24), axis=1)
    assert np.allclose(steps, bodies["spacing_mm"][:, :1], atol=1e-4)
    assert 4 <= bodies["spacing_mm"][:, 0].min() and bodies["spacing_mm"][:, 0].max() <= 6


def test_labels_say_whether_the_slice_shows_a_calcification():
    bodies = make_phantom_volumes(8, 32, 5)
    assert (bodies["labels"] == bodies["masks"].any(axis=(1, 2))).all()
    assert 0.3 < bodies["labels"].mean() < 0.7
    # a calcification goes on in the next slice more often than slices of any two bodies agree
    labels = bodies["labels"].reshape(8, 24)
    assert (labels[:, 1:] == labels[:, :-1]).mean() > 0.7


def test_anatomy_changes_along_the_body_and_not_at_once(bodies):
    """Slices differ more, the further they are apart; and a slice is nearest to its neighbours."""
    x = np.clip(bodies["images"].astype(float), -1000, 500).reshape(6, 24, -1)
    difference = np.abs(x[:, :, None] - x[:, None]).mean(axis=(0, 3))  # [D,D]
    by_distance = [difference.diagonal(k).mean() for k in (1, 2, 4, 8, 16)]
    assert (np.diff(by_distance) > 0).all() and by_distance[-1] > 1.5 * by_distance[0]
    np.fill_diagonal(difference, np.inf)
    assert (np.abs(difference.argmin(axis=1) - np.arange(24)) == 1).all()


def test_the_place_of_a_slice_is_not_trivial(bodies):
    """The lungs end somewhere else in every body: no threshold on air tells the place."""
    x = bodies["images"].reshape(6, 24, -1)
    lung = ((x > -900) & (x < -500)).mean(axis=2)  # [V,D]
    place = np.broadcast_to(np.arange(24), (6, 24))
    assert 0.3 < np.corrcoef(lung.ravel(), place.ravel())[0, 1] < 0.95


# ---- written as hospitals do, and read again ----

SPACING = (4.5, 0.75, 0.5)


@pytest.fixture(scope="module")
def drawn():
    """Two volumes of six slices of 40 pixels, [2,6,40,40]."""
    return make_phantom_volumes(2, 40, 1, n_slices=6)["images"].reshape(2, 6, 40, 40)


def assert_read(folder, drawn, spacing=SPACING):
    """The folder's volumes are the drawn ones: to the pixel, in order, each of its own group."""
    data = load_dataset(str(folder / "data"), cache_dir=str(folder / "cache"))
    found = []
    assert sorted(set(data.volume)) == list(range(len(drawn))) and len(set(data.groups)) == 2
    for number in range(len(drawn)):
        rows = np.flatnonzero(data.volume == number)
        image = np.stack([data[i][0][..., 0] for i in rows])
        assert image.dtype == np.int16 and len(set(data.groups[rows])) == 1
        found += [i for i, volume in enumerate(drawn) if np.array_equal(image, volume)]
        assert np.allclose(np.diff(data.position_mm[rows]), spacing[0], atol=1e-3)
        assert np.allclose(data.spacing_mm[number], spacing, atol=1e-4)
    assert sorted(found) == list(range(len(drawn)))


@pytest.mark.parametrize("syntax", UNCOMPRESSED + COMPRESSED)
@pytest.mark.parametrize("signed, monochrome1, ending", [(False, False, ".dcm"), (True, True, "")])
def test_series_are_read_to_the_pixel(drawn, syntax, signed, monochrome1, ending, tmp_path):
    pytest.importorskip("pydicom")
    skip_without_encoder(syntax)
    for i, volume in enumerate(drawn):
        paths = write_series(f"{tmp_path}/data/{i}", volume, SPACING, patient=f"P{i}",
                             syntax=syntax, signed=signed, intercept=0 if signed else -1024,
                             bits=13, monochrome1=monochrome1, ending=ending)
        assert sorted(paths) != paths  # names do not tell the order
    assert_read(tmp_path, drawn)


@pytest.mark.parametrize("settings", [
    dict(orientation=CORONAL), dict(orientation=SAGITTAL), dict(orientation=(-1, 0, 0, 0, -1, 0)),
    dict(slope=[1, 0.5, 0.25, 1, 0.5, 1]), dict(syntax="implicit", preamble=False)])
def test_series_of_other_planes_slopes_and_old_files(drawn, settings, tmp_path):
    pytest.importorskip("pydicom")
    for i, volume in enumerate(drawn):
        write_series(f"{tmp_path}/data/{i}", volume, SPACING, patient=f"P{i}", **settings)
    assert_read(tmp_path, drawn)


def test_two_series_in_one_folder_are_two_volumes(drawn, tmp_path):
    pytest.importorskip("pydicom")
    for i, volume in enumerate(drawn):
        write_series(f"{tmp_path}/data", volume, SPACING, patient=f"P{i}", ending=f"-{i}")
    assert_read(tmp_path, drawn)


@pytest.mark.parametrize("syntax", ["implicit", "deflated", "rle", "jpeg 2000"])
def test_enhanced_files_are_read_to_the_pixel(drawn, syntax, tmp_path):
    """Frames in random order, slopes that differ by frame."""
    pydicom = pytest.importorskip("pydicom")
    skip_without_encoder(syntax)
    for i, volume in enumerate(drawn):
        path = write_enhanced(f"{tmp_path}/data/{i}.dcm", volume, SPACING, patient=f"P{i}",
                              syntax=syntax, slope=[1, 0.5, 0.25, 1, 0.5, 1])
        groups = pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
        z = [item.PlanePositionSequence[0].ImagePositionPatient[2] for item in groups]
        assert sorted(z) != z
    assert_read(tmp_path, drawn)


@pytest.mark.parametrize("codes, ending, slope", [
    ("LPS", ".nii", None), ("RAS", ".nii", None), ("RAS", ".nii.gz", 0.5), ("PIR", ".nii.gz", None),
    ("SLA", ".nii", 0.5)])
def test_nifti_is_read_to_the_pixel(drawn, codes, ending, slope, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    for i, volume in enumerate(drawn):
        path = write_nifti(f"{tmp_path}/data/{i}{ending}", volume, SPACING, codes, slope,
                           None if slope is None else 100)
        image = nibabel.load(path)  # nibabel by itself: axes to the right, front, head
        assert nibabel.aff2axcodes(image.affine) == tuple(codes)
        canonical = nibabel.as_closest_canonical(image).get_fdata()  # [W,H,D]
        assert (canonical[::-1, ::-1].transpose(2, 1, 0) == volume).all()
    assert_read(tmp_path, drawn)


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, SAGITTAL])
def test_slices_advance_along_the_normal(orientation):
    x, y = np.array(orientation[:3]), np.array(orientation[3:])
    step = slice_position(1, (5, 1, 1), orientation) - slice_position(0, (5, 1, 1), orientation)
    assert (step @ x, step @ y) == (0, 0) and step @ step == 25
    assert np.linalg.det([x, y, step]) > 0


def test_phantom_volumes_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("archives.phantom.make_phantom_volumes",
                        lambda n, size, seed: make_phantom_volumes(n // 10, size, seed, 3))
    sizes = {}
    for split in ("train", "val", "test"):
        data = load_dataset("phantom_volumes", split, 32, str(tmp_path))
        sizes[split] = len(data), len(set(data.groups))
        assert data.class_names == list(VOLUME_CLASSES) and data.masks is not None
        assert np.isfinite(data.position_mm).all() and data.spacing_mm.shape[1] == 3
    assert sizes == dict(train=(12, 4), val=(3, 1), test=(3, 1))
