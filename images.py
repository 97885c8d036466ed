"""One image or mask from a file, and many of them behind the interface of an array.

load_image reads one image of a file. ImageFiles, BoxMasks and Rows have len() and [i], as an array
has, and hold file names, boxes or indices instead of pixels. data.py makes its data sets of them.
Pixels keep their values: uint8, 16-bit, Hounsfield units, float; one to many channels.
"""
import contextlib
import copy
import importlib.util
import json
import math
import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from configurator import UserError
from dicom import open_dicom
from formats import (ANIMATIONS, TIFF_STARTS, Nifti, check_size, file_kind, needs_tifffile,
                     open_array, open_tiff, turned)
from volumes import open_volume

MASK_EXTENSIONS = (".png", ".npy", ".tif", ".tiff", ".bmp", ".jpg")  # the first that exists counts
MAX_OPEN = 4096  # volumes that a process keeps open
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow


# ---- one image ----

def load_image(path, num_channels=0, as_mask=False, least_side=0, number=0,
               volume_axis=-1, max_image_pixels=0):
    """Image `number` of a file as an [H,W,C] array in native byte order, without NaN or infinity.

    The dtype holds every value: uint8, int8, uint16, int16 or int32, else float32. Pillow reads
    pictures, tifffile those TIFFs that Pillow would change, pydicom DICOM (dicom.open_dicom),
    nibabel NIfTI (formats.Nifti), numpy arrays (formats.array_axes). Alpha is dropped, palettes are
    applied, the EXIF orientation is applied.
    Args: num_channels: channels of the data set, 0 = any. Grey can be read as 3 equal channels, a
    colour picture as grey; every other file must have them. as_mask: the numbers of a palette are
    the mask's values (_color_mask for colours); a mask of fractions 0..1 is cut at 0.5. least_side:
    pixels. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if both sides keep at least this
    length, which takes a fraction of the time; 0 = full size. volume_axis: of array_axes, or of
    Nifti. max_image_pixels: a picture of more pixels is refused before it is decoded; 0 = Pillow's
    Image.MAX_IMAGE_PIXELS.
    Raises UserError with the file's name if the file cannot be read, or has another shape or number
    of channels.
    """
    with opened(path, num_channels, as_mask, least_side, volume_axis, max_image_pixels) as file:
        n, read = file
        if not 0 <= number < n:
            raise UserError(f"{path}: has no image number {number}; it has {n}, counted from 0")
        return finish(path, read(number), num_channels, as_mask)


@contextlib.contextmanager
def opened(path, num_channels=0, as_mask=False, least_side=0,
           volume_axis=-1, max_image_pixels=0):
    """(number of images, read) of a file; read(number) -> array as the file has it.

    Arguments of load_image. Whatever is raised inside the block becomes a UserError.
    """
    try:
        kind = file_kind(path)
        if kind == "dicom":
            yield open_dicom(path, as_mask)
        elif kind == "nifti":
            nifti = Nifti(path, volume_axis)
            yield nifti.n_volumes * len(nifti.positions), nifti.read
        elif kind == "array":
            yield open_array(path, volume_axis, as_mask)[:2]
        else:
            with _open_picture(path, num_channels, as_mask, least_side, max_image_pixels) as file:
                yield file
    except UserError:
        raise
    except BaseException as error:  # decoders raise anything: OSError, SyntaxError, struct.error
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # a panic is what decoders in Rust raise; all others end the program
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # some write several lines
        raise UserError(f"{path}: cannot be read as an image ({reason[:300]}); "
                        f"{_advice(error)}") from None


def _advice(error):
    """What to do about a file that a decoder refuses."""
    text = str(error)
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return "if you trust the file, allow its size with --max_image_pixels"
    if "imagecodecs" in text:
        return "pip install imagecodecs"
    if "not available" in text or "not installed" in text or "not supported" in text:
        return "convert it to another format; there is no decoder for it here"
    return "mend or remove it, or set --on_bad_image=skip"


def finish(path, image, num_channels=0, as_mask=False):
    """What load_image promises of the array that a reader gives for an image, see there."""
    image = tidy(path, image)
    image = image[..., None] if image.ndim == 2 else image
    if image.size == 0:
        raise UserError(f"{path}: shape {image.shape}: no pixels; mend or remove it, or set "
                        "--on_bad_image=skip")
    if image.ndim == 3 and as_mask:
        return _mask_values(path, image)
    if image.ndim == 3 and num_channels not in (0, image.shape[2]):
        if image.shape[2] == 1 and num_channels == 3:
            return np.repeat(image, 3, axis=2)
        if (image.shape[2], num_channels) == (3, 1) and file_kind(path) != "array":
            grey = image @ np.array(GREY_WEIGHTS)
            grey = grey if image.dtype.kind == "f" else np.rint(grey)
            return grey.astype(image.dtype)[..., None]
    if image.ndim == 3 and num_channels in (0, image.shape[2]):
        return image
    rule = "needs [height, width, channels] numbers"
    if num_channels:
        rule += (f" with {num_channels} channels as the rest of the data set; set --num_channels=0 "
                 "to take what most images have")
    raise UserError(f"{path}: shape {image.shape}, {image.dtype}; {rule}")


def tidy(path, image):
    """An array in native byte order, contiguous, writable, of one of the dtypes of load_image.

    bool becomes 0 and 1. Wide integers become int32 if they fit, else float32; other floats become
    float32. Raises UserError for anything that is no number, and for NaN and infinity.
    """
    image = np.asarray(image)
    if image.dtype == bool:
        return image.astype(np.uint8, order="C")
    if image.dtype.kind not in "uif":
        raise UserError(f"{path}: shape {image.shape}, {image.dtype}; needs [height, width, "
                        "channels] numbers")
    dtype = image.dtype.newbyteorder("=")
    if dtype.kind in "ui" and not np.can_cast(dtype, np.int32):
        highest = int(image.max(initial=0))
        lowest = int(image.min(initial=0))
        dtype = np.int32 if max(highest, -lowest) < 2**31 else np.float32
    elif dtype.kind == "f":
        dtype = np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        image = np.array(image, dtype=dtype, order="C")
    if image.dtype.kind == "f" and not (finite := np.isfinite(image)).all():
        raise UserError(f"{path}: {image.size - finite.sum()} of {image.size} values are NaN, "
                        "infinite or beyond float32; replace them (numpy.nan_to_num), or set "
                        "--on_bad_image=skip")
    return image


# ---- pictures ----

@contextlib.contextmanager
def _open_picture(path, num_channels, as_mask, least_side, max_image_pixels):
    """(number of images, read) of a file that Pillow or tifffile reads; arguments of load_image."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and limit < max_image_pixels:
        Image.MAX_IMAGE_PIXELS = max_image_pixels  # Pillow asks before we can; the user allows it
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        is_tiff = file.read(4) in TIFF_STARTS
        file.seek(0)
        picture = None
        if not (is_tiff and needs_tifffile(path)):
            try:  # from a path Pillow maps TIFFs, and gets those wrong that lie on their side
                picture = stack.enter_context(Image.open(file if is_tiff else path))
            except UnidentifiedImageError:
                if not is_tiff:
                    raise
        if picture is None:
            tiff = stack.enter_context(open_tiff(path, as_mask, max_image_pixels))
            yield tiff[:2]
        else:
            yield _frames(path, picture, num_channels, as_mask, least_side, max_image_pixels)


def _frames(path, picture, num_channels, as_mask, least_side, max_image_pixels):
    """(number of images, read) of an open picture; arguments of load_image."""
    check_size(path, picture.size, max_image_pixels)
    n = getattr(picture, "n_frames", 1) if picture.format in ANIMATED else 1
    if n > 1 and not path.lower().endswith(ANIMATIONS):
        raise UserError(f"{path}: an animation of {n} pictures; rename it to .apng if each of "
                        "them is an image, or save one of them")

    def read(number):
        if number:
            picture.seek(number)
        try:
            return _pixels(path, picture, num_channels, as_mask, least_side)
        except OSError:
            if picture.format != "TIFF" or importlib.util.find_spec("tifffile") is None:
                raise
        with open_tiff(path, as_mask, max_image_pixels) as (_, read_tiff, _):
            return read_tiff(number)
    return n, read


ANIMATED = ("APNG", "AVIF", "DCX", "FLI", "GIF", "PNG", "WEBP")  # frames are images
# how Pillow unpacks a PNG of 16 bits -> how it unpacks the low bytes
DEEP_PNG = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L", "LA;16B": "RGBA"}


def _pixels(path, picture, num_channels, as_mask, least_side):
    """The pixels of an open picture, as [H,W] or [H,W,C]."""
    if least_side:
        picture.draft(None, (least_side, least_side))  # JPEG only, others ignore it
    rawmode = picture.tile[0].args if picture.format == "PNG" and picture.tile else ""
    if rawmode in DEEP_PNG:
        image = _deep_png(path, picture, rawmode)
    elif picture.mode.startswith(("I", "F")):  # 16-bit, 32-bit, float
        image = np.asarray(picture)
    elif as_mask and picture.mode in ("1", "L", "P"):  # numbers of a palette
        image = np.asarray(picture)
    elif as_mask:
        image = _color_mask(path, np.asarray(picture.convert("RGBA")), picture.format == "JPEG")
    else:
        is_grey = num_channels == 1 or num_channels == 0 and picture.mode in ("1", "L", "LA", "La")
        # Pillow converts premultiplied grey in two steps
        source = picture.convert("LA") if picture.mode == "La" else picture
        image = np.asarray(source.convert("L" if is_grey else "RGB"))
    if picture.format == "TIFF":  # Pillow has turned it
        bits = picture.tag_v2.get(258)
        return image.astype(np.int16) if picture.mode == "I" and bits == (16,) else image
    orientation = 1
    with contextlib.suppress(Exception):  # damaged EXIF says nothing
        orientation = int(picture.getexif().get(274, 1))
    return turned(image, orientation)


def _deep_png(path, picture, rawmode):
    """A PNG of 16 bits and several channels, [H,W,1 or 3] uint16; alpha is dropped.

    Pillow keeps the high byte of each number. A second pass that takes the bytes for little-endian
    keeps the low byte. Grey with alpha has four bytes a pixel, which one pass reads as RGBA.
    """
    with Image.open(path) as second:
        second.tile = [tile._replace(args=DEEP_PNG[rawmode]) for tile in second.tile]
        low = np.asarray(second)
    if rawmode == "LA;16B":
        high, low = low[..., :1], low[..., 1:2]
    else:
        high, low = np.asarray(picture)[..., :3], low[..., :3]
    return high.astype(np.uint16) * 256 + low


# ---- masks ----

def _color_mask(path, image, is_lossy):
    """A mask drawn in colours, [H,W,4] uint8, as numbers [H,W]: the largest channel; the alpha if
    that alone varies. Raises UserError if that would give two colours the same number."""
    colors = image[..., :3].reshape(-1, 3)
    alpha = image[..., 3]
    is_constant = (colors == colors[:1]).all()
    if is_constant and (alpha != alpha[:1, :1]).any():
        return alpha
    largest = image[..., :3].max(axis=2)
    is_grey = (colors == colors[:, :1]).all()
    if is_lossy or is_grey or (colors > 0).any(axis=0).sum() == 1:  # or one pure colour
        return largest
    found = np.unique(colors, axis=0)
    if len(np.unique(found.max(axis=1))) < len(found):
        shown = ", ".join(map(str, found[:4].tolist()))
        raise UserError(f"{path}: a mask of {len(found)} colours ({shown}), which are no numbers; "
                        "save it as grey or with a palette, a number for each class")
    return largest


def _mask_values(path, image):
    """A mask [H,W,C] as whole numbers: uint8 if they fit, else int32."""
    if image.dtype.kind == "f":
        whole = np.rint(image)
        if not (whole == image).all():
            if image.min() < 0 or image.max() > 1:
                raise UserError(f"{path}: a mask with fractions from {image.min()} to "
                                f"{image.max()}; needs whole numbers, or shares from 0 to 1")
            whole = image >= 0.5
        image = whole
    fits = image.size == 0 or 0 <= image.min() <= image.max() < 256
    return image.astype(np.uint8 if fits else np.int32)


# ---- many images ----

class Sendable:
    """Can be sent to spawned workers. Pickle would copy the content of a memory map, so the name of
    its file is sent instead, and the worker maps the file again."""

    def __getstate__(self):
        state = dict(self.__dict__)
        for key, value in state.items():
            if isinstance(value, np.memmap):
                state[key] = ("mapped", value.filename)
        return state

    def __setstate__(self, state):
        for key, value in state.items():
            if isinstance(value, tuple) and value[:1] == ("mapped",):
                value = np.load(value[1], mmap_mode="r")
            self.__dict__[key] = value


class ImageFiles(Sendable):
    """Images of files below a folder as an array: [i] -> [H,W,C], or None if there is no file i."""

    def __init__(self, root, names, num_channels=0, as_mask=False, least_side=0, numbers=None,
                 volumes=None, cache_dir="", volume_axis=-1, max_image_pixels=0):
        """Args: names: [N] of bytes, relative to root; b"" = there is no file. A list of strings
        works for a few files. A million strings take 100 MB in every worker, because Python counts
        references inside each string that it touches; workers share the pages of an array.
        numbers: [N] int, the image in its file; None = all 0. volumes: [N] int, the volume of an
        image (volumes.Listing), -1 = none; images of a volume that has several are decoded once
        into cache_dir, by the process that asks for one first. The rest: of load_image.
        """
        self.root, self.names, self.numbers, self.volumes = root, names, numbers, volumes
        self.num_channels, self.as_mask, self.least_side = num_channels, as_mask, least_side
        self.cache_dir, self.volume_axis = cache_dir, volume_axis
        self.max_image_pixels = max_image_pixels
        self._open = {}  # volume -> (its images, read or None); each process opens its own

    def __getstate__(self):
        return {**super().__getstate__(), "_open": {}}

    def __len__(self):
        return len(self.names)

    def path(self, i):
        return os.path.join(self.root, os.fsdecode(self.names[i]))

    def number(self, i):
        """The number of image i in its file."""
        return 0 if self.numbers is None else int(self.numbers[i])

    def __getitem__(self, i):
        if not self.names[i]:
            return None
        path = self.path(i)
        if self.volumes is not None and self.cache_dir and self.volumes[i] >= 0:
            images, read = self._volume(int(self.volumes[i]))
            if read is not None:
                image = read(int(np.searchsorted(images, i)))
                return finish(path, image, self.num_channels, self.as_mask)
        return load_image(path, self.num_channels, self.as_mask, self.least_side, self.number(i),
                          self.volume_axis, self.max_image_pixels)

    def _volume(self, volume):
        """(indices of its images, read) of a volume; read is None if images are read one by one."""
        if volume not in self._open:
            images, read = np.flatnonzero(self.volumes == volume), None
            images = images[[bool(self.names[i]) for i in images]]  # not all have a mask
            if len(images) > 1:
                paths = [self.path(i) for i in images]
                numbers = [self.number(i) for i in images]
                options = dict(as_mask=self.as_mask, volume_axis=self.volume_axis,
                               max_image_pixels=self.max_image_pixels)
                read = open_volume(paths, numbers, self.cache_dir, opened, tidy, options)
            self._open[volume] = images, read
            if len(self._open) > MAX_OPEN:  # Linux allows 65 530 maps a process
                self._open.pop(next(iter(self._open)))
        return self._open[volume]

    def at_least(self, side):
        """The same files, JPEGs decoded no larger than `side` pixels on both sides require."""
        files = copy.copy(self)
        files.least_side = side
        return files


class Rows(Sendable):
    """Some images of an array or of ImageFiles, without a copy: [i] -> items[indices[i]]."""

    def __init__(self, items, indices, num_channels=0):
        self.items, self.indices, self.num_channels = items, indices, num_channels

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return self.items[self.indices[i]]

    def at_least(self, side):
        return Rows(at_least(self.items, side), self.indices, self.num_channels)


def at_least(images, side):
    """The images of a Dataset for a use that needs `side` pixels on both sides. JPEG files are
    decoded no larger than that requires; arrays are returned as they are."""
    return images.at_least(side) if hasattr(images, "at_least") else images


# ---- boxes as masks ----

class BoxMasks(Sendable):
    """Boxes as an array of masks: [i] -> [H,W] uint8, 0 outside of the boxes; None if the image has
    no entry. A mask is drawn when it is asked for.

    A box is (left, top, right, bottom) in pixels; right and bottom are exclusive, fractions are
    rounded outwards. A fifth number is the mask's value inside the box, 1 to 255 (default 1).
    """

    def __init__(self, boxes, images, source):
        """Args: boxes: for each image a list of boxes, or None; images: of the same length;
        source: where the boxes come from, to name in errors. Raises UserError if a box is wrong."""
        self.boxes, self.images, self.source = boxes, images, source
        for i, boxes_of_image in enumerate(boxes):
            for box in boxes_of_image or ():
                if not _is_box(box):
                    raise UserError(
                        f"{source}: image {i} has the box {box}; needs [left, top, right, bottom] "
                        "in pixels, left < right, top < bottom, and may have a mask value from 1 "
                        "to 255 behind")

    def __len__(self):
        return len(self.boxes)

    def __getitem__(self, i):
        if self.boxes[i] is None:
            return None
        height, width = self.images[i].shape[:2]
        mask = np.zeros((height, width), np.uint8)
        for left, top, right, bottom, *value in self.boxes[i]:
            inside = mask[_covered(top, bottom), _covered(left, right)]
            if inside.size == 0:
                raise UserError(
                    f"{self.source}: image {i}, {width} pixels wide and {height} high, has a box "
                    f"outside of it, {[left, top, right, bottom]}: left, top, right, bottom")
            inside[:] = int(value[0]) if value else 1
        return mask


def _covered(start, end):
    """The slice of all pixels along one axis that lie at least partly between start and end."""
    first = max(0, math.floor(start))
    return slice(first, max(0, math.ceil(end)))


def _is_box(box):
    """True for [left, top, right, bottom], and for these four and a mask value behind them."""
    if not isinstance(box, (list, tuple)) or len(box) not in (4, 5):
        return False
    if not all(type(number) in (int, float) for number in box):  # True is an int, but no number
        return False
    left, top, right, bottom, *value = box
    if value and not 1 <= value[0] < 256:
        return False
    return left < right and top < bottom


def read_boxes(path, files, images):
    """BoxMasks from a json file {"a.jpg": [[left, top, right, bottom], ...], ...}.

    An empty list says that the image shows nothing to label. A name that is missing says that
    nobody has labelled the image.
    Args: files: [N], the names of images [N] below their folder.
    Raises UserError if the file is not such json, or has a name that is not in files.
    """
    try:
        with open(path) as file:
            boxes = json.load(file)
    except ValueError as error:
        raise UserError(f"{path}: not json ({error})") from None
    is_dict = isinstance(boxes, dict)
    if not is_dict or not all(isinstance(value, list) for value in boxes.values()):
        raise UserError(f'{path}: needs {{"image name": [[left, top, right, bottom], ...], ...}}')
    names = [file.replace(os.sep, "/") for file in files]
    if unknown := sorted(set(boxes) - set(names)):
        raise UserError(f"{path}: there is no image {unknown[0]!r}; names are as in the folder, "
                        f"like {files[0]!r}")
    return BoxMasks([boxes.get(name) for name in names], images, path)
