"""LlamaIndex: prompts of query engines, synthesizers and agents are parameters, at any depth.

Each rollout runs on copies of the modules that hold prompts, with the texts of its context; retrievers, indices and
models are shared. The host's own modules have the accepted texts afterwards.

LlamaIndex's own `update_prompts` changes the modules, and fails for keys of more than one level. Therefore each prompt
is read and written on its own module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import isawaitable
from typing import Any
from weakref import WeakKeyDictionary

from llama_index.core import Settings
from llama_index.core.agent.workflow import AgentWorkflow, ToolCallResult
from llama_index.core.agent.workflow.base_agent import DEFAULT_AGENT_DESCRIPTION, BaseWorkflowAgent
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate, RichPromptTemplate
from llama_index.core.prompts.base import SelectorPromptTemplate
from llama_index.core.prompts.mixin import PromptMixin
from llama_index.core.prompts.utils import get_template_vars

from aggregator.adapters.frameworks import Calls, FrameworkAgent, HostParameter, require_version
from aggregator.agents.parameters import ParameterNode
from aggregator.agents.transcripts import Transcript, current_transcript, recording
from aggregator.errors import ConfigError
from aggregator.executors.work import Ran
from aggregator.guides.calling import Call
from aggregator.llm.models import as_completion
from aggregator.records import RolloutTask
from aggregator.text import as_text, list_names

# ---- prompts in a tree of modules

_FIELDS = ("system_prompt", "description")  # texts of an agent that are not prompts


def parameters_of(program: Any) -> list[ParameterNode[Any]]:
    """Return the texts of a module and those below it, named by their path: `response_synthesizer.text_qa_template`.

    A chat prompt has a text for each message: `text_qa_template.system`. For a prompt that depends on the model
    (SelectorPromptTemplate) it is the module's model's.
    """
    found: list[ParameterNode[Any]] = []
    for path, module in modules_of(program):
        for name in _fields_of(module, is_alone=module is program):
            read, write = partial(getattr, module, name), partial(setattr, module, name)
            found.append(HostParameter(read, write, name=f"{path}{name}", description=f"the {name} of the agent"))
        for key in module._get_prompts():
            for slot in _slots(_prompt(module, key)):
                read, write = partial(_read, module, key, slot), partial(_write, module, key, slot)
                name = f"{path}{key}{slot and '.'}{slot}"
                found.append(HostParameter(read, write, name=name, description=_description(module, key)))
    return found


def modules_of(program: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, module) of a module and those below it, depth first."""
    yield path, program
    for name, module in _children_of(program).items():
        yield from modules_of(module, f"{path}{name}.")


def copy_modules(program: Any, values: Mapping[str, Any], path: str = "") -> Any:
    """Return a copy of the modules with prompts, with these texts by name; everything else is shared."""
    children = _children_of(program)
    copied = {id(child): copy_modules(child, values, f"{path}{name}.") for name, child in children.items()}
    clone = copy.copy(program)
    for name, value in list(vars(clone).items()):
        object.__setattr__(clone, name, _with_copies(value, copied))
    formatter = getattr(clone, "formatter", None)
    if formatter is not None:  # ReActAgent keeps its prompt there
        clone.formatter = copy.copy(formatter)
    for name in _FIELDS:
        if f"{path}{name}" in values:
            setattr(clone, name, values[f"{path}{name}"])
    for key in clone._get_prompts():
        for slot in _slots(_prompt(clone, key)):
            name = f"{path}{key}{slot and '.'}{slot}"
            if name in values and values[name] != _read(clone, key, slot):
                _write(clone, key, slot, values[name])
    return clone


def _children_of(module: Any) -> dict[str, Any]:
    return {name: child for name, child in module._get_prompt_modules().items() if child is not None}


def _with_copies(value: Any, copied: Mapping[int, Any]) -> Any:
    if id(value) in copied:
        return copied[id(value)]
    if isinstance(value, dict) and any(id(one) in copied for one in value.values()):
        return {key: copied.get(id(one), one) for key, one in value.items()}
    if isinstance(value, list | tuple) and any(id(one) in copied for one in value):
        return type(value)([copied.get(id(one), one) for one in value])
    return value


def _fields_of(module: Any, *, is_alone: bool) -> list[str]:
    if not isinstance(module, BaseWorkflowAgent):
        return []
    is_described = not is_alone and module.description not in ("", DEFAULT_AGENT_DESCRIPTION)
    return [name for name in _FIELDS if (is_described if name == "description" else module.system_prompt)]


def _prompt(module: Any, key: str) -> Any:
    """Return the prompt in use: of one that depends on the model, the variant for this module's."""
    prompt = module._get_prompts()[key]
    if isinstance(prompt, SelectorPromptTemplate):
        llm = getattr(module, "_llm", None) or getattr(module, "llm", None) or Settings._llm
        prompt = prompt.select(llm) if llm is not None else prompt.default_template
    return prompt


def _slots(prompt: Any) -> list[str]:
    """Return the names of a prompt's texts: "" for a single text, the roles for a chat."""
    if isinstance(prompt, ChatPromptTemplate):
        roles = [message.role.value for message in prompt.message_templates]
        names = [f"{role}_{roles[:i].count(role) + 1}" if role in roles[:i] else role for i, role in enumerate(roles)]
        return [name for name, one in zip(names, prompt.message_templates, strict=True) if one.content]
    return [""] if isinstance(prompt, PromptTemplate | RichPromptTemplate) else []


def _place(prompt: Any, slot: str) -> int:
    role, _, number = slot.partition("_")
    places = [i for i, message in enumerate(prompt.message_templates) if message.role.value == role]
    return places[int(number or 1) - 1]


def _read(module: Any, key: str, slot: str) -> str:
    prompt = _prompt(module, key)
    if slot:
        return str(prompt.message_templates[_place(prompt, slot)].content)
    return str(prompt.template if isinstance(prompt, PromptTemplate) else prompt.template_str)


def _write(module: Any, key: str, slot: str, text: str) -> None:
    prompt = _prompt(module, key).model_copy()
    if slot:
        place = _place(prompt, slot)
        messages = list(prompt.message_templates)
        messages[place] = messages[place].model_copy(update={"blocks": []})
        messages[place].content = text
        prompt.message_templates = messages
        prompt.template_vars = [name for message in messages for name in message.get_template_vars()]
    elif isinstance(prompt, PromptTemplate):
        prompt.template, prompt.template_vars = text, get_template_vars(text)
    else:
        prompt = type(prompt)(text, **{name: getattr(prompt, name) for name in ("metadata", "output_parser")})
    module._update_prompts({key: prompt})


def _description(module: Any, key: str) -> str:
    owner = module.name if isinstance(module, BaseWorkflowAgent) else type(module).__name__
    if isinstance(module, AgentWorkflow):
        owner = f"the agents {list_names(list(module.agents))}"
    return f"the prompt {key} of {owner}"


_NO_LIMIT = 10**9


# ---- the agent


def adapt(
    thing: Any, *, train: Collection[str] | None = None, run: Callable[[Any, Any], Any] | None = None
) -> LlamaAgent | None:
    """Return a LlamaIndex query engine or agent as one of ours; None for another object.

    `train` names the parameters to train, by default all. `run(program, x)`, sync or async, runs any other object, or
    replaces the default call.
    """
    return LlamaAgent(thing, train=train, run=run) if isinstance(thing, PromptMixin) else None


class LlamaAgent(FrameworkAgent):
    """A LlamaIndex module with all modules below it.

    Raises ConfigError for an unsupported version, a module without a text, an unknown name in `train`, and a module
    that needs `run=`.
    """

    isolation = "copy"

    def __init__(
        self,
        program: Any,
        *,
        train: Collection[str] | None = None,
        run: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        require_version("llama-index-core", "0.14.15", "0.16")
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
        """Return an agent with the same options around another program."""
        return LlamaAgent(program, train=self.train, run=self._given_run)

    @contextmanager
    def placed(self) -> Iterator[Any]:
        """Yield a copy of the modules with the texts of this context."""
        yield copy_modules(self.program, {name: one.data for name, one in self._parameters.items()})

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return the answer; tools and, if no client is observed, model calls are shown in the transcript."""
        _watch_models()
        with self.placed() as program:
            found = self._run(program, task.sample.x)
            found = await found if isawaitable(found) else found
            if isinstance(found, AsyncStreamingResponse):  # read here: what it still asks belongs to the agent
                found = await found.get_response()
            return Ran(output=_plain(found))


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
    """Shows the calls of each run with a known transcript."""

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
            call = (messages, answer.content or "\n".join(as_text(one) for one in asked))
        elif isinstance(event, LLMCompletionEndEvent):
            call = ([{"role": "user", "content": event.prompt}], event.response.text)
        else:
            return
        if call != self._latest.get(seen):  # a model whose async form calls the sync one sends two events
            self._latest[seen] = call
            calls.write([(call[0], as_completion(call[1]))])


def _watch_models() -> None:
    """Show this context's model calls in its transcript, if it has one."""
    seen = current_transcript()
    if seen is None:
        return
    root = get_dispatcher("root")
    handler = next((one for one in root.event_handlers if isinstance(one, _Shows)), None)
    if handler is None:
        handler = _Shows()
        root.add_event_handler(handler)
    handler.watch(seen)
