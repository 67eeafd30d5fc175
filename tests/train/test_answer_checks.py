"""The stage ``answer_checks``: labels that are the answers, those of later turns too; a merged adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from little_trainings import CHAT, LORA, train

from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.data.corpus import write_corpus
from puna.text import encode
from puna.text.template import Template
from puna.train.answer_checks import labels_of
from puna.train.answer_stages import AnswerChecks

TALK = ["the cat sat", "on that mat", "and then", "it went in", "the end", "again it went"]


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Conversations of one, two and three answers, one that ends with a question."""
    rows = [
        {
            "id": f"talk{count}",
            "messages": [
                {"role": ("user", "assistant")[place % 2], "content": TALK[place]} for place in range(count)
            ],
            "source": "test",
            "language": "en",
        }
        for count in (2, 3, 4, 6)
    ]
    about = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
    return write_corpus(tmp_path / "talks", "messages", rows, **about).path


def test_every_answer_is_learnt_and_nothing_else(talks: Path, tiny_tokenizer: Any) -> None:
    template = Template(CHAT, tiny_tokenizer.template_strings)
    counts = labels_of(talks, tiny_tokenizer, template, AnswerChecks(max_length=200))
    assert counts.answers == counts.learnt == 7 and counts.later == counts.later_learnt == 3
    assert counts.outside == 0 and counts.targets > 20


def test_wrong_labels_are_found(talks: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of the last turn alone, and of the user's too: what trainers have got wrong."""
    template, settings = Template(CHAT, tiny_tokenizer.template_strings), AnswerChecks(max_length=200)
    right = encode.encode_rows

    def last_only(*given: Any, **options: Any) -> Any:
        return right(*given, **options, last_only=True)

    monkeypatch.setattr("puna.train.answer_checks.encode_rows", last_only)
    counts = labels_of(talks, tiny_tokenizer, template, settings)
    assert counts.later_learnt < counts.later and counts.learnt < counts.answers

    def everybody(*given: Any, **options: Any) -> Any:
        return right(*given, **options, train_on=("user", "assistant"))

    monkeypatch.setattr("puna.train.answer_checks.encode_rows", everybody)
    assert labels_of(talks, tiny_tokenizer, template, settings).outside > 0


def test_a_merged_model_is_compared_with_its_adapter(places: dict[str, Path], tmp_path: Path) -> None:
    outcome, _ = train(places, tmp_path / "lora", objective="sft", lora=LORA, max_length=48)
    definition = get_stage("answer_checks")
    settings = validate(definition.parameters, {"max_length": 48}, where="test")

    def checked(**inputs: Any) -> dict[str, float]:
        given = {**outcome.outputs, "corpus": places["messages"], **inputs}
        return definition.function(Context("checks", tmp_path / "checks", given), settings).metrics

    metrics = checked()
    assert metrics["merged_difference"] < 1e-5 and metrics["answers_learnt"] == 1 and metrics["outside"] == 0
    assert checked(model=places["model"])["merged_difference"] > 1e-3
    with pytest.raises(PunaError, match="not an adapter"):
        checked(adapter=places["model"])
