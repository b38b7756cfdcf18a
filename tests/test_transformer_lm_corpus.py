"""transformer_lm's data: nothing is lost, nothing is in two parts, and what is written is what is read."""

import numpy as np
import pytest

from shared_utils.cli import UserError
from shared_utils.embedded import pydocs
from transformer_lm import corpus as data
from transformer_lm.corpus import PARTS, by_passage, by_tail, paragraphs, passages, prepare
from transformer_lm.tokens import KINDS

TEXT = pydocs()[:80_000]
OTHER = "\n\n".join(f"Paragraph {i} says {i * i}.\nIt ends." for i in range(400))


@pytest.fixture(scope="module", params=KINDS)
def corpus(request):
    return prepare({"docs": TEXT, "numbers": OTHER}, request.param, 400, np.random.default_rng(0), name="two texts")


@pytest.mark.parametrize("text", [TEXT, OTHER, "one\n\n\n\ntwo\n \n three", "no end", "ends\n\n", "\n\nbegins"])
def test_paragraphs_and_passages_are_the_text_again(text):
    assert "".join(paragraphs(text)) == text
    assert "".join(p for passage in passages(text, 500) for p in passage) == text
    assert all(len("".join(passage)) >= 500 for passage in passages(text, 500)) or len(passages(text, 500)) == 1


def test_every_passage_goes_to_one_part():
    parts = by_passage(TEXT, np.random.default_rng(0))
    assert sorted(p for part in PARTS for p in parts[part]) == sorted(paragraphs(TEXT))
    sizes = {part: sum(map(len, parts[part])) for part in PARTS}
    for part in ("val", "test"):
        assert 0.02 < sizes[part] / len(TEXT) < 0.12
        text = "".join(parts[part])
        assert any(text[:200] in "".join(passage) for passage in passages(TEXT, 4000))  # whole passages
    again, other = by_passage(TEXT, np.random.default_rng(0)), by_passage(TEXT, np.random.default_rng(1))
    assert parts == again
    assert parts != other


def test_the_tail_is_nanogpts_split():
    parts = by_tail(TEXT)
    assert "".join(parts["train"]) == TEXT[: int(0.9 * len(TEXT))]
    assert "".join(parts["val"]) == TEXT[int(0.9 * len(TEXT)) :]
    assert parts["test"] == []


def test_tokens_are_those_of_the_texts(corpus):
    shared = np.random.default_rng(0)
    splits = {title: by_passage(text, shared) for title, text in (("docs", TEXT), ("numbers", OTHER))}
    for name, part in corpus.parts.items():
        for title, split in splits.items():
            normal = corpus.tokens.normalize("".join(split[name]))
            assert corpus.tokens.decode(part.book(title)) == normal
            count = part.counts[title]
            assert count["bytes"] == len(normal.encode())
            assert count["characters"] == len(normal)
            assert count["words"] == len(normal.split())
            assert count["tokens"] == len(part.book(title))
        assert part.total("tokens") == len(part.ids) == part.ends[-1]
        assert (np.diff(part.ends) > 0).all()
        first = corpus.tokens.decode(part.ids[: part.ends[0]])
        assert first == corpus.tokens.normalize(splits["docs"][name][0])


def test_tokens_are_learned_from_the_training_part_alone():
    text = OTHER + "\n\n" + "é" * 200
    corpus = prepare({"t": text}, "char", 0, np.random.default_rng(0), tail=True)
    assert "é" not in corpus.tokens.alphabet
    assert corpus.tokens.unknown in corpus.parts["val"].ids
    assert len(corpus.parts["test"].ids) == 0


def test_written_and_read_again(corpus, tmp_path):
    data.save(corpus, tmp_path)
    again = data.load(tmp_path)
    assert again.name == "two texts"
    assert again.tokens.kind == corpus.tokens.kind
    for name, part in corpus.parts.items():
        assert np.array_equal(again.parts[name].ids, part.ids)
        assert np.array_equal(again.parts[name].ends, part.ends)
        assert again.parts[name].books == part.books
        assert again.parts[name].counts == part.counts
    assert np.load(tmp_path / "train.npy").dtype == np.uint16


def test_what_does_not_fit_gets_one_line(corpus, tmp_path):
    data.save(corpus, tmp_path)
    train = tmp_path / "train.npy"
    content = train.read_bytes()
    for damaged in (content[:-40], b"text", b""):
        train.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train\.npy"):
            data.load(tmp_path)
    np.save(train, np.full(corpus.parts["train"].total("tokens"), 60_000, np.uint16))
    with pytest.raises(UserError, match=r"does not fit meta\.json"):
        data.load(tmp_path)
    train.unlink()
    with pytest.raises(UserError, match=r"cannot read .*train\.npy"):
        data.load(tmp_path)
    with pytest.raises(UserError, match="has no passages"):
        by_passage("x", np.random.default_rng(0))
