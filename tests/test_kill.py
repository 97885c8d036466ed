"""A kill at every file operation of a run: what is resumed ends as the uninterrupted run ends.

An audit hook lists the operations of a tiny run that change files. As many runs follow. Each is a
fork of this process that is killed at one of them. A file that is being written gets another run,
which is killed while the file is torn. Then --resume_from=auto goes on, and every file is compared.

    python -m pytest tests/test_kill.py               # 15 moments of each script
    KILL=all python -m pytest tests/test_kill.py      # all of them, minutes
"""
import collections
import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch

from configurator import override
from model import build_backbone
from phantom import make_phantom
from tests_support import SHRUNK, TINY, assert_same, load_script

TINIEST = ["--hidden_size=8", "--num_hidden_layers=1", "--num_attention_heads=1",
           "--head_hidden_dim=8", "--head_bottleneck_dim=4", "--dino_head_out_dim=8",
           "--ibot_out_dim=8", "--global_crops_size=16", "--local_crops_number=0",
           "--global_batch_size=4", "--max_iterations=4", "--image_mean=0.5", "--image_std=0.25",
           "--intensity_range=-900,400", "--out_dir=run", "--cache_dir=cache",
           "--resume_from=auto"]
DISTILL = ["--distilled_crops_size=16", "--distilled_statistics_views=16", "--fixed_views=2",
           "--teacher_cache=features"]
CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "torch.save", "flush")
TIMES = ("images_per_second", "memory_gb", "minutes")
Moment = collections.namedtuple("Moment", "number event path torn")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A function script -> its command line, of a tiny data set and a tiny teacher."""
    folder = tmp_path_factory.mktemp("sources")
    arrays, sizes = {}, dict(train=16, val=8, test=8)
    for seed, (split, n) in enumerate(sizes.items()):
        for key, value in make_phantom(n, 24, seed).items():
            arrays[f"{split}_{key}"] = value
    np.savez_compressed(folder / "phantom.npz", **arrays)
    torch.manual_seed(1)
    sizes = dict(TINY, num_hidden_layers=1, image_size=16)
    build_backbone("dinov2", False, 3, **sizes).save_pretrained(folder / "teacher")

    def flags(script):
        more = [*TINIEST, f"--dataset_path={folder}/phantom.npz"]
        if script == "distill":
            more += [*DISTILL, f"--distilled_model_type={folder}/teacher"]
        keys = load_script(script).config_keys
        return [flag for flag in SHRUNK + more if flag[2:].split("=")[0] in keys]
    return flags


def run_in_fork(script, flags, folder, act=None):
    """Run a script in a fork of this process, in `folder`. Returns its exit status, below 0 for a
    signal. What it prints goes to output.txt beside the folder. act: of watch."""
    pid = os.fork()
    if pid > 0:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        output = os.open(f"{folder}.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        module = load_script(script)
        changed = override(vars(module), module.config_keys, flags)
        if act:
            watch(str(folder), act)
        status = module.main(changed)
    except BaseException as error:
        print(repr(error), flush=True)
    finally:
        os._exit(status)


def watch(folder, act):
    """Call act(number, event, path below folder, mode) before every operation in a folder that
    changes files. mode: of an opened file, else ''. torch.save and numpy's flush count as well:
    they write without Python's knowledge, and act is called afterwards."""
    number, busy = 0, False

    def hook(event, args):
        nonlocal number, busy
        if busy or event != "open" and event not in CHANGES or isinstance(args[0], int):
            return
        busy = True
        path, mode = os.fsdecode(args[0]), ""
        if event in ("os.remove", "os.rmdir") and args[1] >= 0:  # of shutil.rmtree
            path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path)
        path = os.path.abspath(path)
        if event == "open":
            mode = args[1] or ("w" if args[2] & (os.O_WRONLY | os.O_RDWR) else "r")
        without_effect = event == "os.mkdir" and os.path.exists(path)
        without_effect |= event == "os.remove" and not os.path.exists(path)
        if event == "open":  # tempfile opens a folder for a file without a name
            without_effect |= not set(mode) & set("wax+") or os.path.isdir(path)
        if path.startswith(folder + os.sep) and not without_effect:
            act(number, event, path[len(folder) + 1:], mode)
            number += 1
        busy = False

    def audited(function, event, find_path):
        def call(*args):
            function(*args)
            sys.audit(event, find_path(args))
        return call

    torch.save = audited(torch.save, "torch.save", lambda args: args[1])
    np.memmap.flush = audited(np.memmap.flush, "flush", lambda args: args[0].filename)
    sys.addaudithook(hook)


def list_moments(script, flags, folder):
    """Run a script without a kill; returns its Moments."""
    listed = folder.parent / f"{script}.jsonl"

    def note(*moment):
        with open(listed, "a") as file:
            file.write(json.dumps(moment) + "\n")
    assert run_in_fork(script, flags, folder, note) == 0, open(f"{folder}.txt").read()
    moments = []
    for line in open(listed):
        number, event, path, mode = json.loads(line)
        moments.append(Moment(number, event, path, False))
        if event == "torch.save" or set(mode) & set("wax"):
            moments.append(Moment(number, event, path, True))
    return moments


def killed_at(moment):
    """An act for watch that ends this process at a moment. A torn file has the half of what
    torch.save has written, is empty, or has a cut line behind what was there."""
    def act(number, event, path, mode):
        if number != moment.number:
            return
        assert (event, path.split("/")[0]) == (moment.event, moment.path.split("/")[0])
        if moment.torn and event == "torch.save":
            os.truncate(path, os.path.getsize(path) // 2)
        elif moment.torn:
            with open(path, "a" if "a" in mode else "w") as file:
                file.write('{"iteration": 1, "los' if "a" in mode else "")
        os.kill(os.getpid(), signal.SIGKILL)
    return act


def files_below(folder):
    """Paths of all files below a folder, relative to it, sorted."""
    paths = []
    for root, _, files in os.walk(folder):
        paths += [os.path.relpath(os.path.join(root, file), folder) for file in files]
    return sorted(paths)


def without_times(text):
    """The objects of a .json or .jsonl, without the entries that no two runs share."""
    records = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES}
            for record in records]


def assert_equal_runs(folder, whole):
    """All that a script has written is equal, byte for byte where it is deterministic."""
    written = files_below(folder)
    assert written == files_below(whole)
    for path in written:
        a, b = folder / path, whole / path
        if path.endswith("state.pt"):
            assert_same(torch.load(a, weights_only=True), torch.load(b, weights_only=True))
        elif path.endswith((".jsonl", "summary.json")):
            assert without_times(a.read_text()) == without_times(b.read_text()), path
        elif path == "run/logs/run.json":
            assert json.loads(a.read_text())["process"] == 0
        elif path == "run/logs/train.log":
            end = ("Done: 4 iterations", "all 4 iterations, nothing is missing")
            assert any(words in a.read_text() for words in end)
        else:
            assert a.read_bytes() == b.read_bytes(), path


@pytest.mark.parametrize("script", ["train", "distill"])
def test_a_kill_at_any_file_operation_loses_nothing(script, sources, tmp_path):
    flags, whole = sources(script), tmp_path / "whole"
    whole.mkdir()
    moments = list_moments(script, flags, whole)
    chosen = moments
    if os.environ.get("KILL") != "all":
        chosen = [moments[i] for i in np.linspace(0, len(moments) - 1, 15).astype(int)]
    lost = []
    for moment in chosen:
        folder = tmp_path / f"killed{moment.number}-{moment.torn}"
        folder.mkdir()
        try:
            assert run_in_fork(script, flags, folder, killed_at(moment)) == -signal.SIGKILL
            assert run_in_fork(script, flags, folder) == 0, open(f"{folder}.txt").read()[-600:]
            assert_equal_runs(folder, whole)
        except AssertionError as error:
            lost.append(f"{moment}: {error}")
        shutil.rmtree(folder)
    print(f"{script}: killed at {len(chosen)} of {len(moments)} moments, {len(lost)} lost")
    assert not lost, "\n".join(lost)
