"""finetune.py: each test names the bug that it would catch."""

import copy
import json
import os
from argparse import Namespace
from pathlib import Path

import ae
import common
import finetune
import gan
import numpy as np
import pytest
import torch
import vae
from conftest import history, numbers, readme_commands

FAST = ["--fast", "--data", "digits", "--device", "cpu"]
GPU = common.pick_device("auto")
LOAD = common.load_data


@pytest.fixture(scope="module")
def digits():
    return common.load_data(finetune.parse_args(FAST))


@pytest.fixture(scope="module")
def fewer(digits):
    """100 training and 60 test images, for runs of which only the course matters."""
    return digits._replace(x_train=digits.x_train[:100], y_train=digits.y_train[:100],
                           x_test=digits.x_test[:60], y_test=digits.y_test[:60])


@pytest.fixture(autouse=True)
def few(monkeypatch, fewer):
    """What main() loads: ResNet18 is slow, a handful of images must do."""
    monkeypatch.setattr(common, "load_data", lambda args: fewer)


@pytest.fixture
def parity(fewer):
    """Images of two classes, as somebody's own would be."""
    return fewer._replace(name="parity", classes=("even", "odd"), y_train=fewer.y_train % 2,
                          y_test=fewer.y_test % 2)


def quick_main(script, data, calls=None):
    """A main that makes a finished run of an untrained network, and notes what it was asked for."""
    def main(argv):
        args = script.parse_args(argv)
        if calls is not None:
            calls.append((script.__name__, args))
        run = common.Run(args, data)
        common.seed_everything(args.seed)
        model = script.build(args)
        if script is ae:
            model(data.x_train[:20])  # gives BatchNorm statistics
        return run.finish({}, [], model)
    return main


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, fewer):
    """The folder of a run of ae.py, of another size than the default, and with dropout."""
    folder = str(tmp_path_factory.mktemp("ae"))
    quick_main(ae, fewer)([*FAST, "--latent-dim", "12", "--hidden", "20", "--dropout", "0.5",
                           "--out-dir", folder])
    return folder


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory, encoder, fewer):
    """(metrics, folder) of a --fast run of all models, without ImageNet weights."""
    folder = tmp_path_factory.mktemp("fast")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder / "empty"))
        patch.setattr(common, "load_data", lambda args: fewer)
        return finetune.main([*FAST, "--epochs", "1", "--encoder", encoder, "--out-dir",
                              str(folder / "run")]), folder / "run"


@pytest.fixture
def no_figures(monkeypatch):
    for name in ("confusion", "mistakes", "per_class"):
        monkeypatch.setattr(finetune, f"draw_{name}", lambda *args: None)
    monkeypatch.setattr(common, "plot_curves", lambda *args: None)


@pytest.fixture
def few_trainings(monkeypatch, fewer):
    """Two seeds and two candidates of --labels, and codes of an untrained VAE."""
    monkeypatch.setattr(finetune, "SEEDS", 2)
    monkeypatch.setattr(finetune, "CANDIDATES", finetune.CANDIDATES[::2])
    monkeypatch.setattr(vae, "main", quick_main(vae, fewer))


class NoRun:
    """Takes the place of a Run in fit(); before: the weights that the training starts from."""

    rows = ()

    def begin(self, part, epochs, model, **others):
        self.before = copy.deepcopy(model.state_dict())
        return 1

    def end_epoch(self, score, **row):
        pass

    def load_best(self, model):
        pass


def trained(data, name, *flags, n=40, **change):
    """(network, its NoRun) after an epoch over n images, 20 at a time; change: of its settings."""
    t = finetune.settings(finetune.parse_args([
        *FAST, "--model", name, "--epochs", "1", "--augment", "none", "--batch-size", "20",
        *flags]), name)
    vars(t).update(change)
    run, part = NoRun(), (data.x_train[:n], data.y_train[:n])
    model, _ = finetune.fit(t, run, "", (0, 0), part, [p[:5] for p in part], len(data.classes))
    return model, run


# --------------------------------------------------------------------------- models


@pytest.mark.parametrize("name, train, frozen", [
    ("ae", "head", {"encoder"}), ("ae", "last", {"encoder.block1", "encoder.block2"}),
    ("resnet18-random", "head", {"net.conv1", "net.bn1", "net.layer1", "net.layer2", "net.layer3",
                                 "net.layer4"}),
    ("resnet18-random", "last", {"net.conv1", "net.bn1", "net.layer1", "net.layer2"})])
def test_frozen_means_bit_identical(name, train, frozen, digits, encoder):
    """Statistics of a frozen BatchNorm that keep moving, weight decay on it, a trained part that
    does not learn."""
    flags = ["--encoder", encoder] if name == "ae" else []
    model, run = trained(digits, name, "--train", train, *flags, lr=0.01, weight_decay=0.01)
    for key, value in model.state_dict().items():
        is_frozen = any(key.startswith(f"{part}.") for part in frozen)
        assert value.equal(run.before[key]) == is_frozen, key


def test_frozen_dropout_is_off(digits, encoder, monkeypatch):
    """A frozen encoder whose dropout goes on: its codes would be noise."""
    train_epoch, seen = finetune.train_epoch, []

    def spy(model, *rest):
        hook = model.encoder.register_forward_hook(lambda _, x, z: seen.append((x[0], z)))
        loss = train_epoch(model, *rest)
        hook.remove()
        return loss
    monkeypatch.setattr(finetune, "train_epoch", spy)
    for train, off in (("head", True), ("all", False)):
        seen.clear()
        model, run = trained(digits, "ae", "--train", train, "--encoder", encoder, lr=1e-8)
        assert len(seen) == 2
        assert all(model.encoder(x).allclose(z, atol=1e-5) == off for x, z in seen)


def test_what_the_encoder_starts_from(encoder):
    """'Pre-trained' that is random, 'from scratch' that is not, or of another architecture."""
    saved = ae.load_run(encoder).encoder.state_dict()
    models = [finetune.build(finetune.settings(finetune.parse_args([
        *FAST, "--model", "ae", "--encoder", encoder, *scratch]), "ae"), 10).encoder.state_dict()
        for scratch in ([], ["--scratch"])]
    assert saved["block1.2.running_mean"].abs().sum() > 0
    assert all(value.equal(saved[key]) for key, value in models[0].items())
    key = "block1.0.weight"
    assert models[0][key].shape == models[1][key].shape and not models[0][key].equal(models[1][key])
    assert models[1]["block1.2.running_mean"].abs().sum() == 0  # nor its statistics
    assert models[0]["linear.4.weight"].shape == models[1]["linear.4.weight"].shape == (12, 20)


def test_random_statistics_are_calibrated(digits):
    """Random frozen layers with BatchNorm statistics of 0 and 1 that fit nothing."""
    model, _ = trained(digits, "resnet18-random", "--train", "last")
    seen = []
    model.net.bn1.register_forward_hook(lambda module, x, out: seen.append(out.clone()))
    with torch.no_grad():
        model.eval()(digits.x_train[:40])
    assert seen[0].mean((0, 2, 3)).abs().max() < 1e-3
    assert (seen[0].std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_size_of_homework_1s_cnn():
    """Another network than the report's; features that are not the last hidden layer."""
    model, x = finetune.CNN(10).eval(), torch.rand(3, 1, 28, 28)
    widths = [m.weight.shape[0] for m in model.modules()
              if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert widths == [35, 35, 375, 105, 10]
    assert model.features(x).shape == (3, 105)
    assert model(x).allclose(model.head[-1](model.features(x)))


# --------------------------------------------------------------------------- loss, metrics


def test_confusion_matrix_is_not_transposed(encoder, fewer, monkeypatch, no_figures):
    """Swapped axes: with every 4 taken for a 2, row 4 and column 2 must hold them."""
    y = torch.where(fewer.y_test == 4, 2, fewer.y_test)
    predict = finetune.predict
    monkeypatch.setattr(finetune, "predict", lambda model, x, *rest, **more: torch.eye(10)[y] if (
        x is fewer.x_test) else predict(model, x, *rest, **more))
    m = finetune.main([*FAST, "--model", "ae", "--epochs", "1", "--encoder", encoder]
                      )["models"]["ae"]
    fours = (fewer.y_test == 4).sum().item()
    assert m["confusion"][4][2] == fours > 0 == m["confusion"][2][4] == m["confusion"][4][4]
    assert m["per_class"] == [float(c != 4) for c in range(10)]
    assert m["test_accuracy"] == pytest.approx(1 - fours / len(y))


def test_evaluation_weighs_images_not_batches(digits):
    """An average of batch means with a smaller last batch; evaluation in training mode."""
    model, x, y = finetune.CNN(10), digits.x_train[:207], digits.y_train[:207]
    model.eval()
    with torch.no_grad():
        p = model(x).log_softmax(1)
    model.train()
    loss, accuracy = finetune.evaluate(model, x, y)
    assert loss == pytest.approx(-p[range(207), y].mean().item(), rel=1e-5)
    assert accuracy == pytest.approx((p.argmax(1) == y).sum().item() / 207)


def test_mirrored_prediction(digits):
    """An image and its mirror image that are told apart, or an upside-down one; labels moved."""
    model, x = finetune.CNN(10), digits.x_test[:7]
    logits = finetune.predict(model, x, mirror=True)
    assert logits.allclose(finetune.predict(model, x.flip(3), mirror=True), atol=1e-6)
    assert logits.allclose((model(x) + model(x.flip(3))) / 2, atol=1e-6)
    assert not logits.allclose(finetune.predict(model, x))
    for flags, mirror in (("--augment flip", True), ("--augment none", False),
                          ("--augment none --mirror", True), ("--no-mirror", False),
                          ("--recipe report", False)):
        args = finetune.parse_args([*FAST, *flags.split()])
        assert {finetune.settings(args, name).mirror for name in finetune.TABLE3} == {mirror}


def test_overfits_32_images(digits):
    """A network or a step that cannot learn."""
    model, _ = trained(digits, "cnn", n=32, epochs=40, batch_size=32, lr=0.003)
    assert finetune.evaluate(model, digits.x_train[:32], digits.y_train[:32])[1] == 1


# --------------------------------------------------------------------------- runs


def test_fast_run(fast_run):
    """A metric that is missing, a figure that is not drawn."""
    metrics, folder = fast_run
    assert metrics.keys() >= {"models", "left_out", "data", "device", "epochs"}
    assert list(metrics["models"]) == ["ae", "resnet18-random", "cnn"]
    for m in metrics["models"].values():
        assert m.keys() >= {"test_accuracy", "test_loss", "train_seconds", "parameters",
                            "trained_parameters", "per_class", "confusion"}
        assert 0 <= m["test_accuracy"] <= 1 and len(m["per_class"]) == 10
    assert json.loads(json.dumps(metrics)) == json.loads((folder / "metrics.json").read_text())
    drawn = {int(f.name[3:5]) for f in folder.glob("fig*.png")}
    assert drawn == {30, 32, 33, 35, 36}  # 31 and 34 are those of the pre-trained network
    assert len(list(folder.glob("mistakes_*.png"))) == 3 and (folder / "per_class.png").exists()


def test_without_weights(fast_run, fails, monkeypatch):
    """Random weights passed off as pre-trained where none can be had."""
    metrics, folder = fast_run
    assert "resnet18" not in metrics["models"]
    assert "no ImageNet weights" in metrics["left_out"]["resnet18"]
    assert not list(folder.glob("*resnet18.png"))
    monkeypatch.setenv("TORCH_HOME", "empty")
    assert "ImageNet" in fails(2, finetune.main, [*FAST, "--model", "resnet18"])


def test_training_never_sees_the_test_set(encoder, fewer, no_figures, monkeypatch):
    """Selection, curves or statistics that depend on test images."""
    command = [*FAST, "--model", "ae", "--train", "last", "--encoder", encoder]
    finetune.main([*command, "--out-dir", "seeing"])
    monkeypatch.setattr(common, "load_data", lambda args: fewer._replace(
        x_test=torch.zeros(60, 1, 28, 28)))
    finetune.main([*command, "--out-dir", "blind"])
    assert history("blind") == history("seeing")


@pytest.mark.parametrize("flags, trainings", [("--model ae --train last --folds 2", 2),
                                              ("--labels 20", 2 * 2 * 2)])
def test_interrupted_and_resumed_equals_uninterrupted(flags, trainings, encoder, few_trainings,
                                                      no_figures, monkeypatch, fails):
    """Resuming forgets which training it was at, its optimiser, its frozen parts, its encoder."""
    command = [*FAST, *flags.split(), "--encoder", encoder, "--out-dir"]
    whole = finetune.main([*command, "whole"])
    assert len(history("whole")) == 2 * trainings  # epochs
    train_epoch, epochs = finetune.train_epoch, iter(range(2 * trainings))

    def last(*args):
        if next(epochs) == 2 * trainings - 1:
            raise KeyboardInterrupt
        return train_epoch(*args)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train_epoch", last)
        message = fails(130, common.start, lambda: finetune.main([*command, "part"]))
    assert "interrupted" in message and not Path("part/metrics.json").exists()
    resumed = finetune.main(["--resume", "part", "--device", "cpu"])
    assert history("part") == history("whole") and numbers(resumed) == numbers(whole)
    parts = [file.name for file in Path("whole").glob("*.pt") if file.name != "model.pt"]
    assert len(parts) == trainings
    for part in parts:
        a, b = (torch.load(f"{f}/{part}", weights_only=True)["things"] for f in ("part", "whole"))
        assert all(a["model"][key].equal(b["model"][key]) for key in b["model"])


def test_folds_are_averaged(fewer, encoder, no_figures, monkeypatch):
    """The accuracy of one fold for that of all; folds of the same images, or of the same draws."""
    seeds, val, fit = [], [], finetune.fit

    def spy(args, run, part, fold_seeds, train, fold_val, *rest):
        seeds.append(fold_seeds)
        val.append(fold_val[0])
        return fit(args, run, part, fold_seeds, train, fold_val, *rest)
    monkeypatch.setattr(finetune, "fit", spy)
    m = finetune.main([*FAST, "--model", "ae", "--folds", "3", "--epochs", "1", "--encoder",
                       encoder])["models"]["ae"]
    assert m["test_accuracy"] == pytest.approx(np.mean(m["fold_test_accuracy"]))
    assert m["test_accuracy_std"] == pytest.approx(np.std(m["fold_test_accuracy"], ddof=1))
    assert seeds == [(0, 0), (0, 1), (0, 2)]
    assert torch.cat(val).flatten(1).sum(1).sort().values.allclose(
        fewer.x_train.flatten(1).sum(1).sort().values)


def test_judge_is_the_best_epoch_of_the_last_fold(no_figures, monkeypatch):
    """Figures of one fold, numbers of another; the last weights; a judge that drops out."""
    # two epochs in each of two folds, each judged on seen images and then on others
    losses = iter([0.0, 1.0, 0.0, 4.0, 0.0, 2.0, 0.0, 6.0])
    monkeypatch.setattr(finetune, "evaluate", lambda *args: (next(losses), 0.5))
    train_epoch = finetune.train_epoch
    monkeypatch.setattr(finetune, "train_epoch", lambda model, x, y, *rest: (
        train_epoch(model, x[:20], y[:20], *rest)))
    metrics = finetune.main([*FAST, "--model", "cnn", "--folds", "2", "--epochs", "2", "--out-dir",
                             "folds"])
    assert metrics["models"]["cnn"]["best_epoch"] == 1
    assert metrics["models"]["cnn"]["fold_val_loss"] == [1.0, 2.0]
    judge = gan.load_judge(Namespace(judge="folds", device="cpu"), common.load_data(None))
    best = common.load_checkpoint(Path("folds/cnn-fold-2.pt"), {})["best"]
    assert best["epoch"] == 1 and best["score"] == 2
    assert all(value.equal(best["model"][key]) for key, value in judge.state_dict().items())
    finetune.encode(judge, torch.rand(3, 1, 28, 28))
    assert not judge.training


def test_a_judge_is_a_cnn(encoder, no_figures, fails):
    """A network without the judge's features, or a message about a damaged file."""
    finetune.main([*FAST, "--model", "ae", "--epochs", "1", "--encoder", encoder, "--out-dir", "a"])
    assert "a is no run of finetune.py --model cnn" in fails(
        2, gan.load_judge, Namespace(judge="a", device="cpu"), common.load_data(None))


def test_judge_is_trained_where_there_is_none(no_figures, capsys, monkeypatch, parity):
    """A chapter that fails because another one was not run yet, or trains it again each time."""
    monkeypatch.setattr(common, "load_data", lambda args: parity)
    args = Namespace(judge=None, data="digits", data_dir="data", seed=5, fast=True, device="cpu")
    judge = gan.load_judge(args, parity).eval()
    assert "python finetune.py --model cnn --epochs 8 --data digits --seed 5 --fast" in (
        capsys.readouterr().out)
    x = torch.rand(3, 1, 28, 28)
    assert judge.features(x).shape == (3, 105) and judge(x).shape == (3, 2)
    monkeypatch.setattr(finetune, "main", None)
    again = gan.load_judge(args, parity).state_dict()
    assert all(value.equal(again[key]) for key, value in judge.state_dict().items())


def test_two_classes(monkeypatch, parity, few_trainings):
    """A ten that is written somewhere, in a head, a figure or a metric; an encoder not made."""
    calls, drawn = [], []
    monkeypatch.setattr(common, "load_data", lambda args: parity)
    monkeypatch.setattr(ae, "main", quick_main(ae, parity, calls))
    monkeypatch.setattr(common.Run, "save", lambda run, fig, name, caption: drawn.append(name))
    monkeypatch.setenv("TORCH_HOME", "empty")
    metrics = finetune.main([*FAST, "--epochs", "1", "--seed", "4"])
    for m in metrics["models"].values():
        assert len(m["per_class"]) == len(m["confusion"]) == 2
    assert len(drawn) == 3 * 3 + 1
    (_, made), = calls  # plain ae.py, of the same data and seed
    assert (made.seed, made.data, made.fast, made.latent_dim) == (4, "digits", True, 38)
    monkeypatch.setattr(finetune, "CANDIDATES", finetune.CANDIDATES[:1])
    metrics = finetune.main([*FAST, "--labels", "2", "10", "--epochs", "1", "--seed", "4"])
    assert len(calls) == 1 and drawn[-1] == "label_efficiency"
    assert list(metrics["label_efficiency"]) == [
        "probe on AE codes", "probe on VAE codes", "fine-tuned", "from scratch"]
    for points in metrics["label_efficiency"].values():
        assert list(points) == ["2", "10"] and len(points["2"]["each"]) == 2
        assert points["10"]["mean"] == pytest.approx(np.mean(points["10"]["each"]))


@pytest.mark.skipif(GPU == "cpu", reason="this machine has no GPU")
def test_gpu(monkeypatch):
    """A tensor that stays on the CPU."""
    monkeypatch.setattr(common, "load_data", LOAD)
    metrics = finetune.main(["--fast", "--data", "digits", "--device", GPU])
    assert metrics["device"] == GPU and len(metrics["models"]) >= 3


@pytest.mark.parametrize("flags, named", [
    ("--model cnn --train head", "--train"), ("--model cnn --scratch", "--scratch"),
    ("--model cnn --labels 50", "--labels"), ("--labels 5", "--labels 5"),
    ("--labels 90", "--labels 90"), ("--model resnet50", "--model"), ("--encoder=", "--encoder"),
    ("--model resnet18-random --batch-size 79", "--batch-size 79"),
    ("--model resnet18-random --batch-size 1", "--batch-size 1"),
    ("--model cnn --weights w.pth", "--weights"), ("--labels 0", "--labels"),
    ("--labels 20 --weights w.pth", "--weights does not go with --labels"),
    ("--resume nowhere", "nowhere"), ("--train some", "--train")])
def test_bad_flags_end_in_one_line(flags, named, fails):
    """A traceback, or a wrong value that trains for an hour first."""
    assert named in fails(2, finetune.main, [*FAST, *flags.split()])
    assert os.listdir() == []  # nothing was started


@pytest.mark.parametrize("flags", ["--model ae", "--model all", "--labels 20"])
def test_wrong_encoder(flags, fails, monkeypatch):
    """A name without a run, or of another script's: seen only after something was trained."""
    monkeypatch.setattr(finetune, "train_epoch", None)
    command = [*FAST, *flags.split(), "--encoder"]
    assert "nowhere" in fails(2, finetune.main, [*command, "nowhere"])
    quick_main(vae, common.load_data(None))([*FAST, "--out-dir", "vae"])
    assert "vae is a run of vae.py" in fails(2, finetune.main, [*command, "vae"])


def test_recipes_and_explicit_flags():
    """A recipe that overrides what was asked for; one model's setting given to another."""
    args = finetune.parse_args(["--recipe", "report", "--batch-size", "77", "--data", "digits"])
    of = {name: finetune.settings(args, name) for name in finetune.TABLE3}
    assert (of["ae"].lr, of["ae"].epochs, of["ae"].augment) == (0.0001, 30, "report")
    assert (of["cnn"].lr, of["cnn"].epochs, of["cnn"].train) == (0.0085, 20, "all")
    assert of["resnet18"].train == "last" and {t.batch_size for t in of.values()} == {77}
    assert {t.schedule for t in of.values()} == {"constant"}
    of = finetune.settings(finetune.parse_args(["--train", "head", "--scratch"]), "resnet18")
    assert of.train == "head" and not of.scratch


def test_readme_commands_parse():
    """README commands that no longer run."""
    commands = readme_commands("finetune.py")
    assert len(commands) > 4
    for command in commands:
        finetune.parse_args(command)
