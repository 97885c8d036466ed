"""One switch: train.py alone, under DDP and under FSDP has the same losses, weights and exports.
Checkpoints go from any to any. What goes wrong on one rank stops all of them. Ranks are forks that
talk over gloo.
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

import dino
import distributed
from checkpoint import load_state
from configurator import UserError, override
from tests_support import ROOT, SHRUNK, assert_same, load_train, log, losses, state

COMMON = [
    *SHRUNK, "--saveckp_freq=8", "--eval_interval=10", "--eval_max_images=12",
    "--generate_samples=false", "--warmup_iterations=2",
    "--freeze_last_layer=5", "--image_mean=0.5", "--image_std=0.25", "--model_type=dinov2",
    "--drop_path_rate=0", "--lora_dropout=0"]
MODES = {  # everything at once, three times: what one leaves out, another has
    "centering": [
        "config/dinov2.py", "--centering=centering", "--gradient_accumulation_steps=2",
        "--activation_checkpointing=true", "--clip_grad_by=parameter", "--clip_grad=0.05",
        "--freeze_last_layer_by=grad", "--dino_head_norm_last_layer=false",
        "--freeze_backbone_layers=1", "--freeze_backbone_until=12",
        "--freeze_backbone_iterations=4", "--max_iterations=20"],
    "sinkhorn": [
        "config/dinov3.py", "--model_type=dinov3_vit", "--gradient_accumulation_steps=1",
        "--pos_embed_rescale=0", "--clip_grad_by=module", "--clip_grad=0.05",
        "--gram_loss_weight=1", "--gram_teacher=start", "--gram_crops_size=48",
        "--label_guided_crops_number=2", "--label_guided_loss_weight=1", "--max_iterations=12"],
    "lora": [
        "config/dinov1.py", "--use_lora=true", "--freeze_backbone_layers=1",
        "--num_hidden_layers=3", "--gram_loss_weight=1", "--gram_teacher=snapshot",
        "--gram_refresh_iterations=7", "--freeze_backbone_iterations=3", "--max_iterations=12"]}
ITERATIONS = dict(centering=20, sinkhorn=12, lora=12)


def worker(rank, world, port, jobs):
    """One rank: train.py once for every job, in one process group. It prints to {out}-{rank}.txt.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for out, argv, change in jobs:
        module = load_train()
        module.cleanup = distributed.barrier  # the next job goes on in the same group
        files = [os.path.join(ROOT, name) for name in argv if name.endswith(".py")]
        flags = [flag for flag in argv if flag.startswith("--")]
        argv = [*files, *COMMON, *flags, f"--out_dir={out}"]
        with open(f"{out}-{rank}.txt", "a") as file, contextlib.redirect_stdout(file):
            try:
                with change(rank, module) if change else contextlib.nullcontext():
                    module.main(override(vars(module), module.config_keys, argv))
            except UserError as error:
                print(f"error: {error}")
    distributed.cleanup()


def train(world, *jobs):
    """Run train.py on `world` forks of this process, once for every job: (folder, arguments, change
    of the module or None)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(worker, args=(world, port, jobs), nprocs=world,
                                          start_method="fork")


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
    """A change: rank `on`, and no other, gets a SIGTERM in that iteration. A queue that wants its
    machine back sends it."""
    def update(original, n, *args):
        original(*args)
        if n == iteration and distributed.rank() == on:
            os.kill(os.getpid(), signal.SIGTERM)
    return lambda rank, module: calls(module.EMATeacher, "update", update)


def nan_on_one_rank(rank, module):
    """A change: the third loss of rank 1 is not a number."""
    def losses_of(original, n, *args):
        total, terms = original(*args)
        if n == 3 and rank == 1:
            total = total * float("nan")
        return total, terms
    return calls(dino, "compute_losses", losses_of)


def full_disk(rank, module):
    """A change: the third checkpoint (the first is that of iteration 0) stops halfway."""
    def save(original, n, what, path):
        original(what, path)
        if n == 3:
            os.truncate(path, os.path.getsize(path) // 2)
            raise OSError(errno.ENOSPC, "No space left on device", path)
    return calls(torch, "save", save)


def count_local(tensors):
    """How many numbers of these tensors this rank holds."""
    return sum(distributed.local_shard(tensor.detach()).numel() for tensor in tensors)


def weigh(rank, module):
    """A change: print how many numbers this rank holds in weights as built and, after the second
    step, in weights, gradients, EMA and moments."""
    def update(original, n, teacher, student, momentum):
        original(teacher, student, momentum)
        if n == 2:
            moments = []
            for entry in found["optimizer"].state.values():
                moments += [entry["exp_avg"], entry["exp_avg_sq"]]
            numbers = dict(weights=count_local(student.parameters()),
                           ema=count_local(teacher.values.values()), moments=count_local(moments),
                           gradients=found["gradients"], built=found["built"])
            print("HELD", json.dumps(numbers))

    def clip(original, n, student, *args):
        grads = [param.grad for param in student.parameters() if param.grad is not None]
        found["gradients"] = count_local(grads)
        return original(student, *args)

    def move_or_shard(original, n, student, *args):
        found["built"] = sum(param.numel() for param in student.parameters() if not param.is_meta)
        return original(student, *args)

    def adamw(original, n, *args, **kwargs):
        found["optimizer"] = original(*args, **kwargs)
        return found["optimizer"]
    found, stack = {}, contextlib.ExitStack()
    for owner, name, instead in ((module.EMATeacher, "update", update),
                                 (dino, "clip_gradients", clip), (torch.optim, "AdamW", adamw),
                                 (module, "move_or_shard", move_or_shard)):
        stack.enter_context(calls(owner, name, instead))
    return stack


FAULTS = {"nan": (nan_on_one_rank, ["--saveckp_freq=1"]),
          "full disk": (full_disk, ["--saveckp_freq=1"]),
          "bad image": (None, ["--dataset_path={images}"]),
          "skipped": (None, ["--dataset_path={images}", "--on_bad_image=skip"])}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, npz):
    """A function (mode, ranks, distribution, ...) -> the folder of that run; all are trained at
    once."""
    root = tmp_path_factory.mktemp("scale")

    def folder(*names):
        return f"{root}/{'-'.join(map(str, names))}"

    def job(mode, *names, more=(), change=None):
        distribution = "none"
        if names[0] > 1:
            distribution = next(name for name in names if name in ("ddp", "fsdp"))
        argv = [*MODES[mode], f"--dataset_path={npz}", f"--cache_dir={root}/cache",
                f"--distribution={distribution}", *more]
        return folder(mode, *names), argv, change

    def resume(*names, checkpoint="/checkpoints/0000008"):
        return f"--resume_from={folder(*names)}{checkpoint}"

    train(1, *(job(mode, 1, "none", change=weigh) for mode in MODES))
    two = []
    for mode in MODES:
        two += [job(mode, 2, how, change=weigh) for how in ("ddp", "fsdp")]
    stopped = ("centering", 2, "fsdp", "resumed")  # in the middle of an epoch, of 5 iterations
    two += [job("centering", 2, "ddp", "resumed",
                more=[resume("centering", 2, "ddp"), "--num_workers=1"]),
            job(*stopped, more=["--num_workers=1"], change=stop_after(8)),
            job(*stopped, more=[resume(*stopped, checkpoint="")])]
    os.mkdir(f"{root}/images")
    for i in range(8):
        Image.fromarray(np.full((40, 40), 20 * i, np.uint8)).save(f"{root}/images/{i}.png")
    with open(f"{root}/images/5.png", "wb") as file:
        file.write(b"not a picture")
    for name, (change, flags) in FAULTS.items():
        flags = [flag.format(images=f"{root}/images") for flag in flags]
        argv = ["--distribution=fsdp", f"--dataset_path={npz}", "--max_iterations=3",
                "--intensity_range=0,255", *flags]
        two.append((folder("fault", name), argv, change))
    two.append(job("lora", 2, "fsdp", "from 1", more=[resume("lora", 1, "none")]))
    train(2, *two)
    train(1, job("lora", 1, "from fsdp", more=[resume("lora", 2, "fsdp")]))
    return folder


def assert_close_runs(ours, expected):
    """The same losses to 1e-5 and gradient norms to 1e-4, iteration by iteration, and the same
    k-NN. Returns how many iterations were compared."""
    by_iteration = {record["iteration"]: record for record in log(expected)}
    records = [record for record in log(ours) if "loss" in record]
    theirs = [by_iteration[record["iteration"]] for record in records]
    a, b = losses(theirs), losses(records)
    assert ((a - b).abs() <= 1e-5 * a.abs() + 1e-9).all(), ((a - b).abs() / a.abs()).max()
    for record, their in zip(records, theirs):
        assert record["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-4)
        assert record.get("knn_accuracy") == their.get("knn_accuracy")
    return len(records)


def exported(folder, name="best"):
    """The tensors of an exported teacher, and its HF config."""
    hf = f"{folder}/checkpoints/{name}/hf"
    with open(f"{hf}/config.json") as file:
        return load_file(f"{hf}/model.safetensors"), json.load(file)


def printed(folder, rank):
    """What a rank printed in all of its runs in this folder."""
    with open(f"{folder}-{rank}.txt") as file:
        return file.read()


both = pytest.mark.parametrize("how", ["ddp", "fsdp"])


@pytest.mark.parametrize("mode", MODES)
@both
def test_two_processes_equal_one(trained, mode, how):
    compared = assert_close_runs(trained(mode, 2, how), trained(mode, 1, "none"))
    assert compared == ITERATIONS[mode]


def test_four_processes_equal_one(trained, npz, tmp_path):
    """And a signal to the last of them stops all."""
    out = f"{tmp_path}/four"
    argv = [*MODES["sinkhorn"], f"--dataset_path={npz}", f"--cache_dir={tmp_path}/cache",
            "--distribution=fsdp"]
    train(4, (out, argv, stop_after(3, on=3)))
    assert assert_close_runs(out, trained("sinkhorn", 1, "none")) == 3


@pytest.mark.parametrize("mode", MODES)
def test_fsdp_shards_all_that_training_holds(trained, mode):
    """Rank 0 alone builds all weights. Then each of two ranks holds half of the weights, gradients,
    moments and EMA values; the shares add up to the whole."""
    def held(rank, *names):
        text = printed(trained(mode, *names), rank)
        return json.loads(text.split("HELD ")[1].splitlines()[0])
    alone, ddp = held(0, 1, "none"), held(1, 2, "ddp")
    shares = [held(rank, 2, "fsdp") for rank in (0, 1)]
    assert alone == ddp
    assert 2 * alone["ema"] >= alone["moments"] > 0 and alone["weights"] > 0
    built = [numbers.pop("built") for numbers in (ddp, *shares, alone)]
    assert built == [alone["weights"], alone["weights"], 0, alone["weights"]]
    for part, whole in alone.items():
        first, second = (share[part] for share in shares)
        assert first + second == whole, part
        assert abs(first / whole - 0.5) < 0.1, part


@pytest.mark.parametrize("mode", MODES)
@both
def test_checkpoint_and_export_are_whole(trained, mode, how):
    """They have the names, shapes and, to rounding, values that one process alone writes, moments
    and anchors included."""
    def assert_close(value, expected, name):
        if "k_proj.bias" in name or "key.bias" in name:
            return  # attention ignores it: its gradient is rounding, which AdamW makes large
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=2e-5, msg=name)

    def shapes(moments):
        return {name: value.shape for name, value in moments.items()}

    ours, alone = state(trained(mode, 2, how)), state(trained(mode, 1, "none"))
    for key in ("student", "ema", "anchor"):
        assert (ours[key] or {}).keys() == (alone[key] or {}).keys()
        for name, value in (ours[key] or {}).items():
            assert_close(value, alone[key][name], f"{key} {name}")
    for index, expected in alone["optimizer"]["state"].items():
        moments = ours["optimizer"]["state"][index]
        assert shapes(expected) == shapes(moments)
        assert expected["step"] == moments["step"]
    weights, config = exported(trained(mode, 2, how))
    expected_weights, expected_config = exported(trained(mode, 1, "none"))
    assert config == expected_config
    assert weights.keys() == expected_weights.keys() and len(weights) > 20
    for name, value in weights.items():
        assert_close(value, expected_weights[name], name)


def test_saved_under_fsdp_on_two_goes_on_alone_and_back(trained):
    for there in ((1, "from fsdp"), (2, "fsdp", "from 1")):
        # its log begins with that of the run that it resumes
        assert assert_close_runs(trained("lora", *there), trained("lora", 1, "none")) == 12
    text = printed(trained("lora", 1, "from fsdp"), 0)
    assert "changed since: distribution: 'fsdp' -> 'none'" in text


@both
def test_resuming_is_exact(trained, how):
    """The same bits, resumed in the middle of an epoch, with a worker, accumulation and layers that
    thaw later."""
    resumed, whole = trained("centering", 2, how, "resumed"), trained("centering", 2, how)
    assert_same(state(resumed), state(whole) | dict(config=state(resumed)["config"]))
    assert_same(exported(resumed, "last")[0], exported(whole, "last")[0])
    parts = [record for record in log(resumed) if "loss" in record]
    assert torch.equal(losses(parts), losses(log(whole))) and len(parts) == 20


def test_a_signal_to_one_rank_stops_all(trained):
    """Rank 1 alone got it; rank 0 says how to go on, with the numbers of torchrun."""
    stopped = trained("centering", 2, "fsdp", "resumed")
    first, second = (printed(stopped, rank) for rank in (0, 1))
    assert "stopped by a signal after iteration 8, saved" in first and "\nerror:" not in first
    assert "error" not in second and "resuming" in first
    assert (f"torchrun --nnodes=1 --nproc_per_node=2 train.py {stopped}/config.py "
            f"--resume_from={stopped}\n") in first


# ---- what goes wrong on one rank stops all of them ----

def last_lines(folder):
    """The last line of each rank, in a list; an empty list if the rank printed nothing."""
    return [printed(folder, rank).splitlines()[-1:] for rank in (0, 1)]


def test_a_loss_that_is_no_number_on_one_rank(trained):
    folder = trained("fault", "nan")
    first, second = last_lines(folder)
    assert first == second and "error: loss is nan at iteration 2 (" in first[0]
    assert len(first[0].split("[")[1].split(",")) == 8  # it names the images of both ranks
    saved = load_state(folder)
    assert saved["iteration"] == 2
    assert all(torch.isfinite(value).all() for value in saved["ema"].values())


def test_a_full_disk_on_rank_0(trained):
    folder = trained("fault", "full disk")
    first, second = last_lines(folder)
    assert first == second
    assert "state.pt.part cannot be written: [Errno 28] No space left on device" in first[0]
    assert load_state(folder)["iteration"] == 1
    assert os.listdir(f"{folder}/checkpoints/last") == ["state.pt"]


def test_an_unreadable_image_on_one_rank(trained):
    first, second = last_lines(trained("fault", "bad image"))
    assert first == second and "images/5.png: cannot be read" in first[0]
    folder = trained("fault", "skipped")
    text = printed(folder, 0)
    assert text.count("images/5.png: cannot be read") == 1
    assert "1 image(s) could not be read" in text
    assert last_lines(folder)[1] == []
