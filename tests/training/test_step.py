"""The step as an argument: a part works alone as it does inside a run, and scores are paid for once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from training_fakes import Adder, ScriptedModel, additions, exact, first_suggestion, from_feedback, suggest

from aggregator import (
    AggregatedUpdate,
    ConfigError,
    Decision,
    LLMMerge,
    LLMOptimizer,
    Proposal,
    Rollout,
    Step,
    evaluate,
)
from aggregator.cassettes.lineage import current_lineage
from aggregator.errors import AuthenticationError, RateLimitError
from aggregator.gates import improves_on_batch, improves_on_validation
from aggregator.records import Sample, StepReport, Values
from aggregator.rules import best_tried, majority
from aggregator.training.checkpoints import CHECKPOINT

DATA = additions(5)
SAMPLES = [Sample(i, x, info) for i, (x, info) in enumerate(DATA)]


def asking(*amounts: int) -> list[Proposal]:
    return [Proposal(values={"amount": amount}, sample_ids=(i,)) for i, amount in enumerate(amounts)]


class Counting(Adder):
    """Records the amount and lineage of each run; loses the calls of given inputs."""

    def __init__(self, lost: Sequence[int] = ()) -> None:
        super().__init__()
        self.lost = set(lost)
        self.runs: list[tuple[int, int]] = []
        self.places: list[str] = []

    async def forward(self, x: int) -> int:
        self.runs.append((self.amount.data, x))
        self.places.append(current_lineage())
        await asyncio.sleep(0)
        if x in self.lost:
            raise RateLimitError("slow down", status=429)
        return await super().forward(x)


async def test_a_merge_alone_made_two_calls_and_refused_all() -> None:
    """Outside a run it reads the parameters from the step: one call, a schema, a typed value."""
    model = ScriptedModel(suggest(amount="4"))
    (merged,) = await LLMMerge(model)(asking(3, 5), Step.of(Adder()))
    assert (merged.values, merged.error, len(model.asked)) == ({"amount": 4}, None, 1)
    schema = model.options[0]["response_format"]["json_schema"]["schema"]
    assert set(schema["properties"]["suggestion"]["properties"]) == {"amount"}  # the proposed value


async def test_a_batch_gate_alone_raised_from_zip() -> None:
    """It evaluates the minibatch with both values, and the agent keeps its own."""
    agent = Adder()
    step = Step.of(agent, guide=exact, samples=DATA)
    assert (await improves_on_batch()({"amount": 1}, {"amount": 5}, step)).accepted
    assert not (await improves_on_batch()({"amount": 5}, {"amount": 1}, step)).accepted
    assert agent.amount.data == 1


async def test_best_tried_alone_returned_nothing() -> None:
    """It runs the agent with each proposal, and keeps the best."""
    step = Step.of(Adder(), guide=exact, samples=DATA)
    (best,) = await best_tried(asking(3, 5, 7), step)
    assert best.values == {"amount": 5}


async def test_an_optimizer_alone_sends_the_prompt_of_a_run() -> None:
    """Parameters and values come from the step."""
    inside, alone = ScriptedModel("TERMINATE"), ScriptedModel("TERMINATE")
    AggregatedUpdate(Adder(3), LLMOptimizer(llm=inside), rule=majority).train(exact, [(1, 9)])
    step = Step.of(Adder(3), guide=exact, samples=[(1, 9)])
    (seen,) = await step.evaluate({}, step.samples)
    await LLMOptimizer(llm=alone).propose([seen], step)
    assert alone.asked == inside.asked


async def test_the_prompt_shows_the_steps_values_not_the_agents() -> None:
    """A part reads a candidate's values from the step."""
    model = ScriptedModel("TERMINATE")
    step = replace(Step.of(Adder(3)), values={"amount": 8, "label": "x"})
    await LLMOptimizer(llm=model).propose([Rollout(sample_id=0, output=1, score=0.0)], step)
    assert '"value": 8' in model.asked[0][-1]["content"]


async def test_without_a_guide_evaluate_is_an_error() -> None:
    """The error says how to give one."""
    with pytest.raises(ConfigError, match=r"Step\.of\(agent, guide=guide, samples=samples\)"):
        await Step.of(Adder()).evaluate({"amount": 5}, SAMPLES)


@pytest.mark.parametrize(("agent", "options"), [("agent", {}), (Adder(), {"stepsize": 2}), (Adder(), {"samples": 3})])
def test_invalid_arguments_of_a_step(agent: Any, options: dict[str, Any]) -> None:
    """An invalid agent, stepsize or data set is refused."""
    with pytest.raises(ConfigError):
        Step.of(agent, **options)


async def test_a_gate_wrote_into_global_state() -> None:
    """Two steps share nothing: a score that one gate has seen is paid for again by the other."""
    first, second = Counting(), Counting()
    gate = improves_on_validation(DATA)
    for agent in (first, second):
        step = Step.of(agent, guide=exact)
        assert (await gate(step.values, {**step.values, "amount": 5}, step)).accepted
    assert len(first.runs) == len(second.runs) == 8


async def test_a_score_is_paid_for_once() -> None:
    """It is kept per values, sample, guide and repeat; a second request returns the score only."""
    agent = Counting()
    step = Step.of(agent, guide=exact, samples=DATA)
    new = await step.evaluate({"amount": 5}, SAMPLES)
    again = await step.evaluate({"amount": 5}, SAMPLES[::-1])
    assert len(agent.runs) == 4
    assert [run.score for run in again] == [run.score for run in new[::-1]] == [1.0] * 4
    assert (new[0].output, again[-1].output, again[-1].sample_id) == (5, None, 0)
    await step.evaluate({"amount": 5}, SAMPLES, fresh=True)
    assert len(agent.runs) == 8
    await step.evaluate({"amount": 5}, SAMPLES, guide=lambda x, output, info: 0.0)
    assert len(agent.runs) == 12


async def test_repeats_are_ordered_by_sample() -> None:
    """Each has its number, and from the second on its own lineage."""
    agent = Counting()
    step = Step.of(agent, guide=exact)
    runs = await step.evaluate({"amount": 5}, SAMPLES[:2], repeats=2)
    assert [(run.sample_id, run.repeat) for run in runs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    ends = sorted(place.split("/", 1)[1] for place in agent.places)
    assert ends == ["sample=0", "sample=0/repeat=1", "sample=1", "sample=1/repeat=1"]
    assert len(await step.evaluate({"amount": 5}, SAMPLES[:2], repeats=3)) == 6
    assert len(agent.runs) == 6


async def test_concurrent_evaluations_of_the_same_values_are_paid_for_once() -> None:
    """The second waits for the first, so that neither calls nor lineage depend on timing."""
    agent = Counting()
    step = Step.of(agent, guide=exact)
    async with asyncio.TaskGroup() as group:
        both = [group.create_task(step.evaluate({"amount": 5}, SAMPLES)) for _ in range(2)]
        other = group.create_task(step.evaluate({"amount": 7}, SAMPLES))
    assert [run.score for run in both[0].result()] == [run.score for run in both[1].result()]
    assert sorted(agent.runs) == sorted([*[(5, x) for x in range(4)], *[(7, x) for x in range(4)]])
    assert other.result()[0].score == 0.0


async def test_a_lost_instance_is_run_again() -> None:
    """A lost call has no score; an agent's error has one, and is remembered."""
    agent = Counting(lost=[2])
    step = Step.of(agent, guide=exact)
    assert [run.score for run in await step.evaluate({"amount": 5}, SAMPLES)] == [1.0, 1.0, None, 1.0]
    agent.lost = set()
    assert [run.score for run in await step.evaluate({"amount": 5}, SAMPLES)] == [1.0] * 4
    assert [run for run in agent.runs if run[1] == 2] == [(5, 2)] * 3  # and once more at once
    assert len(agent.runs) == 6


async def test_values_are_converted_before_they_are_compared() -> None:
    """`"5"` and 5 are one value of an int parameter; a value of the wrong type is refused."""
    agent = Counting()
    step = Step.of(agent, guide=exact)
    await step.evaluate({"amount": "5"}, SAMPLES)
    await step.evaluate({"amount": 5}, SAMPLES)
    assert len(agent.runs) == 4
    with pytest.raises(Exception, match="Expected `int`, got 'many'"):
        await step.evaluate({"amount": "many"}, SAMPLES)


async def test_an_evaluation_raises_an_error_of_every_call() -> None:
    """It is raised from `evaluate`, and ends the run."""

    def guide(x: int, output: int, info: int) -> float:
        raise AuthenticationError("no such key", status=401)

    with pytest.raises(AuthenticationError):
        await Step.of(Adder(), guide=guide).evaluate({"amount": 5}, SAMPLES)


def trained(agent: Any, gate: Any, **options: Any) -> Any:
    optimizer = LLMOptimizer(llm=ScriptedModel(from_feedback))
    trainer = AggregatedUpdate(agent, optimizer, llm=ScriptedModel(first_suggestion), gate=gate, observers=[])
    return trainer.train(exact, DATA, **options)


def test_evaluations_have_their_own_lineage() -> None:
    """`values=<digest>/sample=<id>` below the step is the same for every caller, so that tickets never race."""
    agent = Counting()
    trained(agent, improves_on_batch(), batch_size=4)
    trials = {place.split("/sample=")[0] for place in agent.places if "values=" in place}
    (place,) = trials
    assert place.startswith("train/epoch=0/batch=0/values=")


class Remembers:
    """A gate that counts its calls in the step's memory."""

    def __init__(self, *, spoil: Any = None, fail_at: int | None = None) -> None:
        self.seen: list[Any] = []
        self.spoil = spoil
        self.fails_now = fail_at

    async def __call__(self, before: Values, after: Values, step: Step) -> Decision:
        self.seen.append(dict(step.memory))
        if step.number == self.fails_now:
            step.memory["asked"] = -1
            raise ZeroDivisionError
        step.memory["asked"] = step.memory.get("asked", 0) + 1
        if self.spoil is not None:
            step.memory["spoiled"] = self.spoil
        return Decision(accepted=False, reason="never")


def test_a_gates_memory_is_saved_with_the_step() -> None:
    """The next step reads what it wrote."""
    gate = Remembers()
    trained(Adder(), gate)
    assert gate.seen == [{}, {"asked": 1}, {"asked": 2}, {"asked": 3}]


def test_a_gates_memory_is_dropped_with_a_step_that_fails(tmp_path: Path) -> None:
    """A resumed run has the memory of the last finished step."""
    with pytest.raises(ZeroDivisionError):
        trained(Adder(), Remembers(fail_at=2), run_dir=tmp_path)
    assert json.loads((tmp_path / CHECKPOINT).read_bytes())["state"]["notes"] == {"asked": 2}
    gate = Remembers()
    trained(Adder(), gate, run_dir=tmp_path, resume=True)
    assert gate.seen == [{"asked": 2}, {"asked": 3}]


def test_a_gates_memory_must_be_json() -> None:
    """Anything else could not be saved, and the error names the gate."""
    with pytest.raises(ConfigError, match=r"Expected the gate Remembers to keep JSON in step\.memory"):
        trained(Adder(), Remembers(spoil=object()))


def test_other_parts_cannot_write_the_memory() -> None:
    """A rule that tries to gets an error."""

    async def writes(proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
        step.memory["mine"] = 1
        return proposals

    trainer = AggregatedUpdate(Adder(), LLMOptimizer(llm=ScriptedModel(from_feedback)), rule=writes)
    with pytest.raises(TypeError, match="does not support item assignment"):
        trainer.train(exact, DATA)


def test_a_resumed_run_does_not_pay_for_known_scores(tmp_path: Path) -> None:
    """The validation scores of the current values are part of the checkpoint."""

    class Stop(BaseException):
        pass

    def runs(resume: bool) -> int:
        agent = Counting()
        gate = improves_on_validation([(10, 15), (11, 16)])

        def watch(report: StepReport) -> None:
            if not resume:
                raise Stop

        optimizer = LLMOptimizer(llm=ScriptedModel(suggest(amount=50 if resume else 20)))
        trainer = AggregatedUpdate(agent, optimizer, rule=majority, gate=gate, observers=[watch])
        trainer.train(exact, DATA[:2], run_dir=tmp_path, resume=resume)
        return sum(x >= 10 for _, x in agent.runs)

    with pytest.raises(Stop):
        runs(resume=False)
    assert runs(resume=True) == 2  # of the one new candidate


def test_evaluate_accepts_any_callable() -> None:
    """No parameters are needed: a function, a built-in or a Module works."""
    assert evaluate(lambda x: x + 1, exact, [(1, 2)]) == [1.0]
    assert evaluate(abs, exact, [(-3, 3)]) == [1.0]
    assert evaluate(Adder(), exact, [(1, 2)]) == [1.0]
