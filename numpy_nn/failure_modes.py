"""Which faults make a sound little network look hopeless?

    python numpy_nn/failure_modes.py

A student project's report gives 40 to 60 % for PatchEmbedding → ReLU → Linear and blames its depth. Here the same
network is trained as it should be, and with faults that can give such numbers: a ReLU on the logits (instead of between
the layers), weights much larger than He's σ = sqrt(2 / fan_in), both (three draws of the weights), and unscaled pixels.
σ = 0.5 was picked because it lands there; alone it is the control. Same batches, same learning rate, 10,000 updates.
Where both faults meet, rounding decides: another machine's numbers differ.

Writes failure_modes.png, history.csv, metrics.json.
"""

import numpy as np

from numpy_nn.activations import ReLU
from numpy_nn.embedding import batch_order, embedding_network, stepper
from numpy_nn.inputs import Inputs, load_inputs
from numpy_nn.losses import NotFinite
from numpy_nn.network import Sequential
from shared_utils.cli import make_parser, positive_float, positive_int, run_main
from shared_utils.plotting import line_style, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything

SOUND = "as it should be"


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, device=False, quick={"updates": 400, "every": 50})
    parser.add_argument("--updates", type=positive_int, default=10_000, help="updates of each network")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images per update")
    parser.add_argument("--lr", type=positive_float, default=0.1, help="learning rate")
    parser.add_argument("--every", type=positive_int, default=250, help="updates between two validations")
    return parser


def networks(n_classes: int, seed: int) -> dict[str, tuple[Sequential, float]]:
    """Name → (network, factor on the input): the network as it should be, and with one fault or two."""

    def fresh() -> Sequential:
        return embedding_network(np.random.default_rng(seed), n_classes)

    def on_logits() -> Sequential:
        embedding, _, flatten, linear = fresh().layers
        return Sequential(embedding, flatten, linear, ReLU())

    def wide(network: Sequential, deviation: float, draw: int = 0) -> Sequential:
        rng = np.random.default_rng([seed, draw])
        for layer in network.layers:
            if "W" in layer.params:
                shape = layer.params["W"].shape
                layer.params["W"] = (deviation * rng.standard_normal(shape)).astype(np.float32)
        return network

    return {
        SOUND: (fresh(), 1.0),
        "ReLU on the logits": (on_logits(), 1.0),
        "weights of σ = 1": (wide(fresh(), 1.0), 1.0),
        **{f"both, σ = 0.5, draw {draw}": (wide(on_logits(), 0.5, draw), 1.0) for draw in (1, 2, 3)},
        "weights of σ = 0.5 alone, draw 1": (wide(fresh(), 0.5, 1), 1.0),
        "standardised pixels × 80": (fresh(), 80.0),
    }


def logits_of(network: Sequential, x: np.ndarray) -> np.ndarray:
    """The network's output (N, K) for x, with 0 for what is not finite."""
    for layer in network.layers:
        x = layer.forward(x)
    return np.nan_to_num(x, posinf=0, neginf=0)


def train(network: Sequential, factor: float, data: Inputs, args) -> tuple[list[int], list[float], int | None]:
    """Train; returns the updates looked at, the validation errors there, and the update at which it diverged."""
    order = batch_order(len(data.x_train), args.updates, args.batch_size, args.seed)
    step = stepper(network, data.x_train * np.float32(factor), data.y_train, args.lr)
    x_val = data.x_val * np.float32(factor)

    def error_on_validation() -> float:
        return float((logits_of(network, x_val).argmax(1) != data.y_val).mean())

    at, errors = [0], [error_on_validation()]
    for number, batch in enumerate(order, start=1):
        try:
            step(batch)
        except NotFinite:  # the loss is no longer finite: that is the finding
            return at, errors, number
        if number % args.every == 0:
            at.append(number)
            errors.append(error_on_validation())
    return at, errors, None


def main(argv=None) -> dict:
    """Train every network; returns the metrics."""
    args = build_parser().parse_args(argv)
    seed_everything(args.seed)
    data = load_inputs(args)
    run = start_run(args)
    rows, courses = [], {}
    with np.errstate(over="ignore", invalid="ignore"):
        for name, (network, factor) in networks(len(data.classes), args.seed).items():
            at, errors, blown = train(network, factor, data, args)
            logits = logits_of(network, data.x_test * np.float32(factor))  # (N, K)
            test = float((logits.argmax(1) == data.y_test).mean())
            dead = int((logits.max(0) <= 0).sum())  # classes whose logit is never above zero
            courses[name] = (at, errors)
            rows.append(
                {"network": name, "test_accuracy": test, "classes_never_above_zero": dead, "diverged_at": blown}
            )
            run.log(network=name, test_accuracy=test, classes_never_above_zero=dead, diverged_at=blown)
    save_figure(draw(courses, rows, data.title), run.path("failure_modes.png"))
    return run.finish({"updates": args.updates, "networks": rows})


def draw(courses: dict, rows: list[dict], title: str):
    """Validation error of every network against updates."""
    accuracies = {row["network"]: row["test_accuracy"] for row in rows}
    diverged = {row["network"]: row["diverged_at"] for row in rows}
    worst = min(accuracies.values())
    figure, axes = new_figure(
        width=8,
        height=5,
        title=f"{title}: faults take the same network from {accuracies[SOUND]:.1%} down to {worst:.1%}",
    )
    for index, (name, (at, errors)) in enumerate(courses.items()):
        style = {**line_style(index), "marker": "x" if len(at) == 1 else None}
        label = f"{name}: {accuracies[name]:.1%} on the test images" + (", diverged" if diverged[name] else "")
        axes[0, 0].plot(at, [100 * error for error in errors], label=label, **style)
    axes[0, 0].set(xlabel="update", ylabel="validation error (%)", yscale="log")
    axes[0, 0].set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
    axes[0, 0].minorticks_off()
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
