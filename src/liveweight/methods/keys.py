"""Keys: what a layer's neurons do where something is said that a change is to leave alone.

Owns reading them for prompts and answers, and remembering those that depend on the base alone. Knows nothing of what is
done with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.base import Answered

_ROWS = 64  # answers that are read at once


def answer_keys(
    engine: TransformersEngine, answered: Sequence[Answered], layer: int, *, prompts: bool = False
) -> Tensor:
    """(n, neurons) under the weights of now: where each answer is said, from the prompt's last token on.

    With `prompts`, at every token behind what all chats begin with.
    """
    if not answered:
        return torch.empty(0, engine.sites.neurons_of(layer), device=engine.model.device)
    starts = [behind_beginning(engine, each) if prompts else max(1, len(each[0]) - 1) for each in answered]
    return torch.cat(_read(engine, answered, starts, layer)).float()


def base_keys(engine: TransformersEngine, answered: Sequence[Answered], layer: int) -> Tensor:
    """(n, neurons) at every token of prompts and answers behind what all chats begin with, under the base's weights.

    Remembered, so that each is read once however often it is asked for.
    """
    known: dict[Answered, Tensor] = engine.of_base.setdefault(("keys", layer), {})
    missing = [each for each in dict.fromkeys(answered) if each not in known]
    for start in range(0, len(missing), _ROWS):
        batch = missing[start : start + _ROWS]
        starts = [behind_beginning(engine, each) for each in batch]
        with engine.preview(()):
            read = _read(engine, batch, starts, layer)
        known.update({each: keys.float() for each, keys in zip(batch, read, strict=True)})
    nothing = torch.empty(0, engine.sites.neurons_of(layer), device=engine.model.device)
    return torch.cat([nothing, *(known[each] for each in answered)])


def behind_beginning(engine: TransformersEngine, answered: Answered) -> int:
    """Where a prompt begins to be its own; at 1 at least, since a recording needs a token before."""
    prompt = answered[0]
    return max(1, min(engine.format.beginning_of(prompt), len(prompt) - 1))


def _read(engine: TransformersEngine, answered: Sequence[Answered], starts: Sequence[int], layer: int) -> list[Tensor]:
    """Of each prompt with its answer: (T, neurons) from its start on."""
    rows, prompts = [(*prompt, *answer) for prompt, answer in answered], [len(prompt) for prompt, _ in answered]
    replay = engine.record(rows, starts, neurons=[layer], final=False, prompts=prompts)
    return [replay.neurons[layer][row, :length] for row, length in enumerate(replay.lengths())]
