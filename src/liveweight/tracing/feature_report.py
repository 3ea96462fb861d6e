"""What is told of a layer's features: as values, as tables, as a picture, as a file.

Owns these forms. Knows nothing of how features are made.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Group, RenderableType
from rich.text import Text
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from liveweight.errors import InvalidInput
from liveweight.shown import Shown, grid, quoted, short, table
from liveweight.tracing.neuron_labels import Decoded

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_TENSORS = ("directions", "coefficients", "written")
_MAPPED, _SEEN = 30, 60  # features and tokens of the picture


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class FeatureSettings(_Value):
    """What features are made by; the same settings on the same weights give the same features."""

    layer: int
    k: int
    share: float  # of the neurons that each feature keeps
    tokens: int  # at most
    rounds: int  # at most
    seed: int
    text: str  # its name
    text_hash: str  # sha256


class FeatureNeuron(_Value):
    """A neuron of a feature. Weights are of a direction of length 1."""

    neuron: int
    weight: float
    label: str = ""  # what it writes at this sign; empty where it was not asked for


class Context(_Value):
    """A place in the text where a feature's coefficient is large."""

    before: str
    token: str
    after: str
    coefficient: float  # the feature's part of the activations there has this length

    def marked(self, most: int = 60) -> Text:
        """In one line, the token marked; cut on the left, and then on the right."""
        before, after = " ".join(self.before.split()), " ".join(self.after.split())
        token = repr(self.token)[1:-1]
        left = max(0, most - len(token) - 2 - min(len(after), most // 4))
        cut = before if len(before) <= left else "…" + before[len(before) - left + 1 :] if left else ""
        shown = Text(cut + (" " if self.token[:1].isspace() else ""))
        shown.append(f"[{token.strip() or token}]", style="bold reverse")
        shown.append((" " if self.after[:1].isspace() else "") + after)
        shown.truncate(most, overflow="ellipsis")
        return shown


class Feature(_Value, Shown):
    """One feature: a direction among a layer's neurons."""

    number: int
    layer: int
    energy: float  # of its coefficients, as a share of the activations' own; features overlap, so they need not add up
    active: float  # share of tokens whose coefficient is above a tenth of the largest
    written: float  # the length of what a coefficient of 1 adds to the residual stream
    neurons: tuple[FeatureNeuron, ...]  # the largest first
    contexts: tuple[Context, ...]  # the largest first, one a passage
    promotes: Decoded
    suppresses: Decoded

    def __rich__(self) -> RenderableType:
        """Its tokens, its neurons, its contexts."""
        head = grid(
            [
                ("feature", Text(f"{self.number} of layer {self.layer}")),
                ("on", Text(f"{self.active:.1%} of the tokens, {self.energy:.2%} of the activations' energy")),
                ("writes", Text(self.promotes.text(8))),
                ("against", Text(self.suppresses.text(8))),
            ]
        )
        neurons = table("neuron>", "weight>", "writes")
        for each in self.neurons:
            neurons.add_row(str(each.neuron), f"{each.weight:+.3f}", Text(short(each.label, 58)))
        contexts = table("coefficient>", "where it is largest")
        for each_context in self.contexts:
            contexts.add_row(f"{each_context.coefficient:.3g}", each_context.marked())
        return Group(head, Text(), neurons, Text(), contexts)


class _Told(_Value):
    """The part of features that is JSON."""

    model: str
    model_hash: str
    version: str  # hash of the weights that the activations were read under
    settings: FeatureSettings
    neurons: int
    tokens: int  # that were read
    passages: int  # that they come from
    errors: tuple[float, ...]  # |A - ZY| / |A| at the start and after every round
    left_out: tuple[int, ...]  # super neurons, which no feature has
    features: tuple[Feature, ...]
    texts: tuple[str, ...]  # the tokens of the first passage


class Features(_Told, Shown):
    """The features of a layer: the report, and the matrices that it is about.

    The matrices are left out where the report becomes JSON; `save` writes all of it.
    """

    directions: Tensor = Field(exclude=True, repr=False)  # Z (neurons, k), columns of length 1
    coefficients: Tensor = Field(exclude=True, repr=False)  # Y (k, tokens), ≥ 0
    written: Tensor = Field(exclude=True, repr=False)  # (k, width) what the columns add to the residual stream

    @property
    def error(self) -> float:
        """What the features leave of the activations, as a share of their length."""
        return self.errors[-1]

    @property
    def explained(self) -> float:
        """The share of the activations' energy (squared length) that the features hold."""
        return 1.0 - self.error**2

    def __getitem__(self, number: int) -> Feature:
        """A feature by its number. Raises InvalidInput."""
        if not 0 <= number < len(self.features):
            raise InvalidInput(
                f"There is no feature {number} at layer {self.settings.layer}.",
                hint=f"They are 0 to {len(self.features) - 1}; with a larger k there are more.",
            )
        return self.features[number]

    def __len__(self) -> int:
        return len(self.features)

    def view(self, top: int = 20) -> RenderableType:
        """What was factorised and how well, and the first features."""
        settings = self.settings
        read = f"{self.tokens:,} tokens of {self.passages} passages of {settings.text}"
        kept = max(1, round(settings.share * self.neurons))
        rows: list[tuple[str, RenderableType]] = [
            ("features", Text(f"{len(self)} at layer {settings.layer} of {self.model}, seed {settings.seed}")),
            ("from", Text(read)),
            ("each of", Text(f"{kept} of {self.neurons} neurons ({settings.share:.3g} of them)")),
            (
                "error",
                Text(
                    f"{self.error:.3f} of the activations' length, so {self.explained:.1%} of their energy is held; "
                    f"{len(self.errors) - 1} rounds"
                ),
            ),
        ]
        if self.left_out:
            rows.append(("left out", Text("super neurons " + ", ".join(map(str, self.left_out)))))
        shown = table("#>", "energy>", "on>", "writes", "where it is largest")
        for each in self.features[:top]:
            where = each.contexts[0].marked(32) if each.contexts else Text("nowhere")
            shown.add_row(
                str(each.number),
                f"{each.energy:.1%}",
                f"{each.active:.1%}",
                Text(short(each.promotes.text(3), 24)),
                where,
            )
        return Group(grid(rows), Text(), shown)

    def __rich__(self) -> RenderableType:
        """The first twenty; `view` shows more."""
        return self.view()

    def picture(self) -> Figure:
        """The error round by round, and the coefficients of the strongest features over the first passage."""
        from plotly.graph_objects import Heatmap, Scatter
        from plotly.subplots import make_subplots

        figure: Figure = make_subplots(
            rows=1,
            cols=2,
            column_widths=[0.28, 0.72],
            horizontal_spacing=0.14,
            subplot_titles=["error by round", "coefficients over the first passage"],
        )
        rounds = list(range(len(self.errors)))
        figure.add_trace(Scatter(x=rounds, y=self.errors, line={"color": "#2471a3"}, showlegend=False), row=1, col=1)
        seen, shown = min(_SEEN, len(self.texts)), min(_MAPPED, len(self))
        part = self.coefficients[:shown, :seen]
        largest = self.coefficients[:shown].amax(dim=1, keepdim=True).clamp_min(1e-30)
        names = [f"{each.number} {short(each.promotes.text(2), 18)}" for each in self.features[:shown]]
        texts = [quoted(text).plain for text in self.texts[:seen]]
        figure.add_trace(
            Heatmap(
                z=(part / largest).tolist(),
                x=list(range(seen)),
                y=names,
                colorscale="Blues",
                zmin=0,
                zmax=1,
                colorbar={"title": "of its largest"},
            ),
            row=1,
            col=2,
        )
        figure.update_xaxes(title_text="round", row=1, col=1)
        figure.update_yaxes(title_text="|A - ZY| / |A|", row=1, col=1)
        ticks = {"tickmode": "array", "tickvals": list(range(seen)), "ticktext": texts}
        figure.update_xaxes(**ticks, tickangle=-90, tickfont={"size": 8}, row=1, col=2)
        figure.update_yaxes(autorange="reversed", tickfont={"size": 8}, row=1, col=2)
        title = f"{len(self)} features of layer {self.settings.layer}: error {self.error:.3f}"
        figure.update_layout(title=title, template="plotly_white")
        return figure

    def save(self, path: Path | str) -> None:
        """Write report and matrices as one safetensors file, whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
            save_file(tensors, temporary, metadata={"report": self.model_dump_json()})
            os.replace(temporary, path)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path | str) -> Features:
        """What `save` wrote. Raises InvalidInput where it cannot be read."""
        try:
            with safe_open(path, framework="pt") as stored:
                report = (stored.metadata() or {})["report"]
                tensors = {name: stored.get_tensor(name) for name in _TENSORS}
            return cls(**dict(_Told.model_validate_json(report)), **tensors)
        except (OSError, SafetensorError, KeyError, ValidationError) as error:
            raise InvalidInput(f"No features can be read from {path}: {error}.", hint="Make them anew.") from error
