"""DINOv3 recipe: the numbers of facebookresearch/dinov3 (arXiv 2508.10104), without Gram anchor.

    torchrun --standalone --nproc_per_node=4 train.py config/pathmnist.py config/dinov3.py \
        --model_type=facebook/dinov3-vits16-pretrain-lvd1689m

Put this file after the file of a data set: it computes durations and rates from max_iterations and
global_batch_size. The numbers are those of the ViT-L on ImageNet. Durations are the published
shares of the run. Gram anchoring belongs to a late stage of long runs (config/dinov3_hires.py).
"""
# losses: DINO and iBOT with a head each, Sinkhorn-Knopp, plain last layers, KoLeo
centering = 'sinkhorn_knopp'
head_weight_norm = False
ibot_loss_weight = 1.0
ibot_separate_head = True
ibot_out_dim = dino_head_out_dim
ibot_mask_exact = True
koleo_loss_weight = 0.1
warmup_teacher_temp = 0.04
teacher_temp = 0.07
warmup_teacher_temp_iterations = max_iterations * 3 // 10

# optimizer: the published peak is for training from scratch. With released weights the lr set
# before this file stays
lr = lr if use_pretrained else 1e-3 * 4 * (global_batch_size / 1024) ** 0.5
min_lr = 1e-6
warmup_iterations = max_iterations // 10
weight_decay = 0.04
weight_decay_end = 0.4
clip_grad = 3.0
clip_grad_by = 'module'
freeze_last_layer = max_iterations // 100
freeze_last_layer_by = 'lr'
layerwise_decay = 0.9
patch_embed_lr_mult = 0.2
schedule_reaches_end = True
drop_path_rate = 0.0 if use_pretrained else 0.3
pos_embed_rescale = 0.0           # the 7B model: 2.0

# teacher: 0.992 is for 125 000 iterations. Its memory 1 / (1 - m) should be at most a
# thirtieth of a short run
momentum_teacher = min(0.992, 1 - 30 / max(max_iterations, 60))

# crops: blur as the released weights were trained with; the code of DINOv2 and DINOv3 inverts the
# probability (see augment.photometric)
global_crops_scale = (0.32, 1.0)
local_crops_scale = (0.05, 0.32)
blur_probability = (0.0, 0.9, 0.5)
