"""What the scripts share: flags, data, splits, seeds, augmentation, the run's folder, plotting.

Worth reading are `seed_everything`, `split`, `splits`, `batches`, `augment` and `pca_reconstruct`.
The rest is machinery: of it a training calls `Run.begin` before its first epoch, `Run.end_epoch`
after each and `Run.load_best` at the end. Exit status of every script: 0 done, 1 failed in training
(a loss that is not finite, a full disk), 2 wrong input, 130 interrupted, with a line on stderr.
"""

import argparse
import ast
import copy
import functools
import hashlib
import html
import importlib
import io
import json
import math
import os
import pickle
import platform
import re
import shlex
import socket
import statistics
import sys
import time
import zipfile
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import sklearn
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torchvision.utils import make_grid
from tqdm import tqdm


def fail(message, status=2):
    """Print one line on stderr and leave with this exit status."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(status)


def start(main):
    """Run a script's main from the command line: what ends it early is one line and a status."""
    try:
        main()
    except KeyboardInterrupt:
        fail(f"interrupted; {Run.advice or 'repeat the command'}", status=130)
    except FloatingPointError as error:
        fail(f"{error}: try a smaller --lr; the epochs before it are saved", status=1)
    except OSError as error:
        fail(f"cannot read or write ({error}); {Run.advice or 'repeat the command'}", status=1)
    except (MemoryError, RuntimeError) as error:  # a GPU's "out of memory" is a RuntimeError
        if not isinstance(error, MemoryError) and not any(
                words in str(error) for words in ("out of memory", "allocate", "bad_alloc")):
            raise  # a bug: its traceback is worth more than a line
        fail("out of memory: try a smaller --batch-size or network, or --device cpu", status=1)


# --------------------------------------------------------------------------- flags


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in --help, but for None: there the help itself says what happens."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated flags, and with errors of one line."""

    def __init__(self, doc):  # the script's docstring; None under python -OO
        super().__init__(description=(doc or "").partition("\n")[0], allow_abbrev=False,
                         formatter_class=Formatter)

    def error(self, message):
        fail(f"{message} (see {self.prog} --help)")


def number(kind, low, high):
    """An argparse type: an int or a float between low and high; nan and inf are refused."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    convert.__name__ = kind.__name__  # argparse prints it: "invalid int value: 'x'"
    return convert


def add_training_flags(parser, recipes, folds=True, **defaults):
    """The flags of every script that trains. defaults: of epochs, batch_size, lr, augment."""
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=number(int, 1, 10_000), default=defaults["epochs"],
                       help="passes over the training images")
    group.add_argument("--lr", type=number(float, 1e-8, 100), default=defaults["lr"],
                       help="learning rate; where it follows a schedule, its peak")
    group.add_argument("--batch-size", type=number(int, 1, 60_000), default=defaults["batch_size"],
                       help="images per step: fewer make more, noisier steps")
    group.add_argument("--augment", choices=("none", "flip", "shift", "erase", "report"),
                       default=defaults["augment"], help="random change to each training image in "
                       "each epoch: flip: left-right; shift: that and up to 2 pixels; erase: that "
                       "and a black rectangle; report: rotated, some upside down; its section 5")
    group.add_argument("--recipe", choices=recipes, default="best",
                       help="best: these defaults; others: the report's settings, see the script")
    if folds:
        group.add_argument("--folds", type=number(int, 1, 20), default=1,
                           help="1: one 80/20 split; k: k-fold cross validation")


def add_run_flags(parser):
    """The flags of every script; called by parse()."""
    group = parser.add_argument_group("run")
    group.add_argument("--fast", action="store_true",
                       help="smoke test: the real code, few images and steps, no download")
    group.add_argument("--seed", type=number(int, 0, 10**9), default=0,
                       help="same command, seed, machine and number of threads: same numbers")
    group.add_argument("--resume", metavar="DIR",
                       help="go on with the interrupted run in DIR, or redraw a finished one")
    group.add_argument("--out-dir", metavar="DIR",
                       help="new or empty folder for the results; without it a new one in runs/")
    group.add_argument("--data", choices=("auto", "fashion", "digits"), default="auto",
                       help="auto: FashionMNIST if it can be had, else scikit-learn's digits")
    group.add_argument("--data-dir", default="data", metavar="DIR",
                       help="where FashionMNIST lies or is downloaded to")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                       help="auto: a GPU if there is one")


# flags that --resume may change: no training depends on them
FREE = {"resume", "data_dir", "device", "start_class", "dims"}


def parse(parser, script, argv, defaults=lambda args: {}, modes=None):
    """The flags as a namespace; also device, script and argv, which Run notes down.

    argv: the words of a command line; None: of this process's. defaults: a function that is given
    the flags and returns the defaults that they change, as --fast does {"epochs": 3}. modes: {flag
    that starts many trainings: the flags of the script that it takes}, as {"tune": ("epochs",)};
    others would do nothing, or blur what is compared, and are refused. --resume DIR parses the
    words that began that run, with the new ones behind them: ranges are checked anew, what would
    change the training is refused.
    """
    of_script = set(vars(parser.parse_args([])))  # without those that are added now
    add_run_flags(parser)

    def read(words):
        changed = defaults(parser.parse_args(words))  # by a --recipe, a mode, --fast
        # argparse changes what a namespace holds only where the words name that flag
        return parser.parse_args(words, argparse.Namespace(**changed))

    def refuse(flag, why):
        parser.error(f"--{flag.replace('_', '-')} {why}")

    words = sys.argv[1:] if argv is None else list(argv)
    args = read(words)
    # likewise: None stays at each flag that is not among the words
    typed = vars(parser.parse_args(words, argparse.Namespace(**dict.fromkeys(vars(args)))))
    typed = {flag: value for flag, value in typed.items() if value is not None}
    for flag, value in typed.items():
        if value == "":  # an unset variable in a shell
            refuse(flag, "is empty")
        for mode, takes in (modes or {}).items():
            if mode in typed and flag in of_script and flag not in (mode, *takes):
                refuse(flag, f"does not go with --{mode}")
    if args.resume:
        begun = read_config(args.resume, script)
        before = vars(read(begun["argv"]))
        for flag, value in typed.items():
            if value != before[flag] and flag not in FREE:
                refuse(flag, f"is {before[flag]} in {args.resume}: leave it, or start a new run")
        args = read([*begun["argv"], *words])
        args.data = begun["data"]  # what auto found when the run began
    return with_flags(args, device=pick_device(args.device), script=script, argv=words)


def with_flags(args, **flags):
    """A copy of args in which some flags have other values."""
    return argparse.Namespace(**(vars(args) | flags))


def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'mps' -> the device's name; exit 2 where it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if there[device])
    if not there[name]:
        fail(f"--device {name}: this machine has none; try auto")
    return name


# --------------------------------------------------------------------------- data

SHA256 = {  # of the unpacked files: torchvision compares archives only
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class FashionMNIST(torchvision.datasets.FashionMNIST):
    """torchvision's, with an https source, and files that count only if they are whole."""

    mirrors = ["https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/"
               "master/data/fashion/", *torchvision.datasets.FashionMNIST.mirrors]

    def _check_legacy_exist(self):
        return False  # never from processed/*.pt of torchvision's early versions

    def damaged(self):
        """The files that are missing or have another content than the official ones."""
        files = [Path(self.raw_folder, name) for name in SHA256]
        return [f for f in files if not f.is_file()
                or hashlib.sha256(f.read_bytes()).hexdigest() != SHA256[f.name]]

    def _check_exists(self):
        return not self.damaged()

    def download(self):
        for file in filter(Path.exists, self.damaged()):
            file.replace(f"{file}.damaged")  # it is not ours to overwrite
        super().download()


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

    Sets args.data to what was loaded. Your own images: return a Data of them here. Nothing else
    knows how many classes there are, or how many images.
    """
    socket.setdefaulttimeout(10)  # seconds without an answer: a download would wait for ever
    if args.data != "digits":
        try:
            fields = read_fashion(Path(args.data_dir), download=not args.fast)
            args.data = "fashion"
        except LookupError as problem:
            if args.data == "fashion":
                fail(f"{problem}; --data digits needs no download")
            print(f"{problem}: using scikit-learn's 1,797 digits instead")
            args.data = "digits"
    if args.data == "digits":
        fields = read_digits()
    name, classes, *arrays = fields
    if args.fast:
        arrays = [a[:n] for a, n in zip(arrays, (1000, 1000, 300, 300), strict=True)]
    return Data(name, classes, *(a.to(args.device) for a in arrays))


def read_digits():
    """scikit-learn's digits, blown up from 8x8, as the fields of Data."""
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    x = F.interpolate(x, size=(28, 28), mode="bilinear")
    train, test = train_test_split(  # fixed: no --seed changes the test set
        np.arange(len(x)), test_size=0.2, stratify=y, random_state=0)
    y = torch.tensor(y)
    return "digits", tuple("0123456789"), x[train], y[train], x[test], y[test]


def read_fashion(folder, download):
    """FashionMNIST in folder/FashionMNIST/raw, as the fields of Data.

    With download, torchvision unpacks what is missing or damaged there from a .gz beside it, or
    fetches it. LookupError where something stays so.
    """
    try:
        train = FashionMNIST(folder, download=download)
        test = FashionMNIST(folder, train=False)
    except MemoryError:
        raise
    except Exception as why:  # whatever a network and damaged files make torchvision raise
        reason = " ".join(str(why).split()) if download else "--fast downloads nothing"
        raise LookupError(f"no whole FashionMNIST in {folder} ({reason})") from why
    x_train, x_test = train.data.unsqueeze(1) / 255, test.data.unsqueeze(1) / 255
    return "FashionMNIST", tuple(train.classes), x_train, train.targets, x_test, test.targets


def seed_everything(*numbers):
    """Seed torch's global generators (first weights, dropout); return a CPU generator.

    The generator is for all that is drawn by hand (order, augmentation, noise): on the CPU, so that
    it does not depend on the device. An epoch calls this with the seeds and its number: its draws
    follow from these numbers alone, so an interrupted run repeats them without stored states.
    SeedSequence mixes the numbers; adding them up would make seed 1, epoch 2 draw like seed 2,
    epoch 1.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    torch.backends.cudnn.deterministic = True  # costs a little speed on CUDA, none elsewhere
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def split(y, seed):
    """(training indices, validation indices): one stratified 80/20 split; see splits."""
    y = y.cpu().numpy()
    fewest = np.unique(y, return_counts=True)[1].min()
    stratify = y if fewest > 1 else None  # a single image of a class cannot be in both parts
    pair = train_test_split(np.arange(len(y)), test_size=0.2, stratify=stratify, random_state=seed)
    return tuple(torch.tensor(part) for part in pair)


def splits(y, folds, seed):
    """{name: (training indices, validation indices)}: stratified k-fold, or with folds 1 one split.

    y: (N,) class labels. Stratified: each part has the classes in the proportions of the whole.
    Otherwise a fold might have few sandals to learn from, and do badly for that reason alone. Over
    k folds the validation parts cover everything once. Indices are int64 tensors on the CPU,
    disjoint; no test image is among them.
    """
    if folds == 1:
        return {"one split": split(y, seed)}
    y = y.cpu().numpy()
    pairs = StratifiedKFold(folds, shuffle=True, random_state=seed).split(y, y)  # for x; its length
    return {f"fold {n}": tuple(torch.tensor(part) for part in pair)
            for n, pair in enumerate(pairs, start=1)}


def batches(x, batch_size, rng):
    """One epoch's minibatches of x (N, ...): indices (B,) in a random order, with a progress bar.

    The whole data set is one tensor, so a batch is x[idx]. A DataLoader would take, convert and
    stack the images one by one, and with images this small that takes longer than the training. The
    last batch may be smaller: then a mean over batches is not the mean over images.
    """
    order = torch.randperm(len(x), generator=rng).to(x.device)
    return tqdm(order.split(batch_size), disable=None, leave=False)  # None: on a terminal only


def augment(x, kind, rng):
    """Change each image of x (B, 1, 28, 28) by a draw of its own.

    kind: "none"; "flip", left-right with probability 1/2; "shift", flipped likewise and moved by
    up to 2 pixels; "erase", shifted likewise and a rectangle of up to 12 x 12 pixels blackened
    (Zhong et al., arXiv 1708.04896); "report", rotated by up to 15 degrees (our guess: the report
    gives no angle) and flipped upside down with probability 1/2.

    A shift or rotation is a 2 x 3 matrix [cos -sin right; sin cos down] for each image. Applied to
    the place of an output pixel, in coordinates from -1 to 1, it says where in the input to look;
    affine_grid lists these places and grid_sample looks there, between four pixels if need be.
    """
    if kind == "none":
        return x
    flipped = torch.rand(len(x), 1, 1, 1, generator=rng).to(x.device) < 0.5
    if kind != "flip":
        angle = (torch.rand(len(x), generator=rng) * 2 - 1) * math.radians(15)
        # where to look; the image itself moves to the other side, which is as likely
        right, down = torch.randint(-2, 3, (2, len(x)), generator=rng) * 2 / 28  # a pixel is 2 / 28
        if kind == "report":
            right = down = torch.zeros(len(x))  # turned, not moved
        else:
            angle = torch.zeros(len(x))  # moved, not turned
        move = torch.stack([angle.cos(), -angle.sin(), right, angle.sin(), angle.cos(), down], 1)
        grid = F.affine_grid(move.view(-1, 2, 3).to(x.device), x.shape, align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)  # what comes in from outside is black
    x = torch.where(flipped, x.flip(2 if kind == "report" else 3), x)
    if kind == "erase":
        y0, x0 = 28 * torch.rand(2, len(x), 1, 1, 1, generator=rng).to(x.device)  # centres
        half_height, half_width = 6 * torch.rand(2, len(x), 1, 1, 1, generator=rng).to(x.device)
        i = torch.arange(28, device=x.device)
        rows = (i[:, None] - y0).abs() < half_height  # (B, 1, 28, 1): inside the rectangle?
        columns = (i - x0).abs() < half_width         # (B, 1, 1, 28)
        x = x.masked_fill(rows & columns, 0)
    return x


def in_batches(function, x):
    """function(x) for x (N, ...), in parts, order kept. 100 images stay in a CPU's cache."""
    return torch.cat([function(part) for part in x.split(100 if x.device.type == "cpu" else 2000)])


def pixels(x):
    """x (N, 1, 28, 28) as an array (N, 784) for scikit-learn."""
    return x.flatten(1).cpu().double().numpy()


def pca_reconstruct(x_train, x_test, k):
    """x_test (N, 1, 28, 28) rebuilt from its first k principal components, fitted on x_train.

    Of all linear maps to k numbers and back, PCA loses the least squared error on the images it was
    fitted on (Eckart and Young 1936). So this is the best linear autoencoder: what any network with
    a latent space of k has to beat. Fitted on test images it would know too much.
    """
    k = min(k, len(x_train))  # there are no more, if the images are few
    pca = PCA(k, svd_solver="covariance_eigh").fit(pixels(x_train))  # exact, the fastest for 784
    x_hat = pca.inverse_transform(pca.transform(pixels(x_test)))
    return torch.tensor(x_hat, dtype=torch.float32, device=x_test.device).view_as(x_test)


def knn_accuracy(points, y):
    """Do the classes keep apart? The share of points (N, D) whose 5 nearest vote for their class.

    Returns the accuracy and that of each class, {class: accuracy}, both by cross validation: each
    point is asked once, and the other four fifths vote. The points have no order, so the folds need
    no shuffling.
    """
    voters = KNeighborsClassifier(5)
    correct = cross_val_predict(voters, points, y, cv=KFold(5)) == y
    return correct.mean().item(), {c: correct[y == c].mean().item() for c in np.unique(y).tolist()}


# --------------------------------------------------------------------------- the run's folder


def write(file, content):
    """Write bytes to a temporary file that replaces `file` only once they are on the disk."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")  # two runs may write at once
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    finally:  # where that failed
        temporary.unlink(missing_ok=True)


def read_config(folder, script):
    """config.json of a run of this script; exit 2 where there is none."""
    try:
        config = json.loads(Path(folder, "config.json").read_text())
        if config["script"] != script:
            fail(f"{folder} is a run of {config['script']}.py, not of {script}.py")
        config["argv"], config["data"] = [str(w) for w in config["argv"]], str(config["data"])
        return config
    except Exception as error:  # whatever a missing or damaged file makes of it
        fail(f"{folder} is no folder of a run, or its config.json is damaged ({error})")


def save_checkpoint(file, things, **rest):
    """Write things {name: whatever has a state_dict()} and the rest, plain lists and numbers."""
    buffer = io.BytesIO()  # torch.save itself would hide a full disk behind a RuntimeError
    torch.save({"things": {k: t.state_dict() for k, t in things.items()}, "rest": rest}, buffer)
    write(file, buffer.getbuffer())


def load_tensors(file):
    """Load what torch.save wrote. A damaged file, or one that would run code, raises an error."""
    # such a file is a zip archive, and torch.load does not compare its checksums
    if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
        raise zipfile.BadZipFile("CRC mismatch")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its message advises to load it all the same
        raise ValueError("more than plain tensors: it could run code") from None


def load_checkpoint(file, things):
    """Restore things {name: whatever has load_state_dict()} from a checkpoint; return the rest.

    Exit 2 where the file is damaged, would run code, or does not fit.
    """
    try:
        state = load_tensors(file)
        for name, thing in things.items():
            thing.load_state_dict(state["things"][name])
        return state["rest"]
    except Exception as error:  # whatever a damaged file makes torch raise
        fail(f"{file} is damaged, or of another version of the script ({type(error).__name__}: "
             f"{str(error)[:200]}): name another run, or start a new one")


@functools.cache  # parsing the sources takes a tenth of a second
def digest(script, *words):
    """Six digits that change with the code of a training, and with the words of a command.

    An edited comment, main or draw_... is no reason to train anew. What counts are classes,
    constants and other functions of the script and of the chapters that it imports, and those
    functions of common.py that decide what a training sees.
    """
    def source(file):
        return Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8")

    lesson = ("load_data", "read_digits", "read_fashion", "seed_everything", "split", "splits",
              "batches", "augment")
    code = list(words)
    imports = re.findall(r"^import (ae|vae|finetune|gan|common)$", source(script), re.MULTILINE)
    for file in (script, *imports):
        for node in ast.parse(source(file)).body:  # without comments
            name = getattr(node, "name", "")  # of a function or class
            if file == "common":
                counts = name in lesson
            else:
                counts = (isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.Assign))
                          and not name.startswith(("draw_", "main")))
            if counts:
                code.append(ast.dump(node))
    return hashlib.sha256(" ".join(code).encode()).hexdigest()[:6]


def new_config(args):
    """What config.json says of a run: command, flags, code, machine, versions."""
    modules = (torch, torchvision, np, sklearn, matplotlib)
    return {
        "script": args.script, "command": shlex.join(["python", f"{args.script}.py", *args.argv]),
        "argv": args.argv, "data": args.data, "seed": args.seed, "device": args.device,
        "flags": {k: v for k, v in vars(args).items()
                  if k not in ("argv", "script", "out_dir", "resume")},
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
                   + (f", {torch.cuda.get_device_name()}" if args.device == "cuda" else ""),
        "source": digest(args.script),
        "versions": {"python": platform.python_version(),
                     **{m.__name__: str(m.__version__) for m in modules}}}


def new_folder(args, config):
    """--out-dir, refused unless new or empty, or runs/SCRIPT-TIME, with this config.json."""
    folder = Path(args.out_dir or f"runs/{args.script}-{datetime.now():%Y%m%d-%H%M%S-%f}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            quoted = shlex.quote(folder.as_posix())  # "\\" of Windows would be quoted
            fail(f"{quoted} is not empty: name a new folder, or go on with the run in it by "
                 f"--resume {quoted}")
        with open(folder / "config.json", "x") as f:  # x: not if another run has just begun there
            json.dump(config, f, indent=2)
    except OSError as error:
        fail(f"cannot write to {folder} ({error.strerror}): name another with --out-dir")
    return folder


# {flag: the script that made the run whose folder it names}
MADE_BY = {"encoder": "ae", "ae": "ae", "vae": "vae", "gan": "gan", "gan_report": "gan",
           "judge": "finetune"}


class Run:
    """The folder of a run: config.json, log.jsonl, metrics.json, index.html, figures, checkpoints.

    A part is one of several networks that a run trains one after the other: a fold, a beta, a
    variant. Each has a checkpoint of its own, PART.pt, with its rows and its best weights. rows are
    the numbers of its epochs, history those of all parts.
    """

    advice = None  # how to go on after an interruption, for start()

    def __init__(self, args, data, columns=()):
        """columns: the numbers of an epoch to print; log.jsonl has all of them."""
        self.args, self.columns = args, columns
        self.history, self.captions = [], {}  # of all epochs, of all figures
        # of a part's name: a line has 99 characters, of which 4 columns of 13 leave 22
        self.width = 22 + 13 * (4 - len(columns))
        for flag, script in MADE_BY.items():  # a wrong name fails here, not after a training
            name = vars(args).get(flag)
            if name and read_config(name, script)["data"] != args.data:
                fail(f"{name} is a run on other data than {args.data}")
            if name and not Path(name, "model.pt").is_file():
                fail(f"the run in {name} is not finished, or made no model")
        config = new_config(args)
        self.config = read_config(args.resume, args.script) if args.resume else config
        self.folder = Path(args.resume) if args.resume else new_folder(args, config)
        self.command = shlex.join(
            ["python", f"{args.script}.py", "--resume", self.folder.as_posix()])
        if Run.advice is None:  # not of a training that the first run asked for, by trained()
            Run.advice = f"go on with: {self.command}"
        print(f"{data.name}, {len(data.x_train):,} training and {len(data.x_test):,} test images; "
              f"{args.device}; {config['machine']}; writing to {self.folder}", flush=True)
        changed = [key for key in ("source", "machine", "versions")
                   if self.config.get(key) != config[key]]
        if changed:
            print(f"warning: since this run began its {' and '.join(changed)} changed: its numbers "
                  "may not be those of an uninterrupted one", file=sys.stderr)

    def begin(self, part, epochs, model, **others):
        """Begin a part, or go on with it; returns the first of its epochs still to be trained.

        That is 1, or epochs + 1 for a part that is finished. If the part was begun before, model
        and others, whatever has a state_dict(), are changed here to what its checkpoint holds.
        end_epoch() saves them all, and keeps the best weights of the model.
        """
        things = {"model": model, **others}
        self.part, self.things, self.epochs = part, things, epochs
        self.checkpoint = self.folder / f"{re.sub('[^a-zA-Z0-9.+]+', '-', part)}.pt"
        self.rows, self.images, self.best = [], [], {}  # of this part
        if self.checkpoint.exists():
            rest = load_checkpoint(self.checkpoint, things)
            self.rows, self.images, self.best = rest["rows"], rest["images"], rest["best"]
        elif (self.folder / "metrics.json").exists():  # to train anew would destroy its numbers
            fail(f"{self.checkpoint} of a finished run is gone: start a new one")
        if not self.history:
            print("part".ljust(self.width), "   epoch", *(c.rjust(12) for c in self.columns),
                  "seconds", "   left")
        self.history += self.rows
        self.clock = time.perf_counter()
        return len(self.rows) + 1

    def end_epoch(self, score, images=None, **row):
        """Log the epoch's numbers, keep the best weights of the model, save what begin() restores.

        score: lower is better, on validation data. images: kept beside the row, in self.images.
        """
        epoch, seconds = len(self.rows) + 1, time.perf_counter() - self.clock
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} after epoch {epoch}")
        row = {"part": self.part, "epoch": epoch, **row, "seconds": seconds}
        self.rows.append(row)
        self.history.append(row)
        if images is not None:
            self.images.append(images.cpu())
        if not self.best or score < self.best["score"]:
            self.best = {"score": score, "epoch": epoch,  # state_dict() holds references: copy them
                         "model": copy.deepcopy(self.things["model"].state_dict())}
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in self.history]
        # before the checkpoint: a run that is killed in between trains this epoch again
        write(self.folder / "log.jsonl", "".join(lines).encode())
        save_checkpoint(self.checkpoint, self.things, rows=self.rows, images=self.images,
                        best=self.best)
        minutes, rest = divmod(round((self.epochs - epoch) * seconds), 60)
        numbers = [f"{row[c]:12.5g}" for c in self.columns]
        part = self.part[-self.width:].ljust(self.width)
        print(part, f"{epoch}/{self.epochs}".rjust(8), *numbers, f"{seconds:7.1f}",
              f"{minutes}:{rest:02}".rjust(7), flush=True)
        self.clock = time.perf_counter()

    def load_best(self, model):
        """Give the model the weights of the part's best epoch, by score; returns its numbers."""
        model.load_state_dict(self.best["model"])
        return self.rows[self.best["epoch"] - 1]

    def save(self, fig, name, caption):
        """Write a figure; caption: what to look for in it, for index.html."""
        fig.savefig(self.folder / f"{name}.png", dpi=DPI, bbox_inches="tight")  # cuts no label
        self.captions[name] = caption

    def finish(self, metrics, summary, model=None):
        """Write metrics.json and index.html, say the result; returns the metrics.

        metrics: config.json's content is added. summary: lines of text. model: the network that the
        figures show, for load_run().
        """
        if self.history:  # an "epochs" among the script's own metrics wins
            metrics = {"epochs": self.epochs, "seconds_per_epoch": statistics.median(
                row["seconds"] for row in self.history), **metrics}
        if model is not None:
            save_checkpoint(self.folder / "model.pt", {"model": model})
        metrics = {"folder": str(self.folder), "fast": self.args.fast, **metrics, **self.config}
        text = json.dumps(metrics, indent=2, allow_nan=False)  # nan and inf are no JSON
        write(self.folder / "metrics.json", f"{text}\n".encode())
        result = html.escape("\n".join(summary))
        figures = "".join(f'<h3>{name}</h3><p>{html.escape(caption)}</p><img src="{name}.png">'
                          for name, caption in sorted(self.captions.items()))  # fig01, fig02, ...
        page = f"""<!DOCTYPE html><meta charset="utf-8">
<title>{html.escape(self.folder.name)}</title><style>body {{max-width: 60em; margin: auto;
font-family: sans-serif}} img {{max-width: 100%}}</style>
<h2>{html.escape(self.config["command"])}</h2>
<pre>{result}</pre>{figures}
"""
        write(self.folder / "index.html", page.encode())
        print("", *summary, "", "figures, log.jsonl, metrics.json, and index.html with all of them:"
              f" to redraw them, {self.command}", self.folder, sep="\n", flush=True)
        return metrics


def table(rows):
    """Rows of cells as aligned lines of text; a float gets four digits, None stays empty."""
    def text(cell):
        return "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)

    cells = [[text(cell) for cell in row] for row in rows]
    first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))  # widths
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in cells]


def over_folds(folds):
    """The mean over folds, [{name: number} of each], of each number.

    Of several folds also spread and numbers: {"test_mse": mean, "test_mse_std": standard deviation,
    "fold_test_mse": [number of each fold]}.
    """
    metrics = {}
    for name in folds[0]:
        each = [fold[name] for fold in folds]
        metrics[name] = statistics.mean(each)
        if len(each) > 1:
            metrics |= {f"{name}_std": statistics.stdev(each), f"fold_{name}": each}
    return metrics


def load_run(folder, script, parse_args, build):
    """The network that a finished run shows: build(its flags), with its weights.

    parse_args, build: functions of the script. Exit 2 where another script made it, it is not
    finished, or its weights do not fit.
    """
    config, file = read_config(folder, script), Path(folder) / "model.pt"
    if not file.is_file():
        fail(f"the run in {folder} is not finished, or made no model")
    if config.get("source") != digest(script):
        print(f"warning: {script}.py has changed since it made {folder}", file=sys.stderr)
    model = build(parse_args([*config["argv"], "--device", "cpu"]))
    load_checkpoint(file, {"model": model})
    return model


def trained(script, args, minutes, flags=(), name=None):
    """Train what one chapter needs of another, by SCRIPT.py FLAGS, if it is not there; its folder.

    The folder is named after what it is (name, or else the script), the data, the seed, and code
    and command, as in runs/judge-fashion-seed0-1a2b3c; nothing else in runs/ is looked at: the same
    command gives the same numbers. args: the caller's, after load_data; minutes: how long it takes
    at most, to say so; flags: a list of words.
    """
    words = [*flags, "--data", args.data, "--seed", str(args.seed)]
    words += ["--fast"] if args.fast else []
    folder = Path("runs", f"{name or script}-{args.data}-seed{args.seed}-{digest(script, *words)}")
    if (folder / "metrics.json").exists():
        print(f"using {folder}")
        return str(folder)
    if (folder / "config.json").exists():
        print(f"{folder} is not finished: going on with it", flush=True)
        words = ["--resume", str(folder)]
    else:
        print(f"{folder} is not there yet: python {script}.py {shlex.join(words)} makes it, in "
              f"{'a few seconds' if args.fast else f'about {minutes} minutes'}", flush=True)
        words += ["--out-dir", str(folder)]
    # the scripts import this file, so that it can import them only here
    importlib.import_module(script).main([*words, "--data-dir", args.data_dir,
                                          "--device", args.device])
    return str(folder)


# --------------------------------------------------------------------------- plotting

DPI = 120  # pixels per inch of a figure's size
# petroff10: ten colours that the colour-blind can tell apart (Petroff, arXiv 2107.02270)
COLORS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
          "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")


def show_images(ax, x, columns):
    """Draw x (N, 1, 28, 28) as a grid, white on black, always on the scale 0 to 1."""
    ax.imshow(make_grid(x.cpu(), nrow=columns, padding=1, pad_value=0.5)[0].numpy(),
              cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])


def draw_rows(run, name, rows, columns, title, caption, names=()):
    """Images as rows {label: x (N, 1, 28, 28)}, one above the other; names: under the columns."""
    heights = [math.ceil(len(x) / columns) for x in rows.values()]
    fig = Figure(figsize=(0.62 * columns + 1.8, 0.64 * sum(heights) + 0.9), layout="constrained")
    axes = fig.subplots(len(rows), height_ratios=heights, squeeze=False)[:, 0]
    for ax, (label, x) in zip(axes, rows.items(), strict=True):
        show_images(ax, x, columns)
        ax.set_ylabel(label, rotation=0, ha="right", va="center")
    if names:
        centres = [15 + 29 * c for c in range(len(names))]  # 28 pixels, and 1 of a border
        axes[-1].set_xticks(centres, names, fontsize=7)
    fig.suptitle(title)
    run.save(fig, name, caption)


def draw_reconstructions(run, name, data, rows):
    """Figures 1, 2, 16: a test image of each class, ten at most, and what each model makes of it.

    rows: {label: (N, 1, 28, 28), an image for each test image}.
    """
    classes = data.y_test.unique().tolist()[:10]
    shown = [(data.y_test == c).nonzero()[0].item() for c in classes]
    draw_rows(run, name, {label: x[shown] for label, x in rows.items()}, len(shown),
              f"{data.name}, test images and their reconstructions",
              "Which details are lost? PCA is the best that a linear map can do.",
              [data.classes[c] for c in classes])


def plot_curves(run, name, rows, panels, title, caption, levels=None):
    """Curves over the epochs, from rows of log.jsonl. panels: {y label: keys}, two in a row.

    levels: {key: (label, value)}: a dashed line to compare the key's curve with.
    """
    down, across = math.ceil(len(panels) / 2), min(2, len(panels))
    fig = Figure(figsize=(5.5 * across, 4 * down), layout="constrained")
    for place, (ylabel, keys) in enumerate(panels.items(), start=1):
        ax = fig.add_subplot(down, across, place)
        for color, key in enumerate(keys):
            ax.plot([r["epoch"] for r in rows], [r[key] for r in rows], marker=".", label=key)
            if key in (levels or {}):
                label, value = levels[key]
                ax.axhline(value, color=f"C{color}", ls="--", label=label)
        ax.set(xlabel="epoch", ylabel=ylabel)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend()
    fig.suptitle(title)
    run.save(fig, name, caption)


def draw_ablation(run, variants, xlabel, title):
    """{variant: a value for each seed}: dots and a line at the mean, the lowest mean on top.

    The first variant is what all others change.
    """
    first = next(iter(variants))
    fig = Figure(figsize=(7, 0.4 * len(variants) + 1.3), layout="constrained")
    ax = fig.subplots()
    ax.axvspan(min(variants[first]), max(variants[first]), color="gray", alpha=0.2,
               label=f"seeds of {first}")
    order = sorted(variants, key=lambda name: -statistics.mean(variants[name]))
    for y, name in enumerate(order):
        ax.scatter(variants[name], [y] * len(variants[name]), alpha=0.6, color="C0")
        ax.plot([statistics.mean(variants[name])] * 2, [y - 0.3, y + 0.3], color="black")
    ax.set_yticks(range(len(order)), order)
    ax.set(xlabel=f"{xlabel} (line: mean)", title=title)
    values = [value for each in variants.values() for value in each]
    if max(values) > 10 * min(values):  # the worst would squeeze all others
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3, axis="x")
    ax.legend()
    run.save(fig, "ablation", f"Dots in the grey band could be seeds of {first}.")


def scatter(ax, points, y, classes):
    """points (N, 2) and y (N,), arrays, coloured by class; a legend belongs beside it.

    In random order: class after class, the last ones would hide the first.
    """
    order = np.random.default_rng(0).permutation(len(y))
    color = np.array([COLORS[c % len(COLORS)] for c in range(len(classes))])
    ax.scatter(*points[order].T, s=min(20, max(4, 6000 / len(y))), alpha=0.7, linewidths=0,
               c=color[y[order]])
    for c, label in enumerate(classes):
        ax.scatter([], [], s=4, color=color[c], label=label)  # for the legend only


def draw_latent(run, z, data, dims, numbers):
    """Figures 4 to 6 and 18 to 20; returns {"z", "tsne": 5-NN accuracy there}.

    They show, under these numbers, two dimensions of z (N, D), and all of them by PCA and by t-SNE.
    At most 3,000 points: t-SNE takes minutes for 10,000.
    """
    z, y = z[:3000].cpu().double().numpy(), data.y_test[:3000].cpu().numpy()
    tsne = TSNE(perplexity=min(30, (len(z) - 1) / 3), random_state=run.args.seed,
                init="pca" if np.ptp(z, axis=0).any() else "random"  # all alike: PCA divides by 0
                ).fit_transform(z)
    accuracy = {name: knn_accuracy(points, y)[0] for name, points in (("z", z), ("tsne", tsne))}
    maps = [("latent", z[:, dims], f"dimensions {dims[0]} and {dims[1]} of z", f"z[{dims[0]}]",
             f"z[{dims[1]}]", "Do two dimensions tell the classes apart?"),
            ("pca", PCA(2).fit_transform(z), f"PCA of all {z.shape[1]} dimensions of z",
             "first component", "second component", "The two directions of largest spread."),
            ("tsne", tsne, f"t-SNE of z, 5-NN accuracy {accuracy['tsne']:.2f}", "", "",
             "Which classes are neighbours? Distances between islands mean little.")]
    for number, (name, points, title, xlabel, ylabel, caption) in zip(numbers, maps, strict=True):
        fig = Figure(figsize=(7, 5), layout="constrained")
        ax = fig.subplots()
        scatter(ax, points, y, data.classes)
        ax.set(title=f"{data.name} test images: {title}", xlabel=xlabel, ylabel=ylabel)
        fig.legend(loc="outside right center", markerscale=4)
        run.save(fig, f"fig{number:02d}_{name}", caption)
    return accuracy
