"""Which names and values are secret, and which values authenticate a request. Pure functions over texts."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from urllib.parse import parse_qsl, quote, quote_plus, unquote, unquote_plus

from msgspec import Struct

from aggregator.errors import ConfigError

PLACEHOLDER = "REDACTED"

Needles = tuple[bytes, ...]
"""Authentication values, in every form that is searched for."""


# ---- options


class Redaction(Struct, frozen=True, kw_only=True):
    """The user's additions to the rules and exceptions from them; names are in lower case.

    `fields` are always redacted, `kept_fields` only if their value authenticates or has the shape of a token.
    `patterns` are redacted wherever they match, and matches of `kept_patterns` are not, unless they authenticate.
    `scrubbed` also redacts placeholders under a secret name, so that other tools' scrubbed values match. `headers` are
    written in addition to `redaction.KEPT_HEADERS`; a final `*` matches any ending.
    """

    fields: frozenset[str] = frozenset()
    kept_fields: frozenset[str] = frozenset()
    patterns: tuple[re.Pattern[bytes], ...] = ()
    kept_patterns: tuple[re.Pattern[bytes], ...] = ()
    headers: tuple[str, ...] = ()
    scrubbed: bool = False


USUAL = Redaction()


def redaction_by(
    redact: Sequence[str | re.Pattern[str]] = (),
    keep: Sequence[str | re.Pattern[str]] = (),
    keep_headers: Sequence[str] = (),
) -> Redaction:
    """Return the policy of a cassette's options; raises ConfigError for anything but a name or a pattern.

    >>> redaction_by(["ssn"], keep=["credential"], keep_headers=["X-Trace-*"]).headers
    ('x-trace-*',)
    """
    given = {"redact": redact, "keep": keep, "keep_headers": keep_headers}
    for option, values in given.items():
        kinds = (str,) if option == "keep_headers" else (str, re.Pattern)
        if isinstance(values, str) or not all(isinstance(value, kinds) for value in values):
            raise ConfigError(f"Expected {option} as a list of names or compiled patterns, got {values!r}")
    names = [frozenset(value.lower() for value in values if isinstance(value, str)) for values in given.values()]
    patterns = [
        tuple(re.compile(one.pattern.encode(), one.flags & ~re.UNICODE) for one in values if not isinstance(one, str))
        for values in (redact, keep)
    ]
    return Redaction(
        fields=names[0],
        kept_fields=names[1],
        headers=tuple(sorted(names[2])),
        patterns=patterns[0],
        kept_patterns=patterns[1],
    )


# Names


_KEYS = ("api", "access", "secret", "private", "subscription", "signing")
_TOKEN_KINDS = ("access", "refresh", "auth", "id", "session", "security", "bearer", "api", "csrf", "oauth")
_WORDS = ("secret", "password", "passwd", "passphrase", "authorization", "credential")
_NAME = rf"(?:(?:{'|'.join(_KEYS)})[_-]?key|(?:{'|'.join(_TOKEN_KINDS)})[_-]?token|{'|'.join(_WORDS)})s?"
_COMPOUNDS = (*((kind, "key") for kind in _KEYS), *((kind, "token") for kind in _TOKEN_KINDS))
_SINGULARS = (*(between.join(words) for words in _COMPOUNDS for between in ("", "_", "-")), *_WORDS)
NAMES = (*_SINGULARS, *(f"{name}s" for name in _SINGULARS))
"""The possible endings of a secret field's name, in lower case."""
FIELD = re.compile(rf"[\w.-]*?{_NAME}", re.IGNORECASE)
_WEAK_FIELD = re.compile(r"[\w.-]*(?:s|authorization|credential)", re.IGNORECASE)
PARAMETER = re.compile(rf"[\w.-]*?(?:{_NAME}|key|token|sig|signature|auth|pwd)", re.IGNORECASE)
_PAGING = re.compile(
    r"[\w.-]*?(?:page|next|prev|previous|continuation|sync|start|resume|resumption|cursor|pagination)[_-]?token",
    re.IGNORECASE,
)

_NO_SECRET, _GENERIC, _WEAK, _STRONG, _ASKED_FOR = range(5)
# what a name implies: nothing; long values with a digit are secrets; values that look like secrets are; any text is;
# any text or number is


# ---- names that hold secrets


def is_secret_field(name: str) -> bool:
    """Return True if a JSON field of this name may hold a secret.

    >>> is_secret_field("openai_api_key"), is_secret_field("max_tokens"), is_secret_field("key")
    (True, False, False)
    """
    return bool(FIELD.fullmatch(name))


def is_secret_parameter(name: str) -> bool:
    """Return True if a query parameter or form field of this name holds a secret; page tokens are not secrets.

    >>> is_secret_parameter("key"), is_secret_parameter("alt"), is_secret_parameter("pageToken")
    (True, False, False)
    """
    return bool(PARAMETER.fullmatch(name)) and not _PAGING.fullmatch(name)


@lru_cache(maxsize=4096)
def _kind_of_field(name: str, policy: Redaction) -> int:
    """Return what a JSON field's name implies for its value."""
    lower = name.lower()
    if lower in policy.fields:
        return _ASKED_FOR
    if lower in policy.kept_fields:
        return _NO_SECRET
    if FIELD.fullmatch(name):
        return _WEAK if _WEAK_FIELD.fullmatch(name) else _STRONG
    return _GENERIC if lower.endswith("token") and not _PAGING.fullmatch(name) else _NO_SECRET


def hides_value(name: str, value: str, policy: Redaction = USUAL, *, in_tool: bool = False) -> bool:
    """Return True if the text of a field is a secret, by its name and content.

    In arguments and results of tools, and under names such as `authorization`, only a value that looks like a secret is
    one; under `api_key` and the like any text but a sentence.

    >>> hides_value("api_key", "abc"), hides_value("api_key", "mellon", in_tool=True)
    (True, False)
    >>> hides_value("prior_authorization", "approved"), hides_value("authorization", "a1B2c3D4e5")
    (False, True)
    >>> hides_value("password", "This field is required."), hides_value("password", "correct horse battery staple")
    (False, True)
    """
    kind = _kind_of_field(name, policy)
    if kind == _GENERIC:
        return bool(_TOKEN_VALUE.fullmatch(value))
    if kind == _WEAK or (kind == _STRONG and in_tool):
        return looks_secret(value)
    if kind == _ASKED_FOR or (kind == _STRONG and policy.scrubbed):
        return value != ""
    return kind == _STRONG and not (is_placeholder(value) or _SENTENCE.fullmatch(value))


def hides_parameter(name: str, value: str, policy: Redaction = USUAL) -> bool:
    """Return True if a parameter within a text is a secret; under names such as `key` it must look like one.

    >>> hides_parameter("api_key", "abc"), hides_parameter("key", "cats"), hides_parameter("sig", "a1b2c3d4e5f6")
    (True, False, True)
    """
    name = unquote_plus(name).rstrip("]").replace("[", ".")
    if name.lower() in policy.kept_fields or not is_secret_parameter(name) or is_placeholder(value):
        return name.lower() in policy.fields
    is_sure = FIELD.fullmatch(name) and not _WEAK_FIELD.fullmatch(name)
    return bool(is_sure) or looks_secret(unquote_plus(value))


# Values


SHORTEST = 8
"""A shorter value is not searched for elsewhere, because ordinary text contains it."""
_LONGEST_WORD = 15
_SHORTEST_SESSION = 12
_ALONE_BELOW = 16  # a shorter value is replaced as a whole word only
_PART = re.compile(r"[^\W_]+")
_SIGNS = re.compile(r"[+/=~!@#$%^&*]")  # of base64 and passwords
_FEWEST_SIGNS = 5  # `xxxx-xxxx-0000` has fewer
_ENOUGH = 6  # letters and digits mixed, or digits; `gpt-4o` and a year have fewer
_HUMP = re.compile(r"[A-Z]+[a-z]*|[a-z]+")
_TOKEN_VALUE = re.compile(r"(?=.*\d)[A-Za-z0-9_.+/=-]{20,}")
_SENTENCE = re.compile(r"[A-Z][^\W\d_]*(?: \(?[^\W\d_]+(?:['-][^\W\d_]+)*\)?[,:;]?| \d{1,3}){2,}[.!?]")
_SCRUBBED = re.compile(
    r"(?:(?:bearer|basic|token)\s+)?"
    r"(?:<[^<>]*>|\[[^\[\]]*\]|\{+[^{}]*\}+|\$\{?\w+\}?|%\w+%|[x*.•_-]{3,}"
    r"|[\w*-]*(?:redacted|filtered|scrubbed|masked|censored|obfuscated|sanitized)[\w*-]*|[\w-]+[_-]x{3,}"
    r"|null|none|true|false|string|)",
    re.IGNORECASE,
)


# ---- values that look like secrets


@lru_cache(maxsize=1024)
def is_placeholder(value: str) -> bool:
    """Return True if a value is a placeholder for a secret, also in the form of a cookie.

    >>> [is_placeholder(text) for text in ("Bearer <AUTH_TOKEN>", "a=REDACTED; b=xxx", "AUTHORIZATION-XXX", "hunter2")]
    [True, True, True, False]
    """
    if _SCRUBBED.fullmatch(value):
        return True
    pairs = [part.partition("=") for part in value.split(";") if part.strip()]
    return bool(pairs) and all(mark and _SCRUBBED.fullmatch(text.strip()) for _, mark, text in pairs)


@lru_cache(maxsize=1024)
def looks_secret(value: str) -> bool:
    """Return True if a text looks random, unlike a word, a name or a small number.

    >>> [looks_secret(text) for text in ("anything", "lm-studio", "sk-no-key-required", "approved", "12345678")]
    [False, False, False, False, False]
    >>> [looks_secret(text) for text in ("hunter2-hunter2", "aGVsbG8gd29ybGQ", "0123456789abcdef")]
    [True, True, True]
    """
    if len(value) < SHORTEST or len(set(value)) < _FEWEST_SIGNS or is_placeholder(value):
        return False
    parts = _PART.findall(value)
    mixed = [part for part in parts if not part.isdigit() and any(map(str.isdigit, part))]
    digits = [part for part in parts if part.isdigit() and not _is_regular(part)]
    count, more = sum(map(len, mixed)), sum(map(len, digits))
    if max(count, more) >= _ENOUGH or count + more >= SHORTEST:
        return True
    if _SIGNS.search(value) and any(map(str.isdigit, value)):
        return True
    return any(part.isalpha() and _is_random(part) for part in parts)


def is_worth_finding(value: str) -> bool:
    """Return True if an authentication value is searched for elsewhere: it looks secret, or is long and has a digit.

    >>> [is_worth_finding(text) for text in ("not-needed", "test-key-123", "sk-1234", "1234567890")]
    [False, True, False, False]
    """
    if looks_secret(value):
        return True
    is_long = len(value) >= SHORTEST and len(set(value)) >= _FEWEST_SIGNS and not is_placeholder(value)
    return is_long and any(map(str.isdigit, value)) and not value.isdigit()


def _is_regular(number: str) -> bool:
    return number in "0123456789012345678909876543210" or len(set(number)) == 1


def _is_random(letters: str) -> bool:
    """Return True if a run of letters is neither one word nor several: `OpenAI` has long humps, `aGVsbG` short ones."""
    humps = _HUMP.findall(letters)
    return len(letters) > _LONGEST_WORD or (len(humps) > 1 and len(letters) < 3 * len(humps))


# ---- the values that authenticate a request


@lru_cache(maxsize=1024)
def may_authenticate(header: str) -> bool:
    """Return True if a header of this name may authenticate a request."""
    return bool(PARAMETER.fullmatch(header)) or header.lower() == "cookie"


def authenticating_values(url: str, headers: Mapping[str, str], secrets: Iterable[str]) -> frozenset[str]:
    """Return the authentication values of a request: the declared secrets, and those in its headers and URL."""
    found = set(secrets)
    for name, value in headers.items():
        if may_authenticate(name):
            scheme, _, rest = value.partition(" ")
            rest = rest.strip()
            found |= {rest, *_basic(rest)} if rest and scheme.isalpha() else {value.strip()}
            found |= set(_cookies(value)) if name.lower() == "cookie" else set()
    address, _, query = url.partition("#")[0].partition("?")
    found |= {value for name, value in parse_qsl(query) if is_secret_parameter(name)}
    if password := _PASSWORD.search(address):
        found.add(unquote(password[1]))
    return frozenset(value for value in found if len(value) >= SHORTEST and value != PLACEHOLDER)


_PASSWORD = re.compile(r"//[^/:]*:([^/]*)@")


def _cookies(header: str) -> Iterator[str]:
    """Yield the cookies of a header that look like sessions, not like a theme or a language."""
    for cookie in header.split(";"):
        value = cookie.partition("=")[2].strip()
        if len(value) >= _SHORTEST_SESSION and any(map(str.isdigit, value)):
            yield value


def _basic(value: str) -> tuple[str, ...]:
    """Return the password of a Basic authorization."""
    try:
        return (base64.b64decode(value, validate=True).decode().partition(":")[2],)
    except ValueError:  # not base64, not UTF-8, or not even ASCII
        return ()


class Alone(bytes):
    """A secret that matches whole words only."""


@lru_cache(maxsize=256)
def needles_of(values: frozenset[str]) -> Needles:
    """Return every form of these values to search for, the longest first.

    >>> [needle for needle in needles_of(frozenset({"pass word"})) if b"%" in needle or b"+" in needle]
    [b'pass%20word', b'pass+word']
    """
    forms: set[bytes] = set()
    for value in values:
        raw = value.encode(errors="surrogateescape")
        written = {raw}
        for escaped in (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
            written |= {escaped.encode(), escaped.replace("/", r"\/").encode()}  # PHP escapes the slash too
        for encoded in (quote(value, safe=""), quote(value), quote_plus(value)):
            written |= {encoded.encode(), re.sub("%..", lambda match: match[0].lower(), encoded).encode()}
        forms |= {Alone(form) for form in written} if len(raw) < _ALONE_BELOW else written
        forms |= set(_base64_forms(raw))
    return tuple(sorted(forms, key=lambda form: (-len(form), form)))


def _base64_forms(raw: bytes) -> Iterator[bytes]:
    """Yield the part of the base64 text that depends on the value alone, for each possible alignment."""
    for offset, skipped in ((0, 0), (1, 2), (2, 3)):
        text = base64.b64encode(bytes(offset) + raw)[skipped : (offset + len(raw)) * 8 // 6]
        if len(text) >= SHORTEST:
            yield text
            yield text.translate(bytes.maketrans(b"+/", b"-_"))
