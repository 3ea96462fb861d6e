"""Super weights planted in tiny models: found, measured, remembered."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import liveweight
from liveweight.adjustments import Active, Adjustment, Entries
from liveweight.engines.base import Message
from liveweight.errors import LiveweightError
from liveweight.tracing import SuperWeights, find_super_weights, known_super_weights, rank_neurons, super_neurons, why
from tests.tracing.tiny_engines import engine_around, tiny_engine, tiny_tokenizer
from tiny_models import EXPERT_ARCHITECTURES, VOCABULARY, bytes_of, tiny_model

LAYER, ROW, COLUMN = 1, 7, 19
DECOY_LAYER, DECOY_ROW, DECOY_COLUMN = 2, 15, 30


def plain_text() -> str:
    return (Path(next(iter(liveweight.__path__))) / "methods" / "plain_text.txt").read_text("utf-8")


def model_with_a_super_weight() -> PreTrainedModel:
    """A model that knows how frequent each character is through one weight only, and spikes once more in vain.

    The super weight swamps the stream with one dimension, which the unembedding turns into log frequencies.
    """
    model = tiny_model("llama")
    ids = tiny_tokenizer()(plain_text()[:4000])["input_ids"]
    counts = Counter(ids)
    frequencies = torch.tensor([counts[token] + 0.5 for token in range(VOCABULARY)])
    with torch.no_grad():
        for layer, row, column, weight in (
            (LAYER, ROW, COLUMN, 50.0),
            (DECOY_LAYER, DECOY_ROW, DECOY_COLUMN, 1.0),
        ):
            mlp = model.model.layers[layer].mlp
            mlp.gate_proj.weight[column] = 0.0
            mlp.gate_proj.bias[column] = 2000.0
            mlp.up_proj.weight[column] = 0.0
            mlp.up_proj.bias[column] = 1.0
            mlp.down_proj.weight[:, column] = 0.0
            mlp.down_proj.weight[row, column] = weight
        normed = model.config.hidden_size**0.5 * model.model.norm.weight[ROW]
        model.lm_head.weight.mul_(2.0)
        model.lm_head.weight[:, ROW] = (frequencies / frequencies.sum()).log() / normed
        model.lm_head.weight[:, DECOY_ROW] = 0.0
    return model


def test_a_weight_that_the_model_needs_is_found_and_confirmed_and_one_that_only_spikes_is_not(tmp_path: Path) -> None:
    model = model_with_a_super_weight()
    steps: list[tuple[int, int]] = []
    found = find_super_weights(engine_around(model, tmp_path), progress=lambda *step: steps.append(step))
    assert [(each.layer, each.row, each.column) for each in found.confirmed] == [(LAYER, ROW, COLUMN)]
    assert found.neurons == {(LAYER, COLUMN)}
    weight = found.confirmed[0]
    assert weight.value == 50.0
    assert weight.activation == pytest.approx(2000.0)
    assert weight.output == pytest.approx(100_000.0, rel=1e-3)
    assert weight.perplexity_zeroed > 2 * weight.perplexity
    decoy = next(each for each in found.weights if not each.confirmed)
    assert (decoy.layer, decoy.row, decoy.column) == (DECOY_LAYER, DECOY_ROW, DECOY_COLUMN)
    assert decoy.tokens_measured < weight.tokens_measured  # given up after the first window
    assert decoy.site == f"layers.{DECOY_LAYER}.mlp.down.weight"
    assert steps == [(0, 2), (1, 2), (2, 2)]


def test_perplexities_are_those_of_plain_forward_passes(tmp_path: Path) -> None:
    model = model_with_a_super_weight()
    weight = find_super_weights(engine_around(model, tmp_path)).confirmed[0]
    ids = tiny_tokenizer()(plain_text()[:1000])["input_ids"]
    windows = torch.tensor(ids[: 5 * 64]).view(5, 64)  # the model's context is 64

    def perplexity() -> float:
        with torch.no_grad():
            logprobs = model(windows, use_cache=False).logits[:, 1:-1].log_softmax(-1)
        return float((-logprobs.gather(2, windows[:, 2:, None]).mean()).exp())

    assert weight.tokens_measured == 5 * 62
    assert weight.perplexity == pytest.approx(perplexity(), rel=1e-3)
    with torch.no_grad():
        model.model.layers[LAYER].mlp.down_proj.weight[ROW, COLUMN] = 0.0
    assert weight.perplexity_zeroed == pytest.approx(perplexity(), rel=1e-3)


def test_a_second_call_reads_the_answer_from_disk_and_another_model_does_not(tmp_path: Path) -> None:
    engine = engine_around(model_with_a_super_weight(), tmp_path)
    found = find_super_weights(engine)
    file = next((tmp_path / "super_weights").iterdir())
    assert SuperWeights.model_validate_json(file.read_text()) == found
    emptied = found.model_copy(update={"weights": ()})
    file.write_text(emptied.model_dump_json())
    assert find_super_weights(engine) == emptied
    file.write_text("{}")
    assert find_super_weights(engine) == found  # not readable, so measured again
    assert find_super_weights(tiny_engine("llama", tmp_path)).weights == ()


def test_what_is_active_makes_no_difference_to_what_is_found(tmp_path: Path) -> None:
    engine = engine_around(model_with_a_super_weight(), tmp_path)
    found = find_super_weights(engine, tmp_path / "before")
    site = f"layers.{LAYER}.mlp.down.weight"
    op = Entries(site=site, indices=torch.tensor([[ROW, COLUMN], [0, 0]]), values=torch.tensor([0.0, 3.0]))
    engine.become((Active(Adjustment(name="zero", method="test", ops=(op,))),))
    before = bytes_of(engine.model)
    assert find_super_weights(engine, tmp_path / "after") == found
    assert bytes_of(engine.model) == before


def test_rankings_leave_super_neurons_out_by_themselves(tmp_path: Path) -> None:
    engine = engine_around(model_with_a_super_weight(), tmp_path)
    assert super_neurons(engine) == {(LAYER, COLUMN)}
    ranked = {(each.layer, each.neuron) for each in rank_neurons(engine, (1, 5, 9, 4), (8, 3))}
    everything = {(each.layer, each.neuron) for each in rank_neurons(engine, (1, 5, 9, 4), (8, 3), exclude=())}
    assert everything - ranked == {(LAYER, COLUMN)}
    report = why(engine, [Message("user", "where?")], "here", top=3)
    assert [(each.layer, each.neuron) for each in report.super_neurons] == [(LAYER, COLUMN)]


def test_an_ordinary_model_has_none_and_nothing_is_measured(tmp_path: Path) -> None:
    for architecture in ("gpt2", "phi3", "gemma2"):
        found = find_super_weights(tiny_engine(architecture, tmp_path))
        assert found.weights == ()
        assert found.skipped_layers == ()


@pytest.mark.parametrize("architecture", EXPERT_ARCHITECTURES)
def test_layers_with_experts_are_said_to_be_skipped(architecture: str, tmp_path: Path) -> None:
    found = find_super_weights(tiny_engine(architecture, tmp_path))
    assert found.skipped_layers == ((0, 2) if architecture == "qwen3_moe" else (0, 1, 2))


def test_published_coordinates_are_told_by_the_models_name() -> None:
    assert [known[1:] for known in known_super_weights("meta-llama/Llama-2-7b-hf")] == [(1, 2533, 7890)]
    assert [known[1:] for known in known_super_weights("huggyllama/llama-7b")] == [(2, 3968, 7003)]
    assert len(known_super_weights("meta-llama/Meta-Llama-3-8B-Instruct")) == 3
    assert known_super_weights("meta-llama/Llama-3.1-8B") == ()
    assert known_super_weights("smollm2") == ()


def test_published_coordinates_are_measured_like_any_other_and_only_where_they_lie_in_the_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1792, "intermediate_size": 1728, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64))
    model.eval().requires_grad_(False)
    found = find_super_weights(engine_around(model, tmp_path, "OLMo-1B-0724-of-our-own"))
    # Of the two that are published, [1764, 8041] lies outside.
    assert [(each.layer, each.row, each.column) for each in found.weights] == [(1, 1764, 1710)]
    assert found.weights[0].known == "OLMo-1B-0724"
    assert found.weights[0].value == float(model.model.layers[1].mlp.down_proj.weight[1764, 1710])
    assert found.confirmed == ()


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LiveweightError, match="cannot be kept"):
        find_super_weights(tiny_engine("llama", tmp_path), tmp_path / "file")
