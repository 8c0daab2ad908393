"""What a DSPy program does, as a transcript: a callback of DSPy's that opens a span for each predictor and tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback
from dspy.utils.callback_context import ACTIVE_CALL_ID

from aggregator.agents.transcripts import Group, LLMCall, Span, recording
from aggregator.records import Choice, Completion, Message
from aggregator.text import as_text


class Steps(BaseCallback):
    """Writes predictors and tools into the transcript: what each was given and what came of it.

    A call to a model is written by the client that makes it, or by the library's watch over other clients
    (`clients=`); here only if neither did, as with a model that makes no requests.
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
        """Remember what the predictor's span holds before a call."""
        _, span = self._open.get(ACTIVE_CALL_ID.get() or "", (None, None))
        self._asked[call_id] = (span, _count(span), inputs.get("messages") or [inputs.get("prompt")])

    def on_lm_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        """Write the call into the transcript, unless it is there."""
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
    """Count the calls and operations that a part of a transcript holds."""
    held = () if group is None else group.items
    return sum(_count(one) if type(one) is Group else 1 for one in held)
