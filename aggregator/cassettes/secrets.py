"""Where a secret may stand in bytes: by the name beside it, by its shape, by its very value.

Pure functions. `suspicious` is the quick look that every recorded line gets; `secret_edits` the thorough one.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

PLACEHOLDER = "REDACTED"
MARK = PLACEHOLDER.encode()
SHORTEST = 8
"""A shorter value is no secret but a placeholder such as `EMPTY` or `test`, and stands in ordinary text."""

Edit = tuple[int, int, bytes]
"""From, to, and what stands there instead."""

Needles = tuple[bytes, ...]

_NAME = (
    r"(?:api[_-]?key|access[_-]?key|secret[_-]?key|private[_-]?key|subscription[_-]?key|signing[_-]?key"
    r"|(?:access|refresh|auth|id|session|security|bearer|api|csrf|oauth)[_-]?token"
    r"|secret|client[_-]?secret|password|passwd|passphrase|(?:proxy[_-]?)?authorization|credential)s?"
)
_FIELD = re.compile(rf"[\w.-]*?{_NAME}", re.IGNORECASE)
_QUERY_FIELD = re.compile(rf"[\w.-]*?(?:{_NAME}|key|token|sig|signature|auth|pwd)", re.IGNORECASE)
_NUMBER = r"-?\d[\d.eE+-]*"
_PLAIN_FIELDS = re.compile(
    rf'"[\w.-]*?{_NAME}"\s*:\s*(?:"((?:[^"\\]|\\.)+)"|({_NUMBER})|\[([^\]\[{{}}]+)\])'.encode(), re.IGNORECASE
)
_ESCAPED_FIELDS = re.compile(  # the same inside a JSON text that is itself a JSON string, at any depth
    rf'(\\+)"[\w.-]*?{_NAME}\1"\s*:\s*(?:\1"(?!\1")(.+?)(?<!\\)\1"|({_NUMBER})|\[([^\]\[{{}}]+)\])'.encode(),
    re.IGNORECASE | re.DOTALL,
)
_QUERY = re.compile(
    rf"[?&;][\w.-]*?(?:{_NAME}|key|token|sig|signature|auth|pwd)=([^&\s\"'\\<>#]+)".encode(), re.IGNORECASE
)
_SHAPES = re.compile(
    rb"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))(?:"  # at the start of a word, or after an escaped line break
    rb"(?:sk|pk|rk)-[A-Za-z0-9_-]{17,}"  # OpenAI, Anthropic, OpenRouter, DeepSeek, LiteLLM
    rb"|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}"  # Google
    rb"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}"  # GitHub, GitLab
    rb"|(?:gsk|hf|r8|tgp_v1)_[A-Za-z0-9_-]{20,}|(?:xai|pplx|nvapi)-[A-Za-z0-9_-]{20,}"  # Groq, Hugging Face, ...
    rb"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    rb"|xox[abeprs]-[A-Za-z0-9-]{16,}"  # Slack
    rb"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*)"  # a signed JSON web token
)
_TOKENS = re.compile(
    rb'token\\*"\s*:\s*\\*"(?=[^"]*\d)([A-Za-z0-9_.+/=-]{20,})\\*"', re.IGNORECASE
)  # not a logprob's token
_LETTER_ESCAPES = re.compile(rb"\\u00[2-7]")
_BEARER = re.compile(rb"(?i:\b(?:bearer|basic|token)) +([A-Za-z0-9._~+/=-]{20,})")
_PEM = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----(.*?)-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL)

_RUN_LENGTH = 20  # no shape above is shorter
_TOKEN_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-+/=%.")
_RUNS = bytes(ord("a") if byte in _TOKEN_BYTES else ord(" ") for byte in range(256))
_RUN = b"a" * _RUN_LENGTH
_LONGEST_NAME = 64
_QUOTE = ord('"')
_AUTHORIZING = re.compile(rb"(?:(?i:bearer|basic|token) +|KEY-----(?:\\+n|\s)*)$")
# the last four bytes of every name above and its quote, in lower case; with one backslash in a JSON text inside of
# another, with three deeper in
_ENDINGS = ("key", "eys", "ken", "ion", "ret", "ets", "ord", "rds", "swd", "ase", "ial", "als")
_NAME_ENDINGS = frozenset(f"{ending}{quote}"[-4:].encode() for ending in _ENDINGS for quote in ('"', '\\"', '\\\\\\"'))


def has_hidden_text(data: bytes) -> bool:
    r"""Say whether letters are written as JSON escapes (`\u0073` for an s), which the quick look cannot see into."""
    return b"\\" in data and rb"\u00" in data and bool(_LETTER_ESCAPES.search(data))


def suspicious(data: bytes, needles: Needles = ()) -> bool:
    """Say whether a thorough look is due; False is certain but for values written with JSON escapes.

    Every shape and nearly every value is a long run of token characters, of which prose has few; a field's name
    ends before a colon. So a body of prose costs a few microseconds.
    """
    return _has_suspicious_run(data, needles) or _has_secret_name(data) or _has_odd_needle(data, needles)


def _has_suspicious_run(data: bytes, needles: Needles) -> bool:
    runs = data.translate(_RUNS)
    start = runs.find(_RUN)
    while start >= 0:
        end = runs.find(b" ", start)
        end = len(data) if end < 0 else end
        run = data[max(0, start - 1) : end]  # with the byte before it: a backslash makes an n a line break
        if _is_bad_name(run, needles) if len(run) <= _LONGEST_NAME else _is_bad_run(run, needles):
            return True
        if data[start - 1] != _QUOTE and _AUTHORIZING.search(data, max(0, start - 16), start):
            return True
        start = runs.find(_RUN, end)
    return False


def _is_bad_run(run: bytes, needles: Needles) -> bool:
    return bool(_SHAPES.search(run, 0, 401)) or any(needle in run for needle in needles)


_is_bad_name = lru_cache(maxsize=4096)(_is_bad_run)  # most runs are names of fields, and repeat


def _has_secret_name(data: bytes) -> bool:
    pieces = data.split(b":")
    if not any(map(_may_end_name, {piece[-5:] for piece in pieces})):
        return False
    return any(_known_name(piece.rstrip()[-64:].rstrip(b'\\"').rpartition(b'"')[2]) for piece in pieces)


@lru_cache(maxsize=4096)  # the fields of answers repeat
def _may_end_name(tail: bytes) -> bool:
    """Say whether the last five bytes before a colon may end a secret's name; behind white space they do not tell."""
    shown = tail.rstrip()
    if shown != tail:
        return shown[-1:] in (b'"', b"")
    return tail[-4:].lower() in _NAME_ENDINGS


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
    return bool(_FIELD.fullmatch(text)) or text.lower().endswith("token")


def is_secret_field(name: str) -> bool:
    """Say whether a JSON field of this name holds a secret.

    >>> is_secret_field("openai_api_key"), is_secret_field("max_tokens"), is_secret_field("key")
    (True, False, False)
    """
    return bool(_FIELD.fullmatch(name))


def is_secret_parameter(name: str) -> bool:
    """Say whether a query parameter or form field of this name holds a secret.

    >>> is_secret_parameter("key"), is_secret_parameter("alt")
    (True, False)
    """
    return bool(_QUERY_FIELD.fullmatch(name))


def secret_edits(data: bytes, needles: Needles = ()) -> list[Edit]:
    """Return what to replace, in order and without overlap. The names and quotes of fields stay.

    >>> secret_edits(b'{"api_key": "abc", "max_tokens": 5}')
    [(13, 16, b'REDACTED')]
    """
    found = [
        edit
        for pattern, depth in ((_PLAIN_FIELDS, 0), (_ESCAPED_FIELDS, 1))
        for match in pattern.finditer(data)
        for edit in _field_edits(match, depth)
    ]
    found += [(*match.span(), MARK) for match in _SHAPES.finditer(data)]
    found += [(*match.span(1), MARK) for pattern in (_BEARER, _PEM, _TOKENS) for match in pattern.finditer(data)]
    for needle in needles:
        found += _occurrences(data, needle)
    return _merged(found)


def query_edits(data: bytes) -> list[Edit]:
    """Return what to replace where a text quotes a URL, as error messages do."""
    return [(*match.span(1), MARK) for match in _QUERY.finditer(data)]


def _field_edits(match: re.Match[bytes], depth: int) -> Iterator[Edit]:
    """Yield the edit of a field's text, number, or list of them; what it leaves is still JSON."""
    text, number, items = (match.span(depth + group) for group in (1, 2, 3))
    if text[0] >= 0:
        yield (*text, MARK)
    elif number[0] >= 0:
        yield (*number, b"0")
    elif items[0] >= 0:
        quotation = (match[1] if depth else b"") + b'"'
        yield (*items, quotation + MARK + quotation)


def _occurrences(data: bytes, needle: bytes) -> Iterator[Edit]:
    start = data.find(needle)
    while start >= 0:
        yield start, start + len(needle), MARK
        start = data.find(needle, start + len(needle))


def _merged(edits: Iterable[Edit]) -> list[Edit]:
    """Join edits that overlap; the wider one says what stands there."""
    merged: list[Edit] = []
    for start, end, text in sorted(edits, key=lambda edit: (edit[0], -edit[1])):
        if merged and start < merged[-1][1]:
            first, last, kept = merged[-1]
            merged[-1] = (first, max(end, last), kept)
        else:
            merged.append((start, end, text))
    return merged


def apply_edits(data: bytes, edits: Iterable[Edit]) -> bytes:
    """Replace what the edits name.

    >>> apply_edits(b"abcdef", [(1, 3, b"-"), (5, 6, b"!!")])
    b'a-de!!'
    """
    parts, done = [], 0
    for start, end, text in edits:
        parts += [data[done:start], text]
        done = end
    return b"".join((*parts, data[done:]))


def moved(border: int, edits: Iterable[Edit]) -> int:
    """Return where a position stands after the edits; one inside of an edit moves to its end.

    >>> [moved(border, [(2, 6, b"xx")]) for border in (1, 4, 6, 8)]
    [1, 4, 4, 6]
    """
    shift = 0
    for start, end, text in edits:
        if border <= start:
            break
        shift += len(text) - (min(end, border) - start)
    return border + shift


def authenticating_values(url: str, headers: Mapping[str, str], secrets: Iterable[str]) -> frozenset[str]:
    """Return what authenticates a request: the declared secrets, and what its headers and URL carry."""
    found = set(secrets)
    for name, value in headers.items():
        if _QUERY_FIELD.fullmatch(name) or name.lower() == "cookie":
            scheme, _, rest = value.partition(" ")
            found |= {rest, *_basic(rest)} if rest and scheme.isalpha() else {value}
    parts = urlsplit(url)
    found |= {value for name, value in parse_qsl(parts.query) if _QUERY_FIELD.fullmatch(name)}
    if parts.password:
        found.add(unquote(parts.password))
    return frozenset(value for value in found if len(value) >= SHORTEST and value != PLACEHOLDER)


def _basic(value: str) -> tuple[str, ...]:
    """Return the password of a Basic authorization."""
    try:
        return (base64.b64decode(value, validate=True).decode().partition(":")[2],)
    except (binascii.Error, UnicodeDecodeError):
        return ()


@lru_cache(maxsize=256)
def needles_of(values: frozenset[str]) -> Needles:
    """Return every form in which these values are looked for, the longest first.

    >>> [needle for needle in needles_of(frozenset({"pass word"})) if b"%" in needle or b"+" in needle]
    [b'pass%20word', b'pass+word']
    """
    forms: set[bytes] = set()
    for value in values:
        raw = value.encode()
        forms |= {raw, json.dumps(value)[1:-1].encode(), json.dumps(value, ensure_ascii=False)[1:-1].encode()}
        for encoded in (quote(value, safe=""), quote(value), quote_plus(value)):
            forms |= {encoded.encode(), re.sub("%..", lambda match: match[0].lower(), encoded).encode()}
        forms |= set(_base64_forms(raw))
    return tuple(sorted(forms, key=lambda form: (-len(form), form)))


def _base64_forms(raw: bytes) -> Iterator[bytes]:
    """Yield the part of the base64 text that depends on the value alone, for each position it may start at."""
    for offset, skipped in ((0, 0), (1, 2), (2, 3)):
        text = base64.b64encode(bytes(offset) + raw)[skipped : (offset + len(raw)) * 8 // 6]
        if len(text) >= SHORTEST:
            yield text
            yield text.translate(bytes.maketrans(b"+/", b"-_"))
