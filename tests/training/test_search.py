"""Searches over several candidates: what they find and remember, and that candidates stay separate."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from router_runs import Shuffled
from search_worlds import TRAP, Height, Place, leads, neighbours, optimizer
from training_fakes import Adder, ScriptedModel, additions, exact, first_suggestion, from_feedback, section, suggest

from aggregator import LLM, Budget
from aggregator.cassettes.lineage import current_lineage
from aggregator.demo.run import TicketRouter, right_team, tickets
from aggregator.errors import AuthenticationError, BudgetExceededError, ConfigError, RateLimitError, TrainingError
from aggregator.llm.transport import shared_transport
from aggregator.records import Candidate, Decision, Scores, TrainingResult
from aggregator.simulation import SimulatedModel
from aggregator.training.algorithms import (
    AggregatedUpdate,
    BasicSearchAlgorithm,
    BeamSearch,
    Minibatch,
    MinibatchAlgorithm,
    ParetoSearch,
    PrioritySearch,
    SequentialSearch,
    SequentialUpdate,
)
from aggregator.training.checkpoints import load_result, save_result
from aggregator.training.gates import improves_on_validation
from aggregator.training.merge import LLMMerge, majority
from aggregator.training.proposers import LLMOptimizer
from aggregator.training.searches import Priority, beam, greedy, pareto, priority, sequential
from aggregator.training.step import Step
from aggregator.training.trainer import Trainer

FOUR = [(i, None) for i in range(4)]
SEARCHES: list[Callable[..., PrioritySearch]] = [
    PrioritySearch,
    BeamSearch,
    ParetoSearch,
    SequentialSearch,
    SequentialUpdate,
]


def climb(make: Callable[..., Minibatch], steps: int = 8, **options: Any) -> tuple[int, TrainingResult]:
    """Return where a trainer ends that starts at 0 in the landscape with the trap."""
    agent = Place()
    trainer = make(agent, optimizer(neighbours), num_proposals=2, **options)
    result = trainer.train(Height(TRAP), FOUR, batch_size=4, num_epochs=steps)
    return agent.at.data, result


@pytest.mark.parametrize("make", [BasicSearchAlgorithm, SequentialSearch])
def test_greedy_updates_stay_in_the_trap(make: Callable[..., Minibatch]) -> None:
    """A single candidate, kept if better, climbs the near hill and never crosses the valley."""
    assert climb(make)[0] == -1


@pytest.mark.requirement("Trace: PrioritySearch", "Trace: BeamSearch")
@pytest.mark.parametrize("make", [PrioritySearch, BeamSearch])
def test_a_search_leaves_the_trap(make: Callable[..., Minibatch]) -> None:
    """Candidates that are worse for now are remembered and extended, until a descendant is best."""
    at, result = climb(make)
    assert at == 4
    assert [report.update["at"] for report in result.history if report.decision.accepted] == [-1, 3, 4]
    assert result.candidates[0].values == result.parameters == {"at": 4}


def test_the_best_candidate_is_current_after_every_step() -> None:
    """An interrupted search loses nothing: no tried candidate was better than the current values."""
    _, result = climb(PrioritySearch)
    heights = [TRAP[0]]
    for report in result.history:
        heights.append(TRAP[report.update["at"]] if report.decision.accepted else heights[-1])
    assert heights == sorted(heights)


@pytest.mark.requirement("Trace: SequentialUpdate, SequentialSearch")
def test_a_refused_candidate_is_in_the_history_with_its_reason() -> None:
    """The next step's optimizer can read it, as with every trainer."""
    report = climb(SequentialSearch)[1].history[-1]
    assert report.update == {"at": 0}
    assert report.decision == Decision(
        accepted=False, reason="mean score 0.5 -> 0.3 on 4 instances", before=0.5, after=0.3
    )


@pytest.mark.requirement("Trace: PrioritySearch")
@pytest.mark.parametrize("make", SEARCHES)
def test_memory_is_bounded(make: Callable[..., PrioritySearch]) -> None:
    """A long search remembers no more than the given number, including the current candidate."""
    agent = Place()
    sizes = {PrioritySearch: {"num_candidates": 2, "memory_size": 3}, BeamSearch: {"num_candidates": 3}}
    options: dict[str, Any] = sizes.get(make, {})  # type: ignore[call-overload]
    search = make(agent, optimizer(neighbours), num_proposals=2, **options)
    result = search.train(Height({i: 1 / (1 + abs(i - 7)) for i in range(-9, 20)}), FOUR, batch_size=2, num_epochs=6)
    assert len(result.candidates) <= search.search.memory_size  # type: ignore[attr-defined]
    assert result.candidates[0].values == {"at": agent.at.data}
    if make in {PrioritySearch, BeamSearch}:
        assert len(result.candidates) == 3


def trials(**options: Any) -> dict[int, int]:
    """Return the number of trials of three candidates that never improve: 0.6 (current), 0.5, 0.4."""
    search = PrioritySearch(
        Place(), optimizer(leads({0: [1, 2]})), num_candidates=2, num_proposals=2, memory_size=3, **options
    )
    result = search.train(Height({0: 0.6, 1: 0.5, 2: 0.4}), FOUR, batch_size=4, num_epochs=9)
    return {candidate.values["at"]: candidate.trials for candidate in result.candidates}


def test_the_mean_always_explores_the_same_candidates() -> None:
    """With two explored, the third is tried when it is made and never again."""
    assert trials() == {0: 36, 1: 36, 2: 4}


@pytest.mark.requirement("Trace: PrioritySearch")
def test_ucb_explores_candidates_with_few_trials() -> None:
    """Its bound rises while others are tried, until it is chosen; with a constant of 0 the mean decides."""
    tried = trials(score_function="ucb", ucb_exploration_constant=1.0)
    assert tried[0] == 36
    assert tried[2] >= 12
    assert tried[1] + tried[2] == 40
    assert trials(score_function="ucb", ucb_exploration_constant=0.0) == trials()


SPECIALISTS = {"even": (1.0, 0.0), "odd": (0.0, 1.0), "fair": (0.6, 0.6), "tame": (0.58, 0.58), "all": (1.0, 1.0)}
NAMES = list(SPECIALISTS)


def skilled(x: int, output: int, info: Any) -> tuple[float, str]:
    return SPECIALISTS[NAMES[output]][x % 2], "more"


def specialists(make: Callable[..., PrioritySearch]) -> tuple[list[str], list[str]]:
    """Return what is remembered after the first step and at the end, if only the specialists lead to the summit."""
    ahead = {i: [NAMES.index(name) for name in names] for i, names in {2: ["even", "odd", "tame"]}.items()}
    ahead |= {NAMES.index(name): [NAMES.index("all")] for name in ("even", "odd")}
    found = []
    for steps in (1, 6):
        search = make(
            Place(2), optimizer(leads(ahead)), num_candidates=2, num_proposals=3, memory_size=2, validate_dataset=FOUR
        )
        result = search.train(skilled, FOUR, batch_size=4, num_epochs=steps)
        found.append([NAMES[candidate.values["at"]] for candidate in result.candidates])
    return found[0], found[1]


@pytest.mark.requirement("Trace: ParetobasedPS")
def test_pareto_keeps_specialists() -> None:
    """A candidate that is best on some instances is kept although its mean is low, and leads further."""
    first, last = specialists(ParetoSearch)
    assert first[0] == "fair"
    assert first[1] in {"even", "odd"}
    assert last[0] == "all"


def test_the_mean_drops_specialists() -> None:
    """This distinguishes the two searches: by the mean the second best is kept, and the search ends."""
    assert specialists(PrioritySearch) == (["fair", "tame"], ["fair", "tame"])


def polite_or_right(x: int, output: int, info: int) -> Scores:
    """Place 2 is right everywhere, place 1 is polite and partly right."""
    return Scores({1: 0.5, 2: 1.0}.get(output, 0.0), {"politeness": 1.0 if output == 1 else 0.0}, "fb")


@pytest.mark.parametrize(("names", "kept"), [((), [2]), (("politeness",), [2, 1])])
def test_pareto_keeps_a_candidate_that_is_best_by_a_named_score(names: tuple[str, ...], kept: list[int]) -> None:
    """Only the primary score counted: a candidate that was best by another objective was dropped."""
    search = pareto(scores=names, num_proposals=2, validate_dataset=FOUR)
    trainer = Trainer(Place(), optimizer(neighbours), propose_per="batch", search=search)
    result = trainer.train(polite_or_right, FOUR, batch_size=4, num_epochs=3)
    assert [candidate.values["at"] for candidate in result.candidates] == kept


def test_an_unknown_named_score_is_refused() -> None:
    """A misspelt name would keep no candidate."""
    trainer = Trainer(
        Place(), optimizer(neighbours), propose_per="batch", search=pareto(scores=["polite"], validate_dataset=FOUR)
    )
    with pytest.raises(ConfigError, match="polite"):
        trainer.train(polite_or_right, FOUR, batch_size=4)
    with pytest.raises(ConfigError, match=r"Expected scores as a list of names, got 'cost'; give \['cost'\]"):
        pareto(scores="cost")


def test_pareto_drops_a_candidate_that_is_best_nowhere() -> None:
    """Once one candidate is best everywhere, no other is kept."""
    search = ParetoSearch(Place(), optimizer(neighbours), num_proposals=2, validate_dataset=FOUR)
    result = search.train(Height({1: 0.5, 2: 1.0}), FOUR, batch_size=4, num_epochs=3)
    assert [candidate.values["at"] for candidate in result.candidates] == [2]


def additive(x: int, output: int, info: int) -> tuple[float, str]:
    """A nearer output scores higher, with feedback that from_feedback reads."""
    return 1 / (1 + abs(info - output)), f"expected {info}, got {output}" if output != info else "right"


SCATTERED = [(i, i + 2 + (i * 7) % 5) for i in range(12)]
MODES: dict[str, dict[str, Any]] = {
    "whole minibatch": {},
    "per instance": {"rule": LLMMerge(ScriptedModel(first_suggestion))},
    "majority": {"rule": majority},
    "validated": {"validate_dataset": SCATTERED[:3], "validate_guide": exact},
}


def first_gap(messages: list[dict[str, Any]]) -> str:
    """An optimizer that closes the gap of one instance, another one for each proposal."""
    gaps = re.findall(r"expected (\d+), got (\d+)", section(messages, "Feedback"))
    if not gaps:
        return "TERMINATE"
    asked = re.search(r"proposal=(\d)/propose", current_lineage())
    expected, got = (int(word) for word in gaps[(int(asked[1]) if asked else 0) % len(gaps)])
    present = json.loads(section(messages, "Parameters"))["amount"]["value"]
    return suggest(amount=present + expected - got)


def bytes_of(make: Callable[..., PrioritySearch], path: Path, jitter: int | None = None, **options: Any) -> bytes:
    """Return a search's result as bytes, with shuffled latencies if a seed for them is given."""
    shuffle = random.Random(jitter)
    waits = {"jitter": (lambda: shuffle.randrange(9))} if jitter is not None else {}
    mode = options.pop("mode", {})
    arguments = {"batch_size": 4, "num_epochs": 2, "test_dataset": SCATTERED[:4], **options}
    search = make(Adder(), optimizer(first_gap, **waits), num_proposals=3, observers=[], **mode)
    save_result(search.train(additive, SCATTERED, **arguments), path)
    return path.read_bytes()


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("make", SEARCHES)
def test_the_result_is_the_same_at_any_concurrency(
    make: Callable[..., PrioritySearch], mode: dict[str, Any], tmp_path: Path
) -> None:
    """It is equal byte for byte in any order of completion; another seed gives another run."""
    first = bytes_of(make, tmp_path / "first", mode=mode, max_concurrency=1)
    for concurrency, jitter in ((8, 1), (64, 2), (64, 3)):
        assert bytes_of(make, tmp_path / "next", jitter, mode=mode, max_concurrency=concurrency) == first
    assert bytes_of(make, tmp_path / "other", mode=mode, seed=7) != first


class Cut(BaseException):
    """Simulates a kill: nothing in the library catches it."""


def searched(make: Callable[..., PrioritySearch], run_dir: Path, cut_at: int | None = None, **options: Any) -> bytes:
    """Search in a run_dir; raise Cut at the given call of the optimizer."""
    calls = 0

    def counted(messages: list[dict[str, Any]]) -> str:
        nonlocal calls
        calls += 1
        if calls == cut_at:
            raise Cut
        return first_gap(messages)

    search = make(Adder(), optimizer(counted), num_proposals=2, **options)
    search.train(
        additive, SCATTERED, batch_size=3, num_epochs=2, run_dir=run_dir, resume=run_dir.exists(), max_concurrency=1
    )
    return (run_dir / "result.json").read_bytes()


@pytest.mark.parametrize("cut_at", [1, 4, 9])
@pytest.mark.parametrize("make", SEARCHES)
def test_a_resumed_search_ends_with_the_same_bytes(
    make: Callable[..., PrioritySearch], cut_at: int, tmp_path: Path
) -> None:
    """Its memory is part of the checkpoint: scores, ancestry and random draws."""
    whole = searched(make, tmp_path / "whole")
    with pytest.raises(Cut):
        searched(make, tmp_path / "cut", cut_at)
    assert searched(make, tmp_path / "cut") == whole
    assert load_result(tmp_path / "whole" / "result.json").candidates


def route(server: SimulatedModel, run_dir: Path, shuffle: int | None = None, **options: Any) -> TrainingResult:
    """Search for the demo's router over HTTP."""
    transport = None if shuffle is None else Shuffled(shuffle, shared_transport())
    llm = LLM("openai-compatible/simulated-1", base_url=server.base_url, transport=transport)
    pairs = [(ticket.text, ticket.team) for ticket in tickets().train[:12]]
    search = PrioritySearch(
        TicketRouter(llm),
        LLMOptimizer(llm=llm),
        num_candidates=2,
        num_proposals=2,
        rule=LLMMerge(llm),
        observers=[],
        budget=options.pop("budget", None),
    )
    return search.train(right_team, pairs, batch_size=4, num_epochs=2, run_dir=run_dir, **options)


@pytest.mark.parametrize("share", [0.4, 0.5, 0.6, 0.97])
def test_a_search_over_http_resumes_where_it_was_cut_off(share: float, tmp_path: Path) -> None:
    """Ended by its budget and resumed, at other latencies, it has the same bytes, and nothing is paid for twice.

    Calls in flight when the budget ended are finished, and therefore in the journal.
    """
    with SimulatedModel(seed=3) as server:
        whole = route(server, tmp_path / "whole")
        paid = sum(server.calls.values())
        with pytest.raises(BudgetExceededError) as cut:
            route(server, tmp_path / "cut", budget=Budget(calls=int(paid * share)))
        assert cut.value.result is not None
        assert 0 < len(cut.value.result.history) < len(whole.history)
        again = route(server, tmp_path / "cut", shuffle=5, resume=True)
        assert sum(server.calls.values()) == 2 * paid
    assert again.candidates == whole.candidates
    assert (tmp_path / "cut" / "result.json").read_bytes() == (tmp_path / "whole" / "result.json").read_bytes()


@pytest.mark.parametrize("rule", [None, majority])
def test_candidates_are_never_mixed(rule: Any) -> None:
    """Every prompt shows one candidate: its parameter, and the outputs and feedback that follow from it."""
    shuffle = random.Random(1)
    asked: list[list[dict[str, Any]]] = []

    def proposing(messages: list[dict[str, Any]]) -> str:
        asked.append(messages)
        return first_gap(messages)

    class Slow(Adder):
        async def forward(self, x: int) -> int:
            for _ in range(shuffle.randrange(5)):
                await asyncio.sleep(0)
            return await super().forward(x)

    agent = Slow()
    search = PrioritySearch(
        agent, optimizer(proposing, jitter=lambda: shuffle.randrange(9)), num_proposals=3, rule=rule
    )
    search.train(additive, SCATTERED, batch_size=6, num_epochs=4)
    present = [json.loads(section(messages, "Parameters"))["amount"]["value"] for messages in asked]
    assert len(set(present)) > 4
    for amount, messages in zip(present, asked, strict=True):
        for expected, got in re.findall(r"expected (\d+), got (\d+)", section(messages, "Feedback")):
            assert (int(got) - amount, int(expected)) in SCATTERED


def test_candidates_run_concurrently_within_the_limit() -> None:
    """The rollouts of all candidates share one max_concurrency."""

    def most_at_once(limit: int) -> int:
        running, most = 0, 0

        class Counting(Place):
            async def forward(self, x: int) -> int:
                nonlocal running, most
                running += 1
                most = max(most, running)
                for _ in range(5):
                    await asyncio.sleep(0)
                running -= 1
                return await super().forward(x)

        async def guide(x: int, output: int, info: Any) -> float:
            return TRAP.get(output, 0.0)

        search = PrioritySearch(Counting(), optimizer(neighbours), num_proposals=2)
        search.train(guide, FOUR, batch_size=4, num_epochs=3, max_concurrency=limit)
        return most

    assert most_at_once(5) == 5
    assert most_at_once(64) >= 12


def test_a_rule_merges_the_proposals_of_one_candidate() -> None:
    """There are num_proposals groups; one group of one candidate, always accepted, is AggregatedUpdate."""
    merge = ScriptedModel(first_suggestion)
    search = SequentialUpdate(Adder(), LLMOptimizer(llm=ScriptedModel(from_feedback)), rule=LLMMerge(merge))
    other = ScriptedModel(first_suggestion)
    aggregated = AggregatedUpdate(Adder(), LLMOptimizer(llm=ScriptedModel(from_feedback)), rule=LLMMerge(other))
    results = [trainer.train(exact, SCATTERED, batch_size=4) for trainer in (search, aggregated)]
    assert [[report.update for report in result.history] for result in results] == [
        [report.update for report in results[1].history]
    ] * 2
    assert merge.asked == other.asked
    groups = ScriptedModel(first_suggestion)
    PrioritySearch(
        Adder(), LLMOptimizer(llm=ScriptedModel(from_feedback)), num_proposals=2, rule=LLMMerge(groups)
    ).train(exact, SCATTERED[:4], batch_size=4)
    assert [place for place, _ in groups.places] == [
        f"train/epoch=0/batch=0/candidate=0.0/proposal={i}/aggregate" for i in range(2)
    ]


def test_there_are_no_more_groups_than_instances() -> None:
    """A rule never gets an empty list of proposals."""
    seen: list[int] = []

    async def counting(proposals: Any, step: Any) -> Any:
        seen.append(len(proposals))
        return proposals[:1]

    search = SequentialSearch(Adder(), LLMOptimizer(llm=ScriptedModel(from_feedback)), num_proposals=5, rule=counting)
    search.train(exact, SCATTERED, batch_size=3)
    assert set(seen) == {1}


def test_lineage_names_the_candidate_of_every_call() -> None:
    """A cassette therefore distinguishes the calls of two candidates, and a reader can follow one."""
    model = ScriptedModel(neighbours)
    PrioritySearch(Place(), LLMOptimizer(llm=model), num_candidates=2, num_proposals=2).train(
        Height(TRAP), FOUR, batch_size=4, num_epochs=2
    )
    assert [place.removeprefix("train/epoch=") for place, _ in model.places] == [
        "0/batch=0/candidate=0.0/proposal=0/propose",
        "0/batch=0/candidate=0.0/proposal=1/propose",
        "1/batch=0/candidate=0.2/proposal=0/propose",
        "1/batch=0/candidate=0.2/proposal=1/propose",
        "1/batch=0/candidate=0.0/proposal=0/propose",
        "1/batch=0/candidate=0.0/proposal=1/propose",
    ]


def test_a_candidate_records_its_origin() -> None:
    """It has its parent, its step and its samples; an update names all samples along its ancestry."""
    _, result = climb(PrioritySearch)
    family = {candidate.id: candidate for candidate in result.candidates}
    best = result.candidates[0]
    assert best.parent is not None
    assert family[best.parent].values == {"at": 3}
    assert sorted(best.sample_ids) == [0, 1, 2, 3]
    assert all(report.contributors == (0, 1, 2, 3) for report in result.history if report.decision.accepted)


def runs_of(**options: Any) -> dict[int, int]:
    """Return the number of rollouts of each place in two steps."""
    runs: dict[int, int] = {}

    class Counting(Place):
        async def forward(self, x: int) -> int:
            runs[self.at.data] = runs.get(self.at.data, 0) + 1
            return await super().forward(x)

    search = PrioritySearch(Counting(), optimizer(leads({0: [1]})), **options)
    search.train(Height({1: 1.0}), FOUR, batch_size=2)
    return runs


def test_rollouts_of_a_step() -> None:
    """The minibatch runs with each explored candidate, and once more with each new one."""
    assert runs_of() == {0: 4, 1: 4}


def test_a_candidate_is_validated_once() -> None:
    """Every candidate runs on the validation set once, including the initial one."""
    assert runs_of(validate_dataset=[(i, None) for i in range(5)]) == {0: 4 + 5, 1: 2 + 5}


def test_a_separate_guide_judges_the_trials() -> None:
    """Scores of two guides are never compared: with validate_guide the explored candidates are run again for it."""
    agent = Place()
    search = PrioritySearch(
        agent, optimizer(leads({0: [1, 2]})), num_proposals=2, validate_guide=lambda x, output, info: float(output)
    )
    search.train(Height({1: 1.0}), FOUR, batch_size=4)
    assert agent.at.data == 2
    assert runs_of(validate_guide=Height({1: 1.0})) == {0: 8, 1: 6}


@pytest.mark.requirement("Trace: SequentialUpdate, SequentialSearch")
def test_sequential_update_always_accepts() -> None:
    """The successor is accepted although it is worse, and no rollout is spent on comparing."""
    runs = 0

    class Counting(Place):
        async def forward(self, x: int) -> int:
            nonlocal runs
            runs += 1
            return await super().forward(x)

    agent = Counting()
    result = SequentialUpdate(agent, optimizer(leads({0: [1], 1: [2]}))).train(Height({0: 1.0}), FOUR, batch_size=2)
    assert (agent.at.data, runs) == (2, 4)
    assert {report.decision.reason for report in result.history} == {"the successor is always accepted"}


def test_a_gate_may_refuse_the_best_candidate() -> None:
    """The candidate is remembered and explored, because it may lead further."""
    agent = Place()
    gate = improves_on_validation([(0, None)], threshold=0.6)
    search = PrioritySearch(agent, optimizer(leads({0: [1], 1: [2]})), gate=gate)
    result = search.train(Height({1: 0.5, 2: 1.0}), FOUR, batch_size=4, num_epochs=2)
    assert [report.decision.reason for report in result.history] == [
        "mean score 0 -> 0.5 on 1 instances, less than the threshold 0.6",
        "mean score 0 -> 1 on 4 instances",
    ]
    assert agent.at.data == 2


def test_a_value_of_the_wrong_type_makes_no_candidate() -> None:
    """It is in the failures; the proposal's other values are tried."""
    agent = Place()
    search = PrioritySearch(agent, LLMOptimizer(llm=ScriptedModel(suggest(at="high"))))
    result = search.train(Height({}), FOUR, batch_size=4)
    assert {(record.stage, record.error) for record in result.failures} == {("proposal", "SuggestionError")}
    assert [candidate.values for candidate in result.candidates] == [{"at": 0}]


def test_equal_values_are_one_candidate() -> None:
    """Values that were proposed twice or are known already are neither tried nor remembered again."""
    search = PrioritySearch(Place(), LLMOptimizer(llm=ScriptedModel(suggest(at=1))), num_proposals=3)
    result = search.train(Height({1: 1.0}), FOUR, batch_size=2)
    assert [(candidate.id, candidate.values["at"]) for candidate in result.candidates] == [("0.1", 1), ("0.0", 0)]
    assert [report.proposals for report in result.history] == [3, 6]  # of both candidates, if there are two


class Unreliable(Place):
    """Loses its calls at one place."""

    lost_at = 1

    async def forward(self, x: int) -> int:
        if self.at.data == self.lost_at:
            raise RateLimitError("slow down", status=429)
        return await super().forward(x)


def test_a_candidate_with_lost_trials_is_not_accepted() -> None:
    """A lost call has no score, neither 0 nor 1; it is in the failures."""
    agent = Unreliable()
    search = SequentialSearch(agent, optimizer(leads({0: [1]})))
    result = search.train(Height({1: 1.0}), FOUR, batch_size=4)
    assert agent.at.data == 0
    assert result.history[0].decision.reason == "no instance has a score both before and after"
    assert {(record.stage, record.error, record.infrastructure) for record in result.failures} == {
        ("evaluation", "RateLimitError", True)
    }


def test_a_search_stops_if_too_many_instances_are_lost() -> None:
    """max_failure_ratio applies to the rollouts of all candidates together."""

    class Failing(Unreliable):
        lost_at = 0

    with pytest.raises(TrainingError, match="got 4 of 4 lost up to step 0") as error:
        PrioritySearch(Failing(), optimizer(neighbours)).train(Height(TRAP), FOUR, batch_size=4)
    assert error.value.result is not None
    assert error.value.result.history == ()


def test_an_error_that_ends_the_run_waits_for_calls_in_flight() -> None:
    """The other proposals are paid for, so they are awaited; then the run ends with its partial result."""
    heard: list[str] = []

    def refusing(messages: list[dict[str, Any]]) -> Any:
        heard.append(current_lineage().split("/")[-2])
        return AuthenticationError("no such key", status=401) if len(heard) == 1 else neighbours(messages)

    waits = iter([3, 5, 9])
    search = PrioritySearch(Place(), optimizer(refusing, jitter=lambda: next(waits)), num_proposals=3)
    with pytest.raises(TrainingError, match="AuthenticationError: no such key"):
        search.train(Height(TRAP), FOUR, batch_size=4)
    assert heard == ["proposal=0", "proposal=1", "proposal=2"]


def test_the_newer_of_equal_candidates_is_explored_first() -> None:
    """The search therefore crosses a plateau."""
    found = [Candidate(id=f"{i}.1", values={}, step=i, scores={"0": (0.5, 1)}) for i in (1, 3, 2)]
    assert [candidate.id for candidate in priority().rank(found)] == ["3.1", "2.1", "1.1"]


def test_an_overridden_forward_is_run_for_every_candidate() -> None:
    """It reads each candidate's values from its agent."""
    seen: list[int] = []

    class Own(PrioritySearch):
        def forward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
            seen.append(agent.at.data)
            return {"at": agent.at.data + 1}, TRAP.get(agent.at.data, 0.0)

    agent = Place()
    Own(agent, None, rule=majority, num_candidates=2).train(Height(TRAP), FOUR, batch_size=4, num_epochs=4)
    assert set(seen) >= {0, 1, 2, 3}
    assert agent.at.data == 4


BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_candidates": 0}, "Expected num_candidates to be an int of at least 1, got 0"),
    ({"num_proposals": 2.5}, "Expected num_proposals to be an int of at least 1, got 2.5"),
    ({"memory_size": 0}, "Expected memory_size to be an int of at least 1, got 0"),
    ({"num_candidates": 8, "memory_size": 4}, "Expected memory_size of at least num_candidates=8"),
    ({"score_function": "median"}, "Expected score_function 'mean' or 'ucb', got 'median'"),
    ({"ucb_exploration_constant": -1.0}, "Expected ucb_exploration_constant to be a finite number of at least 0"),
    ({"ucb_exploration_constant": float("nan")}, "Expected ucb_exploration_constant to be a finite number"),
    ({"validate_dataset": []}, "in validate_dataset, got none"),
    ({"rule": 5}, "Expected a rule"),
    ({"gate": 5}, "Expected a gate"),
    ({"optimizer": None}, "Expected an optimizer"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(arguments) for arguments, _ in BAD])
def test_invalid_arguments_are_refused_at_construction(arguments: dict[str, Any], message: str) -> None:
    """They are refused before anything is paid for."""
    options = {"optimizer": optimizer(neighbours), **arguments}
    with pytest.raises(ConfigError, match=message):
        PrioritySearch(Place(), options.pop("optimizer"), **options)


def test_update_alone_has_no_pool() -> None:
    """Unlike other trainers' update it works only within train, and its error says so."""
    with pytest.raises(ConfigError, match="Expected PrioritySearch.update to be called by train"):
        PrioritySearch(Place(), optimizer(neighbours)).update([])


def test_additions_are_learnt_by_every_search() -> None:
    """In the plain case each search solves what AggregatedUpdate solves."""
    for make in SEARCHES:
        agent = Adder()
        make(agent, optimizer(first_gap)).train(exact, additions(5), batch_size=4, num_epochs=2)
        assert agent.amount.data == 5


@pytest.mark.requirement("Trace: StreamingPrioritySearch")
def test_new_candidates_can_be_tried_on_the_next_minibatch() -> None:
    """This is Trace's streaming search: `due` returns nothing, and an untried candidate has the highest bound."""

    class Streaming(Priority):
        def due(self, explored: Any, made: Any) -> list[Candidate]:
            return []

    agent = Place()
    streaming = Streaming(32, num_candidates=3, num_proposals=2, score_function="ucb")
    search = Trainer(agent, optimizer(neighbours), propose_per="batch", search=streaming)
    result = search.train(Height(TRAP), FOUR, batch_size=4, num_epochs=12)
    assert agent.at.data == 4
    assert {candidate.trials % 4 for candidate in result.candidates} == {0}


class Crossing:
    """A custom search that is not a PrioritySearch: it crosses the halves of the two best candidates."""

    proposals = 1
    guide = None

    def explore(self, pool: Sequence[Candidate], step: Step) -> list[Candidate]:
        if len(pool) < 2:
            return list(pool)
        values = {"amount": pool[0].values["amount"], "label": pool[1].values["label"]}
        return [pool[0], Candidate(id=f"{step.number}.x", values=values, step=step.number)]

    def trials(self, explored: Sequence[Candidate], made: Sequence[Candidate], step: Step) -> list[Any]:
        return [(candidate, step.samples) for candidate in (*explored, *made)]

    def choose(self, explored: Sequence[Candidate], made: Sequence[Candidate], step: Step) -> tuple[Any, Decision]:
        best = max((*explored, *made), key=lambda candidate: candidate.score or 0.0)
        return best, Decision(accepted=best is not explored[0], reason="the best of all")

    def keep(self, pool: Sequence[Candidate], step: Step) -> list[Candidate]:
        return sorted(pool, key=lambda candidate: -(candidate.score or 0.0))[:4]


def test_a_custom_search_can_create_candidates() -> None:
    """Any object with the methods is a search; explored candidates need not come from the pool."""
    replies = iter([suggest(amount=5), suggest(label="total")])

    class Labelled(Adder):
        async def forward(self, x: int) -> Any:
            return await super().forward(x), self.label.data

    def guide(x: int, output: tuple[int, str], info: int) -> tuple[float, str]:
        return 0.6 * (output[0] == info) + 0.4 * (output[1] == "total"), "more"

    agent = Labelled()
    model = ScriptedModel(lambda _: next(replies, "TERMINATE"))
    trainer = Trainer(agent, LLMOptimizer(llm=model), propose_per="batch", search=Crossing(), observers=[])
    result = trainer.train(guide, additions(5), batch_size=4, num_epochs=4)
    assert (agent.amount.data, agent.label.data) == (5, "total")
    assert result.candidates[0].score == pytest.approx(1.0)


@pytest.mark.parametrize("search", [5, "beam", Priority, beam, object(), Crossing])
def test_an_invalid_search(search: Any) -> None:
    """A class instead of its instance, or an object without the methods, is refused at construction."""
    with pytest.raises(ConfigError, match=r"Expected a search such as greedy, beam\(4\) or priority\(16\)"):
        Trainer(Place(), optimizer(neighbours), propose_per="batch", search=search)


@pytest.mark.parametrize(
    ("made", "face"),
    [
        (greedy, MinibatchAlgorithm),
        (sequential(), SequentialSearch),
        (beam(2), partial(BeamSearch, num_candidates=2)),
        (priority(8), partial(PrioritySearch, memory_size=8)),
        (pareto(), ParetoSearch),
    ],
)
def test_a_search_argument_equals_its_trainer_class(made: Any, face: Any) -> None:
    """`Trainer(search=...)` has the same result as the class of that name."""
    results = []
    for make in (face, partial(Trainer, propose_per="batch", search=made)):
        run = make(Place(), optimizer(leads({0: [2], 2: [3], 3: [4]})), observers=[])
        results.append(run.train(Height(TRAP), FOUR, batch_size=2, num_epochs=3))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("method", "answer", "message"),
    [
        ("explore", None, r"Expected Candidates with an id of their own from Wrong\.explore, got None"),
        ("explore", [3], r"Expected Candidates with an id of their own from Wrong\.explore"),
        ("explore", [Candidate(id="a", values={"at": 1}), Candidate(id="a", values={"at": 2})], r"Wrong\.explore"),
        ("trials", None, r"Expected pairs of an explored or new Candidate and its Samples from Wrong\.trials"),
        ("trials", [(Candidate(id="zz", values={"at": 1}), [])], r"Wrong\.trials"),
        ("choose", None, r"Expected \(an explored or new Candidate, or None; .* from Wrong\.choose, got None"),
        ("choose", (None, Decision(accepted=True)), r"Wrong\.choose"),
        ("choose", (Candidate(id="zz", values={"at": 1}), Decision(accepted=True)), r"Wrong\.choose"),
        ("keep", 3, r"Wrong\.keep, got 3"),
    ],
)
def test_the_result_of_a_custom_search_is_checked(method: str, answer: Any, message: str) -> None:
    """The error names the search, and says what was expected."""
    wrong = type("Wrong", (Priority,), {method: lambda *_: answer})()
    trainer = Trainer(Place(), optimizer(neighbours), propose_per="batch", search=wrong, observers=[])
    with pytest.raises(ConfigError, match=message):
        trainer.train(Height(TRAP), FOUR, batch_size=4)
