"""How many steps are enough, and which solver makes the most of them?

    python ddpm/fid_vs_steps.py --amp
    python ddpm/fid_vs_steps.py --steps 5 10 20 --n 10000 --without-ddpm --amp --out runs/ddpm/fid_few_steps

The same network, the same number of images, and at each number of steps DDIM and DPM-Solver++; DDPM, which takes all of
them, beside them once. Each point is the Fréchet distance of `--n` samples to the test images in the features of a
classifier trained here (features.py), and the seconds that drawing them took. The distance falls with the number of
images, of real ones too: the floor is that of as many images that were held out.

Writes fid_vs_steps.png, history.csv, metrics.json. Model: train_ddpm.py.
With --resume a study that was stopped goes on where it was.
Sources: Ho, Jain and Abbeel 2020; Song, Meng and Ermon 2021; Lu et al. 2022; Heusel et al. 2017.
"""

import numpy as np
import torch

from ddpm.checkpoints import load_model
from ddpm.features import frechet_distance, seen, trained
from ddpm.inputs import add_data_flags, load
from ddpm.sampling import NAMES, draw_all
from shared_utils.cli import UserError, make_parser, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, line_style, new_figure, save_figure
from shared_utils.runs import start_run


def build_parser():
    """The command line."""
    quick = {"epochs": 1, "steps": [2, 4], "n": 20, "batch_size": 10}
    parser = make_parser(__doc__, quick=quick)
    add_data_flags(parser)
    parser.add_argument("--ckpt", metavar="FILE", help="a trained model (default: train_ddpm.py's ema.pth)")
    parser.add_argument("--steps", type=positive_int, nargs="+", default=[10, 20, 50, 100, 250], help="of the solvers")
    parser.add_argument("--n", type=positive_int, default=2000, help="images of each point")
    parser.add_argument("--without-ddpm", action="store_true", help="leave out the one that takes all steps")
    parser.add_argument("--epochs", type=positive_int, default=5, help="of the classifier")
    parser.add_argument("--batch-size", type=positive_int, default=250, help="images drawn together")
    parser.add_argument("--amp", action="store_true", help="draw in bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on where a stopped study was")
    return parser


def main(argv=None) -> dict:
    """Draw with every sampler and number of steps, measure; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    data = load(args)
    model, diffusion, _ = load_model(args, device, len(data.val))
    steps = sorted(set(args.steps))
    for each in steps:
        diffusion.steps_of(each)  # refuses more than there are
    if args.n < 2 or args.n > len(data.val):
        raise UserError(f"--n {args.n}: the floor needs as many held-out images, 2 to {len(data.val)}")
    run = start_run(args)
    classifier = trained(data.train, len(data.classes), args.epochs, args.seed, device)
    test, _ = seen(classifier, data.test.x)
    floor = frechet_distance(seen(classifier, data.val.x[: args.n])[0], test)
    points = [(sampler, each) for sampler in ("dpm", "ddim") for each in steps]
    points += [] if args.without_ddpm else [("ddpm", diffusion.timesteps)]
    done = {(row["sampler"], int(row["steps"])) for row in run.history()}
    no_labels = np.full(args.n, -1)
    for sampler, each in points:
        if (sampler, each) in done:
            continue
        torch.manual_seed(args.seed)
        images, seconds = draw_all(diffusion, model, no_labels, sampler, each, args, device)
        distance = frechet_distance(seen(classifier, images)[0], test)
        run.log(sampler=sampler, steps=each, frechet=distance, times_the_floor=distance / floor, seconds=seconds)
    rows = [
        {**row, "steps": int(row["steps"]), **{k: float(row[k]) for k in ("frechet", "times_the_floor", "seconds")}}
        for row in run.history()
    ]
    outcome = findings(rows)
    save_figure(draw(rows, floor, outcome, args.n, data.title), run.path("fid_vs_steps.png"))
    return run.finish({"n": args.n, "floor": floor, **outcome, "points": rows})


def findings(rows: list[dict]) -> dict:
    """The best point, and the fewest steps of each solver that come within 15 % of it."""
    best = min(rows, key=lambda row: row["frechet"])
    found = {"best_sampler": best["sampler"], "best_steps": best["steps"], "best": best["frechet"]}
    for sampler in ("ddim", "dpm"):
        near = [row["steps"] for row in rows if row["sampler"] == sampler and row["frechet"] <= 1.15 * best["frechet"]]
        found[f"{sampler}_steps_near_the_best"] = min(near, default=None)
    return found


def draw(rows: list[dict], floor: float, outcome: dict, n: int, title: str):
    """The distance against steps, and against seconds."""
    figure, axes = new_figure(1, 2, width=10.4, height=4.4, sharey=True)
    for ax, key, label in zip(axes[0], ("steps", "seconds"), ("steps", f"seconds for {n:,} images"), strict=True):
        for index, (sampler, name) in enumerate(NAMES.items()):
            mine = [row for row in rows if row["sampler"] == sampler]
            if mine:
                style = line_style(index)
                ax.plot([row[key] for row in mine], [row["frechet"] for row in mine], marker="o", label=name, **style)
        ax.axhline(floor, color=COLORS[-1], linewidth=1, linestyle=":", label="as many real images")
        ax.set(xscale="log", yscale="log", xlabel=label)
    axes[0, 0].set_ylabel("Fréchet distance to the test images")
    axes[0, 0].legend()
    said = (
        f"{NAMES[sampler]} {outcome[f'{sampler}_steps_near_the_best'] or 'none of its'} steps"
        for sampler in ("dpm", "ddim")
    )
    figure.suptitle(
        f"{title}: the best is {outcome['best']:.3f}, {outcome['best_steps']} steps of "
        f"{NAMES[outcome['best_sampler']]};\nwithin 15 % of it: {', '.join(said)}"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
