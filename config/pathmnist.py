"""PathMNIST: colorectal tissue, nine classes, RGB; its test split is from another center.

    torchrun --standalone --nproc_per_node=2 train.py config/pathmnist.py

The data set is one of MedMNIST v2 and is downloaded at the first use. The hyper-parameters are
train.py's defaults, those of the paper (Listings 2-8): 2000 iterations of 64 images from pretrained
weights, the DINO loss with centering. The paper used two A6000 GPUs for about half an hour. We have
not run this file on a GPU yet, so there is no number to expect. --dataset_size=64 is smaller and
faster.
GPU memory of a step, counted by bench.py --what=memory: dino-vits16 standard 7.9 GB on one GPU,
4.4 on each of two, 2.7 on each of four; real peaks are up to 2.2 times that.
"""
model_name = 'pathmnist'
dataset_path = 'pathmnist'
dataset_size = 224
model_type = 'facebook/dino-vits16'
local_crops_size = 96            # a multiple of the patch size
