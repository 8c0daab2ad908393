"""Lenient typed decoding.

Valid fields are read, invalid ones dropped, and only a body that is not a JSON object fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from aggregator.errors import DecodeError

T = TypeVar("T")

REFUSED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""The exceptions of msgspec for a body of the wrong shape, and for invalid JSON."""

MOST_TOKENS = 10**8
"""A hundred times the largest context: a server's figure beyond it is not believed."""

_MAX_REPAIRS = 32
_PATH = re.compile(r"at `\$(.*)`$")
_STEP = re.compile(r"\.([^.\[]+)|(\[[^\]]*\])")


def read(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode a JSON object into the decoder's struct; raises DecodeError for anything else.

    The fast path is msgspec's. Only a body that it refuses (a field of another type, NaN, a lone surrogate, a byte
    order mark) needs the slow one.
    """
    try:
        return decoder.decode(body)
    except REFUSED:
        return fit(parse(body), decoder.type)


def parse(body: bytes) -> Any:
    r"""Parse JSON as leniently as the standard library can; raises DecodeError.

    >>> parse(b'\xef\xbb\xbf {"a": NaN}')
    {'a': nan}
    """
    text = body.decode("utf-8-sig", errors="replace")
    try:
        return _paired(json.loads(text, strict=False))
    except (ValueError, RecursionError):
        raise DecodeError(f"Expected a JSON body, got {excerpt(text)}") from None


def _paired(value: Any) -> Any:
    """Replace lone surrogates, which some servers split a character into, and which no UTF-8 text can hold."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_paired(item) for item in value]
    if isinstance(value, dict):
        return {_paired(name): _paired(item) for name, item in value.items()}
    return value


def fit(data: Any, kind: type[T]) -> T:
    """Convert parsed JSON to a struct, dropping invalid fields; raises DecodeError.

    >>> class Answer(msgspec.Struct):
    ...     id: str | None = None
    ...     total: int | None = None
    >>> fit({"id": 7, "total": "12"}, Answer)
    Answer(id=None, total=12)
    """
    for _ in range(_MAX_REPAIRS):
        try:
            return msgspec.json.decode(msgspec.json.encode(data), type=kind, strict=False)
        except msgspec.ValidationError as error:
            found = _PATH.search(str(error))
            steps = [name or index for name, index in _STEP.findall(found.group(1))] if found else []
            if not steps or not isinstance(data, dict):
                break
            _drop(data, steps)
    raise DecodeError(f"Expected a JSON object, got {excerpt(json.dumps(data, default=str))}")


def _drop(node: Any, steps: list[str]) -> None:
    """Remove the value at a path; `[...]` is every element, because msgspec does not name which."""
    head, *rest = steps
    if head.startswith("["):
        if not isinstance(node, list):
            return
        if not rest:
            node[:] = [item for item in node if isinstance(item, dict)]
        for item in node if rest else ():
            _drop(item, rest)
    elif isinstance(node, dict):
        if rest:
            _drop(node.get(head), rest)
        else:
            node.pop(head, None)


def json_object(text: Any) -> dict[str, Any]:
    """Return the arguments of a tool call to be sent back to a model, as an object.

    Some models write invalid or truncated JSON; an API that requires an object gets the text within one.

    >>> json_object('{"city": "Bern"}'), json_object('{"city": "Be')
    ({'city': 'Bern'}, {'invalid_json': '{"city": "Be'})
    """
    if isinstance(text, Mapping):
        return dict(text)
    try:
        value = msgspec.json.decode(text) if text else {}
    except (*REFUSED, TypeError):
        value = None
    return value if isinstance(value, dict) else {"invalid_json": text}


def raw_text(value: bytes | msgspec.Raw) -> str:
    r"""Return a wire value as its own JSON text, or a string (from a gateway, or cut in a stream) as its content.

    >>> raw_text(b'{"x": 1}'), raw_text(b'"{\\"x\\""'), raw_text(b"null")
    ('{"x": 1}', '{"x"', '{}')
    """
    text = bytes(value).decode("utf-8", errors="replace")
    if not text.startswith('"'):
        return "{}" if text in ("", "null") else text
    try:
        return str(msgspec.json.decode(text))
    except REFUSED:
        return text


def as_raw(text: str) -> msgspec.Raw | str:
    """Return a text that is JSON as raw JSON; any other text, for example a truncated one, unchanged."""
    try:
        msgspec.json.decode(text)
    except REFUSED:
        return text
    return msgspec.Raw(text.encode())


def with_rest(answered: int | None, given: int | None, total: int | None) -> int | None:
    """Return the output tokens plus the part of a total beyond input and output: thinking, as xAI counts it.

    An absurd total is ignored.

    >>> with_rest(9, 32, 135), with_rest(9, 32, 41), with_rest(9, None, 135)
    (103, 9, 9)
    """
    if given is None or answered is None or total is None or total > MOST_TOKENS:
        return answered
    return max(answered, total - given)


def excerpt(body: str | bytes, limit: int = 200) -> str:
    """Return the start of a body for an error message.

    >>> excerpt(b" ")
    'nothing'
    """
    text = (body if isinstance(body, str) else body.decode("utf-8", errors="replace")).strip()
    if not text:
        return "nothing"
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}… ({len(text)} characters)"


_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss, unparsed
)
_CLOSE = "</think>"
_FRAME = re.compile(r"<\|(?:end|start|return)\|>(?:assistant)?")


def may_think(content: str) -> bool:
    """Return True for content that may hold thinking: a quick check that nearly every answer fails."""
    return "<" in content or content.lstrip().startswith("[")


def split_thinking(content: str) -> tuple[str, str]:
    r"""Split an answer into (text, reasoning); an answer cut while thinking has no text.

    The opening tag may be part of the prompt, so that only the closing one is in the answer (R1, Qwen3).

    >>> split_thinking("<think>two and two</think>\n\n4"), split_thinking("two and two</think>\n\n4")
    (('4', 'two and two'), ('4', 'two and two'))
    """
    start = content.lstrip()
    for opening, closing in _TAGS:
        if start.startswith(opening):
            reasoning, _, text = start[len(opening) :].partition(closing)
            return _FRAME.sub("", text).lstrip(), _FRAME.sub("", reasoning).strip()
    before, closed, after = content.partition(_CLOSE)
    return (after.lstrip(), before.strip()) if closed else (content, "")


class ThinkingFilter:
    """The same for a stream: `feed` returns the text alone, and holds back a possible tag.

    Thinking without an opening tag is recognised only at its end; in the whole answer it is separate.
    """

    def __init__(self) -> None:
        self._held = ""
        self._state = "start"
        self._closing = ""

    def feed(self, delta: str) -> str:
        """Feed the next delta and return the part that is known to be text."""
        if self._state == "text":
            return delta
        self._held += delta
        if self._state == "start":
            start = self._held.lstrip()
            tag = next((tag for tag in _TAGS if start.startswith(tag[0])), None)
            if tag is None and any(opening.startswith(start) for opening, _ in _TAGS):
                return ""
            if tag is None:
                return self.flush()
            self._state, self._closing, self._held = "thinking", tag[1], start[len(tag[0]) :]
        if self._state == "thinking":
            _, closed, rest = self._held.partition(self._closing)
            if not closed:
                return ""
            self._state, self._held = "after", rest
        self._held = self._held.lstrip()
        return self.flush() if self._held else ""

    def flush(self) -> str:
        """Return the held-back text once it is known to be text, at the latest when the stream ends."""
        if self._state == "thinking":
            return ""
        held, self._held, self._state = self._held, "", "text"
        return held
