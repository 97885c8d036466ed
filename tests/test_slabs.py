"""Crops from neighbouring slices (slab_mm), and images and crops without foreground
(min_foreground)."""
import itertools
import shutil
import types

import numpy as np
import pytest
import torch

from augment import MultiCrop, foreground_share
from configurator import UserError
from loader import CropDataset
from phantom import make_phantom_volumes
from positions import slabs_of
from tests_support import assert_same, load_script, losses, run, state


class Slices:
    """A Dataset of slices that show their own number: image i is i everywhere, its mask has one
    pixel more than the mask before. Two volumes, positions out of order, and a plain picture."""
    name = "slices"

    def __init__(self, n=9):
        self.volume = np.array([0] * 5 + [1] * 3 + [-1], np.int32)[:n]
        self.position_mm = np.array([8, 0, 4, 12, 20, 0, 3, np.nan, np.nan], np.float32)[:n]
        self.read = []

    def __len__(self):
        return len(self.position_mm)

    def __getitem__(self, i):
        self.read.append(i)
        mask = np.zeros((32, 32), np.uint8)
        mask[10, :i] = 1
        return np.full((32, 32, 1), 10 * i, np.int16), mask

    def at_least(self, side):
        return self

    def path(self, i):
        return f"slice {i}"

    def without_path(self, text, i):
        return text


def crop_set(dataset, slab_mm=0.0, min_foreground=0.0, background=0.0, **settings):
    crop = MultiCrop(16, local_crops_size=8, local_crops_number=3, label_guided_crops_number=1,
                     min_foreground=min_foreground, background=background)
    return CropDataset(dataset, crop, 0, 4, 2, slab_mm=slab_mm, **settings)


def numbers(sample):
    """The numbers of the slices that a sample's crops show: [V+L]."""
    crops = [*sample["global_crops"], *sample["local_crops"]]
    assert all((crop == crop.flatten()[0]).all() for crop in crops)
    return [int(crop.flatten()[0]) // 10 for crop in crops]


# ---- slabs ----

@pytest.mark.parametrize("slab_mm, expected", [
    (4, [{0, 2, 3}, {1, 2}, {0, 1, 2}, {0, 3}, {4}, {5, 6}, {5, 6}, {7}, {8}]),
    (8, [{0, 1, 2, 3}, {0, 1, 2}, {0, 1, 2, 3}, {0, 2, 3, 4}, {3, 4}, {5, 6}, {5, 6}, {7}, {8}]),
    (100, [{0, 1, 2, 3, 4}] * 5 + [{5, 6}] * 2 + [{7}, {8}])])
def test_a_slab_holds_the_slices_within_its_distance(slab_mm, expected):
    order, first, last = slabs_of(Slices(), slab_mm)
    assert [set(order[a:b].tolist()) for a, b in zip(first, last)] == expected


def test_slabs_are_those_of_a_double_loop():
    rng = np.random.default_rng(0)
    data = Slices()
    data.volume = rng.integers(-1, 4, 60).astype(np.int32)
    data.position_mm = rng.integers(0, 30, 60).astype(np.float32)  # equal positions as well
    data.position_mm[rng.random(60) < 0.1] = np.nan
    order, first, last = slabs_of(data, 5)
    for i in range(60):
        near = {j for j in range(60) if data.volume[j] == data.volume[i] >= 0
                and abs(data.position_mm[j] - data.position_mm[i]) <= 5}
        assert set(order[first[i]:last[i]].tolist()) == (near or {i})


def test_positions_of_a_step_that_float32_cannot_hold():
    data = Slices()
    data.volume = np.zeros(9, np.int32)
    data.position_mm = (np.arange(9) * 0.3).astype(np.float32) + np.float32(1000)
    order, first, last = slabs_of(data, 0.3)
    assert (last - first).tolist() == [2] + [3] * 7 + [2]


@pytest.mark.parametrize("field, value, message", [
    ("volume", None, "has no slices with positions"),
    ("position_mm", np.full(9, np.nan), "has no slices with positions"),
    ("position_mm", 50 * np.arange(9.0), "no slice of slices has another one so near")])
def test_slabs_without_neighbours_are_refused(field, value, message):
    data = Slices()
    setattr(data, field, value)
    with pytest.raises(UserError, match=message):
        crop_set(data, slab_mm=12)


# ---- crops from neighbours ----

def test_the_first_crop_shows_the_image_and_the_others_its_slab():
    data, seen = Slices(), set()
    crops = crop_set(data, slab_mm=8)
    for n in range(60):
        shown = numbers(crops[n, 0])
        assert shown[0] == 0 and len(shown) == 2 + 3 + 1
        seen.update(enumerate(shown))
    assert seen == {(0, 0), *itertools.product(range(1, 6), range(4))}


def test_slices_of_a_slab_are_equally_likely():
    crops = crop_set(Slices(), slab_mm=8)
    counts = np.zeros(9)
    for n in range(300):
        np.add.at(counts, numbers(crops[n, 0])[1:], 1)
    assert counts[4:].sum() == 0 and np.abs(counts[:4] / 1500 - 0.25).max() < 0.05


def test_a_guided_crop_takes_the_mask_of_its_own_slice():
    """Slice i has i labelled pixels in row 10, so slice 0 has none: its guided crop is random."""
    data = Slices()
    crops = crop_set(data, slab_mm=100)
    for n in range(30):
        sample = crops[n, 4]
        shown = numbers(sample)
        data.read.clear()
        label = crops.label_crops([4] * (n + 1))["local_crops"]  # [L*B], of sample n the last
        guided = label[-1]
        assert (guided.max() > 0) == (shown[-1] > 0), shown
        assert data.read[-6:] != []


def test_a_sample_is_the_same_whoever_draws_it():
    a, b = (crop_set(Slices(), slab_mm=8) for _ in range(2))
    a[3, 2]
    assert_same({k: v for k, v in a[7, 1].items()}, {k: v for k, v in b[7, 1].items()})


def test_without_a_slab_nothing_else_is_read_and_crops_are_as_before():
    data = Slices()
    plain = crop_set(data)
    sample = plain[5, 3]
    assert data.read == [3] and set(numbers(sample)) == {3}
    image, mask = data[3]
    crop = MultiCrop(16, local_crops_size=8, local_crops_number=3, label_guided_crops_number=1)
    direct = crop(image, mask, np.random.default_rng((0, 2, 5)))
    assert all(torch.equal(direct[key], sample[key]) for key in direct)


def test_gram_crops_show_the_slices_of_the_global_crops():
    data = Slices()
    crop = MultiCrop(16, local_crops_number=0, gram_crops_size=24)
    sample = CropDataset(data, crop, 0, 4, 2, slab_mm=8)[1, 0]
    assert (sample["gram_crops"].amax((1, 2, 3)) == sample["global_crops"].amax((1, 2, 3))).all()


def test_an_unreadable_neighbour_is_an_error_or_skipped():
    class Broken(Slices):
        def __getitem__(self, i):
            if i == 1:
                raise UserError("slice 1: cannot be read")
            return super().__getitem__(i)
    strict, lenient = crop_set(Broken(), 8), crop_set(Broken(), 8, on_bad_image="skip")
    outcomes = ["error" in strict[n, 0] for n in range(20)]
    assert any(outcomes)
    for n in range(20):
        sample = lenient[n, 0]
        assert "error" not in sample and 1 not in numbers(sample)


# ---- foreground ----

def test_foreground_share():
    image = np.array([[-1000, -100], [-99, 400]], np.int16)[..., None]
    assert foreground_share(image, -100) == 0.5 and foreground_share(image, -2000) == 1


def half_empty(side=64):
    """An image whose left half is air."""
    image = np.full((side, side, 1), -1000, np.int16)
    image[:, side // 2:] = 40
    return image


def test_crops_of_air_are_drawn_anew():
    image, counts = half_empty(), {}
    for least in (0.0, 0.3):
        crop = MultiCrop(16, (0.05, 0.1), 2, 16, (0.01, 0.05), 6, min_foreground=least,
                         background=-160)
        shares = []
        for seed in range(100):
            views, small = crop.plan(image, None, np.random.default_rng(seed), ())
            for _, _, (top, left, height, width), _ in views + small:
                box = image[top:top + height, left:left + width]
                shares.append(foreground_share(box, -160))
        counts[least] = np.mean(np.array(shares) < 0.3)
    assert counts[0.0] > 0.4 and counts[0.3] < 0.005  # eleven boxes of air: 0.45^11


def test_an_empty_image_ends_after_eleven_boxes():
    drawn = []

    class Counting(MultiCrop):
        @staticmethod
        def random_box(shape, scale, rng):
            drawn.append(MultiCrop.random_box(shape, scale, rng))
            return drawn[-1]
    crop = Counting(16, global_crops_number=1, local_crops_number=0, min_foreground=0.5,
                    background=0)
    views, _ = crop.plan(np.zeros((32, 32, 1), np.uint8), None, np.random.default_rng(0), ())
    assert len(drawn) == 11 and views[0][2] == drawn[-1]


def test_guided_crops_are_not_drawn_anew():
    image, mask = half_empty(), np.zeros((64, 64), np.uint8)
    mask[5, 5] = 1
    crop = MultiCrop(16, local_crops_number=0, label_guided_crops_number=3, local_crops_size=8,
                     label_guided_crops_scale=(0.001, 0.002), min_foreground=1.0, background=-160)
    _, guided = crop.plan(image, mask, np.random.default_rng(0), ())
    for _, _, (top, left, height, width), _ in guided:
        assert top <= 5 < top + height and left <= 5 < left + width


def test_images_without_foreground_are_replaced():
    """Slices 0 to 4 show 0 to 40: above 25 are 3 and 4 of volume 0, and all of the others."""
    crops = crop_set(Slices(), min_foreground=0.5, background=25)
    taken = [crops[n, n % 9]["index"] for n in range(180)]
    assert set(taken) == {3, 4, 5, 6, 7, 8}
    assert all(crops[n, 5]["index"] == 5 for n in range(9))
    counts = np.bincount(taken, minlength=9)[3:]
    assert counts.max() < 2 * counts.min()  # the stand-ins are any image, not the next one
    assert crops[4, 0]["index"] == crops[4, 0]["index"]
    empty = crop_set(Slices(), min_foreground=0.5, background=1e4)
    assert empty[0, 0]["index"] in range(9)  # the last of eleven, and no endless search


def test_fixed_views_of_a_stand_in_are_its_own():
    """A cache keeps the teacher's features by (index, view): whatever sample reads them, the crops
    must be the same."""
    crops, seen = crop_set(Slices(), min_foreground=0.5, background=25, fixed_views=2), {}
    for n in range(120):
        sample = crops[n, n % 9]
        key = sample["index"], sample["view"]
        if key in seen:
            assert torch.equal(seen[key]["global_crops"], sample["global_crops"])
        seen[key] = sample


def test_labels_of_crops_follow_the_stand_ins_and_redraws():
    image, mask = half_empty(), np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 1  # the label is the foreground
    crop = MultiCrop(16, (0.05, 0.1), 2, 16, (0.01, 0.05), 3, min_foreground=0.3, background=-160)
    crops = crop(image, mask, np.random.default_rng(3))
    label = crop.of_label(image, mask, np.random.default_rng(3))
    for key in label:
        assert torch.equal((crops[key] > -480), label[key] > 127)


# ---- in a run ----

@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Drawn volumes as dataset_path of a run: an .npz with positions and groups."""
    arrays = {}
    for seed, split in enumerate(("train", "val")):
        for key, value in make_phantom_volumes(3, 32, seed, n_slices=6).items():
            arrays[f"{split}_{key}"] = value
    path = str(tmp_path_factory.mktemp("data") / "volumes.npz")
    np.savez(path, **arrays)
    return f"--dataset_path={path}"


def test_a_run_with_slabs_resumes_bitwise_and_says_what_it_does(volumes, tmp_path):
    keys = [volumes, "--slab_mm=12", "--min_foreground=0.2", "--intensity_range=-160,400",
            "--label_guided_crops_number=1", "--generate_samples=true"]
    whole = losses(run(str(tmp_path / "whole"), *keys, "--max_iterations=4"))
    run(str(tmp_path / "parts"), *keys, "--max_iterations=4", "--saveckp_freq=2")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "last")
    parts = run(str(tmp_path / "parts"), *keys, "--max_iterations=4",
                f"--resume_from={tmp_path}/parts/checkpoints/0000002")
    assert torch.equal(losses(parts), whole)
    assert_same(state(tmp_path / "parts")["student"], state(tmp_path / "whole")["student"])
    said = (tmp_path / "whole" / "logs" / "train.log").read_text()
    assert "crops after the first come from" in said and "less foreground than 20%" in said


def test_a_slab_of_pictures_is_refused(npz, tmp_path):
    with pytest.raises(UserError, match="has no slices with positions"):
        run(str(tmp_path), f"--dataset_path={npz}", "--slab_mm=12")
    with pytest.raises(UserError, match="slab_mm=-1.0: must be in 0"):
        run(str(tmp_path), f"--dataset_path={npz}", "--slab_mm=-1")
    with pytest.raises(UserError, match="min_foreground=1.5: must be in 0..1"):
        run(str(tmp_path), f"--dataset_path={npz}", "--min_foreground=1.5")


def test_distill_has_min_foreground_in_the_key_of_its_cache():
    distill = load_script("distill")
    config = types.SimpleNamespace(**{key: getattr(distill, key) for key in distill.config_keys})
    before = distill.cache_key(config, "medical")
    config.min_foreground = 0.2
    assert distill.cache_key(config, "medical") != before
