"""vae.py: each test names the bug that it would catch."""

import json
import math
import os

import ae
import common
import pytest
import torch
import vae
from conftest import history, numbers, readme_commands
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

FAST = ["--fast", "--data", "digits"]


@pytest.fixture(scope="module")
def digits():
    return common.load_data(vae.parse_args(["--data", "digits"]))


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory):
    """(metrics, folder) of one --fast run."""
    folder = tmp_path_factory.mktemp("fast")
    return vae.main([*FAST, "--out-dir", str(folder)]), folder


@pytest.fixture
def no_figures(monkeypatch):
    """Skip what only draws."""
    for module, name in [(m, n) for m in (vae, common) for n in dir(m) if n.startswith("draw_")]:
        monkeypatch.setattr(module, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(ae, "draw_reconstructions", lambda *args: None)
    monkeypatch.setattr(ae, "draw_latent", lambda *args, **kwargs: {})


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
    for a, b in zip(torch.autograd.grad(once, batch), torch.autograd.grad(twice, batch),
                    strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_slope_of_the_loss_in_beta_is_the_kl(batch):
    """beta is parsed and then not used."""
    beta = torch.tensor(1.7, requires_grad=True)
    slope, = torch.autograd.grad(vae.loss_function(*batch, beta), beta)
    assert slope.item() == pytest.approx(vae.kl_divergence(*batch[2:4]).sum(1).mean().item())


@pytest.mark.parametrize("value", [-200.0, 200.0])
def test_extreme_logvar_stays_finite(batch, value):
    """exp(logvar) overflows."""
    recon_x, x, mu, _, log_sigma = batch
    logvar = torch.full((6, 5), value, requires_grad=True)
    z = vae.reparameterize(mu, logvar, torch.Generator())
    loss = vae.loss_function(recon_x, x, mu, logvar, log_sigma, 1.0) + z.sum()
    grads = torch.autograd.grad(loss, [mu, logvar])
    assert loss.isfinite() and z.isfinite().all() and all(g.isfinite().all() for g in grads)


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


def test_encode_returns_mu_and_repeats(digits):
    """Embeddings sampled in evaluation; an order that is lost."""
    model, x = vae.VAE(latent_dim=3), digits.x_test[:50]
    mu, logvar = vae.encode(model, x)
    assert mu.shape == logvar.shape == (50, 3) and torch.equal(mu, vae.encode(model, x)[0])
    assert torch.allclose(mu[7:8], vae.encode(model, x[7:8])[0], atol=1e-6)
    assert vae.decode(model, mu).shape == x.shape


def test_sigma(digits):
    """A variance that is fitted on the evaluated data, or fixed where it should be learned."""
    args = vae.parse_args(["--epochs", "1", "--batch-size", "32"])
    for sigma, moves in ((None, True), (0.5, False)):
        model = vae.VAE(latent_dim=3, sigma=sigma)
        before = model.log_sigma.item()
        vae.evaluate(model, digits.x_test, 1.0)
        assert model.log_sigma.item() == before
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        vae.train_epoch(model, digits.x_train[:64], optimizer, schedule, 1.0, args,
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


def test_total_correlation():
    """Independent latents: 0; two that are one up to noise: the known value of a Gaussian."""
    common.seed_everything(0)
    a, noise = torch.randn(2, 50_000)
    model = vae.VAE(latent_dim=2)
    for second, expected in ((noise, 0.0), (0.8 * a + 0.6 * noise, -0.5 * math.log(1 - 0.64))):
        mu = torch.stack([a, second], 1)
        model.encoder.forward = lambda x, mu=mu: (mu[:len(x)], torch.full((len(x), 2), -99.0))
        x = torch.zeros(1000, 1, 28, 28)
        assert vae.evaluate(model, x, 1.0)["total_correlation"] == pytest.approx(expected, abs=0.05)
        assert vae.evaluate(model, x, 1.0)["active_units"] == 2


def test_traverse_moves_one_dimension():
    """A traversal that changes the other dimensions, or the start itself."""
    z = torch.tensor([[1.0, 2.0, 3.0]])
    row = vae.traverse(z, 1, torch.tensor([-3.0, 0.0]))
    assert row.tolist() == [[1, -3, 3], [1, 0, 3]] and z.tolist() == [[1, 2, 3]]


# --------------------------------------------------------------------------- runs


def test_fast_run(fast_run):
    """A metric or a figure that is missing."""
    metrics, folder = fast_run
    assert {"test_mse", "test_kl", "test_elbo", "active_units", "kl_per_dim", "sigma", "beta",
            "latent_dim", "parameters", "pca_mse", "epochs", "seconds_per_epoch", "data",
            "device"} <= metrics.keys()
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert metrics["parameters"] <= 150_000 and metrics["test_mse"] < 0.15
    assert sum(metrics["kl_per_dim"]) == pytest.approx(metrics["test_kl"], rel=1e-4)
    drawn = sorted(int(f.name[3:5]) for f in folder.glob("fig*.png"))
    assert drawn == list(range(16, 24))
    assert (folder / "kl_per_dim.png").exists() and (folder / "samples.png").exists()


def test_latent_2_draws_the_plane():
    """The decoded grid that only two dimensions have; also traversals of a named class."""
    vae.main([*FAST, "--latent-dim", "2", "--start-class", "3", "--dims", "1", "0",
              "--out-dir", "two"])
    assert os.path.exists("two/latent_plane.png")


def test_same_seed_same_numbers_and_resume(fast_run, no_figures, monkeypatch, fails):
    """Any draw that the seed does not set; an interrupted run that goes on differently."""
    metrics, folder = fast_run
    train_epoch, calls = vae.train_epoch, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_epoch(*args)
    monkeypatch.setattr(vae, "train_epoch", interrupted)
    fails(130, vae.main, [*FAST, "--out-dir", "again"])
    resumed = vae.main(["--resume", "again"])
    assert history("again") == history(folder)
    assert {**numbers(resumed), "knn_accuracy": 0} == {**numbers(metrics), "knn_accuracy": 0}


def test_sweep():
    """More beta, less KL after the same steps; trainings that differ in more than beta."""
    metrics = vae.main([*FAST, "--sweep", "4", "0.25", "--beta", "4", "--out-dir", "sweep"])
    high, low = metrics["sweep"]
    assert low["test_kl"] > 1.5 * high["test_kl"] and low["test_mse"] < high["test_mse"]
    assert metrics["beta"] == 4 and metrics["test_kl"] == high["test_kl"]
    assert os.path.exists("sweep/sweep.png")
    alone = vae.main([*FAST, "--beta", "0.25", "--out-dir", "alone"])
    assert alone["test_mse"] == low["test_mse"]


def test_collapse_is_said(no_figures, capsys):
    """Posterior collapse goes unnoticed."""
    metrics = vae.main([*FAST, "--beta", "10000", "--lr", "0.01", "--epochs", "6",
                        "--out-dir", "collapsed"])
    assert metrics["active_units"] == 0
    assert "posterior collapse" in capsys.readouterr().err
    vae.main([*FAST, "--beta", "1", "--out-dir", "fine"])
    assert "collapse" not in capsys.readouterr().err


def test_folds(no_figures):
    """Folds that are not averaged."""
    metrics = vae.main([*FAST, "--folds", "2", "--epochs", "2", "--out-dir", "folds"])
    assert metrics["folds"] == 2 and metrics["test_mse_std"] > 0
    assert metrics["test_mse"] == pytest.approx(sum(metrics["fold_test_mse"]) / 2)


@pytest.mark.parametrize("flags", [
    "--beta -1", "--beta nan", "--latent-dim 0", "--dims 40 1", "--dims 1 -1", "--start-class Hat",
    "--sigma 0", "--sweep 1 x", "--sweep 1 4 --folds 2", "--resume nowhere", "--bet 4"])
def test_bad_flags_end_in_one_line(flags, fails):
    """A traceback, or a wrong value that trains first."""
    message = fails(2, vae.main, ["--data", "digits", *flags.split()])
    assert flags.split()[0] in message or "nowhere" in message
    assert os.listdir() == []


def test_a_checkpoint_of_another_script_is_refused(fast_run, fails):
    """ae.py going on with the weights of a VAE."""
    assert "saved by vae.py" in fails(2, ae.main, ["--resume", str(fast_run[1])])


def test_readme_commands_parse():
    """README commands that no longer run."""
    commands = readme_commands("vae.py")
    assert len(commands) > 4
    for command in commands:
        vae.parse_args(command)
