"""What is told of the difference between two models: as values, as tables, as a picture, as an adjustment.

Owns these forms. Knows nothing of how they are measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, PrivateAttr
from rich.console import Group, RenderableType
from rich.text import Text

from liveweight.adjustments import Adjustment
from liveweight.errors import InvalidInput
from liveweight.shown import Shown, grid, short, table
from liveweight.tracing.two_models import TwoModels

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_SITES = 10  # weights that are named in a terminal


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SiteChange(_Value):
    """One weight that differs. `None` stands where a measure means nothing: a vector has no singular values."""

    site: str
    kind: str  # the site without its layer (and expert)
    layer: int | None
    norm: float  # Frobenius, of the difference
    share: float | None  # of the first model's norm there; None where that is zero
    entries: int  # that differ
    changed: float  # the same as a share of all
    energy: float | None  # share of the difference's squared norm in its first `rank` singular values
    reads: float | None  # degrees: the largest principal angle between the leading right singular subspaces
    writes: float | None  # degrees: the same for the left ones


class LayerLabels(_Value):
    """What became of the tokens that a layer's neurons write."""

    layer: int
    neurons: int
    looked_at: int  # those that can have changed: what they write did, or all where the unembedding did
    kept: float  # share of all its neurons whose first token is the same


class NeuronMove(_Value):
    """A neuron whose vectors moved far."""

    layer: int
    neuron: int
    moved: float  # root of the summed squared relative changes of its gate, up and down vectors
    parts: tuple[str, ...]  # which of these weights differ in its layer
    before: str  # what it writes in the first model
    after: str  # and in the second
    kept: bool  # whether the first token is the same


class ModelDiff(_Value, Shown):
    """How a second model differs from a first. Weights that are equal to the bit are counted and not listed."""

    a: str
    b: str
    hash_a: str
    hash_b: str
    architecture: str
    sites: int  # weights that were compared
    entries: int
    changed: int  # entries that differ
    rank: int
    changes: tuple[SiteChange, ...]  # in the model's order
    labels: tuple[LayerLabels, ...]  # layers whose MLP or unembedding differs; empty where labels were not asked for
    moved: tuple[NeuronMove, ...]  # the furthest first
    notes: tuple[str, ...] = ()
    _pair: TwoModels | None = PrivateAttr(default=None)

    def attach(self, pair: TwoModels | None) -> None:
        """Hold the models that were compared, for `adjustment`; None lets them go."""
        self._pair = pair

    @property
    def kept(self) -> float | None:
        """Share of all neurons of the layers in `labels` that keep their first token."""
        neurons = sum(each.neurons for each in self.labels)
        return sum(each.kept * each.neurons for each in self.labels) / neurons if neurons else None

    def adjustment(self, *, rank: int | None = None, name: str | None = None) -> Adjustment:
        """What makes the first model's weights the second's: exactly, or with `rank` by low-rank changes.

        See `TwoModels.adjustment`. Raises InvalidInput where nothing differs, or where the report was read from JSON
        and the models are not at hand.
        """
        if self._pair is None:
            raise InvalidInput("The two models are not at hand any more.", hint="Compare them again.")
        changed = [each.site for each in self.changes]
        return self._pair.adjustment(changed, name or f"{self.a} to {self.b}", rank=rank)

    def __rich__(self) -> RenderableType:
        """What differs by kind, where most, and the neurons."""
        if not self.changes:
            return Text(f"{self.a} and {self.b} are the same: {self.sites} weights, {self.entries:,} entries.")
        share = self.changed / self.entries
        rows: list[tuple[str, RenderableType]] = [
            ("models", Text(f"{self.a} → {self.b} ({self.architecture})")),
            ("differ", Text(f"{len(self.changes)} of {self.sites} weights, {self.changed:,} entries ({share:.2%})")),
        ]
        if self.kept is not None:
            layers = f"{len(self.labels)} layers" if len(self.labels) != 1 else f"layer {self.labels[0].layer}"
            rows.append(("labels", Text(f"{self.kept:.1%} of the neurons of {layers} keep their first token")))
        rows += [("note", Text(each)) for each in self.notes]
        kinds = table("kind", "weights>", "|D|/|W|>", "largest>", "entries>", f"rank {self.rank}>", "reads>", "writes>")
        for kind in dict.fromkeys(each.kind for each in self.changes):
            some = [each for each in self.changes if each.kind == kind]
            kinds.add_row(
                kind.removesuffix(".weight"),
                str(len(some)),
                _mean([each.share for each in some], "{:.3%}"),
                _largest([each.share for each in some], "{:.3%}"),
                _mean([each.changed for each in some], "{:.1%}"),
                _mean([each.energy for each in some], "{:.0%}"),
                _largest([each.reads for each in some], "{:.1f}°"),
                _largest([each.writes for each in some], "{:.1f}°"),
            )
        most = table("most changed", "|D|>", "|D|/|W|>", "entries>", f"rank {self.rank}>")
        ordered = sorted(self.changes, key=lambda each: -(each.share if each.share is not None else float("inf")))
        for each in ordered[:_SITES]:
            most.add_row(
                each.site,
                f"{each.norm:.3g}",
                _one(each.share, "{:.3%}"),
                f"{each.changed:.1%}",
                _one(each.energy, "{:.0%}"),
            )
        parts: list[RenderableType] = [grid(rows), Text(), kinds, Text(), most]
        if self.labels:
            labels = table("layer>", "neurons>", "looked at>", "keep their token>")
            for layer in self.labels:
                labels.add_row(str(layer.layer), str(layer.neurons), str(layer.looked_at), f"{layer.kept:.1%}")
            parts += [Text(), labels]
        if self.moved:
            moved = table("neuron", "moved>", "wrote", "writes")
            for neuron in self.moved:
                name = f"L{neuron.layer}/{neuron.neuron}"
                moved.add_row(
                    name, f"{neuron.moved:.3g}", Text(short(neuron.before, 28)), Text(short(neuron.after, 28))
                )
            parts += [Text(), moved]
        return Group(*parts)

    def picture(self) -> Figure:
        """|D| / |W| over layers, a bar for each kind of weight."""
        from plotly.graph_objects import Bar, Figure

        figure: Figure = Figure()
        everywhere = sorted({each.layer for each in self.changes if each.layer is not None})
        for kind in dict.fromkeys(each.kind for each in self.changes):
            some = [each for each in self.changes if each.kind == kind]
            if some[0].layer is None:
                figure.add_trace(Bar(name=kind, x=[kind], y=[100 * (each.share or 0.0) for each in some]))
                continue
            # Experts of one layer share a place.
            mean = {layer: [100 * (each.share or 0.0) for each in some if each.layer == layer] for layer in everywhere}
            figure.add_trace(
                Bar(
                    name=kind.removesuffix(".weight"),
                    x=[str(layer) for layer in everywhere],
                    y=[sum(mean[layer]) / len(mean[layer]) if mean[layer] else 0.0 for layer in everywhere],
                )
            )
        figure.update_layout(
            title=f"{self.a} → {self.b}",
            template="plotly_white",
            barmode="group",
            xaxis={"title": "layer", "type": "category"},
            yaxis={"title": "change, % of the weight's norm"},
        )
        return figure


def _one(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _mean(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return _one(sum(known) / len(known) if known else None, form)


def _largest(values: list[float | None], form: str) -> str:
    return _one(max((value for value in values if value is not None), default=None), form)
