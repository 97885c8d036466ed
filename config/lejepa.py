"""LeJEPA (arXiv 2511.08544): adapt released weights to a small set without prototypes.

    python train.py config/lejepa.py --dataset_path=my_images/ --model_type=facebook/dinov2-small

A recipe in place of config/adapt.py; a strategy may follow (config/last_blocks.py, config/lora.py).
Every crop predicts the mean embedding of its image's global crops, and SIGReg keeps the embeddings
of a batch Gaussian, so they cannot collapse. There is no teacher, no prototype and no temperature.
The one weight is lejepa_sigreg_weight. SIGReg sees one batch: larger batches make it more exact.
What is exported is the average of the student. docs/RESULTS.md compares the objectives.
"""
# crops for images of 64 to 160 pixels; for larger images and patch 14 use 224 and 98
global_crops_size = 112
local_crops_size = 56
local_crops_number = 4

dino_head_loss_weight = 0.0
lejepa_loss_weight = 1.0
lejepa_sigreg_weight = 0.05
lejepa_out_dim = 64
head_hidden_dim = 512            # of its head

# a low rate, lower for early blocks
global_batch_size = 32
max_iterations = 150
warmup_iterations = max_iterations // 10
lr = 5e-5
min_lr = 5e-6
layerwise_decay = 0.8
weight_decay = 0.05
weight_decay_end = 0.05
momentum_teacher = 0.95
eval_interval = 100
saveckp_freq = 1000
