"""Where slices lie in their volumes: neighbours, and a measure of features that needs no labels.

A frozen network's CLS feature of a slice should tell whether the slice shows the lung or the
pelvis. evaluate.py prints how well a linear map of the features does, on volumes of other patients.
"""
import math

import numpy as np

from configurator import UserError
from labels import cut_tenth

PENALTIES = np.logspace(-5, 2, 15)  # of fit_positions, per slice


# ---- slices of a volume ----

def rows_of_volumes(volume):
    """The indices of the slices of each volume, a list of int arrays. volume [N] int: number of the
    volume, -1 = a picture of no volume."""
    order = np.argsort(volume, kind="stable")
    starts = np.flatnonzero(np.diff(volume[order])) + 1
    parts = np.split(order, starts)
    return [rows for rows in parts if len(rows) > 0 and volume[rows[0]] >= 0]


def slabs_of(dataset, slab_mm):
    """The slices within slab_mm of each slice, in its volume and with itself.

    Args: dataset: with volume [N] int, -1 = none, and position_mm [N] float, nan = none.
    Returns: (order, first, last), each [N] int32: the slab of slice i is order[first[i]:last[i]].
    Raises UserError if no slice has another one so near.
    """
    n = len(dataset)
    volume, position_mm = dataset.volume, dataset.position_mm
    if volume is None or position_mm is None or not np.isfinite(position_mm).any():
        raise UserError(f"slab_mm={slab_mm}: {dataset.name} has no slices with positions, as DICOM "
                        "series and NIfTI files have; set slab_mm to 0")
    order = np.lexsort((position_mm, volume)).astype(np.int32)  # nan last
    first = np.empty(n, np.int32)
    first[order] = np.arange(n)  # a slice without a position is its own slab
    last = first + 1
    reach = slab_mm + 1e-3  # positions are float32
    for rows in rows_of_volumes(volume[order]):
        mm = position_mm[order[rows]].astype(np.float64)
        is_known = np.isfinite(mm)
        known, mm = order[rows[is_known]], mm[is_known]
        first[known] = rows[0] + np.searchsorted(mm, mm - reach, side="left")
        last[known] = rows[0] + np.searchsorted(mm, mm + reach, side="right")
    if (last - first).max() == 1:
        raise UserError(f"slab_mm={slab_mm}: no slice of {dataset.name} has another one so near; "
                        "give more than the distance of two slices, or 0")
    return order, first, last


def hold_out_splits(train, splits, open_split, seed):
    """The splits of a data set without labels, for what is measured without.

    A split that is missing is a tenth of train, by patient. Args: train: Dataset; splits: names of
    test splits; open_split(name) -> Dataset. Returns: train, another tenth of it, {split: Dataset},
    sentences for the log.
    """
    tests, notes = {}, ["no labels: only what needs none is measured"]

    def cut(split):
        rest, tenth = cut_tenth(len(train), seed, train.groups)
        return train.subset(rest, "train"), train.subset(tenth, split)
    for split in splits:
        if split in train.splits:
            tests[split] = open_split(split)
        else:
            train, tests[split] = cut(split)
            notes.append(f"no {split} split: a tenth of train by patient, {len(tests[split])} "
                         f"images, seed {seed}, which a run of this seed has not trained on if "
                         "there is no val")
    train, tenth = cut("train")
    return train, tenth, tests, notes


# ---- the place of a slice from its features ----

def relative_positions(position_mm, volume):
    """Positions in mm [N] as shares of their volume [N] float64: 0 = the first slice, 1 = the last.

    nan for a slice without a position, a picture of no volume, and a volume of one position. If no
    position of a volume is known, as in plain arrays, its slices count in the order of the data
    set. volume [N] int, -1 = no volume.
    """
    relative = np.full(len(position_mm), np.nan)
    position_mm = np.asarray(position_mm, dtype=np.float64)
    for rows in rows_of_volumes(np.asarray(volume)):
        mm = position_mm[rows]
        if not np.isfinite(mm).any():
            mm = np.arange(len(rows))
        low, high = np.nanmin(mm), np.nanmax(mm)
        if high > low:
            relative[rows] = (mm - low) / (high - low)
    return relative


def fit_positions(features, positions, volume):
    """Ridge regression from features to slice positions. It minimises over w [D] and b

        sum over slices of (x w + b - position)^2  +  penalty * N * |w|^2,    x standardised

    The penalty is the one of PENALTIES with the least squared error when each volume in turn is
    left out. That error is exact without a new fit: (I - H)^-1 r, with the volume's residuals r and
    its block H of the hat matrix.
    Args: features [N,D]; positions [N] float, finite; volume [N] int, at least two volumes.
    Returns: (predict, penalty): predict(features [M,D]) -> positions [M] float64.
    """
    x = np.asarray(features, dtype=np.float64)
    mean, std = x.mean(axis=0), x.std(axis=0)
    std = np.where(std > 1e-8, std, 1.0)  # a constant feature must not divide by 0
    x, n, b = (x - mean) / std, len(x), positions.mean()
    variances, axes = np.linalg.eigh(x.T @ x)  # [D], [D,D]
    z = x @ axes  # [N,D]
    target, best = z.T @ (positions - b), None
    for penalty in PENALTIES:
        shrink = 1 / (np.maximum(variances, 0) + penalty * n)  # [D]
        residuals, error = positions - b - z @ (shrink * target), 0.0
        for rows in rows_of_volumes(volume):
            hat = z[rows] * shrink @ z[rows].T + 1 / n  # [n,n] of the volume; 1 / n: of b
            left_out = np.linalg.solve(np.eye(len(rows)) - hat, residuals[rows])
            error += left_out @ left_out
        if best is None or error < best[0]:
            best = (error, penalty, axes @ (shrink * target))
    _, penalty, w = best

    def predict(features):
        return (np.asarray(features, dtype=np.float64) - mean) / std @ w + b
    return predict, float(penalty)


def r_squared(predictions, targets):
    """1 - sum of (target - prediction)^2 / sum of (target - mean target)^2: 1 = exact, 0 = no
    better than the mean, negative = worse. [N] float each."""
    residual = ((targets - predictions)**2).sum()
    return float(1 - residual / ((targets - targets.mean())**2).sum())


def position_r2(train_features, train_positions, train_volume, test_features, test_positions):
    """R^2 (r_squared) of fit_positions on slices of other volumes: how well a linear map of the
    features tells where in the body a slice lies. Features [N,D] and [M,D]; positions, of
    relative_positions, finite."""
    predict, _ = fit_positions(train_features, train_positions, train_volume)
    return r_squared(predict(test_features), test_positions)


def kendall_tau(predictions, positions, volume):
    """Kendall's tau-b of the predicted order of slices against the true one, mean over volumes.

        tau = sum over pairs i < j of sign(p_i - p_j) sign(t_i - t_j)  /  sqrt(n_p n_t)

    n_p, n_t: number of pairs that differ in the prediction, in the position. 1 = the right order, 0
    = none, -1 = reversed. Args: [N] float, [N] float, [N] int. Returns: nan without a volume that
    has two positions and two predictions.
    """
    taus = []
    for rows in rows_of_volumes(volume):
        p = np.sign(predictions[rows, None] - predictions[None, rows])  # [n,n], each pair twice
        t = np.sign(positions[rows, None] - positions[None, rows])
        n_differ = np.abs(p).sum() * np.abs(t).sum()
        if n_differ > 0:
            taus.append((p * t).sum() / np.sqrt(n_differ))
    return float(np.mean(taus)) if taus else math.nan


def slice_position(train, train_set, test, test_set):
    """What features know of the place of a slice, on volumes that the fit has not seen.

    Args: train, test: dicts of features.collect_features with cls [n,D], of the Datasets
    train_set and test_set.
    Returns: dict of r2 (position_r2), tau (kendall_tau), penalty, n_volumes (those of test), or {}
    if train has less than two volumes of several slices, or test has none.
    """
    parts = []
    for collected, dataset in ((train, train_set), (test, test_set)):
        if dataset.volume is None:
            return {}
        mm = dataset.position_mm
        if mm is None:
            mm = np.full(len(dataset), np.nan)
        relative = relative_positions(mm, dataset.volume)[collected["indices"]]
        volume = np.asarray(dataset.volume)[collected["indices"]]
        known = np.isfinite(relative)
        cls = collected["cls"].cpu().numpy()
        parts.append((cls[known], relative[known], volume[known]))
    (x, positions, volume), (x_test, truth, test_volume) = parts
    if len(np.unique(volume)) < 2 or len(truth) == 0:
        return {}
    predict, penalty = fit_positions(x, positions, volume)
    predictions = predict(x_test)
    return dict(r2=r_squared(predictions, truth), penalty=penalty,
                tau=kendall_tau(predictions, truth, test_volume),
                n_volumes=len(np.unique(test_volume)))
