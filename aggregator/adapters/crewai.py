"""CrewAI's crews: role, goal and backstory of agents, description and expected output of tasks are parameters.

Each rollout runs on a copy of the crew, as CrewAI's own `kickoff_for_each` does; models and tools are shared. The
host's crew has the accepted texts afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from crewai import Agent, Crew, Task

from aggregator.adapters.frameworks import Calls, FrameworkAgent, HostParameter, require_version
from aggregator.agents.parameters import ParameterNode
from aggregator.agents.transcripts import recording
from aggregator.errors import ConfigError
from aggregator.executors.work import Ran
from aggregator.guides.calling import Call
from aggregator.llm.models import as_completion
from aggregator.records import RolloutTask
from aggregator.text import as_text, placeholders

OF_AGENTS = ("role", "goal", "backstory")
OF_TASKS = ("description", "expected_output")


def adapt(thing: Any) -> CrewAgent | None:
    """Return a crew as one of our agents, or None for another object of the package.

    Raises ConfigError for an agent or a task of a crew.
    """
    if isinstance(thing, Agent | Task):
        kind = type(thing).__name__
        raise ConfigError(f"Expected a Crew, got a CrewAI {kind}; give Crew(agents=[...], tasks=[...])")
    return CrewAgent(thing) if isinstance(thing, Crew) else None


class CrewAgent(FrameworkAgent):
    """A crew. Parameters are named after the agent's role and the task's name: `ticket_router.goal`.

    Raises ConfigError for an unsupported version, and two agents or two tasks with one name.
    """

    isolation = "copy"

    def __init__(self, program: Any) -> None:
        require_version("crewai", "1.10", "2")
        super().__init__(program, [parameter for _, parameter in _texts_of(program)])
        names = [placeholder.strip("{}") for one in self._parameters.values() for placeholder in placeholders(one.data)]
        self._inputs = list(dict.fromkeys(names))

    @contextmanager
    def placed(self) -> Iterator[Any]:
        """Yield a copy of the crew with the texts of this context."""
        crew = self.program.copy()
        for (owner, field), parameter in zip(_places_in(crew), self._parameters.values(), strict=True):
            _write(owner, field, parameter.data)
        yield crew

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return the crew's answer: the last task's object if it has one, otherwise the text.

        An input that is a mapping fills the texts' placeholders by name, any other value fills each of them.
        """
        x = task.sample.x
        inputs = dict(x) if isinstance(x, Mapping) else dict.fromkeys(self._inputs or ["input"], x)
        with self.placed() as crew:
            found = await crew.akickoff(inputs=inputs)
        calls = Calls()
        for one in found.tasks_output:
            with recording(one.agent, one.name or "task", [("description", one.description)]) as span:
                calls.write(_calls_of(one))
                span.finish(one.raw)
        return Ran(output=found.pydantic or found.json_dict or found.raw)


def _calls_of(output: Any) -> Iterator[tuple[list[dict[str, Any]], Any]]:
    """Yield each model call in a task's messages: the messages before an answer, and the answer."""
    messages = [{"role": one["role"], "content": as_text(one.get("content") or "")} for one in output.messages]
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            yield messages[:i], as_completion(message["content"])
    if messages and messages[-1]["role"] != "assistant":
        yield messages, as_completion(output.raw)


def _places_in(crew: Any) -> Iterator[tuple[Any, str]]:
    """Yield (agent or task, name of a text) in the same order for a crew and its copies."""
    agents = [*crew.agents, *([crew.manager_agent] if crew.manager_agent else [])]
    yield from ((agent, field) for agent in agents for field in OF_AGENTS)
    yield from ((task, field) for task in crew.tasks for field in OF_TASKS)


def _texts_of(crew: Any) -> list[tuple[str, ParameterNode[Any]]]:
    found: list[tuple[str, ParameterNode[Any]]] = []
    owners: dict[str, Any] = {}
    for owner, field in _places_in(crew):
        place = next((i for i, task in enumerate(crew.tasks) if task is owner), None)
        title = _read(owner, "role") if place is None else owner.name or f"task_{place + 1}"
        kind = "agent" if place is None else "task"
        slug = re.sub(r"\W+", "_", title.strip().lower()).strip("_")
        if owners.setdefault(slug, owner) is not owner:
            raise ConfigError(
                f"Expected agents of different roles and tasks of different names, got {title!r} twice; rename one"
            )
        name = f"{slug}.{field}"
        read, write = partial(_read, owner, field), partial(_write, owner, field)
        description = f"the {field.replace('_', ' ')} of the {kind} {title}"
        found.append((name, HostParameter(read, write, name=name, description=description)))
    return found


def _read(owner: Any, field: str) -> str:
    """Return a text before CrewAI filled in the inputs of a run."""
    return str(getattr(owner, f"_original_{field}") or getattr(owner, field))


def _write(owner: Any, field: str, text: str) -> None:
    setattr(owner, field, text)
    setattr(owner, f"_original_{field}", text)
