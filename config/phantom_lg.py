"""Label-guided crops on the embedded phantom: small calcifications, with a mask each, on bright vessels between bright
bones (DINO-LG, paper sections 2.2.4 and 3.2). Can attention find them? If the teacher sees the guided crops, too.

    python train.py config/phantom_lg.py
    python attention.py --run=out/phantom_lg --split=test --detection=true

The same budget with random local crops only:

    python train.py config/phantom_lg.py --label_guided_crops_number=0 --label_guided_loss_weight=0 --local_crops_number=4

One CPU core: 2.4 minutes. Test, 3 seeds, guided against random: patch AUROC 0.880 (0.017), 0.761 (0.023); F1 of regions
in slices with a calcification 0.616 (0.043), 0.412 (0.028); the brightest patch 0.858 and 0.554. README has the rest.
"""
model_name = 'phantom_lg'
dataset_path = 'phantom'
dataset_size = 96                 # at 64 pixels a calcification is a pixel or two, and blurred into its vessel
intensity_range = (-100, 1000)    # HU: fat black; a calcification is 300 to 800 above its surroundings
blur_probability = (0.0, 0.0, 0.0)  # blur hides it

use_pretrained = False
model_type = 'vit'
hidden_size = 128
num_hidden_layers = 3
num_attention_heads = 4
patch_size = 12                   # a grid of 8 x 8

global_crops_size = 96
global_crops_scale = (0.7, 1.0)   # what a guided crop shows has to be in what the teacher sees
local_crops_size = 24
local_crops_scale = (0.05, 0.3)
local_crops_number = 0            # further ones are welcome; here all are guided
label_guided_crops_number = 4
label_guided_crops_scale = (0.05, 0.07)  # 21 to 25 pixels: tight, and as large as in the whole slice
label_guided_loss_weight = 2.0    # the teacher sees them, too; 0, as in the paper: AUROC 0.69

# as config/phantom.py
dino_head_out_dim = 512
head_hidden_dim = 256
head_bottleneck_dim = 128
centering = 'sinkhorn_knopp'
koleo_loss_weight = 0.1
teacher_temp = 0.02
warmup_teacher_temp = 0.02
warmup_teacher_temp_iterations = 0
momentum_teacher = 0.9

global_batch_size = 64
gradient_accumulation_steps = 1
max_iterations = 500
warmup_iterations = 20
freeze_last_layer = 0
lr = 1e-3
min_lr = 1e-5
weight_decay_end = 0.04
eval_interval = 250
saveckp_freq = 250
