"""The documents are executed: Python fences run, commands exist, the demo's output is the real one."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
BIN = Path(sys.executable).parent


def fences(document: str, kind: str) -> list[str]:
    """Return a document's fences of one kind, in order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [match["text"] for match in FENCE.finditer(text) if match["kind"].strip() == kind]


def documents_with(kind: str) -> list[str]:
    found = [Path("README.md"), *(path.relative_to(ROOT) for path in sorted((ROOT / "docs").glob("*.md")))]
    return [str(path) for path in found if fences(str(path), kind)]


@pytest.mark.parametrize("document", documents_with("python"))
def test_python_fences_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document's Python runs from top to bottom in one namespace, in an empty folder, without a key."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.endswith("_API_KEY"):
            monkeypatch.delenv(name)
    script = tmp_path / "document.py"  # a file: trainable operations show their source
    script.write_text("\n".join(fences(document, "python")), encoding="utf-8")
    runpy.run_path(str(script))


@pytest.mark.parametrize("document", documents_with("sh"))
def test_commands_exist(document: str) -> None:
    """Every command is a make target, a subcommand of ours, or pip's; make resolves it in a dry run."""
    for line in "".join(fences(document, "sh")).splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[0] == "aggregator":
            commands = [word for word in words[1:3] if word.isalpha()]
            subprocess.run([BIN / "aggregator", *commands, "--help"], check=True, capture_output=True)
        elif words[:3] == ["python", "-m", "benchmarks"]:
            names = [word for word in words[3:] if word.isalpha()]
            missing = [
                n for n in names if not (ROOT / "benchmarks" / f"{'import_cost' if n == 'import' else n}.py").exists()
            ]
            assert missing == [], line
        else:
            assert words[0] in {"pip", "git", "cd", "python", "pytest", "export"}, line


def settled(text: str) -> list[str]:
    """Return lines of the demo's output without times."""
    return [re.sub(r"in [\d.]+ seconds", "in ... seconds", line.rstrip()) for line in text.strip().splitlines()]


def test_the_readme_shows_the_demos_real_output(tmp_path: Path) -> None:
    """The README shows the output of `make demo`, except for the seconds."""
    (shown,) = fences("README.md", "text")
    done = subprocess.run(
        [BIN / "aggregator", "demo"], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=100
    )
    printed = settled(done.stdout)
    missing = [line for line in settled(shown) if line and line not in printed]
    assert missing == []


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each example runs offline and prints what it shows."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_design_page_lists_the_rooms_there_are() -> None:
    """It listed a room that was not built, and left one out."""
    (table,) = [block for block in fences("docs/design.md", "") if block.startswith("cli ")]
    listed = {name for line in table.splitlines() for name in re.split(r",? +", line.partition("  ")[0]) if name}
    package = ROOT / "aggregator"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    files = {path.stem for path in package.glob("*.py")}
    assert (sorted(rooms - listed), sorted(listed - rooms - files)) == ([], [])


def test_documented_names_exist() -> None:
    """Each `aggregator.<name>` and each `<file>.py` in a document is there; a renamed one would mislead."""
    files = {
        path.name
        for folder in ("aggregator", "tests", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    }
    missing = []
    for document in (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "benchmarks" / "README.md"):
        text = document.read_text(encoding="utf-8")
        names = re.findall(r"`(aggregator(?:\.\w+)+)[(`]", text)
        missing += [f"{document.name}: {name}" for name in names if not exists(name)]
        missing += [
            f"{document.name}: {path}" for path in re.findall(r"`([\w/]+\.py)`", text) if Path(path).name not in files
        ]
    assert missing == []


def exists(name: str) -> bool:
    """Return True if a dotted name can be imported, or belongs to a framework that is not installed."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:count]))
        except ImportError as error:
            if error.name is None or not error.name.startswith("aggregator"):
                return True
            continue
        missing = object()
        return all((found := getattr(found, part, missing)) is not missing for part in parts[count:])
    return False
