"""Distillation into a small student from scratch, on a small set of small images, in minutes.

    python distill.py config/distill_small.py --dataset_path=my_images/ \
        --distilled_model_type=facebook/dinov2-small

Student and teacher see four crops of each of 64 images in a step. If you have few images, add
--fixed_views=2 --teacher_cache=FOLDER: the teacher then computes only eight crops of an image. For
some hundred images use --fixed_views=24. A pretrained student has sizes of its own:
--use_pretrained=true --model_type=facebook/dino-vits16 --lr=1e-4, and crops that are a multiple of
its patch size.
Hardware: one CPU core, 5 to 6 minutes. On 1905 brain MRI images expect a linear probe accuracy on
test_iid of 0.754; without a teacher the student reaches 0.701.
"""
model_name = 'distill_small'
use_pretrained = False
model_type = 'dinov2'
hidden_size = 192
num_hidden_layers = 6
num_attention_heads = 3
patch_size = 16                   # 16 patches for an image of 64 pixels

global_crops_size = 64
distilled_crops_size = 112        # enough for images of 64 to 96 pixels; 224 costs four times
global_crops_number = 4           # with one crop the features have a lower rank (RankMe)
local_crops_size = 32

# near what is evaluated: whole images with little blur
global_crops_scale = (0.5, 1.0)
blur_probability = (0.1, 0.1, 0.1)

feature_patch_weight = 0.2        # CLS is what is used later
feature_whitening = 0.5           # it helps only if the weight of the patches is low

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
