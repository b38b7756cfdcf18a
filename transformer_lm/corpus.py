"""Books as token ids: cut into passages, which are shared out among training, validation and test.

    corpus = prepare({"book": text}, "bpe", 2048, np.random.default_rng(0))
    corpus.parts["train"].ids                                   # int64 (T,), one paragraph after the other
    save(corpus, folder); corpus = load(folder)

A passage is some paragraphs in a row, of `PASSAGE` characters or more. Whole passages go to one part: with single
paragraphs the test would contain the other half of a conversation that training has seen. Tokens are learned from the
training passages alone.
Shapes: T tokens, P paragraphs.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared_utils.cli import UserError
from shared_utils.runs import read_json, replacing, write_json
from transformer_lm.tokens import Tokens, load_tokens, make_tokens

PARTS = ("train", "val", "test")
PASSAGE = 4000  # characters
HELD_OUT = 0.05  # of each book's passages, for validation, and as many for the test


@dataclass(frozen=True)
class Part:
    """A part's token ids (T,), and where each paragraph ends, (P,).

    books: title → its first paragraph and the one after its last. counts: title → bytes, characters, words, tokens of
    the normalised text; words are separated by white space.
    """

    ids: np.ndarray
    ends: np.ndarray
    books: dict[str, tuple[int, int]]
    counts: dict[str, dict[str, int]]

    def book(self, title: str) -> np.ndarray:
        """One book's token ids."""
        first, last = self.books[title]
        return self.ids[self.ends[first - 1] if first else 0 : self.ends[last - 1] if last else 0]

    def total(self, what: str) -> int:
        """`bytes`, `characters`, `words` or `tokens` of all books."""
        return sum(count[what] for count in self.counts.values())


@dataclass(frozen=True)
class Corpus:
    """The parts, the tokens they are written in, and the name of the data set."""

    parts: dict[str, Part]
    tokens: Tokens
    name: str

    @property
    def fingerprint(self) -> str:
        """Of the training text as it is cut into tokens: a model knows by it what it was trained on."""
        return hashlib.sha256(self.parts["train"].ids.tobytes()).hexdigest()[:16]


def paragraphs(text: str) -> list[str]:
    """The text cut after its blank lines; joined they are the text again."""
    return re.findall(r".+?(?:\n\s*\n|\Z)", text, re.DOTALL)


def passages(text: str, size: int = PASSAGE) -> list[list[str]]:
    """Paragraphs in a row, of `size` characters together or more (unless the text has fewer)."""
    found: list[list[str]] = [[]]
    for paragraph in paragraphs(text):
        if sum(map(len, found[-1])) >= size:
            found.append([])
        found[-1].append(paragraph)
    if len(found) > 1 and sum(map(len, found[-1])) < size:
        found[-2:] = [found[-2] + found[-1]]
    return [passage for passage in found if passage]


def by_passage(text: str, rng: np.random.Generator) -> dict[str, list[str]]:
    """The paragraphs of each part, in the book's order; which passage goes where is drawn.

    Errors: `UserError` when the text is too short to have a passage for each part.
    """
    pieces = passages(text, min(PASSAGE, max(1, len(text) // 20)))
    if len(pieces) < len(PARTS):
        raise UserError(f"a text of {len(text)} characters has no passages to share out: give a longer one")
    order = rng.permutation(len(pieces))
    n = max(1, round(HELD_OUT * len(pieces)))
    chosen = {"val": order[:n], "test": order[n : 2 * n], "train": order[2 * n :]}
    return {part: [p for i in sorted(chosen[part]) for p in pieces[i]] for part in PARTS}


def by_tail(text: str) -> dict[str, list[str]]:
    """The first nine tenths of the characters for training, the rest for validation, none for a test.

    It is the split of nanoGPT's `shakespeare_char`.
    """
    cut = int(0.9 * len(text))
    return {"train": paragraphs(text[:cut]), "val": paragraphs(text[cut:]), "test": []}


def prepare(
    texts: Mapping[str, str],
    kind: str,
    vocab_size: int,
    rng: np.random.Generator,
    *,
    tail: bool = False,
    name: str = "",
) -> Corpus:
    """Title → text, shared out and written in tokens of a kind. tail: `by_tail` in place of `by_passage`.

    Errors: `UserError` as `by_passage`, `make_tokens`.
    """
    shared = {title: by_tail(text) if tail else by_passage(text, rng) for title, text in texts.items()}
    tokens = make_tokens(kind, ["".join(parts["train"]) for parts in shared.values()], vocab_size)
    parts = {}
    for part in PARTS:
        encoded, books, counts = [], {}, {}
        for title, split in shared.items():
            first = len(encoded)
            encoded += [tokens.encode(paragraph) for paragraph in split[part]]
            normal = tokens.normalize("".join(split[part]))
            books[title] = (first, len(encoded))
            counts[title] = {"bytes": len(normal.encode("utf-8", "surrogateescape")), "characters": len(normal)}
            counts[title] |= {"words": len(normal.split()), "tokens": sum(map(len, encoded[first:]))}
        ids = np.concatenate([np.empty(0, np.int64), *encoded])
        ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)
        parts[part] = Part(ids, ends, books, counts)
    return Corpus(parts, tokens, name)


def save(corpus: Corpus, folder: Path) -> None:
    """Write train.npy, val.npy, test.npy (ids), those with _ends.npy, tokenizer.json and meta.json."""
    for name, part in corpus.parts.items():
        for path, array in ((f"{name}.npy", part.ids.astype(np.uint16)), (f"{name}_ends.npy", part.ends)):
            with replacing(folder / path) as beside, beside.open("wb") as file:
                np.save(file, array, allow_pickle=False)
    corpus.tokens.save(folder / "tokenizer.json")
    about = {name: {"books": part.books, "counts": part.counts} for name, part in corpus.parts.items()}
    write_json(folder / "meta.json", {"name": corpus.name, "kind": corpus.tokens.kind, "parts": about})


def load(folder: Path) -> Corpus:
    """What `save` wrote. Errors: `UserError` when a file is missing, damaged, or does not fit the others."""
    meta, tokens, parts = read_json(folder / "meta.json"), load_tokens(folder / "tokenizer.json"), {}
    for name in PARTS:
        ids, ends = (_array(folder / path) for path in (f"{name}.npy", f"{name}_ends.npy"))
        try:
            about = meta["parts"][name]
            books = {title: tuple(span) for title, span in about["books"].items()}
            parts[name] = Part(ids, ends, books, about["counts"])
            fits = len(ids) == parts[name].total("tokens") == ends.max(initial=0)
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{folder / 'meta.json'} is not what prepare_data.py writes") from None
        if not fits or ids.max(initial=0) >= tokens.vocab_size:
            raise UserError(f"{folder / name}.npy does not fit meta.json and tokenizer.json: prepare the data again")
    return Corpus(parts, tokens, meta["name"])


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False).astype(np.int64)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
