"""Custom parts: their results are checked, missing values filled in, and their errors reported."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, exact, suggest

from aggregator import (
    AggregatedUpdate,
    BasicSearchAlgorithm,
    ConfigError,
    Decision,
    LLMOptimizer,
    Minibatch,
    MinibatchAlgorithm,
    ParameterNode,
    PrioritySearch,
    Proposal,
    Rollout,
    Step,
    StepReport,
    TrainingError,
    evaluate,
)
from aggregator.errors import TrainingWarning
from aggregator.gates import improves_on_batch
from aggregator.rules import chain, majority

DATA = additions(3, count=4)


class Proposes:
    """A minimal custom optimizer."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer

    async def propose(self, rollouts: Sequence[Rollout], step: Step) -> Any:
        return self.answer()


class ProposesAtOnce:
    """The same without `async`."""

    def propose(self, rollouts: Sequence[Rollout], step: Step) -> Proposal:
        return Proposal(values={"amount": 3})


THREE = Proposes(lambda: Proposal(values={"amount": 3}))


async def cancelled() -> Any:
    raise asyncio.CancelledError


def trained(optimizer: Any = THREE, rule: Any = majority, **options: Any) -> Any:
    return AggregatedUpdate(Adder(), optimizer, rule=rule, **options).train(exact, DATA, batch_size=2)


@pytest.mark.parametrize("score", [None, float("nan")])
def test_the_guides_scores_were_lost_if_an_optimizer_gave_none(score: float | None) -> None:
    """`Proposal(values=...)` is enough: score and feedback are taken from the rollout."""
    result = trained(Proposes(lambda: Proposal(values={"amount": 3}, score=score)))
    assert result.train_scores == [0.0, 1.0]


def test_a_gate_refused_every_update_if_an_optimizer_gave_no_score() -> None:
    """The gate compares with the guide's score."""
    result = trained(gate=improves_on_batch())
    assert result.parameters["amount"] == 3
    assert result.history[0].decision.reason == "mean score 0 -> 1 on 2 instances"


@pytest.mark.parametrize("answer", [None, "3", {"amount": 3}, Proposal(values=None)])  # type: ignore[arg-type]
@pytest.mark.parametrize("trainer", [AggregatedUpdate, MinibatchAlgorithm, PrioritySearch])
def test_an_invalid_proposal(trainer: Any, answer: Any) -> None:
    """It raised an AttributeError from inside; now it is a failure that says what was expected."""
    options = {"rule": majority} if trainer is AggregatedUpdate else {}
    messages: list[str] = []

    def keep(report: StepReport) -> None:
        messages.extend(failure.message for failure in report.failures)

    optimizer = Proposes(lambda: answer)
    trainer(Adder(), optimizer, observers=[keep], **options).train(exact, DATA, batch_size=2, max_failure_ratio=1)
    assert messages
    assert all(
        message.startswith("Expected a Proposal(values={...}) from Proposes.propose, got ") for message in messages
    )


@pytest.mark.parametrize("values", [{"amount": "many"}, {"amount": object()}, {"label": "\ud800"}, {"price": 1}])
@pytest.mark.parametrize("trainer", [AggregatedUpdate, MinibatchAlgorithm, BasicSearchAlgorithm, PrioritySearch])
def test_a_value_of_the_wrong_type_ended_the_run(trainer: Any, values: dict[str, Any]) -> None:
    """Every trainer refuses it with a reason, before a rule sees it."""
    options = {"rule": majority} if trainer is AggregatedUpdate else {}
    agent = Adder()
    result = trainer(agent, Proposes(lambda: Proposal(values=values)), **options).train(exact, DATA, batch_size=2)
    assert result.parameters == {"amount": 1, "label": "sum"}
    assert {(failure.stage, failure.error) for failure in result.failures} == {("proposal", "SuggestionError")}
    assert " at 0x" not in str(result.failures)


@pytest.mark.parametrize("trainer", [BasicSearchAlgorithm, MinibatchAlgorithm])
def test_an_optimizer_that_always_failed_left_no_trace(trainer: Any) -> None:
    """Its error is in the failures, even if a rule drops the empty proposals."""

    def fail() -> Any:
        raise ZeroDivisionError

    result = trainer(Adder(), Proposes(fail)).train(exact, DATA, batch_size=4)
    assert {failure.error for failure in result.failures} == {"ZeroDivisionError"}


@pytest.mark.parametrize("fail", [cancelled, lambda: sys.exit(3)])
def test_an_optimizer_that_cancels_itself_was_taken_for_one_without_proposals(fail: Callable[[], Any]) -> None:
    """A cancellation that the optimizer raises itself loses the instance, like any other error."""

    class Fails:
        async def propose(self, rollouts: Sequence[Rollout], step: Step) -> Any:
            return await fail()

    with pytest.raises(TrainingError, match=r"3 of|4 of|2 of"):
        trained(Fails())


def test_a_forward_that_cancels_itself_lost_the_instances_after_it() -> None:
    """One instance is lost and reported; those after it still run."""
    seen: list[Any] = []

    class Cancels(Minibatch):
        async def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
            seen.append(x)
            if x == 2:
                raise asyncio.CancelledError
            return {"amount": 3}, 1.0

    result = Cancels(Adder(), None, rule=majority, max_concurrency=1).train(exact, DATA, batch_size=4)
    assert sorted(seen) == [0, 1, 2, 3]
    assert [(failure.sample_id, failure.error) for failure in result.failures] == [(2, "CancelledError")]


def test_an_optimizer_that_is_not_async() -> None:
    """It raised "object Proposal can't be used in 'await' expression" on every instance."""
    with pytest.raises(ConfigError, match=r"Expected propose of ProposesAtOnce to be async, got .* write `async def`"):
        trained(ProposesAtOnce())


@pytest.mark.parametrize("answer", [None, {"amount": 3}, Proposal(), [3]])
@pytest.mark.parametrize("wrap", [lambda rule: rule, chain])
def test_a_rule_that_returns_no_proposals(wrap: Any, answer: Any) -> None:
    """A rule without `return` silently trained nothing; other results raised AttributeErrors from inside."""

    async def mine(proposals: Any, step: Any) -> Any:
        return answer

    with pytest.raises(
        ConfigError, match=r"Expected a list of Proposals from the rule .*mine, got .*\[\] is no update"
    ):
        trained(rule=wrap(mine))


@pytest.mark.parametrize("answer", [True, None])
@pytest.mark.parametrize("trainer", [AggregatedUpdate, PrioritySearch])
def test_a_gate_that_returns_no_decision(trainer: Any, answer: Any) -> None:
    """It raised an AttributeError from inside."""

    async def mine(before: Any, after: Any, step: Any) -> Any:
        return answer

    with pytest.raises(
        ConfigError, match=r"Expected a Decision\(accepted=\.\.\., reason=\.\.\.\) from the gate .*mine"
    ):
        trainer(Adder(), THREE, rule=majority, gate=mine).train(exact, DATA)


def test_rules_and_gates_that_are_not_async() -> None:
    """The message names the part and the missing `async`."""

    def rule(proposals: Any, step: Any) -> Any:
        return proposals[:1]

    def gate(before: Any, after: Any, step: Any) -> Any:
        return Decision(accepted=True)

    with pytest.raises(ConfigError, match=r"Expected the rule .*rule to be async"):
        trained(rule=rule)
    with pytest.raises(ConfigError, match=r"Expected the gate .*gate to be async"):
        trained(gate=gate)


def test_an_async_observer_was_never_awaited() -> None:
    """Observers may be sync or async."""
    seen: list[int] = []

    async def watch(report: StepReport) -> None:
        await asyncio.sleep(0)
        seen.append(report.step)

    trained(observers=[watch])
    assert seen == [0, 1]


class Returns(Minibatch):
    """An overridden `forward` that returns a given value."""

    output: Any = None

    def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
        return self.output


def returning(output: Any, trainer: Any = Minibatch, **options: Any) -> Any:
    kind = type("Returning", (Returns, trainer), {"output": output})
    return kind(Adder(), None, **options).train(exact, DATA, batch_size=2)


@pytest.mark.parametrize("score", ["high", float("nan"), True])
def test_an_invalid_score_of_forward(score: Any) -> None:
    """It raised a TypeError, or NaN became the step's score."""
    with pytest.raises(ConfigError, match=r"Expected \(mapping, score\) from forward, the score a finite number, got"):
        returning(({"amount": 3}, score), rule=majority)


def test_a_gate_did_not_see_the_scores_that_forward_returned() -> None:
    """Report and gate get the score of (mapping, score)."""
    result = returning(({"amount": 3}, 0.25), rule=majority, gate=improves_on_batch())
    assert result.history[0].scores == (0.25, 0.25)
    assert result.history[0].decision.before == 0.25


@pytest.mark.parametrize("trainer", [MinibatchAlgorithm, BasicSearchAlgorithm, PrioritySearch])
def test_proposals_of_an_overridden_forward_were_dropped(trainer: Any) -> None:
    """A trainer that asks for whole minibatches merges nothing, so it refuses a `forward` that proposes."""
    with pytest.raises(
        ConfigError, match="Expected forward to return a Rollout where the optimizer gets the whole minibatch"
    ):
        returning({"amount": 3}, trainer)


@pytest.mark.parametrize("returned", [{"amount": 3}, "done", True, float("nan"), None])
def test_an_update_with_an_invalid_result(returned: Any) -> None:
    """A mapping raised a TypeError; True and NaN became the step's score."""

    class Updates(AggregatedUpdate):
        def update(self, outputs: Any, verbose: bool | str = False) -> Any:
            return returned

    result = Updates(Adder(), THREE, rule=majority).train(exact, DATA, batch_size=2)
    assert result.train_scores == [0.0, 0.0]
    assert result.history[0].update == {}


def test_parameters_of_another_agent_were_trained_instead() -> None:
    """The optimizer's parameters must be the agent's own objects; equal names do not suffice."""

    class Named(Proposes):
        parameters = Adder().parameters()

    with pytest.raises(ConfigError, match=r"Expected the optimizer's parameters to be the agent's own \(amount, "):
        trained(Named(THREE.answer))


def test_names_instead_of_parameters() -> None:
    """They raised an AttributeError from inside."""

    class Named(Proposes):
        parameters = ("amount",)

    with pytest.raises(ConfigError, match=r"got 'amount'; name them as in LLMOptimizer\(parameters="):
        trained(Named(THREE.answer))


def test_evaluate_silently_returned_nones() -> None:
    """It warns of instances without a score, with the first one's reason; a guide that cannot judge is refused."""

    def guide(x: int, output: int, info: int) -> float:
        if x == 2:
            raise ZeroDivisionError("no marks")
        return 1.0

    message = "1 of 4 instances have no score; the first, instance 2, failed in the guide: ZeroDivisionError: no marks"
    with pytest.warns(TrainingWarning, match=message):
        assert evaluate(Adder(), guide, DATA) == [1.0, 1.0, None, 1.0]
    with pytest.raises(ConfigError, match="Expected a guide"):
        evaluate(Adder(), lambda x, output: 1.0, DATA)  # type: ignore[arg-type]


def test_saving_an_agent_without_save() -> None:
    """It raised an AttributeError after the first steps."""

    class Bare:
        def __init__(self) -> None:
            self.agent = Adder()

        def parameters(self) -> list[Any]:
            return self.agent.parameters()

        async def __call__(self, x: int) -> int:
            return await self.agent.forward(x)

    with pytest.raises(ConfigError, match=r"Expected an agent with save\(path\) with save_frequency=1"):
        AggregatedUpdate(Bare(), THREE, rule=majority).train(exact, DATA, save_frequency=1)


class Assigns(Adder):
    """Assigns to its own parameter in a rollout, and changes another in place."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = ParameterNode([0])

    async def forward(self, x: int) -> int:
        self.amount.data += 1
        self.seen.data.append(x)
        return x + len(self.seen.data)


@pytest.mark.parametrize("trainer", [AggregatedUpdate, MinibatchAlgorithm, PrioritySearch])
def test_assignments_in_a_rollout_were_permanent(trainer: Any) -> None:
    """They are limited to the instance: only accepted updates last. A search ended in a ValueError."""
    options = {"rule": majority} if trainer is AggregatedUpdate else {}
    agent = Assigns()
    silent = Proposes(Proposal)
    result = trainer(agent, silent, **options).train(lambda x, output, info: float(output == x + 2), DATA, batch_size=2)
    assert result.parameters == {"amount": 1, "label": "sum", "seen": [0]}
    assert result.train_scores == [1.0, 1.0]
    assert (agent.amount.data, agent.seen.data) == (1, [0])


def test_assignments_in_a_trial_reached_the_next_instance() -> None:
    """Gates and test sets isolate their instances, too."""
    agent = Assigns()
    trainer = AggregatedUpdate(agent, THREE, rule=majority, gate=improves_on_batch(), max_concurrency=1)
    result = trainer.train(lambda x, output, info: float(output == x + 2), DATA, batch_size=4, test_dataset=DATA)
    assert result.test_scores == [1.0, 1.0]
    assert result.history[0].decision.after == 1.0


def test_assignments_of_an_optimizer_were_permanent_without_a_gate() -> None:
    """An optimizer proposes; it does not write."""

    class Writes:
        async def propose(self, rollouts: Sequence[Rollout], step: Step) -> Any:
            step.parameters[0].data = 7
            return Proposal()

    assert trained(Writes()).parameters["amount"] == 1


def test_ensure_improvement_replaced_the_gate() -> None:
    """If both are given, both must accept: the minibatch first, then the trainer's gate."""
    asked: list[Any] = []

    async def never(before: Any, after: Any, step: Any) -> Decision:
        asked.append(after["amount"])
        return Decision(accepted=False, reason="never")

    for amount, reason, reached in ((0, "mean score 0 -> 0 on 4 instances", []), (3, "never", [3])):
        optimizer = Proposes(lambda amount=amount: Proposal(values={"amount": amount}))  # type: ignore[misc]
        trainer = AggregatedUpdate(Adder(), optimizer, rule=majority, gate=never)
        result = trainer.train(exact, DATA, batch_size=4, ensure_improvement=True)
        assert (result.history[0].decision.reason, asked) == (reason, reached)
        assert result.parameters["amount"] == 1


class Overriding(LLMOptimizer):
    """A native optimizer whose proposals are overridden."""

    async def propose(self, rollouts: Any, step: Any) -> Proposal:
        return Proposal(values={"amount": "3"})


async def texts(proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
    return [Proposal(values={"amount": "3"})]


@pytest.mark.parametrize(
    "optimizer",
    [
        Overriding(llm=ScriptedModel("unused")),
        LLMOptimizer(llm=ScriptedModel(suggest(amount=2)), num_candidates=2, select=texts),
    ],
    ids=["an overridden propose", "a rule of one's own"],
)
def test_a_replaced_native_proposal_is_converted(optimizer: Any) -> None:
    """Native proposals are typed already and not converted again; replacements are."""
    assert trained(optimizer).parameters["amount"] == 3


def small(before: Any, after: Any, parameter: Any, step: Step) -> str | None:
    """A check for at most 4."""
    if parameter.name == "amount" and after > 4:
        return f"Expected at most 4, got {after} in place of {before}"
    return None


@pytest.mark.parametrize("trainer", [AggregatedUpdate, MinibatchAlgorithm, PrioritySearch])
def test_a_value_refused_by_a_check_is_not_applied(trainer: Any) -> None:
    """Its reason is in the failures; the other values of the proposal are applied."""
    options = {"rule": majority} if trainer is AggregatedUpdate else {}
    proposes = Proposes(lambda: Proposal(values={"amount": 5, "label": "x"}))
    agent = Adder()
    run = trainer(agent, proposes, checks=[small], **options)
    result = run.train(lambda x, output, info: (float(agent.label.data == "x"), "no"), DATA, batch_size=4)
    assert result.parameters == {"amount": 1, "label": "x"}
    messages = {failure.message for failure in result.failures}
    assert messages == {"Expected at most 4, got 5 in place of 1 - at $.suggestion.amount"}


def test_a_check_with_an_invalid_result() -> None:
    """True is not a reason."""
    with pytest.raises(ConfigError, match="Expected a reason or None from the check .*<lambda>, got True"):
        trained(checks=[lambda before, after, parameter, step: True])
