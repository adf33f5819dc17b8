"""README.md against results/: each test names the bug that it would catch.

In a table, a row that names a command may hold only numbers of that command's run; a sentence is
rebuilt here from the numbers of the runs that it speaks of.
"""

import json
import re
import shlex

from conftest import ROOT

README = (ROOT / "README.md").read_text()
RUNS = {f.parent.name: json.loads(f.read_text()) for f in ROOT.glob("results/*/metrics.json")}
NOT_OURS = ("report", "minutes", "what learns")  # columns without numbers of the run


def log(name):
    return [json.loads(line) for line in (ROOT / "results" / name / "log.jsonl").open()]


def plain(command):
    """A command without the flags that change no number."""
    words = shlex.split(command)
    for flag in ("--out-dir", "--data-dir"):
        if flag in words:
            del words[words.index(flag):words.index(flag) + 2]
    return " ".join(words)


def numbers_in(value):
    """All numbers in nested JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for v in value for n in numbers_in(v)]
    return [value] if isinstance(value, int | float) else []


def rows():
    """(cells, header) of every row of every table."""
    header = None
    for line in README.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if header is None:
            header = cells
        elif set(line) - set("|-"):
            yield cells, header


def test_tables():
    """A number in a table that the run beside it did not give."""
    checked = 0
    for cells, header in rows():
        command = re.search(r"`(python \w+\.py[^`]*)`", " ".join(cells))
        if not command or "question" in header or "file" in " ".join(header):
            continue
        run = [m for m in RUNS.values() if plain(m["command"]) == command[1]]
        assert len(run) == 1, f"{len(run)} runs in results/ of {command[1]}"
        known = numbers_in({k: v for k, v in run[0].items() if k != "versions"})
        for cell, title in zip(cells, header, strict=True):
            if any(word in title for word in NOT_OURS):
                continue
            cell = re.sub(r"`[^`]*`|\([^)]*\)", "", cell)
            for text in re.findall(r"(?<![\w.])-?[\d,]*\.?\d+", cell):
                digits = len(text.partition(".")[2])
                scale = 100 if "%" in title else 1
                assert any(round(scale * n, digits) == float(text.replace(",", ""))
                           for n in known), f"{text} is not in the run of {command[1]}"
                checked += 1
    assert checked > 60
