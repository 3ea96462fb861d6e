"""The verbs that read a live model and never write to it.

Owns their spelling on `LiveModel`, what they take from its settings (the folder of what can be computed again), and the
way from a reply to its tokens. Knows nothing of how anything is computed: each verb is a module of `tracing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from liveweight.engines.base import Message
from liveweight.tracing import (
    Attribution,
    Measure,
    PartKind,
    SuperWeights,
    WhyReport,
    attribute,
    find_super_weights,
    why,
)

if TYPE_CHECKING:
    from liveweight.engines.transformers import TransformersEngine
    from liveweight.judging import Judge
    from liveweight.reports import Reply
    from liveweight.settings import Settings

Progress = Callable[[int, int], None]  # done, of how many


class Reading:
    """What a `LiveModel` can be asked about itself."""

    engine: TransformersEngine
    settings: Settings
    _judge: Judge

    def reply(self, reply: Reply | str | int) -> Reply:
        """A reply of this model by its id."""
        raise NotImplementedError

    def why(self, reply: Reply | str | int, *, against: str | None = None, top: int = 20) -> WhyReport:
        """The neurons that pushed a reply most and those that pushed against it, under the present weights.

        `against` compares with another answer; left out, with each token's runner-up.
        """
        found = self.reply(reply)
        return why(
            self.engine,
            found.prompt,
            self._judge.spoken(found),
            against=against,
            top=top,
            cache_dir=self.settings.cache_dir,
        )

    def attribute(
        self,
        reply: Reply | str | int,
        *,
        by: Measure | None = None,
        sites: PartKind = "mlp",
        against: str | None = None,
        corrupted: str | None = None,
        top: int = 20,
        progress: Progress | None = None,
    ) -> Attribution:
        """What each part of the model did to a reply, at every layer and token, under the present weights.

        `sites` are neurons, mlp, heads or resid; `by` is gradient, direct, relp or patching. `corrupted` is a question
        of as many tokens as the reply's: parts are compared with what they were there, else with zero.
        """
        found = self.reply(reply)
        other = None if corrupted is None else _asking(found.prompt, corrupted)
        return attribute(
            self.engine,
            found.prompt,
            self._judge.spoken(found),
            by=by,
            sites=sites,
            against=against,
            corrupted=other,
            top=top,
            cache_dir=self.settings.cache_dir,
            progress=progress,
        )

    def super_weights(self, progress: Progress | None = None) -> SuperWeights:
        """The few weights that no change may touch; found once a model, then read from the cache."""
        return find_super_weights(self.engine, self.settings.cache_dir, progress)


def _asking(chat: Sequence[Message], question: str) -> tuple[Message, ...]:
    """The same chat with another last question."""
    last = max(place for place, message in enumerate(chat) if message.role == "user")
    return (*chat[:last], Message("user", question), *chat[last + 1 :])
