"""DINO (arXiv 2104.14294), the numbers of facebookresearch/dino, main_dino.py. A recipe: combine it with a data set.

    torchrun --standalone --nproc_per_node=4 train.py config/pathmnist.py config/dinov1.py

Durations are the published shares of the run (100 epochs: warm-up 10, temperature 30, frozen prototypes 1). Written
after the data set's file, they follow its max_iterations and global_batch_size.
"""
# loss: all pairs alike, centred targets, no masks
centering = 'centering'
dino_head_norm_last_layer = True  # main_dino.py's default; False is often better for ViT-S (dino help text)
head_weight_norm = True
ibot_loss_weight = 0.0
koleo_loss_weight = 0.0
warmup_teacher_temp = 0.04
teacher_temp = 0.07
warmup_teacher_temp_iterations = max_iterations * 3 // 10

# optimizer: the published peak is for training from scratch; released weights keep the gentle lr set before this file
lr = lr if use_pretrained else 5e-4 * global_batch_size / 256
min_lr = 1e-6
warmup_iterations = max_iterations // 10
weight_decay = 0.04
weight_decay_end = 0.4
clip_grad = 3.0
clip_grad_by = 'parameter'
freeze_last_layer = max_iterations // 100
freeze_last_layer_by = 'grad'
layerwise_decay = 1.0
patch_embed_lr_mult = 1.0
schedule_reaches_end = False
drop_path_rate = 0.1              # where the family has it

# teacher: 0.996 is for 100 000 iterations; its memory 1 / (1 - m) should not be more than a thirtieth of a short run
momentum_teacher = min(0.996, 1 - 30 / max(max_iterations, 60))

# crops
blur_probability = (1.0, 0.1, 0.5)
