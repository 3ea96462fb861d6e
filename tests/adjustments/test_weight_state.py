"""Each weight op does what it says at the named place and nothing anywhere else, and can be taken back exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from liveweight.adjustments import (
    Active,
    Dense,
    Entries,
    LowRank,
    ScaleHeads,
    ScaleNeurons,
    ScalePaths,
    Steer,
    WeightOp,
    WeightState,
    first_layer,
    last_layer,
)
from liveweight.errors import InvalidInput, UnknownSite, Unsupported
from liveweight.sites import model_sites
from tests.adjustments.expected_weights import expect_only, expert_in, randn, state_of
from tiny_models import ARCHITECTURES, HEADS, LAYERS, VOCABULARY, WIDTH, bytes_of, logits_of, tiny_model, tiny_tokens

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@every_architecture
def test_scaling_neurons_on_the_write_side_scales_their_columns_of_down(name: str) -> None:
    sites = model_sites(tiny_model(name))
    expert = expert_in(sites, 0)
    factors = torch.ones(sites.neurons_of(0))
    factors[[5, 2]] = torch.tensor([0.0, 3.0])
    op = ScaleNeurons(layer=0, neurons=(5, 2), factors=factors[[5, 2]], expert=expert)
    expect_only(sites, op, {sites.mlp_part(0, "down", expert): lambda base, s: base * (1 + s * (factors - 1))})


@every_architecture
def test_scaling_neurons_on_the_read_side_scales_their_rows_of_up_and_is_the_same_function(name: str) -> None:
    model = tiny_model(name)
    sites = model_sites(model)
    expert = expert_in(sites, 0)
    reading, writing = (
        ScaleNeurons(layer=0, neurons=(5, 2), factors=torch.tensor([0.0, 3.0]), side=side, expert=expert)
        for side in ("read", "write")
    )
    weights = WeightState(sites)
    if not sites.gated:
        with pytest.raises(Unsupported, match="no gate"):
            weights.become(state_of(reading))
        return
    factors = torch.ones(sites.neurons_of(0))
    factors[[5, 2]] = torch.tensor([0.0, 3.0])
    up = sites.mlp_part(0, "up", expert)
    wished: dict[str, Callable[[Tensor, float], Tensor]] = {up: lambda base, s: base * (1 + s * (factors[:, None] - 1))}
    if sites.has_weight("layers.0.mlp.up.bias"):
        wished["layers.0.mlp.up.bias"] = lambda base, s: base * (1 + s * (factors - 1))
    expect_only(sites, reading, wished)
    weights.become(state_of(reading, strength=0.7))
    read = logits_of(model, tiny_tokens())
    weights.become(state_of(writing, strength=0.7))
    assert torch.allclose(read, logits_of(model, tiny_tokens()), atol=2e-5)


@every_architecture
def test_scaling_heads_scales_their_columns_of_o(name: str) -> None:
    sites = model_sites(tiny_model(name))
    factors = torch.ones(HEADS)
    factors[[3, 1]] = torch.tensor([0.5, -2.0])
    columns = factors.repeat_interleave(sites.head_dim)
    op = ScaleHeads(layer=1, heads=(3, 1), factors=factors[[3, 1]])
    expect_only(sites, op, {"layers.1.attn.o.weight": lambda base, s: base * (1 + s * (columns - 1))})


@every_architecture
def test_scaling_paths_scales_exactly_those_virtual_weights_by_the_smallest_change(name: str) -> None:
    sites = model_sites(tiny_model(name))
    expert, to_expert = expert_in(sites, 0), expert_in(sites, 2)
    writers, readers, factors = (4, 7, 4, 9), (1, 1, 3, 1), torch.tensor([0.0, 0.5, 2.0, 1.0])
    columns = sites.weight(sites.mlp_part(0, "down", expert)).read().T[[4, 7, 9]].double()
    for site, part in (("layers.0.mlp_post_norm.weight", "post"), ("layers.2.mlp_norm.weight", "pre")):
        if sites.has_weight(site):
            weight = sites.weight(site).read().double()
            if part == "pre" and not sites.gated:  # a layer norm takes the mean away first
                columns = columns - columns.mean(1, keepdim=True)
            columns = columns * (weight + 1 if "gemma" in name else weight)
    seen = dict(zip((4, 7, 9), columns, strict=True))
    op = ScalePaths(
        layer=0, neurons=writers, to_layer=2, to_neurons=readers, factors=factors, expert=expert, to_expert=to_expert
    )

    def check(base: Tensor, strength: float) -> Tensor:
        new = base.clone()
        one = seen[4]  # the only path into neuron 3: the closed form
        row = base[3].double()
        new[3] = (row - strength * (1 - 2.0) * (row @ one) / (one @ one) * one).float()
        into = torch.stack([seen[4], seen[7], seen[9]])
        row, share = base[1].double(), 1 - torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        new[1] = (row - into.T @ torch.linalg.solve(into @ into.T, strength * share * (into @ row))).float()
        wanted = (1 - strength * share) * (into @ row)
        assert torch.allclose(into @ new[1].double(), wanted, atol=1e-5)
        return new

    parts = ("gate", "up") if sites.gated else ("up",)
    expect_only(sites, op, {sites.mlp_part(2, part, to_expert): check for part in parts})


@every_architecture
def test_a_low_rank_op_adds_its_product_to_any_matrix(name: str) -> None:
    sites = model_sites(tiny_model(name))
    for number, site in enumerate(sites.weight_names()):
        shape = sites.weight(site).shape
        if len(shape) == 2 and (".1." in site or not site.startswith("layers.")):
            left, right = randn(shape[0], 3, seed=number), randn(3, shape[1], seed=number + 1)
            op = LowRank(site=site, left=left, right=right)
            expect_only(sites, op, {site: lambda base, s, left=left, right=right: base + s * (left @ right)})


def test_a_large_low_rank_change_has_the_same_bytes_with_any_number_of_threads_and_any_history() -> None:
    sizes = {"vocab_size": 2500, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0)
    weight = 0.1 * randn(2500, 64)
    one, other = (
        state_of(LowRank(site="embed.weight", left=randn(2500, 3, seed=seed), right=randn(3, 64, seed=seed + 1)))
        for seed in (1, 3)
    )
    found: set[bytes] = set()
    threads = torch.get_num_threads()
    try:
        for number, history in itertools.product((1, 2, 3), ((one + other,), (one, one + other), (other, one + other))):
            torch.set_num_threads(number)
            sites = model_sites(LlamaForCausalLM(config))
            sites.weight("embed.weight").write(weight)
            weights = WeightState(sites)
            for state in history:
                weights.become(state)
            found.add(bytes_of(sites.model)["model.embed_tokens.weight"])
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
    ops = [op for active in one + other for op in active.adjustment.ops if isinstance(op, LowRank)]
    wished = weight + sum(op.left @ op.right for op in ops)
    assert torch.allclose(
        torch.frombuffer(bytearray(found.pop()), dtype=torch.float32).view(2500, 64), wished, atol=1e-5
    )


@every_architecture
def test_entries_are_set_and_dense_deltas_added_at_every_site(name: str) -> None:
    sites = model_sites(tiny_model(name))
    for number, site in enumerate(sites.weight_names()):
        if site.startswith("layers.") and ".1." not in site:
            continue
        shape = sites.weight(site).shape
        indices = torch.tensor([[shape[0] - 1, 2], [0, 1], [1, 0]])[:, : len(shape)]
        values = randn(3, seed=number)

        def entries(base: Tensor, s: float, indices: Tensor = indices, values: Tensor = values) -> Tensor:
            new = base.clone()
            for place, value in zip(indices.tolist(), values.tolist(), strict=True):
                new[tuple(place)] += s * (value - new[tuple(place)])
            return new

        expect_only(sites, Entries(site=site, indices=indices, values=values), {site: entries})
        delta = randn(*shape, seed=number)
        expect_only(sites, Dense(site=site, delta=delta), {site: lambda base, s, delta=delta: base + s * delta})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_entry_set_at_full_strength_holds_exactly_that_value(dtype: torch.dtype) -> None:
    sites = model_sites(tiny_model("phi3", dtype))
    op = Entries(site="layers.2.mlp.up.weight", indices=torch.tensor([[39, 23]]), values=torch.tensor([0.1]))
    WeightState(sites).become(state_of(op))
    assert sites.weight("layers.2.mlp.up.weight").read()[39, 23] == torch.tensor(0.1).to(dtype)


BAD_OPS: list[tuple[str, WeightOp, type[Exception], str]] = [
    ("llama", ScaleNeurons(layer=9, neurons=(0,), factors=torch.ones(1)), UnknownSite, "layer 9.*0 to 2"),
    ("llama", ScaleNeurons(layer=0, neurons=(0, 40), factors=torch.ones(2)), UnknownSite, "neuron 40.*0 to 39"),
    ("llama", ScaleNeurons(layer=0, neurons=(0,), factors=torch.ones(1), expert=1), UnknownSite, "no experts"),
    ("olmoe", ScaleNeurons(layer=0, neurons=(0,), factors=torch.ones(1)), UnknownSite, "none was named"),
    ("olmoe", ScaleNeurons(layer=0, neurons=(0,), factors=torch.ones(1), expert=5), UnknownSite, "expert 5"),
    ("gpt2", ScaleHeads(layer=0, heads=(4,), factors=torch.ones(1)), UnknownSite, "head 4.*0 to 3"),
    (
        "llama",
        ScalePaths(layer=0, neurons=(0,), to_layer=1, to_neurons=(77,), factors=torch.zeros(1)),
        UnknownSite,
        "neuron 77",
    ),
    ("llama", Dense(site="layers.0.mlp.gate.bias2", delta=torch.ones(2)), UnknownSite, "gate.bias2"),
    ("llama", Dense(site="layers.0.resid", delta=torch.ones(2)), UnknownSite, "is an activation"),
    ("llama", Dense(site="embed.weight", delta=torch.ones(WIDTH, VOCABULARY)), InvalidInput, r"\(61, 24\)"),
    ("llama", LowRank(site="embed.weight", left=torch.ones(61, 1), right=torch.ones(1, 9)), InvalidInput, r"61, 9"),
    (
        "llama",
        Entries(site="embed.weight", indices=torch.tensor([[61, 0]]), values=torch.ones(1)),
        InvalidInput,
        r"no entry \[61, 0\]",
    ),
    ("llama", Entries(site="embed.weight", indices=torch.tensor([[1]]), values=torch.ones(1)), InvalidInput, "n, 2"),
    ("llama", Dense(site="embed.weight", delta=torch.full((61, 24), 3e38)), InvalidInput, "would not be finite"),
]


@pytest.mark.parametrize(("name", "op", "error", "says"), BAD_OPS)
def test_an_op_that_does_not_fit_is_refused_and_the_state_is_as_before(
    name: str, op: WeightOp, error: type[Exception], says: str
) -> None:
    model = tiny_model(name)
    sites = model_sites(model)
    weights = WeightState(sites)
    good = Dense(site="layers.2.attn.o.weight", delta=torch.ones(sites.weight("layers.2.attn.o.weight").shape))
    weights.become(state_of(good))
    before, kept = bytes_of(model), weights.pristine_bytes
    other = Dense(site="final_norm.weight", delta=torch.ones(WIDTH))
    with pytest.raises(error, match=says):
        weights.become((*state_of(good, other), *state_of(op, strength=2.0)))
    assert bytes_of(model) == before and weights.pristine_bytes == kept and weights.state == state_of(good)
    weights.become(())
    assert bytes_of(model) == bytes_of(tiny_model(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [2.0, -2.0])
def test_a_single_weight_that_would_not_be_finite_is_refused(dtype: torch.dtype, strength: float) -> None:
    model = tiny_model("qwen3", dtype)
    op = Entries(site="layers.1.mlp.up.weight", indices=[[3, 2], [4, 1]], values=[torch.finfo(dtype).max, 0.0])
    for ops in ((op,), (op, LowRank(site=op.site, left=torch.ones(40, 1), right=torch.ones(1, WIDTH)))):
        with pytest.raises(InvalidInput, match="would not be finite"):
            WeightState(model_sites(model)).become(state_of(*ops, strength=strength))
    assert bytes_of(model) == bytes_of(tiny_model("qwen3", dtype))


def test_an_interrupt_in_the_middle_of_writing_leaves_the_state_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.bfloat16)
    sites = model_sites(model)
    weights = WeightState(sites)
    first = state_of(ScaleHeads(layer=0, heads=(1,), factors=torch.zeros(1)))
    second = state_of(*(Dense(site=f"layers.{layer}.attn.o.bias", delta=torch.ones(WIDTH)) for layer in range(LAYERS)))
    weights.become(first)
    before = bytes_of(model)
    view = type(sites.weight("embed.weight"))
    write, calls = view.write, []

    def interrupted(self: object, *args: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(view, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.become(second)
    monkeypatch.undo()
    assert len(calls) > 3, "the sites already written were written back"
    assert bytes_of(model) == before and weights.state == first
    weights.become(())
    assert bytes_of(model) == bytes_of(tiny_model("llama", torch.bfloat16)) and weights.pristine_bytes == 0


def test_only_the_sites_that_differ_are_rewritten() -> None:
    sites = model_sites(tiny_model("llama"))
    weights = WeightState(sites)
    heads = state_of(ScaleHeads(layer=0, heads=(1,), factors=torch.zeros(1)))
    bias = state_of(Dense(site="layers.2.attn.o.bias", delta=torch.ones(WIDTH)))
    assert weights.become(heads) == ["layers.0.attn.o.weight"]
    assert weights.become(heads) == []
    assert weights.become(heads + bias) == ["layers.2.attn.o.bias"]
    assert weights.become(bias + heads) == []
    assert weights.become(bias) == ["layers.0.attn.o.weight"]
    assert weights.become(()) == ["layers.2.attn.o.bias"]


def test_ops_on_both_names_of_a_tied_tensor_compose_and_come_off_separately() -> None:
    model = tiny_model("llama_tied")
    sites = model_sites(model)
    weights = WeightState(sites)
    base = sites.weight("embed.weight").read().clone()
    one, other = (randn(VOCABULARY, WIDTH, seed=seed) for seed in (1, 2))
    head = state_of(Dense(site="lm_head.weight", delta=one))
    embed = state_of(Dense(site="embed.weight", delta=other))
    assert weights.become(head + embed) == ["embed.weight"]
    assert torch.equal(sites.weight("lm_head.weight").read(), base + one + other)
    weights.become(embed)
    assert torch.equal(sites.weight("lm_head.weight").read(), base + other)
    weights.become(())
    assert torch.equal(sites.weight("embed.weight").read(), base)


def test_only_the_touched_regions_are_kept() -> None:
    sites = model_sites(tiny_model("llama"))
    weights = WeightState(sites)
    weights.become(state_of(ScaleNeurons(layer=0, neurons=(1, 2), factors=torch.zeros(2))))
    assert weights.pristine_bytes == 2 * WIDTH * 4
    entries = Entries(site="embed.weight", indices=torch.tensor([[0, 0]]), values=torch.ones(1))
    weights.become(state_of(entries))
    assert weights.pristine_bytes == 4


def test_a_preview_is_gone_when_its_block_ends_also_by_an_error() -> None:
    model = tiny_model("olmo2")
    weights = WeightState(model_sites(model))
    weights.become(state_of(ScaleHeads(layer=0, heads=(1,), factors=torch.zeros(1))))
    before = bytes_of(model)
    with weights.preview(state_of(Dense(site="final_norm.weight", delta=torch.ones(WIDTH)))) as rewritten:
        assert set(rewritten) == {"final_norm.weight", "layers.0.attn.o.weight"}
        assert bytes_of(model) != before
    assert bytes_of(model) == before
    with pytest.raises(KeyError), weights.preview(()):
        raise KeyError
    assert bytes_of(model) == before


def test_survival_is_the_share_of_the_changed_entries_that_rounding_left_changed() -> None:
    delta = torch.zeros(WIDTH)
    delta[:6] = torch.tensor([1.0, 1.0, 1.0, 1e-6, 1e-6, 1e-6])
    active = state_of(Dense(site="final_norm.weight", delta=delta))[0]
    precise, coarse = (
        WeightState(model_sites(tiny_model("llama", dtype))) for dtype in (torch.float32, torch.bfloat16)
    )
    assert precise.survival(active) == 1.0
    assert coarse.survival(active) == 0.5
    coarse.become((active,))
    assert coarse.survival(active) == 0.5, "measured on the base, whatever is active"
    assert coarse.survival(state_of(Steer(site="embed", vector=torch.ones(WIDTH)))[0]) == 1.0


def test_the_base_can_be_read_whatever_is_active() -> None:
    sites = model_sites(tiny_model("gpt_neox", torch.bfloat16))
    base = sites.weight("layers.1.attn.q.weight").read().float()
    weights = WeightState(sites)
    weights.become(state_of(Dense(site="layers.1.attn.q.weight", delta=torch.ones(base.shape))))
    assert torch.equal(weights.base("layers.1.attn.q.weight"), base)


def test_the_first_layer_that_differs_is_where_a_forward_pass_must_start_again() -> None:
    weights = WeightState(model_sites(tiny_model("llama_tied")))
    late = state_of(ScaleHeads(layer=2, heads=(1,), factors=torch.zeros(1)))
    early = state_of(Steer(site="layers.1.resid", vector=torch.ones(WIDTH)))
    norm = state_of(Dense(site="final_norm.weight", delta=torch.ones(WIDTH)))
    tied = state_of(Dense(site="lm_head.weight", delta=torch.ones(VOCABULARY, WIDTH)))
    assert first_layer(weights, (), ()) is None
    assert first_layer(weights, late, late) is None
    assert first_layer(weights, (), late) == 2 == first_layer(weights, late, ())
    assert first_layer(weights, late, late + early) == 1
    assert first_layer(weights, late, (Active(late[0].adjustment, 0.5),)) == 2
    assert first_layer(weights, (), norm) == LAYERS
    assert last_layer(weights, late, late) is None
    assert last_layer(weights, (), late + early) == 2 == last_layer(weights, early, late + early)
    assert last_layer(weights, late, late + early) == 1
    assert first_layer(weights, norm, tied) == -1
    assert first_layer(weights, (), (Active(late[0].adjustment, 0.0),)) is None
