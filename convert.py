"""Original weights of DINO, DINOv2 and DINOv3, renamed into those of transformers.

convert takes the tensors of a .pth file, tells the family by their names and the sizes by their
shapes, and renames them by the tables below.
"""
import math
import re

import torch
import transformers

from configurator import UserError

# Name in the original code -> name on the hub, which every version of transformers 5 can load.
OUTSIDE = {
    "cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token",
    "masked_embed": "embeddings.mask_token",  # iBOT's
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "storage_tokens": "embeddings.register_tokens",  # DINOv3's
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.", "norm.": "layernorm."}
OUTSIDE_DINOV3 = {"patch_embed.proj.": "embeddings.patch_embeddings.", "norm.": "norm."}
QKV = {"attn.q.": "attention.attention.query.", "attn.k.": "attention.attention.key.",
       "attn.v.": "attention.attention.value.", "attn.proj.": "attention.output.dense."}
SCALES = {"norm1.": "norm1.", "norm2.": "norm2.", "ls1.gamma": "layer_scale1.lambda1",
          "ls2.gamma": "layer_scale2.lambda1"}
DINOV2 = {**QKV, **SCALES, "mlp.fc1.": "mlp.fc1.", "mlp.fc2.": "mlp.fc2.",
          "mlp.w12.": "mlp.weights_in.", "mlp.w3.": "mlp.weights_out."}
INSIDE = {  # of a block
    "vit": {**QKV, "norm1.": "layernorm_before.", "norm2.": "layernorm_after.",
            "mlp.fc1.": "intermediate.dense.", "mlp.fc2.": "output.dense."},
    "dinov2": DINOV2, "dinov2_with_registers": DINOV2,
    "dinov3_vit": {**SCALES, "attn.q.": "attention.q_proj.", "attn.k.": "attention.k_proj.",
                   "attn.v.": "attention.v_proj.", "attn.proj.": "attention.o_proj.",
                   "mlp.fc1.": "mlp.up_proj.", "mlp.fc2.": "mlp.down_proj.",
                   "mlp.w1.": "mlp.gate_proj.", "mlp.w2.": "mlp.up_proj.",
                   "mlp.w3.": "mlp.down_proj."}}
# Not part of the backbone: heads, and what DINOv3 needs for training only
HEADS = ("head.", "fc.", "dino_head.", "ibot_head.", "pooler.", "local_cls_norm.")


def is_original(values):
    """True for the tensors of DINO's, DINOv2's or DINOv3's own code (and timm's ViTs)."""
    return "patch_embed.proj.weight" in values and "cls_token" in values


def convert(values, path, key="model_type"):
    """(config, tensors) in transformers' family of the tensors of an original file.

    Args: values: of read_tensors. Returns: a transformers config, for AutoModel.from_config; {name
    on the hub: tensor, fp32}. Raises UserError if this is none of the families, or a tensor has no
    place in it.
    """
    where = f"{key}={path!r}"
    if any("embeddings.cls_token" in name for name in values):
        raise UserError(f"{where} has the names of transformers: give the folder with its "
                        "config.json; for the state.pt of a run, export.py makes one")
    values = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): value  # DINOv2 in chunks
              for name, value in values.items() if not name.startswith(HEADS)}
    has_positions = "pos_embed" in values or "rope_embed.periods" in values
    has_mlp = "blocks.0.mlp.fc2.weight" in values or "blocks.0.mlp.w3.weight" in values
    if not (is_original(values) and has_positions and has_mlp):
        names = ", ".join(list(map(str, values))[:3]) or "nothing"
        raise UserError(f"{where} is no ViT of DINO's, DINOv2's or DINOv3's code (it holds "
                        f"{names}, ...); give a hub id, or the folder with config.json")
    if "rope_embed.periods" in values:
        family = "dinov3_vit"
    elif "register_tokens" in values:
        family = "dinov2_with_registers"
    else:
        family = "dinov2" if "blocks.0.ls1.gamma" in values else "vit"
    values = _split_qkv(values)
    config = _config(values, family, where)
    outside, prefix = OUTSIDE, "encoder.layer."
    if family == "dinov3_vit":
        outside, prefix = OUTSIDE | OUTSIDE_DINOV3, "layer."
    converted = {}
    for name, value in values.items():
        table, rest, start = outside, name, ""
        if block := re.match(r"blocks\.(\d+)\.(.*)", name):
            table, rest, start = INSIDE[family], block[2], f"{prefix}{block[1]}."
        old = next((old for old in table if rest.startswith(old)), None)
        if old is None:
            raise UserError(f"{where} looks like {family}, but {name} has no place there; give a "
                            "hub id, the folder with config.json, or for timm's weights timm:NAME")
        converted[start + table[old] + rest.removeprefix(old)] = value.float()
    mask = "embeddings.mask_token"
    if mask in converted:  # [1,D], or in vit and DINOv3 [1,1,D]
        shape = (1, 1, -1) if family in ("vit", "dinov3_vit") else (1, -1)
        converted[mask] = converted[mask].reshape(shape)
    return config, converted


def _split_qkv(values):
    """One projection to queries, keys and values -> three. A bias that DINOv3's mask sets to 0 is
    left out."""
    split = {}
    for name, value in values.items():
        if ".attn.qkv." not in name:
            split[name] = value
        elif not name.endswith("bias_mask"):
            mask = values.get(name + "_mask", torch.ones_like(value)).nan_to_num()
            parts = zip("qkv", value.chunk(3), mask.chunk(3))
            for letter, part, kept in parts:
                if kept.any():
                    split[name.replace("qkv", letter)] = part
    return split


def _config(values, family, where):
    """The transformers config of the tensors of an original file, from their shapes. It takes the
    periods of DINOv3's positions out of `values`."""
    width, channels, patch, _ = values["patch_embed.proj.weight"].shape
    blocks = {name.split(".")[1] for name in values if name.startswith("blocks.")}
    is_gated = "blocks.0.mlp.w3.weight" in values
    last = "w3" if is_gated else "fc2"
    inner = values[f"blocks.0.mlp.{last}.weight"].shape[1]
    # No shape tells the number of heads: 64 numbers each in all released files, except ViT-H (80)
    heads = 16 if width == 1280 else width // 64
    has_heads = width % 64 == 0
    keys = dict(hidden_size=width, num_hidden_layers=len(blocks), patch_size=patch,
                num_channels=channels)
    if family == "dinov3_vit":
        periods = values.pop("rope_embed.periods").float()  # base ** (i / n), i = 0 .. n - 1
        n = len(periods)
        heads = width // (4 * n)
        has_heads = width % (4 * n) == 0
        base = float(periods[-1]) ** (n / max(1, n - 1))
        near_100 = abs(base / 100 - 1) < 0.01 or n == 1  # the files keep them in bf16
        for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
            keys[f"{word}_bias"] = f"blocks.0.attn.{letter}.bias" in values
        registers = values.setdefault("storage_tokens", torch.zeros(1, 0, width))
        keys.update(rope_theta=100.0 if near_100 else base, layer_norm_eps=1e-5,
                    num_register_tokens=registers.shape[1], use_gated_mlp=is_gated,
                    hidden_act="silu" if is_gated else "gelu", intermediate_size=inner)
    else:
        grid = math.isqrt(values["pos_embed"].shape[1] - 1)
        if grid**2 != values["pos_embed"].shape[1] - 1:
            raise UserError(f"{where}: its {values['pos_embed'].shape[1]} positions are not CLS "
                            "and a square of patches; transformers has no other")
        keys.update(image_size=grid * patch, layer_norm_eps=1e-6,
                    qkv_bias="blocks.0.attn.q.bias" in values)
    if family == "vit":
        keys["intermediate_size"] = inner
    elif family != "dinov3_vit":
        keys.update(use_swiglu_ffn=is_gated, mlp_ratio=4 if is_gated else inner // width)
    if family == "dinov2_with_registers":
        keys["num_register_tokens"] = values["register_tokens"].shape[1]
    if not has_heads:
        raise UserError(f"{where} is {width} wide, which heads of 64 numbers, as the released "
                        "files have them, do not divide; give a hub id, or the folder with "
                        "config.json")
    return transformers.AutoConfig.for_model(family, num_attention_heads=heads, **keys)
