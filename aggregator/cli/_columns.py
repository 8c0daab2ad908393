"""Aligned columns for a terminal, and figures as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Return a text without what would steer a terminal: a recorded answer may hold anything.

    >>> print(printable("\x1b[2Jhello"))
    \x1b[2Jhello
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def columns(head: Sequence[str], rows: Iterable[Sequence[str]], right: frozenset[str] = frozenset()) -> list[str]:
    """Return the lines of a table; the columns named in `right` are figures.

    >>> columns(["name", "n"], [["a", "1"], ["bb", "10"]], frozenset({"n"}))
    ['name   n', 'a      1', 'bb    10']
    """
    cells = [list(head), *([printable(" ".join(cell.split("\n"))) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(head))]
    aligned = [
        [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, head, strict=True)
        ]
        for row in cells
    ]
    return ["  ".join(row).rstrip() for row in aligned]


def size(amount: int) -> str:
    """Return bytes as people read them.

    >>> size(512), size(4_700), size(46_600_000)
    ('512 B', '4.7 kB', '46.6 MB')
    """
    if amount < 1_000:
        return f"{amount} B"
    return f"{amount / 1e3:.1f} kB" if amount < 1_000_000 else f"{amount / 1e6:.1f} MB"


def count(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> count(1, "exchange"), count(2000, "exchange")
    ('1 exchange', '2,000 exchanges')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
