"""A DINOv2 step of lightly-train beside ours: ViT-S/14, 2x224 + 8x98, iBOT, KoLeo, K 65536, batch 8, bf16, on the CPU.

    python -m venv lightly && lightly/bin/pip install lightly-train          # an environment of its own: no requirement
    lightly/bin/python comparisons/lightly_train.py                          # prints one line
    python bench.py --what=step --model_type=dinov2 --patch_size=14 --local_crops_size=98 --ibot=true      # ours

It trains by the package's own command on random JPEG files in a temporary folder, with its defaults for this method
(they are the same recipe) but without drop path, which bench.py does not have either. A step lasts from one call of its
training_step to the next, so waiting for data counts, as in bench.py; multiplications and the limit are bench.py's own.
"""
import contextlib
import os
import sys
import tempfile
import time

os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"             # no telemetry, before the import
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))    # in place of this folder: our own name
import bench                                                  # noqa: E402
import lightly_train                                          # noqa: E402
from lightly_train._methods.dinov2.dinov2 import DINOv2       # noqa: E402

n_steps = 5                      # measured, after two that warm up; the batch is that of bench.py


class Enough(Exception):
    """All steps are measured: what the package writes at its end is not our subject."""


def main():
    began, step = [], DINOv2.training_step

    def timed(self, *args, **kwargs):
        began.append(time.perf_counter())
        if len(began) == 2 + n_steps + 1:
            raise Enough
        return step(self, *args, **kwargs)
    DINOv2.training_step = timed
    with tempfile.TemporaryDirectory() as folder:
        bench.make_folder(f"{folder}/images", (n_steps + 3) * bench.batch_size, 256)
        with contextlib.suppress(Enough):
            lightly_train.pretrain(
                out=f"{folder}/out", data=f"{folder}/images", model="dinov2/vits14-noreg-notpretrained",
                model_args=dict(drop_path_rate=0.0), method="dinov2", epochs=1, batch_size=bench.batch_size,
                precision="bf16-mixed", accelerator="cpu", devices=1, num_workers=1)
    seconds = [after - before for before, after in zip(began, began[1:])][2:]
    bench.local_crops_size = bench.DINOV2["local_crops_size"]
    masked = 2 * 256 * 0.5 * 0.3                               # patches: half of the crops, 0.1 to 0.5 of a crop
    bench.print_share("lightly-train", seconds, bench.count_matmuls(384, 12, 14, 4, 0, False, False, masked=masked))


if __name__ == "__main__":
    main()
