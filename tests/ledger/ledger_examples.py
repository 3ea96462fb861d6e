"""Small values to put into a ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from liveweight.adjustments import Adjustment, LowRank, ScaleNeurons
from liveweight.ledger import Change, Key, Ledger, Proposal, Reply

MODEL = "a" * 64
OTHER = "b" * 64
QUESTION = ({"role": "user", "content": "What is the capital of Vietnam?"},)


@dataclass(frozen=True)
class Place:
    """A workspace and the URL of its ledger; None for the SQLite file in the workspace."""

    workspace: Path
    url: str | None

    def open(self, *, read_only: bool = False) -> Ledger:
        return Ledger.open(self.workspace, self.url, read_only=read_only)


def adjustment(seed: int = 0, width: int = 8) -> Adjustment:
    """Two ops with seeded numbers."""
    generator = torch.Generator().manual_seed(seed)
    return Adjustment(
        name=f"fix {seed}",
        method="rome",
        ops=(
            LowRank(
                site="layers.1.mlp.down.weight",
                left=torch.randn(width, 1, generator=generator),
                right=torch.randn(1, width, generator=generator),
            ),
            ScaleNeurons(layer=0, neurons=(1, 2), factors=torch.rand(2, generator=generator)),
        ),
    )


def proposal(
    seed: int = 0,
    *,
    model: str = MODEL,
    prompt: str = "",
    key: Key | None = None,
    wanted: str | None = "Hanoi",
    feedback: int | None = None,
    strength: float = 1.0,
    report: Mapping[str, Any] | None = None,
) -> Proposal:
    return Proposal(
        model=model,
        adjustment=adjustment(seed),
        question="What is the capital of Vietnam?",
        prompt_hash=prompt or f"{seed:064x}",
        report={"before": "Hoi An", "after": "Hanoi", "kl": 0.01} if report is None else report,
        wanted=wanted,
        feedback=feedback,
        key=key,
        strength=strength,
    )


def commit(ledger: Ledger, seed: int = 0, **given: Any) -> Change:
    """A change that is active."""
    return ledger.activate(ledger.intend(proposal(seed, **given)).id)


def move(ledger: Ledger, change: int, to: Any = None, strength: float | None = None) -> None:
    """A change moved and confirmed."""
    ledger.finish(ledger.intend_move(change, to, strength=strength).id)


def say(ledger: Ledger, text: str = "Hoi An", model: str = MODEL) -> Reply:
    return ledger.add_reply(
        model,
        QUESTION,
        text,
        token_ids=(5, 6),
        prompt_token_ids=(1, 2, 3),
        version_number=4,
        version_hash="c" * 64,
        sampling={"temperature": 0.0},
    )
