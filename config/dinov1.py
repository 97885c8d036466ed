"""DINO recipe: the numbers of facebookresearch/dino, main_dino.py (arXiv 2104.14294).

    torchrun --standalone --nproc_per_node=4 train.py config/pathmnist.py config/dinov1.py

Put this file after the file of a data set: it computes durations and rates from max_iterations and
global_batch_size. Durations are the published shares of the run (of 100 epochs, warm-up has 10, the
rise of the temperature 30, frozen prototypes 1).
"""
# loss: all pairs have the same weight; centering, no masks
centering = 'centering'
dino_head_norm_last_layer = True  # as main_dino.py; its help: False is often better for ViT-S
head_weight_norm = True
ibot_loss_weight = 0.0
koleo_loss_weight = 0.0
warmup_teacher_temp = 0.04
teacher_temp = 0.07
warmup_teacher_temp_iterations = max_iterations * 3 // 10

# optimizer: the published peak is for training from scratch. With released weights the lr set
# before this file stays
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
drop_path_rate = 0.1              # if the family has it

# teacher: 0.996 is for 100 000 iterations. Its memory 1 / (1 - m) should be at most a
# thirtieth of a short run
momentum_teacher = min(0.996, 1 - 30 / max(max_iterations, 60))

# crops
blur_probability = (1.0, 0.1, 0.5)
