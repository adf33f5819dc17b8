"""finetune.py: each test names the bug that it would catch."""

import copy
import json
import os
from argparse import Namespace
from pathlib import Path

import ae
import common
import finetune
import numpy as np
import pytest
import torch
import torchvision
from conftest import history, numbers, readme_commands

FAST = ["--fast", "--data", "digits"]


@pytest.fixture(scope="module")
def digits():
    return common.load_data(finetune.parse_args(FAST))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a --fast run of ae.py, of another size than the default."""
    folder = str(tmp_path_factory.mktemp("ae"))
    ae.main([*FAST, "--latent-dim", "12", "--hidden", "20", "--out-dir", folder])
    return folder


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory, encoder):
    """(metrics, folder) of a --fast run of all models and --labels, without ImageNet weights."""
    folder = tmp_path_factory.mktemp("fast")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder / "empty"))
        patch.setattr(finetune, "SEEDS", 2)
        patch.setattr(finetune, "EPOCH_IMAGES", 1000)
        # two epochs are too few to learn digits that are shifted too
        return finetune.main([*FAST, "--encoder", encoder, "--labels", "20", "100", "--augment",
                              "none", "--out-dir", str(folder / "run")]), folder / "run"


@pytest.fixture
def no_figures(monkeypatch):
    for name in ("draw_model", "draw_per_class", "draw_label_efficiency"):
        monkeypatch.setattr(finetune, name, lambda *args: None)


def training(name, train, scratch=False, **more):
    """What plan makes of one training, for 40 images."""
    return Namespace(**{
        "name": name, "train": train, "scratch": scratch, "seed": 0, "fold": 0, "epochs": 1,
        "batch_size": 20, "lr": 0.01, "weight_decay": 0.01, "schedule": "constant",
        "optimizer": "adam", "augment": "none", "idx": torch.arange(40), **more})


def losses(metrics):
    """The metrics without times."""
    models = {name: {k: v for k, v in m.items() if k != "train_seconds"}
              for name, m in metrics["models"].items()}
    return {**numbers(metrics), "models": models}


# --------------------------------------------------------------------------- models


@pytest.mark.parametrize("name, train, frozen", [
    ("ae", "head", {"encoder"}), ("ae", "last", {"encoder.block1", "encoder.block2"}),
    ("resnet18-random", "head", {"net.conv1", "net.bn1", "net.layer1", "net.layer2", "net.layer3",
                                 "net.layer4"}),
    ("resnet18-random", "last", {"net.conv1", "net.bn1", "net.layer1", "net.layer2"})])
def test_frozen_means_bit_identical(name, train, frozen, digits, encoder):
    """Statistics of a frozen BatchNorm that keep moving, weight decay on it, a trained part that
    does not learn."""
    args = Namespace(encoder=encoder, device="cpu")
    model, optimizer, schedule, x, y = finetune.prepare(training(name, train), args, digits, None)
    before = copy.deepcopy(model.state_dict())
    finetune.train_epoch(model, x, y, optimizer, schedule, training(name, train),
                         torch.Generator().manual_seed(0))
    for key, value in model.state_dict().items():
        is_frozen = any(key.startswith(f"{part}.") for part in frozen)
        assert value.equal(before[key]) == is_frozen, key


def test_frozen_dropout_is_off(digits):
    """A frozen encoder whose dropout goes on: its codes would be noise."""
    part = training("ae", "head", scratch=True)
    model, optimizer, schedule, x, y = finetune.prepare(
        part, Namespace(encoder=None, device="cpu"), digits, None)
    model.encoder.linear[2].p = 0.5
    seen = []
    model.encoder.register_forward_hook(lambda module, x, z: seen.append((x[0], z)))
    finetune.train_epoch(model, x, y, optimizer, schedule, part,
                         torch.Generator().manual_seed(0))
    assert all(model.encoder(x).equal(z) for x, z in seen[:2])


def test_what_the_encoder_starts_from(encoder):
    """'Pre-trained' that is random, 'from scratch' that is not, or of another architecture."""
    args = Namespace(encoder=encoder, device="cpu")
    best = common.load_checkpoint(Path(encoder) / "checkpoint.pt", "ae")["best"][0]["model"]
    models = [finetune.build(training("ae", "all", scratch), args).encoder.state_dict()
              for scratch in (False, True)]
    assert all(value.equal(best[f"encoder.{key}"]) for key, value in models[0].items())
    key = "block1.0.weight"
    assert models[0][key].shape == models[1][key].shape and not models[0][key].equal(models[1][key])
    assert models[1]["block1.2.running_mean"].abs().sum() == 0  # nor its statistics
    assert models[0]["linear.4.weight"].shape == models[1]["linear.4.weight"].shape == (12, 20)


def test_random_statistics_are_calibrated(digits):
    """Random frozen layers with BatchNorm statistics of 0 and 1 that fit nothing."""
    args = Namespace(device="cpu")
    model, *_ = finetune.prepare(training("resnet18-random", "last"), args, digits, None)
    model.eval()
    seen = []
    model.net.bn1.register_forward_hook(lambda module, x, out: seen.append(out.clone()))
    with torch.no_grad():
        model(digits.x_train[:40])
    assert seen[0].mean((0, 2, 3)).abs().max() < 1e-3
    assert (seen[0].std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_size_of_homework_1s_cnn():
    """Another network than the report's; features that are not the last hidden layer."""
    model, x = finetune.CNN().eval(), torch.rand(3, 1, 28, 28)
    widths = [m.weight.shape[0] for m in model.modules()
              if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert widths == [35, 35, 375, 105, 10]
    assert model.features(x).shape == (3, 105)
    assert model(x).allclose(model.head[-1](model.features(x)))


# --------------------------------------------------------------------------- weights


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", ["poisoned", "resnet34", "text", "passwd", "list",
                                     "truncated", "flipped bit", "missing", "folder"])
def test_bad_weights_end_in_one_line(content, fails):
    """Weights that run code; a network half filled; random weights passed off as pre-trained."""
    if content == "poisoned":
        torch.save({"conv1.weight": Evil()}, "w.pth")
    elif content == "resnet34":
        torch.save(torchvision.models.resnet34().state_dict(), "w.pth")
    elif content == "text":
        Path("w.pth").write_text("hello")
    elif content == "passwd":
        Path("w.pth").write_text("root:x:0:0:root:/root:/bin/sh")
    elif content in ("truncated", "flipped bit"):
        torch.save(torchvision.models.resnet18().state_dict(), "w.pth")
        data = bytearray(Path("w.pth").read_bytes())
        data[len(data) // 2] ^= 1
        Path("w.pth").write_bytes(data[:1000 if content == "truncated" else None])
    elif content == "list":
        torch.save([1, 2], "w.pth")
    elif content == "folder":
        Path("w.pth").mkdir()
    for model in ("resnet18", "all")[:2 if content == "text" else 1]:  # never left out quietly
        message = fails(2, finetune.main, [*FAST, "--model", model, "--weights", "w.pth"])
        assert "w.pth" in message and not Path("executed").exists()
    assert not Path("runs").exists()


def test_pretrained_weights_are_used_and_stay(no_figures):
    """Weights that are loaded and then not used, or frozen layers that learn."""
    torch.manual_seed(0)
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, "w.pth")
    metrics = finetune.main([*FAST, "--model", "resnet18", "--weights", "w.pth", "--epochs", "1",
                             "--out-dir", "run"])
    state = torch.load("run/checkpoint.pt", weights_only=True)["parts"]["model"]
    assert state["net.conv1.weight"].equal(weights["conv1.weight"])
    assert state["net.layer2.1.bn2.running_var"].equal(weights["layer2.1.bn2.running_var"])
    assert not state["net.layer3.0.conv1.weight"].equal(weights["layer3.0.conv1.weight"])
    m = metrics["models"]["resnet18"]
    assert m["trained_parameters"] == 10_498_570 < m["parameters"] == 11_181_642


def test_without_weights(fast_run, fails, monkeypatch):
    """Random weights passed off as pre-trained where none can be had."""
    metrics, folder = fast_run
    assert "resnet18" not in metrics["models"] and "--fast" in metrics["left_out"]["resnet18"]
    assert not list(folder.glob("*resnet18.png"))
    monkeypatch.setenv("TORCH_HOME", "empty")
    assert "ImageNet" in fails(2, finetune.main, [*FAST, "--model", "resnet18"])


# --------------------------------------------------------------------------- labels, loss, metrics


def test_label_subsets_are_stratified_and_nested():
    """1,000 labels that leave out some of the 100, or a class with none."""
    y = torch.arange(500) % 10
    subsets = [finetune.label_subset(y, n, seed=0) for n in (10, 45, 100, 500)]
    for small, large in zip(subsets, subsets[1:], strict=False):
        assert set(small.tolist()) < set(large.tolist())
    for idx in subsets:
        counts = y[idx].bincount(minlength=10)
        assert len(set(idx.tolist())) == len(idx) and counts.max() - counts.min() <= 1
    assert finetune.label_subset(y, 45, 0).equal(subsets[1])
    assert not finetune.label_subset(y, 45, 1).equal(subsets[1])


def test_plan_of_labels(digits):
    """Label subsets that reach into the validation images; unequal trainings in a comparison."""
    parts = finetune.plan(finetune.parse_args(
        [*FAST, "--model", "ae", "--labels", "50", "800"]), digits)
    table, few = parts[0], [p for p in parts if p.val is None]
    assert len(few) == 2 * 3 * 3
    for part in few:
        assert set(part.idx.tolist()) <= set(table.idx.tolist())
        assert len(set(part.idx.tolist())) == part.labels
    for n in (50, 800):
        for seed in range(3):
            same = [p for p in few if (p.labels, p.seed) == (n, seed)]
            assert all(p.idx.equal(same[0].idx) for p in same)
            assert {(p.train, p.scratch) for p in same} == {
                ("head", False), ("all", False), ("all", True)}


def test_confusion_matrix_is_not_transposed(encoder, digits, monkeypatch, no_figures):
    """Swapped axes: with every 4 taken for a 2, row 4 and column 2 must hold them."""
    y = torch.where(digits.y_test == 4, 2, digits.y_test)
    predict = finetune.predict
    monkeypatch.setattr(finetune, "predict", lambda model, x, *rest, **more: torch.eye(10)[y] if (
        x is digits.x_test) else predict(model, x, *rest, **more))
    monkeypatch.setattr(common, "load_data", lambda args: digits)
    m = finetune.main([*FAST, "--model", "ae", "--epochs", "1", "--encoder", encoder]
                      )["models"]["ae"]
    fours = (digits.y_test == 4).sum().item()
    assert m["confusion"][4][2] == fours and m["confusion"][2][4] == m["confusion"][4][4] == 0
    assert m["most_confused"][0] == ("4", "2", fours)
    assert m["per_class"] == [float(c != 4) for c in range(10)]
    assert m["test_accuracy"] == pytest.approx(1 - fours / len(y))


def test_evaluation_weighs_images_not_batches(digits):
    """An average of batch means with a smaller last batch; evaluation in training mode."""
    model, x, y = finetune.CNN(), digits.x_train[:507], digits.y_train[:507]
    model.eval()
    with torch.no_grad():
        p = model(x).log_softmax(1)
    model.train()
    loss, accuracy = finetune.evaluate(model, x, y)
    assert loss == pytest.approx(-p[range(507), y].mean().item(), rel=1e-5)
    assert accuracy == pytest.approx((p.argmax(1) == y).sum().item() / 507)


def test_mirrored_prediction(digits):
    """An image and its mirror image that are told apart, or an upside-down one; labels moved."""
    model, x = finetune.CNN(), digits.x_test[:7]
    logits = finetune.predict(model, x, mirror=True)
    assert logits.allclose(finetune.predict(model, x.flip(3), mirror=True), atol=1e-6)
    assert logits.allclose((model(x) + model(x.flip(3))) / 2, atol=1e-6)
    assert not logits.allclose(finetune.predict(model, x))
    for flags, mirror in (("--augment flip", True), ("--augment none", False),
                          ("--augment none --mirror", True), ("--no-mirror", False),
                          ("--recipe report", False)):
        parts = finetune.plan(finetune.parse_args([*FAST, *flags.split()]), digits)
        assert {part.mirror for part in parts} == {mirror}


def test_overfits_32_images(digits):
    """A network or a step that cannot learn."""
    part = training("cnn", "all", epochs=40, batch_size=32, lr=0.003, idx=torch.arange(32))
    model, optimizer, schedule, x, y = finetune.prepare(
        part, Namespace(device="cpu"), digits, None)
    for _ in range(part.epochs):
        finetune.train_epoch(model, x, y, optimizer, schedule, part,
                             torch.Generator().manual_seed(0))
    assert finetune.evaluate(model, x, y)[1] == 1


# --------------------------------------------------------------------------- runs


def test_fast_run(fast_run):
    """A metric that is missing, a figure that is not drawn, a model no better than chance."""
    metrics, folder = fast_run
    assert metrics.keys() >= {"models", "data", "device", "label_efficiency"}
    assert list(metrics["models"]) == ["ae", "resnet18-random", "cnn"]
    for m in metrics["models"].values():
        assert m.keys() >= {"test_accuracy", "test_loss", "train_seconds", "parameters",
                            "trained_parameters", "per_class"}
        assert 0.2 < m["test_accuracy"] <= 1 and len(m["per_class"]) == 10
    assert json.loads((folder / "metrics.json").read_text())["models"].keys() == (
        metrics["models"].keys())
    for points in metrics["label_efficiency"].values():
        assert list(points) == ["20", "100"] and len(points["20"]["each"]) == 2
        assert points["100"]["mean"] == pytest.approx(np.mean(points["100"]["each"]))
    points = metrics["label_efficiency"]["fine-tuned"]
    assert 0.15 < points["20"]["mean"] < points["100"]["mean"]
    drawn = {int(f.name[3:5]) for f in folder.glob("fig*.png")}
    assert drawn == {30, 32, 33, 35, 36}  # 31 and 34 are those of the pre-trained network
    assert (folder / "label_efficiency.png").exists()


def test_training_never_sees_the_test_set(encoder, no_figures, monkeypatch):
    """Selection, curves or statistics that depend on test images."""
    command = [*FAST, "--model", "ae", "--train", "last", "--encoder", encoder]
    finetune.main([*command, "--out-dir", "seeing"])
    load = common.load_data
    monkeypatch.setattr(common, "load_data", lambda args: load(args)._replace(
        x_test=torch.zeros(300, 1, 28, 28)))
    finetune.main([*command, "--out-dir", "blind"])
    assert history("blind") == history("seeing")


def test_interrupted_and_resumed_equals_uninterrupted(encoder, no_figures, monkeypatch, fails):
    """Resuming forgets which model it was at, its optimiser, its frozen parts, or its encoder."""
    monkeypatch.setattr(finetune, "SEEDS", 2)
    monkeypatch.setattr(finetune, "EPOCH_IMAGES", 200)
    command = [*FAST, "--model", "ae", "--train", "last", "--encoder", encoder, "--labels", "30",
               "--folds", "2"]
    whole = finetune.main([*command, "--out-dir", "whole"])
    train_epoch, calls = finetune.train_epoch, []

    def eighth(*args):
        calls.append(1)
        if len(calls) == 8:  # in the fourth training
            raise KeyboardInterrupt
        return train_epoch(*args)
    monkeypatch.setattr(finetune, "train_epoch", eighth)
    assert "--resume part" in fails(130, finetune.main, [*command, "--out-dir", "part"])
    monkeypatch.setattr(finetune, "train_epoch", train_epoch)
    resumed = finetune.main(["--resume", "part"])
    assert history("part") == history("whole") and len(history("part")) == 2 * (2 + 3 * 2)
    assert losses(resumed) == losses(whole)
    m = whole["models"]["ae"]
    assert m["test_accuracy"] == np.mean(m["fold_test_accuracy"]) and m["test_accuracy_std"] > 0


def test_judge_is_the_best_fold(no_figures, monkeypatch, capsys):
    """The last fold instead of the best; another model's weights; a judge that drops out."""
    args = finetune.parse_args(["--data", "digits"])
    args.judge = None
    train_epoch = finetune.train_epoch
    monkeypatch.setattr(finetune, "train_epoch", lambda model, x, y, *rest: (
        train_epoch(model, x[:100], y[:100], *rest)))
    metrics = finetune.main(["--data", "digits", "--model", "cnn", "--folds", "3", "--epochs", "2"])
    judge = finetune.load_judge(args)
    assert metrics["folder"] in capsys.readouterr().out and args.judge == metrics["folder"]
    state = torch.load(f"{metrics['folder']}/checkpoint.pt", weights_only=True)
    best = min(state["best"].values(), key=lambda b: b["val_loss"])
    assert all(value.equal(best["model"][key]) for key, value in judge.state_dict().items())
    assert not judge.training


def test_judge_is_trained_where_there_is_none(no_figures, capsys):
    """A chapter that fails because another one was not run yet."""
    args = finetune.parse_args(FAST)
    args.judge = None
    judge = finetune.load_judge(args)
    assert "finetune.py --fast --model cnn" in capsys.readouterr().out
    assert judge.features(torch.rand(2, 1, 28, 28)).shape == (2, 105)


@pytest.mark.parametrize("flags, named", [
    ("--model cnn --train head", "--train"), ("--model cnn --scratch", "--scratch"),
    ("--model cnn --labels 100", "--labels"), ("--model ae --labels 5", "--labels 5"),
    ("--model ae --labels 900", "--labels 900"), ("--model resnet50", "--model"),
    ("--model ae --encoder nowhere", "nowhere"), ("--encoder=", "--encoder"),
    ("--model resnet18-random --batch-size 799", "--batch-size 799"),
    ("--model resnet18-random --batch-size 1", "--batch-size 1"),
    ("--model cnn --weights w.pth", "--weights"), ("--labels 0", "--labels"),
    ("--resume nowhere", "nowhere"), ("--train some", "--train")])
def test_bad_flags_end_in_one_line(flags, named, fails):
    """A traceback, or a wrong value that trains for an hour first."""
    assert named in fails(2, finetune.main, [*FAST, *flags.split()])
    assert os.listdir() == []  # nothing was started


def test_recipes_and_explicit_flags(digits):
    """A recipe that overrides what was asked for; one model's setting given to another."""
    args = finetune.parse_args(["--recipe", "report", "--batch-size", "77", "--data", "digits"])
    parts = {part.name: part for part in finetune.plan(args, digits)}
    assert (parts["ae"].lr, parts["ae"].epochs, parts["ae"].augment) == (0.0001, 30, "report")
    assert (parts["cnn"].lr, parts["cnn"].epochs, parts["cnn"].train) == (0.0085, 20, "all")
    assert parts["resnet18"].train == "last" and {p.batch_size for p in parts.values()} == {77}


def test_readme_commands_parse():
    """README commands that no longer run."""
    commands = readme_commands("finetune.py")
    assert len(commands) > 4
    for command in commands:
        finetune.parse_args(command)
