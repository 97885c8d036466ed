"""OrganAMNIST: axial CT, eleven organs, one channel, already windowed to 8 bits (MedMNIST v2, downloaded on first use).

    torchrun --standalone --nproc_per_node=2 train.py config/organamnist.py

The paper's hyper-parameters (Listings 2-8) are train.py's defaults: 2000 iterations of 64 images from pretrained
weights, the DINO loss with centering. The paper had two A6000 GPUs and about half an hour; we have not run this file on
a GPU yet, so there is no number of ours to expect. Smaller and faster: --dataset_size=64.
"""
model_name = 'organamnist'
dataset_path = 'organamnist'
dataset_size = 224
model_type = 'facebook/dinov2-small'
local_crops_size = 98            # a multiple of the patch size
horizontal_flip = 0.0            # left and right organs are different classes
vertical_flip = 0.0              # likewise: a vertical flip of an axial slice mirrors it
