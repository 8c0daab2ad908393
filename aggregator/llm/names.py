"""Resolve a model's name, address and key to an endpoint that can be called.

Keys that expire are functions: `GoogleToken` and `EntraToken` fetch them with the clouds' own libraries. Those are
extras (`vertex`, `entra`), imported with the first token. A token is kept until shortly before it expires; fetching the
next one is a short blocking request, about once an hour.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import asdict, replace

from aggregator.cassettes.lineage import passing
from aggregator.checks import is_async
from aggregator.errors import AggregatorError, APIConnectionError, ConfigError
from aggregator.llm.calls import ApiKey, Codec, Provider, Target
from aggregator.llm.providers import providers
from aggregator.llm.retry import NOT_SENT
from aggregator.records import HTTPRequest

_PREFIX = re.compile(r"([^/:]+)[/:](.+)", re.DOTALL)


# ---- names -> endpoints


class Endpoint(Target, frozen=True, kw_only=True):
    """A target with its codec. `key_hint` explains how to provide a missing key."""

    codec: Codec
    key_hint: str | None = None

    def require_key(self) -> None:
        """Raise ConfigError if a key is needed and was not found.

        It is called just before a request is sent: a cassette replays without a key.
        """
        if self.key_hint is not None:
            raise ConfigError(self.key_hint)

    def authenticated(self, request: HTTPRequest) -> HTTPRequest:
        """Return the request with its authentication; raises ConfigError or APIConnectionError without a key.

        A function that gave no token when the call was encoded is called once more, and its error raised: a replay,
        which sends nothing, needs no token.
        """
        self.require_key()
        if request.secrets or not callable(self.api_key):
            return request
        try:
            key: Any = self.api_key()
        except AggregatorError:
            raise
        except Exception as error:  # of the user's function, whatever it raises
            shown = f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) or re.search("Connection|Timeout", type(error).__name__):
                raise APIConnectionError(
                    f"{NOT_SENT}the function api_key of {self.provider} failed: {shown}"
                ) from error
            raise ConfigError(f"Expected a token from the function api_key of {self.provider}, got {shown}") from error
        if not isinstance(key, str) or not key:
            shown = "an empty text" if key == "" else type(key).__name__  # never the value
            raise ConfigError(f"Expected a token as text from the function api_key of {self.provider}, got {shown}")
        value = f"Bearer {key}" if self.auth == "authorization" else key
        return replace(request, headers={**request.headers, self.auth: value}, secrets=(key,))


class _Wanted(NamedTuple):
    model: str
    base_url: str | None
    api_key: ApiKey | None


def resolve(
    model: str | None,
    *,
    base_url: str | None = None,
    api_key: ApiKey | None = None,
    api: str | None = None,
    headers: Mapping[str, str] | None = None,
    env: Mapping[str, str],
) -> Endpoint:
    """Find provider, address, key and codec; raises ConfigError for an unknown name.

    Names are `provider/model` or `provider:model` (`openai/gpt-4o-mini`, `ollama/qwen3:8b`,
    `openrouter/meta-llama/llama-3.3-70b:free`). With a `base_url` any other name is a model of that server. Without a
    name Trace's variables are read. A default key goes to the provider's own address, or to the one in its own
    variable, never to another `base_url`. `api` is one of the provider's wire formats; None means the default one, or
    the only one for the model. `headers` are sent with every request; one that authenticates replaces the key.
    """
    if model is not None and not isinstance(model, str):
        raise ConfigError(f"Expected a model as 'provider/model', got {model!r}")
    for option, value, kind in (("base_url", base_url, str), ("api", api, str), ("headers", headers, Mapping)):
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"Expected {option} as a {kind.__name__} or None, got {value!r}")
    if api_key is not None and not isinstance(api_key, str) and not callable(api_key):
        raise ConfigError(f"Expected api_key as a str or a function that returns one, got {type(api_key).__name__}")
    base_url = base_url and _cleaned(base_url)
    wanted = _Wanted(model, base_url, api_key) if model else _from_trace(base_url, api_key, env)
    provider, name = split_name(wanted.model, wanted.base_url)
    make, name = _codec_of(provider, name, api)
    url, own = _address(provider, wanted.base_url, env)
    key, auth, hint = _key(provider, wanted.api_key, own, env)
    own_headers = _checked_headers(headers or {})
    if auth in own_headers:
        key = hint = None
    target = Target(
        provider=provider.name,
        model=name,
        base_url=url,
        api_key=key,
        auth=auth,
        headers=own_headers,
        options=provider.options,
    )
    if provider.settle is not None:
        target = provider.settle(target, env)
    if not _is_address(target.base_url):
        raise ConfigError(f"Expected base_url as http://… or https://…, got {target.base_url!r} - for {wanted.model!r}")
    if "@" in target.base_url.partition("//")[2].partition("/")[0] and (target.auth == "authorization" and key):
        raise ConfigError(
            f"Expected one way to authenticate, got a user in base_url and a key for {provider.name}: both go in the "
            "header authorization; leave one out"
        )
    return Endpoint(**asdict(target), codec=make(target), key_hint=hint)


def _codec_of(provider: Provider, name: str, api: str | None) -> tuple[Callable[[Target], Codec], str]:
    """Return the wire format for a model, and the model's name without LiteLLM's prefix of the Responses API."""
    head, _, rest = name.partition("/")
    if rest and head == "responses" and head in provider.apis:
        name, api = rest, api or head
    if api is None:
        api = next((other for other, models in provider.only.items() if re.match(models, name)), None)
    if api is None:
        return provider.codec, name
    if api not in provider.apis:
        known = f"one of {', '.join(map(repr, provider.apis))}" if provider.apis else "none: there is a single one"
        raise ConfigError(f"Expected api for {provider.name} to be {known}, got {api!r}")
    return provider.apis[api], name


_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CALLED = re.compile(r"/(?:chat/completions|completions|responses|messages)/?$")


def _cleaned(url: str) -> str:
    r"""Return an address without surrounding blanks, a fragment, or the path of the call, which the codec adds.

    >>> _cleaned(" https://api.example.com/v1/chat/completions\n")
    'https://api.example.com/v1'
    """
    address, mark, query = url.strip().partition("#")[0].partition("?")
    return f"{_CALLED.sub('', address)}{mark}{query}"


def _checked_headers(headers: Mapping[Any, Any]) -> dict[str, str]:
    """Return headers with names in lower case; raises ConfigError for invalid ones, without their values."""
    for name, value in headers.items():
        if not isinstance(name, str) or not _HEADER.fullmatch(name):
            raise ConfigError(f"Expected the name of a header, got {name!r} - at LLM.headers")
        if not isinstance(value, str) or not value.isprintable():
            raise ConfigError(f"Expected a printable text as the header {name!r}, got something else - at LLM.headers")
    return {name.lower(): value for name, value in headers.items()}


def _is_address(url: str) -> bool:
    if not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an unclosed bracket, a port that is not a number
        return False


def split_name(model: str, base_url: str | None = None) -> tuple[Provider, str]:
    """Split a name into provider and model; raises ConfigError for an unknown one."""
    known = providers()
    found = _PREFIX.fullmatch(model.strip())
    if found and (provider := known.get(found.group(1).lower().replace("_", "-"))):
        return provider, found.group(2)
    if base_url:
        return known["openai-compatible"], model
    for provider in known.values():
        if provider.bare_names is not None and re.match(provider.bare_names, model):
            return provider, model
    raise ConfigError(
        f"Expected a model as 'provider/model', such as 'openai/gpt-4o-mini', got {model!r}. "
        f"{_suggestion(model, found)}"
    )


def _suggestion(model: str, found: re.Match[str] | None) -> str:
    """Suggest the nearest known providers, or the servers with names like this one."""
    prefix = (found.group(1) if found else model).lower().replace("_", "-")
    from difflib import get_close_matches  # slow to load, and only for this error

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
    """Return the address and whether the provider's default key may be sent there."""
    named = next((env[name] for name in provider.base_urls if env.get(name)), None)
    url = base_url or (named and _cleaned(named)) or provider.base_url
    if url is None:
        variable = f" or set {provider.base_urls[0]}" if provider.base_urls else ""
        raise ConfigError(f"Expected the address of {provider.name}, got none. Give base_url='https://…'{variable}")
    own = {_cleaned(address).rstrip("/") for address in (named, provider.base_url) if address}
    return url, url.rstrip("/") in own


def _key(
    provider: Provider, given: ApiKey | None, own: bool, env: Mapping[str, str]
) -> tuple[ApiKey | None, str, str | None]:
    """Return the key, its header, and the remedy if it is missing."""
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


# ---- names of Trace and AutoGen


def _from_trace(base_url: str | None, api_key: ApiKey | None, env: Mapping[str, str]) -> _Wanted:
    """Read the model from the environment variables of Trace's users, without Trace's silent default."""
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
    """Return the first entry of AutoGen's OAI_CONFIG_LIST, given as JSON."""
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


_EARLY = 300.0  # seconds before its end at which a token is replaced
_CLOUD = "https://www.googleapis.com/auth/cloud-platform"
_AZURE_OPENAI = "https://cognitiveservices.azure.com/.default"


# ---- tokens of two clouds


class CloudToken:
    """A function that returns the current token; a subclass fetches it.

    It is pickled as its settings. Given credentials cannot be pickled, because they may hold secrets: that is a
    ConfigError.
    """

    extra: str
    """The extra of this package that installs the library."""
    remedy: str
    """How to provide credentials."""

    def __init__(self, credentials: Any, scope: str, clock: Callable[[], float]) -> None:
        self._given = credentials
        self._scope = scope
        self._clock = clock
        self._credentials = credentials
        self._token: tuple[str, float] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> str:
        """Return a token that is valid for some minutes at least; raises ConfigError, APIConnectionError."""
        with self._lock:
            if self._token is None or self._clock() > self._token[1] - _EARLY:
                with passing():  # a cassette of other clients' calls must not record it
                    self._token = self._fetch()
            return self._token[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._scope!r})"  # never the token

    def __reduce__(self) -> tuple[Any, ...]:
        if self._given is not None:
            raise ConfigError(
                f"Expected {type(self).__name__} without credentials to pickle it, got one with them; leave them out, "
                "and the library finds those of the machine where it is loaded"
            )
        return type(self), (None, self._scope)

    def _fetch(self) -> tuple[str, float]:
        try:
            if self._credentials is None:
                self._credentials = self.find()
            return self.fetch(self._credentials)
        except ImportError as error:
            raise ConfigError(
                f"Expected the library behind {type(self).__name__}, got {error}; "
                f"pip install 'aggregated-update[{self.extra}]'"
            ) from error
        except Exception as error:  # of the library, whatever it raises: a login that is missing, or a lost connection
            shown = f"{type(error).__name__}: {error}"
            if self.is_passing(error):
                raise APIConnectionError(f"{NOT_SENT}no token came: {shown}") from error
            raise ConfigError(f"Expected a token from {type(self).__name__}, got {shown}. {self.remedy}") from error

    def find(self) -> Any:
        """Return the credentials of this machine."""
        raise NotImplementedError

    def fetch(self, credentials: Any) -> tuple[str, float]:
        """Return a new token and the time at which it expires, in seconds since the epoch."""
        raise NotImplementedError

    def is_passing(self, error: Exception) -> bool:
        """Return True for a failure that may be temporary."""
        raise NotImplementedError


class GoogleToken(CloudToken):
    """Access tokens of Google Cloud, by google-auth: `LLM("vertex/gemini-2.5-flash", api_key=GoogleToken())`.

    `credentials` are google-auth's; by default the Application Default Credentials of this machine.
    """

    extra = "vertex"
    remedy = "Run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"

    def __init__(self, credentials: Any = None, scope: str = _CLOUD, *, clock: Callable[[], float] = time.time) -> None:
        super().__init__(credentials, scope, clock)

    def find(self) -> Any:
        """Return the Application Default Credentials."""
        import google.auth

        return google.auth.default(scopes=[self._scope])[0]

    def fetch(self, credentials: Any) -> tuple[str, float]:
        """Refresh the credentials unless they are valid; a token without expiry is checked after five minutes."""
        if not credentials.valid:
            from google.auth.transport.requests import Request

            credentials.refresh(Request())
        expiry = credentials.expiry  # naive, in UTC
        end = self._clock() + 2 * _EARLY if expiry is None else expiry.replace(tzinfo=UTC).timestamp()
        return credentials.token, end

    def is_passing(self, error: Exception) -> bool:
        """Return True if the library marks its error as retryable."""
        return bool(getattr(error, "retryable", False)) or type(error).__name__ in ("TransportError", "TimeoutError")


class EntraToken(CloudToken):
    """Tokens of Microsoft Entra ID, by azure-identity: `LLM("azure/my-deployment", api_key=EntraToken())`.

    `credentials` is one of azure-identity's; by default a DefaultAzureCredential.
    """

    extra = "entra"
    remedy = "Run `az login`, or set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET"

    def __init__(
        self, credentials: Any = None, scope: str = _AZURE_OPENAI, *, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__(credentials, scope, clock)

    def find(self) -> Any:
        """Return a DefaultAzureCredential."""
        from azure.identity import DefaultAzureCredential

        return DefaultAzureCredential()

    def fetch(self, credentials: Any) -> tuple[str, float]:
        """Ask the credential for a token."""
        found = credentials.get_token(self._scope)
        return found.token, float(found.expires_on)

    def is_passing(self, error: Exception) -> bool:
        """Return True if the service could not be reached."""
        return type(error).__name__ in ("ServiceRequestError", "ServiceResponseError")
