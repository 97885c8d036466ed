"""Parity with the reference implementations of DINO, DINOv2 and DINOv3, by numbers computed with them (tests/golden).

Every size, case name and hyper-parameter is read from the files: GOLDEN=/another/family of files with the same keys must pass too.
Compositions and trajectories run through train.py's own functions, with its config globals set as the files say.
"""
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel

from augment import sample_masks
from evaluate import knn_classify
from losses import dino_loss, gram_loss, ibot_loss, koleo_loss, sinkhorn_knopp, softmax_center, update_center
from model import DINOHead, EMATeacher, Student, forward_features
from optim import clip_gradients, cosine_schedule, linear_schedule, param_groups
from tests_support import load_script

GOLDEN = os.environ.get("GOLDEN", os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden"))


def golden(name):
    with np.load(os.path.join(GOLDEN, f"{name}.npz"), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def tensor(array):
    return torch.from_numpy(np.array(array))


def close(ours, theirs, rtol=1e-5, atol=0.0):
    ours = ours.detach().double().numpy() if torch.is_tensor(ours) else np.asarray(ours, dtype=np.float64)
    theirs = np.asarray(theirs, dtype=np.float64)
    assert ours.shape == theirs.shape
    scale = np.abs(theirs).max() if theirs.size else 0         # of the whole array: a gradient's small entries are rounding
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
            loss, grad = value_and_grad(lambda s: dino_loss(s.view(crops, B, -1), probs, float(g["student_temp"])), g[f"{run}_student_{c}"])
            close(loss, g[f"{run}_loss_{c}"])
            close(grad, g[f"{run}_grad_student_{c}"])
            center = update_center(center, teacher, float(g["center_momentum"]))
            close(center, g[f"{run}_center_{c + 1}"], atol=1e-7)


def test_softmax_centering():
    g = golden("softmax_centering")
    for kind in ("cls", "patch"):
        center = torch.zeros_like(tensor(g[f"{kind}_center_final"]).reshape(1, -1))
        for c, temp in enumerate(g["temps"]):
            logits = tensor(g[f"{kind}_logits_{c}"]).flatten(0, -2)
            close(center, g[f"{kind}_center_used_{c}"].reshape(1, -1), atol=1e-7)
            close(softmax_center(logits, center, float(temp)), g[f"{kind}_probs_{c}"].reshape(len(logits), -1), rtol=1e-6, atol=1e-6)
            center = update_center(center, logits, float(g["center_momentum"]))
        close(center, g[f"{kind}_center_final"].reshape(1, -1), atol=1e-7)


def test_sinkhorn():
    g, found = golden("sinkhorn"), 0
    for key in g:
        match = re.fullmatch(r"(.+)_(cls|patch)_T(\d+)(_1it|_count_x3)?", key)
        if match:
            probs = sinkhorn_knopp(tensor(g[f"{match[1]}_{match[2]}_logits"]), int(match[3]) / 1000, 1 if match[4] == "_1it" else 3)
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
                loss, grad = value_and_grad(lambda s: scale * dino_loss(s, probs, ignore_diagonal=ignore), g[f"{case}_student"])
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
        close(loss, g[f"{case}_v2_loss"], rtol=2e-5 if "near" in case else 1e-5)
        close(loss, g[f"{case}_v3_loss"], rtol=2e-5 if "near" in case else 1e-5)
        if "exact" not in case:                                # at distance 0 the gradient is that of the added 1e-8
            close(grad, g[f"{case}_v2_grad"], rtol=3e-3 if "near" in case else 1e-5)


def test_gram():
    g = golden("gram")
    student, teacher = g["student"], tensor(g["teacher"])
    for case in g["cases"]:
        norm, neg, tneg, img = (int(digit) for digit in re.findall(r"\d", str(case)))
        together = (lambda x: x) if img else (lambda x: x.flatten(0, 1)[None])
        loss, grad = value_and_grad(lambda s: gram_loss(together(s), together(teacher), bool(neg), bool(tneg), bool(norm)), student)
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
        assert {name for name, p in head.named_parameters() if p.requires_grad} == {head_names(name) for name in trainable}
        x = tensor(g[f"{version}/x"]).requires_grad_()
        y = head(x)
        close(y, g[f"{version}/y"], rtol=1e-5)
        (y * tensor(g[f"{version}/R"])).sum().backward()
        close(x.grad, g[f"{version}/grad_x"])
        params, compared = dict(head.named_parameters()), 0
        for name in ("weight_v", "weight_g", "last_layer"):    # the gradients in the file
            if f"{version}/grad_{name}" in g:
                close(params[head_names(f"last_layer.{name}" if name != "last_layer" else "last_layer.weight")].grad, g[f"{version}/grad_{name}"])
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
            assert abs(float(ours.std()) - std) <= 0.05 * std + 1e-9 and abs(float(ours.mean()) - float(g[f"{version}_init/mean"][i])) <= 0.1 * std + 1e-9
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
    total, warmup, base, low = epochs * per_epoch, int(g["v1_warmup_epochs"]) * per_epoch, float(g["v1_lr_base"]), float(g["v1_lr_min"])
    exact(series(lambda i: cosine_schedule(base, low, i, total, warmup), total), g["v1_lr"])
    exact(series(lambda i: cosine_schedule(base, low, i, total, warmup, base / 10), total), g["v1_lr_startwarmup"])
    exact(series(lambda i: cosine_schedule(0.04, 0.4, i, total), total), g["v1_wd"])
    exact(series(lambda i: cosine_schedule(float(g["v1_momentum_base"]), 1.0, i, total), total), g["v1_momentum"])
    n = int(g["v1_teacher_temp_warmup_epochs"])
    exact(series(lambda i: linear_schedule(0.04, 0.07, i, n), epochs), g["v1_teacher_temp_per_epoch"])
    exact(series(lambda i: linear_schedule(0.04, 0.04, i, 0), epochs), g["v1_teacher_temp_nowarmup"])


def test_schedules_v2():
    g = golden("schedules")
    total, warmup, freeze, base, final = (int(g["v2_total_iters"]), int(g["v2_warmup_iters"]), int(g["v2_freeze_iters"]), float(g["v2_lr_base"]),
                                          float(g["v2_lr_final"]))

    def frozen(start):                                         # zeros first, then the same schedule over what is left
        return lambda i: 0.0 if i < freeze else cosine_schedule(base, final, i - freeze, total - freeze, warmup, start)
    exact(series(lambda i: cosine_schedule(base, final, i, total, warmup), total), g["v2_lr"])
    exact(series(frozen(0.0), total), g["v2_lr_freeze"])
    exact(series(frozen(base / 5), total), g["v2_lr_startwarmup"])
    exact(series(lambda i: cosine_schedule(base, final, i, total), total), g["v2_nowarmup"])
    exact(series(lambda i: cosine_schedule(base, final, total + i, total, warmup), len(g["v2_lr_beyond"])), g["v2_lr_beyond"])
    per_epoch, peak = int(g["v2cfg_epoch_length"]), float(g["v2cfg_scaled_lr"])
    total, n = int(g["v2cfg_epochs"]) * per_epoch, len(g["v2cfg_lr"])
    exact(peak, float(g["v2cfg_base_lr"]) * (float(g["v2cfg_batch_size"]) / 1024) ** 0.5)
    exact(series(lambda i: cosine_schedule(peak, 1e-6, i, total, 2 * per_epoch), n), g["v2cfg_lr"])
    exact(series(lambda i: 0.0 if i < per_epoch else cosine_schedule(peak, 1e-6, i, total, 2 * per_epoch), n), g["v2cfg_last_layer_lr"])
    exact(series(lambda i: cosine_schedule(0.04, 0.4, i, total), n), g["v2cfg_wd"])
    exact(series(lambda i: cosine_schedule(0.992, 1.0, i, total), n), g["v2cfg_momentum"])
    exact(series(lambda i: linear_schedule(0.04, 0.07, i, 3 * per_epoch), n), g["v2cfg_teacher_temp"])


def test_schedules_v3():
    g = golden("schedules")
    total, warmup, cosine, start, peak, end = int(g["v3_total"]), int(g["v3_warmup"]), int(g["v3_cosine"]), float(g["v3_start"]), float(g["v3_peak"]), \
        float(g["v3_end"])

    def v3(peak, end, warmup, cosine, start=start):
        return series(lambda i: cosine_schedule(peak, end, i, warmup + cosine, warmup, start, reach_end=True), total)
    exact(v3(peak, end, warmup, total - warmup), g["v3_full"])
    exact(v3(peak, end, warmup, cosine), g["v3_partial"])
    exact(v3(peak, end, 0, total), g["v3_nowarmup"])
    # truncated: the first part of a cosine 1.25 times as long, stretched to arrive at the end
    n = total - warmup
    u = np.array(series(lambda i: cosine_schedule(1.0, 0.0, i, int(1.25 * n), reach_end=True), n))
    u = (u - u[-1]) / (1 - u[-1])
    exact(series(lambda i: linear_schedule(0.0, peak, i, warmup), warmup) + list(end + (peak - end) * u), g["v3_trunc025"])
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
    exact(series(lambda i: cosine_schedule(0.07, 0.07, i, total_cfg, 3 * per_epoch, 0.04, reach_end=True), n), g["v3cfg_teacher_temp"])


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


@pytest.mark.parametrize("prefix", sorted({"_".join(key.split("_")[:2]) for key in golden("masks")}))
def test_masks_have_the_distribution_of_the_reference(prefix):
    g = prefixed(golden("masks"), f"{prefix}_")
    grid, (batches, crops) = g["examples"].shape[1], g["counts"].shape
    rng = np.random.default_rng(0)
    masks = torch.stack([sample_masks(crops, grid, rng, exact=prefix.startswith("v3")) for _ in range(batches)])
    counts = masks.sum(-1).numpy()
    assert ((counts > 0).mean(axis=1) == float(g["fraction_masked"])).all() or grid < 4    # exactly so many in every batch
    if prefix.startswith("v3"):
        assert (np.sort(counts, axis=1) == np.sort(g["counts"], axis=1)).all()             # the same numbers in every batch
    masked, theirs = counts[counts > 0], g["counts"][g["counts"] > 0]
    assert abs(masked.mean() / theirs.mean() - 1) < 0.005
    bins = np.arange(grid * grid + 2)
    ours, reference = (np.histogram(x, bins)[0].cumsum() / len(x) for x in (masked, theirs))
    assert np.abs(ours - reference).max() < 0.02
    some = masks.flatten(0, 1)[counts.flatten() > 0][:6000].view(-1, grid, grid).numpy()
    assert abs(np.mean([components(mask) for mask in some]) / float(g["mean_components"]) - 1) < 0.03
    assert np.abs(masks.float().mean((0, 1)).numpy().reshape(grid, grid) - g["occupancy"]).max() < 0.01


# ---- parameter groups ----

class Holder(torch.nn.Module):
    """Parameters by dotted name, without a network around them."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes = shapes

    def named_parameters(self):
        return [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in self.shapes.items()]


def shape_of(name):
    """A shape with the right number of dimensions for an HF or head name: biases, norms and layer scales are vectors."""
    return (3,) if name.endswith(".bias") or re.search(r"norm|lambda|gamma", name) else (3, 4)


def grouped(shapes, **settings):
    return {name: group for group in param_groups(Holder(shapes), 1.0, 1.0, **settings) for name in group["names"]}


def hf_list(entry):
    return [name for name in re.split(r"[|,; ]+", str(entry)) if name]


def test_param_groups_v1():
    g = golden("param_groups")
    for case in ("normlast", "freelast"):
        for name, hf_names, group in zip(g[f"v1_{case}_names"], g[f"v1_{case}_hf_names"], g[f"v1_{case}_group"]):
            for ours in hf_list(hf_names):
                if group >= 0:
                    found = grouped({head_names(ours): shape_of(ours)})[head_names(ours)]
                    assert found["wd_mult"] == (1.0 if group == 0 else 0.0) and found["lr_mult"] == 1.0, name


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_param_groups_with_layer_decay(version):
    g = golden("param_groups")
    settings = dict(layerwise_decay=float(g["layerwise_decay"]), patch_embed_lr_mult=float(g["patch_embed_lr_mult"]))
    for part in ("backbone", "dino_head"):
        keys = [f"{version}_{part}_{key}" for key in ("names", "lr_multiplier", "wd_multiplier", "is_last_layer")]
        hf = g.get(f"{version}_{part}_hf_names", g[keys[0]])
        names = [[head_names(name) for name in hf_list(entry)] for entry in hf]
        found = grouped({name: shape_of(name) for group in names for name in group}, **settings)
        assert found
        for group, lr_mult, wd_mult, last in zip(names, *(g[key] for key in keys[1:])):
            for name in group:
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
    leaf = {name: tensor(inputs[name]).requires_grad_() for name in ("student_global_cls", "student_patch", "student_local_cls")}
    teacher = dict(global_logits=heads["teacher"]["dino_head"](tensor(inputs["teacher_cls"])),
                   masked_logits=heads["teacher"]["ibot_head"](tensor(inputs["teacher_patch"])[masks]))
    targets = {name: value.detach() for name, value in train.make_targets(teacher, centers, temp).items()}
    student = heads["student"]
    logits = student["dino_head"](torch.cat([leaf["student_global_cls"], leaf["student_local_cls"]]))
    n = len(leaf["student_global_cls"])
    out = dict(global_cls=leaf["student_global_cls"], patches=leaf["student_patch"], local_cls=leaf["student_local_cls"],
               global_logits=logits[:n], local_logits=logits[n:], masked_logits=student["ibot_head"](leaf["student_patch"][masks]))
    total, terms = train.compute_losses(out, targets, masks, tensor(inputs["teacher_patch"]))
    return total, terms, targets, leaf, teacher


def read_heads(g, prefix=""):
    heads = {}
    for who in ("student", "teacher"):
        built = {name: build_head(weights) for name in ("dino_head", "ibot_head") if (weights := prefixed(g, f"{prefix}{who}/{name}/"))}
        heads[who] = {"dino_head": built["dino_head"], "ibot_head": built.get("ibot_head", built["dino_head"])}
    return heads


def loss_weights(g):
    return dict(dino_head_loss_weight=float(g["dino_loss_weight"]), ibot_loss_weight=float(g["ibot_loss_weight"]),
                koleo_loss_weight=float(g["koleo_loss_weight"]))


@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in golden("compose_v2") if "/" in key}))
def test_composition_v2(case):
    whole = golden("compose_v2")
    g = prefixed(whole, f"{case}/")
    train = configured(centering=case.split("_", 1)[1], **loss_weights(whole))
    heads = read_heads(g)
    centers = {name: torch.zeros(1, heads["teacher"][f"{name}_head"].last_layer.weight.shape[0]) for name in ("dino", "ibot")}
    for call in sorted({key.split("/")[0] for key in g if key.startswith("call")}):
        inputs = prefixed(g, f"{call}/")
        for who in heads.values():
            for head in who.values():
                head.zero_grad()
        total, terms, targets, leaf, teacher = run_composition(train, inputs, heads, centers, float(whole["teacher_temps"][int(call[4:])]))
        close(targets["dino"].flip(0), inputs["teacher_cls_probs"], rtol=1e-6, atol=1e-6)   # stored in swapped crop order
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
        if case != "plain":                                    # options that train.py does not offer: composed from the losses
            masks, step, diagonal = tensor(g["masks"]), int(expect["iteration"]), case.startswith("diag")
            n_global, n_local = V * V - (0 if diagonal else V), V * L
            logits = heads["student"]["dino_head"](leaf["student_global_cls"]).view(V, B, -1)
            global_term = dino_loss(logits, targets["dino"], ignore_diagonal=not diagonal) * n_global / (n_global + n_local)
            local_term = terms["dino_local_loss"] * (V * (V - 1) + n_local) / (n_global + n_local)
            schedule = next((key for key in g if "local_weight_schedule" in key), None)
            local_weight = float(g[schedule][step]) if diagonal and schedule else 1.0
            student_patch, teacher_patch = leaf["student_patch"], tensor(g["teacher_patch"])
            if diagonal:
                gram, weight = gram_loss(student_patch, teacher_patch), 1.5
            elif "hires" in case:
                schedule = next(key for key in g if "gram_weight_schedule" in key)
                gram, weight = gram_loss(student_patch, tensor(g["gram_teacher_patch"])), float(g[schedule][step])
            else:
                gram, weight = gram_loss(student_patch[masks][None], teacher_patch[masks][None], remove_neg=True), 2.0
            total = weights["dino_head_loss_weight"] * (local_weight * local_term + global_term) + weights["ibot_loss_weight"] * terms["ibot_loss"] \
                + weights["koleo_loss_weight"] * terms["koleo_loss"] + weight * gram
        close(total, expect["total_loss"])
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
    """A Student with exactly the given weights {name in the file: array}; everything in the file is used, everything trained is set."""
    settings = dict(hidden_size=hp("hidden_size"), num_hidden_layers=hp("depth"), num_attention_heads=hp("heads"), image_size=hp("image_size"),
                    patch_size=hp("patch_size"), layer_norm_eps=1e-5 if family == "dinov3_vit" else 1e-6)
    if family != "dinov2":
        settings["intermediate_size"] = 4 * hp("hidden_size")
    if family == "dinov3_vit":
        settings.update(num_register_tokens=hp("num_register_tokens"), key_bias=False, pos_embed_rescale=None)
    extra = dict(add_pooling_layer=False) if family == "vit" else {}
    backbone = AutoModel.from_config(AutoConfig.for_model(family, **settings), **extra)
    parts = {name: prefixed(init, f"{name}.") for name in ("head", "dino_head", "ibot_head")}
    parts["dino_head"] = parts.pop("head") or parts["dino_head"]
    heads = {name: build_head(weights) for name, weights in parts.items() if weights}
    student = Student(backbone, heads["dino_head"], heads.get("ibot_head"))
    weights = {our_name(key): tensor(value) for key, value in init.items()}
    missing = [name for name, _ in student.named_parameters() if name not in weights]
    assert missing == [], missing
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
        local_crops = torch.stack([crop[:, y:y + local_size, x:x + local_size] for crop, (y, x) in zip(local_crops, offsets.astype(int))])
    return global_crops, local_crops


def check_weights(ours, final, init):
    """E = |w - w_ref| / |w_ref - w_init| < 5e-3 for every stored tensor; what does not move there must not move here."""
    checked = 0
    for name, reference in final.items():
        if name.endswith("k_proj.bias"):                       # its true gradient is 0: Adam turns rounding into full steps
            continue
        w, start = ours[our_name(name)].detach().double().numpy(), init[name].astype(np.float64)
        moved = np.linalg.norm(reference - start)
        if moved == 0:
            assert np.array_equal(w, start), name
        else:
            assert np.linalg.norm(w - reference) / moved < 5e-3, (name, np.linalg.norm(w - reference) / moved)
        checked += 1
    assert checked


def run_trajectory(train, g, student, hp, schedules, group_settings, clip_by, freeze_by, betas, local, masks=None, full_size_locals=False):
    """The steps of train.py's loop over a golden file; yields (step, total, terms, gradient norms, centers) after each."""
    teacher = EMATeacher(student)
    optimizer = torch.optim.AdamW(param_groups(student, 1.0, 1.0, **group_settings), betas=betas, eps=1e-8)
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
        norms = [torch.stack([p.grad.norm() for p in child.parameters() if p.grad is not None]).norm() for child in student.children()]
        clip_gradients(student, float(g.get("clip_grad", g.get("hp_clip_grad"))), clip_by)
        if step < hp("freeze_last_layer_steps") and freeze_by == "grad":
            for name, param in student.named_parameters():
                if "last_layer" in name:
                    param.grad = None
        optimizer.step()
        teacher.update(student, now["momentum"])
        for name, key in (("dino", "global_logits"), ("ibot", "masked_logits")):
            if key in teacher_out:
                centers[name] = update_center(centers[name], teacher_out[key])
        yield step, total, terms, norms, centers, out, teacher_out, teacher


@pytest.mark.parametrize("run", ["strict", "multires"])
def test_trajectory_v1(run):
    init_file, g = golden("traj_v1_init"), golden(f"traj_v1_{run}")
    g["bank"] = init_file["bank"]
    strict, prefix = run == "strict", "" if run == "strict" else "sizeinterp_"
    init = prefixed(init_file, "hf/")
    student = build_student(init, "vit", lambda key: int(g[key]))
    student.dino_head.last_layer.parametrizations.weight.original0.requires_grad_(False)
    train = configured(centering="centering", student_temp=float(g["student_temp"]))
    schedules = {name: g[name] for name in ("lr", "wd", "momentum", "teacher_temp")}
    for step, total, _, norms, centers, out, teacher_out, teacher in run_trajectory(
            train, g, student, lambda key: int(g[key]), schedules, {}, "parameter", "grad", tuple(g["adamw_betas"]), int(g["local_size"]),
            full_size_locals=strict):
        close(total, g[f"{prefix}loss"][step], rtol=0, atol=2e-5)
        close(torch.stack(norms).norm(), g[f"{prefix}grad_norm_total"][step], rtol=1e-3)
        close(centers["dino"], g[f"{prefix}center_after_step"][step][None], rtol=1e-4)
        if step == 0:
            close(torch.cat([out["global_logits"], out["local_logits"]]), g[f"{prefix}student_logits_step0"], rtol=1e-5)
            close(teacher_out["global_logits"], g[f"{prefix}teacher_logits_step0"], rtol=1e-5)
    ours = dict(student.state_dict())
    for who, weights in (("student", ours), ("teacher", {**ours, **teacher.values})):
        check_weights(weights, prefixed(g, f"{prefix}{who}_final_hf/"), init)


@pytest.mark.parametrize("run", sorted({key.split("/")[0] for key in golden("traj_v2") if "/" in key}) + ["v3"])
def test_trajectory_v2_and_v3(run):
    v3 = run == "v3"
    g = golden("traj_v3") if v3 else {"bank": golden("traj_v2")["bank"], **prefixed(golden("traj_v2"), f"{run}/")}
    init = prefixed(g, "init/")
    student = build_student(init, "dinov3_vit" if v3 else "dinov2", lambda key: int(g[f"hp_{key}"]))
    train = configured(centering="centering" if "centering" in run else "sinkhorn_knopp", dino_head_loss_weight=float(g["hp_dino_weight"]),
                       ibot_loss_weight=float(g["hp_ibot_weight"]), koleo_loss_weight=float(g["hp_koleo_weight"]),
                       gram_loss_weight=float(g.get("hp_gram_weight", 0.0)))
    if v3:
        check_features(g, student)
    schedules = {name: g[name] for name in ("lr", "last_layer_lr", "wd", "momentum", "teacher_temp")}
    settings = dict(layerwise_decay=float(g["hp_layerwise_decay"]), patch_embed_lr_mult=float(g["hp_patch_embed_lr_mult"]))
    submodules = [str(name) for name in g["grad_norm_submodules"]]
    for step, total, terms, norms, _, _, _, teacher in run_trajectory(
            train, g, student, lambda key: int(g[f"hp_{key}"]), schedules, settings, "module", "lr", (0.9, float(g["hp_adamw_beta2"])),
            int(g["hp_local_size"]), g["masks"]):
        close(total, g["total_loss"][step], rtol=0, atol=2e-5)
        by_name = dict(zip([name for name, _ in student.named_children()], norms))
        for i, name in enumerate(submodules):
            close(by_name[name], g["grad_norm"][step][i], rtol=1e-3)
        n_pairs = (2, 2 * int(g["hp_n_local"]))                # v3 logs plain means, v2 each mean times its share of the pairs
        shares = [n / sum(n_pairs) if v3 else 1.0 for n in n_pairs]
        close(terms["dino_global_loss"], shares[0] * g["logged_dino_global_crops_loss"][step], rtol=1e-4)
        close(terms["dino_local_loss"], shares[1] * g["logged_dino_local_crops_loss"][step], rtol=1e-4)
        close(terms["ibot_loss"], g["logged_ibot_loss"][step] * (1 if v3 else 2), rtol=1e-4)
        if v3:
            close(terms["gram_loss"], g["logged_gram_loss"][step], rtol=1e-4)
    ours = dict(student.state_dict())
    final = {who: prefixed(g, prefix) for who in ("student", "teacher") for prefix in
             {key[:key.index("/") + 1] for key in g if key.startswith(f"{who}_final") and "/" in key}}
    for who, weights in (("student", ours), ("teacher", {**ours, **teacher.values})):
        check_weights(weights, final[who], init)


def check_features(g, student):
    """CLS and patches of the start weights, plain, masked and on a small window, in eval mode."""
    images, size = (tensor(g["bank"])[:4].float() - 128) / 64, int(g["hp_local_size"])
    student.eval()
    with torch.no_grad():
        for suffix, pixels, masks in (("", images, None), ("_masked", images, tensor(g["masks"])[0, :4]), ("_local", images[..., :size, :size], None)):
            cls, patches = forward_features(student.backbone, pixels, masks)
            found = 0
            for key, value in (("cls", cls), ("patch", patches), ("patches", patches)):
                for name in (f"feat_{key}{suffix}", f"feat{suffix}_{key}"):
                    if name in g:
                        close(value, g[name], rtol=1e-5)
                        found += 1
            assert found, suffix
    student.train()
