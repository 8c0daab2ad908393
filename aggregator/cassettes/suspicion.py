"""The quick look that all recorded bytes get: whether a secret may stand there at all.

Pure functions. Where they say no, `secret_edits` finds nothing; a test holds it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import product
from operator import itemgetter

from aggregator.cassettes.secrets import FIELD, NAMES, SHAPE_STARTS, SHAPES, Needles

_RUN_LENGTH = 20  # no shape is shorter
_TOKEN_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-+/=%.~")
_RUNS = bytes(ord("a") if byte in _TOKEN_BYTES else ord(" ") for byte in range(256))
_RUN = b"a" * _RUN_LENGTH
_LONGEST_NAME = 64
_LONGEST_SHAPE = 400  # of which more would be looked for in an image
_QUOTE = ord('"')
_AUTHORIZING = (b"bearer", b"basic", b"token")
_LETTER_ESCAPES = re.compile(rb"\\u00[2-7]")
_NAMES = (*NAMES, "token")
# one backslash in a JSON text inside of another, three and more deeper in
_QUOTES = ('"', '\\"', '\\\\"', '\\\\\\"')
_ENDINGS = {"".join(cased) for name in _NAMES for cased in product(*({sign, sign.upper()} for sign in name[-3:]))}
_NAME_ENDINGS = frozenset(f"{ending}{quote}"[-4:].encode() for ending in _ENDINGS for quote in _QUOTES)
_SPACE = re.compile(rb"\s:")
_end, _tail = itemgetter(slice(-4, None)), itemgetter(slice(-12, None))


def has_hidden_text(data: bytes) -> bool:
    r"""Say whether letters are written as JSON escapes (`\u0073` for an s), which the quick look cannot see into."""
    return b"\\" in data and rb"\u00" in data and bool(_LETTER_ESCAPES.search(data))


def suspicious(data: bytes, needles: Needles = ()) -> bool:
    """Say whether a thorough look is due; False is certain but for values written with JSON escapes.

    Every shape and nearly every value is a long run of token characters, of which prose has few; a field's name
    ends before a colon. So a body of prose costs a few microseconds.
    """
    return (
        _has_suspicious_run(data, needles)
        or _has_secret_name(data)
        or _has_odd_needle(data, needles)
        or (b"V" in data and b"PRIVATE KEY" in data)  # one letter is looked for much faster
    )


def _has_suspicious_run(data: bytes, needles: Needles) -> bool:
    runs = data.translate(_RUNS)
    start = runs.find(_RUN)
    while start >= 0:
        end = runs.find(b" ", start)
        end = len(data) if end < 0 else end
        run = data[max(0, start - 1) : end]  # with the byte before it: a backslash makes an n a line break
        if _is_bad_name(run, needles) if len(run) <= _LONGEST_NAME else _is_bad_run(run, needles):
            return True
        if data[start - 1] != _QUOTE and _is_authorizing(data[max(0, start - 40) : start]):
            return True
        start = runs.find(_RUN, end)
    return False


def _is_authorizing(before: bytes) -> bool:
    return before.rstrip(b" ")[-6:].lower().endswith(_AUTHORIZING)


def _is_bad_run(run: bytes, needles: Needles) -> bool:
    return (
        bool(SHAPES.search(run, 0, _LONGEST_SHAPE + 1))
        or (len(run) > _LONGEST_SHAPE and bool(SHAPE_STARTS.search(run)))
        or any(needle in run for needle in needles)
    )


_is_bad_name = lru_cache(maxsize=4096)(_is_bad_run)  # most runs are names of fields, and repeat


def _has_secret_name(data: bytes) -> bool:
    """Narrow the names down: by a few bytes, of which few differ, by some more, by the whole name."""
    pieces = data.split(b":")
    tails = set(map(_tail, pieces))
    ends = set(map(_end, tails))
    if _NAME_ENDINGS.isdisjoint(ends) and not _SPACE.search(b":".join((*ends, b""))):
        return False
    if not any(_may_be_name(tail) for tail in tails if tail[-4:] in _NAME_ENDINGS or tail[-1:].isspace()):
        return False
    return any(_known_name(piece.rstrip()[-64:].rstrip(b'\\"').rpartition(b'"')[2]) for piece in pieces)


@lru_cache(maxsize=4096)
def _may_be_name(tail: bytes) -> bool:
    """Say whether these bytes may end a secret's name, as `access_tokens` does, and `prompt_tokens` does not."""
    shown = tail.rstrip()
    if shown != tail:
        return shown[-1:] in (b'"', b"")
    name = shown.rstrip(b'\\"').rpartition(b'"')[2].lower().decode(errors="replace")
    return any(known.endswith(name) or name.endswith(known) for known in _NAMES)


def _has_odd_needle(data: bytes, needles: Needles) -> bool:
    """Look for values that are short, or hold what no token holds."""
    odd = _odd_ones(needles)
    return bool(odd) and any(needle in data for needle in odd)


@lru_cache(maxsize=256)
def _odd_ones(needles: Needles) -> Needles:
    return tuple(needle for needle in needles if len(needle) < _RUN_LENGTH or not _TOKEN_BYTES.issuperset(needle))


@lru_cache(maxsize=4096)
def _known_name(name: bytes) -> bool:
    text = name.decode(errors="replace")
    return bool(FIELD.fullmatch(text)) or text.lower().endswith("token")
