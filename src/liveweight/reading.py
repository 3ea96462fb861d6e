"""The verbs that read a live model and never write to it.

Owns their spelling on `LiveModel`, what they take from its settings (the folder of what can be computed again), and the
way from a reply to its tokens. Knows nothing of how anything is computed: each verb is a module of `tracing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from liveweight.engines.base import Message
from liveweight.errors import InvalidInput
from liveweight.tracing import Neuron, SuperWeights, WhyReport, find_super_weights, why
from liveweight.tracing.atlas import Atlas, How, NeuronHits, Side, read_atlas
from liveweight.tracing.clamping import Clamped, clamp, parse_clamps, parse_neuron
from liveweight.tracing.clamping import adjustment as clamping
from liveweight.tracing.neuron_page import TOKENS, NeuronPage, neuron_page
from liveweight.tracing.texts import plain_text

if TYPE_CHECKING:
    from liveweight.adjustments import Adjustment
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

    def atlas(
        self, layers: Sequence[int] | None = None, progress: Progress | None = None, *, fast: bool = False
    ) -> Atlas:
        """The labels of all neurons, or of some layers', to search and compare; made once a model, then on disk.

        `fast` is for large models: see `unembedding.Coarse`.
        """
        return read_atlas(self.engine, layers, cache_dir=self.settings.cache_dir, progress=progress, fast=fast)

    def neurons(
        self,
        find: str,
        *,
        how: How = "text",
        layers: Sequence[int] | None = None,
        sides: Sequence[Side] | None = None,
        top: int = 20,
        progress: Progress | None = None,
    ) -> NeuronHits:
        """The neurons whose vectors decode into a word; see `Atlas.find`. The first search labels the layers."""
        return self.atlas(layers, progress).find(find, how=how, sides=sides, top=top)

    def neuron(
        self, neuron: str | Neuron, text: str | None = None, *, tokens: int = TOKENS, progress: Progress | None = None
    ) -> NeuronPage:
        """One neuron's page: labels, where it is strongest in a text, its neighbours, its clamp curve.

        `neuron` is "20:1114" or (20, 1114); `text` is read for `tokens` tokens, else the text that ships.
        """
        return neuron_page(
            self.engine,
            parse_neuron(neuron) if isinstance(neuron, str) else neuron,
            plain_text() if text is None else text,
            tokens=tokens,
            cache_dir=self.settings.cache_dir,
            progress=progress,
        )

    def clamp(
        self, values: Mapping[Neuron, float] | str, prompt: str, *, raw: bool = False, max_tokens: int = 40
    ) -> Clamped:
        """Answer a prompt with neurons held at values, and without: `live.clamp("20:1114=8", "…")`.

        `values` may also be a mapping from (layer, neuron). `raw` takes the prompt as plain text, without a chat
        template. Nothing stays; keep it with `live.apply(live.clamping(values), prompt=prompt)`.
        """
        held = parse_clamps(values.split()) if isinstance(values, str) else values
        if not prompt.strip():
            raise InvalidInput("The prompt is empty.", hint="Give a question, or some text with raw.")
        tokens = (
            self.engine.format.encode_text(prompt, special=True)
            if raw
            else self.engine.encode([Message("user", prompt)])
        )
        return clamp(
            self.engine, held, tokens, question=prompt, max_tokens=max_tokens, cache_dir=self.settings.cache_dir
        )

    def clamping(self, values: Mapping[Neuron, float] | str, name: str = "") -> Adjustment:
        """Neurons held at values, as an adjustment to apply."""
        return clamping(self.engine, parse_clamps(values.split()) if isinstance(values, str) else values, name)

    def super_weights(self, progress: Progress | None = None) -> SuperWeights:
        """The few weights that no change may touch; found once a model, then read from the cache."""
        return find_super_weights(self.engine, self.settings.cache_dir, progress)
