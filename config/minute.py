"""Adapt released weights in a minute on a laptop: only the last two blocks are trained.

    python train.py config/minute.py --dataset_path=my_images/ --model_type=facebook/dinov2-small

Every training image is a class, and a linear layer on CLS names the image that a crop comes from
(DIET, config/diet.py). The other blocks are frozen. What they compute of a crop is kept in memory
(fixed_views), on a CPU also what they compute of the measured images. Use it in place of
config/adapt.py, for 200 to 5000 images of 64 to 112 pixels. DINOv2-small: 5-NN with CLS of several
blocks rises by 0.02 to 0.10 on three medical sets (docs/RESULTS.md).
"""
global_crops_size = 112          # for images of 64 to 160 pixels
local_crops_number = 0           # local crops cannot be kept
train_last_blocks = 2
fixed_views = 4                  # of each image, by turns; thousands of images come once at most

dino_head_loss_weight = 0.0
diet_loss_weight = 1.0
diet_label_smoothing = 0.8
head_lr_mult = 10.0              # its layer is new, and most images come a few times only

global_batch_size = 16
max_iterations = 100
warmup_iterations = max_iterations // 10
lr = 2e-4
min_lr = 2e-5
weight_decay_end = 0.04
momentum_teacher = 0.95          # what is exported is the average of the student
final_momentum_teacher = 0.95    # a rising one would stop the average before it has caught up
eval_max_images = 500
eval_interval = 0
saveckp_freq = 1000
