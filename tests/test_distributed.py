"""Two gloo processes against one with the joined batch. train.py's own parity is in test_train.py."""
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import distributed
from losses import dino_loss, ibot_loss, sinkhorn_knopp, softmax_center, update_center
from model import DINOHead, Student, build_backbone


def inputs():
    """The joined batch and how two ranks share it; the second half of the masked rows is empty for rank 1."""
    g = torch.Generator().manual_seed(0)
    return dict(crops=torch.randn(2, 4, 1, 16, 16, generator=g), teacher=torch.rand(2, 4, 12, generator=g), masked=torch.rand(5, 12, generator=g),
                masks=torch.zeros(8, 4, dtype=torch.bool))


def student():
    torch.manual_seed(1)
    return Student(build_backbone("vit", False, 1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=16),
                   DINOHead(16, 12, 8, 4))


def measure(rank, world):
    """What a rank computes from its share; rows of a rank are images [rank * 4 / world, ...)."""
    x = inputs()
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    teacher = x["teacher"][:, mine].flatten(0, 1)
    masked = x["masked"] if world == 1 else x["masked"][:0] if rank == 1 else x["masked"]        # rank 1 has no masked patch
    uneven = x["masked"] if world == 1 else x["masked"][:2] if rank == 0 else x["masked"][2:]
    network = student()
    network.backbone.embeddings.mask_token.requires_grad_(False)
    wrapped = distributed.wrap(network, "ddp", torch.device("cpu"))
    out = wrapped(x["crops"][:, mine].flatten(0, 1))["global_logits"].unflatten(0, (2, -1))
    probs = softmax_center(teacher, torch.zeros(1, 12), 0.05).unflatten(0, (2, -1))
    loss = dino_loss(out, probs) + ibot_loss(out.flatten(0, 1)[:0], masked[:0], x["masks"][:out.shape[0] * out.shape[1]])
    loss.backward()
    return dict(center=update_center(torch.zeros(1, 12), teacher), masked_center=update_center(torch.zeros(1, 12), masked),
                sinkhorn=sinkhorn_knopp(teacher, 0.05).unflatten(0, (2, -1)), empty=sinkhorn_knopp(masked, 0.05), uneven=sinkhorn_knopp(uneven, 0.05),
                loss=distributed.all_reduce_mean(loss.detach()), largest=distributed.all_reduce_max(torch.tensor(rank)),
                grads={name: p.grad for name, p in network.named_parameters() if p.grad is not None}, names=distributed.gather_objects(f"rank {rank}"))


def worker(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    with distributed.main_first():
        seen = os.path.exists(f"{folder}/made")
        open(f"{folder}/made", "w").close()
    torch.save(dict(measure(rank, 2), seen=seen), f"{folder}/{rank}.pt")
    distributed.cleanup()


def test_two_processes_equal_one(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    alone = measure(0, 1)

    def same(a, b):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7), (a - b).abs().max()
    for rank in ranks:
        same(rank["center"], alone["center"])
        same(rank["masked_center"], alone["masked_center"])
        same(rank["loss"], alone["loss"])
        assert rank["grads"].keys() == alone["grads"].keys()
        for name, gradient in alone["grads"].items():
            same(rank["grads"][name], gradient)
        assert rank["largest"] == 1 and rank["names"] == ["rank 0", "rank 1"]
    same(torch.cat([rank["sinkhorn"] for rank in ranks], dim=1), alone["sinkhorn"])
    same(torch.cat([rank["uneven"] for rank in ranks]), alone["uneven"])                   # 2 rows here, 3 there
    same(ranks[0]["empty"], alone["empty"])                                                # 5 rows here, none there
    assert len(ranks[1]["empty"]) == 0
    assert [rank["seen"] for rank in ranks] == [False, True]                               # main_first: rank 0 before the other


def test_alone_everything_vanishes():
    x = torch.randn(3)
    assert distributed.all_reduce_sum(x) is x and distributed.world_size() == 1 and distributed.is_main()
    assert distributed.gather_objects("me") == ["me"]
    network = torch.nn.Linear(2, 2)
    assert distributed.wrap(network, "ddp", torch.device("cpu")) is network and distributed.unwrap(network) is network
    used, total = distributed.memory_gb(torch.device("cpu"))
    assert 0.05 < used < total
