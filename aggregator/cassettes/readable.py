"""The readable layout: what is committed and reviewed.

Bodies stand unescaped in block literals, byte for byte; what a literal cannot hold exactly (control
characters, carriage returns) stands in double quotes, and what is no UTF-8 as `!!binary`. Our facts are JSON
in one text under `x`: a mapping would cost stock vcrpy, which skips it, a third of its loading time.
Pure functions; stock vcrpy reads the result.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping

import msgspec

from aggregator.cassettes.exchanges import NOT_YAML, Exchange, line_hash

# characters a literal cannot hold, or would not give back exactly
_NOT_LITERAL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_PLAIN_URL = re.compile(r"https?://[A-Za-z0-9][A-Za-z0-9._~/?&=%+-]*(?::\d+)?[A-Za-z0-9._~/?&=%+-]*")
_PLAIN_NAME = re.compile(r"[a-z][a-z0-9]*-[a-z0-9-]*[a-z0-9]|accept|date")


def render_exchange(exchange: Exchange, line: bytes | memoryview) -> str:
    """Return the exchange as a block item; `line` is the same in a journal, whose hash it keeps."""
    request, reply = exchange.request, exchange.reply
    facts = escaped(msgspec.json.encode(exchange.facts).decode()[:-1]).replace("'", "''")
    return "".join(
        (
            f"- request:\n    method: {quoted(request.method)}\n",
            f"    uri: {request.url if _PLAIN_URL.fullmatch(request.url) else quoted(request.url)}\n",
            _headers(request.headers),
            f"    body: {scalar(request.body, 6)}",
            f"  response:\n    status:\n      code: {reply.status}\n      message: {quoted(reply.reason)}\n",
            _headers(reply.headers),
            f"    body:\n      string: {scalar(reply.body, 8)}",
            f'  x: \'{facts},"sha256":"{line_hash(line)}"}}\'\n',
        )
    )


def _headers(headers: Mapping[str, str]) -> str:
    if not headers:
        return "    headers: {}\n"
    lines = [
        f"      {name if _PLAIN_NAME.fullmatch(name) else quoted(name)}:\n      - {quoted(value)}\n"
        for name, value in headers.items()
    ]
    return f"    headers:\n{''.join(lines)}"


def quoted(text: str) -> str:
    r"""Return a text in double quotes, as JSON and YAML both read it.

    >>> print(quoted('a "b"'))
    "a \"b\""
    """
    return escaped(msgspec.json.encode(text).decode())


def escaped(json: str) -> str:
    """Return JSON with escapes for what PyYAML does not take as it is."""
    return NOT_YAML.sub(lambda match: f"\\u{ord(match[0]):04x}", json)


def scalar(body: bytes, indent: int) -> str:
    """Return a body as the value of a key, line break included.

    >>> print(scalar(b'{"a": 1}', 2), end="")
    |-
      {"a": 1}
    """
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return f'!!binary "{base64.b64encode(body).decode()}"\n'
    if not text.strip() or _NOT_LITERAL.search(text):
        return f"{quoted(text)}\n"
    content = text.rstrip("\n")
    breaks = len(text) - len(content)
    if content != content.rstrip(" \t\n") and content.rpartition("\n")[2].strip() == "":
        return f"{quoted(text)}\n"  # ends in a line of blanks, which a literal's end would take for its own
    keep = "-" if breaks == 0 else "" if breaks == 1 else "+"
    # a literal that starts with a blank must say how deep it stands
    depth = "2" if text[0] in " \n\t" else ""
    pad = " " * indent
    lines = "\n".join(pad + line if line else "" for line in content.split("\n"))
    return "".join((f"|{depth}{keep}\n{lines}\n", "\n" * (breaks - 1)))
