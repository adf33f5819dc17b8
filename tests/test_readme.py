"""README.md against results/: each test names the bug that it would catch."""

import json
import re
import shlex
from statistics import mean, stdev

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
RUNS = {f.parent.name: json.loads(f.read_text()) for f in ROOT.glob("results/*/metrics.json")}
# runs before the defaults changed: their commands mean something else now
EARLIER = {f.parent.name: json.loads(f.read_text())
           for f in ROOT.glob("results/earlier/*/metrics.json")}
NOT_OURS = ("report", "price", "what learns")  # columns without numbers of the run


def log(name, key):
    """One number of each epoch of a run."""
    lines = (ROOT / "results" / name / "log.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


def plain(command):
    """A command without the flags that change no number."""
    words = shlex.split(command)
    for flag in ("--out-dir", "--data-dir"):
        if flag in words:
            del words[words.index(flag):words.index(flag) + 2]
    return " ".join(words)


def run_of(command):
    """The metrics of the one run of this command in results/."""
    found = [m for m in RUNS.values() if plain(m["command"]) == command]
    assert len(found) == 1, f"{len(found)} runs of {command} in results/"
    return {k: v for k, v in found[0].items() if k not in ("versions", "flags")}


def numbers_in(value):
    """All numbers in nested JSON."""
    value = list(value.values()) if isinstance(value, dict) else value
    if isinstance(value, list):
        return [n for v in value for n in numbers_in(v)]
    return [value] if isinstance(value, int | float) else []


def measured_rows():
    """(cells, header, command) of the rows of numbers; command: its own, or the last before it."""
    header = command = None
    for line in README.splitlines():
        named = re.findall(r"`(python \w+\.py[^`]*)`", line)
        if line.startswith("|") and header and set(line) - set("|- "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not {"question", "files", "read", "the report says", "meaning"} & set(header) and (
                    "what happens" not in header):
                yield cells, header, named[0] if named and "command" in header else command
        elif line.startswith("|"):
            header = header or [cell.strip() for cell in line.strip("|").split("|")]
        else:
            header, command = None, named[-1] if named else command


def test_tables():
    """A number in a table that the run beside or above it did not give."""
    checked = 0
    for cells, header, command in measured_rows():
        known = numbers_in(run_of(command))
        for cell, title in list(zip(cells, header, strict=True))[1:]:
            if any(word in title for word in NOT_OURS):
                continue
            cell = re.sub(r"`[^`]*`|\([^)]*\)", "", cell)  # commands; the report's own numbers
            for text in re.findall(r"(?<![\w.])[-+]?[\d,]*\.?\d+", cell):
                scale, form = 100 if "%" in title else 1, f"+.{len(text.partition('.')[2])}f"
                assert format(float(text.replace(",", "")), form) in {
                    format(scale * n, form) for n in known}, f"{text} is not in that of {command}"
                checked += 1
    assert checked > 100


def test_everything_named_is_there():
    """A picture that is not in the repository; a result without what it takes to repeat it."""
    pictures = re.findall(r"\]\((results/[^)]+)\)", README)
    assert len(pictures) > 8 and all((ROOT / picture).exists() for picture in pictures)
    for metrics in RUNS.values():
        assert metrics["fast"] is False and metrics["data"] == "fashion"
        assert {"command", "versions", "machine", "seed"} <= metrics.keys()
    assert "@@" not in README


def point(value, digits):
    """.0119 as the README writes it."""
    return f"{value:.{digits}f}".removeprefix("0")


def change(name, key):
    """Mean relative change from epoch to epoch over the second half of a run."""
    values = log(name, key)[len(log(name, key)) // 2:]
    return mean(abs(b / a - 1) for a, b in zip(values, values[1:], strict=False))


def sentences():
    """What the README says outside of tables, put together from the runs."""
    r = RUNS
    yield "8 epochs give {} without and {} with them", *(
        point(r[name]["test_mse"], 4) for name in ("ae-8-epochs", "ae-8-epochs-flip"))
    yield "Validation over training MSE is {:.2f} at the end ({:.2f} in the last of the 5 folds", *(
        r[name]["val_mse"] / r[name]["train_mse"] for name in ("ae", "ae-folds5"))
    wide = r["ae-wide"]
    yield "The wide network does overfit: {:.2f}", wide["val_mse"] / wide["train_mse"]
    below = next(i for i, v in enumerate(log("ae-8-epochs", "val_mse"), start=1) if v < 0.013)
    yield "under .013 after {} epochs, {:.0f} seconds", below, sum(
        log("ae-8-epochs", "seconds")[:below])
    epochs = len(log("ae-tune", "epoch")) / r["ae"]["epochs"]
    yield "It took as many epochs as {:.1f} full trainings", epochs
    for run in (r["ae-found"], r["ae-report-values"]):
        yield "{} | {} |", point(run["pca_mse"], 4), point(
            run["test_mse"] + 5e-5 * run["latent_dim"], 4)
    bench = json.loads((ROOT / "results" / "bench_epoch.json").read_text())
    yield "takes {:.2f} times as long as the same steps", bench["ours_over_fixed_batch"]
    yield "takes {:.2f} times as long as ours", bench["dataloader_over_ours"]
    yield "VAE {:.1%}, AE {:.0%}", change("vae", "val_mse"), change("ae", "val_mse")
    yield "training MSE {:.3f}, for the AE on the same split {:.3f}", *(
        r[name]["val_mse"] / r[name]["train_mse"] for name in ("vae", "ae"))
    yield "VAE {} and {}, AE at latent 18 {} and {}, AE at 38 {} and {}", *(
        point(r[name]["knn_accuracy"][key], 2) for name in ("vae", "ae-latent18", "ae")
        for key in ("z", "tsne"))
    yield "falls from {:.1f} over {:.1f} and {:.1f} to {:.1f} nats", *(
        part["total_correlation"] for part in r["vae-sweep"]["sweep"])
    yield "distance to it is {:.1f}, that of test images {:.1f}", *(
        r["gan"][key] for key in ("nearest", "nearest_floor"))
    frechet = log("gan", "val_frechet")
    yield "the distance to real images falls from {:.0f} to {:.0f}", frechet[1], frechet[-1]
    old, new = r["gan-report"], r["gan"]
    yield "at {:.3f} and {}, and the samples are poor ({:.1f}, recall {})", old["d_loss"], point(
        old["g_loss"], 3), old["frechet"], point(old["recall"], 2)
    yield "with ours they end at {:.3f} and {}", new["d_loss"], point(new["g_loss"], 3)
    yield "from {:.0f} after 50 epochs to {:.0f} after 100", *(
        log("gan-report", "val_frechet")[i] for i in (49, 99))
    yield "gradient ends at {}, ours at {}", *(point(m["g_gradient"][1], 2) for m in (old, new))
    assert all(m["frechet"] < old["frechet"] / 2 and min(m["class_coverage"]) > 0.03
               for m in (new, r["gan-seed1"], r["gan-seed2"]))
    board = r["gan-compare"]["generators"]
    yield "Frechet distance {:.1f}, and {:.1f} for the AE with latent 38", *(
        board[f"{name}, reconstructions"]["frechet"] for name in ("VAE", "AE"))
    yield "give {:.1f}, {:.1f} and {:.1f} after 3 epochs", *(
        r["gan-ablate"]["ablation"][name]["val_frechet"] for name in (
            "noise 8", "ours", "noise 128"))
    each = r["embed"]["methods"]["ae"]["class_accuracy"]
    yield ("finds {:.0%} of the bags, {:.0%} of the trousers, {:.0%} of the ankle boots, but "
           "{:.0%} of the coats and {:.0%} of the shirts"), *(
        each[c] for c in ("Bag", "Trouser", "Ankle boot", "Coat", "Shirt"))
    models = [r["finetune"]["models"][name] for name in ("ae", "resnet18-random", "cnn")]
    few = r["finetune-labels"]["label_efficiency"]
    yield "all three are equal, {:.1f}, {:.1f} and {:.1f}%", *(
        100 * few[method]["100"]["mean"] for method in ("linear probe", "fine-tuned", "scratch"))
    yield "the fine-tuned one, {:.1f} against {:.1%}", 100 * few["scratch"]["48000"]["mean"], (
        few["fine-tuned"]["48000"]["mean"])
    quick = r["finetune-ae-6-epochs-flip"]["models"]["ae"]
    yield "with flips, {:.0f} seconds, give {:.1%}, 80 with shifts {:.1%}", (
        quick["train_seconds"]), quick["test_accuracy"], models[0]["test_accuracy"]
    yield "Confirmed: {:.1%}", models[2]["test_accuracy"]
    yield "The report's own 30 epochs at rate 0.0001, rotated and upside down, give {:.1%}", (
        r["finetune-ae-report"]["models"]["ae"]["test_accuracy"])
    yield "misses with {:.1f} and {}, though it has {:.1f} and {} on the validation images", *(
        value for loss, accuracy in (("test_loss", "test_accuracy"),
                                     ("mirror_val_loss", "mirror_val_accuracy"))
        for value in (100 * models[2][accuracy], point(models[2][loss], 3)))
    tried = [EARLIER[name]["models"]["cnn"] for name in ("finetune-cnn-flip", "finetune-shift")]
    yield "flips only, 25 epochs, {:.1f} and {}; shifts, 30 epochs, {:.1f} and {}", *(
        value for m in tried for value in (100 * m["test_accuracy"], point(m["test_loss"], 3)))
    yield "on validation images: {:.1f} to {:.1f}, {:.1f} to {:.1f}", *(
        100 * m[key] for m in (models[0], models[2]) for key in (
            "val_accuracy", "mirror_val_accuracy"))
    yield "validation and training loss are {} and {} (encoder), {} and {} (CNN)", *(
        point(m[key], 3) for m in (models[0], models[2]) for key in ("val_loss", "seen_loss"))
    flips = log("earlier/finetune-cnn-flip", "val_loss")
    yield "the CNN's rises from epoch {} on, {} to {}", flips.index(min(flips)) + 1, *(
        point(value, 3) for value in (min(flips), flips[-1]))
    yield "{:.0%}, {:.0%} and {:.0%} of the shirts", *(m["per_class"][6] for m in models)
    yield "{} and {} (encoder), {} and {} (ResNet18), {} and {} (CNN) of 1,000", *(
        m["confusion"][true][taken] for m in models for true, taken in ((4, 2), (2, 4)))
    yield "standard deviation of the ten accuracies {:.1%} against {:.1%}", *(
        stdev(m["per_class"]) for m in (models[0], models[2]))


@pytest.mark.parametrize("text, values", [(text, values) for text, *values in sentences()])
def test_sentences(text, values):
    """A number in a sentence that the runs did not give."""
    flat = " ".join(README.replace(" %", "%").split())
    assert text.format(*values) in flat
