"""ae.py --tune and --ablate: each test names the bug that it would catch."""

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import ae
import common
import optuna
import pytest
import torch
from conftest import ROOT, history

FAST = ["--fast", "--data", "digits"]
SEARCH = [*FAST, "--tune", "4"]
REPORT = {"latent_dim": 38, "batch_size": 48, "dropout": 0.0, "lr": 0.002, "weight_decay": 5e-5}


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """(metrics, folder) of one search with real trainings."""
    folder = tmp_path_factory.mktemp("search")
    return ae.main([*SEARCH, "--out-dir", str(folder)]), folder


@pytest.fixture
def untrained(monkeypatch):
    """Trainings that do nothing; their validation MSE falls with the latent size, as real ones."""
    monkeypatch.setattr(ae, "train_epoch", lambda *args: 1.0)
    monkeypatch.setattr(ae, "evaluate", lambda model, x: 0.01 + 0.1 / model.encoder.linear[
        -1].out_features)
    monkeypatch.setattr(ae, "draw_search", lambda *args: None)


def create(path, how=optuna.create_study, **directions):
    """A study in a journal file, by Optuna itself."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    return how(study_name="ae", storage=storage, **directions)


def load(path):
    return create(path, optuna.load_study)


def journal(path):
    """The trials in a journal file."""
    return load(path).trials


def states(trials):
    return [trial.state.name for trial in trials]


def in_trial(number, change, monkeypatch):
    """Let change(epoch, val_mse) replace what trial number does after each epoch."""
    fit = ae.fit

    def spy(args, run, fold, *rest):
        *rest, after = rest
        return fit(args, run, fold, *rest,
                   (lambda *row: change(*row) or after(*row)) if fold == number else after)
    monkeypatch.setattr(ae, "fit", spy)


# --------------------------------------------------------------------------- search


def test_search(search, fails):
    """Another cost than the one promised, a best trial that is not, or a missing figure."""
    metrics, folder = search
    trials, best = metrics["trials"], metrics["best"]
    assert {k: trials[0][k] for k in best if k != "command"} == {
        k: v for k, v in best.items() if k != "command"}
    last = {row["fold"]: row["val_mse"] for row in history(folder) if row["epoch"] == 3}
    for trial in trials:
        assert trial["cost"] == pytest.approx(last[trial["trial"]] + 5e-5 * trial["latent_dim"])
        assert best["cost"] <= trial["cost"]
    first = next(trial for trial in trials if trial["trial"] == 0)
    assert REPORT.items() <= first.items()
    assert len(trials) == 4 and metrics == json.loads((folder / "metrics.json").read_text())
    assert {"tune_history.png", "tune_importance.png"} <= {f.name for f in folder.iterdir()}
    # a search holds many models: finetune.py and embed.py must not take its first for an encoder
    assert "not a finished training" in fails(2, common.find_run, "ae", "digits", str(folder))


def test_the_printed_command_trains_the_best_trial(search):
    """A command that does not parse, or rounds what was tried."""
    best = search[0]["best"]
    args = vars(ae.parse_args(shlex.split(best["command"])[2:]))
    assert {k: args[k] for k in REPORT} == {k: best[k] for k in REPORT}
    assert args["tune"] is None and args["epochs"] == 25 and args["data"] == "digits"


def test_no_point_exceeds_the_reports_size():
    """A search that wins by a larger network, or by a latent size that is a name only."""
    trial = optuna.trial.FixedTrial(REPORT)
    assert ae.suggest(trial) == REPORT
    largest = trial.distributions["latent_dim"].high
    assert largest == 38 == ae.parse_args(["--tune", "1"]).hidden
    assert sum(p.numel() for p in ae.Autoencoder(largest).parameters()) <= 29_716


def test_search_never_sees_the_test_set(search, monkeypatch):
    """An objective or a choice that depends on test images; a draw that the seed does not set."""
    load = common.load_data
    monkeypatch.setattr(common, "load_data", lambda args: load(args)._replace(
        x_test=torch.zeros(10, 1, 28, 28), y_test=torch.zeros(10)))
    assert ae.main([*SEARCH, "--out-dir", "blind"])["best"]["cost"] == search[0]["best"]["cost"]
    assert history("blind") == history(search[1])


def test_price(untrained):
    """A price that is not charged: MSE alone takes the largest latent size."""
    best = {price: ae.main([*FAST, "--tune", "9", "--price", price])["best"]["latent_dim"]
            for price in ("0", "0.01")}
    assert best["0"] == 38 and best["0.01"] < 10  # .1/D + .01 D is lowest at D = 3


def test_pruned_and_failed_trials_do_not_end_the_study(untrained, monkeypatch, capsys):
    """A loss that is nan ends the search, or counts; a hopeless trial is trained to the end."""
    def diverge(epoch, val_mse):
        raise FloatingPointError("the loss is nan at step 7")
    in_trial(1, diverge, monkeypatch)
    should_prune = optuna.trial.Trial.should_prune
    monkeypatch.setattr(optuna.trial.Trial, "should_prune",
                        lambda trial: trial.number == 2 or should_prune(trial))
    trials = ae.main([*SEARCH, "--storage", "j"])["trials"]
    assert states(journal("j")) == ["COMPLETE", "FAIL", "PRUNED", "COMPLETE", "COMPLETE"]
    assert trials[0]["state"] == "complete" and trials[-1]["cost"] is None
    assert "trial 1 does not count: the loss is nan at step 7" in capsys.readouterr().out


def test_the_pruner_waits_for_the_peak_of_the_rate(untrained, monkeypatch):
    """No pruning at all, or pruning of high rates before they can show what they are worth."""
    ends = {}
    monkeypatch.setattr(ae, "evaluate", lambda model, x: 0.01 * (1 + len(ends)))  # worse and worse
    fit = ae.fit

    def spy(args, run, fold, *rest):
        *rest, after = rest
        return fit(args, run, fold, *rest, lambda epoch, val_mse: (
            ends.update({fold: epoch}), after(epoch, val_mse)))
    monkeypatch.setattr(ae, "fit", spy)
    ae.main([*FAST, "--tune", "7", "--epochs", "5", "--storage", "j"])
    assert states(journal("j")) == ["COMPLETE"] * 5 + ["PRUNED"] * 2  # the median takes five
    assert list(ends.values()) == [5] * 5 + [3] * 2


def test_a_search_without_a_complete_trial(untrained, monkeypatch, fails):
    """Endless trials where every one diverges, or a traceback for want of a best."""
    def diverge(*args):
        raise FloatingPointError("nan")
    monkeypatch.setattr(ae, "train_epoch", diverge)
    assert "not one trial" in fails(1, ae.main, [*FAST, "--tune", "1", "--storage", "j"])
    assert states(journal("j")) == ["FAIL"] * 10


# --------------------------------------------------------------------------- going on


def test_interrupted_search_goes_on(untrained, monkeypatch, fails):
    """Trials lost or repeated, a total that starts again, the report's values forgotten."""
    def interrupt(epoch, val_mse):
        raise KeyboardInterrupt
    for number in (0, 3):
        in_trial(number, interrupt, monkeypatch)
    message = fails(130, ae.main, [*SEARCH, "--out-dir", "a b"])
    assert message.endswith("--resume 'a b'")
    fails(130, ae.main, ["--resume", "a b"])
    metrics = ae.main(["--resume", "a b"])
    trials = journal("a b/study.journal")
    assert states(trials) == ["FAIL", *["COMPLETE"] * 2, "FAIL", *["COMPLETE"] * 2]
    assert trials[0].params == trials[1].params == REPORT  # interrupted, so it was tried again
    assert len({tuple(trial.params.values()) for trial in trials}) == 5
    assert len(ae.main(["--resume", "a b"])["trials"]) == len(metrics["trials"])  # redraws
    more = ae.main([*FAST, "--tune", "6", "--storage", "a b/study.journal"])["trials"]
    assert sum(trial["cost"] is not None for trial in more) == 6

    Path("a b/study.journal").unlink()
    assert "is gone" in fails(2, ae.main, ["--resume", "a b"])


def test_no_point_twice(untrained):
    """The report's values enqueued by hand, or by two workers that go on, are trained twice."""
    ae.main([*FAST, "--tune", "1", "--storage", "j"])
    load("j").enqueue_trial(REPORT)
    ae.main([*FAST, "--tune", "2", "--storage", "j"])
    assert states(journal("j")) == ["COMPLETE", "FAIL", "COMPLETE"]


def test_workers_that_start_in_the_same_instant(untrained):
    """Who finds a study half made refuses it, or enqueues the report's values once more."""
    ae.main([*FAST, "--tune", "1", "--storage", "other"])
    study = create("j")

    def finish():  # what the worker that creates it does a moment later
        study.enqueue_trial(REPORT, user_attrs={"report": True})
        study.set_user_attr("settings", load("other").user_attrs["settings"])
    threading.Timer(0.3, finish).start()
    ae.main([*FAST, "--tune", "2", "--storage", "j"])
    assert states(journal("j")) == ["COMPLETE"] * 2
    assert [trial.params == REPORT for trial in journal("j")] == [True, False]


def test_two_workers_one_killed(tmp_path):
    """Finished trials lost, a total that is not kept, workers that try the same points."""
    def worker(name):
        return subprocess.Popen(
            [sys.executable, str(ROOT / "ae.py"), *FAST, "--tune", "6", "--storage", "j",
             "--epochs", "2", "--out-dir", name], stdout=subprocess.DEVNULL)
    workers = [worker("a"), worker("b")]
    while not (tmp_path / "b" / "checkpoint.pt").exists() and workers[1].poll() is None:
        time.sleep(0.01)
    time.sleep(0.1)  # it shall not die with the journal's lock: that takes 30 s to break
    workers[1].send_signal(signal.SIGKILL)  # in its first trial, or it came too late for one
    workers[1].wait()
    before = {t.number: t.value for t in journal("j") if t.state.is_finished()}
    assert workers[0].wait() == 0
    trials = journal("j")
    assert sum(name in ("COMPLETE", "PRUNED") for name in states(trials)) == 6
    assert {n: trials[n].value for n in before} == before
    assert len({tuple(trial.params.values()) for trial in trials}) == len(trials)
    shown = json.loads(Path("a/metrics.json").read_text())["trials"]
    assert sum(trial["cost"] is not None for trial in shown) == 6


def test_surplus_trials_end_early(untrained, monkeypatch):
    """Four workers that end with up to three trials more than asked for."""
    def others_finish(epoch, val_mse):
        for _ in range(3):
            study = load("j")
            trial = study.ask()
            ae.suggest(trial)
            study.tell(trial, 1.0)
    in_trial(1, others_finish, monkeypatch)
    ae.main([*SEARCH, "--storage", "j"])
    assert states(journal("j")) == ["COMPLETE", "FAIL", *["COMPLETE"] * 3]


@pytest.mark.parametrize("flags, named", [
    ("--price 0", "price"), ("--epochs 4", "epochs"), ("--seed 1", "seed")])
def test_another_search_is_refused(untrained, fails, flags, named):
    """Costs that cannot be compared land in one study."""
    ae.main([*FAST, "--tune", "1", "--storage", "j", "--out-dir", "a"])
    message = fails(2, ae.main, [*FAST, "--tune", "2", "--storage", "j", *flags.split()])
    assert named in message and "j" in message and sorted(os.listdir()) == ["a", "j"]


def test_another_direction_or_space_is_refused(untrained, fails, monkeypatch):
    """Optuna itself ignores another direction silently."""
    monkeypatch.setattr(ae.time, "sleep", lambda seconds: None)
    create("up", direction="maximize")
    create("two", directions=["minimize", "minimize"])
    for name in ("up", "two"):
        assert "another direction" in fails(2, ae.main, [*SEARCH, "--storage", name])
    create("foreign")
    assert "another data" in fails(2, ae.main, [*SEARCH, "--storage", "foreign"])

    ae.main([*FAST, "--tune", "1", "--storage", "j", "--out-dir", "a"])
    suggest = ae.suggest
    monkeypatch.setattr(ae, "suggest", lambda trial: suggest(trial) | {
        "l1": trial.suggest_float("l1", 0, 1)})
    monkeypatch.setattr(ae, "REPORT", {**REPORT, "l1": 0.0})
    assert "another l1" in fails(2, ae.main, [*SEARCH, "--storage", "j"])


def test_storage_that_cannot_be_used(untrained, fails):
    """A traceback of Optuna, SQLAlchemy or json."""
    ae.main([*FAST, "--tune", "1", "--storage", "j", "--out-dir", "a"])
    lines = Path("j").read_text().splitlines()
    Path("damaged").write_text("\n".join([*lines[:3], lines[3][:9], *lines[4:]]) + "\n")
    Path("picture").write_bytes(bytes(range(256)) * 9)
    Path("notes").write_text("my notes\n")
    Path("folder").mkdir()
    before = sorted(os.listdir())
    for where in ("damaged", "picture", "notes", "folder", "nowhere/j", "",
                  "mysql://nobody@127.0.0.1:1/x", "sqlite:///nowhere/x.db", "nosuch://x"):
        assert "--storage " + where in fails(2, ae.main, [*SEARCH, "--storage", where])
    assert sorted(os.listdir()) == before and Path("notes").read_text() == "my notes\n"


def test_half_a_line_in_the_journal(untrained):
    """A full disk tears the last line; the next is glued to it, and the study is lost for good."""
    ae.main([*FAST, "--tune", "2", "--storage", "j", "--out-dir", "a"])
    os.truncate("j", os.path.getsize("j") - 10)
    ae.main([*FAST, "--tune", "3", "--storage", "j", "--out-dir", "b"])
    assert [t.number for t in journal("j") if t.state.is_finished()] == [0, 2, 3]


def test_resume_makes_no_study(untrained, fails):
    """A new, empty study in the place of the one on a disk that is not mounted."""
    ae.main([*FAST, "--tune", "1", "--storage", "j", "--out-dir", "a"])
    os.rename("j", "k")
    assert "is gone" in fails(2, ae.main, ["--resume", "a"])
    assert sorted(os.listdir()) == ["a", "k"]


def test_database(untrained, monkeypatch, fails):
    """A URL taken for a file's name; a traceback when the database goes away."""
    for total in ("1", "2"):
        metrics = ae.main([*FAST, "--tune", total, "--storage", "sqlite:///x.db"])
    assert len(metrics["trials"]) == 2 and Path("x.db").exists()

    def gone(epoch, val_mse):
        raise optuna.exceptions.StorageInternalError("it is\nlocked")
    in_trial(2, gone, monkeypatch)
    message = fails(1, ae.main, [*SEARCH, "--storage", "sqlite:///x.db", "--out-dir", "a"])
    assert "it is locked" in message and message.endswith("--resume a")


@pytest.mark.parametrize("flags", [
    "--tune 0", "--tune", "--tune 2 --ablate", "--tune 2 --folds 3", "--ablate --folds 3",
    "--tune 2 --lr 0.1", "--tune 2 --hidden 99", "--tune 2 --recipe report", "--storage x",
    "--price 1", "--tune 2 --price -1"])
def test_bad_flags_end_in_one_line(flags, fails):
    """A flag that is silently ignored, or a search in a larger network."""
    message = fails(2, ae.main, flags.split())
    assert flags.split()[-2 if flags[-1].isdigit() or "report" in flags else -1] in message or (
        flags.split()[0] in message)
    assert os.listdir() == []


# --------------------------------------------------------------------------- ablation


@pytest.fixture
def spied(monkeypatch):
    """[(name of the optimiser, args, x)] of each epoch, none of which trains."""
    seen = []
    monkeypatch.setattr(ae, "train_epoch", lambda model, x, optimizer, schedule, args, generator: (
        seen.append((model, optimizer, args, x)) or 1.0))
    return seen


def test_ablation(spied, monkeypatch):
    """A variant that changes nothing or too much, another split or length than its rivals'."""
    val_mse = iter(range(1, 1000))
    monkeypatch.setattr(ae, "evaluate", lambda model, x: float(next(val_mse)))
    metrics = ae.main([*FAST, "--ablate", "--epochs", "2", "--seed", str(2**32 - 1),
                       "--out-dir", "a"])
    assert len(spied) == 6 * 3 * 2
    variants = list(metrics["ablation"].items())
    plain = {"batchnorm": True, "dropout": 0.0, "l1": 0.0, "weight_decay": 0.0, "lr": 0.01,
             "optimizer": "adam", "epochs": 2}
    changed = ({}, {"batchnorm"}, {"dropout"}, {"l1"}, {"weight_decay"}, {"optimizer", "lr"})
    for n, ((_, row), names) in enumerate(zip(variants, changed, strict=True)):
        for seed in range(3):
            model, optimizer, args, x = spied[(3 * n + seed) * 2]
            assert {k for k, v in plain.items() if vars(args)[k] != v} == set(names) == set(
                row["flags"])
            assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == (
                "batchnorm" not in names)
            assert type(optimizer).__name__ == ("SGD" if "optimizer" in names else "Adam")
            assert optimizer.param_groups[0]["weight_decay"] == args.weight_decay
            assert torch.equal(x, spied[2 * seed][3])  # the baseline's split
        first = 12 * n  # values 1, 2, 3, ... in the order of evaluation: val, train, val, ...
        assert row["each"] == [first + 3, first + 7, first + 11]
        assert (row["val_mse"], row["std"]) == (first + 7, statistics.stdev([3, 7, 11]))
        assert (row["difference"], row["difference_std"], row["train_mse"]) == (first, 0, first + 8)
    assert not torch.equal(spied[0][3], spied[2][3])
    assert Path("a/ablation.png").exists()


def test_interrupted_ablation_goes_on(spied, monkeypatch, fails):
    """A study of half an hour that starts again at nothing; test data in a choice."""
    load = common.load_data
    monkeypatch.setattr(ae, "evaluate", lambda model, x: x.mean().item())
    whole = ae.main([*FAST, "--ablate", "--out-dir", "whole"])
    monkeypatch.setattr(common, "load_data", lambda args: load(args)._replace(
        x_test=torch.zeros(10, 1, 28, 28)))
    del spied[:]
    train_epoch = ae.train_epoch

    def interrupted(*args):
        if len(spied) == 10:
            raise KeyboardInterrupt
        return train_epoch(*args)
    monkeypatch.setattr(ae, "train_epoch", interrupted)
    fails(130, ae.main, [*FAST, "--ablate", "--out-dir", "half"])
    monkeypatch.setattr(ae, "train_epoch", train_epoch)
    assert ae.main(["--resume", "half"])["ablation"] == whole["ablation"]
    assert len(spied) == 6 * 3 * 3 and history("half") == history("whole")
