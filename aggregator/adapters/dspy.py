"""DSPy programs as agents: instructions, field descriptions and demonstrations of their predictors are parameters.

Numbers, lists and texts that a module keeps in ParameterNodes are trained with them. Modules that another optimizer has
frozen (`_compiled`) are not changed. Each rollout runs on a copy of the program, without DSPy's caches, so that every
call is made, counted and recorded. Accepted values are written into the program: `program.save` saves them.

    agent = trainable(dspy.ChainOfThought("ticket -> team"), train=["instructions", "demos"])
    AggregatedUpdate(agent, LLMOptimizer(llm=llm)).train(metric, trainset)

A transcript has a span for each predictor and tool: the DSPy callback `Steps` opens them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import Parameter, ismethod, signature
from typing import Any, Literal, TypedDict

import dspy
from dspy.predict.predict import serialize_object
from dspy.utils.callback import BaseCallback
from dspy.utils.callback_context import ACTIVE_CALL_ID

from aggregator import errors
from aggregator.adapters.frameworks import FrameworkAgent, HostParameter, require_version
from aggregator.agents.parameters import ParameterNode, carried_by_json
from aggregator.agents.transcripts import Group, LLMCall, Span, recording
from aggregator.errors import ConfigError, TrainingWarning
from aggregator.executors.work import Ran
from aggregator.guides.calling import Call
from aggregator.records import Choice, Completion, Message, RolloutTask
from aggregator.text import as_text, list_names, shorten

# ---- what can be trained in a program

PARTS = ("instructions", "fields", "demos")
"""The trainable parts of a predictor."""


class Part:
    """One trainable part of a predictor: its instructions, a field's description, or its demonstrations."""

    def __init__(self, path: str, predictor: Any, kind: str, field: str = "") -> None:
        self.path, self.predictor, self.kind, self.field = path, predictor, kind, field
        prefix = "" if path == "self" else f"{path}."
        self.name = f"{prefix}{field}.desc" if field else f"{prefix}{kind}"

    def parameter(self) -> HostParameter:
        """Return the parameter that reads and writes the predictor of the user's program."""
        fields = self.predictor.signature.fields
        return HostParameter(
            lambda: self.read(self.predictor),
            lambda value: self.write(self.predictor, value),
            name=self.name,
            type=list[_demo_type(fields)] if self.kind == "demos" else str,  # type: ignore[misc] # made here
            description=self._describe(),
            demonstrations=self.kind == "demos",
        )

    def _describe(self) -> str:
        if self.kind == "demos":
            fields = list_names(list(self.predictor.signature.fields))
            return f"worked examples that the model sees before the input, each with {fields}"
        return f"what {self.field} holds" if self.field else "the task, as the model reads it above the fields"

    def read(self, predictor: Any) -> Any:
        """Return the predictor's value."""
        if self.kind == "instructions":
            return predictor.signature.instructions
        if self.kind == "fields":
            text = predictor.signature.fields[self.field].json_schema_extra["desc"]
            return "" if text == _unwritten(self.field) else text
        return serialize_object([_plain(demo) for demo in predictor.demos])

    def write(self, predictor: Any, value: Any) -> None:
        """Set the predictor's value."""
        if self.kind == "instructions":
            predictor.signature = predictor.signature.with_instructions(value)
        elif self.kind == "fields":
            text = value or _unwritten(self.field)
            predictor.signature = predictor.signature.with_updated_fields(self.field, desc=text)
        else:
            inputs = list(predictor.signature.input_fields)
            predictor.demos = [dspy.Example(**demo).with_inputs(*inputs) for demo in value]


def parts_of(path: str, predictor: Any) -> Iterator[Part]:
    """Yield the trainable parts of a predictor."""
    yield Part(path, predictor, "instructions")
    yield from (Part(path, predictor, "fields", field) for field in predictor.signature.fields)
    yield Part(path, predictor, "demos")


def write_parts(predictors: Mapping[str, Any], values: Mapping[Part, Any]) -> None:
    """Set the values of a program's predictors, by path, if they differ."""
    for part, value in values.items():
        if part.read(predictors[part.path]) != value:
            part.write(predictors[part.path], value)


def _unwritten(field: str) -> str:
    """Return DSPy's default for a field without a description."""
    return f"${{{field}}}"


def _demo_type(fields: Mapping[str, Any]) -> Any:
    """Return the type of a demonstration: a dict of the signature's fields."""
    kinds = {
        name: field.annotation if carried_by_json(field.annotation, None) else Any for name, field in fields.items()
    }
    made: Any = TypedDict("Demo", kinds, total=False)  # type: ignore[misc] # of the current signature
    made.__module__ = "builtins"  # prompts show `list[Demo]`
    return made


def _plain(demo: Any) -> dict[str, Any]:
    held = demo.toDict() if hasattr(demo, "toDict") else dict(demo)
    return {name: value for name, value in held.items() if not name.startswith("dspy_")}


def all_predictors(program: Any) -> list[Any]:
    """Return every predictor, including those of frozen modules."""
    return [module for _, module in program.named_sub_modules(type_=dspy.Predict)]


def nodes_of(program: Any) -> Iterator[ParameterNode[Any]]:
    """Yield the ParameterNodes in a program's modules, named by their attributes."""
    seen: set[int] = set()
    for path, module in program.named_sub_modules(type_=dspy.Module, skip_compiled=True):
        for attribute, value in vars(module).items():
            if isinstance(value, ParameterNode) and id(value) not in seen:
                seen.add(id(value))
                if not value.named:
                    value.name = f"{path}.{attribute}".removeprefix("self.")
                yield value


def copy_program(program: Any, kept: Sequence[Any]) -> Any:
    """Copy a program, except the objects that it only uses.

    Models, indices, connections, the user's objects, and `kept`.
    """
    used = [one for _, module in program.named_sub_modules() for value in vars(module).values() for one in _used(value)]
    try:
        return copy.deepcopy(program, {id(one): one for one in [*used, *kept]})
    except Exception:  # noqa: BLE001 - whatever an object raises that cannot be copied
        return program.deepcopy()


def _used(value: Any) -> Iterator[Any]:
    """Yield the objects in an attribute that are not part of the program, and may hold locks or gigabytes."""
    value = value.func if isinstance(value, dspy.Tool) else value
    if ismethod(value):
        value = value.__self__
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _used(item)
    elif type(value).__module__.startswith(("dspy.clients", "dspy.retrievers")) or not _is_part(value):
        yield value


def _is_part(value: Any) -> bool:
    """Return True for a part of a program that is copied.

    DSPy's own objects, plain values, and containers of modules are parts.
    """
    if type(value).__module__.partition(".")[0] in {"dspy", "builtins", "functools", "types"}:
        return True
    held = getattr(value, "__dict__", {}).values()
    return isinstance(value, dspy.Module) or any(isinstance(one, dspy.Module) for one in held)


def inputs_of(program: Any, x: Any) -> dict[str, Any]:
    """Return the keyword arguments of one call: the row's columns that the program accepts."""
    taken = _arguments(program)
    if hasattr(x, "toDict"):
        x = x.toDict()
    if isinstance(x, Mapping):
        return {name: value for name, value in x.items() if taken is None or name in taken}
    if taken is not None and len(taken) == 1:
        return {taken[0]: x}
    raise ConfigError(
        f"Expected the inputs of {type(program).__name__} as a dict of {list_names(taken or ['its arguments'])}, got "
        f"{shorten(x)}; give dspy.Examples, or rows with named columns"
    )


def _arguments(program: Any) -> list[str] | None:
    """Return the names of a program's inputs, or None if it accepts any."""
    own = type(program)
    function = own.aforward if is_async_only(program) else own.forward
    found = list(signature(function).parameters.values())[1:]
    if all(one.kind is not Parameter.VAR_KEYWORD for one in found):
        return [one.name for one in found]
    predictors = all_predictors(program)
    is_library = own.__module__.partition(".")[0] == "dspy"
    return list(predictors[0].signature.input_fields) if is_library and predictors else None


def is_async_only(program: Any) -> bool:
    """Return True if the class that defines the call has `aforward` and no `forward`."""
    for kind in type(program).__mro__:
        if "forward" in vars(kind) or "aforward" in vars(kind):
            return "forward" not in vars(kind)
    return False


# ---- a run as a transcript


class Steps(BaseCallback):
    """Records predictors and tools in the transcript, with inputs and outputs.

    A model call is recorded by its client, or by the observer of other clients (`clients=`); here only if neither did,
    for example for a model that makes no requests.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names
        self._open: dict[str, tuple[Any, Span]] = {}
        self._asked: dict[str, tuple[Span | None, int, Any]] = {}

    def _start(self, call_id: str, name: str, inputs: Mapping[str, Any]) -> None:
        given = inputs.get("kwargs", inputs)
        entered = recording(name, inputs=[*given.items()])
        self._open[call_id] = (entered, entered.__enter__())

    def _end(self, call_id: str, outputs: Any, error: BaseException | None) -> None:
        if call_id not in self._open:
            return
        entered, span = self._open.pop(call_id)
        if error is None:
            span.finish(dict(outputs.items()) if isinstance(outputs, dspy.Prediction) else outputs)
        else:
            span.fail(error)
        entered.__exit__(None, None, None)

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Open the span of a predictor."""
        if isinstance(instance, dspy.Predict):
            self._start(call_id, self._names.get(id(instance), type(instance).__name__), inputs)

    def on_module_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        """Close the span of a predictor."""
        self._end(call_id, outputs, exception)

    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Open the span of a tool."""
        self._start(call_id, f"tool {instance.name}", inputs)

    def on_tool_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        """Close the span of a tool."""
        self._end(call_id, outputs, exception)

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Remember the content of the predictor's span before a call."""
        _, span = self._open.get(ACTIVE_CALL_ID.get() or "", (None, None))
        self._asked[call_id] = (span, _count(span), inputs.get("messages") or [inputs.get("prompt")])

    def on_lm_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        """Record the call in the transcript, unless it is there already."""
        span, before, messages = self._asked.pop(call_id, (None, 0, None))
        if span is None or _count(span) != before:
            return
        call = LLMCall(messages)
        if exception is not None:
            call.fail(exception)
        else:
            listed = outputs if isinstance(outputs, list) else [outputs]
            texts = [one.get("text") if isinstance(one, dict) else getattr(one, "text", one) for one in listed]
            content = "\n".join(as_text(text) for text in texts if text is not None)
            call.finish(Completion(choices=(Choice(message=Message(content=content)),)))
        span.add(call)


def _count(group: Group | None) -> int:
    """Count the calls and operations in a part of a transcript."""
    held = () if group is None else group.items
    return sum(_count(one) if type(one) is Group else 1 for one in held)


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
"""DSPy's errors of lost calls -> ours, which are not feedback on the program."""


# ---- the agent


class DspyAgent(FrameworkAgent):
    """A DSPy program; `train` names the trained parts of each predictor, `output` the output field.

    Without `output` it is the whole prediction, which DSPy's metrics need. Raises ConfigError for an unknown part, and
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
        """Return an agent with the same options around another program."""
        return DspyAgent(program, self.train, self.output)

    @contextmanager
    def placed(self) -> Iterator[Any]:
        """Yield a copy of the program with the values of this context, or the program itself if it cannot be copied."""
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
        """Return the prediction; a reply that DSPy cannot parse is the agent's failure, and therefore feedback."""
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
    """Return a DSPy program as an agent, or None for another DSPy object."""
    require_version("dspy", "3.4", "3.6")
    return DspyAgent(thing, train, output) if isinstance(thing, dspy.Module) else None


@contextmanager
def _observed(program: Any) -> Iterator[None]:
    """Run a program in the block, without DSPy's caches, and with predictors and tools in the transcript."""
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
    """Return a model without a cache; it shares the connections of the given one."""
    return lm.copy(cache=False) if isinstance(lm, dspy.BaseLM) and lm.cache else lm


def _own_error(error: BaseException) -> BaseException:
    """Return the library's error behind a DSPy error, our error for a lost call, or the error itself."""
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
