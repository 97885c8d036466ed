"""Distillation into a small student from scratch, on some hundred to some ten thousand small images, in minutes.

    python distill.py config/distill_small.py --dataset_path=my_images/ --distilled_model_type=facebook/dinov2-small

Student and teacher see four crops of each of 64 images in a step. With few images add --fixed_views=2 (24 for some
hundred) --teacher_cache=FOLDER: the teacher then looks at eight crops of an image and no more. Linear probe, 5-NN, 3
seeds, 5 to 6 minutes on one core: brain MRI (1905 images, test_iid) 0.754, 0.726, without a teacher 0.701, 0.686; white
blood cells (179 images) 0.906, 0.906, without 0.783, 0.790. README has the spreads.

A pretrained student brings its own shape: --use_pretrained=true --model_type=facebook/dino-vits16 --lr=1e-4, and crops
that are a multiple of its patch size.
"""
model_name = 'distill_small'
use_pretrained = False
model_type = 'dinov2'
hidden_size = 192
num_hidden_layers = 6
num_attention_heads = 3
patch_size = 16                   # 16 patches of an image of 64 pixels

global_crops_size = 64
distilled_crops_size = 112        # DINOv2's features of images of 64 to 96 pixels; its own 224 costs four times as much
global_crops_number = 4           # of one image in a step; RankMe of CLS after 500 steps 57, with one crop 29
local_crops_size = 32

# near what will be evaluated: whole images, hardly blurred
global_crops_scale = (0.5, 1.0)
blur_probability = (0.1, 0.1, 0.1)

feature_patch_weight = 0.2        # CLS is what will be used
feature_whitening = 0.5           # with so little weight on patches; with weight 1 it did not help (one seed)

dino_head_out_dim = 512
head_hidden_dim = 512
head_bottleneck_dim = 128

global_batch_size = 64
max_iterations = 500
warmup_iterations = max_iterations // 10
lr = 2e-3
adam_betas = (0.9, 0.99)
min_lr = 1e-5
weight_decay_end = 0.04
momentum_teacher = 0.98
final_momentum_teacher = 0.98
eval_interval = 100
saveckp_freq = 1000
