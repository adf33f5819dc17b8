"""What the bug clinic showed that no other test would catch."""

from argparse import Namespace

import ae
import common
import finetune
import pytest
import torch
import vae


class Copy(torch.nn.Module):
    """The perfect autoencoder: what comes in goes out."""

    def __init__(self):
        super().__init__()
        self.w, self.log_sigma = torch.nn.Parameter(torch.ones(())), torch.tensor(0.0)

    def forward(self, x, rng=None):
        zero = torch.zeros(len(x), 2)
        return (self.w * x, zero, zero) if rng else self.w * x


@pytest.mark.parametrize("script", [ae, vae])
def test_the_target_is_the_augmented_image(script):
    """The network sees the flipped image and is asked for the one that was not flipped."""
    x, model = torch.rand(20, 1, 28, 28), Copy()
    args = Namespace(batch_size=8, augment="flip", l1=0, beta=1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    losses = [script.train_epoch(model, x, optimizer, schedule, Namespace(
        **vars(args) | {"augment": kind}), common.seed_everything(0)) for kind in ("none", "flip")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_the_rate_falls_to_zero():
    """A schedule that is advanced once per epoch: the rate is still rising when training ends."""
    args = ae.parse_args(["--epochs", "4", "--batch-size", "8", "--device", "cpu"])
    model = ae.Autoencoder(2, 3, (2, 2), (2, 2, 2))
    optimizer, schedule = ae.make_optimizer(model, args, 40)
    for _ in range(args.epochs):
        ae.train_epoch(model, torch.rand(40, 1, 28, 28), optimizer, schedule, args,
                       common.seed_everything(0))
    assert schedule.get_last_lr()[0] < 0.05 * args.lr


def test_each_image_is_compared_with_its_own_label():
    """Predictions (N, 1) against labels (N,): an accuracy of all against all, near chance."""
    y = torch.tensor([0, 1, 2, 2])
    loss, accuracy = finetune.loss_and_accuracy(9 * torch.eye(3)[[0, 1, 2, 0]], y)
    assert accuracy == 0.75
    assert loss == pytest.approx(9 / 4, abs=1e-3)  # of the one that is wrong
