"""Features of Trace's library that no other test file covers; `tests/test_requirements.py` lists all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, exact, from_feedback, section, suggest

from aggregator import (
    AggregatedUpdate,
    LLMJudge,
    LLMOptimizer,
    MinibatchAlgorithm,
    Module,
    ParameterNode,
    Step,
    Trainer,
    bundle,
    node,
    transcript,
)
from aggregator.records import Candidate, Decision, Proposal, Rollout, Values
from aggregator.training.searches import Priority


class Logger:
    """Trace's logger, with a record of its calls."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, Any, int]] = []

    def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
        self.logged.append((name, data, step))


def scripted(agent: Any, *replies: Any, **options: Any) -> AggregatedUpdate:
    optimizer = LLMOptimizer(llm=ScriptedModel(*(replies or [from_feedback])))
    return AggregatedUpdate(agent, optimizer, llm=ScriptedModel("never asked"), **options)


@pytest.mark.requirement("Trace: trace.node(data, name, trainable, description, constraint)")
def test_node_accepts_traces_arguments() -> None:
    """Their order and defaults are Trace's; the description is in the prompt."""
    greeting = node("Hello", "greeting", True, "said first", "polite")  # noqa: FBT003 - Trace's order
    assert (greeting.data, greeting.name, greeting.trainable) == ("Hello", "greeting", True)
    assert greeting.describe() == {
        "value": "Hello",
        "type": "str",
        "description": "said first",
        "constraint": "polite",
    }


@bundle()
def scaled(x: int) -> int:
    return 3 * x


@bundle()
def summed(x: int) -> int:
    return scaled(x) + scaled(1)


@pytest.mark.requirement("Trace: bundle(traceable_code): what an operation does inside is traced")
def test_operations_inside_operations_are_traced() -> None:
    """They are always traced, not only with traceable_code."""
    with transcript() as seen:
        summed(2)
    assert seen.render() == (
        "summed\n  x: 2\n  scaled\n    x: 2\n    returned: 6\n  scaled\n    x: 1\n    returned: 3\n  returned: 9"
    )


@pytest.mark.requirement("Trace: bundle(allow_external_dependencies)")
def test_an_operation_may_read_parameters_that_are_not_inputs() -> None:
    """Trace raises if an operation reads a node that was not passed in; here the node is allowed, and trained."""
    outside = ParameterNode(3)

    @bundle()
    def scale(x: int) -> int:
        return x * outside.data

    class Scaler(Module):
        factor = outside

        def forward(self, x: int) -> int:
            return scale(x)

    agent = Scaler()
    assert scripted(agent, suggest(factor=7)).train(exact, [(1, 7)]).parameters == {"factor": 7}
    assert agent(2) == 14


class Weights(Module):
    def __init__(self) -> None:
        self.weights = ParameterNode([1, 1])
        self.names = ParameterNode({"bias": 0})

    @bundle()
    def score(self, xs: list[int]) -> int:
        return sum(w * x for w, x in zip(self.weights.data, xs, strict=True)) + self.names.data["bias"]

    def forward(self, xs: list[int]) -> int:
        return self.score(xs)


@pytest.mark.requirement("Trace: operators, iterators and broadcasting on nodes")
def test_all_of_python_works_on_values() -> None:
    """Operators, iteration, keys and other functions work on a parameter's value, and training changes it."""
    agent = Weights()
    scripted(agent, suggest(weights=[2, 3], names={"bias": 1})).train(exact, [([1, 1], 6)])
    assert agent([1, 1]) == 6
    assert [weight + 1 for weight in agent.weights.data] == [3, 4]


@pytest.mark.requirement("Trace: train(improvement_threshold)")
@pytest.mark.parametrize(("threshold", "accepted"), [(0.2, True), (0.9, False)])
def test_improvement_threshold_reaches_the_gate(threshold: float, accepted: bool) -> None:
    """An update from 0.25 to 1 passes a threshold of 0.2, and not one of 0.9."""
    agent = Adder()
    data = [(0, 1), *additions(5, 4)[1:]]

    def guide(x: int, output: int, info: int) -> tuple[float, str]:
        return (1.0, "right") if output >= info else (0.0, f"expected {info}, got {output}")

    result = scripted(agent, suggest(amount=5)).train(
        guide, data, batch_size=4, ensure_improvement=True, improvement_threshold=threshold
    )
    assert result.train_scores == [0.25]
    assert result.history[0].decision.accepted is accepted
    assert agent.amount.data == (5 if accepted else 1)


@pytest.mark.requirement("Trace: train(num_epochs, batch_size)")
def test_epochs_and_batches_make_the_steps() -> None:
    """Each epoch visits every instance once, `batch_size` of them per step; the last batch has the remainder."""
    result = scripted(Adder(), "TERMINATE").train(exact, additions(5, 5), batch_size=2, num_epochs=3)
    assert [len(report.sample_ids) for report in result.history] == [2, 2, 1] * 3
    assert [report.epoch for report in result.history] == [0] * 3 + [1] * 3 + [2] * 3
    for epoch in range(3):
        ids = [i for report in result.history[3 * epoch : 3 * epoch + 3] for i in report.sample_ids]
        assert sorted(ids) == list(range(5))


@pytest.mark.requirement("Trace: train(log_frequency)")
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"log_frequency": 2}, [1, 3]),
        ({"log_frequency": 1, "eval_frequency": 0}, [0, 1, 2, 3]),
        ({"log_frequency": 0}, []),
        ({"eval_frequency": 4}, [3]),
    ],
)
def test_log_frequency_counts_steps(options: dict[str, int], steps: list[int]) -> None:
    """The train score is logged every so many steps, never for 0, by default whenever the test set is evaluated."""
    logger = Logger()
    scripted(Adder(), "TERMINATE", logger=logger).train(exact, additions(5), **options)  # type: ignore[arg-type]
    assert [step for name, _, step in logger.logged if name == "Average train score"] == steps


class Saved(Adder):
    """Records where it was saved."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[str] = []

    def save(self, path: Any, **options: Any) -> None:
        self.saved.append(str(path))


@pytest.mark.requirement("Trace: train(save_frequency, save_path)")
def test_save_frequency_counts_steps() -> None:
    """None or 0 saves nothing; 2 saves after every second step."""
    for frequency, saves in ((None, 0), (0, 0), (1, 4), (2, 2), (3, 1)):
        agent = Saved()
        scripted(agent, "TERMINATE").train(exact, additions(5), save_frequency=frequency, save_path="here.json")
        assert agent.saved == ["here.json"] * saves


@pytest.mark.requirement("Trace: hook save_agent")
def test_an_overridden_save_is_used() -> None:
    """Like Trace's save_agent: an agent may define how it is saved."""
    agent = Saved()
    scripted(agent).train(exact, additions(5), save_frequency=4)
    assert agent.saved == ["checkpoints/agent.json"]


@pytest.mark.requirement("Trace: train(verbose=True)")
def test_verbose_prints_scores_and_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    """They go to standard output if there is no logger; by default nothing is printed."""
    scripted(Adder()).train(exact, additions(5), batch_size=4, test_dataset=additions(5))
    assert capsys.readouterr().out == ""
    scripted(Adder()).train(exact, additions(5), batch_size=4, test_dataset=additions(5), verbose=True)
    assert capsys.readouterr().out.splitlines() == [
        "[step 0] Average test score before training: 0",
        "[step 0] Average train score: 0",
        "[step 0] Average test score: 1",
        "[step 0] Parameter: amount: 5",
        "[step 0] Calls so far: 4",
        "[step 0] Tokens so far: 60",
        "[step 0] USD so far: 0.4",
    ]


@pytest.mark.requirement("Trace: train(num_threads)")
@pytest.mark.parametrize("num_threads", [1, 3])
def test_num_threads_bounds_concurrency(num_threads: int) -> None:
    """It is Trace's name for max_concurrency."""
    running, most = 0, 0

    def turns() -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        return 5

    def reply(_: Any) -> str:
        nonlocal running
        running -= 1
        return "TERMINATE"

    async def guide(x: int, output: int, info: int) -> tuple[float, str]:  # not in a thread
        return exact(x, output, info)

    optimizer = LLMOptimizer(llm=ScriptedModel(reply, jitter=turns))
    trainer = AggregatedUpdate(Adder(), optimizer, llm=ScriptedModel("never asked"))
    trainer.train(guide, additions(5, 8), batch_size=8, num_threads=num_threads)
    assert most == num_threads


@pytest.mark.requirement("Trace: AggregatedUpdate(llm, max_tokens)")
def test_the_aggregator_has_its_own_model_and_limit() -> None:
    """The trainer's `llm` and `max_tokens` are the aggregator's, not the optimizer's."""
    optimizer, aggregator = ScriptedModel(from_feedback), ScriptedModel(suggest(amount=5))
    trainer = AggregatedUpdate(Adder(), LLMOptimizer(llm=optimizer), llm=aggregator, max_tokens=77)
    trainer.train(exact, [(0, 5), (1, 9)], batch_size=2)
    assert [options["max_tokens"] for options in aggregator.options] == [77]
    assert {options["max_tokens"] for options in optimizer.options} == {4096}


@pytest.mark.requirement("Trace: OptoPrime(max_tokens)")
def test_max_tokens_reaches_the_optimizers_model() -> None:
    """Each of its calls has the limit."""
    model = ScriptedModel("TERMINATE")
    trainer = AggregatedUpdate(Adder(), LLMOptimizer(llm=model, max_tokens=55), llm=ScriptedModel("never asked"))
    trainer.train(exact, additions(5, 2), batch_size=2)
    assert [options["max_tokens"] for options in model.options] == [55, 55]


@pytest.mark.requirement("Trace: hook has_improvement")
def test_a_custom_gate_defines_an_improvement() -> None:
    """Like Trace's has_improvement: it gets the values before and after, and the minibatch."""
    seen: list[tuple[Values, Values, int]] = []

    async def only_small(before: Values, after: Values, step: Step) -> Decision:
        seen.append((before, after, len(step.samples)))
        return Decision(accepted=after["amount"] < 5, reason="small enough")

    agent = Adder()
    scripted(agent, suggest(amount=9), gate=only_small).train(exact, additions(5), batch_size=4)
    assert seen == [({"amount": 1, "label": "sum"}, {"amount": 9, "label": "sum"}, 4)]
    assert agent.amount.data == 1


class Doubting(AggregatedUpdate):
    """Keeps half of its optimizer's proposals."""

    async def propose(self, rollouts: Sequence[Rollout], step: Step) -> Proposal:
        proposal = await super().propose(rollouts, step)
        return Proposal(values={"amount": proposal.values["amount"] // 2}, sample_ids=proposal.sample_ids)


@pytest.mark.requirement("Trace: hook optimizer_step")
def test_an_overridden_propose_is_used() -> None:
    """Like Trace's optimizer_step, for one instance; in MinibatchAlgorithm for a whole minibatch."""
    agent = Adder()
    Doubting(agent, LLMOptimizer(llm=ScriptedModel(suggest(amount=8))), llm=ScriptedModel("never asked")).train(
        exact, additions(5, 1)
    )
    assert agent.amount.data == 4

    class Fixed(MinibatchAlgorithm):
        async def propose(self, rollouts: Sequence[Rollout], step: Step) -> Proposal:
            return Proposal(values={"amount": len([rollout.feedback for rollout in rollouts])})

    Fixed(other := Adder(), None).train(exact, additions(5, 3), batch_size=3)
    assert other.amount.data == 3


@pytest.mark.requirement("Trace: VerbalJudgeGuide(model, prompt_template, system_prompt)")
async def test_a_judge_has_its_own_system_prompt() -> None:
    """Its criteria are in the rest of the prompt."""
    model = ScriptedModel('{"score": 1.0, "feedback": "good"}')
    await LLMJudge(model, system_prompt="You are strict.", criteria="Be brief.")("2 + 2?", "4", 4)
    (messages,) = model.asked
    assert messages[0]["content"] == "You are strict."
    assert section(messages, "Criteria") == "Be brief."


class Apart(Priority):
    """Remembers no two candidates within 3 of each other: POLCA's net, with a custom distance."""

    def keep(self, pool: Sequence[Candidate], step: Step) -> list[Candidate]:
        current, *others = pool
        kept = [current]
        for other in self.rank(others):
            if all(abs(other.values["amount"] - near.values["amount"]) >= 3 for near in kept):
                kept.append(other)
        return kept[: self.memory_size]


@pytest.mark.requirement("Trace: POLCA: an epsilon-net over embeddings, a summarizer")
def test_a_custom_search_keeps_candidates_apart() -> None:
    """One function decides which candidates are too similar, with an embedding model or without."""
    replies = iter(range(2, 99))
    model = ScriptedModel(lambda _: suggest(amount=next(replies)))
    apart = Apart(8, num_candidates=2, num_proposals=3)
    search = Trainer(Adder(), LLMOptimizer(llm=model), propose_per="batch", search=apart)
    result = search.train(lambda x, output, info: output / 100, [(0, 0)], num_epochs=4)
    amounts = sorted(candidate.values["amount"] for candidate in result.candidates)
    assert len(amounts) > 2
    assert min(b - a for a, b in pairwise(amounts)) >= 3
