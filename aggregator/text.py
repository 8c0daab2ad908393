"""Values as text: bounded, and the same bytes in every run.

For prompts: `show`, `cut`, `one_line`, `as_text`. For errors: `shorten`, `quote_ends`, `list_names`. For comparison:
`canonical_json`, `json_changes`. For replies: `fenced_blocks`, `strip_fence`. For terminals: `printable`, `columns`,
`show_size`, `show_count`.

Addresses and hash order are never shown: an object without its own repr is `<ClassName>`, the items of a set are
sorted. Omissions are marked: `[... 120 more characters]`, `[... 3 more items]`, `[... nested deeper]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import msgspec

from aggregator.errors import ConfigError

VALUE_LIMIT = 2_000
"""The number of characters of one value that are shown."""

DEPTH_LIMIT = 6
"""The nesting of containers that is shown."""


def show(value: Any, limit: int = VALUE_LIMIT) -> str:
    """Return a value as text of about `limit` characters at most.

    >>> show({"k": [1, "a"], "none": None})
    '{"k": [1, "a"], "none": null}'
    >>> show(object())
    '<object>'
    """
    if isinstance(value, str) and "\n" in value:
        return cut(value, limit)
    return _show(value, limit, DEPTH_LIMIT)


def cut(text: str, limit: int) -> str:
    """Return text cut at `limit` characters, with the number of missing ones.

    >>> cut("abcdef", 4)
    'abcd [... 2 more characters]'
    """
    return text if len(text) <= limit else f"{text[:limit]} [... {len(text) - limit} more characters]"


def clip(text: str, limit: int) -> str:
    """Return text cut at `limit` characters, ending in three dots.

    >>> clip("abcdef", 4)
    'abcd...'
    """
    return text if len(text) <= limit else f"{text[:limit]}..."


def one_line(text: str, limit: int) -> str:
    r"""Return text on one line of at most `limit` characters, including the dots.

    >>> one_line("a  b\nc", 80), one_line("abcdefgh", 6)
    ('a b c', 'abc...')
    """
    line = " ".join(text.split())
    return line if len(line) <= limit else clip(line, limit - 3)


def readable(value: Any) -> str:
    """Return a float with four digits, "-" for None, and anything else unchanged.

    >>> readable(0.333333333), readable(None), readable("x")
    ('0.3333', '-', 'x')
    """
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_text(value: Any) -> str:
    """Return a string unchanged, and anything else as JSON or, if JSON does not support it, as its repr.

    A value that contains itself, or is nested too deep, is no JSON.

    >>> as_text("a"), as_text({"a": 1})
    ('a', '{"a":1}')
    """
    if isinstance(value, str):
        return value
    try:
        return msgspec.json.encode(value, enc_hook=_record).decode()
    except (TypeError, ValueError, RecursionError):
        try:
            shown = repr(value)
        except RecursionError:
            return f"<{type(value).__name__}, nested too deep>"
        return shown if shown == _without_address(shown) else f"<{type(value).__name__}>"


def _record(value: Any) -> Any:
    """Return a DSPy record (an Example, a Prediction) as a dict, because its repr has sets in arbitrary order."""
    if not hasattr(type(value), "toDict"):
        raise TypeError(f"{type(value).__name__} is no JSON")
    return value.toDict()


def _show(value: Any, limit: int, depth: int) -> str:
    kind = type(value)
    if kind is str:
        return _quoted(cut(value, limit))
    if value is None or kind is bool:
        return {None: "null", True: "true", False: "false"}[value]
    if kind in (int, float):
        return _number(value)
    if hasattr(kind, "__shows_as__"):  # a parameter: its value
        return _show(value.__shows_as__(), limit, depth)
    if kind in (dict, list, tuple, set, frozenset):
        return "[... nested deeper]" if depth == 0 else _container(value, limit, depth - 1)
    if hasattr(kind, "toDict") and depth:
        return _show(_record(value), limit, depth - 1)
    return _object(value, limit)


def _quoted(text: str) -> str:
    """Quote as JSON does, and keep letters beyond ASCII."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    escaped = escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return f'"{escaped}"'


def _number(value: float) -> str:
    try:
        return repr(value)
    except ValueError:  # an int with more digits than Python converts to text
        return f"<int of {value.bit_length()} bits>"  # type: ignore[attr-defined]


def _container(value: Any, limit: int, depth: int) -> str:
    if isinstance(value, Mapping):
        pairs = ((f"{_show(key, limit, depth)}: ", item) for key, item in value.items())
        return f"{{{_items(pairs, len(value), limit, depth)}}}"
    if isinstance(value, AbstractSet):
        shown = sorted(_show(item, limit, depth) for item in value)
        return f"{{{cut(', '.join(shown), limit)}}}"
    opening, closing = ("(", ")") if isinstance(value, tuple) else ("[", "]")
    return f"{opening}{_items((('', item) for item in value), len(value), limit, depth)}{closing}"


def _items(items: Iterable[tuple[str, Any]], count: int, limit: int, depth: int) -> str:
    shown: list[str] = []
    left = limit
    for prefix, item in items:
        if left <= 0:
            shown.append(f"[... {count - len(shown)} more items]")
            break
        text = prefix + _show(item, left, depth)
        shown.append(text)
        left -= len(text) + 2
    return ", ".join(shown)


def _object(value: Any, limit: int) -> str:
    """Show an object by its own repr if its class has one that works, otherwise by its class."""
    name = f"<{type(value).__name__}>"
    if getattr(type(value), "__repr__", None) is object.__repr__:
        return name
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a broken repr of the agent's own class must not break the agent
        return name
    return cut(_without_address(text), limit)


def show_error(error: BaseException, limit: int = VALUE_LIMIT) -> str:
    """Return an exception as `ValueError: message`; a group as its errors, in a reproducible order.

    Of the files in a traceback that the message quotes, only the names are kept.

    >>> show_error(ValueError("no k"))
    'ValueError: no k'
    >>> show_error(ExceptionGroup("tasks", [ValueError("b"), ValueError("a")]))
    'ExceptionGroup of ValueError: a; ValueError: b'
    """
    if isinstance(error, BaseExceptionGroup):
        inside = sorted({show_error(part, limit) for part in error.exceptions})
        return cut(f"{type(error).__name__} of {'; '.join(inside)}", limit)
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - as above: an exception class of the agent's own
        message = ""
    text = _without_address(message)
    if "Traceback" in text:  # of another process, or of Trace: folders differ from machine to machine
        text = re.sub(r'(?<=  File ")[^"\n]*[/\\](?=[^"/\\\n]+", line \d)', "", text)
    return cut(f"{type(error).__name__}: {text}" if text else type(error).__name__, limit)


SHOWN = 80
"""The number of characters of a refused value that an error shows."""


def _without_address(text: str) -> str:
    """Remove an object's memory address from its repr, because it differs in every run."""
    return re.sub(r" (?:object )?at 0x[0-9a-fA-F]+", "", text)  # compiled on demand: loading parameters needs none


def shorten(value: Any, limit: int = SHOWN) -> str:
    """Return a value for an error: its repr without addresses, shortened.

    >>> shorten("x" * 200, 10)
    "'xxxxxxxxx..."
    """
    try:
        text = repr(value[: limit + 1] if isinstance(value, str | list | bytes) else value)
    except RecursionError:
        text = f"<{type(value).__name__}, nested too deep>"
    if " at 0x" in text:
        text = _without_address(text)
    return text if len(text) <= limit + 2 else clip(text, limit)


def show_call(name: str, *arguments: Any, **options: Any) -> str:
    """Return the call that makes an object, for its repr. Options that are None or False are left out.

    >>> show_call("Budget", usd=0.5, tokens=None), show_call("top_k", 3, key=len)
    ('Budget(usd=0.5)', 'top_k(3, key=len)')
    """
    shown = [_argument(value) for value in arguments]
    shown += [f"{key}={_argument(value)}" for key, value in options.items() if value is not None and value is not False]
    return f"{name}({', '.join(shown)})"


def _argument(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    return name.replace(".<locals>", "") if isinstance(name, str) else shorten(value)


QUOTE_LIMIT = 240
"""The number of characters of a reply that an error quotes."""

_NAMES_SHOWN = 12


def quote_ends(value: Any, limit: int = QUOTE_LIMIT) -> str:
    """Quote a value for an error; of a long text the beginning and the end.

    >>> quote_ends("abcdefgh", 4)
    "'ab' ... 'gh' (8 characters)"
    """
    if isinstance(value, str) and len(value) > limit:
        return f"{value[: limit // 2]!r} ... {value[-limit // 2 :]!r} ({len(value)} characters)"
    return shorten(value, limit)


def list_names(names: Sequence[str]) -> str:
    """Quote names for an error, twelve at most.

    >>> list_names(["a", "b"])
    "'a', 'b'"
    """
    shown = ", ".join(repr(name[:60]) for name in names[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")


def canonical_json(value: Any, hook: Callable[[Any], Any] | None = None) -> bytes:
    """Encode a value with sorted keys and no white space; `hook` encodes objects that JSON does not support.

    Equal values give equal bytes, and 1, 1.0 and True stay three values. Raises TypeError for an unsupported value,
    UnicodeEncodeError for a lone surrogate.

    >>> canonical_json({"b": 1, "a": [1.0, True]})
    b'{"a":[1.0,true],"b":1}'
    """
    return _encode(value) if hook is None else msgspec.json.encode(value, enc_hook=hook, order="deterministic")


_encode = msgspec.json.Encoder(order="deterministic").encode

MISSING: Any = type("Missing", (), {"__repr__": lambda _: "nothing"})()
"""Marks a value that is missing on one side of `json_changes`."""


def json_changes(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, value before, value after) for each difference of two JSON values; a value may be MISSING.

    >>> list(json_changes({"a": [1, 2], "b": 1}, {"a": [1, 3]}))
    [('a[1]', 2, 3), ('b', 1, nothing)]
    """
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**before, **after}:
            inner = f"{path}.{name}" if path else name
            yield from json_changes(before.get(name, MISSING), after.get(name, MISSING), inner)
    elif isinstance(before, list) and isinstance(after, list):
        for i in range(max(len(before), len(after))):
            old, new = (side[i] if i < len(side) else MISSING for side in (before, after))
            yield from json_changes(old, new, f"{path}[{i}]")
    elif before != after or type(before) is not type(after):
        yield path, before, after


def fenced_blocks(text: str) -> list[str]:
    r"""Return the content of each Markdown fence in a text.

    >>> fenced_blocks('It is:\n```json\n{"a": 1}\n```')
    ['{"a": 1}']
    """
    return re.findall(r"```(?:json)?\s*\n(.*?)\n?\s*```", text, re.DOTALL)


def strip_fence(text: str) -> str:
    r"""Return the content of the Markdown fence around a whole text; a text without one unchanged.

    >>> strip_fence("```python\n  def f():\n    return 1\n```"), strip_fence('```json {"a": 1}```')
    ('  def f():\n    return 1', ' {"a": 1}')
    """
    body = text.strip()
    if len(body) < 6 or not (body.startswith("```") and body.endswith("```")):
        return text
    return re.sub(r"```[ \t]*(?:[\w+#.-]*[ \t]*\n|json\b)?", "", body[:-3], count=1).removesuffix("\n")


# ---- prompt templates: {question} of str.format, {{question}} of Jinja and Mustache, $question of string.Template

_PLACEHOLDER = r"""(?x)
      \{\{ \s* (?P<mustache> [^\W\d][\w.]* ) \s* \}\}                            # {{question}}: Jinja, Mustache
    | (?<!\{) \{ (?P<brace> (?:[^\W\d]\w*|\d+) [^\s{}!:]* ) (?:![rsa])? (?::[^\s{}]*)? \}   # {question}: str.format
    | (?<!\$) \$ (?: \{ (?P<wrapped> [^\W\d]\w* ) \} | (?P<dollar> [^\W\d]\w* ) )  # $question: string.Template
    """  # not compiled at import: loading an agent needs no pattern
_SPELLED = {"mustache": "{{%s}}", "brace": "{%s}", "wrapped": "$%s", "dollar": "$%s"}


def placeholders(text: str) -> list[str]:
    r"""Return the placeholders of a template, each once, in the order of the text.

    `{name}` as in str.format, `{{name}}` as in Jinja, `$name` and `${name}` as in string.Template; `$$name` is an
    escape. Braces around anything but a name, as in JSON, are text.

    >>> placeholders("Answer {question} in {{ language }} for $user, as {'k': 1}.")
    ['{question}', '{{language}}', '$user']
    """
    if "{" not in text and "$" not in text:  # nearly always
        return []
    found = (_SPELLED[str(match.lastgroup)] % match[str(match.lastgroup)] for match in re.finditer(_PLACEHOLDER, text))
    return list(dict.fromkeys(found))


def fill(template: str, row: Any) -> str:
    """Return a template with its placeholders replaced by the columns of a row.

    A row is a mapping of columns by name, or any other value, which fills the template's only placeholder. Values are
    written as str does, with the format of `{score:.2f}`; `{user.name}` and `{items[0]}` look inside. Other braces are
    unchanged. Raises ConfigError for a column that the row lacks.

    >>> fill("Classify {ticket} for ${user}: {'k': 1}", {"ticket": "late", "user": "Ann"})
    "Classify late for Ann: {'k': 1}"
    >>> fill("Classify: {{ ticket }}", "late")
    'Classify: late'
    """
    names = {_name_of(match) for match in re.finditer(_PLACEHOLDER, template)}
    columns: Mapping[Any, Any]
    if isinstance(row, Mapping):
        columns = row
    elif len(names) > 1:
        raise ConfigError(
            f"Expected a row with the columns {list_names(sorted(names))}, got {type(row).__name__}; "
            "give each row as a dict of its columns"
        )
    else:
        columns = dict.fromkeys(names, row)

    def value(match: re.Match[str]) -> str:
        name = _name_of(match)
        if name not in columns:
            raise ConfigError(
                f"Expected a row with the column {name!r}, which the template names, got the columns "
                f"{list_names([str(column) for column in columns])}; rename the placeholder or the column"
            )
        if match["brace"] is None:
            return str(columns[name])
        return str(match[0].format_map({name: columns[name]}) if not name.isdigit() else columns[name])

    return re.sub(_PLACEHOLDER, value, template)


def _name_of(match: re.Match[str]) -> str:
    return re.split(r"[.\[]", match[str(match.lastgroup)], maxsplit=1)[0]


_CONTROLS = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]"


def printable(text: str) -> str:
    r"""Return a text without terminal control characters, because a recorded answer may hold anything.

    >>> print(printable("\x1b[2Jhello"))
    \x1b[2Jhello
    """
    return re.sub(_CONTROLS, lambda match: match[0].encode("unicode_escape").decode(), text)


def columns(head: Sequence[str], rows: Iterable[Sequence[str]], right: frozenset[str] = frozenset()) -> list[str]:
    """Return the lines of a table; the columns named in `right` are right-aligned.

    >>> columns(["name", "n"], [["a", "1"], ["bb", "10"]], frozenset({"n"}))
    ['name   n', 'a      1', 'bb    10']
    """
    cells = [list(head), *([printable(" ".join(cell.split("\n"))) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(head))]
    aligned = [
        [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, head, strict=True)
        ]
        for row in cells
    ]
    return ["  ".join(row).rstrip() for row in aligned]


def show_size(amount: int) -> str:
    """Return a number of bytes in readable form.

    >>> show_size(512), show_size(4_700), show_size(46_600_000)
    ('512 B', '4.7 kB', '46.6 MB')
    """
    if amount < 1_000:
        return f"{amount} B"
    return f"{amount / 1e3:.1f} kB" if amount < 1_000_000 else f"{amount / 1e6:.1f} MB"


def show_count(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> show_count(1, "exchange"), show_count(2000, "exchange")
    ('1 exchange', '2,000 exchanges')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
