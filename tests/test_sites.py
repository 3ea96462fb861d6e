"""Every site of every architecture names the right tensor, and nothing that is not there has a name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from liveweight.errors import InvalidInput, UnknownSite, Unsupported, UnsupportedArchitecture
from liveweight.sites import model_sites
from liveweight.sites.views import WHOLE, region
from reference_forward import Reference
from tiny_models import (
    ARCHITECTURES,
    EXPERT_ARCHITECTURES,
    HEADS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    bytes_of,
    logits_of,
    tiny_model,
    tiny_tokens,
)

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@every_architecture
def test_a_forward_written_from_the_named_weights_gives_the_models_own_logits(name: str) -> None:
    model = tiny_model(name)
    tokens = tiny_tokens()
    assert torch.allclose(Reference(model, model_sites(model)).logits(tokens), logits_of(model, tokens), atol=2e-5)


@every_architecture
def test_every_activation_site_carries_the_tensor_that_its_name_says(name: str) -> None:
    model = tiny_model(name)
    sites = model_sites(model)
    tokens = tiny_tokens()
    wished: dict[str, Tensor] = {}

    def note(site: str, value: Tensor) -> Tensor:
        wished[site] = value
        return value

    Reference(model, sites, at=note).logits(tokens)
    names = [site for site in sites.names() if site not in sites.weight_names()]
    found: dict[str, Tensor] = {}

    def keep(site: str) -> object:
        return sites.activation(site).on(lambda value: found.update({site: value}))

    handles = [keep(site) for site in names]
    logits_of(model, tokens)
    assert len(handles) == len(names) == len(found) == 3 * LAYERS + 2
    for site in names:
        assert found[site].shape[-1] == sites.activation(site).size
        assert torch.allclose(found[site], wished[site], atol=2e-5), site


@every_architecture
def test_replacing_an_activation_changes_what_follows_and_giving_it_back_does_not(name: str) -> None:
    model = tiny_model(name)
    sites = model_sites(model)
    tokens = tiny_tokens()
    before = logits_of(model, tokens)
    for site in (site for site in sites.names() if site not in sites.weight_names()):
        same = sites.activation(site).on(lambda value: value.clone())
        assert torch.equal(logits_of(model, tokens), before), site
        same.remove()
        other = sites.activation(site).on(lambda value: value + torch.arange(value.shape[-1]) % 2)
        assert not torch.allclose(logits_of(model, tokens), before), site
        other.remove()
    assert torch.equal(logits_of(model, tokens), before)


@every_architecture
def test_the_sites_cover_every_entry_of_every_parameter_exactly_once(name: str) -> None:
    model = tiny_model(name)
    sites = model_sites(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    entries = 0
    for site in sites.weight_names():
        if sites.canonical(site) == site:
            view = sites.weight(site)
            entries += view.read().numel()
            view.write(view.read() + 1)
    assert entries == sum(parameter.numel() for parameter in model.parameters())
    assert all(bool((parameter == 1).all()) for parameter in model.parameters())


@every_architecture
def test_writing_a_region_changes_that_region_of_that_site_and_nothing_else(name: str) -> None:
    model = tiny_model(name)
    sites = model_sites(model)
    for site in sites.weight_names():
        view = sites.weight(site)
        shape = view.shape
        regions = [WHOLE, region("rows", (shape[0] - 1, 0))]
        if len(shape) == 2:
            last = shape[0] * shape[1] - 1
            regions += [region("columns", (shape[1] - 1, 1)), region("entries", (last, 0, shape[1] + 2))]
        for where in regions:
            before = {other: sites.weight(other).read().clone() for other in sites.weight_names()}
            old = view.gather(where)
            marked = torch.zeros(shape, dtype=torch.bool)
            if where.index is None:
                marked[:] = True
            elif where.kind == "columns":
                marked[:, where.index] = True
            elif where.kind == "entries":
                marked.view(-1)[where.index] = True
            else:
                marked[where.index] = True
            value = torch.arange(old.numel()).reshape(old.shape) + 100.0
            parameter = view.parameter
            view.write(value, where)
            assert view.parameter is parameter
            assert torch.equal(view.gather(where), value)
            assert torch.equal(view.read() != before[site], marked)
            for other in sites.weight_names():
                if sites.canonical(other) != sites.canonical(site):
                    assert torch.equal(sites.weight(other).read(), before[other]), (site, other)
            view.write(old, where)


@every_architecture
def test_the_sizes_are_those_of_the_config(name: str) -> None:
    model = tiny_model(name)
    sites = model_sites(model)
    assert (sites.layers, sites.width, sites.heads, sites.vocabulary) == (LAYERS, WIDTH, HEADS, VOCABULARY)
    assert sites.experts == (5 if name in EXPERT_ARCHITECTURES else 0)
    assert sites.gated == (name not in ("gpt2", "gpt_neox"))
    assert sites.tied == (name in ("gpt2", "llama_tied"))
    assert sites.tied == any("one tensor" in note for note in sites.notes)
    assert len(sites.blocks) == LAYERS
    named = dict(model.named_parameters(remove_duplicate=False))
    assert all(named[view.parameter_name] is view.parameter for view in map(sites.weight, sites.weight_names()))


@every_architecture
def test_a_neurons_rows_and_column_are_those_that_move_its_activation_and_its_writing(name: str) -> None:
    model = tiny_model(name)
    sites = model_sites(model)
    expert = 1 if sites.experts_of(0) else None
    written = sites.neuron_write(0, 3, expert)
    assert torch.equal(written, sites.weight(sites.mlp_part(0, "down", expert)).read()[:, 3])
    read = sites.neuron_read(0, 3, expert)
    assert list(read) == (["gate", "up"] if sites.gated else ["up"])
    assert all(row.shape == written.shape == (WIDTH,) for row in read.values())
    written.zero_()
    assert bool(sites.neuron_write(0, 3, expert).any()), "a copy, since reading must not write"
    assert isinstance(sites.activation_function(0), nn.Module)


def test_tied_embeddings_are_one_site_under_two_names() -> None:
    tied, untied = model_sites(tiny_model("llama_tied")), model_sites(tiny_model("llama"))
    assert tied.canonical("lm_head.weight") == "embed.weight"
    assert untied.canonical("lm_head.weight") == "lm_head.weight"


def test_a_layer_without_experts_among_layers_with_experts_has_neurons_of_its_own() -> None:
    sites = model_sites(tiny_model("qwen3_moe"))
    assert [sites.experts_of(layer) for layer in range(LAYERS)] == [5, 0, 5]
    assert sites.neurons_of(0) == 32 and sites.neurons_of(1) == 40
    assert sites.activation("layers.1.mlp.neurons").size == 40
    with pytest.raises(Unsupported, match=r"layers\.0\.mlp\.neurons.*5 experts"):
        sites.activation("layers.0.mlp.neurons")
    with pytest.raises(UnknownSite, match="5 experts, and none was named"):
        sites.mlp_part(0, "up")
    with pytest.raises(UnknownSite, match="no experts, so no expert 0"):
        sites.mlp_part(1, "up", 0)
    with pytest.raises(UnknownSite, match="no expert 5 in layer 0"):
        sites.mlp_part(0, "up", 5)


@pytest.mark.parametrize(
    ("site", "says"),
    [
        ("layers.3.resid", "'layers.3.resid'.*0 to 2"),
        ("layers.1.attn.qq.weight", r"'layers\.1\.attn\.qq\.weight'.*layers\.1\.attn\.q\.weight"),
        ("layers.0.mlp.experts.9.up.weight", "experts of layer 0 are 0 to 4"),
        ("", "''"),
        ("embedding", "'embedding'.*embed"),
        ("layers.-1.resid", "layers.-1.resid"),
    ],
)
def test_an_unknown_site_is_refused_with_its_name_and_the_nearest(site: str, says: str) -> None:
    sites = model_sites(tiny_model("mixtral"))
    for ask in (sites.resolve, sites.weight, sites.activation):
        with pytest.raises(UnknownSite, match=says):
            ask(site)


def test_a_weight_is_not_an_activation_nor_the_reverse() -> None:
    sites = model_sites(tiny_model("llama"))
    with pytest.raises(UnknownSite, match="is an activation"):
        sites.weight("layers.0.resid")
    with pytest.raises(UnknownSite, match="is a weight"):
        sites.activation("layers.0.mlp.down.weight")


def test_an_unknown_architecture_is_told_so_and_an_incomplete_one_what_is_missing() -> None:
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(UnsupportedArchitecture, match=r"'bert' \(BertModel\).*llama"):
        model_sites(BertModel(BertConfig(**sizes, intermediate_size=8)))
    with pytest.raises(UnsupportedArchitecture, match=r"LlamaModel.*model\.layers.*lm_head"):
        model_sites(LlamaModel(LlamaConfig(**sizes, intermediate_size=8, pad_token_id=0)))
    broken = tiny_model("mistral")
    del broken.model.layers[1].mlp.up_proj
    with pytest.raises(UnsupportedArchitecture, match=r"has no mlp\.up_proj"):
        model_sites(broken)


def test_a_value_of_another_shape_is_not_written() -> None:
    model = tiny_model("gpt2")
    before = bytes_of(model)
    view = model_sites(model).weight("layers.0.attn.k.weight")
    with pytest.raises(InvalidInput, match=r"layers\.0\.attn\.k\.weight, which needs \(2, 24\)"):
        view.write(torch.zeros(2, 23), region("rows", (0, 1)))
    assert bytes_of(model) == before
