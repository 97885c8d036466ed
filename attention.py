"""Where does the network look? Attention maps of a run or of released weights, and the lesions in
the maps.

    python attention.py --run=out/phantom_lg --split=test --n_images=16  # images of a split
    python attention.py --run=out/phantom_lg --images=scan.png  # a file or a folder
    python attention.py --model_type=facebook/dinov2-small --dataset_path=wbc_1.npz
    python attention.py --run="out/lg*,out/random*" --detection=true  # regions against masks

The script writes results/attention/ in the run's folder: sheet.png (image, attention, principal
components of heads and of patch features, regions), NAME-heads.png (every head of an image), with
masks clusters.png (label heatmap beside the clusters in the heat), and with --detection=true the
table of the paper's section 3.2 as .md and .json. Whatever is chosen is chosen on val. It runs as
one process on one device.
"""
from types import SimpleNamespace

from configurator import UserError, describe, list_keys, one_line_errors, read_command_line

# ==== config: what is not given is taken from the run ====
# ---- what ----
run = ''                         # a run's folder, like out/phantom_lg; or several: "out/a,out/b*"
model_type = ''                  # or weights: a hub id or a directory
checkpoint = 'last'              # of a run: 'last' | 'best' by k-NN, which need not look better
out_dir = ''                     # '' = results/attention of the run, or out/attention
device = 'auto'                  # 'auto' | 'cpu' | 'cuda' | 'cuda:1'

# ---- images ----
images = ''                      # a file or a folder of images; '' = a split of dataset_path
masks = ''                       # their masks: a file, or a folder with files of the same names
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
split = 'test'                   # of dataset_path
image_size = 0                   # pixels of the shorter side; 0 = as trained. More = finer maps
intensity_range = (0.0, 0.0)     # pixel values mapped to 0..1; (0, 0) = the run's, else measured
intensity_scaling = 'set'        # 'image' | 'dtype' as in train.py | 'set' = the run's
label_guided_classes = ()        # mask values that are labels; () = the run's, else all except 0
n_images = 16                    # the first n images are drawn; 0 = no pictures
pca_components = 1               # channels that the heads become in NAME-heads.png; paper: 1
save_arrays = False              # also write NAME.npz: attention [heads,h,w], pca [n,h,w], heat

# ---- heat and detection ----
heat = 'auto'                    # of the heads: 'mean' | 'pca' | 'head0', ... | 'auto' = by val
detection = False                # compare the regions of all images with masks
low_threshold = 0.3              # heat, 0..1, that every patch of a region reaches (paper: 0.3)
high_threshold = 0.7             # heat that at least one patch of it reaches (paper: 0.7)
min_iou = 0.1                    # overlap with which a region finds a lesion: detection_metrics
config_keys = list_keys(globals())
if __name__ == "__main__":  # before the imports that take seconds: --help and a typo answer at once
    sources = read_command_line(globals(), config_keys)

import functools
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import pictures
from augment import is_labelled
from checks import Checks
from data import Dataset, cache_of, describe_source, load_dataset
from detection import (detect, detection_metrics, labelled_patches, patch_metrics, pool_detections,
                       scaled)
from distributed import setup
from images import ImageFiles
from layouts import is_system_name, stem_of
from loader import reading_keys
from maps import cls_attention, network_input, pca_heads
from model import forward_features
from networks import find_networks, find_runs, load_network, split_names
from run_folder import make_results
from report import jsonable, markdown
from volumes import list_images

QUANTILES = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)  # of val patches: what heat may count as 1
SIDE = 200  # pixels of a picture on a sheet


# ---- one network on many images ----

@torch.no_grad()
def attention_maps(backbone, dataset, inputs, classes, indices=None):
    """The maps of images, one image at a time, because sizes may differ.

    Args: backbone, inputs: of networks.load_network; classes: mask values that are labels, () = all
    except 0; indices: of the images, None = all that have a mask.
    Returns: list of dicts of attention [heads,h,w] on the CPU; labelled [h,w] bool, None without a
    mask; brightest [h,w], the largest pixel of each patch (mean over channels, not clipped): the
    baseline without a network.
    """
    all_maps, masked_only = [], indices is None
    if masked_only:
        indices = range(len(dataset))
    for i in tqdm(indices, desc=f"{dataset.split} attention", leave=False, disable=None):
        image, mask = dataset[i]
        if masked_only and mask is None:
            continue
        pixels, x = network_input(image, backbone, inputs)
        attention = cls_attention(backbone, x)[0].cpu()
        labelled = None
        if mask is not None:
            labelled = labelled_patches(is_labelled(mask, classes), attention.shape[1:])
        grey = pixels.float().mean(dim=1)  # [1,H',W']
        brightest = F.max_pool2d(grey, backbone.config.patch_size)[0].numpy()
        all_maps.append(dict(attention=attention, labelled=labelled, brightest=brightest))
    return all_maps


def heat_of(maps, source):
    """One heatmap [h,w] of an image. maps: of attention_maps; source: 'mean', 'pca' (each image in
    0..1), 'head0', ..., or 'brightest'."""
    if source == "brightest":
        return maps["brightest"]
    if source == "mean":
        return maps["attention"].mean(dim=0).numpy()
    if source == "pca":
        return pca_heads(maps["attention"][None])[0, 0].numpy()
    return maps["attention"][int(source.removeprefix("head"))].numpy()


def find_lesions(heatmaps, all_maps, scale):
    """For each image the dict of detection_metrics and its regions, whose boxes are shares of width
    and height."""
    results = []
    for heatmap, maps in zip(heatmaps, all_maps):
        regions = detect(scaled(heatmap, scale), low_threshold, high_threshold)
        result = detection_metrics(regions, maps["labelled"], min_iou)
        sides, boxes = heatmap.shape[::-1] * 2, []  # (w, h, w, h)
        for region in regions:
            box = [x / side for x, side in zip(region["box"], sides)]
            boxes.append(dict(box=box, area=region["area"], score=region["score"]))
        results.append(dict(result, regions=boxes))
    return results


def choose_heat(choices, all_maps):
    """(source, scale, F1): the source and the scale of heat with the largest F1 on val, from counts
    summed over the images. Without a lesion on val: the first source, (), nan. Scales are () (each
    image by itself as in the paper, which finds something in every image) and from the median of
    all patches to one of QUANTILES. choices: sources for heat_of."""
    best, best_f1 = (choices[0], (), math.nan), -1.0
    for source in choices:
        heatmaps = [heat_of(maps, source) for maps in all_maps]
        values = np.concatenate([heatmap.ravel() for heatmap in heatmaps])
        low = float(np.median(values))
        scales = [(low, float(np.quantile(values, q))) for q in QUANTILES]
        for scale in [(), *scales]:
            results = find_lesions(heatmaps, all_maps, scale)
            f1 = pool_detections(results)["micro"]["f1"]
            if f1 > best_f1:  # nan is never larger
                best, best_f1 = (source, scale, f1), f1
    return best


def measure(name, group, choices, all_maps, val_maps):
    """Choose the heat on val, measure it, print a line. Returns: a column of the table, a dict.
    choices: sources for heat_of; all_maps, val_maps: of attention_maps, of images with masks.
    Without val_maps the heat is the first of the choices, and each image has its own scale."""
    source, scale, chosen = choices[0], (), "nothing was chosen"
    if val_maps:
        source, scale, f1 = choose_heat(choices, val_maps)
        chosen = f"F1 on val {f1:.3f}"
    heatmaps = [heat_of(maps, source) for maps in all_maps]
    labelled = [maps["labelled"] for maps in all_maps]
    per_image = find_lesions(heatmaps, all_maps, scale)
    with_lesion = [result for result, label in zip(per_image, labelled) if label.any()]
    pooled, patches = pool_detections(per_image), patch_metrics(heatmaps, labelled)
    results = dict(all=pooled, lesions=pool_detections(with_lesion), patches=patches)
    print(f"{name}: heat = {source}, F1 {pooled['micro']['f1']:.3f}, "
          f"AUROC {patches['auroc']:.3f}, average precision {patches['average_precision']:.3f}, "
          f"pointing {patches['pointing']:.3f}", flush=True)
    return dict(name=name, group=group, heat=source, scale=scale, chosen=chosen,
                results=results, images=per_image)


# ---- tables ----

def detection_tables(columns):
    """The numbers of one split in the layout of the paper's Table 4, as text. A table has a column
    for each group: mean (standard deviation). columns: dicts of `measure`."""
    groups = {}
    for column in columns:
        groups.setdefault(column["group"], []).append(column)
    header = ["Metric", *map(_group_name, groups.values())]

    def row(title, *path):  # path: keys in `results`
        cells = [title]
        digits = 1 if path[-1] in ("tp", "fp", "fn") else 4
        for group in groups.values():
            values = [functools.reduce(dict.get, path, column["results"]) for column in group]
            text = f"{np.mean(values):.{digits}f}"
            if len(values) > 1:
                text += f" ({np.std(values, ddof=1):.{digits}f})"
            cells.append("-" if np.isnan(values).any() else text)
        return cells
    ratios = (("Precision", "precision"), ("Recall", "recall"), ("F1-score", "f1"),
              ("Localization score", "localization"))
    counts = (("True positives", "tp"), ("False positives", "fp"), ("False negatives", "fn"))
    text = ""
    for part, title in (("lesions", "Images with a lesion"), ("all", "All images")):
        rows = [row(f"{name}, average", part, "macro", key) for name, key in ratios]
        rows += [row(name, part, "micro", key) for name, key in counts]
        rows += [row(f"{name}, total", part, "micro", key) for name, key in ratios]
        text += f"\n## {title}\n\n{markdown(header, rows)}\n"
    numbers = (("AUROC", "auroc"), ("Average precision", "average_precision"),
               ("Average precision at chance level", "chance"), ("Pointing game", "pointing"))
    rows = [row(name, "patches", key) for name, key in numbers]
    text += f"\n## Patches, without a threshold\n\n{markdown(header, rows)}\n\n"
    for column in columns:
        scale = "each image from its smallest to its largest value"
        if column["scale"]:
            scale = "{:.4g} to {:.4g} is 0 to 1 in all images".format(*column["scale"])
        text += f"- {column['name']}: heat = {column['heat']}, {scale}; {column['chosen']}\n"
    return text + "- brightest patch: the largest pixel of each patch of the first network\n"


def _group_name(group):
    """What the names of a group's networks have in common, and the number of seeds."""
    names = [os.path.basename(column["name"].rstrip("/")) for column in group]
    name = os.path.commonprefix(names).rstrip("-_")
    if group[0]["name"].startswith("start of "):
        name = f"start of {name}"
    return name if len(group) == 1 else f"{name}, {len(group)} seeds"


# ---- pictures ----

@torch.no_grad()
def patch_colors(backbone, dataset, inputs, indices):
    """The patch features of images as colours, a list of [h,w,3] in 0..1. A colour means the same
    in all images of one size."""
    tokens, grids, patch = [], [], backbone.config.patch_size
    for i in indices:
        _, x = network_input(dataset[i][0], backbone, inputs)
        tokens.append(forward_features(backbone, x)[1][0].cpu())  # [P,D]
        grids.append(tuple(side // patch for side in x.shape[-2:]))
    colors = [None] * len(tokens)
    for grid in set(grids):
        same = [j for j in range(len(grids)) if grids[j] == grid]
        border = np.ones(grid, bool)
        border[1:-1, 1:-1] = min(grid) <= 2  # a small image is all border
        patches = torch.stack([tokens[j] for j in same])  # [n,P,D]
        for j, color in zip(same, pictures.feature_colors(patches, border.ravel())):
            colors[j] = color.reshape(*grid, 3)
    return colors


def sheet_row(picture, name, label, maps, color, network):
    """The row of an image in sheet.png, for pictures.contact_sheet. label [H,W] bool or None; maps:
    of attention_maps; color [h,w,3]: of patch_colors; network: of draw."""
    def tile(under):  # at SIDE pixels, with the outline of the label if there is one
        under = pictures.to_picture(under, side=SIDE)
        return under if label is None or not label.any() else pictures.outline(under, label)

    def mosaic(values):  # [h,w,3] in 0..1
        return tile(pictures.mosaic(values, picture.size))
    hot = scaled(heat_of(maps, network["heat"]), network["scale"])
    regions = detect(hot, low_threshold, high_threshold)
    found = np.zeros(hot.shape, bool)
    for region in regions:
        found[tuple(region["patches"].T)] = True
    outlined = pictures.outline(tile(pictures.overlay(picture, hot, SIDE)), found, "white")
    caption = f"{len(regions)} region(s)\n"
    if label is not None:
        counts = detection_metrics(regions, maps["labelled"], min_iou)
        caption += "{tp} found, {fn} missed, {fp} false".format(**counts)
    mean = heat_of(maps, "mean")
    mean_heat = pictures.overlay(picture, scaled(mean, ()), SIDE)
    pca = pca_heads(maps["attention"][None], 3)[0].numpy()  # [3,h,w]
    return [(tile(picture), name, None),
            (mean_heat, f"{mean.sum():.0%} of the attention", None),
            (pictures.overlay(picture, pca[0], SIDE), "", None),
            (mosaic(pca.transpose(1, 2, 0)), "", None),
            (mosaic(color), "", None), (outlined, caption, None)]


def clusters_row(picture, name, label, maps, network):
    """The row of an image in clusters.png, the steps of the paper's Figure 10: the slice, which
    share of each patch is labelled, attention, its first component, and the regions, each in a
    colour of its own. Args: of sheet_row; label [H,W] bool."""
    h, w = maps["labelled"].shape
    labels = Image.fromarray(label.astype(np.float32))
    share = np.asarray(labels.resize((w, h), Image.BOX))
    hot = scaled(heat_of(maps, network["heat"]), network["scale"])
    regions = detect(hot, low_threshold, high_threshold)
    numbers = np.zeros(hot.shape, int)  # 0 = no region
    for n, region in enumerate(regions):
        numbers[tuple(region["patches"].T)] = n + 1
    counts = detection_metrics(regions, maps["labelled"], min_iou)
    heats = [share, scaled(heat_of(maps, "mean"), ()), heat_of(maps, "pca")]
    captions = [f"{int(maps['labelled'].sum())} patches with a label", "", ""]
    row = [(pictures.to_picture(picture, side=SIDE), name, None)]
    for heat_map, caption in zip(heats, captions):
        row.append((pictures.patch_heat(picture, heat_map, SIDE), caption, None))
    found = pictures.patch_groups(picture, numbers, SIDE)
    return [*row, (pictures.outline(found, label), "{tp} found, {fn} missed, {fp} false".format(
        **counts), None)]


def draw(network, backbone, inputs, dataset, classes, folder):
    """The pictures of the first n_images images: a sheet of all of them, every head of each, the
    clusters of those with a label; and their arrays, if asked for.

    Args: network: dict of name, heat, scale; backbone, inputs: of networks.load_network.
    """
    indices = range(min(n_images, len(dataset)))
    all_maps = attention_maps(backbone, dataset, inputs, classes, indices)
    colors = patch_colors(backbone, dataset, inputs, indices)
    title = os.path.basename(network["name"].rstrip("/"))
    remark = "; cyan: the label" if dataset.masks is not None else ""
    sheet, clustered = [], []
    for i, maps, color in zip(indices, all_maps, colors):
        image, mask = dataset[i]
        label = None if mask is None else is_labelled(mask, classes)
        picture = pictures.to_picture(image, inputs["intensity_range"])
        name = f"{dataset.split}-{i:04d}"
        is_slice = dataset.volume is not None and dataset.volume[i] >= 0
        if isinstance(dataset.images, ImageFiles) and dataset.groups is None and not is_slice:
            name = Path(dataset.path(i)).stem  # else it may be the name of a patient
        sheet.append(sheet_row(picture, name, label, maps, color, network))
        if label is not None and label.any():
            clustered.append(clusters_row(picture, name, label, maps, network))
        components = pca_heads(maps["attention"][None], pca_components)[0].numpy()  # [n,h,w]
        if save_arrays:
            hot = scaled(heat_of(maps, network["heat"]), network["scale"])
            np.savez_compressed(f"{folder}/{name}.npz", attention=maps["attention"].numpy(),
                                pca=components, heat=hot.astype(np.float32))
        tiles = sheet[-1][:1]
        for n, head in enumerate(maps["attention"]):
            tile = pictures.overlay(picture, scaled(head.numpy(), ()), SIDE)
            tiles.append((tile, f"head {n}\n{head.sum():.0%}, peak {head.max():.3f}", None))
        for n, component in enumerate(components):
            tile = pictures.overlay(picture, component, SIDE)
            tiles.append((tile, f"component {n + 1}\nof the heads", None))
        width = 4 if len(tiles) <= 8 else 7
        pictures.contact_sheet(
            f"{folder}/{name}-heads.png",
            [tiles[k:k + width] for k in range(0, len(tiles), width)],
            f"Every head of the last block: {title}\nper cent = attention on patches, the rest is "
            f"on CLS and registers{remark}", SIDE,
            scale=("least", "largest of the head", "attention of CLS"))
    low, high = inputs["intensity_range"]
    pictures.contact_sheet(
        f"{folder}/sheet.png", sheet,
        f"Attention of {title}\nblack to white: pixels of {low:g} to {high:g}; regions (white): "
        f"heat = {network['heat']}, from {low_threshold}, one patch at {high_threshold}{remark}",
        SIDE, ["image", "mean of the heads", "heads, 1st component", "3 components, RGB",
               "patch features, PCA", "regions"],
        ("least", "largest of the image", "attention of CLS to the patches"))
    if clustered:
        pictures.contact_sheet(
            f"{folder}/clusters.png", clustered,
            f"Clusters of {title}\nheat = {network['heat']}; a cluster: connected patches from "
            f"{low_threshold}, one at {high_threshold}; each has a colour{remark}", SIDE,
            ["image", "label heatmap", "mean of the heads", "heads, 1st component", "clusters"],
            ("least", "largest", "labelled share of a patch; attention"))


# ---- the script ----

def files_at(path):
    """The files at a path: the file itself, or those in a folder that may be images, sorted."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder")
    if os.path.isfile(path):
        return [path]
    files = sorted(entry.path for entry in os.scandir(path) if entry.is_file())
    return [file for file in files if not is_system_name(os.path.basename(file))]


def open_images(num_channels, reading):
    """The data set of the keys images and masks. num_channels: 0 = as the first image; reading: of
    loader.reading_keys."""
    listing = list_images("", files_at(images), reading)
    names = [os.fsdecode(name) for name in listing.names]
    left_out = ", ".join(f"{n} {reason}" for reason, n in listing.left_out.items())
    if not names:
        raise UserError(f"images={images!r}: no image; left out: {left_out or 'nothing'}")
    said = [f"images: {len(names)}", f"left out: {left_out or 'nothing'}", *listing.notes]
    print("; ".join(said), flush=True)
    files = ImageFiles("", names, num_channels, numbers=listing.numbers, volumes=listing.volume,
                       cache_dir=cache_of(cache_dir), volume_axis=reading["volume_axis"],
                       max_image_pixels=reading["max_image_pixels"])
    files.num_channels = num_channels or files[0].shape[2]
    mask_images = None
    if masks:
        by_name = {stem_of(os.path.basename(file)): file for file in files_at(masks)}
        stems = [stem_of(os.path.basename(name)) for name in names]
        mask_files = [by_name.get(stem, "") for stem in stems]
        if os.path.isfile(masks) and len(set(names)) == 1:
            mask_files = [masks] * len(names)
        if not any(mask_files):
            raise UserError(f"masks={masks!r}: no file is named like an image in {images!r}; the "
                            "mask of a.jpg is a.png or a.npy")
        mask_images = ImageFiles("", mask_files, as_mask=True, numbers=listing.numbers)
    return Dataset(files, None, mask_images, name=images, split="images", volume=listing.volume,
                   scaling=reading["intensity_scaling"])


def open_data(config, network):
    """(data set to look at, val to choose the heat on or None). Nothing is chosen on what is
    measured. config: of the first run, or {}; network: the last one, of find_networks."""
    source = dataset_path or config.get("dataset_path", "")
    if not images and not source:
        raise UserError("no run gives a data set; add --images=... or --dataset_path=...")

    def open_split(name):
        size = dataset_size or config.get("dataset_size", 224)
        return load_dataset(source, name, size, cache_dir, download_url,
                            config.get("num_channels", 0), **reading)
    reading = reading_keys(SimpleNamespace(**globals()), config)
    if images:
        num_channels = 0  # released weights take what the images have, a run has its own number
        path = os.path.join(network["settings_path"], "config.json")
        if config and os.path.isfile(path):
            num_channels = json.load(open(path))["num_channels"]
        dataset = open_images(num_channels, reading)
    else:
        dataset = open_split(split)
        print(describe_source(dataset), flush=True)
    if detection and dataset.masks is None:
        raise UserError(f"detection=true, but {dataset.name} has no masks to compare with")
    val = None
    if heat == "auto" and detection and "val" in dataset.splits and split != "val":
        val = open_split("val")
    return dataset, val if val is not None and val.masks is not None else None


def check_config(config, names):
    """Raise UserError with all mistakes in the keys at once. names: of the networks."""
    if not names:
        raise UserError("nothing to look at: give --run=out/NAME, or --model_type=ID with --images "
                        "or --dataset_path")
    check = Checks(config)
    check.need(0 <= low_threshold <= high_threshold <= 1,
               f"low_threshold={low_threshold}, high_threshold={high_threshold}; needs "
               "0 <= low <= high <= 1")
    check.need("timm:" not in model_type, f"model_type={model_type!r}: a timm network does not "
               "show its attention; give a Hugging Face id or directory")
    check.report()


def main(sources):
    """Look at what the config in this module's globals names. sources: of configurator.override."""
    run_device = setup(device)
    config = SimpleNamespace(**{key: globals()[key] for key in config_keys})
    run_folders = find_runs(split_names(run))
    names = run_folders + split_names(model_type)
    check_config(config, names)
    print(describe(globals(), config_keys, sources) + "\n")
    networks = find_networks(names, checkpoint)
    run_config = next((network["config"] for network in networks if network["config"]), {})
    classes = label_guided_classes or run_config.get("label_guided_classes", ())
    dataset, val = open_data(run_config, networks[-1])
    is_one_run = len(names) == len(run_folders) == 1
    folder = out_dir or (f"{names[0]}/results/attention" if is_one_run else "out/attention")
    make_results(folder)

    # ---- every network, one at a time ----
    if not detection:
        networks = networks[-1:]  # the last one is drawn
    columns = []
    for network in networks:
        backbone, inputs = load_network(network, network["config"] or run_config, dataset,
                                        run_device, image_size, intensity_range)
        heads = [f"head{n}" for n in range(backbone.config.num_attention_heads)]
        choices = ["mean", "pca", *heads]
        if heat not in ("auto", *choices):
            raise UserError(f"heat={heat!r}: {network['name']} has {len(heads)} heads, head0 to "
                            f"{heads[-1]}")
        choices = choices if heat == "auto" else [heat]
        drawn = dict(name=network["name"], heat=choices[0], scale=())
        if detection:
            all_maps = attention_maps(backbone, dataset, inputs, classes)
            val_maps = attention_maps(backbone, val, inputs, classes) if val else []
            if not columns:
                columns.append(measure("brightest patch", "brightest patch", ["brightest"],
                                       all_maps, val_maps))
            drawn = measure(network["name"], network["group"], choices, all_maps, val_maps)
            columns.append(drawn)

    # ---- pictures and tables ----
    if n_images:
        draw(drawn, backbone, inputs, dataset, classes, folder)
    if detection:
        text = (f"# Detection: {dataset.name}, {dataset.split}, {len(all_maps)} images with masks\n"
                + detection_tables(columns))
        print("\n" + text)
        Path(folder, "detection.md").write_text(text)
        report = jsonable(dict(config=vars(config), networks=columns))
        Path(folder, "detection.json").write_text(json.dumps(report))
    print(f"tables and pictures are in {folder}")


if __name__ == "__main__":
    with one_line_errors():
        main(sources)
