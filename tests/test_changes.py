"""The four changes of the README, made on a copy: each must train, and none may break silently."""

import importlib
import shutil
import sys
from pathlib import Path

import common
import pytest
import vae
from conftest import ROOT

CHANGES = {
    "third block": ("vae.py", {
        "        flat = f2 * 5 * 5\n":
        "        self.block3 = nn.Sequential(nn.Conv2d(f2, 64, 3), nn.ReLU(), nn.BatchNorm2d(64))\n"
        "        flat = 64 * 3 * 3\n",
        "        x = self.block2(x).flatten(1)   # (B, f2 * 25): 5x5 pixels in each map\n":
        "        x = self.block2(x)\n        x = self.block3(x).flatten(1)\n"}),
    "Bernoulli": ("vae.py", {
        "    squared_error = (recon_x - x)":
        '    return F.binary_cross_entropy(recon_x, x, reduction="none").flatten(1).sum(1)\n'
        "    squared_error = (recon_x - x)"}),
    "own images": ("common.py", {
        '    if args.data != "digits":\n        try:':
        "    x, y = torch.rand(90, 1, 28, 28), torch.arange(90) % 2\n"
        "    x_train, y_train, x_test, y_test = x[:60], y[:60], x[60:], y[60:]\n"
        '    return Data("mine", ("cat", "dog"), x_train, y_train, x_test, y_test)\n'
        '    if args.data != "digits":\n        try:'}),
    "one more number": ("vae.py", {
        "            val_kl=unseen[": "            sigma=model.log_sigma.exp().item(),\n"
                                  "            val_kl=unseen[",
        '        "MSE per pixel at z = mu": (': '        "standard deviation of a pixel": '
        '("sigma",),\n        "MSE per pixel at z = mu": ('}),
}


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """changed(names, *words): python vae.py --device cpu WORDS with these changes."""
    def run(names, *words):
        change(tmp_path, *names)
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("common", "vae"):
            monkeypatch.delitem(sys.modules, name)
        script = importlib.import_module("vae")
        script.common.Run.save = lambda *args: None  # drawing takes most time
        script.common.draw_latent = lambda *args, **more: {}
        script.common.start(lambda: script.main([*words, "--device", "cpu"]))
    return run


def change(folder, *names):
    """A copy of the scripts in folder, with these changes."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for script, edits in map(CHANGES.get, names):
        text = (folder / script).read_text()
        for old, new in edits.items():
            assert text.count(old) == 1
            text = text.replace(old, new)
        (folder / script).write_text(text)


@pytest.mark.parametrize("names", [["third block", "Bernoulli", "one more number"], ["own images"]])
def test_changes(names, changed):
    """A change that the README promises and that does not train."""
    changed(names, "--fast", "--epochs", "1")
    assert list(Path("runs").glob("*/metrics.json"))


def test_a_run_from_before_the_change_is_refused(changed, capsys):
    """An old run that goes on with another network."""
    args = vae.parse_args(["--fast", "--data", "digits", "--device", "cpu", "--out-dir", "old"])
    run = common.Run(args, common.load_data(args))
    run.begin("one split", 1, vae.build(args))
    run.end_epoch(score=1.0)
    with pytest.raises(SystemExit, match="2"):
        changed(["third block"], "--resume", "old")
    error = capsys.readouterr().err
    assert "changed" in error and "another version" in error


def test_the_readme_shows_these_lines():
    """Lines in the README that are not the ones tested here."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    for _, edits in CHANGES.values():
        for old, new in edits.items():
            for line in new.replace(old, "").splitlines():
                if line.strip() and "torch.rand" not in line and "x[:60]" not in line:
                    assert line.strip().partition("  #")[0] in readme
