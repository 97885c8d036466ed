"""ExPLoRA (arXiv 2406.10973): the last block is trained whole, all others get LoRA adapters.

    python train.py config/adapt.py config/explora.py --dataset_path=my_images/

A strategy: put it last, after a data set and any recipe. The final norm is trained, too. The
adapter in hf/adapter holds the whole block, so peft loads all that was trained.
docs/RESULTS.md compares the strategies.
"""
use_lora = True
train_last_blocks = 1
lora_targets = 'qv'
lora_r = 16
lora_alpha = 16
lora_rslora = True               # scale alpha / sqrt(r) = 4; alpha / r would be 1
lora_dropout = 0.0               # paper: 0.1; costs a tenth of a step on a CPU
layerwise_decay = 1.0            # adapters of all blocks start at 0, so all have the same rate
