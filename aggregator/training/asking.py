"""Ask a model for parameter values and read the reply: typed, checked, with one repair call, never guessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from aggregator.errors import SuggestionError, TruncatedError
from aggregator.protocols import ChatModel
from aggregator.records import Values
from aggregator.training.prompts import repair_messages
from aggregator.training.replies import parse_reply
from aggregator.training.suggestions import response_schema, typed


class Answer(Struct, frozen=True, kw_only=True):
    """Values of the parameters' own types; `error` says what could not be used, even after the repair call."""

    values: Values = {}
    reasoning: str = ""
    error: str | None = None


async def ask(
    llm: ChatModel,
    messages: list[dict[str, str]],
    parameters: Sequence[Any],
    *,
    max_tokens: int,
    temperature: float | None = None,
    seed: int | None = None,
) -> Answer:
    """Return the model's suggestion for the parameters; raises LLMError where the call itself failed.

    A reply that cannot be read without guessing, or a value that cannot become its parameter's type, is asked for once
    more with the error quoted. What is still wrong then is left out and named in `error`.
    """
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    text, answer = await _once(llm, messages, parameters, options)
    if answer.error is None:
        return answer
    _, repaired = await _once(llm, repair_messages(messages, text, answer.error), parameters, options)
    return repaired


async def _once(
    llm: ChatModel, messages: list[dict[str, str]], parameters: Sequence[Any], options: dict[str, Any]
) -> tuple[str, Answer]:
    given = {name: value for name, value in options.items() if value is not None}
    try:
        completion = await llm.complete(
            messages, response_format=response_schema(parameters), validate=str, **given
        )  # validate=str: any text will do here, `read` is the judge
    except TruncatedError as error:
        return error.text, Answer(error=str(error))
    if completion.finish_reason == "length":
        return completion.text, Answer(error=f"the reply was cut at the limit of {options['max_tokens']} tokens")
    return completion.text, read(completion.text, parameters)


def read(text: str, parameters: Sequence[Any]) -> Answer:
    """Read one reply into values of the parameters' own types."""
    try:
        reply = parse_reply(text)
    except SuggestionError as error:
        return Answer(error=str(error))
    if reply.terminate or reply.suggestion is None:
        return Answer(reasoning=reply.reasoning)
    values, refused = typed(reply.suggestion, parameters)
    return Answer(values=values, reasoning=reply.reasoning, error="; ".join(refused.values()) or None)
