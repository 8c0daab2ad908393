"""Ask a model for values of parameters and read its reply, with one repair call that quotes the error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from aggregator.agents.parameters import ParameterNode
from aggregator.errors import (
    BadRequestError,
    ContentFilterError,
    LLMError,
    PermissionDeniedError,
    SuggestionError,
    TruncatedError,
    ends_run,
)
from aggregator.llm.models import complete_own
from aggregator.protocols import ChatModel
from aggregator.records import Values
from aggregator.training.prompts import repair_messages, shorter_messages
from aggregator.training.replies import parse_reply
from aggregator.training.schemas import response_schema
from aggregator.training.suggestions import convert_suggestion

Parameters = Sequence[ParameterNode[Any]]


class Answer(Struct, frozen=True, kw_only=True):
    """Values of the parameters' own types; `error` names what could not be used, even after the repair call."""

    values: Values = {}
    reasoning: str = ""
    error: str | None = None


Refuse = Callable[[Values], Mapping[str, str]]
"""Returns the reason for each value that is refused, by parameter name."""

Read = Callable[[str, Parameters], Answer]
"""Reads a reply into values for these parameters."""


def read_reply(text: str, parameters: Parameters, *, ignored: Collection[str] = ()) -> Answer:
    """Read one reply into values of the parameters' own types; names in `ignored` are left out."""
    try:
        reply = parse_reply(text)
    except SuggestionError as error:
        return Answer(error=str(error))
    if reply.terminate or reply.suggestion is None:
        return Answer(reasoning=reply.reasoning)
    suggestion = reply.suggestion
    if ignored:
        suggestion = {key: value for key, value in suggestion.items() if key not in ignored}
    values, refused = convert_suggestion(suggestion, parameters)
    return Answer(values=values, reasoning=reply.reasoning, error="; ".join(refused.values()) or None)


def leave_out(answer: Answer, refused: Mapping[str, str]) -> Answer:
    """Return the answer without refused values; their reasons are added to its error."""
    values = {name: value for name, value in answer.values.items() if name not in refused}
    reasons = [reason for reason in (answer.error, *refused.values()) if reason]
    return replace(answer, values=values, error="; ".join(reasons))


async def ask(
    llm: ChatModel,
    messages: list[dict[str, str]],
    parameters: Parameters,
    *,
    max_tokens: int,
    temperature: float | None = None,
    seed: int | None = None,
    read: Read = read_reply,
    structured: bool = True,
    schema: Callable[[Parameters], dict[str, Any]] | None = None,
    refuse: Refuse | None = None,
) -> Answer:
    """Return the model's suggestion for the parameters; raises LLMError if the call itself failed.

    A reply that cannot be read without guessing, and a value that cannot become its parameter's type or that `refuse`
    refuses, is requested once more with the reason quoted. What is still invalid is left out and named in `error`. A
    truncated reply is not quoted: the second one must be shorter, and has twice the room. If the second call itself is
    refused (too long, a filter), the first reply is used. `schema` makes the `response_format`. With `structured=False`
    the reply has the form that `read` expects: no schema is sent, and there is no second call.
    """
    given: dict[str, Any] = {"temperature": temperature, "seed": seed}
    options = {name: value for name, value in given.items() if value is not None}
    if structured:  # validate=str: the client accepts any text, `read` judges it
        options |= {"response_format": (schema or response_schema)(parameters), "validate": str}

    async def once(messages: list[dict[str, str]], limit: int) -> tuple[str, Answer, bool]:
        try:
            completion = await complete_own(llm, messages, max_tokens=limit, **options)
        except TruncatedError as error:
            return error.text, Answer(error=str(error)), True
        if completion.finish_reason == "length":
            return completion.text, Answer(error=f"the reply was cut at the limit of {limit} tokens"), True
        text = completion.text
        answer = read(text, parameters)
        refused = None if refuse is None else refuse(answer.values)
        return text, leave_out(answer, refused) if refused else answer, False

    text, answer, is_cut = await once(messages, max_tokens)
    if answer.error is None or not structured:
        return answer
    again = shorter_messages(messages, text, max_tokens) if is_cut else repair_messages(messages, text, answer.error)
    try:
        _, repaired, _ = await once(again, 2 * max_tokens if is_cut else max_tokens)
    except (BadRequestError, ContentFilterError, PermissionDeniedError) as error:
        if ends_run(error):
            raise
        return answer
    return repaired


async def ask_or_fail(*arguments: Any, **options: Any) -> Answer | LLMError:
    """Call `ask`, but return an error that another call may not meet; raises what ends a run."""
    try:
        return await ask(*arguments, **options)
    except LLMError as error:
        if ends_run(error):
            raise
        return error
