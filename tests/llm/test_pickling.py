"""A pickled client holds settings only: no key, no budget, nothing bound to one process."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import random
import time
from functools import partial
from typing import Any

import pytest
from llm_fakes import BASE_URL, ScriptedTransport, answer

from aggregator import LLM, Budget, Price
from aggregator.errors import ConfigError
from aggregator.llm import owner
from aggregator.llm.retry import RetryPolicy

KEY = "sk-test-4f9c2b7a1e8d"


def importable_key() -> str:
    return KEY


def keyed(key: str) -> str:
    return key


class Keys:
    """Returns a key from an attribute, which a pickle would contain."""

    def __call__(self) -> str:
        return KEY

    def method(self) -> str:
        return KEY


class Named(LLM):
    """A user's subclass with its own attribute and constructor."""

    def __init__(self, nickname: str) -> None:
        super().__init__("openai-compatible/tiny", base_url=BASE_URL, max_attempts=2)
        self.nickname = nickname


def test_settings_survive_a_pickle() -> None:
    """The copy has the same model, address, limits, prices, retry policy and importable key function."""
    llm = LLM(
        "openai/gpt-4o-mini",
        base_url=BASE_URL,
        api_key=importable_key,
        max_attempts=7,
        timeout=5.0,
        max_concurrency=3,
        rpm=60,
        tpm=1000,
        prices={"gpt-4o-mini": Price(input=1.0, output=2.0)},
        retry=RetryPolicy(first_delay=0.25),
    )
    llm.timeout = 9.0
    loaded = pickle.loads(pickle.dumps(llm))
    assert type(loaded) is LLM
    assert (loaded._given, loaded._options) == (llm._given, {**llm._options, "timeout": 9.0})
    assert loaded.prices == llm.prices
    assert (loaded._line.policy, loaded.timeout) == (llm._line.policy, 9.0)
    assert loaded.endpoint.api_key is importable_key


async def test_a_pickled_client_answers() -> None:
    """The copy uses the transport of the process that loads it."""
    loaded = pickle.loads(pickle.dumps(LLM("openai-compatible/tiny", base_url=BASE_URL)))
    loaded._line.transport = ScriptedTransport(answer("hello"))
    assert (await loaded.complete("Hi")).text == "hello"


def test_a_subclass_keeps_its_own_attributes() -> None:
    """The constructor of a subclass is not called again; its attributes are kept."""
    loaded = pickle.loads(pickle.dumps(Named("tiny")))
    assert (type(loaded), loaded.nickname, loaded._line.policy.max_attempts) == (Named, "tiny", 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("api_key", KEY),
        ("api_key", lambda: KEY),
        ("api_key", partial(keyed, KEY)),
        ("api_key", Keys()),
        ("api_key", Keys().method),
        ("budget", Budget(usd=1)),
        ("transport", ScriptedTransport(answer())),
        ("clock", time.perf_counter),
        ("sleep", partial(asyncio.sleep)),
        ("random", random.Random(0)),
        ("env", {"OPENAI_API_KEY": KEY}),
        ("base_url", "http://me:password-1@127.0.0.1:9/v1"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value and len(value) < 10 else "",
)
def test_an_argument_that_cannot_be_pickled_is_named(name: str, value: Any) -> None:
    """The error names the argument and the remedy, and shows neither key nor password."""
    llm = LLM("openai/gpt-4o-mini", **{"base_url": BASE_URL, name: value})
    with pytest.raises(ConfigError, match=rf"^Expected LLM.* to hold only settings .* - at LLM\.{name}$") as caught:
        pickle.dumps(llm)
    assert KEY not in str(caught.value)
    assert "password-1" not in str(caught.value)


def test_no_key_of_the_environment_is_in_a_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is read from the environment again when the pickle is loaded."""
    monkeypatch.setitem(os.environ, "OPENAI_API_KEY", KEY)
    data = pickle.dumps(LLM("openai/gpt-4o-mini"))
    assert KEY.encode() not in data
    monkeypatch.setitem(os.environ, "OPENAI_API_KEY", "another")
    assert pickle.loads(data).endpoint.api_key == "another"


def test_a_copied_agent_shares_its_client() -> None:
    """`copy` and `deepcopy` return the client itself, with its key and budget."""
    llm = LLM("openai/gpt-4o-mini", api_key=KEY, budget=Budget(usd=1))
    assert copy.copy(llm) is llm
    assert copy.deepcopy(llm) is llm


def test_every_attribute_is_known() -> None:
    """Attributes that the constructor sets are not mistaken for a subclass's."""
    one, several = LLM("openai-compatible/tiny", base_url=BASE_URL), LLM(["openai/gpt-4o-mini", "openai/gpt-4o"])
    assert set(vars(one)) | set(vars(several)) == owner.ATTRIBUTES
