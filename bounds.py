"""What every key of every script may be.

configurator.override refuses a value outside of BOUNDS before torch is imported, --help prints the
bounds behind the comments, and tests/test_keys.py tries both sides of each. A key means the same in
all scripts; OF_SCRIPT has the exceptions. checks.py has what depends on several keys at once.
"""
import re


# (smallest, largest), both allowed
SHARE = (0, 1)  # of an area or a range, or a probability
PART = (1e-6, 1)  # a share that is not nothing
TEMPERATURE = (1e-4, 10**4)
RATE = (0, 100)  # of learning or decay; none above 1 is of use
WEIGHT = (0, 10**6)  # of a loss
CROPS = (0, 100)  # of an image
PIXELS, PIXELS_OR_0 = (1, 16384), (0, 16384)
COUNT, COUNT_OR_0 = (1, 10**9), (0, 10**9)  # of iterations or images
SIZE = (1, 10**6)
WIDTH, PROTOTYPES = (1, 2**16), (2, 10**7)
DROP = (0, 0.99)  # with 1 nothing is left
PIXEL_VALUE = (-10**9, 10**9)

# Of a number or of each number in a tuple: the bounds. Of a text: the words that it may be, where N
# stands for a number: cuda:N is cuda:0, cuda:1, ...
BOUNDS = dict(
    # ---- run ----
    seed=(0, 2**63 - 1), device=("auto", "cpu", "cuda", "cuda:N"),
    max_iterations=COUNT, log_interval=COUNT, eval_interval=COUNT_OR_0, saveckp_freq=COUNT,
    # ---- data ----
    dataset_size=PIXELS, num_channels=(0, 10**4), intensity_range=PIXEL_VALUE,
    volume_axis=(-1, 3), volume_index=(-1, 10**6),
    slice_step_mm=(0, 10**4), group_level=(0, 9),
    max_image_pixels=(0, 10**12), intensity_scaling=("set", "image", "dtype"),
    image_mean=(-10**6, 10**6), image_std=(1e-6, 10**6),
    on_bad_image=("error", "skip"), num_workers=(-1, 64), eval_max_images=COUNT_OR_0,
    # ---- crops ----
    augmentation=("auto", "rgb", "medical"),
    global_crops_number=(1, 100), global_crops_size=PIXELS, global_crops_scale=PART,
    local_crops_number=CROPS, local_crops_size=PIXELS, local_crops_scale=PART,
    label_guided_crops_number=CROPS, label_guided_crops_scale=PART,
    label_guided_loss_weight=WEIGHT, label_guided_classes=PIXEL_VALUE,
    horizontal_flip=SHARE, vertical_flip=SHARE, blur_probability=SHARE, window_jitter=(0, 0.4),
    min_foreground=SHARE, slab_mm=(0, 10**4), fixed_views=(0, 10**6),
    # ---- the frozen teacher of distill.py ----
    distilled_crops_size=PIXELS_OR_0, distilled_statistics_views=(2, 10**9),
    # ---- backbone ----
    hidden_size=WIDTH, num_hidden_layers=(1, 1000), num_attention_heads=(1, 1024),
    patch_size=(1, 1024), num_register_tokens=(0, 1024), drop_path_rate=DROP,
    pos_embed_rescale=(0, 100), freeze_backbone_layers=(0, 1000), freeze_backbone_until=COUNT_OR_0,
    train_last_blocks=(0, 1000), train_only=("all", "attention_output"),
    lora_r=WIDTH, lora_alpha=SIZE, lora_dropout=DROP,
    # ---- heads ----
    dino_head_out_dim=PROTOTYPES, dino_head_loss_weight=WEIGHT, dino_local_loss_weight=WEIGHT,
    head_hidden_dim=SIZE, head_bottleneck_dim=SIZE, ibot_loss_weight=WEIGHT,
    ibot_out_dim=PROTOTYPES, ibot_mask_sample_probability=SHARE, ibot_mask_ratio_min_max=PART,
    # ---- losses and teacher ----
    objective=("feature", "prototype", "both"), feature_loss_kind=("cosine", "smooth_l1"),
    feature_whitening=SHARE, feature_cls_weight=WEIGHT, feature_patch_weight=WEIGHT,
    prototype_loss_weight=WEIGHT, centering=("centering", "sinkhorn_knopp"),
    student_temp=TEMPERATURE, teacher_temp=TEMPERATURE, warmup_teacher_temp=TEMPERATURE,
    warmup_teacher_temp_iterations=COUNT_OR_0, momentum_teacher=SHARE,
    final_momentum_teacher=SHARE, koleo_loss_weight=WEIGHT, koleo_group_size=(0, 10**6),
    gram_loss_weight=WEIGHT,
    cls_anchor_loss_weight=WEIGHT, lejepa_loss_weight=WEIGHT, lejepa_sigreg_weight=SHARE,
    lejepa_out_dim=WIDTH, diet_loss_weight=WEIGHT, diet_label_smoothing=DROP,
    gram_teacher=("ema", "start", "snapshot"), gram_refresh_iterations=COUNT_OR_0,
    gram_crops_size=PIXELS_OR_0,
    # ---- optimizer ----
    global_batch_size=SIZE, gradient_accumulation_steps=(0, 10**6), lr=RATE, min_lr=RATE,
    warmup_iterations=COUNT_OR_0, weight_decay=RATE, weight_decay_end=RATE,
    adam_betas=(0, 0.99999), layerwise_decay=(0.01, 1), patch_embed_lr_mult=RATE, head_lr_mult=RATE,
    clip_grad=(0, 10**6), clip_grad_by=("parameter", "module"),
    freeze_last_layer=COUNT_OR_0, freeze_last_layer_by=("grad", "lr"),
    freeze_backbone_iterations=(-1, 10**9),
    # ---- system ----
    distribution=("ddp", "fsdp", "none"), mixed_precision=("bf16", "fp16", "no"),
    # ---- evaluate.py, attention.py, embed.py ----
    checkpoint=("best", "last"), image_size=PIXELS_OR_0, batch_size=SIZE, knn_k=SIZE,
    bootstrap=(0, 10**6), n_images=(0, 10**6),
    neighbours=(1, 1000), pca_components=(1, 1000),
    heat=("auto", "mean", "pca", "headN"), low_threshold=SHARE, high_threshold=SHARE, min_iou=SHARE,
    # ---- bench.py ----
    what=("strategy", "augment", "step", "data", "growth", "memory", "all"),
    strategy=("all", "standard", "lora", "freeze", "freeze_shared", "lora_freeze"),
    n_steps=SIZE, rounds=SIZE,
    # ---- tables.py ----
    table=(5, 12), n_seeds=(1, 1000),
    n_processes=(1, 10**4), bench_steps=(0, 10**6),
)
OF_SCRIPT = dict(
    train=dict(global_crops_number=(2, 100)),  # one view teaches the others
    evaluate=dict(dataset_size=PIXELS_OR_0, mixed_precision=("bf16", "no")),  # 0 = that of the run
    attention=dict(dataset_size=PIXELS_OR_0),
    embed=dict(dataset_size=PIXELS_OR_0, mixed_precision=("bf16", "no")),
    bench=dict(local_crops_number=(1, 100), mixed_precision=("bf16", "no"), n_images=SIZE),
)
LOW_HIGH = ("global_crops_scale", "local_crops_scale", "label_guided_crops_scale",
            "ibot_mask_ratio_min_max")  # pairs whose second number is not below the first


def bounds_of(key, script=""):
    """The entry of BOUNDS for a key of a script; () if there is none."""
    return OF_SCRIPT.get(script, {}).get(key, BOUNDS.get(key, ()))


def range_text(key, script=""):
    """What --help puts behind a key's comment, like '0 to 1'; '' for words, which the comment
    has, and for keys without bounds."""
    bounds = bounds_of(key, script)
    if not bounds or isinstance(bounds[0], str):
        return ""
    return f"{bounds[0]} to {bounds[1]}"


def shown(value):
    """repr of a value in one line of at most 100 characters."""
    try:
        text = repr(value)
    except Exception:  # as of an int of more than 4300 digits
        return f"a value of type {type(value).__name__} that cannot be printed"
    return text if len(text) <= 100 else f"{text[:60]}...{text[-30:]}"


def problem(key, value, script=""):
    """What is wrong with the value of a key, in one line with the rule; '' if nothing is."""
    bounds = bounds_of(key, script)
    if not bounds:
        return ""
    if isinstance(bounds[0], str):
        numbered = re.sub("[0-9]+$", "N", value)  # head0 -> headN
        if value in bounds and not value.endswith("N") or numbered in bounds and numbered != value:
            return ""
        where = "; N is 0, 1, ..." if bounds[-1].endswith("N") else ""
        return f"{key}={shown(value)}: choose one of {', '.join(bounds)}{where}"
    low, high = bounds
    numbers = value if isinstance(value, tuple) else (value,)
    if not all(low <= number <= high for number in numbers):
        each = "each " if isinstance(value, tuple) else ""
        return f"{key}={shown(value)}: {each}must be in {low}..{high}"
    if key in LOW_HIGH and value[0] > value[1]:
        return f"{key}={value}: needs low <= high"
    if key == "intensity_range" and value != (0, 0):
        if value[1] - value[0] <= 1e-6 * max(map(abs, value)):  # equal in fp32
            return f"{key}={value}: needs low < high, or 0,0 to measure them"
    return ""
