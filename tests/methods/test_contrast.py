"""From two sides to an adjustment, on tiny models: what it takes away, what it leaves, what it says when it cannot."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from liveweight.adjustments import Active, Adjustment, ScaleNeurons
from liveweight.engines.base import ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, NoMendFound
from liveweight.live_model import LiveModel
from liveweight.methods.base import Context
from liveweight.methods.contrast import (
    GONE,
    KEPT,
    LARGE_ENOUGH,
    LEVEL,
    Contrast,
    Held,
    _search,
    contrast,
    examples,
    propose,
)
from liveweight.methods.trials import outcome
from liveweight.settings import MethodSettings
from tests.methods.tiny_cases import tiny_case
from tests.tiny_workspace import tiny_settings
from tests.tracing.tiny_engines import tiny_engine


def two_answers(engine: TransformersEngine, count: int = 12) -> tuple[list[ScoreItem], list[ScoreItem]]:
    """Prompts to which a random model says the one token, and prompts to which it says the other."""
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(3, 60, (6,), generator=generator).tolist()) for _ in range(300)]
    said = [reply[0] for reply in engine.greedy(prompts, 1)]
    tokens = [token for token, _ in Counter(said).most_common(2)]
    a, b = ([ScoreItem(p, (s,)) for p, s in zip(prompts, said, strict=True) if s == token] for token in tokens)
    return a[:count], b[:count]


def compared(engine: TransformersEngine) -> Contrast:
    return contrast(engine, *two_answers(engine))


def said(engine: TransformersEngine, items: tuple[ScoreItem, ...], trial: Adjustment | None = None) -> float:
    with engine.preview((Active(trial),) if trial else ()):
        return sum(score.greedy for score in engine.score(items)) / len(items)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_first_side_s_answers_go_and_the_second_s_stay(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    found = compared(engine)
    adjustment = found.adjustment()
    assert said(engine, found.a) == said(engine, found.b) == 1.0
    assert said(engine, found.a, adjustment) <= 1.0 - GONE
    assert said(engine, found.b, adjustment) >= KEPT
    assert {type(op) for op in adjustment.ops} == {ScaleNeurons}
    assert adjustment.method == "contrast"


def test_only_neurons_that_differ_surely_and_enough_are_taken_the_strongest_first(tmp_path: Path) -> None:
    found = compared(tiny_engine("gpt2", tmp_path))
    neurons = found.neurons(1000)
    assert len(neurons) == found.eligible > 1
    assert all(each.q < LEVEL and abs(each.effect_size) >= LARGE_ENOUGH and each.push > 0 for each in neurons)
    assert [each.push for each in neurons] == sorted((each.push for each in neurons), reverse=True)
    assert all((each.side == "a") == (abs(each.mean_a) >= abs(each.mean_b)) for each in neurons)
    taken = {
        (op.layer, neuron) for op in found.adjustment().ops if isinstance(op, ScaleNeurons) for neuron in op.neurons
    }
    assert taken <= {(each.layer, each.neuron) for each in neurons if each.side == "a"}


def test_with_both_the_second_side_s_neurons_go_up_by_as_much(tmp_path: Path) -> None:
    found = compared(tiny_engine("gpt2", tmp_path))
    sides = {(each.layer, each.neuron): each.side for each in found.neurons(6)}
    ops = found.adjustment(both=True, count=6, factor=0.25).ops
    factors = {
        (op.layer, neuron): float(factor)
        for op in ops
        if isinstance(op, ScaleNeurons)
        for neuron, factor in zip(op.neurons, op.factors, strict=True)
    }
    assert factors == {neuron: 0.25 if side == "a" else 1.75 for neuron, side in sides.items()}
    assert set(factors.values()) == {0.25, 1.75}


def test_the_table_is_json(tmp_path: Path) -> None:
    found = compared(tiny_engine("llama", tmp_path))
    told = json.loads(json.dumps(found.as_dict(top=3)))
    assert told["prompts"] == [12, 12]
    assert len(told["neurons"]) == 3
    assert told["neurons"][0]["q"] < LEVEL


def test_a_smaller_share_takes_no_more_neurons_and_no_stronger_a_factor(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    found = compared(engine)
    some, most = found.adjustment(gone=0.3), found.adjustment(gone=0.9)
    assert 1.0 - said(engine, found.a, some) >= 0.3
    assert 1.0 - said(engine, found.a, most) >= 0.9

    def moved(adjustment: Adjustment) -> float:
        return sum(float((1.0 - op.factors).abs().sum()) for op in adjustment.ops if isinstance(op, ScaleNeurons))

    assert moved(some) <= moved(most)
    for share in (0.0, 1.5):
        with pytest.raises(InvalidInput, match="no share"):
            found.adjustment(gone=share)


def test_what_cannot_be_done_is_said_with_what_was_tried(tmp_path: Path) -> None:
    nothing = compared(tiny_engine("qwen3", tmp_path))
    assert nothing.eligible == 0
    with pytest.raises(NoMendFound, match="pushes one of them alone"):
        nothing.adjustment()
    tried: list[str] = []
    neurons = [((0, neuron), True) for neuron in range(20)]
    assert _search("x", neurons, lambda _: Held(0.1, 1.0), GONE, 20, tried) is None
    assert tried[:2] == ["16 neurons by 0.00: 10% gone, 100% kept", "20 neurons by 0.00: 10% gone, 100% kept"]
    assert len(tried) == 6  # silenced, and turned round twice


def test_where_the_fewest_neurons_leave_too_few_answers_more_of_them_are_moved_less() -> None:
    def held(trial: Adjustment) -> Held:
        moved = [float(1.0 - f) for op in trial.ops if isinstance(op, ScaleNeurons) for f in op.factors]
        return Held(min(1.0, sum(moved) / 32), 1.0 - 0.07 * max(moved))

    found = _search("x", [((0, neuron), True) for neuron in range(100)], held, GONE, 100, [])
    assert found is not None
    (op,) = found.ops
    assert isinstance(op, ScaleNeurons) and len(op.neurons) == 45  # 32 would have to be moved too far
    assert held(found).gone >= GONE and held(found).kept >= KEPT


def test_answers_that_the_model_does_not_give_cannot_be_checked_on(tmp_path: Path) -> None:
    engine = tiny_engine("gpt2", tmp_path)
    a, b = two_answers(engine)
    other = [ScoreItem(item.prompt, (b[0].continuation[0] + 1,)) for item in a]
    with pytest.raises(InvalidInput, match="none of the odd ones's answers"):
        contrast(engine, other, b, names=("the odd ones", "b")).adjustment()


def test_neither_comparing_nor_searching_changes_the_model(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    bytes_before, version, random = engine.fingerprints(), engine.version, torch.get_rng_state()
    compared(engine).adjustment()
    assert engine.fingerprints() == bytes_before
    assert engine.version == version
    assert torch.equal(torch.get_rng_state(), random)


def test_prompts_come_with_answers_or_get_the_model_s_own_each_once(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    given, own, completed = (
        examples(engine, ["a", ("b c", "no. yes"), "a"])[1],
        *examples(engine, ["a"]),
        *examples(engine, ["a"], completion=True),
    )
    assert engine.format.decode(given.continuation).strip() == "no."
    assert 1 <= len(own.continuation) <= 8
    assert own.continuation == tuple(engine.greedy([own.prompt], 8)[0])[: len(own.continuation)]
    assert completed.prompt == tuple(engine.format.encode_text("a", special=True))
    assert len(examples(engine, ["a", "a", ("a", "b")])) == 2
    with pytest.raises(InvalidInput, match="prompt is empty"):
        examples(engine, [" "])
    with pytest.raises(InvalidInput, match="answer to 'a' is empty"):
        examples(engine, [("a", "")])


def test_a_bad_answer_is_contrasted_with_its_neighbours(tmp_path: Path) -> None:
    engine = tiny_engine("gpt2", tmp_path)
    a, b = two_answers(engine)
    answer, other = a[0].continuation, b[0].continuation
    contexts = tuple(Context((), item.prompt, other, (0, 1)) for item in a)
    neighbours = tuple(Context((), item.prompt, (), (0, 0)) for item in b)
    case = tiny_case(engine, "bad")
    case = type(case)(**{**vars(case), "contexts": contexts, "others": neighbours, "answer_tokens": answer})
    found = propose(engine, case, MethodSettings())
    assert outcome(engine, case, found).removes
    assert said(engine, tuple(b), found) >= KEPT
    with pytest.raises(NoMendFound, match="first side has 3 prompts"):
        propose(engine, tiny_case(engine, "bad"), MethodSettings())


def test_a_person_s_own_judgements_need_enough_of_both(tmp_path: Path) -> None:
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        replies = [live.chat(f"what is {letter}?") for letter in "abcdefgh"]
        for number, reply in enumerate(replies):
            live.ledger.add_feedback(reply.id, "bad" if number < 4 else "good")
        found = live.contrast()
        assert found.names == ("bad", "good")
        assert (len(found.a), len(found.b)) == (4, 4)
        live.ledger.add_feedback(replies[0].id, "good")  # the latest verdict counts
        with pytest.raises(InvalidInput, match="first side has 3 prompts"):
            live.contrast()
        with pytest.raises(InvalidInput, match="one side"):
            live.contrast(["a"])
