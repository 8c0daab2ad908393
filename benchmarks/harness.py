"""Measuring: each case in a process of its own, repetitions interleaved, medians and ratios from one run.

Two cases measured minutes apart on a busy machine compare the machine with itself. Here every repetition runs every
case once, forwards and backwards in turn, and a ratio is the median of the ratios of each repetition.
Standard library only: peers' interpreters load this module too.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

from benchmarks.report import Missing, Row

ROOT = Path(__file__).resolve().parent.parent
Figures = dict[str, float]


class BenchmarkError(RuntimeError):
    """A case's process failed; says which, and what it wrote."""


@dataclass(frozen=True)
class Options:
    """What the command line asked for. `quick` asks for small sizes: does it run at all?"""

    peers_python: str | None = None
    repetitions: int | None = None
    quick: bool = False

    def repeat(self, default: int) -> int:
        """How many repetitions: what was asked for, else the benchmark's own number (2 with --quick)."""
        return self.repetitions or (min(default, 2) if self.quick else default)


@dataclass(frozen=True)
class Case:
    """One thing to measure: a command for a Python interpreter that prints its figures as a last line of JSON.

    `needs` are the peers' modules it imports; its process runs in an interpreter that has them all.
    """

    name: str
    command: Sequence[str]
    needs: tuple[str, ...] = ()
    stdin: str | None = None


@dataclass(frozen=True)
class Measured:
    """The figures of every case and repetition of one run."""

    figures: Mapping[str, Sequence[Figures]]
    missing: Sequence[Missing] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def median(self, case: str, figure: str) -> float | None:
        """A case's median; None where the case is missing."""
        values = [figures[figure] for figures in self.figures.get(case, ()) if figure in figures]
        return statistics.median(values) if values else None

    def ratio(self, case: str, other: str, figure: str, other_figure: str | None = None) -> float | None:
        """The median over repetitions of case / other, each pair from the same repetition."""
        pairs = zip(self.figures.get(case, ()), self.figures.get(other, ()), strict=False)
        ratios = [a[figure] / b[other_figure or figure] for a, b in pairs if b[other_figure or figure]]
        return statistics.median(ratios) if ratios else None

    def rows(self) -> list[Row]:
        """One row a case: the medians of its figures, and a row for each missing peer."""
        found = [Row(case, {key: self.median(case, key) for key in runs[0]}) for case, runs in self.figures.items()]
        return found + [Row(peer.name, {}, note="missing") for peer in self.missing]


def call(module: str, function: str, **arguments: Any) -> list[str]:
    """The command that runs `benchmarks.<module>.<function>(**arguments)` in a fresh process."""
    return ["-m", "benchmarks.worker", module, function, json.dumps(arguments)]


def measure(cases: Sequence[Case], options: Options, *, repetitions: int = 5, warm_up: bool = False) -> Measured:
    """Run every case once a repetition, in turn, and collect what each printed.

    `warm_up` runs each once before, unmeasured: compiles bytecode, fills the file cache.
    """
    homes = {case.name: interpreter(case.needs, options) for case in cases}
    missing = [Missing(case.name, case.needs) for case in cases if homes[case.name] is None]
    present = [(case, home) for case in cases if (home := homes[case.name]) is not None]
    figures: dict[str, list[Figures]] = {case.name: [] for case, _ in present}
    if warm_up:
        for case, home in present:
            run_case(case, home)
    for repetition in range(options.repeat(repetitions)):
        for case, home in present if repetition % 2 == 0 else reversed(present):
            figures[case.name].append(run_case(case, home))
    return Measured(figures=figures, missing=missing, versions=_versions(present))


def run_case(case: Case, python: str = sys.executable) -> Figures:
    """One process of one case; raises BenchmarkError with its output where it failed."""
    done = subprocess.run(
        [python, *case.command],
        input=case.stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise BenchmarkError(f"case {case.name!r} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    figures: Figures = json.loads(lines[-1])
    return figures


def environment() -> dict[str, str]:
    """This process's environment, with the repository importable and no proxy between a client and the loopback.

    Bytecode is written, as for an installed package; a peer's was when it was installed.
    """
    left_out = {"PYTHONDONTWRITEBYTECODE"}
    kept = {k: v for k, v in os.environ.items() if k not in left_out and not k.lower().endswith("_proxy")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def interpreter(needs: Sequence[str], options: Options) -> str | None:
    """An interpreter that can import all of `needs`: this one, else the peers'; None where neither can."""
    candidates = [sys.executable, *([options.peers_python] if options.peers_python else [])]
    return next((python for python in candidates if not needs or all(_has(python).get(n) for n in needs)), None)


_PROBE = """
import importlib.metadata as m, json
found = {}
for d in m.distributions():
    for top in (d.read_text("top_level.txt") or d.metadata["Name"].replace("-", "_")).split():
        found[top] = d.version
    found[d.metadata["Name"].replace("-", "_").lower()] = d.version
print(json.dumps(found))
"""


@cache
def _has(python: str) -> dict[str, str]:
    """Module or distribution name -> version, of what is installed for an interpreter."""
    done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _versions(present: Sequence[tuple[Case, str]]) -> dict[str, str]:
    return {module: _has(python)[module] for case, python in present for module in case.needs}


@contextmanager
def background(command: Sequence[str], python: str = sys.executable) -> Iterator[str]:
    """A helper process, such as a loopback server, for the time of a block; yields the first line it prints."""
    with subprocess.Popen(
        [python, *command], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


class Clock:
    """CPU and wall time of a block, an exchange; existing objects are not collected by the replay."""

    def __enter__(self) -> Self:
        gc.collect()
        gc.freeze()
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu

    def each(self, n: int) -> dict[str, float]:
        return {"cpu_us": self.cpu / n * 1e6, "us": self.wall / n * 1e6}
