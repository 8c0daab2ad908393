"""Other recorders' files as vcrpy's interactions: HAR and Polly, go-vcr, nock, R's and PHP's vcr, Azure's test proxy.

A file of a tool that cannot be converted is refused by the tool's name, with what to do instead.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from aggregator.errors import CassetteDamagedError, CassetteRefusedError

Interaction = dict[str, Any]


def interactions_of(document: Any, where: str) -> list[Interaction]:
    """Return the interactions of a cassette, in vcrpy's shape.

    Raises CassetteDamagedError for what is no cassette, CassetteRefusedError for a tool or a version that is not read.
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


_GO_VCR = 2  # what its third and fourth version write


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
    first = _first(document, "") if isinstance(document, list) else {}
    return (
        isinstance(first.get("request"), dict) and "url" in first["request"] and isinstance(first.get("response"), dict)
    )


def _a_cassette_of_PHP(document: Any) -> Iterator[Interaction]:  # noqa: N802 - it is named in an error
    for item in document:
        asked, answered = item["request"], item["response"]
        status = answered["status"]
        code, message = (status["code"], status.get("message")) if isinstance(status, dict) else (status, "")
        answer = _answer(code, message, answered.get("headers") or {}, answered.get("body") or "")
        yield _made(asked["method"], asked["url"], asked.get("body"), asked.get("headers") or {}, answer)


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


# Tools that are known and not read


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
    (_is_azure, _a_recording_of_the_test_proxy),
)
_REFUSED: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (_is_wiremock, "a mapping of WireMock"),
    (lambda document: "response" in _first(document, "responses"), "a recording of `responses`"),
    (
        lambda document: isinstance(document, dict) and isinstance(document.get("interactions"), dict),
        "a cassette whose interactions are a mapping, as of mlx",
    ),
)
