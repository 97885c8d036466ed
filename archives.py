"""Arrays on disk: the cache of .npy files, .npz archives, MedMNIST by name, the phantom.

An archive is unpacked once into .npy files in a cache. All ranks and workers map these files into
memory, so they share the pages. Nothing is unpickled. Downloads are checked by MD5. An entry of the
cache gets its name when it is complete.
"""
import contextlib
import functools
import hashlib
import http.client
import json
import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

import phantom
from configurator import UserError
from formats import array_axes
from images import BoxMasks, Sendable
from labels import group_numbers, hash_number, split_word
from run_folder import part_of, remove_dead_parts

HERE = os.path.dirname(os.path.abspath(__file__))
SPLITS = ("train", "val", "test")
with open(os.path.join(HERE, "config", "medmnist.json")) as _file:
    MEDMNIST = json.load(_file)


# ---- the cache: folders of .npy ----

@functools.cache
def cache_folder(cache_dir):
    """A cache that can be written: cache_dir, made if necessary, or with a warning a folder of this
    user beside the temporary files, which a machine may empty."""
    if not cache_dir.startswith("~"):  # a user without a home
        with contextlib.suppress(OSError):
            os.makedirs(cache_dir, exist_ok=True)
            tempfile.TemporaryFile(dir=cache_dir).close()
            return cache_dir
    other = os.path.join(tempfile.gettempdir(), f"dino-mx-{os.getuid()}")
    os.makedirs(other, mode=0o700, exist_ok=True)
    if os.stat(other).st_uid != os.getuid():
        raise UserError(f"cache_dir={cache_dir!r} cannot be written, and {other} belongs to "
                        "another user; set --cache_dir to a folder that can be written")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: cache_dir={cache_dir!r} cannot be written; downloads and unpacked arrays "
              f"go to {other}", file=sys.stderr)
    return other


def make_folder(folder, fill):
    """Create `folder` by fill(temporary folder) and a rename: it is complete or does not exist.
    Returns folder."""
    if os.path.isdir(folder):
        return folder
    cache_dir, name = os.path.split(folder)
    cache_dir = cache_folder(cache_dir)
    folder = os.path.join(cache_dir, name)
    if os.path.isdir(folder):
        return folder
    remove_dead_parts(cache_dir)
    temporary = part_of(folder)
    os.makedirs(temporary, exist_ok=True)  # a process that had the same number left it unfinished
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


def save_arrays(folder, arrays):
    """Write {name: array} as .npy files."""
    for name, array in arrays.items():
        np.save(os.path.join(folder, f"{name}.npy"), array)


def map_folder(folder):
    """{name: array} of a folder of .npy files, as memory maps."""
    names = [file.removesuffix(".npy") for file in os.listdir(folder)]
    return {name: map_array(os.path.join(folder, f"{name}.npy")) for name in names}


def map_array(path, name=""):
    """A .npy file as a memory map. name: of the array in messages, '' = its path."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:  # python objects, which would have to be unpickled
        raise UserError(f"{name or path}: cannot be read ({error}); save plain numbers") from None


def short_hash(content):
    """12 hexadecimal digits that name some bytes in the cache."""
    return hashlib.sha256(content).hexdigest()[:12]


# ---- splits in a folder of .npy ----

PARTS = ("images", "labels", "masks", "boxes", "groups", "patients", "subjects", "volume",
         "position_mm", "spacing_mm")
NEEDED = ("needs train_images [N,H,W] or [N,H,W,C], and as far as you have them val_images, "
          "test_images, train_labels [N], train_masks [N,H,W], train_groups [N] (patients)")


def open_arrays(folder, path, volume_axis=-1):
    """The data set in a folder of .npy: {split}_images, {split}_labels and so on.

    Args: folder: of make_folder; path: what the user has named, for messages; volume_axis: of
    volumes.array_axes, for images of three axes.
    Returns: namespace of read(split) -> dict of arguments for a Dataset; labels {split: array or
    None}; class_names, mask_names, lists; notes, sentences for the log.
    Raises UserError: which arrays are there, and which are needed.
    """
    names = sorted(file.removesuffix(".npy") for file in os.listdir(folder))
    splits = _parts_of_splits(names, path)
    used = {"class_names", "mask_names"}.union(*map(dict.values, splits.values()))
    arrays = {name: map_array(os.path.join(folder, f"{name}.npy"), f"{path}: {name}")
              for name in names if name in used}
    labels, notes = {}, []
    for split, parts in splits.items():
        images = arrays[parts["images"]]
        labels[split] = arrays.get(parts.get("labels"))
        if images.ndim == 4 and is_volumes(images, volume_axis):
            slices = Slices(images, volume_axis)
            notes.append(f"{parts['images']} {list(images.shape)}: {len(images)} volumes of "
                         f"{slices.n_slices} slices along axis {slices.axis} (--volume_axis)")
            if labels[split] is not None and len(labels[split]) == len(images):
                labels[split] = np.repeat(labels[split], slices.n_slices, axis=0)
        elif images.ndim == 4 and array_axes(images.shape[1:], volume_axis)[1] == 0:
            notes.append(f"{parts['images']} {list(images.shape)}: axis 1 is its channels")
    if unused := [name for name in names if name not in used]:
        notes.append(f"arrays left out: {', '.join(unused)}")

    def read(split):
        parts = {part: arrays[name] for part, name in splits[split].items()}
        return _read_split(parts, split, path, volume_axis)
    return SimpleNamespace(read=read, labels=labels, class_names=_texts(arrays.get("class_names")),
                           mask_names=_texts(arrays.get("mask_names")), notes=notes)


def _parts_of_splits(names, path):
    """{split: {part: name of its array}} of an archive, of the splits that have images."""
    found = {}
    for name in names:
        part = next((part for part in PARTS if name.endswith(f"_{part}")), "")
        prefix = name.removesuffix(f"_{part}")
        if part and prefix:
            split = split_word(prefix) or prefix
            other = found.setdefault(split, {}).setdefault(part, name)
            if other != name:
                raise UserError(f"{path}: {other} and {name} are both {split}; rename one of them")
    splits = {split: parts for split, parts in found.items() if "images" in parts}
    if not splits:
        listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise UserError(f"{path}: has the arrays {listed or '(none)'}; {NEEDED}. To rename: "
                        "np.savez(new_path, train_images=old['...'], ...)")
    for parts in splits.values():
        for part in ("patients", "subjects"):
            if part in parts:
                parts.setdefault("groups", parts[part])
        for name in ("groups", "patients", "subjects"):
            if name in names and len(splits) == 1:  # no prefix is needed
                parts.setdefault("groups", name)
    return splits


def is_volumes(images, volume_axis):
    """True if the images [N,A,B,C] of an archive are volumes, each with its own slices."""
    slice_axis, _ = array_axes(images.shape[1:], volume_axis)
    return slice_axis is not None


def _texts(array):
    return [] if array is None else [str(text) for text in array.ravel()]


def _read_split(parts, split, path, volume_axis):
    """Arguments of a Dataset, a dict of images, masks, groups, volume. parts: {part: array}."""
    images, masks, groups = parts["images"], parts.get("masks"), parts.get("groups")
    if images.ndim not in (3, 4) or images.dtype.kind not in "uifb":
        raise UserError(f"{path}: {split}_images has shape {images.shape}, {images.dtype}; needs "
                        "numbers [N,H,W] or [N,H,W,C], or volumes [N,D,H,W]")
    n, volume, position = len(images), parts.get("volume"), parts.get("position_mm")
    if images.ndim == 4:
        slice_axis, channel_axis = array_axes(images.shape[1:], volume_axis)
        if slice_axis is not None:
            images = Slices(images, volume_axis)
            volume = np.repeat(np.arange(n, dtype=np.int32), images.n_slices)
            if masks is not None:
                masks = Slices(masks, slice_axis)
        elif channel_axis == 0:
            images = ChannelsFirst(images)
    if masks is not None and masks.shape[1:3] != images.shape[1:3]:
        raise UserError(f"{path}: {split}_masks has shape {masks.shape}, {split}_images "
                        f"{images.shape}; height and width must agree")
    if masks is None and "boxes" in parts:
        masks = _boxes_by_image(parts["boxes"], images, f"{path}: {split}_boxes")
    if groups is not None:
        if len(groups) not in (n, len(images)):
            raise UserError(f"{path}: {len(groups)} groups for {n} images of {split}; there must "
                            "be one each")
        groups = group_numbers(groups, lambda i: f"{path} {split} {i}")
    if isinstance(images, Slices) or volume is not None and groups is None:
        if groups is None:  # the slices of a volume stay together
            own = np.arange(n) if isinstance(images, Slices) else np.asarray(volume)
            groups = np.array([hash_number(f"{path} {split} {i}") for i in own], np.int64)
        if isinstance(images, Slices) and len(groups) == n:
            groups = groups[volume]
    if isinstance(images, Slices) and position is None:
        position = np.full(len(images), np.nan)  # nothing says how far apart they are
    for name, values in (("volume", volume), ("position_mm", position)):
        if values is not None and np.shape(values) != (len(images),):
            raise UserError(f"{path}: {split}_{name} has shape {np.shape(values)}; needs one "
                            f"number for each of {len(images)} images")
    return dict(images=images, masks=masks, groups=groups, spacing_mm=parts.get("spacing_mm"),
                volume=None if volume is None else np.asarray(volume, np.int32),
                position_mm=None if position is None else np.asarray(position, np.float32))


class Slices(Sendable):
    """The slices of an array of volumes [N,A,B,C] as an array of images: [i] -> [H,W], slice
    i % n_slices of volume i // n_slices. axis: of the slices among A, B, C."""

    def __init__(self, volumes, volume_axis):
        self.volumes, self.axis = volumes, array_axes(volumes.shape[1:], volume_axis)[0]
        sides = list(volumes.shape[1:])
        self.n_slices = sides.pop(self.axis)
        self.shape, self.dtype = (len(volumes) * self.n_slices, *sides), volumes.dtype
        self.num_channels = 1

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, i):
        volume, number = divmod(int(i), self.n_slices)
        return self.volumes[volume].take(number, axis=self.axis)


class ChannelsFirst(Sendable):
    """An array [N,C,H,W] as an array of images [H,W,C]."""

    def __init__(self, array):
        self.array, self.dtype, self.num_channels = array, array.dtype, array.shape[1]
        self.shape = np.moveaxis(array, 1, 3).shape

    def __len__(self):
        return len(self.array)

    def __getitem__(self, i):
        return np.moveaxis(self.array[i], 0, 2)


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


def npz_arrays(path, cache_dir):
    """The folder in the cache with the arrays of an .npz file. A changed file gets a new folder."""
    stat = os.stat(path)
    state = f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"
    name = f"{os.path.basename(path)[:-4]}-{short_hash(state.encode())}"
    return make_folder(os.path.join(cache_dir, name), lambda temporary: _unpack(path, temporary))


def medmnist_arrays(name, size, cache_dir, download_url):
    """The folder in the cache with the arrays of a MedMNIST data set, downloaded if necessary."""
    files = MEDMNIST[name]["files"]
    if str(size) not in files:
        raise UserError(f"dataset_size={size}: {name} exists at {', '.join(files)} pixels")
    file = files[str(size)]
    url, md5 = file["url"], file["md5"]
    file_name = url.split("/")[-1].split("?")[0]
    if download_url:
        url = f"{download_url.rstrip('/')}/{file_name}"

    def fill(temporary):
        archive = os.path.join(cache_dir, file_name)
        if os.path.isfile(archive):  # the user put it there, so it stays
            if (found := _md5(archive)) != md5:
                raise UserError(f"{archive} has MD5 {found}, should be {md5}; remove it, and it is "
                                "downloaded again")
            _unpack(archive, temporary)
            return
        archive = os.path.join(os.path.dirname(temporary), file_name)
        download(url, md5, archive)
        _unpack(archive, temporary)
        os.remove(archive)  # the arrays hold the same, and the archives of size 224 are GBs
    return make_folder(os.path.join(cache_dir, f"{name}_{size}"), fill)


def _md5(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def in_words(n_bytes):
    """A number of bytes as text, like 12.6 GB; 0 = unknown."""
    if n_bytes == 0:
        return "of unknown size"
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"


def download(url, md5, path):
    """Fetch url to path: print the size, write beside it, check length and MD5, rename. A failed
    attempt leaves nothing behind and raises UserError, as a disk without room for it does."""
    folder, title = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    part = part_of(path)
    advice = f"try again, name a mirror with --download_url, or put the file at {path} yourself"
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(part, "wb") as file:
            expected = int(response.headers.get("Content-Length") or 0)
            free = shutil.disk_usage(folder).free
            if 2 * expected > free:  # the archive and its arrays, which are larger
                raise UserError(f"{url}: has {in_words(expected)} and is unpacked to more, but "
                                f"{folder} has {in_words(free)} free; set --cache_dir, or a "
                                "smaller --dataset_size")
            print(f"downloading {title}, {in_words(expected)}, to {folder}. A smaller "
                  "--dataset_size is a smaller file", file=sys.stderr)
            seconds = 0.1 if sys.stderr.isatty() else 30  # between two looks at the time left
            with tqdm(total=expected or None, unit="B", unit_scale=True, desc=title,
                      mininterval=seconds) as bar:
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


def phantom_volume_arrays(cache_dir, size):
    """The folder in the cache with the phantom as volumes: 40, 10 and 10 bodies of 24 slices."""
    def fill(temporary):
        for seed, (split, n_bodies) in enumerate(zip(SPLITS, (40, 10, 10))):
            arrays = phantom.make_phantom_volumes(n_bodies, size, seed)
            save_arrays(temporary, {f"{split}_{key}": array for key, array in arrays.items()})
    return make_folder(os.path.join(cache_dir, f"phantom_volumes-{size}-{code_version()}"), fill)


def code_version():
    """A hash of the phantom's generator: an edited one makes new images."""
    with open(os.path.join(HERE, "phantom.py"), "rb") as file:
        return short_hash(file.read())[:8]


def phantom_arrays(cache_dir, size):
    """The folder in the cache with the phantom's three splits, made if necessary."""
    def fill(temporary):
        n_images = dict(train=2400, val=600, test=600)
        for seed, split in enumerate(SPLITS):  # other seeds, so no image is in two splits
            arrays = phantom.make_phantom(n_images[split], size, seed)
            save_arrays(temporary, {f"{split}_{key}": array for key, array in arrays.items()})

    return make_folder(os.path.join(cache_dir, f"phantom-{size}-{code_version()}"), fill)
