"""DSPy programs as agents: instructions, field descriptions and demonstrations of their predictors are parameters.

Numbers, lists and texts that a module keeps in ParameterNodes are trained with them. Modules that another optimizer
has frozen (`_compiled`) are left as they are. Each rollout runs on a copy of the program, without DSPy's caches, so
that every call is made, counted and recorded. Accepted values are written into the program: `program.save` saves them.

    agent = trainable(dspy.ChainOfThought("ticket -> team"), train=["instructions", "demos"])
    AggregatedUpdate(agent, LLMOptimizer(llm=llm)).train(metric, trainset)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import dspy

from aggregator import errors
from aggregator.adapters.dspy_program import (
    PARTS,
    all_predictors,
    copy_program,
    inputs_of,
    is_async_only,
    nodes_of,
    parts_of,
    write_parts,
)
from aggregator.adapters.dspy_steps import Steps
from aggregator.adapters.frameworks import FrameworkAgent, require_version
from aggregator.errors import ConfigError, TrainingWarning
from aggregator.executors.work import Ran
from aggregator.guides.calling import Call
from aggregator.records import RolloutTask
from aggregator.text import list_names

_LOST = {
    "LMAuthError": errors.AuthenticationError,
    "LMBillingError": errors.QuotaError,
    "LMRateLimitError": errors.RateLimitError,
    "LMTimeoutError": errors.APITimeoutError,
    "LMTransportError": errors.APIConnectionError,
    "LMServerError": errors.ServerError,
    "ContextWindowExceededError": errors.ContextLengthError,
    "LMUnsupportedModelError": errors.NotFoundError,
}
"""DSPy's errors of calls that were lost -> ours, which are not feedback on the program."""


class DspyAgent(FrameworkAgent):
    """A DSPy program; `train` names what is trained of each predictor, `output` the field that is the output.

    Without `output` it is the whole prediction, which metrics of DSPy need. Raises ConfigError for an unknown part, and
    for a program whose predictors are all frozen.
    """

    isolation: Literal["overlay", "copy", "serial"] = "copy"

    def __init__(self, program: Any, train: Sequence[str] = ("instructions",), output: str | None = None) -> None:
        if isinstance(train, str) or not train or any(part not in PARTS for part in train):
            raise ConfigError(f"Expected train to be a list of {', '.join(PARTS)}, got {train!r}")
        self.train, self.output = list(train), output
        fields = {field for predictor in all_predictors(program) for field in predictor.signature.output_fields}
        if output not in {None, *fields} and type(program).__module__.startswith("dspy."):  # others may add fields
            raise ConfigError(f"Expected output to be one of the fields {list_names(sorted(fields))}, got {output!r}")
        self._parts = [part for name, predictor in program.named_predictors() for part in parts_of(name, predictor)]
        self._parts = [part for part in self._parts if part.kind in train]
        self._nodes = list(nodes_of(program))
        if not self._parts and not self._nodes:
            raise ConfigError(
                f"Expected a {type(program).__name__} with a predictor that can be trained, got "
                f"{'predictors of compiled modules only' if all_predictors(program) else 'none'}; give it a "
                "dspy.Predict, or set `_compiled = False` on the module that is to be trained"
            )
        super().__init__(program, [*(part.parameter() for part in self._parts), *self._nodes])
        copied = {id(predictor) for _, predictor in copy_program(program, self._nodes).named_predictors()}
        if any(id(part.predictor) in copied for part in self._parts):
            self.isolation, self.max_concurrency = "serial", 1
            warnings.warn(
                f"{type(program).__name__} cannot be copied as a whole, so rollouts run one after the other; "
                "keep objects that do not copy (locks, connections) out of the attributes that hold predictors",
                TrainingWarning,
                stacklevel=2,
            )

    def like(self, program: Any) -> DspyAgent:
        """Return an agent with this one's options around another program."""
        return DspyAgent(program, self.train, self.output)

    @contextmanager
    def placed(self) -> Iterator[Any]:
        """Hand out a copy of the program with the values of this context; if it cannot be copied, the program."""
        values = {part: self._parameters[part.name].data for part in self._parts}
        if self.isolation == "serial":
            before = {part: part.read(part.predictor) for part in self._parts}
            predictors = dict(self.program.named_predictors())
            write_parts(predictors, values)
            try:
                yield self.program
            finally:
                write_parts(predictors, before)
        else:
            program = copy_program(self.program, self._nodes)
            write_parts(dict(program.named_predictors()), values)
            yield program

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return the prediction; a reply that DSPy cannot parse is the agent's failure, and so feedback."""
        with self.placed() as program, _observed(program):
            inputs = inputs_of(program, task.sample.x)
            try:
                if is_async_only(program):
                    prediction = await program.acall(**inputs)
                else:
                    prediction = await call(partial(program, **inputs))
            except Exception as error:
                raise _own_error(error) from error
        return Ran(output=prediction if self.output is None else prediction[self.output])


def adapt(thing: Any, train: Sequence[str] = ("instructions",), output: str | None = None) -> FrameworkAgent | None:
    """Return a DSPy program as an agent, None for another object of DSPy's."""
    require_version("dspy", "3.3", "3.6")
    return DspyAgent(thing, train, output) if isinstance(thing, dspy.Module) else None


@contextmanager
def _observed(program: Any) -> Iterator[None]:
    """Run a program in the block: no answers from DSPy's caches, predictors and tools in the transcript."""
    for predictor in all_predictors(program):
        predictor.lm = _uncached(predictor.lm)
    lm = dspy.settings.lm
    if lm is None and any(predictor.lm is None for predictor in all_predictors(program)):
        raise ConfigError("Expected a model that DSPy asks, got none; call dspy.configure(lm=dspy.LM(...)) before")
    named = program.named_sub_modules(type_=dspy.Predict)
    names = {id(module): path.removeprefix("self.") for path, module in named if module is not program}
    watching = [*(dspy.settings.callbacks or []), Steps(names)]
    with dspy.context(lm=_uncached(lm), callbacks=watching):
        yield


def _uncached(lm: Any) -> Any:
    """Return a model that asks whenever it is called; it shares the connections of the given one."""
    return lm.copy(cache=False) if isinstance(lm, dspy.BaseLM) and lm.cache else lm


def _own_error(error: BaseException) -> BaseException:
    """Return the library's error behind one of DSPy's, or our error for a lost call, or the error as it is."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, errors.LLMError | errors.BudgetExceededError | errors.CassetteError | ConfigError):
            return behind
        behind = behind.__cause__
    if type(error).__name__ == "AdapterParseError":
        return errors.AgentReplyError(str(error).strip())
    make: Callable[..., errors.LLMError] | None = next(
        (_LOST[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _LOST), None
    )
    if make is None:
        return error
    facts = {"code": "provider_code", "status": "status", "request_id": "request_id", "retry_after": "retry_after"}
    return make(str(error), **{ours: getattr(error, theirs, None) for ours, theirs in facts.items()})
