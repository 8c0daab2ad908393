"""Code from files: whether source that was saved or recorded may run in this process.

Sandboxed code runs freely. An operation with `sandbox=None` runs whatever its parameter holds with all rights of the
program, so source that comes from a file needs the user's word:

    code=False    refuse (the default)
    code=True     trust the file
    code="<sha256>", or several    trust these sources; the error that refuses one names its sha256
    code="ask"    show the source on the terminal and ask
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from hashlib import sha256
from typing import Any

from aggregator.agents.code import CodeParameter, plain_source
from aggregator.errors import ConfigError
from aggregator.sandbox.limits import current_place

Code = bool | str | Collection[str]
"""What may run: see above."""

ASK = "ask"


def check_consent(code: Code) -> Code:
    """Return `code=` as it was given; raises ConfigError for anything that is not one of the words above."""
    if isinstance(code, bool) or code == ASK:
        return code
    words: Any = [code] if isinstance(code, str) else code
    if isinstance(words, Collection) and words:
        texts = [word for word in words if isinstance(word, str) and len(word) == 64]
        if len(texts) == len(words) and not set("".join(texts)) - set("0123456789abcdef"):
            return code
    raise ConfigError(f"Expected code=True, False, 'ask', or the sha256 of each source that may run, got {code!r}")


def source_digest(source: str) -> str:
    r"""Return the sha256 of a source, by which it can be named in `code=`.

    >>> source_digest("def f(x):\n    return x\n")[:12]
    '72d3d5b08c2c'
    """
    return sha256(plain_source(source).encode(errors="surrogatepass")).hexdigest()


def unsandboxed_code(parameters: Iterable[Any], values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, source) of those values that are code to be run in this process and not the author's own."""
    return [
        (parameter.name, str(values[parameter.name]))
        for parameter in parameters
        if isinstance(parameter, CodeParameter)
        and parameter.name in values
        and current_place(parameter.place).engine == "here"
        and source_digest(str(values[parameter.name])) != source_digest(parameter.written)
    ]


def require_consent(found: Iterable[tuple[str, str]], code: Code, *, origin: str, permitted: set[str]) -> None:
    """Raise ConfigError unless `code` permits each (name, source); `origin` says where they come from.

    `permitted` holds digests that were permitted before, and takes those that the user permits now.
    """
    if code is True:
        return
    given = set() if code is False or code == ASK else {code} if isinstance(code, str) else set(code)
    for name, source in found:
        digest = source_digest(source)
        if digest in given | permitted:
            continue
        if code == ASK and _asked(name, source, origin):
            permitted.add(digest)
            continue
        raise ConfigError(
            f"Expected code={digest!r}, code=True or code='ask' to run source from {origin} in this process, got "
            f"code={code!r}: {name} has sandbox=None. Read the source first; in a sandbox, the default, it runs freely"
        )


def _asked(name: str, source: str, origin: str) -> bool:
    """Show a source and return True if the user agrees; raises ConfigError without a terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError(
            f"Expected a terminal for code='ask', got none; {name} from {origin} is code={source_digest(source)!r}"
        )
    shown = [line if line.isprintable() else ascii(line)[1:-1] for line in source.splitlines()]  # no escape sequences
    sys.stderr.write(f"{origin} holds code that would run in this process, as {name}:\n\n")
    sys.stderr.write("\n".join([*(f"    {line}" for line in shown), "", "Run it? [y/N] "]))
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
