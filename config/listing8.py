"""The paper's Listings 2 to 8 to the letter: DINOv2-base, LoRA of rank 4, 64 images a step.

    torchrun --standalone --nproc_per_node=2 train.py config/listing8.py --dataset_path=pathmnist

The paper does not publish its folder dataset/pathmnist, so name your data as above; the data set
'pathmnist' is a download of 12 GB. Listing 6 has local crops of 96 pixels: with the patches of this
model, 14 pixels, they have to be made smaller, 84 pixels, and the log says so. Add
--log_interval=1 for a log line after every iteration, and --distribution=fsdp for Listing 1.
A YAML file as the paper prints it means the same: train.py --train_config_file training.yaml.
GPU memory of a step, counted by bench.py --what=memory: dinov2-base lora 16.6 GB on one GPU,
8.7 on each of two, 4.8 on each of four; real peaks are up to 2.2 times that.
"""
# Listing 2: DINO head
dino_head_out_dim = 65536
dino_head_norm_last_layer = False
dino_head_loss_weight = 1.0

# Listing 3: iBOT
ibot_loss_weight = 0.0
ibot_out_dim = 65536
ibot_norm_last_layer = True
ibot_mask_sample_probability = 0.5
ibot_mask_ratio_min_max = (0.1, 0.5)

# Listing 4 is for distill.py: its distilled_model_type is 'facebook/dinov2-giant'

# Listing 5: LoRA
lora_r = 4
lora_alpha = 16
lora_dropout = 0.1

# Listing 6: crops
global_crops_scale = (0.4, 1.0)
local_crops_number = 8
global_crops_number = 2
local_crops_scale = (0.1, 0.4)
global_crops_size = 224
local_crops_size = 96

# Listing 7: data
dataset_path = 'dataset/pathmnist'
shuffle = True

# Listing 8: training
model_name = 'training_test_fsdp'
model_type = 'facebook/dinov2-base'
global_batch_size = 64
max_iterations = 2000
mixed_precision = 'bf16'         # paper: true
use_lora = True
freeze_last_layer = 100
warmup_teacher_temp_iterations = 500
warmup_iterations = 1000
teacher_temp = 0.04
freeze_backbone_layers = 0
momentum_teacher = 0.996
centering = 'centering'
ibot_separate_head = False
use_pretrained = True
generate_samples = True
lr = 1e-4
min_lr = 1e-5
saveckp_freq = 250
