"""A trainer's parts, checked at construction before the first call is paid for; their results are checked too.

This includes code that training writes: it must be able to run in its sandbox, and a recording needs permission.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Awaitable, Container, Mapping, Sequence
from inspect import Parameter, isawaitable, signature
from typing import Any

import msgspec
from msgspec.structs import replace

from aggregator.agents.code import CodeParameter, require_consent, unsandboxed_code
from aggregator.agents.modules import operations_of
from aggregator.agents.parameters import ParameterNode
from aggregator.agents.sandbox import check_sandboxed
from aggregator.cassettes.clients import families
from aggregator.cassettes.lineage import current_tape
from aggregator.checks import accepts, is_async
from aggregator.errors import ConfigError, SandboxWarning
from aggregator.llm.budget import Budget
from aggregator.observing.observer import as_observers, from_logger
from aggregator.records import Candidate, Decision, Proposal, Rollout, Sample, Values
from aggregator.sandbox.limits import current_place, place_here
from aggregator.text import shorten
from aggregator.training.asking import convert_suggestion
from aggregator.training.prompts import join_rollouts
from aggregator.training.step import Gate, Optimizer, Search, Step, UpdateRule

_METHODS_OF_SEARCH = ("explore", "trials", "choose", "keep")
_OF_OLD = ("batch", "samples", "minibatch")
"""Names of a gate's third argument that mean the minibatch, as before the step was an argument."""


# ---- checking parts


def check_rule(rule: Any) -> None:
    """Raise ConfigError for anything that cannot be called as a rule, such as `top_k` without its number."""
    if not accepts(rule, (), None) or (not is_async(rule) and _takes_any_number(rule)):
        raise ConfigError(
            f"Expected a rule, async (proposals, step) -> proposals, such as top_k(8), got {shorten(rule)}; "
            "step.values are the current values, step.stepsize is the stepsize"
        )


def check_gate(gate: Any) -> None:
    """Raise ConfigError for anything that cannot be called as a gate, such as `improves_on_batch` without its ()."""
    if not accepts(gate, {}, {}, None) or _argument(gate, 2) in _OF_OLD:
        raise ConfigError(
            f"Expected a gate, async (before, after, step) -> Decision, such as improves_on_batch(), got "
            f"{shorten(gate)}; step.samples is the minibatch"
        )


def _takes_any_number(function: Any) -> bool:
    """Return True for a function of `*arguments`, such as `chain` without its rules."""
    try:
        arguments = signature(function).parameters.values()
    except ValueError:  # written in C without a signature
        return False
    return any(one.kind is Parameter.VAR_POSITIONAL for one in arguments)


def _argument(function: Any, position: int) -> str:
    """Return the name of an argument, or ""."""
    try:
        return [*signature(function).parameters, "", "", ""][position]
    except (TypeError, ValueError):  # written in C without a signature
        return ""


def check_optimizer(optimizer: Any) -> None:
    """Raise ConfigError for anything that cannot propose; the agent would run on every instance for nothing."""
    propose = getattr(optimizer, "propose", None)
    if isinstance(optimizer, type) or not accepts(propose, (), None) or _argument(propose, 1) == "parameters":
        raise ConfigError(
            "Expected an optimizer such as LLMOptimizer(llm=llm), or one with async propose(rollouts, step), "
            f"got {shorten(optimizer)}"
        )


def check_search(search: Any) -> None:
    """Raise ConfigError for a search without one of its methods, or without a number of proposals."""
    count = getattr(search, "proposals", None)
    missing = [name for name in _METHODS_OF_SEARCH if not callable(getattr(search, name, None))]
    if isinstance(search, type) or missing or type(count) is not int or count < 1:
        raise ConfigError(
            "Expected a search such as greedy, beam(4) or priority(16), or an object with proposals (an int of at "
            f"least 1), explore, trials, choose and keep, got {shorten(search)}"
        )


def check_checks(checks: Any) -> None:
    """Raise ConfigError for anything but a list of checks."""
    if isinstance(checks, str) or not isinstance(checks, Sequence):
        raise ConfigError(f"Expected checks=[...], got {shorten(checks)}")
    for check in checks:
        if not accepts(check, None, None, None, None):
            raise ConfigError(
                f"Expected a check, (before, after, parameter, step) -> reason or None, got {shorten(check)}"
            )


def check_clients(clients: Any, executor: Any) -> None:
    """Raise ConfigError for unknown clients, and for clients of an agent that runs in other processes."""
    if not clients:
        return
    families(clients)
    if executor is not None and getattr(executor, "is_remote", True):
        raise ConfigError(
            f"Expected clients=None with {type(executor).__name__}, in whose processes the calls of other clients "
            f"cannot be counted, got {clients!r}; leave it out, or use LocalExecutor"
        )


def check_executor(executor: Any) -> None:
    """Raise ConfigError for anything that cannot run rollouts."""
    if isinstance(executor, type) or not accepts(getattr(executor, "map", None), None, ()):
        raise ConfigError(
            "Expected an executor such as LocalExecutor(8), or one with async map(work, tasks), "
            f"got {shorten(executor)}"
        )


def check_watchers(logger: Any, observers: Any) -> None:
    """Raise ConfigError for an invalid observer, which would otherwise fail after the first paid step."""
    if logger is not None:
        from_logger(logger)
    if observers is not None:
        as_observers(observers)


def check_budget(budget: Any) -> None:
    """Reject anything that is not a Budget."""
    if budget is not None and not isinstance(budget, Budget):
        raise ConfigError(f"Expected budget=Budget(usd=..., tokens=..., calls=...), got {budget!r}")


# ---- calling parts


async def ask_optimizer(optimizer: Optimizer, rollouts: Sequence[Rollout], step: Step) -> Proposal:
    """Return an optimizer's proposal, each value in its parameter's own type; `error` names invalid values.

    Score and feedback are those of the rollouts if the optimizer gives none.
    """
    proposal = await _check_async(optimizer.propose(rollouts, step), "propose", optimizer)
    if not isinstance(proposal, Proposal) or not isinstance(proposal.values, dict):
        raise TypeError(
            f"Expected a Proposal(values={{...}}) from {name_of(optimizer)}.propose, got {shorten(proposal)}"
        )
    proposal = fit_to_types(proposal, step)
    score = proposal.score if proposal.score is not None and math.isfinite(proposal.score) else None
    if score is not None and proposal.feedback and proposal.sample_ids:
        return proposal
    seen = join_rollouts(rollouts)
    return replace(
        proposal,
        score=seen.score if score is None else score,
        feedback=proposal.feedback or seen.feedback,
        sample_ids=proposal.sample_ids or tuple(rollout.sample_id for rollout in rollouts),
    )


def fit_to_types(proposal: Proposal, step: Step) -> Proposal:
    """Return the proposal with each value in its parameter's own type; `error` names invalid values."""
    if not proposal.values:
        return proposal
    values, refused = convert_suggestion(proposal.values, step.parameters)
    permit_replayed_code(values, step.parameters)
    if refused:
        error = "; ".join(reason for reason in (proposal.error, *refused.values()) if reason)
        return replace(proposal, values=values, error=error)
    return replace(proposal, values=values)


def combine_edits(proposals: Sequence[Proposal], step: Step) -> tuple[Sequence[Proposal], Proposal | None]:
    """Return the proposals without parameters that are edited item by item, and one proposal with these combined.

    Such a parameter, a Playbook for one, has `combine(before, [(value, weight, sample ids)])`: no rule rewrites it. The
    weight of a proposal is its support.
    """
    own = {parameter.name: parameter for parameter in step.parameters if hasattr(parameter, "combine")}
    asking = [proposal for proposal in proposals if own.keys() & proposal.values.keys()] if own else []
    if not asking:
        return proposals, None
    values = {
        name: parameter.combine(
            step.values.get(name, parameter.data),
            [(one.values[name], float(one.support), one.sample_ids) for one in asking if name in one.values],
        )
        for name, parameter in own.items()
        if any(name in one.values for one in asking)
    }
    rest = [replace(one, values={k: v for k, v in one.values.items() if k not in own}) for one in proposals]
    samples = tuple(sorted({i for one in asking for i in one.sample_ids}))
    return rest, Proposal(values=values, support=sum(one.support for one in asking), sample_ids=samples)


async def merge_with(rule: UpdateRule, proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
    """Return the result of a rule; raises ConfigError for anything but proposals."""
    answer: Any = await _check_async(rule(proposals, step), "the rule", rule)
    if not isinstance(answer, Sequence) or not all(isinstance(proposal, Proposal) for proposal in answer):
        raise ConfigError(
            f"Expected a list of Proposals from the rule {name_of(rule)}, got {shorten(answer)}; [] is no update"
        )
    return answer


async def ask_gate(gate: Gate, before: Values, after: Values, step: Step) -> Decision:
    """Return a gate's decision; raises ConfigError for anything but a Decision, and for a memory that is not JSON."""
    answer: Any = await _check_async(gate(before, after, step), "the gate", gate)
    if not isinstance(answer, Decision):
        raise ConfigError(
            f"Expected a Decision(accepted=..., reason=...) from the gate {name_of(gate)}, got {shorten(answer)}"
        )
    return answer


def as_json(memory: Mapping[str, Any], gate: Gate) -> dict[str, Any]:
    """Return a gate's memory as JSON keeps it; raises ConfigError if that is impossible."""
    if not memory:
        return {}
    try:
        kept: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(dict(memory)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"Expected the gate {name_of(gate)} to keep JSON in step.memory, got {shorten(dict(memory))}: {error}"
        ) from None
    return kept


def refuse_values(values: Values, step: Step) -> dict[str, str]:
    """Return the reason for each new value that one of the step's checks refuses, by parameter name."""
    refused: dict[str, str] = {}
    changed = {name: value for name, value in values.items() if value != step.values.get(name)} if step.checks else {}
    parameters = {parameter.name: parameter for parameter in step.parameters} if changed else {}
    for name, value in changed.items():
        for check in step.checks if name in parameters else ():
            reason: Any = check(step.values.get(name), value, parameters[name], step)
            if reason is not None and not isinstance(reason, str):
                raise ConfigError(f"Expected a reason or None from the check {name_of(check)}, got {shorten(reason)}")
            if reason:
                refused[name] = f"{reason} - at $.suggestion.{parameters[name].py_name}"
                break
    return refused


# ---- checking what searches return


def check_candidates(search: Search, method: str, answer: Any) -> Sequence[Candidate]:
    """Return a search's candidates; raises ConfigError for anything else, and for two with one id."""
    ids = [one.id for one in answer if isinstance(one, Candidate)] if isinstance(answer, Sequence) else []
    if not isinstance(answer, Sequence) or len(set(ids)) < len(answer):
        raise ConfigError(
            f"Expected Candidates with an id of their own from {name_of(search)}.{method}, got {shorten(answer)}"
        )
    return answer


def check_trials(search: Search, answer: Any, known: Container[str]) -> Sequence[tuple[Candidate, Sequence[Sample]]]:
    """Return a search's trials; raises ConfigError for anything but explored or new candidates and samples."""
    try:
        trials = [(candidate, list(samples)) for candidate, samples in answer]
    except (TypeError, ValueError):
        trials = [(None, [])]
    if not all(
        isinstance(candidate, Candidate)
        and candidate.id in known
        and all(isinstance(sample, Sample) for sample in samples)
        for candidate, samples in trials
    ):
        raise ConfigError(
            f"Expected pairs of an explored or new Candidate and its Samples from {name_of(search)}.trials, "
            f"got {shorten(answer)}"
        )
    return trials


def check_choice(search: Search, answer: Any, known: Container[str]) -> tuple[Candidate | None, Decision]:
    """Return a search's choice; raises ConfigError for anything but an explored or new candidate, and a Decision."""
    match answer:
        case (None, Decision(accepted=False) as decision):
            return None, decision
        case (Candidate() as best, Decision() as decision) if best.id in known:
            return best, decision
    raise ConfigError(
        "Expected (an explored or new Candidate, or None; a Decision, which accepts only a candidate) from "
        f"{name_of(search)}.choose, got {shorten(answer)}"
    )


def _check_async(answer: Any, what: str, part: Any) -> Awaitable[Any]:
    if not isawaitable(answer):
        raise ConfigError(
            f"Expected {what} of {name_of(part)} to be async, got {shorten(answer)} at once; write `async def`"
        )
    awaitable: Awaitable[Any] = answer
    return awaitable


def name_of(part: Any) -> str:
    """Return the name of a part: of a function its name, of an object its class; "" for None."""
    return str(getattr(part, "__qualname__", type(part).__qualname__))


# ---- trained code


def check_code(agent: Any, parameters: Sequence[Any]) -> dict[str, str]:
    """Check that every operation whose code will be trained can run in its sandbox.

    Returns parameter name -> where its code runs: "process", "monty" with its version, or "none" for this process,
    where nothing is checked. Raises ConfigError, which names code that awaits, calls a model, changes `self`, or uses
    values that cannot be sent to a sandbox.

    Code that another framework runs (Trace's own `@bundle`) cannot run in a sandbox. A warning names it unless the user
    opted out by `sandboxed(None)`.
    """
    origins = [_origin_of(parameter) for parameter in parameters]
    trained = {id(origin) for origin in origins if isinstance(origin, CodeParameter)}
    others = [one for one in origins if isinstance(one, ParameterNode) and not isinstance(one, CodeParameter)]
    foreign = [one.name for one in others if one.code_engine() == "here"]
    if not trained and not foreign:
        return {}
    if foreign:
        _check_foreign_code(", ".join(foreign))
    places: dict[str, str] = dict.fromkeys(foreign, "here")
    sandboxed: list[tuple[str, CodeParameter, Any]] = []
    for operation, owner in operations_of(agent) if trained else ():
        code = operation.code_of(owner)
        if code is None or id(code) not in trained:
            continue
        places[code.name] = engine = current_place(code.place).engine
        if engine != "here":
            sandboxed.append((operation.title, code, owner))
    check_sandboxed(sandboxed)
    engines = set(places.values())
    if "process" in engines and not hasattr(os, "fork"):
        raise ConfigError(
            "Expected a system with fork for the sandbox of trained code, got none; set sandbox='monty' in @bundle "
            "(pip install 'aggregated-update[monty]'), or sandbox=None"
        )
    shown = {"here": "none", "process": "process"}
    if "monty" in engines:
        from importlib.metadata import version

        from aggregator.sandbox.monty import engine as find_monty

        find_monty()
        shown["monty"] = f"monty {version('pydantic-monty')}"
    return {name: shown[engine] for name, engine in places.items()}


def _origin_of(parameter: Any) -> Any:
    """Return the parameter that another one wraps, or itself."""
    if not hasattr(parameter, "origin") or (isinstance(parameter, ParameterNode) and parameter.code_engine()):
        return parameter
    return parameter.origin


def _check_foreign_code(names: str) -> None:
    """Warn about code that another framework runs in this process; raise ConfigError if a sandbox was requested."""
    place = place_here()
    if place is not None and place.engine != "here":
        raise ConfigError(
            f"Expected operations of this library's @bundle within sandboxed(...), got code that Trace runs in this "
            f"process: {names}. Leave it out of training, or use sandboxed(None)"
        )
    if place is None:
        warnings.warn(
            f"The code of {names} will be trained and runs in this process, as Trace runs it: it may do whatever your "
            "program may do. Train in a container, use this library's @bundle, or accept it by `with sandboxed(None):` "
            "(aggregator.sandbox) around the training",
            SandboxWarning,
            stacklevel=3,
        )


def permit_replayed_code(values: Values, parameters: Sequence[Any]) -> None:
    """Raise ConfigError if a cassette that holds a recording is open and does not permit code that would run here.

    A run's own journal permits it, because the same run wrote it.
    """
    tape = current_tape()
    if tape is None or not tape.holds_recording:
        return
    if found := unsandboxed_code(map(_origin_of, parameters), values):
        require_consent(found, tape.rules.code, origin=f"the recording {tape.name}", permitted=tape.permitted_code)
