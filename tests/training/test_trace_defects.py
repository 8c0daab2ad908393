"""What goes wrong in Trace's trainer does not go wrong here: its thirty-five known defects, each with its test.

Most stand where the behaviour belongs; `DEFECTS` names them. Those that were nowhere else follow below.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from named_tests import missing
from training_fakes import Adder, ScriptedModel, additions, exact, from_feedback, section, suggest

from aggregator import AggregatedUpdate, LLMOptimizer, Module, TrainingWarning, bundle, evaluate
from aggregator.llm.client import LLM
from aggregator.simulation.model import SimulatedModel
from aggregator.training.merge import LLMMerge
from aggregator.training.prompts import AGGREGATOR_SYSTEM_PROMPT, PROPOSER_SYSTEM_PROMPT, REPLY_FORMAT

ROOT = Path(__file__).parents[2]
HERE = "training/test_trace_defects.py::"

DEFECTS: dict[int, tuple[str, ...]] = {
    1: ("training/test_isolation.py::test_sixty_operations_of_thirty_two_instances_never_mix",),
    2: (
        "training/test_isolation.py::test_sixty_operations_of_thirty_two_instances_never_mix",
        "adapters/test_trace.py::test_no_prompt_holds_another_instances_work",
    ),
    3: (
        "no formatter is imported, in threads or elsewhere",
        "agents/test_code.py::test_layout_is_not_held_against_code",
    ),
    4: (
        HERE + "test_use_asyncio_alone_makes_it_concurrent",
        "training/test_seed_api.py::test_no_argument_disappears_in_a_tunnel",
    ),
    5: ("training/test_trainer.py::test_train_works_under_a_running_loop", "test_portal.py::test_a_notebook_calls"),
    6: (
        HERE + "test_forward_runs_the_agent_it_is_given",
        "agents/test_bundles.py::test_concurrent_calls_share_nothing",
        "agents/test_bundles.py::test_threads_share_nothing",
    ),
    7: (
        "training/test_isolation.py::test_history_is_that_of_finished_steps_for_every_instance_of_a_batch",
        "adapters/test_trace.py::test_proposals_of_one_batch_do_not_see_each_other",
    ),
    8: ("agents/test_bundles.py::test_nothing_is_kept_after_a_run",),
    9: ("training/test_trainer.py::test_a_lost_call_is_excluded_not_scored_0",),
    10: (
        "training/test_trainer.py::test_a_failed_aggregation_applies_nothing_and_is_counted",
        "llm/test_structured.py::test_a_refused_form_is_stepped_down",
    ),
    11: (
        HERE + "test_an_agent_with_operations_is_saved_while_it_is_trained",
        "training/test_resume.py::test_a_resumed_run_ends_with_the_same_bytes",
        "training/test_killed_runs.py::test_a_killed_run_ends_with_the_bytes_of_an_unbroken_one",
    ),
    12: (HERE + "test_replies_that_change_nothing_stand_in_the_journal",),
    13: (
        "training/test_suggestions.py::test_value_becomes_the_parameters_type",
        "training/test_suggestions.py::test_value_of_another_type_is_refused",
        "training/test_suggestions.py::test_null_never_becomes_a_value",
        "agents/test_values.py::test_guesses_are_refused",
    ),
    14: ("training/test_suggestions.py::test_trailing_comma_does_not_corrupt_the_prompt",),
    15: (
        "training/test_suggestions.py::test_unreadable_reply_is_not_silently_no_update",
        "training/test_suggestions.py::test_corpus",
        "training/test_trainer.py::test_a_value_of_the_wrong_type_is_asked_for_once_more_and_never_applied",
    ),
    16: (
        "training/test_suggestions.py::test_prompt_with_the_word_def_is_kept",
        "agents/test_parameters.py::test_prompts_that_mention_code_words_are_kept",
    ),
    17: ("training/test_suggestions.py::test_terminate_in_the_reasoning_does_not_discard_the_proposal",),
    18: ("guides/test_judge.py::test_template_words_do_not_make_a_score",),
    19: (
        HERE + "test_aggregated_code_that_does_not_compile_is_not_installed",
        "agents/test_code.py::test_code_that_could_not_run_is_refused",
    ),
    20: (
        "training/test_trainer.py::test_stepsize_0_changes_nothing",
        "training/test_prompts.py::test_confidences_are_written_as_people_write_them",
    ),
    21: (
        "training/test_trainer.py::test_no_aggregation_is_paid_where_there_is_nothing_to_weigh",
        "training/test_rules.py::test_failed_proposals_do_not_vote_for_the_current_value",
    ),
    22: ("training/test_gates.py::test_threshold_has_the_right_sign",),
    23: (
        HERE + "test_a_failing_instance_under_ensure_improvement",
        "training/test_gates.py::test_missing_scores_are_paired_out",
    ),
    24: (
        "agents/test_parameters.py::test_colliding_names_are_refused",
        "agents/test_modules.py::test_names_are_unique_or_refused",
    ),
    25: (HERE + "test_the_prompts_agree_with_themselves",),
    26: (
        HERE + "test_a_broken_agent_does_not_look_like_a_bad_one",
        "training/test_interrupts.py::test_interrupts_raised_by_an_agent_leave_train",
        HERE + "test_an_interrupt_leaves_evaluate",
    ),
    27: (
        "training/test_batches.py::test_shuffle_false_keeps_the_order",
        "training/test_batches.py::test_order_depends_on_seed_and_epoch_and_nothing_else",
        "training/test_resume.py::test_the_global_random_generator_is_left_alone",
    ),
    28: ("training/test_trainer.py::test_a_run_learns_and_returns_what_it_reached",),
    29: ("training/test_trainer.py::test_every_default_works",),
    30: (
        "training/test_trainer.py::test_eval_frequency_0_is_off",
        "training/test_trainer.py::test_bad_arguments_say_what_was_expected",
    ),
    31: (
        "nothing is drawn, no program is started",
        "training/test_algorithms.py::test_minibatch_algorithm_asks_once_with_all_feedback",
    ),
    32: (
        HERE + "test_verbose_reaches_forward",
        "llm/test_names.py::test_traces_custom_backend",
        "llm/test_client.py::test_one_deadline_for_the_whole_call",
        "llm/test_client.py::test_usage_is_counted_by_role",
    ),
    33: (
        "sandbox/test_sandbox.py::test_what_goes_beyond_the_limits_is_an_error_and_the_run_goes_on",
        "training/test_sandboxed_training.py::test_bad_code_ends_as_feedback_and_the_run_goes_on",
    ),
    34: ("test_house_rules.py::test_import_is_light",),
    35: (HERE + "test_a_failing_check_fails",),
}
"""Defect -> tests; an entry without `::` is a reason why there is nothing to go wrong."""


def test_every_defect_has_its_tests() -> None:
    """All thirty-five are listed, and every test that is named exists."""
    assert list(DEFECTS) == list(range(1, 36))
    assert missing(test for tests in DEFECTS.values() for test in tests) == []
    assert [number for number, tests in DEFECTS.items() if not any("::" in test for test in tests)] == []


def scripted(agent: Any, *replies: Any, aggregator: Any = "never asked", **options: Any) -> AggregatedUpdate:
    optimizer = LLMOptimizer(llm=ScriptedModel(*(replies or [from_feedback])))
    return AggregatedUpdate(agent, optimizer, llm=ScriptedModel(aggregator), **options)


@pytest.mark.parametrize(("use_asyncio", "at_once"), [(True, 8), (False, 1)])
def test_use_asyncio_alone_makes_it_concurrent(use_asyncio: bool, at_once: int) -> None:
    """Trace swallowed the argument: without num_threads everything was sequential, with it or not."""
    running, most = 0, 0

    def jitter() -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        return 5

    def reply(_: Any) -> str:
        nonlocal running
        running -= 1
        return "TERMINATE"

    async def guide(x: int, output: int, info: int) -> tuple[float, str]:  # in no thread, so that all keep step
        return exact(x, output, info)

    optimizer = LLMOptimizer(llm=ScriptedModel(reply, jitter=jitter))
    run = AggregatedUpdate(Adder(), optimizer, use_asyncio, llm=ScriptedModel("x"))
    run.train(guide, additions(5, count=8), batch_size=8)
    assert most == at_once


def test_forward_runs_the_agent_it_is_given() -> None:
    """Trace's forward ignored its `agent` argument: neither run nor prompt may be of the trainer's own agent."""
    own, other = Adder(1), Adder(10)
    assert scripted(own).forward(other, 0, exact, 5).values == {"amount": 5}
    assert (own.amount.data, other.amount.data) == (1, 10)


class Operated(Adder):
    """Has an operation that is not trained, which Trace could not pickle."""

    @bundle()
    def shift(self, x: int) -> int:
        """Add the amount."""
        return x + self.amount.data

    async def forward(self, x: int) -> int:
        return self.shift(x)


def test_an_agent_with_operations_is_saved_while_it_is_trained(tmp_path: Path) -> None:
    """Every save_frequency steps, where save_path says, and an agent of the same class loads it."""
    path = tmp_path / "agent.json"
    scripted(Operated()).train(exact, additions(5), save_frequency=1, save_path=str(path))
    production = Operated()
    production.load(path)
    assert production.amount.data == 5
    assert [file.name for file in tmp_path.iterdir()] == ["agent.json"]


def test_replies_that_change_nothing_stand_in_the_journal(tmp_path: Path) -> None:
    """A TERMINATE was paid for like any other reply; Trace left it out of its log."""
    with SimulatedModel() as server:
        llm = LLM("openai-compatible/simulated-1", base_url=server.base_url)
        run = AggregatedUpdate(Adder(), LLMOptimizer(llm=llm), llm=llm)
        run.train(lambda x, output, info: (1.0, "Correct."), additions(1), run_dir=tmp_path / "run")
        asked = server.calls["optimizer"]
    journal = (tmp_path / "run" / "journal.yaml").read_text()
    assert asked == 4
    assert journal.count('"request":') == asked


def test_aggregated_code_that_does_not_compile_is_not_installed() -> None:
    """The aggregator's answer is held to the same as a proposal's; what is refused is a failure, not an update."""

    class Coded(Module):
        @bundle(trainable=True)
        def code(self, x: int) -> int:
            return x

        async def forward(self, x: int) -> int:
            return self.code(x)

    agent = Coded()
    before = agent.parameters()[0].data
    good = iter(range(9))

    def proposal(_: Any) -> str:
        return suggest(code__code=f"def code(self, x):\n    return x + {next(good)}")

    broken = suggest(code__code="def code(self, x:\n  retrn")
    result = scripted(agent, proposal, aggregator=broken).train(exact, additions(5), batch_size=4)
    assert agent.parameters()[0].data == before
    assert result.history[0].update == {}
    assert [(record.stage, record.error) for record in result.failures] == [("aggregation", "SuggestionError")]


@pytest.mark.parametrize("min_score", [None, 0.0])
def test_a_failing_instance_under_ensure_improvement(min_score: float | None) -> None:
    """Trace rejected the update without a word, or died of None minus a float: here the others decide, or min_score."""

    class Flaky(Adder):
        async def forward(self, x: int) -> int:
            if x == 0 and self.amount.data == 1:
                raise ZeroDivisionError("by zero")
            return await super().forward(x)

    agent = Flaky()
    run = scripted(agent, suggest(amount=5))
    result = run.train(exact, additions(5), batch_size=4, ensure_improvement=True, min_score=min_score)
    assert agent.amount.data == 5
    paired = 3 if min_score is None else 4
    assert result.history[0].decision.reason == f"mean score 0 -> 1 on {paired} instances"


def test_the_prompts_agree_with_themselves() -> None:
    """What the system prompt speaks of stands in the user prompt, and it asks for one form of reply, not for Python."""
    model = ScriptedModel(suggest(amount=7))
    optimizer = LLMOptimizer(llm=ScriptedModel(from_feedback))
    AggregatedUpdate(Adder(), optimizer, rule=LLMMerge(model)).train(exact, [(0, 5), (1, 9)], batch_size=2)
    (messages,) = model.asked
    for heading in set(re.findall(r"#\w+", AGGREGATOR_SYSTEM_PROMPT)):
        assert section(messages, heading[1:].replace("_i", "_1")) != ""
    for prompt in (AGGREGATOR_SYSTEM_PROMPT, PROPOSER_SYSTEM_PROMPT):
        assert prompt.endswith(REPLY_FORMAT)
        assert "python" not in prompt.lower()
    assert 'or, where only JSON can be sent, with an empty "suggestion"' in REPLY_FORMAT


class Broken(Adder):
    async def forward(self, x: int) -> int:
        return int(self.nonsense)  # type: ignore[attr-defined]


def test_a_broken_agent_does_not_look_like_a_bad_one() -> None:
    """A bad agent scores 0; one that raises has no score, unless min_score is given, and its error is told."""
    inputs, infos = zip(*additions(5), strict=True)
    assert evaluate(Adder(), exact, inputs, infos) == [0.0] * 4
    with pytest.warns(TrainingWarning, match="4 of 4 instances have no score; .*no attribute 'nonsense'"):
        assert evaluate(Broken(), exact, inputs, infos) == [None] * 4
    result = scripted(Broken(), "TERMINATE").train(exact, additions(5), min_score=0.0)
    assert {(record.stage, record.error) for record in result.failures} == {("agent", "AttributeError")}
    assert "nonsense" in result.failures[0].message


def test_an_interrupt_leaves_evaluate() -> None:
    """Trace's bare `except` turned KeyboardInterrupt into a list of None."""

    class Interrupted(Adder):
        async def forward(self, x: int) -> int:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(), exact, [0, 1], [0, 1])


def test_verbose_reaches_forward() -> None:
    """verbose="output" shows every output of the agent; Trace stopped it on the way."""
    logged: list[tuple[str, Any]] = []

    class Logger:
        def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
            logged.append((name, data))

    scripted(Adder(), "TERMINATE", logger=Logger()).train(exact, additions(5), batch_size=4, verbose="output")
    assert sorted(data for name, data in logged if name == "Output") == [1, 2, 3, 4]


def test_a_failing_check_fails() -> None:
    """Neither the Makefile nor the CI script lets a failure pass."""
    for file in (ROOT / "Makefile", ROOT / ".ci" / "run"):
        assert re.search(r"\|\|\s*(true|:)|continue-on-error|\bset \+e\b", file.read_text()) is None
    assert "set -euo pipefail" in (ROOT / ".ci" / "run").read_text()
