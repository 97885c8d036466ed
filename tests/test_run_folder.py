"""A run's folder: whose it is, who is in it, what is moved; and what a resumed run takes along."""
import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch

import run_folder
from archives import cache_folder
from checkpoint import saved_iteration
from configurator import UserError, override
from data import load_dataset
from run import Run
from run_folder import (check_folder, lock_folder, locks_reach, part_of, read_log, remove,
                        remove_dead_parts, RunFolder, truncate_log, unlock_folder)
from tests_support import ROOT, load_script, log, run, state

QUICK = ["--generate_samples=false", "--image_mean=0.5", "--image_std=0.25",
         "--intensity_range=-900,400", "--local_crops_number=0", "--eval_max_images=8",
         "--max_iterations=2", "--saveckp_freq=1", "--eval_interval=1"]


@contextlib.contextmanager
def opened(path, config_text="lr = 1\n", goes_on=False):
    """A RunFolder that a run has opened; it leaves it at the end."""
    with contextlib.ExitStack() as at_end:
        entered = RunFolder(str(path), "train.py", at_end)
        entered.enter()
        entered.open(config_text, goes_on)
        yield entered


def a_run(path, config_text="lr = 1\n", goes_on=False):
    """A run that logs one line; returns the name that an earlier one was given."""
    with opened(path, config_text, goes_on) as entered:
        with open(f"{path}/log.jsonl", "a") as file:
            file.write('{"iteration": 1}\n')
        return entered.moved_to


def marker(path):
    with open(f"{path}/logs/run.json") as file:
        return json.load(file)


# ---- whose folder ----

def test_an_earlier_run_is_moved_aside_and_a_resumed_one_is_not(tmp_path):
    path = str(tmp_path / "run")
    assert a_run(path) == ""
    assert a_run(path, "lr = 2\n", goes_on=True) == ""  # the same folder, the config of now
    assert a_run(path, "lr = 3\n") == f"{path}.1"
    assert a_run(path, "lr = 4\n") == f"{path}.2"
    for name, lr in ((f"{path}.1", 2), (f"{path}.2", 3), (path, 4)):
        namespace = {}
        with open(f"{name}/config.py") as file:
            exec(file.read(), namespace)
        assert namespace["lr"] == lr
    names = ["checkpoints", "config.py", "log.jsonl", "logs", "results", "samples"]
    assert sorted(os.listdir(path)) == names
    assert marker(path) == dict(marker(path), script="train.py", process=0)


@pytest.mark.parametrize("own_config", [True, False])
def test_a_folder_of_the_user_is_refused_and_not_touched(tmp_path, npz, own_config):
    (tmp_path / "mine/images").mkdir(parents=True)
    (tmp_path / "mine/images/a.png").write_bytes(b"an image")
    if own_config:
        (tmp_path / "mine/config.py").write_text("# resolved config of my own code\n")
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(UserError, match="holds files that no run wrote .*nothing was touched"):
        run(tmp_path / "mine", f"--dataset_path={npz}", *QUICK)
    assert [path for path in before if "cache" not in path] == before
    assert sorted(map(str, (tmp_path / "mine").rglob("*"))) == before[1:]


def test_what_is_not_ours_stays_when_a_run_is_moved(tmp_path):
    path = tmp_path / "run"
    a_run(path)
    (path / "notes.txt").write_text("mine")
    assert a_run(path, "lr = 2\n") == f"{path}.1"
    assert (path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "run.1/notes.txt").exists()
    assert "lr = 1" in (tmp_path / "run.1/config.py").read_text()
    assert log(tmp_path / "run.1") == log(path) == [dict(iteration=1)]


def test_runs_of_older_versions_are_ours(tmp_path):
    path = tmp_path / "run"
    a_run(path)
    os.remove(path / "logs/run.json")
    check_folder(str(path))
    (path / "config.py").write_text("lr = 1\n")
    with pytest.raises(UserError, match="holds files that no run wrote"):
        check_folder(str(path))


def test_a_folder_without_files_and_a_run_that_holds_nothing_are_taken(tmp_path):
    path = tmp_path / "run"
    (path / "logs").mkdir(parents=True)  # as a kill leaves it before there is a marker
    (path / ".gitkeep").touch()
    with opened(path) as first:
        with open(path / "log.jsonl", "w") as file:
            file.write('{"iteration": 0}\n{"iteration": 1, "lo')
    with opened(path, "lr = 2\n") as second:
        pass
    assert first.moved_to == second.moved_to == ""
    assert "lr = 2" in (path / "config.py").read_text() and not (path / "log.jsonl").exists()


def test_a_run_that_fails_before_it_holds_anything_gives_the_name_back(tmp_path):
    path = tmp_path / "run"
    a_run(path)
    with pytest.raises(UserError), opened(path, "lr = 2\n"):
        raise UserError("an image for the first k-NN cannot be read")
    assert "lr = 1" in (path / "config.py").read_text() and os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("out_dir, words", [
    ("file", "file is a file; name a folder"), ("file/run", "file is a file; name a folder"),
    ("/proc/nowhere/run", "cannot be used: No such file or directory: /proc/nowhere")])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, out_dir, words):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=words), opened(os.path.join(tmp_path, out_dir)):
        pass


def test_a_folder_of_somebody_else_is_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match="is read-only for this user"):
        check_folder(str(tmp_path / "run"))


def test_all_that_can_fail_fails_before_the_earlier_run_is_moved(tmp_path, npz, monkeypatch):
    out, flags = tmp_path / "run", [f"--dataset_path={npz}", *QUICK]
    run(out, *flags)
    config = (out / "config.py").read_text()

    class Wandb:
        @staticmethod
        def init(**settings):
            raise RuntimeError("api_key not configured (no-tty)")
    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    best = f"{out}/checkpoints/best/hf"
    for flag, words in (("--wandb_log=true", "Weights & Biases does not start .'api_key not"),
                        ("--dino_head_out_dim=0", "must be in 2.."),
                        (f"--model_type={best}", "lies in the folder of this run")):
        with pytest.raises(UserError, match=words):
            run(out, *flags, flag)
        assert sorted(os.listdir(tmp_path)) == ["run", "run-cache"]
        assert (out / "config.py").read_text() == config and marker(out)["process"] == 0


# ---- who is in it ----

def in_another_process(path):
    """A process that has locked a run's folder."""
    code = ("import sys; sys.path.insert(0, sys.argv[2]); from run_folder import lock_folder; "
            "marker = lock_folder(sys.argv[1], 'train.py'); print('in', flush=True); input()")
    process = subprocess.Popen([sys.executable, "-c", code, str(path), ROOT],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    return process


def test_a_second_run_is_refused_until_the_first_has_died(tmp_path, npz):
    out = tmp_path / "run"
    run(out, f"--dataset_path={npz}", *QUICK)
    first = in_another_process(out)
    try:
        words = (f"run is in use by train.py, process {first.pid} on {socket.gethostname()} since "
                 r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d; wait for its end, or name another out_dir")
        for flag in ("--seed=2", "--resume_from=auto", f"--resume_from={tmp_path}/elsewhere"):
            with pytest.raises(UserError, match=words):
                run(out, f"--dataset_path={npz}", *QUICK, flag)
    finally:
        first.kill()
        first.wait()
    assert marker(out)["process"] == first.pid  # the lock has died with it, the name is stale
    run(out, f"--dataset_path={npz}", *QUICK, "--resume_from=auto", "--max_iterations=3")
    assert state(out)["iteration"] == 3 and sorted(os.listdir(tmp_path)) == ["run", "run-cache"]


def test_two_that_start_at_once_do_not_share_a_new_folder(tmp_path):
    """Both have found no folder. The second one to open it is refused."""
    with contextlib.ExitStack() as at_end:
        late = RunFolder(str(tmp_path / "run"), "train.py", at_end)
        late.enter()
        first = in_another_process(tmp_path / "run")
        try:
            with pytest.raises(UserError, match=f"is in use by train.py, process {first.pid}"):
                late.open("", False)
        finally:
            first.kill()
            first.wait()


def write_marker(path, **content):
    (path / "logs").mkdir(parents=True)
    content = dict(script="train.py", since="2026-01-02 03:04:05", **content)
    (path / "logs/run.json").write_text(json.dumps(content))


@pytest.mark.parametrize("locks, host, process, refused", [
    ("none", "here", "dead", False), ("none", "here", "alive", True), ("none", "other", 1, True),
    ("local", "here", "dead", False), ("local", "other", 1, True),
    ("shared", "here", "alive", False), ("shared", "other", 1, False)])
def test_disks_without_locks_between_machines(tmp_path, monkeypatch, locks, host, process, refused):
    """The lock decides where all machines see it. Elsewhere the name of the host does, and the line
    says what to remove."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    process = dict(dead=ended.pid, alive=os.getppid()).get(process, process)
    host = socket.gethostname() if host == "here" else "node7"

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    if locks == "none":
        monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr(run_folder, "locks_reach", lambda path: locks == "shared")
    write_marker(tmp_path / "run", process=process, host=host)
    if refused:
        words = (f"process {process} on {host} since 2026-01-02 03:04:05; this disk cannot tell "
                 "whether that process still runs; if it has ended, remove "
                 f"{tmp_path}/run/logs/run.json")
        with pytest.raises(UserError, match=re.escape(words)):
            lock_folder(str(tmp_path / "run"), "train.py")
    else:
        unlock_folder(lock_folder(str(tmp_path / "run"), "train.py"))
    assert marker(tmp_path / "run")["process"] == (process if refused else 0)


@pytest.mark.parametrize("mount, reach", [
    ("ext4 rw", True), ("overlay rw", True), ("nfs4 rw,local_lock=none,vers=4.2", True),
    ("nfs rw,nolock,local_lock=all", False), ("lustre rw,flock", True),
    ("lustre rw,localflock", False), ("fuse.sshfs rw", False), ("beegfs rw", False)])
def test_which_disks_pass_locks_on(tmp_path, monkeypatch, mount, reach):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"disk / ext4 rw 0 0\nserver:/a /shared\\040disk {mount} 0 0\n"
                      "other /shared nfs rw,local_lock=all 0 0\n")
    real_open = open
    monkeypatch.setattr("builtins.open", lambda path, *args: real_open(
        mounts if path == "/proc/self/mounts" else path, *args))
    assert locks_reach("/shared disk/out/run/logs/run.json") is reach
    assert locks_reach("/home/out/run/logs/run.json") is True


# ---- resuming into another folder ----

@pytest.fixture(scope="module")
def finished(tmp_path_factory, npz):
    """A finished run of three iterations, with numbered checkpoints 1, 2 and 3."""
    out = tmp_path_factory.mktemp("finished") / "a"
    run(out, f"--dataset_path={npz}", *QUICK, "--max_iterations=3")
    return out


def exported(out, name):
    """The iteration that the model card of an export names; 0 if there is no export."""
    card = f"{out}/checkpoints/{name}/hf/README.md"
    if not os.path.exists(card):
        return 0
    with open(card) as file:
        return int(re.search(r"after (\d+)\s+of", file.read())[1])


def test_a_new_folder_takes_along_what_the_sentences_promise(tmp_path, npz, finished, capsys):
    out = tmp_path / "b"
    run(out, f"--dataset_path={npz}", *QUICK, "--max_iterations=4", f"--resume_from={finished}")
    said = capsys.readouterr().out
    assert [record["iteration"] for record in log(out)] == [0, 1, 2, 3, 4]
    assert log(out)[:4] == log(finished)
    assert sorted(os.listdir(out / "checkpoints")) == ["0000001", "0000002", "0000003", "0000004",
                                                       "best", "last"]
    best = saved_iteration(f"{out}/checkpoints/best/state.pt")
    assert best == state(out)["knn"]["best_iteration"] == exported(out, "best")
    assert exported(out, "last") == state(out)["iteration"] == 4
    export = re.search(r"from_pretrained\('(.*?)'\)", said)[1]
    assert os.path.isfile(f"{export}/model.safetensors")
    assert state(finished)["iteration"] == exported(finished, "last") == 3  # A is as it was


def test_another_run_there_is_moved_aside(tmp_path, npz, finished):
    out = tmp_path / "b"
    run(out, f"--dataset_path={npz}", *QUICK, "--seed=5", "--max_iterations=1")
    before = (out / "config.py").read_text()
    run(out, f"--dataset_path={npz}", *QUICK, "--max_iterations=4", f"--resume_from={finished}")
    assert (tmp_path / "b.1/config.py").read_text() == before
    assert state(tmp_path / "b.1")["iteration"] == 1 and len(log(tmp_path / "b.1")) == 2
    assert len(log(out)) == 5


def test_an_earlier_checkpoint_leaves_the_later_best_alone(tmp_path, npz, finished, capsys):
    """In the same folder and in another one: `best` is never of another branch."""
    out = tmp_path / "c"
    run(out, f"--dataset_path={npz}", *QUICK, "--max_iterations=3")
    for name in ("last", "best"):  # a best of iteration 3
        saved = dict(state(out), knn=dict(state(out)["knn"], best=0.0, best_iteration=3))
        torch.save(saved, out / f"checkpoints/{name}/state.pt")
    first = f"{out}/checkpoints/0000001"
    run(out, f"--dataset_path={npz}", *QUICK, "--max_iterations=2", f"--resume_from={first}")
    assert saved_iteration(f"{out}/checkpoints/best.1/state.pt") == 3
    assert state(out)["iteration"] == exported(out, "last") == 2
    assert [record["iteration"] for record in log(out)] == [0, 1, 2]
    best = saved_iteration(f"{out}/checkpoints/best/state.pt")
    assert best == state(out)["knn"]["best_iteration"]


def test_last_hf_is_of_last_or_gone(tmp_path, npz, monkeypatch):
    out, flags = tmp_path / "d", [f"--dataset_path={npz}", *QUICK, "--saveckp_freq=2"]
    run(out, *flags)
    assert exported(out, "last") == 2 and (out / "results/summary.json").exists()
    stops = iter([False, True])
    monkeypatch.setattr(Run, "stop_wanted", lambda run, batch, may_stop: next(stops))
    run(out, *flags, "--max_iterations=5", f"--resume_from={out}")
    assert state(out)["iteration"] == 3 and exported(out, "last") == 0
    assert not (out / "results/summary.json").exists()


# ---- the end ----

def test_a_finished_state_is_completed(tmp_path, npz, finished, capsys):
    out, flags = tmp_path / "e", [f"--dataset_path={npz}", *QUICK]
    run(out, *flags)
    summary = (out / "results/summary.json").read_text()
    remove(f"{out}/checkpoints/last/hf")
    remove(f"{out}/checkpoints/0000002")
    os.remove(out / "results/summary.json")
    run(out, *flags, "--resume_from=auto")
    said = capsys.readouterr().out
    assert "all 2 iterations are finished: only what is missing is made" in said
    assert "Done: 2 iterations" in said and exported(out, "last") == 2
    assert saved_iteration(f"{out}/checkpoints/0000002/state.pt") == 2
    again = json.loads((out / "results/summary.json").read_text())
    assert dict(again, minutes=0) == dict(json.loads(summary), minutes=0)
    run(out, *flags, "--resume_from=auto")
    assert "has finished all 2 iterations, nothing is missing" in capsys.readouterr().out
    assert json.loads((out / "results/summary.json").read_text()) == again  # minutes, too
    with pytest.raises(UserError, match="max_iterations=1, but .* has finished 2 iterations"):
        run(out, *flags, "--resume_from=auto", "--max_iterations=1")


# ---- the log, and files of killed processes ----

def test_a_log_is_cut_at_the_resumed_iteration(tmp_path):
    path = tmp_path / "log.jsonl"
    truncate_log(str(path), 5)  # no log, nothing to do
    assert not path.exists() and read_log(path) == []
    lines = [json.dumps(dict(iteration=i, loss=i / 7)) + "\n" for i in range(10)]
    torn = "\0\0\0\n"  # of a power failure
    path.write_text(torn + "".join(lines) + '{"iteration": 4, "lo')  # a kill halves the last line
    truncate_log(str(path), 5)
    assert path.read_text() == "".join(lines[:6]) and os.listdir(tmp_path) == ["log.jsonl"]
    assert read_log(path)[-1] == (lines[5], dict(iteration=5, loss=5 / 7))
    truncate_log(str(tmp_path / "other.jsonl"), 2, str(path))
    assert (tmp_path / "other.jsonl").read_text() == "".join(lines[:3])


def test_parts_of_dead_processes_are_removed(tmp_path, npz):
    ended = subprocess.Popen(["true"])
    ended.wait()
    path = str(tmp_path / "cache" / "arrays")
    dead, alive = (part_of(path).replace(f".{os.getpid()}.", f".{process}.")
                   for process in (ended.pid, os.getppid()))
    elsewhere = f"{path}.node7.{ended.pid}.part"
    for part in (dead, alive, elsewhere):
        os.makedirs(part)
    remove_dead_parts(str(tmp_path / "cache"))
    assert sorted(os.listdir(tmp_path / "cache")) == sorted(map(os.path.basename,
                                                                (alive, elsewhere)))
    out = tmp_path / "run"
    run(out, f"--dataset_path={npz}", *QUICK, "--max_iterations=1")
    parts = ["log.jsonl.part", "checkpoints/last/state.pt.part", "results/summary.json.part"]
    for part in parts:
        (out / part).write_text("half")
    (out / "checkpoints/best/hf.part").mkdir()
    (out / "mine.txt.part").write_text("not ours")
    run(out, f"--dataset_path={npz}", *QUICK, "--resume_from=auto")
    assert [path.name for path in out.rglob("*.part")] == ["mine.txt.part"]


# ---- paths and caches ----

@pytest.mark.parametrize("script", ["train", "distill", "evaluate", "attention"])
def test_a_tilde_is_expanded_in_every_path_key(script, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    module = load_script(script)
    keys = {"out_dir", "cache_dir", "dataset_path", "resume_from", "model_type", "run", "compare",
            "distilled_model_type", "distilled_model_weights", "teacher_cache", "images", "masks"}
    for key in sorted(keys & set(module.config_keys)):
        override(vars(module), module.config_keys, [f"--{key}=~/x"])
        assert getattr(module, key) == "/home/me/x"
    override(vars(module), module.config_keys, ["--out_dir=a~b"])
    assert module.out_dir == "a~b"
    with pytest.raises(UserError, match="out_dir = '~nobody-here/x' .*a user who has a home"):
        override(vars(module), module.config_keys, ["--out_dir=~nobody-here/x"])
    if hasattr(module, "compare"):
        override(vars(module), module.config_keys, ["--compare=~/a,facebook/b,~/c*"])
        assert module.compare == "/home/me/a,facebook/b,/home/me/c*"


def test_a_cache_that_cannot_be_written_falls_back_and_says_so(tmp_path, npz, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache_folder.cache_clear()
    (tmp_path / "file").touch()
    for cache in (f"{tmp_path}/file/cache", "/proc/cache"):
        assert len(load_dataset(npz, "train", cache_dir=cache)) == 40
        assert f"warning: cache_dir={cache!r} cannot be written" in capsys.readouterr().err
        load_dataset(npz, "val", cache_dir=cache)
        assert capsys.readouterr().err == ""  # once
    assert os.listdir(tmp_path / f"dino-mx-{os.getuid()}")
    monkeypatch.setenv("HOME", f"{tmp_path}/file")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert len(load_dataset(npz, "train")) == 40


def test_a_cache_that_can_only_be_read_is_used(tmp_path, npz, monkeypatch, capsys):
    load_dataset(npz, "train", cache_dir=f"{tmp_path}/cache")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: os.mkdir("/proc/x"))
    cache_folder.cache_clear()
    assert len(load_dataset(npz, "train", cache_dir=f"{tmp_path}/cache")) == 40
    assert capsys.readouterr().err == ""


def test_two_processes_that_unpack_and_index_the_same_data_at_once(tmp_path, npz):
    from PIL import Image
    for i in range(12):
        (tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9), 20 * i).save(tmp_path / f"images/{'ab'[i % 2]}/{i}.png")
    for folder in (tmp_path / "images", *(tmp_path / "images").iterdir()):
        os.utime(folder, (1e9, 1e9))
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from data import load_dataset\n"
            "print('ready', flush=True); input()\n"
            "for path in sys.argv[3:]:\n"
            "    data = load_dataset(path, 'train', cache_dir=sys.argv[2])\n"
            "    print(len(data), sum(int(data[i][0].sum()) for i in range(len(data))))")
    command = [sys.executable, "-c", code, ROOT, f"{tmp_path}/cache", npz, f"{tmp_path}/images"]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate()[0] for process in both]
    assert said[0] == said[1] and re.fullmatch(r"40 -?\d+\n1[01] \d+\n", said[0]), said
    assert not [name for name in os.listdir(tmp_path / "cache") if name.endswith(".part")]
