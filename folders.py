"""Folders of images and volumes as data sets: their images, classes, groups, masks and splits.

Everything below a folder is read, or counted by kind and said in the log. layouts.py says what the
names of folders and files mean, annotations.py what a table says, which is stronger, volumes.py
which images a file has. The list of images is kept in the cache as long as no directory changes;
but not if there are groups: names of patients stay where they are.
"""
import contextlib
import copy
import glob
import json
import os
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np

from annotations import SeveralMasks, find_masks, read_tables
from archives import SPLITS, make_folder, map_folder, save_arrays, short_hash
from configurator import UserError
from images import ImageFiles, read_boxes
from labels import folder_words
from layouts import (class_level, find_groups, find_labels, group_level_of, note_coco, one_file,
                     place_folders, walk)
from parquet import unpack_parquet
from volumes import list_images


def open_folder(root, settings, file=""):
    """The data set of a folder, or of one file in it.

    Args: settings: namespace of data.READING, cache_dir, num_channels; file: a name in root, '' =
    all of them. Returns: namespace as of archives.open_arrays. Raises UserError without an image.
    """
    index = folder_index(root, settings, file)
    splits = [split for split in SPLITS if f"{split}_images" in index]
    notes = json.loads(str(index["notes"]))
    if all(len(index[f"{split}_images"]) == 0 for split in splits):
        parquet = index["parquet"].tolist()
        if parquet:
            return open_folder(unpack_parquet(root, parquet, settings.cache_dir), settings)
        raise UserError(f"dataset_path={root!r}: no images; looked for pictures (.png, .jpg, .tif, "
                        f"...), .npy, DICOM and NIfTI in it and below: {'; '.join(notes)}")
    files = {split: _image_files(root, index, split, settings) for split in splits}
    num_channels = channels_of(list(files.values()), settings.num_channels)
    for part in files.values():
        part.num_channels = num_channels

    def read(split):
        parts = {key: index.get(f"{split}_{key}")
                 for key in ("groups", "volume", "position_mm", "spacing_mm")}
        masks = masks_of(files[split], index, split, settings)
        return dict(parts, images=files[split], masks=masks)
    labels = {split: index.get(f"{split}_labels") for split in splits}
    return SimpleNamespace(read=read, labels=labels, class_names=index["class_names"].tolist(),
                           mask_names=[], notes=notes)


def channels_of(parts, num_channels):
    """The number of channels to read files with: num_channels, or if it is 0 the most in a sample
    of them. parts: list of ImageFiles. Raises UserError if num_channels is less than that, or if a
    file cannot have so many."""
    native, error, largest = 0, None, None
    for files in parts:
        n = max(2, 32 // len(parts))
        sample = np.linspace(0, len(files) - 1, n).astype(int)
        for i in np.unique(sample) if len(files) else ():
            try:
                channels = files[i].shape[2]
            except UserError as problem:  # it is raised again when the image is used
                error = error or problem
                continue
            if channels > native:
                native, largest = channels, (files, i)
    if not native:
        raise error
    if 0 < num_channels < native:  # grey can be read as RGB, but not RGB as grey
        raise UserError(f"dataset_path={parts[0].root!r}: images have {native} channel(s), "
                        f"num_channels={num_channels}; set --num_channels=0 to take what the data "
                        "has")
    files, i = largest
    files = copy.copy(files)
    files.num_channels = num_channels or native
    return files[i].shape[2]  # an error if it cannot have so many


def _image_files(root, index, split, settings):
    """The ImageFiles of a split's images."""
    return ImageFiles(root, index[f"{split}_images"], numbers=index[f"{split}_numbers"],
                      volumes=index.get(f"{split}_volume"), cache_dir=settings.cache_dir,
                      volume_axis=settings.volume_axis, max_image_pixels=settings.max_image_pixels)


def masks_of(files, index, split, settings):
    """The masks of ImageFiles: mask files, or boxes.json, or None."""
    names = index.get(f"{split}_masks")
    if names is not None and len(names) < len(files):
        raise UserError(f"dataset_path={files.root!r}, split {split!r}: no file in masks/ is named "
                        "like an image in images/; the mask of a.jpg is a.png, a.npy or a_mask.png")
    if names is not None:
        masks = copy.copy(files)
        masks.names, masks.num_channels, masks.as_mask = names, 0, True
        if files.volumes is not None:
            masks.volumes = np.where(names == b"", -1, files.volumes)
            if settings.volume_index > 0:  # of 4-D images: the masks have three axes
                _, first, inverse = np.unique(files.volumes, return_index=True,
                                              return_inverse=True)
                masks.numbers = files.numbers - files.numbers[first][inverse]
        of = index[f"{split}_more_of"]
        more = copy.copy(files)
        more.names, more.num_channels, more.as_mask = index[f"{split}_more_masks"], 0, True
        more.numbers, more.volumes = files.numbers[of], None
        return SeveralMasks(masks, more, of) if len(of) else masks
    top = str(index[f"{split}_top"])
    folder = top
    while True:  # up to the folder of the split
        path = os.path.join(files.root, folder, "boxes.json")
        if os.path.isfile(path):
            names = [os.fsdecode(name) for name in files.names]
            below = [os.path.relpath(name, top or ".") for name in names]
            return read_boxes(path, below, files)
        means = folder_words(os.path.basename(folder))
        if not folder or means and means[0]:
            return None
        folder = os.path.dirname(folder)


# ---- the index of a folder ----

def folder_index(root, settings, file=""):
    """The arrays of list_folder, from the cache as long as no directory changes.

    Asking a thousand directories for their times takes milliseconds. Listing their million files
    takes seconds, on a network disk minutes. Each state of a folder gets an index of its own,
    because a run may still read the last one. If the cache cannot be written, none is kept.
    """
    root = os.path.abspath(root)
    keys = ("series", "volume_axis", "volume_index", "slice_step_mm", "group_level")
    state = f"{root} {file} {[getattr(settings, key) for key in keys]}"
    prefix = os.path.join(settings.cache_dir,
                          f"{os.path.basename(root)}-{short_hash(os.fsencode(state))}")
    for folder in glob.glob(f"{glob.escape(prefix)}-*"):
        if folder.endswith(".part"):  # another process is writing it
            continue
        index = map_folder(folder)
        if np.array_equal(index["times"], _times(index["directories"])):
            return index
    began = time.time_ns()
    index = list_folder(root, settings, file)
    index["times"] = _times(index["directories"])
    # Clocks of disks are coarse: a directory that changed within two seconds before the walk may
    # change again without a new time. Its index is not kept.
    has_groups = any(key.endswith("_groups") for key in index)
    if has_groups or index["times"].max() >= began - 2 * 10**9:
        return index
    folder = f"{prefix}-{short_hash(index['times'].tobytes())}"
    with contextlib.suppress(OSError):
        make_folder(folder, lambda temporary: save_arrays(temporary, index))
        return map_folder(folder)
    return index


def _times(directories):
    """When each directory or table last changed (an entry was added, removed or renamed, or the
    mode changed), [n] int64 in ns; 0 if there is none."""
    times = []
    for path in directories:
        try:
            stat = os.stat(path)
        except OSError:
            times.append(0)
            continue
        times.append(max(stat.st_mtime_ns, stat.st_ctime_ns))  # copying tools set mtime back
    return np.array(times, dtype=np.int64)


def list_folder(root, settings, file=""):
    """Walk through a folder of images, or take one file of it. Returns a dict of arrays:

    {split}_images       [N] of bytes: names below root, in the order of volumes.list_images
    {split}_numbers      [N] int32: number of the image in its file
    {split}_labels       [N] int64, or the texts of a table; absent without classes
    {split}_groups       [N] int64: hashed patients; absent if none is known
    {split}_masks        [N] of bytes: b"" for an image without a mask; [0] if there is a folder of
                         masks, but of no image; absent without masks
    {split}_more_masks, {split}_more_of  [K] further masks, and the image of each
    {split}_volume, {split}_position_mm, {split}_spacing_mm  of volumes.list_images, for volumes
    {split}_top          the folder of the split's images, for boxes.json
    class_names          [c] of str: sorted, those of all splits; [0] without classes of folders
    notes                json: sentences for the log
    parquet              of str: names of parquet files below root
    directories          of bytes: all directories and tables that the result depends on
    """
    found = one_file(file) if file else walk(root)
    note_coco(root, found)
    places = place_folders(found)
    masks, mask_splits = find_masks(root, found, places)
    names, folders = [], []
    for folder, files in found.images.items():
        names += [os.fsencode(os.path.join(folder, file)) for file in files]
        folders += [folder] * len(files)
    order = sorted(range(len(names)), key=names.__getitem__)
    names, folders = [names[i] for i in order], [folders[i] for i in order]
    table = read_tables(root, found.tables, names, places)
    split_of = np.array([places[folder].split for folder in folders], dtype="U5")
    if table.split is not None:
        split_of = np.where(table.split == "", split_of, table.split)
    if (split_of == "").all():
        split_of[:] = "train"
    elif n_left_out := int((split_of == "").sum()):
        found.left_out["image(s) in no split"] += n_left_out

    depends_on = [os.path.join(root, name) for name in (*found.tables, file)]
    depends_on += found.directories
    parquet = sorted(name for name in found.others if name.lower().endswith(".parquet"))
    index = dict(directories=np.array(list(map(os.fsencode, depends_on))),
                 parquet=np.array(parquet, dtype=str))
    rows_of, listings = {}, {}
    for split in [split for split in SPLITS if (split_of == split).any()] or ["train"]:
        rows = np.flatnonzero(split_of == split)
        own_names = np.array([names[i] for i in rows], dtype=bytes)
        listing = listings[split] = list_once(root, own_names, settings, index["directories"])
        rows_of[split] = rows[np.searchsorted(own_names, listing.names)]  # names are sorted
        tops = {places[folders[i]].top for i in rows_of[split]}
        index.update({f"{split}_images": listing.names, f"{split}_numbers": listing.numbers,
                      f"{split}_top": np.array(os.path.commonpath(tops) if tops else "")})
        if (listing.volume >= 0).any():
            for key in ("volume", "position_mm", "spacing_mm"):
                index[f"{split}_{key}"] = getattr(listing, key)
        listed = [names[i] for i in rows_of[split]]
        index.update(_list_masks(split, listed, masks, mask_splits))
    group_level = group_level_of(places, settings.group_level)
    rests = {places[folder].rest for folder in folders}
    class_at, patient_at, why = class_level(rests, group_level)
    rest_of = {}
    for split, rows in rows_of.items():
        rest_of[split] = [places[folders[i]].rest for i in rows]
    groups = find_groups(names, rows_of, rest_of, table, patient_at, listings)
    index.update({f"{split}_groups": own for split, own in groups.items()})
    reasons = find_labels(index, rows_of, rest_of, table, class_at, why, groups)
    index["notes"] = np.array(json.dumps(
        _describe(found, listings) + table.notes + reasons))
    return index


LISTING_PARTS = ("numbers", "volume", "position_mm", "spacing_mm", "groups")


def list_once(root, names, settings, directories):
    """The Listing of volumes.list_images, for volumes from the cache as long as no directory
    changes: it has read the headers of all files. names: [N] of bytes, sorted. The cache holds
    their numbers in place of them, as they may be names of patients."""
    times, began = _times(directories), time.time_ns()
    keys = ("series", "volume_axis", "volume_index", "slice_step_mm")
    values = [getattr(settings, key) for key in keys]
    state = f"{os.path.abspath(root)} {values} {times.tolist()}"
    state = os.fsencode(state) + b"\0".join(names.tolist())
    folder = os.path.join(settings.cache_dir, f"volumes-{short_hash(state)}")
    if os.path.isdir(folder):
        parts = map_folder(folder)
        counts = json.loads(str(parts["counts"]))
        left_out, kinds = Counter(counts["left_out"]), Counter(counts["kinds"])
        return SimpleNamespace(**{key: parts[key] for key in LISTING_PARTS}, left_out=left_out,
                               names=names[parts["rows"]], kinds=kinds, notes=counts["notes"])
    listing = list_images(root, names, settings)
    is_settled = times.max() < began - 2 * 10**9  # see folder_index
    if is_settled and (listing.volume >= 0).any():
        parts = {key: getattr(listing, key) for key in LISTING_PARTS}
        counts = dict(left_out=listing.left_out, kinds=listing.kinds, notes=listing.notes)
        parts["rows"] = np.searchsorted(names, listing.names)
        parts["counts"] = json.dumps(counts)
        with contextlib.suppress(OSError):
            make_folder(folder, lambda temporary: save_arrays(temporary, parts))
    return listing


def _list_masks(split, names, masks, mask_splits):
    """The arrays of masks of a split's images; see list_folder. names: [N] of bytes."""
    own = [masks.get(os.fsdecode(name), []) for name in names if masks]
    if not any(own):
        return {f"{split}_masks": np.zeros(0, "S1")} if split in mask_splits else {}
    first = [os.fsencode(paths[0]) if paths else b"" for paths in own]
    more, of = [], []
    for i, paths in enumerate(own):
        more += [os.fsencode(path) for path in paths[1:]]
        of += [i] * (len(paths) - 1)
    return {f"{split}_masks": np.array(first, dtype=bytes),
            f"{split}_more_masks": np.array(more, dtype=bytes),
            f"{split}_more_of": np.array(of, dtype=np.int64)}


# ---- what the log says ----

def _describe(found, listings):
    """Sentences on what was found and what was left out."""
    kinds, left_out, notes = Counter(), +found.left_out, list(found.notes)
    n_images = n_volumes = 0
    for listing in listings.values():
        kinds.update(listing.kinds)
        left_out.update(listing.left_out)
        n_images += len(listing.names)
        n_volumes += len(listing.spacing_mm)
        notes += [note for note in listing.notes if note not in notes]
    said = [f"{found.n_files} file(s) seen, {n_images} image(s)"]
    if n_volumes:
        said[0] += f" of which {int(sum((own.volume >= 0).sum() for own in listings.values()))} " \
            f"are slices of {n_volumes} volume(s)"
    if set(kinds) - {"picture"}:
        said[0] += f" ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))})"
    if left_out:
        reasons = [f"{n} {kind}" for kind, n in sorted(left_out.items())]
        said.append("left out: " + ", ".join(reasons))
    if not found.tables and {".csv", ".tsv"} & set(left_out):
        notes.append("a table is read if its name is labels.csv, metadata.csv or groups.csv")
    if found.n_links:
        said.append(f"{found.n_links} linked folder(s) followed")
    return said + notes
