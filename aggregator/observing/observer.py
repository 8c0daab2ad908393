"""The Observer: one method per event of a run, conversions to one, and ready-made observers.

    started       once, before the first call: the description of the run
    rollout       after each rollout of the run, including evaluations, in order of completion
    evaluation    after each evaluation of the test set; the first is the baseline before training
    step          after each step, once it is saved: the full report
    finished      once, with the result of a completed run, or
    failed        once, with the error that ends the run

Everything but `rollout` arrives in the order of the run. Methods may be sync or async; they run on the event loop of
the run, one observer after the other, so a slow one delays the run. An observer that raises ends the run: `train`
raises its error with a note that names the observer, and every finished step is kept.

`ConsoleLogger` and `ProgressBar` are for terminals and notebooks, `TensorBoardLogger` and `WandbLogger` for experiment
trackers: numbers become curves, everything else text; unknown values are left out. A tracker's package is imported when
the observer is created. Each has Trace's `log` too, so it can be `logger=` or in `observers=[...]`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from inspect import isawaitable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

import msgspec
from tqdm import tqdm

from aggregator.checks import accepts, check_count
from aggregator.errors import ConfigError
from aggregator.llm.ledger import total, total_by_role
from aggregator.protocols import Logger
from aggregator.records import Evaluation, Failure, FullStepReport, Rollout, RunInfo, StepReport, TrainingResult, Usage
from aggregator.text import readable, shorten

Event = Literal["started", "rollout", "evaluation", "validation", "step", "finished", "failed"]
EVENTS: tuple[Event, ...] = ("started", "rollout", "evaluation", "validation", "step", "finished", "failed")

_ACCEPTED = (
    f"a callable that takes a StepReport, an Observer, or an object with some of its methods ({', '.join(EVENTS)})"
)


class Observer:
    """Watches a run. Every method does nothing: override those that you need, sync or async."""

    def started(self, info: RunInfo, /) -> Awaitable[None] | None:
        """Called with the description of the run, before its first call."""

    def rollout(self, rollout: Rollout, /) -> Awaitable[None] | None:
        """Called with each rollout as soon as it ends."""

    def evaluation(self, evaluation: Evaluation, /) -> Awaitable[None] | None:
        """Called with the scores of the test set; `evaluation.step` is 0 for the baseline before training."""

    def validation(self, evaluation: Evaluation, /) -> Awaitable[None] | None:
        """Called with the scores of the validation set, which choose the best values; 0 is the step of the baseline."""

    def step(self, report: FullStepReport, /) -> Awaitable[None] | None:
        """Called with a step's report, including its rollouts and proposals."""

    def finished(self, result: TrainingResult, /) -> Awaitable[None] | None:
        """Called with the result of the run."""

    def failed(self, error: BaseException, /) -> Awaitable[None] | None:
        """Called with the error that ends the run; a TrainingError or BudgetExceededError has the partial `result`."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


Watching = Observer | Callable[[FullStepReport], Any] | Logger
"""What a trainer accepts as an observer; `as_observer` also accepts an object with some of an observer's methods."""


def as_observer(thing: Any) -> Observer:
    """Return an observer for a callable, a logger, or an object with some of its methods.

    A callable gets the report of each step. An object with some of the methods of Observer gets these events. An object
    with Trace's `log(name, data, step, **kwargs)` gets named values (see `from_logger`). Methods may be sync or async.
    Raises ConfigError for anything else, including a class instead of an instance.

    >>> as_observer(print)
    as_observer(print)
    """
    if isinstance(thing, Observer):
        return thing
    name = getattr(thing, "__qualname__", None) or repr(thing)
    if isinstance(thing, type):
        raise ConfigError(f"Expected {_ACCEPTED}, got the class {name}; give an instance, as in {name}(...)")
    methods: dict[str, Any] = {
        event: getattr(thing, event) for event in EVENTS if callable(getattr(thing, event, None))
    }
    if not methods and callable(thing):
        methods = {"step": thing}
    if not methods and hasattr(thing, "log"):
        return from_logger(thing)
    if not methods:
        raise ConfigError(f"Expected {_ACCEPTED}, got {shorten(thing)}")
    for event, method in methods.items():
        if not accepts(method, None):
            place = "it" if method is thing else f"its {event}()"
            raise ConfigError(f"Expected {_ACCEPTED}, got {name}; {place} must take one argument, the record")
    return _Partial(name, methods)


def as_observers(things: Any) -> list[Observer]:
    """Return an observer for each item; raises ConfigError for items that `as_observer` refuses, and without a list."""
    if not isinstance(things, Sequence) or isinstance(things, str):
        raise ConfigError(f"Expected observers=[...], each {_ACCEPTED}, got {shorten(things)}")
    try:
        return [as_observer(thing) for thing in things]
    except ConfigError as error:
        raise ConfigError(f"Expected observers=[...], each {str(error).removeprefix('Expected ')}") from None


class _Partial(Observer):
    """An observer with the methods of another object; the others do nothing."""

    def __init__(self, name: str, methods: Mapping[str, Callable[[Any], Any]]) -> None:
        self._name = name
        vars(self).update(methods)

    def __repr__(self) -> str:
        return f"as_observer({self._name})"


class LoggingObserver(Observer):
    """Logs named values of each step, in Trace's shape: the base class of this package's loggers.

    Step 0 is the first. The names: "Average test score before training" and "Average validation score before training",
    "Average train score", "Average test score", "Average validation score", "Parameter: <name>" for each accepted
    change, "Update refused" or "No update" with the reason, "Failures" with their count and "First failure", and "Calls
    so far", "Tokens so far" and "USD so far". An unknown train score is logged as None, other unknown values are left
    out. Only every `frequency`-th step is logged; 0 logs nothing.
    """

    frequency: int = 1
    _spent: Mapping[str, Usage] = {}

    def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
        """Log one named value of one step; `color` in `kwargs` is a hint for terminals."""
        raise NotImplementedError

    def started(self, info: RunInfo, /) -> Awaitable[None] | None:
        """Start the sums with a resumed run's previous usage."""
        self._spent = info.usage
        return None

    def evaluation(self, evaluation: Evaluation, /) -> None:
        """Log the baseline; later scores of the test set are logged with their step."""
        self._log_baseline("test", evaluation)

    def validation(self, evaluation: Evaluation, /) -> None:
        """Log the baseline in the same way."""
        self._log_baseline("validation", evaluation)

    def _log_baseline(self, name: str, evaluation: Evaluation) -> None:
        self._spent = total_by_role((self._spent, evaluation.usage))
        if self.frequency and evaluation.step == 0:
            if evaluation.score is not None:
                self.log(f"Average {name} score before training", evaluation.score, 0, color="green")
            self._log_failures(evaluation.failures, 0)

    def step(self, report: FullStepReport, /) -> None:
        """Log the values of a step, if it is due."""
        self._spent = total_by_role((self._spent, report.usage))
        if not self.frequency or (report.step + 1) % self.frequency:
            return
        self.log("Average train score", report.score, report.step, color="green")
        if report.test_score is not None:
            self.log("Average test score", report.test_score, report.step, color="green")
        if report.validation_score is not None:
            self.log("Average validation score", report.validation_score, report.step, color="green")
        if report.decision.accepted:
            for name, value in report.update.items():
                self.log(f"Parameter: {name}", value, report.step, color="red")
        else:
            verdict = "Update refused" if report.update else "No update"
            self.log(verdict, report.decision.reason, report.step, color="yellow")
        self._log_failures(report.failures, report.step)
        spent = total(self._spent.values())
        self.log("Calls so far", spent.calls, report.step)
        if spent.total_tokens:
            self.log("Tokens so far", spent.total_tokens, report.step)
        if spent.cost is not None:
            self.log("USD so far", spent.cost, report.step)

    def _log_failures(self, failures: Sequence[Failure], step: int) -> None:
        if failures:
            first = failures[0]
            place = first.stage if first.sample_id is None else f"{first.stage}, sample {first.sample_id}"
            self.log("Failures", len(failures), step, color="red")
            self.log("First failure", f"{place}: {first.error}: {first.message}", step, color="red")


class _FromLogger(LoggingObserver):
    """Passes the values to a logger. One that is an observer too gets the beginning and the end of the run itself."""

    def __init__(self, logger: Logger, frequency: int) -> None:
        self._logger = logger
        self.frequency = frequency

    def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
        self._logger.log(name, data, step, **kwargs)

    def started(self, info: RunInfo, /) -> Awaitable[None] | None:
        super().started(info)
        return self._logger.started(info) if isinstance(self._logger, Observer) else None

    def finished(self, result: TrainingResult, /) -> Awaitable[None] | None:
        return self._logger.finished(result) if isinstance(self._logger, Observer) else None

    def failed(self, error: BaseException, /) -> Awaitable[None] | None:
        return self._logger.failed(error) if isinstance(self._logger, Observer) else None

    def __repr__(self) -> str:
        return f"from_logger({self._logger!r}, frequency={self.frequency})"


def from_logger(logger: Logger, frequency: int = 1) -> Observer:
    """Return an observer that passes named values to a logger with Trace's `log(name, data, step, **kwargs)`.

    `frequency` is the number of steps between logs; 0 logs nothing. The names of the values are in `LoggingObserver`.
    Raises ConfigError if the logger has no such method.
    """
    if isinstance(logger, type) or not accepts(getattr(logger, "log", None), "score", 0.5, 0, color="green"):
        raise ConfigError(f"Expected a logger that has log(name, data, step, **kwargs), got {logger!r}")
    check_count("log_frequency", frequency, meaning="0 logs nothing")
    return _FromLogger(logger, frequency)


async def notify(observers: Sequence[Observer], event: Event, record: Any) -> None:
    """Call one method of each observer, in order. An error gets a note that names the observer, and is raised."""
    for observer in observers:
        try:
            answer = getattr(observer, event)(record)
            if isawaitable(answer):
                await answer
        except Exception as error:
            error.add_note(f"raised in {event}() of the observer {observer!r}")
            raise


async def notify_failed(observers: Sequence[Observer], error: BaseException) -> None:
    """Call `failed` of each observer with the error that ends the run.

    An observer's own exception is added as a note.
    """
    for observer in observers:
        try:
            await notify([observer], "failed", error)
        except Exception as another:  # noqa: BLE001 - the error that ends the run is the one to raise
            error.add_note("\n".join((f"{type(another).__name__}: {another}", *another.__notes__)))


# ---- experiment trackers


class TensorBoardLogger(LoggingObserver):
    """Writes the logged values as TensorBoard events to `log_dir`, by tensorboardX, which needs no torch.

    `writer` is an existing SummaryWriter instead, such as torch's. Close the logger, or use it in a `with` block, so
    that everything is on disk; an existing writer stays open.
    """

    def __init__(self, log_dir: str | Path | None = None, *, writer: Any = None) -> None:
        if (log_dir is None) == (writer is None):
            raise ConfigError(f"Expected a log_dir or a writer, got log_dir={log_dir!r} and writer={writer!r}")
        self._own = writer is None
        self.writer = _summary_writer(log_dir) if writer is None else writer

    def started(self, info: RunInfo, /) -> None:
        """Write the description of the run as the text "Run"."""
        super().started(info)
        self.log("Run", msgspec.to_builtins(info, enc_hook=repr), info.finished_steps)

    def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
        """Write one named value of one step."""
        key, value = entry(name, data, kwargs.get("sample"))
        if isinstance(value, float):
            self.writer.add_scalar(key, value, step)
        elif value is not None:
            block = "".join(f"    {line}\n" for line in value.splitlines())  # it renders Markdown; lines stay lines
            self.writer.add_text(key, block, step)

    def close(self) -> None:
        """Write the buffer and close the file."""
        if self._own:
            self.writer.close()
        else:
            self.writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class WandbLogger(LoggingObserver):
    """Logs to a run of Weights & Biases: one that `wandb.init(...)` returned, by default the current or a new one.

    It does not finish the W&B run: use `with wandb.init(project="router") as run:`.
    """

    def __init__(self, run: Any = None) -> None:
        self.run = _present_run() if run is None else run
        if not callable(getattr(self.run, "log", None)):
            raise ConfigError(f"Expected a run, as wandb.init(project=...) returns it, got {run!r}")

    def started(self, info: RunInfo, /) -> None:
        """Add the description of the run to the W&B run's configuration."""
        super().started(info)
        config = getattr(self.run, "config", None)
        if config is not None:
            config.update(msgspec.to_builtins(info, enc_hook=repr), allow_val_change=True)

    def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
        """Log one named value of one step."""
        key, value = entry(name, data, kwargs.get("sample"))
        if value is not None:
            self.run.log({key: value}, step=step)


def entry(name: str, data: Any, sample: int | None = None) -> tuple[str, float | str | None]:
    """Return a tracker's key for a name, and the value as a number or text; None for an unknown value.

    >>> entry("Average test score", 1), entry("Parameter: rule", ["a"]), entry("Output", None, sample=3)
    (('Average_test_score', 1.0), ('Parameter/rule', '["a"]'), ('Output/sample_3', None))
    """
    key = name.replace(": ", "/").replace(" ", "_") + ("" if sample is None else f"/sample_{sample}")
    if data is None or isinstance(data, str):
        return key, data
    if isinstance(data, bool | int | float):
        try:
            return key, float(data)
        except OverflowError:
            return key, str(data)
    return key, msgspec.json.encode(data, enc_hook=repr, order="deterministic").decode()


def _summary_writer(log_dir: Any) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"Expected tensorboardX for TensorBoardLogger, got {error}; pip install 'aggregated-update[tensorboard]'"
        ) from error
    return SummaryWriter(str(log_dir))


def _present_run() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"Expected wandb for WandbLogger, got {error}; pip install 'aggregated-update[wandb]'"
        ) from error
    return wandb.run or wandb.init()


# ---- terminals and notebooks

_COLORS = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36, "white": 37}


class ConsoleLogger(LoggingObserver):
    """Writes `[step 3] name: value` to a stream, standard output by default.

    It is an observer and has Trace's `log`, so `observers=[ConsoleLogger()]` and `logger=ConsoleLogger()` both work.
    `color` colors a line if the stream supports it.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
        """Write one named value of one step; `color` is red, green, yellow, blue, magenta, cyan or white."""
        stream = self._stream or sys.stdout
        line = f"[step {step}] {name}: {readable(data)}"
        stream.write(painted(line, kwargs.get("color"), stream) + "\n")


def painted(text: str, color: str | None, stream: TextIO) -> str:
    """Return the text in a color if the stream supports colors, otherwise unchanged."""
    code = _COLORS.get(color or "")
    return f"\x1b[{code}m{text}\x1b[0m" if code and shows_colors(stream) else text


def shows_colors(stream: TextIO) -> bool:
    """Return True for a terminal that is not dumb. FORCE_COLOR and NO_COLOR (no-color.org) decide first."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


_FORMAT = "{desc}: {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}]"
"""The time comes last: a narrow terminal cuts it off there."""


class ProgressBar(Observer):
    """Shows epoch, step, score and calls, one tick per step. The calls include those of evaluations.

    In a terminal or a notebook it is one line that redraws itself, elsewhere one plain line per step. `stream` is
    standard error by default, `name` its first word.
    """

    def __init__(self, *, stream: TextIO | None = None, name: str = "train") -> None:
        self._stream = stream or sys.stderr
        self._name = name
        self._steps = 0
        self._done = 0
        self._calls = 0
        self._bar: tqdm[Any] | None = None

    def started(self, info: RunInfo, /) -> None:
        """Draw the empty bar. A resumed run's bar starts at its finished steps."""
        self.close()
        self._steps, self._done = info.steps, info.finished_steps
        self._calls = total(info.usage.values()).calls
        if redraws(self._stream):
            self._bar = tqdm(
                total=self._steps,
                initial=self._done,
                desc=self._name,
                file=self._stream,
                bar_format=_FORMAT,
                dynamic_ncols=True,
            )

    def evaluation(self, evaluation: Evaluation, /) -> None:
        """Count the evaluation's calls."""
        self._calls += total(evaluation.usage.values()).calls

    validation = evaluation

    def step(self, report: StepReport, /) -> None:
        """Advance by one step."""
        self._done += 1
        self._calls += total(report.usage.values()).calls
        test = "" if report.test_score is None else f"  test {readable(report.test_score)}"
        facts = f"epoch {report.epoch + 1}  score {readable(report.score)}{test}  calls {self._calls}"
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update()
            return
        steps = f"/{self._steps}" if self._steps else ""
        self._stream.write(f"{self._name} step {self._done}{steps}  {facts}\n")
        self._stream.flush()

    def finished(self, result: TrainingResult, /) -> None:
        """End the bar's line."""
        self.close()

    def failed(self, error: BaseException, /) -> None:
        """End the bar's line, so that the next output begins on a new line."""
        self.close()

    def close(self) -> None:
        """End the bar's line, if there is one."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()


def redraws(stream: TextIO | None) -> bool:
    """Return True if a line on this stream can be redrawn: in a terminal, or as the output of a notebook's cell."""
    return stream is not None and (stream.isatty() or type(stream).__module__.partition(".")[0] == "ipykernel")
