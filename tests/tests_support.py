"""Shared by the tests: a script's config, a run that is shrunk, and what the run wrote."""
import importlib.util
import json
import os

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=8, num_register_tokens=2, pos_embed_rescale=None)
SHRUNK = [  # train.py in a second or two
    "--use_pretrained=false", "--model_type=vit", "--hidden_size=32", "--num_hidden_layers=2",
    "--num_attention_heads=2", "--patch_size=8", "--num_register_tokens=2",
    "--global_crops_size=32", "--local_crops_size=16", "--local_crops_number=2",
    "--dino_head_out_dim=64", "--ibot_out_dim=64", "--head_hidden_dim=32",
    "--head_bottleneck_dim=16", "--global_batch_size=8", "--max_iterations=3",
    "--warmup_iterations=1", "--log_interval=1", "--eval_interval=2", "--saveckp_freq=2",
    "--num_workers=0", "--mixed_precision=no", "--lr=1e-3", "--device=cpu",
    "--gram_crops_size=48"]


def load_script(name):
    """A fresh instance of a script: its config is its globals, so every run gets its own."""
    path = os.path.join(ROOT, f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{name}_fresh", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_train():
    return load_script("train")


def run(out, *argv, configs=(), module=None):
    """Run train.py in this process with the shrunk config; returns the lines of log.jsonl."""
    from configurator import override
    module = module or load_train()
    files = [os.path.join(ROOT, "config", file) for file in configs]
    argv = [*files, *SHRUNK, f"--out_dir={out}", f"--cache_dir={out}-cache", *argv]
    module.main(override(vars(module), module.config_keys, argv))
    return log(out)


def log(out):
    """The lines of log.jsonl, as dicts."""
    with open(os.path.join(out, "log.jsonl")) as file:
        return [json.loads(line) for line in file]


def losses(records):
    """The losses of the logged iterations, float64 [n,7]: the total, then its terms."""
    names = ("loss", "dino_local_loss", "dino_global_loss", "label_guided_loss", "ibot_loss",
             "koleo_loss", "gram_loss")
    rows = [[record[name] for name in names] for record in records if "loss" in record]
    return torch.tensor(rows, dtype=torch.float64)


def state(out, name="last"):
    """A checkpoint of a run: the dict of its state.pt."""
    path = os.path.join(out, "checkpoints", name, "state.pt")
    return torch.load(path, weights_only=True)


def ema_backbone(saved):
    """The state dict of the EMA's backbone, from a checkpoint of `state`."""
    weights, prefix = {**saved["student"], **saved["ema"]}, "backbone."
    return {name.removeprefix(prefix): value for name, value in weights.items()
            if name.startswith(prefix)}


def assert_same(a, b):
    """Bitwise, through nested dicts and lists."""
    assert type(a) is type(b)
    if torch.is_tensor(a):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b
