"""The tests, tested: each planted bug in bugs/*.patch fails the test that its header names.

One child process applies patch after patch to a copy of the scripts, imports these afresh and runs
the named test; a process each would spend its time on importing torch. That the test passes without
the patch, the rest of the suite shows.
"""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from check import look_up
from clinic import PATCHES, ROOT, VIEWS, copy_tree, header

MODULES = {"ae", "common", "conftest", "embed", "finetune", "gan", "vae"}


class Outcomes:
    """A plugin of pytest that keeps how each test ended: {test: [first line of each failure]}."""

    def __init__(self):
        self.ends = {}

    def pytest_runtest_logreport(self, report):
        test = report.nodeid.partition("[")[0]  # without the parameters
        self.ends.setdefault(test, [])
        if not report.passed and not report.skipped:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message.splitlines()[0] if crash else str(report.longrepr)
            self.ends[test].append(f"{report.when}: {message}")


def run_tests(tree, tests, *flags):
    """Outcomes of these tests in the tree, with its own scripts and no others."""
    for name in [n for n in sys.modules if n in MODULES or n.startswith("test_")]:
        del sys.modules[name]
    outcomes, path = Outcomes(), list(sys.path)
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*(f"{tree}/{test}" for test in tests), "-q", "--rootdir", str(tree),
                     f"--basetemp={tree}/temporary", "-p", "no:cacheprovider",
                     *flags], plugins=[outcomes])
    sys.path[:] = path
    return outcomes.ends


def child(folder):
    """Prints {patch: {test: failures}}; null for a patch that does not apply."""
    tests = {patch.name: header(patch)["caught-by"] for patch in PATCHES}
    found = {}
    for patch in PATCHES:
        tree = folder / patch.stem
        found[patch.name] = (run_tests(tree, [tests[patch.name]], "-x")
                             if copy_tree(tree, patch) else None)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the child process found; see there."""
    if not shutil.which("git"):
        pytest.skip("git is not installed, which applies the patches")
    folder = tmp_path_factory.mktemp("bugs")
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_the_bug_is_caught(found, patch):
    """A test that passes whatever the script does; a patch that no longer applies."""
    test = header(patch)["caught-by"]
    assert found[patch.name] is not None, f"{patch.name} no longer applies: make it anew"
    ends = found[patch.name].get(test)
    assert ends, f"{test} is gone, or does not see the bug"
    # not by a crash: the bug is a silent one
    assert all(end.startswith(("call: assert", "call: AssertionError")) for end in ends), ends


def test_the_clinic_shows_every_case():
    """A case without a picture, three questions, its own command, lines and test; a large one."""
    page = (ROOT / "results" / "clinic.md").read_text(encoding="utf-8")
    assert len(PATCHES) == len(VIEWS) >= 12
    cases = page.split("\n## ")[1:]
    chapters = [patch.name.split("-")[1] for patch in PATCHES]
    assert all(chapters.count(name) >= 2 for name in ("ae", "vae", "gan", "finetune", "embed"))
    for patch, case in zip(PATCHES, cases, strict=True):
        number = patch.name[:2]
        assert f"clinic/{number}.png" in case
        assert (ROOT / "results" / "clinic" / f"{number}.png").stat().st_size <= 90_000
        assert header(patch)["command"] in case and header(patch)["caught-by"] in case
        seen, folded = case.split("<details>", 1)
        assert seen.count("?") == 3 and header(patch)["title"] not in seen
        diff = patch.read_text().partition("\n@@")[2].splitlines()
        changed = [line for line in diff if line.startswith(("+", "-"))]
        assert 1 <= len(changed) <= 5
        assert all(line[1:].strip() in folded for line in changed if line.startswith("+"))


# --------------------------------------------------------------------------- exercises

EXERCISES = json.loads((ROOT / "tests" / "exercises.json").read_text(encoding="utf-8"))


def check(*words):
    """(status, standard output, standard error) of check.py."""
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "check.py"), *words],
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run():
    """A folder of a finished run, as a student would have it."""
    def make(**metrics):
        Path("run").mkdir(exist_ok=True)
        Path("run/metrics.json").write_text(json.dumps(
            {"fast": False, "data": "fashion", **metrics}))
    return make


def test_check_says_right_or_gives_a_hint(run):
    """A wrong number that passes, a right one that does not, an answer that was not asked for."""
    exercise = EXERCISES[0]
    key, value, tolerance = exercise["key"], exercise["value"], exercise["tolerance"]
    run(**{key: value + 0.9 * tolerance})
    status, said, _ = check(exercise["id"], "run")
    assert status == 0 and "right" in said and exercise["answer"] not in said
    run(**{key: value + 1.1 * tolerance})
    status, said, _ = check(exercise["id"], "run")
    assert status == 1 and exercise["hint"] in said and exercise["answer"] not in said
    status, said, _ = check(exercise["id"], "run", "--answer")
    assert exercise["answer"] in said


def test_check_refuses_in_one_line(run):
    """A traceback for a wrong folder, an unfinished run, other data, or another chapter's run."""
    run(another=1)
    Path("begun").mkdir()
    Path("begun/config.json").write_text("{}")
    for words, said in (("ae-1 nowhere", "nowhere"), ("ae-1 begun", "not finished"),
                        ("ae-99 run", "ae-99"), ("ae-1 run", EXERCISES[0]["key"])):
        status, out, error = check(*words.split())
        assert (status, out) == (2, "") and said in error and len(error.splitlines()) == 1
    run(data="digits")
    assert check("ae-1", "run")[0] == 2


def test_exercises_are_measured():
    """A value to reach that no run of ours reached, or a hint that gives it away."""
    assert len({exercise["id"] for exercise in EXERCISES}) == len(EXERCISES)
    for exercise in EXERCISES:
        metrics = json.loads((ROOT / "results" / exercise["run"] / "metrics.json").read_text())
        value = look_up(metrics, exercise["key"])
        assert abs(value - exercise["value"]) <= exercise["tolerance"] / 2, exercise["id"]
        assert f"{exercise['value']:g}".lstrip("0") not in exercise["hint"]


if __name__ == "__main__":
    child(Path(sys.argv[1]))
