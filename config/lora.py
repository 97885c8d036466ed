"""LoRA: low-rank adapters on query and value projections; the pretrained weights stay as they are, in one copy for
student, teacher and Gram anchor. A strategy: it comes last, after a data set and any recipe.

    torchrun --standalone --nproc_per_node=2 train.py config/pathmnist.py config/dinov2.py config/lora.py

The export has the adapters merged (AutoModel) and, beside it, alone (hf/adapter, for peft). Adapters start without any
effect; like a whole backbone they wait while random heads learn (freeze_backbone_iterations). With
--freeze_backbone_layers=6, or config/freeze.py before this file, the first blocks get no adapters. Measured with
config/adapt.py, 3 seeds, last teacher, start -> end: brain MRI (test_iid) 5-NN 0.686 -> 0.712 (0.026), linear probe
0.871 -> 0.831 (0.030), its AUC 0.959 -> 0.964; white blood cells 5-NN 0.820 -> 0.888 (0.030), probe 0.910 -> 0.933
(0.011). More data: README, Adapting.
"""
use_lora = True
lora_targets = 'qv'              # 'all': also keys, output projections and MLP, 4.5 times the adapters
lora_r = 8
lora_alpha = 16
lora_dropout = 0.0               # paper: 0.1; on a CPU its random numbers cost a tenth of a step

lr = 10 * lr                     # adapters start from nothing, and their product moves the weights little
min_lr = 10 * min_lr
layerwise_decay = 1.0            # those of early blocks start from nothing like the others: none moves less
