"""One task of the quality benchmark, by `optimize`, inside DSPy and inside GEPA: the same proposals for the same seed.

The benchmark's optimizer and merge draw from one generator, in the order of their calls. Here each call draws by
itself, from what it is asked, as the simulated model does: threads may answer in any order.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

import pytest

from aggregator import LLM, AggregatedUpdate, LLMMerge, ParameterNode, optimize, trainable
from aggregator.errors import TrainingWarning
from aggregator.records import Completion, Proposal, Rollout
from aggregator.simulation import SimulatedModel
from aggregator.training.batches import minibatches
from aggregator.training.step import Step
from benchmarks.quality import BATCH, Meter, NoisyOptimizer, SimulatedMerge, World, make_agent

dspy: Any = pytest.importorskip("dspy", reason="runs in the environment dspy of tests/environments.py")
gepa: Any = pytest.importorskip("gepa", reason="runs in the environment dspy of tests/environments.py")
in_dspy: Any = pytest.importorskip("aggregator.hosts.dspy")
in_gepa: Any = pytest.importorskip("aggregator.hosts.gepa")

ROWS = 48
NOISE = 0.3
Asked = dict[str, dict[str, Any]]
"""The proposals, by instance and current values."""


class Optimizer(NoisyOptimizer):
    """The benchmark's optimizer, with draws that depend on its prompt; records its proposals."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.asked: Asked = {}

    async def propose(self, rollouts: Sequence[Rollout], step: Step) -> Proposal:
        """Propose for one instance."""
        asked = json.dumps([rollouts[0].feedback, step.values["rules"]], sort_keys=True)
        self.world.random = Random(asked)
        proposal: Proposal = await super().propose(rollouts, step)
        self.asked[asked] = dict(proposal.values)
        return proposal


class Merge(SimulatedMerge):
    """The benchmark's merge, with draws that depend on its prompt."""

    async def complete(self, messages: Any, **options: Any) -> Completion:
        """Merge what the prompt shows."""
        self.world.random = Random(messages[-1]["content"])
        completion: Completion = await super().complete(messages, **options)
        return completion


def guide(x: str, output: str, info: str) -> tuple[float, str]:
    return (1.0, "right") if output == info else (0.0, f"wrong {x}: {info}")


def metric(gold: Any, prediction: Any, trace: Any = None) -> Any:
    score, feedback = guide(gold.keyword, prediction.team, gold.team)
    return dspy.Prediction(score=score, feedback=feedback)


class Program(dspy.Module):  # type: ignore[misc] # not typed
    """The benchmark's agent as a DSPy program."""

    def __init__(self) -> None:
        super().__init__()
        self.rules: Any = ParameterNode({}, type=dict[str, str])

    def forward(self, keyword: str) -> Any:
        """Name the team of a keyword."""
        return dspy.Prediction(team=self.rules.data.get(keyword, "unknown"))


class Seen:
    """A GEPA callback: parent, minibatch and proposal of each iteration."""

    def __init__(self) -> None:
        self.parents: list[dict[str, str]] = []
        self.batches: list[list[int]] = []
        self.proposed: list[dict[str, str]] = []

    def on_candidate_selected(self, event: Mapping[str, Any]) -> None:
        """Record the parent."""
        self.parents.append(dict(event["candidate"]))

    def on_minibatch_sampled(self, event: Mapping[str, Any]) -> None:
        """Record the minibatch."""
        self.batches.append(list(event["minibatch_ids"]))

    def on_proposal_end(self, event: Mapping[str, Any]) -> None:
        """Record the proposal."""
        self.proposed.append(dict(event["new_instructions"]))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)
        yield


def world(seed: int) -> World:
    return World(seed, NOISE, Meter(10**6))


@pytest.mark.parametrize("seed", [0, 1])
def test_dspy_and_optimize_propose_the_same(seed: int) -> None:
    ours, theirs = world(seed), world(seed)
    first, second = Optimizer(ours), Optimizer(theirs)
    options: dict[str, Any] = {"batch_size": BATCH, "seed": seed, "run_dir": False, "num_epochs": 2}
    agent = make_agent(ours)
    result = optimize(
        agent, ours.data[:ROWS], guide=guide, optimizer=first, rule=LLMMerge(Merge(ours)), show=False, **options
    )
    teleprompter = in_dspy.AggregatedUpdate(metric, optimizer=second, rule=LLMMerge(Merge(theirs)), **options)
    rows = [dspy.Example(keyword=keyword, team=team).with_inputs("keyword") for keyword, team in theirs.data[:ROWS]]
    trained = teleprompter.compile(Program(), trainset=rows)
    assert first.asked == second.asked
    assert sum(map(bool, first.asked.values())) > 10
    assert [step.update for step in result.history] == [step.update for step in teleprompter.result.history]
    assert trained.rules.data == agent.rules.data != {}
    assert [one.score for one in result.validations] == [one.score for one in teleprompter.result.validations]


@pytest.mark.parametrize("seed", [0, 1])
def test_gepa_and_a_trainer_propose_the_same_for_the_same_minibatch_and_values(seed: int) -> None:
    """GEPA draws minibatches and parents by its own rules; the proposals for them are the same."""
    here, seen = world(seed), Seen()
    optimizer = Optimizer(here)
    adapter = in_gepa.AgentAdapter(make_agent(here), guide)
    gepa.optimize(
        adapter.seed_candidate,
        trainset=here.data[:ROWS],
        adapter=adapter,
        reflection_strategy=in_gepa.AggregatedReflection(
            agent=adapter.agent, optimizer=optimizer, rule=LLMMerge(Merge(here))
        ),
        reflection_minibatch_size=BATCH,
        max_metric_calls=400,
        callbacks=[seen],
        seed=seed,
        logger=type("Quiet", (), {"log": lambda self, message: None})(),
    )
    asked: Asked = {}
    assert len(seen.proposed) >= 4
    for parent, batch, proposed in zip(seen.parents, seen.batches, seen.proposed, strict=False):
        own = world(seed)
        agent, mine = make_agent(own), Optimizer(own)
        agent.apply(adapter.values(parent))
        drawn = minibatches(BATCH, BATCH, seed=0, epoch=0)[0]
        rows: list[Any] = [None] * BATCH
        for place, chosen in zip(drawn, batch, strict=True):
            rows[place] = own.data[chosen]
        trainer = AggregatedUpdate(agent, mine, rule=LLMMerge(Merge(own)))
        (report,) = trainer.train(guide, rows, batch_size=BATCH).history
        assert adapter.values(proposed)["rules"] == report.update["rules"]
        asked |= mine.asked
    assert asked == {key: value for key, value in optimizer.asked.items() if key in asked}


TICKETS = [("do you sell lamps", "sales"), ("the invoice is wrong", "billing"), ("where is my parcel", "shipping")]


def same_team(gold: Any, prediction: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
    return dspy.Prediction(score=float(gold.team == prediction.team), feedback=f"Expected: {gold.team}")


@pytest.fixture
def llm() -> Iterator[LLM]:
    with SimulatedModel(seed=1, wrong_rate=0.0) as server:
        yield LLM("openai/simulated-1", base_url=server.base_url, api_key="simulated")


def tickets() -> list[Any]:
    return [dspy.Example(ticket=ticket, team=team).with_inputs("ticket") for ticket, team in TICKETS]


def test_dspys_gepa_accepts_the_reflection_as_its_instruction_proposer(llm: LLM) -> None:
    strategy = in_gepa.AggregatedReflection(llm)
    teleprompter = dspy.GEPA(
        metric=same_team,
        instruction_proposer=strategy,
        max_metric_calls=30,
        reflection_minibatch_size=len(TICKETS),
        num_threads=2,
        warn_on_score_mismatch=False,
    )
    student = dspy.Predict(dspy.Signature("ticket -> team", "If no rule applies, answer sales."))
    with dspy.context(lm=in_dspy.lm(llm)):
        trained = teleprompter.compile(student, trainset=tickets(), valset=tickets())
    assert "->" in trained.signature.instructions
    assert (strategy.usage.calls > 2, strategy.error) == (True, None)


def test_dspys_own_adapter_of_gepa_is_an_agent(llm: LLM) -> None:
    from dspy.teleprompt.gepa.gepa_utils import DspyAdapter

    student = dspy.Predict(dspy.Signature("ticket -> team", "If no rule applies, answer sales."))

    def feedback(module_inputs: Any, module_outputs: Any, **_: Any) -> Any:
        return same_team(module_inputs, module_outputs)

    adapter = DspyAdapter(student, same_team, {"self": feedback}, num_threads=2, warn_on_score_mismatch=False)
    agent = trainable(adapter, candidate={"self": "If no rule applies, answer sales."})
    with dspy.context(lm=in_dspy.lm(llm)):
        result = optimize(agent, tickets(), guide=None, model=llm, validate=tickets(), run_dir=False, show=False)
    assert "->" in agent.candidate["self"]
    first, last = (result.validations[i].score or 0.0 for i in (0, -1))
    assert first < last
