"""The training loop through its public API, on scripted models."""

from __future__ import annotations

import asyncio
import copy
import random
from pathlib import Path
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, exact, first_suggestion, from_feedback, section, suggest

from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode
from aggregator.errors import (
    APIConnectionError,
    AuthenticationError,
    BudgetExceededError,
    ConfigError,
    RateLimitError,
    TrainingError,
)
from aggregator.records import Proposal
from aggregator.training.algorithms import AggregatedUpdate, Minibatch
from aggregator.training.checkpoints import load_result, save_result
from aggregator.training.merge import majority
from aggregator.training.proposers import LLMOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:the (agent|guide) failed:aggregator.errors.TrainingWarning")


def trainer(agent: Any, *replies: Any, aggregate: Any = first_suggestion, **options: Any) -> AggregatedUpdate:
    return AggregatedUpdate(
        agent, LLMOptimizer(llm=ScriptedModel(*(replies or (from_feedback,)))), llm=ScriptedModel(aggregate), **options
    )


@pytest.mark.requirement("Trace: train(guide, train_dataset)", "Trace's defect 28: train returned None")
def test_a_run_learns_and_returns_its_result(adder: Adder) -> None:
    """One step leads from feedback to a written parameter, scored before and after on the test set."""
    result = trainer(adder).train(exact, additions(5), test_dataset=additions(5), batch_size=4)
    assert adder.amount.data == 5
    assert result.parameters == {"amount": 5, "label": "sum"}
    assert result.initial_parameters == {"amount": 1, "label": "sum"}
    assert result.train_scores == [0.0]
    assert result.test_scores == [0.0, 1.0]
    assert result.history[0].update == {"amount": 5}
    assert result.failures == ()


@pytest.mark.requirement("Trace's defect 29: the default test_dataset raised a TypeError")
def test_every_default_works(adder: Adder) -> None:
    """No test set, batches of one: Trace's own defaults raised a TypeError."""
    result = trainer(adder).train(exact, additions(5))
    assert result.train_scores == [0.0, 1.0, 1.0, 1.0]
    assert result.test_scores == []


@pytest.mark.requirement(
    "Trace: train(test_dataset, eval_frequency)",
    "Trace's defect 30: eval_frequency=0 divided by zero",
)
def test_eval_frequency_0_is_off(adder: Adder) -> None:
    """Trace divided by zero; here 0 never evaluates."""
    result = trainer(adder).train(exact, additions(5), test_dataset=additions(5), eval_frequency=0)
    assert result.test_scores == []


@pytest.mark.requirement("Trace: train(test_dataset, eval_frequency)")
def test_eval_frequency_counts_steps_and_the_end_is_always_evaluated(adder: Adder) -> None:
    """The test set runs before training, every third step, and at the end."""
    result = trainer(adder).train(exact, additions(5, 7), test_dataset=additions(5), eval_frequency=3)
    assert [evaluation.step for evaluation in result.evaluations] == [0, 3, 6, 7]


@pytest.mark.requirement("Trace: AggregatedUpdate(stepsize)")
def test_proposals_are_independent_and_the_aggregator_sees_all_of_them(adder: Adder) -> None:
    """Each instance's prompt has its own feedback only; distinct proposals are weighed by confidence."""
    optimizer = ScriptedModel(from_feedback)
    aggregator = ScriptedModel(suggest(amount=3))
    data = [(0, 2), (1, 4), (2, 5)]
    AggregatedUpdate(adder, LLMOptimizer(llm=optimizer), llm=aggregator).train(exact, data, batch_size=3, stepsize=0.25)
    feedback = sorted(section(messages, "Feedback") for messages in optimizer.asked)
    assert feedback == ["expected 2, got 1", "expected 4, got 2", "expected 5, got 3"]
    assert section(aggregator.asked[0], "CurrentValue").splitlines()[0] == "confidence: 0.75"
    assert section(aggregator.asked[0], "SuggestedValue_1").splitlines()[0] == "confidence: 0.25"
    assert "#SuggestedValue_2" in aggregator.asked[0][-1]["content"]
    assert adder.amount.data == 3


def test_lineage_locates_every_call(adder: Adder) -> None:
    """It has epoch, batch, sample and purpose, so that a replay finds each call in any order."""
    optimizer, aggregator = ScriptedModel(from_feedback), ScriptedModel(first_suggestion)
    data = [(0, 2), (1, 4)]
    AggregatedUpdate(adder, LLMOptimizer(llm=optimizer), llm=aggregator).train(exact, data, batch_size=2)
    assert sorted(optimizer.places) == [
        ("train/epoch=0/batch=0/sample=0/propose", "optimizer"),
        ("train/epoch=0/batch=0/sample=1/propose", "optimizer"),
    ]
    assert aggregator.places == [("train/epoch=0/batch=0/aggregate", "aggregator")]


@pytest.mark.requirement("Trace's defect 21: failed proposals voted for the current value")
@pytest.mark.parametrize(
    ("stepsize", "replies"),
    [(0, [from_feedback]), (0.5, ["TERMINATE"]), (0.5, [suggest(amount=5)]), (0.5, [suggest()])],
    ids=["stepsize 0", "no proposal", "one distinct proposal", "empty suggestions"],
)
def test_no_aggregation_is_paid_for_if_there_is_nothing_to_weigh(adder: Adder, stepsize: float, replies: Any) -> None:
    """Trace called the aggregator for stepsize 0, for all-TERMINATE batches and for a batch of one."""
    aggregator = ScriptedModel("never asked")
    run = AggregatedUpdate(adder, LLMOptimizer(llm=ScriptedModel(*replies)), llm=aggregator)
    run.train(exact, additions(5), batch_size=4, stepsize=stepsize)
    assert aggregator.asked == []


@pytest.mark.requirement("Trace: AggregatedUpdate(stepsize)", "Trace's defect 20: stepsize 0 replaced the parameter")
def test_stepsize_0_changes_nothing(adder: Adder) -> None:
    """Trace replaced the parameter nevertheless."""
    result = trainer(adder).train(exact, additions(5), stepsize=0)
    assert adder.amount.data == 1
    assert result.parameters == result.initial_parameters


@pytest.mark.requirement("Trace's defect 15: a damaged reply was silently no update")
def test_a_value_of_the_wrong_type_is_requested_once_more_and_never_applied(adder: Adder) -> None:
    """'many' is not an int: one repair call quotes the error, then it counts as no suggestion."""
    optimizer = ScriptedModel(suggest(amount="many"))
    result = AggregatedUpdate(adder, LLMOptimizer(llm=optimizer), llm=ScriptedModel("x")).train(exact, [(0, 9)])
    assert adder.amount.data == 1
    assert len(optimizer.asked) == 2
    assert "many" in optimizer.asked[1][-1]["content"]
    assert [(record.stage, record.error) for record in result.failures] == [("proposal", "SuggestionError")]


@pytest.mark.requirement(
    "Trace: bundle(catch_execution_error)",
    "Trace: ExceptionNode.create_feedback('full')",
    "Trace: train(min_score)",
)
def test_an_agent_that_fails_is_feedback_and_scores_min_score() -> None:
    """The optimizer sees the agent's error, the score is min_score, and the run continues."""

    class Broken(Adder):
        async def forward(self, x: int) -> int:
            return x // (x - 1)

    optimizer = ScriptedModel("TERMINATE")
    run = AggregatedUpdate(Broken(), LLMOptimizer(llm=optimizer), llm=ScriptedModel("x"))
    result = run.train(exact, [(0, 9), (1, 9)], batch_size=2, min_score=-1.0)
    assert result.train_scores == [-0.5]
    feedback = [section(messages, "Feedback") for messages in optimizer.asked]
    assert sum("ZeroDivisionError: " in text for text in feedback) == 1
    assert [(record.stage, record.infrastructure) for record in result.failures] == [("agent", False)]


def test_a_failure_is_counted_once() -> None:
    """The failing instance's proposal is applied alone, and its failure is counted once."""

    class Broken(Adder):
        async def forward(self, x: int) -> int:
            return x // (x - 1)

    agent = Broken()
    result = trainer(agent, suggest(amount=5)).train(exact, [(0, 5), (1, 5)], batch_size=2)
    assert agent.amount.data == 5
    assert [(record.stage, record.sample_id) for record in result.failures] == [("agent", 1)]


@pytest.mark.requirement("Trace's defect 9: a lost call ended the run")
def test_a_lost_call_is_excluded_from_the_score(adder: Adder) -> None:
    """An infrastructure failure has no score; the others' proposals are kept and applied."""

    class Flaky(Adder):
        async def forward(self, x: int) -> int:
            if x == 0:
                raise RateLimitError("slow down", status=429)
            return await super().forward(x)

    agent = Flaky()
    result = trainer(agent).train(exact, additions(5), batch_size=4)
    assert sorted(result.history[0].scores, key=str) == [0.0, 0.0, 0.0, None]
    assert result.history[0].score == 0.0
    assert agent.amount.data == 5
    assert [record.infrastructure for record in result.failures] == [True]


def test_too_many_lost_instances_stop_the_run(adder: Adder) -> None:
    """Above max_failure_ratio of a batch the run stops with TrainingError and keeps its result."""
    optimizer = ScriptedModel(APIConnectionError("connection reset"))
    run = AggregatedUpdate(adder, LLMOptimizer(llm=optimizer), llm=ScriptedModel("x"))
    with pytest.raises(TrainingError, match="got 4 of 4 lost up to step 0.*connection reset") as caught:
        run.train(exact, additions(5), batch_size=4)
    assert caught.value.result is not None
    assert caught.value.result.parameters == {"amount": 1, "label": "sum"}


@pytest.mark.parametrize(("lost", "ends"), [({1}, False), ({1, 2}, False), ({0, 1, 2}, True)])
def test_batches_of_one_are_judged_together(lost: set[int], ends: bool) -> None:
    """One lost call does not end a run of batches of 1; three of the latest four instances do."""

    class Flaky(Adder):
        async def forward(self, x: int) -> int:
            if x in lost:
                raise RateLimitError("slow down", status=429)
            return await super().forward(x)

    run = trainer(Flaky())
    if ends:
        with pytest.raises(TrainingError, match="got 3 of .* lost up to step"):
            run.train(exact, additions(5, 4), num_epochs=2)
    else:
        assert len(run.train(exact, additions(5, 4)).history) == 4


@pytest.mark.requirement("Trace's defect 10: the aggregator's call had no retry and no fallback")
def test_a_failed_aggregation_applies_nothing_and_is_counted(adder: Adder) -> None:
    """The step is in the history as refused, the failure in the result, and the next step runs."""
    aggregate = ScriptedModel(APIConnectionError("reset"), suggest(amount=7))
    optimizer = LLMOptimizer(llm=ScriptedModel(from_feedback))
    data = [(0, 5), (1, 9), (2, 5), (3, 9)]
    result = AggregatedUpdate(adder, optimizer, llm=aggregate).train(exact, data, num_epochs=2, batch_size=4)
    assert result.history[0].update == {}
    assert [(record.stage, record.step) for record in result.failures] == [("aggregation", 0)]
    assert result.parameters["amount"] == 7


@pytest.mark.parametrize("error", [AuthenticationError("no such key", status=401), BudgetExceededError("spent")])
def test_an_error_of_every_call_stops_the_run_with_the_partial_result(adder: Adder, error: Exception) -> None:
    """Authentication and budget errors end the run at once; the partial result is on the error."""
    replies = [from_feedback] * 4 + [error]
    with pytest.raises((TrainingError, BudgetExceededError)) as caught:
        trainer(adder, *replies).train(exact, [*additions(5), (9, 0)], num_epochs=3)
    assert caught.value.result is not None
    assert 0 < len(caught.value.result.history) < 15


@pytest.mark.requirement("Trace: train(ensure_improvement)")
def test_refused_updates_leave_the_agent_unchanged(adder: Adder) -> None:
    """ensure_improvement refuses updates without a gain; the optimizer sees that."""
    optimizer = ScriptedModel(suggest(amount=77), "TERMINATE")
    run = AggregatedUpdate(adder, LLMOptimizer(llm=optimizer), llm=ScriptedModel("x"))
    result = run.train(exact, [(0, 5), (1, 6)], ensure_improvement=True)
    assert adder.amount.data == 1
    assert [report.decision.accepted for report in result.history] == [False, False]
    assert "step 0, refused (mean score 0 -> 0 on 1 instances)" in section(optimizer.asked[1], "History")


@pytest.mark.parametrize("use_asyncio", [True, False])
@pytest.mark.parametrize("concurrency", [1, 8, 64])
def test_results_are_the_same_bytes_at_any_concurrency(tmp_path: Path, concurrency: int, use_asyncio: bool) -> None:
    """With shuffled latencies at any concurrency the prompts and result.json are the same."""

    def one(name: str, concurrency: int, seed: int) -> tuple[bytes, list[Any], list[Any]]:
        jitter = random.Random(seed)
        optimizer = ScriptedModel(from_feedback, jitter=lambda: jitter.randrange(20))
        aggregator = ScriptedModel(first_suggestion)
        agent = Adder()
        run = AggregatedUpdate(agent, LLMOptimizer(llm=optimizer), use_asyncio, llm=aggregator)
        data = [(i, i + 2 + i % 3) for i in range(24)]
        result = run.train(
            exact, data, batch_size=8, num_epochs=2, test_dataset=data, max_concurrency=concurrency, seed=7
        )
        save_result(result, tmp_path / name)
        return (tmp_path / name).read_bytes(), sorted(map(str, optimizer.asked)), aggregator.asked

    assert one("a.json", concurrency, seed=concurrency) == one("b.json", 5, seed=99)


def test_a_result_can_be_saved_and_loaded(adder: Adder, tmp_path: Path) -> None:
    """load_result returns what save_result wrote."""
    result = trainer(adder).train(exact, additions(5), test_dataset=additions(5), batch_size=2)
    save_result(result, tmp_path / "result.json")
    again = load_result(tmp_path / "result.json")
    save_result(again, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "result.json").read_bytes()
    assert again.test_scores == result.test_scores


def test_usage_is_counted_by_role(adder: Adder) -> None:
    """The result has calls, tokens and cost for each role."""
    data = [(0, 5), (1, 9)]
    result = trainer(adder).train(exact, data, batch_size=2)
    assert {role: usage.calls for role, usage in result.usage.items()} == {"optimizer": 2, "aggregator": 1}
    assert result.usage["optimizer"].cost == pytest.approx(0.2)


def test_sync_agents_run_concurrently_in_threads() -> None:
    """A synchronous forward runs in the executor's threads, and reads its own candidate's values."""

    class SyncAdder(Module):
        def __init__(self) -> None:
            self.amount = ParameterNode(1)

        def forward(self, x: int) -> int:
            return int(x + self.amount.data)

    agent = SyncAdder()
    trainer(agent).train(exact, additions(5), batch_size=4)
    assert agent.amount.data == 5


@pytest.mark.requirement("Trace: hook forward")
def test_an_overridden_forward_is_used(adder: Adder) -> None:
    """A subclass's synchronous forward decides what an instance proposes."""

    class Always(AggregatedUpdate):
        def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
            return {agent.amount: 5}, 0.5

    result = Always(adder, LLMOptimizer(llm=ScriptedModel("x")), llm=ScriptedModel("x")).train(exact, [(0, 1)])
    assert adder.amount.data == 5
    assert result.train_scores == [0.5]


@pytest.mark.requirement("Trace: hook forward")
def test_an_overridden_forward_may_call_super(adder: Adder) -> None:
    """`super().forward(...)` inside a synchronous override returns the proposal."""
    seen: list[Proposal] = []

    class Watching(AggregatedUpdate):
        def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
            seen.append(super().forward(agent, x, guide, info, verbose))
            return seen[-1]

    Watching(adder, LLMOptimizer(llm=ScriptedModel(from_feedback)), llm=ScriptedModel("x")).train(exact, additions(5))
    assert [proposal.values for proposal in seen] == [{"amount": 5}, {}, {}, {}]
    assert sorted(proposal.sample_id or 0 for proposal in seen) == [0, 1, 2, 3]


@pytest.mark.requirement("Trace: hook update")
@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_overridden_update_is_used(adder: Adder, asynchronous: bool) -> None:
    """A subclass's update may apply anything; its return value is the step's score."""

    class Sync(AggregatedUpdate):
        def update(self, outputs: Any, verbose: bool | str = False) -> Any:
            self.agent.amount.data = max(proposal.values["amount"] for proposal in outputs)
            return 0.25

    class Async(AggregatedUpdate):
        async def update(self, outputs: Any, verbose: bool | str = False) -> Any:
            self.agent.amount.data = max(proposal.values["amount"] for proposal in outputs)
            return 0.25

    kind = Async if asynchronous else Sync
    run = kind(adder, LLMOptimizer(llm=ScriptedModel(from_feedback)), llm=ScriptedModel("x"))
    result = run.train(exact, [(0, 5), (1, 8)], batch_size=2)
    assert result.history[0].update == {"amount": 7}
    assert result.train_scores == [0.25]


def test_forward_and_update_work_alone(adder: Adder) -> None:
    """The seed's hooks can be called outside a run: one proposal, then the update."""
    run = trainer(adder)
    output = run.forward(adder, 0, exact, 5)
    assert output.values == {"amount": 5}
    run.update([output])
    assert adder.amount.data == 5


@pytest.mark.requirement("Trace's defect 5: asyncio.run failed under a running loop")
async def test_train_works_under_a_running_loop(adder: Adder) -> None:
    """In a notebook or server `train` blocks its caller; asyncio.run would raise."""
    await asyncio.sleep(0)
    assert trainer(adder).train(exact, additions(5)).train_scores[-1] == 1.0


@pytest.mark.requirement("Trace: asynchronous trainer")
async def test_atrain_runs_on_the_callers_loop(adder: Adder) -> None:
    """`await trainer.atrain(...)` is the same run."""
    result = await trainer(adder).atrain(exact, additions(5))
    assert result.train_scores == [0.0, 1.0, 1.0, 1.0]


def test_seed_api_helpers(adder: Adder) -> None:
    """to_param_dict, construct_update_dict and extract_llm_suggestion work from the trainer."""
    run = trainer(adder)
    update = run.construct_update_dict(adder.parameters(), run.extract_llm_suggestion(suggest(amount="7")))
    assert run.to_param_dict(update) == {"amount": 7}


@pytest.mark.requirement("Trace: AggregatedUpdate.aggregator_system_prompt")
def test_aggregator_system_prompt_can_be_set_on_a_subclass(adder: Adder) -> None:
    """The class attribute is the aggregator's system prompt."""
    aggregator = ScriptedModel(first_suggestion)

    class Own(AggregatedUpdate):
        aggregator_system_prompt = "Take the first."

    optimizer = LLMOptimizer(llm=ScriptedModel(from_feedback))
    Own(adder, optimizer, llm=aggregator).train(exact, [(0, 5), (1, 9)], batch_size=2)
    assert aggregator.asked[0][0] == {"role": "system", "content": "Take the first."}


class Nothing(Module):
    """An agent without parameters."""

    def forward(self, x: int) -> int:
        return x


@pytest.mark.requirement("Trace's defect 30: eval_frequency=0 divided by zero")
@pytest.mark.parametrize(
    ("agent", "arguments", "message"),
    [
        (Adder(), {"train_dataset": []}, "in train_dataset, got none"),
        (Adder(), {"test_dataset": []}, "in test_dataset, got none"),
        (Adder(), {"batch_size": 0}, "Expected batch_size to be an int of at least 1, got 0"),
        (Adder(), {"stepsize": 1.5}, "stepsize.*1.5"),
        (Adder(), {"stepsize": -0.1}, "stepsize.*-0.1"),
        (Adder(), {"num_epochs": -1}, "Expected num_epochs to be an int of at least 0"),
        (Adder(), {"eval_frequency": -1}, "Expected eval_frequency"),
        (Adder(), {"max_failure_ratio": 2}, "Expected max_failure_ratio in"),
        (Adder(), {"guide": 7}, "Expected a guide"),
        (Adder(), {"resume": True}, "Expected run_dir with resume=True"),
        (Nothing(), {}, "Expected an agent with a trainable parameter"),
    ],
)
def test_invalid_arguments_are_config_errors(agent: Module, arguments: dict[str, Any], message: str) -> None:
    """Each one is raised before the first call."""
    given = {"guide": exact, "train_dataset": additions(1), **arguments}
    with pytest.raises(ConfigError, match=message):
        trainer(agent, "never asked").train(**given)


def test_two_parameters_of_one_name_are_refused() -> None:
    """Trace let one value overwrite the other."""

    class Twins(Adder):
        def __init__(self) -> None:
            super().__init__()
            self.other = ParameterNode(2, name="amount")

    with pytest.raises(ConfigError, match="amount"):
        trainer(Twins()).train(exact, additions(1))


def test_minibatch_alone_needs_no_model(adder: Adder) -> None:
    """The base class has the neutral rule: one instance's proposal is the update."""
    result = Minibatch(adder, LLMOptimizer(llm=ScriptedModel(from_feedback))).train(exact, additions(5))
    assert result.parameters["amount"] == 5


def test_parameters_have_their_provenance(adder: Adder, tmp_path: Path) -> None:
    """Result and artefact name the samples whose proposals were used; the artefact loads without the trainer."""
    data = [(0, 1), (1, 6), (2, 7)]
    result = trainer(adder).train(exact, data, batch_size=3, run_dir=tmp_path / "run")
    assert result.provenance == {"amount": [{"step": 0, "samples": [1, 2]}], "label": []}
    production = Adder()
    assert production.load(tmp_path / "run" / "parameters.json") == result.provenance
    assert production.amount.data == 5


def test_provenance_named_a_sample_for_a_parameter_that_it_never_proposed() -> None:
    """Of two samples that change one parameter each, each is named for its own only; `contributors` has both."""
    agent = Adder()
    optimizer = ScriptedModel(suggest(amount=3), suggest(label="total"))
    trainer = AggregatedUpdate(agent, LLMOptimizer(llm=optimizer), llm=ScriptedModel("TERMINATE"))
    result = trainer.train(exact, additions(3, 2), batch_size=2, max_concurrency=1)
    (report,) = result.history
    first, second = report.sample_ids
    assert set(report.contributors) == {first, second}
    assert result.provenance == {
        "amount": [{"step": 0, "samples": [first]}],
        "label": [{"step": 0, "samples": [second]}],
    }


def test_provenance_named_a_sample_that_repeated_the_current_value() -> None:
    """It proposed another parameter, and repeated this one as it was."""
    agent = Adder()
    optimizer = ScriptedModel(suggest(amount=3, label="sum"), suggest(amount=1, label="total"))
    trainer = AggregatedUpdate(agent, LLMOptimizer(llm=optimizer), rule=majority)
    result = trainer.train(exact, additions(3, 2), batch_size=2, max_concurrency=1, stepsize=1.0)
    (report,) = result.history
    assert result.provenance == {"amount": [{"step": 0, "samples": [report.sample_ids[0]]}], "label": []}


async def test_two_runs_at_once_changed_the_values_of_each_other() -> None:
    """A second run on the same agent is refused; copies, and the agent after the run, can be trained."""
    agent, model = Adder(), ScriptedModel(lambda _messages: suggest(amount=3))
    started, go_on = asyncio.Event(), asyncio.Event()

    async def wait(x: int, output: int, info: int) -> float:
        started.set()
        await go_on.wait()
        return 0.0

    def run(on: Adder, guide: Any = exact) -> Any:
        return AggregatedUpdate(on, LLMOptimizer(llm=model), llm=model).atrain(guide, additions(3))

    async with asyncio.TaskGroup() as group:
        first = group.create_task(run(agent, wait))
        await started.wait()
        with pytest.raises(ConfigError, match=r"no other run is training, .* 'amount' is in a run"):
            await run(agent)
        assert (await run(copy.deepcopy(agent))).parameters["amount"] == 3
        go_on.set()
    assert first.result().parameters["amount"] == 3
    assert (await run(agent)).parameters["amount"] == 3
