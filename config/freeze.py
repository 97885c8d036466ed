"""Freezing: the embeddings and the first six blocks stand still (half of a ViT-S or ViT-B). A strategy: it comes last,
after a data set and any recipe.

    torchrun --standalone --nproc_per_node=2 train.py config/pathmnist.py config/dinov2.py config/freeze.py

Frozen blocks run no backward and exist once for student and teacher. Without iBOT masks both see the same global crops,
and the frozen blocks compute them once. --freeze_backbone_until=1000 thaws them at that iteration.
Measured with config/adapt.py, 3 seeds, last teacher, start -> end: brain MRI (test_iid) 5-NN 0.686 -> 0.744 (0.024),
linear probe 0.871 -> 0.827 (0.004), its AUC 0.959 -> 0.959; white blood cells 5-NN 0.820 -> 0.910 (0.034), probe
0.910 -> 0.933 (0.011).
"""
freeze_backbone_layers = 6
freeze_backbone_until = 0        # they stay frozen
