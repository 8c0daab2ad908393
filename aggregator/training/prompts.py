"""The texts of the prompts, and the layout of values in them.

A user message is a sequence of sections: a heading line that starts with `#`, then text. A test that plays a model
reads these sections: `#Parameters`, `#Input`, `#Transcript`, `#Output`, `#Score`, `#Feedback`, `#History` for a
proposal; `#CurrentValue` and `#SuggestedValue_1`, `#SuggestedValue_2`, ... for an aggregation. Both replies have one
form: JSON with `reasoning_<component>` and `suggestion`, or TERMINATE as the whole reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.errors import ConfigError
from aggregator.llm.messages import Opening
from aggregator.records import Proposal, Rollout, StepReport, Values
from aggregator.text import as_text, one_line

REPLY_FORMAT = """\
Reply with one JSON object and nothing else:

{
  "reasoning_<component>": "<why this component gets its new value, or keeps its old one>",
  "suggestion": {
    "<component>": <new value>
  }
}

Give one "reasoning_..." entry for each component that you write about. Every value in "suggestion" has the same JSON type \
as the component has now; a component that holds source code gets the whole new source as a string. Components that you \
leave out keep their current value. If nothing should change, reply with the single word TERMINATE, or, where only JSON \
can be sent, with an empty "suggestion"."""

PROPOSER_SYSTEM_PROMPT = f"""\
You improve an LLM agent by changing its parameters. You are shown the parameters, what the agent did with one input, \
and the feedback on the result. Propose the change of parameters that would have made this result right and that would \
also help on other inputs of the same kind: state general rules, do not memorise this one input. Change as little as the \
feedback calls for, and keep what already works.

{REPLY_FORMAT}"""

LEAN_PROPOSER_SYSTEM_PROMPT = """\
You improve the parameters of an LLM agent. Read the parameters, the output and the feedback. Change what would make the \
result right, also for other inputs. Change little.

Reply with one JSON object and nothing else, the values first, then one short sentence why:

{"suggestion": {"<component>": <new value>}, "reasoning": "<one sentence>"}

Write every component; repeat the current value of one that should stay. Keep the type of each value."""

CRITIC_SYSTEM_PROMPT = """\
You criticise the parameters of an LLM agent; another model will change them. You are shown the parameters, what the agent \
did with one input or several, and the feedback on the result. For each parameter say what about it led to this result: \
what is wrong, missing, misleading or in the way, why, and in which direction it should change so that the feedback would \
be met, also on other inputs of the same kind. Be specific. Do not write the new value. Leave out parameters that had no \
part in what went wrong.

Reply with one JSON object and nothing else:

{
  "reasoning_<component>": "<how this component led to the result>",
  "suggestion": {
    "<component>": "<the criticism of this component>"
  }
}

Every criticism is a string, whatever the type of the component. If there is nothing to criticise, reply with the single \
word TERMINATE, or, where only JSON can be sent, with an empty "suggestion"."""

GRADIENT_SYSTEM_PROMPT = f"""\
You improve an LLM agent by changing its parameters. You are shown the parameters, what the agent did with one input or \
several, and, as the feedback, a criticism of each parameter. Change each parameter in the direction that its criticism \
points to. The criticism may be noisy: keep to what also helps on other inputs of the same kind, state general rules, and \
keep what already works.

{REPLY_FORMAT}"""

AGGREGATOR_SYSTEM_PROMPT = f"""\
You consolidate proposals for the parameters of an LLM agent. #CurrentValue holds the present value of each component. \
Each #SuggestedValue_i holds the components that one reviewer, who saw a different example, wants changed. Every block \
states a confidence between 0 and 1, and may state how many examples support it, the score the agent reached there and \
the feedback it got.

Decide on one new value per component:
- Weigh the blocks by confidence and support. A single proposal may be wrong, the more so the lower its confidence.
- Keep what several proposals have in common, and what does not contradict the others. Where proposals contradict each \
other, follow the better supported side; with equal support keep the current value.
- Do not lose what the current value already holds unless the proposals give a reason to.
- Keep the form of each component: its type, its layout, and for source code a text that runs as it stands.

{REPLY_FORMAT}"""

DEFAULT_OBJECTIVE = "Change the parameters so that the agent's output satisfies the feedback."

REPAIR_PROMPT = """\
Your reply could not be used: {error}

Answer the same question again, with one complete JSON object in the form asked for and no other text."""

SHORTER_PROMPT = """\
Your reply was cut at the limit of {limit} tokens before it was complete.

Answer the same question again, much shorter: one sentence of reasoning, then the suggestion, as one complete JSON object in \
the form asked for and no other text."""

_CUT_SHOWN = 200
"""The number of characters of a truncated reply that are quoted."""

REFINE_PROMPT = """\
Look at your answer once more. Say to yourself what is weak, wrong or missing in it, then answer the same question again, \
better, in the same form. If it cannot be improved, repeat it."""

ALTERNATIVE_PROMPT = """\
Answer the same question again, in the same form, with a solution that goes another way than every answer above."""

CHOOSER_SYSTEM_PROMPT = """\
You choose between proposals for the parameters of an LLM agent. #CurrentValue holds the present value of each component, \
and counts as number 0. #SuggestedValue_i holds the components that proposal number i wants changed, and may state the \
feedback that it answers.

Choose the proposal that answers the feedback best, also helps on other inputs of the same kind, and keeps what already \
works; choose 0 if none is better than the current value.

Reply with one JSON object and nothing else:

{
  "reasoning_choice": "<what speaks for this one, and against the others>",
  "suggestion": {
    "choice": <number>
  }
}"""

WORKED_EXAMPLE = """\
The parameters were
{"instruction": {"value": "Name the capital of the country.", "type": "string"}, "k": {"value": 3, "type": "integer"}}
For the input "France" the output was "The capital of France is Paris.", and the feedback said: expected "Paris".
A good reply was
{
  "reasoning_instruction": "The city is right but stands in a sentence; only its name is wanted, for every country.",
  "suggestion": {
    "instruction": "Name the capital of the country. Reply with the name alone."
  }
}"""

SECTIONS = ("Objective", "Example", "Parameters", "Input", "Transcript", "Output", "Score", "Feedback", "History")
"""The sections of a proposal's prompt, in order; Example, Input and History only if there is one."""

_SHORT_INPUT = 40
"""A shorter input may be in a transcript by chance, and is always shown."""

FEEDBACK_DIGEST = 200
"""The number of characters of a proposal's feedback in the aggregation prompt."""

REASONING_SHOWN = 2000
"""The number of characters of a proposal's reasoning that a merge with evidence shows."""

TRANSCRIPT_DIGEST = 500
"""The number of characters of each transcript that a merge with evidence shows, and of examples."""

EXAMPLES_SHOWN = 3

UPDATE_DIGEST = 300
"""The number of characters of an earlier update in the proposal prompt."""


# ---- sections


class Layout(Struct, frozen=True, kw_only=True):
    """The layout of a proposal's prompt: a worked example, other headings, and sections to leave out.

    `include_example` puts a worked example in front: ours, or a text of your own. `prompt_symbols` renames headings, as
    in {"Feedback": "Verdict"}. `mask` names sections to leave out. The names are Trace's; a `#` before a heading may
    stay. Raises ConfigError for headings that do not exist or would be the same.
    """

    include_example: bool | str = False
    prompt_symbols: Mapping[str, str] = {}
    mask: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.mask, str):
            raise ConfigError(f"Expected a list of headings as the mask, got {self.mask!r}; write [{self.mask!r}]")
        named = [_bare(name) for name in (*self.prompt_symbols, *self.mask)]
        if unknown := [name for name in named if name not in SECTIONS]:
            raise ConfigError(f"Expected headings of the prompt ({', '.join(SECTIONS)}), got {', '.join(unknown)}")
        if "Parameters" in map(_bare, self.mask):
            raise ConfigError(
                "Expected a mask that leaves the parameters in, got 'Parameters'; name them in parameters="
            )
        headings = [self.heading(name) for name in SECTIONS]
        if len(set(headings)) < len(SECTIONS) or not all(name.isprintable() and name for name in headings):
            raise ConfigError(f"Expected different headings of one line each, got {', '.join(map(repr, headings))}")

    @property
    def example(self) -> str:
        """The worked example, "" for none."""
        return WORKED_EXAMPLE if self.include_example is True else self.include_example or ""

    def heading(self, name: str) -> str:
        """Return the name of a section."""
        return {_bare(old): _bare(new) for old, new in self.prompt_symbols.items()}.get(name, name)

    def apply(self, sections: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return the visible sections under their names."""
        if not self.prompt_symbols and not self.mask:
            return list(sections)
        masked = set(map(_bare, self.mask))
        return [(self.heading(name), text) for name, text in sections if name not in masked]


def _bare(heading: str) -> str:
    return heading.removeprefix("#")


# ---- messages


def proposal_messages(
    components: Mapping[str, Mapping[str, Any]],
    *,
    transcript: str,
    output: str,
    score: float | None,
    feedback: str,
    objective: str = DEFAULT_OBJECTIVE,
    history: Sequence[str] = (),
    system_prompt: str = PROPOSER_SYSTEM_PROMPT,
    layout: Layout = Layout(),  # noqa: B008 - frozen
    is_shared: bool = False,
    given: str = "",
) -> list[dict[str, str]]:
    """Return the messages that ask for one instance's proposal.

    `given` is the agent's input. `components` maps each parameter's name to its value (as `sort_sets` returns it),
    type, description and constraint; `history` holds a line for each earlier update. With `is_shared` other calls have
    the same beginning, up to and including the parameters, which a provider may cache.
    """
    facts = [
        ("Parameters", _indent(components)),
        *([("Input", given)] if given else []),
        ("Transcript", transcript),
        ("Output", output),
        ("Score", "unknown" if score is None else number(score)),
        ("Feedback", feedback),
    ]
    before = [("Objective", objective), *([("Example", layout.example)] if layout.example else [])]
    after = [("History", "\n".join(history))] if history else []
    opening, rest = layout.apply([*before, facts[0]]), layout.apply([*facts[1:], *after])
    return _messages(system_prompt, [*opening, *rest], shared=len(opening) if is_shared else 0)


def aggregation_messages(
    current: Values,
    proposals: Sequence[Proposal],
    confidences: Sequence[float],
    *,
    stepsize: float,
    satisfied: int = 0,
    evidence: Sequence[str] = (),
    system_prompt: str = AGGREGATOR_SYSTEM_PROMPT,
) -> list[dict[str, str]]:
    """Return the messages that ask for the merged values.

    The current value has confidence 1 - stepsize and the support of the `satisfied` instances, proposal i has
    `confidences[i]`, and `evidence[i]` below its values, if given.
    """
    support = f"support: {satisfied}\n" if satisfied else ""
    sections = [("CurrentValue", f"confidence: {number(1 - stepsize)}\n{support}{pretty(current)}")]
    for i, (proposal, confidence) in enumerate(zip(proposals, confidences, strict=True), start=1):
        block = [_suggestion(proposal, confidence), *evidence[i - 1 : i]]
        sections.append((f"SuggestedValue_{i}", "\n".join(filter(None, block))))
    return _messages(system_prompt, sections)


def render(value: Any) -> str:
    """Write an agent's output as text: a string unchanged, JSON if possible."""
    if isinstance(value, str):
        return value
    try:
        return as_text(sort_sets(value))
    except RecursionError:  # it contains itself
        return as_text(value)


def input_of(rollout: Rollout) -> str:
    """Return the agent's input as text, or "" if the transcript shows it in full.

    >>> input_of(Rollout(sample_id=0, x="Who wrote Hamlet?")), input_of(Rollout(sample_id=0))
    ('Who wrote Hamlet?', '')
    """
    text = "" if rollout.x is None else render(rollout.x)
    return "" if len(text) > _SHORT_INPUT and text in rollout.transcript else text


def join_rollouts(rollouts: Sequence[Rollout]) -> Rollout:
    r"""Return several rollouts as one, with each output, feedback and transcript under its number; a single one unchanged.

    >>> both = join_rollouts([Rollout(sample_id=3, output="a", feedback="right"), Rollout(sample_id=5, output="b")])
    >>> both.output, both.feedback
    ('ID [3]: a\nID [5]: b', 'ID [3]: right')
    """
    if len(rollouts) == 1:
        return rollouts[0]
    scores = [rollout.score for rollout in rollouts if rollout.score is not None]

    def listed(field: str) -> str:
        texts = [(rollout.sample_id, getattr(rollout, field)) for rollout in rollouts]
        return "\n".join(f"ID [{sample_id}]: {text}" for sample_id, text in texts if text != "")

    return Rollout(
        sample_id=rollouts[0].sample_id if rollouts else 0,
        x="\n".join(f"ID [{one.sample_id}]: {given}" for one in rollouts if (given := input_of(one))) or None,
        output=listed("output"),
        score=sum(scores) / len(scores) if scores else None,
        feedback=listed("feedback"),
        transcript=listed("transcript"),
    )


# ---- repairs


def repair_messages(messages: Sequence[dict[str, str]], reply: str, error: str) -> list[dict[str, str]]:
    """Return the conversation that requests the reply once more and quotes the error."""
    return [
        *messages,
        {"role": "assistant", "content": reply},
        {"role": "user", "content": REPAIR_PROMPT.format(error=error)},
    ]


def shorter_messages(messages: Sequence[dict[str, str]], reply: str, limit: int) -> list[dict[str, str]]:
    """Return the conversation that requests a shorter reply; it quotes the beginning of the truncated one."""
    return [
        *messages,
        {"role": "assistant", "content": f"{reply[:_CUT_SHOWN]}[...]"},
        {"role": "user", "content": SHORTER_PROMPT.format(limit=limit)},
    ]


def reply_of(answer: Proposal) -> str:
    """Write a proposal as its reply: one JSON object, or TERMINATE."""
    if not answer.values:
        return "TERMINATE"
    reasons = {"reasoning": answer.reasoning} if answer.reasoning else {}
    return pretty({**reasons, "suggestion": answer.values})


# ---- values in a prompt


def pretty(value: Any) -> str:
    """Format a value as indented JSON, with keys in order of insertion.

    >>> print(pretty({"k": 3}))
    {
      "k": 3
    }
    """
    return _indent(sort_sets(value))


def _indent(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode()


_SCALARS = frozenset({str, int, float, bool, type(None)})


def sort_sets(value: Any) -> Any:
    """Return a value with its sets as sorted lists, because their order differs between processes.

    >>> sort_sets({"b": {3, 1}, "a": 0})
    {'b': [1, 3], 'a': 0}
    """
    if type(value) in _SCALARS:  # nearly always
        return value
    if isinstance(value, dict | Mapping):
        return {key: item if type(item) in _SCALARS else sort_sets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [sort_sets(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(sort_sets, value), key=lambda item: msgspec.json.encode(item, enc_hook=str))
    return value


def number(value: float) -> str:
    """Write a number in its shortest form: 1 - 0.9 is 0.1.

    >>> number(1 - 0.9)
    '0.1'
    """
    return f"{round(value, 6):g}"


def _suggestion(proposal: Proposal, confidence: float) -> str:
    lines = [f"confidence: {number(confidence)}"]
    if proposal.support > 1:
        lines.append(f"support: {proposal.support}")
    if proposal.score is not None:
        lines.append(f"score: {number(proposal.score)}")
    if proposal.feedback:
        lines.append(f"feedback: {one_line(proposal.feedback, FEEDBACK_DIGEST)}")
    return "\n".join([*lines, pretty(proposal.values)])


def evidence_of(proposal: Proposal, rollouts: Sequence[Rollout]) -> str:
    """Return the evidence of a proposal, each part on its own line: its reasoning, and the agent's transcripts.

    >>> run = Rollout(sample_id=4, transcript="asked the model")
    >>> print(evidence_of(Proposal(reasoning="Too long.", sample_ids=(4,)), [run]))
    reasoning: Too long.
    transcript of example 4: asked the model
    """
    behind = [run for run in rollouts if run.sample_id in proposal.sample_ids and run.transcript]
    lines = [f"reasoning: {one_line(proposal.reasoning, REASONING_SHOWN)}"] if proposal.reasoning else []
    digests = [(run.sample_id, one_line(run.transcript, TRANSCRIPT_DIGEST)) for run in behind[:EXAMPLES_SHOWN]]
    return "\n".join([*lines, *(f"transcript of example {number}: {digest}" for number, digest in digests)])


def digest_of(update: Values) -> str:
    """Write an earlier update as one bounded line."""
    return one_line(msgspec.json.encode(sort_sets(update), enc_hook=str).decode(), UPDATE_DIGEST)


def verdict(report: StepReport) -> str:
    """Describe the result of an earlier update in a line."""
    said = "accepted" if report.decision.accepted else f"refused ({report.decision.reason})"
    return f"step {report.step}, {said}: {digest_of(report.update)}"


def _messages(system_prompt: str, sections: Sequence[tuple[str, str]], *, shared: int = 0) -> list[dict[str, str]]:
    """Return system and user message; other calls begin with the same `shared` sections."""
    texts = [f"#{heading}\n{text}" for heading, text in sections]
    content = "\n\n".join(texts)
    if not content.isascii() or content.count("#") > len(sections):
        texts = [f"#{heading}\n{_indent_headings(text)}" for heading, text in sections]
        content = "\n\n".join(texts)
    user = {"role": "user", "content": content}
    if shared:
        user = Opening(user)
        user.length = len("\n\n".join([*texts[:shared], ""]))
    return [{"role": "system", "content": system_prompt}, user]


def _indent_headings(text: str) -> str:
    """Indent lines that begin like a heading, so that an agent's or a guide's text cannot open a section.

    A lone surrogate, which no request can contain, is written as its escape.
    """
    if not text.isascii():
        text = text.encode(errors="backslashreplace").decode()
    return (f" {text}" if text.startswith("#") else text).replace("\n#", "\n #")
