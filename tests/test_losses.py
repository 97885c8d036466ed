"""Each loss against the plain double loop of its docstring, and the properties that a mistake would break."""
import math

import pytest
import torch
import torch.nn.functional as F

from losses import dino_loss, gram_loss, ibot_loss, koleo_loss, sinkhorn_knopp, softmax_center, update_center

torch.manual_seed(0)


def probs(*shape):
    return torch.randn(*shape).mul(3).softmax(-1)


@pytest.mark.parametrize("S, T, ignore", [(5, 2, True), (5, 2, False), (2, 2, True), (3, 1, False), (2, 3, True)])
def test_dino_loss_is_the_double_loop(S, T, ignore):
    student, teacher = torch.randn(S, 4, 7), probs(T, 4, 7)
    total, pairs = 0.0, 0
    for t in range(T):
        for s in range(S):
            if ignore and s == t:
                continue
            total += sum(-(teacher[t, b] * (student[s, b] / 0.1).log_softmax(0)).sum() for b in range(4)) / 4
            pairs += 1
    assert dino_loss(student, teacher, 0.1, ignore) == pytest.approx(float(total / pairs), rel=1e-5)


def test_dino_loss_of_a_uniform_student_is_ln_k_and_needs_a_pair():
    assert dino_loss(torch.zeros(4, 3, 50), probs(2, 3, 50)) == pytest.approx(math.log(50), rel=1e-5)
    with pytest.raises(ValueError, match="no pair"):
        dino_loss(torch.zeros(1, 3, 5), probs(1, 3, 5))


def test_same_view_pairs_have_no_gradient():
    student = torch.randn(2, 3, 5, requires_grad=True)
    teacher = probs(2, 3, 5)
    teacher[1] = 1 / 5                                         # student 0 learns from teacher 1 only
    (gradient,) = torch.autograd.grad(dino_loss(student, teacher), student)
    expected = torch.autograd.grad(-(teacher[1] * F.log_softmax(student[0] / 0.1, -1)).sum() / 3 / 2, student)[0]
    assert torch.allclose(gradient[0], expected[0], atol=1e-6)


def test_ibot_loss_is_the_double_loop_and_zero_without_masks():
    masks = torch.rand(6, 9) < 0.4
    masks[2] = False
    M = int(masks.sum())
    student, teacher = torch.randn(M, 7), probs(M, 7)
    total, m = 0.0, 0
    for crop in range(6):
        for _ in range(int(masks[crop].sum())):
            total += -(teacher[m] * (student[m] / 0.1).log_softmax(0)).sum() / masks[crop].sum()
            m += 1
    assert ibot_loss(student, teacher, masks) == pytest.approx(float(total / 6), rel=1e-5)
    nothing = torch.randn(0, 7, requires_grad=True)
    loss = ibot_loss(nothing, probs(0, 7), torch.zeros(6, 9, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and nothing.grad.shape == (0, 7)


def test_koleo_of_orthonormal_features_and_of_one_image():
    assert koleo_loss(torch.eye(8)) == pytest.approx(-math.log(math.sqrt(2)), abs=1e-6)
    with pytest.raises(ValueError, match="at least 2 images"):
        koleo_loss(torch.randn(1, 4))
    x = torch.randn(6, 5)
    unit = x / x.norm(dim=1, keepdim=True)
    nearest = [min(float((unit[i] - unit[j]).norm()) for j in range(6) if j != i) for i in range(6)]
    assert koleo_loss(x) == pytest.approx(-sum(map(math.log, nearest)) / 6, rel=1e-5)


def test_gram_is_zero_for_itself_and_blind_to_token_scale():
    x, y = torch.randn(2, 9, 5), torch.randn(2, 9, 5)
    assert gram_loss(x, x) == 0
    assert torch.allclose(gram_loss(x * (torch.rand(2, 9, 1) + 0.5), y), gram_loss(x, y), rtol=1e-5)


def test_sinkhorn_balances_and_survives():
    q = sinkhorn_knopp(torch.randn(64, 16), 0.5, n_iterations=50)
    assert torch.allclose(q.sum(1), torch.ones(64), atol=1e-5) and torch.allclose(q.sum(0), torch.full((16,), 4.0), rtol=1e-2)
    assert sinkhorn_knopp(torch.zeros(0, 16), 0.04).shape == (0, 16)
    large = sinkhorn_knopp(torch.randn(8, 4) * 0.5 + 1000, 0.04)                           # exp alone would overflow
    assert torch.isfinite(large).all() and torch.allclose(large.sum(1), torch.ones(8), atol=1e-5)
    assert torch.isfinite(sinkhorn_knopp(torch.randn(8, 4) * 100, 0.04)).all()             # whole columns vanish


def test_centre_moves_by_the_batch_mean_and_stays_without_rows():
    center, logits = torch.randn(1, 5), torch.randn(6, 5)
    assert torch.allclose(update_center(center, logits, 0.9), 0.9 * center + 0.1 * logits.mean(0, keepdim=True), atol=1e-6)
    assert torch.equal(update_center(center, logits[:0]), center)
    assert torch.allclose(softmax_center(logits, center, 0.05), ((logits - center) / 0.05).softmax(-1))
