"""Our algorithm and our agents inside GEPA, through its own `gepa.optimize`, offline with the simulated model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from aggregator import LLM, AggregatedUpdate, Budget, Module, ParameterNode, cassette, exact_match
from aggregator.errors import BudgetExceededError, ConfigError
from aggregator.records import Proposal, Rollout
from aggregator.rules import majority
from aggregator.simulation import SimulatedModel
from aggregator.training.batches import minibatches
from aggregator.training.proposers import LLMOptimizer
from aggregator.training.step import Step

gepa: Any = pytest.importorskip("gepa", reason="runs in the environment gepa of tests/environments.py")
hosts: Any = pytest.importorskip("aggregator.hosts.gepa")

ROWS = [
    ("do you sell lamps", "sales"),
    ("the invoice is wrong", "billing"),
    ("my parcel is broken", "shipping"),
    ("a refund for the invoice", "billing"),
    ("where is my parcel", "shipping"),
    ("the courier lost my parcel", "shipping"),
]


class Router(Module):
    """Routes by a prompt of two parameters, one of which is not text."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.rules = ParameterNode("If no rule applies, answer sales.", description="rules: `word -> team`")
        self.shots = ParameterNode(0, description="how many examples are shown")

    async def forward(self, x: str) -> str:
        messages = [{"role": "system", "content": self.rules.data}, {"role": "user", "content": x}]
        return (await self.llm.complete(messages)).text


@pytest.fixture
def llm() -> Iterator[LLM]:
    with SimulatedModel(seed=1, wrong_rate=0.0) as server:
        yield LLM("openai/simulated-1", base_url=server.base_url, api_key="simulated")


class Quiet:
    """GEPA's logger, silent."""

    def log(self, message: str) -> None:
        """Write nothing."""


class Seen:
    """A GEPA callback that records its first minibatch and all proposals."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.proposed: list[dict[str, str]] = []

    def on_minibatch_sampled(self, event: Mapping[str, Any]) -> None:
        self.batches.append(list(event["minibatch_ids"]))

    def on_proposal_end(self, event: Mapping[str, Any]) -> None:
        self.proposed.append(dict(event["new_instructions"]))


def run_gepa(adapter: Any, seen: Seen, **options: Any) -> Any:
    return gepa.optimize(
        adapter.seed_candidate,
        trainset=ROWS,
        valset=ROWS,
        adapter=adapter,
        reflection_minibatch_size=len(ROWS),
        max_metric_calls=40,
        callbacks=[seen],
        logger=Quiet(),
        module_selector="all",
        **options,
    )


def test_gepa_improves_an_agent_of_ours_by_our_reflection(llm: LLM) -> None:
    router, seen = Router(llm), Seen()
    adapter = hosts.AgentAdapter(router, exact_match)
    strategy = hosts.AggregatedReflection(llm, agent=router, max_score=1.0)
    result = run_gepa(adapter, seen, reflection_strategy=strategy, stop_callbacks=[strategy.stop])
    assert result.val_aggregate_scores[0] < max(result.val_aggregate_scores)
    router.apply(adapter.values(result.best_candidate))
    assert "->" in router.rules.data
    assert strategy.usage.calls > len(ROWS) / 2
    assert strategy.total_tokens_in > strategy.total_tokens_out > 0
    assert adapter.seed_candidate["shots"] == "0"


def test_gepas_first_proposal_is_the_first_update_of_a_trainer(llm: LLM) -> None:
    """The same minibatch in the same order and the same values give the same requests, and so the same bytes."""
    router, seen = Router(llm), Seen()
    strategy = hosts.AggregatedReflection(llm, agent=router)
    run_gepa(hosts.AgentAdapter(router, exact_match), seen, reflection_strategy=strategy)
    drawn = minibatches(len(ROWS), len(ROWS), seed=0, epoch=0)[0]
    rows: list[Any] = [None] * len(ROWS)
    for place, chosen in zip(drawn, seen.batches[0], strict=True):
        rows[place] = ROWS[chosen]
    result = AggregatedUpdate(router, LLMOptimizer(llm=llm), llm=llm).train(exact_match, rows, batch_size=len(ROWS))
    (report,) = result.history
    assert report.update
    assert seen.proposed[0] == {"rules": report.update["rules"], "shots": "0"}


def test_the_same_seed_gives_the_same_run(llm: LLM) -> None:
    runs = []
    for _ in range(2):
        router, seen = Router(llm), Seen()
        strategy = hosts.AggregatedReflection(llm, agent=router)
        result = run_gepa(hosts.AgentAdapter(router, exact_match), seen, reflection_strategy=strategy, seed=5)
        runs.append((seen.batches, seen.proposed, result.candidates, result.val_aggregate_scores))
    assert runs[0] == runs[1]


def test_the_strategy_proposes_for_gepas_own_adapters(llm: LLM) -> None:
    strategy, seen = hosts.AggregatedReflection(llm), Seen()
    default = gepa.adapters.default_adapter.default_adapter.DefaultAdapter
    adapter = default(model=lambda messages: llm(messages).text)
    result = gepa.optimize(
        {"system_prompt": "If no rule applies, answer sales."},
        trainset=[{"input": x, "answer": team, "additional_context": {}} for x, team in ROWS],
        adapter=adapter,
        reflection_strategy=strategy,
        reflection_minibatch_size=len(ROWS),
        max_metric_calls=40,
        callbacks=[seen],
        logger=Quiet(),
    )
    assert result.val_aggregate_scores[0] < max(result.val_aggregate_scores)


class Echo:
    """Proposes the end of the feedback, and counts its records."""

    def __init__(self) -> None:
        self.seen: list[Rollout] = []

    async def propose(self, rollouts: Sequence[Rollout], step: Step) -> Proposal:
        self.seen += rollouts
        return Proposal(values={step.parameters[0].name: rollouts[0].feedback.split()[-1]})


def record(answer: str, **more: Any) -> dict[str, Any]:
    return {"Inputs": "x", "Generated Outputs": "y", "Feedback": f"say {answer}", **more}


def test_each_record_proposes_and_a_rule_merges() -> None:
    """A record is an instance: three records make three proposals, and GEPA gets one text."""
    echo = Echo()
    strategy = hosts.AggregatedReflection(optimizer=echo, rule=majority)
    data = {"a": [record("one"), record("two"), record("two")]}
    (proposal, following) = strategy.reflect({"a": "zero", "b": "other"}, data, ["a"])
    assert (proposal.new_texts, following) == ({"a": "two"}, strategy)
    assert proposal.metadata["aggregated:proposals"] == [{"a": "one"}, {"a": "two"}, {"a": "two"}]
    assert len(echo.seen) == 3
    assert strategy({"a": "zero"}, data, ["a"]) == {"a": "two"}


def test_jobs_are_answered_in_order_and_records_of_components_are_joined() -> None:
    echo = Echo()
    strategy = hosts.AggregatedReflection(optimizer=echo, rule=majority)
    jobs = [({"a": "", "b": ""}, {name: [record(word)] for name in ("a", "b")}, ["a", "b"]) for word in ("one", "two")]
    assert [proposal.new_texts["a"] for proposal, _ in strategy.reflect_many(jobs)] == ["one", "two"]
    assert len(echo.seen) == 2
    assert echo.seen[0].transcript.count("Inputs: x") == 2


def test_a_satisfied_record_proposes_nothing_and_a_component_without_records_stays() -> None:
    echo = Echo()
    strategy = hosts.AggregatedReflection(optimizer=echo, rule=majority, max_score=1.0)
    (proposal, _) = strategy.reflect({"a": "zero"}, {"a": [record("one", score=1.0)]}, ["a"])
    assert (proposal.new_texts, echo.seen) == ({}, [])
    assert strategy.reflect({"a": "zero"}, {}, ["a"])[0].new_texts == {}


def test_a_value_that_lost_its_placeholder_is_not_proposed() -> None:
    strategy = hosts.AggregatedReflection(optimizer=Echo(), rule=majority)
    (proposal, _) = strategy.reflect({"a": "Answer {question}"}, {"a": [record("one")]}, ["a"])
    assert proposal.new_texts == {}
    assert "{question}" in proposal.metadata["aggregated:failures"][0]


def test_an_exhausted_budget_stops_gepa(llm: LLM) -> None:
    budget = Budget(calls=0)
    poor = LLM("openai/simulated-1", base_url=llm.endpoint.base_url, api_key="simulated", budget=budget)
    router, seen = Router(llm), Seen()
    strategy = hosts.AggregatedReflection(poor, agent=router)
    result = run_gepa(
        hosts.AgentAdapter(router, exact_match), seen, reflection_strategy=strategy, stop_callbacks=[strategy.stop]
    )
    assert isinstance(strategy.error, BudgetExceededError)
    assert (len(result.candidates), len(seen.batches)) == (1, 1)


def test_a_custom_proposer_and_invalid_arguments(llm: LLM) -> None:
    """The strategy is also GEPA's `custom_candidate_proposer`."""
    router, seen = Router(llm), Seen()
    strategy = hosts.AggregatedReflection(llm, agent=router)
    result = run_gepa(hosts.AgentAdapter(router, exact_match), seen, custom_candidate_proposer=strategy)
    assert result.val_aggregate_scores[0] < max(result.val_aggregate_scores)
    with pytest.raises(ConfigError, match="Expected a guide"):
        hosts.AgentAdapter(router, None)
    with pytest.raises(ConfigError, match="stepsize"):
        hosts.AggregatedReflection(llm, stepsize=2)


def test_optimize_anything_accepts_the_strategy(llm: LLM, tmp_path: Path) -> None:
    from gepa.optimize_anything import EngineConfig, GEPAConfig, ReflectionConfig, optimize_anything

    def evaluate(candidate: Any, example: tuple[str, str]) -> tuple[float, dict[str, Any]]:
        said = llm([{"role": "system", "content": candidate}, {"role": "user", "content": example[0]}]).text
        return float(said == example[1]), {"Inputs": example[0], "Feedback": f"Expected: {example[1]}"}

    strategy = hosts.AggregatedReflection(llm)
    reflection = ReflectionConfig(reflection_strategy=strategy, reflection_minibatch_size=len(ROWS))
    engine = EngineConfig(max_metric_calls=40, run_dir=str(tmp_path), capture_stdio=False)
    config = GEPAConfig(engine=engine, reflection=reflection)
    result = optimize_anything("If no rule applies, answer sales.", evaluator=evaluate, dataset=ROWS, config=config)
    assert result.val_aggregate_scores[0] < max(result.val_aggregate_scores)
    assert "->" in result.best_candidate


def test_a_run_of_gepa_is_recorded_and_replayed(llm: LLM, tmp_path: Path) -> None:
    def run(model: LLM) -> Any:
        router, seen = Router(model), Seen()
        strategy = hosts.AggregatedReflection(model, agent=router)
        result = run_gepa(hosts.AgentAdapter(router, exact_match), seen, reflection_strategy=strategy)
        return result.candidates, result.val_aggregate_scores, seen.proposed

    with cassette(tmp_path / "tape.yaml", "all"):
        recorded = run(llm)
    with cassette(tmp_path / "tape.yaml", "none"):
        replayed = run(LLM("openai/simulated-1", base_url=llm.endpoint.base_url, api_key="another"))
    assert replayed == recorded
    assert recorded[2]
