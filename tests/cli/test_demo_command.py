"""`aggregator demo` as a user runs it: in its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aggregator.simulation import SimulatedModel

COMMAND = [sys.executable, "-m", "aggregator.cli", "demo"]


def demo(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, cwd=cwd)


def test_it_runs_in_an_empty_folder(tmp_path: Path) -> None:
    """Without options it replays offline, shows progress and a summary, and writes result and events."""
    done = demo(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training step") == 12
    result = json.loads((tmp_path / "runs" / "demo" / "result.json").read_text())
    scores = [evaluation["score"] for evaluation in result["evaluations"]]
    assert f"Test score: {scores[0]:.4g} before training, {scores[-1]:.4g} after" in done.stdout
    assert "\x1b" not in done.stdout
    assert (tmp_path / "runs" / "demo" / "events.jsonl").exists()


def test_a_stale_cassette_names_the_remedy(tmp_path: Path) -> None:
    """For a request that was not recorded one message names it and the remedy, without a traceback."""
    done = demo("--seed", "7", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "recorded with seed 0, not 7" in done.stderr
    assert "simulated-model.invalid" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--serve", "--model", "openai/gpt-4o-mini"], "--serve or --model, got both"),
        (["--model", "nonsense"], "Expected a model"),
        (["--out", "/dev/null/x"], "can be written"),
    ],
)
def test_errors_are_one_message(tmp_path: Path, arguments: list[str], message: str) -> None:
    """Each error is one message, with exit code 1."""
    done = demo(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("aggregator demo: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unset_key_is_named(tmp_path: Path) -> None:
    """Without a key nothing is sent, and the message names the variable."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENAI")}
    done = subprocess.run(
        [*COMMAND, "--model", "openai/gpt-4o-mini"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 1
    assert "OPENAI_API_KEY" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_real_providers_answers_are_kept(tmp_path: Path) -> None:
    """With a real provider each exchange is on disk, without the key."""
    key = "k-simulated-0123456789"
    with SimulatedModel() as server:
        done = subprocess.run(
            [*COMMAND, "--model", "openai/simulated-1"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "OPENAI_API_KEY": key, "OPENAI_BASE_URL": server.base_url},
        )
        assert done.returncode == 0, done.stderr
        asked = sum(server.calls.values())
    journal = (tmp_path / "runs" / "demo" / "journal.yaml").read_text()
    assert journal.count('"uri":') == asked > 400
    assert key not in journal
    assert "openai/simulated-1; every exchange is kept in" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_keeps_the_finished_steps(tmp_path: Path) -> None:
    """Ctrl-C after a step exits with 130, prints where the finished steps are stored, and shows no traceback."""
    with subprocess.Popen(
        [*COMMAND, "--serve", "--concurrency", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        assert process.stderr is not None
        assert "training step 1/12" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait() == 130
    assert "Interrupted" in rest
    assert "Traceback" not in rest
    events = (tmp_path / "runs" / "demo" / "events.jsonl").read_text().splitlines()
    assert any(json.loads(line)["event"] == "train.step" for line in events)
