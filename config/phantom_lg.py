"""Label-guided crops on the embedded phantom: small calcifications, with a mask each, on bright vessels between bright
bones (DINO-LG, paper sections 2.2.4 and 3.2). Can attention find them? If the teacher sees the guided crops, too.

    python train.py config/phantom_lg.py
    python attention.py --run=out/phantom_lg --split=test --detection=true

The same budget with random local crops only:

    python train.py config/phantom_lg.py --label_guided_crops_number=0 --label_guided_loss_weight=0 \
        --local_crops_number=4

One CPU core: 10 minutes; two: 3.3 s an iteration. Test, 3 seeds, guided, random, brightest patch: F1 of regions 0.490
(0.110), 0.234 (0.021), 0.122; hottest patch on a calcification 0.733 (0.206), 0.296 (0.049), 0.146; patch AUROC 0.847,
0.750, 0.880. README has the rest.
"""
model_name = 'phantom_lg'
dataset_path = 'phantom'
dataset_size = 224                # 3600 slices, drawn once, which takes a minute
intensity_range = (-100, 1000)    # HU: fat black; a calcification is 300 to 800 above its surroundings
blur_probability = (0.0, 0.0, 0.0)  # blur hides it

# released weights, of which the last four blocks learn: from scratch, in minutes, a ViT does not learn to see them
model_type = 'facebook/dinov2-small'
freeze_backbone_layers = 8        # 11: one block alone does not learn to find them
freeze_backbone_iterations = 0

global_crops_size = 224
global_crops_scale = (0.7, 1.0)   # what a guided crop shows has to be in what the teacher sees
local_crops_size = 42
local_crops_scale = (0.05, 0.3)
local_crops_number = 0            # further ones are welcome; here all are guided
label_guided_crops_number = 4
label_guided_crops_scale = (0.01, 0.02)  # 22 to 32 pixels, tight: the crop is about the calcification, 4 to 11 wide
label_guided_loss_weight = 2.0    # the teacher sees them, too; 0, as in the paper: F1 0.19

dino_head_out_dim = 64            # few prototypes, as 256 instead find less
head_hidden_dim = 256
head_bottleneck_dim = 128
centering = 'sinkhorn_knopp'
koleo_loss_weight = 0.1
teacher_temp = 0.02
warmup_teacher_temp = 0.02
warmup_teacher_temp_iterations = 0
momentum_teacher = 0.9

global_batch_size = 32
gradient_accumulation_steps = 1
max_iterations = 100
warmup_iterations = 10
freeze_last_layer = 0
lr = 3e-4
min_lr = 1e-5
weight_decay_end = 0.04
eval_interval = 0
eval_max_images = 256             # features of all 3600 slices would take as long as the training
saveckp_freq = 100
