"""bench.py: the count against the issue's numbers and against its own definition, computed bytes against live tensors,
and the script as a user runs it."""
import os
import subprocess
import sys

import pytest
import torch

from model import build_backbone, forward_features
from tests_support import ROOT, load_script

TINY = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, patch_size=8, global_crops_size=32, local_crops_size=16, local_crops_number=2,
            dino_head_out_dim=256, head_hidden_dim=48, head_bottleneck_dim=16, freeze_backbone_layers=2, n_steps=1, rounds=1, batch_size=4, device="cpu")


def bench(**settings):
    module = load_script("bench")
    for key, value in settings.items():
        assert key in module.config_keys
        setattr(module, key, value)
    return module


def test_count_of_vit_small():
    """ViT-S/16, 2x224 + 8x96, heads apart, against standard: the numbers of the issue."""
    module, ratios = bench(), {}
    for name, (use_lora, freeze, shares) in module.STRATEGIES.items():
        flops = module.count_matmuls(384, 12, 16, 4, 6 if freeze else 0, use_lora, shares)
        ratios[name] = sum(flops["backbone"].values())
    expected = dict(standard=1.0, lora=0.72, freeze=0.72, freeze_shared=0.64, lora_freeze=0.50)
    assert {name: ratio / ratios["standard"] for name, ratio in ratios.items()} == pytest.approx(expected, abs=0.01)


def test_a_forward_is_what_torch_counts():
    """The unit, against torch's counter of floating point operations: two for a multiplication and its addition."""
    from torch.utils.flop_counter import FlopCounterMode
    module = bench(**TINY)
    backbone = build_backbone("vit", False, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, patch_size=8, image_size=32).eval()
    backbone.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for size, number in ((32, 2), (16, 2)):
            forward_features(backbone, torch.randn(number, 3, size, size))
    assert 2 * module.count_matmuls(32, 3, 8, 4, 0, False, False)["unit"] == counter.get_total_flops()


def test_computed_bytes_are_those_of_live_tensors_and_sharing_changes_no_loss():
    module = bench(**TINY, mixed_precision="no")
    results = {name: module.measure(name) for name in module.STRATEGIES}
    for name, result in results.items():
        assert result["held"] == {what: sum(pair) for what, pair in result["computed"].items()}, name
        assert len(result["seconds"]) == 1 and result["peak"] >= result["libraries"] > 0
    assert results["freeze"]["loss"] == results["freeze_shared"]["loss"]
    standard, lora = results["standard"]["computed"], results["lora"]["computed"]
    assert lora["weights"][1] == standard["weights"][1] and lora["gradients"][0] < 0.2 * standard["gradients"][0]


def test_bytes_of_the_papers_head():
    """K 65536: LoRA needs about 0.62, 0.38, 0.27 of standard for ViT-S, B, L; its backbone one copy of five."""
    table = bench(freeze_backbone_layers=6).bytes_of_sizes()
    for size, expected in dict(S=0.62, B=0.38, L=0.27).items():
        (everything, trunk), (lora, lora_trunk) = table[size]["standard"], table[size]["lora"]
        assert lora / everything == pytest.approx(expected, abs=0.015) and 0.2 < lora_trunk / trunk < 0.23


def test_the_script_prints_its_tables():
    flags = [f"--{key}={value}" for key, value in TINY.items()]
    result = subprocess.run([sys.executable, "bench.py", *flags], cwd=ROOT, capture_output=True, text=True,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert result.returncode == 0, result.stderr[-1000:]
    lines = [line.split()[0] for line in result.stdout.splitlines() if line]
    assert all(lines.count(name) == 2 for name in bench().STRATEGIES) and lines.count("vit") == 3
    with pytest.raises(ValueError, match="choose all or one of standard, lora"):
        bench(strategy="lra").main({})
