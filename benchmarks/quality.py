"""What merging is worth: test accuracy at an equal number of calls, with a simulated optimizer of known noise.

The world: 40 keywords, each with a right team out of 6. The agent's one parameter is a dict keyword -> team, empty at
first. The simulated optimizer sees one wrong answer and its feedback; with probability 1 - noise it adds the right
entry, else it does one of three kinds of harm: a wrong team, another entry broken, a third of all entries forgotten.
Every call counts against one budget, whatever its role: agent, optimizer, merge, validation of a candidate.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.harness import Case, Options, call, measure
from benchmarks.report import Report, Row, Target

KEYWORDS, TEAMS, BATCH, BUDGET, SEEDS = 40, 6, 8, 600, 40
NOISES = (0.1, 0.3, 0.5)
METHODS = {
    "aggregated": "LLMMerge of 8 independent proposals",
    "aggregated, gated": "the same behind improves_on_batch",
    "majority": "the rule `majority`: no call, whole values only",
    "best of N": "8 proposals, each tried on the minibatch, the best kept",
    "sequential search": "8 feedbacks in one prompt, twice; both tried on the minibatch, the better kept if better",
    "priority search": "the same for the two best of a memory of 16 candidates",
    "concatenated": "8 feedbacks in one prompt, all of them read",
    "concatenated, 3 read": "8 feedbacks in one prompt, the first 3 wrong ones read",
    "one by one": "batches of 1, each proposal applied",
}
OPTIONS = {
    "aggregated, skipping": "skip_perfect: no proposal for right answers, which support the current value",
    "rules as text": "aggregated; the parameter is one text, a line for each rule",
    "rules as text, max_edit": "the same with checks=[max_edit(0.2)]",
    "playbook": "the parameter is a Playbook; edits are combined without a call",
    "noisy agent, gated": "the agent errs in 20 % of its answers; improves_on_batch",
    "noisy agent, gated, repeats": "the same with repeats=3",
    "evidence": "LLMMerge(evidence=True); the merge drops changes that a proposal's reasoning does not support",
    "pairs": "aggregated, minibatches of 2: a single distinct proposal is adopted without a call",
    "pairs, weighed": "the same; a single distinct proposal is weighed by the merge too",
}
"""What options of a run are worth; each is compared with `aggregated`, at the same number of calls."""
FEWER = 6
"""How many rules the simulated merge changes when it is asked once more."""
MERGE_FAILURE = 0.1
"""How often the simulated merge is careless and takes the first suggestion whole."""


class Meter:
    """Counts calls and refuses what is over the budget."""

    def __init__(self, budget: int) -> None:
        self.left = budget

    def spend(self) -> None:
        from aggregator import BudgetExceededError

        if self.left <= 0:
            raise BudgetExceededError("all calls are spent")
        self.left -= 1


class Form(NamedTuple):
    """How the rules are kept in the parameter: read from its value, and written as a value for it."""

    read: Callable[[Any], dict[str, str]]
    write: Callable[[Any, dict[str, str]], Any]


def _lines(text: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)


def _edited(playbook: Any, rules: dict[str, str]) -> Any:
    """Return the items of a playbook after the edits that lead to these rules."""
    known = {item.text.partition(": ")[0]: item for item in playbook.data}
    edits: list[dict[str, str]] = []
    for name, team in rules.items():
        if name not in known:
            edits.append({"op": "ADD", "text": f"{name}: {team}"})
        elif known[name].text != f"{name}: {team}":
            edits.append({"op": "UPDATE", "id": known[name].id, "text": f"{name}: {team}"})
    edits += [{"op": "DELETE", "id": item.id} for name, item in known.items() if name not in rules]
    return playbook.convert(edits)


FORMS = {
    "dict": Form(dict, lambda _, rules: rules),
    "text": Form(_lines, lambda _, rules: "\n".join(f"{name}: {rules[name]}" for name in sorted(rules))),
    "playbook": Form(lambda items: dict(item.text.split(": ", 1) for item in items), _edited),
}


class World:
    """The truth of one seed, and what plays the models in it."""

    def __init__(self, seed: int, noise: float, meter: Meter, form: Form = FORMS["dict"]) -> None:
        self.random = random.Random(f"world/{seed}")
        self.noise = noise
        self.form = form
        self.slips = 0.0  # how often the agent answers at random
        self.meter = meter
        self.truth = {f"k{i}": f"team{self.random.randrange(TEAMS)}" for i in range(KEYWORDS)}
        names = list(self.truth)
        self.data = [(name, self.truth[name]) for name in self.random.choices(names, k=2_000)]
        self.test = list(self.truth.items())

    def improved(self, rules: dict[str, str], keyword: str, right: str) -> dict[str, str]:
        """What the simulated optimizer makes of one wrong answer."""
        draw = self.random
        if draw.random() >= self.noise:
            return {**rules, keyword: right}
        kind = draw.randrange(3)
        if kind == 0:
            return {**rules, keyword: draw.choice([team for team in self.teams() if team != right])}
        if kind == 1:
            return {**rules, draw.choice(list(self.truth)): draw.choice(self.teams())}
        kept = draw.sample(sorted(rules), k=2 * len(rules) // 3)
        return {name: rules[name] for name in sorted(kept)}

    def teams(self) -> list[str]:
        return [f"team{i}" for i in range(TEAMS)]


def make_agent(world: World) -> Any:
    from aggregator import Module, ParameterNode, Playbook

    class Router(Module):
        def __init__(self) -> None:
            self.rules: Any = ParameterNode({}, type=dict[str, str])
            if world.form is FORMS["text"]:
                self.rules = ParameterNode("", type=str)
            elif world.form is FORMS["playbook"]:
                self.rules = Playbook([])

        async def forward(self, keyword: str) -> str:
            world.meter.spend()
            if world.slips and world.random.random() < world.slips:
                return world.random.choice(world.teams())
            return world.form.read(self.rules.data).get(keyword, "unknown")

    return Router()


class NoisyOptimizer:
    """Reads `keyword: right team` out of the feedback, as many wrong answers as it reads at once."""

    parameters = None

    def __init__(self, world: World, reads: int = KEYWORDS) -> None:
        self.world = world
        self.reads = reads

    async def propose(self, rollouts: Any, step: Any) -> Any:
        from aggregator import Proposal

        self.world.meter.spend()
        lines = [line for rollout in rollouts for line in rollout.feedback.splitlines()]
        wrong = [line.partition("wrong ")[2] for line in lines if "wrong " in line]
        rules = self.world.form.read(step.values["rules"])
        for fact in wrong[: self.reads]:
            keyword, _, right = fact.partition(": ")
            rules = self.world.improved(rules, keyword, right)
        value = self.world.form.write(step.parameters[0], rules) if wrong else None
        samples = tuple(rollout.sample_id for rollout in rollouts)
        return Proposal(values={"rules": value} if wrong else {}, reasoning="; ".join(wrong), sample_ids=samples)


class SimulatedMerge:
    """Reads the aggregation prompt and merges entry by entry, weighing confidence and support.

    A new entry is taken where it is not outvoted by another value of the same key; a current entry changes
    or goes only where more confidence asks for it than the current value has.
    """

    def __init__(self, world: World) -> None:
        self.world = world

    async def complete(self, messages: Any, **options: Any) -> Any:
        from aggregator.records import Choice, Completion, Message

        self.world.meter.spend()
        current, hold, suggestions = _sections(messages[1]["content"], self.world.form.read)
        merged = suggestions[0][1] if self.world.random.random() < MERGE_FAILURE else _merge(current, hold, suggestions)
        if len(messages) > 2:  # refused by a check: the same with fewer changes, and without deletions
            asked = [(name, team) for name, team in merged.items() if current.get(name) != team]
            merged = current | dict(asked[:FEWER])
        text = json.dumps({"suggestion": {"rules": self.world.form.write(None, merged)}})
        return Completion(choices=(Choice(message=Message(content=text)),))


def _sections(
    text: str, read: Callable[[Any], dict[str, str]]
) -> tuple[dict[str, str], float, list[tuple[float, dict[str, str]]]]:
    """The current entries and their confidence, and each suggestion's weight and entries.

    Where the reasoning behind a suggestion is shown, only the changes that it states are taken.
    """
    found: list[tuple[float, dict[str, str]]] = []
    for block in text.removeprefix("#").split("\n\n#"):
        lines, _, value = block.partition("\n{")
        values, end = json.JSONDecoder().raw_decode("{" + value)
        lines += value[end - 1 :]  # the evidence, below the value
        facts = dict(line.split(": ", 1) for line in lines.splitlines()[1:] if ": " in line)
        weight = float(facts["confidence"]) * int(facts.get("support", "1"))
        rules = read(values["rules"])
        if "reasoning" in facts:
            stated = dict(fact.split(": ", 1) for fact in facts["reasoning"].split("; "))
            rules = {**found[0][1], **{name: team for name, team in rules.items() if stated.get(name) == team}}
        found.append((weight, rules))
    return found[0][1], found[0][0], found[1:]


def _merge(current: dict[str, str], hold: float, suggestions: list[tuple[float, dict[str, str]]]) -> dict[str, str]:
    merged = dict(current)
    votes: dict[str, dict[str | None, float]] = {}
    for weight, rules in suggestions:
        for keyword in sorted({*rules, *current}):
            if rules.get(keyword) != current.get(keyword):
                asked = votes.setdefault(keyword, {})
                asked[rules.get(keyword)] = asked.get(rules.get(keyword), 0.0) + weight
    for keyword, asked in votes.items():
        value, weight = max(asked.items(), key=lambda item: item[1])
        tied = sum(other == weight for other in asked.values()) > 1
        if tied or (keyword in current and weight <= hold):
            continue
        if value is None:
            merged.pop(keyword, None)
        else:
            merged[keyword] = value
    return merged


def make_trainer(method: str, agent: Any, world: World) -> tuple[Any, int]:
    """A trainer for one method, and its batch size."""
    from msgspec.structs import replace

    from aggregator import AggregatedUpdate, LLMMerge, Minibatch, MinibatchAlgorithm, PrioritySearch, SequentialSearch
    from aggregator.gates import improves_on_batch, max_edit
    from aggregator.rules import best_tried, majority

    merge = LLMMerge(SimulatedMerge(world), evidence=method == "evidence")

    async def weighed(proposals: Any, step: Any) -> Any:
        return await merge(proposals, replace(step, satisfied=max(step.satisfied, 1)))

    optimizer = NoisyOptimizer(world, reads=3 if "3 read" in method else KEYWORDS)
    made = {
        "aggregated": lambda: AggregatedUpdate(agent, optimizer, rule=LLMMerge(SimulatedMerge(world))),
        "aggregated, gated": lambda: AggregatedUpdate(
            agent, optimizer, rule=LLMMerge(SimulatedMerge(world)), gate=improves_on_batch()
        ),
        "aggregated, skipping": lambda: AggregatedUpdate(
            agent, optimizer, rule=LLMMerge(SimulatedMerge(world)), skip_perfect=True, max_score=1.0
        ),
        "majority": lambda: AggregatedUpdate(agent, optimizer, rule=majority),
        "best of N": lambda: AggregatedUpdate(agent, optimizer, rule=best_tried),
        "sequential search": lambda: SequentialSearch(agent, optimizer, num_proposals=2),
        "priority search": lambda: PrioritySearch(agent, optimizer, num_candidates=2, num_proposals=2),
        "concatenated": lambda: MinibatchAlgorithm(agent, optimizer),
        "concatenated, 3 read": lambda: MinibatchAlgorithm(agent, optimizer),
        "one by one": lambda: Minibatch(agent, optimizer),
        "rules as text, max_edit": lambda: AggregatedUpdate(agent, optimizer, rule=merge, checks=[max_edit(0.2)]),
        "noisy agent, gated": lambda: AggregatedUpdate(agent, optimizer, rule=merge, gate=improves_on_batch()),
        "noisy agent, gated, repeats": lambda: AggregatedUpdate(agent, optimizer, rule=merge, gate=improves_on_batch()),
        "pairs, weighed": lambda: AggregatedUpdate(agent, optimizer, rule=weighed),
    }
    size = 1 if method == "one by one" else 2 if "pairs" in method else BATCH
    return made.get(method, lambda: AggregatedUpdate(agent, optimizer, rule=merge))(), size


def accuracy(method: str, noise: float, seed: int, budget: int) -> float:
    """Test accuracy of the current parameters when the budget is spent."""
    from aggregator import BudgetExceededError

    form = "text" if "as text" in method else "playbook" if method == "playbook" else "dict"
    world = World(seed, noise, Meter(budget), FORMS[form])
    world.slips = 0.2 if "noisy agent" in method else 0.0
    agent = make_agent(world)
    trainer, batch_size = make_trainer(method, agent, world)

    def guide(x: str, output: str, info: str) -> tuple[float, str]:
        return (1.0, "right") if output == info else (0.0, f"wrong {x}: {info}")

    with contextlib.suppress(BudgetExceededError):
        trainer.train(
            guide,
            world.data,
            batch_size=batch_size,
            seed=seed,
            max_concurrency=1,
            repeats=3 if "repeats" in method else 1,
        )
    rules = world.form.read(agent.rules.data)
    return sum(rules.get(keyword) == team for keyword, team in world.test) / len(world.test)


def series(method: str, noise: float, seeds: int, budget: int) -> dict[str, float]:
    """Accuracy of every seed, under its number."""
    return {str(seed): accuracy(method, noise, seed, budget) for seed in range(seeds)}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval (normal approximation, 30 seeds or more)."""
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), 1.96 * spread


def run(options: Options) -> Report:
    seeds, budget = (4, 200) if options.quick else (SEEDS, BUDGET)
    every = METHODS | OPTIONS
    names = [(method, noise) for noise in NOISES for method in every]
    cases = [
        Case(f"{method} / {noise}", call("quality", "series", method=method, noise=noise, seeds=seeds, budget=budget))
        for method, noise in names
    ]
    measured = measure(cases, Options(options.peers_python, 1, options.quick), repetitions=1)
    scores = {case.name: list(measured.figures[case.name][0].values()) for case in cases}
    rows = []
    for method, noise in names:
        mean, half = interval(scores[f"{method} / {noise}"])
        others = scores[f"aggregated / {noise}"]
        gain, gain_half = interval([a - b for a, b in zip(others, scores[f"{method} / {noise}"], strict=True)])
        figures = {"noise": noise, "accuracy": mean, "+-": half, "aggregated minus this": gain, "+- of it": gain_half}
        rows.append(Row(method, figures, note=every[method]))
    notes = [
        f"{seeds} seeds, {budget} calls each, minibatches of {BATCH}; intervals are 95 %, differences paired by seed.",
        f"The simulated merge is careless in {MERGE_FAILURE:.0%} of its calls. No language model is part of this.",
    ]
    return Report(rows=rows, targets=list[Target](), notes=notes)
