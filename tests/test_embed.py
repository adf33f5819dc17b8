"""embed.py: each test names the bug that it would catch."""

import json
import os
import shutil
from pathlib import Path

import ae
import common
import embed
import numpy as np
import pytest
import torch
import vae
from conftest import readme_commands

FAST = ["--fast", "--data", "digits"]


@pytest.fixture(scope="module")
def digits():
    return common.load_data(embed.parse_args(FAST))


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory):
    """(metrics, folder) of a --fast run in folder/maps; its encoders end up in folder/ae, /vae."""
    folder = tmp_path_factory.mktemp("fast")
    with pytest.MonkeyPatch.context() as m:  # their own tests draw them
        m.chdir(folder)
        m.setattr(ae, "draw_latent", lambda *args, **numbers: {})
        for name in ("draw_kernels", "draw_activations", "draw_reconstructions"):
            m.setattr(ae, name, lambda *args: None)
        for name in ("draw_traversals", "draw_kl", "draw_plane"):
            m.setattr(vae, name, lambda *args: None)
        metrics = embed.main([*FAST, "--out-dir", "maps"])
        for name in ("ae", "vae"):
            Path(metrics["methods"][name]["run"]).rename(name)
    return metrics, folder


@pytest.fixture
def known(fast_run):
    """The flags that take the encoders of that run."""
    return ["--data", "digits", "--ae", str(fast_run[1] / "ae"), "--vae", str(fast_run[1] / "vae")]


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(embed, "draw_maps", lambda *args: None)


def measured(metrics):
    """What the same maps must have in common: all numbers but the times."""
    return {name: {k: v for k, v in numbers.items() if k not in ("seconds", "run")}
            for name, numbers in metrics["methods"].items()}


# --------------------------------------------------------------------------- measures


def test_trustworthiness_of_known_maps():
    """A measure of another scale, or with the map's distances taken for the truth."""
    def trust(points):
        return embed.trustworthiness(line, points, n_neighbors=embed.NEIGHBOURS)
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
    assert embed.knn_accuracy(points, y) == (0.95, {1: 1.0, 3: 1.0, 7: 0.0})
    coin = rng.integers(0, 2, 2000)
    assert embed.knn_accuracy(rng.normal(size=(2000, 2)), coin)[0] == pytest.approx(0.5, abs=0.04)


# --------------------------------------------------------------------------- maps


@pytest.mark.parametrize("script", [ae, vae])
def test_encoders_are_evaluated(script, digits, fast_run):
    """Training mode (a map that depends on the batch), sampled codes, points lost or reordered."""
    x, folder = digits.x_test[:230], fast_run[1] / script.__name__
    z, numbers = embed.map_encoder(script, folder, x)
    model = script.load_run(folder).eval()
    with torch.no_grad():
        code = model.encoder(x)
    mu = code[0] if script is vae else code
    assert np.allclose(z, mu.numpy(), atol=1e-5)
    assert np.array_equal(z, embed.map_encoder(script, folder, x)[0])
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
    assert embed.knn_accuracy(points, y)[0] > 0.8  # by chance .1: the points are those of y
    assert embed.trustworthiness(embed.pixels(x), points) > 0.95


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
        embed.draw_names(ax, points, y, classes)
        return {text.get_text(): text.get_position() for text in ax.texts}
    medians = {"dress": (1, 1), "trouser": (100, 0), "top": (0.5, 50.5)}
    assert places(points, y) == medians
    # two more classes at the place of the dress: each name a line above the one before
    crowded = places(np.concatenate([points, *[points[:3]] * 2]), np.append(y, [4] * 3 + [5] * 3))
    assert medians.items() <= crowded.items()
    assert crowded["coat"] == pytest.approx((1, 5), abs=0.5)
    assert crowded["sandal"] == pytest.approx((1, 9), abs=0.5)


def test_images_lie_where_they_belong(digits, monkeypatch, tmp_path):
    """An image drawn at another's place; a map without its numbers."""
    drawn = []
    monkeypatch.setattr(embed.Figure, "savefig", lambda fig, *args, **kw: drawn.append(fig))
    x, y = digits.x_test[:100], digits.y_test[:100].numpy()
    points = np.random.default_rng(0).normal(size=(100, 2))
    numbers = {"knn_accuracy": 0.5, "trustworthiness": 0.75, "test_mse": 0.0123, "perplexity": 30}
    embed.draw_maps(tmp_path, "test", [("vae", points, numbers), ("tsne", points, numbers)],
                    x, y, digits)
    ax, tsne = drawn[0].axes
    boxes = [a for a in ax.get_children() if isinstance(a, embed.AnnotationBbox)]
    assert len(boxes) > 20
    for box in boxes:
        i = np.abs(points - box.xy).sum(1).argmin()
        assert np.array_equal(box.offsetbox.get_data(), x[i, 0].numpy())
        assert box.offsetbox.image.get_clim() == (0, 1)  # not each on a scale of its own
    assert sorted(text.get_text() for text in ax.texts) == sorted("0123456789")
    assert all(text in ax.get_title() for text in ("VAE", "0.500", "0.750", "0.0123"))
    assert "cannot place new images" in tsne.get_title()


# --------------------------------------------------------------------------- runs


def test_fast_run(fast_run):
    """A measure that is missing, a figure that is not drawn, methods mixed up."""
    metrics, folder = fast_run[0], fast_run[1] / "maps"
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert metrics["points"] == 300 and metrics["fast"] is True and metrics["data"] == "digits"
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
    again = embed.main(["--fast", *known])
    assert measured(again) == measured(fast_run[0])
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if line.startswith(("AE ", "VAE ", "PCA", "t-SNE,"))]
    assert [line.split()[-1] for line in table] == ["yes", "yes", "yes", "no"]
    assert f"{again['methods']['ae']['trustworthiness']:.3f}" in table[0]


def test_points_and_perplexities(known, no_figures):
    """More or other points than asked for; of several perplexities the wrong one in the table."""
    metrics = embed.main(["--fast", *known, "--points", "150", "--perplexity", "5", "30", "50"])
    assert metrics["points"] == 150
    assert [m["perplexity"] for m in metrics["perplexity"]] == [5, 30, 50]
    assert metrics["methods"]["tsne"] == metrics["perplexity"][1]


def test_which_run_is_taken(fast_run, no_figures, monkeypatch):
    """A full run taken for a smoke test's, a smoke test's for a full run, another latent size."""
    trained = []
    monkeypatch.setattr(embed, "map_tsne", lambda x, *rest: (embed.pixels(x)[:, 300:302], {
        "seconds": 0.0, "perplexity": 30}))
    for script in (ae, vae):
        monkeypatch.setattr(script, "main", lambda argv, name=script.__name__: trained.append(
            name) or {"folder": str(fast_run[1] / name)})

    def taken(*flags):
        trained.clear()
        embed.main(["--data", "digits", "--points", "100", *flags])
        return set(trained)
    for name, change in (("fast", {}), ("size", {"fast": False, "latent_dim": 3})):
        shutil.copytree(fast_run[1] / "ae", f"runs/{name}")
        metrics = json.loads(Path(f"runs/{name}/metrics.json").read_text())
        common.save_json(Path(f"runs/{name}/metrics.json"), {
            **metrics, "flags": {**metrics["flags"], **change}})
    assert taken() == {"ae", "vae"}
    common.save_json(Path("runs/fast/metrics.json"), {
        **metrics, "flags": {**metrics["flags"], "fast": False}})
    assert taken() == {"vae"} and taken("--fast") == {"ae", "vae"}
    assert taken("--vae", str(fast_run[1] / "vae")) == set()


def test_training_hands_its_flags_on(monkeypatch):
    """An encoder of other data, another seed or device; more parameters than were allowed."""
    for script, model in ((ae, ae.Autoencoder), (vae, vae.VAE)):
        calls = []
        monkeypatch.setattr(script, "main", lambda argv, calls=calls: calls.append(argv) or {
            "folder": "there"})
        args = embed.parse_args(["--data", "digits", "--data-dir", "a b", "--seed", "7"])
        assert embed.find_encoder(script, args) == "there"
        args.fast = True
        embed.find_encoder(script, args)
        full, fast = (script.parse_args(argv) for argv in calls)
        for flags in (full, fast):
            assert (flags.data, flags.data_dir, flags.seed, flags.latent_dim) == (
                "digits", "a b", 7, 2)
        assert full.out_dir is None  # runs/: the next command finds it there
        assert not full.fast and fast.fast and fast.epochs == 3
        net = model(2, full.hidden, full.filters, full.decoder_filters)
        assert sum(p.numel() for p in net.parameters()) <= 150_000


@pytest.mark.parametrize(("flags", "words"), [
    ("--points 361", "--points 361: there are 360 test images"),
    ("--points 89", "--perplexity 30"), ("--perplexity 5 200", "--perplexity 200"),
    ("--points 0", "--points"), ("--points 1.5", "--points"), ("--perplexity 0", "--perplexity"),
    ("--perplexity nan", "--perplexity"), ("--perplexity", "--perplexity"),
    ("--ae nowhere", "nowhere is not a finished training of ae.py"), ("--vae=", "--vae"),
    ("--vae AE", "is not a finished training of vae.py"), ("--seed -1", "--seed"),
    ("--resume there", "--resume"), ("--epochs 3", "--epochs")])
def test_bad_input_ends_in_one_line(flags, words, fast_run, fails):
    """A traceback, fewer points than asked for without a word, a warning of scikit-learn."""
    argv = flags.replace("AE", str(fast_run[1] / "ae")).split()
    message = fails(2, embed.main, ["--data", "digits", *argv])
    assert words in message
    assert os.listdir() == []  # nothing was started


def test_interrupted(known, no_figures, monkeypatch, fails):
    """Advice to resume where there is nothing to resume; a used folder that is written into."""
    def interrupt(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(embed, "map_tsne", interrupt)
        message = fails(130, embed.main, [*known, "--out-dir", "maps"])
        assert message.endswith("nothing to go on with: repeat the command")
    message = fails(2, embed.main, [*known, "--out-dir", "maps"])
    assert "maps is not empty" in message and "--resume" not in message


def test_readme_commands_parse():
    """README commands that no longer run."""
    commands = readme_commands("embed.py")
    assert len(commands) > 4
    for command in commands:
        embed.parse_args(command)
