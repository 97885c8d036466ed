"""evaluate.py against plain loops: k-NN, features, RankMe."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

from configurator import UserError
from data import Dataset, load_dataset
from evaluate import extract_features, knn_accuracy, knn_classify, rankme
from model import build_backbone, forward_features


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_knn(train, labels, test, k, temperature):
    """The definition, one image after another."""
    predictions = []
    for query in test:
        similarity = [float(torch.dot(query, x) / (query.norm() * x.norm())) for x in train]
        nearest = sorted(range(len(train)), key=lambda i: -similarity[i])[:k]
        votes = {}
        for i in nearest:                                      # in order of distance: max() keeps the first of equals
            weight = 1 if temperature is None else math.exp(similarity[i] / temperature)
            votes[int(labels[i])] = votes.get(int(labels[i]), 0) + weight
        predictions.append(max(votes, key=votes.get))
    return predictions


# ---- k-NN ----

@pytest.mark.parametrize("n_train, n_classes", [(60, 4), (7, 3), (7, 7), (1, 1)])
@pytest.mark.parametrize("k", [1, 2, 5, 20])
@pytest.mark.parametrize("temperature", [None, 0.07, 1.0])
def test_knn_is_the_plain_loop(n_train, n_classes, k, temperature):
    train, test = randn(n_train, 6), randn(40, 6, seed=1)
    labels = torch.arange(n_train) % n_classes
    assert knn_classify(train, labels, test, k, temperature).tolist() == plain_knn(train, labels, test, k, temperature)


def test_among_equal_votes_the_nearest_class_wins():
    # angles 1..4 degrees from the query: classes 7, 2, 2, 7 have two votes each, the nearest is a 7
    angle = torch.tensor([1.0, 2.0, 3.0, 4.0]) * math.pi / 180
    train, query = torch.stack([angle.cos(), angle.sin()], dim=1), torch.tensor([[1.0, 0.0]])
    assert knn_classify(train, torch.tensor([7, 2, 2, 7]), query, k=4).tolist() == [7]
    assert knn_classify(train, torch.tensor([2, 7, 7, 2]), query, k=4).tolist() == [2]
    assert knn_classify(train, torch.tensor([7, 2, 2, 7]), query, k=3).tolist() == [2]  # a majority beats the nearest


def test_a_small_temperature_listens_to_the_nearest():
    angle = torch.tensor([5.0, 30.0, 30.0]) * math.pi / 180
    train, query = torch.stack([angle.cos(), angle.sin()], dim=1), torch.tensor([[1.0, 0.0]])
    labels = torch.tensor([1, 0, 0])
    assert knn_classify(train, labels, query, k=3, temperature=0.07).tolist() == [1]
    assert knn_classify(train, labels, query, k=3, temperature=10.0).tolist() == [0]


def test_knn_knows_length_chunks_and_gaps():
    train, test, labels = randn(50, 8), randn(33, 8, seed=1), torch.tensor([0, 5, 1000]).repeat(17)[:50]
    whole = knn_classify(train, labels, test, k=5)
    assert torch.equal(knn_classify(train, labels, test, k=5, chunk=7), whole)
    longer = train * torch.arange(1, 51)[:, None]              # cosine: length means nothing
    assert torch.equal(knn_classify(longer, labels, test * 9, k=5), whole)
    assert set(whole.tolist()) <= {0, 5, 1000} and whole.dtype == torch.int64
    assert torch.equal(knn_classify(train.bfloat16(), labels, train.bfloat16(), k=1), labels)


# ---- features ----

@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return build_backbone("dinov2_with_registers", False, 2, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                          patch_size=4, image_size=16, num_register_tokens=3).eval()


@pytest.fixture(scope="module")
def dataset():
    images = np.random.default_rng(0).integers(-1000, 1000, (11, 16, 16, 2)).astype(np.int16)
    return Dataset(images, labels=np.arange(11, dtype=np.uint8) % 3, name="made up")


PIPELINE = dict(size=16, intensity_range=(-1000.0, 1000.0), mean=(0.5, 0.25), std=(0.25, 0.5))


def by_hand(dataset):
    """The network's input, written out: to 0..1, then minus mean over std."""
    x = (torch.from_numpy(np.array(dataset.images)).permute(0, 3, 1, 2).float() + 1000) / 2000
    return (x - torch.tensor([0.5, 0.25])[:, None, None]) / torch.tensor([0.25, 0.5])[:, None, None]


@pytest.mark.parametrize("batch_size, num_workers", [(64, 0), (4, 0), (4, 2)])
def test_features_are_those_of_the_backbone_in_order(backbone, dataset, batch_size, num_workers):
    features, labels = extract_features(backbone, dataset, **PIPELINE, batch_size=batch_size, num_workers=num_workers)
    with torch.no_grad():
        expected = forward_features(backbone, by_hand(dataset))[0]
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert features.dtype == torch.float32
    assert labels.dtype == torch.int64 and labels.tolist() == [i % 3 for i in range(11)]


def test_raw_pixels_are_the_baseline(dataset):
    features, _ = extract_features(None, dataset, **PIPELINE, batch_size=3)
    torch.testing.assert_close(features, by_hand(dataset).flatten(1))


def test_labels_may_be_many_or_none(dataset):
    many = np.eye(11, 4, dtype=np.int64)
    assert torch.equal(extract_features(None, Dataset(dataset.images, many), **PIPELINE)[1], torch.from_numpy(many))
    assert extract_features(None, Dataset(dataset.images), **PIPELINE)[1] is None


def test_autocast_gives_fp32_features_close_to_those_without(backbone, dataset):
    exact = extract_features(backbone, dataset, **PIPELINE)[0]
    rough = extract_features(backbone, dataset, **PIPELINE, autocast=lambda: torch.autocast("cpu", torch.bfloat16))[0]
    assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().max() < 0.1


def test_an_unreadable_image_is_named_or_left_out(tmp_path):
    for i in range(4):
        (tmp_path / "test" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 50 * i, np.uint8)).save(tmp_path / "test" / "ab"[i % 2] / f"{i}.png")
    (tmp_path / "test" / "a" / "2.png").write_bytes(b"no png")
    dataset = load_dataset(str(tmp_path), "test", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"2\.png: cannot be read as an image.*on_bad_image=skip"):
        extract_features(None, dataset, size=8)
    plain = dict(size=8, mean=(0.0,), std=(1.0,), batch_size=1)
    features, labels = extract_features(None, dataset, **plain, on_bad_image="skip")
    assert (features[:, 0] * 255).round().tolist() == [0, 50, 150] and labels.tolist() == [0, 1, 1]


def test_knn_accuracy_is_the_share_of_right_answers():
    images = np.zeros((8, 4, 4), np.uint8)
    images[::2, :2], images[1::2, 2:] = 200, 200               # upper or lower half bright
    bank = Dataset(images, np.arange(8) % 2)
    right, wrong = Dataset(images[:4], np.array([0, 1, 0, 1])), Dataset(images[:4], np.array([0, 1, 1, 1]))
    settings = dict(k=3, size=4, mean=(0.5,), std=(0.5,))
    assert knn_accuracy(None, bank, dict(val=right, test=wrong), **settings) == dict(val=1.0, test=0.75)
    assert knn_accuracy(None, bank, {}, **settings) == {}


# ---- RankMe ----

def test_rankme_of_known_matrices():
    assert rankme(torch.outer(randn(50), randn(8, seed=1))) == pytest.approx(1, abs=1e-3)
    for n in (3, 8):
        orthonormal = torch.linalg.qr(randn(20, n)).Q          # n equal singular values
        assert rankme(orthonormal) == pytest.approx(n, rel=1e-4)
        assert rankme(7 * orthonormal.T) == pytest.approx(n, rel=1e-4)
    # singular values 3 and 1: p = 3/4, 1/4
    two = torch.diag(torch.tensor([3.0, 1.0]))
    assert rankme(two) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))), rel=1e-4)
    assert rankme(two.bfloat16()) == pytest.approx(rankme(two), rel=1e-4)
