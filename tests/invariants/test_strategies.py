"""Every registered strategy that calls itself lossless: its texts follow the target's own law.

A new strategy is tested here by being registered. One that cannot be built without settings, or that
needs other models than "draft", adds an entry to :data:`EXAMPLES` (name to settings) or :data:`MODELS`.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from puna.decode.engine import Engine
from puna.decode.heads import Head, HeadSpec, save_head
from puna.decode.lane import Steps
from puna.decode.request import Running
from puna.decode.sampling import Sampling, make_law
from puna.decode.strategy import Strategy, all_strategies, resolve
from puna.decode.trace import TraceRow
from puna.text.template import CHATML, Template
from tests.decode.decoding_models import speaking

_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def _head(kind: str, **spec: Any) -> str:
    """The file of an untrained head of the tiny Llama's width."""
    head = Head(HeadSpec(48, **spec), seed=3, about={"kind": kind})
    return str(save_head(head, Path(_FOLDER.name) / f"{kind}.safetensors"))


EXAMPLES: dict[str, Callable[[], dict[str, Any]]] = {
    "entropy-switching": lambda: {"small": "draft", "minimum_stay": 2, "threshold": 4.0},
    "nudging": lambda: {"nudger": "draft"},
    "specdec-pp": lambda: {"head": _head("acceptance", blocks=2, ways=2)},
    "judge-decoding": lambda: {"head": _head("judge")},
    "feed-forward-skip": lambda: {"first": 0, "last": 1, "threshold": -2.0, "budget": 1, "warm_up": 2},
    "early-exit": lambda: {"exits": [1], "threshold": 0.05},
    "best-of": lambda: {"samples": 3},
    "rapid": lambda: {"begin": "the", "end": "t"},
}
"""Settings of strategies that need some; "draft" is the name of the smaller model."""
PROMPTS: dict[str, list[str]] = {"rapid": ["the cat sat", "in the end, that cat"]}
"""Prompts of strategies that do not take just any."""
MODELS: dict[str, int] = {"draft": 7}
"""Further models of the engine: name and seed of a tiny Llama."""

DRAWS = 4000
TOKENS = 3


def built(name: str) -> Strategy:
    return resolve({"name": name, **EXAMPLES.get(name, dict)()})


def lossless() -> list[str]:
    return [name for name in all_strategies() if built(name).lossless]


@pytest.fixture
def engine(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Engine:
    target = speaking(tiny_llama, tiny_tokenizer)
    target.template = Template(CHATML, tiny_tokenizer.template_strings)
    models = {}
    for name, seed in MODELS.items():
        model = speaking(tiny_llama, tiny_tokenizer)
        other = speaking(tiny_llama, tiny_tokenizer, seed=seed)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.data.mul_(0.8).add_(theirs.data, alpha=0.2)  # often of the target's mind, not always
        model.template = Template(CHATML, tiny_tokenizer.template_strings)
        models[name] = model
    return Engine(target, kernels="plain", models=models)


def exact(engine: Engine, prompt: list[int], sampling: Sampling) -> dict[tuple[int, ...], float]:
    """The probability of every text of :data:`TOKENS` tokens, by walking through all of them."""
    laws: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(TOKENS):
        grown = {}
        for text, probability in laws.items():
            with torch.no_grad():
                logits = engine.model(torch.tensor([[*prompt, *text]]))[0, -1]
            law = make_law(logits, sampling).probabilities
            for token in law.nonzero()[:, 0].tolist():
                grown[(*text, token)] = probability * float(law[token])
        laws = grown
    return laws


def chi_square_p(observed: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Probability of a chi-square at least as large, outcomes expected less than 5 times taken together."""
    assert set(observed) <= set(expected), "a text that the target would never write"
    total = sum(observed.values())
    common = [text for text, probability in expected.items() if probability * total >= 5]
    cells = [(observed[text], expected[text] * total) for text in common]
    rest = total - sum(wanted for _, wanted in cells)
    if rest > 1e-6 * total:
        cells.append((total - sum(found for found, _ in cells), rest))
    statistic = sum((found - wanted) ** 2 / wanted for found, wanted in cells)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)))


@pytest.mark.parametrize("name", lossless())
def test_a_lossless_strategy_draws_from_the_targets_law(engine: Engine, name: str) -> None:
    prompt = engine.encode("the cat")
    sampling = Sampling(max_tokens=TOKENS, temperature=0.4, top_k=4, seed=11, n=DRAWS, ignore_eos=True)
    texts = engine.generate([prompt], sampling, built(name))
    observed = Counter(tuple(text.ids) for text in texts)
    expected = exact(engine, prompt, sampling)
    assert len(observed) > 20
    assert chi_square_p(observed, expected) > 1e-3
    assert engine.statistics.blocks_used == 0


@pytest.mark.parametrize("name", lossless())
def test_a_lossless_strategy_writes_the_targets_greedy_text(engine: Engine, name: str) -> None:
    prompts = ["the cat", "in the end", "a", "that other mat"]
    for settings in ({}, {"stop": ("t",)}, {"repetition_penalty": 1.2}):
        sampling = Sampling(max_tokens=40, **settings)
        plain = engine.generate(prompts, sampling)
        found = engine.generate(prompts, sampling, built(name))
        assert [(text.ids, text.text, text.finish_reason) for text in found] == [
            (text.ids, text.text, text.finish_reason) for text in plain
        ]
        assert all(text.lossless and text.strategy == built(name).name for text in found)


@pytest.mark.parametrize("name", [*all_strategies()])
def test_every_strategy_leaves_a_trace_and_frees_what_it_held(engine: Engine, name: str) -> None:
    strategy = built(name)
    prompts = PROMPTS.get(name, ["the cat", "a"])
    for text in engine.generate(prompts, Sampling(max_tokens=12), strategy):
        assert [row.token for row in text.trace] == text.ids
        assert all(row.cost is not None and row.cost >= 0 for row in text.trace)
        assert text.lossless == strategy.lossless
    assert engine.statistics.blocks_used == 0


class Warmer:
    """Draws a little warmer than it was asked to: what the distribution test is there to find."""

    name: ClassVar[str] = "warmer"
    lossless: ClassVar[bool] = True

    def run(self, request: Running) -> Steps[None]:
        result = yield from request.lane.catch_up(request.prompt)
        while True:
            token = request.law(result.logits[-1] / 1.15).draw(request.random)
            if request.emit(token, TraceRow(token)):
                return
            result = yield from request.lane.read((token,))


def test_the_distribution_test_finds_another_law(engine: Engine) -> None:
    prompt = engine.encode("the cat")
    sampling = Sampling(max_tokens=TOKENS, temperature=0.4, top_k=4, seed=11, n=DRAWS, ignore_eos=True)
    texts = engine.generate([prompt], sampling, Warmer())
    probability = chi_square_p(Counter(tuple(text.ids) for text in texts), exact(engine, prompt, sampling))
    assert probability < 1e-4
