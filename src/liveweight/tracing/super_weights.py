"""Super weights: the few single numbers without which a model babbles.

Owns finding them (one forward pass on one prompt, then each candidate zeroed and perplexity measured on the plain
English that ships with the package) and remembering them by the model's hash. Always of the base, whatever is active.
Source: Yu et al. 2024, "The Super Weight in Large Language Models" (arXiv:2411.07191): where a layer's down projection
has an input and an output that both spike at the same token, the weight between the two is one. Coordinates published
there ship as `known_super_weights.json` and are candidates too; every candidate is measured. What an adjustment does to
a super weight is `protection.py`'s to say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import RenderableType

from liveweight.adjustments import Active, Adjustment, Entries, State
from liveweight.engines.base import ScoreItem
from liveweight.engines.fingerprints import write_atomically
from liveweight.engines.transformers import TransformersEngine
from liveweight.shown import Shown, table
from liveweight.sites import Region
from liveweight.tracing.capture import Neuron
from liveweight.tracing.label_cache import cannot_keep
from liveweight.tracing.plain_text import loss, packaged, window_length, windows_of

FORMAT = 2  # of the file on disk; raised when a measure would come out otherwise than before
PROMPT = "The river was calm, and the boats lay still."
INPUT_SPIKE = 1000.0  # times the median |value| of the layer's down input
OUTPUT_SPIKE = 300.0  # times the median |value| of its output
PROMINENT = 0.2  # of the layer's largest output, at least: what a super neuron writes elsewhere is beside the point
EXPLAINED = 0.5  # of the output's spike, at least, must come from this one weight
MOST = 16  # candidates that are measured, the strongest first
CONFIRMED = 1.25  # times the perplexity, at least, once the weight is zero
_HINTED = 1.2  # on the first window alone: below it the rest is not measured
_WINDOWS = 5  # of plain text

Progress = Callable[[int, int], None]  # done, of how many


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SuperWeight(_Value):
    """One entry of a layer's down weight, (out, in), and what the model is worth without it."""

    layer: int
    row: int  # the dimension of the residual stream that it writes to
    column: int  # the neuron that it belongs to
    value: float
    activation: float  # of its neuron, where that spikes on the prompt
    output: float  # what the layer writes to the row there
    perplexity_zeroed: float  # over `tokens_measured` tokens
    perplexity: float  # of the base, over the same tokens
    tokens_measured: int
    confirmed: bool
    known: str = ""  # the model under which these coordinates were published

    @property
    def site(self) -> str:
        """The weight that it is an entry of."""
        return f"layers.{self.layer}.mlp.down.weight"


class SuperWeights(_Value, Shown):
    """What was found in one model. Unconfirmed candidates are in `weights` too."""

    model_hash: str
    prompt: str
    weights: tuple[SuperWeight, ...]  # the most damaging first
    skipped_layers: tuple[int, ...] = ()  # layers with experts, which are not searched

    @property
    def confirmed(self) -> tuple[SuperWeight, ...]:
        """Those whose loss the model does not stand."""
        return tuple(weight for weight in self.weights if weight.confirmed)

    @property
    def neurons(self) -> frozenset[Neuron]:
        """The super neurons: the (layer, neuron) of every confirmed one."""
        return frozenset((weight.layer, weight.column) for weight in self.confirmed)

    def __rich__(self) -> RenderableType:
        """Every candidate and what the perplexity becomes without it."""
        shown = table("weight", "value>", "activation>", "perplexity>", "without it>", "")
        for weight in self.weights:
            shown.add_row(
                f"{weight.site} \\[{weight.row}, {weight.column}]",
                f"{weight.value:.3f}",
                f"{weight.activation:.0f}",
                f"{weight.perplexity:.1f}",
                f"{weight.perplexity_zeroed:,.0f}",
                "protected" if weight.confirmed else "harmless",
            )
        return shown if self.weights else "No super weights were found."


class Candidate(NamedTuple):
    """A weight whose input and output spike together, not yet measured."""

    layer: int
    row: int
    column: int
    value: float
    activation: float
    output: float
    known: str = ""


class Known(NamedTuple):
    """Published coordinates."""

    model: str
    layer: int
    row: int
    column: int


def super_neurons(engine: TransformersEngine, cache_dir: Path | None = None) -> frozenset[Neuron]:
    """The (layer, neuron) pairs that every ranking leaves out; found at the first call, then read from disk."""
    return find_super_weights(engine, cache_dir).neurons


def find_super_weights(
    engine: TransformersEngine, cache_dir: Path | None = None, progress: Progress | None = None
) -> SuperWeights:
    """The super weights of the engine's base model.

    Costs one forward pass and, for each candidate, one pass over 256 to 1,280 tokens of plain text; a second call with
    the same model reads the answer from `cache_dir` (None: the model's own cache). The engine's state is as before
    afterwards, and no other step sees a zeroed weight. Raises NoSpace or LiveweightError where `cache_dir` cannot be
    written.
    """
    file = (cache_dir or engine.loaded.source.cache_dir) / "super_weights" / f"{engine.info.hash}-{FORMAT}.json"
    found = _remembered(file)
    if found is None:
        found = _measure_all(engine, progress)
        try:
            write_atomically(file, found.model_dump_json(indent=1))
        except OSError as error:
            raise cannot_keep(file, error) from error
    return found


def _remembered(file: Path) -> SuperWeights | None:
    """What was found before; None where it was not, or where the file cannot be read and is to be written again."""
    try:
        return SuperWeights.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None


def known_super_weights(name: str) -> tuple[Known, ...]:
    """Published coordinates for a model whose name or source holds that of the published one."""
    table = json.loads(packaged("tracing", "known_super_weights.json"))
    squeezed = _squeezed(name)
    return tuple(Known(**entry) for entry in table["weights"] if _squeezed(entry["model"]) in squeezed)


def candidates(engine: TransformersEngine) -> list[Candidate]:
    """Weights between a spike in a layer's down input and one in its output at the same token, strongest first.

    One forward pass of the base on PROMPT. A spike is INPUT_SPIKE (OUTPUT_SPIKE) times the median of its layer, the
    output's also PROMINENT times the largest, and the weight must explain at least the share EXPLAINED of it.
    """
    layers = [layer for layer in range(engine.sites.layers) if not engine.sites.experts_of(layer)]
    ids = engine.format.encode_text(PROMPT, special=True)
    found: list[tuple[float, Candidate]] = []
    with engine.preview(()), engine.activations.prompt(len(ids)):
        trace = engine.trace(ids, [f"layers.{layer}.mlp.neurons" for layer in layers])
        for layer in layers:
            site = f"layers.{layer}.mlp.down.weight"
            down = engine.weights.base(site).float().cpu()
            read = trace.values[f"layers.{layer}.mlp.neurons"]  # (T, neurons)
            written = read @ down.T  # (T, width)
            input_floor = INPUT_SPIKE * float(read.abs().median())
            largest = float(written.abs().max())
            output_floor = max(OUTPUT_SPIKE * float(written.abs().median()), PROMINENT * largest)
            for token, row in (written.abs() > output_floor).nonzero().tolist():
                for column in (read[token].abs() > input_floor).nonzero()[:, 0].tolist():
                    value, spike, output = float(down[row, column]), float(read[token, column]), written[token, row]
                    if value * spike / float(output) >= EXPLAINED:
                        candidate = Candidate(layer, row, column, value, spike, float(output))
                        found.append((abs(float(output)), candidate))
    found.sort(key=lambda pair: -pair[0])
    strongest: dict[tuple[int, int, int], Candidate] = {}
    for _, candidate in found:  # one weight may spike at several tokens
        strongest.setdefault(candidate[:3], candidate)
    return list(strongest.values())[:MOST]


# ------------------------------------------------------------------------------------------------------ measuring


def _measure_all(engine: TransformersEngine, progress: Progress | None) -> SuperWeights:
    found = candidates(engine)
    found = _published(engine, found) + found
    skipped = tuple(layer for layer in range(engine.sites.layers) if engine.sites.experts_of(layer))
    windows = windows_of(engine, tokens=_WINDOWS * window_length(engine)) if found else []
    base: list[float] = []  # the base's negative log-likelihood of each window
    weights: list[SuperWeight] = []
    for number, candidate in enumerate(found):
        if progress is not None:
            progress(number, len(found))
        weights.append(_measured(engine, candidate, windows, base))
    if progress is not None:
        progress(len(found), len(found))
    weights.sort(key=lambda weight: -weight.perplexity_zeroed / weight.perplexity)
    return SuperWeights(model_hash=engine.info.hash, prompt=PROMPT, weights=tuple(weights), skipped_layers=skipped)


def _measured(
    engine: TransformersEngine, candidate: Candidate, windows: list[ScoreItem], base: list[float]
) -> SuperWeight:
    """Zero one weight and read the windows, the rest of them only where the first one suffers."""
    zeroed: State = (
        Active(
            Adjustment(
                name=f"zero {candidate.layer} [{candidate.row}, {candidate.column}]",
                method="super weights",
                ops=(
                    Entries(
                        site=f"layers.{candidate.layer}.mlp.down.weight",
                        indices=torch.tensor([[candidate.row, candidate.column]]),
                        values=torch.zeros(1),
                    ),
                ),
            )
        ),
    )
    losses: list[float] = []
    tokens = 0
    for number, window in enumerate(windows):
        if len(base) <= number:
            base.append(loss(engine, window, ()))
        losses.append(loss(engine, window, zeroed))
        tokens += len(window.continuation)
        if number == 0 and losses[0] - base[0] < math.log(_HINTED) * tokens:
            break
    before = math.exp(sum(base[: len(losses)]) / tokens)
    after = math.exp(sum(losses) / tokens)
    return SuperWeight(
        layer=candidate.layer,
        row=candidate.row,
        column=candidate.column,
        value=candidate.value,
        activation=candidate.activation,
        output=candidate.output,
        perplexity_zeroed=after,
        perplexity=before,
        tokens_measured=tokens,
        confirmed=after >= CONFIRMED * before,
        known=candidate.known,
    )


def _published(engine: TransformersEngine, found: list[Candidate]) -> list[Candidate]:
    """The published coordinates for this model that are not among `found` and lie in it."""
    there = {candidate[:3] for candidate in found}
    extra = []
    for known in dict.fromkeys(known_super_weights(f"{engine.info.source} {engine.info.name}")):
        inside = known.layer < engine.sites.layers and not engine.sites.experts_of(known.layer)
        if not inside or (known.layer, known.row, known.column) in there:
            continue
        site = f"layers.{known.layer}.mlp.down.weight"
        width, neurons = engine.sites.weight(site).shape
        if known.row >= width or known.column >= neurons:
            continue  # another model under a like name
        entry = Region("entries", torch.tensor([known.row * neurons + known.column]))
        with engine.gate.step():
            value = float(engine.weights.base(site, entry)[0])
        extra.append(Candidate(known.layer, known.row, known.column, value, 0.0, 0.0, known.model))
    return extra


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
