"""Both layouts of a file: exact, canonical, sharded, and readable by stock vcrpy."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import vcr.serialize
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest_recording._vcr import load_cassette
from vcr.serializers import yamlserializer

from aggregator.cassettes import storage
from aggregator.cassettes.blocks import scalar
from aggregator.cassettes.exchanges import Exchange, Facts, Row, decode_line, encode_line, index_lines
from aggregator.cassettes.journal import Layout
from aggregator.cassettes.matching import raw_key
from aggregator.cassettes.storage import canonical_order, read, save
from aggregator.errors import CassetteDamagedError
from aggregator.records import HTTPReply, HTTPRequest

LAYOUTS: tuple[Layout, ...] = ("journal", "readable")
BODIES = st.one_of(st.text().map(lambda text: text.encode(errors="replace")), st.binary())
AWKWARD = (
    "",
    " ",
    "\n",
    "\n\n",
    " a",
    "\ta",
    "a\n",
    "a\n\n",
    "a\n \n",
    "\n a\n",
    "a \n b",
    "- a\n: b\n# c",
    "data: {}\n\n",
)


def exchange(
    request: bytes = b'{"q":1}', reply: bytes = b'{"a":2}', headers: dict[str, str] | None = None, **facts: Any
) -> Exchange:
    return Exchange(
        request=HTTPRequest(
            url="https://api.example.com/v1?alt=sse", body=request, headers=headers or {"accept": "no"}
        ),
        reply=HTTPReply(status=200, reason="OK", body=reply, headers={"content-type": "application/json"}),
        facts=Facts(**{"lineage": "", **facts}),
    )


def rows_of(*exchanges: Exchange) -> tuple[Row, ...]:
    return tuple(index_lines(encode_line(one) for one in exchanges))


def as_written(path: Path) -> list[Exchange]:
    recording = read(path)
    assert recording is not None
    assert recording.findings == ()
    return [row.exchange() for row in recording.rows]


def by_vcrpy(path: Path) -> list[tuple[Any, Any]]:
    """Read a cassette as stock vcrpy does."""
    requests, responses = vcr.serialize.deserialize(path.read_text(encoding="utf-8"), yamlserializer)
    return list(zip(requests, responses, strict=True))


@given(BODIES)
def test_scalars_are_byte_exact(body: bytes) -> None:
    """YAML returns any body unchanged."""
    value = yaml.safe_load(f"a:\n  b: {scalar(body, 4)}  c: 1\n")["a"]["b"]
    assert (value if isinstance(value, bytes) else value.encode()) == body


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_scalars(text: str) -> None:
    """Blank lines, leading blanks and trailing line breaks are kept."""
    loaded = yaml.safe_load(f"a:\n  b: {scalar(text.encode(), 4)}  c: 1\n")
    assert loaded == {"a": {"b": text, "c": 1}}


def test_bodies_are_unescaped(tmp_path: Path) -> None:
    """A readable cassette shows a body unescaped, in a block literal."""
    path = tmp_path / "a.yaml"
    body = '{"content": "a \\"word\\": é"}'
    save(path, rows_of(exchange(reply=body.encode())), "readable")
    assert f"      string: |-\n        {body}\n" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40)
@given(bodies=st.lists(st.tuples(BODIES, BODIES), min_size=1, max_size=3))
def test_vcrpy_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, layout: Layout, bodies: Sequence[Any]
) -> None:
    """Stock vcrpy reads both layouts, and gets the same bytes as we do."""
    path = tmp_path_factory.mktemp("vcrpy") / "a.yaml"
    written = [exchange(request, reply, order=index) for index, (request, reply) in enumerate(bodies)]
    save(path, rows_of(*written), layout)
    assert [(one.request.body, one.reply.body) for one in as_written(path)] == list(bodies)
    for (request, response), (asked, answered) in zip(by_vcrpy(path), bodies, strict=True):
        assert (request.body or b"", response["body"]["string"]) == (asked, answered)
        assert request.uri == "https://api.example.com/v1?alt=sse"
        assert dict(request.headers) == {"accept": "no"}
        assert response["status"] == {"code": 200, "message": "OK"}
        assert response["headers"] == {"content-type": ["application/json"]}


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40)
@given(lineage=st.text(), model=st.text())
def test_facts_are_exact(tmp_path_factory: pytest.TempPathFactory, layout: Layout, lineage: str, model: str) -> None:
    """Quotes, backslashes and text that YAML would fold are read back from the facts' text."""
    path = tmp_path_factory.mktemp("facts") / "a.yaml"
    lineage, model = (text.encode(errors="replace").decode() for text in (lineage, model))
    written = exchange(lineage=lineage, model=model, error=("APITimeoutError", f"{lineage}\\{model}"))
    save(path, rows_of(written), layout)
    assert [one.facts for one in as_written(path)] == [written.facts]
    assert len(by_vcrpy(path)) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bodies_with_a_lines_own_delimiters(tmp_path: Path, layout: Layout) -> None:
    """No text can contain the delimiters of a line's parts, because its quotes are escaped."""
    line = encode_line(exchange(lineage='},"response":{"status":', model=',"x":"'))
    written = exchange(request=line, reply=line, lineage='a,"x":"{}', headers={"accept": '},"response":{"status":'})
    save(tmp_path / "a.yaml", rows_of(written), layout)
    (found,) = as_written(tmp_path / "a.yaml")
    assert (found.request, found.reply.body, found.facts) == (written.request, line, written.facts)
    (row,) = rows_of(written)
    assert row.reply().body == line
    assert row.facts.key == raw_key(written.request.method, written.request.url, line)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pytest_recording_reads_what_we_write(tmp_path: Path, layout: Layout) -> None:
    """pytest-recording's own loader accepts both layouts: they have no unexpected keys."""
    path = tmp_path / "a.yaml"
    save(path, rows_of(exchange(reply=b"one"), exchange(reply=b"two", order=1)), layout)
    requests, responses = load_cassette(str(path), yamlserializer)
    assert [request.body for request in requests] == [b'{"q":1}', b'{"q":1}']
    assert [response["body"]["string"] for response in responses] == [b"one", b"two"]


def test_layouts_hold_the_same(tmp_path: Path) -> None:
    """A cassette converted to the other layout and back is the same file."""
    paths = [tmp_path / name for name in ("a.yaml", "b.yaml", "c.yaml")]
    rows = rows_of(exchange(b"\xff", b"a\r\n", usage={"cost": 0.5}, chunks=((3, 1.5),)), exchange(lineage="x/y=1"))
    for path, layout in zip(paths, ("journal", "readable", "journal"), strict=True):
        save(path, rows, layout)  # type: ignore[arg-type]
        recording = read(path)
        assert recording is not None
        assert (recording.layout, recording.state) == (layout, "closed")
        rows = recording.rows
    assert paths[0].read_bytes() == paths[2].read_bytes()


def test_order_is_canonical() -> None:
    """The file is sorted by lineage (numbers as numbers), issue and attempt, never by arrival."""
    places = [("b", 0, 0), ("s=2/x", 0, 0), ("s=2/x", 1, 0), ("s=10/x", 0, 0), ("s=10/x", 0, 1)]
    rows = rows_of(*(exchange(lineage=name, order=order, attempt=attempt) for name, order, attempt in places))
    shuffled = random.Random(1).sample(rows, len(rows))
    assert canonical_order(shuffled) == list(rows)


def test_size_decides_the_layout(tmp_path: Path) -> None:
    """Small cassettes are closed as readable, large ones stay journals."""
    for size, layout in ((10, "readable"), (storage.READABLE_BYTES, "journal")):
        save(tmp_path / "a.yaml", rows_of(exchange(reply=b"x" * size)))
        recording = read(tmp_path / "a.yaml")
        assert recording is not None
        assert recording.layout == layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_cassettes_are_split_into_shards(tmp_path: Path, layout: Layout) -> None:
    """Above about 10 MB a cassette has several files, each a valid cassette for stock vcrpy; old shards are removed."""
    path = tmp_path / "a.yaml"
    for count in (5, 3):
        written = [exchange(reply=bytes([65 + index]) * 4_500_000, order=index) for index in range(count)]
        save(path, rows_of(*written), layout)
        assert as_written(path) == [decode_line(encode_line(one)) for one in written]
        files = sorted(tmp_path.iterdir())
        assert len(files) == (count + 1) // 2
        assert all(file.stat().st_size < 11_000_000 for file in files)
        if layout == "journal":
            assert sum(len(by_vcrpy(file)) for file in files) == count


def test_a_missing_or_mixed_shard_is_damage(tmp_path: Path) -> None:
    """The error names a shard that is missing or belongs to another recording."""
    path = tmp_path / "a.yaml"
    save(path, rows_of(*(exchange(reply=b"x" * 6_000_000, order=index) for index in range(2))), "journal")
    (shard,) = (file for file in tmp_path.iterdir() if file != path)
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CassetteDamagedError, match="Expected shard 2 of 2 in .*0002.yaml, got no file"):
        read(path)
    shard.write_bytes(content.replace(b" set=", b" set=000000000000 old=", 1))
    with pytest.raises(CassetteDamagedError, match=r"0002.yaml:1"):
        read(path)


def test_a_failed_save_leaves_the_old_cassette(tmp_path: Path) -> None:
    """Whatever fails while saving, the old file is unchanged."""
    path = tmp_path / "a.yaml"
    save(path, rows_of(exchange(reply=b"old")))
    before = path.read_bytes()
    rows = (*rows_of(exchange(reply=b"new")), "no row")
    with pytest.raises(AttributeError):
        save(path, rows)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_creates_the_folder(tmp_path: Path) -> None:
    """Recording creates the cassette's folder, and so does `aggregator cassette convert`."""
    path = tmp_path / "no" / "such" / "a.yaml"
    save(path, rows_of(exchange()))
    assert as_written(path)


def test_a_pipe_was_read_with_seek(tmp_path: Path) -> None:
    """The argument of `aggregator cassette show <(...)` can be read once, from start to end."""
    path, pipe = tmp_path / "a.yaml", tmp_path / "pipe"
    save(path, rows_of(exchange(reply=b"a" * 40_000)), "journal")
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(pipe.write_bytes, path.read_bytes())
        assert as_written(pipe) == as_written(path)
    assert written.result() == path.stat().st_size


def test_a_readable_cassette_that_could_not_be_read(tmp_path: Path) -> None:
    """A YAML line of more than 8 MB is refused, so a longer answer is written as a journal."""
    path = tmp_path / "a.yaml"
    there = exchange(reply=b'"%b"' % (b"a" * 9_000_000))
    save(path, rows_of(there), "readable")
    assert [one.reply.body for one in as_written(path)] == [there.reply.body]
    assert b"layout=journal" in path.read_bytes()[:80]


def test_the_permissions_of_a_cassette_were_widened(tmp_path: Path) -> None:
    """A user who may not read a cassette may not read its replacement."""
    path = tmp_path / "a.yaml"
    save(path, rows_of(exchange()))
    path.chmod(0o600)
    save(path, rows_of(exchange(), exchange(reply=b"{}", ticket=1)))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_journal_was_unreadable(tmp_path: Path, layout: Layout) -> None:
    """A cassette without its last exchange is an empty one, for us and for stock vcrpy."""
    path = tmp_path / "a.yaml"
    save(path, [], layout)
    recording = read(path)
    assert recording is not None
    assert (recording.rows, recording.state, recording.layout) == ((), "closed", layout)
    assert load_cassette(str(path), yamlserializer) == ([], [])
