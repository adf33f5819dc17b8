"""What does it take to make a latent space that one can sample from, and what does beta trade?

Section 2 of the report: a variational autoencoder, its latent space, traversals, and beta.

    python vae.py                       the VAE with a true ELBO: beta 1
    python vae.py --beta 4              four times the pressure on the code
    python vae.py --sweep 0.25 1 4 16   one training per beta: the rate-distortion picture
    python vae.py --recipe report       squared error + beta * KL, as we read the report
    python vae.py --fast                smoke test in seconds
    python vae.py --latent-dim 2 --hidden 48 --epochs 16 --lr 0.006 --batch-size 64
                                        a latent space that fits on paper

FashionMNIST test images (results/vae*), three seeds: MSE .0112 at beta 1 (PCA .0195), KL 48 nats,
all 18 latents active, 80,454 parameters; .0117 and 30 nats at beta 4, in 156 seconds alone on 2
cores; latent 2 .0256 (PCA .0461). Each run writes to a new folder in runs/.
"""

import math
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

import common

# --------------------------------------------------------------------------- flags

RECIPES = {
    "best": {},
    # squared error + beta * KL is a Gaussian likelihood of variance 1/2, up to a constant. The
    # report flips its images; it gives no rate, batch or epochs
    "report": {"sigma": math.sqrt(0.5), "augment": "flip"},
}


def defaults(args):
    """{flag: default} where --recipe or --fast changes it; see defaults in ae.py."""
    changed = dict(RECIPES[args.recipe])
    if args.fast:
        changed["epochs"] = 3
    return changed


def parse_args(argv=None):
    number = common.number
    parser = common.Parser(__doc__)
    group = parser.add_argument_group("what to turn first")
    group.add_argument("--beta", type=number(float, 0, 1e6), default=1.0,
                       help="weight of the KL: more makes z simpler and images blurrier")
    group.add_argument("--latent-dim", type=number(int, 2, 784), default=18,
                       help="size D of the code z")
    group.add_argument("--sweep", type=number(float, 0, 1e6), nargs="+", metavar="BETA",
                       help="train once with each of these betas; the figures show that of --beta, "
                            "without it 1 if it is among them, else the last")
    group = parser.add_argument_group("model and loss")
    group.add_argument("--sigma", type=number(float, 1e-3, 1e3),
                       help="standard deviation of a pixel given z; without it, it is learned")
    group.add_argument("--hidden", type=number(int, 0, 4096), default=0,
                       help="width of a layer before mu and logvar, and of one after z; 0: none")
    group.add_argument("--filters", type=number(int, 1, 512), nargs=2, default=[16, 32],
                       help="maps of the encoder's two convolutions")
    group.add_argument("--decoder-filters", type=number(int, 1, 512), nargs=2, default=[32, 32],
                       help="maps that enter the decoder's two transposed convolutions")
    common.add_training_flags(parser, RECIPES, epochs=6, batch_size=128, lr=0.008, augment="none")
    group = parser.add_argument_group("figures")
    group.add_argument("--start-class", metavar="NAME", help="class of the test image where "
                       "traversals start; without it Bag, the 8 of the digits, or the last class")
    group.add_argument("--dims", type=number(int, 0, 783), nargs=2, metavar="D",
                       help="dimensions to traverse, from 0; without it those with the largest KL")
    args = common.parse(parser, "vae", argv, defaults)
    if args.sweep and args.folds > 1:
        parser.error("--folds does not go with --sweep")
    if args.sweep and args.beta not in (1, *args.sweep):  # 1, the default: see sweep
        parser.error(f"--beta {args.beta:g} is none of --sweep")
    if args.dims and max(args.dims) >= args.latent_dim:
        parser.error(f"--dims {max(args.dims)}: z has dimensions 0 to {args.latent_dim - 1}")
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
        flat = f2 * 5 * 5
        self.linear = nn.Sequential(nn.Linear(flat, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.mu = nn.Linear(hidden or flat, latent_dim)
        self.logvar = nn.Linear(hidden or flat, latent_dim)

    def forward(self, x):               # (B, 1, 28, 28)
        x = self.block1(x)              # (B, f1, 13, 13)
        x = self.block2(x).flatten(1)   # (B, f2 * 25): 5x5 pixels in each map
        x = self.linear(x)              # (B, hidden); as it is if hidden is 0
        return self.mu(x), self.logvar(x).clamp(max=20)  # only so that exp stays finite


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


def reparameterize(mu, logvar, rng):
    """z (B, D) ~ N(mu, exp(logvar)), written so that gradients reach mu and logvar.

    The randomness is in eps, which depends on nothing (Kingma and Welling, arXiv 1312.6114, 2.4).
    It is drawn on the CPU: the same on every device.
    """
    eps = torch.randn(mu.shape, generator=rng).to(mu.device)
    return mu + torch.exp(0.5 * logvar) * eps


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
        if sigma is None:  # learned; starts at exp(-1), about the spread of the pixels themselves
            self.log_sigma = nn.Parameter(torch.tensor(-1.0))
        else:
            self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma)), requires_grad=False)

    def forward(self, x, rng):
        mu, logvar = self.encoder(x)
        z = reparameterize(mu, logvar, rng)
        return self.decoder(z), mu, logvar


def build(args):
    """The VAE as the flags say."""
    return VAE(args.latent_dim, args.hidden, args.filters, args.decoder_filters,
               args.sigma).to(args.device)


def load_run(folder):
    """The VAE of a finished run of this script; of several, the one in its figures."""
    return common.load_run(folder, "vae", parse_args, build)


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
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


def loss_function(recon_x, x, mu, logvar, log_sigma, beta):
    """-log p(x|z) + beta * KL in nats, the mean over the batch (beta-VAE, Higgins et al. 2017).

    With beta 1 it is minus the ELBO, a bound on log p(x). Both terms are sums, over pixels and
    over latents. The popular shortcut, F.mse_loss(recon_x, x) + KL, divides only the first by 784.
    With sigma 1 our first term is 392 * MSE, up to a constant; so the shortcut, times 392, is our
    loss with beta 392.

    For a fixed sigma only beta * sigma^2 matters (to see it, multiply the loss by 2 * sigma^2).
    A learned sigma settles at the root of the MSE, here about 0.1.
    """
    return (gaussian_nll(recon_x, x, log_sigma) + beta * kl_divergence(mu, logvar).sum(1)).mean()


# --------------------------------------------------------------------------- training


def train_epoch(model, x, optimizer, schedule, args, rng):
    """One pass over x (N, 1, 28, 28); returns the mean loss in nats per image."""
    model.train()
    total = 0.0
    for idx in common.batches(x, args.batch_size, rng):
        batch = common.augment(x[idx], args.augment, rng)

        recon_x, mu, logvar = model(batch, rng)
        loss = loss_function(recon_x, batch, mu, logvar, model.log_sigma, args.beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        total += loss.detach() * len(idx)  # stays on the device: .item() would make a GPU wait
    return total.item() / len(x)


def fit(args, run, part, seeds, x_train, x_val):
    """Train a VAE on x_train (N, 1, 28, 28) as one part of the run: a fold, a beta.

    seeds: numbers that, with the epoch, decide every draw. Returns the network of the best epoch,
    and the numbers of all epochs as a list of dicts.
    """
    common.seed_everything(*seeds)
    model = build(args)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, epochs=args.epochs,
        steps_per_epoch=math.ceil(len(x_train) / args.batch_size))
    # first is 1, unless an interrupted run goes on: then begin() restores model, optimizer and
    # schedule as they were saved, and returns the next epoch
    first = run.begin(part, args.epochs, model, optimizer=optimizer, schedule=schedule)
    for epoch in range(first, args.epochs + 1):
        rng = common.seed_everything(*seeds, epoch)
        train_loss = train_epoch(model, x_train, optimizer, schedule, args, rng)
        # both in evaluation mode and without augmentation, so that they compare; train_loss, taken
        # on the way while the weights changed, does not
        seen = evaluate(model, x_train[:len(x_val)], args.beta)
        unseen = evaluate(model, x_val, args.beta)
        run.end_epoch(
            score=unseen["loss"], beta=args.beta, train_loss=train_loss, seen_loss=seen["loss"],
            val_loss=unseen["loss"], train_mse=seen["mse"], val_mse=unseen["mse"],
            val_kl=unseen["kl"], val_elbo=unseen["elbo"], active_units=unseen["active_units"])
    best = run.load_best(model)
    if best["active_units"] == 0:
        print(f"warning: posterior collapse at beta {args.beta:g}: no latent unit is active, the "
              "decoder ignores z. Try a smaller --beta", file=sys.stderr)
    return model, run.rows


# --------------------------------------------------------------------------- evaluation


@torch.no_grad()
def encode(model, x):
    """mu, logvar (N, D) in evaluation mode, order kept. As a code, take mu: it has no noise."""
    model.eval()
    # in_batches joins one tensor of each batch: mu and logvar side by side, (N, 2 D)
    codes = common.in_batches(lambda batch: torch.cat(model.encoder(batch), 1), x)
    mu, logvar = codes.chunk(2, 1)
    return mu, logvar


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
    """Means over all of x as a dict: mse per pixel at z = mu; loss, kl and elbo in nats per image.

    Also beta as given; kl_per_dim, a list; active_units, the number of latents whose mu has a
    variance over the images above 0.01 (Burda et al., arXiv 1509.00519); total_correlation. The
    noise is the same in each call, from a generator of its own: it changes no training.
    """
    mu, logvar = encode(model, x)
    z = reparameterize(mu, logvar, torch.Generator().manual_seed(0))
    nll = gaussian_nll(decode(model, z), x, model.log_sigma).mean()
    kl = kl_divergence(mu, logvar).mean(0)  # (D,)
    return {"beta": beta, "loss": (nll + beta * kl.sum()).item(),
            "mse": F.mse_loss(decode(model, mu), x).item(), "kl": kl.sum().item(),
            "elbo": -(nll + kl.sum()).item(), "kl_per_dim": kl.tolist(),
            "active_units": (mu.var(0) > 0.01).sum().item(),
            "total_correlation": total_correlation(mu, logvar)}


def total_correlation(mu, logvar):
    """In nats, how far the latents are from independent of each other, if z were Gaussian.

    mu, logvar: (N, D). That is the KL of N(0, cov) from the product of its marginals, (sum of log
    variances - log det cov) / 2. None where it is not finite, as of a single image.
    """
    # covariance of z over all images: that of the means plus the mean variance
    cov = torch.cov(mu.T) + logvar.exp().mean(0).diag()
    cov = cov.cpu().double()  # latents that nearly repeat each other cost digits
    correlation = 0.5 * (cov.diag().log().sum() - cov.logdet()).item()
    return correlation if math.isfinite(correlation) else None


# --------------------------------------------------------------------------- figures


def traverse(z, dim, values):
    """z (1, D) with dimension dim set to each of the values, all others fixed: (len(values), D)."""
    z = z.repeat(len(values), 1)
    z[:, dim] = values
    return z


def draw_traversals(run, model, data, mu, dims):
    """Figures 21 to 23: what two dimensions of z do to a test image, alone and together."""
    names = [name.lower() for name in data.classes]
    start = start_class(run.args, data)
    z = mu[data.y_test == start][:1]  # (1, D), the code of its first test image
    values = torch.linspace(-3, 3, 11, device=z.device)
    ticks = [f"{v:z.1f}" for v in values.tolist()]  # :z writes 0.0, never -0.0
    title = f"{data.name}, from the code of a test {names[start]}"
    for number, d in zip((21, 22), dims, strict=True):
        common.draw_rows(run, f"fig{number}_traversal",
                         {f"z[{d}]": decode(model, traverse(z, d, values))}, 11, title,
                         "One dimension of the code moves, all others stay: what does it encode?",
                         ticks)
    first, second = dims
    rows = {}
    for tick, value in zip(ticks, values, strict=True):
        moved = traverse(z, first, value[None])
        rows[f"z[{first}] = {tick}"] = decode(model, traverse(moved, second, values))
    common.draw_rows(run, "fig23_traversal_both", rows, 11, f"{title}; across: z[{second}]",
                     "Two dimensions at once: do they act independently of each other?", ticks)


def start_class(args, data):
    """Index of --start-class; without it Bag, the digit 8, or the last class."""
    names = [name.lower() for name in data.classes]
    if args.start_class is None:
        there = data.y_test.unique().tolist()  # class 8 of FashionMNIST is Bag
        return there[min(8, len(there) - 1)]
    if args.start_class.lower() not in names:
        common.fail(f"--start-class {args.start_class}: the classes are {', '.join(names)}")
    return names.index(args.start_class.lower())


def by_kl(kl_per_dim):
    """The dimensions of z, those that carry most first."""
    return sorted(range(len(kl_per_dim)), key=lambda d: -kl_per_dim[d])


def draw_kl(run, test, data_name):
    """KL per dimension, sorted: dimensions near zero carry nothing."""
    kl_per_dim = test["kl_per_dim"]
    order = by_kl(kl_per_dim)
    fig = Figure(figsize=(8, 3.2), layout="constrained")
    ax = fig.subplots()
    ax.bar([str(d) for d in order], [kl_per_dim[d] for d in order])
    ax.set(xlabel="dimension of z", ylabel="KL, nats per image",
           title=f"{data_name} test images, beta {test['beta']:g}: {test['kl']:.1f} nats in all")
    run.save(fig, "kl_per_dim", "How much each dimension tells about the image; 0: nothing.")


def draw_samples(run, model, data, mu):
    """Decoded from the prior N(0, I); below it, test images rebuilt from their codes mu (N, D)."""
    noise = torch.randn(50, mu.shape[1], generator=common.seed_everything(run.args.seed))
    rows = {"from the\nprior": noise.to(mu.device), "from codes\nof images": mu[:20]}
    common.draw_rows(run, "samples", {label: decode(model, z) for label, z in rows.items()}, 10,
                     f"{data.name}: is the prior where the codes are?",
                     "A code drawn from the prior may lie between those of images: a monster.")


def draw_plane(run, model, mu, data):
    """For D = 2: the codes mu (N, 2), and the images decoded over the quantiles of the prior."""
    q = torch.distributions.Normal(0, 1).icdf(torch.linspace(0.02, 0.98, 20)).to(mu.device)
    # 400 places, row by row, z[0] from left to right; the top row has the largest z[1]
    z = torch.stack([q.repeat(20), q.flip(0).repeat_interleave(20)], dim=1)
    fig = Figure(figsize=(13, 6.3), layout="constrained")
    left, right = fig.subplots(1, 2)
    common.scatter(left, mu.cpu().numpy(), data.y_test.cpu().numpy(), data.classes)
    low, high = q[0].item(), q[-1].item()
    left.plot([low, high, high, low, low], [low, low, high, high, low], color="black", lw=1)
    left.set(xlabel="z[0]", ylabel="z[1]", title=f"{data.name} test images at mu")
    left.legend(markerscale=4, fontsize=8)
    common.show_images(right, decode(model, z), columns=20)
    right.set(xlabel="z[0], quantiles 0.02 to 0.98 of the prior", ylabel="z[1], likewise",
              title="what the decoder makes of each place in the frame on the left")
    run.save(fig, "latent_plane", "Between two classes the decoder blends one into the other.")


def draw_sweep(run, models, tests, data, pca_mse):
    """The lesson of beta on one page: rate against distortion, reconstructions, traversals."""
    height = 1.9 * len(models)
    fig = Figure(figsize=(12, 3.6 + height), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[3.6, height])
    ax = top.subplots()
    ax.plot([t["kl"] for t in tests], [t["mse"] for t in tests], marker="o")
    for t in tests:
        ax.annotate(f" beta {t['beta']:g}: {t['active_units']} active", (t["kl"], t["mse"]),
                    va="bottom")
    ax.axhline(pca_mse, color="gray", ls="--", label="PCA of the same size")
    ax.set(xlabel="rate: KL, nats per image", ylabel="distortion: MSE per pixel at z = mu",
           title=f"{data.name} test images: what a nat of code buys")
    ax.margins(x=0.2, y=0.15)  # room for the last label
    ax.legend()
    noise = torch.randn(40, len(tests[0]["kl_per_dim"]), generator=common.seed_everything(0))
    axes = bottom.subplots(len(models), 3, squeeze=False)
    start = data.x_test[data.y_test == start_class(run.args, data)][:1]
    for row, model, t in zip(axes, models, tests, strict=True):
        mu = encode(model, data.x_test[:40])[0]
        z = encode(model, start)[0]
        values = torch.linspace(-3, 3, 10, device=z.device)
        moved = torch.cat([traverse(z, d, values) for d in by_kl(t["kl_per_dim"])[:4]])
        panels = {"test images rebuilt": mu, "samples from the prior": noise.to(mu.device),
                  "its strongest dimensions, -3 to 3": moved}
        for ax, (what, codes) in zip(row, panels.items(), strict=True):
            common.show_images(ax, decode(model, codes), columns=10)
            ax.set_title(f"beta {t['beta']:g}: {what}", fontsize=9)
    run.save(fig, "sweep", "Read the columns downwards: what gets lost first, what gets cleaner?")


# --------------------------------------------------------------------------- results

COLUMNS = ("train_loss", "val_loss", "val_mse", "val_kl")  # of an epoch, to print


def describe(run, model, test, rows, data, x_train):
    """Draw figures 16 to 23 and all others of one VAE; returns its metrics.

    test: what evaluate returns of the test images. rows: its epochs.
    """
    args = run.args
    mu, _ = encode(model, data.x_test)
    recon_pca = common.pca_reconstruct(x_train, data.x_test, args.latent_dim)
    common.draw_reconstructions(run, "fig16_reconstructions", data, {
        "original": data.x_test, "VAE": decode(model, mu), "PCA": recon_pca})
    common.plot_curves(run, "fig17_loss", rows, {
        "loss, nats per image": ("seen_loss", "val_loss"),
        "MSE per pixel at z = mu": ("train_mse", "val_mse")},
        f"{data.name}: VAE, latent {args.latent_dim}, beta {test['beta']:g}",
        "Does the validation curve part from that of training images?")
    dims = args.dims or by_kl(test["kl_per_dim"])[:2]
    knn = common.draw_latent(run, mu, data, dims, numbers=(18, 19, 20))
    draw_traversals(run, model, data, mu, dims)
    draw_kl(run, test, data.name)
    draw_samples(run, model, data, mu)
    if args.latent_dim == 2:
        draw_plane(run, model, mu, data)
    return {**result(model, test), "knn_accuracy": knn,
            "pca_mse": F.mse_loss(recon_pca, data.x_test).item(),
            "train_mse": F.mse_loss(reconstruct(model, x_train), x_train).item(),
            "latent_dim": args.latent_dim,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def result(model, test):
    """What metrics.json says of one network; test: what evaluate returns of the test images."""
    return {"beta": test["beta"], "sigma": model.log_sigma.exp().item(),
            **{f"test_{k}": test[k] for k in ("mse", "kl", "elbo")},
            **{k: test[k] for k in ("active_units", "kl_per_dim", "total_correlation")}}


def result_rows(names, val, tests, metrics):
    """The result as rows of a table; val, tests: what evaluate returns, for each name."""
    return [("", "validation MSE", "test MSE", "KL, nats", "active units"),
            *((f"VAE, {name}", v["mse"], t["mse"], t["kl"], t["active_units"])
              for name, v, t in zip(names, val, tests, strict=True)),
            (f"PCA, {metrics['latent_dim']} components", None, metrics["pca_mse"], None, None),
            ("the report, latent 18", None, 0.014, None, None)]


# --------------------------------------------------------------------------- sweep


def sweep(args, data):
    """One training per beta, from the same draws; returns the metrics.

    Figures and the metrics outside "sweep" are those of --beta, or of the last one.
    """
    args.sweep = list(dict.fromkeys(args.sweep))  # no beta twice
    train_idx, val_idx = common.split(data.y_train, args.seed)
    x_train, x_val = data.x_train[train_idx], data.x_train[val_idx]
    run = common.Run(args, data, columns=COLUMNS)
    models, histories, val, tests = [], [], [], []
    for beta in args.sweep:
        # .10g: a part's name is also that of its checkpoint, so it must differ for each beta
        model, rows = fit(common.with_flags(args, beta=beta), run, f"beta {beta:.10g}",
                          (args.seed, 0), x_train, x_val)
        models.append(model)
        histories.append(rows)
        val.append(evaluate(model, x_val, beta))
        tests.append(evaluate(model, data.x_test, beta))
    shown = args.sweep.index(args.beta) if args.beta in args.sweep else -1
    metrics = describe(run, models[shown], tests[shown], histories[shown], data, x_train)
    metrics |= {"val_mse": val[shown]["mse"], "sweep": [
        result(model, test) for model, test in zip(models, tests, strict=True)]}
    draw_sweep(run, models, tests, data, metrics["pca_mse"])
    return run.finish(metrics, common.table(result_rows(
        [f"beta {beta:g}" for beta in args.sweep], val, tests, metrics)), models[shown])


# --------------------------------------------------------------------------- main


def main(argv=None):
    """Train, test once, draw; returns the metrics as a dict."""
    args = parse_args(argv)
    data = common.load_data(args)
    start_class(args, data)  # fails before the training if the name is wrong
    if args.sweep:
        return sweep(args, data)
    run = common.Run(args, data, columns=COLUMNS)
    tests, val = [], []
    splits = common.splits(data.y_train, args.folds, args.seed)
    for fold, (name, (train_idx, val_idx)) in enumerate(splits.items()):
        x_train, x_val = data.x_train[train_idx], data.x_train[val_idx]
        model, rows = fit(args, run, name, (args.seed, fold), x_train, x_val)
        val.append(evaluate(model, x_val, args.beta))
        tests.append(evaluate(model, data.x_test, args.beta))  # after all choices

    # figures and numbers are those of the last fold (model, rows, x_train), but for the two MSEs,
    # which become the means over the folds
    metrics = describe(run, model, tests[-1], rows, data, x_train)
    metrics |= {"folds": args.folds, **common.over_folds([
        {"val_mse": v["mse"], "test_mse": t["mse"]} for v, t in zip(val, tests, strict=True)])}
    table = result_rows(list(splits), val, tests, metrics)
    if args.folds > 1:
        table.append(("mean of the folds", metrics["val_mse"], metrics["test_mse"], None, None))
    return run.finish(metrics, common.table(table), model)


if __name__ == "__main__":
    common.start(main)
