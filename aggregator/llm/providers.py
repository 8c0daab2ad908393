"""The providers we know, as a table: address, environment variables, wire format, the few ways they differ.

The variables are those that the providers' own SDKs read. Another package adds a provider with an entry point of the
group `aggregator.providers` that names a `Provider`.

Options of the OpenAI wire format: `max_tokens` is the cap sent when none is given (servers that would else generate to
the end of their context); `seed` the name under which the seed goes; `stream_options` False where usage comes unasked
and the field is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import asdict, replace

from aggregator.checks import is_async
from aggregator.errors import ConfigError
from aggregator.llm.calls import ApiKey, Codec, Provider, Target
from aggregator.llm.codecs.anthropic import AnthropicMessages
from aggregator.llm.codecs.gemini import GeminiGenerate, settle_vertex
from aggregator.llm.codecs.openai import AzureChat, OpenAIChat, settle_azure

ENTRY_POINTS = "aggregator.providers"
_LOCAL_CAP = {"max_tokens": 4096}
_BEARER = "authorization"


def custom_headers(text: str) -> dict[str, str]:
    r"""Headers from OPENAI_CUSTOM_HEADERS or ANTHROPIC_CUSTOM_HEADERS: one `Name: value` a line.

    >>> custom_headers("X-Team: blue\nX-Run: 7")
    {'x-team': 'blue', 'x-run': '7'}
    """
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip().lower(): value.strip() for name, value in pairs}


def _settle_openai(target: Target, env: Mapping[str, str]) -> Target:
    named = {"openai-organization": env.get("OPENAI_ORG_ID"), "openai-project": env.get("OPENAI_PROJECT_ID")}
    headers = {name: value for name, value in named.items() if value}
    return replace(
        target, headers={**headers, **custom_headers(env.get("OPENAI_CUSTOM_HEADERS", "")), **target.headers}
    )


def _settle_anthropic(target: Target, env: Mapping[str, str]) -> Target:
    return replace(target, headers={**custom_headers(env.get("ANTHROPIC_CUSTOM_HEADERS", "")), **target.headers})


def _settle_ollama(target: Target, env: Mapping[str, str]) -> Target:
    """OLLAMA_BASE_URL is seen with and without /v1, OLLAMA_HOST without a scheme."""
    url = target.base_url.rstrip("/")
    url = url if "://" in url else f"http://{url}"
    return replace(target, base_url=url if url.count("/") > 2 else f"{url}/v1")


def _hosted(name: str, base_url: str, *keys: str, aliases: tuple[str, ...] = (), **options: object) -> Provider:
    """A provider that speaks OpenAI's format under a bearer key."""
    return Provider(
        name=name,
        codec=OpenAIChat,
        base_url=base_url,
        keys=dict.fromkeys(keys, _BEARER),
        aliases=aliases,
        options=options,
    )


def _local(
    name: str, base_url: str, *variables: str, keys: tuple[str, ...] = (), aliases: tuple[str, ...] = ()
) -> Provider:
    """A server of the user's own, which needs no key."""
    return Provider(
        name=name,
        codec=OpenAIChat,
        base_url=base_url,
        base_urls=variables,
        keys=dict.fromkeys(keys, _BEARER),
        needs_key=False,
        aliases=aliases,
        options=_LOCAL_CAP,
    )


_BUILT_IN = (
    Provider(
        name="openai",
        codec=OpenAIChat,
        base_url="https://api.openai.com/v1",
        base_urls=("OPENAI_BASE_URL", "OPENAI_API_BASE"),
        keys={"OPENAI_API_KEY": _BEARER},
        settle=_settle_openai,
    ),
    Provider(
        name="azure",
        codec=AzureChat,
        base_urls=("AZURE_OPENAI_ENDPOINT", "AZURE_API_BASE"),
        keys={"AZURE_OPENAI_API_KEY": "api-key", "AZURE_API_KEY": "api-key", "AZURE_OPENAI_AD_TOKEN": _BEARER},
        aliases=("azure-openai",),
        settle=settle_azure,
    ),
    Provider(
        name="anthropic",
        codec=AnthropicMessages,
        base_url="https://api.anthropic.com",
        base_urls=("ANTHROPIC_BASE_URL",),
        keys={"ANTHROPIC_API_KEY": "x-api-key", "ANTHROPIC_AUTH_TOKEN": _BEARER},
        aliases=("claude",),
        settle=_settle_anthropic,
    ),
    Provider(
        name="gemini",
        codec=GeminiGenerate,
        base_url="https://generativelanguage.googleapis.com/v1beta",
        base_urls=("GOOGLE_GEMINI_BASE_URL",),
        keys=dict.fromkeys(("GOOGLE_API_KEY", "GEMINI_API_KEY", "LLM_GEMINI_KEY"), "x-goog-api-key"),
        aliases=("google", "google-gla", "google-genai"),
    ),
    Provider(
        name="vertex",
        codec=GeminiGenerate,
        base_url="https://aiplatform.googleapis.com/v1",
        base_urls=("GOOGLE_VERTEX_BASE_URL",),
        keys={"GOOGLE_OAUTH_ACCESS_TOKEN": _BEARER, "GOOGLE_API_KEY": "x-goog-api-key"},
        aliases=("vertex-ai", "google-vertex"),
        settle=settle_vertex,
    ),
    _hosted("openrouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    _hosted("groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    _hosted("mistral", "https://api.mistral.ai/v1", "MISTRAL_API_KEY", seed="random_seed", stream_options=False),
    _hosted("deepseek", "https://api.deepseek.com", "DEEPSEEK_API_KEY"),
    _hosted("xai", "https://api.x.ai/v1", "XAI_API_KEY", aliases=("grok",)),
    _hosted(
        "together", "https://api.together.xyz/v1", "TOGETHER_API_KEY", "TOGETHERAI_API_KEY", aliases=("together-ai",)
    ),
    _hosted("fireworks", "https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY", aliases=("fireworks-ai",)),
    _hosted("cerebras", "https://api.cerebras.ai/v1", "CEREBRAS_API_KEY"),
    _hosted("huggingface", "https://router.huggingface.co/v1", "HF_TOKEN", aliases=("hf",)),
    _hosted("perplexity", "https://api.perplexity.ai", "PERPLEXITY_API_KEY", "PPLX_API_KEY", stream_options=False),
    _hosted("moonshot", "https://api.moonshot.ai/v1", "MOONSHOT_API_KEY", aliases=("moonshotai",)),
    _hosted("deepinfra", "https://api.deepinfra.com/v1/openai", "DEEPINFRA_API_KEY"),
    _hosted("sambanova", "https://api.sambanova.ai/v1", "SAMBANOVA_API_KEY"),
    _hosted("nvidia", "https://integrate.api.nvidia.com/v1", "NVIDIA_API_KEY", aliases=("nvidia-nim",)),
    _hosted("venice", "https://api.venice.ai/api/v1", "VENICE_API_KEY"),
    _hosted("zai", "https://api.z.ai/api/paas/v4", "ZAI_API_KEY"),
    Provider(
        name="ollama",
        codec=OpenAIChat,
        base_url="http://localhost:11434/v1",
        base_urls=("OLLAMA_BASE_URL", "OLLAMA_API_BASE", "OLLAMA_HOST"),
        keys={"OLLAMA_API_KEY": _BEARER},
        needs_key=False,
        aliases=("ollama-chat",),
        options=_LOCAL_CAP,
        settle=_settle_ollama,
    ),
    _local("llamacpp", "http://localhost:8080/v1", "LLAMACPP_BASE_URL", aliases=("llama-cpp", "llama-server")),
    _local(
        "lmstudio",
        "http://localhost:1234/v1",
        "LM_STUDIO_API_BASE",
        keys=("LM_STUDIO_API_KEY",),
        aliases=("lm-studio",),
    ),
    Provider(
        name="vllm",  # no cap of ours: it refuses one that does not fit the model's context, and stops by itself
        codec=OpenAIChat,
        base_url="http://localhost:8000/v1",
        base_urls=("VLLM_BASE_URL", "HOSTED_VLLM_API_BASE"),
        keys={"VLLM_API_KEY": _BEARER, "HOSTED_VLLM_API_KEY": _BEARER},
        needs_key=False,
        aliases=("hosted-vllm",),
    ),
    Provider(
        name="litellm-proxy",
        codec=OpenAIChat,
        base_url="http://localhost:4000",
        base_urls=("LITELLM_PROXY_API_BASE",),
        keys={"LITELLM_PROXY_API_KEY": _BEARER},
        needs_key=False,
    ),
    Provider(name="openai-compatible", codec=OpenAIChat, needs_key=False, aliases=("custom",), options=_LOCAL_CAP),
)


@cache
def installed() -> dict[str, Provider]:
    """The providers that other packages bring, by name; read once."""
    found: dict[str, Provider] = {}
    for point in entry_points(group=ENTRY_POINTS):
        provider = point.load()
        if not isinstance(provider, Provider):
            raise ConfigError(
                f"Expected the entry point {point.name!r} of {ENTRY_POINTS!r} to name a Provider, got {provider!r} "
                f"- at {point.value}"
            )
        found[point.name] = provider
    return found


@cache
def providers() -> Mapping[str, Provider]:
    """Every provider by each of its names; what another package brings comes before ours."""
    table: dict[str, Provider] = {}
    for provider in (*_BUILT_IN, *installed().values()):
        table |= dict.fromkeys((provider.name, *provider.aliases), provider)
    return table | installed()


_BARE = {  # a name without a provider, as OpenAI's SDK and Trace's variables give it
    "openai": re.compile(r"gpt-|chatgpt-|o\d(-|$)|codex|ft:"),
    "anthropic": re.compile(r"claude-"),
    "gemini": re.compile(r"(models/)?(gemini|gemma)-"),
}
_PREFIX = re.compile(r"([^/:]+)[/:](.+)", re.DOTALL)


class Endpoint(Target, frozen=True, kw_only=True):
    """A target with its codec bound. `key_hint` says how to give the key that is missing."""

    codec: Codec
    key_hint: str | None = None

    def require_key(self) -> None:
        """Raise ConfigError where a key is needed and none was found.

        Called before a request leaves, not before: a cassette replays without any key.
        """
        if self.key_hint is not None:
            raise ConfigError(self.key_hint)


class _Wanted(NamedTuple):
    model: str
    base_url: str | None
    api_key: ApiKey | None


def resolve(
    model: str | None, *, base_url: str | None = None, api_key: ApiKey | None = None, env: Mapping[str, str]
) -> Endpoint:
    """Find provider, address, key and codec; raises ConfigError for a name that names nothing.

    Names are `provider/model` or `provider:model` (`openai/gpt-4o-mini`, `ollama/qwen3:8b`,
    `openrouter/meta-llama/llama-3.3-70b:free`). With a `base_url` any other name is a model of that server.
    Without a name Trace's variables are read. A default key goes to the provider's own address, or to the one that
    its own variable gives, never to a `base_url` from elsewhere.
    """
    wanted = _Wanted(model, base_url, api_key) if model else _from_trace(base_url, api_key, env)
    provider, name = split_name(wanted.model, wanted.base_url)
    url, own = _address(provider, wanted.base_url, env)
    key, auth, hint = _key(provider, wanted.api_key, own, env)
    target = Target(provider=provider.name, model=name, base_url=url, api_key=key, auth=auth, options=provider.options)
    if provider.settle is not None:
        target = provider.settle(target, env)
    if not _is_address(target.base_url):
        raise ConfigError(f"Expected base_url as http://… or https://…, got {target.base_url!r} - for {wanted.model!r}")
    return Endpoint(**asdict(target), codec=provider.codec(target), key_hint=hint)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a bracket that is not closed, a port that is no number
        return False


def split_name(model: str, base_url: str | None = None) -> tuple[Provider, str]:
    """Split a name into provider and model; raises ConfigError for one that names nothing."""
    known = providers()
    found = _PREFIX.fullmatch(model.strip())
    if found and (provider := known.get(found.group(1).lower().replace("_", "-"))):
        return provider, found.group(2)
    if base_url:
        return known["openai-compatible"], model
    for name, pattern in _BARE.items():
        if pattern.match(model):
            return known[name], model
    raise ConfigError(
        f"Expected a model as 'provider/model' (say 'openai/gpt-4o-mini'), got {model!r}. {_suggestion(model, found)}"
    )


def _suggestion(model: str, found: re.Match[str] | None) -> str:
    """Name the nearest known providers, or the servers that have names like this one."""
    prefix = (found.group(1) if found else model).lower().replace("_", "-")
    near = get_close_matches(prefix, providers(), n=3, cutoff=0.7)
    if near:
        return f"The nearest known providers: {', '.join(near)}"
    if found and "/" in model:
        return f"Is it 'openrouter/{model}'? Known providers: {', '.join(sorted(_names()))}; or give its base_url"
    if found:
        return f"Is it 'ollama/{model}'? Known providers: {', '.join(sorted(_names()))}; or give its base_url"
    return f"Known providers: {', '.join(sorted(_names()))}; or give its base_url"


def _names() -> set[str]:
    return {provider.name for provider in providers().values()}


def _address(provider: Provider, base_url: str | None, env: Mapping[str, str]) -> tuple[str, bool]:
    """Return the address and whether the provider's default key may go there."""
    named = next((env[name] for name in provider.base_urls if env.get(name)), None)
    url = base_url or named or provider.base_url
    if url is None:
        variable = f" or set {provider.base_urls[0]}" if provider.base_urls else ""
        raise ConfigError(f"Expected the address of {provider.name}, got none. Give base_url='https://…'{variable}")
    own = {address.rstrip("/") for address in (named, provider.base_url) if address}
    return url, url.rstrip("/") in own


def _key(
    provider: Provider, given: ApiKey | None, own: bool, env: Mapping[str, str]
) -> tuple[ApiKey | None, str, str | None]:
    """Return the key, the header that carries it, and what to do where it is missing."""
    headers = provider.keys
    if is_async(given):
        raise ConfigError(
            f"Expected api_key as a text or a function that returns one, got {given!r}, which has to be awaited. Give "
            "the synchronous one (azure.identity instead of azure.identity.aio)"
        )
    if given is not None and given != "":
        return given, "authorization" if callable(given) else next(iter(headers.values()), "authorization"), None
    variable = next((name for name in headers if env.get(name)), None) if own else None
    if variable is not None:
        return env[variable], headers[variable], None
    auth = next(iter(headers.values()), "authorization")
    if not provider.needs_key or not own:
        return None, auth, None
    names = " or ".join(headers)
    return None, auth, f"Expected an API key for {provider.name}, got none. Set {names}, or give api_key=…"


def _from_trace(base_url: str | None, api_key: ApiKey | None, env: Mapping[str, str]) -> _Wanted:
    """Read the model from the variables that Trace's users have set; its own silent default is not taken over."""
    backend = env.get("TRACE_DEFAULT_LLM_BACKEND", "").lower()
    if backend == "customllm" and env.get("TRACE_CUSTOMLLM_MODEL") and env.get("TRACE_CUSTOMLLM_URL"):
        return _Wanted(
            f"openai-compatible/{env['TRACE_CUSTOMLLM_MODEL']}",
            base_url or env["TRACE_CUSTOMLLM_URL"],
            api_key or (None if base_url else env.get("TRACE_CUSTOMLLM_API_KEY")),
        )
    if backend == "autogen" and env.get("OAI_CONFIG_LIST"):
        return _from_autogen(env["OAI_CONFIG_LIST"], base_url, api_key)
    model = env.get("TRACE_LITELLM_MODEL") or env.get("DEFAULT_LITELLM_MODEL")
    if model:
        return _Wanted(model, base_url, api_key)
    raise ConfigError(
        "Expected a model's name, got none. Give one (LLM('openai/gpt-4o-mini')) or set TRACE_LITELLM_MODEL "
        "(with TRACE_DEFAULT_LLM_BACKEND=CustomLLM: TRACE_CUSTOMLLM_MODEL and TRACE_CUSTOMLLM_URL)"
    )


class _AutogenEntry(msgspec.Struct):
    model: str
    api_key: str | None = None
    base_url: str | None = None


def _from_autogen(text: str, base_url: str | None, api_key: ApiKey | None) -> _Wanted:
    """The first entry of AutoGen's OAI_CONFIG_LIST, given as JSON."""
    try:
        entries = msgspec.json.decode(text.encode(), type=list[_AutogenEntry])
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"Expected OAI_CONFIG_LIST as a JSON list of {{model, api_key}}, got one that is not: {error}"
        ) from error
    if not entries:
        raise ConfigError("Expected OAI_CONFIG_LIST with one entry at least, got an empty list")
    first = entries[0]
    return _Wanted(first.model, base_url or first.base_url, api_key or (None if base_url else first.api_key))
