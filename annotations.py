"""Tables and masks beside images.

A table is labels.csv, metadata.csv or groups.csv (or .tsv). It begins with the names of its
columns, in any order and case; only the first of these is needed:

    file, label, group, split
    a.png, benign, patient 7, train

A file is named as below the table's folder, or below images/, with or without its ending, or by a
name that no other file has. A folder or the file of a volume stands for all images in it.
"""
import contextlib
import csv
import os
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np

from configurator import UserError
from formats import IMAGE_KEYS, MASK_KEYS
from images import Sendable
from labels import COLUMNS, NO_VALUE, split_word
from layouts import stem_of

MASK_FILE = re.compile(r"(.+?)[ _.-](mask|seg|segmentation|groundtruth|gt)([ _.-]?\d+)?",
                       re.IGNORECASE)
MASK_ORDER = (".png", ".npy", ".tif", ".tiff", ".bmp", ".jpg")  # of masks of one name, the first



# ---- tables ----

def read_tables(root, tables, names, places):
    """What tables say of images.

    Args: root: the folder; tables: their paths below it; names: list of image names below it;
    places: of layouts.place_folders, for the folders of images.
    Returns: namespace of label, group, split, each [N] of texts ('' = not said), or None if no
    table has that column; notes, sentences for the log. Raises UserError if a table cannot be read,
    names no file of the folder, or contradicts itself.
    """
    result = SimpleNamespace(label=None, group=None, split=None, notes=[])
    for table in tables:
        path = os.path.join(root, table)
        columns, rows, unread = _read_table(path)
        find = _finder(os.path.dirname(table), names, places)
        n_unknown, named = 0, np.zeros(len(names), bool)
        values = {key: {} for key in columns if key != "file"}
        for number, row in enumerate(rows, start=2):
            own = find(row["file"])
            if own is None:
                raise UserError(f"{path}, line {number}: several files are named {row['file']!r}; "
                                "write the folder, too")
            n_unknown += not own
            for i in own:
                named[i] = True
                for key, of_key in values.items():
                    if of_key.setdefault(i, row[key]) != row[key]:
                        raise UserError(f"{path}, line {number}: {row['file']!r} has two values of "
                                        f"{key}, {of_key[i]!r} and {row[key]!r}; keep one")
        if rows and not named.any():
            raise UserError(f"{path}: none of its {len(rows)} files is there, like "
                            f"{rows[0]['file']!r}; names are as in the folder, like "
                            f"{os.fsdecode(names[0])!r}")
        for key, of_key in values.items():
            texts = [of_key.get(i, "") for i in range(len(names))]
            _merge(result, key, np.array(texts, dtype=str), path)
        said = f"{table}: {', '.join(values) or 'nothing but names'} of {named.sum()} image(s)"
        if n_unknown:
            said += f", {n_unknown} line(s) name no image"
        if not named.all():
            said += f", {(~named).sum()} image(s) have no line"
        if unread:
            said += f", columns not read: {', '.join(unread[:8])}"
        result.notes.append(said)
    return result


def _merge(result, key, texts, path):
    """Put a column into the result; another table may have said the same, but nothing else."""
    before = getattr(result, key)
    if before is not None:
        both = (before != "") & (texts != "") & (before != texts)
        if both.any():
            raise UserError(f"{path}: another table says {before[both][0]!r} as {key} where this "
                            f"says {texts[both][0]!r}; keep one of them")
        texts = np.where(texts == "", before, texts)
    setattr(result, key, texts)


def _read_table(path):
    """(columns found, rows as dicts of texts, names of the other columns) of a table."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            separator = max(",;\t", key=first.count)
            lines = [line for line in csv.reader(file, delimiter=separator) if any(line)]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); save it as UTF-8 text"
                        ) from None
    header = [name.strip() for name in lines[0]] if lines else []
    plain = [name.lower().replace(" ", "_") for name in header]
    by_name, columns = {name: i for i, name in enumerate(plain)}, {}
    for key, aliases in COLUMNS.items():
        columns.update({key: by_name[name] for name in reversed(aliases) if name in by_name})
    if "file" not in columns:
        raise UserError(f"{path}: its first line is {', '.join(header[:6])!r}; needs a column "
                        "'file', and as you have them 'label', 'group', 'split'")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if len(line) < len(header):
            raise UserError(f"{path}, line {number}: {len(line)} values for {len(header)} columns")
        row = {key: line[i].strip() for key, i in columns.items()}
        if row.get("split"):
            if not split_word(row["split"]):
                raise UserError(f"{path}, line {number}: split {row['split']!r}; use train, val or "
                                "test")
            row["split"] = split_word(row["split"])
        for key in ("label", "group"):
            if row.get(key) in NO_VALUE:
                row[key] = ""
        rows.append(row)
    used = set(columns.values())
    return columns, rows, [name for i, name in enumerate(header) if i not in used]


def _finder(folder, names, places):
    """A function: the file cell of a table in `folder` -> numbers of the images that it means, []
    for none, None if it is ambiguous."""
    exact, short, inside = {}, {}, {}
    for i, name in enumerate(names):
        name = os.fsdecode(name)
        parent, file = os.path.split(name)
        exact[name] = i
        here = places[parent]
        keys = {file, stem_of(file)}
        for folders in (here.rest, here.below):
            keys.add(os.path.join(*folders, file))
        for key in keys:
            short.setdefault(key, []).append(i)
        while parent:
            inside.setdefault(parent, []).append(i)
            parent = os.path.dirname(parent)

    def find(cell):
        cell = os.path.normpath(cell.replace("\\", "/"))
        below = os.path.normpath(os.path.join(folder, cell))
        for key in (below, cell):
            if key in exact:
                return [exact[key]]
            if key in inside:
                return inside[key]
        found = short.get(cell, [])
        near = [i for i in found if os.fsdecode(names[i]).startswith(f"{folder}{os.sep}")]
        if len(found) > 1 and folder and len(near) == 1:
            found = near
        if found:
            return found if len(found) == 1 else None
        same = [key for key in inside if os.path.basename(key) == cell]
        if len(same) > 1:
            return None
        return inside[same[0]] if same else []
    return find


# ---- masks ----

def find_masks(root, found, places):
    """{image: list of its masks}, names below the root; and the splits that have a folder of masks.
    Files that are masks are taken out of found.images.

    A mask lies beside its image as NAME_mask, NAME_seg, NAME_segmentation, NAME_mask_1, ..., or in
    the folder of masks under the name of the image, with or without such an ending, or in the .npz
    of the image.
    """
    masks = {}
    for folder, here in places.items():
        if here.role != "masks":
            found.images[folder] = masks_beside(folder, found.images[folder], masks)
    if masks:
        for folder, here in places.items():
            names = found.images[folder]
            if here.role != "masks":
                found.images[folder] = [name for name in names if not mask_parts(name)[1]]
                found.left_out["mask(s) without an image"] += len(names) - len(found.images[folder])
    masks_inside(root, found, places, masks)
    folders = [folder for folder, here in places.items() if here.role == "masks"]
    others = [folder for folder, here in places.items() if here.role != "masks"]
    if not any(found.images[folder] for folder in others):
        for folder in folders:  # nothing but masks/: these are the images
            places[folder].role = ""
        return masks, set()
    by_name, used, n_stems = masks_by_name(folders, found, places), set(), Counter()
    for folder in others:
        split = places[folder].split
        n_stems.update((split, stem_of(file)) for file in found.images[folder])
    for folder in others:
        here = places[folder]
        for file in found.images[folder]:
            stem = stem_of(file)
            keys = [(here.split, here.rest, stem)]
            keys.append((here.split, here.rest, re.sub(r"_\d{4}$", "", stem)))  # nnU-Net: case_0000
            if here.role and n_stems[here.split, stem] == 1:  # images/a/1.png and masks/1.png
                keys.append((here.split, (), stem))
            for key in keys:
                if own := by_name.get(key):
                    masks[os.path.join(folder, file)] = own
                    used.update(own)
                    break
    if folders and not used and not any(here.role == "images" for here in places.values()):
        for folder in folders:  # a class may be called 'mask' or 'label'
            here = places[folder]
            here.role, here.rest = "", (here.words[-1], *here.rest)
        return masks, set()
    for folder in folders:
        own = {os.path.join(folder, name) for name in found.images[folder]}
        found.left_out["mask(s) without an image"] += len(own - used)
        found.images[folder] = []
    return masks, {places[folder].split for folder in folders}


def masks_inside(root, found, places, masks):
    """Put the masks of .npz files of one case, which have image and mask, into `masks`."""
    for folder in places:
        names = [name for name in found.images[folder] if name.lower().endswith(".npz")]
        fits = None  # the first case of a folder says if `label` is a mask or a class
        for path in [os.path.join(folder, name) for name in names]:
            with contextlib.suppress(Exception):  # of a damaged file: reading it raises again
                with np.load(os.path.join(root, path)) as case:
                    key = next(key for key in MASK_KEYS if key in case.files)
                    if fits is None:
                        image = next(case[key] for key in IMAGE_KEYS if key in case.files)
                        mask = case[key]
                        fits = mask.ndim > 1 and mask.shape[:2] == image.shape[:2]
                    if fits:
                        masks.setdefault(path, [path])


def mask_parts(name):
    """(name of the image, word, number) that the name of a mask file says: a_mask_1.png is a, mask,
    _1. A name without such a word: (stem, '', '')."""
    stem = stem_of(name)
    match = MASK_FILE.fullmatch(stem)
    return match.groups("") if match else (stem, "", "")


def masks_beside(folder, names, masks):
    """The names in a folder without those that are masks of others there; those go into `masks`."""
    stems, kept = {stem_of(name): name for name in names}, []
    for name in names:
        base, word, _ = mask_parts(name)
        owners = [stems[base]] if word and base in stems else []
        if word and not owners and ".nii" in name:  # BraTS: 1_flair, 1_t1 and one 1_seg
            owners = [other for other in names
                      if other.startswith(f"{base}_") and not mask_parts(other)[1]]
        for owner in owners:
            own = masks.setdefault(os.path.join(folder, owner), [])
            own.append(os.path.join(folder, name))
        if not owners:
            kept.append(name)
    return kept


def masks_by_name(folders, found, places):
    """{(split, rest, name of the image): list of masks} of the folders of masks."""
    by_name = {}
    for folder in folders:
        here = places[folder]
        for file in sorted(found.images[folder], key=mask_order):
            name, _, number = mask_parts(file)
            for key in {stem_of(file), name}:
                own = by_name.setdefault((here.split, here.rest, key), [])
                if not own or number:
                    own.append(os.path.join(folder, file))
    return by_name


def mask_order(name):
    """Masks of one name count in the order of MASK_ORDER."""
    extension = os.path.splitext(name)[1].lower()
    return (MASK_ORDER.index(extension) if extension in MASK_ORDER else len(MASK_ORDER), name)


class SeveralMasks(Sendable):
    """Masks of which some are in several files, as an array: [i] -> [H,W], the largest value of all
    files of image i; None without a mask."""

    def __init__(self, first, more, of):
        """Args: first, more: ImageFiles; of: [K] the image of each file of `more`, sorted."""
        self.first, self.more, self.of = first, more, of

    def __len__(self):
        return len(self.first)

    def __getitem__(self, i):
        mask = self.first[i]
        begin, end = np.searchsorted(self.of, (i, i + 1))
        for k in range(begin, end):
            other = self.more[k]
            if other.shape != mask.shape:
                raise UserError(f"{self.more.path(k)}: shape {other.shape}, another mask of the "
                                f"image {mask.shape}; both must agree")
            mask = np.maximum(mask, other)
        return mask
