"""What masks show, found in heatmaps and in patch tokens.

Lesions in heatmaps are regions above thresholds, compared with a mask (paper section 3.2). The
heatmap may come from anywhere. The patch probe finds the masks' classes in patch tokens.
Everything is counted in patches, the pixels of a heatmap.
"""
import itertools
import math

import numpy as np
import torch

from features import stream_features
from metrics import average_precision, weighted_auc
from probe import fit_probe

PATCHES = 20_000  # number of patches that a patch probe learns from, drawn by seed
NEIGHBOURS = list(itertools.product((-1, 0, 1), repeat=2))  # (dy, dx), with the patch itself


def clusters(on):
    """The connected clusters of a [h,w] bool array, diagonal neighbours included: list of [n,2] int
    (row, column)."""
    remaining = {tuple(patch) for patch in np.argwhere(on).tolist()}
    found = []
    for patch in sorted(remaining):
        if patch not in remaining:  # in an earlier cluster
            continue
        remaining.remove(patch)
        cluster = [patch]
        for y, x in cluster:  # the list grows while it is read
            near = {(y + dy, x + dx) for dy, dx in NEIGHBOURS} & remaining
            cluster += sorted(near)
            remaining -= near
        found.append(np.array(sorted(cluster)))
    return found


def scaled(heatmap, scale):
    """A heatmap in 0..1. scale: the values (low, high) that become 0 and 1; () = the smallest and
    the largest value of the heatmap."""
    low, high = scale or (heatmap.min(), heatmap.max())
    span = high - low if high > low else 1
    return ((heatmap - low) / span).clip(0, 1)


def detect(heatmap, low=0.3, high=0.7):
    """Regions of a heatmap by hysteresis: connected patches of at least `low`, at least one of them
    of at least `high`. The two thresholds are the paper's (section 3.2, Figure 10).

    Args: heatmap [h,w], array or tensor, meant in 0..1.
    Returns: list of regions, the strongest first, each a dict of box (left, top, right, bottom) in
    patches, right and bottom exclusive (times the patch size it is in pixels); area in patches;
    score, the largest value; patches [n,2] int (row, column); values [n], of the heatmap in these
    patches; grid (h, w).
    """
    heatmap = np.asarray(heatmap, dtype=np.float64)
    regions = []
    for patches in clusters(heatmap >= low):
        values = heatmap[tuple(patches.T)]
        if values.max() < high:
            continue
        top, left = patches.min(axis=0).tolist()
        bottom, right = (patches.max(axis=0) + 1).tolist()
        regions.append(dict(box=(left, top, right, bottom), area=len(patches),
                            score=float(values.max()), patches=patches, values=values,
                            grid=heatmap.shape))
    return sorted(regions, key=lambda region: -region["score"])


def labelled_patches(mask, grid):
    """Which patches of a grid (h, w) have a labelled pixel: mask [H,W], non-zero = labelled ->
    [h,w] bool. One pixel is enough, because lesions may be smaller than a patch. A pixel that two
    patches share counts for both."""
    H, W = mask.shape
    h, w = grid
    is_label = np.asarray(mask) != 0
    sums = is_label.cumsum(axis=0).cumsum(axis=1)
    sums = np.pad(sums, ((1, 0), (1, 0)))  # [H+1,W+1], of the pixels above and to the left
    rows, columns = np.arange(h), np.arange(w)
    top, bottom = rows * H // h, -(-(rows + 1) * H // h)
    left, right = columns * W // w, -(-(columns + 1) * W // w)
    bands = sums[bottom] - sums[top]  # [h,W+1]
    return bands[:, right] - bands[:, left] > 0


def detection_metrics(regions, mask, min_iou=0.1):
    """How well the regions of one image find its lesions.

    A lesion is a connected cluster of labelled patches (at least one labelled pixel). A region
    finds a lesion if their intersection over union, in patches, is at least min_iou; so a region
    all over the image finds no small lesion. A region finds at most one lesion, and pairs are made
    from the largest overlap down.
    tp: pairs; fp: regions without a lesion; fn: lesions without a region; precision tp / (tp + fp);
    recall tp / (tp + fn); f1 2 tp / (2 tp + fp + fn). A ratio whose denominator is 0 is 0 if there
    is a region or a lesion, and nan if there is neither.
    localization: the share of the regions' summed heat that lies on labelled patches, nan without
    regions; mass and mass_inside are its denominator and numerator. The paper defines neither its
    overlap nor its localization score.

    Args: regions: of detect; mask [H,W] of pixels or [h,w] of patches, non-zero = labelled.
    Returns: dict.
    """
    grid = regions[0]["grid"] if regions else np.shape(mask)
    labelled = labelled_patches(np.asarray(mask), grid)
    lesions = [set(map(tuple, patches.tolist())) for patches in clusters(labelled)]
    found = [set(map(tuple, region["patches"].tolist())) for region in regions]
    overlaps = []
    for i, region in enumerate(found):
        for j, lesion in enumerate(lesions):
            if shared := region & lesion:
                overlaps.append((len(shared) / len(region | lesion), i, j))
    overlaps.sort(key=lambda item: -item[0])
    used_regions, used_lesions = set(), set()
    for iou, i, j in overlaps:
        if iou >= min_iou and i not in used_regions and j not in used_lesions:
            used_regions.add(i)
            used_lesions.add(j)
    mass = float(sum(region["values"].sum() for region in regions))
    mass_inside = 0.0
    for region in regions:
        is_inside = labelled[tuple(region["patches"].T)]
        mass_inside += float(region["values"][is_inside].sum())
    tp = len(used_lesions)
    return ratios(tp, len(regions) - tp, len(lesions) - tp, mass, mass_inside)


def ratios(tp, fp, fn, mass, mass_inside):
    """The dict of detection_metrics from its counts."""
    undefined = math.nan if tp + fp + fn == 0 else 0.0
    return dict(tp=tp, fp=fp, fn=fn,
                precision=tp / (tp + fp) if tp + fp else undefined,
                recall=tp / (tp + fn) if tp + fn else undefined,
                f1=2 * tp / (2 * tp + fp + fn) if tp + fp + fn else undefined,
                localization=mass_inside / mass if mass > 0 else math.nan,
                mass=mass, mass_inside=mass_inside)


def pool_detections(results):
    """Many images in one: micro = from the summed counts and masses; macro = mean over the images
    whose ratio is defined (an image without lesion and region has no ratio, an image without
    regions no localization).

    Args: results: list of detection_metrics.
    Returns: dict(micro=..., macro=...), nan for a mean over no image.
    """
    counts = ("tp", "fp", "fn", "mass", "mass_inside")
    totals = {key: sum(result[key] for result in results) for key in counts}
    macro = {}
    for key in ("precision", "recall", "f1", "localization"):
        values = [result[key] for result in results if not math.isnan(result[key])]
        macro[key] = float(np.mean(values)) if values else math.nan
    return dict(micro=ratios(**totals), macro=macro)


def patch_metrics(heatmaps, labelled):
    """How well heat ranks the patches, without any threshold.

    Args: heatmaps, labelled: lists of [h,w] float and bool arrays.
    Returns: dict of
    auroc, average_precision: over the patches of all images, so heat has to be comparable between
    images; nan if no patch is labelled.
    pointing: the share of images with a lesion whose hottest patch is labelled. If several patches
    are equally hot, the labelled share of these patches counts.
    chance: the share of labelled patches, which is the average precision at chance level.
    """
    hits = []
    for heatmap, lesion in zip(heatmaps, labelled):
        if lesion.any():
            hits.append(float(lesion[heatmap == heatmap.max()].mean()))
    heat = np.concatenate([heatmap.ravel() for heatmap in heatmaps])
    labels = np.concatenate([lesion.ravel() for lesion in labelled])
    auroc = weighted_auc(heat, labels, np.ones((1, len(heat))))
    pointing = float(np.mean(hits)) if hits else math.nan
    return dict(auroc=float(auroc[0]), average_precision=average_precision(heat, labels),
                pointing=pointing, chance=float(labels.mean()))


# ---- the patch probe ----

def patch_probe(backbone, train, val, tests, values, rng, **settings):
    """How well a linear layer on patch tokens finds what the masks show.

    The probe is a logistic regression from a patch token to the most frequent mask value of its
    patch. It learns from about PATCHES training patches, every class has the same total weight, and
    val chooses the penalty (probe.fit_probe).
    Args: train, val: Datasets with masks; tests: {name: Dataset}; values [c]: mask values, 0 =
    background first; rng: draws the patches; settings: of features.stream_features.
    Returns: {name: list of c Dice over all patches, nan for a class that occurs nowhere}.
    """
    def masked_images(dataset):
        """Yield patch tokens [P,D], on the CPU, and patch classes [P] of each image with a mask."""
        for batch in stream_features(backbone, dataset, with_masks=True, **settings):
            grid = math.isqrt(batch["patches"].shape[1])
            for tokens, mask in zip(batch["patches"].cpu(), batch["masks"]):
                if mask is not None:
                    yield tokens, patch_classes(mask, grid, values)

    def sample(dataset):
        """Tokens [n,D] and classes [n] of equally many patches of every image."""
        n_per_image = math.ceil(PATCHES / len(dataset))
        x, y = [], []
        for tokens, classes in masked_images(dataset):
            kept = np.sort(rng.permutation(len(tokens))[:n_per_image])
            x.append(tokens[kept])
            y.append(classes[kept])
        return torch.cat(x), torch.from_numpy(np.concatenate(y))
    probe, _ = fit_probe(*sample(train), *sample(val), balanced=True)
    result = {}
    for name, dataset in tests.items():
        labels, predictions = [], []
        for tokens, classes in masked_images(dataset):
            labels.append(classes)
            predictions.append(probe(tokens).argmax(dim=1).numpy())
        dice = dice_per_class(np.concatenate(labels), np.concatenate(predictions), len(values))
        result[name] = dice.tolist()
    return result


def patch_classes(mask, grid, values):
    """The most frequent class of every patch.

    Args: mask [S,S] of pixel values; grid: patches per side. If the grid does not divide S, the
    mask is resampled to the next multiple, each pixel from the nearest. values [c]: the pixel
    values that are classes, sorted. Returns: [grid*grid] int, indices into values.
    """
    side = -(-len(mask) // grid) * grid
    if side != len(mask):  # a teacher resizes its input: it has a grid of its own
        nearest = (np.arange(side) + 0.5) * len(mask) / side
        nearest = nearest.astype(int)
        mask = mask[nearest][:, nearest]
    indices = np.searchsorted(values, mask)  # [S,S]
    cells = indices.reshape(grid, len(mask) // grid, grid, -1)  # [g,p,g,p]
    cells = cells.swapaxes(1, 2).reshape(grid * grid, -1, 1)  # [g*g,p*p,1]
    counts = (cells == np.arange(len(values))).sum(axis=1)  # [g*g,c]
    return counts.argmax(axis=1)


def dice_per_class(labels, predictions, n_classes):
    """Dice 2 |A and B| / (|A| + |B|) of every class, [c] float; nan for a class that occurs in
    neither. labels, predictions: [N] int."""
    correct = labels[labels == predictions]
    shared = np.bincount(correct, minlength=n_classes)
    size = np.bincount(labels, minlength=n_classes)
    size = size + np.bincount(predictions, minlength=n_classes)
    undefined = np.full(n_classes, np.nan)
    return np.divide(2 * shared, size, out=undefined, where=size > 0)
