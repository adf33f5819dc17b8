"""What all tests share. None needs a network or FashionMNIST: they run on the digits."""

import contextlib
import functools
import gzip
import hashlib
import json
import os
import re
import shlex
import signal
import sys
import traceback
from argparse import Namespace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: threads gain nothing on so little data

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # so that plain `pytest` works too

import common  # noqa: E402

# most of a --fast run is the drawing: small, without a layout, drawn once (bbox_inches="tight"
# draws twice), t-SNE with the fewest steps it takes
common.DPI = 30
savefig = common.Figure.savefig
common.Figure.savefig = lambda fig, file, dpi, bbox_inches: (
    savefig(fig, file, dpi=dpi) if bbox_inches == "tight" else pytest.fail("a label may be cut"))
common.TSNE = functools.partial(common.TSNE, max_iter=250)
ConstrainedLayoutEngine.execute = lambda self, fig: None
os.fsync = lambda fd: None  # no test needs its files after a power cut


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in a folder of its own: runs/ and data/ land there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.Run, "advice", None)  # undone after the test


@pytest.fixture(scope="module")
def digits():
    return common.load_data(Namespace(data="digits", fast=False, device="cpu"))


@pytest.fixture
def fails(capsys):
    """fails(status, function, *args): it exits with this status and one line, which is returned."""
    def check(status, function, *args, **kwargs):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            function(*args, **kwargs)
        lines = capsys.readouterr().err.strip().splitlines()
        assert exit_info.value.code == status
        assert len(lines) == 1, lines
        return lines[0]
    return check


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A small synthetic FashionMNIST in --data-dir fashion; returns the folder of its files.

    Its sums replace the real ones: those of the files, and those of the .gz that pack() makes.
    """
    raw = tmp_path / "fashion" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng, archives = np.random.default_rng(0), []
    for part, n in (("train", 1200), ("t10k", 400)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 10
        for kind, header, array in (("images-idx3", (2051, n, 28, 28), images),
                                    ("labels-idx1", (2049, n), labels)):
            name, content = f"{part}-{kind}-ubyte", np.array(header, ">i4").tobytes()
            content += array.tobytes()
            (raw / name).write_bytes(content)
            monkeypatch.setitem(common.SHA256, name, hashlib.sha256(content).hexdigest())
            archives.append((f"{name}.gz", hashlib.md5(pack(content)).hexdigest()))
    monkeypatch.setattr(common.FashionMNIST, "resources", archives)
    return raw


def forked(function, *args):
    """Run function(*args) in a child process that may be killed; returns its number and output.

    A fork has all imports already: a new Python would take two seconds for them.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork a process")
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, open(read)
    try:
        with open(write, "w") as out, contextlib.redirect_stdout(out):
            function(*args)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)  # without the handlers of pytest


def kill(child):
    """SIGKILL, and wait for the end."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


class Evil:
    """In a pickle it runs code: a folder "executed" appears."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def pack(content):
    """The .gz of these bytes, the same at any time."""
    return gzip.compress(content, mtime=0)


def readme_commands(script):
    """The arguments of every `python SCRIPT ...` in the README, results/*.md and its docstring."""
    pages = [ROOT / "README.md", *sorted(ROOT.glob("results/*.md"))]
    text = "\n".join([*(page.read_text(encoding="utf-8") for page in pages),
                      (ROOT / script).read_text(encoding="utf-8").split('"""')[1]])
    commands = re.findall(rf"python {script}([^`|\n]*?)(?:  |[`|\n])", text)
    return [shlex.split(command) for command in commands if "--help" not in command]


def history(folder):
    """log.jsonl without the times."""
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def numbers(value):
    """Metrics without what differs between two equal runs: times, and the folders' names."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items()
                if k not in ("folder", "command", "argv") and "seconds" not in k}
    return [numbers(v) for v in value] if isinstance(value, list) else value
