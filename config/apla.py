"""APLA (arXiv 2503.11335): train only the output projection of every attention, weight and bias.

    python train.py config/adapt.py config/apla.py --dataset_path=my_images/

A strategy: put it last, after a data set and any recipe. About one twelfth of a block is trained,
and nothing is added to the network: an export has the shape of its start. With
--train_last_blocks=4 or --freeze_backbone_layers=8 it is the projections of the last blocks.
docs/RESULTS.md compares the strategies.
"""
train_only = 'attention_output'
train_last_blocks = 0            # in all blocks
