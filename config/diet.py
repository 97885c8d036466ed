"""DIET-CP (arXiv 2509.06990): adapt released weights to a small set by telling its images apart.

    python train.py config/diet.py --dataset_path=my_images/ --model_type=facebook/dinov2-small

A recipe in place of config/adapt.py. Every training image is a class, and a linear layer on CLS
names the image of a crop. There is no teacher, no prototype and no temperature. The last two blocks
and the final norm are trained, after the linear layer has learned alone for a tenth of the run.
Every image should come by some ten times: max_iterations = 10 * images / global_batch_size.
What is exported is the average of the student. docs/RESULTS.md compares the objectives.
"""
# crops for images of 64 to 160 pixels; for larger images and patch 14 use 224
global_crops_size = 112
local_crops_number = 0

dino_head_loss_weight = 0.0
diet_loss_weight = 1.0
diet_label_smoothing = 0.8       # public code of DIET-CP has 0.3
train_last_blocks = 2

global_batch_size = 32
max_iterations = 300
warmup_iterations = max_iterations // 10
lr = 1e-4
min_lr = 1e-6
weight_decay = 0.05
weight_decay_end = 0.05
momentum_teacher = 0.95
eval_interval = 100
saveckp_freq = 1000
