"""What things cost: adaptation strategies, augmentation, the parts of a step, loading, and how they grow.

    python bench.py --model_type=vit                                  # ViT-S/16, every strategy (paper Table 10)
    python bench.py --strategy=lora --model_type=facebook/dinov2-small --use_pretrained=true --local_crops_size=98
    python bench.py --what=augment                                    # images/s of one core, beside torchvision on PIL
    python bench.py --what=step                                       # DINO ViT-S/16, its share of the GEMM limit
    python bench.py --what=step --model_type=dinov2 --patch_size=14 --local_crops_size=98 --ibot=true     # DINOv2
    python bench.py --what=data --n_images=100000                     # a folder of JPEG files
    python bench.py --what=growth                                     # time against batch, crops, K, number of images
    python bench.py --what=all --n_images=100000                      # all of these, for the README's tables

strategy: random crops, no data is read. Every strategy runs in a process of its own, so that its peak memory is its
own; rounds repeat them in turn, so that a slow minute of the machine hits all. Prints time against the count of matrix
multiplications, memory against the sum of tensors, and for a family the computed bytes of its S, B and L.
"""
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import dino
import train
from augment import MultiCrop, Photometrics
from configurator import UserError, list_keys, one_line_errors, override
from data import BatchOrder, CropDataset, Dataset, load_dataset, make_loader
from distributed import autocast_for, loader_workers, memory_gb, only_shapes, setup
from model import (FAMILIES, DINOHead, EMATeacher, Student, adapted_backbone, blocks, frozen_blocks, set_trainable,
                   shared_blocks)
from optim import build_optimizer, set_learning_rates
from metrics import knn_classify
from run import State, mean_over_ranks

# ==== config ====
what = 'strategy'                # 'strategy' | 'augment' | 'step' | 'data' | 'growth' | 'all'
strategy = 'all'                 # 'all' | standard | lora | freeze | freeze_shared | lora_freeze
model_type = 'vit'               # as in train.py: a hub id, a directory or a family
use_pretrained = False           # True = the weights of model_type; a family has none
hidden_size = 384                # from scratch, as the next three: ViT-S/16
num_hidden_layers = 12           # blocks
num_attention_heads = 6          # hidden_size must be a multiple
patch_size = 16                  # pixels
batch_size = 8                   # images per step
global_crops_size = 224          # pixels, two crops of each image
local_crops_size = 96            # pixels
local_crops_number = 8           # of each image, at least one
dino_head_out_dim = 65536        # prototypes K (paper); few, and the heads vanish beside the backbone
head_hidden_dim = 2048           # of the DINO head
head_bottleneck_dim = 256        # of the DINO head
lora_r = 4                       # rank of the adapters on queries and values (paper Table 10)
lora_dropout = 0.1               # on their input, as in train.py: on a CPU its random numbers take a tenth of a step
freeze_backbone_layers = 6       # of freeze, freeze_shared and lora_freeze
n_steps = 5                      # measured steps per round, after two for warming up; the median counts
rounds = 2                       # how often every strategy is run
mixed_precision = 'bf16'         # 'bf16' | 'no' = fp32
device = 'auto'                  # 'auto' | 'cpu' | 'cuda'
ibot = False                     # step: with masks, the iBOT loss by the shared head, and KoLeo, as in DINOv2
compile = False                  # step: torch.compile the blocks; needs a C++ compiler on a CPU
num_workers = -1                 # of the loader in step, the most of them in data; -1 = as train.py
n_images = 10000                 # data, growth: files in the largest folder; they are links to a hundred
config_keys = list_keys(globals())

# use LoRA, freeze the first blocks, compute them once for student and teacher (train.py always does where it is exact)
STRATEGIES = dict(standard=(False, False, False), lora=(True, False, False), freeze=(False, True, False),
                  freeze_shared=(False, True, True), lora_freeze=(True, True, True))
DINOV2 = dict(model_type="dinov2", patch_size=14, local_crops_size=98, ibot=True)          # the second step of what=all
SIZES = dict(S=(384, 12, 6), B=(768, 12, 12), L=(1024, 24, 16))        # width, blocks, attention heads


def step_config(name, width=0, depth=0, n_heads=0):
    """train.py's config at the sizes of this bench, for a strategy; sizes: of the config where 0."""
    config = SimpleNamespace(**{key: getattr(train, key) for key in train.config_keys})
    vars(config).update({key: globals()[key] for key in config_keys if hasattr(config, key)})
    use_lora, freeze, _ = STRATEGIES[name]
    vars(config).update(
        hidden_size=width or hidden_size, num_hidden_layers=depth or num_hidden_layers, use_lora=use_lora,
        num_attention_heads=n_heads or num_attention_heads, freeze_backbone_layers=freeze_backbone_layers * freeze,
        global_batch_size=batch_size, ibot_out_dim=dino_head_out_dim, ibot_loss_weight=1.0 * ibot,
        koleo_loss_weight=0.1 * ibot, local_crops_scale=(0.05, 0.4), vertical_flip=0.0, warmup_iterations=0,
        freeze_last_layer=0, freeze_backbone_iterations=0)
    return config


def build(name, run_device=torch.device("cpu"), **sizes):
    """The state of a strategy, built with train.py's own parts."""
    config = step_config(name, **sizes)
    backbone = adapted_backbone(config, 3, run_device, ())
    head = DINOHead(backbone.config.hidden_size, config.dino_head_out_dim, config.head_hidden_dim,
                    config.head_bottleneck_dim, config.dino_head_norm_last_layer, config.head_weight_norm)
    student = Student(backbone, head)
    student = student if only_shapes() else student.to(run_device)
    optimizer, train_from, _ = build_optimizer(student.train(), config, False)
    set_trainable(student, train_from, 0)
    center = torch.zeros(1, config.dino_head_out_dim, device=run_device)
    state = State(student, EMATeacher(student), optimizer, torch.amp.GradScaler(run_device.type, enabled=False),
                  dict(dino=center, ibot=center.clone()))
    if STRATEGIES[name][2]:
        state.n_shared_blocks = shared_blocks(student, state.teacher)
    return config, state


# ---- counting ----

def count_matmuls(width, depth, patch, mlp_ratio, n_frozen, use_lora, shares, r=4, channels=3, masked=0):
    """Multiplications of one step per image: dict with backbone and heads, each dict(teacher, student, activations,
    weights), the last two for the backward; and unit, one forward of all student tokens through the backbone.

    A forward is 1; its backward is 1 for the gradients of activations, down to the first thing that learns, and 1 for
    those of weights, where they learn. masked: patches per image that the iBOT head reads. The two products of
    attention are counted like a Linear and its weight; in truth they have both gradients even where weights are frozen:
    LoRA's ratio is 0.01 low, a prediction on the strict side.
    """
    def tokens_through(size, first, last):                     # blocks first..last, of one crop
        n = (size // patch) ** 2 + 1
        per_token = (4 + 2 * mlp_ratio) * width**2 + 2 * n * width                         # projections, MLP; attention
        return (last - first) * n * per_token

    def embedding(size):
        return (size // patch) ** 2 * patch**2 * channels * width
    crops = [global_crops_size] * 2 + [local_crops_size] * local_crops_number
    seen = sum(tokens_through(size, 0, depth) + embedding(size) for size in crops)         # one forward
    teacher = 2 * (tokens_through(global_crops_size, 0, depth) + embedding(global_crops_size))
    once = 2 * (tokens_through(global_crops_size, 0, n_frozen) + embedding(global_crops_size)) if shares else 0
    below = sum(tokens_through(size, n_frozen, depth) for size in crops)                   # blocks that run backward
    backbone = dict(teacher=teacher, student=seen - once, activations=below, weights=0 if use_lora else below)
    if not use_lora and n_frozen == 0:
        backbone["weights"] += sum(embedding(size) for size in crops)
    if use_lora:                                               # A and B on q and v: forward, and twice in the backward
        share = 2 * 2 * r / ((4 + 2 * mlp_ratio) * width)
        for key, value in dict(teacher=teacher, student=below, activations=below, weights=below).items():
            backbone[key] += share * value
    head = width * head_hidden_dim + head_hidden_dim**2 + head_hidden_dim * head_bottleneck_dim \
        + head_bottleneck_dim * dino_head_out_dim
    rows = len(crops) + masked
    heads = dict(teacher=(2 + masked) * head, student=rows * head, activations=rows * head, weights=rows * head)
    return dict(backbone=backbone, heads=heads, unit=seen)


def bytes_of(tensors):
    """Bytes that the elements of tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count_bytes(student):
    """{item: (backbone, heads)} in bytes: weights, and gradients, AdamW's two moments and the EMA of what learns."""
    sizes = []
    for module in (student.backbone, student.dino_head):
        everything = bytes_of(module.parameters())
        learning = bytes_of(p for p in module.parameters() if p.requires_grad)
        sizes.append((everything, learning, 2 * learning, learning))
    return dict(zip(("weights", "gradients", "optimizer", "teacher"), zip(*sizes)))


# ---- measuring ----

class Laps:
    """Seconds of the parts of a step: by the clock, on CUDA by events, so that nothing waits within the step."""

    def __init__(self, run_device):
        self.cuda, self.marks = run_device.type == "cuda", []
        self("start")

    def __call__(self, part):
        """The part that ends here."""
        now = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            now.record()
        self.marks.append((part, now))

    def seconds(self):
        """{part: seconds}, parts of one name added up."""
        if self.cuda:
            torch.cuda.synchronize()
        parts = {}
        for (_, before), (part, now) in zip(self.marks, self.marks[1:]):
            parts[part] = parts.get(part, 0) + (before.elapsed_time(now) / 1000 if self.cuda else now - before)
        return parts


class Products(TorchDispatchMode):
    """Inside, .counts collects the matrix products: {(name, (shape, strides, dtype) of each operand): times}."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.overloadpacket.__name__) in ("mm", "addmm", "bmm"):
            key = name, tuple((tuple(x.shape), x.stride(), x.dtype) for x in args)
            self.counts[key] = self.counts.get(key, 0) + 1
        return function(*args, **(kwargs or {}))


def products_alone(counts):
    """Seconds that the products of a step take by themselves, each kind the fastest of three: what its shapes allow."""
    run_device, total = setup(device), 0
    for (name, operands), times in counts.items():
        tensors = [torch.randn(1 + sum((n - 1) * stride for n, stride in zip(shape, strides)), device=run_device)
                   .to(dtype).as_strided(shape, strides) for shape, strides, dtype in operands]
        total += times * fastest(lambda: getattr(torch, name)(*tensors), run_device, 3)
    return total


def make_batches(config, patch):
    """(loader of native crops and masks, photometrics), as train.py makes them, from random images in memory."""
    masks = {} if config.ibot_loss_weight > 0 else None         # the defaults are DINOv2's
    crops = CropDataset(Dataset(example_images(64), name="random"), multi_crop(), 0, batch_size,
                        global_crops_size // patch, masks)
    photometrics = Photometrics("rgb", (0.0, 255.0), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return make_loader(crops, config, 1, 0, 3 + n_steps), photometrics


def measure(name, with_data=False, **changes):
    """Run some steps of train.py with a strategy; changes: of the config. Returns a dict of numbers: seconds of every
    step and of its parts, bytes, counts."""
    globals().update(changes)                                  # of a process of its own
    run_device = setup(device)
    torch.manual_seed(0)
    libraries = peak_bytes(run_device)
    config, state = build(name, run_device)
    network = state.student.backbone
    for block in blocks(network) if compile else ():
        block.compile()
    computed, autocast = count_bytes(state.student), autocast_for(run_device, mixed_precision)
    loader, photometrics = make_batches(config, network.config.patch_size)
    batches = iter(loader)
    crops = dino.augment_batch(next(batches), photometrics, config, run_device)
    laps, masked, products = [], 0, Products()
    for step in range(2 + n_steps):                            # two to warm up
        with products if step == 1 and not compile else contextlib.nullcontext():   # a compiled step calls no products
            lap = Laps(run_device)
            if with_data:
                batch = next(batches)
                lap("data wait")
                crops = dino.augment_batch(batch, photometrics, config, run_device)
                lap("augmentation")
            now = dino.schedules(config, step, 0)
            set_learning_rates(state.optimizer, now.lr, now.last_layer_lr, now.weight_decay, now.backbone_factor)
            terms, row_sums, _ = dino.forward_backward(state, crops, now.teacher_temp, config, autocast, lap=lap)
            losses = mean_over_ranks(terms)
            gradients = bytes_of(param.grad for param in state.student.parameters() if param.grad is not None)
            dino.update(state, row_sums, now, config)
            lap("optimizer + EMA")
        masked += 0 if crops["masks"] is None else int(crops["masks"].sum()) / (2 + n_steps)
        laps.append(lap.seconds())
    seconds = [sum(lap.values()) for lap in laps]
    moments = [value for entry in state.optimizer.state.values() for value in entry.values() if value.ndim]
    held = dict(weights=bytes_of(state.student.parameters()), gradients=gradients, optimizer=bytes_of(moments),
                teacher=bytes_of(state.teacher.values.values()))
    shape = network.config
    ratio = getattr(shape, "mlp_ratio", None) or shape.intermediate_size / shape.hidden_size
    flops = count_matmuls(shape.hidden_size, len(blocks(network)), shape.patch_size, ratio, frozen_blocks(network),
                          STRATEGIES[name][0], state.n_shared_blocks > 0, lora_r, masked=masked / batch_size)
    parts = {part: statistics.median(lap[part] for lap in laps[2:]) for part in laps[0]}
    return dict(seconds=seconds[2:], parts=parts, peak=peak_bytes(run_device), libraries=libraries, computed=computed,
                held=held, flops=flops, loss=losses["loss"], products=products.counts)


def alone(function, *args, **changes):
    """function(...) in a process of its own: peak memory is its own, a changed config ends with it, and neither CUDA
    nor threads were started before a further fork."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:              # fork: it has our config
        return pool.submit(function, *args, **changes).result()


def gemm_peak():
    """Multiplications per second in the fastest of some square matrix products, in the dtype of a step."""
    run_device, peak = setup(device), 0
    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
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


def peak_bytes(run_device):
    """Largest memory so far: of the process on a CPU (Linux, else what it has now), of the tensors on CUDA."""
    if run_device.type == "cuda":
        return torch.cuda.max_memory_allocated(run_device)
    try:                                                       # not ru_maxrss: a child may inherit that of its parent
        line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return int(memory_gb(run_device)[0] * 1e9)


# ---- tables ----

def print_tables(results):
    """Time and memory of the strategies, and their ratios to the first one. off by: measured ratio over counted one."""
    first = next(iter(results))

    def middle(name):
        return statistics.median(results[name]["seconds"])
    print("\nseconds per step; counted: matrix multiplications, in forwards of all student tokens\n"
          f"{'':13} {'median':>8} {'fastest':>8} {'ratio':>6} {'counted':>8} {'off by':>7} {'heads apart':>12} | "
          "teacher student activations weights | heads")
    for name, result in results.items():
        ratio, parts = middle(name) / middle(first), result["flops"]["backbone"].values()
        counted, apart = (multiplications(result, *which) / multiplications(results[first], *which)
                          for which in ((), ("backbone",)))
        print(f"{name:13} {middle(name):8.3f} {min(result['seconds']):8.3f} {ratio:6.2f} {counted:8.2f} "
              f"{ratio / counted:7.2f} {apart:12.2f} | "
              + "{:7.2f} {:7.2f} {:11.2f} {:7.2f} | ".format(*(part / result["flops"]["unit"] for part in parts))
              + f"{multiplications(result, 'heads') / result['flops']['unit']:5.2f}")
    print("\nMB of memory; each of the four: tensors held / computed; ratios of their computed sum\n"
          f"{'':13} {'peak':>7} {'ratio':>6} {'at import':>9} | "
          + " ".join(f"{item:>17}" for item in results[first]["held"]) + f" | {'ratio':>6} {'backbone':>9}")
    for name, result in results.items():
        sums, firsts = ([sum(part) for part in zip(*results[which]["computed"].values())] for which in (name, first))
        cells = [f"{held / 1e6:8.1f}/{sum(result['computed'][item]) / 1e6:8.1f}"
                 for item, held in result["held"].items()]
        print(f"{name:13} {result['peak'] / 1e6:7.0f} {result['peak'] / results[first]['peak']:6.2f} "
              f"{result['libraries'] / 1e6:9.0f} | {' '.join(cells)} | {sum(sums) / sum(firsts):6.2f} "
              f"{sums[0] / firsts[0]:9.2f}")


def bytes_of_sizes():
    """{'S', 'B', 'L': {strategy: (all, backbone) bytes}} with the config's head; nothing is allocated."""
    with torch.device("meta"):
        counts = {size: {name: count_bytes(build(name, **dict(zip(("width", "depth", "n_heads"), shape)))[1].student).values() for name in STRATEGIES}
                  for size, shape in SIZES.items()}
    return {size: {name: (sum(map(sum, pairs)), sum(trunk for trunk, _ in pairs)) for name, pairs in table.items()}
            for size, table in counts.items()}


def bench_strategies():
    """Time and memory of the strategies, each in a process of its own."""
    results = {}
    for round_number in range(rounds):
        for name in STRATEGIES if strategy == "all" else [strategy]:
            result = alone(measure, name)
            print(f"round {round_number + 1}, {name}: {statistics.median(result['seconds']):.3f} s", flush=True)
            if name in results:
                result["seconds"] += results[name]["seconds"]
                result["peak"] = max(result["peak"], results[name]["peak"])
            results[name] = result
    print_tables(results)
    if strategy == "all" and model_type in FAMILIES:           # a hub id has one size
        print(f"\nweights + gradients + optimizer + teacher with K {dino_head_out_dim}, computed: ratio to standard "
              "(of the backbone)")
        for size, counts in bytes_of_sizes().items():
            everything, trunk = counts["standard"]
            print(f"{model_type} {size}: standard {everything / 1e6:.0f} MB; " + ", ".join(
                f"{name} {a / everything:.2f} ({b / trunk:.2f})" for name, (a, b) in counts.items()))


# ---- augmentation ----

def example_images(n, size=256):
    """[n,size,size,3] uint8: smooth random colours with edges and grain."""
    rng, images = np.random.default_rng(0), []
    for _ in range(n):
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        x = np.asarray(small.resize((size, size), Image.BICUBIC)).astype(float) + rng.normal(0, 8, (size, size, 3))
        images.append(np.where(np.asarray(small.resize((size, size), Image.NEAREST)) > 200, 250 - x, x).clip(0, 255))
    return np.stack(images).astype(np.uint8)


def multi_crop():
    """The crops of the DINO recipe at the config's sizes."""
    return MultiCrop(global_crops_size, (0.4, 1.0), 2, local_crops_size, (0.05, 0.4), local_crops_number,
                     vertical_flip=0.0)


def our_crops(images, run_device, seed=0):
    """(native crops by kind, {kind: seeds}) of all images, as a batch of the loader."""
    crops = CropDataset(Dataset(images, name="random"), multi_crop(), seed, len(images), 1)
    batch, n = crops.collate([crops[i, i] for i in range(len(images))]), len(images)
    native = dict(global1=batch["global_crops"][:n], global2=batch["global_crops"][n:], local=batch["local_crops"])
    seeds = dict(global1=batch["global_seeds"][:n], global2=batch["global_seeds"][n:], local=batch["local_seeds"])
    return {kind: x.to(run_device) for kind, x in native.items()}, seeds


def torchvision_crops():
    """{kind: function from PIL image to [3,S,S] in 0..1}: DINO's augmentations as one writes them with torchvision."""
    from torchvision import transforms as T

    def pipeline(size, scale, blur, solarize):
        return T.Compose([
            T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(0.5), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([T.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0))))], blur),
            T.RandomApply([T.Lambda(ImageOps.solarize)], solarize), T.ToTensor()])
    return dict(global1=pipeline(global_crops_size, (0.4, 1.0), 1.0, 0.0),
                global2=pipeline(global_crops_size, (0.4, 1.0), 0.1, 0.2),
                local=pipeline(local_crops_size, (0.05, 0.4), 0.5, 0.0))


def bench_augment(n=32):
    """Images/s of one core: our crops and photometrics, the latter also on the device, and torchvision's pipeline.
    By the time that the process has the core, so that others on it do not count."""
    threads, run_device, cpu = torch.get_num_threads(), setup(device), torch.device("cpu")
    torch.set_num_threads(1)
    images, photometrics = example_images(n), make_batches(step_config("standard"), patch_size)[1]
    native, seeds = our_crops(images, cpu)

    def colour(crops):
        for kind, x in crops.items():
            photometrics(x, seeds[kind], kind)
    rows = {"ours: crops, in a worker": fastest(lambda: our_crops(images, cpu), cpu, clock=time.process_time),
            "ours: photometrics, one core": fastest(lambda: colour(native), cpu, clock=time.process_time)}
    ours = sum(rows.values())
    rows["ours: both"] = ours
    if run_device.type == "cuda":
        on_device = {kind: x.to(run_device) for kind, x in native.items()}
        rows["ours: photometrics, CUDA"] = fastest(lambda: colour(on_device), run_device)
    try:
        pipelines, pictures = torchvision_crops(), [Image.fromarray(image) for image in images]
        normalize = photometrics.normalize
        rows["torchvision on PIL"] = fastest(lambda: [
            [normalize(pipelines[kind](picture)) for kind in ["global1", "global2"] + ["local"] * local_crops_number]
            for picture in pictures], cpu, clock=time.process_time)
    except ImportError:
        print("torchvision is not installed: pip install torchvision to compare with it")
    torch.set_num_threads(threads)
    print(f"\naugmentation of 256 px RGB: 2 x {global_crops_size} + {local_crops_number} x {local_crops_size}\n"
          f"{'':30} {'ms/image':>9} {'images/s':>9} {'of ours':>8}")
    for row, value in rows.items():
        print(f"{row:30} {value / n * 1000:9.2f} {n / value:9.0f} {value / ours:8.2f}")


# ---- a step, and how things grow ----

def bench_step(**changes):
    """The parts of a step, which share of the machine's matrix multiplications per second it reaches, its memory."""
    globals().update(changes)                                  # of a process of its own
    peak = alone(gemm_peak)
    result = alone(measure, "standard" if strategy == "all" else strategy, True)
    peak = max(peak, alone(gemm_peak))                         # before and after: others may use the machine
    total, work = sum(result["parts"].values()), batch_size * multiplications(result)
    own = alone(products_alone, result["products"]) or float("nan")
    print(f"\n{model_type}, batch {batch_size}, 2 x {global_crops_size} + {local_crops_number} x {local_crops_size}, K "
          f"{dino_head_out_dim}{', iBOT, KoLeo' if ibot else ''}, {mixed_precision}, {torch.get_num_threads()} threads"
          f", torch {torch.__version__}")
    for part, value in result["parts"].items():
        print(f"{part:16} {value:8.3f} s {value / total:6.1%}")
    print(f"{'step':16} {total:8.3f} s; fastest {min(result['seconds']):.3f} s, {batch_size / total:.1f} images/s\n"
          f"{work / 1e9:.0f} G multiplications; fastest matrix product {peak / 1e9:.0f} G/s, so the limit is "
          f"{work / peak:.3f} s: {work / peak / total:.2f} of it reached\nits own products, each kind by itself: "
          f"{own:.3f} s, {work / peak / own:.2f} of the limit; the rest of the step: {total - own:.3f} s")
    held, start = sum(result["held"].values()), result["libraries"]
    print(f"peak memory {result['peak'] / 1e6:.0f} MB = libraries {start / 1e6:.0f} + " + " + ".join(
        f"{item} {n / 1e6:.0f}" for item, n in result["held"].items()) + f" + activations, data and what the allocator "
        f"keeps {(result['peak'] - start - held) / 1e6:.0f}")


def multiplications(result, *parts):
    """Of one step, per image, from the counts of measure: of backbone and heads, or of the parts that are named."""
    return sum(sum(result["flops"][part].values()) for part in parts or ("backbone", "heads"))


def print_share(name, seconds, flops):
    """The line of comparisons/ about other code's steps: seconds of each; flops: count_matmuls. To be called last, as
    gemm_peak makes the allocator keep memory, which the others do not."""
    peak, median, work = gemm_peak(), statistics.median(seconds), batch_size * multiplications(dict(flops=flops))
    print(f"\n{name}: {median:.2f} s a step, fastest {min(seconds):.2f} s; {work / 1e9:.0f} G multiplications, "
          f"fastest matrix product {peak / 1e9:.0f} G/s: {work / peak / median:.2f} of the limit")


def bench_growth():
    """Step time against batch, crop size, local crops and K beside its multiplications; k-NN and start-up against N."""
    base = dict(batch_size=batch_size, global_crops_size=global_crops_size, local_crops_number=local_crops_number,
                dino_head_out_dim=dino_head_out_dim)
    print(f"\n{'step':>26} {'seconds':>8} {'ratio':>6} {'counted':>8} {'off by':>7} {'peak MB':>8}")
    for key, value in base.items():
        first = None                                           # the numbers of the smallest, for the ratios
        for factor in (1, 2, 4):                               # quarter, half, all of the config's
            unit = patch_size if key == "global_crops_size" else 1
            changed = max(unit, value * factor // 4 // unit * unit)
            result = alone(measure, "standard", **{key: changed})
            now = min(result["seconds"]), multiplications(result) * (changed if key == "batch_size" else 1)
            first = first or now
            ratio, counted = now[0] / first[0], now[1] / first[1]
            print(f"{key:>19} {changed:6} {now[0]:8.3f} {ratio:6.2f} {counted:8.2f} {ratio / counted:7.2f} "
                  f"{result['peak'] / 1e6:8.0f}")
    sizes = [n for n in (1000, 10000, 100000, 1000000) if n <= max(1000, n_images)]
    print(f"\n{'images':>8} {'first start':>12} {'later':>8} {'k-NN of 1000':>13}   seconds")
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            make_folder(f"{folder}/images", n, 8)
            time.sleep(2.1)                                    # what is younger is not kept, see data.py
            times = [time.perf_counter()]
            for _ in range(2):
                load_dataset(f"{folder}/images", cache_dir=f"{folder}/cache")
                times.append(time.perf_counter())
        features = torch.randn(n + 1000, hidden_size)
        knn = fastest(lambda: knn_classify(features[1000:], torch.arange(n) % 10, features[:1000]),
                      torch.device("cpu"), 1)
        print(f"{n:8} {times[1] - times[0]:12.3f} {times[2] - times[1]:8.3f} {knn:13.3f}")


# ---- loading ----

def make_folder(folder, n, size):
    """n JPEG files of size x size pixels in ten classes, 1000 a directory: links to at most a hundred pictures."""
    os.makedirs(f"{folder}.source")
    for i, image in enumerate(example_images(min(n, 100), size)):
        Image.fromarray(image).save(f"{folder}.source/{i}.jpg", quality=90)
    for i in range(n):
        place = f"{folder}/{i // 1000 % 10}/{i // 1000}"
        if i % 1000 == 0:
            os.makedirs(place)
        os.link(f"{folder}.source/{i % 100}.jpg", f"{place}/{i}.jpg")


def bench_data(sizes=(512, 2048), n_batches=8):
    """Images/s of the loader from folders of JPEG files, by number of workers, of files, and their size in pixels.
    decoding is that of whole files; beside the crops, which want no more pixels than they show, it can be less."""
    print(f"\nloader of JPEG files, 2 x {global_crops_size} + {local_crops_number} x {local_crops_size}\n"
          f"{'files':>8} {'pixels':>7} {'workers':>8} {'images/s':>9} {'decoding':>9} {'with crops':>11}   ms/image")
    cpu = torch.device("cpu")
    folders = [(max(10, n_images // part), sizes[0]) for part in (100, 10, 1)] + [(10, sizes[1])]
    for n, size in folders:
        with tempfile.TemporaryDirectory() as folder:
            make_folder(f"{folder}/images", n, size)
            files = load_dataset(f"{folder}/images", cache_dir=f"{folder}/cache")
            crops = CropDataset(files, multi_crop(), 0, batch_size, 1)
            decode, both = (fastest(lambda: [item(i) for i in range(8)], cpu, clock=time.process_time) / 8
                            for item in (files.__getitem__, lambda i: crops[i, i]))
            for workers in range(loader_workers(num_workers) + 1):
                order = BatchOrder(len(files), batch_size, 1, 0, 1, 0, n_batches + workers + 1, 0)
                batches = iter(DataLoader(crops, batch_sampler=order, collate_fn=crops.collate, num_workers=workers))
                for _ in range(workers + 1):                   # they start together and have one ready each
                    next(batches)
                began = time.perf_counter()
                for _ in batches:
                    pass
                print(f"{n:8} {size:7} {workers:8} {n_batches * batch_size / (time.perf_counter() - began):9.0f} "
                      f"{decode * 1000:9.2f} {both * 1000:11.2f}")


def main(sources):
    """Measure what the config in this module's globals asks for; sources: from configurator.override."""
    benches = dict(strategy=bench_strategies, augment=bench_augment, step=bench_step, data=bench_data,
                   growth=bench_growth)
    for key, choices in (("what", benches), ("strategy", STRATEGIES)):
        if globals()[key] not in ("all", *choices):
            raise UserError(f"{key}={globals()[key]!r}: choose all or one of {', '.join(choices)}")
    for name in benches if what == "all" else [what]:
        alone(benches[name])
        if what == "all" and name == "step":
            alone(bench_step, **DINOV2)


if __name__ == "__main__":
    with one_line_errors():
        main(override(globals(), config_keys, sys.argv[1:]))
