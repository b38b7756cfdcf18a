"""What the last tokens alone say about the next: interpolated Kneser-Ney, the baseline that takes seconds.

    P_k(w | h) = max(c_k(h w) − D_k, 0) / c_k(h ·)  +  D_k N(h ·) / c_k(h ·) · P_{k−1}(w | h')

h are the k − 1 tokens before w, h' those without the first, N(h ·) how many different tokens follow h. c_k counts how
often k tokens stand in the text where k is the order; below it, how many different tokens stand before them:
"Francisco" is frequent, but follows one word. Where h never occurred, P_k = P_{k−1}; P_0 = 1 / V. With n_i the number
of k-grams whose count is i, D_k = n_1 / (n_1 + 2 n_2), or ½ where none is 1: nothing is ever impossible.

Source: Kneser and Ney 1995; Chen and Goodman 1999, section 2.7 (interpolated) and 3 (D).
Shapes: T tokens, V of the vocabulary, G different k-grams.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Order:
    """The k-grams seen. keys: sorted int64 (G,), (number of the first k − 1 tokens) · V + the last; counts: c_k, (G,).

    totals, distinct: c_k(h ·) and N(h ·), by the number of h.
    """

    keys: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    distinct: np.ndarray
    discount: float


class KneserNey:
    """Fitted to token ids int64 (T,) from 0 to vocab_size − 1. start: the token that stands before every text.

    order 1 is a unigram. Errors: `ValueError` when there is no text or the order is below 1.
    """

    def __init__(self, ids: np.ndarray, vocab_size: int, order: int = 5, start: int = 0):
        if order < 1 or len(ids) == 0:
            raise ValueError(f"needs tokens and an order of at least 1, got {len(ids)} tokens and {order}")
        self.vocab_size, self.order, self.start = vocab_size, order, start
        text = self._after_starts(ids)
        numbers = [np.zeros(len(text), np.int64)]  # [k][p]: that of the k-gram that ends at p; the empty one is 0
        keys = []
        for _ in range(order):
            found, number = np.unique(_key(numbers[-1], text, vocab_size), return_inverse=True)
            keys.append(found)
            numbers.append(number)
        self._orders: list[_Order] = []
        for k in range(1, order + 1):
            here, size = numbers[k][order:], len(keys[k - 1])  # those that end with a token of the text
            if k < order:  # one for each different (k + 1)-gram that ends with it
                _, first = np.unique(numbers[k + 1][order:], return_index=True)
                here = here[first]
            counts = np.bincount(here, minlength=size)
            before = keys[k - 1] // vocab_size  # the number of h
            contexts = 1 if k == 1 else len(keys[k - 2])
            totals = np.bincount(before, weights=counts, minlength=contexts)
            distinct = np.bincount(before, weights=counts > 0, minlength=contexts)
            once, twice = ((counts == i).sum() for i in (1, 2))
            discount = float(once / (once + 2 * twice)) if once else 0.5
            self._orders.append(_Order(keys[k - 1], counts, totals, distinct, discount))

    def losses(self, ids: np.ndarray) -> np.ndarray:
        """−ln P of each token of another text, nats: ids int64 (T,) → float64 (T,)."""
        text = self._after_starts(ids)
        number = np.zeros(len(text), np.int64)  # of the (k − 1)-gram that ends at each position, −1 where unseen
        p = np.full(len(text), 1 / self.vocab_size)
        for order in self._orders:
            h = np.concatenate([[-1], number[:-1]])
            key = _key(number, text, self.vocab_size)
            at = np.searchsorted(order.keys, key).clip(max=len(order.keys) - 1)
            number = np.where((h >= 0) & (order.keys[at] == key), at, -1)
            count = np.where(number >= 0, order.counts[number], 0)
            total = np.where(h >= 0, order.totals[h], 0)
            left = order.discount * order.distinct[h] * p  # what was taken off goes to the shorter h
            seen = total > 0
            p[seen] = ((np.maximum(count - order.discount, 0) + left) / np.maximum(total, 1))[seen]
        return -np.log(p[self.order :])

    def _after_starts(self, ids: np.ndarray) -> np.ndarray:
        return np.concatenate([np.full(self.order, self.start), ids])


def _key(number: np.ndarray, text: np.ndarray, vocab_size: int) -> np.ndarray:
    """For each position the k-gram that ends there, as (the (k − 1)-gram before its last token) · V + that token."""
    before = np.concatenate([number[:1], number[:-1]])  # the first position is a start, like what is not before it
    return before * vocab_size + text
