"""Learn from logged rollouts, for example of production, and from people's corrections: the agent is not run.

    update = propose_from("logs.jsonl", agent, llm=llm)     # or a list of dicts, or Rollouts
    print(update)                                           # what changes, and which records asked for it
    update.apply()

records -> rollouts with a signal -> a proposal for each -> merge -> checks -> the update, for a person to review
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import unified_diff
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from aggregator import portal
from aggregator.adapters.agents import as_agent
from aggregator.agents.parameters import ParameterNode, by_name, read, write
from aggregator.agents.transcripts import Transcript
from aggregator.cassettes.lineage import lineage
from aggregator.checks import check_positive, is_finite
from aggregator.errors import ConfigError
from aggregator.executors.local import MAX_CONCURRENCY, finish
from aggregator.executors.work import record_failure
from aggregator.llm.budget import Budget, spending
from aggregator.llm.ledger import collecting
from aggregator.llm.observed import apart
from aggregator.records import Candidate, Failure, Proposal, Rollout, Sample, Usage, Values
from aggregator.text import as_text, shorten
from aggregator.training.gates import all_checks
from aggregator.training.merge import LLMMerge
from aggregator.training.parts import ask_optimizer, check_budget, check_optimizer, check_rule
from aggregator.training.plan import choose_parameters
from aggregator.training.proposers import LLMOptimizer
from aggregator.training.schedules import check_stepsize
from aggregator.training.searches import plain
from aggregator.training.step import (
    Check,
    Instance,
    Optimizer,
    Step,
    UpdateRule,
    is_satisfied,
    make_instance,
    propose_nothing,
    use_values,
)
from aggregator.training.updates import Explored, Parts, changes_between, make_candidates

Records = str | Path | Iterable[Rollout | Mapping[str, Any]]
"""Rollouts, dicts, a DataFrame, or a file: `.jsonl`, or `.json` with a list or {"rollouts": [...]}."""

FIELDS: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "sample_id"),
    "x": ("x", "input", "inputs", "question", "query"),
    "output": ("output", "outputs", "answer", "response", "completion"),
    "score": ("score",),
    "feedback": ("feedback", "comment", "note", "explanation"),
    "correction": ("correction", "corrected", "expected"),
    "transcript": ("transcript", "messages", "trace"),
    "values": ("values",),
}
"""The facts of a record, and their accepted names; the first one present is used."""

UNLABELLED = "it has no score, no feedback and no correction"
STALE = "it ran with other values than the current ones"


class Logged(Struct, frozen=True, kw_only=True):
    """One logged record: its id, the rollout that it describes, and the values that it ran with."""

    id: str | int
    rollout: Rollout
    values: Values = {}


class LearnedUpdate(Struct, frozen=True, kw_only=True):
    """The update that logged rollouts ask for: new values of parameters, with their provenance.

    `values` holds what changes, `before` the values of all parameters. `provenance` names the records behind each
    change, `proposals` are those of the single records, `records` their ids in the same order. `skipped` gives the
    reason for each record that was left out. `failures` are calls that were lost, replies that could not be read, and
    values that a check refused. Nothing is changed until `apply()`.
    """

    values: Values
    before: Values
    reasoning: str = ""
    provenance: Mapping[str, tuple[str | int, ...]] = {}
    proposals: tuple[Proposal, ...] = ()
    records: tuple[str | int, ...] = ()
    skipped: Mapping[str | int, str] = {}
    failures: tuple[Failure, ...] = ()
    usage: Mapping[str, Usage] = {}
    parameters: tuple[ParameterNode[Any], ...] = ()

    def apply(self, agent: Any = None) -> Values:
        """Store the new values, all or none, in the given agent or in another one, and return them.

        Raises ConfigError for a parameter that the agent does not have, ParameterError for a value that it refuses.
        """
        parameters = list(self.parameters) if agent is None else parameters_of(agent)
        missing = self.values.keys() - by_name(parameters).keys()
        if missing:
            raise ConfigError(f"Expected an agent with the parameter {min(missing)!r}, got {shorten(agent)}")
        write(parameters, self.values)
        return self.values

    def __str__(self) -> str:
        lines = []
        for name, value in self.values.items():
            old, new = (as_text(one).splitlines() for one in (self.before[name], value))
            behind = ", ".join(map(str, self.provenance.get(name, ())))
            lines += [f"{name} (records {behind})", *list(unified_diff(old, new, lineterm="", n=1))[2:], ""]
        counted = f"{len(self.records)} records, {len(self.skipped)} skipped, {len(self.failures)} failures"
        return "\n".join([*lines, counted] if lines else [f"no change: {counted}"])


def parameters_of(agent: Any) -> list[ParameterNode[Any]]:
    """Return the trainable parameters of an agent, or of a list of them."""
    if isinstance(agent, ParameterNode):
        agent = [agent]
    is_list = isinstance(agent, Sequence) and agent and all(isinstance(one, ParameterNode) for one in agent)
    own: Any = agent if is_list else as_agent(agent).parameters()
    return [one for one in by_name(own).values() if one.trainable]


# Records


def read_records(records: Records, fields: Mapping[str, str] = {}) -> list[Logged]:
    """Return records as rollouts, in their order.

    `fields` names for `x`, `output`, `score`, `feedback`, `correction`, `transcript`, `values` or `id` the field of a
    record that holds it, with dots for nesting. A correction is what the output should have been: without a score of
    its own a record has 1.0 if the output is that, else 0.0. Raises ConfigError that names the record.

    >>> given = {"input": "2+2", "output": "5", "correction": "4"}
    >>> logged = read_records([given])[0].rollout
    >>> logged.x, logged.score, logged.feedback
    ('2+2', 0.0, 'A person corrected this output. It should have been: 4')
    """
    unknown = fields.keys() - FIELDS.keys()
    if unknown:
        raise ConfigError(f"Expected fields to name some of {', '.join(FIELDS)}, got {min(unknown)!r}")
    given: Any = _load(Path(records)) if isinstance(records, str | Path) else records
    if hasattr(given, "columns") and hasattr(given, "to_dict"):  # a DataFrame
        given = given.to_dict("records")
    if isinstance(given, Mapping):
        raise ConfigError("Expected a list of records, got a mapping; give [record]")
    return [_read_record(record, i, fields) for i, record in enumerate(given)]


def _load(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"Expected a file of records at {path}, got {error.strerror}") from error
    try:
        if path.suffix in (".jsonl", ".ndjson"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"Expected JSON in {path}, got {error}") from error
    return found["rollouts"] if isinstance(found, dict) and isinstance(found.get("rollouts"), list) else found


def _read_record(record: Any, place: int, fields: Mapping[str, str]) -> Logged:
    if isinstance(record, Rollout):
        return Logged(id=record.sample_id, rollout=replace(record, sample_id=place, handle=None))
    if not isinstance(record, Mapping):
        raise ConfigError(f"Expected a record as a dict or a Rollout, got {shorten(record)} - at record {place}")
    found = {name: _find(record, fields.get(name), FIELDS[name]) for name in FIELDS}
    own_id = place if found["id"] is None else found["id"]
    if not isinstance(own_id, str | int):
        raise ConfigError(f"Expected a text or a number as the id of a record, got {own_id!r} - at record {place}")
    score, correction, output = found["score"], found["correction"], found["output"]
    if isinstance(score, bool):
        score = float(score)
    if score is not None and not is_finite(score):
        raise ConfigError(f"Expected a finite number or None as the score, got {score!r} - at record {own_id!r}")
    feedback = "" if found["feedback"] is None else as_text(found["feedback"])
    if correction is not None:
        is_right = as_text(correction).strip() == as_text(output).strip()
        score = (1.0 if is_right else 0.0) if score is None else score
        correct = "" if is_right else f"A person corrected this output. It should have been: {as_text(correction)}"
        feedback = "\n".join(text for text in (feedback, correct) if text)
    ran_with = found["values"] or {}
    if not isinstance(ran_with, Mapping):
        raise ConfigError(f"Expected values as a dict, name to value, got {shorten(ran_with)} - at record {own_id!r}")
    return Logged(
        id=own_id,
        values=dict(ran_with),
        rollout=Rollout(
            sample_id=place,
            x=found["x"],
            output=output,
            score=None if score is None else float(score),
            feedback=feedback,
            transcript=_transcript(found["transcript"]),
            failure=_failure(record.get("failure"), place),
        ),
    )


def _find(record: Mapping[str, Any], path: str | None, names: Sequence[str]) -> Any:
    if path is None:
        return next((record[name] for name in names if not _is_missing(record.get(name))), None)
    node: Any = record
    for name in (path,) if path in record else path.split("."):  # a table's column may have dots in its name
        node = node.get(name) if isinstance(node, Mapping) else None
    return None if _is_missing(node) else node


def _is_missing(value: Any) -> bool:
    """Return True for None, and for NaN, which tables use for missing values."""
    return value is None or (isinstance(value, float) and value != value)


def _transcript(given: Any) -> str:
    """Return a transcript as text; a list of messages becomes one call."""
    if isinstance(given, list) and given and all(isinstance(one, Mapping) and "role" in one for one in given):
        seen = Transcript()
        call = seen.llm_call(given[:-1] if given[-1]["role"] == "assistant" else given)
        call.reply = ("reply", as_text(given[-1].get("content"))) if given[-1]["role"] == "assistant" else call.reply
        return seen.render()
    return "" if given is None else as_text(given)


def _failure(given: Any, place: int) -> Failure | None:
    """Return the failure in one of our own records."""
    try:
        return None if given is None else replace(msgspec.convert(given, Failure), sample_id=place)
    except msgspec.ValidationError as error:
        raise ConfigError(f"Expected a failure as we write it, got {error} - at record {place}") from error


# Proposals


async def apropose_from(
    rollouts: Records,
    agent: Any,
    optimizer: Optimizer | None = None,
    *,
    llm: Any = None,
    rule: UpdateRule | None = None,
    checks: Sequence[Check] | None = None,
    stepsize: float = 0.5,
    max_score: float | None = None,
    fields: Mapping[str, str] = {},
    budget: Budget | None = None,
    max_concurrency: int = MAX_CONCURRENCY,
    seed: int = 0,
    apply: bool = False,
) -> LearnedUpdate:
    """Return the update that logged rollouts ask for, without running the agent; `apply` stores it at once.

    `rollouts` are records of the agent's runs: Rollouts, or dicts with the input, the output, and its quality: `score`,
    `feedback`, or `correction`, the output that a person would have wanted; or a file of them (`read_records`, with
    `fields`). Skipped are records without any of these, with other `values` than the current ones, or with a lost call.
    One that reached `max_score` proposes nothing, and counts as support for the current values.

    `agent` is anything that `as_agent` accepts, or a list of its ParameterNodes. `optimizer` proposes for each record
    by itself (default: `LLMOptimizer(llm=llm)`), `rule` merges the proposals at `stepsize` (default: the same model),
    `checks` refuse values, as in `Trainer`. Raises ConfigError if no record can be learned from, CassetteMissError and
    BudgetExceededError.
    """
    check_budget(budget)
    check_positive("max_concurrency", max_concurrency)
    optimizer = LLMOptimizer(llm=llm) if optimizer is None else optimizer
    check_optimizer(optimizer)
    rule = LLMMerge(getattr(optimizer, "llm", None) if llm is None else llm) if rule is None else rule
    check_rule(rule)
    named: Any = getattr(optimizer, "parameters", None)
    chosen = None if named is None else list(named() if callable(named) else named)
    parameters = choose_parameters(parameters_of(agent), chosen)
    usable, skipped = _sort(rollouts, fields, read(parameters))
    settings = {"stepsize": check_stepsize(stepsize), "seed": seed, "skip_from": max_score}
    step = _step_of(usable, parameters, checks=all_checks(checks), **settings)
    with portal.carrying(), spending(budget), lineage("propose_from"), collecting() as ledger:
        instances = await finish(lambda i: _propose(optimizer, step, i), range(len(usable)), max_concurrency)
        parts = Parts(propose_per="instance", propose=optimizer.propose, rule=rule, limit=max_concurrency)
        update = await _merge(parts, step, instances, {one.rollout.sample_id: one.id for one in usable})
    update = replace(update, skipped=skipped, usage=ledger.totals())
    if apply:
        update.apply()
    return update


propose_from = portal.sync_function(apropose_from)


def _step_of(usable: Sequence[Logged], parameters: Sequence[ParameterNode[Any]], **settings: Any) -> Step:
    values = read(parameters)
    return Step(
        values=values,
        initial=values,
        parameters=parameters,
        samples=tuple(Sample(one.rollout.sample_id, one.rollout.x, None) for one in usable),
        rollouts=tuple(one.rollout for one in usable),
        batch_size=len(usable),
        **settings,
    )


async def _merge(
    parts: Parts, step: Step, instances: Sequence[Instance], ids: Mapping[int, str | int]
) -> LearnedUpdate:
    """Merge the records' proposals; `ids` maps the number of a rollout to its record's id."""
    current = Candidate(id="0.0", values=step.values)
    made = await make_candidates(parts, [Explored(candidate=current, step=step, instances=instances)], step, [current])
    best = made.candidates[0] if made.candidates else current
    asked = tuple(instance.proposal for instance in instances)
    return LearnedUpdate(
        values=changes_between(step.values, best.values),
        before=step.values,
        reasoning=best.reasoning or made.reasoning,
        provenance={name: tuple(ids[i] for i in behind) for name, behind in best.sources.items()},
        proposals=asked,
        records=tuple(ids.values()),
        failures=tuple(dict.fromkeys([*(record for one in asked for record in one.failures), *made.failures])),
        parameters=tuple(step.parameters),
    )


def _sort(records: Records, fields: Mapping[str, str], values: Values) -> tuple[list[Logged], dict[str | int, str]]:
    """Return the records that can be learned from, and the reasons for the others.

    Raises ConfigError if none is left.
    """
    known = plain(values)
    usable: list[Logged] = []
    skipped: dict[str | int, str] = {}
    for one in read_records(records, fields):
        rollout = one.rollout
        if rollout.failure is not None and rollout.failure.infrastructure:
            skipped[one.id] = f"its call was lost: {rollout.failure.error}"
        elif rollout.score is None and not rollout.feedback:
            skipped[one.id] = UNLABELLED
        elif any(name in known and known[name] != value for name, value in plain(one.values).items()):
            skipped[one.id] = STALE
        else:
            usable.append(one)
    if not usable:
        reasons = sorted(set(skipped.values())) or ["the list is empty"]
        raise ConfigError(f"Expected records with a score, feedback or correction, got none: {'; '.join(reasons)}")
    return usable, skipped


async def _propose(optimizer: Optimizer, step: Step, i: int) -> Instance:
    """Request the proposal for one record; a lost call or an unreadable reply is part of the result."""
    rollout, sample = step.rollouts[i], step.samples[i]
    if is_satisfied(rollout, step):
        return make_instance(sample, rollout, propose_nothing(rollout))
    own = replace(step, samples=(sample,), rollouts=(rollout,))
    try:
        with lineage(f"record={sample.id}"), use_values(own), apart():
            proposal = await ask_optimizer(optimizer, (rollout,), own)
    except BaseException as error:  # noqa: BLE001 - the boundary: an optimizer may raise anything, one is lost
        record = record_failure("proposal", error, sample.id)
        proposal = Proposal(
            score=rollout.score, error=f"{record.error}: {record.message}", failures=(record,), sample_ids=(sample.id,)
        )
    return make_instance(sample, rollout, replace(proposal, sample_ids=(sample.id,)))
