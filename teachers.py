"""The frozen teacher of distill.py: any Hugging Face ViT or timm ViT, and its features on disk.

A teacher has its own size, normalisation, channels, patch size and width. FrozenTeacher hides them:
crops in 0..1 go in, CLS and patch tokens come out. Released teachers come without DINO heads, so
the student's targets are made of their features. FeatureStatistics standardises and whitens the
features, and turns them into logits by prototypes that the student cannot move. FeatureCache keeps
features on disk, for teachers that are too big to run in every step.
"""
import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from configurator import UserError
from distributed import all_reduce_sum, gather_objects, only_shapes
from convert import convert, is_original
from metrics import spherical_kmeans
from model import blocks, build_backbone, forward_features
from run_folder import part_of, remove_dead_parts
from weights import IMAGENET, gated, load_values, pretrained_input, read_tensors

# What timm needs to know of pathology teachers, from their model cards: the architecture with its
# arguments (so that a weights file loads without a hub), and mean and std if they are not those of
# ImageNet. All have 224 pixels. cls_mean: the image feature is the CLS token and the mean patch
# token, side by side.
SWIGLU = dict(mlp_layer="SwiGLUPacked", act_layer="SiLU")  # names in timm.layers and torch.nn
BIOPTIMUS = dict(mean=(0.707223, 0.578729, 0.703617), std=(0.211883, 0.230117, 0.177517))
PATHOLOGY_TEACHERS = {
    "MahmoodLab/UNI": dict(
        architecture="vit_large_patch16_224", arguments=dict(init_values=1e-5)),
    "MahmoodLab/UNI2-h": dict(
        architecture="vit_giant_patch14_224",
        arguments=dict(depth=24, num_heads=24, embed_dim=1536, mlp_ratio=5.33334,
                       init_values=1e-5, no_embed_class=True, reg_tokens=8, **SWIGLU)),
    "prov-gigapath/prov-gigapath": dict(
        architecture="vit_giant_patch14_dinov2",
        arguments=dict(patch_size=16, mlp_ratio=5.33334, init_values=1e-5)),
    "paige-ai/Virchow": dict(
        architecture="vit_huge_patch14_224", cls_mean=True,
        arguments=dict(mlp_ratio=5.3375, init_values=1e-5, global_pool="", **SWIGLU)),
    "paige-ai/Virchow2": dict(
        architecture="vit_huge_patch14_224", cls_mean=True,
        arguments=dict(mlp_ratio=5.3375, init_values=1e-5, global_pool="", reg_tokens=4,
                       **SWIGLU)),
    "bioptimus/H-optimus-0": dict(
        architecture="vit_giant_patch14_reg4_dinov2", arguments=dict(init_values=1e-5),
        **BIOPTIMUS),
    "bioptimus/H-optimus-1": dict(
        architecture="vit_giant_patch14_reg4_dinov2", arguments=dict(init_values=1e-5),
        **BIOPTIMUS),
    "bioptimus/H0-mini": dict(
        architecture="vit_base_patch14_reg4_dinov2",
        arguments=dict(mlp_ratio=5.33334, init_values=1e-5, **SWIGLU), **BIOPTIMUS),
}
CLS_MEAN = ("kaiko-ai/midnight",)  # Hugging Face models whose image feature has the mean, too


# ---- loading ----

def build_teacher(distilled_model_type, weights="", load_from_disk=False, size=0, fallback_size=224,
                  dtype=torch.bfloat16, **size_keys):
    """A FrozenTeacher.

    Args: distilled_model_type: a Hugging Face id or directory, an original .pth file, or
    'timm:NAME' or 'timm:hf_hub:ORG/NAME'; weights: a checkpoint file (.safetensors, or torch's)
    that replaces the released weights; load_from_disk: ask no hub; size: pixels to which a crop is
    resized, 0 = those of the teacher's training, or about fallback_size if they are not known;
    size_keys: of the architecture, for teachers without released weights (tests). Raises UserError.
    """
    if weights and not os.path.isfile(weights):
        raise UserError(f"distilled_model_weights={weights!r}: no such file; give a .safetensors "
                        "or .pt checkpoint")
    name = distilled_model_type.removeprefix("timm:")
    is_timm = name != distilled_model_type
    is_local = os.path.exists(distilled_model_type) or (weights and is_timm)
    if load_from_disk and not is_local:
        raise UserError(f"load_from_disk=true with distilled_model_type={distilled_model_type!r}: "
                        "give a local directory or .pth file, or timm:NAME with a file as "
                        "distilled_model_weights")
    if is_timm:
        network, about = _build_timm(name, weights, size_keys)
        patch, n_prefix = network.patch_embed.patch_size[0], network.num_prefix_tokens
    else:
        try:
            network = build_backbone(name, not (weights or size_keys), 0, **size_keys)
        except UserError as error:
            raise UserError(str(error).replace("model_type=", "distilled_model_type=", 1)) from None
        if weights:
            load_weights(network, weights)
        about = dict(IMAGENET, cls_mean=name in CLS_MEAN)
        if not size_keys:
            about.update(pretrained_input(name))
        patch, n_prefix = network.config.patch_size, 0
    size = size or about.get("size") or max(1, round(fallback_size / patch)) * patch
    if size % patch:
        below = size // patch * patch
        raise UserError(f"distilled_crops_size={size} is not a multiple of patch_size={patch} of "
                        f"{distilled_model_type}; use {below or patch} or {below + patch}")
    return FrozenTeacher(network.to(dtype), size, patch, about["mean"], about["std"],
                         n_prefix=n_prefix, cls_mean=about.get("cls_mean", False),
                         intensity_range=about.get("intensity_range"))


def _build_timm(name, weights, size_keys):
    """(network, dict of its input settings) of timm's NAME or hf_hub:ORG/NAME."""
    try:
        import timm
    except ImportError:
        raise UserError(f"distilled_model_type='timm:{name}' needs timm; pip install timm"
                        ) from None
    repository = name.replace("hf-hub:", "hf_hub:").partition("hf_hub:")[2]
    by_lower_name = {key.lower(): value for key, value in PATHOLOGY_TEACHERS.items()}
    known = by_lower_name.get(repository.lower(), {})
    arguments = dict(num_classes=0, dynamic_img_size=True, **known.get("arguments", {}))
    if known:
        arguments["img_size"] = 224
    for key, home in (("mlp_layer", timm.layers), ("act_layer", nn)):
        if key in arguments:
            arguments[key] = getattr(home, arguments[key])
    pretrained = not (weights or size_keys or only_shapes())
    architecture = known["architecture"] if known and not pretrained else name
    try:
        network = timm.create_model(architecture, pretrained=pretrained, **arguments | size_keys)
    except Exception as error:  # the hub, the network and timm's own names raise a dozen kinds
        reason = (str(error).splitlines() or [""])[0][:160]
        text = (f"distilled_model_type='timm:{name}' cannot be loaded as a ViT: "
                f"{type(error).__name__}: {reason}")
        raise UserError(gated(repository, error) or text) from None
    if getattr(network, "num_prefix_tokens", 0) < 1:
        raise UserError(f"distilled_model_type='timm:{name}' has no class token; choose another "
                        "vision transformer")
    if weights:
        load_weights(network, weights)
    trained = network.pretrained_cfg
    if not known:
        about = dict(mean=tuple(trained["mean"]), std=tuple(trained["std"]),
                     size=trained["input_size"][-1])
    else:  # the default of the architecture is another mean and std
        about = dict(mean=known.get("mean", IMAGENET["mean"]),
                     std=known.get("std", IMAGENET["std"]), size=224)
    return network, dict(about, cls_mean=known.get("cls_mean", False))


def load_weights(network, path):
    """Load a checkpoint file into a network. Raises UserError if one tensor is missing, left over
    or of another shape. Nothing in the file can run code, because it is read with weights_only.

    Names may be those of the network, those on the hub, or those of DINO's, DINOv2's and DINOv3's
    own code (weights.read_tensors, convert.convert). A classifier ('head.', 'fc.') and heads of
    self-distillation are left out. A rank that has only shapes reads nothing:
    distributed.move_or_shard will send the values.
    """
    if only_shapes():
        return
    key = "distilled_model_weights"
    values, ours = read_tensors(path, key), network.state_dict()
    is_of_transformers = hasattr(network, "config")
    if is_of_transformers and is_original(values):
        _, values = convert(values, path, key)
    heads = ("head.", "fc.", "dino_head.", "ibot_head.", "pooler.")
    values = {name: value for name, value in values.items()
              if name in ours or not name.startswith(heads)}
    attention = [name for name in values if "attention" in name]
    has_old_names = bool(attention) and not any(name in ours for name in attention)
    if is_of_transformers and has_old_names:  # those on the hub; transformers knows both
        values = load_values(network.config, "", values, f"{key}={path!r}").state_dict()

    def shape(tensors, name):
        if name not in tensors:
            return "absent"
        return tuple(getattr(tensors[name], "shape", ()))

    wrong = [name for name in sorted(ours.keys() | values.keys())
             if "mask_token" not in name and shape(ours, name) != shape(values, name)]
    if wrong:
        name = wrong[0]
        raise UserError(f"distilled_model_weights={path!r} does not fit distilled_model_type: "
                        f"{len(wrong)} tensors differ, the first is {name}: {shape(values, name)} "
                        f"in the file, {shape(ours, name)} in the network")
    network.load_state_dict(values, strict=False)  # a mask token may be missing: it is never used


def check_same_teacher(run):
    """UserError if a resumed run (run.Run) has another teacher now, or other statistics of it: the
    checkpoint has those of its start."""
    for key in ("distilled_model_type", "distilled_model_weights", "distilled_crops_size",
                "distilled_statistics_views", "feature_whitening"):
        before, value = run.saved["config"][key], getattr(run.config, key)
        if before != value:
            raise UserError(f"resume_from={run.resumed_from!r}: {key} is {before!r} there, "
                            f"{value!r} now; what the student learnt to match is that teacher's: "
                            "take its value, or start a new run")


class FrozenTeacher(nn.Module):
    """A network that is never trained: always in eval mode, without gradients, its weights in half
    precision.

    Crops of another size are resized (bicubic, antialiased). If the number of channels differs, the
    mean over the channels is copied into each of the teacher's channels. For grey that is RGB from
    grey. For any number it is what inflating the patch embedding computes
    (model.inflate_patch_embed), but with the teacher's own mean and std.
    """

    def __init__(self, network, size, patch_size, mean, std, n_prefix=0, cls_mean=False,
                 intensity_range=None):
        """n_prefix: number of class and register tokens of a timm network, 0 = a Hugging Face one;
        cls_mean: the image feature is the CLS token and the mean patch token, side by side;
        intensity_range: of an export of ours, else None."""
        super().__init__()
        self.network, self.n_prefix, self.cls_mean = network.eval(), n_prefix, cls_mean
        self.size, self.patch_size, self.grid = size, patch_size, size // patch_size
        self.intensity_range = intensity_range
        for name, values in (("mean", mean), ("std", std)):  # [C,1,1] each
            values = torch.tensor(values).float()[:, None, None]
            self.register_buffer(name, values, persistent=False)
        self.requires_grad_(False)
        width = network.num_features if n_prefix else network.config.hidden_size
        self.cls_width, self.patch_width = width * (2 if cls_mean else 1), width

    def describe(self, name):
        """The teacher in one line."""
        dtype = next(self.parameters()).dtype
        count = sum(param.numel() for param in self.parameters()) / 1e6
        return (f"teacher: {name}, width {self.patch_width}, image feature {self.cls_width}, patch "
                f"{self.patch_size}, {count:.1f} M parameters in {dtype}; sees crops at "
                f"{self.size} pixels, {len(self.mean)} channel(s)")

    def train(self, mode=True):
        """Stay in eval mode: drop path and DINOv3's random positions follow the mode."""
        return super().train(False)

    def blocks(self):
        """The transformer blocks, which FSDP shards one by one."""
        return self.network.blocks if self.n_prefix else blocks(self.network)

    @torch.no_grad()
    def forward(self, pixels):
        """pixels [N,C,S,S] in 0..1, not normalised -> cls [N,cls_width] and patches
        [N,grid*grid,patch_width], fp32, after the final norm, without registers. Autocast is off,
        because the weights have their precision already."""
        dtype = next(self.network.parameters()).dtype
        with torch.autocast(pixels.device.type, enabled=False):
            x, size = pixels.float(), (self.size, self.size)
            if x.shape[-1] != self.size:
                x = F.interpolate(x, size=size, mode="bicubic", antialias=True)
                x = x.clamp_(0, 1)
            if x.shape[1] != len(self.mean):
                x = x.mean(dim=1, keepdim=True)  # broadcast against mean and std [C,1,1] below
            x = ((x - self.mean) / self.std).to(dtype)  # [N,C,size,size]
            if self.n_prefix:
                tokens = self.network.forward_features(x)  # [N,prefix+P,D]
                cls, patches = tokens[:, 0], tokens[:, self.n_prefix:]
            else:
                cls, patches = forward_features(self.network, x)
            if self.cls_mean:
                cls = torch.cat([cls, patches.mean(dim=1)], dim=-1)
            return cls.float(), patches.float()


# ---- targets of the student ----

class FeatureStatistics(nn.Module):
    """Statistics of the teacher's features, and the targets that are made with them.

    They are the mean and std of CLS and patch tokens in every dimension, the matrix that whitens
    CLS tokens, prototypes among the CLS tokens, and the mean logit of each prototype (for
    losses.softmax_center). They are fixed before training, from a few thousand views, so the
    student cannot move its own target. (With prototypes of the student's EMA both drift together,
    and the loss stays at ln K.) They are buffers, so checkpoints hold them.
    """

    def __init__(self, cls_width, patch_width, n_prototypes=0, whitening=0.0):
        """whitening: from 0 = standardised CLS tokens to 1 = equal variance of all principal
        components; see `features`."""
        super().__init__()
        self.whitening = whitening
        shapes = dict(cls_mean=(cls_width,), cls_std=(cls_width,), patch_mean=(patch_width,),
                      patch_std=(patch_width,), prototypes=(n_prototypes, cls_width),
                      cls_whitener=(cls_width, cls_width), center=(1, n_prototypes))
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def standardise(self, cls, patches=None):
        """(cls, patches): tokens [...,D] with mean 0 and variance 1 in every dimension over the
        views that were measured."""
        cls = (cls - self.cls_mean) / self.cls_std
        if patches is not None:
            patches = (patches - self.patch_mean) / self.patch_std
        return cls, patches

    def features(self, cls, patches=None):
        """Targets of the feature objective: as standardise, and CLS tokens z are partly whitened:

            z -> c z U diag(l ** (-whitening / 2)) U^T

        with U diag(l) U^T the covariance of z, and c such that the mean variance is 1. A cosine
        follows the largest components of a ViT's features, which are alike in all images of one
        organ. The differences are in many small components. Full whitening would give components
        that are only noise the same weight."""
        cls, patches = self.standardise(cls, patches)
        return cls @ self.cls_whitener, patches

    def logits(self, cls):
        """Cosine between standardised CLS tokens [N,D] and prototypes: [N,K], in -1..1. Divide by a
        temperature."""
        cls, _ = self.standardise(cls)
        return F.normalize(cls, dim=-1) @ self.prototypes.T

    @torch.no_grad()
    def measure(self, batches, seed):
        """Set all statistics. Every rank gets those of all views, whatever the number of ranks.

        Args: batches: yields (n [B] ints, sample numbers; cls [V*B,D]; patches [V*B,P,D] or None),
        this rank's share of every batch; seed: of k-means.
        Raises UserError if there are fewer views than prototypes.
        """
        views = {}  # sample number -> [V,D]
        device = self.cls_mean.device
        sums = torch.zeros(3, len(self.patch_mean), dtype=torch.float64)
        for n, cls, patches in batches:
            by_image = cls.cpu().unflatten(0, (-1, len(n)))  # [V,B,D]
            views.update(zip(n, by_image.unbind(1)))
            if patches is not None:
                x = patches.cpu().double().flatten(0, 1)  # [V*B*P,D]
                sums[0] += len(x)
                sums[1] += x.sum(0)
                sums[2] += x.square().sum(0)
        gathered = {}
        for part in gather_objects(views):
            gathered.update(part)
        cls = torch.cat([gathered[n] for n in sorted(gathered)])  # [N,D]
        self._set_patch_statistics(*all_reduce_sum(sums.to(device)).cpu())
        self.cls_mean.copy_(cls.mean(dim=0))
        self.cls_std.copy_(cls.std(dim=0, correction=0).clamp_min(1e-6))
        z = self.standardise(cls.to(device))[0]
        self._set_whitener(z)
        if len(self.prototypes) > len(cls):
            raise UserError(f"dino_head_out_dim={len(self.prototypes)} prototypes cannot be found "
                            f"among {len(cls)} teacher features; fewer prototypes, or more "
                            "distilled_statistics_views")
        if len(self.prototypes):
            x = F.normalize(z, dim=-1)
            self.prototypes.copy_(spherical_kmeans(x, len(self.prototypes), seed))
            cosines = x @ self.prototypes.T  # [N,K]
            self.center.copy_(cosines.mean(dim=0, keepdim=True))

    def _set_patch_statistics(self, count, total, squares):
        """count, total, squares [D] float64: number, sum and sum of squares of patch tokens."""
        if count[0] > 0:
            mean = total / count
            variance = (squares / count - mean.square()).clamp_min(1e-12)
            self.patch_mean.copy_(mean)
            self.patch_std.copy_(variance.sqrt())

    def _set_whitener(self, z):
        """z [N,D]: standardised CLS tokens."""
        covariance = (z.T @ z / len(z)).double().cpu()
        values, axes = torch.linalg.eigh(covariance)  # [D], [D,D]
        # fewer views than dimensions leave some eigenvalues at 0
        values = (values / values.mean()).clamp_min(1e-4)
        scale = (values ** (1 - self.whitening)).mean().rsqrt()
        self.cls_whitener.copy_(scale * axes * values ** (-self.whitening / 2) @ axes.T)


# ---- features on disk ----

class FeatureCache:
    """Teacher features of fixed views in memory-mapped fp16 files. Missing ones are computed once
    and written.

    Row (image * fixed_views + view) of cls.npy [N,V,D] and patches.npy [N,V,P,D] has the features,
    and done.npy [N] says which rows are there. A row is marked after its features have reached the
    disk, so a kill at any moment costs only the rows in flight. The ranks of a machine share the
    files. about.json names what the features depend on: a cache of another teacher, data set or
    crop is refused. fp16 keeps all eight bits of a bf16 teacher. New features, too, are returned
    through fp16, so the first epoch has the same targets as the later ones.
    """

    def __init__(self, folder, n_rows, views, cls_width, patches_shape, about):
        """patches_shape: (P, D) of the student's grid, or () if no patches are needed; about: a
        dict for JSON. Raises UserError if the folder holds features of another `about`."""
        os.makedirs(folder, exist_ok=True)
        remove_dead_parts(folder)
        self._check_about(folder, about)  # first: no features without about.json
        shapes = dict(done=(n_rows,), cls=(n_rows, views, cls_width))
        paths = dict(done=f"{folder}/done.npy", cls=f"{folder}/cls.npy")
        if patches_shape:
            shapes["patches"] = (n_rows, views, *patches_shape)
            paths["patches"] = f"{folder}/patches.npy"
            is_new = not os.path.isfile(paths["patches"])
            if is_new and os.path.isfile(paths["done"]):
                os.remove(paths["done"])  # filled by a run without patches: its rows lack them
        self.files = {}
        for name, path in paths.items():
            if not os.path.isfile(path):  # beside, then renamed; zeros take no room on most disks
                part = part_of(path)
                dtype = np.bool_ if name == "done" else np.float16
                np.lib.format.open_memmap(part, "w+", dtype, shapes[name]).flush()
                os.replace(part, path)
            self.files[name] = np.load(path, mmap_mode="r+")

    @staticmethod
    def _check_about(folder, about):
        """Write about.json, or compare it with `about` if it is there."""
        path = os.path.join(folder, "about.json")
        about = json.loads(json.dumps(about))  # as it comes back: tuples are lists
        if not os.path.isfile(path):
            part = part_of(path)
            with open(part, "w") as file:
                json.dump(about, file, indent=1)
            os.replace(part, path)
            return
        with open(path) as file:
            found = json.load(file)
        keys = sorted(about.keys() | found.keys())
        differing = [key for key in keys if about.get(key) != found.get(key)]
        if differing:
            key = differing[0]
            raise UserError(f"teacher_cache={folder!r} holds features of another run: "
                            f"{', '.join(differing)} differ ({key}: {found.get(key)!r} there, "
                            f"{about.get(key)!r} here); name another folder")

    def __call__(self, rows, compute, device):
        """Features of a batch.

        Args: rows [B] ints; compute: function (positions) -> (cls [V*b,D], patches [V*b,P,D] or
        None), view-major, for the b given positions in `rows`; it is called if rows are missing.
        Returns: cls [V*B,D], patches [V*B,P,D] or None, fp32 on the device.
        """
        done = self.files["done"]
        missing = [position for position, row in enumerate(rows) if not done[row]]
        if missing:
            self._write([rows[position] for position in missing], *compute(missing))
        cls, patches = self._read("cls", rows, device), None
        if "patches" in self.files:
            patches = self._read("patches", rows, device)
        return cls, patches

    def _write(self, rows, cls, patches):
        """Write features, view-major, to their b rows; then mark the rows."""
        for name, values in (("cls", cls), ("patches", patches)):
            if name in self.files:
                values = values.cpu().half()
                values = values.unflatten(0, (-1, len(rows)))  # [V,b,...]
                self.files[name][rows] = values.transpose(0, 1).numpy()
                self.files[name].flush()
        self.files["done"][rows] = True
        self.files["done"].flush()

    def _read(self, name, rows, device):
        """The features of rows [B], view-major [V*B,...]."""
        values = torch.from_numpy(self.files[name][rows])  # [B,V,...]
        return values.transpose(0, 1).flatten(0, 1).float().to(device)
