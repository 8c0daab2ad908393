"""Names, addresses and keys: how names are resolved, and which addresses receive a key."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from aggregator.errors import ConfigError
from aggregator.llm.calls import ChatCall
from aggregator.llm.names import Endpoint, resolve
from aggregator.llm.providers import providers

CALL = ChatCall(model="m", messages=({"role": "user", "content": "Hi"},))
KEYS = {"OPENAI_API_KEY": "sk-mine"}
GATEWAY = "https://gateway.example/v1"
AZURE = {"AZURE_OPENAI_ENDPOINT": "https://x.example"}


def where(model: str | None, env: dict[str, str] | None = None, **given: Any) -> Endpoint:
    return resolve(model, env=env or {}, **given)


@pytest.mark.requirement("client 13: provider/model, provider:model, tags and vendors")
@pytest.mark.parametrize(
    ("name", "provider", "model"),
    [
        ("openai/gpt-4o-mini", "openai", "gpt-4o-mini"),
        ("openai:gpt-4o-mini", "openai", "gpt-4o-mini"),
        ("OpenAI/gpt-4o-mini", "openai", "gpt-4o-mini"),
        ("gpt-4o", "openai", "gpt-4o"),
        ("o3-mini", "openai", "o3-mini"),
        ("ft:gpt-4o:acme::1", "openai", "ft:gpt-4o:acme::1"),
        ("claude-sonnet-4-5", "anthropic", "claude-sonnet-4-5"),
        ("gemini-2.5-flash", "gemini", "gemini-2.5-flash"),
        ("google-gla:gemini-2.5-flash", "gemini", "gemini-2.5-flash"),
        ("ollama/qwen3:8b", "ollama", "qwen3:8b"),
        ("ollama:qwen3:8b", "ollama", "qwen3:8b"),
        ("ollama_chat/llama3", "ollama", "llama3"),
        ("openrouter/meta-llama/llama-3.3-70b-instruct:free", "openrouter", "meta-llama/llama-3.3-70b-instruct:free"),
        ("openrouter:meta-llama/llama-3.3:free", "openrouter", "meta-llama/llama-3.3:free"),
        ("together_ai/meta/llama", "together", "meta/llama"),
        ("fireworks_ai/accounts/fireworks/models/x", "fireworks", "accounts/fireworks/models/x"),
        ("hosted_vllm/Qwen/Qwen3-8B", "vllm", "Qwen/Qwen3-8B"),
    ],
)
def test_names(name: str, provider: str, model: str) -> None:
    """`provider/model`, `provider:model`, other libraries' prefixes, tags, and bare names of the three families."""
    found = where(name)
    assert (found.provider, found.model) == (provider, model)


@pytest.mark.requirement("built 2: unknown names list the nearest")
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("opnai/gpt-4o", "nearest known providers: openai"),
        ("antropic:claude", "nearest known providers: anthropic"),
        ("qwen3:8b", "ollama/qwen3:8b"),
        ("meta-llama/llama-3.3:free", "openrouter/meta-llama/llama-3.3:free"),
        ("some-model", "openai-compatible"),
        ("/", "anthropic"),
    ],
)
def test_an_unknown_name_lists_the_nearest(name: str, hint: str) -> None:
    """The error suggests the most similar names."""
    with pytest.raises(ConfigError, match=r"provider/model") as caught:
        where(name)
    assert hint in str(caught.value)


@pytest.mark.parametrize("name", ["qwen3:8b", "meta-llama/llama-3.3:free", "some-model"])
def test_with_a_base_url_any_name_is_valid(name: str) -> None:
    """With a base_url, a name without a known provider is the model as that server calls it."""
    found = where(name, base_url="http://127.0.0.1:8080/v1")
    assert (found.provider, found.model, found.base_url) == ("openai-compatible", name, "http://127.0.0.1:8080/v1")
    found.require_key()


def test_a_compatible_server_needs_an_address() -> None:
    """`openai-compatible/x` without a base_url is an error."""
    with pytest.raises(ConfigError, match="base_url"):
        where("openai-compatible/x")
    with pytest.raises(ConfigError, match="AZURE_OPENAI_ENDPOINT"):
        where("azure/d")
    with pytest.raises(ConfigError, match="http"):
        where("openai/x", base_url="localhost:8000/v1")


@pytest.mark.requirement("client 13: a custom base_url gets no default key")
@pytest.mark.parametrize(
    ("env", "given", "key"),
    [
        (KEYS, {}, "sk-mine"),
        (KEYS, {"base_url": "https://api.openai.com/v1/"}, "sk-mine"),
        (KEYS, {"base_url": "https://elsewhere.example/v1"}, None),
        (KEYS, {"base_url": "https://elsewhere.example/v1", "api_key": "sk-given"}, "sk-given"),
        ({**KEYS, "OPENAI_BASE_URL": GATEWAY}, {}, "sk-mine"),
        ({**KEYS, "OPENAI_BASE_URL": GATEWAY}, {"base_url": GATEWAY}, "sk-mine"),
        ({**KEYS, "OPENAI_BASE_URL": GATEWAY}, {"base_url": "https://elsewhere.example"}, None),
        ({"OPENAI_API_KEY": ""}, {"api_key": "sk-given"}, "sk-given"),
    ],
)  # fmt: skip
def test_a_default_key_is_sent_to_its_own_address_only(env: dict[str, str], given: Any, key: str | None) -> None:
    """A key from the environment is never sent to a base_url that was given separately."""
    found = where("openai/gpt-4o", env, **given)
    request = found.codec.encode(CALL)
    assert found.api_key == key
    assert request.headers.get("authorization") == (f"Bearer {key}" if key else None)
    assert request.secrets == ((key,) if key else ())


@pytest.mark.requirement("client 13: a custom base_url gets no default key")
@pytest.mark.parametrize("name", ["anthropic/claude", "gemini/gemini", "azure/d", "groq/x", "mistral/x"])
def test_no_provider_leaks_its_key(name: str) -> None:
    """The rule holds for every provider and every key variable."""
    env = {variable: "k-mine" for provider in providers().values() for variable in provider.keys}
    request = where(name, env, base_url="https://elsewhere.example").codec.encode(CALL)
    assert "k-mine" not in str(request)


@pytest.mark.requirement("client 13: the SDKs' variables")
@pytest.mark.parametrize(
    ("name", "env", "header", "value"),
    [
        ("anthropic/c", {"ANTHROPIC_API_KEY": "k"}, "x-api-key", "k"),
        ("anthropic/c", {"ANTHROPIC_AUTH_TOKEN": "k"}, "authorization", "Bearer k"),
        ("gemini/g", {"GEMINI_API_KEY": "late", "GOOGLE_API_KEY": "k"}, "x-goog-api-key", "k"),
        ("gemini/g", {"GEMINI_API_KEY": "k"}, "x-goog-api-key", "k"),
        ("openrouter/a/b", {"OPENROUTER_API_KEY": "k"}, "authorization", "Bearer k"),
        ("huggingface/a/b", {"HF_TOKEN": "k"}, "authorization", "Bearer k"),
        ("ollama/q", {"OLLAMA_API_KEY": "k"}, "authorization", "Bearer k"),
        ("azure/d", {**AZURE, "AZURE_OPENAI_API_KEY": "k"}, "api-key", "k"),
        ("azure/d", {**AZURE, "AZURE_OPENAI_AD_TOKEN": "k"}, "authorization", "Bearer k"),
    ],
)  # fmt: skip
def test_keys_as_the_sdks_read_them(name: str, env: dict[str, str], header: str, value: str) -> None:
    """Each provider's own variables are read in its SDK's order and sent in its header."""
    assert where(name, env).codec.encode(CALL).headers[header] == value


@pytest.mark.parametrize(
    ("given", "header", "value"),
    [
        ("0123456789abcdef", "api-key", "0123456789abcdef"),
        ("eyJ0eXAi.eyJhdWQi.c2ln", "authorization", "Bearer eyJ0eXAi.eyJhdWQi.c2ln"),
        (lambda: "token", "authorization", "Bearer token"),
    ],
    ids=["key", "token", "function"],
)
def test_azures_keys_and_tokens_have_their_own_headers(given: Any, header: str, value: str) -> None:
    """A token of Entra ID is always a bearer token; only a key uses the key header."""
    headers = where("azure/d", AZURE, api_key=given).codec.encode(CALL).headers
    assert {name: headers.get(name) for name in ("api-key", "authorization") if name in headers} == {header: value}


async def acquired() -> str:
    return "token"


class Acquiring:
    async def __call__(self) -> str:
        return "token"


@pytest.mark.parametrize("given", [acquired, Acquiring()], ids=["function", "object"])
def test_a_token_that_must_be_awaited_is_refused(given: Any) -> None:
    """Its repr would be sent as the key: azure.identity.aio's functions are coroutines."""
    with pytest.raises(ConfigError, match="azure.identity"):
        where("azure/d", AZURE, api_key=given)


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("openai/gpt-4o", "OPENAI_API_KEY"),
        ("anthropic/claude", "ANTHROPIC_API_KEY"),
        ("gemini/g", "GOOGLE_API_KEY"),
        ("groq/x", "GROQ_API_KEY"),
    ],
)
def test_a_missing_key_names_its_variable(name: str, variable: str) -> None:
    """The error is raised when a request is about to be sent: a replay needs no key."""
    found = where(name)
    assert found.codec.encode(CALL).url
    with pytest.raises(ConfigError, match=variable):
        found.require_key()


@pytest.mark.requirement("client 13: local servers need no key")
@pytest.mark.parametrize("name", ["ollama/q", "llamacpp/q", "lmstudio/q", "vllm/q"])
def test_local_servers_need_no_key(name: str) -> None:
    """Servers on the user's machine are called without a key."""
    where(name).require_key()


@pytest.mark.parametrize(
    ("env", "url"),
    [
        ({}, "http://localhost:11434/v1"),
        ({"OLLAMA_BASE_URL": "http://box:1/v1"}, "http://box:1/v1"),
        ({"OLLAMA_API_BASE": "http://box:1"}, "http://box:1/v1"),
        ({"OLLAMA_HOST": "box:1"}, "http://box:1/v1"),
    ],
)
def test_ollama_addresses(env: dict[str, str], url: str) -> None:
    """Ollama's address works with and without scheme and version."""
    assert where("ollama/q", env).base_url == url


def test_organisation_project_and_custom_headers() -> None:
    """OpenAI's other variables become headers; custom headers are one per line."""
    env = {**KEYS, "OPENAI_ORG_ID": "o", "OPENAI_PROJECT_ID": "p", "OPENAI_CUSTOM_HEADERS": "X-A: 1\nX-B: 2"}
    headers = where("openai/gpt-4o", env).codec.encode(CALL).headers
    names = ("openai-organization", "openai-project", "x-a", "x-b")
    assert [headers[name] for name in names] == ["o", "p", "1", "2"]


@pytest.mark.requirement(
    "client 13: Trace's variables",
    "Trace: backend LiteLLM",
    "Trace: TRACE_DEFAULT_LLM_BACKEND, TRACE_LITELLM_MODEL",
)
@pytest.mark.parametrize(
    ("env", "provider", "model"),
    [
        ({"TRACE_LITELLM_MODEL": "anthropic/claude-x"}, "anthropic", "claude-x"),
        ({"DEFAULT_LITELLM_MODEL": "gpt-4o"}, "openai", "gpt-4o"),
        ({"TRACE_LITELLM_MODEL": "groq/a", "DEFAULT_LITELLM_MODEL": "gpt-4o"}, "groq", "a"),
        ({"TRACE_DEFAULT_LLM_BACKEND": "LiteLLM", "TRACE_LITELLM_MODEL": "groq/a"}, "groq", "a"),
    ],
)  # fmt: skip
def test_traces_variables(env: dict[str, str], provider: str, model: str) -> None:
    """Without a name, Trace's environment variables choose the model."""
    found = where(None, env)
    assert (found.provider, found.model) == (provider, model)


@pytest.mark.requirement(
    "client 13: Trace's variables",
    "Trace: backend CustomLLM",
    "Trace's defect 32: a custom model raised a NameError; verbose, timeouts and usage were lost",
)
def test_traces_custom_backend() -> None:
    """CustomLLM sets name, address and key."""
    env = {
        "TRACE_DEFAULT_LLM_BACKEND": "CustomLLM",
        "TRACE_CUSTOMLLM_MODEL": "my/model",
        "TRACE_CUSTOMLLM_URL": "http://box:4000/",
        "TRACE_CUSTOMLLM_API_KEY": "k",
        **KEYS,
    }
    found = where(None, env)
    assert (found.model, found.base_url, found.api_key) == ("my/model", "http://box:4000/", "k")
    assert where(None, env, base_url="http://elsewhere").api_key is None


@pytest.mark.requirement("client 13: Trace's variables", "Trace: backend AutoGen")
def test_traces_autogen_backend() -> None:
    """The first entry of OAI_CONFIG_LIST is used; a value that is not a JSON list is refused."""
    config = '[{"model": "gpt-4o", "api_key": "k"}, {"model": "b"}]'
    env = {"TRACE_DEFAULT_LLM_BACKEND": "AutoGen", "OAI_CONFIG_LIST": config}
    assert (where(None, env).model, where(None, env).api_key) == ("gpt-4o", "k")
    with pytest.raises(ConfigError, match="OAI_CONFIG_LIST"):
        where(None, {**env, "OAI_CONFIG_LIST": "file.json"})


def test_without_a_name_the_error_says_what_to_set() -> None:
    """Trace's default of gpt-4o is not adopted."""
    with pytest.raises(ConfigError, match="TRACE_LITELLM_MODEL"):
        where(None)


def test_the_documented_table_is_complete() -> None:
    """docs/models.md names every provider, alias, key variable and address in the code."""
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    for name, provider in providers().items():
        row = next(line for line in text.splitlines() if line.startswith("|") and f"`{name}`" in line)
        told = {*provider.aliases, *provider.keys, *provider.base_urls, provider.base_url or provider.name}
        assert {word for word in told if f"`{word}`" not in row} == set()


@pytest.mark.requirement("built 1: one file and an entry point add a provider")
def test_a_third_party_adds_a_provider_with_one_file(tmp_path: Path) -> None:
    """A module and an entry point of the group `aggregator.providers` make `acme/model` a valid name."""
    (tmp_path / "acme.py").write_text(
        textwrap.dedent(
            """
            from aggregator.llm.calls import Provider
            from aggregator.llm.codecs.openai import OpenAIChat

            class Acme(OpenAIChat):
                def url(self, call):
                    return f"{self.target.base_url}/talk"

            provider = Provider(
                name="acme", codec=Acme, base_url="https://acme.example", keys={"ACME_KEY": "x-acme-key"}
            )
            """
        )
    )
    info = tmp_path / "acme-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[aggregator.providers]\nacme = acme:provider\n")
    script = textwrap.dedent(
        """
        from aggregator.llm.calls import ChatCall
        from aggregator.llm.names import resolve
        end = resolve("acme/model", env={"ACME_KEY": "k"})
        request = end.codec.encode(ChatCall(model=end.model, messages=({"role": "user", "content": "Hi"},)))
        print(end.provider, end.model, request.url, request.headers["x-acme-key"])
        """
    )
    out = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["acme", "model", "https://acme.example/talk", "k"]


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "http://a b/v1",
        "http://a/v1\u200b/x",
        "ftp://x/v1",
        "http://",
        "http://[::1/v1",
        "http://x:port/v1",
        "http://x:99999",
    ],
)
def test_an_invalid_address_is_refused_at_once(url: str) -> None:
    """Scheme, host, brackets and port are checked."""
    with pytest.raises(ConfigError, match=re.escape(f"got {url!r}")):
        resolve("m", base_url=url, env={})
