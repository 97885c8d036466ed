"""What a machine does to a run: kills at any moment, a damaged checkpoint, a full disk, a rank that
dies."""
import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from checkpoint import export_hf, link_state, load_state, save_state, saved_states
from configurator import UserError, one_line_errors, override
from signals import end_by, ignore_signals
from tests_support import ROOT, SHRUNK, assert_same, load_train, log, losses, run, state

QUICK = ["--generate_samples=false", "--eval_interval=0", "--image_mean=0.5", "--image_std=0.25",
         "--model_type=dinov2", "--local_crops_number=0"]


def heed_signals():
    """Undo what nohup, or a job in a shell's background, makes its programs ignore."""
    for number in (signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def in_fork(function):
    """The pid of a fork of this process that runs function() and leaves, silently."""
    pid = os.fork()
    if pid == 0:
        status = 1
        heed_signals()
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            status = function() or 0
        finally:
            os._exit(status)
    return pid


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# ---- kill -9 ----

def test_killed_at_random_moments_until_it_is_done(tmp_path, npz):
    """A run that saves in every iteration is killed again and again and goes on with auto. It ends
    bit for bit as an undisturbed one ends, log included. After every kill all of its checkpoints
    can be read."""
    extra = [f"--dataset_path={npz}", f"--cache_dir={tmp_path}/cache", *QUICK,
             "--max_iterations=16"]
    out, undisturbed = str(tmp_path / "killed"), str(tmp_path / "whole")
    draw, kills, seen, pace = random.Random(0), 0, -1, 0.05
    last = f"{out}/checkpoints/last/state.pt"

    def written():
        return os.path.exists(last) and os.stat(last).st_ino

    def train_on():
        run(out, *extra, "--saveckp_freq=1", "--resume_from=auto")

    whole = run(undisturbed, *extra, "--saveckp_freq=16")
    while seen < 16:
        pid = in_fork(train_on)
        ended = functools.partial(os.waitid, os.P_PID, pid,
                                  os.WEXITED | os.WNOHANG | os.WNOWAIT)
        saves, before = [time.time()], written()
        wanted, until = draw.randint(1, 2), time.time() + 60
        while time.time() < until and len(saves) <= wanted and not ended():
            if written() != before:
                before = written()
                saves.append(time.time())
            time.sleep(0.001)
        pace = saves[-1] - saves[-2] if len(saves) > 2 else pace
        time.sleep(draw.uniform(0, pace))  # up to the next save, about
        kill(pid)
        kills += 1
        for path in saved_states(out):
            load_state(path)
        assert load_state(out)["iteration"] > seen
        seen = load_state(out)["iteration"]
    a, b = state(undisturbed), state(out)
    for key in ("student", "ema", "optimizer", "centers"):
        assert_same(a[key], b[key])
    assert [record["iteration"] for record in log(out)] == list(range(17))
    assert torch.equal(losses(log(out)), losses(whole))
    assert kills >= 4, kills


def state_of(value, size):
    """A state that says `value` everywhere; 4 bytes per number."""
    weights = {"w": torch.full((size,), float(value))}
    return dict(iteration=value, config={}, student=weights)


def test_killed_while_saving(tmp_path):
    """A process that does nothing but save is killed 40 times: the state is always one of its own,
    whole."""
    root, last = str(tmp_path), str(tmp_path / "checkpoints" / "last")

    def save_for_ever():
        value = load_state(root)["iteration"] if saved_states(root) else 0
        while True:
            value += 1
            save_state(last, state_of(value, 300_000))
            link_state(last, str(tmp_path / "checkpoints" / "best"))

    draw, seen, parts = random.Random(1), 0, 0
    for _ in range(40):
        pid = in_fork(save_for_ever)
        time.sleep(0.02 + draw.uniform(0, 0.08))
        kill(pid)
        parts += os.path.exists(f"{last}/state.pt.part")
        for path in saved_states(root):
            found = load_state(path)
            expected = state_of(found["iteration"], 300_000)
            assert torch.equal(found["student"]["w"], expected["student"]["w"])
        if saved_states(root):
            iteration = load_state(root)["iteration"]
            assert iteration >= seen
            seen = iteration
    assert seen >= 5 and parts >= 3  # it did save, and was hit on the way


# ---- a damaged checkpoint ----

def test_a_truncated_last_falls_back_and_says_so(tmp_path, npz, capsys):
    extra = [f"--dataset_path={npz}", f"--cache_dir={tmp_path}/cache", *QUICK,
             "--max_iterations=5", "--saveckp_freq=2"]
    out = str(tmp_path / "run")
    whole = run(out, *extra)
    before, last = state(out), f"{out}/checkpoints/last/state.pt"
    with open(last, "r+b") as file:  # the link that best has, if any, is the same content
        file.truncate(os.path.getsize(last) - 1000)
    with pytest.raises(UserError, match=r"resume_from='.*checkpoints/last': .*state.pt is damaged"):
        load_state(f"{out}/checkpoints/last")  # asked for by name
    capsys.readouterr()
    again = run(out, *extra, "--resume_from=auto")
    said = capsys.readouterr().out
    assert "!!!! " + last + " is damaged or no checkpoint of ours" in said
    assert "Going on from the checkpoint before it, of iteration 4" in said
    assert torch.equal(losses(again), losses(whole))
    assert_same(state(out)["student"], before["student"])
    os.remove(last)
    newest = max(load_state(path)["iteration"] for path in saved_states(out))
    assert load_state(out)["iteration"] == newest
    for path in saved_states(out):
        with open(path, "wb") as file:
            file.write(b"not a checkpoint")
    with pytest.raises(UserError, match="nor can the others there be read: move the folder away"):
        run(out, *extra, "--resume_from=auto")


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state.pt is no checkpoint of ours"):
        load_state(str(tmp_path))


# ---- a full disk ----

@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB of its own."""
    disk = str(tmp_path / "disk")
    os.mkdir(disk)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs here")
    yield disk
    subprocess.run(["umount", "-l", disk])


def big_state(iteration):
    """A state of 3.2 MB."""
    return state_of(iteration, 800_000)


def test_a_disk_that_is_full(small_disk):
    last, keep = f"{small_disk}/checkpoints/last", f"{small_disk}/checkpoints/0000001"
    save_state(last, big_state(1))
    link_state(last, keep)
    save_state(last, big_state(2))  # 6.4 of 8 MB
    problem = r"last/state.pt.part cannot be written: .*make space, then"
    with pytest.raises(UserError, match=problem):
        save_state(last, big_state(3))
    assert load_state(small_disk)["iteration"] == 2 and os.listdir(last) == ["state.pt"]
    shutil.rmtree(keep)
    save_state(last, big_state(3))
    assert load_state(small_disk)["iteration"] == 3


def test_a_disk_that_takes_only_part_of_a_file(tmp_path, tiny_backbone):
    """The kernel itself refuses in the middle, by a limit on the size of files: for state and
    export."""
    save_state(str(tmp_path), big_state(1))
    backbone = tiny_backbone("vit")
    backbone.embeddings.register_parameter("large", torch.nn.Parameter(torch.zeros(800_000)))

    def write_state():
        save_state(str(tmp_path), big_state(2))

    def write_export():
        export_hf(str(tmp_path / "hf"), backbone, 32, (0, 1), (0.5,), (0.2,), "card")

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        for write in (write_state, write_export):
            with pytest.raises(UserError, match=r"\.part cannot be written: .*make space, then"):
                write()
        return 7

    _, status = os.waitpid(in_fork(limited), 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert load_state(str(tmp_path))["iteration"] == 1 and os.listdir(tmp_path) == ["state.pt"]


def test_a_full_disk_under_the_log_is_one_line():
    with pytest.raises(SystemExit) as error:
        with one_line_errors():
            with open("/dev/full", "w") as file:
                file.write("a line")
    expected = "error: No space left on device: a log file cannot be written"
    assert str(error.value).startswith(expected)


# ---- a rank that dies ----

def rank_1_below(pid):
    """The pid of the worker with RANK=1 among the children of torchrun."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = file.read().split()
    for child in children:
        with open(f"/proc/{child}/environ") as file:
            if "\0RANK=1\0" in file.read():
                return int(child)


def test_a_rank_that_dies_takes_the_others_down(tmp_path, npz):
    out = str(tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "train.py", *SHRUNK, *QUICK, f"--dataset_path={npz}",
               f"--cache_dir={tmp_path}/cache", f"--out_dir={out}", "--distribution=fsdp",
               "--max_iterations=100000", "--saveckp_freq=1000"]
    torchrun = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, env=dict(os.environ, OMP_NUM_THREADS="1"))
    try:
        while not os.path.exists(f"{out}/log.jsonl") or len(log(out)) <= 3:
            time.sleep(0.1)
        os.kill(rank_1_below(torchrun.pid), signal.SIGKILL)
        said = torchrun.communicate(timeout=60)[0]
    finally:
        torchrun.kill()
    assert torchrun.returncode == 1 and "exitcode  : -9" in said
    assert "error: rank 0 has lost contact with another rank" in said
    assert "[rank0]" not in said  # no page of traceback


# ---- signals ----

def test_a_shell_loop_ends_at_ctrl_c_and_does_not_after_an_exit_status():
    """Bash starts the next program of a loop unless the last one died of SIGINT itself."""
    program = ("import signal, sys, time; sys.path.insert(0, '.'); from signals import end_by\n"
               "caught = []; signal.signal(signal.SIGINT, lambda *_: caught.append(1))\n"
               "print('ready', flush=True)\n"
               "while not caught: time.sleep(0.05)\n"
               "END")
    for end, line in (("end_by(signal.SIGINT)", ""), ("sys.exit(130)", "130\n")):
        loop = f'for s in 0 1; do "{sys.executable}" -c "$PROGRAM"; echo $?; done'
        shell = subprocess.Popen(["bash", "-c", loop], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                 start_new_session=True, preexec_fn=heed_signals,
                                 env=dict(os.environ, PROGRAM=program.replace("END", end)))
        assert shell.stdout.readline() == "ready\n"
        os.killpg(shell.pid, signal.SIGINT)  # as the terminal does
        assert shell.stdout.readline() == line
        os.killpg(shell.pid, signal.SIGKILL)
        assert shell.wait() == (-signal.SIGKILL if line else -signal.SIGINT)


def start_group(out, *flags):
    """The pid of a fork that leads a process group of its own and trains with two workers."""
    def train():
        os.setpgid(0, 0)
        module = load_train()
        argv = [*SHRUNK, *QUICK, f"--out_dir={out}", f"--cache_dir={out}-cache", *flags]
        end_by(module.main(override(vars(module), module.config_keys, argv)))
    return in_fork(train)


@pytest.mark.parametrize("number, workers", [(signal.SIGINT, 2), (signal.SIGTERM, 2),
                                             (signal.SIGHUP, 0)])
def test_a_signal_to_the_whole_group_saves_and_ends_the_process(tmp_path, npz, number, workers):
    """Ctrl-C, a job's end and a closed terminal reach the loader's workers as well."""
    out = str(tmp_path / "run")
    flags = [f"--dataset_path={npz}", f"--num_workers={workers}", "--max_iterations=100000",
             "--saveckp_freq=100000"]
    pid = start_group(out, *flags)
    while not os.path.exists(f"{out}/log.jsonl") or len(log(out)) <= 3:
        time.sleep(0.05)
    for _ in range(3):  # the second and third one change nothing
        os.killpg(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -number
    assert state(out)["iteration"] >= len(log(out)) - 1 >= 3
    with open(f"{out}/logs/train.log") as file:
        assert "stopped by a signal" in "".join(file.readlines()[-2:])  # README's Slurm script
    with open(f"{out}/logs/run.json") as file:
        assert '"process": 0' in file.read()


def test_ctrl_c_again_while_saving_loses_nothing(tmp_path, npz):
    out, save = str(tmp_path / "run"), torch.save

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        save(*args)
        os.kill(os.getpid(), signal.SIGINT)

    def train():
        torch.save = interrupted
        module = load_train()
        argv = [*SHRUNK, *QUICK, f"--out_dir={out}", f"--cache_dir={out}-cache",
                f"--dataset_path={npz}", "--saveckp_freq=1"]
        end_by(module.main(override(vars(module), module.config_keys, argv)))
    status = os.waitpid(in_fork(train), 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGINT
    assert state(out)["iteration"] == 0 and os.listdir(f"{out}/checkpoints/last") == ["state.pt"]


def test_a_reader_that_has_gone_does_not_end_a_run(tmp_path, npz):
    """python train.py | head; or a terminal that has closed."""
    out = str(tmp_path / "run")

    def train():
        read_end, write_end = os.pipe()
        os.close(read_end)
        os.dup2(write_end, 1)
        run(out, f"--dataset_path={npz}", *QUICK)
    assert os.waitpid(in_fork(train), 0)[1] == 0
    assert state(out)["iteration"] == 3


def test_ctrl_c_before_the_loop_is_one_line(capfd):
    """Nothing catches it while weights and data are read: no page of traceback, but status 130."""
    def prepare():
        with one_line_errors():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            prepare()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGINT
    assert capfd.readouterr().err == "interrupted; what was written before stays as it is\n"


def test_the_main_process_can_end_a_worker_that_hangs():
    """Others cannot, not even by asking twice (test_distributed.py)."""
    def hang():
        ignore_signals(0)
        time.sleep(60)
    pid = in_fork(hang)
    time.sleep(0.3)
    subprocess.run(["kill", "-TERM", str(pid)], check=True)
    subprocess.run(["kill", "-INT", str(pid)], check=True)
    time.sleep(0.3)
    os.kill(pid, 0)
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0)[1] == 0
