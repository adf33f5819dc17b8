"""What is pre-training worth when the labels are there, and when they are few?

Section 5 of the report: its four classifiers, confusion matrices, and what labels buy.

    python finetune.py                          all four models: table 3, figures 30 to 36
    python finetune.py --model cnn --folds 5    one of them; the judge of the GAN chapter
    python finetune.py --model ae --scratch     the same network without pre-training
    python finetune.py --model ae --train head  the encoder frozen, only the linear layer learns
    python finetune.py --model ae --labels 100 1000 10000 48000
                                                accuracy against the number of labels
    python finetune.py --recipe report          the report's own settings
    python finetune.py --fast                   smoke test in seconds
"""

import argparse
import json
import math
import pickle
import socket
import statistics
import time
from http.client import HTTPException
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
REPORT = {"ae": (85.7, 0.410, 252), "resnet18": (85.9, 0.482, 371),
          "resnet18-random": (81.1, 0.602, 674), "cnn": (87.8, 0.318, None)}
FIGURES = {"ae": ("fig30_ae", "fig33_confusion_ae"),  # curves, confusion matrix
           "resnet18": ("fig31_resnet18", "fig34_confusion_resnet18"),
           "resnet18-random": ("fig32_resnet18-random", "fig35_confusion_resnet18-random"),
           "cnn": ("cnn", "fig36_confusion_cnn")}
# how each model is trained: --train, --epochs, --batch-size, --lr and what has no flag
SETTINGS = {
    "best": {
        "ae": ("all", 30, 64, 0.01, 0.0, "onecycle"),
        "resnet18": ("last", 10, 128, 0.001, 0.0, "onecycle"),
        "resnet18-random": ("last", 10, 128, 0.001, 0.0, "onecycle"),
        "cnn": ("all", 25, 100, 0.004, 5e-5, "onecycle")},
    # its ResNets' settings are a guess: the report gives none
    "report": {
        "ae": ("all", 30, 48, 0.0001, 5e-5, "constant"),
        "resnet18": ("last", 10, 48, 0.001, 0.0, "constant"),
        "resnet18-random": ("last", 10, 48, 0.001, 0.0, "constant"),
        "cnn": ("all", 20, 300, 0.0085, 5e-5, "constant")},
}
RECIPES = {"best": {}, "report": {"augment": "report"}}
# what --labels compares: name, --train, --scratch
METHODS = (("frozen", "head", False), ("fine-tuned", "all", False), ("scratch", "all", True))
SEEDS = 3  # trainings of each, with other labelled images
EPOCH_IMAGES = 4800  # an epoch shows at least so many: 100 labelled images 48 times


def parse_args(argv=None):
    parser = common.Parser(description=__doc__.partition("\n")[0])
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=("all", *REPORT), default="all",
                       help="which one to train; all: table 3")
    group.add_argument("--train", choices=("all", "last", "head"),
                       help="what learns, the rest stays frozen. head: the new linear layer; last: "
                            "also the encoder's linear layers, or ResNet18's last four modules "
                            "(layer3, layer4, avgpool, fc); None: all of ae and cnn, last of "
                            "ResNet18, as in the report")
    group.add_argument("--scratch", action="store_true",
                       help="ae: start from random weights, not from the trained encoder")
    group.add_argument("--encoder", type=common.folder, metavar="DIR",
                       help="the run of ae.py that ae starts from; None: the newest with latent "
                            "dimension 38 in runs/, trained first where there is none")
    group.add_argument("--weights", metavar="FILE",
                       help="ImageNet weights for resnet18; None: torchvision downloads them")
    group.add_argument("--labels", type=common.number(int, 1, 60_000), nargs="+", metavar="N",
                       help="also train with only N labelled images: the encoder frozen, "
                            f"fine-tuned, and from scratch, {SEEDS} times each")
    common.add_flags(parser, RECIPES, epochs=None, batch_size=None, lr=None, augment="flip")
    args = common.parse(parser, "finetune", argv, RECIPES, fast={"epochs": 2})
    if args.model == "cnn" and args.train not in (None, "all"):
        parser.error(f"--train {args.train}: all of cnn learns, nothing in it is pre-trained")
    if args.scratch and args.model not in ("all", "ae"):
        parser.error("--scratch is for --model ae (ResNet18: --model resnet18-random)")
    if args.labels and args.model not in ("all", "ae"):
        parser.error("--labels compares encoders: choose --model ae")
    return args


# --------------------------------------------------------------------------- models


class EncoderClassifier(nn.Module):
    """x (B, 1, 28, 28) -> logits (B, 10): the encoder of ae.py and a linear layer."""

    def __init__(self, encoder, latent_dim):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(latent_dim, 10)

    def forward(self, x):
        return self.head(self.encoder(x))  # (B, D) -> (B, 10)


class ResNet18(nn.Module):
    """x (B, 1, 28, 28) -> logits (B, 10): torchvision's network with a new last layer.

    It was made for 224x224: of 28x28 pixels its fifth halving leaves one.
    """

    def __init__(self, state_dict=None):
        super().__init__()
        self.net = torchvision.models.resnet18()
        if state_dict is not None:
            self.net.load_state_dict(state_dict)
        self.net.fc = nn.Linear(512, 10)

    def forward(self, x):
        x = x.expand(-1, 3, -1, -1)  # (B, 3, 28, 28): grey is three equal colours
        return self.net(normalize(x, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]))


class CNN(nn.Module):
    """x (B, 1, 28, 28) -> logits (B, 10): homework 1's network, 35/35 filters, 375/105 units."""

    def __init__(self, dropout=0.4):
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(1, 35, 3, padding=1), nn.BatchNorm2d(35), nn.ReLU(),
                                    nn.MaxPool2d(2))
        self.block2 = nn.Sequential(nn.Conv2d(35, 35, 3, padding=1), nn.BatchNorm2d(35), nn.ReLU(),
                                    nn.MaxPool2d(2))
        self.linear = nn.Sequential(
            nn.Flatten(), nn.Linear(35 * 7 * 7, 375), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(375, 105), nn.ReLU())
        self.out = nn.Sequential(nn.Dropout(dropout), nn.Linear(105, 10))

    def features(self, x):     # (B, 1, 28, 28)
        x = self.block1(x)     # (B, 35, 14, 14)
        x = self.block2(x)     # (B, 35, 7, 7)
        return self.linear(x)  # (B, 105), the last hidden layer: what the GAN's judge looks at

    def forward(self, x):
        return self.out(self.features(x))


def build(part, args, imagenet):
    """(model, the list of its modules that learn) for one training; all others are frozen."""
    if part.name == "ae":
        autoencoder = ae.load_run(args.encoder) if args.encoder else ae.Autoencoder()
        encoder = autoencoder.encoder
        if part.scratch:
            for module in encoder.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        model = EncoderClassifier(encoder, encoder.linear[-1].out_features)
        head, last = [model.head], [encoder.linear, model.head]
    elif part.name == "cnn":
        model = CNN()
        head = last = []
    else:
        model = ResNet18(imagenet if part.name == "resnet18" else None)
        head, last = [model.net.fc], list(model.net.children())[-4:]
    trained = {"all": [model], "last": last, "head": head}[part.train]
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    return model.to(args.device), trained


def imagenet_weights(args):
    """ResNet18's state_dict from --weights FILE, or from torchvision, which downloads it once.

    weights_only: neither can run code. RuntimeError with the reason where they cannot be had.
    """
    source, name = args.weights, Path(ResNet18_Weights.IMAGENET1K_V1.url).name
    try:
        if source:
            state_dict = torch.load(source, map_location="cpu", weights_only=True)
        else:
            source = f"torchvision, {name}"
            if args.fast and not (Path(torch.hub.get_dir()) / "checkpoints" / name).exists():
                raise FileNotFoundError("--fast downloads nothing")
            socket.setdefaulttimeout(10)  # seconds without an answer; torch.hub sets none
            state_dict = ResNet18_Weights.IMAGENET1K_V1.get_state_dict(
                check_hash=True, weights_only=True, map_location="cpu")
        ResNet18(state_dict)
        return state_dict
    except pickle.UnpicklingError:
        problem = "it holds more than plain tensors, or is damaged: refused, it could run code"
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        problem = "it is damaged, or not of torchvision's ResNet18"
    except (OSError, EOFError, HTTPException) as error:
        problem = error
    raise LookupError(f"no ImageNet weights from {source} ({problem})")


# --------------------------------------------------------------------------- trainings


def plan(args, data):
    """One Namespace for each training: its model, seed, images, settings.

    Without a validation part (val None) a training keeps its last weights: with 100 labels, the
    12,000 of a validation part would be the better training set.
    """
    def part(name, **more):
        flags = ("train", "epochs", "batch_size", "lr")
        values = dict(zip((*flags, "weight_decay", "schedule"), SETTINGS[args.recipe][name],
                          strict=True))
        values |= {f: getattr(args, f) for f in flags if getattr(args, f) is not None}
        if name == "cnn":
            values["train"] = "all"
        values |= {"name": name, "title": f"{name}, {values['train']} trained",
                   "optimizer": "adam", "augment": args.augment, "seed": args.seed, "fold": 0,
                   "scratch": False, **more}
        if name.startswith("resnet18") and (len(values["idx"]) - 1) % values["batch_size"] == 0:
            common.fail(f"--batch-size {values['batch_size']} leaves a batch of one image, and "
                        "ResNet18's last BatchNorm has nothing to average there: take another")
        return argparse.Namespace(**values)

    splits = common.splits(data.y_train, args.folds, args.seed)
    parts = [part(name, fold=fold, idx=train, val=val, scratch=args.scratch and name == "ae")
             for name in ([args.model] if args.model != "all" else REPORT)
             for fold, (train, val) in enumerate(splits)]
    pool = splits[0][0]  # where the labelled images are taken from
    for n in args.labels or []:
        if not len(data.classes) <= n <= len(pool):
            common.fail(f"--labels {n}: it takes {len(data.classes)} to {len(pool)}, from an image "
                        "of each class to the training part")
        for method, train, scratch in METHODS:
            for seed in range(args.seed, args.seed + SEEDS):
                idx = pool[label_subset(data.y_train[pool], n, seed)]
                repeats = math.ceil(EPOCH_IMAGES / n)
                parts.append(part("ae", idx=idx.repeat(repeats), val=None, seed=seed, labels=n,
                                  method=method, train=train, scratch=scratch,
                                  title=f"{n} labels, encoder {method}"))
    return parts


def label_subset(y, n, seed):
    """n indices into y (N,): equally many of each class, and those of a smaller n among them."""
    y = y.cpu().numpy()
    order = np.random.default_rng(seed).permutation(len(y))
    rank = np.empty(len(y), int)  # the first of its class in this order, the second, ...
    for c in np.unique(y):
        mine = order[y[order] == c]
        rank[mine] = np.arange(len(mine))
    return torch.tensor(order[np.argsort(rank[order], kind="stable")[:n]])


# --------------------------------------------------------------------------- training


def train_epoch(model, trained, x, y, optimizer, schedule, part, generator):
    """One pass over x (N, 1, 28, 28), y (N,); returns the mean cross entropy in nats."""
    model.eval()  # what is frozen stays so: BatchNorm keeps its statistics, dropout is off
    for module in trained:
        module.train()
    total = 0.0
    for step, idx in enumerate(common.batches(len(x), part.batch_size, generator, x.device)):
        batch = common.augment(x[idx], part.augment, generator)

        logits = model(batch)
        loss = F.cross_entropy(logits, y[idx])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        total += common.finite(loss, step) * len(idx)
    return total / len(x)


def prepare(part, args, data, imagenet):
    """(model, trained, optimizer, schedule, x, y) at the start of one training."""
    common.seed_everything(part.seed, part.fold)
    model, trained = build(part, args, imagenet)
    x, y = data.x_train[part.idx], data.y_train[part.idx]
    if part.train != "all" and (part.scratch or part.name == "resnet18-random"):
        # random weights come without BatchNorm statistics: calibrated once, then frozen too
        update_bn(x[:10_000].split(500), model)
    optimizer, schedule = ae.make_optimizer(model, part, len(x))
    return model, trained, optimizer, schedule, x, y


def estimate(parts, args, data, imagenet):
    """Seconds that all trainings will take, from a few steps of each kind."""
    per_image = {}
    for part in parts:
        kind = part.name, part.train, part.batch_size
        if kind not in per_image:
            model, trained, optimizer, schedule, x, y = prepare(part, args, data, imagenet)
            few = slice(0, 4 * part.batch_size)
            for _ in range(2):  # the first time is slower
                clock = time.perf_counter()
                train_epoch(model, trained, x[few], y[few], optimizer, schedule, part,
                            torch.Generator())
                per_image[kind] = (time.perf_counter() - clock) / len(x[few])
    return sum(per_image[p.name, p.train, p.batch_size] * len(p.idx) * p.epochs for p in parts)


# --------------------------------------------------------------------------- evaluation


@torch.no_grad()
def predict(model, x):
    """Logits (N, 10) in evaluation mode, order kept."""
    model.eval()
    return torch.cat([model(batch) for batch in x.split(500)])


def evaluate(model, x, y):
    """(mean cross entropy in nats, accuracy from 0 to 1) over all of x (N, 1, 28, 28), y (N,)."""
    logits = predict(model, x)
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()


def most_confused(matrix, classes, count=3):
    """[(true class, predicted class, images)], the largest off the diagonal of matrix (10, 10)."""
    errors = matrix - np.diag(np.diag(matrix))
    largest = np.argsort(-errors, axis=None, kind="stable")[:count]
    return [(classes[t], classes[p], int(errors[t, p]))
            for t, p in zip(*np.unravel_index(largest, errors.shape), strict=True)]


def load_judge(args):
    """The CNN of the newest run that has one, in evaluation mode; trained first if there is none.

    Of several folds the one with the lowest validation loss. args: the flags of the calling script;
    with --fast a --fast judge is trained in any case.
    """
    folder = None if args.fast else common.find_run("finetune", args.data, has_cnn=True)
    if not folder:
        flags = ["--fast"] if args.fast else ["--epochs", "8"]
        print(f"no run of finetune.py has a CNN yet: training one, {' '.join(flags)}", flush=True)
        folder = main([*flags, "--model", "cnn", "--data", args.data, "--data-dir", args.data_dir,
                       "--seed", str(args.seed), "--device", args.device])["folder"]
    best = common.load_checkpoint(Path(folder) / "checkpoint.pt", "finetune")["best"]
    part = json.loads((Path(folder) / "metrics.json").read_text())["models"]["cnn"]["part"]
    model = CNN()
    model.load_state_dict(best[part]["model"])
    return model.to(args.device).eval()


# --------------------------------------------------------------------------- figures


def draw_confusion(folder, name, matrix, title, classes):
    """Figures 33 to 36: a row for each true class, a column for each predicted one."""
    fig = Figure(figsize=(6.5, 6.2), layout="constrained")
    ax = fig.subplots()
    ConfusionMatrixDisplay(matrix, display_labels=classes).plot(
        ax=ax, colorbar=False, cmap="Blues", xticks_rotation=45)
    ax.set(title=title, xlabel="predicted class", ylabel="true class")
    fig.savefig(folder / f"{name}.png", dpi=120)


def draw_mistakes(folder, name, data, logits, title):
    """The 24 test images that a model gets wrong with the highest probability."""
    p, predicted = logits.softmax(1).max(1)
    wrong = (predicted != data.y_test).nonzero()[:, 0]
    wrong = wrong[p[wrong].argsort(descending=True)][:24].tolist()
    fig = Figure(figsize=(11, 6.2), layout="constrained")
    for ax in fig.subplots(3, 8).flat:
        ax.axis("off")
    for ax, i in zip(fig.axes, wrong, strict=False):
        common.show_images(ax, data.x_test[i:i + 1], columns=1)
        ax.set_title(f"{data.classes[data.y_test[i]]}, taken for\n{data.classes[predicted[i]]} "
                     f"{p[i]:.2f}", fontsize=8)
    fig.suptitle(title)
    fig.savefig(folder / f"{name}.png", dpi=120)


def draw_per_class(folder, models, data):
    """Accuracy of each class, a bar for each model."""
    fig = Figure(figsize=(10, 4), layout="constrained")
    ax = fig.subplots()
    width = 0.8 / len(models)
    for i, (name, m) in enumerate(models.items()):
        ax.bar(np.arange(10) + i * width, [100 * a for a in m["per_class"]], width, label=name)
    ax.set_xticks(np.arange(10) + 0.4 - width / 2, data.classes, rotation=20)
    ax.set(ylabel="test accuracy, %", title=f"{data.name}: which classes are hard")
    ax.set_ylim(bottom=min(90 * min(m["per_class"]) for m in models.values()), top=100)
    fig.legend(loc="outside right center")
    fig.savefig(folder / "per_class.png", dpi=120)


def draw_labels(folder, efficiency, data_name):
    """Accuracy against the number of labelled images: where the curves part, pre-training pays."""
    fig = Figure(figsize=(7, 4.5), layout="constrained")
    ax = fig.subplots()
    for method, points in efficiency.items():
        ax.errorbar([int(n) for n in points], [100 * p["mean"] for p in points.values()],
                    [100 * p["std"] for p in points.values()], marker="o", capsize=4, label=method)
    ax.set(xscale="log", xlabel="labelled training images", ylabel="test accuracy, %",
           title=f"{data_name}: mean and standard deviation of {SEEDS} trainings")
    ax.grid(alpha=0.3)
    ax.legend(title="encoder")
    fig.savefig(folder / "label_efficiency.png", dpi=120)


def print_table(models, left_out):
    """Table 3, with the report's numbers beside ours."""
    print(f"\n{'':16}{'test accuracy, %':>18}{'test loss':>16}{'training, s':>16}{'parameters':>26}"
          f"\n{'':16}{'here  report':>18}" + f"{'here  report':>16}" * 2 + f"{'trained / all':>26}")
    for name, (accuracy, loss, seconds) in REPORT.items():
        if m := models.get(name):
            print(f"{name:16}{100 * m['test_accuracy']:10.1f}{accuracy:8.1f}{m['test_loss']:8.3f}"
                  f"{loss:8.3f}{m['train_seconds']:8.0f}{seconds or '-':>8}"
                  f"{m['trained_parameters']:>13,} / {m['parameters']:,}")
        elif name in left_out:
            print(f"{name:16}left out: {left_out[name]}")


# --------------------------------------------------------------------------- main


def find_encoder(args):
    """The folder of the run of ae.py to start from; trained first where there is none."""
    latent = {} if args.encoder else {"latent_dim": 38}
    folder = None if args.fast and not args.encoder else common.find_run(
        "ae", args.data, args.encoder, **latent)
    if not folder:
        print("no run of ae.py to start from: training one, about 5 minutes", flush=True)
        flags = ["--fast"] if args.fast else []
        folder = ae.main([*flags, "--data", args.data, "--data-dir", args.data_dir,
                          "--seed", str(args.seed), "--device", args.device])["folder"]
    return str(folder)


def main(argv=None):
    """Train, test once, draw; returns the metrics as a dict."""
    args = parse_args(argv)
    data = common.load_data(args)
    parts = plan(args, data)
    imagenet, left_out = None, {}
    if args.model in ("all", "resnet18"):
        try:
            imagenet = imagenet_weights(args)
        except LookupError as problem:
            if args.model == "resnet18" or args.weights:
                common.fail(problem)
            left_out["resnet18"] = str(problem)
            print(f"table 3 goes without resnet18: {problem}")
    if any(part.name == "ae" and not part.scratch for part in parts):
        args.encoder = find_encoder(args)
    numbered = [(n, part) for n, part in enumerate(parts) if part.name not in left_out]

    with common.Run(args, data, select="val_loss") as run:
        todo = [part for n, part in numbered if not run.state or n > run.state["fold"]]
        print(f"{len(todo)} trainings, "
              f"about {estimate(todo, args, data, imagenet) / 60:.0f} minutes", flush=True)
        for n, part in numbered:
            model, trained, optimizer, schedule, x, y = prepare(part, args, data, imagenet)
            for _, generator in run.epochs(n, (part.seed, part.fold), part.epochs, model=model,
                                           optimizer=optimizer, schedule=schedule):
                clock = time.perf_counter()
                train_loss = train_epoch(model, trained, x, y, optimizer, schedule, part, generator)
                row = {"seconds": time.perf_counter() - clock}
                if part.val is not None:  # both in evaluation mode, so that they compare
                    x_val, y_val = data.x_train[part.val], data.y_train[part.val]
                    row["seen_loss"], row["seen_accuracy"] = evaluate(
                        model, x[:len(x_val)], y[:len(x_val)])
                    row["val_loss"], row["val_accuracy"] = evaluate(model, x_val, y_val)
                run.end_epoch(model=part.title, train_loss=train_loss, **row)

        # the one look at the test set, with each training's weights of its best validation epoch
        logits = {}
        for n, part in numbered:
            model, trained = build(part, args, imagenet)
            model.load_state_dict(run.best[n]["model"])
            logits[n] = predict(model, data.x_test)
            part.parameters = sum(p.numel() for p in model.parameters())
            part.trained_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)

        models, efficiency = {}, {}
        y_test = data.y_test.cpu().numpy()

        def accuracy(n):
            return (logits[n].argmax(1) == data.y_test).float().mean().item()

        for name in REPORT:
            folds = [n for n, part in numbered if part.name == name and part.val is not None]
            if not folds:
                continue
            n = min(folds, key=lambda n: run.best[n]["val_loss"])  # shown: the best fold
            rows = [r for r in run.history if r["fold"] == n]
            matrix = confusion_matrix(y_test, logits[n].argmax(1).cpu().numpy(), labels=range(10))
            models[name] = {
                "test_accuracy": accuracy(n),
                "test_loss": F.cross_entropy(logits[n], data.y_test).item(),
                "train_seconds": sum(r["seconds"] for r in rows),
                **{k: getattr(parts[n], k) for k in (
                    "parameters", "trained_parameters", "train", "scratch", "epochs", "batch_size",
                    "lr", "weight_decay", "schedule")},
                "part": n, "best_epoch": run.best[n]["epoch"],
                **{k: rows[run.best[n]["epoch"] - 1][k] for k in (
                    "seen_loss", "seen_accuracy", "val_loss", "val_accuracy")},
                "per_class": (matrix.diagonal() / matrix.sum(1)).tolist(),
                "confusion": matrix.tolist(),
                "most_confused": most_confused(matrix, data.classes)}
            if len(folds) > 1:
                each = [accuracy(fold) for fold in folds]
                models[name] |= {"fold_test_accuracy": each, "mean": statistics.mean(each),
                                 "std": statistics.stdev(each)}
            title = f"{data.name} test images, {parts[n].title}"
            curves, confusion = FIGURES[name]
            common.plot_curves(run.folder, curves, rows, {
                "accuracy": ("seen_accuracy", "val_accuracy"),
                "cross entropy, nats": ("seen_loss", "val_loss")}, f"{data.name}: {parts[n].title}")
            draw_confusion(run.folder, confusion, matrix,
                           f"{title}: {100 * accuracy(n):.1f} % right", data.classes)
            draw_mistakes(run.folder, f"mistakes_{name}", data, logits[n],
                          f"{title}: its most confident mistakes")
        draw_per_class(run.folder, models, data)
        print_table(models, left_out)

        metrics = {"models": models, "left_out": left_out, "has_cnn": "cnn" in models}
        if args.labels:
            for method, *_ in METHODS:
                efficiency[method] = {}
                for labels in args.labels:
                    each = [accuracy(n) for n, part in numbered
                            if part.val is None and (part.method, part.labels) == (method, labels)]
                    efficiency[method][str(labels)] = {
                        "mean": statistics.mean(each), "std": statistics.stdev(each), "each": each}
            draw_labels(run.folder, efficiency, data.name)
            metrics["label_efficiency"] = efficiency
        return run.finish(metrics)


if __name__ == "__main__":
    common.start(main)
