"""How many neurons a token really needs: the share that can be set to zero before perplexity rises.

Owns PPL-p % sparsity: activations of the MLPs' neurons are set to zero by magnitude, a token at a time, and the largest
share is found by bisection whose perplexity is at most (1 + p/100) times that of the model as it is. For each layer
alone, and for all layers at once by three rules:

    relative   |a| < τ · median |a| of the layer over the text: one τ for all layers
    threshold  |a| < t: one t for all layers
    top-k      all but each token's k largest: one k for all layers

Source of the measure: Luo et al. 2024, "Sparsing Law: Towards Large Language Models with Greater Activation Sparsity"
(arXiv:2411.02335), who choose each layer's threshold by the error that it makes; the last two rules are their
baselines. Works under whatever is active; the hooks are gone afterwards. Knows nothing of speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor

from liveweight.engines.base import ScoreItem
from liveweight.engines.replay import packed_paths, packed_prompts, run_whole
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.shown import Shown, table
from liveweight.tracing.capture import require_dense
from liveweight.tracing.plain_text import counted, windows_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Rule = Literal["relative", "threshold", "top-k"]
Cut = Callable[[Tensor], Tensor]  # activations (…, neurons) -> which of them stay, of the same shape
Progress = Callable[[int, int], None]  # done, of how many

RULES: tuple[Rule, ...] = ("relative", "threshold", "top-k")
_STEPS = 7  # of a bisection: a share to within 1/128
_GRID = 2**_STEPS
_POSITIONS = 64  # positions whose logits are looked at together


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerSparsity(_Value):
    """One layer's share of activations that can be zero."""

    layer: int
    alone: float  # every other layer as it is
    threshold: float  # |a| below this is zero then
    ratio: float  # of the perplexity, there


class Tried(_Value):
    """One trial of a rule on all layers."""

    value: float  # τ, t or k
    share: float  # of all activations that are zero
    ratio: float  # of the perplexity to that of the model as it is


class RuleSparsity(_Value):
    """What one rule on all layers at once reaches."""

    rule: Rule
    found: Tried  # the largest share within the limit; nothing zero where none is
    by_layer: tuple[float, ...]  # that trial's share in each layer
    tried: tuple[Tried, ...]  # all trials, by share


class Sparsity(_Value, Shown):
    """PPL-p % sparsity of a model on a text."""

    model: str
    version: str
    percent: float
    tokens: int
    perplexity: float
    layers: tuple[LayerSparsity, ...]
    rules: tuple[RuleSparsity, ...]

    def __rich__(self) -> RenderableType:
        """The rules, and every layer."""
        head = Text(f"PPL-{self.percent:g}% sparsity", "bold")
        head.append(
            f": the share of activations that can be zero until perplexity ({self.perplexity:,.2f} on "
            f"{self.tokens:,} tokens) rises by {self.percent:g} %",
            style="not bold",
        )
        all_layers = table("all layers at once", "zero>", "perplexity>", "")
        meaning = {"relative": "τ = {:.3g} medians", "threshold": "|a| < {:.3g}", "top-k": "{:.0f} neurons a token"}
        for rule in self.rules:
            found = rule.found
            all_layers.add_row(
                rule.rule, f"{found.share:.1%}", f"x {found.ratio:.4f}", meaning[rule.rule].format(found.value)
            )
        each_layer = table("layer>", "alone>", "|a| <>", *(f"{rule.rule}>" for rule in self.rules))
        for place, layer in enumerate(self.layers):
            shares = [f"{rule.by_layer[place]:.1%}" for rule in self.rules]
            each_layer.add_row(str(layer.layer), f"{layer.alone:.1%}", f"{layer.threshold:.3g}", *shares)
        return Group(head, Text(), all_layers, Text(), each_layer)

    def picture(self) -> Figure:
        """The shares by layer, and what each rule's share costs."""
        from plotly.graph_objects import Bar, Scatter
        from plotly.subplots import make_subplots

        titles = (f"zero at +{self.percent:g} % perplexity, by layer", "what a share costs, all layers at once")
        figure: Figure = make_subplots(rows=1, cols=2, subplot_titles=titles, column_widths=[0.58, 0.42])
        layers = [each.layer for each in self.layers]
        shares = [each.alone for each in self.layers]
        figure.add_trace(Bar(x=layers, y=shares, name="this layer alone", marker_color="#d5dbdb"), row=1, col=1)
        for rule, colour in zip(self.rules, ("#c0392b", "#2471a3", "#1e8449"), strict=True):
            line = {"color": colour}
            by_layer = Scatter(x=layers, y=rule.by_layer, name=rule.rule, mode="lines+markers", line=line)
            figure.add_trace(by_layer, row=1, col=1)
            curve = Scatter(
                x=[point.share for point in rule.tried],
                y=[point.ratio for point in rule.tried],
                name=rule.rule,
                mode="lines+markers",
                line=line,
                showlegend=False,
            )
            figure.add_trace(curve, row=1, col=2)
        figure.add_hline(y=1 + self.percent / 100, line_dash="dash", line_color="#888", row=1, col=2)
        figure.update_xaxes(title_text="layer", row=1, col=1)
        figure.update_yaxes(title_text="share of activations at zero", tickformat=".0%", range=[0, 1], row=1, col=1)
        figure.update_xaxes(title_text="share at zero", tickformat=".0%", row=1, col=2)
        figure.update_yaxes(title_text="perplexity / as it is", type="log", row=1, col=2)
        figure.update_layout(
            title=f"{self.model}: PPL-{self.percent:g}% sparsity", legend={"orientation": "h", "y": -0.18}
        )
        return figure


def sparsity(
    engine: TransformersEngine,
    text: str | None = None,
    *,
    percent: float = 1.0,
    tokens: int = 512,
    layers: bool = True,
    progress: Progress | None = None,
) -> Sparsity:
    """PPL-p % sparsity on the first `tokens` tokens of a text (None: the text that ships), p being `percent`.

    `layers` asks for each layer alone as well, which takes longest. Shares are found to within 1/128, a top-k to within
    one neuron or 1/128. Spare neurons do not count. Raises Unsupported for experts, and InvalidInput for a percentage
    that is not above 0 or a text that is too short.
    """
    require_dense(engine)
    if not percent > 0 or not math.isfinite(percent):
        raise InvalidInput(f"Perplexity cannot rise by {percent:g} %.", hint="Give a percentage above 0, such as 1.")
    runs = _Runs(engine, windows_of(engine, text, tokens=tokens))
    trials = (_STEPS * engine.sites.layers if layers else 0) + _STEPS * len(RULES)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(done, trials), trials)

    limit = 1 + percent / 100
    alone = [_alone(runs, layer, limit, tick) for layer in range(engine.sites.layers)] if layers else []
    rules = [_by_rule(runs, rule, limit, tick) for rule in RULES]
    return Sparsity(
        model=engine.info.name,
        version=runs.version,
        percent=percent,
        tokens=counted(runs.windows),
        perplexity=math.exp(runs.before),
        layers=tuple(alone),
        rules=tuple(rules),
    )


class _Runs:
    """The text, run again and again with some activations at zero, under the state that there was at first."""

    def __init__(self, engine: TransformersEngine, windows: Sequence[ScoreItem]) -> None:
        self.engine, self.windows = engine, windows
        self.rows = [[*window.prompt, *window.continuation] for window in windows]
        with engine.gate.step():
            self._state, self.version = engine.state, str(engine.version)
        self._prompts = packed_prompts(packed_paths(engine.model, self.rows), [len(row) for row in self.rows])
        self._inputs: dict[int, list[Tensor]] = {}  # block -> what it was given, a row: (T, width)
        self.zero: dict[int, tuple[int, int]] = {}  # layer -> how many were zero in the last run, of how many
        self.before, self.quantiles = self._as_it_is()
        """Nats a token as it is, and a layer |a| at the shares 0, 1/128, … 1: (129,)."""

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the model for one run, so that a running chat waits for no more than that."""
        with (
            self.engine.preview(self._state),
            self.engine.activations.prompt(self._prompts),
            torch.inference_mode(),
        ):
            yield

    def _as_it_is(self) -> tuple[float, list[Tensor]]:
        model, sites = self.engine.model, self.engine.sites
        seen: dict[int, Tensor] = {}
        with self._held(), ExitStack() as hooks:
            for layer in range(sites.layers):
                point = sites.activation(f"layers.{layer}.mlp.neurons")
                handle = point.on(lambda value, layer=layer: seen.__setitem__(layer, value.abs()))  # type: ignore[misc]
                hooks.callback(handle.remove)
            nats = self._nats(run_whole(model, sites, self.rows)[0])
        return nats, [_quantiles(seen.pop(layer)) for layer in range(sites.layers)]

    def ratio(self, cuts: dict[int, Cut]) -> float:
        """The perplexity over that of the model as it is, with each layer's activations cut."""
        self.zero = {}
        first = min(cuts)
        model, sites = self.engine.model, self.engine.sites
        with self._held(), ExitStack() as hooks:
            for layer, cut in cuts.items():
                point = sites.activation(f"layers.{layer}.mlp.neurons")
                handle = point.on(lambda value, layer=layer, cut=cut: self._cut(layer, cut, value))  # type: ignore[misc]
                hooks.callback(handle.remove)
            if first in self._inputs:
                finals, _ = run_whole(model, sites, self.rows, layer=first, inputs=self._inputs[first])
            else:
                finals, _ = run_whole(model, sites, self.rows)
            rise = self._nats(finals) - self.before
        return math.exp(min(rise, 700.0))

    def from_layer(self, layer: int) -> None:
        """Keep what the block `layer` is given, and forget it of the others; the first is always run from tokens."""
        model, sites = self.engine.model, self.engine.sites
        with self._held():
            if layer == 1:
                self._inputs = {1: run_whole(model, sites, self.rows, keep=1)[1]}
            elif layer > 1:
                before = self._inputs[layer - 1]
                kept, _ = run_whole(model, sites, self.rows, layer=layer - 1, inputs=before, until=layer)
                self._inputs = {layer: kept}

    def _cut(self, layer: int, cut: Cut, values: Tensor) -> Tensor:
        stays = cut(values)
        self.zero[layer] = (int((~stays | (values == 0)).sum()), stays.numel())
        return torch.where(stays, values, 0.0)

    @property
    def share(self) -> float:
        """The share of activations that were zero in the last run, over the layers that were cut."""
        return sum(zero for zero, _ in self.zero.values()) / sum(all_ for _, all_ in self.zero.values())

    def _nats(self, finals: Sequence[Tensor]) -> float:
        total = 0.0
        for final, row, window in zip(finals, self.rows, self.windows, strict=True):
            start = len(window.prompt) - 1
            wanted = torch.tensor(window.continuation, device=final.device)
            for place in range(start, len(row) - 1, _POSITIONS):
                logits = self.engine.unembed(final[place : min(place + _POSITIONS, len(row) - 1)]).float()
                chosen = wanted[place - start : place - start + len(logits), None]
                total -= float(logits.log_softmax(-1).gather(1, chosen).sum())
        return total / counted(self.windows)


def _quantiles(magnitudes: Tensor) -> Tensor:
    """The magnitude below which each share k/128 of them lies; the last is beyond all."""
    ordered = magnitudes.flatten().float().sort().values
    places = [round(share / _GRID * len(ordered)) for share in range(_GRID)]
    return torch.cat((ordered[places], ordered.new_tensor([math.inf])))


def _below(threshold: float) -> Cut:
    return lambda values: values.abs() >= threshold


def _top(count: int) -> Cut:
    def cut(values: Tensor) -> Tensor:
        kept = values.abs().topk(count, dim=-1).indices
        return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, kept, True)

    return cut


def _alone(runs: _Runs, layer: int, limit: float, tick: Callable[[], None]) -> LayerSparsity:
    runs.from_layer(layer)
    low, high = 0, _GRID  # 128ths: `low` is within the limit
    best = LayerSparsity(layer=layer, alone=0.0, threshold=0.0, ratio=1.0)
    for _ in range(_STEPS):
        middle = (low + high) // 2
        threshold = float(runs.quantiles[layer][middle])
        ratio = runs.ratio({layer: _below(threshold)})
        if ratio <= limit:
            low, best = middle, LayerSparsity(layer=layer, alone=runs.share, threshold=threshold, ratio=ratio)
        else:
            high = middle
        tick()
    return best


def _typical(quantiles: Tensor) -> float:
    """The median |a| of a layer from its quantiles; of those that are not 0, where half are (as behind a ReLU)."""
    there = quantiles[quantiles > 0]
    middle = float(quantiles[_GRID // 2])
    return middle if middle > 0 or not len(there) else float(there[len(there) // 2])


def _by_rule(runs: _Runs, rule: Rule, limit: float, tick: Callable[[], None]) -> RuleSparsity:
    """Bisect a rule's value for all layers at once, by the share that it would zero in the median layer."""
    layers = range(len(runs.quantiles))
    medians = [_typical(each) for each in runs.quantiles]
    neurons = min(map(runs.engine.sites.neurons_of, layers))
    # What each share is as a τ or a t: in the middle of the layers, whose own shares then differ.
    quantiles = torch.stack([each[:_GRID].cpu() for each in runs.quantiles])  # (layers, 128)
    relative = (quantiles / torch.tensor(medians).clamp(min=1e-30)[:, None]).median(0).values
    absolute = quantiles.median(0).values

    def cuts(step: int) -> tuple[float, dict[int, Cut]]:
        if rule == "relative":
            value = float(relative[step])
            return value, {layer: _below(value * medians[layer]) for layer in layers}
        if rule == "threshold":
            value = float(absolute[step])
            return value, {layer: _below(value) for layer in layers}
        count = max(1, round((1 - step / _GRID) * neurons))
        return float(count), {layer: _top(count) for layer in layers}

    nothing = {"relative": 0.0, "threshold": 0.0, "top-k": float(neurons)}[rule]
    found, by_layer = Tried(value=nothing, share=0.0, ratio=1.0), tuple(0.0 for _ in layers)
    tried = [found]
    low, high = 0, _GRID
    for _ in range(_STEPS):
        middle = (low + high) // 2
        value, cut = cuts(middle)
        ratio = runs.ratio(cut)
        point = Tried(value=value, share=runs.share, ratio=ratio)
        tried.append(point)
        if ratio <= limit:
            low, found = middle, point
            by_layer = tuple(runs.zero[layer][0] / runs.zero[layer][1] for layer in layers)
        else:
            high = middle
        tick()
    return RuleSparsity(
        rule=rule, found=found, by_layer=by_layer, tried=tuple(sorted(tried, key=lambda point: point.share))
    )
