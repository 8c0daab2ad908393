"""A transcript as Mermaid text: the picture that Trace draws with graphviz, without a program."""

from __future__ import annotations

import asyncio
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import Completion, bundle, transcript
from aggregator.agents.transcripts import escaped, recording
from aggregator.records import Choice, Message


@bundle()
def double(x: int) -> int:
    return 2 * x


@bundle()
def pair(x: int) -> list[int]:
    return [double(x), double(x + 1)]


@bundle()
def broken(x: int) -> int:
    raise ValueError("no <b>rule</b>")


@pytest.mark.requirement("Trace: backward(visualize, print_limit)")
def test_operations_are_below_their_caller_and_in_order() -> None:
    """A solid line leads to a called operation, a dotted one to the next one."""
    with transcript() as seen:
        double(pair(1)[0])
    assert seen.to_mermaid().splitlines() == [
        "flowchart TD",
        '  n0["pair<br/>x = 1<br/>returned = #91;2, 4#93;"]',
        '  n1["double<br/>x = 1<br/>returned = 2"]',
        "  n0 --> n1",
        '  n2["double<br/>x = 2<br/>returned = 4"]',
        "  n1 -.-> n2",
        '  n3["double<br/>x = 2<br/>returned = 4"]',
        "  n0 -.-> n3",
        "  classDef failed stroke:#e0524a,stroke-width:2px",
    ]


def test_llm_calls_and_failures_have_their_own_style() -> None:
    """A call has round ends, its last message and its reply; a failure has its own class."""
    with transcript() as seen:
        reply = Completion(choices=(Choice(message=Message(content="sales")),))
        seen.add_llm_call([{"role": "system", "content": "Route."}, {"role": "user", "content": "a parcel"}], reply)
        with pytest.raises(ValueError, match="rule"):
            broken(1)
        seen.llm_call("unanswered").fail(ConnectionError("reset"))
    lines = seen.to_mermaid().splitlines()
    assert lines[1] == '  n0(["LLM call<br/>user = a parcel<br/>reply = sales"])'
    assert lines[2] == ('  n1["broken<br/>x = 1<br/>raised = ValueError#58; no #60;b#62;rule#60;/b#62;"]:::failed')
    assert lines[4].endswith("])" + ":::failed")


async def test_concurrent_tasks_are_drawn_in_separate_rows() -> None:
    """Each row starts at its parent operation; the picture is the same in any order of completion."""

    async def branch(i: int, turns: int) -> None:
        with recording(f"first {i}") as span:
            for _ in range(turns):
                await asyncio.sleep(0)
            span.finish(i)
        with recording(f"second {i}") as span:
            span.finish(i)

    async def draw(turns: tuple[int, int]) -> str:
        with transcript() as seen, recording("fan out") as span:
            async with asyncio.TaskGroup() as group:
                for i in range(2):
                    group.create_task(branch(i, turns[i]))
            span.finish(None)
        return seen.to_mermaid()

    drawn = await draw((0, 5))
    assert re.findall(r"n\d -.*> n\d", drawn) == ["n0 --> n1", "n1 -.-> n2", "n0 --> n3", "n3 -.-> n4"]
    assert drawn == await draw((5, 0))


@given(st.text())
def test_no_text_breaks_the_syntax(text: str) -> None:
    """Quotes, brackets, tags, directives and lines of an agent's text stay text, and can be read back."""
    label = escaped(text)
    assert re.search(r'["<>\[\]{}`%:;#\\|&\n]', re.sub(r"#\d+;", "", label)) is None
    assert re.sub(r"#(\d+);", lambda found: chr(int(found[1])), label) == text


@pytest.mark.requirement("Trace: backward(visualize, print_limit)")
def test_long_values_and_long_runs_are_shortened() -> None:
    """A box shows the beginning of a value; a picture shows the first operations, and how many are left out."""
    with transcript() as seen:
        double("long " * 100)  # type: ignore[arg-type]
        for i in range(9):
            double(i)
    drawn = seen.to_mermaid(limit=3)
    assert drawn.count("double") == 3
    assert 'more["... 7 more"]' in drawn
    assert max(map(len, drawn.splitlines())) < 200


@pytest.mark.requirement("Trace: backward(reverse_plot)")
def test_an_empty_transcript_is_an_empty_picture() -> None:
    """It can still be drawn."""
    with transcript() as seen:
        pass
    assert seen.to_mermaid().startswith("flowchart TD\n")
