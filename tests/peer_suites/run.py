"""Run the suites of vcrpy and pytest-recording, as they are and with cassettes of ours, and compare.

    python tests/peer_suites/run.py

Both come as source distributions from the package index and are kept outside the repository, with an environment of
their own (`tests/environments.py`). Counted are the tests that pass with stock vcrpy here: without a network, those of
HTTPS left out, as its test server's certificate is trusted by few machines.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))
from environments import CACHE, make  # noqa: E402 - next to this folder

SUITES = {"vcrpy": "9.4.2", "pytest_recording": "0.14.1"}
VCRPY = ["tests/integration", "-m", "not online", "-k", "not https"]
LEAST = 0.95
SECONDS = 600


def checkout(python: Path, name: str) -> Path:
    """Return the folder of a suite's source distribution, which is downloaded once."""
    folder = CACHE / f"{name}-{SUITES[name]}"
    if not folder.exists():
        wanted = f"{name.replace('_', '-')}=={SUITES[name]}"
        fetch = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", wanted.partition("=")[0]]
        subprocess.run([str(python), *fetch, "-d", str(CACHE), wanted], check=True)
        with tarfile.open(next(CACHE.glob(f"{name}-{SUITES[name]}.tar.gz"))) as archive:
            archive.extractall(CACHE, filter="data")
    return folder


def outcomes(python: Path, folder: Path, arguments: list[str], **environment: str) -> dict[str, str]:
    """Run a suite and return the result of each test."""
    command = [str(python), "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", "no:randomly", *arguments]
    paths = os.pathsep.join([str(ROOT), str(HERE)])
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    found = re.findall(r"^(PASSED|FAILED|ERROR) (\S+::.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if not found:
        sys.exit(f"Expected the outcomes of {folder.name}, got\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return {test: outcome for outcome, test in found}


def main() -> int:
    """Compare both suites; exit with 1 if too few tests pass."""
    python = make("peer-suites")
    served = {
        "vcrpy": outcomes(python, checkout(python, "vcrpy"), ["-p", "serve_vcrpy", *VCRPY]),
        "pytest_recording": outcomes(
            python,
            checkout(python, "pytest_recording"),
            ["tests"],
            PYTEST_PLUGINS="aggregator.testing.pytest_plugin,serve_recording",
        ),
    }
    stock = {
        "vcrpy": outcomes(python, checkout(python, "vcrpy"), VCRPY),
        "pytest_recording": outcomes(python, checkout(python, "pytest_recording"), ["tests"]),
    }
    too_few = False
    for name, before in stock.items():
        good = [test for test, outcome in before.items() if outcome == "PASSED"]
        lost = [test for test in good if served[name].get(test) != "PASSED"]
        share = 1 - len(lost) / len(good)
        too_few |= share < LEAST
        print(f"{name} {SUITES[name]}: {len(good) - len(lost)} of {len(good)} that stock passes ({share:.1%})")  # noqa: T201
        print("".join(f"  {test}\n" for test in lost), end="")  # noqa: T201
    return int(too_few)


if __name__ == "__main__":
    sys.exit(main())
