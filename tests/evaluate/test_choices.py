"""Choices are scored by the probability of all their tokens, whatever else is in the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from puna.decode.engine import Engine
from puna.evaluate.choices import Slot, score
from tests.serve.little_server import tiny_model

PROMPTS: list[Any] = [
    [{"role": "user", "content": "the cat sat on the mat"}],
    [{"role": "user", "content": "the cat sat on the mat and the dog"}],
    [{"role": "user", "content": "a dog"}],
]
CHOICES = ("Yes", "No", "the dog ran", "the dog sat on")


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Any) -> Any:
    return tiny_model(tiny_tokenizer)


@torch.no_grad()
def by_hand(model: Any, prompt: Any, before: str, choice: str) -> float:
    """The log probability of a choice behind a prompt and what was said, by one forward pass."""
    engine = Engine(model)
    ids = engine.encode(prompt)
    start = [*ids, *(model.tokenizer.encode_continuation(before) if before else [])]
    whole = [*ids, *model.tokenizer.encode_continuation(before + choice)]
    shared = next((n for n, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(start))
    logs = model(torch.tensor([whole]))[0].float().log_softmax(-1)
    return sum(float(logs[place - 1, whole[place]]) for place in range(shared, len(whole)))


def test_scores_are_those_of_a_forward_pass(model: Any) -> None:
    found = score(Engine(model), PROMPTS, [[Slot("", CHOICES)]] * 3)
    for prompt, (tokens, method) in zip(PROMPTS, found, strict=True):
        expected = [by_hand(model, prompt, "", choice) for choice in CHOICES]
        assert method.scores[0] == pytest.approx(expected, abs=1e-4)
        assert method.said == [expected.index(max(expected))]
        assert tokens == len(Engine(model).encode(prompt))


def test_a_later_slot_is_scored_behind_what_was_said_in_the_earlier_ones(model: Any) -> None:
    slots = [Slot("1. ", CHOICES), Slot("2. ", ("No", "Yes"))]
    ((_, method),) = score(Engine(model), PROMPTS[:1], [slots])
    before = f"1. {CHOICES[method.said[0]]}\n2. "
    expected = [by_hand(model, PROMPTS[0], before, choice) for choice in ("No", "Yes")]
    assert method.scores[1] == pytest.approx(expected, abs=1e-4)


def test_offsets_change_what_is_taken_and_not_the_scores(model: Any) -> None:
    ((_, plain),) = score(Engine(model), PROMPTS[:1], [[Slot("", CHOICES)]])
    best = plain.said[0]
    offsets = tuple(100.0 if place == best else 0.0 for place in range(len(CHOICES)))
    ((_, shifted),) = score(Engine(model), PROMPTS[:1], [[Slot("", CHOICES, offsets)]])
    assert shifted.scores == plain.scores and shifted.said != plain.said


def test_neighbours_and_a_small_cache_change_no_score(model: Any) -> None:
    alone = [score(Engine(model), [prompt], [[Slot("", CHOICES)]])[0][1].scores for prompt in PROMPTS]
    small = Engine(model, cache_tokens=256, max_batch_tokens=16)
    together = score(small, PROMPTS * 3, [[Slot("", CHOICES)]] * 9)
    for place, (_, method) in enumerate(together):
        assert method.scores[0] == pytest.approx(alone[place % 3][0], abs=1e-5)
    assert small.statistics.blocks_used == 0
