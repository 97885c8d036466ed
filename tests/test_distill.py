"""distill.py as a user runs it, shrunk: objectives, strategies, teachers that differ in everything,
one process against two, resumed against uninterrupted, the cache, and what it says when something
is wrong."""
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from networks import find_networks
from configurator import UserError, override
from distributed import compute_dtype
from model import FAMILIES, EMATeacher, build_backbone, forward_features
from teachers import FeatureCache
from tests_support import ROOT, TINY, ema_backbone, load_script, log, state

CONFIGS = sorted(file for file in os.listdir(os.path.join(ROOT, "config"))
                 if file.startswith("distill"))
SHRUNK = [  # distill.py in a second or two
    "--use_pretrained=false", "--model_type=vit", "--hidden_size=32", "--num_hidden_layers=2",
    "--num_attention_heads=2", "--patch_size=8", "--num_register_tokens=2",
    "--global_crops_size=32", "--local_crops_size=16", "--dino_head_out_dim=16",
    "--head_hidden_dim=32", "--head_bottleneck_dim=16", "--global_batch_size=8",
    "--max_iterations=3", "--warmup_iterations=1", "--log_interval=1", "--eval_interval=2",
    "--saveckp_freq=2", "--num_workers=0", "--mixed_precision=no", "--lr=1e-3", "--device=cpu",
    "--distilled_crops_size=48", "--distilled_statistics_views=40"]
SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8,
             image_size=32)  # of SHRUNK
VIEWS = ["--global_crops_number=2", "--local_crops_number=2"]
BOTH = ["--objective=both", *VIEWS]
TERMS = ("feature_cls_loss", "feature_patch_loss", "dino_global_loss", "dino_local_loss")


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """{family: directory} of tiny random teachers: RGB, width 16, patches of 12 pixels. The
    student's have 8."""
    folders = {}
    for family in FAMILIES:
        torch.manual_seed(1)
        sizes = dict(TINY, patch_size=12, image_size=48)
        network = build_backbone(family, False, 3, **sizes)
        folders[family] = str(tmp_path_factory.mktemp("teacher") / family)
        network.save_pretrained(folders[family])
    return folders


def run(out, npz, teacher, *argv, configs=(), module=None):
    """Run distill.py in this process with the shrunk config; returns the lines of log.jsonl."""
    module = module or load_script("distill")
    files = [os.path.join(ROOT, "config", file) for file in configs]
    argv = [*files, *SHRUNK, f"--dataset_path={npz}", f"--distilled_model_type={teacher}",
            f"--out_dir={out}", f"--cache_dir={out}-cache", *argv]
    module.main(override(vars(module), module.config_keys, argv))
    return log(out)


def losses(records):
    """The losses of the logged iterations, float64 [n,5]: the total, then TERMS."""
    names = ("loss", *TERMS)
    rows = [[record[name] for name in names] for record in records if "loss" in record]
    return torch.tensor(rows, dtype=torch.float64)


def check_losses(records, config):
    """The total is the weighted sum of the terms. The first feature losses are those of random
    directions, 1 with cosine; the first prototype losses are those of a uniform prediction."""
    table = losses(records)
    assert torch.isfinite(table).all()
    weights = [config.feature_cls_weight, config.feature_patch_weight,
               config.prototype_loss_weight, config.prototype_loss_weight]
    total = table[:, 1:] @ torch.tensor(weights, dtype=torch.float64)
    assert torch.allclose(table[:, 0], total, rtol=1e-5)
    first = dict(zip(TERMS, table[0, 1:].tolist()))
    if config.objective != "prototype":
        assert first["feature_cls_loss"] == pytest.approx(1, abs=0.2)
        assert first["feature_patch_loss"] == pytest.approx(1, abs=0.2)
    if config.objective != "feature":
        V, L = config.global_crops_number, config.local_crops_number
        pairs = dict(dino_global_loss=V * (V - 1), dino_local_loss=V * L)
        uniform = math.log(config.dino_head_out_dim)
        for name, n in pairs.items():
            share = n / sum(pairs.values())
            assert first[name] == pytest.approx(share * uniform, rel=0.05)


# ---- objectives, families, strategies ----

@pytest.mark.parametrize("objective, kind, on", [
    ("feature", "cosine", (True, True, False, False)),
    ("feature", "smooth_l1", (True, True, False, False)),
    ("prototype", "cosine", (False, False, True, True)),
    ("both", "cosine", (True, True, True, True))])
def test_every_objective(tmp_path, npz, teachers, objective, kind, on):
    """With logits of unit vectors of many dimensions, which are nearly orthogonal, the first
    predictions are uniform."""
    out, module = str(tmp_path / "run"), load_script("distill")
    extra = [f"--objective={objective}", f"--feature_loss_kind={kind}",
             "--feature_patch_weight=0.5", "--prototype_loss_weight=2"]
    if objective != "feature":
        extra += [*VIEWS, "--head_bottleneck_dim=2048"]
    records = run(out, npz, teachers["dinov2"], *extra, module=module)
    table = losses(records)
    assert len(table) == 3 and torch.isfinite(table).all()
    total = table[:, 1:] @ torch.tensor([1, 0.5, 2, 2], dtype=torch.float64)
    assert torch.allclose(table[:, 0], total, rtol=1e-5)
    assert ((table[:, 1:] > 0) == torch.tensor(on)).all()
    if kind == "cosine":
        check_losses(records, module)
    if objective != "feature":  # 2 global and 4 local pairs
        share = table[0, 4] / (table[0, 3] + table[0, 4])
        assert abs(share - 2 / 3) < 0.05
    # the export is the EMA, exactly
    exported = AutoModel.from_pretrained(f"{out}/checkpoints/best/hf").eval()
    network = build_backbone("vit", False, 1, **SHAPE).eval()
    network.load_state_dict(ema_backbone(state(out, "best")))
    pixels = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cls, _ = forward_features(network, pixels)
        assert torch.equal(forward_features(exported, pixels)[0], cls)


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_and_student_of_different_kinds(tmp_path, npz, teachers, family):
    """Width 16 against 32, patch 12 against 8, 48 pixels against 32, RGB against grey. And the
    teacher never changes."""
    module, built, weights = load_script("distill"), [], {}
    build_teacher = module.build_teacher

    def keep(*args, **kwargs):
        teacher = build_teacher(*args, **kwargs)
        built.append(teacher)
        weights.update({name: value.clone() for name, value in teacher.state_dict().items()})
        return teacher
    module.build_teacher = keep
    student = FAMILIES[FAMILIES.index(family) - 1]
    records = run(str(tmp_path / "run"), npz, teachers[family], f"--model_type={student}",
                  "--mixed_precision=bf16", module=module)
    check_losses(records, module)
    [teacher] = built
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, weights[name])
    half = compute_dtype(torch.device("cpu"), "bf16")  # fp32 on a CPU without bf16
    assert {value.dtype for value in teacher.network.parameters()} == {half}
    exported = AutoModel.from_pretrained(f"{tmp_path}/run/checkpoints/best/hf")
    assert exported.config.num_channels == 1


def test_a_timm_teacher(tmp_path, npz):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    weights, module = str(tmp_path / "w.pt"), load_script("distill")
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save(network.state_dict(), weights)
    records = run(str(tmp_path / "run"), npz, "timm:vit_tiny_patch16_224",
                  f"--distilled_model_weights={weights}", "--load_from_disk=true", module=module)
    check_losses(records, module)


@pytest.mark.parametrize("strategy", [["--use_lora=true"], ["--freeze_backbone_layers=1"], []])
def test_pretrained_students(tmp_path, npz, teachers, strategy):
    source = build_backbone("dinov2", False, 3, **SHAPE)
    source.save_pretrained(tmp_path / "weights")
    out = str(tmp_path / "run")
    run(out, npz, teachers["vit"], *BOTH, "--use_pretrained=true",
        f"--model_type={tmp_path}/weights", "--max_iterations=4",
        "--freeze_backbone_iterations=2", *strategy)
    after, waiting = state(out)["student"], state(out, "0000002")["student"]
    with_lora = "--use_lora=true" in strategy
    prefix = "backbone.base_model.model." if with_lora else "backbone."
    moved = []
    for i, layer in enumerate(source.encoder.layer):
        name = f"{prefix}encoder.layer.{i}.mlp.fc1.weight"
        moved.append(not torch.equal(after[name], layer.mlp.fc1.weight))
    assert moved == [not strategy, not with_lora]
    # the projectors and the head learn first
    last = source.encoder.layer[1].mlp.fc1.weight
    assert torch.equal(waiting[f"{prefix}encoder.layer.1.mlp.fc1.weight"], last)
    for name in ("projectors.cls.weight", "dino_head.mlp.0.weight"):
        assert not torch.equal(waiting[name], after[name])
    for name in after:
        if "lora_" in name or "base_layer" in name:
            assert torch.equal(waiting[name], after[name]) == (".lora_" not in name)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_file_runs(tmp_path, npz, teachers, config):
    module = load_script("distill")
    records = run(str(tmp_path / "run"), npz, teachers["dinov2"], configs=[config], module=module)
    assert len(losses(records)) == 3
    check_losses(records, module)


def test_a_student_learns_what_the_teacher_says(tmp_path, npz, teachers):
    """40 slices that hardly vary. The feature losses fall far below that of zeros, the prototype
    loss below that of a uniform prediction."""
    records = run(
        str(tmp_path / "run"), npz, teachers["dinov2"], "--objective=both",
        "--global_crops_number=2", "--local_crops_number=0", "--max_iterations=60", "--lr=3e-3",
        "--warmup_iterations=5", "--global_crops_scale=0.9,1", "--blur_probability=0,0,0",
        "--eval_interval=0", "--log_interval=20", "--global_batch_size=20",
        "--weight_decay_end=0.04", "--momentum_teacher=0.9", "--teacher_temp=0.03",
        "--horizontal_flip=0", "--vertical_flip=0")
    assert records[-1]["feature_cls_loss"] < 0.6
    assert records[-1]["feature_patch_loss"] < 0.8
    assert records[-1]["dino_global_loss"] < 0.93 * np.log(16)


# ---- one process against two, resumed against uninterrupted, cached against computed ----

@pytest.mark.parametrize("distribution", ["ddp", "fsdp"])
def test_two_processes_equal_one(tmp_path, npz, teachers, distribution):
    extra = [*BOTH, "--max_iterations=4",
             "--centering=sinkhorn_knopp", f"--distribution={distribution}"]
    teacher = teachers["dinov3_vit"]
    alone = losses(run(str(tmp_path / "one"), npz, teacher, *extra))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "distill.py", *SHRUNK, *extra, f"--dataset_path={npz}",
               f"--distilled_model_type={teacher}", f"--out_dir={tmp_path}/two",
               f"--cache_dir={tmp_path}/cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    difference = (alone - losses(log(str(tmp_path / "two")))).abs()
    assert (difference <= 1e-5 * alone.abs()).all(), difference.max()
    # FSDP gathers the last block for its attention; a rounding error may change a shade
    for name in ("0000000-attention.png", "0000004-attention.png"):
        shades = [np.asarray(Image.open(tmp_path / part / "samples" / name)).astype(int)
                  for part in ("one", "two")]
        assert np.abs(shades[0] - shades[1]).max() <= 3, name
    a, b = state(str(tmp_path / "one"))["ema"], state(str(tmp_path / "two"))["ema"]
    for name in a:  # the exported EMA
        assert torch.allclose(a[name], b[name], atol=1e-5), name


def test_resumed_equals_uninterrupted_bitwise(tmp_path, npz, teachers, monkeypatch):
    extra = [*BOTH, "--max_iterations=6", "--num_workers=1", "--mixed_precision=bf16",
             "--model_type=dinov2", "--drop_path_rate=0.3", "--fixed_views=2"]
    whole = run(str(tmp_path / "whole"), npz, teachers["vit"], *extra,
                f"--teacher_cache={tmp_path}/cache1")
    extra += [f"--teacher_cache={tmp_path}/cache2"]
    out, update, calls = str(tmp_path / "parts"), EMATeacher.update, []

    def stop_after_three(ema, *args):  # by a signal
        update(ema, *args)
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(EMATeacher, "update", stop_after_three)
        run(out, npz, teachers["vit"], *extra)
    assert state(out)["iteration"] == 3
    parts = run(out, npz, teachers["vit"], *extra, f"--resume_from={out}")
    a, b = state(str(tmp_path / "whole")), state(out)
    for key in ("student", "ema", "statistics"):
        assert a[key].keys() == b[key].keys()
        for name in a[key]:
            assert torch.equal(a[key][name], b[key][name]), (key, name)
    assert torch.equal(losses(whole), losses(parts))
    first_line = open(f"{out}/config.py").readline()
    assert first_line == f"# resolved config; runs as: python distill.py {out}/config.py\n"


def test_resume_refuses_another_teacher(tmp_path, npz, teachers):
    run(str(tmp_path / "run"), npz, teachers["vit"])
    message = "distilled_model_type is '.*vit' there, '.*dinov2' now; what the student learnt"
    with pytest.raises(UserError, match=message):
        run(str(tmp_path / "run"), npz, teachers["dinov2"], f"--resume_from={tmp_path}/run",
            "--max_iterations=4")


def test_cached_equals_computed(tmp_path, npz, teachers, monkeypatch):
    """fp32 features lose bits in the cache's fp16, so they are equal to three digits. From a full
    cache the run repeats to the bit."""
    extra = ["--fixed_views=2", "--max_iterations=12", "--eval_interval=0", "--log_interval=1"]
    with_cache = [*extra, f"--teacher_cache={tmp_path}/cache"]
    teacher, read = teachers["dinov2"], FeatureCache.__call__
    computed = losses(run(str(tmp_path / "computed"), npz, teacher, *extra))
    filled = losses(run(str(tmp_path / "filled"), npz, teacher, *with_cache))

    def only_read(cache, rows, compute, device):  # compute=None: it may not ask the teacher again
        return read(cache, rows, None, device)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "__call__", only_read)
        cached = losses(run(str(tmp_path / "cached"), npz, teacher, *with_cache))
    assert torch.allclose(computed, filled, rtol=2e-3) and torch.equal(filled, cached)
    with pytest.raises(UserError, match="holds features of another run: seed differ"):
        run(str(tmp_path / "other"), npz, teacher, *with_cache, "--seed=1")


# ---- evaluation: Table 12 ----

def evaluate(*argv):
    """Run evaluate.py in this process; returns the networks of its JSON."""
    module = load_script("evaluate")
    argv = ["--bootstrap=0", "--generate_pictures=false", "--num_workers=0", "--device=cpu", *argv]
    module.main(override(vars(module), module.config_keys, argv))
    with open(f"{module.out_dir}/results/phantom40.json") as file:
        return json.load(file)["networks"]


def test_evaluate_puts_teacher_untaught_and_distilled_side_by_side(tmp_path, npz, teachers):
    run(str(tmp_path / "distilled"), npz, teachers["dinov2"])
    train = load_script("train")
    shared = [flag for flag in SHRUNK if flag[2:].split("=")[0] in train.config_keys]
    argv = [*shared, "--local_crops_number=0", f"--dataset_path={npz}",
            f"--out_dir={tmp_path}/untaught"]
    train.main(override(vars(train), train.config_keys, argv))
    networks = evaluate(
        f"--compare={teachers['dinov2']},{tmp_path}/untaught,{tmp_path}/distilled",
        "--image_size=48", f"--out_dir={tmp_path}/table", f"--cache_dir={tmp_path}/cache")
    assert [(network["model"], network["adaptation"]) for network in networks] == [
        ("raw pixels", "-"), ("dinov2", "pretrained"), ("vit", "untrained"),
        ("vit", "from scratch: DINO"), ("vit", "untrained"),
        ("vit", "from scratch, distilled from dinov2: feature")]
    # both started from the weights that seed 0 draws
    knn = [network["results"]["test"]["knn"] for network in networks]
    assert knn[2] == knn[4]


def test_evaluate_takes_a_timm_teacher(tmp_path, npz, monkeypatch):
    timm = pytest.importorskip("timm")
    create_model, name = timm.create_model, "timm:vit_tiny_patch16_224"

    def without_weights(name, pretrained, **keys):
        return create_model(name, pretrained=False, **keys)
    monkeypatch.setattr(timm, "create_model", without_weights)
    [found] = find_networks([name], "last")
    assert found["weights_path"] == name and found["adaptation"] == "pretrained"
    networks = evaluate(f"--model_type={name}", f"--dataset_path={npz}", "--image_size=224",
                        f"--out_dir={tmp_path}/table")
    assert networks[1]["results"]["test"]["knn"]["accuracy"] > 0


# ---- what it says when something is wrong ----

@pytest.mark.parametrize("argv, message", [
    (["--global_crops_size=36"],
     r"global_crops_size=36 is not a multiple of patch_size=8 of vit; use 32 or 40"),
    (["--distilled_crops_size=40"],
     r"distilled_crops_size=40 is not a multiple of patch_size=12"),
    (["--objective=cls"], r"objective='cls': choose one of feature, prototype, both"),
    (["--local_crops_number=2"],
     r"local_crops_number=2 with objective='feature': the teacher does not see them"),
    (["--objective=both", "--global_crops_number=2", "--prototype_loss_weight=0"],
     r"prototype_loss_weight=0: the head would not learn"),
    (["--objective=prototype", "--global_crops_number=1"],
     r"the student learns from another view; use two at least"),
    (["--teacher_cache=somewhere"],
     r"teacher_cache='somewhere' with fixed_views=0: .* set fixed_views"),
    (["--objective=prototype", "--dino_head_out_dim=999"],
     r"dino_head_out_dim=999 prototypes cannot be found among \d+ teacher features"),
    (["--distilled_model_weights=no.pt"], r"distilled_model_weights='no.pt': no such file"),
    (["--distilled_model_type=./nowhere"], r"model_type='./nowhere': no such directory"),
    (["--gradient_accumulation_steps=3"],
     r"gradient_accumulation_steps=3 does not divide the 8 images of a rank"),
])
def test_bad_input_is_one_clear_error(tmp_path, npz, teachers, argv, message):
    with pytest.raises(UserError, match=message):
        run(str(tmp_path / "run"), npz, teachers["dinov2"], *argv)
    assert not os.path.exists(tmp_path / "run")


def test_non_finite_loss_touches_nothing(tmp_path, npz, teachers):
    module, calls = load_script("distill"), []
    compute_losses = module.compute_losses

    def poisoned(*args):
        total, terms = compute_losses(*args)
        calls.append(1)
        if len(calls) == 3:
            total = total * float("nan")
        return total, terms
    module.compute_losses = poisoned
    message = (r"loss is nan at iteration 2 \(.*feature_cls_loss .*\), lr .*Its images: "
               r"\[\d+, ")
    with pytest.raises(UserError, match=message):
        run(str(tmp_path / "run"), npz, teachers["dinov2"], "--max_iterations=6", module=module)
    saved = state(str(tmp_path / "run"))
    assert saved["iteration"] == 2
    assert all(torch.isfinite(value).all() for value in saved["ema"].values())
