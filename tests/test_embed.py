"""embed.py: the numbers of evaluate.extract_features on disk, also after a kill; kept probes on new
images; and what it refuses."""
import csv
import errno
import json
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import store
from configurator import UserError, override
from data import load_dataset
from features import extract_features
from metrics import knn_classify
from model import build_backbone
from networks import weights_hash
from tests_support import TINY, load_script
from weights import pretrained_input


def embed(*argv):
    module = load_script("embed")
    flags = ["--num_workers=0", "--device=cpu", "--mixed_precision=no", "--batch_size=8"]
    module.main(override(vars(module), module.config_keys, [*flags, *argv]))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with cells/ (39 images in train and test, two classes), weights/ and other/."""
    folder = tmp_path_factory.mktemp("embed")
    rng = np.random.default_rng(0)
    for i in range(39):
        parent = folder / "cells" / ("test" if i % 3 == 0 else "train") / "ab"[i % 2]
        parent.mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 90, (36, 36, 3)) + 80 * (i % 2)
        Image.fromarray(image.astype(np.uint8)).save(parent / f"{i:02d}.png")
    for seed, name in enumerate(("weights", "other")):
        torch.manual_seed(seed)
        backbone = build_backbone("dinov2", False, 3, **{**TINY, "num_hidden_layers": 4})
        backbone.save_pretrained(folder / name)
        settings = dict(image_mean=[0.5] * 3, image_std=[0.25] * 3, size=dict(height=32, width=32))
        (folder / name / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def flags(place, output, *more):
    return [f"--model={place}/weights", f"--dataset_path={place}/cells",
            f"--cache_dir={place}/cache", f"--output={output}", *more]


def read(path):
    with np.load(path) as arrays:
        return dict(arrays)


# ---- the numbers ----

def test_the_numbers_are_those_of_extract_features_to_the_bit(place, tmp_path):
    embed(*flags(place, tmp_path / "f.npz", "--blocks=1,3", "--patches=true"))
    found = read(tmp_path / "f.npz")
    assert found["split"].tolist() == ["train"] * 26 + ["test"] * 13  # nothing is cut from train
    backbone = build_backbone(f"{place}/weights", True, 3).eval()
    expected = pretrained_input(f"{place}/weights")
    begin = 0
    for split in ("train", "test"):
        dataset = load_dataset(f"{place}/cells", split, cache_dir=f"{place}/cache", cut=False)
        features, labels = extract_features(backbone, dataset, size=32, mean=expected["mean"],
                                            std=expected["std"], batch_size=8)
        part = slice(begin, begin + len(dataset))
        assert np.array_equal(found["cls"][part], features.numpy())
        assert found["label"][part].tolist() == labels.tolist()
        assert found["image"][part].tolist() == [dataset.path(i) for i in range(len(dataset))]
        begin += len(dataset)
    assert found["patches"].dtype == np.float16 and found["patches"].shape == (39, 16, 16)
    means = found["patches"].astype(np.float32).mean(axis=1)
    np.testing.assert_allclose(found["patch_mean"], means, atol=2e-3)
    last = F.normalize(torch.from_numpy(found["cls"]), dim=1).numpy()
    np.testing.assert_allclose(found["readout"][:, 16:], last, atol=1e-6)
    assert found["class_names"].tolist() == ["a", "b"]
    settings = json.loads(str(found["settings"]))
    assert settings["model_hash"] == weights_hash(backbone) and settings["blocks"] == [1, 3]
    assert (settings["size"], settings["mean"], settings["std"]) == (32, [0.5] * 3, [0.25] * 3)
    assert settings["intensity_range"] == [0.0, 255.0]
    assert os.listdir(tmp_path) == ["f.npz"]


def test_one_split_one_file_and_an_unreadable_image(place, tmp_path):
    embed(*flags(place, tmp_path / "test.npz", "--split=test"))
    found = read(tmp_path / "test.npz")
    assert set(found["split"]) == {"test"} and "readout" not in found
    path = f"{place}/cells/test/b/03.png"
    embed(*flags(place, tmp_path / "one.npz"), f"--dataset_path={path}", "--batch_size=1")
    one = read(tmp_path / "one.npz")
    row = found["image"].tolist().index(path)
    assert one["image"].tolist() == [path] and "label" not in one
    np.testing.assert_allclose(one["cls"][0], found["cls"][row], atol=1e-5)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(5):
        Image.fromarray(np.full((32, 32), 50 * i, np.uint8)).save(flat / f"{i}.png")
    (flat / "2.png").write_bytes(b"no png")
    more = [f"--dataset_path={flat}", "--batch_size=2"]
    with pytest.raises(UserError, match=r"2\.png: cannot be read as an image"):
        embed(*flags(place, tmp_path / "flat.npz"), *more)
    embed(*flags(place, tmp_path / "flat.npz"), *more, "--on_bad_image=skip", "--overwrite=true")
    skipped = read(tmp_path / "flat.npz")
    assert [os.path.basename(name) for name in skipped["image"]] == ["0.png", "1.png", "3.png",
                                                                     "4.png"]
    assert skipped["number"].tolist() == [0, 1, 3, 4]


def test_a_parquet_and_a_csv_have_the_same_numbers(place, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    embed(*flags(place, tmp_path / "f.npz", "--patches=true"))
    embed(*flags(place, tmp_path / "f.parquet", "--patches=true"))
    embed(*flags(place, tmp_path / "f.csv"))
    arrays, table = read(tmp_path / "f.npz"), parquet.read_table(tmp_path / "f.parquet")
    for name in ("cls", "patch_mean", "patches"):
        column = np.array(table[name].to_pylist(), dtype=arrays[name].dtype)
        assert np.array_equal(column, arrays[name].reshape(39, -1)), name
    assert table["image"].to_pylist() == arrays["image"].tolist()
    assert store.read_settings(str(tmp_path / "f.parquet")) == json.loads(str(arrays["settings"]))
    with open(tmp_path / "f.csv") as file:
        rows = list(csv.DictReader(file))
    values = [[row[f"cls_{i}"] for i in range(16)] for row in rows]
    assert np.array_equal(np.array(values, dtype=np.float32), arrays["cls"])
    assert rows[0]["label"] == "0" and len(rows) == 39


def test_blocks_are_chosen_on_val_and_kept(place, tmp_path, capsys):
    output = str(tmp_path / "f.npz")
    embed(*flags(place, output, "--blocks=auto"))
    assert "probe loss on val of blocks 3: " in capsys.readouterr().out
    found = read(output)
    numbers = json.loads(str(found["settings"]))["blocks"]
    assert found["readout"].shape == (39, 16 * len(numbers)) and numbers[-1] == 3
    embed(*flags(place, output, "--blocks=auto"))
    out = capsys.readouterr().out
    assert "is complete" in out and "probe loss" not in out  # not chosen anew
    with pytest.raises(UserError, match="blocks='auto' chooses on val, with labels"):
        embed(*flags(place, tmp_path / "t.npz", "--blocks=auto"),
              f"--dataset_path={place}/cells/test/a")


def test_the_nearest_images_of_a_query(place, tmp_path, monkeypatch):
    rows = []
    module = load_script("embed")
    monkeypatch.setattr(module, "neighbours_picture",
                        lambda path, found, *rest: rows.extend(found))
    query = f"{place}/cells/train/b/01.png"
    argv = flags(place, tmp_path / "f.npz", f"--query={query}", "--neighbours=3")
    module.main(override(vars(module), module.config_keys,
                         [*argv, "--num_workers=0", "--device=cpu", "--mixed_precision=no"]))
    [row] = rows
    assert len(row) == 4 and row[1][1] == "01.png, b\n1.000"  # the image itself is the nearest
    assert np.array_equal(row[1][0], row[0][0])
    embed(*flags(place, tmp_path / "f.npz", f"--query={query}", "--batch_size=64"))
    assert min(Image.open(tmp_path / "f-01-neighbours.png").size) > 200


# ---- kills, full disks, other settings ----

def stopping(stop, after):
    """store.stream_features that calls stop() before batch number `after`."""
    stream = store.stream_features

    def stream_and_stop(*args, **settings):
        for i, batch in enumerate(stream(*args, **settings)):
            if i == after:
                stop()
            yield batch
    return stream_and_stop


def press_ctrl_c():
    raise KeyboardInterrupt


def computed(monkeypatch):
    """A list that gets the number of images of every batch that is computed from now on."""
    sizes, stream = [], store.stream_features

    def counted(*args, **settings):
        for batch in stream(*args, **settings):
            sizes.append(len(batch["indices"]))
            yield batch
    monkeypatch.setattr(store, "stream_features", counted)
    return sizes


@pytest.mark.parametrize("how", ["kill", "ctrl-c"])
def test_what_is_written_stays_and_the_rest_is_computed(place, tmp_path, monkeypatch, how, capsys):
    embed(*flags(place, tmp_path / "whole.npz", "--blocks=1,3"))
    output = tmp_path / "f.npz"
    argv = flags(place, output, "--blocks=1,3")
    with monkeypatch.context() as patch:
        if how == "ctrl-c":
            patch.setattr(store, "stream_features", stopping(press_ctrl_c, 2))
            with pytest.raises(SystemExit) as stopped:
                embed(*argv)
            assert stopped.value.code == 130
            assert "stopped after 16 images" in capsys.readouterr().out
        else:
            patch.setattr(store, "SAVE_SECONDS", -1)
            patch.setattr(store, "stream_features",
                          stopping(lambda: os.kill(os.getpid(), signal.SIGKILL), 2))
            pid = os.fork()
            if pid == 0:
                embed(*argv)
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert os.listdir(tmp_path / "f.npz.part") and not output.exists()
    with open(tmp_path / "f.npz.part/cls.bin", "ab") as file:
        file.write(b"torn")  # what was in flight
    sizes = computed(monkeypatch)
    embed(*argv)
    assert sum(sizes) == 39 - 16 and "going on after 16 images" in capsys.readouterr().out
    whole, resumed = read(tmp_path / "whole.npz"), read(output)
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert np.array_equal(whole[name], resumed[name]), name
    assert sorted(os.listdir(tmp_path)) == ["f.npz", "whole.npz"]


def test_an_output_that_exists(place, tmp_path, capsys, monkeypatch):
    output = tmp_path / "f.npz"
    embed(*flags(place, output))
    before = output.read_bytes()
    sizes = computed(monkeypatch)
    embed(*flags(place, output))
    assert f"{output} is complete, with these settings" in capsys.readouterr().out and not sizes
    for more, message in ((["--patches=true"], "patches False there, True here"),
                          (["--image_size=16"], "size 32 there, 16 here"),
                          (["--split=test"], r"data_hash \w+ there, \w+ here"),
                          ([f"--model={place}/other"], r"model_hash \w+ there, \w+ here")):
        with pytest.raises(UserError, match=f"exists with other settings: .*{message}.*overwrite"):
            embed(*flags(place, output), *more)
    assert output.read_bytes() == before and os.listdir(tmp_path) == ["f.npz"]
    embed(*flags(place, output, "--split=test", "--overwrite=true"))
    assert len(read(output)["cls"]) == 13
    foreign = tmp_path / "notes.csv"
    foreign.write_text("mine")
    with pytest.raises(UserError, match="exists and was not written by embed.py"):
        embed(*flags(place, foreign))
    assert foreign.read_text() == "mine"


def test_an_unfinished_output_of_other_settings_or_in_use(place, tmp_path):
    output = str(tmp_path / "f.npz")
    rows = store.Store(output, dict(model_hash="1", size=32), False)
    rows.append(dict(cls=np.ones((2, 3), np.float32)), 2)
    rows.save()
    pid = os.fork()
    if pid == 0:
        try:
            store.Store(output, dict(model_hash="1", size=32), False)
        except UserError as error:
            os._exit(7 if "is being written by another process" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    rows.close()
    with pytest.raises(UserError, match="has rows of other settings: size 32 there, 48 here"):
        store.Store(output, dict(model_hash="1", size=48), False)
    again = store.Store(output, dict(model_hash="1", size=32), False)
    assert again.n_rows == again.position == 2 and again.column("cls")[:].tolist() == [[1] * 3] * 2
    again.close()
    anew = store.Store(output, dict(model_hash="1", size=48), True)
    assert anew.n_rows == 0 and os.listdir(f"{output}.part") == ["settings.json"]
    os.makedirs(tmp_path / "g.npz.part")
    (tmp_path / "g.npz.part/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is no unfinished output of embed.py; move it away"):
        store.Store(str(tmp_path / "g.npz"), {}, True)
    assert (tmp_path / "g.npz.part/mine.txt").exists()


@pytest.mark.parametrize("when", ["rows", "output"])
def test_a_full_disk_costs_nothing(place, tmp_path, monkeypatch, when):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        if when == "rows":
            patch.setattr(store.os, "fsync", full)
        else:
            patch.setattr(store, "write_npz", full)
        with pytest.raises(UserError, match=r"No space left on device.*f\.npz\.part stays: make "
                           "space, and the same command goes on") as error:
            embed(*flags(place, tmp_path / "f.npz"))
        assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["f.npz.part"]
    sizes = computed(monkeypatch)
    embed(*flags(place, tmp_path / "f.npz"))
    assert sum(sizes) == (39 if when == "rows" else 0)
    assert len(read(tmp_path / "f.npz")["cls"]) == 39


# ---- kept probes ----

@pytest.fixture(scope="module")
def results(place):
    """The results of evaluate.py on the cells."""
    module = load_script("evaluate")
    module.main(override(vars(module), module.config_keys, [
        f"--model_type={place}/weights", f"--dataset_path={place}/cells", "--bootstrap=0",
        f"--cache_dir={place}/cache", f"--out_dir={place}/ev", "--num_workers=0", "--device=cpu",
        "--mixed_precision=no", "--generate_pictures=false", "--batch_size=8"]))
    return f"{place}/ev/results"


def test_a_kept_probe_predicts_what_evaluate_measured(place, results, tmp_path):
    output = tmp_path / "p.csv"
    embed(f"--probe={results}/cells-probe.safetensors", f"--dataset_path={place}/cells",
          "--split=test", f"--cache_dir={place}/cache", f"--output={output}")
    with open(output) as file:
        predictions = list(csv.DictReader(file))
    with open(f"{results}/cells-test-scores.csv") as file:
        scores = list(csv.DictReader(file))
    about = json.load(open(f"{results}/cells-probe.json"))
    mine = [row for row in scores if row["network"] == f"{place}/weights"]
    readout = [row for row in mine if row["features"] == "readout"]
    assert len(readout) == len(predictions) == 13
    for theirs, ours in zip(readout, predictions):
        assert [theirs[key] for key in ours] == list(ours.values())  # image, class, probabilities
    wanted = [row["label"] == row["prediction"] for row in readout]
    assert about["tests"]["test"]["accuracy"] == pytest.approx(np.mean(wanted))
    assert about["classes"] == ["a", "b"] and about["features"] == "readout"


def test_scores_have_every_network_and_the_nearest_training_images(place, results):
    with open(f"{results}/cells-test-scores.csv") as file:
        scores = list(csv.DictReader(file))
    kinds = {(row["network"], row["features"]) for row in scores}
    assert kinds == {("raw pixels", "cls"), (f"{place}/weights", "cls"),
                     (f"{place}/weights", "readout")}
    backbone = build_backbone(f"{place}/weights", True, 3).eval()
    settings = dict(size=32, mean=(0.5,) * 3, std=(0.25,) * 3, batch_size=8)
    parts = {}
    for split in ("train", "test"):
        dataset = load_dataset(f"{place}/cells", split, cache_dir=f"{place}/cache")
        parts[split] = dataset, *extract_features(backbone, dataset, **settings)
    (train, x, y), (_, x_test, _) = parts["train"], parts["test"]
    rows = [row for row in scores if (row["network"], row["features"]) ==
            (f"{place}/weights", "cls")]
    cosines = F.normalize(x_test, dim=1) @ F.normalize(x, dim=1).T
    nearest = [train.path(int(i)) for i in cosines.argmax(dim=1)]
    assert [row["nearest_1"] for row in rows] == nearest and "nearest_5" in rows[0]
    votes = knn_classify(x, y, x_test)
    assert [row["knn_prediction"] for row in rows] == ["ab"[vote] for vote in votes]
    for row in rows:
        probs = float(row["p_a"]), float(row["p_b"])
        assert sum(probs) == pytest.approx(1, abs=1e-6)
        assert row["prediction"] == "ab"[int(np.argmax(probs))]
        assert float(row["probability"]) == max(probs)


def test_medmnists_evaluator_reads_the_scores(place, tmp_path, monkeypatch):
    medmnist = pytest.importorskip("medmnist")
    rng, arrays = np.random.default_rng(0), {}
    cache = tmp_path / "cache/bloodmnist_28"
    cache.mkdir(parents=True)
    for split, n in (("train", 32), ("val", 16), ("test", 40)):
        labels = np.arange(n) % 8
        images = rng.integers(0, 60, (n, 28, 28, 3)) + 20 * labels[:, None, None, None]
        arrays[f"{split}_labels"] = labels[:, None].astype(np.uint8)
        arrays[f"{split}_images"] = images.astype(np.uint8)
    for name, values in arrays.items():
        np.save(cache / f"{name}.npy", values)
    module = load_script("evaluate")
    module.main(override(vars(module), module.config_keys, [
        f"--model_type={place}/weights", "--dataset_path=bloodmnist", "--dataset_size=28",
        f"--cache_dir={tmp_path}/cache", "--bootstrap=0", f"--out_dir={tmp_path}/ev",
        "--num_workers=0", "--device=cpu", "--generate_pictures=false", "--blocks=last"]))
    np.savez(tmp_path / "bloodmnist.npz", **arrays)
    evaluator = medmnist.Evaluator
    monkeypatch.setattr(evaluator.__init__, "__defaults__", (None, str(tmp_path)))
    networks = json.load(open(tmp_path / "ev/results/bloodmnist.json"))["networks"]
    files = sorted(os.listdir(tmp_path / "ev/results/medmnist"))
    assert len(files) == len(networks) == 2
    for network in networks:
        name = "raw-pixels" if network["name"] == "raw pixels" else "weights"
        [file] = [file for file in files if file.endswith(f"{name}.csv")]
        numbers = network["results"]["test"]["linear"]
        auc, accuracy = evaluator.parse_and_evaluate(str(tmp_path / "ev/results/medmnist" / file))
        assert accuracy == pytest.approx(numbers["accuracy"])
        assert auc == pytest.approx(numbers["auc"])
        assert f"[AUC]{auc:.3f}_[ACC]{accuracy:.3f}@" in file


# ---- what it refuses ----

def test_a_probe_of_another_model_is_refused_with_both_hashes(place, results, tmp_path):
    hashes = [weights_hash(build_backbone(f"{place}/{name}", True, 3))
              for name in ("weights", "other")]
    with pytest.raises(UserError, match=f"belongs to weights {hashes[0]}.*has weights {hashes[1]}"):
        embed(f"--probe={results}/cells-probe.json", f"--dataset_path={place}/cells",
              f"--model={place}/other", f"--cache_dir={place}/cache",
              f"--output={tmp_path}/p.csv")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("argv, message", [
    (["--model="], "model is not given: a run, weights or an adapter; or give a probe"),
    (["--output=f.txt"], r"output='f.txt': give a path that ends in .npz, .parquet, .csv"),
    (["--output=f.csv", "--patches=true"], "patches=true with output='f.csv'"),
    (["--dataset_path=bare"], "'bare': no images; looked for"),
    (["--dataset_path="], "dataset_path is not given"),
    (["--dataset_path=EMPTY/nowhere"], "does not exist"),
    (["--split=holdout"], "has no split 'holdout'; it has train, test"),
    (["--blocks=4"], "blocks='4': give 'last', 'auto', or numbers from 0 to 3"),
    (["--model=EMPTY"], "it is no run .* and has no weights"),
    (["--query=nowhere.png"], "query='nowhere.png': no such file"),
    (["--batch_size=0"], "batch_size=0"),
    (["--output=EMPTY/a.npz/b.npz"], r"EMPTY/a\.npz.* cannot be written \(Not a directory\)"),
    (["--probe=nowhere", "--output=f.csv"], "probe='nowhere' cannot be read"),
    (["--probe=nowhere", "--output=f.csv", "--blocks=1"], "the probe has its own")])
def test_bad_input_is_one_clear_error(place, tmp_path, argv, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("EMPTY")
    os.makedirs("bare")
    (tmp_path / "EMPTY/a.npz").write_text("")
    with pytest.raises(UserError, match=message) as error:
        embed(*flags(place, "f.npz"), *argv)
    assert "\n" not in str(error.value)
    assert not os.path.exists("f.npz") and not os.path.exists("f.npz.part")
