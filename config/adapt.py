"""Adapt released weights to a small set, some hundred to some ten thousand images, in minutes.

    python train.py config/adapt.py --dataset_path=my_images/ --model_type=facebook/dinov2-small

Every training image is a class, and a linear layer on CLS names the image that a crop comes from
(DIET, arXiv 2302.10260). There are no prototypes, no temperatures and no teacher: small sets break
them. The last two blocks are trained. Use it in place of config/dinov1.py. A strategy may follow
(config/lora.py). At the end the run compares the start, the end and mixtures of both on val. The
best one becomes checkpoints/best/hf.
DINOv2-small: 5-NN with CLS of several blocks rises by 0.01 to 0.10 on three medical sets, a linear
probe changes by -0.03 to 0.05 (docs/RESULTS.md). config/minute.py is the same with kept tokens.
"""
global_crops_size = 112          # for images of 64 to 160 pixels; for larger ones 224
local_crops_number = 0

dino_head_loss_weight = 0.0
diet_loss_weight = 1.0
diet_label_smoothing = 0.8
head_lr_mult = 10.0              # its layer is new, and most images come a few times only
train_last_blocks = 2            # four adapt more, and harmed CT sarcomas (docs/RESULTS.md)

global_batch_size = 16
max_iterations = 150
warmup_iterations = max_iterations // 10
lr = 2e-4
min_lr = 2e-5
weight_decay_end = 0.04
momentum_teacher = 0.95          # what is exported is the average of the student
final_momentum_teacher = 0.95    # a rising one would stop the average before it has caught up
eval_interval = 100
saveckp_freq = 1000
