"""Label-guided crops on the phantom (DINO-LG): attention has to find small calcifications.

    python train.py config/phantom_lg.py
    python attention.py --run=out/phantom_lg --split=test --detection=true

The calcifications lie on bright vessels between bright bones, and each has a mask (paper sections
2.2.4 and 3.2). Attention finds them if the teacher sees the guided crops, too. The same budget with
random local crops:

    python train.py config/phantom_lg.py --label_guided_crops_number=0 \
        --label_guided_loss_weight=0 --local_crops_number=4

Hardware: one CPU core, 10 minutes. Expect an average precision of patches on test of 0.183 (sd
0.052, 3 seeds); random crops reach 0.056. docs/RESULTS.md has the other measures.
"""
model_name = 'phantom_lg'
dataset_path = 'phantom'
dataset_size = 224                # 3600 slices, drawn once in a minute
intensity_range = (-100, 1000)    # HU: fat is black; calcifications are 300 to 800 brighter
blur_probability = (0.0, 0.0, 0.0)  # blur hides calcifications

# Released weights with the last four blocks trained. From scratch a ViT does not learn to see
# calcifications in minutes
model_type = 'facebook/dinov2-small'
freeze_backbone_layers = 8        # with 11, one trained block does not learn to find them
freeze_backbone_iterations = 0

global_crops_size = 224
global_crops_scale = (0.7, 1.0)   # the global crops have to show what a guided crop shows
local_crops_size = 42
local_crops_scale = (0.05, 0.3)
local_crops_number = 0            # all local crops are guided; more are possible
label_guided_crops_number = 4
label_guided_crops_scale = (0.01, 0.02)  # 22 to 32 pixels; a calcification has 4 to 11
label_guided_loss_weight = 2.0    # the teacher sees them, too; 0, as in the paper, finds less

dino_head_out_dim = 64            # few prototypes; 256 find less
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
eval_max_images = 256             # features of all 3600 slices take as long as the training
saveckp_freq = 100
