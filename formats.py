"""Files that may hold several images: arrays, TIFF, NIfTI. file_kind says who reads a file.

Libraries are imported where they are used. dicom.py reads DICOM, images.py all other pictures.
"""
import contextlib
import functools
import os
import struct

import numpy as np
from PIL import Image, TiffImagePlugin

import dicom
from configurator import UserError

DICOM_ENDINGS = (".dcm", ".ima", ".dicom", ".dcm30")
NIFTI_ENDINGS = (".nii", ".nii.gz")
ANIMATIONS = (".gif", ".apng", ".webp", ".avif", ".avifs", ".dcx", ".fli", ".flc")
INSTALL_TIFF = "pip install tifffile imagecodecs"
INSTALL_NIFTI = "pip install nibabel"
# Formats whose files Pillow knows, but reads only with another program, or not at all
NO_IMAGES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
IMAGE_KEYS = ("image", "images", "img", "imgs", "volume", "data", "arr_0")  # of an .npz of one case
MASK_KEYS = ("mask", "masks", "label", "labels", "seg", "gt", "gts")
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SLICE_PLANES = ("sagittal", "coronal", "axial")


def _extensions():
    """All endings that list_images reads: those that Pillow opens, arrays, DICOM, NIfTI."""
    pictures = Image.registered_extensions().items()
    readable = {ending for ending, name in pictures if name in Image.OPEN and name not in NO_IMAGES}
    arrays = {".npy", ".npz"}
    return tuple(sorted(readable | arrays | set(DICOM_ENDINGS) | set(NIFTI_ENDINGS)))


EXTENSIONS = _extensions()


def file_kind(path):
    """'picture', 'array', 'dicom', 'nifti', or '' for any other file: by its ending, or by its
    first bytes if the ending is none of EXTENSIONS."""
    name = os.path.basename(path).lower()
    if name.endswith(DICOM_ENDINGS):
        return "dicom"
    if name.endswith(NIFTI_ENDINGS):
        return "nifti"
    if name.endswith((".npy", ".npz")):
        return "array"
    if name.endswith(EXTENSIONS):
        return "picture"
    try:
        with open(path, "rb") as file:
            start = file.read(352)
    except OSError:
        return ""
    if start[128:132] == b"DICM":
        return "dicom"
    magics = (start[344:348], start[4:8])  # of NIfTI-1, of NIfTI-2
    is_nifti = magics[0] in (b"n+1\0", b"ni1\0") or magics[1] in (b"n+2\0", b"ni2\0")
    return "nifti" if is_nifti else ""


def check_size(path, size, max_image_pixels=0):
    """Raises UserError if a picture of size (width, height) has more pixels than are allowed."""
    limit, n = max_image_pixels or Image.MAX_IMAGE_PIXELS, size[0] * size[1]
    if limit and n > limit:
        raise UserError(f"{path}: cannot be read as an image (DecompressionBomb: {n} pixels, "
                        f"allowed are {limit}); if you trust the file, set --max_image_pixels={n}")


# ---- arrays ----

def array_axes(shape, volume_axis=-1):
    """(axis of the slices or None, axis of the channels or None) of an array of two to four axes.

    volume_axis 0, 1, 2: slices lie along this axis; the last of four axes is channels. 3: there are
    no slices, the last axis is channels. -1: by the shape of an array of three axes:
      the last axis is at most 4, or at most 16 and shorter than the others: channels;
      the first axis is at most 4 and the others are longer than 8: channels, too, moved last;
      two axes have the same length, the third another: slices lie along the third;
      else slices lie along the first axis.
    Raises ValueError for any other array.
    """
    if len(shape) == 2:
        return None, None
    if len(shape) == 4 and 0 <= volume_axis <= 2 and shape[3] <= 16:
        return volume_axis, 3
    if len(shape) != 3:
        raise ValueError(f"{len(shape)} axes")
    first, second, last = shape
    if volume_axis >= 0:
        return (None, 2) if volume_axis == 3 else (volume_axis, None)
    if last <= 4 or (last <= 16 and last < min(first, second)):
        return None, 2
    if first <= 4 and min(second, last) > 8:
        return None, 0
    if first == second != last:
        return 2, None
    if first == last != second:
        return 1, None
    return 0, None


def axes_in_words(axes):
    """The decision of array_axes, for the log."""
    slices, channels = axes
    if slices is not None:
        return f"slices lie along axis {slices}"
    return f"one image, axis {channels} is its channels"


def open_array(path, volume_axis=-1, as_mask=False, is_mapped=False):
    """(number of images, read, shape) of a .npy, or of an .npz of one case; a .npy of more than a
    megabyte is mapped, with is_mapped any."""
    is_mapped = is_mapped or os.path.getsize(path) > 2**20  # small files are faster read
    array = np.load(path, mmap_mode="r" if is_mapped else None, allow_pickle=False)
    if isinstance(array, np.lib.npyio.NpzFile):
        with array:
            array = array[_key_of_case(path, array.files, as_mask)]
    try:
        slices, channels = array_axes(array.shape, volume_axis)
    except ValueError:
        raise UserError(f"{path}: shape {array.shape}, {array.dtype}; needs [height, width, "
                        "channels] numbers or [slices, height, width]; for [slices, height, width, "
                        "channels] set --volume_axis=0") from None
    shape = array.shape
    if channels == 0:
        array = np.moveaxis(array, 0, -1)
    images = array[None] if slices is None else np.moveaxis(array, slices, 0)
    return len(images), images.__getitem__, shape


def _key_of_case(path, keys, as_mask):
    """The member of an .npz that is the image, or the mask."""
    wanted = MASK_KEYS if as_mask else IMAGE_KEYS
    for key in wanted:
        if key in keys:
            return key
    if len(keys) == 1:
        return keys[0]
    raise UserError(f"{path}: has {', '.join(keys)}; an .npz of one case needs one array, or one "
                    f"named {wanted[0]!r}")


# ---- TIFF ----

def needs_tifffile(path):
    """True if Pillow cannot read a TIFF, or would change it: several pages or bands, more than 8
    bits in colour, signed 8-bit, unsigned 32-bit, white-is-zero above 8 bits."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if start[2] == 43:  # BigTIFF
                start += file.read(8)
            tags = TiffImagePlugin.ImageFileDirectory_v2(start)
            file.seek(tags.next)
            tags.load(file)
            text = str(tags.get(270, ""))
    except (struct.error, SyntaxError, ValueError, TypeError, KeyError):  # big-endian BigTIFF
        return True
    bits = max(tags.get(258, (1,)))
    sample_format = max(tags.get(339, (1,)))
    is_stack = text.startswith("ImageJ=") and "images=" in text or "truncated" in text
    bands = set(tags.get(338, ())) - {1, 2}  # extra samples that are no alpha
    if tags.next or is_stack or bands or tags.get(262) == 0 and bits > 8:
        return True
    if tags.get(277, 1) > 1:
        return bits > 8 or sample_format != 1
    if sample_format == 1:  # unsigned
        return bits not in (1, 2, 4, 8, 16)
    return bits not in ((16, 32) if sample_format == 2 else (32,))  # signed, float


@contextlib.contextmanager
def open_tiff(path, as_mask=False, max_image_pixels=0):
    """(number of images, read, axes) of a TIFF; read(number) -> [H,W] or [H,W,C].

    The axes that OME, ImageJ or the pages say: C and S are channels, all others (Z, T, pages) are
    images. Thumbnails, levels of pyramids and mask pages are left out. Alpha is dropped. White-is-
    zero is inverted, palettes are applied, but not to masks. The orientation tag is applied.
    """
    try:
        import tifffile
    except ImportError:
        raise UserError(f"{path}: this kind of TIFF needs tifffile; {INSTALL_TIFF}") from None
    with tifffile.TiffFile(path, _multifile=False) as file:  # the others are in the list, too
        whole = [part for part in file.series
                 if not (part.keyframe.is_reduced or part.keyframe.is_mask)]
        for part in whole or file.series:
            page = part.keyframe
            check_size(path, (page.imagewidth, page.imagelength), max_image_pixels)
        parts = [_tiff_series(part, as_mask) for part in whole or file.series]
        axes = " and ".join(sorted({part.axes for part in whole or file.series}))

        def read(number):
            for n, read_part in parts:
                if number < n:
                    return read_part(number)
                number -= n
        yield sum(n for n, _ in parts), read, axes


def _tiff_series(series, as_mask):
    """(number of images, read) of pages of the same kind."""
    page, axes = series.keyframe, series.axes
    lengths = dict(zip(axes, series.shape))
    order = [axis for axis in axes if axis not in "YXCS"]
    kept = [axis for axis in axes if axis in "YXCS"]
    target = ["Y", "X", *(axis for axis in kept if axis in "CS")]
    steps = [lengths[axis] for axis in order]
    n = int(np.prod(steps, dtype=int))
    has_own_page = axes == "".join(order) + page.axes and len(series.pages) == n

    @functools.cache
    def stack():
        return series.asarray()

    def read(number):
        if has_own_page:
            image = series.pages[number].asarray()
        else:
            at = dict(zip(order, np.unravel_index(number, steps)))
            image = stack()[tuple(at.get(axis, slice(None)) for axis in axes)]
        image = image.transpose([kept.index(axis) for axis in target])
        return _tiff_meaning(page, image.reshape(*image.shape[:2], -1), as_mask)
    return n, read


def _tiff_meaning(page, image, as_mask):
    """Palette, white-is-zero, alpha and orientation of a page, applied to [H,W,C]."""
    photometric = int(page.photometric)
    bits = min(page.bitspersample, 32)
    if photometric == 0 and image.dtype.kind in "bu" and not as_mask:  # white is zero
        image = np.array(2**bits - 1, image.dtype) ^ image
    if bits < 8 and photometric != 3 and not as_mask:  # as Pillow: 0 to 255
        scale = 255 / (2**bits - 1)
        image = np.rint(image * scale).astype(np.uint8)
    if photometric == 3 and page.colormap is not None and not as_mask:
        colors = page.colormap.T  # [c,3], 8-bit values are multiples of 257
        if (colors % 257 == 0).all():
            colors = (colors // 257).astype(np.uint8)
        image = colors[image[..., 0]]
    extra = [int(sample) for sample in page.extrasamples]
    if 1 in extra or 2 in extra:
        kinds = [0] * (page.samplesperpixel - len(extra)) + extra
        image = image[..., ~np.isin(kinds, (1, 2))]
    if photometric == 5 and image.shape[2] == 4 and image.dtype.kind == "u":  # CMYK
        most, dtype = 2.0**bits - 1, image.dtype
        light = (most - image) / most
        image = light[..., :3] * light[..., 3:] * most
        image = np.rint(image).astype(dtype)
    orientation = page.tags.get(274)
    return turned(image, int(orientation.value) if orientation else 1)


def turned(image, orientation):
    """An image [H,W] or [H,W,C] as its EXIF orientation, 1 to 8, says that it is shown."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return image[rows, columns]


# ---- NIfTI ----

class Nifti:
    """An open NIfTI file: n_volumes, spacing [3] (slice, row, column) and positions [n] of the
    slices in mm, plane ('axial', ...), is_contiguous (a slice is one piece of the file).

    Slices lie along volume_axis (0 sagittal, 1 coronal, 2 axial), or, for -1, along the axis whose
    spacing is a tenth thicker than both others, else they are axial.
    """

    def __init__(self, path, volume_axis=-1):
        try:
            import nibabel
        except ImportError:
            raise UserError(f"{path}: reading NIfTI needs nibabel; {INSTALL_NIFTI}") from None
        name = os.path.basename(path).lower()
        has_ending = name.endswith((*NIFTI_ENDINGS, ".hdr"))
        self.file = nibabel.load(path) if has_ending else _unnamed_nifti(path)
        orientations, shape = nibabel.orientations, [*self.file.shape, 1, 1][:3]
        lps = orientations.axcodes2ornt("LPS")
        self.to_lps = orientations.ornt_transform(nibabel.io_orientation(self.file.affine), lps)
        affine = self.file.affine @ orientations.inv_ornt_aff(self.to_lps, shape)
        spacing = nibabel.affines.voxel_sizes(affine)
        lengths = [0, 0, 0]
        for length, axis in zip(shape, self.to_lps[:, 0].astype(int)):
            lengths[axis] = length
        thickest = int(np.argmax(spacing))
        others = np.delete(spacing, thickest)
        if volume_axis in (0, 1, 2):
            axis = volume_axis
        else:
            is_thick = spacing[thickest] > 1.1 * others.max() and lengths[thickest] > 1
            axis = thickest if is_thick else 2
        self.axis, self.plane = axis, SLICE_PLANES[axis]
        first = affine[:3, 3] @ affine[:3, axis] / spacing[axis]
        self.positions = first + np.arange(lengths[axis]) * spacing[axis]
        if axis == 0:  # to the right
            self.positions = -self.positions[::-1]
        rows = 1 if axis == 2 else 2
        columns = 1 if axis == 0 else 0
        self.sides = (lengths[rows], lengths[columns])
        self.spacing = spacing[[axis, rows, columns]]
        self.n_volumes = int(np.prod(self.file.shape[3:], dtype=int))
        self.is_contiguous = not name.endswith(".gz") and int(self.to_lps[2, 0]) == axis

    @functools.cached_property
    def voxels(self):
        """[L,P,S,T] as stored; axes run to the patient's left, back and head; mapped unless
        compressed."""
        from nibabel import orientations
        shape = [*self.file.shape, 1, 1][:3]
        stored = self.file.dataobj.get_unscaled().reshape(*shape, -1, order="F")
        return orientations.apply_orientation(stored, self.to_lps)

    def read(self, number):
        """Image `number` [row, column]: slice number % n of volume number // n.

        Images lie as in a DICOM series, and slices follow each other along row times column:
          axial     front above, the patient's left on the right; slices go to the head
          coronal   head above, the patient's left on the right; slices go to the back
          sagittal  head above, front on the left; slices go to the patient's right
        """
        volume, k = divmod(number, len(self.positions))
        voxels = self.voxels[..., volume]
        if self.axis == 2:
            image = voxels[:, :, k].T
        elif self.axis == 1:
            image = voxels[:, k].T[::-1]
        else:
            image = voxels[-1 - k].T[::-1]
        if colors := image.dtype.names:  # RGB as three fields
            return np.stack([image[name] for name in colors[:3]], axis=-1)
        slope, inter = self.file.dataobj.slope, self.file.dataobj.inter
        if (slope, inter) == (1, 0):
            return image
        return dicom.narrow(image.astype(np.float64) * slope + inter)


def _unnamed_nifti(path):
    """A NIfTI file whose name does not say so."""
    import nibabel
    with open(path, "rb") as file:
        is_first = file.read(4) in (b"\x5c\x01\0\0", b"\0\0\x01\x5c")
    kind = nibabel.Nifti1Image if is_first else nibabel.Nifti2Image
    return kind.from_file_map(dict(image=nibabel.FileHolder(path)))
