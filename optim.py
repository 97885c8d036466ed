"""What the optimizer is told: parameter groups, schedules as pure functions of the iteration, clipping.

A schedule is a function and not an object, so a resumed run needs no scheduler state: iteration i has the value of
iteration i. The same two functions give the learning rate, weight decay, teacher momentum and teacher temperature.
"""
import math
import re

import torch

from distributed import all_reduce_sum, is_sharded, local


# ---- schedules ----

def cosine_schedule(start, end, iteration, max_iterations, warmup_iterations=0, warmup_start=0.0, reach_end=False):
    """Linear warm-up from warmup_start to `start`, then a half cosine from `start` to `end`, then `end` for ever.

    DINO and DINOv2 (reach_end=False): the last warm-up iteration is already at `start`, so the peak stands twice, and
    the cosine stops one iteration short of `end`. DINOv3 (reach_end=True): the warm-up stops short, the cosine arrives.
        warm-up   warmup_start + (start - warmup_start) * i / (warmup - 1)      v3: i / warmup
        cosine    end + (start - end) / 2 * (1 + cos(pi * j / n))               v3: j / (n - 1), n iterations in all
    Returns: float at `iteration` (0-based). It serves values that rise (weight decay, momentum) as well.
    """
    if iteration < warmup_iterations:
        steps = warmup_iterations if reach_end else max(1, warmup_iterations - 1)
        return warmup_start + (start - warmup_start) * iteration / steps
    if iteration >= max_iterations:
        return end
    steps = max_iterations - warmup_iterations - (1 if reach_end else 0)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (iteration - warmup_iterations) / max(1, steps)))


def linear_schedule(start, end, iteration, n_iterations):
    """A straight line over n_iterations points, both ends included, then `end`: the teacher temperature of DINO."""
    if iteration >= n_iterations:
        return end
    return start + (end - start) * iteration / max(1, n_iterations - 1)


# ---- parameter groups ----

BLOCK = re.compile(r"(?:^|\.)(?:layers?|blocks?)\.(\d+)\.")  # layers.3 (ViT), encoder.layer.3, model.layer.3, blocks.3
EMBEDDING = re.compile(r"embed|cls_token|mask_token|register_token|storage_token")
HEAD = re.compile(r"(?:^|\.)(?:dino_head|ibot_head|projectors|last_layer|mlp\.\d)")


def param_groups(model, lr, weight_decay, layerwise_decay=1.0, patch_embed_lr_mult=1.0):
    """Parameter groups with learning-rate and weight-decay multipliers: DINOv2's utils/param_groups, on HF names.

    lr_mult = layerwise_decay ** (depth + 1 - layer) with layer 0 for the patch embedding and all tokens and positions,
    i + 1 for block i, depth + 1 for the final norm and the heads; the patch embedding times patch_embed_lr_mult.
    wd_mult = 0 for biases, norms and layer-scale (all that is one-dimensional), 1 for the rest: tokens, positions and
    the gain of a weight-normed last layer are decayed, as in DINO and DINOv2.
    Args: model: a Student or a bare backbone or head; lr, weight_decay: the start values of the groups (the loop sets
    lr * lr_mult and weight_decay * wd_mult every iteration). Only parameters that require a gradient are taken.
    Returns: list of dicts, each with params, names, lr, weight_decay, lr_mult, wd_mult, is_last_layer, is_backbone,
    is_patch_embed. Parameters with the same settings share a group, so AdamW launches few kernels.
    """
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    blocks = [int(match.group(1)) for name, _ in model.named_parameters() for match in BLOCK.finditer(name)]
    depth = max(blocks, default=-1) + 1
    groups = {}
    for name, param in trainable:
        block = BLOCK.search(name)
        is_head = HEAD.search(name) is not None and block is None
        is_patch_embed = "patch_embed" in name
        if block:
            layer = int(block.group(1)) + 1
        else:
            layer = 0 if EMBEDDING.search(name) and not is_head else depth + 1
        lr_mult = layerwise_decay ** (depth + 1 - layer) * (patch_embed_lr_mult if is_patch_embed else 1.0)
        wd_mult = 0.0 if param.ndim <= 1 or name.endswith(".bias") else 1.0
        settings = dict(lr_mult=lr_mult, wd_mult=wd_mult, is_last_layer="last_layer" in name,
                        is_backbone=not is_head, is_patch_embed=is_patch_embed)
        group = groups.setdefault(tuple(settings.items()), dict(
            params=[], names=[], lr=lr * lr_mult, weight_decay=weight_decay * wd_mult, **settings))
        group["params"].append(param)
        group["names"].append(name)
    return list(groups.values())


def set_learning_rates(optimizer, lr_now, last_layer_lr_now, weight_decay_now, backbone_factor):
    """Write this iteration's values into the groups of optim.param_groups. backbone_factor: 0 while the heads learn
    alone, then up to 1; an inflated patch embedding does not wait (its group says waits=False)."""
    for group in optimizer.param_groups:
        waits = group["is_backbone"] and group.get("waits", True)
        group["lr"] = (last_layer_lr_now if group["is_last_layer"] else lr_now) * group["lr_mult"]
        group["lr"] *= backbone_factor if waits else 1.0
        group["weight_decay"] = weight_decay_now * group["wd_mult"]


# ---- gradients ----

def clip_gradients(student, max_norm, by):
    """Scale gradients down to an L2 norm of at most max_norm, in place; factor max_norm / (norm + 1e-6) where below 1.

    Args: student: a module; by: 'parameter' clips every tensor on its own (DINO), 'module' the backbone and each head
    as a whole (DINOv2, DINOv3); max_norm 0 only measures.
    Returns: the total norm before clipping, a scalar tensor: the number to watch for exploding gradients.
    """
    units = []
    for child in student.children():
        grads = [local(param.grad) for param in child.parameters() if param.grad is not None]
        units += [[grad] for grad in grads] if by == "parameter" else [grads] if grads else []
    norms = torch.stack(torch._foreach_norm([grad for unit in units for grad in unit]))    # [number of tensors]
    if is_sharded(student):                                   # every rank has a share of each tensor
        norms = all_reduce_sum(norms.square()).sqrt()
    for unit, unit_norms in zip(units, norms.split([len(unit) for unit in units])):
        if max_norm > 0:
            torch._foreach_mul_(unit, (max_norm / (torch.linalg.vector_norm(unit_norms) + 1e-6)).clamp(max=1.0))
    return torch.linalg.vector_norm(norms)
