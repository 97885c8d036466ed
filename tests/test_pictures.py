"""pictures.py against numbers: t-SNE against scikit-learn's, PCA against an SVD; of drawings the
pixels and the texts."""
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw

import pictures
from augment import Photometrics
from pictures import (FRAMES, GREY, INK, MARGIN, PALETTE, affinities, class_color,
                      confusion_picture, contact_sheet, curves_picture, loss_label, mix, nice_ticks,
                      pca_map, save_samples, scatter_picture, to_picture, tsne_map, write)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)  # [H,W,3]


def rgb(color):
    return np.array(ImageColor.getrgb(color) if isinstance(color, str) else color)


def places(image, color, tolerance=0):
    """Rows and columns of the pixels of a colour: ([n], [n])."""
    return np.nonzero((np.abs(image - rgb(color)) <= tolerance).all(axis=-1))


def blobs(n_each=50, n_classes=4, width=20, distance=8.0):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(n_classes), n_each)
    centers = distance * rng.normal(size=(n_classes, width))
    return (rng.normal(size=(len(labels), width)) + centers[labels]).astype(np.float32), labels


# ---- maps ----

def reference_affinities(x, perplexity):
    """The paper's equation 1 and section 3.1, a row at a time in fp64."""
    squared = ((x[:, None] - x[None]) ** 2).sum(axis=-1)
    P = np.zeros_like(squared)
    for i in range(len(x)):
        d = np.delete(squared[i], i)
        low, high = 1e-6, 1e6
        for _ in range(100):
            beta = math.sqrt(low * high)
            p = np.exp(-(d - d.min()) * beta)
            p /= p.sum()
            entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
            if entropy > math.log(perplexity):
                low = beta
            else:
                high = beta
        P[i] = np.insert(p, i, 0)
    return (P + P.T) / (2 * len(x))


def divergence(P, y):
    """KL(P || Q), equations 2 and 4."""
    kernel = 1 / (1 + ((y[:, None] - y[None]) ** 2).sum(axis=-1))
    np.fill_diagonal(kernel, 0)
    Q = kernel / kernel.sum()
    return (P[P > 0] * np.log(P[P > 0] / Q[P > 0])).sum()


def test_affinities_equal_the_definition():
    x, _ = blobs(n_each=15)
    x = x.astype(np.float64)
    squared = torch.from_numpy(((x[:, None] - x[None]) ** 2).sum(axis=-1)).float()
    P = affinities(squared, 12.0).numpy()
    np.testing.assert_allclose(P, reference_affinities(x, 12.0), rtol=1e-3, atol=1e-8)
    assert abs(P.sum() - 1) < 1e-5 and (np.diag(P) == 0).all()


@pytest.mark.parametrize("data", ["blobs", "noise"])
def test_tsne_is_as_good_as_sklearns(data):
    manifold = pytest.importorskip("sklearn.manifold")
    x = np.random.default_rng(1).normal(size=(150, 10)).astype(np.float32)
    if data == "blobs":
        x, _ = blobs(n_classes=3)
    P = reference_affinities(x.astype(np.float64), 30)
    reference = manifold.TSNE(method="exact", init="pca", perplexity=30, max_iter=500,
                              random_state=0)
    theirs = divergence(P, reference.fit_transform(x).astype(np.float64))
    ours = divergence(P, tsne_map(x, perplexity=30).numpy().astype(np.float64))
    assert ours < 1.1 * theirs


def test_tsne_ends_where_the_gradient_of_the_divergence_vanishes():
    x, _ = blobs(n_each=10, distance=1.0)
    # 13 = (40 - 1) / 3, the cap of the perplexity
    P = torch.from_numpy(reference_affinities(x.astype(np.float64), 13))
    y = tsne_map(x, perplexity=30, n_iterations=1000).double().requires_grad_()
    difference = y[:, None] - y[None]
    kernel = 1 / (1 + (difference ** 2).sum(dim=-1)) * (1 - torch.eye(40))
    off = ~torch.eye(40, dtype=torch.bool)
    Q = kernel / kernel.sum()
    (P[off] * (P[off] / Q[off]).log()).sum().backward()
    pull = 4 * ((P * kernel)[..., None] * difference).sum(dim=1).norm()  # the attracting half alone
    assert y.grad.norm() < 1e-3 * pull


def test_tsne_keeps_separate_blobs_apart_and_repeats_itself():
    x, labels = blobs()
    y = tsne_map(x)
    assert y.dtype == torch.float32 and y.shape == (200, 2)
    distance = torch.cdist(y, y).fill_diagonal_(math.inf)
    labels = torch.from_numpy(labels)
    votes = labels[distance.topk(5, largest=False).indices]  # [N,5]
    assert (votes.mode(dim=1).values == labels).float().mean() > 0.95
    assert torch.equal(y, tsne_map(x))


ODD = [torch.randn(1, 5), torch.randn(2, 1), torch.randn(3, 8), torch.randn(4, 3),
       torch.randn(7, 384), torch.randn(9, 1), torch.ones(20, 4)]


@pytest.mark.parametrize("features", ODD, ids=lambda x: "x".join(map(str, x.shape)))
def test_maps_of_odd_input_are_finite(features):
    for points in (pca_map(features), tsne_map(features, n_iterations=100)):
        assert points.shape == (len(features), 2) and points.isfinite().all()


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_pca_map_is_the_svd_with_a_fixed_sign(shape):
    x = np.random.default_rng(0).normal(size=shape) * np.linspace(3, 1, shape[1]) + 5
    left, singular, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    expected = left[:, :2] * singular[:2]
    expected *= np.sign(expected[np.abs(expected).argmax(axis=0), [0, 1]])
    points = pca_map(x).numpy()
    np.testing.assert_allclose(points, expected, atol=1e-3)
    np.testing.assert_allclose(pca_map(-x).numpy(), expected, atol=1e-3)  # whatever the sign


# ---- images ----

def test_to_picture_maps_the_range_and_keeps_the_aspect():
    hounsfield = np.array([[-1000, -160, 40, 240, 3000]], dtype=np.int16)
    values = np.asarray(to_picture(hounsfield, (-160, 240)))
    assert values[0, :, 0].tolist() == [0, 0, 128, 255, 255] and values.shape == (1, 5, 3)
    square = np.asarray(to_picture(np.full((20, 40, 1), 255, np.uint8), side=80))
    assert square.shape == (80, 80, 3)
    assert (square[:20] == 0).all() and (square[20:60] == 255).all() and (square[60:] == 0).all()


def test_to_picture_takes_any_channel_count():
    image = np.random.default_rng(0).random((6, 6, 5)).astype(np.float32)
    expected = (image * 255).round().astype(np.uint8)
    for channels, shown in ((1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])):
        assert (np.asarray(to_picture(image[..., :channels], (0, 1))) == expected[..., shown]).all()
    image[0, 0] = np.nan
    assert np.asarray(to_picture(image, (0, 1)))[0, 0].tolist() == [0, 0, 0]


def test_contact_sheet_frames_where_asked(tmp_path):
    tile = Image.new("RGB", (10, 10), (7, 7, 7))
    rows = [[(tile, "query\nsecond line", None), (tile, "a", "green"), (tile, "b", "red")],
            [(tile, "the only one of a row of its own", "red")]]
    contact_sheet(tmp_path / "sheet.png", rows, "title", side=60, columns=("query", "1st", "2nd"))
    image = pixels(tmp_path / "sheet.png")
    tops, lefts = (np.unique(values) for values in places(image, (7, 7, 7)))
    assert len(tops) == 2 * 60 and len(lefts) == 3 * 60  # three columns and two rows of images
    left = [lefts[0], lefts[60], lefts[120]]
    for x, y, color in ((left[0], tops[0], None), (left[1], tops[0], "green"),
                        (left[2], tops[0], "red"), (left[0], tops[60], "red")):
        ys, xs = [y - 3, y + 62, y + 30, y + 30], [x + 30, x + 30, x - 3, x + 62]
        expected = rgb(FRAMES[color]) if color else 255
        assert (image[ys, xs] == expected).all(), (x, y)  # above, below, left, right
    _, green = places(image, FRAMES["green"])
    assert set(green) <= set(range(left[1] - 5, left[1] + 65))


def test_contact_sheet_has_a_bar_of_heat_where_asked(tmp_path):
    tile = Image.new("RGB", (8, 8), "white")
    plain, scaled = tmp_path / "plain.png", tmp_path / "scaled.png"
    pictures.contact_sheet(plain, [[(tile, "a", None)]], "t", 300)
    pictures.contact_sheet(scaled, [[(tile, "a", None)]], "t", 300, scale=("0", "1", "heat"))
    assert pixels(scaled).shape[0] == pixels(plain).shape[0] + 34
    for value in (0.25, 1):  # within a step of the bar
        color = pictures.heat_colors(value)
        near = np.abs(pixels(scaled) - color).max(axis=2) <= 3
        assert 12 <= near.sum() <= 60
        assert np.abs(pixels(plain) - color).max(axis=2).min() > 3


def test_heat_colours_grow_in_lightness():
    colors = pictures.heat_colors(np.linspace(0, 1, 101)).astype(float)
    assert colors.shape == (101, 3)
    assert (np.diff(colors @ (0.299, 0.587, 0.114)) > 0).all()


def test_overlay_shows_the_picture_where_there_is_no_heat():
    picture = Image.new("RGB", (30, 20), (200, 200, 200))
    heat = np.zeros((2, 3))
    heat[0, 0] = 1
    result = np.asarray(pictures.overlay(picture, heat, 60)).astype(int)
    # 60 x 40 in the middle, black around it
    assert (result[:10] == 0).all() and (result[50:] == 0).all()
    assert np.abs(result[35:50, 45:] - 140).max() <= 2  # dimmed: colour means heat
    corner = result[10, 0]
    assert np.abs(corner - (0.25 * 140 + 0.75 * pictures.heat_colors(1.0))).max() < 2
    assert corner[0] > 200 > 160 > corner[2]


def test_outline_runs_just_outside_of_the_mask():
    mask = np.zeros((4, 8), np.uint8)
    mask[1:3, 2:4] = 2
    result = np.asarray(pictures.outline(Image.new("RGB", (16, 16)), mask, "red"))
    # placed like an 8 x 4 image on a square: 4 pixels of black above; 2 pixels each
    expected = np.zeros((16, 16), bool)
    expected[[5, 10], 4:8] = expected[6:10, 3] = expected[6:10, 8] = True
    assert ((result == (255, 0, 0)).all(axis=2) == expected).all()
    assert result[~expected].max() == 0
    full = pictures.outline(Image.new("RGB", (4, 4)), np.ones((4, 4)))
    assert full.getcolors() == [(16, (0, 0, 0))]


def test_feature_colours_leave_out_the_background_and_join_equal_parts():
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(3, 12)) + 6  # two kinds of tissue, and paper
    kinds = np.full((2, 6, 6), 2)
    kinds[0, 2:4, 1:5], kinds[0, 2:4, 3:5], kinds[1, 1:5, 2:4] = 0, 1, 0
    parts[2] -= 12
    features = parts[kinds.reshape(2, 36)] + 0.1 * rng.normal(size=(2, 36, 12))
    features = torch.from_numpy(features).float()
    rim = np.pad(np.zeros((4, 4), bool), 1, constant_values=True).ravel()
    for sign in (-1, 1):
        colors = pictures.feature_colors(sign * features, rim).reshape(2, 6, 6, 3)
        assert ((colors.max(axis=3) > 0) == (kinds < 2)).all()
    first, second = colors[kinds == 0], colors[kinds == 1]
    assert np.abs(first.mean(axis=0) - second.mean(axis=0)).max() > 0.5
    one, other = colors[0, 2:4, 1:3].mean(axis=(0, 1)), colors[1, 1:5, 2:4].mean(axis=(0, 1))
    assert np.abs(one - other)[0] < 0.2


def test_captions_stay_in_their_column(tmp_path):
    """Long captions of the neighbours do not reach the middle of an empty cell."""
    tile = Image.new("L", (8, 8))
    rows = [[(tile, "W" * 60 + "\n" + "M" * 60, None), (tile, "", None), (tile, "W" * 60, None)]]
    contact_sheet(tmp_path / "sheet.png", rows, "t", side=60)
    image = pixels(tmp_path / "sheet.png")
    bottom, middle = places(image, "black")[0].max(), MARGIN + 84 + 30
    assert (image[bottom + 1:, middle - 30:middle + 30] == 255).all()
    assert (image[bottom + 1:, :middle - 40] < 255).any()


def test_seven_images_of_a_scanner(tmp_path):
    images = np.random.default_rng(0).integers(-1000, 2000, (7, 16, 12)).astype(np.int16)
    row = [(to_picture(image, (-160, 240)), str(i), None) for i, image in enumerate(images)]
    title = "A title that is too long for a small sheet is set smaller, then cut" * 3
    contact_sheet(tmp_path / "ct.png", [row], title)
    panels = [("t-SNE", tsne_map(images.reshape(7, -1)))]
    scatter_picture(tmp_path / "map.png", panels, [0] * 7, ["head"], "seven")
    assert len(np.unique(pixels(tmp_path / "ct.png"))) > 100
    assert len(places(pixels(tmp_path / "map.png"), PALETTE[0])[0]) > 7 * 50


def test_text_is_shrunk_then_cut_and_has_no_boxes():
    draw = ImageDraw.Draw(Image.new("RGB", (400, 40)))
    full = write(draw, (0, 0), "pneumothorax", 14)
    smaller = write(draw, (0, 0), "pneumothorax", 14, full - 5)
    assert full * 0.75 < smaller <= full - 5  # smaller letters, none is missing
    assert write(draw, (0, 0), "pneumothorax", 14, full / 2) <= full / 2
    for text, plain in (("Ödème", "Odeme"), ("漢", "?")):
        assert write(draw, (0, 0), text, 14) == write(draw, (0, 0), plain, 14)


# ---- samples ----

def test_save_samples_draws_the_crops_and_the_masks(tmp_path):
    pipeline = Photometrics("medical", (0.0, 1.0), (0.5,), (0.25,))
    masks = torch.zeros(4, 16, dtype=torch.bool)
    masks[0, 3] = masks[2, :5] = masks[3, 15] = True
    crops = dict(masks=masks)
    crops["global"] = pipeline.normalize(torch.full((4, 1, 16, 16), 0.6))
    crops["local"] = pipeline.normalize(torch.full((6, 1, 8, 8), 0.2))
    save_samples(tmp_path / "a.png", crops, 2, pipeline)
    image = pixels(tmp_path / "a.png")
    # two rows of 2 global, 2 masked, 3 local crops
    assert image.shape == (14 + 2 * 116 + 4, 7 * 116 + 4, 3)

    def count(color):
        return (image == color).all(axis=2).sum()
    assert count((255, 140, 0)) == 7 * 28 * 28  # seven masked patches in a grid of 4 x 4
    assert count((153, 153, 153)) == 8 * 112 * 112 - 7 * 28 * 28
    assert count((51, 51, 51)) >= 6 * 112 * 112  # titles may have such pixels, too
    assert (image[20:130, 10:110] == 153).all()  # the first tile is a plain global crop
    # masked 1 of image 1 hides patch 3, at the top right; view-major, so row 2 is view 2 of image 1
    tile = image[18:18 + 112, 4 + 2 * 116:][:, :112]
    assert (tile[:28, 84:] == (255, 140, 0)).all() and (tile[28:] == 153).all()


def test_save_samples_outlines_the_label(tmp_path):
    pipeline = Photometrics("medical", (0.0, 1.0), (0.5,), (0.25,))
    crops = dict(masks=None)
    crops["global"] = pipeline.normalize(torch.full((2, 1, 16, 16), 0.6))
    crops["local"] = pipeline.normalize(torch.full((3, 1, 8, 8), 0.6))
    labels = dict(global_crops=torch.zeros(2, 1, 16, 16), local_crops=torch.zeros(3, 1, 8, 8))
    labels["global_crops"][0, 0, 4:8, 4:8] = 255  # 28 pixels of the tile
    labels["local_crops"][2, 0, 0:2, 0:2] = 255
    save_samples(tmp_path / "a.png", crops, 1, pipeline, labels=labels, n_guided=1)
    cyan = (pixels(tmp_path / "a.png") == (0, 229, 255)).all(axis=2)
    tiles = [int(cyan[18:130, 4 + 116 * i:][:, :112].sum()) for i in range(5)]
    # just outside of the label; what is outside of the tile is cut off
    assert tiles == [4 * 28, 0, 0, 0, 2 * 28]


def test_save_samples_without_masks_or_local_crops(tmp_path):
    pipeline = Photometrics("rgb", (0.0, 255.0), (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
    crops = dict(local=None, masks=None)
    images = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    crops["global"] = pipeline.normalize(images)
    save_samples(tmp_path / "a.png", crops, 10, pipeline, max_images=4)
    assert Image.open(tmp_path / "a.png").size == (2 * 116 + 4, 14 + 4 * 116 + 4)


# ---- confusion matrix ----

def test_confusion_shades_follow_the_share_of_the_row(tmp_path):
    confusion = [[60, 30, 10], [0, 0, 0], [5, 0, 5]]
    confusion_picture(tmp_path / "c.png", confusion, ["a", "b", "c"], "t")
    image = pixels(tmp_path / "c.png")
    for label, row in enumerate(confusion):
        for prediction, count in enumerate(row):
            if count:
                color = pictures.CORRECT if label == prediction else pictures.WRONG
                found = places(image, mix(color, count / sum(row)))
                assert len(found[0]) > 1000, (label, prediction)
    cells = ((pictures.CORRECT, 0.6), (pictures.WRONG, 0.3), (pictures.WRONG, 0.1))
    found = [places(image, mix(color, share)) for color, share in cells]
    left = [columns.min() for _, columns in found]
    assert left[0] < left[1] < left[2]  # predictions from left to right
    assert len({rows.min() for rows, _ in found}) == 1  # a class in one row
    brightness = [rgb(mix(pictures.WRONG, share)).sum() for share in (0, 0.1, 0.3, 1)]
    assert brightness == sorted(brightness, reverse=True) and brightness[0] == 765


def written(monkeypatch, width=0.0):
    """A list that collects (xy, text) of everything that is written, in place of writing."""
    texts = []

    def write_nothing(draw, xy, text, *rest, **more):
        texts.append((xy, text))
        return width
    monkeypatch.setattr(pictures, "write", write_nothing)
    return texts


def test_confusion_writes_recall_and_precision(tmp_path, monkeypatch):
    texts = written(monkeypatch)
    confusion = [[30, 10, 0], [0, 0, 0], [30, 30, 0]]
    confusion_picture(tmp_path / "c.png", confusion, ["a", "b", "c"], "t")
    shares = [(*xy, text) for xy, text in texts if text.endswith("%") or text == "-"]
    last_column, last_row = max(x for x, _, _ in shares), max(y for _, y, _ in shares)
    recall = [text for x, y, text in shares if x == last_column and y < last_row]
    assert recall == ["75.0 %", "-", "0.0 %"]
    precision_and_accuracy = [text for _, y, text in shares if y == last_row]
    assert precision_and_accuracy == ["50.0 %", "0.0 %", "-", "30.0 %"]
    texts = [text for _, text in texts]
    assert texts.count("30") == 3 and "n = 60" in texts


@pytest.mark.parametrize("n", [2, 7, 14])
def test_confusion_of_many_classes_with_long_names_fits(n, tmp_path):
    names = [f"class_{i}_with_a_name_that_no_column_is_wide_enough_for" for i in range(n)]
    counts = np.random.default_rng(0).integers(0, 12345, (n, n))
    counts[1] = 0
    confusion_picture(tmp_path / "c.png", counts, names, "t")
    image = pixels(tmp_path / "c.png")
    assert 500 < image.shape[1] <= 1600
    # nothing in the margins
    assert (image[:, :MARGIN - 6] == 255).all() and (image[:, -MARGIN + 4:] == 255).all()


# ---- scatter ----

def test_scatter_puts_dots_in_the_colour_of_the_class_at_their_place(tmp_path):
    points = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0], [4.0, 3.0]])
    panels = [("one", points), ("two", points[::-1])]
    scatter_picture(tmp_path / "s.png", panels, [0, 1, 3, 1], list("abcd"), "t")
    image = pixels(tmp_path / "s.png")
    is_rule = (image == rgb(pictures.RULE)).all(axis=-1)
    frames = np.nonzero(is_rule.sum(axis=0) > 200)[0]  # the panels' upright lines
    assert len(frames) == 4
    center = {}
    for panel in (0, 1):
        inside = image[:, frames[2 * panel]:frames[2 * panel + 1]]
        for c in (0, 1, 3):
            rows, columns = places(inside, class_color(c))
            center[panel, c] = columns.mean(), rows.mean()
        assert len(places(inside, class_color(2))[0]) == 0
    (x, y), (x3, y3), (x1, y1) = center[0, 0], center[0, 3], center[0, 1]
    assert abs(x - x3) < 1 and y > y3  # point 2 lies above point 0
    assert abs(x1 - x - (y - y3) * 4 / 3) < 1.5  # one scale for both axes
    assert abs(y1 - (y + y3) / 2) < 1  # class 1 has a dot on either height
    x_two, y_two = center[1, 0]
    assert x_two > x + 100 and abs(y_two - y3) < 1  # the other way in panel two


def test_scatter_legend_leaves_out_empty_classes_and_wraps_colours(tmp_path, monkeypatch):
    assert len({class_color(i) for i in range(30)}) == 30 and class_color(30) == class_color(0)
    texts = written(monkeypatch)
    labels = torch.tensor([0] * 1200 + [2] * 3 + [11])
    names = [f"c{i}" for i in range(12)]
    scatter_picture(tmp_path / "s.png", [("one", torch.rand(1204, 2))], labels, names, "t")
    texts = [text for _, text in texts]
    assert texts == ["t", "one", "c0", "1,200", "c2", "3", "c11", "1"]
    assert len(places(pixels(tmp_path / "s.png"), class_color(11), 2)[0]) > 20


# ---- curves ----

def log(n=30):
    """Like a run's log.jsonl: k-NN accuracy falls below its start, iBOT and Gram are off."""
    records = [dict(iteration=0, knn_accuracy=0.8)]
    for i in range(1, n + 1):
        records.append(dict(iteration=10 * i, loss=8 - i / n, dino_local_loss=6.0,
                            dino_global_loss=2 - i / n, ibot_loss=0.0, koleo_loss=-0.5,
                            gram_loss=0.0, lr=5e-5 * i / n, grad_norm=1.0))
        if i % 10 == 0:
            records[-1].update(knn_accuracy=0.8 - 0.1 * i / n, rankme=20.0 + i,
                               teacher_entropy=5.0, prototype_use=1.0)
    return records


def test_curves_show_the_start_as_a_dashed_line_above_the_fall(tmp_path):
    records = []
    for record in log():
        if "knn_accuracy" in record:
            records.append({key: record[key] for key in ("iteration", "knn_accuracy")})
    curves_picture(tmp_path / "c.png", records, "t")
    image = pixels(tmp_path / "c.png")
    rows, columns = places(image, PALETTE[0])
    grey = (np.abs(image - rgb(GREY)) < 30).all(axis=-1)
    left, right = columns.min(), columns.max()
    first_row, last_row = rows[columns == left].mean(), rows[columns == right].mean()
    assert last_row > first_row + 100  # the fall fills the panel
    top = round(first_row) - 1
    line = grey[top:top + 3, left + 12:right].any(axis=0)
    assert 0.3 < line.mean() < 0.9  # dashes and gaps
    assert 20 < np.abs(np.diff(line.astype(int))).sum()


def test_curves_leave_out_what_has_no_data(tmp_path, monkeypatch):
    def texts(records):
        with monkeypatch.context() as patch:
            found = written(patch, width=50.0)
            curves_picture(tmp_path / "c.png", records, "t")
        return [text for _, text in found]

    all_texts = texts(log())
    for text in ("Loss", "total", "DINO local", "KoLeo", "k-NN accuracy", "RankMe",
                 "Teacher entropy", "Learning rate", "start 0.800 (dashed), best 0.800, last 0.700",
                 "last 50", "in units of 1e-06"):
        assert text in all_texts, text
    assert "iBOT" not in all_texts and "Gram" not in all_texts
    only_start = texts(log()[:1])
    assert "k-NN accuracy" in only_start
    assert "Loss" not in only_start and "RankMe" not in only_start
    assert "nan" not in " ".join(only_start + texts([dict(iteration=5, loss=math.nan, rankme=3.0)]))
    assert "Loss" not in texts([dict(iteration=5, loss=math.nan, rankme=3.0)])


def test_a_new_loss_gets_its_curve_without_an_edit(tmp_path, monkeypatch):
    """Every field that ends in _loss is drawn, behind those with a fixed order and colour."""
    names = ["dino_local_loss", "dino_global_loss", "ibot_loss", "koleo_loss", "gram_loss"]
    names += ["rotation_loss", "label_guided_loss"]
    records = []
    for i in range(1, 30):
        values = {name: 1.0 + k + i / 30 for k, name in enumerate(names)}
        records.append(dict(iteration=i, loss=12 - i / 30, **values, lossless=1.0, off_loss=0.0))
    with monkeypatch.context() as patch:
        texts = written(patch)
        curves_picture(tmp_path / "c.png", records, "t")
    labels = ["total", "DINO global", "DINO local", "iBOT", "KoLeo", "Gram", "rotation",
              "label guided"]
    assert [text for _, text in texts][-len(labels):] == labels
    for (x, _), text in texts[-len(labels):]:  # the legend stays in its panel
        assert x + pictures.font(12).getlength(text) <= MARGIN + 460 + 10, text
    curves_picture(tmp_path / "c.png", records, "t")
    image = pixels(tmp_path / "c.png")
    heights = []  # of the curves, whose values rise in the order of `names`
    for name in ("dino_local", "dino_global", "ibot", "koleo", "gram", "rotation", "label_guided"):
        index = labels.index(loss_label(f"{name}_loss")) - 1
        rows, _ = places(image, class_color(index))
        assert len(rows) > 200, name
        heights.append(np.median(rows))
    assert heights == sorted(heights, reverse=True)
    assert len(places(image, INK)[0]) > 200  # the total


@pytest.mark.parametrize("field, label", [
    ("loss", "total"), ("dino_global_loss", "DINO global"), ("ibot_loss", "iBOT"),
    ("feature_cls_loss", "feature CLS"), ("rotation_loss", "rotation")])
def test_loss_labels_are_made_from_the_name(field, label):
    assert loss_label(field) == label


@pytest.mark.parametrize("records", [[], log()[:1], log()[:2], log(400)],
                         ids=["none", "start", "two", "long"])
def test_curves_of_any_length(records, tmp_path):
    curves_picture(tmp_path / "c.png", records, "t")
    assert pixels(tmp_path / "c.png").shape[1] <= 1600


@pytest.mark.parametrize("low, high, expected", [
    (0, 100, ["0", "20", "40", "60", "80", "100"]),
    (0.66, 0.76, ["0.66", "0.68", "0.70", "0.72", "0.74", "0.76"]),
    (-1.2, 11.5, ["0.0", "2.5", "5.0", "7.5", "10.0"]),
    (7, 7.003, ["7.0000", "7.0005", "7.0010", "7.0015", "7.0020", "7.0025", "7.0030"])])
def test_nice_ticks(low, high, expected):
    assert [text for _, text in nice_ticks(low, high)] == expected
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, _ in nice_ticks(low, high))
