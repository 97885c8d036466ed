"""One image of a file: every kind that labs have is read as what it means, or is refused."""
import io
import re
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

import dicom
from configurator import UserError
from formats import EXTENSIONS, array_axes, file_kind
from images import BoxMasks, ImageFiles, load_image

RNG = np.random.default_rng(0)


def drawn(*shape, dtype=np.uint16, high=4000, low=0):
    return RNG.integers(low, high, shape).astype(dtype)


def same(image, expected):
    """True if an image [H,W,C] has the values and the dtype of an array [H,W] or [H,W,C]."""
    expected = expected[..., None] if expected.ndim == 2 else expected
    return image.dtype == expected.dtype and np.array_equal(image, expected)


def refused(path, message, **options):
    with pytest.raises(UserError, match=message) as error:
        load_image(str(path), **options)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def save_dicom(path, stored, with_preamble=True, **elements):
    """Write stored numbers, [H,W], [N,H,W] or, for colours, [H,W,3], as an uncompressed DICOM file
    with these elements. Returns path as text."""
    pydicom = pytest.importorskip("pydicom")
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    file.SOPInstanceUID, file.Modality = elements.pop("SOPInstanceUID", "1.2.3"), "CT"
    file.SamplesPerPixel = 3 if stored.shape[-1] == 3 else 1
    shape = stored.shape[:-1] if file.SamplesPerPixel == 3 else stored.shape
    if file.SamplesPerPixel == 3:
        file.PlanarConfiguration = 0
    if len(shape) == 3:
        file.NumberOfFrames = shape[0]
    file.Rows, file.Columns = shape[-2:]
    file.BitsAllocated = file.BitsStored = 8 * stored.itemsize
    file.HighBit = file.BitsAllocated - 1
    file.PixelRepresentation = int(stored.dtype.kind == "i")
    file.PhotometricInterpretation = "RGB" if file.SamplesPerPixel == 3 else "MONOCHROME2"
    for key, value in elements.items():
        setattr(file, key, value)
        if key.startswith("PixelPadding") or key.endswith("Descriptor"):
            file[key].VR = "US"  # else pydicom derives it from PixelRepresentation
    if stored.dtype.kind == "f":
        file.FloatPixelData = stored.tobytes()
    else:
        file.PixelData = stored.tobytes()
        file["PixelData"].VR = "OB" if stored.itemsize == 1 else "OW"
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID
    if with_preamble:
        file.save_as(path, enforce_file_format=True)
    else:
        del file.file_meta
        file.save_as(path, implicit_vr=True, little_endian=True)
    return str(path)


def items(**elements):
    """A sequence of one item."""
    pydicom = pytest.importorskip("pydicom")
    item = pydicom.Dataset()
    for key, value in elements.items():
        setattr(item, key, value)
    return pydicom.Sequence([item])


# ---- which reader ----

def test_a_file_is_recognised_by_its_ending_or_its_first_bytes(tmp_path):
    for ending, kind in ((".DCM", "dicom"), (".ima", "dicom"), (".dicom", "dicom"),
                         (".dcm30", "dicom"), (".nii", "nifti"), (".nii.gz", "nifti"),
                         (".npy", "array"), (".npz", "array"), (".webp", "picture"),
                         (".jp2", "picture"), (".pgm", "picture"), (".jfif", "picture"),
                         (".gif", "picture"), (".JPG", "picture")):
        assert file_kind(f"nowhere/a{ending}") == kind
        assert f"a{ending}".lower().endswith(EXTENSIONS), ending
    for ending in (".h5", ".eps", ".mpg", ".pdf", ".txt"):  # Pillow cannot read these by itself
        assert not f"a{ending}".endswith(EXTENSIONS)
    for name, start, kind in (("IM0001", bytes(128) + b"DICM", "dicom"),
                              ("1.2.840.5", bytes(128) + b"DICM", "dicom"),
                              ("scan", bytes(344) + b"n+1\0", "nifti"),
                              ("scan2", b"\x1c\2\0\0n+2\0" + bytes(340), "nifti"),
                              ("notes.txt", b"hello", ""), ("empty", b"", "")):
        (tmp_path / name).write_bytes(start)
        assert file_kind(str(tmp_path / name)) == kind, name
    assert file_kind(str(tmp_path / "missing")) == ""


# ---- arrays ----

@pytest.mark.parametrize("shape, axes", [
    ((64, 64), (None, None)), ((64, 48, 3), (None, 2)), ((64, 64, 4), (None, 2)),
    ((64, 64, 1), (None, 2)), ((9, 7, 5), (None, 2)), ((64, 64, 12), (None, 2)),
    ((3, 64, 64), (None, 0)), ((1, 64, 64), (None, 0)), ((12, 64, 64), (0, None)),
    ((30, 64, 48), (0, None)), ((512, 512, 40), (2, None)), ((28, 28, 28), (0, None)),
    ((64, 30, 64), (1, None))])
def test_axes_of_an_array_by_its_shape(shape, axes):
    assert array_axes(shape) == axes
    if len(shape) == 3:
        assert [array_axes(shape, axis)[0] for axis in range(3)] == [0, 1, 2]
        assert array_axes(shape, 3) == (None, 2)


def test_slices_of_an_array_lie_along_the_axis_that_is_set(tmp_path):
    volume, path = drawn(12, 20, 20), str(tmp_path / "a.npy")
    np.save(path, volume)
    assert same(load_image(path, number=5), volume[5])
    assert same(load_image(path, number=5, volume_axis=1), volume[:, 5])
    assert load_image(path, volume_axis=3).shape == (12, 20, 20)
    refused(path, r"has no image number 12; it has 12, counted from 0", number=12)
    np.save(path, drawn(3, 20, 30))
    assert same(load_image(path), np.load(path).transpose(1, 2, 0))
    colors = drawn(6, 20, 20, 3)
    np.save(path, colors)
    refused(path, r"shape \(6, 20, 20, 3\), uint16; needs \[height, width, channels\] numbers or")
    assert same(load_image(path, number=4, volume_axis=0), colors[4])


@pytest.mark.parametrize("stored, expected", [
    (np.bool_, np.uint8), (">u2", np.uint16), (">i2", np.int16), (">f4", np.float32),
    (np.float64, np.float32), (np.longdouble, np.float32), (np.float16, np.float32),
    (np.int8, np.int8), (np.uint8, np.uint8), (np.int32, np.int32), (np.int64, np.int32),
    (np.uint32, np.int32), (np.uint64, np.int32)])
def test_arrays_keep_their_values_in_a_dtype_that_torch_takes(tmp_path, stored, expected):
    array = np.asfortranarray(drawn(6, 9, high=2).astype(stored))
    np.save(tmp_path / "a.npy", array)
    image = load_image(str(tmp_path / "a.npy"))
    assert image.dtype == expected and image.dtype.isnative
    assert (image[..., 0] == array).all() and image.flags.c_contiguous and image.flags.writeable


def test_values_that_no_integer_holds_become_float32(tmp_path):
    big = np.array([[2**32 - 1, 5]], np.uint32)
    np.save(tmp_path / "a.npy", big)
    assert same(load_image(str(tmp_path / "a.npy")), big.astype(np.float32))


@pytest.mark.parametrize("array, message", [
    (np.array([[1, np.nan, np.inf, 2]]), "2 of 4 values are NaN, infinite"),
    (np.array([[1e300]]), "1 of 1 values are NaN, infinite or beyond float32"),
    (np.ones((4, 4), complex), r"shape \(4, 4\), complex128; needs \[height, width, channels\]"),
    (np.ones(5), r"shape \(5,\), float64; needs"), (np.float32(3), r"shape \(\), float32; needs"),
    (np.ones((4, 0)), r"shape \(4, 0, 1\): no pixels"), (np.array([["a"]]), "<U1; needs"),
    (np.array([[None]]), "cannot be read as an image")])
def test_arrays_that_are_no_images_are_named(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    refused(tmp_path / "a.npy", message)


def test_an_npz_of_one_case(tmp_path):
    image, label = drawn(20, 20), drawn(20, 20, dtype=np.uint8, high=3)
    path = str(tmp_path / "case.npz")
    np.savez_compressed(path, image=image, label=label)
    assert same(load_image(path), image) and same(load_image(path, as_mask=True), label)
    np.savez(path, anything=image)
    assert same(load_image(path), image)
    np.savez(path, a=image, b=image)
    refused(path, "has a, b; an .npz of one case needs one array, or one named 'image'")


# ---- DICOM ----

@pytest.mark.parametrize("stored, elements, expected", [
    (np.int16, dict(RescaleSlope=1, RescaleIntercept=-1024), np.int16),
    (np.uint16, dict(RescaleSlope="0.0005", RescaleIntercept="0"), np.float32),
    (np.uint16, dict(RescaleSlope=100, RescaleIntercept=0), np.float32),
    (np.uint16, dict(RescaleSlope=None, RescaleIntercept=None), np.int16),
    (np.uint16, dict(DoseGridScaling="0.25"), np.float32),
    (np.uint8, {}, np.uint8), (np.uint8, dict(RescaleSlope=2, RescaleIntercept=0), np.int16)])
def test_dicom_comes_in_the_units_of_its_header(tmp_path, stored, elements, expected):
    pixels = drawn(8, 9, dtype=stored, high=255 if stored == np.uint8 else 4000)
    image = load_image(save_dicom(tmp_path / "a.dcm", pixels, **elements))
    slope = float(elements.get("RescaleSlope") or elements.get("DoseGridScaling") or 1)
    units = pixels * slope + float(elements.get("RescaleIntercept") or 0)
    assert image.dtype == expected
    assert np.allclose(image[..., 0], units, rtol=1e-6, atol=0)
    assert len(np.unique(image)) == len(np.unique(pixels))


def test_monochrome1_is_the_same_picture_as_monochrome2(tmp_path):
    for dtype, low, high, total in ((np.uint16, 0, 4096, 4095), (np.int16, -2048, 2048, -1)):
        pixels = drawn(8, 9, dtype=dtype, low=low, high=high)
        rescale = dict(BitsStored=12, HighBit=11, RescaleSlope=1, RescaleIntercept=-1000)
        plain = save_dicom(tmp_path / "a.dcm", pixels, **rescale)
        other = save_dicom(tmp_path / "b.dcm", (total - pixels).astype(dtype),
                           PhotometricInterpretation="MONOCHROME1", **rescale)
        assert same(load_image(other), load_image(plain))
        assert same(load_image(plain), (pixels.astype(int) - 1000).astype(np.int16))


def test_padding_is_no_intensity(tmp_path):
    """Padded pixels get the lowest real value of their frame, whatever the padding is."""
    pixels = drawn(8, 9, dtype=np.int16, low=24, high=2000)
    pixels[0] = -2000
    pixels[1] = -1990
    file = dict(RescaleSlope=1, RescaleIntercept=-1024, PixelPaddingValue=-2000 + 2**16)
    image = load_image(save_dicom(tmp_path / "a.dcm", pixels, **file))[..., 0]
    assert (image[2:] == pixels[2:] - 1024).all() and (image[1] == -3014).all()
    assert (image[0] == -3014).all()
    file["PixelPaddingRangeLimit"] = -1980 + 2**16
    image = load_image(save_dicom(tmp_path / "a.dcm", pixels, **file))[..., 0]
    assert (image[2:] == pixels[2:] - 1024).all() and (image[:2] == image[2:].min()).all()
    nothing = np.full((8, 9), -2000, np.int16)
    image = load_image(save_dicom(tmp_path / "a.dcm", nothing, **file))
    assert (image == dicom.AIR_HU).all()


def test_a_modality_lut_is_applied(tmp_path):
    pixels, lut = drawn(8, 9, high=16), drawn(16, high=60000)
    table = items(LUTDescriptor=[16, 0, 16], ModalityLUTType="US", LUTData=lut.tolist())
    table[0]["LUTDescriptor"].VR = table[0]["LUTData"].VR = "US"
    path = save_dicom(tmp_path / "a.dcm", pixels, ModalityLUTSequence=table)
    assert (load_image(path)[..., 0] == lut[pixels]).all()


@pytest.mark.parametrize("scale, dtype", [(256, np.uint8), (257, np.uint8), (250, np.uint16)])
def test_palettes_are_applied(tmp_path, scale, dtype):
    palette = drawn(3, 256, dtype=np.int64, high=256)
    pixels = drawn(8, 9, dtype=np.uint8, high=256)
    elements = dict(PhotometricInterpretation="PALETTE COLOR")
    for name, row in zip(("Red", "Green", "Blue"), palette):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        data = (row * scale).astype(np.uint16).tobytes()
        elements[f"{name}PaletteColorLookupTableData"] = data
    path = save_dicom(tmp_path / "a.dcm", pixels, **elements)
    expected = palette.T[pixels] * (1 if dtype == np.uint8 else scale)
    assert same(load_image(path), expected.astype(dtype))
    assert same(load_image(path, as_mask=True), pixels)


def test_a_file_of_many_frames_is_many_images(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    frames = drawn(5, 8, 9)
    groups = [items(PixelValueTransformationSequence=items(RescaleSlope=k + 1, RescaleIntercept=-k))
              for k in range(5)]
    path = save_dicom(tmp_path / "a.dcm", frames, RescaleSlope=7, RescaleIntercept=7,
                      PerFrameFunctionalGroupsSequence=pydicom.Sequence(g[0] for g in groups))
    for k in range(5):
        assert (load_image(path, number=k)[..., 0] == frames[k].astype(int) * (k + 1) - k).all()
    refused(path, "has no image number 5; it has 5", number=5)
    colors = drawn(2, 8, 9, 3, dtype=np.uint8, high=256)
    path = save_dicom(tmp_path / "b.dcm", colors)
    assert same(load_image(path, number=1), colors[1])
    floats = RNG.random((3, 8, 9)).astype(np.float32)
    path = save_dicom(tmp_path / "c.dcm", floats, FloatPixelPaddingValue=float(floats[1, 0, 0]))
    assert same(load_image(path, number=2), floats[2])
    assert load_image(path, number=1)[0, 0, 0] == np.sort(floats[1].ravel())[0]


def test_dicom_without_preamble_is_read(tmp_path):
    pixels = drawn(8, 9, dtype=np.int16)
    path = save_dicom(tmp_path / "a.dcm", pixels, with_preamble=False, RescaleIntercept=-1024)
    assert same(load_image(path), pixels - np.int16(1024))
    (tmp_path / "b.dcm").write_bytes(b"<html>404</html>" * 20)
    refused(tmp_path / "b.dcm", "set --on_bad_image=skip")


def test_dicom_that_is_no_image_or_needs_a_plugin_says_so(tmp_path, monkeypatch):
    path = save_dicom(tmp_path / "a.dcm", drawn(8, 9))
    import pydicom
    file = pydicom.dcmread(path)
    del file.PixelData
    file.Modality = "RTSTRUCT"
    file.save_as(tmp_path / "b.dcm")
    refused(tmp_path / "b.dcm", r"a DICOM file without pixels \(Modality RTSTRUCT\)")
    jpeg = pydicom.data.get_testdata_file("JPEG-LL.dcm", download=False)
    if jpeg:
        monkeypatch.setattr(type(pydicom.pixels.get_decoder(pydicom.uid.JPEGLosslessSV1)),
                            "is_available", property(lambda self: False))
        refused(jpeg, "compressed as JPEG Lossless.*; pip install pylibjpeg pylibjpeg-libjpeg "
                      "pylibjpeg-openjpeg$")
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    refused(path, "reading DICOM needs pydicom; pip install pydicom$")


FILES = ("CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm",
         "MR_small_jp2klossless.dcm", "SC_rgb.dcm", "SC_rgb_rle_2frame.dcm",
         "SC_ybr_full_422_uncompressed.dcm",
         "image_dfl.dcm", "examples_palette.dcm", "examples_ybr_color.dcm", "liver_1frame.dcm",
         "rtdose_1frame.dcm", "eCT_Supplemental.dcm", "mlut_18.dcm", "parametric_map_float.dcm",
         "emri_small.dcm", "693_J2KI.dcm", "JPEG2000.dcm", "nested_priv_SQ.dcm")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_pydicoms_own_files_equal_pydicoms_own_chain(name):
    pydicom = pytest.importorskip("pydicom")
    path = pydicom.data.get_testdata_file(name, download=False)
    if not path:
        pytest.skip("not in this pydicom")
    file = pydicom.dcmread(path)
    try:
        expected = file.pixel_array
    except (RuntimeError, AttributeError):
        with pytest.raises(UserError):
            load_image(path)
        return
    number = int(file.get("NumberOfFrames") or 1) - 1
    expected = expected[number] if number else expected
    if file.PhotometricInterpretation == "PALETTE COLOR":
        expected = pydicom.pixels.apply_color_lut(expected, file) // 256
    elif file.SamplesPerPixel == 1:
        expected = pydicom.pixels.apply_modality_lut(expected, file) * float(
            file.get("DoseGridScaling", 1))
    if shared := file.get("SharedFunctionalGroupsSequence"):
        if units := shared[0].get("PixelValueTransformationSequence"):
            expected = expected * float(units[0].RescaleSlope) + float(units[0].RescaleIntercept)
    image = load_image(path, number=number)
    real = np.ones(image.shape, bool)
    if "PixelPaddingValue" in file:
        stored = file.pixel_array.reshape(image.shape)
        real = stored != np.array(file.PixelPaddingValue).astype(stored.dtype)
    assert np.allclose(image[real], expected.reshape(image.shape)[real], rtol=1e-6, atol=0)


# ---- pictures ----

def png16(array, interlace=0):
    """A 16-bit PNG [H,W,C] with a different filter in each row."""
    height, width, channels = array.shape
    rows = array.astype(">u2").reshape(height, -1).view(np.uint8).astype(int)
    before, step = np.zeros_like(rows[0]), 2 * channels
    raw = b""
    for i, row in enumerate(rows):
        left = np.concatenate([np.zeros(step, int), row[:-step]])
        filtered = (row, row - left, row - before, row - (left + before) // 2)[i % 4]
        raw += bytes([i % 4]) + (filtered % 256).astype(np.uint8).tobytes()
        before = row

    def chunk(name, data):
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)
    kind = {2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, interlace)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("channels, kept", [(2, 1), (3, 3), (4, 3)])
def test_sixteen_bit_png_in_colour_or_with_alpha_keeps_its_bits(tmp_path, channels, kept):
    array = drawn(13, 9, channels, high=65536)
    (tmp_path / "a.png").write_bytes(png16(array))
    assert same(load_image(str(tmp_path / "a.png")), array[..., :kept])


def test_grey_with_alpha_is_grey_and_grey_can_be_asked_for_as_rgb(tmp_path):
    grey, alpha = drawn(8, 9, dtype=np.uint8, high=256), drawn(8, 9, dtype=np.uint8, high=256)
    Image.fromarray(np.dstack([grey, alpha]), "LA").save(tmp_path / "a.png")
    assert same(load_image(str(tmp_path / "a.png")), grey)
    deep = drawn(8, 9, high=65536)
    Image.fromarray(deep).save(tmp_path / "b.png")
    assert same(load_image(str(tmp_path / "b.png"), 3), np.dstack([deep] * 3))
    (tmp_path / "c.png").write_bytes(png16(np.dstack([deep] * 3)))
    assert same(load_image(str(tmp_path / "c.png"), 1), deep)
    np.save(tmp_path / "d.npy", deep)
    assert same(load_image(str(tmp_path / "d.npy"), 3), np.dstack([deep] * 3))
    np.save(tmp_path / "d.npy", np.dstack([deep] * 3))
    refused(tmp_path / "d.npy", r"needs .* with 1 channels as the rest", num_channels=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_turns_images_masks_and_boxes(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    picture = Image.fromarray(drawn(13, 9, 3, dtype=np.uint8, high=256))
    for ending in (".png", ".jpg", ".webp", ".tif"):
        picture.save(tmp_path / f"a{ending}", exif=exif)
        with Image.open(io.BytesIO((tmp_path / f"a{ending}").read_bytes())) as stored:
            expected = np.asarray(ImageOps.exif_transpose(stored))
        assert same(load_image(str(tmp_path / f"a{ending}")), expected), ending
    assert load_image(str(tmp_path / "a.png")).shape[:2] == (
        (13, 9) if orientation < 5 else (9, 13))
    Image.fromarray(np.asarray(picture)[..., 0]).save(tmp_path / "m.png", exif=exif)
    mask = load_image(str(tmp_path / "m.png"), as_mask=True)
    assert mask.shape[:2] == expected.shape[:2]
    boxes = BoxMasks([[[0, 0, 4, 2]]], ImageFiles(str(tmp_path), ["a.png"]), "boxes.json")
    assert boxes[0].shape == expected.shape[:2] and boxes[0][:2, :4].all()


def test_frames_of_an_animation_are_images(tmp_path):
    frames = [Image.fromarray(np.full((9, 9, 3), 40 * k, np.uint8)) for k in range(4)]
    for name, kind in (("a.gif", "GIF"), ("a.apng", "PNG"), ("a.png", "PNG")):
        frames[0].save(tmp_path / name, kind, save_all=True, append_images=frames[1:])
    for name in ("a.gif", "a.apng"):
        found = [load_image(str(tmp_path / name), number=k).max() for k in range(4)]
        assert found == [0, 40, 80, 120]
    refused(tmp_path / "a.png", "an animation of 4 pictures; rename it to .apng")


def test_a_large_picture_is_refused_before_it_is_decoded_and_a_key_allows_it(tmp_path, monkeypatch):
    """From several threads at once, without a change of the warnings' filters."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    path = tmp_path / "a.png"
    Image.fromarray(drawn(30, 30, dtype=np.uint8)).save(path)
    before, failed = list(warnings.filters), []

    def read():
        try:
            refused(path, r"DecompressionBomb.*set --max_image_pixels=900$")
        except BaseException as error:
            failed.append(error)
    threads = [threading.Thread(target=read) for _ in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed and warnings.filters == before
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused(path, "DecompressionBombError.*allow its size with --max_image_pixels")
    assert load_image(str(path), max_image_pixels=900).shape == (30, 30, 1)


def test_a_decoder_that_lacks_is_named(tmp_path, monkeypatch):
    Image.fromarray(drawn(9, 9, 3, dtype=np.uint8)).save(tmp_path / "a.png")

    def no_decoder(*args):
        raise OSError("decoder zip not available")
    monkeypatch.setattr(Image, "_getdecoder", no_decoder)
    refused(tmp_path / "a.png", "convert it to another format; there is no decoder for it here")


# ---- TIFF ----

@pytest.mark.parametrize("array, options", [
    (drawn(13, 9, 3), {}), (drawn(13, 9, 3), dict(byteorder=">")),
    (drawn(13, 9), dict(byteorder=">")),
    (drawn(13, 9, 4), dict(photometric="rgb", extrasamples=["unassalpha"])),
    (drawn(13, 9, dtype=np.int8, low=-99, high=99), {}),
    (drawn(13, 9, dtype=np.int16, low=-2000), dict(byteorder=">")),
    (drawn(13, 9, dtype=np.float32), {}),
    (drawn(13, 9, 3, dtype=np.float32), dict(photometric="rgb")),
    (drawn(13, 9, 7, dtype=np.float32), dict(photometric="minisblack", planarconfig="contig")),
    (drawn(13, 9, 5, dtype=np.uint8), dict(photometric="minisblack", planarconfig="contig"))])
def test_tiff_keeps_bits_signs_and_bands(tmp_path, array, options):
    tifffile = pytest.importorskip("tifffile")
    path = str(tmp_path / "a.tif")
    tifffile.imwrite(path, array, **options)
    has_alpha = "extrasamples" in options
    assert same(load_image(path), array[..., :3] if has_alpha else array)


def test_tiff_with_planes_floats_palettes_and_white_as_zero(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    path, color = str(tmp_path / "a.tif"), drawn(13, 9, 3)
    tifffile.imwrite(path, color.transpose(2, 0, 1), photometric="rgb", planarconfig="separate",
                     byteorder=">")
    assert same(load_image(path), color)
    for dtype in (np.float16, np.float64):
        tifffile.imwrite(path, color[..., 0].astype(dtype))
        assert same(load_image(path), color[..., 0].astype(dtype).astype(np.float32))
    tifffile.imwrite(path, np.uint32(2**31) + color[..., 0])
    assert same(load_image(path), (np.uint32(2**31) + color[..., 0]).astype(np.float32))
    for dtype, most in ((np.uint8, 255), (np.uint16, 65535)):
        tifffile.imwrite(path, color[..., 0].astype(dtype), photometric="miniswhite")
        assert same(load_image(path), most - color[..., 0].astype(dtype))
    inks = drawn(13, 9, 4, high=65536)
    tifffile.imwrite(path, inks, photometric="separated")  # as Pillow does for 8 bits
    expected = (65535.0 - inks[..., :3]) * (65535.0 - inks[..., 3:]) / 65535
    assert same(load_image(path), np.rint(expected).astype(np.uint16))
    few = drawn(2, 8, 8, dtype=np.uint8, high=2)
    for photometric, value in (("minisblack", 1), ("miniswhite", 0)):  # of one bit
        tifffile.imwrite(path, few.astype(bool), photometric=photometric)
        assert same(load_image(path, number=1), np.uint8(255) * (few[1] == value))
    table, numbers = drawn(3, 256, dtype=np.uint8, high=256), color[..., 0].astype(np.uint8)
    tifffile.imwrite(path, np.stack([numbers, numbers]), photometric="palette",
                     colormap=table.astype(np.uint16) * 257)
    assert same(load_image(path, number=1), table.T[numbers])
    assert same(load_image(path, number=1, as_mask=True), numbers)


def test_pages_are_images_and_channels_are_channels(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    stack, path = drawn(6, 13, 9), str(tmp_path / "a.tif")
    for options in ({}, dict(truncate=True), dict(compression="zlib")):
        tifffile.imwrite(path, stack, photometric="minisblack", **options)
        assert same(load_image(path, number=4), stack[4])
    refused(path, "has no image number 6; it has 6", number=6)
    tifffile.imwrite(path, stack[:5], ome=True, metadata=dict(axes="CYX"), photometric="minisblack")
    assert same(load_image(path), stack[:5].transpose(1, 2, 0))
    tifffile.imwrite(path, stack.reshape(3, 2, 13, 9), imagej=True, metadata=dict(axes="ZCYX"))
    assert same(load_image(path, number=2), stack[4:].transpose(1, 2, 0))
    with tifffile.TiffWriter(path) as file:  # a pyramid is one image
        file.write(stack[0])
        file.write(stack[0, ::2, ::2], subfiletype=1)
    assert same(load_image(path), stack[0])
    refused(path, "has no image number 1; it has 1", number=1)


def test_without_tifffile_only_what_pillow_would_change_is_refused(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    grey, path = drawn(13, 9), str(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "b.tif", drawn(13, 9, 3))
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    Image.fromarray(grey).save(path)
    assert same(load_image(path), grey)
    refused(tmp_path / "b.tif", "needs tifffile; pip install tifffile imagecodecs$")


# ---- masks ----

def test_numbers_of_a_mask_are_kept(tmp_path):
    def saved(array, name="m.png"):
        Image.fromarray(array).save(tmp_path / name)
        return load_image(str(tmp_path / name), as_mask=True)
    wide = np.array([[0, 300], [257, 0]], np.uint16)
    assert same(saved(wide), wide.astype(np.int32))
    assert same(saved(np.array([[0, 0.6], [0.4, 1]], np.float32), "m.tif"),
                np.array([[0, 1], [0, 1]], np.uint8))
    np.save(tmp_path / "m.npy", np.eye(4, dtype=bool))
    assert same(load_image(str(tmp_path / "m.npy"), as_mask=True), np.eye(4, dtype=np.uint8))
    np.save(tmp_path / "m.npy", np.array([[0, 2.0], [7, 1]]))
    assert same(load_image(str(tmp_path / "m.npy"), as_mask=True),
                np.array([[0, 2], [7, 1]], np.uint8))
    np.save(tmp_path / "m.npy", np.array([[0, 2.5]]))
    refused(tmp_path / "m.npy", "a mask with fractions from 0.0 to 2.5", as_mask=True)


def test_colours_of_a_mask(tmp_path):
    def saved(array, mode=None):
        Image.fromarray(array, mode).save(tmp_path / "m.png")
        return load_image(str(tmp_path / "m.png"), as_mask=True)[..., 0]
    red = np.zeros((4, 4, 3), np.uint8)
    red[:2, :, 0] = 255
    assert (saved(red) == red[..., 0]).all()
    grey = np.repeat(np.arange(16, dtype=np.uint8).reshape(4, 4, 1), 3, axis=2)
    assert (saved(grey) == grey[..., 0]).all()
    alpha = np.zeros((4, 4, 4), np.uint8)
    alpha[1:3, 1:3, 3] = 255
    assert (saved(alpha, "RGBA") == alpha[..., 3]).all()
    red[2:, :, 1] = 255
    Image.fromarray(red).save(tmp_path / "m.png")
    refused(tmp_path / "m.png", r"a mask of 2 colours \(\[0, 255, 0\], \[255, 0, 0\]\), which are",
            as_mask=True)


def test_masks_as_dicom_are_their_stored_numbers(tmp_path):
    mask = drawn(8, 9, dtype=np.uint8, high=3)
    path = save_dicom(tmp_path / "a.dcm", mask, RescaleSlope=5, RescaleIntercept=9)
    assert same(load_image(path, as_mask=True), mask)


# ---- anything bad ----

def test_a_decoder_that_panics_is_a_bad_file_and_ctrl_c_is_not(tmp_path, monkeypatch):
    path = save_dicom(tmp_path / "a.dcm", drawn(8, 9))

    class PanicException(BaseException):  # of decoders that are written in Rust
        pass

    def decode(*args):
        raise raised
    monkeypatch.setattr(dicom, "_decode", decode)
    raised = PanicException("index out of\nbounds")
    refused(path, r"cannot be read as an image \(PanicException: index out of bounds\)")
    raised = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        load_image(path)


@pytest.mark.filterwarnings("ignore")
def test_a_bad_file_of_any_kind_is_one_line_with_its_name(tmp_path):
    """Cut, empty, overwritten at random: UserError, or an image that promises what others do."""
    np.save(tmp_path / "a.npy", drawn(8, 9))
    np.savez_compressed(tmp_path / "a.npz", image=drawn(8, 9))
    save_dicom(tmp_path / "a.dcm", drawn(8, 9))
    picture = Image.fromarray(drawn(16, 16, 3, dtype=np.uint8, high=256))
    for ending in (".png", ".jpg", ".tif", ".gif", ".webp", ".bmp", ".pgm"):
        picture.save(tmp_path / f"a{ending}")
    (tmp_path / "a.nii").write_bytes(struct.pack("<i", 348) + bytes(340) + b"n+1\0")
    rng, n_refused = np.random.default_rng(1), 0
    for path in sorted(tmp_path.glob("a.*")):
        content = path.read_bytes()
        bad = [content[:len(content) // 2], b"", b"<html>", content[:20]]
        for _ in range(12):
            changed = np.frombuffer(content, np.uint8).copy()
            changed[rng.integers(0, len(changed), 6)] = rng.integers(0, 256, 6)
            bad.append(changed.tobytes())
        for as_mask in (False, True):
            for content in bad:
                path.write_bytes(content)
                try:
                    image = load_image(str(path), as_mask=as_mask, max_image_pixels=10**6)
                    assert image.ndim == 3 and np.isfinite(image).all()
                except UserError as error:
                    assert re.match(re.escape(str(path)), str(error)) and "\n" not in str(error)
                    n_refused += 1
    assert n_refused > 100
