"""Data sets: MedMNIST by name, .npz files, image folders, the embedded phantom.

Pixels stay what they are: uint8, 16-bit, Hounsfield units, float; one to many channels. Whatever comes in an archive is
unpacked once into .npy files in a cache and memory-mapped from there, so that all ranks and workers share the pages;
so is the list of a folder's files. Nothing is unpickled, downloads are checked by MD5, and what is put into the cache
appears under its name only when complete.
"""
import contextlib
import glob
import hashlib
import http.client
import json
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib

import numpy as np
import torch
from tqdm import tqdm

from configurator import UserError
from images import (EXTENSIONS, MASK_EXTENSIONS, BoxMasks, ImageFiles, Rows, Sendable, at_least,
                    read_boxes)
from phantom import PHANTOM_CLASSES, make_phantom

MEDMNIST = json.load(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "config", "medmnist.json")))
SPLITS = ("train", "val", "test")


# ---- one split ----

class Dataset(Sendable, torch.utils.data.Dataset):
    """One split: .images [N,H,W] or [N,H,W,C] or files, .labels [N] int64 ([N,c] multi-label) or None, .masks [N,H,W]
    or None, .class_names, .mask_names (of the mask's values), .num_channels, .splits of the source.
    ds[i] -> (image [H,W,C], mask [H,W] or None)."""

    def __init__(self, images, labels=None, masks=None, class_names=(), name="", split="train", splits=(),
                 mask_names=()):
        self.images, self.labels, self.masks = images, labels, masks
        self.class_names, self.mask_names = list(class_names), list(mask_names)
        self.name, self.split, self.splits = name, split, list(splits)
        if hasattr(images, "num_channels"):
            self.num_channels = images.num_channels
        else:
            self.num_channels = 1 if images.ndim == 3 else images.shape[3]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image, mask = self.images[i], None if self.masks is None else self.masks[i]
        image = image[..., None] if image.ndim == 2 else image
        mask = mask[..., 0] if mask is not None and mask.ndim == 3 else mask
        if mask is not None and mask.shape != image.shape[:2]:
            raise UserError(f"mask {i} of {self.name}: shape {mask.shape}, its image {image.shape[:2]}; "
                            "both must agree")
        return image, mask

    def path(self, i):
        """What to call image i in a message: its file, or its number."""
        images, row = self.images, i
        while isinstance(images, Rows):
            images, row = images.items, images.rows[row]
        return images.path(row) if isinstance(images, ImageFiles) else f"{self.name}, {self.split} image {row}"

    def limited(self, n, seed):
        """At most n of the images, drawn by seed, in their order; n = 0: all."""
        if n == 0 or len(self) <= n:
            return self
        return self.subset(np.sort(np.random.default_rng(seed).permutation(len(self))[:n]), self.split)

    def at_least(self, side):
        """Another view, for a use that needs `side` pixels on the shorter side: JPEG files are decoded no larger than
        that takes. With masks the data set itself: they must fit their images."""
        return self if self.masks is not None else Dataset(
            at_least(self.images, side), self.labels, None, self.class_names, self.name, self.split, self.splits,
            self.mask_names)

    def subset(self, rows, split):
        """Another view of the same images: rows [n] int."""
        images = Rows(self.images, rows, self.num_channels)
        labels = None if self.labels is None else self.labels[rows]
        masks = None if self.masks is None else Rows(self.masks, rows)
        return Dataset(images, labels, masks, self.class_names, self.name, split, self.splits, self.mask_names)


def load_dataset(dataset_path, split="train", size=224, cache_dir="", download_url="", num_channels=0, seed=0):
    """One split of a data set.

    Args: dataset_path: 'phantom'; a MedMNIST name; a .npz with {split}_images, and optionally {split}_labels,
    {split}_masks or {split}_boxes, class_names; a folder of images: flat, with one sub-folder per class, or train/ val/
    test/ of either, or images/ with masks/ beside it; boxes.json in it stands for masks (read_boxes). size: side of
    MedMNIST (28, 64, 128, 224) and phantom images; download_url: a mirror's folder in place of MedMNIST's own host;
    num_channels: what the data must have, 0 = any. Where labels exist but no val, a tenth of train, drawn with `seed`,
    serves as val and is left out of train.
    Returns: Dataset. Raises UserError: what is missing or wrong, and what to do.
    """
    cache_dir = os.path.expanduser(cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "dino-mx"))
    mask_names = ()
    if dataset_path == "phantom":
        mask_names = ("background", "calcification")
        read, splits, class_names = _read_arrays(_phantom_arrays(cache_dir, size)), SPLITS, PHANTOM_CLASSES
    elif dataset_path in MEDMNIST:
        read, splits = _read_arrays(_medmnist_arrays(dataset_path, size, cache_dir, download_url)), SPLITS
        class_names = list(MEDMNIST[dataset_path]["label"].values())
    elif dataset_path.endswith(".npz") and os.path.isfile(dataset_path):
        folder = _npz_arrays(dataset_path, cache_dir)
        splits = [file[:-11] for file in sorted(os.listdir(folder)) if file.endswith("_images.npy")]
        class_names, mask_names = ([] if names is None else names.tolist() for names in (
            _map_array(os.path.join(folder, f"{what}_names.npy")) for what in ("class", "mask")))
        read = _read_arrays(folder)
    elif os.path.isdir(dataset_path):
        read, splits, class_names = _scan_folder(dataset_path, num_channels, cache_dir)
    else:
        raise UserError(f"dataset_path={dataset_path!r} does not exist; give 'phantom', "
                        f"a MedMNIST name ({', '.join(MEDMNIST)}), a .npz file or a folder of images")
    cut = split in ("train", "val") and "val" not in splits and "train" in splits
    if split not in splits and not cut:
        raise UserError(f"dataset_path={dataset_path!r} has no split {split!r}; it has {', '.join(splits) or 'none'}")
    images, labels, masks = read("train" if cut else split)
    where = f"dataset_path={dataset_path!r}, split {split!r}"
    if len(images) == 0:
        raise UserError(f"{where}: no images; looked for {split}_images or files ending in {', '.join(EXTENSIONS)}")
    for what, other in (("labels", labels), ("masks", masks)):
        if other is not None and len(other) != len(images):
            raise UserError(f"{where}: {len(other)} {what} for {len(images)} images; there must be one each")
    if labels is not None and labels.ndim == 2 and labels.shape[1] == 1:
        labels = np.asarray(labels).squeeze(-1)
    dataset = Dataset(images, labels, masks, class_names, dataset_path, split, splits, mask_names)
    if num_channels and dataset.num_channels != num_channels:
        raise UserError(f"{where}: images have {dataset.num_channels} channel(s), num_channels={num_channels}; set "
                        f"--num_channels={dataset.num_channels}, or 0 to take what the data has")
    if cut and labels is not None and len(images) > 1:
        rest, tenth = cut_tenth(len(images), seed)
        dataset = dataset.subset(tenth if split == "val" else rest, split)
    elif cut and split == "val":
        raise UserError(f"{where}: no val, and no labels to measure with")
    return dataset


def cut_tenth(n, seed):
    """The rows of n images in two sorted parts, drawn by seed: (the rest, a tenth but at least one)."""
    rows, n_tenth = np.random.default_rng(seed).permutation(n), max(1, n // 10)
    return np.sort(rows[n_tenth:]), np.sort(rows[:n_tenth])


# ---- archives -> folders of .npy ----

def _map_array(path):
    """A .npy file as a memory map, None where there is none."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False) if os.path.isfile(path) else None
    except ValueError as error:                                 # python objects, which would have to be unpickled
        raise UserError(f"{path}: cannot be read ({error}); save plain numbers") from None


def _read_arrays(folder):
    """A function split -> (images, labels, masks), memory-mapped from {split}_images.npy and so on."""
    def read(split):
        def mapped(key):
            return _map_array(os.path.join(folder, f"{split}_{key}.npy"))
        images = mapped("images")
        if images.ndim not in (3, 4) or images.dtype.kind not in "uif":
            raise UserError(f"{folder}: {split}_images has shape {images.shape}, {images.dtype}; "
                            "needs numbers [N,H,W] or [N,H,W,C]")
        masks = mapped("masks")
        if masks is not None and masks.shape[1:3] != images.shape[1:3]:
            raise UserError(f"{folder}: {split}_masks has shape {masks.shape}, {split}_images {images.shape}; "
                            "height and width must agree")
        boxes = mapped("boxes")
        if masks is None and boxes is not None:                 # [M,5 or 6]: image number, box, perhaps its mask value
            if boxes.ndim != 2 or boxes.shape[1] not in (5, 6) or len(boxes) and not 0 <= boxes[:, 0].min() <= \
                    boxes[:, 0].max() < len(images):
                raise UserError(f"{folder}: {split}_boxes has shape {boxes.shape}; needs a row for each box: number of "
                                f"the image, 0 to {len(images) - 1}, then left, top, right, bottom in pixels")
            of_image = [[] for _ in range(len(images))]
            for i, *box in boxes.tolist():
                of_image[int(i)].append(box)
            masks = BoxMasks(of_image, images, f"{folder}: {split}_boxes")
        return images, mapped("labels"), masks
    return read


def _make_folder(folder, fill):
    """Create `folder` by calling fill(temporary folder), and rename: it exists complete or not at all."""
    if os.path.isdir(folder):
        return folder
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    temporary = tempfile.mkdtemp(prefix="part-", dir=os.path.dirname(folder))
    try:
        fill(temporary)
        for file in os.listdir(temporary):                      # on the disk before the name is: power may fail
            with open(os.path.join(temporary, file), "rb") as written:
                os.fsync(written.fileno())
        os.rename(temporary, folder)
    except OSError:
        if not os.path.isdir(folder):                           # else another process was faster with the same content
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _unpack(path, folder):
    """The members of an .npz are .npy files: copy them out as a stream, never the whole array in memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name != os.path.basename(name) or not name.endswith(".npy"):
                    raise UserError(f"{path}: member {name!r} is not a plain .npy; is this an .npz written by numpy?")
                with archive.open(name) as source, open(os.path.join(folder, name), "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: not a complete .npz file ({error}); copy or download it again") from None


def _npz_arrays(path, cache_dir):
    stat = os.stat(path)                                        # a changed file gets a folder of its own
    key = hashlib.sha256(f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = os.path.join(cache_dir, f"{os.path.basename(path)[:-4]}-{key}")
    return _make_folder(folder, lambda temporary: _unpack(path, temporary))


def _medmnist_arrays(name, size, cache_dir, download_url):
    files = MEDMNIST[name]["files"]
    if str(size) not in files:
        raise UserError(f"dataset_size={size}: {name} exists at {', '.join(files)} pixels")
    url, md5 = files[str(size)]["url"], files[str(size)]["md5"]
    archive = os.path.join(cache_dir, url.split("/")[-1].split("?")[0])
    if download_url:
        url = f"{download_url.rstrip('/')}/{os.path.basename(archive)}"

    def fill(temporary):
        own = not os.path.isfile(archive)                       # a file that the user put there stays there
        if own:
            download(url, md5, archive)
        elif (found := _md5(archive)) != md5:                   # once: the 224 files are GBs
            raise UserError(f"{archive} has MD5 {found}, should be {md5}; "
                            "remove it, and it is downloaded again")
        _unpack(archive, temporary)
        if own:
            os.remove(archive)                                  # the arrays hold the same; the 224 files are GBs
    return _make_folder(os.path.join(cache_dir, f"{name}_{size}"), fill)


def _md5(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def download(url, md5, path):
    """Fetch url to path: written beside it, length and MD5 checked, then renamed; a failed attempt leaves nothing."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f"{path}.{os.getpid()}.part"
    advice = f"try again, name a mirror with --download_url, or put the file at {path} yourself"
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(part, "wb") as file:
            expected = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=expected or None, unit="B", unit_scale=True, desc=os.path.basename(path)) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
        got = os.path.getsize(part)
        if expected and got != expected:
            raise UserError(f"{url}: the connection was cut after {got} of {expected} bytes; {advice}")
        if (found := _md5(part)) != md5:
            raise UserError(f"{url}: MD5 is {found}, should be {md5}: a damaged or another file; {advice}")
        os.replace(part, path)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise UserError(f"{url}: cannot be downloaded ({getattr(error, 'reason', '') or error}); {advice}") from None
    finally:
        if os.path.exists(part):
            os.remove(part)


def _phantom_arrays(cache_dir, size):
    """The phantom's three splits; the seeds differ, so no image is in two of them."""
    def fill(temporary):
        for split, n_images, seed in (("train", 2400, 0), ("val", 600, 1), ("test", 600, 2)):
            for key, array in make_phantom(n_images, size, seed).items():
                np.save(os.path.join(temporary, f"{split}_{key}.npy"), array)
    source = open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "phantom.py"), "rb").read()
    version = hashlib.sha256(source).hexdigest()[:8]            # an edited generator makes new images
    return _make_folder(os.path.join(cache_dir, f"phantom-{size}-{version}"), fill)


# ---- folders of images ----

def _times(directories):
    """When each directory last changed (an entry added, removed, renamed; its mode), [n] int64 ns; 0: there is none.
    Of both its times, as copying tools set the first one back."""
    stats = (os.stat(path) if os.path.isdir(path) else None for path in directories)
    return np.array([max(s.st_mtime_ns, s.st_ctime_ns) if s else 0 for s in stats], dtype=np.int64)


def _list_folder(root):
    """Walk through a folder of image files; a file's class is the first folder on its way. Returns a dict of arrays:

    {split}_images [N] of bytes, names below root, sorted; class_names, of no element unless all files of all splits lie
    in folders, else with {split}_labels [N] int64; {split}_masks [N] of bytes where there is masks/ beside images/, b""
    for none, of no element where no image has one; directories, of bytes: all that were looked at.
    """
    splits = [split for split in SPLITS if os.path.isdir(os.path.join(root, split))]
    found, directories = {}, [root]
    for split in splits or ["train"]:
        top = os.path.join(root, split) if splits else root
        # images/ with or without masks/ beside it is a place, not a class
        pictures = os.path.join(top, "images") if os.path.isdir(os.path.join(top, "images")) else top
        masks_top = os.path.join(top, "masks") if pictures != top else ""
        found[split] = images, masks, classes = [], [] if os.path.isdir(masks_top) else None, []
        directories.append(top)
        for folder, _, files in os.walk(pictures):
            directories.append(folder)
            files = [file for file in files if file.lower().endswith(EXTENSIONS)]
            images += [os.fsencode(os.path.join(folder[len(root) + 1:], file)) for file in files]
            classes += [folder[len(pictures) + 1:].split(os.sep)[0]] * len(files)          # "" for a file at the top
            if masks is not None:                              # one listing: to ask for every candidate takes minutes
                beside = masks_top + folder[len(pictures):]
                directories.append(beside)
                there = set(os.listdir(beside)) if os.path.isdir(beside) else ()
                for stem in (os.path.splitext(file)[0] for file in files):
                    name = next((stem + ending for ending in MASK_EXTENSIONS if stem + ending in there), "")
                    masks.append(os.fsencode(os.path.join(beside[len(root) + 1:], name) if name else ""))
    names = sorted({name for _, _, classes in found.values() for name in classes})
    names = [] if "" in names else names                       # where some files lie at the top, there are no classes
    number, index = {name: i for i, name in enumerate(names)}, dict(class_names=np.array(names, dtype=str))
    index["directories"] = np.array([os.fsencode(path) for path in directories])
    for split, (images, masks, classes) in found.items():
        order = np.argsort(np.array(images, dtype=bytes), kind="stable")
        index[f"{split}_images"] = np.array(images, dtype=bytes)[order]
        if masks is not None:
            index[f"{split}_masks"] = np.array(masks, dtype=bytes)[order if any(masks) else []]
        if names:
            index[f"{split}_labels"] = np.array([number[name] for name in classes], dtype=np.int64)[order]
    return index


def _folder_index(root, cache_dir):
    """_list_folder(root), kept in the cache and memory-mapped from there as long as no directory changes.

    To ask a thousand directories for their times takes milliseconds; to list their million files seconds, on a network
    disk minutes. Each state of a folder gets an index of its own, as a run may still read the one before. Where the
    cache cannot be written, there is none.
    """
    root = os.path.abspath(root)
    start = os.path.join(cache_dir, f"{os.path.basename(root)}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}")

    def mapped(folder):
        return {file[:-4]: _map_array(os.path.join(folder, file)) for file in os.listdir(folder)}

    def fill(temporary):
        for name, array in index.items():
            np.save(os.path.join(temporary, f"{name}.npy"), array)
    for folder in glob.glob(f"{glob.escape(start)}-*"):
        if np.array_equal((index := mapped(folder))["times"], _times(index["directories"])):
            return index
    began, index = time.time_ns(), _list_folder(root)
    index["times"] = _times(index["directories"])
    # clocks of disks are coarse: what changed within two seconds before the walk may change again at the same time
    if index["times"].max() < began - 2 * 10**9:
        with contextlib.suppress(OSError):
            return mapped(_make_folder(f"{start}-{hashlib.sha256(index['times'].tobytes()).hexdigest()[:12]}", fill))
    return index


def _first_channels(files):
    """Channels of the first file that can be read; what is wrong with the others shows when they are."""
    for i in range(min(100, len(files))):
        with contextlib.suppress(UserError):
            return files[i].shape[2]
    return files[0].shape[2] if len(files) else 0               # raises; no files at all: load_dataset says so


def _scan_folder(root, num_channels, cache_dir):
    """(read, splits, class_names) of a folder of image files."""
    index = _folder_index(root, cache_dir)
    splits = [split for split in SPLITS if f"{split}_images" in index]
    if sum(len(index[f"{split}_images"]) for split in splits) == 0:
        raise UserError(f"dataset_path={root!r}: no images; "
                        f"looked for files ending in {', '.join(EXTENSIONS)} in it and below")

    def read(split):
        files, masks = ImageFiles(root, index[f"{split}_images"]), index.get(f"{split}_masks")
        native = _first_channels(files)
        if 0 < num_channels < native:                           # grey may be asked for as RGB, not the reverse
            raise UserError(f"dataset_path={root!r}: images have {native} channel(s), num_channels={num_channels}; "
                            "set --num_channels=0 to take what the data has")
        files.num_channels = num_channels or native
        _first_channels(files)                                  # as many as asked for, or it says why not
        top = os.path.join(root, split) if os.path.isdir(os.path.join(root, split)) else root
        if masks is not None and len(masks) < len(files):
            raise UserError(f"dataset_path={root!r}, split {split!r}: no file in masks/ is named like an image in "
                            "images/; a mask of a.jpg is a.png or a.npy")
        if masks is not None:
            masks = ImageFiles(root, masks, as_mask=True)
        elif os.path.isfile(boxes := os.path.join(top, "boxes.json")):
            pictures = os.path.join(top, "images") if os.path.isdir(os.path.join(top, "images")) else top
            masks = read_boxes(boxes, [os.path.relpath(files.path(i), pictures) for i in range(len(files))], files)
        return files, index.get(f"{split}_labels"), masks
    return read, splits, index["class_names"].tolist()
