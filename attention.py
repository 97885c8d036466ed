"""Where does the network look? Attention maps of a run or of released weights, and the lesions that they find.

    python attention.py --run=out/phantom_lg --split=test --n_images=16               # pictures of a split
    python attention.py --run=out/phantom_lg --images=scan.png                        # of a file or a folder
    python attention.py --model_type=facebook/dinov2-small --dataset_path=wbc_1.npz   # of weights as they are
    python attention.py --run="out/lg*,out/random*" --detect                          # regions against masks: tables

Writes results/attention/ in the run's folder: sheet.png (image, attention, principal components of heads and of patch
features, regions), NAME-heads.png (every head of one image), and with --detect (short for --detection=true) the
table of the paper's section 3.2 as .md and .json. Whatever is chosen is chosen on val. One process, one device.
"""
import json
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import pictures
from augment import Photometrics, is_labelled, resize
from configurator import UserError, describe, list_keys, one_line_errors, override
from data import EXTENSIONS, Dataset, ImageFiles, load_dataset, load_image
from detection import detect, detection_metrics, labelled_patches, patch_metrics, pool_detections
from distributed import setup
from evaluate import find_networks, jsonable, load_network, markdown
from model import blocks, embed, final_norm, run_blocks

# ==== config: what is not given is taken from the run ====
# ---- what ----
run = ''                         # a run's folder, like out/phantom_lg; or several, comma-separated, * works
model_type = ''                  # or weights: a hub id or a directory
checkpoint = 'last'              # of a run: 'last' | 'best', which is best by k-NN and need not look better
out_dir = ''                     # '' = results/attention of the run, or out/attention
device = 'auto'                  # 'auto' | 'cpu' | 'cuda' | 'cuda:1'

# ---- images ----
images = ''                      # a file or a folder of images; '' = a split of dataset_path
masks = ''                       # their masks: a file, or a folder with files of the same names
dataset_path = ''                # as in train.py; '' = the run's
dataset_size = 0                 # of MedMNIST and phantom images; 0 = the run's, else 224
cache_dir = ''                   # downloads and unpacked arrays; '' = ~/.cache/dino-mx
download_url = ''                # a mirror's folder with the MedMNIST files; '' = their own host
split = 'test'                   # of dataset_path
image_size = 0                   # pixels of the shorter side as the network sees it; 0 = as trained. More = finer maps
intensity_range = (0.0, 0.0)     # pixel values mapped to 0..1; (0, 0) = the run's, else measured
label_guided_classes = ()        # mask values that count as label; () = the run's, else all but 0
n_images = 16                    # the first n are drawn; 0 = no pictures

# ---- heat and detection ----
heat = 'auto'                    # 'mean' of the heads | 'pca' = their first component | 'head0', ... | 'auto' = by val
detection = False                # regions of all images against masks; on the command line --detect will do
low_threshold = 0.3              # hysteresis, of heat in 0..1: a region's patches reach this (paper: 0.3) ...
high_threshold = 0.7             # ... and one of them this (paper: 0.7)
min_iou = 0.1                    # overlap with which a region finds a lesion: detection_metrics
config_keys = list_keys(globals())

QUANTILES = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)    # of the heat of val patches: what may count as 1


# ---- attention maps ----

def cls_attention(backbone, pixels):
    """What the CLS token attends to in the last block, head by head: softmax(q k^T / sqrt(d)), the row of CLS only.

    The matrix of all tokens is never made: one query against all keys is O(heads * patches) numbers, 0.2 MB for 12
    heads and 4096 patches where the matrix would take 0.8 GB. (The blocks before run as the backbone is set; sdpa,
    the default, makes no matrix either.)
    Args: backbone: of any family, or its peft wrapper, in eval mode; pixels [B,C,H,W], normalised, H and W multiples
    of the patch size. Returns: [B,heads,h,w] fp32. A head's map sums to less than 1: what goes to CLS itself and to
    registers is left out and not handed to the patches, so that a head that rests on them stays dark. Paper equation 3.
    """
    tokens, rope = embed(backbone, pixels)
    tokens = run_blocks(backbone, tokens, rope, last=-1)                                   # [B,1+R+P,D]
    block, patch, heads = blocks(backbone)[-1], backbone.config.patch_size, backbone.config.num_attention_heads
    tokens = (block.layernorm_before if hasattr(block, "layernorm_before") else block.norm1)(tokens)
    # called, not multiplied by their weights: LoRA may have wrapped them; the names changed with transformers 5
    layers = {name.split(".")[-1]: module for name, module in block.attention.named_modules()}
    query, key = (layers.get(new, layers.get(old)) for new, old in (("q_proj", "query"), ("k_proj", "key")))
    q = query(tokens[:, :1]).unflatten(-1, (heads, -1)).transpose(1, 2)                    # [B,heads,1,d]
    k = key(tokens).unflatten(-1, (heads, -1)).transpose(1, 2)                             # [B,heads,1+R+P,d]
    prefix = 1 + getattr(backbone.config, "num_register_tokens", 0)
    if rope:                                                  # DINOv3 turns the keys of patches; CLS has no place
        cos, sin = rope["position_embeddings"]                                             # [P,d]
        k_patches = k[:, :, prefix:]
        half = k_patches.shape[-1] // 2
        turned = torch.cat([-k_patches[..., half:], k_patches[..., :half]], dim=-1)
        k = torch.cat([k[:, :, :prefix], k_patches * cos + turned * sin], dim=2)
    attention = (q.float() @ k.float().transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)   # [B,heads,1,1+R+P]
    h, w = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    return attention[:, :, 0, prefix:].unflatten(-1, (h, w))                               # [B,heads,h,w]


def pca_heads(attention, n_components=1):
    """The heads' maps in fewer channels: their principal components, image by image (paper section 2.2.5: 12 -> 1).

    A patch is a point with one coordinate a head; the components are those directions in which the patches of one image
    differ most. By image, so that no map depends on what else is in the batch.
    Args: attention [B,heads,h,w]. Returns: [B,n,h,w] fp32 in 0..1, each from its least to its largest value; the sign,
    which PCA leaves open, is such that high = attended (correlates with the mean over the heads). Zeros for components
    that the heads lack and where all patches are alike.
    """
    B, heads, h, w = attention.shape
    x = attention.flatten(2).double()                                                      # [B,heads,P]
    x = x - x.mean(dim=2, keepdim=True)
    directions = torch.linalg.eigh(x @ x.transpose(1, 2))[1].flip(2)[:, :, :n_components]   # [B,heads,n], largest first
    scores = directions.transpose(1, 2) @ x                                                # [B,n,P]
    agrees = (scores * x.mean(dim=1, keepdim=True)).sum(dim=2, keepdim=True)
    scores = scores * torch.where(agrees < 0, -1.0, 1.0)
    low, high = scores.amin(dim=2, keepdim=True), scores.amax(dim=2, keepdim=True)
    flat = high - low <= 1e-12
    scores = torch.where(flat, 0.0, (scores - low) / torch.where(flat, 1.0, high - low))
    return F.pad(scores, (0, 0, 0, n_components - scores.shape[1])).float().unflatten(2, (h, w))


# ---- one network on many images ----

def heat_of(attention, source):
    """One heatmap [h,w] of the heads' maps [heads,h,w]: source 'mean', 'pca' (in 0..1 by image) or 'head0', ..."""
    if source == "mean":
        return attention.mean(dim=0).numpy()
    return pca_heads(attention[None])[0, 0].numpy() if source == "pca" else attention[int(source[4:])].numpy()


def scaled(heatmap, scale):
    """Heat in 0..1: by scale (low, high), the same for all images, or () by the image's own least and largest value."""
    low, high = scale or (heatmap.min(), heatmap.max())
    return ((heatmap - low) / (high - low if high > low else 1)).clip(0, 1)


def resized(image, size, patch):
    """An image [H,W,C] at the network's size, [1,C,H',W'], its own dtype: the whole of it, shorter side at `size`,
    each side rounded to a multiple of the patch size: nothing is cut off or padded, the aspect changes by half a patch.
    """
    shape = [max(1, round(side * size / min(image.shape[:2]) / patch)) * patch for side in image.shape[:2]]
    return resize(image, shape)[None]


@torch.no_grad()
def look(backbone, dataset, reading, classes, rows=None):
    """Attention and truth of every image, one at a time as sizes may differ.

    Args: backbone, reading: of evaluate.load_network; classes: mask values that count, () = all but 0; rows: which
    images, None = all. Returns: lists of attention [heads,h,w] on the CPU, truth [h,w] bool or None without a mask,
    brightest [h,w] (the largest pixel of each patch, mean over channels, no window: the baseline without a network).
    """
    attention, truths, brightest = [], [], []
    photometrics = Photometrics("medical", reading["intensity_range"], reading["mean"], reading["std"])
    patch, its_device = backbone.config.patch_size, next(backbone.parameters()).device
    rows = range(len(dataset)) if rows is None else rows
    for i in tqdm(rows, desc=f"{dataset.split} attention", leave=False, disable=None):
        image, mask = dataset[i]
        pixels = resized(image, reading["size"], patch)
        attention.append(cls_attention(backbone, photometrics.plain(pixels.to(its_device)))[0].cpu())
        truths.append(None if mask is None else labelled_patches(is_labelled(mask, classes), attention[-1].shape[1:]))
        brightest.append(F.max_pool2d(pixels.float().mean(dim=1), patch)[0].numpy())
    return attention, truths, brightest


def score(heatmaps, truths, scale):
    """All numbers of one source of heat. Returns: dict of pool_detections over all images, over those with a lesion,
    and patch_metrics; and by image the detection_metrics with its regions, boxes as shares of width and height."""
    images_ = []
    for heatmap, truth in zip(heatmaps, truths):
        regions, (h, w) = detect(scaled(heatmap, scale), low_threshold, high_threshold), truth.shape
        boxes = [dict(box=[x / n for x, n in zip(region["box"], (w, h, w, h))], area=region["area"],
                      score=region["score"]) for region in regions]
        images_.append(dict(detection_metrics(regions, truth, min_iou), regions=boxes))
    lesions = [image for image, truth in zip(images_, truths) if truth.any()]
    return dict(all=pool_detections(images_), lesions=pool_detections(lesions),
                patches=patch_metrics(heatmaps, truths)), images_


def choose(sources, truths):
    """The source of heat and its scale with the largest F1 (of the summed counts) on val.

    Args: sources {name: list of heatmaps [h,w]}; truths: list of [h,w] bool. The scales that are tried: each image by
    itself (the paper's way, which finds something in every image), and from the median of all patches up to one of
    QUANTILES, the same for all images. Returns: name, scale (low, high) or (), F1.
    """
    best = ("", (), -1.0)
    for name, heatmaps in sources.items():
        values = np.concatenate([x.ravel() for x in heatmaps])
        for scale in [()] + [(float(np.median(values)), float(np.quantile(values, q))) for q in QUANTILES]:
            results = [detection_metrics(detect(scaled(x, scale), low_threshold, high_threshold), t, min_iou)
                       for x, t in zip(heatmaps, truths)]
            f1 = pool_detections(results)["micro"]["f1"]
            if f1 > best[2]:                                  # nan, without any lesion on val, is never larger
                best = (name, scale, f1)
    return best if best[0] else (next(iter(sources)), (), math.nan)


# ---- tables ----

def tabulate(networks):
    """The numbers of one split in the layout of the paper's Table 4, a column for each network; those of one group
    share theirs, mean (standard deviation). networks: dicts with name, group, results, heat."""
    groups = {}
    for network in networks:
        groups.setdefault(network["group"], []).append(network)

    def row(title, *path):
        cells = []
        for group in groups.values():
            values = []
            for network in group:
                value = network["results"]
                for key in path:
                    value = value[key]
                values.append(value)
            form = "{:.1f}" if path[-1] in ("tp", "fp", "fn") else "{:.4f}"
            spread = f" ({form.format(np.std(values, ddof=1))})" if len(values) > 1 else ""
            cells.append("-" if np.isnan(values).any() else form.format(np.mean(values)) + spread)
        return [title, *cells]
    ratios_, counts = (("Precision", "precision"), ("Recall", "recall"), ("F1-score", "f1"),
                       ("Localization score", "localization")), \
        (("True positives", "tp"), ("False positives", "fp"), ("False negatives", "fn"))
    names = []
    for group in groups.values():
        name = os.path.commonprefix([os.path.basename(network["name"].rstrip("/")) for network in group]).rstrip("-_")
        names.append("start of " * group[0]["name"].startswith("start of ") + name
                     + (f", {len(group)} seeds" if len(group) > 1 else ""))
    text = ""
    for which, title in (("lesions", "Images with a lesion"), ("all", "All images")):
        text += f"\n## {title}\n\n" + markdown(
            ["Metric", *names],
            [row(f"{name}, average", which, "macro", key) for name, key in ratios_]
            + [row(name, which, "micro", key) for name, key in counts]
            + [row(f"{name}, total", which, "micro", key) for name, key in ratios_]) + "\n"
    text += "\n## Patches, without a threshold\n\n" + markdown(
        ["Metric", *names],
        [row(name, "patches", key) for name, key in (("AUROC", "auroc"), ("Average precision", "average_precision"),
                                                     ("of a guess", "chance"), ("Pointing game", "pointing"))]) + "\n"
    return text + "\n" + "".join(
        f"- {network['name']}: heat = {network['heat']}, "
        + ("each image from its least to its largest value" if not network["scale"] else
           "{:.4g} to {:.4g} is 0 to 1 in all images".format(*network["scale"])) + f"; {network['chosen']}\n"
        for network in networks) + "- brightest patch: the largest pixel of each patch, on the first network's grid\n"


# ---- pictures ----

def draw(network, dataset, rows, reading, classes, folder):
    """The pictures of the images `rows` of a data set: a sheet of all, and every head of each.

    network: dict with name, backbone, heat, scale, and attention, the maps of rows.
    """
    side, patch, backbone = 200, network["backbone"].config.patch_size, network["backbone"]
    its_device = next(backbone.parameters()).device
    photometrics = Photometrics("medical", reading["intensity_range"], reading["mean"], reading["std"])
    tokens, grids = [], []
    for i in rows:                                            # again, as maps and features come from different layers
        pixels = photometrics.plain(resized(dataset[i][0], reading["size"], patch).to(its_device))
        with torch.no_grad():
            tokens.append(final_norm(backbone, run_blocks(backbone, *embed(backbone, pixels)))[1][0].cpu())
        grids.append((pixels.shape[-2] // patch, pixels.shape[-1] // patch))
    colors = [None] * len(rows)
    for grid in set(grids):                                   # colours mean the same in all images of one size
        same = [j for j in range(len(rows)) if grids[j] == grid]
        rim = np.pad(np.zeros((grid[0] - 2, grid[1] - 2), bool), 1, constant_values=True) if min(grid) > 2 else \
            np.ones(grid, bool)
        for j, color in zip(same, pictures.feature_colors(torch.stack([tokens[j] for j in same]), rim.ravel())):
            colors[j] = color.reshape(*grid, 3)
    sheet, outlined = [], "; cyan: the label" if dataset.masks is not None else ""
    title = os.path.basename(network["name"].rstrip("/"))
    for j, i in enumerate(rows):
        image, mask = dataset[i]
        picture = pictures.to_picture(image, reading["intensity_range"])
        attention = network["attention"][j]                                                # [heads,h,w]
        truth = None if mask is None else is_labelled(mask, classes)

        def tile(under):
            under = pictures.to_picture(under, side=side)
            return under if truth is None or not truth.any() else pictures.outline(under, truth)

        def paint(values):                                    # [h,w,3] in 0..1 -> picture of the image's shape
            small = Image.fromarray((np.asarray(values) * 255).round().astype(np.uint8))
            return tile(small.resize(picture.size, Image.NEAREST))
        hot = scaled(heat_of(attention, network["heat"]), network["scale"])
        regions = detect(hot, low_threshold, high_threshold)
        found = np.zeros(hot.shape, bool)
        for region in regions:
            found[tuple(region["patches"].T)] = True
        mean, pca = attention.mean(dim=0).numpy(), pca_heads(attention[None], 3)[0].numpy()
        counted = "" if truth is None else "{tp} found, {fn} missed, {fp} false".format(**detection_metrics(
            regions, labelled_patches(truth, hot.shape), min_iou))
        name = os.path.splitext(os.path.basename(dataset.path(i)))[0] if isinstance(dataset.images, ImageFiles) else \
            f"{dataset.split}-{i:04d}"
        warm = pictures.overlay(picture, hot, side)
        sheet.append([(tile(picture), name, None),
                      (pictures.overlay(picture, scaled(mean, ()), side), f"{mean.sum():.0%} of the attention", None),
                      (pictures.overlay(picture, pca[0], side), "", None),
                      (paint(pca.transpose(1, 2, 0)), "", None),
                      (paint(colors[j]), "", None),
                      (pictures.outline(tile(warm), found, "white"), f"{len(regions)} region(s)\n{counted}", None)])
        heads = [(tile(picture), name, None)]
        heads += [(pictures.overlay(picture, scaled(x.numpy(), ()), side),
                   f"head {n}\n{x.sum():.0%}, peak {x.max():.3f}", None) for n, x in enumerate(attention)]
        width = 4 if len(heads) <= 8 else 7
        pictures.contact_sheet(
            os.path.join(folder, f"{name}-heads.png"), [heads[k:k + width] for k in range(0, len(heads), width)],
            f"Every head of the last block: {title}\nper cent = attention on patches, the rest is on CLS"
            f" and registers{outlined}", side, scale=("least", "largest of the head", "attention of CLS"))
    pictures.contact_sheet(
        os.path.join(folder, "sheet.png"), sheet, f"Attention of {title}\n"
        "black to white: pixels of {:g} to {:g}; ".format(*reading["intensity_range"]) +
        f"regions (white): heat = {network['heat']}, from {low_threshold}, one patch at {high_threshold}{outlined}",
        side, ["image", "mean of the heads", "heads, 1st component", "3 components, RGB", "patch features, PCA",
               "regions"], ("least", "largest of the image", "attention of CLS to the patches"))


# ---- the script ----

def open_images(num_channels):
    """The data set of the keys images and masks; num_channels: of a run's network, 0 = as the first image."""
    def listed(path):
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder")
        return [path] if os.path.isfile(path) else sorted(
            os.path.join(path, file) for file in os.listdir(path) if file.lower().endswith(EXTENSIONS))
    files = listed(images)
    if not files:
        raise UserError(f"images={images!r}: no image; looked for files ending in {', '.join(EXTENSIONS)}")
    mask_files = None
    if masks:
        by_stem = {os.path.splitext(os.path.basename(file))[0]: file for file in listed(masks)}
        mask_files = [masks] if os.path.isfile(masks) and len(files) == 1 else \
            [by_stem.get(os.path.splitext(os.path.basename(file))[0], "") for file in files]
        if not any(mask_files):
            raise UserError(f"masks={masks!r}: no file is named like an image in {images!r}; "
                            "the mask of a.jpg is a.png or a.npy")
    return Dataset(ImageFiles("", files, num_channels or load_image(files[0]).shape[2]), None,
                   mask_files and ImageFiles("", mask_files, as_mask=True), name=images, split="images")


def main(sources):
    """Look at what the config in this module's globals names; sources: from configurator.override."""
    run_device = setup(device)
    names = [name.strip() for name in f"{run},{model_type}".split(",") if name.strip()]
    if not names:
        raise UserError("nothing to look at: give --run=out/NAME, or --model_type=ID with --images or --dataset_path")
    if checkpoint not in ("best", "last") or not 0 <= low_threshold <= high_threshold <= 1:
        raise UserError(f"checkpoint={checkpoint!r}, low_threshold={low_threshold}, high_threshold={high_threshold}; "
                        "needs 'best' or 'last', and 0 <= low <= high <= 1")
    if heat not in ("mean", "pca", "auto") and not (heat.startswith("head") and heat[4:].isdigit()):
        raise UserError(f"heat={heat!r}: choose mean, pca, head0, head1, ..., or auto")
    if teacher := next((name for name in names if name.startswith("timm:")), ""):
        raise UserError(f"{teacher}: a timm network keeps its attention to itself; give a Hugging Face id or directory")
    print(describe(globals(), config_keys, sources) + "\n")
    networks = find_networks(names, checkpoint)
    config = next((network["config"] for network in networks if network["config"]), {})
    classes = label_guided_classes or config.get("label_guided_classes", ())

    # ---- images ----
    source = dataset_path or config.get("dataset_path", "")
    if not images and not source:
        raise UserError("there is no run to take a data set from; add --images=... or --dataset_path=...")

    def open_split(name):
        return load_dataset(source, name, dataset_size or config.get("dataset_size", 224), cache_dir, download_url,
                            config.get("num_channels", 0))
    if images:
        own = 0                                               # a run's channels; weights take what the images have
        if config and os.path.isfile(path := os.path.join(networks[-1]["reads"], "config.json")):
            own = json.load(open(path))["num_channels"]
        dataset = open_images(own)
    else:
        dataset = open_split(split)
    if detection and dataset.masks is None:
        raise UserError(f"detection=true, but {dataset.name} has no masks to compare with")
    # what is chosen is chosen on val, never on what is measured
    val = None
    if heat == "auto" and detection and not images and split != "val" and "val" in dataset.splits:
        val = open_split("val")
        val = val if val.masks is not None else None

    # ---- every network ----
    rows, shown = [], list(range(min(n_images, len(dataset))))
    folder = out_dir or (os.path.join(run, "results", "attention") if names == [run.strip()] and "*" not in run else
                         os.path.join("out", "attention"))
    os.makedirs(folder, exist_ok=True)

    def measure(name, group, sources, val_sources, truths, val_truths):
        """Choose on val, measure, keep as a column of the table; returns its dict."""
        chosen, scale, f1 = choose(val_sources, val_truths) if val_truths else \
            ((heat if heat != "auto" and heat in sources else next(iter(sources))), (), math.nan)
        network = dict(name=name, group=group, heat=chosen, scale=scale,
                       chosen=f"F1 on val {f1:.3f}" if val_truths else "nothing was chosen")
        network["results"], network["images"] = score(sources[chosen], truths, scale)
        rows.append(network)
        print(f"{name}: heat = {chosen}, F1 {network['results']['all']['micro']['f1']:.3f}, AUROC "
              f"{network['results']['patches']['auroc']:.3f}, average precision "
              f"{network['results']['patches']['average_precision']:.3f}, pointing "
              f"{network['results']['patches']['pointing']:.3f}", flush=True)
        return network

    for network in networks:
        if not detection and network is not networks[-1]:
            continue                                          # pictures are of the last one
        backbone, reading = load_network(network, network["config"] or config, dataset, run_device, image_size,
                                         intensity_range)
        heads = backbone.config.num_attention_heads
        if heat.startswith("head") and int(heat[4:]) >= heads:
            raise UserError(f"heat={heat!r}: {network['name']} has {heads} heads, head0 to head{heads - 1}")
        found = dict(heat="mean" if heat == "auto" else heat, scale=())
        if detection:
            attention, truths, brightest = look(backbone, dataset, reading, classes)
            val_attention, val_truths, val_brightest = look(backbone, val, reading, classes) if val else ([], [], [])
            kept, val_kept = ([i for i, t in enumerate(ts) if t is not None] for ts in (truths, val_truths))
            truths, val_truths = [truths[i] for i in kept], [val_truths[i] for i in val_kept]

            def by_source(maps, which):
                every = ["mean", "pca"] + [f"head{n}" for n in range(heads)] if heat == "auto" else [heat]
                return {name: [heat_of(maps[i], name) for i in which] for name in every}
            if not rows:
                measure("brightest patch", "brightest patch", dict(brightest=[brightest[i] for i in kept]),
                        dict(brightest=[val_brightest[i] for i in val_kept]), truths, val_truths)
            found = measure(network["name"], network["group"], by_source(attention, kept),
                            by_source(val_attention, val_kept), truths, val_truths)
    if n_images:
        attention = look(backbone, dataset, reading, classes, shown)[0]
        draw(dict(found, name=networks[-1]["name"], backbone=backbone, attention=attention), dataset, shown, reading,
             classes, folder)
    if detection:
        text = f"# Detection: {dataset.name}, {dataset.split}, {len(truths)} images with masks\n{tabulate(rows)}"
        print("\n" + text)
        with open(os.path.join(folder, "detection.md"), "w") as file:
            file.write(text)
        with open(os.path.join(folder, "detection.json"), "w") as file:
            json.dump(jsonable(dict(config={key: globals()[key] for key in config_keys}, networks=rows)), file)
    print(f"tables and pictures are in {folder}")


if __name__ == "__main__":
    flags = ["--detection=true" if flag == "--detect" else flag for flag in sys.argv[1:]]  # the name is a function's
    with one_line_errors():
        main(override(globals(), config_keys, flags))
