"""A super weight's story: every figure is the base's, measured, and the base is what is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from liveweight.adjustments import Active, Adjustment, Entries
from liveweight.errors import InvalidInput, Unsupported
from liveweight.tracing.super_report import FACTORS, super_weight_report
from liveweight.tracing.super_weights import PROMPT
from liveweight.tracing.zero_shot import Sample, Task, accuracy, read_tasks
from tests.tracing.test_super_weights import COLUMN, LAYER, ROW, model_with_a_super_weight, plain_text
from tests.tracing.tiny_engines import engine_around, tiny_engine, tiny_tokenizer
from tiny_models import bytes_of

WEIGHT = f"layers.{LAYER}.mlp.down.weight"


def test_every_figure_is_that_of_a_model_whose_weight_was_set_by_hand(tmp_path: Path) -> None:
    model = model_with_a_super_weight()
    before = bytes_of(model)
    steps: list[tuple[str, int, int]] = []
    tasks = [Task("letters", (Sample("ab", (" c", " d"), 0), Sample("ba", (" c", " d"), 1)))]
    engine = engine_around(model, tmp_path)
    report = super_weight_report(engine, tasks=tasks, tokens=128, progress=lambda *step: steps.append(step))
    assert {name for name, _, _ in steps} == {"perplexity", "samples", "accuracy"}
    assert report.restored and report.weight.site == WEIGHT
    model = model_with_a_super_weight()
    assert bytes_of(model) == before
    weight = model.model.layers[LAYER].mlp.down_proj.weight
    windows = torch.tensor(tiny_tokenizer()(plain_text()[:1000])["input_ids"][:128]).view(2, 64)
    prompt = torch.tensor([tiny_tokenizer()(PROMPT)["input_ids"]])

    def perplexity() -> float:
        with torch.no_grad():
            logprobs = model(windows, use_cache=False).logits[:, 1:-1].log_softmax(-1)
        return float((-logprobs.gather(2, windows[:, 2:, None]).mean()).exp())

    def stream() -> list[float]:
        with torch.no_grad():
            states = model(prompt, output_hidden_states=True, use_cache=False).hidden_states
        return [float(state.abs().max()) for state in states[1:-1]]

    assert report.perplexity_restored == pytest.approx(perplexity(), rel=1e-3)
    assert [each.stream for each in report.layers[:2]] == pytest.approx(stream(), rel=1e-3)
    assert tuple(point.factor for point in report.scaled) == FACTORS
    for point in report.scaled:
        with torch.no_grad():
            weight[ROW, COLUMN] = 50.0 * point.factor
        assert point.perplexity == pytest.approx(perplexity(), rel=1e-3), point.factor
    assert report.scaled[4].perplexity == report.perplexity_restored
    with torch.no_grad():
        weight[ROW, COLUMN] = 0.0
    assert [each.stream_zeroed for each in report.layers[:2]] == pytest.approx(stream(), rel=1e-3)
    spike = report.layers[LAYER]
    assert spike.down_input == spike.down_input_zeroed == pytest.approx(2000.0, rel=1e-3)
    assert spike.down_output == pytest.approx(100_000.0, rel=1e-3)
    assert spike.down_output_zeroed is not None and spike.down_output_zeroed < 10_000
    assert spike.stream > 100 * report.layers[LAYER - 1].stream
    (task,) = report.accuracies
    assert (task.task, task.samples, task.guessed) == ("letters", 2, 0.5)
    assert len(report.said) == 2
    assert len(report.picture().data) == 7


def test_it_is_always_of_the_base_and_leaves_what_is_active(tmp_path: Path) -> None:
    engine = engine_around(model_with_a_super_weight(), tmp_path)
    first = super_weight_report(engine, tokens=64)
    op = Entries(site=WEIGHT, indices=torch.tensor([[ROW, COLUMN], [0, 0]]), values=torch.tensor([0.0, 9.0]))
    state = (Active(Adjustment(name="zero", method="test", ops=(op,))),)
    engine.become(state)
    before = bytes_of(engine.model)
    assert super_weight_report(engine, tokens=64) == first
    assert bytes_of(engine.model) == before and engine.state == state


def test_a_model_without_one_and_a_number_that_is_none_are_said(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="No super weight"):
        super_weight_report(tiny_engine("llama", tmp_path))
    with pytest.raises(InvalidInput, match="no super weight 1"):
        super_weight_report(engine_around(model_with_a_super_weight(), tmp_path), number=1)


def test_a_sample_is_answered_by_the_likeliest_of_its_answers(tmp_path: Path) -> None:
    engine = tiny_engine("qwen2", tmp_path)
    encode = tiny_tokenizer()
    prompts, answers = ("the cat", "a dog", "no one", "what"), (" abc", " x")
    right = []
    for prompt in prompts:
        losses = []
        for answer in answers:
            ids = encode(prompt + answer)["input_ids"]
            start = len(encode(prompt)["input_ids"])
            with torch.no_grad():
                logprobs = engine.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            losses.append(-float(logprobs[range(start - 1, len(ids) - 1), ids[start:]].mean()))
        right.append(losses.index(min(losses)))
    samples = [Sample(prompt, answers, place) for prompt, place in zip(prompts, right, strict=True)]
    assert accuracy(engine, samples, ()) == 1.0
    assert accuracy(engine, [sample._replace(right=1 - sample.right) for sample in samples], ()) == 0.0
    assert accuracy(engine, [samples[0], samples[1]._replace(right=1 - samples[1].right)], ()) == 0.5


def test_public_samples_are_read_with_their_choices(tmp_path: Path) -> None:
    mmlu = {"question": "which?", "choices": ["one", "two", "three", "four"], "answer": 2, "subject": "numbers"}
    (tmp_path / "mmlu.json").write_text(json.dumps([mmlu] * 3))
    (tmp_path / "cola.json").write_text(json.dumps([{"sentence": "He go.", "label": 0, "idx": 1}]))
    first, second = read_tasks(tmp_path, 2)
    assert (first.name, len(first.samples), first.guessed) == ("mmlu", 2, 1.0)
    assert first.samples[0] == Sample("which?\nA. one\nB. two\nC. three\nD. four\nAnswer:", (" A", " B", " C", " D"), 2)
    assert (second.name, second.samples[0].right) == ("cola", 0)


@pytest.mark.parametrize(
    ("content", "says"), [("{", "cannot be read"), ("[]", "no samples"), ('[{"sentence": "a"}]', "cannot be read")]
)
def test_a_file_that_is_no_list_of_samples_is_said(content: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds none of"):
        read_tasks(tmp_path, 5)
    (tmp_path / "sst2.json").write_text(content)
    with pytest.raises(InvalidInput, match=says):
        read_tasks(tmp_path, 5)
