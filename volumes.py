"""Every image below a folder, and the volumes that they belong to.

list_images finds (file, number of the image in it), volume, position in mm, patient. DICOM files
are sorted into series. open_volume gives the slices of a volume; it decodes them once into one
array in the cache, unless the file can be mapped as it is.
"""
import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import operator
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

import dicom
from configurator import UserError
from formats import (ANIMATIONS, INSTALL_NIFTI, Nifti, array_axes, axes_in_words,
                     file_kind, needs_tifffile, open_array, open_tiff)
from run_folder import part_of, remove_dead_parts

LOCALIZER = re.compile(r"locali[sz]er|scout|topogram|scanogram|surview|survey")

# ---- the list of all images ----

@dataclasses.dataclass
class Listing:
    """Every image of some files, M of them in V volumes, slices in their order.

    names [M] bytes, numbers [M] int32: the file below root, the number of the image in it;
    volume [M] int32: -1 = a picture of its own; position_mm [M] float32: along the normal of the
    image (row times column: axial slices go to the head), NaN = unknown; spacing_mm [V,3] float32:
    slice, row, column, NaN = unknown; sides [V,2] int32: height, width; groups [V] str: hash of the
    patient, '' = unknown; left_out: Counter of reasons; kinds: Counter of images; notes: sentences.
    """
    names: np.ndarray
    numbers: np.ndarray
    volume: np.ndarray
    position_mm: np.ndarray
    spacing_mm: np.ndarray
    sides: np.ndarray
    groups: np.ndarray
    left_out: collections.Counter
    kinds: collections.Counter
    notes: list


# slices: [(file, number, position)]; spacing [3] or None for a picture; note: (sentence, example)
Volume = collections.namedtuple("Volume", "slices spacing sides group kind note",
                                defaults=((0, 0), "", "picture", None))
ALONE = Volume([(0, np.nan)], None)
UNKNOWN = (np.nan, np.nan, np.nan)


def list_images(root, names, settings):
    """Listing of files below a folder.

    Files are opened by 16 threads, headers only. Pictures of one image (.png, .jpg, ...) are not
    opened. What cannot be read stays in the list as a picture, so that reading it names it.
    Args: names: file names below root, bytes or str; settings: dict or namespace of
      series: '' = all DICOM files must have one modality; else modalities or parts of the series'
        description, separated by commas;
      volume_axis: -1 = the rules of array_axes and Nifti; volume_index: the one volume that is
        taken of a NIfTI file of several, -1 = such files are left out;
      slice_step_mm: slices of a volume are at least that far apart, 0 = all.
    Raises UserError if DICOM files have several modalities and `series` names none, or if `series`
    fits to no file.
    """
    settings = settings if isinstance(settings, dict) else vars(settings)
    axis, index = settings.get("volume_axis", -1), settings.get("volume_index", -1)
    names = [os.fsencode(name) for name in names]
    left_out, notes = collections.Counter(), collections.Counter()

    def inspect_block(start):
        return [_inspect(os.path.join(root, os.fsdecode(name)), axis, index)
                for name in names[start:start + 256]]

    volumes, pictures, dicoms = [], [], []
    with ThreadPoolExecutor(16) as pool:
        blocks = pool.map(inspect_block, range(0, len(names), 256))
        for name, record in zip(names, itertools.chain.from_iterable(blocks)):
            if record is ALONE:
                pictures.append(name)
            elif isinstance(record, str):
                left_out[record] += 1
            elif isinstance(record, dicom.Header):
                dicoms.append((name, record))
            else:
                slices = [(name, number, position) for number, position in record.slices]
                volumes.append(record._replace(slices=slices))
    volumes += _dicom_volumes(root, dicoms, settings.get("series", ""), left_out, notes)
    return _as_listing(volumes, pictures, settings.get("slice_step_mm", 0), left_out, notes)


def _inspect(path, volume_axis, volume_index):
    """What a file holds, from its header: a Volume, whose slices are (number, position); or a
    dicom.Header; or, as text, the reason why the file is left out."""
    kind = file_kind(path)
    if not kind:
        return os.path.splitext(path)[1].lower() or "no ending"
    if kind == "dicom" and importlib.util.find_spec("pydicom") is None:
        return f"DICOM not read: {dicom.INSTALL}"
    if kind == "nifti" and importlib.util.find_spec("nibabel") is None:
        return f"NIfTI not read: {INSTALL_NIFTI}"
    try:
        if kind == "dicom":
            header = dicom.read_header(path)
            if header.kind == "DICOMDIR":
                return "DICOMDIR"
            return header if header.has_pixels else "DICOM without pixels"
        if kind == "nifti":
            return _inspect_nifti(Nifti(path, volume_axis), volume_index)
        if kind == "array":
            return _inspect_array(path, volume_axis)
        return _inspect_picture(path)
    except Exception:  # reading it raises the same, with its name
        return ALONE


def _inspect_nifti(nifti, volume_index):
    n_slices = len(nifti.positions)
    if nifti.n_volumes > 1 and volume_index < 0:
        return "NIfTI of several volumes (--volume_index=0 takes the first)"
    first = max(0, volume_index) if nifti.n_volumes > 1 else 0
    if first >= nifti.n_volumes:
        return f"NIfTI without a volume {first}"
    slices = [(first * n_slices + k, nifti.positions[k]) for k in range(n_slices)]
    note = (f"NIfTI: {nifti.plane} slices (--volume_axis sets it)", "")
    return Volume(slices, nifti.spacing, nifti.sides, kind="NIfTI", note=note)


def _inspect_array(path, volume_axis):
    n, _, shape = open_array(path, volume_axis, is_mapped=True)
    if len(shape) < 3:
        return ALONE
    sentence = f"arrays: {axes_in_words(array_axes(shape, volume_axis))} (--volume_axis sets it)"
    note = (sentence, f"such as {list(shape)}")
    if n == 1:
        return ALONE._replace(note=note)
    return _stack(n, "array", note)


def _inspect_picture(path):
    name, note = path.lower(), None
    if name.endswith((".tif", ".tiff")) and needs_tifffile(path):
        with open_tiff(path) as (n, _, axes):
            kind, note = "TIFF page", (f"TIFF: axes {axes}", "")
    elif name.endswith(ANIMATIONS):
        with Image.open(path) as picture:
            kind, n = "frame", getattr(picture, "n_frames", 1)
    else:
        return ALONE
    return _stack(n, kind, note) if n > 1 else ALONE


def _stack(n, kind, note):
    """A Volume of n images of which nobody knows where they lie."""
    slices = [(number, np.nan) for number in range(n)]
    return Volume(slices, UNKNOWN, kind=kind, note=note)


# ---- DICOM series ----

def _dicom_volumes(root, files, wanted, left_out, notes):
    """Volumes of DICOM files [(name, header)]: one for each orientation, size, phase of a series.

    Left out and counted: localizers, copies of an image, segmentations beside other images, series
    that `wanted` does not name.
    """
    by_series = collections.defaultdict(list)
    for name, header in sorted(files, key=lambda item: item[0]):
        by_series[header.series].append((name, header))
    series = []
    for part in by_series.values():
        first = part[0][1]
        series.append(Series(first.kind, first.description, part))
    series = _choose_series(root, series, wanted, left_out, notes)
    volumes = []
    for part in series:
        volumes += _sort_series(part, left_out)
    return volumes


Series = collections.namedtuple("Series", "kind description files")


def _choose_series(root, series, wanted, left_out, notes):
    """The series that the key `series` names, or all if they have one modality."""
    kinds = collections.Counter(part.kind for part in series)
    if not wanted and len(kinds) > 1 and kinds.pop("SEG", 0):
        left_out["DICOM segmentation"] += sum(len(part.files) for part in series
                                              if part.kind == "SEG")
        series = [part for part in series if part.kind != "SEG"]
    descriptions = collections.Counter(part.description for part in series)
    shown = ", ".join(f"{text!r} {n}" for text, n in descriptions.most_common(8))
    found = ", ".join(f"{kind} {n}" for kind, n in kinds.most_common())
    if not wanted and len(kinds) > 1:
        raise UserError(f"dataset_path={root!r}: DICOM series of several modalities: {found}; set "
                        f"--series to one of them, or to a part of a description: {shown}")
    terms = {term.strip() for term in wanted.lower().split(",")}
    terms.discard("")
    chosen = []
    for part in series:
        is_named = part.kind.lower() in terms or any(term in part.description for term in terms)
        if is_named or not terms:
            chosen.append(part)
        else:
            left_out[f"DICOM of other series than --series={wanted}"] += len(part.files)
    if series and not chosen:
        raise UserError(f"dataset_path={root!r}: no DICOM series is {wanted!r}; there are {found}, "
                        f"with the descriptions {shown}")
    if len(chosen) > 1 and len(descriptions) > 1:
        notes[f"DICOM: {found} series; --series takes one of the descriptions {shown}", ""] = 0
    return chosen


def _sort_series(series, left_out):
    """Volumes of a series: its images by orientation, size and phase, each in order."""
    images, seen = [], set()
    for name, header in series.files:
        n = len(header.frames)
        if header.is_localizer or LOCALIZER.search(series.description):
            left_out["localizer"] += n
            continue
        if header.instance in seen:
            left_out["duplicate slice"] += n
            continue
        seen.add(header.instance)
        for frame in range(n):
            images.append(_place(name, header, frame))
    stacks = []  # of parallel images of one size
    for image in images:
        stack = next((stack for stack in stacks if _fit(stack[0], image)), None)
        stacks.append([image]) if stack is None else stack.append(image)
    largest = max(map(len, stacks), default=0)
    volumes = []
    for stack in stacks:
        if len(stack) <= 2 and largest >= 8 and stack[0].normal is not None:
            left_out["localizer"] += len(stack)  # a plan of the slices, across them
            continue
        volumes += [_as_volume(series, phase) for phase in _phases(stack, left_out)]
    return volumes


Placed = collections.namedtuple("Placed", "position number name frame normal sides spacing group "
                                          "n_frames")


def _place(name, header, frame):
    """A frame of a DICOM file where it lies: position along its normal, NaN = unknown."""
    origin, orientation, spacing = header.frames[frame]
    normal, position = None, np.nan
    if orientation is not None:
        normal = dicom.normal(orientation)
    if origin is not None and normal is not None:
        position = round(float(normal @ origin), 3)
    return Placed(position, header.number, name, frame, normal, header.sides, spacing,
                  header.group, len(header.frames))


def _fit(a, b):
    """True if two images have the same size and are parallel."""
    if a.sides != b.sides or (a.normal is None) != (b.normal is None):
        return False
    return a.normal is b.normal or a.normal @ b.normal > 0.99


def _phases(stack, left_out):
    """A stack of parallel images as sorted volumes.

    Images at the same position are copies if their instance number is the same, too; they are left
    out. If every position has as many images (echoes, phases of the heart), each makes a volume.
    Other images at a position that another has are left out.
    """
    stack.sort(key=operator.attrgetter("position", "number", "name", "frame"))
    if not np.isfinite([image.position for image in stack]).all():
        stack.sort(key=operator.attrgetter("number", "name", "frame"))
        return [stack]
    by_position = collections.defaultdict(list)
    for image in stack:
        at = by_position[image.position]
        if at and image.n_frames == 1 and 0 != image.number == at[-1].number:
            left_out["duplicate slice"] += 1
        else:
            at.append(image)
    counts = {len(at) for at in by_position.values()}
    if len(by_position) == 1:  # one slice over time
        return list(by_position.values())
    if len(counts) == 1:
        return [list(phase) for phase in zip(*by_position.values())]
    left_out["duplicate slice"] += sum(len(at) - 1 for at in by_position.values())
    return [[at[0] for at in by_position.values()]]


def _as_volume(series, images):
    thick, *pixel = images[0].spacing
    gaps = np.diff([image.position for image in images])
    if len(gaps) and np.median(gaps) > 0:
        thick = np.median(gaps)
    slices = [(image.name, image.frame, image.position) for image in images]
    first = images[0]
    return Volume(slices, (thick, *pixel), first.sides, first.group, f"DICOM {series.kind}")


# ---- the arrays of a Listing ----

def _as_listing(volumes, pictures, step, left_out, notes):
    """Volumes and pictures [N] bytes in the order of their names."""
    volumes.sort(key=lambda volume: volume.slices[0][:2])
    rows, first_names, of_volume = [], [], []
    spacing, sides, groups, kinds = [], [], [], collections.Counter()
    for volume in volumes:
        slices = _thinned(volume.slices, step)
        left_out["slice closer than slice_step_mm"] += len(volume.slices) - len(slices)
        kinds[volume.kind] += len(slices)
        rows += slices
        first_names += [slices[0][0]] * len(slices)
        of_volume += [-1 if volume.spacing is None else len(groups)] * len(slices)
        if volume.spacing is not None:
            spacing.append(volume.spacing)
            sides.append(volume.sides)
            groups.append(volume.group)
        if volume.note:
            notes[volume.note] += 1
    if pictures:
        kinds["picture"] += len(pictures)
        rows += [(name, 0, np.nan) for name in pictures]
        of_volume += [-1] * len(pictures)
    order = np.argsort(np.array(first_names + pictures, dtype=bytes), kind="stable")
    names = [name for name, _, _ in rows]
    numbers = [number for _, number, _ in rows]
    positions = [position for _, _, position in rows]
    return Listing(
        names=np.array(names, dtype=bytes)[order],
        numbers=np.array(numbers, np.int32)[order],
        volume=np.array(of_volume, np.int32)[order],
        position_mm=np.array(positions, np.float32)[order],
        spacing_mm=np.array(spacing, np.float32).reshape(-1, 3),
        sides=np.array(sides, np.int32).reshape(-1, 2),
        groups=np.array(groups, dtype=str),
        left_out=+left_out, kinds=kinds, notes=_sentences(notes))


def _sentences(notes):
    """Sentences from the Counter of (sentence, example), each with its count and one example."""
    found = {}
    for (sentence, example), n in notes.items():
        known, shown = found.get(sentence, (0, example))
        found[sentence] = known + n, shown
    return [f"{sentence}: {n} file(s) {example}".rstrip() if n else sentence
            for sentence, (n, example) in found.items()]


def _thinned(slices, step):
    """The slices of a volume that lie at least step mm apart, if their positions are known."""
    positions = [position for _, _, position in slices]
    if step <= 0 or not np.isfinite(positions).all():
        return slices
    kept, last = [], -np.inf
    for item in slices:
        if item[2] - last >= step - 1e-3:
            kept.append(item)
            last = item[2]
    return kept


# ---- the slices of a volume ----

def open_volume(paths, numbers, cache_dir, opened, tidy, options):
    """read(k) -> image k of a volume; None if they have to be read one by one.

    The images of a .npy or .nii that lie in one piece are mapped where they are. All others are
    decoded once into cache_dir/volumes/HASH.npy, in the narrowest dtype that holds every value of
    the volume. The hash covers names, sizes and times of the files and the code of the readers.
    Args: paths, numbers: of each image; opened, tidy: of images.py; options: keywords of opened.
    """
    try:
        if read := _in_place(paths, options["volume_axis"]):
            return lambda k: read(numbers[k])
        state = [_code_hash(), str(sorted(options.items()))]
        for path in dict.fromkeys(paths):
            stat = os.stat(path)
            state.append(f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}")
        state += map(str, numbers)
        name = hashlib.sha256(os.fsencode("\n".join(state)))
        target = os.path.join(cache_dir, "volumes", f"{name.hexdigest()[:24]}.npy")

        def images():
            yield from _decode(paths, numbers, opened, tidy, options)
        return decode_once(target, len(paths), images).__getitem__
    except UserError:  # of a damaged file: reading its image raises it
        return None
    except OSError as error:
        warnings.warn(f"volumes cannot be kept in cache_dir={cache_dir!r} ({error}); their slices "
                      "are decoded each time, which is slow", stacklevel=2)
        return None


def _in_place(paths, volume_axis):
    """read(number) of a volume that can be mapped as it is; None if it cannot."""
    path = paths[0]
    if paths[-1] != path or not path.lower().endswith((".npy", ".nii")):
        return None
    if path.lower().endswith(".nii"):
        nifti = Nifti(path, volume_axis)
        return nifti.read if nifti.is_contiguous else None
    _, read, _ = open_array(path, volume_axis, is_mapped=True)
    return read if read(0).flags.c_contiguous else None


def _decode(paths, numbers, opened, tidy, options):
    """Yield the images of a volume; each file is opened once as long as its images follow."""
    rows = zip(paths, numbers)
    for path, group in itertools.groupby(rows, key=lambda row: row[0]):
        with opened(path, **options) as (_, read):
            for _, number in group:
                image = tidy(path, read(number))
                yield dicom.narrow(image) if image.dtype in (np.int32, np.float32) else image


@functools.cache
def _code_hash():
    """Hash of the readers: other code may give other pixels."""
    digest = hashlib.sha256()
    folder = os.path.dirname(os.path.abspath(__file__))
    for name in ("dicom.py", "formats.py", "images.py", "volumes.py"):
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def decode_once(target, n, images):
    """The array [n,...] in the file `target`, mapped; if there is none, it is made from images(),
    which yields n arrays of one shape. Other processes wait, so that a volume is decoded once."""
    with contextlib.suppress(OSError, ValueError):  # none yet, or damaged
        return np.load(target, mmap_mode="r")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with _lock(f"{target}.lock"):
        remove_dead_parts(os.path.dirname(target))
        with contextlib.suppress(OSError, ValueError):
            return np.load(target, mmap_mode="r")
        dtype = None
        while True:
            part = part_of(target)
            try:
                wider = _write(part, n, images(), dtype)
                if wider is None:
                    os.replace(part, target)
                    return np.load(target, mmap_mode="r")
                dtype = wider
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(part)


def _write(path, n, images, dtype):
    """Write n images as a .npy of dtype (None: that of the first). Returns None, or the dtype that
    is needed if an image does not fit into it. A full disk raises OSError."""
    with open(path, "wb") as file:
        shape = None
        for image in images:
            if shape is None:
                shape, dtype = image.shape, dtype or image.dtype
                header = dict(descr=np.lib.format.dtype_to_descr(np.dtype(dtype)),
                              fortran_order=False, shape=(n, *shape))
                np.lib.format.write_array_header_1_0(file, header)
            if image.shape != shape:
                raise UserError(f"images of a volume have the shapes {shape} and {image.shape}")
            needed = np.result_type(dtype, image.dtype)
            if needed != dtype:
                return np.float32 if needed == np.float64 else needed
            file.write(image.astype(dtype, copy=False).tobytes())
        file.flush()
        os.fsync(file.fileno())
    return None


@contextlib.contextmanager
def _lock(path):
    """One process at a time holds the lock of this name; without locks on a disk there is none."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.remove(path)
