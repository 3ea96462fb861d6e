"""Steering vectors on tiny models: the direction, the layer, the calibration, and what is told of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from liveweight.adjustments import Active, Adjustment, Steer
from liveweight.engines.base import Message, ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, NoMendFound, UnknownSite
from liveweight.live_model import LiveModel
from liveweight.methods import METHODS, steer
from liveweight.methods.calibration import Point, Rows, calibrate
from liveweight.methods.sides import (
    Example,
    Sides,
    example_of,
    of_pairs,
    of_sets,
    of_words,
    read_pairs,
    read_side,
    two_words,
)
from liveweight.methods.steer import Effect, candidates, directions, steering
from liveweight.settings import MethodSettings
from tests.methods.tiny_cases import tiny_case
from tests.tiny_workspace import QUESTION, tiny_settings
from tests.tracing.tiny_engines import tiny_engine

SEVERAL = ["llama", "gemma2", "gpt2", "olmo2", "mixtral"]
ITEMS = [ScoreItem((5, 9, 17, 4), (3, 11, 8)), ScoreItem((5, 9, 4), (9,)), ScoreItem((30, 31, 32, 33, 6), (2, 6))]


@pytest.fixture
def engine(tmp_path: Path) -> TransformersEngine:
    return tiny_engine("llama", tmp_path)


def randn(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def steered(layer: int, vector: Tensor, scale: float = 1.0) -> Active:
    op = Steer(site=f"layers.{layer}.resid", vector=vector, scale=scale)
    return Active(Adjustment(name="steer", method="test", ops=(op,)))


def words(engine: TransformersEngine) -> Sides:
    carriers = [engine.encode([Message("user", text)]) for text in ("who?", "what now?", "say it.", "go on, please")]
    return of_words(engine.format, "a", "c", carriers)


def neutral(engine: TransformersEngine) -> list[ScoreItem]:
    prompts = [engine.encode([Message("user", text)]) for text in ("one?", "hello there", "what is it?")]
    return [ScoreItem(tuple(p), tuple(a)) for p, a in zip(prompts, engine.greedy(prompts, 4), strict=True)]


# ------------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("first", [1e-3, 0.2, 1.0, 50.0])
@pytest.mark.parametrize("measure", ["mean", "p95"])
def test_calibration_reaches_its_target_in_few_trials(first: float, measure: str) -> None:
    def trial(factor: float) -> Point:
        kl = 6.0 * (1.0 - math.exp(-((factor / 3.0) ** 2)))  # a square that saturates
        return Point(factor, kl, 2 * kl, 0.0)

    found, reached = calibrate(trial, 0.5, measure, first=first, tolerance=0.05, most=14)  # type: ignore[arg-type]
    assert reached
    assert found.kl(measure) == pytest.approx(0.5, rel=0.05)  # type: ignore[arg-type]


def test_calibration_finds_its_way_back_from_a_model_that_broke() -> None:
    def trial(factor: float) -> Point:
        kl = 0.01 * factor**2 if factor < 20 else math.nan
        return Point(factor, kl, kl, 0.0)

    found, reached = calibrate(trial, 0.5, "mean", first=1000.0, tolerance=0.05, most=20)
    assert reached and found.mean_kl == pytest.approx(0.5, rel=0.05)


def test_a_target_that_no_factor_reaches_is_told() -> None:
    found, reached = calibrate(lambda f: Point(f, 0.2, 0.2, 0.0), 0.5, "mean", first=1.0, tolerance=0.05, most=5)
    assert not reached and found.mean_kl == 0.2


@pytest.mark.parametrize("architecture", SEVERAL)
def test_rows_with_something_added_are_what_the_op_gives(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    layers = list(range(engine.sites.layers))
    rows = Rows(engine, ITEMS, layers)
    vector = 3 * randn(engine.sites.width)
    plain = torch.stack([score.logprobs.mean() for score in engine.score(ITEMS)])
    torch.testing.assert_close(rows.logprobs(), plain, rtol=1e-4, atol=1e-5)
    for layer in layers:
        with engine.preview((steered(layer, vector, 0.5),)):
            wished = torch.stack([score.logprobs.mean() for score in engine.score(ITEMS)])
        torch.testing.assert_close(rows.logprobs(layer, 0.5 * vector), wished, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(wished, plain, atol=1e-3)


def test_the_kl_of_rows_is_the_definition(engine: TransformersEngine) -> None:
    vector = 2 * randn(engine.sites.width)
    found = Rows(engine, ITEMS, [1]).kl(1, vector)
    for item, kl in zip(ITEMS, found, strict=True):
        ids, said = torch.tensor([[*item.prompt, *item.continuation]]), slice(len(item.prompt) - 1, -1)
        base = engine.model(ids).logits[0, said].log_softmax(-1)
        with engine.preview((steered(1, vector),)):
            changed = engine.model(ids).logits[0, said].log_softmax(-1)
        assert float(kl) == pytest.approx(float((base.exp() * (base - changed)).sum(-1).mean()), rel=1e-3)
    assert float(Rows(engine, ITEMS, [1]).kl(1, torch.zeros(engine.sites.width)).max()) == pytest.approx(0, abs=1e-6)


# -------------------------------------------------------------------------------------------------- directions


def streams(engine: TransformersEngine, example: Example, layer: int) -> Tensor:
    site = f"layers.{layer}.resid"
    return engine.trace([*example.prompt, *example.answer], [site]).values[site]


@pytest.mark.parametrize("architecture", SEVERAL)
def test_the_mean_direction_is_read_over_the_answers_tokens(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    sides = words(engine)
    found = directions(engine, sides, [0, 2], "mean")
    for layer in (0, 2):
        means = [
            torch.stack([streams(engine, each, layer)[len(each.prompt) :].mean(0) for each in side]).mean(0)
            for side in (sides.toward, sides.away)
        ]
        torch.testing.assert_close(found[layer], means[0] - means[1], rtol=1e-3, atol=1e-4)


def test_prompts_without_answers_are_read_at_their_last_token(engine: TransformersEngine) -> None:
    sides = of_sets(engine.format, ["be kind", "smile"], ["be rude"])
    found = directions(engine, sides, [1], "mean")[1]
    toward, away = ([streams(engine, each, 1)[-1] for each in side] for side in (sides.toward, sides.away))
    torch.testing.assert_close(found, torch.stack(toward).mean(0) - away[0], rtol=1e-3, atol=1e-4)


def test_the_principal_component_is_one_direction_and_looks_where_the_mean_looks(engine: TransformersEngine) -> None:
    sides = words(engine)
    mean, component = (directions(engine, sides, [1], how)[1] for how in ("mean", "pca"))
    assert float(mean @ component) > 0
    differences = torch.stack(
        [
            streams(engine, one, 1)[len(one.prompt) :].mean(0) - streams(engine, other, 1)[len(other.prompt) :].mean(0)
            for one, other in zip(sides.toward, sides.away, strict=True)
        ]
    )
    along = differences @ (component / component.norm())
    _, sizes, _ = torch.linalg.svd(differences)
    assert float(along.square().sum()) == pytest.approx(float(sizes[0] ** 2), rel=1e-3)
    assert float(component.norm()) == pytest.approx(float(along.square().mean().sqrt()), rel=1e-3)


def test_a_single_pair_is_the_first_ones_difference(engine: TransformersEngine) -> None:
    sides = words(engine)
    first = Sides("first", sides.toward[:1], sides.away[:1], True)
    found = directions(engine, sides, [1], "pair")[1]
    torch.testing.assert_close(found, directions(engine, first, [1], "mean")[1])


def test_what_cannot_be_contrasted_is_told(engine: TransformersEngine) -> None:
    chat = engine.format
    with pytest.raises(InvalidInput, match="needs pairs"):
        directions(engine, of_sets(chat, ["a"], ["b"]), [1], "pca")
    with pytest.raises(InvalidInput, match="the same at layer 1"):
        directions(engine, of_pairs(chat, [("a", "a")]), [1], "mean")
    with pytest.raises(InvalidInput, match="no example"):
        of_sets(chat, ["a"], [])
    with pytest.raises(InvalidInput, match="some only a prompt"):
        of_pairs(chat, [("a", [Message("user", "a"), Message("assistant", "b")])])
    with pytest.raises(InvalidInput, match="two sides"):
        two_words("love")
    with pytest.raises(InvalidInput, match="Both sides"):
        of_words(chat, "a", "a", [[3, 4]])


def test_the_effect_is_the_gain_of_one_side_over_the_other(engine: TransformersEngine) -> None:
    sides, vector = words(engine), 3 * randn(engine.sites.width)
    effect = Effect(engine, sides, [1])

    def margin() -> float:
        each = [
            [score.logprobs.mean() for score in engine.score([ScoreItem(e.prompt, e.answer) for e in side])]
            for side in (sides.toward, sides.away)
        ]
        return float(torch.stack(each[0]).mean() - torch.stack(each[1]).mean())

    before = margin()
    with engine.preview((steered(1, vector),)):
        wished = margin() - before
    assert effect(1, vector) == pytest.approx(wished, rel=1e-3, abs=1e-4)


def test_every_third_pair_is_held_back(engine: TransformersEngine) -> None:
    sides = words(engine)
    fitting, held = sides.split()
    assert (len(fitting.toward), len(held.toward)) == (3, 1)
    assert not set(fitting.toward) & set(held.toward)
    few = Sides("few", sides.toward[:2], sides.away[:2], True)
    assert few.split() == (few, few)


# --------------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("how", ["mean", "pca", "pair", "tuned"])
@pytest.mark.parametrize("measure", ["mean", "p95"])
def test_a_steering_reaches_its_target_and_leaves_the_model_alone(
    engine: TransformersEngine, how: str, measure: str
) -> None:
    before, chance = engine.fingerprints(), torch.get_rng_state()
    rows = neutral(engine)
    found = steering(engine, words(engine), rows, how=how, target=0.1, measure=measure)  # type: ignore[arg-type]
    assert engine.fingerprints() == before
    assert torch.equal(torch.get_rng_state(), chance)
    assert not engine.activations.hooks
    assert found.reached == pytest.approx(0.1, rel=0.1)
    again = Rows(engine, rows, [found.layer]).kl(found.layer, found.factor * found.vector)
    assert found.mean_kl == pytest.approx(float(again.mean()), rel=1e-3)
    assert found.effect > 0
    assert [each.layer for each in found.layers] == candidates(engine, how)  # type: ignore[arg-type]
    assert found.layer == max(found.layers, key=lambda each: each.per_nat).layer
    assert found.factor in [point.factor for point in found.curve]
    assert [point.factor for point in found.curve] == sorted(point.factor for point in found.curve)
    assert json.loads(json.dumps(found.as_dict()))["reached"] == found.reached


def test_tuning_moves_more_than_the_mean_at_the_same_kl(engine: TransformersEngine) -> None:
    mean, tuned = (
        steering(engine, words(engine), neutral(engine), how=how, layer=1, target=0.1)  # type: ignore[arg-type]
        for how in ("mean", "tuned")
    )
    assert tuned.effect > mean.effect
    assert tuned.reached == pytest.approx(mean.reached, rel=0.2)


def test_a_layer_that_is_given_is_taken_and_one_that_is_not_there_is_told(engine: TransformersEngine) -> None:
    found = steering(engine, words(engine), neutral(engine), layer=0, target=0.1)
    assert (found.layer, found.layers, found.site) == (0, (), "layers.0.resid")
    with pytest.raises(UnknownSite):
        steering(engine, words(engine), neutral(engine), layer=99)
    with pytest.raises(InvalidInput, match="target KL"):
        steering(engine, words(engine), neutral(engine), target=0.0)
    with pytest.raises(InvalidInput, match="no neutral"):
        steering(engine, words(engine), [])


def test_the_picture_shows_the_curve_and_the_layers(engine: TransformersEngine) -> None:
    found = steering(engine, words(engine), neutral(engine), target=0.1)
    names = [trace.name for trace in found.picture().data]
    assert names[:3] == ["mean KL", "p95 KL", "effect"]
    assert len(names) == 4
    assert list(found.picture().data[0].y) == [point.mean_kl for point in found.curve]


def test_a_steering_is_saved_loaded_and_applied_as_it_was(tmp_path: Path) -> None:
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        before = live.fingerprints()
        found = live.steer("a - c", kl=0.05, measure="mean")
        assert live.changes() == [] and live.fingerprints() == before
        adjustment = found.adjustment()
        adjustment.save(tmp_path / "saved")
        loaded = Adjustment.load(tmp_path / "saved")
        assert loaded == adjustment
        change = live.apply(loaded, prompt=QUESTION)
        steered_state = live.engine.version.hash
        assert change.state == "active"
        live.undo(change)
        assert live.engine.version.hash != steered_state
        live.apply(found.adjustment(), prompt=QUESTION)
        assert live.engine.version.hash == steered_state
        live.undo()
        assert live.fingerprints() == before
        assert len(live.tried(found.adjustment(4.0), QUESTION)) == 2
        assert found.adjustment(0.5).ops[0].scale == pytest.approx(found.factor / 2)  # type: ignore[union-attr]


def test_steering_by_nothing_or_by_two_things_is_refused(tmp_path: Path) -> None:
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        for given in ({}, {"words": "a - b", "pairs": [("a", "b")]}):
            with pytest.raises(InvalidInput, match="one thing"):
                live.steer(**given)  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="no example"):
            live.steer(toward=["a"])


# ------------------------------------------------------------------------------------------------ the feedback


def test_as_a_method_it_takes_the_judged_answer_away(tmp_path: Path) -> None:
    engine = tiny_engine("qwen2", tmp_path)
    before = engine.fingerprints()
    case = tiny_case(engine, "bad", rank=2)
    found = steer.propose(engine, case, MethodSettings())
    assert engine.fingerprints() == before and not engine.activations.hooks
    with engine.preview((Active(found),)):
        assert engine.greedy([case.contexts[0].prompt], 2)[0] != list(case.answer_tokens)
    assert METHODS["steer"].kinds == ("bad", "fix")


def test_as_a_method_it_says_where_it_does_not_work(engine: TransformersEngine) -> None:
    case = tiny_case(engine, "fix", rank=40)
    with pytest.raises(NoMendFound, match="steer did not make"):
        steer.propose(engine, case, MethodSettings(layer=0))


# ---------------------------------------------------------------------------------------------------- the files


def test_pairs_are_read_in_both_formats(tmp_path: Path, engine: TransformersEngine) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"question": "who?", "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"},
        {"positive": {"prompt": "a", "answer": "b"}, "negative": {"prompt": "a", "answer": "c"}},
        {
            "positive": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "negative": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
        },
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    sides = of_pairs(engine.format, read_pairs(path))
    assert sides.paired and sides.answered and len(sides.toward) == 3
    assert (
        sides.toward[1]
        == sides.toward[2]
        == example_of(engine.format, [Message("user", "a"), Message("assistant", "b")])
    )
    prompt = engine.encode([Message("user", "who?")])
    assert sides.away[0].answer == tuple(engine.format.encode_continuation(prompt, " No"))


def test_a_side_is_read_as_plain_lines_or_as_json(tmp_path: Path) -> None:
    path = tmp_path / "side.txt"
    path.write_text('be kind\n"be \\"very\\" kind"\n{"prompt": "smile"}\n', encoding="utf-8")
    assert read_side(path) == ["be kind", 'be "very" kind', "smile"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no pair"),
        ("nonsense", "line 1: not JSON"),
        ('{"positive": "a", "negative": "b"}\n{"positive": "a"}', "line 2: it has the keys positive"),
        ('{"question": "a", "answer_matching_behavior": "b"}', "None stands where"),
        ('["a"]', "a JSON object is needed"),
        ('{"positive": 3, "negative": "b"}', "neither a question nor a chat"),
    ],
)
def test_a_file_that_holds_no_pairs_is_told_by_its_line(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInput, match=said):
        read_pairs(path)
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_pairs(tmp_path / "missing")


def test_tuned_without_answers_is_refused(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    sides = of_pairs(engine.format, [("be kind", "be rude"), ("be warm", "be cold")])
    with pytest.raises(InvalidInput, match="these examples have none"):
        directions(engine, sides, [1], "tuned")
