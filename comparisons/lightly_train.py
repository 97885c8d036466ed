"""A DINOv2 step of lightly-train: ViT-S/14, 2x224 + 8x98, iBOT, KoLeo, K 65536, batch 8, a CPU.

    python -m venv lightly && lightly/bin/pip install lightly-train  # an environment of its own
    lightly/bin/pip install -r requirements.txt                      # and what bench.py needs
    lightly/bin/python comparisons/lightly_train.py                  # prints one line
    python bench.py --what=step --ibot=true --model_type=dinov2 --patch_size=14 \
        --local_crops_size=98                                        # our step

The package trains by its own command on random JPEG files in a temporary folder. Its defaults for
this method are the same recipe. Drop path is off, because bench.py does not have it either. A step
lasts from one call of its training_step to the next, so waiting for data counts, as in bench.py.
The count of multiplications, the limit and the dtype are those of bench.py.
"""
import contextlib
import os
import sys
import tempfile
import time

os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"  # no telemetry; before the import
here = os.path.dirname(os.path.abspath(__file__))
sys.path[0] = os.path.dirname(here)  # this folder has a file with the package's name
import bench
import lightly_train
import torch
from lightly_train._methods.dinov2.dinov2 import DINOv2

N_STEPS = 5  # measured, after two to warm up; the batch is that of bench.py


class AllMeasured(Exception):
    """Raised after the last measured step. The package's end of a training is not measured."""


def main():
    config = bench.read_config()
    config.local_crops_size = bench.DINOV2["local_crops_size"]
    began, training_step = [], DINOv2.training_step

    def timed_step(self, *args, **kwargs):
        began.append(time.perf_counter())
        if len(began) == 2 + N_STEPS + 1:
            raise AllMeasured
        return training_step(self, *args, **kwargs)

    DINOv2.training_step = timed_step
    dtype = bench.compute_dtype(torch.device("cpu"), config.mixed_precision)
    precision = "bf16-mixed" if dtype == torch.bfloat16 else "32-true"
    with tempfile.TemporaryDirectory() as folder:
        bench.make_folder(f"{folder}/images", (N_STEPS + 3) * config.batch_size, 256)
        with contextlib.suppress(AllMeasured):
            lightly_train.pretrain(
                out=f"{folder}/out", data=f"{folder}/images", method="dinov2", epochs=1,
                model="dinov2/vits14-noreg-notpretrained", model_args=dict(drop_path_rate=0.0),
                batch_size=config.batch_size, precision=precision, accelerator="cpu",
                devices=1, num_workers=1)
    seconds = [after - before for before, after in zip(began, began[1:])]
    masked = 2 * 256 * 0.5 * 0.3  # patches: half of the crops, 0.1 to 0.5 of a crop
    flops = bench.count_matmuls(config, 384, 12, 14, mlp_ratio=4, n_frozen=0,
                                use_lora=False, shares=False, whole=True, masked=masked)
    bench.print_share(config, "lightly-train", seconds[2:], flops)


if __name__ == "__main__":
    main()
