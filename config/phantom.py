"""The demo: a small ViT from scratch on drawn CT-like slices, one channel, no download.

    python train.py config/phantom.py

Hardware: one or two CPU cores, no GPU. 5-NN accuracy on test, five seeds each on an Intel Xeon; raw
pixels have 0.478, the untrained ViT 0.26:

| threads | mean | sd | minutes |
|---|---|---|---|
| 1 | 0.674 | 0.017 | 6.3 |
| 2 | 0.669 | 0.025 | 5.4, beside another run |
"""
model_name = 'phantom'
dataset_path = 'phantom'
dataset_size = 64
intensity_range = (-1000, 1000)   # HU, from air to bone: the lungs must not be clipped

use_pretrained = False
model_type = 'vit'
hidden_size = 192
num_hidden_layers = 4
num_attention_heads = 3
patch_size = 16                   # patch 8 costs more and learns less in the same time

global_crops_size = 64
local_crops_size = 32
local_crops_number = 4

# A short run from scratch on few images is brittle. It needs KoLeo and a sharp teacher. A higher lr
# makes it worse (docs/RESULTS.md)
dino_head_out_dim = 512
head_hidden_dim = 512
head_bottleneck_dim = 128
centering = 'sinkhorn_knopp'
koleo_loss_weight = 0.1
teacher_temp = 0.02
warmup_teacher_temp = 0.02
warmup_teacher_temp_iterations = 0
momentum_teacher = 0.9            # a fast teacher; 0.95 learns less in this time

global_batch_size = 128
gradient_accumulation_steps = 1   # Sinkhorn-Knopp balances prototypes over the batch
max_iterations = 700
warmup_iterations = 30
freeze_last_layer = 0
lr = 5e-4
min_lr = 1e-5
weight_decay_end = 0.04
eval_interval = 100
saveckp_freq = 350
