"""Replies become values of the parameters' types, or an error that can be quoted; nothing is guessed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta, Struct

from aggregator.agents.parameters import ParameterNode, node
from aggregator.errors import ParameterError, SuggestionError
from aggregator.training.asking import (
    construct_update_dict,
    convert_suggestion,
    extract_llm_suggestion,
    response_schema,
)
from aggregator.training.replies import MAX_DEPTH, MAX_REPLY, Reply, parse_reply

CORPUS = json.loads(Path(__file__).with_name("malformed_replies.json").read_text(encoding="utf-8"))["replies"]
GOOD = '{"reasoning": "Shorter.", "suggestion": {"prompt": "Be brief.", "k": 3}}'


def corpus_parameters() -> list[ParameterNode[Any]]:
    return [
        ParameterNode("Old", name="prompt"),
        ParameterNode(1, name="k"),
        ParameterNode(0.5, name="threshold", type=Annotated[float, Meta(ge=0, le=1)]),
        ParameterNode(data=True, name="verbose"),
        ParameterNode(["a"], name="tags"),
    ]


def attempt(reply: str) -> tuple[Reply | None, str]:
    """Return the parsed reply, or the error."""
    try:
        return parse_reply(reply), ""
    except SuggestionError as error:
        return None, str(error)


def outcome(reply: str) -> dict[str, Any]:
    """Return a reply's result in the corpus's words."""
    read, error = attempt(reply)
    if read is None:
        return {"error": error}
    if read.terminate:
        return {"terminate": True}
    assert read.suggestion is not None
    values, refused = convert_suggestion(read.suggestion, corpus_parameters())
    return {"values": values} | ({"refused": list(refused)} if refused else {})


def exactly(value: Any) -> str:
    """Return text that distinguishes 1, 1.0 and True."""
    return json.dumps(value, sort_keys=True)


@pytest.mark.requirement("Trace's defect 15: a damaged reply was silently no update")
@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case["name"])
def test_corpus(case: dict[str, Any]) -> None:
    """Each malformed reply gives exactly what the corpus states: values, refusals, TERMINATE or an error."""
    got = outcome(case["reply"])
    expected = {key: value for key, value in case.items() if key not in {"name", "reply"}}
    if "error" in expected:
        reason = got.get("error", "").partition(", got ")[2].partition(". The reply: ")[0]
        assert expected["error"] in reason, got
    else:
        assert exactly(got) == exactly(expected)


def test_corpus_is_large_and_recovers_most() -> None:
    """At least 80 replies; no wrong value is applied, and at least 90 % of the recoverable ones are recovered."""
    recoverable = [case for case in CORPUS if "error" not in case]
    wrong = [
        case["name"]
        for case in CORPUS
        if "values" in (got := outcome(case["reply"]))
        and any(exactly(case.get("values", {}).get(key)) != exactly(value) for key, value in got["values"].items())
    ]
    recovered = [case for case in recoverable if "error" not in outcome(case["reply"])]
    assert len(CORPUS) >= 80
    assert wrong == []
    assert len(recovered) >= 0.9 * len(recoverable)


# --- one rung each


@pytest.mark.parametrize(
    ("reply", "rung"),
    [
        (GOOD, "json"),
        (f"```json\n{GOOD}\n```", "fence+json"),
        (f"Here you are: {GOOD}", "prose+json"),
        (f"<think>hm</think>{GOOD}", "think+json"),
        (f"<think>hm</think>\n```\n{GOOD}\n```", "think+fence+json"),
        (json.dumps(GOOD), "string+json"),
        ('{"suggestion": {"prompt": "a\nb"}}', "control"),
        ('{"suggestion": {"prompt": "a\nb",}}', "lenient"),
        ("Here: {'suggestion': {'k': 3}}", "prose+lenient"),
        ("TERMINATE", "terminate"),
        ("<think>hm</think>TERMINATE", "think+terminate"),
    ],
)
def test_the_result_names_its_rung(reply: str, rung: str) -> None:
    """The result names the rung that parsed the reply, so that a log shows what a model's replies need."""
    assert parse_reply(reply).rung == rung


def test_all_reasons_are_kept() -> None:
    """Every key that begins with `reason` adds a line to the reasoning, in order."""
    reply = parse_reply('{"reasoning_k": "Fewer.", "suggestion": {"k": 3}, "reasoning_prompt": {"why": "same"}}')
    assert reply.reasoning == 'Fewer.\n{"why": "same"}'


def test_an_error_can_be_quoted_to_the_model() -> None:
    """It says what was expected, what it got and where, and is short for any input."""
    with pytest.raises(SuggestionError) as caught:
        parse_reply('Sure.\n{"suggestion": {"prompt": "Say "yes" now."}}' + " really" * 10_000)
    message = str(caught.value)
    assert message.startswith(
        'Expected one JSON object {"reasoning": "...", "suggestion": {<parameter>: <value>}} or only'
    )
    assert "got an object that cannot be read: Expecting ',' delimiter at character 38" in message
    assert """near '": {"prompt": "Say "yes" now."}}'. The reply: 'Sure.""" in message
    assert message.endswith("(70050 characters)")
    assert len(message) < 700


@pytest.mark.parametrize("reply", [None, 5, b"{}", ["a"]])
def test_a_reply_that_is_not_text(reply: Any) -> None:
    """It is a SuggestionError, so a client that returns None does not crash the run."""
    with pytest.raises(SuggestionError, match="not text"):
        parse_reply(reply)


# --- symptoms of other trainers' parsing


@pytest.mark.requirement("Trace's defect 14: a greedy pattern installed a corrupted prompt")
def test_trailing_comma_does_not_corrupt_the_prompt() -> None:
    """With a trailing comma a greedy pattern installed the prompt `a", "q0": "b`."""
    assert extract_llm_suggestion('{"suggestion": {"p0": "a", "q0": "b"}, }') == {"p0": "a", "q0": "b"}


@pytest.mark.requirement(
    "Trace: OptoPrime(ignore_extraction_error)",
    "Trace's defect 15: a damaged reply was silently no update",
)
@pytest.mark.parametrize(
    "reply",
    ['{"suggestion": {"p0": "a"', '["a"]', '{"suggestion": {"p0": "a"}} {"suggestion": {"p0": "b"}}', ""],
    ids=["truncated", "a list", "two objects", "empty"],
)
def test_an_unreadable_reply_is_not_silently_no_update(reply: str) -> None:
    """It raises for a direct caller; under the seed's default it is {} and never half a suggestion."""
    with pytest.raises(SuggestionError):
        extract_llm_suggestion(reply, ignore_extraction_error=False)
    assert extract_llm_suggestion(reply) == {}


@pytest.mark.requirement("Trace's defect 16: prompts with the word def were dropped")
def test_a_prompt_with_the_word_def_is_kept() -> None:
    """An English prompt with `def` in it is text, not code to be formatted."""
    text = "Define the terms first, then answer by default in English."
    prompt = ParameterNode("Old", name="prompt")
    assert construct_update_dict([prompt], {"prompt": text}) == {prompt: text}


@pytest.mark.requirement("Trace's defect 17: TERMINATE anywhere discarded the proposal")
def test_terminate_in_the_reasoning_does_not_discard_the_proposal() -> None:
    """TERMINATE counts only as the whole reply; a judge's `Correct [TERMINATE]` may be quoted."""
    reply = parse_reply('{"reasoning": "The judge said Correct [TERMINATE]", "suggestion": {"k": 3}}')
    assert (reply.suggestion, reply.terminate) == ({"k": 3}, False)


@pytest.mark.requirement(
    "Trace: projections: normalised suggestions",
    "Trace's defect 13: values were converted by type(old)(new)",
)
@pytest.mark.parametrize(
    ("old", "raw", "new"),
    [(True, "False", False), (False, "false", False), (1, "7", 7), (0.5, 1, 1.0), (["a"], ["x", "y"], ["x", "y"])],
)
def test_a_value_becomes_the_parameters_type(old: Any, raw: Any, new: Any) -> None:
    """`"False"` for a bool is False, `"7"` for an int is 7: msgspec's lax conversions."""
    parameter = ParameterNode(old, name="p")
    values, refused = convert_suggestion({"p": raw}, [parameter])
    assert (exactly(values), refused) == (exactly({"p": new}), {})


@pytest.mark.requirement("Trace's defect 13: values were converted by type(old)(new)")
@pytest.mark.parametrize(
    ("old", "raw"),
    [
        (["a", "b"], "c, d"),
        (["a"], '["x","y"]'),
        (1, 2.9),
        ("s", ["l1", "l2"]),
        ("s", 5),
        (0, "None"),
        (0.5, "nan"),
        (0.5, float("inf")),
        (True, "maybe"),
    ],
)
def test_a_value_of_another_type_is_refused(old: Any, raw: Any) -> None:
    """A list of characters, a truncated fraction and a list's repr as a prompt are refused, with reason and path."""
    values, refused = convert_suggestion({"p": raw}, [ParameterNode(old, name="p")])
    assert values == {}
    assert refused["p"].startswith("Expected ")
    assert "$.suggestion.p" in refused["p"]


@pytest.mark.requirement("Trace's defect 13: values were converted by type(old)(new)")
@pytest.mark.parametrize("old", ["s", 0, [1]])
def test_null_never_becomes_a_value(old: Any) -> None:
    """null leaves a parameter unchanged; it neither becomes 'None' nor crashes."""
    parameter = ParameterNode(old, name="p")
    assert convert_suggestion({"p": None}, [parameter]) == ({}, {})
    assert construct_update_dict([parameter], {"p": None}) == {}
    with pytest.raises(ParameterError, match=r"got None - at \$.suggestion.p"):
        construct_update_dict([parameter], {"p": None}, ignore_extraction_error=False)


def test_null_is_a_value_if_the_type_allows_it() -> None:
    """A nullable parameter can be set to null."""
    assert convert_suggestion({"p": None}, [ParameterNode("s", name="p", type=str | None)]) == ({"p": None}, {})


# --- names


def test_names_and_py_names_are_accepted() -> None:
    """A suggestion may name a parameter by its path or its identifier; the result uses the path."""
    parameter = ParameterNode(1, name="retriever.k")
    assert convert_suggestion({"retriever.k": 3}, [parameter]) == ({"retriever.k": 3}, {})
    assert convert_suggestion({"retriever_k": 3}, [parameter]) == ({"retriever.k": 3}, {})


def test_two_values_for_one_parameter_are_both_refused() -> None:
    """Path and identifier with different values are ambiguous; with one value they are not."""
    parameter = ParameterNode(1, name="retriever.k")
    values, refused = convert_suggestion({"retriever.k": 3, "retriever_k": 5}, [parameter])
    assert values == {}
    assert sorted(refused) == ["retriever.k", "retriever_k"]
    assert convert_suggestion({"retriever.k": 3, "retriever_k": 3}, [parameter]) == ({"retriever.k": 3}, {})


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    """A misspelt name is not guessed; the reason suggests the nearest one."""
    _, refused = convert_suggestion({"promt": "a", "zzz": 1}, [ParameterNode("Old", name="prompt")])
    assert refused == {
        "promt": "Expected the name of a parameter, got 'promt'; did you mean 'prompt'?",
        "zzz": "Expected the name of a parameter, got 'zzz'; the parameters are 'prompt'",
    }


def test_a_fixed_parameter_is_refused() -> None:
    """A suggestion does not change a parameter that is not trainable."""
    values, refused = convert_suggestion({"p": "b"}, [ParameterNode("a", name="p", trainable=False)])
    assert values == {}
    assert "which is fixed" in refused["p"]


@pytest.mark.requirement("Trace: OptoPrime(ignore_extraction_error)")
def test_update_dict_leaves_out_or_raises() -> None:
    """By default invalid values are left out; otherwise the reasons are raised."""
    k, p = node(1, name="k", trainable=True), node("a", name="p", trainable=True)
    assert construct_update_dict([k, p], {"k": "many", "p": "b", "q": 1}) == {p: "b"}
    with pytest.raises(ParameterError, match="got 'many' - at .*; Expected the name of a parameter, got 'q'"):
        construct_update_dict([k, p], {"k": "many", "p": "b", "q": 1}, ignore_extraction_error=False)


def test_parameters_of_trace_are_converted_by_their_value() -> None:
    """A parameter without a type (py_name, data, trainable) keeps the type of its value."""

    class TraceParameter:
        name, py_name, trainable, data = "tags:0", "tags0", True, ["a"]

    parameter = TraceParameter()
    assert construct_update_dict([parameter], {"tags0": ["x"]}) == {parameter: ["x"]}
    assert construct_update_dict([parameter], {"tags0": "x, y"}) == {}


# --- response_format


class Step(Struct):
    name: str
    weight: float = 1.0


def strict_objects(schema: Any) -> list[dict[str, Any]]:
    """Yield every object schema inside a schema."""
    if isinstance(schema, list):
        return [found for part in schema for found in strict_objects(part)]
    if not isinstance(schema, dict):
        return []
    inner = [found for part in schema.values() for found in strict_objects(part)]
    return [schema, *inner] if schema.get("type") == "object" else inner


def test_response_schema_of_plain_types() -> None:
    """The whole `response_format` for a prompt and a bounded number."""
    parameters = [
        ParameterNode("a", name="prompt", description="What the agent is told."),
        ParameterNode(0.5, name="t", type=Annotated[float, Meta(ge=0, le=1)]),
    ]
    assert response_schema(parameters) == {
        "type": "json_schema",
        "json_schema": {
            "name": "suggestion",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {
                    "reasoning_prompt": {"type": "string"},
                    "reasoning_t": {"type": "string"},
                    "suggestion": {
                        "type": "object",
                        "properties": {
                            "prompt": {
                                "anyOf": [{"type": "string"}, {"type": "null"}],
                                "description": "What the agent is told.",
                            },
                            "t": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "null"}]},
                        },
                        "required": ["prompt", "t"],
                        "additionalProperties": False,
                    },
                },
                "required": ["reasoning_prompt", "reasoning_t", "suggestion"],
                "additionalProperties": False,
            },
        },
    }


def test_a_strict_schema_uses_the_strict_subset() -> None:
    """In strict mode every object is closed and every key required, without default, length or pattern."""
    parameters = [
        ParameterNode([Step("a")], name="steps"),
        ParameterNode("x", name="s", type=Annotated[str, Meta(max_length=5, pattern="^x")]),
        ParameterNode("a", name="choice", type=Literal["a", "b"]),
        ParameterNode(None, name="maybe", type=int | None),
    ]
    given_format = response_schema(parameters)["json_schema"]
    objects = strict_objects(given_format["schema"])
    text = json.dumps(given_format)
    assert given_format["strict"] is True
    assert len(objects) == 3
    assert all(found["additionalProperties"] is False for found in objects)
    assert all(found["required"] == list(found["properties"]) for found in objects)
    assert given_format["schema"]["properties"]["suggestion"]["properties"]["maybe"] == {
        "anyOf": [{"type": "integer"}, {"type": "null"}]
    }
    assert not any(word in text for word in ('"default"', '"maxLength"', '"pattern"', '"title"'))
    assert {"type": "string", "enum": ["a", "b"]} in given_format["schema"]["properties"]["suggestion"]["properties"][
        "choice"
    ]["anyOf"]


@pytest.mark.parametrize("value", [{"a": 1}, None, (1, "a")], ids=["dict", "anything", "tuple of types"])
def test_a_type_beyond_strict_mode_turns_it_off(value: Any) -> None:
    """A type that strict mode does not support is sent as a plain schema with optional keys."""
    kind = tuple[int, str] if isinstance(value, tuple) else None
    given_format = response_schema([ParameterNode(value, name="p", type=kind), ParameterNode(1, name="k")])
    inner = given_format["json_schema"]["schema"]["properties"]["suggestion"]
    assert given_format["json_schema"]["strict"] is False
    assert (inner["required"], inner["properties"]["k"]) == ([], {"type": "integer"})


def test_a_strict_reply_changes_only_what_is_not_null() -> None:
    """Strict mode requires every key: null means unchanged."""
    reply = parse_reply('{"reasoning_prompt": "", "reasoning_k": "", "suggestion": {"prompt": null, "k": 3}}')
    assert convert_suggestion(reply.suggestion or {}, corpus_parameters()) == ({"k": 3}, {})


# --- laws

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
SUGGESTIONS = st.dictionaries(TEXT, JSON, max_size=4)


def plain(suggestion: Any) -> str:
    return json.dumps({"reasoning": "r", "suggestion": suggestion}, ensure_ascii=False)


WRAPPINGS: dict[str, Callable[[Any], str]] = {
    "plain": plain,
    "ascii": lambda s: json.dumps({"suggestion": s}),
    "indented": lambda s: json.dumps({"suggestion": s}, indent=2),
    "fence": lambda s: f"```json\n{plain(s)}\n```",
    "prose": lambda s: f"Here's the value, as \"agreed\" {{so}}:\n\n{plain(s)}\n\nThat's all.",
    "think": lambda s: f'<think>It\'s {{"suggestion": {{"k": 9</think>\n{plain(s)}',
    "unopened think": lambda s: f"A draft: {plain(None)}\n</think>\n{plain(s)}",
    "string": lambda s: json.dumps(plain(s)),
    "twice": lambda s: f"{plain(s)}\n{plain(s)}",
    "list": lambda s: f"[{plain(s)}]",
    "trailing comma": lambda s: f'{{"suggestion": {json.dumps(s)}, }}',
    "comments": lambda s: f'{{ // it\'s new\n"suggestion": {json.dumps(s)} /* "as" agreed */ # yes\n}}',
    "python": lambda s: repr({"suggestion": s}),
}


@pytest.mark.requirement("Trace: OptoPrimeV2, OPROv2: symbol sets for replies")
@pytest.mark.parametrize("name", [name for name in WRAPPINGS if name != "python"])
@given(suggestion=SUGGESTIONS)
@settings(max_examples=25)
def test_every_wrapping_returns_the_suggestion(name: str, suggestion: dict[str, Any]) -> None:
    """Any suggestion in JSON is read unchanged from every wrapping."""
    assert exactly(parse_reply(WRAPPINGS[name](suggestion)).suggestion) == exactly(suggestion)


@given(suggestion=SUGGESTIONS)
@settings(max_examples=100)
def test_a_python_repr_returns_the_suggestion_or_nothing(suggestion: dict[str, Any]) -> None:
    """A dict printed by Python is parsed as Python; escapes that JSON5 reads differently are refused."""
    written = WRAPPINGS["python"](suggestion)
    reply, error = attempt(written)
    if reply is None:
        assert "escape" in error
    else:
        assert exactly(reply.suggestion) == exactly(suggestion)


@pytest.mark.parametrize("name", ["plain", "fence", "think", "python", "trailing comma", "comments", "indented"])
@given(suggestion=SUGGESTIONS.filter(bool), share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=25)
def test_a_truncated_reply_never_gives_a_value(name: str, suggestion: dict[str, Any], share: float) -> None:
    """Cut anywhere, a reply gives an error or the whole suggestion, never a part of it."""
    written = WRAPPINGS[name](suggestion)
    reply, _ = attempt(written[: int(share * len(written))])
    assert reply is None or exactly(reply.suggestion) == exactly(suggestion)


@given(text=st.text(alphabet="{}[]:,'\"\\/*# \nsugetion1.-+eTrNa<think>`", max_size=60) | st.text())
@settings(max_examples=250)
def test_any_text_is_parsed_or_refused(text: str) -> None:
    """Any text gives a Reply or a SuggestionError."""
    for reply in (text, f'{{"suggestion": {{{text}}}}}', f'<think>{text}</think>{{"suggestion": {text}}}'):
        read, error = attempt(reply)
        assert read is not None or error.startswith("Expected one JSON object")


# --- bounds


def test_nesting_is_bounded() -> None:
    """A hundred levels are parsed, more are refused, twenty thousand do not crash."""
    fits = MAX_DEPTH - 2

    def nested(levels: int) -> str:
        return '{"suggestion": {"p": ' + "[" * levels + "]" * levels + "}}"

    assert parse_reply(nested(fits)).suggestion is not None
    for levels in (fits + 1, 20_000):
        with pytest.raises(SuggestionError, match="nested deeper than 100 levels"):
            parse_reply(nested(levels))
    with pytest.raises(SuggestionError, match="cut off"):
        parse_reply('{"suggestion":' * 20_000)


def test_size_is_bounded() -> None:
    """A reply beyond the limit is refused before it is parsed; an int beyond Python's limit has that reason."""
    with pytest.raises(SuggestionError, match=f"{MAX_REPLY + 1} characters; at most"):
        parse_reply(" " * MAX_REPLY + "x")
    with pytest.raises(SuggestionError, match="4300"):
        parse_reply('{"suggestion": {"k": ' + "9" * 5000 + "}}")


HOSTILE: dict[str, Callable[[int], str]] = {
    "one long string": lambda n: '{"suggestion": {"p": "' + "x" * n + '",}}',
    "long string never closed": lambda n: "{'suggestion': {'p': '" + "x" * n,
    "many members": lambda n: '{"suggestion": {' + ",".join(f"'k{i}': '{i}'" for i in range(n // 14)) + ",}}",
    "many braces": lambda n: "{" * n,
    "many beginnings": lambda n: '{"' * (n // 2),
    "many keys": lambda n: '{"a":' * (n // 5),
    "many comment openers": lambda n: "{/*" * (n // 3),
    "many line comments": lambda n: "{//" * (n // 3),
    "many escapes": lambda n: '{"suggestion": {"p": \'' + "\\" * n,
    "many triple quotes": lambda n: '{"suggestion": {"p": """' + ' \\"""' * (n // 5),
    "many quotes": lambda n: '{"suggestion": ' + "'\"" * (n // 2),
    "many comment openers in prose": lambda n: "x" + "{/*" * (n // 3),
    "many line comments in prose": lambda n: "x" + "{//" * (n // 3),
    "many stars": lambda n: '{"suggestion": /*' + "*" * n,
    "many tags": lambda n: "<think>" * (n // 7),
    "many thoughts": lambda n: "<think></think>" * (n // 15),
    "many small objects": lambda n: '{"a":1}' * (n // 7),
    "many equal answers": lambda n: '{"suggestion":{}}' * (n // 17),
    "many duplicates": lambda n: '{"suggestion": {' + '"k": 1,' * (n // 7) + "}}",
    "many spaces": lambda n: '{"suggestion"' + " " * n + ": {}}",
    "many quoted braces": lambda n: "{'" * (n // 4) + '{"' * (n // 4),
}


@pytest.fixture
def watchdog() -> Iterator[None]:
    """Raise after 30 s of CPU time, so that a test that would run for hours fails."""

    def bark(*_: object) -> None:
        raise TimeoutError("this reply is not read in linear time")

    before = signal.signal(signal.SIGVTALRM, bark)
    signal.setitimer(signal.ITIMER_VIRTUAL, 30.0)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize("shape", HOSTILE)
@pytest.mark.usefixtures("watchdog")
def test_reading_grows_linearly(shape: str) -> None:
    """Half a megabyte is parsed to its end; in quadratic time that would take hours."""
    read, error = attempt(HOSTILE[shape](500_000))
    assert (read is None) == bool(error)
