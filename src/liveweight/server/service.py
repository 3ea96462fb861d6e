"""What is served: one model, its batch of replies, its jobs, keys and events.

Owns how these are opened and closed together, and how a reply is begun for somebody. Knows nothing of HTTP, and nothing
of the page.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Self

from anyio import CapacityLimiter

from liveweight.conversation import Place, ReplyStream
from liveweight.engines.base import Message, Sampling
from liveweight.engines.batching import Batcher, TokenStream
from liveweight.errors import InvalidInput
from liveweight.live_model import LiveModel
from liveweight.server import work
from liveweight.server.events import EventFeed
from liveweight.server.jobs import JobContext, JobRunner
from liveweight.server.keys import Keyring
from liveweight.server.rates import Rates
from liveweight.settings import Settings

_AT_THE_DOOR = 8  # threads that look at keys
_log = logging.getLogger(__name__)
_job: ContextVar[JobContext | None] = ContextVar("_job", default=None)  # that the work of this thread belongs to


def _say(sentence: str) -> None:
    """A step of long work, to the job that it belongs to."""
    context = _job.get()
    if context is not None:
        context.progress(sentence)


class Service:
    """One model with all that serves it. Safe to use from several threads; close it in the end."""

    def __init__(self, live: LiveModel, settings: Settings) -> None:
        """Take a model that says its steps to `Service.say`, and begin with the jobs that were left."""
        server = settings.server
        self.live, self.settings = live, settings
        self.batcher = Batcher(live.engine, rows=server.rows, waiting=server.waiting)
        self.door = CapacityLimiter(_AT_THE_DOOR)
        self.rates = Rates(server.requests_per_minute)
        self.keys = Keyring(settings.workspace, settings.database_url)
        self.events = EventFeed(live.ledger)
        self.jobs = JobRunner(live, work.kinds(live, _job), interruptible=live.engine.gate.interruptible)
        self.jobs.start()

    say = staticmethod(_say)

    @classmethod
    def open(cls, settings: Settings, *, progress: bool = False) -> Self:
        """Load the model and open its workspace. Raises what `LiveModel.load` raises."""
        live = LiveModel.load(settings=settings, say=_say, progress=progress)
        # Somebody waits for the answer of a switch: better a clear refusal than a silence as long as a search.
        live.patience = settings.server.change_seconds
        try:
            return cls(live, settings)
        except BaseException:
            live.close()
            raise

    def close(self) -> None:
        """End replies, jobs and subscriptions, and let go of the workspace. Closing twice does no harm."""
        self.events.close()
        self.batcher.close()
        self.jobs.close()
        self.keys.close()
        self.live.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stream(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling,
        author: str,
        chat: str | None = None,
        after: str | None = None,
        public_id: str | None = None,
    ) -> ReplyStream:
        """Begin the reply to a chat. It is remembered under `public_id`, in the conversation `chat`, behind `after`.

        Raises InvalidInput for a chat that the model cannot take, UnknownReply, QueueFull.
        """
        _log.debug("asked", extra={"said": [[message.role, message.content] for message in messages]})
        place = Place(chat, None if after is None else self.live.reply(after).id, public_id)
        return self.live.chatter.stream(
            tuple(messages), sampling, place, lambda tokens, how: self._submit(tokens, how, author)
        )

    def complete(self, prompt: str | Sequence[int], *, sampling: Sampling, author: str) -> TokenStream:
        """Go on from plain text, or from tokens. Nothing of it is remembered. Raises InvalidInput, QueueFull."""
        tokens = self.live.engine.format.encode_text(prompt, special=True) if isinstance(prompt, str) else list(prompt)
        vocabulary = self.live.engine.info.vocabulary
        strange = next((token for token in tokens if not 0 <= token < vocabulary), None)
        if strange is not None:
            raise InvalidInput(f"The model has no token {strange}.", hint=f"It has 0 to {vocabulary - 1}.")
        return self._submit(tokens, sampling, author)

    def _submit(self, tokens: Sequence[int], sampling: Sampling, author: str) -> TokenStream:
        most = self.settings.server.max_prompt_tokens
        if most is not None and len(tokens) > most:
            raise InvalidInput(
                f"The prompt has {len(tokens)} tokens, and this server takes {most}.",
                hint="Shorten the chat, or begin a new one.",
                tokens=len(tokens),
                context=most,
            )
        return self.batcher.submit(tokens, sampling, owner=author)
