"""The ops: one declarative change at one site each, as data.

Owns what a change *is*: its kind, its coordinates (the checkpoint's, so that an op means the same on every engine),
its numbers, and the checks that need no model. Knows nothing of any model; `weights.py` and `activations.py` carry
ops out, and they check coordinates against the model's sites.

Every op is linear in a strength s given elsewhere: s = 0 is nothing, s = 1 is the op as proposed. A factor f becomes
1 + s(f - 1), a delta becomes s·delta, a value v that replaces x becomes x + s(v - x).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from torch import Tensor

from liveweight.errors import InvalidInput


def _as_float(value: Any) -> Tensor:
    """Own float32 CPU contiguous copy of a tensor, an array or nested lists; refuses what is not finite."""
    try:
        tensor = torch.as_tensor(value).detach().to("cpu", torch.float32, copy=True).contiguous()
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"not numbers: {error}") from error
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError("holds a value that is not finite")
    return tensor


def _as_index(value: Any) -> Tensor:
    """Own int64 CPU contiguous copy; refuses fractions and negative indices."""
    try:
        tensor = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"not indices: {error}") from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError("indices must be whole numbers")
    if bool((tensor < 0).any()):
        raise ValueError("holds a negative index")
    return tensor.to(torch.int64)


Numbers = Annotated[Tensor, BeforeValidator(_as_float)]
Indices = Annotated[Tensor, BeforeValidator(_as_index)]
Layer = Annotated[int, Field(ge=0, strict=True)]
Index = Annotated[int, Field(ge=0, strict=True)]


def describe_problems(error: ValidationError) -> str:
    """Pydantic's findings in one line: where, and what is wrong."""
    found = []
    for problem in error.errors(include_url=False, include_input=False):
        where = ".".join(str(part) for part in problem["loc"])
        found.append(f"{where}: {problem['msg']}" if where else problem["msg"])
    return "; ".join(found)


class OpBase(BaseModel):
    """What all ops share: frozen, unknown keys refused, equal and hashed by content (tensors by their bytes).

    Raises InvalidInput when a value does not fit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    kind: str

    def __init__(self, **data: Any) -> None:
        """Check and own the values; the message of InvalidInput names the field."""
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise InvalidInput(
                f"{type(self).__name__}: {describe_problems(error)}.", hint="See the op's fields in its docstring."
            ) from error

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name, in the order of their declaration."""
        values = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: value for name, value in values if isinstance(value, Tensor)}

    def plain(self) -> dict[str, Any]:
        """The other fields, as JSON takes them."""
        tensors = self.tensors()
        values = {name: getattr(self, name) for name in type(self).model_fields if name not in tensors}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def _content(self) -> tuple[str, bytes]:
        digest = hashlib.sha256()
        for name, tensor in self.tensors().items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor_bytes(tensor))
        return repr(self.plain()), digest.digest()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, OpBase) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values in row-major order, whatever its dtype or strides."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().tobytes())


def _same_length(**fields: tuple[int, ...] | Tensor) -> None:
    lengths = {}
    for name, value in fields.items():
        if isinstance(value, Tensor) and value.dim() != 1:
            raise ValueError(f"{name} must have one dimension, not the shape {tuple(value.shape)}")
        lengths[name] = len(value)
    if len(set(lengths.values())) != 1:
        raise ValueError(f"must be equally long: {lengths}")
    if not min(lengths.values()):
        raise ValueError(f"must not be empty: {', '.join(fields)}")


def _no_repeats(name: str, values: tuple[Any, ...]) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"{name} names one thing twice")


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
        _same_length(neurons=self.neurons, factors=self.factors)
        _no_repeats("neurons", self.neurons)
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
        _same_length(neurons=self.neurons, to_neurons=self.to_neurons, factors=self.factors)
        _no_repeats("the list of paths", tuple(zip(self.neurons, self.to_neurons, strict=True)))
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
        _same_length(heads=self.heads, factors=self.factors)
        _no_repeats("heads", self.heads)
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


# -------------------------------------------------------------------------------------------- ops on activations


def _vector(name: str, value: Tensor) -> None:
    if value.dim() != 1 or not len(value):
        raise ValueError(f"{name} must be a vector, not of shape {tuple(value.shape)}")


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
        _vector("vector", self.vector)
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
        _same_length(neurons=self.neurons, values=self.values)
        _no_repeats("neurons", self.neurons)
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
        _same_length(neurons=self.neurons, gains=self.gains, slopes=self.slopes)
        _no_repeats("neurons", self.neurons)
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
        _vector("direction", self.direction)
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
        _vector("bias", self.bias)
        return self


WeightOp = ScaleNeurons | ScalePaths | ScaleHeads | LowRank | Entries | Dense
ActivationOp = Steer | Clamp | Gain | Ablate | MixHeads | BiasRouter
Op = WeightOp | ActivationOp

_READER: TypeAdapter[Op] = TypeAdapter(Annotated[Op, Field(discriminator="kind")])


def op_from(data: Mapping[str, Any]) -> Op:
    """The op that `data` (fields and `kind`) describes. Raises InvalidInput for an unknown kind, key or value."""
    try:
        return _READER.validate_python(dict(data))
    except ValidationError as error:
        raise InvalidInput(
            f"This is not an op: {describe_problems(error)}.", hint="It may come from a newer liveweight."
        ) from error
