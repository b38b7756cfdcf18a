"""How many steps are enough, and which solver makes the most of them?

    python ddpm/fid_vs_steps.py --amp
    python ddpm/fid_vs_steps.py --steps 5 10 20 --n 10000 --without-ddpm --amp --out runs/ddpm/fid_few_steps

The same network draws as many images with each number of steps of DPM-Solver++ and DDIM, each at its usual ones (DDIM's
are even in t, DPM-Solver++'s in λ: diffusion.py), and of DDIM with as much noise as DDPM adds (η = 1), which undoes
errors of earlier steps; and once with DDPM itself, which takes all steps. Each point is the Fréchet distance of `--n`
samples to the test images in the features of a classifier trained here (features.py), its standard error, and the
seconds that drawing them took. The distance falls as the number of images grows, even for real ones: the floor is that
of as many held-out images.

Writes fid_vs_steps.png, last.pth (the classifier), history.csv, metrics.json. Model: train_ddpm.py.
With --resume a study that was stopped goes on where it was, with the same classifier.
Sources: Ho, Jain and Abbeel 2020; Song, Meng and Ermon 2021; Lu et al. 2022; Heusel et al. 2017.
"""

import argparse

import numpy as np
import torch

from ddpm.checkpoints import add_ckpt_flag, fingerprint, load_model
from ddpm.features import Classifier, frechet_distance, frechet_error, seen, trained
from ddpm.inputs import FEWEST, Data, add_data_flags, load
from ddpm.sampling import draw_all
from shared_utils import checkpoint
from shared_utils.cli import UserError, add_amp, make_parser, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import line_style, new_figure, save_figure
from shared_utils.runs import Run, start_run

DDPM = "DDPM"
SERIES = {  # sampling.py's sampler and η
    "DPM-Solver++": ("dpm", 0.0),
    "DDIM": ("ddim", 0.0),
    "DDIM, η = 1": ("ddim", 1.0),
    DDPM: ("ddpm", 0.0),
}


def build_parser():
    """The command line."""
    quick = {"epochs": 1, "steps": [2, 4], "n": 20, "batch_size": 10}
    parser = make_parser(__doc__, quick=quick)
    add_data_flags(parser)
    add_ckpt_flag(parser)
    parser.add_argument("--steps", type=positive_int, nargs="+", default=[10, 20, 50, 100, 250], help="of the solvers")
    parser.add_argument("--n", type=positive_int, default=2000, help="images drawn for each point")
    parser.add_argument("--without-ddpm", action="store_true", help="leave out DDPM, which takes all steps")
    parser.add_argument("--epochs", type=positive_int, default=5, help="of the classifier")
    parser.add_argument("--batch-size", type=positive_int, default=250, help="images drawn together")
    add_amp(parser, "draw in bfloat16")
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
    if not FEWEST <= args.n <= len(data.val):
        raise UserError(f"--n {args.n}: the floor needs as many held-out images, {FEWEST} to {len(data.val)}")
    run = start_run(args)
    classifier = judge(args, run, data, fingerprint(model), device)
    test, _ = seen(classifier, data.test.x)
    floor = frechet_distance(seen(classifier, data.val.x[: args.n])[0], test)
    points = [(name, each) for name in SERIES if name != DDPM for each in steps]
    points += [] if args.without_ddpm else [(DDPM, diffusion.timesteps)]
    no_labels = np.full(args.n, -1)
    draw_all(diffusion, model, no_labels[: args.batch_size], "dpm", steps[0], args, device)  # warms up, is not timed
    for name, each in points:
        if run.row(sampler=name, steps=each):
            continue
        torch.manual_seed(args.seed)
        sampler, eta = SERIES[name]
        images, seconds = draw_all(diffusion, model, no_labels, sampler, each, args, device, eta=eta)
        features, _ = seen(classifier, images)
        distance, error = frechet_distance(features, test), frechet_error(features, test)
        row = {"sampler": name, "steps": each, "frechet": distance, "standard_error": error}
        run.log(**row, times_the_floor=distance / floor, seconds=seconds)
    rows = []
    for row in run.history():
        numbers = {name: float(value) for name, value in row.items() if name != "sampler"}
        rows.append({"sampler": row["sampler"], **numbers, "steps": int(row["steps"])})
    outcome = findings(rows)
    save_figure(draw(rows, floor, outcome, args.n, data.title), run.path("fid_vs_steps.png"))
    return run.finish({"n": args.n, "floor": floor, **outcome, "points": rows})


def judge(args: argparse.Namespace, run: Run, data: Data, model: str, device: torch.device) -> Classifier:
    """The classifier whose features are compared: trained, or, with --resume, that of the stopped study."""
    path, about = run.path("last.pth"), {"model": model}
    if args.resume and path.exists():
        classifier = Classifier(data.train.x.shape[1], len(data.classes)).to(device, memory_format=torch.channels_last)
        classifier.load_state_dict(checkpoint.load(path, device=device, expect=about)["classifier"])
        return classifier.eval()
    run.rewind(0)
    classifier = trained(data.train, len(data.classes), args.epochs, args.seed, device)
    checkpoint.save(path, config=about, classifier=classifier.state_dict())
    return classifier


def findings(rows: list[dict]) -> dict:
    """DDPM's distance, or the best where it was left out, and how the others compare with it.

    near: each sampler's fewest steps within 15 % of it. ratio_of_50: its distance at 50 steps, as a multiple of that.
    best_ratio: the smallest such multiple.
    """
    all_steps = [row for row in rows if row["sampler"] == DDPM]
    measure = all_steps[0] if all_steps else min(rows, key=lambda row: row["frechet"])
    found = {"compared_with": f"{measure['steps']} steps of {measure['sampler']}", "compared": measure["frechet"]}
    found |= {"near": {}, "ratio_of_50": {}, "best_ratio": {}}
    for name in dict.fromkeys(row["sampler"] for row in rows if row["sampler"] != DDPM):
        ratio = {row["steps"]: row["frechet"] / measure["frechet"] for row in rows if row["sampler"] == name}
        near = [steps for steps, each in ratio.items() if each <= 1.15]
        found["near"][name] = f"{min(near)} steps" if near else "no number of steps tried"
        found["ratio_of_50"][name], found["best_ratio"][name] = ratio.get(50), min(ratio.values())
    return found


def draw(rows: list[dict], floor: float, outcome: dict, n: int, title: str):
    """The distance against steps, and against seconds."""
    figure, axes = new_figure(1, 2, width=10.4, height=4.4, sharey=True)
    for ax, key, label in zip(axes[0], ("steps", "seconds"), ("steps", f"seconds for {n:,} images"), strict=True):
        for index, name in enumerate(SERIES):
            mine = [row for row in rows if row["sampler"] == name]
            if mine:
                x, y, error = (np.array([row[what] for row in mine]) for what in (key, "frechet", "standard_error"))
                ax.errorbar(x, y, error, marker="o", capsize=2, label=name, **line_style(index))
        ax.axhline(floor, color="#777777", linewidth=1.2, linestyle=":", label="as many real images")
        ax.set(xscale="log", yscale="log", xlabel=label)
    axes[0, 0].set_ylabel("Fréchet distance to the test images")
    axes[0, 0].legend()
    said = "; ".join(f"{name} with {near}" for name, near in outcome["near"].items())
    figure.suptitle(
        f"{title}: {outcome['compared_with']} give {outcome['compared']:.3f}\nwithin 15 % of that, or below: {said}"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
