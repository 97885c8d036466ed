"""distill.py as a user runs it, shrunk: objectives, strategies, teachers that differ in everything, one process against two,
resumed against uninterrupted, the cache, and what it says when something is wrong."""
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModel

import evaluate
from conftest import TINY
from configurator import UserError, override
from model import FAMILIES, build_backbone, forward_features
from phantom import make_phantom
from tests_support import ROOT, load_script

CONFIGS = sorted(file for file in os.listdir(os.path.join(ROOT, "config")) if file.startswith("distill"))
SHRUNK = ["--use_pretrained=false", "--model_type=vit", "--hidden_size=32", "--num_hidden_layers=2", "--num_attention_heads=2", "--patch_size=8",
          "--num_register_tokens=2", "--global_crops_size=32", "--local_crops_size=16", "--dino_head_out_dim=16", "--head_hidden_dim=32",
          "--head_bottleneck_dim=16", "--global_batch_size=8", "--max_iterations=3", "--warmup_iterations=1", "--log_interval=1", "--eval_interval=2",
          "--saveckp_freq=2", "--num_workers=0", "--mixed_precision=no", "--lr=1e-3", "--device=cpu", "--distilled_crops_size=48",
          "--distilled_statistics_views=40"]
BOTH = ["--objective=both", "--global_crops_number=2", "--local_crops_number=2"]
TERMS = ("feature_cls_loss", "feature_patch_loss", "dino_global_loss", "dino_local_loss")


@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    """A small phantom as a user's .npz: int16 HU, one channel, labels, three splits."""
    arrays = {}
    for split, n, seed in (("train", 40, 0), ("val", 12, 1), ("test", 12, 2)):
        arrays.update({f"{split}_{key}": value for key, value in make_phantom(n, 40, seed).items() if key != "masks"})
    path = str(tmp_path_factory.mktemp("data") / "phantom40.npz")
    np.savez_compressed(path, **arrays)
    return path


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """{family: directory} of tiny random teachers: RGB, width 16, patches of 12 pixels where the student has 8."""
    folders = {}
    for family in FAMILIES:
        torch.manual_seed(1)
        network = build_backbone(family, False, 3, **{**TINY, "patch_size": 12, "image_size": 48})
        folders[family] = str(tmp_path_factory.mktemp("teacher") / family)
        network.save_pretrained(folders[family])
    return folders


def run(out, npz, teacher, *argv, configs=(), module=None):
    """Run distill.py in this process with the shrunk config; returns the lines of log.jsonl."""
    module = module or load_script("distill")
    files = [os.path.join(ROOT, "config", file) for file in configs]
    module.main(override(vars(module), module.config_keys, [
        *files, *SHRUNK, f"--dataset_path={npz}", f"--distilled_model_type={teacher}", f"--out_dir={out}", f"--cache_dir={out}-cache", *argv]))
    return log(out)


def log(out):
    return [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]


def losses(records):
    return torch.tensor([[record[name] for name in ("loss", *TERMS)] for record in records if "loss" in record], dtype=torch.float64)


def state(out, name="last"):
    return torch.load(os.path.join(out, "checkpoints", name, "state.pt"), weights_only=True)


# ---- objectives, families, strategies ----

@pytest.mark.parametrize("objective, kind", [("feature", "cosine"), ("feature", "smooth_l1"), ("prototype", "cosine"), ("both", "cosine")])
def test_every_objective(tmp_path, npz, teachers, objective, kind):
    out = str(tmp_path / "run")
    extra = ["--objective=" + objective, "--feature_loss_kind=" + kind, "--feature_patch_weight=0.5", "--prototype_loss_weight=2"]
    records = run(out, npz, teachers["dinov2"], *extra, *(BOTH[1:] if objective != "feature" else []))
    table = losses(records)
    assert len(table) == 3 and torch.isfinite(table).all()
    assert torch.allclose(table[:, 0], table[:, 1:] @ torch.tensor([1, 0.5, 2, 2]).double(), rtol=1e-5)    # the logged terms, weighed
    on = {"feature": (True, True, False, False), "prototype": (False, False, True, True), "both": (True,) * 4}[objective]
    assert ((table[:, 1:] > 0) == torch.tensor(on)).all()
    if objective != "feature":                                 # 2 global and 4 local pairs
        assert abs(table[0, 4] / (table[0, 3] + table[0, 4]) - 2 / 3) < 0.05
    # the export is the EMA, exactly
    best, exported = state(out, "best"), AutoModel.from_pretrained(f"{out}/checkpoints/best/hf").eval()
    network = build_backbone("vit", False, 1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32).eval()
    network.load_state_dict({name[len("backbone."):]: value for name, value in {**best["student"], **best["teacher"]}.items() if name.startswith("backbone.")})
    pixels = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(forward_features(exported, pixels)[0], forward_features(network, pixels)[0])


@pytest.mark.parametrize("teacher", FAMILIES)
def test_teacher_and_student_of_different_kinds(tmp_path, npz, teachers, teacher):
    """Width 16 against 32, patch 12 against 8, 48 pixels against 32, RGB against grey; and the teacher never changes."""
    module, kept = load_script("distill"), []
    honest = module.build_teacher

    def keep(*args, **kwargs):
        kept.append(honest(*args, **kwargs))
        kept.append({name: value.clone() for name, value in kept[0].state_dict().items()})
        return kept[0]
    module.build_teacher = keep
    student = FAMILIES[FAMILIES.index(teacher) - 1]
    records = run(str(tmp_path / "run"), npz, teachers[teacher], f"--model_type={student}", "--mixed_precision=bf16", module=module)
    assert torch.isfinite(losses(records)).all()
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].state_dict().items())
    assert all(value.dtype == torch.bfloat16 for value in kept[0].network.parameters())
    assert AutoModel.from_pretrained(f"{tmp_path}/run/checkpoints/best/hf").config.num_channels == 1


def test_a_timm_teacher(tmp_path, npz, monkeypatch):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    weights = str(tmp_path / "w.pt")
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), weights)
    records = run(str(tmp_path / "run"), npz, "timm:vit_tiny_patch16_224", f"--distilled_model_weights={weights}", "--load_from_disk=true")
    assert torch.isfinite(losses(records)).all()


@pytest.mark.parametrize("strategy", [["--use_lora=true"], ["--freeze_backbone_layers=1"], []])
def test_pretrained_students(tmp_path, npz, teachers, strategy):
    source = build_backbone("dinov2", False, 3, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32)
    source.save_pretrained(tmp_path / "weights")
    run(str(tmp_path / "run"), npz, teachers["vit"], *BOTH, "--use_pretrained=true", f"--model_type={tmp_path}/weights", "--max_iterations=4",
        "--freeze_backbone_iterations=2", *strategy)
    after, waiting = state(str(tmp_path / "run"))["student"], state(str(tmp_path / "run"), "0000002")["student"]
    prefix = "backbone.base_model.model." if "--use_lora=true" in strategy else "backbone."
    moved = [not torch.equal(after[f"{prefix}encoder.layer.{block}.mlp.fc1.weight"], source.encoder.layer[block].mlp.fc1.weight) for block in (0, 1)]
    assert moved == [not strategy, "--use_lora=true" not in strategy]
    assert torch.equal(waiting[f"{prefix}encoder.layer.1.mlp.fc1.weight"], source.encoder.layer[1].mlp.fc1.weight)   # the projectors learn first
    assert not torch.equal(waiting["projectors.cls.weight"], after["projectors.cls.weight"])
    assert not torch.equal(waiting["dino_head.mlp.0.weight"], after["dino_head.mlp.0.weight"])
    assert all(torch.equal(waiting[name], after[name]) == (".lora_" not in name) for name in after if "lora_" in name or "base_layer" in name)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_file_runs(tmp_path, npz, teachers, config):
    assert torch.isfinite(losses(run(str(tmp_path / "run"), npz, teachers["dinov2"], configs=[config]))).all()


def test_a_student_learns_what_the_teacher_says(tmp_path, npz, teachers):
    """40 slices that hardly vary: both losses fall far below those of a student that knows nothing."""
    records = run(str(tmp_path / "run"), npz, teachers["dinov2"], "--objective=both", "--global_crops_number=2", "--local_crops_number=0",
                  "--max_iterations=60", "--lr=3e-3", "--warmup_iterations=5", "--global_crops_scale=0.9,1", "--blur_probability=0,0,0",
                  "--eval_interval=0", "--log_interval=20", "--global_batch_size=20", "--weight_decay_end=0.04", "--momentum_teacher=0.9", "--teacher_temp=0.03",
                  "--horizontal_flip=0", "--vertical_flip=0")
    assert records[-1]["feature_cls_loss"] < 0.6 and records[-1]["feature_patch_loss"] < 0.8
    assert records[-1]["dino_global_loss"] < 0.93 * np.log(16)


# ---- one process against two, resumed against uninterrupted, cached against computed ----

@pytest.mark.parametrize("distribution", ["ddp", "fsdp"])
def test_two_processes_equal_one(tmp_path, npz, teachers, distribution):
    extra = [*BOTH, "--max_iterations=4", "--generate_samples=false", "--centering=sinkhorn_knopp", f"--distribution={distribution}"]
    alone = losses(run(str(tmp_path / "one"), npz, teachers["dinov3_vit"], *extra))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "distill.py", *SHRUNK, *extra,
               f"--dataset_path={npz}", f"--distilled_model_type={teachers['dinov3_vit']}", f"--out_dir={tmp_path}/two", f"--cache_dir={tmp_path}/cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"), timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    two = losses(log(str(tmp_path / "two")))
    assert ((alone - two).abs() <= 1e-5 * alone.abs()).all(), (alone - two).abs().max()
    a, b = (state(str(tmp_path / name))["teacher"] for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a), "the exported EMA"


def test_resumed_equals_uninterrupted_bitwise(tmp_path, npz, teachers):
    extra = [*BOTH, "--max_iterations=6", "--num_workers=1", "--mixed_precision=bf16", "--model_type=dinov2", "--drop_path_rate=0.3", "--fixed_views=2"]
    whole = run(str(tmp_path / "whole"), npz, teachers["vit"], *extra, f"--teacher_cache={tmp_path}/cache1")
    module, calls = load_script("distill"), []                 # stopped after 3 of 6 by a signal
    update = module.EMATeacher.update
    module.EMATeacher.update = lambda self, *args: (update(self, *args), calls.append(1), len(calls) == 3 and os.kill(os.getpid(), signal.SIGTERM))
    try:
        run(str(tmp_path / "parts"), npz, teachers["vit"], *extra, f"--teacher_cache={tmp_path}/cache2", module=module)
    finally:
        module.EMATeacher.update = update
    assert state(str(tmp_path / "parts"))["iteration"] == 3
    parts = run(str(tmp_path / "parts"), npz, teachers["vit"], *extra, f"--teacher_cache={tmp_path}/cache2", f"--resume_from={tmp_path}/parts")
    a, b = state(str(tmp_path / "whole")), state(str(tmp_path / "parts"))
    for key in ("student", "teacher", "statistics"):
        assert a[key].keys() == b[key].keys() and all(torch.equal(a[key][name], b[key][name]) for name in a[key]), key
    assert torch.equal(losses(whole), losses(parts))
    assert open(f"{tmp_path}/parts/config.py").readline() == f"# resolved config; runs as: python distill.py {tmp_path}/parts/config.py\n"


def test_resume_refuses_another_teacher(tmp_path, npz, teachers):
    run(str(tmp_path / "run"), npz, teachers["vit"])
    with pytest.raises(UserError, match="distilled_model_type is '.*vit' there, '.*dinov2' now; what the student learnt"):
        run(str(tmp_path / "run"), npz, teachers["dinov2"], f"--resume_from={tmp_path}/run", "--max_iterations=4")


def test_cached_equals_computed(tmp_path, npz, teachers):
    """fp32 features lose bits in the cache's fp16, so equal to three digits; from a full cache the run repeats to the bit."""
    extra = ["--fixed_views=2", "--max_iterations=12", "--eval_interval=0", "--log_interval=1"]
    computed = losses(run(str(tmp_path / "computed"), npz, teachers["dinov2"], *extra))
    filled = losses(run(str(tmp_path / "filled"), npz, teachers["dinov2"], *extra, f"--teacher_cache={tmp_path}/cache"))
    module = load_script("distill")
    module.FeatureCache.__call__, honest = (lambda self, rows, compute, device: honest(self, rows, None, device)), module.FeatureCache.__call__
    try:                                                       # compute=None: the teacher may not be asked again
        cached = losses(run(str(tmp_path / "cached"), npz, teachers["dinov2"], *extra, f"--teacher_cache={tmp_path}/cache", module=module))
    finally:
        module.FeatureCache.__call__ = honest
    assert torch.allclose(computed, filled, rtol=2e-3) and torch.equal(filled, cached)
    with pytest.raises(UserError, match="holds features of another run: seed differ"):
        run(str(tmp_path / "other"), npz, teachers["dinov2"], *extra, f"--teacher_cache={tmp_path}/cache", "--seed=1")


# ---- evaluation: Table 12 ----

def test_evaluate_puts_teacher_untaught_and_distilled_side_by_side(tmp_path, npz, teachers, capsys):
    run(str(tmp_path / "distilled"), npz, teachers["dinov2"])
    train = load_script("train")
    shared = [flag for flag in SHRUNK if flag[2:].split("=")[0] in train.config_keys]
    train.main(override(vars(train), train.config_keys, [*shared, "--local_crops_number=0", f"--dataset_path={npz}", f"--out_dir={tmp_path}/untaught"]))
    module = load_script("evaluate")
    module.main(override(vars(module), module.config_keys, [
        f"--compare={teachers['dinov2']},{tmp_path}/untaught,{tmp_path}/distilled", "--bootstrap=0", "--generate_pictures=false", "--num_workers=0",
        "--image_size=48", f"--out_dir={tmp_path}/table", f"--cache_dir={tmp_path}/cache", "--device=cpu"]))
    networks = json.load(open(f"{tmp_path}/table/results/phantom40.json"))["networks"]
    rows = [(network["model"], network["adaptation"]) for network in networks]
    assert rows == [("raw pixels", "-"), ("dinov2", "pretrained"), ("vit", "untrained"), ("vit", "from scratch"), ("vit", "untrained"),
                    ("vit", "from scratch, distilled from dinov2 (feature)")]
    # both started from the weights that seed 0 draws
    assert networks[2]["results"]["test"]["knn"] == networks[4]["results"]["test"]["knn"]
    capsys.readouterr()


def test_evaluate_takes_a_timm_teacher(tmp_path, npz, monkeypatch):
    timm = pytest.importorskip("timm")
    honest = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **keys: honest(name, pretrained=False, **keys))
    networks = evaluate.find_networks(["timm:vit_tiny_patch16_224"], "last")
    assert networks[0]["loads"] == "timm:vit_tiny_patch16_224" and networks[0]["adaptation"] == "pretrained"
    module = load_script("evaluate")
    module.main(override(vars(module), module.config_keys, [
        "--model_type=timm:vit_tiny_patch16_224", f"--dataset_path={npz}", "--bootstrap=0", "--generate_pictures=false", "--num_workers=0",
        "--image_size=32", f"--out_dir={tmp_path}/table", "--device=cpu"]))
    assert json.load(open(f"{tmp_path}/table/results/phantom40.json"))["networks"][1]["results"]["test"]["knn"]["accuracy"] > 0


# ---- what it says when something is wrong ----

@pytest.mark.parametrize("argv, message", [
    (["--global_crops_size=36"], r"global_crops_size=36 is not a multiple of patch_size=8 of vit; use 32 or 40"),
    (["--distilled_crops_size=40"], r"distilled_crops_size=40 is not a multiple of patch_size=12"),
    (["--objective=cls"], r"objective='cls': choose one of feature, prototype, both"),
    (["--local_crops_number=2"], r"local_crops_number=2 with objective='feature': the teacher does not see them"),
    (["--objective=prototype", "--global_crops_number=1"], r"the student learns from another view; use two at least"),
    (["--teacher_cache=somewhere"], r"teacher_cache='somewhere' with fixed_views=0: .* set fixed_views"),
    (["--objective=prototype", "--dino_head_out_dim=999"], r"dino_head_out_dim=999 prototypes cannot be found among \d+ teacher features"),
    (["--distilled_model_weights=no.pt"], r"distilled_model_weights='no.pt': no such file"),
    (["--distilled_model_type=./nowhere"], r"model_type='./nowhere': no such directory"),
    (["--gradient_accumulation_steps=3"], r"gradient_accumulation_steps=3 does not divide the 8 images of a rank"),
])
def test_bad_input_is_one_clear_error(tmp_path, npz, teachers, argv, message):
    with pytest.raises(UserError, match=message):
        run(str(tmp_path / "run"), npz, teachers["dinov2"], *argv)
    assert not os.path.exists(tmp_path / "run")


def test_non_finite_loss_touches_nothing(tmp_path, npz, teachers):
    module, calls = load_script("distill"), []
    honest = module.compute_losses

    def poisoned(*args):
        total, terms = honest(*args)
        calls.append(1)
        return (total * float("nan"), terms) if len(calls) == 3 else (total, terms)
    module.compute_losses = poisoned
    with pytest.raises(UserError, match=r"loss is nan at iteration 2 \(.*feature_cls_loss .*\), lr .*Its images: \[\d+, "):
        run(str(tmp_path / "run"), npz, teachers["dinov2"], "--max_iterations=6", module=module)
    saved = state(str(tmp_path / "run"))
    assert saved["iteration"] == 2 and all(torch.isfinite(value).all() for value in saved["teacher"].values())
