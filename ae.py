"""How far can 28x28 = 784 pixels be squeezed, and what does a small network see on the way?

Section 1 of the report: a convolutional autoencoder, its loss, its latent space, its filters.

    python ae.py                        our best training of the report's final model
    python ae.py --folds 5              the same with 5-fold cross validation (table 1)
    python ae.py --recipe report        the report's own settings
    python ae.py --recipe first         its first, untuned training: latent 100 (table 1, figure 1)
    python ae.py --tune 20              search for better values with Optuna, 20 trials
    python ae.py --ablate               what each regulariser costs or gains, over three seeds
    python ae.py --fast                 smoke test in seconds

FashionMNIST test images (results/ae*): MSE .0106 +- .0001 over 5 folds with 29,207 parameters;
PCA with as many components has .0139, --recipe report .0138; --recipe first .0368, by its dropout.
25 epochs take about 9 minutes on one core. Each run writes to a new folder in runs/.
"""

import argparse
import math
import os
import shlex
import statistics
import time
from pathlib import Path
import warnings

import matplotlib
import optuna
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from torchvision.utils import make_grid

import common

# --------------------------------------------------------------------------- flags

# the report's best trial
REPORT = {"latent_dim": 38, "batch_size": 48, "dropout": 0.0, "lr": 0.002, "weight_decay": 5e-5}
RECIPES = {
    "best": {},
    # the report says nothing of a schedule or of epochs
    "report": {**REPORT, "schedule": "constant", "augment": "flip"},
    # the report's first training. Only the latent size is known: the dropout is nn.Dropout()'s
    # default, the rate Adam's; width, batch and epochs are a guess
    "first": {"latent_dim": 100, "hidden": 100, "lr": 0.001, "batch_size": 64, "dropout": 0.5,
              "epochs": 10, "schedule": "constant", "augment": "flip"},
}


def parse_args(argv=None):
    number = common.number
    parser = common.Parser(description=__doc__.partition("\n")[0])
    group = parser.add_argument_group("model")
    group.add_argument("--latent-dim", type=number(int, 2, 784), default=38,
                       help="size D of the code z: more sharpens the images")
    group.add_argument("--hidden", type=number(int, 1, 4096), default=38,
                       help="width before z; below --latent-dim, z has the rank of --hidden")
    group.add_argument("--filters", type=number(int, 1, 512), nargs=2, default=[8, 16],
                       help="maps of the encoder's two convolutions")
    group.add_argument("--decoder-filters", type=number(int, 1, 512), nargs=3, default=[10, 32, 16],
                       help="maps that enter the decoder's three transposed convolutions")
    group.add_argument("--batchnorm", action=argparse.BooleanOptionalAction, default=True,
                       help="normalise the encoder's maps over the batch")
    group.add_argument("--dropout", type=number(float, 0, 0.99), default=0.0,
                       help="probability to zero a hidden unit in training")
    group = parser.add_argument_group("loss and optimiser")
    group.add_argument("--schedule", choices=("onecycle", "constant"), default="onecycle",
                       help="onecycle: rise for 30 %% of the steps, then fall to nearly zero")
    group.add_argument("--optimizer", choices=("adam", "sgd"), default="adam",
                       help="sgd is plain: no momentum")
    group.add_argument("--weight-decay", type=number(float, 0, 1), default=0.0,
                       help="L2: this factor times each parameter is added to its gradient")
    group.add_argument("--l1", type=number(float, 0, 1), default=0.0,
                       help="L1: this factor times the sum of |w| is added to the loss")
    group = parser.add_argument_group("many short trainings instead of one")
    group.add_argument("--tune", type=number(int, 1, 100_000), metavar="N",
                       help="search until N trials in all are finished, of 5 epochs or fewer")
    group.add_argument("--storage", metavar="FILE|URL",
                       help="where the study is: a journal file, which many workers on one machine "
                            "or in a shared folder may use, or a database (SQLite: one worker; a "
                            "password in the URL would show in config.json); None: "
                            "study.journal in the run's folder")
    group.add_argument("--price", type=number(float, 0, 1), default=5e-5,
                       help="MSE that a latent dimension must save to be worth having in --tune")
    group.add_argument("--ablate", action="store_true",
                       help="the impact of each regulariser, over three seeds; 5 epochs each")
    common.add_flags(parser, RECIPES, epochs=25, batch_size=64, lr=0.01, augment="none")

    args = parser.parse_args(argv)  # a first look: which mode is it?
    if args.tune or args.ablate:
        parser.set_defaults(epochs=5)
    if args.tune:
        common.refuse_others(parser, argv, "--tune", ("tune", "storage", "price", "epochs"))
    elif not args.resume and (args.storage is not None
                              or args.price != parser.get_default("price")):
        parser.error("--storage and --price belong to --tune N")
    if args.ablate and args.folds > 1:
        parser.error("--ablate and --folds: choose one")
    return common.parse(parser, "ae", argv, RECIPES, fast={"epochs": 3})


# --------------------------------------------------------------------------- model


class Encoder(nn.Module):
    """x (B, 1, 28, 28) -> code z (B, D)."""

    def __init__(self, latent_dim, hidden, filters, dropout, batchnorm):
        super().__init__()
        f1, f2 = filters
        norm = nn.BatchNorm2d if batchnorm else nn.Identity
        self.block1 = nn.Sequential(nn.Conv2d(1, f1, 3), nn.ReLU(), norm(f1), nn.MaxPool2d(2))
        self.block2 = nn.Sequential(nn.Conv2d(f1, f2, 3), nn.ReLU(), norm(f2), nn.MaxPool2d(2))
        self.linear = nn.Sequential(nn.Flatten(), nn.Linear(f2 * 5 * 5, hidden),
                                    nn.Dropout(dropout), nn.ReLU(), nn.Linear(hidden, latent_dim))

    def forward(self, x):      # (B, 1, 28, 28)
        x = self.block1(x)     # (B, f1, 13, 13): 3x3 without padding takes 28 to 26, pooling to 13
        x = self.block2(x)     # (B, f2, 5, 5)
        return self.linear(x)  # (B, D)


class Decoder(nn.Module):
    """Code z (B, D) -> recon_x (B, 1, 28, 28) in (0, 1)."""

    def __init__(self, latent_dim, decoder_filters, dropout):
        super().__init__()
        f1, f2, f3 = decoder_filters
        self.linear = nn.Sequential(nn.Linear(latent_dim, f1 * 3 * 3), nn.Dropout(dropout),
                                    nn.ReLU(), nn.Unflatten(1, (f1, 3, 3)))
        self.block1 = nn.Sequential(nn.ConvTranspose2d(f1, f2, 3, stride=2), nn.ReLU())
        self.block2 = nn.Sequential(
            nn.ConvTranspose2d(f2, f3, 3, stride=2, padding=1, output_padding=1), nn.ReLU())
        self.out = nn.ConvTranspose2d(f3, 1, 3, stride=2, padding=1, output_padding=1)

    def forward(self, z):      # (B, D)
        x = self.linear(z)     # (B, f1, 3, 3)
        x = self.block1(x)     # (B, f2, 7, 7)
        x = self.block2(x)     # (B, f3, 14, 14)
        return torch.sigmoid(self.out(x))  # (B, 1, 28, 28); the data is in [0, 1] too


class Autoencoder(nn.Module):
    """x (B, 1, 28, 28) -> recon_x (B, 1, 28, 28), through z (B, D)."""

    def __init__(self, latent_dim=38, hidden=38, filters=(8, 16), decoder_filters=(10, 32, 16),
                 dropout=0.0, batchnorm=True):
        super().__init__()
        self.encoder = Encoder(latent_dim, hidden, filters, dropout, batchnorm)
        self.decoder = Decoder(latent_dim, decoder_filters, dropout)

    def forward(self, x):
        return self.decoder(self.encoder(x))


def load_run(folder):
    """The Autoencoder of a finished run of this script: the best weights of its last fold."""
    state = common.load_checkpoint(Path(folder) / "checkpoint.pt", "ae")
    flags = state["config"]["flags"]
    with common.reading(folder):
        model = Autoencoder(flags["latent_dim"], flags["hidden"], flags["filters"],
                            flags["decoder_filters"], flags["dropout"], flags["batchnorm"])
        common.restore(model, state["best"][flags["folds"] - 1]["model"], folder)
    return model


# --------------------------------------------------------------------------- loss


def mse(recon_x, x):
    """Mean squared error per pixel: the mean over all pixels of all images, a scalar."""
    return F.mse_loss(recon_x, x)


def l1_penalty(model):
    """Sum of |w| over the weights of convolutions and linear layers.

    Not of biases and BatchNorm, as is the custom: a bias only shifts a map. --weight-decay, an
    argument of torch's optimisers, acts on all parameters.
    """
    layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    return sum(m.weight.abs().sum() for m in model.modules() if isinstance(m, layers))


# --------------------------------------------------------------------------- training


def train_epoch(model, x, optimizer, schedule, args, generator):
    """One pass over x (N, 1, 28, 28); returns the mean loss, MSE per pixel plus any penalty."""
    model.train()
    total = 0.0
    for step, idx in enumerate(common.batches(len(x), args.batch_size, generator, x.device)):
        batch = common.augment(x[idx], args.augment, generator)

        recon_x = model(batch)
        loss = mse(recon_x, batch)
        if args.l1:
            loss = loss + args.l1 * l1_penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        total += common.finite(loss, step) * len(idx)
    return total / len(x)


def make_optimizer(model, args, n):
    """Optimiser and learning rate schedule, advanced after every step, for n training images."""
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay,
                                     fused=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), args.lr, weight_decay=args.weight_decay)
    if args.schedule == "onecycle":  # a high rate explores, the decay to zero then settles
        schedule = torch.optim.lr_scheduler.OneCycleLR(  # it also lowers Adam's beta1 meanwhile
            optimizer, args.lr, epochs=args.epochs, steps_per_epoch=math.ceil(n / args.batch_size),
            cycle_momentum=args.optimizer == "adam")  # SGD stays plain
    else:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)  # no schedule
    return optimizer, schedule


def fit(args, run, fold, seeds, x_train, x_val, after=None):
    """Train a new network on x_train (N, 1, 28, 28), validate it after each epoch; returns it.

    seeds: numbers that decide every draw. after(epoch, val_mse) may raise to end the training.
    """
    common.seed_everything(*seeds)
    model = Autoencoder(args.latent_dim, args.hidden, args.filters, args.decoder_filters,
                        args.dropout, args.batchnorm).to(args.device)
    optimizer, schedule = make_optimizer(model, args, len(x_train))
    for epoch, generator in run.epochs(fold, seeds, model=model, optimizer=optimizer,
                                       schedule=schedule):
        clock = time.perf_counter()
        train_loss = train_epoch(model, x_train, optimizer, schedule, args, generator)
        seconds = time.perf_counter() - clock
        val_mse = evaluate(model, x_val)
        run.end_epoch(
            train_loss=train_loss,  # on the way: dropout on, penalty added
            train_mse=evaluate(model, x_train[:len(x_val)]),  # to be compared with val_mse
            val_mse=val_mse, seconds=seconds)
        if after:
            after(epoch, val_mse)
    return model


# --------------------------------------------------------------------------- evaluation


@torch.no_grad()
def reconstruct(model, x):
    """recon_x (N, 1, 28, 28) in evaluation mode, order kept."""
    model.eval()  # BatchNorm uses its running statistics, dropout is off
    return common.in_batches(model, x)


@torch.no_grad()
def encode(model, x):
    """z (N, D) in evaluation mode, order kept."""
    model.eval()
    return common.in_batches(model.encoder, x)


def evaluate(model, x):
    """MSE per pixel over all of x: one mean, not a mean of batch means."""
    return mse(reconstruct(model, x), x).item()


# --------------------------------------------------------------------------- figures


def draw_reconstructions(folder, name, data, rows):
    """Figures 1 and 2: one test image of each class, and what each model makes of it.

    rows: {label: (N, 1, 28, 28), an image for each test image}.
    """
    first = [(data.y_test == c).nonzero()[0].item() for c in range(len(data.classes))]
    fig = Figure(figsize=(10, 1.1 * len(rows) + 0.6), layout="constrained")
    for ax, (label, x) in zip(fig.subplots(len(rows)), rows.items(), strict=True):
        common.show_images(ax, x[first], columns=len(first))
        ax.set_ylabel(label)
    ax.set_xticks([15 + 29 * c for c in range(len(first))], data.classes)
    fig.suptitle(f"{data.name}, test images and their reconstructions")
    fig.savefig(folder / f"{name}.png", dpi=120)


def draw_latent(folder, z, data, dims, seed, numbers=(4, 5, 6)):
    """Figures 4 to 6: two dimensions of z (N, D), and all of them by PCA and by t-SNE.

    Returns {"z", "tsne": accuracy of a 5-nearest-neighbour vote there, 5-fold}: how well the
    classes keep apart. At most 3,000 points: t-SNE takes minutes for 10,000.
    """
    z, y = z[:3000].cpu().double().numpy(), data.y_test[:3000].cpu().numpy()
    tsne = TSNE(random_state=seed).fit_transform(z)
    accuracy = {name: cross_val_score(KNeighborsClassifier(5), points, y, cv=5).mean().item()
                for name, points in (("z", z), ("tsne", tsne))}
    pca = PCA(2).fit_transform(z)
    maps = {"latent": (z[:, dims], f"dimensions {dims[0]} and {dims[1]} of z",
                       [f"z[{d}]" for d in dims]),
            "pca": (pca, f"PCA of all {z.shape[1]} dimensions of z",
                    ["first component", "second component"]),
            "tsne": (tsne, f"t-SNE of z, 5-NN accuracy {accuracy['tsne']:.2f}", ["", ""])}
    for number, (name, (points, title, labels)) in zip(numbers, maps.items(), strict=True):
        common.plot_scatter(folder, f"fig{number:02d}_{name}", points, y, data.classes,
                            f"{data.name} test images: {title}", labels)
    return accuracy


def draw_maps(folder, name, maps, columns, title, cmap="viridis", symmetric=False):
    """Small maps (N, H, W), kernels or activations, side by side on one colour scale.

    The scale ends at the 99.5th percentile: a few outliers would leave all the rest dark.
    """
    grid = make_grid(maps.cpu()[:, None], nrow=columns, padding=1, pad_value=float("nan"))[0]
    height, width = grid.shape
    top = maps.abs().quantile(0.995).item()
    fig = Figure(figsize=(9, 1.2 + 8 * height / width), layout="constrained")
    ax = fig.subplots()
    bottom = -top if symmetric else min(0, maps.min().item())
    image = ax.imshow(grid.numpy(), cmap=cmap, vmin=bottom, vmax=top)
    ax.set(title=title, xticks=[], yticks=[])
    fig.colorbar(image, shrink=0.9, extend="both" if symmetric else "max")
    fig.savefig(folder / f"{name}.png", dpi=120)


def draw_kernels(folder, model, data_name):
    """Figures 7 to 11: the kernels of each layer, one for each pair of a map in and a map out."""
    encoder, decoder = model.encoder, model.decoder
    layers = {"encoder_conv1": encoder.block1[0], "encoder_conv2": encoder.block2[0],
              "decoder_conv1": decoder.block1[0], "decoder_conv2": decoder.block2[0],
              "decoder_conv3": decoder.out}
    for number, (name, layer) in enumerate(layers.items(), start=7):
        w = layer.weight.detach()
        sides = ["out", "in"] if isinstance(layer, nn.Conv2d) else ["in", "out"]  # as stored
        if w.shape[0] > w.shape[1]:
            w, sides = w.transpose(0, 1), sides[::-1]  # lying down it fits the page
        draw_maps(folder, f"fig{number:02d}_{name}_kernels", w.flatten(0, 1), w.shape[1],
                  f"{data_name}, kernels of {name}: a row for each map {sides[0]}, a column for "
                  f"each map {sides[1]}", cmap="RdBu_r", symmetric=True)


@torch.no_grad()
def draw_activations(folder, model, data):
    """Figures 12 to 15: what each block makes of one pullover (digits: of one 2)."""
    model.eval()
    x = data.x_test[data.y_test == 2][:1]  # (1, 1, 28, 28)
    x1 = model.encoder.block1(x)
    x2 = model.encoder.block2(x1)
    x3 = model.decoder.block1(model.decoder.linear(model.encoder.linear(x2)))
    x4 = model.decoder.block2(x3)
    names = ("encoder_block1", "encoder_block2", "decoder_block1", "decoder_block2")
    for number, (name, maps) in enumerate(zip(names, (x1, x2, x3, x4), strict=True), start=12):
        draw_maps(folder, f"fig{number}_{name}_activations", maps[0], 8,
                  f"{data.name}, a test {data.classes[2]}: activations after {name}, "
                  f"{maps.shape[1]} maps of {maps.shape[2]}x{maps.shape[3]}")


# --------------------------------------------------------------------------- search


class Dropped(Exception):
    """Ends a trial that does not count."""


def suggest(trial):
    """The search space: a point in it as {flag: value}.

    --hidden stays at 38, so that no point exceeds the report's 29,716 parameters. Two digits, so
    that the command printed at the end trains what was tried.
    """
    values = {"latent_dim": trial.suggest_int("latent_dim", 4, 38),
              "batch_size": trial.suggest_int("batch_size", 32, 128, step=16),
              "dropout": trial.suggest_float("dropout", 0, 0.5, step=0.1),
              "lr": trial.suggest_float("lr", 1e-3, 3e-2, log=True),
              "weight_decay": trial.suggest_float("weight_decay", 1e-7, 1e-3, log=True)}
    return {k: v if isinstance(v, int) else float(f"{v:.2g}") for k, v in values.items()}


def connect(where):
    """Optuna's storage in a journal file or a database."""
    if "://" not in where:
        file, lock = Path(where), JournalFileOpenLock(where)
        if file.is_file():
            lock.acquire()
            try:
                journal = file.read_bytes()
                if journal and b'"op_code"' not in journal.partition(b"\n")[0]:
                    raise ValueError("it is no journal of Optuna")
                # a full disk leaves half a line, and the next one would be glued to it
                os.truncate(file, journal.rfind(b"\n") + 1)
            finally:
                lock.release()
        return optuna.storages.JournalStorage(JournalFileBackend(where, lock))
    try:
        return optuna.storages.RDBStorage(where)
    except Exception:  # when two workers make the tables of an empty database at once, one fails,
        time.sleep(2)  # but a moment later finds them there
        return optuna.storages.RDBStorage(where)


def open_study(args, where):
    """The study in a journal file or database, new or there already; exit 2 if it is another one.

    The report's values come first in it, and again if their trial failed or was interrupted.
    """
    if args.state and "://" not in where and not Path(where).exists():
        common.fail(f"the study of {args.resume} is gone: {where} does not exist")
    report = optuna.trial.FixedTrial(REPORT)
    suggest(report)
    settings = {"data": args.data, "fast": args.fast, "epochs": args.epochs, "seed": args.seed,
                "price": args.price, **{k: str(d) for k, d in report.distributions.items()}}
    # what is worse than the median ends early, but not before the rate has passed its peak
    pruner = optuna.pruners.MedianPruner(n_warmup_steps=math.ceil(args.epochs / 2))
    try:
        storage = connect(where)
        try:
            study = optuna.create_study(storage=storage, study_name="ae", direction="minimize",
                                        pruner=pruner)
            study.enqueue_trial(REPORT, user_attrs={"report": True})
            study.set_user_attr("settings", settings)
        except optuna.exceptions.DuplicatedStudyError:  # another worker was faster: let it finish
            study = optuna.load_study(study_name="ae", storage=storage, pruner=pruner)
            for _ in range(20):
                if "settings" not in study.user_attrs:
                    time.sleep(0.1)
        known, trials = study.user_attrs.get("settings", {}), study.get_trials()
    except Exception as error:  # each kind of storage has its own
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        common.fail(f"cannot keep a study in --storage {where} ({problem})")
    differ = [k for k, v in settings.items() if known.get(k) != v]
    if study.directions != [optuna.study.StudyDirection.MINIMIZE]:
        differ = ["direction"]
    if differ:
        common.fail(f"the study in {where} has another {', '.join(differ)}: repeat the command "
                    "that began it, or name another --storage")
    if all(t.state == TrialState.FAIL for t in trials if t.user_attrs.get("report")):
        study.enqueue_trial(REPORT, user_attrs={"report": True})
    return study


def tune(args, data):
    """Search until args.tune trials are finished; returns the metrics.

    The cost is the validation MSE after a short training plus --price for each latent dimension.
    The MSE alone falls with every dimension: a search for it ends at the upper bound, and 38 may
    well be where the report's was. MSE over PCA's at the same size would end at the lower one
    (full trainings: .76 at 38, .63 at 18). With a price it ends where one more dimension no longer
    saves it. What a dimension is worth no data can tell: it is for whoever uses the code to say.
    Of 20 trials the first ten are the report's values and random points, only then TPE chooses.
    """
    # what counts as finished. Not a running trial: its worker may have been killed. So the last
    # trials of several workers are a race, and who loses it gives up
    counted = (TrialState.COMPLETE, TrialState.PRUNED)
    train, val = common.splits(data.y_train, 1, args.seed)[0]
    x_train, x_val = data.x_train[train], data.x_train[val]  # all that a trial sees
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # we print a line for each trial
    study = None if args.storage is None else open_study(args, args.storage)

    with common.Run(args, data, select="val_mse") as run:
        study = study or open_study(args, str(run.folder / "study.journal"))
        if args.state and len(study.get_trials()) <= args.state["fold"]:
            common.fail(f"the study of {args.resume} is gone: start a new run")

        def price(values):
            return args.price * values["latent_dim"]

        def objective(trial):
            # all draws follow from the seed and the trial's number: with one seed for all,
            # workers that start together and searches that go on would repeat points
            study.sampler = optuna.samplers.TPESampler(
                seed=common.seed_everything(args.seed, trial.number).initial_seed())
            values = suggest(trial)
            print(f"trial {trial.number}:", *(f"{k} {v}" for k, v in values.items()), flush=True)

            def after(epoch, val_mse):
                trial.report(val_mse + price(values), epoch)
                if len(study.get_trials(states=counted)) >= args.tune:
                    raise Dropped("other workers have finished the last one meanwhile")
                if trial.should_prune():
                    raise optuna.TrialPruned

            try:
                if any(t.params == trial.params and t.number < trial.number
                       and t.state != TrialState.FAIL for t in study.get_trials()):
                    raise Dropped("tried already")
                fit(argparse.Namespace(**vars(args) | values), run, trial.number,
                    (args.seed, trial.number), x_train, x_val, after)
            except (FloatingPointError, Dropped) as error:
                print(f"trial {trial.number} does not count: {error}")
                raise
            return run.history[-1]["val_mse"] + price(values)

        def report(study, trial):
            print(f"trial {trial.number}: {trial.state.name.lower()}, "
                  f"{len(study.get_trials(states=counted))} of {args.tune} finished", flush=True)

        try:
            if len(study.get_trials(states=counted)) < args.tune:
                study.optimize(objective, n_trials=10 * args.tune,  # an end even if all fail
                               catch=(FloatingPointError, Dropped), callbacks=[
                                   report, MaxTrialsCallback(args.tune, states=counted)])
        except (optuna.exceptions.StorageInternalError, AssertionError) as error:
            # a database that went away, a full disk; Optuna asserts that its storage never fails
            raise OSError(f"the study: {error}") from error

        rows = [{"trial": t.number, "state": t.state.name.lower(), **suggest(t),
                 "val_mse": t.value and t.value - price(t.params), "cost": t.value}
                for t in study.get_trials() if len(t.params) == len(REPORT)]
        rows.sort(key=lambda row: (row["state"] != "complete", row["cost"] or math.inf))
        if not rows or rows[0]["state"] != "complete":
            common.fail("not one trial was completed", status=1)
        show_table(rows)
        best = {k: v for k, v in rows[0].items() if k != "state"}
        best["command"] = f"python {shlex.quote(args.program)} " + " ".join(
            f"--{name.replace('_', '-')} {best[name]}" for name in REPORT)
        if args.data == "digits":
            best["command"] += " --data digits"
        print("train with the best values:", best["command"], sep="\n")
        draw_search(run.folder, study, data.name)
        return run.finish({"best": best, "trials": rows})


def show_table(rows):
    """Print dicts that have the same keys as a table."""
    for cells in (rows[0], *(row.values() for row in rows)):
        print(*(f"{f'{cell:.4g}' if isinstance(cell, float) else str(cell):>13}" for cell in cells))


def draw_search(folder, study, data_name):
    """Optuna's pictures: how the cost fell, and the share of its variance that each flag explains.

    The second takes at least four complete trials.
    """
    plots = optuna.visualization.matplotlib
    with warnings.catch_warnings(), matplotlib.rc_context():  # optuna sets another style for all
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        axes = {"tune_history": plots.plot_optimization_history(study, target_name="cost")}
        if len(study.get_trials(states=(TrialState.COMPLETE,))) > 3:
            axes["tune_importance"] = plots.plot_param_importances(
                study, optuna.importance.FanovaImportanceEvaluator(seed=0), target_name="cost")
        for name, ax in axes.items():
            ax.set_title("")
            ax.set_title(f"{data_name}, validation cost of short trainings", loc="left")
            ax.figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            matplotlib.pyplot.close(ax.figure)


# --------------------------------------------------------------------------- ablation

# what each changes; the factors and the rate of SGD are the best of a few tried. It is so high
# because the gradients are small: the loss is a mean over 784 pixels. Adam divides by their size
VARIANTS = {
    "baseline": {},
    "no batch norm": {"batchnorm": False},
    "dropout 0.2": {"dropout": 0.2},
    "L1, 1e-6": {"l1": 1e-6},
    "L2, 1e-5": {"weight_decay": 1e-5},
    "SGD, lr 10": {"optimizer": "sgd", "lr": 10.0},
}


def ablate(args, data, seeds=3):
    """Train every variant with every seed, all equally long; returns the metrics.

    On validation data: which regulariser to take is a choice (and its factor was one, so the best
    may look a little too good). Where train_mse and val_mse hardly differ, as here, a regulariser
    has nothing to win. The variants share each seed's split, weights and batches, so their
    differences spread less than their values.
    """
    with common.Run(args, data, select="val_mse") as run:
        for part, (name, s) in enumerate((name, s) for name in VARIANTS for s in range(seeds)):
            seed = (args.seed + s) % 2**32
            print(f"{name}, seed {seed}")
            train, val = common.splits(data.y_train, 1, seed)[0]
            fit(argparse.Namespace(**vars(args) | VARIANTS[name]), run, part, (seed, 0),
                data.x_train[train], data.x_train[val])

        last = [r for r in run.history if r["epoch"] == args.epochs]  # one for each training
        rows, ablation = [], {}
        for part, (name, flags) in enumerate(VARIANTS.items()):
            ends = last[part * seeds:(part + 1) * seeds]
            each = [r["val_mse"] for r in ends]
            extra = [r["val_mse"] - b["val_mse"] for r, b in zip(ends, last[:seeds], strict=True)]
            rows.append({"variant": name, "val_mse": statistics.mean(each),
                         "std": statistics.stdev(each), "difference": statistics.mean(extra),
                         "difference_std": statistics.stdev(extra),
                         "train_mse": statistics.mean(r["train_mse"] for r in ends)})
            ablation[name] = {**rows[-1], "each": each, "flags": flags}
        show_table(rows)
        draw_ablation(run.folder, ablation, f"{data.name}, {args.epochs} epochs each")
        return run.finish({"ablation": ablation})


def draw_ablation(folder, ablation, title):
    """A dot for each seed and a line at the mean, the best variant on top."""
    fig = Figure(figsize=(7, 0.4 * len(ablation) + 1.3), layout="constrained")
    ax = fig.subplots()
    rows = sorted(ablation.values(), key=lambda row: -row["val_mse"])
    for y, row in enumerate(rows):
        ax.scatter(row["each"], [y] * len(row["each"]), alpha=0.6)
        ax.plot([row["val_mse"]] * 2, [y - 0.3, y + 0.3], color="black")
    ax.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    ax.set(xlabel="validation MSE per pixel (line: mean)", title=title)
    ax.grid(alpha=0.3, axis="x")
    fig.savefig(folder / "ablation.png", dpi=120)


# --------------------------------------------------------------------------- main


def main(argv=None):
    """Train, test once, draw; returns the metrics as a dict."""
    args = parse_args(argv)
    data = common.load_data(args)
    if args.tune:
        return tune(args, data)
    if args.ablate:
        return ablate(args, data)
    with common.Run(args, data, select="val_mse") as run:
        for fold, (train, val) in enumerate(common.splits(data.y_train, args.folds, args.seed)):
            x_train, x_val = data.x_train[train], data.x_train[val]
            model = fit(args, run, fold, (args.seed, fold), x_train, x_val)

        # the one look at the test set, with each fold's weights of its best validation epoch
        test_mse = []
        for fold in range(args.folds):
            model.load_state_dict(run.best[fold]["model"])
            test_mse.append(evaluate(model, data.x_test))
        # from here on, model, x_train and x_val are those of the last fold
        recon_pca = common.pca_reconstruct(x_train, data.x_test, args.latent_dim)

        figure = "fig01" if args.recipe == "first" else "fig02"
        draw_reconstructions(run.folder, f"{figure}_reconstructions", data, {
            "original": data.x_test, "AE": reconstruct(model, data.x_test), "PCA": recon_pca})
        common.plot_curves(run.folder, "fig03_loss", run.history[-args.epochs:],
                           {"MSE per pixel": ("train_mse", "val_mse")},
                           f"{data.name}: autoencoder, latent {args.latent_dim}")
        dims = [2, 3] if args.latent_dim > 3 else [0, args.latent_dim - 1]
        knn = draw_latent(run.folder, encode(model, data.x_test), data, dims, args.seed)
        draw_kernels(run.folder, model, data.name)
        draw_activations(run.folder, model, data)

        metrics = {"test_mse": statistics.mean(test_mse),
                   "pca_mse": mse(recon_pca, data.x_test).item(),
                   "train_mse": evaluate(model, x_train), "val_mse": evaluate(model, x_val),
                   "parameters": sum(p.numel() for p in model.parameters()),
                   "latent_dim": args.latent_dim, "knn_accuracy": knn}
        if args.folds > 1:
            metrics |= {"folds": args.folds, "test_mse_std": statistics.stdev(test_mse),
                        "fold_test_mse": test_mse}
        return run.finish(metrics)


if __name__ == "__main__":
    common.start(main)


# --------------------------------------------------------------------------- exercises

# Predict first, then run. Answers, test MSE: results/ae*.
# 1. Would mirror images help so small a network? `--epochs 8` and `--epochs 8 --augment flip`.
#    (.0119 and .0126: it has no room for shoes that point right)
# 2. `--hidden 8 --epochs 8`: z still has 38 numbers. PCA with 38 has .0139, with 8 .0266. And this?
#    (.0172: z is a linear map of 8 units, its other 30 dimensions are a name only)
# 3. `--latent-dim 18`: half the code, twice the error? (.0122 instead of .0105)
# 4. `--recipe first --dropout 0`: is it the latent size or the dropout? (.0123 instead of .0368)
# 5. Plant a bug: delete `model.eval()` in reconstruct(). With `--dropout 0.5` every MSE in the log
#    is that of a network with half of its units. tests/test_ae.py catches it:
#    test_evaluation_weighs_images_not_batches.
