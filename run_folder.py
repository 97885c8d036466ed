"""A run's folder: whose it is, which process is in it, and what is moved aside.

Only runs write logs/run.json. It marks the folders whose files may be moved, and it is the lock.
The process in the folder holds a POSIX lock on the file. The kernel frees the lock when the process
ends, however it ends. NFS, Lustre (mounted with flock), GPFS and Ceph pass the lock on to other
machines. On other network disks, and on disks without locks, the host and the process that the file
names decide.
"""
import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import socket
import time

from configurator import UserError

MARKER = "logs/run.json"
OURS = ("config.py", "log.jsonl", "checkpoints", "samples", "results", "logs")  # MARKER moves last
FIRST_LINE = "# resolved config; runs as: python "  # of config.py
LOCKS_BETWEEN_MACHINES = dict(nfs="local_lock=none", nfs4="local_lock=none", lustre="flock",
                              gpfs="rw", ceph="rw")  # file system -> the mount option that it needs
NETWORK_DISKS = (*LOCKS_BETWEEN_MACHINES, "9p", "afs", "beegfs", "cifs", "fuse", "glusterfs",
                 "orangefs", "prl_fs", "pvfs2", "smb", "vboxsf", "virtiofs")


# ---- whose folder ----

def is_ours(folder):
    """True if a run wrote this folder. Runs of older versions wrote no marker, but a config.py with
    a first line of its own."""
    if os.path.isfile(f"{folder}/{MARKER}"):
        return True
    if not all(os.path.isdir(f"{folder}/{name}") for name in ("checkpoints", "logs")):
        return False
    try:
        with open(f"{folder}/config.py") as file:
            return file.readline().startswith(FIRST_LINE)
    except (OSError, UnicodeDecodeError):
        return False


def check_writable(folder):
    """Raise UserError unless this user can write in a folder, or make it."""
    parent = folder
    while not os.path.lexists(parent):
        parent = os.path.dirname(os.path.abspath(parent))
    if not os.path.isdir(parent):
        raise UserError(f"out_dir={folder!r}: {parent} is a file; name a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"out_dir={folder!r}: {parent} is read-only for this user; name a folder "
                        "that can be written")


def make_results(folder):
    """Make a folder for results; UserError if it cannot be written."""
    check_writable(folder)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"out_dir={folder!r} cannot be made: {error.strerror}: {error.filename}; "
                        "name another folder") from None


def check_folder(folder):
    """Raise UserError unless a run may write here: a folder of ours, an empty one, or none yet."""
    check_writable(folder)
    if is_ours(folder):
        return
    for _, _, files in os.walk(folder):
        if files := [name for name in files if not name.startswith(".")]:
            raise UserError(f"out_dir={folder!r} holds files that no run wrote ({files[0]}); "
                            "nothing was touched. Name another folder, or a new one inside it")


def is_inside(path, folder):
    """True if a path is a folder or lies in it, links resolved."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return path == folder or path.startswith(folder + os.sep)


def holds_nothing(folder):
    """True if nothing was trained in a run's folder: no checkpoint, no line of the log after
    iteration 0."""
    trained = any(record["iteration"] > 0 for _, record in read_log(f"{folder}/log.jsonl"))
    return not trained and not glob.glob(f"{glob.escape(folder)}/checkpoints/*/state.pt")


# ---- which process is in it ----

def is_alive(process):
    """True if a process of this machine has this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True


def locks_reach(path):
    """True if every machine that can open this file sees a lock on it. Linux tells by the type and
    the options of the mount; elsewhere the disk is taken for a local one."""
    path, found = os.path.realpath(path), ("", "", "")
    with contextlib.suppress(OSError), open("/proc/self/mounts") as file:
        for line in file:
            _, place, kind, options = line.split()[:4]
            place = place.replace("\\040", " ").rstrip("/")
            if f"{path}/".startswith(f"{place}/") and len(place) >= len(found[0]):
                found = (place, kind, options.split(","))
    _, kind, options = found
    if not kind.startswith(NETWORK_DISKS):
        return True
    return LOCKS_BETWEEN_MACHINES.get(kind, "none") in options


def lock_folder(folder, script):
    """Take a run's folder for this process; make it if necessary.

    Returns the open marker, for unlock_folder. Raises UserError if a process is in the folder, or
    may be: then the message says which file to remove if that process has ended.
    """
    path = f"{folder}/{MARKER}"
    os.makedirs(f"{folder}/logs", exist_ok=True)
    marker = open(path, "a+")
    locked = taken = False
    try:
        fcntl.lockf(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except OSError as error:  # else this disk has no locks
        taken = error.errno in (errno.EACCES, errno.EAGAIN)
    marker.seek(0)
    holder = _content(marker)
    process, host = holder.get("process", 0), holder.get("host")
    unsure = False
    if process and host == socket.gethostname():
        unsure = not locked and process != os.getpid() and is_alive(process)
    elif process:
        unsure = not locked or not locks_reach(path)
    if taken or unsure:
        marker.close()
        advice = "wait for its end, or name another out_dir"
        if not taken:
            advice = ("this disk cannot tell whether that process still runs; if it has ended, "
                      f"remove {path}")
        raise UserError(f"{folder} is in use by {holder.get('script')}, process {process} on "
                        f"{host} since {holder.get('since')}; {advice}")
    if not _is_at(marker, path):  # the process before us has moved its folder aside meanwhile
        marker.close()
        return lock_folder(folder, script)
    _write(marker, script=script, process=os.getpid(), host=socket.gethostname(),
           since=time.strftime("%Y-%m-%d %H:%M:%S"))
    return marker


def unlock_folder(marker):
    """Leave the folder of lock_folder."""
    with contextlib.suppress(OSError):  # a full disk must not hide the error that ends the run
        marker.seek(0)
        _write(marker, **dict(_content(marker), process=0))
    marker.close()


def _content(marker):
    """The dict in an open marker; {} if a kill has left it empty."""
    try:
        return dict(json.load(marker))
    except (ValueError, TypeError):
        return {}


def _write(marker, **content):
    marker.truncate(0)
    json.dump(content, marker)
    marker.flush()


def _is_at(file, path):
    """True if a path still names this open file."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file.fileno()), there)


# ---- one run in it ----

class RunFolder:
    """The folder of one run; rank 0 calls the methods. moved_to: the new name of an earlier run
    that had to be moved aside, or ''."""

    def __init__(self, path, script, at_end):
        """script: 'train.py'; at_end: an ExitStack, which gives the folder back."""
        self.path, self.script, self.marker, self.moved_to = path, script, None, ""
        at_end.callback(self.leave)

    @contextlib.contextmanager
    def writable(self):
        """Around a use of the folder: what the disk refuses becomes a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(f"out_dir={self.path!r} cannot be used: {error.strerror}: "
                            f"{error.filename}; name a folder that can be written") from None

    def enter(self):
        """Check the folder. If it is there, lock it: no other process changes it from now on."""
        with self.writable():
            check_folder(self.path)
            if is_ours(self.path):
                self.marker = lock_folder(self.path, self.script)

    def check_inputs(self, config, goes_on):
        """Raise UserError if open() would move aside what the run reads. config: a namespace."""
        if goes_on or self.marker is None or holds_nothing(self.path):
            return
        paths = {key: value for key, value in vars(config).items()
                 if isinstance(value, str) and key not in ("out_dir", "resume_from")}
        for key, path in dict(paths, current_folder=os.getcwd()).items():
            if path and is_inside(path, self.path):
                raise UserError(f"{key}={path!r} lies in the folder of this run, {self.path}, and "
                                "an earlier run there has to be moved aside; give the new run "
                                "another model_name or out_dir")

    def open(self, config_text, goes_on):
        """Make the folder and write its config.py.

        An earlier run in it is moved aside, unless this run goes on there (goes_on). What is not
        ours stays where it is.
        """
        with self.writable():
            if not self.marker:
                check_folder(self.path)
                self.marker = lock_folder(self.path, self.script)
            remove_parts(self.path)
            if not goes_on and not holds_nothing(self.path):
                self.moved_to, earlier = move_aside(self.path), self.marker
                self.marker = lock_folder(self.path, self.script)
                unlock_folder(earlier)
            if not goes_on:  # of a run that was killed before its first checkpoint
                remove(f"{self.path}/log.jsonl")
            for name in ("checkpoints", "samples", "results"):
                os.makedirs(f"{self.path}/{name}", exist_ok=True)
            write_whole(f"{self.path}/config.py",
                        f"{FIRST_LINE}{self.script} {self.path}/config.py\n{config_text}")

    def leave(self):
        """Unlock the folder. If this run has failed before it held anything, and nobody has put a
        file beside it, the earlier run gets its name back."""
        if self.marker:
            unlock_folder(self.marker)
        if self.moved_to and holds_nothing(self.path):
            with contextlib.suppress(OSError):
                if set(os.listdir(self.path)) <= set(OURS):
                    shutil.rmtree(self.path)
                    os.rename(self.moved_to, self.path)


def move_aside(folder):
    """Give our files in a folder a new name, NAME.1 or the next free number; returns it."""
    moved = free_name(folder)
    if set(os.listdir(folder)) <= set(OURS):
        os.rename(folder, moved)
        return moved
    os.mkdir(moved)
    for name in OURS:
        if os.path.lexists(f"{folder}/{name}"):
            os.rename(f"{folder}/{name}", f"{moved}/{name}")
    return moved


def free_name(path):
    """The first of PATH.1, PATH.2, ... that does not exist."""
    numbered = (f"{path}.{n}" for n in range(1, 10**6))
    return next(name for name in numbered if not os.path.lexists(name))


def write_whole(path, text):
    """Write a text file beside its place and rename it: under its name it is always complete."""
    with open(f"{path}.part", "w") as file:
        file.write(text)
    os.replace(f"{path}.part", path)


@contextlib.contextmanager
def whole_file(path):
    """Yields the name under which to write a file, with the same ending. When it is written, it
    gets its own name: under that it is always complete."""
    part = f"{path}.part{os.path.splitext(path)[1]}"
    try:
        yield part
        os.replace(part, path)
    finally:
        remove(part)


def read_log(path):
    """[(line, its dict)] of a log.jsonl, without what a kill or a power failure has torn; [] if
    there is no log."""
    found = []
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        for line in file:
            with contextlib.suppress(ValueError):
                if line.endswith("\n"):
                    found.append((line, json.loads(line)))
    return found


def truncate_log(path, iteration, source=""):
    """Drop the lines of a log.jsonl after `iteration`: a resumed run writes the same ones again.
    source: the log to take them from, if it is another one."""
    if os.path.isfile(source or path):
        kept = [line for line, record in read_log(source or path)
                if record["iteration"] <= iteration]
        write_whole(path, "".join(kept))


# ---- what killed processes leave ----

def remove_parts(folder):
    """Remove the half-written files of a run that was killed. The caller is in the folder."""
    names = ("config.py.part", "log.jsonl.part", "logs/wandb_id.part", "results/summary.json.part",
             "samples/*.part.png", "checkpoints/*/state.pt.part", "checkpoints/*/hf.part")
    for name in names:
        for path in glob.glob(f"{glob.escape(folder)}/{name}"):
            remove(path)


def part_of(path):
    """Where this process writes a file or folder of a cache, before it gets the name `path`."""
    return f"{path}.{socket.gethostname()}.{os.getpid()}.part"


def remove_dead_parts(folder):
    """Remove the parts (part_of) that killed processes of this machine have left in a cache."""
    for part in glob.glob(f"{glob.escape(folder)}/*.{socket.gethostname()}.*.part"):
        number = part.split(".")[-2]
        process = int(number) if number.isdigit() else 0
        if process == os.getpid() or process and not is_alive(process):
            remove(part)


def remove(path):
    """Remove a file or a folder, if it is there. Under its name a folder is whole or not there."""
    if os.path.isdir(path) and not os.path.islink(path):
        if not path.endswith(".part"):
            remove(f"{path}.part")
            os.rename(path, f"{path}.part")
            path = f"{path}.part"
        shutil.rmtree(path)
        return
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
