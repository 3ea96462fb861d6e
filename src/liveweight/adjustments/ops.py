"""The ops: one declarative change at one site each, as data.

Owns what a change *is*: its kind, its coordinates (the checkpoint's, so that an op means the same on every engine),
its numbers, and the checks that need no model. Knows nothing of any model; `weights.py` and `activations.py` carry
ops out, and they check coordinates against the model's sites.

Every op takes a strength s given elsewhere: s = 0 is nothing, s = 1 is the op as proposed. A factor f becomes
1 + s(f - 1), a delta becomes s·delta, a value v that replaces x becomes x + s(v - x), and a new neuron writes s times
what was proposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from liveweight.adjustments.op_base import (
    Index,
    Indices,
    Layer,
    Numbers,
    OpBase,
    check_no_repeats,
    check_same_length,
    check_vector,
    describe_problems,
)
from liveweight.adjustments.rounding import Clip
from liveweight.errors import InvalidInput

# ------------------------------------------------------------------------------------------------ ops on weights


class ScaleNeurons(OpBase):
    """Scale what neurons write (their columns of `down`) or read (their rows of `up`) by a factor each.

    In a gated MLP both sides are the same function of the input: act(gate·x) * (f·up·x). An ungated MLP has no such
    read side, because its activation function is not homogeneous. `factors`: (n,). `expert` where the layer has any.
    """

    kind: Literal["scale_neurons"] = "scale_neurons"
    layer: Layer
    neurons: tuple[Index, ...]
    factors: Numbers
    side: Literal["write", "read"] = "write"
    expert: Index | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_same_length(neurons=self.neurons, factors=self.factors)
        check_no_repeats("neurons", self.neurons)
        return self


class ScalePaths(OpBase):
    """Scale the weight between a neuron and a neuron of a later layer: path i goes neurons[i] -> to_neurons[i].

    With r a row by which the later neuron reads (gate and up, or fc) and v the earlier one's write column as that row
    sees it through the norms' weights, one path is the rank-one change r -= (1 - f) (r·v) v / |v|². Several paths
    into one neuron are solved together, r -= V (VᵀV)⁺ diag(1 - f) Vᵀ r, so that each r·v becomes f·(r·v) although
    the columns are not orthogonal. The columns and norms are the base's own, whatever else is active. `factors`: (n,).
    """

    kind: Literal["scale_paths"] = "scale_paths"
    layer: Layer
    neurons: tuple[Index, ...]
    to_layer: Layer
    to_neurons: tuple[Index, ...]
    factors: Numbers
    expert: Index | None = None
    to_expert: Index | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_same_length(neurons=self.neurons, to_neurons=self.to_neurons, factors=self.factors)
        check_no_repeats("the list of paths", tuple(zip(self.neurons, self.to_neurons, strict=True)))
        if self.to_layer <= self.layer:
            raise ValueError(f"to_layer {self.to_layer} must come after layer {self.layer}")
        return self


class ScaleHeads(OpBase):
    """Scale what attention heads write (their columns of `o`) by a factor each. `factors`: (n,)."""

    kind: Literal["scale_heads"] = "scale_heads"
    layer: Layer
    heads: tuple[Index, ...]
    factors: Numbers

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_same_length(heads=self.heads, factors=self.factors)
        check_no_repeats("heads", self.heads)
        return self


class LowRank(OpBase):
    """Add left @ right to a weight (out, in): `left` (out, r), `right` (r, in)."""

    kind: Literal["low_rank"] = "low_rank"
    site: str
    left: Numbers
    right: Numbers

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.left.dim() != 2 or self.right.dim() != 2 or self.left.shape[1] != self.right.shape[0]:
            shapes = f"{tuple(self.left.shape)} and {tuple(self.right.shape)}"
            raise ValueError(f"left (out, r) and right (r, in) must share r, not {shapes}")
        if not self.left.shape[1]:
            raise ValueError("left and right have rank 0")
        return self


class Entries(OpBase):
    """Set single entries of a weight: `indices` (n, 2) in (out, in), or (n, 1) for a bias or norm; `values` (n,)."""

    kind: Literal["entries"] = "entries"
    site: str
    indices: Indices
    values: Numbers

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.indices.dim() != 2 or self.indices.shape[1] not in (1, 2):
            raise ValueError(f"indices must be (n, 2) or (n, 1), not {tuple(self.indices.shape)}")
        if self.values.shape != self.indices.shape[:1] or not len(self.values):
            raise ValueError(f"{len(self.indices)} indices need as many values, not {tuple(self.values.shape)}")
        if len(torch.unique(self.indices, dim=0)) != len(self.indices):
            raise ValueError("indices names one entry twice")
        return self


class Dense(OpBase):
    """Add `delta`, of the weight's whole shape: (out, in), or (out,) for a bias or norm."""

    kind: Literal["dense"] = "dense"
    site: str
    delta: Numbers

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.delta.dim() not in (1, 2) or not self.delta.numel():
            raise ValueError(f"delta must be (out, in) or (out,), not {tuple(self.delta.shape)}")
        return self


class ReplaceNeurons(OpBase):
    """Overwrite whole neurons of an MLP: what they read with and what they write.

    At any strength s other than 0 neuron neurons[i] reads with the rows gate[i] and up[i] and writes s·down[:, i], so
    that s scales linearly what it adds to the stream. The values are set, whatever was there before: of two ops on one
    neuron the later one wins. `up`, `gate`: (n, width); `down`: (width, n). `gate` is needed where the MLP is gated
    and refused where it is not. `bias` (n,) is what the neurons' biases of up become, refused where up has none; None
    leaves them. The biases of gate and down stay as they are.
    """

    kind: Literal["replace_neurons"] = "replace_neurons"
    layer: Layer
    neurons: tuple[Index, ...]
    up: Numbers
    down: Numbers
    gate: Numbers | None = None
    bias: Numbers | None = None
    expert: Index | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_no_repeats("neurons", self.neurons)
        count = len(self.neurons)
        if not count:
            raise ValueError("neurons must not be empty")
        if self.up.dim() != 2 or len(self.up) != count or not self.up.shape[1]:
            raise ValueError(f"up must be (n, width) with n = {count} neurons, not {tuple(self.up.shape)}")
        width = self.up.shape[1]
        if self.down.shape != (width, count):
            raise ValueError(f"down must be (width, n), so {(width, count)} as up, not {tuple(self.down.shape)}")
        if self.gate is not None and self.gate.shape != self.up.shape:
            raise ValueError(f"gate must be (n, width), so {(count, width)} as up, not {tuple(self.gate.shape)}")
        if self.bias is not None and self.bias.shape != (count,):
            raise ValueError(f"bias must be (n,), so {(count,)}, not {tuple(self.bias.shape)}")
        return self


class Quantize(OpBase):
    """Round matrices to 2^bits levels a block: `block` is its rows and columns, the last ones at an edge being smaller.

    What is rounded is what stands there when the op's turn comes, so that what precedes it is rounded too and what
    follows it is not. At a strength s what is w becomes w + s(rounded - w). `clip` and `clip_at` say how outliers are
    held in before: at `clip_at` standard deviations of the block ("z"), or to the range of its middle `clip_at` per
    cent ("percentile"). `keep` names entries (site, row, column) that are held out and stay bit for bit.
    """

    kind: Literal["quantize"] = "quantize"
    sites: tuple[str, ...]
    bits: Annotated[int, Field(ge=2, le=8, strict=True)]
    block: tuple[Annotated[int, Field(ge=1, strict=True)], Annotated[int, Field(ge=1, strict=True)]]
    clip: Clip = "none"
    clip_at: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    keep: tuple[tuple[str, Index, Index], ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.sites:
            raise ValueError("sites must not be empty")
        check_no_repeats("sites", self.sites)
        check_no_repeats("keep", self.keep)
        if self.clip == "none" and self.clip_at:
            raise ValueError(f"clip_at {self.clip_at:g} needs clip 'z' or 'percentile'")
        if self.clip == "z" and not self.clip_at > 0:
            raise ValueError(f"clip_at must be above 0 standard deviations, not {self.clip_at:g}")
        if self.clip == "percentile" and not 0 < self.clip_at <= 100:
            raise ValueError(f"clip_at must be above 0 and at most 100 per cent, not {self.clip_at:g}")
        if strange := [site for site, _, _ in self.keep if site not in self.sites]:
            raise ValueError(f"keep names {strange[0]}, which is not among the sites")
        return self


# -------------------------------------------------------------------------------------------- ops on activations


class Steer(OpBase):
    """Add scale·vector to the values at a site: `vector` (size,).

    `positions` are absolute, counted from the first token of the whole text, so that decoding with a cache gives what
    decoding without one gives; None is every position. `when` restricts to the prompt's or the generated tokens.
    """

    kind: Literal["steer"] = "steer"
    site: str
    vector: Numbers
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    when: Literal["always", "prompt", "generated"] = "always"
    positions: tuple[Index, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_vector("vector", self.vector)
        return self


class Clamp(OpBase):
    """Hold neurons' activations at `values` (n,)."""

    kind: Literal["clamp"] = "clamp"
    layer: Layer
    neurons: tuple[Index, ...]
    values: Numbers
    expert: Index | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_same_length(neurons=self.neurons, values=self.values)
        check_no_repeats("neurons", self.neurons)
        return self


class Gain(OpBase):
    """Give neurons another activation function: gain · act(slope·x) / slope. `gains`, `slopes`: (n,).

    Gain 1 and slope 1 are the model's own. For SiLU this is gain · x · sigmoid(slope·x). A slope must be above 0.
    """

    kind: Literal["gain"] = "gain"
    layer: Layer
    neurons: tuple[Index, ...]
    gains: Numbers
    slopes: Numbers
    expert: Index | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_same_length(neurons=self.neurons, gains=self.gains, slopes=self.slopes)
        check_no_repeats("neurons", self.neurons)
        if not bool((self.slopes > 0).all()):
            raise ValueError("slopes must be above 0")
        return self


class Ablate(OpBase):
    """Project a direction out of the values at a site: x - (x·d) d, with d = direction / |direction|.

    The site `stream` stands for every write into the residual stream: embeddings, attention and MLP of all layers.
    """

    kind: Literal["ablate"] = "ablate"
    site: str
    direction: Numbers

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_vector("direction", self.direction)
        if not float(self.direction.norm()) > 0:
            raise ValueError("direction must not be zero")
        return self


class MixHeads(OpBase):
    """Mix the heads' outputs before `o`: head i becomes sum_j matrix[i, j] · head j. `matrix`: (heads, heads)."""

    kind: Literal["mix_heads"] = "mix_heads"
    layer: Layer
    matrix: Numbers

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.matrix.dim() != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise ValueError(f"matrix must be (heads, heads), not {tuple(self.matrix.shape)}")
        return self


class BiasRouter(OpBase):
    """Add a bias to the router's logits: `bias` (experts,)."""

    kind: Literal["bias_router"] = "bias_router"
    layer: Layer
    bias: Numbers

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_vector("bias", self.bias)
        return self


class Codebook(OpBase):
    """Where the values at a site lie within a radius of a key, put that key's entry in their place; the nearest wins.

    `keys`, `entries`: (n, size); `radii`: (n,), above 0, Euclidean. At a strength s what is x becomes x + s(entry - x).
    """

    kind: Literal["codebook"] = "codebook"
    site: str
    keys: Numbers
    radii: Numbers
    entries: Numbers

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.keys.dim() != 2 or not self.keys.numel() or self.entries.shape != self.keys.shape:
            shapes = f"{tuple(self.keys.shape)} and {tuple(self.entries.shape)}"
            raise ValueError(f"keys and entries must be of one shape (n, size), not {shapes}")
        if self.radii.shape != self.keys.shape[:1]:
            raise ValueError(f"radii must be (n,) with n = {len(self.keys)} keys, not {tuple(self.radii.shape)}")
        if not bool((self.radii > 0).all()):
            raise ValueError("radii must be above 0")
        return self


class Affine(OpBase):
    """Scale and shift single entries of the values at a site: entry indices[i] becomes factors[i]·x + shifts[i].

    A factor 0 sets it to the shift exactly. `indices`, `factors`, `shifts`: (n,). `positions` as in Steer; None is all.
    """

    kind: Literal["affine"] = "affine"
    site: str
    indices: Indices
    factors: Numbers
    shifts: Numbers
    positions: tuple[Index, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_same_length(indices=self.indices, factors=self.factors, shifts=self.shifts)
        check_no_repeats("indices", tuple(self.indices.tolist()))
        if self.positions is not None and not self.positions:
            raise ValueError("positions must not be empty; leave them out to mean all")
        return self


class RoundActivations(OpBase):
    """Round the values at a site to 2^bits levels, each position for itself, so that decoding with a cache is the same.

    `keep` names entries of the site that are held out as `Quantize` holds out weights: replaced by the position's
    median while the levels are chosen, then put back.
    """

    kind: Literal["round_activations"] = "round_activations"
    site: str
    bits: Annotated[int, Field(ge=2, le=8, strict=True)]
    keep: tuple[Index, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_no_repeats("keep", self.keep)
        return self


WeightOp = ScaleNeurons | ScalePaths | ScaleHeads | LowRank | Entries | Dense | ReplaceNeurons | Quantize
ActivationOp = Steer | Clamp | Gain | Ablate | MixHeads | BiasRouter | Codebook | Affine | RoundActivations
Op = WeightOp | ActivationOp

AnyOp = Annotated[Op, Field(discriminator="kind")]  # as it is read from data: `kind` says which
_READER: TypeAdapter[Op] = TypeAdapter(AnyOp)


def op_from(data: Mapping[str, Any]) -> Op:
    """The op that `data` (fields and `kind`) describes. Raises InvalidInput for an unknown kind, key or value."""
    try:
        return _READER.validate_python(dict(data))
    except ValidationError as error:
        raise InvalidInput(
            f"This is not an op: {describe_problems(error)}.", hint="It may come from a newer liveweight."
        ) from error
