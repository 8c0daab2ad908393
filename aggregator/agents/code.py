"""Source code as a parameter: checked before it is applied, compiled once, run in place of the original.

`check_source` runs none of the code that it checks. `compile_function` gives new source the globals and the closure of
the original function; decorators stay in place, and the source excludes them.

Source from a file needs the user's consent if its operation has `sandbox=None`, because it then runs with all rights of
the program (`require_consent`); sandboxed code runs freely:

    code=False    refuse (the default)
    code=True     trust the file
    code="<sha256>", or several    trust these sources; the error that refuses one names its sha256
    code="ask"    show the source on the terminal and ask
"""

from __future__ import annotations
import __future__

import ast
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from hashlib import sha256
from textwrap import dedent
from types import CellType, CodeType, FunctionType
from typing import Any

from aggregator.agents.parameters import ParameterNode
from aggregator.errors import ConfigError, ParameterError
from aggregator.sandbox.limits import Place, current_place
from aggregator.text import strip_fence

SOURCE_LIMIT = 40_000
"""The maximum number of characters of a source.

Parsing an f-string of n fields takes O(n^2): 2 s at 90,000 characters.
"""

CACHED_FUNCTIONS = 512
"""The number of compiled functions in the cache: enough for the candidates of a large batch."""

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_ENCLOSING, _ENCLOSED = "__enclosing__", "__enclosed__"


class CodeParameter(ParameterNode[str]):
    """The source of one function; a new value must parse, compile, and keep name and signature."""

    def __init__(self, function: FunctionType, *, name: str, description: str = "", place: Place = Place()) -> None:  # noqa: B008 - frozen
        self.original = function
        self.place = place
        self.written, self.written_at = source_of(function)
        super().__init__(self.written, type=str, description=description)
        self.name = name

    def fresh(self) -> CodeParameter:
        """Return a separate parameter for the same function, with the original source."""
        return CodeParameter(self.original, name=self.name, description=self.description, place=self.place)

    def check(self, raw: Any, where: str) -> str:
        """Return new source, dedented; raises ParameterError."""
        source = plain_source(super().check(raw, where))
        if source != self.written:
            check_source(source, like=self.written, where=where)
        return source

    def describe(self) -> dict[str, Any]:
        """Return this parameter's description for a prompt."""
        return {**super().describe(), "type": "source code of a Python function, name and arguments fixed"}

    def code_engine(self) -> str:
        """Return where the current context runs changed source of this parameter: "process", "monty" or "here"."""
        return current_place(self.place).engine

    def is_changed(self) -> bool:
        """Return True if the source is not the original one."""
        return self.data != self.written

    def function(self) -> Callable[..., Any]:
        """Return the function to run: the original, or one compiled from the current source."""
        source = self.data
        return self.original if source == self.written else compile_function(source, self.original)

    def place_of(self, error: BaseException, function: Callable[..., Any]) -> str:
        """Return the line of the source that raised an error in `function`, counted from the `def` line, or ""."""
        lines = self.data.splitlines()
        number = getattr(error, "source_line", 0) or self._line(error, function)
        return f" (line {number}: {lines[number - 1].strip()})" if 0 < number <= len(lines) else ""

    def _line(self, error: BaseException, function: Callable[..., Any]) -> int:
        code = getattr(function, "__code__", None)
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code is not code:
            trace = trace.tb_next
        if trace is None:
            return 0
        return trace.tb_lineno - (self.written_at if function is self.original else 1) + 1


# ---- source: read it from a function, check it, compile it


def source_of(function: FunctionType) -> tuple[str, int]:
    """Return a function's dedented source, without decorators, and the line of its `def` in the file.

    Raises ConfigError if the source cannot be found.
    """
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        raise ConfigError(
            f"Expected {function.__qualname__} to be defined in a file or a notebook cell, got a function without "
            "source; @bundle(trainable=True) shows its source to the optimizer"
        ) from None
    text = dedent("".join(lines))
    if text[:1].isspace():  # a string literal starts left of the code: print it from its tree, lines unknown
        definition = ast.parse("if True:\n" + text).body[0].body[0]  # type: ignore[attr-defined]
        definition.decorator_list = []
        return plain_source(ast.unparse(definition)), -1
    definition = ast.parse(text).body[0]
    if not isinstance(definition, _Function):
        raise ConfigError(f"Expected a function written with `def`, got {text.strip()[:60]!r}")
    kept = text.splitlines(keepends=True)[definition.lineno - 1 :]
    return plain_source("".join(kept)), first + definition.lineno - 1


def plain_source(source: str) -> str:
    r"""Return dedented source without a Markdown fence around all of it, with one newline at the end.

    >>> plain_source("```python\n  def f():\n    return 1\n```")
    'def f():\n  return 1\n'
    """
    return dedent(strip_fence(source)).strip("\r\n").rstrip() + "\n"


def check_source(source: str, *, like: str, where: str = "") -> None:
    r"""Raise ParameterError unless `source` compiles and is one function with the name and signature of `like`.

    >>> check_source("def f(x):\n    return x + 1\n", like="def f(x): ...")
    """
    at = f" - at {where}" if where else ""
    wanted = _definition(like, "")
    found = _definition(source, at, wanted.name)
    if signature(wanted) != signature(found):
        raise ParameterError(f"Expected `{signature(wanted)}`, got `{signature(found)}` in line {found.lineno}{at}")
    wanted_kind, kind = _kind(_compiled(wanted, at)), _kind(_compiled(found, at))
    if wanted_kind != kind:
        raise ParameterError(f"Expected `{found.name}` to be {wanted_kind}, got {kind}{at}")


def signature(definition: _Function) -> str:
    """Return name, arguments and which of them are optional, as a `def` line."""
    given = definition.args
    plain = [*given.posonlyargs, *given.args]
    optional = len(plain) - len(given.defaults)
    texts = [arg.arg if i < optional else f"{arg.arg}=..." for i, arg in enumerate(plain)]
    if given.posonlyargs:
        texts.insert(len(given.posonlyargs), "/")
    if given.vararg or given.kwonlyargs:
        texts.append(f"*{given.vararg.arg if given.vararg else ''}")
    for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        texts.append(f"{arg.arg}=..." if default else arg.arg)
    if given.kwarg:
        texts.append(f"**{given.kwarg.arg}")
    prefix = "async def" if isinstance(definition, ast.AsyncFunctionDef) else "def"
    return f"{prefix} {definition.name}({', '.join(texts)})"


@lru_cache(maxsize=CACHED_FUNCTIONS)
def compile_function(source: str, like: FunctionType) -> FunctionType:
    """Return the function that `source` defines, with the globals, closure and module of `like`.

    Nothing is added to those globals. Default values are evaluated: compile only trusted code.
    """
    cells = dict(zip(like.__code__.co_freevars, like.__closure__ or (), strict=True))
    made: dict[str, Any] = {}
    file = f"<{like.__qualname__}, trained>"
    exec(_enclosed(_definition(source, ""), cells, file), like.__globals__, made)  # noqa: S102 - the purpose
    function: FunctionType = made[_ENCLOSING](*(_content(cell) for cell in cells.values()))
    closure = tuple(cells[name] for name in function.__code__.co_freevars)
    defaults = function.__defaults__
    code = function.__code__.replace(co_name=like.__name__, co_qualname=like.__qualname__)
    compiled = FunctionType(code, like.__globals__, like.__name__, defaults, closure)
    compiled.__kwdefaults__ = function.__kwdefaults__
    compiled.__qualname__, compiled.__module__, compiled.__doc__ = like.__qualname__, like.__module__, function.__doc__
    return compiled


def _definition(source: str, at: str, name: str = "") -> _Function:
    """Return the only function in a source; raises ParameterError."""
    if len(source) > SOURCE_LIMIT:
        raise ParameterError(f"Expected at most {SOURCE_LIMIT} characters of source, got {len(source)}{at}")
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise ParameterError(
            f"Expected Python source that parses, got {error.msg} in line {error.lineno}: {line}{at}"
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ParameterError(f"Expected Python source that parses, got {type(error).__name__}: {error}{at}") from None
    wanted = f"one function `{name}` and nothing else" if name else "one function and nothing else"
    if not body:
        raise ParameterError(f"Expected {wanted}, got no code{at}")
    for statement in body:
        if not isinstance(statement, _Function):
            kind = type(statement).__name__
            raise ParameterError(
                f"Expected {wanted}, got {kind} in line {statement.lineno}; imports and constants go inside{at}"
            )
    if len(body) > 1:
        raise ParameterError(f"Expected {wanted}, got a second one in line {body[1].lineno}; helpers go inside{at}")
    definition = body[0]
    assert isinstance(definition, _Function)  # the loop above guarantees it
    if definition.decorator_list:
        raise ParameterError(f"Expected {wanted}, got a decorator in line {definition.decorator_list[0].lineno}{at}")
    return definition


def _compiled(definition: _Function, at: str) -> CodeType:
    """Return the function's own code, without running the surrounding code; raises ParameterError."""
    try:
        code = _compile(ast.Module([definition], []), "<source>")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        line = getattr(error, "lineno", None)
        reason = getattr(error, "msg", None) or str(error)
        raise ParameterError(
            f"Expected Python source that compiles, got {reason}{f' in line {line}' if line else ''}{at}"
        ) from None
    return next(part for part in code.co_consts if isinstance(part, CodeType) and part.co_name == definition.name)


def _enclosed(definition: _Function, cells: Mapping[str, CellType], file: str) -> CodeType:
    """Compile a function inside one whose arguments are the original's closure variables.

    There it has another name, so that its own name refers to the operation, and it can call itself.
    """
    definition.name = _ENCLOSED
    arguments = ast.arguments([], [ast.arg(name) for name in cells], None, [], [], None, [])
    result = ast.Return(ast.Name(definition.name, ast.Load()))
    enclosing = ast.FunctionDef(_ENCLOSING, arguments, [definition, result], [])
    return _compile(ast.fix_missing_locations(ast.Module([enclosing], [])), file)


def _compile(module: ast.Module, file: str) -> CodeType:
    """Compile with annotations left as text: they may name anything, and nothing here reads them."""
    flags = __future__.annotations.compiler_flag
    code: CodeType = compile(module, file, "exec", flags=flags, dont_inherit=True)
    return code


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet, such as a function that names itself
        return None


def _kind(code: CodeType) -> str:
    """Return the result of a call, in words."""
    flags = code.co_flags
    if flags & inspect.CO_ASYNC_GENERATOR:
        return "an async generator"
    if flags & inspect.CO_GENERATOR:
        return "a generator"
    return "async" if flags & inspect.CO_COROUTINE else "a plain function"


Code = bool | str | Collection[str]
"""What may run: see above."""

ASK = "ask"


# ---- consent: code from files runs only if the user permits it


def check_consent(code: Code) -> Code:
    """Return `code=` unchanged; raises ConfigError for anything but the values above."""
    if isinstance(code, bool) or code == ASK:
        return code
    words: Any = [code] if isinstance(code, str) else code
    if isinstance(words, Collection) and words:
        texts = [word for word in words if isinstance(word, str) and len(word) == 64]
        if len(texts) == len(words) and not set("".join(texts)) - set("0123456789abcdef"):
            return code
    raise ConfigError(f"Expected code=True, False, 'ask', or the sha256 of each source that may run, got {code!r}")


def source_digest(source: str) -> str:
    r"""Return the sha256 of a source, for `code=`.

    >>> source_digest("def f(x):\n    return x\n")[:12]
    '72d3d5b08c2c'
    """
    return sha256(plain_source(source).encode(errors="surrogatepass")).hexdigest()


def unsandboxed_code(parameters: Iterable[Any], values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, source) of the values that are code to be run in this process and not the author's own."""
    return [
        (parameter.name, str(values[parameter.name]))
        for parameter in parameters
        if isinstance(parameter, ParameterNode)
        and parameter.name in values
        and parameter.code_engine() == "here"
        and source_digest(str(values[parameter.name])) != source_digest(str(getattr(parameter, "written", "")))
    ]


def require_consent(found: Iterable[tuple[str, str]], code: Code, *, origin: str, permitted: set[str]) -> None:
    """Raise ConfigError unless `code` permits each (name, source) from `origin`.

    `permitted` holds digests permitted before; those that the user permits now are added.
    """
    if code is True:
        return
    given = set() if code is False or code == ASK else {code} if isinstance(code, str) else set(code)
    for name, source in found:
        digest = source_digest(source)
        if digest in given | permitted:
            continue
        if code == ASK and _asked(name, source, origin):
            permitted.add(digest)
            continue
        raise ConfigError(
            f"Expected code={digest!r}, code=True or code='ask' to run source from {origin} in this process, got "
            f"code={code!r}: {name} has sandbox=None. Read the source first; in a sandbox, the default, it runs freely"
        )


def _asked(name: str, source: str, origin: str) -> bool:
    """Show a source and return True if the user agrees; raises ConfigError without a terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError(
            f"Expected a terminal for code='ask', got none; {name} from {origin} is code={source_digest(source)!r}"
        )
    shown = [line if line.isprintable() else ascii(line)[1:-1] for line in source.splitlines()]  # no escape sequences
    sys.stderr.write(f"{origin} holds code that would run in this process, as {name}:\n\n")
    sys.stderr.write("\n".join([*(f"    {line}" for line in shown), "", "Run it? [y/N] "]))
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
