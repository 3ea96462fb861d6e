"""The engine on tiny models: decoding, the gate with generations in flight, scores, traces, replays."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Literal

import pytest
import torch

from liveweight.adjustments import Active, Adjustment, LowRank, ReplaceNeurons, Steer
from liveweight.engines.base import Message, Objective, Sampling, ScoreItem
from liveweight.engines.decoding import DirectDecoder, ModuleDecoder
from liveweight.engines.replay import run_whole
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, UnknownSite
from liveweight.evidence import answer_under
from tracing.tiny_engines import tiny_engine

PROMPT = [5, 9, 17, 3, 11, 8]


@pytest.fixture
def engine(tmp_path: Path) -> TransformersEngine:
    return tiny_engine("llama", tmp_path)


def loud(engine: TransformersEngine, layer: int = 1) -> Active:
    """A change of one down weight that every token feels."""
    generator = torch.Generator().manual_seed(7)
    left = torch.randn(engine.sites.width, 1, generator=generator)
    right = torch.randn(1, engine.sites.neurons_of(layer), generator=generator)
    op = LowRank(site=f"layers.{layer}.mlp.down.weight", left=left * 5, right=right)
    return Active(Adjustment(name="loud", method="test", ops=(op,)))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_direct_decoder_says_what_the_modules_say(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    if not DirectDecoder.fits(engine.model, engine.sites):
        pytest.fail(f"{architecture} should be decoded directly")
    direct, modules = DirectDecoder(engine.model, engine.sites), ModuleDecoder(engine.model, engine.sites)
    with torch.inference_mode():
        torch.testing.assert_close(direct.feed(PROMPT), modules.feed(PROMPT))
        for token in (4, 12, 7, 30):
            torch.testing.assert_close(direct.feed([token]), modules.feed([token]), rtol=1e-4, atol=1e-5)
        # A second turn read onto a cache that decoding has written.
        torch.testing.assert_close(direct.feed([2, 3, 5]), modules.feed([2, 3, 5]), rtol=1e-4, atol=1e-5)


def test_the_direct_decoder_runs_the_spare_neurons_that_write_something_and_no_others(tmp_path: Path) -> None:
    engine = tiny_engine("qwen2", tmp_path)
    layer = next(layer for layer in range(engine.sites.layers) if engine.sites.spare_of(layer))
    own = engine.sites.neurons_of(layer)
    rows = torch.randn(3, 2, engine.sites.width, generator=torch.Generator().manual_seed(3))
    op = ReplaceNeurons(
        layer=layer, neurons=(own, own + 2), gate=rows[0], up=rows[1], down=rows[2].T.contiguous() * 5, bias=None
    )
    said = []
    for state, run in (((), own), ((Active(Adjustment(name="two", method="test", ops=(op,))),), own + 3)):
        engine.become(state)
        direct, modules = DirectDecoder(engine.model, engine.sites), ModuleDecoder(engine.model, engine.sites)
        with torch.inference_mode():
            direct.feed(PROMPT)
            modules.feed(PROMPT)
            said.append(direct.feed([4]))
            torch.testing.assert_close(said[-1], modules.feed([4]), rtol=1e-4, atol=1e-5)
        assert direct.neurons[layer].shape == (run,)
    assert not torch.allclose(*said)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "phi3"])
def test_greedy_batches_equal_single_generations(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    prompts = [PROMPT, PROMPT[:3], [7, 7, 2, 40, 6, 5, 4, 3]]
    sampling = Sampling(max_tokens=6)
    singles = [[token.id for token in engine.continue_from(prompt, sampling)] for prompt in prompts]
    assert engine.greedy(prompts, 6) == singles


def test_sampling_with_a_seed_repeats_and_without_one_leaves_torch_alone(engine: TransformersEngine) -> None:
    before = torch.get_rng_state()
    sampling = Sampling(max_tokens=8, temperature=1.0, top_p=0.9, top_k=20, seed=3)
    first = [token.id for token in engine.continue_from(PROMPT, sampling)]
    assert first == [token.id for token in engine.continue_from(PROMPT, sampling)]
    list(engine.continue_from(PROMPT, Sampling(max_tokens=4, temperature=1.0)))
    assert torch.equal(before, torch.get_rng_state())


def test_a_refreshed_generation_goes_on_as_the_new_model_would(engine: TransformersEngine) -> None:
    change = loud(engine)
    stream = engine.continue_from(PROMPT, Sampling(max_tokens=8))
    head = [next(stream) for _ in range(3)]
    engine.become((change,))
    tail = list(stream)
    versions = {token.version.number for token in head}, {token.version.number for token in tail}
    assert versions == ({0}, {1})
    expected = engine.greedy([[*PROMPT, *(token.id for token in head)]], 5)[0]
    assert [token.id for token in tail] == expected


def test_a_drained_generation_ends_on_the_weights_it_began_with(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    engine.gate.mode = "drain"
    stream = engine.continue_from(PROMPT, Sampling(max_tokens=6))
    head = [next(stream)]
    changer = threading.Thread(target=engine.become, args=((loud(engine),),))
    changer.start()
    tokens = head + list(stream)
    changer.join(10)
    assert {token.version.number for token in tokens} == {0}
    assert engine.version.number == 1


def test_generations_in_flight_never_mix_versions_in_a_token(engine: TransformersEngine) -> None:
    changes = [(), (loud(engine),), (loud(engine, 0),)]
    expected = {}
    for state in changes:
        version = engine.become(state)
        expected[version.hash] = engine
    made: list[list[tuple[int, str]]] = []

    def chat() -> None:
        tokens = list(engine.continue_from(PROMPT, Sampling(max_tokens=30)))
        made.append([(token.id, token.version.hash) for token in tokens])

    threads = [threading.Thread(target=chat) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(12):
        engine.become(changes[turn % 3])
    for thread in threads:
        thread.join(60)
    states = {engine.become(state).hash: state for state in changes}
    for tokens in made:
        for index in range(0, len(tokens), 7):
            token, digest = tokens[index]
            engine.become(states[digest])
            assert engine.greedy([[*PROMPT, *(t for t, _ in tokens[:index])]], 1)[0] == [token]


def test_a_state_that_comes_back_has_its_version_back(engine: TransformersEngine) -> None:
    base = engine.version
    changed = engine.become((loud(engine),))
    assert changed != base
    assert engine.become(()) == base
    assert engine.become((loud(engine),)) == changed


def test_a_preview_leaves_bytes_state_and_version(engine: TransformersEngine) -> None:
    before, version = engine.fingerprints(), engine.version
    with engine.preview((loud(engine),)):
        assert engine.fingerprints() != before
    assert engine.fingerprints() == before
    assert engine.version == version


def test_a_preview_within_a_preview_goes_back_to_the_outer_one(engine: TransformersEngine) -> None:
    base, outer, inner = engine.fingerprints(), (loud(engine),), (loud(engine), loud(engine, 0))
    with engine.preview(outer):
        there = engine.fingerprints()
        with engine.preview(inner):
            assert engine.state == inner
            assert engine.fingerprints() not in (base, there)
        with engine.preview(()):
            assert engine.state == ()
            assert engine.fingerprints() == base
        assert engine.state == outer
        assert engine.fingerprints() == there
    assert engine.state == ()
    assert engine.fingerprints() == base


def test_only_the_thread_that_previews_sees_the_previewed_state(engine: TransformersEngine) -> None:
    seen: list[object] = []
    with engine.preview((loud(engine),)):
        other = threading.Thread(target=lambda: seen.append(engine.state))
        other.start()
        other.join()
    assert seen == [()]


def test_scores_equal_a_plain_forward_pass(engine: TransformersEngine) -> None:
    items = [ScoreItem((5, 9, 17), (3, 11, 8)), ScoreItem((4, 4), (9,)), ScoreItem(tuple(PROMPT), (2, 6))]
    for item, score in zip(items, engine.score(items), strict=True):
        ids = torch.tensor([[*item.prompt, *item.continuation]])
        logits = engine.model(ids).logits[0, len(item.prompt) - 1 : -1].log_softmax(-1)
        expected = logits[range(len(item.continuation)), list(item.continuation)]
        torch.testing.assert_close(score.logprobs, expected, rtol=1e-4, atol=1e-5)
        assert score.argmax.tolist() == logits.argmax(-1).tolist()


def test_a_trace_reads_the_site_and_its_gradient(engine: TransformersEngine) -> None:
    site = "layers.1.mlp.neurons"
    trace = engine.trace(PROMPT, [site, "layers.0.resid"], Objective((4, 7)))
    assert trace.values[site].shape == (len(PROMPT) + 2, engine.sites.neurons)
    assert float(trace.gradients[site].abs().sum()) > 0
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    with pytest.raises(UnknownSite, match=r"layers\.9"):
        engine.trace(PROMPT, ["layers.9.resid"])


def test_watching_gives_each_step_its_neurons(engine: TransformersEngine) -> None:
    site = "layers.1.mlp.neurons"
    tokens = list(engine.continue_from(PROMPT, Sampling(max_tokens=4), watch=[site]))
    ids = [*PROMPT, *(token.id for token in tokens)]
    values = engine.trace(ids, [site]).values[site]
    for step, token in enumerate(tokens):
        torch.testing.assert_close(token.values[site], values[len(PROMPT) - 1 + step], rtol=1e-4, atol=1e-5)


def test_tracing_works_while_a_steer_counts_positions(engine: TransformersEngine) -> None:
    vector = torch.randn(engine.sites.width, generator=torch.Generator().manual_seed(0))
    steer = Steer(site="layers.0.resid", vector=vector, scale=3.0, when="generated", positions=None)
    engine.become((Active(Adjustment(name="steer", method="test", ops=(steer,))),))
    engine.trace(PROMPT, ["layers.1.resid"])
    engine.score([ScoreItem(tuple(PROMPT), (3, 4))])
    assert len(list(engine.continue_from(PROMPT, Sampling(max_tokens=3)))) == 3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gemma3_text", "olmo2", "gpt_neox", "mixtral"])
def test_a_replay_from_any_layer_is_the_whole_forward_pass(architecture: str, packed: bool, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    rows = [[5, 9, 17, 3, 11], [5, 9, 4, 8], [5, 9, 30, 31, 32, 33]]
    replay = engine.record(rows, [3, 2, 4], layers=range(engine.sites.layers), packed=packed)
    assert replay.ids.shape == ((1, 6) if packed else (3, 2))
    for layer in range(engine.sites.layers):
        torch.testing.assert_close(replay.run(layer), replay.final)
    for row, tokens in enumerate(rows):
        whole = engine.model.base_model(torch.tensor([tokens])).last_hidden_state[0]
        for position in range(replay.starts[row], len(tokens)):
            there = replay.final[replay.at(row, position)]
            torch.testing.assert_close(there, whole[position], rtol=1e-4, atol=1e-5)


def test_a_packed_row_is_not_asked_for_of_a_model_that_is_steered(engine: TransformersEngine) -> None:
    vector = torch.randn(engine.sites.width, generator=torch.Generator().manual_seed(0))
    steer = Steer(site="layers.0.resid", vector=vector, scale=3.0, when="generated", positions=None)
    engine.become((Active(Adjustment(name="steer", method="test", ops=(steer,))),))
    rows = [[5, 9, 17, 3, 11], [5, 9, 4, 8, 3]]
    asked, padded = engine.record(rows, [3, 2], packed=True), engine.record(rows, [3, 2])
    torch.testing.assert_close(asked.final[asked.at(1, 3)], padded.final[1, 1])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "qwen3_moe"])
def test_whole_rows_run_from_a_kept_layer_on_are_the_same(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    rows = [[5, 9, 17, 3, 11], [5, 9, 4, 8]]
    with torch.inference_mode():
        final, kept = run_whole(engine.model, engine.sites, rows, keep=1)
        again, _ = run_whole(engine.model, engine.sites, rows, layer=1, inputs=kept)
    for row, tokens in enumerate(rows):
        torch.testing.assert_close(again[row], final[row], rtol=1e-4, atol=1e-5)
        whole = engine.model.base_model(torch.tensor([tokens])).last_hidden_state[0]
        torch.testing.assert_close(final[row], whole, rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(block) for block in engine.sites.blocks)


def test_a_prompt_that_is_too_long_or_empty_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(InvalidInput, match="context"):
        engine.continue_from([3] * (engine.info.context + 1))
    with pytest.raises(InvalidInput, match="no tokens"):
        engine.continue_from([])
    with pytest.raises(InvalidInput, match="empty"):
        engine.encode([Message("user", "  ")])


@pytest.mark.parametrize("guess", [(), (3, 3, 3), None])
def test_an_answer_is_the_same_whatever_was_guessed(tmp_path: Path, guess: tuple[int, ...] | None) -> None:
    engine = tiny_engine("llama", tmp_path)
    prompt = (5, 9, 17, 3)
    plain = answer_under(tiny_engine("llama", tmp_path), (), prompt)
    assert plain[1][:3] != (3, 3, 3)
    draft = plain[1] if guess is None else guess
    assert [answer_under(engine, (), prompt, draft) for _ in range(2)] == [plain, plain]
    assert answer_under(engine, (), prompt) == plain  # guessed from the last time
    assert set(engine.guesses) == {prompt}


@pytest.mark.parametrize("when", ["prompt", "generated"])
def test_what_was_guessed_counts_as_said_not_as_asked(tmp_path: Path, when: Literal["prompt", "generated"]) -> None:
    vector = torch.randn(tiny_engine("llama", tmp_path).sites.width, generator=torch.Generator().manual_seed(1))
    steer = Steer(site="layers.1.resid", vector=vector * 3, when=when)
    state = (Active(Adjustment(name="steer", method="test", ops=(steer,))),)
    prompt = (5, 9, 17, 3)
    plain = answer_under(tiny_engine("llama", tmp_path), state, prompt)
    for right in range(1, len(plain[1]), 5):
        draft = (*plain[1][:right], (plain[1][right] + 1) % 50)
        assert answer_under(tiny_engine("llama", tmp_path), state, prompt, draft) == plain


def test_ctrl_c_while_a_preview_ends_waits_until_the_weights_are_back(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, write = engine.fingerprints(), engine.weights._write

    def interrupted(plans: object) -> list[str]:
        if armed:
            armed.pop()
            signal.raise_signal(signal.SIGINT)
        return write(plans)  # type: ignore[arg-type]

    armed: list[int] = []
    monkeypatch.setattr(engine.weights, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt), engine.preview((loud(engine),)):
        armed.append(1)
    assert engine.fingerprints() == before


def test_a_recording_is_told_where_the_prompt_ends_and_so_is_what_is_run_of_it_again(
    engine: TransformersEngine,
) -> None:
    steer = Steer(site="layers.1.resid", vector=torch.ones(engine.sites.width), when="generated")
    engine.become((Active(Adjustment(name="steer", method="test", ops=(steer,))),))
    row = [*PROMPT, 4, 12]
    with torch.inference_mode(), engine.activations.prompt(len(PROMPT)):
        whole = engine.model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, 1:]
    replay = engine.record([row], [1], layers=[1], prompts=[len(PROMPT)])
    torch.testing.assert_close(replay.final[0], whole)
    torch.testing.assert_close(replay.run(1)[0], whole)
    assert not torch.allclose(engine.record([row], [1]).final[0], whole)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("steered", [False, True])
def test_a_recording_may_begin_at_the_first_token(architecture: str, steered: bool, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    if steered:
        op = Steer(site="layers.1.resid", vector=torch.ones(engine.sites.width))
        engine.become((Active(Adjustment(name="steer", method="test", ops=(op,))),))
    rows = [PROMPT, PROMPT[:3]]
    for starts in ([0, 0], [2, 0]):
        replay = engine.record(rows, starts)
        for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
            with torch.no_grad(), engine.activations.prompt(start + 1):
                whole = engine.model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, start:]
            torch.testing.assert_close(replay.final[row, : len(ids) - start], whole, rtol=1e-4, atol=1e-4)


def test_what_steers_the_embedding_acts_once_in_a_replay(engine: TransformersEngine) -> None:
    op = Steer(site="embed", vector=torch.randn(engine.sites.width, generator=torch.Generator().manual_seed(1)))
    engine.become((Active(Adjustment(name="steer", method="test", ops=(op,))),))
    replay = engine.record([PROMPT], [2], layers=[0])
    with torch.no_grad():
        torch.testing.assert_close(replay.run(0, replay.inputs[0]), replay.final)
    whole, (kept,) = run_whole(engine.model, engine.sites, [PROMPT], keep=0)
    again, _ = run_whole(engine.model, engine.sites, [PROMPT], layer=0, inputs=[kept])
    torch.testing.assert_close(again[0], whole[0])


def test_a_text_beyond_the_models_positions_is_refused_by_name(tmp_path: Path) -> None:
    engine = tiny_engine("gpt2", tmp_path)
    full = [5 + place % 40 for place in range(64)]
    assert [len(row) for row in engine.greedy([full[:60], full[:3]], 9)] == [4, 4]
    for ask in (
        lambda: engine.greedy([full], 1),
        lambda: engine.score([ScoreItem(tuple(full[:60]), tuple(full[:5]))]),
        lambda: engine.logits(full[:60], full[:5]),
        lambda: engine.record([full + full[:1]], [2]),
    ):
        with pytest.raises(InvalidInput, match=r"6\d tokens, and the model has 64 positions"):
            ask()
    op = Steer(site="layers.1.resid", vector=torch.ones(engine.sites.width))
    engine.become((Active(Adjustment(name="steer", method="test", ops=(op,))),))
    short, long = (full[:20], full[:40]), (full[:61], full[:3])  # padded, the first would be longer than the model
    assert len(engine.score([ScoreItem(tuple(prompt), tuple(answer)) for prompt, answer in (short, long)])) == 2


def test_an_answer_is_reported_where_the_context_is_nearly_full(tmp_path: Path) -> None:
    engine = tiny_engine("gpt2", tmp_path)
    prompt = tuple(5 + place % 40 for place in range(60))
    said = tuple(engine.greedy([prompt], 4)[0])
    text, _ = answer_under(engine, (), prompt, (*said, 5, 6, 7))
    assert text.startswith(engine.format.decode(said[:3]).strip())


def test_a_block_that_remembers_may_end_while_another_thread_looks_things_up(engine: TransformersEngine) -> None:
    with engine.remembering():
        engine.greedy([PROMPT], 3)
        known = engine._said
    assert known and not engine._said
