"""Data sets: MedMNIST by name, .npz files, image folders, the embedded phantom; and the order a run reads them in.

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
import math
import os
import shutil
import signal
import tempfile
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from augment import sample_masks
from configurator import UserError
from phantom import PHANTOM_CLASSES, make_phantom

MEDMNIST = json.load(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "medmnist.json")))
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".npy", ".dcm")
MASK_EXTENSIONS = (".png", ".npy", ".tif", ".tiff", ".bmp", ".jpg")
SPLITS = ("train", "val", "test")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)      # refused, not decoded


# ---- one image ----

def load_image(path, num_channels=0, as_mask=False, least_side=0):
    """One image file as an [H,W,C] array in its own dtype.

    png, jpg, bmp, tif through Pillow (16-bit grey stays 16-bit), .npy as it is, DICOM in the units of its rescale slope
    and intercept (CT: Hounsfield units, int16). num_channels: of the data set; 8-bit pictures among others are
    converted (a grey jpg in an RGB folder), everything else must have it. as_mask: palette numbers stay numbers, of
    colours the largest channel counts. least_side: pixels; a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if both of
    its sides keep so many, for a fraction of the time; 0 = whole. Raises UserError that names the file.
    """
    try:
        if path.lower().endswith(".npy"):
            image = np.load(path, allow_pickle=False)
        elif path.lower().endswith(".dcm"):
            image = _load_dicom(path)
        else:
            with Image.open(path) as picture:
                if least_side:
                    picture.draft(None, (least_side, least_side))              # of formats other than JPEG: nothing
                if as_mask:
                    image = np.asarray(picture if picture.mode in ("1", "L", "P") else picture.convert("RGB"))
                    image = image.max(axis=2) if image.ndim == 3 else image.astype(np.uint8)
                elif picture.mode.startswith(("I", "F")):
                    image = np.asarray(picture)
                else:
                    grey = num_channels == 1 or (num_channels == 0 and picture.mode in ("1", "L"))
                    image = np.asarray(picture.convert("L" if grey else "RGB"))
    except UserError:
        raise
    except Exception as error:                    # decoders raise anything: OSError, SyntaxError, struct.error, bombs
        raise UserError(f"{path}: cannot be read as an image ({type(error).__name__}: {error}); "
                        "mend or remove it, or set --on_bad_image=skip") from None
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.dtype.kind not in "uif" or num_channels not in (0, image.shape[2]):
        raise UserError(f"{path}: shape {image.shape}, {image.dtype}; needs [height, width, channels] numbers"
                        + (f" with {num_channels} channels as the rest of the data set; set --num_channels=0 to "
                           "take what the first image has" if num_channels else ""))
    return image


def _load_dicom(path):
    try:
        import pydicom
    except ImportError:
        raise UserError(f"{path}: reading DICOM needs pydicom; pip install pydicom") from None
    file = pydicom.dcmread(path)
    image = file.pixel_array * float(getattr(file, "RescaleSlope", 1)) + float(getattr(file, "RescaleIntercept", 0))
    return np.rint(image).astype(np.int16) if np.abs(image).max() < 2**15 else image.astype(np.float32)


class Sendable:
    """Can go to spawned workers: a memory map would be pickled by content, so its file name travels in its place."""

    def __getstate__(self):
        return {key: ("mapped", value.filename) if isinstance(value, np.memmap) else value
                for key, value in self.__dict__.items()}

    def __setstate__(self, state):
        for key, value in state.items():
            mapped = isinstance(value, tuple) and value[:1] == ("mapped",)
            self.__dict__[key] = np.load(value[1], mmap_mode="r") if mapped else value


class ImageFiles(Sendable):
    """Files below a folder that behave like an array of images: len() and [i] -> [H,W,C], None for no file.

    names: [N] of bytes, relative to root, b"" for no file (a list of strings will do for a few). A million strings are
    100 MB, in every worker, for python counts references inside each one that it touches; an array is only read.
    least_side: of load_image.
    """

    def __init__(self, root, names, num_channels=0, as_mask=False, least_side=0):
        self.root, self.names, self.num_channels, self.as_mask = root, names, num_channels, as_mask
        self.least_side = least_side

    def __len__(self):
        return len(self.names)

    def path(self, i):
        return os.path.join(self.root, os.fsdecode(self.names[i]))

    def __getitem__(self, i):
        return load_image(self.path(i), self.num_channels, self.as_mask, self.least_side) if self.names[i] else None

    def at_least(self, side):
        """The same files, decoded only as large as it takes to have `side` pixels on both sides."""
        return ImageFiles(self.root, self.names, self.num_channels, self.as_mask, side)


class BoxMasks(Sendable):
    """Masks drawn from boxes when they are asked for, like an array of masks: [i] -> [H,W] uint8, 0 outside of the
    boxes; None for an image that they do not mention. A box is (left, top, right, bottom) in pixels, right and bottom
    exclusive, fractions rounded outwards, and may have a fifth number, the mask value, 1 to 255 (else 1)."""

    def __init__(self, boxes, images, where):
        """boxes: for each image a list of boxes, or None; images: of the same length; where: to name in errors."""
        self.boxes, self.images, self.where = boxes, images, where
        for i, box in ((i, box) for i, some in enumerate(boxes) for box in some or ()):
            numbers = isinstance(box, (list, tuple)) and all(type(x) in (int, float) for x in box)
            if not numbers or len(box) not in (4, 5) or box[0] >= box[2] or box[1] >= box[3] or \
                    not 1 <= int((*box, 1)[4]) <= 255:
                raise UserError(f"{where}: image {i} has the box {box}; needs [left, top, right, bottom] in pixels, "
                                "left < right, top < bottom, and may have a mask value from 1 to 255 behind")

    def __len__(self):
        return len(self.boxes)

    def __getitem__(self, i):
        if self.boxes[i] is None:
            return None
        image = self.images[i]
        mask = np.zeros(image.shape[:2], np.uint8)
        for left, top, right, bottom, *value in self.boxes[i]:
            rows, columns = (slice(max(0, math.floor(a)), max(0, math.ceil(b)))
                             for a, b in ((top, bottom), (left, right)))
            inside = mask[rows, columns]
            if inside.size == 0:
                raise UserError(f"{self.where}: image {i}, {mask.shape[1]} pixels wide and {mask.shape[0]} high, has a "
                                f"box outside of it, {[left, top, right, bottom]}: left, top, right, bottom")
            inside[:] = int((*value, 1)[0])
        return mask


def read_boxes(path, files, images):
    """BoxMasks from a json file {"a.jpg": [[left, top, right, bottom], ...], ...}: files [N] are the names of images
    [N]. An empty list says that there is nothing in the image, a missing name that nobody looked."""
    try:
        boxes = json.load(open(path))
    except ValueError as error:
        raise UserError(f"{path}: not json ({error})") from None
    if not isinstance(boxes, dict) or not all(isinstance(some, list) for some in boxes.values()):
        raise UserError(f'{path}: needs {{"image name": [[left, top, right, bottom], ...], ...}}')
    if unknown := sorted(set(boxes) - {file.replace(os.sep, "/") for file in files}):
        raise UserError(f"{path}: there is no image {unknown[0]!r}; names are as in the folder, like {files[0]!r}")
    return BoxMasks([boxes.get(file.replace(os.sep, "/")) for file in files], images, path)


class Rows(Sendable):
    """Some rows of an array or of ImageFiles, without a copy."""

    def __init__(self, items, rows, num_channels=0):
        self.items, self.rows, self.num_channels = items, rows, num_channels

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.items[self.rows[i]]

    def at_least(self, side):
        return Rows(at_least(self.items, side), self.rows, self.num_channels)


def at_least(images, side):
    """Images of a Dataset, whose files are decoded only as large as it takes for `side` pixels; arrays stay."""
    return images.at_least(side) if hasattr(images, "at_least") else images


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


# ---- what a run reads, and when ----

def measure_intensities(dataset, intensity_range=(0.0, 0.0), n_images=256, seed=0, on_bad_image="error"):
    """(intensity_range, mean, std) from a seeded sample of images; on_bad_image='skip' leaves out what cannot be read.

    intensity_range (0, 0) means: find it. uint8 is (0, 255); all others get their 0.5 and 99.5 percentiles, rounded.
    mean, std: tuples, one per channel, of the pixels mapped to 0..1 and clipped.
    """
    rows = np.random.default_rng(seed).permutation(len(dataset))[:n_images]
    images = []
    for i in sorted(rows):
        try:
            images.append(dataset[i][0])
        except UserError:
            if on_bad_image == "error":
                raise
    if not images:
        raise UserError(f"{dataset.name}: none of {len(rows)} sampled images can be read")
    if tuple(intensity_range) == (0.0, 0.0):
        if images[0].dtype == np.uint8:
            intensity_range = (0.0, 255.0)
        else:
            low, high = np.percentile(np.concatenate([image.ravel()[::7] for image in images]), (0.5, 99.5))
            digits = 0 if high - low > 20 else 4
            low, high = round(float(low), digits), round(float(high), digits)
            intensity_range = (low, high if high > low else low + 1)       # nothing but air: any width will do
    low, high = intensity_range
    sums = np.zeros((3, dataset.num_channels))
    for image in images:
        x = np.clip((image.reshape(-1, dataset.num_channels).astype(np.float64) - low) / (high - low), 0, 1)
        sums += np.stack([np.full(x.shape[1], len(x)), x.sum(0), (x * x).sum(0)])
    mean = sums[1] / sums[0]
    std = np.sqrt(np.maximum(sums[2] / sums[0] - mean**2, 1e-8))
    return intensity_range, tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())


def input_settings(train_set, pretrained, intensity_range=(0.0, 0.0), mean=(), std=(), seed=0, on_bad_image="error"):
    """How pixels become the network's input: what the user gave, else what the weights expect, else what is measured.

    Args: pretrained: of model.pretrained_input, {} for random weights; intensity_range (0, 0), mean (), std (): not
    given. Where the weights know another number of channels, each channel gets the average over theirs.
    Returns: intensity_range, mean, std, and where mean and std come from, in words. Raises UserError for mean or std of
    another length than the images have channels.
    """
    if tuple(intensity_range) == (0.0, 0.0) and pretrained.get("intensity_range"):
        intensity_range = pretrained["intensity_range"]
    intensity_range, measured_mean, measured_std = measure_intensities(train_set, intensity_range, seed=seed,
                                                                       on_bad_image=on_bad_image)
    channels, source = train_set.num_channels, "given" if mean else "measured on 256 images"
    if pretrained:
        same = len(pretrained["mean"]) == channels
        measured_mean, measured_std = (values if same else (float(np.mean(values)),) * channels
                                       for values in (pretrained["mean"], pretrained["std"]))
        source = "given" if mean else "of the pretrained weights" + ("" if same else ", averaged over their channels")
    mean, std = mean or measured_mean, std or measured_std
    for key, values in (("image_mean", mean), ("image_std", std)):
        if len(values) != channels:
            raise UserError(f"{key}={values}: the images have {channels} channel(s); give as many values")
    return intensity_range, mean, std, source


class BatchOrder(torch.utils.data.Sampler):
    """Which images this rank reads: a function of (seed, sample number) and of nothing else.

    Sample number n = iteration * global_batch_size + position in the global batch. It reads image n % N of the shuffled
    epoch n // N. Rank r takes the r-th part of every global batch, in micro-batches. Yields lists of (n, image index).
    """

    def __init__(self, n_images, global_batch_size, micro_batches, rank, world_size, start, stop, seed, shuffle=True):
        self.n_images, self.global_batch_size, self.micro_batches = n_images, global_batch_size, micro_batches
        self.rank, self.world_size, self.start, self.stop = rank, world_size, start, stop
        self.seed, self.shuffle = seed, shuffle

    def __len__(self):
        return (self.stop - self.start) * self.micro_batches

    def __iter__(self):
        share = self.global_batch_size // self.world_size
        batch_size = share // self.micro_batches
        epochs = {}
        for iteration in range(self.start, self.stop):
            first = iteration * self.global_batch_size + self.rank * share
            for n in range(first, first + share, batch_size):
                samples = []
                for number in range(n, n + batch_size):
                    epoch, place = divmod(number, self.n_images)
                    if self.shuffle and epoch not in epochs:     # a batch is in two at most, or in a few tiny ones
                        epochs = {e: order for e, order in epochs.items() if e >= epoch - 1}
                        epochs[epoch] = np.random.default_rng((self.seed, 1, epoch)).permutation(self.n_images)
                    samples.append((number, int(epochs[epoch][place]) if self.shuffle else place))
                yield samples


class CropDataset(torch.utils.data.Dataset):
    """Crops of a data set for the training loop: item (n, index) -> crops of one image, collate -> a batch."""

    def __init__(self, dataset, multi_crop, seed, global_batch_size, grid, mask_settings=None, on_bad_image="error",
                 fixed_views=0):
        """grid: patches per side of a global crop; mask_settings: dict for sample_masks, or None for no masks;
        fixed_views: an image is cropped in so many ways, by turns from epoch to epoch; 0 = anew every time."""
        self.dataset = dataset.at_least(multi_crop.least_side())
        self.multi_crop, self.seed, self.on_bad_image = multi_crop, seed, on_bad_image
        self.fixed_views = fixed_views
        self.global_batch_size, self.grid, self.mask_settings = global_batch_size, grid, mask_settings

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        n, index = item
        bad = []
        while True:
            try:
                image, mask = self.dataset[index]
                break
            except UserError as error:                          # goes home as text: a worker's exception fills a page
                bad.append(self.dataset.path(index))
                if self.on_bad_image == "error" or len(bad) == min(100, len(self.dataset)):
                    return dict(error=str(error))
                index = (index + 1) % len(self.dataset)         # the neighbour stands in
        source, view = (self.seed, 2, n), 0
        if self.fixed_views:
            view = n // len(self.dataset) % self.fixed_views
            source = (self.seed, 4, index, view)
        crops = self.multi_crop(image, mask, np.random.default_rng(source))
        return dict(crops, n=n, index=index, view=view, bad=bad)

    def label_crops(self, indices):
        """What the first batch of a run shows of the label: dict of global_crops and local_crops as collate makes them
        (MultiCrop.of_label). indices: batch["index"] of the samples 0, 1, ..."""
        samples = []
        for n, index in enumerate(indices):
            image, mask = self.dataset[index]
            samples.append(self.multi_crop.of_label(image.shape[:2], mask, np.random.default_rng((self.seed, 2, n))))
        return {key: torch.stack([sample[key] for sample in samples], dim=1).flatten(0, 1)
                for key in ("global_crops", "local_crops")}

    def collate(self, samples):
        """dict with global_crops [V*B,...], local_crops [L*B,...], global_seeds [V*B], local_seeds [L*B], view-major;
        gram_crops [V*B,...] and masks [V*B,P] bool if any; n, index and view, lists of B ints; bad, list of files; or
        only error."""
        errors = [sample["error"] for sample in samples if "error" in sample]
        if errors:
            return dict(error=errors[0])
        batch = {key: torch.stack([sample[key] for sample in samples], dim=1).flatten(0, 1)  # [V,B,...] -> [V*B,...]
                 for key in ("global_crops", "local_crops", "global_seeds", "local_seeds", "gram_crops")
                 if key in samples[0]}
        batch.update({key: [sample[key] for sample in samples] for key in ("n", "index", "view")})
        batch["bad"] = [path for sample in samples for path in sample["bad"]]
        if self.mask_settings is not None:
            # the masks of the global batch have one plan; each rank builds its own rows of it
            n_views = len(batch["global_crops"]) // len(samples)
            positions = [sample["n"] % self.global_batch_size for sample in samples]
            rows = [view * self.global_batch_size + position for view in range(n_views) for position in positions]
            rng = np.random.default_rng((self.seed, 3, samples[0]["n"] // self.global_batch_size))
            n_crops = n_views * self.global_batch_size
            batch["masks"] = sample_masks(n_crops, self.grid, rng, rows=rows, **self.mask_settings)[rows]
        return batch


def ignore_ctrl_c(_):
    """worker_init_fn of a loader: Ctrl-C reaches every process of the terminal, the main one decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
