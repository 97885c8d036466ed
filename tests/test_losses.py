"""Every loss against the loops of its docstring, and the targets against what they promise."""
import math

import pytest
import torch
import torch.nn.functional as F

import losses
from losses import (CrossEntropy, dino_loss, feature_loss, gram_loss, ibot_loss, koleo_loss,
                    move_center, resize_grid, sinkhorn_knopp, softmax_center, sum_rows,
                    update_center)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_probs(*shape, seed=1):
    return F.softmax(3 * normal(*shape, seed=seed), dim=-1)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    b = torch.as_tensor(b, dtype=a.dtype)
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def cross_entropy(probs, logits, temp):
    return -(probs * F.log_softmax(logits / temp, dim=-1)).sum()


# ---- softmax centering ----

def test_softmax_center_subtracts_the_center_and_divides_by_the_temperature():
    logits, center = normal(5, 7), normal(1, 7, seed=3)
    exponent = ((logits - center) / 0.07).exp()
    expected = exponent / exponent.sum(dim=1, keepdim=True)
    assert_close(softmax_center(logits, center, 0.07), expected)


def test_update_center_is_an_average_of_batch_means():
    logits, center = normal(5, 7), normal(1, 7, seed=3)
    batch_mean = logits.mean(dim=0, keepdim=True)
    expected = 0.8 * center + 0.2 * batch_mean
    assert_close(update_center(center, logits, momentum=0.8), expected)


def test_center_of_micro_batches_is_that_of_all_their_rows():
    """Micro-batches of 5, 0 and 2 masked patches count as 7 rows, not as 3 means."""
    center, logits = normal(1, 7), normal(7, 7, seed=1)
    sums = sum(sum_rows(part) for part in logits.split([5, 0, 2]))
    expected = update_center(center, logits, momentum=0.8)
    assert_close(move_center(center, sums, momentum=0.8), expected)


def test_update_center_without_rows_changes_nothing():
    center = normal(1, 7)
    assert torch.equal(update_center(center, torch.empty(0, 7)), center)


# ---- Sinkhorn-Knopp ----

def sinkhorn_loop(logits, temp, n_iterations):
    """The docstring as loops over single rows and columns, in double precision."""
    q = (logits.double() / temp).exp()
    n, k = q.shape
    for _ in range(n_iterations):
        for column in range(k):
            q[:, column] /= q[:, column].sum() * k
        for row in range(n):
            q[row] /= q[row].sum() * n
    return (q * n).float()


@pytest.mark.parametrize("n, k, iterations", [(6, 20, 3), (50, 8, 3), (9, 9, 1)])
def test_sinkhorn_is_its_loop(n, k, iterations):
    logits = 0.1 * normal(n, k)
    expected = sinkhorn_loop(logits, 0.05, iterations)
    assert_close(sinkhorn_knopp(logits, 0.05, iterations), expected)


def test_sinkhorn_rows_sum_to_one_and_columns_are_balanced():
    logits = 0.1 * normal(400, 10) + torch.linspace(0, 0.2, 10)  # the last have the largest logits
    softmax = F.softmax(logits / 0.05, dim=1)
    assert softmax.sum(dim=0).max() > 80  # softmax alone does not balance them
    for iterations, tolerance in ((3, 0.05), (50, 1e-4)):
        probs = sinkhorn_knopp(logits, 0.05, iterations)
        assert_close(probs.sum(dim=1), torch.ones(400))
        assert_close(probs.sum(dim=0), torch.full((10,), 40.0), rtol=tolerance)


def test_sinkhorn_without_rows():
    assert sinkhorn_knopp(torch.empty(0, 7), 0.04).shape == (0, 7)


def sinkhorn_logs(logits, temp, n_iterations=3):
    """The docstring on logarithms, in double precision: exact for any range."""
    log_q = logits.double() / temp
    for _ in range(n_iterations):
        log_q = log_q - log_q.logsumexp(dim=0, keepdim=True)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp()


def far_apart(spread, temp, n=40, k=30):
    """Logits that span `spread` temperatures: a confident row, and a row, a column, and an entry
    far below and above the others."""
    logits = 3 * temp * normal(n, k)
    logits[3, 5] += spread * temp
    logits[7] -= spread / 2 * temp
    logits[:, 9] -= spread / 2 * temp
    logits[11, 13] += spread / 3 * temp
    return logits


@pytest.mark.parametrize("spread", [0, 30, 60, 100, 300, 1000])
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_is_exact_over_a_thousand_temperatures(spread, iterations):
    """Relative, too: a small target is right as well. The error grows with the range."""
    for temp in (0.04, 0.07):
        for logits in (far_apart(spread, temp), spread * temp * normal(40, 30).sigmoid()):
            probs = sinkhorn_knopp(logits, temp, iterations).double()
            expected = sinkhorn_logs(logits, temp, iterations)
            largest = (30 + spread) * 3e-7
            assert ((probs - expected).abs() <= largest * expected + 1e-30).all()


def test_one_confident_row_leaves_the_targets_of_the_others():
    """Once the other targets became uniform without a word: entropy 4.14, ln 64 = 4.16."""
    logits = 0.6 * torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) - 0.3
    logits[3, 5] = 3.0

    def entropy(probs):
        others = torch.cat([probs[:3], probs[4:]])
        return float(-(others * others.clamp_min(1e-30).log()).sum(dim=1).mean())
    expected = entropy(sinkhorn_logs(logits, 0.04))
    assert entropy(sinkhorn_knopp(logits, 0.04)) == pytest.approx(expected, rel=1e-5)
    assert expected < 2.6


def test_sinkhorn_at_any_scale():
    logits = 0.5 * normal(12, 6)
    shifted = sinkhorn_knopp(logits + 1000, 0.04)  # exp(1000 / 0.04) is inf
    assert_close(shifted.sum(dim=1), torch.ones(12))
    unshifted = sinkhorn_knopp(logits, 0.04)
    assert_close(shifted, unshifted, rtol=1e-2, atol=1e-3)  # adding 1000 costs digits in fp32
    for scale in (1e3, 1e6, 1e30):
        probs = sinkhorn_knopp(scale * logits, 0.04)
        assert_close(probs.sum(dim=1), torch.ones(12))


def test_targets_have_no_gradient():
    logits = normal(4, 6).requires_grad_()
    assert not sinkhorn_knopp(logits, 0.04).requires_grad
    assert not softmax_center(logits, normal(1, 6), 0.04).requires_grad


# ---- DINO ----

def dino_loop(student, teacher, temp, ignore_diagonal):
    pairs, total, B = 0, 0, student.shape[1]
    for t in range(len(teacher)):
        for s in range(len(student)):
            if ignore_diagonal and s == t:
                continue
            for b in range(B):
                total += cross_entropy(teacher[t, b], student[s, b], temp) / B
            pairs += 1
    return total / pairs


@pytest.mark.parametrize("S, T, ignore_diagonal", [
    (2, 2, True), (5, 2, True), (5, 2, False), (3, 3, True),
    (2, 3, True), (1, 2, True), (3, 1, False), (1, 1, False)])
def test_dino_loss_is_its_loop(S, T, ignore_diagonal):
    student, teacher = normal(S, 3, 8), random_probs(T, 3, 8)
    loss = dino_loss(student, teacher, 0.2, ignore_diagonal)
    assert_close(loss, dino_loop(student, teacher, 0.2, ignore_diagonal))


def test_dino_loss_never_compares_a_crop_with_itself():
    """With two crops, the gradient of student crop 0 depends on teacher crop 1 only."""
    def gradient(teacher):
        student = normal(2, 3, 8).requires_grad_()
        dino_loss(student, teacher).backward()
        return student.grad
    teacher = random_probs(2, 3, 8)
    changed = torch.stack([random_probs(3, 8, seed=9), teacher[1]])
    assert torch.equal(gradient(teacher)[0], gradient(changed)[0])
    assert not torch.allclose(gradient(teacher)[1], gradient(changed)[1])


def test_dino_loss_of_a_uniform_student_is_ln_k():
    assert_close(dino_loss(torch.zeros(4, 3, 50), random_probs(2, 3, 50)), math.log(50))


def test_dino_loss_without_a_pair_is_refused():
    with pytest.raises(ValueError, match="no pair"):
        dino_loss(normal(1, 3, 8), random_probs(1, 3, 8))


def test_dino_loss_of_bf16_logits_is_computed_in_fp32():
    student, teacher = normal(2, 3, 64).bfloat16(), random_probs(2, 3, 64)
    loss = dino_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, dino_loss(student.float(), teacher))


# ---- iBOT ----

def ibot_loop(student, teacher, masks, temp):
    total, row = 0, 0
    for crop in masks:
        n_masked = int(crop.sum())
        for _ in range(n_masked):
            total += cross_entropy(teacher[row], student[row], temp) / n_masked
            row += 1
    return total / len(masks)


def test_ibot_loss_is_its_loop():
    masks = normal(6, 9) > 0.3
    masks[2] = False  # a crop without masks counts in the mean, too
    M = int(masks.sum())
    student, teacher = normal(M, 8), random_probs(M, 8)
    loss = ibot_loss(student, teacher, masks, 0.2)
    assert_close(loss, ibot_loop(student, teacher, masks, 0.2))


def test_ibot_loss_without_masks_is_zero_with_a_gradient():
    student = torch.empty(0, 8, requires_grad=True)
    loss = ibot_loss(student, torch.empty(0, 8), torch.zeros(4, 9, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and student.grad.shape == (0, 8)


def test_ibot_loss_of_a_uniform_student_with_half_of_the_crops_masked():
    masks = torch.zeros(4, 9, dtype=torch.bool)
    masks[:2, :3] = True
    assert_close(ibot_loss(torch.zeros(6, 8), random_probs(6, 8), masks), math.log(8) / 2)


# ---- KoLeo ----

def koleo_loop(features, eps=1e-8, group_size=0):
    x, total = [row / row.norm() for row in features], 0
    size = group_size or len(x)
    for i in range(len(x)):
        first = i // size * size
        others = [j for j in range(first, first + size) if j != i]
        j = max(others, key=lambda j: (x[i] @ x[j]).item())
        total -= ((x[i] - x[j] + eps).norm() + eps).log()
    return total / len(x)


@pytest.mark.parametrize("group_size", [0, 2, 4, 12, 99])
def test_koleo_loss_and_gradient_are_its_loop(group_size):
    a, b = (normal(12, 5).requires_grad_() for _ in range(2))
    loss = koleo_loss(a, group_size=group_size)
    loop = koleo_loop(b, group_size=min(12, group_size))
    loss.backward()
    loop.backward()
    assert_close(loss.detach(), loop.detach())
    assert_close(a.grad, b.grad)


def test_koleo_of_an_orthonormal_batch():
    expected = -math.log(math.sqrt(2))  # their distance on the sphere is sqrt 2
    assert_close(koleo_loss(3 * torch.eye(6)), expected)


def test_koleo_of_two_identical_images_is_finite():
    features = normal(4, 5)
    features[1] = features[0]
    features.requires_grad_()
    loss = koleo_loss(features)
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all()


def test_koleo_of_opposite_features():
    """No row is its own neighbour, not even if all others are opposite."""
    assert_close(koleo_loss(torch.tensor([[0.0, 1.0], [0.0, -1.0]])), -math.log(2))
    line = torch.tensor([[0.3, -0.7, 0.2]])
    for _ in range(20):
        line = F.normalize(line + 0.1 * normal(1, 3))
        assert_close(koleo_loss(torch.cat([line, -3 * line])), -math.log(2))


def test_koleo_refuses_a_row_without_neighbour():
    for features, group_size in ((normal(1, 5), 0), (normal(6, 5), 1)):
        with pytest.raises(ValueError, match="needs 2 images to compare, there is 1 in a group"):
            koleo_loss(features, group_size=group_size)
    with pytest.raises(ValueError, match="koleo_group_size=4 does not divide the 6 images"):
        koleo_loss(normal(6, 5), group_size=4)


def test_koleo_chooses_its_neighbours_in_fp32_under_autocast():
    # so near to each other that bf16 products cannot tell them apart
    features = torch.ones(20, 5) + 1e-3 * normal(20, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = koleo_loss(features)
    assert torch.equal(inside, koleo_loss(features))


# ---- Gram ----

def gram_loop(student, teacher, remove_neg=False, remove_only_teacher_neg=False):
    entries = []
    for s, t in zip(student, teacher):
        for i in range(len(s)):
            for j in range(len(s)):
                a = s[i] @ s[j] / (s[i].norm() * s[j].norm())
                b = t[i] @ t[j] / (t[i].norm() * t[j].norm())
                if remove_neg:
                    a = a.clamp_min(0)
                if remove_neg or remove_only_teacher_neg:
                    b = b.clamp_min(0)
                entries.append((a - b) ** 2)
    return sum(entries) / len(entries)


@pytest.mark.parametrize("options", [{}, dict(remove_neg=True), dict(remove_only_teacher_neg=True)])
def test_gram_loss_is_its_loop(options):
    student, teacher = normal(2, 4, 6), normal(2, 4, 6, seed=5)
    loss = gram_loss(student, teacher, **options)
    assert_close(loss, gram_loop(student, teacher, **options))


def test_gram_of_equal_similarities_is_zero():
    patches = normal(2, 4, 6)
    assert gram_loss(patches, patches).item() == 0
    # other directions and lengths, the same similarities
    rotation = torch.linalg.qr(normal(6, 6, seed=8)).Q
    assert_close(gram_loss(patches, 7 * patches @ rotation), 0.0)


def test_gram_is_blind_to_the_length_of_tokens():
    student, teacher = normal(2, 4, 6), normal(2, 4, 6, seed=5)
    lengths = normal(2, 4, 1, seed=9).abs() + 0.1
    loss = gram_loss(student * lengths, teacher / lengths)
    assert_close(loss, gram_loss(student, teacher))


def test_gram_of_a_finer_teacher_is_resized():
    student, flat = normal(2, 4, 6), normal(2, 1, 6, seed=5)
    finer, equal = flat.repeat(1, 36, 1), flat.repeat(1, 4, 1)
    assert_close(gram_loss(student, finer), gram_loss(student, equal))


def test_gram_refuses_both_options():
    patches = normal(2, 4, 6)
    with pytest.raises(ValueError, match="exclude each other"):
        gram_loss(patches, patches, remove_neg=True, remove_only_teacher_neg=True)


# ---- what all of them share ----

@pytest.mark.parametrize("function, args", [
    (dino_loss, (normal(3, 2, 8), random_probs(2, 2, 8))),
    (ibot_loss, (normal(3, 8), random_probs(3, 8), torch.tensor([[True, False, True, True]]))),
    (koleo_loss, (normal(4, 5),)),
    (gram_loss, (normal(2, 4, 6), normal(2, 4, 6, seed=5))),
    (sinkhorn_knopp, (normal(5, 7), 0.04)),
    (softmax_center, (normal(5, 7), normal(1, 7), 0.04)),
    (update_center, (normal(1, 7), normal(5, 7, seed=5)))])
def test_nothing_changes_its_arguments(function, args):
    tensors = [arg for arg in args if torch.is_tensor(arg)]
    before = [tensor.clone() for tensor in tensors]
    function(*args)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


# ---- distillation ----

def neighbours(cell, size, q):
    """Of a new cell: the indices of the old cells on both sides of its center, and the weight of
    the second one."""
    position = max((cell + 0.5) * q / size - 0.5, 0)
    first = int(position)
    return first, min(first + 1, q - 1), position - first


def bilinear_loop(square, size):
    """[q,q] at size x size by the definition: each new cell is a mean of the four old cells around
    its center."""
    q = len(square)
    result = torch.zeros(size, size)
    for y in range(size):
        for x in range(size):
            y0, y1, fy = neighbours(y, size, q)
            x0, x1, fx = neighbours(x, size, q)
            upper = (1 - fx) * square[y0, x0] + fx * square[y0, x1]
            lower = (1 - fx) * square[y1, x0] + fx * square[y1, x1]
            result[y, x] = (1 - fy) * upper + fy * lower
    return result


@pytest.mark.parametrize("own, grid", [(16, 14), (14, 16), (4, 2), (3, 3)])
def test_resize_grid_is_bilinear(own, grid):
    tokens = normal(2, own * own, 3)
    resized = resize_grid(tokens, grid)
    for image in range(2):
        for channel in range(3):
            square = tokens[image, :, channel].reshape(own, own)
            found = resized[image, :, channel].reshape(grid, grid)
            assert_close(found, bilinear_loop(square, grid), atol=1e-5)


def test_feature_loss_is_its_loop():
    student = (2 * normal(4, 5, 6)).requires_grad_()
    teacher = 2 * normal(4, 5, 6, seed=3)
    cosine = smooth = 0.0
    for b in range(4):
        for p in range(5):
            s, t = student[b, p].detach(), teacher[b, p]
            cosine += float(1 - s @ t / (s.norm() * t.norm())) / 20
            for d in (s - t).tolist():
                smooth += (d * d / 2 if abs(d) < 1 else abs(d) - 0.5) / 120
    assert_close(feature_loss(student, teacher), cosine)
    assert_close(feature_loss(student, teacher, "smooth_l1"), smooth)
    assert float(feature_loss(torch.zeros(4, 6), teacher[:, 0])) == 1.0  # a student of zeros
    assert_close(feature_loss(3 * teacher, teacher), 0.0)  # the cosine ignores length
    feature_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0


def test_cross_entropy_by_few_rows_is_that_of_autograd(monkeypatch):
    """Value and gradient, for chunks that do not divide the rows. Rows of probs need not sum to 1.
    The gradient of bf16 logits is bf16."""
    torch.manual_seed(0)
    logits, probs = torch.randn(11, 6) * 3, torch.rand(11, 6)
    weight = torch.randn(11)
    expected = logits.clone().requires_grad_()
    wanted = -(probs * F.log_softmax(expected / 0.1, dim=-1)).sum(-1)
    (wanted * weight).sum().backward()
    for chunk in (1, 6 * 3, 6 * 4, 2**22):
        monkeypatch.setattr(losses.few_rows, "__defaults__", (chunk,))
        x = logits.clone().requires_grad_()
        found = CrossEntropy.apply(x, probs, 0.1)
        (found * weight).sum().backward()
        torch.testing.assert_close(found, wanted)
        targets = softmax_center(logits, probs[:1], 0.05)
        expected_targets = F.softmax((logits - probs[:1]) / 0.05, dim=-1)
        torch.testing.assert_close(targets, expected_targets)
        torch.testing.assert_close(x.grad, expected.grad, rtol=1e-5, atol=1e-5)
    half = logits.bfloat16().requires_grad_()
    CrossEntropy.apply(half, probs, 0.1).sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_targets_leave_the_logits_as_they_are():
    """Targets are computed in place on a copy, also of fp32 logits: the center reads the logits
    afterwards."""
    logits = torch.randn(5, 7)
    kept = logits.clone()
    softmax_center(logits, torch.randn(1, 7), 0.05)
    sinkhorn_knopp(logits, 0.05)
    assert torch.equal(logits, kept)
