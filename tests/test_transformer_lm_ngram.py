"""transformer_lm's n-grams against the formula word by word."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from transformer_lm.ngram import KneserNey

V = 6


def text(seed, n=400):
    """Tokens that repeat themselves, as a language does."""
    rng = np.random.default_rng(seed)
    words = [rng.integers(1, V, rng.integers(1, 5)) for _ in range(8)]
    return np.concatenate([words[i] for i in rng.zipf(1.6, n) % 8])[:n]


def by_the_formula(train, test, order, start=0):
    """Dictionaries and loops; nothing is shared with ngram.py."""
    full = [start] * order + train.tolist()
    grams = {k: Counter(tuple(full[p - k + 1 : p + 1]) for p in range(order, len(full))) for k in range(1, order + 1)}
    counts = {order: grams[order]}
    for k in range(1, order):
        counts[k] = Counter(gram[1:] for gram in grams[k + 1])
    followers, totals = {}, {}
    for k in range(1, order + 1):
        followers[k], totals[k] = defaultdict(set), Counter()
        for gram, count in counts[k].items():
            followers[k][gram[:-1]].add(gram[-1])
            totals[k][gram[:-1]] += count
    discounts = {}
    for k in counts:
        n1, n2 = (sum(count == i for count in counts[k].values()) for i in (1, 2))
        discounts[k] = n1 / (n1 + 2 * n2) if n1 else 0.5

    def probability(h, w, k):
        if k == 0:
            return 1 / V
        h = tuple(h[len(h) - k + 1 :])
        lower = probability(h[1:], w, k - 1)
        if not totals[k][h]:
            return lower
        d = discounts[k]
        return (max(counts[k][(*h, w)] - d, 0) + d * len(followers[k][h]) * lower) / totals[k][h]

    seen = [start] * order + test.tolist()
    return [-math.log(probability(seen[p - order + 1 : p], seen[p], order)) for p in range(order, len(seen))]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_the_losses_are_the_formulas(order, seed):
    train, test = text(seed), text(seed + 100, 120)
    found = KneserNey(train, V, order).losses(test)
    assert found == pytest.approx(np.array(by_the_formula(train, test, order)), rel=1e-10)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_the_probabilities_of_all_tokens_add_up_to_one(order):
    model = KneserNey(text(0), V, order)
    for context in ([1, 2, 3, 4], [5, 5, 5, 5], [], text(0)[:30].tolist()):
        total = sum(math.exp(-model.losses(np.array([*context, w]))[-1]) for w in range(V))
        assert total == pytest.approx(1, abs=1e-9)
    never = model.losses(np.array([0]))
    assert np.isfinite(never).all()


def test_a_longer_memory_helps_where_there_is_something_to_remember():
    train, test = text(3, 3000), text(3, 3500)[3000:]
    losses = [KneserNey(train, V, order).losses(test).mean() for order in (1, 2, 3, 4)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[0] < math.log(V)


def test_a_large_vocabulary_needs_no_large_numbers():
    """Five tokens of 16,384 are 70 bits: the keys must not be made of them all."""
    rng = np.random.default_rng(0)
    train = np.concatenate([rng.integers(1, 16384, 50)] * 30)
    model = KneserNey(train, 16384, 5)
    assert model.losses(train[:200]).mean() < 0.2
    assert model.losses(rng.integers(1, 16384, 50)).mean() > 5


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(ValueError, match="needs tokens"):
        KneserNey(np.array([], np.int64), V)
    with pytest.raises(ValueError, match="order"):
        KneserNey(text(0), V, 0)
    assert KneserNey(text(0), V).losses(np.array([], np.int64)).shape == (0,)
