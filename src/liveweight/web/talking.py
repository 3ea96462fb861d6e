"""Replies while they are being said.

Owns one thread a reply, what was said so far, stopping, and giving up where nobody looks any more. A reply under way
belongs to its conversation, not to a browser: who reloads, or opens the conversation elsewhere, sees it go on. Knows
nothing of how it is shown.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from liveweight.engines.base import Message, Sampling
from liveweight.errors import LiveweightError
from liveweight.ledger import acting_as
from liveweight.reports import Reply

if TYPE_CHECKING:
    from liveweight.conversation import ReplyStream
    from liveweight.server.service import Service

_log = logging.getLogger(__name__)

_UNSEEN = 15.0  # seconds without anybody looking, after which a reply is stopped
_RATES = 200  # replies whose speed is remembered


class Speaking:
    """One reply under way. Read from any thread; `tokens` only grows."""

    def __init__(self, chat: str, question: str, after: int | None) -> None:
        """`after` is the reply that it goes on from."""
        self.chat, self.question, self.after = chat, question, after
        self.tokens: list[str] = []
        self.version = ""
        self.reply: Reply | None = None
        self.error: LiveweightError | Exception | None = None
        self.over = False
        self._stopped = threading.Event()
        self._stream: ReplyStream | None = None
        self._looked = time.monotonic()

    @property
    def text(self) -> str:
        """What was said so far."""
        return "".join(self.tokens).lstrip()

    def look(self) -> None:
        """Somebody is watching it."""
        self._looked = time.monotonic()

    def hold(self, stream: ReplyStream) -> None:
        """Where its tokens come from."""
        self._stream = stream
        if self._stopped.is_set():
            stream.cancel()

    def stop(self) -> None:
        """Say no more, also where nothing was said yet; what was said is kept."""
        self._stopped.set()
        if self._stream is not None:
            self._stream.cancel()

    @property
    def unwanted(self) -> bool:
        """Whether it was stopped, or is watched by nobody."""
        return self._stopped.is_set() or time.monotonic() - self._looked > _UNSEEN


class Talk:
    """The replies under way, one a conversation."""

    def __init__(self, service: Service, changed: Callable[[], None]) -> None:
        """`changed` is called, from the reply's thread, when a reply has begun and when it is over."""
        self._service, self._changed = service, changed
        self._speaking: dict[str, Speaking] = {}
        self._lock = threading.Lock()
        self.rates: deque[float] = deque(maxlen=_RATES)
        """Tokens a second of the latest replies of the page, the first token left out."""

    def of(self, chat: str | None) -> Speaking | None:
        """The reply that is being said in a conversation."""
        return self._speaking.get(chat) if chat else None

    @property
    def count(self) -> int:
        """How many replies are being said."""
        return len(self._speaking)

    def say(
        self, messages: Sequence[Message], sampling: Sampling, *, chat: str, after: Reply | None, author: str
    ) -> Speaking:
        """Begin a reply; where one is being said in that conversation already, that one."""
        with self._lock:
            running = self._speaking.get(chat)
            if running is not None:
                return running
            begun = Speaking(chat, messages[-1].content, None if after is None else after.id)
            self._speaking[chat] = begun
        parent = None if after is None else after.label
        thread = threading.Thread(
            target=self._run,
            args=(begun, tuple(messages), sampling, parent, author),
            name=f"reply in {chat}",
            daemon=True,
        )
        thread.start()
        self._changed()
        return begun

    def stop_all(self) -> None:
        """Stop every reply, at the server's end."""
        for each in list(self._speaking.values()):
            each.stop()

    def _run(
        self, speaking: Speaking, messages: tuple[Message, ...], sampling: Sampling, after: str | None, author: str
    ) -> None:
        try:
            with acting_as(author):
                stream = self._service.stream(
                    messages, sampling=sampling, author=author, chat=speaking.chat, after=after
                )
                speaking.hold(stream)
                first = 0.0
                try:
                    for token in stream:
                        first = first or time.monotonic()
                        speaking.version = str(token.version)
                        speaking.tokens.append(token.text)
                        if speaking.unwanted:
                            break
                finally:
                    stream.close()
            if len(speaking.tokens) > 1:
                self.rates.append((len(speaking.tokens) - 1) / max(time.monotonic() - first, 1e-6))
            if speaking.tokens:
                speaking.reply = stream.reply
        except LiveweightError as error:
            speaking.error = error
        except Exception as error:  # a thread has nobody to raise to: it is shown on the page and logged
            _log.exception("A reply of the page failed.")
            speaking.error = error
        finally:
            speaking.over = True
            with self._lock:
                self._speaking.pop(speaking.chat, None)
            self._changed()
