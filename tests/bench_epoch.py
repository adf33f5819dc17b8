"""What does an epoch of ae.py cost, and what would the usual way to feed it cost?

    python tests/bench_epoch.py [--data-dir DIR] [--images N]

Three ways to make the same steps with the same model, taking turns; medians of five rounds' ratios:
ours (the data as one tensor, batches by index); one fixed batch again and again (nothing but the
steps: what data can cost at the least); torchvision's transforms image by image in a DataLoader.
"""

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import ae
import common
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms


class Images(torch.utils.data.Dataset):
    """What torchvision.datasets.FashionMNIST does for an image: PIL, then the transforms."""

    def __init__(self, x):
        self.x = (x[:, 0] * 255).round().byte().cpu()
        self.transform = transforms.Compose([transforms.RandomHorizontalFlip(),
                                             transforms.ToTensor()])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.x[index].numpy()))


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--data-dir", default="data", help="as in ae.py")
    parser.add_argument("--images", type=common.number(int, 96, 48_000), default=9600,
                        help="images in an epoch: fewer are quicker, the ratios stay")
    ours = parser.parse_args()
    args = ae.parse_args(["--recipe", "report", "--data-dir", ours.data_dir])
    x = common.load_data(args).x_train
    x = x.repeat(-(-ours.images // len(x)), 1, 1, 1)[:ours.images]
    loader = DataLoader(Images(x), args.batch_size, shuffle=True)
    fixed = [x[:args.batch_size]] * len(loader)

    model = ae.build(args)
    optimizer, schedule = ae.make_optimizer(model, args, len(x))

    def steps(batches):
        """The update step of ae.train_epoch, fed by whatever comes."""
        model.train()
        total = 0.0
        for batch in batches:
            batch = batch.to(args.device)
            loss = ae.mse(model(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(batch)
        return total.item()  # waits for a GPU, as ae.train_epoch does at its end

    ways = {
        "ours": lambda: ae.train_epoch(model, x, optimizer, schedule, args, torch.Generator()),
        "fixed_batch": lambda: steps(fixed),
        "dataloader": lambda: steps(loader),
    }
    seconds = {name: [] for name in ways}
    for round_ in range(6):
        for name, epoch in ways.items():
            start = time.perf_counter()
            epoch()
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    def ratio(a, b):  # of pairs: the load of a machine drifts from round to round
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    print(json.dumps({
        "command": "python tests/bench_epoch.py", "images": len(x), "batch_size": args.batch_size,
        "device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "seconds": seconds, "ours_over_fixed_batch": ratio("ours", "fixed_batch"),
        "dataloader_over_ours": ratio("dataloader", "ours")}, indent=2))


if __name__ == "__main__":
    common.start(main)
