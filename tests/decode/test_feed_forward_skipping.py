"""Decoding without some feed-forwards: neutral settings, the cache, costs, plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.core.errors import PunaError
from puna.decode.engine import Engine
from puna.decode.feed_forward_skipping import (
    FeedForwardSkipSettings,
    feed_forward_share,
    read_plan,
    write_plan,
)
from puna.decode.sampling import Sampling
from puna.decode.skip_measures import (
    block_cosines,
    calibrate,
    least_needed_blocks,
    operations_error,
    read_texts,
    step_times,
    without_blocks,
)
from puna.model.feed_forward_skip import FeedForwardSkip, SkipPlan
from puna.model.plain_stepper import PlainStepper
from puna.model.stepper import Read
from tests.decode.decoding_models import speaking

LAYERS = 6
PROMPTS = ["the cat sat on", "a", "in the end it went in again"]


@pytest.fixture
def model(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    return speaking(tiny_llama, tiny_tokenizer, num_hidden_layers=LAYERS)


def skipping(first: int = 1, last: int = 4, threshold: float = -2.0, budget: int = 9, **more: Any) -> Any:
    settings = {"first": first, "last": last, "threshold": threshold, "budget": budget, **more}
    return {"name": "feed-forward-skip", **settings}


def test_above_1_the_tokens_and_log_probabilities_are_those_of_plain_decoding_to_the_bit(model: Any) -> None:
    engine = Engine(model, kernels="plain")
    sampling = Sampling(max_tokens=25, temperature=0.8, seed=1, logprobs=True, ignore_eos=True)
    plain = engine.generate(PROMPTS, sampling)
    skipped = engine.generate(PROMPTS, sampling, skipping(threshold=1.5))
    assert [one.ids for one in skipped] == [one.ids for one in plain]
    assert [one.logprobs for one in skipped] == [one.logprobs for one in plain]
    assert {row.cost for one in skipped for row in one.trace} == {1.0}


def test_prompt_and_first_tokens_are_read_in_full_and_costs_say_what_was_skipped(model: Any) -> None:
    engine = Engine(model, kernels="plain")
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    (one,) = engine.generate(["the cat"], sampling, skipping(warm_up=4))
    share = feed_forward_share(model.spec)
    # The token at place k was drawn from what reading the one before it gave: 5 and later were skipped.
    assert [row.cost for row in one.trace] == pytest.approx([1.0] * 5 + [1 - 3 * share] * 7)
    (plain,) = engine.generate(["the cat"], sampling)
    assert one.ids[:5] == plain.ids[:5]
    assert not one.lossless


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_the_engines_own_kernels_skip_too(model: Any, quantize: Any) -> None:
    """Whatever runs here: a compiler may be missing."""
    engine = Engine(model, quantize=quantize)
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    full = engine.generate(PROMPTS, sampling)
    never = engine.generate(PROMPTS, sampling, skipping(threshold=1.5))
    assert [one.ids for one in never] == [one.ids for one in full]
    share = feed_forward_share(model.spec)
    for one in engine.generate(PROMPTS, sampling, skipping(warm_up=4)):
        assert [row.cost for row in one.trace] == pytest.approx([1.0] * 5 + [1 - 3 * share] * 7)


@pytest.mark.parametrize("skip", [None, FeedForwardSkip(0, 5, -2.0), FeedForwardSkip(1, 4, 0.5, 2)])
def test_every_layers_cache_holds_every_token_at_any_rate_of_skipping(
    model: Any, skip: FeedForwardSkip | None
) -> None:
    ids = model.tokenizer.encode("in the end it went in again on the mat")
    assert read_texts(model, [(ids, 3), (ids[:6], 2)], skip).stored == 0
    stepper = PlainStepper(model, cache_tokens=64)
    sequence = stepper.sequence()
    stepper.step([Read(sequence, ids[:3])])
    for token in ids[3:]:
        stepper.step([Read(sequence, [token], 1, skip)])
    assert sequence.length == len(ids)


def test_a_layer_that_stored_nothing_would_be_noticed(model: Any) -> None:
    ids = model.tokenizer.encode("in the end it went in again")
    attend = model.model.layers[2].attend
    model.model.layers[2].attend = lambda hidden, *rest: hidden
    assert read_texts(model, [(ids, 3)], FeedForwardSkip(1, 4, 1.5)).stored == len(ids) - 1
    model.model.layers[2].attend = attend


def test_tokens_read_together_skip_as_one_by_one(model: Any) -> None:
    texts = [model.tokenizer.encode("the cat and the other cat sat on that mat in the end, and then it went")]
    skip = FeedForwardSkip(1, 4, 0.6, 2)
    together = read_texts(model, [(texts[0], 5)], skip)
    stepper = PlainStepper(model, cache_tokens=64)
    sequence = stepper.sequence()
    stepper.step([Read(sequence, texts[0][:5], 0)])
    loss, skipped = 0.0, 0
    for place in range(5, len(texts[0]) - 1):
        logits = stepper.logits(stepper.step([Read(sequence, [texts[0][place]], 1, skip)])[0])[0]
        loss -= float(logits.log_softmax(0)[texts[0][place + 1]])
        skipped += stepper.skipped[0]
    assert together.losses[0] == pytest.approx(loss, abs=1e-3)
    assert together.skipped == skipped
    assert 0 < together.share < 2 / LAYERS + 1e-9
    assert together.possible == LAYERS * (len(texts[0]) - 6)


def test_operations_that_torch_counts_are_those_of_the_feed_forwards_that_ran(model: Any) -> None:
    ids = model.tokenizer.encode("the cat and the other cat sat on that mat")
    assert operations_error(model, ids, 3, FeedForwardSkip(1, 4, 0.6, 2)) == 0
    assert operations_error(model, ids, 3, FeedForwardSkip(0, 5, -2.0)) == 0


def test_calibration_sees_every_layer_and_changes_nothing(model: Any) -> None:
    texts = [model.tokenizer.encode("the cat and the other cat sat on that mat")]
    cosines = calibrate(model, [(texts[0], 3)])
    assert cosines.shape == (LAYERS, len(texts[0]) - 4)
    seen: list[torch.Tensor] = []
    handle = model.model.layers[2].mlp.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    inputs: list[torch.Tensor] = []
    norm = model.model.layers[2].post_attention_layernorm.register_forward_pre_hook(
        lambda module, given: inputs.append(given[0])
    )
    with torch.no_grad():
        model(torch.tensor([texts[0]]))
    handle.remove()
    norm.remove()
    expected = torch.cosine_similarity(inputs[0], inputs[0] + seen[0], dim=-1)[0, 3:-1]
    assert cosines[2].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_dropped_block_hands_on_what_it_is_given_and_comes_back(model: Any) -> None:
    texts = [model.tokenizer.encode("the cat and the other cat sat")]
    before = read_texts(model, [(texts[0], 2)], None)
    with without_blocks(model, [2]):
        dropped = read_texts(model, [(texts[0], 2)], None)
        ids = torch.tensor([texts[0]])
        with torch.no_grad():
            short = model.hidden(ids)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(layer for place, layer in enumerate(layers) if place != 2)
    with torch.no_grad():
        assert torch.equal(model.hidden(ids), short)
    model.model.layers = layers
    assert dropped.losses != before.losses
    assert read_texts(model, [(texts[0], 2)], None).losses == before.losses


def test_the_blocks_that_turn_the_stream_least_are_the_candidates_to_drop(model: Any) -> None:
    cosines = block_cosines(model, [model.tokenizer.encode("the cat and the other cat sat")])
    assert len(cosines) == LAYERS
    assert least_needed_blocks(torch.tensor([0.1, 0.9, 0.2, 0.8, 0.7, 0.3]), 2) == [[1, 3], [3, 4]]


def test_steps_are_timed_for_each_way(model: Any) -> None:
    ids = model.tokenizer.encode("the cat and the other cat sat")
    texts = [(ids, 4), (ids[:6], 2)]
    times = step_times(
        PlainStepper(model, cache_tokens=64), texts, 3, [None, FeedForwardSkip(1, 4, -2.0)], rounds=2
    )
    assert len(times) == 2 and all(0 < taken < math.inf for taken in times)


def test_a_plan_is_written_and_read_and_may_say_nothing_to_skip(tmp_path: Path, model: Any) -> None:
    skip = FeedForwardSkip(1, 4, 0.25, 2)
    file = write_plan(SkipPlan(skip, 0.2, (0.5,) * LAYERS, "why"), tmp_path / "plan.json")
    assert read_plan(file) == skip
    assert FeedForwardSkipSettings(plan=str(file)).build().skip == skip
    nothing = write_plan(SkipPlan(None, 0.0, (0.5,) * LAYERS, "why"), tmp_path / "nothing.json")
    assert read_plan(nothing) is None
    engine = Engine(model, kernels="plain")
    sampling = Sampling(max_tokens=15, ignore_eos=True)
    found = engine.generate(PROMPTS, sampling, {"name": "feed-forward-skip", "plan": str(nothing)})
    assert [one.ids for one in found] == [one.ids for one in engine.generate(PROMPTS, sampling)]


def test_wrong_settings_and_plans_are_told(tmp_path: Path, model: Any) -> None:
    engine = Engine(model, kernels="plain")

    def run(chosen: dict[str, Any]) -> None:
        engine.generate(["a"], Sampling(max_tokens=2), {"name": "feed-forward-skip", **chosen})

    with pytest.raises(PunaError, match="give a plan, or also last, threshold, budget"):
        run({"first": 1})
    with pytest.raises(PunaError, match="both given"):
        run({"first": 1, "plan": "x.json"})
    with pytest.raises(PunaError, match="no such plan"):
        run({"plan": str(tmp_path / "x.json")})
    (tmp_path / "y.json").write_text('{"skip": {"first": 1}}')
    with pytest.raises(PunaError, match="lacks a number"):
        run({"plan": str(tmp_path / "y.json")})
    (tmp_path / "z.json").write_text("[]")
    with pytest.raises(PunaError, match="not a plan"):
        run({"plan": str(tmp_path / "z.json")})
    with pytest.raises(PunaError, match="beyond the decoder"):
        run(skipping(last=6))
