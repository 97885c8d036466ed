"""What an adaptation strategy costs: seconds and peak memory of a training step, beside what counting predicts.

    python bench.py --model_type=vit                                  # ViT-S/16, every strategy (paper Table 10)
    python bench.py --strategy=lora --model_type=facebook/dinov2-small --use_pretrained=true --local_crops_size=98

Random crops: no data is read. Every strategy runs in a process of its own, so that its peak memory is its own; rounds
repeat them in turn, so that a slow minute of the machine hits all. Prints time against the count of matrix
multiplications, memory against the sum of tensors, and for a family the computed bytes of its S, B and L.
"""
import multiprocessing
import statistics
import sys
import time

import torch

from configurator import UserError, list_keys, one_line_errors, override
from distributed import autocast_for, memory_gb, setup
from losses import dino_loss, softmax_center, update_center
from model import (FAMILIES, DINOHead, EMATeacher, Student, add_lora, blocks, build_backbone, freeze_layers,
                   frozen_blocks, shared_blocks)
from optim import clip_gradients, param_groups

# ==== config ====
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
config_keys = list_keys(globals())

# use LoRA, freeze the first blocks, compute them once for student and teacher (train.py always does where it is exact)
STRATEGIES = dict(standard=(False, False, False), lora=(True, False, False), freeze=(False, True, False),
                  freeze_shared=(False, True, True), lora_freeze=(True, True, True))
SIZES = dict(S=(384, 12, 6), B=(768, 12, 12), L=(1024, 24, 16))        # width, blocks, attention heads


def build(name, width=0, depth=0, n_heads=0):
    """The student of a strategy, as train.py builds it; sizes: of the config where 0."""
    use_lora, freeze, _ = STRATEGIES[name]
    sizes = {} if model_type not in FAMILIES else dict(
        hidden_size=width or hidden_size, num_hidden_layers=depth or num_hidden_layers, patch_size=patch_size,
        num_attention_heads=n_heads or num_attention_heads, image_size=global_crops_size)
    backbone, n_frozen = build_backbone(model_type, use_pretrained, **sizes), freeze_backbone_layers if freeze else 0
    for param_name, param in backbone.named_parameters():
        if "mask_token" in param_name:
            param.requires_grad_(False)
    if use_lora:
        backbone = add_lora(backbone, lora_r, dropout=lora_dropout, skip_blocks=n_frozen)
    freeze_layers(backbone, n_frozen)
    head = DINOHead(backbone.config.hidden_size, dino_head_out_dim, head_hidden_dim, head_bottleneck_dim, False)
    return Student(backbone, head)


# ---- counting ----

def count_matmuls(width, depth, patch, mlp_ratio, n_frozen, use_lora, shares, r=4, channels=3):
    """Multiplications of one step per image: dict with backbone and heads, each dict(teacher, student, activations,
    weights), the last two for the backward; and unit, one forward of all student tokens through the backbone.

    A forward is 1; its backward is 1 for the gradients of activations, down to the first thing that learns, and 1 for
    those of weights, where they learn. The two products of attention are counted like a Linear and its weight; in truth
    they have both gradients even where weights are frozen: LoRA's ratio is 0.01 low, a prediction on the strict side.
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
    heads = dict(teacher=2 * head, student=len(crops) * head, activations=len(crops) * head, weights=len(crops) * head)
    return dict(backbone=backbone, heads=heads, unit=seen)


def bytes_of(tensors):
    """Bytes that the elements of tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count_bytes(student):
    """{what: (backbone, heads)} in bytes: weights, and gradients, AdamW's two moments and the EMA of what learns."""
    sizes = []
    for module in (student.backbone, student.dino_head):
        everything = bytes_of(module.parameters())
        learning = bytes_of(p for p in module.parameters() if p.requires_grad)
        sizes.append((everything, learning, 2 * learning, learning))
    return dict(zip(("weights", "gradients", "optimizer", "teacher"), zip(*sizes)))


# ---- measuring ----

def measure(name):
    """Build the strategy, run its steps. Returns a dict of numbers: seconds of every step, bytes."""
    run_device = setup(device)
    torch.manual_seed(0)
    libraries = peak_bytes(run_device)
    student = build(name).to(run_device)
    if run_device.type == "cpu":
        student.backbone.set_attn_implementation("eager")      # as train.py
    student.train()
    computed, teacher = count_bytes(student), EMATeacher(student)
    optimizer = torch.optim.AdamW(param_groups(student, 1e-4, 0.04), fused=True)
    n_prefix = shared_blocks(student, teacher) if STRATEGIES[name][2] else 0
    center, B, L = torch.zeros(1, dino_head_out_dim, device=run_device), batch_size, local_crops_number
    global_crops = torch.randn(2 * B, 3, global_crops_size, global_crops_size, device=run_device)
    local_crops = torch.randn(L * B, 3, local_crops_size, local_crops_size, device=run_device)

    autocast, seconds = autocast_for(run_device, mixed_precision), []
    for _ in range(2 + n_steps):                               # Steps 2, 3 and 5 of train.py's loop
        began = time.perf_counter()
        with teacher.teacher_weights(student) as network, autocast():
            teacher_out = network(global_crops, n_prefix=n_prefix)
        probs = softmax_center(teacher_out["global_logits"], center, 0.04).unflatten(0, (2, B))
        with autocast():
            out = student(global_crops, local_crops, prefix=teacher_out.get("prefix"))
        loss = dino_loss(out["global_logits"].unflatten(0, (2, B)), probs) \
            + dino_loss(out["local_logits"].unflatten(0, (L, B)), probs, ignore_diagonal=False)
        loss.backward()
        clip_gradients(student, 3.0, "parameter")
        gradients = bytes_of(param.grad for param in student.parameters() if param.grad is not None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        teacher.update(student, 0.996)
        center = update_center(center, teacher_out["global_logits"])
        if run_device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    moments = [value for entry in optimizer.state.values() for value in entry.values() if value.ndim]   # not the step
    held = dict(weights=bytes_of(student.parameters()), gradients=gradients, optimizer=bytes_of(moments),
                teacher=bytes_of(teacher.values.values()))
    config = student.backbone.config
    ratio = getattr(config, "mlp_ratio", None) or config.intermediate_size / config.hidden_size
    flops = count_matmuls(config.hidden_size, len(blocks(student.backbone)), config.patch_size, ratio,
                          frozen_blocks(student.backbone), STRATEGIES[name][0], n_prefix > 0, lora_r)
    return dict(seconds=seconds[2:], peak=peak_bytes(run_device), libraries=libraries, computed=computed, held=held,
                flops=flops, loss=float(loss.detach()))


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

    def work(name, *parts):
        return sum(sum(results[name]["flops"][part].values()) for part in parts)

    def middle(name):
        return statistics.median(results[name]["seconds"])
    print("\nseconds per step; counted: matrix multiplications, in forwards of all student tokens\n"
          f"{'':13} {'median':>8} {'fastest':>8} {'ratio':>6} {'counted':>8} {'off by':>7} {'heads apart':>12} | "
          "teacher student activations weights | heads")
    for name, result in results.items():
        ratio, parts = middle(name) / middle(first), result["flops"]["backbone"].values()
        counted = work(name, "backbone", "heads") / work(first, "backbone", "heads")
        print(f"{name:13} {middle(name):8.3f} {min(result['seconds']):8.3f} {ratio:6.2f} {counted:8.2f} "
              f"{ratio / counted:7.2f} {work(name, 'backbone') / work(first, 'backbone'):12.2f} | "
              + "{:7.2f} {:7.2f} {:11.2f} {:7.2f} | ".format(*(part / result["flops"]["unit"] for part in parts))
              + f"{work(name, 'heads') / result['flops']['unit']:5.2f}")
    print("\nMB of memory; each of the four: tensors held / computed; ratios of their computed sum\n"
          f"{'':13} {'peak':>7} {'ratio':>6} {'at import':>9} | "
          + " ".join(f"{what:>17}" for what in results[first]["held"]) + f" | {'ratio':>6} {'backbone':>9}")
    for name, result in results.items():
        sums, firsts = ([sum(part) for part in zip(*results[which]["computed"].values())] for which in (name, first))
        cells = [f"{held / 1e6:8.1f}/{sum(result['computed'][what]) / 1e6:8.1f}"
                 for what, held in result["held"].items()]
        print(f"{name:13} {result['peak'] / 1e6:7.0f} {result['peak'] / results[first]['peak']:6.2f} "
              f"{result['libraries'] / 1e6:9.0f} | {' '.join(cells)} | {sum(sums) / sum(firsts):6.2f} "
              f"{sums[0] / firsts[0]:9.2f}")


def bytes_of_sizes():
    """{'S', 'B', 'L': {strategy: (all, backbone) bytes}} with the config's head; nothing is allocated."""
    with torch.device("meta"):
        counts = {size: {name: count_bytes(build(name, *shape)).values() for name in STRATEGIES}
                  for size, shape in SIZES.items()}
    return {size: {name: (sum(map(sum, pairs)), sum(trunk for trunk, _ in pairs)) for name, pairs in table.items()}
            for size, table in counts.items()}


def main(sources):
    """Measure the strategies of the config in this module's globals; sources: from configurator.override."""
    if strategy not in ("all", *STRATEGIES):
        raise UserError(f"strategy={strategy!r}: choose all or one of {', '.join(STRATEGIES)}")
    results = {}
    for round_number in range(rounds):
        for name in STRATEGIES if strategy == "all" else [strategy]:
            with multiprocessing.get_context("fork").Pool(1) as pool:                      # fork: it has our config
                result = pool.apply(measure, (name,))
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


if __name__ == "__main__":
    with one_line_errors():
        main(override(globals(), config_keys, sys.argv[1:]))
