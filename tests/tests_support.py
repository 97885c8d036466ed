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


# ---- one step of a recipe, without a run: tests/test_sync.py and test_cuda.py ----

RECIPES = dict(dinov1=["config/dinov1.py"], dinov2=["config/dinov2.py"],
               dinov3=["config/dinov3.py", "--gram_loss_weight=2", "--gram_refresh_iterations=0"],
               dinov3_hires=["config/dinov3_hires.py"], lora=["config/dinov1.py", "config/lora.py"],
               freeze=["config/dinov1.py", "config/freeze.py", "--freeze_backbone_layers=1"],
               lejepa=["config/lejepa.py"], diet=["config/diet.py"])


def recipe_config(name, *argv):
    """The namespace of train.py's keys for a recipe, shrunk; the backbone is trained at once."""
    from types import SimpleNamespace

    from configurator import override
    module = load_train()
    files = [os.path.join(ROOT, arg) if arg.startswith("config/") else arg
             for arg in RECIPES[name]]
    family = dict(dinov2="dinov2_with_registers", dinov3="dinov3_vit", dinov3_hires="dinov3_vit")
    flags = [*SHRUNK, f"--model_type={family.get(name, 'vit')}", "--lora_dropout=0",
             "--freeze_backbone_iterations=0", "--drop_path_rate=0", "--freeze_backbone_until=0"]
    configs = [file for file in files if not file.startswith("--")]
    flags += [flag for flag in files if flag.startswith("--")]
    override(vars(module), module.config_keys, [*configs, *flags, *argv])
    return SimpleNamespace(**{key: getattr(module, key) for key in module.config_keys})


def recipe_student(config, device, n_images=16):
    """The student that train.py builds for a device, still on the CPU; always the same weights."""
    from model import Student, adapted_backbone, build_heads
    torch.manual_seed(0)
    backbone = adapted_backbone(config, 3, device, n_images=n_images)
    return Student(backbone, **build_heads(config.hidden_size, config, n_images)).train()


def recipe_state(config, student, device):
    """The run.State that train.py builds of a student that is on the device."""
    from model import EMATeacher, shared_blocks
    from optim import build_optimizer
    from run import State, gradient_scaler
    optimizer, _, _ = build_optimizer(student, config, new_patch_embed=False)
    centers = {name: torch.zeros(1, size, device=device) for name, size in (
        ("dino", config.dino_head_out_dim), ("ibot", config.ibot_out_dim))}
    state = State(student, EMATeacher(student), optimizer, centers=centers,
                  scaler=gradient_scaler(device, config.mixed_precision))
    if config.gram_loss_weight > 0 and config.gram_teacher != "ema":
        state.anchor = EMATeacher(student, part="backbone.")
    if config.cls_anchor_loss_weight > 0:
        state.start = EMATeacher(student, part="backbone.")
    if config.ibot_loss_weight == 0 and config.dino_head_loss_weight > 0:
        state.n_shared_blocks = shared_blocks(student, state.ema)
    return state


def recipe_batches(config, n_batches=1, n_images=16):
    """(batches of the loader, Photometrics): of random images, the same for every device."""
    import numpy as np

    from augment import MultiCrop, Photometrics
    from data import Dataset
    from loader import CropDataset
    images = np.random.default_rng(0).integers(0, 256, (n_images, 64, 64, 3), dtype=np.uint8)
    gram_size = config.gram_crops_size if config.gram_loss_weight > 0 else 0
    crops = MultiCrop(config.global_crops_size, config.global_crops_scale, 2,
                      config.local_crops_size, config.local_crops_scale, config.local_crops_number,
                      gram_crops_size=gram_size)
    masks = dict(exact=config.ibot_mask_exact) if config.ibot_loss_weight > 0 else None
    size = config.global_batch_size
    crop_set = CropDataset(Dataset(images, name="random"), crops, 0, size,
                           config.global_crops_size // config.patch_size, masks)
    batches = []
    for first in range(0, n_batches * size, size):
        batches.append(crop_set.collate([crop_set[n, n % n_images]
                                         for n in range(first, first + size)]))
    photometrics = Photometrics("rgb", (0.0, 255.0), (0.5,) * 3, (0.25,) * 3,
                                blur_probability=config.blur_probability)
    return batches, photometrics


def recipe_step(config, state, batch, photometrics, device, losses, autocast):
    """One iteration of train.py's loop, without log line. losses: a run.LossCheck."""
    import dino
    from optim import set_learning_rates
    from run import seed_iteration
    seed_iteration(config.seed, state.iteration)
    values = dino.schedules(config, state.iteration, 0)
    set_learning_rates(state.optimizer, values.lr, values.last_layer_lr, values.weight_decay,
                       values.backbone_factor)
    crops = dino.augment_batch(batch, photometrics, config, device)
    terms, row_sums, _ = dino.forward_backward(state, crops, values.teacher_temp, config, autocast)
    losses.add(terms, state.iteration, values.lr, batch["index"])
    return dino.update(state, row_sums, values, config)
