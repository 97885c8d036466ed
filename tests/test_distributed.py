"""Two gloo processes against one with the joined batch: targets, losses, gradients. And the
helpers, alone and both. train.py's own parity is in test_scale.py."""
import itertools
import os
import socket
import time

import pytest
import torch
import torch.multiprocessing

import distributed
from configurator import UserError
from distributed import (all_reduce_max, all_reduce_mean, all_reduce_sum, any_rank, built_by_main,
                         gather_full, gather_objects, local_shard, lost_ranks, main_first,
                         main_writes, memory_gb, move_or_shard, no_sync, shard_like, stop_together,
                         unwrap, wrap)
from losses import dino_loss, ibot_loss, sinkhorn_knopp, softmax_center, update_center
from model import (FAMILIES, DINOHead, EMATeacher, Student, add_lora, blocks, build_backbone,
                   freeze_layers)
from teachers import build_teacher
from tests_support import assert_same

WORLD = 2
ROWS = {"equal": (4, 4), "unequal": (6, 2), "rank 1 empty": (8, 0), "rank 0 empty": (0, 8),
        "no rows": (0, 0)}
V, L, B, P = 2, 2, 4, 16  # B images over both ranks, P patches of 8 pixels
TARGETS = {"centering": lambda logits, center: softmax_center(logits, center, 0.05),
           "sinkhorn_knopp": lambda logits, center: sinkhorn_knopp(logits, 0.05)}
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32,
             patch_size=8, num_register_tokens=2)
BUILT = list(itertools.product(("scratch", "pretrained", "teacher"), FAMILIES))


# ---- what one process computes, on its share or on everything ----

def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def share(rows, rank):
    """This rank's part of the rows; all of them for rank None."""
    logits = normal(sum(rows), 6, seed=1)
    return logits if rank is None else logits.split(rows)[rank]


def images_of(crops, rank):
    """View-major crops of all images -> those of this rank's images, view-major."""
    if rank is None:
        return crops
    by_view = crops.unflatten(0, (-1, B))
    return by_view[:, rank * B // WORLD:(rank + 1) * B // WORLD].flatten(0, 1)


def targets(rank):
    """{(what, split): tensor} of centers and Sinkhorn targets."""
    found = {}
    for name, rows in ROWS.items():
        logits = share(rows, rank)
        found["center", name] = update_center(normal(1, 6, seed=2), logits, momentum=0.9)
        found["sinkhorn", name] = sinkhorn_knopp(logits, 0.05)
    return found


def build_student():
    torch.manual_seed(0)
    backbone = build_backbone("dinov2", use_pretrained=False, hidden_size=16, num_hidden_layers=2,
                              num_attention_heads=2, image_size=32, patch_size=8)
    dino_head = DINOHead(16, 12, 20, 8, norm_last_layer=False)
    return Student(backbone, dino_head, DINOHead(16, 10, 20, 8))


def step(student, teacher, rank, centering, seed=0):
    """Loss of one forward pass, backward done. Images have different numbers of masked patches,
    some crops have none."""
    masks = normal(V * B, P, seed=seed + 5) > 0.4
    masks[0] = masks[B - 1] = False
    masks = images_of(masks, rank)
    global_crops = images_of(normal(V * B, 3, 32, 32, seed=seed + 6), rank)
    local_crops = images_of(normal(L * B, 3, 16, 16, seed=seed + 7), rank)
    with teacher.teacher_weights(student) as network:
        teacher_out = network(global_crops, masks=masks, apply_masks=False)
    to_probs = TARGETS[centering]
    dino_probs = to_probs(teacher_out["global_logits"], normal(1, 12, seed=3) / 10)
    dino_probs = dino_probs.unflatten(0, (V, -1))
    ibot_probs = to_probs(teacher_out["masked_logits"], normal(1, 10, seed=4) / 10)
    out = student(global_crops, local_crops, masks)
    logits = torch.cat([out["global_logits"], out["local_logits"]]).unflatten(0, (V + L, -1))
    loss = dino_loss(logits, dino_probs) + ibot_loss(out["masked_logits"], ibot_probs, masks)
    loss.backward()
    return all_reduce_mean(loss.detach())


def gradients(student):
    params = unwrap(student).named_parameters()
    return {name: param.grad.clone() for name, param in params if param.grad is not None}


def training(rank):
    """{(what, centering): loss or gradients}: of one batch, and of two batches accumulated."""
    found, device = {}, torch.device("cpu")
    for centering in TARGETS:
        student = build_student().train()
        teacher = EMATeacher(student)
        student = wrap(student, "ddp", device)
        found["loss", centering] = step(student, teacher, rank, centering)
        found["gradients", centering] = gradients(student)
        student.zero_grad()
        for micro in range(2):
            with no_sync(student, last=micro == 1):
                step(student, teacher, rank, centering, seed=100 * micro)
            if micro == 0:
                found["not yet shared", centering] = gradients(student)
        found["accumulated", centering] = gradients(student)
    return found


def helpers(rank, folder):
    """What the small functions say, for comparison in the parent."""
    x = torch.tensor([1.0, 5.0]) if rank == 0 else torch.tensor([3.0, 2.0])
    before = x.clone()
    found = dict(sum=all_reduce_sum(x), max=all_reduce_max(x), mean=all_reduce_mean(x),
                 untouched=torch.equal(x, before), rank=distributed.rank(),
                 world_size=distributed.world_size(), is_main=distributed.is_main(),
                 gathered=gather_objects(f"rank {rank}"))
    student = torch.nn.Linear(2, 2)
    found["none_is_itself"] = wrap(student, "none", torch.device("cpu")) is student
    wrapped = wrap(student, "ddp", torch.device("cpu"))
    found["unwrapped_is_itself"] = wrapped is not student and unwrap(wrapped) is student
    path = os.path.join(folder, "downloaded")
    with main_first():
        if rank == 0:
            time.sleep(0.3)  # a slow download: without the barrier rank 1 is first
            open(path, "w").close()
        found["file_there"] = os.path.exists(path)
    return found


def build(what, family, folder):
    """(network, its blocks, True if its patch embedding was inflated). what: 'scratch', a student
    with a frozen layer; 'pretrained', one with LoRA, of one channel on weights of three; 'teacher',
    a frozen teacher in bf16."""
    if what == "teacher":
        teacher = build_teacher(f"{folder}/{family}", dtype=torch.bfloat16)
        return teacher, teacher.blocks(), False
    if what == "pretrained":
        backbone = build_backbone(f"{folder}/{family}", num_channels=1)
        inflated = backbone.patch_embed_inflated
        backbone = add_lora(backbone)
    else:
        backbone = build_backbone(family, False, **SIZES, drop_path_rate=0.1)
        inflated = backbone.patch_embed_inflated
        freeze_layers(backbone, 1)
    student = Student(backbone, DINOHead(16, 12, 20, 8, norm_last_layer=True),
                      DINOHead(16, 11, 20, 8, weight_norm=False))
    return student, blocks(backbone), inflated


def buildings(rank, folder):
    """{(what, family): values of a network before and after move_or_shard, and what else the ranks
    must agree on}."""
    found = {}
    how = "none" if rank is None else "fsdp"
    for what, family in BUILT:
        torch.manual_seed(3)
        with built_by_main(how):
            network, parts, inflated = build(what, family, folder)
        tensors = (*network.parameters(), *network.buffers())
        held = sum(tensor.numel() for tensor in tensors if not tensor.is_meta)
        network = move_or_shard(network, parts, how, torch.device("cpu"))
        params = dict(network.named_parameters())
        learns = [name for name, param in params.items() if param.requires_grad]
        found[what, family] = dict(
            held=held, kept=sum(local_shard(param).numel() for param in params.values()),
            whole=gather_full({name: param.detach() for name, param in params.items()}),
            same=dict(buffers=dict(network.named_buffers()), state=list(network.state_dict()),
                      inflated=inflated, learns=learns, drawn=torch.rand(3)))
    return found


def fails_on_main(rank):
    try:
        with built_by_main("fsdp"):
            if rank == 0:
                raise UserError("its weights do not fit")
    except UserError as error:
        return {"failed": str(error)}


def worker(rank, folder, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    found = dict(device=str(distributed.setup("cpu")))
    found |= targets(rank) | training(rank) | helpers(rank, folder)
    found |= buildings(rank, folder) | fails_on_main(rank)
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    distributed.cleanup()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that the ranks write to, with pretrained weights of every family."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    for family in FAMILIES:
        torch.manual_seed(1)
        build_backbone(family, False, **SIZES).save_pretrained(f"{folder}/{family}")
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """What each of two processes found: started once, for all tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(folder, port), nprocs=WORLD)
    return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone(folder):
    """What one process finds with the joined batch."""
    return targets(None) | training(None) | buildings(None, folder)


# ---- two against one ----

@pytest.mark.parametrize("split", ROWS)
def test_center_is_that_of_the_joined_batch(ranks, alone, split):
    centers = [found["center", split] for found in ranks]
    for center in centers:
        torch.testing.assert_close(center, alone["center", split], rtol=1e-5, atol=1e-6)
    assert torch.equal(*centers)  # bit by bit, or the ranks drift apart


@pytest.mark.parametrize("split", ROWS)
def test_sinkhorn_is_that_of_the_joined_batch(ranks, alone, split):
    joined = torch.cat([found["sinkhorn", split] for found in ranks])
    assert [len(found["sinkhorn", split]) for found in ranks] == list(ROWS[split])
    torch.testing.assert_close(joined, alone["sinkhorn", split], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("centering", TARGETS)
def test_loss_and_gradients_are_those_of_the_joined_batch(ranks, alone, centering):
    for found in ranks:
        torch.testing.assert_close(found["loss", centering], alone["loss", centering], rtol=1e-5,
                                   atol=0.0)
        for what in ("gradients", "accumulated"):
            ours, expected = found[what, centering], alone[what, centering]
            assert ours.keys() == expected.keys() and len(expected) > 40
            for name in expected:
                largest = float(expected[name].abs().max())
                torch.testing.assert_close(ours[name], expected[name], rtol=1e-4,
                                           atol=1e-5 * largest + 1e-7, msg=name)


def test_ranks_have_the_same_gradients_bitwise(ranks):
    for centering in TARGETS:
        for what in ("gradients", "accumulated"):
            first, second = (found[what, centering] for found in ranks)
            assert all(torch.equal(first[name], second[name]) for name in first)
        # nothing is sent before the last micro-batch
        first, second = (found["not yet shared", centering] for found in ranks)
        assert not any(torch.equal(first[name], second[name]) for name in first)


# ---- FSDP: one rank builds, all get their share ----

@pytest.mark.parametrize("what, family", BUILT)
def test_rank_0_alone_builds_and_the_values_are_those_of_one_process(ranks, alone, what, family):
    """Bit by bit, with buffers that no state_dict has (DINOv3's frequencies). Rank 1 never held
    more than its share."""
    first, second, expected = (found[what, family] for found in (*ranks, alone))
    assert (first["held"], second["held"]) == (expected["held"], 0)
    assert first["kept"] + second["kept"] == expected["kept"]
    assert 0.4 < second["kept"] / expected["kept"] < 0.6
    assert_same(first["whole"], expected["whole"])
    assert_same(first["same"], expected["same"])
    assert_same(second["same"], expected["same"])
    assert expected["same"]["inflated"] == (what == "pretrained") and len(first["whole"]) > 20
    assert family != "dinov3_vit" or any("inv_freq" in name for name in second["same"]["buffers"])


def test_what_rank_0_cannot_load_stops_all(ranks):
    assert [found["failed"] for found in ranks] == ["its weights do not fit"] * 2


# ---- helpers ----

def test_helpers_together(ranks):
    for rank, found in enumerate(ranks):
        assert [found[name] for name in ("device", "rank", "world_size")] == ["cpu", rank, WORLD]
        assert found["is_main"] == (rank == 0)
        reduced = [found[name].tolist() for name in ("sum", "max", "mean")]
        assert reduced == [[4.0, 7.0], [3.0, 5.0], [2.0, 3.5]]
        assert found["untouched"] and found["gathered"] == ["rank 0", "rank 1"]
        assert found["none_is_itself"] and found["unwrapped_is_itself"]


def test_main_goes_first(ranks):
    assert all(found["file_there"] for found in ranks)


def test_helpers_vanish_alone():
    x = torch.tensor([1.0, 5.0])
    assert all_reduce_sum(x) is x and all_reduce_max(x) is x
    assert torch.equal(all_reduce_mean(x), x)
    assert distributed.rank() == 0 and distributed.world_size() == 1 and distributed.is_main()
    assert gather_objects("me") == ["me"] and any_rank(0, ["x"], None) == [False, True, False]
    tree = dict(a=[x, 3], b=(x,))
    assert gather_full(tree)["a"][0] is x and gather_full(tree) == tree and local_shard(x) is x
    copy = shard_like(x, x)
    assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr()
    with pytest.raises(UserError, match="a full disk"):
        main_writes(lambda: stop_together("a full disk"))
    with pytest.raises(UserError, match="rank 0 has lost contact"), lost_ranks():
        raise RuntimeError("[x/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by "
                           "peer")
    with pytest.raises(RuntimeError, match="a bug"), lost_ranks():  # keeps its traceback
        raise RuntimeError("a bug")
    student = torch.nn.Linear(2, 2)
    assert wrap(student, "ddp", torch.device("cpu")) is student and unwrap(student) is student
    with main_first(), no_sync(student, last=False):
        distributed.barrier()
    used, total = memory_gb(torch.device("cpu"))
    assert 0.05 < used < total
