"""Files of earlier revisions: each is read with its old meaning, or refused by its version with the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aggregator import LLM, AggregatedUpdate, BeamSearch, LLMOptimizer, Module, ParameterNode, TrainingResult, cassette
from aggregator.cassettes.lineage import lineage
from aggregator.errors import CassetteRefusedError, ParameterError, TrainingError
from aggregator.protocols import ChatModel, Transport
from aggregator.records import HTTPReply, HTTPRequest
from aggregator.simulation.model import complete
from aggregator.training.checkpoints import load_result, save_result
from aggregator.training.gates import improves_on_validation

FIXTURES = Path(__file__).parent / "fixtures" / "a41b717"
URL = "http://simulated-model.invalid/v1"
DATA = [
    ("My invoice is wrong.", "billing"),
    ("The parcel is lost.", "shipping"),
    ("Send the parcel again.", "shipping"),
    ("The invoice is missing.", "billing"),
]


class Sorter(Module):
    """The agent of the recorded runs."""

    def __init__(self, llm: ChatModel) -> None:
        self.llm = llm
        self.instruction = ParameterNode(
            "If no rule applies, answer sales.", description="Rules, one line a team: `word -> team`."
        )

    async def forward(self, ticket: str) -> str:
        system = {"role": "system", "content": self.instruction.data}
        return (await self.llm.complete([system, {"role": "user", "content": ticket}])).text


def right_team(x: str, output: str, info: str) -> tuple[float, str]:
    return float(output == info), "Correct." if output == info else f'Expected "{info}", got "{output}".'


class Simulated(Transport):
    """The simulated model without a server; counts its requests."""

    def __init__(self) -> None:
        self.count = 0

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        self.count += 1
        body = complete(msgspec.json.decode(request.body), wrong_rate=0.0)
        return HTTPReply(status=200, body=msgspec.json.encode(body), headers={"content-type": "application/json"})


def resume(name: str, tmp_path: Path, changes: dict[str, Any] | None = None) -> tuple[TrainingResult, int]:
    """Copy a run folder and resume it; return the result and the number of requests."""
    run_dir = tmp_path / name
    shutil.copytree(FIXTURES / name, run_dir)
    if changes:
        checkpoint = json.loads((run_dir / "checkpoint.json").read_bytes())
        (run_dir / "checkpoint.json").write_text(json.dumps(checkpoint | changes))
    transport = Simulated()
    llm = LLM("openai-compatible/simulated-1", base_url=URL, transport=transport)
    trainer: Any
    if name.startswith("search"):
        trainer = BeamSearch(Sorter(llm), LLMOptimizer(llm=llm), num_candidates=2, num_proposals=1, observers=[])
    else:
        gate = improves_on_validation(DATA[:2])
        trainer = AggregatedUpdate(Sorter(llm), LLMOptimizer(llm=llm), llm=llm, gate=gate, observers=[])
    result = trainer.train(
        right_team, DATA, batch_size=2, test_dataset=DATA[:2], run_dir=run_dir, max_concurrency=1, resume=True
    )
    return result, transport.count


@pytest.mark.parametrize("layout", ["journal", "readable"])
async def test_a_cassette_of_an_earlier_revision_is_replayed(layout: str) -> None:
    """Whole answers, retried ones, a stream and repeated questions are replayed in both layouts."""
    llm = LLM("openai-compatible/simulated-1", base_url=URL)
    async with cassette(FIXTURES / f"{layout}.yaml", mode="none") as tape:
        with lineage("whole"):
            whole = await llm.complete("Grüße — say hello.")
        with lineage("refused", role="guide"):
            refused = await llm.complete("Refuse me once.", seed=3)
        with lineage("streamed"):
            streamed = [delta async for delta in llm.stream("Stream this.")]
        with lineage("again"):
            again = [(await llm.complete("The same question.")).text for _ in range(2)]
    assert (whole.text, whole.usage.input_tokens) == ("I do not know.", 6)
    assert (refused.attempts, refused.replayed) == (3, True)
    assert streamed == ["Stre", "amed."]
    assert again == ["I do not know.", "I do not know."]
    assert tape.unplayed() == []


def test_the_result_of_an_earlier_run_is_read() -> None:
    """`load_result` reads the result of a finished run and of a run that an error ended."""
    finished, broken = (load_result(FIXTURES / name / "result.json") for name in ("finished", "broken"))
    assert finished.test_scores == [0.0, 0.5, 1.0]
    assert [report.decision.accepted for report in finished.history] == [True, True]
    assert [report.step for report in broken.history] == [0]


def test_a_result_has_the_version_of_its_format(tmp_path: Path) -> None:
    """A result without a version is read, one of a later release is refused with the remedy."""
    earlier = (FIXTURES / "finished" / "result.json").read_bytes()
    assert "version" not in msgspec.json.decode(earlier)
    path = tmp_path / "result.json"
    save_result(load_result(FIXTURES / "finished" / "result.json"), path)
    written = msgspec.json.decode(path.read_bytes())
    assert written["version"] == 1
    path.write_bytes(msgspec.json.encode(written | {"version": 2, "parameters": ["of another shape"]}))
    with pytest.raises(TrainingError, match="of version 1 at most in .*result.json, got version 2; upgrade"):
        load_result(path)


def test_a_finished_run_of_an_earlier_revision_resumes_to_its_result(tmp_path: Path) -> None:
    """Nothing is left to do and no request is sent; parameters and scores are the recorded ones."""
    written = load_result(FIXTURES / "finished" / "result.json")
    result, sent = resume("finished", tmp_path)
    assert sent == 0
    assert result.parameters == written.parameters
    assert result.train_scores == written.train_scores
    assert result.test_scores == written.test_scores


@pytest.mark.parametrize("name", ["interrupted", "broken"])
def test_a_run_started_by_an_earlier_revision_is_finished(name: str, tmp_path: Path) -> None:
    """The finished step is kept, the second one is run, and the result equals an unbroken run's."""
    whole = load_result(FIXTURES / "finished" / "result.json")
    result, sent = resume(name, tmp_path)
    assert sent < whole.usage["agent"].calls + whole.usage["optimizer"].calls
    assert result.parameters == whole.parameters
    assert result.test_scores == whole.test_scores


def test_a_search_started_by_an_earlier_revision_keeps_its_candidates(tmp_path: Path) -> None:
    """The second step explores the checkpoint's candidates: the new ones are their children."""
    state = json.loads((FIXTURES / "search-interrupted" / "checkpoint.json").read_bytes())["state"]
    kept = {candidate["id"] for candidate in state["notes"]["candidates"]}
    result, _ = resume("search-interrupted", tmp_path)
    assert result.train_scores[0] == state["history"][0]["score"]
    assert [candidate.parent in kept for candidate in result.candidates if candidate.step == 1] == [True, True]


@pytest.mark.parametrize("changes", [{"version": 99}, {"version": 99, "state": {"pool": []}}, {"version": 0}])
def test_a_checkpoint_of_another_version_was_reported_as_unreadable(changes: dict[str, Any], tmp_path: Path) -> None:
    """The version is read first: missing or new fields of another version do not hide the remedy."""
    with pytest.raises(TrainingError, match=rf"got version {changes['version']}; resume with the release"):
        resume("interrupted", tmp_path, changes)


def test_an_artefact_of_an_earlier_revision_is_loaded(tmp_path: Path) -> None:
    """`Module.load` reads its values; an artefact of a later version is refused with the remedy."""
    agent = Sorter(LLM("openai-compatible/simulated-1", base_url=URL))
    agent.load(FIXTURES / "agent.json")
    assert agent.instruction.data == load_result(FIXTURES / "finished" / "result.json").parameters["instruction"]
    agent.load(FIXTURES / "finished" / "parameters.json")
    later = tmp_path / "later.json"
    later.write_text(json.dumps(json.loads((FIXTURES / "agent.json").read_bytes()) | {"version": 99}))
    with pytest.raises(ParameterError, match="version 1 at most, got 99 .*; upgrade aggregated-update"):
        agent.load(later)


@pytest.mark.parametrize("layout", ["journal", "readable"])
def test_a_cassette_of_a_later_format_is_refused(layout: str, tmp_path: Path) -> None:
    """Its lines may have another meaning: the error names the format."""
    text = (FIXTURES / f"{layout}.yaml").read_bytes().replace(b"format=1", b"format=99", 1)
    (tmp_path / "later.yaml").write_bytes(text)
    with pytest.raises(CassetteRefusedError, match=r"format.*99"), cassette(tmp_path / "later.yaml", mode="none"):
        pass
