"""Structured output: the best form that a server supports, and a check of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from llm_fakes import BASE_URL, QUESTION, ScriptedTransport, VirtualTime, answer, failure

from aggregator import LLM, cassette
from aggregator.errors import (
    APIConnectionError,
    AuthenticationError,
    BadRequestError,
    CassetteMissError,
    ConfigError,
    ContextLengthError,
    DecodeError,
    ServerError,
    TruncatedError,
)
from aggregator.llm.schemas import as_response_format, mismatch, parse_json
from aggregator.records import Completion, HTTPReply, HTTPRequest

SCHEMA = {
    "type": "object",
    "properties": {"k": {"type": "integer"}},
    "required": ["k"],
    "additionalProperties": False,
}
GOOD = '{"k": 3}'


def client(transport: ScriptedTransport, **options: Any) -> LLM:
    time = VirtualTime()
    return LLM("m", base_url=BASE_URL, transport=transport, clock=time.clock, sleep=time.sleep, **options)


def forms(transport: ScriptedTransport) -> list[str | None]:
    """Return the response_format of each request."""
    return [body.get("response_format", {}).get("type") for body in transport.bodies()]


class Server(ScriptedTransport):
    """Supports some forms of response_format; refuses the others with a status, or ignores them."""

    def __init__(
        self, *known: str | None, status: int = 400, message: str = "bad request", prose: bool = False
    ) -> None:
        super().__init__(self._answer)
        self._known, self._refusal, self._prose = known, failure(status, message), prose

    def _answer(self, request: HTTPRequest) -> HTTPReply:
        form = msgspec.json.decode(request.body).get("response_format", {}).get("type")
        if form in self._known:
            return answer(GOOD)
        return answer("Sure! Here you are.") if self._prose else self._refusal


@pytest.mark.requirement("client 10: json_schema, json_object, prompt alone, on 400, 422 and a 500 that names it")
async def test_the_best_form_is_tried_first() -> None:
    """A server that supports json_schema gets it, in one request."""
    server = Server("json_schema")
    assert (await client(server).complete(QUESTION, response_format=SCHEMA)).text == GOOD
    assert forms(server) == ["json_schema"]
    assert server.bodies()[0]["response_format"]["json_schema"]["strict"] is True


@pytest.mark.requirement(
    "client 10: json_schema, json_object, prompt alone, on 400, 422 and a 500 that names it",
    "Trace's defect 10: the aggregator's call had no retry and no fallback",
)
@pytest.mark.parametrize(
    ("status", "message"),
    [(400, "bad request"), (422, "extra field"), (500, "response_format is not supported"), (500, "json_schema: no")],
)
async def test_a_refused_form_falls_back_to_the_next(status: int, message: str) -> None:
    """After a 400, a 422, or a 500 that names the form, the next form is tried, and last the prompt alone."""
    server = Server(None, status=status, message=message)
    completion = await client(server).complete(QUESTION, response_format=SCHEMA)
    assert (completion.text, completion.attempts) == (GOOD, 3)
    assert forms(server) == ["json_schema", "json_object", None]
    assert '"required":["k"]' in server.bodies()[2]["messages"][0]["content"]


@pytest.mark.requirement("client 10: remembered per (base_url, model)")
async def test_the_form_is_remembered() -> None:
    """It is remembered per server and model: the next call of any client starts with it."""
    server = Server("json_object")
    llm = client(server)
    for asker in (llm, llm, client(server)):
        await asker.complete(QUESTION, response_format=SCHEMA)
    assert forms(server) == ["json_schema", "json_object", "json_object", "json_object"]


@pytest.mark.requirement("client 10: the text is always checked")
async def test_an_ignored_form_falls_back_to_the_prompt() -> None:
    """If a server answers in prose, the prompt asks for JSON."""
    server = Server(None, prose=True)
    assert (await client(server).complete(QUESTION, response_format=SCHEMA)).text == GOOD
    assert forms(server) == ["json_schema", None]


@pytest.mark.requirement("client 10: the text is always checked")
async def test_prose_is_an_error_with_the_text() -> None:
    """The text is always checked; the error holds it."""
    with pytest.raises(DecodeError, match="Expected JSON, got 'Sure") as caught:
        await client(Server(prose=True)).complete(QUESTION, response_format=SCHEMA)
    assert caught.value.text == "Sure! Here you are."  # type: ignore[attr-defined]


@pytest.mark.requirement("client 10: the text is always checked")
async def test_the_schema_is_checked_not_only_json() -> None:
    """JSON of another shape is an error."""
    with pytest.raises(DecodeError, match=r"integer expected, got 'many' - at \$\.k"):
        await client(ScriptedTransport(answer('{"k": "many"}'))).complete(QUESTION, response_format=SCHEMA)


@pytest.mark.requirement("client 9: an error with the partial text, where a structure is required")
async def test_a_truncated_answer_is_an_error_with_the_partial_text() -> None:
    """Truncated JSON is not repaired, and asking again would truncate it again."""
    transport = ScriptedTransport(answer('{"k": ', finish_reason="length"))
    with pytest.raises(TruncatedError, match="raise max_tokens") as caught:
        await client(transport).complete(QUESTION, response_format=SCHEMA)
    assert (caught.value.text, len(transport.requests)) == ('{"k": ', 1)


async def test_a_custom_check() -> None:
    """`validate` replaces the schema's check."""

    def accept(text: str) -> None:
        if text != "TERMINATE":
            raise ValueError("TERMINATE expected")

    transport = ScriptedTransport(answer("TERMINATE"))
    completion = await client(transport).complete(QUESTION, response_format=SCHEMA, validate=accept)
    assert (completion.text, len(transport.requests)) == ("TERMINATE", 1)


@pytest.mark.parametrize("options", [{"validate": int}, {"response_format": SCHEMA, "validate": "int"}], ids=str)
async def test_a_check_without_a_format_was_ignored(options: Any) -> None:
    """No answer would ever be checked by it."""
    transport = ScriptedTransport(answer("no number"))
    with pytest.raises(ConfigError, match="Expected validate as the check of an answer"):
        await client(transport).complete(QUESTION, **options)
    assert transport.requests == []


@pytest.mark.requirement("figure: requests for one doomed call: permanent 1, transient the attempts set")
@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (failure(401), AuthenticationError),
        (failure(400, code="context_length_exceeded"), ContextLengthError),
        (failure(413), BadRequestError),
    ],
)
async def test_other_errors_do_not_change_the_form(reply: HTTPReply, kind: type[Exception]) -> None:
    """An error that another form would not change is raised after one request."""
    transport = ScriptedTransport(reply)
    with pytest.raises(kind):
        await client(transport).complete(QUESTION, response_format=SCHEMA)
    assert len(transport.requests) == 1


@pytest.mark.requirement("client 4: one attempt budget, fallbacks included")
@pytest.mark.parametrize(("max_attempts", "expected"), [(1, 1), (2, 2), (5, 3)])
async def test_the_forms_count_in_the_attempts(max_attempts: int, expected: int) -> None:
    """One limit of attempts applies to the whole call, for all forms."""
    transport = ScriptedTransport(failure(400))
    with pytest.raises(BadRequestError) as caught:
        await client(transport, max_attempts=max_attempts).complete(QUESTION, response_format=SCHEMA)
    assert len(transport.requests) == caught.value.attempts == expected


@pytest.mark.requirement("client 10: no other 500")
async def test_a_500_about_something_else_is_retried_unchanged() -> None:
    """Only a failure that names the format changes it."""
    transport = ScriptedTransport(failure(500, "out of memory"))
    with pytest.raises(ServerError):
        await client(transport).complete(QUESTION, response_format=SCHEMA)
    assert forms(transport) == ["json_schema"] * 3


async def test_a_replay_tries_the_forms_of_its_recording(tmp_path: Path) -> None:
    """A form learned before or outside the recording does not change a replay's requests."""
    known, path = client(Server("json_object")), tmp_path / "forms.yaml"
    await known.complete(QUESTION, response_format=SCHEMA)
    with cassette(path, "once"):
        recorded = await known.complete(QUESTION, response_format=SCHEMA)
    offline = ScriptedTransport(APIConnectionError("no network"))
    with cassette(path, "none"):
        played = await client(offline).complete(QUESTION, response_format=SCHEMA)
    assert (played.text, offline.requests) == (recorded.text, [])


async def test_a_miss_names_the_first_form(tmp_path: Path) -> None:
    """If no form is recorded, the miss is raised for the first one."""
    path = tmp_path / "other.yaml"
    with cassette(path, "once"):
        await client(Server("json_schema")).complete("another question", response_format=SCHEMA)
    with pytest.raises(CassetteMissError), cassette(path, "none"):
        await client(Server("json_schema")).complete(QUESTION, response_format=SCHEMA)


class Verdict(msgspec.Struct):
    score: float
    reason: str = ""


def test_accepted_values_of_response_format() -> None:
    """OpenAI's dicts are sent as they are; a schema or a type is converted; anything else is refused."""
    assert as_response_format(None) is None
    assert as_response_format({"type": "json_object"}) == {"type": "json_object"}
    assert as_response_format(SCHEMA) == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA},
    }
    made = as_response_format(Verdict)
    assert made is not None
    assert made["json_schema"]["strict"] is False  # a key may be absent, which strict mode does not allow
    with pytest.raises(ConfigError, match="response_format"):
        as_response_format(3)


async def test_a_type_checks_the_answer() -> None:
    """The answer is checked by the type's schema, including references."""
    llm = client(ScriptedTransport(answer('{"score": "high"}')))
    with pytest.raises(DecodeError, match=r"number expected, got 'high' - at \$\.score"):
        await llm.complete(QUESTION, response_format=Verdict)


@pytest.mark.parametrize(
    ("value", "schema", "wrong"),
    [
        (1, {"type": "integer"}, None),
        (1.0, {"type": "integer"}, None),
        (True, {"type": "integer"}, "integer expected, got True - at $"),
        (None, {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        (3, {"anyOf": [{"type": "string"}, {"type": "null"}]}, "string expected, got 3 - at $"),
        ("c", {"enum": ["a", "b"]}, "one of ['a', 'b'] expected, got 'c' - at $"),
        ([1, "x"], {"type": "array", "items": {"type": "number"}}, "number expected, got 'x' - at $[1]"),
        ({}, {"type": "object", "required": ["k"]}, "key 'k' expected, got [] - at $"),
        ({"a": {"b": 1}}, {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "string"}}},
         "string expected, got {'b': 1} - at $.a"),
        ("x", {"type": ["string", "null"], "format": "unknown"}, None),
    ],
)  # fmt: skip
def test_schema_mismatches(value: Any, schema: dict[str, Any], wrong: str | None) -> None:
    """A mismatch is reported with its path; unknown keywords are ignored."""
    assert mismatch(value, schema) == wrong


@pytest.mark.parametrize("text", ['{"k": 3}', ' {"k": 3}\n', '```json\n{"k": 3}\n```', 'Here:\n```\n{"k": 3}\n```'])
def test_json_bare_or_in_one_fence(text: str) -> None:
    """Servers that were only asked by prompt wrap JSON in these ways."""
    assert parse_json(text) == {"k": 3}


@pytest.mark.parametrize("text", ["", "no", '{"k": 3', "```\n1\n```\n```\n2\n```", "[" * 100_000])
def test_no_guessing(text: str) -> None:
    """Two fences, half an object or a bomb are not JSON."""
    with pytest.raises(ValueError, match="Expected JSON"):
        parse_json(text)


async def test_a_replay_learned_the_lower_form_sooner_than_the_recording_did(tmp_path: Path) -> None:
    """Each call tries the forms of its recording, so that nothing is left unplayed."""
    path, both = tmp_path / "forms.yaml", asyncio.Barrier(2)
    waiting = 2

    async def together() -> None:
        nonlocal waiting
        waiting -= 1
        if waiting >= 0:
            await both.wait()  # neither call has learned anything from the other

    async def ask(transport: ScriptedTransport) -> list[str]:
        llm = client(transport)
        first, second = llm.complete("one", response_format=_OBJECT), llm.complete("two", response_format=_OBJECT)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_text(first)), group.create_task(_text(second))]
        return [task.result() for task in tasks]

    server = Server(None)
    server._latency = together
    with cassette(path, "once"):
        recorded = await ask(server)
    with cassette(path, "none") as tape:
        first = await ask(ScriptedTransport(APIConnectionError("no network")))
    assert (first, tape.report) == (recorded, [])


async def _text(call: Awaitable[Completion]) -> str:
    return (await call).text


_OBJECT = {"type": "json_object"}


async def test_a_recorded_refusal_with_one_attempt_was_a_miss_with_more(tmp_path: Path) -> None:
    """A call that ended in its first form ends there in a replay too, whatever its number of attempts."""
    path = tmp_path / "refused.yaml"
    for mode, attempts in (("once", 1), ("none", 1), ("none", 3)):
        llm = client(ScriptedTransport(failure(400)), max_attempts=attempts)
        with cassette(path, mode), pytest.raises(BadRequestError):  # type: ignore[arg-type]
            await llm.complete(QUESTION, response_format=_OBJECT)


OTHER = {**SCHEMA, "properties": {"k": {"type": "integer"}, "why": {"type": "string"}}, "required": ["k", "why"]}


async def test_one_odd_answer_demoted_the_model_for_every_client() -> None:
    """An answer that is not JSON costs one repeat; the next call of any client uses the best form."""
    transport = ScriptedTransport(answer("Sure! Here you go."), answer(GOOD))
    llm = client(transport)
    for asker in (llm, llm, client(transport)):
        await asker.complete(QUESTION, response_format=SCHEMA)
    assert forms(transport) == ["json_schema", None, "json_schema", "json_schema"]


async def test_a_refused_schema_demoted_all_others() -> None:
    """A refusal is remembered for that schema alone."""

    def respond(request: HTTPRequest) -> HTTPReply:
        asked = str(msgspec.json.decode(request.body).get("response_format"))
        refused = "why" in asked
        return failure(400, "Invalid schema for response_format: 'why' is not permitted") if refused else answer(GOOD)

    transport = ScriptedTransport(respond)
    llm = client(transport)
    for schema in (OTHER, SCHEMA, OTHER, SCHEMA):
        await llm.complete(QUESTION, response_format=schema, validate=str)
    assert forms(transport) == ["json_schema", "json_object", "json_schema", "json_object", "json_schema"]


async def test_a_refused_schema_is_retried_later() -> None:
    """Servers are updated: after ten minutes the best form is retried."""
    server, time = Server("json_object"), VirtualTime()
    llm = LLM("m", base_url=BASE_URL, transport=server, clock=time.clock, sleep=time.sleep)
    await llm.complete(QUESTION, response_format=SCHEMA)
    time.now += 599
    await llm.complete(QUESTION, response_format=SCHEMA)
    time.now += 2
    await llm.complete(QUESTION, response_format=SCHEMA)
    assert forms(server) == ["json_schema", "json_object", "json_object", "json_schema", "json_object"]


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("Unsupported value: 'temperature' does not support 0.3 with this model", {"temperature": 0.3}),
        ("Unrecognized request argument supplied: reasoning", {"extra": {"reasoning": {}}}),
        ("max_tokens is too large: 100000", {"max_tokens": 100_000}),
    ],
)
async def test_a_refusal_of_another_option_was_tried_in_three_forms(message: str, options: dict[str, Any]) -> None:
    """A 400 that names another option does not change the form."""
    transport = ScriptedTransport(failure(400, message))
    with pytest.raises(BadRequestError):
        await client(transport).complete(QUESTION, response_format=SCHEMA, **options)
    assert forms(transport) == ["json_schema"]


class Point(msgspec.Struct):
    x: int
    label: str


class Line(msgspec.Struct):
    start: Point
    end: Point


def test_a_type_is_requested_in_strict_mode_if_possible() -> None:
    """Objects are closed and the root is an object; an optional key, a default or a list rules it out."""
    made = as_response_format(Line)
    assert made is not None
    stated = made["json_schema"]
    assert (stated["name"], stated["strict"]) == ("Line", True)
    assert stated["schema"]["type"] == "object"
    point = {"x": {"type": "integer"}, "label": {"type": "string"}}
    assert stated["schema"]["$defs"]["Point"]["properties"] == point
    assert [stated["schema"][key] for key in ("additionalProperties", "required")] == [False, ["start", "end"]]
    for kind in (Verdict, list[int], int | str, Literal["a", "b"], dict[str, int]):
        loose = as_response_format(kind)
        assert loose is not None
        assert loose["json_schema"]["strict"] is False


class Model:
    """A model with pydantic's interface."""

    @staticmethod
    def model_json_schema() -> dict[str, Any]:
        return {"type": "object", "title": "M", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def test_a_pydantic_model_raised_a_type_error() -> None:
    """A class with its own JSON schema is accepted as a type."""
    made = as_response_format(Model)
    assert made is not None
    assert (made["json_schema"]["name"], made["json_schema"]["strict"]) == ("M", True)


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


CIRCLE: dict[str, Any] = {"type": "object"}
CIRCLE["properties"] = {"a": CIRCLE}


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": 3}},
        {"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "items": {"$ref": "#/$defs/a"}},
        {"$ref": "#"},
        deep(5_000),
        CIRCLE,
        object,
        lambda x: x,
        "int",
    ],
)
async def test_an_invalid_schema_raised_another_exception(wanted: Any) -> None:
    """KeyError, TypeError and RecursionError were raised after the call had been paid for."""
    transport = ScriptedTransport(answer("{}"))
    with pytest.raises(ConfigError):
        await client(transport).complete(QUESTION, response_format=wanted)
    assert transport.requests == []


async def test_a_recursive_type_is_fine() -> None:
    """A schema may refer to itself within its parts, because an answer is finite."""
    tree = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}}
    transport = ScriptedTransport(answer('{"children": [{"children": []}]}'))
    assert (await client(transport).complete(QUESTION, response_format=tree)).text
    transport = ScriptedTransport(answer('{"children": [{"children": 3}]}'))
    with pytest.raises(DecodeError, match=r"array expected, got 3 - at \$\.children\[0\]\.children"):
        await client(transport).complete(QUESTION, response_format=tree)


async def test_a_list_is_never_requested_as_an_object() -> None:
    """json_object supports objects only, so for a list the prompt is used."""
    transport = ScriptedTransport(failure(400), answer("[1, 2]"))
    assert (await client(transport).complete(QUESTION, response_format=list[int])).text == "[1, 2]"
    assert forms(transport) == ["json_schema", None]
    assert "Answer with one JSON value" in transport.bodies()[1]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("value", "schema", "keyword"),
    [
        (0, {"minimum": 1}, "minimum 1"),
        (5, {"exclusiveMaximum": 5}, "exclusiveMaximum 5"),
        (0.35, {"multipleOf": 0.1}, "multipleOf 0.1"),
        ("", {"minLength": 1}, "minLength 1"),
        ("abc", {"pattern": "^[0-9]+$"}, "pattern"),
        ([1], {"minItems": 2}, "minItems 2"),
        ({"a": 1, "b": 2}, {"properties": {"a": {}}, "additionalProperties": False}, "no key 'b'"),
        ({"b": "x"}, {"additionalProperties": {"type": "integer"}}, "integer"),
        (3, {"allOf": [{"type": "integer"}, {"maximum": 2}]}, "maximum 2"),
    ],
)
def test_keywords_that_the_check_ignored(value: Any, schema: dict[str, Any], keyword: str) -> None:
    """Keywords that the server is not asked to enforce are checked here."""
    found = mismatch(value, schema)
    assert found is not None
    assert found.startswith(f"{keyword} ")


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        (0.3, {"multipleOf": 0.1}),
        ("x", {"minimum": 3}),
        (3, {"minLength": 9}),
        (3, {"minimum": "x"}),
        ("x", {"pattern": "("}),
        ("a" * 40 + "!", {"pattern": "^(a+)+$"}),  # it would take years
        ("a" * 40 + "!", {"pattern": r"^(\w+\s?)*$"}),
    ],
)
def test_irrelevant_keywords_are_ignored(value: Any, schema: dict[str, Any]) -> None:
    """A limit for another type of value, or an invalid one, has no effect."""
    assert mismatch(value, schema) is None
