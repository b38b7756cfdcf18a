"""cnn_cifar's networks for MNIST: the ViT against PyTorch's own layers, and the zoo."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from cnn_cifar import vit, zoo
from cnn_cifar.inputs import resized
from cnn_cifar.vit import Attention, Block, ViT, position_similarity, rollout
from shared_utils.cli import UserError
from shared_utils.dropout import Dropout

# --- the ViT ------------------------------------------------------------------------------------------------------


def test_attention_is_pytorchs():
    torch.manual_seed(0)
    ours, theirs = Attention(24, 3).double(), nn.MultiheadAttention(24, 3, batch_first=True).double()
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    expected, weights = theirs(x, x, x, average_attn_weights=False)
    assert torch.allclose(ours(x), expected, atol=1e-12)
    assert torch.allclose(ours.weights_and_values(x)[0], weights, atol=1e-12)


def test_a_block_is_pytorchs_encoder_layer():
    torch.manual_seed(0)
    ours = Block(24, 3, 4, 0.1).double().eval()
    theirs = nn.TransformerEncoderLayer(24, 3, 96, 0.1, "gelu", batch_first=True, norm_first=True).double().eval()
    names = {"self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.out."}
    names |= {"linear1.": "up.", "linear2.": "down.", "norm1.": "norm1.", "norm2.": "norm2."}
    state = ours.state_dict()
    theirs.load_state_dict({a + end: state[b + end] for a, b in names.items() for end in ("weight", "bias")})
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-12)


def test_dropout_is_in_every_part_of_a_block_in_training_alone():
    torch.manual_seed(0)
    network = ViT(dim=16, depth=1, heads=2)
    calls = []
    for module in network.modules():
        if isinstance(module, Dropout):
            module.register_forward_hook(lambda *_: calls.append(1))
    x = torch.rand(2, 1, 28, 28)
    assert not torch.equal(network(x), network(x))
    assert len(calls) == 2 * (1 + 3)  # the tokens; after attention, the hidden layer and the layer out
    network.eval()
    assert torch.equal(network(x), network(x))


def test_the_vit_has_the_parameters_of_the_formula():
    d, depth, tokens = 128, 6, 50
    block = 4 * d + 3 * d * d + 3 * d + d * d + d + 2 * 4 * d * d + 4 * d + d
    expected = 16 * d + d + d + tokens * d + depth * block + 2 * d + 10 * d + 10
    assert sum(p.numel() for p in ViT().parameters()) == expected == 1199882


def test_the_patches_are_squares_read_row_by_row():
    torch.manual_seed(0)
    network = ViT(dim=16, depth=1, heads=2).eval()
    x = torch.rand(2, 1, 28, 28)
    normalized = (x - 0.1307) / 0.3081
    weight, bias = network.stem.weight.flatten(1), network.stem.bias
    for patch in (0, 9, 47):
        row, column = divmod(patch, 7)
        square = normalized[:, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
        expected = square @ weight.T + bias + network.positions[0, patch + 1]
        assert torch.allclose(network.tokens(x)[:, patch + 1], expected, atol=1e-5)
    assert torch.allclose(network.tokens(x)[:, 0], (network.class_token + network.positions[:, :1])[0].expand(2, -1))


def test_without_positions_the_order_of_the_patches_does_not_matter():
    torch.manual_seed(0)
    network = ViT(dim=16, depth=2, heads=2).eval()
    x = torch.rand(1, 1, 28, 28)
    shuffled = x.unflatten(2, (7, 4)).flip(2).flatten(2, 3)  # the rows of patches from below
    assert not torch.allclose(network(x), network(shuffled), atol=1e-4)
    with torch.no_grad():
        network.positions[:, 1:] = 0.3
    assert torch.allclose(network(x), network(shuffled), atol=1e-5)


@pytest.mark.parametrize("stem", vit.STEMS)
def test_every_part_of_the_vit_learns(stem):
    torch.manual_seed(0)
    network = ViT(dim=16, depth=2, heads=2, stem=stem)
    F.cross_entropy(network(torch.rand(4, 1, 28, 28)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_what_no_vit_can_be_made_of_is_refused():
    for wrong in ({"size": 30}, {"heads": 3}, {"stem": "linear"}, {"stem": "conv", "patch": 7}):
        with pytest.raises(UserError, match="a ViT of"):
            ViT(**wrong)
    with pytest.raises(ValueError, match="divide them by 255"):
        ViT(dim=16, depth=1, heads=2)(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))


def test_the_attention_weights_are_those_that_the_network_uses():
    torch.manual_seed(0)
    network = ViT(dim=16, depth=3, heads=2).eval()
    x = torch.rand(2, 1, 28, 28)
    weights = network.attention_weights(x)
    assert weights.shape == (3, 2, 2, 50, 50)
    assert torch.allclose(weights.sum(-1), torch.ones(3, 2, 2, 50), atol=1e-5)
    second = network.blocks[1]
    tokens = network.blocks[0](network.tokens(x))
    assert torch.allclose(network.head(network.norm(network.blocks[2](second(tokens))))[:, 0], network(x), atol=1e-6)
    assert torch.allclose(weights[1], second.attention.weights_and_values(second.norm1(tokens))[0], atol=1e-6)


def test_rollout_by_hand():
    torch.manual_seed(0)
    weights = torch.rand(2, 3, 4, 5, 5).softmax(-1)
    for image in range(3):
        first, second = (0.5 * weights[i, image].mean(0) + 0.5 * torch.eye(5) for i in range(2))
        row = (second @ first)[0, 1:]  # the class token's end looks through the last block first
        assert torch.allclose(rollout(weights)[image], row / row.sum(), atol=1e-6)


def test_a_position_is_like_itself():
    network = ViT(dim=16, depth=1, heads=2)
    likeness = position_similarity(network)
    assert likeness.shape == (49, 49)
    assert torch.allclose(likeness.diagonal(), torch.ones(49))
    assert likeness.abs().max() < 1.0001
    of_patches = network.positions.detach()[0, 1:]  # the first is the class token's
    assert likeness[3, 7] == pytest.approx(F.cosine_similarity(of_patches[3], of_patches[7], dim=0).item(), abs=1e-6)


# --- the zoo ------------------------------------------------------------------------------------------------------


def conv(c_in, c_out):
    return 9 * c_in * c_out + 2 * c_out


def dense(*widths):
    return sum(a * b + b for a, b in pairwise(widths))


def test_the_networks_have_the_parameters_of_the_formulas():
    pairs = ((1, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256))
    expected = {
        "fcnn": 784 * 512 + 2 * 512 + 512 * 256 + 2 * 256 + dense(256, 10),
        "cnn": conv(1, 32) + conv(32, 64) + conv(64, 128) + dense(128 * 9, 256, 128, 10),
        "deep_cnn": sum(conv(*pair) for pair in pairs) + dense(256 * 9, 512, 10),
        "slim_cnn": sum(conv(*pair) for pair in pairwise((1, 32, 32, 64, 64, 96, 96, 128))) + dense(128, 10),
    }
    for name, count in expected.items():
        assert sum(p.numel() for p in zoo.build(name, 10).parameters()) == count


def test_the_cnn_is_what_the_table_says():
    kinds = [type(layer).__name__ for layer in zoo.cnn()]
    block = ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Dropout"]
    assert kinds == ["Normalize", *3 * block, "Flatten", *2 * ["Linear", "ReLU", "Dropout"], "Linear"]
    dropped = [layer.p for layer in zoo.cnn() if isinstance(layer, Dropout)]
    assert dropped == [0.25, 0.25, 0.25, 0.5, 0.5]


def test_every_network_reads_digits_and_learns_in_every_part():
    x = torch.rand(3, 1, 28, 28)
    for name in (*zoo.OURS, "alexnet", "vgg16"):
        torch.manual_seed(0)
        network = zoo.build(name, 7)
        logits = network(x)
        assert logits.shape == (3, 7)
        F.cross_entropy(logits, torch.arange(3)).backward()
        assert all(p.grad is not None for p in network.parameters()), name


@pytest.mark.parametrize("name", zoo.TORCHVISION)
def test_with_imagenets_weights_the_convolutions_are_torchvisions_and_stay(name, weights_of):
    given = weights_of(name)
    network = zoo.build(name, 10, given).train()
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    theirs.load_state_dict(given)
    x = torch.rand(1, 1, 28, 28)
    mean, std = (torch.tensor(zoo.IMAGENET[key])[:, None, None] for key in ("mean", "std"))
    seen = (resized(x, 224).expand(-1, 3, -1, -1) - mean) / std
    with torch.no_grad():
        assert torch.allclose(network.features(x), theirs.avgpool(theirs.features(seen)).flatten(1), atol=1e-4)
    assert network(x).shape == (1, 10)
    learned = {key for key, p in network.named_parameters() if p.requires_grad}
    assert learned == {key for key, _ in network.named_parameters() if key.startswith("classifier.")}
    assert not network.convolutions.training
    assert network.classifier.training
    assert not network.eval().classifier.training


def test_another_networks_weights_are_refused(weights_of):
    with pytest.raises(UserError, match="these are no weights of VGG16"):
        zoo.build("vgg16", 10, weights_of("alexnet"))
    with pytest.raises(UserError, match="these are no weights of AlexNet"):
        zoo.build("alexnet", 10, weights_of("alexnet", num_classes=10))


def test_a_figure_says_with_what_a_network_begins():
    said = {zoo.title_of(name, pretrained) for name in zoo.TORCHVISION for pretrained in (False, True)}
    assert said == {
        "VGG16, 32×32, from scratch",
        "AlexNet, small stem, from scratch",
        "VGG16, ImageNet's, frozen",
        "AlexNet, ImageNet's, frozen",
    }
    assert [zoo.title_of(name, False) for name in zoo.OURS] == ["FCNN", "CNN", "deep CNN", "slim CNN", "ViT"]
