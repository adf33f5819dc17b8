"""vae.py: each test names the bug that it would catch."""

import contextlib
import io
import json
import math
import os
from pathlib import Path

import common
import pytest
import torch
import vae
from conftest import history, numbers, readme_commands
from test_ae import equal, few, weights  # noqa: F401
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

CPU = ["--device", "cpu"]
FAST = ["--fast", "--data", "digits", *CPU]
SMALL = [*FAST, "--filters", "4", "8", "--decoder-filters", "8", "8"]  # a third of the time


@pytest.fixture(scope="module")
def digits():
    return common.load_data(vae.parse_args(["--data", "digits", *CPU]))


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory):
    """(metrics, folder, what is printed) of one --fast run."""
    folder = tmp_path_factory.mktemp("fast")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        metrics = vae.main([*FAST, "--out-dir", str(folder)])
    return metrics, folder, printed.getvalue()


@pytest.fixture
def no_figures(monkeypatch):
    """Skip what only draws."""
    for module, name in [(m, n) for m in (vae, common) for n in dir(m) if n.startswith("draw_")]:
        monkeypatch.setattr(module, name, lambda *args, **kwargs: {})
    monkeypatch.setattr(common, "plot_curves", lambda *args: None)


@pytest.fixture
def batch():
    """recon_x, x (6, 1, 28, 28), mu, logvar (6, 5), log_sigma: random, gradients on."""
    common.seed_everything(0)
    tensors = (torch.rand(6, 1, 28, 28), torch.rand(6, 1, 28, 28), torch.randn(6, 5),
               torch.randn(6, 5), torch.tensor(-1.5))
    return [t.requires_grad_() for t in tensors]


# --------------------------------------------------------------------------- loss


def test_loss_is_that_of_torch_distributions(batch):
    """Mean over pixels but sum over latents (beta 392 times too large); a wrong sign or constant;
    logvar squared instead of exponentiated."""
    recon_x, x, mu, logvar, log_sigma = batch
    log_likelihood = Independent(Normal(recon_x, log_sigma.exp()), 3).log_prob(x)
    q = Independent(Normal(mu, (logvar / 2).exp()), 1)
    kl = kl_divergence(q, Independent(Normal(torch.zeros(5), torch.ones(5)), 1))
    assert torch.allclose(vae.gaussian_nll(recon_x, x, log_sigma), -log_likelihood, rtol=1e-5)
    assert torch.allclose(vae.kl_divergence(mu, logvar).sum(1), kl, rtol=1e-5)
    assert vae.loss_function(*batch, beta=3).item() == pytest.approx(
        (-log_likelihood + 3 * kl).mean().item(), rel=1e-5)


def test_kl_closed_forms():
    """KL with the wrong sign or scale."""
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert vae.kl_divergence(zero, zero).tolist() == [[0] * 4]
    assert vae.kl_divergence(one, zero).tolist() == [[0.5] * 4]
    assert (vae.kl_divergence(torch.randn(99, 4), torch.randn(99, 4)) >= 0).all()


def test_batch_size_changes_neither_loss_nor_gradients(batch):
    """A sum over the batch: the learning rate would depend on the batch size."""
    *tensors, log_sigma = batch
    once = vae.loss_function(*tensors, log_sigma, 2.0)
    twice = vae.loss_function(*(torch.cat([t, t]) for t in tensors), log_sigma, 2.0)
    assert once.item() == pytest.approx(twice.item(), rel=1e-6)
    grads = [torch.autograd.grad(loss, batch) for loss in (once, twice)]
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(*grads, strict=True))


def test_slope_of_the_loss_in_beta_is_the_kl(batch):
    """beta is parsed and then not used."""
    beta = torch.tensor(1.7, requires_grad=True)
    slope, = torch.autograd.grad(vae.loss_function(*batch, beta), beta)
    assert slope.item() == pytest.approx(vae.kl_divergence(*batch[2:4]).sum(1).mean().item())


@pytest.mark.parametrize("value", [-200.0, 200.0])
def test_extreme_logvar_stays_finite(batch, value):
    """exp(logvar) overflows."""
    model, x = vae.build(vae.parse_args(CPU)), batch[1]
    model.encoder.logvar.bias.data.fill_(value)
    recon_x, mu, logvar = model(x, torch.Generator())
    loss = vae.loss_function(recon_x, x, mu, logvar, model.log_sigma, 1.0)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    assert vae.evaluate(model, x, 1.0)["kl"] < 1e11


def test_the_shortcut_is_beta_392(batch):
    """The docstring's claim: F.mse_loss + KL pulls like sigma 1 with beta 392."""
    recon_x, x, mu, logvar, _ = batch
    kl = vae.kl_divergence(mu, logvar).sum(1).mean()
    shortcut = torch.nn.functional.mse_loss(recon_x, x) + kl
    ours = vae.loss_function(recon_x, x, mu, logvar, torch.tensor(0.0), 392)
    for a, b in zip(torch.autograd.grad(shortcut, [recon_x, mu]),
                    torch.autograd.grad(ours, [recon_x, mu]), strict=True):
        assert torch.allclose(392 * a, b, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------- model


def test_reparameterize_draws_from_q():
    """std mistaken for the variance, or a noise that the generator does not set."""
    mu, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 2 * math.log(0.1)]])
    args = (mu.expand(20_000, 2), logvar.expand(20_000, 2))
    z = vae.reparameterize(*args, torch.Generator().manual_seed(0))
    assert torch.allclose(z.mean(0), mu, atol=0.03)
    assert torch.allclose(z.std(0), torch.tensor([1.0, 0.1]), rtol=0.03)
    assert torch.equal(z, vae.reparameterize(*args, torch.Generator().manual_seed(0)))


def test_flags_reach_the_model():
    """A flag that is parsed and then not used, or used for another argument."""
    args = vae.parse_args(["--latent-dim", "3", "--hidden", "5", "--filters", "2", "4",
                           "--decoder-filters", "6", "7", "--sigma", "0.25", *CPU])
    model = vae.build(args)
    assert [tuple(p.shape) for p in model.parameters() if p.dim() > 1] == [
        (2, 1, 3, 3), (4, 2, 3, 3), (5, 100), (3, 5), (3, 5), (5, 3), (294, 5), (6, 7, 4, 4),
        (7, 1, 4, 4)]
    assert model.log_sigma.exp().item() == pytest.approx(0.25)


def test_encode_returns_mu_and_repeats(digits):
    """Embeddings sampled in evaluation; an order that is lost."""
    model, x = vae.VAE(latent_dim=3), digits.x_test[:50]
    mu, logvar = vae.encode(model, x)
    assert mu.shape == logvar.shape == (50, 3) and torch.equal(mu, vae.encode(model, x)[0])
    assert torch.allclose(mu[7:8], vae.encode(model, x[7:8])[0], atol=1e-6)
    assert vae.decode(model, mu).shape == x.shape


def test_sigma(digits):
    """A variance that is fitted on the evaluated data, or fixed where it should be learned."""
    args = vae.parse_args(["--epochs", "1", "--batch-size", "32", *CPU])
    for sigma, moves in ((None, True), (0.5, False)):
        model = vae.VAE(latent_dim=3, sigma=sigma)
        before = model.log_sigma.item()
        vae.evaluate(model, digits.x_test, 1.0)
        assert model.log_sigma.item() == before
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        vae.train_epoch(model, digits.x_train[:64], optimizer, schedule, args,
                        torch.Generator().manual_seed(0))
        assert (model.log_sigma.item() != before) == moves


class LinearGaussian(torch.nn.Module):
    """x = W z + noise: log p(x) is known (probabilistic PCA), and q(z|x) can be exact."""

    def __init__(self, w, log_sigma):
        super().__init__()
        self.w, self.log_sigma, self.off = w, log_sigma, 0.0
        self.precision = (w * w).sum(0) / math.exp(2 * log_sigma) + 1  # diagonal: W's columns are
        self.encoder, self.decoder = self.encode, lambda z: (z @ w.T).view(-1, 1, 28, 28)

    def encode(self, x):
        mu = x.flatten(1) @ self.w / self.log_sigma.exp() ** 2 / self.precision
        return mu + self.off, (-self.precision.log()).expand_as(mu)


def test_elbo_is_a_bound_on_the_exact_likelihood():
    """Any error in ELBO: with the exact posterior it equals log p(x), with another it is less."""
    common.seed_everything(0)
    w = torch.linalg.qr(torch.randn(784, 3)).Q * torch.tensor([9.0, 5.0, 2.0])  # orthogonal columns
    model = LinearGaussian(w, torch.tensor(-1.0))
    x = (torch.randn(2000, 3) @ w.T + math.exp(-1) * torch.randn(2000, 784)).view(-1, 1, 28, 28)
    cov = w.double() @ w.T.double() + math.exp(-2) * torch.eye(784, dtype=torch.float64)
    exact = MultivariateNormal(torch.zeros(784, dtype=torch.float64), cov).log_prob(
        x.flatten(1).double()).mean().item()
    assert vae.evaluate(model, x, 1.0)["elbo"] == pytest.approx(exact, abs=0.2)
    model.off = 0.5
    assert vae.evaluate(model, x, 1.0)["elbo"] < exact - 10


def test_evaluation_weighs_images_not_batches(digits):
    """An average of batch means with a smaller last batch."""
    model = vae.VAE(latent_dim=3)
    x = torch.cat([digits.x_train[:1000], digits.x_train[:7] * 0])
    mu, logvar = vae.encode(model, x)
    result = vae.evaluate(model, x, 1.0)
    assert result["kl"] == pytest.approx(vae.kl_divergence(mu, logvar).sum(1).mean().item())
    assert result["mse"] == pytest.approx((vae.decode(model, mu) - x).square().mean().item())
    assert result["loss"] == pytest.approx(-result["elbo"])
    assert result == vae.evaluate(model, x, 1.0)


def white(n, dims):
    """(n, dims) numbers of mean 0 and covariance 1, exactly."""
    a = torch.randn(n, dims, generator=torch.Generator().manual_seed(0)).double()
    return (torch.linalg.qr(a - a.mean(0)).Q * math.sqrt(n - 1)).float()


@pytest.mark.parametrize("variances", [(1e-9, 1e-9), (0.5, 2.0)])
@pytest.mark.parametrize("share", [0.0, 0.8])
def test_total_correlation(share, variances):
    """A total correlation of mu instead of z, whose noise hides what two latents share; a log
    variance averaged instead of a variance; independent latents that do not give 0."""
    a, noise = white(1000, 2).T
    mu = torch.stack([a, share * a + math.sqrt(1 - share ** 2) * noise], 1)  # (N, 2)
    factors = torch.tensor([0.4, 1.6]).repeat(500)[:, None]  # the noise differs between the images
    logvar = (torch.tensor(variances) * factors).log()
    rho = share / math.sqrt((1 + variances[0]) * (1 + variances[1]))  # of z, by its definition
    assert vae.total_correlation(mu, logvar) == pytest.approx(
        -0.5 * math.log(1 - rho ** 2), abs=1e-4)


def test_active_units(monkeypatch):
    """A threshold other than the 0.01 of Burda et al., or a standard deviation held against it;
    the noise of a posterior, or a mean other than 0, taken for activity."""
    mu = white(1000, 4) * torch.tensor([1.0, 0.011, 0.009, 0.0]).sqrt() + 5
    monkeypatch.setattr(vae, "encode", lambda model, x: (mu, torch.zeros(1000, 4)))
    result = vae.evaluate(vae.VAE(latent_dim=4), torch.zeros(1000, 1, 28, 28), 1.0)
    assert result["active_units"] == 2
    assert result["total_correlation"] == vae.total_correlation(mu, torch.zeros(1000, 4))


def test_traverse_moves_one_dimension():
    """A traversal that changes the other dimensions, or the start itself."""
    z = torch.tensor([[1.0, 2.0, 3.0]])
    row = vae.traverse(z, 1, torch.tensor([-3.0, 0.0]))
    assert row.tolist() == [[1, -3, 3], [1, 0, 3]] and z.tolist() == [[1, 2, 3]]


# --------------------------------------------------------------------------- runs


def test_fast_run(fast_run):
    """A metric or a figure that is missing."""
    metrics, folder, _ = fast_run
    assert {"test_mse", "test_kl", "test_elbo", "active_units", "kl_per_dim", "sigma", "beta",
            "latent_dim", "parameters", "pca_mse", "epochs", "seconds_per_epoch", "data",
            "device"} <= metrics.keys()
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert metrics["parameters"] <= 150_000 and metrics["test_mse"] < 0.15
    assert sum(metrics["kl_per_dim"]) == pytest.approx(metrics["test_kl"], rel=1e-4)
    drawn = sorted(int(f.name[3:5]) for f in folder.glob("fig*.png"))
    assert drawn == list(range(16, 24))
    assert (folder / "kl_per_dim.png").exists() and (folder / "samples.png").exists()


def test_what_is_printed(fast_run):
    """Rows that break in a terminal of 100 columns; an end that does not say what came out."""
    metrics, folder, printed = fast_run
    lines = printed.splitlines()
    rows = [line for line in lines if line.startswith(("part ", "one split"))]
    assert len(rows) == 4 and max(map(len, rows)) <= 100 and len({*map(len, rows)}) == 1
    assert lines[-1] == str(folder)
    ends = [next(line for line in lines if line.startswith(what))
            for what in ("VAE, one split", "PCA, 18 components", "the report")]
    for line, value in zip(ends, (metrics["test_mse"], metrics["pca_mse"], 0.014), strict=True):
        assert f"  {value:.4g} " in line
    assert len({*map(len, ends)}) == 1  # one below the other


def test_latent_2_draws_the_plane(few, monkeypatch):  # noqa: F811
    """The decoded grid that only two dimensions have; also traversals of a named class."""
    for name in ("draw_latent", "draw_reconstructions", "plot_curves"):
        monkeypatch.setattr(common, name, lambda *args, **kwargs: {})
    traversed, traverse = [], vae.traverse
    monkeypatch.setattr(vae, "traverse", lambda z, dim, values: (
        traversed.append((z, dim)) or traverse(z, dim, values)))
    args = [*FAST, "--latent-dim", "2", "--start-class", "3", "--dims", "1", "0", "--epochs", "1"]
    vae.main([*args, "--out-dir", "two"])
    assert os.path.exists("two/latent_plane.png")
    data = common.load_data(vae.parse_args(args))
    start = vae.encode(vae.load_run("two"), data.x_test[data.y_test == 3][:1])[0]
    assert [dim for _, dim in traversed[:2]] == [1, 0]
    assert all(torch.allclose(z, start, atol=1e-5) for z, _ in traversed[:2])


def test_training_never_sees_the_test_set(fast_run, no_figures, monkeypatch):
    """Selection, curves or statistics that depend on test images: white ones, from which training
    leads away, so whoever chose by them would take the first epoch."""
    load = common.load_data
    monkeypatch.setattr(common, "load_data", lambda args: load(args)._replace(
        x_test=torch.ones(10, 1, 28, 28)))
    vae.main([*FAST, "--out-dir", "blind"])
    assert history("blind") == history(fast_run[1])
    assert equal(weights("blind"), weights(fast_run[1]))


def test_the_best_epoch_is_what_is_tested(few, no_figures, monkeypatch):  # noqa: F811
    """The last epoch's weights in the metrics or in model.pt, though another was better."""
    after, end_epoch = [], common.Run.end_epoch

    def second_is_best(run, score, **row):
        after.append([v.clone() for v in run.things["model"].state_dict().values()])
        end_epoch(run, score=[2.0, 1.0, 3.0][len(run.rows)], **row)
    monkeypatch.setattr(common.Run, "end_epoch", second_is_best)
    metrics = vae.main([*FAST, "--out-dir", "a"])
    assert equal({"model.pt": weights("a")["model.pt"]}, {"model.pt": after[1]})
    data = common.load_data(vae.parse_args(FAST))
    assert vae.evaluate(vae.load_run("a"), data.x_test, 1.0)["elbo"] == metrics["test_elbo"]


@pytest.mark.parametrize("flags", [["--folds", "2"], ["--sweep", "4", "0.25"]])
def test_interrupted_and_resumed_equals_uninterrupted(
        flags, few, no_figures, monkeypatch, fails):  # noqa: F811
    """Resuming repeats batches or noise, forgets the schedule, repeats or skips a training."""
    train_epoch, calls = vae.train_epoch, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:  # the second epoch of the second training
            raise KeyboardInterrupt
        return train_epoch(*args)
    monkeypatch.setattr(vae, "train_epoch", interrupted)
    flags = [*SMALL, *flags, "--batch-size", "16", "--lr", "0.01", "--out-dir"]
    fails(130, common.start, lambda: vae.main([*flags, "half"]))
    assert len(history("half")) == 4
    resumed = vae.main(["--resume", "half", *CPU])
    assert len(calls) == 7  # 4 epochs, the interrupted one, and that one and the last again
    whole = vae.main([*flags, "whole"])
    assert numbers(resumed) == numbers(whole) and history("half") == history("whole")
    assert equal(weights("half"), weights("whole")) and len(weights("whole")) == 3


def test_sweep(few, no_figures):  # noqa: F811
    """Trainings that differ in more than beta, more beta that does not mean less KL, another beta
    than --beta shown, or two betas of one name: the second would take the weights of the first."""
    flags = [*SMALL, "--epochs", "4", "--lr", "0.01", "--batch-size", "8", "--out-dir"]
    metrics = vae.main([*flags, "sweep", "--sweep", "1e6", "4", "1e-6", "--beta", "4"])
    high, middle, low = metrics["sweep"]
    assert high["test_kl"] < middle["test_kl"] < low["test_kl"]
    assert metrics["beta"] == 4 and metrics["test_kl"] == middle["test_kl"]
    data = common.load_data(vae.parse_args(FAST))
    assert vae.evaluate(vae.load_run("sweep"), data.x_test, 4.0)["kl"] == middle["test_kl"]
    alone = vae.main([*flags, "alone", "--beta", "1e-6"])
    assert alone["test_mse"] == low["test_mse"]


def test_collapse_is_said(few, no_figures, capsys):  # noqa: F811
    """Posterior collapse goes unnoticed."""
    metrics = vae.main([*FAST, "--beta", "1e4", "--lr", "0.01", "--epochs", "12",
                        "--batch-size", "16", "--out-dir", "collapsed"])
    assert metrics["active_units"] == 0
    assert "posterior collapse" in capsys.readouterr().err
    vae.main([*FAST, "--beta", "1", "--out-dir", "fine"])
    assert "collapse" not in capsys.readouterr().err


@pytest.mark.parametrize("active, said", [((3, 0), False), ((0, 3), True)])
def test_collapse_is_of_the_weights_that_are_kept(active, said, few, no_figures,  # noqa: F811
                                                  monkeypatch, capsys):
    """A warning of the last epoch, while the weights are those of an earlier one."""
    answers = [answer for loss, units in zip((1.0, 2.0), active, strict=True) for answer in [
        {"loss": loss, "mse": 0.1, "kl": 1.0, "elbo": -loss, "active_units": units}] * 2]
    evaluate, numbers = vae.evaluate, iter(answers)
    monkeypatch.setattr(vae, "evaluate", lambda *args: next(numbers, None) or evaluate(*args))
    vae.main([*SMALL, "--epochs", "2", "--out-dir", "a"])
    assert ("posterior collapse" in capsys.readouterr().err) == said


def test_folds(few, no_figures, monkeypatch):  # noqa: F811
    """Folds that are not averaged; folds, epochs or seeds that draw the same."""
    drawn, train = [], vae.train_epoch
    monkeypatch.setattr(vae, "train_epoch", lambda *args: (
        drawn.append(args[-1].initial_seed()) or train(*args)))
    metrics = vae.main([*SMALL, "--folds", "2", "--epochs", "2", "--out-dir", "folds"])
    assert metrics["folds"] == 2 and metrics["test_mse_std"] > 0
    assert metrics["test_mse"] == pytest.approx(sum(metrics["fold_test_mse"]) / 2)
    folds = [history("folds")[:2], history("folds")[2:]]  # tested: the epochs of the lowest loss
    assert metrics["fold_val_mse"] == [
        min(rows, key=lambda row: row["val_loss"])["val_mse"] for rows in folds]
    vae.main([*SMALL, "--seed", "1", "--epochs", "1", "--out-dir", "other"])
    assert len({*drawn}) == len(drawn) == 5


@pytest.mark.parametrize("flags", [
    "--beta -1", "--beta nan", "--latent-dim 0", "--dims 40 1", "--dims 1 -1", "--start-class Hat",
    "--sigma 0", "--sweep 1 x", "--sweep 1 4 --folds 2", "--beta 3 --sweep 1 4",
    "--resume nowhere", "--bet 4"])
def test_bad_flags_end_in_one_line(flags, fails):
    """A traceback, or a wrong value that trains first."""
    message = fails(2, vae.main, ["--data", "digits", *CPU, *flags.split()])
    assert flags.split()[0] in message or "nowhere" in message
    assert os.listdir() == []


def test_resume_refuses_other_flags(fast_run, fails):
    """A run that goes on with another loss."""
    folder = str(fast_run[1])
    assert "--beta is 1.0" in fails(2, vae.main, ["--resume", folder, "--beta", "4", *CPU])
    args = vae.parse_args(["--resume", folder, "--dims", "3", "4", *CPU])  # only for figures
    assert args.dims == [3, 4] and args.fast is True


def test_other_images(monkeypatch):
    """Ten classes, or many images of each, taken for granted: here are two, and one of the test
    images is the only one of its class, where the traversals start."""
    common.seed_everything(0)
    tiny = common.Data("tiny", ("bag", "hat"), torch.rand(60, 1, 28, 28), torch.arange(60) % 2,
                       torch.rand(20, 1, 28, 28), torch.tensor([0] * 19 + [1]))
    monkeypatch.setattr(common, "load_data", lambda args: tiny)
    vae.main([*FAST, "--latent-dim", "2", "--sweep", "1", "4", "--epochs", "1",
              "--out-dir", "tiny"])
    drawn = {f.name for f in Path("tiny").glob("*.png")}
    assert {"sweep.png", "samples.png", "latent_plane.png", "kl_per_dim.png"} <= drawn
    assert sorted(int(name[3:5]) for name in drawn if name.startswith("fig")) == [*range(16, 24)]


@pytest.mark.skipif(common.pick_device("auto") == "cpu", reason="this machine has no GPU")
def test_on_a_gpu(no_figures):
    """A tensor left on the CPU; draws that depend on the device; a run tied to where it began."""
    gpu = common.pick_device("auto")
    there = vae.main(["--fast", "--data", "digits", "--device", gpu, "--out-dir", "there"])
    vae.main([*FAST, "--out-dir", "here"])
    assert there["device"] == gpu
    assert history("there")[0]["val_loss"] == pytest.approx(
        history("here")[0]["val_loss"], rel=0.02)
    again = vae.main(["--resume", "there", *CPU])
    assert again["test_mse"] == pytest.approx(there["test_mse"], rel=1e-3)


def test_readme_commands_parse():
    """README commands that no longer run."""
    commands = readme_commands("vae.py")
    assert len(commands) > 4
    for command in commands:
        if not {"--resume", "..."} & {*command}:  # the one takes a run, the other is cut short
            vae.parse_args([*command, *CPU])
