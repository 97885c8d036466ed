"""Features of a whole data set by any network, and which networks and weights there are.

train.py and distill.py measure k-NN with these functions, evaluate.py and attention.py tables and pictures. 
"""
import ast
import contextlib
import glob
import hashlib
import math
import os
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from augment import Photometrics, center_square, resize_center
from configurator import UserError
from distributed import gather_objects, loader_workers, rank, world_size
from loader import input_settings
from metrics import knn_classify
from model import backbone_from_config, build_backbone, forward_features, pretrained_input
from teachers import FrozenTeacher, build_teacher


# ---- features ----

class WholeImages(torch.utils.data.Dataset):
    """The images of a data set at one size: item i -> dict with i, pixels [C,size,size] in native dtype, mask
    [size,size] or None, and digest, a hash of the image as it was read; or with i and error, a text."""

    def __init__(self, dataset, size, with_masks=False):
        self.dataset, self.size, self.with_masks = dataset.at_least(size), size, with_masks

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        try:
            image, mask = self.dataset[i]
        except UserError as error:                             # as text: an exception from a worker is a page long
            return dict(i=i, error=str(error))
        item = dict(i=i, pixels=resize_center(image, self.size),
                    digest=hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).digest(), mask=None)
        if self.with_masks and mask is not None:               # nearest: a class between two classes means nothing
            square = center_square(mask)
            near = ((np.arange(self.size) + 0.5) * len(square) / self.size).astype(int)
            item["mask"] = square[near][:, near]
        return item


@torch.no_grad()
def stream(backbone, dataset, size=224, intensity_range=(0, 255), mean=(0.5,), std=(0.5,), batch_size=64,
           num_workers=0, autocast=contextlib.nullcontext, on_bad_image="error", patch=0, with_masks=False):
    """Features of a data set batch by batch, in its order, with a progress bar.

    Args: backbone: any that forward_features takes, in eval mode, on its device, or a teachers.FrozenTeacher, which
    normalises by itself (mean 0, std 1 then); None for the raw pixels (at `size`,
    normalised, flattened; patches of `patch` pixels): the baseline that features have to beat. size: pixels of the
    square the images are resized to; intensity_range, mean, std: as in training; autocast: called for a context around
    the forward pass; on_bad_image: 'skip' leaves out what cannot be read, 'error' raises UserError.
    Yields: dicts with cls [b,D] and patches [b,P,D] fp32 on the backbone's device (None for raw pixels without patch),
    and lists of length b: rows (place in the data set), digests, masks ([size,size] arrays or None).
    """
    its_device = next(backbone.parameters()).device if backbone is not None else torch.device("cpu")
    photometrics = Photometrics("medical", intensity_range, mean, std)
    loader = DataLoader(WholeImages(dataset, size, with_masks), batch_size=batch_size, num_workers=num_workers,
                        collate_fn=list)
    for items in tqdm(loader, desc=f"{dataset.split} features", leave=False, disable=None):
        if on_bad_image == "error" and (errors := [item["error"] for item in items if "error" in item]):
            raise UserError(errors[0])
        items = [item for item in items if "error" not in item]
        if not items:
            continue
        pixels = photometrics.plain(torch.stack([item["pixels"] for item in items]).to(its_device))   # [b,C,size,size]
        if backbone is None:
            cls = pixels.flatten(1)
            patches = F.unfold(pixels, patch, stride=patch).transpose(1, 2) if patch else None   # [b,P,C*p*p]
        else:
            with autocast():
                cls, patches = (tokens.float() for tokens in (
                    backbone(pixels) if isinstance(backbone, FrozenTeacher) else forward_features(backbone, pixels)))
        yield dict(cls=cls, patches=patches, rows=[item["i"] for item in items],
                   digests=[item["digest"] for item in items], masks=[item["mask"] for item in items])


def gather(backbone, dataset, with_patch_mean=False, **settings):
    """The features of a whole data set in one array, and what belongs to them; memory is that of the features.

    Args: with_patch_mean: the mean patch token behind the CLS token, [N,2D]; settings: of `stream`.
    Returns: dict with features [N,D] fp32 on the backbone's device (raw pixels: CPU), labels [N] int64 ([N,c]
    multi-label) or None, and lists rows and digests. Images that on_bad_image='skip' leaves out are missing from all.
    """
    features, rows, digests = None, [], []
    for batch in stream(backbone, dataset, **settings):
        x = torch.cat([batch["cls"], batch["patches"].mean(dim=1)], dim=1) if with_patch_mean else batch["cls"]
        if features is None:
            features = x.new_empty(len(dataset), x.shape[1])
        features[len(rows):len(rows) + len(x)] = x
        rows += batch["rows"]
        digests += batch["digests"]
    if features is None:
        raise UserError(f"{dataset.name}, {dataset.split}: not one of {len(dataset)} images can be read")
    labels = None if dataset.labels is None else torch.from_numpy(np.asarray(dataset.labels)[rows].astype(np.int64))
    return dict(features=features[:len(rows)], labels=labels, rows=rows, digests=digests)


def extract_features(backbone, dataset, **settings):
    """(CLS features [N,D] fp32, labels [N] int64, [N,c] or None) of a data set, in its order; see gather and stream."""
    found = gather(backbone, dataset, **settings)
    return found["features"], found["labels"]


def shared_features(backbone, dataset, **settings):
    """As extract_features, every rank computing its share. The shares are equally long, the last one goes on at the
    first image: a sharded network has to be called equally often on all ranks."""
    n = math.ceil(len(dataset) / world_size())
    share = np.arange(rank() * n, (rank() + 1) * n) % len(dataset)
    found = gather(backbone, dataset.subset(share, dataset.split), **settings)
    mine = (share[found["rows"]], found["features"].cpu().numpy(), found["labels"].numpy())
    rows, features, labels = (np.concatenate(parts) for parts in zip(*gather_objects(mine)))
    _, first = np.unique(rows, return_index=True)
    return torch.from_numpy(features[first]).to(found["features"].device), torch.from_numpy(labels[first])


def knn_accuracy(backbone, bank, queries, k=5, **settings):
    """{name: share of right predictions} for every data set of `queries` {name: Dataset}, neighbours from `bank`;
    settings: of `stream`; backbone None = raw pixels. All ranks work and have the same dict."""
    if not queries:
        return {}
    train_features, train_labels = shared_features(backbone, bank, **settings)
    result = {}
    for name, dataset in queries.items():
        features, labels = shared_features(backbone, dataset, **settings)
        predictions = knn_classify(train_features, train_labels, features, k).cpu()
        result[name] = float((predictions == labels).float().mean())
    return result


class KnnMeasure:
    """k-NN accuracy of a run's network: each image of a split is classified by its nearest images
    in train."""

    def __init__(self, train_set, splits, config, inputs, autocast):
        """Args: splits: {name: Dataset}; config: namespace of train.py's or distill.py's keys;
        inputs: of loader.input_settings; autocast: of distributed.autocast_for."""
        n, seed = config.eval_max_images, config.seed
        self.bank = train_set.limited(n, seed)
        self.splits = {name: dataset.limited(n, seed) for name, dataset in splits.items()}
        self.size = config.global_crops_size
        self.settings = dict(inputs, num_workers=loader_workers(config.num_workers),
                             autocast=autocast, on_bad_image=config.on_bad_image)

    def accuracy(self, backbone, names):
        """{split: accuracy} of a backbone on the splits of these names."""
        queries = {name: self.splits[name] for name in names}
        return knn_accuracy(backbone, self.bank, queries, size=self.size, **self.settings)

    def pixels(self):
        """{split: accuracy} of the raw pixels, at 32 pixels or at the crop size if that is less."""
        size = min(32, self.size)
        return knn_accuracy(None, self.bank, self.splits, size=size, **self.settings)


# ---- which networks ----

def read_run(folder):
    """The resolved config of a run, a dict, from its config.py; parsed as literals, so nothing in it is executed."""
    tree = ast.parse(open(os.path.join(folder, "config.py")).read())
    return {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)}


def adaptation(config):
    """What a run trains, in the words of the paper's tables."""
    kinds = ["LoRA"] * config["use_lora"] + ["layer freezing"] * (config["freeze_backbone_layers"] > 0)
    words = " + ".join(kinds) or ("standard" if config["use_pretrained"] else "from scratch")
    teacher = os.path.basename(config.get("distilled_model_type", "").rstrip("/"))
    return words + (f", distilled from {teacher} ({config['objective']})" if teacher else "")


def find_networks(names, checkpoint):
    """What is to be measured: all names that are no runs as they are, then every run behind its untouched start.

    Returns: list of dicts: name, model, adaptation; group: equal for what differs by its seed alone; loads: where its
    weights lie, '' = those that the run `config` started from; reads: where its input settings lie; config: of the run,
    or None; start: of a run, the name of its start. Raises UserError for a run without the checkpoint asked for.
    """
    def short(path):                                           # a run that began where another one ended
        return os.path.basename(re.sub("/checkpoints/[^/]+/hf/?$", "", path.rstrip("/")))

    ignored = ("seed", "model_name", "out_dir", "resume_from", "device", "num_workers", "wandb_log", "cache_dir",
               "generate_samples", "log_interval", "saveckp_freq", "teacher_cache")
    asked = ", ".join(names)
    names = dict.fromkeys(path for name in names for path in (sorted(glob.glob(name)) if "*" in name else [name]))
    runs = [name for name in names if os.path.isfile(os.path.join(name, "config.py"))]
    networks, pipelines = [], {}
    for name in runs:
        config, weights = read_run(name), os.path.join(name, "checkpoints", checkpoint, "hf")
        if not os.path.isdir(weights):
            raise UserError(f"{name} has no checkpoints/{checkpoint}/hf; 'best' is there once a run has begun, 'last' "
                            "when it has finished: train on with --resume_from, or choose the other checkpoint")
        # one start for all runs that begin with the same weights and read images alike
        pipeline = [config[key] for key in ("global_crops_size", "intensity_range", "image_mean", "image_std")]
        shared = config["use_pretrained"] and pipelines.setdefault(config["model_type"], pipeline) == pipeline
        start, kind = config["model_type"] if shared else f"start of {name}", \
            "pretrained" if config["use_pretrained"] else "untrained"
        both = dict(model=short(config["model_type"]), reads=weights, config=config)
        if all(start != network["name"] for network in networks):
            networks.append(dict(both, name=start, adaptation=kind, loads="",
                                 group=repr((kind, config["model_type"], pipeline))))
        networks.append(dict(both, name=name, adaptation=adaptation(config), loads=weights, start=start,
                             group=repr({key: value for key, value in config.items() if key not in ignored})))
    plain = [dict(name=name, model=short(name), adaptation="pretrained", group=name, loads=name, reads=name,
                  config=None)
             for name in names if name not in runs and name not in pipelines]
    if not plain + networks:
        raise UserError(f"nothing to evaluate: {asked!r} matches no folder")
    return plain + networks


def load_network(network, config, dataset, run_device, image_size=0, intensity_range=(0.0, 0.0), seed=0,
                 on_bad_image="error", teacher_dtype=torch.bfloat16):
    """The weights of one network, ready to measure, and how they want their images.

    Args: network: of find_networks; config: its run's, or that of the first run, {} without; dataset: what unknown
    intensities are measured on, its channels are the network's; image_size, intensity_range: the user's, 0 = not given;
    teacher_dtype: of the weights of a timm teacher.
    Returns: backbone in eval mode on run_device, for timm:NAME a teachers.FrozenTeacher; dict of size, intensity_range,
    mean, std for `stream`.
    """
    torch.manual_seed(config.get("seed", 0))                   # a start from scratch: the weights that the run drew
    if network["loads"].startswith("timm:"):                   # normalises by itself
        backbone = build_teacher(network["loads"], dtype=teacher_dtype)
        expected, patch = dict(mean=(0.0,) * 3, std=(1.0,) * 3), backbone.patch_size
    else:
        expected = pretrained_input(network["reads"])
        backbone = build_backbone(network["loads"], True, dataset.num_channels) if network["loads"] else \
            backbone_from_config(config, dataset.num_channels)
        patch = backbone.config.patch_size
    size = image_size or config.get("global_crops_size") or expected.get("size") or 224
    inputs, _ = input_settings(dataset, expected, intensity_range, seed=seed,
                               on_bad_image=on_bad_image)
    return backbone.to(run_device).eval(), dict(inputs, size=size // patch * patch)


# ---- tables as text ----

def markdown(header, rows):
    """A table in Markdown, columns padded so that it reads well in a terminal, too."""
    lines = [header, ["-" * len(cell) for cell in header], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines[1] = ["-" * width for width in widths]
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in lines)


def jsonable(value):
    """Nested dicts and lists with None for nan, which JSON does not know."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
