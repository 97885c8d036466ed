"""How good are the features, and did training help? k-NN, linear probe and patch probe.

    python evaluate.py --run=out/phantom                # a run: raw pixels, its start, its end
    python evaluate.py --model_type=facebook/dinov2-small --dataset_path=pathmnist
    python evaluate.py --compare="facebook/dinov2-small,out/a,out/b*" --dataset_path=bloodmnist

Every table has the raw pixels and the start of each run, so it shows if a run harms its features.
A table needs no labels (verdict.py); another says how well the features tell where a slice lies.
Runs that differ by their seed only share a row: mean (standard deviation). The script writes
results/ in the run's folder: tables as .md and .json, the scores of every image as .csv, the linear
probe of the last network (embed.py --probe applies it to new images), a confusion matrix, maps of
the features, nearest neighbours and training curves. It runs as one process on one device.
"""
from types import SimpleNamespace

from configurator import UserError, describe, list_keys, one_line_errors, read_command_line

# ==== config: what is not given is taken from the run that is evaluated ====
# ---- what ----
run = ''                         # a run's folder, like out/phantom
model_type = ''                  # or weights: a hub id, a directory, or timm:NAME
compare = ''                     # or several of both, comma-separated, * works: "out/a,out/b*"
checkpoint = 'best'              # of a run: 'best' on its eval_split | 'last', without selection
out_dir = ''                     # tables and pictures; '' = results/ of the run, or out/evaluate
device = 'auto'                  # 'auto' | 'cpu' | 'cuda' | 'cuda:1'
mixed_precision = 'bf16'         # of the forward passes: 'bf16' | 'no' = fp32
seed = 0                         # of a val split cut from train, the bootstrap, and the pictures

# ---- data ----
dataset_path = ''                # as in train.py; '' = the run's
dataset_size = 0                 # of MedMNIST and phantom images; 0 = the run's, else 224
cache_dir = ''                   # downloads and unpacked arrays; '' = ~/.cache/dino-mx
download_url = ''                # a mirror of the MedMNIST files; '' = their own host
series = ''                      # these six as in train.py; '', -1 or 0 = the run's
volume_axis = -1                 # axis of the slices of 3-D arrays and NIfTI
volume_index = -1                # the volume of 4-D NIfTI
slice_step_mm = 0.0              # least distance of slices
group_level = 0                  # the n-th folder below a split is the patient
max_image_pixels = 0             # pixels that a picture may have
test_splits = 'test'             # measured splits, comma-separated; all methods learn from train
image_size = 0                   # pixels of the network's input; 0 = as trained
intensity_range = (0.0, 0.0)     # pixel values mapped to 0..1; (0, 0) = the run's, else measured
intensity_scaling = 'set'        # 'image' | 'dtype' as in train.py | 'set' = the run's
on_bad_image = 'error'           # 'error' = stop and name it | 'skip' = leave it out
num_workers = -1                 # loader processes; -1 = the cores less one, up to 8
batch_size = 64                  # images per forward pass
allow_shared_groups = False      # measure even if a patient of a test split is also in train

# ---- measurements ----
knn_k = 5                        # neighbours of the majority vote; paper: 5
bootstrap = 1000                 # resamples of the test images for 95 % intervals; 0 = none
blocks = 'auto'                  # of the row "several blocks": 'auto' = chosen on val | numbers
                                 # from 0 like 4,6,8,11 | 'last' = no such row
generate_pictures = True         # confusion matrix, maps, neighbours, curves
config_keys = list_keys(globals())
if __name__ == "__main__":  # before the imports that take seconds: --help and a typo answer at once
    sources = read_command_line(globals(), config_keys)

import json
import os

import numpy as np
import torch
import torch.nn.functional as F

import features
import metrics
import pictures
from data import MEDMNIST, check_groups, cut_tenth, describe_source, load_dataset
from detection import patch_probe
from distributed import (autocast_for, compute_dtype, loader_workers, precision_notes,
                         setup)
from features import block_list, choose_blocks, collect_features, parse_blocks
from loader import LEAST_HELD_OUT, reading_keys
from metrics import DINO_KNN, classification_metrics, knn_vote, nearest_images
from networks import (find_networks, find_runs, load_network, save_probe, split_names,
                      weights_hash)
from positions import hold_out_splits, slice_position
from probe import fit_probe, linear_probe
from run_folder import make_results, read_log
from report import (data_title, find_copies, image_names, in_words, jsonable, name_classes,
                    tabulate, write_medmnist, write_scores)
from verdict import VIEWS, LabelFree

# checks outside the repository look for these functions here, and for linear_probe
extract_features = features.extract_features
knn_classify = metrics.knn_classify

MAP_IMAGES = 1000  # number of images on a map: t-SNE needs memory for its square


# ---- measure ----

def measure(backbone, data, settings, values, patch, numbers, views):
    """All numbers of one network on all test splits.

    Args: backbone: None for raw pixels, in patches of `patch` pixels; data: of open_data; settings:
    of features.stream_features; values: of mask_classes, () = no patch probe; numbers: of the
    blocks for the readout of several blocks, [] = none; views: namespace of verdict.VIEWS. Without
    labels only verdict.LabelFree and the places of slices are measured.
    Returns: results, {split: {probe: {metric: value}}}; scores, {split: {features: dict}} of
    report.write_scores; probes, {name: Probe}; collected, {split: dict of collect_features}.
    """
    is_raw, image_settings, collected = backbone is None, dict(settings), {}
    if is_raw:  # 32 pixels are enough, and there is no CLS token to put the mean patch behind
        image_settings["size"] = min(32, settings["size"])
    for split, dataset in data.items():
        collected[split] = collect_features(backbone, dataset, not is_raw, block_numbers=numbers,
                                            **image_settings)
    train, tune = collected["train"], collected["tune"]
    width = train["features"].shape[1] // (1 if is_raw else 2)
    for part in collected.values():
        part["cls"] = part["features"][:, :width]
    tests = {split: data[split] for split in data if split not in ("train", "tune")}
    results, scores, probes = {}, {}, {}
    for split in tests:
        results[split], scores[split] = {}, {}
        inputs = {key: settings[key] for key in ("intensity_range", "mean", "std")}
        views.global_crops_size = settings["size"]
        label_free = LabelFree(tests[split], None, views, inputs, settings["autocast"])
        if found := label_free.measure(backbone):
            results[split]["label_free"] = found
        if place := slice_position(train, data["train"], collected[split], data[split]):
            results[split]["position"] = place
    if train["labels"] is None:
        return results, scores, probes, collected

    def evaluate_probe(name, key):
        probe, strength = fit_probe(train[key], train["labels"],
                                    tune[key], tune["labels"])
        probes[name] = probe
        for split in tests:
            test = collected[split]
            probs = probe(test[key])
            numbers = classification_metrics(probs, test["labels"], None, bootstrap, seed,
                                             test["groups"])
            results[split][name] = dict(C=strength, **numbers)
            test.setdefault("probs", {})[key] = probs.numpy()

    def evaluate_knn(name, key, k, temperature):
        for split in tests:
            test = collected[split]
            groups = dict(train_groups=train["groups"], test_groups=test["groups"])
            predictions, shares = knn_vote(train[key], train["labels"], test[key], k, temperature,
                                           **groups)
            results[split][name] = classification_metrics(
                shares.cpu(), test["labels"], predictions.cpu(), bootstrap, seed,
                test["groups"])
            if temperature is None:
                _, nearest = nearest_images(train[key], test[key], k, **groups)
                scores[split][key] = dict(probs=test["probs"][key],
                                          knn=predictions.cpu().numpy(), nearest=nearest.tolist())
    evaluate_probe("linear", "cls")
    evaluate_knn("knn", "cls", knn_k, None)
    for k, temperature in DINO_KNN:
        evaluate_knn(f"knn_dino_{k}", "cls", k, temperature)
    if numbers:
        evaluate_probe("linear_blocks", "readout")
        evaluate_knn("knn_blocks", "readout", knn_k, None)
    if not is_raw:
        evaluate_probe("linear_cls_patch", "features")
    if len(values):
        dice = patch_probe(backbone, data["train"], data["tune"], tests, values,
                           np.random.default_rng(seed), **settings, patch=patch)
        for split in tests:
            results[split]["dice"] = dice[split]
    return results, scores, probes, collected


# ---- pictures of one test split. Their files begin with `path`, a path without an ending ----

def draw(networks, collected, split, data, class_names, value_range, path):
    """Maps of all networks; confusion matrix and nearest neighbours of the last one.

    Args: networks: dicts of find_networks with map, {split: features [n,D]}; collected: of
    `measure`, of the last network; value_range: pixel values that become black and white.
    """
    labels = collected[split]["labels"].numpy()
    if labels.ndim == 2:
        return  # several labels per image: no colour, no confusion
    last, name = networks[-1], os.path.basename(path)
    title = f"{last['model']}, {last['adaptation']}: {name}, {split}"
    predictions = collected[split]["probs"]["cls"].argmax(axis=1)
    confusion = np.zeros((len(class_names), len(class_names)), int)
    np.add.at(confusion, (labels, predictions), 1)
    pictures.confusion_picture(f"{path}-{split}-confusion.png", confusion, class_names,
                               f"Linear probe of {title}")
    draw_maps(networks, split, labels, class_names, path)
    draw_neighbours(collected, split, data, class_names, value_range, title, path)


def draw_maps(networks, split, labels, class_names, path):
    """PCA and t-SNE of at most four networks: raw pixels, the first start, the last two groups."""
    by_group = {network["group"]: network for network in networks}  # one seed of each
    shown = list(by_group.values())
    shown = shown[:2] + shown[2:][-2:]
    for kind, project in (("PCA", pictures.pca_map), ("t-SNE", pictures.tsne_map)):
        panels = []
        for network in shown:
            name = network["model"]
            if network["adaptation"] != "-":
                name += f", {network['adaptation']}"
            points = F.normalize(network["map"][split], dim=1)
            panels.append((name, project(points)))
        pictures.scatter_picture(
            f"{path}-{split}-{kind.lower()}.png", panels, labels[map_indices(len(labels))],
            class_names, f"{kind} of the CLS features: {os.path.basename(path)}, {split}")


def draw_neighbours(collected, split, data, class_names, value_range, title, path):
    """A test image of each class, at most eight, and its five nearest training images."""
    train, test = collected["train"], collected[split]
    labels, rng = test["labels"].numpy(), np.random.default_rng(seed)
    classes = rng.permutation(np.unique(labels))[:8]
    queries = [int(rng.choice(np.flatnonzero(labels == c))) for c in classes]
    nearest = nearest_images(train["cls"], test["cls"][queries], 5)
    rows = []
    for query, values, neighbours in zip(queries, *map(torch.Tensor.tolist, nearest)):
        label = labels[query]
        image, _ = data[split][test["indices"][query]]
        row = [(image, class_names[label], None)]
        for value, neighbour in zip(values, neighbours):
            other = train["labels"][neighbour]
            image, _ = data["train"][train["indices"][neighbour]]
            frame = "green" if other == label else "red"
            row.append((image, f"{class_names[other]}\n{value:.2f}", frame))
        rows.append(row)
    pictures.neighbours_picture(
        f"{path}-{split}-neighbours.png", rows, f"Nearest training images of {title}\ncosine "
        "similarity of CLS features; green frame = same class, red = another", value_range,
        "test image")


def map_indices(n):
    """Indices of the images on a map, sorted: all n, or MAP_IMAGES drawn by seed."""
    return np.sort(np.random.default_rng(seed).permutation(n)[:MAP_IMAGES])


# ---- data ----

def open_data(config):
    """({split: Dataset}, notes): the data that all networks are measured on.

    The splits, in this order: 'train'; 'tune', which chooses the probe's penalty: val, or a tenth
    of train if there is no val or val is measured; the test splits. config: of the first run or {}.
    """
    source = dataset_path or config.get("dataset_path", "")
    if not source:
        raise UserError("dataset_path is not given, and there is no run to take it from; add "
                        "--dataset_path=...")
    splits = [split.strip() for split in test_splits.split(",") if split.strip()]
    if not splits or "train" in splits:
        raise UserError(f"test_splits={test_splits!r}: name splits other than train, like test or "
                        "val,test")

    def open_split(split):
        try:
            return load_dataset(source, split, dataset_size or config.get("dataset_size", 224),
                                cache_dir, download_url, config.get("num_channels", 0), seed,
                                **reading_keys(SimpleNamespace(**globals()), config)).labelled()
        except UserError as error:
            if dataset_path:
                raise
            raise UserError(f"{error} (the run was trained on it; to measure on other data, or if "
                            "it has moved, add --dataset_path=...)") from None
    train = open_split("train")
    notes = [describe_source(train)]
    tests = {}
    if train.labels is not None:
        tests = {split: open_split(split) for split in splits}
    if train.labels is None:
        train, tune, tests, reasons = hold_out_splits(train, splits, open_split, seed)
        notes += reasons
        if train.volume is None:  # nothing is learned from it
            train = train.limited(1000, seed)
            if max(map(len, tests.values())) < LEAST_HELD_OUT:
                raise UserError(f"dataset_path={source!r} has no labels to measure with, and less "
                                f"than {LEAST_HELD_OUT} test images to measure without; a folder "
                                f"of classes needs a sub-folder for each. {notes[0]}")
    elif "val" in splits:
        rest, tenth = cut_tenth(len(train), seed, train.groups)
        train, tune = train.subset(rest, "train"), train.subset(tenth, "train")
        notes.append(f"val is measured, so {len(tune)} images of train (seed {seed}) pick the "
                     "probe's penalty")
    else:
        tune = open_split("val")
        if "val" not in train.splits:
            notes.append(f"no val split: {len(tune)} images of train (a tenth, seed {seed}) pick "
                         "the probe's penalty")
    notes += check_groups(train, tests, allow_shared_groups)
    return dict(train=train, tune=tune, **tests), notes


def mask_classes(data):
    """(values [c], names, notes): the values in the training masks; no values, () and [], if a
    split has no masks or the values cannot be classes."""
    train = data["train"]
    if any(dataset.masks is None for dataset in data.values()):
        return (), [], []
    masks = (train.masks[i] for i in range(len(train)))  # without the images: they decode slowly
    found = [np.unique(mask) for mask in masks if mask is not None]
    values = np.unique(np.concatenate(found))
    if not 2 <= len(values) <= 32:
        return (), [], [f"masks have {len(values)} different values, which are no classes: no "
                        "patch probe"]
    names = dict(enumerate(train.mask_names))
    return values, [names.get(value, f"mask value {value}") for value in values], []


# ---- the script ----

def write_report(measured, data, collected, notes, mask_names, folder, value_range, config):
    """Tables, scores and pictures of all test splits. measured: dicts of find_networks with results
    and scores; collected: of `measure`, of the last network; value_range: as in `draw`."""
    train, tests, class_names = data["train"], list(data)[2:], name_classes(data)
    path, last = os.path.join(folder, data_title(train.name)), measured[-1]
    text = f"# {os.path.basename(path)}\n\n" + "".join(f"- {note}\n" for note in notes)
    train_names = image_names(train, collected["train"]["indices"], True)
    for split in tests:
        table = tabulate(measured, split, mask_names)
        text += f"\n## {split}, {len(data[split])} images\n\n{table}"
        if train.labels is None:
            continue
        labels = collected[split]["labels"].numpy()
        names = image_names(data[split], collected[split]["indices"], True)
        write_scores(f"{path}-{split}-scores.csv", measured, split, labels, names, train_names,
                     class_names)
        if train.name in MEDMNIST:
            size = data[split].images.shape[1]
            write_medmnist(f"{folder}/medmnist", train.name, size, split, measured)
        if generate_pictures:
            draw(measured, collected, split, data, class_names, value_range, path)
    print("\n" + text)
    with open(f"{path}.md", "w") as file:
        file.write(text)
    keys = ("name", "model", "adaptation", "losses", "start", "size", "blocks", "results")
    rows = [{key: network.get(key, "") for key in keys} for network in measured]
    report = dict(notes=notes, config=vars(config), networks=rows)
    with open(f"{path}.json", "w") as file:
        json.dump(jsonable(report), file, indent=1)
    records = [record for _, record in read_log(f"{last.get('run')}/log.jsonl")]
    if generate_pictures and records:  # of a run
        pictures.curves_picture(f"{path}-curves.png", records, f"training of {last['run']}")


def keep_probe(path, probes, network, backbone, settings, data):
    """Keep the linear probe of a network as path.safetensors and path.json: that of the readout, if
    there is one. embed.py --probe applies it."""
    name = "linear_blocks" if network["blocks"] else "linear"
    tests = {split: result[name] for split, result in network["results"].items()}
    inputs = {key: settings[key] for key in ("size", "intensity_range", "mean", "std")}
    about = dict(model=network["weights_path"], model_hash=weights_hash(backbone),
                 features="readout" if network["blocks"] else "cls", blocks=network["blocks"],
                 **inputs, intensity_scaling=data["train"].scaling,
                 mixed_precision=mixed_precision, classes=name_classes(data),
                 dataset=data["train"].name, train_images=len(data["train"]), tests=tests)
    save_probe(path, probes[name], about)


def main(sources):
    """Evaluate with the config in this module's globals. sources: of configurator.override."""
    run_device = setup(device)
    config = SimpleNamespace(**{key: globals()[key] for key in config_keys})
    run_folders = find_runs(split_names(run))
    names = run_folders + split_names(model_type) + split_names(compare)
    if not names:
        raise UserError("nothing to evaluate: give --run=out/NAME, --model_type=ID or "
                        "--compare=ID,out/A,out/B")
    print(describe(globals(), config_keys, sources) + "\n")
    networks = find_networks(names, checkpoint)
    default = names[0] if run_folders and len(names) == 1 else "out/evaluate"
    folder = os.path.join(out_dir or default, "results")
    make_results(folder)
    first_config = next((network["config"] for network in networks if network["config"]), {})

    # ---- data ----
    data, notes = open_data(first_config)
    train, tests = data["train"], list(data)[2:]
    values, mask_names, mask_notes = mask_classes(data)
    sizes = ", ".join(f"{len(dataset)} {dataset.split}" for dataset in data.values())
    notes = [f"{train.name}: {sizes}", *notes, *mask_notes,
             *precision_notes(run_device, mixed_precision)]
    print("\n".join(notes), flush=True)

    # ---- every network, one at a time; before the first one the raw pixels, in its patches ----
    measured = []

    def measure_one(network, backbone, settings, patch, numbers=()):
        results, scores, probes, collected = measure(backbone, data, settings, values, patch,
                                                     numbers, views)
        network.update(results=results, scores=scores, size=settings["size"],
                       blocks=list(numbers), map={})
        for split in tests:
            cls = collected[split]["cls"].cpu()
            network["map"][split] = cls[map_indices(len(cls))]
        measured.append(network)
        print(f"{network['name']}, {network['adaptation']}, {settings['size']} px: "
              + in_words(results, knn_k), flush=True)
        return probes, collected
    forward = dict(num_workers=loader_workers(num_workers), batch_size=batch_size,
                   on_bad_image=on_bad_image, autocast=autocast_for(run_device, mixed_precision))
    views = SimpleNamespace(seed=seed, num_workers=num_workers, on_bad_image=on_bad_image)
    for key, value in VIEWS.items():  # as the first run makes them, equal for all networks
        setattr(views, key, first_config.get(key, value))
    teacher_dtype = compute_dtype(run_device, mixed_precision)
    for network in networks:
        backbone, inputs = load_network(
            network, network["config"] or first_config, train, run_device, image_size,
            intensity_range, seed, on_bad_image, teacher_dtype)
        settings = dict(inputs, **forward)
        patch = getattr(backbone, "patch_size", 0) or backbone.config.patch_size
        if not measured:
            pixels = dict.fromkeys(("name", "model", "group"), "raw pixels")
            _, collected = measure_one(dict(pixels, adaptation="-"), None, settings, patch)
            notes += find_copies(collected, data, tests)
        numbers = []
        if blocks == "auto" and train.labels is not None:
            numbers, why = choose_blocks(backbone, train, data["tune"], seed, **settings)
            notes.append(f"{network['name']}: several blocks = {numbers}; {why}")
        elif blocks not in ("auto", "last"):
            numbers = parse_blocks(blocks, len(block_list(backbone)))
        probes, collected = measure_one(network, backbone, settings, patch, numbers)

    # ---- tables, scores, pictures, and the probe of the last network ----
    path = os.path.join(folder, data_title(train.name))
    if probes:
        keep_probe(f"{path}-probe", probes, network, backbone, settings, data)
    write_report(measured, data, collected, notes, mask_names, folder,
                 settings["intensity_range"], config)
    print(f"tables, scores, the probe and pictures are in {folder}")


if __name__ == "__main__":
    with one_line_errors():
        main(sources)
