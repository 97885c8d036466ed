"""The features of images, written to a file; the nearest images of an image; a kept probe applied.

    python embed.py --model=out/phantom --dataset_path=my_images/ --output=features.npz
    python embed.py --model=facebook/dinov2-small --dataset_path=scans.npz --output=features.parquet
    python embed.py --model=out/phantom --dataset_path=my_images/ --query=a.png --neighbours=5 \\
        --output=features.npz                         # also features-a-neighbours.png
    python embed.py --probe=out/phantom/results/phantom-probe.safetensors --dataset_path=new/ \\
        --output=predictions.csv                      # class and probability of every image

features.npz has cls [N,D] and patch_mean [N,D] fp32, image (file or row), split, label, group (if
known), class_names, and settings (JSON: the model, the hash of its weights, input, blocks). A kill
loses seconds of work: the same command goes on from OUTPUT.part.
"""
from types import SimpleNamespace

from configurator import UserError, describe, list_keys, one_line_errors, read_command_line

# ==== config: what is not given is taken from the run or the probe ====
# ---- what ----
model = ''                       # a run, weights (a hub id, a directory, timm:NAME), or an adapter
checkpoint = 'best'              # of a run: 'best' on its eval_split | 'last'
output = ''                      # a .npz, .parquet (needs pyarrow) or .csv
overwrite = False                # replace an output that has other settings
device = 'auto'                  # 'auto' | 'cpu' | 'cuda' | 'cuda:1'
mixed_precision = 'bf16'         # of the forward passes: 'bf16' | 'no' = fp32

# ---- data ----
dataset_path = ''                # as in train.py, or one image file; '' = the run's
split = 'all'                    # 'all', or one split
dataset_size = 0                 # of MedMNIST and phantom images; 0 = the run's, else 224
cache_dir = ''                   # downloads and unpacked arrays; '' = ~/.cache/dino-mx
download_url = ''                # a mirror of the MedMNIST files; '' = their own host
series = ''                      # these six as in train.py; '', -1 or 0 = the run's
volume_axis = -1                 # axis of the slices of 3-D arrays and NIfTI
volume_index = -1                # the volume of 4-D NIfTI
slice_step_mm = 0.0              # least distance of slices
group_level = 0                  # the n-th folder below a split is the patient
max_image_pixels = 0             # pixels that a picture may have
image_size = 0                   # pixels of the network's input; 0 = as trained
intensity_range = (0.0, 0.0)     # pixel values mapped to 0..1; (0, 0) = the run's, else measured
intensity_scaling = 'set'        # 'image' | 'dtype' as in train.py | 'set' = the run's
on_bad_image = 'error'           # 'error' = stop and name it | 'skip' = leave it out
num_workers = -1                 # loader processes; -1 = the cores less one, up to 8
batch_size = 64                  # images per forward pass
seed = 0                         # of a val split cut from train, and of measured intensities

# ---- features ----
blocks = 'last'                  # also `readout`, of several blocks: numbers from 0 like 4,6,8,11 |
                                 # 'auto' = chosen on val | 'last' = none
patches = False                  # also `patches` [N,P,D] in fp16, all patch tokens

# ---- use ----
probe = ''                       # of evaluate.py, results/NAME-probe.safetensors: classify images
query = ''                       # an image file: draw its nearest images
neighbours = 5                   # how many of them
config_keys = list_keys(globals())
if __name__ == "__main__":  # before the imports that take seconds: --help and a typo answer at once
    sources = read_command_line(globals(), config_keys)

import os
import sys

import numpy as np
import torch

import store
from archives import SPLITS
from candidates import read_choice
from checks import Checks
from data import describe_source, load_dataset
from distributed import (autocast_for, compute_dtype, loader_workers, precision_notes,
                         setup)
from features import block_list, choose_blocks, parse_blocks, stream_features
from loader import check_scaling, reading_keys
from metrics import nearest_images
from networks import find_networks, load_network, load_probe, weights_hash
from pictures import neighbours_picture


# ---- data ----

def open_split(source, name, config, num_channels, cut=False):
    """A split of a data set. config: of the run, or {}; cut: of load_dataset."""
    return load_dataset(source, name, dataset_size or config.get("dataset_size", 224), cache_dir,
                        download_url, num_channels, seed, cut,
                        **reading_keys(SimpleNamespace(**globals()), config))


def open_parts(source, config, num_channels):
    """[Dataset] of the splits to embed, in their order. Arguments as in open_split."""
    if split != "all":
        return [open_split(source, split, config, num_channels)]
    for name in SPLITS:
        try:
            names = open_split(source, name, config, num_channels).splits
            break
        except UserError as error:
            if "has no split" not in str(error) or name == SPLITS[-1]:
                raise
    return [open_split(source, name, config, num_channels) for name in names]


# ---- outputs ----

def write(backbone, parts, forward, settings, fitted, about):
    """Compute what is missing, and write the output. fitted, about: of load_probe, or None, {}."""
    numbers = settings["blocks"]
    rows = store.Store(output, settings, overwrite)
    if rows.position:
        print(f"going on after {rows.position} images, which are in {rows.folder}", flush=True)
    keys, probe_input = ["index", "cls", "patch_mean"], None
    if numbers:
        keys.append("readout")
    if patches:
        keys.append("patches")
    if fitted:
        keys, probe_input = ["index", "probs"], (fitted, about["features"])
    try:
        store.embed(backbone, parts, rows, keys, probe_input, block_numbers=numbers, **forward)
        rows.finish(lambda path: store.write_output(path, rows, parts, settings, about))
    except KeyboardInterrupt:
        print(f"stopped after {rows.position} images, which are in {rows.folder}; the same command "
              "goes on from there")
        sys.exit(130)
    finally:
        rows.close()
    if output.endswith(".csv"):
        store.write_settings(output, settings)
    print(f"{rows.n_rows} images are in {output}")


def draw_neighbours(backbone, parts, inputs, numbers):
    """Draw the query and its nearest images into a .png beside the output; returns its path."""
    with np.load(output) as arrays:
        key = "readout" if "readout" in arrays else "cls"
        bank, names, splits = (arrays[name] for name in (key, "image", "split"))
        local, labels = arrays["number"], arrays.get("label")
    scaling = dict(intensity_scaling=parts[0].scaling)
    dataset = open_split(query, "train", scaling, parts[0].num_channels)
    dataset = dataset.subset(np.arange(1), "query")
    [batch] = stream_features(backbone, dataset, block_numbers=numbers, **inputs)
    similarity, nearest = nearest_images(torch.from_numpy(bank), batch[key].cpu(), neighbours)
    by_split = {part.split: part for part in parts}
    row = [(dataset[0][0], os.path.basename(query), None)]
    values, rows = similarity[0].tolist(), nearest[0].tolist()
    for value, i in zip(values, rows):
        part, caption = by_split[splits[i]], os.path.basename(names[i])
        if labels is not None and labels.ndim == 1 and labels[i] >= 0:
            caption += f", {part.class_names[labels[i]]}"
        row.append((part[local[i]][0], f"{caption}\n{value:.3f}", None))
    base, _ = os.path.splitext(output)
    name, _ = os.path.splitext(os.path.basename(query))
    path = f"{base}-{name}-neighbours.png"
    neighbours_picture(path, [row], f"Nearest of {len(names)} images\ncosine similarity of {key}; "
                       f"{parts[0].name}", inputs["intensity_range"], "query")
    return path


# ---- the script ----

def check_config(config):
    """Raise UserError with all mistakes in the keys at once."""
    check, ending = Checks(config), os.path.splitext(output)[1]
    check.need(model or probe, "model is not given: a run, weights or an adapter; or give a probe")
    check.need("*" not in model, f"model={model!r}: name one network")
    check.need(ending in store.ENDINGS, f"output={output!r}: give a path that ends in "
               f"{', '.join(store.ENDINGS)}")
    check.need(not patches or ending == ".npz" or ending == ".parquet",
               f"patches=true with output={output!r}: a .csv of all patches is too large; use .npz")
    check.need(not probe or ending == ".csv", f"probe with output={output!r}: predictions are a "
               "table; name a .csv")
    given = blocks != "last" or patches or image_size or intensity_range != (0, 0)
    check.need(not probe or not given, "probe with blocks, patches, image_size or intensity_range: "
               "the probe has its own")
    check.need(not query or ending == ".npz" and not probe, f"query with output={output!r}: the "
               "features to search are kept as .npz, without a probe")
    check.need(not query or os.path.isfile(query), f"query={query!r}: no such file")
    check.report()
    if ending == ".parquet":
        store.import_pyarrow()


def find_blocks(backbone, same, inputs, open_cut):
    """The blocks of the readout, [] = none. With blocks='auto' they are those that a run has handed
    back with its weights; else those that were chosen
    before for the same output, else chosen on val. same: settings of which the choice depends;
    open_cut(name) -> split train or val, which may be cut from train."""
    if blocks == "last":
        return []
    if blocks != "auto":
        return parse_blocks(blocks, len(block_list(backbone)))
    if choice := read_choice(model):  # by the run itself, at its end
        return choice["blocks"] if len(choice["blocks"]) > 1 else []
    previous = store.read_settings(output) or store.read_unfinished(output)
    if not store.differences(previous, dict(same, readout=blocks)):
        return previous["blocks"]
    advice = "blocks='auto' chooses on val, with labels; or give numbers, like 4,6,8,11"
    try:
        train, val = open_cut("train").labelled(), open_cut("val").labelled()
    except UserError as error:
        raise UserError(f"{error}. {advice}") from None
    if train.labels is None or val.labels is None:
        raise UserError(f"{train.name} has no labels: {advice}")
    numbers, why = choose_blocks(backbone, train, val, seed, **inputs)
    print(f"blocks = {numbers}; {why}", flush=True)
    return numbers


def main(sources):
    """Embed with the config in this module's globals. sources: of configurator.override."""
    run_device = setup(device)
    config = SimpleNamespace(**{key: globals()[key] for key in config_keys})
    check_config(config)
    print(describe(globals(), config_keys, sources) + "\n")
    fitted, about = None, {}
    if probe:
        fitted, about = load_probe(probe)
    try:
        network = find_networks([model or about["model"]], checkpoint)[-1]  # behind a run's start
    except UserError as error:
        if model:
            raise
        raise UserError(f"probe={probe!r} is of a network that is gone: {error}; give the network "
                        "with --model=...") from None
    run_config = network["config"] or {}
    source = dataset_path or run_config.get("dataset_path", "")
    if not source:
        raise UserError("dataset_path is not given, and there is no run to take it from; add "
                        "--dataset_path=...")
    channels = len(about["mean"]) if about else run_config.get("num_channels", 0)
    parts = open_parts(source, run_config, channels)
    print("\n".join([describe_source(parts[0]), *precision_notes(run_device, mixed_precision)]))
    backbone, inputs = load_network(
        network, run_config, parts[0], run_device, image_size, intensity_range, seed, on_bad_image,
        compute_dtype(run_device, mixed_precision))
    model_hash = weights_hash(backbone)
    if about:
        if model_hash != about["model_hash"]:
            raise UserError(f"probe={probe!r} belongs to weights {about['model_hash']} "
                            f"({about['model']}); {network['name']} has weights {model_hash}")
        check_scaling(parts[0], about)
        inputs = {key: about[key] for key in inputs}
    forward = dict(inputs, num_workers=loader_workers(num_workers), batch_size=batch_size,
                   on_bad_image=on_bad_image, autocast=autocast_for(run_device, mixed_precision))

    # ---- settings: what the numbers depend on ----
    settings = dict(model=network["weights_path"], model_hash=model_hash, dataset_path=source,
                    data_hash=store.data_hash(parts), **inputs,
                    intensity_scaling=parts[0].scaling,
                    dtype=str(compute_dtype(run_device, mixed_precision)),
                    device=run_device.type, splits={part.split: len(part) for part in parts})
    numbers = about.get("blocks")
    if not about:
        numbers = find_blocks(backbone, settings, forward, lambda name: open_split(
            source, name, run_config, channels, cut=True))
    settings.update(readout=blocks, blocks=numbers, patches=patches, probe=about.get("probe_hash"))
    width = getattr(backbone, "patch_width", 0) or backbone.config.hidden_size
    n_images = sum(map(len, parts))
    print(f"{n_images} images: {settings['splits']}; {network['name']}, weights {model_hash}; "
          f"input: {inputs}", flush=True)
    if not about:
        store.check_size(output, n_images, width * (2 + len(numbers)))
    if not overwrite and store.is_complete(output, settings):
        print(f"{output} is complete, with these settings")
    else:
        write(backbone, parts, forward, settings, fitted, about)
    if query:
        print(f"drawn: {draw_neighbours(backbone, parts, forward, numbers)}")


if __name__ == "__main__":
    with one_line_errors():
        main(sources)
