"""patch on tiny models: neurons for one case, and for many in one change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from liveweight.adjustments import Active, ReplaceNeurons
from liveweight.engines.base import ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import NoMendFound
from liveweight.methods import patch
from liveweight.methods.base import Case
from liveweight.methods.room import roomy_layer
from liveweight.methods.trials import outcome
from liveweight.settings import MethodSettings
from liveweight.sites import patchable_layers
from tests.methods.tiny_cases import SUBJECT, about, tiny_case
from tests.tracing.tiny_engines import tiny_engine

SETTINGS = MethodSettings(max_steps=60)

pytestmark = pytest.mark.usefixtures("a_few_questions")


def cases_of(engine: TransformersEngine) -> list[Case]:
    one = tiny_case(engine, subject=SUBJECT)
    return [one, about(engine, one, "bob", later=7), about(engine, one, "ann", later=13)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_many_cases_are_mended_by_one_change(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    cases = cases_of(engine)
    found = patch.propose_all(engine, iter(cases), SETTINGS)(range(3))
    assert all(isinstance(op, ReplaceNeurons) for op in found.ops)
    assert found.name == "patch: 3 facts"
    for case in cases:
        before, after = outcome(engine, case), outcome(engine, case, found)
        assert float(after.logprobs[0]) > float(before.logprobs[0])
    weights = engine.fingerprints()
    engine.become((Active(found),))
    engine.become(())
    assert engine.fingerprints() == weights


def test_alone_and_as_one_of_one_it_is_the_same_change(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    case = tiny_case(engine, subject=SUBJECT)
    assert patch.propose(engine, case, SETTINGS).hash == patch.propose_all(engine, [case], SETTINGS)([0]).hash


def test_some_of_a_joint_change_are_the_same_neurons_without_the_others(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    joint = patch.propose_all(engine, cases_of(engine), SETTINGS)
    (every,), (first,), (rest,) = (joint(numbers).ops for numbers in ([0, 1, 2], [0], [1, 2]))
    assert isinstance(every, ReplaceNeurons) and isinstance(first, ReplaceNeurons) and isinstance(rest, ReplaceNeurons)
    assert torch.equal(torch.cat((first.down, rest.down), dim=1), every.down)
    assert torch.equal(torch.cat((first.up, rest.up)), every.up)


def test_what_is_planned_for_a_layer_counts_as_taken(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    (spare,) = {engine.sites.spare_of(layer) for layer in patchable_layers(engine.sites.layers)}
    assert roomy_layer(engine, [1, 0], SETTINGS, 16, {1: spare - 16}) == 1
    assert roomy_layer(engine, [1, 0], SETTINGS, 16, {1: spare - 15}) == 0


def test_of_many_those_that_cannot_be_mended_are_left_out(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    case, other, _ = cases_of(engine)
    said = replace(case, contexts=tuple(replace(each, target=case.answer_tokens) for each in case.contexts[:1]))
    found = patch.propose_all(engine, [said, other], SETTINGS)([0, 1])
    assert sum(len(op.neurons) for op in found.ops if isinstance(op, ReplaceNeurons)) <= len(other.contexts[0].target)
    with pytest.raises(NoMendFound, match="already"):
        patch.propose_all(engine, [said], SETTINGS)


def test_an_answer_that_is_led_to_is_made_sure_where_the_model_would_say_it_anyway(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    case = tiny_case(engine, subject=SUBJECT)
    first, *_ = case.contexts[0].target
    contexts = []
    for each in case.contexts:
        (anyway,) = engine.greedy([(*each.prompt, first)], 2)
        contexts.append(replace(each, target=(first, *anyway), key=(0, 1 + len(anyway))))
    assert len({each.target for each in contexts}) == 1
    case = replace(case, contexts=tuple(contexts))
    usual, led = (patch.propose(engine, replace(case, led_to=led_to), SETTINGS) for led_to in (False, True))
    assert [len(op.neurons) for op in usual.ops if isinstance(op, ReplaceNeurons)] == [1]
    assert [len(op.neurons) for op in led.ops if isinstance(op, ReplaceNeurons)] == [len(contexts[0].target)]
    with engine.preview((Active(led),)):
        assert engine.score([ScoreItem(contexts[0].prompt, contexts[0].target)])[0].greedy


def test_a_good_answer_that_leads_by_little_is_made_surer(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    case = tiny_case(engine, "good")
    contexts = tuple(replace(each, key=(0, len(each.target))) for each in case.contexts[:1])
    case = replace(case, contexts=contexts)

    def thinnest() -> float:
        score = engine.score([ScoreItem(contexts[0].prompt, contexts[0].target)])[0]
        assert score.greedy
        final, _ = engine.read([contexts[0].tokens[:-1]], [len(contexts[0].prompt) - 1], 1)[0]
        return float(engine.leads(final, torch.tensor(contexts[0].target))[0].detach().min())

    before = thinnest()
    assert before < patch.THIN  # as in any random model
    with engine.preview((Active(patch.propose(engine, case, SETTINGS)),)):
        assert thinnest() > max(before, patch.THIN)
