"""FSDP: every rank keeps its share of weights, gradients, AdamW moments and EMA values; behind any recipe and data set.

    torchrun --standalone --nproc_per_node=4 train.py config/dinov2.py config/pathmnist.py config/fsdp.py

For networks whose training state does not fit one card: 16 bytes per trainable parameter (weight, gradient, two
moments) and 4 for the EMA, over N ranks a share of 1/N each. Only rank 0 ever holds all weights, on its CPU, when they
are made or read; on resuming, every rank reads the whole checkpoint there. While it fits, config-free DDP is faster:
FSDP sends every weight in every forward and backward. Losses are those of DDP to rounding (tests/test_scale.py: 1e-5 in
fp32), and a checkpoint goes on under either, on any number of ranks. Hardware: 2 GPUs or more; on CPUs it runs, for
trying out.
"""
distribution = 'fsdp'
activation_checkpointing = True  # otherwise the bf16 copies of all weights live from forward to backward
