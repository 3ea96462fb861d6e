"""One write path for every device: a GPU where there is one; elsewhere a second copy on the CPU stands for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liveweight.adjustments import Active, Adjustment, Dense, Entries, LowRank, ReplaceNeurons, State, WeightState
from liveweight.adjustments.ops import ScaleNeurons
from liveweight.errors import Unsupported
from liveweight.sites import Region, model_sites
from liveweight.sites.views import WHOLE, region
from liveweight.sites.writing import write
from tests.adjustments.expected_weights import randn
from tiny_models import NEURONS, WIDTH, logits_of, tiny_model, tiny_tokens

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
on_every_device = pytest.mark.parametrize("device", DEVICES)
DOWN = "layers.1.mlp.down.weight"
OFFERED = [
    Adjustment(name=str(number), method="test", ops=(op,))
    for number, op in enumerate(
        [
            ScaleNeurons(layer=1, neurons=(4, 7), factors=randn(2)),
            ScaleNeurons(layer=1, neurons=(7,), factors=randn(1), side="read"),
            LowRank(site=DOWN, left=randn(WIDTH, 2), right=randn(2, NEURONS)),
            Dense(site=DOWN, delta=randn(WIDTH, NEURONS)),
            Entries(site=DOWN, indices=torch.tensor([[0, 4], [3, 3]]), values=randn(2)),
            ReplaceNeurons(layer=1, neurons=(9,), up=randn(1, WIDTH), gate=randn(1, WIDTH), down=randn(WIDTH, 1)),
        ]
    )
]
STEPS = st.lists(
    st.lists(st.tuples(st.integers(0, len(OFFERED) - 1), st.sampled_from([1.0, 0.3, -1.0, 0.0])), max_size=3),
    min_size=1,
    max_size=4,
)


def copy_on(device: str, dtype: torch.dtype) -> tuple[Any, WeightState]:
    model = tiny_model("llama", dtype).to(device)
    return model, WeightState(model_sites(model))


def state_of(step: list[tuple[int, float]]) -> State:
    return tuple(Active(OFFERED[number], strength) for number, strength in step)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(steps=STEPS)
def test_two_copies_in_lockstep_hold_the_same_bytes_at_the_same_addresses(
    device: str, dtype: torch.dtype, steps: list[list[tuple[int, float]]]
) -> None:
    one, host = copy_on("cpu", dtype)
    other, there = copy_on(device, dtype)
    addresses = [parameter.data_ptr() for parameter in other.parameters()]
    identities = [id(parameter) for parameter in other.parameters()]
    for step in [*steps, []]:
        assert host.become(state_of(step)) == there.become(state_of(step))
        for left, right in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(left, right.cpu())
        assert [parameter.data_ptr() for parameter in other.parameters()] == addresses
        assert [id(parameter) for parameter in other.parameters()] == identities
        assert host.travelled == there.travelled
        assert all(held.values.device.type == "cpu" for held in there._held.values())
    assert there.pristine_bytes == 0
    fresh = tiny_model("llama", dtype)
    for left, right in zip(fresh.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right.cpu())


@on_every_device
@pytest.mark.parametrize("rows_a_head", [0, 4])
def test_a_write_reaches_its_region_and_nothing_else_in_place(device: str, rows_a_head: int) -> None:
    base = randn(12, 10)
    regions: list[Region] = [
        WHOLE,
        region("rows", [11, 2]),
        region("columns", [0, 9, 4]),
        region("entries", [0, 119, 37]),
    ]
    for where in regions:
        target = base.clone().to(device)
        native = target.view(3, 4, 10) if rows_a_head else target
        wished, address = base.clone(), target.data_ptr()
        index = where.index
        if index is None:
            values = randn(12, 10, seed=1)
            wished.copy_(values)
        elif where.kind == "rows":
            values = randn(len(index), 10, seed=1)
            wished[index] = values
        elif where.kind == "columns":
            values = randn(12, len(index), seed=1)
            wished[:, index] = values
        else:
            values = randn(len(index), seed=1)
            wished.view(-1)[index] = values
        write(native, where, values, head_rows=rows_a_head)
        assert torch.equal(target.cpu(), wished), where.kind
        assert target.data_ptr() == address


def test_of_a_column_only_the_column_travels_and_of_a_low_rank_change_its_factors_and_the_kept_base() -> None:
    _, weights = copy_on("cpu", torch.float32)
    spent = []
    for adjustment in (OFFERED[0], OFFERED[2]):
        for state in ((Active(adjustment),), ()):
            before = weights.travelled
            weights.become(state)
            spent.append(weights.travelled - before)
    columns, matrix = 2 * WIDTH * 4, WIDTH * NEURONS * 4
    index, factors = 2 * 8, 2 * 4
    # To apply: the op's numbers and the index go, the base's values come; to undo: the index and those values go.
    assert spent == [columns + index + factors, columns + index, matrix + 2 * (WIDTH + NEURONS) * 4, matrix]


@on_every_device
def test_a_forward_pass_sees_a_write_and_its_undo(device: str) -> None:
    model, weights = copy_on(device, torch.float32)
    tokens = tiny_tokens().to(device)
    before = logits_of(model, tokens)
    with weights.preview(state_of([(2, 1.0)])):
        assert not torch.allclose(logits_of(model, tokens), before, atol=1e-3)
    assert torch.equal(logits_of(model, tokens), before)


if torch.cuda.is_available():

    def test_a_captured_graph_sees_a_write() -> None:
        weight = torch.nn.Parameter(randn(8, 8).cuda(), requires_grad=False)
        values, out = randn(8, 8, seed=1).cuda(), torch.empty(8, 8, device="cuda")
        graph = torch.cuda.CUDAGraph()
        torch.mm(values, weight, out=out)  # warms up
        with torch.cuda.graph(graph):
            torch.mm(values, weight, out=out)
        write(weight.detach(), region("columns", [3]), torch.zeros(8, 1))
        graph.replay()
        torch.cuda.synchronize()
        assert not out[:, 3].any()


# -------------------------------------------------------------------------------- runtimes that would not see a write


class _Packed(torch.nn.Linear):
    """A linear layer as a quantising library would put it in place."""


_Packed.__module__ = "bitsandbytes.nn.modules"


class _Offload:
    offload = True


def _sabotage(model: Any, how: str) -> None:
    layer = model.model.layers[1].mlp
    match how:
        case "compiled":
            layer.compile()
        case "wrapped":
            model.model.layers[1].mlp = torch.compile(layer)
        case "packed":
            layer.down_proj.__class__ = _Packed
        case "offloaded":
            layer.down_proj._hf_hook = _Offload()
        case "parametrized":
            torch.nn.utils.parametrizations.orthogonal(layer.down_proj)
        case "inference":
            with torch.inference_mode():
                layer.down_proj.weight = torch.nn.Parameter(torch.zeros(WIDTH, NEURONS), requires_grad=False)
        case "integers":
            weight = torch.zeros(WIDTH, NEURONS, dtype=torch.int8)
            layer.down_proj.weight = torch.nn.Parameter(weight, requires_grad=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own, when it imports its compiler
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("compiled", "torch.compile"),
        ("wrapped", "torch.compile"),
        ("packed", "bitsandbytes"),
        ("offloaded", "offloaded by accelerate"),
        ("parametrized", "parametrization"),
        ("inference", "inference mode"),
        ("integers", "torch.int8"),
    ],
)
def test_a_runtime_that_would_not_see_a_change_is_refused_by_name_at_the_start_and_later(how: str, says: str) -> None:
    model = tiny_model("llama")
    weights = WeightState(model_sites(model))
    _sabotage(model, how)
    with pytest.raises(Unsupported, match=says):
        weights.become(state_of([(0, 1.0)]))
    with pytest.raises(Unsupported, match=says):
        model_sites(model)
