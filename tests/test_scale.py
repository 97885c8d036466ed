"""One switch: train.py alone, under DDP and under FSDP has the same losses, weights and exports; checkpoints go from any
to any; what goes wrong on one rank stops all of them. Ranks are forks that talk over gloo.

KoLeo is off throughout: it looks for neighbours on its own rank, by definition.
"""
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.multiprocessing
from PIL import Image
from safetensors.torch import load_file

import distributed
from checkpoint import load_state
from configurator import UserError, override
from test_train import SHRUNK, assert_same, load_train, log, losses, npz, state  # noqa: F401
from tests_support import ROOT

COMMON = [*SHRUNK, "--koleo_loss_weight=0", "--saveckp_freq=8", "--generate_samples=false", "--warmup_iterations=2", "--freeze_last_layer=5",
          "--image_mean=0.5", "--image_std=0.25", "--model_type=dinov2", "--drop_path_rate=0", "--lora_dropout=0"]
# everything at once, three times: what one leaves out, another has
MODES = {
    "centering": ["config/dinov2.py", "--centering=centering", "--gradient_accumulation_steps=2", "--activation_checkpointing=true",
                  "--clip_grad_by=parameter", "--clip_grad=0.05", "--freeze_last_layer_by=grad", "--dino_head_norm_last_layer=false",
                  "--freeze_backbone_layers=1", "--freeze_backbone_until=12", "--freeze_backbone_iterations=4", "--max_iterations=20", "--num_workers=1"],
    "sinkhorn": ["config/dinov3.py", "--model_type=dinov3_vit", "--gradient_accumulation_steps=1", "--pos_embed_rescale=0", "--clip_grad_by=module",
                 "--clip_grad=0.05", "--gram_loss_weight=1", "--gram_teacher=start", "--gram_crops_size=48", "--max_iterations=20"],
    "lora": ["config/dinov1.py", "--use_lora=true", "--freeze_backbone_layers=1", "--num_hidden_layers=3", "--gram_loss_weight=1",
             "--gram_teacher=snapshot", "--gram_refresh_iterations=7", "--freeze_backbone_iterations=3", "--max_iterations=20"]}


def worker(rank, world, port, jobs):
    """One rank: train.py once for every job in one process group. What it says goes to {out}-{rank}.txt."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for out, argv, change in jobs:
        module = load_train()
        module.cleanup = distributed.barrier                  # the next job goes on in the same group
        files = [os.path.join(ROOT, name) for name in argv if name.endswith(".py")]
        flags = [flag for flag in argv if flag.startswith("--")]
        with open(f"{out}-{rank}.txt", "w") as file, contextlib.redirect_stdout(file):
            try:
                with change(rank, module) if change else contextlib.nullcontext():
                    module.main(override(vars(module), module.config_keys, [*files, *COMMON, *flags, f"--out_dir={out}"]))
            except UserError as error:
                print(f"error: {error}")
    distributed.cleanup()


def train(world, *jobs):
    """train.py on `world` forks of this process, once for every job (folder, arguments, change of the module or None)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(worker, args=(world, port, jobs), nprocs=world, start_method="fork")


@contextlib.contextmanager
def calls(owner, name, instead):
    """Inside, owner.name is instead(original, number of the call)(its arguments)."""
    original, count = getattr(owner, name), []

    def changed(*args, **kwargs):
        count.append(1)
        return instead(original, len(count), *args, **kwargs)
    setattr(owner, name, changed)
    try:
        yield
    finally:
        setattr(owner, name, original)


def stop_after(iteration, on=1):
    """A change: rank `on`, and no other, gets a SIGTERM in that iteration, as from a queue that wants its machine back."""
    def update(original, n, *args):
        original(*args)
        if n == iteration and distributed.rank() == on:
            os.kill(os.getpid(), signal.SIGTERM)
    return lambda rank, module: calls(module.EMATeacher, "update", update)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, npz):  # noqa: F811
    """A function (mode, ranks, distribution, ...) -> the folder of that run; all are trained at once."""
    root = tmp_path_factory.mktemp("scale")

    def folder(*names):
        return f"{root}/{'-'.join(map(str, names))}"

    def job(mode, *names, more=(), change=None):
        distribution = "none" if names[0] == 1 else next(name for name in names if name in ("ddp", "fsdp"))
        return folder(mode, *names), [*MODES[mode], f"--dataset_path={npz}", f"--cache_dir={root}/cache",
                                      f"--distribution={distribution}", *more], change
    train(1, *(job(mode, 1, "none") for mode in MODES))
    two = [job(mode, 2, how) for mode in MODES for how in ("ddp", "fsdp")]
    for how in ("ddp", "fsdp"):                                # in the middle of an epoch, of 5 iterations
        two += [job("centering", 2, how, "stopped", change=stop_after(8)),
                job("centering", 2, how, "stopped", more=[f"--resume_from={folder('centering', 2, how, 'stopped')}"])]
    start = f"--resume_from={folder('lora', 1, 'none')}/checkpoints/0000008"
    two += [job("lora", 2, how, "from 1", more=[start]) for how in ("ddp", "fsdp")]
    train(2, *two)
    train(1, *(job(mode, 1, "from fsdp", more=[f"--resume_from={folder(mode, 2, 'fsdp')}/checkpoints/0000008"]) for mode in ("lora", "sinkhorn")))
    return folder


def assert_close_runs(ours, expected):
    """The same losses to 1e-5 and gradient norms to 1e-4, iteration by iteration; the same k-NN."""
    theirs = {record["iteration"]: record for record in log(expected)}
    records = [record for record in log(ours) if "loss" in record]
    a, b = losses([theirs[record["iteration"]] for record in records]), losses(records)
    assert ((a - b).abs() <= 1e-5 * a.abs() + 1e-9).all(), ((a - b).abs() / a.abs()).max()
    for record in records:
        assert record["grad_norm"] == pytest.approx(theirs[record["iteration"]]["grad_norm"], rel=1e-4)
        assert record.get("knn_accuracy") == theirs[record["iteration"]].get("knn_accuracy")
    return len(records)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_equal_one(trained, mode, how):
    assert assert_close_runs(trained(mode, 2, how), trained(mode, 1, "none")) == 20
