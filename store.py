"""Features of images as rows on disk: written batch by batch, kept over a kill, then one .npz,
.parquet or .csv.

While rows are computed they are in the folder OUTPUT.part: a file of raw numbers for each column,
settings.json, and progress.json, which counts what is safely on the disk. Memory is that of a
batch, whatever the number of rows. The output gets its name when it is complete.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import zipfile

import numpy as np
import torch

from configurator import UserError
from features import stream_features
from report import image_names, jsonable, probe_rows, write_csv

SAVE_SECONDS = 5  # how much work a kill may cost
REPORT_SECONDS = 30  # between lines on progress, where there is no terminal for a bar
MAX_CSV = 20_000_000  # numbers in a .csv, about 250 MB
ENDINGS = (".npz", ".parquet", ".csv")


# ---- settings ----

def plain(settings):
    """Settings as they come back from JSON: tuples are lists."""
    return json.loads(json.dumps(jsonable(settings)))


def read_settings(output):
    """The settings inside an output, a dict; None if there are none that we wrote."""
    with contextlib.suppress(Exception):  # a foreign file raises anything
        if output.endswith(".npz"):
            with np.load(output, allow_pickle=False) as arrays:
                return json.loads(str(arrays["settings"]))
        if output.endswith(".parquet"):
            import pyarrow.parquet
            return json.loads(pyarrow.parquet.read_schema(output).metadata[b"settings"])
        with open(f"{output}.json") as file:
            return json.load(file)
    return None


def write_settings(output, settings):
    """The settings of a .csv, which has no place for them, beside it: OUTPUT.json."""
    with open(f"{output}.json", "w") as file:
        json.dump(plain(settings), file, indent=1)


def read_unfinished(output):
    """The settings of the rows in OUTPUT.part, {} if there are none."""
    with contextlib.suppress(OSError, ValueError):
        with open(os.path.join(f"{output}.part", "settings.json")) as file:
            return json.load(file)
    return {}


def differences(found, settings):
    """'key: value there, value here' of every setting that differs. `model` and `dataset_path` may
    differ: the weights and the images have hashes."""
    texts = []
    for key, value in plain(settings).items():
        if key not in ("model", "dataset_path") and found.get(key) != value:
            texts.append(f"{key} {found.get(key)} there, {value} here")
    return "; ".join(texts)


def check_size(output, n_images, width):
    """UserError if a .csv of so many rows of so many numbers would be too large to be of use."""
    if output.endswith(".csv") and n_images * width > MAX_CSV:
        raise UserError(f"output={output!r}: {n_images} rows of {width} numbers are too large for "
                        "a .csv; use .npz or .parquet")


def is_complete(output, settings):
    """If an output is there with these settings. Raises UserError if it is there with others."""
    if not os.path.exists(output):
        return False
    found = read_settings(output)
    advice = "Name another output, or replace it with --overwrite=true"
    if found is None:
        raise UserError(f"{output} exists and was not written by embed.py. {advice}")
    if differing := differences(found, settings):
        raise UserError(f"{output} exists with other settings: {differing}. {advice}")
    return True


# ---- rows ----

class Column:
    """Rows in a file of raw numbers as an array of dtype and shape [N,...]: column[i:j] reads them.
    A memory map would do, but its pages count as memory of this process."""

    def __init__(self, path, dtype, shape):
        self.path, self.dtype = path, np.dtype(dtype)
        self.shape, self.ndim = shape, len(shape)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        start, stop, _ = rows.indices(len(self))
        width = int(np.prod(self.shape[1:], dtype=np.int64))
        n, offset = (stop - start) * width, start * width * self.dtype.itemsize
        values = np.fromfile(self.path, self.dtype, n, offset=offset)
        return values.reshape(-1, *self.shape[1:])


class Store:
    """The rows of an output that are written so far, in the folder OUTPUT.part.

    n_rows: how many; position: of the next image in the data set. One process writes at a time.
    """

    def __init__(self, output, settings, overwrite):
        """Raises UserError if the folder has rows of other settings (with overwrite they are
        removed), is not ours, or is in use."""
        self.folder, self.files = f"{output}.part", {}
        self.columns = {}  # {name: (dtype, shape of a row)}
        self.n_rows = self.position = 0
        self.saved_at = time.time()
        path = os.path.join(self.folder, "settings.json")
        with self.disk():
            os.makedirs(self.folder, exist_ok=True)
            if os.listdir(self.folder) and not os.path.isfile(path):
                raise UserError(f"{self.folder} is no unfinished output of embed.py; move it away")
            self.lock = open(path, "a+")
            try:  # lockf: loader workers do not inherit the lock, so it ends with this process
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(f"{output} is being written by another process; wait for it, or "
                                "name another output") from None
            self.lock.seek(0)
            text = self.lock.read()
            found = json.loads(text) if text else {}
            if found and (differing := differences(found, settings)):
                if not overwrite:
                    raise UserError(f"{self.folder} has rows of other settings: {differing}. Take "
                                    "those settings, or begin anew with --overwrite=true")
                found = {}
            if found:
                self._read_progress()
            else:
                self.lock.truncate(0)
                for name in os.listdir(self.folder):
                    if name != "settings.json":
                        os.remove(os.path.join(self.folder, name))
                self.lock.write(json.dumps(plain(settings)))
                self.lock.flush()
            self._open_columns()

    @contextlib.contextmanager
    def disk(self):
        """Around writing: a full or read-only disk is one line, and what is written stays."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{error.filename or self.folder} cannot be written "
                            f"({error.strerror or error}); what is in {self.folder} stays: make "
                            "space, and the same command goes on from there") from None

    def _read_progress(self):
        with contextlib.suppress(OSError, ValueError, KeyError):  # none yet: nothing is safe
            with open(os.path.join(self.folder, "progress.json")) as file:
                progress = json.load(file)
            self.n_rows, self.position = progress["rows"], progress["position"]
            self.columns = progress["columns"]

    def _row_bytes(self, name):
        dtype, shape = self.columns[name]
        return np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))

    def _path(self, name):
        return os.path.join(self.folder, f"{name}.bin")

    def _open_columns(self):
        """Open the columns, without what was written after the last save."""
        sizes = {name: self._row_bytes(name) for name in self.columns}
        for name, size in sizes.items():
            is_there = os.path.isfile(self._path(name))
            if not is_there or os.path.getsize(self._path(name)) < self.n_rows * size:
                self.n_rows = self.position = 0
        for name, size in sizes.items():
            self.files[name] = open(self._path(name), "ab", buffering=0)
            self.files[name].truncate(self.n_rows * size)

    def append(self, values, position):
        """Write rows, {name: array [b,...]}; the next image is `position`."""
        with self.disk():
            if not self.columns:
                for name, rows in values.items():
                    self.columns[name] = (rows.dtype.str, list(rows.shape[1:]))
                self._open_columns()
            for name, (dtype, _) in self.columns.items():
                rows = np.ascontiguousarray(values[name], dtype)
                rest = memoryview(rows.reshape(-1)).cast("B")
                while rest:  # a disk that is nearly full takes a part
                    rest = rest[self.files[name].write(rest):]
        self.n_rows, self.position = self.n_rows + len(values[name]), position
        if time.time() - self.saved_at > SAVE_SECONDS:
            self.save()

    def save(self):
        """Make the rows safe, and count them."""
        with self.disk():
            for file in self.files.values():
                os.fsync(file.fileno())
            path = os.path.join(self.folder, "progress.json")
            with open(f"{path}.part", "w") as file:
                json.dump(dict(rows=self.n_rows, position=self.position,
                               columns=self.columns), file)
            os.replace(f"{path}.part", path)
        self.saved_at = time.time()

    def column(self, name):
        """The rows of a column as a Column."""
        dtype, shape = self.columns[name]
        return Column(self._path(name), dtype, (self.n_rows, *shape))

    def finish(self, write):
        """Write the output by write(path of a temporary file), rename it, and remove the folder."""
        output = self.folder.removesuffix(".part")
        temporary = f"{self.folder}{os.path.splitext(output)[1]}"
        try:
            with self.disk():
                write(temporary)
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, output)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)
        self.close()
        shutil.rmtree(self.folder)

    def close(self):
        """Let another process go on with the rows."""
        for file in (*self.files.values(), self.lock):
            file.close()


# ---- from images to rows ----

def embed(backbone, parts, store, keys, fitted=None, **settings):
    """Append the rows that are missing in a Store, batch by batch, and print how long it will take.

    Args: parts: list of Datasets; keys: of stream_features' dicts, and patch_mean, the columns to
    write; fitted: (probe.Probe, the key that it takes), then also the column probs; settings: of
    stream_features. Batches are cut as in an undisturbed run, so the numbers are the same.
    """
    total, before, size = sum(map(len, parts)), 0, settings["batch_size"]
    first, began = store.position, time.time()
    reported = began
    try:
        for dataset in parts:
            start = min(max(0, store.position - before), len(dataset))
            rest = dataset.subset(np.arange(start, len(dataset)), dataset.split)
            for batch in stream_features(backbone, rest, **settings):
                indices = np.array(batch["indices"]) + start
                batch.update(index=indices + before)
                if "patch_mean" in keys:
                    batch["patch_mean"] = batch["patches"].mean(dim=1)
                if fitted:
                    batch["probs"] = fitted[0](batch[fitted[1]])
                end = min((indices[-1] // size + 1) * size, len(dataset))
                rows = {key: as_column(key, batch[key]) for key in keys}
                store.append(rows, before + int(end))
                now = time.time()
                if not sys.stderr.isatty() and now - reported > REPORT_SECONDS:
                    left = (total - store.position) * (now - began) / (store.position - first)
                    print(f"{store.position} of {total} images, {left / 60:.1f} minutes left",
                          flush=True)
                    reported = now
            before += len(dataset)
    finally:
        store.save()
    if store.n_rows == 0:
        raise UserError(f"{parts[0].name}: not one of {total} images can be read")


def as_column(key, values):
    """Values of a batch as an array: patches in fp16, all else as it is."""
    if torch.is_tensor(values):
        values = values.half() if key == "patches" else values
        values = values.cpu().numpy()
    return values


def data_hash(parts):
    """16 hex digits for the list of all images, and for size and time of a single file."""
    digest, source = hashlib.sha256(), parts[0].name
    if os.path.isfile(source):
        stat = os.stat(source)
        digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    for dataset in parts:
        for name in image_names(dataset, range(len(dataset))):
            digest.update(f"{name.removeprefix(source)}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def describe_rows(parts, index):
    """{column: [N]} of what is known of the images: image, split, number in the split, and label,
    group if there are any (-1 for a split without). index [N]: numbers over all parts."""
    columns = {name: [] for name in ("image", "split", "number", "label", "group")}
    before, known = 0, {}
    for name in ("label", "group"):
        given = [getattr(dataset, f"{name}s") for dataset in parts]
        known[name] = next((values for values in given if values is not None), None)
    for dataset in parts:
        local = index[(index >= before) & (index < before + len(dataset))] - before
        before += len(dataset)
        columns["image"] += image_names(dataset, local)
        columns["number"] += local.tolist()
        columns["split"] += [dataset.split] * len(local)
        for name, like in known.items():
            values = getattr(dataset, f"{name}s")
            if values is not None:
                columns[name].append(np.asarray(values)[local])
            elif like is not None:
                unknown = np.full_like(like[:1], -1, dtype=np.int64)
                columns[name].append(np.repeat(unknown, len(local), axis=0))
    for name, like in known.items():
        parts = columns.pop(name)
        if like is not None:
            columns[name] = np.concatenate(parts)
    return {name: np.array(values) for name, values in columns.items()}


# ---- formats ----

def write_output(path, rows, parts, settings, about):
    """Write all rows of a Store in the format of the path's ending. parts: as in `embed`; about: of
    networks.load_probe, whose classes the predictions name, or {}."""
    known = describe_rows(parts, rows.column("index")[:])
    if about:
        classes, probs = about["classes"], rows.column("probs")[:]
        table = probe_rows(known["image"], probs, about["multi_label"], classes)
        header = ["image", "prediction", "probability", *(f"p_{name}" for name in classes)]
        write_csv(path, header, table)
        return
    columns = dict(known)
    for name in rows.columns:
        if name != "index":
            columns[name] = rows.column(name)
    if path.endswith(".npz"):
        names = np.array(parts[0].class_names or [], dtype=str)
        write_npz(path, dict(columns, class_names=names), settings)
    elif path.endswith(".parquet"):
        write_parquet(path, columns, settings)
    else:
        write_flat_csv(path, {name: values[:] for name, values in columns.items()})


def write_npz(path, columns, settings):
    """columns: {name: array or Column}. They are copied one after the other, in parts."""
    columns = dict(columns, settings=np.array(json.dumps(plain(settings))))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, values in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                about = dict(descr=values.dtype.str, fortran_order=False, shape=values.shape)
                np.lib.format.write_array_header_1_0(file, about)
                for part in chunks(values):
                    file.write(np.ascontiguousarray(part).tobytes())


def chunks(values, n_bytes=1 << 24):
    """An array in parts of about n_bytes along its first axis."""
    if values.ndim == 0:
        yield values
        return
    step = max(1, n_bytes // max(1, values[:1].nbytes))
    for i in range(0, len(values), step):
        yield values[i:i + step]


def write_parquet(path, columns, settings):
    """Each row of a column [N,D] is a list of D numbers, of a column [N,P,D] a list of P * D."""
    pa = import_pyarrow()
    import pyarrow.parquet

    def arrow(values):
        if values.ndim == 1:
            return pa.array(values)
        width = int(np.prod(values.shape[1:]))
        return pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(values).reshape(-1), width)
    n, step, writer = len(next(iter(columns.values()))), 1024, None
    for i in range(0, n, step):
        parts = [np.asarray(values[i:i + step]) for values in columns.values()]
        arrays = [arrow(part) for part in parts]
        table = pa.Table.from_arrays(arrays, list(columns))
        if writer is None:
            schema = table.schema.with_metadata({"settings": json.dumps(plain(settings))})
            writer = pyarrow.parquet.ParquetWriter(path, schema)
        writer.write_table(table.cast(schema))
    writer.close()


def import_pyarrow():
    try:
        import pyarrow
    except ImportError:
        raise UserError("a .parquet needs pyarrow; pip install pyarrow, or name the output .npz"
                        ) from None
    return pyarrow


def write_flat_csv(path, columns):
    """A row of a column [N,D] becomes D columns NAME_0, NAME_1, ..."""
    header = []
    for name, values in columns.items():
        if values.ndim == 1:
            header.append(name)
        else:
            header += [f"{name}_{i}" for i in range(values.shape[1])]

    def rows():
        for i in range(len(next(iter(columns.values())))):
            row = []
            for values in columns.values():
                row += np.atleast_1d(values[i]).tolist()
            yield [f"{x:.9g}" if isinstance(x, float) else x for x in row]
    write_csv(path, header, rows())
