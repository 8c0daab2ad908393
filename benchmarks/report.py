"""What a benchmark found, as data, as a table and as JSON. Standard library only: peers' interpreters load it too."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One thing that was measured; the same figures in every row of a report make its columns."""

    name: str
    figures: Mapping[str, float | int | str | None]
    note: str = ""


@dataclass(frozen=True)
class Target:
    """A figure that has a goal; `value` None where what it is compared with is missing."""

    what: str
    value: float | None
    limit: float
    unit: str = ""
    at_least: bool = False  # a limit from below, as for "times faster"

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if (self.value >= self.limit if self.at_least else self.value <= self.limit) else "MISSED"


@dataclass(frozen=True)
class Missing:
    """A peer that is not installed: named, never left out in silence."""

    name: str
    modules: tuple[str, ...]

    @property
    def remedy(self) -> str:
        return (
            f"{self.name} was not measured: {', '.join(self.modules)} not installed here; "
            f"`pip install {' '.join(self.modules)}` into an environment and pass its interpreter: --peers-python PATH"
        )


@dataclass(frozen=True)
class Report:
    """All that one benchmark found. `notes` say what a reader must know to believe the figures."""

    rows: Sequence[Row] = ()
    targets: Sequence[Target] = ()
    missing: Sequence[Missing] = ()
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def machine() -> str:
    """One line on where this was measured, with the load it began under."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"{platform.python_implementation()} {platform.python_version()}{load}"
    )


def as_json(name: str, title: str, command: str, where: str, report: Report) -> dict[str, Any]:
    """The report as plain data."""
    return {
        "benchmark": name,
        "title": title,
        "command": command,
        "machine": where,
        "versions": dict(report.versions),
        "rows": [asdict(row) for row in report.rows],
        "targets": [{**asdict(target), "verdict": target.verdict} for target in report.targets],
        "missing": [{**asdict(peer), "remedy": peer.remedy} for peer in report.missing],
        "notes": list(report.notes),
    }


def as_text(name: str, title: str, command: str, where: str, report: Report) -> str:
    """The report as aligned columns for a terminal."""
    lines = [f"{name}: {title}", f"  {where}", f"  {command}", ""]
    columns = list(dict.fromkeys(column for row in report.rows for column in row.figures))
    cells = [["", *columns, ""]] + [
        [row.name, *(show(row.figures.get(column)) for column in columns), row.note] for row in report.rows
    ]
    lines += _aligned(cells)
    if report.targets:
        lines += ["", *_aligned([["target", "measured", "to reach", ""], *map(_target_cells, report.targets)])]
    if report.versions:
        lines += ["", "  " + ", ".join(f"{package} {version}" for package, version in sorted(report.versions.items()))]
    lines += [f"  missing: {peer.remedy}" for peer in report.missing]
    lines += [f"  note: {note}" for note in report.notes]
    return "\n".join(lines)


def show(value: float | str | None) -> str:
    """A figure with three digits that mean something.

    >>> show(1234.5), show(12.345), show(0.0123), show(None), show(7)
    ('1,234', '12.3', '0.0123', '-', '7')
    """
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _target_cells(target: Target) -> list[str]:
    sign = ">=" if target.at_least else "<="
    unit = f" {target.unit}" if target.unit else ""
    measured = show(target.value) + (unit if target.value is not None else "")
    return [target.what, measured, f"{sign} {show(target.limit)}{unit}", target.verdict]


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """First column left, figures right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
