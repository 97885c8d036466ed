"""The optimizer's settings: parameter groups, schedules as functions of the iteration, clipping.

A schedule is a function and not an object, so a resumed run needs no scheduler state: iteration i
has the value of iteration i. cosine_schedule and linear_schedule give the learning rate, weight
decay, teacher momentum and teacher temperature.
"""
import math
import re

import torch

from distributed import all_reduce_sum, is_sharded, local_shard
from model import freeze_layers


# ---- schedules ----

def cosine_schedule(start, end, iteration, max_iterations, warmup_iterations=0, warmup_start=0.0,
                    reach_end=False):
    """Linear warm-up from warmup_start to `start`, then a half cosine to `end`, then constant.

    DINO and DINOv2 (reach_end=False): the last warm-up iteration has the value `start`, and so has
    the first of the cosine. The cosine stops one iteration before `end`. DINOv3 (reach_end=True):
    the warm-up stops one iteration before `start`, and the cosine reaches `end`.
        warm-up   warmup_start + (start - warmup_start) * i / (warmup - 1)      v3: i / warmup
        cosine    end + (start - end) / 2 * (1 + cos(pi * j / n))               v3: j / (n - 1)
    with i = iteration, j = i - warmup, n = max_iterations - warmup.
    Returns: float at `iteration` (0-based). `end` may be above `start` (weight decay, momentum).
    """
    if iteration < warmup_iterations:
        steps = warmup_iterations if reach_end else max(1, warmup_iterations - 1)
        return warmup_start + (start - warmup_start) * iteration / steps
    if iteration >= max_iterations:
        return end
    steps = max_iterations - warmup_iterations
    if reach_end:
        steps -= 1
    angle = math.pi * (iteration - warmup_iterations) / max(1, steps)
    return end + 0.5 * (start - end) * (1 + math.cos(angle))


def linear_schedule(start, end, iteration, n_iterations):
    """A straight line from start to end over n_iterations points, both included, then `end`: the
    teacher temperature of DINO."""
    if iteration >= n_iterations:
        return end
    return start + (end - start) * iteration / max(1, n_iterations - 1)


def warmup_factor(iteration, heads_only_iterations):
    """The backbone's share of the learning rate: 0 while only the heads are trained, then a line
    up to 1 over as many iterations."""
    if heads_only_iterations == 0:
        return 1.0
    done = iteration - heads_only_iterations + 1
    return min(1.0, max(0.0, done / heads_only_iterations))


# ---- parameter groups ----

BLOCK = re.compile(r"(?:^|\.)(?:layers?|blocks?)\.(\d+)\.")  # encoder.layer.3, layers.3, blocks.3
EMBEDDING = re.compile(r"embed|cls_token|mask_token|register_token|storage_token")


def param_groups(model, lr, weight_decay, layerwise_decay=1.0, patch_embed_lr_mult=1.0,
                 head_lr_mult=1.0):
    """Parameter groups with multipliers of the rates: DINOv2's utils/param_groups, on HF names.

    lr_mult = layerwise_decay ** (depth + 1 - layer). The layer is 0 for the patch embedding and all
    tokens and positions, i + 1 for block i, depth + 1 for the final norm and the heads. The patch
    embedding is multiplied by patch_embed_lr_mult as well, the heads by head_lr_mult.
    wd_mult = 0 for everything that is one-dimensional (biases, norms, layer scale), else 1. Tokens,
    positions and the gain of a weight-normed last layer are decayed, as in DINO and DINOv2.
    Args: model: a Student, whose heads are everything outside of `backbone`, or a bare backbone;
    lr, weight_decay: of the first iteration (set_learning_rates writes the later ones). Only
    parameters that require a gradient are taken.
    Returns: list of dicts with params, names, lr, weight_decay, lr_mult, wd_mult, is_last_layer,
    is_backbone, is_patch_embed. Parameters with equal settings share a group: few kernels.
    """
    names = [name for name, _ in model.named_parameters()]
    is_student = any(name.startswith("backbone.") for name in names)

    def in_backbone(name):
        return name.startswith("backbone.") or not is_student

    found = [BLOCK.search(name) for name in names if in_backbone(name)]
    numbers = [int(block.group(1)) for block in found if block]
    depth = max(numbers, default=-1) + 1
    groups = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        is_backbone = in_backbone(name)
        is_patch_embed = is_backbone and "patch_embed" in name
        block = BLOCK.search(name)
        layer = depth + 1
        if is_backbone and block:
            layer = int(block.group(1)) + 1
        elif is_backbone and EMBEDDING.search(name):
            layer = 0
        lr_mult = layerwise_decay ** (depth + 1 - layer)
        if is_patch_embed:
            lr_mult *= patch_embed_lr_mult
        if not is_backbone:
            lr_mult *= head_lr_mult
        wd_mult = 0.0 if param.ndim <= 1 or name.endswith(".bias") else 1.0
        settings = dict(lr_mult=lr_mult, wd_mult=wd_mult, is_last_layer="last_layer" in name,
                        is_backbone=is_backbone, is_patch_embed=is_patch_embed)
        key = tuple(settings.values())
        if key not in groups:
            groups[key] = dict(settings, params=[], names=[], lr=lr * lr_mult,
                               weight_decay=weight_decay * wd_mult)
        groups[key]["params"].append(param)
        groups[key]["names"].append(name)
    return list(groups.values())


def build_optimizer(student, config, new_patch_embed):
    """AdamW, and the iteration from which each parameter is trained.

    Random heads would push garbage into released features. So only the heads learn for
    freeze_backbone_iterations (-1: a tenth of the run if pretrained), then the backbone's rate
    rises from 0 over as many (dino.schedules).
    Args: config: namespace of train.py's or distill.py's keys; new_patch_embed: True if the patch
    embedding was made for another number of channels; then it learns with the heads.
    Returns: optimizer; train_from, {parameter name: iteration}; heads_only_iterations.
    """
    groups = param_groups(student, config.lr, config.weight_decay, config.layerwise_decay,
                          config.patch_embed_lr_mult, config.head_lr_mult)
    heads_only_iterations = config.freeze_backbone_iterations
    if heads_only_iterations < 0:
        heads_only_iterations = config.max_iterations // 10 if config.use_pretrained else 0
    train_from = {}
    for group in groups:
        with_heads = not group["is_backbone"] or (group["is_patch_embed"] and new_patch_embed)
        group["with_heads"] = with_heads
        first = 0 if with_heads else heads_only_iterations
        train_from.update(dict.fromkeys(group["names"], first))
    thaw = getattr(config, "freeze_backbone_until", 0)
    if thaw > 0:  # layers that thaw are in the groups already, and are trained from then on
        freeze_layers(student.backbone, config.freeze_backbone_layers)
        for name, param in student.named_parameters():
            if name in train_from and not param.requires_grad:
                train_from[name] = max(train_from[name], thaw)
    optimizer = torch.optim.AdamW(groups, betas=config.adam_betas, fused=True)
    return optimizer, train_from, heads_only_iterations


def set_learning_rates(optimizer, lr, last_layer_lr, weight_decay, backbone_factor):
    """Write this iteration's values into the groups of build_optimizer.

    backbone_factor: of warmup_factor; a new patch embedding learns with the heads, without it.
    """
    for group in optimizer.param_groups:
        group_lr = last_layer_lr if group["is_last_layer"] else lr
        group["lr"] = group_lr * group["lr_mult"]
        if not group.get("with_heads", not group["is_backbone"]):
            group["lr"] *= backbone_factor
        group["weight_decay"] = weight_decay * group["wd_mult"]


# ---- gradients ----

def clip_gradients(student, max_norm, by):
    """Scale gradients in place so that no L2 norm is above max_norm: times max_norm / (norm + 1e-6)
    if that is below 1.

    Args: student: a module; by: 'parameter' clips every tensor on its own (DINO), 'module' the
    backbone and each head as a whole (DINOv2, DINOv3); max_norm: 0 only measures.
    Returns: the total norm before clipping, a scalar tensor. It rises when gradients explode.
    """
    units, tensors = [], []  # a unit is a list of gradients that are clipped together
    for child in student.children():
        grads = [local_shard(param.grad) for param in child.parameters() if param.grad is not None]
        tensors += grads
        if by == "parameter":
            units += [[grad] for grad in grads]
        elif grads:
            units.append(grads)
    norms = torch.stack(torch._foreach_norm(tensors))  # [number of tensors]
    if is_sharded(student):  # every rank has a share of each tensor
        norms = all_reduce_sum(norms.square()).sqrt()
    if max_norm > 0:
        sizes = [len(unit) for unit in units]
        for unit, unit_norms in zip(units, norms.split(sizes)):
            factor = max_norm / (torch.linalg.vector_norm(unit_norms) + 1e-6)
            torch._foreach_mul_(unit, factor.clamp(max=1.0))
    return torch.linalg.vector_norm(norms)
