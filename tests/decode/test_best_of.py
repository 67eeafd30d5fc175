"""Choosing among samples: scores, thresholds, annealing, pruning, and answers that go on undisturbed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from puna.core.errors import PunaError
from puna.decode.best_of import BestOf, BestOfSettings, annealed
from puna.decode.engine import Completion, Engine
from puna.decode.sampling import Sampling
from puna.decode.self_evaluation import (
    QUESTION,
    SelfEvaluation,
    judged,
    score_of,
    suffix_of,
    verdict_ids,
    wins_or_ties,
)
from puna.text.encode import encode_messages, encode_prompt
from puna.text.template import CHATML, Template
from puna.text.tokenizer import Tokenizer
from tests.decode.decoding_models import speaking
from tests.text.text_samples import CONFIG, train_core

PROMPTS = ["the cat sat", "in the end", "a mat"]
SAMPLING = Sampling(max_tokens=14, temperature=1.0, seed=3)


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    tokenizer = Tokenizer(train_core(), CONFIG)
    made = speaking(tiny_llama, tokenizer, vocab_size=tokenizer.vocab_size)
    made.template = Template(CHATML, tokenizer.template_strings)
    return made


def chosen(
    model: Any, sampling: Sampling = SAMPLING, **settings: Any
) -> tuple[list[Completion], BestOf, Engine]:
    engine = Engine(model, kernels="plain")
    strategy = BestOf(BestOfSettings(**settings))
    return engine.generate(PROMPTS, sampling, strategy), strategy, engine


def fresh_score(model: Any, ids: list[int]) -> float:
    """The score of a text by one forward pass from nothing."""
    yes, no = verdict_ids(model)
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *suffix_of(model)]]))[0, -1]
    return score_of(logits, yes, no)


def without_stop(model: Any, completion: Completion) -> list[int]:
    return [token for token in completion.ids if token not in model.tokenizer.stop_ids]


def test_the_score_is_the_share_of_no_among_yes_and_no() -> None:
    logits = torch.tensor([9.0, math.log(3), 0.0])  # whatever else is likely
    assert score_of(logits, yes=2, no=1) == pytest.approx(0.75)
    assert score_of(logits, yes=1, no=2) == pytest.approx(0.25)


def test_the_question_stands_behind_an_answer_as_in_training(model: Any) -> None:
    asked = [{"role": "user", "content": "a cat?"}]
    row = judged(asked, "the mat", True)
    trained = encode_messages(model.tokenizer, model.template, row, first=3)
    prompt = encode_prompt(model.tokenizer, model.template, asked)
    answer = model.tokenizer.encode_continuation("the mat")
    yes, _ = verdict_ids(model)
    before = [*prompt, *answer, *suffix_of(model)]
    assert trained.ids[: len(before) + 1] == [*before, yes]
    assert trained.trained.index(True) == len(before)


def test_ties_count_as_no_reason_to_start_over() -> None:
    assert wins_or_ties(0.5, 0.5)
    assert wins_or_ties(0.45, 0.5, epsilon=0.1)
    assert not wins_or_ties(0.4, 0.5)
    assert judged([], "x", wins_or_ties(1, 1) is False)[-1] == {"role": "assistant", "content": "No"}
    assert judged([], "x", True)[-2:] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "Yes"},
    ]


def test_at_threshold_0_one_sample_is_drawn_and_above_1_all_are(model: Any) -> None:
    first, one, _ = chosen(model, threshold=0.0, samples=5)
    assert one.drawn == [1, 1, 1]
    greedy = Engine(model, kernels="plain").generate(PROMPTS, Sampling(max_tokens=14))
    assert [completion.ids for completion in first] == [completion.ids for completion in greedy]
    assert chosen(model, threshold=1.1, samples=5)[1].drawn == [5, 5, 5]


def test_all_at_once_and_one_by_one_choose_the_same(model: Any) -> None:
    together, drawn, _ = chosen(model, samples=5)
    one_by_one, _, _ = chosen(model, samples=5, threshold=1.1)
    assert [completion.ids for completion in together] == [completion.ids for completion in one_by_one]
    assert drawn.drawn == [5, 5, 5]
    assert not any(completion.lossless for completion in together)


def test_the_best_score_is_chosen_and_adaptive_drawing_ends_at_the_first_that_passes(model: Any) -> None:
    engine = Engine(model, kernels="plain")
    found: list[list[float]] = []
    for count in range(1, 6):
        best, _, _ = chosen(model, samples=count, anneal=False)
        found.append(
            [
                fresh_score(model, [*engine.encode(prompt), *without_stop(model, completion)])
                for prompt, completion in zip(PROMPTS, best, strict=True)
            ]
        )
    for scores in zip(*found, strict=True):
        assert list(scores) == sorted(scores)  # of more samples the best is no worse
    assert sum(len(set(scores)) for scores in zip(*found, strict=True)) > len(PROMPTS)
    middle = sorted(scores[-1] for scores in zip(*found, strict=True))[1] - 1e-6
    _, adaptive, _ = chosen(model, samples=5, anneal=False, threshold=middle)
    expected = [
        next((count for count, score in enumerate(scores, 1) if score >= middle), 5)
        for scores in zip(*found, strict=True)
    ]
    assert sorted(adaptive.drawn) == sorted(expected)


def test_annealing_begins_greedily_and_approaches_the_requests_temperature() -> None:
    assert [annealed(0.8, place) for place in range(4)] == pytest.approx([0.0, 0.4, 0.6, 0.7])


def test_scoring_in_the_middle_changes_nothing_and_reads_the_question_alone(model: Any) -> None:
    undisturbed, _, plain = chosen(model, samples=4)
    scored, strategy, engine = chosen(model, samples=4, prune_at=5, prune_keep=1.0)
    assert [completion.ids for completion in scored] == [completion.ids for completion in undisturbed]
    assert strategy.judged_midway > 0
    more = engine.statistics.tokens_read - plain.statistics.tokens_read
    assert more == strategy.judged_midway * len(suffix_of(model))


def test_pruning_gives_the_worst_samples_up(model: Any) -> None:
    long = Sampling(max_tokens=100, temperature=1.0, seed=3, ignore_eos=True)
    whole, _, plain = chosen(model, long, samples=6)
    pruned, strategy, engine = chosen(model, long, samples=6, prune_at=4, prune_keep=0.34)
    saved = plain.statistics.tokens_read - engine.statistics.tokens_read
    assert saved > 0
    assert strategy.drawn == [6, 6, 6]
    assert len(pruned) == len(whole)
    # With 2% kept one sample is, the best at four tokens.
    (best,) = Engine(model, kernels="plain").generate(
        PROMPTS[:1], SAMPLING, {"name": "best-of", "samples": 6, "prune_at": 4, "prune_keep": 0.02}
    )
    prompt = Engine(model, kernels="plain").encode(PROMPTS[0])
    options = []
    for place in range(6):
        (one,) = Engine(model, kernels="plain").generate(
            PROMPTS[:1], SAMPLING, BestOf(BestOfSettings(samples=place + 1, threshold=2.0))
        )
        options.append(one.ids)
    kept = fresh_score(model, [*prompt, *best.ids[:4]])
    assert kept == pytest.approx(max(fresh_score(model, [*prompt, *ids[:4]]) for ids in [*options, best.ids]))


def test_everything_drawn_is_paid_for_and_freed(model: Any) -> None:
    (plain,) = Engine(model, kernels="plain").generate(PROMPTS[:1], SAMPLING)
    found, _, engine = chosen(model, samples=4)
    for completion in found:
        cost = sum(row.cost or 0 for row in completion.trace)
        assert cost > 2 * sum(row.cost or 0 for row in plain.trace) * len(completion.ids) / len(plain.ids)
    assert engine.statistics.blocks_used == 0


def test_stop_strings_and_log_probabilities_are_those_of_the_chosen_sample(model: Any) -> None:
    sampling = Sampling(max_tokens=20, temperature=1.0, seed=1, stop=["t"], logprobs=True)
    found, _, _ = chosen(model, sampling, samples=4)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert "t" not in completion.text
        ids = [*Engine(model, kernels="plain").encode(prompt), *completion.ids]
        with torch.no_grad():
            logs = model(torch.tensor([ids]))[0].log_softmax(-1)
        start = len(ids) - len(completion.ids)
        fresh = [float(logs[start + place - 1, token]) for place, token in enumerate(completion.ids)]
        assert completion.logprobs == pytest.approx(fresh, abs=1e-4)


def test_settings_that_exclude_each_other_and_a_full_context_are_refused(model: Any) -> None:
    with pytest.raises(PunaError, match="one by one, or pruned"):
        Engine(model, kernels="plain").generate(
            ["a"], SAMPLING, {"name": "best-of", "threshold": 0.5, "prune_at": 3}
        )
    with pytest.raises(PunaError, match="prune_keep means nothing"):
        Engine(model, kernels="plain").generate(["a"], SAMPLING, {"name": "best-of", "prune_keep": 0.3})
    with pytest.raises(PunaError, match="no room for the question"):
        chosen(model, Sampling(max_tokens=255, temperature=1.0))
    model.template = None
    with pytest.raises(PunaError, match="chat template"):
        chosen(model)


def test_a_scorer_leaves_the_lane_as_it_was(model: Any) -> None:
    from puna.decode.lane import Forward, Lane
    from puna.model.steppers import make_stepper

    stepper = make_stepper(model, cache_tokens=256, kernels="plain")
    lane = Lane(stepper)
    ids = model.tokenizer.encode("the cat sat")
    read: list[Forward] = []

    class Answer:
        logits = torch.zeros(1, model.spec.vocab_size)

    lane.ids.extend(ids)
    steps = SelfEvaluation.of(model).score(lane, ids)
    read.append(next(steps))  # type: ignore[arg-type]
    with pytest.raises(StopIteration) as end:
        steps.send(Answer())
    assert end.value.value == 0.5
    assert [forward.ids for forward in read] == [suffix_of(model)]
    assert lane.ids == ids
