r"""From a reply's text to the JSON objects in it: strict rungs, tried in order, none of which guesses.

The grammar is json's own throughout. Each rung only changes what is handed to it:

    json       the text between the braces, unchanged
    control    the same, raw newlines and tabs inside strings allowed
    lenient    the same, its tokens rewritten one by one into JSON's: single and triple quotes, comments, trailing
               commas, `True` / `None`, unquoted keys, `+1` and `.5`; only spellings on which JSON5 and Python agree

Why no lenient library: pyjson5 and json5 keep the last of two duplicate keys and read `'\d'` as `'d'`, silently;
json5 needs 2 s for 200 KB, demjson3 30 s; json-repair completes what was cut off. Each of these is a wrong value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from aggregator.errors import SuggestionError
from aggregator.text import canonical_json, list_names, quote_ends

MAX_DEPTH = 100
"""Objects and lists nested more deeply are refused; Python's own limit depends on the caller."""

_SPACE = r"[\s\ufeff\u200b]++"
_COMMENT = r"//[^\n]*+|\#[^\n]*+|/\*(?:[^*]++|\*(?!/))*+\*/"
_STRING = r""" "{3}(?:[^"\\]++|\\.|"(?!""))*+"{3} | '{3}(?:[^'\\]++|\\.|'(?!''))*+'{3}
             | "(?!"")(?:[^"\\]++|\\.)*+" | (?<!\w)'(?!'')(?:[^'\\]++|\\.)*+' """
_WORD = r"[\w$+\-.]++"

# Possessive quantifiers throughout: no token is scanned twice. An opener without an end is `open`.
_TOKEN = re.compile(
    rf"(?P<space>{_SPACE})|(?P<comment>{_COMMENT})|(?P<string>{_STRING})|(?P<open>\"|(?<!\w)'|/\*)"
    rf"|(?P<mark>[{{}}\[\]:,])|(?P<word>{_WORD})|(?P<other>.)",
    re.DOTALL | re.VERBOSE,
)
_OBJECT_START = re.compile(rf"\{{(?:{_SPACE}|{_COMMENT})*+(?:{_STRING}|{_WORD})(?:{_SPACE})?+:", re.DOTALL | re.VERBOSE)
_NEAR = 20
_KEY_WITHIN = (
    400  # the number of characters after a brace in prose that are examined; bounded, so that many braces stay cheap
)
_ESCAPE = re.compile(
    r'\\(?:u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|["\\/bfnrt\']|\r?\n|(?P<unknown>.|\Z))|(?P<quote>")', re.DOTALL
)
_NUMBER = re.compile(r"[+-]?(?:0|[1-9][0-9]*)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?")
_CONSTANTS = {"true": "true", "True": "true", "false": "false", "False": "false", "null": "null", "None": "null"}


# ---- finding JSON in a text


class Region(Struct, frozen=True):
    """One object found in a text.

    Its position, its outermost keys, its tokens as JSON, or the reason why they are not.
    """

    start: int
    end: int
    keys: tuple[str, ...]
    tokens: str
    problem: str = ""
    depth: int = 0
    truncated: bool = False


def regions(text: str) -> Iterator[Region]:
    """Find the objects of a text from left to right, in one pass; quotes outside an object are ignored."""
    position, first = 0, len(text) - len(text.lstrip())
    while (start := text.find("{", position)) >= 0:
        if start != first and not _OBJECT_START.match(text, start, start + _KEY_WITHIN):
            position = start + 1  # a placeholder such as {question}, or code
            continue
        region = _scan(text, start)
        yield region
        position = region.end


def _scan(text: str, start: int) -> Region:
    """Read lexemes from an opening brace to its end, rewriting each."""
    keys: list[str] = []
    tokens: list[str] = []
    depth, deepest, problem, previous = 0, 0, "", ""
    for match in _TOKEN.finditer(text, start):
        kind, lexeme = match.lastgroup, match.group()
        if kind in ("space", "comment"):
            continue
        if kind == "open":
            problem = f"the {lexeme} at character {match.start()} is never closed"
            return Region(start, len(text), tuple(keys), "", problem, deepest, truncated=True)
        if kind == "mark":
            if lexeme == ":" and depth == 1:
                keys.append(previous.strip("\"'"))
            depth += (lexeme in "{[") - (lexeme in "}]")
            deepest = max(depth, deepest)
            _mark(lexeme, tokens)
        else:
            token, trouble = _rewrite(str(kind), lexeme)
            tokens.append(token)
            problem = problem or trouble
        if depth == 0:
            break
        previous = lexeme
    else:
        return Region(start, len(text), tuple(keys), "", f"{depth} brackets are never closed", deepest, truncated=True)
    if deepest > MAX_DEPTH:
        problem = f"nested deeper than {MAX_DEPTH} levels"
    return Region(start, match.end(), tuple(keys), "" if problem else "".join(tokens), problem, deepest)


def _mark(lexeme: str, tokens: list[str]) -> None:
    """Append a mark; drop a trailing comma before a closing one, and quote a bare key before a colon."""
    if lexeme in "}]" and len(tokens) > 1 and tokens[-1] == "," and tokens[-2] not in ("{", "[", ",", ":"):
        tokens.pop()
    elif lexeme == ":" and tokens and tokens[-1].isidentifier() and tokens[-1] not in _CONSTANTS:
        tokens[-1] = f'"{tokens[-1]}"'
    tokens.append(lexeme)


def _rewrite(kind: str, lexeme: str) -> tuple[str, str]:
    """Write one string or word as JSON; the second value is the reason if that is impossible."""
    if kind == "string":
        return _string(lexeme)
    if kind == "other":
        return lexeme, f"{lexeme!r} stands outside of a string"
    if lexeme in _CONSTANTS:
        return _CONSTANTS[lexeme], ""
    if _NUMBER.fullmatch(lexeme) and any(map(str.isdecimal, lexeme)):
        return _number(lexeme), ""
    return lexeme, ""  # a bare key, or a token outside the grammar


def _number(lexeme: str) -> str:
    """Write `+1`, `.5` and `5.` as JSON numbers."""
    sign, digits = ("-", lexeme[1:]) if lexeme.startswith("-") else ("", lexeme.removeprefix("+"))
    digits = re.sub(r"\.(?![0-9])", ".0", digits)
    return f"{sign}0{digits}" if digits.startswith(".") else f"{sign}{digits}"


def _bare(lexeme: str) -> str:
    return lexeme.strip("\"'")


def _string(token: str) -> tuple[str, str]:
    """Write a string of any quotes with JSON's quotes and escapes."""
    width = 3 if len(token) >= 6 and token[:3] in ('"""', "'''") else 1
    unknown: list[str] = []

    def escape(match: re.Match[str]) -> str:
        found = match.group()
        if match["quote"]:
            return r"\""
        if match["unknown"] is not None:
            unknown.append(found)
        if found[1:2] == "x":
            return rf"\u00{found[2:]}"
        return {r"\'": "'", "\\\n": "", "\\\r\n": ""}.get(found, found)

    body = _ESCAPE.sub(escape, token[width:-width])
    trouble = f"the escape {unknown[0]!r} means different things in JSON5 and in Python" if unknown else ""
    return f'"{body}"', trouble


# ---- decoding strictly


def read(text: str, region: Region) -> tuple[dict[str, Any], str]:
    """Read a region by the first rung that accepts it, and name that rung; raises SuggestionError if none does."""
    whole = text[region.start : region.end]
    if region.depth <= MAX_DEPTH:
        for rung, read_rung in _RUNGS:
            if (found := read_rung(whole, region)) is not None:
                return found, rung
    raise SuggestionError(f"an object that cannot be read: {region.problem or _where(whole, region.start)}")


def _json(whole: str, _region: Region) -> dict[str, Any] | None:
    return _decode(_STRICT, whole)


def _control(whole: str, _region: Region) -> dict[str, Any] | None:
    return _decode(_LOOSE, whole)


def _lenient(_whole: str, region: Region) -> dict[str, Any] | None:
    return _decode(_LOOSE, region.tokens)


_RUNGS: tuple[tuple[str, Callable[[str, Region], dict[str, Any] | None]], ...] = (
    ("json", _json),
    ("control", _control),
    ("lenient", _lenient),
)


def _where(whole: str, start: int) -> str:
    """Return the position at which the original text, not its rewritten tokens, violates JSON's grammar."""
    try:
        _LOOSE.decode(whole)
    except json.JSONDecodeError as error:
        near = whole[max(error.pos - _NEAR, 0) : error.pos + _NEAR]
        return f"{error.msg} at character {start + error.pos}, near {near!r}"
    return "it is no JSON"


def read_whole(text: str) -> dict[str, Any] | None:
    """Read a text that is strict JSON from its first to its last character; None for any other text."""
    if text[:1] != "{" or text.count("{") + text.count("[") > MAX_DEPTH:
        return None
    return _decode(_STRICT, text)


def _decode(decoder: json.JSONDecoder, text: str) -> dict[str, Any] | None:
    """Decode an object; None if the text is not JSON, SuggestionError if it is unusable JSON."""
    try:
        found: dict[str, Any] = decoder.decode(text)
    except json.JSONDecodeError:
        return None
    except SuggestionError:
        raise
    except ValueError as error:  # an integer with more digits than Python converts
        raise SuggestionError(str(error)) from None
    return found


def same(one: Any, other: Any) -> bool:
    """Return True if two values are the same JSON: 1, 1.0 and true are three values.

    >>> same({"a": 1, "b": 2}, {"b": 2, "a": 1}), same(1, True)
    (True, False)
    """
    return canonical(one) == canonical(other)


def canonical(value: Any) -> bytes:
    """Encode with sorted keys; SuggestionError for text that is not valid Unicode (a lone surrogate)."""
    try:
        return canonical_json(value)
    except UnicodeEncodeError as error:
        raise SuggestionError(
            f"half a character: {error.object[error.start : error.end]!r} is no Unicode text"
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of an object's members; a repeated key must have the same value."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if not same(seen.setdefault(key, value), value):
                raise SuggestionError(f"ambiguous: the key {key!r} stands twice, with different values")
    return made


def _constant(word: str) -> Any:
    raise SuggestionError(f"{word} is never a value")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise SuggestionError(f"{digits[:40]} is beyond what a float holds")
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
_LOOSE = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, strict=False)


MAX_REPLY = 2_000_000
"""In characters; a longer reply is refused without parsing."""


_EXPECTED = 'Expected one JSON object {"reasoning": "...", "suggestion": {<parameter>: <value>}} or only TERMINATE'


_INVISIBLE = " \t\r\n\ufeff\u200b"


_AROUND_WORD = _INVISIBLE + "`\"'*_.!"


_TAG = re.compile(r"<(?P<end>/)?(?:think|thinking|thought|reasoning)>", re.IGNORECASE)


# ---- reading a reply


class Reply(Struct, frozen=True, kw_only=True):
    """The content of a reply.

    `suggestion` is None for TERMINATE; `rung` names the steps that read it, such as `fence+lenient`.
    """

    suggestion: dict[str, Any] | None = None
    reasoning: str = ""
    terminate: bool = False
    rung: str = "json"


def parse_reply(text: str) -> Reply:
    """Read a reply in the aggregator's form; SuggestionError if that would require guessing.

    TERMINATE counts only as the whole reply. The outermost key is `suggestion` in any case; its value is an object, or
    null for no change. An object without that key is not an answer, even if its keys are parameters: prompts quote
    those. Time grows linearly with the reply's length.

    >>> parse_reply('<think>hm</think>Here: {"suggestion": {"k": 3,}}')
    Reply(suggestion={'k': 3}, reasoning='', terminate=False, rung='think+prose+lenient')
    >>> parse_reply("`TERMINATE`.").terminate
    True
    """
    try:
        return _parse(text)
    except SuggestionError as error:
        raise SuggestionError(f"{_EXPECTED}, got {error}. The reply: {quote_ends(text)}") from None


def _parse(text: str) -> Reply:
    if not isinstance(text, str):
        raise SuggestionError(f"{type(text).__name__}, not text")
    if len(text) > MAX_REPLY:
        raise SuggestionError(f"{len(text)} characters; at most {MAX_REPLY} are read")
    if not (body := text.strip(_INVISIBLE)):
        raise SuggestionError("an empty reply")
    body, steps = _after_thinking(body)
    if body.strip(_AROUND_WORD).upper() == "TERMINATE":
        return Reply(terminate=True, rung="+".join([*steps, "terminate"]))
    if (unquoted := _unquoted(body)) is not None:
        body, steps = unquoted, [*steps, "string"]
    found = read_whole(body)
    if found is None or not _suggestion_keys(found):
        found, way = _only_answer(body)
        return _reply(found, [*steps, *way])
    return _reply(found, [*steps, "json"])


def _after_thinking(body: str) -> tuple[str, list[str]]:
    """Remove the thinking before the answer; nothing inside it is read, and a tag inside an object is text.

    Thinking may begin without a tag (the prompt's template opened it) and may follow some words.
    """
    steps: list[str] = []
    while (tag := _TAG.match(body)) and not tag["end"]:
        end = next((tag.end() for tag in _TAG.finditer(body) if tag["end"]), None)
        if end is None:
            raise SuggestionError(f"thinking that was cut off: {tag.group()} is never closed")
        body, steps = body[end:].strip(_INVISIBLE), ["think"]
    if not _TAG.search(body):
        return body, steps
    tags = _tags_outside_objects(body)
    if tags and not tags[-1]["end"]:
        raise SuggestionError(f"thinking that was cut off: {tags[-1].group()} is never closed")
    return (body[tags[-1].end() :].strip(_INVISIBLE), ["think"]) if tags else (body, steps)


def _tags_outside_objects(body: str) -> list[re.Match[str]]:
    tags: list[re.Match[str]] = []
    position = 0
    for region in regions(body):
        tags += _TAG.finditer(body, position, region.start)
        position = region.end
    return tags + list(_TAG.finditer(body, position))


def _unquoted(body: str) -> str | None:
    """Decode one level of JSON: the whole reply is a JSON string that holds the reply."""
    if not (body.startswith('"') and body.endswith('"')):
        return None
    try:
        return str(json.loads(body, strict=False)).strip(_INVISIBLE)
    except ValueError:
        return None


def _only_answer(body: str) -> tuple[dict[str, Any], list[str]]:
    """Find the only object of a reply that holds a suggestion, and name the rungs that found it."""
    answers: list[tuple[dict[str, Any], list[str]]] = []
    others: list[str] = []
    for region in regions(body):
        if region.truncated:
            raise SuggestionError(f"an object that is cut off: {region.problem}; it begins at character {region.start}")
        if not _suggestion_keys(region.keys):
            others += region.keys
            continue
        found, rung = read(body, region)
        answers.append((found, [*_place(body, region), rung]))
    if not answers:
        raise SuggestionError(f"objects without it, of the keys {list_names(others)}" if others else "no such object")
    first = _suggested(answers[0][0])
    if any(not same(first, _suggested(found)) for found, _ in answers[1:]):
        raise SuggestionError(f"an ambiguous reply: {len(answers)} objects that suggest different things")
    return answers[0]


def _place(body: str, region: Region) -> list[str]:
    if region.start == 0 and region.end == len(body):
        return []
    before = body[: region.start].rstrip()
    return ["fence" if before.rpartition("\n")[2].lstrip().startswith("```") else "prose"]


# ---- finding the suggestion


def _suggestion_keys(keys: Mapping[str, Any] | Sequence[str]) -> list[str]:
    return [key for key in keys if key.strip().casefold() == "suggestion"]


def _suggested(found: dict[str, Any]) -> Any:
    """The value of the one suggestion key; two of different case must agree, as equal keys must."""
    values = [found[key] for key in _suggestion_keys(found)]
    if not all(same(values[0], value) for value in values[1:]):
        raise SuggestionError("an ambiguous reply: two suggestion keys with different values")
    return values[0]


def _reply(found: dict[str, Any], way: list[str]) -> Reply:
    suggestion = _suggested(found)
    if suggestion is None:
        suggestion = {}
    if not isinstance(suggestion, dict):
        raise SuggestionError(f'"suggestion" as {quote_ends(suggestion, 60)}, which is no object')
    canonical(found)  # refuses text that could not be encoded again
    reasons = [value for key, value in found.items() if key.strip().casefold().startswith("reason")]
    reasoning = "\n".join(value if isinstance(value, str) else json.dumps(value) for value in reasons)
    return Reply(suggestion=suggestion, reasoning=reasoning, rung="+".join(way))
