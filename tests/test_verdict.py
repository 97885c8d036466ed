"""verdict.py: what is measured without labels, the verdict, and whole runs without labels."""
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import metrics
import verdict
from augment import MultiCrop, Photometrics, resize_center
from configurator import UserError, override
from data import Dataset
from distributed import autocast_for
from loader import hold_out
from model import blocks, forward_features, used_features
from positions import position_r2
from tests_support import SHRUNK, assert_same, load_script, load_train, run, state
from verdict import VIEWS, LabelFree, judge, score

INPUTS = dict(intensity_range=(0.0, 255.0), mean=(0.5,) * 3, std=(0.25,) * 3)
NAMES = {"images", "retrieval", "lidar", "rankme", "uniformity", "alignment", "silhouette"}


def config_of(**changes):
    keys = dict(seed=3, global_crops_size=32, num_workers=0, on_bad_image="error")
    return SimpleNamespace(**keys | changes)


def made_up(n=22, **more):
    images = np.random.default_rng(0).integers(0, 255, (n, 40, 36, 3)).astype(np.uint8)
    return Dataset(images, name="made up", **more)


def label_free(dataset, train_set=None, **changes):
    autocast = autocast_for(torch.device("cpu"), "no")
    return LabelFree(dataset, train_set, config_of(**changes), INPUTS, autocast)


# ---- numbers ----

def test_numbers_are_those_of_views_made_by_hand(tiny_backbone):
    backbone, dataset = tiny_backbone("dinov2").eval(), made_up()
    keys = dict(augmentation="medical", global_crops_scale=(0.3, 0.6), blur_probability=(0.5,) * 3)
    numbers = label_free(dataset, **keys).measure(backbone)
    multi_crop = MultiCrop(32, (0.3, 0.6), 1, local_crops_number=0)
    photometrics = Photometrics("medical", **INPUTS, blur_probability=(0.5,) * 3)
    x = torch.zeros(22, 3, 16)
    with torch.no_grad():
        for i in range(22):
            whole = photometrics.plain(resize_center(dataset[i][0], 32)[None])
            x[i, 0] = forward_features(backbone, whole)[0]
            for view in range(2):
                crop = multi_crop(dataset[i][0], None, np.random.default_rng((3, 6, i, view)))
                pixels = photometrics(crop["global_crops"], crop["global_seeds"],
                                      f"global{view % 2 + 1}")
                x[i, 1 + view] = forward_features(backbone, pixels)[0]
    views = x[:, 1], x[:, 2]
    expected = dict(images=22, retrieval=metrics.two_view_retrieval(*views),
                    lidar=metrics.lidar(x[:, 1:]),
                    rankme=metrics.rankme(x[:, 0]), uniformity=metrics.uniformity(x[:, 0]),
                    alignment=metrics.alignment(*views),
                    silhouette=metrics.silhouette(x[:, 0], 10, 3))
    assert set(numbers) == NAMES
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    assert json.loads(json.dumps(numbers)) == numbers
    assert label_free(dataset, **keys).measure(backbone) == numbers
    pixels = label_free(dataset).measure(None)
    assert set(pixels) == NAMES and pixels["lidar"] != numbers["lidar"]


def test_two_ranks_read_what_one_reads(tiny_backbone, monkeypatch):
    """Both have 13 of 25 images, one of them the other's, so that both call the network as often.
    Image 4 cannot be read, and neither can all of a batch."""
    backbone, dataset = tiny_backbone("vit").eval(), made_up(25)
    read = Dataset.__getitem__

    def broken(self, i):
        if i == 4 or i > 12:
            raise ValueError("broken")
        return read(self, i)
    monkeypatch.setattr(Dataset, "__getitem__", broken)
    with pytest.raises(UserError, match=r"made up, train image 4: cannot be used.*broken"):
        label_free(dataset).measure(backbone)
    measure = label_free(dataset, on_bad_image="skip")
    alone = measure.features(backbone, measure.held_out, 32, 2)
    assert alone[0].tolist() == [0, 1, 2, 3, *range(5, 13)] and alone[1].shape == (12, 3, 16)
    parts, calls = [], []
    monkeypatch.setattr(verdict, "world_size", lambda: 2)
    monkeypatch.setattr(verdict, "used_features",
                        lambda *args: calls.append(1) or used_features(*args))
    for gathered in (False, True):
        for number in (0, 1):
            def gather(part):
                if not gathered:
                    parts.append(part)
                    raise InterruptedError
                return parts
            monkeypatch.setattr(verdict, "rank", lambda: number)
            monkeypatch.setattr(verdict, "gather_objects", gather)
            try:
                rows, x = measure.features(backbone, measure.held_out, 32, 2)
            except InterruptedError:
                continue
            assert rows.tolist() == alone[0].tolist()
            torch.testing.assert_close(x, alone[1], atol=1e-5, rtol=1e-5)
    assert [len(rows) for rows, _ in parts] == [12, 1]  # of rank 1 only the last, image 0
    assert len(calls) == 4


def test_places_are_learned_from_train(tiny_backbone):
    backbone = tiny_backbone("vit").eval()
    volume, mm = np.repeat(np.arange(8), 6).astype(np.int32), np.tile(np.arange(6.) ** 2, 8)
    rng = np.random.default_rng(0)
    bright = 10 * mm[:, None, None, None]
    images = (bright + rng.integers(0, 5, (48, 32, 32, 3))).clip(0, 255).astype(np.uint8)
    dataset = Dataset(images, volume=volume, position_mm=mm.astype(np.float32))
    train, held_out = (dataset.subset(half, "v") for half in np.split(np.arange(48), 2))
    measure = label_free(held_out, train)
    numbers = measure.measure(backbone)
    x = measure.features(backbone, dataset, 32, 0)[1][:, 0]
    place = mm / 25
    expected = position_r2(x[:24], place[:24], volume[:24], x[24:], place[24:])
    assert numbers["position_r2"] == pytest.approx(expected, rel=1e-5) and expected > 0.5
    assert "position_r2" not in label_free(held_out).measure(backbone)
    one = dataset.subset(np.arange(6), "train")
    assert "position_r2" not in label_free(held_out, one).measure(backbone)


def test_the_views_have_the_defaults_of_train():
    module = load_train()
    assert VIEWS == {key: getattr(module, key) for key in VIEWS}


# ---- what is held out ----

def test_a_tenth_is_held_out_by_group_unless_it_would_say_nothing():
    train, held_out = hold_out(made_up(200), 0)
    assert (len(train), len(held_out)) == (180, 20) and "20 images, seed 0" in train.notes[-1]
    indices = set(train.images.indices) | set(held_out.images.indices)
    assert len(indices) == 200
    train, held_out = hold_out(made_up(190), 0)
    assert (len(train), len(held_out)) == (190, 0) and not label_free(held_out)
    assert label_free(held_out).measure(None) == {}
    groups = np.repeat(np.arange(6), 40)
    train, held_out = hold_out(made_up(240, groups=groups), 0)
    assert len(held_out) == 40 and not set(train.groups) & set(held_out.groups)
    train, held_out = hold_out(made_up(240, groups=groups // 3), 0)  # half of the images
    assert (len(train), len(held_out)) == (240, 0)


# ---- the verdict ----

START = dict(images=100, retrieval=0.5, lidar=20.0, rankme=9.0, uniformity=-2.0, alignment=0.5,
             silhouette=0.1)


@pytest.mark.parametrize("retrieval, lidar, word", [
    (0.6, 15, "cannot tell"), (0.4, 25, "worse"), (0.46, 15, "cannot tell"),
    (0.5, 20, "cannot tell"), (0.449, 20, "worse")])
def test_two_words_with_numbers(retrieval, lidar, word):
    now = dict(START, retrieval=retrieval, lidar=lidar)
    found, sentence = judge(START, now)
    assert found == word and sentence.startswith(f"{word}: ") and "100 held-out images" in sentence
    assert f"two-view retrieval 0.500 -> {retrieval:.3f}, LiDAR 20.000 -> {lidar:.3f}" in sentence
    assert score(now) == retrieval


def test_what_was_not_measured_cannot_be_told():
    for start, now in ((None, None), (None, START), (START, None)):
        assert judge(start, now)[0] == "cannot tell"
        assert "less than 20 images" in judge(start, now)[1]


# ---- whole runs ----

@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """A folder of 210 pictures without labels, in grey: discs of random size and place."""
    folder = tmp_path_factory.mktemp("flat") / "images"
    folder.mkdir()
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:32, :32]
    for i in range(210):
        cy, cx, radius, grey = rng.uniform((8, 8, 3, 100), (24, 24, 9, 250))
        disc = np.where((y - cy)**2 + (x - cx)**2 < radius**2, grey, rng.integers(0, 60))
        Image.fromarray(disc.astype(np.uint8)).save(folder / f"{i:03}.png")
    return str(folder)


def without_time(records):
    return [{key: value for key, value in record.items()
             if key not in ("images_per_second", "memory_gb")} for record in records]


def test_a_run_without_labels_resumed_is_the_uninterrupted_one(flat, tmp_path, capsys):
    flags = [f"--dataset_path={flat}", "--generate_samples=false", "--max_iterations=4"]
    records = run(str(tmp_path / "a"), *flags)
    text = capsys.readouterr().out
    assert "no val: a tenth of train, 21 images, seed 0, is held out" in text
    assert "189 train images" in text
    measured = {record["iteration"]: record["label_free"] for record in records
                if "label_free" in record}
    assert list(measured) == [0, 2, 4] and all(set(part) == NAMES for part in measured.values())
    summary = json.loads((tmp_path / "a/results/summary.json").read_text())
    assert summary["label_free"] == dict(start=measured[0], now=measured[4])
    word, sentence = judge(measured[0], measured[4])
    assert summary["verdict"] == word and sentence in text
    best = max(measured, key=lambda iteration: measured[iteration]["retrieval"])
    knn = state(tmp_path / "a")["knn"]
    assert knn["best_iteration"] == best and knn["best"] == measured[best]["retrieval"]
    assert state(tmp_path / "a", "best")["iteration"] == best
    card = (tmp_path / "a/checkpoints/best/hf/README.md").read_text()
    assert "Without labels, on held-out images" in card and "5-NN" not in card

    resumed = run(str(tmp_path / "b"), *flags, f"--resume_from={tmp_path}/a/checkpoints/0000002")
    assert without_time(resumed) == without_time(records)
    assert_same(state(tmp_path / "b")["student"], state(tmp_path / "a")["student"])
    assert state(tmp_path / "b")["knn"]["label_free"] == knn["label_free"]
    summary.update(minutes=0)
    again = json.loads((tmp_path / "b/results/summary.json").read_text())
    assert again["verdict"] == word and again["label_free"] == summary["label_free"]


def test_start_and_end_only(flat, tmp_path, capsys):
    records = run(str(tmp_path), f"--dataset_path={flat}", "--generate_samples=false",
                  "--eval_interval=0", "--max_iterations=2")
    assert [r["iteration"] for r in records if "label_free" in r] == [0, 2]
    said = [line for line in capsys.readouterr().out.split("\n") if line.startswith("without lab")]
    assert len(said) == 3 and "at iteration 0" in said[0]
    assert said[2].split(": ")[1] in ("better", "worse", "cannot tell")


def test_distill_says_it_too(flat, tmp_path, tiny_backbone, capsys):
    tiny_backbone("vit").save_pretrained(tmp_path / "teacher")
    script = load_script("distill")
    keys = script.config_keys
    shrunk = [flag for flag in SHRUNK if flag[2:].split("=")[0] in keys]
    script.main(override(vars(script), keys, [
        *shrunk, f"--distilled_model_type={tmp_path}/teacher", f"--dataset_path={flat}",
        f"--out_dir={tmp_path}/run", "--generate_samples=false", "--max_iterations=2",
        "--local_crops_number=0", "--objective=feature", "--distilled_statistics_views=32"]))
    summary = json.loads((tmp_path / "run/results/summary.json").read_text())
    assert set(summary["label_free"]["now"]) == NAMES
    assert f"the student at the end against its start: {summary['verdict']}: " in (
        capsys.readouterr().out)


def test_evaluate_needs_no_labels(flat, tmp_path, tiny_backbone, capsys):
    tiny_backbone("vit", 1).save_pretrained(tmp_path / "weights")
    script = load_script("evaluate")
    argv = [f"--model_type={tmp_path}/weights", f"--dataset_path={flat}", f"--out_dir={tmp_path}",
            "--image_size=32", "--num_workers=0", "--device=cpu", "--mixed_precision=no"]
    script.main(override(vars(script), script.config_keys, argv))
    text = (tmp_path / "results/images.md").read_text()
    assert "two-view retrieval" in text and "Without labels, on 21 images" in text
    assert "R2" not in text and os.path.isfile(tmp_path / "results/images.json")
    networks = json.loads((tmp_path / "results/images.json").read_text())["networks"]
    assert [set(network["results"]["test"]["label_free"]) for network in networks] == [NAMES] * 2


def test_kept_tokens_give_the_numbers_of_computed_ones(tiny_backbone, monkeypatch):
    """After the weights behind the frozen block have changed, too; no image is read again."""
    backbone, dataset = tiny_backbone("dinov2").eval(), made_up()
    autocast = autocast_for(torch.device("cpu"), "no")
    keeps = LabelFree(dataset, None, config_of(), INPUTS, autocast, n_frozen=1)
    assert keeps.measure(backbone) == label_free(dataset).measure(backbone)
    with torch.no_grad():
        for param in blocks(backbone)[1].parameters():
            param.mul_(1.5)
    changed = label_free(dataset).measure(backbone)
    monkeypatch.setattr(Dataset, "__getitem__", None)
    assert keeps.measure(backbone) == changed
