"""The training step of facebookresearch/dino: ViT-S/16, 2x224 + 8x96, K 65536, batch 8, a CPU.

    git clone https://github.com/facebookresearch/dino ../dino  # it needs torchvision, we do not
    python comparisons/facebook_dino.py ../dino                 # prints one line
    python bench.py --what=step                                 # our step

Networks, heads, loss, clipping and parameter groups are those of the repository. Its loop calls
CUDA by name. So the loop is written again below, in the order of its train_one_epoch, in the dtype
of bench.py (bf16 needs no loss scaling) and without drop path, which bench.py does not have either.
Crops are drawn before the clock starts. bench.py --what=augment times the repository's
augmentation, torchvision on PIL. Our step includes augmentation and data.
"""
import os
import sys
import time

if __name__ == "__main__":  # before the imports that take seconds
    if len(sys.argv) != 2 or not os.path.isfile(f"{sys.argv[1]}/main_dino.py"):
        sys.exit("error: comparisons/facebook_dino.py takes one argument, a clone of "
                 "facebookresearch/dino, the folder that has main_dino.py; got "
                 f"{' '.join(sys.argv[1:]) or 'none'}")

import torch
import torch.distributed as dist

here = os.path.dirname(os.path.abspath(__file__))
sys.path[0] = os.path.dirname(here)  # bench.py is there
import bench

N_STEPS, N_CROPS = 7, 10  # measured, after two to warm up; batch and sizes are those of bench.py


def main(clone):
    config = bench.read_config()
    sys.path.insert(0, clone)
    import utils
    import vision_transformer as vits
    from main_dino import DINOLoss
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0,
                            world_size=1)  # the loss reduces its centers
    networks = []
    for norm_last_layer in (False, True):
        head = vits.DINOHead(384, 65536, False, norm_last_layer)
        networks.append(utils.MultiCropWrapper(vits.vit_small(patch_size=16), head))
    student, teacher = networks
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    dino_loss = DINOLoss(65536, N_CROPS, 0.04, 0.04, 0, 1)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    autocast = bench.autocast_for(torch.device("cpu"), config.mixed_precision)
    sizes = [224] * 2 + [96] * (N_CROPS - 2)
    crops = [torch.randn(config.batch_size, 3, size, size) for size in sizes]
    seconds = []
    for step in range(2 + N_STEPS):
        began = time.perf_counter()
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = 1e-5
            if i == 0:
                group["weight_decay"] = 0.04
        with autocast():
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
    flops = bench.count_matmuls(config, 384, 12, 16, mlp_ratio=4, n_frozen=0,
                                use_lora=False, shares=False, whole=True)
    bench.print_share(config, "facebookresearch/dino", seconds[2:], flops)


if __name__ == "__main__":
    main(sys.argv[1])
