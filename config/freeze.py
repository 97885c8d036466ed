"""Freezing: the embeddings and the first six blocks are frozen (half of a ViT-S or ViT-B).

    torchrun --standalone --nproc_per_node=2 train.py config/pathmnist.py config/freeze.py

A strategy: put it last, after a data set and any recipe. Frozen blocks run no backward and exist
once for student and teacher. Without iBOT masks student and teacher see the same global crops, so
the frozen blocks run once for both. --freeze_backbone_until=1000 trains them from that iteration.
With config/adapt_dino.py on brain MRI expect 5-NN accuracy on test_iid to rise from 0.686 to 0.744.
GPU memory of a step, counted by bench.py --what=memory: dino-vitb16 freeze 8.5 GB on one GPU,
5.0 on each of two, 3.3 on each of four; real peaks are up to 2.2 times that.
"""
freeze_backbone_layers = 6
freeze_backbone_until = 0        # they stay frozen
train_last_blocks = 0            # the other blocks are trained
