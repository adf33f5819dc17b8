"""common.py: each test names the bug that it would catch."""

import gzip
import http.server
import json
import os
import pickle
import threading
import zipfile
from argparse import Namespace

import common
import numpy as np
import pytest
import torch


def data_args(data="digits", data_dir="data", fast=False):
    return Namespace(data=data, data_dir=str(data_dir), fast=fast, device="cpu")


def run_args(**changes):
    return Namespace(**{"script": "ae", "state": None, "command": "ae.py", "out_dir": None,
                        "resume": None, "program": "ae.py", "seed": 0, "device": "cpu",
                        "data": "digits", "fast": False, "epochs": 2, "latent_dim": 3, **changes})


@pytest.fixture(scope="module")
def digits():
    return common.load_data(data_args())


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
def test_fashion_is_read_plain_or_packed(fashion, packed):
    """Images and labels mixed up, or the four .gz files beside no extracted ones not found."""
    first = (fashion / "train-images-idx3-ubyte").read_bytes()[16:16 + 784]
    if packed:
        for path in list(fashion.iterdir()):
            (fashion / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.write_bytes(bytes(path.stat().st_size))  # all zero: torchvision accepts it
    args = data_args("fashion", "fashion", fast=True)
    data = common.load_data(args)
    assert (data.name, args.data, len(data.x_train)) == ("FashionMNIST", "fashion", 1000)
    assert np.array_equal((data.x_train[0] * 255).round().byte().flatten(),
                          np.frombuffer(first, np.uint8))
    assert data.y_train[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


@pytest.mark.parametrize("damage", ["zeroed", "truncated", "html", "swapped", "missing", "bad gz"])
def test_damaged_fashion_is_never_used(fashion, fails, capsys, damage):
    """torchvision only looks whether the files exist: all-zero images train without a word."""
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
            (fashion / f"{file.name}.gz").write_bytes(gzip.compress(content)[:-20])
    message = fails(2, common.load_data, data_args("fashion", "fashion", fast=True))
    assert "train-images-idx3-ubyte" in message and "--data digits" in message

    args = data_args("auto", "fashion", fast=True)
    data = common.load_data(args)
    assert (data.name, args.data) == ("digits", "digits")
    assert len(capsys.readouterr().out.splitlines()) == 1  # the fallback is said, in one line


def test_download_goes_on_to_the_second_mirror(fashion, tmp_path, monkeypatch, capsys):
    """torchvision knows one mirror; and a captive portal answers every address with a page."""
    served = {f"/good/{path.name}.gz": gzip.compress(path.read_bytes())
              for path in fashion.iterdir()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = served.get(self.path, b"<html>log in to this network</html>")
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(common, "MIRRORS", (f"{base}/portal/", f"{base}/good/"))
        new = common.load_data(data_args("fashion", tmp_path / "new"))
        damaged = fashion / "train-images-idx3-ubyte"
        damaged.write_bytes(b"damaged")
        repaired = common.load_data(data_args("fashion", tmp_path / "fashion"))
        server.shutdown()
    assert torch.equal(new.x_train, repaired.x_train) and len(new.x_test) == 400
    names = sorted(p.name for p in (tmp_path / "new" / "FashionMNIST" / "raw").iterdir())
    assert names == sorted(common.SHA256)  # no temporary file stays behind


def test_no_network(fashion, fails, monkeypatch, capsys):
    """--data fashion falls back silently; --data auto dies where there is no network."""
    monkeypatch.setattr(common, "MIRRORS", ("http://127.0.0.1:9/",))
    message = fails(2, common.load_data, data_args("fashion", "new"))
    assert "could not be downloaded" in message
    assert common.load_data(data_args("auto", "new")).name == "digits"
    assert "using scikit-learn's" in capsys.readouterr().out


@pytest.mark.parametrize("folds", [1, 5])
def test_splits_are_disjoint_stratified_and_seeded(digits, folds):
    """Validation images that are trained on, a class missing from a fold, a split that --seed
    does not move."""
    y = digits.y_train
    parts = common.splits(y, folds, seed=0)
    assert len(parts) == folds
    for train, val in parts:
        assert not set(train.tolist()) & set(val.tolist())
        assert len(train) + len(val) == len(y) and len(val) == pytest.approx(len(y) / 5, abs=1)
        assert (y[val].bincount() / len(val) - y.bincount() / len(y)).abs().max() < 0.01
    if folds > 1:
        assert torch.cat([val for _, val in parts]).unique().numel() == len(y)
    again, other = common.splits(y, folds, seed=0), common.splits(y, folds, seed=1)
    assert torch.equal(again[0][1], parts[0][1]) and not torch.equal(other[0][1], parts[0][1])


def test_batches_cover_everything_once():
    """drop_last loses samples; an order that the generator does not decide."""
    def draw(seed):
        return torch.cat(list(common.batches(103, 10, torch.Generator().manual_seed(seed))))
    assert draw(0).sort().values.equal(torch.arange(103))
    assert draw(0).equal(draw(0)) and not draw(0).equal(draw(1))


def test_augment_changes_each_image_by_its_own_draw(digits):
    """transforms.v2 draws one parameter per call: the whole batch would get the same flip."""
    x = digits.x_train[:200]
    generator = common.seed_everything(0)
    flipped = common.augment(x, "flip", generator)
    as_is = (flipped == x).flatten(1).all(1)
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    assert (as_is | mirrored).all() and 60 < as_is.sum() < 140
    one = x[:1].expand(50, -1, -1, -1)
    rotated = common.augment(one, "report", generator)
    assert rotated.shape == one.shape and 0 <= rotated.min() and rotated.max() <= 1
    assert len(rotated.unique(dim=0)) == 50  # fifty angles
    upright, upside_down = ((rotated - other).abs().flatten(1).mean(1) for other in (
        one, one.flip(2)))
    assert torch.minimum(upright, upside_down).max() < 0.2  # small ones
    assert 15 < (upright < upside_down).sum() < 35  # half of them upside down
    assert rotated.sum((1, 2, 3)).std() / rotated.sum((1, 2, 3)).mean() < 0.02  # nothing stretched
    shifted = common.augment(one, "shift", generator)[:, 0, 4:-4, 4:-4]  # outside comes black
    places = [(flip, down, right) for flip in (0, 1) for down in range(2, 7)
              for right in range(2, 7)]
    crops = torch.stack([(x[0, 0].flip(1) if flip else x[0, 0])[down:down + 20, right:right + 20]
                         for flip, down, right in places])
    found = {((crops - s).abs().amax((1, 2)) < 1e-4).nonzero().item() for s in shifted}
    assert len(found) > 20  # of these fifty, each by chance
    light = torch.ones(200, 1, 28, 28)
    holes = common.augment(light, "erase", generator)[:, :, 3:-3, 3:-3] == 0  # no shift gets there
    assert holes.flatten(1).any(1).sum() > 100 and len(holes.unique(dim=0)) > 100
    for side in (holes.any(2), holes.any(3)):
        assert 4 < side.sum(-1).float().mean() < 6 and side.sum(-1).max() <= 12
    assert common.augment(x, "none", generator) is x


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


# --------------------------------------------------------------------------- run folder


class Model(torch.nn.Linear):
    """The smallest thing that Run can save."""

    def __init__(self):
        super().__init__(2, 1)


def train(args, data, losses, fold=0):
    """A run whose weights in epoch e are e and whose validation losses are given."""
    model = Model()
    with common.Run(args, data, select="val_loss") as run:
        for epoch, _ in run.epochs(fold, (0,), model=model):
            torch.nn.init.constant_(model.weight, epoch)
            run.end_epoch(train_loss=1.0, val_loss=losses[epoch - 1], seconds=0.1)
        run.finish({"latent_dim": args.latent_dim, "test_mse": 0.5})
    return run


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """A crash during torch.save destroys the only checkpoint."""
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")
    with pytest.raises(RuntimeError), common.atomic(path) as f:
        f.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_best_weights_are_not_the_last(digits):
    """state_dict() holds references: "best" weights kept without a copy go on training."""
    run = train(run_args(epochs=3), digits, [0.3, 0.1, 0.2])
    assert run.best[0]["epoch"] == 2 and run.best[0]["val_loss"] == 0.1
    assert run.best[0]["model"]["weight"].unique().tolist() == [2.0]


def test_no_two_epochs_draw_the_same(digits):
    """The same batches in every epoch, which a test of resuming cannot see."""
    run = common.Run(run_args(epochs=3), digits, "val_loss")
    seeds = [generator.initial_seed() for fold in (0, 1)
             for _, generator in run.epochs(fold, (0, fold), model=Model())]
    assert len(set(seeds)) == 6


def test_the_run_folder(digits, capsys):
    """Lost numbers: not strict JSON, no line for an epoch, no versions, another last line."""
    run = train(run_args(), digits, [0.3, 0.1])
    assert capsys.readouterr().out.splitlines()[-1] == str(run.folder)
    config = json.loads((run.folder / "config.json").read_text())
    metrics = json.loads((run.folder / "metrics.json").read_text())
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert config.items() <= metrics.items()
    assert config["versions"]["torch"] == torch.__version__ and config["flags"]["latent_dim"] == 3
    assert [row["val_loss"] for row in log] == [0.3, 0.1]
    with pytest.raises(ValueError):
        common.save_json(run.folder / "bad.json", {"loss": float("nan")})


def test_a_run_never_destroys_another(digits, fails, monkeypatch):
    """Two runs in the same second share a folder; --out-dir writes over an old run."""
    monkeypatch.setattr(common.time, "strftime", lambda form: "runs/ae-now")
    folders = {str(common.Run(run_args(), digits, "val_loss").folder) for _ in range(3)}
    assert folders == {"runs/ae-now", "runs/ae-now-2", "runs/ae-now-3"}
    os.mkdir("füll me")
    assert str(common.Run(run_args(out_dir="füll me"), digits, "val_loss").folder) == "füll me"
    assert "not empty" in fails(2, common.Run, run_args(out_dir="füll me"), digits, "val_loss")
    open("file", "w").close()
    assert "cannot create" in fails(2, common.Run, run_args(out_dir="file/x"), digits, "val_loss")


def test_a_full_disk_keeps_the_last_checkpoint(digits, fails, monkeypatch):
    """A run that loses its checkpoint, or ends in a traceback, when the disk is full."""
    def full(descriptor):
        raise OSError(28, "No space left on device")
    model, run = Model(), common.Run(run_args(epochs=3), digits, "val_loss")

    def work():
        with run:
            for epoch, _ in run.epochs(0, (0,), model=model):
                if epoch == 2:
                    monkeypatch.setattr(common.os, "fsync", full)
                run.end_epoch(train_loss=1.0, val_loss=1.0, seconds=0.1)
    message = fails(1, work)
    assert "No space left" in message and f"--resume {run.folder}" in message
    assert common.load_checkpoint(run.folder / "checkpoint.pt", "ae")["epoch"] == 1


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("damage", ["missing", "truncated", "bit flip", "text", "poisoned",
                                    "pickle", "foreign", "list", "incomplete"])
def test_bad_checkpoints_are_refused(digits, fails, damage):
    """A damaged checkpoint loads silently; an untrusted one runs code; a wrong path starts anew."""
    path = train(run_args(), digits, [0.3, 0.1]).folder / "checkpoint.pt"
    content, script = bytearray(path.read_bytes()), "ae"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "bit flip":  # in the first number of a tensor: only the CRC can tell
        with zipfile.ZipFile(path) as archive:
            start = next(e for e in archive.infolist() if "/data/" in e.filename).header_offset
        start += 30 + int.from_bytes(content[start + 26:start + 28], "little") + int.from_bytes(
            content[start + 28:start + 30], "little")  # a local header: 30 bytes, name, extra
        content[start] ^= 1
        path.write_bytes(content)
    elif damage == "text":
        path.write_text("hello")
    elif damage == "poisoned":
        torch.save({"config": Evil()}, path)
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif damage == "foreign":
        script = "vae"
    else:
        torch.save([1, 2] if damage == "list" else {"config": {"script": "ae"}, "fold": "0"}, path)
    message = fails(2, common.load_checkpoint, path, script)
    assert str(path) in message and not os.path.exists("executed")


def test_find_run(digits, fails, capsys):
    """A --fast run, one on other data or of another size, or an unfinished one is taken."""
    good = train(run_args(out_dir="runs/good"), digits, [0.3, 0.1])
    train(run_args(out_dir="runs/fast", fast=True), digits, [0.3, 0.1])
    train(run_args(out_dir="runs/size", latent_dim=4), digits, [0.3, 0.1])
    train(run_args(out_dir="runs/data", data="fashion"), digits, [0.3, 0.1])
    common.Run(run_args(out_dir="runs/unfinished"), digits, "val_loss")
    capsys.readouterr()
    assert common.find_run("ae", "digits", latent_dim=3) == good.folder
    assert "runs/good" in capsys.readouterr().out
    # a flag is meant, not the number of the same name that came out
    common.save_json(good.folder / "metrics.json", {
        **json.loads((good.folder / "metrics.json").read_text()), "latent_dim": 2.5})
    assert common.find_run("ae", "digits", latent_dim=3) == good.folder
    capsys.readouterr()
    assert common.find_run("vae", "digits") is None and capsys.readouterr().out == ""
    assert common.find_run("ae", "digits", "runs/fast", latent_dim=3).name == "fast"
    message = fails(2, common.find_run, "ae", "digits", "runs/size", latent_dim=3)
    assert "runs/size is not a finished training of ae.py with data digits, latent_dim 3" in message


def test_runs_of_another_version_are_refused(fails):
    """A KeyError where a flag or a number is not in the files of an old run."""
    for error in (KeyError("hidden"), ValueError("max()"), IndexError("3"), TypeError("None")):
        def read(error=error):
            with common.reading("runs/old"):
                raise error
        assert "runs/old is damaged or of another version" in fails(2, read)


@pytest.mark.parametrize("error, status, said", [
    (RuntimeError("[enforce fail] can't allocate memory: you tried"), 1, "--batch-size"),
    (MemoryError(), 1, "--batch-size"), (KeyboardInterrupt(), 130, "repeat")])
def test_what_ends_a_run_is_one_line(digits, fails, error, status, said):
    """Forty lines of traceback for a network that is too large."""
    def work():
        with common.Run(run_args(), digits, "val_loss"):
            raise error
    assert said in fails(status, work)


def test_a_closed_standard_output(fails):
    """`python ae.py | head -1` ends in a traceback."""
    def broken():
        raise BrokenPipeError(32, "Broken pipe")
    assert "Broken pipe" in fails(1, common.start, broken)


def test_the_loss_that_is_not_finite_is_named():
    """Training goes on with nan, and the next checkpoint holds nothing else."""
    assert common.finite(torch.tensor(2.0), 7) == 2.0
    for value in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match="step 7"):
            common.finite(torch.tensor(value), 7)


# --------------------------------------------------------------------------- plotting


def test_images_keep_their_brightness(digits):
    """make_grid(normalize=True) rescales each grid by its own extremes and hides low contrast."""
    dim = digits.x_test[:2] * 0.2
    axes = common.Figure().subplots(2)
    common.show_images(axes[0], dim, columns=2)
    common.show_images(axes[1], torch.cat([dim, torch.ones(2, 1, 28, 28)]), columns=4)
    pictures = [ax.images[0] for ax in axes]
    assert [p.get_clim() for p in pictures] == [(0, 1), (0, 1)]
    assert np.array_equal(pictures[0].get_array()[1:29, 1:29], pictures[1].get_array()[1:29, 1:29])
