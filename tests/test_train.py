"""train.py as a user runs it, shrunk: every recipe on every family, every config file, one process
against two, resumed against uninterrupted, every kind of data, and what it says when something is
wrong."""
import math
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoModel

import dino
from configurator import UserError, override
from model import FAMILIES, EMATeacher, Student, build_backbone, forward_features
from tests_support import (ROOT, SHRUNK, assert_same, ema_backbone, load_train, log, losses, run,
                           state)

NO_PROTOTYPES = {"adapt.py", "diet.py", "lejepa.py", "minute.py"}  # of tests/test_objectives.py
CONFIGS = sorted(file for file in set(os.listdir(os.path.join(ROOT, "config"))) - NO_PROTOTYPES
                 if file.endswith(".py") and not file.startswith("distill"))
RECIPES = [file for file in CONFIGS if file.startswith("dinov")]
FREEZES_ONE = ["--freeze_backbone_layers=1"]  # of the two blocks of a shrunk run
SHRUNK_CONFIGS = dict.fromkeys(("freeze.py", "phantom_lg.py"), FREEZES_ONE)
SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8,
             image_size=32)  # of SHRUNK


def config_of(module):
    """The config keys of a script as a namespace, as its main makes it."""
    return SimpleNamespace(**{key: getattr(module, key) for key in module.config_keys})


def weighted_sum(table, config):
    """The total that the terms of `losses` make, [n]."""
    weight = config.dino_head_loss_weight
    weights = [weight * config.dino_local_loss_weight, weight, config.label_guided_loss_weight,
               config.ibot_loss_weight, config.koleo_loss_weight, config.gram_loss_weight]
    return table[:, 1:] @ torch.tensor(weights, dtype=torch.float64)


def uniform_losses(config):
    """The first four terms of `losses` for a uniform prediction: ln K times the share of a term."""
    V, G = config.global_crops_number, config.label_guided_crops_number
    L = config.local_crops_number + G
    share = V * L / (V * (V - 1) + V * L)  # of the pairs, those with a local crop
    guided = min(G, 2) if config.label_guided_loss_weight > 0 else 0  # means over pairs
    masked = config.ibot_mask_sample_probability if config.ibot_loss_weight > 0 else 0
    shares = torch.tensor([share, 1 - share, guided, masked], dtype=torch.float64)
    assert config.dino_head_out_dim == config.ibot_out_dim
    return shares * math.log(config.dino_head_out_dim)


# ---- recipes x families, config files ----

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_every_family(tmp_path, npz, recipe, family):
    out = str(tmp_path / "run")
    module = load_train()
    records = run(out, f"--dataset_path={npz}", f"--model_type={family}", configs=[recipe],
                  module=module)
    table = losses(records)
    assert len(table) == 3 and torch.isfinite(table).all()
    assert torch.allclose(table[:, 0], weighted_sum(table, module), rtol=1e-5)
    assert (table[:, 4] > 0).all() == (recipe != "dinov1.py")
    measured = [record["iteration"] for record in records if "knn_accuracy" in record]
    assert measured == [0, 2, 3]
    # the export gives the features of the best teacher, exactly
    exported = AutoModel.from_pretrained(f"{out}/checkpoints/best/hf").eval()
    assert exported.config.num_channels == 1
    network = build_backbone(family, False, 1, num_register_tokens=2, **SHAPE).eval()
    network.load_state_dict(ema_backbone(state(out, "best")))
    pixels = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cls, _ = forward_features(network, pixels)
        assert torch.equal(forward_features(exported, pixels)[0], cls)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_file_runs(tmp_path, npz, config):
    """The total is the weighted sum of the terms. With logits of unit vectors of many dimensions,
    which are nearly orthogonal, the first losses are those of a uniform prediction."""
    module, extra = load_train(), SHRUNK_CONFIGS.get(config, [])
    records = run(str(tmp_path / "run"), f"--dataset_path={npz}", "--head_bottleneck_dim=2048",
                  *extra, configs=[config], module=module)
    table = losses(records)
    assert len(table) == 3 and torch.isfinite(table).all()
    assert torch.allclose(table[:, 0], weighted_sum(table, module), rtol=1e-5)
    assert torch.allclose(table[0, 1:5], uniform_losses(module), rtol=0.05)


def test_phantom_config_with_each_recipe_behind(tmp_path, npz):
    for recipe in RECIPES:  # recipes compute from the data set's values
        module = load_train()
        files = [os.path.join(ROOT, "config", file) for file in ("phantom.py", recipe)]
        override(vars(module), module.config_keys, files)
        share = 3 if recipe == "dinov3_hires.py" else 10
        assert module.warmup_iterations == module.max_iterations // share
        if module.ibot_loss_weight > 0:
            assert module.ibot_out_dim == module.dino_head_out_dim == 512


def test_pretrained_directory_one_channel_and_lora_and_freezing(tmp_path, npz):
    source = build_backbone("dinov2", False, 3, **SHAPE)
    source.save_pretrained(tmp_path / "weights")
    shape = ["--use_pretrained=true", f"--model_type={tmp_path}/weights", f"--dataset_path={npz}"]
    run(str(tmp_path / "full"), *shape)
    weights = state(str(tmp_path / "full"))["student"]
    summed = weights["backbone.embeddings.patch_embeddings.projection.weight"].shape
    assert summed == (32, 1, 8, 8)
    run(str(tmp_path / "lora"), *shape, "--use_lora=true")
    after = state(str(tmp_path / "lora"))["student"]
    frozen = "backbone.base_model.model.encoder.layer.0.mlp.fc1.weight"
    layers = source.encoder.layer
    assert torch.equal(after[frozen], layers[0].mlp.fc1.weight)
    assert os.path.isfile(tmp_path / "lora/checkpoints/best/hf/adapter/adapter_config.json")
    run(str(tmp_path / "frozen"), *shape, "--freeze_backbone_layers=1",
        "--freeze_backbone_iterations=0")
    after = state(str(tmp_path / "frozen"))["student"]
    blocks = "backbone.encoder.layer"
    assert torch.equal(after[f"{blocks}.0.mlp.fc1.weight"], layers[0].mlp.fc1.weight)
    assert not torch.equal(after[f"{blocks}.1.mlp.fc1.weight"], layers[1].mlp.fc1.weight)


def test_heads_learn_first_when_pretrained(tmp_path, npz):
    source = build_backbone("dinov2", False, 1, **SHAPE)
    source.save_pretrained(tmp_path / "weights")
    run(str(tmp_path / "run"), "--use_pretrained=true", f"--model_type={tmp_path}/weights",
        f"--dataset_path={npz}", "--freeze_backbone_iterations=2", "--freeze_last_layer=0",
        "--warmup_iterations=0")
    waiting = state(str(tmp_path / "run"), "0000002")["student"]
    after = state(str(tmp_path / "run"))["student"]
    start = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    for name, value in start.items():  # bit-identical while the heads learn
        assert torch.equal(waiting[name], value)
    assert not torch.equal(waiting["dino_head.mlp.0.weight"], after["dino_head.mlp.0.weight"])
    moved = [not torch.equal(after[name], value) for name, value in start.items()]
    assert any(moved)


# ---- one process against two, resumed against uninterrupted, accumulated against whole ----

PARITY = ["--koleo_loss_weight=0", "--drop_path_rate=0", "--max_iterations=4", "--eval_interval=0",
          "--generate_samples=false"]


@pytest.mark.parametrize("recipe", ["dinov2.py", "dinov3.py"])
def test_two_processes_equal_one(tmp_path, npz, recipe):
    """KoLeo is off, because by definition it takes neighbours from its own rank only."""
    extra = [f"--dataset_path={npz}", "--model_type=dinov2", *PARITY]
    alone = losses(run(str(tmp_path / "one"), *extra, configs=[recipe]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "train.py", f"config/{recipe}", *SHRUNK, *extra, f"--out_dir={tmp_path}/two",
               f"--cache_dir={tmp_path}/cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    two = losses(log(str(tmp_path / "two")))
    difference = (alone - two).abs()
    assert (difference <= 1e-5 * alone.abs()).all(), difference.max()


@pytest.mark.parametrize("recipe", RECIPES)
def test_resumed_equals_uninterrupted_bitwise(tmp_path, npz, monkeypatch, recipe):
    extra = [f"--dataset_path={npz}", "--model_type=dinov2", "--drop_path_rate=0.3",
             "--max_iterations=6", "--num_workers=1", "--mixed_precision=bf16"]
    whole = run(str(tmp_path / "whole"), *extra, configs=[recipe])
    update, calls = EMATeacher.update, []

    def stop_after_three(ema, *args):  # by a signal, in the middle of an epoch
        update(ema, *args)
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(EMATeacher, "update", stop_after_three)
        run(str(tmp_path / "parts"), *extra, configs=[recipe])
    assert state(str(tmp_path / "parts"))["iteration"] == 3
    parts = run(str(tmp_path / "parts"), *extra, f"--resume_from={tmp_path}/parts",
                configs=[recipe])
    a, b = state(str(tmp_path / "whole")), state(str(tmp_path / "parts"))
    for key in ("student", "ema", "optimizer", "centers", "iteration"):
        assert_same(a[key], b[key])
    names = [f"000000{n}-attention.png" for n in (0, 2, 4, 6)]
    for name in [*names, "crops.png"]:
        whole_one = (tmp_path / "whole/samples" / name).read_bytes()
        assert whole_one == (tmp_path / "parts/samples" / name).read_bytes(), name
    assert sorted(os.listdir(tmp_path / "parts/samples")) == [*names, "crops.png"]
    assert torch.equal(losses(whole), losses(parts))
    logged = [record["iteration"] for record in parts]
    assert logged == [record["iteration"] for record in whole]


def test_accumulated_equals_whole(tmp_path, npz):
    """With centering, micro-batches change nothing: the targets do not depend on the batch, and the
    center moves once."""
    extra = [f"--dataset_path={npz}", *PARITY]
    tables = []
    for steps in (1, 4):
        records = run(str(tmp_path / f"{steps}"), *extra, f"--gradient_accumulation_steps={steps}",
                      configs=["dinov1.py"])
        tables.append(losses(records))
    assert torch.allclose(*tables, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_memory_only(tmp_path, npz, family):
    extra = [f"--dataset_path={npz}", f"--model_type={family}", *PARITY]
    plain = losses(run(str(tmp_path / "plain"), *extra, configs=["dinov2.py"]))
    saved = losses(run(str(tmp_path / "saved"), *extra, "--activation_checkpointing=true",
                       configs=["dinov2.py"]))
    assert torch.allclose(plain, saved, rtol=1e-5)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None,
                    reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_equals_eager(tmp_path, npz):
    """Forward, backward and the teacher's pass. One block and one crop size, because every graph
    takes the compiler seconds."""
    extra = [f"--dataset_path={npz}", "--num_hidden_layers=1", "--local_crops_number=0",
             "--gram_loss_weight=0", "--eval_interval=0", "--freeze_backbone_iterations=0",
             "--max_iterations=2"]
    plain = losses(run(str(tmp_path / "plain"), *extra, configs=["dinov2.py"]))
    compiled = losses(run(str(tmp_path / "compiled"), *extra, "--compile=true",
                          configs=["dinov2.py"]))
    assert torch.allclose(plain, compiled, rtol=1e-5)
    assert not torch.equal(plain[0], plain[1])


class Largest(TorchDispatchMode):
    """Records the largest number of elements that any operation returned, backward and optimizer
    included."""

    elements, shape = 0, ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if torch.is_tensor(tensor) and tensor.numel() > self.elements:
                self.elements, self.shape = tensor.numel(), tuple(tensor.shape)
        return result


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_no_tensor_of_all_patches_and_all_prototypes(tmp_path, npz, centering):
    """[B,P,K] would be gigabytes for 65536 prototypes: heads see CLS and masked patches only, and
    no loss spreads them out again. The largest are their logits, [(V+L)*B+M,K] with M masked
    patches of V*B*P."""
    B, V, L, P, K = 8, 2, 2, 16, 4096
    with Largest() as largest:
        run(str(tmp_path / "run"), f"--dataset_path={npz}", f"--dino_head_out_dim={K}",
            f"--ibot_out_dim={K}", "--max_iterations=2", "--generate_samples=false",
            f"--centering={centering}", "--ibot_separate_head=false", configs=["dinov2.py"])
    assert (V + L) * B * K < largest.elements < B * P * K
    assert largest.shape[1] == K


def test_resume_refuses_another_shape_and_prints_other_changes(tmp_path, npz, capsys):
    out, data = str(tmp_path / "run"), f"--dataset_path={npz}"
    run(out, data)
    with pytest.raises(UserError, match=r"dino_head_out_dim: checkpoint 64, now 32"):
        run(out, data, f"--resume_from={out}", "--dino_head_out_dim=32")
    run(out, data, "--resume_from=auto", "--max_iterations=4", "--weight_decay_end=0.3")
    assert "max_iterations: 3 -> 4" in capsys.readouterr().out
    assert state(out)["iteration"] == 4


def test_an_earlier_run_is_kept(tmp_path, npz, capsys):
    first = run(str(tmp_path / "run"), f"--dataset_path={npz}", "--max_iterations=1")
    run(str(tmp_path / "run"), f"--dataset_path={npz}", "--max_iterations=2")
    assert log(str(tmp_path / "run.1")) == first and "moved to" in capsys.readouterr().out


def test_the_resolved_config_runs_again(tmp_path, npz):
    first = run(str(tmp_path / "run"), f"--dataset_path={npz}")
    module = load_train()
    argv = [f"{tmp_path}/run/config.py", f"--out_dir={tmp_path}/again"]
    module.main(override(vars(module), module.config_keys, argv))
    assert torch.equal(losses(first), losses(log(str(tmp_path / "again"))))


# ---- kinds of data ----

def test_folders_rgb_and_flat(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "classes" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 120, (50 + i, 44, 3))
        image = noise + [100 * (i % 2), 0, 0]
        image = image.astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(tmp_path / "flat" / f"{i}.jpg")
    records = run(str(tmp_path / "c"), f"--dataset_path={tmp_path}/classes")
    assert records[0]["knn_accuracy"] >= 0
    assert "22 train images, 3 channel(s)" in capsys.readouterr().out
    assert Image.open(tmp_path / "c/samples/crops.png").size[0] > 300
    records = run(str(tmp_path / "f"), f"--dataset_path={tmp_path}/flat")
    assert "knn_accuracy" not in records[-1] and "no labels" in capsys.readouterr().out
    # without labels the last teacher is exported
    exported = AutoModel.from_pretrained(tmp_path / "f/checkpoints/best/hf")
    assert exported.config.num_channels == 1


def test_label_guided_crops_are_further_local_crops(tmp_path, npz):
    """At this temperature the student's prediction is uniform, so a term is its share of ln K."""
    records = run(str(tmp_path / "run"), f"--dataset_path={npz}", "--label_guided_crops_number=2",
                  "--student_temp=1000")
    table = losses(records)
    assert all(record["label_guided_loss"] == 0 for record in records if "loss" in record)
    # 2 * (2 + 2) of the 10 pairs have a local or guided crop
    uniform = math.log(64) * torch.tensor([1, 0.8, 0.2], dtype=torch.float64)
    for row in table:
        assert torch.allclose(row[:3], uniform, rtol=1e-3)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_guided_crops_of_the_teacher_are_targets_of_global_and_other_guided_crops(centering):
    """Against the plain double loop. The random local crops have no part in it, and the targets
    from global crops are as before."""
    config = config_of(load_train())
    V, L, G, B, K = 2, 5, 3, 4, 7
    vars(config).update(global_crops_number=V, label_guided_crops_number=G, centering=centering,
                        label_guided_loss_weight=0.7, dino_head_loss_weight=0.0)
    generator = torch.Generator().manual_seed(0)

    def logits(n_crops):
        return torch.randn(n_crops * B, K, generator=generator)
    teacher_out = dict(global_logits=logits(V), local_logits=logits(G))
    centers = dict(dino=torch.randn(1, K, generator=generator))
    targets = dino.make_targets(teacher_out, centers, 0.1, config)
    only_global = dict(global_logits=teacher_out["global_logits"])
    alone = dino.make_targets(only_global, centers, 0.1, config)
    assert torch.equal(targets["dino"], alone["dino"]) and "guided" not in alone
    if centering == "centering":
        centered = (teacher_out["local_logits"] - centers["dino"]) / 0.1
        expected = centered.softmax(dim=-1).view(G, B, K)
        torch.testing.assert_close(targets["guided"], expected)
    student_out = dict(global_logits=logits(V), local_logits=logits(L))
    guided = student_out["local_logits"].view(L, B, K)[-G:]
    whole = student_out["global_logits"].view(V, B, K)

    def mean_over(crops, same):
        """same: crop s is crop t of the teacher."""
        pairs = []
        for t in range(G):
            for s in range(len(crops)):
                if same and s == t:
                    continue
                log_probs = (crops[s] / config.student_temp).log_softmax(dim=-1)
                products = targets["guided"][t] * log_probs
                pairs.append(-products.sum(dim=-1).mean())
        return torch.stack(pairs).mean()
    total, terms = dino.compute_losses(student_out, targets, None, None, config)
    expected = mean_over(whole, False) + mean_over(guided, True)
    torch.testing.assert_close(terms["label_guided_loss"], expected)
    torch.testing.assert_close(total, 0.7 * terms["label_guided_loss"])


def test_what_the_teacher_sees_of_guided_crops_is_the_last_of_the_local_crops(tmp_path, npz,
                                                                              monkeypatch):
    """The teacher gets the global crops and the guided ones and no others, and the guided loss
    counts."""
    forward, seen = Student.forward, []

    def watch(self, global_crops, local_crops=None, *args, **kwargs):
        seen.append(local_crops)
        return forward(self, global_crops, local_crops, *args, **kwargs)
    monkeypatch.setattr(Student, "forward", watch)
    records = run(str(tmp_path / "run"), f"--dataset_path={npz}", "--local_crops_number=1",
                  "--label_guided_crops_number=2", "--label_guided_loss_weight=1")
    teacher_saw, student_saw = seen[0], seen[1]
    B = len(student_saw) // 3
    assert len(teacher_saw) == 2 * B and torch.equal(teacher_saw, student_saw[B:])
    assert all(record["label_guided_loss"] > 0 for record in records if "loss" in record)


def test_unreadable_image_is_named_or_skipped(tmp_path, capsys):
    for i in range(8):
        image = np.full((40, 40), 20 * i, np.uint8)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"not a picture")
    extra = [f"--dataset_path={tmp_path}", "--image_mean=0.5", "--image_std=0.25",
             "--intensity_range=0,255", "--num_workers=1"]
    with pytest.raises(UserError, match=r"5\.png: cannot be read"):
        run(str(tmp_path / "out" / "a"), *extra)
    run(str(tmp_path / "out" / "b"), *extra, "--on_bad_image=skip")
    assert "1 image(s) could not be read" in capsys.readouterr().out


# ---- what it says when something is wrong ----

@pytest.mark.parametrize("argv, message", [
    (["--global_crops_size=36"],
     r"global_crops_size=36 is not a multiple of patch_size=8 of vit; use 32 or 40"),
    (["--dataset_path=nowhere"], r"dataset_path='nowhere' does not exist; give 'phantom'"),
    (["--num_channels=3"],
     r"images have 1 channel\(s\), num_channels=3; set --num_channels=1"),
    (["--gradient_accumulation_steps=3"],
     r"gradient_accumulation_steps=3 does not divide the 8 images of a rank"),
    (["--centering=sinkhorn"],
     r"centering='sinkhorn': choose one of centering, sinkhorn_knopp"),
    (["--teacher_temp=0", "--local_crops_scale=0.5,0.1"],
     r"local_crops_scale=\(0.5, 0.1\): needs low <= high\n.*teacher_temp=0.0: must be in"),
    (["--ibot_loss_weight=1", "--ibot_out_dim=32"],
     r"ibot_out_dim=32, dino_head_out_dim=64: a shared head has one size"),
    (["--model_type=vit", "--use_pretrained=true"], r"is a family and has no weights"),
    (["--resume_from=nowhere"], r"resume_from='nowhere': no checkpoint there"),
    (["--mixed_precision=fp16"], r"mixed_precision='fp16' on cpu"),
    (["--image_mean=0.1,0.2"], r"image_mean=\(0.1, 0.2\): the images have 1 channel\(s\)"),
    (["--dino_head_loss_weight=0"], r"the weights of all losses are 0"),
    (["--hidden_size=32", "--num_attention_heads=5"], r"hidden_size=32 is not a multiple of"),
    (["--model_type=dinov3_vit", "--num_attention_heads=16"], r"a multiple of 4 dimensions"),
    (["--pos_embed_rescale=0.5"], r"so it is 1 at least, or 0 = off"),
    (["--label_guided_loss_weight=1"],
     r"label_guided_loss_weight=1.0 with label_guided_crops_number=0"),
    (["--koleo_loss_weight=0.1", "--gradient_accumulation_steps=8"],
     r"koleo_loss_weight needs 2 images to compare, there is 1 "),
])
def test_bad_input_is_one_clear_error(tmp_path, npz, argv, message):
    with pytest.raises(UserError, match=message):
        run(str(tmp_path / "run"), f"--dataset_path={npz}", *argv)


def test_command_line_errors_come_together_without_traceback():
    argv = ["--teacher_tmp=0.07", "--max_iterations=1.5", "--out_dir", "config/phantm.py"]
    result = subprocess.run([sys.executable, "train.py", *argv], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    for text in ("unknown key 'teacher_tmp', did you mean 'teacher_temp'?",
                 "max_iterations = 1.5 (float), needs int", "did you mean config/phantom.py?",
                 "--out_dir has no value"):
        assert text in result.stderr


def test_help_prints_the_block():
    result = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True,
                            text=True)
    module = load_train()
    assert result.returncode == 0
    for key in module.config_keys:
        assert f"\n{key} = " in result.stdout
    assert result.stdout.index("# ---- data ----") < result.stdout.index("# ---- optimizer ----")


def test_batch_that_ranks_cannot_share(tmp_path, npz, monkeypatch):
    module = load_train()
    monkeypatch.setattr(module, "world_size", lambda: 3)
    message = r"global_batch_size=8 cannot be shared by 3 ranks; use a multiple, like 9"
    with pytest.raises(UserError, match=message):
        run(str(tmp_path / "run"), f"--dataset_path={npz}", module=module)


def test_non_finite_loss_touches_nothing(tmp_path, npz, monkeypatch):
    compute_losses, calls = dino.compute_losses, []

    def poisoned(*args):
        total, terms = compute_losses(*args)
        calls.append(1)
        if len(calls) < 3:
            return total, terms
        return total * float("nan"), dict(terms, dino_global_loss=total * float("nan"))
    monkeypatch.setattr(dino, "compute_losses", poisoned)
    message = (r"loss is nan at iteration 2 \(.*dino_global_loss nan.*\), lr .*Its images: "
               r"\[\d+, ")
    with pytest.raises(UserError, match=message) as error:
        run(str(tmp_path / "run"), f"--dataset_path={npz}", "--max_iterations=6")
    named = str(error.value).split("[")[1].split(",")
    assert len(named) == 8  # every image of the batch
    saved = state(str(tmp_path / "run"))
    assert saved["iteration"] == 2
    assert all(torch.isfinite(value).all() for value in saved["ema"].values())


def test_a_tiny_set_is_overfitted(tmp_path, npz):
    """20 slices, hardly augmented. The loss falls far below ln K, so the student learns what the
    teacher says."""
    records = run(
        str(tmp_path / "run"), f"--dataset_path={npz}", "--max_iterations=100", "--lr=3e-3",
        "--momentum_teacher=0.9", "--freeze_last_layer=0", "--warmup_iterations=5",
        "--centering=sinkhorn_knopp", "--global_batch_size=20", "--global_crops_scale=0.9,1",
        "--local_crops_number=0", "--blur_probability=0,0,0", "--horizontal_flip=0",
        "--vertical_flip=0", "--koleo_loss_weight=0.1", "--eval_interval=0",
        "--weight_decay_end=0.04", "--log_interval=20")
    assert records[-1]["dino_global_loss"] < 0.9 * np.log(64)
    assert records[-1]["rankme"] > 2
