"""What a change may cost, and what it did cost.

Owns the report and the verdict. Knows nothing of how the figures were measured.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, computed_field

from liveweight.settings import GuardSettings


class ChangedAnswer(BaseModel):
    """A probe or protected answer whose greedy answer is another one now."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    text: str
    before: str
    after: str


class GuardReport(BaseModel):
    """What a change moves besides what it is meant to move.

    KL is in nats a token, over the base model's own greedy continuations; `mean_kl` and its fellows are what this
    change adds to the changes that were active already, `total_mean_kl` is the drift of all of them from the base.
    """

    model_config = ConfigDict(frozen=True)  # what is derived is written too, and not read
    items: int
    tokens: int
    mean_kl: float
    p95_kl: float
    worst_kl: float
    worst_text: str
    total_mean_kl: float
    changed: tuple[ChangedAnswer, ...]
    changed_share: float
    perplexity_ratio: float
    protected: int
    protected_changed: tuple[ChangedAnswer, ...]
    seconds: float
    budget: dict[str, float]
    reasons: tuple[str, ...]
    too_far: tuple[str, ...] = ()  # the items that are over the limit of a single one

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether the change stays within every budget."""
        return not self.reasons

    @property
    def on_the_whole(self) -> bool:
        """Whether it does but for single items: those that are moved too far, and protected answers."""
        return len(self.reasons) == bool(self.too_far) + bool(self.protected_changed)


def budget_of(settings: GuardSettings, facts: int = 1) -> dict[str, float]:
    """The limits, by the name of the figure that they limit.

    A change that brings n facts at once may move √n times as much as one that brings one: less than n changes one after
    another might, more than one alone. What may happen to a single item stays.
    """
    times = math.sqrt(max(facts, 1))
    return {
        "mean_kl": times * settings.max_mean_kl,
        "p95_kl": times * settings.max_p95_kl,
        "worst_kl": settings.max_worst_kl,
        "changed_share": min(1.0, times * settings.max_changed_answers),
        "perplexity_ratio": settings.max_perplexity_ratio**times,
    }


def over_budget(figures: dict[str, float], budget: dict[str, float], protected_changed: int) -> tuple[str, ...]:
    """A sentence for each limit that is passed."""
    words = {
        "mean_kl": "the mean KL",
        "p95_kl": "the 95th percentile of the KL",
        "worst_kl": "the worst KL of one item",
        "changed_share": "the share of changed answers",
        "perplexity_ratio": "the perplexity ratio",
    }
    reasons = [
        f"{words[name]} would be {figures[name]:.4g}, over the limit of {limit:.4g}"
        for name, limit in budget.items()
        if not figures[name] <= limit  # what is no number passes no limit
    ]
    if protected_changed:
        answers = "1 protected answer" if protected_changed == 1 else f"{protected_changed} protected answers"
        reasons.append(f"{answers} would change")
    return tuple(reasons)
