"""What is pre-training worth when the labels are there, and when they are few?

Section 5 of the report: its four classifiers, confusion matrices, and what labels buy.

    python finetune.py                          all four models: table 3, figures 30 to 36
    python finetune.py --model cnn --folds 5    one of them; the judge of the GAN chapter
    python finetune.py --model ae --scratch     the same network without pre-training
    python finetune.py --model ae --train head  a linear probe: the encoder stays frozen
    python finetune.py --model resnet18-random --train all
                                                what ResNet18 can do when nothing is frozen
    python finetune.py --model ae --labels 100 1000 10000 48000 --epochs 6
                                                accuracy against the number of labels
    python finetune.py --recipe report          the report's own settings
    python finetune.py --fast                   smoke test in seconds

FashionMNIST test images, one split (results/finetune*): the encoder 90.8 %, ResNet18 with random
frozen layers 86.4 %, the CNN 93.0 %; standard error .3 %. All in 50 minutes on one core, beside
another run. Each run writes to a new folder in runs/.
"""

import argparse
import hashlib
import json
import math
import pickle
import socket
import statistics
import sys
import time
import zipfile
from http.client import HTTPException
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from torch.optim.swa_utils import update_bn
from torchvision.models import ResNet18_Weights
from torchvision.transforms.v2.functional import normalize

import ae
import common

# --------------------------------------------------------------------------- flags

# table 3 of the report: test accuracy in %, test loss, training seconds
TABLE3 = {"ae": (85.7, 0.410, 252), "resnet18": (85.9, 0.482, 371),
          "resnet18-random": (81.1, 0.602, 674), "cnn": (87.8, 0.318, None)}
RESNET = {"train": "last", "epochs": 4, "lr": 0.001, "weight_decay": 0.0, "augment": "shift"}
SETTINGS = {  # of each model, by recipe; flags go before them
    "best": {
        "ae": {"train": "all", "epochs": 80, "batch_size": 64, "lr": 0.008, "weight_decay": 0.0,
               "augment": "shift"},
        "resnet18": {**RESNET, "batch_size": 128}, "resnet18-random": {**RESNET, "batch_size": 128},
        # the larger the network, the more it takes to keep it from learning images by heart
        "cnn": {"train": "all", "epochs": 40, "batch_size": 128, "lr": 0.004,
                "weight_decay": 5e-5, "augment": "erase"}},
    # the report gives none for ResNet18: a guess. Its CNN saw each image once plain and once
    # augmented in an epoch, here only augmented
    "report": {
        "ae": {"train": "all", "epochs": 30, "batch_size": 48, "lr": 0.0001, "weight_decay": 5e-5},
        "resnet18": {**RESNET, "epochs": 10, "batch_size": 48},
        "resnet18-random": {**RESNET, "epochs": 10, "batch_size": 48},
        "cnn": {"train": "all", "epochs": 20, "batch_size": 300, "lr": 0.0085,
                "weight_decay": 5e-5}},
}
RECIPES = {"best": {}, "report": {"augment": "report"}}
# what --labels compares: name, --train, --scratch
METHODS = (("linear probe", "head", False), ("fine-tuned", "all", False), ("scratch", "all", True))
SEEDS = 3  # trainings of each, with other labelled images
EPOCH_IMAGES = 4800  # an epoch shows at least so many: 100 labelled images 48 times. So 75 steps of
# 64 images; with 48,000 labels 750: where labels are many, the steps are too


def parse_args(argv=None):
    parser = common.Parser(description=__doc__.partition("\n")[0])
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=("all", *TABLE3), default="all",
                       help="which one to train; all: table 3")
    group.add_argument("--train", choices=("all", "last", "head"),
                       help="what learns, the rest stays frozen (cnn learns as a whole). head: the "
                            "new linear layer, a linear probe; last: also the encoder's linear "
                            "layers, or ResNet18's last four modules (layer3, layer4, avgpool, "
                            "fc); None: as in the report, all of ae and last of ResNet18")
    group.add_argument("--scratch", action="store_true",
                       help="ae: start from random weights, not from the trained encoder")
    group.add_argument("--encoder", type=common.folder, metavar="DIR",
                       help="the run of ae.py that ae starts from; None: the newest of plain "
                            "`python ae.py` in runs/, trained first where there is none")
    group.add_argument("--weights", type=common.folder, metavar="FILE",
                       help="ImageNet weights for resnet18; None: torchvision downloads them")
    group.add_argument("--labels", type=common.number(int, 1, 60_000), nargs="+", metavar="N",
                       help="also train ae with only N labelled images: a linear probe, "
                            f"fine-tuned, and from scratch, {SEEDS} times each")
    group.add_argument("--mirror", action=argparse.BooleanOptionalAction,
                       help="in the test: mean of the logits of an image and of its mirror image; "
                            "None: if trained on both")
    common.add_flags(parser, RECIPES, epochs=None, batch_size=None, lr=None, augment=None)
    parser.epilog = "--epochs, --batch-size, --lr, --augment None: of each model, see SETTINGS"
    args = common.parse(parser, "finetune", argv, RECIPES, fast={"epochs": 2})
    if args.model == "cnn" and args.train not in (None, "all"):
        parser.error(f"--train {args.train}: all of cnn learns, nothing in it is pre-trained")
    if args.scratch and args.model not in ("all", "ae"):
        parser.error("--scratch is for --model ae (ResNet18: --model resnet18-random)")
    if args.weights and args.model not in ("all", "resnet18"):
        parser.error("--weights is for --model resnet18")
    if args.encoder and args.model not in ("all", "ae"):
        parser.error("--encoder is for --model ae")
    if args.labels and args.model not in ("all", "ae"):
        parser.error("--labels compares encoders: choose --model ae, or all")
    args.labels = sorted(set(args.labels or []))
    return args


# --------------------------------------------------------------------------- models


class EncoderClassifier(nn.Module):
    """x (B, 1, 28, 28) -> logits (B, 10): the encoder of ae.py and a linear layer."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.linear[-1].out_features, 10)

    def forward(self, x):
        return self.head(self.encoder(x))  # (B, D) -> (B, 10)


class ResNet18(nn.Module):
    """x (B, 1, 28, 28) -> logits (B, 10): torchvision's network with a new last layer.

    Made for 224x224 pixels, of which five halvings leave 7x7; 28 -> 14 -> 7 -> 4 -> 2 -> 1.
    """

    def __init__(self, state_dict=None):
        super().__init__()
        self.net = torchvision.models.resnet18()
        if state_dict is not None:
            self.net.load_state_dict(state_dict)
        self.net.fc = nn.Linear(512, 10)

    def forward(self, x):
        x = x.expand(-1, 3, -1, -1)  # (B, 3, 28, 28): grey is three equal colours
        # mean and spread of ImageNet's colours: its weights expect them taken out
        return self.net(normalize(x, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]))


class CNN(nn.Module):
    """x (B, 1, 28, 28) -> logits (B, 10): homework 1's network, 35/35 filters, 375/105 units."""

    def __init__(self):
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(1, 35, 3, padding=1), nn.BatchNorm2d(35), nn.ReLU(),
                                    nn.MaxPool2d(2))
        self.block2 = nn.Sequential(nn.Conv2d(35, 35, 3, padding=1), nn.BatchNorm2d(35), nn.ReLU(),
                                    nn.MaxPool2d(2))
        self.linear = nn.Sequential(nn.Flatten(), nn.Linear(35 * 7 * 7, 375), nn.ReLU(),
                                    nn.Dropout(0.4), nn.Linear(375, 105), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.4), nn.Linear(105, 10))

    def features(self, x):     # (B, 1, 28, 28)
        x = self.block1(x)     # (B, 35, 14, 14)
        x = self.block2(x)     # (B, 35, 7, 7)
        return self.linear(x)  # (B, 105), the last hidden layer: what the GAN's judge looks at

    def forward(self, x):
        return self.head(self.features(x))


def build(training, args, imagenet=None):
    """The model of one training. model.trained: its modules that learn; the others are frozen."""
    if training.name == "ae":
        encoder = (ae.load_run(args.encoder) if args.encoder else ae.Autoencoder()).encoder
        if training.scratch:  # the same layers with new weights and statistics
            for module in encoder.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        model = EncoderClassifier(encoder)
        head, last = [model.head], [encoder.linear, model.head]
    elif training.name == "cnn":
        model = CNN()
        head = last = None  # nothing to freeze
    else:
        model = ResNet18(imagenet)
        head, last = [model.net.fc], list(model.net.children())[-4:]
    model.trained = {"all": [model], "last": last, "head": head}[training.train]
    model.requires_grad_(False)
    for module in model.trained:
        module.requires_grad_(True)
    return model.to(args.device)


def imagenet_weights(args):
    """ResNet18's state_dict from --weights FILE, or from torchvision, which downloads it once.

    weights_only: a file cannot run code. LookupError, with the reason, where there are none.
    """
    weights = ResNet18_Weights.IMAGENET1K_V1
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        if not args.weights:
            if args.fast and not path.exists():
                raise OSError("--fast downloads nothing")
            socket.setdefaulttimeout(10)  # seconds without an answer: torch.hub waits for ever
            weights.get_state_dict(check_hash=True, weights_only=True, map_location="cpu")
            digest = path.stem.rpartition("-")[2]  # torch.hub does not look at a file it has
            if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
                raise ValueError("wrong content")
        file = args.weights or path
        if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
            raise ValueError("CRC mismatch")  # torch.load does not compare them
        state_dict = torch.load(file, map_location="cpu", weights_only=True)
        ResNet18(state_dict)  # does it fit?
        return state_dict
    except pickle.UnpicklingError:
        problem = "more than plain tensors, or damaged: refused, it could run code"
    except (OSError, HTTPException) as error:
        problem = error
    except Exception:  # whatever else garbage makes the readers raise
        problem = "damaged, or not of torchvision's ResNet18: " + (
            "name another" if args.weights else f"delete {path}")
    finally:
        socket.setdefaulttimeout(None)
    raise LookupError(f"no ImageNet weights in {args.weights or path.name}: {problem}")


# --------------------------------------------------------------------------- trainings


def plan(args, data):
    """The trainings, a Namespace each: the model, its settings, the indices of its images.

    Those of --labels have no validation part (val None) and keep their last weights: with 100
    labels, the 12,000 of a validation part would be the better training set.
    """
    def training(name, **more):
        flags = {f: getattr(args, f) for f in ("train", "epochs", "batch_size", "lr", "augment")}
        t = argparse.Namespace(**{
            **SETTINGS[args.recipe][name], **{f: v for f, v in flags.items() if v is not None},
            "name": name, "scratch": False, "seed": args.seed, "fold": 0,
            "optimizer": "adam", "schedule": "constant" if args.recipe == "report" else "onecycle",
            **more})
        t.mirror = t.augment in ("flip", "shift", "erase") if args.mirror is None else args.mirror
        if name == "cnn":
            t.train = "all"
        last = len(t.idx) % t.batch_size or t.batch_size  # images in the epoch's last batch
        if name.startswith("resnet") and t.train != "head" and last == 1:
            common.fail(f"--batch-size {t.batch_size} leaves a batch of one image, and ResNet18's "
                        "last BatchNorm has nothing to average there: take another")
        t.title = more.get("title", name + " from scratch" * t.scratch + {
            "all": "", "last": ", last layers trained", "head": ", linear probe"}[t.train])
        return t

    splits = common.splits(data.y_train, args.folds, args.seed)
    trainings = [training(name, fold=fold, idx=train, val=val,
                          scratch=args.scratch and name == "ae")
                 for name in (TABLE3 if args.model == "all" else [args.model])
                 for fold, (train, val) in enumerate(splits)]
    pool = splits[0][0]  # where the labelled images are taken from
    for n in args.labels:
        if not len(data.classes) <= n <= len(pool):
            common.fail(f"--labels {n}: it takes {len(data.classes)} to {len(pool)}, from an image "
                        "of each class to the training part")
        for method, train, scratch in METHODS:
            for seed in range(args.seed, args.seed + SEEDS):
                idx = pool[label_subset(data.y_train[pool], n, seed)]
                trainings.append(training(
                    "ae", idx=idx.repeat(math.ceil(EPOCH_IMAGES / n)), val=None, seed=seed,
                    labels=n, method=method, train=train, scratch=scratch,
                    title=f"{n} labels, {method}"))
    return trainings


def label_subset(y, n, seed):
    """n indices into y (N,): equally many of each class, and all those of any smaller n.

    Dealt like cards: one image of each class in turn.
    """
    y = y.cpu().numpy()
    order = np.random.default_rng(seed).permutation(len(y))
    by_class = [order[y[order] == c] for c in np.unique(y)]
    dealt = [i for turn in zip_longest(*by_class) for i in turn if i is not None]
    return torch.tensor(dealt[:n])


# --------------------------------------------------------------------------- training


def train_epoch(model, x, y, optimizer, schedule, training, generator):
    """One pass over x (N, 1, 28, 28), y (N,); returns the mean cross entropy in nats."""
    model.eval()  # what is frozen stays so: BatchNorm keeps its statistics, dropout is off
    for module in model.trained:
        module.train()
    total = 0.0
    for step, idx in enumerate(common.batches(len(x), training.batch_size, generator, x.device)):
        batch = common.augment(x[idx], training.augment, generator)

        logits = model(batch)
        loss = F.cross_entropy(logits, y[idx])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        total += common.finite(loss, step) * len(idx)
    return total / len(x)


def prepare(training, args, data, imagenet):
    """(model, optimizer, schedule, x, y) at the start of one training."""
    common.seed_everything(training.seed, training.fold)
    model = build(training, args, imagenet)
    x, y = data.x_train[training.idx], data.y_train[training.idx]
    if training.train != "all" and (training.scratch or training.name == "resnet18-random"):
        # frozen random layers would keep mean 0 and variance 1, which fit no data: measured once
        update_bn(x[:10_000].split(500), model)
    return model, *ae.make_optimizer(model, training, len(x)), x, y


def estimate(trainings, args, data, imagenet):
    """Seconds that all trainings will take, evaluation not counted, from a few steps of each."""
    per_image = {}
    for t in trainings:
        kind = t.name, t.train, t.batch_size
        if kind not in per_image:
            constant = argparse.Namespace(**{**vars(t), "schedule": "constant"})  # of any length
            model, optimizer, schedule, x, y = prepare(constant, args, data, imagenet)
            few = slice(0, 4 * t.batch_size)
            for _ in range(2):  # the first time is slower
                clock = time.perf_counter()
                train_epoch(model, x[few], y[few], optimizer, schedule, t, torch.Generator())
                per_image[kind] = (time.perf_counter() - clock) / len(x[few])
    return sum(per_image[t.name, t.train, t.batch_size] * len(t.idx) * t.epochs for t in trainings)


# --------------------------------------------------------------------------- evaluation


@torch.no_grad()
def predict(model, x, mirror=False):
    """Logits (N, 10) in evaluation mode, order kept; mirror: the mean with those of x.flip(3)."""
    model.eval()
    logits = common.in_batches(model, x)
    return (logits + predict(model, x.flip(3))) / 2 if mirror else logits


def score(logits, y):
    """(mean cross entropy in nats, accuracy from 0 to 1) of logits (N, 10) against y (N,)."""
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()


def evaluate(model, x, y):
    """(mean cross entropy in nats, accuracy from 0 to 1) over all of x (N, 1, 28, 28), y (N,)."""
    return score(predict(model, x), y)


def most_confused(matrix, classes, count=3):
    """[(true class, predicted class, images)], the largest off the diagonal of matrix (10, 10)."""
    errors = matrix - np.diag(np.diag(matrix))
    largest = np.argsort(-errors, axis=None, kind="stable")[:count]
    return [(classes[t], classes[p], int(errors[t, p]))
            for t, p in zip(*np.unravel_index(largest, errors.shape), strict=True)]


def load_judge(args):
    """The CNN of the newest run that has one, in evaluation mode; trained briefly if there is none.

    Of several folds the one with the lowest validation loss. args: the caller's, after load_data;
    args.judge names a run, or becomes the one that was taken.
    """
    args.judge = folder = common.find_or_train(
        sys.modules[__name__], args, ["--model", "cnn", "--epochs", "8"], args.judge, has_cnn=True)
    best = common.load_checkpoint(Path(folder) / "checkpoint.pt", "finetune")["best"]
    model = CNN()
    with common.reading(folder):
        cnn = json.loads((Path(folder) / "metrics.json").read_text())["models"]["cnn"]
        common.restore(model, best[cnn["part"]]["model"], folder)
        print(f"the judge: a CNN with {cnn['test_accuracy']:.1%} test accuracy")
    return model.to(args.device).eval()


# --------------------------------------------------------------------------- figures


def draw_model(folder, name, title, rows, matrix, data, logits):
    """Figures 30 to 36: curves and confusion matrix; and the most confident mistakes."""
    curves, confusion = {
        "ae": ("fig30_ae", "fig33_confusion_ae"),
        "resnet18": ("fig31_resnet18", "fig34_confusion_resnet18"),
        "resnet18-random": ("fig32_resnet18-random", "fig35_confusion_resnet18-random"),
        "cnn": ("cnn", "fig36_confusion_cnn")}[name]
    common.plot_curves(folder, curves, rows, {
        "accuracy": ("seen_accuracy", "val_accuracy"),
        "cross entropy, nats": ("seen_loss", "val_loss")}, f"{data.name}: {title}")

    fig = Figure(figsize=(6.5, 6.2), layout="constrained")
    ax = fig.subplots()
    ConfusionMatrixDisplay(matrix, display_labels=data.classes).plot(
        ax=ax, colorbar=False, cmap="Blues", xticks_rotation=45)
    ax.set(title=f"{data.name} test images, {title}: {matrix.trace() / matrix.sum():.1%} right",
           xlabel="predicted class", ylabel="true class")
    fig.savefig(folder / f"{confusion}.png", dpi=120)

    p, predicted = logits.softmax(1).max(1)
    wrong = (predicted != data.y_test).nonzero()[:, 0]
    wrong = wrong[p[wrong].argsort(descending=True)][:24].tolist()
    fig = Figure(figsize=(11, 5.8), layout="constrained")
    for ax in fig.subplots(3, 8).flat:
        ax.axis("off")
    for ax, i in zip(fig.axes, wrong, strict=False):
        common.show_images(ax, data.x_test[i:i + 1], columns=1)
        ax.set_title(f"{data.classes[data.y_test[i]]}, taken for\n{data.classes[predicted[i]]} "
                     f"{p[i]:.2f}", fontsize=8)
    fig.suptitle(f"{data.name} test images, {title}: its most confident mistakes")
    fig.savefig(folder / f"mistakes_{name}.png", dpi=120)


def draw_per_class(folder, models, data):
    """Accuracy of each class, a dot for each model."""
    fig = Figure(figsize=(8, 4), layout="constrained")
    ax = fig.subplots()
    for name, m in models.items():
        ax.plot(data.classes, [100 * a for a in m["per_class"]], "o", label=name, alpha=0.8)
    ax.tick_params(axis="x", rotation=25)
    ax.set(ylabel="test accuracy, %", title=f"{data.name}: which classes are hard")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(folder / "per_class.png", dpi=120)


def draw_label_efficiency(folder, efficiency, data_name):
    """Accuracy against the number of labels: where the curves part, pre-training pays.

    The bars are over labelled images and weights; the encoder, trained without labels on all
    images, is the same one each time.
    """
    fig = Figure(figsize=(7, 4.5), layout="constrained")
    ax = fig.subplots()
    for method, points in efficiency.items():
        ax.errorbar([int(n) for n in points], [100 * p["mean"] for p in points.values()],
                    [100 * p["std"] for p in points.values()], marker="o", capsize=4, label=method)
    ax.set(xscale="log", xlabel="labelled training images", ylabel="test accuracy, %",
           title=f"{data_name}: mean and standard deviation of {SEEDS} trainings")
    ax.set_xticks([int(n) for n in points], list(points))
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(folder / "label_efficiency.png", dpi=120)


def print_table(models, left_out):
    """Table 3, the report's numbers in brackets."""
    print(f"\n{'':16}{'test accuracy, %':>18}{'test loss':>16}{'training, s':>16}{'trained':>13}")
    for name, (accuracy, loss, seconds) in TABLE3.items():
        if m := models.get(name):
            print(f"{name:16}{100 * m['test_accuracy']:11.1f} ({accuracy}){m['test_loss']:9.3f}"
                  f" ({loss:.3f}){m['train_seconds']:9.0f} {f'({seconds})' if seconds else '':6}"
                  f"{m['trained_parameters']:>13,} of {m['parameters']:,} parameters")
        elif name in left_out:
            print(f"{name:16}left out: {left_out[name]}")


# --------------------------------------------------------------------------- main


def main(argv=None):
    """Train, test once, draw; returns the metrics as a dict."""
    args = parse_args(argv)
    data = common.load_data(args)
    trainings = dict(enumerate(plan(args, data)))  # numbered as in log and checkpoint
    begun = args.state["fold"] if args.state else -1
    imagenet, left_out = None, {}
    if any(t.name == "resnet18" and n > begun for n, t in trainings.items()):
        try:
            imagenet = imagenet_weights(args)
        except LookupError as problem:
            if args.model == "resnet18" or args.weights:
                common.fail(problem)
            left_out["resnet18"] = str(problem)
            print(f"table 3 goes without resnet18: {problem}")
    for n, t in list(trainings.items()):
        skip = n not in args.state["best"] if n <= begun else t.name in left_out
        if skip:  # now, or in the run that is resumed: what it trained has weights
            left_out.setdefault(t.name, "left out when this run began")
            del trainings[n]
    if any(t.name == "ae" and not t.scratch for t in trainings.values()):
        args.encoder = common.find_or_train(ae, args, [], args.encoder)

    with common.Run(args, data, select="val_loss") as run:
        todo = [t for n, t in trainings.items() if n > begun]
        print(f"{len(todo)} trainings to start, about "
              f"{estimate(todo, args, data, imagenet) / 60:.0f} minutes of training", flush=True)
        for n, t in trainings.items():
            model, optimizer, schedule, x, y = prepare(t, args, data, imagenet)
            for _, generator in run.epochs(n, (t.seed, t.fold), t.epochs, model=model,
                                           optimizer=optimizer, schedule=schedule):
                clock = time.perf_counter()
                train_loss = train_epoch(model, x, y, optimizer, schedule, t, generator)
                row = {"train_loss": train_loss, "seconds": time.perf_counter() - clock}
                if t.val is not None:  # both in evaluation mode, so that they compare
                    x_val, y_val = data.x_train[t.val], data.y_train[t.val]
                    row["seen_loss"], row["seen_accuracy"] = evaluate(
                        model, x[:len(x_val)], y[:len(x_val)])
                    row["val_loss"], row["val_accuracy"] = evaluate(model, x_val, y_val)
                run.end_epoch(model=t.title, **row)

        # the one look at the test set: the weights of the best validation epoch, or the last ones
        logits = {}
        for n, t in trainings.items():
            model = build(t, args)
            model.load_state_dict(run.best[n]["model"])
            logits[n] = predict(model, data.x_test, t.mirror)
            if t.mirror and t.val is not None:  # beside val_loss and val_accuracy: what it brings
                t.mirror_val_loss, t.mirror_val_accuracy = score(
                    predict(model, data.x_train[t.val], mirror=True), data.y_train[t.val])
            t.parameters = sum(p.numel() for p in model.parameters())
            t.trained_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        tests = {n: score(logits[n], data.y_test) for n in trainings}

        models = {}
        for name in TABLE3:
            folds = [n for n, t in trainings.items() if t.name == name and t.val is not None]
            if not folds:
                continue
            # the best fold is shown and kept: all but test_accuracy and test_loss, means over the
            # folds, is of this one
            n = min(folds, key=lambda n: run.best[n]["val_loss"])
            rows = [r for r in run.history if r["fold"] == n]
            best = rows[run.best[n]["epoch"] - 1]
            matrix = confusion_matrix(data.y_test.cpu().numpy(), logits[n].argmax(1).cpu().numpy(),
                                      labels=range(10))
            models[name] = {
                "test_accuracy": statistics.mean(tests[f][1] for f in folds),
                "test_loss": statistics.mean(tests[f][0] for f in folds),
                "train_seconds": sum(r["seconds"] for r in rows), "part": n,
                **{k: v for k, v in vars(trainings[n]).items() if k not in (
                    "name", "idx", "val", "seed", "fold", "optimizer")},
                "best_epoch": best["epoch"],
                **{k: v for k, v in best.items() if k.startswith(("seen_", "val_"))},
                "per_class": (matrix.diagonal() / matrix.sum(1)).tolist(),
                "confusion": matrix.tolist(),
                "most_confused": most_confused(matrix, data.classes)}
            if len(folds) > 1:
                each = [tests[f][1] for f in folds]
                models[name] |= {"fold_test_accuracy": each,
                                 "test_accuracy_std": statistics.stdev(each)}
            draw_model(run.folder, name, trainings[n].title, rows, matrix, data, logits[n])
        draw_per_class(run.folder, models, data)
        print_table(models, left_out)

        metrics = {"models": models, "left_out": left_out, "has_cnn": "cnn" in models,
                   "epochs": {name: m["epochs"] for name, m in models.items()}}
        if args.labels:
            efficiency = {method: {} for method, *_ in METHODS}
            for method, points in efficiency.items():
                for labels in args.labels:
                    each = [tests[n][1] for n, t in trainings.items()
                            if t.val is None and (t.method, t.labels) == (method, labels)]
                    points[str(labels)] = {"mean": statistics.mean(each),
                                           "std": statistics.stdev(each), "each": each}
            draw_label_efficiency(run.folder, efficiency, data.name)
            metrics["label_efficiency"] = efficiency
        return run.finish(metrics)


if __name__ == "__main__":
    common.start(main)


# --------------------------------------------------------------------------- exercises

# Predict first, then run. Answers, test accuracy: results/finetune*.
# 1. `--model ae --train head --epochs 10`: 390 weights learn, the encoder has never seen a label.
#    How far does it get? (79.0 %)
# 2. `--model ae --epochs 6 --augment KIND`, KIND shift, flip, none, report: no image in the test
#    set is upside down. Which one hurts? (87.6, 89.4, 89.3, 86.3 %: the last most. Shifts pay only
#    over many epochs: 90.8 % after 80)
# 3. `--model resnet18-random --train all --epochs 5`: what do layers cost that stay random?
#    (90.3 % in 5 epochs; with them frozen 86.4 % in 4)
# 4. Plant a bug: model.train() instead of the first three lines of train_epoch(). All looks well,
#    but BatchNorm's statistics move in what is frozen.
#    tests/test_finetune.py::test_frozen_means_bit_identical catches it.
