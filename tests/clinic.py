"""Draw the cases of the bug clinic: each sick run beside the healthy one, on the digits.

    python tests/clinic.py                   all cases, about 25 minutes on one core
    python tests/clinic.py 04 09             only these
    python tests/clinic.py --out FOLDER      pictures elsewhere than in results/clinic

A case is a patch in tests/bugs/. Its header names the command that shows the fault and the test
that catches it; the command is run on a copy with the patch and on one without.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from check import look_up

ROOT = Path(__file__).parent.parent
PATCHES = sorted(ROOT.glob("tests/bugs/*.patch"))

# what a case shows: keys of log.jsonl as curves, a panel each; a figure of the run; numbers of it
VIEWS = {
    "01": (["train_loss", "val_mse"], "fig02_reconstructions", []),
    "02": (["train_loss", "train_mse", "val_mse"], None, []),
    "03": (["train_loss", "val_mse"], "fig02_reconstructions", []),
    "04": (["val_loss", "val_kl", "val_mse"], "samples", []),
    "05": (["val_loss", "val_kl", "val_mse"], "samples", ["test_elbo", "test_mse", "sigma"]),
    "06": (["train_loss", "val_kl", "val_mse"], "fig16_reconstructions", []),
    "07": (["d_loss", "g_loss", "g_gradient"], "fig25_samples",
           ["frechet", "precision", "recall"]),
    "08": (["d_loss", "g_loss", "val_frechet"], "epochs",
           ["best_epoch", "val_frechet", "frechet"]),
    "09": (["d_loss", "g_loss", "val_frechet"], "fig25_samples",
           ["frechet", "frechet_floor", "precision", "recall"]),
    "10": (["train_loss", "val_loss", "val_accuracy"], None,
           ["models.ae.test_accuracy", "models.ae.trained_parameters"]),
    "11": (["train_loss", "val_loss", "val_accuracy"], "fig36_confusion_cnn", []),
    "12": (["seen_accuracy", "val_accuracy", "val_loss"], None,
           ["models.ae.val_accuracy", "models.ae.test_accuracy"]),
    "13": ([], "fig28_pca", ["methods.pca.test_mse", "methods.pca.knn_accuracy",
                             "methods.pca.trustworthiness"]),
    "14": ([], "fig29_tsne", ["methods.tsne.knn_accuracy", "methods.tsne.trustworthiness"]),
    "15": ([], "fig26_ae", [f"methods.{name}.knn_accuracy" for name in (
        "ae", "vae", "pca", "tsne")]),
}


def header(patch):
    """What stands above the diff: {"title", "command", "caught-by"}."""
    lines = patch.read_text().partition("\n--- ")[0].strip().splitlines()
    return {key.lower(): value for key, value in (line.split(": ", 1) for line in lines)}


def copy_tree(folder, patch=None):
    """The scripts and their tests in a new folder, with a patch; False where it does not apply."""
    (folder / "tests").mkdir(parents=True)
    for file in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        shutil.copy(file, folder / file.relative_to(ROOT))
    alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}  # in no repository
    return not patch or subprocess.run(["git", "apply", str(patch)], cwd=folder, env=alone,
                                       capture_output=True).returncode == 0


def train(tree, command, out, work):
    """Run the command with the scripts in tree; what it needs of other chapters is kept in work."""
    words = [sys.executable, str(tree / shlex.split(command)[1]), *shlex.split(command)[2:],
             "--device", "cpu", "--out-dir", str(out)]
    subprocess.run(words, cwd=work, check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})


def draw(number, runs, file):
    """One picture of at most 90 KB; runs: {"healthy": folder, "sick": folder}."""
    from matplotlib.figure import Figure  # not on top: the tests only need the functions above
    from PIL import Image
    keys, figure, numbers = VIEWS[number]
    metrics = {name: json.loads((run / "metrics.json").read_text()) for name, run in runs.items()}
    images = {name: Image.open(run / f"{figure}.png").convert("RGB") for name, run in runs.items()
              if figure}
    ratio = max((image.height / image.width for image in images.values()), default=0)
    wide = 0 < ratio < 0.5  # one above the other
    heights = ([2.3] * bool(keys) + [(2 * 8 if wide else 4.4) * ratio + 0.5] * bool(figure)
               + [0.25 * len(numbers) + 0.3] * bool(numbers))
    fig = Figure(figsize=(9, sum(heights)), layout="constrained")
    parts = iter(fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if keys:
        axes = next(parts).subplots(1, len(keys), squeeze=False)[0]
        for ax, key in zip(axes, keys, strict=True):
            for (name, run), style in zip(runs.items(), ("C0", "C3--"), strict=True):
                rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
                values = [row[key] for row in rows]
                ax.plot([row["epoch"] for row in rows], values, style, label=name)
                if min(values) > 0 and max(values) > 5 * min(values):
                    ax.set_yscale("log")
                    ax.yaxis.set_major_formatter("{x:g}")
                    ax.yaxis.set_minor_formatter(  # of 2, 3, ... 9 only two: they would overlap
                        lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
            ax.set_title(key, fontsize=9)
            ax.set_xlabel("epoch", fontsize=8)
            ax.tick_params(labelsize=7, which="both")
            ax.grid(alpha=0.3)
        axes[0].legend(fontsize=8)
    if figure:
        axes = next(parts).subplots(*((2, 1) if wide else (1, 2)))
        for ax, (name, image) in zip(axes, images.items(), strict=True):
            ax.imshow(image)
            ax.set_title(name, fontsize=9)
            ax.axis("off")
    if numbers:
        ax = next(parts).subplots()
        ax.axis("off")
        rows = [[key, *(f"{look_up(m, key):.4g}" for m in metrics.values())] for key in numbers]
        ax.table(rows, colLabels=["metrics.json", *metrics], loc="center", colLoc="left",
                 cellLoc="left", edges="horizontal")
    fig.savefig(file, dpi=90)
    image = Image.open(file).convert("RGB")
    for colors in (64, 32, 24, 20, 16, 12):
        image.quantize(colors, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            file, optimize=True)
        if file.stat().st_size <= 90_000:
            break


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="NN", help="without it all of them")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "clinic")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work, healthy = Path(folder), {}
        copy_tree(work / "healthy")
        for patch in PATCHES:
            number, command = patch.name[:2], header(patch)["command"]
            if args.cases and number not in args.cases:
                continue
            print(number, command, flush=True)
            if not copy_tree(work / patch.stem, patch):
                sys.exit(f"{patch.name} no longer applies: make it anew")
            if command not in healthy:
                healthy[command] = work / re.sub(r"\W+", "-", command)
                train(work / "healthy", command, healthy[command], work)
            sick = work / f"{number}-run"
            train(work / patch.stem, command, sick, work)
            draw(number, {"healthy": healthy[command], "sick": sick}, args.out / f"{number}.png")


if __name__ == "__main__":
    main()
