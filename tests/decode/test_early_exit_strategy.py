"""Early exits in the engine: which tokens leave, what they cost, and the stage that measures it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import puna
from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.data.corpus import write_corpus
from puna.decode.early_exit import weights_read
from puna.decode.engine import Engine
from puna.decode.sampling import Sampling
from puna.model.paged import BLOCK
from puna.text.template import CHATML, Template
from tests.decode.decoding_models import speaking

LAYERS = 6
PROMPTS = ["the cat", "a", "in the end, and then it went in again on the other mat"]


@pytest.fixture
def model(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    made = speaking(tiny_llama, tiny_tokenizer, num_hidden_layers=LAYERS)
    made.template = Template(CHATML, tiny_tokenizer.template_strings)
    return made


def leaving(**settings: Any) -> dict[str, Any]:
    return {"name": "early-exit", "exits": [2, 4], **settings}


def test_no_threshold_of_one_or_more_is_exceeded(model: Any) -> None:
    engine, sampling = Engine(model), Sampling(max_tokens=20, ignore_eos=True)
    whole = engine.generate(PROMPTS, sampling)
    for one, other in zip(engine.generate(PROMPTS, sampling, leaving(threshold=1.0)), whole, strict=True):
        assert one.ids == other.ids and one.text == other.text
        assert {row.source for row in one.trace} == {"target"}
        assert not one.lossless


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_where_a_token_left_and_what_it_cost_stand_in_the_trace(model: Any, quantize: Any) -> None:
    engine = Engine(model, quantize=quantize)
    sampling = Sampling(max_tokens=2 * BLOCK, ignore_eos=True)
    (one,) = engine.generate(["the cat"], sampling, leaving(thresholds=[1.0, 0.0]))
    full, left = weights_read(model.spec, LAYERS), weights_read(model.spec, 4, (2, 4))
    # A token is drawn from what reading the one before it gave; every sixteenth position climbs.
    climbed = [(one.prompt_tokens + place - 1) % BLOCK == BLOCK - 1 for place in range(1, len(one.ids))]
    assert any(climbed) and one.trace[0].source == "target" and one.trace[0].cost == 1
    for row, whole in zip(one.trace[1:], climbed, strict=True):
        assert row.source == ("target" if whole else "layer 4")
        assert row.cost == pytest.approx(1.0 if whole else left / full)


def test_weights_of_an_exit_are_its_layers_and_the_head_at_every_exit_asked(model: Any) -> None:
    spec = model.spec
    layer = spec.blocks[0].parameter_count(spec.hidden_size, spec.attention_bias, spec.mlp_bias)
    head = spec.vocab_size * spec.hidden_size
    assert weights_read(spec, LAYERS) == LAYERS * layer + head
    assert weights_read(spec, 4, (2, 4)) == 4 * layer + 2 * head
    assert weights_read(spec, 2, (2, 4)) == 2 * layer + head
    assert weights_read(spec, LAYERS, (2, 4)) == LAYERS * layer + 3 * head


def test_a_preempted_text_with_exits_goes_on_as_if_nothing_had_happened(model: Any) -> None:
    model = model.double()
    sampling = Sampling(max_tokens=40, ignore_eos=True, temperature=0.9, seed=4)
    roomy = Engine(model, kernels="plain", cache_tokens=1000)
    tight = Engine(model, kernels="plain", cache_tokens=112)
    chosen = leaving(threshold=0.02)
    wanted = roomy.generate(PROMPTS, sampling, chosen)
    found = tight.generate(PROMPTS, sampling, chosen)
    assert tight.statistics.preemptions > 0
    for one, other in zip(found, wanted, strict=True):
        assert one.ids == other.ids
        assert [row.source for row in one.trace] == [row.source for row in other.trace]
    assert any(row.source != "target" for one in found for row in one.trace)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"exits": [6]}, "at most 5"),
        ({"exits": [4, 2]}, "rise from 1"),
        ({"thresholds": [0.5]}, "each exit needs a threshold"),
        ({"exits": []}, "exits"),
        ({"treshold": 0.5}, "threshold"),
    ],
)
def test_mistakes_are_told(model: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(PunaError) as error:
        Engine(model).generate(["a"], Sampling(max_tokens=2), {**leaving(), **settings})
    assert words in str(error.value)


def test_the_stage_says_what_leaving_saves_and_what_agrees(model: Any, tmp_path: Path) -> None:
    puna.save(model, tmp_path / "model")
    rows = (
        {
            "id": str(n),
            "messages": [{"role": "user", "content": f"{PROMPTS[n % 3]} {n}"}],
            "source": "test",
            "language": "en",
        }
        for n in range(8)
    )
    provenance = [{"source": "test", "licence": "CC0"}]
    corpus = write_corpus(tmp_path / "chats", "messages", rows, provenance=provenance, ledger={})
    stage = get_stage("early_exits")
    given = {
        "exits": [2, 4],
        "thresholds": {"never": [1.0, 1.0], "soon": [1.0, 0.0]},
        "rows": 6,
        "max_tokens": 20,
        "timed_rows": 1,
        "timed_rounds": 1,
    }
    inputs = {"model": str(tmp_path / "model"), "corpus": corpus.path}
    context = Context("leaving", tmp_path / "out", inputs, dtype="float32")
    found = stage.function(context, validate(stage.parameters, given, where="test")).metrics
    assert found["same.never"] == 1 and found["agreement.never"] == 1
    assert found["layers.never"] == 1 and found["cost.never"] > 1  # the head was asked at every exit
    assert 4 / LAYERS <= found["layers.soon"] < 0.8
    assert found["left_4.soon"] > 0.85
    assert found["agreement.soon"] <= 1 and found["speed.soon"] > 0


def test_thresholds_that_do_not_fit_the_exits_are_refused() -> None:
    stage = get_stage("early_exits")
    for thresholds, words in (({"a": [0.5]}, "needs 2 numbers"), ({"whole": [0.5, 0.5]}, "stands for")):
        with pytest.raises(PunaError) as error:
            validate(stage.parameters, {"exits": [2, 4], "thresholds": thresholds}, where="test")
        assert words in str(error.value)
