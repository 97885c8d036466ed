"""FSDP: every rank keeps a share of weights, gradients, AdamW moments and EMA values.

    torchrun --standalone --nproc_per_node=4 train.py config/pathmnist.py config/dinov2.py \
        config/fsdp.py

Put it after any data set and recipe, if the training state does not fit on one GPU. It needs 16
bytes per trained parameter (weight, gradient, two moments) and 4 for the EMA, divided by the number
of ranks. Rank 0 alone holds all weights, on its CPU, when they are made or read. On resuming, every
rank reads the whole checkpoint on its CPU. If the state fits, use DDP, the default: FSDP sends
every weight in every forward and backward, so it is slower. The losses are those of DDP except for
rounding (tests/test_scale.py). A checkpoint resumes under DDP or FSDP, on any number of ranks.
Hardware: 2 GPUs or more; CPUs are for trying it out. GPU memory of a step, counted by bench.py
--what=memory: dinov2-giant standard 142.5 GB on one GPU without this file, 16.5 on each of two with
it, 8.3 on each of four; real peaks are up to 2.2 times that.
"""
distribution = 'fsdp'
activation_checkpointing = True  # else bf16 copies of all weights stay until the backward
