"""Calcifications in CT, one channel in Hounsfield units, label-guided (DINO-LG, paper sections 2.2.4 and 3.2): your own
slices and masks.

    python train.py config/phantom_lg.py config/ct_calcification.py --dataset_path=my_ct/

my_ct/ holds images/ (DICOM, or .npy in HU) and beside it masks/ with files of the same names, or boxes.json:
{"a.dcm": [[left, top, right, bottom], ...], ...} in pixels. Slices without a label are welcome: they get random crops.
Then look where it looks, on patients that it has not seen:

    python attention.py --run=out/ct_calcification --images=other_ct/images --masks=other_ct/masks --detection=true

The paper had no public data here and neither have we, so there is no number to expect. How it learns is what worked on
drawn slices, config/phantom_lg.py; here are the data and the sizes. Meant for a GPU: 1024 patches a slice.
"""
model_name = 'ct_calcification'
dataset_path = 'my_ct/'
num_channels = 1                 # the patch embedding becomes the sum of its three colours
intensity_range = (-100, 900)    # HU: fat black, dense calcium white. Calcium counts from 130 HU (Agatston), and above
                                 # 900 all is bone or metal; a soft-tissue window (-160, 240) would make both white
window_jitter = 0.1              # scanners and contrast agent differ
blur_probability = (0.1, 0.1, 0.1)  # blur hides what is two pixels large

global_crops_size = 448          # half a slice pixel would be lost at 224, and with it small lesions
local_crops_size = 42
local_crops_number = 4
label_guided_crops_number = 4    # further ones
label_guided_loss_weight = 2.0   # the teacher sees them, too, which the paper does not have: README, label-guided crops
label_guided_crops_scale = (0.002, 0.01)  # of 512 pixels: squares of 23 to 51, some times what they are to show
