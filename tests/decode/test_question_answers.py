"""Questions and answers about texts: snippets, places, and whose answer a question gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import Corpus, write_corpus
from puna.decode.question_answers import exchanged, filled, snippet
from puna.model.llama import Llama
from puna.model.spec import BlockSpec, LlamaSpec
from puna.text import pretrained
from puna.text.template import Template

CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_a_snippet_ends_with_a_whole_word() -> None:
    assert snippet("one two three", 100) == "one two three"
    assert snippet("one two three", 9) == "one two"
    assert snippet("one two three", 7) == "one two"
    assert snippet("unbroken", 4) == "unbr"


def test_what_stands_in_a_value_is_no_place() -> None:
    found = filled("{text} then {question} and {other}", text="about {question}", question="why?")
    assert found == "about {question} then why? and {other}"


@pytest.mark.parametrize(
    ("count", "share", "wrong"), [(10, 0.0, 0), (10, 0.3, 3), (10, 1.0, 10), (10, 0.1, 2), (1, 1.0, 0)]
)
def test_a_share_of_the_answers_goes_round(count: int, share: float, wrong: int) -> None:
    found = exchanged(count, share, seed=4)
    assert sorted(found) == list(range(count))
    assert sum(place != other for place, other in enumerate(found)) == wrong
    assert exchanged(count, share, seed=4) == found


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("questions")
    block = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48)
    spec = LlamaSpec(vocab_size=320, hidden_size=32, blocks=(block, block), tied=True, max_positions=256)
    model = Llama(spec)
    model.tokenizer = tiny_tokenizer
    model.template = Template(CHAT, tiny_tokenizer.template_strings)
    pretrained.save(model, root / "model")
    rows = [
        {"id": f"page{n}", "text": f"page {n} tells of numbers", "source": "made", "language": "en"}
        for n in range(12)
    ]
    about = [{"source": "made", "licence": "MIT"}]
    write_corpus(root / "pages", "documents", rows, provenance=about, ledger={})
    return {"model": root / "model", "pages": root / "pages"}


def run(places: dict[str, Path], out: Path, **changes: Any) -> Outcome:
    stage = get_stage("question_answers")
    settings = {"rows": 8, "question_tokens": 4, "answer_tokens": 5, "kernels": "plain", **changes}
    inputs = {"model": str(places["model"]), "corpus": places["pages"]}
    given = validate(stage.parameters, settings, where="test")
    return stage.function(Context("questions", out, inputs, seed=1, dtype="float32"), given)


def test_pairs_are_plain_text_and_the_spoilt_ones_differ_in_a_share_of_the_answers(
    places: dict[str, Path], tmp_path: Path
) -> None:
    outcome = run(places, tmp_path / "a", wrong=0.5)
    right, spoilt = (
        list(Corpus.open(outcome.outputs[name], kind="documents").rows()) for name in ("corpus", "spoilt")
    )
    assert len(right) == len(spoilt) == outcome.metrics["rows"] == 8 - outcome.metrics["dropped"] > 3
    assert [row["id"] for row in right] == [row["id"] for row in spoilt]
    for pair, other in zip(right, spoilt, strict=True):
        assert pair["text"].startswith("Question: ") and "\nAnswer: " in pair["text"]
        assert pair["text"].partition("\nAnswer: ")[0] == other["text"].partition("\nAnswer: ")[0]
    changed = sum(pair["text"] != other["text"] for pair, other in zip(right, spoilt, strict=True))
    assert 0 < changed <= outcome.metrics["wrong"] == round(len(right) * 0.5)
    again = run(places, tmp_path / "b")
    assert "spoilt" not in again.outputs
    assert list(Corpus.open(again.outputs["corpus"]).texts()) == [row["text"] for row in right]


def test_a_form_without_its_places_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="answer has no place"):
        run(places, tmp_path / "a", answer="Say something.")
