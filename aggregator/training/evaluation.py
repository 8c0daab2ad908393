"""Scores of a data set under given parameter values, without touching the agent."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from aggregator import portal
from aggregator.agents.parameters import keeping, overriding
from aggregator.agents.transcripts import transcript
from aggregator.cassettes.lineage import lineage
from aggregator.checks import check_positive, is_async
from aggregator.errors import TrainingWarning, ends_run, is_own
from aggregator.executors.local import AsyncExecutor
from aggregator.guides.calling import judge
from aggregator.records import Failure, Rollout, Sample, Values
from aggregator.training.batches import Dataset, samples
from aggregator.training.failures import failure, root_of
from aggregator.training.parts import check_guide


async def rollout(
    agent: Any, guide: Any, sample: Sample, *, executor: AsyncExecutor, min_score: float | None = None
) -> Rollout:
    """Return what the agent did with one sample, its score and feedback.

    An error of the agent itself is feedback and scores `min_score`; a lost call or a guide's failure leaves the score
    None, which is not 0. Errors that end the run are raised.
    """
    with transcript() as seen:
        try:
            output = await run_agent(agent, sample.x, executor)
        except BaseException as error:  # the boundary: whatever an agent raises becomes a record
            if not is_own(error):
                raise
            return _failed_agent(error, sample, seen.render(), min_score)
    text = seen.render()
    try:
        with lineage("guide", role="guide"):
            score, feedback = await judge(guide, sample.x, output, sample.info, call=executor.call)
    except BaseException as error:
        if not is_own(error):
            raise
        if ends_run(cause := root_of(error)):
            raise cause from None
        return Rollout(sample_id=sample.id, output=output, transcript=text, failure=_at("guide", error, sample))
    return Rollout(sample_id=sample.id, output=output, score=score, feedback=feedback, transcript=text)


async def run_agent(agent: Any, x: Any, executor: AsyncExecutor) -> Any:
    """Return `agent(x)`: awaited where the agent is async, in a thread where it is not."""
    forward = getattr(agent, "forward", agent)
    if is_async(forward) or is_async(agent):
        return await agent(x)
    output = await executor.call(agent, x)
    return await output if inspect.isawaitable(output) else output


def _failed_agent(error: BaseException, sample: Sample, text: str, min_score: float | None) -> Rollout:
    if ends_run(cause := root_of(error)):
        raise cause
    record = _at("agent", error, sample)
    if record.infrastructure:
        return Rollout(sample_id=sample.id, transcript=text, failure=record)
    feedback = f"The agent failed on this input with {record.error}: {record.message}"
    return Rollout(sample_id=sample.id, score=min_score, feedback=feedback, transcript=text, failure=record)


def _at(stage: Any, error: BaseException, sample: Sample) -> Failure:
    return failure(stage, error, sample_id=sample.id)


async def rollouts(
    agent: Any,
    guide: Any,
    batch: Sequence[Sample],
    *,
    executor: AsyncExecutor,
    min_score: float | None = None,
    parameters: Sequence[Any] = (),
) -> list[Rollout]:
    """Run every sample and return the rollouts in sample order; what one does to `parameters` no other sees."""

    async def one(sample: Sample) -> Rollout:
        with lineage(f"sample={sample.id}"), keeping(parameters):
            return await rollout(agent, guide, sample, executor=executor, min_score=min_score)

    return await executor.map(one, batch)


async def score_values(
    agent: Any,
    guide: Any,
    parameters: Sequence[Any],
    values: Values,
    batch: Sequence[Sample],
    *,
    executor: AsyncExecutor,
    min_score: float | None = None,
) -> list[Rollout]:
    """Run every sample under `values`, laid over the parameters for this context only."""
    with overriding(parameters, values):
        return await rollouts(agent, guide, batch, executor=executor, min_score=min_score, parameters=parameters)


def mean(scores: Sequence[float | None]) -> float | None:
    """Return the mean of the scores that are known, None where none is.

    >>> mean([1.0, None, 0.0])
    0.5
    """
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


def failures_of(runs: Sequence[Rollout]) -> tuple[Failure, ...]:
    """Return what went wrong in a series of rollouts, in their order."""
    return tuple(run.failure for run in runs if run.failure is not None)


async def aevaluate(
    agent: Any,
    guide: Any,
    inputs: Sequence[Any] | Dataset,
    infos: Sequence[Any] | None = None,
    *,
    min_score: float | None = None,
    max_concurrency: int = 64,
) -> list[float | None]:
    """Return one score per instance; None where a call was lost or the guide failed, which is not 0.

    `inputs` and `infos` are two sequences as in Trace, or `inputs` is a whole data set. An instance on which the agent
    itself fails scores `min_score`. Where instances have no score a TrainingWarning says how many, and why the first.
    """
    check_guide(guide)
    dataset: Any = inputs if infos is None else {"inputs": inputs, "infos": infos}
    check_positive("max_concurrency", max_concurrency)
    async with AsyncExecutor(max_concurrency) as executor:
        with portal.carrying(), lineage("evaluate"):
            batch = samples(dataset, name="dataset")
            runs = await rollouts(agent, guide, batch, executor=executor, min_score=min_score)
    _warn_of([run.failure for run in runs if run.score is None and run.failure is not None], len(runs))
    return [run.score for run in runs]


def _warn_of(failures: Sequence[Failure], instances: int) -> None:
    if failures:
        first = failures[0]
        warnings.warn(
            f"{len(failures)} of {instances} instances have no score; the first, instance {first.sample_id}, failed in "
            f"the {first.stage}: {first.error}: {first.message}",
            TrainingWarning,
            stacklevel=2,
        )


def evaluate(
    agent: Any,
    guide: Any,
    inputs: Sequence[Any] | Dataset,
    infos: Sequence[Any] | None = None,
    *,
    min_score: float | None = None,
    max_concurrency: int = 64,
) -> list[float | None]:
    """Return one score per instance: the synchronous face of `aevaluate`."""
    return portal.call(aevaluate, agent, guide, inputs, infos, min_score=min_score, max_concurrency=max_concurrency)
