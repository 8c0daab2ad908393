"""Run the SDK matrix, each group of SDKs in an environment of its own, and print the table of `benchmarks/README.md`.

    python tests/frameworks/matrix.py            every SDK; `--write` puts the table into benchmarks/README.md
    python tests/frameworks/matrix.py --smoke    a few SDKs of the first environment

The environments are made once and kept outside the repository (`tests/environments.py`). Each one is given at most
`SECONDS`; one that cannot be made, or does not end, is named with the reason, and the others go on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 900
GROUPS = ("sdks", "litellm", "agents", "dspy", "clients-oldest")
SMOKE = ("-k", "records and (openai or anthropic or genai or boto3 or requests)")
README = ROOT / "benchmarks" / "README.md"
MARKS = ("<!-- SDK matrix -->", "<!-- end of SDK matrix -->")
COLUMNS = ("SDK", "version", "call", "recorded", "replayed", "8 identical at once", "a miss is asked")


def run(group: str, table: Path, chosen: Sequence[str]) -> str:
    """Run the matrix in one environment; return the errors, or ""."""
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-W", "ignore", "-rf"]
    command = [sys.executable, str(ROOT / "tests" / "environments.py"), "--run", group, "--", *tests]
    try:
        done = subprocess.run(
            [*command, "tests/frameworks", *chosen],
            env=os.environ | {"AGGREGATOR_SDK_TABLE": str(table)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{group}: not finished after {SECONDS} seconds"
    print(f"{group}: {done.stdout.rstrip().rpartition(chr(10))[2]}", flush=True)  # noqa: T201 - a script
    failed = re.findall(r"^FAILED .*", done.stdout, re.MULTILINE)
    return "" if not done.returncode else "\n".join(failed) or f"{group}: {(done.stdout + done.stderr)[-1500:]}"


def rows(table: Path) -> list[dict[str, str]]:
    """Return one row for each call of each SDK; the records of its two tests are one row."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for line in table.read_text(encoding="utf-8").splitlines():
        note = json.loads(line)
        found.setdefault((note["sdk"], note["version"], note["call"]), {}).update(note)
    return list(found.values())


def render(table: Path) -> str:
    """Return the rows as Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows(table):
        times = int(row.get("miss_asked", 0))
        cells = [
            row["sdk"],
            row["version"],
            row["call"],
            row.get("recorded", "**no**"),
            row.get("replayed", "**no**"),
            row.get("identical", "**no**"),
            "once" if times == 1 else f"{times} times",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the groups, print the table, and list failures."""
    smoke = "--smoke" in arguments
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.jsonl"
        table.touch()
        wrong = [run(group, table, SMOKE if smoke else ()) for group in (GROUPS[:1] if smoke else GROUPS)]
        text = render(table)
        passed = len(rows(table))
    print(text)  # noqa: T201 - a script
    if "--write" in arguments:
        before, _, rest = README.read_text(encoding="utf-8").partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        README.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}", encoding="utf-8")
    failed = [one for one in wrong if one]
    print("\n".join(failed))  # noqa: T201 - a script
    print(f"{passed} passed, {len(failed)} failed")  # noqa: T201 - a script
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
