"""Planted facts: they stand in the text, the question is about one of them, and its answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import Corpus, write_corpus


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    rows = (
        {"id": f"d{n}", "text": f"Line one of {n}.\nLine two of {n}.", "source": "test", "language": "en"}
        for n in range(60)
    )
    about = [{"source": "test", "licence": "CC0"}]
    return write_corpus(tmp_path / "documents", "documents", rows, provenance=about, ledger={}).path


def plant(documents: Path, out: Path, *, seed: int = 0, **parameters: Any) -> Outcome:
    stage = get_stage("planted")
    settings = validate(stage.parameters, {"rows": 5, "characters": 120, **parameters}, where="test")
    return stage.function(Context("planted", out, {"corpus": documents}, seed=seed), settings)


def rows_of(outcome: Outcome) -> list[dict[str, Any]]:
    return list(Corpus.open(outcome.outputs["corpus"]).rows())


def test_the_answer_stands_in_the_text_as_a_fact_of_the_name_that_is_asked_for(
    documents: Path, tmp_path: Path
) -> None:
    rows = rows_of(plant(documents, tmp_path / "out", facts=3, begin="<Context>", end="</Context>"))
    assert len(rows) == 5
    for row in rows:
        asked, answered = (message["content"] for message in row["messages"])
        text, _, question = asked.removeprefix("<Context>").partition("</Context>")
        name = question.removeprefix("What is the access code of the ").removesuffix("?")
        assert f"\n{answered}\n" in text and f"the {name} is" in answered
        facts = [line for line in text.splitlines() if line.startswith("The access code")]
        assert len(facts) == 3 == len({fact.split(" is ")[0] for fact in facts})
        rest = [line for line in text.splitlines() if not line.startswith("The access code")]
        assert len("\n".join(rest)) <= 120 + 6  # two line ends around each fact


def test_a_document_serves_once_and_the_counts_add_up(documents: Path, tmp_path: Path) -> None:
    outcome = plant(documents, tmp_path / "out", begin="", end="\n\n")
    texts = [row["messages"][0]["content"] for row in rows_of(outcome)]
    numbers = [number for text in texts for number in range(60) if f"Line one of {number}." in text]
    assert len(numbers) == len(set(numbers))
    tally = Corpus.open(outcome.outputs["corpus"]).meta["ledger"]["documents"]
    assert tally["read"] == 60 == tally["kept"] + tally["dropped"]["not needed"]
    assert outcome.metrics["rows"] == 5


def test_the_seed_decides(documents: Path, tmp_path: Path) -> None:
    made = [rows_of(plant(documents, tmp_path / f"{n}", seed=seed)) for n, seed in enumerate((0, 0, 1))]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"rows": 50}, "too little text"),
        ({"facts": 3, "names": ["a", "b"]}, "facts need as many names"),
        ({"fact": "The code of {name}."}, "fact needs {name} and {number}"),
        ({"question": "Is it {number}, {name}?"}, "question needs {name}"),
        ({"answer": "I do not know."}, "answer needs {number}"),
        ({"answer": "{number} {else}"}, "answer needs {number}"),
    ],
)
def test_what_cannot_be_planted_is_told(
    documents: Path, tmp_path: Path, parameters: dict[str, Any], said: str
) -> None:
    with pytest.raises(PunaError) as error:
        plant(documents, tmp_path / "out", **parameters)
    assert said in str(error.value)
