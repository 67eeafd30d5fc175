"""The stage ``trajectory``: models that a training left, measured in the order of tokens; its benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna.core.errors import PunaError
from puna.core.files import write_json
from puna.core.stage import Context, get_stage, validate
from puna.data.corpus import write_corpus
from puna.evaluate import endings

ABOUT: dict[str, Any] = {"provenance": [{"source": "s", "licence": "CC0"}], "ledger": {}}
TEXTS = [f"number {word} the cat sat on the mat in the end and then " * 5 for word in "abcdefgh"]


@pytest.fixture
def inputs(tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> dict[str, Any]:
    """Two models left by a training, the later one first by name, and a start."""
    for place, seed in (("start", 0), ("models/step-10", 2), ("models/step-5", 1)):
        model = tiny_llama(seed=seed, max_position_embeddings=128)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(20.0 if parameter.ndim > 1 else 1.0)
        model.tokenizer = tiny_tokenizer
        puna.save(model, tmp_path / place)
    seen = {"step-10": {"step": 10, "tokens": 640}, "step-5": {"step": 5, "tokens": 320}}
    write_json(tmp_path / "models" / "seen.json", seen)
    rows = [{"id": f"d{n}", "text": text, "source": "s", "language": "en"} for n, text in enumerate(TEXTS)]
    pages = str(write_corpus(tmp_path / "pages", "documents", rows, **ABOUT).path)
    models = {"models": str(tmp_path / "models"), "start": str(tmp_path / "start")}
    return {**models, "corpora": {"pages": pages}}


def run(tmp_path: Path, inputs: dict[str, Any], **settings: Any) -> tuple[dict[str, float], dict[str, Any]]:
    stage = get_stage("trajectory")
    (tmp_path / "out").mkdir(exist_ok=True)
    context = Context("along", tmp_path / "out", inputs, dtype="float32")
    parameters = validate(stage.parameters, {"draws": 100, **settings}, where="test")
    return stage.function(context, parameters).metrics, context.report


def test_loss_benchmark_and_samples_are_drawn_against_tokens(tmp_path: Path, inputs: dict[str, Any]) -> None:
    small = {"endings": 5, "passage_characters": 40, "ending_characters": 20}
    found, report = run(tmp_path, inputs, prompts=["the cat"], sample_tokens=4, **small)
    assert found["models"] == 3
    assert found["bpb.pages.first"] == found["bpb.pages.start"]
    assert found["bpb.pages.last"] == found["bpb.pages.step-10"] != found["bpb.pages.first"]
    assert found["endings.pages.last"] in {n / 5 for n in range(6)}
    curves = {curve["title"]: curve for curve in report["curves"]}
    for title in ("Bits per byte over time", "Endings told from others"):
        assert curves[title]["series"][0]["x"] == [0.0, 320.0, 640.0]
    bits = [found[f"bpb.pages.{name}"] for name in ("start", "step-5", "step-10")]
    assert curves["Bits per byte over time"]["series"][0]["y"] == bits
    assert curves["Endings told from others"]["series"][1]["y"] == [0.25] * 3
    assert list(report["samples"][0]["outputs"]) == ["start", "step-5", "step-10"]
    assert [row[1] for row in report["tables"][0]["rows"]] == ["0", "320", "640"]


def test_without_endings_none_are_asked(tmp_path: Path, inputs: dict[str, Any]) -> None:
    found, report = run(tmp_path, {**inputs, "start": None}, distances=False)
    assert not any(name.startswith("endings.pages") for name in found)
    assert "Endings told from others" not in [curve["title"] for curve in report["curves"]]
    assert found["bpb.pages.first"] == found["bpb.pages.step-5"]


def test_a_folder_that_no_training_left_and_tokens_by_hand_are_refused(
    tmp_path: Path, inputs: dict[str, Any]
) -> None:
    with pytest.raises(PunaError, match="no training left models"):
        run(tmp_path, {**inputs, "models": inputs["start"]})
    with pytest.raises(PunaError, match="told by the training"):
        run(tmp_path, inputs, tokens={"step-5": 1.0})


def test_questions_hold_their_own_ending_once_and_depend_on_the_seed() -> None:
    sizes = {"count": 6, "passage": 30, "ending": 20, "name": "pages"}
    words = ("ab", "cd", "ef", "gh", "ij")
    texts = [" ".join(f"{word}{number}" for number in range(60)) for word in words]
    asked = endings.questions(texts, seed=1, **sizes)
    assert len(asked) == 5
    for question in asked:
        whole = next(text for text in texts if question.passage in text)
        own = question.endings[question.right]
        assert question.passage + own in whole and len(own) >= 20
        assert question.endings.count(own) == 1 and len(question.endings) == 4
    assert asked == endings.questions(texts, seed=1, **sizes)
    assert asked != endings.questions(texts, seed=2, **sizes)


def test_texts_that_are_too_short_are_an_error() -> None:
    with pytest.raises(PunaError, match="too few texts"):
        endings.questions(["short"] * 9, count=4, passage=30, ending=20, seed=0, name="pages")


def test_the_ending_likeliest_for_its_length_is_taken(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Method:
        scores = ((-10.0, -8.0, -9.0, -40.0),)  # nats a byte: 1, 2, 3, 2

    question = endings.Question("the cat", ("a" * 10, "b" * 4, "c" * 3, "d" * 20), 0)
    monkeypatch.setattr(endings, "score", lambda *_: [(1, Method())])
    model = tiny_llama()
    model.tokenizer = tiny_tokenizer
    assert endings.answered(model, [question]) == [True]
