"""Put finished runs into results/, and draw what the pages show beside their figures.

    python tests/gallery.py RUNS

RUNS is a folder of runs that are named like those in results/ (runs/ae, runs/vae-seed1, ...): made
by `python ae.py --out-dir runs/ae` and so on. Of each, metrics.json, log.jsonl and the figures that
a page shows are copied, in few colours. Figures of finetune.py are drawn again from the numbers in
results/, and 31 and 34, which take ImageNet weights, from stand-in weights, which their titles say.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import ae  # noqa: E402
import common  # noqa: E402
import embed  # noqa: E402
import finetune  # noqa: E402
import gan  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
import vae  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.manifold import TSNE  # noqa: E402

RESULTS = ROOT / "results"


class Folder:
    """Takes the place of a Run in the draw_... functions."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, fig, name, caption=""):
        file = self.folder / f"{name}.png"
        fig.savefig(file, dpi=common.DPI, bbox_inches="tight")
        shrink(file, file)


def shrink(source, target):
    """Write a picture in few colours, and smaller until it has less than 500 kB."""
    image = Image.open(source).convert("RGB")
    for scale in (1, 0.75, 0.6):
        small = image.resize([round(scale * side) for side in image.size])
        grey = np.ptp(np.asarray(small), axis=2).max() == 0  # rare colours need more
        small.quantize(64 if grey else 256, dither=Image.Dither.NONE).save(target, optimize=True)
        if target.stat().st_size < 500_000:
            break


def copy_runs(runs):
    """metrics.json, log.jsonl of every finished run, and the figures that a page shows."""
    pages = "".join(page.read_text() for page in [ROOT / "README.md", *RESULTS.glob("*.md")])
    for folder in sorted(runs.glob("*/")):
        if re.search(r"-seed\d+-", folder.name) or not (folder / "metrics.json").exists():
            continue  # made by common.trained, a judge or an encoder; or unfinished
        target = RESULTS / folder.name
        target.mkdir(exist_ok=True)
        for file in [folder / "metrics.json", folder / "log.jsonl"]:
            if file.exists():
                shutil.copy(file, target)
        for file in folder.glob("*.png"):
            if f"{folder.name}/{file.name}" in pages:
                shrink(file, target / file.name)


def draw_finetune(data):
    """Figures 30, 32, 33, 35, 36 and per_class, from the numbers of results/finetune."""
    folder = RESULTS / "finetune"
    models = json.loads((folder / "metrics.json").read_text())["models"]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for name, m in models.items():
        curves, confusion = finetune.FIGURES[name]
        rows = [r for r in log if m["title"] in (r.get("part"), r.get("model"))]
        common.plot_curves(Folder(folder), curves, rows, {
            "accuracy": ("seen_accuracy", "val_accuracy"),
            "cross entropy, nats": ("seen_loss", "val_loss")}, f"FashionMNIST: {m['title']}", "")
        finetune.draw_confusion(Folder(folder), confusion, np.array(m["confusion"]), data.classes,
                                f"FashionMNIST, {m['title']}")
    finetune.draw_per_class(Folder(folder), models, data)


def draw_stand_ins():
    """Figures 31 and 34 as they would look, from weights that are none of ImageNet's."""
    settings = finetune.settings

    def titled(*args):
        t = settings(*args)
        t.title = "resnet18 with STAND-IN weights, a smoke test"
        return t
    finetune.settings = titled
    with tempfile.TemporaryDirectory() as folder:
        torch.save(torchvision.models.resnet18().state_dict(), f"{folder}/weights.pth")
        finetune.main(["--fast", "--data", "digits", "--model", "resnet18", "--weights",
                       f"{folder}/weights.pth", "--out-dir", f"{folder}/run"])
        for name in finetune.FIGURES["resnet18"]:
            shutil.copy(f"{folder}/run/{name}.png", RESULTS / "finetune")


def draw_recipes(runs):
    """Figure 24 for the recipes of gan.py, a line for each seed in results/, and samples."""
    fig = Figure(figsize=(13, 4), layout="constrained")
    plots, samples = fig.subfigures(1, 2, width_ratios=[3, 1])
    left, right = plots.subplots(1, 2)
    grids = samples.subplots(2, 1)
    for color, ax, name, title in (
            ("C1", grids[0], "gan-report-100", "the report's recipe"),
            ("C2", None, "gan-two-layers", "ours with two convolutions in D"),
            ("C0", grids[1], "gan", "ours")):
        for n, folder in enumerate(sorted(seeds(RESULTS, name))):
            log = (folder / "log.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in log]
            epochs, label = [row["epoch"] for row in rows], {"label": title} if n == 0 else {}
            left.plot(epochs, [row["d_loss"] for row in rows], color=color, **label)
            left.plot(epochs, [row["g_loss"] for row in rows], color=color, ls="--")
            right.plot(epochs, [row["val_frechet"] for row in rows], color=color)
        if ax:
            net = gan.load_run(seeds(runs, name)[0])
            common.show_images(ax, gan.sample(net, gan.noise(18, net.noise_dim, 1)), 6)
            ax.set_title(f"samples, {title}", fontsize=10)
    for value, label, va in zip(gan.CHANCE.values(), ("D guesses: 1.386", "G at chance: .693"),
                                ("bottom", "top"), strict=True):
        left.axhline(value, color="gray", lw=1, zorder=0)
        left.text(100, value, label, va=va, ha="right", fontsize=8)
    left.set(ylim=0, xscale="log", xlabel="epoch", ylabel="loss: D solid, G dashed",
             title="Their losses come close,")
    right.set(yscale="log", xscale="log", xlabel="epoch",
              ylabel="Frechet distance to validation images", title="their samples do not")
    for ax in (left, right):
        ax.xaxis.set_major_formatter("{x:g}")
    left.legend(loc="lower right")  # its colours are those on the right, too
    Folder(RESULTS / "gan").save(fig, "recipes")


def draw_sight(runs, data):
    """What one number in D's maps has seen of an image, and what G learns from such a D."""
    fig = Figure(figsize=(13, 4), layout="constrained")
    left, *others = fig.subplots(1, 3, width_ratios=[1, 1.43, 1.43])
    common.show_images(left, data.x_test[1:2], 1)
    # kernel 4, stride 2, padding 1: number k has seen pixels from 2k - 1, 4k - 3, 8k - 7 on
    for layers, first, size, color in ((1, 13, 4, "C1"), (2, 9, 10, "C2"), (3, 1, 22, "C0")):
        corner = first + 0.5  # the picture has a frame of one pixel
        left.add_patch(Rectangle((corner, corner), size, size, fill=False, lw=2.5, color=color))
        left.text(corner, corner - 0.8, f"{layers}: {size}x{size}", color=color, weight="bold",
                  bbox={"color": "black", "pad": 1})
    left.set_title("seen after so many convolutions")
    for ax, name, title in zip(others, ("gan-two-layers", "gan"), ("two", "three"), strict=True):
        net = gan.load_run(seeds(runs, name)[-1])
        common.show_images(ax, gan.sample(net, gan.noise(35, net.noise_dim, 1)), 7)
        ax.set_title(f"samples, {title} convolutions in D")
    Folder(RESULTS / "gan").save(fig, "sight")


def draw_starts(data):
    """t-SNE of the same 2,000 images, from the PCA and from random places, three seeds each."""
    x, y = data.x_test[:2000], data.y_test[:2000].numpy()
    fig = Figure(figsize=(13, 8), layout="constrained")
    for row, init in zip(fig.subplots(2, 3), ("pca", "random"), strict=True):
        for seed, ax in enumerate(row):
            points = TSNE(init=init, random_state=seed).fit_transform(common.pixels(x))
            common.scatter(ax, points, y, data.classes)
            embed.draw_names(ax, points, y, data.classes)
            accuracy, _ = common.knn_accuracy(points, y)
            ax.set(xticks=[], yticks=[], title=f"from {init}, seed {seed}: 5-NN {accuracy:.3f}")
    Folder(RESULTS / "embed").save(fig, "starts")


def seeds(folder, name):
    """The folders of a run with each of its seeds, those that are there."""
    return [f for f in sorted(folder.glob(f"{name}*"))
            if re.fullmatch(rf"{name}(-seed\d+)?", f.name) and (f / "metrics.json").exists()]


def draw_strip(runs, data):
    """The picture on top of the README: test images, four models, and a map of the test set."""
    first = [(data.y_test == c).nonzero()[i].item() for i in range(2) for c in range(10)][:12]
    x = data.x_test[first]
    net_ae, net_vae = ae.load_run(runs / "ae-latent18"), vae.load_run(runs / "vae")
    net_g = gan.load_run(seeds(runs, "gan")[0])
    z = gan.noise(36, net_g.noise_dim, 1)
    rows = {"test images": x, "PCA, 18 numbers": common.pca_reconstruct(data.x_train, x, 18),
            "autoencoder, 18": ae.reconstruct(net_ae, x), "VAE, 18": vae.reconstruct(net_vae, x),
            "invented by the GAN": gan.sample(net_g, z)[:24]}
    fig = Figure(figsize=(13, 4.2), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=[2, 1.05])
    axes = left.subplots(len(rows), height_ratios=[1, 1, 1, 1, 2])
    for ax, (label, images) in zip(axes, rows.items(), strict=True):
        common.show_images(ax, images, 12)
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11)
    ax = right.subplots()
    codes = vae.encode(net_vae, data.x_test[:4000])[0]
    points, y = TSNE(random_state=0).fit_transform(codes.numpy()), data.y_test[:4000].numpy()
    common.scatter(ax, points, y, data.classes)
    embed.draw_names(ax, points, y, data.classes)
    ax.set(xticks=[], yticks=[])
    ax.set_title("4,000 test images by the VAE's code (t-SNE)", fontsize=11)
    fig.savefig(RESULTS / "strip.png", dpi=100)


def main():
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        common.fail("usage: python tests/gallery.py RUNS, a folder of finished runs")
    runs = Path(sys.argv[1]).resolve()
    os.chdir(runs.parent)  # where data/ lies
    data = common.load_data(ae.parse_args(["--data", "fashion", "--device", "cpu"]))
    copy_runs(runs)
    draw_finetune(data)
    draw_stand_ins()
    draw_recipes(runs)
    draw_sight(runs, data)
    draw_strip(runs, data)
    draw_starts(data)


if __name__ == "__main__":
    main()
