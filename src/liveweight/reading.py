"""The verbs that read a live model and never write to it.

Owns their spelling on `LiveModel`, what they take from its settings (the folder of what can be computed again), and the
way from a reply to its tokens. Knows nothing of how anything is computed: each verb is a module of `tracing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from liveweight.errors import InvalidInput
from liveweight.tracing import (
    Feature,
    Features,
    ModelDiff,
    SuperWeights,
    WhyReport,
    diff,
    find_features,
    find_super_weights,
    labelled,
    last_features,
    why,
)

if TYPE_CHECKING:
    from liveweight.engines.transformers import TransformersEngine
    from liveweight.judging import Judge
    from liveweight.reports import Reply
    from liveweight.settings import Settings

Progress = Callable[[int, int], None]  # done, of how many
Phases = Callable[[str, int, int], None]  # what, done, of how many


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

    def features(
        self,
        *,
        layer: int | None = None,
        k: int = 100,
        share: float = 0.02,
        text: str | None = None,
        text_name: str | None = None,
        tokens: int = 8192,
        rounds: int = 200,
        seed: int = 0,
        progress: Phases | None = None,
    ) -> Features:
        """Groups of neurons of a layer that fire together on a text, with what they fire on and what they write.

        See `tracing.find_features`. Made once for the same weights and settings, then read from the cache.
        """
        return find_features(
            self.engine,
            layer=layer,
            k=k,
            share=share,
            text=text,
            text_name=text_name,
            tokens=tokens,
            rounds=rounds,
            seed=seed,
            cache_dir=self.settings.cache_dir,
            progress=progress,
        )

    def last_features(self) -> Features:
        """The features that were made or asked for last. Raises InvalidInput where there are none yet."""
        found = last_features(self.engine, self.settings.cache_dir)
        if found is None:
            raise InvalidInput(
                "There are no features of this model at its present weights yet.",
                hint="Make them: liveweight features.",
            )
        return found

    def feature(self, number: int, features: Features | None = None) -> Feature:
        """One feature with labels at its neurons, of those given or of the last ones. Raises InvalidInput."""
        found = (features or self.last_features())[number]
        return labelled(self.engine, found, self.settings.cache_dir)

    def diff(self, other: str, *, rank: int = 8, labels: bool = True, progress: Phases | None = None) -> ModelDiff:
        """What another checkpoint of this architecture has otherwise than this model's base; see `tracing.diff`."""
        return diff(self.engine, other, rank=rank, labels=labels, settings=self.settings, progress=progress)
