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
PCA with 38 components has .0139, --recipe report .0138; --recipe first .0400, because of its
dropout. 25 epochs take about 9 minutes on one core. Each run writes to a new folder in runs/.
"""

import argparse
import math
import statistics

import optuna
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
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
    # default, the learning rate Adam's; width, batch and epochs are a guess
    "first": {"latent_dim": 100, "hidden": 100, "lr": 0.001, "batch_size": 64, "dropout": 0.5,
              "epochs": 10, "schedule": "constant", "augment": "flip"},
}
# --tune and --ablate start many trainings. Of the flags below they take only these; common.parse
# refuses the others
MODES = {"tune": ("storage", "price", "epochs"),
         "ablate": ("latent_dim", "hidden", "filters", "decoder_filters", "schedule", "epochs",
                    "lr", "batch_size", "augment")}


def defaults(args):
    """{flag: default} where --recipe, --fast or a mode changes it; a flag that you type wins.

    args: what common.parse finds at a first look, before it takes these defaults.
    """
    changed = dict(RECIPES[args.recipe])
    if args.fast:
        changed["epochs"] = 3
    elif args.tune or args.ablate:
        changed["epochs"] = 5
    return changed


def parse_args(argv=None):
    number = common.number
    parser = common.Parser(__doc__)
    group = parser.add_argument_group("what to turn first")
    group.add_argument("--latent-dim", type=number(int, 2, 784), default=38,
                       help="size D of the code z: more sharpens the images")
    group.add_argument("--dropout", type=number(float, 0, 0.99), default=0.0,
                       help="probability to zero a hidden unit in training")
    group.add_argument("--tune", type=number(int, 1, 100_000), metavar="N",
                       help="search until N trials in all are finished, of 5 epochs or fewer")
    group.add_argument("--ablate", action="store_true",
                       help="the impact of each regulariser, over three seeds; 5 epochs each")
    group = parser.add_argument_group("model")
    group.add_argument("--hidden", type=number(int, 1, 4096), default=38,
                       help="width before z; if smaller than --latent-dim, z has only so many "
                            "independent directions")
    group.add_argument("--filters", type=number(int, 1, 512), nargs=2, default=[8, 16],
                       help="maps of the encoder's two convolutions")
    group.add_argument("--decoder-filters", type=number(int, 1, 512), nargs=3, default=[10, 32, 16],
                       help="maps that enter the decoder's three transposed convolutions")
    group.add_argument("--batchnorm", action=argparse.BooleanOptionalAction, default=True,
                       help="normalise the encoder's maps over the batch")
    common.add_training_flags(parser, RECIPES, epochs=25, batch_size=64, lr=0.01, augment="none")
    group = parser.add_argument_group("loss and optimiser")
    group.add_argument("--schedule", choices=("onecycle", "constant"), default="onecycle",
                       help="onecycle: rise for 30 %% of the steps, then fall to nearly zero")
    group.add_argument("--optimizer", choices=("adam", "sgd"), default="adam",
                       help="sgd is plain: no momentum")
    group.add_argument("--weight-decay", type=number(float, 0, 1), default=0.0,
                       help="L2: this factor times each parameter is added to its gradient")
    group.add_argument("--l1", type=number(float, 0, 1), default=0.0,
                       help="L1: this factor times the sum of |w| is added to the loss")
    group = parser.add_argument_group("search")
    group.add_argument("--storage", metavar="FILE|URL",
                       help="a journal file, which many workers may share, or a database's URL "
                            "(SQLite: one worker; config.json shows a password in it); without "
                            "it study.journal in the run's folder")
    group.add_argument("--price", type=number(float, 0, 1), default=5e-5,
                       help="MSE that a latent dimension must save to be worth having")
    args = common.parse(parser, "ae", argv, defaults, MODES)
    # the other way round: these two do nothing without --tune
    if not args.tune and (args.storage or args.price != parser.get_default("price")):
        parser.error("--storage and --price go only with --tune")
    return args


# --------------------------------------------------------------------------- model


class Encoder(nn.Module):
    """x (B, 1, 28, 28) -> code z (B, D)."""

    def __init__(self, latent_dim, hidden, filters, dropout, batchnorm):
        super().__init__()
        f1, f2 = filters
        norm = nn.BatchNorm2d if batchnorm else nn.Identity  # which ignores its argument
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


def build(args):
    """The Autoencoder as the flags say."""
    return Autoencoder(args.latent_dim, args.hidden, args.filters, args.decoder_filters,
                       args.dropout, args.batchnorm).to(args.device)


def load_run(folder):
    """The Autoencoder of a finished run of this script; of several folds, the last one's."""
    return common.load_run(folder, "ae", parse_args, build)


# --------------------------------------------------------------------------- loss


def mse(recon_x, x):
    """Mean squared error per pixel: the mean over all pixels of all images, a scalar."""
    return F.mse_loss(recon_x, x)


def l1_penalty(model):
    """Sum of |w| over the weights of convolutions and linear layers.

    Not of biases and BatchNorm, as is usual: a bias only shifts a map. --weight-decay, an argument
    of torch's optimisers, acts on all parameters.
    """
    layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    return sum(m.weight.abs().sum() for m in model.modules() if isinstance(m, layers))


# --------------------------------------------------------------------------- training


def train_epoch(model, x, optimizer, schedule, args, rng):
    """One pass over x (N, 1, 28, 28); returns the mean loss, MSE per pixel plus any penalty."""
    model.train()
    total = 0.0
    for idx in common.batches(x, args.batch_size, rng):
        batch = common.augment(x[idx], args.augment, rng)

        recon_x = model(batch)
        loss = mse(recon_x, batch)
        if args.l1:
            loss = loss + args.l1 * l1_penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        total += loss.detach() * len(idx)  # stays on the device: .item() would make a GPU wait
    return total.item() / len(x)


def make_optimizer(model, args, n):
    """Optimiser and learning rate schedule, advanced after every step, for n training images."""
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay,
                                     fused=True)  # all parameters in one go: faster
    else:
        optimizer = torch.optim.SGD(model.parameters(), args.lr, weight_decay=args.weight_decay)
    if args.schedule == "onecycle":  # a high rate explores, the decay to zero then settles
        # cycle_momentum: while the rate is high, Adam's beta1 is lower; SGD here has no momentum
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, args.lr, epochs=args.epochs, steps_per_epoch=math.ceil(n / args.batch_size),
            cycle_momentum=args.optimizer == "adam")
    else:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)  # no schedule
    return optimizer, schedule


def fit(args, run, part, seeds, x_train, x_val):
    """Train a network on x_train (N, 1, 28, 28) as one part of the run: a fold, a variant.

    seeds: numbers that, with the epoch, decide every draw. Returns the network of the best epoch,
    and the numbers of all epochs as a list of dicts.
    """
    common.seed_everything(*seeds)
    model = build(args)
    optimizer, schedule = make_optimizer(model, args, len(x_train))
    # first is 1, unless an interrupted run goes on: then begin() restores model, optimizer and
    # schedule as they were saved, and returns the next epoch
    first = run.begin(part, args.epochs, model, optimizer=optimizer, schedule=schedule)
    for epoch in range(first, args.epochs + 1):
        rng = common.seed_everything(*seeds, epoch)
        train_loss = train_epoch(model, x_train, optimizer, schedule, args, rng)
        val_mse = evaluate(model, x_val)
        run.end_epoch(score=val_mse,  # the lowest is the best epoch
                      train_loss=train_loss,  # on the way: dropout on, penalty added
                      train_mse=evaluate(model, x_train[:len(x_val)]),  # as many as in x_val
                      val_mse=val_mse)
    run.load_best(model)
    return model, run.rows


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


def draw_maps(run, name, maps, columns, title, caption, cmap="viridis", symmetric=False):
    """Small maps (N, H, W), kernels or activations, side by side on one colour scale.

    The scale ends at the 99.5th percentile: a few outliers would leave all the rest dark.
    """
    # nan is drawn as empty; [0]: make_grid repeats what is grey for red, green and blue
    grid = make_grid(maps.cpu()[:, None], nrow=columns, padding=1, pad_value=float("nan"))[0]
    height, width = grid.shape
    top = maps.abs().quantile(0.995).item()
    fig = Figure(figsize=(9, 1.2 + 8 * height / width), layout="constrained")
    ax = fig.subplots()
    bottom = -top if symmetric else min(0, maps.min().item())
    image = ax.imshow(grid.numpy(), cmap=cmap, vmin=bottom, vmax=top)
    ax.set(title=title, xticks=[], yticks=[])
    fig.colorbar(image, shrink=0.9, extend="both" if symmetric else "max")
    run.save(fig, name, caption)


def draw_kernels(run, model, data_name):
    """Figures 7 to 11: the kernels of each layer, one for each pair of a map in and a map out."""
    encoder, decoder = model.encoder, model.decoder
    layers = {"encoder_conv1": encoder.block1[0], "encoder_conv2": encoder.block2[0],
              "decoder_conv1": decoder.block1[0], "decoder_conv2": decoder.block2[0],
              "decoder_conv3": decoder.out}
    for number, (name, layer) in enumerate(layers.items(), start=7):
        w = layer.weight.detach()
        down, across = "out", "in"  # the axes of w: (out, in, H, W)
        if isinstance(layer, nn.ConvTranspose2d):
            down, across = "in", "out"
        if w.shape[0] > w.shape[1]:  # wider than high it fits the page
            w = w.transpose(0, 1)
            down, across = across, down
        draw_maps(run, f"fig{number:02d}_{name}_kernels", w.flatten(0, 1), w.shape[1],
                  f"{data_name}, kernels of {name}: a row for each map {down}, a column for "
                  f"each map {across}", "Red adds, blue subtracts: a kernel with a red and a "
                  "blue side answers to an edge.", cmap="RdBu_r", symmetric=True)


@torch.no_grad()
def draw_activations(run, model, data):
    """Figures 12 to 15: what each block makes of one pullover (digits: of one 2).

    Then journey, all blocks in one figure.
    """
    model.eval()
    encoder, decoder = model.encoder, model.decoder
    present = data.y_test.unique().tolist()
    pullover = present[min(2, len(present) - 1)]  # class 2; other data may have fewer classes
    x = data.x_test[data.y_test == pullover][:1]  # (1, 1, 28, 28)
    x1 = encoder.block1(x)
    x2 = encoder.block2(x1)
    z = encoder.linear(x2)
    x3 = decoder.block1(decoder.linear(z))
    x4 = decoder.block2(x3)
    names = ("encoder_block1", "encoder_block2", "decoder_block1", "decoder_block2")
    for number, (name, maps) in enumerate(zip(names, (x1, x2, x3, x4), strict=True), start=12):
        draw_maps(run, f"fig{number}_{name}_activations", maps[0], 8,
                  f"{data.name}, a test {data.classes[pullover]}: activations after {name}, "
                  f"{maps.shape[1]} maps of {maps.shape[2]}x{maps.shape[3]}",
                  "Can you still see what it is? What does each map answer to?")

    kernels = encoder.block1[0].weight[:, 0]
    rows = {"image": x[0], "first kernels": kernels, "their answers": x1[0],
            "after block 2": x2[0], "code z": z[0], "decoder, block 1": x3[0],
            "decoder, block 2": x4[0], "image rebuilt": torch.sigmoid(decoder.out(x4))[0]}
    colors = {"image": "gray", "first kernels": "RdBu_r", "image rebuilt": "gray"}
    fig = Figure(figsize=(9, 9), layout="constrained")
    for ax, (label, maps) in zip(fig.subplots(len(rows), 1), rows.items(), strict=True):
        maps = maps.cpu()
        if maps.ndim == 1:  # the code
            ax.bar(range(len(maps)), maps.numpy())
            ax.axhline(0, color="black", lw=0.5)
            size = f"{len(maps)} numbers"
        else:  # (N, H, W), of which the first ten
            grid = make_grid(maps[:10, None], nrow=10, padding=1, pad_value=float("nan"))[0]
            ax.imshow(grid.numpy(), cmap=colors.get(label, "viridis"))
            size = f"{maps.shape[1]}x{maps.shape[2]}"
            if len(maps) > 1:
                size = f"{min(10, len(maps))} of {len(maps)}: {size}"
        ax.set(xticks=[], yticks=[], frame_on=False)
        ax.set_ylabel(f"{label}\n{size}", rotation=0, ha="right", va="center")
    fig.suptitle(f"{data.name}, a test {data.classes[pullover]}: 784 pixels to {z.shape[1]} "
                 "numbers and back")
    run.save(fig, "journey", "Where does the picture stop being one, and where is it one again?")


# --------------------------------------------------------------------------- search


def suggest(trial):
    """The search space: a point in it as {flag: value}.

    --hidden stays at 38, so that no network exceeds the report's 29,716 parameters. Values are
    rounded to two digits, for a command at the end that can be read.
    """
    values = {"latent_dim": trial.suggest_int("latent_dim", 4, 38),
              "batch_size": trial.suggest_int("batch_size", 32, 128, step=16),
              "dropout": trial.suggest_float("dropout", 0, 0.5, step=0.1),
              "lr": trial.suggest_float("lr", 1e-3, 3e-2, log=True),
              "weight_decay": trial.suggest_float("weight_decay", 1e-7, 1e-3, log=True)}
    return {k: v if isinstance(v, int) else float(f"{v:.2g}") for k, v in values.items()}


FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)  # an interrupted one is neither


def open_study(args, where):
    """The study in a journal file or a database, new or there already."""
    storage = where  # the URL of a database
    if "://" not in where:  # a file, with a lock that also works on Windows
        storage = optuna.storages.JournalStorage(
            JournalFileBackend(where, JournalFileOpenLock(where)))
    # a trial that is worse than the median of those before it ends early, but not before its
    # learning rate has passed the peak
    pruner = optuna.pruners.MedianPruner(n_warmup_steps=math.ceil(args.epochs / 2))
    # costs compare only within a study of the same settings, so its name tells them
    name = (f"ae-{args.data}{'-fast' if args.fast else ''}-seed{args.seed}-epochs{args.epochs}"
            f"-price{args.price}")
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True,
                                direction="minimize", pruner=pruner)
    # the report's values come first, and once more where Ctrl-C made them fail (of a new study
    # all() is true: there are none)
    if all(t.state == TrialState.FAIL for t in study.trials if t.user_attrs.get("report")):
        study.enqueue_trial(REPORT, user_attrs={"report": True})
    return study


def run_trial(trial, args, x_train, x_val):
    """A short training with values that suggest() draws; returns its cost in the last epoch."""
    # All draws follow from the seed and the trial's number; with one seed for all, processes that
    # share a --storage would try the same points. A new sampler for each trial loses nothing: TPE
    # reads the trials before it from the study
    rng = common.seed_everything(args.seed, trial.number)
    trial.study.sampler = optuna.samplers.TPESampler(seed=rng.initial_seed())  # rng's own seed
    values = suggest(trial)
    print(f"trial {trial.number}:", *(f"{k} {v}" for k, v in values.items()), flush=True)
    changed = common.with_flags(args, **values)
    model = build(changed)
    optimizer, schedule = make_optimizer(model, changed, len(x_train))
    for epoch in range(1, args.epochs + 1):  # as in fit, but Optuna looks on
        rng = common.seed_everything(args.seed, trial.number, epoch)
        train_epoch(model, x_train, optimizer, schedule, changed, rng)
        cost = evaluate(model, x_val) + args.price * changed.latent_dim
        if not math.isfinite(cost):
            raise optuna.TrialPruned
        trial.report(cost, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return cost


def tune(args, data):
    """Search until args.tune trials are finished; returns the metrics.

    The cost is the validation MSE after a short training plus --price for each latent dimension.
    MSE alone always prefers more dimensions, and 38 may well be where the report's search ended
    for that reason: it is the upper end here. No data can tell what a dimension is worth; whoever
    wants the short code decides. The first ten trials are the report's values and random points;
    then TPE, Optuna's usual method, tries what is likely to be good after those before it.
    """
    train_idx, val_idx = common.split(data.y_train, args.seed)
    x_train, x_val = data.x_train[train_idx], data.x_train[val_idx]  # all that a trial sees
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # we print two lines for each trial
    run = common.Run(args, data)
    where = args.storage or str(run.folder / "study.journal")
    try:
        study = open_study(args, where)
    except Exception as error:  # each kind of storage raises its own
        common.fail(f"cannot keep a study in {where} ({type(error).__name__}: {error})")
    # --resume only redraws a finished search; where its study is lost, an empty one was just made
    if (run.folder / "metrics.json").exists() and not study.get_trials(states=FINISHED):
        common.fail(f"the study of a finished run, {where}, is gone: start a new one")

    def say(study, trial):
        print(f"trial {trial.number}: {trial.state.name.lower()}, "
              f"{len(study.get_trials(states=FINISHED))} of {args.tune} finished", flush=True)

    if len(study.get_trials(states=FINISHED)) < args.tune:
        try:
            study.optimize(lambda trial: run_trial(trial, args, x_train, x_val),
                           callbacks=[say, MaxTrialsCallback(args.tune, FINISHED)])
        except AssertionError as error:
            if str(error) != "Should not reach.":
                raise  # a bug in a model, say
            # Optuna says so where a full disk keeps it from noting down that a trial failed
            raise OSError(f"cannot write to the study in {where}") from error
    return finish_search(args, run, study, data.name)


def finish_search(args, run, study, data_name):
    """The table of trials and their picture, with the best command; returns the metrics."""
    rows = []
    for trial in study.get_trials(states=FINISHED):
        # a pruned trial has the last cost that it reported, and no row if even its first was nan
        if trial.value is not None:
            values = suggest(trial)  # of a finished trial: those that it had
            rows.append({"trial": trial.number, "state": trial.state.name.lower(), **values,
                         "epochs": len(trial.intermediate_values), "cost": trial.value,
                         "val_mse": trial.value - args.price * values["latent_dim"],
                         "report": trial.user_attrs.get("report", False)})
    rows.sort(key=lambda row: (row["state"], row["cost"]))  # "complete" before "pruned"
    if not rows or rows[0]["state"] != "complete":
        common.fail("not one trial was completed", status=1)
    best = {k: v for k, v in rows[0].items() if k not in ("state", "epochs", "report")}
    best["command"] = "python ae.py " + " ".join(
        f"--{name.replace('_', '-')} {best[name]}" for name in REPORT)  # what is searched
    draw_search(run, rows, data_name)
    table = common.table([list(rows[0]), *(list(row.values()) for row in rows)])
    return run.finish({"best": best, "trials": rows}, [
        *table, "", f"train with the best values: {best['command']} --data {args.data}"])


def draw_search(run, rows, data_name):
    """The cost of each trial, over its number and over three of its values; rows: dicts."""
    xs = {"trial": "trial", "latent_dim": "latent dimension", "dropout": "dropout",
          "lr": "learning rate"}
    fig = Figure(figsize=(12, 3.6), layout="constrained")
    for ax, (key, label) in zip(fig.subplots(1, len(xs), sharey=True), xs.items(), strict=True):
        for state, marker, color in (("complete", "o", "C0"), ("pruned", "x", "gray")):
            chosen = [row for row in rows if row["state"] == state]
            ax.scatter([row[key] for row in chosen], [row["cost"] for row in chosen], color=color,
                       marker=marker, label=state)
        chosen = [row for row in rows if row["report"]]
        ax.scatter([row[key] for row in chosen], [row["cost"] for row in chosen], s=150, color="C3",
                   facecolors="none", label="the report's values")
        ax.set(xlabel=label, yscale="log")
        ax.grid(alpha=0.3)
    fig.axes[0].set_ylabel("cost: validation MSE + price")
    fig.axes[0].yaxis.set_minor_formatter("{x:.3f}")
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside right center")
    fig.suptitle(f"{data_name}: which value makes a trial good? Pruned ones ended early")
    run.save(fig, "search", "Which of the values decides the cost, and which does not matter?")


# --------------------------------------------------------------------------- ablation

# what each changes; the factors and SGD's learning rate are the best of a few tried. That rate is
# so high because gradients are small, the loss being a mean over 784 pixels; Adam divides by their
# size
VARIANTS = {
    "baseline": {},
    "no batch norm": {"batchnorm": False},
    "dropout 0.2": {"dropout": 0.2},
    "L1, 1e-6": {"l1": 1e-6},
    "L2, 1e-5": {"weight_decay": 1e-5},
    "SGD, lr 10": {"optimizer": "sgd", "lr": 10.0},
}


def ablate(args, data, repeats=3):
    """Train every variant with every seed, all equally long; returns the metrics.

    On validation data: which regulariser to take is a choice. (Its factor was chosen on the same
    images, so the best may look a little too good.) Where train_mse and val_mse hardly differ, as
    here, a regulariser has nothing to win. The variants share each seed's split, weights and
    batches, so their differences spread less than their values.
    """
    run = common.Run(args, data, columns=("train_loss", "train_mse", "val_mse"))
    ablation = {}
    for name, flags in VARIANTS.items():
        last_rows = []  # the numbers of the last epoch, of each seed
        for seed in range(args.seed, args.seed + repeats):
            train_idx, val_idx = common.split(data.y_train, seed)
            _, rows = fit(common.with_flags(args, **flags), run, f"{name}, seed {seed}",
                          (seed, 0),  # 0: the only fold
                          data.x_train[train_idx], data.x_train[val_idx])
            last_rows.append(rows[-1])
        each = [row["val_mse"] for row in last_rows]
        if name == "baseline":
            baseline = each
        differences = [a - b for a, b in zip(each, baseline, strict=True)]
        ablation[name] = {
            "variant": name, "val_mse": statistics.mean(each), "std": statistics.stdev(each),
            "difference": statistics.mean(differences),
            "difference_std": statistics.stdev(differences),
            "train_mse": statistics.mean(row["train_mse"] for row in last_rows),
            "each": each, "flags": flags}
    common.draw_ablation(run, {name: row["each"] for name, row in ablation.items()},
                         "validation MSE per pixel", f"{data.name}, {args.epochs} epochs each")
    columns = ("variant", "val_mse", "std", "difference", "difference_std", "train_mse")
    rows = [[row[column] for column in columns] for row in ablation.values()]
    return run.finish({"ablation": ablation}, common.table([columns, *rows]))


# --------------------------------------------------------------------------- main


def main(argv=None):
    """Train, test once, draw; returns the metrics as a dict."""
    args = parse_args(argv)
    data = common.load_data(args)
    if args.tune:
        return tune(args, data)
    if args.ablate:
        return ablate(args, data)
    run = common.Run(args, data, columns=("train_loss", "train_mse", "val_mse"))
    folds = []
    splits = common.splits(data.y_train, args.folds, args.seed)
    for fold, (name, (train_idx, val_idx)) in enumerate(splits.items()):
        x_train, x_val = data.x_train[train_idx], data.x_train[val_idx]
        model, rows = fit(args, run, name, (args.seed, fold), x_train, x_val)
        folds.append({"val_mse": evaluate(model, x_val),
                      "test_mse": evaluate(model, data.x_test)})  # after all choices

    # figures and the other numbers are those of the last fold: model, rows, x_train
    recon_pca = common.pca_reconstruct(x_train, data.x_test, args.latent_dim)
    figure = "fig01" if args.recipe == "first" else "fig02"
    common.draw_reconstructions(run, f"{figure}_reconstructions", data, {
        "original": data.x_test, "AE": reconstruct(model, data.x_test), "PCA": recon_pca})
    common.plot_curves(run, "fig03_loss", rows, {"MSE per pixel": ("train_mse", "val_mse")},
                       f"{data.name}: autoencoder, latent {args.latent_dim}",
                       "Does the validation curve part from that of training images?")
    # the dimensions in figure 4; the report shows 2 and 3
    dims = [2, 3] if args.latent_dim > 3 else [0, args.latent_dim - 1]
    knn = common.draw_latent(run, encode(model, data.x_test), data, dims, numbers=(4, 5, 6))
    draw_kernels(run, model, data.name)
    draw_activations(run, model, data)

    metrics = {**common.over_folds(folds), "folds": args.folds,
               "pca_mse": mse(recon_pca, data.x_test).item(),
               "train_mse": evaluate(model, x_train),
               "parameters": sum(p.numel() for p in model.parameters()),
               "latent_dim": args.latent_dim, "knn_accuracy": knn}
    report_latent, report_mse = (100, 0.023) if args.recipe == "first" else (38, 0.013)
    table = [("MSE per pixel", "validation", "test")]
    for name, fold in zip(splits, folds, strict=True):
        table.append((f"autoencoder, {name}", fold["val_mse"], fold["test_mse"]))
    if args.folds > 1:
        table.append(("mean of the folds", metrics["val_mse"], metrics["test_mse"]))
    table += [(f"PCA, {args.latent_dim} components", None, metrics["pca_mse"]),
              (f"the report, latent {report_latent}", None, report_mse)]
    return run.finish(metrics, common.table(table), model)


if __name__ == "__main__":
    common.start(main)
