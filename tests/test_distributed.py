"""Two gloo processes against one with the joined batch: targets, losses, gradients, recipes. And
the helpers, alone and both; lost workers; how processes end. train.py's own parity is in
test_scale.py.

RECIPES=all tries all recipes, families and distributions. STARTS=20 starts and resumes train.py so
often under torchrun, to its exit status.
"""
import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing

import dino
import distributed
from augment import masked_tokens
from configurator import UserError, one_line_errors, override
from distributed import (all_reduce_max, all_reduce_mean, all_reduce_sum, any_rank, autocast_for,
                         built_by_main, compute_dtype, gather_full, gather_objects, local_shard,
                         lost_ranks, main_first, main_writes, memory_gb, move_or_shard, no_sync,
                         precision_notes, quick_exit, shard_like, stop_together, unwrap,
                         workers_that_fit, wrap)
from loader import make_loader, within_micro_batch
from losses import (dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp, softmax_center,
                    update_center)
from model import (FAMILIES, DINOHead, EMATeacher, Student, adapted_backbone, add_lora, blocks,
                   build_backbone, freeze_layers)
from optim import build_optimizer, set_learning_rates
from run import LossCheck, State, gradient_scaler
from teachers import build_teacher
from tests_support import ROOT, SHRUNK, assert_same, load_train

WORLD = 2
ROWS = {"equal": (4, 4), "unequal": (6, 2), "rank 1 empty": (8, 0), "rank 0 empty": (0, 8),
        "no rows": (0, 0)}
V, L, B, P = 2, 2, 4, 16  # B images over both ranks, P patches of 8 pixels
TARGETS = {"centering": lambda logits, center: softmax_center(logits, center, 0.05),
           "sinkhorn_knopp": lambda logits, center: sinkhorn_knopp(logits, 0.05)}
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32,
             patch_size=8, num_register_tokens=2)
GROUPS = (0, 8, 4, 2)  # of KoLeo, of 8 images
RECIPES = list(itertools.product(("dinov1", "dinov2", "dinov3"), FAMILIES, ("ddp", "fsdp")))
if os.environ.get("RECIPES") != "all":
    RECIPES = [("dinov1", "vit", "ddp"), ("dinov1", "dinov3_vit", "fsdp"),
               ("dinov2", "dinov2", "fsdp"), ("dinov2", "dinov2_with_registers", "ddp"),
               ("dinov3", "dinov3_vit", "ddp"), ("dinov3", "vit", "fsdp")]
BUILT = list(itertools.product(("scratch", "pretrained", "teacher"), FAMILIES))


# ---- what one process computes, on its share or on everything ----

def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def share(rows, rank):
    """This rank's part of the rows; all of them for rank None."""
    logits = normal(sum(rows), 6, seed=1)
    return logits if rank is None else logits.split(rows)[rank]


def images_of(crops, rank, n_images=B):
    """View-major crops of all images -> those of this rank's images, view-major."""
    if rank is None:
        return crops
    by_view = crops.unflatten(0, (-1, n_images))
    return by_view.chunk(WORLD, dim=1)[rank].flatten(0, 1)


def targets(rank):
    """{(what, split): tensor} of centers and Sinkhorn targets."""
    found = {}
    for name, rows in ROWS.items():
        logits = share(rows, rank)
        found["center", name] = update_center(normal(1, 6, seed=2), logits, momentum=0.9)
        found["sinkhorn", name] = sinkhorn_knopp(logits, 0.05)
        found["far apart", name] = sinkhorn_knopp(20 * logits, 0.05)  # 2000 temperatures
    return found


def spread(rank):
    """{('koleo', group size): (loss, gradients)} of a linear map of 8 images."""
    found = {}
    for size in GROUPS:
        torch.manual_seed(0)
        student = wrap(torch.nn.Linear(5, 4), "ddp", torch.device("cpu"))
        loss = koleo_loss(student(images_of(normal(8, 5, seed=8), rank, 8)), group_size=size)
        loss.backward()
        found["koleo", size] = loss.detach(), gradients(student)
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
        teacher_out = network(global_crops, masked=masked_tokens(masks))
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


def recipe_config(recipe, family):
    """train.py's config after config/{recipe}.py, shrunk, without what is random on each rank."""
    module = load_train()
    override(vars(module), module.config_keys, [
        f"{ROOT}/config/{recipe}.py", *SHRUNK, f"--model_type={family}", "--drop_path_rate=0",
        "--pos_embed_rescale=0"])
    return SimpleNamespace(**{key: getattr(module, key) for key in module.config_keys})


def recipe_crops(config, rank, seed):
    """Crops as dino.augment_batch makes them, of this rank's images."""
    size, n_local = config.global_batch_size, config.local_crops_number
    masks = None
    if config.ibot_loss_weight > 0:
        masks = images_of(normal(2 * size, 16, seed=seed) > 0.5, rank, size)
    crops = dict(masks=masks, masked=masked_tokens(masks), guided=None, gram=None, shared=None)
    for name, n_views, pixels in (("global", 2, 32), ("local", n_local, 16)):
        images = normal(n_views * size, 3, pixels, pixels, seed=seed + n_views)
        crops[name] = images_of(images, rank, size)
    return crops


def train_recipe(recipe, family, how, rank):
    """Three iterations: losses [3,n] and, on rank 0, the gradients of each."""
    config, cpu = recipe_config(recipe, family), torch.device("cpu")
    torch.manual_seed(0)
    with built_by_main(how):
        backbone = adapted_backbone(config, 3, cpu, say=lambda text: None)
        heads = [DINOHead(32, 64, 32, 16, norm_last_layer=False,
                          weight_norm=config.head_weight_norm)]
        if config.ibot_separate_head:
            heads.append(DINOHead(32, 64, 32, 16, weight_norm=config.head_weight_norm))
        student = Student(backbone, *heads)
    student = move_or_shard(student, blocks(backbone), how, cpu).train()
    optimizer, _, _ = build_optimizer(student, config, False)
    state = State(student, EMATeacher(student), optimizer, gradient_scaler(cpu, "no"),
                  centers=dict(dino=torch.zeros(1, 64), ibot=torch.zeros(1, 64)))
    state.student = wrap(student, how, cpu)
    found, losses = dict(losses=[], gradients=[]), LossCheck()
    for iteration in range(3):
        values = dino.schedules(config, iteration, 0)
        set_learning_rates(optimizer, values.lr, values.last_layer_lr, values.weight_decay,
                           values.backbone_factor)
        terms, row_sums, _ = dino.forward_backward(
            state, recipe_crops(config, rank, 10 * iteration), values.teacher_temp, config,
            contextlib.nullcontext)
        losses.add(terms, iteration, values.lr, [])
        found["losses"].append(losses.read())
        found["gradients"].append(gather_full(gradients(state.student)))
        dino.update(state, row_sums, values, config)
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
    found |= targets(rank) | training(rank) | spread(rank) | helpers(rank, folder)
    for recipe, family, how in RECIPES:
        found[recipe, family, how] = train_recipe(recipe, family, how, rank)
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
    found = targets(None) | training(None) | spread(None) | buildings(None, folder)
    for recipe, family in {names[:2] for names in RECIPES}:
        found[recipe, family] = train_recipe(recipe, family, "none", None)
    return found


# ---- two against one ----

@pytest.mark.parametrize("split", ROWS)
def test_center_is_that_of_the_joined_batch(ranks, alone, split):
    centers = [found["center", split] for found in ranks]
    for center in centers:
        torch.testing.assert_close(center, alone["center", split], rtol=1e-5, atol=1e-6)
    assert torch.equal(*centers)  # bit by bit, or the ranks drift apart


@pytest.mark.parametrize("split", ROWS)
def test_sinkhorn_is_that_of_the_joined_batch(ranks, alone, split):
    for logits in ("sinkhorn", "far apart"):
        parts = [found[logits, split] for found in ranks]
        assert [len(part) for part in parts] == list(ROWS[split])
        expected = alone[logits, split]
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", GROUPS)
def test_koleo_looks_for_neighbours_on_all_ranks(ranks, alone, size):
    """Its gradients are right after DDP has averaged them."""
    loss, grads = alone["koleo", size]
    assert torch.equal(loss, alone["koleo", 0][0]) == (size in (0, 8))
    for found in ranks:
        ours, our_grads = found["koleo", size]
        torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
        for name, grad in grads.items():
            largest = float(grad.abs().max())
            torch.testing.assert_close(our_grads[name], grad, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("recipe, family, how", RECIPES)
def test_a_recipe_on_two_ranks_is_that_of_one(ranks, alone, recipe, family, how):
    """Each term of the loss, KoLeo included, and the first gradients. AdamW divides by the size of
    a gradient, so rounding grows with each update."""
    ours, expected = ranks[0][recipe, family, how], alone[recipe, family]
    for i, (terms, wanted) in enumerate(zip(ours["losses"], expected["losses"])):
        for name, value in wanted.items():
            difference = abs(terms[name] - value) / wanted["loss"]
            print(f"{recipe} {family} {how} {i} {name}: {difference:.1e}")
            assert difference <= (1e-6, 1e-6, 5e-6)[i], name
        assert (wanted["koleo_loss"] != 0) == (recipe != "dinov1")
    largest = max(float(grad.abs().max()) for grad in expected["gradients"][0].values())
    assert ours["gradients"][0].keys() == expected["gradients"][0].keys()
    for name, grad in expected["gradients"][0].items():
        difference = float((ours["gradients"][0][name] - grad).abs().max()) / largest
        assert difference <= 2e-6, name


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


@pytest.mark.parametrize("keys, losses", [
    (dict(centering="sinkhorn_knopp", koleo_loss_weight=0.1), "Sinkhorn-Knopp and KoLeo"),
    (dict(centering="centering", koleo_loss_weight=0.1), "KoLeo"),
    (dict(centering="centering", koleo_loss_weight=0.1, koleo_group_size=9), "KoLeo"),
    (dict(centering="centering", koleo_loss_weight=0.1, koleo_group_size=4), ""),
    (dict(centering="centering", koleo_loss_weight=0.0), ""),
    (dict(centering="sinkhorn_knopp", objective="feature"), ""),  # distill.py without prototypes
    (dict(centering="sinkhorn_knopp", objective="both"), "Sinkhorn-Knopp")])
def test_the_log_names_the_losses_that_see_a_micro_batch_only(keys, losses):
    assert within_micro_batch(SimpleNamespace(**keys), 8) == losses


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


# ---- lost workers, and the end of a process ----

class Slow(torch.utils.data.Dataset):
    """Items of 1 MB, of which the second batch never comes."""

    def __len__(self):
        return 8

    def __getitem__(self, item):
        n, _ = item
        if n >= 4:
            time.sleep(60)
        return dict(crops=torch.zeros(250_000), n=n)

    def collate(self, samples):
        return dict(n=[sample["n"] for sample in samples], pid=os.getpid())


def slow_loader(num_workers, say=print):
    config = SimpleNamespace(global_batch_size=4, seed=0, shuffle=False, num_workers=num_workers)
    return make_loader(Slow(), config, 1, 0, 4, torch.device("cpu"), say)


def test_a_killed_loader_worker_is_one_line():
    batches = iter(slow_loader(1))
    pid = next(batches)["pid"]
    for _ in range(2):  # of a queue that stops all processes: main decides
        subprocess.run(["kill", "-TERM", str(pid)], check=True)
    time.sleep(0.2)
    os.kill(pid, 0)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError) as caught, lost_ranks():
        next(batches)
    text = str(caught.value)
    assert text.startswith(f"rank 0: DataLoader worker (pid {pid}) is killed by signal: Killed. ")
    assert "\n" not in text and "--num_workers" in text and "--resume_from=auto" in text


def test_a_small_shared_memory_has_fewer_workers(monkeypatch):
    """Batches of 4 MB: two for each worker and one in use are 12 MB for one worker."""
    said = []
    for free, workers in ((100, 3), (29, 3), (27, 2), (13, 1), (11, 0), (0, 0)):
        disk = SimpleNamespace(f_bavail=free * 10**6 // 4096, f_frsize=4096)
        monkeypatch.setattr(distributed.os, "statvfs", lambda path: disk)
        assert slow_loader(3, said.append).num_workers == workers
        assert bool(said) == (workers < 3)
        said.clear()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert workers_that_fit(3, 10**6, said.append) == 0
    assert "/dev/shm has 0.0 MB free, too little for 3 loader worker(s)" in said[0]


@pytest.mark.parametrize("end, status", [
    (lambda: None, 0), (lambda: sys.exit(130), 130), (lambda: stop_together("a full disk"), 1),
    (lambda: 1 / 0, 1), (lambda: sys.exit("no"), 1)])
def test_a_rank_ends_with_its_status_and_without_unloading_python(end, status, tmp_path):
    """What is registered with atexit is done, what is printed arrives."""
    pid = os.fork()
    if pid == 0:
        os.environ["WORLD_SIZE"] = "2"
        for stream in (1, 2):
            os.dup2(os.open(f"{tmp_path}/{stream}", os.O_WRONLY | os.O_CREAT), stream)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        distributed.atexit._clear()  # pytest's
        distributed.atexit.register(lambda: print("goodbye"))
        with quick_exit(), one_line_errors():
            end()
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
    assert open(f"{tmp_path}/1").read() == "goodbye\n"
    errors = open(f"{tmp_path}/2").read()
    assert ("ZeroDivisionError" in errors) == (end is None or "division" in errors)
    assert bool(errors) == (status == 1)


def test_quick_exit_does_nothing_alone():
    with pytest.raises(SystemExit), quick_exit():
        sys.exit(3)
    with quick_exit():
        pass


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_starts_and_resumes_end_with_0(how, npz, tmp_path):
    """STARTS=20: so many of train.py under torchrun, each resumed, with and without workers."""
    starts = int(os.environ.get("STARTS", 0))
    if starts == 0:
        pytest.skip("STARTS=20 runs it, for half an hour")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               f"{ROOT}/train.py", f"{ROOT}/config/dinov2.py", *SHRUNK, f"--dataset_path={npz}",
               f"--out_dir={tmp_path}/run", f"--cache_dir={tmp_path}/cache",
               f"--distribution={how}", "--resume_from=auto"]
    failed = []
    for i in range(starts):
        for iterations in (3, 5):
            argv = [*command, f"--max_iterations={iterations}", f"--num_workers={i % 2}"]
            done = subprocess.run(argv, capture_output=True, text=True)
            if done.returncode != 0 or "Done: " not in done.stdout:
                failed.append((i, iterations, done.returncode, done.stderr[-3000:]))
        shutil.rmtree(f"{tmp_path}/run")
    assert failed == []


@pytest.mark.parametrize("has_bf16, asked, dtype", [
    ("avx512_bf16", "bf16", torch.bfloat16), ("amx_bf16", "bf16", torch.bfloat16),
    ("", "bf16", torch.float32), ("", "no", torch.float32), ("amx_bf16", "no", torch.float32)])
def test_a_cpu_without_bf16_instructions_computes_in_fp32_and_says_so(monkeypatch, has_bf16, asked,
                                                                      dtype):
    has = dict(architecture="x86_64", avx512_bf16=False, amx_bf16=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has | {has_bf16: True})
    cpu = torch.device("cpu")
    with autocast_for(cpu, asked)():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == compute_dtype(cpu, asked) == dtype
    notes = precision_notes(cpu, asked)
    assert len(notes) == (asked == "bf16" and dtype == torch.float32)
    assert compute_dtype(torch.device("cuda"), "bf16") == torch.bfloat16
