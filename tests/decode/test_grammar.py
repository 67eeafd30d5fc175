"""Output that has to fit: whatever a random model would say, the text does."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from puna.core.errors import PunaError
from puna.decode.engine import Engine
from puna.decode.grammar import Constraint
from puna.decode.sampling import Sampling, make_law
from tests.decode.decoding_models import speaking

SCHEMA = {
    "type": "object",
    "properties": {
        "cat": {"enum": ["the", "other"]},
        "mats": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["cat", "mats"],
    "additionalProperties": False,
}


@pytest.fixture
def model(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    return speaking(tiny_llama, tiny_tokenizer)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 40, "top_p": 0.95}]
)
def test_json_fits_its_schema(model: Any, settings: dict[str, Any]) -> None:
    engine = Engine(model, kernels="plain")
    sampling = Sampling(max_tokens=150, json_schema=SCHEMA, seed=3, **settings)
    for completion in engine.generate(["the cat", "a", "that mat"], sampling):
        assert completion.finish_reason == "stop"
        value = json.loads(completion.text)
        assert set(value) == {"cat", "mats"}
        assert value["cat"] in ("the", "other")
        assert 0 <= value["mats"] <= 99


def test_text_fits_a_regular_expression(model: Any) -> None:
    sampling = Sampling(max_tokens=60, regex=r"(cat|mat){2,3}; [0-9]{4}", temperature=1.0, n=4)
    for completion in Engine(model, kernels="plain").generate(["the"], sampling):
        assert re.fullmatch(r"(cat|mat){2,3}; [0-9]{4}", completion.text)
        assert completion.finish_reason == "stop"


def test_a_mask_follows_the_text_wherever_it_goes_back_to(tiny_tokenizer: Any) -> None:
    constraint = Constraint(tiny_tokenizer, 320, regex="ab(cd|ce)*f")
    (a, b, c, d, e, f) = (tiny_tokenizer.encode(letter)[0] for letter in "abcdef")

    def allowed(*ids: int) -> set[int]:
        mask = constraint.mask(ids)
        assert mask is not None
        return set(mask.nonzero()[:, 0].tolist())

    assert a in allowed()
    assert allowed(a, b) == {c, f}
    assert allowed(a, b, c) == {d, e}
    assert allowed(a, b, c, e, c, d) == {c, f}
    assert allowed(a, b, c) == {d, e}
    assert constraint.mask([a, b, d]) is None  # a proposal that does not fit
    assert allowed(a, b) == {c, f}
    assert allowed(a, b, f) == set(tiny_tokenizer.stop_ids)


def test_a_law_knows_only_what_is_allowed() -> None:
    logits = torch.randn(400, generator=torch.Generator().manual_seed(0))
    masked = torch.full_like(logits, -torch.inf)
    masked[[5, 9]] = logits[[5, 9]]
    for settings in ({}, {"top_k": 50}, {"top_p": 0.999999}, {"min_p": 1e-9}):
        law = make_law(masked, Sampling(temperature=1.0, **settings))
        assert law.probabilities.nonzero()[:, 0].tolist() == [5, 9]
        assert float(law.probabilities.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regex": "(ab"}, "'regex' cannot be followed"),
        ({"json_schema": {"type": "nosuch"}}, "'json_schema' cannot be followed"),
        ({"json_schema": "{"}, "'json_schema' cannot be followed"),
    ],
)
def test_what_cannot_be_followed_is_told(model: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PunaError, match=message):
        Engine(model, kernels="plain").generate(["a"], Sampling(**settings))


@pytest.mark.parametrize("other", [{"json_schema": {}}, {"ignore_eos": True}])
def test_settings_that_contradict_each_other_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(PunaError, match="out of range"):
        Sampling(regex="a", **other)


def test_without_the_library_it_is_named(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(PunaError, match=r"puna\[serve\]"):
        Engine(model, kernels="plain").generate(["a"], Sampling(regex="a"))
