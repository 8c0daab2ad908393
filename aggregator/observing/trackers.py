"""Observers that send the values of a run to an experiment tracker: TensorBoard, Weights & Biases.

Numbers become curves, everything else text; unknown values are left out. A tracker's package is imported when the
observer is made. Each has Trace's `log` too, so it can be given as `logger=` or in `observers=[...]`.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from aggregator.errors import ConfigError
from aggregator.observing.observer import LoggingObserver
from aggregator.records import RunInfo


class TensorBoardLogger(LoggingObserver):
    """Writes what is logged as TensorBoard events into `log_dir`, through tensorboardX, which needs no torch.

    `writer` is an existing SummaryWriter instead, such as torch's. Close the logger, or use it in a `with` block, so
    that everything is on disk; an existing writer stays open.
    """

    def __init__(self, log_dir: str | Path | None = None, *, writer: Any = None) -> None:
        if (log_dir is None) == (writer is None):
            raise ConfigError(f"Expected a log_dir or a writer, got log_dir={log_dir!r} and writer={writer!r}")
        self._own = writer is None
        self.writer = _summary_writer(log_dir) if writer is None else writer

    def started(self, info: RunInfo, /) -> None:
        """Write what the run is about to do as the text "Run"."""
        super().started(info)
        self.log("Run", msgspec.to_builtins(info, enc_hook=repr), info.finished_steps)

    def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
        """Write one named value of one step."""
        key, value = entry(name, data, kwargs.get("sample"))
        if isinstance(value, float):
            self.writer.add_scalar(key, value, step)
        elif value is not None:
            self.writer.add_text(key, _as_markdown(value), step)

    def close(self) -> None:
        """Write what is left and close the file."""
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

    It does not finish that run: use `with wandb.init(project="router") as run:`.
    """

    def __init__(self, run: Any = None) -> None:
        self.run = _present_run() if run is None else run
        if not callable(getattr(self.run, "log", None)):
            raise ConfigError(f"Expected a run, as wandb.init(project=...) returns it, got {run!r}")

    def started(self, info: RunInfo, /) -> None:
        """Add what the run is about to do to the configuration of the W&B run."""
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


def _as_markdown(text: str) -> str:
    """Indent text as a code block: TensorBoard renders Markdown, and a prompt's lines should stay lines."""
    return "".join(f"    {line}\n" for line in text.splitlines())


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
