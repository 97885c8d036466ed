"""Losses without prototypes, LeJEPA and DIET, and the CLS anchor: against plain loops, against
numbers of the authors' code, and in runs without a teacher.
"""
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dino
from checks import Checks, step_bytes, unused, uses_prototypes
from configurator import UserError
from losses import (cls_anchor_loss, diet_loss, lejepa_prediction_loss, random_directions,
                    sigreg_loss)
from metrics import diagnose, monitor
from model import Student, build_backbone, build_heads, forward_features
from tests_support import ROOT, SHRUNK, TINY, assert_same, load_train, log, run, state

OFF = "--dino_head_loss_weight=0"
OBJECTIVES = dict(
    lejepa=[OFF, "--lejepa_loss_weight=1", "--lejepa_sigreg_weight=0.3", "--lejepa_out_dim=8"],
    diet=[OFF, "--diet_loss_weight=1", "--train_last_blocks=1"],
    anchored=[OFF, "--diet_loss_weight=1", "--gram_loss_weight=1", "--gram_crops_size=0",
              "--cls_anchor_loss_weight=0.5"],
    all=["--lejepa_loss_weight=0.5", "--diet_loss_weight=0.5", "--cls_anchor_loss_weight=0.5",
         "--gram_loss_weight=1", "--gram_teacher=start", "--koleo_loss_weight=0.1",
         "--ibot_loss_weight=1"])
COMMON = ["--model_type=dinov2", "--drop_path_rate=0.3", "--max_iterations=4", "--eval_interval=0",
          "--warmup_iterations=0", "--generate_samples=false", "--saveckp_freq=2"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def waves(*shape):
    """Numbers that anyone can make again, in any program."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(1.7 * i) + 0.5 * torch.cos(0.3 * i * i)).float().view(shape)


def config_of(*argv):
    """train.py's config as a namespace, after the flags."""
    from configurator import override
    module = load_train()
    override(vars(module), module.config_keys, list(argv))
    return SimpleNamespace(**{key: getattr(module, key) for key in module.config_keys})


# ---- the losses ----

def test_sigreg_is_the_statistic_of_its_docstring():
    """Point by point, with complex numbers, over both halves of the line."""
    embeddings, directions = 1.5 * normal(2, 5, 3), random_directions(3, 0, 0, number=4)
    t = torch.linspace(-3, 3, 33, dtype=torch.float64)
    statistics = []
    for s in range(2):
        for a in range(4):
            values = []
            for point in t:
                phi = 0
                for n in range(5):
                    x = (embeddings[s, n] * directions[:, a]).sum().double()
                    phi = phi + torch.exp(1j * point * x) / 5
                normal_phi = torch.exp(-point**2 / 2)
                values.append((phi - normal_phi).abs() ** 2 * torch.exp(-point**2 / 2))
            statistics.append(5 * torch.trapezoid(torch.stack(values), t))
    expected = torch.stack(statistics).mean().float()
    torch.testing.assert_close(sigreg_loss(embeddings, directions), expected)


def test_sigreg_and_prediction_are_those_of_the_authors():
    """Numbers of rbalestr-lab/lejepa at eddffdd, run on a CPU with the inputs below: class SIGReg
    of MINIMAL.md, its torch.randn replaced by these directions, with the gradient of one embedding;
    its invariance loss, and the same with the mean of the first two views;
    EppsPulley() of the package, and EppsPulley(t_max=5, n_points=33)."""
    embeddings = (1.5 * waves(3, 8, 4) + 0.2).requires_grad_()
    directions = F.normalize(waves(4, 256).roll(5, 1), dim=0)
    loss = sigreg_loss(embeddings, directions)
    loss.backward()
    assert loss.item() == pytest.approx(4.370473384857178, rel=1e-5)
    expected = torch.tensor([-0.055439, 0.03183974, 0.08349223, -0.06000528])
    torch.testing.assert_close(embeddings.grad[1, 2], expected, rtol=1e-4, atol=1e-7)
    for n_global, value in ((3, 1.5344797372817993), (2, 1.8873496055603027)):
        loss = lejepa_prediction_loss(embeddings, n_global)
        assert loss.item() == pytest.approx(value, rel=1e-5)
    x, along = waves(1, 50, 1), torch.ones(1, 1)
    for scale, shift, value in ((1, 0, 0.7170601487159729), (0.1, 0, 19.537813186645508),
                                (2, 1, 27.326318740844727)):
        loss = sigreg_loss(scale * x + shift, along)
        assert loss.item() == pytest.approx(value, rel=1e-5)
    assert sigreg_loss(x, along, 5, 33).item() == pytest.approx(0.7479865550994873, rel=1e-5)


def test_sigreg_is_small_for_a_gaussian_only():
    directions = random_directions(16, 0, 0)
    gaussian = normal(2, 400, 16)
    stretched = gaussian * torch.linspace(0.1, 2, 16)
    flat = torch.cat([gaussian[..., :8], torch.zeros(2, 400, 8)], dim=-1)
    assert sigreg_loss(gaussian, directions) < 1.5  # 1.05 on average
    for other in (stretched, flat, gaussian + 1, 0 * gaussian, gaussian.sign()[..., :1].repeat(
            1, 1, 16)):
        assert sigreg_loss(other, directions) > 5


def test_directions_are_a_function_of_seed_and_iteration():
    first = random_directions(6, 3, 10)
    assert first.shape == (6, 256) and torch.equal(first, random_directions(6, 3, 10))
    torch.testing.assert_close(first.norm(dim=0), torch.ones(256))
    for other in (random_directions(6, 3, 11), random_directions(6, 4, 10)):
        assert not torch.allclose(first, other, atol=0.1)
    assert first.mean().abs() < 0.05  # no side of the sphere is preferred


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 0.8])
def test_diet_is_its_double_loop(smoothing):
    S, B, N = 3, 4, 7
    logits, index = normal(S, B, N), torch.tensor([6, 0, 2, 2])
    total = 0
    for s in range(S):
        for b in range(B):
            log_probs = logits[s, b].log_softmax(dim=-1)
            total = total - (1 - smoothing) * log_probs[index[b]]
            total = total - smoothing / N * log_probs.sum()
    torch.testing.assert_close(diet_loss(logits, index, smoothing), total / (S * B))
    uniform = diet_loss(torch.zeros(S, B, N), index, smoothing)
    assert uniform.item() == pytest.approx(math.log(N))


def test_cls_anchor_is_one_minus_the_mean_cosine():
    student = torch.tensor([[3.0, 0], [0, 2], [1, 1]])
    start = torch.tensor([[1.0, 0], [2, 0], [-5, -5]])
    assert cls_anchor_loss(student, start).item() == pytest.approx(1 - (1 + 0 - 1) / 3)


# ---- heads and their outputs ----

def test_heads_see_the_cls_of_all_crops():
    config = config_of("--lejepa_loss_weight=1", "--diet_loss_weight=1", "--lejepa_out_dim=5", OFF)
    torch.manual_seed(0)
    student = Student(build_backbone("dinov2", False, 3, **TINY), **build_heads(16, config, 9))
    global_crops, local_crops = normal(4, 3, 32, 32), normal(6, 3, 16, 16)
    out = student(global_crops, local_crops, plain_crops=global_crops[:2])
    assert "global_logits" not in out and student.dino_head is None
    cls = torch.cat([out["global_cls"], out["local_cls"]])
    assert torch.equal(out["embeddings"], student.lejepa_head(cls))
    torch.testing.assert_close(out["image_logits"], cls @ student.diet_head.weight.T)
    assert out["embeddings"].shape == (10, 5) and out["image_logits"].shape == (10, 9)
    torch.testing.assert_close(out["plain_cls"], out["global_cls"][:2])


def test_the_columns_of_a_batch_are_its_images():
    """Every crop of an image has its class: a classifier that knows the images has no loss."""
    config = config_of(OFF, "--diet_loss_weight=1", "--diet_label_smoothing=0")
    index = torch.tensor([3, 1])
    logits = 50 * F.one_hot(index.repeat(5), 4).float()  # V = 2, L = 3
    targets = dict(index=index)
    total, terms = dino.compute_losses(dict(image_logits=logits), targets, None, None, config)
    assert list(terms) == ["diet_loss"] and total < 1e-6
    wrong = dict(image_logits=logits.roll(1, 0))
    assert dino.compute_losses(wrong, targets, None, None, config)[0] > 10


# ---- runs ----

@pytest.fixture
def forwards(monkeypatch):
    """Counts of what the steps of a run compute: teacher forwards, and gradients of the losses."""
    counts, forward = dict(teacher=0, student=0), Student.forward

    def watched(self, *args, **kwargs):
        counts["student" if torch.is_grad_enabled() else "teacher"] += 1
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(Student, "forward", watched)
    return counts


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_resumes_bit_for_bit(tmp_path, npz, forwards, capsys, objective):
    """The terms add up, no teacher runs where none is needed, and its average is exported."""
    extra = [f"--dataset_path={npz}", *COMMON, *OBJECTIVES[objective]]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    records = [record for record in run(whole, *extra) if "loss" in record]
    said = capsys.readouterr().out
    has_teacher = objective == "all"
    assert forwards == dict(teacher=4 if has_teacher else 0, student=4)
    weights = dino.loss_weights(config_of(*SHRUNK, *extra))
    for record in records:
        total = sum(weight * record[name] for name, weight in weights.items())
        assert record["loss"] == pytest.approx(total, rel=1e-5)
        assert {name for name in record if name.endswith("_loss")} == set(weights)
        assert ("teacher_entropy" in record) == has_teacher and record["rankme"] > 1
    for words in ("Local DINO:", "iBOT:", "entropy "):
        assert (words in said) == has_teacher
    for name, words in (("diet_loss", "DIET: "), ("sigreg_loss", "SIGReg: "),
                        ("cls_anchor_loss", "CLS anchor: ")):
        assert (f" {words}{records[0].get(name, 0):.4f}" in said) == (name in weights)
    heads = {name.split(".")[0] for name in state(whole)["student"]} - {"backbone"}
    expected = {"lejepa": "lejepa_head", "diet": "diet_head", "anchored": "diet_head"}
    assert heads == {expected.get(objective)} or has_teacher
    resumed = run(parts, *extra, f"--resume_from={whole}/checkpoints/0000002")
    a, b = state(whole), state(parts)
    for key in ("student", "ema", "anchor", "start", "optimizer", "iteration"):
        assert_same(a[key], b[key])
    assert [r["loss"] for r in records] == [r["loss"] for r in resumed if "loss" in r]
    exported = build_backbone(f"{whole}/checkpoints/last/hf")
    norm = "backbone.layernorm.weight"
    assert torch.equal(exported.layernorm.weight, a["ema"][norm])
    assert not torch.equal(a["ema"][norm], a["student"][norm])


@pytest.mark.parametrize("config", ["adapt.py", "diet.py", "lejepa.py", "minute.py"])
def test_the_recipes_run(tmp_path, npz, config):
    """The loss falls. DIET's starts at that of a uniform prediction, ln 40."""
    records = run(str(tmp_path / "run"), f"--dataset_path={npz}", *COMMON, "--drop_path_rate=0",
                  "--max_iterations=24", "--lr=1e-3", "--head_lr_mult=10", "--horizontal_flip=0",
                  "--vertical_flip=0", "--diet_label_smoothing=0", configs=[config])
    values = [record["loss"] for record in records if "loss" in record]
    assert len(values) == 24 and np.mean(values[-3:]) < np.mean(values[:3])
    if config != "lejepa.py":
        assert values[0] == pytest.approx(np.log(40), rel=0.01)


def test_the_cls_anchor_is_the_start_on_plain_crops(tmp_path, npz, monkeypatch):
    """0 while nothing has moved; the crops are the first global ones, without colours; the start
    is kept apart from the teacher, and is the Gram anchor where that is the start, too."""
    plain, seen, losses = dino.augment_batch, [], []
    anchor_loss = dino.cls_anchor_loss

    def watched(batch, photometrics, config, device):
        crops = plain(batch, photometrics, config, device)
        seen.append((crops["plain"], photometrics.plain(batch["global_crops"])))
        return crops

    def watched_loss(student, start):
        losses.append((student.detach(), start))
        return anchor_loss(student, start)
    monkeypatch.setattr(dino, "augment_batch", watched)
    monkeypatch.setattr(dino, "cls_anchor_loss", watched_loss)
    out = str(tmp_path / "run")
    flags = [f"--dataset_path={npz}", *COMMON, "--drop_path_rate=0", "--cls_anchor_loss_weight=1"]
    records = run(out, *flags)
    values = [record["cls_anchor_loss"] for record in records if "loss" in record]
    assert abs(values[0]) < 1e-6 and min(values[1:]) > 1e-5
    crops, expected = seen[-1]
    assert torch.equal(crops, expected[:8])
    saved = state(out)
    assert saved["anchor"] is None and all(name.startswith("backbone.") for name in saved["start"])
    network = build_backbone("dinov2", False, 1, hidden_size=32, num_hidden_layers=2,
                             num_attention_heads=2, patch_size=8, image_size=32).eval()
    values = {**saved["student"], **saved["start"]}
    network.load_state_dict({name.removeprefix("backbone."): value for name, value in
                             values.items() if name.startswith("backbone.")})
    with torch.no_grad():
        cls, _ = forward_features(network, crops)
    torch.testing.assert_close(losses[-1][1], cls, rtol=1e-4, atol=1e-5)
    both = str(tmp_path / "both")
    run(both, *flags, "--gram_loss_weight=1", "--gram_teacher=start", "--max_iterations=2")
    assert_same(state(both)["start"], state(both)["anchor"])
    assert_same(state(both)["start"], saved["start"])
    with pytest.raises(UserError, match="cls_anchor_loss_weight=1.0, but the checkpoint does not"):
        run(str(tmp_path / "off"), *flags, "--cls_anchor_loss_weight=0", "--max_iterations=2")
        run(str(tmp_path / "off"), *flags, f"--resume_from={tmp_path}/off")


@pytest.mark.parametrize("distribution", ["fsdp"])
def test_two_processes_equal_one(tmp_path, npz, distribution):
    """SIGReg sees the images of all ranks; so the terms are those of one process."""
    extra = [f"--dataset_path={npz}", *COMMON, "--drop_path_rate=0", OFF, "--diet_loss_weight=1",
             "--lejepa_loss_weight=1", "--lejepa_sigreg_weight=0.5", "--cls_anchor_loss_weight=1",
             f"--distribution={distribution}"]
    alone = [r for r in run(str(tmp_path / "one"), *extra) if "loss" in r]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "train.py", *SHRUNK, *extra, f"--out_dir={tmp_path}/two",
               f"--cache_dir={tmp_path}/cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    two = [r for r in log(str(tmp_path / "two")) if "loss" in r]
    names = [name for name in alone[0] if name.endswith("_loss")]
    assert len(names) == 4
    for name in (*names, "grad_norm"):
        for a, b in zip(alone, two, strict=True):
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), name


# ---- what depends on it ----

def test_health_without_prototypes():
    assert monitor(torch.eye(8)) == dict(rankme=pytest.approx(8, rel=1e-3))
    assert diagnose(dict(rankme=9.0, diet_loss=3.0), 64, early=False) == ""
    assert "COLLAPSED" in diagnose(dict(rankme=1.2, diet_loss=3.0), 64, early=False)


def test_keys_of_prototypes_have_no_effect_without_them():
    config = config_of(OFF, "--diet_loss_weight=1")
    assert not uses_prototypes(config) and uses_prototypes(config_of())
    for key in ("teacher_temp", "dino_head_out_dim", "head_hidden_dim", "centering"):
        assert unused(config, key) == "no loss uses prototypes"
        assert unused(config_of(), key) == ""
    assert unused(config_of(OFF, "--lejepa_loss_weight=1"), "head_hidden_dim") == ""
    assert unused(config, "local_crops_number") == ""
    only_koleo = config_of(OFF, "--koleo_loss_weight=1")
    assert unused(only_koleo, "local_crops_number") == "no loss uses local crops"
    check = Checks(config_of(OFF, "--diet_loss_weight=1", "--centering=sinkhorn_knopp"))
    check.training(1, (), ("centering",))
    assert "centering='sinkhorn_knopp' has no effect: no loss uses prototypes" in check.report()
    with pytest.raises(UserError, match="the weights of all losses are 0"):
        run("nowhere", OFF)


def test_memory_counts_the_heads_that_are_built():
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=8)
    network = build_backbone("dinov2", False, 3, image_size=32, **sizes).config
    flags = [f"--{key}={value}" for key, value in sizes.items()]
    none = config_of(*flags, OFF, "--koleo_loss_weight=1")
    before = step_bytes(none, network, 3, 8, n_images=5000)
    for weight in ("lejepa_loss_weight", "diet_loss_weight"):
        config = config_of(*flags, OFF, f"--{weight}=1")
        [head] = build_heads(64, config, 5000).values()
        size = sum(param.numel() for param in head.parameters())
        held, step = step_bytes(config, network, 3, 8, n_images=5000)
        assert held - before[0] == pytest.approx(20 * size, rel=0.02)
        assert step > before[1]
