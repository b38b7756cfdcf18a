"""Three ways to cut a text into tokens: byte pairs (bpe.py), bytes, characters.

    tokens = make_tokens("byte", ["some text"])
    ids = tokens.encode("Größe")                      # int64 (T,)
    tokens.decode(ids)                                # "Größe"

All of them have `kind`, `vocab_size`, `start` (what stands before a text), `normalize`, `encode`, `decode`, `name`,
`save`; 0 is padding. Bytes lose nothing. Bits per byte compare models of the same text; byte pairs' text is in lower
case and without accents, which makes it easier; `--vocab-size 261` gives that text's bytes.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from shared_utils.cli import UserError
from shared_utils.runs import write_text
from transformer_lm.bpe import BPE

KINDS = ("bpe", "byte", "char")


class Bytes:
    """A token is a byte of the text's UTF-8, and 0 is padding: byte b has the id b + 1."""

    kind, vocab_size, start = "byte", 257, 0

    def normalize(self, text: str) -> str:
        """The text itself: nothing is lost."""
        return text

    def encode(self, text: str) -> np.ndarray:
        """Token ids int64 (T,). Bytes that are no UTF-8 may stand in the text as Python's surrogate escapes."""
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8).astype(np.int64) + 1

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are no UTF-8 become surrogate escapes, padding nothing."""
        return bytes(int(i) - 1 for i in ids if i).decode("utf-8", "surrogateescape")

    def name(self, token: int) -> str:
        """One token as text, for a figure."""
        return "[PAD]" if not token else ascii(chr(token - 1))[1:-1].replace(" ", "␣")

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json."""
        write_text(path, json.dumps({"kind": self.kind}))


class Characters:
    """A token is a character of the training text: 0 is padding, 1 any other character."""

    kind, start, unknown = "char", 0, 1

    def __init__(self, alphabet: Sequence[str]):
        self.alphabet = sorted(alphabet)
        self._id = {character: 2 + i for i, character in enumerate(self.alphabet)}

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, the special ones included."""
        return 2 + len(self.alphabet)

    def normalize(self, text: str) -> str:
        """The text with U+FFFD for what is not in the alphabet."""
        return "".join(character if character in self._id else "\ufffd" for character in text)

    def encode(self, text: str) -> np.ndarray:
        """Token ids int64 (T,)."""
        return np.array([self._id.get(character, self.unknown) for character in text], dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text; padding is nothing."""
        return "".join("\ufffd" if i == self.unknown else self.alphabet[int(i) - 2] for i in ids if i)

    def name(self, token: int) -> str:
        """One token as text, for a figure."""
        return ("[PAD]", "[UNK]")[token] if token < 2 else self.alphabet[token - 2].replace(" ", "␣").replace("\n", "⏎")

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json."""
        write_text(path, json.dumps({"kind": self.kind, "alphabet": "".join(self.alphabet)}))


Tokens = BPE | Bytes | Characters


def make_tokens(kind: str, texts: Sequence[str], vocab_size: int = 2048) -> Tokens:
    """The tokens of a kind for these training texts; vocab_size: of byte pairs. Errors: as `BPE.trained`."""
    if kind == "bpe":
        return BPE.trained(texts, vocab_size)
    return Bytes() if kind == "byte" else Characters(set().union(*texts))


def load_tokens(path: str | Path) -> Tokens:
    """What `save` wrote. Errors: `UserError` when the file is missing, damaged, or of something else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text)
        if "model" in content:
            return BPE.read(text)
        return Bytes() if content["kind"] == "byte" else Characters(content["alphabet"])
    except FileNotFoundError:
        raise UserError(f"no tokenizer at {path}") from None
    except (ValueError, KeyError, TypeError) as error:  # a UserError is a ValueError
        raise UserError(f"{path} is damaged or no tokenizer of ours ({error})") from None
