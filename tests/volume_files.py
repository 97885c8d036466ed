"""Volumes as hospitals keep them, for the tests: DICOM series, enhanced DICOM, NIfTI, and masks.

A volume is [D,H,W] int16 in Hounsfield units, spacing = (slice, row, column) in mm. Row i+1 lies
below row i, column i+1 to the right, and slice i+1 further along the normal of the image plane.
With the default orientation x grows to the patient's left, y to the back, z to the head (LPS, the
axes of DICOM). The readers have to give back the same numbers in the same order.
"""
import os

import numpy as np

AXIAL = (1, 0, 0, 0, 1, 0)  # direction of a row, then of a column: of ImageOrientationPatient
CORONAL = (1, 0, 0, 0, 0, -1)
SAGITTAL = (0, 1, 0, 0, 0, -1)

# ---- DICOM ----

UNCOMPRESSED = ("implicit", "explicit", "big endian", "deflated")
# without a loss, as far as pydicom has encoders; JPEG 2000 needs 32 rows and columns
COMPRESSED = ("rle", "jpeg-ls", "jpeg 2000")
CT, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"


def transfer_syntax(name):
    """The UID of a name in UNCOMPRESSED or COMPRESSED."""
    from pydicom import uid
    return {"implicit": uid.ImplicitVRLittleEndian, "explicit": uid.ExplicitVRLittleEndian,
            "big endian": uid.ExplicitVRBigEndian, "deflated": uid.DeflatedExplicitVRLittleEndian,
            "rle": uid.RLELossless, "jpeg-ls": uid.JPEGLSLossless,
            "jpeg 2000": uid.JPEG2000Lossless}[name]


def skip_without_encoder(name):
    """Skip a test if no package here encodes this syntax. Returns the name of the syntax."""
    import pytest
    if name in COMPRESSED:
        from pydicom.pixels import get_encoder
        if not get_encoder(transfer_syntax(name)).is_available:
            pytest.skip(f"no encoder of {name}")
    return name


def slice_position(i, spacing, orientation=AXIAL, origin=(0.0, 0.0, 0.0)):
    """ImagePositionPatient of slice i, [3] in mm: the center of its first pixel."""
    normal = np.cross(orientation[:3], orientation[3:])
    return np.asarray(origin, float) + i * spacing[0] * normal


def store(values, slope=1, intercept=-1024, signed=False, bits=16, monochrome1=False):
    """The stored numbers of pixels: values = stored * slope + intercept. Fails unless exact.

    MONOCHROME1 stores the complement within `bits`: the largest number for the smallest value.
    """
    stored = np.rint((values.astype(float) - intercept) / slope).astype(np.int64)
    assert np.allclose(stored * slope + intercept, values), "slope and intercept do not fit"
    low = -2**(bits - 1) if signed else 0
    high = low + 2**bits - 1
    assert low <= stored.min() and stored.max() <= high, (stored.min(), stored.max())
    if monochrome1:
        stored = low + high - stored
    return stored.astype(np.int16 if signed else np.uint16)


def _header(series, instance, modality, patient, description):
    """A dataset with what every image has. UIDs are functions of the texts, so equal texts make one
    patient, study and series."""
    import pydicom
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.SOPClassUID = ENHANCED_CT if "frames" in str(instance) else CT
    ds.SOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[patient, series, str(instance)])
    ds.SeriesInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[patient, series])
    ds.StudyInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[patient])
    ds.FrameOfReferenceUID = pydicom.uid.generate_uid(entropy_srcs=[patient, "frame"])
    ds.PatientID, ds.PatientName = patient, f"Name^{patient}"
    ds.StudyID, ds.SeriesNumber, ds.SeriesDescription = "1", "2", description
    ds.StudyDate, ds.StudyTime = "20200102", "101112"
    ds.Modality, ds.ImageType = modality, ["ORIGINAL", "PRIMARY", "AXIAL"]
    return ds


def _add_pixels(ds, stored, bits, monochrome1):
    """Put stored [H,W] or [frames,H,W] numbers into a dataset."""
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.SamplesPerPixel, ds.BitsAllocated = 1, 16
    ds.BitsStored, ds.HighBit = bits, bits - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.PhotometricInterpretation = "MONOCHROME1" if monochrome1 else "MONOCHROME2"
    ds.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    ds["PixelData"].VR = "OW"


def _save(ds, path, syntax, preamble=True):
    """Write a dataset, encoded and compressed as `syntax` says."""
    from pydicom import uid
    os.makedirs(os.path.dirname(path), exist_ok=True)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    if syntax in COMPRESSED:
        ds.compress(transfer_syntax(syntax), generate_instance_uid=False)
    elif syntax == "big endian":
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    if syntax not in COMPRESSED:
        ds.file_meta.TransferSyntaxUID = transfer_syntax(syntax)
    if preamble:
        ds.save_as(path, enforce_file_format=True)
        return
    assert syntax == "implicit", "without a preamble nothing names another syntax"
    del ds.file_meta
    ds.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)


def write_series(folder, volume, spacing=(5.0, 1.0, 1.0), orientation=AXIAL, origin=(0, 0, 0),
                 patient="P1", series="1", modality="CT", description="body", syntax="explicit",
                 slope=1, intercept=-1024, signed=False, bits=16, monochrome1=False,
                 padding=None, is_padding=None, ending=".dcm", preamble=True, seed=0,
                 image_type=None):
    """Write a volume as a DICOM series, one file a slice, file names and numbers in random order.

    Args: slope, intercept: a number, or one for every slice; bits: BitsStored; padding: the
    PixelPaddingValue, a stored number, which the pixels of is_padding [D,H,W] bool get;
    ending: of the file names; preamble: False = an old file without the 128 bytes and "DICM";
    image_type: of ImageType, like ("ORIGINAL", "PRIMARY", "LOCALIZER").
    Returns: list of D paths, that of slice i at i.
    """
    D = len(volume)
    slopes, intercepts = np.broadcast_to(slope, D), np.broadcast_to(intercept, D)
    numbers, paths = np.random.default_rng([seed, D]).permutation(D), []
    for i in range(D):
        ds = _header(series, i, modality, patient, description)
        ds.ImageType = list(image_type or ds.ImageType)
        ds.ImageOrientationPatient = [float(value) for value in orientation]
        ds.ImagePositionPatient = slice_position(i, spacing, orientation, origin).tolist()
        ds.PixelSpacing, ds.SliceThickness = list(map(float, spacing[1:])), float(spacing[0])
        ds.InstanceNumber = int(numbers[i]) + 1  # of scanners' two orders neither can be relied on
        ds.RescaleSlope, ds.RescaleIntercept = str(slopes[i]), str(intercepts[i])
        ds.RescaleType = "HU"
        stored = store(volume[i], slopes[i], intercepts[i], signed, bits, monochrome1)
        if padding is not None:
            ds.PixelPaddingValue = padding
            ds["PixelPaddingValue"].VR = "SS" if signed else "US"
            stored[is_padding[i]] = padding
        _add_pixels(ds, stored, bits, monochrome1)
        paths.append(os.path.join(folder, f"IM{numbers[i]:05d}{ending}"))
        _save(ds, paths[i], syntax, preamble)
    return paths


def write_enhanced(path, volume, spacing=(5.0, 1.0, 1.0), orientation=AXIAL, origin=(0, 0, 0),
                   patient="P1", series="1", description="body", syntax="explicit", slope=1,
                   intercept=-1024, signed=False, bits=16, monochrome1=False, seed=0):
    """Write a volume as one multi-frame file: enhanced CT, frames in random order.

    Position, slope and intercept stand in the functional groups of each frame; slope and intercept
    are numbers, or one for every slice. Returns: path.
    """
    import pydicom

    def sequence(**values):
        item = pydicom.Dataset()
        for key, value in values.items():
            setattr(item, key, value)
        return pydicom.Sequence([item])
    D = len(volume)
    slopes, intercepts = np.broadcast_to(slope, D), np.broadcast_to(intercept, D)
    ds = _header(series, "frames", "CT", patient, description)
    measures = sequence(PixelSpacing=list(map(float, spacing[1:])),
                        SliceThickness=float(spacing[0]))
    plane = sequence(ImageOrientationPatient=[float(value) for value in orientation])
    ds.SharedFunctionalGroupsSequence = sequence(PixelMeasuresSequence=measures,
                                                 PlaneOrientationSequence=plane)
    order, frames, stored = np.random.default_rng([seed, D]).permutation(D), [], []
    for i in order:
        position = slice_position(i, spacing, orientation, origin).tolist()
        units = sequence(RescaleSlope=str(slopes[i]), RescaleIntercept=str(intercepts[i]),
                         RescaleType="HU")
        frames += sequence(PlanePositionSequence=sequence(ImagePositionPatient=position),
                           PixelValueTransformationSequence=units)
        stored.append(store(volume[i], slopes[i], intercepts[i], signed, bits, monochrome1))
    ds.PerFrameFunctionalGroupsSequence = pydicom.Sequence(frames)
    ds.NumberOfFrames, ds.InstanceNumber = D, 1
    _add_pixels(ds, np.stack(stored), bits, monochrome1)
    _save(ds, path, syntax)
    return path


def write_dicomdir(folder, paths):
    """Write a DICOMDIR with copies of some files in `folder`, as they are on a CD. Returns None."""
    from pydicom.fileset import FileSet
    file_set = FileSet()
    for path in paths:
        file_set.add(path)
    file_set.write(folder)


# ---- NIfTI ----

def write_nifti(path, volume, spacing=(5.0, 1.0, 1.0), codes="LPS", slope=None, intercept=None,
                origin=(0.0, 0.0, 0.0)):
    """Write a volume as .nii or .nii.gz, as the ending of path says.

    Args: volume [D,H,W] of an axial series, any dtype; codes: where the three axes of the file
    point to, any of the 48 like "RAS" or "PIR" ("LPS": the file has [W,H,D]); slope, intercept:
    scl_slope and scl_inter, None = 1 and 0; origin: of slice_position. Returns: path.
    """
    import nibabel
    from nibabel.orientations import (apply_orientation, axcodes2ornt, inv_ornt_aff,
                                      ornt_transform)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    stored = volume
    if slope is not None:
        stored = store(volume, slope, intercept, signed=True)
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])  # NIfTI: x to the right, y front
    affine[:3, 3] = np.multiply(origin, (-1, -1, 1))
    turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes))
    data = apply_orientation(stored.transpose(2, 1, 0), turn)
    affine = affine @ inv_ornt_aff(turn, stored.shape[::-1])
    image = nibabel.Nifti1Image(data, affine, dtype=data.dtype)
    nibabel.save(image, path)
    if slope is not None:  # nibabel computes both by itself, so they are put in behind it
        _set_nifti_scale(path, slope, intercept)
    return path


def _set_nifti_scale(path, slope, intercept):
    """Put scl_slope and scl_inter into the header of a file: two float32 at byte 112."""
    import gzip
    open_file = gzip.open if path.endswith(".gz") else open
    with open_file(path, "rb") as file:
        content = bytearray(file.read())
    content[112:120] = np.array([slope, intercept], "<f4").tobytes()
    with open_file(path, "wb") as file:
        file.write(bytes(content))
