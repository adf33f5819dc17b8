"""gan.py, what judges samples and --compare: each test names the bug that it would catch."""
# ruff: noqa: F811 (a fixture is imported, and then named as an argument)

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
from test_gan import FAST, digits, few, fewer, judge, networks, two_classes  # noqa: F401

# --------------------------------------------------------------------------- metrics


def test_frechet_distance_of_gaussians(capfd):
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
    assert math.isnan(gan.frechet_distance(a * math.nan, b))
    assert capfd.readouterr() == ("", "")  # LAPACK would print an error of its own


def test_frechet_distance_is_zero_for_equal_sets_and_grows_with_noise(digits, judge):
    """A metric that does not follow the eye; a judge with dropout on."""
    x = digits.x_train[:300]
    real, generator = finetune.encode(judge, x), torch.Generator().manual_seed(0)
    assert gan.frechet_distance(real, real) == pytest.approx(0, abs=1e-5)
    noise = torch.randn(x.shape, generator=generator)
    distances = [gan.frechet_distance(real, finetune.encode(judge, (x + s * noise).clamp(0, 1)))
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


def test_two_sample_of_known_sets():
    """A point that is its own neighbour (all right, always); real and fake, or pixels, mixed up."""
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1000, 8, generator=rng)
    assert gan.two_sample(a, b) == pytest.approx((0.5, 0.5), abs=0.06)  # one distribution
    assert gan.two_sample(a, b + 50) == (1, 1)  # disjoint sets
    assert gan.two_sample(a, a.clone()) == (0, 0)  # copies: the nearest is always the other set's
    # shrunk to the mean, as blurred images are, in many dimensions: all lie nearest to the mean
    a, b = torch.randn(2, 200, 100, generator=rng)
    real, fake = gan.two_sample(a, 0.5 * b)
    assert real < 0.1 and fake > 0.9 and gan.two_sample(0.5 * b, a) == (fake, real)
    # by hand: 0 and -5 have a real neighbour, 1 and 10 have 1.4; of the others only 1.4 has one
    line = torch.tensor([[0.0], [1.0], [10.0], [-5.0]])
    fake = torch.tensor([[1.4], [20.0], [21.0], [23.0]])
    assert gan.two_sample(line, fake) == (0.5, 0.75)
    assert gan.two_sample(line, torch.cat([fake, line])) == (0.5, 0.75)  # as many of each
    assert gan.two_sample(line, fake, n=2) == (0.5, 0.5)  # 0, 1, 1.4, 20


def test_judging_images(judge, digits):
    """A histogram of another axis; real images in the place of generated ones, or of features."""
    x = digits.x_train[:300]
    real = finetune.encode(judge, x)
    result = gan.judge_images(judge, x, x, real)
    assert result["class_coverage"] == pytest.approx(
        [(judge(x).argmax(1) == c).float().mean().item() for c in range(10)])
    assert (result["precision"], result["recall"]) == (1, 1)
    fake = 0.5 * x.mean(0) + 0.5 * digits.x_test
    result = gan.judge_images(judge, fake, x, real)
    assert result["frechet"] == pytest.approx(
        gan.frechet_distance(finetune.encode(judge, fake), real))
    assert (result["precision"], result["recall"]) == gan.precision_recall(
        real, finetune.encode(judge, fake))
    assert result["two_sample"] == gan.two_sample(real, finetune.encode(judge, fake))
    assert result["two_sample_pixels"] == gan.two_sample(x, fake) != result["two_sample"]


def test_nearest_finds_the_copy(digits):
    """A generator that copies would go unnoticed."""
    x, distance = gan.nearest(digits.x_train[[7, 3]] + 0.001, digits.x_train)
    assert torch.equal(x, digits.x_train[[7, 3]])
    assert distance.tolist() == pytest.approx([0.028, 0.028], abs=1e-3)  # sqrt(784) * 0.001


# --------------------------------------------------------------------------- comparison


def quick_main(script, calls):
    """A main that makes a finished run of an untrained network, and notes what it was asked for."""
    def main(argv):
        args = script.parse_args(argv)
        calls.append((script.__name__, args))
        run = common.Run(args, common.load_data(args))
        common.seed_everything(args.seed)
        net = script.build(args)
        return run.finish({}, [], net[0] if script is gan else net)
    return main


def test_compare(two_classes, monkeypatch, capsys):
    """One generator's run in the place of another's; what is missing is skipped, or made anew."""
    calls, compare = [], gan.main
    for script in (ae, vae, gan):
        monkeypatch.setattr(script, "main", quick_main(script, calls))
    judged, judge_images = [], gan.judge_images
    monkeypatch.setattr(gan, "judge_images", lambda *args: judged.append(
        judge_images(*args)) or judged[-1])
    result = compare([*FAST, "--compare", "--seed", "3", "--out-dir", "board"])
    assert [name for name, _ in calls] == ["ae", "vae", "gan", "gan"]
    assert [args.recipe for _, args in calls[2:]] == ["best", "report"]
    assert all((args.data, args.seed, args.fast, args.device) == ("digits", 3, True, "cpu")
               for _, args in calls)
    rows = result["generators"]
    assert len(rows) == 9 and os.path.exists("board/generators.png")
    for i, row in enumerate(rows.values()):  # means over three sets, not one of them
        for key in ("frechet", "two_sample", "class_coverage"):
            assert row[key] == pytest.approx(torch.tensor(
                [numbers[key] for numbers in judged[i:27:9]]).mean(0).tolist(), rel=1e-5)
    assert all(row["frechet_std"] > 0 for row in rows.values())
    for name in ("AE, Gaussian", "VAE, 50 Gaussians"):  # not one set of codes, three times
        assert rows[name]["frechet_std"] > 1e-8 * rows[name]["frechet"]
    assert len({row["frechet"] for row in rows.values()}) == 9
    assert min(rows, key=lambda name: rows[name]["frechet"]) == "training images"
    assert all(len(row["two_sample"]) == len(row["class_coverage"]) == 2 for row in rows.values())
    assert "GAN, ours" in capsys.readouterr().out

    # again: the same folders, and nothing is trained; but a run that is named goes before
    calls.clear()
    monkeypatch.setattr(common, "draw_rows", lambda *args: None)
    named = result["runs"]["gan_report"]
    again = compare([*FAST, "--compare", "--seed", "3", "--gan", named])
    assert calls == [] and again["runs"] == {**result["runs"], "gan": named}
    assert again["generators"] == {**rows, "GAN, ours": rows["GAN, report"]}


def test_one_judge_in_a_comparison(two_classes, monkeypatch):
    """A missing GAN whose best epoch another judge chose than the one that --judge names."""
    asked = []
    monkeypatch.setattr(common, "trained", lambda *args, **kwargs: asked.append(
        (kwargs.get("name") or args[0], list(kwargs.get("flags", ())))))
    monkeypatch.setattr(gan, "load_judge", lambda args, data: None)
    monkeypatch.setattr(gan.finetune, "encode", lambda judge, x: None)
    monkeypatch.setattr(gan, "sample_sets", lambda *args: ())
    monkeypatch.setattr(common, "draw_rows", lambda *args: None)
    monkeypatch.setattr(common.Run, "__init__", lambda *args: None)
    monkeypatch.setattr(common.Run, "finish", lambda *args: None)
    gan.compare(gan.parse_args([*FAST, "--compare", "--judge", "mine"]), two_classes)
    assert asked == [("ae", []), ("vae", []), ("gan", ["--judge", "mine"]),
                     ("gan-report", ["--recipe", "report", "--judge", "mine"])]


def test_what_generators_draw_from(two_classes):
    """A generator of another run, reconstructions of test images, codes that are not decoded."""
    for script, flags in ((ae, []), (vae, []), (gan, []), (gan, ["--recipe", "report"])):
        quick_main(script, [])([*FAST, *flags, "--out-dir", f"{script.__name__}{len(flags)}"])
    args = gan.parse_args([*FAST, "--compare"])
    first, drawn, _ = gan.sample_sets(
        {"ae": "ae0", "vae": "vae0", "gan": "gan0", "gan_report": "gan2"}, args, two_classes)
    netV, z = vae.load_run("vae0"), gan.noise(60, 18, 11)
    assert torch.equal(drawn["VAE, prior"], vae.decode(netV, z))
    for name, folder in (("GAN, ours", "gan0"), ("GAN, report", "gan2")):
        z = gan.noise(60, 32, 11)
        assert torch.equal(drawn[name], gan.sample(gan.load_run(folder), z))
    x = drawn["training images"]
    assert torch.equal(drawn["AE, reconstructions"], ae.reconstruct(ae.load_run("ae0"), x))
    assert torch.equal(drawn["VAE, reconstructions"], vae.reconstruct(netV, x))
    assert torch.equal(gan.nearest(x, two_classes.x_train)[0], x)
    assert not torch.equal(x, first["training images"])


def test_a_wrong_name_is_said_before_anything_is_trained(monkeypatch, fails):
    """An hour of training, and then: there is no such run."""
    def main(argv):
        raise AssertionError("it trains")
    compare = gan.main
    for script in (ae, vae, gan):
        monkeypatch.setattr(script, "main", main)
    for flag in ("--ae", "--vae", "--gan", "--gan-report"):
        assert "nowhere" in fails(2, compare, [*FAST, "--compare", flag, "nowhere"])


def test_the_judge_is_needed_for_the_training_only(two_classes, fails):
    """A generator that cannot be loaded since its judge was renamed; a judge of other data, or an
    unfinished one, that is refused only after hours."""
    Path("judge").mkdir()
    Path("judge/model.pt").touch()
    config = {"script": "finetune", "argv": [], "data": "fashion"}
    Path("judge/config.json").write_text(json.dumps(config))
    main = quick_main(gan, [])
    assert "other data" in fails(2, main, [*FAST, "--judge", "judge", "--out-dir", "run"])
    assert os.listdir() == ["judge"]
    Path("judge/config.json").write_text(json.dumps({**config, "data": "digits"}))
    main([*FAST, "--judge", "judge", "--out-dir", "run"])
    Path("judge/model.pt").unlink()
    assert "not finished" in fails(2, main, [*FAST, "--judge", "judge", "--out-dir", "b"])
    Path("judge").rename("elsewhere")
    assert isinstance(gan.load_run("run"), gan.Generator)
