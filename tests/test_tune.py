"""ae.py --tune and --ablate: each test names the bug that it would catch."""

import contextlib
import io
import json
import os
import shlex
import statistics
from pathlib import Path

import ae
import common
import optuna
import pytest
import torch
from conftest import forked, history, kill, numbers
from test_ae import equal, few, no_figures, weights  # noqa: F401

CPU = ["--device", "cpu"]
FAST = ["--fast", "--data", "digits", *CPU]
SEARCH = [*FAST, "--tune", "4"]
REPORT = {"latent_dim": 38, "batch_size": 48, "dropout": 0.0, "lr": 0.002, "weight_decay": 5e-5}


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """(metrics, folder, what is printed) of one search with real trainings."""
    folder = tmp_path_factory.mktemp("search")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        metrics = ae.main([*SEARCH, "--epochs", "2", "--out-dir", str(folder)])
    return metrics, folder, printed.getvalue()


@pytest.fixture
def untrained(monkeypatch):
    """Trainings that do nothing; their validation MSE falls with the latent size, as real ones."""
    monkeypatch.setattr(ae, "train_epoch", lambda *args: 1.0)
    monkeypatch.setattr(ae, "evaluate", lambda model, x: 0.01 + 0.1 / model.encoder.linear[
        -1].out_features)
    monkeypatch.setattr(ae, "draw_search", lambda *args: None)


def journal(path):
    """The trials of the only study in a journal file."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    return optuna.load_study(study_name=None, storage=storage).trials


def states(trials):
    return [trial.state.name for trial in trials]


def finished(trials):
    return {trial.number: trial.value for trial in trials
            if trial.state.name in ("COMPLETE", "PRUNED")}


def in_trial(number, change, monkeypatch):
    """Let change() happen at the end of each epoch of trial number."""
    report = optuna.Trial.report

    def spy(trial, *cost):
        if trial.number == number:
            change()
        report(trial, *cost)
    monkeypatch.setattr(optuna.Trial, "report", spy)


# --------------------------------------------------------------------------- search


def test_search(search, no_figures):  # noqa: F811
    """Another cost than the one promised, a best trial that is not, or a missing figure."""
    metrics, folder, _ = search
    # what was trained with, not what was drawn: the command at the end has two digits
    assert all(float(f"{trial['lr']:.2g}") == trial["lr"] for trial in metrics["trials"])
    trials, best = metrics["trials"], metrics["best"]
    assert {k: trials[0][k] for k in best if k != "command"} == {
        k: v for k, v in best.items() if k != "command"}
    for trial in trials:
        assert trial["state"] == "complete" and trial["epochs"] == 2
        assert trial["cost"] == pytest.approx(trial["val_mse"] + 5e-5 * trial["latent_dim"])
        assert best["cost"] <= trial["cost"]
    first = next(trial for trial in trials if trial["trial"] == 0)
    assert REPORT.items() <= first.items()
    assert [trial["trial"] for trial in trials if trial["report"]] == [0]
    assert len(trials) == 4 and metrics == json.loads((folder / "metrics.json").read_text())
    assert "search.png" in {f.name for f in folder.iterdir()}
    # trial 0 draws from (seed, 0), as the first fold of a run does: the same training
    flags = [word for name, value in REPORT.items() for word in (
        f"--{name.replace('_', '-')}", str(value))]
    ae.main([*FAST, "--epochs", "2", *flags, "--out-dir", "alone"])
    assert first["val_mse"] == pytest.approx(history("alone")[-1]["val_mse"])


def test_the_printed_command_trains_the_best_trial(search):
    """A command that does not parse, is for other data, or rounds what was tried."""
    metrics, folder, printed = search
    lines = printed.splitlines()
    command, = (line.partition(": ")[2] for line in lines if line.startswith("train with the best"))
    assert command.startswith("python ae.py ") and command.startswith(metrics["best"]["command"])
    args = vars(ae.parse_args([*shlex.split(command)[2:], *CPU]))
    assert {k: args[k] for k in REPORT} == {k: metrics["best"][k] for k in REPORT}
    assert (args["tune"], args["epochs"], args["data"]) == (None, 25, "digits")
    assert lines[-1] == str(folder)


def test_the_picture_marks_the_reports_trial():
    """The ring around trial 0, though the report's values came later; pruned trials as dots."""
    rows = [{"trial": n, "state": state, "latent_dim": 4 + n, "dropout": 0.1 * n, "lr": 0.01,
             "cost": 0.02 + n, "report": n == 2} for n, state in enumerate(
                 ("pruned", "complete", "complete"))]
    figures = {}
    run = type("Figures", (), {"save": lambda self, fig, name, caption: figures.update(
        {name: fig})})()
    ae.draw_search(run, rows, "digits")
    complete, pruned, ring = (
        c.get_offsets().tolist() for c in figures["search"].axes[1].collections)
    assert (complete, pruned, ring) == ([[5, 1.02], [6, 2.02]], [[4, 0.02]], [[6, 2.02]])


def test_no_point_exceeds_the_reports_size():
    """A search that wins by a larger network, or by a latent size that is a name only."""
    trial = optuna.trial.FixedTrial(REPORT)
    assert ae.suggest(trial) == REPORT
    largest = trial.distributions["latent_dim"].high
    assert largest == 38 == ae.parse_args(["--tune", "1", *CPU]).hidden
    assert sum(p.numel() for p in ae.Autoencoder(largest).parameters()) <= 29_716


def test_search_never_sees_the_test_set(search, monkeypatch):
    """An objective or a choice that depends on test images; a draw that the seed does not set."""
    load = common.load_data
    monkeypatch.setattr(common, "load_data", lambda args: load(args)._replace(
        x_test=torch.ones(10, 1, 28, 28), y_test=torch.zeros(10)))
    monkeypatch.setattr(ae, "draw_search", lambda *args: None)
    blind = ae.main([*FAST, "--tune", "2", "--epochs", "2"])["trials"]
    assert blind == [trial for trial in search[0]["trials"] if trial["trial"] < 2]


def test_price(untrained):
    """A price that is not charged: MSE alone takes the largest latent size."""
    best = {price: ae.main([*FAST, "--tune", "9", "--price", price])["best"]["latent_dim"]
            for price in ("0", "0.01")}
    assert best["0"] == 38 and best["0.01"] < 10  # .1/D + .01 D is lowest at D = 3


def test_pruned_and_failed_trials_do_not_end_the_study(untrained, monkeypatch, capsys):
    """A loss that is nan ends the search, or wins it; a hopeless trial is trained to the end."""
    epochs, evaluate = iter(range(100)), ae.evaluate
    monkeypatch.setattr(ae, "evaluate", lambda *args: (  # in the second epoch of trial 1
        float("nan") if next(epochs) == 4 else evaluate(*args)))
    should_prune = optuna.trial.Trial.should_prune
    monkeypatch.setattr(optuna.trial.Trial, "should_prune",
                        lambda trial: trial.number == 2 or should_prune(trial))
    trials = ae.main([*SEARCH, "--storage", "j"])["trials"]
    assert states(journal("j")) == ["COMPLETE", "PRUNED", "PRUNED", "COMPLETE"]
    assert [trial["state"] for trial in trials[:2]] == ["complete"] * 2
    assert {trial["trial"]: trial["epochs"] for trial in trials} == {0: 3, 1: 1, 2: 1, 3: 3}
    assert "trial 1: pruned, 2 of 4 finished" in capsys.readouterr().out


def test_the_pruner_waits_for_the_peak_of_the_rate(untrained, monkeypatch):
    """No pruning at all, or pruning of high rates before they can show what they are worth."""
    built, build = [], ae.build
    monkeypatch.setattr(ae, "build", lambda args: built.append(1) or build(args))
    monkeypatch.setattr(ae, "evaluate", lambda model, x: 0.1 * len(built))  # worse and worse
    ae.main([*FAST, "--tune", "7", "--epochs", "5", "--storage", "j"])
    assert states(journal("j")) == ["COMPLETE"] * 5 + ["PRUNED"] * 2  # the median takes five
    assert [len(t.intermediate_values) for t in journal("j")] == [5] * 5 + [3] * 2


def test_a_search_without_a_complete_trial(untrained, monkeypatch, fails):
    """Endless trials where every one diverges, or a traceback for want of a best."""
    monkeypatch.setattr(ae, "evaluate", lambda *args: float("nan"))
    assert "not one trial" in fails(1, ae.main, [*FAST, "--tune", "1", "--storage", "j"])
    assert states(journal("j")) == ["PRUNED"]


# --------------------------------------------------------------------------- going on


def test_interrupted_search_goes_on(untrained, monkeypatch, fails):
    """Trials lost or repeated, or a total that starts again."""
    def interrupt():
        raise KeyboardInterrupt
    for number in (0, 3):
        in_trial(number, interrupt, monkeypatch)
    fails(130, common.start, lambda: ae.main([*SEARCH, "--out-dir", "a b"]))
    fails(130, common.start, lambda: ae.main(["--resume", "a b", *CPU]))
    metrics = ae.main(["--resume", "a b", *CPU])
    trials = journal("a b/study.journal")
    assert states(trials) == ["FAIL", *["COMPLETE"] * 2, "FAIL", *["COMPLETE"] * 2]
    assert trials[0].params == trials[1].params == REPORT  # the values to beat are not lost
    assert len({tuple(trial.params.values()) for trial in trials}) == len(trials) - 1
    redrawn = ae.main(["--resume", "a b", *CPU])  # nothing is left to be trained
    assert numbers(redrawn) == numbers(metrics) and len(metrics["trials"]) == 4
    os.rename("a b/study.journal", "moved")
    assert "study.journal, is gone" in fails(2, ae.main, ["--resume", "a b", *CPU])
    os.rename("moved", "a b/study.journal")
    more = ae.main([*FAST, "--tune", "6", "--storage", "a b/study.journal"])["trials"]
    assert len(more) == 6 and all(trial["state"] != "running" for trial in more)


def test_a_full_disk_ends_the_search_in_one_line(untrained, monkeypatch, fails):
    """Optuna's "Should not reach.", with forty lines of traceback."""
    def fill(backend, logs):
        raise OSError(28, "No space left on device")
    in_trial(1, lambda: monkeypatch.setattr(ae.JournalFileBackend, "append_logs", fill),
             monkeypatch)
    message = fails(1, common.start, lambda: ae.main([*SEARCH, "--out-dir", "a"]))
    assert "cannot write" in message and message.endswith("python ae.py --resume a")
    assert states(journal("a/study.journal"))[0] == "COMPLETE"


def test_a_bug_in_a_trial_keeps_its_traceback(untrained, monkeypatch):
    """It is called a full disk."""
    def bug(*args):
        raise AssertionError("shapes differ")
    monkeypatch.setattr(ae, "train_epoch", bug)
    with pytest.raises(AssertionError, match="shapes differ"):
        common.start(lambda: ae.main([*SEARCH, "--out-dir", "a"]))


def test_two_workers_one_killed(monkeypatch):
    """Finished trials lost, fewer than asked for, workers that try the same points."""
    command = [*FAST, "--tune", "4", "--epochs", "2", "--storage", "j", "--out-dir"]
    child, out = forked(ae.main, [*command, "b"])

    def next_trial():  # it says that a trial starts
        return next((line for line in out if "latent_dim" in line), None)
    assert next_trial() and next_trial()  # the report's values are done, the second is under way
    seen = []

    def kill_the_other():
        if not seen:
            assert next_trial()  # it just began one, so it does not hold the journal's lock
            kill(child)
            seen.append(journal("j"))
    report = optuna.Trial.report
    monkeypatch.setattr(optuna.Trial, "report", lambda *args: (kill_the_other(), report(*args)))
    monkeypatch.setattr(ae, "draw_search", lambda *args: None)
    trials = ae.main([*command, "a"])["trials"]
    out.close()
    before, after = finished(seen[0]), journal("j")
    assert before and before.items() <= finished(after).items()
    assert len(finished(after)) == 4 and states(after).count("RUNNING") == 1  # what was killed
    assert len({tuple(trial.params.values()) for trial in after}) == len(after) == 5
    assert sum(trial["state"] in ("complete", "pruned") for trial in trials) == 4


@pytest.mark.parametrize("flags", [["--price", "0"], ["--epochs", "4"], ["--seed", "1"]])
def test_other_searches_in_one_storage(untrained, flags):
    """Costs that cannot be compared in one study: of other splits, lengths or prices."""
    alone = ae.main([*FAST, "--tune", "2", "--storage", "j"])
    assert len(ae.main([*FAST, "--tune", "1", "--storage", "j", *flags])["trials"]) == 1
    assert ae.main([*FAST, "--tune", "2", "--storage", "j"])["trials"] == alone["trials"]


def test_storage_that_cannot_be_used(untrained, fails):
    """A traceback of Optuna, SQLAlchemy or json."""
    ae.main([*FAST, "--tune", "1", "--storage", "j", "--out-dir", "a"])
    lines = Path("j").read_text().splitlines()
    Path("damaged").write_text("\n".join([*lines[:3], lines[3][:9], *lines[4:]]) + "\n")
    Path("picture").write_bytes(bytes(range(256)) * 9)
    Path("folder").mkdir()
    for where in ("damaged", "picture", "folder", "nowhere/j", "mysql://nobody@127.0.0.1:1/x",
                  "sqlite:///nowhere/x.db", "nosuch://x"):
        assert where in fails(2, ae.main, [*SEARCH, "--storage", where])


def test_database(untrained):
    """A URL taken for a file's name."""
    for total in ("1", "2"):
        metrics = ae.main([*FAST, "--tune", total, "--storage", "sqlite:///x.db"])
    assert len(metrics["trials"]) == 2 and Path("x.db").exists()


@pytest.mark.parametrize("flags", [
    "--tune 0", "--tune", "--tune 2 --ablate", "--tune 2 --folds 3", "--ablate --folds 3",
    "--tune 2 --lr 0.1", "--tune 2 --hidden 99", "--tune 2 --recipe report", "--storage x",
    "--price 1", "--tune 2 --price -1", "--ablate --optimizer sgd", "--ablate --recipe first",
    "--tune 2 --storage="])
def test_bad_flags_end_in_one_line(flags, fails):
    """A flag that is silently ignored, or a search in a larger network."""
    message = fails(2, ae.main, [*FAST, *flags.split()])
    named = [word.strip("=") for word in flags.split() if word.startswith("--")][-1]
    assert named in message and os.listdir() == []


# --------------------------------------------------------------------------- ablation


@pytest.fixture
def spied(monkeypatch):
    """[(model, optimiser, args, x)] of each epoch, none of which trains."""
    seen = []
    monkeypatch.setattr(ae, "train_epoch", lambda model, x, optimizer, schedule, args, rng: (
        seen.append((model, optimizer, args, x)) or 1.0))
    return seen


def test_ablation(spied, monkeypatch):
    """A variant that changes nothing or too much, another split or length than its rivals'."""
    val_mse = iter(range(1, 1000))
    monkeypatch.setattr(ae, "evaluate", lambda model, x: float(next(val_mse)))
    metrics = ae.main([*FAST, "--ablate", "--epochs", "2", "--seed", str(10**9),
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


def test_interrupted_ablation_goes_on(few, no_figures, monkeypatch, fails):  # noqa: F811
    """A study of half an hour that starts again at nothing, or goes on differently; test data in
    a choice."""
    monkeypatch.setattr(ae, "VARIANTS", {k: ae.VARIANTS[k] for k in ("baseline", "dropout 0.2")})
    flags = [*FAST, "--ablate", "--epochs", "2", "--filters", "2", "4", "--out-dir"]
    whole = ae.main([*flags, "whole"])
    load = common.load_data
    monkeypatch.setattr(common, "load_data", lambda args: load(args)._replace(
        x_test=torch.ones(10, 1, 28, 28)))
    train_epoch, calls = ae.train_epoch, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 10:  # the second epoch of the second variant's second seed
            raise KeyboardInterrupt
        return train_epoch(*args)
    monkeypatch.setattr(ae, "train_epoch", interrupted)
    fails(130, common.start, lambda: ae.main([*flags, "half"]))
    resumed = ae.main(["--resume", "half", *CPU])
    assert len(calls) == 2 * 3 * 2 + 1  # what was interrupted, again
    assert numbers(resumed) == numbers(whole) and history("half") == history("whole")
    assert equal(weights("half"), weights("whole")) and len(weights("whole")) == 2 * 3
