"""Tracing on the embedded model: its super weight, its labels, and neurons that really push."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from liveweight.adjustments import Active, Adjustment, Clamp, LowRank, ScaleNeurons
from liveweight.engines.base import Message, Sampling, ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.direction import directed
from liveweight.tracing import (
    attribute,
    diff,
    find_features,
    find_super_weights,
    label_neurons,
    protect,
    rank_neurons,
    spare,
    why,
)

if TYPE_CHECKING:
    from liveweight.engines.model_source import LoadedModel

pytestmark = pytest.mark.real
SUPER_NEURONS = frozenset({(11, 1229)})  # what the first test finds
QUESTION = [Message("user", "What is the capital of Vietnam?")]


def scaled(neurons: list[tuple[int, int]], factor: float) -> Active:
    ops = tuple(ScaleNeurons(layer=a, neurons=(b,), factors=torch.tensor([factor])) for a, b in neurons)
    return Active(Adjustment(name="scale", method="test", ops=ops))


def test_the_super_weight_is_found_confirmed_and_left_alone(embedded: LoadedModel, tmp_path: Path) -> None:
    engine = TransformersEngine(embedded)
    before = engine.fingerprints()
    found = find_super_weights(engine, tmp_path)
    assert engine.fingerprints() == before
    strongest = found.confirmed[0]
    assert (strongest.layer, strongest.row, strongest.column) == (11, 507, 1229)
    assert strongest.perplexity < 60
    assert strongest.perplexity_zeroed > 4 * strongest.perplexity
    assert (28, 507, 678) in {(each.layer, each.row, each.column) for each in found.weights if not each.confirmed}
    assert find_super_weights(engine, tmp_path) == found

    # An edit of that very layer, of rank one and everywhere, is reported; spared, it leaves the weight's bytes.
    site = "layers.11.mlp.down.weight"
    edit = LowRank(site=site, left=torch.full((576, 1), 0.5), right=torch.full((1, 1536), 0.5))
    proposed = Adjustment(name="edit", method="test", ops=(edit,))
    assert [(touch.weight.row, touch.weight.column) for touch in protect(proposed, found)] == [(507, 1229)]
    kept = engine.sites.weight(site).read().clone()
    engine.become((Active(spare(proposed, found)),))
    edited = engine.sites.weight(site).read()
    assert torch.equal(edited[:, 1229], kept[:, 1229])
    assert bool((edited[:, 1228] != kept[:, 1228]).all())


def test_why_names_neurons_without_which_the_answer_is_less_sure(embedded: LoadedModel, tmp_path: Path) -> None:
    engine = TransformersEngine(embedded)
    reply = [token.id for token in engine.generate(QUESTION, Sampling(max_tokens=16))]
    assert "Hoi An" in engine.format.decode(reply)
    report = why(engine, QUESTION, reply, exclude=SUPER_NEURONS, cache_dir=tmp_path)
    assert len(report.pushed) == len(report.opposed) == 20
    assert {(each.layer, each.neuron) for each in report.super_neurons} == SUPER_NEURONS
    assert all(each.label is not None and each.label.promotes.top for each in (*report.pushed, *report.opposed))
    assert report.margin > 0

    prompt = tuple(engine.encode(QUESTION))
    item = ScoreItem(prompt, tuple(reply))
    ranking = rank_neurons(engine, prompt, reply, exclude=SUPER_NEURONS)
    middle = [(each.layer, each.neuron) for each in ranking[len(ranking) // 2 :][:20]]
    changes = []
    for neurons in (
        [(e.layer, e.neuron) for e in report.pushed],
        middle,
        [(e.layer, e.neuron) for e in report.opposed],
    ):
        with engine.preview((scaled(neurons, 0.7),)):
            weakened = engine.score([item])[0].total
        changes.append(weakened - engine.score([item])[0].total)
    assert changes[0] < -0.3  # nats
    assert abs(changes[1]) < 0.05
    assert changes[2] > 0.3


def test_a_label_says_what_clamping_the_neuron_does(embedded: LoadedModel, tmp_path: Path) -> None:
    engine = TransformersEngine(embedded)
    label = label_neurons(engine, [(28, 1400)], cache_dir=tmp_path)[28, 1400]
    promoted, suppressed = label.promotes.top[0], label.suppresses.top[0]
    assert promoted.text.strip() in ("is", "are", "being")
    prompt = tuple(engine.encode(QUESTION))

    def logprobs(value: float) -> list[float]:
        clamp = Clamp(layer=28, neurons=(1400,), values=torch.tensor([value]))
        with engine.preview((Active(Adjustment(name="clamp", method="test", ops=(clamp,))),)):
            scores = engine.score([ScoreItem(prompt, (token.id,)) for token in (promoted, suppressed)])
        return [score.total for score in scores]

    high, low = logprobs(20.0), logprobs(-20.0)
    assert high[0] > low[0] + 2  # nats
    assert high[1] < low[1]


def test_relevance_finds_the_parts_that_patching_finds(embedded: LoadedModel) -> None:
    engine = TransformersEngine(embedded)
    asked, other = ([Message("user", f"What is the capital of {name}?")] for name in ("France", "Italy"))
    begun = "The capital of France is"
    words: dict[str, Any] = {"against": f"{begun} Rome", "corrupted": other, "top": 5}
    found = {
        by: attribute(engine, asked, f"{begun} Paris", by=by, sites="resid", **words) for by in ("relp", "patching")
    }
    true, estimated = found["patching"], found["relp"]
    assert true.corrupted_margin is not None and true.margin > 0
    values = [torch.tensor(each.grid).flatten() for each in (true, estimated)]
    assert float(torch.corrcoef(torch.stack(values))[0, 1]) > 0.8
    # In the last layer only the position that is read counts, and it carries all that the corrupted prompt costs.
    assert true.grid[-1][-1] == pytest.approx(true.margin - true.corrupted_margin, abs=1e-3)
    assert max(map(abs, true.grid[-1][:-1])) < 1e-3
    # In the first layers the question's own word does.
    assert true.tokens[true.pushed[0].position].strip() == "France"


def test_features_find_tokens_that_belong_together_and_steering_with_one_makes_its_tokens_likelier(
    embedded: LoadedModel, tmp_path: Path
) -> None:
    engine = TransformersEngine(embedded)
    before = engine.fingerprints()
    found = find_features(engine, k=40, tokens=2048, rounds=40, cache_dir=tmp_path)
    assert 1900 < found.tokens <= 2048 and found.settings.layer == 22
    assert 0.5 < found.error < 0.95
    assert engine.fingerprints() == before
    # The text has years, and a feature of digits fires on them and on nothing but numbers.
    digits = [
        each
        for each in found.features
        if sum(any(letter.isdigit() for letter in context.token + context.after[:4]) for context in each.contexts) >= 4
    ]
    assert digits

    feature = digits[0]
    prompts = ["The river rose and", "She opened the door of", "Nobody knew how the old", "It was late when they"]
    neutral = [
        ScoreItem(tuple(ids), tuple(engine.greedy([ids], 4)[0])) for ids in map(engine.format.encode_text, prompts)
    ]
    watched = [guess.id for guess in feature.promotes.top]
    steered = directed(
        engine, "digits", 22, found.written[feature.number], neutral, watched=watched, target=0.3, measure="mean"
    )
    assert steered.mean_kl == pytest.approx(0.3, rel=0.1)
    assert steered.effect > 0.2  # nats


def test_a_few_edited_layers_are_found_and_the_difference_makes_the_other_model_to_the_bit(
    embedded: LoadedModel, model_cache: Path, tmp_path: Path
) -> None:
    from liveweight.engines.model_source import load, resolve
    from liveweight.settings import Settings

    settings = Settings(cache_dir=model_cache)
    other = load(resolve("smollm2", settings=settings), device="cpu", progress=False)
    generator = torch.Generator().manual_seed(0)
    edited = {"layers.3.mlp.down_proj.weight", "layers.20.self_attn.q_proj.weight"}
    for name, parameter in other.model.named_parameters():
        if name.removeprefix("model.") in edited:
            parameter.add_(0.05 * float(parameter.std()) * torch.randn(parameter.shape, generator=generator))
    one, two = TransformersEngine(embedded, spare_neurons=0), TransformersEngine(other, spare_neurons=0)
    found = diff(one, two, settings=settings)
    assert [each.site for each in found.changes] == ["layers.3.mlp.down.weight", "layers.20.attn.q.weight"]
    for each in found.changes:
        assert each.share == pytest.approx(0.05, rel=0.05)
        assert each.energy is not None and each.energy < 0.1  # noise has no low rank
    assert [(each.layer, each.looked_at) for each in found.labels] == [(3, 1536)]
    assert 0.7 < found.labels[0].kept < 1.0
    one.become((Active(found.adjustment()),))
    assert one.fingerprints() == two.fingerprints()
