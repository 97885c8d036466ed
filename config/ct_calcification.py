"""Calcifications in your CT slices with masks or boxes: label-guided crops (DINO-LG), one channel.

    python train.py config/phantom_lg.py config/ct_calcification.py --dataset_path=my_ct/
    python attention.py --run=out/ct_calcification --detection=true \
        --images=other_ct/images --masks=other_ct/masks

my_ct/ holds images/ (DICOM, or .npy in HU) and either masks/ with files of the same names, or
boxes.json: {"a.dcm": [[left, top, right, bottom], ...], ...} in pixels. Slices without a label get
random crops. The second command shows where CLS looks; give it patients that were not in my_ct/.
The paper (sections 2.2.4 and 3.2) had no public data, and neither have we, so there is no number to
expect. The training settings are those of config/phantom_lg.py, which work on drawn slices. This
file adds the data and the sizes. Hardware: a GPU, because a slice has 1024 patches.
"""
model_name = 'ct_calcification'
dataset_path = 'my_ct/'
num_channels = 1                 # the patch embedding is summed over its three colours
# fat is black, dense calcium white. Calcium begins at 130 HU (Agatston). Above 900 HU is only bone
# or metal. In a soft-tissue window, (-160, 240), calcium and bone would both be white
intensity_range = (-100, 900)    # HU
window_jitter = 0.1              # scanners and contrast agents differ
blur_probability = (0.1, 0.1, 0.1)  # blur hides lesions of two pixels

global_crops_size = 448          # 224 would lose small lesions
local_crops_size = 42
local_crops_number = 4
label_guided_crops_number = 4    # in addition
label_guided_loss_weight = 2.0   # the teacher sees them, too; not in the paper, see README
label_guided_crops_scale = (0.002, 0.01)  # squares of 23 to 51 pixels of a slice of 512
