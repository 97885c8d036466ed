"""One image or mask from a file, and many of them that behave like an array.

Pixels stay what they are: uint8, 16-bit, Hounsfield units, float; one to many channels.
"""
import json
import math
import os
import warnings

import numpy as np
from PIL import Image

from configurator import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".npy", ".dcm")
MASK_EXTENSIONS = (".png", ".npy", ".tif", ".tiff", ".bmp", ".jpg")


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
