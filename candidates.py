"""What a run hands back: the best of its start, its end, its best checkpoint, and mixtures of them.

Training can harm features. So at the end of a run that started from released weights the candidates
are measured, and the one that val prefers becomes checkpoints/best/hf. A mixture is
start + share * (end - start) in all trained weights (WiSE-FT: Wortsman et al. 2022, arXiv
2109.01903); of LoRA it is the scale of the adapters. checkpoints/best/choice.json names the choice.

The values are read from the disk, one tensor at a time, into those of the EMA teacher: there is no
second copy of the network.
"""
import json
import os

import torch

from configurator import UserError
from distributed import gather_objects, is_main, local_shard, shard_like
from features import block_choices, block_list, knn_score
from probe import fit_probe
from run_folder import write_whole

SHARES = (0.25, 0.5, 0.75)  # of the end in a mixture
MOST_IMAGES = 500  # of train and of val, on which candidates are compared


# ---- the values of a candidate ----

def read_values(path):
    """{name: value} of the EMA backbone in a state.pt: those of parameters that were never trained
    until then are the student's. The tensors stay on the disk until they are used."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    values = {**state["student"], **state["ema"]}
    return {name: value for name, value in values.items() if name.startswith("backbone.")}


def mix(name, start, end, share):
    """The value of one parameter of a candidate: start + share * (end - start). Of LoRA's product
    B A only B is scaled, because it is 0 at the start: B (share * A + ...) would be no mixture."""
    if ".lora_A." in name:
        return end
    return start + share * (end - start)


@torch.no_grad()
def set_values(ema, start, end, share):
    """Turn the values of an EMATeacher into those of a candidate, in place. start, end: of
    read_values; share: of the end, from 0 to 1."""
    for name, value in ema.values.items():
        if name.startswith("backbone."):
            mixed = mix(name, start[name], end[name], share)
            local_shard(value).copy_(local_shard(shard_like(mixed, value)))


# ---- how good a candidate is ----
