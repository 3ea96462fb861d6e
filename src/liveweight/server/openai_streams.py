"""From blocking iterators over tokens to the event loop, and back when a client goes away.

Owns the worker threads that wait for tokens, and the promise that every stream of a request is over or closed when the
request is, whatever ended it. Knows nothing of how an answer looks.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Generic, Protocol, TypeVar

from anyio import CancelScope, CapacityLimiter, to_thread
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from liveweight.engines.base import Token


class Stream(Protocol):
    """What is iterated: it blocks until the next token, and can be closed from another thread."""

    def __iter__(self) -> Iterator[Token]:
        """The tokens as they come."""

    def close(self) -> None:
        """Stop; the thread that waits for a token is let go."""


S = TypeVar("S", bound=Stream)
Event = tuple[int, Token | Exception | None]  # of which stream: a token, why it failed, or that it is over
_Queue = asyncio.Queue[Event | None]  # None: the client went away


class Workers:
    """The threads that wait for tokens: apart from those that other work shares, so that neither keeps the other out.

    Closing has its own, because it has to come through when all others wait.
    """

    def __init__(self, streams: int) -> None:
        """Let so many streams be waited for at once; more than a server lets in, or they would wait here unseen."""
        self.waiting = CapacityLimiter(streams)
        self.closing = CapacityLimiter(8)


class Running(Generic[S]):
    """The streams of one request, and what they bring in the order in which it comes."""

    def __init__(self, streams: Sequence[S], queue: _Queue) -> None:
        """Their threads put events into the queue."""
        self.streams = streams
        self._queue = queue

    async def events(self) -> list[Event]:
        """Everything that has come, at least one event. Raises ClientDisconnect where nobody waits any more."""
        found = [await self._queue.get()]
        while not self._queue.empty():
            found.append(self._queue.get_nowait())
        events = [event for event in found if event is not None]
        if len(events) < len(found):
            raise ClientDisconnect
        return events


@asynccontextmanager
async def running(begins: Sequence[Callable[[], S]], receive: Receive, workers: Workers) -> AsyncIterator[Running[S]]:
    """Begin streams, and read them inside the block; behind it all of them are over.

    Raises what beginning one raises, after the others were closed.
    """
    queue: _Queue = asyncio.Queue()
    loop = asyncio.get_running_loop()
    begun: asyncio.Future[None] = loop.create_future()
    ending = threading.Event()
    streams: list[S] = []
    over: set[int] = set()

    def begin() -> None:
        """Begin all of them, and go on as the first one's reader: a thread less to wake before the first token."""
        try:
            for start in begins:
                streams.append(start())
        except BaseException as error:
            loop.call_soon_threadsafe(_settle, begun, error)
            return
        if ending.is_set():  # those that were not there yet when the others were closed
            close()
            return
        loop.call_soon_threadsafe(_settle, begun, None)
        read(0)

    def read(number: int) -> None:
        failure: Exception | None = None
        try:
            for token in streams[number]:
                loop.call_soon_threadsafe(queue.put_nowait, (number, token))
                if ending.is_set():
                    streams[number].close()
        except Exception as error:  # whatever it is, somebody waits for this stream
            failure = error
        over.add(number)
        loop.call_soon_threadsafe(queue.put_nowait, (number, failure))

    def close() -> None:
        for number, stream in enumerate(streams):
            if number not in over:
                stream.close()

    def thread(work: Callable[..., None], *given: int) -> asyncio.Task[None]:
        return asyncio.create_task(to_thread.run_sync(work, *given, limiter=workers.waiting))

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        queue.put_nowait(None)

    watching = asyncio.create_task(watch())
    threads = [thread(begin)]
    try:
        await begun
        threads += [thread(read, number) for number in range(1, len(streams))]
        yield Running(streams, queue)
    finally:
        watching.cancel()
        ending.set()
        with CancelScope(shield=True):
            if len(over) < len(streams):
                await to_thread.run_sync(close, limiter=workers.closing)
            await asyncio.gather(*threads)


def _settle(begun: asyncio.Future[None], error: BaseException | None) -> None:
    if begun.done():  # cancelled
        return
    if error is None:
        begun.set_result(None)
    else:
        begun.set_exception(error)
