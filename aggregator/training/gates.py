"""Accept or refuse an update or a single value, and choose the values that a run ends with.

A refused update is never written: candidates are evaluated under an overlay. The validation set chooses the best
values, the test set never does. A run and its resume continue from the last values; the best are written at the end.

A check refuses one new value before anything is run:

    keeps_placeholders   a template keeps its placeholders and gains none; a prompt is never emptied (on by default)
    max_edit(0.2)        one update changes at most a fifth of a text
    leak_guard()         no runs of words from the training data in a text

A refused value is requested once more with the reason; if the second one is refused too, the update continues without
it. A custom check is a function `(before, after, parameter, step) -> reason or None`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from difflib import SequenceMatcher
from math import comb, floor
from typing import Any, Literal, get_args

from msgspec import Struct
from msgspec.structs import astuple, replace

from aggregator.agents.code import CodeParameter
from aggregator.agents.modules import Module, note_origin
from aggregator.agents.parameters import ParameterNode, write
from aggregator.cassettes.lineage import current_lineage, lineage
from aggregator.checks import is_finite
from aggregator.errors import ConfigError
from aggregator.llm.ledger import collecting
from aggregator.records import Decision, Evaluation, Kept, Rollout, Sample, TrainingResult, Values
from aggregator.text import list_names, placeholders, shorten, show_call
from aggregator.training.batches import Dataset, samples
from aggregator.training.checkpoints import RunState
from aggregator.training.evaluation import Evaluations, failures_of, is_crash, lowest_of, mean, scores_of
from aggregator.training.parts import ask_gate, check_checks
from aggregator.training.step import Check, Gate, Step

# ---- gates


async def always(before: Values, after: Values, step: Step) -> Decision:
    """Accept every update: the neutral gate, and Trace's default."""
    return Decision(accepted=True, reason="always")


def both(first: Gate, second: Gate) -> Gate:
    """Accept what both gates accept; the second is asked only about what the first accepts, and decides last."""

    async def gate(before: Values, after: Values, step: Step) -> Decision:
        decision = await ask_gate(first, before, after, step)
        return await ask_gate(second, before, after, step) if decision.accepted else decision

    gate.__qualname__ = show_call("both", first, second)
    one, other = cost_of(first), cost_of(second)
    return costing(gate, Cost(*(x + y for x, y in zip(astuple(one), astuple(other), strict=True))))


class Cost(Struct, frozen=True):
    """Rollouts that a gate runs at most: per instance of the minibatch, per step, and once in a run."""

    per_instance: int = 0
    per_step: int = 0
    once: int = 0


def costing(gate: Gate, cost: Cost) -> Gate:
    """Declare what a gate costs, for `trainer.plan`."""
    facts: Any = gate
    facts.cost = cost
    return gate


def cost_of(gate: Gate) -> Cost:
    """Return the declared cost of a gate, or a cost of 0."""
    cost = getattr(gate, "cost", None)
    return cost if isinstance(cost, Cost) else Cost()


def improves_on_batch(threshold: float = 0.0, *, score: str | None = None) -> Gate:
    """Accept an update that raises the mean score on the same minibatch by at least `threshold`, and by more than 0.

    Costs one more run of the agent per instance, and outside a run another one for the current values. Scores are
    compared per instance by `compare_runs`. `score` names the score to compare, as for `improves_on_validation`.
    """
    check_threshold(threshold)
    check_score_name(score)

    async def gate(before: Values, after: Values, step: Step) -> Decision:
        known = list(step.rollouts or await step.evaluate(before, step.samples))
        due = [i for i, run in enumerate(known) if run.failure is not None and run.failure.infrastructure]
        if due and step.rollouts:  # lost calls are retried once, as in an evaluation
            for i, run in zip(due, await step.evaluate(before, [step.samples[i] for i in due]), strict=True):
                known[i] = run
        tried = await step.evaluate(after, step.samples)
        return compare_runs(known, tried, min_score=step.min_score, threshold=threshold, score=score)

    gate.__qualname__ = show_call("improves_on_batch", threshold, score=score)
    return costing(gate, Cost(per_instance=1))


def improves_on_validation(
    dataset: Dataset, threshold: float = 0.0, *, significance: float | None = None, score: str | None = None
) -> Gate:
    """Accept an update that raises the mean score on a validation set, paired per instance.

    `threshold` is the least gain of the mean. With `significance=0.05` the gain must also pass a one-sided exact
    sign test over the instances whose score changed: the chance of so many gains among them, were gains and losses
    equally likely, is at most this. Costs one run per instance for each new candidate; the scores of the current values
    are remembered, also by a resumed run. `score` names the score to compare, one of the guide's `Scores.named` or
    "cost", "length" or "milliseconds", where lower is better; None is the primary score.
    """
    check_threshold(threshold)
    check_score_name(score)
    if significance is not None and not 0 < significance < 1:
        raise ConfigError(f"Expected significance between 0 and 1, or None, got {significance!r}")
    validation = samples(dataset, name="validation dataset")

    async def gate(before: Values, after: Values, step: Step) -> Decision:
        known = await step.evaluate(before, validation)
        tried = await step.evaluate(after, validation)
        options: dict[str, Any] = {"threshold": threshold, "significance": significance, "score": score}
        return compare_runs(known, tried, min_score=step.min_score, **options)

    gate.__qualname__ = show_call("improves_on_validation", threshold=threshold, significance=significance, score=score)
    return costing(gate, Cost(per_step=len(validation), once=len(validation)))


MEASURES = ("cost", "length", "milliseconds")
"""The scores of every rollout that do not come from the guide; lower is better."""


# ---- comparing scores


def check_score_name(score: Any) -> None:
    """Raise ConfigError for an invalid name of a score."""
    if score is not None and (not isinstance(score, str) or not score):
        raise ConfigError(f"Expected score to be the name of a score, or None for the primary one, got {score!r}")


def by_name(rollouts: Sequence[Rollout], score: str) -> list[Rollout]:
    """Return the rollouts with one of their named scores as the score, negated if lower is better.

    An instance on which the agent failed has no score, even if it cost little. Raises ConfigError if all others lack
    the name.

    >>> [run.score for run in by_name([Rollout(sample_id=0, score=1.0, scores={"cost": 0.25})], "cost")]
    [-0.25]
    """
    judged = [run for run in rollouts if run.failure is None]
    if judged and not any(score in run.scores for run in judged):
        known = sorted({name for run in judged for name in run.scores})
        raise ConfigError(
            f"Expected rollouts with a score named {score!r}, got {', '.join(known) or 'no named scores'}; return "
            f"Scores(primary, {{{score!r}: ...}}) from the guide"
        )
    sign = -1 if score in MEASURES else 1
    return [
        replace(run, score=sign * run.scores[score] if run.failure is None and score in run.scores else None)
        for run in rollouts
    ]


def check_threshold(threshold: Any) -> None:
    """Raise ConfigError for an invalid threshold."""
    if not is_finite(threshold):
        raise ConfigError(f"Expected threshold to be a finite number, the least gain of the mean, got {threshold!r}")


def compare(
    before: Sequence[float | None],
    after: Sequence[float | None],
    *,
    threshold: float = 0.0,
    significance: float | None = None,
    min_score: float | None = None,
) -> Decision:
    """Decide between two series of scores of the same instances; None is an instance that was not judged.

    One that was not judged before is left out. One that was judged before and not after is lost: there must be a gain
    without it, and also if its new score is taken as the lowest possible (`lowest_of`).

    >>> compare([0.0, 1.0], [1.0, 1.0]).accepted
    True
    >>> compare([0.5], [0.45], threshold=0.1).accepted
    False
    """
    known = [(old, new) for old, new in zip(before, after, strict=True) if old is not None]
    judged = [(old, new) for old, new in known if new is not None]
    if not judged:
        return Decision(accepted=False, reason="no instance has a score both before and after")
    decision = _weigh(judged, threshold, significance)
    lost_after = len(known) - len(judged)
    if not lost_after or not decision.accepted:
        return decision
    lowest = lowest_of(before, after, min_score=min_score)
    worst = _weigh([(old, lowest if new is None else new) for old, new in known], threshold, significance)
    counted = f"with {lost_after} more that were lost after, each at {lowest:g}: {worst.reason}"
    return replace(decision if worst.accepted else worst, reason=f"{decision.reason}; {counted}")


def _weigh(pairs: Sequence[tuple[float, float]], threshold: float, significance: float | None) -> Decision:
    """Decide by the scores (before, after) of each instance."""
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


def compare_runs(
    before: Sequence[Rollout],
    after: Sequence[Rollout],
    *,
    min_score: float | None = None,
    threshold: float = 0.0,
    significance: float | None = None,
    score: str | None = None,
) -> Decision:
    """Decide between the rollouts of the same instances under two sets of values, as `compare` does.

    If the agent failed, the score is `min_score`, else the lowest on either side, at most 0. The reason gives the
    number of instances that the guide has judged on both sides if that is not all of them. `score` names one of the
    named scores to compare; `min_score` is one of the primary score alone.
    """
    if score is not None:
        pair = (by_name(before, score), by_name(after, score))
        decision = compare_runs(*pair, threshold=threshold, significance=significance)
        name = f"minus {score}" if score in MEASURES else score
        return replace(decision, reason=f"{name}: {decision.reason}")
    lowest = lowest_of(scores_of(before), scores_of(after), min_score=min_score)
    sides = (scores_of(before, lowest), scores_of(after, lowest))
    decision = compare(*sides, threshold=threshold, significance=significance, min_score=min_score)
    crashes = [sum(is_crash(run) for run in side) for side in (before, after)]
    if any(crashes):
        judged = sum(
            not (is_crash(a) or is_crash(b)) and None not in (a.score, b.score)
            for a, b in zip(before, after, strict=True)
        )
        failed = f"the agent failed on {crashes[0]} before and {crashes[1]} after, which counts as {lowest:g}"
        decision = replace(decision, reason=f"{decision.reason}; {judged} judged on both sides, {failed}")
    return decision


def sign_test(gains: int, losses: int) -> float:
    """Return the one-sided exact sign test's p: P(at least `gains` of gains + losses | both equally likely).

    >>> sign_test(5, 0)
    0.03125
    """
    trials = gains + losses
    return float(sum(comb(trials, k) for k in range(gains, trials + 1)) / 2**trials)


# ---- the values that a run ends with


def check_keep(keep: Any, *, validates: bool) -> Kept:
    """Return which values to keep, by default the best if a validation set can choose them; raises ConfigError."""
    if keep is None:
        return "best" if validates else "last"
    if keep not in get_args(Kept):
        raise ConfigError(f"Expected keep 'best' or 'last', got {keep!r}")
    if keep == "best" and not validates:
        raise ConfigError("Expected validate_dataset with keep='best', got none; the test set never chooses")
    kept: Kept = keep
    return kept


async def validate(
    state: RunState,
    values: Values,
    samples: Sequence[Sample],
    evaluations: Evaluations,
    steps: int,
    min_score: float | None = None,
) -> tuple[RunState, Sequence[Rollout]]:
    """Return the state with the validation scores of these values, as the best if they are better, and the rollouts.

    The scores of values that were validated before cost nothing. Ties keep the earlier values. Instances that were lost
    are compared as by `compare_runs`.
    """
    with lineage("validate", f"step={steps}"), collecting() as ledger:
        evaluate = evaluations.at(steps, current_lineage().split("/"))
        runs = await evaluate(values, samples)
        best, best_step = state.best, state.best_step
        if best is None:
            best, best_step = values, steps
        elif best != values:
            known = await evaluate(best, samples)
            if compare_runs(known, runs, min_score=min_score).accepted:
                best, best_step = values, steps
    scores = tuple(run.score for run in runs)
    lowest = lowest_of(scores, *(seen.scores for seen in state.validations), min_score=min_score)
    evaluation = Evaluation(
        step=steps,
        score=mean(scores_of(runs, lowest)),
        scores=scores,
        failures=failures_of(runs),
        usage=ledger.totals(),
    )
    return replace(state, best=best, best_step=best_step, validations=(*state.validations, evaluation)), runs


def values_named(result: TrainingResult, which: Kept) -> Values:
    """Return the best or the last values of a result."""
    if which not in get_args(Kept):
        raise ConfigError(f"Expected 'best' or 'last', got {which!r}")
    return result.best_parameters if which == "best" else result.last_parameters


def apply_values(agent: Any, parameters: Sequence[ParameterNode[Any]], values: Mapping[str, Any], which: Kept) -> None:
    """Write a run's values to its agent, all or none; a Module records their origin, which `save` writes."""
    write(parameters, dict(values))
    if isinstance(agent, Module):
        note_origin(agent, [parameter for parameter in parameters if parameter.name in values], which)


Keep = Literal["best", "last"] | None
"""The values of `train(keep=...)`; None means the best with a validation set, otherwise the last."""


# ---- checks of single values

EDITS_ALLOWED = 20
"""max_edit always allows this number of changed tokens, because a short prompt could not be improved otherwise."""

LEAK_WORDS = 5
"""The number of consecutive words that count as copied (the n-gram length of gepa issue 261)."""

_TOKEN = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"\w+")


def template_placeholders(value: Any, parameter: ParameterNode[Any]) -> list[str]:
    """Return the placeholders of a parameter's value; source code and values other than text have none."""
    return placeholders(value) if isinstance(value, str) and not isinstance(parameter, CodeParameter) else []


def keeps_placeholders(before: Any, after: Any, parameter: ParameterNode[Any], step: Step) -> str | None:
    """Refuse a text that loses a placeholder, invents one, or is empty where the current one is not.

    Source code has no placeholders. A refused text is never repaired by guessing where the placeholder belongs.

    >>> keeps_placeholders("Q: {question}", "Answer briefly.", ParameterNode("Q: {question}"), Step())
    "Expected a text that keeps the placeholders '{question}', got one without '{question}'"
    """
    if not (isinstance(before, str) and isinstance(after, str)):
        return None
    if before.strip() and not after.strip():
        return "Expected a text, got an empty one"
    old, new = template_placeholders(before, parameter), template_placeholders(after, parameter)
    if lost := [name for name in old if name not in new]:
        return f"Expected a text that keeps the placeholders {list_names(old)}, got one without {list_names(lost)}"
    if invented := [name for name in new if name not in old]:
        known = f"no placeholders but {list_names(old)}" if old else "no placeholders"
        return f"Expected a text with {known}, got {list_names(invented)}, which nothing fills in"
    return None


def max_edit(share: float = 0.2) -> Check:
    r"""Return a check that limits how much of a text one update changes.

    `share` in (0, 1] is the part of the current text's tokens (`\w+|[^\w\s]`) that may be replaced, removed or added;
    20 tokens are always allowed. The difference is that of difflib: a passage that moves counts as changed. Raises
    ConfigError for another share.

    >>> check, before = max_edit(0.2), "word " * 200
    >>> check(before, before + "more " * 40, ParameterNode(before), Step())
    >>> check(before, before + "more " * 41, ParameterNode(before), Step())
    'Expected a text that changes at most 40 of the 200 tokens, got one that changes 41'
    """
    if not is_finite(share) or not 0 < share <= 1:
        raise ConfigError(f"Expected max_edit(share) in (0, 1], got {share!r}; 0.2 lets an update change a fifth")

    def max_edit(before: Any, after: Any, parameter: ParameterNode[Any], step: Step) -> str | None:
        if not (isinstance(before, str) and isinstance(after, str)):
            return None
        old, new = _TOKEN.findall(before), _TOKEN.findall(after)
        allowed = max(EDITS_ALLOWED, floor(share * len(old)))
        changed = edited_tokens(old, new)
        if changed <= allowed:
            return None
        return (
            f"Expected a text that changes at most {allowed} of the {len(old)} tokens, got one that changes {changed}"
        )

    max_edit.__qualname__ = show_call("max_edit", share)
    return max_edit


def edited_tokens(old: Sequence[str], new: Sequence[str]) -> int:
    """Return the number of tokens that differ; for a replaced passage the longer side counts.

    >>> edited_tokens(["a", "b", "c"], ["a", "x", "y", "c"])
    2
    """
    pieces = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return sum(max(end - start, stop - begin) for kind, start, end, begin, stop in pieces if kind != "equal")


def leak_guard(data: Dataset | None = None, *, words: int = LEAK_WORDS) -> Check:
    """Return a check that refuses texts with runs of words copied from training inputs or answers.

    `data` must not be copied; by default it is the run's training set, or the samples of a step made alone. Runs of
    `words` words that the initial or the current value has are allowed, and parameters marked as demonstrations
    (`ParameterNode(..., demonstrations=True)`) are exempt. All texts inside a value count, for lists and mappings too.
    Raises ConfigError unless `words` is an int of at least 2.

    >>> check = leak_guard([("Which river runs through the old town of Bern?", "Aare")])
    >>> check("Answer.", "The river runs through the old town.", ParameterNode("Answer."), Step())
    "Expected a text without runs of 5 words from the training data, got 'river runs through the old' and 1 more"
    """
    if type(words) is not int or words < 2:
        raise ConfigError(f"Expected leak_guard(words=...) to be an int of at least 2, got {words!r}")
    given = None if data is None else samples(data)
    known: list[Any] = [None, {}]  # the samples of the last call, and their runs of words

    def leak_guard(before: Any, after: Any, parameter: ParameterNode[Any], step: Step) -> str | None:
        if getattr(parameter, "demonstrations", False):
            return None
        source = given or step.training or step.samples
        if known[0] is not source:
            known[:] = source, _runs((part for one in source for part in (one.x, one.info)), words)
        seen: dict[tuple[str, ...], str] = known[1]
        allowed = _runs((before, step.initial.get(parameter.name)), words).keys()
        copied = [text for run, text in _runs((after,), words).items() if run in seen and run not in allowed]
        if not copied:
            return None
        return (
            f"Expected a text without runs of {words} words from the training data, got {shorten(copied[0], 120)}"
            f"{f' and {len(copied) - 1} more' if len(copied) > 1 else ''}"
        )

    leak_guard.__qualname__ = show_call("leak_guard", words=words)
    return leak_guard


def all_checks(given: Sequence[Check] | None) -> tuple[Check, ...]:
    """Return the checks of a trainer: `keeps_placeholders` and those given; an empty list turns all of them off.

    Raises ConfigError for what is not a list of checks.
    """
    if given is None:
        return (keeps_placeholders,)
    check_checks(given)
    own = tuple(given)
    return own if not own or keeps_placeholders in own else (keeps_placeholders, *own)


def _runs(values: Iterable[Any], words: int) -> dict[tuple[str, ...], str]:
    """Return every run of `words` words in the texts of some values: the words in lower case -> the text."""
    found: dict[tuple[str, ...], str] = {}
    for text in (text for value in values for text in _texts(value)):
        spans = list(_WORD.finditer(text))
        for i in range(len(spans) - words + 1):
            part = spans[i : i + words]
            found.setdefault(tuple(word[0].casefold() for word in part), text[part[0].start() : part[-1].end()])
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple | AbstractSet):
        for item in value:
            yield from _texts(item)
    else:
        names: Any = getattr(value, "__struct_fields__", getattr(value, "__dataclass_fields__", ()))
        for name in names:
            yield from _texts(getattr(value, name))
