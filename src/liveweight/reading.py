"""The verbs that read a live model and never write to it.

Owns their spelling on `LiveModel`, what they take from its settings (the folder of what can be computed again), and the
way from a reply to its tokens. Knows nothing of how anything is computed: each verb is a module of `tracing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from liveweight.adjustments import Active
from liveweight.adjustments.rounding import Clip
from liveweight.engines.base import Message
from liveweight.engines.export import export
from liveweight.errors import InvalidInput
from liveweight.tracing import (
    Attribution,
    Feature,
    Features,
    Measure,
    ModelDiff,
    Neuron,
    PartKind,
    SuperWeights,
    WhyReport,
    attribute,
    diff,
    find_features,
    find_super_weights,
    labelled,
    last_features,
    why,
)
from liveweight.tracing.atlas import Atlas, How, NeuronHits, Side, read_atlas
from liveweight.tracing.clamping import Clamped, clamp, parse_clamps, parse_neuron
from liveweight.tracing.clamping import adjustment as clamping
from liveweight.tracing.massive import Massive, massive
from liveweight.tracing.neuron_page import TOKENS, NeuronPage, neuron_page
from liveweight.tracing.plain_text import plain_text
from liveweight.tracing.quantization import Quantization, Scheme, block_of, quantization
from liveweight.tracing.sparsity import Sparsity, sparsity
from liveweight.tracing.super_report import Progress as NamedProgress
from liveweight.tracing.super_report import SuperWeightReport, super_weight_report
from liveweight.tracing.zero_shot import read_tasks

if TYPE_CHECKING:
    from liveweight.adjustments import Adjustment
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

    def super_weight_report(
        self,
        *,
        number: int = 0,
        data: Path | None = None,
        samples: int = 100,
        text: str | None = None,
        tokens: int = 1280,
        progress: NamedProgress | None = None,
    ) -> SuperWeightReport:
        """One confirmed super weight's story, the most damaging being 0: its spike, and the model without it.

        `data` is a folder with `mmlu.json`, `sst2.json` or `cola.json`, of each of which `samples` are asked; left out,
        no accuracy is measured. Always of the base. Raises Unsupported where none is confirmed.
        """
        return super_weight_report(
            self.engine,
            number=number,
            tasks=() if data is None else read_tasks(data, samples),
            text=text,
            tokens=tokens,
            cache_dir=self.settings.cache_dir,
            progress=progress,
        )

    def massive(
        self, text: str, *, chat: bool = False, tokens: int = 1280, progress: Progress | None = None
    ) -> Massive:
        """Which activations are thousands of times larger than the others on a text (or question), and where."""
        return massive(self.engine, text, chat=chat, tokens=tokens, progress=progress)

    def sparsity(
        self,
        text: str | None = None,
        *,
        percent: float = 1.0,
        tokens: int = 512,
        layers: bool = True,
        progress: Progress | None = None,
    ) -> Sparsity:
        """The share of neurons' activations that can be zero until perplexity rises by `percent`, on a text."""
        return sparsity(self.engine, text, percent=percent, tokens=tokens, layers=layers, progress=progress)

    def quantization(
        self,
        bits: int = 4,
        block: str | int | tuple[int, int] = 64,
        *,
        clip: Clip = "none",
        clip_at: float = 0.0,
        activations: int | None = None,
        embeddings: bool = False,
        keep_super_weights: bool = False,
        keep_super_activations: bool = False,
        text: str | None = None,
        tokens: int = 1280,
        progress: Progress | None = None,
    ) -> Quantization:
        """What rounding the blocks' linear weights to so many bits costs, super weights held out and not.

        `block` is 64 for squares or "1x64" for rows x columns; see `tracing.quantization`. Nothing is changed:
        `live.apply(found.adjustment, force=True)` keeps it, `live.export(folder, found.adjustment)` writes it.
        """
        size = block if isinstance(block, tuple) else block_of(str(block))
        return quantization(
            self.engine,
            Scheme(bits, size, clip, clip_at, activations, embeddings),
            keep_super_weights=keep_super_weights,
            keep_super_activations=keep_super_activations,
            text=text,
            tokens=tokens,
            cache_dir=self.settings.cache_dir,
            progress=progress,
        )

    def export(self, folder: Path | str, adjustment: Adjustment | None = None) -> Path:
        """Write the model as it is now, with `adjustment` on top if given, as a folder that transformers loads.

        Raises InvalidInput where the folder holds something, Unsupported for what no checkpoint can say.
        """
        more = () if adjustment is None else (Active(adjustment),)
        return export(self.engine, folder, (*self.engine.state, *more))

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


def _asking(chat: Sequence[Message], question: str) -> tuple[Message, ...]:
    """The same chat with another last question."""
    last = max(place for place, message in enumerate(chat) if message.role == "user")
    return (*chat[:last], Message("user", question), *chat[last + 1 :])
