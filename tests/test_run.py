"""What train.py and distill.py do alike, because run.py, model.py and optim.py do it for both.

The two scripts once had copies of these parts, and the copies had drifted. Each test runs both.
"""
import json
import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import augment
import features
import run as run_module
from configurator import UserError, override
from model import build_backbone
from signals import STOP_SIGNALS
from tests_support import SHRUNK, TINY, load_script

BY_SCRIPT = {  # what a shrunk run of distill.py needs beside train.py's flags
    "train": [],
    "distill": ["--local_crops_number=0", "--distilled_crops_size=48",
                "--distilled_statistics_views=40"]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A directory with a tiny random network for distill.py."""
    torch.manual_seed(1)
    folder = str(tmp_path_factory.mktemp("teacher") / "dinov2")
    sizes = dict(TINY, patch_size=12, image_size=48)
    build_backbone("dinov2", False, 3, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture(params=["train", "distill"])
def start(request, tmp_path, npz, teacher):
    """A function (*flags) that runs a script in tmp_path/run; .script is its name."""
    script = request.param

    def run(*flags, module=None):
        module = module or load_script(script)
        keys = module.config_keys
        shrunk = [flag for flag in SHRUNK if flag[2:].split("=")[0] in keys]
        shrunk += BY_SCRIPT[script]
        if script == "distill":
            shrunk.append(f"--distilled_model_type={teacher}")
        argv = [*shrunk, f"--dataset_path={npz}", f"--out_dir={tmp_path}/run",
                f"--cache_dir={tmp_path}/cache", *flags]
        sources = override(vars(module), keys, argv)
        module.main(sources)
        return [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    run.script = script
    return run


# ---- the drifts ----

def test_compiling_raises_the_limit_of_recompilations(start, monkeypatch):
    """At torch's own limit of 8, blocks would go on without being compiled, in silence."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compiled.append(block))
    torch._dynamo.config.recompile_limit = 8
    start("--compile=true", "--max_iterations=1")
    assert len(compiled) == 2 and torch._dynamo.config.recompile_limit == 64


def test_a_signal_during_the_first_measurement_saves_the_run(start, tmp_path, monkeypatch, capsys):
    measure, calls = features.knn_accuracy, []
    handler = signal.getsignal(signal.SIGTERM)

    def interrupted(*args, **settings):
        if not calls:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(args)
        return measure(*args, **settings)
    monkeypatch.setattr(features, "knn_accuracy", interrupted)
    start()
    assert "stopped by a signal after iteration 0, saved" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run/checkpoints/last/state.pt", weights_only=True)
    assert saved["iteration"] == 0
    monkeypatch.undo()
    records = start(f"--resume_from={tmp_path}/run")
    assert [record["iteration"] for record in records] == [0, 1, 2, 3]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_after_an_error_in_the_loop_signals_and_folder_are_given_back(start, tmp_path,
                                                                       monkeypatch):
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    seen = []

    def broken(run, batch, may_stop):
        seen.extend(signal.getsignal(number) for number in STOP_SIGNALS)
        raise UserError("an image cannot be read")
    monkeypatch.setattr(run_module.Run, "stop_wanted", broken)
    with pytest.raises(UserError, match="an image cannot be read"):
        start()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    assert not set(seen) & set(handlers)
    assert json.loads((tmp_path / "run/logs/run.json").read_text())["process"] == 0


def test_the_resume_command_names_all_machines(start, monkeypatch, capsys):
    monkeypatch.setattr(run_module.Run, "stop_wanted", lambda run, batch, may_stop: True)
    monkeypatch.setattr(run_module, "world_size", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    start()
    explained, stopped, command = capsys.readouterr().out.splitlines()[-3:]
    assert explained.startswith("torchrun ends with status 1 and a traceback")
    assert "stopped by a signal" in stopped  # in the last two lines: README's Slurm script
    assert f"torchrun --nnodes=2 --nproc_per_node=4 {start.script}.py" in command


@pytest.mark.parametrize("flag, words", [
    ("drop_path_rate=0.5", "vit has no stochastic depth in transformers; drop_path_rate=0.5"),
    ("pos_embed_rescale=2", "vit has no random scale of positions in transformers")])
def test_a_key_that_a_family_lacks_is_noted(start, capsys, flag, words):
    start(f"--{flag}", "--max_iterations=1")
    assert f"note: {words}" in capsys.readouterr().out


def test_the_size_of_crops_that_do_not_exist_is_not_checked(start):
    records = start("--local_crops_number=0", "--local_crops_size=7", "--max_iterations=1")
    assert records[-1]["dino_local_loss"] == 0
    if start.script == "distill":
        flags = ["--objective=prototype", "--local_crops_number=2"]
    else:
        flags = ["--local_crops_number=2"]
    with pytest.raises(UserError, match="local_crops_size=7 is not a multiple of patch_size=8"):
        start(*flags, "--local_crops_size=7", "--max_iterations=1")


def test_a_warm_up_that_is_longer_than_the_run_is_noted(start, capsys):
    start("--warmup_iterations=9", "--max_iterations=1")
    assert "note: warmup_iterations=9 of max_iterations=1" in capsys.readouterr().out


# ---- the smells ----

def test_an_iteration_has_a_seed_of_its_own():
    """The seed is a function of (seed, iteration, rank) that numpy promises to keep."""
    drawn = []
    for numbers in ("00", "01", "10", "00"):
        run_module.seed_iteration(*map(int, numbers))
        drawn.append((torch.initial_seed(), torch.rand(3).tolist()))
    assert drawn[0] == drawn[3] and len({number for number, _ in drawn}) == 3
    run_module.seed_iteration(7, 11)
    sequence = np.random.SeedSequence((7, 5, 11, 0))
    assert torch.initial_seed() == int(sequence.generate_state(1, np.uint64)[0]) // 2


def test_wandb_goes_on_with_its_curve(start, tmp_path, monkeypatch):
    calls, logged = [], []
    fake = SimpleNamespace(init=lambda **settings: calls.append(settings),
                           log=lambda record, step: logged.append(step), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    start("--wandb_log=true", "--max_iterations=2")
    start("--wandb_log=true", "--max_iterations=3", f"--resume_from={tmp_path}/run")
    assert calls[0]["id"] == calls[1]["id"]
    assert calls[1]["resume"] == "allow"
    assert logged == [0, 1, 2, 3]
    start("--wandb_log=true", "--max_iterations=1")  # a new run has a curve of its own
    assert calls[2]["id"] != calls[0]["id"]


def test_without_wandb_nothing_is_written(start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    with pytest.raises(UserError, match="wandb_log=true needs wandb; pip install wandb"):
        start("--wandb_log=true")
    assert not (tmp_path / "run").exists()


def test_a_snapshot_that_is_never_taken_is_noted(npz, tmp_path, capsys):
    module = load_script("train")
    flags = [*SHRUNK, f"--dataset_path={npz}", f"--out_dir={tmp_path}/run", "--max_iterations=1",
             f"--cache_dir={tmp_path}/cache", "--gram_loss_weight=1", "--gram_teacher=snapshot"]
    module.main(override(vars(module), module.config_keys, flags))
    assert "gram_refresh_iterations=0 is the same as 'start'" in capsys.readouterr().out


def test_the_feature_cache_depends_on_what_the_preset_says(monkeypatch):
    """An edit of augment.PRESETS gave features of other crops before, by the preset's name."""
    distill = load_script("distill")
    config = SimpleNamespace(**{key: getattr(distill, key) for key in distill.config_keys})
    before = distill.cache_key(config, "medical")
    edited = {name: dict(values) for name, values in augment.PRESETS.items()}
    edited["medical"]["brightness"] = 0.1
    monkeypatch.setattr(augment, "PRESETS", edited)
    assert distill.cache_key(config, "medical") != before
    assert distill.cache_key(config, "rgb") == distill.cache_key(config, "rgb")


def test_restoring_follows_a_changed_config(start, tmp_path):
    """Betas and multipliers of the optimizer are those of the present config."""
    start("--max_iterations=2", "--saveckp_freq=2")
    start("--max_iterations=3", f"--resume_from={tmp_path}/run", "--adam_betas=0.8,0.9",
          "--layerwise_decay=0.5")
    saved = torch.load(tmp_path / "run/checkpoints/last/state.pt", weights_only=True)
    groups = saved["optimizer"]["param_groups"]
    assert {group["betas"] for group in groups} == {(0.8, 0.9)}
    assert {group["lr_mult"] for group in groups} == {1.0, 0.5, 0.25, 0.125}
    steps = {float(entry["step"]) for entry in saved["optimizer"]["state"].values()}
    assert steps == {3.0}  # the moments were kept


def test_files_of_a_run(start, tmp_path):
    start()
    found = sorted(os.listdir(tmp_path / "run"))
    wanted = ["checkpoints", "config.py", "log.jsonl", "logs", "results", "samples"]
    assert found == wanted
    folders = sorted(os.listdir(tmp_path / "run/checkpoints"))
    assert folders == ["0000002", "best", "last"]
    text = open(tmp_path / "run/config.py").read()
    assert text.startswith(f"# resolved config; runs as: python {start.script}.py ")
