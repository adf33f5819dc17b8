"""What does a data set look like on paper, and how far can one trust such a map?

Section 4 of the report: the test images in two dimensions, by an autoencoder, a VAE, PCA, t-SNE.

    python embed.py                           all four maps, measured
    python embed.py --perplexity 5 30 100     how t-SNE depends on it
    python embed.py --points 2000             fewer images: quicker, and easier to read
    python embed.py --ae DIR --vae DIR        of these runs of ae.py and vae.py
    python embed.py --fast                    smoke test in seconds

10,000 FashionMNIST test images, three seeds (results/embed*): 5-NN accuracy and trustworthiness
.699 and .970 with the AE (129,747 parameters), .694 and .968 with the VAE, .499 and .912 with PCA,
.803 and .994 with t-SNE, which takes 55 to 93 seconds on one core beside other work. Each run
writes to a new folder in runs/.

It takes a run of ae.py and one of vae.py with --latent-dim 2 that it trains first, where they are
not there yet: in runs/ae2-... and runs/vae2-..., named after data, seed and code.
"""

import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patheffects import withStroke
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, trustworthiness

import ae
import common
import vae

# --------------------------------------------------------------------------- flags

# what to train where there is no run with latent dimension 2: the best we found for small networks
TRAINING = {
    "ae": "--latent-dim 2 --hidden 96 --filters 16 32 --decoder-filters 48 64 32 "
          "--epochs 20 --lr 0.012",
    "vae": "--latent-dim 2 --hidden 48 --epochs 16 --lr 0.006 --batch-size 64",
}


def parse_args(argv=None):
    number = common.number
    parser = common.Parser(__doc__)
    group = parser.add_argument_group("maps")
    group.add_argument("--points", type=number(int, 16, 10**9), metavar="N",
                       help="the first N test images; without it all of them")
    group.add_argument("--perplexity", type=number(float, 2, 10**4), nargs="+", default=[30],
                       metavar="P", help="how many neighbours t-SNE cares for; of several, the map "
                                         "beside the other methods is that of 30, or the first")
    for name in ("ae", "vae"):
        group.add_argument(f"--{name}", metavar="DIR",
                           help=f"run of {name}.py with --latent-dim 2; without it the best we "
                                "know, made first where it is not there")
    return common.parse(parser, "embed", argv)


# --------------------------------------------------------------------------- maps

LABELS = {"ae": ("AE", "z[0]", "z[1]"), "vae": ("VAE", "mu[0]", "mu[1]"),
          "pca": ("PCA", "first component", "second component"),
          "tsne": ("t-SNE", "first coordinate, no unit",
                   "second coordinate: large distances mean little")}


class Map(NamedTuple):
    """One map of the test images."""

    name: str           # ae, vae, pca or tsne
    points: np.ndarray  # (N, 2)
    numbers: dict       # for metrics.json


def map_encoder(script, folder, x):
    """Codes z (N, 2) of x (N, 1, 28, 28) by a run of ae.py or vae.py, and its numbers.

    Seconds: all epochs of the run, and encoding.
    """
    model = script.load_run(folder).to(x.device)
    # a line for each epoch of its training
    log = (Path(folder) / "log.jsonl").read_text().splitlines()
    clock = time.perf_counter()
    z = ae.encode(model, x) if script is ae else vae.encode(model, x)[0]  # mu, without the noise
    seconds = time.perf_counter() - clock + sum(json.loads(line)["seconds"] for line in log)
    return z.cpu().double().numpy(), {
        "test_mse": F.mse_loss(script.reconstruct(model, x), x).item(), "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()), "run": folder}


def map_pca(x_train, x):
    """x (N, 1, 28, 28) along the first two principal components of x_train: (N, 2), and numbers."""
    clock = time.perf_counter()
    pca = PCA(2, svd_solver="covariance_eigh").fit(common.pixels(x_train))
    points = pca.transform(common.pixels(x))
    seconds = time.perf_counter() - clock
    mse = np.square(pca.inverse_transform(points) - common.pixels(x)).mean().item()
    return points, {"test_mse": mse, "seconds": seconds}


def map_tsne(x, perplexity, seed):
    """t-SNE of x (N, 1, 28, 28), of its first 50 principal components: (N, 2), and numbers.

    With all 784 pixels most of the time would go into the search for neighbours. t-SNE moves the
    points themselves, it learns no function of x: a new image has no place in the map, and no image
    can be made from a place. It starts from the first two components (init), so that the seed
    hardly changes a thing.
    """
    print(f"t-SNE of {len(x):,} points with perplexity {perplexity:g}", flush=True)
    clock = time.perf_counter()
    x = PCA(min(50, len(x)), random_state=seed).fit_transform(common.pixels(x))
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=-1).fit_transform(x)
    return points.astype(float), {"seconds": time.perf_counter() - clock, "perplexity": perplexity}


# --------------------------------------------------------------------------- measures


def measure(x, y, maps, classes):
    """Add to the numbers of each Map of x (N, 1, 28, 28), y (N,) how far to trust it.

    knn_accuracy: do the classes keep apart? trustworthiness: are neighbours in the map neighbours
    as images, in Euclidean distance (not a person's idea of alike)? 1 if the 5 nearest points of
    each are its 5 nearest images, about .5 for points at random (Venna and Kaski 2001). It takes
    N x N distances and their ranks: 3.5 GB for 10,000 points at its peak.
    """
    for name, points, numbers in maps:
        accuracy, of_class = common.knn_accuracy(points, y)
        trust = trustworthiness(common.pixels(x), points, n_neighbors=5)
        numbers.update({"knn_accuracy": accuracy, "trustworthiness": float(trust),
                        "places_new_points": name != "tsne",
                        "class_accuracy": {classes[c]: a for c, a in of_class.items()}})


def table(maps):
    """The list of Maps as lines of text."""
    rows = [("map", "5-NN accuracy", "trustworthiness", "test MSE", "seconds", "new points")]
    for name, _, numbers in maps:
        title = LABELS[name][0]
        if name == "tsne":
            title += f", perplexity {numbers['perplexity']:g}"
        rows.append((title, numbers["knn_accuracy"], numbers["trustworthiness"],
                     numbers.get("test_mse"), numbers["seconds"],
                     "yes" if numbers["places_new_points"] else "no"))
    return common.table(rows)


# --------------------------------------------------------------------------- figures


def spread(points, gap):
    """Indices of points (N, 2) all over a map, no two closer than gap times its width and height.

    Goes through the points in order, and takes each that is near to none of those taken before.
    """
    points = points / np.ptp(points, axis=0)
    chosen = []
    for i, point in enumerate(points):
        distances = np.abs(points[chosen] - point).max(1)  # the larger one of across and down
        if (distances > gap).all():  # true for the first, which has none
            chosen.append(i)
    return chosen


def draw_names(ax, points, y, classes):
    """The name of each class at the median of its points (N, 2), or above, with a line to there.

    From the lowest to the highest: a name moves up until it lies on no other. The axes must have
    their limits already.
    """
    width, height = np.ptp(ax.get_xlim()), np.ptp(ax.get_ylim())
    letter, line = 0.016 * width, 0.034 * height  # the size of bold ones, measured in a figure
    taken = []  # the centre of each name, and its width

    def is_taken(x1, y1, width1):
        return any(abs(x1 - x2) < (width1 + width2) / 2 and abs(y1 - y2) < line
                   for x2, y2, width2 in taken)

    medians = {c: np.median(points[y == c], axis=0) for c in np.unique(y)}
    for c, (x, y_median) in sorted(medians.items(), key=lambda item: item[1][1]):
        y_name, name_width = y_median, letter * len(classes[c])
        while is_taken(x, y_name, name_width):
            y_name += 0.01 * height
        taken.append((x, y_name, name_width))
        ax.plot([x, x], [y_median, y_name], color="black", lw=1, zorder=9)
        ax.text(x, y_name, classes[c], ha="center", va="center", weight="bold", zorder=10,
                path_effects=[withStroke(linewidth=3, foreground="white")])


def draw_maps(run, file, maps, x, y, data, columns=1):
    """The list of Maps of x (N, 1, 28, 28), y (N,) as one figure.

    Some of the images are drawn, centred at their points: they show what a region means. The axes
    leave out the outermost hundredth of the points: a few outliers would squeeze all others.
    """
    rows = math.ceil(len(maps) / columns)
    size = 7 if columns < 3 else 5  # of one map, in inches
    fig = Figure(figsize=(size * columns + 1, (size - 1) * rows + 1), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False).flat
    for ax, (name, points, numbers) in zip(axes, maps, strict=True):
        common.scatter(ax, points, y, data.classes)
        low, high = np.quantile(points, [0.005, 0.995], axis=0)
        margin = 0.05 * (high - low)
        inside = ((points > low) & (points < high)).all(1).nonzero()[0]
        for i in inside[spread(points[inside], gap=0.7 / size)]:  # images take more of a small map
            image = OffsetImage(x[i, 0].cpu().numpy(), zoom=0.9, cmap="gray_r",
                                norm=Normalize(0, 1))
            edge = {"edgecolor": common.COLORS[y[i] % len(common.COLORS)], "linewidth": 1.5}
            ax.add_artist(AnnotationBbox(image, points[i], pad=0, bboxprops=edge))
        title, xlabel, ylabel = LABELS[name]
        title += (f", perplexity {numbers['perplexity']:g}" if name == "tsne" else
                  f": test MSE {numbers['test_mse']:.4f}")
        ax.set(xlabel=xlabel, ylabel=ylabel, xlim=(low[0] - margin[0], high[0] + margin[0]),
               ylim=(low[1] - margin[1], high[1] + margin[1]),
               title=f"{title}\n5-NN accuracy {numbers['knn_accuracy']:.3f}, "
                     f"trustworthiness {numbers['trustworthiness']:.3f}")
        draw_names(ax, points, y, data.classes)
    fig.suptitle(f"{data.name}: {len(x):,} test images")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center", markerscale=4)
    run.save(fig, file, "Which classes find a place of their own, and which share one?")


# --------------------------------------------------------------------------- main


def find_encoder(script, args):
    """The folder of a run of ae.py or vae.py: of --ae or --vae, or else the best we know."""
    name = script.__name__
    flags = TRAINING[name] + (" --epochs 3" if args.fast else "")  # the last --epochs counts
    return getattr(args, name) or common.trained(  # ae2, vae2: with latent dimension 2
        name, args, minutes=15, flags=flags.split(), name=f"{name}2")


def main(argv=None):
    """Make the maps, measure, draw; returns the metrics as a dict."""
    args = parse_args(argv)
    data = common.load_data(args)
    n = args.points or len(data.x_test)
    if n > len(data.x_test):
        common.fail(f"--points {n}: there are {len(data.x_test):,} test images")
    if n < 3 * max(args.perplexity):  # t-SNE weighs that many neighbours of each point
        common.fail(f"--perplexity {max(args.perplexity):g} takes three times as many points, "
                    f"{n} are too few: name a smaller one, or more --points")
    x, y = data.x_test[:n], data.y_test[:n].cpu().numpy()

    for folder, name in ((args.ae, "ae"), (args.vae, "vae")):  # before one of them is trained
        if folder and common.read_config(folder, name)["flags"]["latent_dim"] != 2:
            common.fail(f"{folder} has more than two latent dimensions: a map takes --latent-dim 2")

    run = common.Run(args, data)
    maps = [Map("ae", *map_encoder(ae, find_encoder(ae, args), x)),
            Map("vae", *map_encoder(vae, find_encoder(vae, args), x)),
            Map("pca", *map_pca(data.x_train, x))]
    tsne = [Map("tsne", *map_tsne(x, perplexity, args.seed)) for perplexity in args.perplexity]
    measure(x, y, maps + tsne, data.classes)

    four = [*maps, next((m for m in tsne if m.numbers["perplexity"] == 30), tsne[0])]
    for number, one in enumerate(four, start=26):
        draw_maps(run, f"fig{number}_{one.name}", [one], x, y, data)
    draw_maps(run, "maps", four, x, y, data, columns=2)
    if len(tsne) > 1:
        draw_maps(run, "perplexity", tsne, x, y, data, columns=len(tsne))
    return run.finish({
        "methods": {m.name: m.numbers for m in four}, "points": n,
        "neighbours": 5, "perplexity": [m.numbers for m in tsne]},
        table(maps + tsne))


if __name__ == "__main__":
    common.start(main)
