"""Everything that is drawn of features and runs: image sheets, confusion matrices, maps of features, curves of a log.

Pillow only, so that a machine that trains can draw too. *_picture and contact_sheet write one file; .png keeps text
sharp. The first line of a title is the headline, the others are smaller and grey. pca_map and tsne_map make the points
of scatter_picture. Shape letters: N images, D feature width, C classes.
"""
import functools
import math
import textwrap
import unicodedata

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont

# Ten colours that stay apart for the colour-blind and on white: Petroff (arXiv 2107.02270), matplotlib's petroff10.
PALETTE = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
           "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
FRAMES = {"green": "#009e73", "red": "#bd1f01"}               # a bluish green and a dark red: apart in lightness, too
RIGHT, WRONG = "#08519c", "#d55e00"                           # cells of a confusion matrix: on the diagonal, off it
INK, GREY, RULE = "#222222", "#6b6b6b", "#dedede"             # text; remarks; lines that only guide the eye
OUTLINE = "#00e5ff"                                           # of a mask: a cyan that no heat colour comes near
HEAT = ("#000004", "#1f0c48", "#550f6d", "#88226a", "#ba3655", "#e35933", "#f98e09", "#f9cb35", "#fcffa4")  # inferno
MARGIN = 28                                                   # pixels of the picture, as all lengths here
SMALLEST = 11                                                 # font size below which text is cut instead of shrunk
SMOOTH = 3                                                    # lines and dots are drawn this much larger, then reduced

# The panels of curves_picture: fields of log.jsonl, title, meaning of the y axis; its least span (else noise in the
# last digit would fill the panel); the largest value there can be; is the first value marked by a dashed line?
PANELS = ((dict(loss="total", dino_global_loss="DINO global", dino_local_loss="DINO local", ibot_loss="iBOT",
                koleo_loss="KoLeo", gram_loss="Gram", feature_cls_loss="feature CLS",
                feature_patch_loss="feature patches"), "Loss", "", 0.1, math.inf, False),
          (dict(knn_accuracy=""), "k-NN accuracy", "share of validation images", 0.1, 1, True),
          (dict(rankme=""), "RankMe", "effective rank of a batch's features", 1, math.inf, False),
          (dict(teacher_entropy=""), "Teacher entropy", "nats; 0 = one-hot targets", 0.1, math.inf, False),
          (dict(prototype_use=""), "Prototype use", "share of the prototypes", 0.1, 1, False),
          (dict(lr=""), "Learning rate", "", 0, math.inf, False))


# ---- paper, text, colours ----

def mix(color, share):
    """A colour over white, (r, g, b): share 1 is the colour, 0 is white."""
    return tuple(round(255 + (channel - 255) * share) for channel in ImageColor.getrgb(color))


def class_color(index):
    """The colour of class `index`, (r, g, b): the ten of the palette, then the same darker, then lighter, and again;
    more than 30 classes share colours."""
    color, lap = PALETTE[index % len(PALETTE)], index // len(PALETTE) % 3
    return mix(color, 0.55) if lap == 2 else tuple(int(c * (0.55 if lap else 1)) for c in ImageColor.getrgb(color))


font = functools.cache(ImageFont.load_default)                # size -> font; at 15 its letters stand too close


def write(draw, xy, text, size, width=math.inf, anchor="la", fill=INK):
    """One line of text of at most `width`: smaller where it has to be, down to SMALLEST, then cut with an ellipsis.

    xy is the point of the text that Pillow's `anchor` names: l m r = left middle right, a m s = top middle baseline.
    Pillow's own font is ASCII: accents are dropped, other letters become '?'. Returns: the width taken.
    """
    text = "".join(c if c.isascii() else "?" for c in unicodedata.normalize("NFKD", str(text))
                   if not unicodedata.combining(c))
    while size > SMALLEST and font(size).getlength(text) > width:
        size -= 1
    if font(size).getlength(text) > width:
        while text and font(size).getlength(text + "…") > width:
            text = text[:-1].rstrip()
        text += "…"
    draw.text(xy, text, fill=fill, font=font(size), anchor=anchor)
    return font(size).getlength(text)


def paper(width, height, title):
    """White paper with a title and room of `height` below it. Returns: image, its draw, y where the room begins."""
    headline, *remarks = title.split("\n")
    top = MARGIN + 42 + 22 * len(remarks)
    sheet = Image.new("RGB", (int(width), int(top + height + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    write(draw, (MARGIN, MARGIN - 6), headline, 25, width - 2 * MARGIN)
    for i, remark in enumerate(remarks):
        write(draw, (MARGIN, MARGIN + 30 + 22 * i), remark, 14, width - 2 * MARGIN, fill=GREY)
    return sheet, draw, top


def smooth(sheet, box, paint):
    """Let paint(draw, SMOOTH) draw on the enlarged pixels of box (left, top, right, bottom), and put them back reduced:
    Pillow's lines and dots have steps, their means have none. Coordinates count from box; colours may have an alpha."""
    part = sheet.crop(box)
    part = part.resize((part.width * SMOOTH, part.height * SMOOTH), Image.NEAREST)
    paint(ImageDraw.Draw(part, "RGBA"), SMOOTH)
    sheet.paste(part.reduce(SMOOTH), box[:2])


# ---- images ----

def to_picture(image, intensity_range=(0, 255), side=None):
    """An image of the data set as a picture: low..high becomes black..white, what is outside is clipped.

    Args: image [H,W] or [H,W,C], any dtype (1 or 2 channels: the first, as grey; 3 or more: the first three);
    intensity_range (low, high) in the image's own unit, such as Hounsfield; side: the picture is side x side, the image
    as large as fits, on black; None keeps its pixels. Returns: RGB picture.
    """
    low, high = intensity_range
    pixels = np.asarray(image)
    if pixels.ndim == 3:
        pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., 0]               # [H,W,3] or [H,W]
    pixels = np.nan_to_num((pixels.astype(np.float32) - low) / (high - low))               # NaN, not measured: 0, black
    picture = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8)).convert("RGB")
    if side is None:
        return picture
    width, height = (max(1, round(length * side / max(picture.size))) for length in picture.size)
    square = Image.new("RGB", (side, side))
    square.paste(picture.resize((width, height), Image.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return square


def heat_colors(values):
    """Colours of values in 0..1, [...] -> [...,3] uint8: black, violet, red, orange, pale yellow, growing in lightness
    all the way (Smith and van der Walt's inferno at nine points, straight lines between)."""
    points = np.array([ImageColor.getrgb(color) for color in HEAT], dtype=float)           # [9,3]
    place = np.linspace(0, 1, len(points))
    return np.stack([np.interp(values, place, points[:, c]) for c in range(3)], axis=-1).round().astype(np.uint8)


def overlay(picture, heat, side, strength=0.75):
    """Heat [h,w] in 0..1 over a picture, both at `side`: little heat lets the picture through, much of it covers it.

    Between patches the heat is interpolated. Returns: RGB picture, placed as to_picture does it.
    """
    under = np.asarray(to_picture(picture, side=side), dtype=float)                        # [side,side,3]
    width, height = (max(1, round(length * side / max(picture.size))) for length in picture.size)
    warm = Image.fromarray(np.asarray(heat, dtype=np.float32)).resize((width, height), Image.BICUBIC)
    warm = np.asarray(warm).clip(0, 1)
    left, top = (side - width) // 2, (side - height) // 2
    place = (slice(top, top + height), slice(left, left + width))
    alpha = strength * warm[..., None] ** 0.7
    # the picture steps back to a dim grey, so that colour means heat even on stained cells
    dim = under[place].mean(axis=-1, keepdims=True) * 0.7
    under[place] = (1 - alpha) * dim + alpha * heat_colors(warm)
    return Image.fromarray(under.round().astype(np.uint8))


def outline(picture, mask, color=OUTLINE):
    """A copy of a square picture with the border of a mask [H,W] (non-zero = inside) drawn just outside of it, the
    mask placed as to_picture places an image of its shape."""
    side = picture.width
    width, height = (max(1, round(length * side / max(np.shape(mask)))) for length in np.shape(mask)[::-1])
    small = Image.fromarray((np.asarray(mask) != 0).astype(np.uint8))
    inside = np.asarray(small.resize((width, height), Image.NEAREST)) > 0
    room = np.zeros((side + 2, side + 2), bool)                # a frame of 1: the border has neighbours, too
    top, left = ((side - length) // 2 + 1 for length in inside.shape)
    room[top:top + inside.shape[0], left:left + inside.shape[1]] = inside
    near = sum(np.roll(room, shift, axis=(0, 1)).astype(int) for shift in ((0, 1), (0, -1), (1, 0), (-1, 0)))
    pixels = np.array(picture)
    pixels[((near > 0) & ~room)[1:-1, 1:-1]] = ImageColor.getrgb(color)
    return Image.fromarray(pixels)


def contact_sheet(path, rows, title, side=112, columns=(), scale=()):
    """Rows of captioned images, such as a query and its nearest training images.

    Args: rows: a list of rows, which may differ in length, each a list of (picture, caption of up to two lines, frame
    colour or None): 'green' and 'red' in shades that the colour-blind can tell, or any of Pillow's; side of an image;
    columns: a heading for each column, or none; scale: three texts for the ends and the meaning of a bar of heat
    colours below, or none.
    """
    gap, line, frame_width = 24, 18, 5
    head = 26 if columns else 0
    row_height = side + 2 * line + 22
    n_columns = max([len(row) for row in rows] + [len(columns), 1])
    bottom = head + len(rows) * row_height
    sheet, draw, top = paper(2 * MARGIN + n_columns * (side + gap) - gap, bottom + (34 if scale else 0), title)
    if scale:
        low, high, meaning = scale
        x = MARGIN + 8 + write(draw, (MARGIN, top + bottom + 12), low, 12, fill=GREY, anchor="lm")
        bar = heat_colors(np.tile(np.linspace(0, 1, 180), (12, 1)))
        sheet.paste(Image.fromarray(bar), (round(x), top + bottom + 6))
        x += 188 + write(draw, (x + 188, top + bottom + 12), high, 12, fill=GREY, anchor="lm")
        write(draw, (x + 18, top + bottom + 12), meaning, 12, sheet.width - MARGIN - x - 18, "lm", GREY)
    for c, heading in enumerate(columns):
        write(draw, (MARGIN + c * (side + gap) + side / 2, top), heading, 14, side + gap - 12, "ma", GREY)
    for r, row in enumerate(rows):
        for c, (picture, caption, frame) in enumerate(row):
            x, y = MARGIN + c * (side + gap), top + head + r * row_height
            if frame:
                far = side + frame_width - 1
                draw.rectangle([x - frame_width, y - frame_width, x + far, y + far], fill=FRAMES.get(frame, frame))
            sheet.paste(to_picture(picture.convert("RGB"), side=side), (x, y))
            for i, text in enumerate(caption.split("\n")[:2]):
                write(draw, (x + side / 2, y + side + 9 + line * i), text, 12 if i else 14, side + gap - 12,
                      "ma", GREY if i else INK)
    sheet.save(path)


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
            place = view * n_images + row  # view-major
            picture = _crop_picture(crops[kind][place], photometrics, tile)
            if title.startswith("masked"):
                _paint_masked(picture, crops["masks"][place])
            elif labels is not None:
                picture = outline(picture, labels[f"{kind}_crops"][place, 0] > 127)
            sheet.paste(picture, (left, line + gap + row * (tile + gap)))
    sheet.save(path)


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


def confusion_picture(path, confusion, class_names, title):
    """A confusion matrix: each cell its count and share of the row, which is also its shade; recall at the right,
    precision below, accuracy in the corner.

    Args: confusion [C,C] counts, row = true class, column = prediction; class_names: C texts. A class without images
    has no recall and one that is never predicted no precision: '-'.
    """
    counts = np.asarray(confusion).astype(np.int64)                                        # [C,C]
    n, truth, predicted = len(counts), counts.sum(axis=1), counts.sum(axis=0)
    wide, high = int(np.clip(1050 / (n + 1), 86, 190)), int(np.clip(640 / (n + 1), 46, 110))   # of a cell
    big, small = (26, 17) if n <= 5 else (17, 13) if n <= 9 else (14, 12)                  # font sizes
    heads = [textwrap.wrap(str(name).replace("_", " "), wide // 7, break_long_words=False, max_lines=2,
                           placeholder="…")
             for name in class_names]
    above = 32 + 17 * max(len(lines) for lines in heads)       # room for the column names
    gap, left = 10, MARGIN + 12 + int(min(180, max(80, *(font(14).getlength(str(name)) for name in class_names))))
    sheet, draw, top = paper(left + gap + (n + 1) * wide + MARGIN, above + gap + (n + 1) * high + 34, title)
    top += above

    def corner(row, column):                                   # row or column n: the margin of the matrix
        return left + column * wide + gap * (column == n), top + row * high + gap * (row == n)

    def cell(row, column, lines, fill="#ffffff", inks=(INK, GREY)):
        x, y = corner(row, column)
        draw.rectangle([x, y, x + wide - 3, y + high - 3], fill=fill, outline=RULE)
        for i, text in enumerate(lines):
            down = high / 2 - 1 + (i - (len(lines) - 1) / 2) * high * 0.38
            write(draw, (x + wide / 2 - 1, y + down), text, small if i else big, wide - 8, "mm", inks[i])

    def percent(part, whole):
        return f"{100 * part / whole:.1f} %" if whole else "-"

    for r in range(n):
        for c in range(n):
            share = counts[r, c] / max(truth[r], 1)
            inks = ("#b5b5b5",) if counts[r, c] == 0 else ("white",) * 2 if share > 0.6 else (INK, INK)
            cell(r, c, [f"{counts[r, c]:,}", percent(counts[r, c], truth[r])][:1 + (counts[r, c] > 0)],
                 mix(RIGHT if r == c else WRONG, share), inks)
        cell(r, n, [percent(counts[r, r], truth[r])])
        cell(n, r, [percent(counts[r, r], predicted[r])])
    cell(n, n, [percent(counts.trace(), counts.sum())], "#f0f0f0")
    for i, name in enumerate(class_names):
        y = corner(i, 0)[1] + high / 2
        write(draw, (left - 12, y - 9), name, 14, left - 12 - MARGIN, "rm")
        write(draw, (left - 12, y + 8), f"n = {truth[i]:,}", 12, anchor="rm", fill=GREY)
        for j, text in enumerate(reversed(heads[i])):
            write(draw, (corner(0, i)[0] + wide / 2, top - 10 - 17 * j), text, 14, wide - 6, "ms")
    write(draw, (left, top - above), "predicted class", 12, fill=GREY)
    write(draw, (left - 12, top - 10), "true class", 12, anchor="rs", fill=GREY)
    write(draw, (corner(0, n)[0] + wide / 2, top - 10), "recall", 14, anchor="ms", fill=GREY)
    write(draw, (left - 12, corner(n, 0)[1] + high / 2), "precision", 14, anchor="rm", fill=GREY)
    write(draw, (left, corner(n, 0)[1] + high + 12), "shade = share of the row; blue = right, orange = wrong; "
          "corner = accuracy", 12, (n + 1) * wide, fill=GREY)
    sheet.save(path)


# ---- maps of features ----

def principal_components(features, n_components):
    """Coordinates along the principal components, largest first: [N,k] fp32 on the features' device, k = n_components
    or what N and D allow. From the smaller of the two Gram matrices, as one of N and D is often small."""
    x = torch.as_tensor(features).detach().float().flatten(1)
    x = x - x.mean(dim=0)                                                                  # [N,D]
    k = min(n_components, *x.shape)
    if x.shape[0] <= x.shape[1]:
        values, vectors = torch.linalg.eigh((x @ x.T).double())                            # ascending: [N], [N,N]
        scores = vectors[:, -k:] * values[-k:].clamp_min(0).sqrt()
    else:
        scores = x.double() @ torch.linalg.eigh((x.T @ x).double())[1][:, -k:]
    scores = scores.flip(1)                                                                # [N,k]
    largest = scores.gather(0, scores.abs().argmax(dim=0, keepdim=True))                   # [1,k]
    return (scores * torch.where(largest < 0, -1.0, 1.0)).float()


def pca_map(features):
    """The plane in which the features spread most. The sign of a component is free; here its largest entry is positive.

    Args: features [N,D], tensor or array. Returns: [N,2] fp32 on the CPU; zeros for a component that N or D lacks.
    """
    scores = principal_components(features, 2)
    return F.pad(scores, (0, 2 - scores.shape[1])).cpu()


def feature_colors(patches, border):
    """Patch features of several images as colours (the PCA picture of DINOv2, arXiv 2304.07193, section 7.5): equal
    parts of different images get equal colours.

    The first principal component of all patches parts foreground from background, cut where the two sides differ most
    (Otsu's threshold); background is the side that has the larger share of the border. Three components of what is
    left are red, green and blue, each from its 1st to its 99th percentile.
    Args: patches [N,P,D]; border [P] bool, the patches at the rim of an image. Returns: [N,P,3] in 0..1, background 0.
    """
    N, P, _ = patches.shape
    first = principal_components(patches.flatten(0, 1), 1)[:, 0].cpu().numpy()             # [N*P]
    order = np.sort(first)
    n = np.arange(1, N * P)
    sums = np.cumsum(order)[:-1]
    between = (sums / n - (order.sum() - sums) / (N * P - n)) ** 2 * n * (N * P - n)
    above = first > order[between.argmax()]
    rim = np.tile(np.asarray(border), N)
    front = above if above[rim].mean() <= above[~rim].mean() else ~above
    colors = np.zeros((N * P, 3))
    if front.sum() > 3:
        scores = principal_components(patches.flatten(0, 1)[torch.from_numpy(front)], 3).cpu().numpy()
        low, high = np.percentile(scores, (1, 99), axis=0)
        colors[front, :scores.shape[1]] = ((scores - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return colors.reshape(N, P, 3)


def affinities(distances, perplexity):
    """P of t-SNE: in each row a Gaussian of the precision that makes exp(entropy) = perplexity, found by bisection;
    then symmetric, p_ij = (p_j|i + p_i|j) / 2N. The paper's equation 1 and section 3.1.

    Args: distances [N,N] squared. Returns: [N,N], sums to 1, diagonal 0.
    """
    d = (distances / distances.mean().clamp_min(1e-12)).fill_diagonal_(math.inf)
    d = (d - d.amin(dim=1, keepdim=True)).fill_diagonal_(1e30)    # the factor cancels in p; not inf, as 0 * inf is NaN
    low = torch.zeros_like(d[:, :1])                                                       # [N,1]
    high, beta = torch.full_like(low, math.inf), torch.ones_like(low)                      # beta = 1 / (2 sigma^2)
    for _ in range(50):
        p = (d * -beta).exp_()
        total = p.sum(dim=1, keepdim=True)
        entropy = total.log() + beta * (d * p).sum(dim=1, keepdim=True) / total            # [N,1] nats
        too_flat = entropy > math.log(perplexity)
        low, high = torch.where(too_flat, beta, low), torch.where(too_flat, high, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    p /= total
    return (p + p.T) / (2 * len(p))


@torch.no_grad()
def tsne_map(features, perplexity=30.0, n_iterations=500, seed=0):
    """Exact t-SNE (van der Maaten and Hinton, JMLR 2008, algorithm 1) of the first 50 principal components, from a PCA
    start and with scikit-learn's learning rate. Neighbours stay together; how large groups are and how far apart means
    nothing.

    Time and memory grow with N^2: N up to about 2000 is the caller's duty. Args: features [N,D], tensor or array;
    perplexity: how many neighbours count, at most (N - 1) / 3; seed: of the tiny noise that parts identical images.
    Returns: [N,2] fp32 on the CPU, the same each time; PCA where N < 4.
    """
    x = principal_components(features, 50)                                                 # [N,50]
    n = len(x)
    if n < 4:
        return pca_map(x)
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()    # by mm, near ones would be 0
    P = affinities(distances, min(perplexity, (n - 1) / 3))                                # [N,N]
    y = F.pad(x, (0, max(0, 2 - x.shape[1])))[:, :2]
    y = 1e-4 * y / y[:, 0].std().clamp_min(1e-12)                                          # [N,2]
    y = y + 1e-6 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).to(x)
    exaggeration, n_early = 12, min(250, n_iterations // 2)    # P counts more while groups form
    lr = max(n / exaggeration / 4, 50)
    ones = torch.ones_like(y[:, :1])
    for iteration in range(n_iterations):
        early = iteration < n_early
        if iteration in (0, n_early):                          # both phases start at rest, as in scikit-learn
            velocity, gains, target = torch.zeros_like(y), torch.ones_like(y), P * (exaggeration if early else 1)
        squares = y.square().sum(dim=1, keepdim=True)                                      # [N,1]
        # 1 / (1 + |y_i - y_j|^2) from one product of thin matrices, which is what makes this quick
        kernel = (torch.cat([-2 * y, squares, ones], dim=1) @ torch.cat([y, ones, squares + 1], dim=1).T).reciprocal_()
        kernel.fill_diagonal_(0)                                                           # [N,N]
        # equation 5: gradient_i = 4 sum over j of (p_ij - q_ij) kernel_ij (y_i - y_j), q = kernel / its sum
        force = torch.sub(target, kernel, alpha=1 / float(kernel.sum())).mul_(kernel)      # [N,N]
        gradient = 4 * (force.sum(dim=1, keepdim=True) * y - force @ y)                    # [N,2]
        gains = torch.where(gradient * velocity < 0, gains + 0.2, gains * 0.8).clamp_min_(0.01)
        velocity = (0.5 if early else 0.8) * velocity - lr * gains * gradient
        y = y + velocity
        y = y - y.mean(dim=0)                                  # keeps the squares small, and with them their rounding
    return y.cpu()


def scatter_picture(path, panels, labels, class_names, title):
    """Maps of the same N images side by side, a dot for each image in the colour of its class, one legend with counts.

    Both axes of a panel have one scale, as distances are meant, and no ticks, as they have no unit. Dots are
    see-through where there are many. Args: panels: a list of (title, points [N,2]); labels [N] int, of class_names.
    """
    labels = np.asarray(labels).astype(np.int64)                                           # [N]
    present = [(c, int((labels == c).sum())) for c in range(len(class_names)) if (labels == c).any()]
    panels = [(name, np.asarray(points, dtype=np.float64)) for name, points in panels]     # [N,2] each
    spans = [np.ptp(points, axis=0).clip(1e-12) for _, points in panels]                   # [2] each: of x, of y
    wide = min(720, 1264 // len(panels) - MARGIN)
    high = int(wide * np.clip(max(span[1] / span[0] for span in spans), 0.6, 1))           # no wide strips of nothing
    alpha = 255 if len(labels) <= 100 else 170
    radius = np.clip(75 / max(len(labels), 1) ** 0.5, 3, 6) * (wide / 720) ** 0.5
    order = np.random.default_rng(0).permutation(len(labels))  # else the last class would lie on top of the others
    left = MARGIN + len(panels) * (wide + MARGIN)
    sheet, draw, top = paper(left + 240, 30 + max(high, 26 * len(present)), title)
    top += 30
    for i, ((name, points), span) in enumerate(zip(panels, spans)):
        x = MARGIN + i * (wide + MARGIN)
        scale = min((wide - 40) / span[0], (high - 40) / span[1])
        places = (points - points.min(axis=0) - span / 2) * scale * (1, -1) + (wide / 2, high / 2)     # y points up

        def paint(canvas, factor, places=places):
            for label, (px, py) in zip(labels[order], places[order]):
                canvas.circle((px * factor, py * factor), radius * factor, fill=(*class_color(label), alpha))

        write(draw, (x, top - 26), name, 17, wide)
        draw.rectangle([x, top, x + wide - 1, top + high - 1], outline=RULE)
        smooth(sheet, (x, top, x + wide, top + high), paint)
    for i, (c, count) in enumerate(present):
        y = top + 26 * i
        smooth(sheet, (left, y, left + 14, y + 24),
               lambda canvas, factor: canvas.circle((6 * factor, 12 * factor), 6 * factor, fill=class_color(c)))
        used = write(draw, (left + 20, y + 12), class_names[c], 14, 150, "lm")
        write(draw, (left + 28 + used, y + 12), f"{count:,}", 12, anchor="lm", fill=GREY)
    sheet.save(path)


# ---- curves ----

def nice_ticks(low, high, n=6):
    """Up to n + 1 round numbers within [low, high], the multiples of 1, 2, 2.5 or 5 times a power of ten, each with its
    text: [(value, text)], all with the decimals of the step."""
    power = 10.0 ** math.floor(math.log10((high - low) / n))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power * n >= (high - low) * 0.999)
    decimals = len(f"{step:.10f}".rstrip("0").split(".")[1])
    return [(i * step, f"{i * step:.{decimals}f}")
            for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def draw_panel(sheet, draw, box, lines, x_range, name, unit, least, most, start_line):
    """One panel of curves_picture within box (left, top, right, bottom). Args: lines: [(label, {iteration: value})];
    x_range: first and last iteration; the others: a row of PANELS."""
    x0, y0, x1, y1 = box[0] + 62, box[1] + 52, box[2] - 24, box[3] - 58                    # the axes
    values = [value for _, line in lines for value in line.values()]
    size = max(abs(value) for value in values)
    one = 1000.0 ** math.floor(math.log10(size) / 3) if 0 < size < 0.01 else 1.0           # 50 millionths, not 0.00005
    span = max(values) - min(values)
    pad = max(span * 0.06, (least - span) / 2, size * 1e-3, 1e-9)
    low, high = min(values) - pad, min(max(values) + pad, most)
    colors = [INK if label == "total" else class_color(i - (len(lines) > 1)) for i, (label, _) in enumerate(lines)]

    def move_or_shard(iteration, value):                               # in pixels of the sheet
        return (x0 + (iteration - x_range[0]) / (x_range[1] - x_range[0]) * (x1 - x0),
                y1 - (value - low) / (high - low) * (y1 - y0))

    def paint(canvas, factor):                                 # its paper begins 4 pixels outside of the axes
        if start_line:
            y = round(move_or_shard(0, values[0])[1] - y0 + 4) * factor + factor // 2              # on whole pixels: crisp
            for x in range(4 * factor, (x1 - x0 + 4) * factor, 10 * factor):
                canvas.line([x, y, x + 6 * factor, y], fill=GREY, width=factor)
        for color, (_, line) in zip(colors, lines):
            dots = [((x - x0 + 4) * factor, (y - y0 + 4) * factor) for x, y in (move_or_shard(*item) for item in line.items())]
            canvas.line(dots, fill=color, width=round((2 if len(dots) < 300 else 1.4) * factor), joint="curve")
            for dot in dots if len(dots) <= 40 else ():        # few are measurements, many are a curve
                canvas.circle(dot, 3 * factor, fill=color)

    for tick, text in nice_ticks(low / one, high / one):
        y = round(move_or_shard(0, tick * one)[1])
        draw.line([x0, y, x1, y], fill=RULE)
        write(draw, (x0 - 8, y), text, 12, x0 - box[0] - 8, "rm", GREY)
    for tick, text in nice_ticks(*x_range):
        x = round(move_or_shard(tick, low)[0])
        draw.line([x, y1, x, y1 + 4], fill=GREY)
        write(draw, (x, y1 + 8), text, 12, anchor="ma", fill=GREY)
    draw.line([x0, y0, x0, y1, x1, y1], fill=GREY)
    smooth(sheet, (x0 - 4, y0 - 4, x1 + 5, y1 + 5), paint)
    write(draw, ((x0 + x1) / 2, y1 + 26), "iteration", 12, anchor="ma", fill=GREY)
    write(draw, (x0, box[1]), name, 17)
    remark = f"start {values[0]:.3f} (dashed), best {max(values):.3f}, last {values[-1]:.3f}" if start_line else \
        f"last {values[-1] / one:.3g}" if len(lines) == 1 else ""
    write(draw, (x1, box[1] + 4), remark, 12, anchor="ra", fill=GREY)
    write(draw, (x0, box[1] + 28), unit if one == 1 else f"in units of {one:g}", 12, fill=GREY)
    x = x0
    for color, (label, _) in zip(colors, lines):
        if label:
            draw.rectangle([x, box[1] + 34, x + 12, box[1] + 37], fill=color)
            x += 29 + write(draw, (x + 17, box[1] + 28), label, 12)


def curves_picture(path, records, title):
    """The curves of a run: loss terms, k-NN accuracy (dashed: its first value, so that harm is visible), health, lr.

    Args: records: the dicts of the run's log.jsonl; any field may be missing in any of them. Loss terms that are 0
    throughout, numbers that are not finite and panels without a number are left out.
    """
    panels = []
    for fields, *about in PANELS:
        lines = [(label, {r["iteration"]: r[field] for r in records if math.isfinite(r.get(field, math.nan))})
                 for field, label in fields.items()]
        if lines := [(label, line) for label, line in lines if line and (not label or any(line.values()))]:
            panels.append((lines, about))
    iterations = [r["iteration"] for r in records] or [0]
    x_range = min(iterations), max(max(iterations), min(iterations) + 6)                    # whole numbers on its axis
    n_columns, wide, high = 2 if len(panels) in (1, 2, 4) else 3, 460, 310
    sheet, draw, top = paper(n_columns * wide + 2 * MARGIN, math.ceil(len(panels) / n_columns) * high, title)
    for i, (lines, about) in enumerate(panels):
        x, y = MARGIN + i % n_columns * wide, top + i // n_columns * high
        draw_panel(sheet, draw, (x, y, x + wide, y + high), lines, x_range, *about)
    sheet.save(path)
