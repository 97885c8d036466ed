"""Distillation: a big frozen teacher into a small student, without labels (paper section 2.2.2).

    python distill.py config/distill_small.py --dataset_path=my_images/ \\
        --distilled_model_type=facebook/dinov2-small
    torchrun --standalone --nproc_per_node=4 distill.py config/distill_pathmnist.py
    python distill.py --help                            # every key and every config file

The teacher is any Hugging Face ViT, or with 'timm:' any timm ViT (teachers.py). It never changes
and may differ from the student in everything: both see the same augmented crop, each in its own
size and normalisation. The run exports the student's EMA, the paper's "student shadow", into a
folder like that of train.py.

objective='feature': linear projections of the student's CLS and patch tokens match the teacher's
tokens of the same crop, standardised and, if asked, whitened. 'prototype': the paper's
cross-entropy. The teacher's side is the similarity of its CLS token to fixed prototypes (k-means
centroids of its own features), the student's side is its DINO head's output for another crop.
"""
from types import SimpleNamespace

from configurator import UserError, describe, list_keys, one_line_errors, read_command_line

# ==== config: train.py says what the shared keys mean. Durations are in iterations
# ---- run ----
model_name = 'distill'           # name of the run; '' = that of the data set
out_dir = ''                     # folder of the run; '' = out/{model_name}
seed = 0                         # of weights, data order, crops, masks; an equal seed repeats a run
device = 'auto'                  # 'auto' | 'cpu' | 'cuda' | 'cuda:1'
resume_from = ''                 # a run or a checkpoint of it | 'auto' = out_dir, if it has one
max_iterations = 2000            # length of the run; paper: 2000
log_interval = 10                # iterations between log lines
eval_interval = 250              # iterations between k-NN measurements; 0 = only at start and end
saveckp_freq = 250               # iterations between checkpoints that are kept
generate_samples = True          # draw samples/: the first batch; at checkpoints, the attention
wandb_log = False                # log to Weights & Biases, too (pip install wandb)

# ---- data ----
dataset_path = 'pathmnist'       # 'phantom' | a MedMNIST name | a .npz file | a folder of images
dataset_size = 224               # pixels: of MedMNIST 28 | 64 | 128 | 224; of the phantom any size
cache_dir = ''                   # downloads and unpacked arrays; '' = ~/.cache/dino-mx
download_url = ''                # a mirror of the MedMNIST files; '' = their own host
shuffle = True                   # a new order every epoch; False = file order
series = ''                      # of DICOM: modality or part of a description, as 'CT'; '' = all
volume_axis = -1                 # of 3-D arrays and NIfTI: axis of the slices; -1 = by their shape
volume_index = -1                # of 4-D NIfTI: the volume that is read; -1 = they are left out
slice_step_mm = 0.0              # least distance of the slices that are read; 0 = all slices
group_level = 0                  # the n-th folder below a split is the patient; 0 = by names, DICOM
max_image_pixels = 0             # pixels that a picture may have; 0 = the limit of Pillow, 89e6
num_channels = 0                 # channels the images must have; 0 = any. Grey stays one channel
intensity_range = (0.0, 0.0)     # pixel values mapped to 0..1, as (-160, 240) HU; (0, 0) = measured
intensity_scaling = 'set'        # 'set' = one range | 'image' = percentiles of each | 'dtype'
image_mean = ()                  # per channel, of pixels in 0..1; () = of the weights, or measured
image_std = ()                   # like image_mean
on_bad_image = 'error'           # 'error' = stop and name it | 'skip' = use its neighbour, list it
num_workers = -1                 # loader processes per rank; -1 = the cores less one, up to 8
eval_split = 'val'               # k-NN classifies this split by train; it also chooses `best`
eval_max_images = 10000          # k-NN uses at most so many images of a split, by seed; 0 = all

# ---- crops ----
augmentation = 'auto'            # 'rgb' | 'medical' (paper Table 3) | 'auto' = rgb for 3 channels
global_crops_number = 2          # views for teacher and student; all recipes use 2
global_crops_size = 224          # pixels; a multiple of the patch size
global_crops_scale = (0.4, 1.0)  # share of the image area; DINOv2: (0.32, 1)
local_crops_number = 0           # for the prototype objective only, see train.py; paper: 8
local_crops_size = 96            # pixels; a multiple of the patch size, as 98 of 14, or made one
local_crops_scale = (0.1, 0.4)   # paper Listing 6; DINO: from 0.05 to where the global scale begins
min_foreground = 0.0             # least share of pixels above the window's lower end; CT: 0.25
horizontal_flip = 0.5            # probability; 0 if left and right must not be confused
vertical_flip = 0.5              # probability; paper Table 3: both ways, DINO: horizontally only
blur_probability = (1.0, 0.1, 0.5)  # global crop 1, 2, local; DINOv2's code does (0, 0.9, 0.5)
window_jitter = 0.0              # CT: shift both ends of intensity_range by up to this share; 0.1
fixed_views = 0                  # crop an image in so many ways, by turns; 0 = anew every time

# ---- teacher ----
distilled_model_type = 'facebook/dinov2-large'  # hub id | directory | timm:NAME
distilled_model_weights = ''     # its .safetensors or .pt file; '' = the released weights
load_from_disk = False           # True = ask no hub: a directory, or timm:NAME with its weights
distilled_crops_size = 0         # pixels at which it sees a global crop; 0 = its own, often 224
distilled_statistics_views = 4000  # measure its mean, std and prototypes on so many views
teacher_cache = ''               # folder that keeps its features of the fixed_views, in fp16

# ---- student ----
model_type = 'facebook/dino-vits16'  # a hub id | a directory | a family: model.FAMILIES
use_pretrained = True            # False = random weights, shaped as model_type or as the next keys
hidden_size = 384                # from scratch: width
num_hidden_layers = 12           # from scratch: number of blocks
num_attention_heads = 6          # from scratch: must divide hidden_size
patch_size = 16                  # from scratch: pixels
num_register_tokens = 4          # from scratch: dinov2_with_registers and dinov3_vit only
backbone_config = {}             # from scratch: other keys of the HF config, as {'mlp_ratio': 2}
drop_path_rate = 0.0             # stochastic depth of the student; not in family vit; DINOv2: 0.3
pos_embed_rescale = 0.0          # DINOv3: scale positions at random, up to this (7B: 2.0); 0 = off
freeze_backbone_layers = 0       # freeze the embeddings and the first N blocks (paper 2.2.1)
train_last_blocks = 0            # train the last N blocks and the final norm only; 0 = all blocks
train_only = 'all'               # 'all' | 'attention_output' = projections after attention (APLA)
use_lora = False                 # train low-rank adapters, not the weights (paper section 2.2.3)
lora_targets = 'qv'              # 'qv' (paper) | 'all' = MLP, too | names like 'q_proj,fc1'
lora_r = 4                       # rank of the adapters
lora_alpha = 16                  # adapters are scaled by alpha / r
lora_rslora = False              # scale them by alpha / sqrt(r), which suits high ranks
lora_dropout = 0.1               # dropout on the adapters' input

# ---- objective ----
objective = 'feature'            # 'feature' | 'prototype' (the paper's loss) | 'both'
feature_loss_kind = 'cosine'     # 'cosine' | 'smooth_l1', of projected to standardised tokens
feature_whitening = 0.0          # of the teacher's CLS: 0 = large components rule, 1 = all equal
feature_cls_weight = 1.0         # weight of the feature loss of the CLS token
feature_patch_weight = 1.0       # weight of the feature loss of the patch tokens; 0 = CLS only
prototype_loss_weight = 1.0      # weight of the prototype loss, local + global
dino_head_out_dim = 512          # prototypes K, measured on distilled_statistics_views * V crops
dino_head_norm_last_layer = False  # fix the prototypes' length at 1: steadier for large ViTs (dino)
head_hidden_dim = 2048           # width of both heads
head_bottleneck_dim = 256        # input width of the prototypes; DINOv2 long runs: 384
centering = 'centering'          # 'centering' (DINO, DINOv2) | 'sinkhorn_knopp' (DINOv3)
student_temp = 0.1               # softmax temperature of the student
teacher_temp = 0.07              # of the teacher; its cosines to prototypes differ by some tenths
momentum_teacher = 0.996         # ema = m * ema + (1 - m) * student; short runs 0.9 to 0.98
final_momentum_teacher = 1.0     # m rises to this by a cosine

# ---- optimizer ----
global_batch_size = 64           # images per optimizer step, over all ranks
gradient_accumulation_steps = 0  # micro-batches per step; 0 = so that each has at most 64 images
lr = 1e-4                        # peak, absolute. From scratch: DINO 5e-4 * batch / 256
min_lr = 1e-5                    # the cosine ends here
warmup_iterations = 100          # the rate rises from 0 to lr in a straight line
weight_decay = 0.04              # at iteration 0; biases, norms and layer scale have none
weight_decay_end = 0.4           # at the end, by a cosine; DINOv2 long runs: 0.2
adam_betas = (0.9, 0.999)        # of AdamW; DINOv3 7B: (0.9, 0.99)
layerwise_decay = 1.0            # rate of block i times this ** (blocks - i); DINOv2: 0.9
patch_embed_lr_mult = 1.0        # factor on the rate of the patch embedding; DINOv2, DINOv3: 0.2
head_lr_mult = 1.0               # factor on the rate of the heads; 10 if the run is short
clip_grad = 3.0                  # largest gradient norm; 0 = off
clip_grad_by = 'parameter'       # 'parameter' (DINO) | 'module' = backbone, each head (DINOv2, v3)
freeze_backbone_iterations = -1  # train only the heads for so many, then raise the backbone's rate
#                                from 0 over as many; -1 = a tenth of the run if pretrained, else 0

# ---- system ----
distribution = 'ddp'             # processes of torchrun: 'ddp' | 'fsdp' = sharded weights | 'none'
mixed_precision = 'bf16'         # 'bf16' | 'fp16' (CUDA) | 'no' = fp32
activation_checkpointing = False  # recompute activations in backward: less memory, more time
compile = False                  # torch.compile the blocks: a minute at the start
config_keys = list_keys(globals())
if __name__ == "__main__":  # before the imports that take seconds: --help and a typo answer at once
    sources = read_command_line(globals(), config_keys)

import math
import time
from collections import Counter

import torch
from torch import nn

from augment import MultiCrop, Photometrics, augmentation_values, choose_preset
from candidates import hand_back
from checkpoint import check_fits
from checks import Checks
from data import READING
from distributed import (accumulation_steps, autocast_for, built_by_main, cleanup, compute_dtype,
                         describe_memory, is_main, lost_ranks, main_first, memory_gb,
                         move_or_shard, no_sync, precision_notes, quick_exit, setup,
                         stop_together, unwrap, world_size, wrap)
from features import KnnMeasure
from loader import (CropDataset, check_scaling, describe_batches, describe_data, input_settings,
                    make_loader, open_splits)
from losses import dino_loss, feature_loss, resize_grid, sinkhorn_knopp, softmax_center
from metrics import monitor, rankme
from model import (DINOHead, EMATeacher, Student, adapted_backbone, blocks, compile_blocks,
                   describe_student, parameter_counts, set_trainable)
from optim import (build_optimizer, clip_gradients, cosine_schedule, set_learning_rates,
                   warmup_factor)
from pictures import save_samples
from run import Run, State, gradient_scaler, restore, seed_iteration, whole_run
from samples import AttentionSamples
from signals import end_by
from teachers import FeatureCache, FeatureStatistics, build_teacher, check_same_teacher
from verdict import LabelFree
from weights import FAMILIES, pretrained_input


def check_config(config, changed=()):
    """Check what depends on several keys: UserError with all mistakes at once. Returns notes on
    what has no effect. changed: keys that differ from their default."""
    check = Checks(config)
    check.training(world_size(), FAMILIES, changed)
    check.need(objective == "feature" or global_crops_number + local_crops_number >= 2,
               f"global_crops_number={global_crops_number}, local_crops_number="
               f"{local_crops_number} with objective={objective!r}: the student learns from "
               "another view; use two at least")
    check.need(objective != "feature" or local_crops_number == 0, f"local_crops_number="
               f"{local_crops_number} with objective='feature': the teacher does not see them; "
               "set 0, or use prototypes")
    check.need(objective == "prototype" or feature_cls_weight > 0, f"feature_cls_weight="
               f"{feature_cls_weight}: the CLS token would not learn; a positive number")
    check.need(objective == "feature" or prototype_loss_weight > 0,
               "prototype_loss_weight=0: the head would not learn; a positive number, or "
               "objective='feature'")
    check.need(not teacher_cache or fixed_views > 0,
               f"teacher_cache={teacher_cache!r} with fixed_views=0: views that never come back "
               "need no cache; set fixed_views, like 8")
    return check.report()


# ---- the maths of one iteration ----

def make_targets(statistics, cls, patches, config):
    """Turn the teacher's tokens of the global crops into what the student has to predict.

    Args: statistics: a teachers.FeatureStatistics; cls [V*B,D], patches [V*B,P,E] or None, on the
    student's grid. Returns dict: for the feature objective cls and patches, standardised; for the
    prototype objective probs [V,B,K], every row sums to 1.
    """
    targets = {}
    if config.objective != "prototype":
        targets["cls"], targets["patches"] = statistics.features(cls, patches)
    if config.objective != "feature":
        logits = statistics.logits(cls)  # [V*B,K]
        if config.centering == "sinkhorn_knopp":
            probs = sinkhorn_knopp(logits, config.teacher_temp)
        else:
            probs = softmax_center(logits, statistics.center, config.teacher_temp)
        targets["probs"] = probs.unflatten(0, (config.global_crops_number, -1))
    return targets


def local_share(config):
    """The share of pairs (teacher crop, another student crop) whose student crop is local."""
    V, L = config.global_crops_number, config.local_crops_number
    return L / (V - 1 + L)


def compute_losses(student_out, targets, config):
    """(total, terms): the weighted sum of all loss terms, and {name: scalar} of every term.

    feature: each crop against itself. prototype: all pairs of a teacher crop and another student
    crop, in two terms, each the mean over its pairs times their share of all pairs, as in dino.py.
    The terms of an objective that is off are 0.
    """
    V, L, kind = config.global_crops_number, config.local_crops_number, config.feature_loss_kind
    names = ("feature_cls_loss", "feature_patch_loss", "dino_global_loss", "dino_local_loss")
    terms = dict.fromkeys(names, student_out["global_cls"].new_zeros((), dtype=torch.float32))
    if config.objective != "prototype":
        terms["feature_cls_loss"] = feature_loss(student_out["projected_cls"], targets["cls"], kind)
        if config.feature_patch_weight > 0:
            patches = student_out["projected_patches"]
            terms["feature_patch_loss"] = feature_loss(patches, targets["patches"], kind)
    if config.objective != "feature":
        share = local_share(config)
        if V > 1:
            logits = student_out["global_logits"].unflatten(0, (V, -1))  # [V,B,K]
            pairs = dino_loss(logits, targets["probs"], config.student_temp)
            terms["dino_global_loss"] = (1 - share) * pairs
        if L > 0:
            logits = student_out["local_logits"].unflatten(0, (L, -1))  # [L,B,K]
            pairs = dino_loss(logits, targets["probs"], config.student_temp, ignore_diagonal=False)
            terms["dino_local_loss"] = share * pairs
    total = config.feature_cls_weight * terms["feature_cls_loss"]
    total = total + config.feature_patch_weight * terms["feature_patch_loss"]
    prototype_loss = terms["dino_global_loss"] + terms["dino_local_loss"]
    return total + config.prototype_loss_weight * prototype_loss, terms


def uninformed_losses(targets, config):
    """{loss: its value for a student without information}: zeros for features, a uniform
    prediction for prototypes."""
    values = {}
    if config.objective != "prototype":
        for name, key in (("cls", "feature_cls_loss"), ("patches", "feature_patch_loss")):
            if targets[name] is not None:
                zeros = torch.zeros_like(targets[name])
                values[key] = float(feature_loss(zeros, targets[name], config.feature_loss_kind))
    if config.objective != "feature":
        uniform, share = math.log(config.dino_head_out_dim), local_share(config)
        values["dino_global_loss"] = (1 - share) * uniform
        values["dino_local_loss"] = share * uniform
    return values


def log_line(record, uninformed, memory):
    """One line of the log. Each loss is followed by that of a student without information.
    memory: of distributed.describe_memory."""
    names = dict(feature_cls_loss="Feature CLS", feature_patch_loss="Feature patches",
                 dino_local_loss="Local DINO", dino_global_loss="Global DINO")
    parts = [f"Total Loss: {record['loss']:.4f}"]
    for key, name in names.items():
        if uninformed.get(key):
            parts.append(f"{name}: {record[key]:.4f} (uninformed: {uninformed[key]:.4f})")
    parts += [f"LR: {record['lr']:.6f}", f"EMA momentum: {record['momentum_teacher']:.6f}",
              f"Current Batch Size: {global_batch_size}",
              f"Iteration: {record['iteration']}/{max_iterations}", memory,
              f"Trainable: {record['trainable_m']:.2f}/{record['total_m']:.2f} M |",
              f"RankMe {record['rankme']:.1f}"]
    return " ".join(parts)


HARM = ("the teacher's features harm these, or lr is too high. Evaluate the teacher by itself; "
        "checkpoints/best keeps the best student.")


def cache_key(config, preset, **more):
    """Everything that cached teacher features depend on, as a dict."""
    keys = ("dataset_path", "dataset_size", "num_channels", "seed", "fixed_views",
            "global_crops_number", "global_crops_size", "global_crops_scale", "horizontal_flip",
            "vertical_flip", "blur_probability", "window_jitter", "distilled_model_type",
            "distilled_model_weights", "mixed_precision", "min_foreground")
    values = {key: getattr(config, key) for key in (*keys, *READING)}
    return dict(values, augmentation=augmentation_values(preset), **more)


@whole_run
def main(sources, at_end):
    """Distil with the config in this module's globals. Arguments and return as of train.main."""
    run_device = setup(device)
    config = SimpleNamespace(**{key: globals()[key] for key in config_keys})
    notes = check_config(config, sources) + precision_notes(run_device, mixed_precision)
    run = Run("distill.py", config, describe(globals(), config_keys, sources), notes, at_end)

    # ---- teacher ----
    # a sharded teacher answers all ranks or none; with a cache each rank asks on its own
    teacher_distribution = "none" if teacher_cache else distribution
    dtype = compute_dtype(run_device, mixed_precision)
    with built_by_main(teacher_distribution), main_first():
        teacher = build_teacher(distilled_model_type, distilled_model_weights, load_from_disk,
                                distilled_crops_size, global_crops_size, dtype)
    teacher = move_or_shard(teacher, teacher.blocks(), teacher_distribution, run_device)

    # ---- data ----
    train_set, measured, held_out = open_splits(config)
    expected = pretrained_input(model_type) if use_pretrained else {}
    value_range = intensity_range if any(intensity_range) else teacher.intensity_range or (0, 0)
    if teacher.intensity_range:
        check_scaling(train_set, pretrained_input(distilled_model_type))
    inputs, source = input_settings(train_set, expected, value_range, image_mean, image_std, seed,
                                    on_bad_image)
    low_high = inputs["intensity_range"]
    if teacher.intensity_range and tuple(teacher.intensity_range) != tuple(low_high):
        low, high = teacher.intensity_range
        raise UserError(f"intensity_range={low_high}, but the teacher was trained on "
                        f"{teacher.intensity_range}; give --intensity_range={low},{high}")
    run.say(describe_data(train_set, measured, inputs, source))
    run.say(teacher.describe(distilled_model_type))

    # ---- student ----
    torch.manual_seed(seed)  # the same first weights on every rank
    with built_by_main(distribution) as holds_values:
        backbone = adapted_backbone(config, train_set.num_channels, run_device, run.say,
                                    changed=sources)
        width, new_patch_embed = backbone.config.hidden_size, backbone.patch_embed_inflated
        dino_head = projectors = None
        if objective != "feature":
            dino_head = DINOHead(width, dino_head_out_dim, head_hidden_dim, head_bottleneck_dim,
                                 dino_head_norm_last_layer)
        if objective != "prototype":  # linear, so that a linear probe finds what they find
            projectors = nn.ModuleDict(dict(cls=nn.Linear(width, teacher.cls_width)))
            if feature_patch_weight > 0:
                projectors["patches"] = nn.Linear(width, teacher.patch_width)
        student = Student(backbone, dino_head, projectors=projectors)
        if run.saved:
            check_same_teacher(run)
            check_fits(run.saved, student, vars(config))
            if holds_values:
                student.load_state_dict(run.saved["student"])
    student = move_or_shard(student, blocks(backbone), distribution, run_device).train()
    n_prototypes = dino_head_out_dim if dino_head else 0
    statistics = FeatureStatistics(teacher.cls_width, teacher.patch_width, n_prototypes,
                                   feature_whitening).to(run_device)

    # ---- optimizer, EMA, and what a checkpoint brings back ----
    optimizer, train_from, heads_only_iterations = build_optimizer(student, config, new_patch_embed)
    set_trainable(student, train_from, run.saved["iteration"] if run.saved else 0)
    state = State(student, EMATeacher(student), optimizer,
                  scaler=gradient_scaler(run_device, mixed_precision), centers={})
    if run.saved:
        statistics.load_state_dict(run.saved["statistics"])
        restore(state, run)
    if compile:
        compile_blocks(backbone)
    run.say(describe_student(student, config, state.iteration))
    state.student = wrap(student, distribution, run_device)

    # ---- loader ----
    micro_batches = accumulation_steps(global_batch_size, gradient_accumulation_steps)
    batch_size = global_batch_size // world_size() // micro_batches
    V, grid = global_crops_number, global_crops_size // backbone.config.patch_size
    small = local_crops_size - local_crops_size % backbone.config.patch_size
    multi_crop = MultiCrop(global_crops_size, global_crops_scale, V, small,
                           local_crops_scale, local_crops_number, horizontal_flip=horizontal_flip,
                           vertical_flip=vertical_flip, min_foreground=min_foreground,
                           background=low_high[0])
    crop_set = CropDataset(train_set, multi_crop, seed, global_batch_size, grid,
                           on_bad_image=on_bad_image, fixed_views=fixed_views)
    preset = choose_preset(augmentation, train_set.num_channels)
    photometrics = Photometrics(preset, **inputs, window_jitter=window_jitter,
                                blur_probability=blur_probability)
    run.say(describe_batches(crop_set, config, micro_batches, preset))

    def augmented(batch):
        """The global crops [V*B,C,S,S], in 0..1; crop 1 and the others differ (DINO)."""
        native = batch["global_crops"].to(run_device, non_blocking=True)
        B, seeds = len(native) // V, batch["global_seeds"]
        first = photometrics.augment(native[:B], seeds[:B], "global1")
        others = photometrics.augment(native[B:], seeds[B:], "global2")
        return torch.cat([first, others])

    # ---- the teacher's tokens: computed, or from the cache ----
    with_patches = objective != "prototype" and feature_patch_weight > 0
    cache = None
    if teacher_cache:
        key = cache_key(config, preset, value_range=low_high, teacher_size=teacher.size, grid=grid,
                        images=len(train_set))
        patches_shape = (grid**2, teacher.patch_width) if with_patches else ()
        with main_first():
            cache = FeatureCache(teacher_cache, len(train_set) * fixed_views, V, teacher.cls_width,
                                 patches_shape, key)

    def teacher_tokens(batch, crops):
        """Of the global crops: cls [V*B,D]; patches [V*B,P,E] on the student's grid, or None."""
        def compute(images):
            views = crops.unflatten(0, (V, -1))[:, images]
            cls, patches = teacher(views.flatten(0, 1))
            return cls, resize_grid(patches, grid) if with_patches else None
        if cache is None:
            return compute(list(range(len(batch["n"]))))
        views = zip(batch["index"], batch["view"])
        return cache([index * fixed_views + view for index, view in views], compute, run_device)

    if not run.resumed_from:  # the statistics of the teacher's tokens of the first batches
        began = time.time()
        n_batches = math.ceil(distilled_statistics_views / global_batch_size / V)

        def first_tokens():
            for batch in make_loader(crop_set, config, micro_batches, 0, n_batches, run_device):
                stop_together(batch.get("error"))
                yield batch["n"], *teacher_tokens(batch, augmented(batch))
        statistics.measure(first_tokens(), seed)
        n_views = n_batches * global_batch_size * V
        run.say(f"measured the teacher's features and {n_prototypes} prototypes on {n_views} views "
                f"in {time.time() - began:.0f} s")

    # ---- all input is good: the run's folder, and k-NN before training ----
    run.open(state, inputs, statistics=statistics.state_dict())
    autocast = autocast_for(run_device, mixed_precision)
    knn = KnnMeasure(train_set, measured, config, inputs, autocast)
    label_free = LabelFree(held_out, train_set, config, inputs, autocast)
    attention = AttentionSamples(train_set, measured, inputs, config)

    def of_student(measure, *args):
        with run.clock_stopped(), state.ema.teacher_weights(state.student) as averaged:
            return measure(averaged.backbone, *args)

    if state.iteration == 0 and not run.knn and (measured or label_free):
        run.record_start(knn.pixels(), of_student(knn.accuracy, measured),
                         of_student(label_free.measure))
        run.save()  # if training only harms, `best` stays at the start
    attention.start(run, state, train_set, multi_crop)

    # ---- the loop ----
    # iter starts the loader, which draws from torch's generator: before seed_iteration
    batches = iter(make_loader(crop_set, config, micro_batches, state.iteration, max_iterations,
                               run_device, run.say))
    while state.iteration < max_iterations:
        seed_iteration(seed, state.iteration)
        moment = (state.iteration, max_iterations)
        lr_now = cosine_schedule(lr, min_lr, *moment, warmup_iterations)
        weight_decay_now = cosine_schedule(weight_decay, weight_decay_end, *moment)
        momentum_now = cosine_schedule(momentum_teacher, final_momentum_teacher, *moment)
        set_learning_rates(optimizer, lr_now, lr_now, weight_decay_now,
                           warmup_factor(state.iteration, heads_only_iterations))

        sums, indices = Counter(), []  # a Counter adds by name
        for micro in range(micro_batches):
            batch = next(batches)
            stop = run.stop_wanted(batch, may_stop=micro == 0)
            if stop:
                break
            indices += batch["index"]
            # Step 1. Photometrics on the device: crops in 0..1, each network normalises its own way
            native_crops = augmented(batch)  # [V*B,C,S,S]
            crops = {"global": photometrics.normalize(native_crops), "local": None, "masks": None}
            if local_crops_number > 0:
                local_crops = batch["local_crops"].to(run_device, non_blocking=True)
                crops["local"] = photometrics(local_crops, batch["local_seeds"], "local")
            if generate_samples and state.iteration == micro == 0 and is_main():
                save_samples(f"{run.folder}/samples/crops.png", crops, batch_size, photometrics)
            # Step 2. The teacher sees the global crops, or the cache knows what it saw
            targets = make_targets(statistics, *teacher_tokens(batch, native_crops), config)
            # Step 3. The student sees all crops
            with autocast():
                student_out = state.student(crops["global"], crops["local"],
                                            with_patches=with_patches)
            total, terms = compute_losses(student_out, targets, config)
            with no_sync(state.student, last=micro == micro_batches - 1):
                state.scaler.scale(total / micro_batches).backward()
            for name, term in dict(terms, loss=total).items():
                sums[name] += term.detach() / micro_batches
        if stop:
            break

        # Step 4. Stop if the loss is not a number, before it reaches the disk
        run.losses.add(sums, state.iteration, lr_now, indices)
        # Step 5. Clip, step, move the EMA
        state.scaler.unscale_(optimizer)
        grad_norm = clip_gradients(unwrap(state.student), clip_grad, clip_grad_by)
        state.scaler.step(optimizer)
        state.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        state.ema.update(state.student, momentum_now)
        state.iteration += 1

        # Step 6. Log, measure, save. From here on `iteration` counts this one as finished
        iteration, record, is_best = state.iteration, {}, False
        if run.log_is_due(iteration):
            seconds, left = run.tick(iteration)
            cls = student_out["global_cls"].detach()
            health = dict(rankme=rankme(cls))
            if "probs" in targets:
                health = monitor(cls, targets["probs"].flatten(0, 1))
            record = dict(iteration=iteration, **run.losses.read(), lr=lr_now,
                          weight_decay=weight_decay_now, momentum_teacher=momentum_now,
                          batch_size=global_batch_size, grad_norm=float(grad_norm),
                          images_per_second=global_batch_size / seconds,
                          memory_gb=memory_gb(run_device)[0],
                          **parameter_counts(state.student), **health)
            uninformed = uninformed_losses(targets, config)
            line = log_line(record, uninformed, describe_memory(run_device))
            run.say(f"{line} | {seconds:.2f} s/it, {left} left", stamped=True)
            if iteration >= max(50, max_iterations // 5):
                for name, value in uninformed.items():
                    if value > 0 and record[name] > 0.97 * value:
                        run.say(f"!!!! NOT LEARNING: {name} is that of a student without "
                                "information. Try a higher lr, more iterations, or for prototypes "
                                "a lower teacher_temp. !!!!")
        if run.is_due(eval_interval, iteration) and (measured or label_free):
            advice = HARM if use_pretrained else ""
            is_best, measures = run.record_measures(
                of_student(knn.accuracy, [eval_split]), of_student(label_free.measure), iteration,
                advice)
            record = dict(record, iteration=iteration, **measures)
        if record:
            run.log(record)
        if set_trainable(unwrap(state.student), train_from, iteration):  # the backbone begins
            state.ema.take_in(state.student)
            state.student = wrap(unwrap(state.student), distribution, run_device)
        attention.draw(run, state)  # before the checkpoint, from which a killed run goes on
        if is_best or run.is_due(saveckp_freq, iteration):
            run.save()

    # ---- the end ----
    if state.iteration < max_iterations:
        run.save()
    if run.close():
        hand_back(run, knn, label_free)
        run.summarize(of_student(knn.accuracy, measured), "the student")
    cleanup()
    return run.stop_signal()


if __name__ == "__main__":
    with quick_exit(), one_line_errors(), lost_ranks():
        end_by(main(sources))
