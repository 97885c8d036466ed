"""Processes and ranks. If the script runs alone, everything here has no effect.

`torchrun --nproc_per_node=N train.py` sets RANK, WORLD_SIZE and LOCAL_RANK; a plain `python
train.py` does not. The maths calls all_reduce_sum(x) in both cases: alone, the sum over all ranks
is x. No other file calls torch.distributed.

'ddp': every rank holds the whole network and averages gradients. 'fsdp' (FSDP2, fully_shard): every
rank keeps its share of each weight, gradient, AdamW moment and EMA value. The weights of a block
are whole only while the block computes.
"""
import atexit
import contextlib
import ctypes
import datetime
import os
import sys
import traceback
import warnings

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError

# Images of a rank that accumulation_steps aims at: more need memory and are hardly faster
MICRO_BATCH = 64


def setup(device="auto"):
    """Join the process group if torchrun started this process, and choose its device.

    Args: device: 'auto' (cuda if torch sees a card, else cpu), 'cpu', 'cuda' or 'cuda:1'.
    Returns: torch.device. Raises UserError if there is no CUDA device.
    nccl carries CUDA tensors, gloo those of the CPU: flags travel without waiting for the device. A
    rank gives up after it has waited for half an hour, because a download may take that long.
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
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    return device


def keep_memory():
    """Let the process keep the memory that tensors free for the next step, as torch does on CUDA.

    glibc gives every block above 32 MB back to the kernel. New pages are zeroed one by one, which
    costs more than the computation in them: a fifth of bench.py's DINOv2 step. Without glibc
    nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD: size of blocks that are mapped alone
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: free memory that is given back; never


def cleanup():
    """Leave the process group together. gloo aborts a rank that still listens when another rank
    closes the connection."""
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
    """The first process of every machine runs the block before the others do: the first downloads a
    file, the others find it. First is LOCAL_RANK 0, because each machine has its own disk."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:
            barrier()


def _all_reduce(x, op):
    """A new tensor. dist.all_reduce works in place, and the caller's statistic must not change."""
    if not dist.is_initialized():
        return x
    x = x.detach().clone()
    dist.all_reduce(x, op=op)
    return x


def all_reduce_sum(x):
    """Sum of a tensor over the ranks, the tensor itself when alone. No gradient flows through."""
    return _all_reduce(x, dist.ReduceOp.SUM)


def all_reduce_max(x):
    """Largest value over the ranks, elementwise."""
    return _all_reduce(x, dist.ReduceOp.MAX)


def all_reduce_mean(x):
    """Mean over the ranks. It is the mean over all rows only if every rank has as many rows."""
    return all_reduce_sum(x) / world_size()


def gather_rows(x):
    """The rows [B,D] of all ranks, [ranks*B,D] in the order of the ranks; the tensor itself when
    alone. Every rank has as many rows, and computes the same scalar of the result.

    Its gradient reaches the rows of this rank. It is multiplied by the number of ranks, because DDP
    and FSDP then average the gradients of the weights over the ranks.
    """
    return GatherRows.apply(x) if dist.is_initialized() else x


class GatherRows(torch.autograd.Function):
    """See gather_rows. Backward sends no message: as all ranks compute the same scalar, each knows
    the whole gradient of its own rows."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(world_size())[rank()] * world_size()


def add_over_ranks(x):
    """Sum of a tensor over the ranks, with a gradient; the tensor itself when alone. Every rank
    computes the same scalar of the result. The gradient is multiplied as in gather_rows."""
    return AddOverRanks.apply(x) if dist.is_initialized() else x


class AddOverRanks(torch.autograd.Function):
    """See add_over_ranks. Backward sends no message."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * world_size()


def gather_objects(item):
    """[item of rank 0, item of rank 1, ...] on every rank, for small python objects such as names
    of bad files."""
    if not dist.is_initialized():
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def any_rank(*flags):
    """[True if a rank has the flag set] for every flag: one small message over all ranks."""
    flags = torch.tensor([bool(flag) for flag in flags], dtype=torch.int)
    return [flag > 0 for flag in all_reduce_max(flags).tolist()]


def stop_together(problem):
    """Raise UserError on all ranks if one of them has a problem, a text ('' or None = none). If one
    rank raised alone, the others would wait in their next collective call."""
    if any_rank(problem)[0]:
        raise UserError(next(filter(None, gather_objects(problem))))


def main_writes(write):
    """Rank 0 calls write(). If that raises UserError (a full disk), every rank raises it."""
    problem = ""
    if is_main():
        try:
            write()
        except UserError as error:
            problem = str(error)
    stop_together(problem)


@contextlib.contextmanager
def lost_ranks():
    """Around a whole program: if another rank or a loader worker of this one is lost, the error
    becomes a UserError of one line."""
    go_on = "--resume_from=auto goes on from the last checkpoint"
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith("DataLoader "):  # a signal raises it in any line of the program
            what = str(error.__cause__ or "") or str(error)
            raise UserError(
                f"rank {rank()}: {what.strip().rstrip('.')}. Mostly the machine or its /dev/shm is "
                "out of memory: use fewer loader workers (--num_workers=1, or 0) or a smaller "
                f"batch; {go_on}") from None
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        raise UserError(f"rank {rank()} has lost contact with another rank, whose own message or "
                        f"torchrun's says why; {go_on}") from None


@contextlib.contextmanager
def quick_exit():
    """Around a whole program, outermost: a process of several ends without unloading Python.

    DTensor's caches keep the process group of FSDP alive after destroy_process_group. Its threads
    (gloo's, autograd's) would go on while the objects they use are taken down, and a finished run
    could end with SIGABRT. What the program registered with atexit is done before. A program that
    runs alone ends as always.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    status = 0
    try:
        yield
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


# ---- DDP and FSDP ----

@contextlib.contextmanager
def built_by_main(distribution):
    """Around the building of a network that move_or_shard takes next.

    Under 'fsdp' only rank 0 makes or reads values. The other ranks build the same modules on the
    meta device, shapes without memory: so the network is whole on one rank only.
    Yields True if this rank's network has values. A UserError on one rank is raised on all, and
    torch's generator goes on as rank 0 left it.
    """
    holds_values, problem = distribution != "fsdp" or is_main(), ""
    device = contextlib.nullcontext() if holds_values else torch.device("meta")
    try:
        with device:
            yield holds_values
    except UserError as error:
        problem = str(error)
    stop_together(problem)
    generators = gather_objects(torch.get_rng_state().numpy())
    torch.set_rng_state(torch.from_numpy(generators[0]))


def only_shapes():
    """True inside built_by_main on a rank whose values come later: it reads and fills nothing."""
    return torch.get_default_device().type == "meta"


def move_or_shard(student, blocks, distribution, device):
    """The student on its device, in place: whole, or with 'fsdp' this rank's share of every
    parameter. Call it before the optimizer is built, because sharded parameters are new ones
    (DTensors, split along dimension 0).

    Every transformer block is a group of its own, gathered and freed by itself. The root holds the
    rest, heads included, and stays whole from its forward to its backward. Values are those of
    rank 0, which holds them on its CPU (built_by_main). They travel one parameter at a time, and
    each rank is sent its share, so no device ever holds all of them. Buffers, also those that no
    state_dict has, are whole on every rank.

    Precision: weights are gathered, gradients averaged and weights kept in fp32, and autocast
    computes in bf16 as it does alone and under DDP, so losses are equal. FSDP's
    MixedPrecisionPolicy would gather bf16, half the bytes, but also round norms, layer scales and
    positions. The bf16 copies of a forward live until its backward; activation_checkpointing frees
    them.
    # assumption: fp16 works as under DDP, because DTensor takes GradScaler's found_inf over all
    # ranks; run it on CUDA
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
            whole = values.pop(name)  # out of the dict: rank 0 frees what it has sent
            if is_main():
                whole = whole.to(device)
            else:
                whole = torch.empty_like(whole, device=device)
            placements = tensor.placements if isinstance(tensor, DTensor) else [Replicate()]
            sent = distribute_tensor(whole, mesh, placements)  # scatter or broadcast
            local_shard(tensor).copy_(sent.to_local())
    student.gather_root = lambda: None  # counts as a forward of the root: gathers it and keeps it
    register_fsdp_forward_method(student, "gather_root")
    # nobody changes such a view in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    return student


def wrap(student, distribution, device):
    """The student of move_or_shard, ready for synchronised gradients.

    'ddp' averages them over the ranks during backward. With 'fsdp', 'none' or one process the
    student stays as it is. Every trainable parameter takes part in every step (model.Student), so
    DDP need not look for unused ones.
    """
    if world_size() == 1 or distribution != "ddp":
        return student
    device_ids = [device.index] if device.type == "cuda" else None
    # torch 2.15 has another word for it, that older versions do not know
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    return DistributedDataParallel(student, device_ids=device_ids, broadcast_buffers=False,
                                   gradient_as_bucket_view=True)


def is_sharded(student):
    """True if every rank holds a share of the weights, and of their gradients."""
    return isinstance(student, FSDPModule)


def unwrap(student):
    """The plain module inside DDP; the module itself when alone or sharded."""
    return student.module if isinstance(student, DistributedDataParallel) else student


@contextlib.contextmanager
def no_sync(student, last):
    """A context in which backward keeps its gradients local, for all micro-batches of a step except
    the last."""
    if is_sharded(student):
        student.set_requires_gradient_sync(last)
    context = contextlib.nullcontext()
    if isinstance(student, DistributedDataParallel) and not last:
        context = student.no_sync()
    with context:
        yield


def _groups(student):
    """The sharded groups of a student: the root, then its blocks; [] without FSDP."""
    return [module for module in student.modules() if isinstance(module, FSDPModule)]


def swap(param, other):
    """Exchange the values of a parameter and of a tensor like it. Only pointers move. For a sharded
    parameter the contents move, because FSDP gathers from the memory that it knows."""
    if isinstance(param, DTensor):
        mine, theirs = local_shard(param.detach()), local_shard(other)
        held = mine.clone()
        mine.copy_(theirs)
        theirs.copy_(held)
    else:
        param.data, other.data = other.data, param.data


@contextlib.contextmanager
def regathered(student):
    """Around a use of values that were swapped in.

    FSDP keeps the root whole after a forward, so it would compute with old values. Therefore the
    student is sharded again at both ends. Inside, the root is whole, so that parts of the student
    may be called directly (network.backbone). Without FSDP nothing happens.
    """
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


@contextlib.contextmanager
def whole(block):
    """Inside, the weights of a block are whole, so that its parts may be called directly. All ranks
    call it. Without FSDP nothing happens."""
    is_sharded = isinstance(block, FSDPModule)
    if is_sharded:
        block.unshard()
    try:
        yield
    finally:
        if is_sharded:
            block.reshard()


def local_shard(tensor):
    """This rank's share of a sharded tensor, in place; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_full(tree):
    """Nested dicts and lists with their sharded tensors whole: on the CPU of rank 0, None on the
    other ranks. All ranks gather one tensor at a time. Everything else stays as it is."""
    if isinstance(tree, dict):
        return {key: gather_full(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gather_full(value) for value in tree)
    if isinstance(tree, DTensor):
        tree = tree.full_tensor()
        return tree.cpu() if is_main() else None
    return tree


def shard_like(tensor, like):
    """A copy of a tensor on the device of `like`. If `like` is sharded, this rank's share of the
    copy; no message is sent."""
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor):
        tensor = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements,
                                   src_data_rank=None)
    if isinstance(tensor, DTensor):
        return tensor.clone()
    return tensor.to(like.device, copy=True)


# ---- the machine ----

def describe_memory(device):
    """The paper's words for a log line, like 'Gpu ID: 0 Memory: 22.96/47.32 GB': used and total
    memory (memory_gb) of rank 0, then of the other ranks. All ranks call it."""
    pairs = gather_objects(memory_gb(device))
    first, *others = [f"{used:.2f}/{total:.2f}" for used, total in pairs]
    name = device.index if device.type == "cuda" else device.type
    text = f"Gpu ID: {name} Memory: {first} GB"
    for number, pair in enumerate(others, 1):
        text += f", rank {number} {pair}"
    return text


def accumulation_steps(global_batch_size, given=0):
    """Micro-batches per step and rank: as given, or with 0 the smallest divisor of a rank's share
    whose micro-batches have MICRO_BATCH images at most."""
    if given:
        return given
    share = global_batch_size // world_size()
    return next(steps for steps in range(1, share + 1)
                if share % steps == 0 and share // steps <= MICRO_BATCH)


def loader_workers(num_workers):
    """How many processes a rank's loader starts: num_workers, or for -1 the rank's share of this
    machine's cores less one, 8 at most."""
    if num_workers >= 0:
        return num_workers
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = (os.cpu_count() or 1) // ranks_here
    return max(0, min(8, cores - 1))


def workers_that_fit(workers, batch_bytes, say=print):
    """How many of these loader workers of a rank /dev/shm has room for; `say` gets a line if not
    all. Batches travel through /dev/shm: a worker prepares two, and the main process holds one. A
    worker that finds no room there waits for ever."""
    try:
        disk = os.statvfs("/dev/shm")
    except OSError:  # not Linux
        return workers
    free = disk.f_bavail * disk.f_frsize
    n_batches = free // max(1, batch_bytes) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fit = max(0, min(workers, (n_batches - 1) // 2))
    if fit < workers and is_main():
        say(f"note: /dev/shm has {free / 1e6:.1f} MB free, too little for {workers} loader "
            f"worker(s) per rank with batches of {batch_bytes / 1e6:.1f} MB: {fit} are used. Give "
            "the container more (docker run --shm-size=8g), or set --num_workers")
    return fit


def item_bytes(item):
    """Bytes of the tensors in an item of a data set, a dict."""
    return sum(value.nbytes for value in item.values() if torch.is_tensor(value))


def compute_dtype(device, mixed_precision):
    """The dtype of matrix products: bf16 or fp16 as the key asks, else fp32. Also fp32 on a CPU
    that has no instructions for bf16, as many laptops: there its products in bf16 take 10 to 30
    times as long as those in fp32."""
    if device.type == "cpu" and mixed_precision == "bf16":
        has = torch.cpu.get_capabilities()
        if has.get("architecture") == "x86_64" and not (has["avx512_bf16"] or has["amx_bf16"]):
            return torch.float32
    dtypes = dict(bf16=torch.bfloat16, fp16=torch.float16, no=torch.float32)
    return dtypes[mixed_precision]


def precision_notes(device, mixed_precision):
    """[a sentence] if a device computes in another precision than the key asks for, else []."""
    if mixed_precision == "no" or compute_dtype(device, mixed_precision) != torch.float32:
        return []
    return [f"this CPU has no instructions for bf16: mixed_precision={mixed_precision!r} would be "
            "slow, so it computes in fp32"]


def autocast_for(device, mixed_precision):
    """A function that opens a new autocast region of compute_dtype on a device. With fp32 the
    region has no effect. It is a new one each time, because a region caches its half-precision
    weights by parameter (see EMATeacher.teacher_weights)."""
    dtype = compute_dtype(device, mixed_precision)
    if dtype == torch.float32:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype)


def memory_gb(device):
    """(used, total) in GB. CUDA: peak of this process's tensors and size of the card. CPU: resident
    memory of this process and memory of the machine."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device) / 1e9, total / 1e9
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * page
    except OSError:  # not Linux: the peak instead, in bytes on macOS
        import resource
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / 1e9, os.sysconf("SC_PHYS_PAGES") * page / 1e9
