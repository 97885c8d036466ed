"""One image or mask from a file, and many of them behind the interface of an array.

load_image reads one file. ImageFiles, BoxMasks and Rows have len() and [i], as an array has, and
hold file names, boxes or indices instead of pixels. data.py builds its data sets from them.
Pixels keep their dtype and values: uint8, 16-bit, Hounsfield units, float; one to many channels.
"""
import json
import math
import os
import warnings

import numpy as np
from PIL import Image

from configurator import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".npy", ".dcm")
MASK_EXTENSIONS = (".png", ".npy", ".tif", ".tiff", ".bmp", ".jpg")  # the first that exists counts


# ---- one image ----

def load_image(path, num_channels=0, as_mask=False, least_side=0):
    """One image file as an [H,W,C] array in its own dtype.

    Pillow reads png, jpg, bmp and tif; 16-bit grey stays 16-bit. A .npy is taken as it is. DICOM
    comes in the units of its rescale slope and intercept (CT: Hounsfield units, int16).
    Args: num_channels: channels of the data set, 0 = any. 8-bit pictures are converted to 1 or 3 (a
    grey jpg in an RGB folder); every other file must have them. as_mask: the numbers of a palette
    are the mask's values; of several color channels the largest counts. least_side: pixels. A JPEG
    is decoded at 1/2, 1/4 or 1/8 of its size if both sides keep at least this length, which takes a
    fraction of the time; 0 = full size.
    Raises UserError with the file's name if the file cannot be read, has another shape or number of
    channels, or is a decompression bomb (more than Image.MAX_IMAGE_PIXELS pixels).
    """
    try:
        if path.lower().endswith(".npy"):
            image = np.load(path, allow_pickle=False)
        elif path.lower().endswith(".dcm"):
            image = _load_dicom(path)
        else:
            image = _load_picture(path, num_channels, as_mask, least_side)
    except UserError:
        raise
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, bombs
        raise UserError(f"{path}: cannot be read as an image ({type(error).__name__}: {error}); "
                        "mend or remove it, or set --on_bad_image=skip") from None
    image = image[..., None] if image.ndim == 2 else image
    is_picture = image.ndim == 3 and image.dtype.kind in "uif"
    if is_picture and num_channels in (0, image.shape[2]):
        return image
    rule = "needs [height, width, channels] numbers"
    if num_channels:
        rule += (f" with {num_channels} channels as the rest of the data set; set --num_channels=0 "
                 "to take what the first image has")
    raise UserError(f"{path}: shape {image.shape}, {image.dtype}; {rule}")


def _load_picture(path, num_channels, as_mask, least_side):
    """A file that Pillow reads, as [H,W] or [H,W,C]; arguments of load_image."""
    with warnings.catch_warnings():
        # Pillow only warns of a bomb below twice its limit; such an image must not be decoded
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as picture:
            if least_side:
                picture.draft(None, (least_side, least_side))  # JPEG only, others ignore it
            if as_mask and picture.mode in ("1", "L", "P"):
                return np.asarray(picture).astype(np.uint8)
            if as_mask:
                return np.asarray(picture.convert("RGB")).max(axis=2)
            if picture.mode.startswith(("I", "F")):  # 16-bit, 32-bit, float
                return np.asarray(picture)
            is_grey = num_channels == 1 or (num_channels == 0 and picture.mode in ("1", "L"))
            return np.asarray(picture.convert("L" if is_grey else "RGB"))


def _load_dicom(path):
    """The pixels of a DICOM file after its rescale: int16 if they fit, else float32."""
    try:
        import pydicom
    except ImportError:
        raise UserError(f"{path}: reading DICOM needs pydicom; pip install pydicom") from None
    file = pydicom.dcmread(path)
    slope, intercept = getattr(file, "RescaleSlope", 1), getattr(file, "RescaleIntercept", 0)
    image = file.pixel_array * float(slope) + float(intercept)
    if np.abs(image).max() < 2**15:
        return np.rint(image).astype(np.int16)
    return image.astype(np.float32)


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
    """Files below a folder as an array of images: [i] -> [H,W,C], or None if there is no file i."""

    def __init__(self, root, names, num_channels=0, as_mask=False, least_side=0):
        """Args: names: [N] of bytes, relative to root; b"" = there is no file. A list of strings
        works for a few files. A million strings take 100 MB in every worker, because Python counts
        references inside each string that it touches; workers share the pages of an array.
        num_channels, as_mask, least_side: of load_image.
        """
        self.root, self.names = root, names
        self.num_channels, self.as_mask, self.least_side = num_channels, as_mask, least_side

    def __len__(self):
        return len(self.names)

    def path(self, i):
        return os.path.join(self.root, os.fsdecode(self.names[i]))

    def __getitem__(self, i):
        if not self.names[i]:
            return None
        return load_image(self.path(i), self.num_channels, self.as_mask, self.least_side)

    def at_least(self, side):
        """The same files, JPEGs decoded no larger than `side` pixels on both sides require."""
        return ImageFiles(self.root, self.names, self.num_channels, self.as_mask, side)


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
