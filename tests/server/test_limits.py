"""Connections that wait too long are closed, and no others; what anybody can make up does not fill memory."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from websockets.sync.client import connect

from liveweight.server.running import _patient
from tests.server.serving import Served, serving

SECONDS = 1.5


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """A websocket that says everything back."""
    assert scope["type"] == "websocket"
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})


@contextmanager
def patient() -> Iterator[int]:
    """A server that gives a request's head so many seconds; its port."""
    config = uvicorn.Config(
        echo,
        host="127.0.0.1",
        port=0,
        http=_patient(SECONDS),
        log_config=None,
        lifespan="off",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            threading.Event().wait(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def test_a_websocket_outlives_the_time_for_a_request() -> None:
    with patient() as port, connect(f"ws://127.0.0.1:{port}") as page:
        page.send("there")
        assert page.recv(timeout=5) == "there"
        threading.Event().wait(1.5 * SECONDS)
        page.send("still there")
        assert page.recv(timeout=5) == "still there"


def test_a_connection_without_a_request_is_closed() -> None:
    with patient() as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(20 * SECONDS)
        connection.sendall(b"GET / HT")
        assert connection.recv(100) == b""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as found:
        yield found


def test_methods_that_somebody_made_up_share_a_line_of_the_metrics(served: Served) -> None:
    with httpx.Client(base_url=served.url) as client:
        for method in ("PROPFIND", "MKCOL"):
            assert client.request(method, "/v1/models").status_code == 405
        text = client.get("/metrics").text
    assert "PROPFIND" not in text and "MKCOL" not in text
    assert 'method="other"' in text
