"""Adaptation: the forward written out, frozen blocks that run once for student and teacher, LoRA,
Gram anchors, layers that thaw. Every strategy resumes bit for bit, and frozen weights do not move.
"""
import copy
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel

import dino
from augment import MultiCrop
from checkpoint import export_hf, merge_lora
from configurator import UserError
from model import (FAMILIES, EMATeacher, add_lora, blocks, build_backbone, embed, forward_features,
                   freeze_for_the_run, freeze_layers, frozen_blocks, keys_without_effect,
                   run_blocks, set_trainable, shared_blocks)
from networks import load_adapter
from tests_support import ROOT, SHRUNK, assert_same, load_train, log, losses, run, state

every_family = pytest.mark.parametrize("family", FAMILIES)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(module):
    return [param.grad.clone() for param in module.parameters() if param.grad is not None]


# ---- the forward written out ----

@every_family
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("height, width", [(32, 32), (16, 16), (40, 24)])
@pytest.mark.parametrize("masked", [False, True])
def test_forward_is_that_of_transformers_bit_for_bit(tiny_backbone, family, attention, height,
                                                     width, masked):
    backbone = tiny_backbone(family).eval()
    backbone.set_attn_implementation(attention)
    images, masks = normal(3, 3, height, width), None
    if masked:
        masks = normal(3, height * width // 64, seed=1) > 0.5
    extra = dict(interpolate_pos_encoding=True) if family == "vit" else {}
    with torch.no_grad():
        out = backbone(pixel_values=images, bool_masked_pos=masks, **extra)
        cls, patches = forward_features(backbone, images, masks)
        adapted = add_lora(copy.deepcopy(backbone), targets="all")
        adapted_cls, adapted_patches = forward_features(adapted, images, masks)
    tokens = out.last_hidden_state
    assert torch.equal(cls, tokens[:, 0])
    assert torch.equal(patches, tokens[:, -patches.shape[1]:])
    assert torch.equal(adapted_cls, cls)  # B starts at 0
    assert torch.equal(adapted_patches, patches)


@every_family
def test_training_mode_draws_what_transformers_draws(tiny_backbone, family):
    """Drop path and DINOv3's random positions come in the same order from the same stream, so the
    gradients are equal, too."""
    settings = {} if family == "vit" else dict(drop_path_rate=0.4)
    if family == "dinov3_vit":
        settings["pos_embed_rescale"] = 2.0
    backbone = tiny_backbone(family, **settings).train()
    images, found = normal(4, 3, 32, 32), []
    extra = dict(interpolate_pos_encoding=True) if family == "vit" else {}
    for forward in (lambda: backbone(pixel_values=images, **extra).last_hidden_state[:, 0],
                    lambda: forward_features(backbone, images)[0]):
        backbone.zero_grad()
        torch.manual_seed(1)
        cls = forward()
        cls.square().sum().backward()
        found.append([cls.detach(), *gradients(backbone)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- frozen blocks, and sharing them ----

@every_family
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_blocks_run_no_backward(tiny_backbone, family, lora, checkpointing):
    backbone = tiny_backbone(family)
    if lora:
        backbone = add_lora(backbone, targets="all", skip_blocks=1)
        names = [name for name, _ in blocks(backbone)[0].named_parameters()]
        assert not any("lora_" in name for name in names)
    freeze_layers(backbone, 1)
    if checkpointing:
        backbone.activation_checkpointing_enable({"use_reentrant": False})
    backbone.train()
    assert frozen_blocks(backbone) == 1
    tokens, rope = embed(backbone, normal(2, 3, 32, 32))
    hidden = run_blocks(backbone, tokens, rope, 0, 1)
    assert tokens.grad_fn is None and hidden.grad_fn is None and not hidden.requires_grad
    assert run_blocks(backbone, hidden, rope, 1).grad_fn is not None


def apply_strategy(student, strategy):
    """Freeze one block, with 'lora_freeze' put adapters on the other, with 'waits' freeze all."""
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
    """Loss and gradients of a step whose student takes over so many blocks from the teacher."""
    student.zero_grad()
    torch.manual_seed(2)
    global_crops, local_crops = normal(4, 3, 32, 32), normal(4, 3, 16, 16, seed=1)
    with teacher.teacher_weights(student) as network:
        teacher_out = network(global_crops, n_shared_blocks=n_shared_blocks)
    assert ("shared" in teacher_out) == (n_shared_blocks > 0)
    out = student(global_crops, local_crops, shared=teacher_out.get("shared"))
    loss = (out["global_logits"] - teacher_out["global_logits"].flip(0)).square().sum()
    loss = loss + out["local_logits"].square().sum()
    loss = loss + out["patches"].square().sum() + out["global_cls"].abs().sum()
    loss.backward()
    return [loss.detach(), *gradients(student)]


@every_family
@pytest.mark.parametrize("strategy, n_shared", [("freeze", 1), ("lora_freeze", 1), ("waits", 2)])
def test_shared_blocks_change_nothing(tiny_student, family, strategy, n_shared):
    """Losses and gradients bit for bit. Drop path is on, but frozen blocks do not use it."""
    extra = {} if family == "vit" else dict(drop_path_rate=0.4)
    student = apply_strategy(tiny_student(family, **extra), strategy)
    teacher = EMATeacher(student)
    for value in teacher.values.values():
        value.add_(0.1)
    assert shared_blocks(student, teacher) == n_shared
    passes = []
    for block in blocks(student.backbone):
        block.register_forward_hook(lambda *_: passes.append(1))
    plain = step_with(student, teacher, 0)
    n_plain = len(passes)
    shared = step_with(student, teacher, n_shared)
    assert n_plain - (len(passes) - n_plain) == n_shared  # so many passes of a block are saved
    assert len(plain) > 5
    assert all(torch.equal(a, b) for a, b in zip(plain, shared, strict=True))


def test_no_block_is_shared_if_it_would_not_be_exact(tiny_student):
    student = tiny_student("dinov3_vit").train()
    assert shared_blocks(student, EMATeacher(student)) == 0  # nothing is frozen
    freeze_layers(student.backbone, 1)
    assert shared_blocks(student, EMATeacher(student)) == 1
    student.backbone.config.pos_embed_rescale = 2.0  # random positions, for the student only
    assert shared_blocks(student, EMATeacher(student)) == 0
    student.backbone.config.pos_embed_rescale = None
    moved = EMATeacher(tiny_student("dinov3_vit"))  # it has values of its own for the frozen block
    assert shared_blocks(student, moved) == 0
    student = tiny_student("dinov2")
    student.backbone.embeddings.requires_grad_(False)  # the blocks are trained
    assert shared_blocks(student, EMATeacher(student)) == 0


def test_trained_embeddings_keep_every_block_in_the_backward(tiny_student):
    student = tiny_student("vit").train()
    student.backbone.requires_grad_(False)
    student.backbone.embeddings.patch_embeddings.requires_grad_(True)  # inflated filters
    assert frozen_blocks(student.backbone) == 0


# ---- LoRA ----

def linear_layers(backbone, suffix=""):
    """Names, like '0.mlp.fc1', of the Linear layers in blocks, or of modules with the suffix."""
    found = set()
    for name, module in blocks(backbone).named_modules():
        if suffix and name.endswith(suffix):
            found.add(name.removesuffix(suffix))
        elif not suffix and isinstance(module, torch.nn.Linear):
            found.add(name)
    return found


@every_family
def test_adapters_on_everything(tiny_backbone, family):
    gated_mlp = {}
    if family.startswith("dinov2"):
        gated_mlp = dict(use_swiglu_ffn=True)
    elif family == "dinov3_vit":
        gated_mlp = dict(use_gated_mlp=True)
    for settings in ({}, gated_mlp):
        base = tiny_backbone(family, **settings)
        expected = linear_layers(base)
        adapted = add_lora(base, r=2, targets="all")
        found = linear_layers(adapted, ".lora_A")
        assert found == expected and len(found) >= 12


def adapted_by_a_run(tmp_path, npz, backbone, targets):
    """Adapt a 3-channel base to grey images by a run; returns its export."""
    backbone.save_pretrained(tmp_path / "weights")
    run(str(tmp_path / "run"), "--use_pretrained=true", f"--model_type={tmp_path}/weights",
        f"--dataset_path={npz}", "--use_lora=true", f"--lora_targets={targets}",
        "--freeze_backbone_iterations=0", "--lora_alpha=400", "--momentum_teacher=0",
        "--final_momentum_teacher=0", "--freeze_backbone_layers=1", "--eval_interval=0",
        "--generate_samples=false")
    return f"{tmp_path}/run/checkpoints/last/hf"


def adapted_by_hand(tmp_path, backbone, targets):
    """Adapters with random weights; returns their export."""
    backbone.save_pretrained(tmp_path / "weights")
    adapted = add_lora(build_backbone(f"{tmp_path}/weights"), targets=targets)
    for name, param in adapted.named_parameters():
        if "lora_B" in name:
            param.data = 0.1 * normal(*param.shape)
    export_hf(f"{tmp_path}/export/hf", adapted, 32, (0, 1), (0.5,), (0.5,), "")
    return f"{tmp_path}/export/hf"


@every_family
@pytest.mark.parametrize("targets", ["qv", "all"])
@pytest.mark.parametrize("channels", [1, 3])
def test_adapter_and_merged_export_agree(tmp_path, npz, tiny_backbone, family, targets, channels):
    """An export has the adapter and a merged AutoModel. Both give the teacher's features; the
    adapter does so on the released base."""
    import peft
    if channels == 1:
        backbone = tiny_backbone(family, hidden_size=32)
        folder = adapted_by_a_run(tmp_path, npz, backbone, targets)
    else:
        folder = adapted_by_hand(tmp_path, tiny_backbone(family), targets)
    base = build_backbone(f"{tmp_path}/weights", num_channels=channels)
    plain = copy.deepcopy(base).eval()
    with_adapter = peft.PeftModel.from_pretrained(base, f"{folder}/adapter").eval()
    merged, images = AutoModel.from_pretrained(folder).eval(), normal(2, channels, 32, 32)
    found = []
    for network in (with_adapter, merged, plain):
        with torch.no_grad():
            cls, patches = forward_features(network, images)
        found.append(torch.cat([cls.flatten(), patches.flatten()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert (found[0] - found[2]).abs().max() > 1e-3  # the adapter does something


def random_weights(adapted):
    """Give everything that an adapted backbone trains other values."""
    for i, (_, param) in enumerate(adapted.named_parameters()):
        if param.requires_grad:
            param.data = param.data + 0.1 * normal(*param.shape, seed=i)
    return adapted.eval()


KINDS = dict(  # LoraConfig: the linear layers of the tiny dinov2 have biases
    rslora=dict(use_rslora=True), biases=dict(bias="lora_only"), all_biases=dict(bias="all"),
    patterns=dict(rank_pattern={"fc1": 2}, alpha_pattern={"fc1": 3}))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_what_peft_merges_and_what_the_adapters_compute(tiny_backbone, kind):
    import peft
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "o_proj", "fc1"],
                             **KINDS[kind])
    adapted = random_weights(peft.get_peft_model(tiny_backbone("dinov2"), config))
    weights, images = merge_lora(adapted, adapted.state_dict()), normal(2, 3, 32, 32)
    merged = tiny_backbone("dinov2").eval()
    merged.load_state_dict(weights)
    with torch.no_grad():
        expected = forward_features(adapted, images)
        found = forward_features(merged, images)
        start = forward_features(tiny_backbone("dinov2").eval(), images)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (start[0] - expected[0]).abs().max() > 1e-2
    by_peft = adapted.merge_and_unload().state_dict()
    assert by_peft.keys() == weights.keys()
    for name, value in by_peft.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [
    dict(use_dora=True), dict(lora_bias=True), dict(modules_to_save=["layernorm"]),
    dict(target_modules=["q_proj", "projection"])])  # a convolution
def test_an_adapter_that_is_no_product_is_not_merged(tiny_backbone, settings):
    import peft
    settings = {**dict(r=2, target_modules=["q_proj"]), **settings}
    adapted = peft.get_peft_model(tiny_backbone("dinov2"), peft.LoraConfig(**settings))
    with pytest.raises(UserError, match="is not merged here; use merge_and_unload") as error:
        merge_lora(adapted, adapted.state_dict())
    assert "\n" not in str(error.value)
    other = peft.get_peft_model(tiny_backbone("dinov2"), peft.IA3Config(
        target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(UserError, match="IA3 has more than a product"):
        merge_lora(other, other.state_dict())


def test_rslora_divides_by_the_root_of_the_rank(tiny_backbone):
    for rslora, expected in ((False, 6 / 9), (True, 6 / 3)):
        adapted = add_lora(tiny_backbone("vit"), r=9, alpha=6, rslora=rslora)
        layers = [module for module in adapted.modules() if hasattr(module, "lora_A")]
        assert layers and all(layer.scaling["default"] == expected for layer in layers)


@every_family
def test_whole_blocks_are_in_the_adapter(tmp_path, tiny_backbone, family):
    """ExPLoRA: peft's reload of the adapter alone, ours of it, and the merged export all give the
    features of the adapted network."""
    import peft
    tiny_backbone(family).save_pretrained(tmp_path / "weights")
    adapted = add_lora(build_backbone(f"{tmp_path}/weights"), whole_blocks=1, rslora=True)
    adapted, folder = random_weights(adapted), f"{tmp_path}/export/hf"
    trained = [name for name, param in adapted.named_parameters() if param.requires_grad]
    n_adapters = sum("lora_" in name for name in trained)
    per_block = len(list(blocks(adapted)[1].parameters()))
    assert n_adapters == 4 and len(trained) == n_adapters + per_block + 2  # and the norm
    images = normal(2, 3, 32, 32)
    with torch.no_grad():
        expected = forward_features(adapted, images)
    export_hf(folder, adapted, 32, (0, 1), (0.5,), (0.5,), "")
    base = build_backbone(f"{tmp_path}/weights")
    with_adapter = peft.PeftModel.from_pretrained(base, f"{folder}/adapter").eval()
    for network in (with_adapter, load_adapter(f"{folder}/adapter").eval(),
                    build_backbone(folder).eval()):
        with torch.no_grad():
            for found, wanted in zip(forward_features(network, images), expected):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with open(f"{folder}/adapter/README.md") as file:
        text = file.read()
    assert "scaled by alpha / sqrt(rank)" in text
    assert "trained whole, and held by the adapter, too: " in text


@pytest.mark.parametrize("flags, n_blocks, notes", [
    (dict(train_last_blocks=1), 1, 0), (dict(train_last_blocks=2), 0, 0),
    (dict(train_last_blocks=2, freeze_backbone_layers=1), 1, 0),
    (dict(train_last_blocks=1, freeze_backbone_layers=1), 1, 1)])
def test_the_larger_freeze_counts(tiny_student, flags, n_blocks, notes):
    defaults = dict(freeze_backbone_layers=0, train_only="all", use_lora=False, model_type="vit",
                    drop_path_rate=0, pos_embed_rescale=0)
    config, student = SimpleNamespace(**{**defaults, **flags}), tiny_student("vit")
    freeze_for_the_run(student.backbone, config)
    assert frozen_blocks(student.backbone) == n_blocks
    assert not any(param.requires_grad for param in student.backbone.embeddings.parameters())
    assert all(param.requires_grad for param in student.backbone.layernorm.parameters())
    assert shared_blocks(student.train(), EMATeacher(student)) == n_blocks
    found = keys_without_effect(config, student.backbone.config)
    assert len(found) == notes and all("has no effect: train_last_blocks=1" in note
                                       for note in found)


# ---- every strategy: frozen stays frozen, resumed equals uninterrupted ----

STRATEGIES = {
    "standard": [],
    "lora_qv": ["--use_lora=true"],
    "lora_all": ["--use_lora=true", "--lora_targets=all"],
    "freeze": ["--freeze_backbone_layers=1"],
    "lora_freeze": ["--use_lora=true", "--freeze_backbone_layers=1"],
    "gram_start": ["--gram_loss_weight=1.5", "--gram_teacher=start"],
    "gram_snapshot": ["--gram_loss_weight=1.5", "--gram_teacher=snapshot",
                      "--gram_refresh_iterations=2", "--gram_crops_size=48"],
    "thaw": ["--freeze_backbone_layers=1", "--freeze_backbone_until=3"],
    "lora_thaw": ["--use_lora=true", "--freeze_backbone_layers=1", "--freeze_backbone_until=3",
                  "--gram_loss_weight=1", "--gram_teacher=start"],
    "waits": ["--freeze_backbone_iterations=3"],
    "last_blocks": ["--train_last_blocks=1"],
    "apla": ["--train_only=attention_output"],
    "apla_last": ["--train_only=attention_output", "--train_last_blocks=1"],
    "explora": ["--use_lora=true", "--train_last_blocks=1", "--lora_rslora=true",
                "--lora_targets=q_proj,o_proj"],
    "explora_freeze": ["--use_lora=true", "--train_last_blocks=1", "--freeze_backbone_layers=1",
                       "--num_hidden_layers=3"],
    "waits_thaws": ["--freeze_backbone_iterations=2", "--freeze_backbone_layers=1",
                    "--freeze_backbone_until=4"],
}
STOPS = dict.fromkeys(STRATEGIES, (3,)) | dict(thaw=(2, 3, 4), waits=(2, 3, 4))
COMMON = ["--drop_path_rate=0.3", "--max_iterations=6", "--eval_interval=0", "--saveckp_freq=100",
          "--freeze_last_layer=0", "--generate_samples=false"]


def run_and_stop(out, after, *argv):
    """A run that a signal ends after so many iterations."""
    calls, original = [], EMATeacher.update

    def update(self, *args):
        original(self, *args)
        calls.append(1)
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EMATeacher, "update", update)
        run(out, *argv)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_resumes_bit_for_bit(tmp_path, npz, strategy):
    extra = [f"--dataset_path={npz}", "--model_type=dinov2", *COMMON, *STRATEGIES[strategy]]
    whole = run(str(tmp_path / "whole"), *extra)
    a = state(str(tmp_path / "whole"))
    for stop in STOPS[strategy]:
        parts = str(tmp_path / f"stopped{stop}")
        run_and_stop(parts, stop, *extra)
        assert state(parts)["iteration"] == stop
        resumed = run(parts, *extra, f"--resume_from={parts}")
        b = state(parts)
        for key in ("student", "ema", "anchor", "optimizer", "centers", "iteration"):
            assert_same(a[key], b[key])
        assert torch.equal(losses(whole), losses(resumed))


@pytest.fixture
def first_weights(monkeypatch):
    """{name: value} of the student before the first iteration, filled when a run builds its EMA."""
    weights, original = {}, EMATeacher.__init__

    def remember(self, student, *args, **kwargs):
        weights.update({name: value.clone() for name, value in student.state_dict().items()})
        original(self, student, *args, **kwargs)
    monkeypatch.setattr(EMATeacher, "__init__", remember)
    return weights


def names_to_freeze(names, strategy):
    """Of the names of a student's weights those that a strategy freezes."""
    in_backbone = {name for name in names if name.startswith("backbone.")}
    if strategy == "explora":
        whole = (".layer.1.", ".layers.1.", "model.layernorm.", "model.norm.")
        adapted = ("lora_", *whole)
        return {name for name in in_backbone if not any(part in name for part in adapted)}
    if "lora" in strategy:
        return {name for name in in_backbone if "lora_" not in name}
    if "apla" in strategy:
        trained = {name for name in in_backbone if ".attention.o_proj." in name}
        if strategy == "apla_last":
            trained = {name for name in trained if "layer.1" in name or "layers.1" in name}
        assert len(trained) == (2 if strategy == "apla_last" else 4)
        return in_backbone - trained
    parts = (".embeddings.", ".layer.0.", ".layers.0.")
    return {name for name in names if any(part in name for part in parts)}


@pytest.mark.parametrize("family, strategy", [
    *[(family, "lora_all") for family in FAMILIES], *[(family, "freeze") for family in FAMILIES],
    *[(family, "last_blocks") for family in FAMILIES], *[(family, "apla") for family in FAMILIES],
    *[(family, "explora") for family in FAMILIES], ("dinov2", "apla_last"),
    ("dinov2", "lora_freeze")])
def test_frozen_and_base_weights_are_bit_identical(tmp_path, npz, first_weights, family, strategy):
    out = str(tmp_path / "run")
    records = run(out, f"--dataset_path={npz}", f"--model_type={family}", *COMMON,
                  "--max_iterations=4", *STRATEGIES[strategy])
    start, end = first_weights, state(out)
    still = {name for name in start if torch.equal(start[name], end["student"][name])}
    frozen = names_to_freeze(start, strategy)
    gains = {name for name in start if "original0" in name and not name.startswith("backbone.")}
    assert frozen and frozen <= still <= frozen | gains
    assert not frozen & end["ema"].keys()  # they exist once: the teacher has no copy
    last = [record for record in records if "loss" in record][-1]
    sizes = {name: value.numel() / 1e6 for name, value in start.items()}
    assert last["total_m"] == pytest.approx(sum(sizes.values()))
    assert last["trainable_m"] == pytest.approx(sum(sizes[name] for name in end["ema"]))


def test_more_is_trained_when_it_should(tmp_path, npz, capsys):
    """Heads, then the rest, then the first block: by the log's counts, by the weights, and by
    AdamW's step counts."""
    out = str(tmp_path / "run")
    records = run(out, f"--dataset_path={npz}", "--model_type=dinov2", *COMMON,
                  *STRATEGIES["waits_thaws"], "--saveckp_freq=1", "--warmup_iterations=0")
    counts = [record["trainable_m"] for record in records if "loss" in record]
    assert counts[0] == counts[1] < counts[2] == counts[3] < counts[4] == counts[5]
    train_from = {"backbone.encoder.layer.0.mlp.fc1.weight": 4,
                  "backbone.encoder.layer.1.mlp.fc1.weight": 2, "dino_head.mlp.0.weight": 0}
    for name, first in train_from.items():
        values = [state(out, f"{i:07d}")["student"][name] for i in range(1, 7)]
        moved = [not torch.equal(a, b) for a, b in zip(values, values[1:])]  # in iterations 1 to 5
        assert moved == [i >= first for i in range(1, 6)], name
    moments = state(out)["optimizer"]["state"].values()
    steps = sorted({int(entry["step"]) for entry in moments})
    assert steps == [2, 4, 6]  # moments begin when training begins, not before
    printed = capsys.readouterr().out
    for text in ("from iteration 0 on", "first 2 of 2 blocks frozen, 2 computed once",
                 "from iteration 2 on", "first 1 of 2 blocks frozen, 1 computed once",
                 "from iteration 4 on", "first 0 of 2 blocks frozen"):
        assert text in printed


def test_set_trainable_says_whether_anything_changed(tiny_student):
    student = tiny_student("dinov2")
    names = [name for name, _ in student.named_parameters()]
    train_from = {name: 0 if "head" in name else 2 for name in names}
    del train_from["backbone.layernorm.bias"]
    assert set_trainable(student, train_from, 0)
    assert frozen_blocks(student.backbone) == 2
    assert not set_trainable(student, train_from, 1)
    assert set_trainable(student, train_from, 2)
    frozen = [name for name, param in student.named_parameters() if not param.requires_grad]
    assert frozen == ["backbone.layernorm.bias"]  # without an entry it is never trained


def test_adapters_wait_for_the_heads(tmp_path, npz):
    out = str(tmp_path / "run")
    run(out, f"--dataset_path={npz}", "--model_type=vit", *COMMON, "--use_lora=true",
        "--freeze_backbone_iterations=3", "--saveckp_freq=3", "--warmup_iterations=0")
    middle, end = state(out, "0000003")["student"], state(out)["student"]
    adapters = [name for name in end if "lora_B" in name]
    assert all(not middle[name].any() for name in adapters)
    assert all(end[name].any() for name in adapters)
    head = "dino_head.mlp.0.weight"
    assert not torch.equal(middle[head], end[head])


def test_schedule_changed_on_resume(tmp_path, npz):
    """A backbone that has to wait shorter, or longer, goes on from where it is."""
    extra = [f"--dataset_path={npz}", "--model_type=dinov2", *COMMON]
    for heads_only in (1, 5):
        out = str(tmp_path / f"run{heads_only}")
        run_and_stop(out, 3, *extra, "--freeze_backbone_iterations=2")
        ema = state(out)["ema"]
        records = run(out, *extra, f"--resume_from={out}",
                      f"--freeze_backbone_iterations={heads_only}")
        assert torch.isfinite(losses(records)).all()
        assert state(out)["ema"].keys() == ema.keys()


# ---- Gram anchors ----

def gram_of(out, npz, *argv):
    """The Gram losses of a run, and its last state."""
    records = run(out, f"--dataset_path={npz}", "--model_type=dinov2", *COMMON,
                  "--drop_path_rate=0", "--warmup_iterations=0", "--max_iterations=4",
                  "--gram_loss_weight=1", "--gram_crops_size=0", "--momentum_teacher=0",
                  "--final_momentum_teacher=0", *argv)
    gram = [record["gram_loss"] for record in records if "loss" in record]
    return torch.tensor(gram), state(out)


def test_gram_anchors(tmp_path, npz):
    """With momentum 0 the teacher is the student: the Gram loss towards the teacher is 0, and so is
    that towards a snapshot of every iteration. The first weights stay behind."""
    snapshot = "--gram_teacher=snapshot"
    start, at_start = gram_of(str(tmp_path / "start"), npz, "--gram_teacher=start")
    never, at_never = gram_of(str(tmp_path / "never"), npz, snapshot)
    every, at_every = gram_of(str(tmp_path / "every"), npz, snapshot, "--gram_refresh_iterations=1")
    second, _ = gram_of(str(tmp_path / "second"), npz, snapshot, "--gram_refresh_iterations=2")
    ema, at_ema = gram_of(str(tmp_path / "ema"), npz)
    assert start[0] == 0 and (start[1:] > 1e-8).all() and torch.equal(start, never)
    assert (every < 1e-10).all() and (ema < 1e-10).all()
    assert second[2] < 1e-10 < second[1] and second[3] > 1e-8
    assert at_ema["anchor"] is None
    assert all(name.startswith("backbone.") for name in at_start["anchor"])
    assert len(at_start["anchor"]) > 20
    assert_same({name: at_every["ema"][name] for name in at_every["anchor"]}, at_every["anchor"])
    assert_same(at_start["anchor"], at_never["anchor"])
    bias = "backbone.layernorm.bias"
    assert not torch.equal(at_start["anchor"][bias], at_start["student"][bias])
    _, lora = gram_of(str(tmp_path / "lora"), npz, "--gram_teacher=start", "--use_lora=true")
    assert lora["anchor"]
    assert all("lora_" in name for name in lora["anchor"])  # the base is not copied


@pytest.mark.parametrize("anchor", ["ema", "start"])
def test_gram_crops_are_undistorted_and_resized(tmp_path, npz, monkeypatch, anchor):
    """The loss gets what the anchor makes of the same boxes, without augmentation, at their own
    size: a grid of 6x6 for the student's 4x4."""
    module, shapes = load_train(), []
    gram_loss, plain = dino.gram_loss, module.Photometrics.plain

    def watched_loss(student, teacher):
        shapes.append((student.shape, teacher.shape))
        return gram_loss(student, teacher)

    def watched_plain(self, crops):
        shapes.append(crops.shape)
        return plain(self, crops)
    monkeypatch.setattr(dino, "gram_loss", watched_loss)
    monkeypatch.setattr(module.Photometrics, "plain", watched_plain)
    run(str(tmp_path / "run"), f"--dataset_path={npz}", "--max_iterations=1",
        "--gram_loss_weight=1", f"--gram_teacher={anchor}", "--gram_crops_size=48",
        "--image_mean=0.5", "--image_std=0.5", "--eval_interval=0", module=module)
    assert (16, 1, 48, 48) in shapes and ((16, 16, 32), (16, 36, 32)) in shapes


def test_gram_crops_share_boxes_and_flips():
    image = np.random.default_rng(0).integers(0, 255, (60, 50, 3)).astype(np.uint8)

    def crops(seed, **settings):
        multi_crop = MultiCrop(32, local_crops_size=16, **settings)
        return multi_crop(image, None, np.random.default_rng(seed))
    for seed in range(4):
        without, same = crops(seed), crops(seed, gram_crops_size=32)
        larger = crops(seed, gram_crops_size=64)
        assert torch.equal(same["gram_crops"], same["global_crops"])
        assert "gram_crops" not in without
        for key in without:  # nothing else moves
            assert torch.equal(without[key], same[key])
            assert torch.equal(without[key], larger[key])
        halved = torch.nn.functional.avg_pool2d(larger["gram_crops"].float(), 2)
        difference = (halved - larger["global_crops"].float()).abs().mean()
        assert difference < 20  # because pixels are noise; a flip gives 60


# ---- error messages ----

@pytest.mark.parametrize("argv, message", [
    (["--lora_targets=q_proj,qkv", "--use_lora=true"],
     r"lora_targets='q_proj,qkv': the blocks have no linear layer 'qkv'; use qv, all, or names out "
     r"of fc1, fc2, k_proj, o_proj, q_proj, v_proj"),
    (["--train_last_blocks=3"], r"train_last_blocks=3, but the backbone has 2 blocks"),
    (["--train_last_blocks=3", "--use_lora=true"], r"train_last_blocks=3, but the backbone has 2"),
    (["--train_last_blocks=1", "--use_lora=true", "--freeze_backbone_layers=1"],
     r"train_last_blocks=1: of 2 blocks none is left for adapters"),
    (["--train_only=attention_output", "--use_lora=true"],
     r"train_only='attention_output' with use_lora=true: the weights are frozen; use "
     r"lora_targets='o_proj'"),
    (["--gram_teacher=first"], r"gram_teacher='first': choose one of ema, start, snapshot"),
    (["--gram_refresh_iterations=5"],
     r"gram_refresh_iterations=5 with gram_teacher='ema': only a 'snapshot' is refreshed"),
    (["--gram_crops_size=44", "--gram_loss_weight=1"],
     r"gram_crops_size=44 is not a multiple of patch_size=8 of vit; use 40 or 48"),
    (["--freeze_backbone_until=2"],
     r"freeze_backbone_until=2 with freeze_backbone_layers=0: nothing is frozen"),
    (["--freeze_backbone_layers=2", "--use_lora=true"],
     r"freeze_backbone_layers=2 and train_last_blocks=0: of 2 blocks none is left for adapters"),
])
def test_bad_input_is_one_clear_error(tmp_path, npz, argv, message):
    with pytest.raises(ValueError, match=message):
        run(str(tmp_path / "run"), f"--dataset_path={npz}", *argv)


# ---- two processes ----

@pytest.mark.parametrize("strategy, distribution", [("explora_freeze", "fsdp"),
                                                    ("waits_thaws", "ddp")])
def test_two_processes_equal_one(tmp_path, npz, strategy, distribution):
    """Shared blocks go through FSDP and DDP, and DDP is built anew when the training of layers
    begins."""
    extra = [f"--dataset_path={npz}", "--model_type=dinov2", *COMMON, "--drop_path_rate=0",
             "--lora_dropout=0", "--warmup_iterations=0", f"--distribution={distribution}",
             *STRATEGIES[strategy]]
    alone = losses(run(str(tmp_path / "one"), *extra))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", "train.py", *SHRUNK, *extra, f"--out_dir={tmp_path}/two",
               f"--cache_dir={tmp_path}/cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    two = losses(log(str(tmp_path / "two")))
    difference = (alone - two).abs()
    assert (difference <= 1e-5 * alone.abs()).all(), difference.max()
