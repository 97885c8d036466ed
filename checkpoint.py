"""Checkpoints that survive a kill at any moment, and the export that Hugging Face loads.

A run keeps checkpoints/last/state.pt (to resume), checkpoints/best (the teacher with the highest k-NN, with best/hf for
AutoModel.from_pretrained) and one folder for every saveckp_freq-th iteration. Every file is written beside its place,
flushed to disk and renamed onto it, so under its name there is always a complete file. All tensors in it are whole and
on the CPU: how many ranks wrote it, and whether they shared the weights (FSDP), cannot be seen.
"""
import contextlib
import glob
import json
import os
import shutil

import torch
from safetensors import SafetensorError

from configurator import UserError
from distributed import gather_objects, shard_like
from model import core, quiet_transformers


# ---- state: what resuming needs ----

def _sync(path):
    """Make a file or folder durable: without it a power cut can keep the rename and lose the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _beside(temporary):
    """Around the writing of a file or folder beside its place: what could not be written whole is removed, and a
    UserError says so. torch and safetensors report a full disk each in their own way."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        elif os.path.exists(temporary):
            os.remove(temporary)
        raise UserError(f"{temporary} cannot be written: {str(error).splitlines()[0]}. Is the disk full? What was "
                        "saved before is untouched; make space, then --resume_from=auto goes on from there") from None


def save_state(folder, state):
    """Write folder/state.pt atomically. state: nested dicts and lists of tensors, numbers and strings only. Raises
    UserError where the disk does not take it; the state of before stays."""
    temporary = os.path.join(folder, "state.pt.part")
    with _beside(temporary):
        os.makedirs(folder, exist_ok=True)
        torch.save(state, temporary)
        _sync(temporary)
        os.replace(temporary, os.path.join(folder, "state.pt"))
        _sync(folder)


def link_state(source, folder):
    """The same state under a second folder. A hard link: no second copy on disk, and save_state later replaces the name
    in `source`, never the content. Copies where the file system has no links."""
    temporary = os.path.join(folder, "state.pt.part")
    with _beside(temporary):
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(temporary):
            os.remove(temporary)
        try:
            os.link(os.path.join(source, "state.pt"), temporary)
        except OSError:
            shutil.copyfile(os.path.join(source, "state.pt"), temporary)
            _sync(temporary)
        os.replace(temporary, os.path.join(folder, "state.pt"))


def _read(file):
    """(state, '') of a readable file on the CPU, or (None, why not). weights_only: nothing in it can run code."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:                    # torch raises several kinds for a truncated or foreign file
        return None, f"{file} is missing" if not os.path.exists(file) else \
            f"{file} is damaged or no checkpoint of ours ({type(error).__name__})"
    if not isinstance(state, dict) or not {"iteration", "config", "student"} <= state.keys():
        return None, f"{file} is no checkpoint of ours"
    if "teacher" in state:  # the name of `ema` in checkpoints of before December 2026
        state["ema"] = state.pop("teacher")
    return state, ""


def load_state(path, say=print):
    """The state below `path`: a run, a checkpoint folder or a state.pt; on the CPU.

    Of a run it is checkpoints/last; where a bad disk has damaged that, the readable one that is furthest on, and `say`
    tells it loudly. A checkpoint named by itself is taken or refused. Raises UserError where nothing can be read.
    """
    tried = [os.path.join(path, *rest) for rest in (("checkpoints", "last", "state.pt"), ("state.pt",), ())]
    others = saved_states(path)
    file = next((name for name in tried if os.path.isfile(name)), tried[0] if others else None)
    if file is None:
        raise UserError(f"resume_from={path!r}: no checkpoint there; looked for {tried[0]} and {tried[1]}")
    state, problem = _read(file)
    if state is None:
        for other in others:                                  # one in memory at a time, and the best so far
            found = _read(other)[0]
            if found and (state is None or found["iteration"] > state["iteration"]):
                state = found
        if state is None:
            raise UserError(f"resume_from={path!r}: {problem}; " + (
                "nor can the others there be read: move the folder away to start anew" if others else
                "resume from another folder below checkpoints/"))
        say(f"!!!! {problem}. Going on from the checkpoint before it, of iteration {state['iteration']}: what was "
            "trained since is trained again. Is the disk all right? !!!!")
    return state


def saved_states(run_dir):
    """Every state.pt in the checkpoints of a run."""
    return sorted(glob.glob(os.path.join(glob.escape(run_dir), "checkpoints", "*", "state.pt")))


def find_state(resume_from, run_dir, config, say):
    """(where a run goes on, its state) by its key resume_from; ('', None) where it starts anew. Says what it found and
    how the config has changed since. Raises UserError, also where the machines find different checkpoints."""
    resume = resume_from
    if resume == "auto":
        resume = run_dir if saved_states(run_dir) else ""
    state = load_state(resume, say) if resume else None
    if len(seen := set(gather_objects(state and state["iteration"]))) > 1:
        raise UserError(f"resume_from={resume_from!r}: the machines find checkpoints of different iterations, {seen}; "
                        f"{run_dir} must lie on a disk that they share")
    if state:
        say(f"resuming {resume} after iteration {state['iteration']}" + "".join(
            f"\n  changed since: {key}: {old!r} -> {new!r}" for key, old, new in config_changes(state, config)
            if key != "resume_from"))
    return resume, state


def check_fits(state, student, config):
    """Refuse a checkpoint whose tensors do not fit the network: UserError that names the first one, both shapes, and
    the config keys that differ with both values."""
    theirs = {name: tuple(value.shape) for name, value in state["student"].items()}
    ours = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    wrong = next((name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)), None)
    if wrong:
        there, here = theirs.get(wrong, "absent"), ours.get(wrong, "absent")
        changed = "; ".join(f"{key}: checkpoint {a!r}, now {b!r}" for key, a, b in config_changes(state, config))
        raise UserError(f"resume_from: {wrong} is {there} in the checkpoint, {here} now; keys that differ: "
                        f"{changed or 'none of the config'}. Take the checkpoint's values, or start a new run")


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
                state[index] = {key: shard_like(value, param) if value.shape == param.shape else value
                                for key, value in moments[name].items()}
            index += 1
    optimizer.load_state_dict(dict(optimizer.state_dict(), state=state))


def config_changes(state, config):
    """[(key, value in the checkpoint, value now)] for the keys that differ, new and removed keys included."""
    old = state["config"]
    return [(key, old.get(key), config.get(key)) for key in sorted(old.keys() | config.keys())
            if old.get(key) != config.get(key)]


# ---- the run's folder ----

def open_folder(run_dir, resume, config_text, script="train.py"):
    """Make the folder of a run and write its config.py. An earlier run of the same name is moved aside, never
    overwritten: returns its new name, else ''."""
    moved = ""
    if not resume and os.path.isfile(f"{run_dir}/config.py"):
        moved = next(f"{run_dir}.{n}" for n in range(1, 10**6) if not os.path.exists(f"{run_dir}.{n}"))
        os.rename(run_dir, moved)
    for name in ("logs", "checkpoints", "samples", "results"):
        os.makedirs(f"{run_dir}/{name}", exist_ok=True)
    with open(f"{run_dir}/config.py", "w") as file:
        file.write(f"# resolved config; runs as: python {script} {run_dir}/config.py\n{config_text}")
    return moved


def truncate_log(path, iteration):
    """Drop the lines of a log.jsonl after `iteration`: a resumed run writes them again, the same ones."""
    if os.path.isfile(path):
        with open(path) as file:
            lines = [line for line in file if line.endswith("\n") and json.loads(line)["iteration"] <= iteration]
        with open(path + ".part", "w") as file:
            file.writelines(lines)
        os.replace(path + ".part", path)


# ---- export: what users load ----

def model_card(name, iteration, knn, config, config_text):
    """README.md of an export: where the weights come from, what was measured, how to load them. knn: {what: number}."""
    numbers = "".join(f"- {what}: {value}\n" for what, value in knn.items()) or "- no labels, not measured\n"
    start = config["model_type"] if config["use_pretrained"] else f"random weights ({config['model_type']})"
    if teacher := config.get("distilled_model_type"):
        start += f", distilled from the frozen teacher {teacher}"
    return ("---\nlibrary_name: transformers\npipeline_tag: image-feature-extraction\n"
            f"tags: [dino-mx, self-supervised]\n---\n\n# {name}\n\n"
            f"EMA teacher of a DINO-MX run after {iteration} of {config['max_iterations']} iterations "
            f"on {config['dataset_path']}, started from {start}. "
            "For research on methods only, not for clinical use.\n\n"
            f"5-NN accuracy of the CLS token:\n\n{numbers}\n"
            "    from transformers import AutoModel\n    model = AutoModel.from_pretrained('<this folder>')\n\n"
            "preprocessor_config.json holds size, intensity range, mean and std of the input. "
            "A ViT's pooler is not trained: use last_hidden_state[:, 0].\n\n"
            f"Config:\n\n```python\n{config_text}```\n")


def merge_lora(backbone, weights):
    """The state dict of a peft wrapper as that of the model in it, adapters merged: W + (alpha / r) B A."""
    names = {name: name.removeprefix("base_model.model.").replace(".base_layer.", ".") for name in weights}
    merged = {new: weights[name] for name, new in names.items() if ".lora_" not in name}
    for path, module in core(backbone).named_modules():
        if hasattr(module, "lora_A"):
            a, b = (weights[f"base_model.model.{path}.lora_{matrix}.default.weight"] for matrix in "AB")
            merged[f"{path}.weight"] = merged[f"{path}.weight"] + (b @ a) * module.scaling["default"]
    return merged


def export_hf(folder, backbone, size, intensity_range, mean, std, card, weights=None):
    """Write an AutoModel folder: config.json, model.safetensors, preprocessor_config.json and the model card README.md.

    LoRA is merged into the weights, the adapter alone lies in adapter/. A ViT's mask token is left out: its HF config
    cannot say it is there. Args: size: pixels of a global crop; intensity_range, mean, std: the input pipeline; card:
    text of the model card; weights: the state dict to write, whole (distributed.full), None = the backbone's own.
    """
    temporary = folder + ".part"
    shutil.rmtree(temporary, ignore_errors=True)
    with _beside(temporary):
        weights = weights or backbone.state_dict()
        if hasattr(backbone, "peft_config"):
            backbone.save_pretrained(os.path.join(temporary, "adapter"), state_dict=weights)
            weights = merge_lora(backbone, weights)
        weights = {name: value for name, value in weights.items()
                   if not (backbone.config.model_type == "vit" and name.endswith("mask_token"))}
        with quiet_transformers():
            core(backbone).save_pretrained(temporary, state_dict=weights)
        # a processor computes (pixel * factor - mean) / std: the lower end of the range goes into its mean
        low, high = intensity_range
        factor = 1 / (high - low)
        processor = dict(image_processor_type="BitImageProcessor", do_resize=True, size={"shortest_edge": size},
                         resample=3, do_center_crop=True, crop_size={"height": size, "width": size},
                         do_rescale=True, rescale_factor=factor, do_normalize=True,
                         image_mean=[m + low * factor for m in mean], image_std=list(std),
                         do_convert_rgb=False, intensity_range=[low, high])
        with open(os.path.join(temporary, "preprocessor_config.json"), "w") as file:
            json.dump(processor, file, indent=2)
        with open(os.path.join(temporary, "README.md"), "w") as file:
            file.write(card)
        written = [os.path.join(root, name) for root, _, files in os.walk(temporary) for name in files]
        for name in written:
            _sync(name)
        # the first export appears at once; later ones replace file by file, so model.safetensors is never half-written
        if not os.path.isdir(folder):
            os.makedirs(os.path.dirname(folder), exist_ok=True)
            os.rename(temporary, folder)
        else:
            for name in written:
                target = os.path.join(folder, os.path.relpath(name, temporary))
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.replace(name, target)
            shutil.rmtree(temporary)
