"""`aggregator cassette`: readable tables, and exit codes for CI."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from aggregator.agents.code import source_digest
from aggregator.cassettes.exchanges import exchange_id
from aggregator.cassettes.lineage import lineage
from aggregator.cassettes.recorder import cassette
from aggregator.cassettes.storage import read
from aggregator.cli.main import main
from aggregator.records import HTTPReply, HTTPRequest, Role, Usage

URL = "http://127.0.0.1/v1/chat/completions"
Command = Callable[..., tuple[int, str]]
BEFORE = 1_700_000_000.0  # 2023-11-14


def ask(i: int, role: Role = "agent") -> HTTPRequest:
    return HTTPRequest(url=URL, body=json.dumps({"model": "m", "messages": [i, role]}).encode(), headers={})


def record(path: Path, answers: dict[str, str], *, layout: str = "auto", now: float = BEFORE) -> Path:
    """Record one exchange for each lineage and answer; lineages that end in /propose are the optimizer's."""
    with cassette(path, "all", layout=layout, now=lambda: now) as tape:  # type: ignore[arg-type]
        for i, (place, answer) in enumerate(answers.items()):
            role: Role = "optimizer" if place.endswith("propose") else "agent"
            with lineage(place, role=role):
                reply = HTTPReply(
                    status=200,
                    reason="OK",
                    body=json.dumps({"text": answer}).encode(),
                    headers={"content-type": "application/json"},
                    milliseconds=1500.0,
                )
                usage = Usage(input_tokens=100, output_tokens=10, cost=0.25)
                tape.record(tape.issue(ask(i)), reply, usage=usage, model="m")
    return path


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str]:
        code = main(["cassette", *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_ls_lists_cassettes(command: Command) -> None:
    """It prints one aligned line for each cassette of the default folder."""
    record(Path("cassettes/a.yaml"), {"x": "1", "y": "2"})
    record(Path("cassettes/sub/b.yaml"), {"x": "1"}, layout="journal")
    code, out = command("ls")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert lines[0] == ["cassette", "exchanges", "size", "layout", "recorded", "models"]
    assert [line[:2] + line[4:] for line in lines[1:3]] == [
        ["cassettes/a.yaml", "2", "readable", "2023-11-14", "m"],
        ["cassettes/sub/b.yaml", "1", "journal", "2023-11-14", "m"],
    ]
    assert out.splitlines()[3] == "2 cassettes, 3 exchanges"


def test_show_lists_exchanges_and_one_in_full(command: Command) -> None:
    """The list shows the lineage, a single exchange both bodies."""
    path = record(Path("a.yaml"), {"train/sample=0": "first", "train/sample=0/propose": "second"})
    code, out = command("show", path)
    assert code == 0
    assert " ".join(out.splitlines()[2].split()) == "1 train/sample=0/propose #0.0 optimizer m 200 1500 100 10"
    assert command("show", path, "--lineage", "*/propose")[1].count("#0.0") == 1
    assert '"text": "second"' in command("show", path, 1)[1]
    code, out = command("show", path, 2)
    assert (code, "Expected an exchange from 0 to 1 of a.yaml, got 2" in out) == (1, True)


def test_stats_sums_by_role_and_model(command: Command) -> None:
    """It prints exchanges, tokens, cost and time; the last line is the sum."""
    record(Path("cassettes/a.yaml"), {"x": "1", "y": "2", "x/propose": "3"})
    code, out = command("stats")
    assert code == 0
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["agent", "m", "2", "0", "200", "20", "0.500000", "3.0"],
        ["optimizer", "m", "1", "0", "100", "10", "0.250000", "1.5"],
        ["all", "-", "3", "0", "300", "30", "0.750000", "4.5"],
    ]
    assert command("stats", "--each")[1].startswith("cassettes/a.yaml\n")


def test_diff_lists_changes(command: Command) -> None:
    """The exit code is 0 without output for equal files, and 1 with each difference otherwise."""
    a = record(Path("a.yaml"), {"x": "1", "y": "2"})
    b = record(Path("b.yaml"), {"x": "1", "y": "3"})
    assert command("diff", a, a) == (0, "")
    code, out = command("diff", a, b)
    assert code == 1
    assert "    $.text: '2' -> '3'\n0 removed, 0 added, 1 changed\n" in out


def test_check_passes_a_good_file(command: Command) -> None:
    """The exit code is 0 for a good file, in both layouts."""
    for layout in ("journal", "readable"):
        path = record(Path(f"{layout}.yaml"), {"x": "1"}, layout=layout)
        assert command("check", path) == (0, "1 cassette, 1 exchange: good\n")


def test_check_reports_damage(command: Command) -> None:
    """A cut or an edit is reported with file and line, and the other files are still checked."""
    path = record(Path("cassettes/a.yaml"), {"x": "answer one", "y": "answer two"}, layout="journal")
    record(Path("cassettes/b.yaml"), {"x": "1"})
    path.write_bytes(path.read_bytes().replace(b"answer two", b"answer 222"))
    code, out = command("check")
    assert code == 1
    assert "cassettes/a.yaml:5" in out
    assert out.endswith("2 cassettes, 1 exchange: 1 problem\n")


def test_check_reports_secrets(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of the environment in an answer is reported with the exchange, but without the key."""
    path = record(Path("a.yaml"), {"x": "the key is canary-4711-canary"})
    monkeypatch.setenv("SOME_API_KEY", "canary-4711-canary")
    code, out = command("check", path)
    assert code == 1
    assert out.startswith("a.yaml: x #0.0 ")
    assert "a secret in the answer's body" in out
    assert "canary" not in out


def test_check_reads_a_foreign_file_as_it_is_on_disk(command: Command) -> None:
    """Another tool's cassette is redacted when it is played, but not when it is checked; converting it cleans it."""
    item = {
        "request": {"method": "POST", "uri": URL, "body": "{}", "headers": {"Authorization": ["Bearer canary-4711"]}},
        "response": {"status": {"code": 200, "message": "OK"}, "headers": {}, "body": {"string": "{}"}},
    }
    Path("old.yaml").write_text(yaml.safe_dump({"version": 1, "interactions": [item]}))
    code, out = command("check", "old.yaml")
    assert (code, "a secret in the request's header authorization" in out) == (1, True)
    command("convert", "old.yaml")
    assert command("check", "old.yaml") == (0, "1 cassette, 1 exchange: good\n")
    assert b"canary" not in Path("old.yaml").read_bytes()


def test_check_reports_age(command: Command) -> None:
    """Age is checked only if a limit is given."""
    path = record(Path("a.yaml"), {"x": "1"})
    assert command("check", path)[0] == 0
    code, out = command("check", path, "--max-age", 30)
    assert (code, "days ago; record again" in out) == (1, True)


def account(tests: dict[str, tuple[Path, list[str]]]) -> None:
    """Write the account that a pytest run leaves in its cache."""
    file = Path(".pytest_cache/v/aggregator/cassettes")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({test: {"path": str(p.resolve()), "unplayed": u} for test, (p, u) in tests.items()}))


def test_check_reports_orphans(command: Command) -> None:
    """These are files that no test opened, and exchanges that every test of a file left unplayed."""
    shared = record(Path("cassettes/shared.yaml"), {"x": "1", "y": "2", "z": "3"})
    record(Path("cassettes/forgotten.yaml"), {"x": "1"})
    recording = read(shared)
    assert recording is not None
    x, y, z = (exchange_id(row) for row in recording.rows)
    code, out = command("check", "--orphans")
    assert (code, "run pytest with the plugin first" in out) == (1, True)
    account({"test_a": (shared, [y, z]), "test_b": (shared, [x, z])})
    code, out = command("check", "--orphans")
    assert code == 1
    assert out.splitlines() == [
        "cassettes/forgotten.yaml: no test plays it; delete it, or run its tests",
        f"cassettes/shared.yaml: {z}: no test plays it",
        "2 cassettes, 4 exchanges: 2 problems",
    ]


def test_prune_drops_what_no_test_plays(command: Command) -> None:
    """The rest is complete and checked; a dry run changes nothing."""
    path = record(Path("a.yaml"), {"x": "1", "y": "2"})
    recording = read(path)
    assert recording is not None
    account({"test_a": (path, [exchange_id(recording.rows[1])])})
    before = path.read_bytes()
    assert command("prune", path, "--unplayed", "--dry-run") == (0, "a.yaml: 1 exchange would be dropped, 1 kept\n")
    assert path.read_bytes() == before
    assert command("prune", path, "--unplayed") == (0, "a.yaml: 1 exchange dropped, 1 kept\n")
    assert command("check", path)[1] == "1 cassette, 1 exchange: good\n"


@pytest.mark.parametrize(
    ("options", "kept"), [(["--lineage", "train/*"], 1), (["--older-than", "1"], 0), (["--lineage", "none"], 2)]
)
def test_prune_by_lineage_and_age(command: Command, options: list[str], kept: int) -> None:
    """They select what is re-recorded: a part of a run, or old exchanges."""
    path = record(Path("a.yaml"), {"train/epoch=0": "1", "test": "2"})
    assert command("prune", path, *options) == (
        0,
        f"a.yaml: {2 - kept} exchange{'' if kept == 1 else 's'} dropped, {kept} kept\n",
    )


def test_prune_requires_a_criterion(command: Command) -> None:
    """Without one nothing is dropped."""
    path = record(Path("a.yaml"), {"x": "1"})
    code, out = command("prune", path)
    assert (code, "pass --unplayed, --lineage or --older-than" in out) == (1, True)


def test_convert_changes_the_layout(command: Command) -> None:
    """Converting a journal to readable and back keeps the exchanges."""
    path = record(Path("a.yaml"), {"x": "1", "y": "2"}, layout="journal")
    before = path.read_bytes()
    assert command("convert", path, "b.yaml", "--layout", "readable") == (0, "b.yaml: 2 exchanges, readable\n")
    assert command("diff", path, "b.yaml") == (0, "")
    assert command("convert", "b.yaml", "--layout", "journal") == (0, "b.yaml: 2 exchanges, journal\n")
    assert Path("b.yaml").read_bytes() == before


def test_convert_reads_vcrpys_cassettes(command: Command) -> None:
    """A stock vcrpy cassette is converted to ours, and plays."""
    item = {
        "request": {"method": "POST", "uri": URL, "body": ask(0).body.decode(), "headers": {}},
        "response": {"status": {"code": 200, "message": "OK"}, "headers": {}, "body": {"string": "old"}},
    }
    Path("old.yaml").write_text(yaml.safe_dump({"version": 1, "interactions": [item]}))
    assert command("convert", "old.yaml", "new.yaml") == (0, "new.yaml: 1 exchange, readable\n")
    with cassette("new.yaml", "none") as tape:
        played = tape.play(tape.issue(ask(0)))
    assert played is not None
    assert played.body == b"old"


@pytest.mark.parametrize("action", ["ls", "stats", "check", "show", "convert"])
def test_a_missing_path_is_one_line(command: Command, action: str) -> None:
    """The error names the path, without a traceback."""
    code, out = command(action, "nowhere.yaml")
    assert code == 1
    assert "'nowhere.yaml', which does not exist" in out
    assert out.count("\n") == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_check_reports_suggestions_with_code(command: Command, streamed: bool) -> None:
    """Each source is listed once, with the sha256 that permits it; it is not a problem."""
    source = "def clean(self, x):\n    return x.upper()\n"
    suggestion = json.dumps({"suggestion": {"clean__code": source, "prompt": "def means define"}, "reasoning_x": ""})
    record(Path("a.yaml"), {"x/propose": suggestion, "y/propose": suggestion, "z": "def f(): pass"})
    if streamed:
        with cassette(Path("a.yaml"), "all") as tape, lineage("x/propose", role="optimizer"):
            pieces = [suggestion[i : i + 9] for i in range(0, len(suggestion), 9)]
            body = b"".join(b"data: " + json.dumps({"delta": piece}).encode() + b"\n\n" for piece in pieces)
            reply = HTTPReply(status=200, body=body, headers={"content-type": "text/event-stream"})
            tape.record(tape.issue(ask(0)), reply, usage=Usage(), model="m")
    code, out = command("check", "a.yaml")
    assert code == 0
    assert "Code in recorded suggestions (1 source)" in out
    assert f"a.yaml: code sha256 {source_digest(source)}, clean__code in x/propose" in out
    assert out.count("code sha256") == 1
