"""Self-supervised training of a vision transformer: DINO, DINOv2, DINOv3 on any Hugging Face ViT.

    python train.py config/phantom.py                   # a laptop, embedded data, minutes
    python train.py config/adapt.py --dataset_path=my_images/ --model_type=facebook/dinov2-small
    torchrun --standalone --nproc_per_node=4 train.py config/pathmnist.py     # four GPUs
    python train.py --help                              # every key and every config file

Config files apply from left to right, then --key=value. A data set, a recipe and a strategy are
three files. This script writes out/NAME/: config.py (resolved; it runs again), log.jsonl,
logs/train.log, samples/crops.png, results/summary.json, checkpoints/{last,best}. The folder
checkpoints/best/hf loads with transformers.AutoModel.from_pretrained.

After Ctrl-C, SIGTERM or SIGHUP the run finishes its step, saves, prints how to go on, and ends by
that signal: status 130, 143 or 129 in a shell. A run that is complete ends with 0. A job script
tells a stopped run from a finished one by "stopped by a signal" in the last two lines of
logs/train.log, because torchrun ends with 1 after any signal.
"""
from types import SimpleNamespace

from configurator import UserError, describe, list_keys, one_line_errors, read_command_line

# ==== config: the paper's Listings 2-8 except for model_name, model_type, dataset_path, use_lora
# All Listings are in config/listing8.py. Durations are in iterations (optimizer steps)
# ---- run ----
model_name = 'pathmnist'         # name of the run; '' = that of the data set
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
local_crops_number = 8           # small views for the student only; 0 = none
local_crops_size = 96            # pixels; a multiple of the patch size, as 98 of 14, or made one
local_crops_scale = (0.1, 0.4)   # paper Listing 6; DINO: from 0.05 to where the global scale begins
min_foreground = 0.0             # least share of pixels above the window's lower end; CT: 0.25
slab_mm = 0.0                    # volumes: other crops come from slices so near, like 12; 0 = off
fixed_views = 0                  # crop an image in so many ways, by turns; 0 = anew every time
label_guided_crops_number = 0    # local crops around labelled pixels, additional (paper 2.2.4)
label_guided_crops_scale = (0.02, 0.1)  # share of the image area
label_guided_loss_weight = 0.0   # above 0 the teacher sees guided crops, too; paper: 0
label_guided_classes = ()        # mask values that are labels, like (2,); () = all except 0
horizontal_flip = 0.5            # probability; 0 if left and right must not be confused
vertical_flip = 0.5              # probability; paper Table 3: both ways, DINO: horizontally only
blur_probability = (1.0, 0.1, 0.5)  # global crop 1, 2, local; DINOv2's code does (0, 0.9, 0.5)
window_jitter = 0.0              # CT: shift both ends of intensity_range by up to this share; 0.1

# ---- backbone ----
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
freeze_backbone_until = 0        # iteration from which they are trained, too; 0 = never
train_last_blocks = 0            # train the last N blocks and the final norm only; 0 = all blocks
train_only = 'all'               # 'all' | 'attention_output' = projections after attention (APLA)
use_lora = False                 # train low-rank adapters, not the weights (paper section 2.2.3)
lora_targets = 'qv'              # 'qv' (paper) | 'all' = MLP, too | names like 'q_proj,fc1'
lora_r = 4                       # rank of the adapters
lora_alpha = 16                  # adapters are scaled by alpha / r
lora_rslora = False              # scale them by alpha / sqrt(r), which suits high ranks
lora_dropout = 0.1               # dropout on the adapters' input

# ---- heads ----
dino_head_out_dim = 65536        # prototypes K: 65536 for a million images, 512 to 4096 for 20 000
dino_head_norm_last_layer = False  # fix the prototypes' length at 1: steadier for large ViTs (dino)
dino_head_loss_weight = 1.0      # weight of the DINO loss, local + global
dino_local_loss_weight = 1.0     # factor on its local part; DINOv3 at high resolution: 0.5
head_hidden_dim = 2048           # width of both heads
head_bottleneck_dim = 256        # input width of the prototypes; DINOv2 long runs: 384
head_weight_norm = True          # prototypes = length * direction (DINO, DINOv2); False = DINOv3
ibot_loss_weight = 0.0           # weight of the masked-patch loss; 0 = no masks; DINOv2, DINOv3: 1
ibot_separate_head = False       # own head for patches (DINOv2 long runs, DINOv3)
ibot_out_dim = 65536             # prototypes of iBOT; a shared head needs dino_head_out_dim here
ibot_norm_last_layer = True      # like dino_head_norm_last_layer, for a separate head
ibot_mask_sample_probability = 0.5  # share of the global crops that get a mask
ibot_mask_ratio_min_max = (0.1, 0.5)  # share of the patches that a mask hides
ibot_mask_exact = False          # True = exactly the upper end of each ratio bin (DINOv3)

# ---- losses and teacher ----
centering = 'centering'          # 'centering' (DINO, DINOv2) | 'sinkhorn_knopp' (DINOv3)
student_temp = 0.1               # softmax temperature of the student
teacher_temp = 0.04              # of the teacher, after warm-up; above 0.07 is unstable (dino)
warmup_teacher_temp = 0.04       # of the teacher at iteration 0; lower it if the loss does not fall
warmup_teacher_temp_iterations = 500  # a straight line from one to the other
momentum_teacher = 0.996         # teacher = m * teacher + (1 - m) * student; 0.9 for short runs
final_momentum_teacher = 1.0     # m rises to this by a cosine
koleo_loss_weight = 0.0          # spreads the CLS features of a batch; DINOv2, DINOv3: 0.1
koleo_group_size = 0             # it compares so many images at most; 0 = all of a micro-batch
gram_loss_weight = 0.0           # keeps patch similarities near an anchor's; DINOv3: 1.5 to 2
gram_teacher = 'ema'             # anchor: 'ema' = teacher | 'start' = first weights | 'snapshot'
gram_refresh_iterations = 0      # 'snapshot': copy the teacher every N iterations; DINOv3: 10000
gram_crops_size = 0              # pixels of the anchor's crops; DINOv3: 1.5 to 2 times; 0 = global
cls_anchor_loss_weight = 0.0     # keeps CLS of plain crops near that of the first weights; 0.1

# ---- losses without prototypes: with dino_head_loss_weight=0 no teacher runs ----
lejepa_loss_weight = 0.0         # every crop predicts the mean of its global crops (LeJEPA)
lejepa_sigreg_weight = 0.05      # share of SIGReg, which prevents collapse; authors' example: 0.02
lejepa_out_dim = 64              # width of the embeddings that it compares
diet_loss_weight = 0.0           # every image is a class; label smoothing (DIET)
diet_label_smoothing = 0.8       # share of the target that is spread over all images; DIET: 0.8

# ---- optimizer ----
global_batch_size = 64           # images per optimizer step, over all ranks
gradient_accumulation_steps = 0  # micro-batches per step; 0 = so that each has at most 64 images
lr = 1e-4                        # peak, absolute. From scratch: DINO 5e-4 * batch / 256
min_lr = 1e-5                    # the cosine ends here
warmup_iterations = 1000         # the rate rises from 0 to lr in a straight line
weight_decay = 0.04              # at iteration 0; biases, norms and layer scale have none
weight_decay_end = 0.4           # at the end, by a cosine; DINOv2 long runs: 0.2
adam_betas = (0.9, 0.999)        # of AdamW; DINOv3 7B: (0.9, 0.99)
schedule_reaches_end = False     # False = cosines stop one step early (DINO) | True = DINOv3
layerwise_decay = 1.0            # rate of block i times this ** (blocks - i); DINOv2: 0.9
patch_embed_lr_mult = 1.0        # factor on the rate of the patch embedding; DINOv2, DINOv3: 0.2
head_lr_mult = 1.0               # factor on the rate of the heads; 10 if the run is short
clip_grad = 3.0                  # largest gradient norm; 0 = off
clip_grad_by = 'parameter'       # 'parameter' (DINO) | 'module' = backbone, each head (DINOv2, v3)
freeze_last_layer = 100          # iterations in which the prototypes are frozen; helps the start
freeze_last_layer_by = 'grad'    # 'grad' = no gradient (DINO) | 'lr' = rate 0 (DINOv2, DINOv3)
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
from collections import Counter

import torch

import dino
from augment import MultiCrop, Photometrics, choose_preset, is_labelled
from candidates import hand_back
from checkpoint import check_fits
from checks import Checks, uses_prototypes
from distributed import (accumulation_steps, autocast_for, built_by_main, cleanup,
                         describe_memory, is_main, lost_ranks, memory_gb, move_or_shard,
                         precision_notes, quick_exit, setup, unwrap, world_size, wrap)
from features import KnnMeasure
from loader import (CropDataset, describe_batches, describe_data, input_settings, make_loader,
                    open_splits)
from losses import koleo_groups
from metrics import diagnose, monitor
from model import (EMATeacher, Student, adapted_backbone, blocks, build_heads, compile_blocks,
                   describe_student, parameter_counts, set_trainable, shared_blocks)
from optim import build_optimizer, set_learning_rates
from pictures import save_samples
from prefix import KnownViews, keep_prefix, n_kept_blocks
from run import Run, State, gradient_scaler, restore, seed_iteration, whole_run
from samples import AttentionSamples
from signals import end_by
from verdict import LabelFree
from weights import FAMILIES, pretrained_input


def check_config(config, changed=()):
    """Check what depends on several keys: UserError with all mistakes at once. Returns notes on
    what has no effect. changed: keys that differ from their default."""
    check = Checks(config)
    check.training(world_size(), FAMILIES, changed)
    check.need(any(dino.loss_weights(config).values()),
               "the weights of all losses are 0: nothing would be learned; set one")
    check.need(ibot_loss_weight == 0 or ibot_separate_head or ibot_out_dim == dino_head_out_dim,
               f"ibot_out_dim={ibot_out_dim}, dino_head_out_dim={dino_head_out_dim}: a shared head "
               "has one size; make them equal or set --ibot_separate_head=true")
    check.need(freeze_backbone_until == 0 or freeze_backbone_layers > 0, "freeze_backbone_until="
               f"{freeze_backbone_until} with freeze_backbone_layers=0: nothing is frozen; set it")
    check.need(label_guided_loss_weight == 0 or label_guided_crops_number > 0,
               f"label_guided_loss_weight={label_guided_loss_weight} with "
               "label_guided_crops_number=0: there is no guided crop; use 4")
    check.need(gram_refresh_iterations == 0 or gram_teacher == "snapshot",
               f"gram_refresh_iterations={gram_refresh_iterations} with "
               f"gram_teacher={gram_teacher!r}: only a 'snapshot' is refreshed")
    warms_up = warmup_teacher_temp_iterations > 0 and "warmup_teacher_temp_iterations" in changed
    check.note(warms_up and warmup_teacher_temp == teacher_temp, "warmup_teacher_temp_iterations="
               f"{warmup_teacher_temp_iterations} has no effect: both temperatures are equal")
    check.note(gram_loss_weight > 0 and gram_teacher == "snapshot" and gram_refresh_iterations == 0,
               "gram_teacher='snapshot' with gram_refresh_iterations=0 is the same as 'start'")
    return check.report()


def log_line(record, memory):
    """The paper's log line (section 2.1.3). Each loss is followed by the loss of a uniform
    prediction: ln K times the term's share of the pairs, or of the masked crops. memory: of
    distributed.describe_memory."""
    V, L = global_crops_number, local_crops_number + label_guided_crops_number
    local_share = L / (V - 1 + L)
    uniform, parts = math.log(dino_head_out_dim), [f"Total Loss: {record['loss']:.4f}"]
    if "dino_local_loss" in record:
        shares = dict(dino_local_loss=local_share, dino_global_loss=1 - local_share)
        for name, words in (("dino_local_loss", "Local DINO"), ("dino_global_loss", "Global DINO")):
            parts.append(f"{words}: {record[name]:.4f} (ln K: {shares[name] * uniform:.4f})")
    if ibot_loss_weight > 0:
        uniform_ibot = ibot_mask_sample_probability * math.log(ibot_out_dim)
        parts.append(f"iBOT: {record['ibot_loss']:.4f} (ln K: {uniform_ibot:.4f})")
    elif "ibot_loss" in record:
        parts.append("iBOT: off")
    if label_guided_loss_weight > 0:
        n_means = min(2, label_guided_crops_number)
        parts.append(f"Guided: {record['label_guided_loss']:.4f} (ln K: {n_means * uniform:.4f})")
    others = dict(koleo_loss="KoLeo", gram_loss="Gram", cls_anchor_loss="CLS anchor",
                  lejepa_prediction_loss="LeJEPA", sigreg_loss="SIGReg", diet_loss="DIET")
    off = dict(koleo_loss=koleo_loss_weight == 0, gram_loss=gram_loss_weight == 0)  # 0 if off
    parts += [f"{words}: {record[name]:.4f}" for name, words in others.items()
              if name in record and not off.get(name)]
    parts += [f"LR: {record['lr']:.6f}", f"Weight Decay: {record['weight_decay']:.6f}",
              f"Teacher momentum: {record['momentum_teacher']:.6f}",
              f"Current Batch Size: {global_batch_size}",
              f"Iteration: {record['iteration']}/{max_iterations}", memory,
              f"Trainable: {record['trainable_m']:.2f}/{record['total_m']:.2f} M |"]
    if "teacher_entropy" in record:
        parts += [f"entropy {record['teacher_entropy']:.2f}",
                  f"prototypes {record['prototype_use']:.0%}"]
    parts.append(f"RankMe {record['rankme']:.1f}")
    return " ".join(parts)


def describe_labels(train_set):
    """How many of a hundred masks show a label, as a sentence; UserError without masks."""
    if train_set.masks is None:
        raise UserError(f"label_guided_crops_number={label_guided_crops_number}, but "
                        f"{dataset_path!r} has no masks; set it to 0")
    step = math.ceil(len(train_set) / 100)
    masks = [train_set.masks[i] for i in range(0, len(train_set), step)]
    labelled = [mask is not None and is_labelled(mask, label_guided_classes).any()
                for mask in masks]
    return (f"label-guided crops: {sum(labelled)} of {len(masks)} masks looked at show "
            f"{label_guided_classes or 'a label'}; images without get random crops")


HARM = ("training harms these features. Lower lr, longer freeze_backbone_iterations, or use_lora; "
        "checkpoints/best keeps the best teacher.")


@whole_run
def main(sources, at_end):
    """Train with the config in this module's globals. Args: sources: of configurator.override;
    at_end: of whole_run. Returns the signal that stopped the run, 0 if it is finished."""
    run_device = setup(device)
    config = SimpleNamespace(**{key: globals()[key] for key in config_keys})
    notes = check_config(config, sources) + precision_notes(run_device, mixed_precision)
    run = Run("train.py", config, describe(globals(), config_keys, sources), notes, at_end)

    # ---- data ----
    train_set, measured, held_out = open_splits(config)
    if label_guided_crops_number > 0:
        run.say(describe_labels(train_set))
    expected = pretrained_input(model_type) if use_pretrained else {}
    inputs, source = input_settings(train_set, expected, intensity_range, image_mean, image_std,
                                    seed, on_bad_image)
    run.say(describe_data(train_set, measured, inputs, source))

    # ---- student ----
    torch.manual_seed(seed)  # the same first weights on every rank
    with built_by_main(distribution) as holds_values:
        backbone = adapted_backbone(config, train_set.num_channels, run_device, run.say,
                                    changed=sources, n_images=len(train_set))
        new_patch_embed = backbone.patch_embed_inflated
        heads = build_heads(backbone.config.hidden_size, config, len(train_set))
        student = Student(backbone, **heads)
        if run.saved:
            check_fits(run.saved, student, vars(config))
            if holds_values:
                student.load_state_dict(run.saved["student"])
    student = move_or_shard(student, blocks(backbone), distribution, run_device).train()

    # ---- optimizer, teacher, and what a checkpoint brings back ----
    optimizer, train_from, heads_only_iterations = build_optimizer(student, config, new_patch_embed)
    set_trainable(student, train_from, run.saved["iteration"] if run.saved else 0)
    state = State(student, EMATeacher(student), optimizer,
                  scaler=gradient_scaler(run_device, mixed_precision),
                  centers=dict(dino=torch.zeros(1, dino_head_out_dim, device=run_device),
                               ibot=torch.zeros(1, ibot_out_dim, device=run_device)))
    if gram_loss_weight > 0 and gram_teacher != "ema":
        state.anchor = EMATeacher(student, part="backbone.")
    if cls_anchor_loss_weight > 0:
        is_there = state.anchor and gram_teacher == "start"
        state.start = state.anchor if is_there else EMATeacher(student, part="backbone.")
    if run.saved:
        restore(state, run)
    if compile:
        compile_blocks(backbone)

    def make_ready(module):
        """Wrap the student for the iterations to come; again when more of it is trained."""
        shares = ibot_loss_weight == 0 and uses_prototypes(config)  # no masks, and a teacher
        state.n_shared_blocks = shared_blocks(module, state.ema) if shares else 0
        run.say(describe_student(module, config, state.iteration)
                + f", {state.n_shared_blocks} computed once for student and teacher")
        state.student = wrap(module, distribution, run_device)
    make_ready(student)

    # ---- loader ----
    micro_batches = accumulation_steps(global_batch_size, gradient_accumulation_steps)
    batch_size = global_batch_size // world_size() // micro_batches
    if diet_loss_weight > 0:
        run.say(f"DIET: {len(train_set)} classes, one for each image; a uniform prediction has a "
                f"loss of {math.log(len(train_set)):.4f}")
    if koleo_loss_weight > 0:
        koleo_groups(batch_size * world_size(), koleo_group_size)
    rest = local_crops_size % backbone.config.patch_size  # model.check_crop_sizes has told
    multi_crop = MultiCrop(global_crops_size, global_crops_scale, global_crops_number,
                           local_crops_size - rest, local_crops_scale, local_crops_number,
                           label_guided_crops_number, label_guided_crops_scale,
                           horizontal_flip, vertical_flip,
                           gram_crops_size if gram_loss_weight > 0 else 0, label_guided_classes,
                           min_foreground, inputs["intensity_range"][0])
    mask_settings = None
    if ibot_loss_weight > 0:
        mask_settings = dict(sample_probability=ibot_mask_sample_probability,
                             ratio_min_max=ibot_mask_ratio_min_max, exact=ibot_mask_exact)
    crop_set = CropDataset(train_set, multi_crop, seed, global_batch_size,
                           global_crops_size // backbone.config.patch_size, mask_settings,
                           on_bad_image, fixed_views, slab_mm)
    autocast = autocast_for(run_device, mixed_precision)
    prefix = keep_prefix(student, train_from, config, len(train_set), autocast, run.say)
    loader = make_loader(crop_set, config, micro_batches, state.iteration, max_iterations,
                         run_device, run.say, wrap=KnownViews if prefix else None)
    preset = choose_preset(augmentation, train_set.num_channels)
    photometrics = Photometrics(preset, **inputs, window_jitter=window_jitter,
                                blur_probability=blur_probability)
    run.say(describe_batches(crop_set, config, micro_batches, preset))

    # ---- all input is good: the run's folder, and k-NN before training ----
    run.open(state, inputs)
    n_kept = n_kept_blocks(student, train_from, config, run_device)
    knn = KnnMeasure(train_set, measured, config, inputs, autocast, n_kept)
    label_free = LabelFree(held_out, train_set, config, inputs, autocast, n_kept)
    attention = AttentionSamples(train_set, measured, inputs, config)

    def of_teacher(measure, *args):
        with run.clock_stopped(), state.ema.teacher_weights(state.student) as teacher:
            return measure(teacher.backbone, *args)

    if state.iteration == 0 and not run.knn and (measured or label_free):
        run.record_start(knn.pixels(), of_teacher(knn.accuracy, measured),
                         of_teacher(label_free.measure))
        run.save()  # if training only harms, `best` stays at the start
    attention.start(run, state, train_set, multi_crop)

    # ---- the loop ----
    batches = iter(loader)
    while state.iteration < max_iterations:
        seed_iteration(seed, state.iteration)
        values = dino.schedules(config, state.iteration, heads_only_iterations)
        set_learning_rates(optimizer, values.lr, values.last_layer_lr, values.weight_decay,
                           values.backbone_factor)

        sums, row_sums, indices = Counter(), Counter(), []  # a Counter adds by name
        for micro in range(micro_batches):
            batch = next(batches)
            stop = run.stop_wanted(batch, may_stop=micro == 0)
            if stop:
                break
            indices += batch["index"]
            # Step 1. Colours, blur and noise, on the device
            crops = dino.augment_batch(batch, photometrics, config, run_device)
            if prefix:
                crops["shared"] = prefix(batch, crops["global"], backbone, run_device)
            if generate_samples and state.iteration == micro == 0 and is_main():
                labels = crop_set.label_crops(batch["index"]) if label_guided_crops_number else None
                save_samples(f"{run.folder}/samples/crops.png", crops, batch_size, photometrics,
                             labels, label_guided_crops_number)
            # Step 2. The teacher's targets. Step 3. The student's losses and gradients
            terms, rows, teacher_view = dino.forward_backward(
                state, crops, values.teacher_temp, config, autocast, micro_batches,
                last=micro == micro_batches - 1)
            sums.update(terms)
            row_sums.update(rows)
        if stop:
            break

        # Step 4. Stop if the loss is not a number, before it reaches the disk
        run.losses.add(sums, state.iteration, values.lr, indices)
        # Step 5. Clip, step, move the teacher and the centers
        grad_norm = dino.update(state, row_sums, values, config)

        # Step 6. Log, measure, save. From here on `iteration` counts this one as finished
        iteration, record, is_best = state.iteration, {}, False
        if run.log_is_due(iteration):
            seconds, left = run.tick(iteration)
            record = dict(iteration=iteration, **run.losses.read(), lr=values.lr,
                          weight_decay=values.weight_decay, momentum_teacher=values.momentum,
                          teacher_temp=values.teacher_temp, batch_size=global_batch_size,
                          grad_norm=float(grad_norm), images_per_second=global_batch_size / seconds,
                          memory_gb=memory_gb(run_device)[0], **parameter_counts(state.student),
                          **monitor(teacher_view["cls"], teacher_view["probs"]))
            line = log_line(record, describe_memory(run_device))
            run.say(f"{line} | {seconds:.2f} s/it, {left} left", stamped=True)
            early = iteration < max(50, max_iterations // 5)
            if advice := diagnose(record, dino_head_out_dim, early):
                run.say(f"!!!! {advice} !!!!")
        if run.is_due(eval_interval, iteration) and (measured or label_free):
            is_best, measures = run.record_measures(
                of_teacher(knn.accuracy, [eval_split]), of_teacher(label_free.measure), iteration,
                HARM)
            record = dict(record, iteration=iteration, **measures)
        if record:
            run.log(record)
        if set_trainable(unwrap(state.student), train_from, iteration):  # more of it is trained
            for ema in filter(None, (state.ema, state.anchor, state.start)):
                ema.take_in(state.student)
            make_ready(unwrap(state.student))
        attention.draw(run, state)  # before the checkpoint, from which a killed run goes on
        if is_best or run.is_due(saveckp_freq, iteration):
            run.save()

    # ---- the end ----
    if state.iteration < max_iterations:
        run.save()
    if run.close():
        hand_back(run, knn, label_free)
        run.summarize(of_teacher(knn.accuracy, measured), "the teacher")
    cleanup()
    return run.stop_signal()


if __name__ == "__main__":
    with quick_exit(), one_line_errors(), lost_ranks():
        end_by(main(sources))
