"""Feed-forwards that the native kernels leave out: which, what comes of it, and for whom."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from puna.core.errors import PunaError
from puna.model.feed_forward_skip import FeedForwardSkip
from puna.model.native.stepper import NativeStepper
from puna.model.plain_stepper import PlainStepper
from puna.model.spec import BlockSpec, LlamaSpec
from puna.model.stepper import Read
from tests.model.native_models import BLOCK, ids_of, little

LINEAR = dataclasses.replace(BLOCK, feed_forward="linear")
LAYERS = (BLOCK, LINEAR, BlockSpec(attention="none", width=30), BLOCK, LINEAR, BLOCK)
SPEC = LlamaSpec(320, 48, LAYERS, tied=True)
SOME = FeedForwardSkip(1, 4, 0.8)
SKIPS = [
    None,
    FeedForwardSkip(0, 5, -2.0),
    SOME,
    FeedForwardSkip(1, 4, -2.0, budget=2),
    FeedForwardSkip(0, 3, 0.85, 1),
]


@pytest.fixture(scope="module")
def native() -> NativeStepper:
    return NativeStepper(little(SPEC), cache_tokens=512)


@pytest.mark.parametrize("skip", SKIPS)
def test_it_skips_what_the_plain_stepper_skips(native: NativeStepper, skip: FeedForwardSkip | None) -> None:
    ids = ids_of(SPEC, 60)
    plain = PlainStepper(little(SPEC), cache_tokens=128)
    mine, theirs = native.sequence(), plain.sequence()
    total = 0
    for start, end in ((0, 40), (40, 41), (41, 44), (44, 60)):
        (found,) = native.step([Read(mine, ids[start:end], end - start, skip)])
        (wanted,) = plain.step([Read(theirs, ids[start:end], end - start, skip)])
        assert torch.allclose(found, wanted, atol=2e-4)
        assert list(native.skipped) == list(plain.skipped)
        total += native.skipped[0]
    assert (total > 0) == (skip is not None)
    assert mine.length == 60
    mine.free()


def test_a_threshold_above_one_changes_no_bit(native: NativeStepper) -> None:
    ids = ids_of(SPEC, 30)
    one, other = native.sequence(), native.sequence()
    (full,) = native.step([Read(one, ids, 30)])
    (never,) = native.step([Read(other, ids, 30, FeedForwardSkip(0, 5, 1.5))])
    assert torch.equal(full, never)
    assert native.skipped == [0]
    one.free(), other.free()


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_text_skips_alike_alone_in_a_batch_in_pieces_and_on_any_threads(quantize: str | None) -> None:
    skips = [*SKIPS, dataclasses.replace(SOME, threshold=0.9)]
    texts = [ids_of(SPEC, 20 + 3 * number, number) for number in range(len(skips))]
    found = []
    for threads in (1, 3):
        stepper = NativeStepper(little(SPEC), quantize=quantize, cache_tokens=2048, threads=threads)  # type: ignore[arg-type]
        sequences = [stepper.sequence() for _ in skips]
        reads = [Read(s, ids, len(ids), skip) for s, ids, skip in zip(sequences, texts, skips, strict=True)]
        found.append((stepper.step(reads), list(stepper.skipped)))
        pieces, counts = [], []
        for ids, skip in zip(texts, skips, strict=True):
            sequence, hidden, count = stepper.sequence(), [], 0
            for start in range(0, len(ids), 7):
                part = ids[start : start + 7]
                hidden += stepper.step([Read(sequence, part, len(part), skip)])
                count += stepper.skipped[0]
            pieces.append(torch.cat(hidden))
            counts.append(count)
        found.append((pieces, counts))
    first, counts = found[0]
    assert min(counts[1:]) > 0
    for other, others in found[1:]:
        assert others == counts
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_a_long_read_is_skipped_through_in_parts() -> None:
    native = NativeStepper(little(SPEC), cache_tokens=4096)
    ids = ids_of(SPEC, 1100)
    sequence, other = native.sequence(), native.sequence()
    (whole,) = native.step([Read(sequence, ids, 5, SOME)])
    count = native.skipped[0]
    native.step([Read(other, ids[:700], 0, SOME)])
    half = native.skipped[0]
    (rest,) = native.step([Read(other, ids[700:], 5, SOME)])
    assert half + native.skipped[0] == count > 0
    assert torch.equal(whole, rest)


def test_other_rules_and_middles_beyond_the_decoder_are_refused(native: NativeStepper) -> None:
    sequence = native.sequence()
    with pytest.raises(PunaError, match="saturation alone"):
        native.step([Read(sequence, [1, 2], 1, FeedForwardSkip(0, 2, rule="random", share=0.5))])
    with pytest.raises(PunaError, match="beyond the decoder"):
        native.step([Read(sequence, [1, 2], 1, FeedForwardSkip(0, 6))])
