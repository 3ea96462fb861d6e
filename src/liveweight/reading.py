"""The verbs that read a live model and never write to it.

Owns their spelling on `LiveModel`, what they take from its settings (the folder of what can be computed again), and the
way from a reply to its tokens. Knows nothing of how anything is computed: each verb is a module of `tracing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from liveweight.tracing import SuperWeights, WhyReport, find_super_weights, why

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

    def super_weights(self, progress: Progress | None = None) -> SuperWeights:
        """The few weights that no change may touch; found once a model, then read from the cache."""
        return find_super_weights(self.engine, self.settings.cache_dir, progress)
