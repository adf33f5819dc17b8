"""The tests, tested: each planted bug in bugs/*.patch fails the test that its header names.

    python -m pytest tests/patches.py

Plain `python -m pytest` leaves it out, to be quick; .ci/run does not.

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
from clinic import PATCHES, copy_tree, header

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


if __name__ == "__main__":
    child(Path(sys.argv[1]))
