"""`aggregator cassette ls | show | stats | diff | check | prune | convert`: look at cassettes, keep them in order."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aggregator.cassettes.inspection import Totals
    from aggregator.cassettes.rows import Recording, Row

CACHE = Path(".pytest_cache")
FAILED = 1
SHOWN = 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and what it can do."""
    parser = subparsers.add_parser("cassette", help="look at cassettes and keep them in order")
    actions = parser.add_subparsers(dest="action", metavar="<action>", required=True)
    _action(actions, "ls", list_cassettes, "what there is")
    stats = _action(actions, "stats", print_stats, "exchanges, tokens, cost and time, by role and model")
    check = _action(actions, "check", check_cassettes, "secrets, damage, hash, age; for CI: exit 1 with what and where")
    prune = _action(actions, "prune", prune_cassettes, "drop exchanges that are no longer wanted")
    for one in (check, prune):
        one.add_argument("--pytest-cache", type=Path, default=CACHE, metavar="DIR", help=f"default: {CACHE}")
    stats.add_argument("--each", action="store_true", help="a table for each cassette")
    check.add_argument("--max-age", type=float, metavar="DAYS", help="exchanges older than this are a problem")
    check.add_argument("--orphans", action="store_true", help="so is what the last pytest run played nothing of")
    prune.add_argument("--unplayed", action="store_true", help="drop what no test of the last pytest run played")
    prune.add_argument(
        "--lineage", metavar="PATTERN", help="drop what was asked in these lineages, as 'train/epoch=1/*'"
    )
    prune.add_argument("--older-than", type=float, metavar="DAYS", help="drop what was recorded before")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be dropped")
    _show_parser(actions)
    diff = actions.add_parser("diff", help="how two cassettes differ; exit 1 where they do")
    diff.add_argument("before", type=Path)
    diff.add_argument("after", type=Path)
    diff.set_defaults(run=print_difference)
    convert = actions.add_parser("convert", help="write a cassette, also vcrpy's, in our format")
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path, nargs="?", help="default: in place")
    convert.add_argument("--layout", choices=("auto", "journal", "readable"), default="auto")
    convert.set_defaults(run=convert_cassette)


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    help: str,  # noqa: A002 - argparse's own word
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=help)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("cassettes")], help="files, folders")
    parser.set_defaults(run=run)
    return parser


def _show_parser(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    show = actions.add_parser("show", help="the exchanges of a cassette, or one of them in full")
    show.add_argument("path", type=Path)
    show.add_argument("number", nargs="?", type=int, help="the exchange to show in full, counted from 0")
    show.add_argument("--lineage", metavar="PATTERN", help="only these, as 'train/epoch=0/*'")
    show.set_defaults(run=show_cassette)


def list_cassettes(options: argparse.Namespace) -> int:
    """Print one line a cassette."""
    from aggregator.cassettes.inspection import find_cassettes, model_of
    from aggregator.cli._columns import columns, count, size

    lines, exchanges = [], 0
    for path in find_cassettes(options.paths):
        recording = _read(path)
        heard = [row.exchange() for row in recording.rows]
        dates = sorted({exchange.facts.at[:10] for exchange in heard if exchange.facts.at})
        models = sorted({model for exchange in heard if (model := model_of(exchange))})
        exchanges += len(heard)
        lines.append(
            [
                str(path),
                f"{len(heard):,}",
                size(recording.size),
                recording.layout if recording.state == "closed" else f"{recording.layout}, {recording.state}",
                " - ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "-",
                ", ".join(models) or "-",
            ]
        )
    head = ["cassette", "exchanges", "size", "layout", "recorded", "models"]
    print("\n".join(columns(head, lines, frozenset({"exchanges", "size"}))))
    print(f"{count(len(lines), 'cassette')}, {count(exchanges, 'exchange')}")
    return 0


def show_cassette(options: argparse.Namespace) -> int:
    """Print one line an exchange, or one exchange in full."""
    from aggregator.cassettes.inspection import model_of, render, usage_of
    from aggregator.cli._columns import columns
    from aggregator.errors import ConfigError

    rows = _read(options.path).rows
    if options.number is not None:
        if not 0 <= options.number < len(rows):
            raise ConfigError(f"expected an exchange from 0 to {len(rows) - 1} of {options.path}, got {options.number}")
        print(render(rows[options.number].exchange()))
        return 0
    lines = []
    for number, row in enumerate(rows):
        if not _in_lineage(row, options.lineage):
            continue
        exchange, usage = row.exchange(), usage_of(row.exchange())
        tokens = [f"{usage[name]:.0f}" if name in usage else "-" for name in ("input_tokens", "output_tokens")]
        answer = str(exchange.reply.status) if exchange.facts.error is None else exchange.facts.error[0]
        place = f"{row.place.lineage or '-'} #{row.place.ticket}.{row.place.attempt}"
        facts = exchange.facts
        lines.append([str(number), place, facts.role, model_of(exchange) or "-", answer, f"{facts.ms:.0f}", *tokens])
    head = ["#", "lineage #ticket.attempt", "role", "model", "status", "ms", "in", "out"]
    print("\n".join(columns(head, lines, frozenset({"#", "ms", "in", "out"}))))
    return 0


def print_stats(options: argparse.Namespace) -> int:
    """Print totals by role and model, of all cassettes or of each."""
    from aggregator.cassettes.inspection import find_cassettes, tally

    paths = find_cassettes(options.paths)
    if options.each:
        for path in paths:
            print(path)
            _print_tally(tally(row.exchange() for row in _read(path).rows))
            print()
    else:
        _print_tally(tally(row.exchange() for path in paths for row in _read(path).rows))
    return 0


def _print_tally(sums: dict[tuple[str, str], Totals]) -> None:
    from aggregator.cassettes.inspection import Totals
    from aggregator.cli._columns import columns, count

    def line(role: str, model: str, totals: Totals) -> list[str]:
        figures = [totals.exchanges, totals.failed, totals.input_tokens, totals.output_tokens]
        cost = f"{totals.cost:.6f}" if totals.cost else "-"
        return [role, model or "-", *(f"{figure:,}" for figure in figures), cost, f"{totals.seconds:.1f}"]

    everything = sum(sums.values(), Totals())
    lines = [line(role, model, totals) for (role, model), totals in sums.items()]
    head = ["role", "model", "exchanges", "failed", "input", "output", "cost USD", "seconds"]
    print("\n".join(columns(head, [*lines, line("all", "", everything)], frozenset(head[2:]))))
    if everything.unknown:
        print(f"{count(everything.unknown, 'exchange')} told no tokens; they are in no sum")


def print_difference(options: argparse.Namespace) -> int:
    """Print how two cassettes differ, like diff: 0 for the same, 1 otherwise."""
    from aggregator.cassettes.inspection import difference

    found = difference(_read(options.before).rows, _read(options.after).rows)
    for sign, exchanges in (("-", found.removed), ("+", found.added)):
        for exchange in exchanges:
            print(f"{sign} {exchange}")
    for exchange, changes in found.changed.items():
        print(f"~ {exchange}")
        print("\n".join(f"    {change}" for change in changes[:SHOWN]))
        if len(changes) > SHOWN:
            print(f"    and {len(changes) - SHOWN} more")
    if found:
        print(f"{len(found.removed)} removed, {len(found.added)} added, {len(found.changed)} changed")
    return FAILED if found else 0


def check_cassettes(options: argparse.Namespace) -> int:
    """Print every problem with where it is; 1 where there is one."""
    import os
    from datetime import UTC, datetime, timedelta

    from aggregator.cassettes.inspection import check, find_cassettes, needles_from, orphans
    from aggregator.cli._columns import count
    from aggregator.errors import CassetteError

    limit = None if options.max_age is None else timedelta(days=options.max_age)
    needles = needles_from(os.environ)
    played = _played(options.pytest_cache) if options.orphans else None
    paths, problems, exchanges = find_cassettes(options.paths), [], 0
    for path in paths:
        try:
            recording = _read(path, redact=False)  # what is really in the file
        except CassetteError as error:
            problems.append(str(error))
            continue
        exchanges += len(recording.rows)
        found = check(recording, needles=needles, now=datetime.now(UTC), max_age=limit)
        if played is not None:
            found += orphans(recording, played.get(path.resolve()))
        problems += [f"{path}: {problem}" for problem in found]
    print("\n".join([*problems, ""]), end="")
    verdict = count(len(problems), "problem") if problems else "good"
    print(f"{count(len(paths), 'cassette')}, {count(exchanges, 'exchange')}: {verdict}")
    return FAILED if problems else 0


def prune_cassettes(options: argparse.Namespace) -> int:
    """Write cassettes anew without what the options name."""
    from datetime import UTC, datetime, timedelta

    from aggregator.cassettes.inspection import exchange_id, find_cassettes, too_old
    from aggregator.cassettes.saving import save
    from aggregator.cli._columns import count
    from aggregator.errors import ConfigError

    if not (options.unplayed or options.lineage or options.older_than is not None):
        raise ConfigError("expected what to drop, got nothing; pass --unplayed, --lineage or --older-than")
    played = _played(options.pytest_cache) if options.unplayed else {}
    limit = None if options.older_than is None else timedelta(days=options.older_than)

    def unwanted(row: Row, unplayed: frozenset[str]) -> bool:
        old = limit is not None and too_old(row.exchange(), datetime.now(UTC), limit) is not None
        named = options.lineage is not None and _in_lineage(row, options.lineage)
        return old or named or exchange_id(row) in unplayed

    for path in find_cassettes(options.paths):
        if options.unplayed and path.resolve() not in played:
            print(f"{path}: no test played it; delete the file, or run its tests")
            continue
        recording = _read(path)
        unplayed = played.get(path.resolve(), frozenset())
        kept = [row for row in recording.rows if not unwanted(row, unplayed)]
        dropped = len(recording.rows) - len(kept)
        if dropped and not options.dry_run:
            save(path, kept, "auto" if recording.layout == "foreign" else recording.layout)
        print(
            f"{path}: {count(dropped, 'exchange')} {'would be ' if options.dry_run else ''}dropped, {len(kept):,} kept"
        )
    return 0


def convert_cassette(options: argparse.Namespace) -> int:
    """Read a cassette of any layout or of vcrpy's, and write it in ours."""
    from aggregator.cassettes.saving import save
    from aggregator.cli._columns import count

    target = options.target or options.source
    rows = _read(options.source).rows
    save(target, rows, options.layout)
    written = _read(target)
    print(f"{target}: {count(len(written.rows), 'exchange')}, {written.layout}")
    return 0


def _read(path: Path, *, redact: bool = True) -> Recording:
    from aggregator.cassettes.reading import read
    from aggregator.errors import ConfigError

    recording = read(path, redact=redact)
    if recording is None:
        raise ConfigError(f"expected a cassette, got {str(path)!r}, which is not there")
    return recording


def _in_lineage(row: Row, pattern: str | None) -> bool:
    from fnmatch import fnmatchcase

    return pattern is None or fnmatchcase(row.place.lineage, pattern)


def _played(cache: Path) -> dict[Path, frozenset[str]]:
    """Return what the last pytest run left unplayed of each cassette that it opened."""
    import json

    from aggregator.errors import ConfigError

    file = cache / "v" / "aggregator" / "cassettes"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"expected the account of a pytest run in {file}, got none; run pytest with the plugin first, "
            "or name its cache: --pytest-cache DIR"
        ) from error
    unplayed: dict[Path, frozenset[str]] = {}
    for test in run.values():
        path, left = Path(test["path"]).resolve(), frozenset(test["unplayed"])
        unplayed[path] = unplayed.get(path, left) & left
    return unplayed
