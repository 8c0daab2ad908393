"""The demo trains from its cassette, offline, and the same seed gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aggregator.demo.run import Settings, cassette_path, steps, train_demo
from aggregator.errors import CassetteMissError, CassetteWarning, ConfigError
from aggregator.records import StepReport


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replayed")
    train_demo(Settings(out=out))
    return out


def test_training_improves_the_test_score(tmp_path: Path) -> None:
    """The printed improvement is that of the evaluations; every parameter has changed."""
    seen: list[StepReport] = []
    outcome = train_demo(Settings(out=tmp_path), observers=[seen.append])
    result = outcome.result
    assert len(seen) == len(result.history) == steps()
    before, after = result.evaluations[0].score, result.evaluations[-1].score
    assert before is not None
    assert after is not None
    assert after >= before + 0.4
    assert {name for name, value in result.parameters.items() if value != result.initial_parameters[name]} == {
        "instruction",
        "excerpt_words",
        "clean__code",
    }


@pytest.mark.parametrize("concurrency", [1, 3, 64])
def test_same_bytes_at_any_concurrency(replayed: Path, tmp_path: Path, concurrency: int) -> None:
    """result.json does not depend on time or order."""
    train_demo(Settings(out=tmp_path, concurrency=concurrency))
    assert (tmp_path / "result.json").read_bytes() == (replayed / "result.json").read_bytes()


def test_the_cassette_is_not_stale(replayed: Path, tmp_path: Path) -> None:
    """The simulated model over real HTTP gives the recorded answers."""
    train_demo(Settings(out=tmp_path, serve=True))
    assert (tmp_path / "result.json").read_bytes() == (replayed / "result.json").read_bytes()


def test_another_seed_gives_another_run(replayed: Path, tmp_path: Path) -> None:
    """The seed decides the order of the tickets and the simulated model's errors."""
    train_demo(Settings(out=tmp_path, serve=True, seed=1))
    assert (tmp_path / "result.json").read_bytes() != (replayed / "result.json").read_bytes()


def test_events_are_json_lines(replayed: Path) -> None:
    """Each step and each call is one event."""
    events = [json.loads(line) for line in (replayed / "events.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    result = json.loads((replayed / "result.json").read_bytes())
    assert kinds.count("train.step") == steps()
    assert kinds.count("llm.call") == sum(usage["calls"] for usage in result["usage"].values())


def test_recording_then_replaying(tmp_path: Path, replayed: Path) -> None:
    """`--record` writes a cassette that replays to the same result; the bundled one is below 2.5 MB."""
    path = tmp_path / "demo.yaml"
    train_demo(Settings(out=tmp_path / "recorded", record=True, cassette=path))
    train_demo(Settings(out=tmp_path / "again", cassette=path))
    for name in ("recorded", "again"):
        assert (tmp_path / name / "result.json").read_bytes() == (replayed / "result.json").read_bytes()
    assert "127.0.0.1" not in path.read_text()
    assert cassette_path().stat().st_size < 2_500_000


def test_an_incomplete_recording_leaves_the_cassette_unchanged(tmp_path: Path) -> None:
    """Only a complete recording replaces the cassette."""
    path = tmp_path / "demo.yaml"
    path.write_text("as it was")

    def stop(report: StepReport) -> None:
        raise ConfigError("stopped")

    with pytest.raises(ConfigError, match="stopped"):
        train_demo(Settings(out=tmp_path / "out", record=True, cassette=path), observers=[stop])
    assert path.read_text() == "as it was"


def test_a_stale_cassette_names_the_missing_request_and_the_remedy(tmp_path: Path) -> None:
    """If one recorded answer is missing, the error names the request and `make record`."""
    lines = cassette_path().read_text().splitlines(keepends=True)
    missing = "Please send me a quote for ten licences."
    kept = [line for line in lines[1:] if not ("evaluate/step=0/" in line and missing in line)]
    (tmp_path / "stale.yaml").write_text("".join(kept))
    stale = pytest.raises(CassetteMissError, match="make record")
    with pytest.warns(CassetteWarning, match="not closed"), stale as raised:
        train_demo(Settings(out=tmp_path, cassette=tmp_path / "stale.yaml"))
    assert missing in str(raised.value)
    assert len(kept) == len(lines) - 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(serve=True, model="openai/x"), "--serve or --model, got both"),
        (Settings(concurrency=0), "at least 1, got 0"),
    ],
)
def test_invalid_settings(settings: Settings, message: str) -> None:
    """They are refused before any file is opened."""
    with pytest.raises(ConfigError, match=message):
        train_demo(settings)
