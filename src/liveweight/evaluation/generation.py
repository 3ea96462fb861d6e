"""Greedy answers to many chats at once, for measuring.

Owns cutting many prompts into batches of like length for the engine's own batched decoding. Runs under the weights of
now. Knows nothing of right and wrong. People are answered by `engine.generate`, one token at a time; this is for
benchmarks, where many short answers are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput

_ROWS = 32  # sequences of one batch


def answer_batch(engine: TransformersEngine, questions: Sequence[str], max_tokens: int = 24) -> list[str]:
    """The text of the greedy reply to each question, asked alone in the chat template."""
    prompts = [engine.encode([Message("user", question)]) for question in questions]
    return [engine.format.decode(ids) for ids in generate_batch(engine, prompts, max_tokens)]


def generate_batch(
    engine: TransformersEngine, prompts: Sequence[Sequence[int]], max_tokens: int = 24
) -> list[list[int]]:
    """The greedy continuation of each prompt, at most `max_tokens` ids each, an end token included where one came.

    Prompts of like length share a batch, padded on the left. Batching moves logits in their last bits, so that a tie
    between two tokens may fall otherwise than when each prompt is run alone. Raises InvalidInput for an empty prompt
    or max_tokens below 1.
    """
    if max_tokens < 1:
        raise InvalidInput(f"{max_tokens} tokens cannot be generated.", hint="Give max_tokens=1 or more.")
    empty = next((index for index, prompt in enumerate(prompts) if not prompt), None)
    if empty is not None:
        raise InvalidInput(f"Prompt {empty} has no tokens.", hint="Give every prompt some text.")
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), _ROWS):
        batch = order[start : start + _ROWS]
        found.update(zip(batch, engine.greedy([prompts[index] for index in batch], max_tokens), strict=True))
    return [found[index] for index in range(len(prompts))]
