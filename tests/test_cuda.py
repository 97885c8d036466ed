"""Training on a GPU, against the CPU. All of it is skipped without CUDA; tests/gpu.sh runs it on a
fresh machine. What can be shown without a GPU, tests/test_sync.py shows."""
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurator import override
from distributed import autocast_for
from loader import make_loader
from model import blocks, compile_blocks, embed, used_features
from run import LossCheck
from tests_support import (RECIPES, ROOT, SHRUNK, load_train, log, recipe_batches, recipe_config,
                           recipe_state, recipe_step, recipe_student)

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not CUDA, reason="no CUDA device")
two_gpus = pytest.mark.skipif(CUDA and torch.cuda.device_count() < 2, reason="fewer than two GPUs")
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
# Relative difference of a loss from that of the CPU in fp32, after up to three steps
TOLERANCE = dict(no=2e-3, bf16=3e-2, fp16=1e-2)


def losses_of(config, device, steps=3, compiled=False, sync="default"):
    """[{term: loss}] of some steps, and the state after them."""
    batches, photometrics = recipe_batches(config, steps)
    student = recipe_student(config, device).to(device)
    state, losses, found = recipe_state(config, student, device), LossCheck(), []
    if compiled:
        compile_blocks(student.backbone)
    autocast = autocast_for(device, config.mixed_precision)
    for number, batch in enumerate(batches):
        if device.type == "cuda":
            batch = {key: value.pin_memory() if torch.is_tensor(value) else value
                     for key, value in batch.items()}
            torch.cuda.synchronize()
            # the first step may wait: it makes the moments and chooses kernels
            torch.cuda.set_sync_debug_mode(sync if number > 0 else "default")
        try:
            recipe_step(config, state, batch, photometrics, device, losses, autocast)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        found.append(losses.read())
    return found, state


def assert_near(found, expected, tolerance):
    for ours, theirs in zip(found, expected):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            near = pytest.approx(theirs[name], rel=tolerance, abs=tolerance / 10)
            assert ours[name] == near, (name, found, expected)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_of_three_steps_are_those_of_the_cpu(recipe, precision):
    config = recipe_config(recipe)
    expected, _ = losses_of(config, CPU)
    found, state = losses_of(recipe_config(recipe, f"--mixed_precision={precision}"), GPU)
    assert_near(found, expected, TOLERANCE[precision])
    assert state.optimizer.defaults["fused"] and state.scaler.is_enabled() == (precision == "fp16")
    assert all(param.is_cuda for param in state.student.parameters())


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_step_waits_for_the_gpu(recipe, precision):
    """torch raises at every call that waits."""
    losses_of(recipe_config(recipe, f"--mixed_precision={precision}"), GPU, sync="error")


@pytest.mark.parametrize("recipe", ["dinov1", "dinov2", "dinov3"])
def test_compiled_blocks_have_the_same_losses(recipe):
    config = recipe_config(recipe)
    assert_near(losses_of(config, GPU, compiled=True)[0], losses_of(config, GPU)[0], 2e-3)


@pytest.mark.parametrize("recipe", ["dinov1", "dinov2", "dinov3"])
def test_attention_is_a_fused_kernel(recipe):
    """Forward and backward with flash and memory-efficient attention only: torch raises if it would
    have to compute the matrix of all pairs. Also in the last block, with CLS as its only query."""
    backbone = recipe_student(recipe_config(recipe), GPU).to(GPU).backbone
    assert backbone.config._attn_implementation == "sdpa"
    pixels = torch.randn(4, 3, 32, 32, device=GPU)
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    for with_patches in (False, True):
        with sdpa_kernel(fused), torch.autocast("cuda", torch.bfloat16):
            cls, _, _ = used_features(backbone, *embed(backbone, pixels), with_patches=with_patches)
            cls.float().sum().backward()
    assert all(param.grad is not None for param in blocks(backbone)[-1].parameters())


def test_batches_are_pinned():
    config = recipe_config("dinov2", "--num_workers=1")
    batches, _ = recipe_batches(config)

    class Same(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, item):
            return {}

        def collate(self, items):
            return batches[0]
    batch = next(iter(make_loader(Same(), config, 1, 0, 1, GPU)))
    for key in ("global_crops", "local_crops", "masks"):
        assert batch[key].is_pinned(), key
    assert batch["masked"][0].is_pinned()


def command(out, npz, *argv):
    return [sys.executable, "train.py", *SHRUNK, f"--out_dir={out}", f"--cache_dir={out}-cache",
            f"--dataset_path={npz}", *argv, "--device=cuda", "--max_iterations=12",
            "--eval_interval=0", "--mixed_precision=bf16"]


def losses_in(out):
    return [record["loss"] for record in log(out) if "loss" in record]


def test_a_killed_run_goes_on_where_it_was(npz, tmp_path):
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    subprocess.run(command(whole, npz), cwd=ROOT, check=True)
    process = subprocess.Popen(command(cut, npz), cwd=ROOT)
    while not os.path.isdir(f"{cut}/checkpoints/0000004"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*command(cut, npz), "--resume_from=auto"], cwd=ROOT, check=True)
    found, expected = losses_in(cut), losses_in(whole)
    assert len(found) == len(expected) == 12
    assert found == pytest.approx(expected, rel=TOLERANCE["bf16"])


@pytest.mark.parametrize("distribution", ["ddp", "fsdp"])
@pytest.mark.parametrize("n_ranks", [1, pytest.param(2, marks=two_gpus)])
def test_ranks_have_the_losses_of_one_process(npz, tmp_path, distribution, n_ranks):
    one, many = str(tmp_path / "one"), str(tmp_path / "many")
    subprocess.run(command(one, npz), cwd=ROOT, check=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc_per_node={n_ranks}", *command(many, npz)[1:]]
    subprocess.run([*torchrun, f"--distribution={distribution}"], cwd=ROOT, check=True)
    assert losses_in(many) == pytest.approx(losses_in(one), rel=TOLERANCE["bf16"])


def test_a_loss_that_is_not_a_number_never_reaches_the_disk(npz, tmp_path, monkeypatch):
    """On a GPU it is read one step late; a checkpoint in between is not written."""
    import dino
    from configurator import UserError
    module, original = load_train(), dino.forward_backward

    def poisoned(state, *args, **kwargs):
        terms, row_sums, view = original(state, *args, **kwargs)
        if state.iteration == 3:
            terms["loss"] = terms["loss"] * math.nan
        return terms, row_sums, view
    monkeypatch.setattr(dino, "forward_backward", poisoned)
    argv = command(str(tmp_path / "run"), npz, "--saveckp_freq=2", "--log_interval=100")[2:]
    with pytest.raises(UserError, match="loss is nan at iteration 3 .*nothing of it was saved"):
        module.main(override(vars(module), module.config_keys, argv))
    assert os.path.isdir(tmp_path / "run/checkpoints/0000002")
    assert not os.path.exists(tmp_path / "run/checkpoints/0000004")
