"""Every image below a folder: series, NIfTI, stacks; order, places, patients; the cache."""
import collections
import multiprocessing
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import dicom
import volumes
from configurator import UserError
from images import ImageFiles, load_image
from test_images import drawn, items, same, save_dicom
from volumes import list_images

AXIAL, CORONAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)


def listed(root, **settings):
    """The Listing of all files below a folder."""
    root, names = str(root), []
    for folder, _, files in os.walk(root):
        names += [os.path.relpath(os.path.join(folder, file), root) for file in files]
    return list_images(root, sorted(names, key=hash), SimpleNamespace(**settings))


def opened_all(root, listing, cache_dir="", **options):
    return ImageFiles(str(root), listing.names, numbers=listing.numbers, volumes=listing.volume,
                      cache_dir=str(cache_dir), **options)


def save_series(folder, volume, order=None, orientation=AXIAL, spacing=2.5, series="1", patient="P",
                **elements):
    """Write slices [D,H,W], stored = HU + 1024, as files named by `order`, default their numbers
    reversed. Returns the paths."""
    os.makedirs(folder, exist_ok=True)
    across, paths = np.cross(orientation[:3], orientation[3:]), []
    order = range(len(volume))[::-1] if order is None else order
    for i, (image, name) in enumerate(zip(volume, order)):
        place = dict(ImagePositionPatient=list(map(float, across * i * spacing)),
                     ImageOrientationPatient=list(map(float, orientation)))
        values = dict(SeriesInstanceUID=f"1.2.{series}", SOPInstanceUID=f"1.2.{series}.{i + 1}",
                      PatientID=patient, PixelSpacing=[0.7, 0.8], SliceThickness=9,
                      InstanceNumber=int(name) + 1, RescaleIntercept=-1024, RescaleSlope=1,
                      SeriesDescription="AX 5mm", PatientName="Doe^Jane")
        path = os.path.join(folder, f"IM{int(name):04d}")
        paths.append(save_dicom(path, image + np.int16(1024), **{**values, **place, **elements}))
    return paths


@pytest.fixture
def body():
    return drawn(6, 9, 7, dtype=np.int16, low=-1000, high=2000)


# ---- series ----

@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, SAGITTAL])
def test_slices_of_a_series_are_ordered_by_their_place(tmp_path, body, orientation):
    """Not by file name, nor by number; in any tree; without endings."""
    save_series(tmp_path / "a" / "b", body, (3, 0, 5, 1, 4, 2), orientation)
    listing = listed(tmp_path)
    assert len(listing.names) == 6 and (listing.volume == 0).all()
    across = np.cross(orientation[:3], orientation[3:])
    assert np.allclose(listing.position_mm, 2.5 * np.arange(6)) and np.abs(across).sum() == 1
    assert np.allclose(listing.spacing_mm, [[2.5, 0.7, 0.8]])
    assert listing.sides.tolist() == [[9, 7]] and listing.kinds == {"DICOM CT": 6}
    assert not listing.left_out
    files = opened_all(tmp_path, listing)
    assert all(same(files[i], body[i]) for i in range(6))


def test_patients_are_hashed_and_nothing_of_them_is_in_the_listing(tmp_path, body):
    save_series(tmp_path / "a", body, series="7", patient="MUSTER-4711")
    save_series(tmp_path / "b", body, series="8", patient="MUSTER-4711")
    save_series(tmp_path / "c", body, series="9", patient="")
    listing = listed(tmp_path)
    one, two, three = listing.groups
    assert one == two == dicom.hash_patient("MUSTER-4711 ") and len(one) == 12 and three == ""
    text = repr([value for value in vars(listing).values()])
    assert "MUSTER" not in text and "4711" not in text and "Jane" not in text


def test_localizers_duplicates_and_files_without_pixels_are_counted(tmp_path, body):
    paths = save_series(tmp_path / "a", np.concatenate([body, body]))
    shutil.copy(paths[2], tmp_path / "copy.dcm")
    import pydicom
    again = pydicom.dcmread(paths[3])
    again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = "1.2.77"
    again.save_as(tmp_path / "again.dcm")  # sent twice: another UID, the same place and number
    save_series(tmp_path / "b", body[:1], orientation=SAGITTAL, SOPInstanceUID="1.2.5.5")
    save_series(tmp_path / "c", body[:2], series="2", ImageType=["ORIGINAL", "X", "LOCALIZER"])
    save_series(tmp_path / "d", body[:2], series="3", SeriesDescription="Topogram 0.6")
    report = pydicom.dcmread(paths[0])
    del report.PixelData, report.Rows
    report.SOPInstanceUID, report.Modality = "1.2.78", "RTSTRUCT"
    report.save_as(tmp_path / "RS.dcm")
    del again.PixelData  # a header alone
    again.SOPInstanceUID = "1.2.79"
    again.save_as(tmp_path / "header.dcm")
    (tmp_path / "notes.TXT").write_text("hello")
    (tmp_path / "README").write_text("hello")
    listing = listed(tmp_path)
    assert len(listing.names) == 12 and len(listing.groups) == 1
    assert listing.left_out == {"duplicate slice": 2, "localizer": 5, "DICOM without pixels": 2,
                                ".txt": 1, "no ending": 1}


def test_a_dicomdir_is_left_out(tmp_path, body):
    pytest.importorskip("pydicom")
    from pydicom.fileset import FileSet
    paths = save_series(tmp_path / "a", body, StudyInstanceUID="1.2.3", StudyDate="20200101",
                        StudyTime="10", StudyID="1", SeriesNumber=1)
    file_set = FileSet()
    for path in paths:
        file_set.add(path)
    file_set.write(tmp_path / "cd")
    listing = listed(tmp_path / "cd")
    assert len(listing.names) == 6 and listing.left_out == {"DICOMDIR": 1}
    files = opened_all(tmp_path / "cd", listing)
    assert all(same(files[i], body[i]) for i in range(6))


def test_a_study_of_several_modalities_needs_the_key(tmp_path, body):
    save_series(tmp_path / "a", body)
    save_series(tmp_path / "b", body, series="2", Modality="PT", SeriesDescription="PET AC")
    save_series(tmp_path / "c", body[:3], series="3", SeriesDescription="COR mpr")
    with pytest.raises(UserError, match=r"several modalities: CT 2, PT 1; set --series to one of "
                                        r"them, or to a part of a description: 'ax 5mm' 1"):
        listed(tmp_path)
    for text, n, n_left in (("CT", 9, 6), ("pt", 6, 9), ("cor", 3, 12), ("PT, mpr", 9, 6)):
        listing = listed(tmp_path, series=text)
        assert len(listing.names) == n
        assert listing.left_out == {f"DICOM of other series than --series={text}": n_left}
    with pytest.raises(UserError, match="no DICOM series is 'T2'; there are CT 2, PT 1, with the"):
        listed(tmp_path, series="T2")
    shutil.rmtree(tmp_path / "b")
    listing = listed(tmp_path)
    assert len(listing.names) == 9 and len(listing.groups) == 2
    assert listing.notes == ["DICOM: CT 2 series; --series takes one of the descriptions "
                             "'ax 5mm' 1, 'cor mpr' 1"]
    save_series(tmp_path / "s", drawn(2, 9, 7, high=2, dtype=np.int16), series="4", Modality="SEG")
    listing = listed(tmp_path)
    assert len(listing.names) == 9 and listing.left_out == {"DICOM segmentation": 2}
    assert len(listed(tmp_path / "s").names) == 2


def test_phases_of_a_series_are_volumes(tmp_path, body):
    """Two images at every place with numbers of their own: first phase, second phase."""
    save_series(tmp_path / "a", body)
    save_series(tmp_path / "b", body + np.int16(5), order=range(11, 5, -1), series="1")
    import pydicom
    for i, path in enumerate(sorted((tmp_path / "b").iterdir())):
        file = pydicom.dcmread(path)
        file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = f"1.2.99.{i}"
        file.save_as(path)
    listing = listed(tmp_path)
    assert listing.volume.tolist() == [0] * 6 + [1] * 6 and not listing.left_out
    files = opened_all(tmp_path, listing)
    assert all(same(files[i], body[i]) and same(files[6 + i], body[i] + np.int16(5))
               for i in range(6))


def test_frames_of_an_enhanced_file_are_ordered_by_their_place(tmp_path, body):
    pydicom = pytest.importorskip("pydicom")
    order, groups = (3, 0, 5, 1, 4, 2), []
    for i in order:
        groups.append(items(
            PlanePositionSequence=items(ImagePositionPatient=[0, 0, 3.0 * i]),
            PixelValueTransformationSequence=items(RescaleSlope=1, RescaleIntercept=-1024 + i)))
    stored = body[list(order)] + np.int16(1024) - np.array(order, np.int16)[:, None, None]
    shared = items(PlaneOrientationSequence=items(ImageOrientationPatient=list(AXIAL)),
                   PixelMeasuresSequence=items(PixelSpacing=[0.7, 0.8], SliceThickness=3))
    save_dicom(tmp_path / "a.dcm", stored, SeriesInstanceUID="1.2.1", PatientID="P",
               SharedFunctionalGroupsSequence=shared,
               PerFrameFunctionalGroupsSequence=pydicom.Sequence(group[0] for group in groups))
    listing = listed(tmp_path)
    assert listing.numbers.tolist() == np.argsort(order).tolist()
    assert listing.position_mm.tolist() == [0, 3, 6, 9, 12, 15]
    assert np.allclose(listing.spacing_mm, [[3, 0.7, 0.8]])
    for cache_dir in ("", tmp_path / "cache"):
        files = opened_all(tmp_path, listing, cache_dir)
        assert all(same(files[i], body[i]) for i in range(6))


def test_slices_at_a_distance(tmp_path, body):
    save_series(tmp_path / "a", body)
    listing = listed(tmp_path, slice_step_mm=5.0)
    assert listing.position_mm.tolist() == [0, 5, 10]
    assert listing.left_out == {"slice closer than slice_step_mm": 3}
    np.save(tmp_path / "b.npy", drawn(6, 9, 9))  # nobody knows where these lie
    assert len(listed(tmp_path, slice_step_mm=5.0).names) == 9


@pytest.mark.filterwarnings("ignore")
def test_the_quick_header_says_what_pydicom_says(tmp_path, body, monkeypatch):
    """On pydicom's own files, and on sequences of defined and undefined length."""
    pydicom = pytest.importorskip("pydicom")
    paths = save_series(tmp_path, body)
    file = pydicom.dcmread(paths[0])
    inner = items(CodeValue="1", PurposeOfReferenceCodeSequence=items(CodeValue="2"))
    for path, is_undefined, is_implicit in zip(paths, (0, 1, 0, 1), (0, 0, 1, 1)):
        syntax = pydicom.uid.ExplicitVRLittleEndian
        if is_implicit:
            syntax = pydicom.uid.ImplicitVRLittleEndian
        file = pydicom.dcmread(path)
        file.file_meta.TransferSyntaxUID = syntax
        file.SourceImageSequence = inner
        for item in (file, inner[0]):
            name = "SourceImageSequence" if item is file else "PurposeOfReferenceCodeSequence"
            item[name].is_undefined_length = bool(is_undefined)
            item.is_undefined_length_sequence_item = bool(is_undefined)
        file.save_as(path, implicit_vr=bool(is_implicit), little_endian=True)
        assert dicom._quick_header(path)[0]["SeriesInstanceUID"] == "1.2.1"
    folder = os.path.dirname(pydicom.data.get_testdata_file("CT_small.dcm"))
    paths += [os.path.join(folder, name) for name in sorted(os.listdir(folder))[:60]
              if name.endswith(".dcm") and name != "badVR.dcm"]
    n_quick, quick = 0, {}
    for path in paths:
        found = dicom._quick_header(path)
        if found is not None:
            n_quick += 1
            quick[path] = dicom.read_header(path)
    monkeypatch.setattr(dicom, "_quick_header", lambda path: None)
    for path, header in quick.items():
        assert repr(dicom.read_header(path)) == repr(header), path
    assert n_quick > 20


# ---- NIfTI ----

def save_nifti(path, voxels, spacing=(1, 1, 3), codes="LPS", slope=None, inter=None):
    """Write voxels [L,P,S(,T)], whose axes run to the left, back and head, with axes as `codes`
    says."""
    nibabel = pytest.importorskip("nibabel")
    lps, wanted = (nibabel.orientations.axcodes2ornt(code) for code in ("LPS", codes))
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])  # NIfTI's world is RAS
    affine[:3, 3] = (10, 20, 30)
    turn = nibabel.orientations.ornt_transform(lps, wanted)
    stored = nibabel.orientations.apply_orientation(voxels, turn)
    affine = affine @ nibabel.orientations.inv_ornt_aff(turn, voxels.shape[:3])
    image = nibabel.Nifti1Image(stored, affine)
    if slope is not None:
        image.header.set_slope_inter(slope, inter)
    nibabel.save(image, path)
    return str(path)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "ASL", "SRP"])
def test_any_orientation_of_nifti_gives_the_same_slices(tmp_path, codes, ending):
    voxels = drawn(7, 9, 6, dtype=np.int16, low=-1000)
    path = save_nifti(tmp_path / f"a{ending}", voxels, codes=codes)
    for k in range(6):  # axial: front above, left on the right
        assert same(load_image(path, number=k), voxels[:, :, k].T)
        assert same(load_image(path, number=k, volume_axis=1), voxels[:, k, ::-1].T)
        assert same(load_image(path, number=k, volume_axis=0), voxels[6 - k, :, ::-1].T)
    listing = listed(tmp_path)
    assert np.allclose(listing.position_mm, 30 + 3 * np.arange(6))
    assert listing.spacing_mm.tolist() == [[3, 1, 1]] and listing.sides.tolist() == [[9, 7]]
    assert listing.notes == ["NIfTI: axial slices (--volume_axis sets it): 1 file(s)"]
    listing = listed(tmp_path, volume_axis=0)  # x runs from -10 to the left, slices to the right
    assert np.allclose(listing.position_mm, np.arange(7) + 10 - 6)
    assert listing.spacing_mm.tolist() == [[1, 3, 1]] and listing.sides.tolist() == [[6, 9]]
    files = opened_all(tmp_path, listing, tmp_path / "cache", volume_axis=0)
    assert same(files[2], voxels[4, :, ::-1].T)


def test_a_dicom_series_and_its_nifti_hold_the_same_images(tmp_path):
    """In each plane: pixels, order, positions and spacing."""
    voxels = drawn(7, 9, 6, dtype=np.int16, low=-1000)
    planes = {AXIAL: voxels.transpose(2, 1, 0), CORONAL: voxels[:, :, ::-1].transpose(1, 2, 0),
              SAGITTAL: voxels[::-1, :, ::-1].transpose(0, 2, 1)}
    for axis, (orientation, slices) in enumerate(reversed(planes.items())):
        spacing = [0.7, 0.7, 0.7]
        spacing[axis] = 2.5
        root = tmp_path / str(axis)
        save_series(root / "a", slices, orientation=orientation, PixelSpacing=[0.7, 0.7])
        save_nifti(root / "b.nii.gz", voxels, spacing, "RAS")
        listing = listed(root)
        n = len(slices)
        assert len(listing.names) == 2 * n and listing.volume.tolist() == [0] * n + [1] * n
        assert (listing.spacing_mm[0] == listing.spacing_mm[1]).all()
        steps = np.diff(listing.position_mm.reshape(2, n), axis=1)
        assert np.allclose(steps, 2.5, atol=1e-4)
        files = opened_all(root, listing)
        for k in range(n):
            assert same(files[k], slices[k]) and same(files[n + k], slices[k])


def test_nifti_comes_in_its_units(tmp_path):
    voxels = drawn(7, 9, 6, dtype=np.int16, low=-1000)
    for slope, inter, dtype in ((1, -1024, np.int16), (0.5, 0, np.float32)):
        path = str(tmp_path / "a.nii")
        save_nifti(path, voxels)
        with open(path, "r+b") as file:
            file.seek(112)
            file.write(np.array([slope, inter], "<f4").tobytes())
        expected = (voxels[:, :, 2].T * slope + inter).astype(dtype)
        assert same(load_image(path, number=2), expected)
        assert same(opened_all(tmp_path, listed(tmp_path), tmp_path / "cache")[2], expected)
    import nibabel
    nibabel.save(nibabel.Nifti1Image(voxels[..., 0].astype(">f8"), np.eye(4)), tmp_path / "b.nii")
    assert load_image(str(tmp_path / "b.nii")).shape == (9, 7, 1)


def test_nifti_of_several_volumes_needs_the_key(tmp_path):
    voxels = drawn(7, 9, 6, 3, dtype=np.int16)
    save_nifti(tmp_path / "a.nii.gz", voxels)
    save_nifti(tmp_path / "b.nii.gz", voxels[..., :1])
    listing = listed(tmp_path)
    assert set(listing.names) == {b"b.nii.gz"}
    assert listing.left_out == {"NIfTI of several volumes (--volume_index=0 takes the first)": 1}
    listing = listed(tmp_path, volume_index=1)
    for cache_dir in ("", tmp_path / "cache"):
        files = opened_all(tmp_path, listing, cache_dir)
        assert len(files) == 12 and same(files[2], voxels[:, :, 2, 1].T)
        assert same(files[8], voxels[:, :, 2, 0].T)
    assert "NIfTI without a volume 3" in listed(tmp_path, volume_index=3).left_out


def test_nifti_without_its_ending_and_nifti_of_colours(tmp_path):
    voxels = drawn(7, 9, 6, dtype=np.uint8)
    os.rename(save_nifti(tmp_path / "a.nii", voxels), tmp_path / "scan")
    assert same(load_image(str(tmp_path / "scan"), number=3), voxels[:, :, 3].T)
    rgb = drawn(7, 9, 6, 3, dtype=np.uint8)
    fields = np.ascontiguousarray(rgb).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    path = save_nifti(tmp_path / "c.nii", fields)
    assert same(load_image(path, number=3), rgb[:, :, 3].transpose(1, 0, 2))


# ---- other files ----

def test_stacks_arrays_frames_and_pictures_are_listed(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    stack = drawn(5, 13, 9)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    np.save(tmp_path / "b.npy", stack[:, :9])
    np.save(tmp_path / "c.npy", stack[0, :, :3])
    frames = [Image.fromarray(np.full((9, 9, 3), 40 * k, np.uint8)) for k in range(4)]
    frames[0].save(tmp_path / "d.gif", save_all=True, append_images=frames[1:])
    for name in ("e.png", "f.gif", "g.tif", "h.webp"):
        frames[1].save(tmp_path / name)
    (tmp_path / "i.jpg").write_bytes(b"damaged")
    (tmp_path / "j.dcm").write_bytes(b"damaged")
    np.save(tmp_path / "k.npy", np.ones((5, 5, 5, 5)))
    listing = listed(tmp_path)
    counts = collections.Counter(name.decode() for name in listing.names)
    assert counts == {"a.tif": 5, "b.npy": 5, "d.gif": 4, **dict.fromkeys(
        ("c.npy", "e.png", "f.gif", "g.tif", "h.webp", "i.jpg", "j.dcm", "k.npy"), 1)}
    assert sorted(set(listing.volume.tolist())) == [-1, 0, 1, 2] and len(listing.groups) == 3
    assert np.isnan(listing.position_mm).all() and np.isnan(listing.spacing_mm).all()
    assert listing.kinds == {"TIFF page": 5, "array": 5, "frame": 4, "picture": 8}
    assert sorted(listing.notes) == ["TIFF: axes QYX: 1 file(s)",
                                     "arrays: slices lie along axis 0 (--volume_axis sets it): "
                                     "1 file(s) such as [5, 9, 9]"]
    files = opened_all(tmp_path, listing, tmp_path / "cache")
    assert same(files[3], stack[3]) and same(files[7], stack[2, :9])
    assert [files[11 + k].max() for k in range(4)] == [0, 40, 80, 120]
    for name in (b"i.jpg", b"j.dcm", b"k.npy"):
        with pytest.raises(UserError, match=name.decode()):
            files[listing.names.tolist().index(name)]


def test_what_a_missing_package_would_read_is_counted(tmp_path, body, monkeypatch):
    save_series(tmp_path / "a", body)
    save_nifti(tmp_path / "b.nii.gz", body)
    for package in ("pydicom", "nibabel"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    listing = listed(tmp_path)
    assert len(listing.names) == 0 and listing.position_mm.shape == (0,)
    assert listing.left_out == {"DICOM not read: pip install pydicom": 6,
                                "NIfTI not read: pip install nibabel": 1}
    with pytest.raises(UserError, match="reading NIfTI needs nibabel; pip install nibabel"):
        load_image(str(tmp_path / "b.nii.gz"))


# ---- the cache ----

def test_a_volume_is_decoded_once(tmp_path, body, monkeypatch):
    save_series(tmp_path / "in" / "a", body)
    listing, calls = listed(tmp_path / "in"), []
    decode = dicom._decode
    monkeypatch.setattr(dicom, "_decode", lambda *a: calls.append(a[0]) or decode(*a))
    for n_calls in (6, 6):
        files = opened_all(tmp_path / "in", listing, tmp_path / "cache")
        for _ in range(2):
            assert all(same(files[i], body[i]) for i in range(6))
        assert len(calls) == n_calls
    cached = os.listdir(tmp_path / "cache" / "volumes")
    assert len(cached) == 1 and cached[0].endswith(".npy")
    array = np.load(tmp_path / "cache" / "volumes" / cached[0], mmap_mode="r")
    assert array.shape == (6, 9, 7) and array.dtype == np.int16
    arrived = pickle.loads(pickle.dumps(files))
    assert len(pickle.dumps(files)) < 3000 and same(arrived[4], body[4])
    assert len(calls) == 6
    os.utime(files.path(2))  # a changed file
    assert same(opened_all(tmp_path / "in", listing, tmp_path / "cache")[0], body[0])
    assert len(calls) == 12
    for name in os.listdir(tmp_path / "cache" / "volumes"):
        (tmp_path / "cache" / "volumes" / name).write_bytes(b"damaged")
    assert same(opened_all(tmp_path / "in", listing, tmp_path / "cache")[1], body[1])
    assert len(calls) == 18


def test_the_narrowest_dtype_that_holds_every_slice(tmp_path, body):
    """The first slices are whole numbers, a later one is not: the volume is float32."""
    for intercept, name in ((0, "a"), (0.25, "b")):
        paths = save_series(tmp_path / name, body, series=name.encode().hex())
        import pydicom
        file = pydicom.dcmread(paths[4])
        file.RescaleIntercept = intercept
        file.save_as(paths[4])
        listing = listed(tmp_path / name)
        files = opened_all(tmp_path / name, listing, tmp_path / "cache")
        dtype = np.float32 if intercept else np.int16
        assert same(files[0], body[0].astype(dtype)), name
        assert same(files[4], (body[4] + 1024 + intercept).astype(dtype))
    np.savez(tmp_path / "b" / "c.npz", np.float64(body))
    listing = listed(tmp_path / "b")
    k = listing.names.tolist().index(b"c.npz")
    files = opened_all(tmp_path / "b", listing, tmp_path / "cache", volume_axis=0)
    assert files[k].dtype == np.int16


def test_files_in_one_piece_are_mapped_where_they_are(tmp_path, body):
    np.save(tmp_path / "a.npy", body)
    save_nifti(tmp_path / "b.nii", body)
    save_nifti(tmp_path / "c.nii", body, codes="PIR")  # its axial slices are scattered
    np.save(tmp_path / "d.npy", drawn(9, 9, 20))
    listing = listed(tmp_path)
    files = opened_all(tmp_path, listing, tmp_path / "cache")
    for i in range(len(files)):
        assert same(files[i], load_image(files.path(i), number=int(listing.numbers[i]))[..., 0])
    assert len(os.listdir(tmp_path / "cache" / "volumes")) == 2


def test_a_damaged_slice_spoils_no_other(tmp_path, body):
    paths = save_series(tmp_path / "in", body)
    listing = listed(tmp_path / "in")
    with open(paths[3], "r+b") as file:
        file.truncate(os.path.getsize(paths[3]) - 50)
    files = opened_all(tmp_path / "in", listing, tmp_path / "cache")
    for i in (0, 1, 2, 4, 5):
        assert same(files[i], body[i])
    with pytest.raises(UserError, match=os.path.basename(paths[3])):
        files[3]
    assert os.listdir(tmp_path / "cache" / "volumes") == []


def test_a_full_disk_is_said_and_slices_are_read_anyway(tmp_path, body, monkeypatch):
    save_series(tmp_path / "in", body)
    listing = listed(tmp_path / "in")

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(volumes, "_write", full)
    files = opened_all(tmp_path / "in", listing, tmp_path / "cache")
    with pytest.warns(UserWarning, match="volumes cannot be kept in cache_dir=.*No space left"):
        assert same(files[0], body[0])
    assert same(files[5], body[5])


def _decode_slowly(folder, names, numbers, volume, cache, queue):
    import time
    write = volumes._write

    def slowly(*args):
        queue.put("decoded")
        time.sleep(0.3)
        return write(*args)
    volumes._write = slowly
    files = ImageFiles(folder, names, numbers=numbers, volumes=volume, cache_dir=cache)
    queue.put(int(files[2].sum()))


def test_processes_that_want_the_same_volume_wait_for_one_of_them(tmp_path, body):
    pytest.importorskip("fcntl")
    save_series(tmp_path / "in", body)
    listing = listed(tmp_path / "in")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    args = (str(tmp_path / "in"), listing.names, listing.numbers, listing.volume,
            str(tmp_path / "cache"), queue)
    processes = [context.Process(target=_decode_slowly, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=30) for _ in range(4)]
    for process in processes:
        process.join()
    assert sorted(map(str, found)) == sorted(["decoded"] + [str(int(body[2].sum()))] * 3)
    assert len(os.listdir(tmp_path / "cache" / "volumes")) == 1


def test_masks_of_a_volume_follow_its_slices(tmp_path, body):
    """A mask as NIfTI goes through the same geometry, and a slice may have none."""
    mask = (body > 500).astype(np.uint8)
    save_nifti(tmp_path / "a.nii.gz", body, codes="RAS")
    save_nifti(tmp_path / "a_mask.nii.gz", mask, codes="PIR")
    names, numbers = np.array([b"a_mask.nii.gz"] * 7), np.arange(7)
    names[3] = b""
    masks = ImageFiles(str(tmp_path), names, as_mask=True, numbers=numbers,
                       volumes=np.zeros(7, int), cache_dir=str(tmp_path / "cache"))
    assert masks[3] is None
    for k in (0, 2, 6):
        image = load_image(str(tmp_path / "a.nii.gz"), number=k)
        assert same(masks[k], (image > 500).astype(np.uint8))
