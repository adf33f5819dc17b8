"""Why can the losses of a GAN not tell how good its samples are, and what can?

Section 3 of the report: a GAN, what its losses can tell, and which model is the best generator.

    python gan.py                       our best small GAN
    python gan.py --recipe report       the report's networks and settings: 100 epochs
    python gan.py --ablate              one ingredient changed at a time, and other noise sizes
    python gan.py --ablate --recipe report   the same to the report's recipe
    python gan.py --compare             AE, VAE and both GANs side by side as generators
    python gan.py --fast                smoke test in seconds

FashionMNIST, 10,000 samples against the test images (results/gan*), three seeds: Frechet distance
6.3 +- .4, precision .87, recall .83, with 398,306 parameters, in 26 minutes on one core beside
another run. The report's recipe in full has 149 +- 13, and each loss within .1 of ours; training
images, taken as samples, have 0.2.

The judge of the samples is the CNN of `finetune.py --model cnn --epochs 8`, trained first where it
is not there yet, or that of --judge DIR. Distances by different judges do not compare. Each run
writes to a new folder in runs/.
"""

import argparse
import copy
import math
import statistics
from collections import defaultdict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from torch.nn.utils import get_total_norm
from torch.nn.utils.parametrizations import spectral_norm

import ae
import common
import finetune
import vae

# --------------------------------------------------------------------------- flags

RECIPES = {
    "best": {},
    # the report gives all but the widths and the batch size. Our guesses; 128 is DCGAN's
    "report": {"noise_dim": 32, "filters": [64, 32, 16], "d_filters": [16, 32], "batchnorm": False,
               "spectral_norm": False, "init_std": 0.02, "lr": 0.0002, "beta1": 0.5,
               "schedule": "constant", "ema": 0.0, "batch_size": 128, "epochs": 100,
               "augment": "flip"},
}
# seeds of the noise for validation, figures, test. They do not follow --seed, so that two runs show
# the same vectors
VAL_NOISE, FIGURE_NOISE, WALK_NOISE, TEST_NOISE, COMPARE_NOISE = 0, 1, 2, 3, (10, 11, 12)
# --ablate and --compare take only these flags, beside those of every run
MODES = {"ablate": ("recipe", "judge", "epochs", "batch_size"),
         "compare": ("ae", "vae", "gan", "gan_report", "judge")}


def defaults(args):
    """{flag: default} where --recipe, --fast or a mode changes it; see defaults in ae.py."""
    return RECIPES[args.recipe] | ({"epochs": 3} if args.ablate or args.fast else {})


def parse_args(argv=None):
    number = common.number
    parser = common.Parser(__doc__)
    group = parser.add_argument_group("what to turn first")
    group.add_argument("--noise-dim", type=number(int, 1, 784), default=32,
                       help="size D of the noise z that an image is made from")
    group.add_argument("--beta1", type=number(float, 0, 0.999), default=0.0,
                       help="Adam's momentum, with which the two networks may overshoot in "
                            "turn; DCGAN took 0.5")
    group.add_argument("--ablate", action="store_true",
                       help="change one ingredient at a time, and the size of the noise: two "
                            "trainings each, of 3 epochs")
    group.add_argument("--compare", action="store_true",
                       help="AE, VAE and both GANs side by side; trains what is not there yet")
    common.add_training_flags(parser, RECIPES, epochs=16, batch_size=64, lr=0.006, augment="none",
                              folds=False)
    group = parser.add_argument_group("model")
    group.add_argument("--filters", type=number(int, 1, 512), nargs=3, default=[128, 64, 32],
                       help="maps that enter the generator's three transposed convolutions")
    group.add_argument("--d-filters", type=number(int, 1, 512), nargs="+", default=[64, 96, 80],
                       help="maps of the discriminator's convolutions, four at most; what a number "
                            "in the last maps sees is 10x10 pixels with two convolutions, as in "
                            "the report, and 22x22 with three")
    group.add_argument("--batchnorm", action=argparse.BooleanOptionalAction, default=True,
                       help="normalise the generator's maps over the batch")
    group.add_argument("--spectral-norm", action=argparse.BooleanOptionalAction, default=True,
                       help="divide each weight of the discriminator by its largest singular "
                            "value: its slope, and so the generator's gradient, stays bounded "
                            "(arXiv 1802.05957)")
    group.add_argument("--init-std", type=number(float, 0, 1), default=0.0,
                       help="first weights from N(0, this), DCGAN: 0.02; 0: PyTorch's own")
    group = parser.add_argument_group("optimisers")
    group.add_argument("--schedule", choices=("linear", "constant"), default="linear",
                       help="linear: both learning rates fall to zero")
    group.add_argument("--ema", type=number(float, 0, 0.99999), default=0.999,
                       help="samples come from a moving average of G's weights; 0: from G itself")
    group = parser.add_argument_group("runs of other chapters")
    for name in ("ae", "vae", "gan", "gan-report"):
        group.add_argument(f"--{name}", metavar="DIR", help="for --compare: take this run")
    group.add_argument("--judge", metavar="DIR",
                       help="the run of finetune.py whose CNN judges the samples; without it that "
                            "of `finetune.py --model cnn --epochs 8`, made first if need be")
    args = common.parse(parser, "gan", argv, defaults, MODES)
    if not args.compare and (args.ae or args.vae or args.gan or args.gan_report):
        parser.error("--ae, --vae, --gan and --gan-report go only with --compare")
    if len(args.d_filters) > 4:
        parser.error("--d-filters: four convolutions at most, each halves the 28 pixels")
    return args


# --------------------------------------------------------------------------- model


class Generator(nn.Module):
    """Noise z (B, D) -> images (B, 1, 28, 28) in (0, 1)."""

    def __init__(self, noise_dim=32, filters=(128, 64, 32), batchnorm=True):
        super().__init__()
        f1, f2, f3 = filters
        norm = nn.BatchNorm2d if batchnorm else nn.Identity
        self.noise_dim = noise_dim
        self.linear = nn.Sequential(nn.Linear(noise_dim, f1 * 4 * 4), nn.Unflatten(1, (f1, 4, 4)),
                                    norm(f1), nn.ReLU())
        self.block1 = nn.Sequential(nn.ConvTranspose2d(f1, f2, 3, stride=2, padding=1), norm(f2),
                                    nn.ReLU())
        self.block2 = nn.Sequential(nn.ConvTranspose2d(f2, f3, 4, stride=2, padding=1), norm(f3),
                                    nn.ReLU())
        self.out = nn.ConvTranspose2d(f3, 1, 4, stride=2, padding=1)

    def forward(self, z):      # (B, D)
        x = self.linear(z)     # (B, f1, 4, 4)
        x = self.block1(x)     # (B, f2, 7, 7)
        x = self.block2(x)     # (B, f3, 14, 14)
        return torch.sigmoid(self.out(x))  # (B, 1, 28, 28)


class Discriminator(nn.Module):
    """Images (B, 1, 28, 28) -> logits (B,): above 0 is "real". filters: of each convolution."""

    def __init__(self, filters=(64, 96, 80)):
        super().__init__()
        self.blocks, f_in, size = nn.Sequential(), 1, 28
        for f in filters:
            conv = nn.Conv2d(f_in, f, 4, stride=2, padding=1)
            self.blocks.append(nn.Sequential(conv, nn.LeakyReLU(0.2)))
            f_in, size = f, size // 2  # 14, 7, 3
        self.linear = nn.Linear(f_in * size * size, 1)

    def forward(self, x):            # (B, 1, 28, 28)
        x = 2 * x - 1                # black as 0 would give the weights on it no gradient
        x = self.blocks(x)           # (B, f3, 3, 3)
        return self.linear(x.flatten(1)).squeeze(1)


def build(args):
    """(netG, netD) as the flags say. The last activation, D's sigmoid, is inside the loss."""
    netG = Generator(args.noise_dim, args.filters, args.batchnorm)
    netD = Discriminator(args.d_filters)
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    if args.init_std:
        for layer in (*netG.modules(), *netD.modules()):
            if isinstance(layer, kinds):
                nn.init.normal_(layer.weight, 0, args.init_std)
    if args.spectral_norm:
        for layer in list(netD.modules()):  # a list, since each call adds a module to netD
            if isinstance(layer, kinds):
                spectral_norm(layer)  # divides the weight by its largest singular value
    return netG.to(args.device), netD.to(args.device)


def load_run(folder):
    """The averaged generator of a finished run of this script."""
    return common.load_run(folder, "gan", parse_args, lambda args: build(args)[0])


def load_judge(args, data):
    """The CNN that judges the samples: of --judge, or a new one."""
    folder = args.judge or common.trained("finetune", args, minutes=6, name="judge",
                                          flags=["--model", "cnn", "--epochs", "8"])
    # a run of all models is one, too: it keeps the weights of its last model, the CNN
    if common.read_config(folder, "finetune")["flags"]["model"] not in ("cnn", "all"):
        common.fail(f"{folder} is no run of finetune.py --model cnn, which the judge is")
    judge = common.load_run(folder, "finetune", finetune.parse_args,
                            lambda flags: finetune.CNN(len(data.classes)))  # of fixed size
    return judge.to(args.device)


# --------------------------------------------------------------------------- loss

CHANCE = {"d_loss": 2 * math.log(2), "g_loss": math.log(2)}  # where D answers 1/2 to everything


def bce(logits, target):
    """Binary cross entropy of logits (B,) with one target for all: 1 real, 0 fake; the mean."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


# --------------------------------------------------------------------------- training


def train_epoch(netG, netD, netG_ema, x, g_optimizer, d_optimizer, schedules, args, rng):
    """One pass over x (N, 1, 28, 28). Returns the epoch's means over the images as a dict.

    d_loss, g_loss; d_accuracy_real, d_accuracy_fake: how often D was right, before its step;
    g_gradient: the norm of G's gradient. A small one alone does not slow G down: Adam divides each
    gradient by its usual size.
    """
    netG.train()
    netD.train()
    totals = dict.fromkeys(("d_loss", "g_loss", "d_accuracy_real", "d_accuracy_fake",
                            "g_gradient"), 0.0)
    for idx in common.batches(x, args.batch_size, rng):
        real = common.augment(x[idx], args.augment, rng)
        z = torch.randn(len(idx), args.noise_dim, generator=rng).to(x.device)

        # step 1, D: "real" for real images, "fake" for G's. detach: this is no step of G
        fake = netG(z)
        real_logits, fake_logits = netD(real), netD(fake.detach())
        d_loss = bce(real_logits, 1.0) + bce(fake_logits, 0.0)
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()

        # step 2, G: make D say "real" (the non-saturating loss of arXiv 1406.2661, section 3).
        # inputs: D's own gradients would cost time, and its next zero_grad would throw them away
        g_loss = bce(netD(fake), 1.0)
        g_optimizer.zero_grad()
        g_loss.backward(inputs=list(netG.parameters()))
        g_optimizer.step()

        # The decay grows from .1 to args.ema: else the random weights of the start would count for
        # thousands of steps
        steps = schedules[0].last_epoch  # done so far; a schedule calls its steps epochs
        update_average(netG_ema, netG, decay=min(args.ema, (1 + steps) / (10 + steps)))
        for schedule in schedules:
            schedule.step()

        means = {"d_loss": d_loss.detach(), "g_loss": g_loss.detach(),
                 "d_accuracy_real": (real_logits > 0).float().mean(),
                 "d_accuracy_fake": (fake_logits < 0).float().mean(),
                 "g_gradient": get_total_norm(p.grad for p in netG.parameters())}
        for name in totals:  # stays on the device: .item() would make a GPU wait
            totals[name] += means[name] * len(idx)
    return {name: (total / len(x)).item() for name, total in totals.items()}


@torch.no_grad()
def update_average(netG_ema, netG, decay):
    """netG_ema = decay * netG_ema + (1 - decay) * netG, weights and BatchNorm's statistics.

    G may circle around a good place rather than reach it; the average lies inside.
    """
    for average, value in zip(netG_ema.state_dict().values(), netG.state_dict().values(),
                              strict=True):  # these are the tensors themselves, no copies
        if average.is_floating_point():  # BatchNorm also counts its batches
            average.lerp_(value, 1 - decay)


def make_optimizer(net, args, n):
    """Adam and its learning rate schedule, advanced after every step, for n training images."""
    optimizer = torch.optim.Adam(net.parameters(), args.lr, betas=(args.beta1, 0.999), fused=True)
    if args.schedule == "linear":
        steps = args.epochs * math.ceil(n / args.batch_size)
        return optimizer, torch.optim.lr_scheduler.PolynomialLR(optimizer, steps)  # of power 1
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)  # no schedule


def fit(args, run, part, seeds, x_train, judge, val_features):
    """Train one GAN on x_train (N, 1, 28, 28) as one part of the run.

    val_features: the judge's, of the validation images. seeds: numbers that, with the epoch, decide
    every draw. Returns the averaged generator of the best epoch, the numbers of all epochs as a
    list of dicts, and what the same ten noise vectors gave after each epoch, (10, 1, 28, 28) each.
    """
    common.seed_everything(*seeds)
    netG, netD = build(args)
    netG_ema = copy.deepcopy(netG)  # this one draws the samples, netG only learns
    g_optimizer, g_schedule = make_optimizer(netG, args, len(x_train))
    d_optimizer, d_schedule = make_optimizer(netD, args, len(x_train))
    # first is 1, unless an interrupted run goes on: then begin() restores all of these as they were
    # saved, and returns the next epoch. load_best() will find the best weights of netG_ema
    first = run.begin(part, args.epochs, netG_ema, netG=netG, netD=netD, g_optimizer=g_optimizer,
                      d_optimizer=d_optimizer, g_schedule=g_schedule, d_schedule=d_schedule)
    # half as many samples as real images, to save time. The distance depends on their number, so
    # main() takes as many training images for the line beside this curve
    z_val = noise(len(val_features) // 2, args.noise_dim, VAL_NOISE, args.device)
    z_shown = noise(10, args.noise_dim, FIGURE_NOISE, args.device)
    for epoch in range(first, args.epochs + 1):
        rng = common.seed_everything(*seeds, epoch)
        row = train_epoch(netG, netD, netG_ema, x_train, g_optimizer, d_optimizer,
                          (g_schedule, d_schedule), args, rng)
        features = finetune.encode(judge, sample(netG_ema, z_val))
        distance = frechet_distance(features, val_features)
        run.end_epoch(score=distance, **row, val_frechet=distance,
                      images=sample(netG_ema, z_shown))
    run.load_best(netG_ema)
    return netG_ema, run.rows, run.images


# --------------------------------------------------------------------------- evaluation


@torch.no_grad()
def sample(netG, z):
    """Images (N, 1, 28, 28) from noise z (N, D): each from its own row of z alone."""
    netG.eval()  # with the statistics of a batch, an image would depend on its neighbours
    return common.in_batches(netG, z)


def noise(n, dim, seed, device="cpu"):
    """z (n, dim), the same for the same seed, without touching the training's draws."""
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)).to(device)


def frechet_distance(a, b):
    """Frechet distance between Gaussians fitted to features a (N, F) and b (M, F); 0 is best.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), with covariances A and B (Heusel et al., arXiv
    1706.08500). That paper's "FID" is this in the Inception network: with another judge the
    number is another. It is smaller for larger samples: compare equal sizes only.
    """
    a, b = a.cpu().double(), b.cpu().double()
    if not a.isfinite().all():  # of a GAN that diverged: eigvals would print a message of its own
        return math.nan
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # the eigenvalues of A B are real and >= 0, but for rounding
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    return distance.item()


def precision_recall(real, fake, k=3):
    """Precision: how much of fake (M, F) looks real; recall: how much of real (N, F) is covered.

    Around each point of a set lies a ball that reaches to its k-th nearest neighbour in the set; a
    set covers what lies in one of its balls (Kynkaanniemi et al., arXiv 1904.06991).
    """
    def covered(points, by):  # in parts of 1,000 rows: distances take 40 MB instead of 400
        radius = torch.cat([torch.cdist(part, by).kthvalue(k + 1).values  # + 1: itself, at 0
                            for part in by.split(1000)])
        inside = torch.cat([(torch.cdist(part, by) <= radius).any(1)
                            for part in points.split(1000)])
        return inside.float().mean().item()
    return covered(fake, by=real), covered(real, by=fake)


def two_sample(real, fake, n=2000):
    """Leave-one-out 1-NN two-sample test: how often the nearest neighbour tells real from fake.

    real, fake (N, F): the first n of each, pooled; each point is given the label of its nearest
    other one (arXiv 1610.06545, 1806.07755). Returns the accuracy on the real half and on the fake
    half: .5 and .5 if the two sets are one distribution. Both are reported, for their mean hides
    blur: blurred images lie near everything, so real ones are taken for fake (below .5) and fake
    ones are recognised (above).
    """
    n = min(n, len(real), len(fake))
    pooled = torch.cat([real[:n].flatten(1), fake[:n].flatten(1)])
    neighbour = torch.cdist(pooled, pooled).fill_diagonal_(math.inf).argmin(1)
    right = (neighbour < n) == (torch.arange(2 * n, device=neighbour.device) < n)
    return right[:n].float().mean().item(), right[n:].float().mean().item()


@torch.no_grad()
def judge_images(judge, x, real_x, real_features):
    """All metrics of images x. real_x: as many real ones; real_features: the judge's, of these.

    Returns {"frechet", "precision", "recall", "two_sample" and "two_sample_pixels": (real half,
    fake half), "class_coverage": the share of each class in what the judge sees in x}.
    """
    features = finetune.encode(judge, x)
    precision, recall = precision_recall(real_features, features)
    logits = judge.head(features)
    return {"frechet": frechet_distance(real_features, features), "precision": precision,
            "recall": recall, "two_sample": two_sample(real_features, features),
            "two_sample_pixels": two_sample(real_x, x),
            "class_coverage": (logits.argmax(1).bincount(minlength=logits.shape[1])
                               / len(x)).tolist()}


def nearest(x, x_train):
    """For each of x: its nearest training image, and the Euclidean distance of the two."""
    distance, idx = torch.cdist(x.flatten(1), x_train.flatten(1)).min(1)
    return x_train[idx], distance


# --------------------------------------------------------------------------- figures


def draw_curves(run, rows, train_frechet, data_name):
    """Figure 24: both losses over the epochs with their chance level, and what they do not show.

    train_frechet: the distance of training images, which no generator can be expected to beat.
    """
    levels = {key: (f"{key} at chance level", value) for key, value in CHANCE.items()}
    levels |= {"d_accuracy_fake": ("chance level", 0.5),  # of both accuracies
               "val_frechet": (f"training images: {train_frechet:.1f}", train_frechet)}
    common.plot_curves(run, "fig24_loss", rows, {
        "loss": ("d_loss", "g_loss"), "D's accuracy": ("d_accuracy_real", "d_accuracy_fake"),
        "Frechet distance to validation images": ("val_frechet",),
        "norm of G's gradient": ("g_gradient",)},
        f"{data_name}: the losses of a GAN, and what its samples are worth",
        "Could you tell from the losses when the samples became good?", levels)


def draw_samples(run, netG, data, x_train, album):
    """Figure 25, the nearest training images, samples over the epochs, a walk between two.

    album: images of the same noise vectors, (10, 1, 28, 28) for each epoch.
    """
    args = run.args
    x = sample(netG, noise(56, args.noise_dim, FIGURE_NOISE, args.device))
    common.draw_rows(run, "fig25_samples", {"test images": data.x_test[:56], "generated": x}, 14,
                     f"{data.name}: real and generated images", "Which half is real?")
    rows = {"generated": x[:14], "nearest in\ntraining set": nearest(x[:14], x_train)[0]}
    common.draw_rows(run, "nearest", rows, 14, f"{data.name}: does the generator copy?",
                     "Alike, or the same?")
    epochs = np.unique(np.geomspace(1, len(album), 8).round().astype(int))  # more of the first ones
    common.draw_rows(run, "epochs", {f"epoch {e}": album[e - 1] for e in epochs}, len(album[0]),
                     f"{data.name}: the same noise vectors over the epochs",
                     "When do shapes settle, and when details?")
    z = noise(12, args.noise_dim, WALK_NOISE, args.device)
    angle = torch.linspace(0, math.pi / 2, 12, device=z.device)[:, None]
    # cos * a + sin * b is again N(0, I); halfway on a straight line z would be too short
    walks = [angle.cos() * a + angle.sin() * b for a, b in zip(z[:6], z[6:], strict=True)]
    common.draw_rows(run, "interpolation", {"": sample(netG, torch.cat(walks))}, 12,
                     f"{data.name}: from one noise vector to another, six times",
                     "Is every image on the way an image?")


# --------------------------------------------------------------------------- comparisons

VARIANTS = {  # one change at a time
    "best": {
        "ours": {}, "two layers in D": {"d_filters": [64, 128]},  # fewer, but wider
        "no batch norm": {"batchnorm": False},
        "no spectral norm": {"spectral_norm": False}, "no EMA": {"ema": 0.0},
        "rate 2e-4": {"lr": 2e-4}, "constant rate": {"schedule": "constant"},
        "beta1 0.5": {"beta1": 0.5}, "flips": {"augment": "flip"},
        "weights of DCGAN": {"init_std": 0.02},
        "noise 8": {"noise_dim": 8}, "noise 128": {"noise_dim": 128}},
    "report": {  # each alone, too
        "report": {}, "+ third layer in D": {"d_filters": [16, 32, 64]},
        "+ batch norm": {"batchnorm": True},
        "+ spectral norm": {"spectral_norm": True}, "+ EMA": {"ema": 0.999},
        "+ rate 6e-3": {"lr": 6e-3}, "+ beta1 0": {"beta1": 0.0},
        "+ linear rate": {"schedule": "linear"}, "+ no flips": {"augment": "none"},
        "+ weights of PyTorch": {"init_std": 0.0}, "noise 8": {"noise_dim": 8},
        "noise 128": {"noise_dim": 128}},
}


def ablate(args, data, repeats=2):
    """Train each variant of the recipe with each seed, all equally long; returns the metrics.

    On validation data: which ingredient to take is a choice. The variants share each seed's split,
    and one judge, which has learned from most of the second seed's validation images: compare
    variants, not seeds. A difference no larger than that between the seeds of the first variant,
    the recipe as it is, shows nothing. Widths and batch size differ between the recipes, and stay.
    """
    run = common.Run(args, data, columns=("d_loss", "g_loss", "val_frechet"))
    judge = load_judge(args, data)
    ablation = {}
    for name, change in VARIANTS[args.recipe].items():
        last_rows = []  # the numbers of the last epoch, of each seed
        for seed in range(args.seed, args.seed + repeats):
            train_idx, val_idx = common.split(data.y_train, seed)
            _, rows, _ = fit(
                common.with_flags(args, **change), run, f"{name}, seed {seed}", (seed,),
                data.x_train[train_idx], judge, finetune.encode(judge, data.x_train[val_idx]))
            last_rows.append(rows[-1])
        ablation[name] = {k: statistics.mean(row[k] for row in last_rows)
                          for k in ("val_frechet", "d_loss", "g_loss")}
        ablation[name]["each"] = [row["val_frechet"] for row in last_rows]
    common.draw_ablation(run, {name: row["each"] for name, row in ablation.items()},
                         "Frechet distance to validation images",
                         f"{data.name}, {args.epochs} epochs each")
    table = [("Frechet distance, validation", "mean", "each seed", "D loss", "G loss")]
    for name, row in sorted(ablation.items(), key=lambda item: item[1]["val_frechet"]):
        table.append((name, row["val_frechet"], " ".join(f"{v:.1f}" for v in row["each"]),
                      row["d_loss"], row["g_loss"]))
    return run.finish({"ablation": ablation}, common.table(table))


def shuffled(x, seed):
    """x in another order."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)]


def sample_density(net, density, n, seed):
    """n images (n, 1, 28, 28) that an autoencoder decodes from draws of a density of its codes."""
    density.random_state = seed  # the seed of sample(), which takes none
    # shuffled: sample() returns one Gaussian after the other, and figures show the first images
    z = shuffled(torch.tensor(density.sample(n)[0]).float(), seed)
    return vae.decode(net, z.to(next(net.parameters()).device))  # of an AE, too: it has a decoder


def sample_sets(folders, args, data):
    """For each seed of COMPARE_NOISE {name: n images}, from the same four runs.

    n: as many as test images. Reconstructions and training images are no generators: they say what
    the numbers can reach.
    """
    netA, netV = ae.load_run(folders["ae"]), vae.load_run(folders["vae"])
    ours, report = load_run(folders["gan"]), load_run(folders["gan_report"])
    for net in (netA, netV, ours, report):
        net.to(args.device)
    n, x_train = len(data.x_test), data.x_train
    print("fitting Gaussians to the codes of AE and VAE", flush=True)
    # an autoencoder has no noise to start from: its codes get a mixture of Gaussians as a density
    z_ae, z_vae = ae.encode(netA, x_train).cpu(), vae.encode(netV, x_train)[0].cpu()
    ae_1 = GaussianMixture(1, random_state=args.seed).fit(z_ae.double())
    ae_50 = GaussianMixture(50, random_state=args.seed).fit(z_ae.double())
    vae_50 = GaussianMixture(50, random_state=args.seed).fit(z_vae.double())
    for seed in COMPARE_NOISE:
        x = shuffled(x_train, seed)[:n]
        yield {
            "AE, Gaussian": sample_density(netA, ae_1, n, seed),
            "AE, 50 Gaussians": sample_density(netA, ae_50, n, seed),
            "VAE, prior": vae.decode(netV, noise(n, z_vae.shape[1], seed, args.device)),
            "VAE, 50 Gaussians": sample_density(netV, vae_50, n, seed),
            "GAN, report": sample(report, noise(n, report.noise_dim, seed, args.device)),
            "GAN, ours": sample(ours, noise(n, ours.noise_dim, seed, args.device)),
            "AE, reconstructions": ae.reconstruct(netA, x),
            "VAE, reconstructions": vae.reconstruct(netV, x),
            "training images": x}


def compare(args, data):
    """Judge each generator on three sets of samples; returns the metrics, means and spreads."""
    run = common.Run(args, data)
    judge = load_judge(args, data)
    # a GAN's best epoch is chosen by the judge, so it must be the same one
    with_judge = ["--judge", args.judge] if args.judge else []
    folders = {  # named by flags, or else made first where they are not there
        "ae": args.ae or common.trained("ae", args, minutes=9),
        "vae": args.vae or common.trained("vae", args, minutes=7),
        "gan": args.gan or common.trained("gan", args, minutes=27, flags=with_judge),
        "gan_report": args.gan_report or common.trained(
            "gan", args, minutes=65, name="gan-report", flags=["--recipe", "report", *with_judge])}
    test_features = finetune.encode(judge, data.x_test)
    judged, shown = defaultdict(list), {}
    for sets in sample_sets(folders, args, data):
        for name, x in sets.items():
            judged[name].append(judge_images(judge, x, data.x_test, test_features))
            print(f"{name}, set {len(judged[name])}: Frechet {judged[name][-1]['frechet']:.1f}",
                  flush=True)
            shown[name] = x[:14]
    results = {}
    for name, each in judged.items():
        results[name] = {key: np.mean([row[key] for row in each], axis=0).tolist()  # of lists, too
                         for key in each[0]}
        for key in ("frechet", "precision", "recall"):
            results[name][f"{key}_std"] = statistics.stdev(row[key] for row in each)
    common.draw_rows(run, "generators", {
        f"{name}\nFrechet {results[name]['frechet']:.1f}": x for name, x in shown.items()}, 14,
        f"{data.name}: which model is the best generator?",
        "Look for blur, and for kinds of clothes that are never made.")
    table = [("", "Frechet", "precision", "recall", "1-NN: real", "generated")]
    for name, r in results.items():
        table.append((name, r["frechet"], r["precision"], r["recall"], *r["two_sample"]))
    return run.finish({"samples": len(data.x_test), "generators": results, "runs": folders}, [
        "means over three sets of samples, of one training each",
        "1-NN: which share of the real and of the generated images is recognised", "",
        *common.table(table)])


# --------------------------------------------------------------------------- main


def main(argv=None):
    """Train, test once, draw; returns the metrics as a dict."""
    args = parse_args(argv)
    data = common.load_data(args)
    if args.compare:
        return compare(args, data)
    if args.ablate:
        return ablate(args, data)
    run = common.Run(args, data, columns=("d_loss", "g_loss", "val_frechet"))
    judge = load_judge(args, data)
    train_idx, val_idx = common.split(data.y_train, args.seed)
    x_train, x_val = data.x_train[train_idx], data.x_train[val_idx]
    val_features = finetune.encode(judge, x_val)
    netG, rows, album = fit(args, run, args.recipe, (args.seed,), x_train, judge, val_features)

    # after all choices: the test set, with the averaged weights of the best validation epoch
    n, test_features = len(data.x_test), finetune.encode(judge, data.x_test)
    x = sample(netG, noise(n, args.noise_dim, TEST_NOISE, args.device))
    found = judge_images(judge, x, data.x_test, test_features)
    # the judge was trained on these, so this is not quite the floor of new images
    floor = judge_images(judge, x_train[:n], data.x_test, test_features)
    # if samples lie closer to training images than test images do, they are copies or blurred (a
    # smooth image is near to everything); nearest.png shows which of the two
    near = nearest(x[:1000], x_train)[1].median().item()
    near_test = nearest(data.x_test[:1000], x_train)[1].median().item()
    train_features = finetune.encode(judge, x_train[:len(x_val) // 2])  # as many as z_val in fit
    draw_curves(run, rows, frechet_distance(train_features, val_features), data.name)
    draw_samples(run, netG, data, x_train, album)

    first, last, best = rows[0], rows[-1], min(rows, key=lambda row: row["val_frechet"])
    metrics = {
        **found, **{f"{k}_floor": v for k, v in floor.items()}, "nearest": near,
        "nearest_floor": near_test,
        # the losses are the last epoch's, the samples the best one's
        **{k: last[k] for k in ("d_loss", "g_loss", "d_accuracy_real", "d_accuracy_fake")},
        "samples": n, "g_gradient": [first["g_gradient"], last["g_gradient"]],
        "val_frechet": best["val_frechet"], "best_epoch": best["epoch"],
        "noise_dim": args.noise_dim, "recipe": args.recipe,
        "parameters": sum(p.numel() for net in build(args) for p in net.parameters())}  # G and D
    table = [(f"{n:,} samples, {n:,} test images", "Frechet", "precision", "recall", "D loss",
              "G loss"),
             ("this GAN", found["frechet"], found["precision"], found["recall"], last["d_loss"],
              last["g_loss"]),
             ("training images: the floor", floor["frechet"], floor["precision"],
              floor["recall"], None, None),
             ("the report", None, None, None, 1.36, 0.72),
             ("chance level, 2 ln 2 and ln 2", None, None, None, *CHANCE.values())]
    return run.finish(metrics, common.table(table), netG)


if __name__ == "__main__":
    common.start(main)
