"""tables.py and jobs.py: the paper's tables by one command, with tiny networks, against the files
that runs and evaluate.py have written."""
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import jobs
from configurator import UserError, override
from model import build_backbone
from run import Run
from tests_support import ROOT, load_script

FLAGS = ("--head_hidden_dim=32 --head_bottleneck_dim=16 --num_workers=0 --mixed_precision=no "
         "--log_interval=1 --generate_samples=false --eval_max_images=8")


@pytest.fixture(scope="module")
def data(tmp_path_factory, npz):
    """The phantom without masks: no time goes into the patch probe."""
    path = tmp_path_factory.mktemp("data") / "cells.npz"
    arrays = {name: values for name, values in np.load(npz).items() if "masks" not in name}
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two start weights, whose names tell their recipes, and a teacher."""
    root = tmp_path_factory.mktemp("tables")
    sizes = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, image_size=32)
    for name, family, patch in (("tiny-dino", "vit", 8), ("tiny-dinov2", "dinov2", 7),
                                ("teacher", "dinov2", 8)):
        build_backbone(family, False, 3, patch_size=patch, **sizes).save_pretrained(root / name)
    return root


@pytest.fixture(autouse=True)
def scripts_run_here(monkeypatch):
    """A process needs seconds to import torch. Here its script is called instead."""
    def run_here(command, output=None):
        module = load_script(os.path.basename(command[1]).removesuffix(".py"))
        try:
            stopped_by = module.main(override(vars(module), module.config_keys, command[2:]))
        except UserError as error:
            print(error)
            return 1, 0
        return -(stopped_by or 0), 0
    monkeypatch.setattr(jobs, "run_process", run_here)


def make(folder, data, *argv, max_iterations=2, out="out"):
    """Run tables.py."""
    module = load_script("tables")
    models = f"{folder}/tiny-dino,{folder}/tiny-dinov2"
    flags = [f"--dataset_path={data}", f"--models={models}", f"--out_dir={folder}/{out}",
             f"--cache_dir={folder}/cache", f"--max_iterations={max_iterations}",
             "--global_batch_size=4", "--global_crops_size=32", "--local_crops_size=16",
             "--local_crops_number=2", "--dino_head_out_dim=32", "--freeze_backbone_layers=1",
             "--device=cpu", f"--flags={FLAGS}"]
    module.main(override(vars(module), module.config_keys, [*flags, *argv]))


def table(folder, number):
    """(header, rows, results) of a table; they stand in the .md as well."""
    path = f"{folder}/out/cells/table{number}"
    found = json.load(open(f"{path}.json"))
    shown = []
    for line in open(f"{path}.md").read().splitlines():
        if line.startswith("| "):
            shown.append([cell.strip() for cell in line.strip("|").split("|")])
    assert shown[:1] + shown[2:] == [found["header"], *found["rows"]]
    return found["header"], found["rows"], found["results"]


def measured(folder, number):
    """{name: {probe: {metric: value}}} of evaluate.py's own file."""
    path = f"{folder}/out/cells/table{number}/results/cells.json"
    networks = json.load(open(path))["networks"]
    return {network["name"]: network["results"]["test"] for network in networks}


def test_table_11_names_the_losses_and_is_made_once(folder, data, capfd):
    asked = ["--table=11", "--n_seeds=2", f"--models={folder}/tiny-dinov2"]
    make(folder, data, *asked)
    said = capfd.readouterr().out
    commands = [line for line in said.splitlines() if line.startswith("$ ")]
    assert len(commands) == 5 and "evaluate.py" in commands[-1]  # two recipes, two seeds
    header, rows, _ = table(folder, 11)
    assert header[-2:] == ["Standard approach", "Cross-training"]
    results, runs = measured(folder, 11), f"{folder}/out/cells"
    for title, probe in (("linear probe", "linear"), ("k-NN", "knn")):
        [row] = [row for row in rows if row[:2] == ["tiny-dinov2", title]]
        assert row[2] == f"{results[f'{folder}/tiny-dinov2'][probe]['accuracy']:.3f}"
        for text, recipe in zip(row[3:], ("dinov2", "dinov1")):
            values = [results[f"{runs}/tiny-dinov2-{recipe}-standard-{seed}"][probe]["accuracy"]
                      for seed in (0, 1)]
            losses = dict(dinov1="DINO", dinov2="DINO + iBOT + KoLeo")[recipe]
            expected = f"{np.mean(values):.3f} ({np.std(values, ddof=1):.3f}): {losses}"
            assert text == expected
    # crop sizes fit the patches of 7 pixels
    settings = open(f"{runs}/tiny-dinov2-dinov1-standard-0.py").read()
    assert "global_crops_size = 35\nlocal_crops_size = 14\n" in settings
    make(folder, data, *asked)  # nothing is left to do
    again = capfd.readouterr().out
    assert "\n$ " not in again and again.count("finished before: python train.py") == 4
    assert again[again.index("# Table"):] == said[said.index("# Table"):]


def test_tables_share_runs(folder, data, capfd):
    """Table 10 needs no run that table 5 has not made."""
    one = f"--models={folder}/tiny-dinov2"
    make(folder, data, "--table=5", one)
    capfd.readouterr()
    header, rows, _ = table(folder, 5)
    assert [row[1] for row in rows] == ["Pretrained", "Standard", "LoRA", "Layer freezing"]
    results = measured(folder, 5)
    names = [f"{folder}/tiny-dinov2", *(f"{folder}/out/cells/tiny-dinov2-dinov2-{strategy}-0"
                                        for strategy in ("standard", "lora", "freeze"))]
    for row, name in zip(rows, names):
        expected = []
        for probe in ("linear", "knn"):
            for metric in ("accuracy", "precision_weighted", "f1_weighted"):
                expected.append(f"{results[name][probe][metric]:.3f}")
        assert row[2:] == expected
    make(folder, data, "--table=10", one, "--n_processes=1")
    assert "\n$ " not in capfd.readouterr().out
    header, rows, results = table(folder, 10)
    for row, name in zip(rows, names[1:]):
        records = [json.loads(line) for line in open(f"{name}/log.jsonl")]
        steps = [record for record in records if "loss" in record]
        minutes = sum(4 / record["images_per_second"] for record in steps) / 60
        gb = max(record["memory_gb"] for record in steps)
        assert row[2:] == [f"{minutes:.3f}", f"{gb:.3f} x 1"]


def test_table_12_and_a_changed_setting(folder, data):
    one = [f"--models={folder}/tiny-dinov2", "--strategies=standard"]
    make(folder, data, "--table=12", f"--teachers={folder}/teacher", *one)
    header, rows, _ = table(folder, 12)
    results, runs = measured(folder, 12), f"{folder}/out/cells"
    names = [f"{runs}/tiny-dinov2-dinov2-standard-0", f"{runs}/tiny-dinov2-from-teacher-standard-0"]
    values = {}
    for name in (f"{folder}/teacher", *names):
        values[name] = [f"{results[name][probe]['accuracy']:.3f}" for probe in ("linear", "knn")]
    assert rows == [["teacher", "-", "-", "-", "-", *values[f"{folder}/teacher"]],
                    ["teacher", "tiny-dinov2", "Standard", *values[names[0]], *values[names[1]]]]
    with pytest.raises(UserError, match=r"was made with other settings \(max_iterations = 2\)"):
        make(folder, data, "--table=12", f"--teachers={folder}/teacher", *one, max_iterations=3)


def test_table_9_stands_beside_published_numbers(folder, data, monkeypatch):
    published = {"net A": [0.9, 0.7], "net B": [0.8, 0.95]}
    monkeypatch.setattr(jobs, "MEDMNIST", {data: dict(published=published)})
    make(folder, data, "--table=9", f"--models={folder}/tiny-dinov2",
         "--strategies=standard,freeze")
    header, rows, results = table(folder, 9)
    assert [row[:4] for row in rows] == [["cells", "net B", "0.950", "0.800"],
                                         ["cells", "net A", "0.700", "0.900"]]
    knn = {}
    for strategy, title in (("standard", "Standard"), ("freeze", "Layer freezing")):
        name = f"{folder}/out/cells/tiny-dinov2-dinov2-{strategy}-0"
        summary = json.load(open(f"{name}/results/summary.json"))
        knn[title] = summary["final"]["val"], results[name]["linear"]
    best = max(knn, key=lambda title: knn[title][0])  # the first, if they are level
    numbers = knn[best][1]
    assert rows[0][4:] == [f"tiny-dinov2 ({best})", f"{numbers['accuracy']:.3f}",
                           f"{numbers['auc']:.3f}"]


def test_an_unfinished_run_is_resumed(folder, data, monkeypatch, capfd):
    """The run is stopped after its first iteration; the same command resumes it."""
    one = ["--table=10", f"--models={folder}/tiny-dino", "--strategies=standard"]
    tick = Run.tick

    def stop_at_once(self, iteration):
        self.signals.append(signal.SIGTERM)
        return tick(self, iteration)
    monkeypatch.setattr(Run, "tick", stop_at_once)
    with pytest.raises(UserError, match="ended with status -15"):
        make(folder, data, *one, max_iterations=3, out="stopped")
    run = f"{folder}/stopped/cells/tiny-dino-dinov1-standard-0"
    assert not os.path.exists(f"{run}/results/summary.json")
    monkeypatch.setattr(Run, "tick", tick)
    make(folder, data, *one, max_iterations=3, out="stopped")
    assert f"resuming {run} after iteration 1" in capfd.readouterr().out
    assert json.load(open(f"{run}/results/summary.json"))["iterations"] == 3


def test_a_signal_reaches_the_process_and_then_ends_this_one(tmp_path):
    """The child takes its time after SIGTERM, as a run that saves. With real processes."""
    child = tmp_path / "child.py"
    child.write_text("import signal, time\nstop = []\n"
                     "signal.signal(signal.SIGTERM, lambda *_: stop.append(1))\n"
                     "print('ready', flush=True)\nwhile not stop:\n    time.sleep(0.01)\n"
                     "time.sleep(0.2)\nprint('saved', flush=True)\nraise SystemExit(7)\n")
    program = ("import sys\nfrom signals import end_by, run_process\n"
               "print(*run_process(sys.argv[1:]), flush=True)\nend_by(15)")
    process = subprocess.Popen([sys.executable, "-c", program, sys.executable, str(child)],
                               cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert said == "saved\n7 15\n" and process.returncode == -signal.SIGTERM


def test_a_model_takes_the_recipe_that_it_was_released_with():
    module = load_script("tables")
    for model, recipe in (("facebook/dino-vitb8", "dinov1"), ("a/dinov2-base/", "dinov2"),
                          ("facebook/dinov3-vits16", "dinov1"), ("vit", "dinov1")):
        assert module.own_recipe(model) == recipe  # of the default recipes
    module.recipes = "adapt"
    assert module.own_recipe("facebook/dinov2-base") == "adapt"
    module.recipes = "dinov1,dinov3"
    assert module.own_recipe("facebook/dinov3-vits16") == "dinov3"


def test_what_cannot_be_made_is_one_error(folder, data):
    with pytest.raises(UserError) as error:
        make(folder, data, "--table=12", "--strategies=lora,none", "--recipes=dinov9",
             "--models=a/x,b/x")
    lines = str(error.value).split("\n")
    assert len(lines) == 4 and "two names end alike" in lines[0] and "dinov9.py" in lines[1]
    assert "choose from standard" in lines[2] and "--teachers" in lines[3]


def test_commands_are_as_one_types_them():
    assert jobs.command_text(["train.py", "a b.py"]) == "python train.py 'a b.py'"
    assert jobs.command_text(["train.py", "a.py"], 4) == (
        "torchrun --standalone --nproc_per_node=4 train.py a.py")
    assert jobs.short("timm:hf_hub:MahmoodLab/UNI") == "UNI"
    with pytest.raises(UserError, match="evaluate.py --no_key=1 ended with status 1"):
        jobs.call(["evaluate.py", "--no_key=1"])


def test_the_cost_of_a_resumed_run(tmp_path):
    """10 iterations of 0.5 s, then 5 of 2 s; k-NN lines have no time."""
    records = [dict(iteration=0, knn_accuracy=0.1),
               dict(iteration=10, batch_size=8, images_per_second=16.0, memory_gb=3.0),
               dict(iteration=15, batch_size=8, images_per_second=4.0, memory_gb=2.0)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert jobs.cost(str(tmp_path)) == dict(minutes=15 / 60, gb=3.0)
