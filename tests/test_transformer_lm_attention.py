"""transformer_lm's look at the heads: what is counted, and who is near whom."""

import numpy as np
import pytest
import torch

from shared_utils import checkpoint
from shared_utils.runs import read_json
from transformer_lm import analyze_attention
from transformer_lm.analyze_attention import draw_attention, draw_positions, looks, neighbours
from transformer_lm.model import TransformerLM, sinusoidal_positions
from transformer_lm.tokens import Characters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokens = Characters("abcdefgh ")
    model = TransformerLM(tokens.vocab_size, 16, 3, 4, 2, 24, 16)
    config = {**model.config, "tokens": "char", "data": "letters"}
    checkpoint.save(folder / "best.pth", config=config, model=model.state_dict(), name="letters")
    tokens.save(folder / "tokenizer.json")
    return folder


def test_what_a_head_looks_at():
    ids = np.array([0, 5, 6, 5, 7])
    weights = np.zeros((5, 5))
    weights[0, 0] = 1
    weights[1] = [0.2, 0.8, 0, 0, 0]
    weights[2] = [0.1, 0.6, 0.3, 0, 0]
    weights[3] = [0.3, 0.4, 0.2, 0.1, 0]
    weights[4] = [0.5, 0, 0, 0.25, 0.25]
    found = looks(weights, ids)
    assert found["itself"] == pytest.approx(np.mean([0.8, 0.3, 0.1, 0.25]))
    assert found["before"] == pytest.approx(np.mean([0.2, 0.6, 0.2, 0.25]))
    assert found["start"] == pytest.approx(np.mean([0.2, 0.1, 0.3, 0.5]))
    assert found["same"] == pytest.approx(0.4)  # the second 5 looks at the first
    assert looks(weights, np.arange(5))["same"] == 0


def test_neighbours_are_those_of_the_smallest_angle():
    tokens, model = Characters("abcdefgh "), TransformerLM(11, 2, 1, 2, 1, 4, 8)
    angles = torch.tensor([3.0, 2.5, 2.0, 0.0, 0.4, 0.1, -0.2, 1.0, 1.5, -1.0, -2.0])
    with torch.no_grad():
        model.embedding.weight.copy_(torch.stack([angles.cos(), angles.sin()], 1) * torch.rand(11, 1).add(0.5))
    found = neighbours(model, tokens, "a", 3)  # the characters follow [PAD], [UNK] and the space
    assert [name for name, _ in found] == ["c", "d", "b"]
    assert [cosine for _, cosine in found] == pytest.approx(np.cos([0.1, 0.2, 0.4]), abs=1e-5)


def test_the_script_writes_what_it_says(folder, tmp_path):
    flags = ["--ckpt", folder / "best.pth", "--device", "cpu", "--out", tmp_path, "--text", "abba cab"]
    metrics = analyze_attention.main([str(flag) for flag in [*flags, "--neighbours", "a", "zz", "--count", 99]])
    assert metrics["tokens"] == 9
    assert [(row["layer"], row["head"]) for row in metrics["heads"]] == [(i, j) for i in (1, 2) for j in (1, 2, 3)]
    assert all(0 <= row[what] <= 1 for row in metrics["heads"] for what in ("itself", "before", "start", "same"))
    assert "'zz': not a single token" in (tmp_path / "neighbours.txt").read_text(encoding="utf-8")
    for most, what in (("one_before", "before"), ("start", "start"), ("same", "same")):
        assert metrics[f"most_at_the_{most}"] == max(row[what] for row in metrics["heads"])
    assert [row["token"] for row in metrics["neighbours"]] == ["a"]
    written = (tmp_path / "neighbours.txt").read_text(encoding="utf-8").splitlines()[0]
    (near,) = metrics["neighbours"]
    assert written.startswith(f"'a': {near['nearest']} {near['cosine']:.2f}, ")  # the nearest comes first
    assert read_json(tmp_path / "metrics.json")["text"] == "abba cab"


def test_each_map_stands_under_the_name_of_its_head():
    maps = np.random.default_rng(0).random((2, 3, 4, 4))  # two layers of three heads
    heads = [
        {
            "layer": layer + 1,
            "head": head + 1,
            "before": 0.1 * (3 * layer + head),
            "start": 0.9 - 0.1 * head,
            "same": at,
        }
        for (layer, head), at in zip(np.ndindex(2, 3), (0.0, 0.2, 0.7, 0.3, 0.1, 0.0), strict=True)
    ]
    figure = draw_attention(maps, heads, list("abcd"), "letters")
    named = {ax.get_title(): ax.images[0].get_array() for ax in figure.axes if ax.get_title()}
    for row in heads:
        found = named[f"layer {row['layer']}, head {row['head']}: {row['before']:.0%} at the one before"]
        assert np.array_equal(found, maps[row["layer"] - 1, row["head"] - 1])
    said = "at the one before L2H3 (50%), at the start L1H1 (90%), at the same token earlier L1H3 (70%)"
    assert figure.get_suptitle().endswith(said)


def test_positions_are_as_alike_as_the_mean_cosine_of_their_pairs():
    model = TransformerLM(11, 16, 1, 4, 1, 8, 8)
    p = sinusoidal_positions(8, 16).numpy()
    alike = p[0] @ p[1] / np.sqrt((p[0] @ p[0]) * (p[1] @ p[1]))
    assert draw_positions(model).get_suptitle().endswith(f"neighbours {alike:.2f} of 1")


@pytest.mark.parametrize("text", ["", "a", "abc " * 4])
def test_a_text_without_room_gets_one_line(text, folder, tmp_path, fails):
    flags = ["--ckpt", folder / "best.pth", "--device", "cpu", "--out", tmp_path / "out", "--text", text]
    assert "the figure needs 2 to 15" in fails(analyze_attention, flags, tmp_path / "out")
