"""Greedy answers to many chats at once, for measuring.

Owns one left-padded batch whose shared beginning (the system prompt) is read once. Runs under the weights of now and
holds the model meanwhile, so that no change comes in between. Knows nothing of right and wrong. People are answered by
`engine.generate`; this is for benchmarks, where many short answers are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from liveweight.engines.base import Message, Sampling
from liveweight.engines.replay import full_cache, unembed
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

    Prompts of like length share a batch. Batching moves logits in their last bits, so that a tie between two tokens
    may fall otherwise than when each prompt is run alone. Where activation ops are active, prompts are run one by one:
    those ops count positions from a row's own start. Raises InvalidInput for an empty prompt or max_tokens below 1.
    """
    if max_tokens < 1:
        raise InvalidInput(f"{max_tokens} tokens cannot be generated.", hint="Give max_tokens=1 or more.")
    empty = next((index for index, prompt in enumerate(prompts) if not prompt), None)
    if empty is not None:
        raise InvalidInput(f"Prompt {empty} has no tokens.", hint="Give every prompt some text.")
    if engine.activations.hooks:
        return [[token.id for token in engine.continue_from(p, Sampling(max_tokens=max_tokens))] for p in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), _ROWS):
        batch = order[start : start + _ROWS]
        found.update(zip(batch, _greedy(engine, [list(prompts[index]) for index in batch], max_tokens), strict=True))
    return [found[index] for index in range(len(prompts))]


def _greedy(engine: TransformersEngine, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    model, count = engine.model, len(prompts)
    ends = torch.tensor(sorted(engine.format.end_tokens))
    device = next(model.parameters()).device
    shared = 0
    while shared < min(map(len, prompts)) - 1 and len({prompt[shared] for prompt in prompts}) == 1:
        shared += 1
    own = [prompt[shared:] for prompt in prompts]
    widest = max(map(len, own))
    ids = torch.tensor([[engine.format.pad_token] * (widest - len(row)) + row for row in own], device=device)
    seen = torch.tensor([[1] * shared + [0] * (widest - len(row)) + [1] * len(row) for row in own], device=device)
    positions = (seen.cumsum(1) - 1)[:, shared:].clamp(min=0)
    chosen: list[torch.Tensor] = []
    with engine.gate.step(), torch.inference_mode():
        cache = full_cache(model)
        if shared:
            model.base_model(input_ids=torch.tensor([prompts[0][:shared]], device=device), past_key_values=cache)
            cache.batch_repeat_interleave(count)
        done = torch.zeros(count, dtype=torch.bool)
        for _ in range(max_tokens):
            hidden = model.base_model(
                input_ids=ids, past_key_values=cache, attention_mask=seen, position_ids=positions
            ).last_hidden_state[:, -1]  # (B, width)
            ids = unembed(model, engine.sites, hidden).argmax(-1, keepdim=True)  # (B, 1)
            chosen.append(ids.cpu())
            done |= torch.isin(chosen[-1][:, 0], ends)
            if bool(done.all()):
                break
            seen = torch.cat((seen, seen.new_ones(count, 1)), dim=1)
            positions = positions[:, -1:] + 1
    return [_through_end(row, engine.format.end_tokens) for row in torch.cat(chosen, dim=1).tolist()]


def _through_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    last = next((index for index, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: last + 1]
