"""What happens in the ledger, told to whoever listens, as it is committed.

Owns the subscriptions and the framing of server-sent events. A listener that was away goes on behind the last event it
saw. Knows nothing of what an event means.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from anyio import to_thread

from liveweight.ledger import Event, Ledger

_AT_ONCE = 200


class EventFeed:
    """The journal as a stream. `close` ends every subscription."""

    def __init__(self, ledger: Ledger) -> None:
        """Listen to a ledger."""
        self._ledger = ledger
        self._wakes: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._closed = False
        self._unsubscribe = ledger.on_commit(self.wake)

    async def subscribe(self, after: int | None = None) -> AsyncIterator[Event]:
        """Events behind the one of that id, then each new one; left out, new ones only."""
        async for event in self.or_silence(after, seconds=None):
            if event is not None:
                yield event

    async def or_silence(self, after: int | None, *, seconds: float | None) -> AsyncIterator[Event | None]:
        """The same, with None where nothing has happened for some seconds."""
        mine = (asyncio.get_running_loop(), asyncio.Event())
        self._wakes.add(mine)
        try:
            if after is None:
                after = await to_thread.run_sync(self._ledger.last_event)
            while not self._closed:
                mine[1].clear()
                found = await to_thread.run_sync(self._behind, after)
                for event in found:
                    after = event.id
                    yield event
                if found:
                    continue
                try:
                    async with asyncio.timeout(seconds):
                        await mine[1].wait()
                except TimeoutError:
                    yield None
        finally:
            self._wakes.discard(mine)

    def wake(self) -> None:
        """Let everybody look again; from any thread."""
        for loop, event in list(self._wakes):
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    def close(self) -> None:
        """End every subscription."""
        self._closed = True
        self._unsubscribe()
        self.wake()

    def _behind(self, after: int) -> list[Event]:
        return self._ledger.events(after=after, limit=_AT_ONCE)


def framed(event: Event | None) -> bytes:
    """An event as server-sent events have it; a comment where there is none."""
    if event is None:
        return b": nothing new\n\n"
    data = json.dumps(event.model_dump(mode="json"), ensure_ascii=False)
    return f"id: {event.id}\nevent: {event.kind}\ndata: {data}\n\n".encode()
