"""The last block computes only the tokens that are used: the values, the gradients and the random
numbers of the whole block, in all families, and less work."""
import contextlib

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from augment import masked_tokens
from last_block import LastBlock, split_last_block, use_plain_attention, used_tokens
from model import (FAMILIES, add_lora, blocks, embed, forward_features, run_blocks,
                   used_features)

LARGE = dict(hidden_size=384, num_hidden_layers=2, num_attention_heads=6, patch_size=16,
             image_size=224)


def pixels(n=4, size=32, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def some_masks(n=4, patches=16):
    """Crops with 4, 0, 1 and 16 masked patches."""
    masks = torch.zeros(n, patches, dtype=torch.bool)
    masks[0, [1, 2, 7, 15]] = True
    masks[2, 5] = masks[3] = True
    return masks


def as_in_training(backbone):
    """Random layer scales; drop path of every block, which makes random numbers."""
    for name, module in backbone.named_modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.4
        if hasattr(module, "lambda1"):
            nn.init.normal_(module.lambda1)
    return backbone.train()


def values_and_gradients(backbone, forward):
    """(tokens, {name: gradient}) of a loss that weighs every token differently. forward: of the
    used tokens [R,D], CLS first."""
    backbone.zero_grad()
    torch.manual_seed(3)  # of drop path
    found = forward().float()
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    return found.detach(), {name: param.grad for name, param in backbone.named_parameters()
                            if param.grad is not None}


def results(backbone, masks, with_patches=False, autocast=contextlib.nullcontext):
    """values_and_gradients of used_features."""
    def forward():
        with autocast():
            tokens, rope = embed(backbone, pixels(), masks)
            cls, patches, _ = used_features(backbone, tokens, rope, 0, masked_tokens(masks),
                                            with_patches)
        return torch.cat([cls, patches])
    return values_and_gradients(backbone, forward)


def assert_equal(found, expected, tolerance=1e-6):
    """Values and gradients; the tolerance is relative to the largest number of a tensor."""
    (a, grads), (b, expected_grads) = found, expected
    assert grads.keys() == expected_grads.keys()
    for ours, theirs in [(a, b)] + [(grads[name], expected_grads[name]) for name in grads]:
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


def plain_forward(backbone, masks):
    """values_and_gradients of forward_features, which computes all tokens."""
    def forward():
        cls, patches = forward_features(backbone, pixels(), masks)
        return cls if masks is None else torch.cat([cls, patches[masks]])
    return values_and_gradients(backbone, forward)


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
@pytest.mark.parametrize("family, more", [
    ("vit", {}), ("dinov2", {}), ("dinov2_with_registers", dict(use_swiglu_ffn=True)),
    ("dinov3_vit", {}), ("dinov3_vit", dict(use_gated_mlp=True))])
def test_values_and_gradients_are_those_of_the_plain_forward(tiny_backbone, family, more,
                                                              attention):
    backbone = as_in_training(tiny_backbone(family, drop_path_rate=0.4, **more))
    assert isinstance(blocks(backbone)[-1], LastBlock)
    if attention == "plain":
        use_plain_attention(backbone)
    for masks in (None, some_masks(), torch.zeros(4, 16, dtype=torch.bool)):
        expected = plain_forward(backbone, masks)
        for with_patches in (False, True):
            assert_equal(results(backbone, masks, with_patches), expected, 2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_differs_by_rounding_only(tiny_backbone, family):
    backbone = as_in_training(tiny_backbone(family, drop_path_rate=0.4))
    use_plain_attention(backbone)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)
    found = results(backbone, some_masks(), False, autocast)
    expected = results(backbone, some_masks(), True, autocast)
    assert_equal(found, expected, 0.05)


def test_lora_of_all_layers(tiny_backbone):
    """Adapters of queries, keys, values, output and MLP; without dropout, which draws one number
    per element and so others for fewer tokens."""
    backbone = add_lora(tiny_backbone("dinov2"), r=2, alpha=4, dropout=0.0, targets="all")
    for name, param in backbone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, generator=torch.Generator().manual_seed(0))
    expected = plain_forward(backbone.train(), some_masks())
    assert all("lora" in name for name in expected[1]) and len(expected[1]) == 2 * 2 * 6
    assert_equal(results(backbone, some_masks()), expected, 2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_computes_the_block_twice_and_the_same(tiny_backbone, family):
    backbone = as_in_training(tiny_backbone(family, drop_path_rate=0.4))
    expected, calls = results(backbone, some_masks()), []
    norm = "layernorm_after" if family == "vit" else "norm2"
    norm = getattr(blocks(backbone)[-1], norm)
    norm.register_forward_hook(lambda module, inputs, out: calls.append(inputs[0].shape))
    backbone.activation_checkpointing_enable({"use_reentrant": False})
    assert_equal(results(backbone, some_masks()), expected, 0)
    assert calls == 2 * [(4 + 21, 16)]  # once in the backward, with the used tokens only


def test_frozen_to_the_last_block(tiny_backbone):
    """All blocks run once for student and teacher: what they give is whole."""
    backbone, masked = tiny_backbone("vit").eval(), masked_tokens(some_masks())
    with torch.no_grad():
        tokens, rope = embed(backbone, pixels())
        cls, patches, _ = used_features(backbone, tokens, rope, 0, masked)
        tokens = run_blocks(backbone, tokens, rope)
        same_cls, same_patches, _ = used_features(backbone, tokens, rope, 2, masked)
    torch.testing.assert_close(cls, same_cls)
    torch.testing.assert_close(patches, same_patches)


def test_a_block_with_other_names_computes_all_tokens(tiny_backbone):
    """What a later transformers may bring: the result is the same, without saving."""
    backbone = tiny_backbone("dinov2")
    expected = results(backbone, some_masks())
    last = blocks(backbone)[-1]
    last.__class__ = type(last).__mro__[2]
    assert not isinstance(last, LastBlock)
    assert_equal(results(backbone, some_masks()), expected, 2e-6)
    del last.attention.o_proj
    split_last_block(last)
    assert not isinstance(last, LastBlock)


def test_hooks_of_blocks_see_all_tokens_where_all_are_computed(tiny_backbone):
    backbone, shapes = tiny_backbone("dinov3_vit").eval(), []
    blocks(backbone)[-1].register_forward_hook(lambda module, inputs, out: shapes.append(out.shape))
    with torch.no_grad():
        forward_features(backbone, pixels())
        backbone(pixels())
        used_features(backbone, *embed(backbone, pixels()))
    assert shapes == [(4, 19, 16), (4, 19, 16), (4, 16)]


def test_used_tokens_by_hand():
    """Two crops of 1 CLS, 2 registers and 4 patches; patches 0 and 3 of the second are masked."""
    masked = masked_tokens(torch.tensor([[False] * 4, [True, False, False, True]]))
    assert masked[0].tolist() == [[1, 1], [0, 3], [0, 1]] and masked[1] == 2
    crops, numbers, places, n_places = used_tokens(torch.zeros(2, 7, 5), 3, masked)
    assert crops.tolist() == [0, 1, 1, 1] and numbers.tolist() == [0, 0, 3, 6]
    assert places.tolist() == [0, 0, 1, 2] and n_places == 3
    crops, numbers, places, n_places = used_tokens(torch.zeros(2, 7, 5), 3)
    assert crops.tolist() == [0, 1] and numbers.tolist() == places.tolist() == [0, 0]
    assert n_places == 1


def flops(function):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_cls_alone_costs_the_keys_and_values_of_the_last_block(tiny_backbone, family):
    """ViT-S/16 at 224 pixels, counted by torch and by hand: keys and values of all tokens, 2 D^2
    each; the other ten D^2 and two rows of attention for CLS."""
    backbone = tiny_backbone(family, **LARGE).eval()
    use_plain_attention(backbone)
    with torch.no_grad():
        tokens, rope = embed(backbone, pixels(2, 224))
    N, D = tokens.shape[1:]
    block, used = blocks(backbone)[-1], used_tokens(tokens, 1)
    assert flops(lambda: block(tokens, **rope)) == 2 * 2 * N * (12 * D**2 + 2 * N * D)
    expected = 2 * 2 * (2 * N * D**2 + 10 * D**2 + 2 * N * D)
    assert flops(lambda: block(tokens, used=used, **rope)) == expected
    assert expected < 0.16 * flops(lambda: block(tokens, **rope))


@pytest.mark.parametrize("family", ["vit", "dinov3_vit"])
def test_compiled_blocks_take_any_number_of_masked_patches(tiny_backbone, family):
    """The graph that torch.compile captures, without generated code: it is made anew for a second
    number of masked patches, and then serves all."""
    torch._dynamo.reset()
    backbone = tiny_backbone(family)
    expected, all_masks = [], []
    for seed in range(4):
        masks = torch.rand(4, 16, generator=torch.Generator().manual_seed(seed)) < 0.4
        all_masks.append(masks)
        expected.append(results(backbone, masks))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph
    for block in blocks(backbone):
        block.compile(backend=count, fullgraph=True)
    for masks, wanted in zip(all_masks, expected):
        assert_equal(results(backbone, masks), wanted, 2e-6)
    assert len(graphs) <= 4, len(graphs)
    torch._dynamo.reset()


def test_student_without_patches_has_the_same_logits(tiny_student):
    student, masks = tiny_student("dinov2_with_registers").eval(), some_masks()
    with torch.no_grad():
        crops = pixels(), pixels(6, 16, seed=1), masks
        whole, used = student(*crops), student(*crops, with_patches=False)
    assert used.keys() == whole.keys() - {"patches"}
    for name in used:
        torch.testing.assert_close(used[name], whole[name], rtol=1e-5, atol=1e-6)
