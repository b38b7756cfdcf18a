"""What a text costs without a network: compressors; and how much of a text is words, how much is copied.

bz2 sees no further back than its block of 900,000 bytes, so little of a long training text; xz sees 64 MiB.
Shapes: W words.
"""

import bz2
import lzma
import re
from collections.abc import Callable, Sequence

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "bz2": lambda text: bz2.compress(text, 9),
    "xz -9": lambda text: lzma.compress(text, preset=9),
}


def compressed_bits_per_byte(known: bytes, text: bytes, compress: Callable[[bytes], bytes]) -> float:
    """What `text` adds to the compressed size of `known`, in bits for each of its bytes."""
    return 8 * (len(compress(known + text)) - len(compress(known))) / len(text)


def words_of(text: str) -> list[str]:
    """The words of a text, without punctuation, in lower case; an apostrophe may stand inside."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def longest_copy(text: Sequence[str], known: Sequence[str]) -> list[str]:
    """The longest run of words of `text` (W,) that stands in `known` as well; empty when they share none.

    Where a run is copied, all its prefixes are, so that the length is found by bisection.
    """
    shortest, longest, found = 0, min(len(text), len(known)), []
    while shortest < longest:
        n = (shortest + longest + 1) // 2
        runs = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
        copied = next((run for i in range(len(known) - n + 1) if (run := tuple(known[i : i + n])) in runs), None)
        if copied is None:
            longest = n - 1
        else:
            shortest, found = n, list(copied)
    return found


def share_known(text: Sequence[str], known: Sequence[str]) -> float:
    """The part of the words of `text` that occur in `known`; 0 for no words."""
    vocabulary = set(known)
    return sum(word in vocabulary for word in text) / max(1, len(text))
