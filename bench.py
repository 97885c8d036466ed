"""What things cost: strategies, augmentation, the parts of a step, loading, and how they grow.

    python bench.py --model_type=vit               # ViT-S/16, every strategy (paper Table 10)
    python bench.py --strategy=lora --model_type=facebook/dino-vits16 --use_pretrained=true
    python bench.py --what=augment                 # images/s of one core, and of torchvision on PIL
    python bench.py --what=step                    # DINO, ViT-S/16: its share of the GEMM limit
    python bench.py --what=step --ibot=true --model_type=dinov2 --patch_size=14 \
        --local_crops_size=98                      # DINOv2
    python bench.py --what=data --n_images=100000  # a folder of JPEG files
    python bench.py --what=growth                  # time against batch, crops, K, number of images
    python bench.py --what=memory                  # GB that a GPU needs, counted for released ViTs
    python bench.py --what=all --n_images=100000   # all of these, for docs/RESULTS.md

A step is that of train.py: the same functions in the same order. `strategy` uses the same random
crops in all steps. Every strategy runs in a process of its own, so its peak memory is its own.
`rounds` repeats all strategies in turn, so that a slow minute of the machine hits all of them. The
tables compare time with the number of multiplications, and memory with the sum of the tensors.
"""
from types import SimpleNamespace

from configurator import HERE, list_keys, one_line_errors, read_command_line

# ==== config ====
what = 'strategy'  # 'strategy' | 'augment' | 'step' | 'data' | 'growth' | 'memory' | 'all' of them
strategy = 'all'                 # 'all' | standard | lora | freeze | freeze_shared | lora_freeze
model_type = 'vit'               # as in train.py: a hub id, a directory or a family
use_pretrained = False           # True = the weights of model_type; a family has none
hidden_size = 384                # from scratch, as the next three: ViT-S/16
num_hidden_layers = 12           # blocks
num_attention_heads = 6          # must divide hidden_size
patch_size = 16                  # pixels
batch_size = 8                   # images per step
global_crops_size = 224          # pixels; two crops of each image
local_crops_size = 96            # pixels
local_crops_number = 8           # of each image, at least one
dino_head_out_dim = 65536        # prototypes K (paper); with few, the heads cost next to nothing
head_hidden_dim = 2048           # of the DINO head
head_bottleneck_dim = 256        # of the DINO head
lora_r = 4                       # rank of the adapters on queries and values (paper Table 10)
lora_dropout = 0.1               # on their input, as train.py; a tenth of a step on a CPU
freeze_backbone_layers = 6       # of freeze, freeze_shared and lora_freeze
n_steps = 5                      # measured steps per round, after two to warm up; the median counts
rounds = 2                       # how often every strategy is run
mixed_precision = 'bf16'         # 'bf16' | 'no' = fp32
device = 'auto'                  # 'auto' | 'cpu' | 'cuda' | 'cuda:1'
ibot = False                     # step: with masks, iBOT loss (shared head) and KoLeo, as DINOv2
compile = False                  # step: torch.compile the blocks; needs a C++ compiler on a CPU
num_workers = -1                 # of the loader in step, the most of them in data; -1 = as train.py
n_images = 10000                 # data, growth: files in the largest folder; links to a hundred
config_keys = list_keys(globals())
if __name__ == "__main__":  # before the imports that take seconds: --help and a typo answer at once
    sources = read_command_line(globals(), config_keys)

import contextlib
import multiprocessing
import os
import runpy
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import transformers
from PIL import Image, ImageFilter, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode

import dino
import train
from augment import MultiCrop, Photometrics
from checks import Checks, step_bytes
from data import Dataset, load_dataset
from distributed import autocast_for, compute_dtype, loader_workers, memory_gb, setup
from loader import CropDataset, make_loader
from metrics import knn_classify
from model import (FAMILIES, DINOHead, EMATeacher, Student, adapted_backbone, blocks,
                   build_backbone, compile_blocks, frozen_blocks, set_trainable, shared_blocks)
from optim import build_optimizer, set_learning_rates
from probe import fit_probe
from run import LossCheck, State, gradient_scaler, seed_iteration

STRATEGIES = dict(  # use LoRA, freeze the first blocks, run them once for student and teacher
    standard=(False, False, False), lora=(True, False, False),
    freeze=(False, True, False), freeze_shared=(False, True, True),
    lora_freeze=(True, True, True))
DINOV2 = dict(model_type="dinov2", patch_size=14, local_crops_size=98, ibot=True)  # in what=all
SIZES = dict(S=(384, 12, 6), B=(768, 12, 12),  # width, blocks, attention heads
             L=(1024, 24, 16))
PHOTOMETRICS = Photometrics("rgb", intensity_range=(0.0, 255.0), mean=(0.485, 0.456, 0.406),
                            std=(0.229, 0.224, 0.225))


def read_config():
    """The config block as a namespace. `config` of every function below is this one."""
    return SimpleNamespace(**{key: globals()[key] for key in config_keys})


def changed(config, **changes):
    """A copy of a config with other values."""
    return SimpleNamespace(**(vars(config) | changes))


# ---- what train.py builds ----

def make_train_config(config, name):
    """train.py's config for a strategy, at the sizes of this bench; no part waits or warms up."""
    use_lora, freezes, _ = STRATEGIES[name]
    values = {key: getattr(config, key, getattr(train, key)) for key in train.config_keys}
    values.update(global_batch_size=config.batch_size, ibot_out_dim=config.dino_head_out_dim,
                  gradient_accumulation_steps=1, use_lora=use_lora, warmup_iterations=0,
                  freeze_last_layer=0, freeze_backbone_iterations=0)
    if not freezes:
        values["freeze_backbone_layers"] = 0
    if config.ibot:
        values.update(ibot_loss_weight=1.0, koleo_loss_weight=0.1)
    return SimpleNamespace(**values)


def build_student(train_config, run_device):
    """The student of make_train_config, on the CPU or, inside torch.device('meta'), there."""
    backbone = adapted_backbone(train_config, 3, run_device)
    head = DINOHead(backbone.config.hidden_size, train_config.dino_head_out_dim,
                    train_config.head_hidden_dim, train_config.head_bottleneck_dim,
                    train_config.dino_head_norm_last_layer, train_config.head_weight_norm)
    return Student(backbone, head)


def build_state(train_config, shares, run_device):
    """The run.State of a step. shares: run frozen blocks once for student and teacher (train.py
    does so whenever that is exact)."""
    student = build_student(train_config, run_device).to(run_device).train()
    optimizer, train_from, _ = build_optimizer(student, train_config, new_patch_embed=False)
    set_trainable(student, train_from, 0)
    center = torch.zeros(1, train_config.dino_head_out_dim, device=run_device)
    scaler = gradient_scaler(run_device, train_config.mixed_precision)
    state = State(student, EMATeacher(student), optimizer, scaler,
                  centers=dict(dino=center, ibot=center.clone()))
    if shares and train_config.ibot_loss_weight == 0:
        state.n_shared_blocks = shared_blocks(student, state.ema)
    if train_config.compile:
        compile_blocks(student.backbone)
    return state


def crop_dataset(config, dataset, batch_size, seed=0, grid=1, masks=None):
    """The crops of the DINO recipe at the config's sizes. Other arguments: of CropDataset."""
    crops = MultiCrop(config.global_crops_size, (0.4, 1.0), 2, config.local_crops_size,
                      (0.05, 0.4), config.local_crops_number, vertical_flip=0.0)
    return CropDataset(dataset, crops, seed, batch_size, grid, masks)


def describe_crops(config):
    """Such as '2 x 224 + 8 x 96'."""
    return (f"2 x {config.global_crops_size} + {config.local_crops_number} x "
            f"{config.local_crops_size}")


# ---- counting ----

def count_matmuls(config, width, depth, patch, mlp_ratio, n_frozen, use_lora, shares, r=4,
                  channels=3, masked=0, most_masked=0, whole=False):
    """Multiplications of one step per image.

    Args: shares: as build_state; masked: patches per image that the iBOT head reads; most_masked:
    of one crop; whole: the last block computes all tokens, not only the used ones (last_block.py).
    Returns: dict with backbone and heads, each a dict of teacher, student, activations and weights;
    and unit, one forward of all student tokens through the whole backbone. The last two of the four
    are the backward, each as costly as the forward: the gradients of activations, down to the first
    trained parameter, and those of trained weights.
    The two products of attention count like a Linear and its weight. Both need both gradients even
    if the weights are frozen, so LoRA's ratio is 0.01 too low.
    """
    large, small = config.global_crops_size, config.local_crops_size
    crops = [large] * 2 + [small] * config.local_crops_number

    def in_blocks(size, n_blocks, all_tokens=whole):  # of one crop
        n = (size // patch) ** 2 + 1
        per_token = (4 + 2 * mlp_ratio) * width**2 + 2 * n * width  # projections, MLP; attention
        if all_tokens or n_blocks == 0:
            return n_blocks * n * per_token
        used, queries = 1, 1
        if size == large:
            used, queries = 1 + masked / 2, 1 + most_masked
        last = 2 * n * width**2 + queries * 2 * n * width  # keys and values; attention
        last += used * (2 + 2 * mlp_ratio) * width**2
        return (n_blocks - 1) * n * per_token + last

    def in_embedding(size):
        return (size // patch) ** 2 * patch**2 * channels * width

    embedded = sum(in_embedding(size) for size in crops)
    unit = sum(in_blocks(size, depth, True) for size in crops) + embedded
    student = sum(in_blocks(size, depth) for size in crops) + embedded
    teacher = 2 * (in_blocks(large, depth) + in_embedding(large))
    shared = 2 * (in_blocks(large, n_frozen, True) + in_embedding(large)) if shares else 0
    trained = sum(in_blocks(size, depth - n_frozen) for size in crops)
    backbone = dict(teacher=teacher, student=student - shared, activations=trained, weights=trained)
    if use_lora:  # no gradients of the weights; A and B on queries and values
        share = 2 * 2 * r / ((4 + 2 * mlp_ratio) * width)
        backbone.update(teacher=teacher + share * teacher,
                        student=backbone["student"] + share * trained,
                        activations=trained + share * trained, weights=share * trained)
    elif n_frozen == 0:
        backbone["weights"] += embedded
    head = (width * config.head_hidden_dim + config.head_hidden_dim**2
            + config.head_hidden_dim * config.head_bottleneck_dim
            + config.head_bottleneck_dim * config.dino_head_out_dim)
    student = (len(crops) + masked) * head
    heads = dict(teacher=(2 + masked) * head, student=student, activations=student,
                 weights=student)
    return dict(backbone=backbone, heads=heads, unit=unit)


def multiplications(flops, parts=("backbone", "heads")):
    """Sum over the parts of count_matmuls."""
    return sum(sum(flops[part].values()) for part in parts)


def bytes_of(tensors):
    """Bytes that the elements of tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count_bytes(student):
    """{item: (backbone, heads)} in bytes: weights, and what every trained parameter adds, which is
    gradients, AdamW's two moments and the EMA."""
    sizes = []
    for module in (student.backbone, student.dino_head):
        trained = bytes_of(param for param in module.parameters() if param.requires_grad)
        sizes.append((bytes_of(module.parameters()), trained, 2 * trained, trained))
    return dict(zip(("weights", "gradients", "optimizer", "teacher"), zip(*sizes)))


def total_bytes(counts):
    """(bytes of everything, bytes of the backbone) from count_bytes."""
    backbone = sum(backbone for backbone, _ in counts.values())
    return sum(map(sum, counts.values())), backbone


# ---- measuring ----

class Laps:
    """The clock of a step's parts. On CUDA it records events, so that the step never waits."""

    def __init__(self, run_device):
        self.cuda, self.marks = run_device.type == "cuda", []
        self("start")

    def __call__(self, part):
        """Say that a part ends."""
        mark = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            mark.record()
        self.marks.append((part, mark))

    def seconds(self):
        """{part: seconds}; parts of the same name are added up."""
        if self.cuda:
            torch.cuda.synchronize()
        parts, before = Counter(), self.marks[0][1]
        for part, after in self.marks[1:]:
            length = before.elapsed_time(after) / 1000 if self.cuda else after - before
            parts[part] += length
            before = after
        return parts


class Products(TorchDispatchMode):
    """Inside, .counts collects the matrix products:
    {(name, (shape, strides, dtype) of each operand): times}."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm"):
            operands = [(x.shape, x.stride(), x.dtype) for x in args]
            self.counts[name, tuple(operands)] += 1
        return function(*args, **(kwargs or {}))


def products_alone(config, counts):
    """Seconds that the products of a step take by themselves; of each kind the fastest of three."""
    run_device, total = setup(config.device), 0
    for (name, operands), times in counts.items():
        tensors = []
        for shape, strides, dtype in operands:
            n_elements = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
            memory = torch.randn(n_elements, device=run_device).to(dtype)
            tensors.append(memory.as_strided(shape, strides))
        total += times * fastest(lambda: getattr(torch, name)(*tensors), run_device, 3)
    return total


def measure(config, name, with_data=False):
    """Run some steps of train.py with a strategy, in this process. Without with_data all steps use
    the first batch.

    Returns: dict of seconds, of every measured step; parts, {part: median of its seconds}; peak and
    libraries, bytes at the end and at the start; held and computed, {item: bytes}; flops, of
    count_matmuls; loss, of the last step; products, of Products.
    """
    run_device = setup(config.device)
    torch.manual_seed(0)
    libraries = peak_bytes(run_device)
    train_config, (use_lora, _, shares) = make_train_config(config, name), STRATEGIES[name]
    state = build_state(train_config, shares, run_device)
    backbone, computed = state.student.backbone, count_bytes(state.student)
    autocast = autocast_for(run_device, config.mixed_precision)
    all_steps, shape = 2 + config.n_steps, backbone.config  # two to warm up
    if not with_data:
        train_config.num_workers = 0  # no worker runs beside the steps
    masks = {} if config.ibot else None  # the defaults are DINOv2's
    crop_set = crop_dataset(config, Dataset(example_images(64), name="random"), config.batch_size,
                            grid=config.global_crops_size // shape.patch_size, masks=masks)
    batches = iter(make_loader(crop_set, train_config, 1, 0, all_steps, run_device))
    laps, masked, products, losses = [], [], Products(), LossCheck()
    for step in range(all_steps):
        counts_products = step == 1 and not config.compile  # a compiled step calls no products
        with products if counts_products else contextlib.nullcontext():
            lap = Laps(run_device)
            seed_iteration(train_config.seed, step)
            values = dino.schedules(train_config, step, 0)
            set_learning_rates(state.optimizer, values.lr, values.last_layer_lr,
                               values.weight_decay, values.backbone_factor)
            if with_data or step == 0:
                batch = next(batches)
                lap("data wait")
                crops = dino.augment_batch(batch, PHOTOMETRICS, train_config, run_device)
                lap("augmentation")
            terms, row_sums, _ = dino.forward_backward(
                state, crops, values.teacher_temp, train_config, autocast, lap=lap)
            losses.add(terms, step, values.lr, batch["index"])
            if step == 0:
                gradients = bytes_of(param.grad for param in state.student.parameters()
                                     if param.grad is not None)
            dino.update(state, row_sums, values, train_config)
            lap("optimizer + EMA")
        laps.append(lap.seconds())
        rows, most = crops["masked"] or (torch.empty(3, 0), 0)
        masked.append((rows.shape[1] / config.batch_size, most))
    moments = []
    for entry in state.optimizer.state.values():
        moments += [value for value in entry.values() if value.ndim > 0]  # not the step counter
    held = dict(weights=bytes_of(state.student.parameters()), gradients=gradients,
                optimizer=bytes_of(moments), teacher=bytes_of(state.ema.values.values()))
    masked, most_masked = np.mean(masked, axis=0).tolist()
    mlp_ratio = getattr(shape, "mlp_ratio", None) or shape.intermediate_size / shape.hidden_size
    flops = count_matmuls(config, shape.hidden_size, len(blocks(backbone)), shape.patch_size,
                          mlp_ratio, frozen_blocks(backbone), use_lora, state.n_shared_blocks > 0,
                          config.lora_r, masked=masked, most_masked=most_masked)
    measured, parts = laps[2:], {}
    for part in measured[0]:
        parts[part] = statistics.median(lap[part] for lap in measured)
    seconds = [sum(lap.values()) for lap in measured]
    return dict(seconds=seconds, parts=parts, held=held, computed=computed, flops=flops,
                peak=peak_bytes(run_device), libraries=libraries, loss=losses.read()["loss"],
                products=products.counts)


def alone(function, *args):
    """function(...) in a process of its own: its peak memory is its own, and this process starts
    neither CUDA nor threads, which a later fork would not survive."""
    context = multiprocessing.get_context("fork")  # does not import everything again
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args).result()


def gemm_peak(config):
    """Multiplications per second in the fastest of some square matrix products, in a step's
    dtype."""
    run_device, peak = setup(config.device), 0
    dtype = compute_dtype(run_device, config.mixed_precision)
    for n in (512, 1024, 2048) if run_device.type == "cpu" else (4096, 8192):
        a, b = torch.randn(2, n, n, device=run_device, dtype=dtype)
        peak = max(peak, n**3 / fastest(lambda: a @ b, run_device))
    return peak


def fastest(function, run_device, repeats=5, clock=time.perf_counter):
    """Seconds of the fastest call after a first one; on CUDA until the device is done."""
    times = []
    for _ in range(1 + repeats):
        began = clock()
        function()
        if run_device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - began)
    return min(times[1:])


def core_seconds(function):
    """Like fastest, by the time that this process has the cores: other programs do not count."""
    return fastest(function, torch.device("cpu"), clock=time.process_time)


def peak_bytes(run_device):
    """Largest memory so far. CPU: of the process on Linux, elsewhere what it has at present. CUDA:
    of the tensors."""
    if run_device.type == "cuda":
        return torch.cuda.max_memory_allocated(run_device)
    try:  # not ru_maxrss: a child may inherit that of its parent
        line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return int(memory_gb(run_device)[0] * 1e9)


# ---- strategies ----

def print_times(results):
    """Time of the strategies, and its ratio to the first one. off by: that ratio divided by the
    counted one. heads apart: the counted ratio of the backbone only."""
    print("\nseconds per step; counted: matrix multiplications, in forwards of all student tokens\n"
          f"{'':13} {'median':>8} {'fastest':>8} {'ratio':>6} {'counted':>8} {'off by':>7} "
          f"{'heads apart':>12} | teacher student activations weights | heads")
    first = next(iter(results.values()))
    first_median = statistics.median(first["seconds"])
    for name, result in results.items():
        median, flops = statistics.median(result["seconds"]), result["flops"]
        ratio = median / first_median
        counted = multiplications(flops) / multiplications(first["flops"])
        apart = multiplications(flops, ["backbone"]) / multiplications(first["flops"], ["backbone"])
        parts = [part / flops["unit"] for part in flops["backbone"].values()]
        heads = multiplications(flops, ["heads"]) / flops["unit"]
        print(f"{name:13} {median:8.3f} {min(result['seconds']):8.3f} {ratio:6.2f} {counted:8.2f} "
              f"{ratio / counted:7.2f} {apart:12.2f} | "
              + "{:7.2f} {:7.2f} {:11.2f} {:7.2f} | ".format(*parts) + f"{heads:5.2f}")


def print_memory(results):
    """Memory of the strategies, and its ratio to the first one."""
    first = next(iter(results.values()))
    items = " ".join(f"{item:>17}" for item in first["held"])
    print("\nMB of memory; each of the four: tensors held / computed; ratios of their computed "
          f"sum\n{'':13} {'peak':>7} {'ratio':>6} {'at import':>9} | {items} | {'ratio':>6} "
          f"{'backbone':>9}")
    first_total, first_backbone = total_bytes(first["computed"])
    for name, result in results.items():
        total, backbone = total_bytes(result["computed"])
        cells = []
        for item, held in result["held"].items():
            cells.append(f"{held / 1e6:8.1f}/{sum(result['computed'][item]) / 1e6:8.1f}")
        print(f"{name:13} {result['peak'] / 1e6:7.0f} {result['peak'] / first['peak']:6.2f} "
              f"{result['libraries'] / 1e6:9.0f} | {' '.join(cells)} | "
              f"{total / first_total:6.2f} {backbone / first_backbone:9.2f}")


def bytes_of_sizes(config):
    """{'S', 'B', 'L': {strategy: (all, backbone) bytes}} with the config's head, computed on the
    meta device, which allocates nothing."""
    table = {}
    for size, (width, depth, n_heads) in SIZES.items():
        sized = changed(config, hidden_size=width, num_hidden_layers=depth,
                        num_attention_heads=n_heads)
        table[size] = {}
        for name in STRATEGIES:
            with torch.device("meta"):
                student = build_student(make_train_config(sized, name), torch.device("cpu"))
            table[size][name] = total_bytes(count_bytes(student))
    return table


def bench_strategies(config):
    """Time and memory of the strategies, each in a process of its own."""
    results = {}
    names = STRATEGIES if config.strategy == "all" else [config.strategy]
    for round_number in range(config.rounds):
        for name in names:
            result = alone(measure, config, name)
            median = statistics.median(result["seconds"])
            print(f"round {round_number + 1}, {name}: {median:.3f} s", flush=True)
            if name in results:
                result["seconds"] += results[name]["seconds"]
                result["peak"] = max(result["peak"], results[name]["peak"])
            results[name] = result
    print_times(results)
    print_memory(results)
    if config.strategy != "all" or config.model_type not in FAMILIES:  # a hub id has one size
        return
    print(f"\nweights + gradients + optimizer + teacher with K {config.dino_head_out_dim}, "
          "computed: ratio to standard (of the backbone)")
    for size, counts in bytes_of_sizes(config).items():
        standard, standard_backbone = counts["standard"]
        ratios = [f"{name} {total / standard:.2f} ({backbone / standard_backbone:.2f})"
                  for name, (total, backbone) in counts.items()]
        print(f"{config.model_type} {size}: standard {standard / 1e6:.0f} MB; {', '.join(ratios)}")


# ---- augmentation ----

def example_images(n, size=256):
    """[n,size,size,3] uint8: smooth random colours with edges and grain."""
    rng, images, shape = np.random.default_rng(0), [], (size, size)
    for _ in range(n):
        colours = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        small = Image.fromarray(colours)
        smooth = np.asarray(small.resize(shape, Image.BICUBIC)).astype(float)
        x = smooth + rng.normal(0, 8, (size, size, 3))
        squares = np.asarray(small.resize(shape, Image.NEAREST))
        x = np.where(squares > 200, 250 - x, x)
        images.append(x.clip(0, 255).astype(np.uint8))
    return np.stack(images)


def our_crops(config, images, seed=0):
    """(native crops by kind, {kind: seeds}) of all images, as a batch of the loader."""
    n = len(images)
    crop_set = crop_dataset(config, Dataset(images, name="random"), n, seed)
    batch = crop_set.collate([crop_set[i, i] for i in range(n)])
    parts = []
    for name in ("crops", "seeds"):
        first, second = batch[f"global_{name}"].split(n)
        parts.append(dict(global1=first, global2=second, local=batch[f"local_{name}"]))
    return parts


def torchvision_crops(config):
    """{kind: function from a PIL image to [3,S,S] in 0..1}: DINO's augmentations as one writes them
    with torchvision."""
    from torchvision import transforms as T
    jitter = T.ColorJitter(0.4, 0.4, 0.2, 0.1)

    def gaussian_blur(picture):
        return picture.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))

    def pipeline(size, scale, blur, solarize):
        return T.Compose([
            T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(0.5), T.RandomApply([jitter], 0.8), T.RandomGrayscale(0.2),
            T.RandomApply([T.Lambda(gaussian_blur)], blur),
            T.RandomApply([T.Lambda(ImageOps.solarize)], solarize), T.ToTensor()])
    return dict(global1=pipeline(config.global_crops_size, (0.4, 1.0), 1.0, 0.0),
                global2=pipeline(config.global_crops_size, (0.4, 1.0), 0.1, 0.2),
                local=pipeline(config.local_crops_size, (0.05, 0.4), 0.5, 0.0))


def bench_augment(config, n=32):
    """Images/s of our crops and photometrics, and of torchvision's pipeline, on one core; on a CUDA
    device also of our photometrics there."""
    run_device = setup(config.device)
    torch.set_num_threads(1)
    images = example_images(n)
    native, seeds = our_crops(config, images)

    def colour(crops):
        for kind, x in crops.items():
            PHOTOMETRICS(x, seeds[kind], kind)

    table = {"ours: crops, in a worker": core_seconds(lambda: our_crops(config, images)),
             "ours: photometrics, one core": core_seconds(lambda: colour(native))}
    ours = sum(table.values())
    table["ours: both"] = ours
    if run_device.type == "cuda":
        on_device = {kind: x.to(run_device) for kind, x in native.items()}
        table["ours: photometrics, CUDA"] = fastest(lambda: colour(on_device), run_device)
    try:
        pipelines = torchvision_crops(config)
        pictures = [Image.fromarray(image) for image in images]
        kinds = ["global1", "global2"] + ["local"] * config.local_crops_number

        def torchvision():
            for picture in pictures:
                for kind in kinds:
                    PHOTOMETRICS.normalize(pipelines[kind](picture))
        table["torchvision on PIL"] = core_seconds(torchvision)
    except ImportError:
        print("torchvision is not installed: pip install torchvision to compare with it")
    print(f"\naugmentation of 256 px RGB: {describe_crops(config)}\n"
          f"{'':30} {'ms/image':>9} {'images/s':>9} {'of ours':>8}")
    for name, value in table.items():
        print(f"{name:30} {value / n * 1000:9.2f} {n / value:9.0f} {value / ours:8.2f}")


# ---- a step, and how things grow ----

def bench_step(config):
    """The parts of a step, its memory, and which share it reaches of the matrix multiplications per
    second that this machine can do."""
    peak = alone(gemm_peak, config)
    name = "standard" if config.strategy == "all" else config.strategy
    result = alone(measure, config, name, True)
    peak = max(peak, alone(gemm_peak, config))  # before and after: others may use the machine
    own = alone(products_alone, config, result["products"]) or float("nan")
    total = sum(result["parts"].values())
    work = config.batch_size * multiplications(result["flops"])
    losses = ", iBOT, KoLeo" if config.ibot else ""
    print(f"\n{config.model_type}, batch {config.batch_size}, {describe_crops(config)}, K "
          f"{config.dino_head_out_dim}{losses}, {config.mixed_precision}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for part, value in result["parts"].items():
        print(f"{part:16} {value:8.3f} s {value / total:6.1%}")
    print(f"{'step':16} {total:8.3f} s; fastest {min(result['seconds']):.3f} s, "
          f"{config.batch_size / total:.1f} images/s\n"
          f"{work / 1e9:.0f} G multiplications; fastest matrix product {peak / 1e9:.0f} G/s, so "
          f"the limit is {work / peak:.3f} s: {work / peak / total:.2f} of it reached\n"
          f"its own products, each kind by itself: {own:.3f} s, {work / peak / own:.2f} of the "
          f"limit; the rest of the step: {total - own:.3f} s")
    held, libraries = result["held"], result["libraries"]
    items = " + ".join(f"{item} {n / 1e6:.0f}" for item, n in held.items())
    rest = result["peak"] - libraries - sum(held.values())
    print(f"peak memory {result['peak'] / 1e6:.0f} MB = libraries {libraries / 1e6:.0f} + {items} "
          f"+ activations, data and what the allocator keeps {rest / 1e6:.0f}")


def print_share(config, name, seconds, flops):
    """Print the result of comparisons/. Args: seconds of each step; flops: of count_matmuls.

    Call it last: gemm_peak lets the allocator keep memory, which other code does not.
    """
    peak, median = gemm_peak(config), statistics.median(seconds)
    work = config.batch_size * multiplications(flops)
    print(f"\n{name}: {median:.2f} s a step, fastest {min(seconds):.2f} s; {work / 1e9:.0f} G "
          f"multiplications, fastest matrix product {peak / 1e9:.0f} G/s: "
          f"{work / peak / median:.2f} of the limit")


def bench_growth(config):
    """Step time against batch, crop size, local crops and K, next to the multiplications; start,
    k-NN, probe and embed.py against the number of images."""
    print(f"\n{'step':>26} {'seconds':>8} {'ratio':>6} {'counted':>8} {'off by':>7} {'peak MB':>8}")
    for key in ("batch_size", "global_crops_size", "local_crops_number", "dino_head_out_dim"):
        first = None  # the numbers of the smallest, for the ratios
        unit = config.patch_size if key == "global_crops_size" else 1
        for factor in (1, 2, 4):  # quarter, half, all of the config's
            value = max(unit, getattr(config, key) * factor // 4 // unit * unit)
            variant = changed(config, **{key: value})
            result = alone(measure, variant, "standard")
            seconds = min(result["seconds"])
            work = variant.batch_size * multiplications(result["flops"])
            first = first or (seconds, work)
            ratio, counted = seconds / first[0], work / first[1]
            print(f"{key:>19} {value:6} {seconds:8.3f} {ratio:6.2f} {counted:8.2f} "
                  f"{ratio / counted:7.2f} {result['peak'] / 1e6:8.0f}")
    parts = "first start", "later", "k-NN of 1000", "probe", "embed"
    print(f"\n{'images':>8} {' '.join(f'{part:>16}' for part in parts)}   seconds, peak GB")
    for n in (1000, 10000, 100000, 1000000):
        if n > max(1000, config.n_images):
            break
        with tempfile.TemporaryDirectory() as folder:
            make_folder(f"{folder}/images", n, 8)
            time.sleep(2.1)  # data.py keeps no list of a folder that has just changed
            costs = [alone(image_cost, part, n, folder, config) for part in parts]
        cells = [f"{seconds:9.3f} {peak / 1e9:6.2f}" for seconds, peak in costs]
        print(f"{n:8} {' '.join(cells)}")


def image_cost(part, n, folder, config):
    """(seconds, peak bytes) of a part of bench_growth for n images: to open a folder of them; k-NN
    of 1000 among n; a linear probe on n; embed.py with a network of one block."""
    began, width, images = time.perf_counter(), config.hidden_size, f"{folder}/images"
    if part in ("first start", "later"):
        load_dataset(images, cache_dir=f"{folder}/cache")
    elif part == "embed":
        backbone = build_backbone("vit", False, hidden_size=width, num_hidden_layers=1,
                                  num_attention_heads=config.num_attention_heads, patch_size=8)
        backbone.save_pretrained(f"{folder}/vit")
        sys.argv = ["embed.py", f"--model={folder}/vit", f"--dataset_path={images}",
                    f"--output={folder}/features.npz", "--image_size=8", "--num_workers=1",
                    f"--cache_dir={folder}/cache"]
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            runpy.run_path(os.path.join(HERE, "embed.py"), run_name="__main__")
    else:
        train, test = torch.randn(n, width), torch.randn(1000, width)
        labels = torch.arange(n) % 10
        if part == "probe":
            fit_probe(train, labels, test, labels[:1000])
        else:
            knn_classify(train, labels, test)
    return time.perf_counter() - began, peak_bytes(torch.device("cpu"))


# ---- loading ----

def make_folder(folder, n, size):
    """n JPEG files of size x size pixels in ten classes, 1000 in a directory: links to at most a
    hundred pictures."""
    os.makedirs(f"{folder}.source")
    for i, image in enumerate(example_images(min(n, 100), size)):
        Image.fromarray(image).save(f"{folder}.source/{i}.jpg", quality=90)
    for i in range(n):
        directory = f"{folder}/{i // 1000 % 10}/{i // 1000}"
        if i % 1000 == 0:
            os.makedirs(directory)
        os.link(f"{folder}.source/{i % 100}.jpg", f"{directory}/{i}.jpg")


def bench_data(config, sizes=(512, 2048), n_batches=8):
    """Images/s of the loader from folders of JPEG files, by number of workers, of files, and their
    size in pixels. `decoding` decodes whole files; crops decode no more pixels than they show, so
    they can take less."""
    print(f"\nloader of JPEG files, {describe_crops(config)}\n"
          f"{'files':>8} {'pixels':>7} {'workers':>8} {'images/s':>9} {'decoding':>9} "
          f"{'with crops':>11}   ms/image")
    cpu, train_config = torch.device("cpu"), make_train_config(config, "standard")
    folders = []
    for part in (100, 10, 1):
        folders.append((max(10, config.n_images // part), sizes[0]))
    for n, size in (*folders, (10, sizes[1])):
        with tempfile.TemporaryDirectory() as folder:
            make_folder(f"{folder}/images", n, size)
            files = load_dataset(f"{folder}/images", cache_dir=f"{folder}/cache")
            crop_set = crop_dataset(config, files, config.batch_size)
            decoding = 1000 / 8 * core_seconds(lambda: [files[i] for i in range(8)])
            with_crops = 1000 / 8 * core_seconds(
                lambda: [crop_set[i, i] for i in range(8)])
            for workers in range(loader_workers(config.num_workers) + 1):
                train_config.num_workers, n_ready = workers, workers + 1
                loader = make_loader(crop_set, train_config, 1, 0, n_batches + n_ready, cpu)
                batches = iter(loader)
                for _ in range(n_ready):  # workers start together and have one batch ready each
                    next(batches)
                began = time.perf_counter()
                n_read = sum(len(batch["index"]) for batch in batches)
                rate = n_read / (time.perf_counter() - began)
                print(f"{n:8} {size:7} {workers:8} {rate:9.0f} {decoding:9.2f} {with_crops:11.2f}")


# ---- GPU memory, counted ----

# The sizes in the config.json of released networks: family, width, blocks, heads, patch
RELEASED = {
    "dino-vits16": ("vit", 384, 12, 6, 16),
    "dino-vitb8": ("vit", 768, 12, 12, 8),
    "dino-vitb16": ("vit", 768, 12, 12, 16),
    "dinov2-small": ("dinov2", 384, 12, 6, 14),
    "dinov2-base": ("dinov2", 768, 12, 12, 14),
    "dinov2-large": ("dinov2", 1024, 24, 16, 14),
    "dinov2-giant": ("dinov2", 1536, 40, 24, 14)}


def counted_gb(name, strategy, n_gpus=1, distribution="ddp"):
    """GB that each GPU needs at least for train.py's default step of 64 images on a released
    network. strategy: 'standard', 'lora', or 'freeze' = the first half of the blocks. fsdp is with
    activation checkpointing, as in config/fsdp.py."""
    family, width, depth, heads, patch = RELEASED[name]
    more = dict(use_swiglu_ffn=True) if name == "dinov2-giant" else {}
    if family == "vit":
        more = dict(intermediate_size=4 * width)
    network = transformers.AutoConfig.for_model(
        family, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        patch_size=patch, **more)
    config = SimpleNamespace(**{key: getattr(train, key) for key in train.config_keys})
    config.use_lora = strategy == "lora"
    config.freeze_backbone_layers = depth // 2 if strategy == "freeze" else 0
    config.activation_checkpointing = distribution == "fsdp"
    n_shares = n_gpus if distribution == "fsdp" else 1
    batch = config.global_batch_size // n_gpus
    return sum(step_bytes(config, network, 3, batch, n_shares)) / 1e9


def bench_memory(config=None):
    """Print the table of counted_gb. Nothing is allocated or measured: real peaks were 1.6 to 2.2
    times what is counted (model.check_memory)."""
    columns = [(1, "ddp"), (2, "ddp"), (4, "ddp")]
    columns += [(2, "fsdp"), (4, "fsdp")]
    header = " ".join(f"{n:2} {distribution:4}" for n, distribution in columns)
    print(f"\nGB on each GPU, counted; real peaks are up to 2.2 times that\n{'':22} {header}")
    for name in RELEASED:
        for kind in ("standard", "lora", "freeze"):
            cells = [counted_gb(name, kind, *column) for column in columns]
            row = " ".join(f"{gb:7.1f}" for gb in cells)
            print(f"{name:13}{kind:9} {row}")


def main(config):
    """Measure what a config of read_config asks for."""
    benches = dict(strategy=bench_strategies, augment=bench_augment, step=bench_step,
                   data=bench_data, growth=bench_growth, memory=bench_memory)
    check = Checks(config)
    check.network(FAMILIES)
    check.report()
    for name in benches if config.what == "all" else [config.what]:
        alone(benches[name], config)
        if config.what == "all" and name == "step":
            alone(bench_step, changed(config, **DINOV2))


if __name__ == "__main__":
    with one_line_errors():
        main(read_config())
