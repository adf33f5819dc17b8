"""The bug clinic, and the exercises with a number: each test names the bug that it would catch."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import ae
import common
import finetune
import pytest
import torch
import vae
from check import look_up
from clinic import PATCHES, ROOT, VIEWS, header


class Copy(torch.nn.Module):
    """The perfect autoencoder: what comes in goes out."""

    def __init__(self):
        super().__init__()
        self.w, self.log_sigma = torch.nn.Parameter(torch.ones(())), torch.tensor(0.0)

    def forward(self, x, rng=None):
        zero = torch.zeros(len(x), 2)
        return (self.w * x, zero, zero) if rng else self.w * x


@pytest.mark.parametrize("script", [ae, vae])
def test_the_target_is_the_augmented_image(script):
    """The network sees the flipped image and is asked for the one that was not flipped."""
    x, model = torch.rand(20, 1, 28, 28), Copy()
    args = Namespace(batch_size=8, augment="flip", l1=0, beta=1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    losses = [script.train_epoch(model, x, optimizer, schedule, Namespace(
        **vars(args) | {"augment": kind}), common.seed_everything(0)) for kind in ("none", "flip")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_the_rate_falls_to_zero():
    """A schedule that is advanced once per epoch: the rate is still rising when training ends."""
    args = ae.parse_args(["--epochs", "4", "--batch-size", "8", "--device", "cpu"])
    model = ae.Autoencoder(2, 3, (2, 2), (2, 2, 2))
    optimizer, schedule = ae.make_optimizer(model, args, 40)
    for _ in range(args.epochs):
        ae.train_epoch(model, torch.rand(40, 1, 28, 28), optimizer, schedule, args,
                       common.seed_everything(0))
    assert schedule.get_last_lr()[0] < 0.05 * args.lr


def test_each_image_is_compared_with_its_own_label():
    """Predictions (N, 1) against labels (N,): an accuracy of all against all, near chance."""
    y = torch.tensor([0, 1, 2, 2])
    loss, accuracy = finetune.loss_and_accuracy(9 * torch.eye(3)[[0, 1, 2, 0]], y)
    assert accuracy == 0.75
    assert loss == pytest.approx(9 / 4, abs=1e-3)  # of the one that is wrong


def test_the_clinic_shows_every_case():
    """A case without a picture, three questions, its own command, lines and test; a large one."""
    page = (ROOT / "results" / "clinic.md").read_text(encoding="utf-8")
    assert len(PATCHES) == len(VIEWS) >= 12
    cases = page.split("\n## ")[1:]
    chapters = [patch.name.split("-")[1] for patch in PATCHES]
    assert all(chapters.count(name) >= 2 for name in ("ae", "vae", "gan", "finetune", "embed"))
    for patch, case in zip(PATCHES, cases, strict=True):
        number = patch.name[:2]
        assert f"clinic/{number}.png" in case
        assert (ROOT / "results" / "clinic" / f"{number}.png").stat().st_size <= 90_000
        assert header(patch)["command"] in case and header(patch)["caught-by"] in case
        seen, folded = case.split("<details>", 1)
        assert seen.count("?") == 3 and header(patch)["title"] not in seen
        diff = patch.read_text().partition("\n@@")[2].splitlines()
        changed = [line for line in diff if line.startswith(("+", "-"))]
        assert 1 <= len(changed) <= 5
        assert all(line[1:].strip() in folded for line in changed if line.startswith("+"))


# --------------------------------------------------------------------------- exercises

EXERCISES = json.loads((ROOT / "tests" / "exercises.json").read_text(encoding="utf-8"))


def check(*words):
    """(status, standard output, standard error) of check.py."""
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "check.py"), *words],
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run():
    """A folder of a finished run, as a student would have it."""
    def make(**metrics):
        Path("run").mkdir(exist_ok=True)
        Path("run/metrics.json").write_text(json.dumps(
            {"fast": False, "data": "fashion", **metrics}))
    return make


def test_check_says_right_or_gives_a_hint(run):
    """A wrong number that passes, a right one that does not, an answer that was not asked for."""
    exercise = EXERCISES[0]
    key, value, tolerance = exercise["key"], exercise["value"], exercise["tolerance"]
    run(**{key: value + 0.9 * tolerance})
    status, said, _ = check(exercise["id"], "run")
    assert status == 0 and "right" in said and exercise["answer"] not in said
    run(**{key: value + 1.1 * tolerance})
    status, said, _ = check(exercise["id"], "run")
    assert status == 1 and exercise["hint"] in said and exercise["answer"] not in said
    status, said, _ = check(exercise["id"], "run", "--answer")
    assert exercise["answer"] in said


def test_check_refuses_in_one_line(run):
    """A traceback for a wrong folder, an unfinished run, other data, or another chapter's run."""
    run(another=1)
    Path("begun").mkdir()
    Path("begun/config.json").write_text("{}")
    for words, said in (("ae-1 nowhere", "nowhere"), ("ae-1 begun", "not finished"),
                        ("ae-99 run", "ae-99"), ("ae-1 run", EXERCISES[0]["key"])):
        status, out, error = check(*words.split())
        assert (status, out) == (2, "") and said in error and len(error.splitlines()) == 1
    run(data="digits")
    assert check("ae-1", "run")[0] == 2


def test_exercises_are_measured():
    """A value to reach that no run of ours reached, or a hint that gives it away."""
    assert len({exercise["id"] for exercise in EXERCISES}) == len(EXERCISES)
    for exercise in EXERCISES:
        metrics = json.loads((ROOT / "results" / exercise["run"] / "metrics.json").read_text())
        value = look_up(metrics, exercise["key"])
        assert abs(value - exercise["value"]) <= exercise["tolerance"] / 2, exercise["id"]
        assert f"{exercise['value']:g}".lstrip("0") not in exercise["hint"]
