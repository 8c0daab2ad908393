"""Gates accept or refuse an update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from aggregator.agents.parameters import ParameterNode
from aggregator.errors import ConfigError
from aggregator.records import Failure, Rollout, RolloutTask, Sample
from aggregator.training.evaluation import Evaluations
from aggregator.training.gates import always, compare, improves_on_batch, improves_on_validation, sign_test
from aggregator.training.step import Step

BATCH = [Sample(i, i) for i in range(4)]


PARAMETERS = [ParameterNode(1, name="k")]


def scoring(scores: dict[Any, list[float | None]], calls: list[Any], **facts: Any) -> Step:
    """Return a step with given scores for each value of `k`; it lists its evaluations in `calls`."""

    async def run(tasks: Sequence[RolloutTask], guide: Any) -> list[Rollout]:
        calls.append(tasks[0].values["k"])
        lost = Failure(stage="agent", error="RateLimitError", message="429", infrastructure=True)
        found = [(task.sample.id, scores[task.values["k"]][task.sample.id]) for task in tasks]
        return [Rollout(sample_id=i, score=score, failure=lost if score is None else None) for i, score in found]

    evaluations = Evaluations(run, lambda x, output, info: 1.0, PARAMETERS)
    return Step(parameters=PARAMETERS, values={"k": 1}, samples=BATCH, evaluator=evaluations.at(0), **facts)


async def test_always_accepts() -> None:
    """The neutral gate accepts without evaluating."""
    assert (await always({}, {}, Step())).accepted


@pytest.mark.parametrize(
    ("after", "threshold", "accepted"),
    [
        ([1.0, 1.0, 0.0, 0.0], 0.0, True),
        ([0.0, 1.0, 0.0, 0.0], 0.0, False),
        ([1.0, 1.0, 0.0, 0.0], 0.3, False),
        ([1.0, 1.0, 1.0, 1.0], 0.3, True),
        ([None, 1.0, 1.0, None], 0.0, True),
        ([None, None, None, None], 0.0, False),
    ],
)
async def test_improves_on_batch(after: list[float | None], threshold: float, accepted: bool) -> None:
    """It accepts a gain of at least the threshold, and above 0, on the same instances."""
    calls: list[Any] = []
    seen = [Rollout(sample_id=i, score=score) for i, score in enumerate([0.0, 1.0, 0.0, 0.0])]
    decision = await improves_on_batch(threshold)({"k": 1}, {"k": 2}, scoring({2: after}, calls, rollouts=seen))
    assert decision.accepted is accepted
    assert decision.reason
    assert calls == ([2, 2] if None in after else [2])  # a lost call is made once more


async def test_the_batch_gate_alone_evaluates_the_current_values_too() -> None:
    """Outside a run there are no rollouts; zip() raised a ValueError."""
    calls: list[Any] = []
    step = scoring({1: [0.0, 0.0, 1.0, 1.0], 2: [1.0, 0.0, 1.0, 1.0]}, calls)
    decision = await improves_on_batch()({"k": 1}, {"k": 2}, step)
    assert (decision.before, decision.after, calls) == (0.5, 0.75, [1, 2])


@pytest.mark.requirement(
    "Trace: train(improvement_threshold)",
    "Trace's defect 22: the threshold of an improvement had the wrong sign",
)
def test_threshold_has_the_right_sign() -> None:
    """Trace accepted 0.45 over 0.50 with threshold 0.1: its threshold had the wrong sign."""
    assert not compare([0.5], [0.45], threshold=0.1).accepted
    assert not compare([0.5], [0.55], threshold=0.1).accepted
    assert compare([0.5], [0.65], threshold=0.1).accepted


@pytest.mark.requirement("Trace's defect 23: a failing instance spoilt the score of its batch")
def test_instances_without_both_scores_are_left_out() -> None:
    """An instance without a score on one side does not count on the other; no None reaches arithmetic."""
    decision = compare([None, 0.0, 0.5], [1.0, None, 1.0])
    assert (decision.before, decision.after) == (0.5, 1.0)
    assert "on 1 instances" in decision.reason


@pytest.mark.parametrize(("gains", "losses", "p"), [(5, 0, 1 / 32), (0, 0, 1.0), (3, 3, 42 / 64), (0, 4, 1.0)])
def test_sign_test_is_exact(gains: int, losses: int, p: float) -> None:
    """The tail of the binomial distribution is compared with values computed by hand."""
    assert sign_test(gains, losses) == pytest.approx(p)


async def test_validation_needs_significance_when_asked() -> None:
    """Four gains of four are not significant at 0.05, five are."""
    data = [(i, None) for i in range(5)]
    scores: dict[Any, list[float | None]] = {1: [0.0] * 5, 2: [1.0, 1.0, 1.0, 1.0, 0.0], 3: [1.0] * 5}
    calls: list[Any] = []
    step = scoring(scores, calls)
    gate = improves_on_validation(data, significance=0.05)
    assert not (await gate({"k": 1}, {"k": 2}, step)).accepted
    assert (await gate({"k": 1}, {"k": 3}, step)).accepted
    assert calls == [1, 2, 3]


async def test_current_values_are_not_evaluated_twice() -> None:
    """After an accepted update its scores are the next comparison's baseline."""
    scores: dict[Any, list[float | None]] = {1: [0.0], 2: [0.5], 3: [1.0]}
    calls: list[Any] = []
    step = scoring(scores, calls)
    gate = improves_on_validation([(0, None)])
    assert (await gate({"k": 1}, {"k": 2}, step)).accepted
    assert (await gate({"k": 2}, {"k": 3}, step)).accepted
    assert calls == [1, 2, 3]


@pytest.mark.parametrize("significance", [0.0, 1.0, 5.0])
def test_significance_is_a_probability(significance: float) -> None:
    """A percentage is refused, with the expected range."""
    with pytest.raises(ConfigError, match="Expected significance between 0 and 1"):
        improves_on_validation([(0, None)], significance=significance)
