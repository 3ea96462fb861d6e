"""Many replies at once: the same tokens as alone, fair turns, a full queue, changes on the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from liveweight.adjustments import Active, Adjustment, LowRank, Steer
from liveweight.engines import batching, decoding
from liveweight.engines.base import Sampling
from liveweight.engines.batching import Batcher, TokenStream
from liveweight.engines.decoding import DirectDecoder
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, QueueFull, Stopping
from tracing.tiny_engines import tiny_engine

PROMPTS = [[5, 9, 17, 3, 11, 8], [7, 7, 2, 40], [12, 30], [6] * 20, [44, 3, 3, 9, 1, 8, 50, 51], [33]]


@pytest.fixture
def engine(tmp_path: Path) -> TransformersEngine:
    return tiny_engine("llama", tmp_path)


@pytest.fixture
def batcher(engine: TransformersEngine) -> Iterator[Batcher]:
    batcher = Batcher(engine, rows=4, waiting=8)
    yield batcher
    batcher.close()


def loud(engine: TransformersEngine) -> Active:
    generator = torch.Generator().manual_seed(7)
    left = torch.randn(engine.sites.width, 1, generator=generator)
    right = torch.randn(1, engine.sites.neurons_of(1), generator=generator)
    op = LowRank(site="layers.1.mlp.down.weight", left=left * 5, right=right)
    return Active(Adjustment(name="loud", method="test", ops=(op,)))


def ids(stream: TokenStream) -> list[int]:
    return [token.id for token in stream]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_row_is_bit_for_bit_the_same_in_every_company(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    found = []
    with torch.inference_mode():
        for company in (0, 1, 2, 3, 5):
            decoders = [DirectDecoder(engine.model, engine.sites) for _ in range(company + 1)]
            for decoder, prompt in zip(decoders, PROMPTS, strict=False):
                decoder.feed(prompt)
            for token in (4, 12, 7):
                rows = DirectDecoder.feed_together(decoders, [token, *range(20, 20 + company)])
            found.append(rows[0])
        alone = DirectDecoder(engine.model, engine.sites)
        alone.feed(PROMPTS[0])
        for token in (4, 12, 7):
            expected = alone.feed([token])
    assert all(torch.equal(each, found[0]) for each in found)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_is_read_together_is_what_is_read_alone(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    beginnings = [[*PROMPTS[0], *prompt] for prompt in PROMPTS] + [PROMPTS[0], PROMPTS[1]]
    with torch.inference_mode():
        together = [DirectDecoder(engine.model, engine.sites) for _ in beginnings]
        read = DirectDecoder.read_together(together, beginnings)
        stepped = DirectDecoder.feed_together(together, range(20, 20 + len(beginnings)))
        for row, beginning in enumerate(beginnings):
            alone = DirectDecoder(engine.model, engine.sites)
            torch.testing.assert_close(read[row], alone.feed(beginning), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(stepped[row], alone.feed([20 + row]), rtol=1e-4, atol=1e-5)


def test_short_prompts_are_read_in_one_step_long_and_seeded_ones_alone(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "CHUNK", 45)
    together: list[int] = []
    real = DirectDecoder.read_together
    monkeypatch.setattr(
        DirectDecoder, "read_together", staticmethod(lambda d, rows: together.append(len(rows)) or real(d, rows))
    )
    batcher = Batcher(engine, rows=8, waiting=8)
    try:
        expected = [ids(batcher.submit(prompt, Sampling(max_tokens=6))) for prompt in [*PROMPTS, [3] * 50]]
        assert together == []
        with engine.gate.step():  # nothing is read before all are there
            streams = [batcher.submit(prompt, Sampling(max_tokens=6)) for prompt in [*PROMPTS, [3] * 50]]
            seeded = batcher.submit(PROMPTS[0], Sampling(max_tokens=6, seed=1))
            while batcher.running < 8:
                pass
        assert [ids(stream) for stream in streams] == expected
        assert ids(seeded) == expected[0]
        assert together[0] == len(PROMPTS)
    finally:
        batcher.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_seeded_reply_is_the_same_alone_and_among_others(
    engine: TransformersEngine, batcher: Batcher, temperature: float
) -> None:
    samplings = [Sampling(max_tokens=20, temperature=temperature, seed=seed) for seed in range(len(PROMPTS))]
    alone = [
        [(token.id, token.logprob) for token in engine.continue_from(prompt, sampling)]
        for prompt, sampling in zip(PROMPTS, samplings, strict=True)
    ]
    streams = [batcher.submit(prompt, sampling) for prompt, sampling in zip(PROMPTS, samplings, strict=True)]
    assert [[(token.id, token.logprob) for token in stream] for stream in streams] == alone


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text"])
def test_a_model_of_another_family_is_decoded_row_by_row(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    batcher = Batcher(engine)
    try:
        streams = [batcher.submit(prompt, Sampling(max_tokens=6)) for prompt in PROMPTS[:3]]
        assert [ids(stream) for stream in streams] == engine.greedy(PROMPTS[:3], 6)
    finally:
        batcher.close()


@pytest.mark.parametrize("length", [8, 9, 17])
def test_a_prompt_of_several_pieces_is_read_to_its_end(
    engine: TransformersEngine, batcher: Batcher, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    prompts = torch.randint(3, 50, (12, length), generator=torch.Generator().manual_seed(length)).tolist()
    expected = [[token.id for token in engine.continue_from(prompt, Sampling(max_tokens=6))] for prompt in prompts]
    monkeypatch.setattr(batching, "CHUNK", 8)
    monkeypatch.setattr(decoding, "CHUNK", 8)
    assert [ids(batcher.submit(prompt, Sampling(max_tokens=6))) for prompt in prompts] == expected


def test_hooks_count_positions_for_each_row(engine: TransformersEngine, batcher: Batcher) -> None:
    vector = torch.randn(engine.sites.width, generator=torch.Generator().manual_seed(1))
    steer = Steer(site="layers.1.resid", vector=vector * 3, when="generated")
    engine.become((Active(Adjustment(name="steer", method="test", ops=(steer,))),))
    expected = [[token.id for token in engine.continue_from(prompt, Sampling(max_tokens=8))] for prompt in PROMPTS[:4]]
    streams = [batcher.submit(prompt, Sampling(max_tokens=8)) for prompt in PROMPTS[:4]]
    assert [ids(stream) for stream in streams] == expected


def test_every_token_says_the_weights_that_chose_it_while_they_change(
    engine: TransformersEngine, batcher: Batcher
) -> None:
    change = loud(engine)
    sampling = Sampling(max_tokens=40, seed=1)
    streams = [batcher.submit(prompt, sampling) for prompt in PROMPTS[:4]]
    heads = [[next(stream) for _ in range(3)] for stream in streams]
    engine.become((change,))
    replies = [head + list(stream) for head, stream in zip(heads, streams, strict=True)]
    for prompt, reply in zip(PROMPTS, replies, strict=False):
        for at, token in enumerate(reply):
            engine.become((change,) if token.version.number else ())
            before = [*prompt, *(each.id for each in reply[:at])]
            assert token.id == engine.greedy([before], 1)[0][0]
    assert {token.version.number for reply in replies for token in reply} == {0, 1}


def test_a_change_that_waits_in_drain_mode_lets_what_runs_end_and_what_comes_wait(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    engine.gate.mode = "drain"
    batcher = Batcher(engine)
    try:
        first = batcher.submit(PROMPTS[0], Sampling(max_tokens=60))
        head = next(first)
        changer = threading.Thread(target=engine.become, args=((loud(engine),),))
        changer.start()
        while not engine.gate.changes_waiting and engine.version.number == 0:
            pass
        second = batcher.submit(PROMPTS[1], Sampling(max_tokens=3))
        said, then = [head, *first], list(second)
        changer.join(10)
        assert {token.version.number for token in said} == {0}
        assert {token.version.number for token in then} == {1}
    finally:
        batcher.close()


def test_a_change_in_drain_mode_waits_no_longer_than_it_was_told(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    engine.gate.mode, engine.gate.patience = "drain", 0.0
    stream = engine.continue_from(PROMPTS[0], Sampling(max_tokens=4))
    head = next(stream)
    engine.become((loud(engine),))  # would wait for ever: the stream is read by this very thread
    assert [token.version.number for token in (head, *stream)] == [0, 1, 1, 1]


def test_a_stream_that_is_closed_stops_whether_it_runs_or_waits(engine: TransformersEngine) -> None:
    batcher = Batcher(engine, rows=1, waiting=4)
    try:
        running = batcher.submit(PROMPTS[0], Sampling(max_tokens=10_000, stop=("never said",)))
        waiting = batcher.submit(PROMPTS[1], Sampling(max_tokens=5))
        last = batcher.submit(PROMPTS[2], Sampling(max_tokens=5, seed=1))
        next(running)
        waiting.close()
        assert ids(waiting) == []
        running.close()
        assert len(ids(running)) < 10_000
        assert len(ids(last)) == 5
        assert (batcher.running, batcher.waiting) == (0, 0)
    finally:
        batcher.close()


def test_owners_take_turns_and_a_full_queue_says_when_to_ask_again(engine: TransformersEngine) -> None:
    batcher = Batcher(engine, rows=1, waiting=4)
    ended: list[str] = []
    try:
        with engine.gate.step():  # nothing can run meanwhile
            first = batcher.submit(PROMPTS[0], Sampling(max_tokens=2), owner="greedy one")
            while not batcher.running:
                pass
            streams = [
                (name, batcher.submit(PROMPTS[1], Sampling(max_tokens=2), owner=name))
                for name in ("greedy one", "greedy one", "greedy one", "another")
            ]
            with pytest.raises(QueueFull, match="4 requests are waiting") as error:
                batcher.submit(PROMPTS[2], Sampling(max_tokens=2))
            assert error.value.details["retry_after"] >= 1
        ids(first)
        order = {id(stream): name for name, stream in streams}

        def follow(stream: TokenStream) -> None:
            list(stream)

        threads = [threading.Thread(target=follow, args=(stream,)) for _, stream in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        ended = [order[id(stream)] for stream in sorted((each for _, each in streams), key=lambda each: each.began)]
        assert ended.index("another") == 1
    finally:
        batcher.close()


def test_a_prompt_that_cannot_be_taken_is_refused_at_once(batcher: Batcher) -> None:
    with pytest.raises(InvalidInput, match="no tokens"):
        batcher.submit([], Sampling())
    with pytest.raises(InvalidInput, match="context"):
        batcher.submit([5] * 64, Sampling())


def test_an_error_on_the_way_reaches_its_reader_and_the_next_one_is_served(
    engine: TransformersEngine, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(engine, "decoder", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ids(batcher.submit(PROMPTS[0], Sampling(max_tokens=3)))
    assert len(ids(batcher.submit(PROMPTS[0], Sampling(max_tokens=3, seed=1)))) == 3


def test_a_batcher_that_is_closed_ends_everything(engine: TransformersEngine) -> None:
    batcher = Batcher(engine, rows=1)
    running = batcher.submit(PROMPTS[0], Sampling(max_tokens=10_000))
    next(running)
    batcher.close()
    with pytest.raises(Stopping, match="stopping"):
        ids(running)
    with pytest.raises(Stopping, match="stopping"):
        batcher.submit(PROMPTS[0], Sampling())


def test_a_short_prompt_does_not_wait_for_the_whole_of_a_long_one(
    engine: TransformersEngine, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (batching, decoding):
        monkeypatch.setattr(module, "CHUNK", 8)
    long, short = PROMPTS[3] * 2, PROMPTS[0]
    ended: list[str] = []
    with engine.gate.step():  # nothing is read before both are there
        asked = {"long": long, "short": short}
        streams = {name: batcher.submit(prompt, Sampling(max_tokens=1)) for name, prompt in asked.items()}

    def wait(name: str) -> None:
        assert len(ids(streams[name])) == 1
        ended.append(name)

    waiting = [threading.Thread(target=wait, args=(name,)) for name in streams]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join(10)
    assert ended == ["short", "long"]
