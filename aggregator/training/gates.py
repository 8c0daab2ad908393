"""Accept or refuse an update. A refused update was never written: candidates are evaluated under an overlay."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

from aggregator.checks import is_finite
from aggregator.errors import ConfigError
from aggregator.protocols import Gate
from aggregator.records import Decision, Sample, Values
from aggregator.training.batches import Dataset, samples
from aggregator.training.checkpoints import digest
from aggregator.training.context import current_step
from aggregator.training.parts import decided


async def always(before: Values, after: Values, batch: Sequence[Sample]) -> Decision:
    """Accept every update: the neutral gate, and Trace's default."""
    return Decision(accepted=True, reason="always")


def both(first: Gate, second: Gate) -> Gate:
    """Accept what both accept; the second is asked only about what the first accepts, and has the last word."""

    async def gate(before: Values, after: Values, batch: Sequence[Sample]) -> Decision:
        decision = await decided(first, before, after, batch)
        return await decided(second, before, after, batch) if decision.accepted else decision

    return gate


def improves_on_batch(threshold: float = 0.0) -> Gate:
    """Accept what raises the mean score on the same minibatch by at least `threshold`, and by more than nothing.

    Costs one more run of the agent per instance. Compared per instance: one that has no score before or after counts
    on neither side.
    """
    check_threshold(threshold)

    async def gate(before: Values, after: Values, batch: Sequence[Sample]) -> Decision:
        step = current_step()
        scores = await step.evaluate(after, batch, "gate")
        return compare(step.scores, scores, threshold=threshold)

    return gate


class improves_on_validation:  # noqa: N801 - used like the gates beside it, which are functions
    """Accept what raises the mean score on a validation set, paired per instance.

    `threshold` is the least gain of the mean. With `significance` (say 0.05) the gain must also pass a one-sided exact
    sign test over the instances whose score changed: the chance of so many gains among them, were gains and losses
    equally likely, is at most this. Costs one run per instance for each new candidate; the values in force are not
    evaluated twice: their scores stand in the notes of the run, so a resumed one knows them too.
    """

    def __init__(self, dataset: Dataset, threshold: float = 0.0, significance: float | None = None) -> None:
        check_threshold(threshold)
        if significance is not None and not 0 < significance < 1:
            raise ConfigError(f"expected significance between 0 and 1, or None, got {significance!r}")
        self.samples = samples(dataset, name="validation dataset")
        self.threshold = threshold
        self.significance = significance
        self.name = f"validation/{digest(self.samples)}"

    async def __call__(self, before: Values, after: Values, batch: Sequence[Sample]) -> Decision:
        """Compare the scores of both values on the validation set."""
        step = current_step()
        known = step.notes.get(self.name, {})
        if known.get("values") != digest(before):
            known = {"values": digest(before), "scores": await step.evaluate(before, self.samples, "gate/before")}
        scores = await step.evaluate(after, self.samples, "gate")
        decision = compare(known["scores"], scores, threshold=self.threshold, significance=self.significance)
        step.notes[self.name] = {"values": digest(after), "scores": scores} if decision.accepted else known
        return decision


def check_threshold(threshold: Any) -> None:
    """Raise ConfigError for what no gain can be held against."""
    if not is_finite(threshold):
        raise ConfigError(f"expected threshold to be a finite number, the least gain of the mean, got {threshold!r}")


def compare(
    before: Sequence[float | None],
    after: Sequence[float | None],
    *,
    threshold: float = 0.0,
    significance: float | None = None,
) -> Decision:
    """Decide between two series of scores of the same instances.

    >>> compare([0.0, 1.0], [1.0, 1.0]).accepted
    True
    >>> compare([0.5], [0.45], threshold=0.1).accepted
    False
    """
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if old is not None and new is not None]
    if not pairs:
        return Decision(accepted=False, reason="no instance has a score both before and after")
    old = sum(pair[0] for pair in pairs) / len(pairs)
    new = sum(pair[1] for pair in pairs) / len(pairs)
    reason = f"mean score {old:.4g} -> {new:.4g} on {len(pairs)} instances"
    accepted = new > old and new - old >= threshold
    if not accepted and new > old:
        reason += f", less than the threshold {threshold:g}"
    if accepted and significance is not None:
        chance = sign_test(sum(b > a for a, b in pairs), sum(b < a for a, b in pairs))
        accepted = chance <= significance
        reason += f", sign test p = {chance:.3g}"
    return Decision(accepted=accepted, reason=reason, before=old, after=new)


def sign_test(gains: int, losses: int) -> float:
    """Return the one-sided exact sign test's p: P(at least `gains` of gains + losses | both equally likely).

    >>> sign_test(5, 0)
    0.03125
    """
    trials = gains + losses
    return float(sum(comb(trials, k) for k in range(gains, trials + 1)) / 2**trials)
