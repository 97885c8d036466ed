"""What depends on several keys at once: pairs that do not fit, keys without effect, memory."""
import math
import os

from configurator import UserError

# Keys that do nothing while another key has one of these values
PROTOTYPE_KEYS = ("prototype_loss_weight", "dino_head_out_dim", "dino_head_norm_last_layer",
                  "head_hidden_dim", "head_bottleneck_dim", "centering", "student_temp",
                  "teacher_temp")
UNUSED = (
    ("use_lora", (False,), ("lora_targets", "lora_r", "lora_alpha",
                            "lora_dropout", "lora_rslora")),
    ("local_crops_number", (0,), ("local_crops_scale",)),
    ("label_guided_crops_number", (0,), ("label_guided_crops_scale", "label_guided_classes")),
    ("dino_head_loss_weight", (0.0,), ("dino_local_loss_weight",)),
    ("head_weight_norm", (False,), ("dino_head_norm_last_layer", "ibot_norm_last_layer")),
    ("ibot_loss_weight", (0.0,), (
        "ibot_separate_head", "ibot_out_dim", "ibot_mask_sample_probability",
        "ibot_mask_ratio_min_max", "ibot_mask_exact")),
    ("ibot_mask_sample_probability", (0.0,), ("ibot_loss_weight",)),  # no crop gets a mask
    ("ibot_separate_head", (False,), ("ibot_norm_last_layer",)),
    ("warmup_teacher_temp_iterations", (0,), ("warmup_teacher_temp",)),
    ("koleo_loss_weight", (0.0,), ("koleo_group_size",)),
    ("lejepa_loss_weight", (0.0,), ("lejepa_sigreg_weight", "lejepa_out_dim")),
    ("diet_loss_weight", (0.0,), ("diet_label_smoothing",)),
    ("gram_loss_weight", (0.0,), ("gram_teacher", "gram_refresh_iterations", "gram_crops_size")),
    ("clip_grad", (0.0,), ("clip_grad_by",)),
    ("freeze_last_layer", (0,), ("freeze_last_layer_by",)),
    ("objective", ("feature",), PROTOTYPE_KEYS),
    ("objective", ("prototype",), (
        "feature_loss_kind", "feature_whitening", "feature_cls_weight", "feature_patch_weight")),
)

# Of train.py: they do nothing if no loss compares prototypes
TEACHER_KEYS = ("dino_head_out_dim", "dino_head_norm_last_layer", "head_bottleneck_dim",
                "head_weight_norm", "centering", "student_temp", "teacher_temp",
                "warmup_teacher_temp", "warmup_teacher_temp_iterations", "freeze_last_layer",
                "freeze_last_layer_by")

# How folders and single files are read; MedMNIST, phantoms and .npz files have none of it
FILE_KEYS = ("series", "volume_index", "slice_step_mm", "group_level", "max_image_pixels")


class Checks:
    """Collects what is wrong with a config, a namespace; report() raises all of it at once."""

    def __init__(self, config):
        self.config, self.errors, self.notes = config, [], []

    def need(self, ok, message):
        """An error unless ok."""
        if not ok:
            self.errors.append(message)

    def note(self, condition, message):
        """A remark that report() returns if the condition holds: allowed, but without effect."""
        if condition:
            self.notes.append(message)

    def network(self, families):
        """The width of a network from scratch divides by its heads. families: model.FAMILIES."""
        entries = getattr(self.config, "backbone_config", {})
        self.need(not entries or not self.config.use_pretrained, f"backbone_config={entries} with "
                  "use_pretrained=true: released weights have a shape of their own; leave it out, "
                  "or set --use_pretrained=false")
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        family = self.config.model_type
        self.need(family not in families or width % heads == 0,
                  f"hidden_size={width} is not a multiple of num_attention_heads={heads}")
        self.need(family != "dinov3_vit" or width % (4 * heads) == 0,
                  f"hidden_size={width} with num_attention_heads={heads}: a head of dinov3_vit has "
                  "a multiple of 4 dimensions, for its rotary positions")

    def training(self, n_ranks, families, changed=()):
        """What train.py and distill.py ask alike: the batch divides by ranks and micro-batches, the
        width by heads, several ranks need ddp or fsdp. Notes on keys without effect.

        Args: families: model.FAMILIES; changed: keys that differ from their default."""
        config = self.config
        for key in changed:
            if key == "warmup_teacher_temp" and config.warmup_teacher_temp == config.teacher_temp:
                continue  # this is how config files say that there is no warm-up
            why = unused(config, key)
            self.note(why, f"{key}={getattr(config, key)!r} has no effect: {why}")
        self.note(n_ranks == 1 and config.distribution == "fsdp",
                  "distribution='fsdp' has no effect: there is one process")
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        self.note(asked not in ("no", config.mixed_precision), f"accelerate's mixed_precision="
                  f"{asked} has no effect: mixed_precision={config.mixed_precision!r} has")
        self.note(os.environ.get("ACCELERATE_USE_FSDP") == "true" and config.distribution != "fsdp",
                  "accelerate's FSDP settings have no effect: use --distribution=fsdp")
        n_small = config.local_crops_number + getattr(config, "label_guided_crops_number", 0)
        self.note(n_small == 0 and "local_crops_size" in changed, "local_crops_size="
                  f"{config.local_crops_size} has no effect: there are no local crops")
        path = os.path.expanduser(config.dataset_path)
        not_read = ("dataset_size", "download_url") if os.path.exists(path) else FILE_KEYS
        if path.endswith(".npz"):
            not_read += FILE_KEYS
        for key in changed:
            self.note(key in not_read, f"{key}={getattr(config, key)!r} has no effect on "
                      f"dataset_path={config.dataset_path!r}")
        size, steps = config.global_batch_size, config.gradient_accumulation_steps
        per_rank = size // n_ranks
        self.need(size % n_ranks == 0,
                  f"global_batch_size={size} cannot be shared by {n_ranks} ranks; use a multiple, "
                  f"like {math.ceil(size / n_ranks) * n_ranks}")
        self.need(per_rank % max(1, steps) == 0, f"gradient_accumulation_steps={steps} does not "
                  f"divide the {per_rank} images of a rank")
        self.need(n_ranks == 1 or config.distribution != "none",
                  f"distribution='none' with {n_ranks} processes: use ddp, or start one")
        self.network(families)
        self.need(config.pos_embed_rescale == 0 or config.pos_embed_rescale >= 1,
                  f"pos_embed_rescale={config.pos_embed_rescale}: positions are scaled by up to "
                  "this, so it is 1 at least, or 0 = off")
        self.need(config.train_only == "all" or not config.use_lora,
                  f"train_only={config.train_only!r} with use_lora=true: the weights are frozen; "
                  "use lora_targets='o_proj', or leave one out")
        warmup, length = config.warmup_iterations, config.max_iterations
        self.note(warmup >= length, f"warmup_iterations={warmup} of max_iterations={length}: the "
                  f"run ends before the rate reaches lr={config.lr}")

    def report(self):
        """Raise UserError with all errors; without errors return the notes."""
        if self.errors:
            raise UserError("\n       ".join(self.errors))
        return self.notes


def unused(config, key):
    """Why a key of a config, a namespace, does nothing in its run; '' if it does something."""
    for switch, values, keys in UNUSED:
        if key in keys and getattr(config, switch, None) in values:
            return f"{switch}={getattr(config, switch)!r}"
    if not uses_prototypes(config):
        if key in TEACHER_KEYS or (key == "head_hidden_dim" and config.lejepa_loss_weight == 0):
            return "no loss uses prototypes"
        others = config.lejepa_loss_weight, config.diet_loss_weight
        if key == "local_crops_number" and not any(others):
            return "no loss uses local crops"
    return ""


def uses_prototypes(config):
    """True if a loss compares distributions over prototypes, which a teacher has to give. config:
    namespace of train.py's keys; distill.py has a switch of its own, so there it is True."""
    keys = ("dino_head_loss_weight", "ibot_loss_weight", "label_guided_loss_weight")
    return any(getattr(config, key, 1) > 0 for key in keys)


def step_bytes(config, network, num_channels, batch, n_shares=1, plain_attention=False,
               n_images=0):
    """(held, step): bytes of memory that training needs at least on one rank, computed.

    held: weights, and of every trained parameter the gradient, AdamW's two moments and the EMA,
    all fp32. step: the crops, what the blocks keep for the backward, and the logits.
    Args: config: namespace of train.py's or distill.py's keys; network: the backbone's transformers
    config; batch: images of a micro-batch; n_shares: ranks that share the weights (FSDP);
    plain_attention: True if a block keeps the matrix of all pairs of tokens, as on a CPU; n_images:
    of the training set, classes of DIET.
    """
    def get(key, default=0):
        return getattr(config, key, default)

    width, patch = network.hidden_size, network.patch_size
    hidden = getattr(network, "intermediate_size", 0) or int(width * network.mlp_ratio)
    is_gated = getattr(network, "use_gated_mlp", False)
    if getattr(network, "use_swiglu_ffn", False):  # two thirds, up to a multiple of 8
        is_gated, hidden = True, (hidden * 2 // 3 + 7) // 8 * 8
    trained_blocks = max(0, network.num_hidden_layers - config.freeze_backbone_layers)
    whole_blocks = 0 if config.use_lora else trained_blocks  # whose weights are trained
    if config.train_last_blocks > 0:
        whole_blocks = min(config.train_last_blocks, trained_blocks)
        trained_blocks = trained_blocks if config.use_lora else whole_blocks
    if config.freeze_backbone_iterations >= config.max_iterations:
        trained_blocks = whole_blocks = 0  # only the heads are ever trained
    block = 4 * width**2 + (3 if is_gated else 2) * width * hidden  # parameters
    embedding = num_channels * patch**2 * width
    backbone = network.num_hidden_layers * block + embedding
    prototypes = []  # K of each head
    if get("objective") != "feature" and uses_prototypes(config):
        prototypes.append(config.dino_head_out_dim)
    if get("ibot_loss_weight") > 0 and config.ibot_separate_head:
        prototypes.append(config.ibot_out_dim)
    h, b = config.head_hidden_dim, config.head_bottleneck_dim
    heads = sum(h * (width + h + b) + b * K for K in prototypes)
    if get("lejepa_loss_weight") > 0:
        heads += h * (width + h + config.lejepa_out_dim)
    if get("diet_loss_weight") > 0:
        heads += width * n_images
    only_output = config.train_only == "attention_output"
    trained = heads + whole_blocks * (width**2 if only_output else block)
    held = 4 * (backbone + heads + 4 * trained) // n_shares

    V, L = config.global_crops_number, config.local_crops_number
    L += get("label_guided_crops_number")
    half = 2 if config.mixed_precision != "no" else 4  # bytes
    step = 0
    for number, side in ((V, config.global_crops_size), (L, config.local_crops_size)):
        n = (side // patch) ** 2 + 1  # tokens
        block = n * (8 * width + (4 if is_gated else 2) * hidden) * half
        if only_output:  # no input of a frozen Linear
            block = n * (6 * width + hidden) * half
        if plain_attention:
            block += network.num_attention_heads * n**2 * half
        blocks = max(1, trained_blocks) * block  # the teacher computes one, too
        if config.activation_checkpointing:
            blocks = trained_blocks * n * width * half + block
        step += number * batch * (blocks + 4 * num_channels * side**2)
    if get("cls_anchor_loss_weight") > 0:
        step += 4 * batch * num_channels * config.global_crops_size**2
    if get("lejepa_loss_weight") > 0:  # cosines and sines of SIGReg: 256 directions, 17 points
        step += 2 * 4 * (V + L) * batch * 256 * 17
    if get("diet_loss_weight") > 0:  # logits and their gradient
        step += 2 * 4 * (V + L) * batch * n_images
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
