"""Processes and ranks: everything here vanishes when the script runs alone.

`torchrun --nproc_per_node=N train.py` sets RANK, WORLD_SIZE and LOCAL_RANK; a plain `python train.py` does not. The
maths calls all_reduce_sum(x) in both cases: alone, the sum over all ranks is x. Nobody else asks torch.distributed.
"""
import contextlib
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError

MICRO_BATCH = 64        # images of a rank that accumulation_steps aims at: more need memory and are hardly faster


def setup(device="auto"):
    """Join the process group where torchrun started us, and choose this process's device.

    Args: device: 'auto' (cuda where there is one, else cpu), 'cpu', 'cuda' or 'cuda:1'.
    Returns: torch.device. nccl carries CUDA tensors, gloo those of the CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device!r}: torch sees no CUDA device here; "
                        "use --device=cpu or install a CUDA build of torch")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def cleanup():
    """Leave the process group together: gloo aborts a rank whose peer closes the connection while it still listens."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank():
    """Number of this process over all machines, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """True in the one process that prints and writes files."""
    return rank() == 0


def barrier():
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_first():
    """The first process of every machine runs the block before the others do: it downloads, they find the file.
    LOCAL_RANK 0 and not rank 0, because each machine has a disk of its own."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:
            barrier()


def _all_reduce(x, op):
    """A new tensor: dist.all_reduce works in place, and a caller's statistic must not change under its feet."""
    if not dist.is_initialized():
        return x
    x = x.detach().clone()
    dist.all_reduce(x, op=op)
    return x


def all_reduce_sum(x):
    """Sum of a tensor over the ranks, the tensor itself when alone. No gradient flows through it."""
    return _all_reduce(x, dist.ReduceOp.SUM)


def all_reduce_max(x):
    """Largest value over the ranks, elementwise."""
    return _all_reduce(x, dist.ReduceOp.MAX)


def all_reduce_mean(x):
    """Mean over the ranks: right where every rank has as many rows."""
    return all_reduce_sum(x) / world_size()


def gather_objects(item):
    """[item of rank 0, item of rank 1, ...] on every rank; for small python objects such as names of bad files."""
    if not dist.is_initialized():
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def wrap(student, distribution, device):
    """The student, ready for synchronised gradients. 'ddp' averages them over the ranks during backward; 'none', or one
    process, leaves the student as it is. Every trainable parameter takes part in every step (model.Student sees to
    that), so DDP need not look for unused ones."""
    if world_size() == 1 or distribution == "none":
        return student
    return DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None,
                                   broadcast_buffers=False, gradient_as_bucket_view=True)


def unwrap(student):
    """The plain module inside DDP; the module itself when alone."""
    return student.module if isinstance(student, DistributedDataParallel) else student


def no_sync(student, last):
    """A context in which backward keeps its gradients local, for all micro-batches of a step but the last."""
    return student.no_sync() if isinstance(student, DistributedDataParallel) and not last else contextlib.nullcontext()


def accumulation_steps(global_batch_size, given=0):
    """Micro-batches per step and rank: as given, or the smallest divisor of a rank's share that keeps them small."""
    share = global_batch_size // world_size()
    return given or next(steps for steps in range(1, share + 1) if share % steps == 0 and share // steps <= MICRO_BATCH)


def loader_workers(num_workers):
    """How many processes a rank's loader starts: num_workers, or for -1 its share of the cores less one, up to 8."""
    return num_workers if num_workers >= 0 else max(0, min(8, (os.cpu_count() or 1) // world_size() - 1))


def autocast_for(device, mixed_precision):
    """A function that opens a new autocast region of 'bf16' or 'fp16' on a device ('no': one without effect). A new one
    each time, because a region caches its half-precision weights by parameter (see EMATeacher.teacher_weights)."""
    half = torch.float16 if mixed_precision == "fp16" else torch.bfloat16
    return lambda: torch.autocast(device.type, half, enabled=mixed_precision != "no")


def memory_gb(device):
    """(used, total) in GB. CUDA: peak of this process's tensors and size of the card. CPU: resident memory of this
    process and of the machine."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device) / 1e9, total / 1e9
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        resident = int(open("/proc/self/statm").read().split()[1]) * page
    except OSError:                                     # not Linux: the peak instead, in bytes on macOS
        import resource
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / 1e9, os.sysconf("SC_PHYS_PAGES") * page / 1e9
