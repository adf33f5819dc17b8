"""common.py: each test names the bug that it would catch."""

import http.server
import io
import json
import os
import pickle
import shlex
import signal
import sys
import threading
import zipfile
from argparse import Namespace
from pathlib import Path

import common
import numpy as np
import pytest
import torch
from conftest import history, numbers, pack


def data_args(data="digits", data_dir="data", fast=False):
    return Namespace(data=data, data_dir=str(data_dir), fast=fast, device="cpu")


@pytest.fixture(scope="module")
def digits():
    return common.load_data(data_args())


@pytest.fixture(autouse=True)
def read_once(digits, monkeypatch):
    """The digits are not unpacked again for each of the small runs below."""
    monkeypatch.setattr(common, "read_digits", lambda: digits)


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
    monkeypatch.setattr(common, "MIRRORS", ("http://127.0.0.1:9/",))
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
    monkeypatch.setattr(common, "MIRRORS", ("http://127.0.0.1:9/",))
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
    assert "train-images-idx3-ubyte" in message and "--data digits" in message

    args = data_args("auto", "fashion", fast)
    data = common.load_data(args)
    assert (data.name, args.data) == ("digits", "digits")
    assert len(capsys.readouterr().out.splitlines()) == 1  # the fallback is said, in one line


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
        monkeypatch.setattr(common, "MIRRORS", (f"{base}/portal/", f"{base}/good/"))
        yield common.MIRRORS
        server.shutdown()


def test_download_goes_on_to_the_second_mirror(mirrors):
    """torchvision knows one mirror; and a captive portal answers every address with a page."""
    data = common.load_data(data_args("fashion", "new"))
    assert (len(data.x_train), len(data.x_test)) == (1200, 400)
    assert torch.equal(data.x_train, common.load_data(data_args("fashion", "fashion")).x_train)


def test_a_damaged_file_is_kept_until_a_whole_one_is_there(mirrors, fashion, monkeypatch):
    """A file that the user put there is lost; the page of a captive portal takes its place."""
    whole = common.load_data(data_args("fashion", "fashion"))
    file = fashion / "train-images-idx3-ubyte"
    file.write_bytes(b"damaged")
    monkeypatch.setattr(common, "MIRRORS", mirrors[:1])
    assert common.load_data(data_args("auto", "fashion")).name == "digits"
    assert not file.exists() and Path(f"{file}.damaged").read_bytes() == b"damaged"
    monkeypatch.setattr(common, "MIRRORS", mirrors)
    repaired = common.load_data(data_args("fashion", "fashion"))
    assert torch.equal(whole.x_train, repaired.x_train)
    assert Path(f"{file}.damaged").read_bytes() == b"damaged"


def test_no_network(fashion, fails, monkeypatch, capsys):
    """--data fashion falls back silently; --data auto dies where there is no network."""
    monkeypatch.setattr(common, "MIRRORS", ("http://127.0.0.1:9/",))
    message = fails(2, common.load_data, data_args("fashion", "new"))
    assert "could not be downloaded" in message
    assert common.load_data(data_args("auto", "new")).name == "digits"
    assert "using scikit-learn's" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["fashion/FashionMNIST/raw/t10k-labels-idx1-ubyte",
                                  "run/config.json"])
def test_a_pipe_is_not_waited_for(fashion, fails, name):
    """A named pipe in place of a file is opened, and nobody ever writes to it."""
    def hung(*args):
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(5)
    try:
        os.mkdir("run")
        Path(name).unlink(missing_ok=True)
        os.mkfifo(name)
        if "fashion" in name:
            message = fails(2, common.load_data, data_args("fashion", "fashion", fast=True))
        else:
            message = fails(2, common.read_config, "run", "ae")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert name.split("/")[-1] in message


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


def test_splits_of_unusual_classes():
    """A class with a single image, or two classes, ends in a traceback: other data has them."""
    y = torch.tensor([0, 1] * 20 + [2])
    train, val = common.splits(y, 1, seed=0)[0]
    assert torch.cat([train, val]).sort().values.equal(torch.arange(41)) and len(val) == 9
    for folds in (1, 4):
        for train, val in common.splits(y[:40], folds, seed=0):
            assert len(train) + len(val) == 40 and y[val].bincount().tolist() == [len(val) // 2] * 2


def test_batches_cover_everything_once():
    """drop_last loses samples; an order that the generator does not decide."""
    def draw(seed):
        return torch.cat(list(common.batches(103, 10, torch.Generator().manual_seed(seed))))
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


# --------------------------------------------------------------------------- flags

RECIPES = {"best": {}, "report": {"latent_dim": 5, "lr": 0.5}}
MODES = {"tune": common.Mode(own=("price", "storage"), takes=("epochs",), defaults={"epochs": 4}),
         "ablate": common.Mode(takes=("latent_dim",))}


def parse_args(argv):
    """The flags of a small script; it calls itself ae, whose source is there."""
    parser = common.Parser("A script for tests.")
    parser.add_argument("--latent-dim", type=common.number(int, 2, 10), default=3)
    parser.add_argument("--title", default="plain")
    parser.add_argument("--tune", type=common.number(int, 1, 100))
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--price", type=common.number(float, 0, 1), default=0.5)
    parser.add_argument("--storage")
    common.add_training_flags(parser, RECIPES, epochs=3, batch_size=64, lr=0.1, augment="none")
    common.add_run_flags(parser)
    return common.parse(parser, "ae", argv, RECIPES, {"epochs": 1}, MODES, redraw=("title",))


CPU = ["--device", "cpu", "--data", "digits"]


def test_which_default_wins():
    """A recipe, a mode or --fast that overrides what was asked for explicitly."""
    for words, flag, value in (
            ("", "latent_dim", 3), ("--recipe report", "latent_dim", 5),
            ("--recipe report --latent-dim 3", "latent_dim", 3), ("--tune 1", "epochs", 4),
            ("--tune 1 --fast", "epochs", 1), ("--tune 1 --fast --epochs 3", "epochs", 3)):
        assert getattr(parse_args([*CPU, *words.split()]), flag) == value, words


@pytest.mark.parametrize("words, said", [
    ("--price 0.1", "--price goes only with --tune"),
    ("--ablate --price 0.1", "--price goes only with --tune"),
    ("--tune 2 --latent-dim 7", "--latent-dim does not go with --tune"),
    ("--tune 2 --recipe report", "--recipe does not go with --tune"),
    ("--tune 2 --ablate", "--ablate does not go with --tune"),
    ("--ablate --epochs 2", "--epochs does not go with --ablate"),
    ("--tune 2 --price 0.1 --storage s --epochs 5 --seed 3 --fast", None),
    ("--ablate --latent-dim 4 --data-dir d", None)])
def test_modes_refuse_what_they_would_ignore(fails, words, said):
    """A flag that does nothing in this mode is taken without a word; one that does is refused."""
    argv = [*CPU, *words.split()]
    if said:
        assert said in fails(2, parse_args, argv)
    else:
        assert parse_args(argv).argv == argv


# --------------------------------------------------------------------------- the run's folder


def build(args):
    """The smallest network that a flag changes."""
    return torch.nn.Linear(args.latent_dim, 1)


def main(argv, losses, parts=("fold 1",)):
    """A script: in each epoch its weights grow by the loss; an exception in losses is raised."""
    losses, args = iter(losses), parse_args(argv)
    run = common.Run(args, common.load_data(args), columns=("val_loss",))
    for part in parts:
        model = build(args)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        for _ in range(run.resume(part, model=model), args.epochs + 1):
            loss = next(losses)
            if isinstance(loss, BaseException):
                raise loss
            with torch.no_grad():
                model.weight += loss
            run.end_epoch(loss, train_loss=1.0, val_loss=loss)
        run.load_best(model)
    return run.finish({"latent_dim": args.latent_dim, "best": run.best["score"]},
                      ["the best < of all"], model)


def interrupted(folder, *losses):
    """A run of three epochs that ends before its time."""
    with pytest.raises(KeyboardInterrupt):
        main([*CPU, "--out-dir", folder], [*losses, KeyboardInterrupt()])


def edit(file, **changes):
    """Other values in a JSON file."""
    file = Path(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """A crash during torch.save destroys the only checkpoint."""
    file = tmp_path / "fold-1.pt"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), common.atomic(file) as f:
        f.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError):
        common.save_json(file, {"loss": float("nan")})  # strict JSON has no nan
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_file_that_is_open_elsewhere_is_waited_for(tmp_path, monkeypatch):
    """On Windows a virus scanner that reads the checkpoint ends the training."""
    replace, calls = os.replace, []

    def busy(*names):
        calls.append(names)
        if len(calls) < 3:
            raise PermissionError(13, "Access is denied")
        replace(*names)
    monkeypatch.setattr(common.os, "replace", busy)
    monkeypatch.setattr(common.time, "sleep", lambda seconds: None)
    common.save_json(tmp_path / "metrics.json", [1])
    assert json.loads((tmp_path / "metrics.json").read_text()) == [1] and len(calls) == 3
    monkeypatch.setattr(common.os, "replace", lambda *names: calls.clear() or busy(*names))
    with pytest.raises(PermissionError):
        common.save_json(tmp_path / "metrics.json", [2])
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_the_best_weights_are_not_the_last():
    """state_dict() holds references: "best" weights kept without a copy go on training."""
    main([*CPU, "--out-dir", "run"], [0.3, 0.1, 0.2])
    model = common.load_run("run", "ae", parse_args, build)
    assert model.weight.unique().tolist() == [pytest.approx(0.4)]  # 0.3 + 0.1
    kept = build(parse_args(CPU))
    best = common.load_checkpoint(Path("run/fold-1.pt"), {"model": kept})["best"]
    assert (best["epoch"], best["score"]) == (2, 0.1)
    assert kept.weight.unique().tolist() == [pytest.approx(0.6)]  # where resuming would go on


def test_resumed_equals_uninterrupted(capsys):
    """A part is repeated or left out, or weights, history or the best epoch are lost."""
    losses, parts = [0.3, 0.1, 0.2, 0.5, 0.7, 0.6], ("fold 1", "fold 2")
    whole = main([*CPU, "--out-dir", "whole"], losses, parts)
    with pytest.raises(KeyboardInterrupt):
        main([*CPU, "--out-dir", "a b"], [*losses[:4], KeyboardInterrupt()], parts)
    assert not os.path.exists("a b/metrics.json") and len(history("a b")) == 4
    capsys.readouterr()
    resumed = main(["--resume", "a b"], losses[4:], parts)
    assert capsys.readouterr().err == ""
    again = main(["--resume", "a b"], [], parts)  # a finished one trains nothing
    assert numbers(whole) == numbers(resumed) == numbers(again)
    assert history("whole") == history("a b") and len(history("a b")) == 6
    models = [common.load_run(folder, "ae", parse_args, build) for folder in ("whole", "a b")]
    assert torch.equal(*(model.weight for model in models))
    assert models[0].weight[0, 0].item() == pytest.approx(0.5)  # of the last part, its first epoch


def test_a_run_without_a_checkpoint_is_resumed_from_its_start():
    """A circle: "repeat the command", the folder is not empty, there is no checkpoint."""
    interrupted("run")
    assert main(["--resume", "run"], [0.3, 0.1, 0.2])["best"] == 0.1


def test_the_run_folder(capsys):
    """Lost numbers: not strict JSON, no line for an epoch, no versions, another last line."""
    metrics = main([*CPU, "--out-dir", "run"], [0.3, 0.1, 0.2])
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "run" and "the best < of all" in out and len(
        [line for line in out if line.startswith("fold 1")]) == 3
    config = json.loads(Path("run/config.json").read_text())
    assert metrics == json.loads(Path("run/metrics.json").read_text())
    assert config.items() <= metrics.items()
    assert config["versions"]["torch"] == torch.__version__ and config["flags"]["latent_dim"] == 3
    assert config["argv"] == [*CPU, "--out-dir", "run"] == shlex.split(config["command"])[2:]
    assert (metrics["epochs"], metrics["fast"], metrics["data"]) == (3, False, "digits")
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [(row["part"], row["epoch"], row["val_loss"]) for row in log] == [
        ("fold 1", 1, 0.3), ("fold 1", 2, 0.1), ("fold 1", 3, 0.2)]
    assert all(row["seconds"] > 0 for row in log)


def test_index_html_shows_every_figure(digits):
    """A figure or its caption is missing, a "<" breaks the page, or it asks the network."""
    run = common.Run(parse_args([*CPU, "--out-dir", "run"]), digits)
    for name, caption in (("fig10_b", "Is a < b?"), ("fig02_a", "What & why?")):
        run.save(common.Figure(figsize=(1, 1)), name, caption)
    run.finish({}, ["1 < 2"])
    page = Path("run/index.html").read_text(encoding="utf-8")
    places = [page.index(text) for text in (
        "1 &lt; 2", "What &amp; why?", 'src="fig02_a.png"', "Is a &lt; b?", 'src="fig10_b.png"')]
    assert places == sorted(places)
    assert "http" not in page and "<script" not in page and "<link" not in page
    assert Path("run/fig02_a.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_never_destroys_another(digits, fails, monkeypatch):
    """Two runs in the same second share a folder; --out-dir writes over an old run."""
    monkeypatch.setattr(common.time, "strftime", lambda form: "runs/ae-now")
    folders = {str(common.Run(parse_args(CPU), digits).folder) for _ in range(3)}
    assert folders == {str(Path("runs", name)) for name in ("ae-now", "ae-now-2", "ae-now-3")}
    os.mkdir("füll me")
    args = parse_args([*CPU, "--out-dir", "füll me"])
    assert str(common.Run(args, digits).folder) == "füll me"
    message = fails(2, common.Run, args, digits)
    assert "not empty" in message and "--resume 'füll me'" in message
    open("file", "w").close()
    message = fails(2, common.Run, parse_args([*CPU, "--out-dir", "file/x"]), digits)
    assert "cannot write to file/x" in message


def test_a_full_disk_keeps_the_last_checkpoint(fails, monkeypatch):
    """A run that loses its checkpoint, or ends in a traceback, when the disk is full."""
    def full(descriptor):
        raise OSError(28, "No space left on device")

    def losses():
        yield 0.5
        monkeypatch.setattr(common.os, "fsync", full)
        yield 0.4
    monkeypatch.setattr(common.Run, "go_on", "")  # what a run sets is undone after this test
    monkeypatch.setattr(sys, "argv", ["../my scripts/ae.py", *CPU, "--out-dir", "a b"])
    message = fails(1, common.start, lambda: main(None, losses()))
    assert "No space left" in message
    assert message.endswith("python '../my scripts/ae.py' --resume 'a b'")
    assert sorted(os.listdir("a b")) == ["config.json", "fold-1.pt", "log.jsonl"]
    rows = common.load_checkpoint(Path("a b/fold-1.pt"), {})["rows"]
    assert [row["val_loss"] for row in rows] == [0.5]


def test_a_loss_that_is_not_finite_ends_the_training(fails):
    """Training goes on with nan, and the next checkpoint holds nothing else."""
    for name, bad in (("nan", float("nan")), ("inf", float("inf"))):
        with pytest.raises(FloatingPointError, match=f"val_loss is {name} after epoch 2"):
            main([*CPU, "--out-dir", name], [0.5, bad])
        model = build(parse_args(CPU))
        rows = common.load_checkpoint(Path(name, "fold-1.pt"), {"model": model})["rows"]
        assert len(rows) == len(history(name)) == 1 and model.weight.isfinite().all()
    message = fails(1, common.start, lambda: main([*CPU], [float("nan")]))
    assert "val_loss is nan after epoch 1" in message and "--lr" in message


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("damage", ["missing", "truncated", "bit flip", "text", "poisoned",
                                    "pickle", "foreign", "list", "incomplete"])
def test_bad_checkpoints_are_refused(fails, damage):
    """A damaged checkpoint loads silently; an untrusted one runs code; a wrong one is taken."""
    interrupted("run", 0.3, 0.1)
    file, model = Path("run/fold-1.pt"), build(parse_args(CPU))
    content, state = bytearray(file.read_bytes()), torch.load(file, weights_only=True)
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-100])
    elif damage == "bit flip":  # in the first number of a tensor: only the CRC can tell
        with zipfile.ZipFile(file) as archive:
            start = next(e for e in archive.infolist() if "/data/" in e.filename).header_offset
        start += 30 + int.from_bytes(content[start + 26:start + 28], "little") + int.from_bytes(
            content[start + 28:start + 30], "little")  # a local header: 30 bytes, name, extra
        content[start] ^= 1
        file.write_bytes(content)
    elif damage == "text":
        file.write_text("hello")
    elif damage == "poisoned":
        torch.save({**state, "rows": Evil()}, file)
    elif damage == "pickle":
        file.write_bytes(pickle.dumps(Evil()))
    elif damage == "foreign":
        model = torch.nn.Conv2d(1, 1, 3)
    elif damage == "list":
        torch.save([1, 2], file)
    else:
        torch.save({"things": state["things"]}, file)
    message = fails(2, common.load_checkpoint, file, {"model": model})
    assert str(file) in message and not os.path.exists("executed")
    if damage not in ("missing", "foreign"):
        assert message == fails(2, main, ["--resume", "run"], [])


@pytest.mark.parametrize("damage", ["no folder", "no file", "foreign", "text", "binary", "list",
                                    "nested", "no words", "numbers"])
def test_what_is_no_run_is_refused(fails, damage):
    """A wrong folder, or what is left of one, starts a new training or ends in a traceback."""
    file = Path("run/config.json")
    content = {"no folder": None, "no file": None, "foreign": b'{"script": "vae", "argv": []}',
               "text": b"hello", "binary": b"\xff\xfe", "list": b"[1, 2]",
               "nested": b"[" * 100_000, "no words": b'{"script": "ae"}',
               "numbers": b'{"script": "ae", "argv": [1]}'}[damage]
    if damage != "no folder":
        file.parent.mkdir()
    if content:
        file.write_bytes(content)
    said = {"no folder": "no config.json", "no file": "no config.json",
            "foreign": "a run of vae.py, not of ae.py"}.get(damage, "damaged or of another version")
    for function, *args in ((common.read_config, "run", "ae"), (main, ["--resume", "run"], []),
                            (common.load_run, "run", "ae", parse_args, build)):
        message = fails(2, function, *args)
        assert said in message and "run" in message


def test_load_run(fails, capsys):
    """Weights of an unfinished run; a flag out of range from the file; another code, no word."""
    interrupted("part", 0.3)
    assert "not finished" in fails(2, common.load_run, "part", "ae", parse_args, build)
    main([*CPU, "--out-dir", "run", "--recipe", "report"], [0.3, 0.1, 0.2])
    capsys.readouterr()
    assert common.load_run("run", "ae", parse_args, build).in_features == 5
    assert capsys.readouterr().err == ""
    edit("run/config.json", source="123456")
    common.load_run("run", "ae", parse_args, build)
    assert capsys.readouterr().err == "warning: ae.py has changed since it made run\n"
    edit("run/config.json", source=common.digest("ae"), argv=[*CPU, "--latent-dim", "7"])
    assert "model.pt is damaged" in fails(2, common.load_run, "run", "ae", parse_args, build)
    edit("run/config.json", argv=[*CPU, "--latent-dim", "11"])
    message = fails(2, common.load_run, "run", "ae", parse_args, build)
    assert "11 is not between 2 and 10" in message


@pytest.mark.parametrize("words, said", [
    ("--latent-dim 7", "--latent-dim is 3 in run"), ("--epochs 4", "--epochs is 3 in run"),
    ("--recipe report", "is 3 in run"), ("--seed 1", "--seed is 0 in run"),
    ("--fast", "is 3 in run"), ("--data fashion", "--data is digits in run"),
    ("--tune 4", "is None in run"), ("--out-dir b", "--resume goes on in its own folder"),
    ("--latent-dim 3 --device cpu --data-dir elsewhere --title another", None)])
def test_resume_refuses_what_would_change_the_training(fails, words, said):
    """A run resumed with another model or rate is not the run that it says it is."""
    interrupted("run", 0.3, 0.1)
    before, argv = Path("run/config.json").read_text(), ["--resume", "run", *words.split()]
    if said:
        assert said in fails(2, main, argv, [0.2])
        assert len(history("run")) == 2
    else:
        args = parse_args(argv)
        assert (args.title, args.data_dir, args.epochs) == ("another", "elsewhere", 3)
        assert main(argv, [0.2])["latent_dim"] == 3
    assert Path("run/config.json").read_text() == before


def test_what_config_json_says_is_checked_anew(fails, fashion):
    """An edited file starts what no flag could: a size out of range, a database elsewhere."""
    interrupted("run", 0.3, 0.1)
    edit("run/config.json", argv=[*CPU, "--latent-dim", "1"])
    assert "1 is not between 2 and 10" in fails(2, main, ["--resume", "run"], [])
    edit("run/config.json", argv=[*CPU, "--tune", "3", "--storage", "mysql://there"])
    assert "add --storage mysql://there" in fails(2, main, ["--resume", "run"], [])
    assert parse_args(["--resume", "run", "--storage", "here"]).storage == "here"
    # auto found the digits when it began: it does not go on with what has been downloaded since
    edit("run/config.json", argv=["--device", "cpu", "--data-dir", "fashion"])
    args = parse_args(["--resume", "run"])
    assert common.load_data(args).name == args.data == "digits"


@pytest.mark.parametrize("key, value", [("source", "123456"), ("machine", "Linux, 99 threads"),
                                        ("versions", {"torch": "1.0"})])
def test_resume_says_what_has_changed(capsys, key, value):
    """Half of a run made by other code, other versions or other threads, without a word."""
    interrupted("run", 0.3, 0.1)
    edit("run/config.json", **{key: value})
    capsys.readouterr()
    metrics = main(["--resume", "run"], [0.2])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"warning: since this run began its {key} chan")
    assert metrics[key] == value  # what began the run


def test_the_digest_tells_trainings_apart(tmp_path, monkeypatch):
    """Another loss under the old name is not seen; or a comment makes every chapter train anew."""
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))

    def digest(source, shared="def augment(x):\n    return x\n\ndef fail():\n    pass\n"):
        (tmp_path / "toy.py").write_text(source)
        (tmp_path / "common.py").write_text(shared)
        return common.digest("toy")
    source = "import math\n\ndef loss(x):\n    return x\n\ndef draw_x():\n    pass\n"
    same = [source, source.replace("(x):", "(x):  # a comment"), source.replace("pass", "return"),
            source + "\n\ndef main():\n    pass\n"]
    other = [source.replace("return x", "return 2 * x"), source + "class A:\n    b = 1\n",
             source + "class A:\n    b = 2\n"]
    assert len({digest(text) for text in same}) == 1
    assert len({digest(text) for text in [source, *other]}) == 4
    assert len(digest(source)) == 6
    assert digest(source, "def augment(x):\n    return x\n") == digest(source)  # without fail()
    assert digest(source, "def augment(x):\n    return -x\n") != digest(source)


# --------------------------------------------------------------------------- trained


@pytest.fixture
def script(monkeypatch):
    """A module under the name of ae whose calls are counted, and whose losses can be given."""
    module = Namespace(calls=[], losses=[0.3, 0.1, 0.2], parse_args=parse_args)
    monkeypatch.setitem(sys.modules, "ae", module)

    def count(argv):
        module.calls.append(argv)
        return main(argv, module.losses)
    module.main = count
    return module


FLAGS = ["--latent-dim", "4"]


def trained(*words, flags=FLAGS):
    """What a chapter calls, which was itself called with these words."""
    args = parse_args([*CPU, *words])
    return common.trained("ae", "judge", args, flags, minutes=9)


def test_trained_once_and_used_then(script, capsys):
    """The same command trains twice; a seed, data or --fast that get the network of another."""
    folder = trained()
    out = capsys.readouterr().out
    assert Path(folder) == Path("runs", f"judge-digits-seed0-{common.digest('ae')}")
    assert "python ae.py --latent-dim 4 --data digits --seed 0 makes it" in out
    assert "9 minutes" in out and trained() == folder and len(script.calls) == 1
    assert capsys.readouterr().out == f"using {folder}\n"
    assert common.load_run(folder, "ae", parse_args, build).in_features == 4
    script.losses = [0.5] * 3
    folders = {folder, trained("--seed", "1"), trained("--fast")}
    assert len(folders) == len(script.calls) == 3
    assert json.loads(Path(trained("--fast"), "config.json").read_text())["flags"]["fast"]


def test_trained_takes_no_other_run(script, capsys):
    """What else lies in runs/, newer or better, changes the numbers of a command."""
    for name in ("judge", "judge-digits", "ae-99991231-235959", "judge-digits-seed0"):
        main([*CPU, *FLAGS, "--out-dir", f"runs/{name}"], [0.0] * 3)
    folder = trained()
    assert len(script.calls) == 1
    assert json.loads(Path(folder, "metrics.json").read_text())["best"] == 0.1


def test_trained_goes_on_with_an_interrupted_one(script):
    """Half a training is taken for a whole one, or is trained again from the start."""
    script.losses = [0.3, KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        trained()
    script.losses = [0.1, 0.2]  # one less than a training from the start would take
    folder = trained("--data-dir", "moved")
    assert script.calls[1][:2] == ["--resume", folder]
    assert [row["val_loss"] for row in history(folder)] == [0.3, 0.1, 0.2]
    assert trained() == folder and len(script.calls) == 2


def test_trained_refuses_what_another_command_made(script, fails):
    """A judge of other flags under the same name, or of fewer epochs, judges without a word."""
    folder = trained()
    message = fails(2, trained, flags=["--latent-dim", "5"])
    assert folder in message and "made by another command" in message
    longer = f"runs/judge-digits-seed1-{common.digest('ae')}"
    script.main([*FLAGS, "--data", "digits", "--seed", "1", "--epochs", "1", "--device", "cpu",
                 "--out-dir", longer])
    assert longer in fails(2, trained, "--seed", "1")
    assert len(script.calls) == 2


def test_trained_anew_by_other_code(script, monkeypatch):
    """A chapter goes on with what an earlier version of the script made."""
    first = trained()
    monkeypatch.setattr(common, "digest", lambda name: "abcdef")
    second = trained()
    assert second.endswith("-abcdef") and second != first and len(script.calls) == 2


# --------------------------------------------------------------------------- what ends a run


@pytest.mark.parametrize("error, status, said", [
    (KeyboardInterrupt(), 130, "interrupted; repeat the command"),
    (FloatingPointError("val_loss is nan after epoch 2"), 1, "val_loss is nan"),
    (OSError(28, "No space left on device"), 1, "No space left"),
    (BrokenPipeError(32, "Broken pipe"), 1, "Broken pipe"),  # python ae.py | head -1
    (RuntimeError("[enforce fail] can't allocate memory:\nyou tried"), 1, "--batch-size"),
    (torch.OutOfMemoryError("CUDA out of memory."), 1, "--batch-size"),
    (RuntimeError("std::bad_alloc"), 1, "--batch-size"), (MemoryError(), 1, "--batch-size"),
    (SystemExit(2), 2, None)])
def test_what_ends_a_run_is_one_line(monkeypatch, capsys, error, status, said):
    """Forty lines of traceback for a network that is too large, or status 0 for a failure."""
    def run():
        raise error
    monkeypatch.setattr(common.Run, "go_on", "repeat the command")
    with pytest.raises(SystemExit) as exit_info:
        common.start(run)
    lines = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == status and len(lines) == bool(said)
    assert not said or said in lines[0]


def test_a_bug_keeps_its_traceback():
    """A wrong shape in a student's own layer is called a lack of memory, or one bare line."""
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("rows"),
                  RuntimeError("some elements of the input refer to a single memory location")):
        def run(error=error):
            raise error
        with pytest.raises(type(error)):
            common.start(run)


def test_any_standard_output_will_do(monkeypatch):
    """A closed one is an AttributeError; one that knows only ASCII, a UnicodeEncodeError."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    common.start(lambda: print("füll", flush=True))
    assert written.getvalue().split() == [b"f\\xfcll"]
    monkeypatch.setattr(sys, "stdout", None)
    common.start(lambda: print("nobody reads this"))


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


def test_curves_are_the_rows():
    """A curve of another key, or shifted by an epoch."""
    rows, figures = [{"epoch": e, "a": e / 2, "b": e ** 2, "c": 0.0} for e in (1, 2, 3)], Figures()
    common.plot_curves(figures, "fig", rows, {"loss": ("a", "b"), "rate": ("c",)}, "title", "")
    curves = {line.get_label(): line.get_xydata().tolist()
              for ax in figures["fig"].axes for line in ax.lines}
    assert curves == {key: [[row["epoch"], row[key]] for row in rows] for key in "abc"}
    assert [ax.get_ylabel() for ax in figures["fig"].axes] == ["loss", "rate"]
