"""LoRA: train low-rank adapters on query and value projections; the weights are frozen.

    torchrun --standalone --nproc_per_node=2 train.py config/pathmnist.py config/lora.py

A strategy: put it last, after a data set and any recipe. The pretrained weights exist once for
student, teacher and Gram anchor. The export has the adapters merged (AutoModel), and alone in
hf/adapter (peft). Adapters have no effect at the start. Like a whole backbone they wait while
random heads learn (freeze_backbone_iterations). With --freeze_backbone_layers=6 or config/freeze.py
the first blocks get no adapters.
With config/adapt_dino.py on brain MRI expect 5-NN accuracy on test_iid to rise from 0.686 to 0.712.
GPU memory of a step, counted by bench.py --what=memory: dinov2-large lora 42.9 GB on one GPU,
22.4 on each of two, 12.1 on each of four; real peaks are up to 2.2 times that.
"""
use_lora = True
lora_targets = 'qv'              # 'all' = every Linear of attention and MLP: 4.5 times the adapters
lora_r = 8
lora_alpha = 16
lora_dropout = 0.0               # paper: 0.1; costs a tenth of a step on a CPU

lr = 10 * lr                     # the product of A and B starts at 0 and changes weights slowly
min_lr = 10 * min_lr
head_lr_mult = max(1.0, head_lr_mult / 10)  # heads keep the higher rate of config/adapt.py
layerwise_decay = 1.0            # adapters of all blocks start at 0, so all have the same rate
train_last_blocks = 0            # no block is trained whole
