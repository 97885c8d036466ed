"""candidates.py: what a run hands back is a mixture of its start and its end, chosen on val."""
import json
import os

import numpy as np
import pytest
import torch

import candidates
import embed
from augment import Photometrics, resize_center
from candidates import choose, choose_without_labels, find_candidates, mix, read_values
from configurator import override
from data import load_dataset
from loader import measure_intensities
from model import build_backbone, forward_features
from phantom import make_phantom
from tests_support import TINY, load_script, run, state

FLAGS = ["--use_pretrained=true", "--freeze_backbone_iterations=0", "--max_iterations=4",
         "--saveckp_freq=100", "--image_mean=0.5", "--image_std=0.25", "--momentum_teacher=0.1",
         "--final_momentum_teacher=0.1"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Flags of a data set and of released weights."""
    folder = tmp_path_factory.mktemp("sources")
    arrays = {}
    for seed, (split, n) in enumerate(dict(train=48, val=24, test=8).items()):
        for key, value in make_phantom(n, 48, seed).items():
            arrays[f"{split}_{key}"] = value
    np.savez_compressed(folder / "phantom.npz", **arrays)
    torch.manual_seed(1)
    build_backbone("dinov2", False, 1, **TINY).save_pretrained(folder / "start")
    return [f"--dataset_path={folder}/phantom.npz", f"--model_type={folder}/start"]


def row(knn_loss, probe_loss, train_loss=1.0, blocks=(1,)):
    return dict(blocks=list(blocks), knn=0.5, probe=0.5, knn_loss=knn_loss, probe_loss=probe_loss,
                train_loss=train_loss)


def test_the_choice_has_the_lowest_losses_of_those_that_harm_nothing():
    start = [row(1.0, 1.0), row(0.9, 0.9)]
    better = [row(0.8, 0.9), row(0.9, 0.8)]  # sum 3.4
    best_sum = [row(0.1, 0.2), row(0.1, 0.91)]  # its probe on the second readout is worse
    best = [row(0.7, 0.9), row(0.8, 0.8)]  # sum 3.2
    assert choose([start, better, best_sum, best]) == (3, 0)  # readouts: 1.6 = 1.6, the first
    assert choose([start, best_sum]) == (0, 1)  # the start, with its better readout
    assert choose([start, start]) == (0, 1)  # equal losses: the start
    assert choose([start, [row(1.0, 1.0), row(0.9, 0.5)]]) == (1, 1)
    assert choose([start, [row(0.5, 0.5, 1.01), row(0.5, 0.5)]]) == (0, 1)  # worse within train


def test_without_labels_it_is_half_of_the_way_unless_that_is_worse():
    start, more, less = (dict(images=100, retrieval=share) for share in (0.5, 0.53, 0.4))
    for half, chosen in ((start, 2), (more, 2), (less, 0)):
        assert choose_without_labels([start, less, half, more, less]) == chosen


def test_a_mixture_is_a_straight_line_and_scales_lora():
    start, end = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert mix("backbone.x.weight", start, end, 0.25).tolist() == [1.5, 1.0]
    assert mix("backbone.x.weight", start, end, 1.0) is end
    A_start, A, B = torch.randn(2, 5), torch.randn(2, 5), torch.randn(3, 2)
    mixed_A = mix("backbone.q.lora_A.default.weight", A_start, A, 0.25)
    mixed_B = mix("backbone.q.lora_B.default.weight", torch.zeros(3, 2), B, 0.25)
    assert torch.allclose(mixed_B @ mixed_A, 0.25 * B @ A)


def test_best_is_a_candidate_unless_it_is_the_start_or_the_end():
    names = [name for name, _, _ in find_candidates(best_iteration=100, end_iteration=150)]
    assert names == ["start", "0.75 start + 0.25 end", "0.5 start + 0.5 end",
                     "0.25 start + 0.75 end", "end", "iteration 100"]
    assert len(find_candidates(0, 150)) == len(find_candidates(150, 150)) == 5


def exported(out, folder="best"):
    return build_backbone(f"{out}/checkpoints/{folder}/hf", True, 1).eval()


@pytest.mark.parametrize("extra, wanted", [
    ([], 2), (["--use_lora=true", "--lora_dropout=0", "--lr=0.1"], 2), ([], 0), ([], 4)],
    ids=["half", "lora", "start", "end"])
def test_what_is_exported_is_the_chosen_mixture(tmp_path, sources, monkeypatch, capsys, extra,
                                                wanted):
    """Its weights are the mixture of the start's and the end's, computed here from the exports;
    last/hf stays the end; the state to resume is untouched."""
    monkeypatch.setattr(candidates, "choose", lambda rows: (wanted, 1))
    out = tmp_path / "run"
    run(out, *sources, *FLAGS, *extra)
    share = wanted / 4
    start = build_backbone(sources[1].split("=")[1], True, 1).eval()
    end, best = exported(out, "last"), exported(out)
    moved = 0.0
    for name, value in best.state_dict().items():
        if "mask_token" in name:
            continue
        first, last = start.state_dict()[name], end.state_dict()[name]
        assert torch.allclose(value, first + share * (last - first), atol=1e-6), name
        moved += float((last - first).abs().sum())
    assert moved > 0.5  # the run has moved the weights
    choice = json.loads((out / "checkpoints/best/choice.json").read_text())
    summary = json.loads((out / "results/summary.json").read_text())
    assert choice == summary["handed_back"] and choice["share"] == share
    script = load_script("export")
    argv = [f"--model={out}", f"--output={tmp_path}/hf"]
    script.main(override(vars(script), script.config_keys, argv))
    for name, value in build_backbone(f"{tmp_path}/hf", True, 1).state_dict().items():
        assert torch.equal(value, best.state_dict()[name]) or "mask_token" in name, name
    assert embed.read_choice(str(out))["blocks"] == choice["blocks"] == [0, 1]
    card = (out / "checkpoints/best/hf/README.md").read_text()
    assert choice["candidate"] in card and choice["table"] in card
    printed = capsys.readouterr().out
    assert f"handed back: {choice['candidate']}" in printed
    bold = next(line for line in choice["table"].splitlines() if "**" in line)
    assert bold.split("|")[3].strip() == f"{choice['knn']['val']:.3f}"
    assert f"val {summary['start']:.3f} -> {choice['knn']['val']:.3f}" in printed
    ema, last = state(out)["ema"], read_values(f"{out}/checkpoints/last/state.pt")
    assert all(torch.equal(last[name], value) for name, value in ema.items() if name in last)


def test_the_losses_that_choose_are_those_of_a_plain_computation(tmp_path, sources, monkeypatch):
    """k-NN loss and 5-NN of the start, by loops over cosines."""
    seen = []
    monkeypatch.setattr(candidates, "choose", lambda rows: seen.append(rows) or (0, 0))
    run(tmp_path / "run", *sources, *FLAGS)
    rows = seen[0]
    path = sources[0].split("=")[1]
    start = build_backbone(sources[1].split("=")[1], True, 1).eval()
    features = {}
    with np.load(path) as arrays, torch.no_grad():
        train = load_dataset(path, "train")
        value_range, _, _ = measure_intensities(train)
        plain = Photometrics("medical", value_range, (0.5,), (0.25,))
        for split in ("train", "val"):
            images = [resize_center(image[..., None], 32) for image in arrays[f"{split}_images"]]
            cls, _ = forward_features(start, plain.plain(torch.stack(images)))
            features[split] = torch.nn.functional.normalize(cls, dim=1)
        labels = {split: arrays[f"{split}_labels"].ravel() for split in features}
    losses, correct = [], []
    for x, label in zip(features["val"], labels["val"]):
        cosines = (features["train"] @ x).numpy()
        nearest = np.argsort(-cosines)[:20]
        weights = np.exp(cosines[nearest] / 0.07)
        share = weights[labels["train"][nearest] == label].sum() / weights.sum()
        losses.append(-np.log(max(share, 0.02)))
        votes = labels["train"][nearest[:5]]
        counts = np.bincount(votes)
        tied = np.flatnonzero(counts == counts.max())
        correct.append(next(vote for vote in votes if vote in tied) == label)
    assert rows[0][0]["knn_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    within, x, label = [], features["train"].numpy(), labels["train"]
    for i in range(len(x)):
        cosines = x @ x[i]
        nearest = [j for j in np.argsort(-cosines) if j != i][:20]
        weights = np.exp(cosines[nearest] / 0.07)
        share = weights[label[nearest] == label[i]].sum() / weights.sum()
        within.append(-np.log(max(share, 0.02)))
    assert rows[0][0]["train_loss"] == pytest.approx(np.mean(within), rel=1e-4)
    assert rows[0][0]["knn"] == pytest.approx(np.mean(correct))


def test_a_run_from_scratch_hands_back_its_best(tmp_path, sources):
    run(tmp_path / "run", sources[0], "--max_iterations=3")
    assert not os.path.exists(tmp_path / "run/checkpoints/start")
    assert not os.path.exists(tmp_path / "run/checkpoints/best/choice.json")


def test_a_finished_run_that_is_resumed_keeps_its_choice(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(candidates, "choose", lambda rows: (2, 0))
    out = tmp_path / "run"
    run(out, *sources, *FLAGS)
    before = {name: value.clone() for name, value in exported(out).state_dict().items()}
    run(out, *sources, *FLAGS, "--resume_from=auto")
    for name, value in exported(out).state_dict().items():
        assert torch.equal(before[name], value)
    run(out, *sources, *FLAGS, "--max_iterations=6", "--resume_from=auto")  # and on
    choice = json.loads((out / "checkpoints/best/choice.json").read_text())
    assert choice["iteration"] == 6


def test_a_run_that_goes_on_elsewhere_has_the_same_start(tmp_path, sources):
    """And not the export of what the first run has handed back at its end."""
    run(tmp_path / "a", *sources, *FLAGS, "--saveckp_freq=2")
    whole = json.loads((tmp_path / "a/checkpoints/best/choice.json").read_text())
    run(tmp_path / "b", *sources, *FLAGS, "--saveckp_freq=2",
        f"--resume_from={tmp_path}/a/checkpoints/0000002")
    assert json.loads((tmp_path / "b/checkpoints/best/choice.json").read_text()) == whole
    for name, value in exported(tmp_path / "a").state_dict().items():
        assert torch.equal(value, exported(tmp_path / "b").state_dict()[name])
