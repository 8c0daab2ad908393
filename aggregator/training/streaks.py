"""A user's bug is no training signal: what the latest rollouts of a run have in common, and when that ends it."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from aggregator.errors import TrainingError
from aggregator.executors.blame import show_failure
from aggregator.records import Proposal, Rollout
from aggregator.training.checkpoints import Streak
from aggregator.training.step import Step
from aggregator.training.updates import Propose

LONGEST = 4
"""So many rollouts in a row that fail at one line of the user's code end a run."""


_CAUSES = (
    (("ParameterNode",), "a parameter is used instead of its value: write `.data`, as in self.prompt.data"),
    (("coroutine",), "a coroutine is used instead of its result: write `await`"),
    (("async_generator", "async generator"), "an async generator is used as a value: collect it with `async for`"),
    (("generator",), "a generator is used as a value: return what it yields, as in list(...)"),
    (("Completion",), "a Completion is used instead of its text: write `.text`, as in self.llm(...).text"),
    (
        ("positional argument", "unexpected keyword argument", "required keyword-only argument"),
        "a call does not fit the function: an agent is called as forward(self, x), a guide as guide(x, output, info)",
    ),
)


def follow(streak: Streak, rollouts: Sequence[Rollout], values: str) -> Streak:
    """Return the streak after more rollouts under values of this digest.

    Lost calls say nothing. Raises TrainingError, with the traceback and the likely cause, where `LONGEST` rollouts in a
    row failed with the same exception type at the same line of the user's code.
    """
    for rollout in rollouts:
        record = rollout.failure
        if record is not None and record.infrastructure:
            continue
        if record is None:
            streak = Streak(succeeded=streak.succeeded or rollout.score is not None)
            continue
        key = (record.stage, record.error, record.where, values)
        same = bool(record.where) and key == streak.key
        streak = replace(streak, key=key if record.where else (), length=streak.length + 1 if same else 1)
        if same and streak.length >= LONGEST:
            raise TrainingError(
                f"Expected the {record.stage} to work on some instance, but {streak.length} rollouts in a row failed "
                f"with the same error, the latest on sample {rollout.sample_id}.\n{show_failure(record)}\n"
                f"Likely cause: {cause_of(record.error, record.message, record.stage)}"
            )
    return streak


def is_bug(rollout: Rollout) -> bool:
    """Return True if code of the user's failed on an instance, which may be no doing of the values."""
    return rollout.failure is not None and bool(rollout.failure.where)


def spare_bugs(propose: Propose) -> Propose:
    """Return how is proposed for as long as no instance has succeeded: not for those on which user code failed."""

    async def spare(rollouts: Sequence[Rollout], step: Step) -> Proposal:
        usable = [rollout for rollout in rollouts if not is_bug(rollout)]
        return await propose(usable, step) if usable else Proposal()

    return spare


def cause_of(error: str, message: str, stage: str) -> str:
    """Return the likely cause of an error.

    >>> cause_of("TypeError", "unsupported operand type(s) for +: 'ParameterNode' and 'str'", "agent")
    'a parameter is used instead of its value: write `.data`, as in self.prompt.data'
    """
    for words, cause in _CAUSES:
        if any(word in message for word in words):
            return cause
    return "the guide itself raises" if stage == "guide" else "the agent's own code raises, whatever its input"
