"""Tokens of Google and Azure: the real libraries on loopback, and fakes of their credentials' interface."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from llm_fakes import BASE_URL, ScriptedTransport, VirtualTime, answer, failure

from aggregator import Budget, cassette
from aggregator.errors import APIConnectionError, ConfigError
from aggregator.llm.client import LLM
from aggregator.llm.names import EntraToken, GoogleToken


@contextmanager
def token_server(answer: dict[str, Any], status: int = 200) -> Iterator[tuple[str, list[str]]]:
    """Run a token endpoint on loopback; yield its address and the requested paths."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("content-length", "0")))
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST  # noqa: N815 - the names of http.server

        def log_message(self, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class FakeEntra:
    """azure-identity's credential interface: `get_token(scope)` with a token and its expiry."""

    def __init__(self, *ends: float, error: Exception | None = None) -> None:
        self.ends = list(ends)
        self.scopes: list[str] = []
        self.error = error

    def get_token(self, *scopes: str) -> Any:
        if self.error is not None:
            raise self.error
        self.scopes += scopes
        return SimpleNamespace(token=f"token-{len(self.scopes)}", expires_on=self.ends[len(self.scopes) - 1])


class FakeGoogle:
    """google-auth's credential interface: validity, token, expiry and `refresh(request)`."""

    def __init__(self, expiry: datetime | None) -> None:
        self.valid = False
        self.token: str | None = None
        self.expiry = expiry
        self.refreshed = 0

    def refresh(self, request: Any) -> None:
        self.refreshed += 1
        self.token = f"token-{self.refreshed}"


class Clock:
    """A clock that the test sets."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_a_token_is_kept_until_shortly_before_it_expires() -> None:
    """The library is asked once per token, not once per call."""
    clock, credential = Clock(), FakeEntra(3600, 7200)
    token = EntraToken(credential, clock=clock)
    assert [token(), token()] == ["token-1", "token-1"]
    clock.now = 3299
    assert token() == "token-1"
    clock.now = 3301
    assert token() == "token-2"
    assert credential.scopes == ["https://cognitiveservices.azure.com/.default"] * 2


def test_google_credentials_are_refreshed_at_their_expiry() -> None:
    """google-auth's expiry is naive and in UTC, in any time zone."""
    pytest.importorskip("google.auth", reason="needs the extra vertex")
    credentials = FakeGoogle(datetime(2030, 1, 1, 1, 0, 0))  # noqa: DTZ001 - as google-auth states it
    clock = Clock(datetime(2030, 1, 1, 0, 0, 0, tzinfo=UTC).timestamp())
    token = GoogleToken(credentials, clock=clock)
    assert [token(), token()] == ["token-1", "token-1"]
    clock.now += 3400
    assert token() == "token-2"


def test_a_google_token_without_expiry() -> None:
    """Credentials with a fixed token are not refreshed, because they cannot be."""
    credentials = FakeGoogle(None)
    credentials.valid, credentials.token = True, "fixed"
    assert GoogleToken(credentials)() == "fixed"
    assert credentials.refreshed == 0


def private_key() -> str:
    """Make a key that signs nothing outside this test."""
    from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = generate_private_key(65537, 2048)
    text: str = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return text


@pytest.fixture
def google_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write Application Default Credentials to a file, with a token endpoint on loopback."""
    pytest.importorskip("google.auth", reason="needs the extra vertex")

    @contextmanager
    def login(answer: dict[str, Any], status: int = 200) -> Iterator[list[str]]:
        with token_server(answer, status) as (url, asked):
            found = {"type": "service_account", "project_id": "p", "client_email": "i@p.example"}
            file = tmp_path / "login.json"
            file.write_text(json.dumps({**found, "private_key": private_key(), "token_uri": f"{url}/token"}))
            monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
            monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "p")
            yield asked

    return login


def test_application_default_credentials(google_login: Any) -> None:
    """google-auth finds the machine's login and exchanges it for a token, once."""
    with google_login({"access_token": "ya29.found", "expires_in": 3600, "token_type": "Bearer"}) as asked:
        token = GoogleToken()
        assert [token(), token()] == ["ya29.found", "ya29.found"]
        assert asked == ["/token"]


def test_an_expired_login_is_a_config_error(google_login: Any) -> None:
    """The error states the remedy; the library's own exceptions are not raised."""
    with google_login({"error": "invalid_grant"}, 400), pytest.raises(ConfigError, match="gcloud auth") as caught:
        GoogleToken()()
    assert "invalid_grant" in str(caught.value)


def test_a_missing_google_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that does not exist is a ConfigError with the remedy."""
    pytest.importorskip("google.auth", reason="needs the extra vertex")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    with pytest.raises(ConfigError, match="GOOGLE_APPLICATION_CREDENTIALS"):
        GoogleToken()()


def test_a_token_endpoint_that_is_down_is_a_lost_connection(google_login: Any) -> None:
    """A refused connection may recover: nothing was sent, and the error can be retried."""
    with google_login({}):
        pass  # the server is gone, the login is not
    with pytest.raises(APIConnectionError, match="Nothing was sent"):
        GoogleToken()()


def test_a_managed_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """azure-identity's default credential asks the host's identity endpoint."""
    pytest.importorskip("azure.identity", reason="needs the extra entra")
    with token_server({"access_token": "eyJ.found", "expires_on": "4102444800", "resource": "r"}) as (url, asked):
        monkeypatch.setenv("IDENTITY_ENDPOINT", f"{url}/msi/token")
        monkeypatch.setenv("IDENTITY_HEADER", "h")
        monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "ManagedIdentityCredential")
        token = EntraToken()
        assert [token(), token()] == ["eyJ.found", "eyJ.found"]
    assert len(asked) == 1
    assert "cognitiveservices.azure.com" in asked[0]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (type("ClientAuthenticationError", (Exception,), {})("no login"), ConfigError),
        (type("ServiceRequestError", (Exception,), {})("no route"), APIConnectionError),
        (ModuleNotFoundError("No module named 'azure'"), ConfigError),
    ],
)
def test_errors_of_the_library_become_ours(error: Exception, kind: type[Exception]) -> None:
    """Any exception of azure-identity becomes an AggregatorError with its message."""
    with pytest.raises(kind, match=str(error)):
        EntraToken(FakeEntra(error=error))()


def test_a_missing_library_names_the_extra() -> None:
    """The remedy is the pip command."""
    missing = FakeEntra(error=ModuleNotFoundError("No module named 'azure'"))
    with pytest.raises(ConfigError, match=r"pip install 'aggregated-update\[entra\]'"):
        EntraToken(missing)()


def test_a_token_is_never_shown() -> None:
    """Neither the object's repr nor a client's shows the token."""
    token = EntraToken(FakeEntra(4102444800))
    assert token() == "token-1"
    llm = LLM("azure/d", base_url="https://r.openai.azure.com", api_key=token, env={})
    assert "token-1" not in f"{token!r} {llm!r} {llm.endpoint!r} {vars(llm)!r}"


async def test_a_replay_needs_no_login(tmp_path: Path) -> None:
    """A cassette is replayed on a machine without credentials; the recording asked for a token once."""
    path, credential = tmp_path / "azure.yaml", FakeEntra(4102444800)

    async def ask(token: Any, *steps: Any) -> str:
        options: Any = {"base_url": "https://r.openai.azure.com", "env": {}, "transport": ScriptedTransport(*steps)}
        return (await LLM("azure/d", api_key=token, **options).complete("Hi")).text

    with cassette(path, "once"):
        assert await ask(EntraToken(credential), answer("hello")) == "hello"
    with cassette(path, "none"):
        assert await ask(EntraToken(FakeEntra(error=ValueError("no login"))), failure(500)) == "hello"
    assert (len(credential.scopes), "token-1" in path.read_text()) == (1, False)


@pytest.mark.parametrize(
    ("error", "kind", "sent"),
    [
        (ValueError("no login"), ConfigError, 0),
        (ConnectionRefusedError("refused"), APIConnectionError, 0),
        (type("ReadTimeout", (Exception,), {})("late"), APIConnectionError, 0),
        (ConfigError("ours"), ConfigError, 0),
    ],
)
async def test_a_token_function_that_fails(error: Exception, kind: type[Exception], sent: int) -> None:
    """Any exception of the user's function becomes an AggregatorError, and nothing is sent or counted."""

    def token() -> str:
        raise error

    transport, budget = ScriptedTransport(answer("hello")), Budget(calls=5)
    llm = LLM("m", base_url=BASE_URL, api_key=token, transport=transport, budget=budget, max_attempts=1)
    with pytest.raises(kind, match=str(error)):
        await llm.complete("Hi")
    assert (len(transport.requests), budget.spent.calls) == (sent, sent)


@pytest.mark.parametrize(("token", "shown"), [(None, "NoneType"), (b"a-secret-token", "bytes"), ("", "an empty text")])
async def test_a_token_that_is_no_text_was_sent(token: Any, shown: str) -> None:
    """A login that has no token returned None, and the request had the key `None`; the value is never shown."""
    transport = ScriptedTransport(answer("hello"))
    llm = LLM("m", base_url=BASE_URL, api_key=lambda: token, transport=transport)
    with pytest.raises(ConfigError, match=f"Expected a token as text from the function api_key .* got {shown}$"):
        await llm.complete("Hi")
    assert transport.requests == []


async def test_a_token_that_arrives_on_the_second_attempt() -> None:
    """A service that is briefly unavailable costs an attempt, not the call; the request carries the token."""
    tries: Iterator[Any] = iter([OSError("away"), OSError("away"), "t1"])

    def token() -> str:
        found = next(tries)
        if isinstance(found, OSError):
            raise found
        return str(found)

    transport, virtual = ScriptedTransport(answer("hello")), VirtualTime()
    options: Any = {"transport": transport, "clock": virtual.clock, "sleep": virtual.sleep}
    found = await LLM("m", base_url=BASE_URL, api_key=token, **options).complete("Hi")
    assert (found.text, found.attempts) == ("hello", 2)
    assert transport.requests[0].headers["authorization"] == "Bearer t1"


def test_pickling_keeps_the_settings() -> None:
    """A token source is pickled without token or credentials; credentials given as an object are not pickled."""
    made = pickle.loads(pickle.dumps(GoogleToken(scope="https://example.com/scope")))
    assert repr(made) == repr(GoogleToken(scope="https://example.com/scope"))
    with pytest.raises(ConfigError, match="credentials"):
        pickle.dumps(EntraToken(FakeEntra(1)))
