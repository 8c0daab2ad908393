"""Load: seconds and memory to open a cassette, in both layouts, beside vcrpy's YAML and JSON; vcrpy reading ours."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Measured, Options, call, measure, run_case
from benchmarks.replay import record, stock_exchange
from benchmarks.report import Report, Target

SIZES = (100, 1_000, 10_000)
NEEDS = ("vcr", "aiohttp")


def run(options: Options) -> Report:
    sizes = SIZES[:2] if options.quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        cases = [case for n in sizes for case in prepared(Path(folder), n, options)]
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


def targets(measured: Measured, n: int) -> list[Target]:
    ours, yaml = f"ours, journal {n}", f"vcrpy, its YAML {n}"
    return [
        Target(f"open {n}", measured.median(ours, "cpu_s"), 0.25, "s"),
        Target(f"open {n}, of vcrpy's YAML", measured.ratio(ours, yaml, "cpu_s"), 1 / 30, "x"),
        Target(f"open {n}, of vcrpy's JSON", measured.ratio(ours, f"vcrpy, its JSON {n}", "cpu_s"), 1 / 5, "x"),
        Target(f"memory at {n}, of vcrpy's", measured.ratio(ours, yaml, "rss_mb"), 1 / 3, "x"),
        Target("vcrpy: our journal / its YAML", measured.ratio(f"vcrpy, our journal {n}", yaml, "cpu_s"), 1.1, "x"),
        Target("vcrpy: our readable / its YAML", measured.ratio(f"vcrpy, our readable {n}", yaml, "cpu_s"), 1.1, "x"),
    ]


# What runs in the processes ------------------------------------------------------------------------------------------


async def write_ours(journal: str, readable: str, n: int) -> dict[str, float]:
    from aggregator.cassettes import saving
    from aggregator.cassettes.reading import read

    await record(journal, n - 1)  # it adds one to warm up on
    recording = read(Path(journal))
    assert recording is not None
    saving.SHARD_BYTES = 1 << 40  # one file, since stock vcrpy is given one
    for path, layout in ((journal, "journal"), (readable, "readable")):
        saving.save(Path(path), recording.rows, layout)  # type: ignore[arg-type]
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
    from aggregator.cassettes.opening import open_tape

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
