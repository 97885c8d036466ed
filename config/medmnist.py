"""Any MedMNIST data set by its name: bloodmnist, dermamnist, retinamnist, tissuemnist, ...

    torchrun --standalone --nproc_per_node=2 train.py config/medmnist.py --dataset_path=bloodmnist

The data set is downloaded at the first use; the size and the time left are printed. --dataset_size
is 28, 64, 128 or 224, and the smaller ones are small files. The run has the data set's name. The
hyper-parameters are train.py's defaults, those of the paper (Listings 2-8): 2000 iterations of 64
images from pretrained weights, the DINO loss with centering. The paper used two A6000 GPUs for
about half an hour. We have not run this file on a GPU yet, so there is no number to expect. If left
and right differ, as in chest X-rays, add --horizontal_flip=0 --vertical_flip=0, or for organs use
config/organamnist.py.
GPU memory of a step, counted by bench.py --what=memory: dinov2-small standard 9.0 GB on one GPU,
5.0 on each of two, 3.0 on each of four; real peaks are up to 2.2 times that.
"""
model_name = ''
dataset_size = 224
model_type = 'facebook/dinov2-small'
local_crops_size = 98            # a multiple of the patch size
