"""Code that training writes: checked before a run pays for it, and taken from a recording by the user's word only."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from aggregator.agents.bundles import Operation
from aggregator.agents.code import CodeParameter
from aggregator.agents.consent import require_consent, unsandboxed_code
from aggregator.agents.modules import operations_of
from aggregator.agents.sandboxing import check_sandboxed
from aggregator.cassettes.lineage import current_tape
from aggregator.errors import ConfigError
from aggregator.records import Values
from aggregator.sandbox.limits import current_place


def check_code(agent: Any, parameters: Sequence[Any]) -> None:
    """Check that every operation whose code will be trained can run in its sandbox; raises ConfigError.

    The error names what awaits, calls a model, changes `self`, or uses values that cannot cross to a sandbox. An
    operation with `sandbox=None` is not checked: it runs in this process.
    """
    sandboxed = [
        (operation, code, owner)
        for operation, code, owner in _trained(agent, parameters)
        if current_place(code.place).engine != "here"
    ]
    check_sandboxed((operation.title, code, owner) for operation, code, owner in sandboxed)
    engines = {current_place(code.place).engine for _, code, _ in sandboxed}
    if "monty" in engines:
        from aggregator.sandbox.monty import engine

        engine()
    if "process" in engines and not hasattr(os, "fork"):
        raise ConfigError(
            "Expected a system with fork for the sandbox of trained code, got none; set sandbox='monty' in @bundle "
            "(pip install 'aggregated-update[monty]'), or sandbox=None"
        )


def sandboxes_of(agent: Any, parameters: Sequence[Any]) -> dict[str, str]:
    """Return where the code of each trained operation runs, by parameter name: process, monty and its version, none."""
    words = {"here": "none", "process": "process"}
    found = {}
    for _, code, _ in _trained(agent, parameters):
        engine = current_place(code.place).engine
        if engine == "monty":
            from importlib.metadata import version

            words["monty"] = f"monty {version('pydantic-monty')}"
        found[code.name] = words[engine]
    return found


def engine_mark(agent: Any, parameters: Sequence[Any]) -> dict[str, str]:
    """Return what a run's checkpoint keeps of an interpreter other than this one: it may decide what code comes to."""
    named = [f"{name} in {engine}" for name, engine in sandboxes_of(agent, parameters).items() if "monty" in engine]
    return {"sandbox": ", ".join(named)} if named else {}


def _trained(agent: Any, parameters: Sequence[Any]) -> Iterator[tuple[Operation, CodeParameter, Any]]:
    """Yield (operation, its parameter, its instance or None) of the operations among the trained parameters."""
    trained = {id(getattr(parameter, "origin", parameter)) for parameter in parameters}
    for operation, owner in operations_of(agent):
        code = operation.code_of(owner)
        if code is not None and id(code) in trained:
            yield operation, code, owner


def permit_replayed_code(values: Values, parameters: Sequence[Any]) -> None:
    """Raise ConfigError if a cassette that holds a recording is open and does not permit code that would run here.

    A run's own journal permits it: what it plays was written by the same run.
    """
    tape = current_tape()
    if tape is None or not tape.holds_recording:
        return
    if found := unsandboxed_code([getattr(one, "origin", one) for one in parameters], values):
        require_consent(found, tape.rules.code, origin=f"the recording {tape.name}", permitted=tape.permitted_code)
