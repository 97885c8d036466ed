"""Every key of every script: just outside of its bounds it is refused in one line, at its bounds it
is taken; and changed on a resume it is in effect, or one line says why it cannot be.

The tests of a resume look at what the next step uses (pixels, losses, optimizer, weights, EMA,
loader, k-NN), not at the config. Keys that distill.py shares with train.py go through the same
code; the suite tries them with train.py only. ALL_KEYS=1 tries all of them:

    ALL_KEYS=1 python -m pytest tests/test_keys.py
"""
import contextlib
import json
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import configurator
from augment import PRESETS
from bounds import BOUNDS, LOW_HIGH, OF_SCRIPT, bounds_of, shown
from checks import UNUSED, step_bytes
from configurator import UserError, override
from distributed import compute_dtype
from model import SIZE_KEYS, DINOHead, build_backbone, check_memory
from networks import read_run
from run import LossCheck
from tests_support import ROOT, SHRUNK, TINY, load_script

SCRIPTS = ("train", "distill", "evaluate", "attention", "embed", "bench", "tables")
MODULES = {script: load_script(script) for script in SCRIPTS}
KEYS = sum([[(script, key) for key in MODULES[script].config_keys] for script in SCRIPTS], [])
BOUNDED = [pair for pair in KEYS if bounds_of(pair[1], pair[0])]
FREE_TEXT = {"model_name", "out_dir", "resume_from", "dataset_path", "cache_dir", "download_url",
             "eval_split", "model_type", "distilled_model_type", "distilled_model_weights",
             "teacher_cache", "run", "compare", "test_splits", "images", "masks", "split", "series",
             "model", "output", "blocks", "probe", "query", "lora_targets", "models", "teachers",
             "recipes", "strategies", "test_split", "flags"}


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
        if isinstance(default, (bool, dict)):
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


def test_counted_memory_is_that_of_real_parameters():
    """Against the modules that train.py would build, within the vectors that are not counted."""
    flags = ["--model_type=dinov2", "--use_pretrained=false", "--ibot_loss_weight=1",
             "--ibot_separate_head=true", "--ibot_out_dim=512", "--dino_head_out_dim=1024",
             "--head_hidden_dim=256", "--hidden_size=192", "--num_attention_heads=3",
             "--num_hidden_layers=3", "--freeze_backbone_layers=1"]
    config = config_of("train", *flags)
    sizes = {key: getattr(config, key) for key in SIZE_KEYS}
    backbone = build_backbone("dinov2", False, 3, image_size=64, **sizes)
    heads = torch.nn.ModuleList([DINOHead(192, K, 256) for K in (1024, 512)])

    def count(module):
        return sum(param.numel() for param in module.parameters())
    trained = count(heads) + 2 * count(backbone.encoder.layer[0])
    expected = 4 * (count(backbone) + count(heads) + 4 * trained)
    held, step = step_bytes(config, backbone.config, 3, 8)
    assert 0.97 * expected < held < expected  # never more than is needed
    assert step_bytes(config, backbone.config, 3, 8, n_shares=4)[0] == held // 4
    for strategy in ({}, dict(train_only="attention_output"), dict(use_lora=True)):
        other = SimpleNamespace(**{**vars(config), "train_last_blocks": 1, **strategy})
        block = backbone.encoder.layer[2]
        learned = block.attention.o_proj if "train_only" in strategy else block
        expected = 4 * (count(backbone) + count(heads) + 4 * (count(heads) + count(learned)))
        assert 0.97 * expected < step_bytes(other, backbone.config, 3, 8)[0] < expected
    two = step_bytes(config, backbone.config, 3, 16)[1]
    assert two == pytest.approx(2 * step, rel=0.05)


def test_a_run_that_may_not_fit_is_told_and_goes_on(monkeypatch):
    config = config_of("train", "--model_type=vit", "--use_pretrained=false")
    lines = []
    monkeypatch.setattr("model.memory_gb", lambda _: (0, 10**4))
    check_memory(config, 3, torch.device("cpu"), lines.append)
    assert lines == []
    monkeypatch.setattr("model.memory_gb", lambda _: (0, 10))
    check_memory(config, 3, torch.device("cpu"), lines.append)
    assert len(lines) == 1 and "training needs at least" in lines[0]


# ---- a changed key on a resume ----

class Stop(Exception):
    """The first step is over."""


def first_step(script, argv, monkeypatch, capsys):
    """What the first step of a run uses and changes, a dict by kind; `said`, its lines; and
    `refused`, the message, if the run ends with one."""
    module, seen, state = load_script(script), dict(pixels=[], compiled=False), {}
    capsys.readouterr()

    def watch(owner, name, before):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            before(*args, **kwargs)
            return original(*args, **kwargs)
        patches.setattr(owner, name, watched)

    def forward(self, *args, **kwargs):
        seen["pixels"] += [x.clone() for x in args if torch.is_tensor(x)]

    def loader(crop_set, config, micro_batches, *_, **__):
        seen["loader"] = config.num_workers, crop_set.on_bad_image, micro_batches

    def knn(train_set, measured, config, *_):
        seen["knn"] = config.eval_max_images, list(measured)

    def losses(_, sums, *args):
        seen["losses"] = {name: float(value) for name, value in sums.items()}

    real_state, real_update = module.State, module.EMATeacher.update

    def keep_state(*args, **kwargs):
        state["now"] = real_state(*args, **kwargs)
        return state["now"]

    def update(ema, student, momentum):
        real_update(ema, student, momentum)
        seen["momentum"], seen["modules"], seen["groups"] = momentum, [], {}
        for group in state["now"].optimizer.param_groups:
            settings = group["lr"], group["weight_decay"], tuple(group["betas"])
            seen["groups"].update(dict.fromkeys(group["names"], settings))
        for part in student.modules():
            seen["modules"].append(getattr(part, "gradient_checkpointing", False))
        params = dict(student.named_parameters())
        seen["trained"] = [name for name, param in params.items() if param.requires_grad]
        seen["weights"] = {name: param.clone() for name, param in params.items()}
        seen["ema"] = {name: value.clone() for name, value in ema.values.items()}
        if script == "distill":
            raise Stop

    def after_update(*args, **kwargs):
        anchor = state["now"].anchor
        seen["anchor"] = {name: x.clone() for name, x in anchor.values.items()} if anchor else {}
        raise Stop

    with monkeypatch.context() as patches:
        watch(module.Student, "forward", forward)
        watch(module, "make_loader", loader)
        watch(module, "KnnMeasure", knn)
        watch(LossCheck, "add", losses)
        patches.setattr(module, "State", keep_state)
        patches.setattr(module.EMATeacher, "update", update)
        patches.setattr(module, "compile_blocks", lambda _: seen.update(compiled=True))
        if script == "train":
            step = module.dino.update

            def whole_update(*args):
                step(*args)
                after_update()
            patches.setattr(module.dino, "update", whole_update)
        try:
            module.main(override(vars(module), module.config_keys, argv))
        except Stop:
            pass
        except UserError as error:
            seen["refused"] = str(error)
    seen["said"] = capsys.readouterr().out
    return seen


def is_equal(a, b):
    """Bitwise, through dicts, lists and tuples."""
    if type(a) is not type(b):
        return False
    if torch.is_tensor(a):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_equal, a, b))
    return a == b


def differing(a, b):
    """The kinds of `first_step` in which two steps differ."""
    return {kind for kind in a.keys() - {"said"} if not is_equal(a[kind], b.get(kind))}


BASES = dict(
    train=["--model_type=dinov3_vit", "--ibot_loss_weight=1", "--ibot_separate_head=true",
           "--koleo_loss_weight=0.1", "--gram_loss_weight=1", "--gram_teacher=snapshot",
           "--gram_refresh_iterations=4", "--label_guided_crops_number=1",
           "--label_guided_loss_weight=0.5", "--cls_anchor_loss_weight=0.5",
           "--lejepa_loss_weight=0.5", "--diet_loss_weight=0.5",
           "--warmup_teacher_temp_iterations=4", "--warmup_teacher_temp=0.03"],
    lora=["--model_type=dinov2", "--use_lora=true"],
    distill=["--model_type=dinov3_vit", "--objective=both", "--fixed_views=2"])

# key: another valid value, then what shows that it is in effect: a kind of first_step; or the words
# of the line that refuses it; or 'note', a line that says that it has no effect; or 'same', if both
# values mean the same here
HALF = "same"  # a CPU without instructions for bf16 computes in fp32 all the same
if compute_dtype(torch.device("cpu"), "bf16") == torch.bfloat16:
    HALF = "losses"
SHAPE = "is .* in the checkpoint, .* now; keys that differ: {key}: checkpoint"
CHANGED = dict(
    seed=("1", "pixels"), device=("cuda:99", "CUDA device"), wandb_log=("true", "needs wandb"),
    max_iterations=("6", "groups"), generate_samples=("false", "note"), out_dir=("", "same"),
    dataset_path=("other.npz", "pixels"), dataset_size=("28", "note"), cache_dir=("", "same"),
    series=("CT", "note"), volume_axis=("0", "same"), volume_index=("0", "note"),
    slice_step_mm=("5.0", "note"), group_level=("1", "note"), max_image_pixels=("9", "note"),
    intensity_scaling=("image", "pixels"), download_url=("http://mirror", "note"),
    shuffle=("false", "pixels"),
    num_channels=("3", "images have 1 channel"), intensity_range=("0,100", "pixels"),
    image_mean=("0.3", "pixels"), image_std=("0.3", "pixels"), on_bad_image=("skip", "loader"),
    num_workers=("1", "loader"), eval_max_images=("6", "knn"),
    eval_split=("test", "its start and best are accuracies on that split"),
    augmentation=("rgb", "pixels"), global_crops_number=("3", "pixels"),
    global_crops_size=("48", "pixels"), global_crops_scale=("0.5,1", "pixels"),
    local_crops_number=("3", "pixels"), local_crops_size=("24", "pixels"),
    local_crops_scale=("0.2,0.3", "pixels"), label_guided_crops_number=("2", "pixels"),
    label_guided_crops_scale=("0.1,0.2", "pixels"), label_guided_loss_weight=("1", "losses"),
    label_guided_classes=("9", "pixels"), horizontal_flip=("1", "pixels"),
    vertical_flip=("1", "pixels"), blur_probability=("0,0,0", "pixels"),
    window_jitter=("0.3", "pixels"), min_foreground=("0.9", "pixels"),
    slab_mm=("5", "has no slices with positions"),
    model_type=("dinov2", "is .* in the checkpoint, .* now"),
    use_pretrained=("true", "is a family and has no weights"), hidden_size=("48", SHAPE),
    num_hidden_layers=("3", SHAPE), num_attention_heads=("4", "losses"),
    patch_size=("16", SHAPE), backbone_config=("{'intermediate_size': 24}", SHAPE),
    num_register_tokens=("3", SHAPE), drop_path_rate=("0.5", "losses"),
    pos_embed_rescale=("2", "losses"), freeze_backbone_layers=("1", "trained"),
    freeze_backbone_until=("9", "nothing is frozen"), train_last_blocks=("1", "trained"),
    train_only=("attention_output", "trained"), use_lora=("true", SHAPE),
    dino_head_out_dim=("32", SHAPE), dino_head_norm_last_layer=("true", "trained"),
    dino_head_loss_weight=("2", "losses"), dino_local_loss_weight=("2", "losses"),
    head_hidden_dim=("16", SHAPE), head_bottleneck_dim=("8", SHAPE),
    head_weight_norm=("false", SHAPE), ibot_loss_weight=("2", "losses"),
    ibot_separate_head=("false", SHAPE), ibot_out_dim=("32", SHAPE),
    ibot_norm_last_layer=("false", "trained"), ibot_mask_sample_probability=("1", "pixels"),
    ibot_mask_ratio_min_max=("0.4,0.5", "pixels"), ibot_mask_exact=("true", "pixels"),
    centering=("sinkhorn_knopp", "losses"), student_temp=("0.2", "losses"),
    teacher_temp=("0.1", "losses"), warmup_teacher_temp=("0.02", "losses"),
    warmup_teacher_temp_iterations=("9", "losses"), momentum_teacher=("0.5", "momentum"),
    final_momentum_teacher=("0.5", "ema"), koleo_loss_weight=("1", "losses"),
    koleo_group_size=("2", "losses"), gram_loss_weight=("2", "losses"),
    cls_anchor_loss_weight=("2", "losses"), lejepa_loss_weight=("2", "losses"),
    lejepa_sigreg_weight=("0.9", "losses"), lejepa_out_dim=("8", SHAPE),
    diet_loss_weight=("2", "losses"), diet_label_smoothing=("0.1", "losses"),
    gram_teacher=("start", "only a 'snapshot' is refreshed"),
    gram_refresh_iterations=("1", "anchor"), gram_crops_size=("32", "losses"),
    global_batch_size=("4", "pixels"), gradient_accumulation_steps=("2", "loader"),
    lr=("0.01", "groups"), min_lr=("0.001", "groups"), warmup_iterations=("4", "groups"),
    weight_decay=("0.2", "groups"), weight_decay_end=("0.2", "groups"),
    adam_betas=("0.5,0.9", "weights"), schedule_reaches_end=("true", "groups"),
    layerwise_decay=("0.5", "groups"), patch_embed_lr_mult=("0.5", "groups"),
    head_lr_mult=("0.5", "groups"),
    clip_grad=("1e-4", "weights"), clip_grad_by=("module", "weights"),
    freeze_last_layer=("0", "weights"), freeze_last_layer_by=("lr", "groups"),
    freeze_backbone_iterations=("3", "trained"), distribution=("fsdp", "note"),
    mixed_precision=("bf16", HALF), activation_checkpointing=("true", "modules"),
    compile=("true", "compiled"),
    # of distill.py only
    fixed_views=("1", "pixels"), distilled_model_type=("./other", "no such directory"),
    distilled_model_weights=("no.pt", "no such file"), load_from_disk=("true", "same"),
    distilled_crops_size=("24", "take its value"), teacher_cache=("cache", "losses"),
    distilled_statistics_views=("160", "take its value"), feature_whitening=("0.5", "take its"),
    objective=("prototype", SHAPE), feature_loss_kind=("smooth_l1", "losses"),
    feature_cls_weight=("2", "losses"), feature_patch_weight=("2", "losses"),
    prototype_loss_weight=("2", "losses"))
CHANGED_LORA = dict(lora_targets=("all", SHAPE), lora_r=("8", SHAPE), lora_alpha=("8", "losses"),
                    lora_dropout=("0.9", "losses"), lora_rslora=("true", "losses"))
SEEN_IN_FILES = {"model_name", "log_interval", "eval_interval", "saveckp_freq", "resume_from"}
KINDS = ("pixels", "losses", "groups", "weights", "ema", "momentum", "trained", "anchor", "modules",
         "loader", "knn", "compiled")
CASES = [("train", key) for key in MODULES["train"].config_keys if key in CHANGED]
CASES += [("lora", key) for key in CHANGED_LORA]
CASES += [("distill", key) for key in MODULES["distill"].config_keys if key in CHANGED
          and ("ALL_KEYS" in os.environ or key not in MODULES["train"].config_keys)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, a teacher and one run of each base, of four iterations."""
    from phantom import make_phantom
    root = tmp_path_factory.mktemp("keys")
    for name, first_seed in (("data", 0), ("other", 9)):
        arrays = {}
        for seed, (split, n) in enumerate(dict(train=16, val=6, test=6).items()):
            for key, value in make_phantom(n, 40, first_seed + seed).items():
                arrays[f"{split}_{key}"] = value
        np.savez_compressed(root / f"{name}.npz", **arrays)
    torch.manual_seed(1)
    sizes = dict(TINY, patch_size=12, image_size=48)
    build_backbone("dinov2", False, 3, **sizes).save_pretrained(root / "teacher")
    return root


@pytest.fixture(scope="module")
def bases(folder):
    """{base: the flags of its run}; the runs are made when they are first asked for."""
    common = [*SHRUNK, f"--dataset_path={folder}/data.npz", f"--cache_dir={folder}/cache",
              "--max_iterations=4", "--eval_max_images=4"]
    flags = {}
    for base, more in BASES.items():
        flags[base] = [*common, *more]
    taken = [flag for flag in flags["distill"] if not flag.startswith(("--ibot", "--gram"))]
    flags["distill"] = [*taken, f"--distilled_model_type={folder}/teacher",
                        "--distilled_crops_size=48", "--distilled_statistics_views=80"]
    flags["distill"][flags["distill"].index("--dino_head_out_dim=64")] = "--dino_head_out_dim=16"
    return flags


@pytest.fixture(scope="module")
def started(folder, bases):
    """A function (base) -> flags that resume its run after iteration 2; each base trains once."""
    done = {}

    def start(base):
        script = "distill" if base == "distill" else "train"
        if base not in done:
            module, out = load_script(script), f"{folder}/{base}"
            argv = [*bases[base], f"--out_dir={out}"]
            with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
                module.main(override(vars(module), module.config_keys, argv))
            done[base] = [*bases[base], f"--resume_from={out}/checkpoints/0000002"]
        return script, done[base]
    return start


@pytest.fixture(scope="module")
def unchanged():
    """{base: first_step of its resumed run}, filled by the tests."""
    return {}


def test_every_key_is_in_the_table():
    keys = {key for script, key in KEYS if script in ("train", "distill")}
    assert keys == set(CHANGED) | set(CHANGED_LORA) | SEEN_IN_FILES


@pytest.mark.parametrize("base, key", CASES)
def test_a_changed_key_is_in_effect_or_one_line_says_why_not(folder, started, unchanged, tmp_path,
                                                            monkeypatch, capsys, base, key):
    value, where = (CHANGED_LORA if base == "lora" else CHANGED)[key]
    script, argv = started(base)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.chdir(folder)
    if base not in unchanged:
        same = [*argv, f"--out_dir={tmp_path}/same"]
        unchanged[base] = first_step(script, same, monkeypatch, capsys)
    out = f"{tmp_path}/changed"
    flags = [*argv, f"--out_dir={out}"]
    if value:
        flags.append(f"--{key}={value}")
    step = first_step(script, flags, monkeypatch, capsys)
    differ = differing(unchanged[base], step)
    if where in KINDS:
        assert where in differ, (differ, step.get("refused"))
    elif where in ("same", "note"):
        assert not differ and "refused" not in step, (differ, step.get("refused"))
    else:
        assert re.search(where.format(key=key), step["refused"]), step["refused"]
        assert "\n" not in step["refused"] and not os.path.exists(out)
        return
    if where == "note":
        words = f"{key} stays True" if key == "generate_samples" else f"{key}='?{value}'? has no"
        assert re.search(words, step["said"])
    expected = apply(script, *flags)[key]
    assert read_run(out)[key] == (True if key == "generate_samples" else expected)


def test_what_only_the_files_show(folder, started, tmp_path):
    """Changed at once on a resume, up to its end."""
    script, argv = started("train")
    module, out = load_script(script), f"{tmp_path}/run"
    argv = [*argv, f"--out_dir={out}", "--max_iterations=7", "--log_interval=3",
            "--eval_interval=5", "--saveckp_freq=3", "--model_name=other"]
    module.main(override(vars(module), module.config_keys, argv))
    with open(f"{out}/log.jsonl") as file:
        records = [json.loads(line) for line in file]
    assert [r["iteration"] for r in records if "loss" in r and r["iteration"] > 2] == [3, 6, 7]
    assert [r["iteration"] for r in records if "knn_accuracy" in r][-2:] == [5, 7]
    assert {"0000003", "0000006"} <= set(os.listdir(f"{out}/checkpoints"))
    assert "0000004" not in os.listdir(f"{out}/checkpoints")
    with open(f"{out}/checkpoints/last/hf/README.md") as file:
        assert "\n# other\n" in file.read()


def test_gram_anchors_on_a_resume(folder, started, tmp_path, monkeypatch, capsys):
    """An anchor that the checkpoint lacks begins as the teacher, and a line says so."""
    module, out = load_script("train"), f"{tmp_path}/first"
    script, resumed = started("train")
    off = [flag for flag in resumed if "gram" not in flag and "resume_from" not in flag]
    argv = [*off, f"--out_dir={out}", "--max_iterations=4"]
    module.main(override(vars(module), module.config_keys, argv))
    argv = [*off, f"--resume_from={out}/checkpoints/0000002", f"--out_dir={tmp_path}/second",
            "--gram_loss_weight=1", "--gram_teacher=snapshot", "--gram_refresh_iterations=9"]
    step = first_step("train", argv, monkeypatch, capsys)
    assert "no Gram anchor; it begins as the teacher of iteration 2" in step["said"]
    saved = torch.load(f"{out}/checkpoints/0000002/state.pt", weights_only=True)["ema"]
    assert step["anchor"] and is_equal(step["anchor"], {k: saved[k] for k in step["anchor"]})
    argv[-2:] = ["--gram_teacher=start"]
    step = first_step("train", argv, monkeypatch, capsys)
    assert "does not have the first weights" in step["refused"]


# ---- keys without effect ----

OFF = {"use_lora": "false", "head_weight_norm": "false", "ibot_separate_head": "false",
       "objective": None}


@pytest.mark.parametrize("switch, values, keys", UNUSED)
def test_a_key_without_effect_is_noted_and_has_none(folder, bases, tmp_path, monkeypatch, capsys,
                                                    switch, values, keys):
    monkeypatch.chdir(folder)
    script = "distill" if switch == "objective" else "train"
    flags = [*bases[script], f"--{switch}={OFF.get(switch) or values[0]}"]
    if switch == "objective" and values[0] == "feature":
        flags += ["--local_crops_number=0"]
    if switch.startswith("label_guided"):
        flags += ["--label_guided_loss_weight=0"]
    if switch in ("ibot_loss_weight", "ibot_separate_head"):
        flags += ["--ibot_out_dim=64"]
    base = first_step(script, [*flags, f"--out_dir={tmp_path}/base"], monkeypatch, capsys)
    assert "refused" not in base, base["refused"]
    others = dict(CHANGED, **CHANGED_LORA, gram_teacher=("ema", ""), gram_refresh_iterations=("0",))
    others = {key: value[0] for key, value in others.items()}
    argv = [f"--{key}={others[key]}" for key in keys]
    step = first_step(script, [*flags, *argv, f"--out_dir={tmp_path}/all"], monkeypatch, capsys)
    assert "refused" not in step, step["refused"]
    assert differing(base, step) == set()
    for key in keys:
        default = getattr(MODULES[script], key)
        if apply(script, *flags, *argv)[key] != default:
            assert f"{key}=" in step["said"] and f"has no effect: {switch}=" in step["said"], key
