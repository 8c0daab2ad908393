"""YAML and JSON from strangers, within stated budgets and without code.

YAML is read as events, counted as they come: no tag is resolved beyond the few that recorders write, nothing
is built but texts, bytes, numbers, lists and mappings, and an alias counts as all it stands for. So a code
tag, an alias bomb or a deep nest is refused after milliseconds.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.errors import CassetteDamagedError, CassetteRefusedError


class Budget(Struct, frozen=True):
    """How much a document may hold: bytes in all, nesting, nodes, and nodes that aliases repeat.

    `total` is how many bytes its exchanges may be, with every alias written out and every body unpacked.
    """

    size: int = 64 << 20
    depth: int = 64
    nodes: int = 4_000_000
    repeated: int = 200_000
    total: int = 256 << 20


BUDGET = Budget()
_LONG_LINE = 8 << 20
_NO_TEXT = re.compile(
    rb"[ \t-]*[\"']?(?:request|response|interactions|http_interactions|headers|status|version|method)[\"']?\s*:"
)
_LONGEST_NUMBER = 64
_MOST_KNOWN = 10_000
_TAG = "tag:yaml.org,2002:"
_TEXTS = {_TAG + "str", _TAG + "python/str", _TAG + "python/unicode", "!str"}
_BINARIES = {_TAG + "binary", "!binary"}
_LISTS = {_TAG + "seq", _TAG + "python/tuple"}
_BYTES_IO = _TAG + "python/object/new:_io.BytesIO"
_ITERATOR = _TAG + "python/object/apply:builtins.iter"


class _Open:
    """A list or mapping under construction."""

    __slots__ = ("anchor", "is_map", "items", "line", "nodes_before", "tag")

    def __init__(self, event: Any, *, is_map: bool, nodes_before: int) -> None:
        self.items: list[Any] = []
        self.is_map, self.nodes_before = is_map, nodes_before
        self.anchor, self.tag, self.line = event.anchor, event.tag, event.start_mark.line + 1


def parse_document(data: bytes, where: str, budget: Budget = BUDGET) -> tuple[Any, dict[int, int]]:
    """Return the document's value, and for each mapping in it (by id) the line it starts at.

    Raises CassetteRefusedError over budget or for a tag that is not data, CassetteDamagedError for bad syntax.
    """
    refuse_large(data, where, budget)
    if data[:64].lstrip()[:1] in (b"{", b"["):
        try:
            return msgspec.json.decode(data), {}
        except RecursionError:
            raise _refused(where, 1, f"nesting up to {budget.depth}", "a deeper one") from None
        except msgspec.DecodeError:
            pass  # YAML's flow style looks alike
    return _Builder(where, budget).build(data)


def refuse_large(data: bytes, where: str, budget: Budget = BUDGET) -> None:
    """Raise CassetteRefusedError for more bytes than the budget, or for a long text where no text belongs.

    A body may be as long as it is, in one line or many; a text in the place of a request would only cost memory.
    """
    if len(data) > budget.size:
        raise _refused(where, 1, f"at most {budget.size >> 20} MB", f"{len(data) >> 20} MB")
    window = _LONG_LINE // 2  # a longer line covers one of these whole
    for start in range(0, len(data) - window + 1, window):
        if data.find(b"\n", start, start + window) < 0:
            begin = data.rfind(b"\n", 0, start) + 1
            if _NO_TEXT.match(data, begin):
                line = data.count(b"\n", 0, begin) + 1
                raise _refused(where, line, "a mapping or a list under this name", "a long text")


def _refused(where: str, line: int, expected: str, got: str) -> CassetteRefusedError:
    return CassetteRefusedError(
        f"Expected a cassette with {expected}, got {got} - at {where}:{line}; "
        "nothing of it was used. Do not trust this file, or split it if it is yours"
    )


class _Builder:
    """Builds values from YAML events."""

    def __init__(self, where: str, budget: Budget) -> None:
        from yaml import SafeLoader

        self._where, self._budget = where, budget
        self._stack: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._lines: dict[int, int] = {}
        self._known: dict[str, Any] = {}
        self._nodes = self._repeated = 0
        self._scalars: Any = SafeLoader("")
        self._root: list[Any] = []

    def build(self, data: bytes) -> tuple[Any, dict[int, int]]:
        """Consume the whole document."""
        import yaml

        try:
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(data.removeprefix(b"\xef\xbb\xbf"))
            scalar, stack = yaml.ScalarEvent, self._stack
            while loader.check_event():
                event = loader.get_event()
                if type(event) is scalar and event.tag is None and event.anchor is None and stack:  # nearly always
                    self._count(event)
                    stack[-1].items.append(self._plain(event.value) if event.implicit[0] else event.value)
                else:
                    self._take(event, type(event).__name__)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = mark.line + 1 if mark else 1
            problem = " ".join(f"{getattr(error, 'problem', error)}".split())
            raise CassetteDamagedError(
                f"Expected YAML, got {problem} - at {self._where}:{line}; "
                "the file was cut or edited: restore it, or delete it and record again"
            ) from None
        except RecursionError as error:
            raise CassetteDamagedError(
                f"Expected nesting that Python can follow, got {error} - in {self._where}"
            ) from None
        if len(self._root) != 1:
            raise CassetteDamagedError(f"Expected one document, got {len(self._root)} - in {self._where}")
        return self._root[0], self._lines

    def _take(self, event: Any, kind: str) -> None:
        if kind == "ScalarEvent":
            self._count(event)
            value = self._scalar(event)
            self._add(value, event.anchor, 1)
        elif kind in ("MappingStartEvent", "SequenceStartEvent"):
            self._count(event)
            if len(self._stack) >= self._budget.depth:
                raise self._refuse(event, f"nesting up to {self._budget.depth}", "a deeper one")
            self._stack.append(_Open(event, is_map=kind == "MappingStartEvent", nodes_before=self._nodes - 1))
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            closed = self._stack.pop()
            self._add(self._collection(closed, event), closed.anchor, self._nodes - closed.nodes_before)
        elif kind == "AliasEvent":
            self._repeat(event)

    def _count(self, event: Any, nodes: int = 1) -> None:
        self._nodes += nodes
        if self._nodes > self._budget.nodes:
            raise self._refuse(event, f"at most {self._budget.nodes} nodes", "more")

    def _repeat(self, event: Any) -> None:
        if event.anchor not in self._anchors:
            raise CassetteDamagedError(
                f"Expected an anchor before its alias, got *{event.anchor} alone - "
                f"at {self._where}:{event.start_mark.line + 1}"
            )
        value, nodes = self._anchors[event.anchor]
        self._repeated += nodes
        if self._repeated > self._budget.repeated:
            raise self._refuse(event, f"aliases that repeat at most {self._budget.repeated} nodes", "more")
        self._count(event, nodes)
        self._add(value, None, 0)

    def _add(self, value: Any, anchor: str | None, nodes: int) -> None:
        (self._stack[-1].items if self._stack else self._root).append(value)
        if anchor is not None:
            self._anchors[anchor] = (value, nodes)

    def _scalar(self, event: Any) -> Any:
        tag, text = event.tag, event.value
        if tag in _BINARIES:
            try:
                return base64.b64decode(text)
            except (binascii.Error, ValueError):
                raise self._refuse(event, "base64 under !!binary", f"{text[:40]!r}") from None
        if tag in _TEXTS or (tag is not None and tag.endswith(".istr")):
            return text
        if tag in (None, "!"):
            return self._plain(text) if tag is None and event.implicit[0] else text
        if tag.removeprefix(_TAG) in ("int", "float", "bool", "null"):
            return self._number(tag, text)
        raise self._refuse(event, "data", f"the tag {tag!r}")

    def _plain(self, text: str) -> Any:
        """Return what an unquoted scalar stands for; a date stays a text. Most are names and headers, and repeat."""
        import yaml

        if len(text) > _LONGEST_NUMBER or not text.isascii():
            return text
        if text not in self._known:
            if len(self._known) > _MOST_KNOWN:
                self._known.clear()
            self._known[text] = self._number(self._scalars.resolve(yaml.ScalarNode, text, (True, False)), text)
        return self._known[text]

    def _number(self, tag: str, text: str) -> Any:
        import yaml

        node = yaml.ScalarNode(tag, text)
        kind = tag.removeprefix(_TAG)
        try:
            if kind == "int":
                return self._scalars.construct_yaml_int(node)
            if kind == "float":
                return self._scalars.construct_yaml_float(node)
            if kind == "bool":
                return self._scalars.construct_yaml_bool(node)
        except (ValueError, KeyError, OverflowError):
            return text
        return None if kind == "null" else text

    def _collection(self, closed: _Open, event: Any) -> Any:
        tag = closed.tag
        if not closed.is_map:
            if tag is None or tag in _LISTS:
                return closed.items
            if tag.endswith(".istr") and closed.items:  # a case-insensitive header name of aiohttp
                return closed.items[0]
            raise self._refuse(event, "data", f"the tag {tag!r}")
        value = dict(self._pairs(closed, event))
        if tag in (None, _TAG + "map"):
            self._lines[id(value)] = closed.line
            return value
        if tag == _BYTES_IO:
            return (value.get("state") or (b"",))[0]
        if tag == _ITERATOR:
            return (value.get("args") or ([],))[0]
        if tag.endswith(".istr"):
            return (value.get("args") or ("",))[0]
        raise self._refuse(event, "data", f"the tag {tag!r}")

    def _pairs(self, closed: _Open, event: Any) -> Iterator[tuple[str, Any]]:
        for name, value in zip(closed.items[::2], closed.items[1::2], strict=True):
            if isinstance(name, list | dict):
                raise self._refuse(event, "texts as keys", f"a {type(name).__name__}")
            yield name.decode(errors="replace") if isinstance(name, bytes) else str(name), value

    def _refuse(self, event: Any, expected: str, got: str) -> CassetteRefusedError:
        return _refused(self._where, event.start_mark.line + 1, expected, got)
