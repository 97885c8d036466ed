"""Nothing in a training step waits for the GPU. Shown without one: torch's FakeTensorMode runs the
step on a pretended CUDA device, whose tensors have shapes and no values. An operation that needs a
value on the CPU (.item(), float(), nonzero, an index of bools) raises there. The backward is looked
at on the CPU."""
import contextlib
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from run import LossCheck
from tests_support import (RECIPES, recipe_batches, recipe_config, recipe_state, recipe_step,
                           recipe_student)


class Copies(TorchDispatchMode):
    """Inside, .counts has the copies between CPU and GPU: {(from, to, waits): times}."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        source = args[0] if args else None
        name, device = function.overloadpacket.__name__, kwargs.get("device")
        if name == "_to_copy" and device is not None and device.type != source.device.type:
            waits = not kwargs.get("non_blocking", False)
            self.counts[source.device.type, device.type, waits] += 1
        if name == "copy_" and args[0].device.type != args[1].device.type:
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            self.counts[args[1].device.type, args[0].device.type, waits] += 1
        return function(*args, **kwargs)


class Recorded:
    """In place of torch.cuda.Event."""

    def record(self):
        pass


def pretend(student, mode, device):
    """Put the tensors of a network onto the pretended device, in place."""
    for module in student.modules():
        for tensors in (module._parameters, module._buffers):
            for name, real in tensors.items():
                if real is None:
                    continue
                fake = mode.from_tensor(real.detach()).to(device)
                if isinstance(real, torch.nn.Parameter):
                    fake = torch.nn.Parameter(fake, real.requires_grad)
                tensors[name] = fake


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A function (config) -> Copies of the second step on a pretended GPU. The first one may make
    what later ones reuse, such as AdamW's moments."""
    monkeypatch.setattr("model.memory_gb", lambda device: (0, 80))
    monkeypatch.setattr(torch.cuda, "Event", Recorded)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    device, trained = torch.device("cuda:0"), []

    def backward(loss):  # torch's engine needs a real GPU: see the test on the CPU below
        for param in trained:
            param.grad = torch.zeros_like(param)
    monkeypatch.setattr(torch.Tensor, "backward", backward)

    def run(config):
        batches, photometrics = recipe_batches(config, 2)
        for batch in batches:  # what the host computes with stays real
            batch.update({key: batch[key].numpy() for key in ("global_seeds", "local_seeds")})
        student = recipe_student(config, device)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            pretend(student, mode, device)
            state = recipe_state(config, student, device)
            trained[:] = [param for param in student.parameters() if param.requires_grad]
            for batch in batches:
                with Copies() as copies:
                    recipe_step(config, state, batch, photometrics, device, LossCheck(),
                                contextlib.nullcontext)
        assert next(state.student.parameters()).is_cuda and state.iteration == 2
        return copies.counts
    return run


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_waits_for_nothing_and_reads_its_losses_in_one_copy(pretended_gpu, recipe):
    copies = pretended_gpu(recipe_config(recipe))
    assert {key: n for key, n in copies.items() if key[2]} == {}  # all are non_blocking
    assert copies["cuda", "cpu", False] == 1
    assert copies["cpu", "cuda", False] < 40, copies


class Reads(TorchDispatchMode):
    """Inside, .names has the operations that need a value on the CPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_bools = any(x is not None and x.dtype == torch.bool for x in indices)
        if by_bools or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_backward_reads_nothing(recipe, monkeypatch):
    config, device, reads = recipe_config(recipe), torch.device("cpu"), Reads()
    batches, photometrics = recipe_batches(config)
    state = recipe_state(config, recipe_student(config, device), device)
    original, calls = torch.Tensor.backward, []

    def backward(loss):
        calls.append(loss)
        with reads:
            original(loss)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    recipe_step(config, state, batches[0], photometrics, device, LossCheck(),
                contextlib.nullcontext)
    assert len(calls) == 1 and reads.names == []
    with reads:
        float(torch.ones(3)[torch.tensor([True, False, False])].sum())
    assert reads.names == ["index", "_local_scalar_dense"]


def test_a_step_that_waits_is_found(pretended_gpu, monkeypatch):
    """The test above sees a number that is read, and a copy that waits."""
    import dino
    original = dino.compute_losses

    def reads(*args):
        total, terms = original(*args)
        return total * float(total > 0), terms
    monkeypatch.setattr(dino, "compute_losses", reads)
    with pytest.raises(Exception, match="_local_scalar_dense"):
        pretended_gpu(recipe_config("dinov1"))

    def copies(*args):
        total, terms = original(*args)
        return total * torch.ones(()).to(total.device), terms
    monkeypatch.setattr(dino, "compute_losses", copies)
    counts = pretended_gpu(recipe_config("dinov1"))
    assert counts["cpu", "cuda", True] == 1
