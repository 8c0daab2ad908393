"""Histories of pydantic-ai as chats in OpenAI's shape, for transcripts and for our model inside its agents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse

from aggregator.records import Choice, Completion, Message, ToolCall, Usage
from aggregator.text import as_text


def prompt_of(x: Any) -> Any:
    """Return an input as a user's prompt: a text or a list of user content as it is, anything else as JSON."""
    return x if isinstance(x, str | list | tuple) else as_text(x)


def calls_of(messages: Sequence[ModelMessage]) -> Iterator[tuple[list[dict[str, Any]], Completion]]:
    """Yield what each request of a history sent and what was answered."""
    for i, response in enumerate(messages):
        if isinstance(response, ModelResponse):
            request = next((one for one in reversed(messages[:i]) if isinstance(one, ModelRequest)), None)
            yield chat_of(messages[:i], request.instructions if request else None), completion_of(response)


def completion_of(response: ModelResponse) -> Completion:
    """Return a response as our record."""
    calls = tuple(
        ToolCall(id=call.tool_call_id, name=call.tool_name, arguments=call.args_as_json_str())
        for call in response.tool_calls
    )
    usage = Usage(input_tokens=response.usage.input_tokens, output_tokens=response.usage.output_tokens)
    thoughts = "".join(part.content for part in response.parts if part.part_kind == "thinking")
    message = Message(content=response.text, reasoning=thoughts or None, tool_calls=calls)
    return Completion(choices=(Choice(message=message),), usage=usage, model=response.model_name or "")


def chat_of(messages: Sequence[ModelMessage], instructions: str | None) -> list[dict[str, Any]]:
    """Return a history as messages in OpenAI's shape, the instructions first.

    Content that is neither text nor an image is a part with its kind only.
    """
    chat: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    for message in messages:
        if isinstance(message, ModelResponse):
            calls = [
                {
                    "id": call.tool_call_id,
                    "type": "function",
                    "function": {"name": call.tool_name, "arguments": call.args_as_json_str()},
                }
                for call in message.tool_calls
            ]
            chat.append({"role": "assistant", "content": message.text, **({"tool_calls": calls} if calls else {})})
        else:
            chat.extend(_part(part) for part in message.parts)
    return chat


def _part(part: Any) -> dict[str, Any]:
    if hasattr(part, "model_response_str"):
        return {"role": "tool", "tool_call_id": part.tool_call_id, "content": part.model_response_str()}
    if part.part_kind == "system-prompt":
        return {"role": "system", "content": part.content}
    if hasattr(part, "model_response"):
        return {"role": "user", "content": part.model_response()}
    content = getattr(part, "content", "")
    return {"role": "user", "content": content if isinstance(content, str) else [_piece(one) for one in content]}


def _piece(piece: Any) -> dict[str, Any]:
    """Return one piece of a user's prompt: a text, an image, or the name of another kind."""
    if isinstance(piece, str):
        return {"type": "text", "text": piece}
    if piece.kind == "image-url":
        return {"type": "image_url", "image_url": {"url": piece.url}}
    if getattr(piece, "is_image", False):
        return {"type": "image_url", "image_url": {"url": piece.data_uri}}
    if isinstance(text := getattr(piece, "content", None), str):
        return {"type": "text", "text": text}
    return {"type": piece.kind}
