"""Byte-pair encoding: words become pieces, of which the most frequent pairs were merged first.

    normalised   "The Café isn't…"  →  "the cafe isn't…"       decomposed (NFD), lower case, accents stripped
    split        the | ␣cafe | ␣isn | ' | t | …                 at spaces, every punctuation mark by itself
    bytes        each piece as its UTF-8 bytes, then pairs merged in the order in which training found them

Hugging Face's `tokenizers` does all of it. The alphabet is that of the 256 bytes, so that any text can be written in it
and `[UNK]` is never needed; what is normalised away is lost, everything else comes back.

Source: Sennrich, Haddow and Birch 2016 (byte-pair encoding); Radford et al. 2019 (of bytes).
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from shared_utils.cli import UserError
from shared_utils.runs import write_text

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4
SMALLEST = 256 + len(SPECIAL)


class BPE:
    """Text ↔ token ids. `trained` makes one, `read` reads tokenizer.json."""

    kind, start = "bpe", 2  # [CLS] before a text

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # "[MASK]" in a text is six characters of it

    @classmethod
    def trained(cls, texts: Iterable[str], vocab_size: int = 2048) -> "BPE":
        """The tokens of these texts; a small text has fewer pairs to merge than asked for.

        Errors: `UserError` when the vocabulary is smaller than the bytes and the special tokens.
        """
        if vocab_size < SMALLEST:
            raise UserError(f"--vocab-size {vocab_size}: 256 bytes and {len(SPECIAL)} special tokens are {SMALLEST}")
        tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[1]))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def read(cls, text: str) -> "BPE":
        """From the content of tokenizer.json. Errors: `UserError` when it is none of ours."""
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises a bare Exception
            raise UserError(f"no tokenizer: {error}") from None
        if [tokenizer.token_to_id(name) for name in SPECIAL] != list(range(len(SPECIAL))):
            raise UserError(f"the tokenizer's first tokens are not {', '.join(SPECIAL)}")
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, which Hugging Face's library reads as well."""
        write_text(path, self._tokenizer.to_str(pretty=True))

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, the special ones included."""
        return self._tokenizer.get_vocab_size()

    def normalize(self, text: str) -> str:
        """The text as its tokens keep it: decomposed, lower case, without accents."""
        return self._tokenizer.normalizer.normalize_str(text)

    def encode(self, text: str) -> np.ndarray:
        """Token ids int64 (T,)."""
        text = text.encode("utf-8", "replace").decode()  # half a character, from a terminal say, becomes "?"
        return np.array(self._tokenizer.encode(text).ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The normalised text; bytes that make no character (a cut one) become U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def name(self, token: int) -> str:
        """One token as text, for a figure; ␣ is a space."""
        return self._tokenizer.decode([int(token)], skip_special_tokens=False).replace(" ", "␣").replace("\n", "⏎")
