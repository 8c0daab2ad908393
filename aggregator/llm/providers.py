"""The known providers as a table: address, environment variables, wire format, and their few differences.

The variables are those that the providers' own SDKs read. Another package adds a provider with an entry point of the
group `aggregator.providers` for a `Provider`.

Options of the OpenAI wire format: `by_name` is True if reasoning models are recognised by name, and get
`max_completion_tokens`; `max_tokens` is the default limit (for servers that would otherwise generate to the end of
their context); `marks` is a pattern of the models whose prompts are cached by marks; `seed` the name of the seed's
field; `stream_options` False if usage is always sent and the field refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from urllib.parse import urlsplit

from msgspec.structs import replace

from aggregator.errors import ConfigError
from aggregator.llm.calls import Codec, Provider, Target

ENTRY_POINTS = "aggregator.providers"
_LOCAL_CAP = {"max_tokens": 4096, "by_name": True}
_BY_NAME = {"by_name": True}
_BEARER = "authorization"
_OLLAMA_PORT = 11434
_BEDROCK = "https://bedrock-runtime.{region}.amazonaws.com"
_VERTEX = "https://aiplatform.googleapis.com/v1"


# ---- options and keys by provider


def custom_headers(text: str) -> dict[str, str]:
    r"""Return headers from OPENAI_CUSTOM_HEADERS or ANTHROPIC_CUSTOM_HEADERS: one `Name: value` a line.

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
    """Read OLLAMA_BASE_URL, with or without /v1, or OLLAMA_HOST, a server's address: `0.0.0.0`, `host`, `:11434`.

    Without a scheme the default port is Ollama's, as in its own clients.
    """
    url = target.base_url.rstrip("/")
    if "://" not in url:
        host, _, port = url.rpartition(":") if re.search(r":\d*$", url) else (url, "", "")
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104 - replaced
        url = f"http://{host}:{port or _OLLAMA_PORT}" if "/" not in url else f"http://{url}"
    return replace(target, base_url=url if url.count("/") > 2 else f"{url}/v1")


def _settle_azure(target: Target, env: Mapping[str, str]) -> Target:
    """Read the api-version from the environment; one in the address overrides it. An Entra token is not an API key."""
    if isinstance(target.api_key, str) and target.api_key.startswith("eyJ"):  # every JSON web token begins so
        target = replace(target, auth="authorization")
    version = env.get("OPENAI_API_VERSION") or env.get("AZURE_API_VERSION")
    return replace(target, options={**target.options, "api_version": version}) if version else target


def _settle_vertex(target: Target, env: Mapping[str, str]) -> Target:
    """Build Vertex's address: with project and location for an access token, with neither for an API key."""
    if "claude" in target.model:
        raise ConfigError(
            f"Expected a model of Gemini's protocol for vertex, got {target.model!r}, which has another one; take it "
            "from anthropic or bedrock, or as as_model(litellm, name=…)"
        )
    if isinstance(target.api_key, str) and target.api_key.startswith(("AIza", "AQ.")):
        target = replace(target, auth="x-goog-api-key")
    if target.base_url.rstrip("/") != _VERTEX:
        return target
    if target.auth == "x-goog-api-key":
        return replace(target, base_url=f"{_VERTEX}/publishers/google")
    project = env.get("GOOGLE_CLOUD_PROJECT") or env.get("VERTEXAI_PROJECT")
    if not project:
        raise ConfigError("Expected a project for vertex, got none. Set GOOGLE_CLOUD_PROJECT, or give base_url=…")
    location = env.get("GOOGLE_CLOUD_LOCATION") or env.get("VERTEXAI_LOCATION") or "global"
    host = _VERTEX if location == "global" else _VERTEX.replace("://", f"://{location}-")
    return replace(target, base_url=f"{host}/projects/{project}/locations/{location}/publishers/google")


def _settle_bedrock(target: Target, env: Mapping[str, str]) -> Target:
    """Insert the region into the address. There is no default region, because prompts would leave the user's own."""
    if target.base_url != _BEDROCK:
        return target
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION")
    if not region:
        raise ConfigError("Expected a region for bedrock, got none. Set AWS_REGION, or give base_url=…")
    return replace(target, base_url=_BEDROCK.format(region=region))


# ---- the providers


# The codecs are imported when a model of theirs is first created.
def _openai(target: Target) -> Codec:
    from aggregator.llm.codecs.openai import OpenAIChat

    return OpenAIChat(target)


def _ollama(target: Target) -> Codec:
    from aggregator.llm.codecs.openai import OllamaChat

    return OllamaChat(target)


def _compatible(target: Target) -> Codec:
    """Return the codec for an unnamed server: at Ollama's port it is Ollama."""
    return _ollama(target) if urlsplit(target.base_url).port == _OLLAMA_PORT else _openai(target)


def _azure(target: Target) -> Codec:
    from aggregator.llm.codecs.openai import AzureChat

    return AzureChat(target)


def _responses(target: Target) -> Codec:
    from aggregator.llm.codecs.responses import OpenAIResponses

    return OpenAIResponses(target)


def _azure_responses(target: Target) -> Codec:
    from aggregator.llm.codecs.responses import AzureResponses

    return AzureResponses(target)


def _anthropic(target: Target) -> Codec:
    from aggregator.llm.codecs.anthropic import AnthropicMessages

    return AnthropicMessages(target)


def _gemini(target: Target) -> Codec:
    from aggregator.llm.codecs.gemini import GeminiGenerate

    return GeminiGenerate(target)


_APIS = {"chat": _openai, "responses": _responses}
_RESPONSES_ALONE = {
    "responses": r"(ft:)?((o\d|gpt-\d[\d.]*)-pro\b|(gpt-\d[\d.]*-)?codex|o\d\S*-deep-research|computer-use)"
}


def _bedrock(target: Target) -> Codec:
    from aggregator.llm.codecs.bedrock import BedrockConverse

    return BedrockConverse(target)


def _hosted(
    name: str,
    base_url: str,
    *keys: str,
    aliases: tuple[str, ...] = (),
    priced_as: str | None = None,
    free_ending: str | None = None,
    **options: object,
) -> Provider:
    """Return a provider with OpenAI's format and a bearer key."""
    return Provider(
        name=name,
        codec=_openai,
        apis=_APIS,
        base_url=base_url,
        keys=dict.fromkeys(keys, _BEARER),
        aliases=aliases,
        options=options,
        priced_as=priced_as,
        free_ending=free_ending,
    )


def _local(
    name: str, base_url: str, *variables: str, keys: tuple[str, ...] = (), aliases: tuple[str, ...] = ()
) -> Provider:
    """Return a server of the user's own, which needs no key."""
    return Provider(
        name=name,
        codec=_openai,
        apis=_APIS,
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
        codec=_openai,
        apis=_APIS,
        only=_RESPONSES_ALONE,
        base_url="https://api.openai.com/v1",
        base_urls=("OPENAI_BASE_URL", "OPENAI_API_BASE"),
        keys={"OPENAI_API_KEY": _BEARER},
        settle=_settle_openai,
        options=_BY_NAME,
        bare_names=r"gpt-|chatgpt-|o\d(-|$)|codex|computer-use|ft:",
    ),
    Provider(
        name="azure",
        codec=_azure,
        apis={"chat": _azure, "responses": _azure_responses},
        only=_RESPONSES_ALONE,
        base_urls=("AZURE_OPENAI_ENDPOINT", "AZURE_API_BASE"),
        keys={"AZURE_OPENAI_API_KEY": "api-key", "AZURE_API_KEY": "api-key", "AZURE_OPENAI_AD_TOKEN": _BEARER},
        aliases=("azure-openai",),
        settle=_settle_azure,
        options=_BY_NAME,
    ),
    Provider(
        name="anthropic",
        codec=_anthropic,
        base_url="https://api.anthropic.com",
        base_urls=("ANTHROPIC_BASE_URL",),
        keys={"ANTHROPIC_API_KEY": "x-api-key", "ANTHROPIC_AUTH_TOKEN": _BEARER},
        aliases=("claude",),
        bare_names="claude-",
        settle=_settle_anthropic,
    ),
    Provider(
        name="gemini",
        codec=_gemini,
        base_url="https://generativelanguage.googleapis.com/v1beta",
        base_urls=("GOOGLE_GEMINI_BASE_URL",),
        keys=dict.fromkeys(("GOOGLE_API_KEY", "GEMINI_API_KEY", "LLM_GEMINI_KEY"), "x-goog-api-key"),
        aliases=("google", "google-gla", "google-genai"),
        bare_names="(models/)?(gemini|gemma)-",
        priced_as="google",
    ),
    Provider(
        name="vertex",
        codec=_gemini,
        base_url="https://aiplatform.googleapis.com/v1",
        base_urls=("GOOGLE_VERTEX_BASE_URL",),
        keys={"GOOGLE_OAUTH_ACCESS_TOKEN": _BEARER, "GOOGLE_API_KEY": "x-goog-api-key"},
        aliases=("vertex-ai", "google-vertex"),
        priced_as="google",
        settle=_settle_vertex,
    ),
    Provider(
        name="bedrock",
        codec=_bedrock,
        base_url=_BEDROCK,
        base_urls=("AWS_ENDPOINT_URL_BEDROCK_RUNTIME",),
        keys={"AWS_BEARER_TOKEN_BEDROCK": _BEARER},
        aliases=("amazon-bedrock", "aws-bedrock"),
        priced_as="aws",
        settle=_settle_bedrock,
    ),
    _hosted(
        "openrouter",
        "https://openrouter.ai/api/v1",
        "OPENROUTER_API_KEY",
        free_ending=":free",
        marks="anthropic/|google/gemini",
    ),
    _hosted("groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    _hosted("mistral", "https://api.mistral.ai/v1", "MISTRAL_API_KEY", seed="random_seed", stream_options=False),
    _hosted("deepseek", "https://api.deepseek.com", "DEEPSEEK_API_KEY"),
    _hosted("xai", "https://api.x.ai/v1", "XAI_API_KEY", aliases=("grok",), priced_as="x-ai"),
    _hosted(
        "together", "https://api.together.xyz/v1", "TOGETHER_API_KEY", "TOGETHERAI_API_KEY", aliases=("together-ai",)
    ),
    _hosted("fireworks", "https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY", aliases=("fireworks-ai",)),
    _hosted("cerebras", "https://api.cerebras.ai/v1", "CEREBRAS_API_KEY"),
    _hosted("huggingface", "https://router.huggingface.co/v1", "HF_TOKEN", aliases=("hf",)),
    _hosted("perplexity", "https://api.perplexity.ai", "PERPLEXITY_API_KEY", "PPLX_API_KEY", stream_options=False),
    _hosted(
        "moonshot", "https://api.moonshot.ai/v1", "MOONSHOT_API_KEY", aliases=("moonshotai",), priced_as="moonshotai"
    ),
    _hosted("deepinfra", "https://api.deepinfra.com/v1/openai", "DEEPINFRA_API_KEY"),
    _hosted("sambanova", "https://api.sambanova.ai/v1", "SAMBANOVA_API_KEY"),
    _hosted("nvidia", "https://integrate.api.nvidia.com/v1", "NVIDIA_API_KEY", aliases=("nvidia-nim",)),
    _hosted("venice", "https://api.venice.ai/api/v1", "VENICE_API_KEY"),
    _hosted("zai", "https://api.z.ai/api/paas/v4", "ZAI_API_KEY"),
    Provider(
        name="ollama",
        codec=_ollama,
        apis={**_APIS, "chat": _ollama},
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
        name="vllm",  # no default limit: it refuses one beyond the model's context, and stops at its end anyway
        codec=_openai,
        apis=_APIS,
        base_url="http://localhost:8000/v1",
        base_urls=("VLLM_BASE_URL", "HOSTED_VLLM_API_BASE"),
        keys={"VLLM_API_KEY": _BEARER, "HOSTED_VLLM_API_KEY": _BEARER},
        needs_key=False,
        options=_BY_NAME,
        aliases=("hosted-vllm",),
    ),
    Provider(
        name="litellm-proxy",
        codec=_openai,
        apis=_APIS,
        base_url="http://localhost:4000",
        base_urls=("LITELLM_PROXY_API_BASE",),
        keys={"LITELLM_PROXY_API_KEY": _BEARER},
        needs_key=False,
        options=_BY_NAME,
    ),
    Provider(
        name="openai-compatible",
        codec=_compatible,
        apis={**_APIS, "chat": _compatible},
        needs_key=False,
        aliases=("custom",),
        options=_LOCAL_CAP,
    ),
)


# ---- providers of other packages


@cache
def installed() -> dict[str, Provider]:
    """Return the providers of other packages by name; read once."""
    from importlib.metadata import entry_points  # imported here: a program without a client needs none of it

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
    """Return every provider by each of its names; those of other packages take precedence."""
    table: dict[str, Provider] = {}
    for provider in (*_BUILT_IN, *installed().values()):
        table |= dict.fromkeys((provider.name, *provider.aliases), provider)
    return table | installed()
