"""PEFT's LoRA on one case, as somebody who uses PEFT would train it.

Owns the adapter's life: put in, trained on the case's contexts until every token of the target is the likeliest with
the wished probability, taken out again. The base's weights are frozen and untouched throughout.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model

from liveweight.engines.transformers import TransformersEngine
from liveweight.methods import Context

RANK = 8
LAYERS = tuple(range(3, 9))
MODULES = ["q_proj", "v_proj", "up_proj", "down_proj"]
PROBABILITY = 0.9
MOST_STEPS = 60


@dataclass(frozen=True)
class Run:
    """What the training took."""

    seconds: float
    steps: int
    reached: bool


@contextmanager
def trained(engine: TransformersEngine, contexts: Sequence[Context], *, rate: float, seed: int = 0) -> Iterator[Run]:
    """The engine's model with a trained adapter inside the block, without it afterwards."""
    torch.manual_seed(seed)
    begun = time.perf_counter()
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=MODULES, layers_to_transform=list(LAYERS)
    )
    peft_model = get_peft_model(engine.model, config)
    try:
        steps, reached = _train(engine, contexts, rate)
        yield Run(time.perf_counter() - begun, steps, reached)
    finally:
        peft_model.unload()
        engine.model.requires_grad_(False)


def _train(engine: TransformersEngine, contexts: Sequence[Context], rate: float) -> tuple[int, bool]:
    rows = [[*context.prompt, *context.target] for context in contexts]
    longest, pad = max(map(len, rows)), engine.format.pad_token
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    seen = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    places = [(i, len(c.prompt) - 1 + t, token) for i, c in enumerate(contexts) for t, token in enumerate(c.target)]
    row, column, token = (torch.tensor(part) for part in zip(*places, strict=True))
    optimizer = torch.optim.Adam([each for each in engine.model.parameters() if each.requires_grad], lr=rate)
    with torch.enable_grad():
        for step in range(MOST_STEPS + 1):
            hidden = engine.model.base_model(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
            logprobs = engine.unembed(hidden[row, column]).float().log_softmax(-1)  # (answer tokens, vocabulary)
            own = logprobs.gather(1, token[:, None])[:, 0]
            # At 0.9 a token is the likeliest one, too.
            if float(own.detach().exp().min()) >= PROBABILITY:
                return step, True
            if step == MOST_STEPS:
                break
            optimizer.zero_grad()
            (-own.mean()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return MOST_STEPS, False
