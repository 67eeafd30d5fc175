"""The engine in a thread of its own: requests from many threads, cancels, drains, failures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from puna.core.errors import PunaError
from puna.decode.background import EngineThread
from puna.decode.engine import Engine
from puna.decode.sampling import Sampling
from tests.decode.decoding_models import speaking


@pytest.fixture
def model(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    return speaking(tiny_llama, tiny_tokenizer)


def test_requests_of_many_threads_get_the_texts_they_get_alone(model: Any) -> None:
    sampling = Sampling(max_tokens=15, temperature=1.0, seed=1)
    prompts = [[5 + number] * (1 + number) for number in range(12)]
    alone = [Engine(model, kernels="plain").generate([prompt], sampling)[0] for prompt in prompts]
    found: dict[int, Any] = {}
    with EngineThread(Engine(model, kernels="plain", max_batch_tokens=20)) as thread:

        def ask(number: int) -> None:
            ticket = thread.engine.submit(prompts[number], sampling)
            text = "".join(event.text for event in ticket.events())
            found[number] = ticket.completion
            assert text == ticket.completion.text

        workers = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert thread.engine.generate([prompts[0]], sampling) == alone[:1]
    assert [found[number] for number in range(12)] == alone
    assert thread.engine.statistics.blocks_used == 0
    assert not thread.running


def test_cancelled_requests_leave_nothing_behind(model: Any) -> None:
    engine = Engine(model, kernels="plain")
    with EngineThread(engine):
        for _ in range(30):
            ticket = engine.submit([7] * 50, Sampling(max_tokens=190, ignore_eos=True))
            next(ticket.events())
            ticket.cancel()
            reasons = [event.finish_reason for event in ticket.events()]
            assert reasons[-1] == "cancelled"
    assert (engine.statistics.blocks_used, engine.statistics.running) == (0, 0)


def test_a_drain_lets_requests_end_and_takes_no_new_ones(model: Any) -> None:
    engine = Engine(model, kernels="plain")
    thread = EngineThread(engine)
    thread.start()
    ticket = engine.submit([7] * 50, Sampling(max_tokens=150, ignore_eos=True))
    assert thread.stop(drain=True)
    assert len(ticket.completion.ids) == 150
    with pytest.raises(PunaError, match="no further requests"):
        engine.submit([7], Sampling())
    thread.start()
    assert len(engine.generate([[7]], Sampling(max_tokens=1))[0].ids) == 1
    thread.stop()


def test_a_stop_without_drain_or_beyond_its_time_cancels(model: Any) -> None:
    for settings in ({"drain": False}, {"drain": True, "timeout": 0.0}):
        engine = Engine(model, kernels="plain")
        thread = EngineThread(engine)
        thread.start()
        tickets = [engine.submit([7] * 50, Sampling(max_tokens=200, ignore_eos=True)) for _ in range(20)]
        assert not thread.stop(**settings)
        assert {ticket.completion.finish_reason for ticket in tickets} <= {"cancelled", "length"}
        assert tickets[-1].completion.finish_reason == "cancelled"
        assert engine.statistics.blocks_used == 0


def test_a_failing_step_is_told_to_those_who_wait_and_the_engine_goes_on(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, kernels="plain")
    stepper = engine._models["target"].stepper
    whole = stepper.step

    def failing(reads: Any) -> Any:
        monkeypatch.setattr(stepper, "step", whole)
        raise MemoryError("not enough")

    monkeypatch.setattr(stepper, "step", failing)
    with EngineThread(engine):
        with pytest.raises(MemoryError):
            list(engine.submit([7] * 5, Sampling(max_tokens=2)).events())
        assert engine.statistics.blocks_used == 0
        assert len(engine.generate([[7] * 5], Sampling(max_tokens=2, ignore_eos=True))[0].ids) == 2
