"""Tokens of the moment for Vertex AI and Azure, from the clouds' own libraries: `api_key=GoogleToken()`.

The libraries are extras (`vertex`, `entra`) and are imported with the first token, not before. A token is kept until
shortly before it expires; fetching the next one is a short blocking request, about once an hour.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC
from typing import Any

from aggregator.cassettes.traffic import passing
from aggregator.errors import APIConnectionError, ConfigError
from aggregator.llm.retry import NOT_SENT

_EARLY = 300.0  # seconds before its end at which a token is replaced
_CLOUD = "https://www.googleapis.com/auth/cloud-platform"
_AZURE_OPENAI = "https://cognitiveservices.azure.com/.default"


class CloudToken:
    """A function that returns the token of the moment; a subclass fetches it.

    It pickles as its settings. Credentials that were handed in do not, since they may hold secrets: that is a
    ConfigError.
    """

    extra: str
    """The extra of this package that installs the library."""
    remedy: str
    """How to give credentials."""

    def __init__(self, credentials: Any, scope: str, clock: Callable[[], float]) -> None:
        self._given = credentials
        self._scope = scope
        self._clock = clock
        self._credentials = credentials
        self._token: tuple[str, float] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> str:
        """Return a token that holds for some minutes at least; raises ConfigError, APIConnectionError."""
        with self._lock:
            if self._token is None or self._clock() > self._token[1] - _EARLY:
                with passing():  # a cassette of other clients' calls has no business with it
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
            told = f"{type(error).__name__}: {error}"
            if self.is_passing(error):
                raise APIConnectionError(f"{NOT_SENT}no token came: {told}") from error
            raise ConfigError(f"Expected a token from {type(self).__name__}, got {told}. {self.remedy}") from error

    def find(self) -> Any:
        """Return the credentials of this machine."""
        raise NotImplementedError

    def fetch(self, credentials: Any) -> tuple[str, float]:
        """Return a new token and the time at which it expires, in seconds since the epoch."""
        raise NotImplementedError

    def is_passing(self, error: Exception) -> bool:
        """Return True for a failure that may be gone a moment later."""
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
        """Refresh the credentials unless they are valid; a token without an end is checked again after five minutes."""
        if not credentials.valid:
            from google.auth.transport.requests import Request

            credentials.refresh(Request())
        expiry = credentials.expiry  # naive, in UTC
        end = self._clock() + 2 * _EARLY if expiry is None else expiry.replace(tzinfo=UTC).timestamp()
        return credentials.token, end

    def is_passing(self, error: Exception) -> bool:
        """Return what the library itself says of its error."""
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
