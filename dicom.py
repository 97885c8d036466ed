"""DICOM files: their frames as pixels that mean something, and what their headers say.

open_dicom reads the pixels of a file, read_header what volumes.py sorts series by. Needs pydicom;
compressed files need the plugins of PLUGINS.
"""
import hashlib

import numpy as np

from configurator import UserError

AIR_HU = -1000  # what a CT slice gets that is nothing but padding
INSTALL = "pip install pydicom"
PLUGINS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
HEADER = ("SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality",
          "PatientID", "SeriesDescription", "ImageType", "Rows", "Columns", "NumberOfFrames",
          "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing",
          "SliceThickness", "SpacingBetweenSlices", "InstanceNumber", "GridFrameOffsetVector",
          "SharedFunctionalGroupsSequence",
          "PerFrameFunctionalGroupsSequence")


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
    comes as RGB, palettes are applied. The window (VOI LUT) is not applied. as_mask: stored numbers.
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
    if image.size and -2**15 <= image.min() <= image.max() < 2**15:
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
    return (stored >= min(ends)) & (stored <= max(ends)) | np.isnan(stored) & np.isnan(ends[0])


# ---- headers ----

def read_header(path):
    """What sorts a DICOM file, without its pixels: a dict.

    kind: modality; series, instance: UIDs; description: of the series, lower case; group: hash of
    the PatientID, '' = none; number: of the instance; is_localizer; has_pixels; sides: (rows,
    columns); frames: for each frame (position [3] mm or None, orientation [6] or None, spacing
    [3] mm: slice, row, column, NaN = unknown). Raises UserError or what pydicom raises.
    """
    with open(path, "rb") as opened:
        file = _parse(path, opened, stop_before_pixels=True, specific_tags=list(HEADER))
        is_deflated = str(file.file_meta.get("TransferSyntaxUID", "")).endswith("2.1.99")
        at_pixels = is_deflated or bool(opened.read(4))
    kind = str(file.get("Modality") or "unknown")
    if str(file.file_meta.get("MediaStorageSOPClassUID", "")).endswith("1.3.10"):
        kind = "DICOMDIR"
    image_type = [str(value).upper() for value in file.get("ImageType") or ()]
    n_frames = _count(file.get("NumberOfFrames"))
    return dict(
        kind=kind, series=str(file.get("SeriesInstanceUID") or path),
        instance=str(file.get("SOPInstanceUID") or path),
        description=str(file.get("SeriesDescription") or "").lower(),
        group=hash_patient(file.get("PatientID")), number=int(file.get("InstanceNumber") or 0),
        is_localizer="LOCALIZER" in image_type, has_pixels="Rows" in file and at_pixels,
        sides=(int(file.get("Rows") or 0), int(file.get("Columns") or 0)),
        frames=[_geometry(file, frame) for frame in range(n_frames)])


def hash_patient(patient):
    """12 hex digits that stand for a PatientID; '' for an empty one."""
    text = str(patient or "").strip()
    return hashlib.sha256(text.encode()).hexdigest()[:12] if text else ""


def _geometry(file, frame):
    """(position [3] or None, orientation [6] or None, spacing [3]) of a frame, in mm."""
    groups = _groups_of_frame(file, frame)

    def value(sequence, key):
        found = _from_groups(groups, sequence, key)
        return file.get(key) if found is None else found

    position = _numbers(value("PlanePositionSequence", "ImagePositionPatient"), 3)
    orientation = _numbers(value("PlaneOrientationSequence", "ImageOrientationPatient"), 6)
    pixel = _numbers(value("PixelMeasuresSequence", "PixelSpacing"), 2)
    pixel = pixel or _numbers(file.get("ImagerPixelSpacing"), 2) or [np.nan, np.nan]
    between = value("PixelMeasuresSequence", "SpacingBetweenSlices")
    thickness = value("PixelMeasuresSequence", "SliceThickness")
    thick = abs(_number(between) or _number(thickness) or np.nan)
    offsets = file.get("GridFrameOffsetVector")
    if offsets is not None and position and orientation:  # dose: frames lie along the normal
        position = list(np.array(position) + normal(orientation) * (offsets[frame] - offsets[0]))
    return position, orientation, [thick, *pixel]


def normal(orientation):
    """The unit vector [3] across an image from its ImageOrientationPatient [6]."""
    across = np.cross(orientation[:3], orientation[3:])
    length = np.linalg.norm(across)
    return across / length if length > 0 else np.array([0.0, 0.0, 1.0])


def _numbers(values, n):
    """A list of n floats; None if there are not so many."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == n and np.isfinite(numbers).all() else None
