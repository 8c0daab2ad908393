"""What recordings, servers and other clients taught: fifteen requirements, clause by clause, each with its tests.

Each stands where the behaviour belongs; the tables name it.
"""

from __future__ import annotations

from named_tests import missing

OPENAI, ANTHROPIC, GEMINI = (f"llm/test_codec_{name}.py::" for name in ("openai", "anthropic", "gemini"))
FAILURES, STREAMS = "llm/test_codec_failures.py::", "llm/test_codec_streams.py::"
CLIENT, TRANSPORT, CANCEL, BUDGET = (f"llm/test_{name}.py::" for name in ("client", "transport", "cancel", "budget"))
LIMITER, RETRY, STRUCTURED, NAMES = (f"llm/test_{name}.py::" for name in ("limiter", "retry", "structured", "names"))
WHOLE = "llm/test_client_whole.py::"
FOREIGN, PEERS = "cassettes/test_foreign.py::", "peers/test_real_servers.py::"

REQUIREMENTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "one session per event loop": (
            TRANSPORT + "test_idle_connections_are_dropped_before_servers_drop_them",
            TRANSPORT + "test_a_script_that_closes_nothing_ends_without_a_word",
        ),
        "no limit of connections": (TRANSPORT + "test_more_than_a_hundred_at_once",),
        "idle connections are kept 4 s at most": (
            TRANSPORT + "test_idle_connections_are_dropped_before_servers_drop_them",
            WHOLE + "test_the_defaults_of_connections",
        ),
        "no cookie jar": (WHOLE + "test_no_cookies_by_name_either",),
        "no redirects": (TRANSPORT + "test_redirects_are_not_followed",),
        "5 s to connect": (
            WHOLE + "test_a_server_that_takes_no_connection",
            WHOLE + "test_the_defaults_of_connections",
        ),
        "600 s in all": (WHOLE + "test_a_call_may_take_ten_minutes",),
        "a deadline for each call": (TRANSPORT + "test_the_deadline_ends_a_request",),
        "only encodings that can be decoded": (
            OPENAI + "test_request_says_what_was_said_and_nothing_else",
            TRANSPORT + "test_compressed_bodies_are_decompressed",
        ),
    },
    2: {
        "a used connection that is dead is replaced at once": (
            TRANSPORT + "test_a_used_connection_that_died_is_replaced_at_once",
            WHOLE + "test_the_replacement_is_not_taken_from_the_pool",
        ),
        "a new one is not": (TRANSPORT + "test_a_new_connection_that_dies_is_not_replaced",),
        "nor one whose answer has begun": (WHOLE + "test_an_answer_that_has_begun_is_not_asked_for_again",),
        "outside of the attempts": (WHOLE + "test_a_dead_connection_is_no_attempt",),
        "llama-server after 5 s idle": (PEERS + "test_no_call_is_lost_on_a_connection_that_the_server_just_closed",),
    },
    3: {
        "408, 409, 429, 5xx, lost connections are tried again": (
            CLIENT + "test_transient_errors_get_the_attempts_set",
            RETRY + "test_what_may_pass_is_tried_again",
        ),
        "0.5 s doubling to 8, with jitter": (RETRY + "test_backoff_doubles_to_its_ceiling_with_jitter_downwards",),
        "Retry-After in ms, seconds, fractions, as a date; 0 is absent": (FAILURES + "test_how_long_to_wait",),
        "Retry-After is waited for": (
            CLIENT + "test_retry_after_is_waited_for",
            RETRY + "test_retry_after_replaces_the_backoff",
        ),
        "Gemini's retryDelay": (FAILURES + "test_gemini_says_its_wait_in_the_body",),
        "ignored on 2xx": (CLIENT + "test_retry_after_on_an_answer_is_ignored",),
        "capped, then failing fast with retry_after": (
            CLIENT + "test_retry_after_beyond_the_cap_fails_fast",
            RETRY + "test_a_wait_too_long_is_given_up",
        ),
        "x-should-retry": (
            RETRY + "test_x_should_retry_is_obeyed",
            FAILURES + "test_should_retry",
            WHOLE + "test_the_client_obeys_x_should_retry",
        ),
        "never quota, context overflow, auth, 400, 404, 413, 422": (
            CLIENT + "test_permanent_errors_are_tried_once",
            RETRY + "test_what_stays_wrong_is_not",
        ),
    },
    4: {
        "one attempt budget, fallbacks included": (STRUCTURED + "test_the_forms_count_in_the_attempts",),
        "one deadline, waits and fallbacks included": (
            CLIENT + "test_one_deadline_for_the_whole_call",
            CLIENT + "test_no_wait_that_would_outlast_the_deadline",
            WHOLE + "test_other_forms_share_the_deadline",
        ),
        "no call again after any exception": (WHOLE + "test_what_is_no_failure_of_a_call_is_not_tried_again",),
    },
    5: {
        "shared per (base_url, key, model)": (
            LIMITER + "test_the_strictest_limits_of_an_account_count",
            WHOLE + "test_clients_of_one_account_share_its_limits",
        ),
        "a 429 pauses all callers": (
            LIMITER + "test_a_429_pauses_all_callers",
            WHOLE + "test_limits_hold_for_every_call_of_a_client",
        ),
        "adaptive": (LIMITER + "test_an_unknown_limit_is_found_from_its_429s",),
        "requests per minute": (
            LIMITER + "test_requests_per_minute_hold_in_every_minute",
            WHOLE + "test_limits_hold_for_every_call_of_a_client",
        ),
        "tokens per minute": (
            LIMITER + "test_tokens_per_minute",
            WHOLE + "test_limits_hold_for_every_call_of_a_client",
        ),
        "rate-limit headers hold back": (
            LIMITER + "test_headers_hold_back_what_they_would_refuse",
            WHOLE + "test_limits_hold_for_every_call_of_a_client",
        ),
        "in every family and every form": (
            LIMITER + "test_families_of_header_names",
            LIMITER + "test_every_recorded_form_of_a_reset_is_read",
        ),
    },
    6: {
        "every field may be absent or odd": (
            OPENAI + "test_odd_bodies_are_read",
            "llm/test_conformance.py::test_one_damaged_field_costs_that_field_at_most",
        ),
        "content is text, parts, object, null or absent": (OPENAI + "test_text_of_every_content",),
        "unknown keys and blocks": (ANTHROPIC + "test_blocks", GEMINI + "test_parts"),
        "unknown finish reasons": (
            OPENAI + "test_finish_reasons",
            ANTHROPIC + "test_stop_reasons",
            GEMINI + "test_finish_reasons",
        ),
        "white space before the body": (OPENAI + "test_odd_bodies_are_read",),
        "raw bytes are kept": (OPENAI + "test_refusal_and_identity",),
        "thinking is no part of the text": (
            OPENAI + "test_reasoning_stands_apart",
            "llm/test_codec_openai_shapes.py::test_every_shape_is_read",
            ANTHROPIC + "test_blocks",
            GEMINI + "test_parts",
            STREAMS + "test_thinking_is_no_delta",
        ),
        "recorded answers, all": ("llm/test_conformance.py::test_every_recorded_answer_is_read_right",),
    },
    7: {
        "an error, no choices, no message, no body, no JSON": (OPENAI + "test_a_200_that_is_no_answer",),
        "no content": (ANTHROPIC + "test_a_200_that_is_no_answer",),
        "no candidates, a blocked prompt": (GEMINI + "test_a_200_that_is_no_answer",),
        "an error within a stream": (STREAMS + "test_streams_that_fail",),
        "what is malformed is tried again": (CLIENT + "test_transient_errors_get_the_attempts_set",),
    },
    8: {
        "a class for each kind": (
            FAILURES + "test_class_follows_from_the_status",
            FAILURES + "test_a_prompt_that_does_not_fit",
            FAILURES + "test_quota_is_told_from_rate",
            TRANSPORT + "test_refused_connections_were_not_sent",
            TRANSPORT + "test_the_deadline_ends_a_request",
        ),
        "message and code of every shape, numbers too": (FAILURES + "test_words_and_code_of_every_shape",),
        "words even without a body": (FAILURES + "test_a_body_without_words",),
        "request id": (FAILURES + "test_request_id",),
        "retry_after": (CLIENT + "test_retry_after_beyond_the_cap_fails_fast",),
        "attempts": (CLIENT + "test_transient_errors_get_the_attempts_set",),
        "recorded errors, all": ("llm/test_conformance.py::test_every_recorded_error_has_its_class_and_words",),
    },
    9: {
        "always visible": (
            OPENAI + "test_finish_reasons",
            ANTHROPIC + "test_stop_reasons",
            GEMINI + "test_finish_reasons",
        ),
        "an error with the partial text, where a structure is required": (
            STRUCTURED + "test_a_cut_answer_is_an_error_with_the_partial_text",
        ),
        "arguments that do not parse stay text": (
            OPENAI + "test_tool_calls_are_carried",
            STREAMS + "test_a_tool_input_that_was_cut_stays_as_it_is",
            ANTHROPIC + "test_arguments_that_are_no_json_are_refused",
        ),
    },
    10: {
        "json_schema, json_object, prompt alone, on 400, 422 and a 500 that names it": (
            STRUCTURED + "test_the_best_form_is_asked_for_first",
            STRUCTURED + "test_a_refused_form_is_stepped_down",
        ),
        "no other 500": (STRUCTURED + "test_a_500_about_something_else_is_tried_again_as_it_is",),
        "remembered per (base_url, model)": (
            STRUCTURED + "test_the_form_is_remembered",
            WHOLE + "test_a_form_is_remembered_for_its_model_only",
        ),
        "the text is always checked": (
            STRUCTURED + "test_a_form_that_is_ignored_is_found_out",
            STRUCTURED + "test_prose_to_the_end_is_an_error_with_the_text",
            STRUCTURED + "test_the_schema_is_checked_not_only_json",
        ),
        "content may be an object already": (WHOLE + "test_structured_content_that_is_an_object_already",),
    },
    11: {
        "input, output, reasoning, cached; None is not 0": (
            OPENAI + "test_usage_in_every_shape",
            "llm/test_codec_openai_shapes.py::test_every_shape_is_read",
            GEMINI + "test_usage",
        ),
        "Anthropic's caches count as input": (ANTHROPIC + "test_usage_counts_caches_as_input",),
        "the provider's cost": (
            OPENAI + "test_usage_in_every_shape",
            OPENAI + "test_venice_states_its_cost_beside_usage",
            BUDGET + "test_the_providers_own_cost_counts",
        ),
        "unknown usage costs what was reserved": (BUDGET + "test_an_unknown_usage_counts_as_reserved",),
        "the user's prices": (
            BUDGET + "test_cost_from_the_table",
            "llm/test_prices.py::test_every_spelling_of_a_name_is_found",
        ),
        "genai-prices": ("llm/test_prices.py::test_the_kept_table_knows_common_models",),
        "no network at import": (WHOLE + "test_nothing_is_fetched_at_import_or_for_a_price",),
    },
    12: {
        "OpenAI-compatible": (OPENAI + "test_request_says_what_was_said_and_nothing_else",),
        "Azure: deployment, api-version, api-key": (OPENAI + "test_azure_addresses",),
        "Anthropic: version, x-api-key, max_tokens": (ANTHROPIC + "test_request",),
        "Gemini: the key in its header, not in the address": (GEMINI + "test_request",),
    },
    13: {
        "provider/model, provider:model, tags and vendors": (NAMES + "test_names",),
        "the SDKs' variables": (NAMES + "test_keys_as_the_sdks_read_them",),
        "Trace's variables": (
            NAMES + "test_traces_variables",
            NAMES + "test_traces_custom_backend",
            NAMES + "test_traces_autogen_backend",
        ),
        "a custom base_url gets no default key": (
            NAMES + "test_a_default_key_goes_to_its_own_address_only",
            NAMES + "test_no_provider_leaks_its_key",
        ),
        "local servers need no key": (NAMES + "test_local_servers_need_no_key",),
    },
    14: {
        "max_completion_tokens for reasoning models of OpenAI and Azure alone": (
            OPENAI + "test_cap_goes_under_the_name_the_server_knows",
        ),
        "a cap where a server would go on to the end of its context": (
            OPENAI + "test_own_servers_get_a_cap_when_none_is_given",
        ),
    },
    15: {
        "cancelling closes the socket": (
            CANCEL + "test_the_server_sees_all_of_64_cancelled_calls",
            WHOLE + "test_a_call_cancelled_while_its_answer_comes",
            TRANSPORT + "test_leaving_a_stream_ends_its_request",
        ),
        "no task is left": (CANCEL + "test_the_server_sees_all_of_64_cancelled_calls",),
        "header names are plain text": (TRANSPORT + "test_header_names_are_plain_lower_case_text",),
        "secrets are redacted": (
            "cassettes/test_redaction.py::test_no_secret_reaches_the_disk",
            WHOLE + "test_no_key_of_any_provider_is_in_its_cassette",
            WHOLE + "test_headers_of_ones_own_are_in_no_cassette",
        ),
        "istr tags are read": (FOREIGN + "test_header_names_of_every_kind",),
        "content and status_code are read": (FOREIGN + "test_responses_of_older_vcrpys_for_httpx",),
        "parsed_body is read": (FOREIGN + "test_parsed_bodies_are_joined_again",),
        "Ruby's !binary is read": (FOREIGN + "test_ruby_cassettes_are_read",),
        "gzip bytes are read": (FOREIGN + "test_compressed_bodies_are_unpacked",),
    },
}

BUILT: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "codecs of every family": ("llm/test_conformance.py::test_every_recorded_answer_is_read_right",),
        "several choices": (OPENAI + "test_several_choices_keep_their_order_and_index",),
        "one file and an entry point add a provider": (NAMES + "test_a_third_party_adds_a_provider_with_one_file",),
    },
    2: {"unknown names list the nearest": (NAMES + "test_unknown_names_list_the_nearest",)},
    3: {
        "text and images": (
            "llm/test_messages.py::test_content_in_parts",
            ANTHROPIC + "test_images",
            GEMINI + "test_messages",
        ),
        "options and tools": (
            OPENAI + "test_every_option_has_its_field",
            ANTHROPIC + "test_options",
            GEMINI + "test_options",
        ),
        "streams": (
            "llm/test_stream.py::test_deltas_then_the_whole_answer",
            "llm/test_stream.py::test_errors_inside_the_stream_are_errors",
            STREAMS + "test_anthropic_stream",
            STREAMS + "test_gemini_stream",
        ),
        "an answer continues its conversation": (
            ANTHROPIC + "test_blocks_go_back_as_they_came",
            STREAMS + "test_a_streamed_answer_goes_back_as_it_came",
            GEMINI + "test_a_call_goes_back_with_its_signature",
        ),
    },
    4: {
        "permanent errors once": (CLIENT + "test_permanent_errors_are_tried_once",),
        "transient ones within the attempts set": (CLIENT + "test_transient_errors_get_the_attempts_set",),
    },
    5: {
        "concurrency": (
            LIMITER + "test_places_are_given_in_order_of_asking",
            WHOLE + "test_clients_of_one_account_share_its_limits",
        ),
    },
    6: {
        "reserved from the first wave on": (BUDGET + "test_no_overshoot_with_64_in_flight",),
        "shared": (
            BUDGET + "test_a_budget_of_the_context_counts_every_client",
            BUDGET + "test_threads_and_loops_share_a_budget",
        ),
        "calls are attempts": (BUDGET + "test_calls_count_every_attempt",),
        "the partial result is kept": ("training/test_run_budgets.py::test_no_call_is_made_beyond_the_budget",),
        "an unknown price is an error before spending": (BUDGET + "test_an_unknown_price_is_an_error_before_spending",),
        "estimate": ("llm/test_estimates.py::test_likely_is_below_the_most_and_the_most_holds",),
    },
    7: {"structured output": (PEERS + "test_a_schema_is_enforced",)},
    8: {
        "closed cleanly": (TRANSPORT + "test_a_script_that_closes_nothing_ends_without_a_word",),
        "uvloop": ("test_portal.py::test_uvloop_when_asked_for",),
    },
    9: {
        "an event per attempt and per call": ("llm/test_tracing.py::test_an_event_per_attempt_and_per_call",),
        "no key in it": ("llm/test_tracing.py::test_keys_and_messages_are_never_told",),
        "spans": ("llm/test_tracing.py::test_spans_in_the_words_of_the_genai_conventions",),
    },
    10: {
        "called as Trace calls its models": (CLIENT + "test_synchronous_call",),
        "callables, litellm, OpenAI's clients": (
            "llm/test_adapters.py::test_every_shape_of_answer",
            "llm/test_adapters.py::test_litellm",
            "llm/test_adapters.py::test_openais_clients",
        ),
    },
}
"""What each point of the client's brief adds to the requirements."""

FIGURES: dict[str, tuple[str, ...]] = {
    "bucket 100/s, burst 20, 400 calls at 64: 0 failed, <= 480 requests, <= 6 s": (
        WHOLE + "test_a_bucket_of_unknown_size",
        LIMITER + "test_an_unknown_limit_is_found_from_its_429s",
    ),
    "requests for one doomed call: permanent 1, transient the attempts set": (
        CLIENT + "test_permanent_errors_are_tried_once",
        CLIENT + "test_transient_errors_get_the_attempts_set",
        STRUCTURED + "test_other_errors_are_not_about_the_form",
    ),
    "budget overshoot in 1,000 runs at 64 in flight: 0": (
        BUDGET + "test_no_overshoot_with_64_in_flight",
        BUDGET + "test_no_overshoot_in_a_thousand_runs",
    ),
    "64 of 64 in flight cancelled: the server sees all, no task is left": (
        CANCEL + "test_the_server_sees_all_of_64_cancelled_calls",
    ),
    "450 POSTs after 5 s idle: 0 failures": (
        PEERS + "test_no_call_is_lost_on_a_connection_that_the_server_just_closed",
    ),
}


def test_every_clause_has_its_tests() -> None:
    """All fifteen requirements are listed, no clause is without a test, and every test that is named exists."""
    assert list(REQUIREMENTS) == list(range(1, 16))
    assert list(BUILT) == list(range(1, 11))
    clauses = [tests for table in (*REQUIREMENTS.values(), *BUILT.values(), FIGURES) for tests in table.values()]
    assert all(clauses)
    assert all("::" in test for tests in clauses for test in tests)
    assert missing(test for tests in clauses for test in tests) == []
