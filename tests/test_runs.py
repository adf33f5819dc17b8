"""common.py, the run's folder and checkpoints: each test names the bug that it would catch."""

import json
import os
import pickle
import shlex
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import common
import pytest
import torch
from conftest import Evil, history, numbers
from test_common import CPU, parse_args, read_once  # noqa: F401


# --------------------------------------------------------------------------- the run's folder


def build(args):
    """The smallest network that a flag changes."""
    return torch.nn.Linear(args.latent_dim, 1)


def main(argv, losses, parts=("fold 1",)):
    """A script: in each epoch its weights grow by the loss; an exception in losses is raised."""
    losses, args = iter(losses), parse_args(argv)
    run = common.Run(args, common.load_data(args), columns=("val_loss",))
    for part in parts:
        model = build(args)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        for _ in range(run.begin(part, args.epochs, model), args.epochs + 1):
            loss = next(losses)
            if isinstance(loss, BaseException):
                raise loss
            with torch.no_grad():
                model.weight += loss
            run.end_epoch(loss, train_loss=1.0, val_loss=loss)
        run.load_best(model)
    return run.finish({"latent_dim": args.latent_dim, "best": run.best["score"]},
                      ["the best < of all"], model)


def interrupted(folder, *losses):
    """A run of three epochs that ends before its time."""
    with pytest.raises(KeyboardInterrupt):
        main([*CPU, "--out-dir", folder], [*losses, KeyboardInterrupt()])


def edit(file, **changes):
    """Other values in a JSON file."""
    file = Path(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(step, tmp_path, monkeypatch):
    """A crash during torch.save destroys the only checkpoint."""
    file = tmp_path / "fold-1.pt"
    file.write_text("old")
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(common.os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        common.write(file, b"half")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_the_best_weights_are_not_the_last():
    """state_dict() holds references: "best" weights kept without a copy go on training."""
    main([*CPU, "--out-dir", "run"], [0.3, 0.1, 0.2])
    model = common.load_run("run", "ae", parse_args, build)
    assert model.weight.unique().tolist() == [pytest.approx(0.4)]  # 0.3 + 0.1
    kept = build(parse_args(CPU))
    best = common.load_checkpoint(Path("run/fold-1.pt"), {"model": kept})["best"]
    assert (best["epoch"], best["score"]) == (2, 0.1)
    assert kept.weight.unique().tolist() == [pytest.approx(0.6)]  # where resuming would go on


def test_resumed_equals_uninterrupted(capsys, fails):
    """A part is repeated or left out, or weights, history or the best epoch are lost."""
    losses, parts = [0.3, 0.1, 0.2, 0.5, 0.7, 0.6], ("fold 1", "fold 2")
    whole = main([*CPU, "--out-dir", "whole"], losses, parts)
    with pytest.raises(KeyboardInterrupt):
        main([*CPU, "--out-dir", "a b"], [*losses[:4], KeyboardInterrupt()], parts)
    assert not os.path.exists("a b/metrics.json") and len(history("a b")) == 4
    capsys.readouterr()
    resumed = main(["--resume", "a b"], losses[4:], parts)
    assert capsys.readouterr().err == ""
    again = main(["--resume", "a b"], [], parts)  # a finished one trains nothing
    Path("whole/fold-2.pt").rename("whole/gone.pt")
    assert "fold-2.pt of a finished run is gone" in fails(2, main, ["--resume", "whole"], [], parts)
    assert numbers(whole) == numbers(resumed) == numbers(again)
    assert history("whole") == history("a b") and len(history("a b")) == 6
    models = [common.load_run(folder, "ae", parse_args, build) for folder in ("whole", "a b")]
    assert torch.equal(*(model.weight for model in models))
    assert models[0].weight[0, 0].item() == pytest.approx(0.5)  # of the last part, its first epoch


def test_a_run_without_a_checkpoint_is_resumed_from_its_start():
    """A circle: "repeat the command", the folder is not empty, there is no checkpoint."""
    interrupted("run")
    assert main(["--resume", "run"], [0.3, 0.1, 0.2])["best"] == 0.1


def test_the_run_folder(capsys):
    """Lost numbers: not strict JSON, no line for an epoch, no versions, another last line."""
    metrics = main([*CPU, "--out-dir", "run"], [0.3, 0.1, 0.2])
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "run" and "the best < of all" in out and len(
        [line for line in out if line.startswith("fold 1")]) == 3
    config = json.loads(Path("run/config.json").read_text())
    assert metrics == json.loads(Path("run/metrics.json").read_text())
    assert config.items() <= metrics.items()
    assert config["versions"]["torch"] == torch.__version__ and config["flags"]["latent_dim"] == 3
    assert config["argv"] == [*CPU, "--out-dir", "run"] == shlex.split(config["command"])[2:]
    assert (metrics["epochs"], metrics["fast"], metrics["data"]) == (3, False, "digits")
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [(row["part"], row["epoch"], row["val_loss"]) for row in log] == [
        ("fold 1", 1, 0.3), ("fold 1", 2, 0.1), ("fold 1", 3, 0.2)]
    assert all(row["seconds"] > 0 for row in log)


def test_index_html_shows_every_figure(digits):
    """A figure or its caption is missing, a "<" breaks the page, or it asks the network."""
    run = common.Run(parse_args([*CPU, "--out-dir", "run"]), digits)
    for name, caption in (("fig10_b", "Is a < b?"), ("fig02_a", "What & why?")):
        run.save(common.Figure(figsize=(1, 1)), name, caption)
    run.finish({}, ["1 < 2"])
    page = Path("run/index.html").read_text(encoding="utf-8")
    places = [page.index(text) for text in (
        "1 &lt; 2", "What &amp; why?", 'src="fig02_a.png"', "Is a &lt; b?", 'src="fig10_b.png"')]
    assert places == sorted(places)
    assert "http" not in page and "<script" not in page and "<link" not in page
    assert Path("run/fig02_a.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_never_destroys_another(digits, fails, monkeypatch):
    """Two runs in the same second share a folder; --out-dir writes over an old run."""
    assert len({common.Run(parse_args(CPU), digits).folder for _ in range(3)}) == 3
    os.mkdir("füll me")
    args = parse_args([*CPU, "--out-dir", "füll me"])
    assert str(common.Run(args, digits).folder) == "füll me"
    message = fails(2, common.Run, args, digits)
    assert "not empty" in message and "--resume 'füll me'" in message
    open("file", "w").close()
    message = fails(2, common.Run, parse_args([*CPU, "--out-dir", "file/x"]), digits)
    assert "cannot write to file/x" in message
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(()))  # before the other run wrote
    assert "cannot write to füll me (File exists)" in fails(2, common.Run, args, digits)


def test_a_full_disk_keeps_the_last_checkpoint(fails, monkeypatch):
    """A run that loses its checkpoint, or ends in a traceback, when the disk is full."""
    def full(descriptor):
        raise OSError(28, "No space left on device")

    def losses():
        yield 0.5
        monkeypatch.setattr(common.os, "fsync", full)
        yield 0.4
    message = fails(1, common.start, lambda: main([*CPU, "--out-dir", "a b"], losses()))
    assert "No space left" in message
    assert message.endswith("go on with: python ae.py --resume 'a b'")
    assert sorted(os.listdir("a b")) == ["config.json", "fold-1.pt", "log.jsonl"]
    rows = common.load_checkpoint(Path("a b/fold-1.pt"), {})["rows"]
    assert [row["val_loss"] for row in rows] == [0.5]


def test_the_advice_names_the_first_run(digits, fails):
    """Ctrl-C in the training of a judge: to go on with the judge alone does not make the GAN."""
    def interrupt():
        for folder in ("gan", "judge"):
            common.Run(parse_args([*CPU, "--out-dir", folder]), digits)
        raise KeyboardInterrupt
    assert fails(130, common.start, interrupt).endswith("go on with: python ae.py --resume gan")


def test_a_loss_that_is_not_finite_ends_the_training(fails):
    """Training goes on with nan, and the next checkpoint holds nothing else."""
    for name, bad in (("nan", float("nan")), ("inf", float("inf"))):
        with pytest.raises(FloatingPointError, match=f"val_loss is {name} after epoch 2"):
            main([*CPU, "--out-dir", name], [0.5, bad])
        model = build(parse_args(CPU))
        rows = common.load_checkpoint(Path(name, "fold-1.pt"), {"model": model})["rows"]
        assert len(rows) == len(history(name)) == 1 and model.weight.isfinite().all()
    message = fails(1, common.start, lambda: main([*CPU], [float("nan")]))
    assert "val_loss is nan after epoch 1" in message and "--lr" in message


@pytest.mark.parametrize("damage", ["missing", "truncated", "bit flip", "text", "poisoned",
                                    "pickle", "foreign", "list", "incomplete"])
def test_bad_checkpoints_are_refused(fails, damage):
    """A damaged checkpoint loads silently; an untrusted one runs code; a wrong one is taken."""
    interrupted("run", 0.3, 0.1)
    file, model = Path("run/fold-1.pt"), build(parse_args(CPU))
    content, state = bytearray(file.read_bytes()), torch.load(file, weights_only=True)
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-100])
    elif damage == "bit flip":  # in the first number of a tensor: only the CRC can tell
        with zipfile.ZipFile(file) as archive:
            start = next(e for e in archive.infolist() if "/data/" in e.filename).header_offset
        start += 30 + int.from_bytes(content[start + 26:start + 28], "little") + int.from_bytes(
            content[start + 28:start + 30], "little")  # a local header: 30 bytes, name, extra
        content[start] ^= 1
        file.write_bytes(content)
    elif damage == "text":
        file.write_text("hello")
    elif damage == "poisoned":
        torch.save({**state, "rows": Evil()}, file)
    elif damage == "pickle":
        file.write_bytes(pickle.dumps(Evil()))
    elif damage == "foreign":
        model = torch.nn.Conv2d(1, 1, 3)
    elif damage == "list":
        torch.save([1, 2], file)
    else:
        torch.save({"things": state["things"]}, file)
    message = fails(2, common.load_checkpoint, file, {"model": model})
    assert str(file) in message and not os.path.exists("executed")
    if damage not in ("missing", "foreign"):
        assert message == fails(2, main, ["--resume", "run"], [])


@pytest.mark.parametrize("damage", ["no folder", "no file", "foreign", "text", "binary", "list",
                                    "nested", "no words", "no data", "numbers"])
def test_what_is_no_run_is_refused(fails, damage):
    """A wrong folder, or what is left of one, starts a new training or ends in a traceback."""
    file = Path("run/config.json")
    content = {"no folder": None, "no file": None, "foreign": b'{"script": "vae", "argv": []}',
               "text": b"hello", "binary": b"\xff\xfe", "list": b"[1, 2]",
               "nested": b"[" * 100_000, "no words": b'{"script": "ae"}',
               "no data": b'{"script": "ae", "argv": []}',
               "numbers": b'{"script": "ae", "argv": 1, "data": "digits"}'}[damage]
    if damage != "no folder":
        file.parent.mkdir()
    if content:
        file.write_bytes(content)
    said = {"foreign": "run is a run of vae.py, not of ae.py"}.get(
        damage, "run is no folder of a run, or its config.json is damaged")
    for function, *args in ((common.read_config, "run", "ae"), (main, ["--resume", "run"], []),
                            (common.load_run, "run", "ae", parse_args, build)):
        message = fails(2, function, *args)
        assert said in message and "run" in message


def test_load_run(fails, capsys):
    """Weights of an unfinished run; a flag out of range from the file; another code, no word."""
    interrupted("part", 0.3)
    assert "not finished" in fails(2, common.load_run, "part", "ae", parse_args, build)
    main([*CPU, "--out-dir", "run", "--recipe", "report"], [0.3, 0.1, 0.2])
    capsys.readouterr()
    assert common.load_run("run", "ae", parse_args, build).in_features == 5
    assert capsys.readouterr().err == ""
    edit("run/config.json", source="123456")
    common.load_run("run", "ae", parse_args, build)
    assert capsys.readouterr().err == "warning: ae.py has changed since it made run\n"
    edit("run/config.json", source=common.digest("ae"), argv=[*CPU, "--latent-dim", "7"])
    assert "model.pt is damaged" in fails(2, common.load_run, "run", "ae", parse_args, build)
    edit("run/config.json", argv=[*CPU, "--latent-dim", "11"])
    message = fails(2, common.load_run, "run", "ae", parse_args, build)
    assert "11 is not between 2 and 10" in message


@pytest.mark.parametrize("words, said", [
    ("--latent-dim 7", "--latent-dim is 3 in run"), ("--epochs 4", "--epochs is 3 in run"),
    ("--recipe report", "--recipe is best in run"), ("--seed 1", "--seed is 0 in run"),
    ("--fast", "--fast is False in run"), ("--data fashion", "--data is digits in run"),
    ("--tune 4", "--tune is None in run"),
    ("--storage s", "--storage is None in run"),
    ("--out-dir b", "--out-dir is run in run"),
    ("--latent-dim 3 --device cpu --data-dir elsewhere --start-class another", None)])
def test_resume_refuses_what_would_change_the_training(fails, words, said):
    """A run resumed with another model or rate is not the run that it says it is."""
    interrupted("run", 0.3, 0.1)
    before, argv = Path("run/config.json").read_text(), ["--resume", "run", *words.split()]
    if said:
        assert said in fails(2, main, argv, [0.2])
        assert len(history("run")) == 2
    else:
        args = parse_args(argv)
        assert (args.start_class, args.data_dir, args.epochs) == ("another", "elsewhere", 3)
        assert main(argv, [0.2])["latent_dim"] == 3
    assert Path("run/config.json").read_text() == before


def test_what_config_json_says_is_checked_anew(fails, fashion):
    """An edited file starts what no flag could: a size out of range, or other data."""
    interrupted("run", 0.3, 0.1)
    edit("run/config.json", argv=[*CPU, "--latent-dim", "1"])
    assert "1 is not between 2 and 10" in fails(2, main, ["--resume", "run"], [])
    # auto found the digits when it began: it does not go on with what has been downloaded since
    edit("run/config.json", argv=["--device", "cpu", "--data-dir", "fashion"])
    args = parse_args(["--resume", "run"])
    assert common.load_data(args).name == args.data == "digits"


@pytest.mark.parametrize("key, value", [("source", "123456"), ("machine", "Linux, 99 threads"),
                                        ("versions", {"torch": "1.0"})])
def test_resume_says_what_has_changed(capsys, key, value):
    """Half of a run made by other code, other versions or other threads, without a word."""
    interrupted("run", 0.3, 0.1)
    edit("run/config.json", **{key: value})
    capsys.readouterr()
    metrics = main(["--resume", "run"], [0.2])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"warning: since this run began its {key} chan")
    assert metrics[key] == value  # what began the run


def test_the_digest_tells_trainings_apart(tmp_path, monkeypatch):
    """Another loss under the old name is not seen; or a comment makes every chapter train anew."""
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))

    def digest(source, shared="def augment(x):\n    return x\n\ndef fail():\n    pass\n"):
        (tmp_path / "toy.py").write_text(source)
        (tmp_path / "common.py").write_text(shared)
        common.digest.cache_clear()
        return common.digest("toy")
    source = "import common\n\ndef loss(x):\n    return x\n\ndef draw_x():\n    pass\n"
    same = [source, source.replace("(x):", "(x):  # a comment"), source.replace("pass", "return"),
            source + "\n\ndef main():\n    pass\n"]
    other = [source.replace("return x", "return 2 * x"), source + "class A:\n    b = 1\n",
             source + "class A:\n    b = 2\n"]
    assert len({digest(text) for text in same}) == 1
    assert len({digest(text) for text in [source, *other]}) == 4
    assert len(digest(source)) == 6
    assert digest(source, "def augment(x):\n    return x\n") == digest(source)  # without fail()
    assert digest(source, "def augment(x):\n    return -x\n") != digest(source)
    source = "import ae\n\n" + source
    (tmp_path / "ae.py").write_text("rate = 1\n")
    before = digest(source)
    (tmp_path / "ae.py").write_text("rate = 2\n")
    assert digest(source) != before  # of what it builds on
    monkeypatch.undo()
    common.digest.cache_clear()


# --------------------------------------------------------------------------- trained


@pytest.fixture
def script(monkeypatch):
    """A module under the name of ae whose calls are counted, and whose losses can be given."""
    module = Namespace(calls=[], losses=[0.3, 0.1, 0.2], parse_args=parse_args)
    monkeypatch.setitem(sys.modules, "ae", module)

    def count(argv):
        module.calls.append(argv)
        return main(argv, module.losses)
    module.main = count
    return module


FLAGS = ["--latent-dim", "4"]


def trained(*words, flags=FLAGS):
    """What a chapter calls, which was itself called with these words."""
    args = parse_args([*CPU, *words])
    return common.trained("ae", args, minutes=9, flags=flags, name="judge")


def test_trained_once_and_used_then(script, capsys):
    """The same command trains twice; a seed, data or --fast that get the network of another."""
    folder = trained()
    out = capsys.readouterr().out
    words = [*FLAGS, "--data", "digits", "--seed", "0"]
    assert Path(folder) == Path("runs", f"judge-digits-seed0-{common.digest('ae', *words)}")
    assert "python ae.py --latent-dim 4 --data digits --seed 0 makes it" in out
    assert "9 minutes" in out and trained() == folder and len(script.calls) == 1
    assert capsys.readouterr().out == f"using {folder}\n"
    assert common.load_run(folder, "ae", parse_args, build).in_features == 4
    script.losses = [0.5] * 3
    folders = {folder, trained("--seed", "1"), trained("--fast"), trained(flags=["--epochs", "3"])}
    assert len(folders) == len(script.calls) == 4
    assert json.loads(Path(trained("--fast"), "config.json").read_text())["flags"]["fast"]


def test_trained_takes_no_other_run(script, capsys):
    """What else lies in runs/, newer or better, changes the numbers of a command."""
    for name in ("judge", "judge-digits", "ae-99991231-235959", "judge-digits-seed0"):
        main([*CPU, *FLAGS, "--out-dir", f"runs/{name}"], [0.0] * 3)
    folder = trained()
    assert len(script.calls) == 1
    assert json.loads(Path(folder, "metrics.json").read_text())["best"] == 0.1


def test_trained_goes_on_with_an_interrupted_one(script):
    """Half a training is taken for a whole one, or is trained again from the start."""
    script.losses = [0.3, KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        trained()
    script.losses = [0.1, 0.2]  # one less than a training from the start would take
    folder = trained("--data-dir", "moved")
    assert script.calls[1][:2] == ["--resume", folder]
    assert [row["val_loss"] for row in history(folder)] == [0.3, 0.1, 0.2]
    assert trained() == folder and len(script.calls) == 2


def test_trained_anew_by_other_code(script, monkeypatch):
    """A chapter goes on with what an earlier version of the script made."""
    first = trained()
    monkeypatch.setattr(common, "digest", lambda name, *words: "abcdef")
    second = trained()
    assert second.endswith("-abcdef") and second != first and len(script.calls) == 2
