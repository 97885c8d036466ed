"""What every key of every script may be, and which keys do nothing in a run.

configurator.override refuses a value outside of BOUNDS before torch is imported, --help prints the
bounds behind the comments, and tests/test_keys.py tries both sides of each. A key means the same in
all scripts. If one script allows less, it says so in OF_SCRIPT. What depends on several keys at
once is in the check_config of a script.
"""
import re


SIDE = 16384  # pixels of a crop or an image
MANY = 10**9  # iterations or images
SHARE = (0, 1)  # of an area, or a probability
WEIGHT = (0, 10**6)  # of a loss
PART = (1e-6, 1)  # a share that is not nothing
TEMPERATURE = (1e-4, 10**4)

# (smallest, largest), both allowed, of a number or of each number in a tuple; or the words that a
# text may be, where N stands for a number: cuda:N is cuda:0, cuda:1, ...
BOUNDS = dict(
    # ---- run ----
    seed=(0, 2**63 - 1), device=("auto", "cpu", "cuda", "cuda:N"), max_iterations=(1, MANY),
    log_interval=(1, MANY), eval_interval=(0, MANY), saveckp_freq=(1, MANY),
    # ---- data ----
    dataset_size=(1, SIDE), num_channels=(0, 10**4), intensity_range=(-10**9, 10**9),
    image_mean=(-10**6, 10**6), image_std=(1e-6, 10**6), on_bad_image=("error", "skip"),
    num_workers=(-1, 64), eval_max_images=(0, MANY),
    # ---- crops ----
    augmentation=("auto", "rgb", "medical"), global_crops_number=(1, 100),
    global_crops_size=(1, SIDE), global_crops_scale=PART, local_crops_number=(0, 100),
    local_crops_size=(1, SIDE), local_crops_scale=PART, label_guided_crops_number=(0, 100),
    label_guided_crops_scale=PART, label_guided_loss_weight=WEIGHT,
    label_guided_classes=(-10**9, 10**9), horizontal_flip=SHARE, vertical_flip=SHARE,
    blur_probability=SHARE, window_jitter=(0, 0.4), min_foreground=SHARE, slab_mm=(0, 10**4),
    fixed_views=(0, 10**6),
    # ---- the frozen teacher of distill.py ----
    distilled_crops_size=(0, SIDE), distilled_statistics_views=(1, MANY),
    # ---- backbone ----
    hidden_size=(1, 2**16), num_hidden_layers=(1, 1000), num_attention_heads=(1, 1024),
    patch_size=(1, 1024), num_register_tokens=(0, 1024), drop_path_rate=(0, 0.99),
    pos_embed_rescale=(0, 100), freeze_backbone_layers=(0, 1000), freeze_backbone_until=(0, MANY),
    lora_targets=("qv", "all"), lora_r=(1, 2**16), lora_alpha=(1, 10**6), lora_dropout=(0, 0.99),
    # ---- heads ----
    dino_head_out_dim=(2, 10**7), dino_head_loss_weight=WEIGHT, dino_local_loss_weight=WEIGHT,
    head_hidden_dim=(1, 10**6), head_bottleneck_dim=(1, 10**6), ibot_loss_weight=WEIGHT,
    ibot_out_dim=(2, 10**7), ibot_mask_sample_probability=SHARE, ibot_mask_ratio_min_max=PART,
    # ---- losses and teacher ----
    objective=("feature", "prototype", "both"), feature_loss_kind=("cosine", "smooth_l1"),
    feature_whitening=SHARE, feature_cls_weight=WEIGHT, feature_patch_weight=WEIGHT,
    prototype_loss_weight=WEIGHT, centering=("centering", "sinkhorn_knopp"),
    student_temp=TEMPERATURE, teacher_temp=TEMPERATURE, warmup_teacher_temp=TEMPERATURE,
    warmup_teacher_temp_iterations=(0, MANY), momentum_teacher=SHARE, final_momentum_teacher=SHARE,
    koleo_loss_weight=WEIGHT, gram_loss_weight=WEIGHT, gram_teacher=("ema", "start", "snapshot"),
    gram_refresh_iterations=(0, MANY), gram_crops_size=(0, SIDE),
    # ---- optimizer ----
    global_batch_size=(1, 10**6), gradient_accumulation_steps=(0, 10**6), lr=(0, 100),
    min_lr=(0, 100), warmup_iterations=(0, MANY), weight_decay=(0, 100), weight_decay_end=(0, 100),
    adam_betas=(0, 0.99999), layerwise_decay=(0.01, 1), patch_embed_lr_mult=(0, 100),
    clip_grad=(0, 10**6), clip_grad_by=("parameter", "module"), freeze_last_layer=(0, MANY),
    freeze_last_layer_by=("grad", "lr"), freeze_backbone_iterations=(-1, MANY),
    # ---- system ----
    distribution=("ddp", "fsdp", "none"), mixed_precision=("bf16", "fp16", "no"),
    # ---- evaluate.py, attention.py ----
    checkpoint=("best", "last"), image_size=(0, SIDE), batch_size=(1, 10**6), knn_k=(1, 10**6),
    bootstrap=(0, 10**6), n_images=(0, 10**7), heat=("auto", "mean", "pca", "headN"),
    low_threshold=SHARE, high_threshold=SHARE, min_iou=SHARE,
    # ---- bench.py ----
    what=("strategy", "augment", "step", "data", "growth", "all"),
    strategy=("all", "standard", "lora", "freeze", "freeze_shared", "lora_freeze"),
    n_steps=(1, 10**6), rounds=(1, 10**6),
)
FROM_RUN = dict(dataset_size=(0, SIDE), mixed_precision=("bf16", "no"))  # 0 = as the run
OF_SCRIPT = dict(
    train=dict(global_crops_number=(2, 100)),  # one view teaches the others
    evaluate=FROM_RUN, attention=FROM_RUN,
    bench=dict(local_crops_number=(1, 100), mixed_precision=("bf16", "no"), n_images=(1, 10**7)),
)
LOW_HIGH = ("global_crops_scale", "local_crops_scale", "label_guided_crops_scale",
            "ibot_mask_ratio_min_max")  # pairs whose second number is not below the first

# Keys that do nothing while another key has one of these values
PROTOTYPE_KEYS = ("prototype_loss_weight", "dino_head_out_dim", "dino_head_norm_last_layer",
                  "head_hidden_dim", "head_bottleneck_dim", "centering", "student_temp",
                  "teacher_temp")
UNUSED = (
    ("use_lora", (False,), ("lora_targets", "lora_r", "lora_alpha", "lora_dropout")),
    ("local_crops_number", (0,), ("local_crops_scale",)),
    ("label_guided_crops_number", (0,), ("label_guided_crops_scale", "label_guided_classes")),
    ("dino_head_loss_weight", (0.0,), ("dino_local_loss_weight",)),
    ("head_weight_norm", (False,), ("dino_head_norm_last_layer", "ibot_norm_last_layer")),
    ("ibot_loss_weight", (0.0,), (
        "ibot_separate_head", "ibot_out_dim", "ibot_mask_sample_probability",
        "ibot_mask_ratio_min_max", "ibot_mask_exact")),
    ("ibot_separate_head", (False,), ("ibot_norm_last_layer",)),
    ("warmup_teacher_temp_iterations", (0,), ("warmup_teacher_temp",)),
    ("gram_loss_weight", (0.0,), ("gram_teacher", "gram_refresh_iterations", "gram_crops_size")),
    ("clip_grad", (0.0,), ("clip_grad_by",)),
    ("freeze_last_layer", (0,), ("freeze_last_layer_by",)),
    ("objective", ("feature",), PROTOTYPE_KEYS),
    ("objective", ("prototype",), (
        "feature_loss_kind", "feature_whitening", "feature_cls_weight", "feature_patch_weight")),
)


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
        return f"{key}={shown(value)}: choose one of {', '.join(bounds)}"
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


def unused(config, key):
    """Why a key of a config, a namespace, does nothing in its run; '' if it does something."""
    for switch, values, keys in UNUSED:
        if key in keys and getattr(config, switch, None) in values:
            return f"{switch}={getattr(config, switch)!r}"
    return ""


def step_bytes(config, network, num_channels, batch, n_shares=1, plain_attention=False):
    """(held, step): bytes of memory that training needs at least on one rank, computed.

    held: weights, and of every trained parameter the gradient, AdamW's two moments and the EMA,
    all fp32. step: the crops, what the blocks keep for the backward, and the logits.
    Args: config: namespace of train.py's or distill.py's keys; network: the backbone's transformers
    config; batch: images of a micro-batch; n_shares: ranks that share the weights (FSDP);
    plain_attention: True if a block keeps the matrix of all pairs of tokens, as on a CPU.
    """
    def get(key, default=0):
        return getattr(config, key, default)

    width, patch = network.hidden_size, network.patch_size
    hidden = getattr(network, "intermediate_size", 0) or int(width * network.mlp_ratio)
    trained_blocks = max(0, network.num_hidden_layers - config.freeze_backbone_layers)
    if config.freeze_backbone_iterations >= config.max_iterations:
        trained_blocks = 0  # only the heads are ever trained
    block = 4 * width**2 + 2 * width * hidden  # parameters
    embedding = num_channels * patch**2 * width
    backbone = network.num_hidden_layers * block + embedding
    prototypes = []  # K of each head
    if get("objective") != "feature":
        prototypes.append(config.dino_head_out_dim)
    if get("ibot_loss_weight") > 0 and config.ibot_separate_head:
        prototypes.append(config.ibot_out_dim)
    h, b = config.head_hidden_dim, config.head_bottleneck_dim
    heads = sum(h * (width + h + b) + b * K for K in prototypes)
    trained = heads + (0 if config.use_lora else trained_blocks * block)
    held = 4 * (backbone + heads + 4 * trained) // n_shares

    V, L = config.global_crops_number, config.local_crops_number
    L += get("label_guided_crops_number")
    half = 2 if config.mixed_precision != "no" else 4  # bytes
    step = 0
    for number, side in ((V, config.global_crops_size), (L, config.local_crops_size)):
        n = (side // patch) ** 2 + 1  # tokens
        block = n * (8 * width + 2 * hidden) * half
        if plain_attention:
            block += network.num_attention_heads * n**2 * half
        blocks = max(1, trained_blocks) * block  # the teacher computes one, too
        if config.activation_checkpointing:
            blocks = trained_blocks * n * width * half + block
        step += number * batch * (blocks + 4 * num_channels * side**2)
    masked = 0
    if get("gram_loss_weight") > 0:  # pixels of the anchor's crops
        step += 4 * V * batch * num_channels * config.gram_crops_size**2
    if get("ibot_loss_weight") > 0:
        patches = (config.global_crops_size // patch) ** 2
        share = config.ibot_mask_sample_probability * config.ibot_mask_ratio_min_max[0]
        masked = int(V * batch * patches * share)
    rows = [(2 * V + L) * batch, 2 * masked]  # of the logits of student and teacher
    for n, K in zip(rows, prototypes):
        step += 4 * K * (n + 2 * b)  # and of the normalised prototypes and their gradient
    return held, step
