"""Everything that `as_model` accepts."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from llm_fakes import BASE_URL, QUESTION, ScriptedTransport, answer

from aggregator import LLM, Budget, Price, as_model
from aggregator.agents.transcripts import transcript
from aggregator.errors import APITimeoutError, BudgetExceededError, ConfigError, RateLimitError, ServerError
from aggregator.llm.budget import spending
from aggregator.llm.ledger import collecting
from aggregator.llm.models import as_completion

SHAPE = {
    "choices": [{"message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}


def namespace(value: Any) -> Any:
    """Build an object with attributes, as an SDK returns it."""
    if isinstance(value, dict):
        return SimpleNamespace(**{key: namespace(item) for key, item in value.items()})
    return [namespace(item) for item in value] if isinstance(value, list) else value


class Dumping:
    def model_dump(self) -> dict[str, Any]:
        return SHAPE


@pytest.mark.requirement("built 10: callables, litellm, OpenAI's clients")
@pytest.mark.parametrize(
    "shape", ["hi", SHAPE, namespace(SHAPE), Dumping()], ids=["text", "dict", "object", "pydantic"]
)
async def test_every_shape_of_answer(shape: Any) -> None:
    """A callable may return a string, a dict or an SDK's object."""
    completion = await as_model(lambda messages: shape).complete(QUESTION)
    assert (completion.text, completion.finish_reason) == ("hi", "stop")
    if shape != "hi":
        assert completion.usage.input_tokens == 3


def test_a_model_is_returned_unchanged() -> None:
    """An `LLM`, or any object with `complete`, is returned as it is."""
    llm = LLM("m", base_url=BASE_URL, transport=ScriptedTransport(answer()))
    assert as_model(llm) is llm


def test_a_name_makes_a_client() -> None:
    """A model name is enough to make a client."""
    assert isinstance(as_model("ollama/qwen3:8b"), LLM)


async def test_async_callables_are_awaited() -> None:
    """`async def llm(messages)` runs on the caller's loop."""

    async def model(messages: Any, temperature: float = 1.0) -> str:
        return f"{messages[0]['content']} {temperature} {threading.current_thread() is threading.main_thread()}"

    assert (await as_model(model).complete("Hi", temperature=0.5)).text == "Hi 0.5 True"


async def test_sync_callables_do_not_block_the_loop() -> None:
    """Forty blocking calls run in parallel, each in its caller's context."""
    barrier = threading.Barrier(40, timeout=10)

    def model(messages: Any) -> str:
        barrier.wait()
        return "done"

    llm = as_model(model)
    async with asyncio.TaskGroup() as tasks:
        calls = [tasks.create_task(llm.complete("Hi")) for _ in range(40)]
    assert {call.result().text for call in calls} == {"done"}


async def test_a_stop_iteration_of_a_sync_callable_was_waited_for_for_ever() -> None:
    """No asyncio future holds one; it is a RuntimeError, as in a coroutine."""
    model = as_model(lambda messages: next(iter(())))
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        await asyncio.wait_for(model.complete([{"role": "user", "content": "hi"}]), 5)


async def test_only_options_that_a_callable_knows_are_passed() -> None:
    """A plain `llm(messages)` receives no options it does not accept; one with `**kwargs` receives all of them."""
    seen = {}

    def everything(messages: Any, **options: Any) -> str:
        seen.update(options)
        return ""

    await as_model(lambda messages: "").complete("Hi", max_tokens=5)
    await as_model(everything).complete("Hi", max_tokens=5, temperature=None, validate=str)
    assert seen == {"max_tokens": 5}


class Client:
    """A minimal OpenAI SDK client, sync or async."""

    def __init__(self, create: Any) -> None:
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=create))


@pytest.mark.requirement("built 10: callables, litellm, OpenAI's clients")
async def test_openais_clients() -> None:
    """Sync and async clients work, given the model's name."""
    seen = []

    def create(**request: Any) -> Any:
        seen.append(request["model"])
        return namespace(SHAPE)

    async def acreate(**request: Any) -> Any:
        return create(**request)

    for client in (Client(create), Client(acreate)):
        assert (await as_model(client, name="gpt-4o-mini").complete("Hi", max_tokens=4)).text == "hi"
    assert seen == ["gpt-4o-mini"] * 2
    with pytest.raises(ConfigError, match="name='gpt-4o-mini'"):
        as_model(Client(create))


@pytest.mark.requirement("built 10: callables, litellm, OpenAI's clients", "Trace: backend LiteLLM")
async def test_litellm() -> None:
    """The litellm module and its Router work: both have `acompletion`."""

    async def acompletion(**request: Any) -> Any:
        return {**SHAPE, "model": request["model"]}

    module = SimpleNamespace(acompletion=acompletion)
    assert (await as_model(module, name="openai/gpt-4o-mini").complete("Hi")).model == "openai/gpt-4o-mini"


class SDKError(Exception):
    def __init__(self, status_code: int) -> None:
        super().__init__("slow down")
        self.status_code = status_code


class ReadTimeout(Exception):  # noqa: N818 - named as httpx names it
    pass


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (SDKError(429), RateLimitError),
        (SDKError(503), ServerError),
        (ReadTimeout(), APITimeoutError),
        (KeyError("x"), KeyError),
    ],
    ids=["429", "503", "timeout", "bug"],
)  # fmt: skip
async def test_an_sdks_errors_become_ours(raised: Exception, expected: type[Exception]) -> None:
    """SDK errors are mapped by status or class; a bug in the callable is raised unchanged."""

    def model(messages: Any) -> str:
        raise raised

    with pytest.raises(expected):
        await as_model(model).complete("Hi")


async def test_calls_are_shown_counted_and_budgeted() -> None:
    """Calls of a callable are traced, counted and charged like those of `LLM`."""
    budget = Budget(calls=1)
    with transcript() as shown, collecting() as ledger, spending(budget):
        await as_model(lambda messages: SHAPE).complete("Hi")
        with pytest.raises(BudgetExceededError):
            await as_model(lambda messages: SHAPE).complete("Hi")
    assert "hi" in shown.render()
    assert ledger.totals()["agent"].input_tokens == 3
    assert budget.spent.calls == 1


def test_sync_call() -> None:
    """`llm(messages=...)` works on an adapter as on our client."""
    assert as_model(lambda messages: "hi")(messages=QUESTION).text == "hi"  # type: ignore[operator]


def test_an_unsupported_model_is_refused() -> None:
    """The error lists what is accepted as a model."""
    with pytest.raises(ConfigError, match=r"callable llm\(messages"):
        as_model(42)


def test_as_completion_keeps_ours() -> None:
    """A Completion is not converted."""
    completion = as_completion("hi")
    assert as_completion(completion) is completion


class Priced:
    """An OpenAI-shaped client whose answers state tokens, and a cost only if one is given."""

    def __init__(self, **cost: float) -> None:
        self._usage = {"prompt_tokens": 1_000, "completion_tokens": 100, **cost}

    async def acompletion(self, **request: Any) -> Any:
        return {**SHAPE, "usage": self._usage}


@pytest.mark.parametrize(
    ("client", "name", "prices", "cost"),
    [
        (Priced(), "openai/gpt-4o-mini", {"gpt-4o-mini": Price(input=1, output=10)}, 0.002),
        (Priced(), "mine", {"mine": Price(input=1, output=10)}, 0.002),
        (Priced(cost=0.5), "mine", {"mine": Price(input=1, output=10)}, 0.5),
    ],
    ids=["a provider's model", "a name of one's own", "told by the answer"],
)
async def test_a_budget_in_usd_over_a_callable(client: Any, name: str, prices: Any, cost: float) -> None:
    """A callable is priced by its name, as an `LLM` is; a cost stated in the answer takes precedence."""
    budget = Budget(usd=1.0)
    with spending(budget):
        completion = await as_model(client, name=name, prices=prices).complete("Hi", max_tokens=100)
    assert completion.usage.cost == pytest.approx(cost)
    assert budget.spent.usd == pytest.approx(cost)


async def test_a_kept_price_serves_a_callable_too() -> None:
    """genai-prices, if installed, knows the model that litellm will call."""
    pytest.importorskip("genai_prices")
    budget = Budget(usd=1.0)
    with spending(budget):
        await as_model(Priced(), name="openai/gpt-4o-mini").complete("Hi", max_tokens=100)
    assert budget.spent.usd == pytest.approx((1_000 * 0.15 + 100 * 0.60) / 1e6)


async def test_a_callable_without_a_price_is_refused_before_it_is_called() -> None:
    """Under a budget in USD, the error explains where to give the price."""
    with spending(Budget(usd=1.0)), pytest.raises(ConfigError, match=r"prices=\{'callable/mine': Price\(input="):
        await as_model(lambda messages: pytest.fail("called"), name="mine").complete("Hi")
