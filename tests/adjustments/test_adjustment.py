"""An adjustment keeps its hash and its bytes on every way through disk, parts and processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liveweight.adjustments import (
    Active,
    Adjustment,
    Entries,
    Gain,
    LowRank,
    Quantize,
    ReplaceNeurons,
    RoundActivations,
    ScaleNeurons,
    ScalePaths,
    Steer,
    effective,
    state_hash,
)
from liveweight.errors import InvalidInput, LedgerDamaged

OPS = (
    ScaleNeurons(layer=0, neurons=(1, 2), factors=torch.tensor([0.5, 1.5])),
    ScalePaths(layer=0, neurons=(1,), to_layer=2, to_neurons=(7,), factors=torch.tensor([0.0]), expert=3),
    LowRank(site="layers.0.mlp.down.weight", left=torch.ones(4, 2), right=torch.arange(6.0).reshape(2, 3)),
    Entries(site="embed.weight", indices=torch.tensor([[0, 1]]), values=torch.tensor([2.0])),
    ReplaceNeurons(layer=1, neurons=(4,), up=torch.ones(1, 2), down=torch.ones(2, 1), gate=torch.zeros(1, 2)),
    ReplaceNeurons(layer=1, neurons=(5,), up=torch.ones(1, 2), down=torch.ones(2, 1), bias=torch.ones(1), expert=1),
    Quantize(sites=("embed.weight",), bits=4, block=(1, 64), clip="z", clip_at=3.0, keep=(("embed.weight", 0, 1),)),
    RoundActivations(site="layers.1.mlp.neurons", bits=8, keep=(3,)),
    Gain(layer=1, neurons=(0,), gains=torch.tensor([2.0]), slopes=torch.tensor([0.5])),
    Steer(site="layers.1.resid", vector=torch.tensor([1.0, -0.0]), when="generated", positions=(4, 5)),
)
ADJUSTMENT = Adjustment(name="Hanoi, not Hoi An", method="rome", ops=OPS, note="ümlaut · 河內")


def test_the_hash_is_the_same_in_another_process() -> None:
    program = (
        "import torch\n"
        "from liveweight.adjustments import Adjustment, ReplaceNeurons, ScaleNeurons\n"
        "scaled = ScaleNeurons(layer=0, neurons=(1, 2), factors=torch.tensor([0.5, 1.5]))\n"
        "parts = {'up': torch.ones(1, 2), 'down': torch.ones(2, 1), 'gate': torch.zeros(1, 2)}\n"
        "replaced = ReplaceNeurons(layer=1, neurons=(4,), **parts)\n"
        "print(Adjustment(name='n', method='m', ops=(scaled, replaced)).hash)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    ops = (OPS[0], *(op for op in OPS if isinstance(op, ReplaceNeurons) and op.gate is not None))
    assert found.stdout.strip() == Adjustment(name="n", method="m", ops=ops).hash


def test_the_hash_names_everything_that_the_adjustment_holds() -> None:
    tree = {"name": "a", "method": "m", "ops": OPS, "note": ""}
    variants = [{}, {"name": "b"}, {"method": "n"}, {"note": "x"}, {"ops": OPS[:-1]}, {"ops": OPS[::-1]}]
    assert len({Adjustment(**tree | change).hash for change in variants}) == len(variants)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    ADJUSTMENT.save(tmp_path / "new" / "folder")
    loaded = Adjustment.load(tmp_path / "new" / "folder")
    assert loaded == ADJUSTMENT and loaded.hash == ADJUSTMENT.hash and loaded.ops == OPS
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "adjustment.json",
        "tensors.safetensors",
    ]
    Adjustment(name="nothing", method="none", ops=()).save(tmp_path / "empty")
    assert Adjustment.load(tmp_path / "empty").ops == ()


def test_taken_apart_and_put_together_it_is_the_same_and_its_tree_is_json() -> None:
    tree, tensors = ADJUSTMENT.to_parts()
    assert Adjustment.from_parts(json.loads(json.dumps(tree)), tensors) == ADJUSTMENT


def test_a_changed_or_missing_part_is_noticed(tmp_path: Path) -> None:
    ADJUSTMENT.save(tmp_path)
    written = (tmp_path / "adjustment.json").read_text("utf-8")
    (tmp_path / "adjustment.json").write_text(written.replace("Hanoi", "Hoi An"), "utf-8")
    with pytest.raises(LedgerDamaged, match="was changed after it was saved"):
        Adjustment.load(tmp_path)
    (tmp_path / "adjustment.json").write_text("{", "utf-8")
    with pytest.raises(InvalidInput, match="No adjustment can be read"):
        Adjustment.load(tmp_path)
    with pytest.raises(InvalidInput, match="nowhere"):
        Adjustment.load(tmp_path / "nowhere")
    tree, tensors = ADJUSTMENT.to_parts()
    with pytest.raises(InvalidInput, match=r"'0\.factors' is missing"):
        Adjustment.from_parts(tree, {})
    with pytest.raises(InvalidInput, match="stray"):
        Adjustment.from_parts(tree, tensors | {"stray": torch.ones(1)})
    with pytest.raises(InvalidInput, match="format 99"):
        Adjustment.from_parts(tree | {"format": 99}, tensors)
    with pytest.raises(InvalidInput, match="author"):
        Adjustment.from_parts(tree | {"author": "x"}, tensors)


def test_a_states_hash_ignores_what_is_off_and_nothing_else() -> None:
    one, other = ADJUSTMENT, Adjustment(name="b", method="m", ops=OPS[:1])
    states = [
        (),
        (Active(one),),
        (Active(one, 0.5),),
        (Active(one, 1.0), Active(other, 1.0)),
        (Active(other, 1.0), Active(one, 1.0)),
    ]
    assert len({state_hash(state) for state in states}) == len(states)
    assert state_hash((Active(one, 0.0), Active(other, -0.0))) == state_hash(())
    assert state_hash((Active(one, 0), Active(other, 1))) == state_hash((Active(other, 1.0),))
    assert effective((Active(one, 0.0), Active(other, 2.0))) == (Active(other, 2.0),)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), float("-inf")])
def test_a_strength_must_be_finite(strength: float) -> None:
    with pytest.raises(InvalidInput, match="not finite"):
        Active(ADJUSTMENT, strength)
