"""What the last tokens alone say about the next: interpolated Kneser-Ney, the baseline that takes seconds.

    P_k(w | h) = max(c_k(h w) − D_k, 0) / c_k(h ·)  +  D_k N(h ·) / c_k(h ·) · P_{k−1}(w | h')

h are the k − 1 tokens before w, h' those without the first, N(h ·) how many different tokens follow h. c_k counts how
often k tokens occur in the text where k is the order; below it, how many different tokens precede them:
"Francisco" is frequent, but follows one word. Where h never occurred, P_k = P_{k−1}; P_0 = 1 / V. With n_i the number
of k-grams whose count is i, D_k = n_1 / (n_1 + 2 n_2), or ½ where n_1 is 0: nothing is ever impossible.

How it is computed: k-grams are numbered, so that one is a pair (number of its first k − 1 tokens, last token), which is
a single whole number. In "a b a c" with ^ for the start and order 2 the 2-grams are ^a, ab, ac, ba, each with c_2 = 1;
c_1(a) = 2, for ^a and ba, c_1(b) = c_1(c) = 1; N(a ·) = 2, for ab and ac.

Source: Kneser and Ney 1995; Chen and Goodman 1999, section 2.7 (interpolated) and 3 (D).
Shapes: T tokens, V of the vocabulary, G different k-grams.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Order:
    """The k-grams seen; a k-gram's number is its place in `keys`.

    keys: sorted int64 (G,), (number of the first k − 1 tokens) · V + the last. counts: c_k, (G,). totals, distinct:
    c_k(h ·) and N(h ·), by the number of h.
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
        # keys[k]: of all k-grams; gram[k]: the number of the k-gram that ends at each position. The empty one is 0.
        keys, gram = [np.zeros(1, np.int64)], [np.zeros(len(text), np.int64)]
        for k in range(order):
            found, number = np.unique(_key(gram[k], text, vocab_size), return_inverse=True)
            keys.append(found)
            gram.append(number)
        self._orders: list[_Order] = []
        for k in range(1, order + 1):
            counted = gram[k][order:]  # those that end with a token of the text
            if k < order:  # one for each different (k + 1)-gram that ends with it
                _, first = np.unique(gram[k + 1][order:], return_index=True)
                counted = counted[first]
            counts = np.bincount(counted, minlength=len(keys[k]))
            context = keys[k] // vocab_size  # the number of each k-gram's h
            totals = np.bincount(context, weights=counts, minlength=len(keys[k - 1]))
            distinct = np.bincount(context, weights=counts > 0, minlength=len(keys[k - 1]))
            once, twice = ((counts == i).sum() for i in (1, 2))
            discount = float(once / (once + 2 * twice)) if once else 0.5
            self._orders.append(_Order(keys[k], counts, totals, distinct, discount))

    def losses(self, ids: np.ndarray) -> np.ndarray:
        """−ln P of each token of another text, nats: ids int64 (T,) → float64 (T,)."""
        text = self._after_starts(ids)
        gram = np.zeros(len(text), np.int64)  # the number of the (k − 1)-gram that ends at each position, −1: unseen
        p = np.full(len(text), 1 / self.vocab_size)  # P_{k−1}
        for order in self._orders:
            h = np.concatenate([[-1], gram[:-1]])  # of the k − 1 tokens before each position
            key = _key(gram, text, self.vocab_size)
            at = np.searchsorted(order.keys, key).clip(max=len(order.keys) - 1)
            gram = np.where((h >= 0) & (order.keys[at] == key), at, -1)
            count = np.where(gram >= 0, order.counts[gram], 0)  # (an index of −1 is read, and dropped here)
            total = np.where(h >= 0, order.totals[h], 0)
            left = order.discount * order.distinct[h] * p  # what was taken off goes to the shorter h
            seen = total > 0
            p[seen] = ((np.maximum(count - order.discount, 0) + left) / np.maximum(total, 1))[seen]
        return -np.log(p[self.order :])

    def _after_starts(self, ids: np.ndarray) -> np.ndarray:
        return np.concatenate([np.full(self.order, self.start), ids])


def _key(gram: np.ndarray, text: np.ndarray, vocab_size: int) -> np.ndarray:
    """For each position the k-gram that ends there: the number of its first k − 1 tokens · V + the last; (T,) each.

    gram: the number of the (k − 1)-gram that ends at each position.
    """
    context = np.concatenate([gram[:1], gram[:-1]])  # the first position is a start, like what is not before it
    return context * vocab_size + text
