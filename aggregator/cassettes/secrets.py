"""Where a secret may stand in bytes: by the name beside it, by its shape, by its very value.

Pure functions. `secret_edits` is the thorough look; `suspicion.py` has the quick one that every recorded line gets.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import product
from operator import itemgetter
from urllib.parse import parse_qsl, quote, quote_plus, unquote

PLACEHOLDER = "REDACTED"
MARK = PLACEHOLDER.encode()
SHORTEST = 8
"""A shorter value is no secret but a placeholder such as `EMPTY` or `test`, and stands in ordinary text."""
_SHORTEST_SESSION = 12

Edit = tuple[int, int, bytes]
"""From, to, and what stands there instead."""

Needles = tuple[bytes, ...]

_KEYS = ("api", "access", "secret", "private", "subscription", "signing")
_TOKEN_KINDS = ("access", "refresh", "auth", "id", "session", "security", "bearer", "api", "csrf", "oauth")
_WORDS = ("secret", "password", "passwd", "passphrase", "authorization", "credential")
_NAME = rf"(?:(?:{'|'.join(_KEYS)})[_-]?key|(?:{'|'.join(_TOKEN_KINDS)})[_-]?token|{'|'.join(_WORDS)})s?"
_COMPOUNDS = (*((kind, "key") for kind in _KEYS), *((kind, "token") for kind in _TOKEN_KINDS))
_SINGULARS = (*(between.join(words) for words in _COMPOUNDS for between in ("", "_", "-")), *_WORDS)
NAMES = (*_SINGULARS, *(f"{name}s" for name in _SINGULARS))
"""The end of every name that a secret's field may have, in lower case."""
FIELD = re.compile(rf"[\w.-]*?{_NAME}", re.IGNORECASE)
_QUERY_FIELD = re.compile(rf"[\w.-]*?(?:{_NAME}|key|token|sig|signature|auth|pwd)", re.IGNORECASE)
_NUMBER = r"-?\d[\d.eE+-]*"
_PREFIX = r"[\w.\x80-\xff-]*?"
# a text, up to its closing quote or to where the JSON was cut, a number, or a list of both
_PLAIN_FIELDS = re.compile(
    rf'"{_PREFIX}{_NAME}"\s*:\s*(?:"((?:[^"\\]|\\.)++)|({_NUMBER})'
    r'|\[((?:"(?:[^"\\]|\\.)*+(?:"|\Z)|[^"\[\]{}])++)(?=\]|\Z))'.encode(),
    re.IGNORECASE | re.DOTALL,
)
# The same inside a JSON text that is itself a JSON string, at any depth: a quote has k backslashes before it (group 1),
# a backslash of the inner text is k + 1 of them, and so a quote after an even number of those closes it.
_TWO = r"(?:\1\\\1\\)"
_INNER = rf'(?:[^"\\]|\\+(?!["\\])|{_TWO}*+\1\\\1")*+{_TWO}*+'
_ESCAPED_FIELDS = re.compile(
    rf'(?<!\\)(\\+)"{_PREFIX}{_NAME}\1"\s*:\s*(?:\1"(?!\1")({_INNER})|({_NUMBER})'
    rf'|\[((?:\1"{_INNER}\1"|\\+(?!["\\])|[^"\\\[\]{{}}])++)(?=\]|\Z))'.encode(),
    re.IGNORECASE | re.DOTALL,
)
_QUERY = re.compile(
    rf"[?&;#][\w.-]*?(?:{_NAME}|key|token|sig|signature|auth|pwd)=([^&\s\"'\\<>#]+)".encode(), re.IGNORECASE
)
_PASSWORD = re.compile(r"//[^/:]*:([^/]*)@")
_USER_INFO = re.compile(rb"://([^/\s?#\"'\\<>]+)@")
_MIXED = "(?=[A-Za-z0-9_-]{0,80}?[A-Z0-9])"  # words in lower case are the names of CSS classes and packages
_SHAPED = (  # how a token starts, and how it goes on
    ("[spr]k-", _MIXED + "[A-Za-z0-9_-]{17,}"),  # OpenAI, Anthropic, OpenRouter, DeepSeek, LiteLLM
    ("AIza", "[A-Za-z0-9_-]{30,}"),  # Google
    (r"ya29\.", "[A-Za-z0-9_-]{20,}"),
    ("gh[pousr]_", "[A-Za-z0-9]{20,}"),  # GitHub, GitLab
    ("github_pat_", "[A-Za-z0-9_]{20,}"),
    ("glpat-", "[A-Za-z0-9_-]{16,}"),
    ("(?:gsk|hf|r8)_", _MIXED + "[A-Za-z0-9]{20,}"),  # Groq, Hugging Face, Replicate
    ("tgp_v1_", "[A-Za-z0-9_-]{20,}"),
    ("(?:xai|pplx|nvapi)-", _MIXED + "[A-Za-z0-9_-]{20,}"),
    ("A[KS]IA", "[A-Z0-9]{16}"),  # AWS
    ("xox[abeprs]-", "[A-Za-z0-9-]{16,}"),  # Slack
    ("eyJ", r"[A-Za-z0-9_-]{10,2048}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"),  # a signed JSON web token
)
SHAPES = re.compile(  # at the start of a word, or after an escaped line break
    rf"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))(?:{'|'.join(start + rest for start, rest in _SHAPED)})".encode()
)
SHAPE_STARTS = re.compile(rf"[^A-Za-z0-9](?:{'|'.join(start for start, _ in _SHAPED)})".encode())
_TOKENS = re.compile(
    rb'token\\*"\s*:\s*\\*"(?=[^"]*\d)([A-Za-z0-9_.+/=-]{20,})\\*"', re.IGNORECASE
)  # not a logprob's token
_BEARER = re.compile(  # the words basic and token stand in prose too, but before no digits
    rb"(?i:\b(?:bearer {1,32}|(?:basic|token) {1,32}(?=[A-Za-z0-9._~+/=-]*\d)))([A-Za-z0-9._~+/=-]{20,})"
)
_PEM = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----((?:(?!-----BEGIN ).)*?)-----END [A-Z ]*PRIVATE KEY", re.DOTALL
)
_CUT_PEM = re.compile(  # an answer that ended too early
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----(?=(?:\\+[nr]|[\r\n])*[A-Za-z0-9+/=]{20})((?:\\+[nr]|[A-Za-z0-9+/=\r\n])++)"
)


def is_secret_field(name: str) -> bool:
    """Say whether a JSON field of this name holds a secret.

    >>> is_secret_field("openai_api_key"), is_secret_field("max_tokens"), is_secret_field("key")
    (True, False, False)
    """
    return bool(FIELD.fullmatch(name))


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
    found += [(*match.span(), MARK) for match in SHAPES.finditer(data)]
    known = (_BEARER, _PEM, _CUT_PEM, _TOKENS)
    found += [(*match.span(1), MARK) for pattern in known for match in pattern.finditer(data)]
    for needle in needles:
        found += _occurrences(data, needle)
    return _merged(found)


def query_edits(data: bytes) -> list[Edit]:
    """Return what to replace where a text quotes a URL, as error messages do."""
    return _merged((*match.span(1), MARK) for pattern in (_QUERY, _USER_INFO) for match in pattern.finditer(data))


def _field_edits(match: re.Match[bytes], depth: int) -> Iterator[Edit]:
    """Yield the edit of a field's text, number, or list of them; what it leaves is still JSON."""
    text, number, items = (match.span(depth + group) for group in (1, 2, 3))
    if text[1] > text[0]:
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
            rest = rest.strip()
            found |= {rest, *_basic(rest)} if rest and scheme.isalpha() else {value.strip()}
            found |= set(_cookies(value)) if name.lower() == "cookie" else set()
    address, _, query = url.partition("#")[0].partition("?")
    found |= {value for name, value in parse_qsl(query) if _QUERY_FIELD.fullmatch(name)}
    if password := _PASSWORD.search(address):
        found.add(unquote(password[1]))
    return frozenset(value for value in found if len(value) >= SHORTEST and value != PLACEHOLDER)


def _cookies(header: str) -> Iterator[str]:
    """Yield the cookies of a header that look like a session's; a theme or a language is none."""
    for cookie in header.split(";"):
        value = cookie.partition("=")[2].strip()
        if len(value) >= _SHORTEST_SESSION and any(map(str.isdigit, value)):
            yield value


def _basic(value: str) -> tuple[str, ...]:
    """Return the password of a Basic authorization."""
    try:
        return (base64.b64decode(value, validate=True).decode().partition(":")[2],)
    except ValueError:  # no base64, no UTF-8, or not even ASCII
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
        for escaped in (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
            forms |= {escaped.encode(), escaped.replace("/", r"\/").encode()}  # PHP escapes the slash too
        forms.add(raw)
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
