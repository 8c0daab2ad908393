"""LlamaIndex: prompts of query engines, synthesizers and agents are parameters, at any depth.

Each rollout runs on copies of the modules that hold prompts, with the texts of its context; retrievers, indices and
models are shared. The host's own modules have the accepted texts afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from inspect import isawaitable
from typing import Any
from weakref import WeakKeyDictionary

from llama_index.core.agent.workflow import AgentWorkflow, ToolCallResult
from llama_index.core.agent.workflow.base_agent import BaseWorkflowAgent
from llama_index.core.base.response.schema import Response, StreamingResponse
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts.mixin import PromptMixin

from aggregator.adapters.frameworks import Calls, FrameworkAgent, require_version
from aggregator.adapters.llama_index_prompts import copy_modules, parameters_of
from aggregator.agents.transcripts import Transcript, current_transcript, recording
from aggregator.errors import ConfigError
from aggregator.executors.work import Ran
from aggregator.guides.calling import Call
from aggregator.llm.models import as_completion
from aggregator.records import RolloutTask
from aggregator.text import as_text

_NO_LIMIT = 10**9


def adapt(
    thing: Any, *, train: Collection[str] | None = None, run: Callable[[Any, Any], Any] | None = None
) -> LlamaAgent | None:
    """Return a query engine or an agent of LlamaIndex's as one of ours; None for another object.

    `train` names the parameters to be trained, by default all. `run(program, x)`, sync or async, runs an object that
    is none of these, or runs it in another way.
    """
    return LlamaAgent(thing, train=train, run=run) if isinstance(thing, PromptMixin) else None


class LlamaAgent(FrameworkAgent):
    """A module of LlamaIndex's with all modules below it.

    Raises ConfigError for an unsupported version, a module without a text, an unknown name in `train`, and a module
    that cannot be run without `run=`.
    """

    isolation = "copy"

    def __init__(
        self,
        program: Any,
        *,
        train: Collection[str] | None = None,
        run: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        require_version("llama-index-core", "0.13", "0.16")
        self.train = None if train is None else list(train)
        self._run = _way_of(program) if run is None else run
        self._given_run = run
        parameters = parameters_of(program)
        known = [one.name for one in parameters]
        if unknown := [name for name in self.train or () if name not in known]:
            raise ConfigError(f"Expected train= to name parameters of {', '.join(known)}, got {', '.join(unknown)}")
        for one in parameters:
            one.trainable = self.train is None or one.name in self.train
        super().__init__(program, parameters)

    def like(self, program: Any) -> LlamaAgent:
        """Return an agent with this one's options around another program."""
        return LlamaAgent(program, train=self.train, run=self._given_run)

    @contextmanager
    def placed(self) -> Iterator[Any]:
        """Hand out a copy of the modules with the texts of this context."""
        yield copy_modules(self.program, {name: one.data for name, one in self._parameters.items()})

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return the answer; tools and, if no client is watched, calls of models are shown in the transcript."""
        _watch_models()
        with self.placed() as program:
            found = self._run(program, task.sample.x)
            return Ran(output=_plain(await found if isawaitable(found) else found))


def _way_of(program: Any) -> Callable[[Any, Any], Any]:
    if isinstance(program, BaseWorkflowAgent | AgentWorkflow):
        return _run_workflow
    if hasattr(program, "aquery"):
        return lambda engine, x: engine.aquery(as_text(x))
    raise ConfigError(
        f"Expected a query engine or an agent, got {type(program).__name__}; give run=, as in "
        "trainable(program, run=lambda program, x: program.asynthesize(x, nodes=[]))"
    )


async def _run_workflow(agent: Any, x: Any) -> Any:
    # The default memory opens a database for each run, and never closes it.
    memory = ChatMemoryBuffer.from_defaults(token_limit=_NO_LIMIT, tokenizer_fn=str.split)
    handler = agent.run(user_msg=as_text(x), memory=memory)
    async for event in handler.stream_events():
        if isinstance(event, ToolCallResult):
            with recording(event.tool_name, "tool", list(event.tool_kwargs.items())) as span:
                span.finish(event.tool_output.content)
    return await handler


def _plain(found: Any) -> Any:
    """Return the text or the structured object of an answer."""
    if isinstance(found, StreamingResponse):
        return str(found.get_response())
    if isinstance(found, Response):
        return found.response
    structured = getattr(found, "structured_response", None)
    if structured is not None:
        return structured
    response = getattr(found, "response", found)
    return getattr(response, "content", response)


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


def _watch_models() -> None:
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
