"""metrics.py and probe.py against plain loops and scikit-learn: k-NN, linear probe, metrics, Dice,
RankMe, what is measured without labels, and a name for every known failure of a run."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from detection import dice_per_class, patch_classes
from metrics import (alignment, classification_metrics, diagnose, knn_classify, knn_vote, lidar,
                     monitor, nearest_images, rankme, silhouette, spherical_kmeans,
                     two_view_retrieval, uniformity, weighted_auc)
from probe import STRENGTHS, fit_linear, fit_probe, linear_probe


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_knn(train, labels, test, k, temperature):
    """The definition, one image after another."""
    predictions = []
    for query in test:
        similarity = [float(torch.dot(query, x) / (query.norm() * x.norm())) for x in train]
        nearest = sorted(range(len(train)), key=lambda i: -similarity[i])[:k]
        votes = {}
        for i in nearest:  # in order of distance: max() keeps the first of equals
            weight = 1 if temperature is None else math.exp(similarity[i] / temperature)
            label = int(labels[i])
            votes[label] = votes.get(label, 0) + weight
        predictions.append(max(votes, key=votes.get))
    return predictions


# ---- k-NN ----

@pytest.mark.parametrize("n_train, n_classes", [(60, 4), (7, 3), (7, 7), (1, 1)])
@pytest.mark.parametrize("k", [1, 2, 5, 20])
@pytest.mark.parametrize("temperature", [None, 0.07, 1.0])
def test_knn_is_the_plain_loop(n_train, n_classes, k, temperature):
    train, test = randn(n_train, 6), randn(40, 6, seed=1)
    labels = torch.arange(n_train) % n_classes
    predictions = knn_classify(train, labels, test, k, temperature)
    assert predictions.tolist() == plain_knn(train, labels, test, k, temperature)


def test_among_equal_votes_the_nearest_class_wins():
    # angles 1..4 degrees from the query: classes 7, 2, 2, 7 have two votes each, the nearest is a 7
    angle = torch.tensor([1.0, 2.0, 3.0, 4.0]) * math.pi / 180
    train, query = torch.stack([angle.cos(), angle.sin()], dim=1), torch.tensor([[1.0, 0.0]])
    assert knn_classify(train, torch.tensor([7, 2, 2, 7]), query, k=4).tolist() == [7]
    assert knn_classify(train, torch.tensor([2, 7, 7, 2]), query, k=4).tolist() == [2]
    # a majority beats the nearest
    assert knn_classify(train, torch.tensor([7, 2, 2, 7]), query, k=3).tolist() == [2]


def test_a_small_temperature_listens_to_the_nearest():
    angle = torch.tensor([5.0, 30.0, 30.0]) * math.pi / 180
    train, query = torch.stack([angle.cos(), angle.sin()], dim=1), torch.tensor([[1.0, 0.0]])
    labels = torch.tensor([1, 0, 0])
    assert knn_classify(train, labels, query, k=3, temperature=0.07).tolist() == [1]
    assert knn_classify(train, labels, query, k=3, temperature=10.0).tolist() == [0]


def test_nearest_images_in_chunks_are_those_of_the_whole_matrix():
    """Bit for bit, and no tensor has all pairs, or all training features once more."""
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 32, generator=generator) for n in (5000, 70))
    groups = dict(train_groups=torch.arange(5000) % 50, test_groups=torch.arange(70) % 50)
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.append(out.numel() if torch.is_tensor(out) and not out._is_view() else 0)
            return out
    for more in ({}, groups):
        whole = nearest_images(train, test, 7, **more)
        exact = F.normalize(test.double(), dim=1) @ F.normalize(train.double(), dim=1).T
        if more:
            exact[groups["test_groups"][:, None] == groups["train_groups"]] = -torch.inf
        assert torch.equal(whole[1], exact.topk(7, dim=1)[1])
        with Sizes():
            parts = nearest_images(train, test, 7, chunk=16, train_chunk=512, **more)
        assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])
    assert max(largest) == 512 * 32
    similarity, indices = nearest_images(train[:20], test, 50, train_chunk=8)
    assert indices.shape == (70, 20) and (indices.sort(dim=1)[0] == torch.arange(20)).all()


def test_knn_knows_length_chunks_and_gaps():
    train, test = randn(50, 8), randn(33, 8, seed=1)
    labels = torch.tensor([0, 5, 1000]).repeat(17)[:50]
    whole = knn_classify(train, labels, test, k=5)
    assert torch.equal(knn_classify(train, labels, test, k=5, chunk=7), whole)
    longer = train * torch.arange(1, 51)[:, None]  # the cosine does not depend on length
    assert torch.equal(knn_classify(longer, labels, test * 9, k=5), whole)
    assert set(whole.tolist()) <= {0, 5, 1000} and whole.dtype == torch.int64
    assert torch.equal(knn_classify(train.bfloat16(), labels, train.bfloat16(), k=1), labels)


@pytest.mark.parametrize("multi_label", [False, True])
def test_shares_of_unanimous_votes_are_tied(multi_label):
    """All neighbours are of one class, at different distances: the shares are 1, not 1 +- 1e-7,
    whose order would be an AUC."""
    rng = torch.Generator().manual_seed(0)
    train = torch.randn(300, 4, generator=rng)
    test = torch.randn(200, 4, generator=rng)
    labels = torch.ones(300, dtype=torch.int64)
    labels[0] = 0
    train[0] = -1e3 * train[1:].sum(dim=0)  # the only image of its class: far from some only
    if multi_label:
        labels = torch.stack([1 - labels, labels], dim=1)
    _, shares = knn_vote(train, labels, test, k=20, temperature=0.07)
    unanimous = shares[:, 0] == 0
    assert 20 < unanimous.sum() < 200
    assert torch.equal(shares[unanimous, 1], torch.ones(int(unanimous.sum())))
    truth = np.arange(int(unanimous.sum())) % 2
    chance = classification_metrics(shares[unanimous].numpy(), truth)["auc"]
    assert chance == 0.5


def test_shares_are_those_of_the_votes():
    train, test, labels = randn(40, 6), randn(9, 6, seed=1), torch.arange(40) % 3
    for k, temperature in ((5, None), (10, 0.07), (100, 0.07)):
        _, shares = knn_vote(train, labels, test, k, temperature)
        for query, row in zip(test, shares):
            similarity = F.cosine_similarity(query[None], train)
            near = similarity.argsort(descending=True)[:k]
            weight = torch.ones(len(near))
            if temperature is not None:
                weight = (similarity[near] / temperature).exp()
            sums = [weight[labels[near] == c].sum() for c in range(3)]
            expected = torch.stack(sums) / weight.sum()
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)


def test_a_tiny_temperature_stays_finite():
    train, labels = randn(30, 6), torch.arange(30) % 3
    # exp(1 / 1e-4) would overflow
    predictions, shares = knn_vote(train, labels, train, k=5, temperature=1e-4)
    assert torch.isfinite(shares).all() and torch.equal(predictions, labels)


def test_several_labels_are_voted_on_one_by_one():
    train, test = randn(50, 6), randn(20, 6, seed=1)
    labels = (randn(50, 4, seed=2) > 0.3).long()
    predictions, shares = knn_vote(train, labels, test, k=7)
    for c in range(4):
        one, share = knn_vote(train, labels[:, c], test, k=7)  # an odd k has no ties
        assert torch.equal(predictions[:, c].long(), one)
        torch.testing.assert_close(shares[:, c], share[:, 1])


# ---- linear probe ----

def clouds(n, n_classes=4, width=24, seed=0, spread=1.6):
    """Gaussian clouds that overlap. The features differ much in scale, and one is constant."""
    rng = np.random.default_rng(seed)
    middles = np.random.default_rng(99).normal(size=(n_classes, width))
    labels = rng.integers(n_classes, size=n)
    x = middles[labels] + spread * rng.normal(size=(n, width))
    x = x * np.logspace(-2, 2, width) + 5
    x[:, 3] = 7.0
    return torch.from_numpy(x).float(), torch.from_numpy(labels)


def test_the_probe_is_scikit_learns_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    scaler = pytest.importorskip("sklearn.preprocessing").StandardScaler()
    x, y = clouds(300)
    x_val, y_val = clouds(80, seed=1)
    x_test, y_test = clouds(400, seed=2)
    probe, strength = fit_probe(x, y, x_val, y_val)
    theirs = linear_model.LogisticRegression(C=strength, max_iter=10_000, tol=1e-9)
    theirs.fit(scaler.fit_transform(x.double()), y)
    expected = theirs.predict_proba(scaler.transform(x_test.double()))
    np.testing.assert_allclose(probe(x_test), expected, atol=1e-4)
    accuracy = float((probe(x_test).argmax(1) == y_test).float().mean())
    their_accuracy = theirs.score(scaler.transform(x_test.double()), y_test)
    assert abs(accuracy - their_accuracy) < 0.005 and accuracy > 0.6
    assert torch.equal(linear_probe(x, y, x_val, y_val, x_test), probe(x_test))


def test_the_probe_is_at_the_minimum():
    """No library: the gradient of the objective of fit_linear's docstring, written out, is zero."""
    x, y = clouds(200)
    x = x.double()
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-3)
    weights = torch.rand(200, generator=torch.Generator().manual_seed(0)).double()
    for strength in (1e-3, 1.0):
        zero = x.new_zeros(24, 4), x.new_zeros(4)
        W, b = fit_linear(x, y, strength, zero, weights, max_iterations=2000, tolerance=1e-7)
        error = ((x @ W + b).softmax(1) - F.one_hot(y, 4)) * weights[:, None] / 200
        gradient = x.T @ error + W / (strength * 200)
        assert gradient.abs().max() < 1e-6 and error.sum(0).abs().max() < 1e-6


def test_the_strength_is_the_one_with_the_lowest_val_loss():
    x, y = clouds(60, spread=3.0)
    x_val, y_val = clouds(200, seed=1, spread=3.0)
    _, chosen = fit_probe(x, y, x_val, y_val)
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    std[3] = 1.0  # of the constant feature
    x, x_val = ((part.double() - mean) / std for part in (x, x_val))
    losses = []
    for strength in STRENGTHS:
        zero = x.new_zeros(24, 4), x.new_zeros(4)
        W, b = fit_linear(x, y, strength, zero, max_iterations=1000)
        losses.append(float(F.cross_entropy(x_val @ W + b, y_val)))
    best = int(np.argmin(losses))
    assert chosen == STRENGTHS[best] and 0 < best < len(STRENGTHS) - 1


def test_several_labels_are_independent_outputs():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, x_val, x_test = randn(200, 8), randn(60, 8, seed=1), randn(50, 8, seed=2)
    true = randn(8, 3, seed=3)
    y, y_val = ((part @ true + randn(len(part), 3, seed=4) > 1).long()
                for part in (x, x_val))
    probe, strength = fit_probe(x, y, x_val, y_val)
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    for c in range(3):
        theirs = linear_model.LogisticRegression(C=strength, max_iter=10_000, tol=1e-9)
        theirs.fit(((x - mean) / std).numpy(), y[:, c])
        expected = theirs.predict_proba(((x_test - mean) / std).numpy())[:, 1]
        np.testing.assert_allclose(probe(x_test)[:, c], expected, atol=1e-4)


def test_balanced_weighs_classes_alike():
    """95 images of one class and 5 of another on one line: balancing moves the boundary towards the
    larger class."""
    x = torch.cat([torch.linspace(-2, 1, 95), torch.linspace(0, 3, 5)])[:, None]
    y = torch.arange(100) // 95
    plain, balanced = (fit_probe(x, y, x, y, balanced=value)[0](x).argmax(1)
                       for value in (False, True))
    assert balanced[95:].float().mean() > plain[95:].float().mean()
    assert balanced.sum() > plain.sum()


# ---- metrics ----

def test_metrics_are_scikit_learns():
    m = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for n, n_classes, absent in ((200, 5, None), (60, 2, None), (90, 4, 2), (7, 3, None)):
        labels = rng.integers(n_classes, size=n)
        labels = np.where(labels == absent, 0, labels)  # a class that the test images do not have
        scores = rng.normal(size=(n, n_classes)) + 1.5 * np.eye(n_classes)[labels]
        scores = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        scores = np.round(scores, 1 if n == 90 else 6)  # 1 digit: with ties
        predictions = scores.argmax(1)
        found = classification_metrics(torch.from_numpy(scores), torch.from_numpy(labels))
        assert found["accuracy"] == pytest.approx(m.accuracy_score(labels, predictions))
        present = np.unique(labels)
        recalls = m.recall_score(labels, predictions, average=None, labels=present, zero_division=0)
        assert found["balanced_accuracy"] == pytest.approx(recalls.mean(), abs=1e-6)
        for name in ("precision", "recall", "f1"):
            for average in ("macro", "weighted"):
                score = getattr(m, f"{name}_score")
                theirs = score(labels, predictions, average=average, zero_division=0)
                key = f"{name}_{average}"
                assert found[key] == pytest.approx(theirs, abs=1e-6), (key, n)
        areas = [m.roc_auc_score(labels == c, scores[:, c]) for c in present]
        assert found["auc"] == pytest.approx(np.mean(areas), abs=1e-6)
        hard = classification_metrics(predictions, labels)  # predictions alone have no AUC
        del found["auc"]
        assert math.isnan(hard.pop("auc")) and hard == found


def test_metrics_of_several_labels_are_scikit_learns():
    m = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = (rng.random((80, 4)) < (0.5, 0.2, 0.1, 0.3)).astype(int)
    scores = np.clip(0.3 * labels + 0.8 * rng.random((80, 4)), 0, 1)
    found, predictions = classification_metrics(scores, labels), scores > 0.5
    assert found["accuracy"] == pytest.approx((predictions == labels).mean())
    area = m.roc_auc_score(labels, scores, average="macro")
    assert found["auc"] == pytest.approx(area, abs=1e-6)
    for name in ("precision", "recall", "f1"):
        for average in ("macro", "weighted"):
            score = getattr(m, f"{name}_score")
            theirs = score(labels, predictions, average=average, zero_division=0)
            assert found[f"{name}_{average}"] == pytest.approx(theirs, abs=1e-6)
    balanced = [m.balanced_accuracy_score(labels[:, c], predictions[:, c]) for c in range(4)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(balanced), abs=1e-6)


def test_predictions_decide_ties_in_a_vote():
    shares, labels = np.array([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4]]), np.array([1, 2])
    assert classification_metrics(shares, labels)["accuracy"] == 0.0  # argmax takes the first
    assert classification_metrics(shares, labels, predictions=labels)["accuracy"] == 1.0


def test_a_class_that_only_the_labels_have():
    """The probe knows three classes from train, the test images a fourth: they count as wrong."""
    found = classification_metrics(np.eye(3)[[0, 1, 2, 2]], np.array([0, 1, 2, 3]))
    assert found["accuracy"] == 0.75 and found["balanced_accuracy"] == 0.75


def test_weights_are_repetitions():
    """A bootstrap resample is a list with repetitions: its weighted area equals that of the list
    written out."""
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(6, size=30) / 5, rng.random(30) < 0.4
    counts = rng.multinomial(30, np.full(30, 1 / 30), size=5).astype(np.float32)
    for area, row in zip(weighted_auc(scores, positive, counts), counts.astype(int)):
        s, p = np.repeat(scores, row), np.repeat(positive, row)
        above, equal = s[p][:, None] > s[~p][None], s[p][:, None] == s[~p][None]
        pairs = above.mean() + equal.mean() / 2
        assert area == pytest.approx(pairs, abs=1e-6)
    only_positive = np.where(positive, 1.0, 0.0)[None]
    assert np.isnan(weighted_auc(scores, positive, only_positive))[0]


def test_intervals_have_the_width_that_theory_gives():
    labels = np.zeros(400, int)
    # accuracy 0.8: its standard error is sqrt(0.8 * 0.2 / 400) = 0.02
    predictions = np.r_[np.zeros(320, int), np.ones(80, int)]
    low, high = classification_metrics(predictions, labels, bootstrap=2000)["accuracy_ci"]
    assert low == pytest.approx(0.8 - 1.96 * 0.02, abs=0.005)
    assert high == pytest.approx(0.8 + 1.96 * 0.02, abs=0.005)
    first, second = (classification_metrics(predictions, labels, bootstrap=50, seed=1)
                     for _ in range(2))
    for found in (first, second):  # nan is not equal to nan
        assert math.isnan(found.pop("auc")) and np.isnan(found.pop("auc_ci")).all()
    assert first == second


# ---- Dice ----

def test_dice_by_hand():
    labels, predictions = np.array([0, 0, 1, 1, 1, 2]), np.array([0, 1, 1, 1, 0, 0])
    # class 0: 1 shared of 2 + 3; class 1: 2 of 3 + 3; class 2: 0 of 1 + 0; class 3 is nowhere
    dice = dice_per_class(labels, predictions, 4)
    np.testing.assert_allclose(dice, [2 / 5, 4 / 6, 0, np.nan])


def test_a_patch_has_its_most_frequent_class():
    rng = np.random.default_rng(0)
    values = np.array([0, 3, 255])
    mask = rng.choice(values, size=(12, 12), p=(0.5, 0.3, 0.2)).astype(np.uint8)
    found = patch_classes(mask, 4, values)
    for i in range(4):
        for j in range(4):
            cell = mask[3 * i:3 * i + 3, 3 * j:3 * j + 3]
            count = (cell == values[found[4 * i + j]]).sum()
            assert count == max((cell == value).sum() for value in values)


# ---- RankMe ----

def test_rankme_of_known_matrices():
    assert rankme(torch.outer(randn(50), randn(8, seed=1))) == pytest.approx(1, abs=1e-3)
    for n in (3, 8):
        orthonormal = torch.linalg.qr(randn(20, n)).Q  # n equal singular values
        assert rankme(orthonormal) == pytest.approx(n, rel=1e-4)
        assert rankme(7 * orthonormal.T) == pytest.approx(n, rel=1e-4)
    # singular values 3 and 1: p = 3/4, 1/4
    two = torch.diag(torch.tensor([3.0, 1.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rankme(two) == pytest.approx(math.exp(entropy), rel=1e-4)
    assert rankme(two.bfloat16()) == pytest.approx(rankme(two), rel=1e-4)


# ---- health of a run ----

LN_K = math.log(64)
HEALTHY = dict(dino_local_loss=2.5, dino_global_loss=0.5, teacher_entropy=1.0, prototype_use=0.5,
               rankme=20.0)
AT_LN_K = dict(dino_local_loss=0.8 * LN_K, dino_global_loss=0.2 * LN_K)


@pytest.mark.parametrize("change, early, words", [
    ({}, False, ""),
    (dict(rankme=1.1), True, "RankMe near 1"),
    (dict(AT_LN_K, teacher_entropy=LN_K), False, "NOT LEARNING"),
    (dict(AT_LN_K, teacher_entropy=LN_K), True, ""),
    (AT_LN_K, False, ""),  # the targets are sharp, not uniform
    (dict(prototype_use=1 / 64), False, "one prototype"),
])
def test_failures_are_called_by_their_name(change, early, words):
    advice = diagnose(dict(HEALTHY, **change), 64, early)
    assert words in advice and bool(words) == bool(advice)


def test_numbers_of_known_batches():
    # every image has a prototype and a dimension of its own
    sharp = monitor(torch.eye(8), torch.eye(8))
    assert sharp["teacher_entropy"] == pytest.approx(0, abs=1e-6)
    assert sharp["prototype_use"] == pytest.approx(1, rel=1e-5)
    assert sharp["rankme"] == pytest.approx(8, rel=1e-3)
    uniform = monitor(torch.ones(8, 8), torch.full((8, 8), 1 / 8))
    assert uniform["teacher_entropy"] == pytest.approx(math.log(8), rel=1e-5)
    assert uniform["rankme"] == pytest.approx(1, rel=1e-3)
    one_taken = monitor(torch.eye(8), torch.eye(8)[:1].repeat(8, 1))
    assert one_taken["prototype_use"] == pytest.approx(1 / 8, rel=1e-4)


# ---- without labels ----

def test_two_view_retrieval_by_hand():
    """Three of the four a find their b, and three of the four b their a."""
    def at(*degrees):
        angle = torch.tensor(degrees) * math.pi / 180
        return torch.stack([angle.cos(), angle.sin()], dim=1)
    a, b = at(0., 90., 180., 200.), at(10., 100., 206., 240.)
    # a: 0 -> 10, 90 -> 100, 180 -> 206, 200 -> 206 (its own is at 240)
    # b: 10 -> 0, 100 -> 90, 206 -> 200 (its own is at 180), 240 -> 200
    assert two_view_retrieval(a, b) == pytest.approx((3 / 4 + 3 / 4) / 2)
    assert two_view_retrieval(7 * a, b) == two_view_retrieval(b, a) == pytest.approx(3 / 4)
    assert two_view_retrieval(a, a) == 1
    assert two_view_retrieval(torch.ones(5, 3), torch.ones(5, 3)) == 0  # a collapse finds nothing


def test_two_view_retrieval_is_the_plain_loop():
    a, b = randn(30, 5), randn(30, 5) + randn(30, 5, seed=1)
    found = 0
    for x, y in ((a, b), (b, a)):
        for i in range(30):
            cosines = [float(F.cosine_similarity(x[i], y[j], dim=0)) for j in range(30)]
            found += int(np.argmax(cosines) == i)
    assert two_view_retrieval(a, b) == pytest.approx(found / 60) and 0 < found < 60


@pytest.mark.parametrize("n, q, width", [(12, 4, 6), (5, 3, 9), (7, 2, 7)])
def test_lidar_is_the_formula(n, q, width):
    """S_w and S_b as plain sums of outer products, the root of S_w written out."""
    x = (randn(n, 1, width) + 0.3 * randn(n, q, width, seed=1)).double()
    mean = sum(x.reshape(-1, width)) / (n * q)
    between, within = torch.zeros(2, width, width, dtype=torch.float64)
    for i in range(n):
        mu = x[i].mean(dim=0)
        between += torch.outer(mu - mean, mu - mean) / n
        for j in range(q):
            within += torch.outer(x[i, j] - mu, x[i, j] - mu) / (n * q)
    within += 1e-4 * torch.eye(width)
    values, axes = torch.linalg.eigh(within)
    root = axes @ torch.diag(values.rsqrt()) @ axes.T
    values = torch.linalg.eigvalsh(root @ between @ root).clamp_min(0)
    p = values / values.sum() + 1e-7
    assert lidar(x) == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-6)


def test_lidar_counts_directions_that_views_leave_alone():
    """Eight images at +-1 on four axes: four directions of equal share. Views that jitter one axis
    further than the images lie apart take that direction away. A line, and a collapse, give 1."""
    corners = torch.cat([torch.eye(4), -torch.eye(4)])[:, None]  # [8,1,4]
    jitter = torch.cat([torch.eye(4), -torch.eye(4)])[None]  # [1,8,4], each axis on its own
    assert lidar(corners + 0.1 * jitter) == pytest.approx(4, abs=0.01)
    wide = jitter * torch.tensor([0.1, 0.1, 0.1, 10])
    assert lidar(corners + wide) == pytest.approx(3, abs=0.02)
    line = torch.arange(8.)[:, None, None] * torch.ones(4)
    assert lidar(line + 0.1 * jitter) == pytest.approx(1, abs=0.01)
    assert lidar(torch.ones(8, 2, 4)) == pytest.approx(1, abs=1e-4)


def test_uniformity_and_alignment_are_plain_loops():
    a, b = randn(9, 4), randn(9, 4, seed=1)
    x, y = [row / row.norm() for row in a], [row / row.norm() for row in b]
    pairs = [math.exp(-2 * float((x[i] - x[j]).square().sum()))
             for i, j in itertools.permutations(range(9), 2)]
    assert uniformity(a) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-6)
    squares = [float((x[i] - y[i]).square().sum()) for i in range(9)]
    assert alignment(a, b) == pytest.approx(sum(squares) / 9, rel=1e-6)
    opposite = torch.tensor([[3., 0], [-1, 0]])  # |x_1 - x_2|^2 = 4
    assert uniformity(opposite) == pytest.approx(-8) and uniformity(opposite, t=1) == -4
    assert uniformity(torch.ones(4, 3)) == alignment(a, 2 * a) == 0
    assert alignment(opposite, -opposite) == pytest.approx(4)


@pytest.mark.parametrize("k", [2, 5, 12])
def test_silhouette_is_that_of_scikit_learn(k):
    silhouette_score = pytest.importorskip("sklearn.metrics").silhouette_score
    x = torch.cat([randn(20, 6) + 3 * randn(1, 6, seed=seed) for seed in range(1, 4)])
    unit = F.normalize(x.double(), dim=1)
    labels = (unit @ spherical_kmeans(unit, k, 3).T).argmax(dim=1)
    expected = silhouette_score(unit.numpy(), labels.numpy())
    assert silhouette(x, k, 3) == pytest.approx(expected, abs=1e-9)


def test_silhouette_by_hand():
    """Two pairs of equal features at right angles: a = 0, b = sqrt(2), so 1. A pair and a single:
    the single counts 0."""
    x = torch.tensor([[1., 0], [2, 0], [0, 1], [0, 5]])
    assert max(silhouette(x, 2, seed) for seed in range(4)) == pytest.approx(1)
    assert max(silhouette(x[:3], 2, seed) for seed in range(4)) == pytest.approx(2 / 3)
    assert silhouette(torch.ones(6, 2), 3) == 0
