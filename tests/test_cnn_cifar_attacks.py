"""cnn_cifar's attacks: the ε-ball, the order of strength, gradients by differences, nothing left behind."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn

from cnn_cifar import attacks
from cnn_cifar.attacks import fgsm, input_gradient, iterative_fgsm, pgd
from cnn_cifar.models import allcnn_t

EPS, ALPHA = 8 / 255, 2 / 255
ATTACKS = {
    "fgsm": lambda model, x, y: fgsm(model, x, y, EPS),
    "iterative": lambda model, x, y: iterative_fgsm(model, x, y, EPS, ALPHA, 7),
    "pgd": lambda model, x, y: pgd(model, x, y, EPS, ALPHA, 7, 2, Generator().manual_seed(0)),
}


@pytest.fixture(scope="module")
def model():
    """A small All-CNN whose BatchNorm has seen images, in training mode, as a careless caller has it."""
    torch.manual_seed(0)
    network = allcnn_t(4, 6)
    for _ in range(30):
        network(torch.rand(16, 3, 16, 16))
    network.zero_grad()
    return network


@pytest.fixture(scope="module")
def batch():
    generator = Generator().manual_seed(1)
    x = torch.rand(12, 3, 16, 16, generator=generator)
    x[:2] = torch.tensor([0.0, 1.0])[:, None, None, None]  # black and white: half of the ball is outside
    return x, torch.randint(0, 10, (12,), generator=generator)


def losses(model, x, y):
    model.eval()
    with torch.no_grad():
        found = F.cross_entropy(model(x), y, reduction="none")
    model.train()
    return found


def linear(weights):
    """A network of two classes whose logits are 0 and w · x."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(weights.numel(), 2, bias=False))
    network[1].weight.data = torch.stack([torch.zeros(weights.numel()), weights.flatten()])
    return network


def test_the_input_gradient_is_that_of_each_images_own_loss():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.rand(4, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 1])

    def loss(x):
        return F.cross_entropy(network(x), y, reduction="none")

    found, h = input_gradient(network, x, y), 1e-5
    for i in range(12):
        step = torch.zeros(12, dtype=torch.float64)
        step[i] = h
        step = step.reshape(3, 2, 2)
        difference = (loss(x + step) - loss(x - step)) / (2 * h)
        assert torch.allclose(found.flatten(1)[:, i], difference, rtol=1e-7, atol=1e-9)
    alone = torch.cat([input_gradient(network, x[i : i + 1], y[i : i + 1]) for i in range(4)])
    assert torch.allclose(found, alone, atol=1e-9)


def test_on_a_linear_network_fgsm_moves_every_pixel_against_the_true_class():
    weights = torch.tensor([[[1.0, -2.0], [0.0, 3.0]]])
    x = torch.full((2, 1, 2, 2), 0.5)
    moved = fgsm(linear(weights), x, torch.tensor([0, 1]), 0.1)
    assert torch.allclose(moved[0] - 0.5, 0.1 * weights.sign())  # class 1 is to rise
    assert torch.allclose(moved[1] - 0.5, -0.1 * weights.sign())


@pytest.mark.parametrize("name", ATTACKS)
def test_images_stay_in_the_ball_and_are_images(model, batch, name):
    x, y = batch
    moved = ATTACKS[name](model, x, y)
    assert moved.shape == x.shape
    assert not moved.requires_grad
    assert (moved - x).abs().max() <= EPS + 1e-7
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert (moved - x).abs().max() > 0.9 * EPS  # and use it
    assert losses(model, moved, y).mean() > losses(model, x, y).mean()


@pytest.mark.parametrize("name", ATTACKS)
def test_the_model_is_left_as_it_was(model, batch, name):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kept = batch[0].clone()
    for training in (True, False):
        model.train(training)
        ATTACKS[name](model, *batch)
        assert model.training is training
    model.train()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())  # BatchNorm's too
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(batch[0], kept)
    assert not batch[0].requires_grad


def test_every_layers_mode_is_put_back_even_after_an_error(model):
    model.block1.bn.eval()  # as a frozen layer's
    before = [module.training for module in model.modules()]
    with attacks.evaluating(model):
        assert not any(module.training for module in model.modules())
    with pytest.raises(IndexError), attacks.evaluating(model):
        raise IndexError
    assert [module.training for module in model.modules()] == before
    model.train()


def test_the_loss_is_cross_entropy_and_keeps_its_gradient_where_the_answer_is_sure():
    torch.manual_seed(0)
    logits, y = (3 * torch.randn(6, 10, dtype=torch.float64)).requires_grad_(), torch.arange(6)
    expected = F.cross_entropy(logits, y, reduction="none")
    assert torch.allclose(attacks._losses(logits, y), expected, rtol=1e-12)
    ours, theirs = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (attacks._losses(logits, y), expected))
    assert torch.allclose(ours, theirs, atol=1e-12)
    sure = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True)
    gradient = torch.autograd.grad(attacks._losses(sure, torch.tensor([0])).sum(), sure)[0][0]
    assert gradient.tolist() == pytest.approx([-2 * math.exp(-30), math.exp(-30), math.exp(-30)], rel=1e-5)


def test_attacks_work_where_gradients_are_switched_off(model, batch):
    with torch.no_grad():
        assert torch.equal(fgsm(model, *batch, EPS), ATTACKS["fgsm"](model, *batch))


def test_one_step_of_alpha_eps_is_fgsm(model, batch):
    assert torch.equal(iterative_fgsm(model, *batch, EPS, EPS, 1), fgsm(model, *batch, EPS))


def test_each_step_starts_where_the_last_one_ended(model, batch):
    x, y = batch
    once = iterative_fgsm(model, x, y, 1.0, ALPHA, 1)
    assert torch.equal(iterative_fgsm(model, x, y, 1.0, ALPHA, 2), iterative_fgsm(model, once, y, 1.0, ALPHA, 1))
    many = iterative_fgsm(model, x, y, EPS, ALPHA, 50)  # long enough to be pushed back again and again
    assert (many - x).abs().max() <= EPS + 1e-7


def test_zero_eps_changes_nothing(model, batch):
    x, y = batch
    for moved in (fgsm(model, x, y, 0.0), iterative_fgsm(model, x, y, 0.0, ALPHA, 2), pgd(model, x, y, 0.0, ALPHA, 2)):
        assert torch.equal(moved, x)


def test_pgd_starts_at_random_and_its_generator_decides(model, batch):
    def moved(seed, eps=EPS):
        return pgd(model, *batch, eps, 1e-9, 1, generator=Generator().manual_seed(seed))

    assert torch.equal(moved(0), moved(0))
    assert not torch.equal(moved(0), moved(1))
    spread = (moved(0) - batch[0])[2:]
    inside = (batch[0][2:] > EPS) & (batch[0][2:] < 1 - EPS)
    assert abs(spread[inside].mean()) < 0.1 * EPS
    assert spread[inside].std() == pytest.approx(EPS / math.sqrt(3), rel=0.05)  # uniform in ±ε


def test_restarts_keep_the_worst_for_each_image(model, batch):
    x, y = batch
    starts = [pgd(model, x, y, EPS, ALPHA, 1, 1, Generator().manual_seed(seed)) for seed in (0,)]
    generator = Generator().manual_seed(0)
    alone = [pgd(model, x, y, EPS, ALPHA, 1, 1, generator) for _ in range(3)]
    assert torch.equal(alone[0], starts[0])
    together = pgd(model, x, y, EPS, ALPHA, 1, 3, Generator().manual_seed(0))
    scores = torch.stack([attacks._badness(model, one, y) for one in alone])  # (3, B)
    assert len(set(scores.argmax(0).tolist())) > 1  # the same start is not the worst for all
    for i, best in enumerate(scores.argmax(0)):
        assert torch.equal(together[i], alone[best][i])


def test_a_wrong_answer_is_worse_than_a_right_one_of_higher_loss():
    class Fixed(nn.Module):
        def forward(self, x):
            return torch.tensor([[1.0, 0.9, 0.9, 0.9], [0.9, 1.0, -9.0, -9.0]])

    y, x = torch.tensor([0, 0]), torch.zeros(2, 3, 1, 1)
    plain = F.cross_entropy(Fixed()(x), y, reduction="none")
    score = attacks._badness(Fixed(), x, y)
    assert plain[0] > plain[1]
    assert score[0] < score[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, y: fgsm(m, x, y, -0.1), "ε is 0 or more"),
        (lambda m, x, y: fgsm(m, x, y, float("nan")), "ε is 0 or more"),
        (lambda m, x, y: iterative_fgsm(m, x, y, EPS, 0.0, 1), "α is above 0"),
        (lambda m, x, y: iterative_fgsm(m, x, y, EPS, ALPHA, 0), "at least one step"),
        (lambda m, x, y: pgd(m, x, y, EPS, ALPHA, 1, 0), "one start"),
        (lambda m, x, y: fgsm(m, 255 * x, y, EPS), "pixels from 0 to 1"),
        (lambda m, x, y: pgd(m, x - 0.5, y, EPS, ALPHA, 1), "pixels from 0 to 1"),
    ],
)
def test_nonsense_is_refused(model, batch, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(model, *batch)
    assert error.type is ValueError
