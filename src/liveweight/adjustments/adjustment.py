"""An adjustment: a named list of ops, and its form on disk.

Owns the value that methods propose, that the ledger keeps and that engines become: its hash, its two files, and the
pair (adjustment, strength) of which a state is made. Knows nothing of models, and holds no time and no id: the same
proposal has the same hash wherever and whenever it was made.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from liveweight.adjustments.op_base import describe_problems, tensor_bytes
from liveweight.adjustments.ops import ActivationOp, Op, WeightOp, op_from
from liveweight.errors import InvalidInput, LedgerDamaged

FORMAT = 1  # of adjustment.json; raised when an older reader would misunderstand
_REFERENCE = "$tensor"  # {"$tensor": "0.factors"} in the JSON stands for that tensor
_TREE = "adjustment.json"
_TENSORS = "tensors.safetensors"


class Adjustment(BaseModel):
    """A named list of ops, as a method proposed it. Raises InvalidInput when a value does not fit."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    name: str
    method: str
    ops: tuple[Op, ...]
    note: str = ""

    def __init__(self, **data: Any) -> None:
        """Check and own the values."""
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise InvalidInput(
                f"This is not an adjustment: {describe_problems(error)}.", hint="It needs a name, a method and ops."
            ) from error

    @property
    def weight_ops(self) -> tuple[WeightOp, ...]:
        """The ops that change weights, in order."""
        return tuple(op for op in self.ops if isinstance(op, WeightOp))

    @property
    def activation_ops(self) -> tuple[ActivationOp, ...]:
        """The ops that act while the model runs, in order."""
        return tuple(op for op in self.ops if isinstance(op, ActivationOp))

    @cached_property
    def hash(self) -> str:
        """sha256 over the canonical JSON and every tensor's bytes; the same in every process."""
        tree, tensors = self.to_parts()
        digest = hashlib.sha256(_canonical(tree))
        for name in sorted(tensors):
            tensor = tensors[name]
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adjustment) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    def to_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What JSON can hold, and the tensors that it refers to by name (`<op>.<field>`)."""
        tensors: dict[str, Tensor] = {}
        ops: list[dict[str, Any]] = []
        for number, op in enumerate(self.ops):
            fields = op.plain()
            for field, tensor in op.tensors().items():
                key = f"{number}.{field}"
                tensors[key] = tensor
                fields[field] = {_REFERENCE: key}
            ops.append(fields)
        return {"format": FORMAT, "name": self.name, "method": self.method, "note": self.note, "ops": ops}, tensors

    @classmethod
    def from_parts(cls, tree: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adjustment:
        """The adjustment that `to_parts` took apart.

        Raises InvalidInput for an unknown format, key, op or a missing or unused tensor.
        """
        fields = dict(tree)
        found = fields.pop("format", None)
        if found != FORMAT:
            raise InvalidInput(
                f"An adjustment of format {found!r} cannot be read; this liveweight reads format {FORMAT}.",
                hint="Use the liveweight that wrote it.",
            )
        written = fields.pop("ops", None)
        if not isinstance(written, list | tuple) or not all(isinstance(entry, Mapping) for entry in written):
            raise InvalidInput("The adjustment's ops are not a list.", hint="Is this the file that `save` wrote?")
        used: set[str] = set()
        ops: list[Op] = []
        for entry in written:
            values: dict[str, Any] = {}
            for field, value in entry.items():
                if isinstance(value, Mapping) and set(value) == {_REFERENCE}:
                    key = str(value[_REFERENCE])
                    if key not in tensors:
                        raise InvalidInput(f"The adjustment's tensor {key!r} is missing.", hint="Restore both files.")
                    used.add(key)
                    values[field] = tensors[key]
                else:
                    values[field] = value
            ops.append(op_from(values))
        if unused := sorted(set(tensors) - used):
            raise InvalidInput(f"No op of the adjustment uses the tensor {unused[0]!r}.", hint="Restore both files.")
        return cls(**fields, ops=tuple(ops))

    def save(self, folder: Path | str) -> None:
        """Write adjustment.json and tensors.safetensors into `folder`, made if missing."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        tree, tensors = self.to_parts()
        save_file(tensors, target / _TENSORS, metadata={"hash": self.hash})
        text = json.dumps(tree | {"hash": self.hash}, indent=2, ensure_ascii=False)
        (target / _TREE).write_text(text + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> Adjustment:
        """The adjustment that `save` wrote into `folder`.

        Raises InvalidInput when the files are missing or not an adjustment, LedgerDamaged when their hash differs.
        """
        source = Path(folder)
        try:
            tree = json.loads((source / _TREE).read_text("utf-8"))
            tensors = load_file(source / _TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise InvalidInput(
                f"No adjustment can be read from {source}: {error}.", hint=f"It must hold {_TREE} and {_TENSORS}."
            ) from error
        if not isinstance(tree, dict):
            raise InvalidInput(f"{source / _TREE} is not an adjustment.", hint="Is this the file that `save` wrote?")
        wished = tree.pop("hash", None)
        adjustment = cls.from_parts(tree, tensors)
        if wished != adjustment.hash:
            raise LedgerDamaged(
                f"The adjustment in {source} has the hash {adjustment.hash[:12]}, not {str(wished)[:12]} as written.",
                hint="A file was changed after it was saved; restore it.",
            )
        return adjustment


@dataclass(frozen=True)
class Active:
    """An adjustment at a strength: 1 is as proposed, 0 is off. Raises InvalidInput when not finite."""

    adjustment: Adjustment
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise InvalidInput(
                f"The strength {self.strength} is not finite.", hint="Use a number such as 1 (as proposed) or 0 (off)."
            )


State = tuple[Active, ...]  # in the ledger's order


def effective(state: State) -> State:
    """The state without what is off: strength 0 is the same as not being there."""
    return tuple(active for active in state if active.strength != 0 and active.adjustment.ops)


def state_hash(state: State) -> str:
    """sha256 that names what a state does to a model; strength 0 leaves no mark in it."""
    pairs = [[active.adjustment.hash, float(active.strength).hex()] for active in effective(state)]
    return hashlib.sha256(_canonical(pairs)).hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
