"""Lesions in heatmaps: regions above thresholds, and how well they find what a mask shows (paper section 3.2).

Everything is counted in patches, the pixels of a heatmap; where the heat comes from is no matter of this file.
"""
import math

import numpy as np

from metrics import average_precision, weighted_auc


def clusters(on):
    """The connected clusters of a [h,w] bool array, diagonal neighbours included: list of [n,2] int (row, column)."""
    todo, found = {tuple(place) for place in np.argwhere(on).tolist()}, []
    for place in sorted(todo):
        if place in todo:
            todo.remove(place)
            cluster = [place]
            for y, x in cluster:                              # grows while it is read
                near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
                cluster += sorted(near)
                todo -= near
            found.append(np.array(sorted(cluster)))
    return found


def detect(heatmap, low=0.3, high=0.7):
    """Regions of a heatmap by hysteresis: connected patches of at least `low`, among them one of at least `high`.

    The two thresholds are the paper's (section 3.2, Figure 10). Args: heatmap [h,w], array or tensor, meant in 0..1.
    Returns: list of regions, the strongest first, each a dict of box (left, top, right, bottom) in patches, the last
    two exclusive: times the patch size they are pixels; area in patches; score, the largest value; patches [n,2] int
    (row, column); values [n], of the heatmap there; grid (h, w).
    """
    heatmap = np.asarray(heatmap, dtype=np.float64)
    regions = []
    for patches in clusters(heatmap >= low):
        values = heatmap[tuple(patches.T)]
        if values.max() >= high:
            (top, left), (bottom, right) = patches.min(axis=0).tolist(), (patches.max(axis=0) + 1).tolist()
            regions.append(dict(box=(left, top, right, bottom), area=len(patches), score=float(values.max()),
                                patches=patches, values=values, grid=heatmap.shape))
    return sorted(regions, key=lambda region: -region["score"])


def labelled_patches(mask, grid):
    """Which patches of a grid (h, w) have a labelled pixel: mask [H,W], non-zero = labelled -> [h,w] bool. One pixel is
    enough, as lesions may be smaller than a patch; a pixel that two patches share counts for both."""
    (H, W), (h, w) = mask.shape, grid
    sums = np.pad((np.asarray(mask) != 0).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))   # [H+1,W+1]
    top, bottom = np.arange(h) * H // h, -(-(np.arange(h) + 1) * H // h)
    left, right = np.arange(w) * W // w, -(-(np.arange(w) + 1) * W // w)
    return sums[bottom][:, right] - sums[top][:, right] - sums[bottom][:, left] + sums[top][:, left] > 0


def detection_metrics(regions, mask, min_iou=0.1):
    """How well the regions of one image find its lesions.

    A lesion is a connected cluster of labelled patches (at least one labelled pixel). A region finds a lesion when the
    two share min_iou of their common area (intersection over union of patches), so a region all over the image finds
    nothing small; each finds at most one, pairs are made from the largest overlap down. tp: pairs; fp: regions without
    a lesion; fn: lesions without a region; precision tp / (tp + fp), recall tp / (tp + fn), f1 2 tp / (2 tp + fp + fn).
    A ratio of nothing is 0 where there is a region or a lesion, and nan where there is neither.
    localization: the share of the regions' summed heat that lies on labelled patches, nan without regions; mass and
    mass_inside are what it is made of. The paper defines neither its overlap nor its localization score.
    Args: regions: of detect; mask [H,W] of pixels or [h,w] of patches, non-zero = labelled. Returns: dict.
    """
    truth = labelled_patches(np.asarray(mask), regions[0]["grid"] if regions else np.shape(mask))
    lesions = [{tuple(place) for place in cluster.tolist()} for cluster in clusters(truth)]
    found = [{tuple(place) for place in region["patches"].tolist()} for region in regions]
    overlaps = sorted(((len(a & b) / len(a | b), i, j) for i, a in enumerate(found) for j, b in enumerate(lesions)
                       if a & b), key=lambda item: -item[0])
    used_regions, used_lesions = set(), set()
    for iou, i, j in overlaps:
        if iou >= min_iou and i not in used_regions and j not in used_lesions:
            used_regions.add(i)
            used_lesions.add(j)
    mass = float(sum(region["values"].sum() for region in regions))
    inside = float(sum(region["values"][truth[tuple(region["patches"].T)]].sum() for region in regions))
    tp = len(used_lesions)
    return ratios(tp, len(regions) - tp, len(lesions) - tp, mass, inside)


def ratios(tp, fp, fn, mass, mass_inside):
    """The dict of detection_metrics from its counts."""
    nothing = math.nan if tp + fp + fn == 0 else 0.0
    return dict(tp=tp, fp=fp, fn=fn, precision=tp / (tp + fp) if tp + fp else nothing,
                recall=tp / (tp + fn) if tp + fn else nothing,
                f1=2 * tp / (2 * tp + fp + fn) if tp + fp + fn else nothing,
                localization=mass_inside / mass if mass > 0 else math.nan, mass=mass, mass_inside=mass_inside)


def pool_detections(results):
    """Many images in one: micro = from the summed counts and masses; macro = mean over the images where the ratio is
    defined (those without lesion and region have none, and without regions there is no localization).

    Args: results: list of detection_metrics. Returns: dict(micro=..., macro=...), nan for a mean of nothing.
    """
    totals = ratios(*(sum(result[key] for result in results) for key in ("tp", "fp", "fn", "mass", "mass_inside")))
    macro = {}
    for key in ("precision", "recall", "f1", "localization"):
        values = [result[key] for result in results if not math.isnan(result[key])]
        macro[key] = float(np.mean(values)) if values else math.nan
    return dict(micro=totals, macro=macro)


def patch_metrics(heatmaps, truths):
    """How well heat ranks the patches, without any threshold.

    Args: heatmaps, truths: lists of [h,w] float and bool arrays. Returns: dict of auroc and average_precision over the
    patches of all images, so heat has to be comparable between images; pointing: the share of images with a lesion
    whose hottest patch is labelled (of several equally hot ones: the share that is); chance: the share of labelled
    patches, which is the average precision of a guess; nan where a side is empty.
    """
    heat, truth = np.concatenate([x.ravel() for x in heatmaps]), np.concatenate([x.ravel() for x in truths])
    hits = [float(t[x == x.max()].mean()) for x, t in zip(heatmaps, truths) if t.any()]
    return dict(auroc=float(weighted_auc(heat, truth, np.ones((1, len(heat))))[0]),
                average_precision=average_precision(heat, truth), pointing=float(np.mean(hits)) if hits else math.nan,
                chance=float(truth.mean()))
