"""gan.py: each test names the bug that it would catch."""

import copy
import json
import math
import os
from pathlib import Path

import ae
import common
import finetune
import gan
import pytest
import torch
import vae
from conftest import history, numbers, readme_commands

FAST = ["--fast", "--data", "digits", "--device", "cpu"]


@pytest.fixture(scope="module")
def digits():
    return common.load_data(gan.parse_args(FAST))


@pytest.fixture(scope="module")
def judge():
    """One judge for all tests, untrained: each --fast run would take seconds to train its own."""
    common.seed_everything(0)
    return finetune.CNN().eval()


@pytest.fixture(autouse=True)
def one_judge(monkeypatch, judge):
    monkeypatch.setattr(finetune, "load_judge", lambda args: judge)


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory, judge):
    """(metrics, folder) of one --fast run."""
    folder = tmp_path_factory.mktemp("fast")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "load_judge", lambda args: judge)
        return gan.main([*FAST, "--out-dir", str(folder)]), folder


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(gan, "draw_curves", lambda *args: None)
    monkeypatch.setattr(gan, "draw_samples", lambda *args: None)


def networks(*flags):
    """args, netG, netD for these flags, the same each time."""
    args = gan.parse_args(["--device", "cpu", *flags])
    common.seed_everything(0)
    return args, *gan.build(args)


def train(args, netG, netD, x, g_lr=0.0, d_lr=0.0):
    """One epoch with plain gradient steps at these rates; returns its means."""
    return gan.train_epoch(netG, netD, copy.deepcopy(netG), x,
                           torch.optim.SGD(netG.parameters(), g_lr),
                           torch.optim.SGD(netD.parameters(), d_lr), (), args,
                           torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------- model


@pytest.mark.parametrize("flags", [[], ["--recipe", "report"],
                                   ["--noise-dim", "3", "--filters", "3", "4", "5",
                                    "--d-filters", "2", "3", "--no-batchnorm"]])
def test_shapes_range_and_size(flags):
    """Logits (B, 1), which broadcast to (B, B) against labels (B,); an image outside [0, 1]."""
    args, netG, netD = networks(*flags)
    x = netG(torch.randn(5, args.noise_dim))
    assert x.shape == (5, 1, 28, 28) and 0 <= x.min() and x.max() <= 1
    assert netD(x).shape == (5,) and netD(x[:1]).shape == (1,)
    assert sum(p.numel() for net in (netG, netD) for p in net.parameters()) <= 400_000


def test_flags_reach_the_networks():
    """An ingredient that is switched off in name only."""
    kinds = [type(m).__name__ for m in networks("--no-batchnorm")[1].modules()]
    assert "BatchNorm2d" not in kinds and "ConvTranspose2d" in kinds
    assert "BatchNorm2d" in [type(m).__name__ for m in networks()[1].modules()]

    for flag, bounded in (("--spectral-norm", True), ("--no-spectral-norm", False)):
        netD = networks(flag, "--init-std", "0.5")[2]
        for _ in range(30):
            netD(torch.rand(2, 1, 28, 28))  # each call improves the estimate of the norm
        norms = [torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
                 for layer in (netD.block1[0], netD.block2[0], netD.linear)]
        assert norms == pytest.approx([1, 1, 1], abs=0.02) if bounded else min(norms) > 1.1

    for net in networks("--init-std", "0.02", "--no-spectral-norm")[1:]:
        weights = [p.detach() for p in net.parameters() if p.dim() > 1]
        assert all(w.std().item() == pytest.approx(0.02, rel=0.15) for w in weights)
        assert abs(torch.cat([w.flatten() for w in weights]).mean()) < 0.001


def test_flags_reach_the_optimisers():
    """A rate, momentum or schedule that is parsed and then not used."""
    for flags, end in (([], 0.0), (["--schedule", "constant"], 0.01)):
        args, netG, _ = networks("--lr", "0.01", "--beta1", "0.3", "--epochs", "2",
                                 "--batch-size", "4", *flags)
        optimizer, schedule = gan.make_optimizer(netG, args, 10)  # 3 steps in each epoch
        assert optimizer.param_groups[0]["betas"] == (0.3, 0.999)
        rates = []
        for _ in range(6):
            rates += schedule.get_last_lr()
            optimizer.step()
            schedule.step()
        assert rates[0] == 0.01 and schedule.get_last_lr() == pytest.approx([end])
        assert rates[3] == pytest.approx((0.01 + end) / 2)


# --------------------------------------------------------------------------- training


def test_chance_level():
    """A loss of another form: the level that figure 24 draws would be wrong."""
    logits = torch.zeros(7)
    assert gan.bce(logits, 1.0).item() == pytest.approx(gan.CHANCE["g_loss"]) == math.log(2)
    assert (gan.bce(logits, 1.0) + gan.bce(logits, 0.0)).item() == pytest.approx(
        gan.CHANCE["d_loss"])
    logits = torch.tensor([3.0, -1.0])
    assert gan.bce(logits, 0.0).item() == pytest.approx(
        (math.log(1 + math.exp(3)) + math.log(1 + math.exp(-1))) / 2)


def test_each_step_keeps_to_its_own_network(digits):
    """No detach in D's step, gradients that are not cleared, or D's gradients filled by G's step.

    With rates of zero nothing moves, and the gradients left by the last of two batches are known.
    """
    x = digits.x_train[:8]
    args, netG, netD = networks("--batch-size", "4", "--no-spectral-norm")
    train(args, netG, netD, x)
    got = [[p.grad.clone() for p in net.parameters()] for net in (netG, netD)]

    generator = torch.Generator().manual_seed(0)
    idx = torch.randperm(8, generator=generator)[4:]
    _, z = (torch.randn(4, args.noise_dim, generator=generator) for _ in range(2))
    fake, log = netG(z), torch.nn.functional.logsigmoid
    d_loss = -log(netD(x[idx])).mean() - log(-netD(fake)).mean()
    g_loss = -log(netD(fake)).mean()
    for net, loss, grads in ((netG, g_loss, got[0]), (netD, d_loss, got[1])):
        expected = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        for a, b in zip(grads, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("moves", ["G", "D"])
def test_one_learns_against_the_other_at_rest(digits, moves):
    """A sign: D that learns to take real for fake, G that learns to be caught."""
    x = digits.x_train[:64]
    args, netG, netD = networks("--batch-size", "32")
    rates = {"d_lr": 0.2} if moves == "D" else {"g_lr": 0.2}
    rows = [train(args, netG, netD, x, **rates) for _ in range(8)]
    if moves == "D":
        assert rows[-1]["d_loss"] < 0.6 * rows[0]["d_loss"]
        assert rows[-1]["d_accuracy_real"] == rows[-1]["d_accuracy_fake"] == 1
    else:
        assert rows[-1]["g_loss"] < 0.95 * rows[0]["g_loss"]
        assert rows[-1]["d_accuracy_fake"] <= rows[0]["d_accuracy_fake"]
    assert all(r["g_gradient"] > 0 for r in rows)


def test_means_weigh_images_not_batches(digits):
    """An average of batch means with a smaller last batch."""
    x = digits.x_train[:10]
    args, netG, netD = networks("--batch-size", "8", "--no-batchnorm")
    row = train(args, netG, netD, x)
    with torch.no_grad():
        right = (netD(x) > 0).float().mean().item()
    assert row["d_accuracy_real"] == pytest.approx(right)
    args.batch_size = 10
    assert row["d_loss"] == pytest.approx(train(args, netG, netD, x)["d_loss"], rel=0.01)


def test_ema_equals_its_definition():
    """Weights or BatchNorm statistics copied, forgotten, or averaged with the wrong end."""
    nets = [networks("--seed", str(s))[1] for s in range(2)]
    ema, netG = nets
    for p in netG.parameters():
        p.data.add_(0.5)
    netG(torch.randn(16, 32))  # moves the statistics
    before, now = copy.deepcopy(ema.state_dict()), netG.state_dict()
    gan.update_average(ema, netG, 0.9)
    for name, value in ema.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, 0.9 * before[name] + 0.1 * now[name], atol=1e-6)
    assert not torch.equal(ema.linear[2].running_mean, before["linear.2.running_mean"])
    gan.update_average(ema, netG, 0.0)  # off: G itself
    z = torch.randn(3, 32)
    assert torch.equal(gan.sample(ema, z), gan.sample(netG, z))


# --------------------------------------------------------------------------- evaluation


def test_sampling_is_evaluation():
    """Sampling in train mode: images depend on their neighbours, BatchNorm's statistics move."""
    _, netG, _ = networks()
    netG.train()
    netG(torch.randn(64, 32))
    before, z = copy.deepcopy(netG.state_dict()), gan.noise(150, 32, 0)
    netG.train()
    x = gan.sample(netG, z)
    assert torch.allclose(x[0], gan.sample(netG, z[:1])[0], atol=1e-6)
    assert torch.allclose(x[-1], gan.sample(netG, z[-1:])[0], atol=1e-6) and len(x) == 150
    assert all(torch.equal(a, b) for a, b in zip(
        before.values(), netG.state_dict().values(), strict=True))
    assert torch.equal(z, gan.noise(150, 32, 0))
    assert not torch.equal(z, gan.noise(150, 32, 1))


def test_frechet_distance_of_gaussians():
    """A square root of each entry, a trace of the wrong matrix, a missing mean."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(500, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    mix = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    b = b @ mix + 1  # the two covariances do not commute
    distance = gan.frechet_distance(a, b)

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    cross = root(root(cov_a) @ cov_b @ root(cov_a))  # the symmetric form of the same trace
    expected = (a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b - 2 * cross).trace()
    assert distance == pytest.approx(expected.item(), rel=1e-8)
    assert distance == pytest.approx(gan.frechet_distance(b, a), rel=1e-8)
    # N(m, s^2 C) against N(0, C): |m|^2 + (1 - s)^2 tr C
    shifted = (a - a.mean(0)) * 3 + a.mean(0) + 2
    assert gan.frechet_distance(a, shifted) == pytest.approx(4 * 4 + 4 * cov_a.trace().item())


def test_frechet_distance_is_zero_for_equal_sets_and_grows_with_noise(digits, judge):
    """A metric that does not follow the eye; a judge with dropout on."""
    x = digits.x_train
    real, generator = gan.features(judge, x), torch.Generator().manual_seed(0)
    assert gan.frechet_distance(real, real) == pytest.approx(0, abs=1e-5)
    noise = torch.randn(x.shape, generator=generator)
    distances = [gan.frechet_distance(real, gan.features(judge, (x + s * noise).clamp(0, 1)))
                 for s in (0.0, 0.1, 0.3, 0.9)]
    assert distances == sorted(distances) and distances[1] > 100 * abs(distances[0])


def test_precision_and_recall():
    """Precision and recall swapped; a neighbour that is the point itself, at distance zero."""
    a = torch.randn(1500, 5, generator=torch.Generator().manual_seed(0))
    assert gan.precision_recall(a, a) == (1, 1)
    assert gan.precision_recall(a, a + 1000) == (0, 0)
    real = torch.cat([a, a + 1000])
    assert gan.precision_recall(real, a) == (1, 0.5)  # half of the real ones are never made
    assert gan.precision_recall(a, real) == (0.5, 1)  # half of what is made is nothing real
    line = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    fake = torch.tensor([[-0.9], [0.1], [15.0], [15.1]])  # radii 1, 1, 0.1, 0.1; of line 1, 1, 1, 8
    assert gan.precision_recall(line, fake, k=1) == (1, 0.5)


def test_judge_counts_classes(judge, digits):
    """A histogram of another axis: real digits are spread over all ten classes."""
    x = digits.x_train[:300]
    result = gan.judge_images(judge, x, gan.features(judge, x))
    assert result["class_coverage"] == pytest.approx(
        [(judge(x).argmax(1) == c).float().mean().item() for c in range(10)])
    assert (result["precision"], result["recall"]) == (1, 1)


def test_nearest_finds_the_copy(digits):
    """A generator that copies would go unnoticed."""
    x, distance = gan.nearest(digits.x_train[[7, 3]] + 0.001, digits.x_train)
    assert torch.equal(x, digits.x_train[[7, 3]])
    assert distance.tolist() == pytest.approx([0.028, 0.028], abs=1e-3)  # sqrt(784) * 0.001


# --------------------------------------------------------------------------- runs


def test_fast_run(fast_run, judge, digits):
    """A metric or a figure that is missing; final numbers from other weights than the best."""
    metrics, folder = fast_run
    assert {"d_loss", "g_loss", "d_accuracy_real", "d_accuracy_fake", "frechet", "frechet_floor",
            "precision", "recall", "class_coverage", "parameters", "epochs", "seconds_per_epoch",
            "data", "device"} <= metrics.keys()
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert 0 < metrics["frechet_floor"] < metrics["frechet"]
    assert sum(metrics["class_coverage"]) == pytest.approx(1)
    for name in ("fig24_loss", "fig25_samples", "nearest", "epochs", "interpolation"):
        assert (folder / f"{name}.png").exists()
    x = gan.sample(gan.load_run(folder), gan.noise(300, 32, 3))
    real = gan.features(judge, digits.x_test)
    assert gan.judge_images(judge, x, real)["frechet"] == pytest.approx(metrics["frechet"])
    best = min(history(folder), key=lambda row: row["val_frechet"])
    assert (metrics["val_frechet"], metrics["best_epoch"]) == (best["val_frechet"], best["epoch"])


def test_final_numbers_are_of_the_best_epoch(no_figures, monkeypatch):
    """The last weights, where an earlier epoch was better on the validation images."""
    distances, judged = iter([2.0, 1.0, 3.0, 0.0]), []
    monkeypatch.setattr(gan, "frechet_distance", lambda a, b: next(distances))
    monkeypatch.setattr(gan, "judge_images", lambda judge, x, real: judged.append(x) or {})
    metrics = gan.main([*FAST, "--out-dir", "best"])
    assert metrics["best_epoch"] == 2
    x = gan.sample(gan.load_run("best"), gan.noise(300, 32, 3))
    assert any(torch.equal(x, other) for other in judged)


def test_same_seed_same_numbers_and_resume(fast_run, no_figures, monkeypatch, fails):
    """A draw without a seed; a resumed run without an optimiser, the EMA or its draws."""
    metrics, folder = fast_run
    train_epoch, calls = gan.train_epoch, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_epoch(*args)
    monkeypatch.setattr(gan, "train_epoch", interrupted)
    fails(130, gan.main, [*FAST, "--out-dir", "again"])
    resumed = gan.main(["--resume", "again"])
    assert history("again") == history(folder)
    assert {**numbers(resumed), "folder": ""} == {**numbers(metrics), "folder": ""}
    parts = [common.load_checkpoint(Path(f) / "checkpoint.pt", "gan")["parts"]
             for f in ("again", folder)]
    assert parts[0].keys() == {"model", "netG", "netD", "g_optimizer", "d_optimizer",
                               "g_schedule", "d_schedule", "album"}
    for net in ("model", "netG", "netD", "album"):
        pairs = zip(parts[0][net].values(), parts[1][net].values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert parts[0]["album"]["x"].flatten(1).std(1).min() > 0  # no epoch is left blank
    other = gan.main([*FAST, "--out-dir", "other", "--seed", "1"])
    assert other["frechet"] != metrics["frechet"]


def test_training_never_sees_the_test_set(fast_run, no_figures, monkeypatch):
    """Selection or curves that depend on test images."""
    load = common.load_data
    monkeypatch.setattr(common, "load_data", lambda args: load(args)._replace(
        x_test=torch.zeros(10, 1, 28, 28)))
    gan.main([*FAST, "--out-dir", "blind"])
    assert history("blind") == history(fast_run[1])


def test_ablate(fast_run, monkeypatch, fails):
    """Variants that differ in more than their ingredient, or in nothing."""
    variants = {k: gan.VARIANTS["best"][k] for k in ("ours", "no EMA", "noise 8")}
    monkeypatch.setattr(gan, "VARIANTS", {"best": variants})
    train_epoch, calls = gan.train_epoch, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:  # in the second variant
            raise KeyboardInterrupt
        return train_epoch(*args)
    monkeypatch.setattr(gan, "train_epoch", interrupted)
    fails(130, gan.main, [*FAST, "--ablate", "--out-dir", "ablate"])
    metrics = gan.main(["--resume", "ablate"])
    rows = history("ablate")
    assert rows[:3] == history(fast_run[1])  # the first is the plain run
    assert [r["d_loss"] for r in rows[3:6]] == [r["d_loss"] for r in rows[:3]]  # training the same,
    assert rows[5]["val_frechet"] != rows[2]["val_frechet"]  # but the samples are not
    assert rows[6]["d_loss"] != rows[0]["d_loss"]
    assert metrics["ablation"]["no EMA"]["val_frechet"] == rows[5]["val_frechet"]
    assert os.path.exists("ablate/ablation.png")


def test_compare(fast_run, monkeypatch, fails, capsys):
    """One generator's run in the place of another's, or a missing run that is skipped."""
    for module, out in ((ae, "ae"), (vae, "vae")):
        for name in dir(module):
            if name.startswith("draw_"):
                monkeypatch.setattr(module, name, lambda *args, **more: {})
        module.main([*FAST, "--out-dir", out])
    named = ["--ae", "ae", "--vae", "vae", "--gan", str(fast_run[1])]
    message = fails(2, gan.main, [*FAST, "--compare", *named])
    assert "python gan.py --recipe report" in message
    message = fails(2, gan.main, [*FAST, "--compare", *named, "--gan-report", str(fast_run[1])])
    assert "not a finished training" in message and "recipe report" in message

    monkeypatch.setattr(gan, "draw_curves", lambda *args: None)
    monkeypatch.setattr(gan, "draw_samples", lambda *args: None)
    gan.main([*FAST, "--recipe", "report", "--epochs", "1", "--out-dir", "report"])
    capsys.readouterr()
    result = gan.main([*FAST, "--compare", *named, "--gan-report", "report", "--out-dir", "board"])
    rows = result["generators"]
    assert len(rows) == 9 and os.path.exists("board/generators.png")
    assert all(row["frechet_std"] > 0 for row in rows.values())
    for name in ("AE, Gaussian", "VAE, 50 Gaussians"):  # not one set of codes, three times
        assert rows[name]["frechet_std"] > 1e-4 * rows[name]["frechet"]
    assert len({row["frechet"] for row in rows.values()}) == 9
    assert min(rows, key=lambda name: rows[name]["frechet"]) == "training images"
    assert "GAN, ours" in capsys.readouterr().out


def test_load_run_of_a_sweep(tmp_path):
    """The VAE of another beta than the one that the run's figures and metrics show."""
    models = [vae.VAE(latent_dim=2) for _ in range(3)]
    flags = {**vars(vae.parse_args(["--latent-dim", "2", "--beta", "4"])), "sweep": [1.0, 4.0, 9.0]}
    torch.save({"config": {"script": "vae", "flags": flags}, "fold": 2, "epoch": 1, "history": [],
                "parts": {}, "best": {i: {"model": m.state_dict()} for i, m in enumerate(models)}},
               tmp_path / "checkpoint.pt")
    assert torch.equal(vae.load_run(tmp_path).encoder.mu.weight,
                       models[1].encoder.mu.weight)


def test_recipes_and_explicit_flags():
    """The report's settings changed in passing; a recipe that overrides an explicit flag."""
    args = gan.parse_args(["--recipe", "report"])
    assert (args.noise_dim, args.lr, args.beta1, args.epochs) == (32, 2e-4, 0.5, 100)
    assert (args.init_std, args.batchnorm, args.spectral_norm, args.ema) == (0.02, False, False, 0)
    assert gan.parse_args(["--recipe", "report", "--lr", "0.5"]).lr == 0.5
    for recipe, variants in gan.VARIANTS.items():
        flags = vars(gan.parse_args(["--recipe", recipe]))
        for change in list(variants.values())[1:]:
            assert all(flags[flag] != value for flag, value in change.items())  # it does change


@pytest.mark.parametrize("flags", [
    "--noise-dim 0", "--beta1 1", "--ema 1", "--ema nan", "--init-std -1", "--filters 8 8",
    "--folds 2", "--ablate --compare", "--resume nowhere", "--compare", "--gan=", "--noise 3",
    "--gan somewhere"])
def test_bad_flags_end_in_one_line(flags, fails):
    """A traceback, or a wrong value that trains first."""
    message = fails(2, gan.main, [*FAST, *flags.split()])
    assert flags.split()[0].strip("=") in message or "nowhere" in message
    assert os.listdir() == []  # nothing was started


def test_resume_refuses_other_flags(fast_run, fails):
    """A run resumed with another recipe is not the run that it says it is."""
    message = fails(2, gan.main, ["--resume", str(fast_run[1]), "--ema", "0.5"])
    assert "--ema is 0.9 in" in message
    assert "saved by gan.py" in fails(2, vae.main, ["--resume", str(fast_run[1])])


def test_readme_commands_parse():
    """README commands that no longer run."""
    commands = readme_commands("gan.py")
    assert len(commands) > 4
    for command in commands:
        gan.parse_args(command)
