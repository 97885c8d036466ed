"""The networks: a Hugging Face ViT as backbone, DINO heads on top, the student, and its EMA teacher.

Four families of transformers are one thing here: 'vit' (DINO), 'dinov2', 'dinov2_with_registers' and 'dinov3_vit'.
forward_features hides what differs, everything else treats them alike.

Shape letters, used in all files: B images per rank, V views (global crops), L local crops, P patches, M masked patches
in the batch, D embed dim, K prototypes, C channels, H W pixels, h w patch grid, p patch size. View-major always: crop v
of image b is row v * B + b. masks: bool, True = masked = the student sees the mask token there.
"""
import contextlib
import os
import warnings

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from configurator import UserError
from distributed import local, only_shapes, regathered, shard_like, swap, unwrap

FAMILIES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")


# ---- backbone ----

def build_backbone(model_type, use_pretrained=True, num_channels=3, **size_keys):
    """A Hugging Face ViT of one of the four families, with its patch embedding made for num_channels.

    Args: model_type: a hub id ('facebook/dinov2-small') or a local directory, for its weights or (use_pretrained=False)
    its shape with random weights; or the name of a family, from scratch. size_keys: keys of the HF config (hidden_size,
    num_hidden_layers, num_attention_heads, patch_size, image_size, num_register_tokens, drop_path_rate, ...), those
    that the family does not have are ignored; on pretrained weights only those that change no shape are allowed.
    num_channels 0: as many as model_type says.
    Returns: transformers PreTrainedModel in fp32, without pooler. Raises UserError for what cannot be found or loaded.
    """
    if model_type in FAMILIES and use_pretrained:
        raise UserError(f"model_type={model_type!r} is a family and has no weights; "
                        "give a hub id or a local directory, or --use_pretrained=false to train from scratch")
    names_a_folder = os.path.sep in model_type and model_type[0] in "./~"
    if names_a_folder and not os.path.isdir(model_type):
        raise UserError(f"model_type={model_type!r}: no such directory; give a directory with config.json, or a hub id")
    try:
        config = _family_config(model_type, size_keys) if model_type in FAMILIES else \
            transformers.AutoConfig.from_pretrained(model_type, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(gated(model_type, error) or f"model_type={model_type!r} cannot be loaded: "
                        "neither a local directory with config.json nor a hub id that can be reached; "
                        f"from scratch use one of {', '.join(FAMILIES)} ({str(error).splitlines()[0][:120]})") from None
    num_channels = num_channels or config.num_channels
    if config.model_type not in FAMILIES:
        raise UserError(f"model_type={model_type!r} is a {config.model_type!r} model; "
                        f"supported are {', '.join(FAMILIES)}")
    for key, value in size_keys.items():
        if use_pretrained and key not in ("drop_path_rate", "pos_embed_rescale"):
            raise UserError(f"{key}={value} would change the shape of the pretrained {model_type!r}; "
                            "leave it out, or set --use_pretrained=false")
        if hasattr(config, key):
            setattr(config, key, value)
    # the pooler would be random and unused, which DDP refuses; ViT makes its mask token only when asked
    extra = dict(add_pooling_layer=False, use_mask_token=True) if config.model_type == "vit" else {}
    if not use_pretrained:
        config.num_channels = num_channels
    if not use_pretrained or only_shapes():
        backbone = transformers.AutoModel.from_config(config, **extra).float()
    else:
        with quiet_transformers():
            backbone, info = transformers.AutoModel.from_pretrained(
                model_type, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
                **extra)
        missing = sorted(key for key in info["missing_keys"] if "mask_token" not in key)
        if missing or info["mismatched_keys"]:
            raise UserError(f"model_type={model_type!r}: its weights do not fit its config.json; missing "
                            f"{missing[:3]}, of other shape {sorted(info['mismatched_keys'])[:3]}")
    if config.num_channels != num_channels:
        _set_channels(backbone, num_channels)
    for norm in (part for block in blocks(backbone) for part in block.modules() if isinstance(part, nn.LayerNorm)):
        norm.register_forward_hook(round_once)
    return backbone


def round_once(_, inputs, tokens):
    """Forward hook of a block's norms: their fp32 output in the dtype of autocast. Query, key and value projections
    would each make, and keep until the backward, a copy of their own."""
    device = tokens.device.type
    return tokens.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tokens


def gated(repository, error):
    """How to get at weights whose owners ask for consent first, in one line; '' where `error` says something else."""
    causes = f"{error!r} {error.__cause__!r}".lower()
    if "gated" not in causes and "401" not in causes and "403" not in causes:
        return ""
    return (f"{repository!r} is gated, or private, or misspelt: the hub refuses it without consent; log in with "
            f"`hf auth login`, accept the licence at https://huggingface.co/{repository}, and start again")


def _family_config(family, size_keys):
    """A config of the family with those of the keys that it has. By the constructor: values that it derives (dinov2's
    stage names) would go stale under setattr."""
    known = transformers.AutoConfig.for_model(family)
    if "hidden_size" in size_keys and hasattr(known, "intermediate_size"):       # dinov2 has mlp_ratio = 4 instead
        size_keys = {"intermediate_size": 4 * size_keys["hidden_size"], **size_keys}
    size_keys = {key: value for key, value in size_keys.items() if hasattr(known, key)}
    return transformers.AutoConfig.for_model(family, **size_keys)


@contextlib.contextmanager
def quiet_transformers():
    """No loading bars and no report on the mask token: build_backbone checks the loading info itself."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def inflate_patch_embed(weight, num_channels):
    """A patch embedding of RGB filters, [D,3,p,p], as one of num_channels, [D,C,p,p].

    The mean of the given filters, repeated, times 3/C: a pattern that is the same in all channels keeps its response.
    For C = 1 this is the sum of the filters, exactly what a grey image copied into three channels would meet. The
    number of given channels need not be 3; where it is C already, the weight comes back as it is.
    """
    given = weight.shape[1]
    if given == num_channels:
        return weight
    return weight.mean(dim=1, keepdim=True).repeat(1, num_channels, 1, 1) * (given / num_channels)


def _set_channels(backbone, num_channels):
    """Replace the patch embedding by its inflated self, and say so in the HF config, so that exports reload cleanly."""
    for parent in backbone.modules():
        for name, conv in parent.named_children():
            if isinstance(conv, nn.Conv2d):
                has_bias = conv.bias is not None
                new = nn.Conv2d(num_channels, conv.out_channels, conv.kernel_size, conv.stride, bias=has_bias)
                with torch.no_grad():
                    new.weight.copy_(inflate_patch_embed(conv.weight, num_channels))
                    if has_bias:
                        new.bias.copy_(conv.bias)
                setattr(parent, name, new)
                if hasattr(parent, "num_channels"):
                    parent.num_channels = num_channels
    backbone.config.num_channels = num_channels
    backbone.patch_embed_inflated = True                      # train.py lets it learn while the other weights wait


def backbone_from_config(config, num_channels):
    """The backbone that a run of train.py starts from: build_backbone with the keys of its config, a dict. A model_type
    that names a family takes the sizes of the config, all others have sizes of their own."""
    sizes = {} if config["use_pretrained"] else dict(image_size=config["global_crops_size"])
    if config["model_type"] in FAMILIES:
        sizes.update({key: config[key] for key in ("hidden_size", "num_hidden_layers", "patch_size",
                                                   "num_attention_heads", "num_register_tokens")})
    return build_backbone(config["model_type"], config["use_pretrained"], num_channels,
                          drop_path_rate=config["drop_path_rate"],
                          pos_embed_rescale=config["pos_embed_rescale"] or None, **sizes)


def pretrained_input(model_type):
    """What the weights were trained on, from the preprocessor_config.json beside them: dict with mean and std (tuples
    of floats, of pixels in 0..1), size (pixels, or 0), intensity_range (of our own exports, else None). {} without."""
    try:
        settings, _ = transformers.image_processing_utils.BaseImageProcessor.get_image_processor_dict(model_type)
        mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
    except (OSError, KeyError, TypeError):
        return {}
    intensity_range = tuple(settings["intensity_range"]) if "intensity_range" in settings else None
    if intensity_range:                    # export_hf put the lower end of the range into the mean: take it out again
        low, high = intensity_range
        mean = tuple(round(m - low / (high - low), 6) for m in mean)
    crop = settings.get("crop_size") or settings.get("size") or {}
    return dict(mean=mean, std=std, size=crop.get("height", crop.get("shortest_edge", 0)),
                intensity_range=intensity_range)


def core(backbone):
    """The Hugging Face model itself: out of its peft wrapper where it has one."""
    return backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone


def blocks(backbone):
    """The transformer blocks of any family, an nn.ModuleList."""
    return next(module for name, module in core(backbone).named_modules()
                if isinstance(module, nn.ModuleList) and name.split(".")[-1] in ("layer", "layers"))


# A forward is written out, not left to transformers: what precedes the first block, blocks, final norm. So a run of
# frozen blocks can be computed once for student and teacher, and hooks, compile and checkpointing go by block.

def embed(backbone, pixels, masks=None):
    """What goes into the first block: (tokens [B,1+R+P,D], rope), rope = keyword arguments of every block.

    Args: as forward_features. Raises UserError for a size that transformers would floor without a word.
    """
    config, model, extra = backbone.config, core(backbone), {}
    height, width = pixels.shape[-2:]
    if height % config.patch_size or width % config.patch_size:
        raise UserError(f"crop of {height}x{width} pixels is not a multiple of patch_size={config.patch_size}")
    if config.model_type == "vit":
        extra["interpolate_pos_encoding"] = True              # else ViT refuses every size but that of its config
    tokens = model.embeddings(pixels, bool_masked_pos=masks, **extra)                      # [B,1+R+P,D]
    rotary = getattr(model, "rope_embeddings", None)          # DINOv3 turns queries and keys, the others add positions
    return tokens, {} if rotary is None else dict(position_embeddings=rotary(pixels))


def run_blocks(backbone, tokens, rope, first=0, last=None):
    """Tokens [B,1+R+P,D] through blocks `first` up to, not including, `last` (None: to the end)."""
    for block in list(blocks(backbone))[first:last]:
        tokens = block(tokens, **rope)
    return tokens


def final_norm(backbone, tokens):
    """Tokens after the last block -> (cls [B,D], patches [B,P,D]), normalised, registers left out."""
    model = core(backbone)
    tokens = (model.norm if backbone.config.model_type == "dinov3_vit" else model.layernorm)(tokens)
    return tokens[:, 0], tokens[:, 1 + getattr(backbone.config, "num_register_tokens", 0):]


def forward_features(backbone, pixels, masks=None):
    """CLS and patch tokens after the final norm, for any family.

    Args: backbone: a PreTrainedModel or its peft wrapper; pixels [B,C,H,W], H and W multiples of the patch size; masks
    [B,P] bool, True = the patch is replaced by the mask token. Returns: cls [B,D], patches [B,P,D] (registers left
    out). Raises UserError for a size that transformers would floor without a word.
    """
    return final_norm(backbone, run_blocks(backbone, *embed(backbone, pixels, masks)))


def plain_attention(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **_):
    """softmax(q k^T * scaling) v, for transformers under the name 'plain': what training on a CPU uses.

    torch's fused kernel is slow backward on CPUs (ViT-S, 16 crops of 197 tokens: 51 ms a block, this 17 ms), and
    transformers' own eager one scales the scores, not the queries, and under autocast copies them to fp32 and back for
    the softmax (25 ms): they are the largest tensors of a block. A softmax of bf16 computes in fp32 anyway.
    Args: query, key, value [B,heads,N,d]. Returns: [B,N,heads,d], and None for the weights. No masks: ViTs have none.
    """
    scores = (query * scaling) @ key.mT                                                    # [B,heads,N,N]
    with torch.autocast(scores.device.type, enabled=False):
        weights = F.dropout(scores.softmax(dim=-1), dropout, module.training)
    return (weights @ value).transpose(1, 2), None


transformers.AttentionInterface.register("plain", plain_attention)


# ---- what is trained ----

def freeze_layers(backbone, n):
    """Freeze the embeddings and the first n blocks (paper section 2.2.1); n = 0 leaves everything as it is."""
    if n > len(blocks(backbone)):
        raise UserError(f"freeze_backbone_layers={n}, but the backbone has {len(blocks(backbone))} blocks")
    if n > 0:
        for name, param in backbone.named_parameters():
            if "embeddings" in name:
                param.requires_grad_(False)
        for block in blocks(backbone)[:n]:
            block.requires_grad_(False)


def add_lora(backbone, r=4, alpha=16, dropout=0.1, targets="qv", skip_blocks=0):
    """Freeze the backbone and add low-rank adapters: W + (alpha / r) B A, B = 0 at the start, so that nothing changes
    (LoRA, arXiv 2106.09685; paper section 2.2.3).

    Args: targets: 'qv' = query and value projections, 'all' = every Linear of attention and MLP; skip_blocks: the first
    blocks get none, because they are frozen. Returns the peft wrapper; forward_features takes it like the backbone.
    """
    import peft
    path, layers = next((name, module) for name, module in backbone.named_modules() if module is blocks(backbone))
    linears = {f"{path}.{i}.{name}": name.split(".")[-1] for i, block in enumerate(layers) if i >= skip_blocks
               for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    if skip_blocks >= len(layers):
        raise UserError(f"use_lora with freeze_backbone_layers={skip_blocks}: no block is left for adapters; "
                        f"freeze fewer than {len(layers)}")
    if targets == "qv":                                       # the names changed between transformers 4 and 5
        present = set(linears.values())
        pair = next((pair for pair in ({"q_proj", "v_proj"}, {"query", "value"}) if pair <= present), None)
        if pair is None:
            raise UserError(f"use_lora: no query and value projections among the linear layers {sorted(present)}; "
                            "use lora_targets='all'")
        linears = {path: name for path, name in linears.items() if name in pair}
    config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(linears))
    with warnings.catch_warnings():                           # peft asks transformers by a name on its way out
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(backbone, config)


def frozen_blocks(backbone):
    """How many leading blocks stand still at present, together with everything before them: 0 where the embeddings
    learn. They run no backward, by autograd's own rule: nothing in them or before them asks for a gradient."""
    if any(param.requires_grad for param in core(backbone).embeddings.parameters()):
        return 0
    layers = list(blocks(backbone))
    return next((i for i, block in enumerate(layers) if any(param.requires_grad for param in block.parameters())),
                len(layers))


def set_trainable(student, begins, iteration):
    """Who learns in this iteration: the parameters `name` with begins[name] <= iteration; those without an entry never.

    One mechanism for the backbone that waits for its heads and for layers that thaw: who does not learn has no
    gradient, so autograd skips its backward, AdamW keeps no moments of it (they start fresh when it begins: what random
    heads sent before says nothing about its gradients to come) and decays nothing.
    Returns: whether something changed. Then the teacher takes the new ones in, and DDP has to be built anew: it
    registers what asks for a gradient when it is built.
    """
    changed = False
    for name, param in student.named_parameters():
        learns = begins.get(name, float("inf")) <= iteration
        changed |= learns != param.requires_grad
        param.requires_grad_(learns)
    student.train(student.training)                           # Student.train goes by what is frozen
    return changed


def parameter_counts(student):
    """dict(trainable_m, total_m): how many million parameters learn at present, and how many there are."""
    sizes = [(param.numel(), param.requires_grad) for param in student.parameters()]
    return dict(trainable_m=sum(n for n, learns in sizes if learns) / 1e6, total_m=sum(n for n, _ in sizes) / 1e6)


class DINOHead(nn.Module):
    """MLP, L2 normalisation, prototypes: features [N,D] -> logits [N,K]. DINO (arXiv 2104.14294) appendix C.

    Three Linear layers with GELU to the bottleneck, unit length, then K prototypes without bias. DINO and DINOv2
    normalise the prototypes (weight norm): their gain is frozen at 1 with norm_last_layer, else trained. DINOv3:
    weight_norm=False, a plain Linear. n_layers=1 is a single Linear to the bottleneck.
    """

    def __init__(self, in_dim, out_dim, hidden_dim=2048, bottleneck_dim=256, norm_last_layer=True, weight_norm=True,
                 n_layers=3):
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (n_layers - 1) + [bottleneck_dim]
        layers = [layer for a, b in zip(dims, dims[1:]) for layer in (nn.Linear(a, b), nn.GELU())][:-1]
        self.mlp = nn.Sequential(*layers) if n_layers > 1 else layers[0]
        for layer in layers[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)
        if weight_norm:                                       # W_k = g_k v_k / |v_k|; v as nn.Linear initialises it
            self.last_layer = nn.utils.parametrizations.weight_norm(self.last_layer)
            gain = self.last_layer.parametrizations.weight.original0                       # [K,1]
            nn.init.ones_(gain)
            gain.requires_grad_(not norm_last_layer)
        else:
            nn.init.trunc_normal_(self.last_layer.weight, std=0.02)

    def forward(self, features):
        # unit length in fp32: in bf16 the length would be right to two digits only
        return self.last_layer(F.normalize(self.mlp(features).float(), dim=-1))


# ---- student and teacher ----

class Student(nn.Module):
    """Backbone and heads in one module with one forward call, so that DDP sees every parameter used.

    ibot_head=None means that the DINO head serves the masked patches as well (DINOv2's shared head). Distillation may
    do without a DINO head, and adds projectors, an nn.ModuleDict of 'cls' and 'patches': to the teacher's widths.
    """

    def __init__(self, backbone, dino_head=None, ibot_head=None, projectors=None):
        super().__init__()
        self.backbone, self.dino_head, self.ibot_head, self.projectors = backbone, dino_head, ibot_head, projectors

    def train(self, mode=True):
        """Train or eval mode; frozen blocks stay in eval mode: drop path and dropout would regularise nothing there,
        and without them a frozen block computes for the student what it computes for the teacher."""
        super().train(mode)
        if n := frozen_blocks(self.backbone):
            for part in (core(self.backbone).embeddings, *list(blocks(self.backbone))[:n]):
                part.eval()
        return self

    def forward(self, global_crops, local_crops=None, masks=None, apply_masks=True, prefix=None, n_prefix=0):
        """Features and logits of all crops.

        Args: global_crops [V*B,C,S,S]; local_crops [L*B,C,s,s] or None; masks [V*B,P] bool or None; apply_masks:
        replace the masked patches by the mask token (student), or only say which patches the iBOT head reads (teacher).
        n_prefix: of shared_blocks; the teacher's pass returns what its first n_prefix blocks make of the global crops
        as out['prefix'], and the student's pass goes on from there when it is given as `prefix`.
        Returns: dict with global_cls [V*B,D], patches [V*B,P,D], global_logits [V*B,K], and where asked for local_cls
        [L*B,D], local_logits [L*B,K], masked_logits [M,K] in row-major order of masks, prefix (tokens, rope, n_prefix);
        with projectors projected_cls [V*B,E] and projected_patches [V*B,P,F].
        """
        if prefix is None:
            tokens, rope = embed(self.backbone, global_crops, masks if apply_masks else None)
            prefix = run_blocks(self.backbone, tokens, rope, 0, n_prefix), rope, n_prefix
        cls, patches = final_norm(self.backbone, run_blocks(self.backbone, *prefix))
        out, n_global = dict(global_cls=cls, patches=patches, **(dict(prefix=prefix) if n_prefix else {})), len(cls)
        if self.projectors is not None:
            out.update({f"projected_{name}": self.projectors[name](tokens)
                        for name, tokens in (("cls", cls), ("patches", patches)) if name in self.projectors})
        if self.dino_head is None:
            return out
        if local_crops is not None:
            out["local_cls"] = forward_features(self.backbone, local_crops)[0]             # [L*B,D]
            cls = torch.cat([cls, out["local_cls"]])
        masked = patches[masks] if masks is not None else cls[:0]      # [M,D]; of all patches: [V*B,P,K] would be GBs
        shared = masked if self.ibot_head is None else cls[:0]
        # the head once, on all of its tokens: normalising and rounding K prototypes costs more than a product
        global_logits, local_logits, masked_logits = self.dino_head(torch.cat([cls, shared])).split(
            [n_global, len(cls) - n_global, len(shared)])     # [V*B,K], [L*B,K], [M,K]; split: one copy backward
        out["global_logits"] = global_logits
        if local_crops is not None:
            out["local_logits"] = local_logits
        if masks is not None:
            out["masked_logits"] = masked_logits if self.ibot_head is None else self.ibot_head(masked)
        return out


class EMATeacher:
    """The teacher: the student's network with averaged values in place of its trainable parameters.

    It keeps one tensor per trainable parameter and no network: frozen weights (LoRA base, frozen layers) exist once,
    for student and teacher alike. DINO section 3.1: teacher = m * teacher + (1 - m) * student.
    A Gram anchor is such a set of values as well, of the backbone only: part='backbone.'.
    """

    def __init__(self, student, part=""):
        self.part, self.values, self.params = part, {}, dict(unwrap(student).named_parameters())
        self.take_in(student)

    @torch.no_grad()
    def take_in(self, student):
        """Values for the trainable parameters that have none yet, those of the student: at the start for all of them,
        later for those that begin to learn, which have not moved until now."""
        for name, param in unwrap(student).named_parameters():
            if param.requires_grad and name.startswith(self.part) and name not in self.values:
                self.values[name] = param.detach().clone()

    def _params(self, student):
        params = dict(unwrap(student).named_parameters())
        return [params[name] for name in self.values]

    @torch.no_grad()
    def update(self, student, momentum):
        """values = momentum * values + (1 - momentum) * student, in place; momentum in [0, 1]."""
        values = [local(value) for value in self.values.values()]
        torch._foreach_mul_(values, momentum)
        torch._foreach_add_(values, [local(param.detach()) for param in self._params(student)], alpha=1 - momentum)

    @contextlib.contextmanager
    def teacher_weights(self, student):
        """Inside, `student` is the teacher: EMA values, eval mode, no gradients. Yields the module without DDP.

        Only pointers move (FSDP: the local shards are exchanged). Open autocast inside and close it inside as well: its
        cache of bf16 weights goes by parameter, so one region around teacher and student would hand the teacher's
        weights to the student.
        """
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
        """{parameter name: EMA value}; sharded where the student is (distributed.full gathers them)."""
        return self.values

    def load_state_dict(self, values):
        """Copy values into place, also of parameters that wait at present; KeyError where one of ours is missing."""
        for name in self.values | values:
            self.values[name] = shard_like(values[name], self.params[name])


def shared_blocks(student, teacher):
    """How many leading blocks the student may take over from the teacher for the global crops; 0 = none.

    Exact where both see the same unmasked crops (the caller sees to that: with iBOT the masked crops differ from the
    embedding on) and the blocks compute the same for both:
    - they are frozen, so the teacher has no values of its own for them, and Student.train keeps their drop path and
      dropout off; adapters that wait are such blocks;
    - DINOv3's random positions (pos_embed_shift, _jitter, _rescale), drawn for the student only, are off.
    Activation checkpointing changes nothing: what runs no backward is not checkpointed.
    """
    student = unwrap(student)
    n, config = frozen_blocks(student.backbone), student.backbone.config
    parts = (core(student.backbone).embeddings, *list(blocks(student.backbone))[:n])
    own = {id(param) for name, param in student.named_parameters() if name in teacher.values}
    if any(id(param) in own for part in parts for param in part.parameters()):
        return 0                     # a schedule changed on resume: they once learned and now wait
    randomised = any(getattr(config, f"pos_embed_{key}", None) for key in ("shift", "jitter", "rescale"))
    return 0 if randomised else n
