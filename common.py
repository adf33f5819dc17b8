"""What the scripts share and none of them teaches: flags, data, splits, the run folder, plotting.

Exit status everywhere: 0 done, 1 the training failed (a loss that is not finite, a full disk),
2 wrong input, 130 interrupted. Each comes with one line on stderr.
"""

import argparse
import copy
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import platform
import shlex
import sys
import time
import zipfile
import zlib
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from statistics import median
from typing import NamedTuple
from urllib.request import urlopen

import matplotlib
import numpy as np
import sklearn
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import StratifiedKFold, train_test_split
from torchvision.utils import make_grid
from tqdm import tqdm


def fail(message, status=2):
    """Print one line on stderr and leave with this exit status."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(status)


# --------------------------------------------------------------------------- flags


RUN_FLAGS = ("fast", "data", "data_dir", "out_dir", "seed", "device", "resume")  # of every script


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviated flags, and errors of one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        fail(f"{message} (see {self.prog} --help)")


def number(kind, low, high):
    """An argparse type: an int or a float between low and high; nan and inf are refused."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    convert.__name__ = {int: "whole number", float: "number"}[kind]  # for "invalid ... value"
    return convert


def folder(text):
    """An argparse type: a path; an empty one (an unset variable in a shell) is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def add_flags(parser, recipes, epochs, batch_size, lr, augment, folds=True):
    """The flags of every script that trains, with its own recipes and defaults."""
    group = parser.add_argument_group("training")
    group.add_argument("--recipe", choices=recipes, default="best",
                       help="best: these defaults; others: the report's settings, see the script")
    if folds:
        group.add_argument("--folds", type=number(int, 1, 20), default=1,
                           help="1: one 80/20 split; k: k-fold cross validation")
    group.add_argument("--epochs", type=number(int, 1, 10_000), default=epochs,
                       help="passes over the training images")
    group.add_argument("--batch-size", type=number(int, 1, 60_000), default=batch_size,
                       help="images per step: fewer make more, noisier steps")
    group.add_argument("--lr", type=number(float, 1e-8, 100), default=lr,
                       help="learning rate; where it follows a schedule, its peak")
    group.add_argument("--augment", choices=("none", "flip", "shift", "erase", "report"),
                       default=augment, help="random change to each training image in each epoch: "
                       "flip: left-right; shift: that and up to 2 pixels; erase: that and a black "
                       "rectangle; report: as in its section 5, rotated and upside down")
    add_run_flags(parser).add_argument(
        "--resume", type=folder, metavar="DIR",
        help="go on with the interrupted run in DIR, or redraw a finished one")


def add_run_flags(parser):
    """The flags of every script, also of one without epochs; returns their group."""
    group = parser.add_argument_group("run")
    group.add_argument("--fast", action="store_true",
                       help="smoke test: the real code, few images and steps, no download")
    group.add_argument("--data", choices=("auto", "fashion", "digits"), default="auto",
                       help="auto: FashionMNIST if it can be had, else scikit-learn's digits")
    group.add_argument("--data-dir", type=folder, default="data", metavar="DIR",
                       help="where FashionMNIST lies or is downloaded to")
    group.add_argument("--out-dir", type=folder, metavar="DIR",
                       help="folder for the results, new or empty; else a new one in runs/")
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0,
                       help="same command, same seed, same machine: same numbers")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                       help="auto: a GPU if there is one")
    return group


def parse(parser, script, argv, recipes, fast):
    """Parse argv. An explicit flag wins over fast's defaults, those over the recipe's.

    recipes: {name: {flag: default}}, fast: {flag: default}; empty without training flags. With
    --resume the flags are those of the run's checkpoint (it comes back as args.state); a flag that
    contradicts them is refused, for the run would no longer be the one that was interrupted.
    """
    args = parser.parse_args(argv)
    state, saved = None, {}
    if "resume" in args and args.resume:
        if args.out_dir:
            parser.error("--resume goes on in its own folder: leave --out-dir out")
        state = load_checkpoint(Path(args.resume) / "checkpoint.pt", script)
        saved = state["config"]["flags"]
        if saved.keys() != vars(args).keys() - {"out_dir", "resume"}:
            fail(f"{args.resume} is of another version of {script}.py: start a new run")
        parser.set_defaults(**saved)
    else:
        if recipes:
            parser.set_defaults(**recipes[args.recipe])
        if args.fast:
            parser.set_defaults(**fast)
    args = parser.parse_args(argv)
    for flag, value in saved.items():
        free = flag in ("data_dir", "device", "dims", "start_class",  # these train nothing else
                        "encoder", "judge")  # their run may have moved
        if not free and getattr(args, flag) != value:
            parser.error(f"--{flag.replace('_', '-')} is {value} in {args.resume}: "
                         "leave it out, or start a new run")
    refuse_used(args)
    args.device = pick_device(args.device)
    args.script, args.state = script, state
    args.program = sys.argv[0] if sys.argv[0].endswith(f"{script}.py") else f"{script}.py"
    words = sys.argv[1:] if argv is None else argv
    args.command = shlex.join(["python", args.program, *words])
    return args


def refuse_used(args):
    """Exit 2 where --out-dir is neither new nor empty."""
    with suppress(OSError):  # not there, or not to be read: Run says what is wrong
        if args.out_dir and any(Path(args.out_dir).iterdir()):
            fail(f"--out-dir {args.out_dir} is not empty: name a new folder" + (
                f", or go on with what is there by --resume {args.out_dir}"
                if "resume" in args else ""))


def refuse_others(parser, argv, mode, allowed):
    """Exit 2 where argv changes a flag that is not for this mode: it would silently do nothing."""
    for name, value in vars(parser.parse_args(argv)).items():
        if name not in (*RUN_FLAGS, *allowed) and value != parser.get_default(name):
            parser.error(f"{mode} and --{name.replace('_', '-')}: choose one")


def start(main):
    """Run a script's main; what ends it outside of a Run is one line too."""
    if sys.stdout:  # None where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that know ASCII only
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; repeat the command", status=130)
    except OSError as error:  # standard output closed or full
        fail(f"cannot write ({error})", status=1)


def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'mps' -> the device's name; exit 2 where it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if there[device])
    return name if there[name] else fail(f"--device {name}: this machine has none; try auto")


def seed_everything(*numbers):
    """Seed torch's global generators (weights, dropout, noise); return a CPU generator.

    The generator is for what must not depend on the device (shuffling, augmentation). An epoch
    calls this with (seed, fold, epoch): its draws follow from these three numbers alone, so a
    resumed run needs no stored generator states to repeat them.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    torch.backends.cudnn.deterministic = True  # costs a little speed on CUDA, none elsewhere
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------- data

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
           "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SHA256 = {  # of the extracted files: torchvision only looks whether they exist
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MIRRORS = (*torchvision.datasets.FashionMNIST.mirrors,
           "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/")


class Data(NamedTuple):
    """x: (N, 1, 28, 28) float32 in [0, 1]; y: (N,) int64, an index into classes; on one device."""

    name: str  # for titles: "FashionMNIST" or "digits"
    classes: tuple
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


def load_data(args):
    """The data that --data, --data-dir and --fast ask for, on args.device; exit 2 if not to be had.

    Sets args.data to what was loaded, so that a resumed run gets the same.
    """
    arrays = None
    if args.data != "digits":
        try:
            arrays = read_fashion(Path(args.data_dir) / "FashionMNIST" / "raw", not args.fast)
        except LookupError as problem:
            if args.data == "fashion":
                fail(f"{problem}; --data digits needs no download")
            print(f"{problem}: using scikit-learn's 1,797 digits instead")
    args.data = "fashion" if arrays else "digits"
    name, classes = ("FashionMNIST", CLASSES) if arrays else ("digits", tuple("0123456789"))
    x_train, y_train, x_test, y_test = (
        torch.tensor(array).to(args.device) for array in arrays or read_digits())
    if args.fast:
        x_train, y_train, x_test, y_test = (
            x_train[:1000], y_train[:1000], x_test[:300], y_test[:300])
    return Data(name, classes, x_train.unsqueeze(1), y_train, x_test.unsqueeze(1), y_test)


def read_digits():
    """scikit-learn's digits as arrays (x_train, y_train, x_test, y_test), x (N, 28, 28)."""
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    x = F.interpolate(x, size=(28, 28), mode="bilinear")[:, 0].numpy()
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=0.2, stratify=y, random_state=0)  # fixed: no --seed changes the test set
    return x_train, y_train, x_test, y_test


def read_fashion(raw, download):
    """FashionMNIST in the folder raw as arrays (x_train, y_train, x_test, y_test), x (N, 28, 28).

    What is missing or damaged is downloaded if download is set. LookupError where it stays so.
    """
    arrays = []
    for name, digest in SHA256.items():
        content = read_verified(raw / name, digest, download)  # so its header is right too
        arrays.append(
            np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28) / np.float32(255)
            if "images" in name else np.frombuffer(content, np.uint8, offset=8).astype(np.int64))
    return arrays


def read_verified(path, digest, download):
    """The content of path, of path.gz or of a download, whichever first has this SHA-256."""
    sources = [path.read_bytes, lambda: gzip.decompress(Path(f"{path}.gz").read_bytes())]
    if download:
        sources += [partial(fetch, f"{mirror}{path.name}.gz") for mirror in MIRRORS]
    for source in sources:
        try:
            content = source()
            if hashlib.sha256(content).hexdigest() == digest:
                if isinstance(source, partial):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with atomic(path) as f:  # a damaged file gives way only to a whole one
                        f.write(content)
                return content
            problem = "wrong content"
        except (OSError, EOFError, zlib.error, HTTPException) as error:
            problem = error
    raise LookupError(f"{path} is missing or damaged" + (
        f" and could not be downloaded ({problem})" if download else " (--fast downloads nothing)"))


def fetch(url):
    """Download and unpack a .gz file."""
    print(f"downloading {url}", flush=True)
    with urlopen(url, timeout=10) as response:  # seconds without an answer
        return gzip.decompress(response.read())


def splits(y, folds, seed):
    """[(training indices, validation indices)]: one stratified 80/20 split, or stratified k-fold.

    y: (N,) class labels. Indices are int64 tensors on the CPU, disjoint; over k folds the
    validation parts cover everything once.
    """
    y = y.cpu().numpy()
    if folds == 1:
        pairs = [train_test_split(np.arange(len(y)), test_size=0.2, stratify=y, random_state=seed)]
    else:
        pairs = StratifiedKFold(folds, shuffle=True, random_state=seed).split(y, y)
    return [tuple(torch.tensor(part) for part in pair) for pair in pairs]


def batches(n, batch_size, generator, device="cpu"):
    """One epoch's minibatches: index tensors (B,) in a new random order, with a progress bar.

    The order is drawn on the CPU, so it is the same on every device.
    """
    order = torch.randperm(n, generator=generator).to(device)
    return tqdm(order.split(batch_size), disable=None, leave=False)  # None: only on a terminal


def augment(x, kind, generator):
    """Change each image of x (B, 1, 28, 28) by a draw of its own.

    kind: "none"; "flip", left-right with probability 1/2; "shift", flipped likewise and moved by
    up to 2 pixels; "erase", shifted likewise and a rectangle of up to 12 x 12 pixels blackened
    (Zhong et al., arXiv 1708.04896); "report", rotated by up to 15 degrees (our guess: the report
    gives no angle) and flipped upside down with probability 1/2.
    """
    if kind == "none":
        return x
    flipped = torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device) < 0.5
    if kind != "flip":
        angle = (torch.rand(len(x), generator=generator) * 2 - 1) * math.radians(15)
        right, down = torch.randint(-2, 3, (2, len(x)), generator=generator) / 14  # 28 pixels are 2
        angle, right, down = (angle, 0 * right, 0 * down) if kind == "report" else (
            0 * angle, right, down)
        move = torch.stack([angle.cos(), -angle.sin(), right, angle.sin(), angle.cos(), down], 1)
        grid = F.affine_grid(move.view(-1, 2, 3).to(x.device), x.shape, align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)  # what comes in from outside is black
    x = torch.where(flipped, x.flip(2 if kind == "report" else 3), x)
    if kind == "erase":
        (y0, x0), (height, width) = (
            scale * torch.rand(2, len(x), 1, 1, 1, generator=generator).to(x.device)
            for scale in (28, 6))  # centres; halves of the sides
        i = torch.arange(28, device=x.device)
        x = x.masked_fill(((i[:, None] - y0).abs() < height) & ((i - x0).abs() < width), 0)
    return x


def in_batches(function, x, size=100):
    """function(x) for x (N, ...), in parts, order kept. 100 images stay in a CPU's cache."""
    return torch.cat([function(part) for part in x.split(size)])


def pca_reconstruct(x_train, x_test, k):
    """x_test (N, 1, 28, 28) rebuilt from its first k principal components, fitted on x_train.

    The best linear autoencoder there is: what any other has to beat.
    """
    pca = PCA(min(k, len(x_train)), svd_solver="covariance_eigh")
    pca.fit(x_train.flatten(1).cpu().double().numpy())
    x_hat = pca.inverse_transform(pca.transform(x_test.flatten(1).cpu().double().numpy()))
    return torch.tensor(x_hat, dtype=torch.float32, device=x_test.device).view_as(x_test)


# --------------------------------------------------------------------------- run folder


@contextmanager
def atomic(path):
    """Write to a temporary file that replaces path only once it is complete and on the disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs may download at once
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path, value):
    """Strict JSON (nan and inf raise ValueError), written atomically."""
    with atomic(path) as f:
        f.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def load_checkpoint(path, script):
    """The state that Run saved; exit 2 where it is missing, damaged, foreign or malicious."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not compare the CRC sums
                raise zipfile.BadZipFile("CRC mismatch")
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
    except FileNotFoundError:
        fail(f"{path} does not exist (a run writes it after each epoch): name another run")
    except OSError as error:
        fail(f"cannot read {path} ({error.strerror}): name the folder of a run")
    except pickle.UnpicklingError:
        fail(f"{path} holds more than plain tensors and numbers: refused, it could run code")
    except Exception:  # whatever else garbage makes the zip file and pickle readers raise
        fail(f"{path} is damaged: name another run, or start a new one")
    types = {"config": dict, "fold": int, "epoch": int, "history": list, "best": dict,
             "parts": dict}
    if not isinstance(state, dict) or any(
            not isinstance(state.get(key), kind) for key, kind in types.items()):
        fail(f"{path} is no checkpoint of these scripts")
    made_by, flags = state["config"].get("script"), state["config"].get("flags")
    if made_by != script or not isinstance(flags, dict):
        fail(f"{path} was saved by {made_by}.py, not by {script}.py")
    return state


def restore(part, state_dict, folder):
    """part.load_state_dict(state_dict), from the run in folder; exit 2 where it does not fit."""
    try:
        part.load_state_dict(state_dict)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        fail(f"the checkpoint in {folder} does not fit this model: was the script changed since? "
             "Start a new run")


@contextmanager
def reading(folder):
    """Exit 2 where what stands in a run's files is not what this version writes."""
    try:
        yield
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        fail(f"the run in {folder} is damaged or of another version ({type(error).__name__}: "
             f"{error}): name another, or train a new one")


def find_run(script, data, path=None, runs="runs", **wanted):
    """The folder of a finished run: path, or the newest in runs; None where there is none.

    Only runs of this script, on this data ("fashion", "digits") and with the wanted flags or
    metrics count, like latent_dim=38, and --fast ones only as a path; of searches and comparisons
    none, for they hold many models or none. A path that does not fit is exit 2.
    """
    wanted = {"script": script, "data": data, **wanted}
    found = []
    for folder in [Path(path)] if path else Path(runs).glob("*/"):
        # unfinished, or no run at all
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            file = folder / "metrics.json"
            m = json.loads(file.read_text())
            m = {**m, **m["flags"]}  # the flag where both have one: a sigma that was learned
            many = any(m.get(mode) for mode in ("tune", "ablate", "compare"))
            if wanted.items() <= m.items() and not many and (path or not m["fast"]):
                found.append((file.stat().st_mtime, folder))
    if found:
        print(f"using {max(found)[1]}, a run of {script}.py")
        return max(found)[1]
    return path and fail(f"{path} is not a finished training of {script}.py with " + ", ".join(
        f"{key} {value}" for key, value in list(wanted.items())[1:]))


def made_by(script, flags):
    """What find_run wants of a run that `python SCRIPT.py FLAGS` made, whatever its RUN_FLAGS."""
    return {k: v for k, v in vars(script.parse_args(flags)).items()
            if k not in (*RUN_FLAGS, "script", "state", "program", "command")}


def find_or_train(script, args, flags, path=None, **wanted):
    """The folder of a run that fits (see find_run); where there is none, script.main trains one.

    script: a module. wanted: None given, a run of exactly these flags. args: the caller's, after
    load_data; with its --fast, a --fast run is trained in any case.
    """
    name, folder = Path(script.__file__).stem, None  # __name__ may be "__main__"
    if path or not args.fast:
        folder = find_run(name, args.data, path, **(
            wanted or ({} if path else made_by(script, flags))))
    if not folder:
        flags = ["--fast", *flags] if args.fast else flags
        print(f"no run that fits: {shlex.join(['python', f'{name}.py', *flags])} comes first",
              flush=True)
        folder = script.main([*flags, "--data", args.data, "--data-dir", args.data_dir,
                              "--seed", str(args.seed), "--device", args.device])["folder"]
    return str(folder)


class Run:
    """The folder of one run: config.json, log.jsonl, checkpoint.pt, metrics.json, figures.

    Used as `with Run(args, data, select="val_mse") as run`: inside, a Ctrl-C, a full disk or a
    loss that is not finite ends in one line, with what was saved and how to go on. Attributes:
    folder; history, one dict per epoch; best, {fold: {"epoch", select, "model": state_dict}}.
    """

    def __init__(self, args, data, select=None):
        self.args, self.select, self.state = args, select, args.state
        self.fold = self.epoch = 0
        self.history = self.state["history"] if self.state else []
        self.best = self.state["best"] if self.state else {}
        self.folder = Path(args.resume) if self.state else self.new_folder()
        flags = {k: v for k, v in vars(args).items()
                 if k not in ("script", "state", "program", "command", "out_dir", "resume")}
        gpu = f", {torch.cuda.get_device_name()}" if args.device == "cuda" else ""
        self.config = {
            "script": args.script, "flags": flags, "data": args.data, "seed": args.seed,
            "command": self.state["config"]["command"] if self.state else args.command,
            "device": args.device,
            "machine": f"{platform.system()} {platform.machine()}, "
                       f"{torch.get_num_threads()} CPU threads{gpu}",
            "versions": {"python": platform.python_version(), **{
                m.__name__: str(m.__version__)
                for m in (torch, torchvision, np, sklearn, matplotlib)}}}
        try:
            if not self.state:
                save_json(self.folder / "config.json", self.config)
        except OSError as error:
            fail(f"cannot write to {self.folder} ({error.strerror}): name another with --out-dir")
        print(f"{data.name}, {len(data.x_train):,} training and {len(data.x_test):,} test images; "
              f"{args.device}; writing to {self.folder}", flush=True)

    def new_folder(self):
        """--out-dir, refused unless new or empty; or runs/SCRIPT-TIME, new in any case."""
        out = self.args.out_dir
        try:
            if out:
                Path(out).mkdir(parents=True, exist_ok=True)
                refuse_used(self.args)  # again: a training may lie between parse() and this
                return Path(out)
            name = time.strftime(f"runs/{self.args.script}-%Y%m%d-%H%M%S")
            for suffix in ("", *(f"-{n}" for n in range(2, 100))):
                with suppress(FileExistsError):  # another run of this very second
                    Path(name + suffix).mkdir(parents=True)
                    return Path(name + suffix)
            fail(f"{name} and 98 more are there already: name a folder with --out-dir")
        except OSError as error:
            fail(f"cannot create {out or 'runs'} ({error.strerror}): name another with --out-dir")

    def epochs(self, fold, seeds, epochs=None, **parts):
        """Yield (epoch, generator) for each epoch of this fold that is still to be trained.

        seeds: numbers that, with the epoch, decide its draws. epochs: how many, else --epochs.
        parts: model=, optimizer=, ..., whatever has a state_dict(): restored first where the
        checkpoint stands in this fold, and saved by end_epoch.
        """
        self.fold, self.parts, first = fold, parts, 1
        self.total = epochs or self.args.epochs
        if self.state and fold < self.state["fold"]:
            return  # finished before the interruption
        if self.state and fold == self.state["fold"]:
            first = self.state["epoch"] + 1
            for name, part in parts.items():
                restore(part, self.state["parts"].get(name), self.folder)
        for epoch in range(first, self.total + 1):
            self.epoch = epoch
            yield epoch, seed_everything(*seeds, epoch)

    def end_epoch(self, **row):
        """Log the epoch's numbers, keep the best weights, write the checkpoint.

        Without a number to select by in the row, the newest weights count as the best.
        """
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at the end")
        row = {"fold": self.fold, "epoch": self.epoch, **row}
        self.history.append(row)
        score = row.get(self.select, -self.epoch)
        if self.fold not in self.best or score < self.best[self.fold][self.select]:
            self.best[self.fold] = {  # a copy: state_dict() holds references, which train on
                "epoch": self.epoch, self.select: score,
                "model": copy.deepcopy(self.parts["model"].state_dict())}
        with atomic(self.folder / "log.jsonl") as f:
            f.writelines((json.dumps(r, allow_nan=False) + "\n").encode() for r in self.history)
        buffer = io.BytesIO()  # torch.save itself would hide a full disk behind a RuntimeError
        torch.save({"config": self.config, "fold": self.fold, "epoch": self.epoch,
                    "history": self.history, "best": self.best,
                    "parts": {k: p.state_dict() for k, p in self.parts.items()}}, buffer)
        with atomic(self.folder / "checkpoint.pt") as f:
            f.write(buffer.getbuffer())
        fold = f"fold {self.fold + 1}  " if getattr(self.args, "folds", 1) > 1 else ""
        if "model" in row:  # its name says more than a number
            fold = ""
        print(f"{fold}epoch {self.epoch:3d}/{self.total}  " + "  ".join(
            v if isinstance(v, str) else f"{k} {v:.5g}" for k, v in list(row.items())[2:]),
            flush=True)

    def finish(self, metrics):
        """Write metrics.json (the metrics, then config.json's content); return the metrics."""
        if self.history:
            metrics = {"epochs": self.args.epochs, "seconds_per_epoch": median(
                r["seconds"] for r in self.history), **metrics}
        metrics = {"folder": str(self.folder), "fast": self.args.fast, **metrics, **self.config}
        save_json(self.folder / "metrics.json", metrics)
        losses = [r["train_loss"] for r in self.history
                  if r["fold"] == self.fold and "train_loss" in r]  # a GAN's fall to no purpose
        if self.args.fast and len(losses) > 1:
            verdict = "fell" if losses[-1] < losses[0] else "DID NOT FALL"
            print(f"--fast: the training loss {verdict}: {losses[0]:.5g} -> {losses[-1]:.5g}")
        return metrics

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        saved = (self.folder / "checkpoint.pt").exists()
        go_on = (f"go on with: python {shlex.quote(self.args.program)} "
                 f"--resume {shlex.quote(str(self.folder))}" if saved else
                 "nothing to go on with: repeat the command")
        if kind is None:
            print(self.folder)
        elif kind is KeyboardInterrupt:
            fail(f"interrupted; {go_on}", status=130)
        elif kind is FloatingPointError:
            fail(f"{error} of epoch {self.epoch}: try a smaller --lr"
                 f"{f'; the last good checkpoint is in {self.folder}' if saved else ''}", status=1)
        elif issubclass(kind, OSError):
            fail(f"cannot write ({error}); {go_on}", status=1)
        elif issubclass(kind, (MemoryError, torch.OutOfMemoryError)) or (
                kind is RuntimeError and "allocate memory" in str(error)):
            fail("out of memory: try a smaller --batch-size or network", status=1)


def finite(loss, step):
    """The loss as a float. Raises FloatingPointError, which names the step, if it is nan or inf."""
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} at step {step}")
    return value


# --------------------------------------------------------------------------- plotting


def show_images(ax, x, columns):
    """Draw x (N, 1, 28, 28) as a grid, white on black, always on the scale 0 to 1."""
    ax.imshow(make_grid(x.cpu(), nrow=columns, padding=1, pad_value=0.5)[0].numpy(),
              cmap="gray", vmin=0, vmax=1)
    ax.set_xticks([])
    ax.set_yticks([])


def draw_images(folder, name, x, columns, title, **axes):
    """Write folder/name.png: x (N, 1, 28, 28) as a grid; axes: what ax.set() takes."""
    rows = math.ceil(len(x) / columns)
    fig = Figure(figsize=(0.8 * columns + 0.4, 0.8 * rows + 0.9), layout="constrained")
    ax = fig.subplots()
    show_images(ax, x, columns)
    ax.set(title=title, **axes)
    fig.savefig(folder / f"{name}.png", dpi=120)


def plot_curves(folder, name, rows, panels, title):
    """Curves over the epochs, from rows of log.jsonl. panels: {y label: keys}, a panel each."""
    fig = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for ax, (ylabel, keys) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(),
                                  strict=True):
        for key in keys:
            ax.plot([r["epoch"] for r in rows], [r[key] for r in rows], marker=".", label=key)
        ax.set(xlabel="epoch", ylabel=ylabel)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend()
    fig.suptitle(title)
    fig.savefig(folder / f"{name}.png", dpi=120)


def scatter(ax, points, y, classes):
    """points (N, 2) and y (N,), arrays, coloured by class; a legend belongs beside it."""
    for c, label in enumerate(classes):
        ax.scatter(*points[y == c].T, s=4, alpha=0.6, color=f"C{c}", label=label)


def plot_scatter(folder, name, points, y, classes, title, labels):
    """Write folder/name.png: a scatter, with labels for the two axes."""
    fig = Figure(figsize=(7, 5), layout="constrained")
    ax = fig.subplots()
    scatter(ax, points, y, classes)
    ax.set(title=title, xlabel=labels[0], ylabel=labels[1])
    fig.legend(loc="outside right center", markerscale=4)
    fig.savefig(folder / f"{name}.png", dpi=120)
