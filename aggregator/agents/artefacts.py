"""The JSON file that carries trained parameters from training to production: written whole, read strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from threading import get_ident
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.errors import ConfigError, ParameterError
from aggregator.records import Values

FORMAT = "aggregator-parameters"
VERSION = 1


class Artefact(Struct, frozen=True, kw_only=True):
    """Parameter values by name; `types` is for readers, `provenance` says where the values come from."""

    format: str
    version: int
    parameters: Values
    types: Mapping[str, str] = {}
    provenance: dict[str, Any] = {}


def write_artefact(
    path: str | os.PathLike[str],
    values: Values,
    *,
    types: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write values to a JSON file, in folders made for it: a reader finds the old file or the new one, never a part.

    Raises ParameterError where nothing can be written there.
    """
    artefact = Artefact(
        format=FORMAT, version=VERSION, parameters=values, types=types or {}, provenance=dict(provenance or {})
    )
    try:
        text = msgspec.json.format(msgspec.json.encode(artefact), indent=2) + b"\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Expected values and provenance that JSON can carry, got {error}") from None
    target = os.fspath(path)
    temporary = f"{target}.{os.getpid()}.{get_ident()}.tmp"  # whoever else saves here at this moment has its own
    try:
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)  # noqa: PTH103, PTH120 - as below
        with open(temporary, "wb") as file:  # noqa: PTH123 - pathlib would be one more import in production
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)  # noqa: PTH105 - as above
    except OSError as error:
        _remove(temporary)
        raise ParameterError(
            f"Expected a path to save the parameters to, got {error.strerror} - at {target}; "
            "free some space, make the folder writable, or choose another file"
        ) from error
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)  # noqa: PTH108 - as above


def read_artefact(path: str | os.PathLike[str]) -> Artefact:
    """Return the content of a file that `write_artefact` wrote; raises ParameterError and says what to do."""
    remedy = "save the agent again with Module.save"
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - as above
            text = file.read()
    except OSError as error:
        raise ParameterError(f"Expected a file of parameters, got {error.strerror} - at {path}; {remedy}") from error
    try:
        artefact = msgspec.json.decode(text, type=Artefact)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ParameterError(f"Expected a file of parameters, got {error} - at {path}; {remedy}") from error
    if artefact.format != FORMAT:
        raise ParameterError(f"Expected format {FORMAT!r}, got {artefact.format!r} - at {path}; {remedy}")
    if artefact.version > VERSION:
        raise ParameterError(
            f"Expected a file of version {VERSION} at most, got {artefact.version} - at {path}; "
            "upgrade aggregated-update"
        )
    return artefact
