"""Quantisation of the whole model, and what holding the super weights out of it is worth.

Owns which weights are rounded (the linear weights of the blocks; embeddings, unembedding, norms, biases and routers
only where asked for, or never), the adjustment that says so, and the measurement: perplexity with and without the super
weights, and the super neurons' activations, held out. Source: Yu et al. 2024, "The Super Weight in Large Language
Models" (arXiv:2411.07191); the paper rounds weights in square blocks and clips them at a z-score. The
arithmetic is `adjustments/rounding.py`. Knows nothing of files or of guards.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Group, RenderableType
from rich.text import Text

from liveweight.adjustments import Active, Adjustment, Op, Quantize, RoundActivations
from liveweight.adjustments.rounding import Clip
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.shown import Shown, table
from liveweight.sites import ModelSites
from liveweight.tracing.plain_text import counted, perplexity, windows_of
from liveweight.tracing.super_weights import SuperWeights, find_super_weights

_LINEAR = re.compile(r"layers\.\d+\.(attn\.[qkvo]|mlp\.(experts\.\d+\.)?(gate|up|down))\.weight")
_STORED = 32  # bits that a block takes beside its values: least value and step, 16 each
Progress = Callable[[int, int], None]  # done, of how many


class Scheme(NamedTuple):
    """How weights are rounded. `block` is its rows and columns; `clip` and `clip_at` as in the op `Quantize`.

    `activations` are the bits of the inputs of `down` and `o`, rounded while the model runs; None leaves them alone.
    """

    bits: int = 4
    block: tuple[int, int] = (64, 64)
    clip: Clip = "none"
    clip_at: float = 0.0
    activations: int | None = None
    embeddings: bool = False

    def __str__(self) -> str:
        held = {"none": "", "z": f", clipped at {self.clip_at:g} deviations"}.get(
            self.clip, f", clipped to the middle {self.clip_at:g} %"
        )
        more = "" if self.activations is None else f", activations {self.activations} bits"
        return f"{self.bits} bits in blocks of {self.block[0]}x{self.block[1]}{held}{more}"


class QuantizedRow(BaseModel):
    """What one way of quantising leaves of the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    super_weights_kept: bool
    super_activations_kept: bool
    perplexity: float
    ratio: float  # of the perplexity to that of the model as it is


class Quantization(BaseModel, Shown):
    """A quantisation of the model as it is, not yet applied, with what it costs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    version: str
    scheme: str
    bits: int
    block: tuple[int, int]
    clip: Clip
    clip_at: float
    activations: int | None
    embeddings: bool
    matrices: int
    weights: int  # entries that are rounded
    share: float  # of the model's parameters
    bits_per_weight: float  # of what is rounded, with what each block has to store
    super_weights: tuple[tuple[str, int, int], ...]  # (site, row, column) of every confirmed one
    tokens: int
    perplexity: float  # of the model as it is
    rows: tuple[QuantizedRow, ...]
    adjustment: Adjustment = Field(exclude=True, repr=False)  # what was asked for, to be applied or written
    adjustment_keeps: bool  # whether it holds the super weights out

    def __rich__(self) -> RenderableType:
        """Perplexity with and without what is held out."""
        shown = table("super weights", *(["super activations"] if self.activations else []), "perplexity>", "times>")
        for row in self.rows:
            held = ["held out" if row.super_weights_kept else "rounded"]
            if self.activations:
                held.append("held out" if row.super_activations_kept else "rounded")
            shown.add_row(*held, f"{row.perplexity:,.2f}", f"{row.ratio:,.3f}")
        where = "blocks' linear weights" + (" and embeddings" if self.embeddings else "; embeddings and head are left")
        told = f"{self.matrices} matrices, {self.share:.1%} of the parameters ({where})"
        names = ", ".join(f"{site} [{row}, {column}]" for site, row, column in self.super_weights) or "none"
        return Group(
            Text(self.scheme, "bold"),
            Text(f"{told}; {self.bits_per_weight:.2f} bits a weight"),
            Text(f"super weights: {names}"),
            Text(f"perplexity as it is {self.perplexity:,.2f}, over {self.tokens:,} tokens of plain text"),
            Text(),
            shown,
        )


def linear_sites(sites: ModelSites, *, embeddings: bool = False) -> tuple[str, ...]:
    """The matrices that are quantised: every linear weight of the blocks, experts' too, and with `embeddings` those.

    Routers, norms, biases, position embeddings and spare neurons never are.
    """
    found = tuple(site for site in sites.weight_names() if _LINEAR.fullmatch(site))
    ends = ("embed.weight",) if sites.tied else ("embed.weight", "lm_head.weight")
    return found + ends if embeddings else found


def quantized(
    engine: TransformersEngine, scheme: Scheme, super_weights: SuperWeights | None, *, activations_too: bool = True
) -> Adjustment:
    """The adjustment that quantises the model by `scheme`.

    The confirmed `super_weights` are held out, and with `activations_too` their neurons' activations where activations
    are rounded; None holds nothing out. Raises InvalidInput for bits, blocks or bounds that make no sense.
    """
    sites = linear_sites(engine.sites, embeddings=scheme.embeddings)
    held = () if super_weights is None else super_weights.confirmed
    keep = tuple((weight.site, weight.row, weight.column) for weight in held)
    ops: list[Op] = [
        Quantize(sites=sites, bits=scheme.bits, block=scheme.block, clip=scheme.clip, clip_at=scheme.clip_at, keep=keep)
    ]
    if scheme.activations is not None:
        ops += _activation_ops(engine.sites, scheme.activations, super_weights if activations_too else None)
    return Adjustment(
        name=f"{scheme.bits} bits, blocks of {scheme.block[0]}x{scheme.block[1]}",
        method="quantize",
        ops=tuple(ops),
        note=f"{scheme}; {len(keep)} super weights held out.",
    )


def _activation_ops(sites: ModelSites, bits: int, super_weights: SuperWeights | None) -> list[Op]:
    neurons = frozenset() if super_weights is None else super_weights.neurons
    ops: list[Op] = []
    for layer in range(sites.layers):
        ops.append(RoundActivations(site=f"layers.{layer}.attn.heads", bits=bits))
        if not sites.experts_of(layer):  # their neurons are spread over experts
            keep = tuple(sorted(neuron for place, neuron in neurons if place == layer))
            ops.append(RoundActivations(site=f"layers.{layer}.mlp.neurons", bits=bits, keep=keep))
    return ops


def quantization(
    engine: TransformersEngine,
    scheme: Scheme,
    *,
    keep_super_weights: bool = False,
    keep_super_activations: bool = False,
    text: str | None = None,
    tokens: int = 1280,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Quantization:
    """Quantise on top of the present state and measure, with the super weights held out and without.

    `text` is what perplexity is measured on, its first `tokens` tokens; None is the text that ships. Where the model
    has no super weight there is nothing to hold out and one row. `adjustment` is what `keep_super_weights` and
    `keep_super_activations` ask for. The state is as before afterwards. Raises InvalidInput, and as
    `find_super_weights` does.
    """
    quantized(engine, scheme, None)  # numbers that make no sense are refused before anything long begins
    windows = windows_of(engine, text, tokens=tokens)
    found = find_super_weights(engine, cache_dir)
    ways = [(False, False), (True, False)] if found.confirmed else [(False, False)]
    if scheme.activations is not None and found.confirmed:
        ways.append((True, True))
    chosen = (keep_super_weights, keep_super_weights and keep_super_activations)
    steps = len(ways) + 1
    before = perplexity(engine, windows)
    rows = []
    for number, (weights, activations) in enumerate(ways):
        if progress is not None:
            progress(number + 1, steps)
        made = quantized(engine, scheme, found if weights else None, activations_too=activations)
        after = perplexity(engine, windows, (*engine.state, Active(made)))
        rows.append(
            QuantizedRow(
                super_weights_kept=weights,
                super_activations_kept=activations,
                perplexity=after,
                ratio=after / before,
            )
        )
    if progress is not None:
        progress(steps, steps)
    sites = linear_sites(engine.sites, embeddings=scheme.embeddings)
    shapes = [engine.sites.weight(site).shape for site in sites]
    entries = sum(rows * columns for rows, columns in shapes)
    blocks = sum(-(-rows // scheme.block[0]) * -(-columns // scheme.block[1]) for rows, columns in shapes)
    return Quantization(
        model=engine.info.name,
        version=str(engine.version),
        scheme=str(scheme),
        bits=scheme.bits,
        block=scheme.block,
        clip=scheme.clip,
        clip_at=scheme.clip_at,
        activations=scheme.activations,
        embeddings=scheme.embeddings,
        matrices=len(sites),
        weights=entries,
        share=entries / engine.info.parameters,
        bits_per_weight=scheme.bits + _STORED * blocks / entries,
        super_weights=tuple((weight.site, weight.row, weight.column) for weight in found.confirmed),
        tokens=counted(windows),
        perplexity=before,
        rows=tuple(rows),
        adjustment=quantized(engine, scheme, found if chosen[0] else None, activations_too=chosen[1]),
        adjustment_keeps=chosen[0] and bool(found.confirmed),
    )


def block_of(text: str) -> tuple[int, int]:
    """A block's rows and columns from "64" (a square) or "1x64". Raises InvalidInput."""
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InvalidInput(f"{text!r} is no block size.", hint="Give 64 for a square, or rows x columns: 1x64.")
    return int(parts[0]), int(parts[-1])
