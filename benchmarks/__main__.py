"""`python -m benchmarks [NAME ...] [--json] [--quick] [--repetitions N] [--peers-python PATH]`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from benchmarks.harness import BenchmarkError, Options
from benchmarks.report import as_json, as_text, machine

HERE = Path(__file__).parent
OTHER_NAMES = {"import_cost": "import"}  # `import` is no name for a module


def benchmarks() -> dict[str, ModuleType]:
    """Name -> module, of every module in this folder that has `run`."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        if not path.name.startswith("_") and "def run(options: Options) -> Report" in path.read_text(encoding="utf-8"):
            found[OTHER_NAMES.get(path.stem, path.stem)] = import_module(f"benchmarks.{path.stem}")
    return found


def title(module: ModuleType) -> str:
    return (module.__doc__ or "").strip().splitlines()[0]


def parser(names: dict[str, ModuleType]) -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<12} {title(module)}" for name, module in names.items())
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the library with its peers.",
        epilog=f"benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("names", nargs="*", metavar="NAME", help="which to run (default: all)")
    made.add_argument("--json", action="store_true", help="print JSON, one array of reports")
    made.add_argument("--quick", action="store_true", help="small sizes and few repetitions: does it run?")
    made.add_argument("--repetitions", type=int, metavar="N", help="instead of each benchmark's own number")
    made.add_argument("--peers-python", metavar="PATH", help="the interpreter of an environment that holds the peers")
    return made


def main(argv: list[str] | None = None) -> int:
    names = benchmarks()
    asked = parser(names).parse_args(argv)
    unknown = [name for name in asked.names if name not in names]
    if unknown:
        print(f"expected names of {', '.join(names)}; got {', '.join(unknown)}", file=sys.stderr)
        return 2
    if asked.peers_python and not Path(asked.peers_python).is_file():
        print(f"expected --peers-python to name an interpreter, got {asked.peers_python}", file=sys.stderr)
        return 2
    options = Options(peers_python=asked.peers_python, repetitions=asked.repetitions, quick=asked.quick)
    where, reports, failed = machine(), [], False
    for name in asked.names or names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            report = names[name].run(options)
        except BenchmarkError as error:
            print(f"{name} failed: {error}", file=sys.stderr)
            failed = True
            continue
        facts = (name, title(names[name]), command(name, asked), where, report)
        reports.append(as_json(*facts))
        if not asked.json:
            print(as_text(*facts), end="\n\n")
    if asked.json:
        print(json.dumps(reports, indent=1))
    return int(failed)


def command(name: str, asked: argparse.Namespace) -> str:
    """The command that measures this again, free of this machine's paths."""
    words = ["python", "-m", "benchmarks", name]
    words += ["--quick"] if asked.quick else []
    words += ["--repetitions", str(asked.repetitions)] if asked.repetitions else []
    words += ["--peers-python", "PATH"] if asked.peers_python else []
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
