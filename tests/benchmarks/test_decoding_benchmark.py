"""The decoding benchmark's arithmetic: figures, waits and ratios out of what the sides wrote."""

from __future__ import annotations

import math

from benchmarks.decoding import Comparison, Result, Side, Work, figure_of, first_token

PUNA, PEER = Side("puna", {"quantize": "int4"}), Side("llama.cpp", {}, 2.0)


def work(figure: str, *requests: tuple[int, int, float]) -> Work:
    return Work("little", "", requests, PUNA, (PEER,), figure)


def test_figures_are_tokens_per_second_of_what_the_work_is_about() -> None:
    one = Result([{"first": 2.0, "last": 6.0}], 10)
    assert (
        figure_of(work("decode", (100, 9, 0.0)), one) == 2.0
    )  # eight tokens after the first in four seconds
    assert figure_of(work("prefill", (100, 9, 0.0)), one) == 50.0
    two = Result([{"first": 1.0, "last": 3.0}, {"first": 2.5, "last": 5.0}], 10)
    both = work("output", (4, 10, 0.0), (4, 20, 0.5))
    assert figure_of(both, two) == 6.0
    assert first_token(both, two, 0.5) == 2.0 and first_token(both, two, 0.0) == 1.0
    assert math.isclose(figure_of(work("first", (4, 10, 0.0), (4, 20, 0.5)), two), 1 / 2.0)


def test_ratios_go_run_by_run() -> None:
    fast, slow = ([{"first": 1.0, "last": 1.0 + seconds}] for seconds in (1.0, 4.0))
    sides = {PUNA.label: [Result(fast, 1), Result(slow, 1)], PEER.label: [Result(slow, 1), Result(slow, 1)]}
    found = Comparison(work("decode", (8, 5, 0.0)), sides).ratio(PEER.label)
    assert (found.low, found.middle, found.high) == (1.0, 2.5, 4.0)
    assert PUNA.label == "puna int4" and PEER.label == "llama.cpp"
