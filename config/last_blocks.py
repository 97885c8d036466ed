"""Last blocks: train the last two blocks and the final norm; all before them is frozen.

    python train.py config/adapt.py config/last_blocks.py --dataset_path=my_images/

A strategy: put it last, after a data set and any recipe. Frozen blocks run no backward and exist
once for student and teacher; without iBOT masks they also run once for both on the global crops.
Unlike config/freeze.py it says how many blocks learn, so it suits a backbone of any depth.
docs/RESULTS.md compares the strategies.
"""
train_last_blocks = 2
