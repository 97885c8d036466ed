"""Distillation: a big frozen teacher into a small student, without labels (paper section 2.2.2).

    python distill.py config/distill_small.py --dataset_path=my_images/ --distilled_model_type=facebook/dinov2-small
    torchrun --standalone --nproc_per_node=4 distill.py config/distill_pathmnist.py \\
        --distilled_model_type=facebook/dinov2-large --model_type=facebook/dino-vits16
    python distill.py --help                                         # every key with its meaning

The teacher is any Hugging Face ViT, or with 'timm:' any timm ViT: UNI, Prov-GigaPath, Virchow2 and H-optimus are known
(teachers.py). It may differ from the student in everything: both see the same augmented crop, each in its own size and
normalisation. It never changes. What is exported is the student's EMA, the paper's "student shadow", and the folder
out/NAME/ is that of train.py: evaluate.py --run=out/NAME reads it.

Two objectives. feature: linear projections of the student's CLS and patch tokens match the teacher's tokens of the same
crop, standardised and if asked whitened. prototype: the paper's cross-entropy between DINO outputs: the teacher's are
its CLS token's similarities to fixed prototypes (k-means centroids of its own features), the student's those of its
DINO head for another crop of the image.
"""
import json
import math
import os
import signal
import sys
import time

import torch
from torch import nn
from torch.utils.data import DataLoader

from augment import PRESETS, MultiCrop, Photometrics, save_samples
from checkpoint import (check_fits, export_hf, find_state, link_state, load_optimizer, model_card, open_run, save_state,
                        truncate_log)
from configurator import UserError, describe, dump, list_keys, one_line_errors, override
from data import BatchOrder, CropDataset, ignore_ctrl_c, input_settings, load_dataset
from distributed import (accumulation_steps, all_reduce_mean, any_rank, autocast_for, barrier, built_by_main,
                         cleanup, full, gather_objects, is_main, loader_workers, lost_ranks, main_first, main_writes,
                         memory_gb, no_sync, place, rank, setup, stop_together, unwrap, world_size, wrap)
from evaluate import knn_accuracy
from losses import dino_loss, feature_loss, resize_grid, sinkhorn_knopp, softmax_center
from model import (FAMILIES, DINOHead, EMATeacher, Student, add_lora, backbone_from_config, blocks, freeze_layers,
                   parameter_counts, pretrained_input, set_trainable)
from optim import clip_gradients, cosine_schedule, param_groups, set_learning_rates
from probes import monitor, rankme
from teachers import FeatureCache, FeatureStatistics, build_teacher

# ==== config: all durations in iterations (optimizer steps), counted from 0; keys of train.py mean what they mean there
# ---- run ----
model_name = 'distill'           # the run's name
out_dir = ''                     # where it writes; '' = out/{model_name}
seed = 0                         # of weights, data order, crops, k-means
device = 'auto'                  # 'auto' | 'cpu' | 'cuda' | 'cuda:1'
resume_from = ''                 # a run folder or a checkpoint in it; 'auto' = out_dir if it has one; '' = start anew
max_iterations = 2000            # as train.py, so that the two can be compared at the same budget
log_interval = 10                # iterations between log lines
eval_interval = 250              # iterations between k-NN measurements; 0 = only at the start and the end; needs labels
saveckp_freq = 250               # iterations between checkpoints that are kept; checkpoints/last is written as often
generate_samples = True          # write samples/crops.png: the first batch as the student sees it
wandb_log = False                # also log to Weights & Biases (pip install wandb)

# ---- data ----
dataset_path = 'pathmnist'       # 'phantom' | a MedMNIST name | a .npz file | a folder of images
dataset_size = 224               # pixels of MedMNIST images to download: 28 | 64 | 128 | 224; of phantom slices: any
cache_dir = ''                   # downloads and unpacked arrays; '' = ~/.cache/dino-mx
download_url = ''                # a mirror's folder with the MedMNIST files; '' = their own host
shuffle = True                   # a new order every epoch; False = file order
num_channels = 0                 # of the student's input; 0 = what the data has. The teacher takes any number
intensity_range = (0.0, 0.0)     # pixel values mapped to 0..1, like the HU window (-160, 240); (0, 0) = measured
image_mean = ()                  # of the student, per channel, of pixels in 0..1; () = of its weights, else measured
image_std = ()                   # likewise
on_bad_image = 'error'           # 'error' = stop and name it | 'skip' = take its neighbour, list the files at the end
num_workers = -1                 # processes that read and crop, per rank; -1 = one less than the cores, up to 8
eval_split = 'val'               # k-NN is measured on this split against train; the best checkpoint is chosen by it
eval_max_images = 10000          # of each split at most so many, drawn by seed: measurements stay short; 0 = all

# ---- crops ----
augmentation = 'auto'            # 'rgb' | 'medical' (paper Table 3) | 'auto' = rgb for three channels, else medical
global_crops_number = 2          # views that teacher and student see; feature needs 1, prototype 2
global_crops_size = 224          # pixels for the student; a multiple of its patch size
global_crops_scale = (0.4, 1.0)  # share of the image area
local_crops_number = 0           # small views that only the student sees, for the prototype objective; paper: 8
local_crops_size = 96            # pixels; a multiple of the student's patch size
local_crops_scale = (0.1, 0.4)   # share of the image area
horizontal_flip = 0.5            # probability; 0 where left and right must not be confused
vertical_flip = 0.5              # probability
blur_probability = (1.0, 0.1, 0.5)  # global crop 1, 2, local
window_jitter = 0.0              # CT: both ends of intensity_range move by up to this share of its width
fixed_views = 0                  # an image is cropped in so many ways that repeat by turns; 0 = anew every time

# ---- teacher ----
distilled_model_type = 'facebook/dinov2-large'  # a hub id | a directory | timm:NAME | timm:hf_hub:ORG/NAME (paper)
distilled_model_weights = ''     # a checkpoint file for it, .safetensors or .pt; '' = the released weights (paper)
load_from_disk = False           # True = ask no hub: a directory, or timm:NAME with distilled_model_weights (paper)
distilled_crops_size = 0         # pixels at which it sees a global crop; 0 = its own, often 224; smaller is faster
distilled_statistics_views = 4000  # views that its mean, std and prototypes are measured on before the start
teacher_cache = ''               # a folder: its features of fixed_views are computed once and kept there, in fp16

# ---- student ----
model_type = 'facebook/dino-vits16'  # a hub id | a directory | a family: vit, dinov2, dinov2_with_registers, dinov3_vit
use_pretrained = True            # False = random weights in the shape of model_type; for a family, of the next keys
hidden_size = 384                # from scratch: width
num_hidden_layers = 12           # from scratch: blocks
num_attention_heads = 6          # from scratch: hidden_size must be a multiple
patch_size = 16                  # from scratch: pixels
num_register_tokens = 4          # from scratch, dinov2_with_registers and dinov3_vit
drop_path_rate = 0.0             # stochastic depth, where the family has it (not vit)
pos_embed_rescale = 0.0          # DINOv3: random scale of positions in training, up to this factor; 0 = off
freeze_backbone_layers = 0       # freeze the embeddings and the first N blocks; paper: 6
use_lora = False                 # train low-rank adapters beside the frozen weights
lora_targets = 'qv'              # 'qv' = on query and value projections (paper) | 'all' = of attention and MLP
lora_r = 4                       # rank
lora_alpha = 16                  # adapters count alpha / r
lora_dropout = 0.1               # on the adapters' input

# ---- objective ----
objective = 'feature'            # 'feature' | 'prototype' (the paper's loss) | 'both'
feature_loss_kind = 'cosine'     # 'cosine' | 'smooth_l1', of projected student tokens to standardised teacher tokens
feature_whitening = 0.0          # of the teacher's CLS: 0 = cosine follows few large components, 1 = all count alike
feature_cls_weight = 1.0         # of the feature loss of the CLS token
feature_patch_weight = 1.0       # of the feature loss of the patch tokens; 0 = CLS only
prototype_loss_weight = 1.0      # of the prototype loss, local + global
dino_head_out_dim = 512          # prototypes K: fewer than distilled_statistics_views times the global crops
dino_head_norm_last_layer = False  # freeze the gain of the student's prototypes at 1
head_hidden_dim = 2048           # of the student's DINO head
head_bottleneck_dim = 256        # of the student's DINO head
centering = 'centering'          # teacher logits: 'centering' = minus their mean | 'sinkhorn_knopp' = even use
student_temp = 0.1               # softmax temperature of the student
teacher_temp = 0.07              # of the teacher: cosines to prototypes differ by some tenths
momentum_teacher = 0.996         # of the exported EMA: shadow = m * shadow + (1 - m) * student; short runs 0.9 to 0.98
final_momentum_teacher = 1.0     # m rises to this with a cosine

# ---- optimizer ----
global_batch_size = 64           # images per step over all ranks; the batch per rank follows
gradient_accumulation_steps = 0  # micro-batches per step; 0 = as few as keep them below 65 images. Sinkhorn sees one
lr = 1e-4                        # peak, absolute; from scratch 1e-3
min_lr = 1e-5                    # the cosine ends here
warmup_iterations = 100          # linear from 0 to lr
weight_decay = 0.04              # first value; not on biases, norms, layer scale
weight_decay_end = 0.4           # last value, by a cosine
adam_betas = (0.9, 0.999)        # of AdamW
layerwise_decay = 1.0            # lr of block i times this ** (blocks - i): early blocks move less; DINOv2 0.9
patch_embed_lr_mult = 1.0        # of the patch embedding on top
clip_grad = 3.0                  # largest gradient norm; 0 = off
clip_grad_by = 'parameter'       # 'parameter' = every tensor (DINO) | 'module' = backbone, heads (DINOv2, DINOv3)
freeze_backbone_iterations = -1  # it waits while random heads learn, then ramps up as long; -1 = 10 % if pretrained

# ---- system ----
distribution = 'ddp'             # processes of torchrun: 'ddp' | 'fsdp' = both networks sharded | 'none' = only one
mixed_precision = 'bf16'         # 'bf16' | 'fp16' (CUDA) | 'no' = fp32; the teacher's weights are bf16, with 'no' fp32
activation_checkpointing = False # recompute the student's activations in backward: less memory, a third more time
compile = False                  # torch.compile the student: a minute at the start; on the CPUs we measured no gain
config_keys = list_keys(globals())


def check_config():
    """Ranges and pairs, all mistakes at once; raises UserError. Called before anything is read."""
    now, ranks, errors = globals(), world_size(), []
    share = global_batch_size // ranks

    def need(ok, message):
        if not ok:
            errors.append(message)
    for key, choices in (("objective", ("feature", "prototype", "both")), ("on_bad_image", ("error", "skip")),
                         ("feature_loss_kind", ("cosine", "smooth_l1")), ("augmentation", ("auto", *PRESETS)),
                         ("centering", ("centering", "sinkhorn_knopp")), ("clip_grad_by", ("parameter", "module")),
                         ("mixed_precision", ("bf16", "fp16", "no")), ("distribution", ("ddp", "fsdp", "none")),
                         ("lora_targets", ("qv", "all"))):
        need(now[key] in choices, f"{key}={now[key]!r}: choose one of {', '.join(choices)}")
    for key in ("max_iterations", "log_interval", "saveckp_freq", "global_batch_size", "global_crops_number",
                "global_crops_size", "local_crops_size", "dino_head_out_dim", "dataset_size", "teacher_temp",
                "student_temp", "distilled_statistics_views"):
        need(now[key] > 0, f"{key}={now[key]}: must be above 0")
    for key in ("momentum_teacher", "final_momentum_teacher", "drop_path_rate", "horizontal_flip", "vertical_flip",
                "feature_whitening"):
        need(0 <= now[key] <= 1, f"{key}={now[key]}: must be in 0..1")
    for key in ("global_crops_scale", "local_crops_scale"):
        low, high = now[key]
        need(0 < low <= high <= 1, f"{key}={(low, high)}: needs 0 < low <= high <= 1")
    need(objective == "feature" or global_crops_number + local_crops_number >= 2, f"global_crops_number="
         f"{global_crops_number}, local_crops_number={local_crops_number} with objective={objective!r}: the student "
         "learns from another view; use two at least")
    need(objective != "feature" or local_crops_number == 0, f"local_crops_number={local_crops_number} with "
         "objective='feature': the teacher does not see them; set 0, or use prototypes")
    need(objective == "prototype" or feature_cls_weight > 0, f"feature_cls_weight={feature_cls_weight}: the CLS token "
         "would not learn; a positive number")
    need(not teacher_cache or fixed_views > 0, f"teacher_cache={teacher_cache!r} with fixed_views=0: views that never "
         "come back need no cache; set fixed_views, like 8")
    need(global_batch_size % ranks == 0, f"global_batch_size={global_batch_size} cannot be shared by {ranks} ranks; "
         f"use a multiple, like {math.ceil(global_batch_size / ranks) * ranks}")
    need(share % max(1, gradient_accumulation_steps) == 0, f"gradient_accumulation_steps={gradient_accumulation_steps} "
         f"does not divide the {share} images of a rank")
    need(ranks == 1 or distribution != "none", f"distribution='none' with {ranks} processes: use ddp, or start one")
    need(model_type not in FAMILIES or hidden_size % num_attention_heads == 0, f"hidden_size={hidden_size} is not a "
         f"multiple of num_attention_heads={num_attention_heads}")
    if errors:
        raise UserError("\n       ".join(errors))


# ---- the maths of one iteration, with this config ----

def make_targets(statistics, cls, patches):
    """What the teacher says of the global crops -> what the student should say.

    Args: cls [V*B,D], patches [V*B,P,E] or None, of the teacher, on the student's grid. Returns dict: for the feature
    objective cls and patches (FeatureStatistics.features); for prototypes probs [V,B,K], rows sum to 1.
    """
    targets = {}
    if objective != "prototype":
        targets["cls"], targets["patches"] = statistics.features(cls, patches)
    if objective != "feature":
        logits = statistics.logits(cls)                                                    # [V*B,K]
        probs = sinkhorn_knopp(logits, teacher_temp) if centering == "sinkhorn_knopp" else \
            softmax_center(logits, statistics.center, teacher_temp)
        targets["probs"] = probs.unflatten(0, (global_crops_number, -1))
    return targets


def compute_losses(student_out, targets):
    """(total, terms): total is exactly the weighted sum of the logged terms; those of an objective that is off are 0.

    feature: each crop against itself. prototype: all pairs of a teacher crop and another student crop, shown in two
    parts, each the mean over its pairs times their share of all pairs, as in train.py.
    """
    zero = student_out["global_cls"].new_zeros((), dtype=torch.float32)
    terms = dict(feature_cls_loss=zero, feature_patch_loss=zero, dino_global_loss=zero, dino_local_loss=zero)
    if objective != "prototype":
        terms["feature_cls_loss"] = feature_loss(student_out["projected_cls"], targets["cls"], feature_loss_kind)
        if feature_patch_weight > 0:
            terms["feature_patch_loss"] = feature_loss(student_out["projected_patches"], targets["patches"],
                                                       feature_loss_kind)
    if objective != "feature":
        share = local_share()
        if global_crops_number > 1:
            terms["dino_global_loss"] = (1 - share) * dino_loss(
                student_out["global_logits"].unflatten(0, (global_crops_number, -1)), targets["probs"], student_temp)
        if local_crops_number > 0:
            terms["dino_local_loss"] = share * dino_loss(student_out["local_logits"].unflatten(
                0, (local_crops_number, -1)), targets["probs"], student_temp, ignore_diagonal=False)
    total = feature_cls_weight * terms["feature_cls_loss"] + feature_patch_weight * terms["feature_patch_loss"] \
        + prototype_loss_weight * (terms["dino_global_loss"] + terms["dino_local_loss"])
    return total, terms


def local_share():
    """The share of pairs (teacher crop, another student crop) in which the student's is a local crop."""
    return local_crops_number / (global_crops_number - 1 + local_crops_number)


def chance(targets):
    """{loss: its value for a student that knows nothing}: zeros for features, a uniform guess for prototypes."""
    values = {}
    if objective != "prototype":
        for name, key in (("cls", "feature_cls_loss"), ("patches", "feature_patch_loss")):
            if targets[name] is not None:
                values[key] = float(feature_loss(torch.zeros_like(targets[name]), targets[name], feature_loss_kind))
    if objective != "feature":
        values["dino_global_loss"] = (1 - local_share()) * math.log(dino_head_out_dim)
        values["dino_local_loss"] = local_share() * math.log(dino_head_out_dim)
    return values


def log_line(record, chances, run_device):
    """One line of the log, each loss beside its value for a student that knows nothing."""
    line = "".join(f"{name}: {record[key]:.4f} (knows nothing: {chances[key]:.4f}) " for name, key in (
        ("Feature CLS", "feature_cls_loss"), ("Feature patches", "feature_patch_loss"),
        ("Local DINO", "dino_local_loss"), ("Global DINO", "dino_global_loss")) if chances.get(key))
    return (f"Total Loss: {record['loss']:.4f} {line}LR: {record['lr']:.6f} "
            f"EMA momentum: {record['momentum_teacher']:.6f} Current Batch Size: {global_batch_size} "
            f"Iteration: {record['iteration']}/{max_iterations} Device: {run_device} "
            f"Memory: {record['memory_gb']:.2f}/{memory_gb(run_device)[1]:.2f} GB "
            f"Trainable: {record['trainable_m']:.2f}/{record['total_m']:.2f} M | RankMe {record['rankme']:.1f}")


def main(sources):
    """Distil with the config in this module's globals; sources: from configurator.override, for the printed config."""
    run_device = setup(device)
    check_config()
    config = {key: globals()[key] for key in config_keys}
    run_dir = out_dir or os.path.join("out", model_name)
    told, run_is_open = [], False                              # nothing is written before all input is found good

    def say(text):
        if is_main():
            print(text, flush=True)
            told.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            if run_is_open:
                with open(f"{run_dir}/logs/train.log", "a") as file:
                    file.writelines(told)
                told.clear()

    if is_main():
        print(describe(globals(), config_keys, sources) + "\n")
    resume, state = find_state(resume_from, run_dir, config, say)

    # ---- teacher, data ----
    def open_split(split):
        return load_dataset(dataset_path, split, dataset_size, cache_dir, download_url, num_channels, seed)

    # a sharded teacher answers all ranks or none; with a cache each asks when it must, so there the teacher stays whole
    teacher_distribution = "none" if teacher_cache else distribution
    with built_by_main(teacher_distribution), main_first():
        teacher = build_teacher(distilled_model_type, distilled_model_weights, load_from_disk, distilled_crops_size,
                                global_crops_size, torch.float32 if mixed_precision == "no" else torch.bfloat16)
    teacher = place(teacher, teacher.blocks(), teacher_distribution, run_device)
    with main_first():                                         # one process per machine downloads and unpacks
        train_set = open_split("train")
        labelled = train_set.labels is not None and train_set.labels.ndim == 1
        wanted = [eval_split] + ["test"] * (eval_split != "test" and "test" in train_set.splits) if labelled else []
        measured = {split: open_split(split) for split in wanted}
    channels = train_set.num_channels
    expected = pretrained_input(model_type) if use_pretrained else {}
    value_range, mean, std, stats_from = input_settings(
        train_set, expected, teacher.intensity_range if teacher.intensity_range and intensity_range == (0.0, 0.0)
        else intensity_range, image_mean, image_std, seed, on_bad_image)
    if teacher.intensity_range and tuple(teacher.intensity_range) != tuple(value_range):
        raise UserError(f"intensity_range={value_range}, but the teacher was trained on {teacher.intensity_range}; "
                        f"give --intensity_range={teacher.intensity_range[0]},{teacher.intensity_range[1]}")
    why_not = "no labels" if train_set.labels is None else "several labels per image"
    say(f"data: {dataset_path}, {len(train_set)} train images, {channels} channel(s), "
        f"{getattr(train_set.images, 'dtype', 'image files')}; "
        + (", ".join(f"{len(data)} {split}" for split, data in measured.items()) or f"no k-NN: {why_not}")
        + f"\n      intensities {value_range} -> 0..1, mean {mean}, std {std} ({stats_from})")
    say(f"teacher: {distilled_model_type}, width {teacher.patch_width}, image feature {teacher.cls_width}, patch "
        f"{teacher.patch_size}, {sum(param.numel() for param in teacher.parameters()) / 1e6:.1f} M parameters in "
        f"{next(teacher.parameters()).dtype}; sees crops at {teacher.size} pixels, {len(teacher.mean)} channel(s)")

    # ---- student ----
    torch.manual_seed(seed)                                    # the same initial weights on every rank
    with built_by_main(distribution) as holds_values:
        backbone = backbone_from_config(config, channels)
        family, patch, width = backbone.config.model_type, backbone.config.patch_size, backbone.config.hidden_size
        inflated = getattr(backbone, "patch_embed_inflated", False)
        if run_device.type == "cpu":
            backbone.set_attn_implementation("plain")          # model.plain_attention: torch's is slow backward on CPUs
        for key, size in (("global_crops_size", global_crops_size), ("local_crops_size", local_crops_size)):
            if size % patch and (key[0] == "g" or local_crops_number):
                raise UserError(f"{key}={size} is not a multiple of patch_size={patch} of {model_type}; use "
                                f"{size // patch * patch or patch} or {(size // patch + 1) * patch}")
        for name, param in backbone.named_parameters():        # nothing is masked: DDP would wait for its gradient
            if "mask_token" in name:
                param.requires_grad_(False)
        if use_lora:                                           # none in blocks that stay frozen: they would not move
            backbone = add_lora(backbone, lora_r, lora_alpha, lora_dropout, lora_targets, freeze_backbone_layers)
        freeze_layers(backbone, freeze_backbone_layers)
        if activation_checkpointing:
            backbone.activation_checkpointing_enable({"use_reentrant": False})
        dino_head = projectors = None
        if objective != "feature":
            dino_head = DINOHead(width, dino_head_out_dim, head_hidden_dim, head_bottleneck_dim,
                                 dino_head_norm_last_layer)
        if objective != "prototype":                           # linear: a linear probe then finds what they find
            projectors = nn.ModuleDict(dict(cls=nn.Linear(width, teacher.cls_width)))
            if feature_patch_weight > 0:
                projectors["patches"] = nn.Linear(width, teacher.patch_width)
        student = Student(backbone, dino_head, projectors=projectors)
        if state:
            for key in ("distilled_model_type", "distilled_model_weights", "distilled_crops_size"):
                if state["config"][key] != config[key]:
                    raise UserError(f"resume_from={resume!r}: {key} is {state['config'][key]!r} there, {config[key]!r} "
                                    "now; what the student learnt to match is that teacher's: take its value, or start "
                                    "a new run")
            check_fits(state, student, config)
            if holds_values:
                student.load_state_dict(state["student"])
    student = place(student, blocks(backbone), distribution, run_device).train()
    statistics = FeatureStatistics(teacher.cls_width, teacher.patch_width,
                                   dino_head_out_dim if dino_head is not None else 0,
                                   feature_whitening).to(run_device)

    # ---- optimizer, and what a checkpoint brings back ----
    if warmup_iterations >= max_iterations:
        say(f"note: warmup_iterations={warmup_iterations} of max_iterations={max_iterations}: it ends before lr={lr}")
    groups = param_groups(student, lr, weight_decay, layerwise_decay, patch_embed_lr_mult)
    waiting = freeze_backbone_iterations
    if waiting < 0:
        waiting = max_iterations // 10 if use_pretrained else 0
    for group in groups:                                       # inflated filters are new: they learn with the heads
        group["waits"] = not (group["is_patch_embed"] and inflated)
    begins = {name: waiting if group["is_backbone"] and group["waits"] else 0      # the iteration when each one begins
              for group in groups for name in group["names"]}
    optimizer = torch.optim.AdamW(groups, betas=adam_betas, fused=True)
    if mixed_precision == "fp16" and run_device.type != "cuda":
        raise UserError(f"mixed_precision='fp16' on {run_device.type}: only CUDA has fast fp16; use bf16")
    scaler = torch.amp.GradScaler(run_device.type, enabled=mixed_precision == "fp16")
    iteration, knn = 0, {}                                     # finished iterations; k-NN: start, best, best_iteration
    if state:
        load_optimizer(optimizer, state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        statistics.load_state_dict(state["statistics"])
        iteration, knn = state["iteration"], state["knn"]
        if iteration >= max_iterations:
            raise UserError(f"resume_from={resume!r} has finished {iteration} iterations; raise "
                            f"max_iterations={max_iterations} to go on")
    set_trainable(student, begins, iteration)
    shadow = EMATeacher(student)                               # before DDP: parameter names without its prefix
    if state:                          # `|`: by a changed config the checkpoint may have none: then where it stands
        shadow.load_state_dict(shadow.state_dict() | state["teacher"])
    state = None                       # every tensor of it, whole, would stay in memory on every rank
    if compile:                                                # by block: all share their graphs
        for block in blocks(backbone):
            block.compile()
    count = parameter_counts(student)
    say(f"student: {model_type} ({family}, {'pretrained' if use_pretrained else 'from scratch'}), width {width}, patch "
        f"{patch}; trainable {count['trainable_m']:.2f} M of {count['total_m']:.2f} M parameters, heads included")
    student = wrap(student, distribution, run_device)

    # ---- loader ----
    micro_batches = accumulation_steps(global_batch_size, gradient_accumulation_steps)
    batch_size = global_batch_size // world_size() // micro_batches
    V, L, grid = global_crops_number, local_crops_number, global_crops_size // patch
    crop = MultiCrop(global_crops_size, global_crops_scale, V, local_crops_size, local_crops_scale, L,
                     horizontal_flip=horizontal_flip, vertical_flip=vertical_flip)
    crop_set = CropDataset(train_set, crop, seed, global_batch_size, grid, on_bad_image=on_bad_image,
                           fixed_views=fixed_views)
    workers = loader_workers(num_workers)

    def batches(start, stop):
        """An iterator. It starts the loader at once: that draws from torch's generator, whose seed is set later on."""
        order = BatchOrder(len(train_set), global_batch_size, micro_batches, rank(), world_size(), start, stop, seed,
                           shuffle)
        return iter(DataLoader(crop_set, batch_sampler=order, collate_fn=crop_set.collate, num_workers=workers,
                               pin_memory=run_device.type == "cuda", worker_init_fn=ignore_ctrl_c))
    preset = augmentation if augmentation != "auto" else "rgb" if channels == 3 else "medical"
    photometrics = Photometrics(preset, value_range, mean, std, window_jitter, blur_probability)
    say(f"batch: {global_batch_size} images = {world_size()} rank(s) x {micro_batches} micro-batch(es) x {batch_size}; "
        f"{preset} augmentation; {len(train_set) / global_batch_size:.1f} iterations an epoch; {workers} loader "
        "worker(s) per rank")
    cache = None
    if teacher_cache:
        depends = ("dataset_path", "dataset_size", "num_channels", "seed", "fixed_views", "global_crops_number",
                   "global_crops_size", "global_crops_scale", "horizontal_flip", "vertical_flip", "blur_probability",
                   "window_jitter", "distilled_model_type", "distilled_model_weights", "mixed_precision")
        with main_first():
            cache = FeatureCache(teacher_cache, len(train_set) * fixed_views, V, teacher.cls_width,
                                 (grid**2, teacher.patch_width) if feature_patch_weight > 0 and projectors else (),
                                 dict({key: config[key] for key in depends}, preset=preset, value_range=value_range,
                                      teacher_size=teacher.size, grid=grid, images=len(train_set)))

    def views(batch):
        """The global crops [V*B,C,S,S] of a batch, augmented, in 0..1; crop 1 and the others differ (DINO)."""
        native, seeds = batch["global_crops"].to(run_device, non_blocking=True), batch["global_seeds"]
        first = len(native) // V
        return torch.cat([photometrics.augment(native[:first], seeds[:first], "global1"),
                          photometrics.augment(native[first:], seeds[first:], "global2")])

    def look(batch, crops):
        """What the teacher says of the crops: cls [V*B,D], patches [V*B,P,E] on the student's grid, or None."""
        def compute(which):
            cls, patches = teacher(crops.unflatten(0, (V, -1))[:, which].flatten(0, 1))
            return cls, resize_grid(patches, grid) if projectors is not None and feature_patch_weight > 0 else None
        B = len(batch["n"])
        if cache is None:
            return compute(list(range(B)))
        rows = [index * fixed_views + view for index, view in zip(batch["index"], batch["view"])]
        return cache(rows, compute, run_device)

    if not resume:                                             # of the views of the first iterations
        began = time.time()
        n_batches = math.ceil(distilled_statistics_views / global_batch_size / V)

        def looked_at():
            for batch in batches(0, n_batches):
                stop_together(batch.get("error"))
                yield batch["n"], *look(batch, views(batch))
        statistics.measure(looked_at(), seed)
        say(f"measured the teacher's features on {n_batches * global_batch_size * V} views in "
            f"{time.time() - began:.0f} s" + (f", {dino_head_out_dim} prototypes" if dino_head else ""))

    # ---- all input is good: the run's folder, k-NN, checkpoints ----
    jsonl = f"{run_dir}/log.jsonl"
    if is_main():
        if moved := open_run(run_dir, resume, dump(globals(), config_keys), "distill.py"):
            print(f"{run_dir} held an earlier run: moved to {moved} (to continue a run: --resume_from)")
        truncate_log(jsonl, iteration)
    barrier()
    run_is_open = True
    wandb = None
    if wandb_log and is_main():
        try:
            import wandb
        except ImportError:
            raise UserError("wandb_log=true needs wandb; pip install wandb, or --wandb_log=false") from None
        wandb.init(project="dino-mx", name=model_name, config=config)

    def write_log(record):
        if is_main():
            with open(jsonl, "a") as file:
                file.write(json.dumps(record) + "\n")
            if wandb:
                wandb.log(record, step=record["iteration"])

    autocast = autocast_for(run_device, mixed_precision)

    bank = train_set.limited(eval_max_images, seed)
    measured = {split: data.limited(eval_max_images, seed) for split, data in measured.items()}
    eval_settings = dict(intensity_range=value_range, mean=mean, std=std, num_workers=workers, autocast=autocast,
                         on_bad_image=on_bad_image)

    def shadow_knn(queries):
        with shadow.teacher_weights(student) as network:
            return knn_accuracy(network.backbone, bank, queries, size=global_crops_size, **eval_settings)

    def record_eval(accuracy):
        """Tell a k-NN measurement; True where it is the best so far."""
        knn.setdefault("start", accuracy)
        best = accuracy > knn.get("best", -1.0)
        if best:
            knn.update(best=accuracy, best_iteration=iteration)
        say(f"k-NN (k=5, {eval_split}) at iteration {iteration}: {accuracy:.4f}   start {knn['start']:.4f}, "
            f"best {knn['best']:.4f} at {knn['best_iteration']}")
        if accuracy < knn["start"] - 0.01 and use_pretrained:
            say(f"!!!! BELOW THE START by {knn['start'] - accuracy:.4f}: the teacher's features harm these, or lr is "
                "too high. Evaluate the teacher by itself; checkpoints/best keeps the best student. !!!!")
        return best

    def save(best=False, keep=False, done=False):
        last, weights = f"{run_dir}/checkpoints/last", None
        snapshot = full(dict(iteration=iteration, config=config, student=unwrap(student).state_dict(),
                             teacher=shadow.state_dict(), optimizer=optimizer.state_dict(),
                             scaler=scaler.state_dict(), statistics=statistics.state_dict(), knn=knn))
        if best or done:
            with shadow.teacher_weights(student) as network:
                weights = full(network.backbone.state_dict())

        def write():
            save_state(last, snapshot)
            for folder in [f"{iteration:07d}"] * keep + ["best"] * best:
                link_state(last, f"{run_dir}/checkpoints/{folder}")
            card = model_card(model_name, iteration, knn, config, dump(globals(), config_keys))
            for folder in ["best"] * best + ["last"] * done:   # the finished run's last shadow beside its best
                export_hf(f"{run_dir}/checkpoints/{folder}/hf", backbone, global_crops_size, value_range, mean, std,
                          card, weights)
        main_writes(write)

    if measured and iteration == 0 and not knn:
        knn["pixels"] = knn_accuracy(None, bank, measured, size=min(32, global_crops_size), **eval_settings)
        knn["untrained"] = shadow_knn(measured)
        say("raw pixels, k-NN (k=5): " + ", ".join(f"{split} {value:.4f}" for split, value in knn["pixels"].items()))
        record_eval(knn["untrained"][eval_split])
        write_log(dict(iteration=0, knn_accuracy=knn["start"]))
        save(best=True)                                        # if training only harms, best stays where it started

    # ---- the loop ----
    stop_signals, handlers = [], {}
    for number in (signal.SIGTERM, signal.SIGINT):             # preemption, Ctrl-C: finish the step, save, exit 0
        handlers[number] = signal.signal(number, lambda number, _: stop_signals.append(number))
    bad_images, stream = set(), batches(iteration, max_iterations)
    began = last_time = time.time()
    began_at = last_logged = iteration
    while iteration < max_iterations:
        torch.manual_seed(hash((seed, iteration, rank())) % 2**63)   # dropout and drop path repeat on resume, too
        lr_now = cosine_schedule(lr, min_lr, iteration, max_iterations, warmup_iterations)
        weight_decay_now = cosine_schedule(weight_decay, weight_decay_end, iteration, max_iterations)
        momentum_now = cosine_schedule(momentum_teacher, final_momentum_teacher, iteration, max_iterations)
        backbone_factor = 1.0 if waiting == 0 else min(1.0, max(0.0, (iteration - waiting + 1) / waiting))
        set_learning_rates(optimizer, lr_now, lr_now, weight_decay_now, backbone_factor)
        logged, indices = {}, []

        for micro in range(micro_batches):
            batch = next(stream)
            stop, failed = any_rank(micro == 0 and stop_signals, "error" in batch)       # one message for both
            if failed:
                stop_together(batch.get("error"))
            if stop:
                break
            indices += batch["index"]
            bad_images.update(batch["bad"])

            # Step 1. Photometrics, on the device: crops in 0..1, which each network normalises its own way
            crops = views(batch)                                                           # [V*B,C,S,S]
            global_crops, local_crops = photometrics.normalize(crops), None
            if L > 0:
                native = batch["local_crops"].to(run_device, non_blocking=True)
                local_crops = photometrics(native, batch["local_seeds"], "local")          # [L*B,C,s,s]
            if iteration == 0 and micro == 0 and generate_samples and is_main():
                save_samples(f"{run_dir}/samples/crops.png", global_crops, local_crops, None, batch_size, photometrics)

            # Step 2. The teacher sees the global crops, or the cache knows what it saw
            targets = make_targets(statistics, *look(batch, crops))

            # Step 3. The student sees everything
            with autocast():
                student_out = student(global_crops, local_crops)
            total, terms = compute_losses(student_out, targets)
            with no_sync(student, last=micro == micro_batches - 1):
                scaler.scale(total / micro_batches).backward()
            for name, value in dict(terms, loss=total).items():
                logged[name] = logged.get(name, 0) + value.detach() / micro_batches

        if stop:
            break

        # Step 4. Stop before anything is touched if the loss is not a number
        names = sorted(logged)
        logged = dict(zip(names, all_reduce_mean(torch.stack([logged[name] for name in names])).tolist()))
        if not math.isfinite(logged["loss"]):
            raise UserError(f"loss is {logged['loss']} at iteration {iteration} ("
                            + ", ".join(f"{name} {logged[name]:.4g}" for name in names) + f"), lr {lr_now:.3g}; "
                            "neither weights nor EMA were touched, checkpoints/last is good. Try a lower lr or "
                            f"clip_grad, or mixed_precision=no. Its images: {sum(gather_objects(indices), [])}")

        # Step 5. Clip, step, move the shadow
        scaler.unscale_(optimizer)
        grad_norm = clip_gradients(unwrap(student), clip_grad, clip_grad_by)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        shadow.update(student, momentum_now)
        iteration += 1

        # Step 6. Log, measure, save; `iteration` now counts the finished ones
        done, record, best, now = iteration == max_iterations, None, False, time.time()
        if iteration % log_interval == 0 or done or iteration == began_at + 1:
            seconds, chances = (now - last_time) / (iteration - last_logged), chance(targets)
            cls = student_out["global_cls"].detach()
            health = monitor(cls, targets["probs"].flatten(0, 1)) if "probs" in targets else dict(rankme=rankme(cls))
            record = dict(iteration=iteration, **logged, lr=lr_now, weight_decay=weight_decay_now,
                          momentum_teacher=momentum_now, batch_size=global_batch_size, grad_norm=float(grad_norm),
                          images_per_second=global_batch_size / seconds, memory_gb=memory_gb(run_device)[0],
                          **parameter_counts(student), **health)
            left = int((max_iterations - iteration) * (now - began) / (iteration - began_at))
            say(f"{log_line(record, chances, run_device)} | {seconds:.2f} s/it, {left // 60}:{left % 60:02d} left")
            if iteration >= max(50, max_iterations // 5):
                for key in (key for key, value in chances.items() if value > 0 and record[key] > 0.97 * value):
                    say(f"!!!! NOT LEARNING: {key} is where a student that knows nothing has it. Try a higher lr, more "
                        "iterations, or for prototypes a lower teacher_temp. !!!!")
            last_logged = iteration
        if measured and (done or (eval_interval > 0 and iteration % eval_interval == 0)):
            accuracy = shadow_knn({eval_split: measured[eval_split]})[eval_split]
            best = record_eval(accuracy)
            record = dict(record or dict(iteration=iteration), knn_accuracy=accuracy)
        if record:
            write_log(record)
            last_time = time.time() if last_logged == iteration else last_time + time.time() - now
        if set_trainable(unwrap(student), begins, iteration):  # the backbone begins to learn
            shadow.take_in(student)
            student = wrap(unwrap(student), distribution, run_device)
        if best or done or iteration % saveckp_freq == 0:
            save(best=best or (done and not measured), keep=iteration % saveckp_freq == 0, done=done)

    # ---- the end ----
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if bad_images := sorted(set().union(*gather_objects(bad_images))):
        say(f"{len(bad_images)} image(s) could not be read and were replaced by their neighbours:\n  "
            + "\n  ".join(bad_images))
    if iteration < max_iterations:
        save()
        start = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE')}" if world_size() > 1 else "python"
        say(f"stopped by a signal after iteration {iteration}, saved. To go on:\n"
            f"  {start} distill.py {run_dir}/config.py --resume_from={run_dir}")
        return cleanup()
    final, minutes = shadow_knn(measured), (time.time() - began) / 60
    if is_main():
        with open(f"{run_dir}/results/summary.json", "w") as file:
            json.dump(dict(knn, final=final, iterations=iteration, minutes=minutes, loss=logged["loss"]), file)
        learned = f"no labels to measure with, RankMe {record['rankme']:.1f}"
        if measured:
            learned = "5-NN accuracy of the student's CLS, start -> end: " + ", ".join(
                f"{split} {knn['untrained'][split]:.3f} -> {value:.3f} (raw pixels {knn['pixels'][split]:.3f})"
                for split, value in final.items()) + f", best {eval_split} {knn['best']:.3f} at {knn['best_iteration']}"
        best_hf = f"{run_dir}/checkpoints/best/hf"
        say(f"\nDone: {iteration} iterations in {minutes:.1f} min; {learned}. Everything is in {run_dir}: use the "
            f"features with AutoModel.from_pretrained('{best_hf}'), or compare them with the teacher's: python "
            f"evaluate.py --compare={distilled_model_type},{run_dir}")
    cleanup()


if __name__ == "__main__":
    with one_line_errors(), lost_ranks():
        main(override(globals(), config_keys, sys.argv[1:]))
