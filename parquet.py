"""Parquet files with pictures inside, as the Hugging Face hub has them, as a folder of pictures.

They are unpacked once into the cache: the files as they are, and labels.csv beside them.
"""
import csv
import json
import os
import re

from archives import make_folder, short_hash
from configurator import UserError
from labels import COLUMNS, hash_number, split_word

FORMATS = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"II*\0": ".tif", b"MM\0*": ".tif",
           b"BM": ".bmp", b"GIF8": ".gif", b"RIFF": ".webp"}


def unpack_parquet(root, files, cache_dir):
    """The folder in the cache with the pictures of parquet files below root. The split of a file is
    a word in its name or its folder, like train-00000-of-00002.parquet; without one it is train.
    Raises UserError if pyarrow is missing, or if a file has no pictures."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"dataset_path={root!r}: reading parquet needs pyarrow; pip install pyarrow"
                        ) from None
    state = []
    for file in files:
        stat = os.stat(os.path.join(root, file))
        state.append(f"{os.path.abspath(root)} {file} {stat.st_size} {stat.st_mtime_ns}")
    name = os.path.basename(os.path.abspath(root))

    def fill(folder):
        with open(os.path.join(folder, "labels.csv"), "w", newline="") as table:
            rows = csv.writer(table)
            rows.writerow(("file", "label", "group", "split"))
            for number, file in enumerate(files):
                _unpack_file(pyarrow.parquet, root, file, number, folder, rows)
    target = f"{name}-parquet-{short_hash(' '.join(state).encode())}"
    return make_folder(os.path.join(cache_dir, target), fill)


def _unpack_file(parquet, root, file, number, folder, rows):
    """Write the pictures of one file into a folder, and their rows into a csv writer."""
    path = os.path.join(root, file)
    try:
        source = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow has its own kinds
        raise UserError(f"{path}: cannot be read as parquet ({error})".split("\n")[0]) from None
    schema, columns = source.schema_arrow, {}
    for field in schema:
        if "binary" in str(field.type):  # binary, or a struct of bytes and path
            columns.setdefault("file", field.name)
        for key in ("label", "group"):
            if field.name.lower() in COLUMNS[key]:
                columns.setdefault(key, field.name)
    if "file" not in columns:
        raise UserError(f"{path}: its columns are {', '.join(schema.names)}; needs 'image' with "
                        "the bytes of a picture, and may have 'label'")
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = features.get("info", {}).get("features", {})
    names = features.get(columns.get("label"), {}).get("names", [])
    words = re.split(r"[-./]", file)
    split, n = next(filter(None, map(split_word, words)), "train"), 0
    for batch in source.iter_batches(100, columns=list(columns.values())):
        for row in batch.to_pylist():
            row = {key: row[name] for key, name in columns.items()}
            picture = row["file"]
            content = picture["bytes"] if isinstance(picture, dict) else picture
            if not isinstance(content, bytes):
                raise UserError(f"{path}, row {n}: column {columns['file']!r} holds no picture; "
                                "needs its bytes")
            ending = next((FORMATS[head] for head in FORMATS if content.startswith(head)), ".png")
            name = f"{split}-{number:03d}-{n:07d}{ending}"
            with open(os.path.join(folder, name), "wb") as target:
                target.write(content)
            label, group = row.get("label"), row.get("group")
            if names and isinstance(label, int) and 0 <= label < len(names):
                label = names[label]
            hashed = "" if group in (None, "") else hash_number(str(group))
            rows.writerow((name, "" if label is None else label, hashed, split))
            n += 1
