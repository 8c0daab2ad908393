"""Convert a reply's suggestion to values that the parameters accept, without guessing.

A truncated, ambiguous or unreadable reply raises a SuggestionError whose text can be quoted to the model; an invalid
value is refused with a reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from aggregator.agents import parameters as values_of_types
from aggregator.errors import ParameterError, SuggestionError
from aggregator.records import Values
from aggregator.text import list_names, quote_ends
from aggregator.training.replies import parse_reply, same

_NEAR_WITHIN = 200


# ---- the seed's functions


def extract_llm_suggestion(response: str, ignore_extraction_error: bool = True) -> dict[str, Any]:
    r"""Extract the suggestion from the response; {} for TERMINATE.

    A response that cannot be read without guessing gives {}, or SuggestionError with `ignore_extraction_error=False`.

    >>> extract_llm_suggestion('```json\n{"suggestion": {"k": 3}}\n```')
    {'k': 3}
    """
    try:
        return parse_reply(response).suggestion or {}
    except SuggestionError:
        if not ignore_extraction_error:
            raise
        return {}


def construct_update_dict(
    parameters: Sequence[Any], suggestion: Mapping[str, Any], ignore_extraction_error: bool = True
) -> dict[Any, Any]:
    """Convert the suggestion into each parameter's own type and return {parameter: value}.

    An invalid value and an unknown name are left out, or ParameterError with `ignore_extraction_error=False`.
    """
    values, refused = convert_suggestion(suggestion, parameters, null_is_unchanged=False)
    if refused and not ignore_extraction_error:
        raise ParameterError("; ".join(refused.values()))
    return {parameter: values[parameter.name] for parameter in parameters if parameter.name in values}


def convert_suggestion(
    suggestion: Mapping[str, Any], parameters: Sequence[Any], *, null_is_unchanged: bool = True
) -> tuple[Values, dict[str, str]]:
    """Convert a suggestion; returns the accepted values by parameter name, and the reason for each refused key.

    Keys are names or py_names, exactly. null leaves a parameter unchanged unless its type allows null: a strict schema
    requires every key. The text TERMINATE is refused as a value, because it means no change.
    """
    known: dict[str, Any] = {parameter.name: parameter for parameter in parameters}
    if not suggestion.keys() <= known.keys():
        known = {key: parameter for parameter in parameters for key in (parameter.py_name, parameter.name)}
    values: Values = {}
    refused: dict[str, str] = {}
    for key, raw in suggestion.items():
        if (parameter := known.get(key)) is None:
            near = get_close_matches(key[:_NEAR_WITHIN], list(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the parameters are {list_names(list(known))}"
            refused[key] = f"Expected the name of a parameter, got {quote_ends(key, 60)}; {hint}"
            continue
        try:
            values[parameter.name] = _convert(parameter, key, suggestion)
        except ParameterError as error:
            if raw is not None or not null_is_unchanged:
                refused[key] = str(error)
    return values, refused


def _convert(parameter: Any, key: str, suggestion: Mapping[str, Any]) -> Any:
    """Convert by the parameter's own rule, or for Trace's parameters by the type of the value.

    A value may be given under both names of a parameter if the two agree.
    """
    raw = suggestion[key]
    if not getattr(parameter, "trainable", True):
        raise ParameterError(f"Expected a trainable parameter, got {key!r}, which is fixed - at $.suggestion.{key}")
    if len(suggestion) > 1 and (name := parameter.py_name) != parameter.name:
        other = parameter.name if key == name else name
        if other in suggestion and not same(raw, suggestion[other]):
            raise ParameterError(f"Expected one value, got two different ones - at $.suggestion.{name}")
    if isinstance(raw, str) and raw.strip() == "TERMINATE":
        trouble = "Expected a value, got 'TERMINATE', which means no change, and only as the whole reply"
        raise ParameterError(f"{trouble} - at $.suggestion.{parameter.py_name}")
    if hasattr(parameter, "convert"):
        return parameter.convert(raw)
    try:
        return values_of_types.convert(raw, values_of_types.infer_type(parameter.data))
    except values_of_types.Unfit as unfit:
        raise ParameterError(f"{unfit.reason} - at $.suggestion.{parameter.py_name}{unfit.path}") from None
