"""What does it take to make a latent space that one can sample from, and what does beta trade?

Section 2 of the report: a variational autoencoder, its latent space, traversals, and beta.

    python vae.py                       the VAE with a true ELBO: beta 1
    python vae.py --beta 4              four times the pressure on the code
    python vae.py --sweep 0.25 1 4 16   one training per beta: the rate-distortion picture
    python vae.py --recipe report       squared error + beta * KL, as we read the report
    python vae.py --fast                smoke test in seconds
    python vae.py --latent-dim 2 --hidden 48 --augment none --epochs 16 --lr 0.006
                                        a latent space that fits on paper

FashionMNIST test images, one seed (results/vae*): MSE .0112 at beta 1 (PCA .0195), KL 50 nats, all
18 latents active, 80,454 parameters; .0117 and 31 nats at beta 4, in 6 minutes on 2 cores;
latent 2 .0256 (PCA .0461). Each run writes to a new folder in runs/.
"""

import copy
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from matplotlib.figure import Figure

import ae
import common

# --------------------------------------------------------------------------- flags

RECIPES = {
    "best": {},
    # squared error + beta * KL is a Gaussian likelihood of variance 1/2, up to a constant
    "report": {"sigma": math.sqrt(0.5)},
}


def parse_args(argv=None):
    number = common.number
    parser = common.Parser(description=__doc__.partition("\n")[0])
    group = parser.add_argument_group("model")
    group.add_argument("--latent-dim", type=number(int, 2, 784), default=18,
                       help="size D of the code z")
    group.add_argument("--hidden", type=number(int, 0, 4096), default=0,
                       help="width of a layer before mu and logvar, and of one after z; 0: none")
    group.add_argument("--filters", type=number(int, 1, 512), nargs=2, default=[16, 32],
                       help="maps of the encoder's two convolutions")
    group.add_argument("--decoder-filters", type=number(int, 1, 512), nargs=2, default=[32, 32],
                       help="maps that enter the decoder's two transposed convolutions")
    group = parser.add_argument_group("loss")
    group.add_argument("--beta", type=number(float, 0, 1e6), default=1.0,
                       help="weight of the KL: more makes z simpler and images blurrier")
    group.add_argument("--sweep", type=number(float, 0, 1e6), nargs="+", metavar="BETA",
                       help="train once with each of these betas; --beta says which one to show")
    group.add_argument("--sigma", type=number(float, 1e-3, 1e3),
                       help="standard deviation of a pixel given z; None: learned")
    group = parser.add_argument_group("figures")
    group.add_argument("--start-class", metavar="NAME",
                       help="class of the test image where traversals start; None: Bag, or digit 8")
    group.add_argument("--dims", type=number(int, 0, 783), nargs=2, metavar="D",
                       help="dimensions to traverse, from 0; None: the two with the largest KL")
    common.add_flags(parser, RECIPES, epochs=12, batch_size=64, lr=0.004, augment="flip")
    args = common.parse(parser, "vae", argv, RECIPES, fast={"epochs": 3})
    if args.dims and max(args.dims) >= args.latent_dim:
        parser.error(f"--dims {max(args.dims)}: z has dimensions 0 to {args.latent_dim - 1}")
    if args.sweep and args.folds > 1:
        parser.error("--sweep and --folds: choose one")
    return args


# --------------------------------------------------------------------------- model


class Encoder(nn.Module):
    """x (B, 1, 28, 28) -> mu, logvar (B, D) of q(z|x) = N(mu, diag(exp(logvar)))."""

    def __init__(self, latent_dim, hidden, filters):
        super().__init__()
        f1, f2 = filters
        self.block1 = nn.Sequential(nn.Conv2d(1, f1, 3), nn.ReLU(), nn.BatchNorm2d(f1),
                                    nn.MaxPool2d(2))
        self.block2 = nn.Sequential(nn.Conv2d(f1, f2, 3), nn.ReLU(), nn.BatchNorm2d(f2),
                                    nn.MaxPool2d(2))
        width = hidden or f2 * 5 * 5
        self.linear = nn.Sequential(nn.Linear(f2 * 5 * 5, hidden), nn.ReLU()) if hidden else (
            nn.Identity())
        self.mu = nn.Linear(width, latent_dim)
        self.logvar = nn.Linear(width, latent_dim)

    def forward(self, x):               # (B, 1, 28, 28)
        x = self.block1(x)              # (B, f1, 13, 13)
        x = self.block2(x).flatten(1)   # (B, f2 * 25): 5x5 pixels in each map
        x = self.linear(x)              # (B, hidden)
        return self.mu(x), self.logvar(x)


class Decoder(nn.Module):
    """z (B, D) -> recon_x (B, 1, 28, 28) in (0, 1), the mean of p(x|z)."""

    def __init__(self, latent_dim, hidden, decoder_filters):
        super().__init__()
        f1, f2 = decoder_filters
        first = [nn.Linear(latent_dim, hidden), nn.ReLU()] if hidden else []
        self.linear = nn.Sequential(*first, nn.Linear(hidden or latent_dim, f1 * 7 * 7), nn.ReLU(),
                                    nn.Unflatten(1, (f1, 7, 7)))
        # kernel 4 with stride 2: each pixel gets equally many contributions, no checkerboard
        self.block = nn.Sequential(nn.ConvTranspose2d(f1, f2, 4, stride=2, padding=1), nn.ReLU())
        self.out = nn.ConvTranspose2d(f2, 1, 4, stride=2, padding=1)

    def forward(self, z):               # (B, D)
        x = self.linear(z)              # (B, f1, 7, 7)
        x = self.block(x)               # (B, f2, 14, 14)
        return torch.sigmoid(self.out(x))


class VAE(nn.Module):
    """x (B, 1, 28, 28) -> recon_x (B, 1, 28, 28), mu, logvar (B, D).

    sigma: the standard deviation of a pixel in p(x|z), or None to learn it (one number for all
    pixels: sigma-VAE, arXiv 2006.13202).
    """

    def __init__(self, latent_dim=18, hidden=0, filters=(16, 32), decoder_filters=(32, 32),
                 sigma=None):
        super().__init__()
        self.encoder = Encoder(latent_dim, hidden, filters)
        self.decoder = Decoder(latent_dim, hidden, decoder_filters)
        # learned from 0.37 on, about the spread of the pixels themselves
        self.log_sigma = nn.Parameter(torch.tensor(-1.0 if sigma is None else math.log(sigma)),
                                      requires_grad=sigma is None)

    def forward(self, x, generator):
        mu, logvar = self.encoder(x)
        z = reparameterize(mu, logvar, generator)
        return self.decoder(z), mu, logvar


def load_run(folder):
    """The VAE of a finished run of this script: the best weights of its last fold or --beta."""
    state = common.load_checkpoint(Path(folder) / "checkpoint.pt", "vae")
    with common.reading(folder):
        flags, part = state["config"]["flags"], max(state["best"])
        if flags["beta"] in (flags["sweep"] or []):
            part = flags["sweep"].index(flags["beta"])
        model = VAE(flags["latent_dim"], flags["hidden"], flags["filters"],
                    flags["decoder_filters"], flags["sigma"])
        common.restore(model, state["best"][part]["model"], folder)
    return model


def reparameterize(mu, logvar, generator):
    """z (B, D) ~ N(mu, exp(logvar)), written so that gradients reach mu and logvar.

    The randomness is in eps, which depends on nothing (Kingma and Welling, arXiv 1312.6114, 2.4).
    It is drawn on the CPU: the same on every device.
    """
    eps = torch.randn(mu.shape, generator=generator).to(mu.device)
    return mu + torch.exp(0.5 * logvar.clamp(max=20)) * eps  # exp(200) would be inf


# --------------------------------------------------------------------------- loss


def gaussian_nll(recon_x, x, log_sigma):
    """-log p(x|z) in nats per image, (B,): a Gaussian around recon_x, summed over the pixels.

    A density may exceed 1: with a small sigma the log likelihood can be positive, and the ELBO too.
    """
    squared_error = (recon_x - x).square().flatten(1).sum(1)  # (B,)
    pixels = x[0].numel()
    return (squared_error / (2 * torch.exp(2 * log_sigma))
            + pixels * (log_sigma + 0.5 * math.log(2 * math.pi)))


def kl_divergence(mu, logvar):
    """KL(q(z|x) || N(0, I)) in nats, (B, D): sum over D for an image (arXiv 1312.6114, app. B)."""
    logvar = logvar.clamp(max=20)  # as in reparameterize
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


def loss_function(recon_x, x, mu, logvar, log_sigma, beta):
    """-log p(x|z) + beta * KL in nats, the mean over the batch (beta-VAE, Higgins et al. 2017).

    With beta 1 it is minus the ELBO, a bound on log p(x). Both terms are sums, over pixels and
    over latents. The popular shortcut, F.mse_loss(recon_x, x) + KL, divides only the first by 784:
    up to a factor and a constant it is this loss with sigma 1 and beta 392. Only beta * sigma^2
    matters for a fixed sigma; a learned one settles at the root of the MSE, here about 0.1.
    """
    return (gaussian_nll(recon_x, x, log_sigma) + beta * kl_divergence(mu, logvar).sum(1)).mean()


# --------------------------------------------------------------------------- training


def train_epoch(model, x, optimizer, schedule, beta, args, generator):
    """One pass over x (N, 1, 28, 28); returns the mean loss in nats per image."""
    model.train()
    total = 0.0
    for step, idx in enumerate(common.batches(len(x), args.batch_size, generator, x.device)):
        batch = common.augment(x[idx], args.augment, generator)

        recon_x, mu, logvar = model(batch, generator)
        loss = loss_function(recon_x, batch, mu, logvar, model.log_sigma, beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        total += common.finite(loss, step) * len(idx)
    return total / len(x)


# --------------------------------------------------------------------------- evaluation


@torch.no_grad()
def encode(model, x):
    """mu, logvar (N, D) in evaluation mode, order kept. As a code, take mu: it has no noise."""
    model.eval()
    mu, logvar = zip(*(model.encoder(batch) for batch in x.split(100)), strict=True)
    return torch.cat(mu), torch.cat(logvar)


@torch.no_grad()
def decode(model, z):
    """recon_x (N, 1, 28, 28) in evaluation mode, order kept."""
    model.eval()
    return common.in_batches(model.decoder, z)


def reconstruct(model, x):
    """recon_x (N, 1, 28, 28) from z = mu."""
    return decode(model, encode(model, x)[0])


@torch.no_grad()
def evaluate(model, x, beta):
    """Means over all of x: mse per pixel at z = mu; loss, kl and elbo in nats per image.

    Also kl_per_dim, a list; active_units, the number of latents whose mu varies over the images by
    more than 0.01 (Burda et al., arXiv 1509.00519); total_correlation in nats, how far the latents
    are from independent of each other, if z were Gaussian. The noise is the same in each call, from
    a generator of its own: evaluating does not change the training.
    """
    mu, logvar = encode(model, x)
    z = reparameterize(mu, logvar, torch.Generator().manual_seed(0))
    nll = torch.cat([gaussian_nll(decode(model, z_part), x_part, model.log_sigma)
                     for z_part, x_part in zip(z.split(100), x.split(100), strict=True)]).mean()
    kl = kl_divergence(mu, logvar).mean(0)  # (D,)
    cov = torch.cov(mu.T) + logvar.clamp(max=20).exp().mean(0).diag()  # of z over all images
    cov = cov.cpu().double()  # a determinant of up to 784 small numbers
    correlation = 0.5 * (cov.diag().log().sum() - cov.slogdet()[1]).item()
    return {"loss": (nll + beta * kl.sum()).item(), "mse": ae.mse(decode(model, mu), x).item(),
            "kl": kl.sum().item(), "elbo": -(nll + kl.sum()).item(), "kl_per_dim": kl.tolist(),
            "active_units": (mu.var(0) > 0.01).sum().item(),
            "total_correlation": correlation if math.isfinite(correlation) else None}


# --------------------------------------------------------------------------- figures


def traverse(z, dim, values):
    """z (1, D) with dimension dim set to each of the values, all others fixed: (len(values), D)."""
    z = z.repeat(len(values), 1)
    z[:, dim] = values
    return z


def draw_traversals(folder, model, z, dims, title):
    """Figures 21 to 23: what two dimensions of z (1, D) do to the image, alone and together."""
    values = torch.linspace(-3, 3, 11, device=z.device)
    ticks = {"xticks": [15 + 29 * i for i in range(11)],
             "xticklabels": [f"{round(v, 1) + 0:.1f}" for v in values.tolist()]}
    for number, d in zip((21, 22), dims, strict=True):
        common.draw_images(folder, f"fig{number}_traversal", decode(model, traverse(z, d, values)),
                           columns=11, title=title, xlabel=f"z[{d}]", **ticks)
    first, second = dims
    both = torch.cat([traverse(row[None], second, values) for row in traverse(z, first, values)])
    ticks |= {"yticks": ticks["xticks"], "yticklabels": ticks["xticklabels"]}
    common.draw_images(folder, "fig23_traversal_both", decode(model, both), columns=11, title=title,
                       xlabel=f"z[{second}]", ylabel=f"z[{first}]", **ticks)


def by_kl(test):
    """The dimensions of z, those that carry most first; test: what evaluate returns."""
    return sorted(range(len(test["kl_per_dim"])), key=lambda d: -test["kl_per_dim"][d])


def draw_kl(folder, test, beta, data_name):
    """KL per dimension, sorted: dimensions near zero carry nothing."""
    order, kl_per_dim = by_kl(test), test["kl_per_dim"]
    fig = Figure(figsize=(8, 3.2), layout="constrained")
    ax = fig.subplots()
    ax.bar([str(d) for d in order], [kl_per_dim[d] for d in order])
    ax.set(xlabel="dimension of z", ylabel="KL, nats per image",
           title=f"{data_name} test images, beta {beta:g}: {sum(kl_per_dim):.1f} nats in all")
    fig.savefig(folder / "kl_per_dim.png", dpi=120)


def draw_plane(folder, model, mu, data):
    """For D = 2: the codes mu (N, 2), and the images decoded over the quantiles of the prior."""
    q = torch.distributions.Normal(0, 1).icdf(torch.linspace(0.02, 0.98, 20)).to(mu.device)
    z = torch.stack([q.repeat(20), q.flip(0).repeat_interleave(20)], dim=1)  # top row: largest z[1]
    fig = Figure(figsize=(13, 6.3), layout="constrained")
    left, right = fig.subplots(1, 2)
    common.scatter(left, mu.cpu().numpy(), data.y_test.cpu().numpy(), data.classes)
    left.set(xlabel="z[0]", ylabel="z[1]", title=f"{data.name} test images at mu")
    left.legend(markerscale=4, fontsize=8)
    common.show_images(right, decode(model, z), columns=20)
    right.set(xlabel="z[0], quantiles 0.02 to 0.98 of the prior", ylabel="z[1], likewise",
              title="what the decoder makes of each place")
    fig.savefig(folder / "latent_plane.png", dpi=120)


def draw_sweep(folder, betas, models, tests, data, start, pca_mse):
    """The lesson of beta on one page: rate against distortion, samples, traversals."""
    height = 1.9 * len(betas)
    fig = Figure(figsize=(9, 3.6 + height), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[3.6, height])
    ax = top.subplots()
    ax.plot([t["kl"] for t in tests], [t["mse"] for t in tests], marker="o")
    for beta, t in zip(betas, tests, strict=True):
        ax.annotate(f" beta {beta:g}: {t['active_units']} active", (t["kl"], t["mse"]), va="bottom")
    ax.axhline(pca_mse, color="gray", ls="--", label="PCA of the same size")
    ax.set(xlabel="rate: KL, nats per image", ylabel="distortion: MSE per pixel at z = mu",
           title=f"{data.name} test images: what a nat of code buys")
    ax.margins(x=0.2)  # room for the last label
    ax.legend()
    noise = torch.randn(40, len(tests[0]["kl_per_dim"]), generator=common.seed_everything(0))
    axes = bottom.subplots(len(betas), 2, squeeze=False)
    for row, beta, model, t in zip(axes, betas, models, tests, strict=True):
        noise = noise.to(model.log_sigma.device)
        z = encode(model, data.x_test[data.y_test == start][:1])[0]
        values = torch.linspace(-3, 3, 10, device=z.device)
        moved = torch.cat([traverse(z, d, values) for d in by_kl(t)[:4]])
        for ax, codes, what in zip(row, (noise, moved), (
                "samples from the prior", "its strongest dimensions, -3 to 3"), strict=True):
            common.show_images(ax, decode(model, codes), columns=10)
            ax.set_title(f"beta {beta:g}: {what}", fontsize=9)
    fig.savefig(folder / "sweep.png", dpi=120)


# --------------------------------------------------------------------------- main


def main(argv=None):
    """Train, test once, draw; returns the metrics as a dict."""
    args = parse_args(argv)
    data = common.load_data(args)
    start_class = 8  # Bag, or the digit 8
    if args.start_class is not None:
        names = [name.lower() for name in data.classes]
        if args.start_class.lower() not in names:
            common.fail(f"--start-class {args.start_class}: the classes are {', '.join(names)}")
        start_class = names.index(args.start_class.lower())
    splits = common.splits(data.y_train, args.folds, args.seed)
    # what is trained: a model per fold, or in a sweep one per beta, from the same draws
    trainings = ([(beta, 0, splits[0]) for beta in args.sweep] if args.sweep else
                 [(args.beta, fold, split) for fold, split in enumerate(splits)])

    with common.Run(args, data, select="val_loss") as run:
        for part, (beta, fold, (train, val)) in enumerate(trainings):
            x_train, x_val = data.x_train[train], data.x_train[val]
            common.seed_everything(args.seed, fold)
            model = VAE(args.latent_dim, args.hidden, args.filters, args.decoder_filters,
                        args.sigma).to(args.device)
            optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, args.lr, epochs=args.epochs,
                steps_per_epoch=math.ceil(len(x_train) / args.batch_size))
            for _, generator in run.epochs(part, (args.seed, fold), model=model,
                                           optimizer=optimizer, schedule=schedule):
                clock = time.perf_counter()
                train_loss = train_epoch(model, x_train, optimizer, schedule, beta, args, generator)
                seconds = time.perf_counter() - clock
                # both in evaluation mode and without augmentation, so that the two compare
                seen = evaluate(model, x_train[:len(x_val)], beta)
                unseen = evaluate(model, x_val, beta)
                run.end_epoch(
                    beta=beta, train_loss=train_loss, seen_loss=seen["loss"],
                    val_loss=unseen["loss"], train_mse=seen["mse"], val_mse=unseen["mse"],
                    val_kl=unseen["kl"], val_elbo=unseen["elbo"],
                    active_units=unseen["active_units"], seconds=seconds)
            if run.history[-1]["active_units"] == 0:
                print(f"warning: posterior collapse at beta {beta:g}: no latent unit is active, "
                      "the decoder ignores z. Try a smaller --beta", file=sys.stderr)

        # the one look at the test set, with each training's weights of its best validation epoch
        models, tests = [], []
        for part, (beta, *_) in enumerate(trainings):
            models.append(copy.deepcopy(model))
            models[-1].load_state_dict(run.best[part]["model"])
            tests.append(evaluate(models[-1], data.x_test, beta))

        def summary(part):
            return {"beta": trainings[part][0], "sigma": models[part].log_sigma.exp().item(),
                    **{f"test_{k}": tests[part][k] for k in ("mse", "kl", "elbo")},
                    **{k: tests[part][k] for k in (
                        "active_units", "kl_per_dim", "total_correlation")}}

        # the figures and the main numbers are those of the last fold, or of --beta in a sweep
        shown = len(models) - 1
        if args.beta in (args.sweep or []):
            shown = args.sweep.index(args.beta)
        model, test, (beta, _, _) = models[shown], tests[shown], trainings[shown]
        mu, _ = encode(model, data.x_test)
        recon_pca = common.pca_reconstruct(x_train, data.x_test, args.latent_dim)
        pca_mse = ae.mse(recon_pca, data.x_test).item()
        dims = args.dims or by_kl(test)[:2]

        ae.draw_reconstructions(run.folder, "fig16_reconstructions", data, {
            "original": data.x_test, "VAE": decode(model, mu), "PCA": recon_pca})
        common.plot_curves(
            run.folder, "fig17_loss", [r for r in run.history if r["fold"] == shown],
            {"loss, nats per image": ("seen_loss", "val_loss"),
             "MSE per pixel at z = mu": ("train_mse", "val_mse")},
            f"{data.name}: VAE, latent {args.latent_dim}, beta {beta:g}")
        knn = ae.draw_latent(run.folder, mu, data, dims, args.seed, numbers=(18, 19, 20))
        draw_traversals(run.folder, model, mu[data.y_test == start_class][:1], dims,
                        f"{data.name}, from the code of a test {data.classes[start_class]}")
        draw_kl(run.folder, test, beta, data.name)
        noise = torch.randn(100, args.latent_dim, generator=common.seed_everything(args.seed))
        common.draw_images(run.folder, "samples", decode(model, noise.to(args.device)), columns=10,
                           title=f"{data.name}: decoded from the prior, beta {beta:g}")
        if args.latent_dim == 2:
            draw_plane(run.folder, model, mu, data)
        if args.sweep:
            draw_sweep(run.folder, args.sweep, models, tests, data, start_class, pca_mse)

        metrics = {**summary(shown), "pca_mse": pca_mse, "knn_accuracy": knn,
                   "train_mse": ae.mse(reconstruct(model, x_train), x_train).item(),
                   "val_mse": ae.mse(reconstruct(model, x_val), x_val).item(),
                   "latent_dim": args.latent_dim,
                   "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        if args.folds > 1:
            each = [t["mse"] for t in tests]
            metrics |= {"folds": args.folds, "test_mse": statistics.mean(each),
                        "test_mse_std": statistics.stdev(each), "fold_test_mse": each}
        if args.sweep:
            metrics["sweep"] = [summary(part) for part in range(len(models))]
        return run.finish(metrics)


if __name__ == "__main__":
    common.start(main)


# --------------------------------------------------------------------------- exercises

# Predict first, then run. Answers: results/vae*.
# 1. `--beta 4`: which falls more, the KL or the sharpness?
#    (KL 49.7 -> 31.3 nats, test MSE .0112 -> .0117: a third of the code was worth little)
# 2. `--sweep 0.25 1 4 16 --epochs 6`: what do the nats buy that beta 0.25 allows and beta 1 not?
#    (16 nats more, 64 instead of 48, and the test MSE falls by 1 %, from .0118 to .0117)
# 3. With 2 latents instead of 18 (the last command above), does each carry more nats, or fewer?
#    (4.6 instead of 2.8: what has no dimension of its own is squeezed into these)
# 4. In the same sweep, which beta gives the best test ELBO, and why had it to be that one? (beta 1,
#    minus the ELBO is its loss: 566, 571, 543, 393 nats)
# 5. Plant a bug: .mean(1) instead of .sum(1) in gaussian_nll(). Against the KL the images count for
#    little now. tests/test_vae.py::test_loss_is_that_of_torch_distributions catches it.
