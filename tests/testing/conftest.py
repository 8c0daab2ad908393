"""The plugin's tests run the project tree in a copy; pytest does not collect it here."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator

import pytest
from user_project import PROJECT, Handler, Model

collect_ignore = ["project"]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    monkeypatch.delenv("CI", raising=False)
    with Model(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("MODEL_URL", f"http://127.0.0.1:{server.server_port}/v1")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    shutil.copytree(PROJECT, pytester.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return pytester
