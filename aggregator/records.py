"""The library's data: frozen structs without behaviour beyond reading them.

Imported by every room; imports only the library's notebook views, when one is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

Values = dict[str, Any]
"""Parameter name -> value."""

Role = Literal["agent", "optimizer", "aggregator", "guide"]
"""The role that calls the model."""

FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "error"]
"""OpenAI's finish reasons, and "error"; every provider's own is normalised to one of them.

"error" is any reason that is not known to be good. The client raises for it.
"""


# ---- requests and replies


class HTTPRequest(Struct, frozen=True, kw_only=True, gc=False):
    """One HTTP request. `url` is absolute; `secrets` are the values that authenticate it.

    `kept` are the provider's own headers that a recording may hold, of request and reply; a final `*` matches any
    ending. `fresh` asks for a new connection.
    """

    url: str
    body: bytes
    headers: Mapping[str, str]
    method: str = "POST"
    secrets: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    fresh: bool = False

    def __repr__(self) -> str:
        return f"HTTPRequest({self.method}, {len(self.body)} bytes)"  # headers and address may hold the key


class HTTPReply(Struct, frozen=True, kw_only=True, gc=False):
    """One answer, body decompressed. Header names are lower case.

    `chunks` are (length in bytes, milliseconds since the request was sent) of a streamed body's pieces.
    """

    status: int
    body: bytes
    headers: Mapping[str, str]
    reason: str = ""
    milliseconds: float = 0.0
    chunks: tuple[tuple[int, float], ...] = ()
    replayed: bool = False


# ---- completions


# gc=False down to Completion: they hold text, numbers and each other, never a cycle, and every answer makes several.
class Usage(Struct, frozen=True, kw_only=True, gc=False, repr_omit_defaults=True):
    """Tokens and cost of one or more calls; None means unknown, which is not 0.

    `input_tokens` includes cached ones and those written to a cache, `output_tokens` includes reasoning.
    `cache_write_1h_tokens` are the part of `cache_write_tokens` that is kept for an hour. `cost` is in USD.
    `estimated_calls` counts the calls whose tokens were estimated from the length of their texts, because their streams
    stated none.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    cost: float | None = None
    calls: int = 1
    cache_write_tokens: int | None = None
    cache_write_1h_tokens: int | None = None
    estimated_calls: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            input_tokens=_sum(self.input_tokens, other.input_tokens),
            output_tokens=_sum(self.output_tokens, other.output_tokens),
            cached_tokens=_sum(self.cached_tokens, other.cached_tokens),
            reasoning_tokens=_sum(self.reasoning_tokens, other.reasoning_tokens),
            cost=_sum(self.cost, other.cost),
            calls=self.calls + other.calls,
            cache_write_tokens=_sum(self.cache_write_tokens, other.cache_write_tokens),
            cache_write_1h_tokens=_sum(self.cache_write_1h_tokens, other.cache_write_1h_tokens),
            estimated_calls=self.estimated_calls + other.estimated_calls,
        )

    @property
    def total_tokens(self) -> int:
        """The known input and output tokens."""
        return (self.input_tokens or 0) + (self.output_tokens or 0)

    @property
    def prompt_tokens(self) -> int | None:
        """`input_tokens` under OpenAI's name."""
        return self.input_tokens

    @property
    def completion_tokens(self) -> int | None:
        """`output_tokens` under OpenAI's name."""
        return self.output_tokens


NO_USAGE = Usage(calls=0)


def _sum(a: Any, b: Any) -> Any:
    if a is None:
        return b
    return a if b is None else a + b


class ToolCall(Struct, frozen=True, kw_only=True, gc=False, repr_omit_defaults=True):
    """A tool call of the model; `arguments` is the model's own text, usually JSON.

    `signature` must be sent back to Gemini with the call in the next turn.
    """

    id: str
    name: str
    arguments: str
    signature: str | None = None


class Message(Struct, frozen=True, kw_only=True, gc=False, repr_omit_defaults=True):
    """The message of one choice. `reasoning` (thinking) is never part of `content`.

    `source` is its original body, if an API requires parts of it in the next turn: signed or encrypted thinking,
    searches, anything but text and tool calls. `other` are the kinds of content that only `raw` holds: audio, images,
    searches. `origin` is the address of its server, if no other can read `source`.
    """

    content: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    refusal: str | None = None
    role: str = "assistant"
    source: bytes | None = None
    other: tuple[str, ...] = ()
    origin: str | None = None


class Choice(Struct, frozen=True, kw_only=True, gc=False, repr_omit_defaults=True):
    """One of the model's answers; `raw_finish_reason` is the provider's own."""

    message: Message
    finish_reason: FinishReason = "stop"
    raw_finish_reason: str | None = None
    index: int = 0


class Completion(Struct, frozen=True, kw_only=True, gc=False):
    """A model's answer. Reads as OpenAI's shape too: `completion.choices[0].message.content`.

    `service_tier` is the provider's name of the tier that served it.
    """

    choices: tuple[Choice, ...]
    usage: Usage = Usage()
    model: str = ""
    id: str = ""
    request_id: str | None = None
    attempts: int = 1
    milliseconds: float = 0.0
    replayed: bool = False
    raw: bytes = b""
    service_tier: str | None = None

    @property
    def text(self) -> str:
        """The first choice's text, "" if it has none (a pure tool call)."""
        return self.choices[0].message.content or ""

    @property
    def reasoning(self) -> str | None:
        """The first choice's thinking, separate from its text."""
        return self.choices[0].message.reasoning

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def raw_finish_reason(self) -> str | None:
        """The same under the provider's own name."""
        return self.choices[0].raw_finish_reason

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The first choice's tool calls."""
        return self.choices[0].message.tool_calls

    def __repr__(self) -> str:
        """Return what a reader of a log looks for: the first choice, the usage and the model, without `raw`."""
        facts = {
            "tool_calls": self.tool_calls,
            "finish_reason": self.finish_reason,
            "usage": self.usage,
            "model": self.model,
            "replayed": self.replayed,
        }
        return f"Completion({self.text!r}, {', '.join(f'{name}={fact!r}' for name, fact in facts.items() if fact)})"


# ---- rollouts and proposals


class Sample(Struct, frozen=True):
    """One instance of a data set: `id` is its position, `x` the agent's input, `info` the data for the guide."""

    id: int
    x: Any
    info: Any = None


Kept = Literal["best", "last"]
"""The values of a run: the best on its validation set, or the last."""

Stage = Literal["agent", "guide", "proposal", "aggregation", "evaluation"]


class Failure(Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """An error and its stage. `infrastructure` is True for a lost call, False for an error of the agent itself.

    For an error in the user's code `where` is its innermost line ("agent.py:12 in forward") and `traceback` the
    traceback; both are "" for an error in trained code or in the library. They hold file names, never paths.
    """

    stage: Stage
    error: str
    message: str
    sample_id: int | None = None
    epoch: int | None = None
    step: int | None = None
    infrastructure: bool = False
    where: str = ""
    traceback: str = ""


class RolloutTask(Struct, frozen=True, kw_only=True, gc=False):  # nothing in it refers to it
    """One rollout to run, as plain data that an executor sends to the agent.

    `values` override the parameters for this rollout only, and have their types. `lineage` (from the root) and `role`
    name its calls on the tape. `capture` requests the transcript. `repeat` counts rollouts of one sample; 0 adds no
    part to the lineage. `min_score` is the score of an instance on which the agent itself fails.

    `timeout` is the number of seconds for the agent, and then for the guide. `timed_out` is the stage that timed out in
    a recording: it is not run, and fails in the same way.
    """

    sample: Sample
    values: Values = {}
    lineage: tuple[str, ...] = ()
    role: Role = "agent"
    capture: bool = True
    repeat: int = 0
    min_score: float | None = None
    timeout: float | None = None
    timed_out: str = ""

    @property
    def is_timed(self) -> bool:
        """True if a timeout, now or in the recording, decides the rollout's result."""
        return self.timeout is not None or bool(self.timed_out)


class Scores(Struct, frozen=True):
    """A guide's result with several scores: the primary score, further ones by name, and feedback.

    Gates and searches use the primary score unless they are given a name. A `primary` of None means that the output
    cannot be judged.
    """

    primary: float | None
    named: Mapping[str, float] = {}
    feedback: str = ""


class Rollout(Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """One instance run through the agent and judged by the guide. `score` is None if the instance was not judged.

    `x` is the agent's input. `scores` are the guide's further scores by name, and measures of the run: `length` (the
    characters of the output), `cost` (USD) and `milliseconds` of the agent's calls, in a replay the recorded ones; the
    latter two only if there were calls. `ms` is the duration of the rollout. `lineage` is the prefix of its calls in
    the recording, `repeat` its number among the rollouts of one sample. `handle` is private to the agent's adapter,
    stays in this process and is never written.
    """

    sample_id: int
    x: Any = None
    output: Any = None
    score: float | None = None
    scores: Mapping[str, float] = {}
    feedback: str = ""
    transcript: str = ""
    failure: Failure | None = None
    lineage: str = ""
    repeat: int = 0
    ms: float = 0.0
    handle: Any = None

    @property
    def failures(self) -> tuple[Failure, ...]:
        """`failure` as a tuple, as in a Proposal."""
        return () if self.failure is None else (self.failure,)


class Proposal(Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """New parameter values for one instance, or several merged into one.

    `values` holds only what should change. `support` counts the instances behind it, `sample_ids` names them.
    """

    values: Values = {}
    score: float | None = None
    feedback: str = ""
    reasoning: str = ""
    error: str | None = None
    failures: tuple[Failure, ...] = ()
    support: int = 1
    sample_ids: tuple[int, ...] = ()

    @property
    def sample_id(self) -> int | None:
        """The instance behind this proposal; None once several are merged."""
        return self.sample_ids[0] if len(self.sample_ids) == 1 else None

    def _repr_html_(self) -> str:
        from aggregator.views import proposal_html

        return proposal_html(self)


# ---- steps


class Decision(Struct, frozen=True, kw_only=True):
    """A gate's verdict on an update, with the reason."""

    accepted: bool
    reason: str = ""
    before: float | None = None
    after: float | None = None


class StepReport(Struct, frozen=True, kw_only=True):
    """The record of one step for history, checkpoint and result: its size does not grow with outputs.

    `proposals` counts the instances with a proposal, `contributors` are the samples whose proposals are in the update,
    `sources` those for each of its parameters.
    """

    epoch: int
    step: int
    sample_ids: tuple[int, ...]
    scores: tuple[float | None, ...]
    score: float | None
    decision: Decision
    update: Values = {}
    reasoning: str = ""
    proposals: int = 0
    contributors: tuple[int, ...] = ()
    sources: Mapping[str, tuple[int, ...]] = {}
    failures: tuple[Failure, ...] = ()
    test_score: float | None = None
    validation_score: float | None = None
    usage: Mapping[str, Usage] = {}

    def __repr__(self) -> str:
        from aggregator.views import step_line

        return f"<{type(self).__name__}: {step_line(self)}>"

    def _repr_html_(self) -> str:
        from aggregator.views import step_html

        return step_html(self)


class FullStepReport(StepReport, frozen=True, kw_only=True):
    """A step's complete report. Observers get it once; it is not kept.

    `rollouts`, `all_proposals` and `lineages` each have one entry per instance, in the order of the samples; a search
    runs the samples once per candidate, candidate by candidate. An instance that proposes nothing has a Proposal
    without values. A lineage is the prefix of the instance's calls in the recording, as in
    "train/epoch=0/batch=3/sample=17". If an overridden `forward` runs the agent by itself, only the score is known.
    """

    rollouts: tuple[Rollout, ...] = ()
    all_proposals: tuple[Proposal, ...] = ()
    lineages: tuple[str, ...] = ()

    def slim(self) -> StepReport:
        """Return the report without rollouts, proposals and lineages."""
        return StepReport(**{name: getattr(self, name) for name in StepReport.__struct_fields__})


# ---- runs


class RunInfo(Struct, frozen=True, kw_only=True):
    """The description of a run at its start, without paths, times or user names: the same call gives the same record.

    The names are those of classes and functions. `parameters` are the initial values, `steps` counts the steps of the
    whole run. `finished_steps` and `usage` are those of a resumed run. `sandboxes` is the place of each operation's
    trained code: "process", "monty 1.4.0", or "none" (this process). `skipped_samples` are left out.
    """

    trainer: str
    agent: str
    optimizer: str
    guide: str
    rule: str = ""
    gate: str = ""
    parameters: Values
    seed: int
    steps: int
    num_epochs: int
    batch_size: int
    train_samples: int
    test_samples: int = 0
    finished_steps: int = 0
    usage: Mapping[str, Usage] = {}
    sandboxes: Mapping[str, str] = {}
    skipped_samples: tuple[int, ...] = ()


class Evaluation(Struct, frozen=True, kw_only=True):
    """Scores of a data set with the parameters at one time; `step` counts the updates tried before it."""

    step: int
    score: float | None
    scores: tuple[float | None, ...]
    failures: tuple[Failure, ...] = ()
    usage: Mapping[str, Usage] = {}


class Candidate(Struct, frozen=True, kw_only=True):
    """Parameter values that a search remembers, with each instance's scores.

    `id` is the step that made it and its number there, `parent` the candidate that it was proposed for, `sample_ids`
    are the samples whose proposals made it, `sources` those for each parameter that it changes. `scores` maps an
    instance's id to the sum of its scores and their count; `lost` are the ids of those on which it was tried but not
    judged, because calls failed. `named` holds further scores that a search compares, by "name/instance".
    """

    id: str
    values: Values
    parent: str | None = None
    step: int = 0
    scores: dict[str, tuple[float, int]] = {}
    reasoning: str = ""
    sample_ids: tuple[int, ...] = ()
    sources: Mapping[str, tuple[int, ...]] = {}
    lost: tuple[str, ...] = ()
    named: dict[str, tuple[float, int]] = {}

    @property
    def score(self) -> float | None:
        """The mean over the instances that it was tried on; None without any."""
        if not self.scores:
            return None
        return sum(total / count for total, count in self.scores.values()) / len(self.scores)

    @property
    def trials(self) -> int:
        """The number of scores."""
        return sum(count for _, count in self.scores.values())


class TrainingResult(Struct, frozen=True, kw_only=True):
    """The result of a run. It holds no times and no paths: the same seed and cassette give the same bytes.

    `candidates` are those that a search remembers at the end, the current one first. `skipped_samples` were left out.

    `parameters` are the agent's at the end: the best or the last ones (`kept`). `best_parameters` are the best on the
    validation set, after `best_step` steps; without such a set they are the last ones. The score that chose them
    (`validations`) was used for selection, so that only a test set measures their quality.

    `stopped` is the reason if a `stop=` ended the run, otherwise "".
    """

    parameters: Values
    best_parameters: Values
    initial_parameters: Values
    history: Sequence[StepReport] = ()
    evaluations: Sequence[Evaluation] = ()
    failures: Sequence[Failure] = ()
    warnings: Sequence[str] = ()
    usage: Mapping[str, Usage] = {}
    candidates: Sequence[Candidate] = ()
    skipped_samples: Sequence[int] = ()
    validations: Sequence[Evaluation] = ()
    kept: Kept = "last"
    last_parameters: Values = {}
    best_step: int | None = None
    stopped: str = ""

    @property
    def provenance(self) -> dict[str, list[dict[str, Any]]]:
        """The accepted updates behind each of `parameters`: the step, and the samples that proposed it.

        Updates after the kept best values are left out.
        """
        made: dict[str, list[dict[str, Any]]] = {name: [] for name in self.parameters}
        last = len(self.history) if self.kept == "last" or self.best_step is None else self.best_step
        for report in self.history[:last]:
            for name in report.update if report.decision.accepted else ():
                made.setdefault(name, []).append(
                    {"step": report.step, "samples": list(report.sources.get(name, report.contributors))}
                )
        return made

    @property
    def train_scores(self) -> list[float | None]:
        """The mean score of each minibatch, in order."""
        return [report.score for report in self.history]

    @property
    def test_scores(self) -> list[float | None]:
        """The mean score of each evaluation on the test set, in order, the one before training first."""
        return [evaluation.score for evaluation in self.evaluations]

    @property
    def validation_scores(self) -> list[float]:
        """The mean scores on the validation set that are known, in order, the one before training first."""
        return [one.score for one in self.validations if one.score is not None]

    def __repr__(self) -> str:
        from aggregator.views import result_line

        return f"<TrainingResult: {result_line(self)}>"

    def __str__(self) -> str:
        from aggregator.views import result_text

        return result_text(self)

    def _repr_html_(self) -> str:
        from aggregator.views import result_html

        return result_html(self)
