"""ae.py: each test names the bug that it would catch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ae
import common
import pytest
import torch
from conftest import ROOT, history, numbers, readme_commands
from sklearn.decomposition import PCA

FAST = ["--fast", "--data", "digits"]


@pytest.fixture(scope="module")
def digits():
    return common.load_data(ae.parse_args(["--data", "digits"]))


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory):
    """(metrics, folder) of one --fast run."""
    folder = tmp_path_factory.mktemp("fast")
    return ae.main([*FAST, "--out-dir", str(folder)]), folder


@pytest.fixture
def no_figures(monkeypatch):
    """Skip what only draws: half of the time of a --fast run."""
    for name in ("draw_reconstructions", "draw_kernels", "draw_activations"):
        monkeypatch.setattr(ae, name, lambda *args: None)
    monkeypatch.setattr(ae, "draw_latent", lambda *args: {})


# --------------------------------------------------------------------------- model


@pytest.mark.parametrize("flags", [{}, {"latent_dim": 2}, {"latent_dim": 100, "hidden": 128,
                                                         "filters": (3, 5), "dropout": 0.5,
                                                         "decoder_filters": (4, 6, 7)}])
def test_shapes_and_range(flags):
    """A latent size, a width or an output range other than asked for."""
    model, x = ae.Autoencoder(**flags), torch.rand(5, 1, 28, 28)
    assert model.encoder(x).shape == (5, flags.get("latent_dim", 38))
    assert model(x).shape == x.shape and 0 <= model(x).min() and model(x).max() <= 1


def test_size_of_the_reports_model():
    """Defaults over the report's 29,716 parameters, or a z that a narrower layer makes a name."""
    args = ae.parse_args([])
    assert args.latent_dim == 38 and args.hidden >= args.latent_dim
    model = ae.Autoencoder(args.latent_dim, args.hidden, args.filters, args.decoder_filters)
    assert sum(p.numel() for p in model.parameters()) == 29_207 <= 29_716


def test_flags_reach_the_model():
    """A flag that is parsed and then not used."""
    kinds = [type(m).__name__ for m in ae.Autoencoder(batchnorm=False).modules()]
    assert "BatchNorm2d" not in kinds
    args = ae.parse_args(["--optimizer", "sgd", "--weight-decay", "0.1", "--lr", "0.5",
                          "--schedule", "constant"])
    optimizer, schedule = ae.make_optimizer(ae.Autoencoder(), args, 1000)
    group = optimizer.param_groups[0]
    assert type(optimizer) is torch.optim.SGD and group["momentum"] == 0
    assert (group["weight_decay"], schedule.get_last_lr()) == (0.1, [0.5])
    args = ae.parse_args(["--optimizer", "sgd"])  # OneCycleLR brings a momentum unless told not to
    optimizer, schedule = ae.make_optimizer(ae.Autoencoder(), args, 1000)
    assert optimizer.param_groups[0]["momentum"] == 0


def test_dropout_only_in_training():
    """Embeddings that differ from call to call because dropout stayed on."""
    model, x = ae.Autoencoder(dropout=0.5), torch.rand(8, 1, 28, 28)
    model.train()
    assert not torch.equal(model(x), model(x))
    assert torch.equal(ae.encode(model, x), ae.encode(model, x))


# --------------------------------------------------------------------------- loss


def test_l1_penalises_convolutions_and_linear_layers_only():
    """L1 over biases and BatchNorm weights."""
    model = ae.Autoencoder(latent_dim=3, hidden=4, filters=(2, 2), decoder_filters=(2, 2, 2))
    weights = [p for p in model.parameters() if p.dim() > 1]  # biases and BatchNorm have one
    assert ae.l1_penalty(model).item() == pytest.approx(
        sum(w.detach().abs().sum().item() for w in weights), rel=1e-5)


def test_l1_and_l2_enter_the_step():
    """The penalty is computed and then not added; L2 or L1 with another factor than asked for."""
    x, grads = torch.rand(16, 1, 28, 28), {}
    for flag, value in (("--l1", "0"), ("--l1", "0.01"), ("--weight-decay", "0.01")):
        args = ae.parse_args([flag, value, "--optimizer", "sgd", "--lr", "1", "--device", "cpu",
                              "--schedule", "constant"])
        common.seed_everything(0)
        model = ae.Autoencoder()
        w = model.encoder.linear[1].weight
        before = w.detach().clone()
        optimizer, schedule = ae.make_optimizer(model, args, len(x))
        ae.train_epoch(model, x, optimizer, schedule, args, torch.Generator().manual_seed(0))
        grads[flag, value] = before - w.detach()  # with SGD at rate 1, the step is the gradient
    plain = grads["--l1", "0"]
    assert torch.allclose(grads["--l1", "0.01"] - plain, 0.01 * before.sign(), atol=1e-6)
    assert torch.allclose(grads["--weight-decay", "0.01"] - plain, 0.01 * before, atol=1e-6)


def test_evaluation_weighs_images_not_batches(digits):
    """An average of batch means with a smaller last batch; a return inside the loop."""
    model = ae.Autoencoder()
    x = torch.cat([digits.x_train[:1000], digits.x_train[:7] * 0])
    model.eval()
    with torch.no_grad():
        whole = (model(x) - x).square().mean().item()
    model.train()  # evaluating must not depend on the mode that it finds
    assert ae.evaluate(model, x) == pytest.approx(whole, rel=1e-5)
    assert torch.allclose(ae.reconstruct(model, x[-7:]), ae.reconstruct(model, x)[-7:], atol=1e-6)


# --------------------------------------------------------------------------- training


class Linear(torch.nn.Sequential):
    """The linear autoencoder: its best loss is known, it is PCA's."""

    def __init__(self, k):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(784, k), torch.nn.Linear(k, 784),
                         torch.nn.Unflatten(1, (1, 28, 28)))


def test_a_linear_autoencoder_reaches_pca(digits):
    """A wrong loss or update step: its optimum would not be PCA's."""
    x, k = digits.x_train[:200], 4
    args = ae.parse_args(["--batch-size", "20", "--epochs", "200", "--lr", "0.03"])
    common.seed_everything(0)
    model, generator = Linear(k), torch.Generator().manual_seed(0)
    optimizer, schedule = ae.make_optimizer(model, args, len(x))
    for _ in range(args.epochs):
        ae.train_epoch(model, x, optimizer, schedule, args, generator)
    pca = PCA(k).fit(x.flatten(1).numpy())
    left_out = pca.inverse_transform(pca.transform(x.flatten(1).numpy())) - x.flatten(1).numpy()
    assert 0.9999 < ae.evaluate(model, x) / (left_out ** 2).mean() < 1.01


def test_overfits_32_images(digits):
    """A network or a step that cannot learn."""
    x = digits.x_train[:32]
    args = ae.parse_args(["--batch-size", "32", "--epochs", "300"])
    common.seed_everything(0)
    model = ae.Autoencoder()
    optimizer, schedule = ae.make_optimizer(model, args, len(x))
    before = ae.evaluate(model, x)
    for _ in range(args.epochs):
        ae.train_epoch(model, x, optimizer, schedule, args, torch.Generator().manual_seed(0))
    assert ae.evaluate(model, x) < before / 30


def test_evaluating_does_not_change_the_training(digits):
    """A DataLoader that draws from the global generator even in evaluation."""
    weights = []
    for evaluated in (False, True):
        args = ae.parse_args(["--dropout", "0.3", "--augment", "flip", "--epochs", "2"])
        common.seed_everything(0)
        model = ae.Autoencoder(dropout=0.3)
        optimizer, schedule = ae.make_optimizer(model, args, 128)
        for epoch in range(2):
            generator = common.seed_everything(0, epoch)
            if evaluated:
                ae.evaluate(model, digits.x_train[:100])
                ae.encode(model, digits.x_train[:100])
            ae.train_epoch(model, digits.x_train[:128], optimizer, schedule, args, generator)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


# --------------------------------------------------------------------------- runs


def test_fast_run(fast_run, capsys):
    """A metric that is missing or wrong, a figure that is not drawn, worse than a constant."""
    metrics, folder = fast_run
    assert {"test_mse", "pca_mse", "parameters", "latent_dim", "epochs", "seconds_per_epoch",
            "data", "device"} <= metrics.keys()
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert 0 < metrics["pca_mse"] < metrics["test_mse"] < 0.07  # the variance of the digits
    assert metrics["data"] == "digits" and metrics["latent_dim"] == 38 and metrics["fast"] is True
    drawn = sorted(int(f.name[3:5]) for f in folder.glob("fig*.png"))
    assert drawn == list(range(2, 16))  # figure 1 is figure 2 with --recipe first


def test_same_seed_same_numbers(fast_run, no_figures):
    """Any draw that the seed does not set."""
    metrics, folder = fast_run
    assert ae.main([*FAST, "--out-dir", "again"])["test_mse"] == metrics["test_mse"]
    assert history("again") == history(folder)
    assert ae.main([*FAST, "--out-dir", "other", "--seed", "1"])["test_mse"] != metrics["test_mse"]


def test_training_never_sees_the_test_set(fast_run, no_figures, monkeypatch):
    """Selection, curves or statistics that depend on test images."""
    load = common.load_data
    monkeypatch.setattr(common, "load_data", lambda args: load(args)._replace(
        x_test=torch.zeros(10, 1, 28, 28)))
    ae.main([*FAST, "--out-dir", "blind"])
    assert history("blind") == history(fast_run[1])


def test_folds_start_afresh(no_figures, monkeypatch):
    """The model or the optimiser of one fold carried into the next."""
    seen, train_epoch = [], ae.train_epoch

    def spy(model, x, optimizer, *rest):
        seen.append((model, len(optimizer.state)))
        return train_epoch(model, x, optimizer, *rest)
    monkeypatch.setattr(ae, "train_epoch", spy)
    metrics = ae.main([*FAST, "--folds", "3", "--epochs", "2", "--out-dir", "folds"])
    models, states = zip(*seen, strict=True)
    assert len({id(m) for m in models}) == 3 and [s == 0 for s in states] == [True, False] * 3
    each = metrics["fold_test_mse"]
    assert metrics["folds"] == len(set(each)) == 3
    assert metrics["test_mse"] == pytest.approx(sum(each) / 3) and metrics["test_mse_std"] > 0


def test_killed_and_resumed_equals_uninterrupted(tmp_path, no_figures):
    """Resuming repeats batches, forgets the schedule, repeats a fold, or draws other noise."""
    command = [sys.executable, str(ROOT / "ae.py"), *FAST, "--folds", "2", "--epochs", "4",
               "--dropout", "0.2", "--augment", "flip", "--out-dir", "a b/ü"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    log = tmp_path / "a b" / "ü" / "log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 6):  # in the second fold
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (log.parent / "metrics.json").exists()
    resumed = ae.main(["--resume", "a b/ü"])
    whole = ae.main([*command[2:-1], "whole"])
    assert numbers(resumed) == numbers(whole)
    assert history("a b/ü") == history("whole")
    states = [torch.load(f"{folder}/checkpoint.pt", weights_only=True)["parts"]["model"]
              for folder in ("a b/ü", "whole")]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_interrupted_and_nan(no_figures, monkeypatch, fails):
    """Ctrl-C or a diverging loss ends in a traceback, or costs the last good checkpoint."""
    train_epoch, calls = ae.train_epoch, []

    def second_call(error):
        def train(*args):
            calls.append(1)
            if len(calls) == 2:
                raise error
            return train_epoch(*args)
        return train
    monkeypatch.setattr(ae, "train_epoch", second_call(KeyboardInterrupt))
    message = fails(130, ae.main, [*FAST, "--out-dir", "a b"])
    assert message.endswith("python ae.py --resume 'a b'")

    calls.clear()
    monkeypatch.setattr(ae, "train_epoch", train_epoch)
    mse = ae.mse
    monkeypatch.setattr(ae, "mse", lambda recon_x, x: mse(recon_x, x) * (
        float("nan") if len(calls) > 20 else calls.append(1) or 1))
    message = fails(1, ae.main, [*FAST, "--out-dir", "nan"])
    assert "nan at step" in message and "epoch 2" in message and "--lr" in message
    assert common.load_checkpoint(Path("nan/checkpoint.pt"), "ae")["epoch"] == 1


@pytest.mark.parametrize("flags", [
    "--lr 0", "--lr nan", "--lr inf", "--epochs 0", "--epochs 1.5", "--epochs x", "--latent-dim 0",
    "--batch-size -1", "--dropout 1", "--folds 0", "--seed -1", "--optimizer adamw", "--lat 3",
    "--resume nowhere", "--resume=", "--out-dir=", "--latent-dim 1",
    "--resume a --out-dir b", "--device cuda", "--data mnist", "--filters 8"])
def test_bad_flags_end_in_one_line(flags, fails):
    """A traceback, a page of usage, or a wrong value that trains for an hour first."""
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    message = fails(2, ae.main, flags.split())
    assert flags.split()[0].strip("=") in message or "nowhere" in message
    assert os.listdir() == []  # nothing was started


def test_resume_refuses_other_flags(fast_run, fails):
    """A run resumed with another model or rate is not the run that it says it is."""
    folder = str(fast_run[1])
    message = fails(2, ae.main, ["--resume", folder, "--latent-dim", "7"])
    assert "--latent-dim is 38" in message
    assert ae.parse_args(["--resume", folder, "--latent-dim", "38"]).fast is True


def test_recipes_and_explicit_flags():
    """A recipe that overrides what was asked for explicitly."""
    args = ae.parse_args(["--recipe", "report"])
    assert (args.batch_size, args.lr, args.schedule) == (48, 0.002, "constant")
    args = ae.parse_args(["--recipe", "report", "--lr", "0.5", "--fast", "--epochs", "9"])
    assert (args.batch_size, args.lr, args.epochs) == (48, 0.5, 9)
    assert ae.parse_args(["--recipe", "first"]).latent_dim == 100


def test_readme_commands_parse():
    """README commands that no longer run."""
    commands = readme_commands("ae.py")
    assert len(commands) > 4
    for command in commands:
        ae.parse_args(command)


DATA = Path(os.environ.get("FASHION_MNIST_DIR", ROOT / "data"))


@pytest.mark.skipif(not (DATA / "FashionMNIST").exists(),
                    reason="no FashionMNIST in data/ or in $FASHION_MNIST_DIR")
def test_real_fashion():
    """The real files: their sums, their order, PCA's known error at 38 components."""
    data = common.load_data(ae.parse_args(["--data", "fashion", "--data-dir", str(DATA)]))
    assert len(data.x_train) == 60_000 and len(data.x_test) == 10_000
    assert data.y_test[:5].tolist() == [9, 2, 1, 1, 6]
    recon = common.pca_reconstruct(data.x_train, data.x_test, 38)
    assert ae.mse(recon, data.x_test).item() == pytest.approx(0.01388, abs=1e-5)
