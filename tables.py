"""Tables as text: Markdown that reads well in a terminal, and values that json can write."""
import math
import os

import numpy as np

from metrics import DINO_KNN

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
MORE_COLUMNS += [(f"k={k}, T={t}", f"knn_dino_{k}", "accuracy") for k, t in DINO_KNN]


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


def tabulate(networks, split, mask_names):
    """All tables of one test split as text. Networks of one group share a row: the mean over them
    (standard deviation).

    Args: networks: dicts of features.find_networks with results, {split: {probe: {metric: value}}}
    of evaluate.measure; mask_names: names of the mask's classes, the background first.
    """
    groups = {}
    for network in networks:
        groups.setdefault(network["group"], []).append(network)
    groups = list(groups.values())
    titles = _row_titles(groups)

    def table(columns):
        rows = []
        for group, title in zip(groups, titles):
            results = [network["results"][split] for network in group]
            rows.append(title + [_cell(results, probe, metric) for _, probe, metric in columns])
        return markdown(["Model", "Adaptation", *(header for header, _, _ in columns)], rows)

    text = f"{table(PAPER_COLUMNS)}\n\n{table(MORE_COLUMNS)}\n"
    if "dice" in networks[0]["results"][split]:
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


def _cell(results, probe, metric):
    """A number of one group as text, '-' if it is missing or nan.

    Args: results: of each network {probe: {metric: value}}; metric: a name, or for Dice the index
    of a class. An interval (name in _ci) is the mean of the lower and of the upper ends.
    """
    if metric == "accuracy_ci":
        ends = [result[probe].get(metric) for result in results]
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


def _changes(networks, split):
    """A line for each run and probe: the change of accuracy from the run's start. A run that harms
    its features must not go unnoticed."""
    by_name = {network["name"]: network["results"][split] for network in networks}
    text = ""
    for network in networks:
        if "start" not in network:
            continue
        for probe, title in (("linear", "linear probe"), ("knn", "k-NN")):
            before = by_name[network["start"]][probe]["accuracy"]
            change = network["results"][split][probe]["accuracy"] - before
            text += f"\n- {network['name']}: {title} {change:+.3f} against its start"
            if change < -0.005:
                text += "  !!!! BELOW THE START !!!!"
    return text
