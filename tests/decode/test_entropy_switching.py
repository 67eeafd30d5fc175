"""Switching between two models: its ends, the catching up, the two costs, its baseline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from puna.core.errors import PunaError
from puna.decode.engine import Completion, Engine
from puna.decode.entropy_switching import spent
from puna.decode.routers import EntropyRouter
from puna.decode.sampling import Sampling, entropy_bits
from tests.decode.decoding_models import speaking

PROMPTS = ["the cat sat on", "a", "in the end it went in again"]
GREEDY = Sampling(max_tokens=40, ignore_eos=True)


@pytest.fixture
def pair(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> tuple[Any, Any]:
    """A large model and a small one."""
    large = speaking(tiny_llama, tiny_tokenizer)
    return large, speaking(tiny_llama, tiny_tokenizer, 1, num_hidden_layers=1)


def switched(pair: tuple[Any, Any], sampling: Sampling = GREEDY, **settings: Any) -> list[Completion]:
    engine = Engine(pair[0], models={"small": pair[1]}, kernels="plain")
    return engine.generate(PROMPTS, sampling, {"name": "entropy-switching", **settings})


def alone(model: Any) -> list[list[int]]:
    return [one.ids for one in Engine(model, kernels="plain").generate(PROMPTS, GREEDY)]


def test_with_an_infinite_threshold_it_is_the_small_model(pair: tuple[Any, Any]) -> None:
    found = switched(pair, threshold=1e9)
    assert [one.ids for one in found] == alone(pair[1])
    assert {row.source for one in found for row in one.trace} == {"small"}
    assert not any(one.lossless for one in found)


def test_started_large_with_a_negative_threshold_it_is_the_large_model(pair: tuple[Any, Any]) -> None:
    found = switched(pair, threshold=-1.0, start="large")
    assert [one.ids for one in found] == alone(pair[0])
    assert {row.source for one in found for row in one.trace} == {"large"}


def test_after_a_switch_the_logits_are_those_of_a_fresh_forward_of_the_active_model(
    pair: tuple[Any, Any],
) -> None:
    models = {"large": pair[0], "small": pair[1]}
    encode = Engine(pair[0], kernels="plain").encode
    sampling = Sampling(max_tokens=50, temperature=0.9, seed=2, logprobs=True, ignore_eos=True)
    found = switched(pair, sampling, threshold=4.0, minimum_stay=2, window=2)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        sources = [row.source for row in completion.trace]
        assert set(sources) == set(models)
        ids = [*encode(prompt), *completion.ids]
        with torch.no_grad():
            logs = {name: model(torch.tensor([ids]))[0].log_softmax(-1) for name, model in models.items()}
        start = len(ids) - len(completion.ids)
        fresh = [
            float(logs[source][start + place - 1, token])
            for place, (source, token) in enumerate(zip(sources, completion.ids, strict=True))
        ]
        assert completion.logprobs == pytest.approx(fresh, abs=1e-5)


def test_the_router_is_given_the_entropy_of_the_raw_logits(pair: tuple[Any, Any]) -> None:
    sampling = Sampling(max_tokens=30, temperature=0.3, top_k=5, seed=1, ignore_eos=True)
    (completion,) = switched(pair, sampling, threshold=4.0, minimum_stay=3)[:1]
    ids = Engine(pair[0], kernels="plain").encode(PROMPTS[0])
    router, current = EntropyRouter(4.0, minimum_stay=3), "small"
    for token, row in zip(completion.ids, completion.trace, strict=True):
        assert row.source == current
        with torch.no_grad():
            logits = (pair[0] if current == "large" else pair[1])(torch.tensor([ids]))[0, -1]
        assert row.entropy == pytest.approx(entropy_bits(logits), abs=1e-4)
        current = router.choose(entropy_bits(logits), current)  # type: ignore[arg-type]
        ids.append(token)
    assert {row.source for row in completion.trace} == {"small", "large"}


def test_catching_up_is_counted_and_can_be_left_out(pair: tuple[Any, Any]) -> None:
    weight = pair[1].spec.parameter_count() / pair[0].spec.parameter_count()
    for completion in switched(pair, threshold=4.0, minimum_stay=4):
        sources = [row.source for row in completion.trace]
        prompt = completion.prompt_tokens
        read = {"large": 0, "small": prompt}  # tokens each model has read when the first token is drawn
        expected = weight  # of reading the prompt's last token
        for place, (before, source) in enumerate(itertools.pairwise(sources), start=1):
            have = prompt + place
            new = have - read[source]
            assert new == 1 or before != source
            read[source] = have
            expected += new * (1.0 if source == "large" else weight)
        counted, paper = spent(completion.trace, weight)
        assert counted * len(sources) == pytest.approx(expected)
        share = sources.count("large") / len(sources)
        assert paper == pytest.approx(share + (1 - share) * weight)
        assert counted > paper


def test_the_baseline_switches_at_random_and_alike_for_one_seed(pair: tuple[Any, Any]) -> None:
    settings = {"rule": "random", "share": 0.5, "minimum_stay": 2}
    first, again = switched(pair, **settings), switched(pair, **settings)
    assert [one.trace for one in first] == [one.trace for one in again]
    assert len({tuple(row.source for row in one.trace) for one in first}) == len(first)
    assert {row.source for one in first for row in one.trace} == {"small", "large"}
    assert {row.source for one in switched(pair, rule="random", share=0.0) for row in one.trace} == {"small"}


def test_models_of_two_tokenizers_and_unknown_models_are_refused(
    pair: tuple[Any, Any], tiny_llama: Callable[..., Any]
) -> None:
    without = tiny_llama(3)
    with pytest.raises(PunaError, match="share one tokenizer"):
        switched((pair[0], without))
    with pytest.raises(PunaError, match="unknown model"):
        switched(pair, small="smal")
    with pytest.raises(PunaError, match="threshhold"):
        switched(pair, threshhold=1.0)


def test_thresholds_in_bits_are_not_nats(pair: tuple[Any, Any]) -> None:
    uniform = Engine(pair[0], kernels="plain").model
    with torch.no_grad():
        for parameter in uniform.parameters():
            parameter.zero_()
    for parameter in pair[1].parameters():
        parameter.data.zero_()
    bits = math.log2(pair[0].spec.vocab_size)  # 8.3 bits, 5.8 nats
    found = switched(pair, threshold=bits - 1, minimum_stay=1, window=1)
    assert [row.source for row in found[0].trace[:3]] == ["small", "large", "large"]
