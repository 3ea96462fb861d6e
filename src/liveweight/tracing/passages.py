"""A text as passages of tokens, and what one layer's neurons do on them.

Owns cutting a text of any length into passages, evenly spread over it where it has more tokens than are wished for, and
reading a layer on them in bounded memory. The first position of a passage is context only: models park large values
there that say nothing of the token. Knows nothing of what is then made of it. Nothing here writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput

LENGTH = 128  # tokens of a passage, or what the model's context holds
_PIECE = 2048  # characters that are made tokens at once
_PLACES = 16  # of a long text that are looked at, at least
_ROWS = 16  # passages of one pass
_CHARACTERS = 16  # of text a wished token, at most, that are made tokens; evenly spread over a longer text

Progress = Callable[[int, int], None]  # done, of how many


@dataclass(frozen=True)
class Passage:
    """Some tokens in a row. Those from `start` on are read, those before are context."""

    ids: tuple[int, ...]
    start: int

    @property
    def read(self) -> int:
        """How many of its tokens are read."""
        return len(self.ids) - self.start


def passages(engine: TransformersEngine, text: str, most: int) -> list[Passage]:
    """The text as passages with at most `most` tokens to read (and one passage at least).

    Raises InvalidInput for a text without two tokens, and for less than one wished token.
    """
    if most < 1:
        raise InvalidInput(f"{most} tokens are none to read.", hint="Give 1 or more.")
    beginning = engine.format.before_text
    start = max(len(beginning), 1)
    room = min(LENGTH, engine.info.context or LENGTH) - len(beginning)
    pieces = [piece for at in range(0, len(text), _PIECE) if (piece := text[at : at + _PIECE]).strip()]
    cut: list[Passage] = []
    for number in spread(len(pieces), max(_PLACES, most * _CHARACTERS // _PIECE)):
        ids = engine.format.encode_text(pieces[number])
        parts = [tuple(ids[at : at + room]) for at in range(0, len(ids), room)]
        cut += [Passage(beginning + part, start) for part in parts if len(beginning + part) > start]
    if not cut:
        raise InvalidInput("There is no text to read: it has fewer than two tokens.", hint="Give some sentences.")
    found: list[Passage] = []
    left = most
    for number in spread(len(cut), max(1, round(most / (sum(each.read for each in cut) / len(cut))))):
        if left > 0:
            passage = cut[number]
            found.append(Passage(passage.ids[: passage.start + left], passage.start))
            left -= found[-1].read
    return found


def read_neurons(
    engine: TransformersEngine, layer: int, read: list[Passage], progress: Progress | None = None
) -> Tensor:
    """What a layer's neurons do at the passages' tokens, in their order: (neurons, tokens), float32 on the CPU.

    Under the present weights. Raises UnknownSite for a layer that is not there, Unsupported for one with experts.
    """
    engine.sites.activation(f"layers.{layer}.mlp.neurons")  # says what is wrong with the layer, if anything
    found = torch.empty(engine.sites.neurons_of(layer), sum(each.read for each in read))
    ends = torch.tensor([each.read for each in read]).cumsum(0).tolist()
    order = sorted(range(len(read)), key=lambda place: len(read[place].ids))
    for first in range(0, len(order), _ROWS):
        batch = order[first : first + _ROWS]
        rows = [list(read[place].ids) for place in batch]
        replay = engine.record(rows, [read[place].start for place in batch], neurons=[layer], final=False)
        for row, place in enumerate(batch):
            length = read[place].read
            values = replay.neurons[layer][row, :length].float().cpu()  # (length, neurons)
            found[:, ends[place] - length : ends[place]] = values.T
        if progress is not None:
            progress(first + len(batch), len(order))
    return found


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread."""
    chosen = min(count, most)
    return [place * count // chosen for place in range(chosen)]
