"""What names and labels mean: words for splits, images and masks; classes; groups of images.

Folders, .npz archives and tables (tables are in this file, too) all ask the functions here, so that
a label means the same wherever it comes from, and in train.py, distill.py and evaluate.py alike.
"""
import hashlib
import re

import numpy as np

from configurator import UserError

UNKNOWN = -1  # the label of an image whose class nobody knows
NO_VALUE = ("", "nan", "NaN", "NA", "n/a", "<NA>")  # texts that say it

COLUMNS = dict(# of tables beside images: what their names may be
    file=("file", "file_name", "filename", "image", "image_name", "image_id", "path"),
    label=("label", "labels", "class", "class_name", "category", "diagnosis", "target"),
    group=("group", "groups", "patient", "patient_id", "patientid", "subject", "subject_id"),
    split=("split", "set", "subset", "partition"))


# ---- words ----

SPLIT_WORDS = dict(train="train", training="train", val="val", valid="val", validation="val",
                   dev="val", test="test", testing="test")
ROLE_WORDS = dict(
    image="images", images="images", img="images", imgs="images", jpegimages="images",
    picture="images", pictures="images", scan="images", scans="images", mask="masks",
    masks="masks", label="masks", labels="masks", seg="masks", segs="masks", segmentation="masks",
    segmentations="masks", segmentationclass="masks", groundtruth="masks", gt="masks")
NNUNET = {"Tr": "train", "Ts": "test"}  # imagesTr, labelsTr, imagesTs, labelsTs


def split_word(text):
    """'train', 'val' or 'test' for a text that means it, in any case; '' for any other text."""
    return SPLIT_WORDS.get(text.strip().lower(), "")


def folder_words(name):
    """(split, role) that the name of a folder means, each '' if it says nothing of it; None if the
    name has any other word. Examples: Training, images, val_masks, imagesTr, Ground-Truth."""
    split = ""
    if name[-2:] in NNUNET and name[:-2].lower() in ROLE_WORDS:
        name, split = name[:-2], NNUNET[name[-2:]]
    role, whole = "", re.sub(r"[ _.-]+", "", name.lower())
    words = [whole] if whole in ROLE_WORDS else re.split(r"[ _.-]+", name.lower())
    for word in words:
        if word in SPLIT_WORDS and not split:
            split = SPLIT_WORDS[word]
        elif word in ROLE_WORDS and not role:
            role = ROLE_WORDS[word]
        else:
            return None
    return split, role


# ---- classes ----

def find_classes(raw, class_names=()):
    """Classes from labels of any kind, with one set of classes over all splits.

    Integers, whole floats, bools and texts are classes by np.unique, whatever their size. Rows with
    exactly one 1 are classes, too. Rows of 0 and 1 with several ones are several labels per image.
    -1, NaN and '' mean that nobody knows. Fractions are a regression target, which has no classes.
    Without at least two classes there is nothing to tell apart, so there are no labels.
    Args: raw: {split: array [N], [N,1] or [N,c], or None}; class_names: names of the classes 0, 1,
    ..., if the source has them.
    Returns: {split: [N] int64 with -1 = unknown, or [N,c] with rows of -1, or None}; the names of
    the classes, list of str; sentences on what was found, for the log.
    Raises UserError if the splits have labels of different kinds.
    """
    given = {split: _plain(labels) for split, labels in raw.items() if labels is not None}
    shapes = {labels.shape[1:] for labels in given.values()}
    are_texts = {labels.dtype.kind == "U" for labels in given.values()}
    if len(shapes) > 1 or len(are_texts) > 1:
        found = ", ".join(f"{split} {list(labels.shape)} {labels.dtype}"
                          for split, labels in given.items())
        raise UserError(f"the labels of the splits differ in kind ({found}); give all of them one "
                        "label per image, or all as many columns")
    nothing = dict.fromkeys(raw), [], []
    if not given or not any(labels.size for labels in given.values()):
        return nothing
    parts = list(given.values())
    together = np.concatenate(parts)
    if together.ndim > 1:
        labels, names, notes = _classes_of_rows(together, class_names)
    else:
        labels, names, notes = _classes_of_values(together, class_names)
    if labels is None:
        return dict.fromkeys(raw), [], notes
    cuts = np.cumsum([len(part) for part in parts])[:-1]
    by_split = dict(zip(given, np.split(labels, cuts)))
    return {split: by_split.get(split) for split in raw}, names, notes


def _plain(labels):
    """Labels as an array that np.unique can sort, [N] if there is one column."""
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "replace")
    if labels.dtype.kind == "U":
        return np.char.strip(labels)
    if labels.dtype.kind == "b":
        return labels.astype(np.uint8)
    if labels.dtype.kind not in "iuf" or labels.ndim not in (1, 2):
        raise UserError(f"labels have shape {labels.shape}, {labels.dtype}; needs numbers or texts "
                        "[N], or [N,c] with c labels per image")
    return labels


def _classes_of_values(values, class_names):
    """(labels [N] int64 or None, names, notes) of one value per image, numbers or texts."""
    texts = values.astype(str) if values.dtype.kind == "U" else None
    if texts is not None:
        known = ~np.isin(texts, NO_VALUE + ("-1",))
        values = _as_numbers(texts, known)  # None if they are no numbers
    if texts is None or values is not None:
        known = np.isfinite(values) & (values != UNKNOWN)
        whole = np.rint(values) == values
        if known.any() and not whole[known].all():
            low, high = values[known].min(), values[known].max()
            return None, [], [f"no labels: they are fractions from {low:.4g} to {high:.4g}, a "
                              "regression target and no classes"]
        rest = np.unique(values[known])
        if rest.tolist() == [1] and (values == UNKNOWN).any():
            known = np.isfinite(values)  # nothing but -1 and 1: a pair of classes
    labels = np.full(len(known), UNKNOWN, np.int64)
    keys = values if texts is None else texts
    found, first, numbers = np.unique(keys[known], return_index=True, return_inverse=True)
    if texts is not None and values is not None:  # '10' stands behind '2'
        order = np.argsort(values[known][first], kind="stable")
        numbers, found = np.argsort(order)[numbers], found[order]
    if len(found) < 2:
        if not len(found):
            return None, [], ["no labels: none is known"]
        name, _, _ = _name_classes(found, list(class_names))
        number = int(found[0]) if len(name) > 1 and texts is None else 0
        return None, [], [f"no labels: all known labels are {name[number]!r}"]
    labels[known] = numbers
    names, numbers_of, notes = _name_classes(found, list(class_names))
    if numbers_of is not None:
        labels[known] = numbers_of[numbers]
    if n_unknown := int((~known).sum()):
        notes.append(f"{n_unknown} label(s) unknown (-1, NaN or empty), left out where classes are "
                     "measured")
    if len(found) == known.sum() > 2:
        notes.append("no class has two images: are the labels numbers of images or patients?")
    return labels, names, notes


def _as_numbers(texts, known):
    """Texts as floats, nan where they are not known; None if one of them is no number."""
    values = np.full(len(texts), np.nan)
    try:
        values[known] = texts[known].astype(float)
    except ValueError:
        return None
    return values if np.isfinite(values[known]).all() else None


def _name(value):
    """The name of a class that has none: 3.0 is '3'."""
    if isinstance(value, (float, np.floating)):
        return str(int(value))
    return str(value)


def _name_classes(found, names):
    """(names, numbers, notes): the names of the classes `found`, sorted values; numbers: the class
    of each of them as the source counts, or None for 0, 1, 2, ... in their order."""
    own = [_name(value) for value in found]
    if not names:
        return own, None, []
    if found.dtype.kind == "U":
        if set(own) <= set(names):
            return names, np.array([names.index(name) for name in own]), []
        return own, None, []
    if found[0] >= 0 and found[-1] < len(names):
        return names, found.astype(np.int64), []
    if len(own) == len(names):
        listed = ", ".join(own[:5])
        return names, None, [f"the labels {listed}{', ...' if len(own) > 5 else ''} are the "
                             f"{len(names)} class names in their order"]
    for i, value in enumerate(found):
        if 0 <= value < len(names):
            own[i] = names[int(value)]
    return own, None, [f"{len(names)} class name(s) for {len(own)} classes"]


def _classes_of_rows(rows, class_names):
    """(labels [N] or [N,c], or None; names; notes) of c numbers per image."""
    n_columns = rows.shape[1]
    if rows.dtype.kind == "U":
        return None, [], [f"no labels: {n_columns} texts per image are neither classes nor 0 and 1"]
    known = (np.isfinite(rows) & (rows != UNKNOWN)).all(axis=1)
    some = rows[known]
    names = list(class_names) or [str(c) for c in range(n_columns)]
    if not len(some):
        return None, [], ["no labels: none is known"]
    if not np.isin(some, (0, 1)).all():
        kind = "a regression target and no classes"
        if (np.rint(some) == some).all():
            kind = "neither 0 and 1 nor one class per image"
        return None, [], [f"no labels: {n_columns} numbers per image from {some.min():.4g} to "
                          f"{some.max():.4g} are {kind}"]
    notes = []
    if n_unknown := int((~known).sum()):
        notes.append(f"{n_unknown} image(s) with an unknown label (-1 or NaN), left out where "
                     "classes are measured")
    if (some.sum(axis=1) == 1).all():
        labels = np.full(len(rows), UNKNOWN, np.int64)
        labels[known] = some.argmax(axis=1)
        if len(np.unique(labels[known])) < 2:
            return None, [], [f"no labels: all known labels are {names[labels[known][0]]!r}"]
        return labels, names, ["rows with one 1 are classes", *notes]
    labels = np.full(rows.shape, UNKNOWN, np.int8)
    labels[known] = some
    return labels, names, notes


def is_known(labels):
    """[N] bool, the images whose label is known. labels: of find_classes."""
    return labels != UNKNOWN if labels.ndim == 1 else (labels != UNKNOWN).all(axis=1)


# ---- groups: images of one patient ----

def group_numbers(groups, own_names):
    """Groups, such as patients, as numbers that tell nothing of their names: [N] int64.

    A number is the first 63 bits of a SHA-256, so the same patient has the same number in every
    split and every run. An image of an unknown group (-1, NaN, '') is a group by itself.
    Args: groups [N] of int or str; own_names: [N] texts, different for each image of no group, or a
    function i -> text.
    """
    groups = np.asarray(groups)
    if groups.ndim == 2 and groups.shape[1] == 1:
        groups = groups[:, 0]
    if groups.ndim != 1 or groups.dtype.kind not in "iufSU":
        raise UserError(f"groups have shape {groups.shape}, {groups.dtype}; needs one number or "
                        "text for each image")
    if groups.dtype.kind == "S":
        groups = np.char.decode(groups, "utf-8", "replace")
    unique, inverse = np.unique(groups, return_inverse=True)
    names = np.array([_group_name(value) for value in unique], dtype=str)
    hashes = np.array([hash_number(name) for name in names], np.int64)
    numbers, unknown = hashes[inverse], np.isin(names, NO_VALUE + ("-1",))
    for i in np.flatnonzero(unknown[inverse]):
        own = own_names(i) if callable(own_names) else own_names[i]
        numbers[i] = hash_number(f"alone {own}")
    return numbers


def _group_name(value):
    """A group as text, the same for 3, 3.0 and '3 '."""
    if isinstance(value, np.floating) and np.isfinite(value) and value == int(value):
        value = int(value)
    return str(value).strip()


def hash_number(text):
    """A text as a number from 0 to 2^63 - 1 that does not tell the text."""
    digest = hashlib.sha256(f"dino-mx group {text}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def cut_tenth(n, seed, groups=None):
    """The indices of n images in two sorted parts, drawn by seed: (the rest, a tenth but at least
    one image). groups: [n] int or None; the images of a group stay together, unless all images
    belong to one."""
    rng, n_tenth = np.random.default_rng(seed), max(1, n // 10)
    if groups is None or len(np.unique(groups)) < 2:
        indices = rng.permutation(n)
        return np.sort(indices[n_tenth:]), np.sort(indices[:n_tenth])
    _, first, group, sizes = np.unique(groups, return_index=True, return_inverse=True,
                                       return_counts=True)
    in_file_order = np.argsort(first)  # the draw must not depend on the hashes
    order = in_file_order[rng.permutation(len(sizes))]
    n_groups = 1 + int((sizes[order].cumsum() < n_tenth).sum())
    taken = np.zeros(len(sizes), bool)
    taken[order[:min(n_groups, len(sizes) - 1)]] = True
    indices = np.arange(n)
    return indices[~taken[group]], indices[taken[group]]
