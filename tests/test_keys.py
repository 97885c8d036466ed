"""Every key of every script: just outside of its bounds it is refused in one line, at its bounds it
is taken; and changed on a resume it is in effect, or one line says why it cannot be.

The tests of a resume look at what the next step uses (pixels, losses, optimizer, weights, EMA,
loader, k-NN), not at the config. Keys that distill.py shares with train.py go through the same
code; the suite tries them with train.py only. ALL_KEYS=1 tries all of them:

    ALL_KEYS=1 python -m pytest tests/test_keys.py
"""
import contextlib
import os
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import configurator
import distributed
from augment import PRESETS
from bounds import BOUNDS, LOW_HIGH, OF_SCRIPT, bounds_of, shown
from checks import UNUSED, step_bytes
from configurator import UserError, override
from features import read_run
from model import _find_config, build_backbone, check_memory
from tests_support import ROOT, SHRUNK, TINY, load_script

SCRIPTS = ("train", "distill", "evaluate", "attention", "bench")
MODULES = {script: load_script(script) for script in SCRIPTS}
KEYS = sum([[(script, key) for key in MODULES[script].config_keys] for script in SCRIPTS], [])
BOUNDED = [pair for pair in KEYS if bounds_of(pair[1], pair[0])]
FREE_TEXT = {"model_name", "out_dir", "resume_from", "dataset_path", "cache_dir", "download_url",
             "eval_split", "model_type", "distilled_model_type", "distilled_model_weights",
             "teacher_cache", "run", "compare", "test_splits", "images", "masks", "split"}


def apply(script, *argv):
    """The config of a script after the flags, a dict; the script stays as it is."""
    module = MODULES[script]
    namespace = dict(vars(module))
    override(namespace, module.config_keys, list(argv))
    return {key: namespace[key] for key in module.config_keys}


def written(value, default):
    """A number as the text of a flag: for a tuple, each of its items."""
    if isinstance(default, tuple):
        return ",".join([repr(value)] * max(1, len(default)))
    return repr(value)


# ---- bounds ----

@pytest.mark.parametrize("script, key", BOUNDED)
def test_a_value_outside_of_its_bounds_is_one_line(script, key):
    """Below, above, far away and in between; the line names key, value and rule."""
    bounds, default = bounds_of(key, script), getattr(MODULES[script], key)
    if isinstance(bounds[0], str):
        outside = ["", "none at all", bounds[0].upper(), bounds[0] + "1", "cuda:N", "headN"]
        rule = f"choose one of {', '.join(bounds)}"
    else:
        low, high = bounds
        step = 1 if isinstance(default, int) else 1e-3
        outside = [low - step, high + step * max(1, abs(high)), -10**19, 10**19]
        outside = [written(value, default) for value in outside]
        rule = f"must be in {low}..{high}"
    for value in outside:
        with pytest.raises(UserError) as error:
            apply(script, f"--{key}={value}")
        [line] = str(error.value).split("\n")
        assert line.startswith(f"command line: {key}=") and rule in line, line


@pytest.mark.parametrize("script, key", BOUNDED)
def test_a_value_at_its_bounds_is_taken(script, key):
    bounds, default = bounds_of(key, script), getattr(MODULES[script], key)
    for value in bounds:
        text = value.replace("N", "0") if isinstance(value, str) else written(value, default)
        if key == "intensity_range":  # a pair of equal numbers is none
            text = f"{bounds[0]},{bounds[1]}"
        found = apply(script, f"--{key}={text}")[key]
        assert found == type(default)(found)
        if isinstance(value, str):
            assert found == text
        else:
            assert np.all(np.array(found) == value) or key == "intensity_range"


def test_every_number_has_bounds_and_every_text_is_free_or_a_choice():
    for script, key in KEYS:
        default = getattr(MODULES[script], key)
        if isinstance(default, bool):
            assert not bounds_of(key, script), key
        elif isinstance(default, str):
            assert (key in FREE_TEXT) != bool(bounds_of(key, script)), key
        else:
            assert len(bounds_of(key, script)) == 2, (script, key)
    known = {key for _, key in KEYS}
    assert known >= set(BOUNDS) | set(LOW_HIGH)
    for script, entries in OF_SCRIPT.items():
        assert set(entries) <= set(MODULES[script].config_keys), script


@pytest.mark.parametrize("script, key", BOUNDED)
def test_the_comment_of_a_choice_lists_the_words(script, key):
    bounds = bounds_of(key, script)
    if isinstance(bounds[0], str):
        with open(os.path.join(ROOT, f"{script}.py")) as file:
            comment = re.search(rf"^{key} = .*?  ?# (.*)", file.read(), re.M).group(1)
        for word in bounds:
            assert word.rstrip("N") in comment, (key, word)


def test_choices_are_those_of_the_modules():
    assert set(BOUNDS["augmentation"]) == {"auto", *PRESETS}
    assert set(BOUNDS["strategy"]) == {"all", *MODULES["bench"].STRATEGIES}


def test_help_prints_the_bounds(capsys):
    for script, key, text in (("train", "lr", "0 to 100"), ("train", "global_crops_number", "2 to"),
                              ("distill", "global_crops_number", "1 to")):
        with pytest.raises(SystemExit):
            apply(script, f"--help={key}")
        lines = capsys.readouterr().out.splitlines()
        [line] = [line for line in lines if line.startswith(f"{key} =")]
        assert re.search(rf"#.*  \[{text}", line), line


@pytest.mark.parametrize("flag, words", [
    ("--seed=" + "9" * 5000, "seed = '9999"), ("--lr=1e999", "needs finite float"),
    ("--lr=" + "9" * 400, "needs finite float"), ("--=3", "unknown key ''"),
    ("--", "unknown key ''"), ("--=", "unknown key ''"), ("-lr=3", "has two dashes, like --lr=3"),
    ("--model_name=a\0b", "needs text in UTF-8 without NUL"), ("a\0b", "no such config file"),
    ("--model_name=a\udcff", "needs text in UTF-8"), ("--lr=" + "(" * 10**5, "needs finite float"),
    ("--lr=" + "-" * 10**5 + "1", "needs finite float"), ("--intensity_range=1,1", "low < high"),
    ("--intensity_range=5,-5", "low < high"), ("--global_crops_scale=0.9,0.1", "low <= high"),
    ("--blur_probability=0,nan,0", "needs tuple like"), ("", "no such config file"),
    ("--device=cuda:", "choose one of"), ("--device=cuda:1x", "choose one of"),
    (ROOT, "is no file but a folder or a pipe"), ("/dev/null", "is no file but")])
def test_odd_flags_are_one_line(flag, words):
    with pytest.raises(UserError) as error:
        apply("train", flag)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("text, words", [
    (b"raise KeyboardInterrupt", "KeyboardInterrupt: "), (b"exit(3)", "SystemExit: 3"),
    (b"import sys\nsys.exit('no')", "SystemExit: no"), (b"raise BaseException('x')", ": x"),
    (b"class E(Exception):\n def __str__(self):\n  raise E\nraise E", "E: "),
    (b"lr = 1\0", "null byte"), (b"lr = '\xff'", "SyntaxError: "), (b"seed = 10 ** 5000", "cannot"),
    (b"seed = " + b"9" * 5000, "SyntaxError: "), (b"lr = 10 ** 5000", "needs finite float"),
    (b"model_name = 'a\\0b'", "without NUL"), (b"model_name = '\\ud800'", "needs text in UTF-8"),
    (b"import sys\nsys.stdout.close()", "closes or replaces stdout"),
    (b"import sys\nsys.stdout = None", "closes or replaces stdout"),
    (b"import sys\nsys.stderr.close()", "closes or replaces stdout"),
    (b"lr = -1.0", "lr=-1.0: must be in 0..100"), (b"intensity_range = (1, 1)", "low < high"),
    (b"raise ValueError('a\\nb')", "ValueError: a"), (b"def f(): f()\nf()", "RecursionError")])
def test_whatever_leaves_a_config_file_is_one_line(tmp_path, monkeypatch, text, words):
    path = tmp_path / "odd.py"
    path.write_bytes(text)
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        with pytest.raises(UserError) as error:
            apply("train", str(path))
    monkeypatch.undo()
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}: ")


def test_a_file_in_another_encoding_is_read_as_python_reads_it(tmp_path):
    path = tmp_path / "latin.py"
    path.write_bytes("# -*- coding: latin-1 -*-\nmodel_name = 'é'\n".encode("latin-1"))
    assert apply("train", str(path))["model_name"] == "é"
    path.write_bytes("model_name = 'é'\n".encode("utf-8-sig"))
    assert apply("train", str(path))["model_name"] == "é"


def test_a_text_of_a_subclass_becomes_plain(tmp_path):
    """config.py would hold its repr, which does not run."""
    path = tmp_path / "numpy_text.py"
    path.write_text("import numpy as np\nmodel_name = np.str_('a')\n")
    assert type(apply("train", str(path))["model_name"]) is str


def test_defaults_that_were_edited_are_checked_as_well(monkeypatch):
    monkeypatch.setattr(MODULES["train"], "lr", -1.0)
    with pytest.raises(UserError, match=r"^train.py: lr=-1.0: must be in 0..100$"):
        apply("train")
    assert apply("train", "--lr=1")["lr"] == 1.0


def test_what_cannot_be_printed_is_named():
    assert shown(10 ** 5000) == "a value of type int that cannot be printed"
    assert len(shown("x" * 10**6)) < 110 and shown("x") == "'x'"


@pytest.mark.parametrize("error, words", [
    (FileNotFoundError(2, "No such file", "a.txt"), "error: No such file: 'a.txt'"),
    (OSError(36, "File name too long", "y" * 5000), "error: File name too long: 'yyy"),
    (RuntimeError("can't allocate memory: you tried to allocate 9 bytes\nmore"), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"), (MemoryError(), "of memory")])
def test_full_memory_and_refused_files_are_one_line(error, words):
    with pytest.raises(SystemExit) as stop, configurator.one_line_errors():
        raise error
    assert words in stop.value.code and "\n" not in stop.value.code
    with pytest.raises(RuntimeError), configurator.one_line_errors():
        raise RuntimeError("a bug")


# ---- memory ----

def config_of(script, *argv):
    return SimpleNamespace(**apply(script, *argv))


@pytest.mark.parametrize("flags", [
    ["--hidden_size=65536", "--num_attention_heads=64"], ["--head_hidden_dim=1000000"],
    ["--dino_head_out_dim=10000000", "--head_bottleneck_dim=100000"],
    ["--global_crops_size=16384"], ["--local_crops_size=16384"], ["--num_hidden_layers=1000",
     "--hidden_size=4096", "--num_attention_heads=64"],
    ["--gram_loss_weight=1", "--gram_crops_size=16384", "--global_batch_size=1024",
     "--gradient_accumulation_steps=1"]])
def test_sizes_that_no_machine_holds_are_refused_before_they_are_allocated(flags):
    config = config_of("train", "--model_type=vit", "--use_pretrained=false", *flags)
    with pytest.raises(UserError, match=r"training needs at least \d+\.\d GB on cpu, which has"):
        check_memory(config, 3, torch.device("cpu"), print)
