"""Parity with the reference implementations of DINO, DINOv2 and DINOv3, by numbers computed with
them (tests/golden).

Every size, case name and hyper-parameter is read from the files: GOLDEN=/another/family of files
with the same keys must pass, too. Compositions and trajectories run through dino.py, the step of
train.py, with train.py's config set as the files say.
"""
import contextlib
import inspect
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dino
from augment import masked_tokens, sample_masks
from losses import (dino_loss, gram_loss, ibot_loss, koleo_loss, move_center, sinkhorn_knopp,
                    softmax_center, update_center)
from metrics import knn_classify
from model import DINOHead, EMATeacher, Student, build_backbone, forward_features
from optim import (build_optimizer, cosine_schedule, linear_schedule, param_groups,
                   set_learning_rates)
from run import State
from tests_support import ROOT, load_script

GOLDEN = os.environ.get("GOLDEN", os.path.join(ROOT, "tests", "golden"))


def golden(name):
    path = os.path.join(GOLDEN, f"{name}.npz")
    if "GOLDEN" in os.environ and not os.path.exists(path):
        pytest.skip(f"{path} is not in this family of files")
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def matches(pattern, keys):
    """The distinct first groups of a pattern among keys that match it from their start, sorted."""
    found = [re.match(pattern, key) for key in keys]
    return sorted({match[1] for match in found if match})


def cases(name, pattern):
    """`matches` among the keys of a file, known before any test runs."""
    try:
        return matches(pattern, golden(name))
    except pytest.skip.Exception:
        return []


def tensor(array):
    return torch.from_numpy(np.array(array))


def close(ours, theirs, rtol=1e-5, atol=0.0):
    if torch.is_tensor(ours):
        ours = ours.detach().double().numpy()
    ours = np.asarray(ours, dtype=np.float64)
    theirs = np.asarray(theirs, dtype=np.float64)
    assert ours.shape == theirs.shape
    # of the whole array: a gradient's small entries are rounding
    scale = np.abs(theirs).max(initial=0)
    difference = np.abs(ours - theirs).max(initial=0)
    assert difference <= rtol * scale + atol, (difference, scale)


def value_and_grad(function, x):
    x = tensor(x).requires_grad_()
    value = function(x)
    value.backward()
    return value, x.grad


# ---- losses and targets ----

def test_dino_v1_loss_and_center():
    g = golden("dino_v1_loss")
    student_temp, momentum = float(g["student_temp"]), float(g["center_momentum"])
    for run in matches(r"(.+?)_.*center_0$", g):
        B, crops = int(g[f"{run}_B"]), 2 + int(g[f"{run}_n_local"])
        center = tensor(g[f"{run}_center_0"])
        for c in sorted(map(int, matches(rf"{run}_student_(\d+)$", g))):
            teacher = tensor(g[f"{run}_teacher_{c}"])
            probs = softmax_center(teacher, center, float(g[f"{run}_teacher_temp_{c}"]))
            probs = probs.view(2, B, -1)
            loss, grad = value_and_grad(
                lambda s: dino_loss(s.view(crops, B, -1), probs, student_temp),
                g[f"{run}_student_{c}"])
            close(loss, g[f"{run}_loss_{c}"])
            close(loss, g[f"{run}_loss_fp64_{c}"])
            close(grad, g[f"{run}_grad_student_{c}"])
            center = update_center(center, teacher, momentum)
            close(center, g[f"{run}_center_{c + 1}"], atol=1e-7)
            close(center, g[f"{run}_center_fp64_{c + 1}"], atol=1e-7)


def test_softmax_centering():
    g = golden("softmax_centering")
    for kind in ("cls", "patch"):
        center = torch.zeros_like(tensor(g[f"{kind}_center_final"]).reshape(1, -1))
        for c, temp in enumerate(g["temps"]):
            logits = tensor(g[f"{kind}_logits_{c}"]).flatten(0, -2)
            close(center, g[f"{kind}_center_used_{c}"].reshape(1, -1), atol=1e-7)
            probs = g[f"{kind}_probs_{c}"].reshape(len(logits), -1)
            close(softmax_center(logits, center, float(temp)), probs, rtol=1e-6, atol=1e-6)
            center = update_center(center, logits, float(g["center_momentum"]))
        close(center, g[f"{kind}_center_final"].reshape(1, -1), atol=1e-7)


def test_sinkhorn():
    g, found = golden("sinkhorn"), 0
    for key in g:
        match = re.fullmatch(r"(.+)_(cls|patch)_T(\d+)(_1it|_count_x3)?", key)
        if match:
            case, kind, temp, suffix = match.groups()
            logits = tensor(g[f"{case}_{kind}_logits"])
            probs = sinkhorn_knopp(logits, int(temp) / 1000, 1 if suffix == "_1it" else 3)
            close(probs, g[key], rtol=1e-6, atol=1e-6)
            found += 1
    assert found >= 8


def test_dino_cross_entropy_of_v2_and_v3():
    g = golden("dino_ce_v2_v3")
    for case in matches(r"(.+?)_.*student$", g):
        probs = tensor(g[f"{case}_teacher_probs"])
        S, T = map(int, re.fullmatch(r"s(\d+)t(\d+)", case).groups())
        for name, ignore, scale in (("v2", False, S * T), ("v3_ignore_false", False, 1),
                                    ("v3_ignore_true", True, 1)):
            no_pair = ignore and S * T == min(S, T)
            if f"{case}_{name}_loss" in g and not no_pair:
                loss, grad = value_and_grad(
                    lambda s: scale * dino_loss(s, probs, ignore_diagonal=ignore),
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
    for case in matches(r"(.+)_x$", g):
        loss, grad = value_and_grad(koleo_loss, g[f"{case}_x"])
        x = F.normalize(tensor(g[f"{case}_x"]).double(), dim=1)
        nearest = float(torch.pdist(x).min())
        for version in ("v2", "v3", "fp64"):
            # fp32 has few digits of a small distance
            close(loss, g[f"{case}_{version}_loss"], rtol=1e-5 if nearest > 0.01 else 2e-5)
            # at distance 0 the gradient is that of the added 1e-8
            if f"{case}_{version}_grad" in g and nearest > 1e-6:
                close(grad, g[f"{case}_{version}_grad"], rtol=1e-5 + 1e-6 / nearest)


def test_gram():
    g = golden("gram")
    student, teacher = g["student"], tensor(g["teacher"])

    def in_one_matrix(x):
        return x.flatten(0, 1)[None]
    for case in g["cases"]:
        digits = [int(digit) for digit in re.findall(r"\d", str(case))]
        normalize, remove_neg, teacher_neg, per_image = map(bool, digits)

        def loss_of(s):
            tokens = (s, teacher) if per_image else map(in_one_matrix, (s, teacher))
            return gram_loss(*tokens, remove_neg, teacher_neg, normalize)
        loss, grad = value_and_grad(loss_of, student)
        close(loss, g[f"{case}_loss"])
        close(grad, g[f"{case}_grad"])
    masked = teacher[tensor(g["flat_mask"])][None]
    loss, grad = value_and_grad(lambda s: gram_loss(s[None], masked), student[g["flat_mask"]])
    close(loss, g["flat_loss"])
    close(grad, g["flat_grad"])
    for key in ("hires_teacher", "hires_teacher_resized"):
        loss = gram_loss(tensor(g["hires_student"]), tensor(g[key]))
        close(loss, g["hires_loss"])
    with pytest.raises(ValueError, match="exclude each other"):
        gram_loss(tensor(student), teacher, True, True)


# ---- heads ----

def head_names(name):
    """Their name in the state dict -> ours: weight norm is a parametrization now."""
    parametrized = "last_layer.parametrizations.weight.original"
    name = name.replace("last_layer.weight_g", f"{parametrized}0")
    return name.replace("last_layer.weight_v", f"{parametrized}1")


def build_head(weights, trainable=None):
    """A DINOHead of the shape of a golden state dict {their name: array}, with these weights in it,
    strictly."""
    linear = [key for key in weights if re.fullmatch(r"mlp(\.\d+)?\.weight", key)]
    first = weights[linear[0]]
    last = weights.get("last_layer.weight_v", weights.get("last_layer.weight"))
    norm = trainable is not None and "last_layer.weight_g" not in trainable
    hidden_dim, in_dim = first.shape
    out_dim, bottleneck_dim = last.shape
    head = DINOHead(in_dim, out_dim, hidden_dim, bottleneck_dim, norm_last_layer=norm,
                    weight_norm="last_layer.weight_v" in weights, n_layers=len(linear))
    head.load_state_dict({head_names(name): tensor(w) for name, w in weights.items()})
    return head


def prefixed(g, prefix):
    return {key.removeprefix(prefix): value for key, value in g.items() if key.startswith(prefix)}


def test_heads():
    g = golden("heads")
    for version in matches(r"(.+?)/w/", g):
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
        names = dict(weight_v="last_layer.weight_v", weight_g="last_layer.weight_g",
                     last_layer="last_layer.weight")
        for key, name in names.items():  # the gradients in the file
            if f"{version}/grad_{key}" in g:
                close(params[head_names(name)].grad, g[f"{version}/grad_{key}"])
                compared += 1
        assert compared


def test_heads_start_like_the_reference():
    g = golden("heads")
    for version in matches(r"(.+?)_init/names", g):
        names = [str(name) for name in g[f"{version}_init/names"]]
        torch.manual_seed(0)
        head = DINOHead(64, 512, 128, 64, weight_norm="last_layer.weight_v" in names)
        params = dict(head.named_parameters())
        for i, name in enumerate(names):
            ours = params[head_names(name)].detach()
            std, mean, absmax = (float(g[f"{version}_init/{key}"][i])
                                 for key in ("std", "mean", "absmax"))
            assert abs(float(ours.std()) - std) <= 0.05 * std + 1e-9
            assert abs(float(ours.mean()) - mean) <= 0.1 * std + 1e-9
            assert absmax * 0.7 - 1e-9 <= float(ours.abs().max()) <= absmax * 1.4 + 1e-9


# ---- k-NN ----

def test_knn():
    g = golden("knn")
    for case in matches(r"(.+?)_", g):
        arrays = prefixed(g, f"{case}_")
        features, labels, test_features, test_labels = (
            tensor(arrays[key]) for key in ("train_x", "train_y", "test_x", "test_y"))
        for k in map(int, matches(r"k(\d+)_top1$", arrays)):
            predictions = knn_classify(features, labels, test_features, k, temperature=0.07)
            accuracy = (predictions == test_labels).float().mean()
            close(100 * accuracy, arrays[f"k{k}_top1"], rtol=1e-6)
            if f"k{k}_pred" in arrays:
                assert (predictions.numpy() == arrays[f"k{k}_pred"]).all()
        for k in map(int, matches(r"majority_k(\d+)_pred$", arrays)):
            # equal votes go to the nearest class here, to the smallest label there: predictions
            # may differ in these only
            similarity = F.normalize(test_features, dim=1) @ F.normalize(features, dim=1).T
            nearest = labels.long()[similarity.topk(k).indices]
            votes = F.one_hot(nearest, int(arrays["num_classes"])).sum(1)
            votes = votes.sort(descending=True).values
            clear = (votes[:, 0] > votes[:, 1]).numpy()
            assert (~clear).sum() == int(arrays[f"majority_k{k}_n_vote_ties"])
            predictions = knn_classify(features, labels, test_features, k).numpy()
            assert (predictions == arrays[f"majority_k{k}_pred"])[clear].all()


# ---- schedules ----

def series(function, n):
    return [function(i) for i in range(n)]


def exact(ours, theirs):
    close(ours, theirs, rtol=1e-12, atol=1e-15)


def cosine_series(start, end, total, warmup=0, warmup_start=0.0, n=None, reach_end=False):
    """cosine_schedule of the first n iterations; n = None: all of them."""
    return series(lambda i: cosine_schedule(start, end, i, total, warmup, warmup_start, reach_end),
                  n or total)


def linear_series(start, end, n_iterations, n):
    return series(lambda i: linear_schedule(start, end, i, n_iterations), n)


def test_schedules_v1():
    g = golden("schedules")
    epochs, per_epoch = int(g["v1_epochs"]), int(g["v1_niter_per_epoch"])
    total, warmup = epochs * per_epoch, int(g["v1_warmup_epochs"]) * per_epoch
    base, low = float(g["v1_lr_base"]), float(g["v1_lr_min"])
    exact(cosine_series(base, low, total, warmup), g["v1_lr"])
    exact(cosine_series(base, low, total, warmup, base / 10), g["v1_lr_startwarmup"])
    exact(cosine_series(0.04, 0.4, total), g["v1_wd"])
    exact(cosine_series(float(g["v1_momentum_base"]), 1.0, total), g["v1_momentum"])
    n = int(g["v1_teacher_temp_warmup_epochs"])
    exact(linear_series(0.04, 0.07, n, epochs), g["v1_teacher_temp_per_epoch"])
    exact(linear_series(0.04, 0.04, 0, epochs), g["v1_teacher_temp_nowarmup"])


def test_schedules_v2():
    g = golden("schedules")
    total, warmup, freeze = (int(g[f"v2_{key}_iters"]) for key in ("total", "warmup", "freeze"))
    base, final = float(g["v2_lr_base"]), float(g["v2_lr_final"])

    def frozen(start):  # zeros first, then the same schedule over the iterations that are left
        after = cosine_series(base, final, total - freeze, warmup, start)
        return [0.0] * freeze + after
    exact(cosine_series(base, final, total, warmup), g["v2_lr"])
    exact(frozen(0.0), g["v2_lr_freeze"])
    exact(frozen(base / 5), g["v2_lr_startwarmup"])
    exact(cosine_series(base, final, total), g["v2_nowarmup"])
    n = len(g["v2_lr_beyond"])
    lr = cosine_series(base, final, total, warmup, n=total + n)
    exact(lr[total:], g["v2_lr_beyond"])
    per_epoch, peak = int(g["v2cfg_epoch_length"]), float(g["v2cfg_scaled_lr"])
    total, n = int(g["v2cfg_epochs"]) * per_epoch, len(g["v2cfg_lr"])
    scale = (float(g["v2cfg_batch_size"]) / 1024) ** 0.5
    exact(peak, float(g["v2cfg_base_lr"]) * scale)
    lr = cosine_series(peak, 1e-6, total, 2 * per_epoch, n=n)
    exact(lr, g["v2cfg_lr"])
    exact([0.0] * per_epoch + lr[per_epoch:], g["v2cfg_last_layer_lr"])
    exact(cosine_series(0.04, 0.4, total, n=n), g["v2cfg_wd"])
    exact(cosine_series(0.992, 1.0, total, n=n), g["v2cfg_momentum"])
    exact(linear_series(0.04, 0.07, 3 * per_epoch, n), g["v2cfg_teacher_temp"])


def test_schedules_v3():
    g = golden("schedules")
    total, warmup, cosine = (int(g[f"v3_{key}"]) for key in ("total", "warmup", "cosine"))
    start, peak, end = (float(g[f"v3_{key}"]) for key in ("start", "peak", "end"))

    def v3(peak, end, warmup, cosine, start=start):
        return cosine_series(peak, end, warmup + cosine, warmup, start, total, reach_end=True)
    exact(v3(peak, end, warmup, total - warmup), g["v3_full"])
    exact(v3(peak, end, warmup, cosine), g["v3_partial"])
    exact(v3(peak, end, 0, total), g["v3_nowarmup"])
    # truncated: the first part of a cosine 1.25 times as long, stretched to arrive at the end
    n = total - warmup
    u = np.array(cosine_series(1.0, 0.0, int(1.25 * n), n=n, reach_end=True))
    u = (u - u[-1]) / (1 - u[-1])
    rise = linear_series(0.0, peak, warmup, warmup)
    exact(rise + list(end + (peak - end) * u), g["v3_trunc025"])
    exact(v3(1.0, 0.5, warmup, 1, start=1.0), g["v3_cosine1"])
    exact(v3(peak, peak, warmup, cosine, start=peak), g["v3_constant"])
    per_epoch, n = int(g["v3cfg_epoch_length"]), len(g["v3cfg_lr"])
    total_cfg = int(g["v3cfg_epochs"]) * per_epoch

    def cfg(start, end, warmup=0, warmup_start=0.0, total=total_cfg):
        return cosine_series(start, end, total, warmup, warmup_start, n, reach_end=True)
    scale = 4 * (float(g["v3cfg_batch_size"]) / 1024) ** 0.5
    lr = cfg(1e-3 * scale, 1e-6 * scale, 2 * per_epoch, 1e-6)
    exact(lr, g["v3cfg_lr"])
    exact([0.0] * per_epoch + lr[per_epoch:], g["v3cfg_last_layer_lr"])
    exact(cfg(0.04, 0.2), g["v3cfg_wd"])
    exact(cfg(0.99, 1.0, total=6 * per_epoch), g["v3cfg_momentum"])
    # the temperature of v3: a warm-up that stops short of its end, then constant
    exact(cfg(0.07, 0.07, 3 * per_epoch, 0.04), g["v3cfg_teacher_temp"])


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
    rng, exactly = np.random.default_rng(0), prefix.startswith("v3")
    masks = [sample_masks(crops, grid, rng, exact=exactly) for _ in range(batches)]
    masks = torch.stack(masks)
    counts = masks.sum(-1).numpy()
    # exactly so many in every batch
    share = (counts > 0).mean(axis=1)
    assert (share == float(g["fraction_masked"])).all() or grid < 4
    if exactly:  # the same numbers in every batch
        assert np.array_equal(np.sort(counts, axis=1), np.sort(g["counts"], axis=1))
    ours, theirs = counts[counts > 0], g["counts"][g["counts"] > 0]
    assert abs(ours.mean() / theirs.mean() - 1) < 0.005
    bins = np.arange(grid * grid + 2)

    def cumulative(x):
        return np.histogram(x, bins)[0].cumsum() / len(x)
    assert np.abs(cumulative(ours) - cumulative(theirs)).max() < 0.02
    masked = masks.flatten(0, 1)[counts.flatten() > 0]
    blocks = masked.view(-1, grid, grid).numpy()
    n_parts = np.mean([components(mask) for mask in blocks])
    assert abs(n_parts / float(g["mean_components"]) - 1) < 0.02
    occupancy = masks.float().mean((0, 1)).view(grid, grid)
    assert np.abs(occupancy.numpy() - g["occupancy"]).max() < 0.01


# ---- parameter groups ----

def student_like(family, hf_names, names_of_head, head):
    """A tiny Student of the family, as deep as the names say, to ask for its groups under the names
    of the file."""
    depth = 1 + max(map(int, matches(r".*?layers?\.(\d+)\.", hf_names)))
    backbone = build_backbone(family, False, hidden_size=8, num_hidden_layers=depth,
                              num_attention_heads=2, image_size=16, patch_size=8)
    linear = [name for name in names_of_head if re.search(r"mlp(\.\d+)?\.weight", name)]
    return Student(backbone, DINOHead(8, 6, 5, 4, n_layers=len(linear), **head))


def groups_by_name(student, **settings):
    found = {}
    for group in param_groups(student, 1.0, 1.0, **settings):
        found.update(dict.fromkeys(group["names"], group))
    return found


def hf_list(entry):
    """The HF names of one official tensor: three for the fused qkv, none if HF has none."""
    return [name for name in str(entry).split("|") if name]


@pytest.mark.parametrize("case", cases("param_groups", r"v1_(.+)_group$"))
def test_param_groups_v1(case):
    g = golden("param_groups")
    group_of, flat = {}, []
    for entry, group in zip(g[f"v1_{case}_hf_names"], g[f"v1_{case}_group"]):
        flat += hf_list(entry)
        group_of.update({our_name(name): group for name in hf_list(entry)})
    gain_group = group_of["dino_head.last_layer.parametrizations.weight.original0"]
    student = student_like("vit", flat, [name for name in flat if name.startswith("head.")],
                           dict(norm_last_layer=bool(gain_group == -1)))
    found = groups_by_name(student)
    trained = {name for name, group in group_of.items() if group >= 0}
    assert set(found) - {"backbone.embeddings.mask_token"} == trained
    for name in found.keys() & group_of.keys():
        assert found[name]["wd_mult"] == (1.0 if group_of[name] == 0 else 0.0), name
        assert found[name]["lr_mult"] == 1.0, name


@pytest.mark.parametrize("version", cases("param_groups", r"(v\d)_backbone_names$"))
def test_param_groups_with_layer_decay(version):
    g = golden("param_groups")
    names, flat = {}, {}  # by part: per official tensor a list of HF names; all of them
    for part in ("backbone", "dino_head"):
        entries = g.get(f"{version}_{part}_hf_names", g[f"{version}_{part}_names"])
        names[part] = [hf_list(entry) for entry in entries]
        flat[part] = sum(names[part], [])
    family = "dinov2"
    if version == "v3":
        family = "dinov3_vit"
    elif "embeddings.register_tokens" in flat["backbone"]:
        family = "dinov2_with_registers"
    weight_norm = "last_layer.weight_v" in flat["dino_head"]
    student = student_like(family, flat["backbone"], flat["dino_head"],
                           dict(norm_last_layer=False, weight_norm=weight_norm))
    found = groups_by_name(student, layerwise_decay=float(g["layerwise_decay"]),
                           patch_embed_lr_mult=float(g["patch_embed_lr_mult"]))
    expected = {}
    for part, entries in names.items():
        settings = [g[f"{version}_{part}_{key}"]
                    for key in ("lr_multiplier", "wd_multiplier", "is_last_layer")]
        for entry, *values in zip(entries, *settings):
            expected.update({head_names(f"{part}.{name}"): values for name in entry})
    if version == "v3":  # HF's keys have no bias, the official qkv has
        expected = {name: values for name, values in expected.items()
                    if not name.endswith("k_proj.bias")}
    # every trainable parameter of the real model, and no other
    assert set(found) == set(expected)
    for name, (lr_mult, wd_mult, is_last_layer) in expected.items():
        exact(found[name]["lr_mult"], lr_mult)
        assert found[name]["wd_mult"] == wd_mult, name
        assert found[name]["is_last_layer"] == bool(is_last_layer), name


# ---- compositions ----

def train_config(**changed):
    """train.py's config as a namespace, with these values."""
    train = load_script("train")
    assert set(changed) <= set(train.config_keys)
    values = {key: getattr(train, key) for key in train.config_keys}
    return SimpleNamespace(**{**values, **changed})


def compare_parameter_grads(head, grads):
    params = dict(head.named_parameters())
    for name, grad in grads.items():
        close(params[head_names(name)].grad, grad, rtol=2e-5)


def run_composition(config, inputs, heads, centers, temp):
    """Targets and losses from given backbone outputs.
    heads: {'student'|'teacher': {'dino_head': DINOHead, ...}}."""
    masks = tensor(inputs["masks"])
    leaf = {name: tensor(inputs[name]).requires_grad_()
            for name in ("student_global_cls", "student_patch", "student_local_cls")}
    student, teacher = heads["student"], heads["teacher"]
    teacher_patches = tensor(inputs["teacher_patch"])
    teacher_out = dict(global_logits=teacher["dino_head"](tensor(inputs["teacher_cls"])),
                       masked_logits=teacher["ibot_head"](teacher_patches[masks]))
    targets = dino.make_targets(teacher_out, centers, temp, config)
    targets = {name: value.detach() for name, value in targets.items()}
    global_cls, local_cls = leaf["student_global_cls"], leaf["student_local_cls"]
    logits = student["dino_head"](torch.cat([global_cls, local_cls]))
    n = len(global_cls)
    out = dict(global_cls=global_cls, local_cls=local_cls, patches=leaf["student_patch"],
               global_logits=logits[:n], local_logits=logits[n:],
               masked_logits=student["ibot_head"](leaf["student_patch"][masks]))
    total, terms = dino.compute_losses(out, targets, masks, teacher_patches, config)
    return total, terms, targets, leaf, teacher_out


def read_heads(g, prefix=""):
    heads = {}
    for who in ("student", "teacher"):
        built = {}
        for name in ("dino_head", "ibot_head"):
            if weights := prefixed(g, f"{prefix}{who}/{name}/"):
                built[name] = build_head(weights)
        built.setdefault("ibot_head", built["dino_head"])
        heads[who] = built
    return heads


def loss_weights(g):
    keys = dict(dino_head_loss_weight="dino_loss_weight", ibot_loss_weight="ibot_loss_weight",
                koleo_loss_weight="koleo_loss_weight")
    return {ours: float(g[theirs]) for ours, theirs in keys.items()}


@pytest.mark.parametrize("case", cases("compose_v2", r"(.+?)/"))
def test_composition_v2(case):
    whole = golden("compose_v2")
    g = prefixed(whole, f"{case}/")
    config = train_config(centering=case.split("_", 1)[1], **loss_weights(whole))
    heads = read_heads(g)
    centers = {}
    for name in ("dino", "ibot"):
        n_prototypes = heads["teacher"][f"{name}_head"].last_layer.weight.shape[0]
        centers[name] = torch.zeros(1, n_prototypes)
    for call in matches(r"(call.+?)/", g):
        inputs = prefixed(g, f"{call}/")
        for head in [*heads["student"].values(), *heads["teacher"].values()]:
            head.zero_grad()
        temp = float(whole["teacher_temps"][int(call[4:])])
        total, terms, targets, leaf, teacher_out = run_composition(config, inputs, heads, centers,
                                                                   temp)
        for name, center in centers.items():  # those of the calls before
            if f"{name}_center_used" in inputs:
                close(center, inputs[f"{name}_center_used"], atol=1e-7)
        # stored in swapped crop order
        close(targets["dino"].flip(0), inputs["teacher_cls_probs"], rtol=1e-6, atol=1e-6)
        close(targets["ibot"], inputs["teacher_patch_probs"], rtol=1e-6, atol=1e-6)
        close(total, inputs["total_loss"])
        close(terms["dino_local_loss"], inputs["logged_dino_local_crops_loss"])
        close(terms["dino_global_loss"], inputs["logged_dino_global_crops_loss"])
        close(terms["ibot_loss"] / 2, inputs["logged_ibot_loss"])
        weighted = terms["koleo_loss"] * config.koleo_loss_weight
        close(weighted / 2, inputs["logged_koleo_loss"])
        total.backward()
        for name, value in leaf.items():
            close(value.grad, inputs[f"grad_{name}"], rtol=2e-5)
        for name in ("dino_head", "ibot_head"):
            compare_parameter_grads(heads["student"][name], prefixed(inputs, f"grad/{name}/"))
        for name, key in (("dino", "global_logits"), ("ibot", "masked_logits")):
            centers[name] = update_center(centers[name], teacher_out[key].detach())


def v3_variant(case, g, expect, heads, terms, targets, leaf, config):
    """The total of an option of DINOv3 that train.py does not offer, composed from the losses."""
    V, B, _ = targets["dino"].shape
    L = len(g["student_local_cls"]) // B
    masks, step = tensor(g["masks"]), int(expect["iteration"])
    diagonal = case.startswith("diag")
    n_local = V * L
    n_global = V * V if diagonal else V * (V - 1)
    logits = heads["student"]["dino_head"](leaf["student_global_cls"]).view(V, B, -1)
    global_mean = dino_loss(logits, targets["dino"], ignore_diagonal=not diagonal)
    global_term = global_mean * n_global / (n_global + n_local)
    close(global_term * (n_global + n_local) / n_global, expect["logged_dino_global_crops_loss"])
    local_term = terms["dino_local_loss"] * (V * (V - 1) + n_local) / (n_global + n_local)
    local_weight = float(expect["logged_dino_local_loss_weight"])
    gram_weight = float(expect["logged_gram_loss_weight"])
    student_patch, teacher_patch = leaf["student_patch"], tensor(g["teacher_patch"])
    if diagonal:
        assert local_weight == float(g["local_weight_schedule"][step])
        gram = gram_loss(student_patch, teacher_patch)
    elif "hires" in case:
        assert gram_weight == float(g["gram_weight_schedule"][step])
        gram = gram_loss(student_patch, tensor(g["gram_teacher_patch"]))
    else:
        gram = gram_loss(student_patch[masks][None], teacher_patch[masks][None], remove_neg=True)
    close(gram, expect["logged_gram_loss"])
    total = config.dino_head_loss_weight * (local_weight * local_term + global_term)
    total = total + gram_weight * gram
    total = total + config.ibot_loss_weight * terms["ibot_loss"]
    return total + config.koleo_loss_weight * terms["koleo_loss"]


def test_composition_v3():
    g = golden("compose_v3")
    config = train_config(centering="sinkhorn_knopp", **loss_weights(g))
    for case in matches(r"(.+?)/.*total_loss$", g):
        expect, heads = prefixed(g, f"{case}/"), read_heads(g)
        no_centers = dict(dino=None, ibot=None)  # Sinkhorn-Knopp needs none
        total, terms, targets, leaf, _ = run_composition(config, g, heads, no_centers,
                                                         float(g["teacher_temp"]))
        V, B, _ = targets["dino"].shape
        L = len(g["student_local_cls"]) // B
        close(targets["dino"], g["teacher_cls_probs"], rtol=1e-6, atol=1e-6)
        close(targets["ibot"], g["teacher_patch_probs"], rtol=1e-6, atol=1e-6)
        if case != "plain":
            total = v3_variant(case, g, expect, heads, terms, targets, leaf, config)
        close(total, expect["total_loss"])
        local_mean = terms["dino_local_loss"] * (V * (V - 1) + V * L) / (V * L)
        close(local_mean, expect["logged_dino_local_crops_loss"])
        close(terms["ibot_loss"], expect["logged_ibot_loss"])
        close(terms["koleo_loss"] / V, expect["logged_koleo_loss"])
        total.backward()
        for name, value in leaf.items():
            if f"grad_{name}" in expect:
                close(value.grad, expect[f"grad_{name}"], rtol=2e-5)
        for name in ("dino_head", "ibot_head"):
            compare_parameter_grads(heads["student"][name], prefixed(expect, f"grad/{name}/"))


# ---- trajectories: whole training steps ----

def setting(g, key):
    """A hyper-parameter of a trajectory; DINOv2's and DINOv3's files have it with hp_."""
    return g[f"hp_{key}"] if f"hp_{key}" in g else g[key]


def build_student(init, family, g):
    """A Student with exactly the given weights {name in the file: array}. All of them are used, and
    every trained parameter is set."""
    sizes = dict(hidden_size="hidden_size", num_hidden_layers="depth", num_attention_heads="heads",
                 image_size="image_size", patch_size="patch_size")
    if family == "dinov3_vit":
        sizes["num_register_tokens"] = "num_register_tokens"
    sizes = {ours: int(setting(g, theirs)) for ours, theirs in sizes.items()}
    epsilon = 1e-5 if family == "dinov3_vit" else 1e-6
    backbone = build_backbone(family, use_pretrained=False, pos_embed_rescale=None,
                              layer_norm_eps=epsilon, **sizes)
    if family == "vit":  # v1 has no mask token
        backbone.embeddings.mask_token.requires_grad_(False)
    parts = {name: prefixed(init, f"{name}.") for name in ("head", "dino_head", "ibot_head")}
    parts["dino_head"] = parts.pop("head") or parts["dino_head"]
    heads = {name: build_head(weights) for name, weights in parts.items() if weights}
    student = Student(backbone, heads["dino_head"], heads.get("ibot_head"))
    weights = {our_name(key): tensor(value) for key, value in init.items()}
    trained = {name for name, param in student.named_parameters() if param.requires_grad}
    assert trained <= set(weights)
    student.load_state_dict(weights, strict=False)
    assert set(weights) <= set(student.state_dict())
    return student.train()


def our_name(name):
    return head_names(re.sub(r"^head\.", "dino_head.", name))


def crops_of(g, step, full_size_locals=False):
    """The normalised crops of a step, view-major, from the file's bank of images, as
    dino.augment_batch gives them."""
    bank = (tensor(g["bank"]).float() - 128) / 64
    global_crops = bank[tensor(g["global_index"][step]).long().flatten()]
    local_crops = bank[tensor(g["local_index"][step]).long().flatten()]
    if not full_size_locals:
        size, windows = int(setting(g, "local_size")), []
        offsets = g["local_offset_yx"][step].reshape(-1, 2).astype(int)
        for crop, (y, x) in zip(local_crops, offsets):
            windows.append(crop[:, y:y + size, x:x + size])
        local_crops = torch.stack(windows)
    masks = tensor(g["masks"][step]) if "masks" in g else None
    return {"global": global_crops, "local": local_crops, "guided": None, "masks": masks,
            "masked": masked_tokens(masks), "gram": None}


def moved_error(w, reference, start):
    """E = |w - w_ref| / |w_ref - w_start|: 0 is perfect, 1 is as wrong as not having trained."""
    moved = np.linalg.norm(reference - start)
    if moved == 0:
        return float(not np.array_equal(w, start))
    return np.linalg.norm(w - reference) / moved


MEASURES = dict(
    l2=lambda w, start: np.linalg.norm(w),
    sum=lambda w, start: w.sum(),
    l2_of_change=lambda w, start: np.linalg.norm(w - start))
TOLERANCES = dict(
    l2=dict(rtol=1e-5),
    sum=dict(rtol=1e-5, atol=1e-4),
    l2_of_change=dict(rtol=5e-3))


def check_weights(ours, g, prefix, init):
    """E < 5e-3 for every stored tensor; what does not move there must not move here. Of tensors
    that are not stored, the file has the length and the length of the change."""
    def end_and_start(name):
        end = ours[our_name(name)].double()
        return end.numpy(), init[name].astype(np.float64)

    def is_determined(name):  # the true gradient of a key's bias is 0: Adam makes steps of rounding
        return not name.endswith("k_proj.bias")

    final = prefixed(g, f"{prefix}_final_hf/") or prefixed(g, f"{prefix}_final/")
    assert final
    for name, reference in final.items():
        if is_determined(name):
            end, start = end_and_start(name)
            assert moved_error(end, reference, start) < 5e-3, name
    names = g.get("final_names", g.get("final_names_hf", ()))
    names = [str(name) for name in names]
    for key, measure in MEASURES.items():
        for name, reference in zip(names, g.get(f"{prefix}_final_{key}", ())):
            if is_determined(name):
                close(measure(*end_and_start(name)), reference, **TOLERANCES[key])


def trajectory_config(g, **changed):
    """train.py's config with the hyper-parameters of a trajectory."""
    return train_config(
        global_crops_number=g["global_index"].shape[1], clip_grad=float(setting(g, "clip_grad")),
        local_crops_number=g["local_index"].shape[1], use_pretrained=False,
        freeze_last_layer=int(setting(g, "freeze_last_layer_steps")), **changed)


def values_of(g, step, config):
    """What dino.schedules returns, from the file's schedules."""
    keys = dict(lr="lr", last_layer_lr="last_layer_lr" if "last_layer_lr" in g else "lr",
                weight_decay="wd", momentum="momentum", teacher_temp="teacher_temp")
    values = {ours: float(g[theirs][step]) for ours, theirs in keys.items()}
    frozen = step < config.freeze_last_layer
    return SimpleNamespace(**values, backbone_factor=1.0, last_layer_frozen=frozen)


def run_trajectory(g, student, config, full_size_locals=False):
    """The steps of train.py's loop over a golden file, by dino.forward_backward and dino.update.

    Yields a namespace after each: step, terms with 'loss', gradients before clipping, grad_norm,
    state, and the outputs of teacher and student.
    """
    # the reference's momentum of the centers is the one that dino.update has
    momentum = inspect.signature(move_center).parameters["momentum"].default
    assert momentum == float(g.get("center_momentum", 0.9))
    optimizer, _, heads_only_iterations = build_optimizer(student, config, new_patch_embed=False)
    assert heads_only_iterations == 0
    for group in optimizer.param_groups:
        group["eps"] = float(g.get("adamw_eps", 1e-8))
    heads = dict(dino=student.dino_head, ibot=student.ibot_head or student.dino_head)
    centers = {name: torch.zeros(1, head.last_layer.weight.shape[0])
               for name, head in heads.items()}
    state = State(student, EMATeacher(student), optimizer, centers=centers,
                  scaler=torch.amp.GradScaler("cpu", enabled=False))
    outputs = {}

    def keep_output(module, args, kwargs, out):
        is_teacher = "n_shared_blocks" in kwargs
        outputs["teacher" if is_teacher else "student"] = out
    student.register_forward_hook(keep_output, with_kwargs=True)
    for step in range(len(g["lr"])):
        values, crops = values_of(g, step, config), crops_of(g, step, full_size_locals)
        set_learning_rates(optimizer, values.lr, values.last_layer_lr, values.weight_decay,
                           values.backbone_factor)
        terms, row_sums, _ = dino.forward_backward(state, crops, values.teacher_temp, config,
                                                   autocast=contextlib.nullcontext)
        gradients = {name: param.grad.clone() for name, param in student.named_parameters()
                     if param.grad is not None}
        grad_norm = dino.update(state, row_sums, values, config)
        assert state.iteration == step + 1
        yield SimpleNamespace(step=step, terms=terms, gradients=gradients, grad_norm=grad_norm,
                              state=state, **outputs)


def joint_norm(gradients, wanted):
    """L2 norm over the gradients whose name is wanted."""
    norms = [grad.norm() for name, grad in gradients.items() if wanted(name)]
    return torch.stack(norms).norm()


def check_trained_weights(state, g, prefix, init):
    student = dict(state.student.state_dict())
    check_weights(student, g, f"{prefix}student", init)
    check_weights({**student, **state.ema.values}, g, f"{prefix}teacher", init)


@pytest.mark.parametrize("run", ["strict", "multires"])
def test_trajectory_v1(run):
    init_file, g = golden("traj_v1_init"), golden(f"traj_v1_{run}")
    g["bank"] = init_file["bank"]
    prefix = "" if run == "strict" else "sizeinterp_"
    init = prefixed(init_file, "hf/")
    student = build_student(init, "vit", g)
    student.dino_head.last_layer.parametrizations.weight.original0.requires_grad_(False)
    config = trajectory_config(
        g, centering="centering", student_temp=float(g["student_temp"]), clip_grad_by="parameter",
        freeze_last_layer_by="grad", adam_betas=tuple(g["adamw_betas"]))
    check_first_features(init_file, student)
    official = map(str, init_file["map_official"])
    to_hf = dict(zip(official, map(hf_list, init_file["map_hf"])))
    for done in run_trajectory(g, student, config, full_size_locals=run == "strict"):
        step, gradients, loss = done.step, done.gradients, done.terms["loss"]
        close(loss, g[f"{prefix}loss"][step], rtol=0, atol=2e-5)
        close(loss, g[f"{prefix}loss_fp64"][step], rtol=0, atol=2e-5)
        close(done.grad_norm, g[f"{prefix}grad_norm_total"][step], rtol=1e-4)
        close(joint_norm(gradients, lambda name: "last_layer" not in name),
              g[f"{prefix}grad_norm_total_no_last_layer"][step], rtol=1e-4)
        norms = g[f"{prefix}grad_norm_per_param"][step]
        for name, reference in zip(g["param_names_official"], norms):
            ours = {our_name(hf) for hf in to_hf[str(name)]}  # the parts of a fused qkv
            close(joint_norm(gradients, ours.__contains__), reference, rtol=1e-3)
        center = done.state.centers["dino"]
        close(center, g[f"{prefix}center_after_step"][step][None], rtol=1e-5)
        if step == 0:
            logits = torch.cat([done.student["global_logits"], done.student["local_logits"]])
            close(logits, g[f"{prefix}student_logits_step0"], rtol=1e-5)
            logits = done.teacher["global_logits"]
            close(logits, g[f"{prefix}teacher_logits_step0"], rtol=1e-5)
    close(done.state.centers["dino"], g[f"{prefix}center_final"], rtol=1e-5)
    check_trained_weights(done.state, g, prefix, init)


def check_first_features(g, student):
    """Features and head outputs of the start weights."""
    n, low = len(g["feat_global_hf"]), int(g["local_offset"])
    images = (tensor(g["bank"])[:n].float() - 128) / 64
    high = low + int(g["hp_local_size"])
    student.eval()
    with torch.no_grad():
        cls, _ = forward_features(student.backbone, images)
        close(cls, g["feat_global_hf"])
        close(cls, g["feat_global_official"], rtol=1e-5)
        local_cls, _ = forward_features(student.backbone, images[..., low:high, low:high])
        close(local_cls, g["feat_local_hf"])
        close(student.dino_head(cls), g["head_out_global"])
    student.train()


@pytest.mark.parametrize("run", cases("traj_v2", r"(.+?)/") + ["v3"])
def test_trajectory_v2_and_v3(run):
    v3 = run == "v3"
    if v3:
        g = golden("traj_v3")
    else:
        whole = golden("traj_v2")
        g = {"bank": whole["bank"], **prefixed(whole, f"{run}/")}
    init = prefixed(g, "init/")
    student = build_student(init, "dinov3_vit" if v3 else "dinov2", g)
    config = trajectory_config(
        g, centering="centering" if "centering" in run else "sinkhorn_knopp",
        clip_grad_by="module", freeze_last_layer_by="lr",
        adam_betas=(0.9, float(g["hp_adamw_beta2"])),
        layerwise_decay=float(g["hp_layerwise_decay"]),
        patch_embed_lr_mult=float(g["hp_patch_embed_lr_mult"]),
        dino_head_loss_weight=float(g["hp_dino_weight"]),
        ibot_loss_weight=float(g["hp_ibot_weight"]),
        koleo_loss_weight=float(g["hp_koleo_weight"]),
        gram_loss_weight=float(g.get("hp_gram_weight", 0.0)))
    if v3:
        check_features(g, student)
    # v2 logs each DINO mean times its share of the pairs, KoLeo weighted, KoLeo and iBOT halved; v3
    # logs plain means
    scale = dict(dino_global_crops=1.0, dino_local_crops=1.0, ibot=2.0,
                 koleo=2.0 / config.koleo_loss_weight)
    if v3:
        local_share = 2 * config.local_crops_number / (2 + 2 * config.local_crops_number)
        scale = dict(dino_global_crops=1 - local_share, dino_local_crops=local_share, ibot=1.0,
                     koleo=2.0, gram=1.0)
    submodules = [str(name) for name in g["grad_norm_submodules"]]
    for done in run_trajectory(g, student, config):
        step, loss = done.step, done.terms["loss"]
        close(loss, g["total_loss"][step], rtol=0, atol=2e-5)
        close(loss, g["total_loss_fp64"][step], rtol=0, atol=2e-5)
        close(done.grad_norm, np.linalg.norm(g["grad_norm"][step]), rtol=1e-4)
        for name, reference in zip(submodules, g["grad_norm"][step]):
            norm = joint_norm(done.gradients, lambda param: param.startswith(f"{name}."))
            close(norm, reference, rtol=1e-4)
        for name, factor in scale.items():
            term = done.terms[f"{name}_loss".replace("_crops", "")]
            close(term, factor * g[f"logged_{name}_loss"][step], rtol=1e-5, atol=2e-5)
    for name, center in done.state.centers.items():
        if f"{name}_center_final" in g:
            close(center, g[f"{name}_center_final"], rtol=1e-5)
    check_trained_weights(done.state, g, "", init)


def check_features(g, student):
    """CLS and patches of the start weights, plain, masked and on a small window, in eval mode."""
    n, size = len(g["feat_cls"]), int(g["hp_local_size"])
    images = (tensor(g["bank"])[:n].float() - 128) / 64
    masks = tensor(g["masks"])[0, :n]
    inputs = {"": (images, None), "_masked": (images, masks),
              "_local": (images[..., :size, :size], None)}
    student.eval()
    for suffix, args in inputs.items():
        with torch.no_grad():
            cls, patches = forward_features(student.backbone, *args)
        found = 0
        for key, value in (("cls", cls), ("patch", patches), ("patches", patches)):
            for name in (f"feat_{key}{suffix}", f"feat{suffix}_{key}"):
                if name in g:
                    close(value, g[name], rtol=1e-5)
                    found += 1
        assert found, suffix
    student.train()
