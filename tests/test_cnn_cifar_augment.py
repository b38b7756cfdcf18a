"""cnn_cifar's augmentations: torchvision's functions image by image, and random parameters of each image's own."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from cnn_cifar import augment
from cnn_cifar.augment import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    alternating_flip,
    color_jitter,
    crop,
    cutout,
    flip,
    flip_coins,
    random_color_jitter,
    random_crop,
    random_cutout,
    random_flip,
)
from cnn_cifar.models import CIFAR10_MEAN
from shared_utils.cli import UserError

RANDOM = {"flip": random_flip, "crop": random_crop, "jitter": random_color_jitter, "cutout": random_cutout}
RANDOM |= {"rotation": augment.random_rotation, "RandAugment": augment.random_rand_augment}
FLOAT_TOLERANCE = 2e-6  # of values in [0, 1]: some roundings of float32


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(n=12, h=9, w=11):
    """uint8 (n, 3, h, w), with grey, black, white and pure colours among the pixels: hue's special cases."""
    x = torch.randint(256, (n, 3, h, w), generator=seeded(), dtype=torch.uint8)
    x[:, :, 0] = x[:, :1, 0]
    x[:, :, 1, :4] = 0
    x[:, :, 1, 4:] = 255
    x[:, 0, 2], x[:, 1:, 2] = 255, 0
    x[:, 0, 3] = x[:, 1, 3]
    x[:, 1, 4] = x[:, 2, 4]
    return x


def one_by_one(function, x, *parameters):
    """The function of torchvision's on each image with its own parameters (Python numbers)."""
    rows = zip(*(p.tolist() for p in parameters), strict=True)
    return torch.stack([function(image, *row) for image, row in zip(x, rows, strict=True)])


def uniform(low, high, n=12, seed=1):
    return low + (high - low) * torch.rand(n, generator=seeded(seed))


# --- against torchvision, at fixed parameters -----------------------------------------------------------------------


def test_flip():
    x, mask = noise(), torch.arange(12) % 3 == 0
    expected = one_by_one(lambda image, m: tv.horizontal_flip(image) if m else image, x, mask)
    assert torch.equal(flip(x, mask), expected)


@pytest.mark.parametrize("padding", [0, 1, 4, 8])
def test_crop(padding):
    x, side = noise(), 2 * padding + 1
    top, left = torch.arange(12) * 5 % side, torch.arange(12) * 7 % side
    padded = [tv.pad(image.float(), [padding], padding_mode="reflect").to(torch.uint8) for image in x]
    expected = one_by_one(lambda image, i, j: tv.crop(image, i, j, 9, 11), padded, top, left)
    assert torch.equal(crop(x, top, left, padding), expected)
    middle = torch.full((12,), padding)
    assert torch.equal(crop(x, middle, middle, padding), x)


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (adjust_brightness, tv.adjust_brightness, 0, 2),
        (adjust_contrast, tv.adjust_contrast, 0, 2),
        (adjust_saturation, tv.adjust_saturation, 0, 2),
        (adjust_hue, tv.adjust_hue, -0.5, 0.5),
    ],
)
def test_each_colour_adjustment(ours, theirs, low, high):
    x, parameter = noise() / 255, uniform(low, high)
    parameter[0], parameter[1] = low, high
    expected = one_by_one(theirs, x, parameter)
    torch.testing.assert_close(ours(x, parameter), expected, rtol=0, atol=FLOAT_TOLERANCE)
    neutral = torch.full((12,), 0.0 if ours is adjust_hue else 1.0)
    torch.testing.assert_close(ours(x, neutral), x, rtol=0, atol=FLOAT_TOLERANCE)


def test_color_jitter_is_the_four_in_order():
    x = noise()
    factors = [uniform(0.5, 1.5, seed=seed) for seed in (1, 2, 3)] + [uniform(-0.2, 0.2, seed=4)]
    steps = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)

    def chain(image, *numbers):
        for step, number in zip(steps, numbers, strict=True):
            image = step(image, number)
        return 255 * image

    expected, found = one_by_one(chain, x / 255, *factors), color_jitter(x, *factors)
    assert found.dtype == torch.uint8
    assert (found - expected).abs().max() <= 0.5 + 255 * 4 * FLOAT_TOLERANCE  # to the nearest level
    neutral = [torch.ones(12)] * 3 + [torch.zeros(12)]
    assert torch.equal(color_jitter(x, *neutral), x)


def test_cutout():
    x, size = noise(), 4
    top, left = torch.arange(12) % 6, torch.arange(12) % 8  # inside 9×11
    colour = (255 * torch.tensor(CIFAR10_MEAN)).round().to(torch.uint8).view(3, 1, 1)
    expected = one_by_one(lambda image, i, j: tv.erase(image, i, j, size, size, colour), x, top, left)
    assert torch.equal(cutout(x, top, left, size), expected)
    over = cutout(x, torch.full((12,), -2), torch.full((12,), 9), size)  # two rows and two columns are left
    assert torch.equal(over[:, :, :2, 9:], colour.expand(12, 3, 2, 2))
    assert torch.equal(over[:, :, 2:], x[:, :, 2:])
    assert torch.equal(over[:, :, :, :9], x[:, :, :, :9])


# --- the random ones ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANDOM)
def test_bytes_in_bytes_out_repeatable_and_the_input_stays(name):
    x = noise(32)
    before, generator = x.clone(), seeded()
    found = RANDOM[name](x, generator)
    assert (found.dtype, found.shape) == (torch.uint8, x.shape)
    assert torch.equal(x, before)
    assert not torch.equal(found, x)
    assert torch.equal(found, RANDOM[name](x, seeded()))
    assert not torch.equal(found, RANDOM[name](x, seeded(1)))
    assert not torch.equal(found, RANDOM[name](x, generator))  # the generator has moved on
    state = torch.get_rng_state()
    RANDOM[name](x, seeded())
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn from the global one


@pytest.mark.parametrize(("name", "outcomes"), [("flip", 2), ("crop", 60), ("jitter", 90), ("cutout", 40)])
def test_each_image_has_its_own_parameters(name, outcomes):
    x = noise(1).expand(128, -1, -1, -1)  # one image 128 times: 99 places of Cutout's, 81 of the crop's
    assert len(torch.unique(RANDOM[name](x, seeded()), dim=0)) >= outcomes


def test_half_of_the_images_are_flipped():
    x = noise(1).expand(4000, -1, -1, -1)
    flipped = (random_flip(x, seeded()) != x).flatten(1).any(1)
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.03)  # four deviations
    assert flip_coins(4000, seeded()).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_two_epochs_of_alternating_flip_show_every_image_both_ways():
    x, coins = noise(200), flip_coins(200, seeded())
    assert 0 < coins.sum() < 200
    epochs = [alternating_flip(x, coins, epoch) for epoch in range(4)]
    assert torch.equal(epochs[0], flip(x, coins))
    assert torch.equal(epochs[1], epochs[0].flip(-1))
    assert torch.equal(epochs[2], epochs[0])
    assert torch.equal(epochs[3], epochs[1])


def test_random_crops_reach_every_offset_alike(monkeypatch):
    seen = []
    monkeypatch.setattr(augment, "crop", lambda x, top, left, padding: seen.append((top, left, padding)))
    random_crop(noise(1).expand(8100, -1, -1, -1), seeded(), padding=4)
    top, left, padding = seen[0]
    assert padding == 4
    counts = np.bincount((9 * top + left).numpy(), minlength=81)
    assert len(counts) == 81  # 9 × 9 offsets, 100 each on average
    assert counts.min() > 60
    assert counts.max() < 140


def test_random_factors_fill_their_ranges_each_for_itself(monkeypatch):
    seen = []
    monkeypatch.setattr(augment, "color_jitter", lambda x, *factors: seen.extend(factors))
    random_color_jitter(noise(1).expand(4000, -1, -1, -1), seeded(), 0.2, 0.4, 1.5, 0.1)
    for factors, (low, high) in zip(seen, [(0.8, 1.2), (0.6, 1.4), (0, 2.5), (-0.1, 0.1)], strict=True):
        assert low <= factors.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < factors.max() <= high
        assert factors.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
    assert torch.corrcoef(torch.stack(seen)).fill_diagonal_(0).abs().max() < 0.07  # four deviations


@pytest.mark.parametrize("size", [4, 5])
def test_cutouts_middle_is_anywhere_in_the_image(size, monkeypatch):
    seen = []
    monkeypatch.setattr(augment, "cutout", lambda x, top, left, size: seen.append((top, left)))
    random_cutout(noise(1).expand(9900, -1, -1, -1), seeded(), size)
    top, left = seen[0]
    counts = np.bincount((11 * (top + size // 2) + left + size // 2).numpy(), minlength=99)
    assert len(counts) == 99  # 9 × 11 middles, 100 each on average
    assert counts.min() > 60
    assert counts.max() < 140


def test_cutout_of_a_size_that_covers_all():
    assert len(torch.unique(random_cutout(noise(), seeded(), size=40).transpose(0, 1).flatten(1), dim=1)[0]) == 1


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [noise() / 255, noise()[:, :1], noise()[0]], ids=["float", "grey", "one image"])
@pytest.mark.parametrize("function", [*RANDOM.values(), lambda x, g: alternating_flip(x, flip_coins(len(x), g), 0)])
def test_other_images_are_refused(function, bad):
    said = r"^augmentations take uint8 images \(N, 3, H, W\), got torch\.\w+ \(.*\)$"
    with pytest.raises(ValueError, match=said) as stop:
        function(bad, seeded())
    assert stop.type is ValueError


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, g: random_crop(x, g, padding=9), "9×11 cannot be padded with 9"),
        (lambda x, g: random_crop(x, g, padding=-1), "padded with -1"),
        (lambda x, g: random_color_jitter(x, g, brightness=-0.1), "0 or more"),
        (lambda x, g: random_color_jitter(x, g, hue=0.6), "at most 0.5"),
        (lambda x, g: random_cutout(x, g, size=0), "at least 1 pixel, got 0"),
    ],
)
def test_a_wrong_strength_gets_one_line(call, message):
    with pytest.raises(UserError, match=message) as stop:
        call(noise(), seeded())
    assert "\n" not in str(stop.value)


# --- rotation, RandAugment, Mixup -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w"), [(32, 32), (20, 31)])
def test_rotation_is_torchvisions_inside_the_image(h, w):
    x, degrees = noise(8, h, w), torch.tensor([-170.0, -30, -7, 0, 7, 30, 90, 135])
    bilinear = tv.InterpolationMode.BILINEAR
    expected = one_by_one(lambda image, d: tv.rotate(image.float(), d, bilinear), x, degrees)
    row, column = (torch.arange(side) - (side - 1) / 2 for side in (h, w))
    inside = row[:, None] ** 2 + column**2 < (min(h, w) / 2 - 2) ** 2  # what no corner reaches
    difference = (augment.rotate(x, degrees).float() - expected).abs()[:, :, inside]
    assert difference.max() <= 0.51  # ours is rounded to whole grey levels
    assert torch.equal(augment.rotate(x, torch.zeros(8)), x)


def test_a_turn_by_a_quarter_is_exact_and_counterclockwise():
    x = noise(3, 10, 10)
    assert torch.equal(augment.rotate(x, torch.full((3,), 90.0)), torch.rot90(x, 1, (2, 3)))


def test_rotation_fills_the_corners_with_the_image():
    x = torch.full((4, 3, 16, 16), 200, dtype=torch.uint8)
    assert (augment.rotate(x, torch.tensor([10.0, 45, 80, -33])) == 200).all()


def test_rand_augments_operations_are_torchvisions():
    x = noise(2, 32, 32) // 4 * 3 + 20  # neither black nor white: there is contrast to stretch
    operations = augment.rand_augment_operations(0.3, 32)
    found = [operation(x) for operation in operations]
    assert len(operations) == 28  # 14 operations, twice each: in both directions or the same again
    assert sum(torch.equal(y, x) for y in found) == 2  # the identity alone
    shift, shear = 4, 16.699244  # pixels at 0.3; degrees at full strength
    for sign in (-1, 1):
        factor, angle = 1 + sign * 0.27, sign * 9.0
        expected = [
            tv.rotate(x, angle),
            tv.affine(x, 0.0, [sign * shift, 0], 1.0, [0.0, 0.0]),
            tv.affine(x, 0.0, [0, sign * shift], 1.0, [0.0, 0.0]),
            tv.adjust_brightness(x, factor),
            tv.adjust_saturation(x, factor),
            tv.adjust_contrast(x, factor),
            tv.adjust_sharpness(x, factor),
            tv.posterize(x, 7),
            tv.solarize(x, 255 * 0.7),
            tv.autocontrast(x),
            tv.equalize(x),
        ]
        for wanted in expected:
            assert any(torch.equal(y, wanted) for y in found)
    full = augment.rand_augment_operations(1.0, 32)
    for sheared in ([shear, 0.0], [0.0, shear]):
        wanted = tv.affine(x, 0.0, [0, 0], 1.0, sheared, center=[0, 0])
        assert any(torch.equal(operation(x), wanted) for operation in full)


def test_rand_augment_draws_for_each_image_alone():
    x = (noise(1, 32, 32) // 4 * 3 + 20).expand(400, -1, -1, -1).contiguous()
    y = augment.random_rand_augment(x, seeded(), count=1)
    kinds = {image.numpy().tobytes() for image in y}
    distinct = {operation(x[:1])[0].numpy().tobytes() for operation in augment.rand_augment_operations(0.3, 32)}
    assert kinds == distinct  # each operation's picture is there, and no other
    same = np.mean([torch.equal(image, x[0]) for image in y])
    assert 0.03 < same < 0.12  # the identity is one of 14: 0.071, deviation 0.013
    assert not torch.equal(augment.random_rand_augment(x, seeded(), count=2), y)


def test_rand_augment_needs_no_image_to_be_in_every_group():
    x = noise(3, 32, 32)
    assert augment.random_rand_augment(x, seeded()).shape == x.shape


def test_mixup_mixes_images_and_nothing_else():
    x = torch.rand(4, 3, 5, 5, generator=seeded())
    partner, lam = torch.tensor([2, 0, 1, 3]), torch.tensor([1.0, 0.0, 0.25, 0.6])
    mixed = augment.mixup(x, partner, lam)
    assert torch.equal(mixed[0], x[0])
    assert torch.equal(mixed[1], x[0])
    assert torch.allclose(mixed[2], 0.25 * x[2] + 0.75 * x[1])
    assert torch.allclose(mixed[3], x[3])


@pytest.mark.parametrize(
    ("function", "settings", "said"),
    [
        ("random_rotation", {"degrees": -1}, "0 to 180 degrees"),
        ("random_rotation", {"degrees": 181}, "0 to 180 degrees"),
        ("random_rand_augment", {"count": 0}, "operations from 1"),
        ("random_rand_augment", {"magnitude": 1.1}, "strength from 0 to 1"),
    ],
)
def test_a_strength_without_meaning_is_refused(function, settings, said):
    with pytest.raises(UserError, match=said):
        getattr(augment, function)(noise(), seeded(), **settings)
