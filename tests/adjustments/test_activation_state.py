"""Each activation op gives the logits of a plain forward in which the same was done by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from liveweight.adjustments import (
    STREAM,
    Ablate,
    ActivationOp,
    ActivationState,
    Active,
    Adjustment,
    Affine,
    BiasRouter,
    Clamp,
    Codebook,
    Gain,
    MixHeads,
    ScaleHeads,
    State,
    Steer,
)
from liveweight.errors import InvalidInput, UnknownSite, Unsupported
from liveweight.sites import ModelSites, model_sites
from reference_forward import ActAt, At, Reference, plain_act, untouched
from tiny_models import (
    ARCHITECTURES,
    EXPERT_ARCHITECTURES,
    HEADS,
    LAYERS,
    WIDTH,
    bytes_of,
    logits_of,
    tiny_model,
    tiny_tokens,
)

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def state_of(*ops: ActivationOp | ScaleHeads, strength: float = 1.0) -> State:
    return (Active(Adjustment(name="test", method="test", ops=ops), strength),)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hooks_in(model: PreTrainedModel) -> int:
    """Every hook registered in any module, ours or not."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def expect(
    sites: ModelSites,
    op: ActivationOp,
    at: Callable[[float], At] = lambda _: untouched,
    act: Callable[[float], ActAt] = lambda _: plain_act,
) -> None:
    """With `op` the model gives the logits of the reference with `at` and `act` of the strength; without, its own."""
    model = sites.model
    tokens = tiny_tokens()
    plain, weights = logits_of(model, tokens), bytes_of(model)
    activations = ActivationState(sites)
    for strength in (1.0, 0.3):
        activations.become(state_of(op, strength=strength))
        found = logits_of(model, tokens)
        wished = Reference(model, sites, at(strength), act(strength))
        activations.become(())
        assert torch.allclose(found, wished.logits(tokens), atol=3e-5), strength
        assert not torch.allclose(found, plain, atol=1e-4), "the op must be seen in the logits"
    activations.become(state_of(op, strength=0.0))
    assert activations.hooks == 0 and hooks_in(model) == 0
    assert torch.equal(logits_of(model, tokens), plain)
    assert bytes_of(model) == weights


def at_site(wanted: str, change: Callable[[Tensor, float], Tensor]) -> Callable[[float], At]:
    return lambda strength: lambda site, value: change(value, strength) if site == wanted else value


@every_architecture
def test_steering_adds_the_vector_at_every_activation_site(name: str) -> None:
    sites = model_sites(tiny_model(name))
    for number, site in enumerate(("embed", *(s for s in sites.names() if s.startswith("layers.1")), "final.resid")):
        if site not in sites.weight_names():
            vector = randn(sites.activation(site).size, seed=number)
            expect(sites, Steer(site=site, vector=vector, scale=0.5), at_site(site, _steered(vector)))


def _steered(vector: Tensor) -> Callable[[Tensor, float], Tensor]:
    return lambda value, strength: value + strength * 0.5 * vector


@every_architecture
def test_steering_at_absolute_positions_touches_those_rows_only(name: str) -> None:
    sites = model_sites(tiny_model(name))
    vector = randn(WIDTH)

    def change(value: Tensor, strength: float) -> Tensor:
        new = value.clone()
        new[:, [1, 4]] += strength * vector
        return new

    op = Steer(site="layers.0.resid", vector=vector, positions=(4, 1, 50))
    expect(sites, op, at_site("layers.0.resid", change))


@pytest.mark.parametrize(
    ("when", "positions", "touched"),
    [
        ("prompt", None, [0, 1, 2, 3]),
        ("generated", None, [4, 5, 6]),
        ("prompt", (1, 5), [1]),
        ("generated", (1, 5), [5]),
    ],
)
def test_steering_can_be_kept_to_the_prompt_or_to_what_was_generated(
    when: str, positions: tuple[int, ...] | None, touched: list[int]
) -> None:
    sites = model_sites(tiny_model("qwen3"))
    vector = randn(WIDTH)

    def change(value: Tensor, strength: float) -> Tensor:
        new = value.clone()
        new[:, touched] += strength * vector
        return new

    op = Steer(site="layers.0.resid", vector=vector, when=when, positions=positions)
    activations = ActivationState(sites)
    activations.become(state_of(op))
    with activations.prompt(4):
        found = logits_of(sites.model, tiny_tokens())
    activations.become(())
    wished = Reference(sites.model, sites, at_site("layers.0.resid", change)(1.0))
    assert torch.allclose(found, wished.logits(tiny_tokens()), atol=3e-5)


@pytest.mark.parametrize("name", EXPERT_ARCHITECTURES)
def test_a_routers_logits_can_be_steered_by_position_though_its_rows_are_tokens(name: str) -> None:
    sites = model_sites(tiny_model(name))
    vector = 5 * randn(5)

    def change(value: Tensor, strength: float) -> Tensor:
        new = value.clone().view(2, 7, 5)
        new[:, 3] += strength * vector
        return new.view(14, 5)

    op = Steer(site="layers.0.mlp.router", vector=vector, positions=(3,))
    expect(sites, op, at_site("layers.0.mlp.router", change))


@every_architecture
@pytest.mark.parametrize("site", ["layers.1.resid", "layers.1.attn.heads", "embed"])
def test_decoding_with_a_cache_steers_as_one_pass_without_one(name: str, site: str) -> None:
    model = tiny_model(name)
    sites = model_sites(model)
    activations = ActivationState(sites)
    vector = randn(sites.activation(site).size)
    tokens = tiny_tokens(batch=2, length=8)
    for op in (
        Steer(site=site, vector=vector, positions=(2, 5, 7)),
        Steer(site=site, vector=vector, when="prompt"),
        Steer(site=site, vector=vector, when="generated"),
        Steer(site=site, vector=vector, when="generated", positions=(1, 6)),
    ):
        activations.become(state_of(op))
        with activations.prompt(4):
            whole = logits_of(model, tokens)
            assert torch.allclose(_stepwise(model, tokens, prompt=4), whole, atol=2e-5), op
    activations.become(())
    assert not torch.allclose(logits_of(model, tokens), whole, atol=1e-4)


def _stepwise(model: PreTrainedModel, tokens: Tensor, prompt: int) -> Tensor:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(tokens[:, :prompt], past_key_values=cache, use_cache=True).logits]
        for position in range(prompt, tokens.shape[1]):
            parts.append(model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, dim=1)


def test_rows_padded_on_the_left_are_counted_from_their_own_first_token() -> None:
    model = tiny_model("llama")
    activations = ActivationState(model_sites(model))
    tokens = tiny_tokens(batch=1, length=5)
    padded = torch.cat((torch.zeros(1, 2, dtype=torch.long), tokens), dim=1)
    mask = (torch.arange(7) >= 2).long()[None]
    activations.become(state_of(Steer(site="layers.0.resid", vector=randn(WIDTH), when="generated", positions=(3,))))
    with activations.prompt([3]), torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 2:]
        assert torch.allclose(found, logits_of(model, tokens), atol=2e-5)


def test_prompts_of_different_lengths_in_one_batch_end_where_each_ends() -> None:
    model = tiny_model("qwen2")
    activations = ActivationState(model_sites(model))
    tokens = tiny_tokens(batch=2, length=6)
    activations.become(state_of(Steer(site="layers.0.resid", vector=randn(WIDTH), when="prompt")))
    with activations.prompt([2, 5]):
        together = logits_of(model, tokens)
    for row, length in enumerate((2, 5)):
        with activations.prompt(length):
            assert torch.allclose(together[row], logits_of(model, tokens[row : row + 1])[0], atol=2e-5)


def test_where_the_prompt_ends_is_known_per_thread_and_must_be_said() -> None:
    model = tiny_model("llama")
    activations = ActivationState(model_sites(model))
    activations.become(state_of(Steer(site="layers.0.resid", vector=randn(WIDTH), when="prompt")))
    failures: list[Exception] = []

    def elsewhere() -> None:
        try:
            logits_of(model, tiny_tokens())
        except InvalidInput as error:
            failures.append(error)

    with activations.prompt(3):
        logits_of(model, tiny_tokens())
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert [str(failure) for failure in failures] and "where the prompt ends" in str(failures[0])
    with pytest.raises(InvalidInput, match="where the prompt ends"):
        logits_of(model, tiny_tokens())


@every_architecture
def test_a_clamp_holds_neurons_at_their_values(name: str) -> None:
    sites = model_sites(tiny_model(name))
    expert = 2 if sites.experts_of(0) else None
    site = "layers.0.mlp.neurons" if expert is None else "layers.0.mlp.experts.2.neurons"

    def change(value: Tensor, strength: float) -> Tensor:
        new = value.clone()
        for neuron, held in ((7, 4.0), (3, -2.0)):
            new[..., neuron] += strength * (held - new[..., neuron])
        return new

    op = Clamp(layer=0, neurons=(7, 3), values=torch.tensor([4.0, -2.0]), expert=expert)
    expect(sites, op, at_site(site, change))


@every_architecture
def test_a_gain_gives_neurons_another_activation_function(name: str) -> None:
    sites = model_sites(tiny_model(name))
    wanted = (0, 2 if sites.experts_of(0) else None)

    def act(strength: float) -> ActAt:
        def each(layer: int, expert: int | None, gate: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
            new = function(gate)
            if (layer, expert) == wanted:
                for neuron, gain, slope in ((5, 6.0, 0.25), (0, -3.0, 4.0)):
                    gain, slope = 1 + strength * (gain - 1), 1 + strength * (slope - 1)
                    new[..., neuron] = gain * function(slope * gate[..., neuron]) / slope
            return new

        return each

    gains, slopes = torch.tensor([6.0, -3.0]), torch.tensor([0.25, 4.0])
    expect(sites, Gain(layer=0, neurons=(5, 0), gains=gains, slopes=slopes, expert=wanted[1]), act=act)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_gains_on_one_neuron_multiply_and_a_clamp_comes_after_them(name: str) -> None:
    model = tiny_model(name)
    sites = model_sites(model)
    expert = 2 if sites.experts_of(0) else None
    activations = ActivationState(sites)

    def gain(by: float, slope: float) -> Gain:
        return Gain(layer=0, neurons=(3,), gains=torch.tensor([by]), slopes=torch.tensor([slope]), expert=expert)

    activations.become(state_of(gain(2.0, 0.5), gain(3.0, 4.0)))
    both = logits_of(model, tiny_tokens())
    activations.become(state_of(gain(6.0, 2.0)))
    assert torch.allclose(both, logits_of(model, tiny_tokens()), atol=1e-5)
    clamp = Clamp(layer=0, neurons=(3,), values=torch.tensor([1.0]), expert=expert)
    activations.become(state_of(clamp, gain(6.0, 2.0)))
    clamped = logits_of(model, tiny_tokens())
    activations.become(state_of(clamp))
    assert torch.allclose(clamped, logits_of(model, tiny_tokens()), atol=1e-5)


@every_architecture
def test_ablation_projects_a_direction_out_at_a_site_and_out_of_the_whole_stream(name: str) -> None:
    sites = model_sites(tiny_model(name))
    direction = 3 * randn(WIDTH)
    unit = direction / direction.norm()

    def change(value: Tensor, strength: float) -> Tensor:
        return value - strength * (value @ unit)[..., None] * unit

    def everywhere(strength: float) -> At:
        return lambda site, value: change(value, strength) if site == "embed" or site.endswith(".write") else value

    expect(sites, Ablate(site="layers.1.resid", direction=direction), at_site("layers.1.resid", change))
    expect(sites, Ablate(site=STREAM, direction=direction), everywhere)


def test_a_stream_that_was_ablated_has_nothing_left_along_the_direction_anywhere() -> None:
    model = tiny_model("gpt2")
    sites = model_sites(model)
    activations = ActivationState(sites)
    direction = randn(WIDTH)
    activations.become(state_of(Ablate(site=STREAM, direction=direction)))
    seen: list[Tensor] = []
    names = ["embed", *(f"layers.{layer}.resid" for layer in range(LAYERS))]
    handles = [sites.activation(site).on(lambda value: seen.append(value)) for site in names]
    logits_of(model, tiny_tokens())
    assert len(seen) == len(handles)
    assert all(float((value @ direction).abs().max()) < 1e-4 for value in seen)


@pytest.mark.parametrize("name", EXPERT_ARCHITECTURES)
def test_what_clamped_experts_write_is_ablated_too(name: str) -> None:
    model = tiny_model(name)
    sites = model_sites(model)
    activations = ActivationState(sites)
    direction = randn(WIDTH)
    clamp = Clamp(layer=0, neurons=(1, 3), values=(30.0, -20.0), expert=1)
    activations.become(state_of(Ablate(site=STREAM, direction=direction), clamp))
    seen: list[Tensor] = []
    handle = sites.activation("layers.0.resid").on(lambda value: seen.append(value))
    logits_of(model, tiny_tokens())
    handle.remove()
    (stream,) = seen
    assert float((stream @ direction).abs().max()) < 1e-3


@every_architecture
def test_mixing_heads_makes_each_heads_output_a_sum_of_them(name: str) -> None:
    sites = model_sites(tiny_model(name))
    matrix = randn(HEADS, HEADS)

    def change(value: Tensor, strength: float) -> Tensor:
        parts = value.split(sites.head_dim, dim=-1)
        mixed = [sum(matrix[i, j] * parts[j] for j in range(HEADS)) for i in range(HEADS)]
        return value + strength * (torch.cat(mixed, dim=-1) - value)  # type: ignore[arg-type]

    expect(sites, MixHeads(layer=1, matrix=matrix), at_site("layers.1.attn.heads", change))


@pytest.mark.parametrize("name", EXPERT_ARCHITECTURES)
def test_a_router_bias_changes_which_experts_are_chosen(name: str) -> None:
    sites = model_sites(tiny_model(name))
    bias = torch.tensor([0.0, 9.0, 0.0, -9.0, 0.0])
    expect(sites, BiasRouter(layer=0, bias=bias), at_site("layers.0.mlp.router", lambda value, s: value + s * bias))


@every_architecture
def test_a_codebook_replaces_what_lies_near_a_key_and_nothing_else(name: str) -> None:
    sites = model_sites(tiny_model(name))
    with torch.no_grad():
        seen: list[Tensor] = []
        handle = sites.activation("layers.0.resid").on(lambda value: seen.append(value.clone()))
        logits_of(sites.model, tiny_tokens())
        handle.remove()
    rows = seen[0].flatten(0, -2)
    apart = torch.cdist(rows, rows) + 1e9 * torch.eye(len(rows))
    radii = torch.tensor([0.4 * float(apart[2].min()), 0.4 * float(apart[4].min())])
    keys, entries = rows[[2, 4]] + 0.1 * radii[:, None] / rows.shape[-1] ** 0.5, randn(2, WIDTH)

    def change(value: Tensor, strength: float) -> Tensor:
        new = value.clone().flatten(0, -2)
        for number, row in enumerate((2, 4)):
            new[row] += strength * (entries[number] - new[row])
        return new.view_as(value)

    book = Codebook(site="layers.0.resid", keys=keys, radii=radii, entries=entries)
    expect(sites, book, at_site("layers.0.resid", change))


@every_architecture
def test_an_affine_op_scales_and_shifts_the_entries_that_it_names(name: str) -> None:
    indices, factors, shifts = torch.tensor([5, 2]), torch.tensor([0.0, -2.0]), torch.tensor([0.3, 0.5])
    sites = model_sites(tiny_model(name))

    def change(value: Tensor, strength: float) -> Tensor:
        new = value.clone()
        new[..., indices] += strength * ((factors - 1) * value[..., indices] + shifts)
        return new

    op = Affine(site="layers.1.resid", indices=indices, factors=factors, shifts=shifts)
    expect(sites, op, at_site("layers.1.resid", change))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_bfloat16_activations_keep_their_dtype(name: str) -> None:
    model = tiny_model(name, torch.bfloat16)
    sites = model_sites(model)
    expert = 2 if sites.experts_of(0) else None
    ones = torch.ones(1)
    activations = ActivationState(sites)
    activations.become(
        state_of(
            Steer(site="layers.0.resid", vector=randn(WIDTH)),
            Clamp(layer=0, neurons=(1,), values=ones, expert=expert),
            Gain(layer=0, neurons=(2,), gains=2 * ones, slopes=2 * ones, expert=expert),
            Ablate(site="layers.1.resid", direction=randn(WIDTH)),
            MixHeads(layer=2, matrix=randn(HEADS, HEADS)),
        )
    )
    assert logits_of(model, tiny_tokens()).dtype == torch.bfloat16


class _InTuples(nn.Module):
    """A block that returns a tuple, as those of earlier transformers releases do."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, **kwargs: object) -> tuple[Tensor, str]:
        return self.block(hidden, **kwargs), "attention weights"


def test_a_block_that_returns_a_tuple_is_changed_in_every_row_of_the_batch() -> None:
    model = tiny_model("llama")
    plain, steered = (block for block in (model_sites(model).blocks[0], model_sites(model).blocks[0]))
    point = model_sites(model).activation("layers.0.resid")
    wrapped = _InTuples(plain)
    tuple_point = type(point)(point.site, wrapped, point.side, point.size)
    vector = randn(WIDTH)
    inputs: dict[str, object] = {}
    handle = steered.register_forward_pre_hook(
        lambda _module, args, kwargs: inputs.update(hidden=args[0], **kwargs), with_kwargs=True
    )
    logits_of(model, tiny_tokens(batch=3))
    handle.remove()
    hidden = inputs.pop("hidden")
    with torch.no_grad():
        expected = plain(hidden, **inputs) + vector
        tuple_point.on(lambda value: value + vector)
        value, rest = wrapped(hidden, **inputs)
    assert rest == "attention weights" and torch.equal(value, expected)


def test_no_hook_is_registered_unless_an_op_needs_it_and_none_is_left_behind() -> None:
    model = tiny_model("llama")
    activations = ActivationState(model_sites(model))
    assert hooks_in(model) == 0
    activations.become(state_of(ScaleHeads(layer=0, heads=(0,), factors=torch.zeros(1))))
    assert hooks_in(model) == 0
    activations.become(state_of(Steer(site="layers.1.resid", vector=randn(WIDTH))))
    assert hooks_in(model) == 1 == activations.hooks
    activations.become(state_of(Steer(site="layers.1.resid", vector=randn(WIDTH), positions=(1,))))
    assert hooks_in(model) == 2
    activations.become(())
    assert hooks_in(model) == 0


BAD_OPS: list[tuple[str, ActivationOp, type[Exception], str]] = [
    ("llama", Steer(site="layers.7.resid", vector=torch.ones(WIDTH)), UnknownSite, "layers.7.resid"),
    ("llama", Steer(site="layers.0.mlp.down.weight", vector=torch.ones(WIDTH)), UnknownSite, "is a weight"),
    ("llama", Steer(site="layers.0.resid", vector=torch.ones(3)), InvalidInput, "3 entries.*24"),
    ("llama", Steer(site=STREAM, vector=torch.ones(WIDTH)), UnknownSite, "stream"),
    ("llama", Clamp(layer=0, neurons=(40,), values=torch.ones(1)), UnknownSite, "neuron 40"),
    ("llama", Clamp(layer=0, neurons=(4,), values=torch.ones(1), expert=0), UnknownSite, "no experts"),
    ("mixtral", Clamp(layer=0, neurons=(4,), values=torch.ones(1)), UnknownSite, "none was named"),
    ("mixtral", Steer(site="layers.0.mlp.neurons", vector=torch.ones(40)), Unsupported, "not one tensor"),
    ("llama", Gain(layer=3, neurons=(0,), gains=torch.ones(1), slopes=torch.ones(1)), UnknownSite, "layer 3"),
    ("llama", Gain(layer=0, neurons=(0,), gains=torch.ones(1), slopes=4 * torch.ones(1)), InvalidInput, "slope"),
    ("llama", Ablate(site=STREAM, direction=torch.ones(3)), InvalidInput, "3 entries"),
    ("llama", MixHeads(layer=0, matrix=torch.ones(3, 3)), InvalidInput, "3 heads.*has 4"),
    ("llama", BiasRouter(layer=0, bias=torch.ones(5)), UnknownSite, r"layers\.0\.mlp\.router"),
    (
        "llama",
        Codebook(site="layers.0.resid", keys=torch.ones(2, 3), radii=torch.ones(2), entries=torch.ones(2, 3)),
        InvalidInput,
        "3 entries",
    ),
    (
        "llama",
        Affine(site="embed", indices=torch.tensor([WIDTH]), factors=torch.ones(1), shifts=torch.ones(1)),
        InvalidInput,
        "no entry 24",
    ),
    ("mixtral", BiasRouter(layer=0, bias=torch.ones(4)), InvalidInput, "4 entries.*5"),
]


@pytest.mark.parametrize(("name", "op", "error", "says"), BAD_OPS)
def test_an_op_that_does_not_fit_is_refused_and_the_hooks_are_as_before(
    name: str, op: ActivationOp, error: type[Exception], says: str
) -> None:
    model = tiny_model(name)
    activations = ActivationState(model_sites(model))
    good = state_of(Steer(site="layers.1.resid", vector=torch.ones(WIDTH)))
    activations.become(good)
    before = logits_of(model, tiny_tokens())
    with pytest.raises(error, match=says):
        activations.become(good + state_of(op, strength=-1.0))
    assert activations.state == good and hooks_in(model) == 1
    assert torch.equal(logits_of(model, tiny_tokens()), before)
