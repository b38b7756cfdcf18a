"""Is the map of the codes better separated than that of the pixels?

    python autoencoder/ae_umap.py
    python autoencoder/ae_umap.py --npz codes.npz --n 3000 --neighbors 50

UMAP draws the test images' codes, their raw pixels and their PCA codes of the same size in two dimensions, beside a
plain PCA. What such a picture shows is measured, in the maps and in the full spaces:

    trustworthiness    are neighbours here neighbours in pixel space too? 1: all of them, 0.5: no better than chance
    continuity         are neighbours in pixel space still neighbours here?
    5-NN accuracy      share of the images whose five nearest others vote for their class
    silhouette         (b − a) / max(a, b), mean distance a to the own class, b to the nearest other class

Each has its pitfall. The first two take the pixels for the truth, so a code that ignores a shift of two pixels loses.
5-NN accuracy is blind to how far the classes are apart. The silhouette assumes round clusters, and UMAP's layout
packs any neighbourhood into one: compare it between maps, never between a map and a space. These two use the labels.

"Better" means higher with every seed than the other with any seed. Seeds vary the layout alone: the neighbours are
exact. A spectral start is the same for all seeds, so what they agree on may be its doing; a random start shows how
much of the picture the data alone decide. The disparity of two maps (Procrustes, after the best move, turn, mirroring
and scaling) is 0 for the same picture and 1 for two that have nothing in common.

Writes ae_fashion_umap.png, umap_stability.png, metrics.json.
Sources: McInnes, Healy and Melville 2018; Venna and Kaski 2001; Rousseeuw 1987; Kobak and Linderman 2021 for the start.
Shapes: N test images, D = 784 pixels, K numbers in a code, S seeds.
"""

import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import procrustes
from torch import Tensor

from autoencoder.embedding import (
    MAP_COLORS,
    bare,
    continuity,
    draw_map,
    knn_accuracy_leave_one_out,
    nearest,
    point_size,
    silhouette,
    trustworthiness,
    umap_map,
)
from autoencoder.inputs import add_data_flags, load_pixels, pixels
from autoencoder.pca import fit_pca
from shared_utils import checkpoint
from shared_utils.cli import UserError, add_seeds, at_least, fraction, make_parser, positive_int, run_main
from shared_utils.data import stratified_order
from shared_utils.device import cpu_threads, pick_device
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import find_output, start_run
from shared_utils.stats import mean_std

TRUST_K, KNN_K = 15, 5  # neighbours in trustworthiness and continuity, and in the vote
COMPARED, STARTS = ("codes", "pixels"), ("spectral", "random")  # of the first, maps are also started at random
KEYS = ("Z", "Yhat", "mse", "y", "dataset")
MEASURES = ("trustworthiness", "continuity", "leave_one_out_accuracy", "silhouette")


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset="fashion", quick={"val_size": 200, "seeds": [0, 1]})
    add_data_flags(parser)
    parser.add_argument("--npz", metavar="FILE", help="codes of the test images (default: ae_process_test.py's)")
    parser.add_argument("--n", type=positive_int, help="test images used, stratified (default: all)")
    parser.add_argument("--neighbors", type=at_least(2), default=15, help="UMAP's, the image itself included")
    parser.add_argument("--min-dist", type=fraction, default=0.1, help="UMAP's least distance between points of a map")
    add_seeds(parser, [0, 1, 2], "of UMAP, at least two", least=2)
    return parser


def load_codes(path: str | Path, dataset: str, y: np.ndarray) -> np.ndarray:
    """The codes Z, float32 (N, K), of the test images of `dataset`, whose labels are y (N,).

    Errors: `UserError` when the file lacks a key or was made from other images.
    """
    arrays = checkpoint.load_arrays(path, KEYS)
    if str(arrays["dataset"]) != dataset:
        raise UserError(f"{path} holds codes of --dataset {arrays['dataset']}, not {dataset}")
    codes = arrays["Z"]
    if codes.ndim != 2 or len(codes) != len(y) or not np.array_equal(arrays["y"], y):
        raise UserError(f"{path} holds Z {codes.shape} and other labels than the {len(y)} test images of {dataset}")
    if not np.isfinite(codes).all():
        raise UserError(f"{path}: Z has NaN or infinity in it")
    return codes.astype(np.float32)


def chosen(y: np.ndarray, n: int | None, seed: int) -> np.ndarray:
    """Sorted positions of n test images, stratified; all of them by default. Errors: `UserError`."""
    if n is None:
        return np.arange(len(y))
    if n > len(y):
        raise UserError(f"--n {n}: there are {len(y)} test images")
    return np.sort(stratified_order(y, np.random.default_rng(seed))[:n])


def measure(z: Tensor, x: Tensor, x_neighbours: Tensor, y: Tensor) -> dict[str, float]:
    """The four measures of the space z (N, d), against the pixels x (N, D) with their nearest (N, TRUST_K)."""
    values = (
        trustworthiness(x, z, TRUST_K),
        continuity(x, z, TRUST_K, x_neighbours),
        knn_accuracy_leave_one_out(z, y, KNN_K),
        silhouette(z, y),
    )
    return dict(zip(MEASURES, values, strict=True))


def as_row(space: str, start: str, dimensions: int, found: list[dict], seconds: list[float]) -> dict:
    """A row of the table: of each measure the mean over seeds, their standard deviation and the values."""
    row = {"space": space, "start": start, "dimensions": dimensions, "seeds": len(found)}
    for name in MEASURES:
        values = [one[name] for one in found]
        row[name], row[f"{name}_std"] = mean_std(values)
        row[f"{name}_values"] = values
    return row | {"seconds": seconds}


def disparities(maps: list[np.ndarray]) -> dict:
    """Procrustes disparities of all pairs of maps (N, 2): mean, standard deviation, values and the worst pair."""
    pairs = list(combinations(range(len(maps)), 2))
    values = [float(procrustes(maps[i], maps[j])[2]) for i, j in pairs]
    mean, std = mean_std(values)
    return {"mean": mean, "std": std, "values": values, "worst_pair": pairs[int(np.argmax(values))]}


def verdict(a: dict, b: dict, name: str) -> str:
    """ "better", "worse" or neither: is `name` higher in row a with every seed than in row b with any?"""
    a, b = a[f"{name}_values"], b[f"{name}_values"]
    if min(a) > max(b):
        return "better"
    return "worse" if max(a) < min(b) else "no difference beyond the seeds"


@torch.no_grad()
@cpu_threads(1)
def main(argv=None) -> dict:
    """Map, measure, compare and draw; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    path = args.npz or find_output(args, "ae_process_test", "ae_fashion_test_processed.npz")
    data = load_pixels(args)
    codes = load_codes(path, args.dataset, data.y_test.numpy())
    keep = chosen(data.y_test.numpy(), args.n, args.seed)
    n, latent = len(keep), codes.shape[1]
    if n <= max(2 * TRUST_K, args.neighbors):
        raise UserError(f"{n} images are too few: needs more than {max(2 * TRUST_K, args.neighbors)}")
    if latent < 2:
        raise UserError(f"{path}: codes of {latent} number; a map has two dimensions")
    if latent > min(data.x_train.shape):
        raise UserError(f"{path}: PCA cannot give {latent} numbers from training images {tuple(data.x_train.shape)}")
    run = start_run(args)

    pca = fit_pca(data.x_train, latent)
    x, y = pixels(data.x_test[keep]), data.y_test[keep].to(device)
    pca_codes = pca.project(data.x_test[keep])  # (N, K)
    spaces = {"codes": torch.from_numpy(codes[keep]), "pixels": x, f"PCA-{latent}": pca_codes}
    spaces = {name: values.to(device) for name, values in spaces.items()}
    x = spaces["pixels"]
    neighbours = {name: nearest(z, z, max(TRUST_K, args.neighbors - 1), True) for name, z in spaces.items()}
    x_neighbours = neighbours["pixels"][1][:, :TRUST_K]

    rows, maps, stability = [], {}, {}
    for name, z in [*spaces.items(), ("PCA-2", spaces[f"PCA-{latent}"][:, :2])]:
        rows.append(as_row(name, "", z.shape[1], [measure(z, x, x_neighbours, y)], []))
    for name, z in spaces.items():
        graph = tuple(part[:, : args.neighbors - 1] for part in neighbours[name])
        for start in STARTS if name in COMPARED else STARTS[:1]:
            found, drawn, seconds = [], [], []
            for seed in args.seeds:
                begun = time.perf_counter()
                drawn.append(umap_map(z, graph, seed, args.min_dist, start))
                seconds.append(time.perf_counter() - begun)
                found.append(measure(torch.from_numpy(drawn[-1]).to(device), x, x_neighbours, y))
            rows.append(as_row(f"UMAP of {name}", start, 2, found, seconds))
            maps[name, start], stability[f"{name}, {start}"] = drawn, disparities(drawn)
            accuracy = rows[-1]["leave_one_out_accuracy"]
            print(
                f"UMAP of {name}, {start} start: {np.mean(seconds):.1f} s a map, 5-NN accuracy {accuracy:.4f}",
                flush=True,
            )

    table = {(row["space"], row["start"]): row for row in rows}
    ours, theirs = table["UMAP of codes", "spectral"], table["UMAP of pixels", "spectral"]
    verdicts = {name: verdict(ours, theirs, name) for name in MEASURES}
    y, about = y.cpu().numpy(), f"{data.title}, {n:,} test images, K = {latent}"
    figure = draw_maps(maps, pca_codes[:, :2].numpy(), y, data.classes, table, about)
    save_figure(figure, run.path("ae_fashion_umap.png"), dpi=100)
    save_figure(draw_stability(maps, stability, y, args.seeds, about), run.path("umap_stability.png"), dpi=100)
    return run.finish(
        {
            "images": n,
            "latent": latent,
            "neighbours_of_trustworthiness": TRUST_K,
            "spaces": rows,
            "codes_against_pixels": verdicts,
            "disparity": stability,
        }
    )


def _shown(row: dict, name: str) -> str:
    scale, digits = (100, 1) if name == "leave_one_out_accuracy" else (1, 3)
    spread = f" ± {scale * row[f'{name}_std']:.{digits}f}" if row["seeds"] > 1 else ""
    return f"{scale * row[name]:.{digits}f}{spread}" + (" %" if scale == 100 else "")


def draw_maps(maps: dict, pca_map: np.ndarray, y: np.ndarray, classes, table: dict, about: str):
    """UMAP of the three spaces (spectral start, first seed) and PCA, the measures beneath each."""
    panels = {f"UMAP of {name}": drawn[0] for (name, start), drawn in maps.items() if start == "spectral"}
    figure, axes = new_figure(2, 2, width=9.6, height=10.6)
    for ax, (space, z) in zip(axes.flat, [*panels.items(), ("PCA-2", pca_map)], strict=True):
        row = table[space, "spectral" if space in panels else ""]
        draw_map(ax, z, y, classes)
        names = {"codes": "the autoencoder's codes", "pixels": "raw pixels"}
        title = "PCA, two components" if space == "PCA-2" else "UMAP of " + names.get(space[8:], space[8:] + " codes")
        lines = [f"5-NN accuracy {_shown(row, 'leave_one_out_accuracy')}, silhouette {_shown(row, 'silhouette')}"]
        lines += [f"trustworthiness {_shown(row, 'trustworthiness')}, continuity {_shown(row, 'continuity')}"]
        ax.set(title=title, xlabel="\n".join(lines))
    found = []
    for start in ("spectral", "random"):
        ours, theirs = table["UMAP of codes", start], table["UMAP of pixels", start]
        for name, label in (("leave_one_out_accuracy", "5-NN accuracy"), ("silhouette", "silhouette")):
            said = f"{label} {_shown(ours, name)} against {_shown(theirs, name)}: {verdict(ours, theirs, name)}"
            found.append(f"{start} start: {said}")
    seeds = f"(mean ± standard deviation over {ours['seeds']} seeds)"
    title = f"{about}\nClasses in the map of the codes against that of the pixels {seeds}:\n"
    figure.suptitle(title + "\n".join(found))
    return figure


def draw_stability(maps: dict, stability: dict, y: np.ndarray, seeds: list[int], about: str):
    """For codes and pixels: the two most different maps laid over each other, and the disparities of all pairs."""
    figure, axes = new_figure(2, 3, width=11.4, height=7.8)
    colors = np.array(MAP_COLORS)
    for row, name in zip(axes, COMPARED, strict=True):
        for ax, start in zip(row, STARTS, strict=False):
            found = stability[f"{name}, {start}"]
            i, j = found["worst_pair"]
            a, b, disparity = procrustes(maps[name, start][i], maps[name, start][j])  # both moved onto each other
            b /= np.linalg.norm(b)  # the best fit shrinks b the more, the less it has in common with a
            ax.scatter(*a.T, s=point_size(len(a)), color="#CCCCCC", linewidth=0, antialiased=False)
            ax.scatter(*b.T, s=point_size(len(b)), c=colors[y % len(colors)], linewidth=0, antialiased=False)
            for label in np.unique(y):
                ends = [np.median(part[y == label], axis=0) for part in (a, b)]
                ax.annotate("", ends[1], ends[0], arrowprops={"arrowstyle": "->", "linewidth": 1.2})
            bare(ax)
            ax.set_title(f"UMAP of {name}, {start} start")
            ax.set_xlabel(f"seed {seeds[i]} (grey) and {seeds[j]} (colours), disparity {disparity:.3f}")
        ax = row[2]
        for index, start in enumerate(STARTS):
            values = stability[f"{name}, {start}"]["values"]
            across = index + 0.3 * (np.arange(1, len(values) + 1) / (len(values) + 1) - 0.5)
            ax.scatter(across, np.sort(values), s=22, marker="os"[index], color=COLORS[index])
        ax.set_xticks(range(2), [f"{start}\nstart" for start in STARTS])
        ax.set(
            xlim=(-0.5, 1.5), ylim=(0, 1), ylabel="disparity (0 same, 1 unrelated)", title=f"{name}: all pairs of seeds"
        )
    means = {start: [stability[f"{name}, {start}"]["mean"] for name in COMPARED] for start in STARTS}
    found = [
        f"{start} start: {ours:.3f} for the codes, {theirs:.3f} for the pixels"
        for start, (ours, theirs) in means.items()
    ]
    found = "; ".join(found)
    what = "the two most different maps of each kind laid over each other, the second in the classes' colours"
    figure.suptitle(
        f"{about}: how much of a map is the seed?\nMean disparity, {found}\n({what}; arrows between class medians)"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
