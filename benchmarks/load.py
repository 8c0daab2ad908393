"""Load: seconds and memory to open a cassette, in both layouts, against vcrpy's YAML and JSON; vcrpy reading ours.

And what other tools' files cost us, a MB: read, and looked through for secrets.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import traffic
from benchmarks.harness import Case, Measured, Options, call, measure, run_case
from benchmarks.replay import record, stock_exchange
from benchmarks.report import Report, Target

SIZES = (100, 1_000, 10_000)
NEEDS = ("vcr", "aiohttp")


def run(options: Options) -> Report:
    sizes = SIZES[:2] if options.quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        cases = [case for n in sizes for case in prepared(Path(folder), n, options)]
        cases += [*foreign(Path(folder)), *looks()]
        measured = measure(cases, options, repetitions=3)
    return Report(
        rows=measured.rows(),
        targets=targets(measured, sizes[-1]),
        missing=measured.missing,
        versions=measured.versions,
        notes=[
            "open: the file read, checked against its hash, its exchanges indexed",
            "rss_mb: the process's largest resident size, interpreter and libraries included",
            "vcrpy reads YAML by libyaml's C loader",
            "s_per_mb: CPU seconds to open a MB of a file of vcrpy's or a HAR file; long: 12 answers of 400 KB each",
            "look: CPU milliseconds to look for secrets in 100 KB of an answer, as it is recorded",
        ],
    )


def prepared(folder: Path, n: int, options: Options) -> list[Case]:
    """Write the same n exchanges in each format, and return who is to load them."""
    journal, readable, yaml, json = (
        str(folder / f"{n}.{kind}") for kind in ("yaml", "readable.yaml", "vcr.yaml", "vcr.json")
    )
    run_case(Case("write", call("load", "write_ours", journal=journal, readable=readable, n=n)))
    cases = [
        Case(f"ours, journal {n}", call("load", "ours", path=journal, n=n)),
        Case(f"ours, readable {n}", call("load", "ours", path=readable, n=n)),
        Case(f"vcrpy, its YAML {n}", call("load", "vcrpy", path=yaml, n=n, format="yaml"), NEEDS),
        Case(f"vcrpy, its JSON {n}", call("load", "vcrpy", path=json, n=n, format="json"), NEEDS),
        Case(f"vcrpy, our journal {n}", call("load", "vcrpy", path=journal, n=n, format="yaml"), NEEDS),
        Case(f"vcrpy, our readable {n}", call("load", "vcrpy", path=readable, n=n, format="yaml"), NEEDS),
    ]
    write = Case("write", call("load", "write_vcrpy", yaml=yaml, json=json, n=n), NEEDS)
    measure([write], Options(peers_python=options.peers_python), repetitions=1)
    return cases


FOREIGN = ("yaml long", "yaml short", "json short", "har long")
LOOKS = ("prose", "fields", "base64", "embeddings", "stream")


def foreign(folder: Path) -> list[Case]:
    """Write other tools' files, and return the opening of each."""
    cases = []
    for kind in FOREIGN:
        path = str(folder / f"{kind.replace(' ', '-')}.{kind.split()[0]}")
        run_case(Case("write", call("load", "write_foreign", path=path, kind=kind)))
        cases.append(Case(f"ours, foreign {kind}", call("load", "open_foreign", path=path)))
    return cases


def looks() -> list[Case]:
    """Return a look for secrets at each kind of answer."""
    return [Case(f"look at {kind}", call("load", "look", kind=kind)) for kind in LOOKS]


def targets(measured: Measured, n: int) -> list[Target]:
    ours, yaml = f"ours, journal {n}", f"vcrpy, its YAML {n}"
    return [
        Target(f"open {n}", measured.median(ours, "cpu_s"), 0.25, "s"),
        Target(f"open {n}, of vcrpy's YAML", measured.ratio(ours, yaml, "cpu_s"), 1 / 30, "x"),
        Target(f"open {n}, of vcrpy's JSON", measured.ratio(ours, f"vcrpy, its JSON {n}", "cpu_s"), 1 / 5, "x"),
        Target(f"memory at {n}, of vcrpy's", measured.ratio(ours, yaml, "rss_mb"), 1 / 3, "x"),
        Target("vcrpy: our journal / its YAML", measured.ratio(f"vcrpy, our journal {n}", yaml, "cpu_s"), 1.1, "x"),
        Target("vcrpy: our readable / its YAML", measured.ratio(f"vcrpy, our readable {n}", yaml, "cpu_s"), 1.1, "x"),
        *(
            Target(f"foreign {kind}, a MB", measured.median(f"ours, foreign {kind}", "s_per_mb"), 0.03, "s")
            for kind in FOREIGN
        ),
        *(
            Target(f"look at {kind}, 100 KB", measured.median(f"look at {kind}", "look_ms"), 1.0, "ms")
            for kind in LOOKS
        ),
    ]


# What runs in the processes ------------------------------------------------------------------------------------------


async def write_ours(journal: str, readable: str, n: int) -> dict[str, float]:
    from aggregator.cassettes import storage
    from aggregator.cassettes.storage import read

    await record(journal, n - 1)  # it adds one to warm up on
    recording = read(Path(journal))
    assert recording is not None
    storage.SHARD_BYTES = 1 << 40  # one file, since stock vcrpy is given one
    for path, layout in ((journal, "journal"), (readable, "readable")):
        storage.save(Path(path), recording.rows, layout)  # type: ignore[arg-type]
    return {"exchanges": n}


def write_vcrpy(yaml: str, json: str, n: int) -> dict[str, float]:
    from vcr.serialize import serialize
    from vcr.serializers import jsonserializer, yamlserializer

    exchanges = [stock_exchange(i) for i in range(n)]
    for path, serializer in ((yaml, yamlserializer), (json, jsonserializer)):
        content: dict[str, Any] = {"requests": [e[0] for e in exchanges], "responses": [e[1] for e in exchanges]}
        Path(path).write_text(serialize(content, serializer), encoding="utf-8")
    return {"exchanges": n}


def figures(start: float, cpu: float, path: str) -> dict[str, float]:
    import resource

    stop, cpu_stop = time.perf_counter(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = Path(path).stat().st_size / 1e6
    return {"cpu_s": cpu_stop - cpu, "s": stop - start, "rss_mb": peak, "file_mb": size}


def ours(path: str, n: int) -> dict[str, float]:
    from aggregator.cassettes.recorder import open_tape

    start, cpu = time.perf_counter(), time.process_time()
    tape = open_tape(path, "none")
    found = figures(start, cpu, path)
    assert len(tape.unplayed()) == n
    return found


def vcrpy(path: str, n: int, format: str) -> dict[str, float]:  # noqa: A002 - vcrpy's word
    from vcr.cassette import Cassette
    from vcr.serializers import jsonserializer, yamlserializer

    start, cpu = time.perf_counter(), time.process_time()
    cassette = Cassette.load(path=path, serializer=jsonserializer if format == "json" else yamlserializer)
    found = figures(start, cpu, path)
    assert len(cassette) == n
    return found


def write_foreign(path: str, kind: str) -> dict[str, float]:
    """Write vcrpy's YAML or JSON, or a HAR file: 12 exchanges with long answers, or 1,000 with short ones."""
    import json

    import yaml

    tool, length = kind.split()
    count, words = (12, 65_000) if length == "long" else (1_000, 330)
    items = []
    for i in range(count):
        answer = {"id": f"chatcmpl-{i}", "choices": [{"message": {"content": traffic.text(i, words)}}]}
        headers = {
            "Content-Type": ["application/json"],
            "Date": ["Tue, 01 Jan 2030 00:00:00 GMT"],
            "x-request-id": [f"r{i}"],
        }
        asked = {"method": "POST", "uri": traffic.URL, "body": traffic.body(i).decode(), "headers": dict(headers)}
        status = {"code": 200, "message": "OK"}
        items.append(
            {
                "request": asked,
                "response": {"status": status, "headers": headers, "body": {"string": json.dumps(answer)}},
            }
        )
    document: Any = {"version": 1, "interactions": items}
    if tool == "har":
        document = {"log": {"entries": [har_entry(item) for item in items]}}
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text = yaml.dump(document, Dumper=dumper) if tool == "yaml" else json.dumps(document)
    Path(path).write_text(text, encoding="utf-8")
    return {"exchanges": count}


def har_entry(item: dict[str, Any]) -> dict[str, Any]:
    asked, answered = item["request"], item["response"]
    headers = [{"name": name, "value": values[0]} for name, values in asked["headers"].items()]
    content = {"mimeType": "application/json", "text": answered["body"]["string"]}
    return {
        "request": {"method": "POST", "url": asked["uri"], "headers": headers, "postData": {"text": asked["body"]}},
        "response": {"status": 200, "statusText": "OK", "headers": headers, "content": content},
    }


def open_foreign(path: str) -> dict[str, float]:
    from aggregator.cassettes.storage import read

    start, cpu = time.perf_counter(), time.process_time()
    recording = read(Path(path))
    found = figures(start, cpu, path)
    assert recording is not None
    assert len(recording.rows) in (12, 1_000)
    return {**found, "s_per_mb": found["cpu_s"] / found["file_mb"]}


def answer_of(kind: str) -> bytes:
    """Return about 100 KB of an answer."""
    import base64
    import json
    import random

    numbers = random.Random(1)
    if kind == "prose":
        return json.dumps({"choices": [{"message": {"content": traffic.text(1, 17_000)}}]}).encode()
    if kind == "fields":
        row = {
            "name": "abc def",
            "score": 0.5,
            "token_count": 3,
            "at": "2030-01-01T00:00:00Z",
            "url": "https://a.example/b",
        }
        return json.dumps({"data": [{"id": i, **row} for i in range(800)]}).encode()
    if kind == "base64":
        return json.dumps({"b64_json": base64.b64encode(numbers.randbytes(75_000)).decode()}).encode()
    if kind == "embeddings":
        return json.dumps(
            {"data": [{"embedding": [numbers.random() for _ in range(1_250)]} for _ in range(4)]}
        ).encode()
    events = [
        {"id": "chatcmpl-9aBcDeFgHiJk", "model": "m", "choices": [{"index": 0, "delta": {"content": f"{word} "}}]}
        for word in traffic.text(1, 850).split()
    ]
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()


def look(kind: str) -> dict[str, float]:
    from aggregator.cassettes.redaction import redact_body
    from aggregator.cassettes.secrets import needles_of

    body, needles = answer_of(kind), needles_of(frozenset({"sk-" + "0123456789abcdef" * 3}))
    assert redact_body(body, needles)[0] == body  # and warm
    cpu = time.process_time()
    for _ in range(50):
        redact_body(body, needles)
    return {"look_ms": (time.process_time() - cpu) / 50 * 1e3 / len(body) * 1e5}
