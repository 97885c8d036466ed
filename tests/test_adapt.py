"""Adaptation: the forward written out, frozen prefixes shared by student and teacher, LoRA, Gram anchors, layers that
thaw; every strategy resumes bit for bit, and what is frozen stays as it was."""
import copy
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel

from model import (FAMILIES, EMATeacher, add_lora, blocks, build_backbone, core, embed, forward_features, freeze_layers,
                   frozen_blocks, run_blocks, set_trainable, shared_blocks)
from test_train import SHRUNK, assert_same, load_train, log, losses, npz, run, state  # noqa: F401
from tests_support import ROOT

every_family = pytest.mark.parametrize("family", FAMILIES)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the forward written out ----

@every_family
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("height, width", [(32, 32), (16, 16), (40, 24)])
@pytest.mark.parametrize("masked", [False, True])
def test_forward_is_that_of_transformers_bit_for_bit(tiny_backbone, family, attention, height, width, masked):
    backbone = tiny_backbone(family).eval()
    backbone.set_attn_implementation(attention)
    images, masks = normal(3, 3, height, width), None
    if masked:
        masks = normal(3, height * width // 64, seed=1) > 0.5
    extra = dict(interpolate_pos_encoding=True) if family == "vit" else {}
    with torch.no_grad():
        tokens = backbone(pixel_values=images, bool_masked_pos=masks, **extra).last_hidden_state
        cls, patches = forward_features(backbone, images, masks)
        adapted = forward_features(add_lora(copy.deepcopy(backbone), targets="all"), images, masks)
    assert torch.equal(cls, tokens[:, 0]) and torch.equal(patches, tokens[:, -patches.shape[1]:])
    assert torch.equal(adapted[0], cls) and torch.equal(adapted[1], patches)               # B starts at 0


@every_family
def test_training_mode_draws_what_transformers_draws(tiny_backbone, family):
    """Drop path and DINOv3's random positions come in the same order from the same stream; so do the gradients."""
    extra = {} if family == "vit" else dict(drop_path_rate=0.4)
    backbone = tiny_backbone(family, **extra, **(dict(pos_embed_rescale=2.0) if family == "dinov3_vit" else {})).train()
    images, found = normal(4, 3, 32, 32), []
    kwargs = dict(interpolate_pos_encoding=True) if family == "vit" else {}
    for forward in (lambda: backbone(pixel_values=images, **kwargs).last_hidden_state[:, 0],
                    lambda: forward_features(backbone, images)[0]):
        backbone.zero_grad()
        torch.manual_seed(1)
        cls = forward()
        cls.square().sum().backward()
        found.append([cls.detach()] + [param.grad for param in backbone.parameters() if param.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- frozen blocks and the shared prefix ----

@every_family
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_blocks_run_no_backward(tiny_backbone, family, lora, checkpointing):
    backbone = tiny_backbone(family)
    if lora:
        backbone = add_lora(backbone, targets="all", skip_blocks=1)
        assert not any("lora_" in name for name, _ in blocks(backbone)[0].named_parameters())
    freeze_layers(backbone, 1)
    if checkpointing:
        backbone.activation_checkpointing_enable({"use_reentrant": False})
    backbone.train()
    assert frozen_blocks(backbone) == 1
    tokens, rope = embed(backbone, normal(2, 3, 32, 32))
    hidden = run_blocks(backbone, tokens, rope, 0, 1)
    assert tokens.grad_fn is None and hidden.grad_fn is None and not hidden.requires_grad
    assert run_blocks(backbone, hidden, rope, 1).grad_fn is not None


def strategies(student, strategy):
    """Freeze one block, put adapters on the other where asked; settle who trains."""
    if strategy == "lora_freeze":
        student.backbone = add_lora(student.backbone, r=2, dropout=0.0, skip_blocks=1)
        torch.manual_seed(5)
        for name, param in student.named_parameters():
            if "lora_B" in name:
                param.data.normal_()
    freeze_layers(student.backbone, 1)
    if strategy == "waits":
        student.backbone.requires_grad_(False)
    return student.train()


def step_with(student, teacher, n_shared_blocks):
    student.zero_grad()
    torch.manual_seed(2)
    global_crops, local_crops = normal(4, 3, 32, 32), normal(4, 3, 16, 16, seed=1)
    with teacher.teacher_weights(student) as network:
        teacher_out = network(global_crops, n_shared_blocks=n_shared_blocks)
    out = student(global_crops, local_crops, prefix=teacher_out.get("prefix"))
    loss = (out["global_logits"] - teacher_out["global_logits"].flip(0)).square().sum() + out["local_logits"].square().sum()
    loss = loss + out["patches"].square().sum() + out["global_cls"].abs().sum()
    loss.backward()
    return [loss.detach()] + [param.grad.clone() for param in student.parameters() if param.grad is not None]


@every_family
@pytest.mark.parametrize("strategy, n_shared", [("freeze", 1), ("lora_freeze", 1), ("waits", 2)])
def test_shared_prefix_changes_nothing(tiny_student, family, strategy, n_shared):
    """Losses and gradients bit for bit, with drop path asked for: frozen blocks do without."""
    extra = {} if family == "vit" else dict(drop_path_rate=0.4)
    student = strategies(tiny_student(family, **extra), strategy)
    teacher = EMATeacher(student)
    for value in teacher.values.values():
        value.add_(0.1)
    assert shared_blocks(student, teacher) == n_shared
    ran = []
    for block in blocks(student.backbone):
        block.register_forward_hook(lambda *_: ran.append(1))
    plain = step_with(student, teacher, 0)
    n_plain = len(ran)
    shared = step_with(student, teacher, n_shared)
    assert n_plain - (len(ran) - n_plain) == n_shared          # so many block passes fewer
    assert len(plain) > 5 and all(torch.equal(a, b) for a, b in zip(plain, shared, strict=True))


def test_no_prefix_is_shared_where_it_would_not_be_exact(tiny_student):
    student = tiny_student("dinov3_vit").train()
    assert shared_blocks(student, EMATeacher(student)) == 0    # nothing is frozen
    freeze_layers(student.backbone, 1)
    assert shared_blocks(student, EMATeacher(student)) == 1
    student.backbone.config.pos_embed_rescale = 2.0            # the student sees random positions, the teacher does not
    assert shared_blocks(student, EMATeacher(student)) == 0
    student.backbone.config.pos_embed_rescale = None
    moved = EMATeacher(tiny_student("dinov3_vit"))             # it has values of its own for the frozen block
    assert shared_blocks(student, moved) == 0
    student = tiny_student("dinov2")
    student.backbone.embeddings.requires_grad_(False)          # the blocks learn: none is shared
    assert shared_blocks(student, EMATeacher(student)) == 0


def test_embeddings_that_learn_keep_every_block_in_the_backward(tiny_student):
    student = tiny_student("vit").train()
    student.backbone.requires_grad_(False)
    student.backbone.embeddings.patch_embeddings.requires_grad_(True)                      # inflated filters
    assert frozen_blocks(student.backbone) == 0


# ---- LoRA ----

@every_family
def test_adapters_on_everything(tiny_backbone, family):
    extra = dict(use_swiglu_ffn=True) if family.startswith("dinov2") else dict(use_gated_mlp=True) if family == "dinov3_vit" else {}
    for settings in ({}, extra):
        base = tiny_backbone(family, **settings)
        wanted = {f"{i}.{name}" for i, block in enumerate(blocks(base)) for name, module in block.named_modules()
                  if isinstance(module, torch.nn.Linear)}
        adapted = add_lora(base, r=2, targets="all")
        found = {f"{i}.{name[:-7]}" for i, block in enumerate(blocks(adapted)) for name, _ in block.named_modules()
                 if name.endswith(".lora_A")}
        assert found == wanted and len(found) >= 12


@every_family
@pytest.mark.parametrize("targets", ["qv", "all"])
@pytest.mark.parametrize("channels", [1, 3])
def test_adapter_and_merged_export_agree(tmp_path, npz, tiny_backbone, family, targets, channels):  # noqa: F811
    """A run exports its adapter and a merged AutoModel: both give the teacher's features, on the untouched base."""
    import peft
    if channels == 1:
        tiny_backbone(family, hidden_size=32).save_pretrained(tmp_path / "weights")        # a 3-channel base, grey data
        run(str(tmp_path / "run"), "--use_pretrained=true", f"--model_type={tmp_path}/weights", f"--dataset_path={npz}", "--use_lora=true",
            f"--lora_targets={targets}", "--freeze_backbone_iterations=0", "--lora_alpha=400", "--momentum_teacher=0", "--final_momentum_teacher=0",
            "--freeze_backbone_layers=1", "--eval_interval=0", "--generate_samples=false")
        folder = f"{tmp_path}/run/checkpoints/last/hf"
        base = build_backbone(f"{tmp_path}/weights", num_channels=1)
    else:
        tiny_backbone(family).save_pretrained(tmp_path / "weights")
        adapted = add_lora(build_backbone(f"{tmp_path}/weights"), targets=targets)
        for name, param in adapted.named_parameters():
            if "lora_B" in name:
                param.data = 0.1 * normal(*param.shape)
        from checkpoint import export_hf
        folder = f"{tmp_path}/export/hf"
        export_hf(folder, adapted, 32, (0, 1), (0.5,), (0.5,), "")
        base = build_backbone(f"{tmp_path}/weights")
    plain = copy.deepcopy(base).eval()
    with_adapter = peft.PeftModel.from_pretrained(base, f"{folder}/adapter").eval()
    merged, images = AutoModel.from_pretrained(folder).eval(), normal(2, channels, 32, 32)
    with torch.no_grad():
        a, b, c = (torch.cat([part.flatten() for part in forward_features(net, images)]) for net in (with_adapter, merged, plain))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert (a - c).abs().max() > 1e-3                          # and the adapter does something


# ---- every strategy: frozen stays frozen, resumed equals uninterrupted ----

STRATEGIES = {
    "standard": [],
    "lora_qv": ["--use_lora=true"],
    "lora_all": ["--use_lora=true", "--lora_targets=all"],
    "freeze": ["--freeze_backbone_layers=1"],
    "lora_freeze": ["--use_lora=true", "--freeze_backbone_layers=1"],
    "gram_start": ["--gram_loss_weight=1.5", "--gram_teacher=start"],
    "gram_snapshot": ["--gram_loss_weight=1.5", "--gram_teacher=snapshot", "--gram_refresh_iterations=2", "--gram_crops_size=48"],
    "thaw": ["--freeze_backbone_layers=1", "--freeze_backbone_until=3"],
    "lora_thaw": ["--use_lora=true", "--freeze_backbone_layers=1", "--freeze_backbone_until=3", "--gram_loss_weight=1", "--gram_teacher=start"],
    "waits": ["--freeze_backbone_iterations=3"],
    "waits_thaws": ["--freeze_backbone_iterations=2", "--freeze_backbone_layers=1", "--freeze_backbone_until=4"],
}
COMMON = ["--drop_path_rate=0.3", "--max_iterations=6", "--eval_interval=0", "--saveckp_freq=100", "--freeze_last_layer=0", "--generate_samples=false"]


def run_and_stop(out, after, *argv):
    """A run that a signal ends after so many iterations."""
    module, calls = load_train(), []
    update = module.EMATeacher.update
    module.EMATeacher.update = lambda self, *args: (update(self, *args), calls.append(1), len(calls) == after and os.kill(os.getpid(), signal.SIGTERM))
    try:
        run(out, *argv, module=module)
    finally:
        module.EMATeacher.update = update


@pytest.mark.parametrize("strategy, stops", [(name, (3,)) for name in STRATEGIES if "thaw" not in name and name != "waits"]
                         + [("thaw", (2, 3, 4)), ("lora_thaw", (3,)), ("waits", (2, 3, 4)), ("waits_thaws", (3,))])
def test_every_strategy_resumes_bit_for_bit(tmp_path, npz, strategy, stops):  # noqa: F811
    extra = [f"--dataset_path={npz}", "--model_type=dinov2", *COMMON, *STRATEGIES[strategy]]
    whole = run(str(tmp_path / "whole"), *extra)
    for stop in stops:
        parts = str(tmp_path / f"stopped{stop}")
        run_and_stop(parts, stop, *extra)
        assert state(parts)["iteration"] == stop
        resumed = run(parts, *extra, f"--resume_from={parts}")
        a, b = state(str(tmp_path / "whole")), state(parts)
        for key in ("student", "teacher", "anchor", "optimizer", "centers", "iteration"):
            assert_same(a[key], b[key])
        assert torch.equal(losses(whole), losses(resumed))


def start_of(family, *argv):
    """The student before the first iteration, as train.py builds it with seed 0: a run of none would not be valid."""
    module = load_train()
    started = {}
    honest = module.EMATeacher.__init__

    def remember(self, student, *args, **kwargs):
        started.update({name: value.clone() for name, value in student.state_dict().items()})
        honest(self, student, *args, **kwargs)
    module.EMATeacher.__init__ = remember
    return module, started, honest


@pytest.mark.parametrize("family, strategy", [(family, strategy) for family in FAMILIES for strategy in ("lora_all", "freeze")]
                         + [("dinov2", "lora_freeze")])
def test_frozen_and_base_weights_are_bit_identical(tmp_path, npz, family, strategy):  # noqa: F811
    module, start, honest = start_of(family)
    try:
        records = run(str(tmp_path / "run"), f"--dataset_path={npz}", f"--model_type={family}", *COMMON, "--max_iterations=4", *STRATEGIES[strategy],
                      module=module)
    finally:
        module.EMATeacher.__init__ = honest
    end = state(str(tmp_path / "run"))
    still = {name for name in start if torch.equal(start[name], end["student"][name])}
    if "lora" in strategy:
        wanted = {name for name in start if name.startswith("backbone.") and "lora_" not in name}
    else:
        wanted = {name for name in start if ".embeddings." in name or ".layer.0." in name or ".layers.0." in name}
    never = {name for name in start if "original0" in name and not name.startswith("backbone.")}
    assert wanted <= still and not (still - wanted - never) and wanted
    assert not wanted & end["teacher"].keys()                  # one copy: the teacher has none of its own
    counts = [(record["trainable_m"], record["total_m"]) for record in records if "loss" in record]
    size = {name: value.numel() / 1e6 for name, value in start.items()}
    assert counts[-1][1] == pytest.approx(sum(size.values())) and counts[-1][0] == pytest.approx(sum(size[name] for name in end["teacher"]))


def test_who_learns_changes_when_it_should(tmp_path, npz, capsys):  # noqa: F811
    """Heads, then the rest, then the first block: by the log's counts, by the weights, and by AdamW's step counts."""
    out = str(tmp_path / "run")
    records = run(out, f"--dataset_path={npz}", "--model_type=dinov2", *COMMON, *STRATEGIES["waits_thaws"], "--saveckp_freq=1", "--warmup_iterations=0")
    counts = [record["trainable_m"] for record in records if "loss" in record]
    assert counts[0] == counts[1] < counts[2] == counts[3] < counts[4] == counts[5]
    first, second, head = "backbone.encoder.layer.0.mlp.fc1.weight", "backbone.encoder.layer.1.mlp.fc1.weight", "dino_head.mlp.0.weight"
    for name, train_from in ((first, 4), (second, 2), (head, 0)):
        values = [state(out, f"{i:07d}")["student"][name] for i in range(1, 7)]
        moved = [not torch.equal(a, b) for a, b in zip(values, values[1:])]                # in iterations 1 to 5
        assert moved == [i >= train_from for i in range(1, 6)], name
    end = state(out)
    steps = sorted({int(entry["step"]) for entry in end["optimizer"]["state"].values()})
    assert steps == [2, 4, 6]                                  # moments begin with the learning, not before
    said = capsys.readouterr().out
    for text in ("from iteration 0 on", "first 2 of 2 blocks frozen, 2 computed once", "from iteration 2 on",
                 "first 1 of 2 blocks frozen, 1 computed once", "from iteration 4 on", "first 0 of 2 blocks frozen"):
        assert text in said


def test_adapters_wait_for_the_heads(tmp_path, npz):  # noqa: F811
    out = str(tmp_path / "run")
    run(out, f"--dataset_path={npz}", "--model_type=vit", *COMMON, "--use_lora=true", "--freeze_backbone_iterations=3", "--saveckp_freq=3", "--warmup_iterations=0")
    waiting, end = state(out, "0000003")["student"], state(out)["student"]
    adapters = [name for name in end if "lora_B" in name]
    assert all(not waiting[name].any() for name in adapters) and all(end[name].any() for name in adapters)
    assert not torch.equal(waiting["dino_head.mlp.0.weight"], end["dino_head.mlp.0.weight"])


def test_schedule_changed_on_resume(tmp_path, npz):  # noqa: F811
    """What waits longer now, or shorter, goes on from where it is."""
    extra = [f"--dataset_path={npz}", "--model_type=dinov2", *COMMON]
    for now in (1, 5):
        out = str(tmp_path / f"run{now}")
        run_and_stop(out, 3, *extra, "--freeze_backbone_iterations=2")
        teacher = state(out)["teacher"]
        records = run(out, *extra, f"--resume_from={out}", f"--freeze_backbone_iterations={now}")
        assert torch.isfinite(losses(records)).all() and state(out)["teacher"].keys() == teacher.keys()


# ---- Gram anchors ----

def gram_of(out, npz, *argv):  # noqa: F811
    """The Gram losses of a run, and its last state."""
    records = run(out, f"--dataset_path={npz}", "--model_type=dinov2", *COMMON, "--drop_path_rate=0", "--warmup_iterations=0", "--max_iterations=4",
                  "--gram_loss_weight=1", "--gram_crops_size=0", "--momentum_teacher=0", "--final_momentum_teacher=0", *argv)
    return torch.tensor([record["gram_loss"] for record in records if "loss" in record]), state(out)


def test_gram_anchors(tmp_path, npz):  # noqa: F811
    """With momentum 0 the teacher is the student: no Gram loss towards it, nor towards a snapshot of every iteration; the
    start stays behind."""
    start, at_start = gram_of(str(tmp_path / "start"), npz, "--gram_teacher=start")
    never, at_never = gram_of(str(tmp_path / "never"), npz, "--gram_teacher=snapshot")
    every, at_every = gram_of(str(tmp_path / "every"), npz, "--gram_teacher=snapshot", "--gram_refresh_iterations=1")
    second, _ = gram_of(str(tmp_path / "second"), npz, "--gram_teacher=snapshot", "--gram_refresh_iterations=2")
    ema, at_ema = gram_of(str(tmp_path / "ema"), npz)
    assert start[0] == 0 and (start[1:] > 1e-8).all() and torch.equal(start, never)
    assert (every < 1e-10).all() and (ema < 1e-10).all()
    assert second[2] < 1e-10 < second[1] and second[3] > 1e-8
    assert at_ema["anchor"] is None
    assert all(name.startswith("backbone.") for name in at_start["anchor"]) and len(at_start["anchor"]) > 20
    assert_same({name: at_every["teacher"][name] for name in at_every["anchor"]}, at_every["anchor"])
    assert_same(at_start["anchor"], at_never["anchor"])
    assert not torch.equal(at_start["anchor"]["backbone.layernorm.bias"], at_start["student"]["backbone.layernorm.bias"])
    _, lora = gram_of(str(tmp_path / "lora"), npz, "--gram_teacher=start", "--use_lora=true")
    assert lora["anchor"] and all("lora_" in name for name in lora["anchor"])              # the base is not copied


@pytest.mark.parametrize("anchor", ["ema", "start"])
def test_gram_crops_are_undistorted_and_resized(tmp_path, npz, anchor):  # noqa: F811
    """What the loss got is what the anchor makes of the same boxes, plain, at its own size: a grid of 6x6 for 4x4."""
    module, seen = load_train(), []
    honest = module.gram_loss
    module.gram_loss = lambda student, teacher: (seen.append((student.shape, teacher.shape)), honest(student, teacher))[1]
    plain = module.Photometrics.plain
    module.Photometrics.plain = lambda self, crops: (seen.append(crops.shape), plain(self, crops))[1]
    try:
        run(str(tmp_path / "run"), f"--dataset_path={npz}", "--max_iterations=1", "--gram_loss_weight=1", f"--gram_teacher={anchor}", "--gram_crops_size=48",
            "--image_mean=0.5", "--image_std=0.5", "--eval_interval=0", module=module)
    finally:
        module.Photometrics.plain = plain
    assert (16, 1, 48, 48) in seen and ((16, 16, 32), (16, 36, 32)) in seen


def test_gram_crops_share_boxes_and_flips():
    import numpy as np

    from augment import MultiCrop
    image = np.random.default_rng(0).integers(0, 255, (60, 50, 3)).astype(np.uint8)
    for seed in range(4):
        without = MultiCrop(32, local_crops_size=16)(image, None, np.random.default_rng(seed))
        same = MultiCrop(32, local_crops_size=16, gram_crops_size=32)(image, None, np.random.default_rng(seed))
        larger = MultiCrop(32, local_crops_size=16, gram_crops_size=64)(image, None, np.random.default_rng(seed))
        assert torch.equal(same["gram_crops"], same["global_crops"]) and "gram_crops" not in without
        for key in without:                                    # nothing else moves
            assert torch.equal(without[key], same[key]) and torch.equal(without[key], larger[key])
        halved = torch.nn.functional.avg_pool2d(larger["gram_crops"].float(), 2)
        assert (halved - larger["global_crops"].float()).abs().mean() < 20                 # noise pixels; a flip gives 60


# ---- what it says when something is wrong ----

@pytest.mark.parametrize("argv, message", [
    (["--lora_targets=qkv"], r"lora_targets='qkv': choose one of qv, all"),
    (["--gram_teacher=first"], r"gram_teacher='first': choose one of ema, start, snapshot"),
    (["--gram_refresh_iterations=5"], r"gram_refresh_iterations=5 with gram_teacher='ema': only a 'snapshot' is refreshed"),
    (["--gram_crops_size=44"], r"gram_crops_size=44 is not a multiple of patch_size=8 of vit; use 40 or 48"),
    (["--freeze_backbone_until=2"], r"freeze_backbone_until=2 with freeze_backbone_layers=0: nothing is frozen"),
    (["--freeze_backbone_layers=2", "--use_lora=true"], r"freeze_backbone_layers=2: no block is left for adapters; freeze fewer than 2"),
])
def test_bad_input_is_one_clear_error(tmp_path, npz, argv, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        run(str(tmp_path / "run"), f"--dataset_path={npz}", *argv)


# ---- two processes ----

@pytest.mark.parametrize("strategy", ["lora_freeze", "waits_thaws"])
def test_two_processes_equal_one(tmp_path, npz, strategy):  # noqa: F811
    """The prefix goes through DDP, and DDP is built anew where someone train_from to learn."""
    extra = [f"--dataset_path={npz}", "--model_type=dinov2", *COMMON, "--drop_path_rate=0", "--lora_dropout=0", "--warmup_iterations=0", *STRATEGIES[strategy]]
    alone = losses(run(str(tmp_path / "one"), *extra))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *SHRUNK, *extra,
               f"--out_dir={tmp_path}/two", f"--cache_dir={tmp_path}/cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"), timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    two = losses(log(str(tmp_path / "two")))
    assert ((alone - two).abs() <= 1e-5 * alone.abs()).all(), (alone - two).abs().max()
