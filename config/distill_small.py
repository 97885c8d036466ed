"""Distillation into a small student from scratch on a small set of small images, hundreds of iterations.

    python distill.py config/distill_small.py --dataset_path=my_images/ --distilled_model_type=facebook/dinov2-small
"""
model_name = 'distill_small'
augmentation = 'auto'
use_pretrained = False
model_type = 'dinov2'
hidden_size = 192
num_hidden_layers = 6
num_attention_heads = 3
patch_size = 14

global_crops_size = 112
distilled_crops_size = 112
global_crops_number = 1
local_crops_size = 56

dino_head_out_dim = 512
head_hidden_dim = 512
head_bottleneck_dim = 128

global_batch_size = 32
max_iterations = 300
warmup_iterations = max_iterations // 10
lr = 1e-3
min_lr = 1e-5
weight_decay_end = 0.04
momentum_teacher = 0.98
final_momentum_teacher = 0.98
eval_interval = 100
saveckp_freq = 1000
