"""Attribution against finite differences of plain forward passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from liveweight.adjustments import Active, Adjustment, ScaleNeurons, Steer
from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, UnknownSite, Unsupported
from liveweight.tracing import WhyReport, neuron_pushes, rank_neurons, read_answer, why
from tests.tracing.tiny_engines import tiny_engine
from tiny_models import DENSE_ARCHITECTURES, EXPERT_ARCHITECTURES, NEURONS

PROMPT = (1, 12, 33, 7, 25)
ANSWER = (40, 9, 21)
AGAINST = (40, 31, 5)
QUESTION = [Message("user", "what is it?")]


def logits_after_scaling(
    engine: TransformersEngine, layer: int, neuron: int, factor: float, answer: tuple[int, ...] = ANSWER
) -> Tensor:
    """(answer, vocabulary) when one neuron is scaled at the positions that the answer came from, and only there."""
    first = len(PROMPT) - 1

    def change(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, first : first + len(answer), neuron] *= factor
        return value

    hook = engine.sites.activation(f"layers.{layer}.mlp.neurons").on(change)
    try:
        with torch.no_grad():
            logits = engine.model(torch.tensor([[*PROMPT, *answer]]), use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits[first : first + len(answer)]


def slope(values: list[float], step: float) -> float:
    return (values[1] - values[0]) / (2 * step)


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_a_push_is_how_fast_the_margin_moves_with_the_neuron(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path, torch.float64)
    # Most norms compute in float32 whatever the model's dtype, so a smaller step would measure their rounding.
    parted, step = 1, 0.02
    runners_up = logits_after_scaling(engine, 0, 0, 1.0)
    rivals = runners_up.scatter(1, torch.tensor(ANSWER)[:, None], float("-inf")).argmax(-1)
    over_runner_up = neuron_pushes(engine, PROMPT, ANSWER)
    over_answer = neuron_pushes(engine, PROMPT, ANSWER, AGAINST)
    assert over_runner_up.shape == (engine.sites.layers, NEURONS)
    strongest = over_runner_up.abs().argmax(1).tolist()
    for layer, neuron in (*enumerate(strongest), (1, 17)):
        moved = [logits_after_scaling(engine, layer, neuron, 1 + sign * step) for sign in (-1, 1)]
        rows = torch.arange(len(ANSWER))
        summed = [float((each[rows, torch.tensor(ANSWER)] - each[rows, rivals]).sum()) for each in moved]
        single = [float(each[parted, ANSWER[parted]] - each[parted, AGAINST[parted]]) for each in moved]
        assert float(over_runner_up[layer, neuron]) == pytest.approx(slope(summed, step), rel=0.01, abs=1e-4)
        assert float(over_answer[layer, neuron]) == pytest.approx(slope(single, step), rel=0.01, abs=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gemma2"])
def test_activations_are_those_of_the_positions_that_predicted_the_answer(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    reading = read_answer(engine, PROMPT, ANSWER)
    whole = engine.trace([*PROMPT, *ANSWER], ["layers.1.mlp.neurons"]).values["layers.1.mlp.neurons"]
    assert torch.equal(reading.activations[1], whole[len(PROMPT) - 1 : -1])
    assert reading.activations.shape == (engine.sites.layers, len(ANSWER), NEURONS)
    assert reading.gradients is None
    with pytest.raises(InvalidInput, match="without gradients"):
        reading.pushes()


def test_ranking_goes_from_the_strongest_push_to_the_strongest_resistance(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    pushes = neuron_pushes(engine, PROMPT, ANSWER)
    ranking = rank_neurons(engine, PROMPT, ANSWER, exclude=())
    assert len(ranking) == pushes.numel()
    assert [each.push for each in ranking] == sorted(pushes.flatten().tolist(), reverse=True)
    assert all(each.push == float(pushes[each.layer, each.neuron]) for each in ranking)
    assert rank_neurons(engine, PROMPT, ANSWER, exclude=(), limit=5) == ranking[:5]
    first = (ranking[0].layer, ranking[0].neuron)
    assert rank_neurons(engine, PROMPT, ANSWER, exclude={first}) == ranking[1:]
    assert rank_neurons(engine, PROMPT, ANSWER, exclude={first}, limit=4) == ranking[1:5]


def test_why_lists_both_sides_with_shares_of_the_sum_of_all_pushes(tmp_path: Path) -> None:
    engine = tiny_engine("qwen3", tmp_path)
    prompt = tuple(engine.encode(QUESTION))
    report = why(engine, QUESTION, ANSWER, top=6)
    pushes = neuron_pushes(engine, prompt, ANSWER)
    ranking = rank_neurons(engine, prompt, ANSWER, exclude=())
    assert [(each.layer, each.neuron, each.push) for each in report.pushed] == ranking[:6]
    assert [(each.layer, each.neuron, each.push) for each in report.opposed] == ranking[:-7:-1]
    assert report.total == pytest.approx(float(pushes.abs().sum()))
    assert report.pushed[0].share == pytest.approx(ranking[0].push / report.total)
    assert report.margin == pytest.approx(sum(token.margin or 0.0 for token in report.tokens), rel=1e-4)
    assert report.tokens[0].rival_id not in (None, ANSWER[0])
    assert report.pushed[0].label is not None and report.pushed[0].label.neuron == report.pushed[0].neuron
    assert report.version == str(engine.version)
    assert WhyReport.model_validate_json(report.model_dump_json()) == report


def test_a_listed_activation_is_the_one_that_pushed_hardest_and_names_its_tokens(tmp_path: Path) -> None:
    engine = tiny_engine("gpt2", tmp_path)
    prompt = engine.encode(QUESTION)
    report = why(engine, QUESTION, ANSWER, top=3, labels=False)
    reading = read_answer(engine, prompt, ANSWER, gradients=True)
    for push in (*report.pushed, *report.opposed):
        row = int(reading.pushes()[push.layer, :, push.neuron].abs().argmax())
        assert push.activation == float(reading.activations[push.layer, row, push.neuron])
        assert push.position == len(prompt) - 1 + row
        assert push.token == ("?", *engine.format.decode(ANSWER))[row]
        assert push.predicts == engine.format.decode(ANSWER)[row]
        assert push.label is None


def test_against_another_answer_only_the_token_where_they_part_counts(tmp_path: Path) -> None:
    engine = tiny_engine("phi3", tmp_path)
    report = why(engine, QUESTION, "cat", against="cow", top=4)
    assert report.answer == " cat"  # plain text goes on after a space
    assert report.against == " cow"
    assert [token.rival for token in report.tokens] == [None, None, "o", None]
    assert report.margin == pytest.approx(report.tokens[2].margin, rel=1e-4)
    assert {push.token for push in (*report.pushed, *report.opposed)} <= {"?", " ", "c"}
    opposite = why(engine, QUESTION, "co", against="ca", top=4)
    assert [(each.layer, each.neuron) for each in opposite.opposed] == [
        (each.layer, each.neuron) for each in report.pushed
    ]


def test_excluded_neurons_are_listed_apart(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    strongest = why(engine, QUESTION, ANSWER, top=3, labels=False).pushed[0]
    report = why(engine, QUESTION, ANSWER, top=3, exclude={(strongest.layer, strongest.neuron)})
    assert strongest not in report.pushed
    assert [each.model_copy(update={"label": None}) for each in report.super_neurons] == [strongest]
    assert report.total == pytest.approx(why(engine, QUESTION, ANSWER, labels=False).total)


def test_attribution_reads_the_weights_that_are_live(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    first = rank_neurons(engine, PROMPT, ANSWER, exclude=(), limit=1)[0]
    off = ScaleNeurons(layer=first.layer, neurons=(first.neuron,), factors=torch.zeros(1))
    engine.become((Active(Adjustment(name="off", method="test", ops=(off,))),))
    assert float(neuron_pushes(engine, PROMPT, ANSWER)[first.layer, first.neuron]) == 0.0


def test_an_active_steering_of_generated_tokens_does_not_stop_a_reading(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    before = read_answer(engine, PROMPT, ANSWER).activations
    steer = Steer(site="layers.0.resid", vector=torch.full((engine.sites.width,), 0.5), when="generated")
    engine.become((Active(Adjustment(name="steer", method="test", ops=(steer,))),))
    after = read_answer(engine, PROMPT, ANSWER).activations
    assert torch.equal(after[:, 0], before[:, 0])  # read at the prompt's last token
    assert not torch.equal(after[1:, 1:], before[1:, 1:])


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    with pytest.raises(InvalidInput, match="no prompt"):
        read_answer(engine, (), ANSWER)
    with pytest.raises(InvalidInput, match="no answer"):
        why(engine, QUESTION, ())
    with pytest.raises(InvalidInput, match="begin alike"):
        why(engine, QUESTION, "ab", against="abc")
    with pytest.raises(InvalidInput, match="is empty"):
        why(engine, QUESTION, "ab", against=())
    with pytest.raises(InvalidInput, match="0 neurons"):
        why(engine, QUESTION, "a", top=0)
    with pytest.raises(InvalidInput, match="no token 61"):
        why(engine, QUESTION, [61])
    with pytest.raises(UnknownSite, match="neuron 40"):
        rank_neurons(engine, PROMPT, ANSWER, exclude={(0, 40)})


@pytest.mark.parametrize("architecture", EXPERT_ARCHITECTURES)
def test_a_model_with_experts_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    with pytest.raises(Unsupported, match="5 experts"):
        why(engine, QUESTION, ANSWER)
    with pytest.raises(Unsupported, match=architecture):
        rank_neurons(engine, PROMPT, ANSWER)
