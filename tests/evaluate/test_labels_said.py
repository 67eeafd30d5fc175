"""What a labeller says of a corpus, the stage ``label_scores``, and the checks of claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import write_corpus
from puna.data.next_word import NextWordParameters, next_word_rows
from puna.evaluate.label_scores import UNSAID
from puna.evaluate.labelling import Labelled, predictions
from puna.model.labels import LabelKind, add_label_head
from puna.model.llama import Llama
from puna.model.spec import BlockSpec, LlamaSpec
from puna.model.unmasking import unmask
from puna.text import pretrained
from puna.text.template import Template

CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ABOUT: dict[str, Any] = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}


def model(tokenizer: Any, kind: LabelKind | None, pattern: str = "0") -> Any:
    block = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48)
    made = Llama(
        LlamaSpec(320, 32, (block,) * 4, tied=True, max_positions=256), generator=torch_generator(3, "x")
    )
    made.tokenizer, made.template = tokenizer, Template(CHAT, tokenizer.template_strings)
    if kind is not None:
        add_label_head(made, kind, seed=0)
    unmask(made, pattern)
    return made.eval()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("label-scores")
    words = next_word_rows(NextWordParameters(rows=12), "train", 0)
    write_corpus(root / "words", "labelled_words", words, **ABOUT)
    texts = (
        {
            "id": f"{n}",
            "text": "so " * (n + 1),
            "label": ("bad", "good")[n % 3 > 0],
            "source": "t",
            "language": "en",
        }
        for n in range(12)
    )
    write_corpus(root / "texts", "labelled_texts", texts, **ABOUT)
    kinds = {"text": LabelKind(("bad", "good")), "word": LabelKind(("B-MARK", "O"), per="word", bias=True)}
    for name, kind in kinds.items():
        pretrained.save(model(tiny_tokenizer, kind), root / name)
    pretrained.save(model(tiny_tokenizer, kinds["word"], "01"), root / "ahead")
    pretrained.save(model(tiny_tokenizer, None), root / "language")
    return {name: root / name for name in ("words", "texts", "text", "word", "ahead", "language")}


def run(stage_name: str, inputs: dict[str, Any], **parameters: Any) -> tuple[Outcome, Context]:
    stage = get_stage(stage_name)
    context = Context(stage_name, Path("unused"), inputs, dtype="float32")
    return stage.function(context, validate(stage.parameters, parameters, where="test")), context


def test_what_is_said_of_a_row_does_not_depend_on_the_rows_beside_it(places: dict[str, Path]) -> None:
    for name, corpus in (("word", "words"), ("ahead", "words"), ("text", "texts")):
        labelled = Labelled.read(places[corpus])
        opened = pretrained.load(places[name])
        together = predictions(opened, labelled, batch_tokens=4096)
        assert together == predictions(opened, labelled, batch_tokens=1)
        assert [len(row) for row in together] == [len(row) for row in labelled.true]
        assert {label for row in together for label in row} <= set(opened.labels.names)  # type: ignore[union-attr]


def test_words_beyond_the_length_are_said_to_be_unsaid(places: dict[str, Path]) -> None:
    labelled = Labelled.read(places["words"])
    said = predictions(pretrained.load(places["word"]), labelled, max_length=5)
    assert all(row[0] != UNSAID for row in said) and all(row[-1] == UNSAID for row in said)


def test_scores_stand_beside_the_majority_and_a_model_that_was_only_asked(places: dict[str, Path]) -> None:
    inputs = {"models": {"own": places["text"]}, "corpus": places["texts"], "train": places["texts"]}
    outcome, context = run(
        "label_scores", {**inputs, "language_model": str(places["language"])}, zero_shot={"rows": 6}
    )
    assert outcome.metrics["accuracy.majority"] == pytest.approx(8 / 12)
    assert 0 <= outcome.metrics["accuracy.zero_shot"] <= 1 and "macro_f1.own" in outcome.metrics
    assert [row[0] for row in context.report["tables"][0]["rows"]] == ["own", "majority", "zero_shot"]
    with pytest.raises(PunaError, match="how shall the language model be asked"):
        run("label_scores", {**inputs, "language_model": str(places["language"])})
    words = {"models": {"own": places["word"]}, "corpus": places["words"]}
    assert "entity_f1.own" in run("label_scores", words, rows=5)[0].metrics
    with pytest.raises(PunaError, match="labels something else"):
        run("label_scores", {"models": {"own": places["word"]}, "corpus": places["texts"]})


def test_a_labeller_has_no_bits_per_byte(places: dict[str, Path]) -> None:
    """Its decoder's embedding would be taken for a head, whatever head it was trained without."""
    from puna.evaluate.bits_per_byte import measure

    with pytest.raises(PunaError, match=r"bits per byte needs a language model[^~]*2 labels"):
        measure(pretrained.load(places["text"]), ["the cat"])


def test_checks_tell_who_looks_ahead_and_what_transformers_computes(places: dict[str, Path]) -> None:
    models = {"causal": places["word"], "ahead": places["ahead"]}
    found = run("label_checks", {"models": models, "corpus": places["words"]}, rows=4)[0].metrics
    assert found["transformers.causal"] < 1e-5 and "transformers.ahead" not in found
    assert found["first_moves.causal"] == 0 < found["first_moves.ahead"]
    assert found["later_seen.causal"] == 0 and found["later_seen.ahead"] == 1
    for name in models:
        assert found[f"patterns_wrong.{name}"] == 0 == found[f"zeros_differ.{name}"]
        assert found[f"batched.{name}"] < 1e-4 and found[f"patterns_batched.{name}"] < 1e-4
    texts = run("label_checks", {"models": {"own": places["text"]}, "corpus": places["texts"]}, rows=6)[0]
    assert texts.metrics["transformers.own"] < 1e-5
