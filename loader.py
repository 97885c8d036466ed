"""What a run reads, and when: its splits, its input settings, the order of its images, its batches.

Everything random is a function of (seed, sample number), so a resumed run reads what the
uninterrupted one reads, and two ranks read what one process reads.
"""
import contextlib
from collections import Counter

import numpy as np
import torch
from torch.utils.data import DataLoader

from augment import foreground_share, masked_tokens, sample_masks
from checks import uses_prototypes
from configurator import UserError
from data import READING, describe_source, error_text, load_dataset, n_shared_groups
from distributed import (item_bytes, loader_workers, main_first, rank, workers_that_fit,
                         world_size)
from images import Rows
from labels import cut_tenth
from positions import slabs_of
from signals import ignore_signals

LEAST_HELD_OUT = 20  # images; fewer say nothing


# ---- splits and input settings ----

def open_splits(config):
    """(train, {split: Dataset to measure k-NN on}, held_out), as a run's config asks.

    held_out: Dataset for verdict.LabelFree, which needs no labels: eval_split, or if there is none
    a tenth of train, which train then lacks (hold_out). Without exactly one label per image there
    is nothing to measure k-NN on. One process of each machine downloads and unpacks; the others
    find the files.
    """
    def open_split(split):
        return load_dataset(config.dataset_path, split, config.dataset_size, config.cache_dir,
                            config.download_url, config.num_channels, config.seed,
                            **reading_keys(config))

    with main_first():
        train, splits = open_split("train"), []
        if train.labels is not None and train.labels.ndim == 1:
            splits.append(config.eval_split)
            if config.eval_split != "test" and "test" in train.splits:
                splits.append("test")
        measured = {split: open_split(split).labelled() for split in splits}
        if measured:
            return train, measured, measured[config.eval_split]
        if config.eval_split in train.splits or train.labels is not None:
            return train, measured, open_split(config.eval_split)
        train, held_out = hold_out(train, config.seed)
        return train, measured, held_out


def hold_out(train, seed):
    """(the rest, a tenth of it) of a data set without labels and without val, by group: Datasets.
    The tenth is empty, and the rest is all, if it were less than LEAST_HELD_OUT images or, of few
    groups, more than a third."""
    rest, tenth = cut_tenth(len(train), seed, train.groups)
    if not LEAST_HELD_OUT <= len(tenth) <= len(train) / 3:
        return train, train.subset(np.arange(0), "val")
    rest, tenth = train.subset(rest, "train"), train.subset(tenth, "val")
    how = "" if train.groups is None else " by group (patient or volume)"
    rest.notes = [*train.notes, f"no val: a tenth of train{how}, {len(tenth)} images, seed {seed}, "
                  "is held out to measure without labels"]
    return rest, tenth


def reading_keys(config, run_config=None):
    """The keys of data.READING that a config has, a namespace, as a dict. run_config: dict of the
    run that a script looks at; its values count where the config has the default. If the config
    names another data set, only its intensity_scaling counts."""
    keys = {key: getattr(config, key) for key in READING if hasattr(config, key)}
    run_config = run_config or {}
    is_other = getattr(config, "dataset_path", "") not in ("", run_config.get("dataset_path"))
    for key, value in keys.items():
        if value == READING[key] and not (is_other and key != "intensity_scaling"):
            keys[key] = run_config.get(key, value)
    return keys


def describe_data(train, measured, inputs, source):
    """The data of a run in three lines: what was found (data.describe_source), how many images are
    used, and how. Args: inputs: of input_settings; source: where the mean and std come from."""
    splits = ", ".join(f"{len(data)} {split}" for split, data in measured.items())
    if not measured:
        why = "no labels" if train.labels is None else "several labels per image"
        splits = f"no k-NN: {why}"
    for split, data in measured.items():
        if n_shared := n_shared_groups(train, data):
            splits += (f"; {n_shared} group(s) of {split} are also in train, so neighbours of an "
                       "image's own group do not count")
    images = train.images
    while isinstance(images, Rows):
        images = images.items
    dtype = getattr(images, "dtype", "image files")
    scaled = "" if train.scaling == "set" else f", scaled by {train.scaling}"
    return (f"{describe_source(train)}\n      {len(train)} train images, {train.num_channels} "
            f"channel(s), {dtype}{scaled}; {splits}\n      intensities "
            f"{inputs['intensity_range']} -> 0..1, mean {inputs['mean']}, std {inputs['std']} "
            f"({source})")


def describe_batches(crop_set, config, micro_batches, preset):
    """How a step's batch is made: a line, and one each for losses that see a part of it only, and
    for slab_mm and min_foreground if set."""
    size = config.global_batch_size
    per_step = size // world_size() // micro_batches
    lines = [f"batch: {size} images = {world_size()} rank(s) x {micro_batches} micro-batch(es) x "
             f"{per_step}; {preset} augmentation; {len(crop_set) / size:.1f} iterations an epoch; "
             f"{loader_workers(config.num_workers)} loader worker(s) per rank"]
    if micro_batches > 1 and (losses := within_micro_batch(config, per_step * world_size())):
        lines.append(f"       {losses} compare(s) the {per_step * world_size()} images of a "
                     "micro-batch only; with --gradient_accumulation_steps=1 all of the batch")
    if crop_set.slabs is not None:
        _, first, last = crop_set.slabs
        n_alone = np.count_nonzero(last - first == 1)
        lines.append(f"       crops after the first come from {(last - first).mean():.1f} slices on"
                     f" average; {n_alone} of {len(first)} images have no slice so near")
    if config.min_foreground > 0:
        shares = crop_set.foreground_shares()
        n_empty = np.count_nonzero(shares < config.min_foreground)
        lines.append(f"       {n_empty} of {len(shares)} sampled images have less foreground than "
                     f"{config.min_foreground:.0%}; random others stand in for them")
    return "\n".join(lines)


def within_micro_batch(config, n_images):
    """The losses that compare images, and see no others than the n_images of a micro-batch over all
    ranks, as 'A and B'; '' if there are none."""
    losses = []
    uses_targets = getattr(config, "objective", "") != "feature"  # distill.py has objectives
    if config.centering == "sinkhorn_knopp" and uses_targets and uses_prototypes(config):
        losses.append("Sinkhorn-Knopp")
    in_groups = 0 < getattr(config, "koleo_group_size", 0) <= n_images
    if getattr(config, "koleo_loss_weight", 0) > 0 and not in_groups:
        losses.append("KoLeo")
    if getattr(config, "lejepa_loss_weight", 0) > 0:
        losses.append("SIGReg")
    return " and ".join(losses)


def measure_intensities(dataset, intensity_range=(0.0, 0.0), n_images=256, seed=0,
                        on_bad_image="error"):
    """(intensity_range, mean, std) of a sample of images, drawn by seed.

    Args: intensity_range: (0, 0) = find it: (0, 255) for uint8, else the 0.5 and 99.5 percentiles,
    rounded; on_bad_image: 'skip' leaves out what cannot be read.
    Returns: mean, std: tuples, one value per channel, of the pixels mapped to 0..1 and clipped.
    """
    indices = np.random.default_rng(seed).permutation(len(dataset))[:n_images]
    images, reason = [], ""
    for i in sorted(indices):
        try:
            images.append(dataset[i][0])
        except UserError as error:
            reason = reason or str(error)
            if on_bad_image == "error":
                raise
    if not images:
        raise UserError(f"{dataset.name}: none of {len(indices)} sampled images can be read, the "
                        f"first because of {reason}")
    if dataset.scaling != "set":
        intensity_range = (0.0, 1.0)
    elif tuple(intensity_range) == (0.0, 0.0):
        check_one_kind(images, dataset)
        intensity_range = _common_range(images)
    low, high = intensity_range
    channels = dataset.num_channels
    sums = np.zeros((3, channels))
    for image in images:
        x = image.reshape(-1, channels).astype(np.float64)
        x = np.clip((x - low) / (high - low), 0, 1)
        sums[0] += len(x)
        sums[1] += x.sum(0)
        sums[2] += (x * x).sum(0)
    mean = sums[1] / sums[0]
    variance = sums[2] / sums[0] - mean**2
    std = np.sqrt(np.maximum(variance, 1e-8))
    mean, std = mean.round(4).tolist(), std.round(4).tolist()
    return intensity_range, tuple(mean), tuple(std)


def check_one_kind(images, dataset):
    """Raise UserError if some images have 8 bits and others more: no range fits both."""
    counts = Counter(str(image.dtype) for image in images)
    if "uint8" in counts and len(counts) > 1:
        listed = ", ".join(f"{n} {dtype}" for dtype, n in counts.most_common())
        raise UserError(f"{dataset.name}: of {len(images)} sampled images {listed}; one "
                        "intensity_range does not fit both. Set --intensity_scaling=dtype, which "
                        "scales each by the range of its type, or =image, by its own percentiles, "
                        "or give --intensity_range")


def _common_range(images):
    """(low, high) that holds nearly all pixels of the images."""
    if images[0].dtype == np.uint8:
        return 0.0, 255.0
    sample = np.concatenate([image.ravel()[::7] for image in images])
    low, high = np.percentile(sample, (0.5, 99.5)).tolist()
    digits = 0 if high - low > 20 else 4
    low, high = round(low, digits), round(high, digits)
    if high <= low:  # nothing but air: any width is fine
        high = low + 1
    return low, high


def check_scaling(dataset, expected):
    """Raise UserError if weights want images that are scaled by themselves in another way than a
    data set does. expected: dict of weights.pretrained_input."""
    scaling = expected.get("intensity_scaling", dataset.scaling)
    if scaling != dataset.scaling:
        raise UserError(f"intensity_scaling={dataset.scaling!r}: the weights were trained with "
                        f"{scaling!r}; set --intensity_scaling={scaling}")


def input_settings(train_set, pretrained, intensity_range=(0.0, 0.0), mean=(), std=(),
                   seed=0, on_bad_image="error"):
    """How pixels become the network's input: as given, else as the weights expect, else measured.

    Args: pretrained: of weights.pretrained_input, {} for random weights; intensity_range (0, 0),
    mean (), std (): not given. If the weights have another number of channels than the images,
    every channel gets the average over theirs.
    Returns: dict of intensity_range, mean, std; and a text that says where mean and std come from.
    Raises UserError if mean or std has another length than the images have channels.
    """
    check_scaling(train_set, pretrained)
    if tuple(intensity_range) == (0.0, 0.0) and pretrained.get("intensity_range"):
        intensity_range = pretrained["intensity_range"]
    intensity_range, other_mean, other_std = measure_intensities(
        train_set, intensity_range, seed=seed, on_bad_image=on_bad_image)
    n_images = min(256, len(train_set))
    channels, source = train_set.num_channels, f"measured on {n_images} images"
    if pretrained:
        source = "of the pretrained weights"
        other_mean, other_std = pretrained["mean"], pretrained["std"]
        if len(other_mean) != channels:
            source += ", averaged over their channels"
            other_mean = (float(np.mean(other_mean)),) * channels
            other_std = (float(np.mean(other_std)),) * channels
    if mean and std:
        source = "given"
    elif mean:
        source = f"mean given, std {source}"
    elif std:
        source = f"std given, mean {source}"
    inputs = dict(intensity_range=intensity_range, mean=mean or other_mean, std=std or other_std)
    for key, values in (("image_mean", inputs["mean"]), ("image_std", inputs["std"])):
        if len(values) != channels:
            raise UserError(f"{key}={values}: the images have {channels} channel(s); give as many "
                            "values")
    return inputs, source


# ---- the order of a run, and its batches ----

def make_loader(crop_set, config, micro_batches, start, stop, device, say=print, wrap=None):
    """The DataLoader of iterations start to stop of this rank, one batch per micro-batch. If
    /dev/shm is too small for its workers, it has fewer of them, and `say` gets a line. wrap: what
    turns the BatchOrder into another one (prefix.KnownViews), or None."""
    order = BatchOrder(len(crop_set), config.global_batch_size, micro_batches, rank(),
                       world_size(), start, stop, config.seed, config.shuffle)
    if wrap is not None:
        order = wrap(order, crop_set)
    workers = loader_workers(config.num_workers)
    if workers > 0 and start < stop:
        first = next(iter(order))
        batch_bytes = item_bytes(crop_set[first[0]]) * len(first)
        workers = workers_that_fit(workers, batch_bytes, say)
    timeout = 1800 if workers > 0 else 0  # seconds; as the ranks wait for each other
    return DataLoader(crop_set, batch_sampler=order, collate_fn=crop_set.collate,
                      num_workers=workers, pin_memory=device.type == "cuda", timeout=timeout,
                      worker_init_fn=ignore_signals)


class BatchOrder(torch.utils.data.Sampler):
    """Which images this rank reads: a function of (seed, sample number) only.

    Sample number n = iteration * global_batch_size + position in the global batch. It reads image
    n % N of the shuffled epoch n // N. A global batch is cut into micro-batches, and rank r takes
    the r-th part of each: so a micro-batch, which KoLeo and Sinkhorn-Knopp look at, has the same
    images on any number of ranks. Yields lists of (n, image index).
    """

    def __init__(self, n_images, global_batch_size, micro_batches, rank, world_size, start, stop,
                 seed, shuffle=True):
        self.n_images, self.global_batch_size = n_images, global_batch_size
        self.micro_batches, self.rank, self.world_size = micro_batches, rank, world_size
        self.start, self.stop, self.seed, self.shuffle = start, stop, seed, shuffle
        self.epochs = {}  # {epoch: order of the images}

    def __len__(self):
        return (self.stop - self.start) * self.micro_batches

    def __iter__(self):
        batch_size = self.global_batch_size // self.world_size // self.micro_batches
        for micro_batch in range(self.start * self.micro_batches, self.stop * self.micro_batches):
            first = (micro_batch * self.world_size + self.rank) * batch_size
            yield [(n, self.image(n)) for n in range(first, first + batch_size)]

    def image(self, number):
        """The index of the image that a sample reads."""
        epoch, position = divmod(number, self.n_images)
        if not self.shuffle:
            return position
        if epoch not in self.epochs:  # a batch lies in two epochs at most, or in several tiny ones
            for old in [e for e in self.epochs if e < epoch - 1]:
                del self.epochs[old]
            rng = np.random.default_rng((self.seed, 1, epoch))
            self.epochs[epoch] = rng.permutation(self.n_images)
        return int(self.epochs[epoch][position])


class CropDataset(torch.utils.data.Dataset):
    """Crops of a data set for the training loop: item (n, index) -> crops of one image, collate ->
    a batch."""

    def __init__(self, dataset, multi_crop, seed, global_batch_size, grid, mask_settings=None,
                 on_bad_image="error", fixed_views=0, slab_mm=0.0):
        """Args: grid: patches per side of a global crop; mask_settings: dict for sample_masks, or
        None for no masks; fixed_views: an image is cropped in so many ways, by turns from epoch to
        epoch; 0 = anew every time; slab_mm: the crops after the first one come from random slices
        of the same volume within this distance, 0 = from the image itself."""
        self.dataset = dataset.at_least(multi_crop.least_side())
        self.multi_crop, self.seed, self.on_bad_image = multi_crop, seed, on_bad_image
        self.global_batch_size, self.grid = global_batch_size, grid
        self.mask_settings, self.fixed_views = mask_settings, fixed_views
        self.slabs = slabs_of(dataset, slab_mm) if slab_mm > 0 else None

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        n, index, *is_known = item
        view = self.view(n)
        about = dict(n=n, index=index, view=view, bad=[])
        about["row"] = index * max(1, self.fixed_views) + view
        if any(is_known):  # prefix.KnownViews: its tokens are kept
            return about
        bad = about["bad"]
        while True:
            try:
                return dict(about, **self.crops(n, index))
            except Exception as error:  # sent as text: a worker's exception fills a page
                text = error_text(error, self.dataset, index)
                bad.append(self.dataset.without_path(text, index))
                if self.on_bad_image == "error" or len(bad) == min(100, len(self.dataset)):
                    return dict(error=text)
                index = (index + 1) % len(self.dataset)  # the neighbour stands in

    def crops(self, n, index):
        """The crops of image `index` as sample n, and the index that was read."""
        index, image, mask = self.read(n, index)
        rng = self.generator(n, index)
        neighbours = self.neighbours(index, rng)
        crops = self.multi_crop(image, mask, rng, neighbours)
        return dict(crops, index=index)

    def read(self, n, index):
        """(index, image, mask) of sample n: image `index`, or a random one with enough foreground
        (MultiCrop.min_foreground) in its place, the last of eleven."""
        image, mask = self.dataset[index]
        least, background = self.multi_crop.min_foreground, self.multi_crop.background
        if least == 0:
            return index, image, mask
        rng = np.random.default_rng((self.seed, 5, n))
        for other in rng.integers(len(self.dataset), size=10):
            if foreground_share(image, background) >= least:
                break
            index = int(other)
            image, mask = self.dataset[index]
        return index, image, mask

    def foreground_shares(self, n_images=256):
        """The foreground_share of a sample of images [n] float, drawn by seed."""
        drawn = np.random.default_rng(self.seed).permutation(len(self))[:n_images]
        shares = []
        for i in np.sort(drawn):
            with contextlib.suppress(Exception):  # an unreadable image raises when it is used
                shares.append(foreground_share(self.dataset[i][0], self.multi_crop.background))
        return np.array(shares)

    def generator(self, n, index):
        """The numpy Generator of the crops of sample n, which reads image index."""
        if self.fixed_views == 0:
            return np.random.default_rng((self.seed, 2, n))
        return np.random.default_rng((self.seed, 4, index, self.view(n)))

    def view(self, n):
        """The number of sample n's fixed view; 0 without fixed views."""
        return n // len(self.dataset) % max(1, self.fixed_views)

    def neighbours(self, index, rng):
        """[(image, mask)] of the crops after the first one, [] without a slab: slices drawn by rng,
        each slice of the slab equally likely, the image itself included."""
        if self.slabs is None:
            return []
        order, first, last = self.slabs
        n = self.multi_crop.n_crops - 1
        drawn = rng.integers(first[index], last[index], size=n)
        return [self.dataset[int(order[place])] for place in drawn]

    def label_crops(self, indices):
        """What the first batch of a run shows of the label: dict of global_crops and local_crops as
        collate makes them (MultiCrop.of_label). indices: batch["index"] of the samples 0, 1, ..."""
        samples = []
        for n, index in enumerate(indices):
            rng = self.generator(n, index)
            neighbours = self.neighbours(index, rng)
            samples.append(self.multi_crop.of_label(*self.dataset[index], rng, neighbours))
        return {key: view_major(samples, key) for key in ("global_crops", "local_crops")}

    def collate(self, samples):
        """One batch of items.

        Returns: dict of global_crops [V*B,...], local_crops [L*B,...], global_seeds [V*B],
        local_seeds [L*B], view-major; if any gram_crops [V*B,...], masks [V*B,P] bool, and
        masked, of masked_tokens; n, index, view and row, lists of B ints; bad, list of files;
        fresh, the positions of the samples that have crops. Or a dict of error only.
        """
        errors = [sample["error"] for sample in samples if "error" in sample]
        if errors:
            return dict(error=errors[0])
        batch = {}
        for key in ("n", "index", "view", "row"):
            batch[key] = [sample[key] for sample in samples]
        batch["fresh"] = [i for i, sample in enumerate(samples) if "global_crops" in sample]
        fresh = [samples[i] for i in batch["fresh"]]
        batch["bad"] = sum([sample["bad"] for sample in samples], [])
        for key in ("global_crops", "local_crops", "global_seeds", "local_seeds", "gram_crops"):
            if fresh and key in fresh[0]:
                batch[key] = view_major(fresh, key)
        if self.mask_settings is not None:
            n_views = len(batch["global_crops"]) // len(samples)
            batch["masks"] = self.masks(batch["n"], n_views)
            batch["masked"] = masked_tokens(batch["masks"])
        return batch

    def masks(self, numbers, n_views):
        """Masks of some samples [V*B,P]. The masks of the global batch have one plan, and each rank
        builds its own rows of it. numbers: of the samples, all of one iteration."""
        size = self.global_batch_size
        iteration = numbers[0] // size
        rows = []
        for view in range(n_views):
            rows += [view * size + n % size for n in numbers]
        rng = np.random.default_rng((self.seed, 3, iteration))
        n_crops = n_views * size
        masks = sample_masks(n_crops, self.grid, rng, rows=rows, **self.mask_settings)
        return masks[rows]


def view_major(samples, key):
    """Stack one entry [V,...] of B samples: [V*B,...], crop v of image b in row v * B + b."""
    crops = torch.stack([sample[key] for sample in samples], dim=1)  # [V,B,...]
    return crops.flatten(0, 1)
