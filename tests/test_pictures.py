"""pictures.py against numbers: t-SNE against scikit-learn's, PCA against an SVD; drawings: pixels at their place."""
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw

import pictures
from pictures import (FRAMES, GREY, MARGIN, PALETTE, affinities, class_color, confusion_picture, contact_sheet,
                      curves_picture, mix, nice_ticks, pca_map, scatter_picture, to_picture, tsne_map, write)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)                         # [H,W,3]


def rgb(color):
    return np.array(ImageColor.getrgb(color) if isinstance(color, str) else color)


def places(image, color, tolerance=0):
    """Rows and columns of the pixels of a colour: ([n], [n])."""
    return np.nonzero((np.abs(image - rgb(color)) <= tolerance).all(axis=-1))


def blobs(n_each=50, n_classes=4, width=20, distance=8.0):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(n_classes), n_each)
    centres = distance * rng.normal(size=(n_classes, width))
    return (rng.normal(size=(len(labels), width)) + centres[labels]).astype(np.float32), labels


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
            low, high = (beta, high) if entropy > math.log(perplexity) else (low, beta)
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
    x = blobs(n_classes=3)[0] if data == "blobs" else np.random.default_rng(1).normal(size=(150, 10)).astype(np.float32)
    P = reference_affinities(x.astype(np.float64), 30)
    theirs = manifold.TSNE(method="exact", init="pca", perplexity=30, max_iter=500, random_state=0).fit_transform(x)
    ours = tsne_map(x, perplexity=30).numpy()
    assert divergence(P, ours.astype(np.float64)) < 1.1 * divergence(P, theirs.astype(np.float64))


def test_tsne_ends_where_the_gradient_of_the_divergence_vanishes():
    x, _ = blobs(n_each=10, distance=1.0)
    P = torch.from_numpy(reference_affinities(x.astype(np.float64), 13))                   # 13 = (40 - 1) / 3, the cap
    y = tsne_map(x, perplexity=30, n_iterations=1000).double().requires_grad_()
    kernel = 1 / (1 + ((y[:, None] - y[None]) ** 2).sum(dim=-1)) * (1 - torch.eye(40))
    off = ~torch.eye(40, dtype=torch.bool)
    (P[off] * (P[off] / (kernel / kernel.sum())[off]).log()).sum().backward()
    pull = 4 * ((P * kernel)[..., None] * (y[:, None] - y[None])).sum(dim=1).norm()        # the attracting half alone
    assert y.grad.norm() < 1e-3 * pull


def test_tsne_keeps_separate_blobs_apart_and_repeats_itself():
    x, labels = blobs()
    y = tsne_map(x)
    assert y.dtype == torch.float32 and y.shape == (200, 2)
    distance = torch.cdist(y, y).fill_diagonal_(math.inf)
    votes = torch.from_numpy(labels)[distance.topk(5, largest=False).indices]              # [N,5]
    assert (votes.mode(dim=1).values == torch.from_numpy(labels)).float().mean() > 0.95
    assert torch.equal(y, tsne_map(x))


@pytest.mark.parametrize("features", [torch.randn(1, 5), torch.randn(2, 1), torch.randn(3, 8), torch.randn(4, 3),
                                      torch.randn(7, 384), torch.randn(9, 1), torch.ones(20, 4)],
                         ids=lambda features: "x".join(map(str, features.shape)))
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
    np.testing.assert_allclose(pca_map(-x).numpy(), expected, atol=1e-3)                   # whatever the sign


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
    assert len(tops) == 2 * 60 and len(lefts) == 3 * 60       # three columns and two rows of images
    left = [lefts[0], lefts[60], lefts[120]]
    for x, y, color in ((left[0], tops[0], None), (left[1], tops[0], "green"), (left[2], tops[0], "red"),
                        (left[0], tops[60], "red")):
        around = image[[y - 3, y + 62, y + 30, y + 30], [x + 30, x + 30, x - 3, x + 62]]   # above, below, left, right
        assert (around == (rgb(FRAMES[color]) if color else 255)).all(), (x, y)
    assert set(places(image, FRAMES["green"])[1]) <= set(range(left[1] - 5, left[1] + 65))


def test_contact_sheet_has_a_bar_of_heat_where_asked(tmp_path):
    tile = Image.new("RGB", (8, 8), "white")
    plain, scaled = tmp_path / "plain.png", tmp_path / "scaled.png"
    pictures.contact_sheet(plain, [[(tile, "a", None)]], "t", 300)
    pictures.contact_sheet(scaled, [[(tile, "a", None)]], "t", 300, scale=("0", "1", "heat"))
    assert pixels(scaled).shape[0] == pixels(plain).shape[0] + 34
    for value in (0, 0.25, 1):                                                # within a step of the bar
        near = np.abs(pixels(scaled) - pictures.heat_colors(value)).max(axis=2) <= 3
        assert 12 <= near.sum() <= 60 and np.abs(pixels(plain) - pictures.heat_colors(value)).max(axis=2).min() > 3 or value == 0


def test_heat_colours_grow_in_lightness():
    colors = pictures.heat_colors(np.linspace(0, 1, 101)).astype(float)
    assert (np.diff(colors @ (0.299, 0.587, 0.114)) > 0).all() and colors.shape == (101, 3)


def test_overlay_shows_the_picture_where_there_is_no_heat():
    picture = Image.new("RGB", (30, 20), (200, 200, 200))
    heat = np.zeros((2, 3))
    heat[0, 0] = 1
    result = np.asarray(pictures.overlay(picture, heat, 60)).astype(int)
    assert (result[:10] == 0).all() and (result[50:] == 0).all()              # 60 x 40 in the middle, black around it
    assert np.abs(result[35:50, 45:] - 140).max() <= 2                        # dimmed: colour means heat
    corner = result[10, 0]
    assert np.abs(corner - (0.25 * 140 + 0.75 * pictures.heat_colors(1.0))).max() < 2 and corner[0] > 200 > 160 > corner[2]


def test_outline_runs_just_outside_of_the_mask():
    mask = np.zeros((4, 8), np.uint8)
    mask[1:3, 2:4] = 2
    result = np.asarray(pictures.outline(Image.new("RGB", (16, 16)), mask, "red"))
    # placed like an 8 x 4 image on a square: 4 pixels of black above; 2 pixels each
    expected = np.zeros((16, 16), bool)
    expected[[5, 10], 4:8] = expected[6:10, 3] = expected[6:10, 8] = True
    assert ((result == (255, 0, 0)).all(axis=2) == expected).all() and result[~expected].max() == 0
    assert pictures.outline(Image.new("RGB", (4, 4)), np.ones((4, 4))).getcolors() == [(16, (0, 0, 0))]


def test_feature_colours_leave_out_the_background_and_join_equal_parts():
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(3, 12)) + 6                                      # two kinds of tissue, and paper
    kinds = np.full((2, 6, 6), 2)
    kinds[0, 2:4, 1:5], kinds[0, 2:4, 3:5], kinds[1, 1:5, 2:4] = 0, 1, 0
    parts[2] -= 12
    features = torch.from_numpy(parts[kinds.reshape(2, 36)] + 0.1 * rng.normal(size=(2, 36, 12))).float()
    rim = np.pad(np.zeros((4, 4), bool), 1, constant_values=True).ravel()
    colors = pictures.feature_colors(features, rim).reshape(2, 6, 6, 3)
    assert ((colors.max(axis=3) > 0) == (kinds < 2)).all()                    # the same for features of the other sign
    assert ((pictures.feature_colors(-features, rim).reshape(2, 6, 6, 3).max(axis=3) > 0) == (kinds < 2)).all()
    first, second = colors[kinds == 0], colors[kinds == 1]
    assert np.abs(first.mean(axis=0) - second.mean(axis=0)).max() > 0.5
    assert np.abs(colors[0, 2:4, 1:3].mean(axis=(0, 1)) - colors[1, 1:5, 2:4].mean(axis=(0, 1)))[0] < 0.2


def test_captions_stay_in_their_column(tmp_path):
    """Whatever is written under an empty cell's neighbours, nothing reaches the middle of the cell."""
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
    contact_sheet(tmp_path / "ct.png", [row], "A title that is too long for a small sheet is set smaller, then cut" * 3)
    scatter_picture(tmp_path / "map.png", [("t-SNE", tsne_map(images.reshape(7, -1)))], [0] * 7, ["head"], "seven")
    assert len(np.unique(pixels(tmp_path / "ct.png"))) > 100
    assert len(places(pixels(tmp_path / "map.png"), PALETTE[0])[0]) > 7 * 50


def test_text_is_shrunk_then_cut_and_has_no_boxes():
    draw = ImageDraw.Draw(Image.new("RGB", (400, 40)))
    full = write(draw, (0, 0), "pneumothorax", 14)
    assert full * 0.75 < write(draw, (0, 0), "pneumothorax", 14, full - 5) <= full - 5     # smaller letters, all there
    assert write(draw, (0, 0), "pneumothorax", 14, full / 2) <= full / 2
    for text, plain in (("Ödème", "Odeme"), ("漢", "?")):
        assert write(draw, (0, 0), text, 14) == write(draw, (0, 0), plain, 14)


# ---- confusion matrix ----

def test_confusion_shades_follow_the_share_of_the_row(tmp_path):
    confusion = [[60, 30, 10], [0, 0, 0], [5, 0, 5]]
    confusion_picture(tmp_path / "c.png", confusion, ["a", "b", "c"], "t")
    image = pixels(tmp_path / "c.png")
    for truth, row in enumerate(confusion):
        for prediction, count in enumerate(row):
            if count:
                color = mix(pictures.RIGHT if truth == prediction else pictures.WRONG, count / sum(row))
                assert len(places(image, color)[0]) > 1000, (truth, prediction)
    rows = {count: places(image, mix(color, share)) for count, color, share in
            ((60, pictures.RIGHT, 0.6), (30, pictures.WRONG, 0.3), (10, pictures.WRONG, 0.1))}
    left = [rows[count][1].min() for count in (60, 30, 10)]
    assert left[0] < left[1] < left[2]                         # predictions from left to right
    assert len({rows[count][0].min() for count in rows}) == 1  # truth in one row
    brightness = [rgb(mix(pictures.WRONG, share)).sum() for share in (0, 0.1, 0.3, 1)]
    assert brightness == sorted(brightness, reverse=True) and brightness[0] == 765


def test_confusion_writes_recall_and_precision(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(pictures, "write", lambda draw, xy, text, *rest, **more: texts.append((xy, text)) or 0.0)
    confusion_picture(tmp_path / "c.png", [[30, 10, 0], [0, 0, 0], [30, 30, 0]], ["a", "b", "c"], "t")
    shares = [(xy, text) for xy, text in texts if text.endswith("%") or text == "-"]
    right, below = max(xy[0] for xy, _ in shares), max(xy[1] for xy, _ in shares)
    assert [text for xy, text in shares if xy[0] == right and xy[1] < below] == ["75.0 %", "-", "0.0 %"]   # recall
    assert [text for xy, text in shares if xy[1] == below] == ["50.0 %", "0.0 %", "-", "30.0 %"]  # precision, accuracy
    assert [text for _, text in texts].count("30") == 3 and "n = 60" in [text for _, text in texts]


@pytest.mark.parametrize("n", [2, 7, 14])
def test_confusion_of_many_classes_with_long_names_fits(n, tmp_path):
    names = [f"class_{i}_with_a_name_that_no_column_is_wide_enough_for" for i in range(n)]
    counts = np.random.default_rng(0).integers(0, 12345, (n, n))
    counts[1] = 0
    confusion_picture(tmp_path / "c.png", counts, names, "t")
    image = pixels(tmp_path / "c.png")
    assert 500 < image.shape[1] <= 1600
    assert (image[:, :MARGIN - 6] == 255).all() and (image[:, -MARGIN + 4:] == 255).all()  # nothing in the margins


# ---- scatter ----

def test_scatter_puts_dots_in_the_colour_of_the_class_at_their_place(tmp_path):
    points = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0], [4.0, 3.0]])
    scatter_picture(tmp_path / "s.png", [("one", points), ("two", points[::-1])], [0, 1, 3, 1], list("abcd"), "t")
    image = pixels(tmp_path / "s.png")
    frames = np.nonzero((image == rgb(pictures.RULE)).all(axis=-1).sum(axis=0) > 200)[0]   # the panels' upright lines
    assert len(frames) == 4
    centre = {}
    for panel in (0, 1):
        inside = image[:, frames[2 * panel]:frames[2 * panel + 1]]
        for c in (0, 1, 3):
            rows, columns = places(inside, class_color(c))
            centre[panel, c] = columns.mean(), rows.mean()
        assert len(places(inside, class_color(2))[0]) == 0
    (x, y), (x3, y3), (x1, y1) = centre[0, 0], centre[0, 3], centre[0, 1]
    assert abs(x - x3) < 1 and y > y3                          # point 2 lies above point 0
    assert abs(x1 - x - (y - y3) * 4 / 3) < 1.5                # one scale for both axes
    assert abs(y1 - (y + y3) / 2) < 1                          # class 1 has a dot on either height
    assert centre[1, 0][0] > x + 100 and abs(centre[1, 0][1] - y3) < 1                     # the other way in panel two


def test_scatter_legend_leaves_out_empty_classes_and_wraps_colours(tmp_path, monkeypatch):
    assert len({class_color(i) for i in range(30)}) == 30 and class_color(30) == class_color(0)
    texts = []
    monkeypatch.setattr(pictures, "write", lambda draw, xy, text, *rest, **more: texts.append(text) or 0.0)
    labels = torch.tensor([0] * 1200 + [2] * 3 + [11])
    scatter_picture(tmp_path / "s.png", [("one", torch.rand(1204, 2))], labels, [f"c{i}" for i in range(12)], "t")
    assert texts == ["t", "one", "c0", "1,200", "c2", "3", "c11", "1"]
    assert len(places(pixels(tmp_path / "s.png"), class_color(11), 2)[0]) > 20


# ---- curves ----

def log(n=30):
    """Like a run's log.jsonl: k-NN accuracy falls below its start, iBOT and Gram are off."""
    records = [dict(iteration=0, knn_accuracy=0.8)]
    for i in range(1, n + 1):
        records.append(dict(iteration=10 * i, loss=8 - i / n, dino_local_loss=6.0, dino_global_loss=2 - i / n,
                            ibot_loss=0.0, koleo_loss=-0.5, gram_loss=0.0, lr=5e-5 * i / n, grad_norm=1.0))
        if i % 10 == 0:
            records[-1].update(knn_accuracy=0.8 - 0.1 * i / n, rankme=20.0 + i, teacher_entropy=5.0, prototype_use=1.0)
    return records


def test_curves_show_the_start_as_a_dashed_line_above_the_fall(tmp_path):
    records = [dict(iteration=r["iteration"], knn_accuracy=r["knn_accuracy"]) for r in log() if "knn_accuracy" in r]
    curves_picture(tmp_path / "c.png", records, "t")
    image = pixels(tmp_path / "c.png")
    rows, columns = places(image, PALETTE[0])
    grey = (np.abs(image - rgb(GREY)) < 30).all(axis=-1)
    first_row, last_row = rows[columns == columns.min()].mean(), rows[columns == columns.max()].mean()
    assert last_row > first_row + 100                          # the fall fills the panel
    line = grey[round(first_row) - 1:round(first_row) + 2, columns.min() + 12:columns.max()].any(axis=0)
    assert 0.3 < line.mean() < 0.9 and 20 < np.abs(np.diff(line.astype(int))).sum()        # dashes and gaps


def test_curves_leave_out_what_has_no_data(tmp_path, monkeypatch):
    def texts(records):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "write", lambda draw, xy, text, *rest, **more: seen.append(text) or 50.0)
            curves_picture(tmp_path / "c.png", records, "t")
        return seen

    all_texts = texts(log())
    for text in ("Loss", "total", "DINO local", "KoLeo", "k-NN accuracy", "RankMe", "Teacher entropy", "Learning rate",
                 "start 0.800 (dashed), best 0.800, last 0.700", "last 50", "in units of 1e-06"):
        assert text in all_texts, text
    assert "iBOT" not in all_texts and "Gram" not in all_texts
    only_start = texts(log()[:1])
    assert "k-NN accuracy" in only_start and "Loss" not in only_start and "RankMe" not in only_start
    assert "nan" not in " ".join(only_start + texts([dict(iteration=5, loss=math.nan, rankme=3.0)]))
    assert "Loss" not in texts([dict(iteration=5, loss=math.nan, rankme=3.0)])


@pytest.mark.parametrize("records", [[], log()[:1], log()[:2], log(400)], ids=["none", "start", "two", "long"])
def test_curves_of_any_length(records, tmp_path):
    curves_picture(tmp_path / "c.png", records, "t")
    assert pixels(tmp_path / "c.png").shape[1] <= 1600


@pytest.mark.parametrize("low, high, expected", [
    (0, 100, ["0", "20", "40", "60", "80", "100"]), (0.66, 0.76, ["0.66", "0.68", "0.70", "0.72", "0.74", "0.76"]),
    (-1.2, 11.5, ["0.0", "2.5", "5.0", "7.5", "10.0"]), (7, 7.003, ["7.0000", "7.0005", "7.0010", "7.0015", "7.0020",
                                                                   "7.0025", "7.0030"])])
def test_nice_ticks(low, high, expected):
    assert [text for _, text in nice_ticks(low, high)] == expected
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, _ in nice_ticks(low, high))
