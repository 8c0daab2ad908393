"""Every requirement has a test: the lists, and the check that each entry is marked on at least one test.

A test says what it holds with `@pytest.mark.requirement("client 3: x-should-retry", ...)`, so that a rename keeps it.
A comment above an entry says in what this library differs from Trace.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent

# --- the client: what recordings, servers and other clients taught, clause by clause; what its brief adds; its figures

CLIENT = (
    "client 1: one session per event loop",
    "client 1: no limit of connections",
    "client 1: idle connections are kept 4 s at most",
    "client 1: no cookie jar",
    "client 1: no redirects",
    "client 1: 5 s to connect",
    "client 1: 600 s in all",
    "client 1: a deadline for each call",
    "client 1: only encodings that can be decoded",
    "client 2: sent once, the next attempt over a new connection",
    "client 2: a new one is not",
    "client 2: nor one whose answer has begun",
    "client 2: counted as an attempt",
    "client 2: llama-server after 5 s idle",
    "client 3: 408, 409, 429, 5xx, lost connections are retried",
    "client 3: 0.5 s doubling to 8, with jitter",
    "client 3: Retry-After in ms, seconds, fractions, as a date; 0 is absent",
    "client 3: Retry-After is waited for",
    "client 3: Gemini's retryDelay",
    "client 3: ignored on 2xx",
    "client 3: capped, then failing fast with retry_after",
    "client 3: x-should-retry",
    "client 3: never quota, context overflow, auth, 400, 404, 413, 422",
    "client 4: one attempt budget, fallbacks included",
    "client 4: one deadline, waits and fallbacks included",
    "client 4: no call again after any exception",
    "client 5: shared per (base_url, key, model)",
    "client 5: a 429 pauses all callers",
    "client 5: adaptive",
    "client 5: requests per minute",
    "client 5: tokens per minute",
    "client 5: rate-limit headers hold back",
    "client 5: in every family and every form",
    "client 6: every field may be absent or odd",
    "client 6: content is text, parts, object, null or absent",
    "client 6: unknown keys and blocks",
    "client 6: unknown finish reasons",
    "client 6: white space before the body",
    "client 6: raw bytes are kept",
    "client 6: thinking is no part of the text",
    "client 6: recorded answers, all",
    "client 7: an error, no choices, no message, no body, no JSON",
    "client 7: no content",
    "client 7: no candidates, a blocked prompt",
    "client 7: an error within a stream",
    "client 7: a malformed answer is retried",
    "client 8: a class for each kind",
    "client 8: message and code of every shape, numbers too",
    "client 8: words even without a body",
    "client 8: request id",
    "client 8: retry_after",
    "client 8: attempts",
    "client 8: recorded errors, all",
    "client 9: always visible",
    "client 9: an error with the partial text, where a structure is required",
    "client 9: arguments that do not parse stay text",
    "client 10: json_schema, json_object, prompt alone, on 400, 422 and a 500 that names it",
    "client 10: no other 500",
    "client 10: remembered per (base_url, model)",
    "client 10: the text is always checked",
    "client 10: content may be an object already",
    "client 11: input, output, reasoning, cached; None is not 0",
    "client 11: Anthropic's caches count as input",
    "client 11: the provider's cost",
    "client 11: unknown usage costs what was reserved",
    "client 11: the user's prices",
    "client 11: genai-prices",
    "client 11: no network at import",
    "client 12: OpenAI-compatible",
    "client 12: Azure: deployment, api-version, api-key",
    "client 12: Anthropic: version, x-api-key, max_tokens",
    "client 12: Gemini: the key in its header, not in the address",
    "client 13: provider/model, provider:model, tags and vendors",
    "client 13: the SDKs' variables",
    "client 13: Trace's variables",
    "client 13: a custom base_url gets no default key",
    "client 13: local servers need no key",
    "client 14: max_completion_tokens for reasoning models of OpenAI and Azure alone",
    "client 14: a cap where a server would go on to the end of its context",
    "client 15: cancelling closes the socket",
    "client 15: no task is left",
    "client 15: header names are plain text",
    "client 15: secrets are redacted",
    "client 15: istr tags are read",
    "client 15: content and status_code are read",
    "client 15: parsed_body is read",
    "client 15: Ruby's !binary is read",
    "client 15: gzip bytes are read",
)

BUILT = (
    "built 1: codecs of every family",
    "built 1: several choices",
    "built 1: one file and an entry point add a provider",
    "built 2: unknown names list the nearest",
    "built 3: text and images",
    "built 3: options and tools",
    "built 3: streams",
    "built 3: an answer continues its conversation",
    "built 4: permanent errors once",
    "built 4: transient ones within the attempts set",
    "built 5: concurrency",
    "built 6: reserved from the first wave on",
    "built 6: shared",
    "built 6: calls are attempts",
    "built 6: the partial result is kept",
    "built 6: an unknown price is an error before spending",
    "built 6: estimate",
    "built 7: structured output",
    "built 8: closed cleanly",
    "built 8: uvloop",
    "built 9: an event per attempt and per call",
    "built 9: no key in it",
    "built 9: spans",
    "built 10: called as Trace calls its models",
    "built 10: callables, litellm, OpenAI's clients",
)

FIGURES = (
    "figure: bucket 100/s, burst 20, 400 calls at 64: 0 failed, <= 480 requests, <= 6 s",
    "figure: requests for one doomed call: permanent 1, transient the attempts set",
    "figure: budget overshoot in 1,000 runs at 64 in flight: 0",
    "figure: 64 of 64 in flight cancelled: the server sees all, no task is left",
    "figure: 450 POSTs after 5 s idle: 0 failures",
)

# --- what Trace's users know: each feature of its library

PARAMETERS_AND_TRACING = (
    "Trace: trace.node(data, name, trainable, description, constraint)",
    "Trace: ParameterNode",
    "Trace: bundle(description)",
    "Trace: bundle(trainable): a function body as parameter",
    "Trace: bundle(traceable_code): what an operation does inside is traced",
    "Trace: bundle(catch_execution_error)",
    "Trace: bundle(allow_external_dependencies)",
    "Trace: bundle(overwrite_python_recursion)",
    "Trace: trace.model",
    "Trace: Module.parameters, parameters_dict",
    "Trace: Module.save, load",
    # plain lists and dicts are containers, there is no class for them
    "Trace: containers Seq and Map",
    # `.data` is a plain value, so all of Python works on it, without a node in between
    "Trace: operators, iterators and broadcasting on nodes",
    "Trace: ExceptionNode.create_feedback('full')",
    "Trace: backward(visualize, print_limit)",
    # the first line of the Mermaid text says the direction: TD, or BT for the reverse
    "Trace: backward(reverse_plot)",
    # no graph is there to be kept, cleared or left: feedback is an argument, a transcript belongs to its pass
    "Trace: backward(retain_graph), zero_feedback, detach",
    "Trace: clone",
    "Trace: reading an output made other instances fail",
    "Trace: GraphPropagator: the subgraph as feedback",
)

TRAINERS = (
    "Trace: train(guide, train_dataset)",
    "Trace: train(ensure_improvement)",
    "Trace: train(improvement_threshold)",
    "Trace: train(num_epochs, batch_size)",
    "Trace: train(test_dataset, eval_frequency)",
    "Trace: train(log_frequency)",
    "Trace: train(save_frequency, save_path)",
    "Trace: train(min_score)",
    "Trace: train(verbose=True)",
    'Trace: train(verbose="output")',
    "Trace: train(num_threads)",
    "Trace: MinibatchAlgorithm, batchify",
    "Trace: MinibatchAlgorithm and searches with Trace's optimizers",
    "Trace: BasicSearchAlgorithm(num_proposals, validate_dataset)",
    "Trace: BasicSearchAlgorithm(validate_guide)",
    "Trace: BasicSearchAlgorithm: the current value is a candidate",
    "Trace: AggregatedUpdate(stepsize)",
    "Trace: AggregatedUpdate(llm, max_tokens)",
    "Trace: AggregatedUpdate.aggregator_system_prompt",
    "Trace: hook forward",
    "Trace: hook update",
    "Trace: hook has_improvement",
    "Trace: hook optimizer_step",
    "Trace: hook save_agent",
    "Trace: evaluate",
)

GUIDES_DATA_AND_LOGS = (
    "Trace: any callable (x, output, info) -> (score, feedback)",
    "Trace: AutoGuide",
    "Trace: VerbalJudgeGuide(model, prompt_template, system_prompt)",
    # a verdict is a typed number, no word to be looked for
    "Trace: VerbalJudgeGuide(correctness_template)",
    "Trace: exact_match_metric",
    "Trace: SimpleReferenceSuggest",
    "Trace: ReferenceSuggest: a model compares with the reference",
    "Trace: KeywordSuggest: JSON of keyword to hint, custom analyzers",
    "Trace: DataLoader(dataset, batch_size, replacement, shuffle)",
    "Trace: DefaultLogger.log(name, data, step, color)",
    "Trace: tqdm bars with description",
    "Trace: checkpoints",
)

OPTIMIZERS = (
    "Trace: OptoPrime(objective)",
    "Trace: OptoPrime(memory_size)",
    "Trace: OptoPrime(max_tokens)",
    "Trace: OptoPrime(include_example)",
    "Trace: OptoPrime(prompt_symbols)",
    "Trace: OptoPrime.step(mask)",
    "Trace: OptoPrime(log)",
    "Trace: OptoPrime(ignore_extraction_error)",
    "Trace: HTML of the step in notebooks",
    "Trace: OPRO",
    "Trace: TextGrad",
    "Trace: TextGrad's gradient reduction",
    "Trace: OptoPrimeMulti(num_responses)",
    "Trace: OptoPrimeMulti: temperature_variation",
    "Trace: OptoPrimeMulti: self_refinement",
    "Trace: OptoPrimeMulti: iterative_alternatives",
    "Trace: OptoPrimeMulti: multi_experts, experts list, moa",
    "Trace: OptoPrimeMulti: best_of_n",
    "Trace: OptoPrimeMulti: majority",
    "Trace: OptoPrimeMulti: last_of_n",
    "Trace: OptoPrimeMulti: parallel calls",
    "Trace: OptoprimeBatchOpt",
    "Trace: Trace's own optimizers and agents",
)

MODELS = (
    "Trace: backend LiteLLM",
    "Trace: backend AutoGen",
    "Trace: backend CustomLLM",
    "Trace: TRACE_DEFAULT_LLM_BACKEND, TRACE_LITELLM_MODEL",
    "Trace: llm(messages=...) with OpenAI's shape",
    # a client is not replaced every so often: connections that idle or die are replaced one by one
    "Trace: reset_freq",
)

EXPERIMENTAL = (
    "Trace: PrioritySearch",
    "Trace: SequentialUpdate, SequentialSearch",
    "Trace: BeamSearch",
    "Trace: ParetobasedPS",
    # new candidates are tried on the next minibatch where a subclass's `due` returns none
    "Trace: StreamingPrioritySearch",
    # there is no embedding model to depend on: a subclass's `keep` or `ranked` decides what is remembered
    "Trace: POLCA: an epsilon-net over embeddings, a summarizer",
    "Trace: Console logger",
    "Trace: Tensorboard logger",
    "Trace: Wandb logger",
    "Trace: auto_retry",
    # one form of reply, JSON, in whatever wrapping models give it
    "Trace: OptoPrimeV2, OPROv2: symbol sets for replies",
    "Trace: projections: normalised suggestions",
    "Trace: resume()",
    "Trace: asynchronous trainer",
)

# --- what goes wrong in Trace's trainer and does not go wrong here

DEFECTS = (
    "Trace's defect 1: threads shared the optimizer and its feedback",
    "Trace's defect 2: prompts held another instance's graph",
    # no formatter is imported, in threads or elsewhere
    "Trace's defect 3: a formatter was imported in threads",
    "Trace's defect 4: use_asyncio did nothing",
    "Trace's defect 5: asyncio.run failed under a running loop",
    "Trace's defect 6: operations shared state between threads, and forward ignored its agent",
    "Trace's defect 7: proposals of one batch saw each other through the memory",
    "Trace's defect 8: a global graph grew without end",
    "Trace's defect 9: a lost call ended the run",
    "Trace's defect 10: the aggregator's call had no retry and no fallback",
    "Trace's defect 11: agents with operations could not be saved",
    "Trace's defect 12: replies that change nothing were not logged",
    "Trace's defect 13: values were converted by type(old)(new)",
    "Trace's defect 14: a greedy pattern installed a corrupted prompt",
    "Trace's defect 15: a damaged reply was silently no update",
    "Trace's defect 16: prompts with the word def were dropped",
    "Trace's defect 17: TERMINATE anywhere discarded the proposal",
    "Trace's defect 18: the judge looked for its template's words",
    "Trace's defect 19: code that does not compile was installed",
    "Trace's defect 20: stepsize 0 replaced the parameter",
    "Trace's defect 21: failed proposals voted for the current value",
    "Trace's defect 22: the threshold of an improvement had the wrong sign",
    "Trace's defect 23: a failing instance spoilt the score of its batch",
    "Trace's defect 24: names collided",
    "Trace's defect 25: the prompts contradicted themselves",
    "Trace's defect 26: evaluate swallowed interrupts, and a broken agent looked like a bad one",
    "Trace's defect 27: shuffle=False shuffled, by the global generator",
    "Trace's defect 28: train returned None",
    "Trace's defect 29: the default test_dataset raised a TypeError",
    "Trace's defect 30: eval_frequency=0 divided by zero",
    # nothing is drawn, no program is started
    "Trace's defect 31: every step drew a picture with a program that was not there",
    "Trace's defect 32: a custom model raised a NameError; verbose, timeouts and usage were lost",
    "Trace's defect 33: a model's code ran without limits",
    "Trace's defect 34: importing it took seconds and needed test tools",
    "Trace's defect 35: failing checks passed",
)

FEATURES = (*PARAMETERS_AND_TRACING, *TRAINERS, *GUIDES_DATA_AND_LOGS, *OPTIMIZERS, *MODELS, *EXPERIMENTAL)
REQUIREMENTS = (*CLIENT, *BUILT, *FIGURES, *FEATURES, *DEFECTS)


def marks_in(path: Path) -> Iterator[str]:
    """Yield each text of a `pytest.mark.requirement` in a file; the functions below it must be tests."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.requirement":
                    yield from (ast.literal_eval(text) for text in mark.args)


def test_every_requirement_has_a_marked_test() -> None:
    """Each entry of the lists has a test, and each mark names an entry."""
    marked = {text for path in TESTS.rglob("test_*.py") for text in marks_in(path)}
    assert [entry for entry in REQUIREMENTS if entry not in marked] == [], "requirements without a test"
    assert sorted(marked - set(REQUIREMENTS)) == [], "marks of unknown requirements"


def test_the_lists_are_complete() -> None:
    """Fifteen requirements of the client, ten points of its brief, thirty-five defects, without duplicates."""
    assert len(REQUIREMENTS) == len(set(REQUIREMENTS))
    assert {entry.split(":")[0] for entry in CLIENT} == {f"client {number}" for number in range(1, 16)}
    assert {entry.split(":")[0] for entry in BUILT} == {f"built {number}" for number in range(1, 11)}
    assert [entry.split(":")[0] for entry in DEFECTS] == [f"Trace's defect {number}" for number in range(1, 36)]
