"""Forms: url-encoded and multipart bodies, and the queries of addresses, without their secret fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from urllib.parse import unquote_plus

from aggregator.cassettes.credentials import PLACEHOLDER, USUAL, Redaction, is_secret_parameter
from aggregator.cassettes.secrets import MARK, Edit

_BOUNDARY = re.compile(r'multipart/[\w.+-]+\s*;.*?boundary="?([^";]+)"?', re.IGNORECASE)
_PART_NAME = re.compile(
    rb'^content-disposition:[^\r\n]*?[;\s]name="?([^"\r\n;]*)"?([^\r\n]*)', re.IGNORECASE | re.MULTILINE
)


def is_form(headers: Mapping[str, str]) -> bool:
    """Return True if a body with these headers is a form of either kind."""
    kind = headers.get("content-type", "").lower()
    return "x-www-form-urlencoded" in kind or kind.startswith("multipart/")


def hides_parameter_always(name: str, policy: Redaction = USUAL) -> bool:
    """Return True if a query or form field of this name loses any value; PHP and Rails write `user[password]`."""
    plain = unquote_plus(name).rstrip("]").replace("[", ".")
    lower = plain.lower()
    return lower in policy.fields or (lower not in policy.kept_fields and is_secret_parameter(plain))


def redact_form(pairs: str, policy: Redaction = USUAL) -> str:
    """Return a form's fields, or a query's parameters, without the secret ones.

    >>> redact_form("client%5Fsecret=abc&user[password]=abc&page=2")
    'client%5Fsecret=REDACTED&user[password]=REDACTED&page=2'
    """
    if "=" not in pairs:
        return pairs
    found = []
    for pair in pairs.split("&"):
        name, mark, value = pair.partition("=")
        found.append(f"{name}={PLACEHOLDER}" if mark and value and hides_parameter_always(name, policy) else pair)
    return "&".join(found)


@lru_cache(maxsize=1024)
def redact_url(url: str, policy: Redaction = USUAL) -> str:
    """Return the URL without secret query values, also in its fragment, and without a password.

    >>> redact_url("https://me:pass@x.example/v1?key=abc&alt=sse#access_token=abc")
    'https://REDACTED@x.example/v1?key=REDACTED&alt=sse#access_token=REDACTED'
    """
    address, hash_mark, fragment = url.partition("#")
    head, mark, query = address.partition("?")
    if "@" in head:
        head = re.sub(r"//[^/]*@", f"//{PLACEHOLDER}@", head)
    return "".join((head, mark, redact_form(query, policy), hash_mark, redact_form(fragment, policy)))


def form_edits(body: bytes, headers: Mapping[str, str], policy: Redaction = USUAL) -> list[Edit]:
    """Return what to replace in a form, url-encoded or in parts; a file is no field.

    >>> form_edits(b"a=1&api_key=abc", {"content-type": "application/x-www-form-urlencoded"})
    [(12, 15, b'REDACTED')]
    """
    kind = headers.get("content-type", "")
    if match := _BOUNDARY.search(kind):
        return [
            (start, end, MARK)
            for name, start, end in _parts(body, match[1].encode())
            if end > start and hides_parameter_always(name, policy)
        ]
    edits, start = [], 0
    for pair in body.split(b"&"):
        name, mark, value = pair.partition(b"=")
        if mark and value and hides_parameter_always(name.decode(errors="replace"), policy):
            edits.append((start + len(name) + 1, start + len(pair), MARK))
        start += len(pair) + 1
    return edits


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield the fields of a multipart body: name, where the value starts and ends. Files are left out."""
    mark = b"--" + boundary
    start = body.find(mark)
    while start >= 0:
        start += len(mark)
        following = body.find(b"\n" + mark, start)
        end = following if following >= 0 else len(body)
        head = re.compile(rb"\r?\n\r?\n").search(body, start, end)
        if head is not None and (named := _PART_NAME.search(body, start, head.start())) and b"filename" not in named[2]:
            stop = end - 1 if body[end - 1 : end] == b"\r" else end
            yield named[1].decode(errors="replace"), head.end(), max(head.end(), stop)
        start = following + 1 if following >= 0 else -1
