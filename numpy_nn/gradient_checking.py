"""Are the gradients right, how precisely can one tell, and would the checks notice if they were not?

    python numpy_nn/gradient_checking.py
    python numpy_nn/gradient_checking.py --h 1e-3

1. Every layer, loss and network: the relative error of its gradients by central differences (h = 1e-5) and by the
   complex step (h = 1e-30), in float64, for a random upstream gradient.
2. The error against h: truncation falls with h (h² central, h one-sided), round-off grows as 2.2e-16 / h, a kink of a
   ReLU between x − h and x + h spoils both; the complex step has truncation alone, and at a tiny h none.
3. Classic bugs planted one at a time (mutations.py) and seven checks asked about each: the two above; the same numbers
   by plain loops and formulas; one example alone in evaluation mode; the batch twice over, which must change nothing;
   a first step that lowers the loss; 16 examples learnt by heart. A check that correct code fails is a false alarm.

Writes gradient_errors.png, gradcheck_h.png, mutation_table.png, gradient_checks.csv, mutations.csv, metrics.json.
Source: CS231n notes, "Gradient checks"; Squire and Trapp 1998 for the complex step.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from numpy_nn.checks import CHECKS, COMPLEX_BAR, FINITE_BAR, PLAIN, central_differences, complex_steps, learns_by_heart
from numpy_nn.complex_step import build_cases, central_difference, complex_step, gradient_errors, one_sided_difference
from numpy_nn.mutations import Mutation, build_mutations, planted
from shared_utils.cli import make_parser, positive_float, positive_int, run_main
from shared_utils.plotting import COLORS, DASHES, line_style, new_figure, save_figure
from shared_utils.runs import start_run, write_csv
from shared_utils.seeding import seed_everything

FLOOR = 1e-17  # errors below it are drawn there: some are exactly 0
SHOWN = {True: "passes", False: "caught", None: "not applicable"}
EPSILON = float(np.finfo(np.float64).eps)


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None, device=False, quick={"per_decade": 1})
    parser.add_argument("--h", type=positive_float, default=1e-5, help="step of the central differences")
    parser.add_argument("--complex-h", type=positive_float, default=1e-30, help="step of the complex step")
    parser.add_argument("--updates", type=positive_int, default=100, help="updates to learn 16 examples by heart")
    parser.add_argument("--per-decade", type=positive_int, default=2, help="values of h a decade in gradcheck_h.png")
    return parser


def table_of_errors(seed: int, h: float, complex_h: float) -> list[dict]:
    """A row per case: the worst relative error of its gradients by both methods."""
    rows = []
    for case in build_cases(seed):
        central, exact = (
            max(gradient_errors(case, method, step, np.random.default_rng([seed, 2])).values())
            for method, step in ((central_difference, h), (complex_step, complex_h))
        )
        numbers = sum(holder[key].size for holder, key in case.places.values())
        rows.append({"case": case.name, "numbers": numbers, "central_differences": central, "complex_step": exact})
    return rows


def sweep_h(seed: int, per_decade: int) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Network → method → (h, relative error of the first layer's dW), from h = 0.1 down; for two networks."""
    differences, found = 10.0 ** -np.arange(1, 16.01, 1 / per_decade), {}
    methods = {
        central_difference: differences,
        one_sided_difference: differences,
        complex_step: 0.1 ** np.arange(1, 32, 2),
    }
    for case in build_cases(seed, "Sequential"):
        if case.name.startswith("Patch"):
            continue
        case, found[case.name] = replace(case, places={"0.W": case.places["0.W"]}), {}
        for method, hs in methods.items():
            errors = [gradient_errors(case, method, h, np.random.default_rng([seed, 2]))["0.W"] for h in hs]
            found[case.name][method.__name__.replace("one_s", "one-s").replace("_", " ")] = list(
                zip(hs.tolist(), errors, strict=True)
            )
    return found


def verdict(check: Callable, subject: str, **settings) -> bool | None:
    """What the check says of the library as it now is; an exception is a bug found too."""
    try:
        with np.errstate(all="ignore"):
            answer = check(subject, **settings)
    except Exception:
        return False
    return None if answer is None else bool(answer)


def judge(args) -> tuple[list[tuple[Mutation, list[bool | None]]], list[str]]:
    """Each mutation with every check's verdict, and the false alarms (checks that the true library fails)."""
    own = {central_differences: {"h": args.h}, complex_steps: {"h": args.complex_h}}
    own[learns_by_heart] = {"updates": args.updates}

    def verdicts(subject: str) -> list[bool | None]:
        return [verdict(check, subject, seed=args.seed, **own.get(check, {})) for check in CHECKS.values()]

    alarms = [
        f"{subject}: {check}"
        for subject in PLAIN
        for check, passed in zip(CHECKS, verdicts(subject), strict=True)
        if passed is False
    ]
    judged = []
    for mutation in build_mutations():
        with planted(mutation):
            judged.append((mutation, verdicts(mutation.subject)))
    return judged, alarms


def main(argv=None) -> dict:
    """Check, sweep, plant; returns the metrics."""
    args = build_parser().parse_args(argv)
    seed_everything(args.seed)
    run = start_run(args)

    rows = table_of_errors(args.seed, args.h, args.complex_h)
    for row in rows:
        print("  ".join(f"{value:.1e}" if isinstance(value, float) else f"{value:<32}" for value in row.values()))
    write_csv(run.path("gradient_checks.csv"), rows)
    save_figure(draw_errors(rows, args), run.path("gradient_errors.png"))

    sweeps = sweep_h(args.seed, args.per_decade)
    save_figure(draw_sweeps(sweeps), run.path("gradcheck_h.png"))

    judged, alarms = judge(args)
    names = [name.replace("\n", " ") for name in CHECKS]
    table = [
        {"subject": m.subject, "bug": m.name, **{name: SHOWN[v] for name, v in zip(names, verdicts, strict=True)}}
        for m, verdicts in judged
    ]
    for row in table:
        by = [name for name in names if row[name] == "caught"]
        print(f"{row['subject']:<20} {row['bug']:<38} {', '.join(by) or 'NOT CAUGHT'}")
    for alarm in alarms:
        print(f"false alarm: {alarm}")
    write_csv(run.path("mutations.csv"), table)
    save_figure(draw_mutations(judged), run.path("mutation_table.png"), dpi=100)

    outcomes = np.array([[{True: 0, False: 1, None: -1}[v] for v in verdicts] for _, verdicts in judged])
    best = {}
    for name, methods in sweeps.items():
        best[name] = {
            method: dict(zip(("h", "error"), min(p, key=lambda q: q[1]), strict=True)) for method, p in methods.items()
        }
    return run.finish(
        {
            "cases": len(rows),
            "numbers": sum(row["numbers"] for row in rows),
            "worst_central": max(row["central_differences"] for row in rows),
            "worst_complex": max(row["complex_step"] for row in rows),
            "best_h": best,
            "mutations": len(judged),
            "caught": int((outcomes == 1).any(1).sum()),
            "caught_by": dict(zip(names, (outcomes == 1).sum(0), strict=True)),
            "applicable": dict(zip(names, (outcomes >= 0).sum(0), strict=True)),
            "false_alarms": len(alarms),
            "rows": rows,
        }
    )


def draw_errors(rows: list[dict], args):
    """The two errors of every case on a logarithmic scale, with the bars they must stay below."""
    worst = [max(row[key] for row in rows) for key in ("central_differences", "complex_step")]
    title = (
        f"{len(rows)} backward passes agree with central differences to {worst[0]:.0e}, "
        f"with the complex step to {worst[1]:.0e}"
    )
    figure, axes = new_figure(width=9, height=7, title=title)
    ax, places = axes[0, 0], np.arange(len(rows))
    methods = (
        ("central_differences", f"central differences, h = {args.h:.0e}", FINITE_BAR, "o"),
        ("complex_step", f"complex step, h = {args.complex_h:.0e}", COMPLEX_BAR, "D"),
    )
    for index, (key, label, bar, marker) in enumerate(methods):
        errors = np.maximum([row[key] for row in rows], FLOOR)
        ax.plot(errors, places, marker, color=COLORS[index], label=label)
        ax.axvline(bar, color=COLORS[index], linestyle="--", label=f"must stay below {bar:.0e}")
    ax.axvline(EPSILON, color="#777777", linestyle=":", label="round-off of one number, 2.2e-16")
    ax.set_yticks(places, [row["case"] for row in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="relative error of the worst gradient of each (largest difference / largest values)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_sweeps(sweeps: dict):
    """Relative error against h, a panel per network, with the slopes that theory expects."""
    points = {method: [p for m in sweeps.values() for p in m[method]] for method in next(iter(sweeps.values()))}
    error, at = min((error, h) for h, error in points["central difference"])
    flat = max(error for h, error in points["complex step"] if h < 1e-7)
    title = f"Differences err by {error:.0e} at best (h = {at:.0e}), the complex step by {flat:.0e} at any h below 1e-7"
    figure, axes = new_figure(1, len(sweeps), width=12, height=4.8, title=title, sharey=True)
    for ax, (name, methods) in zip(axes.flat, sweeps.items(), strict=True):
        for index, (method, points) in enumerate(methods.items()):
            h, error = np.array(points).T
            ax.plot(h, np.maximum(error, FLOOR), marker="osD"[index], ms=3.5, label=method, **line_style(index))
        h = np.logspace(-16, -1, 2)
        ax.plot(h, EPSILON / h, ":", color="#777777", linewidth=1, label="round-off, 2.2e-16 / h")
        for power, label in ((1, "truncation, ∝ h"), (2, "truncation, ∝ h²")):
            rising = np.logspace(-14 / power, -1, 2)
            ax.plot(rising, rising**power / 10, DASHES[power + 1], color="#AAAAAA", linewidth=1, label=label)
        smooth = name.startswith("MLP")
        ax.set(xscale="log", yscale="log", xlabel="step h", ylim=(FLOOR / 3, 3))
        ax.set_title(f"{name} ({'smooth' if smooth else 'with kinks: ReLU, max pooling'})")
        ax.invert_xaxis()
    axes[0, 0].set_ylabel("relative error of the first layer's dW")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def draw_mutations(judged: list[tuple[Mutation, list[bool | None]]]):
    """Bugs by checks: a filled square where the check catches the bug, a ring where it passes it."""
    caught = np.array([[v is False for v in verdicts] for _, verdicts in judged])
    passed = np.array([[v is True for v in verdicts] for _, verdicts in judged])
    central, learnt = caught[:, 0].sum(), passed[:, -1].sum()
    title = (
        f"{caught.any(1).sum()} of {len(judged)} planted bugs are caught; central differences alone catch {central},\n"
        f"and {learnt} networks learn 16 examples by heart in spite of their bug"
    )
    figure, axes = new_figure(width=9.5, height=11.5, title=title)
    ax = axes[0, 0]
    rows, columns = np.nonzero(caught)
    ax.scatter(columns, rows, marker="s", s=95, color=COLORS[0], label="caught")
    rows, columns = np.nonzero(passed)
    ax.scatter(columns, rows, marker="o", s=40, facecolors="none", edgecolors=COLORS[1], label="passes unnoticed")
    rows, columns = np.nonzero(~caught & ~passed)
    ax.scatter(columns, rows, marker="_", s=20, color="#BBBBBB", label="not applicable")
    subjects = [mutation.subject for mutation, _ in judged]
    for row in range(1, len(judged)):
        if subjects[row] != subjects[row - 1]:
            ax.axhline(row - 0.5, color="#888888", linewidth=0.6)
    ax.set_yticks(range(len(judged)), [f"{m.subject}: {m.name}" for m, _ in judged], fontsize=8)
    counts = [f"{name}\n{c} of {n}" for name, c, n in zip(CHECKS, caught.sum(0), (caught | passed).sum(0), strict=True)]
    ax.set_xticks(range(len(CHECKS)), counts, fontsize=8)
    ax.xaxis.tick_top()
    ax.set(xlim=(-0.6, len(CHECKS) - 0.4), ylim=(len(judged) - 0.4, -0.6))
    ax.grid(False)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
