"""The ticket router, and its training from its cassette, from the simulated model or from a real provider.

The agent routes support tickets to teams by an instruction that training writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import unified_diff
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from time import perf_counter
from typing import Annotated, Any, TextIO

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from aggregator import portal
from aggregator.agents.bundles import bundle
from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode
from aggregator.errors import CassetteMissError, ConfigError
from aggregator.observing.observer import Watching, painted
from aggregator.protocols import ChatModel, Transport
from aggregator.records import HTTPReply, HTTPRequest, TrainingResult
from aggregator.text import readable

TEAMS = ("account", "billing", "sales", "shipping", "technical")

FRAME = f"""

The teams are {", ".join(TEAMS)}. Where several rules fit, follow the one with the most words in the ticket. \
Answer with the team's name and nothing else."""


class TicketRouter(Module):
    """Names the team that should handle a ticket.

    Three things are trained: the instruction, how many words of the ticket the model sees, and the code that
    prepares the ticket.
    """

    def __init__(self, llm: ChatModel) -> None:
        self.llm = llm
        self.instruction = ParameterNode(
            "Route the ticket to the team that should handle it.\nIf no rule applies, answer sales.",
            description="How to route a ticket: sentences, then rules, one line a team: `word, other word -> team`. "
            "A rule's word must stand in the prepared ticket as it is written there.",
        )
        self.excerpt_words = ParameterNode(
            8,
            type=Annotated[int, Meta(ge=5, le=80)],
            description="How many words of the prepared ticket the model sees.",
        )

    @bundle(trainable=True)
    def clean(self, ticket: str) -> str:
        """Prepare the ticket's text for the model."""
        return ticket

    @bundle()
    def excerpt(self, text: str) -> str:
        """Cut the text to `excerpt_words` words; … stands where it goes on."""
        words = text.split()
        shown = words[: self.excerpt_words.data]
        return " ".join(shown) + (" …" if len(words) > len(shown) else "")

    async def forward(self, ticket: str) -> str:
        """Return the name of a team."""
        completion = await self.llm.complete(
            [
                {"role": "system", "content": self.instruction.data + FRAME},
                {"role": "user", "content": self.excerpt(self.clean(ticket))},
            ]
        )
        return completion.text.strip()


def right_team(_: str, answer: Any, team: str) -> tuple[float, str]:
    """Judge an answer: the score, and in words what was expected and what came.

    >>> right_team("Where is my parcel?", "sales", "shipping")
    (0.0, 'Expected "shipping", got "sales".')
    """
    if answer == team:
        return 1.0, "Correct."
    return 0.0, f'Expected "{team}", got "{answer}".'


HERE = Path(__file__).parent
MODEL = "openai-compatible/simulated-1"
SIMULATED_URL = "http://simulated-model.invalid/v1"
"""The simulated model's address in the cassette, whatever its port. No such host can exist (RFC 2606)."""
EPOCHS = 2
BATCH_SIZE = 10
JOURNAL = "journal.yaml"
"""A real provider's paid answers, in the folder of the run."""
RECORDING = "recording.yaml"
"""A cassette until it is complete, in the folder of the run."""


class Ticket(Struct, frozen=True):
    """A support ticket and the team that handled it."""

    text: str
    team: str


class Tickets(Struct, frozen=True):
    """The bundled data set."""

    train: list[Ticket]
    test: list[Ticket]


class Settings(Struct, frozen=True, kw_only=True):
    """The options of `aggregator demo`. `model` None is the simulated model, replayed unless `serve`.

    `cassette` None is the bundled one.
    """

    seed: int = 0
    concurrency: int = 16
    serve: bool = False
    record: bool = False
    model: str | None = None
    cassette: Path | None = None
    out: Path = Path("runs/demo")


class Outcome(Struct, frozen=True, kw_only=True):
    """The demo's result and duration."""

    result: TrainingResult
    source: str
    seconds: float


def tickets() -> Tickets:
    """Read the bundled data set."""
    return msgspec.json.decode((HERE / "tickets.json").read_bytes(), type=Tickets)


def cassette_path() -> Path:
    """Return the demo's cassette: the checkout's, else the wheel's."""
    checkout = HERE.parent.parent / "cassettes" / "demo.yaml"
    return checkout if (HERE.parent.parent / "pyproject.toml").exists() else HERE / "demo.yaml"


def steps() -> int:
    """Return the number of the demo's steps."""
    return EPOCHS * -(-len(tickets().train) // BATCH_SIZE)


def check(settings: Settings) -> Settings:
    """Return the settings, or raise ConfigError for invalid combinations."""
    if settings.serve and settings.model is not None:
        raise ConfigError(
            f"Expected --serve or --model, got both; --serve runs the simulated model, not {settings.model}"
        )
    if settings.concurrency < 1:
        raise ConfigError(f"Expected --concurrency of at least 1, got {settings.concurrency}")
    return settings


def train_demo(settings: Settings, *, observers: Sequence[Watching] = ()) -> Outcome:
    """Train for two epochs and write `events.jsonl` and `result.json` to the folder `settings.out`.

    The same seed gives the same bytes in `result.json`, at any concurrency. Raises CassetteMissError if the cassette
    was recorded with other code, seed or data set.
    """
    from aggregator.observing.configuring import events_file
    from aggregator.training.checkpoints import save_result

    settings = check(settings)
    started = perf_counter()
    try:
        with events_file(settings.out / "events.jsonl"), _source(settings) as (llm, source):
            result = _train(settings, llm, observers)
    except CassetteMissError as error:
        raise CassetteMissError(f"{error}\n\n{_remedy(settings)}") from error
    if settings.record:  # only now: an incomplete recording must not replace a complete one
        shutil.move(settings.out / RECORDING, settings.cassette or cassette_path())
    save_result(result, settings.out / "result.json")
    return Outcome(result=result, source=source, seconds=perf_counter() - started)


def _train(settings: Settings, llm: ChatModel, observers: Sequence[Watching]) -> TrainingResult:
    from aggregator.training.algorithms import AggregatedUpdate
    from aggregator.training.gates import improves_on_batch
    from aggregator.training.proposers import LLMOptimizer

    data = tickets()
    trainer = AggregatedUpdate(
        TicketRouter(llm),
        LLMOptimizer(llm=llm),
        llm=llm,
        gate=improves_on_batch(),
        observers=observers,
        max_concurrency=settings.concurrency,
        seed=settings.seed,
    )
    return trainer.train(
        right_team,
        [(ticket.text, ticket.team) for ticket in data.train],
        test_dataset=[(ticket.text, ticket.team) for ticket in data.test],
        num_epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        eval_frequency=3,
    )


def _remedy(settings: Settings) -> str:
    if settings.seed != Settings().seed:
        return f"The cassette was recorded with seed 0, not {settings.seed}; add --serve to ask the simulated model."
    return (
        "The demo's cassette is stale: the code or the data has changed since it was recorded. "
        "Record it again with `make record` (which runs `aggregator demo --serve --record`)."
    )


@contextmanager
def _source(settings: Settings) -> Iterator[tuple[ChatModel, str]]:
    """Open the source of answers: a cassette, the simulated model, or a provider; print which."""
    from aggregator.cassettes.recorder import cassette

    path = settings.cassette or cassette_path()
    with ExitStack() as stack:
        if settings.model is not None:
            llm, source = _client(settings.model), settings.model
        elif settings.serve or settings.record:
            llm, source = stack.enter_context(_simulated(settings.seed)), "the simulated model, over HTTP"
        else:
            llm, source = _client(MODEL, base_url=SIMULATED_URL), "a recording of the simulated model, offline"
            stack.enter_context(cassette(path, mode="none"))
        if settings.record:
            stack.enter_context(cassette(settings.out / RECORDING, mode="all", layout="journal"))
        elif settings.model is not None:
            journal = settings.out / JOURNAL
            stack.enter_context(cassette(journal, mode="all", layout="journal"))
            source += f"; every exchange is kept in {journal}"
        yield llm, source


@contextmanager
def _simulated(seed: int) -> Iterator[ChatModel]:
    from aggregator.llm.transport import AiohttpTransport
    from aggregator.simulation import SimulatedModel

    with SimulatedModel(seed) as server, ExitStack() as stack:
        transport = AiohttpTransport()
        stack.callback(portal.call, transport.aclose)
        route = Rerouted(transport, source=SIMULATED_URL, target=server.base_url)
        yield _client(MODEL, base_url=SIMULATED_URL, transport=route)


def _client(model: str, **options: Any) -> ChatModel:
    from aggregator.llm.client import LLM
    from aggregator.llm.models import as_model

    return as_model(LLM(model, **options))


class Rerouted(Transport):
    """A transport that sends requests for one address to another."""

    def __init__(self, inner: Transport, *, source: str, target: str) -> None:
        self._inner = inner
        self._source = source
        self._target = target

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        """Send one request to the target of its address."""
        if request.url.startswith(self._source):
            request = replace(request, url=self._target + request.url.removeprefix(self._source))
        return await self._inner.send(request, timeout=timeout)


# ---- the summary for a person

_BAR = 30
_WIDTH, _NARROWEST = 110, 30
_AS_IT_IS: Any = {"replace_whitespace": False, "break_on_hyphens": False}
_COLORS = {"+": "green", "-": "red"}


def summary(outcome: Outcome, out: Path, stream: TextIO) -> str:
    """Return the readable summary of a run, in color if the stream supports colors."""
    result = outcome.result
    parts = [
        f"Answers came from {outcome.source}.",
        _scores(result, _block(stream)),
        *(_change(name, result, stream) for name in result.parameters),
        _usage(outcome),
        f"Written: {out / 'result.json'}, {out / 'events.jsonl'}",
        _improvement(result),
    ]
    return "\n\n".join(parts) + "\n"


def _improvement(result: TrainingResult) -> str:
    first, last = result.evaluations[0], result.evaluations[-1]
    return (
        f"Test score: {readable(first.score)} before training, {readable(last.score)} after, "
        f"on {len(last.scores)} tickets that were not trained on."
    )


def _block(stream: TextIO) -> str:
    """Return the character for bars: a block, or an ASCII one if the stream cannot show it."""
    try:
        "█".encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return "#"
    return "█"


def _scores(result: TrainingResult, block: str) -> str:
    """Show the score of each minibatch and, if it was evaluated, of the test set."""
    tests = {evaluation.step: evaluation.score for evaluation in result.evaluations}
    lines = [f"step  epoch  {'minibatch score':<{_BAR + 7}}test score", _row("start", "", "", tests.get(0))]
    for report in result.history:
        bar = "" if report.score is None else f"{report.score:.2f} " + block * round(report.score * (_BAR - 5))
        row = _row(f"{report.step + 1:>5}", f"{report.epoch + 1:>5}", bar, tests.get(report.step + 1))
        is_refused = report.update and not report.decision.accepted
        lines.append(row + (f"  (not applied: {report.decision.reason})" if is_refused else ""))
    return "\n".join(lines)


def _row(step: str, epoch: str, bar: str, test: float | None) -> str:
    return f"{step:<5} {epoch:<5}  {bar:<{_BAR + 7}}{'' if test is None else f'{test:.3f}'}".rstrip()


def _change(name: str, result: TrainingResult, stream: TextIO) -> str:
    before, after = result.initial_parameters[name], result.parameters[name]
    if before == after:
        return f"{name}: unchanged, {before!r}"
    width = min(_WIDTH, max(get_terminal_size().columns, _NARROWEST)) if stream.isatty() else _WIDTH
    lines = []
    for line in unified_diff(str(before).splitlines(), str(after).splitlines(), lineterm="", n=99):
        if not line.startswith(("---", "+++", "@@")):
            shown = fill(line[1:], width, initial_indent=f"  {line[0]} ", subsequent_indent="      ", **_AS_IT_IS)
            lines.append(painted(shown, _COLORS.get(line[0]), stream))
    return "\n".join([f"{name}:", *lines])


def _usage(outcome: Outcome) -> str:
    usage: dict[str, Any] = dict(outcome.result.usage)
    width = max(len(role) for role in [*usage, "total"])
    rows = [f"{'role':<{width}}  calls  tokens in  tokens out"]
    calls = read = written = 0
    for role, spent in usage.items():
        rows.append(
            f"{role:<{width}}  {spent.calls:>5}  {spent.input_tokens or 0:>9,}  {spent.output_tokens or 0:>10,}"
        )
        calls, read, written = (
            calls + spent.calls,
            read + (spent.input_tokens or 0),
            written + (spent.output_tokens or 0),
        )
    rows.append(f"{'total':<{width}}  {calls:>5}  {read:>9,}  {written:>10,}   in {outcome.seconds:.1f} seconds")
    return "\n".join(rows)
