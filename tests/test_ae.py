"""ae.py: each test names the bug that it would catch."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import ae
import common
import pytest
import torch
from conftest import ROOT, forked, history, kill, numbers, readme_commands
from sklearn.decomposition import PCA

CPU = ["--device", "cpu"]
FAST = ["--fast", "--data", "digits", *CPU]


@pytest.fixture(scope="module")
def digits():
    return common.load_data(ae.parse_args(["--data", "digits", *CPU]))


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory):
    """(metrics, folder, what is printed) of one --fast run."""
    folder = tmp_path_factory.mktemp("fast")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        metrics = ae.main([*FAST, "--out-dir", str(folder)])
    return metrics, folder, printed.getvalue()


@pytest.fixture
def no_figures(monkeypatch):
    """Skip what only draws: half of the time of a --fast run."""
    for module, name in [(m, n) for m in (ae, common) for n in dir(m) if n.startswith("draw_")]:
        monkeypatch.setattr(module, name, lambda *args, **kwargs: {})
    monkeypatch.setattr(common, "plot_curves", lambda *args: None)


@pytest.fixture
def few(monkeypatch):
    """200 training images: for tests that ask what is trained, not how well."""
    load = common.load_data

    def load_few(args):
        data = load(args)
        return data._replace(x_train=data.x_train[:200], y_train=data.y_train[:200])
    monkeypatch.setattr(common, "load_data", load_few)


def weights(folder):
    """The last and the best weights in every checkpoint of a run: {file: [tensors]}."""
    found = {}
    for file in sorted(Path(folder).glob("*.pt")):
        state = torch.load(file, weights_only=True)
        best = state["rest"].get("best", {})  # model.pt has none
        found[file.name] = [*state["things"]["model"].values(), *best.get("model", {}).values()]
    return found


def equal(some, others):
    """Whether two runs have the same weights, to the last bit; see weights()."""
    return some.keys() == others.keys() and all(
        torch.equal(a, b) for file in some for a, b in zip(some[file], others[file], strict=True))


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
    args = ae.parse_args(CPU)
    assert args.latent_dim == 38 and args.hidden >= args.latent_dim
    assert sum(p.numel() for p in ae.build(args).parameters()) == 29_207 <= 29_716


def test_flags_reach_the_model():
    """A flag that is parsed and then not used, or used for another argument."""
    model = ae.build(ae.parse_args([
        "--latent-dim", "3", "--hidden", "5", "--filters", "2", "4", "--decoder-filters", "6", "7",
        "8", "--dropout", "0.25", "--no-batchnorm", *CPU]))
    assert [tuple(p.shape) for p in model.parameters() if p.dim() > 1] == [
        (2, 1, 3, 3), (4, 2, 3, 3), (5, 100), (3, 5), (54, 3), (6, 7, 3, 3), (7, 8, 3, 3),
        (8, 1, 3, 3)]
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [0.25, 0.25]
    assert "BatchNorm2d" not in [type(m).__name__ for m in model.modules()]
    args = ae.parse_args(["--optimizer", "sgd", "--weight-decay", "0.1", "--lr", "0.5",
                          "--schedule", "constant", *CPU])
    optimizer, schedule = ae.make_optimizer(ae.Autoencoder(), args, 1000)
    group = optimizer.param_groups[0]
    assert type(optimizer) is torch.optim.SGD and group["momentum"] == 0
    assert (group["weight_decay"], schedule.get_last_lr()) == (0.1, [0.5])
    # OneCycleLR brings a momentum unless told not to
    args = ae.parse_args(["--optimizer", "sgd", *CPU])
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
        args = ae.parse_args([flag, value, "--optimizer", "sgd", "--lr", "1",
                              "--schedule", "constant", *CPU])
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
    args = ae.parse_args(["--batch-size", "20", "--epochs", "200", "--lr", "0.03", *CPU])
    common.seed_everything(0)
    model, rng = Linear(k), torch.Generator().manual_seed(0)
    optimizer, schedule = ae.make_optimizer(model, args, len(x))
    for _ in range(args.epochs):
        ae.train_epoch(model, x, optimizer, schedule, args, rng)
    pca = PCA(k).fit(x.flatten(1).numpy())
    left_out = pca.inverse_transform(pca.transform(x.flatten(1).numpy())) - x.flatten(1).numpy()
    assert 0.9999 < ae.evaluate(model, x) / (left_out ** 2).mean() < 1.01


def test_overfits_32_images(digits):
    """A network or a step that cannot learn."""
    x = digits.x_train[:32]
    args = ae.parse_args(["--batch-size", "32", "--epochs", "150", *CPU])
    common.seed_everything(0)
    model = ae.Autoencoder()
    optimizer, schedule = ae.make_optimizer(model, args, len(x))
    before = ae.evaluate(model, x)
    for _ in range(args.epochs):
        ae.train_epoch(model, x, optimizer, schedule, args, torch.Generator().manual_seed(0))
    assert ae.evaluate(model, x) < before / 25


def test_evaluating_does_not_change_the_training(digits):
    """A DataLoader that draws from the global generator even in evaluation."""
    weights = []
    for evaluated in (False, True):
        args = ae.parse_args(["--dropout", "0.3", "--augment", "flip", "--epochs", "2", *CPU])
        common.seed_everything(0)
        model = ae.Autoencoder(dropout=0.3)
        optimizer, schedule = ae.make_optimizer(model, args, 128)
        for epoch in range(2):
            rng = common.seed_everything(0, epoch)
            if evaluated:
                ae.evaluate(model, digits.x_train[:100])
                ae.encode(model, digits.x_train[:100])
            ae.train_epoch(model, digits.x_train[:128], optimizer, schedule, args, rng)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


# --------------------------------------------------------------------------- runs


def test_fast_run(fast_run):
    """A metric that is missing or wrong, a figure that is not drawn, worse than a constant."""
    metrics, folder, _ = fast_run
    assert {"test_mse", "pca_mse", "parameters", "latent_dim", "epochs", "seconds_per_epoch",
            "data", "device"} <= metrics.keys()
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert 0 < metrics["pca_mse"] < metrics["test_mse"] < 0.07  # the variance of the digits
    assert metrics["data"] == "digits" and metrics["latent_dim"] == 38 and metrics["fast"] is True
    drawn = sorted(int(f.name[3:5]) for f in folder.glob("fig*.png"))
    assert drawn == list(range(2, 16))  # figure 1 is figure 2 with --recipe first
    assert (folder / "journey.png").exists()


def test_what_is_printed(fast_run):
    """Rows that break in a terminal of 100 columns; an end that does not say what came out."""
    metrics, folder, printed = fast_run
    lines = printed.splitlines()
    rows = [line for line in lines if line.startswith(("part ", "one split"))]
    assert len(rows) == 4 and max(map(len, rows)) <= 100 and len({*map(len, rows)}) == 1
    assert lines[-1] == str(folder)
    ends = [next(line for line in lines if line.startswith(what))
            for what in ("autoencoder", "PCA, 38 components", "the report")]
    assert [line.split()[-1] for line in ends] == [
        f"{metrics['test_mse']:.4g}", f"{metrics['pca_mse']:.4g}", "0.013"]
    assert len({*map(len, ends)}) == 1  # one below the other


def test_same_seed_same_numbers(few, no_figures, monkeypatch):
    """Any draw that the seed does not set; seeds or epochs that draw the same."""
    drawn, train_epoch = [], ae.train_epoch
    monkeypatch.setattr(ae, "train_epoch", lambda *args: (
        drawn.append(args[-1].initial_seed()) or train_epoch(*args)))
    flags = [*FAST, "--dropout", "0.2", "--augment", "erase", "--epochs", "2", "--out-dir"]
    once, again, other = (ae.main([*flags, *words]) for words in (
        ["once"], ["again"], ["other", "--seed", "1"]))
    assert numbers(once) == numbers(again) and history("once") == history("again")
    assert other["test_mse"] != once["test_mse"]
    assert drawn[:2] == drawn[2:4] and len({*drawn}) == 4


def test_training_never_sees_the_test_set(fast_run, no_figures, monkeypatch):
    """Selection, curves or statistics that depend on test images: white ones, from which training
    leads away, so whoever chose by them would take the first epoch."""
    load = common.load_data
    monkeypatch.setattr(common, "load_data", lambda args: load(args)._replace(
        x_test=torch.ones(10, 1, 28, 28)))
    ae.main([*FAST, "--out-dir", "blind"])
    assert history("blind") == history(fast_run[1])
    assert equal(weights("blind"), weights(fast_run[1]))


def test_the_best_epoch_is_what_is_tested(few, no_figures, monkeypatch):
    """The last epoch's weights in the metrics or in model.pt, though another was better."""
    after, end_epoch = [], common.Run.end_epoch

    def second_is_best(run, score, **row):
        after.append([v.clone() for v in run.things["model"].state_dict().values()])
        end_epoch(run, score=[2.0, 1.0, 3.0][len(run.rows)], **row)
    monkeypatch.setattr(common.Run, "end_epoch", second_is_best)
    metrics = ae.main([*FAST, "--out-dir", "a"])
    assert equal({"model.pt": weights("a")["model.pt"]}, {"model.pt": after[1]})
    data = common.load_data(ae.parse_args(FAST))
    assert ae.evaluate(ae.load_run("a"), data.x_test) == metrics["test_mse"]


def test_folds_start_afresh(few, no_figures, monkeypatch):
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
    assert metrics["val_mse"] == pytest.approx(sum(metrics["fold_val_mse"]) / 3)


def test_killed_and_resumed_equals_uninterrupted(tmp_path, no_figures, monkeypatch):
    """Resuming repeats batches, forgets the schedule, repeats a fold, or draws other noise."""
    command = [*FAST, "--folds", "2", "--epochs", "2", "--dropout", "0.2", "--augment", "flip",
               "--out-dir"]
    child, out = forked(ae.main, [*command, "a b/ü"])
    assert any("fold 2" in line for line in out)  # its first epoch is done
    kill(child)
    out.close()
    log = tmp_path / "a b" / "ü" / "log.jsonl"
    assert len(log.read_text().splitlines()) in (3, 4)
    assert not (log.parent / "metrics.json").exists()
    resumed = ae.main(["--resume", "a b/ü", *CPU])
    whole = ae.main([*command, "whole"])
    assert numbers(resumed) == numbers(whole)
    assert history("a b/ü") == history("whole")
    assert equal(weights("a b/ü"), weights("whole")) and len(weights("whole")) == 3

    monkeypatch.setattr(ae, "train_epoch", None)  # what is finished is drawn again, not trained
    assert numbers(ae.main(["--resume", "a b/ü", *CPU])) == numbers(whole)


def test_interrupted_and_nan(few, no_figures, monkeypatch, fails):
    """Ctrl-C or a diverging loss ends in a traceback, or costs the last good checkpoint."""
    train_epoch, calls = ae.train_epoch, []

    def second_epoch(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_epoch(*args)
    monkeypatch.setattr(ae, "train_epoch", second_epoch)
    monkeypatch.setattr(sys, "argv", ["ae.py", *FAST, "--out-dir", "a b"])
    message = fails(130, common.start, ae.main)
    assert message.endswith("python ae.py --resume 'a b'") and len(history("a b")) == 1

    calls.clear()
    monkeypatch.setattr(ae, "train_epoch", train_epoch)
    mse = ae.mse
    monkeypatch.setattr(ae, "mse", lambda recon_x, x: mse(recon_x, x) * (  # 3 steps an epoch, then
        float("nan") if len(calls) == 6 else calls.append(1) or 1))        # two evaluations
    message = fails(1, common.start, lambda: ae.main([*FAST, "--out-dir", "nan"]))
    assert "train_loss is nan after epoch 2" in message and "--lr" in message
    state = torch.load("nan/one-split.pt", weights_only=True)
    assert len(state["rest"]["rows"]) == len(history("nan")) == 1
    assert all(v.isfinite().all() for v in state["things"]["model"].values())


def test_other_images(monkeypatch):
    """Ten classes, or many images of each, taken for granted: here are two, and one of the test
    images is the only one of its class."""
    common.seed_everything(0)
    tiny = common.Data("tiny", ("bag", "hat"), torch.rand(60, 1, 28, 28), torch.arange(60) % 2,
                       torch.rand(20, 1, 28, 28), torch.tensor([0] * 19 + [1]))
    monkeypatch.setattr(common, "load_data", lambda args: tiny)
    ae.main([*FAST, "--recipe", "first", "--epochs", "1", "--out-dir", "tiny"])
    drawn = sorted(int(f.name[3:5]) for f in Path("tiny").glob("fig*.png"))
    assert drawn == [1, *range(3, 16)]  # the report's first training is its figure 1


@pytest.mark.skipif(common.pick_device("auto") == "cpu", reason="this machine has no GPU")
def test_on_a_gpu(no_figures):
    """A tensor left on the CPU; draws that depend on the device; a run tied to where it began."""
    gpu = common.pick_device("auto")
    there = ae.main(["--fast", "--data", "digits", "--device", gpu, "--out-dir", "there"])
    ae.main([*FAST, "--out-dir", "here"])
    assert there["device"] == gpu
    assert history("there")[0]["val_mse"] == pytest.approx(history("here")[0]["val_mse"], rel=0.02)
    again = ae.main(["--resume", "there", *CPU])
    assert again["test_mse"] == pytest.approx(there["test_mse"], rel=1e-3)


@pytest.mark.parametrize("flags", [
    "--lr 0", "--lr nan", "--lr inf", "--epochs 0", "--epochs 1.5", "--epochs x", "--latent-dim 0",
    "--batch-size -1", "--dropout 1", "--folds 0", "--seed -1", "--optimizer adamw", "--lat 3",
    "--resume nowhere", "--resume=", "--out-dir=", "--latent-dim 1",
    "--device cuda", "--data mnist", "--filters 8"])
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
    message = fails(2, ae.main, ["--resume", folder, "--latent-dim", "7", *CPU])
    assert "--latent-dim is 38" in message
    assert ae.parse_args(["--resume", folder, "--latent-dim", "38", *CPU]).fast is True


def test_recipes_and_explicit_flags():
    """A recipe that overrides what was asked for explicitly."""
    args = ae.parse_args(["--recipe", "report", *CPU])
    assert (args.batch_size, args.lr, args.schedule) == (48, 0.002, "constant")
    args = ae.parse_args(["--recipe", "report", "--lr", "0.5", "--fast", "--epochs", "9",
                          *CPU])
    assert (args.batch_size, args.lr, args.epochs) == (48, 0.5, 9)
    assert ae.parse_args(["--recipe", "first", *CPU]).latent_dim == 100


def test_readme_commands_parse():
    """README commands that no longer run."""
    commands = readme_commands("ae.py")
    assert len(commands) > 4
    for command in commands:
        if not {"--resume", "..."} & {*command}:  # the one takes a run, the other is cut short
            ae.parse_args([*command, *CPU])


DATA = Path(os.environ.get("FASHION_MNIST_DIR", ROOT / "data"))


@pytest.mark.skipif(not (DATA / "FashionMNIST").exists(),
                    reason="no FashionMNIST in data/ or in $FASHION_MNIST_DIR")
def test_real_fashion():
    """The real files: their sums, their order, PCA's known error at 38 components."""
    data = common.load_data(ae.parse_args(["--data", "fashion", "--data-dir", str(DATA), *CPU]))
    assert len(data.x_train) == 60_000 and len(data.x_test) == 10_000
    assert data.y_test[:5].tolist() == [9, 2, 1, 1, 6]
    recon = common.pca_reconstruct(data.x_train, data.x_test, 38)
    assert ae.mse(recon, data.x_test).item() == pytest.approx(0.01388, abs=1e-5)
