"""`propose_from`: an update from logged rollouts and people's corrections, without running the agent."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

import aggregator
from aggregator import (
    LLM,
    Budget,
    BudgetExceededError,
    ConfigError,
    Failure,
    LLMOptimizer,
    Module,
    ParameterNode,
    Proposal,
    Rollout,
    transcript,
)
from aggregator.errors import ServerError
from aggregator.llm.models import as_model
from aggregator.optimizers import apropose_from, propose_from
from aggregator.testing import FakeTransport
from aggregator.training.learning import STALE, UNLABELLED, read_records
from aggregator.training.merge import majority


class Router(Module):
    """Must not be run: its calls would be paid for twice."""

    def __init__(self) -> None:
        self.rule = ParameterNode("Answer sales.", name="rule")
        self.limit = ParameterNode(3, name="limit")

    def forward(self, x: Any) -> Any:
        raise AssertionError("the agent was run")


class Scripted:
    """An optimizer that proposes what the feedback contains, as `rule := text` or `limit := number`."""

    def __init__(self) -> None:
        self.seen: list[Rollout] = []
        self.parameters = None

    async def propose(self, rollouts: Any, step: Any) -> Proposal:
        (rollout,) = rollouts
        self.seen.append(rollout)
        if "crash" in rollout.feedback:
            raise ServerError("the optimizer's model is down", status=503)
        found = re.findall(r"(rule|limit) := ([\w .]+)", rollout.feedback)
        return Proposal(values={name: int(text) if name == "limit" else text for name, text in found})


def learn(records: Any, **options: Any) -> Any:
    return propose_from(records, Router(), Scripted(), rule=majority, **options)


LOGS: list[dict[str, Any]] = [
    {"id": "a1", "input": "invoice", "output": "sales", "feedback": "rule := Use billing", "score": 0.0},
    {"id": "a2", "input": "refund", "output": "sales", "feedback": "rule := Use billing", "score": 0.0},
    {"id": "a3", "input": "lamp", "output": "sales", "score": 1.0},
    {"id": "a4", "input": "parcel", "output": "sales", "feedback": "limit := 5", "score": 0.0},
]


def test_the_update_comes_from_the_records_alone() -> None:
    """Values, provenance by the records' ids, proposals in order; the agent is neither run nor changed."""
    agent = Router()
    update = propose_from(LOGS, agent, Scripted(), rule=majority)
    assert update.values == {"rule": "Use billing", "limit": 5}
    assert update.provenance == {"rule": ("a1", "a2"), "limit": ("a4",)}
    assert update.records == ("a1", "a2", "a3", "a4")
    assert [bool(one.values) for one in update.proposals] == [True, True, False, True]
    assert update.before == {"rule": "Answer sales.", "limit": 3}
    assert (agent.rule.data, agent.limit.data) == ("Answer sales.", 3)
    assert update.apply() == update.values
    assert (agent.rule.data, agent.limit.data) == ("Use billing", 5)


def test_apply_stores_in_this_or_another_agent() -> None:
    """`apply=True` stores at once; `update.apply(other)` stores all values or none."""
    agent, other = Router(), Router()
    update = propose_from(LOGS, agent, Scripted(), rule=majority, apply=True)
    assert agent.rule.data == "Use billing"
    update.apply(other)
    assert (other.rule.data, other.limit.data) == ("Use billing", 5)
    with pytest.raises(ConfigError, match="parameter 'limit'"):
        update.apply([ParameterNode("x", name="rule")])


def test_parameters_alone_are_enough() -> None:
    """If the agent is in another program, its texts are given as ParameterNodes."""
    rule = ParameterNode("Answer sales.", name="rule")
    assert propose_from(LOGS[:2], [rule], Scripted(), rule=majority).values == {"rule": "Use billing"}
    assert propose_from(LOGS[:2], rule, Scripted(), rule=majority).values == {"rule": "Use billing"}


def test_corrections_become_feedback_and_a_score() -> None:
    """A correction is the output that a person wanted; one that equals the output is a perfect score."""
    logged = read_records(
        [
            {"x": 1, "output": "5", "correction": "4", "comment": "Off by one."},
            {"x": 2, "output": "4", "correction": " 4 "},
            {"x": 3, "output": "5", "correction": "4", "score": 0.4},
        ]
    )
    assert [one.rollout.score for one in logged] == [0.0, 1.0, 0.4]
    assert logged[0].rollout.feedback == ("Off by one.\nA person corrected this output. It should have been: 4")
    assert logged[1].rollout.feedback == ""


def test_the_optimizers_prompt_holds_input_transcript_and_correction() -> None:
    """The real LLMOptimizer and merge ask a model once for each record."""
    prompts: list[str] = []

    def answer(messages: Any) -> str:
        prompts.append("\n".join(message["content"] for message in messages))
        return json.dumps({"reasoning": "r", "suggestion": {"rule": "Invoices go to billing."}})

    llm = as_model(answer, name="fake")
    calls = [{"role": "user", "content": "route THE-INPUT"}, {"role": "assistant", "content": "sales, of course"}]
    records = [{"x": "THE-INPUT", "output": "sales", "correction": "billing", "messages": calls}]
    update = propose_from(records, Router(), llm=llm)
    assert update.values == {"rule": "Invoices go to billing."}
    for text in ("THE-INPUT", "should have been: billing", "user: route THE-INPUT", "reply: sales, of course"):
        assert text in prompts[0]
    assert update.usage["optimizer"].calls == 1


def test_unusable_records_are_skipped_with_the_reason() -> None:
    """Skipped are unlabelled records, those of other values, and those whose call was lost."""
    lost = Failure(stage="agent", error="RateLimitError", message="429", infrastructure=True)
    records = [
        LOGS[0],
        {"id": "raw", "input": "x", "output": "y"},
        {"id": "old", "input": "x", "output": "y", "score": 0.0, "values": {"rule": "An older rule."}},
        {"id": "same", "input": "x", "output": "y", "score": 0.0, "values": {"rule": "Answer sales."}},
        Rollout(sample_id=9, x="x", failure=lost),
    ]
    update = learn(records)
    assert update.records == ("a1", "same")
    assert update.skipped == {"raw": UNLABELLED, "old": STALE, 9: "its call was lost: RateLimitError"}
    with pytest.raises(ConfigError, match="no score, no feedback"):
        learn([records[1]])
    with pytest.raises(ConfigError, match="the list is empty"):
        learn([])


def test_satisfied_records_propose_nothing() -> None:
    """At `max_score` and above the optimizer is not asked."""
    optimizer = Scripted()
    propose_from(LOGS, Router(), optimizer, rule=majority, max_score=1.0)
    assert [rollout.x for rollout in optimizer.seen] == ["invoice", "refund", "parcel"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "rollouts", "ours"])
def test_files_are_read(kind: str, tmp_path: Path) -> None:
    """JSON lines, a list, a mapping with `rollouts`, and our own Rollouts as JSON are read."""
    path = tmp_path / ("logs.jsonl" if kind == "jsonl" else "logs.json")
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(one) for one in LOGS) + "\n\n", encoding="utf-8")
    elif kind == "ours":
        rollouts = [
            Rollout(
                sample_id=i, **{"x" if name == "input" else name: part for name, part in one.items() if name != "id"}
            )
            for i, one in enumerate(LOGS)
        ]
        path.write_bytes(msgspec.json.encode(rollouts))
    else:
        path.write_text(json.dumps(LOGS if kind == "json" else {"rollouts": LOGS}), encoding="utf-8")
    for given in (path, str(path)):
        assert learn(given).values == {"rule": "Use billing", "limit": 5}


def test_fields_map_another_tools_names() -> None:
    """A path may be nested, or a column name with dots; an unknown field of ours is a ConfigError."""
    record = {"span": {"in": "invoice", "out": "sales"}, "eval.score": 0.0, "eval.text": "limit := 7"}
    fields = {"x": "span.in", "output": "span.out", "score": "eval.score", "feedback": "eval.text"}
    logged = read_records([record], fields)[0].rollout
    assert (logged.x, logged.output, logged.score) == ("invoice", "sales", 0.0)
    assert learn([record], fields=fields).values == {"limit": 7}
    with pytest.raises(ConfigError, match="fields to name some of"):
        read_records([record], {"label": "x"})


def test_a_data_frame_is_a_list_of_records() -> None:
    """NaN is a missing value."""
    pandas: Any = pytest.importorskip("pandas")
    frame = pandas.DataFrame([{"input": "a", "output": "b", "score": 0.0, "feedback": "limit := 4"}, {"input": "c"}])
    update = learn(frame)
    assert (update.values, update.skipped) == ({"limit": 4}, {1: UNLABELLED})


def test_a_lost_proposal_loses_one_record() -> None:
    """The others are merged; the failure explains what happened."""
    update = learn([*LOGS[:2], {"id": "bad", "input": "x", "output": "y", "feedback": "crash", "score": 0.0}])
    assert update.values == {"rule": "Use billing"}
    assert [(one.stage, one.error, one.infrastructure) for one in update.failures] == [
        ("proposal", "ServerError", True)
    ]


def test_checks_refuse_values() -> None:
    """As in a trainer, a placeholder must be kept."""
    prompt = ParameterNode("Answer {ticket}.", name="rule")
    update = propose_from(LOGS[:1], [prompt], Scripted(), rule=majority)
    assert update.values == {}
    assert "{ticket}" in update.failures[0].message
    assert f"{update}" == "no change: 1 records, 0 skipped, 1 failures"


def test_the_text_shows_changes_and_reasons() -> None:
    """It is meant for a person, or a pull request."""
    text = f"{learn(LOGS)}"
    assert "rule (records a1, a2)\n-Answer sales.\n+Use billing" in text.replace("@@ -1 +1 @@\n", "")
    assert text.endswith("4 records, 0 skipped, 0 failures")


def test_a_budget_is_respected() -> None:
    """It works as in a run."""
    llm = as_model(lambda messages: "TERMINATE", name="fake")
    with pytest.raises(BudgetExceededError):
        propose_from(LOGS, Router(), LLMOptimizer(llm=llm), llm=llm, budget=Budget(calls=1))


async def test_the_awaitable_form_and_a_replay_agree(tmp_path: Path) -> None:
    """Recorded calls replay to the same update, with the same usage."""
    transport = FakeTransport(json.dumps({"suggestion": {"rule": "Invoices go to billing."}}))
    llm = LLM("openai/gpt-4o-mini", api_key="none", transport=transport)
    found = []
    for mode in ("all", "none"):
        with aggregator.cassette(tmp_path / "a.yaml", mode):
            found.append(await apropose_from(LOGS, Router(), LLMOptimizer(llm=llm), llm=llm))
    assert [update.values for update in found] == [{"rule": "Invoices go to billing."}] * 2
    assert found[0].usage == found[1].usage
    assert len(transport.requests) == 4  # one for each record; proposals that agree need no merge


def test_our_own_transcripts_are_accepted() -> None:
    """An agent in production records them with `transcript()`."""
    with transcript() as seen:
        seen.llm_call([{"role": "user", "content": "Hi"}])
    logged = read_records([{"x": 1, "output": 2, "score": 0, "transcript": seen.render()}])
    assert "user: Hi" in logged[0].rollout.transcript


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"x": 1}, "a list of records"),
        (["text"], "at record 0"),
        ([{"x": 1, "score": "good"}], "finite number"),
        ([{"x": 1, "id": [1]}], "as the id"),
        ([{"x": 1, "values": 3}], "values as a dict"),
        ("/no/such/file.jsonl", "No such file"),
    ],
)
def test_bad_records_are_named(records: Any, message: str) -> None:
    """The ConfigError names the record, before any call."""
    with pytest.raises(ConfigError, match=message):
        learn(records)
