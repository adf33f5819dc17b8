"""finetune.py, ImageNet's weights: each test names the bug that it would catch."""
# ruff: noqa: F811 (a fixture is imported, and then named as an argument)

from pathlib import Path

import finetune
import pytest
import torch
import torchvision
from conftest import Evil
from test_finetune import FAST, digits, encoder, few, fewer, no_figures  # noqa: F401


@pytest.mark.parametrize("content", ["poisoned", "resnet34", "text", "passwd", "list",
                                     "truncated", "flipped bit", "missing", "folder"])
def test_bad_weights_end_in_one_line(content, fails):
    """Weights that run code; a network half filled; random weights passed off as pre-trained."""
    if content == "poisoned":
        torch.save({"conv1.weight": Evil()}, "w.pth")
    elif content == "resnet34":
        torch.save(torchvision.models.resnet34().state_dict(), "w.pth")
    elif content == "text":
        Path("w.pth").write_text("hello")
    elif content == "passwd":
        Path("w.pth").write_text("root:x:0:0:root:/root:/bin/sh")
    elif content in ("truncated", "flipped bit"):
        torch.save(torchvision.models.resnet18().state_dict(), "w.pth")
        data = bytearray(Path("w.pth").read_bytes())
        data[len(data) // 2] ^= 1
        Path("w.pth").write_bytes(data[:1000 if content == "truncated" else None])
    elif content == "list":
        torch.save([1, 2], "w.pth")
    elif content == "folder":
        Path("w.pth").mkdir()
    for model in ("resnet18", "all")[:2 if content == "text" else 1]:  # never left out quietly
        message = fails(2, finetune.main, [*FAST, "--model", model, "--weights", "w.pth"])
        assert "w.pth" in message and not Path("executed").exists()
        assert "weights_only" not in message  # torch advises to switch it off
    assert not Path("runs").exists()


def test_pretrained_weights_are_used_and_stay(no_figures):
    """Weights that are loaded and then not used, or frozen layers that learn."""
    torch.manual_seed(0)
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, "w.pth")
    metrics = finetune.main([*FAST, "--model", "resnet18", "--weights", "w.pth", "--epochs", "1",
                             "--out-dir", "run"])
    state = torch.load("run/model.pt", weights_only=True)["things"]["model"]
    assert state["net.conv1.weight"].equal(weights["conv1.weight"])
    assert state["net.layer2.1.bn2.running_var"].equal(weights["layer2.1.bn2.running_var"])
    assert not state["net.layer3.0.conv1.weight"].equal(weights["layer3.0.conv1.weight"])
    m = metrics["models"]["resnet18"]
    assert m["trained_parameters"] == 10_498_570 < m["parameters"] == 11_181_642
