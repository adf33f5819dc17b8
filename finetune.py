"""What is pre-training worth when the labels are there, and when they are few?

Section 5 of the report: its four classifiers, confusion matrices, and what labels buy.

    python finetune.py                          all four models: table 3, figures 30 to 36
    python finetune.py --model cnn --folds 5    one of them, with cross validation
    python finetune.py --model ae --scratch     the same network without pre-training
    python finetune.py --model ae --train head  a linear probe: the encoder stays frozen
    python finetune.py --model resnet18-random --train all
                                                what ResNet18 can do when nothing is frozen
    python finetune.py --labels 100 1000 10000
                                                accuracy against the number of labels
    python finetune.py --transfer               half of the classes first: do they help the others?
    python finetune.py --recipe report          the report's own settings
    python finetune.py --fast                   smoke test in seconds

FashionMNIST test images, three seeds (results/finetune*): the encoder 91.2 %, ResNet18 with random
frozen layers 86.1 %, the CNN 93.1 %; standard error over images .3 %. All in an hour on one core,
beside another run. Each run writes to a new folder in runs/.
"""

import argparse
import math
import statistics
from collections import defaultdict
from functools import partial
from itertools import zip_longest

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.optim.swa_utils import update_bn
from torchvision.models import ResNet18_Weights
from torchvision.transforms.v2.functional import normalize

import ae
import common
import vae

# --------------------------------------------------------------------------- flags

# table 3 of the report: test accuracy in %, test loss, training seconds
TABLE3 = {"ae": (85.7, 0.410, 252), "resnet18": (85.9, 0.482, 371),
          "resnet18-random": (81.1, 0.602, 674), "cnn": (87.8, 0.318, None)}
RESNET = {"train": "last", "epochs": 4, "batch_size": 128, "lr": 0.001, "weight_decay": 0.0,
          "augment": "shift"}
SETTINGS = {  # by recipe and model; a flag that is given wins over them
    "best": {
        "ae": {"train": "all", "epochs": 80, "batch_size": 64, "lr": 0.008, "weight_decay": 0.0,
               "augment": "shift"},
        "resnet18": RESNET, "resnet18-random": RESNET,
        # of many weights: it takes more to keep it from learning images by heart
        "cnn": {"train": "all", "epochs": 40, "batch_size": 128, "lr": 0.004,
                "weight_decay": 5e-5, "augment": "erase"}},
    # the report gives none for ResNet18: a guess. Its CNN saw each image once plain and once
    # augmented in an epoch, here only augmented
    "report": {
        "ae": {"train": "all", "epochs": 30, "batch_size": 48, "lr": 0.0001, "weight_decay": 5e-5,
               "augment": "report"},
        "resnet18": {**RESNET, "epochs": 10, "batch_size": 48, "augment": "report"},
        "resnet18-random": {**RESNET, "epochs": 10, "batch_size": 48, "augment": "report"},
        "cnn": {"train": "all", "epochs": 20, "batch_size": 300, "lr": 0.0085,
                "weight_decay": 5e-5, "augment": "report"}},
}
# --labels and --transfer take only these flags, beside those of every run
MODES = {"labels": ("epochs", "batch_size", "encoder"), "transfer": ("epochs",)}


def defaults(args):
    """{flag: default} where --fast or a mode changes it; see defaults in ae.py."""
    if args.fast:
        return {"epochs": 2}
    return {"epochs": 10} if args.labels else {"epochs": 3} if args.transfer else {}


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    group = parser.add_argument_group("what to turn first")
    group.add_argument("--model", choices=("all", *TABLE3), default="all",
                       help="which one to train; all: table 3")
    group.add_argument("--train", choices=("all", "last", "head"),
                       help="what learns, the rest stays frozen (cnn learns as a whole). head: the "
                            "new linear layer, a linear probe; last: also the encoder's linear "
                            "layers, or ResNet18's layer3 and layer4; without it all of ae "
                            "and last of ResNet18, as in the report")
    group.add_argument("--scratch", action="store_true",
                       help="ae: start from random weights, not from the trained encoder")
    group.add_argument("--labels", type=common.number(int, 1, 60_000), nargs="+", metavar="N",
                       help="what N labelled images are worth to a classifier on the encoder's "
                            "codes, to the fine-tuned encoder, and from scratch; three times each")
    group.add_argument("--transfer", action="store_true",
                       help="does the CNN, trained on half of the classes, learn the other half "
                            "from fewer labels? three times each")
    group = parser.add_argument_group("models")
    group.add_argument("--encoder", metavar="DIR",
                       help="the run of ae.py that ae starts from; without it that of plain "
                            "`python ae.py`, made first where it is not there")
    group.add_argument("--weights", metavar="FILE",
                       help="ImageNet weights for resnet18; without it torchvision downloads them")
    group.add_argument("--mirror", action=argparse.BooleanOptionalAction,
                       help="in the test: mean of the logits of an image and of its mirror image; "
                            "without it: if trained on both")
    common.add_training_flags(parser, SETTINGS, epochs=None, batch_size=None, lr=None, augment=None)
    parser.epilog = "--epochs, --batch-size, --lr, --augment: without them see SETTINGS"
    args = common.parse(parser, "finetune", argv, defaults, MODES)
    for flag, models in {"train": ("all", "ae", "resnet18", "resnet18-random"),
                         "scratch": ("all", "ae"), "encoder": ("all", "ae"),
                         "weights": ("all", "resnet18")}.items():
        if getattr(args, flag) and args.model not in models:
            parser.error(f"--{flag} does nothing for --model {args.model}")
    return args


def settings(args, name):
    """The flags of one model, by its name: its SETTINGS where args has None.

    None: you did not type that flag, and defaults() above does not set it. Also what
    ae.make_optimizer asks for, optimizer and schedule, and a title.
    """
    decided = {flag: value for flag, value in vars(args).items() if value is not None}
    flags = common.with_flags(args, **{**SETTINGS[args.recipe][name], **decided})
    flags.model, flags.optimizer = name, "adam"
    flags.schedule = "onecycle" if args.recipe == "best" else "constant"
    flags.scratch = args.scratch and name == "ae"
    if name == "cnn":
        flags.train = "all"  # nothing to freeze
    if args.mirror is None:  # test on both views if trained on both
        flags.mirror = flags.augment in ("flip", "shift", "erase")
    flags.title = name + (" from scratch" if flags.scratch else "") + {
        "all": "", "last": ", last layers trained", "head": ", linear probe"}[flags.train]
    return flags


# --------------------------------------------------------------------------- model


class EncoderClassifier(nn.Module):
    """x (B, 1, 28, 28) -> logits (B, C): the encoder of ae.py and a linear layer."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.linear[-1].out_features, classes)

    def features(self, x):
        return self.encoder(x)  # (B, D)

    def forward(self, x):
        return self.head(self.features(x))


class ResNet18(nn.Module):
    """x (B, 1, 28, 28) -> logits (B, C): torchvision's network with a new last layer.

    Made for 224x224 pixels, of which five halvings leave 7x7; 28 -> 14 -> 7 -> 4 -> 2 -> 1.
    """

    def __init__(self, classes):
        super().__init__()
        self.net = torchvision.models.resnet18()
        self.net.fc = nn.Identity()  # it told ImageNet's 1,000 classes apart
        self.head = nn.Linear(512, classes)

    def features(self, x):
        x = x.expand(-1, 3, -1, -1)  # (B, 3, 28, 28): grey is three equal colours
        # mean and spread of ImageNet's colours: its weights expect them taken out
        return self.net(normalize(x, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]))

    def forward(self, x):
        return self.head(self.features(x))  # (B, 512) -> (B, C)


class CNN(nn.Module):
    """x (B, 1, 28, 28) -> logits (B, C): homework 1's network, 35/35 filters, 375/105 units."""

    def __init__(self, classes):
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(1, 35, 3, padding=1), nn.BatchNorm2d(35), nn.ReLU(),
                                    nn.MaxPool2d(2))
        self.block2 = nn.Sequential(nn.Conv2d(35, 35, 3, padding=1), nn.BatchNorm2d(35), nn.ReLU(),
                                    nn.MaxPool2d(2))
        self.linear = nn.Sequential(nn.Flatten(), nn.Linear(35 * 7 * 7, 375), nn.ReLU(),
                                    nn.Dropout(0.4), nn.Linear(375, 105), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.4), nn.Linear(105, classes))

    def features(self, x):     # (B, 1, 28, 28)
        x = self.block1(x)     # (B, 35, 14, 14)
        x = self.block2(x)     # (B, 35, 7, 7)
        return self.linear(x)  # (B, 105), the last hidden layer: what the GAN's judge looks at

    def forward(self, x):
        return self.head(self.features(x))


def build(args, classes, weights=None):
    """The network of args.model. weights: {name: tensor} to start from, of ImageNet or others.

    model.learning: its modules that learn, for train_epoch; the others are frozen.
    """
    if args.model == "ae":
        net = ae.load_run(args.encoder) if args.encoder else ae.Autoencoder()
        encoder = net.encoder
        if args.scratch:  # keep the sizes of its layers, forget what they learned
            for module in encoder.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        model = EncoderClassifier(encoder, classes)
        last = [encoder.linear, model.head]
    elif args.model == "cnn":
        model, last = CNN(classes), None  # as a whole
    else:
        model = ResNet18(classes)
        last = [model.net.layer3, model.net.layer4, model.head]
    # a plain list, of which torch makes no submodules
    model.learning = {"all": [model], "last": last, "head": [model.head]}[args.train]
    if weights is not None:  # they lack the last layer, which stays random
        model.load_state_dict({**model.state_dict(), **weights})
    model.requires_grad_(False)
    for module in model.learning:
        module.requires_grad_(True)
    return model.to(args.device)


def imagenet_weights(args):
    """ResNet18's weights but for its last layer, from --weights FILE or downloaded once.

    LookupError, with the reason, where there are none.
    """
    published = ResNet18_Weights.IMAGENET1K_V1
    if args.fast and not args.weights:
        raise LookupError("--fast downloads no ImageNet weights: name a file by --weights")
    try:
        state_dict = (common.load_tensors(args.weights) if args.weights else
                      published.get_state_dict(check_hash=True, weights_only=True))
        torchvision.models.resnet18().load_state_dict(state_dict)  # an error if others
        return {f"net.{k}": v for k, v in state_dict.items() if not k.startswith("fc.")}
    except Exception as error:  # whatever a network and damaged files make of it
        raise LookupError(f"no ImageNet weights in {args.weights or published.url} ("
                          f"{type(error).__name__}: {str(error)[:200]})") from error


# --------------------------------------------------------------------------- training


def train_epoch(model, x, y, optimizer, schedule, args, rng):
    """One pass over x (N, 1, 28, 28), y (N,); returns the mean cross entropy in nats."""
    model.eval()  # what is frozen stays so: BatchNorm keeps its statistics, dropout is off
    for module in model.learning:
        module.train()
    total = 0.0
    for idx in common.batches(x, args.batch_size, rng):
        batch = common.augment(x[idx], args.augment, rng)

        logits = model(batch)
        loss = F.cross_entropy(logits, y[idx])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        total += loss.detach() * len(idx)
    return total.item() / len(x)


def fit(args, run, part, seeds, train, val, classes, weights=None, by_accuracy=False):
    """Train args.model as one part of the run.

    train, val: (x, y) each. seeds: numbers that, with the epoch, decide every draw. weights: see
    build. Returns the network of the epoch with the lowest validation loss, or with the highest
    accuracy, and the numbers of all epochs as a list of dicts.
    """
    common.seed_everything(*seeds)
    (x, y), (x_val, y_val) = train, val
    model = build(args, classes, weights)
    if args.train != "all" and (args.scratch or args.model == "resnet18-random"):
        # BatchNorm in frozen layers never trains: its mean and variance would stay 0 and 1, but
        # what random layers make of the data has others. update_bn measures them, over 20 batches
        update_bn(x[:10_000].split(500), model)
    optimizer, schedule = ae.make_optimizer(model, args, len(x))
    first = run.begin(part, args.epochs, model, optimizer=optimizer, schedule=schedule)
    for epoch in range(first, args.epochs + 1):
        rng = common.seed_everything(*seeds, epoch)
        train_loss = train_epoch(model, x, y, optimizer, schedule, args, rng)
        # seen: training images, but in evaluation mode and not augmented, as the validation images
        seen_loss, seen_accuracy = evaluate(model, x[:len(x_val)], y[:len(x_val)])
        val_loss, val_accuracy = evaluate(model, x_val, y_val)
        run.end_epoch(score=-val_accuracy if by_accuracy else val_loss,
                      train_loss=train_loss, seen_loss=seen_loss, seen_accuracy=seen_accuracy,
                      val_loss=val_loss, val_accuracy=val_accuracy)
    run.load_best(model)
    return model, run.rows


# --------------------------------------------------------------------------- evaluation


@torch.no_grad()
def predict(model, x, mirror=False):
    """Logits (N, C) in evaluation mode, order kept; mirror: the mean with those of x.flip(3)."""
    model.eval()
    logits = common.in_batches(model, x)
    if mirror:
        logits = (logits + common.in_batches(model, x.flip(3))) / 2
    return logits


@torch.no_grad()
def encode(model, x):
    """The last hidden layer, (N, F), in evaluation mode, order kept."""
    model.eval()
    return common.in_batches(model.features, x)


def loss_and_accuracy(logits, y):
    """(mean cross entropy in nats, accuracy from 0 to 1) of logits (N, C) against y (N,)."""
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()


def evaluate(model, x, y):
    """(mean cross entropy in nats, accuracy from 0 to 1) over all of x (N, 1, 28, 28), y (N,)."""
    return loss_and_accuracy(predict(model, x), y)


# --------------------------------------------------------------------------- few labels

SEEDS = 3  # trainings of each, with other labelled images
# what fit_best chooses from on validation images, in --labels and in --transfer
CANDIDATES = [{"lr": 0.002, "augment": "none"}, {"lr": 0.008, "augment": "none"},
              {"lr": 0.008, "augment": "shift"}]
TRANSFER_CANDIDATES = [{"lr": 0.001, "augment": "shift"},
                       {"lr": 0.004, "augment": "shift"}]
INVERSE_PENALTIES = (0.01, 0.1, 1.0)  # L2, of a logistic regression; scikit-learn calls it C


def label_subset(y, n, seed):
    """n indices into y (N,), with all those of a smaller n among them.

    Dealt like cards, one image of each class in turn: equally many of each, while there are some.
    """
    y = y.cpu().numpy()
    order = np.random.default_rng(seed).permutation(len(y))
    by_class = [order[y[order] == c] for c in np.unique(y)]
    # a turn: an index of each class, None where a class has run out
    dealt = [i for turn in zip_longest(*by_class) for i in turn if i is not None]
    return torch.tensor(dealt[:n])


def probe(to_codes, train, val, test):
    """(validation, test) accuracy of the best logistic regression on standardised codes.

    train, val, test: (x, y) each; to_codes: x -> codes (N, D). Best on val. Standardised: a code's
    dimensions have scales of their own, and the penalty would count them unequally.
    """
    def codes_and_labels(x, y):
        return to_codes(x).cpu().double().numpy(), y.cpu().numpy()

    z, y = codes_and_labels(*train)
    z_val, y_val = codes_and_labels(*val)
    z_test, y_test = codes_and_labels(*test)
    fitted = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(z, y)
              for c in INVERSE_PENALTIES]
    best = max(fitted, key=lambda model: model.score(z_val, y_val))
    return best.score(z_val, y_val), best.score(z_test, y_test)


def fit_best(candidates, flags, run, part, seeds, sets, classes, weights=None):
    """(validation, test) accuracy of the network whose settings are best on val.

    sets: (x, y) of train, val and test. weights: see build. Epoch and settings are chosen by the
    validation accuracy: with few images a network grows overconfident. Its mistakes become fewer,
    but each costs more, so that the loss rises again while the accuracy still improves.
    """
    train, val, test = sets
    models = []
    for change in candidates:
        model, _ = fit(common.with_flags(flags, **change), run,
                       f"{part}, {change['lr']} {change['augment']}", seeds, train, val, classes,
                       weights, by_accuracy=True)
        models.append(model)
    best = max(models, key=lambda model: evaluate(model, *val)[1])
    return evaluate(best, *val)[1], evaluate(best, *test)[1]


def label_efficiency(args, data):
    """Accuracy against the number of labels, for four ways to use them; returns the metrics.

    The settings of each way are chosen on the validation images, for each number of labels and each
    seed. Somebody with 100 labels would not have so many of those: what counts is that all ways
    are chosen alike. The encoders saw every image of the training part, the pool, without labels,
    and are the same for all three seeds.
    """
    pool, val_idx = common.split(data.y_train, args.seed)
    for n in args.labels:
        if not len(data.classes) <= n <= len(pool):
            common.fail(f"--labels {n}: it takes {len(data.classes)} to {len(pool)}, from an image "
                        "of each class to the training part")
    run = common.Run(args, data, columns=("train_loss", "val_loss", "val_accuracy"))
    # runs of other chapters, made first where they are not there
    args.encoder = args.encoder or common.trained("ae", args, minutes=9)
    net_ae = ae.load_run(args.encoder).to(args.device)
    net_vae = vae.load_run(common.trained("vae", args, minutes=7)).to(args.device)
    encoders = {"probe on AE codes": partial(ae.encode, net_ae),
                "probe on VAE codes": lambda x: vae.encode(net_vae, x)[0]}
    val, test = (data.x_train[val_idx], data.y_train[val_idx]), (data.x_test, data.y_test)
    flags, points = settings(args, "ae"), defaultdict(list)
    for n in sorted(set(args.labels)):
        for seed in range(args.seed, args.seed + SEEDS):
            idx = pool[label_subset(data.y_train[pool], n, seed)]
            train = data.x_train[idx], data.y_train[idx]
            for way, to_codes in encoders.items():
                points[way, n].append(probe(to_codes, train, val, test))
            # repeat few images: an epoch has at least a tenth as many steps as one over the pool
            idx = idx.repeat(math.ceil(len(pool) / 10 / n))
            repeated = data.x_train[idx], data.y_train[idx]
            for way, scratch in (("fine-tuned", False), ("from scratch", True)):
                points[way, n].append(fit_best(
                    CANDIDATES, common.with_flags(flags, scratch=scratch), run,
                    f"{n}, {way}, {seed}", (seed, 0), (repeated, val, test), len(data.classes)))
    return finish_points(run, points, "label_efficiency",
                         f"{data.name}: does it help to rebuild images first?")


def transfer(args, data):
    """Is a network that has learned half of the classes ahead on the other half? Returns metrics.

    Not the report's experiment, whose ResNet18 had learned from a million colour photographs, but
    its question, without a download: what is it worth to have learned other classes, and is it
    worth more, the fewer labels there are? The network's last layer is always new.
    """
    classes, half = len(data.classes), len(data.classes) // 2
    if half < 2:
        common.fail(f"--transfer takes two classes for each half: there are {classes} in all")
    run = common.Run(args, data, columns=("train_loss", "val_loss", "val_accuracy"))
    flags = common.with_flags(settings(args, "cnn"), batch_size=32)  # more steps of few images
    points = defaultdict(list)

    def of_classes(x, y, low, high):  # their images, and labels that count from 0
        chosen = (y >= low) & (y < high)
        return x[chosen], y[chosen] - low

    # the largest number of labels: a training part has a few images less or more than 80 %
    most = (data.y_train >= half).sum().item() * 3 // 4
    for seed in range(args.seed, args.seed + SEEDS):
        train_idx, val_idx = common.split(data.y_train, seed)
        train, val = ((data.x_train[idx], data.y_train[idx]) for idx in (train_idx, val_idx))
        source, _ = fit(flags, run, f"first classes, {seed}", (seed, 0),
                        of_classes(*train, 0, half), of_classes(*val, 0, half), half)
        learned = {k: v for k, v in source.state_dict().items() if not k.startswith("head")}

        x, y = of_classes(*train, half, classes)
        x_val, y_val = of_classes(*val, half, classes)
        few_val = x_val[:1000], y_val[:1000]  # enough to choose by; more would slow each epoch
        test = of_classes(data.x_test, data.y_test, half, classes)
        for n in sorted({min(n, most) for n in (50, 500, 5000)}):
            idx = label_subset(y, n, seed)
            points["frozen", n].append(probe(
                partial(encode, source), (x[idx], y[idx]), few_val, test))
            # repeat few images: an epoch has at least a sixteenth as many steps as one over all x
            idx = idx.repeat(math.ceil(len(x) / 16 / n))
            for way, weights in (("fine-tuned", learned), ("from scratch", None)):
                points[way, n].append(fit_best(
                    TRANSFER_CANDIDATES, flags, run, f"{n}, {way}, {seed}",
                    (seed, 1),  # 1: other draws than of the first classes
                    ((x[idx], y[idx]), few_val, test), classes - half, weights))
    return finish_points(run, points, "transfer",
                         f"{data.name}: does it help to learn other classes first?")


def finish_points(run, points, name, question):
    """The curves of accuracy against labels, and the table; returns the metrics.

    points: {(way, number of labels): [(validation accuracy, test accuracy) of each training]}.
    """
    results, labels = defaultdict(dict), sorted({n for _, n in points})
    for (way, n), pairs in points.items():
        val, test = [v for v, _ in pairs], [t for _, t in pairs]
        results[way][str(n)] = {
            "val_mean": statistics.mean(val), "val_std": statistics.stdev(val), "val_each": val,
            "mean": statistics.mean(test), "std": statistics.stdev(test), "each": test}
    fig = Figure(figsize=(7, 4.5), layout="constrained")
    ax = fig.subplots()
    colors = {"from scratch": "black", "fine-tuned": "C3"}  # the same in both figures
    for shift, (way, by_n) in enumerate(results.items()):
        ax.errorbar([n * 1.04 ** shift for n in labels],  # side by side, not one on the other
                    [100 * p["val_mean"] for p in by_n.values()],
                    [100 * p["val_std"] for p in by_n.values()], marker="o", capsize=4, label=way,
                    color=colors.get(way))
    ax.set(xscale="log", xlabel="labelled training images", title=question,
           ylabel=f"validation accuracy, %: mean and spread of {SEEDS}")
    ax.set_xticks(labels, labels)
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend()
    run.save(fig, name, "Where is pre-training ahead of the network from scratch?")
    table = [(f"test accuracy, %, {SEEDS} trainings; labels:", *labels)]
    for way, by_n in results.items():
        table.append((way, *(f"{100 * p['mean']:.1f} +-{100 * p['std']:.1f}"
                             for p in by_n.values())))
    return run.finish({name: results}, common.table(table))


# --------------------------------------------------------------------------- figures

FIGURES = {"ae": ("fig30_ae", "fig33_confusion_ae"),
           "resnet18": ("fig31_resnet18", "fig34_confusion_resnet18"),
           "resnet18-random": ("fig32_resnet18-random", "fig35_confusion_resnet18-random"),
           "cnn": ("cnn", "fig36_confusion_cnn")}


def draw_confusion(run, name, matrix, classes, title):
    """Figures 33 to 36: rows are the truth. A coloured diagonal would hide the errors."""
    errors = matrix - np.diag(np.diag(matrix))
    size = 0.5 * len(classes)
    fig = Figure(figsize=(size + 2, size + 1.9), layout="constrained")
    ax = fig.subplots()
    ax.imshow(errors, cmap="Oranges")
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            if count:  # zeros are left out
                ax.text(j, i, count, ha="center", va="center", fontsize=8,
                        weight="bold" if i == j else None)
    ax.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    ax.set_yticks(range(len(classes)), classes)
    ax.set(title=f"{title}\n{matrix.trace() / matrix.sum():.1%} of the test images right",
           xlabel="predicted class", ylabel="true class")
    run.save(fig, name, "Rows are the truth. Which classes are taken for which, and is it mutual?")


def draw_mistakes(run, name, data, logits, title):
    """The 24 most confident mistakes."""
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
    run.save(fig, f"mistakes_{name}", "Would you have known? Some labels look wrong.")


def draw_per_class(run, models, data):
    """Accuracy of each class, a dot for each model, the hardest class first."""
    order = np.argsort(np.mean([m["per_class"] for m in models.values()], axis=0))
    fig = Figure(figsize=(8, 4), layout="constrained")
    ax = fig.subplots()
    for name, m in models.items():
        ax.plot([data.classes[c] for c in order], [100 * m["per_class"][c] for c in order], "o",
                label=name, alpha=0.8)
    ax.tick_params(axis="x", rotation=25)
    ax.set(ylabel="test accuracy, %", title=f"{data.name}: which classes are hard")
    ax.grid(alpha=0.3)
    ax.legend()
    run.save(fig, "per_class", "The hardest class first: is it the same one for every model?")


def table3(models, left_out):
    """Table 3 as lines of text, the report's numbers in brackets."""
    rows = [("", "test accuracy, %", "test loss", "training, s", "parameters that learn, of all")]
    for name, (accuracy, loss, seconds) in TABLE3.items():
        if m := models.get(name):
            rows.append((name, f"{100 * m['test_accuracy']:.1f} ({accuracy})",
                         f"{m['test_loss']:.3f} ({loss:.3f})",
                         f"{m['train_seconds']:.0f} ({seconds or '?'})",
                         f"{m['trained_parameters']:,} of {m['parameters']:,}"))
    return common.table(rows) + [f"{name} left out: {why}" for name, why in left_out.items()]


# --------------------------------------------------------------------------- main


def train_and_test(flags, run, data, splits, weights):
    """All folds of one model; (its metrics, the network of its last fold, which the figures show).

    flags: its settings. weights: see build.
    """
    folds = []
    for fold, (name, split) in enumerate(splits.items()):
        train, val = ((data.x_train[idx], data.y_train[idx]) for idx in split)
        part = f"{flags.title}, {name}" if len(splits) > 1 else flags.title
        model, rows = fit(flags, run, part, (flags.seed, fold), train, val, len(data.classes),
                          weights)
        # after all choices. The test may use mirror images, which the validation numbers do not:
        # the two do not compare
        logits = predict(model, data.x_test, flags.mirror)
        loss, accuracy = loss_and_accuracy(logits, data.y_test)
        best = min(rows, key=lambda row: row["val_loss"])
        folds.append({"test_accuracy": accuracy, "test_loss": loss,
                      "val_accuracy": best["val_accuracy"], "val_loss": best["val_loss"],
                      "train_seconds": sum(row["seconds"] for row in rows)})

    # all else is of the last fold: model, rows, logits, best
    matrix = confusion_matrix(data.y_test.cpu().numpy(), logits.argmax(1).cpu().numpy(),
                              labels=range(len(data.classes)))
    metrics = {
        **common.over_folds(folds),
        "seen_loss": best["seen_loss"], "seen_accuracy": best["seen_accuracy"],
        "best_epoch": best["epoch"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **{name: getattr(flags, name) for name in (
            "title", "scratch", "mirror", "schedule", "train", "epochs", "batch_size", "lr",
            "weight_decay", "augment")},
        "per_class": (matrix.diagonal() / matrix.sum(1).clip(min=1)).tolist(),
        "confusion": matrix.tolist()}
    curves, confusion = FIGURES[flags.model]
    common.plot_curves(run, curves, rows, {
        "accuracy": ("seen_accuracy", "val_accuracy"),
        "cross entropy, nats": ("seen_loss", "val_loss")}, f"{data.name}: {flags.title}",
        "Does the validation loss rise again while the training loss falls?")
    draw_confusion(run, confusion, matrix, data.classes, f"{data.name}, {flags.title}")
    draw_mistakes(run, flags.model, data, logits, flags.title)
    return metrics, model


def main(argv=None):
    """Train, test once, draw; returns the metrics as a dict."""
    args = parse_args(argv)
    data = common.load_data(args)
    if args.labels:
        return label_efficiency(args, data)
    if args.transfer:
        return transfer(args, data)
    names = list(TABLE3) if args.model == "all" else [args.model]
    imagenet, left_out = None, {}
    splits = common.splits(data.y_train, args.folds, args.seed)
    if "resnet18" in names:
        try:
            imagenet = imagenet_weights(args)
        except LookupError as problem:
            if args.model == "resnet18" or args.weights:
                common.fail(problem)
            left_out["resnet18"] = str(problem)
            names.remove("resnet18")
            print(f"table 3 goes without resnet18: {problem}")
    for name in names:
        flags = settings(args, name)
        if name.startswith("resnet") and flags.train != "head" and any(
                flags.batch_size == 1 or len(train) % flags.batch_size == 1
                for train, _ in splits.values()):
            common.fail(f"--batch-size {flags.batch_size} leaves a batch of one image, and ResNet18"
                        "'s last BatchNorm has nothing to average there: take another")
    run = common.Run(args, data, columns=("train_loss", "val_loss", "val_accuracy"))
    if "ae" in names and not args.scratch:  # a run of ae.py, made first where it is not there
        args.encoder = args.encoder or common.trained("ae", args, minutes=9)

    results = {}
    for name in names:
        results[name], model = train_and_test(settings(args, name), run, data, splits,
                                              imagenet if name == "resnet18" else None)
    draw_per_class(run, results, data)
    return run.finish({"models": results, "left_out": left_out,
                       "epochs": {name: r["epochs"] for name, r in results.items()}},
                      table3(results, left_out), model)  # of several models, the last one


if __name__ == "__main__":
    common.start(main)
