"""embed.py: each test names the bug that it would catch."""

import json
import os
from argparse import Namespace
from pathlib import Path

import ae
import common
import embed
import numpy as np
import pytest
import torch
import vae
from conftest import numbers as numbers_of
from conftest import readme_commands

FAST = ["--fast", "--data", "digits", "--device", "cpu"]
GPU = common.pick_device("auto")
LOAD = common.load_data


@pytest.fixture(scope="module")
def digits():
    return common.load_data(embed.parse_args(FAST))


@pytest.fixture(scope="module")
def fewer(digits):
    """300 training and 200 test images."""
    return digits._replace(x_train=digits.x_train[:300], y_train=digits.y_train[:300],
                           x_test=digits.x_test[:200], y_test=digits.y_test[:200])


@pytest.fixture(autouse=True)
def few(monkeypatch, fewer):
    """What main() loads."""
    monkeypatch.setattr(common, "load_data", lambda args: fewer)


def skip_figures(patch):
    """The figures of ae.py and vae.py: their own tests draw them."""
    for script, names in ((ae, "draw_kernels draw_activations"), (
            vae, "draw_traversals draw_kl draw_samples draw_plane"), (
            common, "draw_reconstructions plot_curves draw_latent")):
        for name in names.split():
            patch.setattr(script, name, lambda *args, **more: None)


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory, fewer):
    """(metrics, folder) of a --fast run in folder/maps, which trained folder/ae and folder/vae."""
    folder = tmp_path_factory.mktemp("fast")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(common, "load_data", lambda args: fewer)
        skip_figures(patch)
        metrics = embed.main([*FAST, "--out-dir", "maps"])
        for name in ("ae", "vae"):
            Path(metrics["methods"][name]["run"]).rename(name)
    return metrics, folder


@pytest.fixture
def known(fast_run):
    """The flags that take the encoders of that run."""
    return [*FAST, "--ae", str(fast_run[1] / "ae"), "--vae", str(fast_run[1] / "vae")]


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(embed, "draw_maps", lambda *args, **more: None)


def measured(metrics):
    """What the same maps must have in common: all numbers but the times."""
    return {name: {k: v for k, v in m.items() if k != "run"}
            for name, m in numbers_of(metrics["methods"]).items()}


# --------------------------------------------------------------------------- measures


def test_trustworthiness_of_known_maps():
    """A measure of another scale, or with the map's distances taken for the truth."""
    def trust(points):
        return embed.trustworthiness(line, points, n_neighbors=5)
    line = np.array([[2.0 ** i, 0] for i in range(16)])  # i has i-1, ..., 0, i+1, ..., 15 around it
    assert trust(line) == trust(line[:, ::-1] * 9 - 4) == 1
    # now 1 to 5 have 15 near, truly the last of all: 10 too far each. 0 has 10 to 14 around it,
    # truly 5 to 9 too far, and 15 has 1 to 5, likewise: 35 each. 50 + 70 = 120
    assert trust(line[[15, *range(1, 15), 0]]) == pytest.approx(
        1 - 2 * 120 / (16 * 5 * (32 - 15 - 1)))


def test_knn_accuracy_of_known_maps():
    """A point that votes for itself, classes mixed up, accuracy averaged over the classes."""
    rng = np.random.default_rng(0)
    order = rng.permutation(40)
    # thirty points of class 3 here; there eight of class 1, outvoting two of class 7 among them
    points = np.concatenate([rng.normal(size=(30, 2)), 100 + rng.normal(size=(10, 2))])[order]
    y = np.array([3] * 30 + [1] * 8 + [7] * 2)[order]
    assert common.knn_accuracy(points, y) == (0.95, {1: 1.0, 3: 1.0, 7: 0.0})
    coin = rng.integers(0, 2, 2000)
    assert common.knn_accuracy(rng.normal(size=(2000, 2)), coin)[0] == pytest.approx(0.5, abs=0.04)


# --------------------------------------------------------------------------- maps


@pytest.mark.parametrize("script", [ae, vae])
def test_encoders_are_evaluated(script, digits, fast_run):
    """Training mode (a map that depends on the batch), sampled codes, points lost or reordered."""
    x, folder = digits.x_test[:230], fast_run[1] / script.__name__
    z, numbers = embed.map_encoder(script, str(folder), x)
    model = script.load_run(folder).eval()
    with torch.no_grad():
        code = model.encoder(x)
    mu = code[0] if script is vae else code
    assert np.allclose(z, mu.numpy(), atol=1e-5)
    assert np.array_equal(z, embed.map_encoder(script, str(folder), x)[0])
    recon_x = script.reconstruct(model, x)
    assert numbers["test_mse"] == pytest.approx((recon_x - x).square().mean().item(), rel=1e-5)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert numbers["seconds"] > sum(row["seconds"] for row in log) > 0


def test_pca_learns_from_training_images_only(digits):
    """Components of the mapped points themselves; an error that is not that of two components."""
    x_train, x = digits.x_train[:300], digits.x_test[:100]
    points, numbers = embed.map_pca(x_train, x)
    flat = x_train.flatten(1).double()
    _, _, v = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    truth = ((x.flatten(1).double() - flat.mean(0)) @ v[:2].T).numpy()
    assert np.allclose(np.abs(points), np.abs(truth), atol=1e-4)  # the sign is free
    assert np.allclose(points[-7:], embed.map_pca(x_train, x[-7:])[0])
    recon_x = common.pca_reconstruct(x_train, x, 2)
    assert numbers["test_mse"] == pytest.approx(ae.mse(recon_x, x).item(), rel=1e-5)


def test_tsne_is_seeded_and_keeps_the_order(digits):
    """A map that differs from run to run; a perplexity that is parsed and then not used."""
    x, y = digits.x_test[:200], digits.y_test[:200].numpy()
    points, numbers = embed.map_tsne(x, 10, seed=0)
    assert points.shape == (200, 2) and numbers["perplexity"] == 10
    assert np.array_equal(points, embed.map_tsne(x, 10, seed=0)[0])
    assert not np.allclose(points, embed.map_tsne(x, 40, seed=0)[0])
    assert common.knn_accuracy(points, y)[0] > 0.8  # by chance .1: the points are those of y
    assert embed.trustworthiness(common.pixels(x), points) > 0.95


# --------------------------------------------------------------------------- figures


def test_images_are_spread_over_the_map():
    """Images on top of each other, or a region without one; axes of different lengths."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(500, 2)) * [1, 1000]
    chosen = embed.spread(points, gap=0.1)
    unit = points / (points.max(0) - points.min(0))
    distance = np.abs(unit[:, None] - unit[chosen]).max(2)  # (500, chosen)
    among = distance[chosen] + np.eye(len(chosen))
    assert among.min() > 0.1 and distance.min(1).max() <= 0.1


def test_names_lie_at_the_medians():
    """Names at means, which outliers move, on top of each other, or of another class."""
    points = np.array([[0, 0], [1, 1], [2, 2], [100, 0], [100, 0], [0, 100], [1, 1]], dtype=float)
    y, classes = np.array([3, 3, 3, 1, 1, 0, 0]), ("top", "trouser", "-", "dress", "coat", "sandal")

    def places(points, y):
        ax = embed.Figure().subplots()
        ax.set(xlim=(0, 100), ylim=(0, 100))
        embed.draw_names(ax, points, y, classes)
        return {text.get_text(): text.get_position() for text in ax.texts}
    medians = {"dress": (1, 1), "trouser": (100, 0), "top": (0.5, 50.5)}
    assert places(points, y) == medians
    # two more classes at the place of the dress: each name a line above the one before
    crowded = places(np.concatenate([points, *[points[:3]] * 2]), np.append(y, [4] * 3 + [5] * 3))
    assert medians.items() <= crowded.items()
    assert crowded["coat"] == pytest.approx((1, 5), abs=0.5)
    assert crowded["sandal"] == pytest.approx((1, 9), abs=0.5)


def test_images_lie_where_they_belong(digits):
    """An image drawn at another's place; a map without its numbers, or squeezed by an outlier."""
    drawn = []
    x, y = digits.x_test, digits.y_test.numpy()
    points = np.random.default_rng(0).normal(size=(300, 2))
    points[7] *= 1000  # it would squeeze all others
    numbers = {"knn_accuracy": 0.5, "trustworthiness": 0.75, "test_mse": 0.0123, "perplexity": 30}
    run = Namespace(save=lambda fig, *rest: drawn.append(fig))
    embed.draw_maps(run, "test", [("vae", points, numbers), ("tsne", points, numbers)], x, y,
                    digits, columns=2)
    ax, tsne = drawn[0].axes
    low, high = np.quantile(points, [0.005, 0.995], axis=0)  # what few points lie outside of
    for axis, limits in enumerate((ax.get_xlim(), ax.get_ylim())):
        assert -10 < limits[0] < low[axis] < high[axis] < limits[1] < 10
    boxes = [a for a in ax.get_children() if isinstance(a, embed.AnnotationBbox)]
    assert len(boxes) > 20
    for box in boxes:
        i = np.abs(points - box.xy).sum(1).argmin()
        assert np.array_equal(box.offsetbox.get_data(), x[i, 0].numpy())
        assert box.offsetbox.image.get_clim() == (0, 1)  # not each on a scale of its own
    assert sorted(text.get_text() for text in ax.texts) == sorted("0123456789")
    assert all(text in ax.get_title() for text in ("VAE", "0.500", "0.750", "0.0123"))
    assert "perplexity 30" in tsne.get_title() and "MSE" not in tsne.get_title()


# --------------------------------------------------------------------------- runs


def test_fast_run(fast_run):
    """A measure that is missing, a figure that is not drawn, methods mixed up."""
    metrics, folder = fast_run[0], fast_run[1] / "maps"
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert metrics["points"] == 200 and metrics["fast"] is True and metrics["data"] == "digits"
    methods = metrics["methods"]
    assert list(methods) == ["ae", "vae", "pca", "tsne"]
    for name, m in methods.items():
        assert 0.1 < m["knn_accuracy"] <= 1 and 0.5 < m["trustworthiness"] <= 1
        assert m["seconds"] > 0 and len(m["class_accuracy"]) == 10
        assert m["places_new_points"] == ("test_mse" in m) == (name != "tsne")
    assert max(methods, key=lambda name: methods[name]["knn_accuracy"]) == "tsne"
    assert {f.name for f in folder.glob("*.png")} == {
        "fig26_ae.png", "fig27_vae.png", "fig28_pca.png", "fig29_tsne.png", "maps.png"}


def test_same_seed_same_maps(fast_run, known, no_figures, capsys):
    """Any draw that the seed does not set; --ae and --vae not used; a table without a method."""
    again = embed.main(known)
    assert measured(again) == measured(fast_run[0])
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if line.startswith(("AE ", "VAE ", "PCA", "t-SNE,"))]
    assert [line.split()[-1] for line in table] == ["yes", "yes", "yes", "no"]
    assert f"{again['methods']['ae']['trustworthiness']:.4g}" in table[0]


def test_points_and_perplexities(known, no_figures):
    """More or other points than asked for; of several perplexities the wrong one in the table."""
    metrics = embed.main([*known, "--points", "100", "--perplexity", "5", "30", "20"])
    assert metrics["points"] == 100
    assert [m["perplexity"] for m in metrics["perplexity"]] == [5, 30, 20]
    assert metrics["methods"]["tsne"] == metrics["perplexity"][1]


def test_find_encoder(monkeypatch):
    """An encoder of other data, another seed or device; more parameters than were allowed; one
    trained again for each map, or though another was named."""
    for script in (ae, vae):
        calls = []

        def quick_main(argv, script=script, calls=calls):
            args = script.parse_args(argv)
            calls.append(args)
            return common.Run(args, common.load_data(args)).finish({}, [], script.build(args))
        monkeypatch.setattr(script, "main", quick_main)
        args = embed.parse_args([*FAST, "--data-dir", "a b", "--seed", "7"])
        folders = [embed.find_encoder(script, args) for _ in range(2)]
        args.fast = False
        folders.append(embed.find_encoder(script, args))
        assert folders[0] == folders[1] != folders[2] and all(map(os.path.isdir, folders))
        fast, full = calls
        for flags in calls:
            assert (flags.data, flags.data_dir, flags.seed, flags.latent_dim, flags.device) == (
                "digits", "a b", 7, 2, "cpu")
        assert not full.fast and fast.fast and fast.epochs == 3 < full.epochs
        assert sum(p.numel() for p in script.build(full).parameters()) <= 150_000
        setattr(args, script.__name__, "named")
        assert embed.find_encoder(script, args) == "named" and len(calls) == 2


def test_two_classes(fewer, monkeypatch):
    """A ten that is written somewhere, in a figure or a measure; here, in ae.py or in vae.py."""
    parity = common.Data("parity", ("even", "odd"), fewer.x_train[:100], fewer.y_train[:100] % 2,
                         fewer.x_test[:60], fewer.y_test[:60] % 2)
    drawn = []
    monkeypatch.setattr(common, "load_data", lambda args: parity)
    monkeypatch.setattr(common.Run, "save", lambda run, fig, name, caption: drawn.append(name))
    methods = embed.main([*FAST, "--perplexity", "10"])["methods"]
    assert all(m["class_accuracy"].keys() == {"even", "odd"} for m in methods.values())
    assert {"fig26_ae", "fig27_vae", "fig28_pca", "fig29_tsne", "maps"} <= {*drawn}
    assert "fig03_loss" in drawn and "latent_plane" in drawn  # of ae.py, of vae.py


@pytest.mark.skipif(GPU == "cpu", reason="this machine has no GPU")
def test_gpu(monkeypatch):
    """A tensor that stays on the CPU."""
    monkeypatch.setattr(common, "load_data", LOAD)
    metrics = embed.main(["--fast", "--data", "digits", "--device", GPU])
    assert metrics["device"] == GPU and len(metrics["methods"]) == 4


@pytest.mark.parametrize(("flags", "words"), [
    ("--points 201", "--points 201: there are 200 test images"),
    ("--points 89", "--perplexity 30"), ("--perplexity 5 200", "--perplexity 200"),
    ("--points 0", "--points"), ("--points 1.5", "--points"), ("--perplexity 0", "--perplexity"),
    ("--perplexity nan", "--perplexity"), ("--perplexity", "--perplexity"),
    ("--ae nowhere", "nowhere is no folder of a run"), ("--vae=", "--vae"),
    ("--vae AE", "is a run of ae.py, not of vae.py"), ("--seed -1", "--seed"),
    ("--resume there", "there is no folder of a run"), ("--epochs 3", "--epochs")])
def test_bad_input_ends_in_one_line(flags, words, fast_run, fails):
    """A traceback, fewer points than asked for without a word, a warning of scikit-learn."""
    argv = flags.replace("AE", str(fast_run[1] / "ae")).split()
    assert words in fails(2, embed.main, [*FAST, *argv])
    assert os.listdir() == []  # nothing was started


def test_an_encoder_of_another_size(fails, digits):
    """Two of many dimensions drawn as if they were all."""
    args = ae.parse_args([*FAST, "--latent-dim", "3", "--out-dir", "three"])
    common.Run(args, digits).finish({}, [], ae.build(args))
    Path("three/log.jsonl").touch()
    message = fails(2, embed.main, [*FAST, "--ae", "three"])
    assert "three has more than two latent dimensions" in message


def test_interrupted(known, fast_run, no_figures, monkeypatch, fails):
    """Advice that does not work; a resumed run with other maps; a folder that is written into."""
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr("sys.argv", ["embed.py", *known, "--out-dir", "a b"])
    with monkeypatch.context() as patch:
        patch.setattr(embed, "map_tsne", interrupt)
        message = fails(130, common.start, embed.main)
    assert message.endswith("interrupted; go on with: python embed.py --resume 'a b'")
    message = fails(2, embed.main, [*known, "--out-dir", "a b"])
    assert "'a b' is not empty" in message
    assert measured(embed.main(["--resume", "a b"])) == measured(fast_run[0])


def test_readme_commands_parse():
    """README commands that no longer run."""
    commands = readme_commands("embed.py")
    assert len(commands) > 4
    for command in commands:
        embed.parse_args(command)
