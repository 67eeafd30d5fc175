"""The reference stepper: whatever is read together, and however it is cut, gives the decoder's own states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.model.paged import CachePolicy, OutOfBlocks
from puna.model.plain_stepper import PlainStepper
from puna.model.stepper import Read
from puna.model.steppers import make_stepper
from tests.invariants import kit

DECODERS = ("grouped", "window", "every-block-different")


def ids_of(length: int, seed: int = 0) -> list[int]:
    return kit.random_ids(1, length, seed=seed)[0].tolist()


def read_in(stepper: Any, ids: list[int], parts: list[int]) -> torch.Tensor:
    """Logits [time, vocab] of a text read in parts."""
    sequence = stepper.sequence()
    hidden, start = [], 0
    for part in parts:
        hidden += stepper.step([Read(sequence, ids[start : start + part], part)])
        start += part
    assert sequence.length == start == len(ids)
    sequence.free()
    return stepper.logits(torch.cat(hidden))


def cut(length: int, size: int) -> list[int]:
    return [min(size, length - start) for start in range(0, length, size)]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_chunks_of_any_size_give_the_logits_of_one_pass(name: str, size: int) -> None:
    model = kit.DECODERS[name]()
    ids = ids_of(100)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    stepper = PlainStepper(model, cache_tokens=200)
    assert (read_in(stepper, ids, cut(100, size)) - expected).abs().max() < 1e-5
    assert (read_in(stepper, ids, [100]) - expected).abs().max() < 1e-5
    assert stepper.pool.used == 0


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(DECODERS),
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=5), min_size=1, max_size=5),
)
def test_texts_read_together_do_not_see_each_other(name: str, cuts: list[list[int]]) -> None:
    model = kit.DECODERS[name]()
    stepper = PlainStepper(model, cache_tokens=2000)
    texts = [ids_of(sum(parts), seed) for seed, parts in enumerate(cuts)]
    sequences = [stepper.sequence() for _ in texts]
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    for step in range(max(map(len, cuts))):
        reading = [text for text, parts in enumerate(cuts) if step < len(parts)]
        reads = []
        for text in reading:
            start = sum(cuts[text][:step])
            count = cuts[text][step]
            reads.append(Read(sequences[text], texts[text][start : start + count], min(2, count)))
        for text, hidden in zip(reading, stepper.step(reads), strict=True):
            assert hidden.shape == (min(2, cuts[text][step]), model.spec.hidden_size)
            found[text].append(hidden)
    for ids, parts, hidden in zip(texts, cuts, found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0]
        ends = [sum(parts[: step + 1]) for step in range(len(parts))]
        wanted = [p for end, part in zip(ends, parts, strict=True) for p in range(end - min(2, part), end)]
        assert (stepper.logits(torch.cat(hidden)) - expected[wanted]).abs().max() < 5e-5


def test_what_another_text_left_in_a_block_is_never_seen() -> None:
    model = kit.DECODERS["grouped"]()
    stepper = PlainStepper(model, cache_tokens=64)
    stepper.pool.sharing = False
    read_in(stepper, ids_of(60, seed=1), [60])
    ids = ids_of(21)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    assert (read_in(stepper, ids, [5, 1, 14, 1]) - expected).abs().max() < 1e-5


def test_a_policy_wide_enough_changes_no_bit_and_a_narrow_one_does() -> None:
    model = kit.DECODERS["grouped"]()
    ids = ids_of(50)
    layers = len(model.spec.blocks)

    def logits(policy: CachePolicy) -> torch.Tensor:
        policies = [CachePolicy.full(), *[policy] * (layers - 1)]
        return read_in(PlainStepper(model, cache_tokens=64, policies=policies), ids, [20, 1, 1, 28])

    plain = logits(CachePolicy.full())
    for policy in (CachePolicy.sliding(50), CachePolicy.sink_window(0, 50), CachePolicy.sink_window(30, 20)):
        assert torch.equal(logits(policy), plain)
    assert torch.equal(logits(CachePolicy.retained()), plain)
    narrow = logits(CachePolicy.sink_window(2, 8))
    assert torch.equal(narrow[:8], plain[:8])
    assert (narrow[30:] - plain[30:]).abs().max() > 1e-3


def test_a_sliding_policy_is_the_decoder_with_that_window() -> None:
    model = kit.DECODERS["grouped"]()
    windowed = kit.decoder(model.spec.replace(window=9))
    windowed.load_state_dict(model.state_dict())
    ids = ids_of(60)
    with torch.no_grad():
        expected = windowed(torch.tensor([ids]))[0]
    policies = [CachePolicy.sliding(9)] * len(model.spec.blocks)
    stepper = PlainStepper(model, cache_tokens=80, policies=policies)
    for parts in ([60], cut(60, 1), [17, 3, 40]):
        assert (read_in(stepper, ids, parts) - expected).abs().max() < 1e-5


def test_bytes_are_those_of_the_stored_keys_and_values() -> None:
    model = kit.decoder(kit.spec_of(kit.BLOCK, kit.BLOCK))
    stepper = PlainStepper(model, cache_tokens=64, policies=[CachePolicy.full(), CachePolicy.sliding(4)])
    sequence = stepper.sequence()
    stepper.step([Read(sequence, ids_of(60))])
    a_block = 2 * 16 * kit.BLOCK.kv_heads * kit.BLOCK.head_dim * 4
    # All four blocks in the first layer; in the second those of the window, and what a crop may need.
    assert sequence.bytes == stepper.pool.bytes == a_block * (4 + 3)
    assert stepper.pool.bytes_per_block == 2 * a_block


def test_too_little_room_changes_nothing() -> None:
    model = kit.DECODERS["grouped"]()
    stepper = PlainStepper(model, cache_tokens=48)
    first, second = stepper.sequence(), stepper.sequence()
    with pytest.raises(OutOfBlocks):
        stepper.step([Read(first, ids_of(20)), Read(second, ids_of(20))])
    assert (first.length, second.length, stepper.pool.used) == (0, 0, 0)


def test_rotations_that_depend_on_the_length_go_by_the_text_alone(tiny_llama: Callable[..., Any]) -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 8}
    model = tiny_llama(rope_scaling=scaling)
    stepper = PlainStepper(model, cache_tokens=200)
    ids, other = ids_of(40), ids_of(90, seed=2)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    first, second = stepper.sequence(), stepper.sequence()
    found = stepper.step([Read(first, ids[:15], 15, extent=40), Read(second, other)])[:1]
    found += stepper.step([Read(first, ids[15:], 25, extent=40)])
    assert (stepper.logits(torch.cat(found)) - expected).abs().max() < 1e-5
    assert stepper.pool.match([*ids, 1]).length == 0


def test_an_adapter_in_the_model_is_part_of_it(tiny_llama: Callable[..., Any]) -> None:
    from puna.model.adapters import LoraSettings, add_lora, lora_layers

    model = tiny_llama()
    add_lora(model, LoraSettings(r=2), seed=0)
    for _, layer in lora_layers(model):
        torch.nn.init.constant_(layer.lora_B["default"].weight, 0.05)
    ids = ids_of(30)
    with torch.no_grad():
        expected = model.eval()(torch.tensor([ids]))[0]
    assert (read_in(PlainStepper(model, cache_tokens=32), ids, [13, 1, 16]) - expected).abs().max() < 1e-5


class EverySecond:
    """Skips the feed-forward of the second layer for every second row."""

    def begin(self, rows: int) -> Any:
        class Turns:
            skipped = 0
            seen: tuple[int, ...] = ()

            def running(self, layer: int) -> torch.Tensor | None:
                if layer != 1:
                    return None
                turns = torch.arange(rows) % 2 == 0
                self.skipped += int((~turns).sum())
                return turns

            def saw(self, layer: int, rows_run: Any, before: torch.Tensor, after: torch.Tensor) -> None:
                self.seen = (*self.seen, len(before))
                assert before.shape == after.shape

        return Turns()


def test_feed_forwards_are_skipped_for_the_rows_that_a_rule_names_and_for_no_other_text() -> None:
    model = kit.DECODERS["grouped"]()
    stepper = PlainStepper(model, cache_tokens=200)
    ids = ids_of(11)
    first, second = stepper.sequence(), stepper.sequence()
    skipping, plain = stepper.step([Read(first, ids, 11, skip=EverySecond()), Read(second, ids, 11)])
    assert stepper.skipped == [5, 0]
    with torch.no_grad():
        expected = model.hidden(torch.tensor([ids]))[0]
    assert (plain - expected).abs().max() < 1e-5
    assert (skipping[1] - expected[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernels": "fast"}, "unknown kernels"),
        ({"quantize": "int3"}, "unknown quantisation"),
        ({"cache_tokens": 0}, "cache_tokens"),
        ({"policies": [CachePolicy()]}, "for each layer"),
    ],
)
def test_wrong_settings_are_told(
    tiny_llama: Callable[..., Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(PunaError, match=message):
        make_stepper(tiny_llama(), **{"cache_tokens": 16, "kernels": "plain", **settings})


def test_a_decoder_that_attends_both_ways_is_refused() -> None:
    model = kit.decoder(kit.spec_of().replace(causal=False))
    with pytest.raises(PunaError, match="both ways"):
        PlainStepper(model, cache_tokens=16)
    with pytest.raises(PunaError, match="more than its window"):
        PlainStepper(
            kit.decoder(kit.spec_of().replace(window=4)), cache_tokens=16, policies=[CachePolicy()] * 2
        )
