"""The owner answers workers' calls with its own models, keys, cassette, budget and ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llm_fakes import BASE_URL, ScriptedTransport, answer

from aggregator import LLM, Budget, as_model, cassette, transcript
from aggregator.errors import BudgetExceededError, ConfigError
from aggregator.llm.calls import ChatCall
from aggregator.llm.ledger import collecting
from aggregator.llm.messages import normalise
from aggregator.llm.owner import Call, Owner, current_owner


def ask(model: int, *, lineage: str = "train/sample=3", stream: bool = False) -> Call:
    chat = ChatCall(model="tiny", messages=normalise("Hi"), stream=stream)
    return Call(model=model, lineage=lineage, role="guide", chat=chat)


def client(*, budget: Budget | None = None) -> tuple[LLM, ScriptedTransport]:
    transport = ScriptedTransport(answer("hello"))
    llm = LLM("openai-compatible/tiny", base_url=BASE_URL, api_key="sk-1", transport=transport, budget=budget)
    return llm, transport


def test_an_ordinary_process_has_no_owner() -> None:
    """The client makes its calls itself."""
    assert current_owner() is None


def test_a_model_keeps_its_number() -> None:
    """The same model keeps its number; another model has another one."""
    owner = Owner()
    (first, _), (second, _) = client(), client()
    assert [owner.number_of(model) for model in (first, second, first)] == [0, 1, 0]
    assert owner.model(1) is second


async def test_a_call_is_recorded_with_its_workers_lineage(tmp_path: Path) -> None:
    """Lineage and role come from the call; key, budget and ledger from the owner."""
    owner, budget = Owner(), Budget(calls=1)
    llm, transport = client(budget=budget)
    call = ask(owner.number_of(llm))
    with cassette(tmp_path / "calls.yaml", mode="all"), collecting() as ledger:
        completion = await owner.answer(call)
        with pytest.raises(BudgetExceededError):
            await owner.answer(call)
    assert completion.text == "hello"
    assert transport.requests[0].headers["authorization"] == "Bearer sk-1"
    assert ledger.totals()["guide"].calls == budget.spent.calls == 1
    assert '"lineage":"train/sample=3"' in (tmp_path / "calls.yaml").read_text()


async def test_an_async_check_validates_a_structured_answer() -> None:
    """`validate` may be async: it runs in the worker."""
    owner = Owner()
    llm, transport = client()
    chat = ChatCall(model="tiny", messages=normalise("Hi"), response_format={"type": "json_object"})
    checked: list[str] = []

    async def check(text: str) -> None:
        checked.append(text)

    await owner.answer(Call(model=owner.number_of(llm), lineage="", role="agent", chat=chat), check)
    assert (checked, len(transport.requests)) == (["hello"], 1)


async def test_a_stream_is_read_through_the_owner() -> None:
    """Deltas arrive one by one, then the whole answer."""
    owner = Owner()
    llm, _ = client()
    pieces = [piece async for piece in owner.deltas(ask(owner.number_of(llm), stream=True))]
    assert [getattr(piece, "text", piece) for piece in pieces] == ["hello", "hello"]


async def test_a_callable_model_is_called_with_its_options() -> None:
    """A callable is called in this process, and is not in its transcript."""
    asked: list[Any] = []

    def model(messages: Any, max_tokens: int) -> str:
        asked.append((messages, max_tokens))
        return "hello"

    owner = Owner()
    number = owner.number_of(as_model(model))
    call = Call(model=number, lineage="", role="agent", messages="Hi", options={"max_tokens": 3})
    with transcript() as shown:
        assert (await owner.answer(call)).text == "hello"
    assert asked == [([{"role": "user", "content": "Hi"}], 3)]
    assert shown.render() == ""
    with pytest.raises(ConfigError, match="Expected a streamed call of an LLM"):
        await anext(owner.deltas(call))
