"""Batching: the engine's scheduler, the simulator around it, and the stages that measure and simulate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.files import read_json, write_json
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import write_corpus
from puna.decode.schedule_simulator import (
    Arrival,
    StepCosts,
    decode_maximal,
    draw_arrivals,
    prefill_first,
    simulate,
)
from puna.decode.scheduler import SHORT, TILE, BatchSettings, plan_batch
from puna.decode.step_costs import measure_costs, measure_piggyback
from puna.model.steppers import make_stepper
from puna.text.pretrained import save
from tests.decode.decoding_models import speaking

COSTS = StepCosts(((1, 0.03), (16, 0.05), (64, 0.12), (256, 0.4), (512, 0.78)), 2e-7, 1e-6)


@given(
    st.lists(st.one_of(st.just(1), st.integers(1, 700)), min_size=1, max_size=40),
    st.integers(1, 600),
    st.integers(1, 300),
)
def test_a_step_holds_its_bounds_and_always_goes_on(pending: list[int], most: int, chunk: int) -> None:
    counts = plan_batch(pending, BatchSettings(most, chunk))
    assert all(0 <= count <= tokens for count, tokens in zip(counts, pending, strict=True))
    assert 0 < sum(counts) <= most
    decoding = [place for place, tokens in enumerate(pending) if tokens <= SHORT]
    prompts = [place for place, tokens in enumerate(pending) if tokens > SHORT]
    if any(counts[place] for place in decoding):
        assert sum(counts[place] for place in prompts) <= chunk
    if sum(pending[place] for place in decoding) <= most:
        assert [counts[place] for place in decoding] == [pending[place] for place in decoding]
    # Prompts in order: a later one is begun only when those before it are read to their ends.
    for earlier, later in itertools.pairwise(prompts):
        assert not counts[later] or counts[earlier] == pending[earlier]


def test_the_rows_of_a_mixed_step_are_whole_tiles() -> None:
    for decodes in range(1, 20):
        counts = plan_batch([1] * decodes + [1000], BatchSettings(512, 256))
        assert sum(counts) % TILE == 0
        assert 256 - TILE < counts[-1] <= 256
    assert plan_batch([1000], BatchSettings(512, 256)) == [512]  # nobody waits: as much as there is room for


@pytest.mark.parametrize("settings", [{"max_batch_tokens": 0}, {"chunk_tokens": -1}])
def test_settings_out_of_range_are_told(settings: dict[str, int]) -> None:
    with pytest.raises(PunaError, match="out of range"):
        BatchSettings(**settings)


def test_a_cost_lies_on_straight_lines_and_attention_comes_on_top() -> None:
    assert COSTS.of(1, 0, 0) == pytest.approx(0.03)
    assert COSTS.of(40, 0, 0) == pytest.approx(0.085)
    assert COSTS.of(768, 0, 0) == pytest.approx(1.16)
    assert COSTS.of(16, 1000, 400) == pytest.approx(0.05 + 1000 * 2e-7 + 400 * 1e-6)
    for table in (((1, 0.1),), ((2, 0.1), (1, 0.2)), ((1, 0.0), (2, 0.1))):
        with pytest.raises(PunaError, match="step costs"):
            StepCosts(table, 0.0)


def test_one_request_takes_what_its_steps_cost() -> None:
    flat = StepCosts(((1, 1.0), (100, 1.0)), 0.0)
    found = simulate([Arrival(2.0, 50, 4)], flat, decode_maximal(BatchSettings(20, 20)), max_running=4)
    # Three chunks, the last of which gives the first token; then three tokens.
    assert found.costs == [1.0] * 6
    assert found.first == [3.0]
    assert found.gaps == [1.0] * 3
    assert (found.seconds, found.tokens, found.idle, found.skipped) == (6.0, 4, 0.0, 0)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 400),
    st.integers(1, 30),
    st.sampled_from([0.0, 0.5, 5.0]),
    st.integers(1, 4),
)
def test_every_request_is_served_whatever_the_policy(
    count: int, prompt: int, output: int, rate: float, stages: int
) -> None:
    arrivals = draw_arrivals(count, prompt, output, 0.5, rate, seed=1)
    bounds = BatchSettings(128, 64)
    for policy in (decode_maximal(bounds), prefill_first(bounds)):
        found = simulate(arrivals, COSTS, policy, max_running=6, stages=stages)
        assert found.tokens == sum(arrival.output for arrival in arrivals)
        assert len(found.first) == count
        assert min(found.first) > 0
        assert -1e-9 < found.idle < 1
        assert sum(found.costs) <= stages * found.seconds * (1 + 1e-9)


def test_decode_maximal_batches_are_even_and_nobody_waits_longer_than_a_step() -> None:
    arrivals = draw_arrivals(60, 900, 60, 0.3, 0.0, seed=3)
    bounds = BatchSettings(512, 256)
    ours = simulate(arrivals, COSTS, decode_maximal(bounds), max_running=16)
    theirs = simulate(arrivals, COSTS, prefill_first(bounds), max_running=16)
    assert ours.variance * 5 < theirs.variance
    assert ours.skipped == 0
    assert theirs.skipped > 0
    assert max(ours.gaps) < max(theirs.gaps) / 3
    many = draw_arrivals(250, 900, 60, 0.3, 0.0, seed=3)
    pipeline = [
        simulate(many, COSTS, policy(bounds), max_running=16, stages=4)
        for policy in (decode_maximal, prefill_first)
    ]
    assert pipeline[0].idle < pipeline[1].idle / 2


class Slow:
    """A stepper that takes a known time, in a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, inner: Any) -> None:
        self.inner, self.pool, self.now = inner, inner.pool, 0.0
        self.more: Iterator[float] = itertools.repeat(0.0)  # what each step takes longer
        monkeypatch.setattr("puna.decode.step_costs.time.perf_counter", lambda: self.now)

    def sequence(self) -> Any:
        return self.inner.sequence()

    def step(self, reads: Any) -> list[torch.Tensor]:
        pairs = sum(
            len(read.ids) * read.sequence.length + len(read.ids) * (len(read.ids) + 1) // 2 for read in reads
        )
        rows = sum(len(read.ids) for read in reads)
        keys = sum(read.sequence.length + len(read.ids) for read in reads)
        self.now += 0.02 + 0.001 * rows + 1e-6 * pairs + 2e-5 * keys + next(self.more)
        return self.inner.step(reads)  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.now += 0.004 + 0.0005 * len(hidden)
        return self.inner.logits(hidden)  # type: ignore[no-any-return]


def test_measured_costs_are_those_of_the_steps(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Callable[..., Any]
) -> None:
    slow: Any = Slow(monkeypatch, make_stepper(tiny_llama(), cache_tokens=4000, kernels="plain"))
    ids = list(range(5, 90))
    costs = measure_costs(slow, ids, rows=(1, 8, 16, 64), long_context=400, repeats=2)
    assert costs.pair == pytest.approx(1e-6, rel=1e-3)
    assert costs.key == pytest.approx(2e-5, rel=1e-3)
    assert [row for row, _ in costs.table] == [1, 8, 16, 64]
    assert [seconds for _, seconds in costs.table] == pytest.approx([0.021, 0.028, 0.036, 0.084], rel=1e-3)
    found = measure_piggyback(slow, ids, decodes=4, rows=32, context=50, repeats=2)
    added, head = 4 * 0.001 + 4 * 51e-6 + 4 * 51 * 2e-5, 0.004 + 4 * 0.0005
    assert found.layers == pytest.approx((added / (0.02 + added),) * 3, rel=1e-3)
    assert found.share == pytest.approx(((added + head) / (0.02 + added + head),) * 3, rel=1e-3)
    assert found.mixed - found.chunk_only == pytest.approx(added + head)
    assert slow.pool.used == 0


def test_a_share_survives_a_machine_that_slows_down_and_tells_its_interval(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Callable[..., Any]
) -> None:
    slow: Any = Slow(monkeypatch, make_stepper(tiny_llama(), cache_tokens=400, kernels="plain"))
    steady = measure_piggyback(slow, [5, 6, 7], decodes=2, rows=20, context=40, repeats=24)
    assert steady.share.low == pytest.approx(steady.share.high)
    added = steady.mixed - steady.chunk_only
    slow.more = itertools.count(0.0, 1e-4)  # each step takes longer than the one before
    slowing = measure_piggyback(slow, [5, 6, 7], decodes=2, rows=20, context=40, repeats=24)
    assert slowing.mixed - slowing.chunk_only == pytest.approx(added, abs=1e-4)
    assert slowing.share.low < slowing.share.median < slowing.share.high
    slow.more = itertools.cycle([0.0] * 29 + [1.0])  # one step in ten rounds is a bad one
    hit = measure_piggyback(slow, [5, 6, 7], decodes=2, rows=20, context=40, repeats=24)
    assert hit.share.median == pytest.approx(steady.share.median)


def corpus_of(folder: Path, text: str) -> None:
    rows = [{"id": "1", "text": text, "language": "en", "source": "here"}]
    write_corpus(folder, "documents", rows, provenance=[{"source": "here", "licence": "CC0"}], ledger={})


@pytest.fixture
def assets(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> dict[str, Any]:
    save(speaking(tiny_llama, tiny_tokenizer), tmp_path / "model")
    text = "the cat and the other cat sat on that mat in the end, and then it went in again. " * 30
    corpus_of(tmp_path / "corpus", text)
    return {"model": tmp_path / "model", "corpus": tmp_path / "corpus"}


def run(name: str, folder: Path, inputs: dict[str, Any], **values: Any) -> tuple[Outcome, Context]:
    stage = get_stage(name)
    folder.mkdir(parents=True, exist_ok=True)
    context = Context(name, folder, inputs, dtype="float32")
    return stage.function(context, validate(stage.parameters, values, where="test")), context


def test_the_stage_chunked_prefill_compares_chunks_and_mixtures(
    assets: dict[str, Any], tmp_path: Path
) -> None:
    outcome, context = run(
        "chunked_prefill",
        tmp_path / "out",
        assets,
        length=50,
        prompt_tokens=40,
        new_tokens=40,
        kernels="plain",
    )
    assert outcome.metrics["difference"] < 1e-5
    assert set(outcome.metrics) >= {"difference.chunk_1", "difference.chunk_7", "difference.chunk_64"}
    assert (outcome.metrics["same_texts"], outcome.metrics["texts"]) == (1.0, 8)
    assert outcome.metrics["preemptions"] > 0
    assert len(context.report["tables"][0]["rows"]) == 3


def test_measured_costs_feed_the_simulation(assets: dict[str, Any], tmp_path: Path) -> None:
    measured, _ = run(
        "step_costs",
        tmp_path / "costs",
        assets,
        decodes=[3],
        rows=32,
        context=40,
        long_context=64,
        table=[1, 16, 64],
        rounds=2,
        repeats=1,
        kernels="plain",
    )
    assert measured.metrics["seconds.mixed.decodes_3"] > 0
    share = "marginal_share.decodes_3"
    assert measured.metrics[f"{share}.low"] <= measured.metrics[share] <= measured.metrics[f"{share}.high"]
    assert {row for row, _ in read_json(measured.outputs["costs"])["table"]} == {1, 16, 64}
    outcome, context = run("schedule", tmp_path / "plan", {"costs": measured.outputs["costs"]}, requests=12)
    assert outcome.metrics["decode_maximal.passed_over"] == 0
    assert len(context.report["tables"][0]["rows"]) == 4
    steps = read_json(outcome.outputs["steps"])
    assert sum(steps["decode_maximal"]) > 0


def test_a_step_without_room_for_a_chunk_is_refused(assets: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="numbers from 1 to 15"):
        run("step_costs", tmp_path / "costs", assets, decodes=[4, 16], rows=16)


def test_given_costs_are_simulated_and_two_sources_are_refused(tmp_path: Path) -> None:
    costs = {"table": [[1, 0.03], [256, 0.4], [512, 0.78]], "pair": 2e-7}
    outcome, _ = run("schedule", tmp_path / "plan", {}, costs=costs, requests=30)
    assert outcome.metrics["variance_ratio"] > 5
    assert outcome.metrics["decode_maximal.longest_gap"] <= outcome.metrics["chunk_step"]
    again, _ = run("schedule", tmp_path / "again", {}, costs=costs, requests=30)
    assert again.metrics == outcome.metrics
    flat, _ = run("schedule", tmp_path / "flat", {}, costs={"table": [[1, 0.1], [512, 0.1]]}, requests=30)
    assert flat.metrics["variance_ratio"] < 1
    with pytest.raises(PunaError, match="one place"):
        run("schedule", tmp_path / "none", {})
    write_json(tmp_path / "bad.json", {"pair": 1})
    with pytest.raises(PunaError, match="not a file of step costs"):
        run("schedule", tmp_path / "bad", {"costs": tmp_path / "bad.json"})


def test_a_corpus_that_is_too_short_is_told(assets: dict[str, Any], tmp_path: Path) -> None:
    corpus_of(tmp_path / "short", "the cat")
    with pytest.raises(PunaError, match="too short"):
        run("chunked_prefill", tmp_path / "out", {**assets, "corpus": tmp_path / "short"}, kernels="plain")
