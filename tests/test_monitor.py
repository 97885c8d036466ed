"""Health without labels: the numbers of known cases, and a name for every known failure."""
import math

import pytest
import torch

from evaluate import diagnose, monitor

LN_K = math.log(64)
HEALTHY = dict(dino_local_loss=2.5, dino_global_loss=0.5, teacher_entropy=1.0, prototype_use=0.5, rankme=20.0)


@pytest.mark.parametrize("change, early, words", [
    ({}, False, ""),
    (dict(rankme=1.1), True, "RankMe near 1"),
    (dict(dino_local_loss=0.8 * LN_K, dino_global_loss=0.2 * LN_K, teacher_entropy=LN_K), False, "NOT LEARNING"),
    (dict(dino_local_loss=0.8 * LN_K, dino_global_loss=0.2 * LN_K, teacher_entropy=LN_K), True, ""),
    (dict(dino_local_loss=0.8 * LN_K, dino_global_loss=0.2 * LN_K), False, ""),              # hard targets, not uniform ones
    (dict(prototype_use=1 / 64), False, "one prototype"),
])
def test_failures_are_called_by_their_name(change, early, words):
    advice = diagnose(dict(HEALTHY, **change), 64, early)
    assert words in advice and bool(words) == bool(advice)


def test_numbers_of_known_batches():
    sharp = monitor(torch.eye(8), torch.eye(8))                # every image a prototype and a dimension of its own
    assert sharp["teacher_entropy"] == pytest.approx(0, abs=1e-6) and sharp["prototype_use"] == pytest.approx(1, rel=1e-5)
    assert sharp["rankme"] == pytest.approx(8, rel=1e-3)
    uniform = monitor(torch.ones(8, 8), torch.full((8, 8), 1 / 8))
    assert uniform["teacher_entropy"] == pytest.approx(math.log(8), rel=1e-5) and uniform["rankme"] == pytest.approx(1, rel=1e-3)
    one_taken = monitor(torch.eye(8), torch.eye(8)[:1].repeat(8, 1))
    assert one_taken["prototype_use"] == pytest.approx(1 / 8, rel=1e-4)
