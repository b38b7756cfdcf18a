"""transformer_lm's batches: every position is where it belongs, padding is nowhere."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from transformer_lm.batches import IGNORED, Text, losses_of_text, sliding_losses, total_loss, windows
from transformer_lm.corpus import Part
from transformer_lm.model import TransformerLM

CPU, START, LENGTH = torch.device("cpu"), 0, 8


@pytest.fixture(scope="module")
def part():
    """Five paragraphs of 3, 8, 20, 1 and 9 tokens; a token is 1 + its position."""
    ends = np.cumsum([3, 8, 20, 1, 9])
    return Part(np.arange(1, 42), ends, {}, {})


@pytest.fixture(scope="module")
def text(part):
    return Text(part, LENGTH, START, CPU)


def test_paragraphs_are_cut_to_the_length_and_never_joined(text):
    assert text.pieces.tolist() == [[0, 3], [3, 11], [11, 19], [19, 27], [27, 31], [31, 32], [32, 40], [40, 41]]
    assert text.begins.tolist() == [True, True, True, False, False, True, True, False]


def test_padded_batches_are_paragraphs(text, part):
    seen = set()
    for seed in range(30):
        batch = text.padded(text.drawn(5, np.random.default_rng(seed), pack=False))
        assert batch.tokens.shape == batch.targets.shape == batch.padding.shape
        assert (~batch.padding).any(0).all()  # no longer than the longest
        assert torch.equal(batch.padding, batch.targets == IGNORED)
        for tokens, targets, padding in zip(batch.tokens, batch.targets, batch.padding, strict=True):
            real = targets[~padding].tolist()
            first = real[0] - 1  # its position
            assert [first, first + len(real)] in text.pieces.tolist()
            assert real == list(range(first + 1, first + 1 + len(real)))
            begins = first == 0 or first in part.ends
            assert tokens[~padding].tolist() == [START if begins else first, *real[:-1]]
            assert not tokens[padding].any()
            seen.add(first)
        assert batch.count == (~batch.padding).sum()
    assert seen == {piece[0] for piece in text.pieces.tolist()}


def test_packed_batches_are_windows_from_anywhere(text):
    seen = set()
    for seed in range(40):
        batch = text.packed(text.drawn(6, np.random.default_rng(seed), pack=True))
        assert batch.padding is None
        assert batch.tokens.shape == (6, LENGTH)
        assert batch.count == 6 * LENGTH
        assert torch.equal(batch.tokens, batch.targets - 1)  # what stands before 1 is the start, 0
        assert torch.equal(batch.targets, batch.targets[:, :1] + torch.arange(LENGTH))
        seen |= set(batch.targets[:, 0].tolist())
    assert seen == set(range(1, 41 - LENGTH + 2))


@pytest.mark.parametrize("together", [1, 2, 99])
@pytest.mark.parametrize("length", [1, 8, 41, 50])
def test_windows_ask_for_every_token_once(part, length, together):
    batches = list(windows(torch.from_numpy(part.ids), length, START, together))
    assert torch.cat([batch.targets.flatten() for batch in batches]).tolist() == list(range(1, 42))
    assert all(torch.equal(batch.tokens, batch.targets - 1) for batch in batches)
    assert all(batch.tokens.shape[0] <= together for batch in batches)
    assert all(batch.tokens.shape[1] == length for batch in batches[:-1])


def small():
    torch.manual_seed(0)
    model = TransformerLM(42, 8, 2, 4, 2, 12, LENGTH, dropout=0.3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_the_loss_is_that_of_what_is_real(text):
    model = small().eval()
    batch = text.padded(text.drawn(5, np.random.default_rng(3), pack=False))
    each = []
    for tokens, targets, padding in zip(batch.tokens, batch.targets, batch.padding, strict=True):
        logits = model(tokens[~padding][None])[0]
        each.append(F.cross_entropy(logits, targets[~padding], reduction="none"))
    assert total_loss(model, batch).item() == pytest.approx(torch.cat(each).sum().item(), rel=1e-5)
    assert batch.count == len(torch.cat(each))


def test_the_losses_of_a_text_are_those_of_its_windows(part):
    model = small().train()
    found = losses_of_text(model, torch.from_numpy(part.ids), START, together=2)
    assert model.training
    model.eval()
    for first in range(0, 41, LENGTH):
        targets = torch.arange(first + 1, min(first + LENGTH, 41) + 1)
        wanted = F.cross_entropy(model((targets - 1)[None])[0], targets, reduction="none")
        assert torch.allclose(found[first : first + LENGTH], wanted, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 3, LENGTH - 1, LENGTH])
def test_sliding_windows_see_as_much_as_they_can_and_count_every_token_once(part, stride):
    model, ids = small(), torch.from_numpy(part.ids)
    found = sliding_losses(model.train(), ids, START, stride, together=3)
    assert model.training
    model.eval()
    before = torch.cat([ids.new_tensor([START]), ids[:-1]])
    for i in range(41):
        # the first window ends at LENGTH, each further one `stride` later, the last with the text
        end = LENGTH if i < LENGTH else min(41, LENGTH + -(-(i + 1 - LENGTH) // stride) * stride)
        logits = model(before[None, end - LENGTH : end])[0, i - (end - LENGTH)]
        assert found[i].item() == pytest.approx(F.cross_entropy(logits, ids[i]).item(), abs=1e-5)
    if stride == LENGTH:
        assert torch.allclose(found[:40], losses_of_text(model, ids, START)[:40], atol=1e-5)


def test_a_text_within_one_window_slides_nowhere_and_a_leap_is_refused(part):
    model, ids = small(), torch.from_numpy(part.ids)
    assert torch.allclose(sliding_losses(model, ids[:5], START, 3), losses_of_text(model, ids[:5], START), atol=1e-6)
    with pytest.raises(ValueError, match="cannot move on by 9"):
        sliding_losses(model, ids, START, LENGTH + 1)


def test_a_text_shorter_than_a_window_is_refused(part):
    with pytest.raises(ValueError, match="41 tokens, fewer than the 42"):
        Text(part, 42, START, CPU)
