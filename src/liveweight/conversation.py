"""Talking to the model: from what a person said to a remembered reply.

Owns how a chat is put together, the stream of a reply, and what is recorded of it when it ends, however it ends.
Knows nothing of judgements and changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

from liveweight.engines.base import Message, Sampling, Token, Version
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, StateConflict
from liveweight.interrupts import uninterrupted
from liveweight.ledger import Ledger, Turn
from liveweight.ledger.records import turns_as_json
from liveweight.reports import Reply
from liveweight.settings import GenerationSettings

Generate = Callable[[Sequence[int], Sampling], Iterator[Token]]  # a prompt's tokens -> the tokens behind them

_AT_ONCE = 32  # questions of one batch
_RECALLED = 40  # tokens of an answer that is asked for in a batch


def as_messages(
    said: str | Sequence[Message | Mapping[str, str]], before: Sequence[Turn] = (), system: str | None = None
) -> tuple[Message, ...]:
    """A text or turns, behind those that came before, with a system prompt in front. Raises InvalidInput."""
    turns = [{"role": "user", "content": said}] if isinstance(said, str) else _turns(said)
    messages = [Message(turn.role, turn.content) for turn in before]
    messages += [Message(turn["role"], turn["content"]) for turn in turns]  # type: ignore[arg-type] # checked above
    if system is not None:
        messages = [Message("system", system), *(m for m in messages if m.role != "system")]
    if not messages or messages[-1].role != "user" or not messages[-1].content.strip():
        raise InvalidInput(
            "There is nothing to answer.", hint="Let the chat end with a user's message that says something."
        )
    return tuple(messages)


def _turns(said: Sequence[Message | Mapping[str, str]]) -> list[dict[str, str]]:
    try:
        return turns_as_json(said)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"These are not messages: {said!r:.200}.", hint='Each one is {"role": "user", "content": "…"}.'
        ) from error


@dataclass(frozen=True)
class Place:
    """Where a reply belongs: the conversation, the reply it goes on from, and the id by which others know it."""

    chat: str | None = None
    after: int | None = None
    public_id: str | None = None


class ReplyStream(Iterator[Token]):
    """The tokens of one reply as they come. `close` stops it early and keeps what was said."""

    def __init__(
        self,
        engine: TransformersEngine,
        ledger: Ledger,
        messages: tuple[Message, ...],
        sampling: Sampling,
        generate: Generate,
        place: Place,
    ) -> None:
        """Raises what `generate` raises before its first token, such as InvalidInput for a chat that is too long."""
        self._engine, self._ledger, self._messages, self._sampling = engine, ledger, messages, sampling
        self._prompt = engine.encode(messages)
        self._place = place
        self._tokens = generate(self._prompt, sampling)
        self._said: list[Token] = []
        self._reply: Reply | None = None
        self._ending = threading.Lock()

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the chat before the reply has."""
        return len(self._prompt)

    def __next__(self) -> Token:
        if self._reply is not None:
            raise StopIteration
        try:
            token = next(self._tokens)
        except StopIteration:
            self._end()
            raise
        except BaseException:
            self.close()
            raise
        with self._ending:
            if self._reply is not None:  # closed by another thread while this one waited
                raise StopIteration
            self._said.append(token)
        return token

    def close(self) -> None:
        """Stop; what was said so far becomes the reply. Closing twice does no harm."""
        self.cancel()
        self._end()

    def cancel(self) -> None:
        """Let no more tokens come, so that whoever waits for the next one finds the end."""
        close = getattr(self._tokens, "close", None)
        if close is not None:
            close()

    @property
    def begun(self) -> bool:
        """Whether a token has come."""
        return bool(self._said)

    @property
    def reply(self) -> Reply:
        """The remembered reply. Raises StateConflict while tokens are still coming, or when none ever came."""
        if self._reply is None:
            raise StateConflict("The reply is not over.", hint="Take all of its tokens first, or close the stream.")
        return self._reply

    def _end(self) -> None:
        # Closing may come from another thread than the one that takes the tokens; a Ctrl-C between writing and knowing
        # that it was written would have it written again.
        with uninterrupted(), self._ending:
            if self._reply is None and self._said:
                self._reply = self._remembered()

    def _remembered(self) -> Reply:
        versions = list(dict.fromkeys(token.version for token in self._said))
        record = self._ledger.add_reply(
            self._engine.info.hash,
            self._messages,
            "".join(token.text for token in self._said).strip(),
            token_ids=[token.id for token in self._said],
            prompt_token_ids=self._prompt,
            version_number=versions[-1].number,
            version_hash=versions[-1].hash,
            sampling=asdict(self._sampling),
            details={
                "versions": [str(version) for version in versions],
                "spans": [[str(version), len(list(made))] for version, made in groupby(self._said, _version_of)],
                "finish": self._said[-1].finish or "cancelled",
                "logprob": sum(token.logprob for token in self._said),
            },
            public_id=self._place.public_id,
            chat=self._place.chat,
            after=self._place.after,
        )
        return Reply(**record.model_dump())


def _version_of(token: Token) -> Version:
    return token.version


class Chatter:
    """Starts replies; a chat without a system prompt gets the settings'."""

    def __init__(self, engine: TransformersEngine, ledger: Ledger, defaults: GenerationSettings) -> None:
        """`defaults` hold the system prompt."""
        self._engine, self._ledger, self._defaults = engine, ledger, defaults

    def stream(
        self,
        messages: tuple[Message, ...],
        sampling: Sampling,
        place: Place = Place(),  # frozen
        generate: Generate | None = None,
    ) -> ReplyStream:
        """The stream of the answer to a chat, made by the engine alone unless told how.

        Raises InvalidInput for a chat that the model cannot take.
        """
        messages = self._with_system(messages)
        return ReplyStream(
            self._engine, self._ledger, messages, sampling, generate or self._engine.continue_from, place
        )

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The settings' system prompt before a chat that has none.

        Written into the chat, so that the reply can be asked for again under other settings.
        """
        system = self._defaults.system
        return messages if system is None or messages[0].role == "system" else (Message("system", system), *messages)

    def recalled(self, asked: Sequence[tuple[Sequence[Message], str | None]]) -> list[Reply]:
        """Replies to chats as they were given elsewhere, remembered; where none was, the greedy one of now.

        What has to be asked is asked in batches. Raises InvalidInput for an empty question.
        """
        chats = [self._with_system(as_messages(chat)) for chat, _ in asked]
        prompts = [self._engine.encode(chat) for chat in chats]
        missing = [index for index, (_, answer) in enumerate(asked) if not answer]
        said: dict[int, list[int]] = {}
        for start in range(0, len(missing), _AT_ONCE):
            batch = missing[start : start + _AT_ONCE]
            said |= dict(zip(batch, self._engine.greedy([prompts[index] for index in batch], _RECALLED), strict=True))
        version = self._engine.version
        found = []
        for index, (chat, prompt, (_, answer)) in enumerate(zip(chats, prompts, asked, strict=True)):
            ids = said[index] if index in said else self._engine.format.encode_continuation(prompt, answer or "")
            record = self._ledger.add_reply(
                self._engine.info.hash,
                chat,
                self._engine.format.decode(ids).strip(),
                token_ids=ids,
                prompt_token_ids=prompt,
                version_number=version.number,
                version_hash=version.hash,
                sampling=asdict(Sampling(max_tokens=_RECALLED)),
                details={"versions": [str(version)], "finish": "recalled" if answer else "length"},
            )
            found.append(Reply(**record.model_dump()))
        return found
