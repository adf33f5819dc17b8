"""gan.py: each test names the bug that it would catch."""

import copy
import json
import math
import os
from pathlib import Path

import common
import finetune
import gan
import pytest
import torch
import vae
from conftest import history, numbers, readme_commands

FAST = ["--fast", "--data", "digits", "--device", "cpu"]
SMALL = ["--filters", "8", "8", "8", "--d-filters", "4", "4"]
GPU = common.pick_device("auto")
LOAD, JUDGE = common.load_data, gan.load_judge


@pytest.fixture(scope="module")
def digits():
    return common.load_data(gan.parse_args(FAST))


@pytest.fixture(scope="module")
def fewer(digits):
    """100 training and 60 test images, for runs of which only the course matters."""
    return digits._replace(x_train=digits.x_train[:100], y_train=digits.y_train[:100],
                           x_test=digits.x_test[:60], y_test=digits.y_test[:60])


@pytest.fixture(scope="module")
def judge():
    """One judge for all tests, untrained: to train one for each would take seconds."""
    common.seed_everything(0)
    return finetune.CNN(10).eval()


@pytest.fixture(autouse=True)
def few(monkeypatch, fewer, judge):
    """What main() loads and asks."""
    monkeypatch.setattr(common, "load_data", lambda args: fewer)
    monkeypatch.setattr(gan, "load_judge", lambda args, data: judge)


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory, fewer, judge):
    """(metrics, folder) of one --fast run."""
    folder = tmp_path_factory.mktemp("fast")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_data", lambda args: fewer)
        patch.setattr(gan, "load_judge", lambda args, data: judge)
        return gan.main([*FAST, "--out-dir", str(folder)]), folder


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(common, "draw_ablation", lambda *args: None)
    for name in ("draw_curves", "draw_samples"):
        monkeypatch.setattr(gan, name, lambda *args: None)


@pytest.fixture
def two_classes(monkeypatch, fewer):
    """Images of two classes, as somebody's own would be; and a judge that knows two."""
    parity = fewer._replace(name="parity", classes=("even", "odd"), y_train=fewer.y_train % 2,
                            y_test=fewer.y_test % 2)
    common.seed_everything(0)
    judge = finetune.CNN(2).eval()
    monkeypatch.setattr(common, "load_data", lambda args: parity)
    monkeypatch.setattr(gan, "load_judge", lambda args, data: judge)
    return parity


@pytest.fixture
def interrupt(monkeypatch, fails):
    """interrupt(n, argv): run gan.main until its n-th epoch begins, then as by Ctrl-C."""
    def run(n, argv):
        epochs, train_epoch = iter(range(1, n + 1)), gan.train_epoch

        def train(*args, **kwargs):
            if next(epochs) == n:
                raise KeyboardInterrupt
            return train_epoch(*args, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(gan, "train_epoch", train)
            assert fails(130, common.start, lambda: gan.main(argv)).startswith("error: interrupted")
    return run


def same(a, b):
    """Are two checkpoints, or parts of them, equal to the last bit? Times aside."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def load(file):
    return torch.load(file, weights_only=True)


def networks(*flags):
    """args, netG, netD for these flags, the same each time."""
    args = gan.parse_args(["--device", "cpu", *flags])
    common.seed_everything(0)
    return args, *gan.build(args)


def train(args, netG, netD, x, g_lr=0.0, d_lr=0.0, steps=0):
    """One epoch with plain gradient steps at these rates, after steps of them; its means."""
    optimizers = torch.optim.SGD(netG.parameters(), g_lr), torch.optim.SGD(netD.parameters(), d_lr)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizers[0], factor=1.0)
    schedule.last_epoch = steps
    return gan.train_epoch(netG, netD, copy.deepcopy(netG), x, *optimizers, (schedule,), args,
                           torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------- model


@pytest.mark.parametrize("flags", [[], ["--recipe", "report"],
                                   ["--noise-dim", "3", "--filters", "3", "4", "5",
                                    "--d-filters", "2", "3", "4", "5", "--no-batchnorm"]])
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
                 for layer in (*(block[0] for block in netD.blocks), netD.linear)]
        assert len(norms) == 4
        assert norms == pytest.approx([1] * 4, abs=0.02) if bounded else min(norms) > 1.1

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


def test_levels_lie_with_their_curves():
    """Figure 24: chance level of G's loss drawn at D's, or in another panel than its curve."""
    rows = [{"epoch": n, "d_loss": 1.0, "g_loss": 2.0, "d_accuracy_real": 0.6,
             "d_accuracy_fake": 0.7, "val_frechet": 50.0, "g_gradient": 3.0} for n in (1, 2)]
    figures = []
    run = type("Figures", (), {"save": lambda self, fig, *words: figures.append(fig)})()
    gan.draw_curves(run, rows, 0.25, "digits")
    drawn = [{line.get_label(): set(line.get_ydata()) for line in ax.lines}
             for ax in figures[0].axes]
    assert drawn == [
        {"d_loss": {1.0}, "d_loss at chance level": {2 * math.log(2)},
         "g_loss": {2.0}, "g_loss at chance level": {math.log(2)}},
        {"d_accuracy_real": {0.6}, "d_accuracy_fake": {0.7}, "chance level": {0.5}},
        {"val_frechet": {50.0}, "training images: 0.2": {0.25}}, {"g_gradient": {3.0}}]


def test_an_ablation_that_spreads_is_drawn_on_a_logarithmic_axis():
    """One hopeless variant squeezes all others into a line."""
    scales = []
    run = type("Figures", (), {"save": lambda self, fig, *words: scales.append(
        fig.axes[0].get_xscale())})()
    for worst in (9.0, 300.0):
        common.draw_ablation(run, {"ours": [6.0, 7.0], "worst": [worst, worst]}, "distance", "")
    assert scales == ["linear", "log"]


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
    args, netG, netD = networks("--batch-size", "32", "--filters", "16", "16", "16",
                                "--d-filters", "8", "16")
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


def test_ema_warms_up(digits, monkeypatch):
    """First random weights that count for long; a decay above --ema, or one that starts anew."""
    decays = []
    monkeypatch.setattr(gan, "update_average", lambda ema, netG, decay: decays.append(decay))
    args, netG, netD = networks("--batch-size", "4", "--ema", "0.3")
    train(args, netG, netD, digits.x_train[:16])
    assert decays == [1 / 10, 2 / 11, 3 / 12, 0.3]  # 4 / 13 is more
    decays.clear()
    args.ema = 0.999
    train(args, netG, netD, digits.x_train[:8], steps=90)
    assert decays == [91 / 100, 92 / 101]


# --------------------------------------------------------------------------- runs


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


def test_fast_run(fast_run, judge, fewer):
    """A metric or a figure that is missing; final numbers from other weights than the best."""
    metrics, folder = fast_run
    assert {"d_loss", "g_loss", "d_accuracy_real", "d_accuracy_fake", "frechet", "frechet_floor",
            "precision", "recall", "two_sample", "two_sample_pixels", "class_coverage",
            "parameters", "epochs", "seconds_per_epoch", "data", "device"} <= metrics.keys()
    assert json.loads(json.dumps(metrics)) == json.loads((folder / "metrics.json").read_text())
    assert 0 < metrics["frechet_floor"] < metrics["frechet"]
    assert sum(metrics["class_coverage"]) == pytest.approx(1)
    page = (folder / "index.html").read_text()
    for name in ("fig24_loss", "fig25_samples", "nearest", "epochs", "interpolation"):
        assert (folder / f"{name}.png").exists() and f"{name}.png" in page
    x = gan.sample(gan.load_run(folder), gan.noise(60, 32, 3))
    again = gan.judge_images(judge, x, fewer.x_test, finetune.encode(judge, fewer.x_test))
    assert again["frechet"] == pytest.approx(metrics["frechet"])
    best = min(history(folder), key=lambda row: row["val_frechet"])
    assert (metrics["val_frechet"], metrics["best_epoch"]) == (best["val_frechet"], best["epoch"])
    album = common.load_checkpoint(folder / "best.pt", {})["images"]
    assert [x.shape for x in album] == [(10, 1, 28, 28)] * 3
    assert not torch.equal(album[0], album[2])  # no epoch shows the images of another


def test_final_numbers_are_of_the_best_epoch(no_figures, monkeypatch):
    """The last weights, where an earlier epoch was better on the validation images."""
    distances, judged = iter([2.0, 1.0, 3.0, 0.0]), []
    monkeypatch.setattr(gan, "frechet_distance", lambda a, b: next(distances))
    monkeypatch.setattr(gan, "judge_images", lambda judge, x, *real: judged.append(x) or {
        "frechet": 0.0, "precision": 0.0, "recall": 0.0})
    metrics = gan.main([*FAST, *SMALL, "--out-dir", "best"])
    assert metrics["best_epoch"] == 2
    netG, state = gan.load_run("best"), load("best/best.pt")["things"]["model"]
    assert not same(dict(netG.state_dict()), dict(state))  # that is the last one
    best = common.load_checkpoint(Path("best/best.pt"), {})["best"]
    assert same(dict(netG.state_dict()), dict(best["model"]))
    x = gan.sample(netG, gan.noise(60, 32, 3))
    assert any(torch.equal(x, other) for other in judged)


def test_interrupted_and_resumed_equals_uninterrupted(no_figures, interrupt, monkeypatch):
    """A resumed run without an optimiser, the average or its warm-up, or with other draws."""
    decays, update_average = [], gan.update_average
    monkeypatch.setattr(gan, "update_average", lambda ema, netG, decay: decays.append(
        decay) or update_average(ema, netG, decay))
    command = [*FAST, *SMALL, "--augment", "flip", "--out-dir"]
    whole = gan.main([*command, "whole"])
    assert decays == [(1 + t) / (10 + t) for t in range(6)]  # 3 epochs of 2 steps
    decays.clear()
    interrupt(3, [*command, "part"])
    assert len(decays) == 4 and not Path("part/metrics.json").exists()
    resumed = gan.main(["--resume", "part", "--device", "cpu"])
    assert decays == [(1 + t) / (10 + t) for t in range(6)]
    assert history("part") == history("whole") and numbers(resumed) == numbers(whole)
    assert same(load("part/best.pt"), load("whole/best.pt"))
    assert same(load("part/model.pt"), load("whole/model.pt"))
    assert load("part/best.pt")["things"].keys() == {
        "model", "netG", "netD", "g_optimizer", "d_optimizer", "g_schedule", "d_schedule"}
    other = gan.main([*command, "other", "--seed", "1"])
    assert other["frechet"] != whole["frechet"]


def test_same_seed_same_numbers_without_the_test_set(fast_run, no_figures, monkeypatch, fewer):
    """A draw without a seed; selection or curves that depend on test images."""
    monkeypatch.setattr(common, "load_data", lambda args: fewer._replace(
        x_test=torch.zeros(10, 1, 28, 28)))
    gan.main([*FAST, "--out-dir", "blind"])
    assert history("blind") == history(fast_run[1])


def test_ablate(interrupt, no_figures, monkeypatch):
    """Variants that differ in more than their ingredient, or in nothing; one lost on resume."""
    small = {"filters": [8, 8, 8], "d_filters": [4, 4]}
    variants = {k: small | gan.VARIANTS["best"][k] for k in ("ours", "no EMA", "noise 8")}
    monkeypatch.setattr(gan, "VARIANTS", {"best": variants})
    command = [*FAST, "--ablate", "--epochs", "2", "--out-dir"]
    whole = gan.main([*command, "whole"])
    rows = history("whole")
    assert len(rows) == 3 * 2 * 2  # variants, seeds, epochs
    ours, no_ema, noise = rows[:4], rows[4:8], rows[8:]
    assert [r["d_loss"] for r in no_ema] == [r["d_loss"] for r in ours]  # training the same,
    assert no_ema[1]["val_frechet"] != ours[1]["val_frechet"]  # but the samples are not
    assert noise[0]["d_loss"] != ours[0]["d_loss"] != ours[2]["d_loss"]
    result = whole["ablation"]["no EMA"]
    assert result["each"] == [no_ema[1]["val_frechet"], no_ema[3]["val_frechet"]]
    assert result["val_frechet"] == pytest.approx(sum(result["each"]) / 2)

    gan.main([*FAST, *SMALL, "--epochs", "2", "--out-dir", "plain"])  # the first is the plain run
    assert [{**r, "part": ""} for r in ours[:2]] == [{**r, "part": ""} for r in history("plain")]

    interrupt(6, [*command, "part"])  # in the second variant's first seed
    resumed = gan.main(["--resume", "part", "--device", "cpu"])
    assert history("part") == rows and numbers(resumed) == numbers(whole)
    parts = sorted(file.name for file in Path("whole").glob("*.pt"))
    assert len(parts) == 6 and all(same(load(f"part/{p}"), load(f"whole/{p}")) for p in parts)


def test_two_classes(two_classes):
    """A ten that is written somewhere, in a figure or a metric."""
    metrics = gan.main([*FAST, "--epochs", "1", "--out-dir", "two"])
    assert len(metrics["class_coverage"]) == 2
    assert len(list(Path("two").glob("*.png"))) == 5


@pytest.mark.skipif(GPU == "cpu", reason="this machine has no GPU")
def test_gpu(monkeypatch):
    """A tensor that stays on the CPU."""
    monkeypatch.setattr(common, "load_data", LOAD)
    monkeypatch.setattr(gan, "load_judge", JUDGE)  # it is trained there too
    metrics = gan.main(["--fast", "--data", "digits", "--device", GPU])
    assert metrics["device"] == GPU and math.isfinite(metrics["frechet"])


def test_recipes_and_explicit_flags():
    """The report's settings changed in passing; a recipe that overrides an explicit flag."""
    args = gan.parse_args(["--recipe", "report"])
    assert (args.noise_dim, args.lr, args.beta1, args.epochs) == (32, 2e-4, 0.5, 100)
    assert (args.init_std, args.batchnorm, args.spectral_norm, args.ema) == (0.02, False, False, 0)
    assert gan.parse_args(["--recipe", "report", "--lr", "0.5"]).lr == 0.5
    assert gan.parse_args(["--ablate", "--recipe", "report"]).epochs == 3
    for recipe, variants in gan.VARIANTS.items():
        flags = vars(gan.parse_args(["--recipe", recipe]))
        for change in list(variants.values())[1:]:
            assert all(flags[flag] != value for flag, value in change.items())  # it does change


@pytest.mark.parametrize("flags", [
    "--noise-dim 0", "--beta1 1", "--ema 1", "--ema nan", "--init-std -1", "--filters 8 8",
    "--folds 2", "--ablate --compare", "--resume nowhere", "--gan=", "--noise 3",
    "--gan somewhere", "--ablate --ema 0.5", "--compare --epochs 5",
    "--d-filters 8 8 8 8 8"])
def test_bad_flags_end_in_one_line(flags, fails):
    """A traceback, or a wrong value that trains first."""
    message = fails(2, gan.main, [*FAST, *flags.split()])
    assert flags.split()[0].strip("=") in message or "nowhere" in message
    assert os.listdir() == []  # nothing was started


def test_resume_refuses_other_flags(fast_run, fails):
    """A run resumed with another recipe is not the run that it says it is."""
    message = fails(2, gan.main, ["--resume", str(fast_run[1]), "--ema", "0.5"])
    assert "--ema is 0.999 in" in message
    message = fails(2, gan.main, ["--resume", str(fast_run[1]), "--judge", "another"])
    assert "--judge is None in" in message  # half of the epochs would have another unit
    assert "is a run of gan.py" in fails(2, vae.main, ["--resume", str(fast_run[1])])


def test_readme_commands_parse():
    """README commands that no longer run."""
    commands = readme_commands("gan.py")
    assert len(commands) > 4
    for command in commands:
        gan.parse_args(command)
