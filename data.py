"""Data sets: MedMNIST by name, .npz files, folders of images and volumes, the embedded phantom.

load_dataset returns one split of any of these as a Dataset. Pixels keep their values. archives.py
and folders.py find the images, labels.py says what labels and groups mean, images.py and volumes.py
read files.
"""
import copy
import math
import mmap
import os
from types import SimpleNamespace

import numpy as np
import torch

from archives import (MEDMNIST, medmnist_arrays, npz_arrays, open_arrays, phantom_arrays,
                      phantom_volume_arrays)
from configurator import UserError
from folders import open_folder
from formats import file_kind
from images import Rows, Sendable, at_least
from labels import cut_tenth, find_classes, is_known, split_word
from parquet import unpack_parquet
from phantom import PHANTOM_CLASSES, VOLUME_CLASSES

# How files are read: keys of the scripts with the same names. volumes.list_images explains them
READING = {"series": "", "volume_axis": -1, "volume_index": -1, "slice_step_mm": 0.0,
           "group_level": 0, "max_image_pixels": 0, "intensity_scaling": "set"}


# ---- one split ----

class Dataset(Sendable, torch.utils.data.Dataset):
    """One split of a data set: ds[i] -> (image [H,W,C], mask [H,W] or None).

    images: [N,H,W] or [N,H,W,C], or ImageFiles
    labels: [N] int64, -1 = unknown; [N,c] with several labels per image; or None
    masks: [N,H,W], ImageFiles, BoxMasks, or None
    class_names, mask_names: lists of str, of the labels and of the masks' values
    num_channels: int; name: dataset_path; split: str; splits: list of all splits of the source
    groups: [N] int64, the hashed patient (labels.group_numbers), or None
    volume: [N] int32, the volume that a slice belongs to, -1 = none; or None
    position_mm: [N] float32, where the slice lies along the axis of its volume, nan = unknown
    spacing_mm: [V,3] float32, of the volumes
    notes: sentences for the log on what was found and what was left out
    """

    def __init__(self, images, labels=None, masks=None, class_names=(), name="",
                 split="train", splits=(), mask_names=(), groups=None, volume=None,
                 position_mm=None, spacing_mm=None, notes=(), scaling="set"):
        self.images, self.labels, self.masks = images, labels, masks
        self.class_names, self.mask_names = list(class_names), list(mask_names)
        self.name, self.split, self.splits = name, split, list(splits)
        self.groups, self.volume, self.position_mm = groups, volume, position_mm
        self.spacing_mm, self.notes, self.scaling = spacing_mm, list(notes), scaling
        if hasattr(images, "num_channels"):
            self.num_channels = images.num_channels
        else:
            self.num_channels = 1 if images.ndim == 3 else images.shape[3]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = as_pixels(self.images[i], self, i)
        if self.scaling != "set":
            image = scale_image(image, self.scaling, self.path(i))
        mask = None if self.masks is None else self.masks[i]
        if mask is None:
            return image, None
        mask = mask[..., 0] if mask.ndim == 3 else mask
        if mask.shape != image.shape[:2]:
            raise UserError(f"{self.path(i)}: the mask has shape {mask.shape}, its image "
                            f"{image.shape[:2]}; both must agree")
        return image, mask

    def path(self, i):
        """The name of image i in messages: its file, or its number in the source."""
        images, index = self.images, i
        while isinstance(images, Rows):
            images, index = images.items, images.indices[index]
        if hasattr(images, "path"):
            return images.path(index)
        return f"{self.name}, {self.split} image {index}"

    def shown_name(self, i):
        """The name of image i as it may be written into a run's folder: its path; with groups its
        number in the split, because paths name patients."""
        return self.path(i) if self.groups is None else f"{self.split} image {i}"

    def without_path(self, text, i):
        """A message about image i as it may be written into a run's folder: see shown_name."""
        return text.replace(self.path(i), self.shown_name(i))

    def limited(self, n, seed):
        """At most n of the images, drawn by seed, in their order; n = 0: all."""
        if n == 0 or len(self) <= n:
            return self
        drawn = np.random.default_rng(seed).permutation(len(self))[:n]
        return self.subset(np.sort(drawn), self.split)

    def labelled(self):
        """The images whose label is known."""
        if self.labels is None or (known := is_known(self.labels)).all():
            return self
        return self.subset(np.flatnonzero(known), self.split)

    def at_least(self, side):
        """This data set for a use that needs `side` pixels on both sides of an image: JPEG files
        are decoded no larger than that requires. With masks it is unchanged, as they must fit."""
        if self.masks is not None:
            return self
        part = copy.copy(self)
        part.images = at_least(self.images, side)
        return part

    def release(self):
        """Give the pages of a mapped array back to the system. They return when they are read; else
        a pass over all images counts as memory of this process."""
        images = self.images
        while isinstance(images, Rows):
            images = images.items
        if isinstance(images, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
            images._mmap.madvise(mmap.MADV_DONTNEED)

    def subset(self, indices, split):
        """Some of the images, without a copy, as a Dataset named `split`. indices: [n] int."""
        part = copy.copy(self)
        part.images, part.split = Rows(self.images, indices, self.num_channels), split
        if self.masks is not None:
            part.masks = Rows(self.masks, indices)
        for key in ("labels", "groups", "volume", "position_mm"):
            value = getattr(self, key)
            setattr(part, key, None if value is None else value[indices])
        return part


def scale_image(image, scaling, path):
    """An image as float32 in 0..1, by itself.

    scaling: 'image' maps its percentiles 0.5 and 99.5 to 0 and 1, for MR and mixed scanners;
    'dtype' the range of its integers, for 8 and 16 bits in one folder; floats must lie in 0..1.
    """
    if scaling == "image":
        step = 2 if image.size > 10**5 else 1
        low, high = np.percentile(image[::step, ::step], (0.5, 99.5))
    elif image.dtype.kind == "f":
        low, high = 0.0, 1.0
        if image.min() < 0 or image.max() > 1:
            raise UserError(f"{path}: numbers from {image.min():.4g} to {image.max():.4g}, "
                            f"{image.dtype}, with intensity_scaling='dtype'; floats need 0..1, or "
                            "use intensity_scaling='image'")
    else:
        limits = np.iinfo(image.dtype)
        low, high = limits.min, limits.max
    scaled = (image.astype(np.float32) - low) / max(high - low, 1e-6)
    return np.clip(scaled, 0, 1).astype(np.float32)


def as_pixels(image, dataset, i):
    """An image as [H,W,C] of a type that torch takes, in native byte order. Raises UserError for
    NaN and infinity, with the name of image i."""
    image = image[..., None] if image.ndim == 2 else image
    if image.dtype.kind == "b":
        image = image.astype(np.uint8)
    elif image.dtype == np.longdouble:
        image = image.astype(np.float64)
    elif not image.dtype.isnative:
        image = image.astype(image.dtype.newbyteorder("="))
    # the sum is finite if all pixels are, and takes a tenth of the time
    total = image.sum(dtype=np.float64) if image.dtype.kind == "f" else 0.0
    if not math.isfinite(total):
        if n_bad := int((~np.isfinite(image)).sum()):
            raise UserError(f"{dataset.path(i)}: {n_bad} of {image.size} pixels are NaN or "
                            "infinite; mend or remove it, or set --on_bad_image=skip")
    return image


def load_dataset(dataset_path, split="train", size=224, cache_dir="", download_url="",
                 num_channels=0, seed=0, cut=True, **reading):
    """One split of a data set.

    If the source has labels but no val, a tenth of train, drawn by `seed`, is val and train is the
    rest, unless `cut` is False. Images of one patient are never on both sides.
    Args: dataset_path: one of
      'phantom', the embedded data set;
      the name of a MedMNIST data set;
      a .npz with {split}_images, and optionally {split}_labels, {split}_masks or {split}_boxes,
      {split}_groups, class_names, mask_names;
      a folder of images or volumes: flat, or one sub-folder per class, or train/ val/ test/ of
      either, or images/ with masks/ beside it; see folders.py. labels.csv in it names labels,
      groups and splits; boxes.json replaces masks (see images.read_boxes);
      one file of a volume.
    size: side of MedMNIST (28, 64, 128, 224) and phantom images, in pixels; cache_dir: '' =
    dino-mx in the user's cache; download_url: folder of a mirror of MedMNIST; num_channels: what
    the images must have, 0 = any; reading: values for some of the keys of READING.
    Returns: Dataset. Raises UserError: what is missing or wrong, and what to do.
    """
    settings = SimpleNamespace(**{**READING, **reading})
    settings.cache_dir, settings.num_channels = cache_of(cache_dir), num_channels
    source = _open_source(dataset_path, size, download_url, settings)
    splits, split = list(source.labels), split_word(split) or split
    val_is_cut = cut and split in ("train", "val") and "val" not in splits and "train" in splits
    if split not in splits and not val_is_cut:
        raise UserError(f"dataset_path={dataset_path!r} has no split {split!r}; it has "
                        f"{', '.join(splits) or 'none'}")
    labels, class_names, notes = find_classes(source.labels, source.class_names)
    name = "train" if val_is_cut else split
    where, parts = f"dataset_path={dataset_path!r}, split {name!r}", source.read(name)
    if len(parts["images"]) == 0:
        raise UserError(f"{where}: no images")
    for what, other in (("labels", labels[name]), ("masks", parts["masks"])):
        if other is not None and len(other) != len(parts["images"]):
            raise UserError(f"{where}: {len(other)} {what} for {len(parts['images'])} images; "
                            "there must be one each")
    dataset = Dataset(**parts, labels=labels[name], class_names=class_names, name=dataset_path,
                      split=name, splits=splits, mask_names=source.mask_names,
                      notes=[*source.notes, *notes], scaling=settings.intensity_scaling)
    if num_channels and dataset.num_channels != num_channels:
        raise UserError(f"{where}: images have {dataset.num_channels} channel(s), "
                        f"num_channels={num_channels}; set --num_channels={dataset.num_channels}, "
                        "or 0 to take what the data has")
    if not val_is_cut:
        return dataset
    if dataset.labels is None or is_known(dataset.labels).sum() < 2:
        if split == "val":
            why = [note for note in dataset.notes if note.startswith("no labels: ")]
            raise UserError("; ".join([f"{where}: no val, and no labels to measure with", *why]))
        return dataset
    rest, tenth, how = cut_val(dataset, seed)
    dataset.notes.append(how)
    return dataset.subset(tenth if split == "val" else rest, split)


def cache_of(cache_dir):
    """The folder that the key cache_dir means."""
    if not cache_dir:
        cache_dir = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "dino-mx")
    return os.path.expanduser(cache_dir)


def cut_val(dataset, seed):
    """The indices of train and of val, a tenth of the images whose label is known; and how they
    were cut, for the log. Images of one group are on one side, unless there is only one group."""
    known, groups = np.flatnonzero(is_known(dataset.labels)), dataset.groups
    by_group = groups is not None and len(np.unique(groups[known])) > 1
    _, tenth = cut_tenth(len(known), seed, groups[known] if by_group else None)
    tenth = known[tenth]
    elsewhere = np.ones(len(dataset), bool)
    elsewhere[tenth] = False
    how = f"val: a tenth of train, seed {seed}"
    if by_group:
        elsewhere &= ~np.isin(groups, groups[tenth])
        how = f"val: a tenth of train by group (patient or volume), seed {seed}"
    elif groups is not None:
        how += ", image by image, as there is one group only"
    return np.flatnonzero(elsewhere), tenth, how


def describe_source(dataset):
    """One line for the start of a log: what was found, read and left out, classes with their
    counts, groups, and where val comes from."""
    said = list(dataset.notes)
    if dataset.labels is not None:
        labels = dataset.labels[is_known(dataset.labels)]
        counts = labels.sum(axis=0, dtype=np.int64)
        if labels.ndim == 1:
            counts = np.bincount(labels, minlength=len(dataset.class_names))
        pairs = [f"{name} {n}" for name, n in zip(dataset.class_names, counts)]
        more = f", and {len(pairs) - 12} more" if len(pairs) > 12 else ""
        said.append(f"{len(pairs)} classes in {dataset.split}: {', '.join(pairs[:12])}{more}")
    if dataset.groups is not None:
        said.append(f"{len(np.unique(dataset.groups))} group(s) in {dataset.split}")
    return f"data: {dataset.name}: {'; '.join(said)}"


def error_text(error, dataset, i):
    """The error that image i of a data set has raised, as one line that names it."""
    if isinstance(error, UserError):
        return str(error)
    text = str(error).split("\n")[0][:200]
    return (f"{dataset.path(i)}: cannot be used ({type(error).__name__}: {text}); mend or remove "
            "it, or set --on_bad_image=skip")


def check_groups(train, tests, allowed):
    """Sentences on the groups (patients) of test splits. Raises UserError if some of them are also
    in train, unless that is `allowed`. tests: {split: Dataset}."""
    notes = []
    for split, dataset in tests.items():
        if dataset.groups is None:
            continue
        n_groups = len(np.unique(dataset.groups))
        notes.append(f"{split}: {n_groups} group(s), patients or volumes; intervals resample them"
                     + (", so few that they say little" if n_groups < 10 else ""))
        if n_shared := n_shared_groups(train, dataset):
            text = (f"{n_shared} of {n_groups} groups (patients or volumes) of {split} are also "
                    "in train")
            if not allowed:
                raise UserError(f"{text}: what is measured would be memory; split by patient, or "
                                "set --allow_shared_groups=true")
            notes.append(f"!!!! {text}: the probes have seen these patients; k-NN leaves out "
                         "neighbours of an image's own group !!!!")
    return notes


def n_shared_groups(dataset, other):
    """How many groups (patients) of one data set are also in another."""
    if dataset.groups is None or other.groups is None:
        return 0
    return len(np.intersect1d(dataset.groups, other.groups))


def _open_source(dataset_path, size, download_url, settings):
    """A data set before a split of it is read; arguments of load_dataset, settings: namespace of
    READING, cache_dir and num_channels. Returns: namespace as of archives.open_arrays."""
    if dataset_path == "phantom":
        source = open_arrays(phantom_arrays(settings.cache_dir, size), dataset_path)
        source.class_names = PHANTOM_CLASSES
        source.mask_names = ["background", "calcification"]
        return source
    if dataset_path == "phantom_volumes":
        folder = phantom_volume_arrays(settings.cache_dir, size)
        source = open_arrays(folder, dataset_path)
        source.class_names = list(VOLUME_CLASSES)
        source.mask_names = ["background", "calcification"]
        return source
    if dataset_path in MEDMNIST:
        folder = medmnist_arrays(dataset_path, size, settings.cache_dir, download_url)
        source = open_arrays(folder, dataset_path)
        source.class_names = list(MEDMNIST[dataset_path]["label"].values())
        return source
    path = os.path.expanduser(dataset_path)
    if path.endswith(".npz") and os.path.isfile(path):
        return open_arrays(npz_arrays(path, settings.cache_dir), path, settings.volume_axis)
    if os.path.isdir(path):
        return open_folder(path, settings)
    if os.path.isfile(path):
        return _open_file(path, settings)
    name = os.path.basename(path)  # the paper has dataset/pathmnist
    advice = f"did you mean {name!r}, a download? Else " if name in MEDMNIST else ""
    raise UserError(f"dataset_path={dataset_path!r} does not exist; {advice}give 'phantom', "
                    f"a MedMNIST name ({', '.join(MEDMNIST)}), a .npz file or a folder of images")


ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")


def _open_file(path, settings):
    """The data set of one file: the slices of a volume, the pages of a TIFF, a parquet file."""
    if path.lower().endswith(ARCHIVES):
        raise UserError(f"dataset_path={path!r} is an archive; unpack it, and give the folder")
    folder, file = os.path.split(os.path.abspath(path))
    if path.lower().endswith(".parquet"):
        return open_folder(unpack_parquet(folder, [file], settings.cache_dir), settings)
    if not file_kind(path):
        raise UserError(f"dataset_path={path!r} is a file that is no data set; give a folder of "
                        "images, an .npz, or one volume as NIfTI, DICOM, TIFF or .npy")
    return open_folder(folder, settings, file)
