"""common.py, data and plotting: each test names the bug that it would catch."""

import http.server
import os
import signal
import threading
from argparse import Namespace
from pathlib import Path

import common
import numpy as np
import pytest
import torch
from conftest import pack


def data_args(data="digits", data_dir="data", fast=False):
    return Namespace(data=data, data_dir=str(data_dir), fast=fast, device="cpu")


# --------------------------------------------------------------------------- data


def test_digits_are_what_the_losses_assume(digits):
    """Pixels outside [0, 1], integer images, or labels that do not belong to the images."""
    assert digits.x_train.shape == (1437, 1, 28, 28) and digits.x_test.shape == (360, 1, 28, 28)
    assert digits.x_train.dtype == torch.float32 and digits.y_train.dtype == torch.int64
    assert digits.x_train.min() == 0 and 0.9 < digits.x_train.max() <= 1
    assert digits.y_test.bincount().tolist() == pytest.approx([36] * 10, abs=2)
    means = torch.stack([digits.x_train[digits.y_train == c].mean(0) for c in range(10)])
    nearest = (digits.x_test - means[:, 0]).square().sum((2, 3)).argmin(1)
    assert (nearest == digits.y_test).float().mean() > 0.8


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_is_read_plain_or_packed(fashion, monkeypatch, packed):
    """Images and labels mixed up; a second download of what lies packed beside missing files."""
    first = (fashion / "train-images-idx3-ubyte").read_bytes()[16:16 + 784]
    monkeypatch.setattr(common.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    if packed:
        for file in list(fashion.iterdir()):
            (fashion / f"{file.name}.gz").write_bytes(pack(file.read_bytes()))
            file.unlink()
    args = data_args("fashion", "fashion")
    data = common.load_data(args)
    assert (data.name, args.data, len(data.x_train), len(data.x_test)) == (
        "FashionMNIST", "fashion", 1200, 400)
    assert np.array_equal((data.x_train[0] * 255).round().byte().flatten(),
                          np.frombuffer(first, np.uint8))
    assert 0 == data.x_train.min() and data.x_train.max() == 1
    assert data.y_train[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    few = common.load_data(data_args("fashion", "fashion", fast=True))
    assert len(few.x_train) == len(few.y_train) == 1000 and len(few.x_test) == 300


@pytest.mark.parametrize("damage", ["zeroed", "truncated", "html", "swapped", "missing", "bad gz",
                                    "folder"])
@pytest.mark.parametrize("fast", [True, False])
def test_damaged_fashion_is_never_used(fashion, fails, capsys, monkeypatch, damage, fast):
    """torchvision only looks whether the files exist: all-zero images train without a word."""
    monkeypatch.setattr(common.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    file, other = fashion / "train-images-idx3-ubyte", fashion / "t10k-images-idx3-ubyte"
    content = file.read_bytes()
    if damage == "zeroed":
        file.write_bytes(bytes(len(content)))
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "html":
        file.write_text("<html>log in to this network</html>")
    elif damage == "swapped":
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        file.unlink()
        if damage == "bad gz":
            (fashion / f"{file.name}.gz").write_bytes(pack(content)[:-20])
        elif damage == "folder":
            file.mkdir()
    message = fails(2, common.load_data, data_args("fashion", "fashion", fast))
    assert "no whole FashionMNIST in fashion" in message and "--data digits" in message

    args = data_args("auto", "fashion", fast)
    data = common.load_data(args)
    assert (data.name, args.data) == ("digits", "digits")
    assert len(capsys.readouterr().out.splitlines()) == 1  # the fallback is said, in one line


def test_no_memory_is_no_reason_for_other_data(fashion, monkeypatch):
    """Out of memory while the files are read: a run on the digits, without a word of the reason."""
    def full(*args):
        raise MemoryError
    monkeypatch.setattr(common.FashionMNIST, "_load_data", full)
    with pytest.raises(MemoryError):
        common.load_data(data_args("auto", "fashion"))


def test_an_old_cache_of_torchvision_is_not_used(fashion):
    """torchvision prefers processed/*.pt of its early versions, whatever they hold."""
    folder = fashion.parent / "processed"
    folder.mkdir()
    for name, n in (("training.pt", 1200), ("test.pt", 400)):
        torch.save((torch.zeros(n, 28, 28).byte(), torch.zeros(n).long()), folder / name)
    for fast in (True, False):
        data = common.load_data(data_args("fashion", "fashion", fast))
        assert data.x_train.max() == 1 and data.y_test.max() == 9


@pytest.fixture
def mirrors(fashion, monkeypatch):
    """Two mirrors: a captive portal that answers every address with a page, and a good one."""
    served = {f"/good/{file.name}.gz": pack(file.read_bytes()) for file in fashion.iterdir()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            body = served.get(self.path, b"<html>log in to this network</html>")
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            return body

        def do_GET(self):
            self.wfile.write(self.do_HEAD())

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        mirrors = [f"{base}/portal/", f"{base}/good/"]
        monkeypatch.setattr(common.FashionMNIST, "mirrors", mirrors)
        yield mirrors
        server.shutdown()


def test_download_goes_on_to_the_second_mirror(mirrors, monkeypatch):
    """torchvision knows one mirror, and that may be out of reach."""
    monkeypatch.setattr(common.FashionMNIST, "mirrors", ["http://127.0.0.1:9/", mirrors[1]])
    data = common.load_data(data_args("fashion", "new"))
    assert (len(data.x_train), len(data.x_test)) == (1200, 400)
    assert torch.equal(data.x_train, common.load_data(data_args("fashion", "fashion")).x_train)


def test_a_damaged_file_is_kept_until_a_whole_one_is_there(mirrors, fashion, monkeypatch):
    """A file that the user put there is lost; the page of a captive portal takes its place."""
    whole = common.load_data(data_args("fashion", "fashion"))
    file = fashion / "train-images-idx3-ubyte"
    file.write_bytes(b"damaged")
    monkeypatch.setattr(common.FashionMNIST, "mirrors", mirrors[:1])
    assert common.load_data(data_args("auto", "fashion")).name == "digits"
    assert not file.exists() and Path(f"{file}.damaged").read_bytes() == b"damaged"
    monkeypatch.setattr(common.FashionMNIST, "mirrors", mirrors[1:])
    repaired = common.load_data(data_args("fashion", "fashion"))
    assert torch.equal(whole.x_train, repaired.x_train)
    assert Path(f"{file}.damaged").read_bytes() == b"damaged"


def test_no_network(fashion, fails, monkeypatch, capsys):
    """--data fashion falls back silently; --data auto dies where there is no network."""
    monkeypatch.setattr(common.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    message = fails(2, common.load_data, data_args("fashion", "new"))
    assert "no whole FashionMNIST in new" in message and "127.0.0.1:9" in message
    assert common.load_data(data_args("auto", "new")).name == "digits"
    assert "using scikit-learn's" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(fashion, fails):
    """A named pipe in place of a file is opened, and nobody ever writes to it."""
    class Hung(BaseException):
        """No reader of files catches it."""

    def hung(*args):
        raise Hung
    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(5)
    try:
        file = fashion / "t10k-labels-idx1-ubyte"
        file.unlink()
        os.mkfifo(file)
        fails(2, common.load_data, data_args("fashion", "fashion", fast=True))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("folds", [1, 5])
def test_splits_are_disjoint_stratified_and_seeded(digits, folds):
    """Validation images that are trained on, a class missing from a fold, a split that --seed
    does not move."""
    y = digits.y_train
    parts = common.splits(y, folds, seed=0)
    assert len(parts) == folds
    for train, val in parts.values():
        assert not set(train.tolist()) & set(val.tolist())
        assert len(train) + len(val) == len(y) and len(val) == pytest.approx(len(y) / 5, abs=1)
        assert (y[val].bincount() / len(val) - y.bincount() / len(y)).abs().max() < 0.01
    if folds > 1:
        assert torch.cat([val for _, val in parts.values()]).unique().numel() == len(y)
    again, other = common.splits(y, folds, seed=0), common.splits(y, folds, seed=1)
    name = next(iter(parts))
    assert torch.equal(again[name][1], parts[name][1])
    assert not torch.equal(other[name][1], parts[name][1])


def test_splits_of_unusual_classes():
    """A class with a single image, or two classes, ends in a traceback: other data has them."""
    y = torch.tensor([0, 1] * 20 + [2])
    train, val = common.split(y, seed=0)
    assert torch.cat([train, val]).sort().values.equal(torch.arange(41)) and len(val) == 9
    for folds in (1, 4):
        for train, val in common.splits(y[:40], folds, seed=0).values():
            assert len(train) + len(val) == 40 and y[val].bincount().tolist() == [len(val) // 2] * 2


def test_batches_cover_everything_once():
    """drop_last loses samples; an order that the generator does not decide."""
    def draw(seed):
        rng = torch.Generator().manual_seed(seed)
        return torch.cat(list(common.batches(torch.zeros(103), 10, rng)))
    assert draw(0).sort().values.equal(torch.arange(103))
    assert draw(0).equal(draw(0)) and not draw(0).equal(draw(1))


def test_augment_changes_each_image_by_its_own_draw(digits):
    """transforms.v2 draws one parameter per call: the whole batch would get the same flip."""
    x = digits.x_train[:200]
    rng = common.seed_everything(0)
    flipped = common.augment(x, "flip", rng)
    as_is = (flipped == x).flatten(1).all(1)
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    assert (as_is | mirrored).all() and 60 < as_is.sum() < 140
    one = x[:1].expand(50, -1, -1, -1)
    rotated = common.augment(one, "report", rng)
    assert rotated.shape == one.shape and 0 <= rotated.min() and rotated.max() <= 1
    assert len(rotated.unique(dim=0)) == 50  # fifty angles
    upright, upside_down = ((rotated - other).abs().flatten(1).mean(1) for other in (
        one, one.flip(2)))
    assert torch.minimum(upright, upside_down).max() < 0.2  # small ones
    assert 15 < (upright < upside_down).sum() < 35  # half of them upside down
    assert rotated.sum((1, 2, 3)).std() / rotated.sum((1, 2, 3)).mean() < 0.02  # nothing stretched
    shifted = common.augment(one, "shift", rng)[:, 0, 4:-4, 4:-4]  # outside comes black
    places = [(flip, down, right) for flip in (0, 1) for down in range(2, 7)
              for right in range(2, 7)]
    crops = torch.stack([(x[0, 0].flip(1) if flip else x[0, 0])[down:down + 20, right:right + 20]
                         for flip, down, right in places])
    found = {((crops - s).abs().amax((1, 2)) < 1e-4).nonzero().item() for s in shifted}
    assert len(found) > 20  # of these fifty, each by chance
    light = torch.ones(200, 1, 28, 28)
    holes = common.augment(light, "erase", rng)[:, :, 3:-3, 3:-3] == 0  # no shift gets there
    assert holes.flatten(1).any(1).sum() > 100 and len(holes.unique(dim=0)) > 100
    for side in (holes.any(2), holes.any(3)):
        assert 4 < side.sum(-1).float().mean() < 6 and side.sum(-1).max() <= 12
    assert common.augment(x, "none", rng) is x


def test_seeds_follow_from_all_their_numbers():
    """Epochs or folds that repeat the same batches."""
    first = {seed: common.seed_everything(*seed).initial_seed()
             for seed in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2), (0, 0)]}
    assert len(set(first.values())) == 5
    common.seed_everything(3)
    a = torch.rand(3)
    common.seed_everything(3)
    assert torch.rand(3).equal(a)


def test_pca_is_the_best_linear_map(digits):
    """Against the singular values: what k components leave out is the sum of the other squares."""
    x = digits.x_train[:900]
    recon = common.pca_reconstruct(x, x, 10)
    flat = x.flatten(1).double()
    rest = torch.linalg.svdvals(flat - flat.mean(0))[10:].square().sum() / flat.numel()
    assert (recon - x).square().mean().item() == pytest.approx(rest.item(), rel=1e-4)
    assert recon.shape == x.shape
    few = x[:5]  # fewer images than components: nothing is left out of them
    assert torch.allclose(common.pca_reconstruct(few, few, 10), few, atol=1e-5)


# --------------------------------------------------------------------------- plotting


class Figures(dict):
    """In place of a Run: keeps what would be written."""

    def save(self, fig, name, caption):
        self[name] = fig


def test_images_keep_their_brightness(digits):
    """make_grid(normalize=True) rescales each grid by its own extremes and hides low contrast."""
    dim = digits.x_test[:2] * 0.2
    axes = common.Figure().subplots(2)
    common.show_images(axes[0], dim, columns=2)
    common.show_images(axes[1], torch.cat([dim, torch.ones(2, 1, 28, 28)]), columns=4)
    pictures = [ax.images[0] for ax in axes]
    assert [p.get_clim() for p in pictures] == [(0, 1), (0, 1)]
    assert np.array_equal(pictures[0].get_array()[1:29, 1:29], pictures[1].get_array()[1:29, 1:29])


def test_scatter_draws_every_point_in_its_colour():
    """Points and labels shuffled apart, so that the map is right and its colours are not."""
    rng = np.random.default_rng(0)
    points, y = rng.normal(size=(300, 2)), rng.integers(0, 12, 300)
    ax = common.Figure().subplots()
    common.scatter(ax, points, y, [f"class {c}" for c in range(12)])
    drawn = ax.collections[0]
    order = [np.flatnonzero((points == place).all(1)).item() for place in drawn.get_offsets()]
    assert sorted(order) == list(range(300)) and order != list(range(300))
    colors = np.array([common.matplotlib.colors.to_rgb(c) for c in common.COLORS])
    assert np.allclose(drawn.get_facecolors()[:, :3], colors[y[order] % 10])
    handles, labels = ax.get_legend_handles_labels()
    assert labels == [f"class {c}" for c in range(12)]
    assert np.allclose([h.get_facecolors()[0, :3] for h in handles], colors[np.arange(12) % 10])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of PCA
def test_codes_that_are_all_alike_have_a_map(digits):
    """t-SNE that starts from a PCA of nothing crashes Python, after the training."""
    figures = Figures()
    figures.args = Namespace(seed=0)
    common.draw_latent(figures, torch.ones(360, 3), digits, [0, 1], numbers=(4, 5, 6))
    assert set(figures) == {"fig04_latent", "fig05_pca", "fig06_tsne"}


def test_reconstructions_are_of_the_images_that_they_are_called(digits):
    """Names under the columns that belong to other images; a class that the test set lacks."""
    y = torch.tensor([3, 11, 0, 3, 7, 5, 11])
    x = (y / 20).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    data = digits._replace(x_test=x, y_test=y, classes=tuple("abcdefghijkl"))
    figures = Figures()
    common.draw_reconstructions(figures, "fig", data, {"original": x, "half": x / 2})
    axes = figures["fig"].axes
    names = [label.get_text() for label in axes[-1].get_xticklabels()]
    assert names == ["a", "d", "f", "h", "l"]
    for ax, scale in zip(axes, (1, 0.5), strict=True):
        middle = ax.images[0].get_array()[15, axes[-1].get_xticks().astype(int)]
        assert middle.tolist() == pytest.approx([scale * c / 20 for c in (0, 3, 5, 7, 11)])


def test_ablation_puts_the_best_on_top_and_marks_the_band():
    """Dots of another variant, the worst on top, or the band of another one than the first."""
    figures = Figures()
    common.draw_ablation(figures, {"plain": [2.0, 4.0], "bad": [9.0, 7.0], "good": [1.0, 1.5]},
                         "MSE", "title")
    ax, = figures["ablation"].axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["bad", "plain", "good"]
    dots = [c.get_offsets().tolist() for c in ax.collections]
    assert dots == [[[9, 0], [7, 0]], [[2, 1], [4, 1]], [[1, 2], [1.5, 2]]]
    assert [line.get_xdata()[0] for line in ax.lines[:3]] == [8, 3, 1.25]
    band, = ax.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == (2, 4)
    assert ax.get_legend_handles_labels()[1] == ["seeds of plain"]


def test_numbers_over_folds():
    """The mean of other numbers, a spread of one fold, or the folds' own ones lost."""
    assert common.over_folds([{"a": 1.0, "b": 5.0}]) == {"a": 1.0, "b": 5.0}
    two = common.over_folds([{"a": 1.0, "b": 5.0}, {"a": 3.0, "b": 5.0}])
    assert two == {"a": 2.0, "a_std": 2 ** 0.5, "fold_a": [1.0, 3.0],
                   "b": 5.0, "b_std": 0.0, "fold_b": [5.0, 5.0]}


def test_curves_are_the_rows():
    """A curve of another key, or shifted by an epoch."""
    rows, figures = [{"epoch": e, "a": e / 2, "b": e ** 2, "c": 0.0} for e in (1, 2, 3)], Figures()
    common.plot_curves(figures, "fig", rows, {"loss": ("a", "b"), "rate": ("c",)}, "title", "")
    curves = {line.get_label(): line.get_xydata().tolist()
              for ax in figures["fig"].axes for line in ax.lines}
    assert curves == {key: [[row["epoch"], row[key]] for row in rows] for key in "abc"}
    assert [ax.get_ylabel() for ax in figures["fig"].axes] == ["loss", "rate"]
