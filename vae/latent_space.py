"""What lies where in the latent space, and which of its dimensions does the autoencoder use?

    python vae/latent_space.py
    python vae/latent_space.py --ckpt runs/vae/train_z2_long/best.pth --out runs/vae/latent_space_z2

Posterior means mu(x) of the test images, coloured by class; the decoder's images over a plane of latents; the path from
one image to another, through the latents and through the pixels; and each latent moved alone. With more than two
latents the plane is that of the two directions in which the means vary most (principal components).

A latent is active when its mean depends on the image: A_u = Var_x (mu_u(x)) > 0.01. Its cost is its share of the
KL, ½ (mu² + e^log_var − 1 − log_var), averaged over the images.

Writes latent_means.png, manifold.png, interpolation.png, traversals.png, metrics.json.
Sources: Kingma and Welling 2014; Burda, Grosse and Salakhutdinov 2016 for active units.
Shapes: N test images, d latents, S steps, 196 pixels.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from shared_utils.cli import UserError, make_parser, non_negative_int, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, image_grid, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything
from vae.fitting import active_units
from vae.inputs import SIDE, Inputs, add_data_flags, load_binary
from vae.model import VAE, add_ckpt_flag, kl_to_prior, load_model

STEPS = 11  # of an interpolation or a traversal
REACH = 3.0  # of a traversal, in standard deviations of the prior
NEIGHBOURS = 5
POINTS = 2000  # drawn of the posterior means


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, quick={"per_class": 100, "val_size": 100})
    add_data_flags(parser)
    add_ckpt_flag(parser)
    parser.add_argument(
        "--pair",
        type=non_negative_int,
        nargs=2,
        metavar=("A", "B"),
        help="test images to interpolate between (default: the first of each class, in pairs)",
    )
    parser.add_argument("--side", type=positive_int, default=20, help="images along each side of the manifold")
    return parser


@torch.inference_mode()
def main(argv=None) -> dict:
    """Measure and draw; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    model = load_model(args, device)
    data = load_binary(args)
    pairs = choose_pairs(data, args.pair)
    run = start_run(args)
    seed_everything(args.seed)

    x_train, x_test = (torch.from_numpy(x).to(device) for x in (data.x_train, data.x_test))
    mu_train, _ = model.encode(x_train)
    mu, log_var = model.encode(x_test)  # (N, d) each
    units = {
        "active": active_units(model, x_test).cpu().numpy(),  # (d,)
        "variance": mu.var(0, correction=0).cpu().numpy(),
        "kl": kl_to_prior(mu.unsqueeze(-1), log_var.unsqueeze(-1)).mean(0).cpu().numpy(),  # (N, d, 1) → (N, d) → (d,)
    }
    neighbours = {
        "latents": knn_accuracy(mu_train.cpu().numpy(), mu.cpu().numpy(), data),
        "pixels": knn_accuracy(data.x_train, data.x_test, data),
    }
    plane = Plane.of(mu)

    title = f"{data.title}, {model.size}"
    save_figure(draw_means(mu, plane, data, neighbours, title), run.path("latent_means.png"))
    save_figure(draw_manifold(model, plane, args.side, title), run.path("manifold.png"))
    save_figure(draw_interpolation(model, x_test[pairs], title), run.path("interpolation.png"))
    save_figure(draw_traversals(model, mu, units, title), run.path("traversals.png"))
    return run.finish(
        {
            "z_dim": model.z_dim,
            "test_images": len(mu),
            "active_units": int(units["active"].sum()),
            "variance_of_means": units["variance"],
            "kl_of_units": units["kl"],
            "variance_in_the_plane": plane.share,
            "knn_accuracy": neighbours,
        }
    )


def choose_pairs(data: Inputs, pair: list[int] | None) -> np.ndarray:
    """Positions of test images to interpolate between, (P, 2): as asked for, or the first of each class, in pairs."""
    if pair is None:
        first = np.unique(data.y_test, return_index=True)[1]
        if len(first) < 2:
            raise UserError("the test images are of one class alone: give --pair A B")
        return first[: len(first) // 2 * 2].reshape(-1, 2)
    if max(pair) >= len(data.x_test):
        raise UserError(f"--pair {max(pair)}: there are {len(data.x_test)} test images, counted from 0")
    return np.array([pair])


def knn_accuracy(train: np.ndarray, test: np.ndarray, data: Inputs) -> float:
    """How often the majority class of a test point's nearest training points is its own: (N, D), (M, D)."""
    return float(KNeighborsClassifier(min(NEIGHBOURS, len(train))).fit(train, data.y_train).score(test, data.y_test))


@dataclass(frozen=True)
class Plane:
    """A plane in the latent space: origin (d,), orthonormal directions (2, d), and the share of variance within."""

    origin: Tensor
    directions: Tensor
    share: float
    labels: tuple[str, str]

    @classmethod
    def of(cls, mu: Tensor) -> "Plane":
        """The two latents themselves, or the two principal components of more (of one: itself and nothing)."""
        d = mu.shape[1]
        if d <= 2:
            return cls(
                torch.zeros_like(mu[0]), torch.eye(2, d).to(mu), 1.0, ("z₁", "z₂" if d == 2 else "(no second latent)")
            )
        origin = mu.mean(0)
        _, deviations, directions = torch.linalg.svd(mu - origin, full_matrices=False)
        share = float((deviations[:2] ** 2).sum() / (deviations**2).sum())
        return cls(origin, directions[:2], share, ("first principal component", "second principal component"))

    def coordinates(self, z: Tensor) -> np.ndarray:
        """z (N, d) → (N, 2)."""
        return ((z - self.origin) @ self.directions.T).cpu().numpy()

    def points(self, at: np.ndarray) -> Tensor:
        """Coordinates (N, 2) → z (N, d)."""
        return self.origin + torch.from_numpy(at).to(self.directions) @ self.directions


def draw_means(mu: Tensor, plane: Plane, data: Inputs, neighbours: dict[str, float], title: str):
    """Posterior means of test images in the plane, each as the character of its class where that is one character."""
    figure, axes = new_figure(width=8.2, height=7.6)
    ax, at, y = axes[0, 0], plane.coordinates(mu[:POINTS]), data.y_test[:POINTS]
    for label, name in enumerate(data.classes):
        marker = f"${name}$" if len(name) == 1 else "o"
        color = COLORS[label % 7]  # without the yellow, which is invisible on white
        ax.scatter(*at[y == label].T, s=28, marker=marker, color=color, linewidth=0.2, label=name)
    ax.set(xlabel=f"{plane.labels[0]} of the posterior mean", ylabel=f"{plane.labels[1]}", aspect="equal")
    ax.legend(title="class", loc="center left", bbox_to_anchor=(1.0, 0.5))
    found = f"{NEIGHBOURS} nearest neighbours tell the class in {neighbours['latents']:.1%} from the latents"
    figure.suptitle(f"{title}\n{found}, in {neighbours['pixels']:.1%} from the pixels")
    return figure


def draw_manifold(model: VAE, plane: Plane, side: int, title: str):
    """What the decoder draws over the plane, at equal steps of the prior's probability along both directions."""
    figure, axes = new_figure(width=7.4, height=7.9)
    at = np.array([NormalDist().inv_cdf((i + 0.5) / side) for i in range(side)])  # (side,), in standard deviations
    second, first = np.meshgrid(at[::-1], at, indexing="ij")  # row by row from the top
    z = plane.points(np.stack([first.ravel(), second.ravel()], axis=1))  # (side², d)
    images = model.decode(z).sigmoid().cpu().numpy().reshape(-1, SIDE, SIDE)
    ax = axes[0, 0]
    image_grid(ax, images, side, vmin=0, vmax=1)
    ax.axis("on")
    ends, middle = ((SIDE - 1) / 2, side * (SIDE + 1) - 1 - (SIDE + 1) / 2), (side * (SIDE + 1) - 1) / 2
    ticks = (ends[0], middle, ends[1])
    ax.set_xticks(ticks, [f"{v:.1f}" for v in (at[0], 0, at[-1])])
    ax.set_yticks(ticks, [f"{v:.1f}" for v in (at[-1], 0, at[0])])
    ax.grid(False)
    ax.set(xlabel=f"{plane.labels[0]} (standard deviations of the prior)", ylabel=plane.labels[1])
    held = "" if plane.share == 1 else f" that holds {plane.share:.0%} of the means' variance"
    figure.suptitle(f"{title}\nthe decoder's images over the plane{held}")
    return figure


def draw_interpolation(model: VAE, x: Tensor, title: str):
    """Between the images of each pair, x (P, 2, 196): mixed as latents and decoded, and mixed as pixels."""
    t = torch.linspace(0, 1, STEPS, device=x.device)[:, None]  # (S, 1)
    rows = []
    for first, last in x:
        (z_first, z_last), _ = model.encode(torch.stack([first, last]))
        rows += [model.decode((1 - t) * z_first + t * z_last).sigmoid(), (1 - t) * first + t * last]  # (S, 196) each
    images = torch.cat(rows).cpu().numpy().reshape(-1, SIDE, SIDE)
    figure, axes = new_figure(width=7.6, height=0.62 * len(rows) + 1.0)
    ax = axes[0, 0]
    image_grid(ax, images, STEPS, vmin=0, vmax=1)
    for row in range(len(rows)):
        ax.text(-2, 7 + row * (SIDE + 1), ("latents", "pixels")[row % 2], ha="right", va="center", fontsize=9)
    halfway = images[STEPS // 2 :: STEPS]  # (2 P, 14, 14)
    through, mixed = (((part > 0.1) & (part < 0.9)).mean() for part in (halfway[::2], halfway[1::2]))
    finding = f"halfway {through:.0%} of the pixels are undecided through the latents, {mixed:.0%} through the pixels"
    figure.suptitle(f"{title}\n{finding}")
    return figure


def draw_traversals(model: VAE, mu: Tensor, units: dict[str, np.ndarray], title: str):
    """Each latent moved alone from −3 to 3, the others at their mean, the costliest first; beside it its KL."""
    order = np.argsort(-units["kl"], kind="stable")
    along = torch.linspace(-REACH, REACH, STEPS, device=mu.device)  # (S,)
    z = mu.mean(0).repeat(len(order), STEPS, 1)  # (d, S, d)
    for row, unit in enumerate(order):
        z[row, :, unit] = along
    images = model.decode(z).sigmoid().reshape(-1, SIDE, SIDE).cpu().numpy()  # (d S, 14, 14)
    figure, axes = new_figure(1, 2, width=10.5, height=0.55 * len(order) + 1.6, width_ratios=(1.6, 1))
    ax, bars = axes[0]
    image_grid(ax, images, STEPS, vmin=0, vmax=1)
    for row, unit in enumerate(order):
        ax.text(-2, 7 + row * (SIDE + 1), f"z{unit + 1}", ha="right", va="center", fontsize=9)
    ax.set_title(f"from −{REACH:g} to {REACH:g}, the others at their mean")
    colors = [COLORS[0] if units["active"][unit] else "#999999" for unit in order]
    bars.barh(range(len(order)), units["kl"][order], color=colors)
    for row, unit in enumerate(order):
        bars.text(
            units["kl"][unit], row, f" variance of the mean {units['variance'][unit]:.2g}", va="center", fontsize=8
        )
    bars.set_yticks(range(len(order)), [f"z{unit + 1}" for unit in order])
    bars.invert_yaxis()
    bars.grid(False, axis="y")
    bars.set(xlabel="KL (nats per test image)", xlim=(0, 1.6 * max(units["kl"].max(), 1e-3)))
    figure.suptitle(f"{title}: {units['active'].sum()} of {len(order)} latents are active (grey: not)")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
