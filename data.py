"""Data sets: MedMNIST by name, .npz files, image folders, the embedded phantom.

load_dataset returns one split of any of these as a Dataset. Pixels keep their dtype and values.
An archive is unpacked once into .npy files in a cache. All ranks and workers map these files into
memory, so they share the pages. The list of a folder's files is cached in the same way. Nothing is
unpickled. Downloads are checked by MD5. An entry of the cache gets its name when it is complete.
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

HERE = os.path.dirname(os.path.abspath(__file__))
SPLITS = ("train", "val", "test")
with open(os.path.join(HERE, "config", "medmnist.json")) as _file:
    MEDMNIST = json.load(_file)


# ---- one split ----

class Dataset(Sendable, torch.utils.data.Dataset):
    """One split of a data set: ds[i] -> (image [H,W,C], mask [H,W] or None).

    images: [N,H,W] or [N,H,W,C], or ImageFiles
    labels: [N] int64, [N,c] with several labels per image, or None
    masks: [N,H,W], ImageFiles, BoxMasks, or None
    class_names, mask_names: lists of str, of the labels and of the masks' values
    num_channels: int; name: dataset_path; split: str; splits: list of all splits of the source
    """

    def __init__(self, images, labels=None, masks=None, class_names=(), name="",
                 split="train", splits=(), mask_names=()):
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
        image = self.images[i]
        image = image[..., None] if image.ndim == 2 else image
        mask = None if self.masks is None else self.masks[i]
        if mask is None:
            return image, None
        mask = mask[..., 0] if mask.ndim == 3 else mask
        if mask.shape != image.shape[:2]:
            raise UserError(f"mask {i} of {self.name}: shape {mask.shape}, its image "
                            f"{image.shape[:2]}; both must agree")
        return image, mask

    def path(self, i):
        """The name of image i in messages: its file, or its number in the source."""
        images, index = self.images, i
        while isinstance(images, Rows):
            images, index = images.items, images.indices[index]
        if isinstance(images, ImageFiles):
            return images.path(index)
        return f"{self.name}, {self.split} image {index}"

    def limited(self, n, seed):
        """At most n of the images, drawn by seed, in their order; n = 0: all."""
        if n == 0 or len(self) <= n:
            return self
        drawn = np.random.default_rng(seed).permutation(len(self))[:n]
        return self.subset(np.sort(drawn), self.split)

    def at_least(self, side):
        """This data set for a use that needs `side` pixels on both sides of an image: JPEG files
        are decoded no larger than that requires. With masks it is unchanged, as they must fit."""
        if self.masks is not None:
            return self
        images = at_least(self.images, side)
        return Dataset(images, self.labels, None, self.class_names, self.name,
                       self.split, self.splits, self.mask_names)

    def subset(self, indices, split):
        """Some of the images, without a copy, as a Dataset named `split`. indices: [n] int."""
        images = Rows(self.images, indices, self.num_channels)
        labels = None if self.labels is None else self.labels[indices]
        masks = None if self.masks is None else Rows(self.masks, indices)
        return Dataset(images, labels, masks, self.class_names, self.name,
                       split, self.splits, self.mask_names)


def load_dataset(dataset_path, split="train", size=224, cache_dir="", download_url="",
                 num_channels=0, seed=0):
    """One split of a data set.

    If the source has labels but no val, a tenth of train, drawn by `seed`, is val and train is the
    rest.
    Args: dataset_path: one of
      'phantom', the embedded data set;
      the name of a MedMNIST data set;
      a .npz with {split}_images, and optionally {split}_labels, {split}_masks or {split}_boxes,
      class_names, mask_names;
      a folder of images: flat, or one sub-folder per class, or train/ val/ test/ of either, or
      images/ with masks/ beside it; boxes.json in it replaces masks (see images.read_boxes).
    size: side of MedMNIST (28, 64, 128, 224) and phantom images, in pixels; cache_dir: '' =
    dino-mx in the user's cache; download_url: folder of a mirror of MedMNIST; num_channels: what
    the images must have, 0 = any.
    Returns: Dataset. Raises UserError: what is missing or wrong, and what to do.
    """
    if not cache_dir:
        cache_dir = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "dino-mx")
    cache_dir = os.path.expanduser(cache_dir)
    read, splits, class_names, mask_names = _open_source(dataset_path, size, cache_dir,
                                                         download_url, num_channels)
    val_is_cut = split in ("train", "val") and "val" not in splits and "train" in splits
    if split not in splits and not val_is_cut:
        raise UserError(f"dataset_path={dataset_path!r} has no split {split!r}; it has "
                        f"{', '.join(splits) or 'none'}")
    images, labels, masks = read("train" if val_is_cut else split)
    source = f"dataset_path={dataset_path!r}, split {split!r}"
    if len(images) == 0:
        raise UserError(f"{source}: no images; looked for {split}_images or files ending in "
                        f"{', '.join(EXTENSIONS)}")
    for what, other in (("labels", labels), ("masks", masks)):
        if other is not None and len(other) != len(images):
            raise UserError(f"{source}: {len(other)} {what} for {len(images)} images; there must "
                            "be one each")
    if labels is not None and labels.ndim == 2 and labels.shape[1] == 1:
        labels = np.asarray(labels).squeeze(-1)
    dataset = Dataset(images, labels, masks, class_names, dataset_path, split, splits, mask_names)
    if num_channels and dataset.num_channels != num_channels:
        raise UserError(f"{source}: images have {dataset.num_channels} channel(s), "
                        f"num_channels={num_channels}; set --num_channels={dataset.num_channels}, "
                        "or 0 to take what the data has")
    if val_is_cut and labels is not None and len(images) > 1:
        rest, tenth = cut_tenth(len(images), seed)
        return dataset.subset(tenth if split == "val" else rest, split)
    if val_is_cut and split == "val":
        raise UserError(f"{source}: no val, and no labels to measure with")
    return dataset


def _open_source(dataset_path, size, cache_dir, download_url, num_channels):
    """(read, splits, class_names, mask_names) of a data set; arguments of load_dataset.

    read(split) -> (images, labels or None, masks or None).
    """
    if dataset_path == "phantom":
        folder = _phantom_arrays(cache_dir, size)
        return _reader(folder), SPLITS, PHANTOM_CLASSES, ("background", "calcification")
    if dataset_path in MEDMNIST:
        folder = _medmnist_arrays(dataset_path, size, cache_dir, download_url)
        class_names = list(MEDMNIST[dataset_path]["label"].values())
        return _reader(folder), SPLITS, class_names, ()
    if dataset_path.endswith(".npz") and os.path.isfile(dataset_path):
        folder, ending = _npz_arrays(dataset_path, cache_dir), "_images.npy"
        files = sorted(os.listdir(folder))
        splits = [file.removesuffix(ending) for file in files if file.endswith(ending)]
        return _reader(folder), splits, _names(folder, "class"), _names(folder, "mask")
    if os.path.isdir(dataset_path):
        read, splits, class_names = _scan_folder(dataset_path, num_channels, cache_dir)
        return read, splits, class_names, ()
    raise UserError(f"dataset_path={dataset_path!r} does not exist; give 'phantom', a MedMNIST "
                    f"name ({', '.join(MEDMNIST)}), a .npz file or a folder of images")


def cut_tenth(n, seed):
    """The indices of n images in two sorted parts, drawn by seed: (the rest, a tenth but at least
    one)."""
    indices = np.random.default_rng(seed).permutation(n)
    n_tenth = max(1, n // 10)
    return np.sort(indices[n_tenth:]), np.sort(indices[:n_tenth])


# ---- the cache: folders of .npy ----

def _make_folder(folder, fill):
    """Create `folder` by fill(temporary folder) and a rename: it is complete or does not exist.
    Returns folder."""
    if os.path.isdir(folder):
        return folder
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    temporary = tempfile.mkdtemp(prefix="part-", dir=os.path.dirname(folder))
    try:
        fill(temporary)
        for file in os.listdir(temporary):  # a power failure must not leave the name without data
            with open(os.path.join(temporary, file), "rb") as written:
                os.fsync(written.fileno())
        os.rename(temporary, folder)
    except OSError:
        if not os.path.isdir(folder):  # else another process was faster, with the same content
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _save_arrays(folder, arrays):
    """Write {name: array} as .npy files."""
    for name, array in arrays.items():
        np.save(os.path.join(folder, f"{name}.npy"), array)


def _map_folder(folder):
    """{name: array} of a folder of .npy files, as memory maps."""
    names = [file.removesuffix(".npy") for file in os.listdir(folder)]
    return {name: _map_array(os.path.join(folder, f"{name}.npy")) for name in names}


def _map_array(path):
    """A .npy file as a memory map; None if there is no such file."""
    if not os.path.isfile(path):
        return None
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:  # python objects, which would have to be unpickled
        raise UserError(f"{path}: cannot be read ({error}); save plain numbers") from None


def _short_hash(content):
    return hashlib.sha256(content).hexdigest()[:12]


# ---- splits in a folder of .npy ----

def _names(folder, what):
    """The list in {what}_names.npy; [] if there is no such file."""
    names = _map_array(os.path.join(folder, f"{what}_names.npy"))
    return [] if names is None else names.tolist()


def _reader(folder):
    """A function split -> (images, labels, masks) of {split}_images.npy and so on, as memory maps.
    labels and masks are None if there are none."""
    def mapped(name):
        return _map_array(os.path.join(folder, f"{name}.npy"))

    def read(split):
        images, masks = mapped(f"{split}_images"), mapped(f"{split}_masks")
        if images.ndim not in (3, 4) or images.dtype.kind not in "uif":
            raise UserError(f"{folder}: {split}_images has shape {images.shape}, {images.dtype}; "
                            "needs numbers [N,H,W] or [N,H,W,C]")
        if masks is not None and masks.shape[1:3] != images.shape[1:3]:
            raise UserError(f"{folder}: {split}_masks has shape {masks.shape}, {split}_images "
                            f"{images.shape}; height and width must agree")
        boxes = mapped(f"{split}_boxes")
        if masks is None and boxes is not None:
            masks = _boxes_by_image(boxes, images, f"{folder}: {split}_boxes")
        return images, mapped(f"{split}_labels"), masks
    return read


def _boxes_by_image(boxes, images, source):
    """BoxMasks from an array [M,5 or 6]: number of the image, box, and perhaps the mask's value.
    Without a row an image shows nothing to label. source: to name in errors."""
    fits = boxes.ndim == 2 and boxes.shape[1] in (5, 6)
    if fits and len(boxes) > 0:
        numbers = boxes[:, 0]
        fits = 0 <= numbers.min() <= numbers.max() < len(images)
    if not fits:
        raise UserError(f"{source} has shape {boxes.shape}; needs a row for each box: number of "
                        f"the image, 0 to {len(images) - 1}, then left, top, right, bottom in "
                        "pixels")
    boxes_of_images = [[] for _ in range(len(images))]
    for i, *box in boxes.tolist():
        boxes_of_images[int(i)].append(box)
    return BoxMasks(boxes_of_images, images, source)


# ---- sources of such folders: .npz, MedMNIST, the phantom ----

def _unpack(path, folder):
    """Copy the members of an .npz, which are .npy files, into a folder. The copy is a stream, so
    no array has to fit into memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name != os.path.basename(name) or not name.endswith(".npy"):
                    raise UserError(f"{path}: member {name!r} is not a plain .npy; is this an .npz "
                                    "written by numpy?")
                target_path = os.path.join(folder, name)
                with archive.open(name) as source, open(target_path, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: not a complete .npz file ({error}); copy or download it "
                        "again") from None


def _npz_arrays(path, cache_dir):
    """The folder in the cache with the arrays of an .npz file. A changed file gets a new folder."""
    stat = os.stat(path)
    state = f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"
    name = f"{os.path.basename(path)[:-4]}-{_short_hash(state.encode())}"
    return _make_folder(os.path.join(cache_dir, name), lambda temporary: _unpack(path, temporary))


def _medmnist_arrays(name, size, cache_dir, download_url):
    """The folder in the cache with the arrays of a MedMNIST data set, downloaded if necessary."""
    files = MEDMNIST[name]["files"]
    if str(size) not in files:
        raise UserError(f"dataset_size={size}: {name} exists at {', '.join(files)} pixels")
    file = files[str(size)]
    url, md5 = file["url"], file["md5"]
    file_name = url.split("/")[-1].split("?")[0]
    archive = os.path.join(cache_dir, file_name)
    if download_url:
        url = f"{download_url.rstrip('/')}/{file_name}"

    def fill(temporary):
        if os.path.isfile(archive):  # the user put it there, so it stays
            if (found := _md5(archive)) != md5:
                raise UserError(f"{archive} has MD5 {found}, should be {md5}; remove it, and it is "
                                "downloaded again")
            _unpack(archive, temporary)
            return
        download(url, md5, archive)
        _unpack(archive, temporary)
        os.remove(archive)  # the arrays hold the same, and the archives of size 224 are GBs
    return _make_folder(os.path.join(cache_dir, f"{name}_{size}"), fill)


def _md5(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def download(url, md5, path):
    """Fetch url to path: write beside it, check length and MD5, rename. A failed attempt leaves
    nothing behind and raises UserError."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part, title = f"{path}.{os.getpid()}.part", os.path.basename(path)
    advice = f"try again, name a mirror with --download_url, or put the file at {path} yourself"
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(part, "wb") as file:
            expected = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=expected or None, unit="B", unit_scale=True, desc=title) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
        n_bytes = os.path.getsize(part)
        if expected and n_bytes != expected:
            raise UserError(f"{url}: the connection was cut after {n_bytes} of {expected} bytes; "
                            f"{advice}")
        if (found := _md5(part)) != md5:
            raise UserError(f"{url}: MD5 is {found}, should be {md5}: a damaged or another file; "
                            f"{advice}")
        os.replace(part, path)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError,
            ConnectionError) as error:
        reason = getattr(error, "reason", "") or error
        raise UserError(f"{url}: cannot be downloaded ({reason}); {advice}") from None
    finally:
        if os.path.exists(part):
            os.remove(part)


def _phantom_arrays(cache_dir, size):
    """The folder in the cache with the phantom's three splits, made if necessary."""
    def fill(temporary):
        n_images = dict(train=2400, val=600, test=600)
        for seed, split in enumerate(SPLITS):  # other seeds, so no image is in two splits
            arrays = make_phantom(n_images[split], size, seed)
            _save_arrays(temporary, {f"{split}_{key}": array for key, array in arrays.items()})

    with open(os.path.join(HERE, "phantom.py"), "rb") as file:
        version = _short_hash(file.read())[:8]  # an edited generator makes new images
    return _make_folder(os.path.join(cache_dir, f"phantom-{size}-{version}"), fill)


# ---- folders of images ----

def _scan_folder(root, num_channels, cache_dir):
    """(read, splits, class_names) of a folder of image files; read as in _open_source."""
    index = _folder_index(root, cache_dir)
    splits = [split for split in SPLITS if f"{split}_images" in index]
    if all(len(index[f"{split}_images"]) == 0 for split in splits):
        raise UserError(f"dataset_path={root!r}: no images; looked for files ending in "
                        f"{', '.join(EXTENSIONS)} in it and below")

    def read(split):
        files = ImageFiles(root, index[f"{split}_images"])
        files.num_channels = _channels_of(files, num_channels)
        masks = _masks_of(files, index.get(f"{split}_masks"), split)
        return files, index.get(f"{split}_labels"), masks
    return read, splits, index["class_names"].tolist()


def _channels_of(files, num_channels):
    """The number of channels to read ImageFiles with: num_channels, or those of the first file if
    it is 0. Raises UserError if the first file has more than num_channels, or cannot have them."""
    native = _first_channels(files)
    if 0 < num_channels < native:  # grey can be read as RGB, but not RGB as grey
        raise UserError(f"dataset_path={files.root!r}: images have {native} channel(s), "
                        f"num_channels={num_channels}; set --num_channels=0 to take what the data "
                        "has")
    num_channels = num_channels or native
    _first_channels(ImageFiles(files.root, files.names, num_channels))
    return num_channels


def _first_channels(files):
    """Channels of the first of 100 files that can be read. A file that cannot be read raises when
    it is used. Raises the UserError of the first file if all of them are unreadable; 0 = no file.
    """
    for i in range(min(100, len(files))):
        with contextlib.suppress(UserError):
            return files[i].shape[2]
    return files[0].shape[2] if len(files) else 0


def _masks_of(files, mask_names, split):
    """The masks of ImageFiles: files of masks/, or boxes.json, or None.

    mask_names: of the index (_list_folder), or None.
    """
    if mask_names is not None and len(mask_names) < len(files):
        raise UserError(f"dataset_path={files.root!r}, split {split!r}: no file in masks/ is named "
                        "like an image in images/; a mask of a.jpg is a.png or a.npy")
    if mask_names is not None:
        return ImageFiles(files.root, mask_names, as_mask=True)
    top = _sub_folder(files.root, split)
    boxes_path = os.path.join(top, "boxes.json")
    if not os.path.isfile(boxes_path):
        return None
    pictures = _sub_folder(top, "images")
    paths = [files.path(i) for i in range(len(files))]
    names = [os.path.relpath(path, pictures) for path in paths]
    return read_boxes(boxes_path, names, files)


def _sub_folder(folder, name):
    """The folder `name` in a folder if there is one, else the folder itself."""
    path = os.path.join(folder, name)
    return path if os.path.isdir(path) else folder


# ---- the index of a folder ----

def _folder_index(root, cache_dir):
    """The arrays of _list_folder(root), from the cache as long as no directory changes.

    Asking a thousand directories for their times takes milliseconds. Listing their million files
    takes seconds, on a network disk minutes. Each state of a folder gets an index of its own,
    because a run may still read the last one. If the cache cannot be written, none is kept.
    """
    root = os.path.abspath(root)
    name = f"{os.path.basename(root)}-{_short_hash(os.fsencode(root))}"
    prefix = os.path.join(cache_dir, name)
    for folder in glob.glob(f"{glob.escape(prefix)}-*"):
        index = _map_folder(folder)
        if np.array_equal(index["times"], _times(index["directories"])):
            return index
    began = time.time_ns()
    index = _list_folder(root)
    index["times"] = _times(index["directories"])
    # Clocks of disks are coarse: a directory that changed within two seconds before the walk may
    # change again without a new time. Its index is not kept.
    if index["times"].max() >= began - 2 * 10**9:
        return index
    folder = f"{prefix}-{_short_hash(index['times'].tobytes())}"
    with contextlib.suppress(OSError):
        _make_folder(folder, lambda temporary: _save_arrays(temporary, index))
        return _map_folder(folder)
    return index


def _times(directories):
    """When each directory last changed (an entry was added, removed or renamed, or the mode
    changed), [n] int64 in ns; 0 if there is no such directory."""
    times = []
    for path in directories:
        if os.path.isdir(path):
            stat = os.stat(path)
            times.append(max(stat.st_mtime_ns, stat.st_ctime_ns))  # copying tools set mtime back
        else:
            times.append(0)
    return np.array(times, dtype=np.int64)


def _list_folder(root):
    """Walk through a folder of image files. Returns a dict of arrays:

    {split}_images   [N] of bytes: names below root, sorted
    {split}_labels   [N] int64: the class is the first folder on the way to the file; absent if a
                     file of any split lies in no such folder
    {split}_masks    [N] of bytes: b"" for an image without a mask; [0] if no image has one; absent
                     without masks/ beside images/
    class_names      [c] of str: sorted, those of all splits; [0] without labels
    directories      of bytes: all directories that the result depends on
    """
    splits = [split for split in SPLITS if _sub_folder(root, split) != root]
    found, directories = {}, [root]
    for split in splits or ["train"]:
        top = os.path.join(root, split) if splits else root
        found[split] = _list_split(root, top, directories)
    names = set()
    for _, classes, _ in found.values():
        names.update(classes)
    names = [] if "" in names else sorted(names)
    number = {name: i for i, name in enumerate(names)}
    index = dict(class_names=np.array(names, dtype=str),
                 directories=np.array([os.fsencode(path) for path in directories]))
    for split, (images, classes, masks) in found.items():
        images = np.array(images, dtype=bytes)
        order = np.argsort(images, kind="stable")
        index[f"{split}_images"] = images[order]
        if masks is not None:
            kept = order if any(masks) else order[:0]
            index[f"{split}_masks"] = np.array(masks, dtype=bytes)[kept]
        if names:
            labels = np.array([number[name] for name in classes], dtype=np.int64)
            index[f"{split}_labels"] = labels[order]
    return index


def _list_split(root, top, directories):
    """(images, classes, masks) of one split, three lists in the order of the walk.

    images, masks: names below root, bytes, b"" for no mask; masks is None without masks/ beside
    images/. classes: str, "" for an image that lies in no class folder. Appends to `directories`.
    """
    pictures, masks_top = _sub_folder(top, "images"), os.path.join(top, "masks")
    has_masks = pictures != top and os.path.isdir(masks_top)
    images, classes, masks = [], [], []

    def below_root(folder, name):
        return os.fsencode(os.path.join(folder[len(root) + 1:], name))

    directories.append(top)
    for folder, _, files in os.walk(pictures):
        directories.append(folder)
        files = [file for file in files if file.lower().endswith(EXTENSIONS)]
        images += [below_root(folder, file) for file in files]
        class_name = folder[len(pictures) + 1:].split(os.sep)[0]
        classes += [class_name] * len(files)
        if has_masks:
            beside = masks_top + folder[len(pictures):]
            directories.append(beside)
            names = _find_masks(beside, files)
            masks += [below_root(beside, name) if name else b"" for name in names]
    return images, classes, masks if has_masks else None


def _find_masks(folder, files):
    """For each image file the name of its mask in `folder`, "" for none. The mask of a.jpg is
    a.png, a.npy, ... One listing is enough: asking for each candidate would take minutes."""
    existing = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    names = []
    for file in files:
        base = os.path.splitext(file)[0]
        candidates = (base + extension for extension in MASK_EXTENSIONS)
        names.append(next((name for name in candidates if name in existing), ""))
    return names
