"""Drawings of features and runs: image sheets, confusion matrices, feature maps, curves of a log.

Pillow only, so a machine that trains can draw, too. *_picture and contact_sheet write one file, and
.png keeps text sharp. The first line of a title is the headline; the others are smaller and grey.
pca_map and tsne_map make the points of scatter_picture. N images, D feature width, C classes.
"""
import functools
import math
import textwrap
import unicodedata

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont

from run_folder import whole_file

# Ten colours that stay apart for the colour-blind and on white: matplotlib's petroff10
# (Petroff, arXiv 2107.02270)
PALETTE = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
           "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
FRAMES = {"green": "#009e73", "red": "#bd1f01"}  # bluish and dark: they differ in lightness, too
CORRECT, WRONG = "#08519c", "#d55e00"  # cells of a confusion matrix: on the diagonal, off it
INK, GREY, RULE = "#222222", "#6b6b6b", "#dedede"  # text; remarks; lines that only guide the eye
OUTLINE = "#00e5ff"  # of a mask: a cyan that no heat colour comes near
HEAT = ("#000004", "#1f0c48", "#550f6d", "#88226a", "#ba3655",  # inferno
        "#e35933", "#f98e09", "#f9cb35", "#fcffa4")
MARGIN = 28  # pixels of the picture, as all lengths here
SMALLEST = 11  # font size below which text is cut instead of shrunk
SMOOTH = 3  # lines and dots are drawn this much larger, then reduced

# Panels of curves_picture behind the losses: field of log.jsonl, title, meaning of the y axis;
# least span (else noise in the last digit would fill the panel); largest possible value; True if a
# dashed line marks the first value
PANELS = (("knn_accuracy", "k-NN accuracy", "share of validation images", 0.1, 1, True),
          ("rankme", "RankMe", "effective rank of a batch's features", 1, math.inf, False),
          ("teacher_entropy", "Teacher entropy", "nats; 0 = one-hot targets", 0.1, math.inf, False),
          ("prototype_use", "Prototype use", "share of the prototypes", 0.1, 1, False),
          ("lr", "Learning rate", "", 0, math.inf, False))
LOSS_PANEL = ("Loss", "", 0.1, math.inf, False)  # the same from the title on
# The first losses of the panel, in this order. Other fields that end in _loss follow
FIRST_LOSSES = ("dino_global_loss", "dino_local_loss", "ibot_loss", "koleo_loss", "gram_loss",
                "feature_cls_loss", "feature_patch_loss")
SPELLING = dict(dino="DINO", ibot="iBOT", koleo="KoLeo", gram="Gram", cls="CLS",
                lejepa="LeJEPA", sigreg="SIGReg", diet="DIET")


# ---- paper, text, colours ----

def mix(color, share):
    """A colour over white, (r, g, b): share 1 is the colour, 0 is white."""
    return tuple(round(255 + (channel - 255) * share) for channel in ImageColor.getrgb(color))


def class_color(index):
    """The colour of a class, (r, g, b): the ten of the palette, then darker, then lighter ones.
    More than 30 classes share colours."""
    color, lap = PALETTE[index % len(PALETTE)], index // len(PALETTE) % 3
    if lap == 2:
        return mix(color, 0.55)
    shade = 0.55 if lap == 1 else 1
    return tuple(int(channel * shade) for channel in ImageColor.getrgb(color))


font = functools.cache(ImageFont.load_default)  # size -> font; at 15 its letters stand too close


def write(draw, xy, text, size, width=math.inf, anchor="la", fill=INK):
    """Write one line of text. If it is wider than `width`, shrink it down to SMALLEST, then cut it
    with an ellipsis.

    xy is the point of the text that Pillow's `anchor` names: l m r = left middle right, a m s =
    top middle baseline. Pillow's own font is ASCII: accents are dropped, other letters become '?'.
    Returns: the width taken.
    """
    letters = [c for c in unicodedata.normalize("NFKD", str(text)) if not unicodedata.combining(c)]
    text = "".join(c if c.isascii() else "?" for c in letters)
    while size > SMALLEST and font(size).getlength(text) > width:
        size -= 1
    if font(size).getlength(text) > width:
        while text and font(size).getlength(text + "…") > width:
            text = text[:-1].rstrip()
        text += "…"
    draw.text(xy, text, fill=fill, font=font(size), anchor=anchor)
    return font(size).getlength(text)


def paper(width, height, title):
    """White paper with a title, and `height` below it. Returns: image, its draw, y below title."""
    headline, *remarks = title.split("\n")
    top = MARGIN + 42 + 22 * len(remarks)
    sheet = Image.new("RGB", (int(width), int(top + height + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    write(draw, (MARGIN, MARGIN - 6), headline, 25, width - 2 * MARGIN)
    for i, remark in enumerate(remarks):
        write(draw, (MARGIN, MARGIN + 30 + 22 * i), remark, 14, width - 2 * MARGIN, fill=GREY)
    return sheet, draw, top


def smooth(sheet, box, paint):
    """Let paint(draw, SMOOTH) draw on the enlarged pixels of box (left, top, right, bottom), and
    put them back reduced: Pillow's lines and dots have steps, their means have none. Coordinates
    count from box; colours may have an alpha."""
    part = sheet.crop(box)
    part = part.resize((part.width * SMOOTH, part.height * SMOOTH), Image.NEAREST)
    paint(ImageDraw.Draw(part, "RGBA"), SMOOTH)
    sheet.paste(part.reduce(SMOOTH), box[:2])


# ---- images ----

def _fitted(size, side):
    """(width, height) of a picture of `size` that is made as large as fits in side x side."""
    return tuple(max(1, round(length * side / max(size))) for length in size)


def to_picture(image, intensity_range=(0, 255), side=None):
    """An image of the data set as a picture: low..high becomes black..white, clipped.

    Args: image [H,W] or [H,W,C], any dtype (1 or 2 channels: the first, as grey; 3 or more: the
    first three); intensity_range (low, high) in the image's own unit, such as Hounsfield; side: the
    picture is side x side, the image as large as fits, on black; None keeps the pixels.
    Returns: RGB picture.
    """
    low, high = intensity_range
    pixels = np.asarray(image)
    if pixels.ndim == 3:
        pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., 0]  # [H,W,3] or [H,W]
    pixels = (pixels.astype(np.float32) - low) / (high - low)
    pixels = np.nan_to_num(pixels).clip(0, 1)  # NaN is not measured: 0, black
    picture = Image.fromarray((pixels * 255).round().astype(np.uint8)).convert("RGB")
    if side is None:
        return picture
    width, height = _fitted(picture.size, side)
    square = Image.new("RGB", (side, side))
    corner = (side - width) // 2, (side - height) // 2
    square.paste(picture.resize((width, height), Image.BICUBIC), corner)
    return square


def heat_colors(values):
    """Colours of values in 0..1, [...] -> [...,3] uint8: black, violet, red, orange, pale yellow.
    Lightness grows all the way (Smith and van der Walt's inferno at nine points, interpolated)."""
    points = np.array([ImageColor.getrgb(color) for color in HEAT], dtype=float)  # [9,3]
    positions = np.linspace(0, 1, len(points))
    channels = [np.interp(values, positions, points[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def overlay(picture, heat, side, strength=0.75):
    """Heat [h,w] in 0..1, interpolated between patches, over a picture: much heat covers it.
    Returns: RGB picture side x side, placed as to_picture does it."""
    under = np.asarray(to_picture(picture, side=side), dtype=float)  # [side,side,3]
    width, height = _fitted(picture.size, side)
    warm = Image.fromarray(np.asarray(heat, dtype=np.float32))
    warm = np.asarray(warm.resize((width, height), Image.BICUBIC)).clip(0, 1)
    left, top = (side - width) // 2, (side - height) // 2
    inside = slice(top, top + height), slice(left, left + width)
    alpha = strength * warm[..., None] ** 0.7
    # the picture becomes a dim grey, so that colour means heat on stained cells, too
    dim = under[inside].mean(axis=-1, keepdims=True) * 0.7
    under[inside] = (1 - alpha) * dim + alpha * heat_colors(warm)
    return Image.fromarray(under.round().astype(np.uint8))


def patch_heat(picture, heat, side, strength=0.85):
    """Heat [h,w] in 0..1 as patches over a picture, without smoothing. Returns: as overlay."""
    colors = mosaic(heat_colors(heat) / 255, picture.size)
    alpha = mosaic(np.repeat(np.asarray(heat)[..., None] ** 0.7, 3, axis=2), picture.size)
    return _blend(picture, colors, np.asarray(alpha) / 255 * strength, side)


def patch_groups(picture, numbers, side, strength=0.75):
    """Groups of patches over a picture, each in a colour of its own. numbers [h,w] int: 0 = none,
    else the number of the group, from 1. Returns: as overlay."""
    colors = [(0, 0, 0), *(class_color(n) for n in range(numbers.max()))]
    painted = mosaic(np.array(colors)[numbers] / 255, picture.size)
    alpha = mosaic(np.repeat(numbers[..., None] > 0, 3, axis=2), picture.size)
    return _blend(picture, painted, np.asarray(alpha) / 255 * strength, side)


def _blend(picture, colors, alpha, side):
    """A dim grey picture under colours, alpha [H,W,3] in 0..1; side x side as of to_picture."""
    under = np.asarray(picture, dtype=float).mean(axis=-1, keepdims=True) * 0.7
    mixed = (1 - alpha) * under + alpha * np.asarray(colors)
    return to_picture(Image.fromarray(mixed.round().astype(np.uint8)), side=side)


def outline(picture, mask, color=OUTLINE):
    """A copy of a square picture with the border of a mask [H,W] (non-zero = inside), drawn just
    outside of the mask. The mask is placed as to_picture places an image of its shape."""
    side = picture.width
    small = Image.fromarray((np.asarray(mask) != 0).astype(np.uint8))
    inside = np.asarray(small.resize(_fitted(small.size, side), Image.NEAREST)) > 0
    height, width = inside.shape
    room = np.zeros((side + 2, side + 2), bool)  # a frame of 1: the border has neighbours, too
    top, left = (side - height) // 2 + 1, (side - width) // 2 + 1
    room[top:top + height, left:left + width] = inside
    near = np.zeros(room.shape, bool)
    for shift in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        near |= np.roll(room, shift, axis=(0, 1))
    pixels = np.array(picture)
    pixels[(near & ~room)[1:-1, 1:-1]] = ImageColor.getrgb(color)
    return Image.fromarray(pixels)


def frames(picture, boxes, shape, color):
    """A copy of a square picture with the frames of boxes (top, left, height, width), in pixels of
    an image of `shape` (H, W), which is placed as to_picture places it."""
    framed, side = picture.copy(), picture.width
    draw = ImageDraw.Draw(framed)
    width, height = _fitted(shape[::-1], side)
    x0, y0, scale = (side - width) / 2, (side - height) / 2, width / shape[1]
    for top, left, h, w in boxes:
        corners = [x0 + left * scale, y0 + top * scale]
        corners += [x0 + (left + w) * scale - 1, y0 + (top + h) * scale - 1]
        draw.rectangle(corners, outline=color, width=2)
    return framed


def mosaic(colors, size):
    """Patch colours [h,w,3] in 0..1 as a picture of `size` (width, height), without smoothing."""
    small = Image.fromarray((np.asarray(colors) * 255).round().astype(np.uint8))
    return small.resize(size, Image.NEAREST)


def contact_sheet(path, rows, title, side=112, columns=(), scale=()):
    """Rows of captioned images, such as a query and its nearest training images.

    Args: rows: lists, of any length, of (picture, caption of up to two lines, frame colour or
    None): 'green' and 'red' in shades that the colour-blind can tell, or any of Pillow's; side: of
    an image; columns: a heading for each column, or none; scale: three texts for the ends and the
    meaning of a bar of heat colours below, or none.
    """
    gap, line, frame_width = 24, 18, 5
    head = 26 if columns else 0
    foot = 34 if scale else 0
    row_height = side + 2 * line + 22
    n_columns = max([len(row) for row in rows] + [len(columns), 1])
    bottom = head + len(rows) * row_height
    width = 2 * MARGIN + n_columns * (side + gap) - gap
    sheet, draw, top = paper(width, bottom + foot, title)
    if scale:
        _draw_scale(sheet, draw, top + bottom, *scale)
    for c, heading in enumerate(columns):
        center = MARGIN + c * (side + gap) + side / 2
        write(draw, (center, top), heading, 14, side + gap - 12, "ma", GREY)
    for r, row in enumerate(rows):
        for c, (picture, caption, frame) in enumerate(row):
            x, y = MARGIN + c * (side + gap), top + head + r * row_height
            if frame:
                far = side + frame_width - 1
                corners = [x - frame_width, y - frame_width, x + far, y + far]
                draw.rectangle(corners, fill=FRAMES.get(frame, frame))
            sheet.paste(to_picture(picture.convert("RGB"), side=side), (x, y))
            for i, text in enumerate(caption.split("\n")[:2]):
                below = y + side + 9 + line * i
                size, ink = ((14, INK), (12, GREY))[i]
                write(draw, (x + side / 2, below), text, size, side + gap - 12, "ma", ink)
    sheet.save(path)


def neighbours_picture(path, rows, title, value_range, first):
    """Images and their nearest ones, a row each.

    Args: rows: lists of (image [H,W,C], caption, frame) as in contact_sheet, the query in front;
    value_range: pixel values that become black and white; first: heading of the queries' column.
    """
    sheet = []
    for row in rows:
        sheet.append([(to_picture(image, value_range), *rest) for image, *rest in row])
    n_nearest = max(len(row) for row in rows) - 1
    columns = [first, *(f"nearest {i + 1}" for i in range(n_nearest))]
    contact_sheet(path, sheet, title, 160, columns)


def _draw_scale(sheet, draw, y, low, high, meaning):
    """Draw a bar of heat colours below y, with texts for its two ends and its meaning."""
    x = MARGIN + 8 + write(draw, (MARGIN, y + 12), low, 12, fill=GREY, anchor="lm")
    bar = heat_colors(np.tile(np.linspace(0, 1, 180), (12, 1)))
    sheet.paste(Image.fromarray(bar), (round(x), y + 6))
    x += 188 + write(draw, (x + 188, y + 12), high, 12, fill=GREY, anchor="lm")
    write(draw, (x + 18, y + 12), meaning, 12, sheet.width - MARGIN - x - 18, "lm", GREY)


def save_samples(path, crops, n_images, photometrics, labels=None, n_guided=0, max_images=6):
    """Draw the first images of a batch as the network sees them, one image a row: global crops,
    global crops with their masked patches painted over, local crops.

    Args: crops: dict of 'global' [V*B,C,S,S], 'local' [L*B,C,s,s] or None, normalised, and 'masks'
    [V*B,P] bool or None (dino.augment_batch); n_images: B; photometrics: undoes the normalisation;
    labels: CropDataset.label_crops, whose outline is drawn, or None; n_guided: how many of the L
    local crops, the last ones, are label-guided.
    """
    tile, gap, line = 112, 4, 14
    n_views = len(crops["global"]) // n_images
    columns = [(f"global {v + 1}", "global", v) for v in range(n_views)]
    if crops["masks"] is not None:
        columns += [(f"masked {v + 1}", "global", v) for v in range(n_views)]
    if crops["local"] is not None:
        n_free = len(crops["local"]) // n_images - n_guided
        columns += [(f"local {i + 1}", "local", i) for i in range(n_free)]
        columns += [(f"guided {i + 1}", "local", n_free + i) for i in range(n_guided)]
    n_rows = min(n_images, max_images)
    size = len(columns) * (tile + gap) + gap, n_rows * (tile + gap) + gap + line
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, kind, view) in enumerate(columns):
        left = gap + column * (tile + gap)
        draw.text((left, 2), title, fill="black")
        for row in range(n_rows):
            index = view * n_images + row  # view-major
            picture = _crop_picture(crops[kind][index], photometrics, tile)
            if title.startswith("masked"):
                _paint_masked(picture, crops["masks"][index])
            elif labels is not None:
                picture = outline(picture, labels[f"{kind}_crops"][index, 0] > 127)
            sheet.paste(picture, (left, line + gap + row * (tile + gap)))
    with whole_file(path) as part:
        sheet.save(part)


def _crop_picture(crop, photometrics, width):
    """A normalised crop [C,s,s] as an RGB picture; one or two channels become grey."""
    x = crop.float().cpu() * photometrics.std[:, None, None] + photometrics.mean[:, None, None]
    x = (x.clamp(0, 1) * 255).round().byte().numpy()
    picture = Image.fromarray(x[:3].transpose(1, 2, 0) if len(x) >= 3 else x[0]).convert("RGB")
    height = width * x.shape[1] // x.shape[2]
    return picture.resize((width, height), Image.NEAREST)


def _paint_masked(picture, mask):
    """Paint the masked patches of a square picture. mask [P] bool, True = masked."""
    side = round(len(mask) ** 0.5)
    cell = picture.width / side
    draw = ImageDraw.Draw(picture)
    for patch in mask.nonzero().flatten().tolist():
        x, y = patch % side * cell, patch // side * cell
        corners = [round(x), round(y), round(x + cell) - 1, round(y + cell) - 1]
        draw.rectangle(corners, fill=(255, 140, 0))


# ---- confusion matrix ----

def confusion_picture(path, confusion, class_names, title):
    """A confusion matrix. A cell has its count and its share of the row, which is also its shade.
    Recall stands on the right, precision below, accuracy in the corner.

    Args: confusion [C,C] counts, row = true class, column = prediction; class_names: C texts. A
    class without images has no recall, a class that is never predicted no precision: '-'.
    """
    counts = np.asarray(confusion).astype(np.int64)  # [C,C]
    n, n_true, n_predicted = len(counts), counts.sum(axis=1), counts.sum(axis=0)
    width = int(np.clip(1050 / (n + 1), 86, 190))  # of a cell
    height = int(np.clip(640 / (n + 1), 46, 110))
    big, small = 14, 12  # font sizes
    if n <= 5:
        big, small = 26, 17
    elif n <= 9:
        big, small = 17, 13
    wrap = functools.partial(textwrap.wrap, width=width // 7, break_long_words=False, max_lines=2,
                             placeholder="…")
    heads = [wrap(str(name).replace("_", " ")) for name in class_names]
    above = 32 + 17 * max(len(lines) for lines in heads)  # room for the column names
    longest = max(80, *(font(14).getlength(str(name)) for name in class_names))
    gap, left = 10, MARGIN + 12 + int(min(180, longest))
    sheet, draw, top = paper(left + gap + (n + 1) * width + MARGIN,
                             above + gap + (n + 1) * height + 34, title)
    top += above

    def corner(row, column):  # row or column n: the margin of the matrix
        x, y = left + column * width, top + row * height
        return x + (gap if column == n else 0), y + (gap if row == n else 0)

    def cell(row, column, lines, fill="#ffffff", ink=INK):
        x, y = corner(row, column)
        draw.rectangle([x, y, x + width - 3, y + height - 3], fill=fill, outline=RULE)
        for i, text in enumerate(lines):
            center = y + (height / 2 - 1 + (i - (len(lines) - 1) / 2) * height * 0.38)
            size = small if i else big
            write(draw, (x + width / 2 - 1, center), text, size, width - 8, "mm", ink)

    def percent(part, whole):
        return f"{100 * part / whole:.1f} %" if whole else "-"
    for r in range(n):
        for c in range(n):
            share = counts[r, c] / max(n_true[r], 1)
            lines, ink = [f"{counts[r, c]:,}"], "#b5b5b5"
            if counts[r, c] > 0:
                lines.append(percent(counts[r, c], n_true[r]))
                ink = "white" if share > 0.6 else INK
            cell(r, c, lines, mix(CORRECT if r == c else WRONG, share), ink)
        cell(r, n, [percent(counts[r, r], n_true[r])])
        cell(n, r, [percent(counts[r, r], n_predicted[r])])
    cell(n, n, [percent(counts.trace(), counts.sum())], "#f0f0f0")
    for i, name in enumerate(class_names):
        y = corner(i, 0)[1] + height / 2
        write(draw, (left - 12, y - 9), name, 14, left - 12 - MARGIN, "rm")
        write(draw, (left - 12, y + 8), f"n = {n_true[i]:,}", 12, anchor="rm", fill=GREY)
        x = corner(0, i)[0] + width / 2
        for j, text in enumerate(reversed(heads[i])):
            write(draw, (x, top - 10 - 17 * j), text, 14, width - 6, "ms")
    write(draw, (left, top - above), "predicted class", 12, fill=GREY)
    write(draw, (left - 12, top - 10), "true class", 12, anchor="rs", fill=GREY)
    x, y = corner(n, n)
    write(draw, (x + width / 2, top - 10), "recall", 14, anchor="ms", fill=GREY)
    write(draw, (left - 12, y + height / 2), "precision", 14, anchor="rm", fill=GREY)
    write(draw, (left, y + height + 12), "shade = share of the row; blue = right, orange = wrong; "
          "corner = accuracy", 12, (n + 1) * width, fill=GREY)
    sheet.save(path)


# ---- maps of features ----

def principal_components(features, n_components):
    """Coordinates along the principal components, largest first: [N,k] fp32 on the device of the
    features, k = n_components or what N and D allow. The sign of a component is free; here its
    largest entry is positive. N or D is often small, so the smaller Gram matrix is used."""
    x = torch.as_tensor(features).detach().float().flatten(1)
    x = x - x.mean(dim=0)  # [N,D]
    k = min(n_components, *x.shape)
    if x.shape[0] <= x.shape[1]:
        values, vectors = torch.linalg.eigh((x @ x.T).double())  # ascending: [N], [N,N]
        scores = vectors[:, -k:] * values[-k:].clamp_min(0).sqrt()
    else:
        _, vectors = torch.linalg.eigh((x.T @ x).double())  # [D,D]
        scores = x.double() @ vectors[:, -k:]
    scores = scores.flip(1)  # [N,k]
    largest = scores.gather(0, scores.abs().argmax(dim=0, keepdim=True))  # [1,k]
    return (scores * torch.where(largest < 0, -1.0, 1.0)).float()


def pca_map(features):
    """The plane in which features [N,D], tensor or array, spread most: [N,2] fp32 on the CPU; zeros
    for a component that N or D lacks."""
    scores = principal_components(features, 2)
    return F.pad(scores, (0, 2 - scores.shape[1])).cpu()


def feature_colors(patches, border):
    """Patch features of several images as colours: equal parts of different images get equal
    colours (the PCA picture of DINOv2, arXiv 2304.07193, section 7.5).

    The first principal component of all patches separates foreground from background, at Otsu's
    threshold; background is the side that has the larger share of the border. Three components of
    the foreground are red, green and blue, each from its 1st to its 99th percentile.
    Args: patches [N,P,D]; border [P] bool, the patches at the rim of an image.
    Returns: [N,P,3] in 0..1, background 0.
    """
    N, P, _ = patches.shape
    first = principal_components(patches.flatten(0, 1), 1)[:, 0].cpu().numpy()  # [N*P]
    order = np.sort(first)
    n_below = np.arange(1, N * P)
    n_above = N * P - n_below
    sums = np.cumsum(order)[:-1]
    difference = sums / n_below - (order.sum() - sums) / n_above  # of the means of the two sides
    between = difference ** 2 * n_below * n_above
    above = first > order[between.argmax()]
    rim = np.tile(np.asarray(border), N)
    front = above if above[rim].mean() <= above[~rim].mean() else ~above
    colors = np.zeros((N * P, 3))
    if front.sum() > 3:
        tokens = patches.flatten(0, 1)[torch.from_numpy(front)]
        scores = principal_components(tokens, 3).cpu().numpy()
        low, high = np.percentile(scores, (1, 99), axis=0)
        scores = (scores - low) / np.maximum(high - low, 1e-12)
        colors[front, :scores.shape[1]] = scores.clip(0, 1)
    return colors.reshape(N, P, 3)


def affinities(distances, perplexity):
    """P of t-SNE: each row is a Gaussian of the precision that makes exp(entropy) = perplexity,
    found by bisection; then symmetric, p_ij = (p_j|i + p_i|j) / 2N. Equation 1 and section 3.1 of
    the paper.

    Args: distances [N,N] squared. Returns: [N,N], sums to 1, diagonal 0.
    """
    d = (distances / distances.mean().clamp_min(1e-12)).fill_diagonal_(math.inf)
    d = d - d.amin(dim=1, keepdim=True)  # the factor cancels in p
    d.fill_diagonal_(1e30)  # not inf, as 0 * inf is NaN
    low = torch.zeros_like(d[:, :1])  # [N,1]
    high, beta = torch.full_like(low, math.inf), torch.ones_like(low)  # beta = 1 / (2 sigma^2)
    for _ in range(50):
        p = (d * -beta).exp_()
        total = p.sum(dim=1, keepdim=True)
        mean_distance = (d * p).sum(dim=1, keepdim=True)
        entropy = total.log() + beta * mean_distance / total  # [N,1] nats
        too_flat = entropy > math.log(perplexity)
        low, high = torch.where(too_flat, beta, low), torch.where(too_flat, high, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    p /= total
    return (p + p.T) / (2 * len(p))


@torch.no_grad()
def tsne_map(features, perplexity=30.0, n_iterations=500, seed=0):
    """Exact t-SNE (van der Maaten and Hinton, JMLR 2008, algorithm 1) of the first 50 principal
    components, from a PCA start and with scikit-learn's learning rate. Neighbours stay together;
    the size of groups and the distance between them mean nothing.

    Time and memory grow with N^2: the caller keeps N to about 2000.
    Args: features [N,D], tensor or array; perplexity: how many neighbours count, at most
    (N - 1) / 3; seed: of the tiny noise that separates identical images.
    Returns: [N,2] fp32 on the CPU, the same each time; the PCA if N < 4.
    """
    x = principal_components(features, 50)  # [N,50]
    n = len(x)
    if n < 4:
        return pca_map(x)
    # not by matrix product, which would make near distances 0
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    P = affinities(distances, min(perplexity, (n - 1) / 3))  # [N,N]
    y = F.pad(x, (0, max(0, 2 - x.shape[1])))[:, :2]
    y = 1e-4 * y / y[:, 0].std().clamp_min(1e-12)  # [N,2]
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    y = y + 1e-6 * noise.to(x)
    exaggeration, n_early = 12, min(250, n_iterations // 2)  # P counts more while groups form
    lr = max(n / exaggeration / 4, 50)
    ones = torch.ones_like(y[:, :1])
    for iteration in range(n_iterations):
        early = iteration < n_early
        if iteration in (0, n_early):  # each phase starts without velocity, as in scikit-learn
            velocity, gains = torch.zeros_like(y), torch.ones_like(y)
            target = P * (exaggeration if early else 1)
        squares = y.square().sum(dim=1, keepdim=True)  # [N,1]
        # 1 / (1 + |y_i - y_j|^2) from one product of thin matrices, which makes this quick
        left = torch.cat([-2 * y, squares, ones], dim=1)
        kernel = (left @ torch.cat([y, ones, squares + 1], dim=1).T).reciprocal_()
        kernel.fill_diagonal_(0)  # [N,N]
        # eq. 5: gradient_i = 4 sum_j (p_ij - q_ij) kernel_ij (y_i - y_j), q = kernel / its sum
        force = torch.sub(target, kernel, alpha=1 / float(kernel.sum())).mul_(kernel)  # [N,N]
        gradient = 4 * (force.sum(dim=1, keepdim=True) * y - force @ y)  # [N,2]
        turned = gradient * velocity < 0
        gains = torch.where(turned, gains + 0.2, gains * 0.8).clamp_min_(0.01)
        velocity = (0.5 if early else 0.8) * velocity - lr * gains * gradient
        y = y + velocity
        y = y - y.mean(dim=0)  # keeps the squares small, and so their rounding errors
    return y.cpu()


def scatter_picture(path, panels, labels, class_names, title):
    """Maps of the same N images side by side: a dot for each image in the colour of its class, and
    one legend with counts.

    Both axes of a panel have one scale, because distances have a meaning, and no ticks, because
    distances have no unit. Dots are see-through if there are many.
    Args: panels: a list of (title, points [N,2]); labels [N] int, indices into class_names.
    """
    labels = np.asarray(labels).astype(np.int64)  # [N]
    counts = [(c, int((labels == c).sum())) for c in range(len(class_names))]
    counts = [(c, count) for c, count in counts if count > 0]
    panels = [(name, np.asarray(points, dtype=np.float64)) for name, points in panels]
    spans = [np.ptp(points, axis=0).clip(1e-12) for _, points in panels]  # [2] each: of x, of y
    width = min(720, 1264 // len(panels) - MARGIN)
    aspect = max(span[1] / span[0] for span in spans)
    height = int(width * np.clip(aspect, 0.6, 1))  # a flat panel would be an empty strip
    alpha = 255 if len(labels) <= 100 else 170
    radius = np.clip(75 / max(len(labels), 1) ** 0.5, 3, 6) * (width / 720) ** 0.5
    # a random order, else the last class would cover the others
    order = np.random.default_rng(0).permutation(len(labels))
    left = MARGIN + len(panels) * (width + MARGIN)
    sheet, draw, top = paper(left + 240, 30 + max(height, 26 * len(counts)), title)
    top += 30
    for i, ((name, points), span) in enumerate(zip(panels, spans)):
        x = MARGIN + i * (width + MARGIN)
        scale = min((width - 40) / span[0], (height - 40) / span[1])
        dots = (points - points.min(axis=0) - span / 2) * scale * (1, -1)  # y points up
        dots = dots + (width / 2, height / 2)

        def paint(canvas, factor, dots=dots):
            for label, (px, py) in zip(labels[order], dots[order]):
                canvas.circle((px * factor, py * factor), radius * factor,
                              fill=(*class_color(label), alpha))
        write(draw, (x, top - 26), name, 17, width)
        draw.rectangle([x, top, x + width - 1, top + height - 1], outline=RULE)
        smooth(sheet, (x, top, x + width, top + height), paint)
    for i, (c, count) in enumerate(counts):
        def dot(canvas, factor, color=class_color(c)):
            canvas.circle((6 * factor, 12 * factor), 6 * factor, fill=color)
        y = top + 26 * i
        smooth(sheet, (left, y, left + 14, y + 24), dot)
        used = write(draw, (left + 20, y + 12), class_names[c], 14, 150, "lm")
        write(draw, (left + 28 + used, y + 12), f"{count:,}", 12, anchor="lm", fill=GREY)
    sheet.save(path)


# ---- curves ----

def curves_picture(path, records, title):
    """The curves of a run: losses, k-NN accuracy (dashed: its first value, so that harm is
    visible), health, learning rate.

    Args: records: the dicts of the run's log.jsonl; any field may be missing in any of them. Every
    field that ends in _loss is drawn. Losses that are 0 throughout, numbers that are not finite and
    panels without a number are left out.
    """
    panels = [(_loss_lines(records), LOSS_PANEL)]
    for field, *about in PANELS:
        line = _line(records, field)
        panels.append(([("", line)] if line else [], about))
    panels = [(lines, about) for lines, about in panels if lines]
    iterations = [record["iteration"] for record in records] or [0]
    first = min(iterations)
    x_range = first, max(max(iterations), first + 6)  # whole numbers on the axis
    n_columns = 2 if len(panels) in (1, 2, 4) else 3
    n_rows, width, height = math.ceil(len(panels) / n_columns), 460, 310
    sheet, draw, top = paper(n_columns * width + 2 * MARGIN, n_rows * height, title)
    for i, (lines, about) in enumerate(panels):
        x, y = MARGIN + i % n_columns * width, top + i // n_columns * height
        draw_panel(sheet, draw, (x, y, x + width, y + height), lines, x_range, *about)
    sheet.save(path)


def _line(records, field):
    """{iteration: value} of a field, of the records in which its value is a finite number."""
    return {record["iteration"]: record[field] for record in records
            if math.isfinite(record.get(field, math.nan))}


def _loss_lines(records):
    """[(label, {iteration: value})] of the total and of the loss terms that are not always 0."""
    fields = ["loss", *FIRST_LOSSES]
    for record in records:
        fields += [key for key in record if key.endswith("_loss") and key not in fields]
    lines = [(loss_label(field), _line(records, field)) for field in fields]
    return [(label, line) for label, line in lines if any(line.values())]


def loss_label(field):
    """The label of a loss: its name in log.jsonl without _loss, in words. 'loss' is 'total'."""
    if field == "loss":
        return "total"
    words = field.removesuffix("_loss").split("_")
    return " ".join(SPELLING.get(word, word) for word in words)


def nice_ticks(low, high, n=6):
    """Up to n + 1 round numbers within [low, high], the multiples of 1, 2, 2.5 or 5 times a power
    of ten, each with its text: [(value, text)], all with the decimals of the step."""
    power = 10.0 ** math.floor(math.log10((high - low) / n))
    steps = [factor * power for factor in (1, 2, 2.5, 5, 10)]
    step = next(step for step in steps if step * n >= (high - low) * 0.999)
    decimals = len(f"{step:.10f}".rstrip("0").split(".")[1])
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [(i * step, f"{i * step:.{decimals}f}") for i in range(first, last + 1)]


def draw_panel(sheet, draw, box, lines, x_range, title, unit, least, most, has_start_line):
    """One panel of curves_picture within box (left, top, right, bottom).

    Args: lines: [(label, {iteration: value})]; x_range: first and last iteration; the others: of
    LOSS_PANEL or PANELS.
    """
    x0, y0, x1, y1 = box[0] + 62, box[1] + 52, box[2] - 24, box[3] - 58  # the axes
    legend = _legend([label for label, _ in lines], box[2] + 10 - x0)
    y0 += 16 * legend[-1][1]  # room for the rows of the legend behind the first
    values = []
    for _, line in lines:
        values += line.values()
    size = max(abs(value) for value in values)
    one = 1.0  # the unit of the ticks: 50 millionths, not 0.00005
    if 0 < size < 0.01:
        one = 1000.0 ** math.floor(math.log10(size) / 3)
    span = max(values) - min(values)
    pad = max(span * 0.06, (least - span) / 2, size * 1e-3, 1e-9)
    low, high = min(values) - pad, min(max(values) + pad, most)
    terms = [label for label, _ in lines if label != "total"]
    colors = [INK if label == "total" else class_color(terms.index(label)) for label, _ in lines]

    def to_pixels(iteration, value):  # of the sheet
        return (x0 + (iteration - x_range[0]) / (x_range[1] - x_range[0]) * (x1 - x0),
                y1 - (value - low) / (high - low) * (y1 - y0))

    def paint(canvas, factor):  # its paper begins 4 pixels outside of the axes
        if has_start_line:
            y = to_pixels(0, values[0])[1] - y0 + 4
            y = round(y) * factor + factor // 2  # on whole pixels: crisp
            for x in range(4 * factor, (x1 - x0 + 4) * factor, 10 * factor):
                canvas.line([x, y, x + 6 * factor, y], fill=GREY, width=factor)
        for color, (_, line) in zip(colors, lines):
            dots = []
            for iteration, value in line.items():
                x, y = to_pixels(iteration, value)
                dots.append(((x - x0 + 4) * factor, (y - y0 + 4) * factor))
            width = 2 if len(dots) < 300 else 1.4
            canvas.line(dots, fill=color, width=round(width * factor), joint="curve")
            if len(dots) <= 40:  # few are measurements, many are a curve
                for dot in dots:
                    canvas.circle(dot, 3 * factor, fill=color)
    for tick, text in nice_ticks(low / one, high / one):
        y = round(to_pixels(0, tick * one)[1])
        draw.line([x0, y, x1, y], fill=RULE)
        write(draw, (x0 - 8, y), text, 12, x0 - box[0] - 8, "rm", GREY)
    for tick, text in nice_ticks(*x_range):
        x = round(to_pixels(tick, low)[0])
        draw.line([x, y1, x, y1 + 4], fill=GREY)
        write(draw, (x, y1 + 8), text, 12, anchor="ma", fill=GREY)
    draw.line([x0, y0, x0, y1, x1, y1], fill=GREY)
    smooth(sheet, (x0 - 4, y0 - 4, x1 + 5, y1 + 5), paint)
    write(draw, ((x0 + x1) / 2, y1 + 26), "iteration", 12, anchor="ma", fill=GREY)
    write(draw, (x0, box[1]), title, 17)
    remark = ""
    if has_start_line:
        remark = f"start {values[0]:.3f} (dashed), best {max(values):.3f}, last {values[-1]:.3f}"
    elif len(lines) == 1:
        remark = f"last {values[-1] / one:.3g}"
    write(draw, (x1, box[1] + 4), remark, 12, anchor="ra", fill=GREY)
    write(draw, (x0, box[1] + 28), unit if one == 1 else f"in units of {one:g}", 12, fill=GREY)
    for color, (label, _), (x, row) in zip(colors, lines, legend):
        if label:
            x, y = x0 + x, box[1] + 28 + 16 * row
            draw.rectangle([x, y + 6, x + 12, y + 9], fill=color)
            write(draw, (x + 17, y), label, 12)


def _legend(labels, width):
    """[(x, row)] of the entries of a legend that breaks into rows of at most `width` pixels."""
    entries, x, row = [], 0, 0
    for label in labels:
        needed = 17 + font(12).getlength(label)
        if x > 0 and x + needed > width:
            x, row = 0, row + 1
        entries.append((x, row))
        x += needed + 12
    return entries
