"""The browser that the tests of a module share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.serving import Served, Visitor, chromium

expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def visitor(browser: Browser, server: Served) -> Iterator[Callable[..., Visitor]]:
    """Makes visitors; what went wrong in their browsers fails the test."""
    made: list[Visitor] = []

    def come(**how: object) -> Visitor:
        made.append(Visitor(browser, server.address, **how))  # type: ignore[arg-type]
        return made[-1]

    yield come
    for each in made:
        each.close()
