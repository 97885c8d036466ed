"""Self-supervised training of a vision transformer by self-distillation: DINO, DINOv2 and DINOv3 recipes on any HF ViT.

    python train.py config/phantom.py                                # laptop: embedded data, a small ViT, some minutes
    python train.py config/dinov2.py --dataset_path=my_images/ --model_type=facebook/dinov2-small --local_crops_size=98
    torchrun --standalone --nproc_per_node=4 train.py config/pathmnist.py            # four GPUs; --distribution=fsdp
    python train.py --help                                           # every key with its meaning

Config files apply from left to right, then --key=value. A recipe, a data set and a strategy are three files.
Writes out/NAME/: config.py (resolved, runnable), log.jsonl, logs/train.log, samples/crops.png, results/summary.json and
checkpoints/{last,best}; checkpoints/best/hf loads with transformers.AutoModel.from_pretrained.
"""
import json
import math
import os
import signal
import sys
import time

import torch
from torch.utils.data import DataLoader

from augment import PRESETS, MultiCrop, Photometrics, is_labelled, save_samples
from checkpoint import (check_fits, export_hf, find_state, link_state, load_optimizer, model_card, open_run, save_state,
                        truncate_log)
from configurator import UserError, describe, dump, list_keys, one_line_errors, override
from data import BatchOrder, CropDataset, ignore_ctrl_c, input_settings, load_dataset
from distributed import (accumulation_steps, all_reduce_mean, any_rank, autocast_for, barrier, built_by_main,
                         cleanup, full, gather_objects, is_main, loader_workers, lost_ranks, main_first, main_writes,
                         memory_gb, no_sync, place, rank, setup, stop_together, unwrap, world_size, wrap)
from evaluate import knn_accuracy
from losses import (dino_loss, gram_loss, ibot_loss, koleo_loss, move_center, sinkhorn_knopp, softmax_center,
                    sum_rows)
from model import (FAMILIES, DINOHead, EMATeacher, Student, add_lora, backbone_from_config, blocks, forward_features,
                   freeze_layers, frozen_blocks, parameter_counts, pretrained_input, set_trainable, shared_blocks)
from optim import clip_gradients, cosine_schedule, linear_schedule, param_groups, set_learning_rates
from probes import diagnose, monitor

# ==== config: defaults are the paper's Listings 2-8; all durations in iterations (optimizer steps), counted from 0 ====
# ---- run ----
model_name = 'pathmnist'         # the run's name
out_dir = ''                     # where it writes; '' = out/{model_name}
seed = 0                         # of weights, data order, crops, masks; the same seed on the same machine repeats a run
device = 'auto'                  # 'auto' | 'cpu' | 'cuda' | 'cuda:1'
resume_from = ''                 # a run folder or a checkpoint in it; 'auto' = out_dir if it has one; '' = start anew
max_iterations = 2000            # paper: 2000
log_interval = 10                # iterations between log lines
eval_interval = 250              # iterations between k-NN measurements; 0 = only at the start and the end; needs labels
saveckp_freq = 250               # iterations between checkpoints that are kept; checkpoints/last is written as often
generate_samples = True          # write samples/crops.png: the first batch as the network sees it
wandb_log = False                # also log to Weights & Biases (pip install wandb)

# ---- data ----
dataset_path = 'pathmnist'       # 'phantom' | a MedMNIST name | a .npz file | a folder of images
dataset_size = 224               # pixels of MedMNIST images to download: 28 | 64 | 128 | 224; of phantom slices: any
cache_dir = ''                   # downloads and unpacked arrays; '' = ~/.cache/dino-mx
download_url = ''                # a mirror's folder with the MedMNIST files; '' = their own host
shuffle = True                   # a new order every epoch; False = file order
num_channels = 0                 # of the network's input; 0 = what the data has. Grey stays one channel
intensity_range = (0.0, 0.0)     # pixel values mapped to 0..1, like the HU window (-160, 240); (0, 0) = measured
image_mean = ()                  # per channel, of pixels in 0..1; () = of the pretrained weights, else measured
image_std = ()                   # likewise
on_bad_image = 'error'           # 'error' = stop and name it | 'skip' = take its neighbour, list the files at the end
num_workers = -1                 # processes that read and crop, per rank; -1 = one less than the cores, up to 8
eval_split = 'val'               # k-NN is measured on this split against train; the best checkpoint is chosen by it
eval_max_images = 10000          # of each split at most so many, drawn by seed: measurements stay short; 0 = all

# ---- crops ----
augmentation = 'auto'            # 'rgb' | 'medical' (paper Table 3) | 'auto' = rgb for three channels, else medical
global_crops_number = 2          # views that teacher and student see; 2 in all recipes
global_crops_size = 224          # pixels; a multiple of the patch size
global_crops_scale = (0.4, 1.0)  # share of the image area; DINOv2: (0.32, 1)
local_crops_number = 8           # small views that only the student sees; 0 = none
local_crops_size = 96            # pixels; a multiple of the patch size, so 98 for patch 14
local_crops_scale = (0.1, 0.4)   # paper Listing 6; DINO and DINOv2: 0.05 up to the lower end of the global scale
label_guided_crops_number = 0    # further local crops centred on labelled pixels (paper section 2.2.4); needs masks
label_guided_crops_scale = (0.02, 0.1)  # their share of the image area
label_guided_loss_weight = 0.0   # > 0: the teacher sees guided crops, too, and attention finds labels; paper: 0
label_guided_classes = ()        # mask values that count as label, like (2,); () = all but 0
horizontal_flip = 0.5            # probability; 0 where left and right must not be confused
vertical_flip = 0.5              # probability; paper Table 3 flips both ways, DINO only horizontally
blur_probability = (1.0, 0.1, 0.5)  # global crop 1, 2, local; DINOv2 in truth (0, 0.9, 0.5): augment.photometric
window_jitter = 0.0              # CT: both ends of intensity_range move by up to this share of its width; 0.1 is mild

# ---- backbone ----
model_type = 'facebook/dino-vits16'  # a hub id | a directory | a family: vit, dinov2, dinov2_with_registers, dinov3_vit
use_pretrained = True            # False = random weights in the shape of model_type; for a family, of the next keys
hidden_size = 384                # from scratch: width
num_hidden_layers = 12           # from scratch: blocks
num_attention_heads = 6          # from scratch: hidden_size must be a multiple
patch_size = 16                  # from scratch: pixels
num_register_tokens = 4          # from scratch, dinov2_with_registers and dinov3_vit
drop_path_rate = 0.0             # stochastic depth of the student, where the family has it (not vit); DINOv2 0.3
pos_embed_rescale = 0.0          # DINOv3: random scale of positions in training, up to this factor (7B: 2.0); 0 = off
freeze_backbone_layers = 0       # freeze the embeddings and the first N blocks (paper section 2.2.1)
freeze_backbone_until = 0        # iteration at which they thaw and learn with the rest; 0 = they stay frozen
use_lora = False                 # train low-rank adapters beside the frozen weights (paper section 2.2.3)
lora_targets = 'qv'              # 'qv' = on query and value projections (paper) | 'all' = of attention and MLP
lora_r = 4                       # rank
lora_alpha = 16                  # adapters count alpha / r
lora_dropout = 0.1               # on the adapters' input

# ---- heads ----
dino_head_out_dim = 65536        # prototypes K; 65536 for a million images, 512 to 4096 below 20 000
dino_head_norm_last_layer = False  # freeze the prototypes' gain at 1: steadier for large ViTs (dino help text)
dino_head_loss_weight = 1.0      # weight of the DINO loss, local + global
dino_local_loss_weight = 1.0     # factor on its local part (DINOv3 in high resolution: 0.5)
head_hidden_dim = 2048           # of both heads
head_bottleneck_dim = 256        # of both heads; DINOv2 long runs 384
head_weight_norm = True          # unit-length prototypes times a gain (DINO, DINOv2); False = plain (DINOv3)
ibot_loss_weight = 0.0           # weight of the masked-patch loss; 0 = no masks at all, 1 in DINOv2 and DINOv3
ibot_separate_head = False       # own head for patches (DINOv2 long runs, DINOv3), else they share the DINO head
ibot_out_dim = 65536             # prototypes of the iBOT head; equal to dino_head_out_dim where the head is shared
ibot_norm_last_layer = True      # as dino_head_norm_last_layer, for the separate head
ibot_mask_sample_probability = 0.5  # share of the global crops that are masked
ibot_mask_ratio_min_max = (0.1, 0.5)  # share of the patches masked in them
ibot_mask_exact = False          # True = DINOv3: exactly the top of each ratio bin

# ---- losses and teacher ----
centering = 'centering'          # 'centering' (DINO, DINOv2) | 'sinkhorn_knopp' (DINOv2 long runs, DINOv3)
student_temp = 0.1               # softmax temperature of the student
teacher_temp = 0.04              # final value, after warm-up; above 0.07 is unstable (dino help text)
warmup_teacher_temp = 0.04       # first value; lower it where the loss does not fall
warmup_teacher_temp_iterations = 500  # linear between the two
momentum_teacher = 0.996         # teacher = m * teacher + (1 - m) * student; 0.9 for runs of some hundred iterations
final_momentum_teacher = 1.0     # m rises to this with a cosine
koleo_loss_weight = 0.0          # spreads the CLS features of a batch (DINOv2, DINOv3: 0.1); needs 2 images per rank
gram_loss_weight = 0.0           # keeps the patch similarities of the global crops near an anchor's (DINOv3: 1.5 to 2)
gram_teacher = 'ema'             # the anchor: 'ema' = the teacher | 'start' = the weights at the start | 'snapshot'
gram_refresh_iterations = 0      # 'snapshot' becomes the teacher's copy every N iterations (DINOv3 10 000); 0 = never
gram_crops_size = 0              # the anchor sees larger undistorted crops (DINOv3: 1.5 to 2 times); 0 = the student's

# ---- optimizer ----
global_batch_size = 64           # images per step over all ranks; the batch per rank follows
gradient_accumulation_steps = 0  # micro-batches per step; 0 = as few as keep them below 65 images. Sinkhorn sees one
lr = 1e-4                        # peak, absolute. From scratch: DINO 5e-4 * batch/256, DINOv2 4e-3 * sqrt(batch/1024)
min_lr = 1e-5                    # the cosine ends here
warmup_iterations = 1000         # linear from 0 to lr
weight_decay = 0.04              # first value; not on biases, norms, layer scale
weight_decay_end = 0.4           # last value, by a cosine (0.2 in DINOv2 long runs)
adam_betas = (0.9, 0.999)        # DINOv3 7B: (0.9, 0.99)
schedule_reaches_end = False     # False = DINO, DINOv2: the cosine stops one step before its end; True = DINOv3
layerwise_decay = 1.0            # lr of block i times this ** (blocks - i): early blocks move less; DINOv2 0.9
patch_embed_lr_mult = 1.0        # of the patch embedding on top (DINOv2, DINOv3: 0.2)
clip_grad = 3.0                  # largest gradient norm; 0 = off
clip_grad_by = 'parameter'       # 'parameter' = every tensor (DINO) | 'module' = backbone, each head (DINOv2, DINOv3)
freeze_last_layer = 100          # iterations in which the prototypes stand still: helps the start (dino help text)
freeze_last_layer_by = 'grad'    # 'grad' = drop their gradient (DINO) | 'lr' = lr 0, moments run on (DINOv2, DINOv3)
freeze_backbone_iterations = -1  # it waits while random heads learn, then ramps up as long; -1 = 10 % if pretrained

# ---- system ----
distribution = 'ddp'             # processes of torchrun: 'ddp' | 'fsdp' = weights sharded, too | 'none' = only one
mixed_precision = 'bf16'         # 'bf16' | 'fp16' (CUDA) | 'no' = fp32
activation_checkpointing = False # recompute activations in backward: less memory, a third more time
compile = False                  # torch.compile the blocks: a minute at the start; on the CPUs we measured no gain
config_keys = list_keys(globals())


def check_config():
    """Ranges and pairs, all mistakes at once; raises UserError. Called before anything is read."""
    now, ranks, errors = globals(), world_size(), []
    share = global_batch_size // ranks

    def need(ok, message):
        if not ok:
            errors.append(message)
    for key, choices in (("centering", ("centering", "sinkhorn_knopp")), ("clip_grad_by", ("parameter", "module")),
                         ("freeze_last_layer_by", ("grad", "lr")), ("mixed_precision", ("bf16", "fp16", "no")),
                         ("distribution", ("ddp", "fsdp", "none")), ("on_bad_image", ("error", "skip")),
                         ("augmentation", ("auto", *PRESETS)), ("lora_targets", ("qv", "all")),
                         ("gram_teacher", ("ema", "start", "snapshot"))):
        need(now[key] in choices, f"{key}={now[key]!r}: choose one of {', '.join(choices)}")
    for key in ("max_iterations", "log_interval", "saveckp_freq", "global_batch_size", "global_crops_size",
                "local_crops_size", "dino_head_out_dim", "ibot_out_dim", "dataset_size", "teacher_temp",
                "warmup_teacher_temp", "student_temp"):
        need(now[key] > 0, f"{key}={now[key]}: must be above 0")
    for key in ("momentum_teacher", "final_momentum_teacher", "ibot_mask_sample_probability", "drop_path_rate",
                "horizontal_flip", "vertical_flip"):
        need(0 <= now[key] <= 1, f"{key}={now[key]}: must be in 0..1")
    for key in ("global_crops_scale", "local_crops_scale", "label_guided_crops_scale", "ibot_mask_ratio_min_max"):
        low, high = now[key]
        need(0 < low <= high <= 1, f"{key}={(low, high)}: needs 0 < low <= high <= 1")
    need(global_crops_number >= 2, f"global_crops_number={global_crops_number}: one view teaches the others; use 2")
    need(global_batch_size % ranks == 0, f"global_batch_size={global_batch_size} cannot be shared by {ranks} ranks; "
         f"use a multiple, like {math.ceil(global_batch_size / ranks) * ranks}")
    need(share % max(1, gradient_accumulation_steps) == 0, f"gradient_accumulation_steps={gradient_accumulation_steps} "
         f"does not divide the {share} images of a rank")
    need(ranks == 1 or distribution != "none", f"distribution='none' with {ranks} processes: use ddp, or start one")
    need(ibot_loss_weight == 0 or ibot_separate_head or ibot_out_dim == dino_head_out_dim,
         f"ibot_out_dim={ibot_out_dim}, dino_head_out_dim={dino_head_out_dim}: a shared head has one size; make them "
         "equal or set --ibot_separate_head=true")
    need(model_type not in FAMILIES or hidden_size % num_attention_heads == 0, f"hidden_size={hidden_size} is not a "
         f"multiple of num_attention_heads={num_attention_heads}")
    need(freeze_backbone_until == 0 or freeze_backbone_layers > 0, f"freeze_backbone_until={freeze_backbone_until} "
         "with freeze_backbone_layers=0: nothing is frozen that could thaw; set both")
    need(label_guided_loss_weight == 0 or label_guided_crops_number > 0, f"label_guided_loss_weight="
         f"{label_guided_loss_weight} with label_guided_crops_number=0: there is no guided crop; use 4")
    need(gram_refresh_iterations == 0 or gram_teacher == "snapshot", f"gram_refresh_iterations="
         f"{gram_refresh_iterations} with gram_teacher={gram_teacher!r}: only a 'snapshot' is refreshed")
    if errors:
        raise UserError("\n       ".join(errors))


# ---- the maths of one iteration, with this config; tests compare them with the reference trajectories ----

def make_targets(teacher_out, centers, teacher_temp):
    """Teacher logits -> what the student should say.

    Args: teacher_out: of Student.forward, its local crops the G guided ones; centers: {'dino': [1,K], 'ibot': [1,K]}.
    Returns dict: 'dino' [V,B,K], for guided crops 'guided' [G,B,K], for masks 'ibot' [M,K]; rows sum to 1, no gradient.
    """
    def to_probs(name, logits):
        if centering == "sinkhorn_knopp":
            return sinkhorn_knopp(logits, teacher_temp)
        return softmax_center(logits, centers[name], teacher_temp)
    targets = dict(dino=to_probs("dino", teacher_out["global_logits"]).unflatten(0, (global_crops_number, -1)))
    if "local_logits" in teacher_out:                          # Sinkhorn by itself: small crops use all prototypes, too
        guided = to_probs("dino", teacher_out["local_logits"])
        targets["guided"] = guided.unflatten(0, (label_guided_crops_number, -1))
    if "masked_logits" in teacher_out:
        targets["ibot"] = to_probs("ibot", teacher_out["masked_logits"])
    return targets


def compute_losses(student_out, targets, masks, teacher_patches=None):
    """(total, terms): total is exactly the weighted sum of the logged terms.

    The DINO loss is the mean over all pairs of a teacher crop and another student crop. It is shown in two parts, each
    the mean over its pairs times their share of all pairs: V * (V - 1) pairs of global crops, V * L with a local crop
    (DINOv2 and DINOv3; together the same as DINO's). koleo is the sum over the global crops, as in DINOv2.

    label_guided is the mean over all pairs of a teacher's guided crop and a student's global crop, plus that over pairs
    of two guided crops; it is not in the paper. DINO's targets are what the teacher says of global crops, so a guided
    crop that only the student sees never asks that a global crop show the lesion. Here it has to: to say what is at the
    label, find the label.
    """
    V = global_crops_number
    global_logits = student_out["global_logits"].unflatten(0, (V, -1))                     # [V,B,K]
    L = len(student_out.get("local_logits", ())) // global_logits.shape[1]
    n_global, n_local = V * (V - 1), V * L
    zero = global_logits.new_zeros((), dtype=torch.float32)
    terms = dict(dino_local_loss=zero, label_guided_loss=zero, ibot_loss=zero, koleo_loss=zero, gram_loss=zero)
    terms["dino_global_loss"] = n_global / (n_global + n_local) * dino_loss(
        global_logits, targets["dino"], student_temp)                                      # [V,B,K] against [V,B,K]
    if L > 0:
        local_logits = student_out["local_logits"].unflatten(0, (L, -1))                   # [L,B,K], guided crops last
        terms["dino_local_loss"] = n_local / (n_global + n_local) * dino_loss(
            local_logits, targets["dino"], student_temp, ignore_diagonal=False)
    if label_guided_loss_weight > 0:
        terms["label_guided_loss"] = dino_loss(global_logits, targets["guided"], student_temp,
                                               ignore_diagonal=False)                      # [V,B,K] against [G,B,K]
        if label_guided_crops_number > 1:
            terms["label_guided_loss"] += dino_loss(local_logits[-label_guided_crops_number:], targets["guided"],
                                                    student_temp)                          # [G,B,K] against [G,B,K]
    if ibot_loss_weight > 0:
        terms["ibot_loss"] = ibot_loss(student_out["masked_logits"], targets["ibot"], masks, student_temp)
    if koleo_loss_weight > 0:              # before the head, each view by itself: views of an image may be near
        terms["koleo_loss"] = sum(koleo_loss(cls) for cls in student_out["global_cls"].chunk(V))
    if gram_loss_weight > 0:
        terms["gram_loss"] = gram_loss(student_out["patches"], teacher_patches)
    total = dino_head_loss_weight * (dino_local_loss_weight * terms["dino_local_loss"] + terms["dino_global_loss"]) \
        + ibot_loss_weight * terms["ibot_loss"] + koleo_loss_weight * terms["koleo_loss"] \
        + gram_loss_weight * terms["gram_loss"] + label_guided_loss_weight * terms["label_guided_loss"]
    return total, terms


def log_line(record, run_device):
    """The paper's log line (section 2.1.3), each loss beside its value for a student that knows nothing: ln K times
    the share of its pairs, or of the masked crops."""
    V, L = global_crops_number, local_crops_number + label_guided_crops_number
    share = L / (V - 1 + L)
    line = ""
    for name, key, chance in (("Local DINO", "dino_local_loss", share * math.log(dino_head_out_dim)),
                              ("Global DINO", "dino_global_loss", (1 - share) * math.log(dino_head_out_dim)),
                              ("iBOT", "ibot_loss", ibot_mask_sample_probability * math.log(ibot_out_dim))):
        if key != "ibot_loss" or ibot_loss_weight > 0:
            line += f"{name}: {record[key]:.4f} (ln K: {chance:.4f}) "
        else:
            line += f"{name}: off "
    if label_guided_loss_weight > 0:
        chance = min(2, label_guided_crops_number) * math.log(dino_head_out_dim)
        line += f"Guided: {record['label_guided_loss']:.4f} (ln K: {chance:.4f}) "
    line += f"KoLeo: {record['koleo_loss']:.4f} " if koleo_loss_weight > 0 else ""
    line += f"Gram: {record['gram_loss']:.4f} " if gram_loss_weight > 0 else ""
    return (f"Total Loss: {record['loss']:.4f} {line}LR: {record['lr']:.6f} Weight Decay: {record['weight_decay']:.6f} "
            f"Teacher momentum: {record['momentum_teacher']:.6f} Current Batch Size: {global_batch_size} "
            f"Iteration: {record['iteration']}/{max_iterations} Device: {run_device} "
            f"Memory: {record['memory_gb']:.2f}/{memory_gb(run_device)[1]:.2f} GB "
            f"Trainable: {record['trainable_m']:.2f}/{record['total_m']:.2f} M | "
            f"entropy {record['teacher_entropy']:.2f} prototypes {record['prototype_use']:.0%} "
            f"RankMe {record['rankme']:.1f}")


def main(sources):
    """Train with the config in this module's globals; sources: from configurator.override, for the printed config."""
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

    # ---- data ----
    def open_split(split):
        return load_dataset(dataset_path, split, dataset_size, cache_dir, download_url, num_channels, seed)

    with main_first():                                         # one process per machine downloads and unpacks
        train_set = open_split("train")
        labelled = train_set.labels is not None and train_set.labels.ndim == 1
        wanted = [eval_split] + ["test"] * (eval_split != "test" and "test" in train_set.splits) if labelled else []
        measured = {split: open_split(split) for split in wanted}
    channels = train_set.num_channels
    if label_guided_crops_number and train_set.masks is None:
        raise UserError(f"label_guided_crops_number={label_guided_crops_number}, but {dataset_path!r} has no masks; "
                        "set it to 0")
    if label_guided_crops_number:
        some = [train_set.masks[i] for i in range(0, len(train_set), math.ceil(len(train_set) / 100))]
        n_labelled = sum(mask is not None and is_labelled(mask, label_guided_classes).any() for mask in some)
        say(f"label-guided crops: {n_labelled} of {len(some)} masks looked at show "
            f"{label_guided_classes or 'a label'}; images without get random crops")
    expected = pretrained_input(model_type) if use_pretrained else {}
    value_range, mean, std, stats_from = input_settings(train_set, expected, intensity_range, image_mean, image_std,
                                                        seed, on_bad_image)
    why_not = "no labels" if train_set.labels is None else "several labels per image"
    say(f"data: {dataset_path}, {len(train_set)} train images, {channels} channel(s), "
        f"{getattr(train_set.images, 'dtype', 'image files')}; "
        + (", ".join(f"{len(data)} {split}" for split, data in measured.items()) or f"no k-NN: {why_not}")
        + f"\n      intensities {value_range} -> 0..1, mean {mean}, std {std} "
        f"({stats_from})")

    # ---- student and teacher ----
    torch.manual_seed(seed)                                    # the same initial weights on every rank
    with built_by_main(distribution) as holds_values:
        backbone = backbone_from_config(config, channels)
        family, patch, width = backbone.config.model_type, backbone.config.patch_size, backbone.config.hidden_size
        inflated = getattr(backbone, "patch_embed_inflated", False)
        if run_device.type == "cpu":
            backbone.set_attn_implementation("plain")          # model.plain_attention: torch's is slow backward on CPUs
        for key, size in (("global_crops_size", global_crops_size), ("local_crops_size", local_crops_size),
                          ("gram_crops_size", gram_crops_size)):
            if size % patch:
                raise UserError(f"{key}={size} is not a multiple of patch_size={patch} of {model_type}; use "
                                f"{size // patch * patch or patch} or {(size // patch + 1) * patch}")
        if drop_path_rate > 0 and not hasattr(backbone.config, "drop_path_rate"):
            say(f"note: {family} has no stochastic depth in transformers; drop_path_rate={drop_path_rate} has no "
                "effect")
        if ibot_loss_weight == 0:                              # never used: DDP would wait for its gradient
            for name, param in backbone.named_parameters():
                if "mask_token" in name:
                    param.requires_grad_(False)
        if use_lora:                                           # none in blocks that stay frozen: they would not move
            backbone = add_lora(backbone, lora_r, lora_alpha, lora_dropout, lora_targets,
                                skip_blocks=0 if freeze_backbone_until else freeze_backbone_layers)
        if freeze_backbone_until == 0:
            freeze_layers(backbone, freeze_backbone_layers)
        if activation_checkpointing:
            backbone.activation_checkpointing_enable({"use_reentrant": False})
        head = dict(hidden_dim=head_hidden_dim, bottleneck_dim=head_bottleneck_dim, weight_norm=head_weight_norm)
        dino_head = DINOHead(width, dino_head_out_dim, norm_last_layer=dino_head_norm_last_layer, **head)
        ibot_head = None
        if ibot_loss_weight > 0 and ibot_separate_head:
            ibot_head = DINOHead(width, ibot_out_dim, norm_last_layer=ibot_norm_last_layer, **head)
        student = Student(backbone, dino_head, ibot_head)
        if state:
            check_fits(state, student, config)
            if holds_values:
                student.load_state_dict(state["student"])
    student = place(student, blocks(backbone), distribution, run_device).train()
    centers = dict(dino=torch.zeros(1, dino_head_out_dim, device=run_device),
                   ibot=torch.zeros(1, ibot_out_dim, device=run_device))

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
    if freeze_backbone_until:
        freeze_layers(backbone, freeze_backbone_layers)
        begins.update({name: max(begins[name], freeze_backbone_until) for name, param in student.named_parameters()
                       if name in begins and not param.requires_grad})
    optimizer = torch.optim.AdamW(groups, betas=adam_betas, fused=True)
    if mixed_precision == "fp16" and run_device.type != "cuda":
        raise UserError(f"mixed_precision='fp16' on {run_device.type}: only CUDA has fast fp16; use bf16")
    scaler = torch.amp.GradScaler(run_device.type, enabled=mixed_precision == "fp16")
    iteration, knn = 0, {}                                     # finished iterations; k-NN: start, best, best_iteration
    if state:
        load_optimizer(optimizer, state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        centers = {name: value.to(run_device) for name, value in state["centers"].items()}
        iteration, knn = state["iteration"], state["knn"]
        if iteration >= max_iterations:
            raise UserError(f"resume_from={resume!r} has finished {iteration} iterations; raise "
                            f"max_iterations={max_iterations} to go on")
    set_trainable(student, begins, iteration)
    teacher = EMATeacher(student)                              # before DDP: parameter names without its prefix
    anchor = EMATeacher(student, part="backbone.") if gram_loss_weight > 0 and gram_teacher != "ema" else None
    for name, values in (("teacher", teacher), ("anchor", anchor)):
        if state and values:           # `|`: by a changed config the checkpoint may have none: then where it stands
            values.load_state_dict(values.state_dict() | (state.get(name) or {}))
    state = None                       # every tensor of it, whole, would stay in memory on every rank
    if compile:                        # by block: all share their graphs, one for each crop size, mode and place
        torch._dynamo.config.recompile_limit = 64              # at 8 it would go on without compiling
        for block in blocks(backbone):
            block.compile()

    def ready(module):
        """(the student for the iterations to come, number of blocks that the global crops pass once for both)."""
        n_prefix, count = shared_blocks(module, teacher) if ibot_loss_weight == 0 else 0, parameter_counts(module)
        say(f"model: {model_type} ({family}, {'pretrained' if use_pretrained else 'from scratch'}), width {width}, "
            f"patch {patch}; from iteration {iteration} on trainable {count['trainable_m']:.2f} M of "
            f"{count['total_m']:.2f} M parameters, heads included; first {frozen_blocks(backbone)} of "
            f"{len(blocks(backbone))} blocks frozen, {n_prefix} computed once for student and teacher")
        return wrap(module, distribution, run_device), n_prefix
    student, n_prefix = ready(student)

    # ---- loader ----
    micro_batches = accumulation_steps(global_batch_size, gradient_accumulation_steps)
    batch_size = global_batch_size // world_size() // micro_batches
    L = local_crops_number + label_guided_crops_number
    if koleo_loss_weight > 0 and batch_size < 2:
        raise UserError(f"koleo_loss_weight={koleo_loss_weight} needs 2 images per rank and micro-batch, there is "
                        f"{batch_size}; raise global_batch_size")
    crop = MultiCrop(global_crops_size, global_crops_scale, global_crops_number, local_crops_size, local_crops_scale,
                     local_crops_number, label_guided_crops_number, label_guided_crops_scale, horizontal_flip,
                     vertical_flip, gram_crops_size if gram_loss_weight > 0 else 0, label_guided_classes)
    mask_settings = dict(sample_probability=ibot_mask_sample_probability, ratio_min_max=ibot_mask_ratio_min_max,
                         exact=ibot_mask_exact) if ibot_loss_weight > 0 else None
    crop_set = CropDataset(train_set, crop, seed, global_batch_size, global_crops_size // patch, mask_settings,
                           on_bad_image)
    order = BatchOrder(len(train_set), global_batch_size, micro_batches, rank(), world_size(), iteration,
                       max_iterations, seed, shuffle)
    workers = loader_workers(num_workers)
    loader = DataLoader(crop_set, batch_sampler=order, collate_fn=crop_set.collate, num_workers=workers,
                        pin_memory=run_device.type == "cuda", worker_init_fn=ignore_ctrl_c)
    preset = augmentation if augmentation != "auto" else "rgb" if channels == 3 else "medical"
    photometrics = Photometrics(preset, value_range, mean, std, window_jitter, blur_probability)
    say(f"batch: {global_batch_size} images = {world_size()} rank(s) x {micro_batches} micro-batch(es) x {batch_size}; "
        f"{preset} augmentation; {len(train_set) / global_batch_size:.1f} iterations an epoch; {workers} loader "
        "worker(s) per rank")

    # ---- all input is good: the run's folder, k-NN, checkpoints ----
    jsonl = f"{run_dir}/log.jsonl"
    if is_main():
        if moved := open_run(run_dir, resume, dump(globals(), config_keys)):
            print(f"{run_dir} held an earlier run: moved to {moved} (to continue a run: --resume_from)")
        truncate_log(jsonl, iteration)
    barrier()
    run_is_open = True
    stop_signals, handlers = [], {}
    for number in (signal.SIGTERM, signal.SIGINT):             # preemption, Ctrl-C: finish the step, save, exit 0
        handlers[number] = signal.signal(number, lambda number, _: stop_signals.append(number))
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

    def teacher_knn(queries):
        with teacher.teacher_weights(student) as network:
            return knn_accuracy(network.backbone, bank, queries, size=global_crops_size, **eval_settings)

    def record_eval(accuracy):
        """Tell a k-NN measurement; True where it is the best so far."""
        knn.setdefault("start", accuracy)
        best = accuracy > knn.get("best", -1.0)
        if best:
            knn.update(best=accuracy, best_iteration=iteration)
        say(f"k-NN (k=5, {eval_split}) at iteration {iteration}: {accuracy:.4f}   start {knn['start']:.4f}, "
            f"best {knn['best']:.4f} at {knn['best_iteration']}")
        if accuracy < knn["start"] - 0.01:
            say(f"!!!! BELOW THE START by {knn['start'] - accuracy:.4f}: training harms these features. Lower lr, "
                "longer freeze_backbone_iterations, or use_lora; checkpoints/best keeps the best teacher. !!!!")
        return best

    def save(best=False, keep=False, done=False):
        last, weights = f"{run_dir}/checkpoints/last", None
        snapshot = full(dict(iteration=iteration, config=config, student=unwrap(student).state_dict(),
                             teacher=teacher.state_dict(), anchor=anchor and anchor.state_dict(),
                             optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), centers=centers, knn=knn))
        if best or done:
            with teacher.teacher_weights(student) as network:
                weights = full(network.backbone.state_dict())

        def write():
            save_state(last, snapshot)
            for folder in [f"{iteration:07d}"] * keep + ["best"] * best:
                link_state(last, f"{run_dir}/checkpoints/{folder}")
            card = model_card(model_name, iteration, knn, config, dump(globals(), config_keys))
            for folder in ["best"] * best + ["last"] * done:   # the finished run's last teacher beside its best
                export_hf(f"{run_dir}/checkpoints/{folder}/hf", backbone, global_crops_size, value_range, mean, std,
                          card, weights)
        main_writes(write)

    if measured and iteration == 0 and not knn:
        knn["pixels"] = knn_accuracy(None, bank, measured, size=min(32, global_crops_size), **eval_settings)
        knn["untrained"] = teacher_knn(measured)
        say("raw pixels, k-NN (k=5): " + ", ".join(f"{split} {value:.4f}" for split, value in knn["pixels"].items()))
        record_eval(knn["untrained"][eval_split])
        write_log(dict(iteration=0, knn_accuracy=knn["start"]))
        save(best=True)                                        # if training only harms, best stays where it started

    # ---- the loop ----
    bad_images, batches = set(), iter(loader)
    began = last_time = time.time()
    began_at = last_logged = iteration
    while iteration < max_iterations:
        torch.manual_seed(hash((seed, iteration, rank())) % 2**63)   # dropout and drop path repeat on resume, too
        lr_now = cosine_schedule(lr, min_lr, iteration, max_iterations, warmup_iterations,
                                 reach_end=schedule_reaches_end)
        weight_decay_now = cosine_schedule(weight_decay, weight_decay_end, iteration, max_iterations,
                                           reach_end=schedule_reaches_end)
        momentum_now = cosine_schedule(momentum_teacher, final_momentum_teacher, iteration, max_iterations,
                                       reach_end=schedule_reaches_end)
        teacher_temp_now = linear_schedule(warmup_teacher_temp, teacher_temp, iteration, warmup_teacher_temp_iterations)
        frozen_last = iteration < freeze_last_layer
        backbone_factor = 1.0 if waiting == 0 else min(1.0, max(0.0, (iteration - waiting + 1) / waiting))
        set_learning_rates(optimizer, lr_now, 0.0 if frozen_last and freeze_last_layer_by == "lr" else lr_now,
                           weight_decay_now, backbone_factor)
        logged, indices, row_sums = {}, [], {}

        for micro in range(micro_batches):
            batch = next(batches)
            stop, failed = any_rank(micro == 0 and stop_signals, "error" in batch)       # one message for both
            if failed:
                stop_together(batch.get("error"))
            if stop:
                break
            indices += batch["index"]
            bad_images.update(batch["bad"])

            # Step 1. Photometrics, on the device; global crop 1 and the others differ (DINO)
            native, seeds = batch["global_crops"].to(run_device, non_blocking=True), batch["global_seeds"]
            global_crops = torch.cat([photometrics(native[:batch_size], seeds[:batch_size], "global1"),
                                      photometrics(native[batch_size:], seeds[batch_size:], "global2")])   # [V*B,C,S,S]
            local_crops = guided_crops = masks = None
            if L > 0:
                native = batch["local_crops"].to(run_device, non_blocking=True)
                local_crops = photometrics(native, batch["local_seeds"], "local")          # [L*B,C,s,s]
            if label_guided_loss_weight > 0:
                guided_crops = local_crops[-label_guided_crops_number * batch_size:]       # [G*B,C,s,s], the last ones
            if ibot_loss_weight > 0:
                masks = batch["masks"].to(run_device, non_blocking=True)                   # [V*B,P]
            if iteration == 0 and micro == 0 and generate_samples and is_main():
                labels = crop_set.label_crops(batch["index"]) if label_guided_crops_number else None
                save_samples(f"{run_dir}/samples/crops.png", global_crops, local_crops, masks, batch_size, photometrics,
                             labels=labels, n_guided=label_guided_crops_number)

            # Step 2. The teacher sees the global crops, unmasked, and the guided ones if asked; it makes the targets
            with teacher.teacher_weights(student) as network, autocast():
                teacher_out = network(global_crops, guided_crops, masks, apply_masks=False, n_prefix=n_prefix)
            targets = make_targets(teacher_out, centers, teacher_temp_now)
            for name, key in (("dino", "global_logits"), ("ibot", "masked_logits")):
                if key in teacher_out and centering == "centering":
                    row_sums[name] = row_sums.get(name, 0) + sum_rows(teacher_out[key])

            gram_patches = teacher_out["patches"]
            if "gram_crops" in batch or anchor:                # the Gram anchor: patches only, no heads
                with (anchor or teacher).teacher_weights(student) as network, autocast():
                    gram_patches = forward_features(network.backbone, photometrics.plain(
                        batch["gram_crops"].to(run_device)) if "gram_crops" in batch else global_crops)[1]

            # Step 3. The student sees everything, masked where iBOT asks
            with autocast():
                student_out = student(global_crops, local_crops, masks, prefix=teacher_out.get("prefix"))
            total, terms = compute_losses(student_out, targets, masks, gram_patches)
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
                            "neither weights nor teacher were touched, checkpoints/last is good. Try a lower lr or "
                            f"clip_grad, or mixed_precision=no. Its images: {sum(gather_objects(indices), [])}")

        # Step 5. Clip, step, move the teacher and the centres
        scaler.unscale_(optimizer)
        grad_norm = clip_gradients(unwrap(student), clip_grad, clip_grad_by)
        if frozen_last and freeze_last_layer_by == "grad":
            for group in optimizer.param_groups:
                for param in group["params"] if group["is_last_layer"] else ():
                    param.grad = None
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        teacher.update(student, momentum_now)
        for name, row_sum in row_sums.items():                 # a step uses the centres of the steps before
            centers[name] = move_center(centers[name], row_sum)
        iteration += 1
        if anchor and gram_refresh_iterations and iteration % gram_refresh_iterations == 0:
            anchor.load_state_dict({name: teacher.values[name] for name in anchor.values})

        # Step 6. Log, measure, save; `iteration` now counts the finished ones
        done, record, best, now = iteration == max_iterations, None, False, time.time()
        if iteration % log_interval == 0 or done or iteration == began_at + 1:
            seconds = (now - last_time) / (iteration - last_logged)
            record = dict(iteration=iteration, **logged, lr=lr_now, weight_decay=weight_decay_now,
                          momentum_teacher=momentum_now, teacher_temp=teacher_temp_now, batch_size=global_batch_size,
                          grad_norm=float(grad_norm), images_per_second=global_batch_size / seconds,
                          memory_gb=memory_gb(run_device)[0], **parameter_counts(student),
                          **monitor(teacher_out["global_cls"], targets["dino"].flatten(0, 1)))
            left = int((max_iterations - iteration) * (now - began) / (iteration - began_at))
            say(f"{log_line(record, run_device)} | {seconds:.2f} s/it, {left // 60}:{left % 60:02d} left")
            if advice := diagnose(record, dino_head_out_dim, early=iteration < max(50, max_iterations // 5)):
                say(f"!!!! {advice} !!!!")
            last_logged = iteration
        if measured and (done or (eval_interval > 0 and iteration % eval_interval == 0)):
            accuracy = teacher_knn({eval_split: measured[eval_split]})[eval_split]
            best = record_eval(accuracy)
            record = dict(record or dict(iteration=iteration), knn_accuracy=accuracy)
        if record:
            write_log(record)
            last_time = time.time() if last_logged == iteration else last_time + time.time() - now
        if set_trainable(unwrap(student), begins, iteration):  # the backbone or frozen layers begin to learn
            teacher.take_in(student)
            if anchor:
                anchor.take_in(student)
            student, n_prefix = ready(unwrap(student))
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
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        start = f"torchrun --nnodes={world_size() // local} --nproc_per_node={local}" if world_size() > 1 else "python"
        say(f"stopped by a signal after iteration {iteration}, saved. To go on:\n"
            f"  {start} train.py {run_dir}/config.py --resume_from={run_dir}")
        return cleanup()
    final, minutes = teacher_knn(measured), (time.time() - began) / 60
    if is_main():
        with open(f"{run_dir}/results/summary.json", "w") as file:
            json.dump(dict(knn, final=final, iterations=iteration, minutes=minutes, loss=logged["loss"]), file)
        learned = f"no labels to measure with, RankMe {record['rankme']:.1f}"
        if measured:
            learned = "5-NN accuracy of the teacher's CLS, start -> end: " + ", ".join(
                f"{split} {knn['untrained'][split]:.3f} -> {value:.3f} (raw pixels {knn['pixels'][split]:.3f})"
                for split, value in final.items()) + f", best {eval_split} {knn['best']:.3f} at {knn['best_iteration']}"
        best_hf = f"{run_dir}/checkpoints/best/hf"
        say(f"\nDone: {iteration} iterations in {minutes:.1f} min; {learned}. Everything is in {run_dir}: look at "
            f"samples/crops.png and log.jsonl, use the features with AutoModel.from_pretrained('{best_hf}'), or train "
            f"on from there with --model_type={best_hf}.")
    cleanup()


if __name__ == "__main__":
    with one_line_errors(), lost_ranks():
        main(override(globals(), config_keys, sys.argv[1:]))
