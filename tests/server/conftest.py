"""Servers for the tests. Without the extra, or without the clients, nothing is collected."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from elmoe.extras import missing
from tests.templated import templated_store

ABSENT = missing("server") or next((name for name in ("httpx", "openai") if find_spec(name) is None), None)
collect_ignore_glob = ["test_*.py"] if ABSENT else []


@pytest.fixture(scope="package")
def store(tmp_path_factory):
    """The demo model with a chat template."""
    return templated_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def model(store):
    import elmoe

    with elmoe.load(store, mode="elastic") as opened:
        yield opened


@pytest.fixture(scope="module")
def api(model):
    """A client of an application in this process, with small limits."""
    from fastapi.testclient import TestClient

    from elmoe.server.app import create_app
    from elmoe.server.settings import Settings

    settings = Settings("whale", body_bytes=1 << 20, answers=8, prompt_tokens=1500, body_seconds=2.0)
    with TestClient(create_app(model, settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def live(store):
    """A server in a process of its own."""
    from tests.server.live import LiveServer

    with LiveServer(str(store), "--model-name", "whale", "--queue", "256") as server:
        yield server
