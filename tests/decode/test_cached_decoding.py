"""Decoding with and without a cache: the same tokens, and the bytes that a token needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from puna.decode import cached_decoding


def test_both_ways_say_the_same_and_the_figures_fit_together(
    tiny_llama: Callable[..., Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr(cached_decoding, "bandwidth", lambda: 1e9)
    found = cached_decoding.compare(tiny_llama().eval(), [5, 6, 7], 24, 1)
    assert found["tokens_differ"] == 0 and found["tokens"] == 24
    assert found["gain"] == found["tokens_per_second"] / found["tokens_per_second.uncached"]
    assert abs(found["share_of_bound"] * found["bound"] / found["tokens_per_second"] - 1) < 1e-12
    assert found["bound"] == 1e9 / found["bytes_per_token"]


def test_other_tokens_are_counted(tiny_llama: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(cached_decoding, "bandwidth", lambda: 1e9)
    monkeypatch.setattr(
        cached_decoding, "without_cache", lambda *_: cached_decoding.Decoded([0, -1, -2, -3], 1.0, 1.0)
    )
    assert cached_decoding.compare(tiny_llama(), [5], 4, 1)["tokens_differ"] >= 3


def test_a_head_of_its_own_is_read_and_its_embedding_is_not(tiny_llama: Callable[..., Any]) -> None:
    tied, own = (tiny_llama(tie_word_embeddings=tied) for tied in (True, False))
    assert cached_decoding.bytes_of_a_token(tied, 10) == cached_decoding.bytes_of_a_token(own, 10)
    keys = 2 * 2 * 2 * 12 * 4  # two layers, keys and values, two heads of twelve numbers, four bytes
    assert cached_decoding.bytes_of_a_token(own, 11) - cached_decoding.bytes_of_a_token(own, 10) == keys
    assert cached_decoding.bytes_of_a_token(own, 0) == 4 * (tied.spec.parameter_count() + 48)
