"""What Trace's users know has its place here: each feature of its library, with the tests that fail without it.

`FEATURES` names them. Those that stood nowhere else follow below.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from named_tests import missing
from training_fakes import Adder, ScriptedModel, additions, exact, from_feedback, section, suggest

from aggregator import (
    AggregatedUpdate,
    LLMJudge,
    LLMOptimizer,
    MinibatchAlgorithm,
    Module,
    ParameterNode,
    PrioritySearch,
    bundle,
    node,
    transcript,
)
from aggregator.records import Candidate, Decision, Proposal, Rollout, Values

HERE = "training/test_trace_features.py::"

PARAMETERS_AND_TRACING = {
    "trace.node(data, name, trainable, description, constraint)": (
        HERE + "test_node_takes_traces_arguments",
        "agents/test_parameters.py::test_node_is_traces_constructor",
    ),
    "ParameterNode": ("agents/test_parameters.py::test_a_parameter_says_what_it_is",),
    "bundle(description)": ("agents/test_bundles.py::test_operations_are_recorded",),
    "bundle(trainable): a function body as parameter": (
        "agents/test_bundles.py::test_the_source_is_the_parameter",
        "agents/test_bundles.py::test_the_current_source_runs",
    ),
    "bundle(traceable_code): what an operation does inside is traced": (
        HERE + "test_operations_inside_operations_are_traced",
    ),
    "bundle(catch_execution_error)": (
        "agents/test_bundles.py::test_errors_are_recorded_and_go_on",
        "training/test_trainer.py::test_an_agent_that_fails_is_feedback_and_scores_min_score",
    ),
    "bundle(allow_external_dependencies)": (HERE + "test_an_operation_may_read_parameters_that_are_no_inputs",),
    "bundle(overwrite_python_recursion)": ("agents/test_bundles.py::test_new_source_calls_itself",),
    "trace.model": (
        "agents/test_model_decorator.py::test_a_class_becomes_a_module_with_a_constructor_of_its_own",
        "agents/test_model_decorator.py::test_it_is_trained",
    ),
    "Module.parameters, parameters_dict": ("agents/test_modules.py::test_names_are_attribute_paths",),
    "Module.save, load": ("agents/test_modules.py::test_what_was_saved_is_loaded",),
    "containers Seq and Map": (
        "plain lists and dicts are containers, there is no class for them",
        "agents/test_modules.py::test_names_are_attribute_paths",
    ),
    "operators, iterators and broadcasting on nodes": (
        "`.data` is a plain value, so all of Python works on it; no node stands in between",
        HERE + "test_all_of_python_works_on_values",
    ),
    "ExceptionNode.create_feedback('full')": (
        "training/test_trainer.py::test_an_agent_that_fails_is_feedback_and_scores_min_score",
        "agents/test_bundles.py::test_an_error_in_trained_code_is_the_agents_own",
    ),
    "backward(visualize, print_limit)": (
        "agents/test_drawing.py::test_operations_stand_under_their_caller_and_after_one_another",
        "agents/test_drawing.py::test_long_values_and_long_runs_are_cut",
    ),
    "backward(reverse_plot)": (
        "the first line of the Mermaid text says the direction: TD, or BT for the reverse",
        "agents/test_drawing.py::test_nothing_that_was_done_is_an_empty_picture",
    ),
    "backward(retain_graph), zero_feedback, detach": (
        "no graph is there to be kept, cleared or left: feedback is an argument, a transcript belongs to its pass",
        "training/test_proposers.py::test_the_same_rollout_gives_the_same_prompt",
        "agents/test_transcripts.py::test_a_transcript_belongs_to_its_context",
        "agents/test_bundles.py::test_nothing_is_kept_after_a_run",
    ),
    "clone": (
        "agents/test_modules.py::test_each_instance_has_its_own_code",
        "agents/test_parameters.py::test_what_was_read_is_out_of_the_agents_reach",
    ),
    "GraphPropagator: the subgraph as feedback": (
        "training/test_proposers.py::test_the_prompt_holds_this_instance_and_the_reply_is_typed",
        "training/test_isolation.py::test_sixty_operations_of_thirty_two_instances_never_mix",
    ),
}

TRAINERS = {
    "train(guide, train_dataset)": ("training/test_trainer.py::test_a_run_learns_and_returns_what_it_reached",),
    "train(ensure_improvement)": ("training/test_trainer.py::test_refused_updates_leave_the_agent_untouched",),
    "train(improvement_threshold)": (
        HERE + "test_improvement_threshold_reaches_the_gate",
        "training/test_gates.py::test_threshold_has_the_right_sign",
    ),
    "train(num_epochs, batch_size)": (HERE + "test_epochs_and_batches_make_the_steps",),
    "train(test_dataset, eval_frequency)": (
        "training/test_trainer.py::test_eval_frequency_counts_steps_and_the_end_is_always_evaluated",
        "training/test_trainer.py::test_eval_frequency_0_is_off",
    ),
    "train(log_frequency)": (HERE + "test_log_frequency_counts_steps",),
    "train(save_frequency, save_path)": (
        "training/test_trace_defects.py::test_an_agent_with_operations_is_saved_while_it_is_trained",
        HERE + "test_save_frequency_counts_steps",
    ),
    "train(min_score)": ("training/test_trainer.py::test_an_agent_that_fails_is_feedback_and_scores_min_score",),
    "train(verbose=True)": (HERE + "test_verbose_prints_scores_and_parameters",),
    'train(verbose="output")': ("training/test_trace_defects.py::test_verbose_reaches_forward",),
    "train(num_threads)": (HERE + "test_num_threads_bounds_how_many_run_at_once",),
    "MinibatchAlgorithm, batchify": (
        "training/test_algorithms.py::test_minibatch_algorithm_asks_once_with_all_feedback",
    ),
    "BasicSearchAlgorithm(num_proposals, validate_dataset)": (
        "training/test_algorithms.py::test_basic_search_keeps_the_best_candidate",
    ),
    "BasicSearchAlgorithm(validate_guide)": (
        "training/test_algorithms.py::test_basic_search_may_validate_with_a_guide_of_its_own",
    ),
    "BasicSearchAlgorithm: the current value is a candidate": (
        "training/test_algorithms.py::test_basic_search_keeps_the_current_value_where_it_is_best",
    ),
    "AggregatedUpdate(stepsize)": (
        "training/test_trainer.py::test_proposals_are_independent_and_the_aggregator_sees_all_of_them",
        "training/test_trainer.py::test_stepsize_0_changes_nothing",
    ),
    "AggregatedUpdate(llm, max_tokens)": (HERE + "test_the_aggregator_has_a_model_and_a_limit_of_its_own",),
    "AggregatedUpdate.aggregator_system_prompt": (
        "training/test_trainer.py::test_aggregator_system_prompt_can_be_set_on_a_subclass",
    ),
    "hook forward": (
        "training/test_trainer.py::test_an_overridden_forward_is_honoured",
        "training/test_trainer.py::test_an_overridden_forward_may_call_super",
    ),
    "hook update": ("training/test_trainer.py::test_an_overridden_update_is_honoured",),
    "hook has_improvement": (HERE + "test_a_gate_of_ones_own_says_what_is_an_improvement",),
    "hook optimizer_step": (HERE + "test_an_overridden_propose_is_honoured",),
    "hook save_agent": (HERE + "test_an_overridden_save_is_honoured",),
    "evaluate": ("training/test_trace_defects.py::test_a_broken_agent_does_not_look_like_a_bad_one",),
}

GUIDES_DATA_AND_LOGS = {
    "any callable (x, output, info) -> (score, feedback)": (
        "guides/test_calling.py::test_answers_of_guides",
        "guides/test_calling.py::test_kinds_of_callables",
    ),
    "AutoGuide": ("guides/test_calling.py::test_guides_of_trace_are_taken",),
    "VerbalJudgeGuide(model, prompt_template, system_prompt)": (
        "guides/test_judge.py::test_prompt",
        "guides/test_judge.py::test_verdict_is_typed",
        HERE + "test_a_judge_has_a_system_prompt_of_its_own",
    ),
    "VerbalJudgeGuide(correctness_template)": (
        "a verdict is a typed number, no word to be looked for",
        "guides/test_judge.py::test_template_words_do_not_make_a_score",
    ),
    "exact_match_metric": ("guides/test_exact.py::test_scores",),
    "SimpleReferenceSuggest": ("guides/test_exact.py::test_feedback_names_what_was_expected",),
    "ReferenceSuggest: a model compares with the reference": ("guides/test_judge.py::test_prompt",),
    "KeywordSuggest: JSON of keyword to hint, custom analyzers": (
        "guides/test_pattern.py::test_hints_from_a_file",
        "guides/test_pattern.py::test_analyzers_add_hints",
    ),
    "DataLoader(dataset, batch_size, replacement, shuffle)": (
        "training/test_batches.py::test_every_form_of_a_dataset_reads_the_same",
        "training/test_batches.py::test_replacement_draws_with_repeats",
        "training/test_batches.py::test_shuffle_false_keeps_the_order",
    ),
    "DefaultLogger.log(name, data, step, color)": (
        "observing/test_progress.py::test_console_logger_has_traces_shape",
        "observing/test_progress.py::test_colors_only_where_they_show",
    ),
    "tqdm bars with description": ("observing/test_progress.py::test_terminal_progress_is_one_bar",),
    "checkpoints": ("training/test_resume.py::test_a_resumed_run_ends_with_the_same_bytes",),
}

OPTIMIZERS = {
    "OptoPrime(objective)": ("training/test_proposers.py::test_the_prompt_holds_this_instance_and_the_reply_is_typed",),
    "OptoPrime(memory_size)": (
        "training/test_proposers.py::test_memory_recalls_the_latest_updates_with_their_verdicts",
    ),
    "OptoPrime(max_tokens)": (HERE + "test_max_tokens_reaches_the_optimizers_model",),
    "OptoPrime(include_example)": (
        "training/test_prompt_layout.py::test_include_example_puts_a_worked_example_in_front",
    ),
    "OptoPrime(prompt_symbols)": ("training/test_prompt_layout.py::test_prompt_symbols_rename_headings",),
    "OptoPrime.step(mask)": (
        "training/test_prompt_layout.py::test_a_mask_leaves_sections_out",
        "training/test_proposers.py::test_parameters_of_the_optimizer_limit_what_changes",
    ),
    "OptoPrime(log)": ("training/test_trace_defects.py::test_replies_that_change_nothing_stand_in_the_journal",),
    "OptoPrime(ignore_extraction_error)": (
        "training/test_suggestions.py::test_unreadable_reply_is_not_silently_no_update",
        "training/test_suggestions.py::test_update_dict_leaves_out_or_raises",
    ),
    "HTML of the step in notebooks": (
        "test_views.py::test_a_step_shows_the_verdict_and_its_reason",
        "test_views.py::test_everything_is_escaped",
    ),
    "OPRO": ("training/test_proposers.py::test_opro_recalls_the_best_in_ascending_order",),
    "TextGrad": ("training/test_textgrad.py::test_the_criticism_takes_the_feedbacks_place",),
    "TextGrad's gradient reduction": ("training/test_textgrad.py::test_a_minibatch_has_one_gradient",),
    "OptoPrimeMulti(num_responses)": (
        "training/test_proposers.py::test_several_candidates_are_asked_apart_and_become_one_proposal",
    ),
    "OptoPrimeMulti: temperature_variation": (
        "training/test_variations.py::test_temperatures_are_spread_from_the_highest_to_the_lowest",
    ),
    "OptoPrimeMulti: self_refinement": (
        "training/test_variations.py::test_a_refinement_sees_the_candidate_before_and_the_last_is_taken",
    ),
    "OptoPrimeMulti: iterative_alternatives": (
        "training/test_variations.py::test_an_alternative_sees_all_before_and_a_model_chooses",
    ),
    "OptoPrimeMulti: multi_experts, experts list, moa": (
        "training/test_variations.py::test_experts_speak_in_front_of_the_system_prompt_and_a_model_merges",
    ),
    "OptoPrimeMulti: best_of_n": (
        "training/test_selections.py::test_a_model_chooses_one_as_it_is",
        "training/test_selections.py::test_candidates_are_tried_on_the_instance_they_are_for",
    ),
    "OptoPrimeMulti: majority": ("training/test_rules.py::test_majority_counts_instances",),
    "OptoPrimeMulti: last_of_n": ("training/test_selections.py::test_the_last_that_asks_for_anything",),
    "OptoPrimeMulti: parallel calls": ("training/test_variations.py::test_what_need_not_wait_is_asked_at_once",),
    "OptoprimeBatchOpt": ("training/test_algorithms.py::test_minibatch_algorithm_asks_once_with_all_feedback",),
    "Trace's own optimizers and agents": (
        "adapters/test_trace.py::test_the_training_loop_runs_on_a_trace_agent",
        "adapters/test_trace.py::test_parameters_are_ours",
    ),
}

MODELS = {
    "backend LiteLLM": ("llm/test_adapters.py::test_litellm", "llm/test_names.py::test_traces_variables"),
    "backend AutoGen": ("llm/test_names.py::test_traces_autogen_backend",),
    "backend CustomLLM": ("llm/test_names.py::test_traces_custom_backend",),
    "TRACE_DEFAULT_LLM_BACKEND, TRACE_LITELLM_MODEL": ("llm/test_names.py::test_traces_variables",),
    "llm(messages=...) with OpenAI's shape": (
        "llm/test_client.py::test_an_answer_has_text_usage_and_openais_shape",
        "llm/test_client.py::test_synchronous_call",
    ),
    "reset_freq": (
        "a client is not made anew every so often: connections that idle or die are replaced one by one",
        "llm/test_transport.py::test_a_used_connection_that_died_is_replaced_at_once",
        "llm/test_transport.py::test_idle_connections_are_dropped_before_servers_drop_them",
    ),
}

EXPERIMENTAL = {
    "PrioritySearch": (
        "training/test_search.py::test_a_search_leaves_the_trap",
        "training/test_search.py::test_memory_is_bounded",
        "training/test_search.py::test_ucb_explores_the_little_tried",
    ),
    "SequentialUpdate, SequentialSearch": (
        "training/test_search.py::test_sequential_update_always_goes_on",
        "training/test_search.py::test_a_refused_candidate_is_told_with_its_reason",
    ),
    "BeamSearch": ("training/test_search.py::test_a_search_leaves_the_trap",),
    "ParetobasedPS": ("training/test_search.py::test_pareto_keeps_specialists",),
    "StreamingPrioritySearch": (
        "new candidates are tried on the next minibatch where a subclass's `due` returns none",
        "training/test_search.py::test_new_candidates_may_be_tried_on_the_next_minibatch",
    ),
    "POLCA: an epsilon-net over embeddings, a summarizer": (
        "no embedding model is at hand to depend on: a subclass's `keep` or `ranked` decides what is remembered",
        HERE + "test_a_search_of_ones_own_keeps_candidates_apart",
    ),
    "Console logger": ("observing/test_progress.py::test_console_logger_has_traces_shape",),
    "Tensorboard logger": (
        "observing/test_trackers.py::test_tensorboard_reads_numbers_as_scalars_and_the_rest_as_text",
        "observing/test_trackers.py::test_a_run_logs_to_tensorboard",
    ),
    "Wandb logger": (
        "observing/test_trackers.py::test_wandb_gets_numbers_and_texts_under_their_step",
        "observing/test_trackers.py::test_the_real_wandb_takes_it",
    ),
    "auto_retry": (
        "llm/test_retry.py::test_what_may_pass_is_tried_again",
        "llm/test_client.py::test_transient_errors_get_the_attempts_set",
    ),
    "OptoPrimeV2, OPROv2: symbol sets for replies": (
        "one form of reply, JSON, in whatever wrapping models give it",
        "training/test_suggestions.py::test_every_wrapping_gives_back_the_suggestion",
        "training/test_prompt_layout.py::test_prompt_symbols_rename_headings",
    ),
    "projections: normalised suggestions": (
        "training/test_suggestions.py::test_value_becomes_the_parameters_type",
        "agents/test_code.py::test_layout_is_not_held_against_code",
    ),
    "resume()": ("training/test_killed_runs.py::test_a_killed_run_ends_with_the_bytes_of_an_unbroken_one",),
    "asynchronous trainer": (
        "executors/test_local.py::test_results_stand_in_sample_order_whatever_finishes_first",
        "training/test_trainer.py::test_atrain_runs_on_the_callers_loop",
    ),
}

GROUPS = (PARAMETERS_AND_TRACING, TRAINERS, GUIDES_DATA_AND_LOGS, OPTIMIZERS, MODELS, EXPERIMENTAL)
FEATURES: dict[str, tuple[str, ...]] = {name: tests for group in GROUPS for name, tests in group.items()}
"""Feature of Trace -> tests; an entry without `::` says in what ours differs."""


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_has_its_tests(feature: str) -> None:
    """At least one is named, and every one that is named exists."""
    assert any("::" in test for test in FEATURES[feature])
    assert missing(FEATURES[feature]) == []


class Logger:
    """Trace's logger, remembering."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, Any, int]] = []

    def log(self, name: str, data: Any, step: int, **kwargs: Any) -> None:
        self.logged.append((name, data, step))


def scripted(agent: Any, *replies: Any, **options: Any) -> AggregatedUpdate:
    optimizer = LLMOptimizer(llm=ScriptedModel(*(replies or [from_feedback])))
    return AggregatedUpdate(agent, optimizer, llm=ScriptedModel("never asked"), **options)


def test_node_takes_traces_arguments() -> None:
    """In their order, with Trace's defaults; what it says of itself stands in the prompt."""
    greeting = node("Hello", "greeting", True, "said first", "polite")  # noqa: FBT003 - Trace's order
    assert (greeting.data, greeting.name, greeting.trainable) == ("Hello", "greeting", True)
    assert greeting.describe() == {
        "value": "Hello",
        "type": "str",
        "description": "said first",
        "constraint": "polite",
    }


@bundle()
def scaled(x: int) -> int:
    return 3 * x


@bundle()
def summed(x: int) -> int:
    return scaled(x) + scaled(1)


def test_operations_inside_operations_are_traced() -> None:
    """Always, not only where traceable_code asks for it."""
    with transcript() as seen:
        summed(2)
    assert seen.render() == (
        "summed\n  x: 2\n  scaled\n    x: 2\n    returned: 6\n  scaled\n    x: 1\n    returned: 3\n  returned: 9"
    )


def test_an_operation_may_read_parameters_that_are_no_inputs() -> None:
    """Trace raises where a node is read that was not passed in; here it is the agent's own affair, and is trained."""
    outside = ParameterNode(3)

    @bundle()
    def scale(x: int) -> int:
        return x * outside.data

    class Scaler(Module):
        factor = outside

        def forward(self, x: int) -> int:
            return scale(x)

    agent = Scaler()
    assert scripted(agent, suggest(factor=7)).train(exact, [(1, 7)]).parameters == {"factor": 7}
    assert agent(2) == 14


class Weights(Module):
    def __init__(self) -> None:
        self.weights = ParameterNode([1, 1])
        self.names = ParameterNode({"bias": 0})

    @bundle()
    def score(self, xs: list[int]) -> int:
        return sum(w * x for w, x in zip(self.weights.data, xs, strict=True)) + self.names.data["bias"]

    def forward(self, xs: list[int]) -> int:
        return self.score(xs)


def test_all_of_python_works_on_values() -> None:
    """Operators, iteration, keys, functions of others: on what a parameter holds, and training changes it."""
    agent = Weights()
    scripted(agent, suggest(weights=[2, 3], names={"bias": 1})).train(exact, [([1, 1], 6)])
    assert agent([1, 1]) == 6
    assert [weight + 1 for weight in agent.weights.data] == [3, 4]


@pytest.mark.parametrize(("threshold", "accepted"), [(0.2, True), (0.9, False)])
def test_improvement_threshold_reaches_the_gate(threshold: float, accepted: bool) -> None:
    """An update from 0.25 to 1 is enough for 0.2, and not for 0.9."""
    agent = Adder()
    data = [(0, 1), *additions(5, 4)[1:]]

    def guide(x: int, output: int, info: int) -> tuple[float, str]:
        return (1.0, "right") if output >= info else (0.0, f"expected {info}, got {output}")

    result = scripted(agent, suggest(amount=5)).train(
        guide, data, batch_size=4, ensure_improvement=True, improvement_threshold=threshold
    )
    assert result.train_scores == [0.25]
    assert result.history[0].decision.accepted is accepted
    assert agent.amount.data == (5 if accepted else 1)


def test_epochs_and_batches_make_the_steps() -> None:
    """Every instance once an epoch, `batch_size` of them at a step, the last batch what is left."""
    result = scripted(Adder(), "TERMINATE").train(exact, additions(5, 5), batch_size=2, num_epochs=3)
    assert [len(report.sample_ids) for report in result.history] == [2, 2, 1] * 3
    assert [report.epoch for report in result.history] == [0] * 3 + [1] * 3 + [2] * 3
    for epoch in range(3):
        ids = [i for report in result.history[3 * epoch : 3 * epoch + 3] for i in report.sample_ids]
        assert sorted(ids) == list(range(5))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"log_frequency": 2}, [1, 3]),
        ({"log_frequency": 1, "eval_frequency": 0}, [0, 1, 2, 3]),
        ({"log_frequency": 0}, []),
        ({"eval_frequency": 4}, [3]),
    ],
)
def test_log_frequency_counts_steps(options: dict[str, int], steps: list[int]) -> None:
    """The train score is logged every so many steps, 0 is never, by default whenever the test set is due."""
    logger = Logger()
    scripted(Adder(), "TERMINATE", logger=logger).train(exact, additions(5), **options)  # type: ignore[arg-type]
    assert [step for name, _, step in logger.logged if name == "Average train score"] == steps


class Saved(Adder):
    """Remembers where it was saved."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[str] = []

    def save(self, path: Any, **options: Any) -> None:
        self.saved.append(str(path))


def test_save_frequency_counts_steps() -> None:
    """None or 0 saves nothing; 2 saves after every second step."""
    for frequency, saves in ((None, 0), (0, 0), (1, 4), (2, 2), (3, 1)):
        agent = Saved()
        scripted(agent, "TERMINATE").train(exact, additions(5), save_frequency=frequency, save_path="here.json")
        assert agent.saved == ["here.json"] * saves


def test_an_overridden_save_is_honoured() -> None:
    """Trace's save_agent: an agent that knows better how to be saved says so in `save`."""
    agent = Saved()
    scripted(agent).train(exact, additions(5), save_frequency=4)
    assert agent.saved == ["checkpoints/agent.json"]


def test_verbose_prints_scores_and_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    """To standard output, where no logger is given; nothing without it."""
    scripted(Adder()).train(exact, additions(5), batch_size=4, test_dataset=additions(5))
    assert capsys.readouterr().out == ""
    scripted(Adder()).train(exact, additions(5), batch_size=4, test_dataset=additions(5), verbose=True)
    assert capsys.readouterr().out.splitlines() == [
        "[step 0] Average test score before training: 0",
        "[step 0] Average train score: 0",
        "[step 0] Average test score: 1",
        "[step 0] Parameter: amount: 5",
        "[step 0] Calls so far: 4",
        "[step 0] Tokens so far: 60",
        "[step 0] USD so far: 0.4",
    ]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_num_threads_bounds_how_many_run_at_once(num_threads: int) -> None:
    """It is Trace's name for max_concurrency."""
    running, most = 0, 0

    def turns() -> int:
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

    optimizer = LLMOptimizer(llm=ScriptedModel(reply, jitter=turns))
    trainer = AggregatedUpdate(Adder(), optimizer, llm=ScriptedModel("never asked"))
    trainer.train(guide, additions(5, 8), batch_size=8, num_threads=num_threads)
    assert most == num_threads


def test_the_aggregator_has_a_model_and_a_limit_of_its_own() -> None:
    """`llm` and `max_tokens` of the trainer are the aggregator's, not the optimizer's."""
    optimizer, aggregator = ScriptedModel(from_feedback), ScriptedModel(suggest(amount=5))
    trainer = AggregatedUpdate(Adder(), LLMOptimizer(llm=optimizer), llm=aggregator, max_tokens=77)
    trainer.train(exact, [(0, 5), (1, 9)], batch_size=2)
    assert [options["max_tokens"] for options in aggregator.options] == [77]
    assert {options["max_tokens"] for options in optimizer.options} == {4096}


def test_max_tokens_reaches_the_optimizers_model() -> None:
    """Every call of it carries the limit."""
    model = ScriptedModel("TERMINATE")
    trainer = AggregatedUpdate(Adder(), LLMOptimizer(llm=model, max_tokens=55), llm=ScriptedModel("never asked"))
    trainer.train(exact, additions(5, 2), batch_size=2)
    assert [options["max_tokens"] for options in model.options] == [55, 55]


def test_a_gate_of_ones_own_says_what_is_an_improvement() -> None:
    """Trace's has_improvement: it sees the values before and after, and the minibatch."""
    seen: list[tuple[Values, Values, int]] = []

    async def only_small(before: Values, after: Values, batch: Any) -> Decision:
        seen.append((before, after, len(batch)))
        return Decision(accepted=after["amount"] < 5, reason="small enough")

    agent = Adder()
    scripted(agent, suggest(amount=9), gate=only_small).train(exact, additions(5), batch_size=4)
    assert seen == [({"amount": 1, "label": "sum"}, {"amount": 9, "label": "sum"}, 4)]
    assert agent.amount.data == 1


class Doubting(AggregatedUpdate):
    """Takes half of what its optimizer proposes."""

    async def propose(self, seen: Rollout) -> Proposal:
        proposal = await super().propose(seen)
        return Proposal(values={"amount": proposal.values["amount"] // 2}, sample_ids=proposal.sample_ids)


def test_an_overridden_propose_is_honoured() -> None:
    """Trace's optimizer_step, for one instance; in MinibatchAlgorithm for a whole minibatch."""
    agent = Adder()
    Doubting(agent, LLMOptimizer(llm=ScriptedModel(suggest(amount=8))), llm=ScriptedModel("never asked")).train(
        exact, additions(5, 1)
    )
    assert agent.amount.data == 4

    class Fixed(MinibatchAlgorithm):
        async def propose(self, seen: Rollout) -> Proposal:
            return Proposal(values={"amount": len(str(seen.feedback).splitlines())})

    Fixed(other := Adder(), None).train(exact, additions(5, 3), batch_size=3)
    assert other.amount.data == 3


async def test_a_judge_has_a_system_prompt_of_its_own() -> None:
    """And criteria of its own in the rest of the prompt."""
    model = ScriptedModel('{"score": 1.0, "feedback": "good"}')
    await LLMJudge(model, system_prompt="You are strict.", criteria="Be brief.")("2 + 2?", "4", 4)
    (messages,) = model.asked
    assert messages[0]["content"] == "You are strict."
    assert section(messages, "Criteria") == "Be brief."


class Apart(PrioritySearch):
    """Remembers no two candidates within 3 of each other: POLCA's net, with a distance of our own."""

    def keep(self, in_force: Candidate, others: Sequence[Candidate]) -> list[Candidate]:
        kept = [in_force]
        for other in self.ranked(others):
            if all(abs(other.values["amount"] - near.values["amount"]) >= 3 for near in kept):
                kept.append(other)
        return kept[: self.memory_size]


def test_a_search_of_ones_own_keeps_candidates_apart() -> None:
    """Which candidates are too much alike is one function, with an embedding model or without."""
    replies = iter(range(2, 99))
    model = ScriptedModel(lambda _: suggest(amount=next(replies)))
    search = Apart(Adder(), LLMOptimizer(llm=model), num_candidates=2, num_proposals=3, memory_size=8)
    result = search.train(lambda x, output, info: output / 100, [(0, 0)], num_epochs=4)
    amounts = sorted(candidate.values["amount"] for candidate in result.candidates)
    assert len(amounts) > 2
    assert min(b - a for a, b in pairwise(amounts)) >= 3


def test_no_feature_hides_another() -> None:
    """The groups of the table have no name in common."""
    assert len(FEATURES) == sum(map(len, GROUPS))
