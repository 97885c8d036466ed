"""Features of a whole data set by any network; which networks there are, and how to load them.

train.py and distill.py measure k-NN with these functions. evaluate.py and attention.py load
networks with them.
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
from data import error_text
from distributed import (gather_objects, item_bytes, loader_workers, rank, workers_that_fit,
                         world_size)
from loader import input_settings
from metrics import knn_classify
from model import backbone_from_config, build_backbone, forward_features, pretrained_input
from signals import ignore_signals
from teachers import FrozenTeacher, build_teacher


# ---- features ----

class WholeImages(torch.utils.data.Dataset):
    """The images of a data set at one size. Item i is a dict with i, pixels [C,size,size] in the
    images' dtype, digest (a hash of the image as it was read), and mask [size,size] or None; for an
    unreadable image a dict with i and error, a text."""

    def __init__(self, dataset, size, with_masks=False):
        self.dataset, self.size, self.with_masks = dataset.at_least(size), size, with_masks

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        try:
            return self.item(i)
        except Exception as error:  # as text: an exception from a worker fills a page
            return dict(i=i, error=error_text(error, self.dataset, i))

    def item(self, i):
        """Item i of an image that can be read."""
        image, mask = self.dataset[i]
        content = np.ascontiguousarray(image).tobytes()
        item = dict(i=i, pixels=resize_center(image, self.size), mask=None,
                    digest=hashlib.blake2b(content, digest_size=16).digest())
        if self.with_masks and mask is not None:  # the nearest pixel: classes have no mean
            square = center_square(mask)
            nearest = (np.arange(self.size) + 0.5) * len(square) / self.size
            nearest = nearest.astype(int)
            item["mask"] = square[nearest][:, nearest]
        return item


@torch.no_grad()
def stream_features(backbone, dataset, size=224, intensity_range=(0, 255),
                    mean=(0.5,), std=(0.5,), batch_size=64, num_workers=0,
                    autocast=contextlib.nullcontext, on_bad_image="error", patch=0,
                    with_masks=False):
    """Features of a data set batch by batch, in its order, with a progress bar.

    Args: backbone: in eval mode, on its device; any that forward_features takes; a
    teachers.FrozenTeacher, which normalises by itself and needs mean 0, std 1; or None for the raw
    pixels, the baseline that features have to beat. size: pixels, images are resized to a square;
    intensity_range, mean, std: as in training; autocast: makes a context for the forward pass;
    on_bad_image: 'skip' leaves out unreadable images, 'error' raises UserError; patch: pixels, the
    patch size of the raw pixels, 0 = no patches; with_masks: also yield masks.
    Yields: dicts of cls [b,D] and patches [b,P,D] (or None), fp32 on the backbone's device; and
    lists of length b: indices into the data set, digests, masks ([size,size] arrays or None).
    """
    device = torch.device("cpu")
    if backbone is not None:
        device = next(backbone.parameters()).device
    photometrics = Photometrics("medical", intensity_range, mean, std)
    images = WholeImages(dataset, size, with_masks)
    if num_workers > 0 and len(images) > 0:
        num_workers = workers_that_fit(num_workers, item_bytes(images[0]) * batch_size)
    loader = DataLoader(images, batch_size=batch_size, num_workers=num_workers, collate_fn=list,
                        worker_init_fn=ignore_signals)
    for items in tqdm(loader, desc=f"{dataset.split} features", leave=False, disable=None):
        errors = [item["error"] for item in items if "error" in item]
        if errors and on_bad_image == "error":
            raise UserError(errors[0])
        items = [item for item in items if "error" not in item]
        if not items:
            continue
        pixels = torch.stack([item["pixels"] for item in items])
        pixels = photometrics.plain(pixels.to(device))  # [b,C,size,size]
        if backbone is None:
            cls, patches = pixels.flatten(1), None
            if patch:
                patches = F.unfold(pixels, patch, stride=patch).transpose(1, 2)  # [b,P,C*p*p]
        else:
            with autocast():
                if isinstance(backbone, FrozenTeacher):
                    cls, patches = backbone(pixels)
                else:
                    cls, patches = forward_features(backbone, pixels)
            cls, patches = cls.float(), patches.float()
        yield dict(cls=cls, patches=patches, indices=[item["i"] for item in items],
                   digests=[item["digest"] for item in items],
                   masks=[item["mask"] for item in items])


def collect_features(backbone, dataset, with_patch_mean=False, **settings):
    """All features of a data set in one tensor, with labels. It needs the memory of the features.

    Args: with_patch_mean: put the mean patch token behind the CLS token, [N,2D]; settings: of
    stream_features.
    Returns: dict of features [N,D] fp32 on the backbone's device (raw pixels: on the CPU); labels
    [N] int64, [N,c] for multi-label, or None; groups [N] int64 or None; and lists of N indices and
    digests. Images that on_bad_image='skip' leaves out are missing from all five. Raises UserError
    if none can be read.
    """
    features, indices, digests = None, [], []
    for batch in stream_features(backbone, dataset, **settings):
        x = batch["cls"]
        if with_patch_mean:
            patch_mean = batch["patches"].mean(dim=1)
            x = torch.cat([x, patch_mean], dim=1)
        if features is None:
            features = x.new_empty(len(dataset), x.shape[1])
        n = len(indices)
        features[n:n + len(x)] = x
        indices += batch["indices"]
        digests += batch["digests"]
    if features is None:
        raise UserError(f"{dataset.name}, {dataset.split}: not one of {len(dataset)} images can be "
                        "read")
    labels = None
    if dataset.labels is not None:
        labels = np.asarray(dataset.labels)[indices].astype(np.int64)
        labels = torch.from_numpy(labels)
    groups = None if dataset.groups is None else dataset.groups[indices]
    features = features[:len(indices)]
    return dict(features=features, labels=labels, groups=groups, indices=indices, digests=digests)


def extract_features(backbone, dataset, **settings):
    """(CLS features [N,D] fp32, labels [N] int64, [N,c] or None) of a data set, in its order.
    settings: of stream_features."""
    collected = collect_features(backbone, dataset, **settings)
    return collected["features"], collected["labels"]


def shared_features(backbone, dataset, **settings):
    """(features [N,D], labels [N], groups [N] or None) of a data set: every rank computes a share,
    and all ranks get all features.

    All ranks must call a sharded network equally often, so all shares have the same length: the
    last share continues with the first images.
    """
    n = math.ceil(len(dataset) / world_size())
    first = rank() * n
    share = np.arange(first, first + n) % len(dataset)
    collected = collect_features(backbone, dataset.subset(share, dataset.split), **settings)
    device = collected["features"].device
    own_part = (share[collected["indices"]], collected["features"].cpu().numpy(),
                collected["labels"].numpy())
    parts = zip(*gather_objects(own_part))
    indices, features, labels = (np.concatenate(part) for part in parts)
    _, kept = np.unique(indices, return_index=True)  # each image once, in order
    features, labels = torch.from_numpy(features[kept]), torch.from_numpy(labels[kept])
    groups = dataset.groups
    if groups is not None:
        groups = torch.from_numpy(groups[indices[kept]])
    return features.to(device), labels, groups


def knn_accuracy(backbone, bank, queries, k=5, **settings):
    """{name: accuracy of k-NN} of every data set in `queries`, {name: Dataset}.

    Args: backbone: of stream_features, None = raw pixels; bank: Dataset of the neighbours;
    settings: of stream_features. All ranks work and get the same dict. Neighbours of a query's own
    group (patient) do not count.
    """
    if not queries:
        return {}
    train_features, train_labels, train_groups = shared_features(backbone, bank, **settings)
    result = {}
    for name, dataset in queries.items():
        features, labels, groups = shared_features(backbone, dataset, **settings)
        predictions = knn_classify(train_features, train_labels, features, k,
                                   train_groups=train_groups, test_groups=groups).cpu()
        result[name] = float((predictions == labels).float().mean())
    return result


class KnnMeasure:
    """k-NN accuracy of a run's network: each image of a split is classified by its nearest images
    in train."""

    def __init__(self, train_set, splits, config, inputs, autocast):
        """Args: splits: {name: Dataset}; config: namespace of train.py's or distill.py's keys;
        inputs: of loader.input_settings; autocast: of distributed.autocast_for."""
        n, seed = config.eval_max_images, config.seed
        self.bank = train_set.labelled().limited(n, seed)
        self.splits = {}
        for name, dataset in splits.items():
            self.splits[name] = dataset.labelled().limited(n, seed)
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

REPETITION_KEYS = {  # runs that differ in these keys only are repetitions of one experiment
    "seed", "model_name", "out_dir", "resume_from", "device", "num_workers", "wandb_log",
    "cache_dir", "generate_samples", "log_interval", "saveckp_freq", "teacher_cache"}


def read_run(folder):
    """The resolved config of a run, a dict, from its config.py. The file is parsed as literals:
    nothing in it is executed."""
    tree = ast.parse(open(os.path.join(folder, "config.py")).read())
    assignments = [node for node in tree.body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}


def adaptation(config):
    """What a run trains, in the words of the paper's tables."""
    words = []
    if config["use_lora"]:
        words.append("LoRA")
    if config["freeze_backbone_layers"] > 0:
        words.append("layer freezing")
    if not words:
        words.append("standard" if config["use_pretrained"] else "from scratch")
    text = " + ".join(words)
    teacher = os.path.basename(config.get("distilled_model_type", "").rstrip("/"))
    if teacher:
        text += f", distilled from {teacher} ({config['objective']})"
    return text


def short_name(path):
    """The last part of a hub id or a path; of weights that a run exported, the name of the run."""
    return os.path.basename(re.sub("/checkpoints/[^/]+/hf/?$", "", path.rstrip("/")))


def run_networks(folder, checkpoint, start_inputs):
    """(start, trained): the networks of a run before and after training, dicts of find_networks.

    start_inputs: {model_type: how the first run that started from it reads images}; this run is
    added. A run with other inputs gets a start of its own. Raises UserError without the checkpoint.
    """
    config = read_run(folder)
    weights_path = os.path.join(folder, "checkpoints", checkpoint, "hf")
    if not os.path.isdir(weights_path):
        raise UserError(f"{folder} has no checkpoints/{checkpoint}/hf; 'best' is there once a run "
                        "has begun, 'last' when it has finished: train on with --resume_from, or "
                        "choose the other checkpoint")
    model_type = config["model_type"]
    input_keys = ("global_crops_size", "intensity_range", "image_mean", "image_std")
    inputs = [config[key] for key in input_keys]
    start_name, kind = f"start of {folder}", "untrained"
    if config["use_pretrained"]:
        kind = "pretrained"
        if start_inputs.setdefault(model_type, inputs) == inputs:
            start_name = model_type
    common = dict(model=short_name(model_type), settings_path=weights_path, config=config)
    start = dict(common, name=start_name, adaptation=kind, weights_path="",
                 group=repr((kind, model_type, inputs)))
    settings = {key: value for key, value in config.items() if key not in REPETITION_KEYS}
    trained = dict(common, name=folder, adaptation=adaptation(config), weights_path=weights_path,
                   start=start_name, group=repr(settings))
    return start, trained


def find_networks(names, checkpoint):
    """The networks to measure: released weights first, then every run behind its start.

    Args: names: hub ids, directories of weights, timm:NAME, or folders of runs; in all of them *
    stands for any text; checkpoint: of the runs, 'best' or 'last'. Runs that started from the same
    weights and read images alike have one start.
    Returns: list of dicts with
    name, model, adaptation: texts.
    group: a text that is equal for networks that differ by their seed only.
    weights_path: where its weights are; '' = those that the run of `config` started from.
    settings_path: where its input settings are.
    config: of its run, or None.
    start: only of a trained network, the name of its start.
    Raises UserError for a run without the checkpoint, and if nothing is found.
    """
    paths = []
    for name in names:
        paths += sorted(glob.glob(name)) if "*" in name else [name]
    paths = list(dict.fromkeys(paths))  # each once
    runs = [path for path in paths if os.path.isfile(f"{path}/config.py")]
    networks, start_inputs = [], {}
    for folder in runs:
        start, trained = run_networks(folder, checkpoint, start_inputs)
        if all(network["name"] != start["name"] for network in networks):
            networks.append(start)
        networks.append(trained)
    released = []
    for path in paths:
        if path not in runs and path not in start_inputs:
            released.append(dict(name=path, model=short_name(path), adaptation="pretrained",
                                 group=path, weights_path=path, settings_path=path, config=None))
    if not released + networks:
        raise UserError(f"nothing to evaluate: {', '.join(names)!r} matches no folder")
    return released + networks


def load_network(network, config, dataset, run_device, image_size=0, intensity_range=(0.0, 0.0),
                 seed=0, on_bad_image="error", teacher_dtype=torch.bfloat16):
    """The weights of one network, ready to measure, and the settings of its input.

    Args: network: of find_networks; config: of its run, or of the first run, or {}; dataset: gives
    the number of channels, and unknown intensities are measured on it; image_size, intensity_range:
    what the user asks for, 0 = nothing; teacher_dtype: of the weights of a timm network.
    Returns: backbone in eval mode on run_device (for timm:NAME a teachers.FrozenTeacher); dict of
    size, intensity_range, mean, std for stream_features.
    """
    torch.manual_seed(config.get("seed", 0))  # a start from scratch: the run's own first weights
    weights_path = network["weights_path"]
    if weights_path.startswith("timm:"):  # normalises by itself
        backbone = build_teacher(weights_path, dtype=teacher_dtype)
        expected = dict(mean=(0.0,) * 3, std=(1.0,) * 3)
        patch = backbone.patch_size
    else:
        expected = pretrained_input(network["settings_path"])
        if weights_path:
            backbone = build_backbone(weights_path, True, dataset.num_channels)
        else:
            backbone = backbone_from_config(config, dataset.num_channels)
        patch = backbone.config.patch_size
    size = image_size or config.get("global_crops_size") or expected.get("size") or 224
    inputs, _ = input_settings(dataset, expected, intensity_range, seed=seed,
                               on_bad_image=on_bad_image)
    if size < patch:
        raise UserError(f"image_size={size}: {network['name']} has patches of {patch} pixels; give "
                        "a multiple, or 0 for the size of its training")
    return backbone.to(run_device).eval(), dict(inputs, size=size // patch * patch)
