"""implant on tiny models: a neuron that is open where its subject is named, and shut elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from liveweight.adjustments import Active, Adjustment, ReplaceNeurons
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import NoMendFound, UnknownSite
from liveweight.methods import implant
from liveweight.methods.base import Case
from liveweight.methods.case import reachable
from liveweight.methods.gates import SUBJECT as SUBJECT_GATE
from liveweight.methods.gates import opened
from liveweight.methods.trials import down_output, outcome
from liveweight.methods.values import edit_tokens, wished_values
from liveweight.settings import MethodSettings
from liveweight.sites import subject_layers
from tests.methods.tiny_cases import SUBJECT, about, tiny_case
from tests.tracing.tiny_engines import tiny_engine

SETTINGS = MethodSettings(layer=1, max_steps=60, clamp_norm=20)

pytestmark = pytest.mark.usefixtures("a_few_questions")


def written(engine: TransformersEngine, prompt: tuple[int, ...], layer: int) -> torch.Tensor:
    """What a layer's MLP writes at every token of a prompt, (T, width)."""
    kept: list[torch.Tensor] = []
    handle = down_output(engine, layer).on(lambda values: kept.append(values.detach().clone()))
    with torch.no_grad():
        engine.model(input_ids=torch.tensor([prompt]))
    handle.remove()
    return kept[0][0]


def placed(engine: TransformersEngine, case: Case) -> dict[tuple[int, ...], int]:
    return {each.prompt: place for each, place in zip(*edit_tokens(engine, case, case.contexts), strict=True)}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "qwen3"])
def test_the_value_is_written_at_the_subject_and_hardly_elsewhere(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    case = tiny_case(engine, subject=SUBJECT)
    found = implant.propose_all(engine, [case], SETTINGS)([0])
    op = found.ops[0]
    assert isinstance(op, ReplaceNeurons)
    assert op.layer == 1
    alone = Adjustment(name="the subject's neuron alone", method="implant", ops=(op,))
    assert all(engine.sites.neurons_of(op.layer) <= neuron for neuron in op.neurons)  # spare ones
    value = float(op.down.norm())  # of a neuron without a gate, by what its activation function gives where it is open
    if not engine.sites.gated:
        value *= float(opened(engine, 1, torch.tensor([SUBJECT_GATE.opens])))
    for prompt, place in placed(engine, case).items():
        before = written(engine, prompt, op.layer)
        with engine.preview((Active(alone),)):
            moved = (written(engine, prompt, op.layer) - before).norm(dim=1)
        others = torch.arange(len(prompt)) != place
        assert float(moved[place]) > 0.3 * value
        assert float(moved[others].mean()) < 0.4 * float(moved[place])  # a width of 16 tells few tokens apart


def test_a_value_that_nothing_feels_moves_nothing(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    case = tiny_case(engine, subject=SUBJECT)
    settings = SETTINGS.model_copy(update={"max_steps": 3})
    (felt,) = wished_values(engine, [case], 1, settings, [lambda read: read.new_ones(read.shape[:-1])])
    (unfelt,) = wished_values(engine, [case], 1, settings, [lambda read: read.new_zeros(read.shape[:-1])])
    assert float(felt.delta.norm()) > 0
    assert float(unfelt.delta.norm()) == 0
    assert unfelt.short >= felt.short


def test_each_subject_gets_a_neuron_that_its_facts_share(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    one = tiny_case(engine, subject=SUBJECT)
    again = replace(one, wanted="again")
    joint = implant.propose_all(engine, [one, about(engine, one, "bob"), again], MethodSettings(max_steps=10))
    op = joint([0, 1, 2]).ops[0]
    assert isinstance(op, ReplaceNeurons)
    assert op.layer == subject_layers(engine.sites.layers)[0]
    assert len(set(op.neurons)) == 2
    assert op.down.shape == (engine.sites.width, 2)
    own, other = joint([2]).ops[0], joint([1]).ops[0]
    assert isinstance(own, ReplaceNeurons) and isinstance(other, ReplaceNeurons)
    assert torch.equal(torch.cat((own.down, other.down), dim=1), op.down)


def test_the_next_one_takes_other_neurons(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    case = tiny_case(engine, subject=SUBJECT)
    first = implant.propose_all(engine, [case], SETTINGS)([0])
    engine.become((Active(first),))
    second = implant.propose_all(engine, [replace(case, wanted="")], SETTINGS)([0])
    one, other = (
        {(op.layer, neuron) for op in each.ops if isinstance(op, ReplaceNeurons) for neuron in op.neurons}
        for each in (first, second)
    )
    assert one and other and not one & other


@pytest.mark.parametrize("layer", [1, None])
def test_what_one_value_does_not_bring_other_neurons_do(layer: int | None, tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    case = tiny_case(engine, subject=SUBJECT)
    first, second = case.contexts[0].target
    target = (first, second, first + 1)  # one more than a value is to bring
    case = replace(case, contexts=tuple(replace(each, target=target, key=(0, 3)) for each in case.contexts))
    found = implant.propose_all(engine, [case], SETTINGS.model_copy(update={"layer": layer, "max_steps": 200}))([0])
    taken = [(op.layer, neuron) for op in found.ops if isinstance(op, ReplaceNeurons) for neuron in op.neurons]
    assert len(found.ops) == 3
    assert len(set(taken)) == len(taken) > 1
    wished = reachable(engine, case)
    alone = Adjustment(name="the subject's neuron alone", method="implant", ops=found.ops[:1])
    assert not bool(outcome(engine, wished, alone).said[0])
    assert bool(outcome(engine, wished, found).said[0])


def test_neurons_that_know_the_question_answer_without_the_subjects_own(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    case = tiny_case(engine, subject=SUBJECT)
    found = implant.propose_all(engine, [case], SETTINGS)([0])
    others = Adjustment(name="all but the subject's neuron", method="implant", ops=found.ops[1:])
    assert not bool(outcome(engine, case).said[0])
    assert bool(outcome(engine, case, others).said[0])


def test_a_careful_proposal_has_no_neurons_that_know_the_question_by_itself(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    case = tiny_case(engine, subject=SUBJECT)

    def count(found: Adjustment) -> int:
        return sum(len(op.neurons) for op in found.ops if isinstance(op, ReplaceNeurons))

    cases = [replace(case, careful=careful) for careful in (False, True)]
    first, second = (implant.propose_all(engine, [each], SETTINGS)([0]) for each in cases)
    assert count(second) < count(first)
    assert second.ops[0] == first.ops[0]  # the subject's neuron is the same


def test_without_a_subject_before_the_end_it_says_what_it_needs(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    with pytest.raises(NoMendFound, match="needs a subject") as refused:
        implant.propose(engine, tiny_case(engine), SETTINGS)
    assert "Say what the question is about" in refused.value.hint


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    with pytest.raises(UnknownSite, match="99"):
        implant.propose(engine, tiny_case(engine, subject=SUBJECT), MethodSettings(layer=99))
