"""What all ops share, whatever they change: the checks of their numbers, equality by content, errors in one line.

Owns the types of an op's fields. Knows no op.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, WithJsonSchema
from torch import Tensor

from liveweight.errors import InvalidInput


def _as_float(value: Any) -> Tensor:
    """Own float32 CPU contiguous copy of a tensor, an array or nested lists; refuses what is not finite."""
    try:
        tensor = torch.as_tensor(value).detach().to("cpu", torch.float32)
        # `contiguous` would leave a stride of 0 where there is one element, and its bytes could not be read.
        tensor = tensor.clone(memory_format=torch.contiguous_format)
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


def _written(kind: str, what: str) -> tuple[PlainSerializer, WithJsonSchema]:
    """As JSON has it: lists in lists, one level for each dimension."""
    entry = {"anyOf": [{"type": kind}, {"type": "array", "items": {"type": kind}}]}
    schema = {"type": "array", "items": entry, "description": f"{what}, row by row where there are rows."}
    return PlainSerializer(lambda tensor: tensor.tolist(), when_used="json"), WithJsonSchema(schema)


Numbers = Annotated[Tensor, BeforeValidator(_as_float), *_written("number", "Numbers")]
Indices = Annotated[Tensor, BeforeValidator(_as_index), *_written("integer", "Indices")]
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


def check_same_length(**fields: tuple[int, ...] | Tensor) -> None:
    """Raises ValueError naming the fields unless all are lists or vectors of one length above 0."""
    lengths = {}
    for name, value in fields.items():
        if isinstance(value, Tensor) and value.dim() != 1:
            raise ValueError(f"{name} must have one dimension, not the shape {tuple(value.shape)}")
        lengths[name] = len(value)
    if len(set(lengths.values())) != 1:
        raise ValueError(f"must be equally long: {lengths}")
    if not min(lengths.values()):
        raise ValueError(f"must not be empty: {', '.join(fields)}")


def check_no_repeats(name: str, values: tuple[Any, ...]) -> None:
    """Raises ValueError where a list names one thing twice."""
    if len(set(values)) != len(values):
        raise ValueError(f"{name} names one thing twice")


def check_vector(name: str, value: Tensor) -> None:
    """Raises ValueError unless the value is a vector that is not empty."""
    if value.dim() != 1 or not len(value):
        raise ValueError(f"{name} must be a vector, not of shape {tuple(value.shape)}")
