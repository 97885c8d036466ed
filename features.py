"""Features of a whole data set by any network, batch by batch or all at once.

train.py and distill.py measure k-NN with these functions. evaluate.py and embed.py read features
with them, also those of several blocks.
"""
import contextlib
import copy
import hashlib
import math

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
from metrics import knn_classify
from model import blocks, final_norm, first_blocks, forward_features
from probe import fit_probe
from signals import ignore_signals
from teachers import FrozenTeacher

CHOICE_IMAGES = 1000  # of train and of val, from which choose_blocks chooses
MOST_KEPT_BYTES = 1e9  # of the tokens of a data set: 10 000 images of 112 pixels, ViT-S/14


# ---- features ----

class WholeImages(torch.utils.data.Dataset):
    """The images of a data set at one size. Item i is a dict with i, pixels [C,size,size] in the
    images' dtype, digest (a hash of the image as it was read), and mask [size,size] or None; for an
    unreadable image a dict with i and error, a text."""

    def __init__(self, dataset, size, with_masks=False):
        self.dataset, self.size, self.with_masks = dataset.at_least(size), size, with_masks
        self.n_read = 0

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
        self.n_read += 1
        if self.n_read % 1024 == 0:
            self.dataset.release()
        content = np.ascontiguousarray(image).tobytes()
        item = dict(i=i, pixels=resize_center(image, self.size), mask=None,
                    digest=hashlib.blake2b(content, digest_size=16).digest())
        if self.with_masks and mask is not None:  # the nearest pixel: classes have no mean
            square = center_square(mask)
            nearest = (np.arange(self.size) + 0.5) * len(square) / self.size
            nearest = nearest.astype(int)
            item["mask"] = square[nearest][:, nearest]
        return item


def stack_tensors(items):
    """Sort the dicts of a data set into (dicts of the images that can be read, without tensors;
    errors of the others; {key: tensors of the readable ones, stacked}).

    It runs in the worker: each tensor that a worker sends costs half a millisecond, one for a batch
    or one for an image."""
    errors = [item["error"] for item in items if "error" in item]
    items, tensors = [item for item in items if "error" not in item], {}
    for key, value in list(items[0].items()) if items else ():
        if torch.is_tensor(value):
            tensors[key] = torch.stack([item.pop(key) for item in items])
    return items, errors, tensors


@torch.no_grad()
def stream_features(backbone, dataset, size=224, intensity_range=(0, 255),
                    mean=(0.5,), std=(0.5,), batch_size=64, num_workers=0,
                    autocast=contextlib.nullcontext, on_bad_image="error", patch=0,
                    with_masks=False, block_numbers=(), kept=None):
    """Features of a data set batch by batch, in its order, with a progress bar.

    Args: backbone: in eval mode, on its device; any that forward_features takes; a
    teachers.FrozenTeacher, which normalises by itself and needs mean 0, std 1; or None for the raw
    pixels, the baseline that features have to beat. size: pixels, images are resized to a square;
    intensity_range, mean, std: as in training; autocast: makes a context for the forward pass;
    on_bad_image: 'skip' leaves out unreadable images, 'error' raises UserError; patch: pixels, the
    patch size of the raw pixels, 0 = no patches; with_masks: also yield masks; block_numbers: also
    yield the readout of these blocks, 0 = the first; kept: a KeptTokens of this data set, or None.
    Yields: dicts of cls [b,D], patches [b,P,D] (or None) and readout [b,n*D] (or None), the CLS
    tokens of the n blocks, each after the final norm and at unit length, side by side; all fp32 on
    the backbone's device; and lists of length b: indices into the data set, digests, masks
    ([size,size] arrays or None).
    """
    if kept is not None and kept.is_complete:
        yield from kept.features(backbone, autocast, block_numbers)
        return
    device = torch.device("cpu")
    if backbone is not None:
        device = next(backbone.parameters()).device
    photometrics = Photometrics("medical", intensity_range, mean, std)
    images = WholeImages(dataset, size, with_masks)
    if num_workers > 0 and len(images) > 0:
        num_workers = workers_that_fit(num_workers, item_bytes(images[0]) * batch_size)
    loader = DataLoader(images, batch_size=batch_size, num_workers=num_workers,
                        collate_fn=stack_tensors, worker_init_fn=ignore_signals)
    batches = tqdm(loader, desc=f"{dataset.split} features", leave=False, disable=None)
    for items, errors, tensors in batches:
        if errors and on_bad_image == "error":
            raise UserError(errors[0])
        if not items:
            continue
        pixels = photometrics.plain(tensors["pixels"].to(device))  # [b,C,size,size]
        readout = None
        if backbone is None:
            cls, patches = pixels.flatten(1), None
            if patch:
                patches = F.unfold(pixels, patch, stride=patch).transpose(1, 2)  # [b,P,C*p*p]
        else:
            with autocast(), cls_of_blocks(backbone, block_numbers) as block_cls:
                if isinstance(backbone, FrozenTeacher):
                    cls, patches = backbone(pixels)
                elif kept is None:
                    cls, patches = forward_features(backbone, pixels)
                else:
                    cls, patches = kept.add(backbone, pixels, items)
            cls, patches = cls.float(), patches.float()
            readout = join_blocks(block_cls, block_numbers)
        yield dict(cls=cls, patches=patches, readout=readout, **about_items(items))
    if kept is not None:
        kept.is_complete = not kept.is_full


def about_items(items):
    """What stream_features yields beside the features of some items of WholeImages."""
    about = {}
    for key, name in (("indices", "i"), ("digests", "digest"), ("masks", "mask")):
        about[key] = [item[name] for item in items]
    return about


class KeptTokens:
    """What the first n_blocks of a network, which are frozen, make of the images of a data set. The
    first pass of stream_features fills it, later ones run the other blocks only, and read no
    images. The features are the same to the bit. Of a data set whose tokens take more than
    MOST_KEPT_BYTES nothing is kept: every pass runs all blocks."""

    def __init__(self, n_blocks):
        self.n_blocks, self.batches, self.n_bytes = n_blocks, [], 0
        self.is_complete = self.is_full = False

    def add(self, backbone, pixels, items):
        """forward_features of a batch, whose tokens are kept; also those of CLS at the end of each
        of the n_blocks, for readouts. Args: pixels [b,C,size,size]; items: of WholeImages."""
        shallow, handles = [], []  # of CLS [b,1,D]
        for block in blocks(backbone)[:self.n_blocks]:
            handles.append(block.register_forward_hook(
                lambda _, inputs, tokens: shallow.append(tokens[:, :1].clone())))
        shared = first_blocks(backbone, pixels, self.n_blocks)
        for handle in handles:
            handle.remove()
        self.n_bytes += sum(part.nbytes for part in (shared[0], *shallow))
        self.is_full = self.n_bytes > MOST_KEPT_BYTES
        if self.is_full:
            self.batches.clear()
        else:
            self.batches.append((shared, shallow, about_items(items)))
        return forward_features(backbone, None, shared=shared)

    def features(self, backbone, autocast, block_numbers):
        """What stream_features yields, from the kept tokens."""
        norm = final_norm(backbone)
        for shared, shallow, about in self.batches:
            with autocast(), cls_of_blocks(backbone, block_numbers) as block_cls:
                cls, patches = forward_features(backbone, None, shared=shared)  # to the bit
                for number in block_numbers:
                    if number < self.n_blocks:
                        block_cls[number] = unit_cls(norm, shallow[number])
            readout = join_blocks(block_cls, block_numbers)
            cls, patches = cls.float(), patches.float()
            yield dict(cls=cls, patches=patches, readout=readout, **about)


def unit_cls(norm, tokens):
    """CLS tokens [b,1,D] after the final norm, at unit length: [b,D] fp32."""
    return F.normalize(norm(tokens)[:, 0].float(), dim=1)


def join_blocks(block_cls, numbers):
    """The readout [b,n*D] of these blocks from {number: [b,D]}; None without blocks."""
    return torch.cat([block_cls[n] for n in numbers], dim=1) if block_cls else None


@contextlib.contextmanager
def cls_of_blocks(backbone, numbers):
    """Around a forward pass: yields a dict that gets {number: [b,D] fp32}, the CLS token of each of
    these blocks after the final norm, at unit length. backbone: of stream_features."""
    found, handles = {}, []
    if len(numbers):
        layers = block_list(backbone)
        is_teacher = isinstance(backbone, FrozenTeacher)
        norm = final_norm(backbone.network if is_teacher else backbone)

    def keep(number):
        def hook(_, inputs, tokens):
            found[number] = unit_cls(norm, tokens[:, :1])
        return hook
    for number in dict.fromkeys(numbers):
        handles.append(layers[number].register_forward_hook(keep(number)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def block_list(backbone):
    """The transformer blocks of a backbone of stream_features."""
    return backbone.blocks() if isinstance(backbone, FrozenTeacher) else blocks(backbone)


# ---- readout of several blocks ----

def block_choices(n_blocks):
    """The short list of readouts, lists of block numbers: the last block; that and the middle one;
    a third, a half and two thirds of the way with the last (nanopath); the last four (DINOv2)."""
    last, half = n_blocks - 1, n_blocks // 2
    thirds = [n_blocks // 3, half, 2 * n_blocks // 3, last]
    last_four = range(max(0, n_blocks - 4), n_blocks)
    choices = [[last], [half, last], thirds, last_four]
    distinct = []
    for choice in choices:
        choice = sorted(set(choice))
        if choice not in distinct:
            distinct.append(choice)
    return distinct


def parse_blocks(text, n_blocks):
    """The block numbers of a config key: 'last', or numbers like '4,6,8,11'. UserError if there is
    no such block."""
    if text == "last":
        return [n_blocks - 1]
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not 0 <= numbers[0] <= numbers[-1] < n_blocks:
        raise UserError(f"blocks={text!r}: give 'last', 'auto', or numbers from 0 to "
                        f"{n_blocks - 1}, the last block, like "
                        f"{','.join(map(str, block_choices(n_blocks)[-1]))}")
    return numbers


def choose_blocks(backbone, train, val, seed, **settings):
    """The blocks whose readout has the lowest loss on val, of block_choices: a list of numbers, and
    a text with all losses.

    The loss is that of a linear probe that learns from at most CHOICE_IMAGES of train. It chooses
    because accuracy is too coarse: val of a small set has some dozen images.
    Args: train, val: Datasets with labels; settings: of stream_features.
    """
    choices = block_choices(len(block_list(backbone)))
    if len(choices) == 1:
        return choices[0], "it has one block"
    numbers, parts = sorted(set(sum(choices, []))), []
    for dataset in (train, val):
        part = collect_features(backbone, dataset.limited(CHOICE_IMAGES, seed),
                                block_numbers=numbers, **settings)
        by_block = part["readout"].unflatten(1, (len(numbers), -1))  # [N,n,D]
        parts.append((by_block, part["labels"]))
    (x, y), (x_val, y_val) = parts
    losses = []
    for choice in choices:
        columns = [numbers.index(number) for number in choice]
        chosen = x[:, columns].flatten(1)
        probe, _ = fit_probe(chosen, y, x_val[:, columns].flatten(1), y_val)
        losses.append(probe.loss)
    best = losses.index(min(losses))
    listed = []
    for choice, loss in zip(choices, losses):
        listed.append(f"{','.join(map(str, choice))}: {loss:.3f}")
    return choices[best], f"probe loss on val of blocks {'; '.join(listed)}"


def collect_features(backbone, dataset, with_patch_mean=False, **settings):
    """All features of a data set in one tensor, with labels. It needs the memory of the features.

    Args: with_patch_mean: put the mean patch token behind the CLS token, [N,2D]; settings: of
    stream_features.
    Returns: dict of features [N,D] fp32 on the backbone's device (raw pixels: on the CPU); readout
    [N,n*D] alike, if block_numbers are given; labels [N] int64, [N,c] for multi-label, or None; and
    lists of N indices and digests. Images that on_bad_image='skip' leaves out are missing from all
    of them. groups [N] int64 or None: as labels. Raises UserError if none can be read.
    """
    found, indices, digests = {}, [], []
    for batch in stream_features(backbone, dataset, **settings):
        x = batch["cls"]
        if with_patch_mean:
            patch_mean = batch["patches"].mean(dim=1)
            x = torch.cat([x, patch_mean], dim=1)
        n = len(indices)
        for name, values in (("features", x), ("readout", batch["readout"])):
            if values is not None:
                if name not in found:
                    found[name] = values.new_empty(len(dataset), values.shape[1])
                found[name][n:n + len(x)] = values
        indices += batch["indices"]
        digests += batch["digests"]
    if not found:
        raise UserError(f"{dataset.name}, {dataset.split}: not one of {len(dataset)} images can be "
                        "read")
    labels = None
    if dataset.labels is not None:
        labels = np.asarray(dataset.labels)[indices].astype(np.int64)
        labels = torch.from_numpy(labels)
    found = {name: values[:len(indices)] for name, values in found.items()}
    groups = None if dataset.groups is None else dataset.groups[indices]
    return dict(found, labels=labels, groups=groups, indices=indices, digests=digests)


def extract_features(backbone, dataset, **settings):
    """(CLS features [N,D] fp32, labels [N] int64, [N,c] or None) of a data set, in its order.
    settings: of stream_features."""
    collected = collect_features(backbone, dataset, **settings)
    return collected["features"], collected["labels"]


def shared_features(backbone, dataset, **settings):
    """dict of features [N,D], labels [N], groups [N] or None, and readout [N,n*D] if block_numbers
    are given, of a data set: every rank computes a share, and all ranks get all features.

    All ranks must call a sharded network equally often, so all shares have the same length: the
    last share continues with the first images.
    """
    n = math.ceil(len(dataset) / world_size())
    first = rank() * n
    share = np.arange(first, first + n) % len(dataset)
    collected = collect_features(backbone, dataset.subset(share, dataset.split), **settings)
    device = collected["features"].device
    own_part = dict(indices=share[collected["indices"]], labels=collected["labels"].numpy())
    tensors = [name for name in ("features", "readout") if name in collected]
    for name in tensors:
        own_part[name] = collected[name].cpu().numpy()
    parts, whole = gather_objects(own_part), {}
    indices = np.concatenate([part["indices"] for part in parts])
    _, first = np.unique(indices, return_index=True)  # each image once, in order
    for name in own_part:
        values = np.concatenate([part[name] for part in parts])
        whole[name] = torch.from_numpy(values[first])
        if name in tensors:
            whole[name] = whole[name].to(device)
    groups = dataset.groups
    if groups is not None:
        groups = torch.from_numpy(groups[indices[first]])
    return dict(whole, groups=groups)


def knn_accuracy(backbone, bank, queries, k=5, **settings):
    """{name: accuracy of k-NN} of every data set in `queries`, {name: Dataset}.

    Args: backbone: of stream_features, None = raw pixels; bank: Dataset of the neighbours;
    settings: of stream_features. All ranks work and get the same dict. Neighbours of a query's own
    group (patient) do not count.
    """
    if not queries:
        return {}
    train = shared_features(backbone, bank, **settings)
    return {name: knn_score(train, shared_features(backbone, dataset, **settings), k)
            for name, dataset in queries.items()}


def knn_score(train, test, k=5, key="features"):
    """Accuracy of k-NN. train, test: dicts of shared_features."""
    predictions = knn_classify(train[key], train["labels"], test[key], k,
                               train_groups=train["groups"], test_groups=test["groups"])
    return float((predictions.cpu() == test["labels"]).float().mean())


class KnnMeasure:
    """k-NN accuracy of a run's network: each image of a split is classified by its nearest images
    in train."""

    def __init__(self, train_set, splits, config, inputs, autocast, n_frozen=0):
        """Args: splits: {name: Dataset}; config: namespace of train.py's or distill.py's keys;
        inputs: of loader.input_settings; autocast: of distributed.autocast_for; n_frozen: the
        tokens after so many blocks are kept in memory (KeptTokens)."""
        n, seed = config.eval_max_images, config.seed
        self.seed = seed
        self.bank = train_set.labelled().limited(n, seed)
        self.splits = {}
        for name, dataset in splits.items():
            self.splits[name] = dataset.labelled().limited(n, seed)
        self.size = config.global_crops_size
        self.settings = dict(inputs, num_workers=loader_workers(config.num_workers),
                             autocast=autocast, on_bad_image=config.on_bad_image)

        self.kept = {}
        if n_frozen > 0:
            self.kept = {name: KeptTokens(n_frozen) for name in ("train", *self.splits)}

    def features(self, backbone, name, **settings):
        """shared_features of a split, 'train' or one of the measured ones, at the crops' size."""
        dataset = self.bank if name == "train" else self.splits[name]
        return shared_features(backbone, dataset, size=self.size, kept=self.kept.get(name),
                               **settings, **self.settings)

    def limited(self, n):
        """A KnnMeasure of at most n images of each split; self if they are not more."""
        sets = dict(self.splits, train=self.bank)
        if all(len(dataset) <= n for dataset in sets.values()):
            return self
        small = copy.copy(self)
        small.kept, small.splits = {}, {}
        for name, dataset in sets.items():
            small.splits[name] = dataset.limited(n, self.seed)
            if name in self.kept:
                small.kept[name] = KeptTokens(self.kept[name].n_blocks)
        small.bank = small.splits.pop("train")
        return small

    def accuracy(self, backbone, names, blocks=()):
        """{split: accuracy} of a backbone on the splits of these names, if they have labels; of the
        readout of some blocks, by default of CLS."""
        names = [name for name in names if name in self.splits]
        if not names:
            return {}
        features = {name: self.features(backbone, name, block_numbers=blocks)
                    for name in ("train", *names)}
        key = "readout" if len(blocks) else "features"
        return {name: knn_score(features["train"], features[name], key=key) for name in names}

    def pixels(self):
        """{split: accuracy} of the raw pixels, at 32 pixels or at the crop size if that is less."""
        size = min(32, self.size)
        return knn_accuracy(None, self.bank, self.splits, size=size, **self.settings)
