from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.evaluate import bits_per_byte

TEXTS = [
    "the cat sat on the mat",
    "à",
    "",
    "in the end it went on and on and on, that other cat",
    "ca",
    "Ж the 𝄞!",
]


@pytest.fixture
def model(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    built = tiny_llama(tie_word_embeddings=False)
    for parameter in built.parameters():  # larger weights: each token's probability depends on its context
        parameter.data.mul_(4)
    built.tokenizer = tiny_tokenizer
    return built


def naive(model: Any, texts: list[str]) -> list[float]:
    """Bits of each document by transformers' decoder, token by token, with no batch and no window."""
    from transformers import LlamaConfig, LlamaForCausalLM

    oracle = LlamaForCausalLM(LlamaConfig(**model.spec.to_config())).eval()
    oracle.load_state_dict(model.state_dict(), strict=not model.spec.tied)
    oracle.tie_weights()
    bits = []
    for text in texts:
        ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
        with torch.no_grad():
            logs = oracle(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        bits.append(-sum(float(logs[place, token]) for place, token in enumerate(ids[1:])) / math.log(2))
    return bits


def test_a_device_without_float64_gives_the_same_bits(
    model: Any, monkeypatch: pytest.MonkeyPatch, without_float64: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    expected = bits_per_byte.measure(model, TEXTS).bits
    real = bits_per_byte.linear_cross_entropy

    def there(*arguments: Any) -> Any:
        found = real(*arguments)
        return dataclasses.replace(found, tokens=without_float64(found.tokens))

    monkeypatch.setattr(bits_per_byte, "linear_cross_entropy", there)
    assert bits_per_byte.measure(model, TEXTS).bits.tolist() == expected.tolist()


def test_bits_equal_those_of_transformers_document_by_document(model: Any) -> None:
    found = bits_per_byte.measure(model, TEXTS)
    expected = naive(model, TEXTS)
    assert found.bits == pytest.approx(expected, rel=1e-5)
    assert found.bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert found.bits_per_byte == pytest.approx(
        sum(expected) / sum(len(text.encode()) for text in TEXTS), rel=1e-5
    )


def test_a_uniform_model_needs_log2_of_the_vocabulary_for_each_token(model: Any) -> None:
    model.lm_head.weight.data.zero_()
    found = bits_per_byte.measure(model, TEXTS)
    tokens = numpy.array([len(model.tokenizer.encode(text)) for text in TEXTS])
    assert found.tokens.tolist() == tokens.tolist()
    assert found.bits == pytest.approx(tokens * math.log2(model.spec.vocab_size), rel=1e-6)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text("the cat on é𝄞", max_size=60), min_size=1, max_size=8), st.sampled_from([1, 7, 64, 999])
)
def test_grouping_into_batches_does_not_change_the_bits(
    model: Any, texts: list[str], batch_tokens: int
) -> None:
    texts = ["a cat", *texts]
    together = bits_per_byte.measure(model, texts, batch_tokens=batch_tokens).bits
    alone = [bits_per_byte.measure(model, [text, "."]).bits[0] for text in texts]
    assert together == pytest.approx(alone, rel=1e-5)


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(1, 40), st.data())
def test_windows_score_every_token_once_with_enough_context(
    length: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    ids = list(range(length))
    pieces = list(bits_per_byte.windows_of(0, ids, window, stride))
    assert [token for piece in pieces for token in piece.targets] == ids[1:]
    for piece in pieces:
        assert len(piece.inputs) <= window
        assert piece.inputs[-1] == piece.targets[-1] - 1  # inputs and targets end together
    for piece in pieces[1:]:
        assert len(piece.inputs) == window
        assert len(piece.inputs) - len(piece.targets) >= window - stride


def test_a_document_longer_than_the_context_is_read_in_windows(model: Any) -> None:
    text = "the cat sat on that mat and the other cat went in " * 40
    assert len(model.tokenizer.encode(text)) > model.spec.max_positions
    whole = bits_per_byte.measure(model, [text], stride=1, window=64).bits_per_byte
    strided = bits_per_byte.measure(model, [text], stride=16, window=64).bits_per_byte
    assert strided == pytest.approx(whole, rel=0.05)
    short = "the cat sat on the mat"
    assert bits_per_byte.measure(model, [short], window=9999).bits == pytest.approx(
        naive(model, [short]), rel=1e-5
    )


def test_rotations_that_follow_the_batch_length_do_not_mix_documents(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}
    model = tiny_llama(tie_word_embeddings=False, rope_scaling=scaling)
    model.tokenizer = tiny_tokenizer
    together = bits_per_byte.measure(model, [TEXTS[0], TEXTS[3]]).bits
    assert together == pytest.approx(
        [bits_per_byte.measure(model, [text]).bits[0] for text in (TEXTS[0], TEXTS[3])]
    )


def test_the_start_token_is_the_eos_where_there_is_no_bos(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bits_per_byte.start_token(model.tokenizer) == model.tokenizer.bos_id
    monkeypatch.delitem(model.tokenizer.strings, "bos_token")
    assert bits_per_byte.start_token(model.tokenizer) == model.tokenizer.eos_id


def test_training_mode_is_as_it_was_before(model: Any) -> None:
    for training in (True, False):
        model.train(training)
        bits_per_byte.measure(model, ["a"])
        assert model.training is training


def test_nothing_to_measure_and_impossible_windows_are_refused(model: Any) -> None:
    with pytest.raises(PunaError, match="no text"):
        bits_per_byte.measure(model, ["", ""])
    with pytest.raises(PunaError, match="window settings"):
        bits_per_byte.measure(model, ["a"], window=8, stride=9)
    model.tokenizer = None
    with pytest.raises(PunaError, match="no tokenizer"):
        bits_per_byte.measure(model, ["a"])


def test_a_model_that_sees_the_future_is_refused(model: Any) -> None:
    blocks = (dataclasses.replace(model.spec.blocks[0], causal=False), model.spec.blocks[1])
    model.spec = model.spec.replace(blocks=blocks)
    with pytest.raises(PunaError, match="causal"):
        bits_per_byte.measure(model, ["a"])


@pytest.mark.smollm
def test_smollm_bits_equal_those_of_transformers(smollm: Any) -> None:
    texts = ["De kat zat op de mat.", "The cat sat on the mat, as cats do."]
    assert bits_per_byte.measure(smollm, texts).bits == pytest.approx(naive(smollm, texts), rel=1e-4)
