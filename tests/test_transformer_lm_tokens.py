"""transformer_lm's tokens: what goes in comes out, whatever it is."""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from shared_utils.cli import UserError
from shared_utils.embedded import pydocs
from transformer_lm.bpe import BPE, SPECIAL
from transformer_lm.tokens import KINDS, Bytes, Characters, load_tokens, make_tokens

TEXT = pydocs()[:60_000]
ODD = [
    "",
    " ",
    "\n\n  \t x",
    "[MASK] and [PAD], [UNK]",
    "naïve Café, İstanbul — ﬁ ß Ωmega…",
    "한국어 日本語 👩‍👩‍👧 é e\u0301 \u0000 \u200b",
    "don't 'quote' (a-b) #1,000.50 $x_y~z^2",
]


@pytest.fixture(scope="module")
def bpe():
    return BPE.trained([TEXT], 600)


def random_text(seed, n=60):
    rng = random.Random(seed)
    planes = [(32, 126), (160, 0x2FF), (0x300, 0x36F), (0x400, 0x4FF), (0x3000, 0x30FF), (0xAC00, 0xD7A3)]
    planes.append((0x1F300, 0x1FAFF))
    return "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(n))


@pytest.mark.parametrize("text", [*ODD, *(random_text(seed) for seed in range(30))])
def test_byte_pairs_give_the_normalised_text_back(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == bpe.normalize(text)
    assert 1 not in ids  # [UNK] is never needed
    assert not set(ids) & set(range(len(SPECIAL)))  # and nothing in a text is a special token
    assert bpe.normalize(bpe.normalize(text)) == bpe.normalize(text)


def test_what_is_normalised(bpe):
    assert bpe.normalize("The CAFÉ, Ünder") == "the cafe, under"
    assert bpe.decode(bpe.encode("Sherlock  Holmes's hat.\n")) == "sherlock  holmes's hat.\n"


def test_a_trained_vocabulary_has_the_size_and_the_special_tokens_asked_for(bpe):
    assert bpe.vocab_size == 600
    assert [bpe.decode([i]) for i in range(5)] == list(SPECIAL)
    assert SPECIAL[0] == "[PAD]"
    assert len(bpe.encode(TEXT)) < 0.6 * len(TEXT.encode())
    assert len(BPE.trained([TEXT], 1200).encode(TEXT)) < 0.9 * len(bpe.encode(TEXT))
    names = {bpe.name(i) for i in range(600)}
    assert "the" in names
    assert "␣the" in names


def test_punctuation_stands_alone(bpe):
    for mark in ".,;:!?'\"()-":
        pieces = [bpe.decode([i]) for i in bpe.encode(f"and{mark}{mark} the")]
        assert pieces.count(mark) == 2, pieces


def test_a_vocabulary_below_the_alphabet_is_refused():
    with pytest.raises(UserError, match="--vocab-size 260: 256 bytes and 5 special tokens are 261"):
        BPE.trained(["x"], 260)
    assert BPE.trained(["aaaa aaaa"], 300).vocab_size < 300  # a short text has no more pairs


@pytest.mark.parametrize("seed", range(20))
def test_bytes_give_any_bytes_back(seed):
    content = np.random.default_rng(seed).integers(0, 256, 200, dtype=np.uint8).tobytes()
    tokens, text = Bytes(), content.decode("utf-8", "surrogateescape")
    ids = tokens.encode(text)
    assert tokens.decode(ids).encode("utf-8", "surrogateescape") == content
    assert (ids - 1).tolist() == list(content)
    assert ids.max() < tokens.vocab_size


@pytest.mark.parametrize("text", ODD)
def test_characters_give_their_own_text_back_and_say_what_they_do_not_know(text):
    tokens = Characters(set(text))
    assert tokens.decode(tokens.encode(text)) == text == tokens.normalize(text)
    few = Characters({"a", "b", " "})
    assert few.decode(few.encode("a cab")) == few.normalize("a cab") == "a \ufffdab"
    assert few.encode("ab ").tolist() == [3, 4, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_no_text_but_in_byte_pairs_which_show_it(kind):
    tokens = make_tokens(kind, [TEXT], 400)
    assert tokens.kind == kind
    assert tokens.encode("the").dtype == np.int64
    ids = [*tokens.encode("the cat"), 0]
    assert tokens.decode(ids) == ("the cat[PAD]" if kind == "bpe" else "the cat")
    assert tokens.encode("").shape == (0,)
    assert all(isinstance(tokens.name(i), str) and "\n" not in tokens.name(i) for i in range(tokens.vocab_size))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_read_again(kind, tmp_path):
    path, text = tmp_path / "tokenizer.json", TEXT[5_000:6_000]
    tokens = make_tokens(kind, [TEXT], 500)
    tokens.save(path)
    again = load_tokens(path)
    assert again.kind == kind
    assert again.vocab_size == tokens.vocab_size
    assert np.array_equal(again.encode(text), tokens.encode(text))
    assert again.decode(again.encode("[MASK]")) == tokens.normalize("[MASK]")
    if kind == "bpe":
        assert Tokenizer.from_file(str(path)).get_vocab_size() == 500


@pytest.mark.parametrize(
    "content", ["", "text", "[]", "{}", '{"kind": "char"}', '{"model": 3}', json.dumps({"kind": 7}), "\xff"]
)
def test_a_file_that_is_no_tokenizer_gets_one_line(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="is damaged or no tokenizer of ours") as stop:
        load_tokens(path)
    assert "\n" not in str(stop.value)
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokens(tmp_path / "none.json")


def test_another_librarys_tokenizer_is_refused(tmp_path, bpe):
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = []
    content["model"]["vocab"] = {name: i for i, name in enumerate(reversed(content["model"]["vocab"]))}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="first tokens are not"):
        load_tokens(path)
