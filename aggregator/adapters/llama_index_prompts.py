"""The prompts in a tree of LlamaIndex's modules: their texts as parameters, and copies of the modules with others.

LlamaIndex's own `update_prompts` changes the modules, and takes no key of more than one level. So each prompt is read
and written on the module that holds it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from llama_index.core import Settings
from llama_index.core.agent.workflow import AgentWorkflow
from llama_index.core.agent.workflow.base_agent import DEFAULT_AGENT_DESCRIPTION, BaseWorkflowAgent
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate, RichPromptTemplate
from llama_index.core.prompts.base import SelectorPromptTemplate
from llama_index.core.prompts.utils import get_template_vars

from aggregator.adapters.frameworks import HostParameter
from aggregator.agents.parameters import ParameterNode
from aggregator.text import list_names

_FIELDS = ("system_prompt", "description")  # texts of an agent that are no prompts


def parameters_of(program: Any) -> list[ParameterNode[Any]]:
    """Return the texts of a module and those below it, named by their place: `response_synthesizer.text_qa_template`.

    A chat prompt has a text for each message: `text_qa_template.system`. Of a prompt that depends on the model
    (SelectorPromptTemplate), it is the one for the module's model.
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
    """Return a copy of the modules that hold prompts, with these texts by name; all else is shared."""
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
    """Return the prompt that is used: of one that depends on the model, the one for this module's."""
    prompt = module._get_prompts()[key]
    if isinstance(prompt, SelectorPromptTemplate):
        llm = getattr(module, "_llm", None) or getattr(module, "llm", None) or Settings._llm
        prompt = prompt.select(llm) if llm is not None else prompt.default_template
    return prompt


def _slots(prompt: Any) -> list[str]:
    """Return the names of a prompt's texts: "" if it is one text, the roles of a chat's messages of text."""
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
