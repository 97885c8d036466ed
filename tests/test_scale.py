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

COMMON = [*SHRUNK, "--koleo_loss_weight=0", "--saveckp_freq=8", "--eval_interval=10", "--eval_max_images=12", "--generate_samples=false", "--warmup_iterations=2", "--freeze_last_layer=5",
          "--image_mean=0.5", "--image_std=0.25", "--model_type=dinov2", "--drop_path_rate=0", "--lora_dropout=0"]
# everything at once, three times: what one leaves out, another has
MODES = {
    "centering": ["config/dinov2.py", "--centering=centering", "--gradient_accumulation_steps=2", "--activation_checkpointing=true",
                  "--clip_grad_by=parameter", "--clip_grad=0.05", "--freeze_last_layer_by=grad", "--dino_head_norm_last_layer=false",
                  "--freeze_backbone_layers=1", "--freeze_backbone_until=12", "--freeze_backbone_iterations=4", "--max_iterations=20"],
    "sinkhorn": ["config/dinov3.py", "--model_type=dinov3_vit", "--gradient_accumulation_steps=1", "--pos_embed_rescale=0", "--clip_grad_by=module",
                 "--clip_grad=0.05", "--gram_loss_weight=1", "--gram_teacher=start", "--gram_crops_size=48", "--label_guided_crops_number=2",
                 "--label_guided_loss_weight=1", "--max_iterations=12"],
    "lora": ["config/dinov1.py", "--use_lora=true", "--freeze_backbone_layers=1", "--num_hidden_layers=3", "--gram_loss_weight=1",
             "--gram_teacher=snapshot", "--gram_refresh_iterations=7", "--freeze_backbone_iterations=3", "--max_iterations=12"]}


def worker(rank, world, port, jobs):
    """One rank: train.py once for every job in one process group. What it says goes to {out}-{rank}.txt."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for out, argv, change in jobs:
        module = load_train()
        module.cleanup = distributed.barrier                  # the next job goes on in the same group
        files = [os.path.join(ROOT, name) for name in argv if name.endswith(".py")]
        flags = [flag for flag in argv if flag.startswith("--")]
        with open(f"{out}-{rank}.txt", "a") as file, contextlib.redirect_stdout(file):
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


def nan_on_one_rank(rank, module):
    def losses_of(original, n, *args):
        total, terms = original(*args)
        return (total * float("nan"), terms) if n == 3 and rank == 1 else (total, terms)
    return calls(module, "compute_losses", losses_of)


def full_disk(rank, module):
    """The third checkpoint (the first is that of iteration 0) stops halfway."""
    def save(original, n, what, path):
        original(what, path)
        if n == 3:
            os.truncate(path, os.path.getsize(path) // 2)
            raise OSError(errno.ENOSPC, "No space left on device", path)
    return calls(torch, "save", save)


def weigh(rank, module):
    """A change: how many numbers this rank holds in weights as built, and after the second step in weights, gradients,
    EMA and moments."""
    def update(original, n, teacher, student, momentum):
        original(teacher, student, momentum)
        if n == 2:
            moments = [entry[key] for entry in found["optimizer"].state.values() for key in ("exp_avg", "exp_avg_sq")]
            parts = dict(weights=student.parameters(), ema=teacher.values.values(), moments=moments)
            numbers = {name: sum(distributed.local(tensor.detach()).numel() for tensor in part) for name, part in parts.items()}
            print("HELD", json.dumps(dict(numbers, gradients=found["gradients"], built=found["built"])))

    def clip(original, n, student, *args):
        found["gradients"] = sum(distributed.local(param.grad).numel() for param in student.parameters() if param.grad is not None)
        return original(student, *args)

    def move_or_shard(original, n, student, *args):
        found["built"] = sum(param.numel() for param in student.parameters() if not param.is_meta)
        return original(student, *args)

    def groups(original, n, *args, **kwargs):
        found["optimizer"] = original(*args, **kwargs)
        return found["optimizer"]
    found, stack = {}, contextlib.ExitStack()
    for owner, name, instead in ((module.EMATeacher, "update", update), (module, "clip_gradients", clip), (torch.optim, "AdamW", groups),
                                 (module, "place", place)):
        stack.enter_context(calls(owner, name, instead))
    return stack


FAULTS = {"nan": (nan_on_one_rank, ["--saveckp_freq=1"]), "full disk": (full_disk, ["--saveckp_freq=1"]),
          "bad image": (None, ["--dataset_path={images}"]), "skipped": (None, ["--dataset_path={images}", "--on_bad_image=skip"])}


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
    train(1, *(job(mode, 1, "none", change=weigh) for mode in MODES))
    two = [job(mode, 2, how, change=weigh) for mode in MODES for how in ("ddp", "fsdp")]
    two += [job("centering", 2, "ddp", "resumed", more=[f"--resume_from={folder('centering', 2, 'ddp')}/checkpoints/0000008", "--num_workers=1"]),
            job("centering", 2, "fsdp", "resumed", more=["--num_workers=1"], change=stop_after(8)),    # in the middle of an epoch, of 5 iterations
            job("centering", 2, "fsdp", "resumed", more=[f"--resume_from={folder('centering', 2, 'fsdp', 'resumed')}"])]
    os.mkdir(f"{root}/images")
    for i in range(8):
        Image.fromarray(np.full((40, 40), 20 * i, np.uint8)).save(f"{root}/images/{i}.png")
    open(f"{root}/images/5.png", "wb").write(b"not a picture")
    two += [(folder("fault", name), ["--distribution=fsdp", f"--dataset_path={npz}", "--max_iterations=3", "--intensity_range=0,255",
                                     *(flag.format(images=f"{root}/images") for flag in flags)], change)
            for name, (change, flags) in FAULTS.items()]
    two.append(job("lora", 2, "fsdp", "from 1", more=[f"--resume_from={folder('lora', 1, 'none')}/checkpoints/0000008"]))
    train(2, *two)
    train(1, job("lora", 1, "from fsdp", more=[f"--resume_from={folder('lora', 2, 'fsdp')}/checkpoints/0000008"]))
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


def exported(folder, name="best"):
    """The tensors of an exported teacher, and its HF config."""
    hf = f"{folder}/checkpoints/{name}/hf"
    return load_file(f"{hf}/model.safetensors"), json.load(open(f"{hf}/config.json"))


both = pytest.mark.parametrize("how", ["ddp", "fsdp"])


@pytest.mark.parametrize("mode", MODES)
@both
def test_two_processes_equal_one(trained, mode, how):
    assert assert_close_runs(trained(mode, 2, how), trained(mode, 1, "none")) == (20 if mode == "centering" else 12)


def test_four_processes_equal_one(trained, npz, tmp_path):  # noqa: F811
    """And a signal to the last of them stops all."""
    out = f"{tmp_path}/four"
    train(4, (out, [*MODES["sinkhorn"], f"--dataset_path={npz}", f"--cache_dir={tmp_path}/cache", "--distribution=fsdp"], stop_after(3, on=3)))
    assert assert_close_runs(out, trained("sinkhorn", 1, "none")) == 3


@pytest.mark.parametrize("mode", MODES)
def test_fsdp_shards_all_that_training_holds(trained, mode):
    """Rank 0 alone builds all weights. Then half of the weights, gradients, moments and EMA values are on each of two
    ranks; the shares add up to the whole."""
    def held(rank, *names):
        text = open(f"{trained(mode, *names)}-{rank}.txt").read()
        return json.loads(text.split("HELD ")[1].splitlines()[0])
    alone, ddp, shares = held(0, 1, "none"), held(1, 2, "ddp"), [held(rank, 2, "fsdp") for rank in (0, 1)]
    assert alone == ddp and 2 * alone["ema"] >= alone["moments"] > 0 and alone["weights"] > 0
    built = [numbers.pop("built") for numbers in (ddp, *shares, alone)]
    assert built == [alone["weights"], alone["weights"], 0, alone["weights"]]
    for part, whole in alone.items():
        assert shares[0][part] + shares[1][part] == whole and abs(shares[0][part] / whole - 0.5) < 0.1, part


@pytest.mark.parametrize("mode", MODES)
@both
def test_checkpoint_and_export_are_whole(trained, mode, how):
    """The same names, shapes and, to rounding, values as one process alone writes, moments and anchors included."""
    ours, alone = state(trained(mode, 2, how)), state(trained(mode, 1, "none"))
    for key in ("student", "teacher", "anchor"):
        assert (ours[key] or {}).keys() == (alone[key] or {}).keys()
        for name, value in (ours[key] or {}).items():
            torch.testing.assert_close(value, alone[key][name], rtol=1e-3, atol=2e-5, msg=f"{key} {name}")
    for index, entry in alone["optimizer"]["state"].items():
        assert {name: value.shape for name, value in entry.items()} == \
            {name: value.shape for name, value in ours["optimizer"]["state"][index].items()}
        assert entry["step"] == ours["optimizer"]["state"][index]["step"]
    (weights, config), (expected, expected_config) = exported(trained(mode, 2, how)), exported(trained(mode, 1, "none"))
    assert config == expected_config and weights.keys() == expected.keys() and len(weights) > 20
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5, msg=name)


def test_saved_under_fsdp_on_two_goes_on_alone_and_back(trained):
    for there in ((1, "from fsdp"), (2, "fsdp", "from 1")):
        assert assert_close_runs(trained("lora", *there), trained("lora", 1, "none")) == 4
    assert "changed since: distribution: 'fsdp' -> 'none'" in open(trained("lora", 1, "from fsdp") + "-0.txt").read()


@both
def test_resuming_is_exact(trained, how):
    """In the middle of an epoch, with a worker, accumulation and layers that thaw later: the same bits."""
    resumed, whole = trained("centering", 2, how, "resumed"), trained("centering", 2, how)
    assert_same(state(resumed), state(whole) | dict(config=state(resumed)["config"]))
    assert_same(exported(resumed, "last")[0], exported(whole, "last")[0])
    parts = [record for record in log(resumed) if "loss" in record]
    assert torch.equal(losses(parts), losses(log(whole))[-len(parts):]) and len(parts) == (20 if how == "fsdp" else 12)


def test_a_signal_to_one_rank_stops_all(trained):
    """Rank 1 alone got it; rank 0 says how to go on, with the numbers of torchrun."""
    stopped = trained("centering", 2, "fsdp", "resumed")
    said = [open(f"{stopped}-{rank}.txt").read() for rank in (0, 1)]
    assert "stopped by a signal after iteration 8, saved" in said[0] and "\nerror:" not in said[0]
    assert "error" not in said[1] and "resuming" in said[0]
    assert f"torchrun --nnodes=1 --nproc_per_node=2 train.py {stopped}/config.py --resume_from={stopped}\n" in said[0]


# ---- what goes wrong on one rank stops all of them ----

def said(trained, fault):
    """What each rank said in its last line, and what is left in the folder."""
    folder = trained("fault", fault)
    return [open(f"{folder}-{rank}.txt").read().splitlines()[-1:] for rank in (0, 1)], folder


def test_a_loss_that_is_no_number_on_one_rank(trained):
    lines, folder = said(trained, "nan")
    assert lines[0] == lines[1] and "error: loss is nan at iteration 2 (" in lines[0][0]
    assert len(lines[0][0].split("[")[1].split(",")) == 8     # the images of both ranks are named
    saved = load_state(folder)
    assert saved["iteration"] == 2 and all(torch.isfinite(value).all() for value in saved["teacher"].values())


def test_a_full_disk_on_rank_0(trained):
    lines, folder = said(trained, "full disk")
    assert lines[0] == lines[1] and "state.pt.part cannot be written: [Errno 28] No space left on device" in lines[0][0]
    assert load_state(folder)["iteration"] == 1 and sorted(os.listdir(f"{folder}/checkpoints/last")) == ["state.pt"]


def test_an_unreadable_image_on_one_rank(trained):
    lines, _ = said(trained, "bad image")
    assert lines[0] == lines[1] and "images/5.png: cannot be read" in lines[0][0]
    lines, folder = said(trained, "skipped")
    text = open(folder + "-0.txt").read()
    assert text.count("images/5.png") == 1 and "1 image(s) could not be read" in text and lines[1] == []
