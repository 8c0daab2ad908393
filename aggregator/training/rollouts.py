"""Run one instance through the agent and judge the output; whatever goes wrong becomes part of the record."""

from __future__ import annotations

import inspect
from typing import Any

from aggregator.agents.transcripts import transcript
from aggregator.cassettes.lineage import lineage
from aggregator.guides.calling import judge
from aggregator.records import Failure, Rollout, Sample
from aggregator.training.executors import AsyncExecutor
from aggregator.training.failures import ends_run, failure, is_own, root_of


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
    if inspect.iscoroutinefunction(forward) or inspect.iscoroutinefunction(getattr(agent, "__call__", None)):  # noqa: B004
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
