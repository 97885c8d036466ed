"""PathMNIST: colorectal tissue, nine classes, RGB; test split of another centre (MedMNIST v2, downloaded on first use).

    torchrun --standalone --nproc_per_node=2 train.py config/pathmnist.py

The paper's hyper-parameters (Listings 2-8) are train.py's defaults: 2000 iterations of 64 images from pretrained
weights, the DINO loss with centering. The paper had two A6000 GPUs and about half an hour; we have not run this file on
a GPU yet, so there is no number of ours to expect. Smaller and faster: --dataset_size=64.
"""
model_name = 'pathmnist'
dataset_path = 'pathmnist'
dataset_size = 224
model_type = 'facebook/dino-vits16'
local_crops_size = 96            # a multiple of the patch size
