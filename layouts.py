"""What the names of folders and files say: which are images, masks, splits, classes or patients.

Words are looked for at the upper levels of a folder, in any order and case (labels.folder_words):

    train/benign/1.png, Training/1.png, images/valid/1.dcm, imagesTr/case_0000.nii.gz
    images/1.png with masks/1.png; benign/images/1.png; benign/1.png with benign/1_mask.png

The first folder that is no such word is the class of an image, unless it is named like a patient.
"""
import contextlib
import os
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np

from configurator import UserError
from formats import EXTENSIONS, file_kind
from labels import folder_words, group_numbers

TABLES = ("labels", "metadata", "groups")  # names of tables, .csv or .tsv: annotations.py
SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "thumbs", "thumb", "thumbnail", "thumbnails",
                "#recycle", "$recycle.bin", "system volume information", "lost+found"}
OTHER_FILES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".pdf", ".py", ".html",
               ".zip", ".gz", ".tar", ".npz", ".mat", ".xlsx", ".xls", ".doc", ".docx", ".parquet")
# Folders that are named like patients, visits or series of one are no classes
PATIENT = re.compile(r"(sub-\w+|(pa|pat|patient|pt|subj|subject|sub|case|study|exam|visit|series"
                     r"|scan|st|se|vol|volume|anon|anonymous|anonymized)[ _.-]*\d+[a-z]?"
                     r"|(tcga|lidc|cptac|brats)[-_\d].*)", re.IGNORECASE)


# ---- what lies there ----

def one_file(name):
    """What walk finds if there is nothing but this file."""
    lists = {key: [] for key in ("directories", "tables", "others", "notes")}
    images = {"": [name]}
    return SimpleNamespace(images=images, left_out=Counter(), n_files=1, n_links=0, **lists)


def walk(root):
    """Everything below a folder. Links are followed, except to a folder that they lie in.

    Returns: namespace of
    images: {folder: names of its images}, folders relative to root, '' = root itself
    tables: paths of the tables that TABLES names; others: of .json and .parquet
    directories: all directories, absolute
    left_out: Counter of what is no image, by kind; n_files; n_links: linked folders; notes: []
    """
    found = one_file("")
    found.images, found.n_files = {}, 0
    stack = [("", ())]
    while stack:
        folder, above = stack.pop()
        path = os.path.join(root, folder) if folder else root
        try:
            stat = os.stat(path)
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise UserError(f"dataset_path={root!r}: cannot be read ({error.strerror})"
                                ) from None
            found.left_out["folder that cannot be read"] += 1
            continue
        identity = (stat.st_dev, stat.st_ino)
        if identity in above:
            found.left_out["link to a folder that it lies in"] += 1
            continue
        found.n_links += bool(folder) and os.path.islink(path)
        found.directories.append(path)
        found.images[folder] = []
        for entry in entries:
            name = os.path.join(folder, entry.name)
            if is_system_name(entry.name):
                found.left_out["of the system (like ._x, .DS_Store, _x, @x, thumbnails)"] += 1
            elif is_folder(entry):
                stack.append((name, (*above, identity)))
            else:
                sort_file(name, entry, found)
    return found


def is_system_name(name):
    """Names that systems and viewers write: ._x, .DS_Store, __MACOSX, @eaDir, Thumbs.db, ..."""
    return name[0] in "._@" or name.lower() in SYSTEM_NAMES


def is_folder(entry):
    """True if an entry of os.scandir is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def sort_file(name, entry, found):
    """Put a file where it belongs in `found`, of walk."""
    found.n_files += 1
    lower = entry.name.lower()
    stem, extension = os.path.splitext(lower)
    if lower.endswith(EXTENSIONS):
        found.images[os.path.dirname(name)].append(entry.name)
        return
    if stem in TABLES and extension in (".csv", ".tsv"):
        found.tables.append(name)
        return
    if extension in (".json", ".parquet"):
        found.others.append(name)
        if entry.name == "boxes.json":
            return
    elif extension == ".txt" and is_in_masks(name):
        extension = ".txt in labels/ (boxes of YOLO are not read, boxes.json is)"
    elif extension not in OTHER_FILES:
        try:
            if file_kind(entry.path):
                found.images[os.path.dirname(name)].append(entry.name)
                return
        except OSError:
            extension = "broken link or unreadable file"
    found.left_out[extension or "file without an ending"] += 1


def note_coco(root, found):
    """Say it if a .json is an annotation file in the format of COCO, which is not read."""
    for name in found.others[:50]:
        with contextlib.suppress(OSError):
            with open(os.path.join(root, name), "rb") as file:
                start = file.read(1 << 16)
            if b'"images"' in start and b'"file_name"' in start:
                found.notes.append(f"{os.path.basename(name)} looks like COCO and is not read: "
                                   "classes go into labels.csv, boxes into boxes.json")


def is_in_masks(name):
    """True for a file below a folder whose name means masks."""
    meanings = map(folder_words, os.path.dirname(name).split(os.sep))
    return any(means and means[1] == "masks" for means in meanings)


def stem_of(name):
    """The name of an image file without its ending; of 1.2.840 all, as 840 is no ending."""
    lower = name.lower()
    if lower.endswith(".nii.gz"):
        return name[:-7]
    return os.path.splitext(name)[0] if lower.endswith(EXTENSIONS) else name


# ---- words ----

def place_folders(found):
    """{folder: namespace} for each folder that has images, with

    split: 'train', 'val', 'test', or '' = not named; role: 'images', 'masks' or ''
    rest: the names on the way that are no such words, a tuple; below: those behind the split
    words: the names that are; top: the folder down to which the words go
    Folders whose images belong to no split are taken out of found.images, and counted.
    Raises UserError if folders of several spellings are the same split.
    """
    folders = [folder for folder, names in found.images.items() if names]
    places = {folder: place(folder) for folder in folders}
    late = [folder for folder in folders if places[folder].late]
    if late and not all(here.split for here in places.values()):
        for folder in late:  # patients with a folder 'test' are no splits
            places[folder] = place(folder, late_splits=False)
    check_spellings(places)
    with_images = {here.split for here in places.values() if here.role == "images" and here.first}
    some_split = any(here.split for here in places.values())
    for folder in folders:
        here, reason = places[folder], ""
        if some_split and not here.split:
            reason = "image(s) in no split"
        elif here.split in with_images and not here.role:
            reason = "image(s) beside images/"
        if reason:
            found.left_out[reason] += len(found.images[folder])
            found.images[folder] = []
            del places[folder]
    return places


def place(folder, late_splits=True):
    """What place_folders says of one folder. A word counts in the first three names; at most one
    other name may stand before it, as in benign/images. late: the split stands behind a name;
    first: the words stand in front of all names. late_splits: False = then it is a name."""
    parts = folder.split(os.sep) if folder else []
    here = SimpleNamespace(split="", role="", late=False, first=True, top="")
    names, words, below = [], [], []
    for i, part in enumerate(parts):
        means = folder_words(part) if i < 3 and len(names) < 2 else None
        if means and means[0] and (here.split or names and not late_splits):
            means = None
        if means and means[1] and here.role:
            means = None
        if means is None:
            names.append(part)
            below.append(part)
            continue
        split, role = means
        here.late |= bool(split and names)
        here.first &= not names
        here.split, here.role = here.split or split, here.role or role
        here.top = os.sep.join(parts[:i + 1])
        words.append(part)
        if split:
            below = []
    here.rest, here.below, here.words = map(tuple, (names, below, words))
    return here


def check_spellings(places):
    """Raise UserError if folders of other names mean the same, as val/ and validation/."""
    spelt = {}
    for here in places.values():
        if here.words and here.first:
            spelt.setdefault((here.split, here.role), set()).add(here.words)
    for (split, role), words in spelt.items():
        if len(words) > 1:
            listed = " and ".join(sorted(os.path.join(*names) for names in words))
            raise UserError(f"the folders {listed} have one meaning, {split} {role}".rstrip()
                            + "; keep one of them, or put all files under one name")


# ---- classes and patients in the names of folders ----

def class_level(rests, group_level):
    """(level of the class, level of the patient, why there is no class). A level is the number of a
    name in `rest`, None = there is none. rests: set of the tuples `rest` of all folders;
    group_level: the level that the user calls a group, or None."""
    names_at = {}  # {level: the names there}
    for level in range(max(map(len, rests), default=0)):
        names_at[level] = {rest[level] if level < len(rest) else "" for rest in rests}
    patient = group_level
    if group_level is None:
        patient = next((level for level, names in names_at.items()
                        if all(map(PATIENT.fullmatch, names))), None)
    for level, names in names_at.items():
        if level == group_level:
            continue
        if "" in names:
            return None, patient, "some images lie beside the folders" if level == 0 else ""
        if level == patient:
            return None, patient, ("the folders are named like patients, visits or series; if "
                                   "folders below them are classes, set --group_level=1")
        if len(names) > 1:
            return level, patient, ""
    return None, patient, "a single folder is no class" if rests - {()} else ""


def group_level_of(places, group_level):
    """The key group_level, which counts folders below the split from 1, as a level of `rest`."""
    if not group_level:
        return None
    n_before = [len(here.rest) - len(here.below) for here in places.values()]
    return group_level - 1 + max(n_before, default=0)


def find_groups(names, rows_of, rest_of, table, patient_at, listings):
    """{split: groups [N] int64}, {} if no group is known. A table is asked first, then folders,
    then the patients of DICOM. The slices of a volume are always one group.

    Args: names: all images; rows_of, rest_of: {split: [N]}, their rows in names and their folders;
    table: of annotations.read_tables; patient_at: of class_level; listings: {split: Listing}.
    """
    texts, known, n_volumes = {}, set(), 0
    for split, rows in rows_of.items():
        listing, own = listings[split], np.full(len(rows), "", dtype=object)
        in_volume = listing.volume >= 0
        own[in_volume] = listing.groups.astype(object)[listing.volume[in_volume]]
        if patient_at is not None:
            for i, rest in enumerate(rest_of[split]):
                own[i] = os.sep.join(rest[:patient_at + 1]) or own[i]
        if table.group is not None:
            own = np.where(table.group[rows] == "", own, table.group[rows])
        texts[split] = own
        known.update(own)
        n_volumes += len(listing.spacing_mm)
    known.discard("")
    if not known and not n_volumes:
        return {}
    groups, by_volume = {}, n_volumes > 1 and len(known) < 2  # anonymous: all have one name
    for split, rows in rows_of.items():
        volume, own = listings[split].volume, texts[split]
        alone = (volume >= 0) & ((own == "") | by_volume)
        about = f"of {split}, {names[0]} to {names[-1]}"
        by_number = [f"volume {number} {about}" for number in range(volume.max() + 1)]
        own[alone] = np.array(by_number, dtype=object)[volume[alone]]
        groups[split] = group_numbers(own.astype(str), [names[row] for row in rows])
    return groups


def n_pairs(first, second):
    """How many different pairs there are of the numbers in two lists of arrays of equal lengths."""
    _, codes = np.unique(np.concatenate(second), return_inverse=True)
    return len(np.unique(np.concatenate(first) * len(codes) + codes))


def find_labels(index, rows_of, rest_of, table, class_at, why, groups):
    """Put labels and class_names into the index of folders.list_folder. Returns: sentences, why
    there are none. Args: why, class_at: of class_level; the others: of find_groups."""
    index["class_names"] = np.zeros(0, "U1")
    if table.label is not None:
        for split, rows in rows_of.items():
            index[f"{split}_labels"] = table.label[rows]
        return []
    if class_at is None:
        return [f"no labels: {why}"] if why else []
    texts = {}
    for split, rests in rest_of.items():
        texts[split] = [rest[class_at] for rest in rests]
    names = sorted(set().union(*texts.values()))
    notes = []
    if len({name.lower() for name in names}) < len(names):
        notes.append("names of classes differ by case only, and are different classes")
    numbers = {name: number for number, name in enumerate(names)}
    labels, units, n_before = [], [], 0
    for split, own in texts.items():
        index[f"{split}_labels"] = np.array([numbers[name] for name in own], np.int64)
        labels.append(index[f"{split}_labels"])
        alone = n_before + len(own) + np.arange(len(own))  # a picture is a unit by itself
        volume = index.get(f"{split}_volume", np.full(len(own), -1))
        units.append(np.where(volume >= 0, n_before + volume, alone))
        n_before += 2 * len(own)
    reason = ""
    if n_pairs(labels, units) == len(names):
        reason = "no labels: each folder has one image or volume only, so folders are no classes"
    elif groups:
        members = list(groups.values())
        n_groups = len(np.unique(np.concatenate(members)))
        if n_pairs(labels, members) == n_groups == len(names):
            reason = "no labels: each folder is one patient"
    if reason:
        for split in texts:
            del index[f"{split}_labels"]
        return [reason]
    index["class_names"] = np.array(names, dtype=str)
    return notes
