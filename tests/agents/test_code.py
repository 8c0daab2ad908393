"""Source code as a parameter: what is accepted, what is refused with which error, and what compiled code can use."""

from __future__ import annotations

from typing import Any

import pytest

from aggregator.agents.code import CodeParameter, check_source, compile_function, plain_source, signature, source_of
from aggregator.errors import ParameterError

LIKE = "def route(self, x, k=3): ...\n"
PATH = "$.suggestion.route__code"


def written(x: int, /, y: int = 1, *more: int, z: int = 2, **rest: int) -> int:
    return x + y + z + sum(more) + sum(rest.values())


@pytest.mark.requirement("Trace's defect 19: code that does not compile was installed")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def route(self, x, k=3):\n  retrn x",
            "Expected Python source that parses, got invalid syntax in line 2: retrn x",
        ),
        ("def code(self, x:\n  retrn", "Expected Python source that parses, got '(' was never closed in line 1"),
        ("", "Expected one function `route` and nothing else, got no code"),
        (
            "x = 1",
            "Expected one function `route` and nothing else, got Assign in line 1; imports and constants go inside",
        ),
        ("import re\ndef route(self, x, k=3): ...", "got Import in line 1; imports and constants go inside"),
        (LIKE + "def other(): ...", "got a second one in line 2; helpers go inside"),
        ("@cache\n" + LIKE, "got a decorator in line 1"),
        (
            "def rout(self, x, k=3): ...",
            "Expected `def route(self, x, k=...)`, got `def rout(self, x, k=...)` in line 1",
        ),
        ("def route(self, x): ...", "got `def route(self, x)` in line 1"),
        ("def route(self, x, k): ...", "got `def route(self, x, k)` in line 1"),
        ("def route(self, x, *, k=3): ...", "got `def route(self, x, *, k=...)` in line 1"),
        ("async def route(self, x, k=3): ...", "got `async def route(self, x, k=...)` in line 1"),
        ("def route(self, x, k=3): yield x", "Expected `route` to be a plain function, got a generator"),
        (
            "def route(self, x, k=3):\n  return await x",
            "Expected Python source that compiles, got 'await' outside async",
        ),
        (
            "def route(self, x, k=3):\n  break",
            "Expected Python source that compiles, got 'break' outside loop in line 2",
        ),
        ("Sure! Here is the code", "Expected Python source that parses"),
        ("def route(self, x, k=3): return '\0'", "Expected Python source that parses"),
        ("(" * 5000, "Expected Python source that parses"),
        ("def route(self, x, k=3): return " + "-" * 30_000 + "1", "Expected Python source that"),
        ('def route(self, x, k=3): return f"' + "{x}" * 30_000 + '"', "Expected at most 40000 characters of source"),
        ("#" * 200_000, "Expected at most 40000 characters of source, got 200000"),
    ],
)
def test_code_that_could_not_run_is_refused(source: str, message: str) -> None:
    """Aggregated code that did not compile was installed; now the error gives the reason, the line and the remedy."""
    with pytest.raises(ParameterError) as refused:
        check_source(source, like=LIKE, where=PATH)
    assert message in str(refused.value)
    assert str(refused.value).endswith(f" - at {PATH}")


@pytest.mark.parametrize(
    "source",
    [
        LIKE,
        "def route(self, x, k=5):\n    import re\n    def helper(): ...\n    return re.escape(x)",
        "def route(self, x: Unknown, k: 'int' = 3) -> Imagined: ...",
        "# a comment before\ndef route(self, x, k=[1]): ...",
        "def route(self, x, k=3): return {i: (lambda: x)() for i in range(k)}",
    ],
)
def test_code_with_the_same_name_and_signature_is_accepted(source: str) -> None:
    """Bodies, defaults, annotations and comments may change; imports and helpers are inside."""
    check_source(source, like=LIKE)


def test_a_check_runs_nothing() -> None:
    """A check evaluates neither defaults nor annotations."""
    check_source("def route(self, x, k=exit(1)) -> exit(2): ...", like=LIKE)


@pytest.mark.parametrize(
    "line",
    [
        "def f()",
        "def f(a, b=..., /, c=..., *d, e, f=..., **g)",
        "def f(*, a)",
        "async def f(a, /)",
    ],
)
def test_signatures_hold_names_kinds_and_optional_arguments(line: str) -> None:
    """A signature is the function's own `def` line."""
    import ast

    definition = ast.parse(line + ": ...").body[0]
    assert signature(definition) == line  # type: ignore[arg-type]


@pytest.mark.requirement(
    "Trace: projections: normalised suggestions",
    "Trace's defect 3: a formatter was imported in threads",
)
def test_fences_and_indentation_are_removed() -> None:
    """Only a Markdown fence around the whole text and a common indent are removed."""
    assert plain_source("```python\n    def f():\n        pass\n```") == "def f():\n    pass\n"
    assert plain_source("\n  def f():\n    pass\n\n") == "def f():\n  pass\n"
    assert plain_source("text ```python\ndef f(): ...\n```").startswith("text ```")


def test_source_with_text_at_the_left_margin() -> None:
    """A method whose string literal starts left of the code is dedented correctly."""

    def odd() -> str:
        return """
at the edge"""

    source, line = source_of(odd)  # type: ignore[arg-type]
    assert source == "def odd() -> str:\n    return '\\nat the edge'\n"
    assert line == -1


def test_compiled_code_has_the_originals_environment() -> None:
    """Globals, module, name and every kind of argument work as before."""
    source = "def written(x, /, y=10, *more, z=20, **rest):\n    return (x, y, more, z, rest, LIKE)"
    function = compile_function(source, written)
    assert function(1) == (1, 10, (), 20, {}, LIKE)
    assert function(1, 2, 3, z=4, w=5) == (1, 2, (3,), 4, {"w": 5}, LIKE)
    assert (function.__module__, function.__qualname__) == (__name__, "written")


def test_a_source_is_compiled_once() -> None:
    """The same source gives the same function while it is in the bounded cache."""
    source = "def written(x, /, y=1, *more, z=2, **rest):\n    return 0"
    assert compile_function(source, written) is compile_function(source, written)
    assert compile_function.cache_info().maxsize == 512


def test_unchanged_source_runs_the_original() -> None:
    """As long as the source is unchanged, the original function runs; this includes going back to it."""
    code = CodeParameter(written, name="written__code")  # type: ignore[arg-type]
    original: Any = written
    assert code.function() is original
    code.data = "def written(x, /, y=1, *more, z=2, **rest):\n    return 0"
    assert code.function()(1) == 0
    code.data = "```python\n" + code.written + "```"
    assert code.function() is original
    assert code.convert(code.written) == code.written


def test_zero_argument_super_and_class_names_work() -> None:
    """New source of a method may call super() if the old one did."""

    class Base:
        def name(self) -> str:
            return "base"

    class Sub(Base):
        def name(self) -> str:
            return "sub of " + super().name()

    function = compile_function("def name(self):\n    return 'new ' + super().name()", Sub.name)
    assert function(Sub()) == "new base"
