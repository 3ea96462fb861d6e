"""Many replies at once: one loop that decodes all of them together.

Owns who is decoded and who waits, in which order, and the thread that does it. Each turn of the loop is one step at the
engine's gate: it reads a piece of one prompt, or several short ones, and makes one token for every sequence that is
behind its prompt. Waiting requests are taken one of each owner in turn. Knows nothing of what an owner is, of chats, or
of HTTP.

A Llama-like model without hooks multiplies each matrix once for all rows (`DirectDecoder.feed_together`). Any other
model, and one with active hooks, goes through its rows one after another.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from itertools import takewhile
from queue import SimpleQueue

import torch

from liveweight.engines.base import Sampling, Token, Version
from liveweight.engines.decoding import CHUNK, Decoder, DirectDecoder, chunks
from liveweight.engines.generation import Generation
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import QueueFull, Stopping

_GUESS = 10.0  # seconds a reply, before any has ended
_MEMORY = 0.8  # how much of the mean time a reply is what it was before


class TokenStream(Iterator[Token]):
    """The tokens of one generation as they are made. Blocks; `close` may be called from any thread."""

    def __init__(self, generation: Generation, owner: str, batcher: Batcher) -> None:
        """Nothing is made yet."""
        self.generation, self.owner = generation, owner
        self.decoder: Decoder | None = None
        self.version: Version | None = None
        self.fed = 0  # of the generation's tokens, by this decoder
        self.began = time.monotonic()
        self.closed = False
        self._batcher = batcher
        self._made: SimpleQueue[Token | BaseException | None] = SimpleQueue()
        self._over = False

    def __next__(self) -> Token:
        if self._over:
            raise StopIteration
        made = self._made.get()
        if isinstance(made, Token):
            return made
        self._over = True
        if made is None:
            raise StopIteration
        raise made

    def close(self) -> None:
        """Stop; a thread that waits for the next token is let go. Closing twice does no harm."""
        self.closed = True
        self._batcher.forget(self)

    def put(self, made: Token | BaseException | None) -> None:
        """Hand on a token, an error, or the end."""
        self._made.put(made)

    @property
    def reads(self) -> bool:
        """Whether it is still reading its prompt (or, after a change, what it had read and said)."""
        return self.fed == 0 or len(self.generation.ids) - self.fed > 1


class Batcher:
    """Decodes what is submitted, several sequences at once. Safe to use from several threads."""

    def __init__(self, engine: TransformersEngine, *, rows: int = 8, waiting: int = 64) -> None:
        """Decode at most `rows` sequences together, and let at most `waiting` others wait."""
        self._engine, self._rows, self._most = engine, rows, waiting
        self._door = threading.Condition()
        self._waiting: OrderedDict[str, deque[TokenStream]] = OrderedDict()  # by owner, whose turn it is first
        self._running: list[TokenStream] = []
        self._closed = False
        self._seconds = _GUESS  # of a reply, about
        self.tokens = 0  # made so far
        self.prompt_tokens = 0  # read so far
        self._thread = threading.Thread(target=self._loop, name="liveweight-batcher", daemon=True)
        self._thread.start()

    @property
    def capacity(self) -> int:
        """How many sequences can be decoded or wait at once."""
        return self._most + self._rows

    @property
    def rows(self) -> int:
        """How many sequences are decoded together at most."""
        return self._rows

    @property
    def running(self) -> int:
        """How many sequences are being decoded."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many sequences wait for their turn."""
        with self._door:
            return self._count()

    def submit(self, prompt: Sequence[int], sampling: Sampling, *, owner: str = "") -> TokenStream:
        """Continue a prompt given as tokens, as soon as there is room.

        Raises InvalidInput as `Generation` does, QueueFull where too many wait, Stopping where it was closed.
        """
        stream = TokenStream(Generation(self._engine.format, prompt, sampling, self._engine.info.context), owner, self)
        with self._door:
            if self._closed:
                raise Stopping("The server is stopping.", hint="Ask again when it is back.")
            count = self._count()
            if count + len(self._running) >= self.capacity:
                wait = max(1, round(self._seconds * (count + 1) / self._rows))
                raise QueueFull(
                    f"{count} requests are waiting already.", hint=f"Ask again in {wait} seconds.", retry_after=wait
                )
            self._waiting.setdefault(owner, deque()).append(stream)
            self._door.notify_all()
        return stream

    def forget(self, stream: TokenStream) -> None:
        """Stop a stream, whether it waits or runs."""
        with self._door:
            queue = self._waiting.get(stream.owner)
            if queue is not None and stream in queue:
                queue.remove(stream)
                if not queue:
                    del self._waiting[stream.owner]
                stream.put(None)
            self._door.notify_all()

    def close(self) -> None:
        """End everything that runs or waits. Closing twice does no harm."""
        with self._door:
            self._closed = True
            self._door.notify_all()
        self._thread.join()

    # ------------------------------------------------------------------------------------------------- the loop

    def _count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _loop(self) -> None:
        while True:
            with self._door:
                while not (self._closed or self._running or self._waiting):
                    self._door.wait()
                if self._closed:
                    break
            self._admit()
            for stream in [each for each in self._running if each.closed]:
                self._end(stream)
            if self._running:
                self._turn()
        stopped = Stopping("The server is stopping.", hint="Ask again when it is back.")
        for stream in [*self._running]:
            self._end(stream, stopped)
        with self._door:
            for stream in [each for queue in self._waiting.values() for each in queue]:
                stream.put(stopped)
            self._waiting.clear()

    def _admit(self) -> None:
        """Let in who waits, one of each owner in turn, while there is room."""
        while len(self._running) < self._rows:
            with self._door:
                if not self._waiting:
                    return
            # With nobody inside, the thread may wait for the change that drain mode lets go first.
            if not self._engine.gate.begin_generation(wait=not self._running):
                return
            with self._door:
                if not self._waiting:  # its client went away meanwhile
                    self._engine.gate.end_generation()
                    return
                owner, queue = self._waiting.popitem(last=False)
                stream = queue.popleft()
                if queue:
                    self._waiting[owner] = queue
                self._running.append(stream)
            stream.began = time.monotonic()

    def _turn(self) -> None:
        """One step at the gate: a piece of what is to be read, and a token for everybody who has read theirs."""
        engine, running = self._engine, list(self._running)
        made: list[tuple[TokenStream, Token | BaseException]] = []
        try:
            with engine.gate.step(), torch.inference_mode():
                for stream in running:
                    if stream.decoder is None or stream.version != engine.version:
                        stream.decoder, stream.version, stream.fed = engine.decoder(), engine.version, 0
                behind = [each for each in running if not each.reads]
                made += self._read([each for each in running if each.reads])
                made += self._decode(behind)
        except Exception as error:
            # Whatever it was, nobody is left waiting for a token that never comes.
            made = [(stream, error) for stream in running]
        for stream, each in made:
            if isinstance(each, Token):
                self.tokens += 1
                stream.put(each)
                if each.finish:
                    self._end(stream)
            else:
                self._end(stream, each)

    def _read(self, readers: Sequence[TokenStream]) -> list[tuple[TokenStream, Token | BaseException]]:
        """As much as one step takes: several short beginnings in one pass, or a piece of the first one's."""
        if not readers:
            return []
        packed = self._packed(readers)
        if len(packed) > 1:
            beginnings = [each.generation.ids for each in packed]
            decoders = [each.decoder for each in packed if isinstance(each.decoder, DirectDecoder)]
            rows = DirectDecoder.read_together(decoders, beginnings)
            for stream, beginning in zip(packed, beginnings, strict=True):
                stream.fed = len(beginning)
                self.prompt_tokens += len(beginning)
            return [self._drawn(stream, row) for stream, row in zip(packed, rows, strict=True)]
        stream = readers[0]
        piece = chunks(stream.generation.ids[stream.fed :])[0]
        logits = self._feed(stream, piece)
        self.prompt_tokens += len(piece)
        # The last token of all may be left over: it is read as one that was said is, in the next step.
        if stream.fed == len(stream.generation.ids):
            return [self._drawn(stream, logits)]
        self._running.remove(stream)  # the others' turn: nobody waits for the whole of a long prompt
        self._running.append(stream)
        return []

    def _packed(self, readers: Sequence[TokenStream]) -> list[TokenStream]:
        """The first one with those that fit into one pass with it; it alone where it has to be read alone.

        A seeded reply is read alone: its bits are not to depend on who else asks.
        """
        opening: Sequence[int] = ()
        room = CHUNK
        found: list[TokenStream] = []
        for stream in readers:
            ids = stream.generation.ids
            new = len(ids) - sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(opening, ids, strict=False)))
            together = stream.generation.sampling.seed is None and isinstance(stream.decoder, DirectDecoder)
            if together and stream.fed == 0 and new <= room:
                found.append(stream)
                opening, room = opening or ids, room - new
            elif not found:
                return [stream]
        return found

    def _decode(self, streams: Sequence[TokenStream]) -> list[tuple[TokenStream, Token | BaseException]]:
        """A token for each of these, all of which have one token to feed."""
        if not streams:
            return []
        direct = [each.decoder for each in streams if isinstance(each.decoder, DirectDecoder)]
        alone = len(streams) == 1 and streams[0].generation.sampling.seed is None
        if alone or len(direct) < len(streams):
            return [self._drawn(each, self._feed(each, each.generation.ids[-1:])) for each in streams]
        rows = DirectDecoder.feed_together(direct, [each.generation.ids[-1] for each in streams])
        for stream in streams:
            stream.fed += 1
        return [self._drawn(stream, row) for stream, row in zip(streams, rows, strict=True)]

    def _feed(self, stream: TokenStream, piece: Sequence[int]) -> torch.Tensor:
        assert stream.decoder is not None
        with self._engine.activations.prompt(stream.generation.prompt_length):
            logits = stream.decoder.feed(piece)
        stream.fed += len(piece)
        return logits

    def _drawn(self, stream: TokenStream, logits: torch.Tensor) -> tuple[TokenStream, Token | BaseException]:
        assert stream.version is not None
        try:
            return stream, stream.generation.draw(logits, stream.version)
        except Exception as error:  # of this one's sampling: the others go on
            return stream, error

    def _end(self, stream: TokenStream, error: BaseException | None = None) -> None:
        self._engine.gate.end_generation()
        self._running.remove(stream)
        stream.decoder = None  # its cache is large
        self._seconds = _MEMORY * self._seconds + (1 - _MEMORY) * (time.monotonic() - stream.began)
        stream.put(error)


__all__ = ["Batcher", "TokenStream"]
