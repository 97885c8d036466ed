"""DINOv3 at high resolution: train a ViT on larger crops, with a Gram anchor at its first weights.

    torchrun --standalone --nproc_per_node=4 train.py config/pathmnist.py config/dinov3_hires.py \
        --model_type=facebook/dinov3-vits16-pretrain-lvd1689m

This is the high-resolution adaptation of DINOv3 (arXiv 2508.10104 section 5.1) with the numbers of
dinov3_vit7b16_high_res_adapt.yaml. The anchor keeps the patch features near those of the first
weights. Use it in place of config/dinov3.py, with a data set whose images are larger than the
crops. We have not measured this file yet.
Crop sizes are multiples of those set before this file, so any patch size fits. Give other sizes
after it, also for gram_crops_size. Durations are the published shares of the run.
"""
# crops: published 256 -> 512 or 768, the anchor's 768 or 1152, local 112 -> 112 to 336
global_crops_size = 2 * global_crops_size
local_crops_size = 2 * local_crops_size
gram_crops_size = global_crops_size * 3 // 2
global_crops_scale = (0.32, 1.0)
local_crops_scale = (0.05, 0.32)
blur_probability = (0.0, 0.9, 0.5)  # as the released weights were trained, see augment.photometric

# losses: those of config/dinov3.py and the Gram loss
gram_loss_weight = 1.5
gram_teacher = 'start'
gram_refresh_iterations = 0
dino_local_loss_weight = 0.5
centering = 'sinkhorn_knopp'
head_weight_norm = False
ibot_loss_weight = 1.0
ibot_separate_head = True
ibot_out_dim = dino_head_out_dim
ibot_mask_exact = True
koleo_loss_weight = 0.1
koleo_group_size = 16             # two GPUs of 8 images
warmup_teacher_temp = 0.07
teacher_temp = 0.07
warmup_teacher_temp_iterations = 0

# optimizer: the rate rises during the first third, then is constant (published: a cosine up, here
# a line)
lr = 1.25e-5 * 4 * (global_batch_size / 1024) ** 0.5
min_lr = lr
warmup_iterations = max_iterations // 3
weight_decay = 0.04
weight_decay_end = 0.04
adam_betas = (0.9, 0.99)
clip_grad = 30.0
clip_grad_by = 'module'
freeze_last_layer = max_iterations // 100  # published: 0, because its heads are trained ones
freeze_last_layer_by = 'lr'
layerwise_decay = 0.98
patch_embed_lr_mult = 0.2
schedule_reaches_end = True
drop_path_rate = 0.0              # the 7B model: 0.4
pos_embed_rescale = 2.0

# teacher: constant; 0.999 is for 30 000 iterations. Its memory 1 / (1 - m) should be at most a
# thirtieth of a short run
momentum_teacher = min(0.999, 1 - 30 / max(max_iterations, 60))
final_momentum_teacher = momentum_teacher
