"""DICOM files: their frames as pixels that mean something, and what their headers say.

open_dicom reads the pixels of a file, read_header what volumes.py sorts series by. Needs pydicom;
compressed files need the plugins of PLUGINS.
"""
import collections
import functools
import hashlib
import os
import re
import struct
import sys

import numpy as np

from configurator import UserError

AIR_HU = -1000  # what a CT slice gets that is nothing but padding
INSTALL = "pip install pydicom"
PLUGINS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def _pydicom(path):
    try:
        import pydicom
    except ImportError:
        raise UserError(f"{path}: reading DICOM needs pydicom; {INSTALL}") from None
    return pydicom


def _parse(path, file, **options):
    """pydicom's Dataset of an open file. Old scanners write no preamble and no meta information:
    such a file is DICOM if its first elements are. Raises UserError if they are not."""
    pydicom = _pydicom(path)
    try:
        return pydicom.dcmread(file, **options)
    except pydicom.errors.InvalidDicomError:
        file.seek(0)
    with_pixels = pydicom.dcmread(file, force=True, **options)
    if not any(key in with_pixels for key in ("SOPClassUID", "Rows", "SeriesInstanceUID")):
        raise UserError(f"{path}: no DICOM file; mend or remove it, or set --on_bad_image=skip")
    if "TransferSyntaxUID" not in with_pixels.file_meta:
        is_implicit, is_little = with_pixels.original_encoding
        syntax = pydicom.uid.ExplicitVRLittleEndian
        if is_implicit:
            syntax = pydicom.uid.ImplicitVRLittleEndian
        elif not is_little:
            syntax = pydicom.uid.ExplicitVRBigEndian
        with_pixels.file_meta.TransferSyntaxUID = syntax
    return with_pixels


# ---- pixels ----

def open_dicom(path, as_mask=False):
    """(number of frames, read) of a DICOM file; read(frame) -> [H,W] or [H,W,3].

    Grey pixels come in the units of the file: Modality LUT, or rescale slope and intercept (CT:
    Hounsfield units), or dose grid scaling, those of the frame's functional group first. They are
    int16 if all of them are whole and fit, else float32; 8 bits without a rescale stay uint8.
    MONOCHROME1 is inverted within its stored bits. Padding (PixelPaddingValue to
    PixelPaddingRangeLimit) becomes the lowest real value of its frame: it is no intensity. Colour
    comes as RGB, palettes are applied. The window (VOI LUT) is not applied. as_mask: the stored
    numbers.
    Raises UserError: what is missing, what to install; and whatever pydicom raises.
    """
    with open(path, "rb") as opened:
        file = _parse(path, opened)
    if not any(key in file for key in PIXELS):
        raise UserError(f"{path}: a DICOM file without pixels (Modality "
                        f"{file.get('Modality') or 'unknown'}); remove it, or set "
                        "--on_bad_image=skip")

    def read(number):
        stored = _decode(path, file, number)
        photometric = file.get("PhotometricInterpretation", "")
        if as_mask:
            return stored
        if photometric == "PALETTE COLOR":
            return _palette(file, stored)
        if stored.ndim == 3:
            return stored
        return _meaning(file, stored, number, photometric == "MONOCHROME1")
    return _count(file.get("NumberOfFrames")), read


def _count(value):
    return max(1, int(value or 1))


def _decode(path, file, number):
    """The stored pixels of a frame, [H,W] or [H,W,3]."""
    pixels = _pydicom(path).pixels
    syntax = file.file_meta.get("TransferSyntaxUID")
    if syntax is not None and syntax.is_compressed:
        try:
            missing = not pixels.get_decoder(syntax).is_available
        except NotImplementedError:
            raise UserError(f"{path}: pixels are compressed as {syntax.name}, which pydicom cannot "
                            "decode; convert the file, for example to JPEG 2000") from None
        if missing:
            raise UserError(f"{path}: pixels are compressed as {syntax.name}; {PLUGINS}")
    stored = pixels.pixel_array(file, index=number)
    if stored.dtype.kind in "iu" and file.BitsAllocated == 1:
        return stored.astype(np.uint8)
    return stored


def _palette(file, stored):
    """Palette numbers [H,W] as RGB [H,W,3]: uint8 if the palette has 8 bits, though it writes them
    as the high byte, or both bytes, of 16."""
    from pydicom.pixels import apply_color_lut
    image = apply_color_lut(stored, file)[..., :3]
    if image.dtype == np.uint8:
        return image
    n, first, _ = file.RedPaletteColorLookupTableDescriptor
    numbers = first + np.arange(n or 2**16)
    palette = apply_color_lut(numbers.astype(stored.dtype)[None], file)[..., :3]
    low, high = palette % 256, palette // 256
    is_narrow = not low.any() or (low == high).all()
    return (image // 256).astype(np.uint8) if is_narrow else image


def _meaning(file, stored, number, is_inverted):
    """Stored grey pixels [H,W] in the units of the file, as open_dicom says."""
    frame = _groups_of_frame(file, number)
    slope, intercept = _rescale(file, frame)
    is_padding = _padding(file, stored)
    is_float = stored.dtype.kind == "f"
    low, high = 0, 0
    if is_inverted and not is_float:
        low, high = _stored_range(file)
    if file.get("ModalityLUTSequence"):
        from pydicom.pixels import apply_modality_lut
        image = apply_modality_lut(stored, file)
        if is_inverted:
            image = 2 ** _lut_bits(file) - 1 - image.astype(np.int64)
    elif (slope, intercept) == (1, 0):
        image = stored
        if is_inverted and not is_float:
            image = (low + high - stored.astype(np.int64)).astype(stored.dtype)
    else:
        image = stored.astype(np.float64)
        if is_inverted and not is_float:
            image = low + high - image
        image = image * slope + intercept
    if is_padding is not None and is_padding.any():
        real = image[~is_padding]
        empty = AIR_HU if file.get("Modality") == "CT" else 0
        image = np.where(is_padding, real.min() if real.size else empty, image)
    return narrow(image) if image.dtype != np.uint8 else image


def narrow(image):
    """int16 if every pixel is whole and fits, else float32."""
    low, high = image.min(initial=0), image.max(initial=0)
    if low >= -2**15 and high < 2**15:
        whole = image.astype(np.int16)
        if image.dtype.kind in "iu" or (whole == image).all():
            return whole
    return image.astype(np.float32)


def _stored_range(file):
    """(lowest, highest) number that the stored bits can hold."""
    bits = int(file.get("BitsStored") or file.BitsAllocated)
    if file.get("PixelRepresentation"):
        return -2 ** (bits - 1), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def _lut_bits(file):
    return int(file.ModalityLUTSequence[0].LUTDescriptor[2])


def _groups_of_frame(file, number):
    """The functional groups of a frame of an enhanced file: a list, the frame's own first."""
    groups = []
    if frames := file.get("PerFrameFunctionalGroupsSequence"):
        groups.append(frames[min(number, len(frames) - 1)])
    if shared := file.get("SharedFunctionalGroupsSequence"):
        groups.append(shared[0])
    return groups


def _from_groups(groups, sequence, key):
    """The value of key in a functional group `sequence`; None if no group has it."""
    for group in groups:
        items = group.get(sequence)
        if items and items[0].get(key) is not None:
            return items[0].get(key)
    return None


def _rescale(file, groups):
    """(slope, intercept) of a frame; an empty or missing one is 1 or 0."""
    sequence = "PixelValueTransformationSequence"
    slope = _from_groups(groups, sequence, "RescaleSlope")
    intercept = _from_groups(groups, sequence, "RescaleIntercept")
    if slope is None:
        slope = file.get("RescaleSlope", file.get("DoseGridScaling"))
    if intercept is None:
        intercept = file.get("RescaleIntercept")
    return _number(slope) or 1.0, _number(intercept) or 0.0


def _number(value):
    """A number of a header as float; None if it is empty or missing."""
    return None if value is None or str(value).strip() == "" else float(value)


def _padding(file, stored):
    """Which stored pixels are padding, bool as `stored`; None if the file names no such value."""
    value = file.get("PixelPaddingValue", file.get("FloatPixelPaddingValue"))
    value = file.get("DoubleFloatPixelPaddingValue") if value is None else value
    if _number(value) is None:
        return None
    limit = file.get("PixelPaddingRangeLimit", file.get("FloatPixelPaddingRangeLimit"))
    limit = value if _number(limit) is None else limit
    ends = [float(value), float(limit)]
    if file.get("PixelRepresentation") and stored.dtype.kind == "i":  # -2000 is written as 63536
        bits = int(file.BitsAllocated)
        ends = [end - 2**bits if end >= 2 ** (bits - 1) else end for end in ends]
    if np.isnan(ends[0]):
        return np.isnan(stored)
    return (stored >= min(ends)) & (stored <= max(ends))


# ---- headers ----

HEADER = {  # all that is read of a header, by keyword
    0x00080008: "ImageType", 0x00080016: "SOPClassUID", 0x00080018: "SOPInstanceUID",
    0x00080060: "Modality", 0x0008103E: "SeriesDescription", 0x00100020: "PatientID",
    0x00180050: "SliceThickness", 0x00180088: "SpacingBetweenSlices",
    0x00181164: "ImagerPixelSpacing", 0x0020000E: "SeriesInstanceUID",
    0x00200013: "InstanceNumber", 0x00200032: "ImagePositionPatient",
    0x00200037: "ImageOrientationPatient", 0x00280008: "NumberOfFrames", 0x00280010: "Rows",
    0x00280011: "Columns", 0x00280030: "PixelSpacing", 0x3004000C: "GridFrameOffsetVector"}
GROUPS = {0x52009229: "SharedFunctionalGroupsSequence",
          0x52009230: "PerFrameFunctionalGroupsSequence"}
FIRST_PIXELS, ITEM_END, SEQUENCE_END, UNDEFINED = 0x7FE00008, 0xFFFEE00D, 0xFFFEE0DD, 0xFFFFFFFF
ELEMENT = struct.Struct("<HHI")
LONG_VRS = set(b"OB OW OF OD OL OV SQ UC UN UR UT SV UV".split())  # their length has 4 bytes
# implicit, explicit, encapsulated, RLE; not big endian, not deflated
LITTLE_ENDIAN = re.compile(r"1\.2\.840\.10008\.1\.2(\.1|\.4\.\d+|\.5)?")


# frames: for each frame (position [3] mm or None, orientation [6] or None, spacing [3] mm: slice,
# row, column, NaN = unknown); group: hash of the PatientID, '' = none; number: of the instance
Header = collections.namedtuple("Header", "kind series instance description group number "
                                          "is_localizer has_pixels sides frames")


def read_header(path):
    """What sorts a DICOM file, without its pixels: Header.

    kind is the modality, or 'DICOMDIR'; description that of the series in lower case; series and
    instance are UIDs. Raises UserError, or what pydicom raises.
    """
    values, file, has_pixels = _quick_header(path) or _full_header(path)
    kind = values.get("Modality") or "unknown"
    if values.get("SOPClassUID", "").endswith("1.3.10"):
        kind = "DICOMDIR"
    sides = tuple(int(values.get(key) or 0) for key in ("Rows", "Columns"))
    n_frames = _count(values.get("NumberOfFrames"))
    if n_frames > os.path.getsize(path):
        raise UserError(f"{path}: says that it has {n_frames} frames, which it cannot hold; mend "
                        "or remove it, or set --on_bad_image=skip")
    shared = (kind, values.get("SeriesInstanceUID") or path,
              values.get("SeriesDescription", "").lower(), hash_patient(values.get("PatientID")))
    kind, series, description, group = map(sys.intern, shared)  # 300 000 slices share them
    return Header(
        kind, series, values.get("SOPInstanceUID") or path, description, group,
        number=int(float(values.get("InstanceNumber") or 0)),
        is_localizer="LOCALIZER" in values.get("ImageType", "").upper().split("\\"),
        has_pixels=has_pixels and min(sides) > 0, sides=sides,
        frames=[_geometry(values, _groups_of_frame(file, frame), frame)
                for frame in range(n_frames)])


def _quick_header(path):
    """_full_header of an ordinary file in a tenth of the time; None for any other file.

    Ordinary: preamble, little endian, no functional groups, and the pixels begin in the first
    64 kB. Then 300 000 slices are listed in a minute or two.
    """
    with open(path, "rb") as opened:
        data = opened.read(2**16)
    if data[128:132] != b"DICM":
        return None
    values, at, syntax = {}, 132, ""
    while at + 12 <= len(data):
        is_implicit = syntax.endswith("10008.1.2") and data[at:at + 2] != b"\2\0"
        tag, start, length = _element(data, at, is_implicit)
        if tag >= FIRST_PIXELS:
            return values, {}, True
        if tag in GROUPS or tag > 0x0002FFFF and not syntax:
            return None
        at = start + length
        if length == UNDEFINED:
            at = _end_of_sequence(data, start, is_implicit)
        value = data[start:at]
        if at > len(data):
            return None
        if tag == 0x00020010:
            syntax = value.decode("ascii", "replace").strip(" \0")
            if not LITTLE_ENDIAN.fullmatch(syntax):
                return None
        elif tag in (0x00280010, 0x00280011):
            values[HEADER[tag]] = str(int.from_bytes(value[:2], "little"))
        elif tag in HEADER:
            if not value.isascii():  # its character set has to be known
                return None
            values[HEADER[tag]] = value.decode("ascii").strip(" \0")
    return None


def _element(data, at, is_implicit):
    """(tag, where its value begins, its length) of the element at a position, little endian."""
    group, number, length = ELEMENT.unpack_from(data, at)
    tag = group << 16 | number
    if is_implicit or group == 0xFFFE:  # items have no VR
        return tag, at + 8, length
    if data[at + 4:at + 6] in LONG_VRS:
        return tag, at + 12, int.from_bytes(data[at + 8:at + 12], "little")
    return tag, at + 8, length >> 16


def _end_of_sequence(data, at, is_implicit):
    """Where a sequence of undefined length ends; at: its first item. A length of the data, plus 1,
    if it does not end in the data."""
    while at + 8 <= len(data):
        tag, at, length = _element(data, at, is_implicit)
        if tag == SEQUENCE_END:
            return at
        if length != UNDEFINED:  # of an item
            at += length
            continue
        while at + 8 <= len(data) and tag != ITEM_END:
            tag, at, length = _element(data, at, is_implicit)
            at = _end_of_sequence(data, at, is_implicit) if length == UNDEFINED else at + length
    return len(data) + 1


def _full_header(path):
    """(values as text by keyword, pydicom's Dataset, whether pixels follow) of a file."""
    tags = [*HEADER, *GROUPS, 0x00080005]
    with open(path, "rb") as opened:
        file = _parse(path, opened, stop_before_pixels=True, specific_tags=tags)
        is_deflated = str(file.file_meta.get("TransferSyntaxUID", "")).endswith("2.1.99")
        has_pixels = is_deflated or bool(opened.read(4))
    present = [key for key in HEADER.values() if file.get(key) is not None]
    values = {key: _text(file.get(key)) for key in present}
    storage = str(file.file_meta.get("MediaStorageSOPClassUID", ""))
    values.setdefault("SOPClassUID", storage)
    return values, file, has_pixels


def _text(value):
    """A value of pydicom as the file writes it: parts joined by backslashes."""
    is_list = hasattr(value, "__iter__") and not isinstance(value, str)
    return "\\".join(map(str, value)) if is_list else str(value).strip()


def hash_patient(patient):
    """12 hex digits that stand for a PatientID; '' for an empty one."""
    text = (patient or "").strip()
    return hashlib.sha256(text.encode()).hexdigest()[:12] if text else ""


def _geometry(values, groups, frame=0):
    """(position [3] or None, orientation [6] or None, spacing [3]) of a frame, in mm."""
    def value(sequence, key):
        found = _from_groups(groups, sequence, key)
        return values.get(key) if found is None else _text(found)

    position = _numbers(value("PlanePositionSequence", "ImagePositionPatient"), 3)
    orientation = _numbers(value("PlaneOrientationSequence", "ImageOrientationPatient"), 6)
    pixel = _numbers(value("PixelMeasuresSequence", "PixelSpacing"), 2)
    pixel = pixel or _numbers(values.get("ImagerPixelSpacing"), 2) or (np.nan, np.nan)
    thick = _numbers(value("PixelMeasuresSequence", "SpacingBetweenSlices"), 1)
    thick = thick or _numbers(value("PixelMeasuresSequence", "SliceThickness"), 1) or (np.nan,)
    if values.get("GridFrameOffsetVector") and position and orientation:
        offsets = [float(offset) for offset in values["GridFrameOffsetVector"].split("\\")]
        across = np.cross(orientation[:3], orientation[3:])  # frames of a dose lie along it
        position = tuple(np.array(position) + across * (offsets[frame] - offsets[0]))
    return position, orientation, (abs(thick[0]) or np.nan, *pixel)


@functools.lru_cache(256)
def normal(orientation):
    """The unit vector [3] along which slices lie, from ImageOrientationPatient, a tuple of 6: row
    times column."""
    across = np.cross(orientation[:3], orientation[3:])
    return across / (np.linalg.norm(across) or 1.0)


@functools.lru_cache(4096)
def _numbers(text, n):
    """A tuple of n floats; None if the text holds not so many."""
    try:
        numbers = tuple(float(part) for part in text.split("\\"))
    except (AttributeError, ValueError):
        return None
    return numbers if len(numbers) == n and np.isfinite(numbers).all() else None
