"""Drawn volumes: anatomy changes along the body, slices know their place; and the files that the
readers are tested on hold the pixels that were drawn."""
import hashlib
import os

import numpy as np
import pytest

from phantom import make_phantom_volumes
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
    bodies = make_phantom_volumes(12, 32, 5)
    assert (bodies["labels"] == bodies["masks"].any(axis=(1, 2))).all()
    assert 0.3 < bodies["labels"].mean() < 0.7
    # a calcification goes on in the next slice more often than slices of any two bodies agree
    labels = bodies["labels"].reshape(12, 24)
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


# ---- the files that readers are tested on ----

@pytest.mark.parametrize("syntax", UNCOMPRESSED + COMPRESSED)
def test_a_series_holds_what_was_drawn(bodies, syntax, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    skip_without_encoder(syntax)
    volume = bodies["images"][:3]
    paths = write_series(str(tmp_path), volume, syntax=syntax, signed=True, intercept=0, ending="")
    assert sorted(paths) != paths or len(paths) < 3  # names do not tell the order
    for i, path in enumerate(paths):
        ds = pydicom.dcmread(path)
        assert (ds.pixel_array == volume[i]).all()
        assert ds.ImagePositionPatient == [0, 0, 5 * i]


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, SAGITTAL])
def test_slices_advance_along_the_normal(orientation):
    x, y = np.array(orientation[:3]), np.array(orientation[3:])
    step = slice_position(1, (5, 1, 1), orientation) - slice_position(0, (5, 1, 1), orientation)
    assert (step @ x, step @ y) == (0, 0) and step @ step == 25
    assert np.linalg.det([x, y, step]) > 0


def test_enhanced_frames_are_in_random_order(bodies, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    volume = bodies["images"][:5]
    path = write_enhanced(f"{tmp_path}/enhanced.dcm", volume, slope=[1, 1, 1, 1, 1])
    ds = pydicom.dcmread(path)
    groups = ds.PerFrameFunctionalGroupsSequence
    z = np.array([item.PlanePositionSequence[0].ImagePositionPatient[2] for item in groups])
    assert (np.diff(z) < 0).any()
    assert (ds.pixel_array[z.argsort()].astype(int) - 1024 == volume).all()


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "SLA"])
@pytest.mark.parametrize("ending, slope", [(".nii", None), (".nii.gz", 0.5)])
def test_nifti_holds_what_was_drawn(bodies, codes, ending, slope, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    volume = bodies["images"][:4]
    path = write_nifti(os.path.join(tmp_path, f"a{ending}"), volume, (5, 0.7, 0.8), codes, slope,
                       None if slope is None else 100)
    image = nibabel.load(path)
    assert nibabel.aff2axcodes(image.affine) == tuple(codes)
    canonical = nibabel.as_closest_canonical(image)  # [W,H,D], axes to the right, front, head
    assert (canonical.get_fdata()[::-1, ::-1].transpose(2, 1, 0) == volume).all()
    assert np.allclose(canonical.header.get_zooms(), (0.8, 0.7, 5))
