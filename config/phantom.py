"""The embedded demo: CT-like slices drawn by phantom.py, one channel in Hounsfield units, a small ViT from scratch.

    python train.py config/phantom.py
"""
model_name = 'phantom'
dataset_path = 'phantom'
dataset_size = 64
intensity_range = (-1000, 1000)

use_pretrained = False
model_type = 'vit'
hidden_size = 192
num_hidden_layers = 4
num_attention_heads = 3
patch_size = 16

global_crops_size = 64
local_crops_size = 32
local_crops_number = 4

dino_head_out_dim = 512
head_hidden_dim = 512
head_bottleneck_dim = 128
centering = 'sinkhorn_knopp'

global_batch_size = 128
gradient_accumulation_steps = 1
max_iterations = 700
warmup_iterations = 30
warmup_teacher_temp_iterations = 0
teacher_temp = 0.02
warmup_teacher_temp = 0.02
koleo_loss_weight = 0.1
freeze_last_layer = 0
lr = 5e-4
min_lr = 1e-5
momentum_teacher = 0.9
weight_decay_end = 0.04
eval_interval = 100
saveckp_freq = 200
