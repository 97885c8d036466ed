"""Processes and ranks: everything here vanishes when the script runs alone.

`torchrun --nproc_per_node=N train.py` sets RANK, WORLD_SIZE and LOCAL_RANK; a plain `python train.py` does not. The
maths calls all_reduce_sum(x) in both cases: alone, the sum over all ranks is x. Nobody else asks torch.distributed.

'ddp': every rank holds the whole network and averages gradients. 'fsdp' (FSDP2, fully_shard): every rank keeps its
share of each weight, gradient, AdamW moment and EMA value, and a block's weights are whole only while it computes.
"""
import contextlib
import ctypes
import datetime
import os
import warnings

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError

MICRO_BATCH = 64        # images of a rank that accumulation_steps aims at: more need memory and are hardly faster


def setup(device="auto"):
    """Join the process group where torchrun started us, and choose this process's device.

    Args: device: 'auto' (cuda where there is one, else cpu), 'cpu', 'cuda' or 'cuda:1'.
    Returns: torch.device. nccl carries CUDA tensors, gloo those of the CPU: flags travel there without waiting for the
    device. A rank that waits for half an hour gives up: so long may a download take.
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
    else:
        keep_memory()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(minutes=30))
    return device


def keep_memory():
    """Let the process keep the memory that tensors free, for the next step, as torch does on CUDA. glibc gives every
    block above 32 MB back to the kernel, and to get its pages anew, zeroed one by one, costs more than to compute in
    them: of the DINOv2 step of bench.py a fifth. Without glibc nothing happens."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**31 - 1)                            # M_MMAP_THRESHOLD: blocks that are mapped on their own
        libc.mallopt(-1, -1)                                   # M_TRIM_THRESHOLD: free memory that is given back; never


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


def any_rank(*flags):
    """[whether some rank has it] for every flag: one small message over all ranks."""
    found = all_reduce_max(torch.tensor([bool(flag) for flag in flags], dtype=torch.int))
    return [flag > 0 for flag in found.tolist()]


def stop_together(problem):
    """UserError on all ranks where one of them has a problem, a text ('' or None = none). A rank that raised alone
    would leave the others waiting in their next collective call."""
    if any_rank(problem)[0]:
        raise UserError(next(filter(None, gather_objects(problem))))


def main_writes(write):
    """Rank 0 calls write(); where that raises a UserError (a full disk), every rank raises it."""
    problem = ""
    if is_main():
        try:
            write()
        except UserError as error:
            problem = str(error)
    stop_together(problem)


@contextlib.contextmanager
def lost_ranks():
    """Around a whole program: what a backend reports when another rank is gone becomes a UserError of one line."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        raise UserError(f"rank {rank()} has lost contact with another rank, whose own message or torchrun's says why; "
                        "--resume_from=auto goes on from the last checkpoint") from None


# ---- DDP and FSDP ----

@contextlib.contextmanager
def built_by_main(distribution):
    """Around the building of a network that `place` takes next. Under 'fsdp' rank 0 alone makes or reads values: the
    other ranks get the same modules on the meta device, shapes without memory, so the network is whole in one place and
    not once per rank. Yields whether this rank's network has values. What is wrong on one rank raises on all, and
    torch's generator goes on as rank 0 left it."""
    holds_values, problem = distribution != "fsdp" or is_main(), ""
    try:
        with contextlib.nullcontext() if holds_values else torch.device("meta"):
            yield holds_values
    except UserError as error:
        problem = str(error)
    stop_together(problem)
    torch.set_rng_state(torch.from_numpy(gather_objects(torch.get_rng_state().numpy())[0]))


def only_shapes():
    """True inside built_by_main on a rank whose values come later: there is nothing to read and nothing to fill."""
    return torch.get_default_device().type == "meta"


def move_or_shard(student, blocks, distribution, device):
    """The student on its device, in place: whole, or with 'fsdp' this rank's share of every parameter.

    Call it before the optimizer is built: sharded parameters are new ones (DTensors, split along dimension 0). Every
    transformer block is a group, gathered and freed by itself; the root holds the rest, heads included, and stays whole
    from its forward to its backward. Values are those of rank 0, which holds them on its CPU (built_by_main); they
    travel one parameter at a time, each rank is sent its share, and no device ever holds all of them. Buffers, also
    those that no state_dict has, are whole on every rank.
    Precision: weights are gathered, gradients averaged and weights kept in fp32, autocast computes in bf16 as it does
    alone and under DDP, so losses are equal. FSDP's MixedPrecisionPolicy would gather bf16, half the bytes, but round
    norms, layer scales and positions as well. The bf16 copies that a forward made live until its backward;
    activation_checkpointing frees those.
    # assumption: fp16 works as under DDP, because DTensor takes GradScaler's found_inf over all ranks; run it on CUDA
    # assumption: nccl scatters shares as gloo does (tests/test_distributed.py); two GPUs settle it
    """
    if distribution != "fsdp" or world_size() == 1:
        return student.to(device)
    mesh = dist.init_device_mesh(device.type, (world_size(),))
    values = dict(student.named_parameters()) | dict(student.named_buffers())
    student.to("meta")
    for module in (*blocks, student):
        fully_shard(module, mesh=mesh)
    student.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in (*student.named_parameters(), *student.named_buffers()):
            whole = values.pop(name)                           # out of the dict: rank 0 frees what it has sent
            whole = whole.to(device) if is_main() else torch.empty_like(whole, device=device)
            placements = tensor.placements if isinstance(tensor, DTensor) else [Replicate()]
            local_shard(tensor).copy_(distribute_tensor(whole, mesh, placements).to_local())     # scatter or broadcast
    student.gather_root = lambda: None                         # counts as a forward of the root: it comes whole, stays
    register_fsdp_forward_method(student, "gather_root")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # no in-place operation follows
    return student


def wrap(student, distribution, device):
    """The placed student, ready for synchronised gradients. 'ddp' averages them over the ranks during backward; 'fsdp'
    (see place), 'none', or one process leave the student as it is. Every trainable parameter takes part in every step
    (model.Student sees to that), so DDP need not look for unused ones."""
    if world_size() == 1 or distribution != "ddp":
        return student
    return DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None,
                                   broadcast_buffers=False, gradient_as_bucket_view=True)


def is_sharded(student):
    """True where every rank holds a share of the weights, and of their gradients."""
    return isinstance(student, FSDPModule)


def unwrap(student):
    """The plain module inside DDP; the module itself when alone or sharded."""
    return student.module if isinstance(student, DistributedDataParallel) else student


@contextlib.contextmanager
def no_sync(student, last):
    """A context in which backward keeps its gradients local, for all micro-batches of a step but the last."""
    if is_sharded(student):
        student.set_requires_gradient_sync(last)
    with student.no_sync() if isinstance(student, DistributedDataParallel) and not last else contextlib.nullcontext():
        yield


def _groups(student):
    """The sharded groups of a student: the root, then its blocks; [] without FSDP."""
    return [module for module in student.modules() if isinstance(module, FSDPModule)]


def swap(param, other):
    """Exchange the values of a parameter and of a tensor like it. Pointers move; of a sharded one the contents, because
    FSDP gathers from the memory that it knows."""
    if isinstance(param, DTensor):
        mine, theirs = local_shard(param.detach()), local_shard(other)
        held = mine.clone()
        mine.copy_(theirs)
        theirs.copy_(held)
    else:
        param.data, other.data = other.data, param.data


@contextlib.contextmanager
def regathered(student):
    """Around a use of values that were swapped in. FSDP keeps the root whole after a forward, so it would compute with
    old ones: shards only at both ends, and inside the root is whole, so that parts of the student may be called past it
    (network.backbone). Without FSDP nothing happens."""
    groups = _groups(student)
    try:
        for group in groups:
            group.reshard()
        if groups:
            student.gather_root()
        yield
    finally:
        for group in groups:
            group.reshard()


def local_shard(tensor):
    """This rank's share of a sharded tensor, in place; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_full(tree):
    """Nested dicts and lists with their sharded tensors whole: on the CPU of rank 0, None elsewhere. One tensor at a
    time is gathered, by all ranks; anything else stays as it is."""
    if isinstance(tree, dict):
        return {key: gather_full(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gather_full(value) for value in tree)
    if isinstance(tree, DTensor):
        tree = tree.full_tensor()
        return tree.cpu() if is_main() else None
    return tree


def shard_like(tensor, like):
    """A copy of a tensor on the device of `like`; where `like` is sharded, this rank's share of it, no message sent."""
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor):
        tensor = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor.clone() if isinstance(tensor, DTensor) else tensor.to(like.device, copy=True)


def accumulation_steps(global_batch_size, given=0):
    """Micro-batches per step and rank: as given, or the smallest divisor of a rank's share that keeps them small."""
    share = global_batch_size // world_size()
    return given or next(steps for steps in range(1, share + 1) if share % steps == 0 and share // steps <= MICRO_BATCH)


def loader_workers(num_workers):
    """How many processes a rank's loader starts: num_workers, or for -1 its share of this machine's cores less one, up
    to 8."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return num_workers if num_workers >= 0 else max(0, min(8, (os.cpu_count() or 1) // ranks_here - 1))


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
