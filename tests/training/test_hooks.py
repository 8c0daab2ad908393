"""Methods overridden by a subclass or an instance are used, and looked up when a step needs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from training_fakes import Adder, ScriptedModel, additions, exact, first_suggestion, from_feedback, section, suggest

from aggregator import AggregatedUpdate, ConfigError, LLMOptimizer, Proposal, Rollout
from aggregator.errors import SuggestionError
from aggregator.rules import majority

TWO = [(0, 5), (1, 9)]
"""Two instances that ask for different amounts: 5 and 8."""


def make(
    kind: type[AggregatedUpdate] = AggregatedUpdate, *replies: Any, **options: Any
) -> tuple[AggregatedUpdate, ScriptedModel]:
    model = ScriptedModel(*(replies or (first_suggestion,)))
    return kind(Adder(), LLMOptimizer(llm=ScriptedModel(from_feedback)), llm=model, **options), model


def train(trainer: AggregatedUpdate) -> Any:
    return trainer.train(exact, TWO, batch_size=2, num_epochs=1)


def test_extract_llm_suggestion_was_never_called() -> None:
    """For a user's own reply format no schema is sent, and there is no repair call."""

    class Own(AggregatedUpdate):
        def extract_llm_suggestion(self, response: str, ignore_extraction_error: bool = True) -> dict[str, Any]:
            name, _, value = response.partition(" := ")
            return {name: value}

    trainer, model = make(Own, "amount := 6")
    assert train(trainer).parameters["amount"] == 6
    assert [sorted(options) for options in model.options] == [["max_tokens"]]


def test_a_custom_extraction_has_no_repair_call() -> None:
    """The repair prompt describes our format only: the failure is recorded, and nothing is applied."""

    class Own(AggregatedUpdate):
        def extract_llm_suggestion(self, response: str, ignore_extraction_error: bool = True) -> dict[str, Any]:
            raise SuggestionError("no := in it")

    trainer, model = make(Own)
    result = train(trainer)
    assert (result.parameters["amount"], len(model.asked)) == (1, 1)
    assert [(record.stage, record.message) for record in result.failures] == [("aggregation", "no := in it")]


def test_construct_update_dict_was_never_called() -> None:
    """It builds the update from the suggestion; it may leave values out, and its result is checked."""
    seen: list[Any] = []

    class Own(AggregatedUpdate):
        def construct_update_dict(
            self, parameters: list[Any], suggestion: dict[str, Any], ignore_extraction_error: bool = True
        ) -> dict[Any, Any]:
            seen.append((sorted(parameter.name for parameter in parameters), suggestion))
            return {parameter: 2 * suggestion["amount"] for parameter in parameters if parameter.name == "amount"}

    trainer, model = make(Own, suggest(amount=7))
    assert train(trainer).parameters["amount"] == 14
    assert seen == [(["amount", "label"], {"amount": 7})]
    assert "response_format" in model.options[0]


def test_to_param_dict_was_never_called() -> None:
    """The prompt shows the current and the suggested values as it returns them."""

    class Own(AggregatedUpdate):
        def to_param_dict(self, update_dict: Any) -> dict[str, Any]:
            return {parameter.name.upper(): value for parameter, value in update_dict.items()}

        def extract_llm_suggestion(self, response: str, ignore_extraction_error: bool = True) -> dict[str, Any]:
            return {name.lower(): value for name, value in json.loads(response).items()}

    trainer, model = make(Own, '{"AMOUNT": 6}')
    assert train(trainer).parameters["amount"] == 6
    assert '"AMOUNT": 1' in section(model.asked[0], "CurrentValue")
    assert '"AMOUNT": 5' in section(model.asked[0], "SuggestedValue_1")


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("to_param_dict", lambda update: None),
        ("extract_llm_suggestion", lambda response: "text"),
        ("construct_update_dict", lambda parameters, suggestion: 3),
    ],
)
def test_a_hook_with_an_invalid_result(name: str, hook: Any) -> None:
    """The ConfigError names the hook, which may be set on an instance too."""
    trainer, _ = make()
    setattr(trainer, name, hook)
    with pytest.raises(ConfigError, match=f"Expected a dict.* from {name}, got"):
        train(trainer)


def test_a_prompt_set_on_an_instance_never_reached_the_model() -> None:
    """The prompt, the model and the limit are read at each step."""
    trainer, first = make()
    trainer.aggregator_system_prompt = "Take the first."
    trainer.max_tokens = 77
    other = ScriptedModel(first_suggestion)

    def switch(report: Any) -> None:
        trainer.llm = other

    trainer.observers = [switch]
    trainer.train(exact, [*TWO, *TWO], batch_size=2)
    assert first.asked[0][0]["content"] == "Take the first."
    assert first.options[0]["max_tokens"] == 77
    assert len(first.asked) == 1


class Prompted(AggregatedUpdate):
    aggregator_system_prompt = "Mine."


class Extracting(AggregatedUpdate):
    def extract_llm_suggestion(self, response: str, ignore_extraction_error: bool = True) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("kind", "name"), [(Prompted, "aggregator_system_prompt"), (Extracting, "extract_llm_suggestion")]
)
def test_a_hook_of_the_default_merge_had_no_effect_with_a_rule(kind: Any, name: str) -> None:
    """A rule does not use it, so the combination is refused, at construction or when a run begins."""
    optimizer = LLMOptimizer(llm=ScriptedModel(from_feedback))
    with pytest.raises(ConfigError, match=f"Expected no {name} with rule="):
        kind(Adder(), optimizer, rule=majority)


def test_a_hook_set_later_is_refused_with_a_rule_too() -> None:
    """The error is raised before the first call is paid for."""
    model = ScriptedModel(from_feedback)
    trainer = AggregatedUpdate(Adder(), LLMOptimizer(llm=model), rule=majority)
    trainer.aggregator_system_prompt = "Mine."
    with pytest.raises(ConfigError, match="Expected no aggregator_system_prompt with rule="):
        train(trainer)
    assert model.asked == []


async def own_forward(agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
    return {"amount": 40 + x}, 0.25


def sync_forward(agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
    return Proposal(values={"amount": 40 + x}, score=0.25)


@pytest.mark.parametrize("name", ["forward", "aforward"])
@pytest.mark.parametrize("hook", [own_forward, sync_forward])
def test_forward_may_be_set_on_an_instance_or_its_async_form_overridden(name: str, hook: Callable[..., Any]) -> None:
    """Every way of overriding is found: either name, sync or async, on a class or an instance."""
    trainer, _ = make()
    setattr(trainer, name, hook)
    result = train(trainer)
    assert result.train_scores == [0.25]
    assert result.parameters["amount"] in {40, 41}

    class Own(AggregatedUpdate):
        pass

    setattr(Own, name, staticmethod(hook))
    trainer, _ = make(Own)
    assert train(trainer).train_scores == [0.25]


def test_train_calls_an_overridden_atrain() -> None:
    """The synchronous method looks up the async one by name when it is called."""

    class Own(AggregatedUpdate):
        async def atrain(self, *args: Any, **kwargs: Any) -> Any:
            return "mine"

    trainer, _ = make(Own)
    assert trainer.train(exact, TWO) == "mine"  # type: ignore[comparison-overlap]


def test_an_update_that_drops_outputs() -> None:
    """`super().update` accepts fewer outputs than the step had, or other ones."""

    class First(AggregatedUpdate):
        def update(self, outputs: Any, verbose: bool | str = False) -> Any:
            return super().update(outputs[:1], verbose)

    class Other(AggregatedUpdate):
        def update(self, outputs: Any, verbose: bool | str = False) -> Any:
            return super().update([Proposal(values={"amount": 33})], verbose)

    for kind, amounts in ((First, {5, 9 - 1}), (Other, {33})):
        trainer, model = make(kind)
        assert train(trainer).parameters["amount"] in amounts
        assert model.asked == []


def test_a_custom_update_gets_what_its_forward_returned() -> None:
    """Outputs of any type are passed on unchanged; only `super().update` must understand them."""

    class Own(AggregatedUpdate):
        def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
            return ["anything", x], 0.5

        def update(self, outputs: Any, verbose: bool | str = False) -> Any:
            self.agent.amount.data = sum(x for (_, x), _ in outputs)
            return None

    trainer, _ = make(Own)
    result = train(trainer)
    assert (result.parameters["amount"], result.train_scores) == (1, [0.5])
    with pytest.raises(ConfigError, match="Expected forward to return a Proposal"):
        make(type("Without", (Own,), {"update": AggregatedUpdate.update}))[0].train(exact, TWO)


def test_a_forward_that_changes_a_copy_of_the_agent() -> None:
    """`super().forward(copy, ...)` runs the copy with its own values, and proposes for these."""
    outputs: list[int] = []

    class Own(AggregatedUpdate):
        def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
            copy = Adder(amount=100)
            proposal = super().forward(copy, x, guide, info, verbose)
            outputs.append(proposal.values["amount"])
            return proposal

    trainer, _ = make(Own)
    train(trainer)
    assert sorted(outputs) == [5, 8]


def test_rollouts_of_super_forward_reach_the_step() -> None:
    """Gate and observers see the rollout of `super().forward`, with the returned score."""
    seen: list[Any] = []

    class Own(AggregatedUpdate):
        def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
            return super().forward(agent, x, guide, info, verbose).values, 0.75

    trainer, _ = make(Own)
    trainer.observers = [seen.append]
    train(trainer)
    assert sorted((run.output, run.score) for run in seen[0].rollouts) == [(1, 0.75), (2, 0.75)]


def test_overriding_propose_needs_no_optimizer() -> None:
    """This holds for single instances and for a whole minibatch."""

    class Own(AggregatedUpdate):
        async def propose(self, rollouts: Any, step: Any) -> Proposal:
            assert all(isinstance(rollout, Rollout) for rollout in rollouts)
            return Proposal(values={"amount": 5})

    assert Own(Adder(), None, llm=ScriptedModel("x")).train(exact, additions(5), batch_size=4).parameters["amount"] == 5
