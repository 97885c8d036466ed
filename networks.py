"""Which networks there are, and how to load them: released weights, runs, LoRA adapters.

evaluate.py, attention.py and embed.py name networks in the same way, and load them with these
functions.
"""
import ast
import difflib
import glob
import hashlib
import json
import os
import re
import warnings

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configurator import UserError
from loader import input_settings
from model import backbone_from_config, build_backbone
from probe import Probe
from report import jsonable
from teachers import build_teacher
from weights import pretrained_input

REPETITION_KEYS = {  # runs that differ in these keys only are repetitions of one experiment
    "seed", "model_name", "out_dir", "resume_from", "device", "num_workers", "wandb_log",
    "cache_dir", "generate_samples", "log_interval", "saveckp_freq", "teacher_cache"}
RUN_KEYS = ("model_type", "use_pretrained", "use_lora", "freeze_backbone_layers",
            "global_crops_size", "intensity_range", "image_mean", "image_std")

LOSSES = dict(  # weight in a run's config -> name of the loss
    dino_head_loss_weight="DINO", ibot_loss_weight="iBOT", koleo_loss_weight="KoLeo",
    gram_loss_weight="Gram", label_guided_loss_weight="guided")

PROBE_TENSORS = ("mean", "std", "weight", "bias")
PROBE_KEYS = ("model", "model_hash", "features", "blocks", "size", "intensity_range", "mean", "std",
              "intensity_scaling", "classes", "multi_label")


# ---- names ----

def split_names(text):
    """The names in a comma-separated text. Commas inside a path that exists do not separate."""
    parts, names = text.split(","), []
    while parts:
        n = len(parts)
        while n > 1 and not _paths(",".join(parts[:n]).strip()):
            n -= 1
        names.append(",".join(parts[:n]).strip())
        parts = parts[n:]
    return [name for name in names if name]


def _paths(name):
    """The existing paths of a name, sorted. Only * is special in it."""
    if "*" in name:
        return sorted(glob.glob(name.replace("[", "[[]").replace("?", "[?]")))
    return [name] if os.path.exists(name) else []


def is_run(path):
    return os.path.isfile(os.path.join(path, "config.py"))


def is_adapter(path):
    return os.path.isfile(os.path.join(path, "adapter_config.json"))


def _similar(path):
    """', did you mean ...?' with runs and weights whose name is like that of a path, or ''."""
    parents = {os.path.dirname(path.rstrip("/")), "out"}
    known = set()
    for parent in sorted(parents):
        pattern = os.path.join(glob.escape(parent), "*", "config.*")
        known |= {os.path.dirname(file) for file in glob.glob(pattern)}
    by_name = {os.path.basename(folder): folder for folder in sorted(known)}
    wanted = os.path.basename(path.rstrip("/"))
    near = [by_name[name] for name in difflib.get_close_matches(wanted, by_name, n=3)]
    return f", did you mean {' or '.join(near)}?" if near else ""


def _problem(path):
    """Why nothing can be loaded from a path, or ''. A path that is nowhere may be a hub id: then
    ''."""
    if is_run(path) or is_adapter(path) or os.path.isfile(path):
        return ""
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "config.json")):
            return ""
        hint = "it is no run (no config.py) and has no weights (no config.json)"
        below = []
        for pattern in ("*/config.py", "hf/config.json"):
            files = glob.glob(os.path.join(glob.escape(path), pattern))
            below += sorted(os.path.dirname(file) for file in files)
        inside = re.search("^(.+?)/checkpoints(/|$)", path)
        if below:
            return f"{hint}; did you mean {' or '.join(below[:4])}?"
        return hint + (f"; its run is {inside[1]}" if inside else _similar(path))
    is_path = path[0] in f".~{os.sep}" or path.count(os.sep) > 1
    similar = _similar(path)
    if is_path or (similar and os.path.isdir(os.path.dirname(path))):
        return f"no such directory{similar}"
    return ""


def find_runs(names):
    """The folders of the runs that are named, * works. Raises UserError if a name is not a run."""
    folders = []
    for name in names:
        found = [path for path in _paths(name) if is_run(path)]
        if not found:
            problem = _problem(name) or f"no such run{_similar(name)}"
            if os.path.isdir(name) and not _problem(name):
                problem = "these are weights, and no run: name them with --model_type"
            if "*" in name:
                problem = "no run has such a name"
            raise UserError(f"run={name!r}: {problem}")
        folders += found
    return folders


# ---- runs ----

def read_run(folder):
    """The resolved config of a run, a dict, from its config.py. The file is parsed as literals:
    nothing in it is executed. Raises UserError if it is no config of a run."""
    path, config = os.path.join(folder, "config.py"), {}
    try:
        with open(path) as file:
            tree = ast.parse(file.read())
        for node in tree.body:
            if isinstance(node, ast.Assign):
                config[node.targets[0].id] = ast.literal_eval(node.value)
    except (OSError, SyntaxError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no config of a run ({type(error).__name__}: {error})") from None
    missing = [key for key in RUN_KEYS if key not in config]
    if missing:
        raise UserError(f"{path} is no config of a run: it has no {', '.join(missing)}")
    return config


def losses(config):
    """Which losses a run had, like 'DINO + iBOT + KoLeo': the recipe, whatever file set it."""
    if "objective" in config:  # of distill.py
        return "feature + prototype" if config["objective"] == "both" else config["objective"]
    weights = {name: config.get(key, 0) for key, name in LOSSES.items()}
    return " + ".join(name for name, weight in weights.items() if weight > 0)


def adaptation(config):
    """What a run trains, in the words of the paper's tables, and its losses."""
    words = []
    if config["use_lora"]:
        words.append("LoRA")
    if config.get("train_only", "all") != "all":
        words.append(config["train_only"].replace("_", " "))
    if n := config.get("train_last_blocks", 0):
        words.append(f"last {n} block(s)")
    if config["freeze_backbone_layers"] > 0:
        words.append("layer freezing")
    if not words:
        words.append("standard" if config["use_pretrained"] else "from scratch")
    text = " + ".join(words)
    teacher = os.path.basename(config.get("distilled_model_type", "").rstrip("/"))
    if teacher:
        text += f", distilled from {teacher}"
    return f"{text}: {losses(config)}"


def short_name(path):
    """The last part of a hub id or a path; of weights that a run exported, the name of the run."""
    run = re.sub("/checkpoints/[^/]+/hf(/adapter)?/?$", "", path.rstrip("/"))
    return os.path.basename(run)


def run_networks(folder, checkpoint, start_inputs):
    """(start, trained): the networks of a run before and after training, dicts of find_networks.

    start_inputs: {model_type: how the first run that started from it reads images}; this run is
    added. A run with other inputs gets a start of its own. Raises UserError without the checkpoint.
    """
    config = read_run(folder)
    weights_path = os.path.join(folder, "checkpoints", checkpoint, "hf")
    if not os.path.isdir(weights_path):
        raise UserError(f"{folder} has no checkpoints/{checkpoint}/hf; 'best' is there once a run "
                        "has begun, 'last' when it has finished: train on with --resume_from, or "
                        "choose the other checkpoint")
    model_type = config["model_type"]
    input_keys = ("global_crops_size", "intensity_range", "image_mean", "image_std")
    inputs = [config[key] for key in input_keys]
    start_name, kind = f"start of {folder}", "untrained"
    if config["use_pretrained"]:
        kind = "pretrained"
        if start_inputs.setdefault(model_type, inputs) == inputs:
            start_name = model_type
    common = dict(model=short_name(model_type), settings_path=weights_path, config=config,
                  run=folder)
    start = dict(common, name=start_name, adaptation=kind, weights_path="",
                 group=repr((kind, model_type, inputs)))
    settings = {key: value for key, value in config.items() if key not in REPETITION_KEYS}
    trained = dict(common, name=folder, adaptation=adaptation(config), losses=losses(config),
                   weights_path=weights_path, start=start_name, group=repr(settings))
    return start, trained


def find_networks(names, checkpoint):
    """The networks to measure: released weights first, then every run behind its start.

    Args: names: hub ids, directories of weights, timm:NAME, folders of LoRA adapters, or folders of
    runs; in all of them * stands for any text; checkpoint: of the runs, 'best' or 'last'. Runs that
    started from the same weights and read images alike have one start.
    Returns: list of dicts with
    name, model, adaptation: texts.
    group: a text that is equal for networks that differ by their seed only.
    weights_path: where its weights are; '' = those that the run of `config` started from.
    settings_path: where its input settings are.
    config: of its run, or None. run: the run's folder, or absent.
    start, losses: only of a trained network, the name of its start; what it was trained with.
    Raises UserError for a run without the checkpoint, a folder without weights, a name that is like
    that of a run, and if nothing is found.
    """
    paths = []
    for name in names:
        paths += _paths(name) if "*" in name else [name]
    paths = list(dict.fromkeys(paths))  # each once
    for path in paths:
        if problem := _problem(path):
            raise UserError(f"{path!r}: {problem}")
    runs = [path for path in paths if is_run(path)]
    networks, start_inputs = [], {}
    for folder in runs:
        start, trained = run_networks(folder, checkpoint, start_inputs)
        if all(network["name"] != start["name"] for network in networks):
            networks.append(start)
        networks.append(trained)
    released = []
    for path in paths:
        if path in runs or path in start_inputs:
            continue
        kind, settings_path = "pretrained", path
        if is_adapter(path):
            kind, settings_path = "LoRA adapter", _adapter_settings(path)
        released.append(dict(name=path, model=short_name(path), adaptation=kind, group=path,
                             weights_path=path, settings_path=settings_path, config=None))
    if not released + networks:
        raise UserError(f"nothing to evaluate: {', '.join(names)!r} matches no folder")
    return released + networks


# ---- loading ----

def _adapter_base(folder):
    """The base_model_name_or_path of an adapter's folder, '' if its config names none."""
    path = os.path.join(folder, "adapter_config.json")
    try:
        with open(path) as file:
            return json.load(file).get("base_model_name_or_path") or ""
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); it is written beside an "
                        "adapter by peft") from None


def _adapter_settings(folder):
    """Where the input settings of an adapter are: in its folder, or in that of the export around
    it, else with its base."""
    for place in (folder, os.path.dirname(os.path.abspath(folder))):
        if os.path.isfile(os.path.join(place, "preprocessor_config.json")):
            return place
    return _adapter_base(folder)


def load_adapter(folder, num_channels=3):
    """The backbone of a LoRA adapter's folder: its base, with the adapter merged into the weights,
    W + (alpha / r) B A, as exports have it. Raises UserError if the base is missing, or if the
    adapter does not fit."""
    import peft
    base, merged = _adapter_base(folder), os.path.dirname(os.path.abspath(folder))
    advice = "put the base there, or name its place in adapter_config.json"
    if os.path.isfile(os.path.join(merged, "model.safetensors")):
        advice += f"; {merged} has the merged weights, which need no base"
    if not base:
        raise UserError(f"{folder}: adapter_config.json names no base (base_model_name_or_path); "
                        f"{advice}")
    try:
        backbone = build_backbone(base, True, num_channels)
    except UserError as error:
        raise UserError(f"{folder} is an adapter of {base!r}, which cannot be loaded: {error}; "
                        f"{advice}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*adapter keys")  # peft goes on without them
            adapted = peft.PeftModel.from_pretrained(backbone, folder, torch_device="cpu")
        given = peft.load_peft_weights(folder, device="cpu")  # peft drops those of other layers
        used = peft.get_peft_model_state_dict(adapted)
        if left := given.keys() - used.keys():
            raise ValueError(f"the base has no layer for {sorted(left)[0]}")
        return adapted.merge_and_unload()
    except Exception as error:  # peft, safetensors and torch raise a dozen kinds
        reason = (str(error).splitlines() or [""])[0][:160]
        raise UserError(f"{folder}: the adapter cannot be loaded onto its base {base!r} "
                        f"({type(error).__name__}: {reason})") from None


def load_network(network, config, dataset, run_device, image_size=0, intensity_range=(0.0, 0.0),
                 seed=0, on_bad_image="error", teacher_dtype=torch.bfloat16):
    """The weights of one network, ready to measure, and the settings of its input.

    Args: network: of find_networks; config: of its run, or of the first run, or {}; dataset: gives
    the number of channels, and unknown intensities are measured on it; image_size, intensity_range:
    what the user asks for, 0 = nothing; teacher_dtype: of the weights of a timm network.
    Returns: backbone in eval mode on run_device (for timm:NAME a teachers.FrozenTeacher); dict of
    size, intensity_range, mean, std for stream_features. Raises UserError if it cannot be loaded.
    """
    torch.manual_seed(config.get("seed", 0))  # a start from scratch: the run's own first weights
    weights_path = network["weights_path"]
    if weights_path.startswith("timm:"):  # normalises by itself
        backbone = build_teacher(weights_path, dtype=teacher_dtype)
        expected = dict(mean=(0.0,) * 3, std=(1.0,) * 3)
        patch = backbone.patch_size
    else:
        expected = pretrained_input(network["settings_path"])
        backbone = _load_backbone(network, config, dataset.num_channels)
        patch = backbone.config.patch_size
    size = image_size or config.get("global_crops_size") or expected.get("size") or 224
    inputs, _ = input_settings(dataset, expected, intensity_range, seed=seed,
                               on_bad_image=on_bad_image)
    if size < patch:
        raise UserError(f"image_size={size}: {network['name']} has patches of {patch} pixels; give "
                        "a multiple, or 0 for the size of its training")
    inputs["size"] = size // patch * patch
    return backbone.to(run_device).eval(), inputs


def _load_backbone(network, config, num_channels):
    """The backbone of a network of find_networks. A UserError says whose weights are missing."""
    path = network["weights_path"]
    if is_adapter(path):
        return load_adapter(path, num_channels)
    try:
        if path:
            return build_backbone(path, True, num_channels)
        return backbone_from_config(config, num_channels)
    except UserError as error:
        if not path:
            start = config["model_type"]
            raise UserError(
                f"{network['run']} started from {start!r} (model_type in its config.py), which "
                f"cannot be loaded now: {error}. Put the start back, or measure the run without "
                f"it: --model_type={network['settings_path']}") from None
        raise UserError(f"{error}{'' if os.path.exists(path) else _similar(path)}") from None


def weights_hash(backbone):
    """16 hex digits that name the weights of a network: SHA-256 of the names, shapes, types and
    bytes of its tensors. The mask token is left out, because features do not depend on it."""
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        if "mask_token" not in name:
            digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
            values = value.cpu().reshape(-1)
            digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---- kept probes ----

def save_probe(path, probe, about):
    """Keep a probe.Probe: path.safetensors has its tensors, path.json has `about`, a dict for
    JSON with model, model_hash, features, blocks, classes and the input settings."""
    tensors = {name: getattr(probe, name).cpu().contiguous() for name in PROBE_TENSORS}
    save_file(tensors, f"{path}.safetensors.part")
    os.replace(f"{path}.safetensors.part", f"{path}.safetensors")
    about = dict(about, multi_label=probe.multi_label, val_loss=probe.loss)
    if os.path.isdir(about["model"]):
        about["model"] = os.path.abspath(about["model"])
    with open(f"{path}.json", "w") as file:
        json.dump(jsonable(about), file, indent=1)


def load_probe(path):
    """(Probe, about) of save_probe. path: with or without its ending. Raises UserError."""
    path = re.sub("[.](safetensors|json)$", "", path)
    try:
        with open(f"{path}.json") as file:
            about = json.load(file)
        tensors = load_file(f"{path}.safetensors")
        probe = Probe(multi_label=about["multi_label"], **tensors)
        about = {key: about[key] for key in PROBE_KEYS}
        with open(f"{path}.safetensors", "rb") as file:
            about["probe_hash"] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [""])[0][:160]
        raise UserError(f"probe={path!r} cannot be read ({type(error).__name__}: {reason}); "
                        "evaluate.py writes results/NAME-probe.safetensors and .json") from None
    return probe, about
