"""common.py, flags and exit statuses: each test names the bug that it would catch."""

import common
import pytest
import torch


@pytest.fixture(autouse=True)
def read_once(digits, monkeypatch):
    """The digits are not unpacked again for each of the small runs below."""
    monkeypatch.setattr(common, "read_digits", lambda: digits)


# --------------------------------------------------------------------------- flags

RECIPES = {"best": {}, "report": {"latent_dim": 5, "lr": 0.5}}
MODES = {"tune": ("price", "storage", "epochs"), "ablate": ("latent_dim",)}


def defaults(args):
    """Those that other flags change."""
    few = 1 if args.fast else 4 if args.tune else 3
    return RECIPES[args.recipe] | {"epochs": few}


def parse_args(argv):
    """The flags of a small script; it calls itself ae, whose source is there."""
    parser = common.Parser("A script for tests.")
    parser.add_argument("--latent-dim", type=common.number(int, 2, 10), default=3)
    parser.add_argument("--start-class", default="plain")
    parser.add_argument("--tune", type=common.number(int, 1, 100))
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--price", type=common.number(float, 0, 1), default=0.5)
    parser.add_argument("--storage")
    common.add_training_flags(parser, RECIPES, epochs=3, batch_size=64, lr=0.1, augment="none")
    return common.parse(parser, "ae", argv, defaults, MODES)


CPU = ["--device", "cpu", "--data", "digits"]


def test_which_default_wins():
    """A recipe, a mode or --fast that overrides what was asked for explicitly."""
    for words, flag, value in (
            ("", "latent_dim", 3), ("--recipe report", "latent_dim", 5),
            ("--recipe report --latent-dim 3", "latent_dim", 3), ("--tune 1", "epochs", 4),
            ("--tune 1 --fast", "epochs", 1), ("--tune 1 --fast --epochs 3", "epochs", 3)):
        assert getattr(parse_args([*CPU, *words.split()]), flag) == value, words


@pytest.mark.parametrize("words, said", [
    ("--ablate --price 0.1", "--price does not go with --ablate"),
    ("--tune 2 --latent-dim 7", "--latent-dim does not go with --tune"),
    ("--tune 2 --lr 0.1", "--lr does not go with --tune"),  # its default
    ("--tune 2 --recipe report", "--recipe does not go with --tune"),
    ("--tune 2 --ablate", "--tune does not go with --ablate"),
    ("--ablate --epochs 2", "--epochs does not go with --ablate"),
    ("--tune 2 --price 0.1 --storage s --epochs 5 --seed 3 --fast", None),
    ("--ablate --latent-dim 4 --data-dir d", None)])
def test_modes_refuse_what_they_would_ignore(fails, words, said):
    """A flag that does nothing in this mode is taken without a word; one that does is refused."""
    argv = [*CPU, *words.split()]
    if said:
        assert said in fails(2, parse_args, argv)
    else:
        assert parse_args(argv).argv == argv


# --------------------------------------------------------------------------- what ends a run


@pytest.mark.parametrize("error, status, said", [
    (KeyboardInterrupt(), 130, "interrupted; repeat the command"),
    (FloatingPointError("val_loss is nan after epoch 2"), 1, "val_loss is nan"),
    (OSError(28, "No space left on device"), 1, "No space left"),
    (BrokenPipeError(32, "Broken pipe"), 1, "Broken pipe"),  # python ae.py | head -1
    (RuntimeError("[enforce fail] can't allocate memory:\nyou tried"), 1, "--batch-size"),
    (torch.OutOfMemoryError("CUDA out of memory."), 1, "--batch-size"),
    (RuntimeError("std::bad_alloc"), 1, "--batch-size"), (MemoryError(), 1, "--batch-size"),
    (SystemExit(2), 2, None)])
def test_what_ends_a_run_is_one_line(capsys, error, status, said):
    """Forty lines of traceback for a network that is too large, or status 0 for a failure."""
    def run():
        raise error
    with pytest.raises(SystemExit) as exit_info:
        common.start(run)
    lines = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == status and len(lines) == bool(said)
    assert not said or said in lines[0]


def test_a_bug_keeps_its_traceback():
    """A wrong shape in a student's own layer is called a lack of memory, or one bare line."""
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("rows"),
                  RuntimeError("some elements of the input refer to a single memory location")):
        def run(error=error):
            raise error
        with pytest.raises(type(error)):
            common.start(run)
