"""OrganAMNIST: axial CT, eleven organs, one channel, already windowed to 8 bits.

    torchrun --standalone --nproc_per_node=2 train.py config/organamnist.py

This is config/medmnist.py without flips. --dataset_path=organcmnist and organsmnist are the coronal
and sagittal views.

The data set is one of MedMNIST v2 and is downloaded at the first use. The hyper-parameters are
train.py's defaults, those of the paper (Listings 2-8): 2000 iterations of 64 images from pretrained
weights, the DINO loss with centering. The paper used two A6000 GPUs for about half an hour. We have
not run this file on a GPU yet, so there is no number to expect. --dataset_size=64 is smaller and
faster.
"""
model_name = ''                  # that of the data set
dataset_path = 'organamnist'
dataset_size = 224
model_type = 'facebook/dinov2-small'
local_crops_size = 98            # a multiple of the patch size
horizontal_flip = 0.0            # left and right organs are different classes
vertical_flip = 0.0              # likewise: a vertical flip of an axial slice mirrors it
