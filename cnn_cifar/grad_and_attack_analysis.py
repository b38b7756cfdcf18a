"""How little must an image be changed for a trained network to misclassify it, and how is that found out?

    python cnn_cifar/grad_and_attack_analysis.py
    python cnn_cifar/grad_and_attack_analysis.py --eps 4 --steps 10 --images 500 --out runs/cnn_cifar/attacks_4

Attacks (attacks.py) on a network that allcnn.py or fast_cifar.py trained: `--eps` in grey levels of 255, and `--alpha`
(a fifth of it by default) for the iterative one of `--steps` steps. PGD's α is 2.5 ε over its number of steps, so that
it can cross the ball. What counts is the worst case: an image is safe when it is still classified correctly under
noise, FGSM and every PGD at ε (`strongest`).

One step says little: where the loss is curved, its gradient points past the nearest mistake. So accuracy is measured
against ε and against the number of steps and of starts, and compared with noise of the same size, each pixel moved by
+ε or −ε at random. A network may also mask its gradient and be no safer (Athalye et al. 2018); masking_checks.png lists
what should be seen where it does not.

Writes grad_visuals_correct.png, grad_visuals_incorrect.png, attack_loss_curve.png,
attack_image_progression_example0.png, accuracy_vs_eps.png, accuracy_vs_steps.png, masking_checks.png, metrics.json.
Sources: Goodfellow et al. 2015; Kurakin et al. 2017; Madry et al. 2018; Athalye, Carlini and Wagner 2018.
Shapes: N images, B batch, K classes.
"""

import argparse

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn

from cnn_cifar.attack_measures import (
    BATCH,
    Attack,
    fgsm_accuracy_again,
    logits_of_floats,
    losses,
    masking_checks,
    noise,
    survivors,
)
from cnn_cifar.attacks import ascent, fgsm, input_gradient, iterative_fgsm, pgd
from cnn_cifar.checkpoints import add_ckpt_flag, find_checkpoint, load_network, load_test
from cnn_cifar.inputs import Split, pixels, share
from shared_utils.cli import make_parser, positive_float, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, line_style, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything
from shared_utils.stats import wilson_interval

EPSILONS = (0.5, 1, 2, 4, 8, 16)  # of 255
STEPS = (1, 2, 5, 10, 20, 50)
SHOWN = 8  # images in the pictures of gradients


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset="cifar10", quick={"images": 8, "test_images": 20, "restarts": 2})
    add_ckpt_flag(parser)
    parser.add_argument("--eps", type=positive_float, default=8.0, help="largest change of a pixel, in units of 1/255")
    parser.add_argument("--alpha", type=positive_float, help="the iterative attack's step, of 255 (default: ε / 5)")
    parser.add_argument("--steps", type=positive_int, default=5, help="steps of the iterative attack")
    parser.add_argument("--restarts", type=positive_int, default=5, help="random starts of the strongest PGD")
    parser.add_argument("--images", type=positive_int, default=1000, help="test images for the slow attacks")
    parser.add_argument("--test-images", type=positive_int, help="test images for FGSM (default: all)")
    return parser


def said(row: dict) -> dict:
    """Print the row and return it."""
    print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    return row


def main(argv=None) -> dict:
    """Attack, measure, draw; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    path = find_checkpoint(args)
    model, state = load_network(path, device)
    model = model.to(memory_format=torch.channels_last)
    test = load_test(args, path, state)
    whole = Split(*(torch.from_numpy(part[: args.test_images]).to(device) for part in (test.x, test.y)))
    some = Split(whole.x[: args.images], whole.y[: args.images])
    run = start_run(args)
    seed_everything(args.seed)
    generator = Generator().manual_seed(args.seed)
    eps = args.eps / 255
    alpha = eps / 5 if args.alpha is None else args.alpha / 255
    network = state["config"]["network"]
    about = f"{network} trained on {state['title']}"

    clean = survivors(model, whole)
    of_some = clean[: len(some)]
    found = {"clean": share(clean)}
    found["fgsm"] = share(survivors(model, whole, lambda x, y: fgsm(model, x, y, eps)))
    found["fgsm_again"] = fgsm_accuracy_again(model, whole, eps)
    found["clean_of_some"] = share(of_some)
    iterative = survivors(model, some, lambda x, y: iterative_fgsm(model, x, y, eps, alpha, args.steps))
    found["iterative"] = share(iterative)
    said(found)
    by_eps, safe = by_size(model, some, of_some, args.eps, generator)
    by_steps, also_safe = by_number_of_steps(model, some, eps, args.restarts, generator)
    worst = share(torch.stack([of_some, *safe, *also_safe]).all(0))
    everything = share(survivors(model, some, ascents(model, 1.0, 20, 1, generator)))
    checks = masking_checks(model, some, by_eps, args.eps, by_steps, everything)

    figures = {}
    for kind, chosen in {"correct": clean, "incorrect": ~clean}.items():
        at = torch.nonzero(chosen)[:SHOWN, 0]
        shown = Split(whole.x[at], whole.y[at])
        figures[f"grad_visuals_{kind}"] = draw_gradients(model, shown, state["classes"], kind, about)
    figures |= draw_ascent(model, some, args, alpha, state["classes"], about)
    figures["accuracy_vs_eps"] = draw_by_eps(by_eps, args.eps, found["clean_of_some"], len(some), about)
    figures["accuracy_vs_steps"] = draw_by_steps(by_steps, args, len(some), about)
    figures["masking_checks"] = draw_checks(checks, about)
    for name, figure in figures.items():
        save_figure(figure, run.path(f"{name}.png"))
    return run.finish(
        {
            "network": network,
            "checkpoint": str(path),
            "eps": args.eps,
            "alpha": 255 * alpha,
            "test_images": len(whole),
            "images": len(some),
            "restarts": args.restarts,
            "accuracy": found,
            "strongest": worst,
            "interval": list(wilson_interval(round(worst * len(some)), len(some))),
            "by_eps": by_eps,
            "by_steps": by_steps,
            "checks": checks,
        }
    )


def ascents(model: nn.Module, eps: float, steps: int, restarts: int, generator: Generator) -> Attack:
    """PGD of so many steps from so many random starts, which can cross the ball of ε (of 1)."""
    return lambda x, y: pgd(model, x, y, eps, 2.5 * eps / steps, steps, restarts, generator)


def by_size(
    model: nn.Module, split: Split, clean: Tensor, eps: float, generator: Generator
) -> tuple[list[dict], list[Tensor]]:
    """Accuracies at each ε of `EPSILONS` and at `eps` (of 255), and who survives each attack at `eps`, bool (N,).

    clean: which images are right unattacked, bool (N,). The worst case is right under no attack, and all of them.
    """
    rows, at_eps = [], []
    for size in sorted({*EPSILONS, eps}):
        attacks = {
            "noise": lambda x, y, size=size: noise(x, size / 255, generator),
            "FGSM": lambda x, y, size=size: fgsm(model, x, y, size / 255),
            "PGD-20": ascents(model, size / 255, 20, 1, generator),
        }
        right = {name: survivors(model, split, attack) for name, attack in attacks.items()}
        row = {"eps": size, **{name: share(mask) for name, mask in right.items()}}
        rows.append(said({**row, "worst case": share(torch.stack([clean, *right.values()]).all(0))}))
        if size == eps:
            at_eps += right.values()
    return rows, at_eps


def by_number_of_steps(
    model: nn.Module, split: Split, eps: float, restarts: int, generator: Generator
) -> tuple[list[dict], list[Tensor]]:
    """Accuracies under PGD at ε (of 1) by its `STEPS`, from one start and from several; and who survives, bool (N,)."""
    rows, safe = [], []
    for steps in STEPS:
        once, often = (survivors(model, split, ascents(model, eps, steps, n, generator)) for n in (1, restarts))
        rows.append(said({"steps": steps, "one start": share(once), "several starts": share(often)}))
        safe += [once, often]
    return rows, safe


def draw_ascent(
    model: nn.Module, split: Split, args: argparse.Namespace, alpha: float, classes: list[str], about: str
) -> dict[str, Figure]:
    """The iterative attack on the first images, step by step (α of 1): the file's name of each figure → the figure."""
    x, y = pixels(split.x[:BATCH]), split.y[:BATCH]
    stages = [x, *ascent(model, x, x, y, args.eps / 255, alpha, args.steps)]
    rise = np.stack([losses(model, moved, y).cpu().numpy() for moved in stages])  # (steps + 1, n)
    answers = [logits_of_floats(model, moved).softmax(1).cpu().numpy() for moved in stages]  # (n, K) each
    right = np.stack([p.argmax(1) == y.cpu().numpy() for p in answers])  # (steps + 1, n)
    example = int(right[0].argmax())  # the first that is right before the attack
    images = np.stack([moved[example].cpu().numpy() for moved in stages])  # (steps + 1, 3, H, W)
    its_answers = np.stack([p[example] for p in answers])  # (steps + 1, K)
    progression = draw_progression(images, its_answers, classes, int(y[example]), args.eps, about)
    return {
        "attack_loss_curve": draw_loss_curve(rise, right, args.eps, 255 * alpha, about),
        "attack_image_progression_example0": progression,
    }


def draw_gradients(model: nn.Module, split: Split, classes: list[str], kind: str, about: str):
    """Each image, its input gradient with its sign, and how large it is at each pixel."""
    answered = "right" if kind == "correct" else "wrong"
    if not len(split):
        figure, axes = new_figure(width=6.0, height=1.5, title=f"{about}: it gets none of the images {answered}")
        axes[0, 0].axis("off")
        return figure
    x = pixels(split.x)
    gradient = input_gradient(model, x, split.y).cpu().numpy()  # (n, 3, H, W)
    p = logits_of_floats(model, x).softmax(1).cpu().numpy()
    size = np.abs(gradient).max(1)  # (n, H, W)
    n = len(x)
    figure, axes = new_figure(3, n, width=1.35 * n + 1, height=5.2)
    for at in range(n):
        top = max(size[at].max(), 1e-30)
        shown = (split.x[at].cpu().numpy(), 0.5 + 0.5 * gradient[at] / top)
        for ax, picture in zip(axes[:2, at], shown, strict=True):
            ax.imshow(picture.transpose(1, 2, 0), interpolation="nearest")
        axes[2, at].imshow(size[at], cmap="gray", interpolation="nearest")
        answer = int(p[at].argmax())
        axes[0, at].set_title(f"{classes[answer]} {p[at, answer]:.0%}\n(is {classes[int(split.y[at])]})", fontsize=8)
        axes[1, at].set_title(f"largest {top:.1g}", fontsize=8)
    for ax in axes.ravel():
        ax.set(xticks=[], yticks=[])
    for ax, name in zip(
        axes[:, 0], ("image", "gradient of the loss\n(grey: 0)", "its size\n(white: largest)"), strict=True
    ):
        ax.set_ylabel(name, fontsize=9)
    typical = np.median(size.reshape(n, -1).max(1))
    rest = f"where the loss rises; the largest slope is typically {typical:.2g} nats per pixel value of 1"
    figure.suptitle(f"{about}, images it gets {answered}:\n{rest}")
    return figure


def draw_loss_curve(rise: np.ndarray, right: np.ndarray, eps: float, alpha: float, about: str):
    """Losses (steps + 1, n) and right answers under the iterative attack, by step."""
    figure, axes = new_figure(1, 2, width=9.6, height=4.0)
    step = np.arange(len(rise))
    low, middle, high = np.percentile(rise, (10, 50, 90), axis=1)
    axes[0, 0].plot(step, rise.mean(1), label="mean", **line_style(0))
    axes[0, 0].plot(step, middle, label="median", **line_style(1))
    axes[0, 0].fill_between(step, low, high, alpha=0.2, label="10th to 90th percentile")
    axes[0, 0].set(xlabel="step", ylabel="cross-entropy (nats per image)")
    axes[0, 0].legend(loc="upper left")
    axes[0, 1].plot(step, 100 * right.mean(1), marker="o")
    axes[0, 1].set(xlabel="step", ylabel=f"right of {right.shape[1]} images (%)", ylim=(-2, 102))
    for ax in axes[0]:
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(
        f"{about}: {len(rise) - 1} steps of {alpha:g}/255 within ε = {eps:g}/255\n"
        f"take the loss from {rise[0].mean():.2f} to {rise[-1].mean():.2f} nats, "
        f"the accuracy from {right[0].mean():.0%} to {right[-1].mean():.1%}"
    )
    return figure


def draw_progression(stages: np.ndarray, answers: np.ndarray, classes: list[str], label: int, eps: float, about: str):
    """One image after each step (steps + 1, 3, H, W), its answer (steps + 1, K), and what was added, amplified."""
    shown = np.unique(np.linspace(0, len(stages) - 1, 8).round().astype(int))  # of many steps, eight
    figure, axes = new_figure(2, len(shown), width=max(7.0, 1.5 * len(shown)), height=4.4)
    times = 127.5 / eps
    for column, step in enumerate(shown):
        answer = int(answers[step].argmax())
        added = 0.5 + times * (stages[step] - stages[0])
        axes[0, column].set_title(f"step {step}\n{classes[answer]} {answers[step, answer]:.0%}", fontsize=9)
        for ax, picture in zip(axes[:, column], (stages[step], added), strict=True):
            ax.imshow(picture.transpose(1, 2, 0).clip(0, 1), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("image", fontsize=9)
    axes[1, 0].set_ylabel(f"what was added,\n{times:.0f} times (grey: 0)", fontsize=9)
    last = int(answers[-1].argmax())
    figure.suptitle(
        f"{about}: {classes[label]} {answers[0, label]:.1%} before, {classes[last]} {answers[-1, last]:.1%} after\n"
        f"{len(stages) - 1} steps within ±{eps:g} of 255 grey levels"
    )
    return figure


def draw_by_eps(table: list[dict], at: float, clean: float, n: int, about: str):
    """Accuracy against ε under noise, one step, twenty steps, and the worst of them for each image."""
    figure, axes = new_figure(width=7.4, height=4.6)
    ax, eps = axes[0, 0], [0, *(row["eps"] for row in table)]
    for index, name in enumerate(("noise", "FGSM", "PGD-20", "worst case")):
        values = [clean, *(row[name] for row in table)]
        label = {"noise": "noise of ±ε", "FGSM": "FGSM (one step)"}.get(name, name)
        ax.plot(eps, [100 * value for value in values], marker="o", markersize=4, label=label, **line_style(index))
    ax.set(xlabel="ε (of 255)", ylabel="accuracy (%)", ylim=(-2, 102))
    ax.legend(loc="upper right")
    row = next(row for row in table if row["eps"] == at)
    left = ", ".join(f"{name} leaves {row[name]:.1%}" for name in ("noise", "FGSM", "PGD-20"))
    figure.suptitle(f"{about}, {n:,} test images: {clean:.1%} right unattacked;\nat ε = {at:g}/255 {left}")
    return figure


def draw_by_steps(table: list[dict], args, n: int, about: str):
    """Accuracy under PGD against its number of steps, from one start and from several."""
    figure, axes = new_figure(width=7.0, height=4.4)
    ax = axes[0, 0]
    for index, (key, label) in enumerate(
        {"one start": "one random start", "several starts": f"worst of {args.restarts} starts"}.items()
    ):
        values = [100 * row[key] for row in table]
        ax.plot([row["steps"] for row in table], values, marker="o", label=label, **line_style(index))
    ax.set_xscale("log")
    ax.set_xticks([row["steps"] for row in table], [str(row["steps"]) for row in table])
    ax.minorticks_off()
    ax.set(xlabel="steps of PGD", ylabel=f"accuracy on {n:,} test images (%)")
    ax.set_ylim(-1, 1 + 110 * max(row[key] for row in table for key in ("one start", "several starts")))
    ax.legend()
    first, last = table[0], table[-1]
    figure.suptitle(
        f"{about}, ε = {args.eps:g}/255: {first['steps']} step leaves {first['one start']:.1%},\n"
        f"{last['steps']} leave {last['one start']:.1%}, from {args.restarts} starts {last['several starts']:.1%}"
    )
    return figure


def draw_checks(checks: list[dict], about: str):
    """The list of checks: what should be seen, what was measured."""
    figure, axes = new_figure(width=8.6, height=0.42 * len(checks) + 1.0)
    ax = axes[0, 0]
    ax.axis("off")
    for at, row in enumerate(checks):
        sign, color = ("✓", COLORS[2]) if row["passes"] else ("✗", COLORS[1])
        ax.text(0.0, at, sign, color=color, fontsize=13, va="center")
        ax.text(0.05, at, row["check"], va="center")
        ax.text(0.62, at, row["measured"], va="center")
    ax.set(xlim=(0, 1), ylim=(len(checks) - 0.5, -0.6))
    passed = sum(row["passes"] for row in checks)
    hidden = "no sign that it hides its gradient" if passed == len(checks) else "see which ones fail"
    figure.suptitle(f"{about}: {passed} of {len(checks)} checks hold, {hidden}")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
