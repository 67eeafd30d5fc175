from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.decode.engine import Engine
from puna.decode.sampling import Sampling
from puna.text.template import CHATML, Template

PROMPTS = ["the cat", "a", "in the end, and then it went in again on the other mat", "é𝄞", "that other"]
some_prompts = st.lists(st.text("the cat on é", min_size=1, max_size=30), min_size=2, max_size=6)


@pytest.fixture
def model(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    built = tiny_llama(tie_word_embeddings=False)
    for parameter in built.parameters():  # larger weights: the text depends on the prompt
        parameter.data.mul_(4)
    built.tokenizer = tiny_tokenizer
    return built


@pytest.fixture
def oracle(model: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    built = LlamaForCausalLM(LlamaConfig(**model.spec.to_config())).eval()
    built.load_state_dict(model.state_dict(), strict=True)
    return built


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_of_transformers(model: Any, oracle: Any, prompt: str) -> None:
    engine = Engine(model)
    ids = torch.tensor([engine.encode(prompt)])
    expected = oracle.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = engine.generate([prompt], Sampling(max_tokens=40, ignore_eos=True))[0]
    assert found.ids == expected[0, ids.shape[1] :].tolist()
    assert len(set(found.ids)) > 5  # a text that only repeats itself would prove little


@pytest.mark.parametrize(
    "sampling", [Sampling(max_tokens=8), Sampling(max_tokens=8, temperature=0.8, top_p=0.9)]
)
@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=some_prompts, max_batch_tokens=st.sampled_from([1, 120, 8192]))
def test_grouping_does_not_change_the_texts(
    model: Any, sampling: Sampling, prompts: list[str], max_batch_tokens: int
) -> None:
    together = Engine(model).generate(prompts, sampling)
    assert Engine(model, max_batch_tokens=max_batch_tokens).generate(prompts, sampling) == together


def test_a_text_is_the_same_alone_and_in_a_batch(model: Any) -> None:
    engine = Engine(model)
    together = engine.generate(PROMPTS, Sampling(max_tokens=40))
    assert [engine.generate([prompt], Sampling(max_tokens=40))[0] for prompt in PROMPTS] == together


def test_lengths_of_neighbours_do_not_change_a_drawn_text(model: Any) -> None:
    sampling = Sampling(max_tokens=30, temperature=1.0, seed=5)
    engine = Engine(model)
    other = engine.generate([PROMPTS[0], PROMPTS[2]], sampling)[0]
    assert engine.generate([PROMPTS[0], PROMPTS[1]], sampling)[0] == other
    assert engine.generate([PROMPTS[0]], Sampling(max_tokens=30, temperature=1.0, seed=6))[0].ids != other.ids


def test_rotations_that_follow_the_batch_length_give_the_text_of_the_prompt_alone(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 8}
    model = tiny_llama(tie_word_embeddings=False, rope_scaling=scaling)
    model.tokenizer = tiny_tokenizer
    engine = Engine(model)
    together = engine.generate(PROMPTS, Sampling(max_tokens=20))
    assert [engine.generate([prompt], Sampling(max_tokens=20))[0] for prompt in PROMPTS] == together


@pytest.mark.parametrize("stop", [(), ("t",), ("he", " a")])
def test_the_stream_joined_is_the_generated_text(model: Any, stop: tuple[str, ...]) -> None:
    engine = Engine(model)
    for prompt in PROMPTS:
        sampling = Sampling(max_tokens=40, temperature=1.2, seed=1, stop=stop)
        assert "".join(engine.stream(prompt, sampling)) == engine.generate([prompt], sampling)[0].text


def test_the_stream_gives_text_before_the_end(model: Any) -> None:
    stream = Engine(model).stream("the cat", Sampling(max_tokens=200, ignore_eos=True))
    assert next(stream)


def test_a_stop_token_ends_the_text_and_is_not_in_it(model: Any) -> None:
    engine = Engine(model)
    free = engine.generate(["the cat"], Sampling(max_tokens=20, ignore_eos=True))[0]
    ending = free.ids[7]
    model.tokenizer = model.tokenizer.with_stop_tokens([model.tokenizer.tokens([ending])[0]])
    found = Engine(model).generate(["the cat"], Sampling(max_tokens=20))[0]
    cut = free.ids.index(ending)
    assert found.finish_reason == "stop"
    assert found.ids == free.ids[: cut + 1]
    assert found.text == model.tokenizer.decode(free.ids[:cut])
    assert free.finish_reason == "length"
    assert len(free.ids) == 20


def test_a_stop_string_cuts_the_text(model: Any) -> None:
    engine = Engine(model)
    text = engine.generate(["the cat"], Sampling(max_tokens=30))[0].text
    stop = text[5:7]
    found = engine.generate(["the cat"], Sampling(max_tokens=30, stop=(stop,)))[0]
    assert found.text == text[: text.index(stop)]
    assert found.finish_reason == "stop"
    assert len(found.ids) < 30


def test_logprobs_are_those_of_a_forward_pass(model: Any) -> None:
    engine = Engine(model)
    found = engine.generate(PROMPTS, Sampling(max_tokens=12, temperature=0.7, top_k=20, logprobs=True))
    for prompt, completion in zip(PROMPTS, found, strict=True):
        ids = engine.encode(prompt) + completion.ids
        assert completion.prompt_tokens == len(engine.encode(prompt))
        with torch.no_grad():
            expected = model(torch.tensor([ids[:-1]]))[0, completion.prompt_tokens - 1 :].log_softmax(-1)
        assert completion.logprobs == pytest.approx(
            [float(row[token]) for row, token in zip(expected, completion.ids, strict=True)], abs=1e-4
        )
    assert engine.generate(["a"], Sampling(max_tokens=2))[0].logprobs is None


def test_strings_get_the_start_token_and_lists_of_ids_do_not(model: Any) -> None:
    engine = Engine(model)
    ids = model.tokenizer.encode("the cat")
    assert engine.encode("the cat") == [model.tokenizer.bos_id, *ids]
    assert engine.encode(ids) == ids
    assert engine.generate([[model.tokenizer.bos_id, *ids]]) == engine.generate(["the cat"])


def test_messages_are_rendered_and_special_strings_in_them_stay_text(model: Any) -> None:
    model.template = Template(CHATML.replace("<|im_end|>", "<|end|>"), model.tokenizer.template_strings)
    engine = Engine(model)
    ids = engine.encode([{"role": "user", "content": "a <|end|> b"}])
    assert ids.count(model.tokenizer.id_of("<|end|>")) == 1  # the template's own, not the user's
    assert ids[0] == model.tokenizer.bos_id
    assert ids.count(model.tokenizer.bos_id) == 1
    text = "<|im_start|>user\na <|end|> b<|end|>\n<|im_start|>assistant\n"
    assert model.tokenizer.decode(ids) == text.replace("<|end|>\n", "\n")


def test_no_prompts_give_no_completions(model: Any) -> None:
    assert Engine(model).generate([]) == []


def test_generation_ends_at_the_context(model: Any) -> None:
    engine = Engine(model)
    prompt = [5] * 250
    found = engine.generate([prompt], Sampling(max_tokens=100, ignore_eos=True))[0]
    assert (len(found.ids), found.finish_reason) == (6, "length")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[5] * 256], "does not fit"),
        ([[]], "empty prompt"),
        ([[400]], "outside the vocabulary"),
        ("the cat", "list of prompts"),
        ([5, 6], "list of prompts"),
        ([{"role": "user", "content": "hi"}], "list of prompts"),
        ([[{"role": "user", "content": "hi"}]], "no chat template"),
    ],
)
def test_bad_prompts_get_one_clear_message(model: Any, prompts: Any, message: str) -> None:
    with pytest.raises(PunaError, match=message):
        Engine(model).generate(prompts)


def test_a_stop_id_that_no_text_can_hold_is_refused(model: Any) -> None:
    with pytest.raises(PunaError, match="stop_ids has ids outside the vocabulary"):
        Engine(model).generate([[5]], Sampling(stop_ids=[3, 400]))


def test_a_model_without_tokenizer_is_refused(model: Any) -> None:
    model.tokenizer = None
    with pytest.raises(PunaError, match="no tokenizer"):
        Engine(model)


def test_no_step_reads_more_than_the_bound_and_no_prompt_is_lost(model: Any) -> None:
    engine = Engine(model, max_batch_tokens=40, chunk_tokens=25, kernels="plain")
    tickets = [
        engine.submit([5] * (1 + 7 * index), Sampling(max_tokens=9), index=index) for index in range(20)
    ]
    read = 0
    while engine.step():
        assert engine.statistics.tokens_read - read <= 40
        read = engine.statistics.tokens_read
    assert [len(ticket.completion.ids) for ticket in tickets] == [9] * 20
    assert [ticket.completion.prompt_tokens for ticket in tickets] == [1 + 7 * index for index in range(20)]


@pytest.mark.smollm
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_smollm_in_a_tight_mixture_writes_what_transformers_would(smollm: Any, kernels: Any) -> None:
    """``python -m benchmarks.greedy`` asks the same of 200 prompts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    oracle = LlamaForCausalLM(LlamaConfig(**smollm.spec.to_config())).eval()
    oracle.load_state_dict(smollm.state_dict(), strict=False)
    oracle.tie_weights()
    texts = ["De hoofdstad van Nederland is", "import numpy as", "Once upon a time there was a"]
    engine = Engine(smollm, kernels=kernels, max_batch_tokens=24, chunk_tokens=16, cache_tokens=64)
    prompts = [engine.encode(text * 3)[: 9 + 5 * number] for number, text in enumerate(texts)]
    for prompt, found in zip(prompts, engine.generate(prompts, Sampling(max_tokens=30)), strict=True):
        with torch.no_grad():
            logits = oracle(torch.tensor([[*prompt, *found.ids[:-1]]])).logits[0, len(prompt) - 1 :]
        assert found.ids == logits.argmax(-1).tolist()
    assert engine.statistics.preemptions > 0


@pytest.mark.smollm
def test_smollm_answers_as_transformers_does_alone_and_in_a_batch(smollm: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    oracle = LlamaForCausalLM(LlamaConfig(**smollm.spec.to_config())).eval()
    oracle.load_state_dict(smollm.state_dict(), strict=False)
    oracle.tie_weights()
    engine = Engine(smollm)
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompts: list[Any] = ["De hoofdstad van Nederland is", question, "import numpy as"]
    together = engine.generate(prompts, Sampling(max_tokens=12))
    for prompt, completion in zip(prompts, together, strict=True):
        ids = torch.tensor([engine.encode(prompt)])
        expected = oracle.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert completion.ids == expected[0, ids.shape[1] :].tolist()
    assert "Paris" in together[1].text
    assert together[1].finish_reason == "stop"
