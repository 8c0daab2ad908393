"""`aggregator cassette ls | show | stats | diff | check | prune | accept | convert`: inspect and maintain cassettes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aggregator.cassettes.exchanges import Row
    from aggregator.cli._exchanges import Totals

CACHE = Path(".pytest_cache")
FAILED = 1
SHOWN = 20
DESCRIPTION = "Inspect and maintain cassettes, the files of recorded exchanges (docs/cassettes.md)."
MOST_DAYS = 1_000_000


# ---- arguments


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its subcommands."""
    parser = subparsers.add_parser("cassette", help="inspect and maintain cassettes", description=DESCRIPTION)
    actions = parser.add_subparsers(dest="action", metavar="<action>", required=True)
    _action(actions, "ls", list_cassettes, "list cassettes: exchanges, size, layout, date, models")
    stats = _action(actions, "stats", print_stats, "sum up exchanges, tokens, cost and time by role and model")
    check = _action(actions, "check", check_cassettes, "look for secrets and damage; exit 1 if there are any, for CI")
    prune = _action(
        actions, "prune", prune_cassettes, "delete exchanges by lineage, by age, or because no test played them"
    )
    for one in (check, prune):
        one.add_argument(
            "--pytest-cache",
            type=Path,
            default=CACHE,
            metavar="DIR",
            help=f"pytest's cache, which has what the last run played (default: {CACHE})",
        )
    stats.add_argument("--each", action="store_true", help="print a table for each cassette")
    check.add_argument(
        "--max-age", type=_days, metavar="DAYS", help="also fail for exchanges older than this, or of unknown age"
    )
    check.add_argument(
        "--orphans", action="store_true", help="also fail for cassettes that the last pytest run did not play"
    )
    prune.add_argument("--unplayed", action="store_true", help="delete exchanges that the last pytest run did not play")
    prune.add_argument(
        "--lineage", metavar="PATTERN", help="delete the exchanges of these lineages, such as 'train/epoch=1/*'"
    )
    prune.add_argument(
        "--older-than", type=_days, metavar="DAYS", help="delete exchanges recorded longer ago than this"
    )
    prune.add_argument("--dry-run", action="store_true", help="show what would be deleted, and change nothing")
    show = actions.add_parser("show", help="list the exchanges of a cassette, or print one in full")
    show.add_argument("path", type=Path, help="the cassette")
    show.add_argument("number", nargs="?", type=int, help="the exchange to print in full, counted from 0")
    show.add_argument(
        "--lineage", metavar="PATTERN", help="list only exchanges of these lineages, such as 'train/epoch=0/*'"
    )
    show.set_defaults(run=show_cassette)
    diff = actions.add_parser("diff", help="compare two cassettes; exit 1 if they differ")
    diff.add_argument("before", type=Path, help="the older cassette")
    diff.add_argument("after", type=Path, help="the newer cassette")
    diff.set_defaults(run=print_difference)
    accept = _action(actions, "accept", accept_cassettes, "update the hashes of cassettes that were edited by hand")
    accept.add_argument("--dry-run", action="store_true", help="show what was edited, and change nothing")
    convert = actions.add_parser("convert", help="convert a cassette of vcrpy or another tool to our format")
    convert.add_argument("source", type=Path, help="the cassette to read")
    convert.add_argument("target", type=Path, nargs="?", help="the file to write (default: in place)")
    convert.add_argument(
        "--layout",
        choices=("auto", "journal", "readable"),
        default="auto",
        help="readable: to commit; journal: one line an exchange; auto (default): readable up to 1 MB",
    )
    convert.set_defaults(run=convert_cassette)


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    help: str,  # noqa: A002 - argparse's own word
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    parser.add_argument(
        "paths", nargs="*", type=Path, default=[Path("cassettes")], help="files or folders (default: cassettes)"
    )
    parser.set_defaults(run=run)
    return parser


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not 0 <= days <= MOST_DAYS:
        raise argparse.ArgumentTypeError(f"Expected a number of days from 0 to {MOST_DAYS:,}, got {text!r}")
    return days


# ---- commands


def list_cassettes(options: argparse.Namespace) -> int:
    """Print one line per cassette."""
    from aggregator.cli._exchanges import find_cassettes, model_of, readable
    from aggregator.text import columns, show_count, show_size

    problems: list[str] = []
    lines, exchanges = [], 0
    for path, recording in readable(find_cassettes(options.paths), problems):
        found = [row.exchange() for row in recording.rows]
        dates = sorted({exchange.facts.at[:10] for exchange in found if exchange.facts.at})
        models = sorted({model for exchange in found if (model := model_of(exchange))})
        exchanges += len(found)
        lines.append(
            [
                str(path),
                f"{len(found):,}",
                show_size(recording.size),
                recording.layout if recording.state == "closed" else f"{recording.layout}, {recording.state}",
                " - ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "-",
                ", ".join(models) or "-",
            ]
        )
    head = ["cassette", "exchanges", "size", "layout", "recorded", "models"]
    print("\n".join(columns(head, lines, frozenset({"exchanges", "size"}))))
    print(f"{show_count(len(lines), 'cassette')}, {show_count(exchanges, 'exchange')}")
    return _told(problems)


def show_cassette(options: argparse.Namespace) -> int:
    """Print one line per exchange, or one exchange in full."""
    from aggregator.cli._exchanges import model_of, read_cassette, render, usage_of
    from aggregator.errors import ConfigError
    from aggregator.text import columns, printable

    rows = read_cassette(options.path).rows
    if options.number is not None:
        if not 0 <= options.number < len(rows):
            raise ConfigError(f"Expected an exchange from 0 to {len(rows) - 1} of {options.path}, got {options.number}")
        print(printable(render(rows[options.number].exchange())))
        return 0
    lines = []
    for number, row in enumerate(rows):
        if not _in_lineage(row, options.lineage):
            continue
        exchange, usage = row.exchange(), usage_of(row.exchange())
        tokens = [f"{usage[name]:.0f}" if name in usage else "-" for name in ("input_tokens", "output_tokens")]
        answer = str(exchange.reply.status) if exchange.facts.error is None else exchange.facts.error[0]
        place = f"{row.facts.lineage or '-'} #{row.facts.ticket}.{row.facts.attempt}"
        facts = exchange.facts
        lines.append([str(number), place, facts.role, model_of(exchange) or "-", answer, f"{facts.ms:.0f}", *tokens])
    head = ["#", "lineage #ticket.attempt", "role", "model", "status", "ms", "in", "out"]
    print("\n".join(columns(head, lines, frozenset({"#", "ms", "in", "out"}))))
    return 0


def print_stats(options: argparse.Namespace) -> int:
    """Print totals by role and model, of all cassettes or of each."""
    from aggregator.cli._exchanges import find_cassettes, readable, tally

    problems: list[str] = []
    recordings = readable(find_cassettes(options.paths), problems)
    if options.each:
        for path, recording in recordings:
            print(path)
            _print_tally(tally(row.exchange() for row in recording.rows))
            print()
    else:
        _print_tally(tally(row.exchange() for _, recording in recordings for row in recording.rows))
    return _told(problems)


def _print_tally(sums: dict[tuple[str, str], Totals]) -> None:
    from aggregator.cli._exchanges import Totals
    from aggregator.text import columns, show_count

    def line(role: str, model: str, totals: Totals) -> list[str]:
        figures = [totals.exchanges, totals.failed, totals.input_tokens, totals.output_tokens]
        cost = f"{totals.cost:.6f}" if totals.cost else "-"
        return [role, model or "-", *(f"{figure:,}" for figure in figures), cost, f"{totals.seconds:.1f}"]

    everything = sum(sums.values(), Totals())
    lines = [line(role, model, totals) for (role, model), totals in sums.items()]
    head = ["role", "model", "exchanges", "failed", "input", "output", "cost USD", "seconds"]
    print("\n".join(columns(head, [*lines, line("all", "", everything)], frozenset(head[2:]))))
    if everything.unknown:
        print(f"{show_count(everything.unknown, 'exchange')} without token counts; they are not in the sums")


def print_difference(options: argparse.Namespace) -> int:
    """Print the differences of two cassettes; the exit code is 0 for equal ones and 1 otherwise, like diff's."""
    from aggregator.cli._exchanges import difference, read_cassette
    from aggregator.text import printable

    found = difference(read_cassette(options.before).rows, read_cassette(options.after).rows)
    for sign, exchanges in (("-", found.removed), ("+", found.added)):
        for exchange in exchanges:
            print(printable(f"{sign} {exchange}"))
    for exchange, changes in found.changed.items():
        print(printable(f"~ {exchange}"))
        print(printable("\n".join(f"    {change}" for change in changes[:SHOWN])))
        if len(changes) > SHOWN:
            print(f"    and {len(changes) - SHOWN} more")
    if found:
        print(f"{len(found.removed)} removed, {len(found.added)} added, {len(found.changed)} changed")
    return FAILED if found else 0


def check_cassettes(options: argparse.Namespace) -> int:
    """Print every problem with its place; return 1 if there is any."""
    import os
    from datetime import UTC, datetime, timedelta

    from aggregator.cli._exchanges import (
        check,
        find_cassettes,
        needles_from,
        orphans,
        passed_over,
        played,
        readable,
        suggested_code,
    )
    from aggregator.text import printable, show_count

    limit = None if options.max_age is None else timedelta(days=options.max_age)
    needles = needles_from(os.environ)
    accounts = played(options.pytest_cache) if options.orphans else {}
    problems: list[str] = []
    notes: list[str] = []
    paths, exchanges = find_cassettes(options.paths), 0
    for path, recording in readable(paths, problems, redact=False):  # the real content of the file
        exchanges += len(recording.rows)
        found = check(recording, needles=needles, now=datetime.now(UTC), max_age=limit)
        account = accounts.get(path.resolve())
        if account is not None and not account.complete:
            print(passed_over(path))
        elif options.orphans:
            found += orphans(recording, None if account is None else account.unplayed)
        problems += [f"{path}: {problem}" for problem in found]
        notes += [f"{path}: code sha256 {digest}, {where}" for digest, where in suggested_code(recording).items()]
    if notes:
        print(
            f"Code in recorded suggestions ({show_count(len(notes), 'source')}); it runs in this process, where an "
            "operation"
        )
        print("has sandbox=None, only with cassette(..., code=True), or code= one of these:")
        print(
            printable("\n".join([*notes[:SHOWN], *([f"... {len(notes) - SHOWN} more"] if len(notes) > SHOWN else [])]))
        )
    print(printable("\n".join([*problems, ""])), end="")
    verdict = show_count(len(problems), "problem") if problems else "good"
    print(f"{show_count(len(paths), 'cassette')}, {show_count(exchanges, 'exchange')}: {verdict}")
    return FAILED if problems else 0


def prune_cassettes(options: argparse.Namespace) -> int:
    """Rewrite cassettes without the exchanges that the options select."""
    from datetime import UTC, datetime, timedelta

    from aggregator.cassettes.exchanges import exchange_id
    from aggregator.cli._exchanges import Played, find_cassettes, passed_over, played, too_old
    from aggregator.errors import CassetteError, ConfigError

    if not (options.unplayed or options.lineage or options.older_than is not None):
        raise ConfigError("Expected exchanges to delete, got none; pass --unplayed, --lineage or --older-than")
    accounts = played(options.pytest_cache) if options.unplayed else {}
    limit = None if options.older_than is None else timedelta(days=options.older_than)

    def unwanted(row: Row, unplayed: frozenset[str]) -> bool:
        old = limit is not None and too_old(row.exchange(), datetime.now(UTC), limit) is not None
        named = options.lineage is not None and _in_lineage(row, options.lineage)
        return old or named or exchange_id(row) in unplayed

    problems: list[str] = []
    for path in find_cassettes(options.paths):
        account = accounts.get(path.resolve(), Played(frozenset()))
        if options.unplayed and path.resolve() not in accounts:
            print(f"{path}: no test played it; delete the file, or run its tests")
        elif not account.complete:
            print(passed_over(path))
        else:
            try:
                _prune(path, partial(unwanted, unplayed=account.unplayed), dry_run=options.dry_run)
            except CassetteError as error:  # the others are still pruned
                problems.append(str(error))
    return _told(problems)


def _prune(path: Path, unwanted: Callable[[Row], bool], *, dry_run: bool) -> None:
    """Drop the selected exchanges from one cassette, and print how many."""
    from contextlib import nullcontext

    from aggregator.cassettes.storage import save
    from aggregator.cli._exchanges import read_cassette, rewriting
    from aggregator.text import show_count

    with nullcontext() if dry_run else rewriting(path):
        recording = read_cassette(path)
        kept = [row for row in recording.rows if not unwanted(row)]
        dropped = len(recording.rows) - len(kept)
        if dropped and not dry_run:
            _refuse_json(path, recording.layout)
            save(path, kept, "auto" if recording.layout == "foreign" else recording.layout)
    print(f"{path}: {show_count(dropped, 'exchange')} {'would be ' if dry_run else ''}dropped, {len(kept):,} kept")


def accept_cassettes(options: argparse.Namespace) -> int:
    """Update the hashes of cassettes that were edited by hand."""
    from contextlib import nullcontext

    from aggregator.cassettes.storage import followed, read_edited, save
    from aggregator.cli._exchanges import find_cassettes, rewriting
    from aggregator.errors import CassetteError
    from aggregator.text import show_count

    problems: list[str] = []
    for path in map(followed, find_cassettes(options.paths)):
        try:
            with nullcontext() if options.dry_run else rewriting(path):
                found = read_edited(path)
                if (found.is_edited or not found.is_intact) and not options.dry_run:
                    save(path, found.rows, found.layout)
        except CassetteError as error:  # the others are still accepted
            problems.append(str(error))
            continue
        what = f"{found.changed} changed, {found.added} added, {found.removed} removed"
        same = "as recorded" if found.is_intact else "as recorded, in a file that was edited"
        print(f"{path}: {show_count(len(found.rows), 'exchange')}, {what if found.is_edited else same}")
    return _told(problems)


def convert_cassette(options: argparse.Namespace) -> int:
    """Read a cassette of any layout or of vcrpy's, and write it in ours."""
    from aggregator.cassettes.storage import save
    from aggregator.cli._exchanges import read_cassette, rewriting
    from aggregator.errors import ConfigError
    from aggregator.text import show_count

    target = options.target or options.source
    if target.is_dir():
        raise ConfigError(f"Expected a file to write, got the folder {str(target)!r}; name a file in it")
    given = None if options.source.is_file() else read_cassette(options.source)  # a pipe, or a missing file
    with rewriting(target):
        recording = given or read_cassette(options.source)
        _refuse_json(target, recording.layout)
        save(target, recording.rows, options.layout)
        written = read_cassette(target)
    print(f"{target}: {show_count(len(written.rows), 'exchange')}, {written.layout}")
    return 0


def _refuse_json(target: Path, layout: str) -> None:
    """Raise if JSON, or a compressed file, would become YAML under the same name."""
    from aggregator.cassettes.recorder import UNWRITTEN
    from aggregator.errors import CassetteError

    if target.suffix in UNWRITTEN or (layout == "foreign" and target.suffix == ".json"):
        other = target.with_suffix("").with_suffix(".yaml")
        raise CassetteError(
            f"Expected a target whose name ends in .yaml, as ours is YAML, got {str(target)!r}; "
            f"convert it to another file: aggregator cassette convert {target} {other}"
        )


def _told(problems: list[str]) -> int:
    """Print the problems, and return the exit code."""
    import sys

    from aggregator.text import printable

    for problem in problems:
        print(printable(f"aggregator cassette: {problem}"), file=sys.stderr)
    return FAILED if problems else 0


def _in_lineage(row: Row, pattern: str | None) -> bool:
    from fnmatch import fnmatchcase

    return pattern is None or fnmatchcase(row.facts.lineage, pattern)
