"""checkpoint.py: what is saved comes back, a crash leaves the previous state, the export is the
teacher."""
import json
import os
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoModel

from augment import Photometrics
from card import CANNOT_CLIP, model_card
from checkpoint import (check_fits, config_changes, export_hf, link_state, load_optimizer,
                        load_state, save_state)
from configurator import UserError
from model import FAMILIES, EMATeacher, Student, add_lora, build_backbone, forward_features
from optim import param_groups


def state_of(value, **more):
    weights = {"w": torch.full((3, 2), float(value))}
    config = dict(lr=1e-3, crops=(0.4, 1.0), name="a")
    return dict(iteration=value, config=config, student=weights, **more)


def same(a, b):
    """True if nested states are equal, tensors bit for bit and of the same type."""
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and a == b


# ---- state ----

def test_a_state_comes_back_as_it_was(tmp_path):
    module = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    state = state_of(7, optimizer=optimizer.state_dict(), center=torch.randn(1, 5).bfloat16(),
                     rng=torch.get_rng_state(), module=dict(module.state_dict()), best=[0.5, 3])
    run = str(tmp_path / "run")
    last = f"{run}/checkpoints/last"
    save_state(last, state)
    for path in (run, last, f"{last}/state.pt"):
        assert same(load_state(path), state)
    assert os.listdir(last) == ["state.pt"]


def test_the_older_name_of_the_ema_is_read(tmp_path):
    weights = {"w": torch.randn(3, 2)}
    torch.save(state_of(4, teacher=weights), tmp_path / "state.pt")
    assert same(load_state(str(tmp_path)), state_of(4, ema=weights))


@pytest.mark.parametrize("written", [0, 10, 1000])
def test_a_crash_while_saving_leaves_the_previous_state(tmp_path, monkeypatch, written):
    save_state(str(tmp_path), state_of(1))

    def crash(state, path):
        with open(path, "wb") as file:
            file.write(b"x" * written)
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", crash)
        problem = "state.pt.part cannot be written: No space left on device.*make space"
        with pytest.raises(UserError, match=problem):
            save_state(str(tmp_path), state_of(2))
    assert same(load_state(str(tmp_path)), state_of(1)) and os.listdir(tmp_path) == ["state.pt"]
    (tmp_path / "state.pt.part").write_bytes(b"x" * written)  # as a kill leaves it: in nobody's way
    save_state(str(tmp_path), state_of(3))
    assert same(load_state(str(tmp_path)), state_of(3)) and os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.parametrize("links", [True, False])
def test_a_linked_state_stays_when_the_source_moves_on(tmp_path, monkeypatch, links):
    def no_link(source, target):
        raise OSError("Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    last, best = str(tmp_path / "last"), str(tmp_path / "best")
    for i in (1, 2):
        save_state(last, state_of(i))
        link_state(last, best)
        assert os.path.samefile(last + "/state.pt", best + "/state.pt") == links
        save_state(last, state_of(10 * i))
        assert same(load_state(best), state_of(i)) and same(load_state(last), state_of(10 * i))
    with open(best + "/state.pt.part", "wb") as file:  # as a kill leaves it
        file.write(b"x")
    link_state(last, best)
    assert same(load_state(best), state_of(20)) and os.listdir(best) == ["state.pt"]


def test_missing_and_damaged_checkpoints_are_named(tmp_path):
    looked = r"looked for .*last/state\.pt and .*state\.pt"
    with pytest.raises(UserError, match=rf"resume_from='.*nowhere': no checkpoint there; {looked}"):
        load_state(str(tmp_path / "nowhere"))
    save_state(str(tmp_path), state_of(1))
    file = tmp_path / "state.pt"
    whole = file.read_bytes()
    for damaged in (whole[:len(whole) // 2], whole[:20], b"", b"hello"):
        file.write_bytes(damaged)
        problem = r"state\.pt is damaged or no checkpoint of ours \(\w+\); resume from"
        with pytest.raises(UserError, match=problem):
            load_state(str(tmp_path))


def plain_pickle(state, path):
    with open(path, "wb") as file:
        pickle.dump(state, file, protocol=2)


@pytest.mark.parametrize("write", [torch.save, plain_pickle])
def test_no_code_in_a_checkpoint_runs(tmp_path, write):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    write(state_of(1, trap=Trap()), str(tmp_path / "state.pt"))
    with pytest.raises(UserError, match="damaged or no checkpoint of ours"):
        load_state(str(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_shape_is_refused_with_both(tiny_student):
    config = dict(lr=1e-3, hidden_size=16, num_hidden_layers=2)
    student = tiny_student("vit")
    state = dict(student=student.state_dict(), config=config)
    check_fits(state, tiny_student("vit"), dict(config, lr=5e-4))  # shapes fit: rates may differ
    name = "backbone.embeddings.cls_token"
    with pytest.raises(UserError) as error:
        check_fits(state, tiny_student("vit", hidden_size=24), dict(config, hidden_size=24))
    problem = str(error.value)
    assert f"{name} is (1, 1, 16) in the checkpoint, (1, 1, 24) now" in problem
    assert ("keys that differ: hidden_size: checkpoint 16, now 24. Take the checkpoint's values"
            in problem)
    problem = r"\(\d+.*\) in the checkpoint, absent now.*_layers: checkpoint 2, now 1"
    with pytest.raises(UserError, match=problem):
        check_fits(state, tiny_student("vit", num_hidden_layers=1),
                   dict(config, num_hidden_layers=1))
    problem = r"absent in the checkpoint, \(\d+.*\) now; keys that differ: none of the"
    with pytest.raises(UserError, match=problem):
        check_fits(state, tiny_student("vit", num_hidden_layers=3), config)


def adamw(student, layerwise_decay, betas):
    """(optimizer of a student, {parameter name: parameter} of its groups in their order)."""
    groups = param_groups(student, 1e-3, 0.1, layerwise_decay=layerwise_decay)
    params = {}
    for group in groups:
        params.update(zip(group["names"], group["params"]))
    return torch.optim.AdamW(groups, betas=betas), params


def test_moments_come_back_by_name_under_another_grouping(tiny_student):
    """As when layerwise_decay and adam_betas are changed between two parts of a run."""
    bare = "backbone.embeddings.cls_token"  # without a gradient, so without moments
    before, params = adamw(tiny_student("vit"), 1.0, betas=(0.9, 0.999))
    for _ in range(2):
        for name, param in params.items():
            param.grad = None if name == bare else torch.randn_like(param)
        before.step()
    after, new_params = adamw(tiny_student("vit"), 0.5, betas=(0.8, 0.95))
    assert len(after.param_groups) > len(before.param_groups)
    assert list(new_params) != list(params) and new_params.keys() == params.keys()
    settings = [dict(group, params=None) for group in after.param_groups]

    load_optimizer(after, before.state_dict())
    assert [dict(group, params=None) for group in after.param_groups] == settings
    assert {group["betas"] for group in after.param_groups} == {(0.8, 0.95)}
    for name, param in new_params.items():
        if name != bare:
            assert same(after.state[param], before.state[params[name]]), name
            moments = after.state[param]["exp_avg"]
            assert moments.data_ptr() != before.state[params[name]]["exp_avg"].data_ptr(), name
    assert new_params[bare] not in after.state

    for param in new_params.values():
        param.grad = torch.ones_like(param)
    after.step()
    for name, param in new_params.items():
        assert after.state[param]["step"] == (1 if name == bare else 3), name


def test_config_changes_lists_changed_new_and_removed_keys():
    state = dict(config=dict(a=1, b=(1, 2), gone="x"))
    changes = config_changes(state, dict(a=1, b=(1, 3), new=True))
    assert changes == [("b", (1, 2), (1, 3)), ("gone", "x", None), ("new", None, True)]
    assert config_changes(state, dict(state["config"])) == []


def test_model_card_says_where_it_comes_from_and_what_was_measured():
    config = dict(model_type="facebook/dinov2-small", use_pretrained=True, max_iterations=100,
                  dataset_path="phantom")
    card = model_card("my run", 40, dict(val=0.9), config, "lr = 1\n")
    for text in ("# my run", "after 40 of 100 iterations on phantom", "facebook/dinov2-small",
                 "val: 0.9", "lr = 1"):
        assert text in card
    config.update(model_type="vit", use_pretrained=False)
    assert "random weights (vit)" in model_card("x", 1, {}, config, "")


# ---- export ----

PIPELINE = dict(size=32, intensity_range=(-1000.0, 1000.0), mean=(0.3,), std=(0.2,),
                card="# a card\n")


def pixels():
    return torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))


def teacher_of(student):
    """An EMA teacher that is not its student."""
    teacher, generator = EMATeacher(student), torch.Generator().manual_seed(2)
    for value in teacher.values.values():
        value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return teacher


@torch.no_grad()
def reloaded_features(folder):
    model = AutoModel.from_pretrained(folder).eval()
    assert model.config.num_channels == 1
    return forward_features(model, pixels())


def read(folder, name):
    """The text of a file of an export."""
    with open(os.path.join(folder, name)) as file:
        return file.read()


@pytest.mark.parametrize("family", FAMILIES)
def test_export_is_what_the_teacher_computes(tiny_student, tmp_path, family):
    student = tiny_student(family, 1)
    teacher, folder = teacher_of(student), str(tmp_path / "best" / "hf")
    with teacher.teacher_weights(student) as network:
        export_hf(folder, network.backbone, **PIPELINE)
        expected = forward_features(network.backbone, pixels())
        tokens = network.backbone(pixel_values=pixels()).last_hidden_state
    cls, patches = reloaded_features(folder)
    assert torch.equal(cls, expected[0]) and torch.equal(patches, expected[1])
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():  # as a user calls it
        assert torch.equal(model(pixel_values=pixels()).last_hidden_state, tokens)
        assert not torch.equal(forward_features(student.eval().backbone, pixels())[0], cls)
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors",
                                          "preprocess.py", "preprocessor_config.json"]
    assert read(folder, "README.md") == "# a card\n" and os.listdir(tmp_path / "best") == ["hf"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [16, 48])
def test_an_export_takes_the_size_that_it_was_trained_at(tiny_backbone, tmp_path, family, size):
    """The start has positions for 32 pixels. AutoModel is called as a user calls it."""
    backbone, folder = tiny_backbone(family, 1).eval(), str(tmp_path / "hf")
    images = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(3))
    export_hf(folder, backbone, **dict(PIPELINE, size=size))
    model = AutoModel.from_pretrained(folder).eval()
    assert backbone.config.image_size == 32  # the run goes on with its own
    if family == "vit":
        assert model.config.image_size == size
    with torch.no_grad():
        tokens = model(pixel_values=images).last_hidden_state
        cls, patches = forward_features(backbone, images)
    torch.testing.assert_close(tokens[:, 0], cls, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens[:, -patches.shape[1]:], patches, rtol=1e-5, atol=1e-5)
    again = build_backbone(folder, num_channels=1).eval()  # train on, evaluate
    with torch.no_grad():
        torch.testing.assert_close(forward_features(again, images)[0], cls, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_merged_and_the_adapter_lies_beside(tiny_backbone, tmp_path, family):
    peft = pytest.importorskip("peft")
    backbone = add_lora(tiny_backbone(family, 1), r=3, alpha=6, dropout=0.5)
    student = Student(backbone, torch.nn.Identity())
    teacher, folder = teacher_of(student), str(tmp_path / "hf")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with teacher.teacher_weights(student) as network:
        expected = forward_features(network.backbone, pixels())
        export_hf(folder, network.backbone, **PIPELINE)
        assert same(forward_features(network.backbone, pixels()), expected)
    assert same(dict(student.state_dict()), before)  # a copy is merged; the run keeps its adapters
    base = tiny_backbone(family, 1).eval()
    with torch.no_grad():
        assert (forward_features(base, pixels())[0] - expected[0]).abs().max() > 1e-2
        adapted = peft.PeftModel.from_pretrained(base, os.path.join(folder, "adapter")).eval()
        for found in (reloaded_features(folder), forward_features(adapted, pixels())):
            for ours, theirs in zip(found, expected):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_second_export_replaces_the_first(tiny_backbone, tmp_path):
    backbone, folder = tiny_backbone("vit", 1).eval(), str(tmp_path / "hf")
    export_hf(folder, backbone, **PIPELINE)
    first = reloaded_features(folder)[0]
    with torch.no_grad():
        backbone.embeddings.cls_token.add_(1.0)
        expected = forward_features(backbone, pixels())[0]
    (tmp_path / "hf.part").mkdir()  # a kill during an export leaves this
    (tmp_path / "hf.part" / "model.safetensors").write_bytes(b"half")
    export_hf(folder, backbone, **{**PIPELINE, "card": "# second\n", "std": (0.4,)})
    second = reloaded_features(folder)[0]
    assert torch.equal(second, expected) and not torch.equal(second, first)
    assert read(folder, "README.md") == "# second\n"
    assert json.loads(read(folder, "preprocessor_config.json"))["image_std"] == [0.4]
    assert os.listdir(tmp_path) == ["hf"]


def test_preprocessor_config_has_the_range_in_its_mean(tiny_backbone, tmp_path):
    folder = str(tmp_path / "hf")
    export_hf(folder, tiny_backbone("dinov2", 2), 28, (-200.0, 300.0), (0.25, 0.5), (0.1, 0.2), "")
    settings = json.loads(read(folder, "preprocessor_config.json"))
    assert settings["rescale_factor"] == pytest.approx(1 / 500)
    # -200 / 500 is the lower end of the range
    assert settings["image_mean"] == pytest.approx([0.25 - 0.4, 0.5 - 0.4])
    assert settings["image_std"] == [0.1, 0.2]
    assert settings["size"] == CANNOT_CLIP  # AutoImageProcessor stops there
    assert settings["crop_size"] == {"height": 28, "width": 28}
    assert settings["do_convert_rgb"] is False
    assert settings["intensity_range"] == [-200.0, 300.0]


@pytest.mark.parametrize("value_range", [(-1000.0, 1000.0), (0.0, 255.0)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_processor_of_the_export_makes_our_pixels_or_refuses(tiny_backbone, tmp_path,
                                                                 value_range, channels):
    from transformers import AutoImageProcessor
    mean, std, folder = (0.3, 0.4, 0.5)[:channels], (0.2, 0.1, 0.3)[:channels], str(tmp_path / "hf")
    export_hf(folder, tiny_backbone("dinov2", channels), 32, value_range, mean, std, "")
    if value_range != (0, 255):  # it cannot clip
        with pytest.raises(ValueError, match=CANNOT_CLIP):
            AutoImageProcessor.from_pretrained(folder)
        return
    image = np.random.default_rng(0).integers(0, 256, (32, 32, channels)).astype(np.uint8)
    theirs = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    photometrics = Photometrics("medical", value_range, mean, std)
    ours = photometrics.plain(torch.from_numpy(image).permute(2, 0, 1)[None])
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
