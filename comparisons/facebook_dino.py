"""The training step of facebookresearch/dino beside ours: ViT-S/16, 2x224 + 8x96, K 65536, batch 8, bf16, on the CPU.

    git clone https://github.com/facebookresearch/dino ../dino        # needs torchvision, no requirement of ours
    python comparisons/dino.py ../dino                                # prints one line
    python bench.py --what=step                                       # ours

Networks, heads, loss, clipping and parameter groups are the repository's own. Its loop calls CUDA by name, so the loop
is written again below, in the order of its train_one_epoch, with bf16 autocast (which needs no loss scaling) and
without drop path, which bench.py does not have either. Crops are drawn before the clock starts: its augmentation,
torchvision on PIL in worker processes, is in bench.py --what=augment. Ours counts augmentation and data as well.
"""
import os
import sys
import time

import torch
import torch.distributed as dist

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))    # in place of this folder
import bench                                                  # noqa: E402

n_steps, n_crops = 7, 10         # measured, after two that warm up; batch and sizes are those of bench.py


def main(clone):
    sys.path.insert(0, clone)
    import utils
    import vision_transformer as vits
    from main_dino import DINOLoss
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)  # its loss reduces centres
    student, teacher = (utils.MultiCropWrapper(vits.vit_small(patch_size=16), vits.DINOHead(384, 65536, False, norm))
                        for norm in (False, True))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    dino_loss = DINOLoss(65536, n_crops, 0.04, 0.04, 0, 1)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    crops = [torch.randn(bench.batch_size, 3, size, size) for size in [224] * 2 + [96] * (n_crops - 2)]
    seconds = []
    for step in range(2 + n_steps):
        began = time.perf_counter()
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = 1e-5
            if i == 0:
                group["weight_decay"] = 0.04
        with torch.autocast("cpu", torch.bfloat16):
            teacher_output = teacher(crops[:2])
            student_output = student(crops)
            loss = dino_loss(student_output, teacher_output, 0)
        loss.item()
        optimizer.zero_grad()
        loss.backward()
        utils.clip_gradients(student, 3.0)
        utils.cancel_gradients_last_layer(1, student, 1)
        optimizer.step()
        with torch.no_grad():
            for param_q, param_k in zip(student.parameters(), teacher.parameters()):
                param_k.data.mul_(0.996).add_((1 - 0.996) * param_q.detach().data)
        seconds.append(time.perf_counter() - began)
    bench.print_share("facebookresearch/dino", seconds[2:], bench.count_matmuls(384, 12, 16, 4, 0, False, False))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not os.path.isfile(os.path.join(sys.argv[1], "main_dino.py")):
        sys.exit("error: comparisons/dino.py takes one argument, a clone of facebookresearch/dino, the folder with "
                 f"main_dino.py in it; got {sys.argv[1:]}.")
    main(sys.argv[1])
