"""The frozen teacher of distill.py: any Hugging Face ViT or timm ViT, its features, and what is kept of them.

A teacher has its own size, normalisation, channels, patch size and width, and FrozenTeacher hides them: crops in 0..1
go in, CLS and patch tokens come out. Released teachers carry no DINO heads, so what they say is made of their features:
FeatureStatistics standardises and whitens them and turns them into logits by prototypes that the student cannot move.
FeatureCache keeps them on disk, for teachers too big to run in every step.
"""
import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from configurator import UserError
from distributed import all_reduce_sum, gather_objects, only_shapes
from model import blocks, build_backbone, forward_features, gated, pretrained_input

# What timm needs to know of pathology teachers, from their model cards: the architecture with its arguments (so that a
# weights file loads without a hub), what is not ImageNet's mean and std, all 224 pixels; cls_mean: their image feature
# is the CLS token and the mean patch token, side by side.
SWIGLU = dict(mlp_layer="SwiGLUPacked", act_layer="SiLU")     # names in timm.layers and torch.nn
BIOPTIMUS = dict(mean=(0.707223, 0.578729, 0.703617), std=(0.211883, 0.230117, 0.177517))
PATHOLOGY_TEACHERS = {
    "MahmoodLab/UNI": dict(architecture="vit_large_patch16_224", arguments=dict(init_values=1e-5)),
    "MahmoodLab/UNI2-h": dict(architecture="vit_giant_patch14_224", arguments=dict(
        depth=24, num_heads=24, embed_dim=1536, mlp_ratio=5.33334, init_values=1e-5, no_embed_class=True, reg_tokens=8,
        **SWIGLU)),
    "prov-gigapath/prov-gigapath": dict(architecture="vit_giant_patch14_dinov2", arguments=dict(
        patch_size=16, mlp_ratio=5.33334, init_values=1e-5)),
    "paige-ai/Virchow": dict(architecture="vit_huge_patch14_224", cls_mean=True, arguments=dict(
        mlp_ratio=5.3375, init_values=1e-5, global_pool="", **SWIGLU)),
    "paige-ai/Virchow2": dict(architecture="vit_huge_patch14_224", cls_mean=True, arguments=dict(
        mlp_ratio=5.3375, init_values=1e-5, global_pool="", reg_tokens=4, **SWIGLU)),
    "bioptimus/H-optimus-0": dict(architecture="vit_giant_patch14_reg4_dinov2", arguments=dict(init_values=1e-5),
                                  **BIOPTIMUS),
    "bioptimus/H-optimus-1": dict(architecture="vit_giant_patch14_reg4_dinov2", arguments=dict(init_values=1e-5),
                                  **BIOPTIMUS),
    "bioptimus/H0-mini": dict(architecture="vit_base_patch14_reg4_dinov2", arguments=dict(
        mlp_ratio=5.33334, init_values=1e-5, **SWIGLU), **BIOPTIMUS),
}
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLS_MEAN = ("kaiko-ai/midnight",)                             # Hugging Face models whose image feature has the mean too


# ---- loading ----

def build_teacher(distilled_model_type, weights="", load_from_disk=False, size=0, fallback_size=224,
                  dtype=torch.bfloat16, **size_keys):
    """A FrozenTeacher.

    Args: distilled_model_type: a Hugging Face id or directory, or 'timm:NAME' or 'timm:hf_hub:ORG/NAME'; weights: a
    checkpoint file (.safetensors, or torch's) in the place of the released weights; load_from_disk: ask no hub; size:
    pixels at which it looks at a crop, 0 = those it was trained on, or where it does not say about fallback_size;
    size_keys: of the architecture, for teachers without released weights (tests). Raises UserError.
    """
    if weights and not os.path.isfile(weights):
        raise UserError(f"distilled_model_weights={weights!r}: no such file; give a .safetensors or .pt checkpoint")
    name = distilled_model_type.removeprefix("timm:")
    if load_from_disk and not (weights and name != distilled_model_type) and not os.path.isdir(distilled_model_type):
        raise UserError(f"load_from_disk=true with distilled_model_type={distilled_model_type!r}: give a local "
                        "directory, or timm:NAME with a file as distilled_model_weights")
    if name != distilled_model_type:
        network, about = _build_timm(name, weights, size_keys)
        patch, n_prefix = network.patch_embed.patch_size[0], network.num_prefix_tokens
    else:
        network = build_backbone(name, not (weights or size_keys), 0, **size_keys)
        if weights:
            load_weights(network, weights)
        about = dict(IMAGENET, cls_mean=name in CLS_MEAN, **{} if size_keys else pretrained_input(name))
        patch, n_prefix = network.config.patch_size, 0
    size = size or about.get("size") or max(1, round(fallback_size / patch)) * patch
    if size % patch:
        raise UserError(f"distilled_crops_size={size} is not a multiple of patch_size={patch} of "
                        f"{distilled_model_type}; use {size // patch * patch or patch} or "
                        f"{(size // patch + 1) * patch}")
    return FrozenTeacher(network.to(dtype), size, patch, about["mean"], about["std"], n_prefix,
                         about.get("cls_mean", False), about.get("intensity_range"))


def _build_timm(name, weights, size_keys):
    """(network, what is known of its input) of timm's NAME or hf_hub:ORG/NAME."""
    try:
        import timm
    except ImportError:
        raise UserError(f"distilled_model_type='timm:{name}' needs timm; pip install timm") from None
    repository = name.replace("hf-hub:", "hf_hub:").partition("hf_hub:")[2]
    known = next((value for key, value in PATHOLOGY_TEACHERS.items() if key.lower() == repository.lower()), {})
    arguments = dict(num_classes=0, dynamic_img_size=True, **known.get("arguments", {}))
    if known:
        arguments["img_size"] = 224
    for key, home in (("mlp_layer", timm.layers), ("act_layer", nn)):
        if key in arguments:
            arguments[key] = getattr(home, arguments[key])
    pretrained = not (weights or size_keys or only_shapes())
    try:
        network = timm.create_model(known["architecture"] if known and not pretrained else name, pretrained=pretrained,
                                    **arguments | size_keys)
    except Exception as error:                    # the hub, the network and timm's own names raise a dozen kinds
        raise UserError(gated(repository, error) or f"distilled_model_type='timm:{name}' cannot be loaded as a ViT: "
                        f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}") from None
    if getattr(network, "num_prefix_tokens", 0) < 1:
        raise UserError(f"distilled_model_type='timm:{name}' has no class token; choose another vision transformer")
    if weights:
        load_weights(network, weights)
    trained = network.pretrained_cfg
    about = {key: known.get(key, tuple(trained[key])) for key in ("mean", "std")}
    if known and not {"mean", "std"} <= known.keys():         # the architecture's own default is another one
        about = dict(IMAGENET)
    return network, dict(about, size=224 if known else trained["input_size"][-1], cls_mean=known.get("cls_mean", False))


def load_weights(network, path):
    """Load a checkpoint file into a network, all of it or UserError. weights_only: nothing in the file can run code.

    Found are the tensors at the top, or below 'teacher', 'state_dict' or 'model'; wrappers' prefixes ('module.',
    'backbone.') are taken off. A classifier ('head.', 'fc.') and heads of self-distillation are left out.
    Where only shapes count nothing is read: distributed.move_or_shard will send the values.
    """
    if only_shapes():
        return
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            values = load_file(path)
        else:
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                    # torch and safetensors raise several kinds for a foreign file
        raise UserError(f"distilled_model_weights={path!r} cannot be read ({type(error).__name__}); it needs tensors "
                        "only, as .safetensors or as torch.save writes a state_dict") from None
    while key := next((key for key in ("teacher", "state_dict", "model") if isinstance(values.get(key), dict)), None):
        values = values[key]
    for prefix in ("module.", "backbone."):
        if any(name.startswith(prefix) for name in values):
            values = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    ours = network.state_dict()
    values = {name: value for name, value in values.items()
              if name in ours or not name.startswith(("head.", "fc.", "dino_head.", "ibot_head.", "pooler."))}
    wrong = [name for name in sorted(ours.keys() | values.keys()) if "mask_token" not in name and
             (name not in ours or name not in values or ours[name].shape != values[name].shape)]
    if wrong:
        name = wrong[0]
        there, here = (tuple(group[name].shape) if name in group else "absent" for group in (values, ours))
        raise UserError(f"distilled_model_weights={path!r} does not fit distilled_model_type: {len(wrong)} tensors "
                        f"differ, the first is {name}: {there} in the file, {here} in the network")
    network.load_state_dict(values, strict=False)             # but for a mask token, which a teacher never uses


class FrozenTeacher(nn.Module):
    """A network that only looks: eval mode and no gradients for ever, weights in half precision.

    Crops of another size are resized (bicubic, antialiased). Where the number of channels differs, the mean over the
    channels is copied into each of the teacher's: for grey that is RGB from grey, and for any number it is what
    inflating the patch embedding computes (model.inflate_patch_embed), but with the teacher's own mean and std.
    """

    def __init__(self, network, size, patch_size, mean, std, n_prefix=0, cls_mean=False, intensity_range=None):
        """n_prefix: class and register tokens of a timm network, 0 = a Hugging Face one; cls_mean: its image feature is
        the CLS token and the mean patch token, side by side; intensity_range: of an export of ours, else None."""
        super().__init__()
        self.network, self.size, self.patch_size, self.n_prefix = network.eval(), size, patch_size, n_prefix
        self.cls_mean, self.intensity_range, self.grid = cls_mean, intensity_range, size // patch_size
        self.register_buffer("mean", torch.tensor(mean).float()[:, None, None], persistent=False)            # [C,1,1]
        self.register_buffer("std", torch.tensor(std).float()[:, None, None], persistent=False)
        self.requires_grad_(False)
        width = network.num_features if n_prefix else network.config.hidden_size
        self.cls_width, self.patch_width = width * (2 if cls_mean else 1), width

    def train(self, mode=True):
        """It stays in eval mode: drop path and DINOv3's random positions follow the mode."""
        return super().train(False)

    def blocks(self):
        """Its transformer blocks, which FSDP shards one by one."""
        return self.network.blocks if self.n_prefix else blocks(self.network)

    @torch.no_grad()
    def forward(self, pixels):
        """pixels [N,C,S,S] in 0..1, not normalised -> cls [N,cls_width], patches [N,grid*grid,patch_width], fp32, after
        the final norm, registers left out. Outside of autocast: its weights have the precision they should have."""
        dtype = next(self.network.parameters()).dtype
        with torch.autocast(pixels.device.type, enabled=False):
            x = pixels.float()
            if x.shape[-1] != self.size:
                x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True).clamp_(0, 1)
            if x.shape[1] != len(self.mean):
                x = x.mean(dim=1, keepdim=True)               # broadcast against mean and std [C,1,1] below
            x = ((x - self.mean) / self.std).to(dtype)                                     # [N,C,size,size]
            if self.n_prefix:
                tokens = self.network.forward_features(x)                                  # [N,prefix+P,D]
                cls, patches = tokens[:, 0], tokens[:, self.n_prefix:]
            else:
                cls, patches = forward_features(self.network, x)
            if self.cls_mean:
                cls = torch.cat([cls, patches.mean(dim=1)], dim=-1)
            return cls.float(), patches.float()


# ---- what the student should say ----

class FeatureStatistics(nn.Module):
    """Mean and std of the teacher's CLS and patch tokens in every dimension, what whitens its CLS tokens, prototypes
    among them, and the mean logit of each prototype, for losses.softmax_center.

    Fixed before training, from a few thousand views, so the student cannot move its own target (with prototypes of
    the student's EMA both drift together, and the loss stays at ln K). They are buffers: checkpoints carry them.
    """

    def __init__(self, cls_width, patch_width, n_prototypes=0, whitening=0.0):
        """whitening: 0 = standardised CLS tokens as they are, to 1 = all principal components alike; see `features`."""
        super().__init__()
        self.whitening = whitening
        for name, shape in (("cls_mean", (cls_width,)), ("cls_std", (cls_width,)), ("patch_mean", (patch_width,)),
                            ("patch_std", (patch_width,)), ("prototypes", (n_prototypes, cls_width)),
                            ("cls_whitener", (cls_width, cls_width)), ("center", (1, n_prototypes))):
            self.register_buffer(name, torch.zeros(shape))

    def standardise(self, cls, patches=None):
        """Tokens [...,D] with mean 0 and variance 1 in every dimension over the views that were measured."""
        cls = (cls - self.cls_mean) / self.cls_std
        return cls, None if patches is None else (patches - self.patch_mean) / self.patch_std

    def features(self, cls, patches=None):
        """Targets of the feature objective: as standardise, and CLS tokens partly whitened,

            z -> c z U diag(l ** (-whitening / 2)) U^T,     U diag(l) U^T = the covariance of z, c: mean variance 1

        A cosine follows the largest components of a ViT's features, in which all images of one organ agree; what tells
        them apart lies in many small ones. Wholly whitened, components of mere noise would count as much."""
        cls, patches = self.standardise(cls, patches)
        return cls @ self.cls_whitener, patches

    def logits(self, cls):
        """Cosine between standardised CLS tokens [N,D] and prototypes: [N,K], in -1..1. Divide by a temperature."""
        return F.normalize(self.standardise(cls)[0], dim=-1) @ self.prototypes.T

    @torch.no_grad()
    def measure(self, batches, seed):
        """Args: batches: yields (n [B] ints, sample numbers; cls [V*B,D]; patches [V*B,P,D] or None), a rank its share
        of every batch. Every rank gets the statistics of all, the same whatever their number. seed: of k-means."""
        rows, device = {}, self.cls_mean.device
        sums = torch.zeros(3, len(self.patch_mean), dtype=torch.float64)
        for n, cls, patches in batches:
            rows.update(zip(n, cls.cpu().unflatten(0, (-1, len(n))).unbind(1)))            # n -> [V,D]
            if patches is not None:
                x = patches.cpu().double().flatten(0, 1)                                   # [V*B*P,D]
                sums += torch.stack([torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)])
        rows = {n: views for part in gather_objects(rows) for n, views in part.items()}
        cls = torch.cat([rows[n] for n in sorted(rows)])                                   # [N,D]
        count, total, squares = all_reduce_sum(sums.to(device)).cpu()
        if count[0] > 0:
            mean = total / count
            self.patch_mean.copy_(mean)
            self.patch_std.copy_((squares / count - mean.square()).clamp_min(1e-12).sqrt())
        self.cls_mean.copy_(cls.mean(dim=0))
        self.cls_std.copy_(cls.std(dim=0, correction=0).clamp_min(1e-6))
        z = self.standardise(cls.to(device))[0]
        values, axes = torch.linalg.eigh((z.T @ z / len(z)).double().cpu())                # [D], [D,D]
        values = (values / values.mean()).clamp_min(1e-4)     # fewer views than dimensions leave some at 0
        scale = (values ** (1 - self.whitening)).mean().rsqrt()
        self.cls_whitener.copy_(scale * axes * values ** (-self.whitening / 2) @ axes.T)
        if len(self.prototypes) > len(cls):
            raise UserError(f"dino_head_out_dim={len(self.prototypes)} prototypes cannot be found among {len(cls)} "
                            "teacher features; fewer prototypes, or more distilled_statistics_views")
        if len(self.prototypes):
            x = F.normalize(z, dim=-1)
            self.prototypes.copy_(spherical_kmeans(x, len(self.prototypes), seed))
            self.center.copy_((x @ self.prototypes.T).mean(dim=0, keepdim=True))


def spherical_kmeans(x, k, seed=0, n_iterations=20):
    """k directions that x [N,D], rows of unit length, gather around: [k,D], likewise (Dhillon and Modha 2001).

    Starts from k rows drawn by seed; n_iterations times, each row joins the centre with the largest cosine, and each
    centre becomes the mean of its rows at unit length. A centre that loses all rows stays where it is.
    """
    centres = x[torch.from_numpy(np.random.default_rng(seed).permutation(len(x))[:k]).to(x.device)]
    for _ in range(n_iterations):
        nearest = (x @ centres.T).argmax(dim=1)                                            # [N]
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)                         # [k,D]
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
    return centres


# ---- features on disk ----

class FeatureCache:
    """Teacher features of fixed views in memory-mapped fp16 files: what is missing is computed once and written.

    Row (image * fixed_views + view) of cls.npy [N,V,D] and patches.npy [N,V,P,D]; done.npy [N] says which are there. A
    row is marked after its features have reached the disk, so a kill at any moment costs the rows in flight; several
    ranks of a machine share the files. about.json names what the features depend on: another teacher, set or crop is
    refused. fp16 keeps all eight bits of a bf16 teacher; what is computed leaves through fp16 as well, so the first
    epoch sees what the others see.
    """

    def __init__(self, folder, n_rows, views, cls_width, patches_shape, about):
        """patches_shape: (P, D) of the student's grid, or () where no patches are needed; about: a dict for JSON."""
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "about.json")
        about = json.loads(json.dumps(about))                 # as it comes back: tuples are lists
        if os.path.isfile(path):
            with open(path) as file:
                found = json.load(file)
            if differing := [key for key in sorted(about.keys() | found.keys()) if about.get(key) != found.get(key)]:
                key = differing[0]
                raise UserError(f"teacher_cache={folder!r} holds features of another run: {', '.join(differing)} "
                                f"differ ({key}: {found.get(key)!r} there, {about.get(key)!r} here); name another "
                                "folder")
        else:                                                 # first of all: features never lie there without it
            with open(f"{path}.{os.getpid()}.part", "w") as file:
                json.dump(about, file, indent=1)
            os.replace(f"{path}.{os.getpid()}.part", path)
        shapes = dict(done=((n_rows,), np.bool_), cls=((n_rows, views, cls_width), np.float16))
        if patches_shape:
            shapes["patches"] = (n_rows, views, *patches_shape), np.float16
            done = os.path.join(folder, "done.npy")
            if os.path.isfile(done) and not os.path.isfile(os.path.join(folder, "patches.npy")):
                os.remove(done)                               # filled by a run without patches: its rows lack them
        for name, (shape, dtype) in shapes.items():
            file = os.path.join(folder, f"{name}.npy")
            if not os.path.isfile(file):                      # beside, then renamed; zeros take no room on most disks
                np.lib.format.open_memmap(f"{file}.{os.getpid()}.part", "w+", dtype, shape).flush()
                os.replace(f"{file}.{os.getpid()}.part", file)
        self.files = {name: np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r+") for name in shapes}

    def __call__(self, rows, compute, device):
        """Features of a batch. Args: rows [B] ints; compute(which) -> (cls [V*b,D], patches [V*b,P,D] or None) for
        the places `which` of rows, view-major. Returns: cls [V*B,D], patches [V*B,P,D] or None, fp32 on the device."""
        done = self.files["done"]
        missing = [place for place, row in enumerate(rows) if not done[row]]
        if missing:
            at = [rows[place] for place in missing]
            for name, values in zip(("cls", "patches"), compute(missing)):
                if name in self.files:
                    half = values.cpu().half().unflatten(0, (-1, len(at))).transpose(0, 1)  # [b,V,...]
                    self.files[name][at] = half.numpy()
                    self.files[name].flush()
            done[at] = True
            done.flush()
        found = (torch.from_numpy(self.files[name][rows]).transpose(0, 1).flatten(0, 1).float().to(device)
                 if name in self.files else None for name in ("cls", "patches"))
        return tuple(found)
