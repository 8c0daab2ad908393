"""What the present step knows, for the rules, gates and overridden methods that run inside it.

The seed's signatures (`forward(agent, x, guide, info)`, `update(outputs)`) carry neither stepsize nor sample; this
context does, per task, so that nothing is parked on the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

from msgspec import Struct

from aggregator.agents.parameters import keeping, overriding
from aggregator.cassettes.lineage import lineage
from aggregator.executors.local import AsyncExecutor
from aggregator.protocols import Gate
from aggregator.records import Rollout, Sample, StepReport, Values


class Variant(Struct, frozen=True, kw_only=True):
    """Values that samples are run under, and their place in the lineage; the neutral one is what is in force.

    Either way what an agent or an optimizer assigns to parameters on its way stays with its instance.
    """

    place: str = ""
    values: Values = {}

    def laid_over(self, parameters: Sequence[Any]) -> AbstractContextManager[None]:
        """Let the parameters read as these values in the current context."""
        if not self.place and not self.values:  # nearly always
            return keeping(parameters)
        return self._placed(parameters)

    @contextmanager
    def _placed(self, parameters: Sequence[Any]) -> Iterator[None]:
        place = lineage(self.place) if self.place else nullcontext()
        with place, overriding(parameters, self.values) if self.values else keeping(parameters):
            yield


class Observe(Protocol):
    """Runs samples under given values, without touching the agent."""

    async def __call__(self, values: Values, samples: Sequence[Sample], place: str, guide: Any = None) -> list[Rollout]:
        """Return one rollout per sample; `place` names the calls in the lineage, `guide` stands in for the run's."""
        ...


async def _no_observation(values: Values, samples: Sequence[Sample], place: str, guide: Any = None) -> list[Rollout]:
    return [Rollout(sample_id=sample.id) for sample in samples]


class StepContext(Struct, frozen=True, kw_only=True):
    """One step as its parts see it; `notes` is what gates and searches remember, JSON under names of their own."""

    stepsize: float = 0.5
    epoch: int = 0
    step: int = 0
    samples: Sequence[Sample] = ()
    parameters: Sequence[Any] = ()
    history: Sequence[StepReport] = ()
    scores: Sequence[float | None] = ()
    min_score: float | None = None
    seed: int = 0
    observe: Observe = _no_observation
    sample: Sample | None = None
    executor: AsyncExecutor | None = None
    gate: Gate | None = None
    notes: dict[str, Any] = {}

    async def evaluate(
        self, values: Values, samples: Sequence[Sample], place: str, guide: Any = None
    ) -> list[float | None]:
        """Return one score per sample under given values, as `observe` finds them."""
        return [run.score for run in await self.observe(values, samples, place, guide)]


_step: ContextVar[StepContext] = ContextVar("aggregator_step", default=StepContext())  # noqa: B039 - frozen


def current_step() -> StepContext:
    """Return the step that this task works for; the seed's defaults outside of any."""
    return _step.get()


@contextmanager
def step_context(context: StepContext) -> Iterator[StepContext]:
    """Make a step the current one."""
    token = _step.set(context)
    try:
        yield context
    finally:
        _step.reset(token)
