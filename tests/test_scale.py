"""One switch: train.py alone, under DDP and under FSDP on gloo processes has the same losses, weights and exports.

KoLeo is off throughout: it looks for neighbours on its own rank, by definition.
"""
import os
import socket

import pytest
import torch
import torch.multiprocessing

import distributed
from configurator import override
from test_train import SHRUNK, assert_same, load_train, log, losses, npz, state  # noqa: F401
from tests_support import ROOT

COMMON = ["--koleo_loss_weight=0", "--max_iterations=20", "--eval_interval=10", "--saveckp_freq=20", "--generate_samples=false",
          "--warmup_iterations=2", "--freeze_last_layer=5", "--image_mean=0.5", "--image_std=0.25", "--model_type=dinov2",
          "--drop_path_rate=0", "--lora_dropout=0"]
# everything at once, three times: what one leaves out, another has
MODES = {
    "centering": ["config/dinov2.py", "--centering=centering", "--gradient_accumulation_steps=2", "--activation_checkpointing=true",
                  "--clip_grad_by=parameter", "--clip_grad=0.05", "--freeze_last_layer_by=grad", "--dino_head_norm_last_layer=false",
                  "--freeze_backbone_layers=1", "--freeze_backbone_until=12", "--freeze_backbone_iterations=4"],
    "sinkhorn": ["config/dinov3.py", "--model_type=dinov3_vit", "--gradient_accumulation_steps=1", "--pos_embed_rescale=0",
                 "--clip_grad_by=module", "--clip_grad=0.05", "--gram_loss_weight=1", "--gram_teacher=start"],
    "lora": ["config/dinov1.py", "--use_lora=true", "--freeze_backbone_layers=1", "--num_hidden_layers=3",
             "--gram_loss_weight=1", "--gram_teacher=snapshot", "--gram_refresh_iterations=7", "--freeze_backbone_iterations=3"]}


def worker(rank, world, port, jobs):
    """One rank: train.py once for every job, in one process group."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    for argv in jobs:
        module = load_train()
        module.cleanup = distributed.barrier                  # the next job goes on in the same group
        files = [os.path.join(ROOT, name) for name in argv if name.endswith(".py")]
        module.main(override(vars(module), module.config_keys, [*files, *SHRUNK, *(flag for flag in argv if flag.startswith("--"))]))
    distributed.cleanup()


def train(world, *jobs):
    """train.py on `world` new processes, for each list of arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(world, port, jobs), nprocs=world)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, npz):  # noqa: F811
    """{(mode, ranks, distribution): folder}, all runs of this file's comparisons; two starts of two processes in all."""
    root, folders = tmp_path_factory.mktemp("scale"), {}

    def job(mode, ranks, distribution, *more):
        out = folders[mode, ranks, distribution] = f"{root}/{mode}-{ranks}-{distribution}"
        return [*MODES[mode], *COMMON, f"--dataset_path={npz}", f"--cache_dir={root}/cache", f"--out_dir={out}",
                f"--distribution={distribution}", *more]
    train(1, *(job(mode, 1, "none") for mode in MODES))
    train(2, *(job(mode, 2, how) for mode in MODES for how in ("ddp", "fsdp")))
    return folders


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_equal_one(trained, mode, how):
    alone, two = (log(trained[mode, *where]) for where in ((1, "none"), (2, how)))
    a, b = losses(alone), losses(two)
    assert len(a) == 20 and ((a - b).abs() <= 1e-5 * a.abs() + 1e-9).all(), ((a - b).abs() / a.abs()).max()
    for key in ("grad_norm", "teacher_entropy"):
        assert [r[key] for r in two if "loss" in r] == pytest.approx([r[key] for r in alone if "loss" in r], rel=1e-4)
    assert [r["knn_accuracy"] for r in two if "knn_accuracy" in r] == [r["knn_accuracy"] for r in alone if "knn_accuracy" in r]
