"""Finding secrets in bytes, and their replacements: by name, by form, by value. Pure functions.

In this order: edits, the thorough search (`secret_edits`), and the quick search of every recorded text (`suspicious`).
Each search is linear in the data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import product
from operator import itemgetter
from urllib.parse import unquote

from aggregator.cassettes.credentials import (
    FIELD,
    NAMES,
    PARAMETER,
    PLACEHOLDER,
    SHORTEST,
    USUAL,
    Alone,
    Needles,
    Redaction,
    authenticating_values,
    hides_parameter,
    hides_value,
    is_secret_field,
    is_secret_parameter,
    looks_secret,
    needles_of,
)
from aggregator.cassettes.payloads import tool_fields

__all__ = [
    "FIELD",
    "NAMES",
    "PLACEHOLDER",
    "SHORTEST",
    "Needles",
    "apply_edits",
    "authenticating_values",
    "has_hidden_text",
    "is_secret_field",
    "is_secret_parameter",
    "moved",
    "needles_of",
    "query_edits",
    "secret_edits",
    "suspicious",
]

MARK = PLACEHOLDER.encode()
Edit = tuple[int, int, bytes]
"""Start, end, and the replacement."""

_ENDS = (b"key", b"token", b"secret", b"password", b"passwd", b"passphrase", b"authorization", b"credential")
_PARAMETER_ENDS = (*_ENDS, b"sig", b"signature", b"auth", b"pwd")
_LONGEST_NAME = 64


# Edits


# ---- edits of a text


def apply_edits(data: bytes, edits: Iterable[Edit]) -> bytes:
    """Apply the edits.

    >>> apply_edits(b"abcdef", [(1, 3, b"-"), (5, 6, b"!!")])
    b'a-de!!'
    """
    parts, done = [], 0
    for start, end, text in edits:
        parts += [data[done:start], text]
        done = end
    return b"".join((*parts, data[done:]))


def moved(border: int, edits: Iterable[Edit]) -> int:
    """Return the position after the edits; one inside an edit moves to its end.

    >>> [moved(border, [(2, 6, b"xx")]) for border in (1, 4, 6, 8)]
    [1, 4, 4, 6]
    """
    shift = 0
    for start, end, text in edits:
        if border <= start:
            break
        shift += len(text) - (min(end, border) - start)
    return border + shift


def _merged(edits: Iterable[Edit]) -> list[Edit]:
    """Join overlapping edits; the wider one's replacement is kept."""
    merged: list[Edit] = []
    for start, end, text in sorted(edits, key=lambda edit: (edit[0], -edit[1])):
        if merged and start < merged[-1][1]:
            first, last, kept = merged[-1]
            merged[-1] = (first, max(end, last), kept)
        else:
            merged.append((start, end, text))
    return merged


# ---- finding fields, parameters and values


def secret_edits(
    data: bytes, needles: Needles = (), policy: Redaction = USUAL, *, in_tool: bool | None = None
) -> list[Edit]:
    """Return the edits, in order and without overlap. The names and quotes of fields are kept.

    `in_tool` is True for a tool's arguments or result, False for other data; None decides by the JSON of the data.

    >>> secret_edits(b'{"api_key": "abc", "max_tokens": 5}')
    [(13, 16, b'REDACTED')]
    """
    found: list[Edit] = []
    if _has_secret_name(data) or policy.fields:
        found += _field_edits(data, policy, in_tool)
    if _has_secret_parameter(data):
        found += _parameter_edits(data, policy)
    if b"@" in data:
        found += _user_edits(data)
    if _is_xml(data):
        found += _element_edits(data, policy)
    found += _token_edits(data)
    if b"PRIVATE KEY" in data:
        found += [(*match.span(1), MARK) for pattern in (_PEM, _CUT_PEM) for match in pattern.finditer(data)]
    found += [(*match.span(), MARK) for pattern in policy.patterns for match in pattern.finditer(data)]
    if found and policy.kept_patterns:
        kept = [match.span() for pattern in policy.kept_patterns for match in pattern.finditer(data)]
        found = [edit for edit in found if not any(edit[0] < end and edit[1] > start for start, end in kept)]
    for needle in needles:
        found += _occurrences(data, needle)
    return _merged(found)


def has_needle(data: bytes, needles: Needles) -> bool:
    """Return True if one of the secrets is found."""
    return any(next(_occurrences(data, needle), None) for needle in needles if needle in data)


def _occurrences(data: bytes, needle: bytes) -> Iterator[Edit]:
    start = data.find(needle)
    while start >= 0:
        end = start + len(needle)
        if not isinstance(needle, Alone) or (_begins_word(data, start) and not data[end : end + 1].isalnum()):
            yield start, end, MARK
        start = data.find(needle, end)


def _begins_word(data: bytes, start: int) -> bool:
    r"""Return True if no word continues here; `\n`, `%20` and `\u003d` end before it."""
    before = data[max(0, start - 6) : start]
    return not before[-1:].isalnum() or bool(_ESCAPED_BEFORE.search(before))


_ESCAPED_BEFORE = re.compile(rb"(?:\\[nrtbf]|%[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4})\Z")


# By name

# A quote within JSON that is a text of JSON, at any depth, has k backslashes before it (group 1), a backslash of the
# inner text is k + 1 of them, and so a quote after an even number of those closes it.
_TWO = r"(?:\1\\\1\\)"
_INNER = rf'(?:[^"\\]|\\+(?!["\\])|{_TWO}*+\1\\\1")*+{_TWO}*+'
_VALUE = re.compile(rf'(\\*)"\s*:\s*(?:\1"(?!\1")({_INNER})|(-?\d[\d.eE+-]*)|\[)'.encode(), re.DOTALL)
_ITEM = re.compile(rf'(\\*)"({_INNER})|[\[\]{{}}]'.encode(), re.DOTALL)


_SHORT_VALUE = re.compile(rb'"\s*:\s*"[^"\\]{0,19}"')


def _field_edits(data: bytes, policy: Redaction, in_tool: bool | None) -> Iterator[Edit]:
    """Yield the edits of fields; the rest is still JSON, and a truncated value ends with the data."""
    tools: frozenset[tuple[str, str]] | None = None
    for name, match in _fields(data, policy):
        if match[3] is not None:
            if name.lower() in policy.fields:
                yield (*match.span(3), b"0")
            continue
        if match[2] is None:
            yield from _item_edits(data, match, asked_for=name.lower() in policy.fields)
            continue
        raw = match[2]
        value = _unescaped(raw, len(match[1])) if b"\\" in raw else raw.decode(errors="replace")
        if not hides_value(name, value, policy):
            continue
        if in_tool is not False and not hides_value(name, value, policy, in_tool=True):
            tools = tool_fields(data) if tools is None and in_tool is None else tools
            if tools is None or (name, value) in tools:
                continue
        yield (*match.span(2), MARK)


def _item_edits(data: bytes, field: re.Match[bytes], *, asked_for: bool) -> Iterator[Edit]:
    """Yield the texts of a list that look like secrets; one by one, so that the list keeps its length."""
    place = field.end()
    while (item := _ITEM.search(data, place)) is not None and item[2] is not None and item[1] == field[1]:
        if asked_for or looks_secret(_unescaped(item[2], len(item[1]))):
            yield (*item.span(2), MARK)
        place = item.end() + len(item[1]) + 1


def _fields(data: bytes, policy: Redaction) -> Iterator[tuple[str, re.Match[bytes]]]:
    """Yield every field with a secret name's ending, with the match of its value."""
    low = data.lower()
    for word in (*_ENDS, *(name.encode() for name in policy.fields)):
        start = low.find(word)
        while start >= 0:
            end = start + len(word)
            end += low[end : end + 1] == b"s"
            is_field = low[end : end + 1] in (b'"', b"\\")
            if is_field and word == b"token" and low[start - 1 : start] == b'"' and _SHORT_VALUE.match(data, end):
                is_field = False  # of log probabilities, of which there are thousands
            match = _VALUE.match(data, end) if is_field else None
            if match is not None:
                opening = data.rfind(b'"', max(0, start - _LONGEST_NAME), start)
                before = data[max(0, opening - len(match[1]) - 1) : max(0, opening)]
                if opening >= 0 and len(before) - len(before.rstrip(b"\\")) == len(match[1]):
                    yield data[opening + 1 : end].decode(errors="replace"), match
            start = low.find(word, start + 1)


def _unescaped(raw: bytes, backslashes: int) -> str:
    """Return the content of a JSON text whose quotes have this number of backslashes before them."""
    text = raw.decode(errors="replace")
    for _ in range(backslashes.bit_length() + 1):
        try:
            text = json.loads(f'"{text}"', strict=False)
        except ValueError:  # truncated
            break
    return text


def _is_xml(data: bytes) -> bool:
    """Return True for an XML document, alone or joined to other texts; not for markup in a JSON field."""
    return b"<" in data and (
        data[:64].lstrip().startswith(b"<") or b"\n<" in data
    )  # one character is found much faster


_ELEMENT = re.compile(rb"<(?:[\w-]{1,64}:)?([\w.-]{1,64})>([^<>\s]{8,8192})</")


def _element_edits(data: bytes, policy: Redaction) -> Iterator[Edit]:
    """Yield the texts of XML elements with a secret name that look like secrets, such as AWS's `SecretAccessKey`."""
    for match in _ELEMENT.finditer(data):
        name, value = (text.decode(errors="replace") for text in match.groups())
        if name.lower() in policy.fields or (hides_value(name, value, policy) and looks_secret(value)):
            yield (*match.span(2), MARK)


# By parameter

_PAIR = re.compile(rb"=([^&\s\"'\\<>#),;\]}|`]+)")
_PARAMETER_NAME = re.compile(rb"(?:[?&;#]|\\u0026)([\w.%\[\]-]{1,64})\Z")
_USER = re.compile(rb"/\\?/([^/\s?#\"'\\<>@]+(?:@[^/\s?#\"'\\<>@]+)*)@")


def _parameter_edits(data: bytes, policy: Redaction) -> Iterator[Edit]:
    """Yield the values of query parameters within the data, such as in an address in a field."""
    low = data.lower()
    for word in _PARAMETER_ENDS:
        start = low.find(word + b"=")
        while start >= 0:
            end = start + len(word)
            name = _PARAMETER_NAME.search(data, max(0, start - _LONGEST_NAME), end)
            match = _PAIR.match(data, end)
            if name and match and hides_parameter(name[1].decode(), match[1].decode(errors="replace"), policy):
                yield (*match.span(1), MARK)
            start = low.find(word + b"=", end)


def _user_edits(data: bytes) -> Iterator[Edit]:
    """Yield the users and passwords of addresses."""
    for match in _USER.finditer(data):
        user = unquote(match[1].decode(errors="replace"))
        if user.isprintable() and "\ufffd" not in user and looks_secret(user.partition(":")[2] or user):  # no noise
            yield (*match.span(1), MARK)


_QUERY = re.compile(rf"[?&;#]{PARAMETER.pattern}=([^&\s\"'\\<>#]+)".encode(), re.IGNORECASE)
_USER_INFO = re.compile(rb"://([^/\s?#\"'\\<>]+)@")


def query_edits(data: bytes) -> list[Edit]:
    """Return the edits of a short text that quotes an address, such as an error message or a header."""
    return _merged((*match.span(1), MARK) for pattern in (_QUERY, _USER_INFO) for match in pattern.finditer(data))


# By shape

_MIXED = "(?=[A-Za-z0-9_-]{0,80}?[A-Z0-9])"  # words in lower case are names of CSS classes and packages
_SHAPED = (  # how a token starts, and how it continues
    ("[spr]k-", _MIXED + "[A-Za-z0-9_-]{17,}+"),  # OpenAI, Anthropic, OpenRouter, DeepSeek, LiteLLM
    ("AIza", "[A-Za-z0-9_-]{30,}+"),  # Google
    (r"ya29\.", "[A-Za-z0-9_-]{20,}+"),
    ("gh[pousr]_", "[A-Za-z0-9]{20,}+"),  # GitHub, GitLab
    ("github_pat_", "[A-Za-z0-9_]{20,}+"),
    ("glpat-", "[A-Za-z0-9_-]{16,}+"),
    ("(?:gsk|hf|r8)_", _MIXED + "[A-Za-z0-9]{20,}+"),  # Groq, Hugging Face, Replicate
    ("tgp_v1_", "[A-Za-z0-9_-]{20,}+"),
    (
        "(?:[rs]k_(?:live|test)|npm|fw|lsv2_[ps][tk])_",
        _MIXED + "[A-Za-z0-9_]{20,}+",
    ),  # Stripe, npm, Fireworks, LangSmith
    ("(?:tvly|csk)-", _MIXED + "[A-Za-z0-9_-]{20,}+"),  # Tavily, Cerebras
    ("(?:xai|pplx|nvapi)-", _MIXED + "[A-Za-z0-9_-]{20,}+"),
    ("A[KS]IA", "[A-Z0-9]{16}"),  # AWS
    ("xox[abeprs]-", "[A-Za-z0-9-]{16,}+"),  # Slack
    ("ABSKQmVkcm9ja0FQSUtleS|bedrock-api-key-", "[A-Za-z0-9+/]{30,}+={0,2}"),  # Amazon Bedrock
    ("pcsk_|jina_|dckr_pat_", _MIXED + "[A-Za-z0-9_-]{20,}+"),  # Pinecone, Jina, Docker
    ("dapi|dop_v1_|shpat_", "[0-9a-f]{32,}+(?:-[0-9]{1,2})?"),  # Databricks, DigitalOcean, Shopify
    (r"SG\.", r"[A-Za-z0-9_-]{20,24}\.[A-Za-z0-9_-]{40,}+"),  # SendGrid
    ("eyJ", r"[A-Za-z0-9_-]{10,2048}\.[A-Za-z0-9_-]{10,}+\.[A-Za-z0-9_-]*+"),  # a signed JSON web token
)
# A whole token: neither within base64, an address or a longer identifier, nor the beginning of one. It may follow an
# escaped line break, an encoded character, or a sign after a dot.
_BEFORE = rb"(?:(?<![A-Za-z0-9_/.-])|(?<=\\[nrt])|(?<=\\u[0-9A-Fa-f]{4})|(?<=%[0-9A-Fa-f]{2})|(?<=[^A-Za-z0-9]\.))"
_AFTER = rb"(?![A-Za-z0-9_/+-]|[.@][A-Za-z0-9])"
SHAPES = re.compile(_BEFORE + f"(?:{'|'.join(f'(?:{start}){rest}' for start, rest in _SHAPED)})".encode() + _AFTER)
_FIRST = frozenset(b"sprAyghtxneflcbjdS")

_RUN_LENGTH = 20  # no form is shorter
_TOKEN_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-+/=%.~")
_RUNS = bytes(ord("a") if byte in _TOKEN_BYTES else ord(" ") for byte in range(256))
_RUN = b"a" * _RUN_LENGTH
_CREDENTIAL = re.compile(rb"[A-Za-z0-9._~+/=-]{20,}")
_AUTHORIZING = (b"bearer", b"basic", b"token")
_QUOTE, _BACKSLASH = ord('"'), ord("\\")


def _runs(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the start and end of long runs of a token's characters; prose has few."""
    runs = data.translate(_RUNS)
    start = runs.find(_RUN)
    while start >= 0:
        end = runs.find(b" ", start)
        end = len(data) if end < 0 else end
        yield start, end
        start = runs.find(_RUN, end)


# ---- finding tokens by their form


def _token_edits(data: bytes) -> Iterator[Edit]:
    """Yield tokens by their form, and credentials after `Bearer`."""
    for start, end in _runs(data):
        is_short = end - start <= _LONGEST_NAME and data[start - 1] != _BACKSLASH
        places = _known_places(data[start:end]) if is_short else _places(data[start:end], data[start - 1])
        for place in places:
            if match := SHAPES.match(data, start + place):
                yield (*match.span(), MARK)
        if data[start - 1] != _QUOTE and (value := _authorized(data, start)):
            yield (*value.span(), MARK)


def _places(run: bytes, before: int = 0) -> list[int]:
    r"""Return where a token may begin in a run: at its start, after `\n` and `\u2026`, after `=` and `%20`."""
    places = [0, 1, 5] if before == _BACKSLASH else [0]
    is_form = run.find(b"=", 0, -2) >= 0 or b"%" in run
    for mark in (b"=", b"%", b"~", b".", *((b"+",) if is_form else ())):
        place = run.find(mark)
        while place >= 0:
            places += [place + 1, place + 3] if mark == b"%" else [place + 1]
            place = run.find(mark, place + 1)
    return [place for place in places if place < len(run) and run[place] in _FIRST]


_known_places = lru_cache(maxsize=4096)(_places)  # most runs are names and ids, and repeat


def _authorized(data: bytes, start: int) -> re.Match[bytes] | None:
    """Return the credential that begins here after `Bearer`, or one with a digit after `Basic` and `token`."""
    before = data[max(0, start - 40) : start]
    words = before.rstrip(b" ")
    tail = words[-7:].lower()
    word = next((word for word in _AUTHORIZING if tail.endswith(word)), None)
    if word is None or words == before or words[-len(word) - 1 : -len(word)].isalnum():
        return None
    value = _CREDENTIAL.match(data, start)
    return value if value is not None and (word == b"bearer" or any(map(_DIGITS.__contains__, value[0]))) else None


_DIGITS = frozenset(b"0123456789")
_PEM = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----((?:(?!-----BEGIN ).)*?)-----END [A-Z ]*PRIVATE KEY", re.DOTALL
)
_CUT_PEM = re.compile(  # an answer that ended too early
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----(?=(?:\\+[nr]|[\r\n])*[A-Za-z0-9+/=]{20})((?:\\+[nr]|[A-Za-z0-9+/=\r\n])++)"
)


# The quick search

_NAMES = (*NAMES, "token")
# one backslash in a JSON text inside of another, three and more deeper in
_QUOTES = ('"', '\\"', '\\\\"', '\\\\\\"')
_ENDINGS = {"".join(cased) for name in _NAMES for cased in product(*({sign, sign.upper()} for sign in name[-3:]))}
_NAME_ENDINGS = frozenset(f"{ending}{quote}"[-4:].encode() for ending in _ENDINGS for quote in _QUOTES)
_PARAMETER_ENDINGS = frozenset(word[-3:] for end in _PARAMETER_ENDS for word in (end, end + b"s"))
_SPACE = re.compile(rb"\s:")
_end, _tail, _last = itemgetter(slice(-4, None)), itemgetter(slice(-12, None)), itemgetter(slice(-3, None))
_ESCAPE = re.compile(rb"\\u00[2-7][0-9A-Fa-f]")
_ESCAPED = re.compile(rb"[2-7][0-9A-Fa-f]")


# ---- quick searches


def has_hidden_text(data: bytes) -> bool:
    r"""Return True if letters are written as JSON escapes (`\u0073` for an s), which hide the text."""
    return b"\\" in data and rb"\u00" in data and bool(_ESCAPE.search(data))


def unescape(data: bytes) -> bytes:
    r"""Return the data with ASCII escapes decoded, also in JSON within JSON; a quote remains escaped.

    >>> unescape(rb'{"\u0061pi_key": "\u003cb\u003e"}')
    b'{"api_key": "<b>"}'
    """
    while rb"\\u00" in data:
        data = data.replace(rb"\\u00", rb"\u00")
    for code in filter(_ESCAPED.match, {piece[:2] for piece in data.split(rb"\u00")[1:]}):
        escape, sign = rb"\u00" + code, bytes([int(code, 16)])
        data = data.replace(escape, b"\\" + sign if sign in b'"\\' else sign)
    return data


def suspicious(data: bytes, needles: Needles = (), policy: Redaction = USUAL) -> bool:
    """Return True if a thorough search is needed; False is certain except for values written with JSON escapes.

    Nearly every text has no long run of token characters and no field or parameter with a secret name, so a body of
    prose costs a few microseconds.
    """
    return (
        _has_secret_name(data)
        or any(True for _ in _token_edits(data))
        or any(needle in data for needle in needles)
        or _has_secret_parameter(data)
        or (b"@" in data and any(True for _ in _user_edits(data)))
        or (_is_xml(data) and any(True for _ in _element_edits(data, policy)))
        or (b"V" in data and b"PRIVATE KEY" in data)  # one letter is found much faster
        or any(name.encode() in data.lower() for name in policy.fields)
        or any(pattern.search(data) for pattern in policy.patterns)
    )


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
    """Return True if these bytes may end a secret's name, as in `access_tokens`, but not in `prompt_tokens`."""
    shown = tail.rstrip()
    if shown != tail:
        return shown[-1:] in (b'"', b"")
    name = shown.rstrip(b'\\"').rpartition(b'"')[2].lower().decode(errors="replace")
    return any(known.endswith(name) or name.endswith(known) for known in _NAMES)


@lru_cache(maxsize=4096)
def _known_name(name: bytes) -> bool:
    text = name.decode(errors="replace")
    return bool(FIELD.fullmatch(text)) or text.lower().endswith("token")


def _has_secret_parameter(data: bytes) -> bool:
    """Return True if a parameter's name may end before an equals sign."""
    if b"=" not in data:
        return False
    return not _PARAMETER_ENDINGS.isdisjoint([end.lower() for end in set(map(_last, data.split(b"=")))])
