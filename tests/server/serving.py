"""A real server around a tiny model: uvicorn in a thread, on a loopback port of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from liveweight.server.app import create_app
from liveweight.server.service import Service
from tests.tiny_workspace import tiny_settings


@dataclass(frozen=True)
class Served:
    """A service, and where it is reached."""

    service: Service
    url: str

    @property
    def model(self) -> str:
        return self.service.live.engine.info.name


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=sockets)
        self.listening.set()


@contextmanager
def serving(root: Path, **server: object) -> Iterator[Served]:
    """Serve a tiny model out of `root`; `server` are settings of that group."""
    settings = tiny_settings(root, server={"page": False, "requests_per_minute": 1_000_000} | server)
    with Service.open(settings) as service:
        config = uvicorn.Config(create_app(service), host="127.0.0.1", port=0, log_config=None)
        running = _Server(config)
        thread = threading.Thread(target=running.run)
        thread.start()
        try:
            assert running.listening.wait(30)
            port = running.servers[0].sockets[0].getsockname()[1]
            yield Served(service, f"http://127.0.0.1:{port}")
        finally:
            running.should_exit = True
            thread.join()
