"""Runs as processes of their own: commands that are printed, settings beside a run's folder, and
what a finished run has cost. tables.py makes its runs with these functions."""
import json
import math
import os
import shlex
import sys

import numpy as np

from archives import MEDMNIST
from configurator import HERE, UserError
from report import data_title
from run_folder import make_results, read_log, write_whole
from signals import end_by, run_process
from weights import FAMILIES, find_config

# ---- keys ----

def items(text):
    """The parts of a comma-separated key."""
    return [item.strip() for item in text.split(",") if item.strip()]


def short(name):
    """The last part of a hub id or path, for the name of a run."""
    return os.path.basename(name.rstrip("/")).replace(":", "-")


def rounded(size, model):
    """A crop size as the nearest multiple of the patch size of a hub id or directory. That of a
    family stays, because flags may set its patch size."""
    if model in FAMILIES:
        return size
    patch = find_config(model, True, {})[0].patch_size
    return max(1, round(size / patch)) * patch


# ---- processes ----

def command_text(words, n_processes=1):
    """A command as one types it. words: the script, its arguments; n_processes: of a run."""
    start = "python"
    if n_processes > 1:
        start = f"torchrun --standalone --nproc_per_node={n_processes}"
    return f"{start} {shlex.join(words)}"


def call(words, n_processes=1, output=None):
    """Print and run a command of command_text. If a signal reaches this process, so does it reach
    the command, which saves; then this process ends by the signal. UserError if the command fails.
    output: of signals.run_process."""
    text, start = command_text(words, n_processes), [sys.executable]
    print(f"\n$ {text}", flush=True)
    if n_processes > 1:
        start += ["-m", "torch.distributed.run", *text.split()[1:3]]
    start.append(os.path.join(HERE, words[0]))
    status, number = run_process(start + words[1:], output)
    if number:
        print("stopped; the same command goes on", flush=True)
        end_by(number)
    if status:
        raise UserError(f"{text} ended with status {status}, its last lines say why. The same "
                        "command again keeps what is finished")


def train(words, settings, folder, n_processes):
    """Make a run of train.py or distill.py in a folder; resume it if it is unfinished, skip it if
    it is finished.

    FOLDER.py, beside the folder, has its command and settings. Args: words: of command_text, with
    FOLDER.py among them; settings: {key: value}. UserError if the folder was made with others.
    """
    lines = [f"# {command_text(words, n_processes)}"]
    lines += [f"{key} = {value!r}" for key, value in settings.items()]
    if os.path.isdir(folder) and os.path.isfile(f"{folder}.py"):
        with open(f"{folder}.py") as file:
            before = file.read().splitlines()
        changed = [line for line in before if line not in lines]
        if changed:
            raise UserError(f"{folder} was made with other settings ({changed[0]}); name another "
                            "out_dir, or remove the folder")
    make_results(os.path.dirname(folder))
    write_whole(f"{folder}.py", "\n".join(lines) + "\n")
    if os.path.isfile(f"{folder}/results/summary.json"):
        print(f"finished before: {command_text(words, n_processes)}", flush=True)
    else:
        call(words, n_processes)


# ---- what runs are worth, and what they cost ----

def measure(folders, keys):
    """{name: dict}: what evaluate.py says of runs and of their starts: results, {probe: {metric:
    value}}, losses, start. It is asked, unless it has said so after the last run has ended.

    Args: folders: of the runs; keys: of evaluate.py, {key: value}. The last checkpoint is measured,
    by its last block only.
    """
    keys = dict(keys, checkpoint="last", blocks="last", bootstrap=0, generate_pictures=False)
    path = f"{keys['out_dir']}/results/{data_title(keys['dataset_path'])}.json"
    newest = max(os.path.getmtime(f"{folder}/results/summary.json") for folder in folders)
    found = dict(config={})
    if os.path.isfile(path) and os.path.getmtime(path) >= newest:
        with open(path) as file:
            found = json.load(file)
    if not keys.items() <= found["config"].items():
        call(["evaluate.py", *(f"--{key}={value}" for key, value in keys.items())])
        with open(path) as file:
            found = json.load(file)
    split = keys["test_splits"]
    return {network["name"]: dict(network, results=network["results"][split])
            for network in found["networks"]}


def summary(folder):
    """The dict that a finished run has written at its end."""
    with open(f"{folder}/results/summary.json") as file:
        return json.load(file)


def knn_on_val(folders):
    """Mean k-NN accuracy of finished runs on val, 0 if val was not measured."""
    final = [summary(folder)["final"] for folder in folders]
    return float(np.mean([accuracy.get("val", 0) for accuracy in final]))


def published(dataset):
    """[(method, AUC, accuracy)] of config/medmnist.json for a MedMNIST name, the most accurate
    first; [('-', nan, nan)] if there is nothing."""
    nothing = {"-": (math.nan, math.nan)}
    known = MEDMNIST.get(dataset, {}).get("published", nothing)
    rows = [(method, *numbers) for method, numbers in known.items()]
    return sorted(rows, key=lambda row: -row[2])


def cost(folder):
    """{minutes, gb} of a run from its log: the time of all iterations without measurements and
    checkpoints, also of a run that was resumed; the most memory of the first process."""
    seconds, last, gb = 0.0, 0, 0.0
    for _, record in read_log(f"{folder}/log.jsonl"):
        if "images_per_second" in record:
            n_images = (record["iteration"] - last) * record["batch_size"]
            seconds += n_images / record["images_per_second"]
            last, gb = record["iteration"], max(gb, record["memory_gb"])
    return dict(minutes=seconds / 60, gb=gb)
