"""The phantom: the same bytes everywhere, Hounsfield units in range, balanced labels, no short cut
to the labels."""
import hashlib

import numpy as np
import pytest

from phantom import PHANTOM_CLASSES, make_phantom


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(120, 64, 7)


def auroc(scores, positive):
    """Probability that a positive scores higher than a negative, ties counted half: by ranks."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n = positive.sum()
    return (rank[positive].sum() - n * (n + 1) / 2) / (n * (~positive).sum())


def test_the_same_bytes_on_every_machine():
    images = make_phantom(12, 64, 0)["images"]
    assert hashlib.sha256(images.tobytes()).hexdigest().startswith("a23b4c8082191952")


def test_a_seed_gives_the_same_images_whatever_their_number(phantom):
    again = make_phantom(9, 64, 7)  # not a multiple of the six classes
    for key, array in again.items():
        assert (array == phantom[key][:9]).all()
    assert len(make_phantom(0, 64, 7)["images"]) == 0


def test_other_seeds_give_other_images(phantom):
    other = make_phantom(12, 64, 8)
    assert (other["images"] != phantom["images"][:12]).mean(axis=(1, 2)).min() > 0.5
    assert len({image.tobytes() for image in phantom["images"]}) == 120


def test_types_and_hounsfield_range(phantom):
    images, masks = phantom["images"], phantom["masks"]
    assert images.shape == masks.shape == (120, 64, 64)
    assert images.dtype == np.int16 and masks.dtype == np.uint8
    assert phantom["labels"].shape == (120,) and phantom["labels"].dtype == np.int64
    assert -1024 <= images.min() and images.max() <= 3071
    # the corners are air, except if an arm or the couch reaches the corner
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert abs(np.median(corners) + 1000) < 30
    soft = ((images > -200) & (images < 200)).mean(axis=(1, 2))
    assert soft.min() > 0.05 and 0.2 < soft.mean() < 0.7  # there is a body in every image
    assert (images.max(axis=(1, 2)) > 300).all()  # and bone


def test_size_is_free():
    for size in (28, 97):
        phantom = make_phantom(6, size, 0)
        assert phantom["images"].shape == phantom["masks"].shape == (6, size, size)
        assert (phantom["images"].max(axis=(1, 2)) > 200).all()


def test_labels_are_balanced_in_every_run_of_six(phantom):
    assert len(PHANTOM_CLASSES) == 6
    runs = phantom["labels"].reshape(-1, 6)
    assert (np.sort(runs, axis=1) == np.arange(6)).all()
    assert len({tuple(run) for run in runs}) > 10  # and in an order of its own


def test_about_half_of_the_slices_have_small_calcifications(phantom):
    masks = phantom["masks"]
    assert set(np.unique(masks)) == {0, 1}
    share = masks.any(axis=(1, 2)).mean()
    assert abs(share - 0.5) < 4 * np.sqrt(0.25 / 120)
    assert 1 <= masks.sum(axis=(1, 2)).max() < 0.02 * 64 * 64
    for label in range(6):  # at every level, else the level would give them away
        assert 0 < masks[phantom["labels"] == label].any(axis=(1, 2)).mean() < 1


def test_calcifications_are_bright_but_not_simply_the_brightest(phantom):
    def patch_max(array):
        return array.reshape(120, 8, 8, 8, 8).max(axis=(2, 4)).ravel()
    brightest, calcified = patch_max(phantom["images"]), patch_max(phantom["masks"]) > 0
    assert 0.6 < auroc(brightest, calcified) < 0.9  # bone and contrast agent are as bright
    assert auroc(-brightest, calcified) == pytest.approx(1 - auroc(brightest, calcified))


def test_raw_pixels_do_not_give_the_level_away(phantom):
    """The nearest neighbour in pixels finds the level better than chance, and far from always."""
    train, test = make_phantom(240, 32, 0), make_phantom(120, 32, 1)
    a, b = (np.clip(split["images"], -1000, 1000) / 1000 for split in (train, test))
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    distance = (a**2).sum(1)[None] - 2 * b @ a.T
    accuracy = (train["labels"][distance.argmin(axis=1)] == test["labels"]).mean()
    assert 1 / 6 + 0.05 < accuracy < 0.7
