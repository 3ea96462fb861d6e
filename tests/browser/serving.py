"""A server with the page on a loopback port, and browsers that look at it and remember what went wrong.

The service is the real one, on the tiny model of `tiny_workspace`. NiceGUI has one set of pages a process, so one
server runs at a time: its fixture has the scope of a module.
"""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import axe_playwright_python
import uvicorn
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright

from liveweight.server.app import create_app
from liveweight.server.service import Service
from liveweight.web import mount
from tests.requirements_present import require
from tests.tiny_workspace import add_shout, tiny_settings

_AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
_WAIT = 30_000  # milliseconds, on a machine that is busy


class Served:
    """A running server."""

    def __init__(self, service: Service, address: str) -> None:
        self.service, self.address = service, address


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


@contextmanager
def served(root: Path, **settings: Any) -> Iterator[Served]:
    """A server on the tiny model, whose method `shout` always works."""
    add_shout()
    given = {"generation": {"max_tokens": 24}} | settings
    with Service.open(tiny_settings(root, **given)) as service, socket.create_server(("127.0.0.1", 0)) as listening:
        server = _Server(
            uvicorn.Config(create_app(service, page=mount), log_config=None, lifespan="on", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="server of the page")
        thread.start()
        try:
            assert server.up.wait(60), "the server did not start"
            yield Served(service, f"http://127.0.0.1:{listening.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(60)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium of this machine."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    require(found is not None, "there is no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-background-networking"]
        )
        try:
            yield browser
        finally:
            browser.close()


class Visitor:
    """Somebody with a browser: a page, and everything that should not have happened in it."""

    def __init__(self, browser: Browser, address: str, *, width: int = 1280, dark: bool = False) -> None:
        self.address, self.wrong = address, list[str]()
        size: Any = {"width": width, "height": 800}
        self.context: BrowserContext = browser.new_context(viewport=size, color_scheme="dark" if dark else "light")
        self.context.set_default_timeout(_WAIT)
        self.page: Page = self.context.new_page()
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("request", self._asked)

    def open(self, path: str = "/") -> Page:
        """Go to an address of the server."""
        self.page.goto(self.address + path)
        expect(self.page.locator(".nicegui-content[aria-busy]")).to_have_count(0)
        return self.page

    def accessible(self) -> None:
        """Fail where axe finds something serious or critical on the page as it is."""
        self.page.evaluate(_AXE.read_text(encoding="utf-8"))
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        serious = [
            f"{each['id']}: {each['help']}: {each['nodes'][0]['html']}"
            for each in found["violations"]
            if each["impact"] in ("serious", "critical")
        ]
        assert not serious, "\n".join(serious)

    def close(self) -> None:
        """Leave, and fail where anything was wrong."""
        self.context.close()
        assert not self.wrong, "\n".join(self.wrong)

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(f"{message.type}: {message.text}")

    def _asked(self, request: Request) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.wrong.append(f"asked {request.url}")
