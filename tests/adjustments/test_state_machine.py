"""Invariant 1: weights are a function of the base and the active list, never of how they got there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from liveweight.adjustments import (
    ActivationState,
    Active,
    Adjustment,
    Dense,
    Entries,
    LowRank,
    Op,
    Quantize,
    ReplaceNeurons,
    RoundActivations,
    ScaleHeads,
    ScaleNeurons,
    ScalePaths,
    State,
    Steer,
    WeightState,
    effective,
)
from liveweight.sites import ModelSites, model_sites
from tiny_models import WIDTH, bytes_of, tiny_model

STRENGTHS = st.sampled_from([1.0, 0.5, 0.1, 2.0, -1.0, 1e-3, 0.0])


def adjustments_for(sites: ModelSites) -> list[Adjustment]:
    """Adjustments that meet on the same tensors in every kind of region: whole, rows, columns, entries."""
    random = torch.Generator().manual_seed(7)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    expert, to_expert = (1 if sites.experts_of(layer) else None for layer in (0, 2))
    down, up = sites.mlp_part(0, "down", expert), sites.mlp_part(2, "up", to_expert)
    out, inner = sites.weight(down).shape
    ops: list[tuple[Op, ...]] = [
        (ScaleNeurons(layer=0, neurons=(1, 5), factors=randn(2), expert=expert),),
        (ScaleNeurons(layer=0, neurons=(5, 7), factors=randn(2), expert=expert),),
        (LowRank(site=down, left=randn(out, 2), right=randn(2, inner)),),
        (Entries(site=down, indices=torch.tensor([[0, 5], [3, 3]]), values=randn(2)),),
        (
            ScalePaths(
                layer=0,
                neurons=(5, 1, 1),
                to_layer=2,
                to_neurons=(0, 0, 3),
                factors=randn(3),
                expert=expert,
                to_expert=to_expert,
            ),
            Dense(site=up, delta=0.1 * randn(*sites.weight(up).shape)),
        ),
        (Entries(site=up, indices=torch.tensor([[0, 1], [4, 2]]), values=randn(2)),),
        (ScaleHeads(layer=1, heads=(0, 3), factors=randn(2)), Steer(site="layers.1.resid", vector=randn(WIDTH))),
        (
            Dense(site="lm_head.weight", delta=1e-3 * randn(*sites.weight("lm_head.weight").shape)),
            Entries(site="embed.weight", indices=torch.tensor([[4, 4], [5, 5]]), values=randn(2)),
        ),
    ]
    for neurons in ((5, 9), (0, 5)):
        fields = {"up": randn(2, WIDTH), "down": randn(WIDTH, 2), "gate": randn(2, WIDTH) if sites.gated else None}
        fields["bias"] = randn(2) if sites.has_weight("layers.0.mlp.up.bias") else None
        ops.append((ReplaceNeurons(layer=0, neurons=neurons, expert=expert, **fields),))
    ops += [
        (Quantize(sites=(down, up, "lm_head.weight"), bits=4, block=(5, 7), keep=((down, 3, 3),)),),
        (
            Quantize(sites=(down,), bits=3, block=(64, 64), clip="z", clip_at=2.0, keep=((down, 0, 5),)),
            RoundActivations(site="layers.1.attn.heads", bits=8, keep=(3,)),
        ),
        (Quantize(sites=(up,), bits=8, block=(1, 9), clip="percentile", clip_at=90.0),),
    ]
    if sites.gated:
        rows = ScaleNeurons(layer=2, neurons=(0, 9), factors=randn(2), side="read", expert=to_expert)
        ops.append((rows, Dense(site="final_norm.weight", delta=randn(WIDTH))))
    return [Adjustment(name=f"number {number}", method="test", ops=each) for number, each in enumerate(ops)]


class Journal(RuleBasedStateMachine):
    """What a person may do to a ledger, against one live model."""

    architecture: str
    dtype: torch.dtype
    base: dict[str, bytes]
    offered: list[Adjustment]

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Active, bool]] = []  # in the ledger's order, with whether each is on
        self.load()

    def load(self) -> None:
        self.model = tiny_model(self.architecture, self.dtype)
        self.sites = model_sites(self.model)
        self.weights = WeightState(self.sites)
        self.activations = ActivationState(self.sites)

    def state(self) -> State:
        return tuple(active if on else Active(active.adjustment, 0.0) for active, on in self.entries)

    def become(self) -> None:
        self.weights.become(self.state())
        self.activations.become(self.state())

    @rule(which=st.integers(0, 13), strength=STRENGTHS)
    def apply(self, which: int, strength: float) -> None:
        self.entries.append((Active(self.offered[which % len(self.offered)], strength), True))
        self.become()

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def undo(self, data: st.DataObject) -> None:
        self.entries.pop(data.draw(st.integers(0, len(self.entries) - 1)))
        self.become()

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def switch_off_or_on(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.entries) - 1))
        active, on = self.entries[number]
        self.entries[number] = (active, not on)
        self.become()

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), strength=STRENGTHS)
    def set_strength(self, data: st.DataObject, strength: float) -> None:
        number = data.draw(st.integers(0, len(self.entries) - 1))
        active, on = self.entries[number]
        self.entries[number] = (Active(active.adjustment, strength), on)
        self.become()

    @precondition(lambda self: len(self.entries) > 1)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        self.entries = data.draw(st.permutations(self.entries))
        self.become()

    @rule()
    def clear(self) -> None:
        self.entries = []
        self.become()

    @rule()
    def reload(self) -> None:
        self.load()
        self.become()

    @precondition(lambda self: self.entries)
    @rule()
    def preview_of_nothing(self) -> None:
        with self.weights.preview(()):
            assert bytes_of(self.model) == self.base

    @invariant()
    def the_bytes_are_those_of_a_fresh_model_given_the_active_list(self) -> None:
        found = bytes_of(self.model)
        active = effective(self.state())
        if not active:
            assert found == self.base
            assert self.weights.pristine_bytes == 0 == self.activations.hooks
            return
        fresh = tiny_model(self.architecture, self.dtype)
        WeightState(model_sites(fresh)).become(active)
        assert found == bytes_of(fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama_tied", "mixtral", "gpt2"])
def test_after_any_sequence_of_changes_the_weights_are_those_of_the_active_list(
    architecture: str, dtype: torch.dtype
) -> None:
    model = tiny_model(architecture, dtype)
    parts: dict[str, Any] = {
        "architecture": architecture,
        "dtype": dtype,
        "base": bytes_of(model),
        "offered": adjustments_for(model_sites(model)),
    }
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        type("JournalOf" + architecture, (Journal,), parts),
        settings=settings(
            max_examples=12,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
