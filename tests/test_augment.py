"""augment.py against numbers: Pillow's resize, boxes and flips, photometrics against plain loops,
iBOT masks."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import augment
from augment import (PRESETS, MultiCrop, Photometrics, augmentation_values, color_matrix,
                     gaussian_blur, photometric, resize, resize_center, sample_masks, to_unit,
                     uniforms)

NOTHING = dict.fromkeys(PRESETS["rgb"], 0.0)
LUMA = torch.tensor([0.299, 0.587, 0.114])


def picture(*shape, seed=0, dtype=np.uint8):
    """Smooth random pixels [H,W,C]: pure noise shows differences that do not matter."""
    height, width, channels = shape
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, channels)).astype(np.uint8)
    planes = []
    for c in range(channels):
        plane = Image.fromarray(small[..., c]).resize((width, height), Image.BILINEAR)
        planes.append(np.asarray(plane))
    return np.stack(planes, axis=-1).astype(dtype)


def batch(n=16, channels=3, size=16, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def seeds(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(2**63 - 1, size=n))


def preset(monkeypatch, name="rgb", **strengths):
    """Make a preset do nothing but what is named."""
    monkeypatch.setitem(PRESETS, name, dict(NOTHING, **strengths))


def brightest(crops):
    """The largest pixel of every crop, [N]."""
    return crops.amax(dim=(1, 2, 3))


def assert_near(ours, expected, atol):
    torch.testing.assert_close(ours, expected, atol=atol, rtol=0)


# ---- presets ----

@pytest.mark.parametrize("name", list(PRESETS))
def test_augmentation_values_follow_an_edited_preset(monkeypatch, name):
    """They go into a cache's about.json: a cache of other augmentations must not be taken."""
    before = augmentation_values(name)
    assert json.loads(json.dumps(before)) == before == augmentation_values(name)
    for key, value in PRESETS[name].items():
        with monkeypatch.context() as patch:
            patch.setitem(PRESETS, name, dict(PRESETS[name], **{key: value + 0.05}))
            assert augmentation_values(name) != before, key
    with monkeypatch.context() as patch:
        patch.setattr(augment, "BLUR_SIGMA", (0.1, 3.0))
        assert augmentation_values(name) != before
    assert augmentation_values(name) == before


# ---- resize ----

@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("source, target", [
    ((61, 40), (16, 16)), ((20, 31), (48, 48)), ((64, 64), (32, 24)), ((9, 7), (16, 16))])
def test_resize_uint8_agrees_with_pillow(channels, source, target):
    image = picture(*source, channels)
    ours = resize(image, target).numpy().astype(int)
    for c in range(channels):
        pillow = Image.fromarray(image[..., c]).resize(target[::-1], Image.BICUBIC)
        # both round to integers between their two passes
        off = np.abs(ours[c] - np.asarray(pillow).astype(int))
        assert off.max() <= 2 and (off > 1).mean() < 0.01


def test_resize_other_types_agree_with_uint8():
    image = picture(40, 52, 3)
    expected = resize(image, (17, 17)).float()
    for dtype, offset in ((np.int16, -1000), (np.int32, 0), (np.float32, 0), (np.uint16, 0)):
        moved = (image.astype(np.float64) + offset).astype(dtype)
        ours = resize(moved, (17, 17)).float() - offset
        assert (ours.clamp(0, 255) - expected).abs().max() <= 1.01


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype, value", [
    (np.uint8, 200), (np.int16, -1024), (np.int16, 3071), (np.float32, 0.3), (np.uint16, 60000)])
def test_constant_images_stay_constant(dtype, value, channels):
    image = np.full((23, 31, channels), value, dtype)
    for size in ((7, 7), (48, 40)):
        out = resize(image, size)
        assert out.shape == (channels, *size)
        assert out.dtype == (torch.float32 if dtype == np.uint16 else torch.from_numpy(image).dtype)
        rtol = 1e-6 if out.is_floating_point() else 0
        np.testing.assert_allclose(out.numpy(), value, rtol=rtol)


def test_integers_are_clipped_not_wrapped():
    """Bicubic overshoots at an edge: 255 must not become 3, nor the end of int16 its beginning."""
    edge = np.zeros((8, 8, 1))
    edge[:, 4:] = 1
    for dtype in (np.uint8, np.int16):
        info = np.iinfo(dtype)
        image = (edge * (info.max - info.min) + info.min).astype(dtype)
        out = resize(image, (40, 40)).numpy().astype(int)
        assert out.min() == info.min and out.max() == info.max
        in_order = np.sort(out[0], axis=1)
        assert (in_order[:, 20:] >= in_order[:, 19:20]).all()
        assert (out[0, :, :8] < 0.1 * info.max + info.min).all()
        assert (out[0, :, -8:] > 0.9 * info.max).all()


def test_resize_does_not_write_to_the_image():
    image = picture(20, 20, 1)
    image.setflags(write=False)  # as a read-only memory map is
    before = image.copy()
    resize(image, (20, 20)).add_(1)
    assert (image == before).all()


def test_resize_center_takes_the_central_square():
    image = np.zeros((20, 40, 1), np.uint8)
    image[:, 10:30] = 7
    assert (resize_center(image, 10) == 7).all()
    assert (resize_center(image.transpose(1, 0, 2), 10) == 7).all()
    square = picture(16, 16, 3)
    assert (resize_center(square, 16).numpy() == square.transpose(2, 0, 1)).all()


# ---- crops ----

def test_crops_are_a_function_of_the_generator():
    crop = MultiCrop(global_crops_size=16, local_crops_size=8, local_crops_number=3)
    image = picture(30, 40, 3)
    for make in (np.random.default_rng, torch.Generator().manual_seed):
        a, b, c = (crop(image, None, make(seed)) for seed in (5, 5, 6))
        for key in a:
            assert torch.equal(a[key], b[key]) and not torch.equal(a[key], c[key])


def test_crops_of_one_image_differ():
    crop = MultiCrop(global_crops_size=16, local_crops_size=16, local_crops_number=4)
    crops = crop(picture(64, 64, 1), None, np.random.default_rng(0))
    views = torch.cat([crops["global_crops"], crops["local_crops"]])
    assert len({view.numpy().tobytes() for view in views}) == 6
    assert len(set(torch.cat([crops["global_seeds"], crops["local_seeds"]]).tolist())) == 6


@pytest.mark.parametrize("shape", [(400, 400), (300, 500)])
@pytest.mark.parametrize("scale", [(0.1, 0.4), (0.4, 0.7)])
def test_random_boxes_have_the_area_aspect_and_place_asked_for(shape, scale):
    rng = np.random.default_rng(0)
    boxes = [MultiCrop.random_box(shape, scale, rng) for _ in range(2000)]
    top, left, height, width = np.array(boxes).T
    area, aspect = height * width / (shape[0] * shape[1]), width / height
    for start, length, side in ((top, height, shape[0]), (left, width, shape[1])):
        assert start.min() >= 0 and (start + length).max() <= side
    assert scale[0] - 0.01 < area.min() < scale[0] + 0.02
    assert scale[1] - 0.02 < area.max() < scale[1] + 0.01
    assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.35
    # in a wide image the largest boxes do not fit at every aspect and are drawn again
    assert abs(area.mean() - sum(scale) / 2) < (0.015 if shape[0] == shape[1] else 0.04)
    for start, room in ((top, shape[0] - height), (left, shape[1] - width)):
        assert abs((start / np.maximum(room, 1))[room > 20].mean() - 0.5) < 0.05
        # the border is reached, not avoided
        assert (start[room > 20] == 0).any() or room.min() > 20


def test_a_box_that_cannot_fit_becomes_the_largest_central_one():
    # the whole of a 10 x 100 strip at aspect 3/4..4/3 is impossible
    for _ in range(5):
        box = MultiCrop.random_box((10, 100), (1.0, 1.0), np.random.default_rng(0))
        assert box == (0, 43, 10, 13)
        box = MultiCrop.random_box((100, 10), (1.0, 1.0), np.random.default_rng(0))
        assert box == (43, 0, 13, 10)


def test_scale_one_without_flips_is_the_resized_image():
    image = picture(40, 40, 3)
    crop = MultiCrop(24, (1.0, 1.0), 2, 12, (1.0, 1.0), 2, horizontal_flip=0, vertical_flip=0)
    for seed in range(5):
        crops = crop(image, None, np.random.default_rng(seed))
        assert all(torch.equal(view, resize(image, (24, 24))) for view in crops["global_crops"])
        assert all(torch.equal(view, resize(image, (12, 12))) for view in crops["local_crops"])


@pytest.mark.parametrize("shape", [(7, 9), (5, 200), (300, 31), (2, 2), (1, 1)])
@pytest.mark.parametrize("value", [-1024, 3071])
def test_any_image_size_keeps_constant_hounsfield_units(shape, value):
    image = np.full((*shape, 1), value, np.int16)
    crop = MultiCrop(global_crops_size=32, local_crops_size=16)
    crops = crop(image, None, np.random.default_rng(0))
    for key, views, size in (("global_crops", 2, 32), ("local_crops", 8, 16)):
        assert crops[key].shape == (views, 1, size, size) and crops[key].dtype == torch.int16
        assert (crops[key] == value).all()


@pytest.mark.parametrize("horizontal, vertical, axes", [(1, 0, [3]), (0, 1, [2]), (1, 1, [2, 3])])
def test_flips_with_certainty(horizontal, vertical, axes):
    def crops(**flips):
        crop = MultiCrop(16, local_crops_size=8, **flips)
        return crop(picture(40, 30, 3), None, np.random.default_rng(3))

    plain = crops(horizontal_flip=0, vertical_flip=0)
    flipped = crops(horizontal_flip=horizontal, vertical_flip=vertical)
    for key in ("global_crops", "local_crops"):
        assert torch.equal(flipped[key], plain[key].flip(axes))


def test_flips_come_at_their_probability():
    image = picture(16, 16, 1)
    crop = MultiCrop(16, (1.0, 1.0), 1, local_crops_number=0, horizontal_flip=0.3, vertical_flip=0)
    rng, plain = np.random.default_rng(0), resize(image, (16, 16))
    views = [crop(image, None, rng)["global_crops"][0] for _ in range(1000)]
    flipped = np.mean([not torch.equal(view, plain) for view in views])
    assert abs(flipped - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 1000)


@pytest.mark.parametrize("dtype, out", [
    (np.uint8, torch.uint8), (np.int16, torch.int16),
    (np.uint16, torch.float32), (np.float32, torch.float32)])
def test_views_have_the_shape_and_type_of_the_image(dtype, out):
    image = picture(40, 40, 5, dtype=dtype)
    crop = MultiCrop(24, global_crops_number=3, local_crops_size=8, local_crops_number=2,
                     label_guided_crops_number=4)
    crops = crop(image, None, np.random.default_rng(0))
    assert crops["global_crops"].shape == (3, 5, 24, 24) and crops["global_crops"].dtype == out
    assert crops["local_crops"].shape == (6, 5, 8, 8) and crops["local_crops"].dtype == out
    assert crops["global_seeds"].shape == (3,) and crops["local_seeds"].shape == (6,)
    assert crops["local_seeds"].dtype == torch.int64
    none = MultiCrop(24, local_crops_number=0)(image, None, np.random.default_rng(0))
    assert len(none["local_crops"]) == len(none["local_seeds"]) == 0


@pytest.mark.parametrize("shape", [(64, 64), (7, 9), (30, 100)])
@pytest.mark.parametrize("scale", [(0.001, 0.002), (0.02, 0.1), (0.5, 1.0)])
def test_guided_boxes_contain_a_labelled_pixel(shape, scale):
    height, width = shape
    rng, several = np.random.default_rng(0), np.argwhere(np.ones(shape))[::height * width // 5]
    single = []
    for y in (0, height // 2, height - 1):
        single += [np.array([[y, x]]) for x in (0, width // 2, width - 1)]
    for labelled in (*single, several):
        hits = np.zeros(len(labelled), int)
        for _ in range(100):
            top, left, h, w = MultiCrop.guided_box(shape, scale, labelled, rng)
            assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h == w >= 2
            y, x = labelled.T
            inside = (top <= y) & (y < top + h) & (left <= x) & (x < left + w)
            assert inside.any()
            hits += inside
        assert (hits > 0).all()  # every labelled pixel has its turn


@pytest.mark.parametrize("shape", [(64, 64), (9, 7), (30, 100), (200, 61)])
@pytest.mark.parametrize("scale", [(0.001, 0.002), (0.02, 0.1), (0.5, 1.0)])
def test_every_guided_crop_contains_its_labelled_pixel(shape, scale):
    """One labelled pixel, anywhere, borders and corners included, whatever the flips: every guided
    crop shows its mark.

    The mark is the crop of the label itself, resized to more pixels than the box has. So no pixel
    can vanish: half-way between four pixels, bicubic leaves (9/16)^2 of 255, which is 80.
    """
    rng = np.random.default_rng(0)
    crop = MultiCrop(8, local_crops_number=1, local_crops_size=max(shape),
                     label_guided_crops_number=3, label_guided_crops_scale=scale)
    height, width = shape
    corners = [(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1)]
    for y, x in corners + [tuple(rng.integers(shape)) for _ in range(8)]:
        mask = np.zeros(shape, np.uint8)
        mask[y, x] = 3
        guided = crop.of_label(mask[..., None], mask, rng)["local_crops"][1:]
        assert len(guided) == 3 and (brightest(guided) > 75).all()


def test_crops_of_the_label_are_the_crops_of_the_image():
    # the image is its own mask and the crops of either are the same: so the outlines in
    # samples/crops.png lie at their place
    mask = np.zeros((40, 56), np.uint8)
    mask[5:9, 40:50] = 255
    image = mask[..., None]
    crop = MultiCrop(24, local_crops_size=16, local_crops_number=3, label_guided_crops_number=2)
    for seed in range(5):
        crops = crop(image, mask, np.random.default_rng(seed))
        label = crop.of_label(image, mask, np.random.default_rng(seed))
        assert all(torch.equal(crops[key], label[key]) for key in label)
    assert crop.of_label(image, None, np.random.default_rng(0))["local_crops"].max() == 0


def test_guided_classes_choose_among_mask_values():
    mask = np.zeros((64, 64), np.uint8)
    mask[4:8, 4:8], mask[50:54, 50:54] = 1, 2
    image = (mask == 2).astype(np.int16)[..., None] * 1000
    shows = {}
    for classes in ((), (1.0,), (2.0,), (1.0, 2.0), (7.0,)):
        crop = MultiCrop(16, local_crops_number=0, local_crops_size=16,
                         label_guided_crops_number=60, label_guided_crops_scale=(0.02, 0.03),
                         label_guided_classes=classes)
        guided = crop(image, mask, np.random.default_rng(0))["local_crops"]
        shows[classes] = float((brightest(guided) > 400).float().mean())
    assert shows[(2.0,)] == 1 and shows[(1.0,)] == 0 and 0.3 < shows[()] == shows[(1.0, 2.0)] < 0.7
    assert shows[(7.0,)] < 0.2  # nothing is labelled: random crops


def test_every_labelled_pixel_is_as_likely_as_any_other():
    mask = np.zeros((64, 64), np.uint8)
    mask[4:7, 4:7], mask[60, 60] = 1, 1  # nine pixels and one
    crop = MultiCrop(16, local_crops_number=0, local_crops_size=16,
                     label_guided_crops_number=1000, label_guided_crops_scale=(0.02, 0.03))
    image = np.zeros((64, 64, 1), np.int16)
    image[60, 60] = 1000
    guided = crop(image, mask, np.random.default_rng(0))["local_crops"]
    small = (brightest(guided) > 100).float().mean()
    assert abs(float(small) - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 1000)


def test_guided_crops_show_the_label_and_come_last():
    mask = np.zeros((64, 64), np.uint8)
    mask[50, 9] = 1
    image = mask.astype(np.int16)[..., None] * 1000
    crop = MultiCrop(32, local_crops_size=32, local_crops_number=4, local_crops_scale=(0.05, 0.1),
                     label_guided_crops_number=6)
    guided = crop(image, mask, np.random.default_rng(0))["local_crops"][4:]
    assert len(guided) == 6 and (brightest(guided) > 500).all()
    # without labels the same number, from anywhere
    for absent in (None, np.zeros_like(mask)):
        crops = crop(image, absent, np.random.default_rng(0))["local_crops"]
        assert len(crops) == 10 and (brightest(crops[4:]) > 500).sum() < 6


# ---- uniforms, windows ----

def test_uniforms_are_uniform_and_uncorrelated():
    n = 20000
    counters, random_seeds = np.arange(n), np.random.default_rng(0).integers(2**63 - 1, size=n)
    for source in (counters, random_seeds):
        u = np.concatenate([uniforms(source, 11), uniforms(source, 2, stream=1)], axis=1)  # [n,13]
        assert u.shape == (n, 13) and 0 <= u.min() and u.max() < 1
        assert np.abs(u.mean(0) - 0.5).max() < 4.5 * math.sqrt(1 / 12 / n)
        assert np.abs(u.var(0) - 1 / 12).max() < 0.003
        pairs = np.concatenate([u[:-1], u[1:]], axis=1)  # columns, streams, and the next seed's
        correlation = np.corrcoef(pairs.T) - np.eye(26)
        assert np.abs(correlation).max() < 4.5 / math.sqrt(n)


def test_uniforms_depend_on_seed_and_column_only():
    source = seeds(50)
    assert (uniforms(source, 5) == uniforms(source, 11)[:, :5]).all()
    assert (uniforms(source[7:9], 11) == uniforms(source.numpy(), 11)[7:9]).all()
    assert not (uniforms(source, 5) == uniforms(source, 5, stream=1)).any()


def test_to_unit_windows():
    crops = torch.tensor([-1024, -160, 40, 240, 3071], dtype=torch.int16).view(1, 1, 1, 5)
    assert to_unit(crops, (-160, 240)).flatten().tolist() == [0, 0, 0.5, 1, 1]
    crops = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    assert to_unit(crops, (0, 255)).flatten().tolist() == pytest.approx([0, 0.2, 1])


def test_window_jitter_moves_both_ends_by_its_share():
    n, low, high, jitter = 4000, -100.0, 300.0, 0.1
    two_points = torch.tensor([60.0, 140.0])  # inside of every window
    crops = two_points.view(1, 1, 1, 2).repeat(n, 1, 1, 1)
    a, b = to_unit(crops, (low, high), seeds(n), jitter)[:, 0, 0].double().T
    width = 80 / (b - a)  # two points of a line give back both its ends
    start, end = 60 - a * width, 60 + (1 - a) * width
    for found, nominal in ((start, low), (end, high)):
        moved = (found - nominal) / (high - low)
        assert moved.abs().max() <= jitter + 1e-4 and abs(moved.mean()) < 0.005
        assert moved.std() == pytest.approx(jitter / math.sqrt(3), rel=0.05)
    assert abs(np.corrcoef(start, end)[0, 1]) < 0.08
    part = to_unit(crops[5:9], (low, high), seeds(n)[5:9], jitter)
    assert torch.equal(part, to_unit(crops, (low, high), seeds(n), jitter)[5:9])


# ---- photometrics ----

@pytest.mark.parametrize("channels", [1, 3, 5])
def test_nothing_happens_at_probability_zero(monkeypatch, channels):
    preset(monkeypatch)
    x = batch(channels=channels)
    for kind in augment.KINDS:
        assert_near(photometric(x, "rgb", seeds(16), kind, (0, 0, 0)), x, atol=2e-6)
    eight_bit = (x * 255).byte()
    out = photometric(eight_bit, "rgb", seeds(16), "local", (0, 0, 0))
    assert_near(out, eight_bit / 255, atol=2e-6)


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_result_is_in_range_changed_and_leaves_its_input_alone(name, channels):
    x = batch(64, channels)
    before = x.clone()
    for kind in augment.KINDS:
        out = photometric(x, name, seeds(64), kind)
        assert out.shape == x.shape and out.dtype == torch.float32
        assert out.min() >= 0 and out.max() <= 1
        changed = (brightest((out - x).abs()) > 1e-3).float().mean()
        assert changed > 0.7 and torch.equal(x, before)


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_crop_looks_the_same_in_any_batch(name):
    x, own, rows = batch(24), seeds(24), torch.tensor([20, 3, 11])
    for kind in augment.KINDS:
        full = photometric(x, name, own, kind, (0.5, 0.5, 0.5))
        part = photometric(x[rows], name, own[rows], kind, (0.5, 0.5, 0.5))
        assert_near(part, full[rows], atol=1e-6)


def test_photometric_takes_numpy_and_torch_generators():
    x = batch()
    for make in (np.random.default_rng, torch.Generator().manual_seed):
        a, b, c = (photometric(x, "rgb", make(seed), "global1") for seed in (1, 1, 2))
        assert torch.equal(a, b) and brightest((a - c).abs()).min() > 1e-3
    assert photometric(x[:0], "rgb", np.random.default_rng(0), "local").shape == (0, 3, 16, 16)
    with pytest.raises(ValueError, match="preset='x-ray'.*rgb, medical"):
        photometric(x, "x-ray", seeds(16), "local")
    with pytest.raises(ValueError, match="kind='global3'.*global1, global2, local"):
        photometric(x, "rgb", seeds(16), "global3")


def test_medical_brightness_keeps_order_and_relations(monkeypatch):
    """Inverted or recoloured CT means nothing: one number multiplies every pixel of a crop."""
    monkeypatch.setitem(PRESETS, "medical", dict(PRESETS["medical"], noise_probability=0.0))
    x = 0.1 + 0.6 * batch(500, 3, 8)  # times 1.4 at most: below 1, nothing is clipped
    for kind in augment.KINDS:
        factor = photometric(x, "medical", seeds(500), kind, (0, 0, 0)) / x
        assert_near(factor, factor[:, :1, :1, :1].expand_as(factor), atol=1e-5)
        factor = factor[:, 0, 0, 0]
        changed = (factor - 1).abs() > 1e-6
        assert 0.6 - 1e-5 <= factor.min() < 0.65 and 1.35 < factor.max() <= 1.4 + 1e-5
        assert abs(changed.float().mean() - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 500)
        assert abs(factor[changed].mean() - 1) < 4 * 0.4 / math.sqrt(3 * 400)


def test_solarize_is_for_the_second_global_crop(monkeypatch):
    preset(monkeypatch, solarize_probability=1.0)
    x = batch()
    expected = dict(global1=x, global2=torch.where(x >= 0.5, 1 - x, x), local=x)
    for kind, result in expected.items():
        assert_near(photometric(x, "rgb", seeds(16), kind, (0, 0, 0)), result, atol=2e-6)
    preset(monkeypatch, solarize_probability=0.2)
    out = photometric(batch(1000, 3, 4), "rgb", seeds(1000), "global2", (0, 0, 0))
    solarized = brightest(out) < 0.5 + 1e-5
    assert abs(solarized.float().mean() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 1000)


def test_grayscale_makes_equal_channels(monkeypatch):
    preset(monkeypatch, grayscale_probability=1.0)
    x = batch()
    out = photometric(x, "rgb", seeds(16), "local", (0, 0, 0))
    luma = torch.einsum("nchw,c->nhw", x, LUMA)
    assert_near(out, luma[:, None].expand_as(out), atol=2e-6)
    five = batch(channels=5)  # what has no colour has no grey
    assert_near(photometric(five, "rgb", seeds(16), "local", (0, 0, 0)), five, atol=2e-6)


def apply_matrix(x, **strengths):
    """color_matrix applied, with everything that is not named left at 0."""
    zero = np.zeros(len(x))
    unchanged = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), zero)
    matrix, offset = color_matrix(x, zero > 0, **{**unchanged, **strengths})
    return torch.einsum("nij,njhw->nihw", matrix, x) + offset[:, :, None, None]


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_color_matrix_is_brightness_contrast_saturation_in_turn(channels):
    x, rng = batch(8, channels), np.random.default_rng(0)
    b, c, s = rng.uniform(-0.9, 0.9, (3, 8))
    weights = LUMA if channels == 3 else torch.full((channels,), 1 / channels)
    ours = apply_matrix(x, brightness=b, contrast=c, saturation=s)
    for i in range(8):
        y = x[i] * (1 + b[i])
        mean_gray = torch.einsum("chw,c->hw", y, weights).mean()
        y = mean_gray + (y - mean_gray) * (1 + c[i])
        if channels == 3:
            gray = torch.einsum("chw,c->hw", y, weights)
            y = gray + (y - gray) * (1 + s[i])
        assert_near(ours[i], y.to(torch.float32), atol=2e-5)


def test_hue_turns_around_the_grey_axis():
    x = batch(8)
    luma = torch.einsum("nchw,c->nhw", x, LUMA)[:, None]
    full, half, quarter = (np.full(8, turn) for turn in (1.0, 0.5, 0.25))
    assert_near(apply_matrix(x, hue=full), x, atol=1e-4)
    opposite = 2 * luma - x  # as bright, the complementary colour
    assert_near(apply_matrix(x, hue=half), opposite, atol=1e-4)
    twice = apply_matrix(apply_matrix(x, hue=quarter), hue=quarter)
    assert_near(twice, opposite, atol=1e-4)
    turned = apply_matrix(x, hue=np.linspace(-0.1, 0.1, 8))
    assert_near(torch.einsum("nchw,c->nhw", turned, LUMA)[:, None], luma, atol=1e-4)
    grey = luma.expand_as(x)
    assert_near(apply_matrix(grey, hue=np.linspace(-0.5, 0.5, 8)), grey, atol=1e-4)


def plain_blur(image, sigma, radius):
    """[H,W] blurred by the definition: the weighted mean of the neighbours, the image mirrored at
    its border."""
    height, width = image.shape
    padded, out = np.pad(image, radius, mode="reflect"), np.zeros(image.shape)
    total = 0.0
    for i in range(2 * radius + 1):
        for j in range(2 * radius + 1):
            squared = (i - radius) ** 2 + (j - radius) ** 2
            weight = math.exp(-squared / (2 * sigma**2))
            out += weight * padded[i:i + height, j:j + width]
            total += weight
    return out / total


def test_blur_is_the_direct_convolution():
    x, sigma = batch(3, 2, 13)[:, :, :, :9], torch.tensor([0.4, 1.0, 2.0])
    ours = gaussian_blur(x, sigma)
    for n in range(3):
        for c in range(2):
            expected = plain_blur(x[n, c].double().numpy(), float(sigma[n]), 6)
            np.testing.assert_allclose(ours[n, c], expected, atol=1e-5)


def test_blur_keeps_constants_and_tiny_crops():
    constant = torch.full((2, 3, 20, 20), 0.37)
    assert_near(gaussian_blur(constant, torch.tensor([0.1, 2.0])), constant, atol=1e-6)
    smaller_than_the_kernel = gaussian_blur(batch(2, 1, 3), torch.tensor([1.0, 2.0]))
    assert smaller_than_the_kernel.shape == (2, 1, 3, 3)
    untouched = batch(1, 1, 12)
    assert_near(gaussian_blur(untouched, torch.tensor([0.1])), untouched, atol=1e-6)


@pytest.mark.parametrize("probabilities", [(1.0, 0.1, 0.5), (0.0, 0.9, 0.5)])
def test_blur_comes_at_its_probability(monkeypatch, probabilities):
    preset(monkeypatch)
    # the smallest sigmas change too little to be counted
    monkeypatch.setattr(augment, "BLUR_SIGMA", (1.5, 2.0))
    n = 1000
    x = batch(n, 1, 32)
    for kind, p in zip(augment.KINDS, probabilities):
        out = photometric(x, "rgb", seeds(n, seed=4), kind, probabilities)
        blurred = float((brightest((out - x).abs()) > 0.01).float().mean())
        assert abs(blurred - p) <= 4 * math.sqrt(p * (1 - p) / n)


def test_noise_has_its_strength(monkeypatch):
    preset(monkeypatch, "medical", noise_probability=0.5, noise=0.05)
    grey = torch.full((400, 2, 32, 32), 0.5)
    out = photometric(grey, "medical", seeds(400), "local", (0, 0, 0)) - 0.5
    std = out.flatten(1).std(dim=1)
    noisy = std > 1e-6
    assert abs(noisy.float().mean() - 0.5) < 4 * math.sqrt(0.25 / 400)
    std = std[noisy]  # sigma is uniform in 0..0.05
    assert std.max() < 0.05 * 1.1 and std.min() < 0.005
    assert std.mean() == pytest.approx(0.025, rel=0.15)
    mean = out[noisy].flatten(1).mean(dim=1) / std  # in units of the standard error: 1 / sqrt(2048)
    assert mean.abs().max() < 5 / math.sqrt(2048)
    unit = (out[noisy] / std[:, None, None, None]).flatten(1)
    overlap = (unit @ unit.T / 2048).fill_diagonal_(0)  # no two crops share their noise
    assert overlap.abs().max() < 5.5 / math.sqrt(2048)
    first, second = unit.view(-1, 2, 1024).unbind(dim=1)
    assert (first * second).mean(dim=1).abs().max() < 5 / math.sqrt(1024)  # nor two channels


def test_photometrics_knows_its_numbers():
    pixels = torch.tensor([[-1000, 0], [500, 1000]], dtype=torch.int16)
    crops = pixels.view(1, 1, 2, 2).repeat(1, 2, 1, 1)
    settings = dict(preset="medical", intensity_range=(-1000.0, 1000.0), mean=(0.25, 0.5),
                    std=(0.5, 0.25))
    out = Photometrics(**settings).plain(crops)
    # (0, .5, .75, 1) - .25 over .5
    assert out[0, 0].flatten().tolist() == pytest.approx([-0.5, 0.5, 1.0, 1.5])
    assert out[0, 1].flatten().tolist() == pytest.approx([-2.0, 0.0, 1.0, 2.0])
    own = seeds(4)
    crops = (batch(4, 2) * 2000 - 1000).round().to(torch.int16)
    pipeline = Photometrics(**settings, window_jitter=0.1, blur_probability=(1, 1, 1))
    unit = to_unit(crops, (-1000, 1000), own, 0.1)
    by_hand = photometric(unit, "medical", own, "global2", (1, 1, 1))
    torch.testing.assert_close(pipeline(crops, own, "global2"), pipeline.normalize(by_hand))


# ---- iBOT masks ----

GRIDS = [14, (12, 16), 7]


def n_patches(grid):
    return math.prod(np.broadcast_to(grid, 2))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("n, probability", [(64, 0.5), (10, 0.33), (7, 1.0), (5, 0.0)])
@pytest.mark.parametrize("exact", [False, True])
def test_masks_have_their_number_and_range(grid, n, probability, exact):
    patches = n_patches(grid)
    masks = sample_masks(n, grid, np.random.default_rng(1), probability, (0.1, 0.5), exact=exact)
    assert masks.shape == (n, patches) and masks.dtype == torch.bool
    n_masked = int(n * probability)
    counts = np.sort(masks.sum(dim=1).numpy())
    empty, masked = np.split(counts, [n - n_masked])
    assert (empty == 0).all() and (masked > 0).all()
    upper = (patches * np.linspace(0.1, 0.5, n_masked + 1)[1:]).astype(int)
    assert (masked <= upper).all()
    if exact:
        assert (masked == upper).all()


def test_masks_cover_the_range_evenly():
    masks = sample_masks(400, 14, np.random.default_rng(0), 0.5, (0.1, 0.5))
    share = np.sort(masks.float().mean(dim=1).numpy())[200:]
    # they may fall short of the bin if no rectangle fits, never by much
    short = np.linspace(0.1, 0.5, 401)[1::2] - share
    assert short.max() < 0.12 and abs(short.mean()) < 0.01


def test_masks_are_blocks():
    """Not salt and pepper: of the masked patches, most right-hand neighbours are masked too."""
    masks = sample_masks(200, 14, np.random.default_rng(0), 1.0, (0.1, 0.5))
    masks = masks.view(200, 14, 14).float()
    both, one = (masks[:, :, 1:] * masks[:, :, :-1]).sum(), masks[:, :, :-1].sum()
    assert both / one > 0.6 > 2 * masks.mean()


def test_every_row_has_its_share_of_masks():
    rng = np.random.default_rng(0)
    taken = np.mean([sample_masks(8, 7, rng, 0.5).any(dim=1).numpy() for _ in range(500)], axis=0)
    assert np.abs(taken - 0.5).max() < 4 * math.sqrt(0.25 / 500)


@pytest.mark.parametrize("exact", [False, True])
def test_rows_are_those_of_the_whole_batch(exact):
    def masks(rows=None):
        rng = np.random.default_rng(5)
        return sample_masks(24, 10, rng, 0.5, (0.1, 0.5), exact=exact, rows=rows)

    rows = [3, 4, 17, 22]
    part, whole = masks(rows), masks()
    assert torch.equal(part[rows], whole[rows]) and whole.any(dim=1).sum() == 12
    assert not part[[i for i in range(24) if i not in rows]].any()


def test_masks_are_reproducible():
    for make in (np.random.default_rng, torch.Generator().manual_seed):
        a, b, c = (sample_masks(32, 14, make(seed)) for seed in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("grid", [1, 2, 3, (1, 8), (8, 1)])
@pytest.mark.parametrize("exact", [False, True])
def test_tiny_grids_do_not_hang(grid, exact):
    shares = np.linspace(0.3, 1.0, 9)[1:]
    for seed in range(20):
        masks = sample_masks(8, grid, np.random.default_rng(seed), 1.0, (0.3, 1.0), exact=exact)
        if exact:
            counts = sorted(masks.sum(dim=1).tolist())
            assert counts == [int(n_patches(grid) * share) for share in shares]
