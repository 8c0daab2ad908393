"""What the last pytest run played of each cassette, from the cache that the plugin writes."""

from __future__ import annotations

from pathlib import Path

from msgspec import DecodeError, Struct, ValidationError
from msgspec.json import decode

from aggregator.errors import ConfigError


class Played(Struct, frozen=True):
    """What every test that opened a cassette left; `complete` says that all of these tests ran in whole and passed."""

    unplayed: frozenset[str]
    complete: bool = True


class _Test(Struct, frozen=True):
    path: str
    unplayed: frozenset[str]
    complete: bool = True


def played(cache: Path) -> dict[Path, Played]:
    """Return the account of each cassette that a test opened; raises ConfigError where there is none to read."""
    file = cache / "v" / "aggregator" / "cassettes"
    remedy = "run pytest with the plugin first, or name its cache: --pytest-cache DIR"
    try:
        run = decode(file.read_bytes(), type=dict[str, _Test])
    except FileNotFoundError as error:
        raise ConfigError(f"Expected the account of a pytest run in {file}, got none; {remedy}") from error
    except (DecodeError, ValidationError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"Expected the account of a pytest run in {file}, got {error}; {remedy}") from error
    found: dict[Path, Played] = {}
    for test in run.values():
        path = Path(test.path).resolve()
        before = found.get(path, Played(test.unplayed))
        found[path] = Played(before.unplayed & test.unplayed, before.complete and test.complete)
    return found


def passed_over(path: Path) -> str:
    """Say why nothing is told of a cassette whose account is not complete."""
    return f"{path}: passed over: a test that plays it did not pass or did not run in whole; run its tests again"
