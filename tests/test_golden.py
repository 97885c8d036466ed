"""Parity with the reference implementations of DINO, DINOv2 and DINOv3, by numbers computed with them (tests/golden).

Every size, case name and hyper-parameter is read from the files: GOLDEN=/another/family of files with the same keys
must pass too.
Compositions and trajectories run through train.py's own functions, with its config globals set as the files say.
"""
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from augment import sample_masks
from losses import dino_loss, gram_loss, ibot_loss, koleo_loss, sinkhorn_knopp, softmax_center, update_center
from model import DINOHead, EMATeacher, Student, build_backbone, forward_features
from optim import clip_gradients, cosine_schedule, linear_schedule, param_groups
from metrics import knn_classify
from tests_support import load_script

GOLDEN = os.environ.get("GOLDEN", os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden"))


def golden(name):
    path = os.path.join(GOLDEN, f"{name}.npz")
    if "GOLDEN" in os.environ and not os.path.exists(path):
        pytest.skip(f"{path} is not in this family of files")
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def cases(name, pattern):
    """The distinct first groups of a pattern among the keys of a file, known before any test runs."""
    try:
        keys = golden(name)
    except pytest.skip.Exception:
        return []
    return sorted({match[1] for key in keys if (match := re.match(pattern, key))})


def tensor(array):
    return torch.from_numpy(np.array(array))


def close(ours, theirs, rtol=1e-5, atol=0.0):
    ours = ours.detach().double().numpy() if torch.is_tensor(ours) else np.asarray(ours, dtype=np.float64)
    theirs = np.asarray(theirs, dtype=np.float64)
    assert ours.shape == theirs.shape
    # of the whole array: a gradient's small entries are rounding
    scale = np.abs(theirs).max() if theirs.size else 0
    assert np.abs(ours - theirs).max(initial=0) <= rtol * scale + atol, (np.abs(ours - theirs).max(), scale)


def value_and_grad(function, x):
    x = tensor(x).requires_grad_()
    value = function(x)
    value.backward()
    return value, x.grad


# ---- losses and targets ----

def test_dino_v1_loss_and_centre():
    g = golden("dino_v1_loss")
    for run in sorted({key.split("_")[0] for key in g if key.endswith("_center_0")}):
        B, crops = int(g[f"{run}_B"]), 2 + int(g[f"{run}_n_local"])
        center = tensor(g[f"{run}_center_0"])
        for c in sorted(int(key.rsplit("_", 1)[1]) for key in g if re.fullmatch(rf"{run}_student_\d+", key)):
            teacher = tensor(g[f"{run}_teacher_{c}"])
            probs = softmax_center(teacher, center, float(g[f"{run}_teacher_temp_{c}"])).view(2, B, -1)
            loss, grad = value_and_grad(lambda s: dino_loss(s.view(crops, B, -1), probs, float(g["student_temp"])),
                                        g[f"{run}_student_{c}"])
            close(loss, g[f"{run}_loss_{c}"])
            close(loss, g[f"{run}_loss_fp64_{c}"])
            close(grad, g[f"{run}_grad_student_{c}"])
            center = update_center(center, teacher, float(g["center_momentum"]))
            close(center, g[f"{run}_center_{c + 1}"], atol=1e-7)
            close(center, g[f"{run}_center_fp64_{c + 1}"], atol=1e-7)


def test_softmax_centering():
    g = golden("softmax_centering")
    for kind in ("cls", "patch"):
        center = torch.zeros_like(tensor(g[f"{kind}_center_final"]).reshape(1, -1))
        for c, temp in enumerate(g["temps"]):
            logits = tensor(g[f"{kind}_logits_{c}"]).flatten(0, -2)
            close(center, g[f"{kind}_center_used_{c}"].reshape(1, -1), atol=1e-7)
            close(softmax_center(logits, center, float(temp)), g[f"{kind}_probs_{c}"].reshape(len(logits), -1),
                  rtol=1e-6, atol=1e-6)
            center = update_center(center, logits, float(g["center_momentum"]))
        close(center, g[f"{kind}_center_final"].reshape(1, -1), atol=1e-7)


def test_sinkhorn():
    g, found = golden("sinkhorn"), 0
    for key in g:
        match = re.fullmatch(r"(.+)_(cls|patch)_T(\d+)(_1it|_count_x3)?", key)
        if match:
            probs = sinkhorn_knopp(tensor(g[f"{match[1]}_{match[2]}_logits"]), int(match[3]) / 1000,
                                   1 if match[4] == "_1it" else 3)
            close(probs, g[key], rtol=1e-6, atol=1e-6)
            found += 1
    assert found >= 8


def test_dino_cross_entropy_of_v2_and_v3():
    g = golden("dino_ce_v2_v3")
    for case in sorted({key.split("_")[0] for key in g if key.endswith("_student")}):
        probs = tensor(g[f"{case}_teacher_probs"])
        S, T = map(int, re.fullmatch(r"s(\d+)t(\d+)", case).groups())
        for name, ignore, scale in (("v2", False, S * T), ("v3_ignore_false", False, 1), ("v3_ignore_true", True, 1)):
            if f"{case}_{name}_loss" in g and not (ignore and S * T == min(S, T)):
                loss, grad = value_and_grad(lambda s: scale * dino_loss(s, probs, ignore_diagonal=ignore),
                                            g[f"{case}_student"])
                close(loss, g[f"{case}_{name}_loss"])
                close(grad, g[f"{case}_{name}_grad"])


def test_ibot():
    g = golden("ibot_loss")
    probs, masks = tensor(g["teacher_masked_probs"]), tensor(g["masks"])
    loss, grad = value_and_grad(lambda s: ibot_loss(s, probs, masks), g["student_masked"])
    for version in ("v2", "v3"):
        close(loss, g[f"{version}_loss"])
        close(loss, g[f"{version}_loss_default_weight"])
        close(grad, g[f"{version}_grad"])


def test_koleo():
    g = golden("koleo")
    for case in sorted({key[:-2] for key in g if key.endswith("_x")}):
        loss, grad = value_and_grad(koleo_loss, g[f"{case}_x"])
        nearest = float(torch.pdist(F.normalize(tensor(g[f"{case}_x"]).double(), dim=1)).min())
        for version in ("v2", "v3", "fp64"):                   # fp32 knows a small distance to few digits only
            close(loss, g[f"{case}_{version}_loss"], rtol=1e-5 if nearest > 0.01 else 2e-5)
            if f"{case}_{version}_grad" in g and nearest > 1e-6:     # at distance 0 it is that of the added 1e-8
                close(grad, g[f"{case}_{version}_grad"], rtol=1e-5 + 1e-6 / nearest)


def test_gram():
    g = golden("gram")
    student, teacher = g["student"], tensor(g["teacher"])
    for case in g["cases"]:
        norm, neg, tneg, img = (int(digit) for digit in re.findall(r"\d", str(case)))
        together = (lambda x: x) if img else (lambda x: x.flatten(0, 1)[None])
        options = bool(neg), bool(tneg), bool(norm)
        loss, grad = value_and_grad(lambda s: gram_loss(together(s), together(teacher), *options), student)
        close(loss, g[f"{case}_loss"])
        close(grad, g[f"{case}_grad"])
    mask = tensor(g["flat_mask"])
    loss, grad = value_and_grad(lambda s: gram_loss(s[None], teacher[mask][None]), student[g["flat_mask"]])
    close(loss, g["flat_loss"])
    close(grad, g["flat_grad"])
    close(gram_loss(tensor(g["hires_student"]), tensor(g["hires_teacher"])), g["hires_loss"])
    close(gram_loss(tensor(g["hires_student"]), tensor(g["hires_teacher_resized"])), g["hires_loss"])
    with pytest.raises(ValueError, match="exclude each other"):
        gram_loss(tensor(student), teacher, True, True)


# ---- heads ----

def head_names(name):
    """Their state-dict name -> ours: weight norm is a parametrization now."""
    return name.replace("last_layer.weight_g", "last_layer.parametrizations.weight.original0").replace(
        "last_layer.weight_v", "last_layer.parametrizations.weight.original1")


def build_head(weights, trainable=None):
    """A DINOHead of the shape of a golden state dict {their name: array}, with these weights in it, strictly."""
    linear = [key for key in weights if re.fullmatch(r"mlp(\.\d+)?\.weight", key)]
    first = weights[linear[0]]
    last = weights.get("last_layer.weight_v", weights.get("last_layer.weight"))
    norm = trainable is not None and "last_layer.weight_g" not in trainable
    head = DINOHead(first.shape[1], last.shape[0], first.shape[0], last.shape[1], norm_last_layer=norm,
                    weight_norm="last_layer.weight_v" in weights, n_layers=len(linear))
    head.load_state_dict({head_names(key): tensor(value) for key, value in weights.items()})
    return head


def prefixed(g, prefix):
    return {key[len(prefix):]: value for key, value in g.items() if key.startswith(prefix)}


def test_heads():
    g = golden("heads")
    for version in sorted({key.split("/")[0] for key in g if "/w/" in key}):
        trainable = [str(name) for name in g[f"{version}/trainable"]]
        head = build_head(prefixed(g, f"{version}/w/"), trainable)
        ours = {name for name, param in head.named_parameters() if param.requires_grad}
        assert ours == {head_names(name) for name in trainable}
        x = tensor(g[f"{version}/x"]).requires_grad_()
        y = head(x)
        close(y, g[f"{version}/y"], rtol=1e-5)
        (y * tensor(g[f"{version}/R"])).sum().backward()
        close(x.grad, g[f"{version}/grad_x"])
        params, compared = dict(head.named_parameters()), 0
        for name in ("weight_v", "weight_g", "last_layer"):    # the gradients in the file
            if f"{version}/grad_{name}" in g:
                close(params[head_names(f"last_layer.{name}" if name != "last_layer" else "last_layer.weight")].grad,
                      g[f"{version}/grad_{name}"])
                compared += 1
        assert compared


def test_heads_start_like_the_reference():
    g = golden("heads")
    for version in sorted({key.split("_init")[0] for key in g if "_init/names" in key}):
        names = [str(name) for name in g[f"{version}_init/names"]]
        torch.manual_seed(0)
        head = dict(DINOHead(64, 512, 128, 64, weight_norm="last_layer.weight_v" in names).named_parameters())
        for i, name in enumerate(names):
            ours = head[head_names(name)].detach()
            std, absmax = float(g[f"{version}_init/std"][i]), float(g[f"{version}_init/absmax"][i])
            assert abs(float(ours.std()) - std) <= 0.05 * std + 1e-9
            assert abs(float(ours.mean()) - float(g[f"{version}_init/mean"][i])) <= 0.1 * std + 1e-9
            assert absmax * 0.7 - 1e-9 <= float(ours.abs().max()) <= absmax * 1.4 + 1e-9


# ---- k-NN ----

def test_knn():
    g = golden("knn")
    for case in sorted({key.split("_")[0] for key in g}):
        train, labels, test, truth = (tensor(g[f"{case}_{key}"]) for key in ("train_x", "train_y", "test_x", "test_y"))
        for key in g:
            if match := re.fullmatch(rf"{case}_k(\d+)_top1", key):
                predictions = knn_classify(train, labels, test, int(match[1]), temperature=0.07)
                close(100 * (predictions == truth).float().mean(), g[key], rtol=1e-6)
                if f"{case}_k{match[1]}_pred" in g:
                    assert (predictions.numpy() == g[f"{case}_k{match[1]}_pred"]).all()
            if match := re.fullmatch(rf"{case}_majority_k(\d+)_pred", key):
                # equal votes go to the nearest class here, to the smallest label there: they may differ in these only
                k = int(match[1])
                nearest = labels.long()[(F.normalize(test, dim=1) @ F.normalize(train, dim=1).T).topk(k).indices]
                votes = F.one_hot(nearest, int(g[f"{case}_num_classes"])).sum(1).sort(descending=True).values
                clear = votes[:, 0] > votes[:, 1]
                assert int((~clear).sum()) == int(g[f"{case}_majority_k{k}_n_vote_ties"])
                assert (knn_classify(train, labels, test, k).numpy() == g[key])[clear.numpy()].all()


# ---- schedules ----

def series(function, n):
    return [function(i) for i in range(n)]


def exact(ours, theirs):
    close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_schedules_v1():
    g = golden("schedules")
    epochs, per_epoch = int(g["v1_epochs"]), int(g["v1_niter_per_epoch"])
    total, warmup = epochs * per_epoch, int(g["v1_warmup_epochs"]) * per_epoch
    base, low = float(g["v1_lr_base"]), float(g["v1_lr_min"])
    exact(series(lambda i: cosine_schedule(base, low, i, total, warmup), total), g["v1_lr"])
    exact(series(lambda i: cosine_schedule(base, low, i, total, warmup, base / 10), total), g["v1_lr_startwarmup"])
    exact(series(lambda i: cosine_schedule(0.04, 0.4, i, total), total), g["v1_wd"])
    exact(series(lambda i: cosine_schedule(float(g["v1_momentum_base"]), 1.0, i, total), total), g["v1_momentum"])
    n = int(g["v1_teacher_temp_warmup_epochs"])
    exact(series(lambda i: linear_schedule(0.04, 0.07, i, n), epochs), g["v1_teacher_temp_per_epoch"])
    exact(series(lambda i: linear_schedule(0.04, 0.04, i, 0), epochs), g["v1_teacher_temp_nowarmup"])


def test_schedules_v2():
    g = golden("schedules")
    total, warmup, freeze = (int(g[f"v2_{key}_iters"]) for key in ("total", "warmup", "freeze"))
    base, final = float(g["v2_lr_base"]), float(g["v2_lr_final"])

    def frozen(start):                                         # zeros first, then the same schedule over what is left
        return lambda i: 0.0 if i < freeze else cosine_schedule(base, final, i - freeze, total - freeze, warmup, start)
    exact(series(lambda i: cosine_schedule(base, final, i, total, warmup), total), g["v2_lr"])
    exact(series(frozen(0.0), total), g["v2_lr_freeze"])
    exact(series(frozen(base / 5), total), g["v2_lr_startwarmup"])
    exact(series(lambda i: cosine_schedule(base, final, i, total), total), g["v2_nowarmup"])
    exact(series(lambda i: cosine_schedule(base, final, total + i, total, warmup), len(g["v2_lr_beyond"])),
          g["v2_lr_beyond"])
    per_epoch, peak = int(g["v2cfg_epoch_length"]), float(g["v2cfg_scaled_lr"])
    total, n = int(g["v2cfg_epochs"]) * per_epoch, len(g["v2cfg_lr"])
    exact(peak, float(g["v2cfg_base_lr"]) * (float(g["v2cfg_batch_size"]) / 1024) ** 0.5)
    exact(series(lambda i: cosine_schedule(peak, 1e-6, i, total, 2 * per_epoch), n), g["v2cfg_lr"])
    exact(series(lambda i: 0.0 if i < per_epoch else cosine_schedule(peak, 1e-6, i, total, 2 * per_epoch), n),
          g["v2cfg_last_layer_lr"])
    exact(series(lambda i: cosine_schedule(0.04, 0.4, i, total), n), g["v2cfg_wd"])
    exact(series(lambda i: cosine_schedule(0.992, 1.0, i, total), n), g["v2cfg_momentum"])
    exact(series(lambda i: linear_schedule(0.04, 0.07, i, 3 * per_epoch), n), g["v2cfg_teacher_temp"])


def test_schedules_v3():
    g = golden("schedules")
    total, warmup, cosine = (int(g[f"v3_{key}"]) for key in ("total", "warmup", "cosine"))
    start, peak, end = (float(g[f"v3_{key}"]) for key in ("start", "peak", "end"))

    def v3(peak, end, warmup, cosine, start=start):
        return series(lambda i: cosine_schedule(peak, end, i, warmup + cosine, warmup, start, reach_end=True), total)
    exact(v3(peak, end, warmup, total - warmup), g["v3_full"])
    exact(v3(peak, end, warmup, cosine), g["v3_partial"])
    exact(v3(peak, end, 0, total), g["v3_nowarmup"])
    # truncated: the first part of a cosine 1.25 times as long, stretched to arrive at the end
    n = total - warmup
    u = np.array(series(lambda i: cosine_schedule(1.0, 0.0, i, int(1.25 * n), reach_end=True), n))
    u = (u - u[-1]) / (1 - u[-1])
    exact(series(lambda i: linear_schedule(0.0, peak, i, warmup), warmup) + list(end + (peak - end) * u),
          g["v3_trunc025"])
    exact(v3(1.0, 0.5, warmup, 1, start=1.0), g["v3_cosine1"])
    exact(v3(peak, peak, warmup, cosine, start=peak), g["v3_constant"])
    per_epoch, n = int(g["v3cfg_epoch_length"]), len(g["v3cfg_lr"])
    scale, total_cfg = 4 * (float(g["v3cfg_batch_size"]) / 1024) ** 0.5, int(g["v3cfg_epochs"]) * per_epoch

    def lr_at(i):
        return cosine_schedule(1e-3 * scale, 1e-6 * scale, i, total_cfg, 2 * per_epoch, 1e-6, reach_end=True)
    exact(series(lr_at, n), g["v3cfg_lr"])
    exact(series(lambda i: 0.0 if i < per_epoch else lr_at(i), n), g["v3cfg_last_layer_lr"])
    exact(series(lambda i: cosine_schedule(0.04, 0.2, i, total_cfg, reach_end=True), n), g["v3cfg_wd"])
    exact(series(lambda i: cosine_schedule(0.99, 1.0, i, 6 * per_epoch, reach_end=True), n), g["v3cfg_momentum"])
    # the temperature of v3: a warm-up that stops short of its end, then constant
    exact(series(lambda i: cosine_schedule(0.07, 0.07, i, total_cfg, 3 * per_epoch, 0.04, reach_end=True), n),
          g["v3cfg_teacher_temp"])


# ---- masks ----

def components(mask):
    """Number of 4-connected parts of an [h,w] bool mask."""
    left, count = {tuple(p) for p in np.argwhere(mask)}, 0
    while left:
        count, stack = count + 1, [left.pop()]
        while stack:
            y, x = stack.pop()
            for p in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if p in left:
                    left.remove(p)
                    stack.append(p)
    return count


@pytest.mark.parametrize("prefix", cases("masks", r"(.+)_counts$"))
def test_masks_have_the_distribution_of_the_reference(prefix):
    g = prefixed(golden("masks"), f"{prefix}_")
    grid, (batches, crops) = g["examples"].shape[1], g["counts"].shape
    rng = np.random.default_rng(0)
    masks = torch.stack([sample_masks(crops, grid, rng, exact=prefix.startswith("v3")) for _ in range(batches)])
    counts = masks.sum(-1).numpy()
    # exactly so many in every batch
    assert ((counts > 0).mean(axis=1) == float(g["fraction_masked"])).all() or grid < 4
    if prefix.startswith("v3"):
        # the same numbers in every batch
        assert (np.sort(counts, axis=1) == np.sort(g["counts"], axis=1)).all()
    masked, theirs = counts[counts > 0], g["counts"][g["counts"] > 0]
    assert abs(masked.mean() / theirs.mean() - 1) < 0.005
    bins = np.arange(grid * grid + 2)
    ours, reference = (np.histogram(x, bins)[0].cumsum() / len(x) for x in (masked, theirs))
    assert np.abs(ours - reference).max() < 0.02
    blocks = masks.flatten(0, 1)[counts.flatten() > 0].view(-1, grid, grid).numpy()
    assert abs(np.mean([components(mask) for mask in blocks]) / float(g["mean_components"]) - 1) < 0.02
    assert np.abs(masks.float().mean((0, 1)).numpy().reshape(grid, grid) - g["occupancy"]).max() < 0.01


# ---- parameter groups ----

def student_like(family, hf_names, head_names_, head):
    """A tiny Student of the family, as deep as the names say, to ask for its groups under the names of the file."""
    depth = 1 + max(int(match[1]) for name in hf_names if (match := re.search(r"layers?\.(\d+)\.", name)))
    backbone = build_backbone(family, False, hidden_size=8, num_hidden_layers=depth, num_attention_heads=2,
                              image_size=16, patch_size=8)
    n_layers = sum(re.search(r"mlp(\.\d+)?\.weight", name) is not None for name in head_names_)
    return Student(backbone, DINOHead(8, 6, 5, 4, n_layers=n_layers, **head))


def groups_by_name(student, **settings):
    return {name: group for group in param_groups(student, 1.0, 1.0, **settings) for name in group["names"]}


def hf_list(entry):
    """The HF names of one official tensor: three where it is the fused qkv, none where HF has none."""
    return [name for name in str(entry).split("|") if name]


@pytest.mark.parametrize("case", cases("param_groups", r"v1_(.+)_group$"))
def test_param_groups_v1(case):
    g = golden("param_groups")
    names = [hf_list(entry) for entry in g[f"v1_{case}_hf_names"]]
    flat = sum(names, [])
    group_of = {our_name(name): group for hf, group in zip(names, g[f"v1_{case}_group"]) for name in hf}
    frozen_gain = group_of["dino_head.last_layer.parametrizations.weight.original0"] == -1
    student = student_like("vit", flat, [name for name in flat if name.startswith("head.")],
                           dict(norm_last_layer=bool(frozen_gain)))
    found = groups_by_name(student)
    assert set(found) - {"backbone.embeddings.mask_token"} == {name for name, group in group_of.items() if group >= 0}
    for name in found.keys() & group_of.keys():
        assert found[name]["wd_mult"] == (1.0 if group_of[name] == 0 else 0.0) and found[name]["lr_mult"] == 1.0, name


@pytest.mark.parametrize("version", cases("param_groups", r"(v\d)_backbone_names$"))
def test_param_groups_with_layer_decay(version):
    g = golden("param_groups")
    names = {part: [hf_list(entry) for entry in g.get(f"{version}_{part}_hf_names", g[f"{version}_{part}_names"])]
             for part in ("backbone", "dino_head")}
    flat = {part: sum(entries, []) for part, entries in names.items()}
    registers = "embeddings.register_tokens" in flat["backbone"]
    family = "dinov3_vit" if version == "v3" else "dinov2_with_registers" if registers else "dinov2"
    student = student_like(family, flat["backbone"], flat["dino_head"],
                           dict(norm_last_layer=False, weight_norm="last_layer.weight_v" in flat["dino_head"]))
    found = groups_by_name(student, layerwise_decay=float(g["layerwise_decay"]),
                           patch_embed_lr_mult=float(g["patch_embed_lr_mult"]))
    # HF's keys have no bias, the official qkv has
    absent = {name for name in flat["backbone"] if version == "v3" and name.endswith("k_proj.bias")}
    expected = {}
    for part, entries in names.items():
        keys = (f"{version}_{part}_{key}" for key in ("lr_multiplier", "wd_multiplier", "is_last_layer"))
        for entry, *settings in zip(entries, *(g[key] for key in keys)):
            expected.update({head_names(f"{part}.{name}"): settings for name in entry if name not in absent})
    # every trainable parameter of the real model, and no other
    assert set(found) == set(expected)
    for name, (lr_mult, wd_mult, last) in expected.items():
        exact(found[name]["lr_mult"], lr_mult)
        assert found[name]["wd_mult"] == wd_mult and found[name]["is_last_layer"] == bool(last), name


# ---- compositions ----

def configured(**keys):
    """A fresh train.py with these config globals."""
    train = load_script("train")
    for key, value in keys.items():
        assert key in train.config_keys
        setattr(train, key, value)
    return train


def compare_parameter_grads(head, grads):
    params = dict(head.named_parameters())
    for name, grad in grads.items():
        close(params[head_names(name)].grad, grad, rtol=2e-5)


def run_composition(train, inputs, heads, centers, temp):
    """Targets and losses from given backbone outputs. heads: {'student'|'teacher': {'dino_head': DINOHead, ...}}."""
    masks = tensor(inputs["masks"])
    leaf = {name: tensor(inputs[name]).requires_grad_()
            for name in ("student_global_cls", "student_patch", "student_local_cls")}
    teacher = dict(global_logits=heads["teacher"]["dino_head"](tensor(inputs["teacher_cls"])),
                   masked_logits=heads["teacher"]["ibot_head"](tensor(inputs["teacher_patch"])[masks]))
    targets = {name: value.detach() for name, value in train.make_targets(teacher, centers, temp).items()}
    student = heads["student"]
    logits = student["dino_head"](torch.cat([leaf["student_global_cls"], leaf["student_local_cls"]]))
    n = len(leaf["student_global_cls"])
    out = dict(global_cls=leaf["student_global_cls"], local_cls=leaf["student_local_cls"],
               patches=leaf["student_patch"], global_logits=logits[:n], local_logits=logits[n:],
               masked_logits=student["ibot_head"](leaf["student_patch"][masks]))
    total, terms = train.compute_losses(out, targets, masks, tensor(inputs["teacher_patch"]))
    return total, terms, targets, leaf, teacher


def read_heads(g, prefix=""):
    heads = {}
    for who in ("student", "teacher"):
        built = {name: build_head(weights) for name in ("dino_head", "ibot_head")
                 if (weights := prefixed(g, f"{prefix}{who}/{name}/"))}
        heads[who] = {"dino_head": built["dino_head"], "ibot_head": built.get("ibot_head", built["dino_head"])}
    return heads


def loss_weights(g):
    return dict(dino_head_loss_weight=float(g["dino_loss_weight"]), ibot_loss_weight=float(g["ibot_loss_weight"]),
                koleo_loss_weight=float(g["koleo_loss_weight"]))


@pytest.mark.parametrize("case", cases("compose_v2", r"(.+?)/"))
def test_composition_v2(case):
    whole = golden("compose_v2")
    g = prefixed(whole, f"{case}/")
    train = configured(centering=case.split("_", 1)[1], **loss_weights(whole))
    heads = read_heads(g)
    centers = {name: torch.zeros(1, heads["teacher"][f"{name}_head"].last_layer.weight.shape[0])
               for name in ("dino", "ibot")}
    for call in sorted({key.split("/")[0] for key in g if key.startswith("call")}):
        inputs = prefixed(g, f"{call}/")
        for who in heads.values():
            for head in who.values():
                head.zero_grad()
        total, terms, targets, leaf, teacher = run_composition(train, inputs, heads, centers,
                                                               float(whole["teacher_temps"][int(call[4:])]))
        for name, center in centers.items():                   # those of the calls before
            if f"{name}_center_used" in inputs:
                close(center, inputs[f"{name}_center_used"], atol=1e-7)
        # stored in swapped crop order
        close(targets["dino"].flip(0), inputs["teacher_cls_probs"], rtol=1e-6, atol=1e-6)
        close(targets["ibot"], inputs["teacher_patch_probs"], rtol=1e-6, atol=1e-6)
        close(total, inputs["total_loss"])
        close(terms["dino_local_loss"], inputs["logged_dino_local_crops_loss"])
        close(terms["dino_global_loss"], inputs["logged_dino_global_crops_loss"])
        close(terms["ibot_loss"] / 2, inputs["logged_ibot_loss"])
        close(terms["koleo_loss"] * float(whole["koleo_loss_weight"]) / 2, inputs["logged_koleo_loss"])
        total.backward()
        for name, value in leaf.items():
            close(value.grad, inputs[f"grad_{name}"], rtol=2e-5)
        for name in ("dino_head", "ibot_head"):
            compare_parameter_grads(heads["student"][name], prefixed(inputs, f"grad/{name}/"))
        for name, key in (("dino", "global_logits"), ("ibot", "masked_logits")):
            centers[name] = update_center(centers[name], teacher[key].detach())


def test_composition_v3():
    g = golden("compose_v3")
    temp, weights = float(g["teacher_temp"]), loss_weights(g)
    train = configured(centering="sinkhorn_knopp", **weights)
    for case in sorted({key.split("/")[0] for key in g if key.endswith("/total_loss")}):
        expect, heads = prefixed(g, f"{case}/"), read_heads(g)
        total, terms, targets, leaf, _ = run_composition(train, g, heads, None, temp)
        V, B, _ = targets["dino"].shape
        L = len(g["student_local_cls"]) // B
        close(targets["dino"], g["teacher_cls_probs"], rtol=1e-6, atol=1e-6)
        close(targets["ibot"], g["teacher_patch_probs"], rtol=1e-6, atol=1e-6)
        # options that train.py does not offer: composed from the losses
        if case != "plain":
            masks, step, diagonal = tensor(g["masks"]), int(expect["iteration"]), case.startswith("diag")
            n_global, n_local = V * V - (0 if diagonal else V), V * L
            logits = heads["student"]["dino_head"](leaf["student_global_cls"]).view(V, B, -1)
            global_term = dino_loss(logits, targets["dino"],
                                    ignore_diagonal=not diagonal) * n_global / (n_global + n_local)
            local_term = terms["dino_local_loss"] * (V * (V - 1) + n_local) / (n_global + n_local)
            local_weight = float(expect["logged_dino_local_loss_weight"])
            weight = float(expect["logged_gram_loss_weight"])
            student_patch, teacher_patch = leaf["student_patch"], tensor(g["teacher_patch"])
            if diagonal:
                assert local_weight == float(g["local_weight_schedule"][step])
                gram = gram_loss(student_patch, teacher_patch)
            elif "hires" in case:
                assert weight == float(g["gram_weight_schedule"][step])
                gram = gram_loss(student_patch, tensor(g["gram_teacher_patch"]))
            else:
                gram = gram_loss(student_patch[masks][None], teacher_patch[masks][None], remove_neg=True)
            close(gram, expect["logged_gram_loss"])
            close(global_term * (n_global + n_local) / n_global, expect["logged_dino_global_crops_loss"])
            total = weights["dino_head_loss_weight"] * (local_weight * local_term + global_term) + weight * gram \
                + sum(weights[f"{name}_weight"] * terms[name] for name in ("ibot_loss", "koleo_loss"))
        close(total, expect["total_loss"])
        close(terms["dino_local_loss"] * (V * (V - 1) + V * L) / (V * L), expect["logged_dino_local_crops_loss"])
        close(terms["ibot_loss"], expect["logged_ibot_loss"])
        close(terms["koleo_loss"] / V, expect["logged_koleo_loss"])
        total.backward()
        for name, value in leaf.items():
            if f"grad_{name}" in expect:
                close(value.grad, expect[f"grad_{name}"], rtol=2e-5)
        for name in ("dino_head", "ibot_head"):
            compare_parameter_grads(heads["student"][name], prefixed(expect, f"grad/{name}/"))


# ---- trajectories: whole training steps ----

def build_student(init, family, hp):
    """A Student with exactly the given weights {name in the file: array}; all are used, all that trains is set."""
    settings = dict(hidden_size=hp("hidden_size"), num_hidden_layers=hp("depth"), num_attention_heads=hp("heads"),
                    image_size=hp("image_size"), patch_size=hp("patch_size"), pos_embed_rescale=None,
                    layer_norm_eps=1e-5 if family == "dinov3_vit" else 1e-6)
    if family == "dinov3_vit":
        settings["num_register_tokens"] = hp("num_register_tokens")
    backbone = build_backbone(family, use_pretrained=False, **settings)
    if family == "vit":                                        # v1 has no mask token
        backbone.embeddings.mask_token.requires_grad_(False)
    parts = {name: prefixed(init, f"{name}.") for name in ("head", "dino_head", "ibot_head")}
    parts["dino_head"] = parts.pop("head") or parts["dino_head"]
    heads = {name: build_head(weights) for name, weights in parts.items() if weights}
    student = Student(backbone, heads["dino_head"], heads.get("ibot_head"))
    weights = {our_name(key): tensor(value) for key, value in init.items()}
    missing = [name for name, param in student.named_parameters() if param.requires_grad and name not in weights]
    assert missing == []
    student.load_state_dict(weights, strict=False)
    assert set(weights) <= set(student.state_dict())
    return student.train()


def our_name(name):
    return head_names(re.sub(r"^head\.", "dino_head.", name))


def crops_of(g, step, image_size, local_size, full_size_locals=False):
    """Normalised global and local crops of a step, view-major, from the file's bank of images."""
    bank = (tensor(g["bank"]).float() - 128) / 64
    global_crops = bank[tensor(g["global_index"][step]).long().flatten()]
    local_crops = bank[tensor(g["local_index"][step]).long().flatten()]
    if not full_size_locals:
        offsets = g["local_offset_yx"][step].reshape(-1, 2)
        local_crops = torch.stack([crop[:, y:y + local_size, x:x + local_size]
                                   for crop, (y, x) in zip(local_crops, offsets.astype(int))])
    return global_crops, local_crops


def moved_error(w, reference, start):
    """E = |w - w_ref| / |w_ref - w_start|: 0 is perfect, 1 is as wrong as not having trained."""
    moved = np.linalg.norm(reference - start)
    return np.linalg.norm(w - reference) / moved if moved else float(not np.array_equal(w, start))


def check_weights(ours, g, prefix, init):
    """E < 5e-3 for every stored tensor; what does not move there must not move here. Of tensors that are not stored,
    the file has the length and the length of the change."""
    final = next(found for folder in ("final_hf/", "final/") if (found := prefixed(g, f"{prefix}_{folder}")))
    assert final
    for name, reference in final.items():
        # its true gradient is 0: Adam turns rounding into full steps
        if not name.endswith("k_proj.bias"):
            w, start = ours[our_name(name)].double().numpy(), init[name].astype(np.float64)
            assert moved_error(w, reference, start) < 5e-3, name
    names = [str(name) for name in g.get("final_names", g.get("final_names_hf", []))]
    measures = dict(l2=lambda w, start: np.linalg.norm(w), sum=lambda w, start: w.sum(),
                    l2_of_change=lambda w, start: np.linalg.norm(w - start))
    for key, measure in measures.items():
        if f"{prefix}_final_{key}" in g:
            for name, reference in zip(names, g[f"{prefix}_final_{key}"]):
                if not name.endswith("k_proj.bias"):
                    w, start = ours[our_name(name)].double().numpy(), init[name].astype(np.float64)
                    close(measure(w, start), reference, rtol=5e-3 if key == "l2_of_change" else 1e-5,
                          atol=1e-4 if key == "sum" else 0.0)


def run_trajectory(train, g, student, hp, schedules, group_settings, clip_by, freeze_by, betas, local, masks=None,
                   full_size_locals=False):
    """The steps of train.py's loop over a golden file; yields a dict after each: step, total, terms, gradients (before
    clipping), norm (what clip_gradients says), centers, out, teacher_out, teacher."""
    teacher = EMATeacher(student)
    optimizer = torch.optim.AdamW(param_groups(student, 1.0, 1.0, **group_settings), betas=betas,
                                  eps=float(g.get("adamw_eps", 1e-8)))
    sizes = [head.last_layer.weight.shape[0] for head in (student.dino_head, student.ibot_head or student.dino_head)]
    centers = dict(zip(("dino", "ibot"), (torch.zeros(1, size) for size in sizes)))
    for step in range(len(schedules["lr"])):
        now = {name: float(values[step]) for name, values in schedules.items()}
        train.set_learning_rates(optimizer, now["lr"], now.get("last_layer_lr", now["lr"]), now["wd"], 1.0)
        global_crops, local_crops = crops_of(g, step, hp("image_size"), local, full_size_locals)
        step_masks = None if masks is None else tensor(masks[step])
        with teacher.teacher_weights(student) as network:
            teacher_out = network(global_crops, masks=step_masks, apply_masks=False)
        targets = train.make_targets(teacher_out, centers, now["teacher_temp"])
        out = student(global_crops, local_crops, step_masks)
        total, terms = train.compute_losses(out, targets, step_masks, teacher_out["patches"])
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        gradients = {name: param.grad.clone() for name, param in student.named_parameters() if param.grad is not None}
        norm = clip_gradients(student, float(g.get("clip_grad", g.get("hp_clip_grad"))), clip_by)
        if step < hp("freeze_last_layer_steps") and freeze_by == "grad":
            for name, param in student.named_parameters():
                if "last_layer" in name:
                    param.grad = None
        optimizer.step()
        teacher.update(student, now["momentum"])
        for name, key in (("dino", "global_logits"), ("ibot", "masked_logits")):
            if key in teacher_out:
                centers[name] = update_center(centers[name], teacher_out[key], float(g.get("center_momentum", 0.9)))
        yield dict(step=step, total=total, terms=terms, gradients=gradients, norm=norm, centers=centers, out=out,
                   teacher_out=teacher_out, teacher=teacher)


def joint_norm(gradients, wanted):
    """L2 norm over the gradients whose name is wanted."""
    return torch.stack([grad.norm() for name, grad in gradients.items() if wanted(name)]).norm()


@pytest.mark.parametrize("run", ["strict", "multires"])
def test_trajectory_v1(run):
    init_file, g = golden("traj_v1_init"), golden(f"traj_v1_{run}")
    g["bank"] = init_file["bank"]
    strict, prefix = run == "strict", "" if run == "strict" else "sizeinterp_"
    init = prefixed(init_file, "hf/")
    student = build_student(init, "vit", lambda key: int(g[key]))
    student.dino_head.last_layer.parametrizations.weight.original0.requires_grad_(False)
    train = configured(centering="centering", student_temp=float(g["student_temp"]))
    check_first_features(init_file, student)
    to_hf = dict(zip(map(str, init_file["map_official"]), map(hf_list, init_file["map_hf"])))
    schedules = {name: g[name] for name in ("lr", "wd", "momentum", "teacher_temp")}
    for now in run_trajectory(train, g, student, lambda key: int(g[key]), schedules, {}, "parameter", "grad",
                              tuple(g["adamw_betas"]), int(g["local_size"]), full_size_locals=strict):
        step, gradients = now["step"], now["gradients"]
        close(now["total"], g[f"{prefix}loss"][step], rtol=0, atol=2e-5)
        close(now["total"], g[f"{prefix}loss_fp64"][step], rtol=0, atol=2e-5)
        close(now["norm"], g[f"{prefix}grad_norm_total"][step], rtol=1e-4)
        close(joint_norm(gradients, lambda name: "last_layer" not in name),
              g[f"{prefix}grad_norm_total_no_last_layer"][step], rtol=1e-4)
        for name, reference in zip(g["param_names_official"], g[f"{prefix}grad_norm_per_param"][step]):
            ours = {our_name(hf) for hf in to_hf[str(name)]}   # the parts of a fused qkv
            close(joint_norm(gradients, ours.__contains__), reference, rtol=1e-3)
        close(now["centers"]["dino"], g[f"{prefix}center_after_step"][step][None], rtol=1e-5)
        if step == 0:
            close(torch.cat([now["out"]["global_logits"], now["out"]["local_logits"]]),
                  g[f"{prefix}student_logits_step0"], rtol=1e-5)
            close(now["teacher_out"]["global_logits"], g[f"{prefix}teacher_logits_step0"], rtol=1e-5)
    close(now["centers"]["dino"], g[f"{prefix}center_final"], rtol=1e-5)
    ours = dict(student.state_dict())
    for who, weights in (("student", ours), ("teacher", {**ours, **now["teacher"].values})):
        check_weights(weights, g, f"{prefix}{who}", init)


def check_first_features(g, student):
    """Features and head outputs of the start weights."""
    images = (tensor(g["bank"])[:len(g["feat_global_hf"])].float() - 128) / 64
    low, high = int(g["local_offset"]), int(g["local_offset"]) + int(g["hp_local_size"])
    student.eval()
    with torch.no_grad():
        cls = forward_features(student.backbone, images)[0]
        close(cls, g["feat_global_hf"])
        close(cls, g["feat_global_official"], rtol=1e-5)
        close(forward_features(student.backbone, images[..., low:high, low:high])[0], g["feat_local_hf"])
        close(student.dino_head(cls), g["head_out_global"])
    student.train()


@pytest.mark.parametrize("run", cases("traj_v2", r"(.+?)/") + ["v3"])
def test_trajectory_v2_and_v3(run):
    v3 = run == "v3"
    g = golden("traj_v3") if v3 else {"bank": golden("traj_v2")["bank"], **prefixed(golden("traj_v2"), f"{run}/")}
    init = prefixed(g, "init/")
    student = build_student(init, "dinov3_vit" if v3 else "dinov2", lambda key: int(g[f"hp_{key}"]))
    train = configured(centering="centering" if "centering" in run else "sinkhorn_knopp",
                       dino_head_loss_weight=float(g["hp_dino_weight"]),
                       ibot_loss_weight=float(g["hp_ibot_weight"]), koleo_loss_weight=float(g["hp_koleo_weight"]),
                       gram_loss_weight=float(g.get("hp_gram_weight", 0.0)))
    if v3:
        check_features(g, student)
    schedules = {name: g[name] for name in ("lr", "last_layer_lr", "wd", "momentum", "teacher_temp")}
    settings = dict(layerwise_decay=float(g["hp_layerwise_decay"]),
                    patch_embed_lr_mult=float(g["hp_patch_embed_lr_mult"]))
    submodules = [str(name) for name in g["grad_norm_submodules"]]
    pairs = (2, 2 * int(g["hp_n_local"]))
    share_global, share_local = (n / sum(pairs) for n in pairs)
    # v2 logs each DINO mean times its share of the pairs, koleo weighted, koleo and ibot halved; v3 logs plain means
    scale = dict(dino_global_crops=1.0, dino_local_crops=1.0, ibot=2.0, koleo=2.0 / float(g["hp_koleo_weight"]))
    if v3:
        scale = dict(dino_global_crops=share_global, dino_local_crops=share_local, ibot=1.0, koleo=2.0, gram=1.0)
    for now in run_trajectory(train, g, student, lambda key: int(g[f"hp_{key}"]), schedules, settings, "module", "lr",
                              (0.9, float(g["hp_adamw_beta2"])), int(g["hp_local_size"]), g["masks"]):
        step = now["step"]
        close(now["total"], g["total_loss"][step], rtol=0, atol=2e-5)
        close(now["total"], g["total_loss_fp64"][step], rtol=0, atol=2e-5)
        close(now["norm"], np.linalg.norm(g["grad_norm"][step]), rtol=1e-4)
        for name, reference in zip(submodules, g["grad_norm"][step]):
            close(joint_norm(now["gradients"], lambda param: param.startswith(f"{name}.")), reference, rtol=1e-4)
        for name, factor in scale.items():
            close(now["terms"][f"{name}_loss".replace("_crops", "")], factor * g[f"logged_{name}_loss"][step],
                  rtol=1e-5, atol=2e-5)
    for name, center in now["centers"].items():
        if f"{name}_center_final" in g:
            close(center, g[f"{name}_center_final"], rtol=1e-5)
    ours = dict(student.state_dict())
    for who, weights in (("student", ours), ("teacher", {**ours, **now["teacher"].values})):
        check_weights(weights, g, who, init)


def check_features(g, student):
    """CLS and patches of the start weights, plain, masked and on a small window, in eval mode."""
    n, size = len(g["feat_cls"]), int(g["hp_local_size"])
    images = (tensor(g["bank"])[:n].float() - 128) / 64
    student.eval()
    with torch.no_grad():
        for suffix, pixels, masks in (("", images, None), ("_masked", images, tensor(g["masks"])[0, :n]),
                                      ("_local", images[..., :size, :size], None)):
            cls, patches = forward_features(student.backbone, pixels, masks)
            found = 0
            for key, value in (("cls", cls), ("patch", patches), ("patches", patches)):
                for name in (f"feat_{key}{suffix}", f"feat{suffix}_{key}"):
                    if name in g:
                        close(value, g[name], rtol=1e-5)
                        found += 1
            assert found, suffix
    student.train()
