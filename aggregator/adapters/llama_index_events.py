"""LlamaIndex's calls of models in our transcripts, from the events that its models send."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent

from aggregator.adapters.frameworks import Calls
from aggregator.agents.transcripts import Transcript, current_transcript
from aggregator.llm.models import as_completion
from aggregator.text import as_text


class _Shows(BaseEventHandler):
    """Shows the calls of each run whose transcript it knows."""

    _runs: WeakKeyDictionary[Transcript, Calls] = PrivateAttr(default_factory=WeakKeyDictionary)
    _latest: WeakKeyDictionary[Transcript, Any] = PrivateAttr(default_factory=WeakKeyDictionary)

    def watch(self, seen: Transcript) -> None:
        self._runs[seen] = Calls()

    def handle(self, event: Any, **_: Any) -> None:
        seen = current_transcript()
        calls = None if seen is None else self._runs.get(seen)
        if seen is None or calls is None:
            return
        if isinstance(event, LLMChatEndEvent) and event.response is not None:
            messages = [{"role": one.role.value, "content": one.content or ""} for one in event.messages]
            answer = event.response.message
            asked = answer.additional_kwargs.get("tool_calls") or ()
            told = (messages, answer.content or "\n".join(as_text(one) for one in asked))
        elif isinstance(event, LLMCompletionEndEvent):
            told = ([{"role": "user", "content": event.prompt}], event.response.text)
        else:
            return
        if told != self._latest.get(seen):  # a model whose async form calls the other one sends two events
            self._latest[seen] = told
            calls.write([(told[0], as_completion(told[1]))])


def watch_models() -> None:
    """Show the calls of models that this context makes in its transcript, if it has one."""
    seen = current_transcript()
    if seen is None:
        return
    root = get_dispatcher("root")
    handler = next((one for one in root.event_handlers if isinstance(one, _Shows)), None)
    if handler is None:
        handler = _Shows()
        root.add_event_handler(handler)
    handler.watch(seen)
