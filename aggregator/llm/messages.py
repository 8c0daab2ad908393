"""Messages as callers write them, converted to OpenAI's shape: text, images, tool results, earlier answers.

An `Opening` is a message with a long beginning that several calls share, such as the proposals of one step. Providers
that cache by marks get one at its end; for all others the request has the same bytes as without.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct

from aggregator.errors import ConfigError
from aggregator.records import Completion, Message, ToolCall
from aggregator.text import show_call

if TYPE_CHECKING:
    pass


SHORTEST = 4096
"""In characters: no provider caches fewer than 1,024 tokens, which are about four characters each."""


class Opening(dict[str, Any]):
    """A message whose first `length` characters are a prefix shared with other calls.

    The length is an attribute, not a key, so that a server without marks gets the same bytes as for a plain message.
    """

    length: int = 0


class Mark(NamedTuple):
    """The end of a prompt's shared prefix: in which message, after how many characters."""

    message: int
    length: int


def find_mark(messages: Sequence[Mapping[str, Any]]) -> Mark | None:
    """Return the end of the shared prefix of a prompt; None without one, or if it is too short to be cached.

    >>> message = Opening(role="user", content="x" * 5000 + "y")
    >>> message.length = 5000
    >>> find_mark([message])
    Mark(message=0, length=5000)
    """
    before = 0
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(message, Opening) and isinstance(content, str) and 0 < message.length < len(content):
            return Mark(index, message.length) if before + message.length >= SHORTEST else None
        before += len(content) if isinstance(content, str) else 0
    return None


def digest(messages: Sequence[Mapping[str, Any]], mark: Mark) -> bytes:
    """Return the digest of a shared prefix, including the messages before it."""
    found = sha256()
    for message in messages[: mark.message]:
        found.update(f"{message.get('role')}\n{message.get('content')}\n".encode(errors="replace"))
    found.update(str(messages[mark.message]["content"])[: mark.length].encode(errors="replace"))
    return found.digest()


ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SIGNATURES = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
)


class Image(Struct, frozen=True):
    """An image in a message: its URL, or its bytes (PNG, JPEG, GIF or WebP; `media_type` names another kind).

    >>> Image("https://example.com/cat.png").url
    'https://example.com/cat.png'
    """

    source: str | bytes
    media_type: str | None = None
    detail: str | None = None

    def __repr__(self) -> str:
        return show_call("Image", self.source, media_type=self.media_type, detail=self.detail)

    @property
    def url(self) -> str:
        """The address, or the bytes as a data: URL."""
        if isinstance(self.source, str):
            return self.source
        kind = self.media_type or _media_type(self.source)
        return f"data:{kind};base64,{b64encode(self.source).decode()}"


class Turn(dict[str, Any]):
    """An answer as a message of OpenAI's shape; `source` is for its own API only, at `origin`.

    They are attributes and not keys, because keys are sent to every server, and strict ones refuse unknown ones.
    """

    source: bytes | None = None
    origin: str | None = None


def normalise(messages: Any) -> tuple[dict[str, Any], ...]:
    """Convert messages to OpenAI's shape; raises ConfigError with the path of an invalid part.

    A text is a user message. A message is a dict, one of our `Message` or `Completion` records, or any object with
    `model_dump` (an SDK's). Content is a text, None, or parts: texts, `Image`s, bytes of an image, or dicts.

    >>> normalise("Hi")
    ({'role': 'user', 'content': 'Hi'},)
    """
    if isinstance(messages, str):
        return ({"role": "user", "content": messages},)
    if type(messages) is list and messages:  # nearly always
        for message in messages:
            if type(message) is not dict or type(message.get("content")) is not str or message.get("role") not in ROLES:
                break
            if "tool_calls" in message:
                break
        else:
            return tuple(messages)  # not copied, because encoding reads them at once
    if type(messages) is not list and isinstance(messages, Mapping | Message | Completion):
        messages = [messages]
    if type(messages) is not list and (not isinstance(messages, Iterable) or isinstance(messages, bytes)):
        raise ConfigError(f"Expected messages as a text or a list of dicts, got {messages!r}")
    found = tuple([_message(message, i) for i, message in enumerate(messages)])
    if not found:
        raise ConfigError("Expected at least one message, got none")
    return found


def _message(message: Any, position: int) -> dict[str, Any]:
    if isinstance(message, str):
        return {"role": "user", "content": message}
    if isinstance(message, Completion):
        message = message.choices[0].message
    if isinstance(message, Message):
        return assistant(message)
    if hasattr(message, "model_dump"):
        message = message.model_dump(exclude_none=True)
    if not isinstance(message, Mapping):
        raise ConfigError(
            f"Expected a message as a dict with role and content, got {message!r} - at $.messages[{position}]"
        )
    if message.get("role") not in ROLES:
        raise ConfigError(
            f"Expected a role of {', '.join(ROLES)}, got {message.get('role')!r} - at $.messages[{position}].role"
        )
    content = message.get("content")
    made = dict(message)
    if content is not None:
        made["content"] = _content(content, f"$.messages[{position}].content")
    if message.get("tool_calls") is not None:
        made["tool_calls"] = _tool_calls(message["tool_calls"], f"$.messages[{position}].tool_calls")
    if isinstance(message, Turn | Opening):  # what they hold as attributes, too
        kept = type(message)(made)
        vars(kept).update(vars(message))
        return kept
    return made


def assistant(message: Message) -> dict[str, Any]:
    """Convert an answer to the message that continues the conversation; thinking is sent back only if it is signed."""
    turn = Turn(role="assistant", content=message.content)
    turn.source, turn.origin = message.source, message.origin
    if message.tool_calls:
        turn["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return turn


def _tool_call(call: ToolCall) -> dict[str, Any]:
    made = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    if call.signature is None:
        return made
    return {**made, "extra_content": {"google": {"thought_signature": call.signature}}}


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Return calls in OpenAI's shape; also our own records, and an SDK's."""
    if isinstance(calls, str | bytes | Mapping) or not isinstance(calls, Iterable):
        raise ConfigError(f"Expected a list of tool calls, got {calls!r} - at {where}")
    made = []
    for i, call in enumerate(calls):
        given = call.model_dump(exclude_none=True) if hasattr(call, "model_dump") else call
        shown = _tool_call(given) if isinstance(given, ToolCall) else given
        if not isinstance(shown, Mapping) or not isinstance(shown.get("function", {}), Mapping):
            raise ConfigError(
                "Expected a tool call as {'id': …, 'type': 'function', 'function': {'name': …, 'arguments': …}}, "
                f"got {call!r} - at {where}[{i}]"
            )
        made.append(shown)
    return made


def _content(content: Any, where: str) -> str | list[Any]:
    if isinstance(content, str):
        return content
    if isinstance(content, Image | bytes | Mapping):
        content = [content]
    if not isinstance(content, Iterable):
        raise ConfigError(f"Expected content as a text or a list of parts, got {content!r} - at {where}")
    return [_part(part, f"{where}[{i}]") for i, part in enumerate(content)]


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, bytes):
        part = Image(part)
    if isinstance(part, Image):
        image = {"url": part.url} | ({"detail": part.detail} if part.detail else {})
        return {"type": "image_url", "image_url": image}
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ConfigError(f"Expected a part as a text, an Image or a dict with a type, got {part!r} - at {where}")
    if part["type"] == "text" and not isinstance(part.get("text"), str | None):
        raise ConfigError(f"Expected a part with a text, got {part['text']!r} - at {where}.text")
    if part["type"] == "image_url" and isinstance(part.get("image_url"), str):
        return {**part, "image_url": {"url": part["image_url"]}}
    if part["type"] == "image_url":
        shown = part.get("image_url")
        if not isinstance(shown, Mapping) or not isinstance(shown.get("url"), str):
            raise ConfigError(f"Expected an image as {{'url': …}}, got {shown!r} - at {where}.image_url")
    return dict(part)


def _media_type(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind
    raise ConfigError(
        f"Expected the bytes of a PNG, JPEG, GIF or WebP image, got {data[:8]!r}…. "
        "Name another kind: Image(data, media_type=…)"
    )


def as_data(url: str) -> tuple[str, str] | None:
    """Split a data: URL into media type and base64 text; None for any other URL.

    >>> as_data("data:image/png;base64,AAAA")
    ('image/png', 'AAAA')
    """
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        return None
    return head[len("data:") : -len(";base64")], data


def text_of(content: Any) -> str:
    """Return the text of a message's content, without parts that are not text.

    >>> text_of(["a", {"type": "text", "text": "b"}])
    'ab'
    """
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) else ()
    return "".join(part if isinstance(part, str) else str(part.get("text") or "") for part in parts)
