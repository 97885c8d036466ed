"""Freezing: the embeddings and the first six blocks stand still (half of a ViT-S or ViT-B). A strategy: it comes last,
after a data set and any recipe.

    torchrun --standalone --nproc_per_node=2 train.py config/pathmnist.py config/dinov2.py config/freeze.py

Frozen blocks run no backward and exist once for student and teacher. Without iBOT masks both see the same global crops,
and the frozen blocks compute them once. --freeze_backbone_until=1000 thaws them at that iteration.
"""
freeze_backbone_layers = 6
freeze_backbone_until = 0        # they stay frozen
