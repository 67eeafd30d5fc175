"""The loop: methods over lanes of several models, whatever runs beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.decode.engine import Engine
from puna.decode.lane import Steps, together
from puna.decode.request import Running
from puna.decode.sampling import Sampling
from puna.decode.strategy import all_strategies, resolve
from puna.decode.trace import TraceRow
from tests.decode.decoding_models import speaking

PROMPTS = ["the cat", "a", "in the end, and then it went in again on the other mat " * 2, "é𝄞", "that other"]


@pytest.fixture
def model(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    """In float64: the plain stepper is equal to rounding alone, and in float32 near ties do occur."""
    return speaking(tiny_llama, tiny_tokenizer).double()


class Alternating:
    """Writes every second token with another model, which catches up each time."""

    name: ClassVar[str] = "alternating"
    lossless: ClassVar[bool] = False

    def run(self, request: Running) -> Steps[None]:
        lanes = [request.lane, request.open_lane("other")]
        for turn in range(10_000):
            lane = lanes[turn % 2]
            result = yield from lane.catch_up([*request.prompt, *request.ids])
            logits = result.logits[-1]
            token = request.law(logits).draw(request.random)
            if request.emit(token, TraceRow(token, ("target", "other")[turn % 2]), logits):
                return


class BestOfThree:
    """Draws three branches of five tokens side by side and keeps the likeliest."""

    name: ClassVar[str] = "best-of-three"
    lossless: ClassVar[bool] = False

    def run(self, request: Running) -> Steps[None]:
        yield from request.lane.catch_up(request.prompt[:-1], outputs=0)
        branches = yield from together(*[self.branch(request, request.lane.fork()) for _ in range(3)])
        tokens = max(branches)[1]
        for token in tokens:
            if request.emit(token, TraceRow(token)):
                return

    def branch(self, request: Running, lane: Any) -> Steps[tuple[float, list[int]]]:
        result = yield from lane.read(request.prompt[-1:])
        tokens: list[int] = []
        score = 0.0
        for _ in range(5):
            logits = result.logits[-1]
            tokens.append(request.law(logits, tokens).draw(request.random))
            score += float(logits.log_softmax(0)[tokens[-1]])
            result = yield from lane.read(tokens[-1:])
        lane.free()
        return score, tokens


def test_methods_run_side_by_side_as_they_do_alone(
    model: Any, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    other = speaking(tiny_llama, tiny_tokenizer, seed=5)
    sampling = Sampling(max_tokens=20, temperature=0.8, seed=3)
    methods: list[Any] = [None, Alternating(), BestOfThree(), "plain", Alternating()]

    def engine() -> Engine:
        return Engine(model, kernels="plain", models={"other": other}, max_batch_tokens=24, chunk_tokens=16)

    alone = []
    for index, (prompt, method) in enumerate(zip(PROMPTS, methods, strict=True)):
        one = engine()
        ticket = one.submit(prompt, sampling, method, index=index)
        while one.step():
            pass
        alone.append(ticket.completion)
    together_engine = engine()
    tickets = [
        together_engine.submit(prompt, sampling, method, index=index)
        for index, (prompt, method) in enumerate(zip(PROMPTS, methods, strict=True))
    ]
    while together_engine.step():
        pass
    assert [ticket.completion for ticket in tickets] == alone
    assert [(found.strategy, found.lossless) for found in alone] == [
        ("plain", True),
        ("alternating", False),
        ("best-of-three", False),
        ("plain", True),
        ("alternating", False),
    ]
    assert [row.source for row in alone[1].trace[:3]] == ["target", "other", "target"]
    assert together_engine.statistics.blocks_used == 0


def test_a_text_of_two_models_costs_what_both_read(
    model: Any, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    half = speaking(tiny_llama, tiny_tokenizer, num_hidden_layers=1)
    engine = Engine(model, kernels="plain", models={"other": half})
    weight = half.spec.parameter_count() / model.spec.parameter_count()
    found = engine.generate(["the cat"], Sampling(max_tokens=4, ignore_eos=True), Alternating())[0]
    # The first token is the prompt's last; then each model reads what the other wrote and what it wrote.
    expected = [1.0, (found.prompt_tokens + 1) * weight, 2.0, 2 * weight]
    assert [row.cost for row in found.trace] == pytest.approx(expected)
    assert [row.token for row in found.trace] == found.ids


@settings(max_examples=30, deadline=None)
@given(
    mixture=st.lists(
        st.tuples(st.integers(0, 319), st.integers(1, 90), st.integers(1, 40)), min_size=2, max_size=7
    ),
    chunk=st.integers(1, 50),
    budget=st.integers(1, 60),
    temperature=st.sampled_from([0.0, 1.0]),
    kernels=st.sampled_from(["plain", "native"]),
)
def test_a_text_is_the_same_alone_and_in_any_mixture_at_any_chunk_size(
    mixture: list[tuple[int, int, int]], chunk: int, budget: int, temperature: float, kernels: Any
) -> None:
    model = MADE[kernels]
    engine = Engine(model, kernels=kernels, max_batch_tokens=budget, chunk_tokens=chunk, cache_tokens=160)
    tickets, alone = [], []
    for index, (first, length, tokens) in enumerate(mixture):
        prompt = [(first + 7 * place * place) % 320 for place in range(length)]
        sampling = Sampling(max_tokens=tokens, temperature=temperature, seed=2, ignore_eos=True)
        tickets.append(engine.submit(prompt, sampling, index=index))
        calm = Engine(model, kernels=kernels, cache_tokens=1000)
        ticket = calm.submit(prompt, sampling, index=index)
        while calm.step():
            pass
        alone.append(ticket.completion)
        if index % 2:
            engine.step()
    while engine.step():
        pass
    assert [ticket.completion for ticket in tickets] == alone
    assert engine.statistics.blocks_used == 0


MADE: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _made(model: Any, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    MADE["plain"] = model
    MADE["native"] = speaking(tiny_llama, tiny_tokenizer)
    yield
    MADE.clear()


def test_a_preempted_text_goes_on_as_if_nothing_had_happened(model: Any) -> None:
    prompts = [[5 + index] * (20 + index) for index in range(6)]
    sampling = Sampling(max_tokens=60, ignore_eos=True)
    calm = Engine(model, kernels="plain").generate(prompts, sampling)
    tight = Engine(model, kernels="plain", cache_tokens=160)
    assert tight.generate(prompts, sampling) == calm
    assert tight.statistics.preemptions > 0
    assert tight.statistics.blocks_used == 0


def test_the_eldest_is_never_preempted_and_a_method_that_needs_more_than_all_is_told(model: Any) -> None:
    class Hungry(BestOfThree):
        def run(self, request: Running) -> Steps[None]:
            lanes = [request.open_lane("target") for _ in range(4)]
            yield from together(*[lane.read([5] * 40) for lane in lanes])

    engine = Engine(model, kernels="plain", cache_tokens=96)
    engine.submit([5] * 20, Sampling(max_tokens=20, ignore_eos=True))
    with pytest.raises(PunaError, match="no room"):
        engine.generate([[6] * 4], Sampling(max_tokens=5), Hungry())
    while engine.step():
        pass
    assert engine.statistics.blocks_used == 0


def test_a_text_that_fills_the_cache_alone_ends_there(model: Any) -> None:
    class Looking(BestOfThree):
        """Reads ten tokens ahead before each token, and forgets them."""

        def run(self, request: Running) -> Steps[None]:
            result = yield from request.lane.catch_up(request.prompt)
            while True:
                token = int(result.logits[-1].argmax())
                if request.emit(token, TraceRow(token)):
                    return
                yield from request.lane.read([token] * 10)
                request.lane.crop(len(request.lane.ids) - 10)
                result = yield from request.lane.read([token])

    engine = Engine(model, kernels="plain", cache_tokens=48)
    found = engine.generate([[5] * 20], Sampling(max_tokens=100, ignore_eos=True), Looking())[0]
    plain = engine.generate([[5] * 20], Sampling(max_tokens=100, ignore_eos=True))[0]
    assert found.finish_reason == "length"
    assert 15 <= len(found.ids) < len(plain.ids) == 29
    assert found.ids == plain.ids[: len(found.ids)]
    assert engine.statistics.blocks_used == 0


def test_an_error_of_one_method_leaves_the_others_alone(model: Any) -> None:
    class Broken(BestOfThree):
        def run(self, request: Running) -> Steps[None]:
            yield from request.lane.catch_up(request.prompt)
            raise PunaError("this method is broken")

    engine = Engine(model, kernels="plain")
    good = engine.submit("the cat", Sampling(max_tokens=10))
    events: list[Any] = []
    bad = engine.submit("a", Sampling(max_tokens=10), Broken(), on_event=events.append)
    while engine.step():
        pass
    assert good.completion == Engine(model, kernels="plain").generate(["the cat"], Sampling(max_tokens=10))[0]
    assert [event.finish_reason for event in events] == ["error"]
    with pytest.raises(PunaError, match="broken"):
        bad.completions  # noqa: B018
    assert engine.statistics.blocks_used == 0


def test_cancelling_frees_the_cache_at_once(model: Any) -> None:
    engine = Engine(model, kernels="plain")
    tickets = [engine.submit([7] * 40, Sampling(max_tokens=50, ignore_eos=True)) for _ in range(3)]
    for _ in range(5):
        engine.step()
    used = engine.statistics.blocks_used
    tickets[1].cancel()
    assert engine.statistics.blocks_used < used
    assert tickets[1].completion.finish_reason == "cancelled"
    assert 0 < len(tickets[1].completion.ids) < 50
    for ticket in tickets:
        ticket.cancel()
    assert (engine.statistics.blocks_used, engine.statistics.running) == (0, 0)
    assert not engine.step()


def test_a_callback_that_fails_ends_its_request_alone(model: Any) -> None:
    def broken(event: Any) -> None:
        raise RuntimeError("gone")

    engine = Engine(model, kernels="plain")
    bad = engine.submit("the cat", Sampling(max_tokens=10), on_event=broken)
    good = engine.submit("a", Sampling(max_tokens=10, ignore_eos=True))
    while engine.step():
        pass
    assert len(good.completion.ids) == 10
    assert isinstance(bad.error, RuntimeError)
    assert engine.statistics.blocks_used == 0


def test_events_joined_are_the_completion(model: Any) -> None:
    engine = Engine(model, kernels="plain")
    ticket = engine.submit("the cat", Sampling(max_tokens=12, logprobs=3, entropy=True, ignore_eos=True))
    events = list(ticket.events())
    done = ticket.completion
    assert "".join(event.text for event in events) == done.text
    assert [token for event in events for token in event.ids] == done.ids
    assert [value for event in events for value in event.logprobs or []] == done.logprobs
    assert [row for event in events for row in event.trace] == done.trace
    assert [event.finish_reason for event in events] == [None] * 11 + ["length"]
    assert done.top_logprobs is not None
    for token, logprob, alternatives, row in zip(
        done.ids, done.logprobs or [], done.top_logprobs, done.trace, strict=True
    ):
        assert alternatives[0] == (token, pytest.approx(logprob))  # greedy
        assert len(alternatives) == 3
        assert row.entropy is not None
        assert row.entropy > 0


def test_several_texts_of_a_prompt_share_its_reading_and_differ(model: Any) -> None:
    engine = Engine(model, kernels="plain")
    prompt = [9] * 70
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=4, n=3, ignore_eos=True)
    found = engine.generate([prompt, "a"], sampling)
    assert len(found) == 6
    assert len({tuple(completion.ids) for completion in found[:3]}) == 3
    # The prompt once, but for its last token, which each reads; then all but the last token of each.
    assert engine.statistics.tokens_read == (69 + 3) + (found[3].prompt_tokens - 1 + 3) + 6 * 7
    assert engine.generate([prompt], sampling) == found[:3]
    alone = Engine(model, kernels="plain").generate([prompt], Sampling(**{**vars(sampling), "n": 1}))
    assert alone == found[:1]


def test_a_prompt_that_begins_as_an_earlier_text_is_not_read_again(model: Any) -> None:
    engine = Engine(model, kernels="plain")
    first = engine.generate([[3] * 50], Sampling(max_tokens=20, ignore_eos=True))[0]
    whole = [3] * 50 + first.ids
    second = engine.generate([whole], Sampling(max_tokens=5))[0]
    assert (first.cached_tokens, second.cached_tokens) == (0, 64)
    assert second == Engine(model, kernels="plain").generate([whole], Sampling(max_tokens=5))[0]
    assert engine.statistics.tokens_shared == 64


def test_stop_ids_end_a_text(model: Any) -> None:
    engine = Engine(model, kernels="plain")
    free = engine.generate(["the cat"], Sampling(max_tokens=20, ignore_eos=True))[0]
    ending = free.ids[5]
    found = engine.generate(["the cat"], Sampling(max_tokens=20, ignore_eos=True, stop_ids=[ending]))[0]
    assert found.ids == free.ids[: free.ids.index(ending) + 1]
    assert found.finish_reason == "stop"


def test_penalties_hold_through_the_loop(model: Any) -> None:
    found = Engine(model, kernels="plain").generate(
        ["the cat"], Sampling(max_tokens=60, presence_penalty=1e6, ignore_eos=True)
    )[0]
    assert len(set(found.ids)) == 60


def test_strategies_are_chosen_by_name_settings_or_as_they_are() -> None:
    own = BestOfThree()
    assert resolve(own) is own
    assert resolve(None).name == resolve("plain").name == resolve({"name": "plain"}).name == "plain"
    assert resolve(all_strategies()["plain"]()).name == "plain"
    with pytest.raises(PunaError, match="did you mean 'plain'"):
        resolve("plein")
    with pytest.raises(PunaError, match="unknown key 'size'"):
        resolve({"name": "plain", "size": 3})
    with pytest.raises(PunaError, match="needs a name"):
        resolve({})


def test_an_unknown_model_and_a_second_target_are_told(model: Any) -> None:
    with pytest.raises(PunaError, match="unknown model of the engine 'other'"):
        Engine(model, kernels="plain").generate(["a"], Sampling(max_tokens=2), Alternating())
    with pytest.raises(PunaError, match="'target'"):
        Engine(model, models={"target": model})


def test_a_prompt_larger_than_the_cache_is_told(model: Any) -> None:
    engine = Engine(model, kernels="plain", cache_tokens=32)
    with pytest.raises(PunaError, match="does not fit the cache"):
        engine.generate([[5] * 33])
    found = engine.generate([[5] * 30], Sampling(max_tokens=50, ignore_eos=True))[0]
    assert (len(found.ids), found.finish_reason) == (3, "length")


def test_hidden_states_come_with_the_logits_they_make(model: Any) -> None:
    seen: list[Any] = []

    class Looking(BestOfThree):
        def run(self, request: Running) -> Steps[None]:
            result = yield from request.lane.catch_up(request.prompt, outputs=len(request.prompt))
            seen.append((result.hidden, result.logits))

    engine = Engine(model, kernels="plain", max_batch_tokens=7)
    found = engine.generate([[5] * 40], Sampling(), Looking())[0]
    assert (found.ids, found.finish_reason) == ([], "stop")
    hidden, logits = seen[0]
    with torch.no_grad():
        expected = model(torch.tensor([[5] * 40]))[0]
    assert hidden.shape == (40, 48)
    assert (logits - expected).abs().max() < 1e-4
