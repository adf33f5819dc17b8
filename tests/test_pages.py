"""README.md and results/*.md against the runs in results/: each test names the bug it would catch.

A number in a page is followed by a comment that does not show, with the run and the key it is from:

    the MSE is .0112<!-- vae test_mse -->, 50.1 <!-- finetune models.cnn.test_accuracy x100 --> %
    over three seeds .0112<!-- mean vae test_mse --> +- .0001<!-- std vae test_mse -->
    **not seen** <!-- verdict ae knn_accuracy.z vae knn_accuracy.z -->

mean and std are over the runs NAME, NAME-seed1, NAME-seed2, ...; xN multiplies. A verdict compares
the two sides' seeds: "not seen" where mean +- standard deviation overlap, "confirmed" or
"contradicted" where they part. `python tests/test_pages.py` writes the numbers of the runs into the
pages, with as many digits as stand there.
"""

import difflib
import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "results").glob("*.md"))]
RUNS = {f.parent.name: json.loads(f.read_text()) for f in ROOT.glob("results/*/metrics.json")}
NUMBER = re.compile(r"(?P<text>[-+]?[\d,]*\.?\d+)(?P<gap> ?)<!-- (?P<source>[^>]*?) -->")
VERDICT = re.compile(r"\*\*(?P<word>[^*]*)\*\* ?<!-- verdict (?P<sides>[^>]*?) -->")


def look_up(run, key):
    """The value of a key like models.cnn.test_loss or generators.GAN, ours.recall in a run."""
    value = RUNS[run]
    while key:  # the longest name that fits: some have dots and blanks in them
        names = map(str, range(len(value)) if isinstance(value, list) else value)
        name = max((n for n in names if f"{key}.".startswith(f"{n}.")), key=len)
        value, key = value[int(name) if isinstance(value, list) else name], key[len(name) + 1:]
    return value


def seeds(run):
    """The names of a run with each of its seeds."""
    return [name for name in RUNS if re.fullmatch(rf"{re.escape(run)}(-seed\d+)?", name)]


def trainings(run, key):
    """The values of a key, of a run with each of its seeds, or a list of them that one run has."""
    values = [look_up(name, key) for name in seeds(run)]
    return values[0] if isinstance(values[0], list) else values


def measured(source):
    """The number that a comment in a page names."""
    words = source.split()
    scale = float(words.pop()[1:]) if re.fullmatch(r"x[\d.]+", words[-1]) else 1
    if words[0] in ("mean", "std"):
        how, run, key = words[0], words[1], " ".join(words[2:])
        values = trainings(run, key)
        return scale * {"mean": mean, "std": stdev}[how](values)
    run, key = words[0], " ".join(words[1:])
    return scale * look_up(run, key)


def written(value, text):
    """value in the form of text: as many digits, thousands' commas, a sign, no leading zero."""
    digits = len(text.partition(".")[2])
    new = f"{value:{'+' if text.startswith('+') else ''}{',' if ',' in text else ''}.{digits}f}"
    return re.sub(r"^([-+]?)0\.", r"\1.", new) if re.match(r"[-+]?\.", text) else new


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers(page):
    """A number in a page that the run and key beside it did not give; a comment of another form."""
    text = page.read_text()
    numbers = list(NUMBER.finditer(text))
    assert len(numbers) + len(VERDICT.findall(text)) == text.count("<!-- ")
    for m in numbers:
        assert m["text"] == written(measured(m["source"]), m["text"]), m["source"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_verdicts(page):
    """A verdict that says more than its data: one seed, or spreads that overlap."""
    for m in VERDICT.finditer(page.read_text()):
        a, b = (trainings(*side.split(maxsplit=1)) for side in m["sides"].split(" / "))
        word = m["word"].lower()
        if min(len(a), len(b)) < 2:
            assert "hint" in word or "cannot be told" in word, m["sides"]
        else:
            overlap = abs(mean(a) - mean(b)) <= stdev(a) + stdev(b)
            assert ("not seen" in word) == overlap, m["sides"]


def test_there_are_numbers():
    """Pages that name no run, in which the tests above find nothing."""
    assert sum(len(NUMBER.findall(page.read_text())) for page in PAGES) > 500


def test_stability():
    """The numbers of vae.md's claim 2, which no metrics.json has."""
    changes = []
    for name in (*sorted(seeds("ae-as-vae")), *sorted(seeds("vae"))):
        log = (ROOT / "results" / name / "log.jsonl").read_text().splitlines()
        mse = [json.loads(line)["val_mse"] for line in log][2:]
        assert len(mse) == 4 and mse == sorted(mse, reverse=True)
        changes.append(100 * mean(abs(b - a) / a for a, b in zip(mse, mse[1:], strict=False)))
    text = "{:.1f}, {:.1f} and {:.1f} % for the autoencoder and {:.1f}, {:.1f} and {:.1f} % for the"
    assert text.format(*changes) in " ".join((ROOT / "results/vae.md").read_text().split())


def test_unevenness():
    """The numbers of finetune.md's claim 7, which no metrics.json has."""
    said = []
    for how in (lambda a: 100 * stdev(a), lambda a: stdev(a) / (1 - mean(a))):
        for model in ("ae", "cnn"):
            each = [how(RUNS[name]["models"][model]["per_class"]) for name in seeds("finetune")]
            said += [mean(each), stdev(each)]
    page = " ".join((ROOT / "results/finetune.md").read_text().split())
    assert "{:.1f} ± {:.1f} points for the encoder and {:.1f} ± {:.1f} for the CNN".format(
        *said[:4]) in page
    assert "{:.2f} ± {:.2f} for the encoder and {:.2f} ± {:.2f} for the CNN".format(
        *said[4:]) in page
    assert said[0] - said[2] > said[1] + said[3] and said[6] - said[4] > said[5] + said[7]


def test_a_loss_that_rises():
    """The numbers of finetune.md's claim 4, which no metrics.json has."""
    logs = [[json.loads(line)
             for line in (ROOT / "results" / name / "log.jsonl").read_text().splitlines()]
            for name in sorted(seeds("finetune-resnet18-all-flip"))]
    losses = [[row["val_loss"] for row in rows] for rows in logs]
    best, last = [min(each) for each in losses], [each[-1] for each in losses]
    page = " ".join((ROOT / "results/finetune.md").read_text().split())
    assert f"{mean(best):.3f} ± {stdev(best):.3f}".replace("0.", ".") in page
    assert "{:.3f}, {:.3f} and {:.3f}".format(*last).replace("0.", ".") in page
    assert mean(last) - mean(best) > stdev(last) + stdev(best)
    assert all(rows[-1]["seen_loss"] < 0.05 for rows in logs)


def test_a_gan_that_has_not_converged():
    """The numbers of gan.md's claims 1 and 4, which no metrics.json has."""
    page = " ".join((ROOT / "results/gan.md").read_text().split())
    logs = [[json.loads(line)
             for line in (ROOT / "results" / name / "log.jsonl").read_text().splitlines()]
            for name in (*sorted(seeds("gan-report-100")), "gan-ablate")]
    distances = [[row["val_frechet"] for row in rows] for rows in logs[:3]]
    said = [f"{each[epoch]:.0f}" for epoch in (59, 99) for each in distances]
    assert "After 60 epochs" in page
    assert "from {}, {} and {} to {}, {} and {}".format(*said) in page
    assert [each.index(min(each)) + 1 for each in distances] == [99, 99, 87]
    assert "in two of them epoch 99 is the best, in the third epoch 87" in page
    first = {row["part"]: row for row in logs[3] if row["epoch"] == 1}
    said = [sorted(round(100 * first[f"{name}, seed {seed}"][f"d_accuracy_{kind}"])
                   for seed in (0, 1)) for name in ("no spectral norm", "rate 2e-4", "beta1 0.5")
            for kind in ("real", "fake")]
    assert said == [[63, 64], [68, 70], [73, 75], [78, 80], [61, 61], [69, 69]]
    assert ("63 or 64 % of the real and 68 to 70 % of the fake images without spectral norm, 73 to "
            "75 and 78 to 80 % at the rate .0002, 61 and 69 % with beta1 .5") in page


def lines_of(script, function):
    """The source lines of a function."""
    text = (ROOT / f"{script}.py").read_text()
    return text[text.index(f"def {function}("):].split("\n\n\n")[0].splitlines()


def test_what_the_readme_shows_of_the_scripts():
    """A README that no longer describes the scripts."""
    pairs = [[(ROOT / f"{name}.py").read_text().splitlines() for name in ("ae", "vae")],
             [lines_of(name, "train_epoch") for name in ("ae", "vae")]]
    whole, epoch = (sum(line[0] in "+-" for line in difflib.ndiff(*pair)) for pair in pairs)
    assert abs(whole - 850) < 100  # diff adds a line or two for each place
    assert epoch == 8
    shown = PAGES[0].read_text().partition("the loop of an epoch in `vae.py`:\n\n")[2]
    shown = shown.partition("\n\nRun the tests")[0]
    assert "backward" in shown and shown in "\n".join(lines_of("vae", "train_epoch"))


def test_everything_named_is_there():
    """A picture or page that is not in the repository; a run that cannot be repeated."""
    for page in PAGES:
        links = re.findall(r"\]\(([^)#\s]+)\)|src=\"([^\"]+)\"", page.read_text())
        for link in filter(None, (a or b for a, b in links)):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"
        for script, name in re.findall(r"\[`(\w+)\.(?!py)(\w+)`\]", page.read_text()):
            assert re.search(rf"^(def|class) {name}\b|^{name} = ",
                             (ROOT / f"{script}.py").read_text(), re.M), f"{script}.{name}"
    for metrics in RUNS.values():
        assert metrics["fast"] is False and metrics["data"] == "fashion"
        assert {"command", "versions", "machine", "seed"} <= metrics.keys()


def fill():
    """Write the numbers of the runs into the pages."""
    for page in PAGES:
        old = page.read_text()
        new = NUMBER.sub(lambda m: f"{written(measured(m['source']), m['text'])}{m['gap']}"
                                   f"<!-- {m['source']} -->", old)
        if new != old:
            page.write_text(new)
            print(f"{page.name}: numbers changed")


if __name__ == "__main__":
    fill()
