"""Checkpoints that survive a kill at any moment, and the export that Hugging Face loads.

A run keeps checkpoints/last/state.pt (to resume), checkpoints/best (the EMA weights with the
highest k-NN, with best/hf for AutoModel.from_pretrained) and one folder for every saveckp_freq-th
iteration. Every file is written beside its place, flushed to disk and renamed onto it. So under its
name there is always a complete file. All tensors in it are whole and on the CPU: the file does not
depend on the number of ranks that wrote it, nor on FSDP.
"""
import contextlib
import glob
import json
import math
import os
import shutil

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from card import adapter_card, edit_json, processor_config, write_text
from configurator import HERE, UserError
from distributed import gather_objects, shard_like
from model import core
from run_folder import free_name, remove, truncate_log
from weights import quiet_transformers


WEIGHTS_KEYS = ("model_type", "use_pretrained")  # a resumed run reads no other weights


# ---- state: what resuming needs ----

def _sync(path):
    """Make a file or folder durable. Without it a power cut can keep the rename and lose the
    content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _beside(temporary):
    """Around the writing of a file or folder beside its place. If the writing fails, remove what is
    there and raise UserError; torch and safetensors report a full disk each in their own way."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        elif os.path.exists(temporary):
            os.remove(temporary)
        raise UserError(f"{temporary} cannot be written: {str(error).splitlines()[0]}. Is the disk "
                        "full? What was saved before is untouched; make space, then "
                        "--resume_from=auto goes on from there") from None


def save_state(folder, state):
    """Write folder/state.pt atomically.

    state: nested dicts and lists of tensors, numbers and strings. Raises UserError if the disk does
    not take it; then the state of before stays.
    """
    temporary = os.path.join(folder, "state.pt.part")
    with _beside(temporary):
        os.makedirs(folder, exist_ok=True)
        torch.save(state, temporary)
        _sync(temporary)
        os.replace(temporary, os.path.join(folder, "state.pt"))
        _sync(folder)


def link_state(source, folder):
    """Put the state of `source`, a folder or its state.pt, under a second folder.

    A hard link needs no second copy on disk: save_state later replaces the name in `source`, never
    the content. If the file system has no links, copy.
    """
    temporary = os.path.join(folder, "state.pt.part")
    if os.path.isdir(source):
        source = os.path.join(source, "state.pt")
    target = os.path.join(folder, "state.pt")
    if os.path.exists(target) and os.path.samefile(source, target):
        return  # renaming a link to another link of the same file does nothing
    with _beside(temporary):
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(temporary):
            os.remove(temporary)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            _sync(temporary)
        os.replace(temporary, target)


def _read(file):
    """(state, '') of a readable file on the CPU, or (None, why not). Nothing in the file can run
    code, because it is read with weights_only."""
    if not os.path.exists(file):
        return None, f"{file} is missing"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a truncated or foreign file
        kind = type(error).__name__
        return None, f"{file} is damaged or no checkpoint of ours ({kind})"
    if not isinstance(state, dict) or not {"iteration", "config", "student"} <= state.keys():
        return None, f"{file} is no checkpoint of ours"
    if "teacher" in state:  # the older name of `ema`
        state["ema"] = state.pop("teacher")
    return state, ""


def load_state(path, say=print):
    """The state below `path`, on the CPU; see read_state."""
    return read_state(path, say)[0]


def read_state(path, say=print):
    """(state, its file) below `path`, on the CPU. path: a run, a checkpoint folder or a state.pt.

    If `path` is a run, read checkpoints/last. If that file is damaged, read the newest intact
    checkpoint of the run and print a warning. Raises UserError if nothing can be read.
    """
    last = os.path.join(path, "checkpoints", "last", "state.pt")
    inside = os.path.join(path, "state.pt")
    others = saved_states(path)
    found = [name for name in (last, inside, path) if os.path.isfile(name)]
    if not found and not others:
        raise UserError(f"resume_from={path!r}: no checkpoint there; looked for {last} and "
                        f"{inside}")
    file = found[0] if found else last
    state, problem = _read(file)
    if state is not None:
        return state, file
    for other in others:  # only one more is in memory at a time
        candidate, _ = _read(other)
        if candidate and (state is None or candidate["iteration"] > state["iteration"]):
            state, file = candidate, other
    if state is None:
        advice = "resume from another folder below checkpoints/"
        if others:
            advice = "nor can the others there be read: move the folder away to start anew"
        raise UserError(f"resume_from={path!r}: {problem}; {advice}")
    say(f"!!!! {problem}. Going on from the checkpoint before it, of iteration "
        f"{state['iteration']}: what was trained since is trained again. Is the disk all right? "
        "!!!!")
    return state, file


def saved_states(run_dir):
    """Every state.pt in the checkpoints of a run."""
    pattern = os.path.join(glob.escape(run_dir), "checkpoints", "*", "state.pt")
    return sorted(glob.glob(pattern))


def find_state(resume_from, run_dir, config, say):
    """(the state.pt to resume, its state), or ('', None) for a new run.

    Args: resume_from: the key; config: dict of all keys; say: prints what was found and how the
    config has changed since. Raises UserError, also if the machines find different checkpoints.
    """
    path = resume_from
    if path == "auto":
        path = run_dir if saved_states(run_dir) else ""
    state, file = None, ""
    if path:
        state, file = read_state(path, say)
    iterations = set(gather_objects(state and state["iteration"]))
    if len(iterations) > 1:
        raise UserError(f"resume_from={resume_from!r}: the machines find checkpoints of different "
                        f"iterations, {iterations}; {run_dir} must lie on a disk that they share")
    if state:
        lines = [f"resuming {path} after iteration {state['iteration']}"]
        for key, before, value in config_changes(state, config):
            if key == "generate_samples" and state["iteration"] > 0:
                config[key] = before
                lines.append(f"  {key} stays {before}: samples/crops.png is of a run's first batch")
            elif key != "resume_from":
                remark = "; the weights are the checkpoint's" if key in WEIGHTS_KEYS else ""
                lines.append(f"  changed since: {key}: {before!r} -> {value!r}{remark}")
        say("\n".join(lines))
    return file, state


def start_from(file, run_dir, iteration, best_iteration):
    """Give a run's folder all that belongs to the state.pt that it resumes, of `iteration`.

    From another run: checkpoints and log up to the iteration, and samples/. If the run's own `best`
    is of a later iteration, it keeps its files under the next free name.
    Returns: True if checkpoints/best is of best_iteration, or will be when the state is linked.
    """
    file = os.path.abspath(file)
    source, own = os.path.dirname(os.path.dirname(file)), f"{run_dir}/checkpoints"
    is_own = os.path.realpath(source) == os.path.realpath(own)
    if not is_own or os.path.basename(os.path.dirname(file)) != "last":
        remove(f"{own}/last/hf")  # it belongs to the state that was there
        link_state(file, f"{own}/last")
    if not is_own and os.path.basename(source) == "checkpoints":
        _take_along(os.path.dirname(source), run_dir, iteration)
    best = saved_iteration(f"{own}/best/state.pt")
    if best > iteration:
        os.rename(f"{own}/best", free_name(f"{own}/best"))
    return best_iteration in (best, iteration)


def _take_along(source, run_dir, iteration):
    """Copy what another run had at an iteration into a new run's folder."""
    truncate_log(f"{run_dir}/log.jsonl", iteration, f"{source}/log.jsonl")
    if os.path.isdir(f"{source}/samples"):
        shutil.copytree(f"{source}/samples", f"{run_dir}/samples", dirs_exist_ok=True)
    for file in saved_states(source):
        name = os.path.basename(os.path.dirname(file))
        is_kept = name in ("start", "best") or name.isdigit()
        if is_kept and 0 <= saved_iteration(file) <= iteration:
            target = f"{run_dir}/checkpoints/{name}"
            choice = os.path.join(os.path.dirname(file), "choice.json")  # hf is of later weights
            link_state(file, target)
            has_export = os.path.isdir(f"{source}/checkpoints/{name}/hf")
            if has_export and not os.path.exists(choice):
                shutil.copytree(f"{source}/checkpoints/{name}/hf", f"{target}/hf.part")
                os.rename(f"{target}/hf.part", f"{target}/hf")


def saved_iteration(file):
    """The number of finished iterations in a state.pt, -1 if it cannot be read. Its tensors stay on
    the disk."""
    with contextlib.suppress(Exception):  # torch raises several kinds
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["iteration"]
    return -1


def check_fits(state, student, config):
    """Refuse a checkpoint that cannot go on with the present config.

    UserError if tensors do not fit the network; it names the first one with both shapes, and the
    config keys that differ with both values. UserError if a changed key would need what the
    checkpoint does not have. Args: state: of the checkpoint; config: dict of all keys now.
    """
    before = state["config"]
    split = before.get("eval_split"), config.get("eval_split")
    if state.get("knn") and split[0] != split[1]:
        raise UserError(f"resume_from: eval_split is {split[0]!r} in the checkpoint, {split[1]!r} "
                        "now; its start and best are accuracies on that split: take its value, or "
                        "start a new run")
    from_start = config.get("gram_loss_weight", 0) > 0 and config["gram_teacher"] == "start"
    has_start = state.get("anchor") and before["gram_teacher"] == "start"
    if from_start and state["iteration"] > 0 and not has_start:
        raise UserError("resume_from: gram_teacher='start', but the checkpoint does not have the "
                        "first weights; use 'ema' or 'snapshot', or start a new run")
    anchored = config.get("cls_anchor_loss_weight", 0) > 0
    if anchored and state["iteration"] > 0 and not state.get("start"):
        raise UserError(f"resume_from: cls_anchor_loss_weight={config['cls_anchor_loss_weight']}, "
                        "but the checkpoint does not have the first weights; set it to 0, or start "
                        "a new run")
    def shapes(weights):
        return {name: tuple(value.shape) for name, value in weights.items()}

    theirs, ours = shapes(state["student"]), shapes(student.state_dict())
    names = sorted(theirs.keys() | ours.keys())
    wrong = [name for name in names if theirs.get(name) != ours.get(name)]
    if not wrong:
        return
    there = theirs.get(wrong[0], "absent")
    here = ours.get(wrong[0], "absent")
    changes = []
    for key, old, new in config_changes(state, config):
        if key not in ("out_dir", "resume_from"):
            changes.append(f"{key}: checkpoint {old!r}, now {new!r}")
    raise UserError(f"resume_from: {wrong[0]} is {there} in the checkpoint, {here} now; keys that "
                    f"differ: {'; '.join(changes) or 'none of the config'}. Take the checkpoint's "
                    "values, or start a new run")


def load_optimizer(optimizer, saved):
    """Put the moments of a checkpoint back, by parameter name.

    Rates, decays, betas and the grouping are those of the optimizer, so they follow the present
    config. Args: optimizer: of whole or sharded parameters, its groups with 'names'; saved: what
    optimizer.state_dict() gave, whole tensors. A parameter without moments starts with none.
    """
    moments = {}
    for group in saved["param_groups"]:
        for name, index in zip(group["names"], group["params"]):
            if index in saved["state"]:
                moments[name] = saved["state"][index]
    state, index = {}, 0
    for group in optimizer.param_groups:
        for name, param in zip(group["names"], group["params"]):
            if name in moments:
                state[index] = _moments_like(moments[name], param)
            index += 1
    optimizer.load_state_dict(dict(optimizer.state_dict(), state=state))


def _moments_like(moments, param):
    """Moments of one parameter, sharded as the parameter is; the step counter stays whole."""
    return {key: shard_like(value, param) if value.shape == param.shape else value
            for key, value in moments.items()}


def config_changes(state, config):
    """[(key, value in the checkpoint, value now)] of the keys that differ, new and removed keys
    included."""
    old = state["config"]
    values = []
    for key in sorted(old.keys() | config.keys()):
        if old.get(key) != config.get(key):
            values.append((key, old.get(key), config.get(key)))
    return values


# ---- export: what users load ----

def merge_lora(backbone, weights):
    """Turn the state dict of a peft wrapper into that of the model in it, with the adapters merged:
    W + scaling * B A, where scaling is alpha / r, or alpha / sqrt(r) with rsLoRA.

    Linear layers of any name, with or without bias. UserError for what this sum does not cover, as
    DoRA, biases of adapters, several adapters, peft's copies of whole modules, or another kind."""
    merged, adapters, prefix = {}, {}, "base_model.model."
    for name, value in weights.items():
        if ".lora_" in name or ".modules_to_save." in name or ".original_module." in name:
            adapters[name] = value
        else:
            merged[name.removeprefix(prefix).replace(".base_layer.", ".")] = value
    for path, module in core(backbone).named_modules():
        lora = f"{prefix}{path}.lora"
        names = [f"{lora}_{matrix}.default.weight" for matrix in "AB"]
        if not adapters.keys() >= set(names) or not hasattr(module, "get_base_layer"):
            continue
        if isinstance(module.get_base_layer(), torch.nn.Linear):
            a, b = (adapters.pop(name) for name in names)
            change = (b @ a) * module.scaling["default"]
            merged[f"{path}.weight"] = merged[f"{path}.weight"] + change
    kinds = {config.peft_type.value for config in backbone.peft_config.values()}
    if adapters or kinds != {"LORA"}:
        what = f"{sorted(adapters)[0]} is" if adapters else f"{', '.join(sorted(kinds))} has"
        raise UserError(f"{what} more than a product of two matrices for a linear layer: such an "
                        "adapter is not merged here; use merge_and_unload of peft")
    return merged


def save_adapter(folder, backbone, weights):
    """Write the adapter of a peft wrapper alone, as peft does, and with it the modules that are
    trained whole (model.add_lora), under the names that peft looks for."""
    backbone.save_pretrained(folder, state_dict=weights)
    whole = tuple(f"base_model.model.{name}."
                  for name in backbone.peft_config["default"].modules_to_save or ())
    if whole:
        file = os.path.join(folder, "adapter_model.safetensors")
        tensors = load_file(file)
        tensors.update({name: value.contiguous() for name, value in weights.items()
                        if name.startswith(whole)})
        save_file(tensors, file, metadata={"format": "pt"})


def resample_positions(positions, grid):
    """Position embeddings [1,1+P,D] of CLS and a square of patches -> those of grid * grid patches,
    as transformers' ViT computes them in every forward pass (bicubic)."""
    cls, patches = positions[:, :1], positions[:, 1:]
    side = math.isqrt(patches.shape[1])
    if side == grid:
        return positions
    patches = patches.transpose(1, 2).unflatten(2, (side, side))  # [1,D,side,side]
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    patches = patches.flatten(2).transpose(1, 2)  # [1,P,D]
    return torch.cat([cls, patches], dim=1)


def export_hf(folder, backbone, size, intensity_range, mean, std, card, weights=None,
              intensity_scaling="set", window=None):
    """Write an AutoModel folder: config.json, model.safetensors, README.md, and how to make the
    input, preprocessor_config.json and preprocess.py.

    LoRA is merged into the weights, and adapter/ has the adapter alone. A ViT's mask token is left
    out, because its HF config cannot say that it is there. A ViT's positions are resampled to
    `size`, because AutoModel takes no other size than that of the config.
    Args: size: pixels of a global crop; intensity_range, mean, std: of the input; card: text of the
    model card; weights: the whole state dict to write (distributed.gather_full), None = the
    backbone's own; intensity_scaling, window: of card.processor_config.
    """
    temporary = folder + ".part"
    shutil.rmtree(temporary, ignore_errors=True)
    with _beside(temporary):
        weights = weights or backbone.state_dict()
        if hasattr(backbone, "peft_config"):
            adapter = os.path.join(temporary, "adapter")
            save_adapter(adapter, backbone, weights)
            text = adapter_card(backbone, size, intensity_range, mean, std, card)
            write_text(os.path.join(adapter, "README.md"), text)
            weights = merge_lora(backbone, weights)
        network, trained_at = core(backbone), {}
        if network.config.model_type == "vit":
            weights = {name: value for name, value in weights.items()
                       if not name.endswith("mask_token")}
            name = "embeddings.position_embeddings"
            weights[name] = resample_positions(weights[name], size // network.config.patch_size)
            trained_at["image_size"] = size
        with quiet_transformers():
            network.save_pretrained(temporary, state_dict=weights)
        edit_json(os.path.join(temporary, "config.json"), **trained_at)
        settings = processor_config(size, intensity_range, mean, std, window, intensity_scaling)
        write_text(os.path.join(temporary, "preprocessor_config.json"),
                   json.dumps(settings, indent=2))
        shutil.copyfile(os.path.join(HERE, "preprocess.py"),
                        os.path.join(temporary, "preprocess.py"))
        write_text(os.path.join(temporary, "README.md"), card)
        _replace_folder(temporary, folder)


def _replace_folder(temporary, folder):
    """Move a complete folder to its place. The first one appears at once. Later ones replace file
    by file, so model.safetensors is never half-written."""
    written = []
    for root, _, files in os.walk(temporary):
        written += [os.path.join(root, name) for name in files]
    for name in written:
        _sync(name)
    if not os.path.isdir(folder):
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        os.rename(temporary, folder)
        return
    for name in written:
        target = os.path.join(folder, os.path.relpath(name, temporary))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(name, target)
    shutil.rmtree(temporary)
