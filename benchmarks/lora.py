"""PEFT's LoRA on one case, as somebody who uses PEFT would train it.

Owns the adapter's life around a measurement: put in, trained on the case's contexts until every token of the target is
likely enough, taken out again. The base's weights are frozen and untouched throughout. Training is the method's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from liveweight.engines.transformers import TransformersEngine
from liveweight.methods import Context
from liveweight.methods.lora import adapted, adapter_views, train
from liveweight.settings import MethodSettings

MOST_STEPS = 60


@dataclass(frozen=True)
class Run:
    """What the training took."""

    seconds: float
    steps: int
    reached: bool


@contextmanager
def trained(engine: TransformersEngine, contexts: Sequence[Context], *, rate: float) -> Iterator[Run]:
    """The engine's model with a trained adapter inside the block, without it afterwards."""
    settings = MethodSettings(max_steps=MOST_STEPS)
    begun = time.perf_counter()
    with adapted(engine, adapter_views(engine, settings)):
        steps, least = train(engine, contexts, settings, rate)
        yield Run(time.perf_counter() - begun, steps, least >= settings.target_probability)
