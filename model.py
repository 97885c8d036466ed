"""The networks: a Hugging Face ViT as backbone, DINO heads, the student, and its EMA teacher.

Everything here takes the four families of transformers alike: 'vit' (DINO), 'dinov2',
'dinov2_with_registers', 'dinov3_vit'. forward_features hides their differences.

Shape letters, used in all files: B images per rank, V views (global crops), L local crops,
P patches, M masked patches in the batch, D embed dim, K prototypes, C channels, H W pixels,
h w patch grid, p patch size. View-major always: crop v of image b is row v * B + b.
masks: bool, True = masked = the student sees the mask token there.
"""
import contextlib
import os
import warnings

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from augment import masked_tokens
from checks import step_bytes, uses_prototypes
from configurator import UserError
from distributed import (accumulation_steps, local_shard, memory_gb, only_shapes, regathered,
                         shard_like, swap, unwrap, world_size)
from last_block import LastBlock, split_last_block, use_plain_attention, used_tokens
from weights import (FAMILIES, constructor_arguments, find_config, first_line, load_values,
                     with_entries)

SIZE_KEYS = ("hidden_size", "num_hidden_layers", "patch_size", "num_attention_heads",
             "num_register_tokens")  # config keys that give a family its shape


# ---- backbone ----

def build_backbone(model_type, use_pretrained=True, num_channels=3, backbone_config=None,
                   **size_keys):
    """A Hugging Face ViT of one of the four families, with a patch embedding for num_channels.

    Args: model_type: a hub id, a local directory or an original .pth file, for its weights or
    (use_pretrained=False) its shape with random weights; or a family, from scratch; num_channels: 0
    = as many as model_type has; backbone_config: dict, from scratch only: other keys of the HF
    config, UserError if the family lacks one; size_keys: keys of the HF config (hidden_size, ...).
    Those that the family lacks are ignored. With pretrained weights only keys that change no shape.
    Returns: PreTrainedModel in fp32, without pooler, with a mask token. Raises UserError if it
    cannot be loaded.
    """
    config, values = find_config(model_type, use_pretrained, size_keys)
    num_channels = num_channels or config.num_channels
    for key, value in size_keys.items():
        if use_pretrained and key not in ("drop_path_rate", "pos_embed_rescale"):
            raise UserError(f"{key}={value} would change the shape of the pretrained "
                            f"{model_type!r}; leave it out, or set --use_pretrained=false")
        if hasattr(config, key):
            setattr(config, key, value)
    if not use_pretrained:
        config.num_channels = num_channels
        config = with_entries(config, backbone_config or {})
    if hasattr(config, "use_mask_token"):  # iBOT needs one; if the weights lack it, it is new
        config.use_mask_token = True
    try:
        if not use_pretrained or only_shapes():
            extra = constructor_arguments(config)
            backbone = transformers.AutoModel.from_config(config, **extra).float()
        else:
            backbone = load_values(config, model_type, values, f"model_type={model_type!r}")
    except (ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model_type={model_type!r}: no model can be built from its config.json "
                        f"({first_line(error)})") from None
    backbone.patch_embed_inflated = config.num_channels != num_channels  # trained with the heads
    if backbone.patch_embed_inflated:
        set_channels(backbone, num_channels)
    for part in blocks(backbone).modules():
        if isinstance(part, nn.LayerNorm):
            part.register_forward_hook(round_once)
    split_last_block(blocks(backbone)[-1])
    return backbone


def round_once(_, inputs, tokens):
    """Forward hook of a block's norms: cast their fp32 output to the dtype of autocast. Else each
    of the query, key and value projections makes a copy, and keeps it until the backward."""
    device = tokens.device.type
    is_on = torch.is_autocast_enabled(device)
    return tokens.to(torch.get_autocast_dtype(device)) if is_on else tokens


def inflate_patch_embed(weight, num_channels):
    """Turn the filters of a patch embedding, [D,3,p,p], into those for num_channels, [D,C,p,p].
    Each new filter is the mean over the given channels times 3/C: a pattern that is the same in all
    channels keeps its response. For C = 1 this is the sum of the filters. Weights with another
    number of channels than 3 work alike; with C channels they are returned as they are."""
    given = weight.shape[1]
    if given == num_channels:
        return weight
    mean = weight.mean(dim=1, keepdim=True)  # [D,1,p,p]
    return mean.repeat(1, num_channels, 1, 1) * (given / num_channels)


def set_channels(backbone, num_channels):
    """Inflate the patch embedding in place, and tell the HF config, so that exports reload."""
    for parent in backbone.modules():
        for name, conv in parent.named_children():
            if not isinstance(conv, nn.Conv2d):
                continue
            new = nn.Conv2d(num_channels, conv.out_channels, conv.kernel_size, conv.stride,
                            bias=conv.bias is not None)
            new.weight = nn.Parameter(inflate_patch_embed(conv.weight.detach(), num_channels))
            new.bias = conv.bias
            setattr(parent, name, new)
            if hasattr(parent, "num_channels"):
                parent.num_channels = num_channels
    backbone.config.num_channels = num_channels


def backbone_from_config(config, num_channels):
    """build_backbone with the keys of a script's config, a dict. If model_type is a family, the
    config gives the sizes; all other models have sizes of their own."""
    sizes = {} if config["use_pretrained"] else dict(image_size=config["global_crops_size"])
    if config["model_type"] in FAMILIES:
        sizes.update({key: config[key] for key in SIZE_KEYS})
    return build_backbone(config["model_type"], config["use_pretrained"], num_channels,
                          config.get("backbone_config"),
                          drop_path_rate=config["drop_path_rate"],
                          pos_embed_rescale=config["pos_embed_rescale"] or None, **sizes)


def adapted_backbone(config, num_channels, device, say=print, changed=(), n_images=0):
    """The backbone that a run trains: released or random weights, with LoRA, with frozen layers.
    Args: config: namespace of a script's keys; device: where it will run; say: gets a text for
    every key without effect; changed: keys that differ from their default (configurator.override);
    n_images: of the training set.
    Returns: the backbone on the CPU, or its peft wrapper. Raises UserError."""
    check_memory(config, num_channels, device, say, n_images)
    backbone = backbone_from_config(vars(config), num_channels)
    check_crop_sizes(config, backbone.config.patch_size, say)
    for note in keys_without_effect(config, backbone.config, changed):
        say(f"note: {note}")
    if device.type == "cpu":
        use_plain_attention(backbone)
    if getattr(config, "ibot_loss_weight", 0) == 0:  # unused; DDP would wait for its gradient
        for name, param in backbone.named_parameters():
            if "mask_token" in name:
                param.requires_grad_(False)
    backbone = add_adapters(backbone, config)
    freeze_for_the_run(backbone, config)
    if config.activation_checkpointing:
        backbone.activation_checkpointing_enable({"use_reentrant": False})
    return backbone


def add_adapters(backbone, config):
    """The backbone with the LoRA adapters that a run's config (a namespace) asks for, if any."""
    if not config.use_lora:
        return backbone
    thaws = getattr(config, "freeze_backbone_until", 0) > 0
    skip_blocks = 0 if thaws else config.freeze_backbone_layers  # none in blocks that stay frozen
    return add_lora(backbone, config.lora_r, config.lora_alpha, config.lora_dropout,
                    config.lora_targets, skip_blocks, getattr(config, "train_last_blocks", 0),
                    getattr(config, "lora_rslora", False))


def check_memory(config, num_channels, device, say, n_images=0):
    """UserError, before anything is allocated, if the device cannot hold the training that a config
    asks for; a warning if it hardly can. Args: as adapted_backbone."""
    if only_shapes():
        return
    sizes = {key: getattr(config, key) for key in SIZE_KEYS}
    network, _ = find_config(config.model_type, config.use_pretrained, sizes)
    if not config.use_pretrained:
        network = with_entries(network, getattr(config, "backbone_config", {}))
    n_micro = accumulation_steps(config.global_batch_size, config.gradient_accumulation_steps)
    batch = config.global_batch_size // world_size() // n_micro
    n_shares = world_size() if config.distribution == "fsdp" else 1
    held, step = step_bytes(config, network, num_channels, batch, n_shares, device.type == "cpu",
                            n_images)
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    needed, total = n_here * (held + step) / 1e9, memory_gb(device)[1]
    text = (f"training needs at least {needed:.1f} GB on {device}, which has {total:.1f}: per rank "
            f"{held / 1e9:.1f} for weights, gradients, optimizer and teacher, {step / 1e9:.1f} for "
            f"{batch} image(s) at once. Raise gradient_accumulation_steps, lower sizes or numbers "
            "of crops, dino_head_out_dim or sizes of the network, or use activation_checkpointing")
    if needed > total:
        raise UserError(text)
    if needed > total / 2:  # measured peaks were 1.6 to 2.2 times what is counted
        say(f"!!!! {text} !!!!")


def check_crop_sizes(config, patch_size, say=print):
    """UserError if the size of a crop that the config asks for is not a multiple of the patch.
    Local crops are made smaller by the rest, as the paper's own need it (96 pixels, patches of 14):
    `say` gets a note."""
    keys = ["global_crops_size"]
    if config.local_crops_number + getattr(config, "label_guided_crops_number", 0) > 0:
        keys.append("local_crops_size")
    if getattr(config, "gram_loss_weight", 0) > 0:
        keys.append("gram_crops_size")
    for key in keys:
        size = getattr(config, key)
        below = size // patch_size * patch_size
        if size != below:
            sizes = f"{below} or {below + patch_size}" if below else f"{patch_size}"
            if key == "local_crops_size" and below:
                say(f"note: local_crops_size={size} is not a multiple of patch_size={patch_size}: "
                    f"local crops have {below} pixels; {below + patch_size} is the next size")
                continue
            raise UserError(f"{key}={size} is not a multiple of patch_size={patch_size} of "
                            f"{config.model_type}; use {sizes}")


def keys_without_effect(config, backbone_config, changed=()):
    """A sentence for every key that was set but has no effect on this model. A size key was set if
    it is among `changed`. Args: as adapted_backbone; backbone_config: of transformers."""
    notes, family = [], backbone_config.model_type
    first, n = backbone_config.num_hidden_layers - config.train_last_blocks, 0
    if config.train_last_blocks > 0 and not config.use_lora:
        n = config.freeze_backbone_layers
    if 0 < n <= first:
        notes.append(f"freeze_backbone_layers={n} has no effect: train_last_blocks="
                     f"{config.train_last_blocks} freezes the first {first} blocks for good")
    for key, what in (("drop_path_rate", "stochastic depth"),
                      ("pos_embed_rescale", "random scale of positions")):
        value = getattr(config, key)
        if value > 0 and not hasattr(backbone_config, key):
            notes.append(f"{family} has no {what} in transformers; {key}={value} has no effect")
    for key in [key for key in SIZE_KEYS if key in changed]:
        no_effect = f"{key}={getattr(config, key)} has no effect"
        if config.model_type not in FAMILIES:
            notes.append(f"{config.model_type} has sizes of its own; {no_effect}")
        elif not hasattr(backbone_config, key):
            notes.append(f"{family} has no {key} in transformers; {no_effect}")
    return notes


def compile_blocks(backbone):
    """torch.compile every block in place. Blocks share one graph per crop size, mode and device."""
    torch._dynamo.config.recompile_limit = 64  # at its default, 8, torch stops compiling silently
    for block in blocks(backbone):
        block.compile()


def core(backbone):
    """The Hugging Face model itself, without the peft wrapper that it may have."""
    return backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone


def blocks(backbone):
    """The transformer blocks of any family, an nn.ModuleList."""
    for name, module in core(backbone).named_modules():
        last_name = name.split(".")[-1]
        if isinstance(module, nn.ModuleList) and last_name in ("layer", "layers"):
            return module


# The forward is written out, in three parts: embed, run_blocks, final_norm. So frozen blocks can
# run once for student and teacher; hooks, torch.compile and checkpointing work block by block.

def embed(backbone, pixels, masks=None):
    """The input of the first block: tokens [B,1+R+P,D], R of them registers, and rope, a dict of
    keyword arguments for every block. Args and errors: as forward_features."""
    config, model = backbone.config, core(backbone)
    height, width = pixels.shape[-2:]
    if height % config.patch_size or width % config.patch_size:
        raise UserError(f"crop of {height}x{width} pixels is not a multiple of "
                        f"patch_size={config.patch_size}")
    # without this ViT refuses every size except that of its config
    extra = dict(interpolate_pos_encoding=True) if config.model_type == "vit" else {}
    tokens = model.embeddings(pixels, bool_masked_pos=masks, **extra)  # [B,1+R+P,D]
    if not hasattr(model, "rope_embeddings"):  # positions are in the tokens
        return tokens, {}
    return tokens, dict(position_embeddings=model.rope_embeddings(pixels))  # DINOv3


def first_blocks(backbone, pixels, n, masks=None):
    """What used_features and forward_features go on from: tokens after the first n blocks, rope, n.
    Args and errors: as forward_features."""
    tokens, rope = embed(backbone, pixels, masks)
    return run_blocks(backbone, tokens, rope, 0, n), rope, n


def run_blocks(backbone, tokens, rope, first=0, last=None, used=None):
    """Tokens [B,1+R+P,D] through blocks `first` up to, not including, `last` (None: to the end).
    With `used`, of used_tokens, only those tokens are computed in the last block and returned,
    [number of used tokens,D]. Compiled blocks and block hooks do not mind."""
    for block in list(blocks(backbone))[first:last]:
        if used is not None and isinstance(block, LastBlock):
            return block(tokens, used=used, **rope)
        tokens = block(tokens, **rope)
    return tokens if used is None else tokens[used[:2]]


def final_norm(backbone):
    """The norm after the last block, a module."""
    network = core(backbone)
    return network.norm if hasattr(network, "norm") else network.layernorm


def first_patch(backbone):
    """The number of the first patch among the tokens: behind CLS and the registers."""
    return 1 + getattr(backbone.config, "num_register_tokens", 0)


def forward_features(backbone, pixels, masks=None, shared=None):
    """CLS and patch tokens after the final norm, for any family: cls [B,D], patches [B,P,D].
    Args: backbone: a PreTrainedModel or its peft wrapper; pixels [B,C,H,W]; masks [B,P] bool,
    True = the mask token replaces the patch; shared: what the first blocks made of the pixels
    (Student.forward), or None. UserError if H or W is no multiple of the patch."""
    shared = shared or embed(backbone, pixels, masks)
    tokens = final_norm(backbone)(run_blocks(backbone, *shared))
    return tokens[:, 0], tokens[:, first_patch(backbone):]


def forward_cls(backbone, pixels):
    """The CLS token of forward_features, [B,D], without the other tokens of the last block."""
    return used_features(backbone, *embed(backbone, pixels))[0]


def used_features(backbone, tokens, rope, first=0, masked=None, with_patches=False):
    """The features that training uses, after the final norm: cls [B,D], masked patches [M,D], and
    all patches [B,P,D] or None.

    Here is decided what the last block computes: all tokens if all patches are wanted, else CLS
    and, with `masked` of augment.masked_tokens, the masked patches (last_block.py).
    Args: tokens, rope: of embed, or after the blocks before block `first`.
    """
    used, patches = used_tokens(tokens, first_patch(backbone), masked), None
    B = len(tokens)
    tokens = run_blocks(backbone, tokens, rope, first, used=None if with_patches else used)
    tokens = final_norm(backbone)(tokens)
    if with_patches:
        patches = tokens[:, first_patch(backbone):]
        tokens = tokens[used[:2]]
    return tokens[:B], tokens[B:], patches


# ---- what is trained ----

def freeze_layers(backbone, n):
    """Freeze the embeddings and the first n blocks (paper section 2.2.1); n = 0 freezes nothing."""
    if n > len(blocks(backbone)):
        raise UserError(f"freeze_backbone_layers={n}, but the backbone has "
                        f"{len(blocks(backbone))} blocks")
    if n > 0:
        for name, param in backbone.named_parameters():
            if "embeddings" in name:
                param.requires_grad_(False)
        for block in blocks(backbone)[:n]:
            block.requires_grad_(False)


def freeze_for_the_run(backbone, config):
    """Freeze what a run's config (a namespace) never trains; the larger freeze counts. Layers that
    thaw are frozen by optim.build_optimizer."""
    depth, last = len(blocks(backbone)), config.train_last_blocks
    check_last_blocks(last, depth)
    n = 0
    if getattr(config, "freeze_backbone_until", 0) == 0:
        n = config.freeze_backbone_layers
    if last > 0 and not config.use_lora:  # with adapters add_lora chooses
        core(backbone).embeddings.requires_grad_(False)
        n = max(n, depth - last)
    freeze_layers(backbone, n)
    if config.train_only == "attention_output":
        train_attention_output(backbone)


def check_last_blocks(n, depth):
    if n > depth:
        raise UserError(f"train_last_blocks={n}, but the backbone has {depth} blocks")


def train_attention_output(backbone):
    """Freeze everything except the projection behind the attention, weight and bias, of the blocks
    that are trained: APLA (arXiv 2503.11335)."""
    for name, param in backbone.named_parameters():
        if ".attention.o_proj." not in name:
            param.requires_grad_(False)


def add_lora(backbone, r=4, alpha=16, dropout=0.1,
             targets="qv", skip_blocks=0, whole_blocks=0, rslora=False):
    """Freeze the backbone and add low-rank adapters, W + (alpha / r) B A with B = 0 at the start
    (LoRA, arXiv 2106.09685; paper section 2.2.3). Returns: the peft wrapper.

    whole_blocks: so many last blocks, and the final norm, are trained whole and get no adapters:
    ExPLoRA (arXiv 2406.10973). They stand in modules_to_save of the adapter's config, and an
    exported adapter holds them; peft's own copies of such modules would double their memory.
    Args: targets: 'qv' = query and value projections, 'all' = every Linear of attention and MLP, or
    names of linear layers, separated by commas; skip_blocks: so many first blocks get no adapters;
    rslora: scale by alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
    import peft
    layers = blocks(backbone)
    depth = len(layers)
    check_last_blocks(whole_blocks, depth)
    last = depth - whole_blocks
    if skip_blocks >= last:
        raise UserError(f"use_lora with freeze_backbone_layers={skip_blocks} and train_last_blocks="
                        f"{whole_blocks}: of {depth} blocks none is left for adapters; freeze and "
                        f"train fewer than {depth} together")
    prefix = next(name for name, module in backbone.named_modules() if module is layers)
    linears = {}  # full name: last part of the name
    for name, module in layers.named_modules():
        number = int(name.split(".")[0] or -1)  # of its block; the list itself has no name
        if isinstance(module, nn.Linear) and skip_blocks <= number < last:
            linears[f"{prefix}.{name}"] = name.split(".")[-1]
    linears = choose_linears(linears, targets)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora,
                             target_modules=list(linears))
    norm = final_norm(backbone)
    norm_name = next(name for name, module in backbone.named_modules() if module is norm)
    with warnings.catch_warnings():  # peft uses a name that transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(backbone, config)
    if whole_blocks > 0:
        names = [f"{prefix}.{i}" for i in range(last, depth)]
        adapted.peft_config["default"].modules_to_save = [*names, norm_name]
        for module in (*layers[last:], norm):
            module.requires_grad_(True)
    return adapted


def choose_linears(linears, targets):
    """Of {path: last part of its name} those that lora_targets asks for. UserError if it asks for
    a name that is not there."""
    if targets == "all":
        return linears
    present = sorted(set(linears.values()))
    wanted = [name.strip() for name in targets.split(",")]
    if targets == "qv":
        wanted = [name for name in ("q_proj", "v_proj", "query", "value")  # transformers 5, 4
                  if name in present]
    missing = [name for name in wanted if name not in present]
    if missing or not wanted:
        raise UserError(f"lora_targets={targets!r}: the blocks have no linear layer "
                        f"{(missing or ['q_proj'])[0]!r}; use qv, all, or names out of "
                        f"{', '.join(present)}")
    return {path: name for path, name in linears.items() if name in wanted}


def frozen_blocks(backbone):
    """How many leading blocks are frozen at present; 0 if the embeddings are trained. These blocks
    run no backward, because neither they nor anything before them needs a gradient."""
    if any(param.requires_grad for param in core(backbone).embeddings.parameters()):
        return 0
    for i, block in enumerate(blocks(backbone)):
        if any(param.requires_grad for param in block.parameters()):
            return i
    return len(blocks(backbone))


def set_trainable(student, train_from, iteration):
    """Set requires_grad for this iteration. Parameter `name` is trained from iteration
    train_from[name] on; without an entry it is never trained.

    This serves the backbone that waits for its heads, and layers that thaw. Until then autograd
    skips their backward, and AdamW neither decays them nor keeps moments of them.
    Returns: True if anything changed. Then the teacher has to take_in the new parameters, and DDP
    has to be built anew, because it registers trained parameters when it is built.
    """
    changed = False
    for name, param in student.named_parameters():
        is_trained = train_from.get(name, float("inf")) <= iteration
        changed |= is_trained != param.requires_grad
        param.requires_grad_(is_trained)
    student.train(student.training)  # Student.train puts frozen blocks into eval mode
    return changed


def parameter_counts(student):
    """dict(trainable_m, total_m): millions of parameters that are trained now, and of all."""
    trainable = sum(param.numel() for param in student.parameters() if param.requires_grad)
    total = sum(param.numel() for param in student.parameters())
    return dict(trainable_m=trainable / 1e6, total_m=total / 1e6)


def describe_student(student, config, iteration):
    """What is trained from this iteration on, in one line. config: namespace of a script's keys."""
    backbone, count = student.backbone, parameter_counts(student)
    start = "pretrained" if config.use_pretrained else "from scratch"
    return (f"model: {config.model_type} ({backbone.config.model_type}, {start}), width "
            f"{backbone.config.hidden_size}, patch {backbone.config.patch_size}; from iteration "
            f"{iteration} on {count['trainable_m']:.2f} M of {count['total_m']:.2f} M parameters "
            f"are trained, heads included; first {frozen_blocks(backbone)} of "
            f"{len(blocks(backbone))} blocks frozen")


class DINOHead(nn.Module):
    """Features [N,D] -> logits [N,K]. DINO (arXiv 2104.14294) appendix C.
    n_layers of Linear and GELU to the bottleneck, unit length, then K prototypes without bias.
    DINO and DINOv2 normalise the prototypes (weight norm): their gain is frozen at 1 with
    norm_last_layer, else trained. DINOv3: weight_norm=False, a plain Linear."""

    def __init__(self, in_dim, out_dim, hidden_dim=2048, bottleneck_dim=256, norm_last_layer=True,
                 weight_norm=True, n_layers=3):
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (n_layers - 1) + [bottleneck_dim]
        layers = []
        for width, next_width in zip(widths, widths[1:]):
            layers += [nn.Linear(width, next_width), nn.GELU()]
        layers.pop()  # no GELU after the last Linear
        self.mlp = nn.Sequential(*layers) if n_layers > 1 else layers[0]
        for layer in layers[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)
        if not weight_norm:
            nn.init.trunc_normal_(self.last_layer.weight, std=0.02)
            return
        self.last_layer = nn.utils.parametrizations.weight_norm(self.last_layer)  # W = g v / |v|
        gain = self.last_layer.parametrizations.weight.original0  # [K,1]
        nn.init.ones_(gain)
        gain.requires_grad_(not norm_last_layer)

    def forward(self, features):
        bottleneck = self.mlp(features).float()  # bf16 would give unit length to two digits only
        return self.last_layer(F.normalize(bottleneck, dim=-1))


def lejepa_head(in_dim, out_dim, hidden_dim=2048):
    """Features [N,D] -> embeddings [N,E] for LeJEPA. The authors have batch norm, this has layer
    norm: an embedding then depends on its own crop only, on any number of ranks."""
    layers = []
    for width in (in_dim, hidden_dim):
        layers += [nn.Linear(width, hidden_dim), nn.LayerNorm(hidden_dim), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(hidden_dim, out_dim))


def build_heads(width, config, n_images):
    """The heads that the losses of train.py's config (a namespace) need, as arguments of Student.
    n_images: of the training set, one class each for DIET."""
    heads = {}
    sizes = dict(hidden_dim=config.head_hidden_dim, bottleneck_dim=config.head_bottleneck_dim,
                 weight_norm=config.head_weight_norm)
    if uses_prototypes(config):
        heads["dino_head"] = DINOHead(width, config.dino_head_out_dim,
                                      norm_last_layer=config.dino_head_norm_last_layer, **sizes)
    if config.ibot_loss_weight > 0 and config.ibot_separate_head:
        heads["ibot_head"] = DINOHead(width, config.ibot_out_dim,
                                      norm_last_layer=config.ibot_norm_last_layer, **sizes)
    if config.lejepa_loss_weight > 0:
        heads["lejepa_head"] = lejepa_head(width, config.lejepa_out_dim, config.head_hidden_dim)
    if config.diet_loss_weight > 0:
        heads["diet_head"] = nn.Linear(width, n_images, bias=False)
        nn.init.trunc_normal_(heads["diet_head"].weight, std=0.01)  # at first nearly uniform
    return heads


# ---- student and teacher ----

class Student(nn.Module):
    """Backbone and heads in one module with one forward call, so that DDP sees every parameter.
    ibot_head=None: the DINO head serves the masked patches, too (DINOv2's shared head). projectors,
    for distillation: nn.ModuleDict of 'cls' and 'patches', to the teacher's widths. lejepa_head,
    diet_head: of build_heads, on the CLS of all crops."""

    def __init__(self, backbone, dino_head=None, ibot_head=None, projectors=None,
                 lejepa_head=None, diet_head=None):
        super().__init__()
        self.backbone = backbone
        self.dino_head, self.ibot_head, self.projectors = dino_head, ibot_head, projectors
        self.lejepa_head, self.diet_head = lejepa_head, diet_head

    def train(self, mode=True):
        """Train or eval mode. Frozen blocks stay in eval mode: drop path and dropout would only
        make them differ between student and teacher."""
        super().train(mode)
        n = frozen_blocks(self.backbone)
        if n > 0:
            core(self.backbone).embeddings.eval()
        for block in blocks(self.backbone)[:n]:
            block.eval()
        return self

    def forward(self, global_crops, local_crops=None, masks=None, masked=None, with_patches=True,
                shared=None, n_shared_blocks=0, plain_crops=None):
        """Features and logits of all crops.

        Args: global_crops [V*B,C,S,S]; local_crops [L*B,C,s,s] or None; masks [V*B,P] bool or None:
        the mask token replaces these patches (student); masked: of augment.masked_tokens, the
        patches that the iBOT head reads (student and teacher), None = those of masks; with_patches:
        False if nobody reads 'patches', then the last block is cheaper; n_shared_blocks: of
        shared_blocks; the teacher returns the output of these blocks as 'shared', and the student
        starts from it; plain_crops [B,C,S,S]: without augmentation, for the CLS anchor.
        Returns: dict with global_cls [V*B,D], global_logits [V*B,K]; if asked patches [V*B,P,D],
        local_cls [L*B,D], local_logits [L*B,K], masked_logits [M,K] in row-major order of masks,
        shared (tokens, rope, n_shared_blocks), projected_cls [V*B,E], projected_patches [V*B,P,F],
        plain_cls [B,D], embeddings [(V+L)*B,E] of LeJEPA, image_logits [(V+L)*B,N] of DIET.
        """
        masked = masked or masked_tokens(masks)
        if shared is None:
            shared = first_blocks(self.backbone, global_crops, n_shared_blocks, masks)
        cls, masked_patches, patches = used_features(self.backbone, *shared, masked, with_patches)
        out = dict(global_cls=cls)
        if with_patches:
            out["patches"] = patches
        if n_shared_blocks > 0:
            out["shared"] = shared
        for name, projector in (self.projectors or {}).items():
            out[f"projected_{name}"] = projector(cls if name == "cls" else patches)
        if plain_crops is not None:
            out["plain_cls"] = forward_cls(self.backbone, plain_crops)
        heads = self.dino_head, self.lejepa_head, self.diet_head
        if local_crops is not None and any(heads):
            out["local_cls"] = forward_cls(self.backbone, local_crops)  # [L*B,D]
        all_cls = torch.cat([cls, out["local_cls"]]) if "local_cls" in out else cls
        if self.lejepa_head is not None:
            out["embeddings"] = self.lejepa_head(all_cls)
        if self.diet_head is not None:
            out["image_logits"] = self.diet_head(all_cls)
        if self.dino_head is None:
            return out
        # Each head runs once on all of its tokens: to normalise K prototypes costs more than a
        # product. Only masked patches: the logits of all patches, [V*B,P,K], would be gigabytes.
        tokens = dict(global_logits=cls)  # input of the DINO head, by the name of its output
        if local_crops is not None:
            tokens["local_logits"] = out["local_cls"]
        if masked is not None and self.ibot_head is None:
            tokens["masked_logits"] = masked_patches  # [M,D]
        logits = self.dino_head(torch.cat(list(tokens.values())))
        sizes = [len(part) for part in tokens.values()]
        out.update(zip(tokens, logits.split(sizes)))  # split, not slices: one copy in the backward
        if masked is not None and self.ibot_head is not None:
            out["masked_logits"] = self.ibot_head(masked_patches)
        return out


class EMATeacher:
    """The teacher: the student's network with averaged values in place of trained parameters.
    DINO section 3.1. It keeps one tensor per trained parameter and no network: frozen weights
    (LoRA base, frozen layers) exist once, for student and teacher. A Gram anchor is such a set of
    values, too, of the backbone only: part='backbone.'."""

    def __init__(self, student, part=""):
        self.part, self.values = part, {}
        self.params = dict(unwrap(student).named_parameters())
        self.take_in(student)

    @torch.no_grad()
    def take_in(self, student):
        """Copy the values of the trained parameters that this teacher lacks: at the start of all
        of them, later of those whose training begins, which have not moved until then."""
        for name, param in unwrap(student).named_parameters():
            if param.requires_grad and name.startswith(self.part) and name not in self.values:
                self.values[name] = param.detach().clone()

    def _params(self, student):
        params = dict(unwrap(student).named_parameters())
        return [params[name] for name in self.values]

    @torch.no_grad()
    def update(self, student, momentum):
        """values = momentum * values + (1 - momentum) * student, in place; momentum in [0, 1]."""
        values = [local_shard(value) for value in self.values.values()]
        params = [local_shard(param.detach()) for param in self._params(student)]
        torch._foreach_mul_(values, momentum)
        torch._foreach_add_(values, params, alpha=1 - momentum)

    @contextlib.contextmanager
    def teacher_weights(self, student):
        """Inside, `student` is the teacher: EMA values, eval mode, no gradients. Yields the module
        without DDP. Only pointers move (FSDP: the local shards are exchanged). Open and close
        autocast inside: its cache of bf16 weights would hand the teacher's to the student."""
        module, training = unwrap(student), student.training
        pairs = list(zip(self._params(student), self.values.values()))
        for param, value in pairs:
            swap(param, value)
        student.eval()
        try:
            with torch.no_grad(), regathered(module):
                yield module
        finally:
            for param, value in pairs:
                swap(param, value)
            student.train(training)

    def state_dict(self):
        """{parameter name: EMA value}; sharded if the student is (distributed.gather_full)."""
        return self.values

    def load_state_dict(self, values):
        """Copy values into place, also of frozen parameters; KeyError if one of ours is missing."""
        for name in self.values | values:
            self.values[name] = shard_like(values[name], self.params[name])


def shared_blocks(student, teacher):
    """How many leading blocks can run once for student and teacher on the global crops; 0 = none.
    The caller checks that both see the same crops, without masks. The blocks have to compute the
    same for both: they are frozen (also while their adapters wait), so the teacher has no values of
    its own for them and Student.train turns off their drop path and dropout; and DINOv3's random
    positions, which only the student draws, are off."""
    student = unwrap(student)
    config, n = student.backbone.config, frozen_blocks(student.backbone)
    random_keys = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
    if any(getattr(config, key, None) for key in random_keys):
        return 0
    own = {id(param) for name, param in student.named_parameters() if name in teacher.values}
    parts = [core(student.backbone).embeddings, *blocks(student.backbone)[:n]]
    for part in parts:
        if any(id(param) in own for param in part.parameters()):
            return 0  # trained before a resume whose schedule freezes them again
    return n
