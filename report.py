"""Tables as text: Markdown that reads well in a terminal, .csv, and values that json can write."""
import csv
import math
import os
import re

import numpy as np

from metrics import DINO_KNN
from verdict import TITLES

# Columns of evaluate.py's tables: header, probe, metric
PAPER_COLUMNS = [  # the layout of the paper's Tables 5 to 8
    ("Probe accuracy", "linear", "accuracy"), ("precision", "linear", "precision_weighted"),
    ("F1", "linear", "f1_weighted"), ("k-NN accuracy", "knn", "accuracy"),
    ("precision", "knn", "precision_weighted"), ("F1", "knn", "f1_weighted")]
MORE_COLUMNS = [
    ("Probe AUC", "linear", "auc"), ("balanced", "linear", "balanced_accuracy"),
    ("accuracy 95 %", "linear", "accuracy_ci"), ("CLS+patches", "linear_cls_patch", "accuracy"),
    ("k-NN AUC", "knn", "auc"), ("balanced", "knn", "balanced_accuracy"),
    ("accuracy 95 %", "knn", "accuracy_ci")]
BLOCKS_SUFFIX = "_blocks"  # of the probes on the readout of several blocks
MORE_COLUMNS += [(f"k={k}, T={t}", f"knn_dino_{k}", "accuracy") for k, t in DINO_KNN]

LABEL_FREE_COLUMNS = [(title, "label_free", name) for name, title in TITLES.items()
                      if name != "position_r2"]  # evaluate.py has another, of all test slices
POSITION_COLUMNS = [("R2 of slice position", "position", "r2"),
                    ("tau of slice order", "position", "tau")]


def markdown(header, rows):
    """A table in Markdown, from lists of cells; columns are padded to equal width."""
    lines = [header, *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    text = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def jsonable(value):
    """Nested dicts and lists with None for nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def in_words(results, k):
    """The main numbers of a network as one line. results: of evaluate.measure; k: of its k-NN."""
    columns = [(f"{k}-NN", "knn", "accuracy"), ("linear probe", "linear", "accuracy")]
    said = []
    for split, result in results.items():
        for title, probe, metric in columns + POSITION_COLUMNS + LABEL_FREE_COLUMNS[:2]:
            if probe in result:
                said.append(f"{split} {title} {result[probe][metric]:.4f}")
    return ", ".join(said)


def tabulate(networks, split, mask_names):
    """All tables of one test split as text. Networks of one group share a row: the mean over them
    (standard deviation).

    Args: networks: dicts of networks.find_networks with results, {split: {probe: {metric: value}}}
    of evaluate.measure, and blocks, a list of numbers (with several, the group has a second row);
    mask_names: names of the mask's classes, the background first.
    """
    groups = {}
    for network in networks:
        groups.setdefault(network["group"], []).append(network)
    groups = list(groups.values())
    titles = _row_titles(groups)

    def table(columns):
        rows = []
        for group, (model, kind) in zip(groups, titles):
            results = [network["results"][split] for network in group]
            lines = [(kind, "")]
            if any(len(network["blocks"]) > 1 for network in group):
                lines.append((f"{kind}, several blocks", BLOCKS_SUFFIX))
            for text, suffix in lines:
                cells = [cell(results, probe + suffix, metric) for _, probe, metric in columns]
                if suffix == "" or set(cells) != {"-"}:
                    rows.append([model, text, *cells])
        return markdown(["Model", "Adaptation", *(header for header, _, _ in columns)], rows)

    text, measured = "", networks[0]["results"][split]
    if "linear" in measured:
        text = f"{table(PAPER_COLUMNS)}\n\n{table(MORE_COLUMNS)}\n"
    if "label_free" in measured:
        n = measured["label_free"]["images"]
        text += (f"\n{table(LABEL_FREE_COLUMNS)}\nWithout labels, on {n} images: retrieval, LiDAR "
                 "and alignment of random crops, the others of whole images (verdict.py, "
                 "metrics.py). Lower is better for uniformity and alignment.\n")
    if "position" in measured:
        n = measured["position"]["n_volumes"]
        text += (f"\n{table(POSITION_COLUMNS)}\nPlace of a slice in its volume, 0 to 1, by ridge "
                 f"regression from CLS, on {n} other volumes; Kendall's tau of the order of the "
                 "slices in a volume.\n")
    if "dice" in measured:
        classes = list(enumerate(mask_names))[1:]
        columns = [(f"Dice of {name}", "dice", c) for c, name in classes]
        text += (f"\n{table(columns)}\nDice over patches, each of the class that most of its "
                 "pixels have; '-': no patch is of that class.\n")
    return text + _changes(networks, split) + "\n"


def _row_titles(groups):
    """[model, adaptation] of each group; groups with equal titles get their name behind."""
    titles = []
    for group in groups:
        seeds = f", {len(group)} seeds" if len(group) > 1 else ""
        titles.append([group[0]["model"], group[0]["adaptation"] + seeds])
    distinct = []
    for group, (model, kind) in zip(groups, titles):
        if titles.count([model, kind]) > 1:
            names = [os.path.basename(network["name"].rstrip("/")) for network in group]
            kind += f" ({os.path.commonprefix(names)})"
        distinct.append([model, kind])
    return distinct


def cell(results, probe, metric):
    """A number of one group as text, '-' if it is missing or nan.

    Args: results: of each network {probe: {metric: value}}; metric: a name, or for Dice the index
    of a class. An interval (name in _ci) is the mean of the lower and of the upper ends.
    """
    if metric == "accuracy_ci":
        ends = [result.get(probe, {}).get(metric) for result in results]
        if None in ends or np.isnan(ends).any():  # without a bootstrap, or of one patient
            return "-"
        low, high = np.mean(ends, axis=0)
        return f"{low:.2f}-{high:.2f}"
    values = [result[probe][metric] for result in results if probe in result]
    if not values or not np.isfinite(values).all():
        return "-"
    text = f"{np.mean(values):.3f}"
    if len(values) > 1:
        text += f" ({np.std(values, ddof=1):.3f})"
    return text


def cells(networks, names, *columns):
    """A cell for each (probe, metric) of columns, the mean over the networks of these names.
    networks: {name: dict with results, {probe: {metric: value}}}."""
    results = [networks[name]["results"] for name in names]
    return [cell(results, *column) for column in columns]


def _changes(networks, split):
    """A line for each run and probe: the change of accuracy from the run's start. A run that harms
    its features must not go unnoticed."""
    by_name = {network["name"]: network["results"][split] for network in networks}
    text = ""
    for network in networks:
        if "start" not in network:
            continue
        for probe, title in (("linear", "linear probe"), ("knn", "k-NN")):
            if probe not in network["results"][split]:
                continue
            before = by_name[network["start"]][probe]["accuracy"]
            change = network["results"][split][probe]["accuracy"] - before
            text += f"\n- {network['name']}: {title} {change:+.3f} against its start"
            if change < -0.005:
                text += "  !!!! BELOW THE START !!!!"
    return text


# ---- scores of every image ----

def data_title(name):
    """The name of a data set in titles and file names: the last part of its path."""
    return os.path.splitext(os.path.basename(name.rstrip("/")))[0]


def name_classes(data):
    """The names of all classes that occur in a split, numbers for those without a name."""
    names, n_classes = list(data["train"].class_names), 0
    if data["train"].labels is None:
        return []
    for dataset in data.values():
        labels = np.asarray(dataset.labels)
        here = labels.shape[1] if labels.ndim == 2 else labels.max() + 1
        n_classes = max(n_classes, here)
    return names + [str(c) for c in range(len(names), n_classes)]


def image_names(dataset, indices, private=False):
    """What images are called in tables: their files, or their numbers in the source. private: of a
    data set with groups their numbers in the split, because paths may name patients."""
    if private and dataset.groups is not None:
        return [str(i) for i in indices]
    prefix = f"{dataset.name}, {dataset.split} image "
    return [dataset.path(i).removeprefix(prefix) for i in indices]


def find_copies(collected, data, tests):
    """Notes on test images that are training images as well: those are remembered, not recognised.
    collected: {split: dict of features.collect_features}."""
    notes = []
    for split in tests:
        digests = collected[split]["digests"]
        for other in ("train", "tune"):
            known = set(collected[other]["digests"])
            if n_copies := sum(digest in known for digest in digests):
                notes.append(f"{n_copies} of {len(digests)} {split} images are also in "
                             f"{data[other].split}, pixel for pixel")
    return notes


def write_csv(path, header, rows):
    """A table as .csv, beside its place until it is complete."""
    part = f"{path}.part"
    try:
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def class_text(values, names):
    """A label or a prediction as text: the name of a class, or several joined by |. values: int, or
    [c] 0/1."""
    if np.ndim(values) == 0:
        return names[int(values)]
    return "|".join(name for name, value in zip(names, values) if value)


def probe_rows(names, probs, multi_label, class_names):
    """A row of each image: its name, the predicted class (several of multi-label sets: those above
    0.5) and its probability, the probability of every class. probs [N,c]."""
    rows = []
    for name, row in zip(names, probs):
        chosen = row > 0.5 if multi_label else row.argmax()
        sure = row.max() if multi_label else row[chosen]
        text = class_text(chosen, class_names)
        rows.append([name, text, _short(sure), *map(_short, row)])
    return rows


def _short(value):
    return f"{value:.9g}"


def write_scores(path, networks, split, labels, image_names, train_names, class_names):
    """The scores of every image by every network, a .csv of one row per image and probe: network,
    features (cls, or the blocks of a readout), image, label, prediction and probability of the
    linear probe, prediction of k-NN, p_CLASS for every class, and the nearest training images.

    Args: networks: dicts with scores, {split: {features: dict of probs [N,c], knn [N] or [N,c],
    nearest: [N] lists of indices into train_names}}; labels: [N], or [N,c] for multi-label.
    """
    rows, k = [], 0
    for network in networks:
        for features, scores in network["scores"][split].items():
            probed = probe_rows(image_names, scores["probs"], labels.ndim == 2, class_names)
            for i, (image, chosen, sure, *probs) in enumerate(probed):
                nearest = [train_names[j] for j in scores["nearest"][i]]
                k = len(nearest)
                rows.append([network["name"], features, image, class_text(labels[i], class_names),
                             chosen, sure, class_text(scores["knn"][i], class_names), *probs,
                             *nearest])
    header = ["network", "features", "image", "label", "prediction", "probability",
              "knn_prediction", *(f"p_{name}" for name in class_names),
              *(f"nearest_{i + 1}" for i in range(k))]
    write_csv(path, header, rows)


def write_medmnist(folder, name, size, split, networks):
    """The probabilities of every network as medmnist.Evaluator.parse_and_evaluate reads them: a
    file for each, NAME_SIZE_SPLIT_[AUC]..._[ACC]...@NETWORK.csv of rows (index, score, ...).
    name: of a MedMNIST data set; size: its pixels."""
    os.makedirs(folder, exist_ok=True)
    flag = name if size == 28 else f"{name}_{size}"
    for network in networks:
        for features, scores in network["scores"][split].items():
            suffix = "" if features == "cls" else BLOCKS_SUFFIX
            numbers = network["results"][split][f"linear{suffix}"]
            run = re.sub("[^A-Za-z0-9-]+", "-", network["name"] + suffix).strip("-")
            file_name = (f"{flag}_{split}_[AUC]{numbers['auc']:.3f}_[ACC]"
                         f"{numbers['accuracy']:.3f}@{run}.csv")
            with open(os.path.join(folder, file_name), "w", newline="") as file:
                for i, row in enumerate(scores["probs"]):
                    csv.writer(file).writerow([i, *map(_short, row)])
