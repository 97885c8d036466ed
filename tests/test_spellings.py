"""What the paper prints and what a reader may type like it: each spelling gives the config that our
own flags give. listings.yaml has Listings 1 to 8 of the paper in one file, as they are printed."""
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from checks import Checks
from configurator import UserError, config_text, override
from spellings import our_arguments, read_yaml
from tests_support import ROOT, SHRUNK, load_script, log, state

SCRIPTS = {name: vars(load_script(name)) for name in ("train", "distill", "evaluate")}
LISTINGS = os.path.join(ROOT, "tests", "listings.yaml")
CONFIG = os.path.join(ROOT, "config")
LISTING8 = os.path.join(CONFIG, "listing8.py")


def config_of(script, *argv):
    """The resolved config of a script, a dict."""
    namespace = dict(SCRIPTS[script])
    override(namespace, namespace["config_keys"], [str(arg) for arg in argv])
    return {key: namespace[key] for key in namespace["config_keys"]}


def refused(script, *argv):
    """The lines of the error."""
    with pytest.raises(UserError) as error:
        config_of(script, *argv)
    return [line.strip() for line in str(error.value).split("\n")]


@pytest.fixture
def yaml_file(tmp_path):
    """A function (text) -> the path of a YAML file."""
    def write(text, name="training.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)
    return write


# ---- flags ----

@pytest.mark.parametrize("spelling, ours", [
    ("--distribution.type=fsdp", "--distribution=fsdp"),
    ("--distribution.mixed_precision=fp16", "--mixed_precision=fp16"),
    ("--distribution.downcast_bf16=no", ""),
    ("--downcast_bf16=true", ""),
    ("--train.mixed_precision=true", "--mixed_precision=bf16"),
    ("--train.mixed_precision=false", "--mixed_precision=no"),
    ("--mixed_precision=No", "--mixed_precision=no"),
    ("--train.do_distillation=false", ""),
    ("--do-distillation=no", ""),
    ("-resume_from=out/x", "--resume_from=out/x"),
    ("-resume-from=out/x", "--resume_from=out/x"),
    ("--train.resume_from=out/x", "--resume_from=out/x"),
    ("--dino_head.out_dim=99", "--dino_head_out_dim=99"),
    ("--dino_head.norm_last_layer=True", "--dino_head_norm_last_layer=true"),
    ("--dino_head.loss_weight=2", "--dino_head_loss_weight=2"),
    ("--dino_head.hidden_dim=9", "--head_hidden_dim=9"),
    ("--ibot.loss_weight=1", "--ibot_loss_weight=1"),
    ("--ibot.out_dim=99", "--ibot_out_dim=99"),
    ("--ibot.separate_head=yes", "--ibot_separate_head=true"),
    ("--ibot.mask_ratio_min_max=[0.2,0.4]", "--ibot_mask_ratio_min_max=0.2,0.4"),
    ("--lora.r=9", "--lora_r=9"),
    ("--lora_config.lora_r=9", "--lora_r=9"),
    ("--lora_config.r=9", "--lora_r=9"),
    ("--lora_config.dropout=0.3", "--lora_dropout=0.3"),
    ("--crops.global_crops_scale=0.3,0.9", "--global_crops_scale=0.3,0.9"),
    ("--crops.local_crops.number=3", "--local_crops_number=3"),
    ("--dataset.dataset_path=x", "--dataset_path=x"),
    ("--dataset.path=x", "--dataset_path=x"),
    ("--dataset.shuffle=off", "--shuffle=false"),
    ("--train.lr=1e-3", "--lr=1e-3"),
    ("--train.use_lora=True", "--use_lora=true")])
def test_a_spelling_of_the_paper_is_a_flag_of_ours(spelling, ours):
    assert config_of("train", spelling) == config_of("train", *ours.split())


@pytest.mark.parametrize("spelling, ours", [
    ("--distillation.distilled_model_type=x", "--distilled_model_type=x"),
    ("--distillation.model_type=x", "--distilled_model_type=x"),  # not the student's model_type
    ("--distillation.model_weights=x", "--distilled_model_weights=x"),
    ("--distillation.load_from_disk=True", "--load_from_disk=true"),
    ("--train.do_distillation=true", ""),
    ("--distribution.type=fsdp", "--distribution=fsdp")])
def test_spellings_of_distill(spelling, ours):
    assert config_of("distill", spelling) == config_of("distill", *ours.split())


@pytest.mark.parametrize("argv, ours", [
    (["-resume_from", "out/x", "--lr=1"], ["--resume_from=out/x", "--lr=1"]),
    (["--resume_from", "auto"], ["--resume_from=auto"]),
    (["--train_config_file", "a.yaml", "b.py"], ["a.yaml", "b.py"]),
    (["b.py", "-train-config-file=a.yaml"], ["b.py", "a.yaml"]),
    (["--train_config_file"], ["--train_config_file"]),
    (["--resume_from", "--lr=1"], ["--resume_from", "--lr=1"]),
    (["-lr=1", "--help", "-h"], ["-lr=1", "--help", "-h"])])
def test_arguments_with_a_space_or_one_dash(argv, ours):
    assert our_arguments(argv) == ours


def test_mixed_precision_true_keeps_the_precision_that_was_named():
    assert config_of("train", "--mixed_precision=fp16", "--train.mixed_precision=true") == \
        config_of("train", "--mixed_precision=fp16")
    assert config_of("evaluate", "--mixed_precision=true") == config_of("evaluate")


@pytest.mark.parametrize("script, flag, words", [
    ("train", "--train.do_distillation=true", "train.py does not do that, distill.py does"),
    ("distill", "--train.do_distillation=false", "distill.py does not do that, train.py does"),
    ("train", "--do_distillation=7", "do_distillation='7': needs true or false"),
    ("train", "--distribution.downcast_bf16=7", "downcast_bf16='7': needs true or false"),
    ("train", "--distribution.type=deepspeed", "choose one of ddp, fsdp, none"),
    ("train", "--distilled_model_type=x", "unknown key 'distilled_model_type'"),
    ("train", "--distillation.model_type=x", "unknown key 'distilled_model_type'"),
    ("evaluate", "--do_distillation=true", "unknown key 'do_distillation'"),
    ("train", "--train_config_file", "has no value, write --train_config_file=VALUE"),
    ("train", "--resume_from", "has no value, write --resume_from=VALUE"),
    ("train", "--train_config_file=none.yaml", "none.yaml: no such config file"),
    ("train", "--ibot.out_dum=3", "unknown key 'ibot_out_dum', did you mean 'ibot_out_dim'?"),
    ("train", "-lr=3", "-lr=3: a flag has two dashes, like --lr=3")])
def test_what_the_script_cannot_do_is_one_sentence(script, flag, words):
    [line] = refused(script, flag)
    assert words in line


def test_settings_without_effect_are_named_once(capsys, monkeypatch):
    config_of("train", "--distribution.downcast_bf16=no")
    note = "note: downcast_bf16=no has no effect: it is a setting of Accelerate for TPUs\n"
    assert capsys.readouterr().out == note
    monkeypatch.setenv("RANK", "1")
    config_of("train", "--distribution.downcast_bf16=no")
    assert capsys.readouterr().out == ""


# ---- keys of the Hugging Face config ----

@pytest.mark.parametrize("flags", [
    ["--backbone_config.mlp_ratio=2", "--backbone_config.qkv_bias=false",
     "--backbone_config.hidden_act=relu"],
    ["--backbone-config.mlp_ratio=2", "--backbone_config={'qkv_bias': False, 'mlp_ratio': 2,"
     "'hidden_act': 'relu'}"],
    ["--backbone_config={'qkv_bias': False}", "--backbone_config.hidden_act=relu",
     "--backbone_config.mlp_ratio=2"]])
def test_keys_of_the_backbone_as_flags(flags):
    found = config_of("train", *flags)
    assert found["backbone_config"] == dict(mlp_ratio=2, qkv_bias=False, hidden_act="relu")
    assert config_of("distill", *flags)["backbone_config"] == found["backbone_config"]


def test_keys_of_the_backbone_in_files(tmp_path, yaml_file):
    path = tmp_path / "a.py"
    path.write_text("backbone_config = {'mlp_ratio': 2, 'hidden_size': 96}\n")
    expected = dict(config_of("train"), backbone_config=dict(mlp_ratio=2), hidden_size=96)
    assert config_of("train", path) == expected  # hidden_size is a key of its own
    text = "train:\n  backbone_config:\n    mlp_ratio: 2\n    hidden_size: 96\n"
    assert config_of("train", yaml_file(text)) == expected
    assert config_of("train", path, "--backbone_config.qkv_bias=no")["backbone_config"] == \
        dict(mlp_ratio=2, qkv_bias=False)
    saved = tmp_path / "config.py"
    saved.write_text(config_text(SimpleNamespace(**expected)))
    assert config_of("train", saved) == expected
    assert config_of("train", path, "--backbone_config={}")["backbone_config"] == {}


@pytest.mark.parametrize("flag, words", [
    ("--backbone_config=3", "backbone_config = 3 (int), needs dict of plain values"),
    ("--backbone_config.a=1e999", "needs dict of plain values"),  # inf does not run in config.py
    ("--backbone_config", "has no value, write --backbone_config=VALUE like --backbone_config={}"),
    ("--backbone_config.=3", "unknown key 'backbone_config_'"),
    ("--backbone_config.hidden_size=x", "hidden_size = 'x' (str), needs int like 384"),
    ("--backbone_confg.mlp_ratio=2", "unknown key 'backbone_confg_mlp_ratio'")])
def test_a_wrong_backbone_config_is_one_line(flag, words):
    [line] = refused("train", flag)
    assert words in line


# ---- the paper's file ----

def test_the_listings_are_config_listing8_and_fsdp(capsys):
    paper = config_of("train", "--train_config_file", LISTINGS)
    said = capsys.readouterr().out
    assert paper == config_of("train", LISTING8, "--distribution=fsdp")
    for key in ("distilled_model_type", "distilled_model_weights", "load_from_disk"):
        assert f"note: {key} has no effect here, only in distill.py\n" in said


def test_every_value_of_the_listings_is_in_listing8():
    """No default hides a value that the file of the paper lacks."""
    [names] = [[line.split(" = ")[0] for line in open(LISTING8) if " = " in line]]
    keys = set(config_of("train"))
    printed = {flag.split(".")[-1] for flag, _ in read_yaml(LISTINGS)}
    printed |= {flag.replace(".", "_") for flag, _ in read_yaml(LISTINGS)}
    assert set(names) == printed & keys - {"distribution"}


def test_the_defaults_of_train_are_the_listings_but_for_four_keys():
    paper, default = config_of("train", LISTING8), config_of("train")
    different = {key for key in default if paper[key] != default[key]}
    with open(os.path.join(ROOT, "train.py")) as file:
        _, sentence = file.read().split("# ==== config: ")
    for key in different:
        assert key in sentence.split("# ---- run")[0]
    assert different == {"model_name", "model_type", "dataset_path", "use_lora"}


def test_the_listings_for_distill(yaml_file, capsys):
    with open(LISTINGS) as file:
        text = file.read()
    [line] = refused("distill", LISTINGS)
    assert "do_distillation=false: distill.py does not do that, train.py does" in line
    path = yaml_file(text.replace("do_distillation: false", "do_distillation: true"))
    found = config_of("distill", path)
    assert "note: ibot_loss_weight has no effect here, only in train.py" in capsys.readouterr().out
    expected = dict(
        distribution="fsdp", dino_head_out_dim=65536, local_crops_number=8,
        distilled_model_type="facebook/dinov2-giant", dataset_path="dataset/pathmnist",
        model_name="training_test_fsdp", model_type="facebook/dinov2-base", use_lora=True,
        warmup_iterations=1000, teacher_temp=0.04)
    assert found == {**config_of("distill"), **expected}
    [line] = refused("train", path)
    assert "start it with the same arguments" in line


def test_one_file_serves_every_medmnist_set():
    """pathmnist.py and organamnist.py stay: the paper's own set, and one without flips."""
    found = config_of("train", f"{CONFIG}/medmnist.py", "--dataset_path=bloodmnist")
    assert (found["model_name"], found["dataset_path"]) == ("", "bloodmnist")
    organs = config_of("train", f"{CONFIG}/organamnist.py")
    flips = ["--horizontal_flip=0", "--vertical_flip=0"]
    assert organs == config_of("train", f"{CONFIG}/medmnist.py", "--dataset_path=organamnist",
                               *flips)
    path = config_of("train", f"{CONFIG}/pathmnist.py")
    assert path == config_of(
        "train", f"{CONFIG}/medmnist.py", "--dataset_path=pathmnist", "--model_name=pathmnist",
        "--model_type=facebook/dino-vits16", "--local_crops_size=96") == config_of("train")


# ---- other YAML files ----

@pytest.mark.parametrize("text, flags", [
    ("", ""),
    ("# nothing\n", ""),
    ("lr: 1e-3", "--lr=1e-3"),  # a text in YAML 1.1
    ("train:\n  lr: 1E-3\n  min_lr: .001\n  weight_decay: 4.e-2", "--lr=1e-3 --min_lr=1e-3"),
    ("max_iterations: 1e3", "--max_iterations=1000"),
    ("max_iterations: 1_000", "--max_iterations=1000"),
    ("seed: '7'", "--seed=7"),
    ("shuffle: no", "--shuffle=false"),
    ("shuffle: 'No'\nuse_lora: yes\ncompile: on", "--shuffle=false --use_lora=true --compile=true"),
    ("mixed_precision: no", "--mixed_precision=no"),
    ("train: {mixed_precision: off}", "--mixed_precision=no"),
    ("distribution: fsdp", "--distribution=fsdp"),
    ("model_name: 2024", "--model_name=2024"),
    ("model_name: yes", "--model_name=yes"),
    ("model_name: ’a b’", "--model_name=a_b"),
    ("resume_from: null\ncache_dir: ~\nseries:", ""),
    ("image_mean: null", ""),
    ("image_mean: [0.5]", "--image_mean=0.5"),
    ("image_mean: 0.5", "--image_mean=0.5"),
    ("image_mean: []", ""),
    ("adam_betas: [9e-1, '0.99']", "--adam_betas=0.9,0.99"),
    ("adam_betas: (0.9, 0.99)", "--adam_betas=0.9,0.99"),
    ("crops:\n  global_crops:\n    scale:\n    - 0.3\n    - 1\n    size: 112",
     "--global_crops_scale=0.3,1 --global_crops_size=112"),
    ("a: &x {lr: 1e-3}", "--lr=1e-3"),
    ("lr: 1e-2\ntrain: {lr: 1e-3}", "--lr=1e-3")])
def test_a_yaml_file_is_a_list_of_flags(yaml_file, text, flags):
    flags = [flag.replace("a_b", "a b") for flag in flags.split()]
    assert config_of("train", yaml_file(text)) == config_of("train", *flags)


@pytest.mark.parametrize("text, words", [
    ("lrr: 3", "unknown key 'lrr', did you mean 'lr'?"),
    ("train:\n  max_iteration: 3", "did you mean 'max_iterations'?"),
    ("3: 3", "unknown key '3'"),
    ("train: 3", "unknown key 'train'"),
    ("lr: fast", "lr = 'fast' (str), needs finite float like 0.0001"),
    ("lr: null", "lr = '' (str), needs finite float like 0.0001"),
    ("lr: [1e-4]", "lr = (0.0001,) (tuple), needs finite float like 0.0001"),
    ("lr: .inf", "needs finite float"),
    ("lr: -1", "lr=-1.0: must be in 0..100"),
    ("shuffle: 1", "shuffle = '1' (str), needs true or false"),
    ("shuffle: [true]", "shuffle = (True,) (tuple), needs true or false"),
    ("seed: 1.5", "seed = 1.5 (float), needs int like 0"),
    ("global_crops_scale: 0.4", "needs tuple of 2"),
    ("global_crops_scale: [0.4, yes]", "needs finite float like 1.0"),
    ("global_crops_scale: null", "needs tuple like (0.4, 1.0)"),
    ("global_crops_scale: [[1, 2], 3]", "global_crops_scale needs plain values, not a sequence"),
    ("global_crops_scale: {low: 1}", "unknown key 'global_crops_scale_low'"),
    ("[1, 2]", "needs sections and keys, like train: {lr: 1e-4}"),
    ("just words", "needs sections and keys, like train: {lr: 1e-4}"),
    ("? [a]\n: 3", "a key needs plain values, not a sequence"),
    ("lr: 1\n lr: 2: 3", "mapping values are not allowed here"),
    ("lr: 1\n---\nlr: 2", "expected a single document"),
    ("lr: !!python/name:os.system x", "lr = 'x' (str)"),
    ("a: &x {b: *x}", "recursion"),
    ("lr: \x01", "special characters are not allowed")])
def test_a_mistake_in_a_yaml_file_is_one_line(yaml_file, text, words):
    path = yaml_file(text)
    [line] = refused("train", path)
    assert line.startswith(f"{path}: ") and words in line, line


def test_yaml_files_python_files_and_flags_apply_in_their_order(yaml_file, tmp_path):
    first = yaml_file("lr: 1e-3\nmax_iterations: 50")
    python = tmp_path / "b.py"
    python.write_text("warmup_iterations = max_iterations // 10\nlr = 2e-3\n")
    found = config_of("train", "--train_config_file", first, python, "--min_lr=1e-4")
    assert found == config_of("train", "--lr=2e-3", "--max_iterations=50", "--warmup_iterations=5",
                              "--min_lr=1e-4")
    assert config_of("train", python, first)["lr"] == 1e-3


def test_yaml_is_imported_only_where_it_is_read():
    code = "import sys, configurator; assert 'yaml' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- runs ----

# Section 2.1.3: 2025-04-01 01:03:24,093 - dino_trainer_rank0 - INFO - Total Loss: 13.6886 ...
PAPERS_LINE = (
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - dino_trainer_rank0 - INFO - Total Loss: [\d.]+ "
    r"Local DINO: [\d.]+ .*Global DINO: [\d.]+ .*iBOT: .*LR: [\d.]+ Weight Decay: [\d.]+ "
    r"Teacher momentum: [\d.]+ Current Batch Size: 8 Iteration: 1/1 Gpu ID: cpu "
    r"Memory: [\d.]+/[\d.]+ GB")


def test_a_run_is_named_after_its_data_and_repeats_from_its_config(npz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = load_script("train")
    argv = [*SHRUNK, f"--dataset_path={npz}", "--cache_dir=cache", "--max_iterations=1",
            "--eval_interval=0", "--model_name=", "--backbone_config.intermediate_size=24"]
    module.main(override(vars(module), module.config_keys, argv))
    saved = config_of("train", "out/phantom40/config.py")
    assert saved == dict(config_of("train", *argv), model_name="phantom40")
    assert saved["backbone_config"] == dict(intermediate_size=24)
    weights = state("out/phantom40")["student"]
    assert weights["backbone.layers.0.mlp.fc1.weight"].shape == (24, 32)


@pytest.mark.parametrize("launcher", [["--multi_gpu", "--num_processes=2"]])
def test_accelerate_launch_is_another_torchrun(launcher, npz, tmp_path):
    """--multi_gpu starts processes on a CPU, too; --cpu starts one, whatever --num_processes says.
    Also tried: one process, ["--cpu", "--num_processes=1"], and --use_fsdp."""
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *launcher,
               "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
               "--main_process_port=0", "train.py", *SHRUNK, f"--dataset_path={npz}",
               f"--cache_dir={tmp_path}/cache", f"--out_dir={tmp_path}/run", "--max_iterations=1",
               "--eval_interval=0", "--eval_max_images=4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n_ranks = launcher[-1][-1]
    assert f"batch: 8 images = {n_ranks} rank(s)" in done.stdout
    assert [record["iteration"] for record in log(tmp_path / "run")] == [0, 1]
    line = next(line for line in done.stdout.splitlines() if "Total Loss" in line)
    assert re.match(PAPERS_LINE, line), line
    assert len(re.findall(r"rank \d+ [\d.]+/", line)) == int(n_ranks) - 1  # memory of the others
    with open(tmp_path / "run/logs/train.log") as file:
        assert line in file.read().splitlines()


def test_what_accelerate_asks_for_without_effect_is_noted(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    config = SimpleNamespace(**config_of("train"))
    check = Checks(config)
    check.training(2, ())
    assert check.report()[:2] == [
        "accelerate's mixed_precision=fp16 has no effect: mixed_precision='bf16' has",
        "accelerate's FSDP settings have no effect: use --distribution=fsdp"]
    config.distribution, config.mixed_precision = "fsdp", "fp16"
    check = Checks(config)
    check.training(2, ())
    assert check.report() == []
