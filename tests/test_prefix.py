"""prefix.py: a run that keeps what frozen blocks compute trains as one that computes it again."""
import itertools

import numpy as np
import pytest
import torch

import features
import model
import prefix
from data import load_dataset
from loader import BatchOrder
from phantom import make_phantom
from prefix import KnownViews
from tests_support import assert_same, log, losses, run, state

FLAGS = ["--local_crops_number=0", "--freeze_backbone_layers=1", "--fixed_views=2",
         "--max_iterations=12", "--eval_interval=0", "--saveckp_freq=6", "--koleo_loss_weight=0.1"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    arrays = {}
    for seed, (split, n) in enumerate(dict(train=16, val=8, test=8).items()):
        for key, value in make_phantom(n, 48, seed).items():
            arrays[f"{split}_{key}"] = value
    path = tmp_path_factory.mktemp("data") / "phantom.npz"
    np.savez_compressed(path, **arrays)
    return f"--dataset_path={path}"


class Fp32Cache(prefix.PrefixCache):
    """It keeps tokens as they are: `half` of a subclass of torch.Tensor would round them."""

    def __call__(self, *args):
        half, torch.Tensor.half = torch.Tensor.half, torch.Tensor.float
        try:
            return super().__call__(*args)
        finally:
            torch.Tensor.half = half


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov2_with_registers", "dinov3_vit"])
@pytest.mark.parametrize("extra", [[], ["--gram_loss_weight=1", "--gram_teacher=start",
                                        "--gram_crops_size=0"]], ids=["plain", "gram"])
def test_kept_tokens_give_the_losses_of_computed_ones(tmp_path, npz, monkeypatch, family, extra):
    """To the bit while all tokens are fp32; to fp16's rounding as users run it. The loader cuts
    every view once: 16 images, 2 views."""
    flags = [npz, *FLAGS, *extra, f"--model_type={family}"]
    rounded = losses(run(tmp_path / "rounded", *flags))
    cut, crops = [], prefix.PrefixCache.__call__

    def count(self, batch, *args):
        cut.extend(batch["row"][i] for i in batch["fresh"])
        return crops(self, batch, *args)
    monkeypatch.setattr(prefix.PrefixCache, "__call__", count)
    run(tmp_path / "counted", *flags)
    assert sorted(cut) == list(range(32))
    monkeypatch.setattr(prefix, "PrefixCache", Fp32Cache)
    monkeypatch.setattr(prefix.PrefixCache, "__call__", Fp32Cache.__call__)
    kept = losses(run(tmp_path / "kept", *flags))
    monkeypatch.setattr(prefix, "why_not", lambda *args: "of the test")
    computed = losses(run(tmp_path / "computed", *flags))
    assert torch.equal(kept, computed)
    assert torch.allclose(rounded, computed, rtol=2e-3)
    assert not torch.equal(rounded, computed)


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path, npz):
    """It computes the views anew that the uninterrupted run has kept."""
    whole = tmp_path / "whole"
    run(whole, npz, *FLAGS)
    out = tmp_path / "resumed"
    run(out, npz, *FLAGS, f"--resume_from={whole}/checkpoints/0000006")
    assert_same(state(out)["ema"], state(whole)["ema"])
    assert torch.equal(losses(log(out)), losses(log(whole)))


class Views:
    """What KnownViews asks of a loader.CropDataset: 4 images, 2 views by turns."""
    def view(self, n):
        return n // 4 % 2


def test_a_view_is_known_after_its_batch():
    def known(n_images, batch_size, n_batches):
        order = BatchOrder(n_images, batch_size, 1, 0, 1, 0, n_batches, seed=0, shuffle=False)
        return [sample[2] for sample in itertools.chain(*KnownViews(order, Views()))]
    assert known(4, 2, 8) == [False] * 8 + [True] * 8  # two epochs cut the views, two know them
    assert known(4, 8, 2) == [False] * 8 + [True] * 8  # a batch of two epochs
    assert known(1, 2, 2) == [False, False, True, True]  # twice in one batch: both are cut


@pytest.mark.parametrize("flag, reason", [
    ("--freeze_backbone_layers=0", "embeddings or the first block are trained"),
    ("--freeze_backbone_until=3", "embeddings or the first block are trained"),
    ("--local_crops_number=2", "local and guided crops are not kept"),
    ("--ibot_loss_weight=1", "masks of ibot_loss_weight"),
    ("--min_foreground=0.1", "other crops each time")])
def test_what_cannot_be_kept_is_said_and_trained_all_the_same(tmp_path, npz, capsys, flag, reason):
    records = run(tmp_path / "run", npz, *FLAGS, "--max_iterations=2", flag)
    assert reason in capsys.readouterr().out
    assert torch.isfinite(losses(records)).all()


def test_a_cache_larger_than_half_of_the_memory_is_refused(tmp_path, npz, monkeypatch):
    monkeypatch.setattr(prefix, "memory_gb", lambda device: (0.0, 1e-4))
    with pytest.raises(prefix.UserError, match="fixed_views=2 of 16 images would keep 0.0 GB"):
        run(tmp_path / "run", npz, *FLAGS)


@pytest.mark.parametrize("limit, n_read", [(1e9, 0), (1000, 8)])
def test_kept_features_are_those_of_all_blocks(npz, monkeypatch, limit, n_read):
    """To the bit, for a network whose last block has moved since. What is too large for the memory
    is not kept: all images are read again."""
    monkeypatch.setattr(features, "MOST_KEPT_BYTES", limit)
    backbone = model.build_backbone("dinov2", False, 3, hidden_size=32, num_hidden_layers=3,
                                    num_attention_heads=2, patch_size=16).eval()
    dataset = load_dataset(npz.partition("=")[2], "test")
    settings = dict(size=48, mean=(0.5,) * 3, std=(0.2,) * 3, block_numbers=[0, 2], batch_size=3)
    kept, read = features.KeptTokens(2), []
    features.collect_features(backbone, dataset, kept=kept, **settings)
    with torch.no_grad():
        for param in model.blocks(backbone)[2].parameters():
            param.mul_(1.5)
    item = features.WholeImages.item
    monkeypatch.setattr(features.WholeImages, "item",
                        lambda self, i: read.append(i) or item(self, i))
    found = features.collect_features(backbone, dataset, kept=kept, **settings)
    assert len(read) == n_read and (kept.n_bytes > limit) == (n_read > 0)
    computed = features.collect_features(backbone, dataset, **settings)
    for key in ("features", "readout"):
        assert torch.equal(found[key], computed[key])


def test_what_is_measured_is_the_same_with_kept_tokens(tmp_path, npz, monkeypatch):
    """k-NN, the numbers without labels and the choice at the end, of a run with a frozen block."""
    flags = [npz, "--freeze_backbone_layers=1", "--max_iterations=4", "--eval_interval=2"]
    kept = run(tmp_path / "kept", *flags)
    filled = []
    add = features.KeptTokens.add
    monkeypatch.setattr(features.KeptTokens, "add",
                        lambda self, *args: filled.append(self.n_blocks) or add(self, *args))
    again = run(tmp_path / "again", *flags)
    assert set(filled) == {1}
    monkeypatch.setattr("prefix.n_frozen_blocks", lambda *args: 0)
    filled.clear()
    computed = run(tmp_path / "computed", *flags)
    assert not filled

    def measured(records):
        keys = "iteration", "knn_accuracy", "label_free"
        return [[record.get(key) for key in keys] for record in records]
    assert measured(kept) == measured(again) == measured(computed)
    assert measured(kept)[0][1] is not None
