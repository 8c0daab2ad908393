"""Files of other recorders: parsed within limits and without running code, and converted to vcrpy's interactions.

YAML is read as events, which are counted: only the few tags that recorders write are resolved, only texts, bytes,
numbers, lists and mappings are built, and an alias counts as everything that it refers to. So a code tag, an alias bomb
or a deep nest is refused after milliseconds.

HAR and Polly, go-vcr, nock, R's and PHP's vcr and Azure's test proxy are converted. A file of a tool that cannot be
converted is refused by the tool's name, with the remedy.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.errors import CassetteDamagedError, CassetteRefusedError

# Formats of other tools

Interaction = dict[str, Any]


# ---- interactions of vcrpy and similar files


def interactions_of(document: Any, where: str) -> list[Interaction]:
    """Return the interactions of a cassette, in vcrpy's shape.

    Raises CassetteDamagedError for any other document, CassetteRefusedError for an unsupported tool or version.
    """
    for is_of_tool, convert in _TOOLS:
        if is_of_tool(document):
            try:
                return list(convert(document))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                tool = convert.__name__.strip("_").replace("_", " ")
                raise CassetteDamagedError(
                    f"Expected what {tool} holds in {where}, got something else ({type(error).__name__}: {error}); "
                    "restore the file, or record again"
                ) from error
    for is_of_tool, name in _REFUSED:
        if is_of_tool(document):
            raise CassetteRefusedError(
                f"Expected a cassette in {where}, got {name}, which holds too little of its exchanges to be replayed; "
                "record again: delete it, or choose another name"
            )
    if isinstance(document, dict) and document.get("version", 1) != 1:
        raise CassetteRefusedError(
            f"Expected a cassette of version 1 in {where}, got version {document['version']!r}; "
            "a newer tool wrote it: upgrade"
        )
    items = document.get("interactions", document.get("http_interactions")) if isinstance(document, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise CassetteDamagedError(
            f"Expected a cassette (`interactions:`, a list of request and response) in {where}, "
            f"got {str(document)[:80]!r}; restore it, or delete it and record again"
        )
    return items


def _first(document: Any, name: str) -> Mapping[str, Any]:
    """Return the first of a document's items if it is a mapping, else {}."""
    items = document.get(name) if isinstance(document, dict) else document
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}


def _listed_exchange(document: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return request and response of the first item of a list, {} and {} of any other document."""
    first = _first(document, "") if isinstance(document, list) else {}
    asked, answered = first.get("request"), first.get("response")
    return (asked, answered) if isinstance(asked, dict) and isinstance(answered, dict) else ({}, {})


def _made(method: str, url: str, body: Any, headers: Any, answer: Interaction) -> Interaction:
    return {"request": {"method": method, "uri": url, "body": body, "headers": headers}, "response": answer}


def _answer(code: Any, message: Any, headers: Any, body: Any) -> Interaction:
    return {"status": {"code": int(code), "message": message or ""}, "headers": headers, "body": {"string": body}}


def _listed(headers: Any) -> list[tuple[str, Any]]:
    """Return headers given as a list of names and values."""
    return [(header["name"], header["value"]) for header in headers or () if not header["name"].startswith(":")]


def _plain(headers: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the headers of a body that was written without its content coding."""
    return [header for header in headers if header[0].lower() != "content-encoding"]


# HAR: browsers, proxies, Polly.JS


# ---- formats of other tools


def _is_har(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("log"), dict) and "entries" in document["log"]


def _an_HTTP_archive(document: Any) -> Iterator[Interaction]:  # noqa: N802 - it is named in an error
    for entry in document["log"]["entries"]:
        asked, answered = entry["request"], entry["response"]
        if not answered["status"]:  # blocked, or cut off
            continue
        sent, content = asked.get("postData") or {}, answered.get("content") or {}
        body = sent.get("text")
        if body is None and sent.get("params"):
            from urllib.parse import urlencode

            body = urlencode([(pair["name"], pair.get("value", "")) for pair in sent["params"]])
        if "text" not in content and content.get("size", 0) > 0:
            raise CassetteRefusedError(
                f"Expected an HTTP archive with the bodies of its answers, got one without that of {asked['url']}; "
                'export it again "with content"'
            )
        text = content.get("text") or ""
        is_packed = content.get("encoding") == "base64"
        answer = _answer(
            answered["status"],
            answered.get("statusText"),
            _plain(_listed(answered.get("headers"))),
            base64.b64decode(text) if is_packed else text,
        )
        yield _made(asked["method"], asked["url"], body, _listed(asked.get("headers")), answer)


# go-vcr, from its first version


_GO_VCR = 2  # the keys of its third and fourth version


def _is_go_vcr(document: Any) -> bool:
    first = _first(document, "interactions")
    if not first:
        return isinstance(document, dict) and document.get("version") == _GO_VCR and "interactions" in document
    asked, answered = first.get("request"), first.get("response")
    return isinstance(asked, dict) and "url" in asked and isinstance(answered, dict) and "code" in answered


def _a_cassette_of_go_vcr(document: Any) -> Iterator[Interaction]:
    for item in document["interactions"] or ():
        asked, answered = item["request"], item["response"]
        message = str(answered.get("status") or "").partition(" ")[2]
        is_plain = answered.get("uncompressed", False)
        headers = [(name, value) for name, value in (answered.get("headers") or {}).items()]
        answer = _answer(
            answered["code"], message, _plain(headers) if is_plain else headers, answered.get("body") or ""
        )
        yield _made(asked["method"], asked["url"], asked.get("body") or None, asked.get("headers") or {}, answer)


# nock


def _is_nock(document: Any) -> bool:
    return {"scope", "path", "status"} <= _first(document, "").keys()


def _a_recording_of_nock(document: Any) -> Iterator[Interaction]:
    for item in document:
        raw = item.get("rawHeaders") or item.get("headers") or item.get("reqheaders") or {}
        headers = list(zip(raw[::2], raw[1::2], strict=True)) if isinstance(raw, list) else list(raw.items())
        body, answered = item.get("body"), item.get("response")
        if item.get("responseIsBinary"):
            answered = bytes.fromhex(answered)
        elif isinstance(answered, list) and answered and all(isinstance(part, str) for part in answered):
            answered = b"".join(map(bytes.fromhex, answered))  # pieces of a body with a content coding
        if not isinstance(answered, str | bytes):
            answered = "" if answered is None else msgspec.json.encode(answered)
        asked = msgspec.json.encode(body) if isinstance(body, dict | list) else body or None
        yield _made(
            item["method"], f"{item['scope']}{item['path']}", asked, {}, _answer(item["status"], "", headers, answered)
        )


# vcr of R


def _is_r(document: Any) -> bool:
    answered = _first(document, "http_interactions").get("response")
    status = answered.get("status") if isinstance(answered, dict) else None
    return isinstance(status, dict) and "status_code" in status


def _a_cassette_of_R(document: Any) -> Iterator[Interaction]:  # noqa: N802 - it is named in an error
    for item in document["http_interactions"]:
        status = item["response"]["status"]
        yield {
            "request": item["request"],
            "response": {
                **item["response"],
                "status": {"code": status["status_code"], "message": status.get("message")},
            },
        }


# PHP-VCR, and other lists of request and response


def _is_php(document: Any) -> bool:
    asked, answered = _listed_exchange(document)
    return {"method", "url"} <= asked.keys() and "status" in answered


def _a_cassette_of_PHP(document: Any) -> Iterator[Interaction]:  # noqa: N802 - it is named in an error
    for item in document:
        asked, answered = item["request"], item["response"]
        status = answered["status"]
        code, message = (status["code"], status.get("message")) if isinstance(status, dict) else (status, "")
        answer = _answer(code, message, answered.get("headers") or {}, answered.get("body") or "")
        yield _made(asked["method"], asked["url"], asked.get("body"), asked.get("headers") or {}, answer)


# vcrpy's own files before version 1


def _is_format_0(document: Any) -> bool:
    asked, answered = _listed_exchange(document)
    return {"protocol", "host", "path"} <= asked.keys() and "status" in answered


def _a_cassette_of_vcrpy_0(document: Any) -> Iterator[Interaction]:
    for item in document:
        asked, answered = item["request"], item["response"]
        url = f"{asked['protocol']}://{asked['host']}:{asked['port']}{asked['path']}"
        lines = answered.get("headers") or []
        headers = lines if isinstance(lines, dict) else [line.rstrip().split(": ", 1) for line in lines]
        response = {**answered, "headers": headers}
        yield _made(asked["method"], url, asked.get("body"), asked.get("headers") or {}, response)


# Azure's test proxy


def _is_azure(document: Any) -> bool:
    return {"RequestUri", "StatusCode"} <= _first(document, "Entries").keys()


def _a_recording_of_the_test_proxy(document: Any) -> Iterator[Interaction]:
    for item in document["Entries"]:
        body, answered = item.get("RequestBody"), item.get("ResponseBody")
        asked = body if isinstance(body, str | None) else msgspec.json.encode(body)
        text = answered if isinstance(answered, str) else "" if answered is None else msgspec.json.encode(answered)
        answer = _answer(item["StatusCode"], "", item.get("ResponseHeaders") or {}, text)
        yield _made(item["RequestMethod"], item["RequestUri"], asked, item.get("RequestHeaders") or {}, answer)


# Known but unsupported tools


def _is_wiremock(document: Any) -> bool:
    if not isinstance(document, dict):
        return False
    one = _first(document, "mappings") or document
    return (
        isinstance(one.get("request"), dict)
        and isinstance(one.get("response"), dict)
        and "interactions" not in document
    )


_TOOLS: tuple[tuple[Callable[[Any], bool], Callable[[Any], Iterator[Interaction]]], ...] = (
    (_is_har, _an_HTTP_archive),
    (_is_go_vcr, _a_cassette_of_go_vcr),
    (_is_nock, _a_recording_of_nock),
    (_is_r, _a_cassette_of_R),
    (_is_php, _a_cassette_of_PHP),
    (_is_format_0, _a_cassette_of_vcrpy_0),
    (_is_azure, _a_recording_of_the_test_proxy),
)


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda document: isinstance(document, dict) and document.keys() >= set(names)


_REFUSED: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (_has("consumer", "provider"), "a contract of Pact"),
    (_has("info", "item"), "a collection of Postman"),
    (_has("_type", "__export_format"), "an export of Insomnia"),
    (lambda document: _has("data", "meta")(document) and _has("pairs")(document["data"]), "a simulation of Hoverfly"),
    (_is_wiremock, "a mapping of WireMock"),
    (
        lambda document: _has("responses")(document) and "response" in _first(document, "responses"),
        "a recording of `responses`",
    ),
    (
        lambda document: isinstance(document, dict) and isinstance(document.get("interactions"), dict),
        "a cassette whose interactions are a mapping, as of mlx",
    ),
)


# YAML and JSON within limits


# ---- parsing YAML within limits


class Budget(Struct, frozen=True):
    """The limits of a document: total bytes, nesting, nodes, and nodes repeated by aliases.

    `total` is the maximum size of its exchanges in bytes, with every alias expanded and every body decompressed.
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
_MAP = _TAG + "map"
_TEXT_ONLY = frozenset({str})
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
    """Return the document's value, and the first line of each mapping in it (by id).

    Raises CassetteRefusedError beyond the limits or for a tag that is not data, CassetteDamagedError for invalid
    syntax.
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
    """Raise CassetteRefusedError for more bytes than the limit, or for a long text in the wrong place.

    A body may be long, in one line or many; a text in place of a request would only cost memory.
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
            scalar, stack, known, most = yaml.ScalarEvent, self._stack, self._known, self._budget.nodes
            steps = {
                yaml.ScalarEvent: self._text,
                yaml.AliasEvent: self._repeat,
                yaml.MappingStartEvent: self._start_map,
                yaml.SequenceStartEvent: self._start_list,
                yaml.MappingEndEvent: self._end,
                yaml.SequenceEndEvent: self._end,
            }
            for event in iter(loader.get_event, None):
                if type(event) is scalar and event.tag is None and event.anchor is None and stack:  # nearly always
                    self._nodes += 1
                    if self._nodes > most:
                        self._count(event, 0)
                    value = event.value
                    if event.implicit[0]:
                        value = known[value] if value in known else self._plain(value)
                    stack[-1].items.append(value)
                elif step := steps.get(type(event)):
                    step(event)
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

    def _text(self, event: Any) -> None:
        self._count(event)
        self._add(self._scalar(event), event.anchor, 1)

    def _start_map(self, event: Any) -> None:
        self._start(event, is_map=True)

    def _start_list(self, event: Any) -> None:
        self._start(event, is_map=False)

    def _start(self, event: Any, *, is_map: bool) -> None:
        self._count(event)
        if len(self._stack) >= self._budget.depth:
            raise self._refuse(event, f"nesting up to {self._budget.depth}", "a deeper one")
        self._stack.append(_Open(event, is_map=is_map, nodes_before=self._nodes - 1))

    def _end(self, event: Any) -> None:
        closed = self._stack.pop()
        self._add(self._collection(closed, event), closed.anchor, self._nodes - closed.nodes_before)

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
        """Return the value of an unquoted scalar; a date stays a text.

        Cached, because most are names and headers, which repeat.
        """
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
        tag, items = closed.tag, closed.items
        if not closed.is_map:
            if tag is None or tag in _LISTS:
                return items
            if tag.endswith(".istr") and items:  # a case-insensitive header name of aiohttp
                return items[0]
            raise self._refuse(event, "data", f"the tag {tag!r}")
        names, values = items[::2], items[1::2]
        is_plain = _TEXT_ONLY.issuperset(map(type, names))
        value = dict(zip(names, values, strict=True) if is_plain else self._pairs(names, values, event))
        if tag is None or tag == _MAP:
            self._lines[id(value)] = closed.line
            return value
        if tag == _BYTES_IO:
            return (value.get("state") or (b"",))[0]
        if tag == _ITERATOR:
            return (value.get("args") or ([],))[0]
        if tag.endswith(".istr"):
            return (value.get("args") or ("",))[0]
        raise self._refuse(event, "data", f"the tag {tag!r}")

    def _pairs(self, names: list[Any], values: list[Any], event: Any) -> Iterator[tuple[str, Any]]:
        for name, value in zip(names, values, strict=True):
            if isinstance(name, list | dict):
                raise self._refuse(event, "texts as keys", f"a {type(name).__name__}")
            yield name.decode(errors="replace") if isinstance(name, bytes) else str(name), value

    def _refuse(self, event: Any, expected: str, got: str) -> CassetteRefusedError:
        return _refused(self._where, event.start_mark.line + 1, expected, got)
