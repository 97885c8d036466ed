"""How good are the features, and did training help? k-NN, linear probe and patch probe of a run or of released weights.

    python evaluate.py --run=out/phantom                                              # raw pixels, start, end
    python evaluate.py --model_type=facebook/dinov2-small --dataset_path=pathmnist    # weights as they are
    python evaluate.py --compare="facebook/dinov2-small,out/a,out/b*" --dataset_path=bloodmnist

Every table has the raw pixels and the untouched start of each run: a run that harms its features shows it. Runs that
differ by their seed only share a row, mean (standard deviation). Writes results/ in the run's folder: tables as .md and
.json, a confusion matrix, a map of the features, nearest neighbours, training curves. train.py measures with the same
functions. One process, one device.
"""
import ast
import contextlib
import glob
import hashlib
import json
import math
import os
import re
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import pictures
from augment import Photometrics, center_square, resize_center
from configurator import UserError, describe, list_keys, one_line_errors, override
from data import cut_tenth, input_settings, load_dataset
from distributed import autocast_for, gather_objects, loader_workers, rank, setup, world_size
from model import backbone_from_config, build_backbone, forward_features, pretrained_input
from metrics import (classification_metrics, dice_per_class, fit_probe, knn_classify, knn_vote,
                    linear_probe, patch_classes)  # noqa: F401  linear_probe, as a name that others look for here
from teachers import FrozenTeacher, build_teacher

# ==== config: what is not given is taken from the run that is evaluated ====
# ---- what ----
run = ''                         # a run's folder, like out/phantom
model_type = ''                  # or weights: a hub id, a directory, or a teacher of distill.py, timm:NAME
compare = ''                     # or several of both, comma-separated, * works: "facebook/dinov2-small,out/a*"
checkpoint = 'best'              # of a run: 'best' on its eval_split | 'last' = where it ended, no selection at all
out_dir = ''                     # tables and pictures; '' = results/ of the run, or out/evaluate
device = 'auto'                  # 'auto' | 'cpu' | 'cuda' | 'cuda:1'
mixed_precision = 'bf16'         # of the forward passes: 'bf16' | 'no' = fp32
seed = 0                         # of a val split that has to be cut, the bootstrap, and which images the pictures show

# ---- data ----
dataset_path = ''                # as in train.py; '' = the run's
dataset_size = 0                 # of MedMNIST and phantom images; 0 = the run's, else 224
cache_dir = ''                   # downloads and unpacked arrays; '' = ~/.cache/dino-mx
download_url = ''                # a mirror's folder with the MedMNIST files; '' = their own host
test_splits = 'test'             # what is measured, comma-separated; neighbours and the probe learn from train
image_size = 0                   # pixels the network sees; 0 = the run's global crops, else what the weights say
intensity_range = (0.0, 0.0)     # pixel values mapped to 0..1; (0, 0) = the run's, else measured
on_bad_image = 'error'           # 'error' = stop and name it | 'skip' = leave it out
num_workers = -1                 # processes that read images; -1 = one less than the cores, up to 8
batch_size = 64                  # images per forward pass

# ---- measurements ----
knn_k = 5                        # neighbours of the majority vote; paper: 5
bootstrap = 1000                 # resamples of the test images for the 95 % intervals; 0 = none
generate_pictures = True         # confusion matrix, map, neighbours, curves
config_keys = list_keys(globals())

DINO_KNN = ((10, 0.07), (20, 0.07))  # k and temperature of DINO's weighted vote
PATCHES = 20_000                 # patches that a patch probe learns from, drawn by seed
MAP_IMAGES = 1000                # images on a map: t-SNE needs their square in memory


# ---- patch probe: a linear layer on patch tokens, for sets with masks ----

def patch_probe(backbone, train, val, tests, values, rng, **settings):
    """How well a linear layer on patch tokens finds what the masks show.

    Logistic regression from one patch token to the most frequent mask value of its patch, on about PATCHES training
    patches, every class weighted alike, the penalty picked by the loss on val (fit_probe). Args: train, val, tests
    {name: Dataset} with masks; values [c]: of the mask, 0 = background first; settings: of `stream`.
    Returns: {name: Dice per class [c] over all patches of the split}, nan for a class that is nowhere.
    """
    def patches_of(dataset, per_image):
        tokens, classes = [], []
        for batch in stream(backbone, dataset, with_masks=True, **settings):
            grid = math.isqrt(batch["patches"].shape[1])
            for x, mask in zip(batch["patches"].cpu(), batch["masks"]):                    # x [P,D]
                if mask is not None:
                    kept = np.sort(rng.permutation(len(x))[:per_image])
                    tokens.append(x[kept])
                    classes.append(patch_classes(mask, grid, values)[kept])
        return torch.cat(tokens), np.concatenate(classes)
    (x, y), (x_val, y_val) = (patches_of(data, math.ceil(PATCHES / len(data))) for data in (train, val))
    probe, _ = fit_probe(x, torch.from_numpy(y), x_val, torch.from_numpy(y_val), balanced=True)
    result = {}
    for name, dataset in tests.items():
        truth, guess = [], []
        for batch in stream(backbone, dataset, with_masks=True, **settings):
            for x, mask in zip(batch["patches"], batch["masks"]):
                if mask is not None:
                    truth.append(patch_classes(mask, math.isqrt(len(x)), values))
                    guess.append(probe(x).argmax(dim=1).numpy())
        result[name] = dice_per_class(np.concatenate(truth), np.concatenate(guess), len(values)).tolist()
    return result


# ---- the script: measure, tabulate, draw ----

def measure(backbone, data, settings, values, patch):
    """All numbers of one network (None: the raw pixels), on all test splits.

    Args: data: of open_data; settings: of `stream`; values: of the masks, () = no patch probe; patch: patch size of the
    raw-pixel baseline. Returns: results {split: {probe name: metrics}}, found {split: dict of `gather`, for test splits
    with probs [N,c] of the linear probe}.
    """
    raw = backbone is None                                     # raw pixels have no CLS token, and suffice at 32 px
    whole = dict(settings, size=min(32, settings["size"])) if raw else settings
    found = {split: gather(backbone, dataset, not raw, **whole) for split, dataset in data.items()}
    D = found["train"]["features"].shape[1] // (1 if raw else 2)
    train, val, tests = found["train"], found["tune"], [split for split in data if split not in ("train", "tune")]
    results = {split: {} for split in tests}
    for name, width in [("linear", D)] + [("linear_cls_patch", 2 * D)] * (not raw):
        probe, strength = fit_probe(train["features"][:, :width], train["labels"], val["features"][:, :width],
                                    val["labels"])
        for split in tests:
            probs = probe(found[split]["features"][:, :width])
            results[split][name] = dict(C=strength, **classification_metrics(probs, found[split]["labels"],
                                                                             bootstrap=bootstrap, seed=seed))
            found[split].setdefault("probs", probs)
    for name, k, temperature in [("knn", knn_k, None)] + [(f"knn_dino_{k}", k, t) for k, t in DINO_KNN]:
        for split in tests:
            guess, shares = knn_vote(train["features"][:, :D], train["labels"], found[split]["features"][:, :D], k,
                                     temperature)
            results[split][name] = classification_metrics(shares.cpu(), found[split]["labels"], guess.cpu(), bootstrap,
                                                          seed)
    if len(values):
        dice = patch_probe(backbone, data["train"], data["tune"], {split: data[split] for split in tests}, values,
                           np.random.default_rng(seed), **settings, patch=patch)
        for split in tests:
            results[split]["dice"] = dice[split]
    for part in found.values():                                # what the pictures need
        part["features"] = part["features"][:, :D]
    return results, found


def tabulate(networks, split, mask_names):
    """The tables of one test split as text: the paper's layout (Tables 5-8), then what it leaves out.

    networks: dicts of find_networks with `results`; those of one group share a row, mean (standard deviation)."""
    groups = {}
    for network in networks:
        groups.setdefault(network["group"], []).append(network)

    def cell(group, probe, metric):                            # metric: a name, or of Dice the number of the class
        values = [network["results"][split][probe][metric] for network in group if probe in network["results"][split]]
        if not values or not np.isfinite(values).all():
            return "-"
        return f"{np.mean(values):.3f}" + (f" ({np.std(values, ddof=1):.3f})" if len(values) > 1 else "")

    def interval(group, probe):
        ends = [network["results"][split][probe].get("accuracy_ci") for network in group]
        return "-" if None in ends else "{:.2f}-{:.2f}".format(*np.mean(ends, axis=0))
    titles = {key: [group[0]["model"], group[0]["adaptation"] + (f", {len(group)} seeds" if len(group) > 1 else "")]
              for key, group in groups.items()}
    names = [os.path.commonprefix([os.path.basename(network["name"].rstrip("/")) for network in group])
             for group in groups.values()]
    twins = [list(titles.values()).count(title) > 1 for title in titles.values()]          # say which is which
    for title, name, twin in zip(titles.values(), names, twins):
        title[1] += f" ({name})" if twin else ""
    main_metrics, more = ("accuracy", "precision_weighted", "f1_weighted"), ("auc", "balanced_accuracy")
    paper = markdown(
        ["Model", "Adaptation", "Probe accuracy", "precision", "F1", "k-NN accuracy", "precision", "F1"],
        [titles[key] + [cell(group, probe, metric) for probe in ("linear", "knn") for metric in main_metrics]
         for key, group in groups.items()])
    rest = markdown(
        ["Model", "Adaptation", "Probe AUC", "balanced", "accuracy 95 %", "CLS+patches", "k-NN AUC", "balanced",
         "accuracy 95 %", *(f"k={k}, T={t}" for k, t in DINO_KNN)],
        [titles[key] + [cell(group, "linear", metric) for metric in more] + [interval(group, "linear")]
         + [cell(group, "linear_cls_patch", "accuracy")] + [cell(group, "knn", metric) for metric in more]
         + [interval(group, "knn")] + [cell(group, f"knn_dino_{k}", "accuracy") for k, _ in DINO_KNN]
         for key, group in groups.items()])
    text = f"{paper}\n\n{rest}\n"
    if "dice" in networks[0]["results"][split]:
        text += "\n" + markdown(["Model", "Adaptation"] + [f"Dice of {name}" for name in mask_names[1:]],
                                [titles[key] + [cell(group, "dice", c) for c in range(1, len(mask_names))]
                                 for key, group in groups.items()]) + \
            "\nDice over patches, each of the class that most of its pixels have; '-': no patch is of that class.\n"
    by_name = {network["name"]: network["results"][split] for network in networks}
    for network in networks:
        if "start" in network:                                # harm has to be visible
            for probe, what in (("linear", "linear probe"), ("knn", "k-NN")):
                change = network["results"][split][probe]["accuracy"] - by_name[network["start"]][probe]["accuracy"]
                text += f"\n- {network['name']}: {what} {change:+.3f} against its start" + \
                    ("  !!!! BELOW THE START !!!!" if change < -0.005 else "")
    return text + "\n"


def draw(networks, found, split, data, intensity_range, stem):
    """The pictures of one test split: maps of the features (at most four: raw pixels, the start, and the last two
    kinds of run), and of the last network the confusion matrix and nearest neighbours.

    Args: networks: with 'map' {split: features}; found: of `measure`, of the last network; stem: of the files' names.
    """
    last, name = networks[-1], os.path.basename(stem)
    title = f"{last['model']}, {last['adaptation']}: {name}, {split}"
    train, test = found["train"], found[split]
    if test["labels"].ndim == 2:
        return                                                 # several labels per image: no colour, no confusion
    labels, probs = test["labels"].numpy(), test["probs"]
    names = data["train"].class_names
    names = names + [str(c) for c in range(len(names), max(probs.shape[1], labels.max() + 1))]
    confusion = np.zeros((len(names), len(names)), int)
    np.add.at(confusion, (labels, probs.argmax(dim=1).numpy()), 1)
    pictures.confusion_picture(f"{stem}-{split}-confusion.png", confusion, names, f"Linear probe of {title}")
    groups = list({network["group"]: network for network in networks}.values())           # one seed of each
    shown = groups[:2] + groups[2:][-2:]
    for kind, project in (("PCA", pictures.pca_map), ("t-SNE", pictures.tsne_map)):
        panels = [(", ".join([network["model"], network["adaptation"]][:1 + (network["adaptation"] != "-")]),
                   project(F.normalize(network["map"][split], dim=1))) for network in shown]
        pictures.scatter_picture(f"{stem}-{split}-{kind.lower()}.png", panels, labels[map_rows(len(labels))], names,
                                 f"{kind} of the CLS features: {name}, {split}")
    rng = np.random.default_rng(seed)                          # one query of every class
    queries = [int(rng.choice(np.flatnonzero(labels == c))) for c in rng.permutation(np.unique(labels))[:8]]
    similarity = F.normalize(test["features"][queries], dim=1) @ F.normalize(train["features"], dim=1).T
    nearest = similarity.topk(min(5, len(train["rows"])), dim=1)

    def tile(dataset, row, caption, frame=None):
        return pictures.to_picture(dataset[row][0], intensity_range), caption, frame
    sheet = []
    for query, values, places in zip(queries, nearest.values.tolist(), nearest.indices.tolist()):
        row = [tile(data[split], test["rows"][query], names[labels[query]])]
        for value, place in zip(values, places):
            label = int(train["labels"][place])
            row.append(tile(data["train"], train["rows"][place], f"{names[label]}\n{value:.2f}",
                            "green" if label == labels[query] else "red"))
        sheet.append(row)
    pictures.contact_sheet(f"{stem}-{split}-neighbours.png", sheet, f"Nearest training images of {title}\n"
                           "cosine similarity of CLS features; green frame = same class, red = another", 160,
                           ["test image"] + [f"nearest {i + 1}" for i in range(nearest.values.shape[1])])


def map_rows(n):
    """Which of n images are on a map: all, or MAP_IMAGES drawn by seed, in their order."""
    return np.sort(np.random.default_rng(seed).permutation(n)[:MAP_IMAGES])


def open_data(config):
    """({'train', 'tune', test splits: Dataset}, notes): the data that all networks are measured on. config: of the
    first run, {} without. 'tune' picks the probe's penalty: val, or where val is missing or is measured, a tenth of
    train."""
    source = dataset_path or config.get("dataset_path", "")
    if not source:
        raise UserError("dataset_path is not given, and there is no run to take it from; add --dataset_path=...")
    splits = [split.strip() for split in test_splits.split(",") if split.strip()]
    if not splits or "train" in splits:
        raise UserError(f"test_splits={test_splits!r}: name splits other than train, like test or val,test")

    def open_split(split):
        return load_dataset(source, split, dataset_size or config.get("dataset_size", 224), cache_dir, download_url,
                            config.get("num_channels", 0), seed)
    train, tests, notes = open_split("train"), {split: open_split(split) for split in splits}, []
    if train.labels is None:
        raise UserError(f"dataset_path={source!r} has no labels to measure with; a folder needs a sub-folder per class")
    if "val" in splits:
        train, val = (train.subset(rows, "train") for rows in cut_tenth(len(train), seed))
        notes.append(f"val is measured, so {len(val)} images of train (seed {seed}) pick the probe's penalty")
    else:
        val = open_split("val")
        if "val" not in train.splits:
            notes.append(f"no val split: {len(val)} images of train (a tenth, seed {seed}) pick the probe's penalty")
    return dict(train=train, tune=val, **tests), notes


def main(sources):
    """Evaluate what the config in this module's globals names; sources: from configurator.override."""
    run_device = setup(device)
    names = [name.strip() for name in f"{run},{model_type},{compare}".split(",") if name.strip()]
    if not names:
        raise UserError("nothing to evaluate: give --run=out/NAME, --model_type=ID or --compare=ID,out/A,out/B")
    if checkpoint not in ("best", "last") or mixed_precision not in ("bf16", "no"):
        raise UserError(f"checkpoint={checkpoint!r}, mixed_precision={mixed_precision!r}; needs 'best' or 'last', and "
                        "'bf16' or 'no'")
    print(describe(globals(), config_keys, sources) + "\n")
    networks = find_networks(names, checkpoint)
    configs = [network["config"] for network in networks if network["config"]]

    # ---- data ----
    data, notes = open_data(configs[0] if configs else {})
    train, tests = data["train"], [split for split in data if split not in ("train", "tune")]
    values, mask_names = (), []
    if all(dataset.masks is not None for dataset in data.values()):
        masks = (train.masks[i] for i in range(len(train)))    # of the masks alone: an image is slow to decode
        values = np.unique(np.concatenate([np.unique(mask) for mask in masks if mask is not None]))
        mask_names = [train.mask_names[v] if v < len(train.mask_names) else f"mask value {v}" for v in values]
        if not 2 <= len(values) <= 32:
            notes.append(f"masks have {len(values)} different values, which are no classes: no patch probe")
            values = ()
    notes.insert(0, f"{train.name}: " + ", ".join(f"{len(dataset)} {dataset.split}" for dataset in data.values()))
    print("\n".join(notes), flush=True)

    # ---- every network, one at a time; before the first one the raw pixels, in its patches ----
    workers, autocast, rows = loader_workers(num_workers), autocast_for(run_device, mixed_precision), []

    def record(network, backbone, settings, patch):
        network["results"], found = measure(backbone, data, settings, values, patch)
        network["map"] = {split: found[split]["features"].cpu()[map_rows(len(found[split]["rows"]))]
                          for split in tests}
        network["size"] = settings["size"]
        rows.append(network)
        print(f"{network['name']}, {network['adaptation']}, {settings['size']} px: " + "; ".join(
            f"{split} {knn_k}-NN {result['knn']['accuracy']:.4f}, linear probe {result['linear']['accuracy']:.4f}"
            for split, result in network["results"].items()), flush=True)
        return found

    for network in networks:
        config = network["config"] or (configs[0] if configs else {})
        backbone, reading = load_network(network, config, train, run_device, image_size, intensity_range, seed,
                                         on_bad_image, torch.float32 if mixed_precision == "no" else torch.bfloat16)
        settings = dict(reading, num_workers=workers, batch_size=batch_size, on_bad_image=on_bad_image,
                        autocast=autocast)
        patch = getattr(backbone, "patch_size", 0) or backbone.config.patch_size
        if not rows:
            pixels = dict(name="raw pixels", model="raw pixels", adaptation="-", group="raw pixels")
            found = record(pixels, None, settings, patch)
            for split in tests:                                # the same image on both sides is memory, not insight
                for other in ("train", "tune"):
                    known = set(found[other]["digests"])
                    if copies := sum(digest in known for digest in found[split]["digests"]):
                        notes.append(f"{copies} of {len(found[split]['digests'])} {split} images are also in "
                                     f"{data[other].split}, pixel for pixel")
                        print(notes[-1])
        found = record(network, backbone, settings, patch)

    # ---- tables and pictures ----
    folder = os.path.join(out_dir or (run if len(names) == 1 and run else "out/evaluate"), "results")
    stem = os.path.join(folder, os.path.splitext(os.path.basename(train.name.rstrip("/")))[0])
    os.makedirs(folder, exist_ok=True)
    if generate_pictures and "start" in network:               # the last one is a run
        records = [json.loads(line) for line in open(os.path.join(network["name"], "log.jsonl"))]
        pictures.curves_picture(f"{stem}-curves.png", records, f"training of {network['name']}")
    text = f"# {os.path.basename(stem)}\n\n" + "".join(f"- {note}\n" for note in notes)
    for split in tests:
        text += f"\n## {split}, {len(data[split])} images\n\n{tabulate(rows, split, mask_names)}"
        if generate_pictures:
            draw(rows, found, split, data, settings["intensity_range"], stem)
    print("\n" + text)
    with open(f"{stem}.md", "w") as file:
        file.write(text)
    with open(f"{stem}.json", "w") as file:
        json.dump(jsonable(dict(notes=notes, config={key: globals()[key] for key in config_keys}, networks=[
            {key: network[key] for key in ("name", "model", "adaptation", "size", "results")} for network in rows])),
            file, indent=1)
    print(f"tables and pictures are in {folder}")


if __name__ == "__main__":
    with one_line_errors():
        main(override(globals(), config_keys, sys.argv[1:]))
