from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import puna
from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.data.corpus import write_corpus
from puna.evaluate import bits_per_byte
from puna.evaluate.compare import evaluate_models
from puna.evaluate.stages import Evaluate
from puna.text.template import CHATML, Template

TEXTS = [
    "the cat sat on the mat",
    "and then it went in",
    "that other cat",
    "in the end it sat on a mat",
    "on it",
]


@pytest.fixture
def models(tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> dict[str, str]:
    """Two folders: ``base`` with a chat template, ``sharp`` with larger weights and none."""
    for name, factor in (("base", 1.0), ("sharp", 4.0)):
        model = tiny_llama(tie_word_embeddings=False)
        for parameter in model.parameters():
            parameter.data.mul_(factor)
        model.tokenizer = tiny_tokenizer
        if name == "base":
            model.template = Template(CHATML, tiny_tokenizer.template_strings)
        puna.save(model, tmp_path / name)
    return {name: str(tmp_path / name) for name in ("base", "sharp")}


def corpus(folder: Path, texts: list[str]) -> str:
    rows = [{"id": f"d{n}", "text": text, "source": "s", "language": "en"} for n, text in enumerate(texts)]
    written = write_corpus(
        folder, "documents", rows, provenance=[{"source": "s", "licence": "CC0"}], ledger={}
    )
    return str(written.path)


def pairs(folder: Path) -> str:
    rows = [
        {
            "id": f"p{n}",
            "source_text": text,
            "target_text": text.upper(),
            "source": "s",
            "source_language": "en",
            "target_language": "nl",
        }
        for n, text in enumerate(TEXTS)
    ]
    provenance = [{"source": "s", "licence": "CC0"}]
    return str(write_corpus(folder, "sentence_pairs", rows, provenance=provenance, ledger={}).path)


def run(
    tmp_path: Path, inputs: dict[str, Any], **settings: Any
) -> tuple[dict[str, float], dict[str, Any], Path]:
    parameters = validate(Evaluate, {"draws": 100, **settings}, where="test")
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    context = Context("evaluate", out, inputs, dtype="float32")
    outcome = get_stage("evaluate").function(context, parameters)
    return outcome.metrics, context.report, outcome.outputs["scores"]


def test_every_model_is_measured_on_every_corpus_against_the_baseline(
    tmp_path: Path, models: dict[str, str]
) -> None:
    corpora = {"a": corpus(tmp_path / "a", TEXTS), "b": corpus(tmp_path / "b", TEXTS[:3])}
    metrics, report, scores = run(tmp_path, {"models": models, "corpora": corpora}, untouched=["b"])
    for name in ("a", "b"):
        base, sharp = metrics[f"bpb.{name}.base"], metrics[f"bpb.{name}.sharp"]
        assert metrics[f"change.{name}.sharp"] == pytest.approx(sharp / base - 1)
        assert (
            metrics[f"change.{name}.sharp.low"]
            <= metrics[f"change.{name}.sharp"]
            <= metrics[f"change.{name}.sharp.high"]
        )
        assert metrics[f"fertility.{name}.base"] == metrics[f"fertility.{name}.sharp"] > 0
        assert metrics[f"lossy.{name}.base"] == 0
        assert f"change.{name}.base" not in metrics
    assert metrics["forgetting.sharp"] == pytest.approx(metrics["change.b.sharp"])
    model = puna.load(models["sharp"])
    assert metrics["bpb.a.sharp"] == pytest.approx(bits_per_byte.measure(model, TEXTS).bits_per_byte)
    per_document = json.loads(scores.read_text())["a"]
    assert per_document["ids"] == [f"d{n}" for n in range(5)]
    assert per_document["bytes"] == [len(text) for text in TEXTS]
    total = sum(per_document["models"]["sharp"]["bits"]) / sum(per_document["bytes"])
    assert total == pytest.approx(metrics["bpb.a.sharp"], rel=1e-3)
    before_after, forgetting = report["tables"]
    assert [row[:2] for row in before_after["rows"]] == [
        ["a", "base"],
        ["a", "sharp"],
        ["b", "base"],
        ["b", "sharp"],
    ]
    assert all(len(row) == len(before_after["columns"]) for row in before_after["rows"])
    assert forgetting["title"] == "Forgetting"
    assert json.loads(json.dumps(report)) == report


def test_the_baseline_and_further_pairs_can_be_named(tmp_path: Path, models: dict[str, str]) -> None:
    three = {**models, "again": models["sharp"]}
    inputs = {"models": three, "corpora": {"a": corpus(tmp_path / "a", TEXTS)}}
    metrics, report, _ = run(tmp_path, inputs, baseline="sharp", compare=[["again", "base"]])
    assert metrics["change.a.again"] == metrics["change.a.again.low"] == metrics["change.a.again.high"] == 0
    assert metrics["better.a.again"] == 0
    assert metrics["sign_p.a.again"] == 1
    assert metrics["change.a.again.vs.base"] == pytest.approx(
        metrics["bpb.a.again"] / metrics["bpb.a.base"] - 1
    )
    assert "change.a.sharp" not in metrics
    assert "Further comparisons" in [table["title"] for table in report["tables"]]


def test_samples_are_answered_by_every_model_that_can(tmp_path: Path, models: dict[str, str]) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    _, report, _ = run(tmp_path, {"models": models}, prompts={"en": ["the cat", messages]}, sample_tokens=5)
    plain, chat = report["samples"]
    assert (plain["label"], plain["prompt"], chat["prompt"]) == ("en", "the cat", "user: the cat")
    assert set(plain["outputs"]) == {"base", "sharp"}
    assert chat["outputs"]["sharp"] == "(this model has no chat template)"
    assert chat["outputs"]["base"] != "(this model has no chat template)"
    assert report["tables"] == []


def test_sentence_pairs_are_translated_and_scored(tmp_path: Path, models: dict[str, str]) -> None:
    inputs = {"models": models, "corpora": {"pairs": pairs(tmp_path / "pairs")}}
    settings = {"format": "{source_text} =", "chat": False, "rows": 3, "max_tokens": 4}
    metrics, report, _ = run(tmp_path, inputs, translation=settings)
    for name in ("chrf", "bleu"):
        assert 0 <= metrics[f"{name}.pairs.base"] <= 100
        assert metrics[f"{name}_gain.pairs.sharp"] == pytest.approx(
            metrics[f"{name}.pairs.sharp"] - metrics[f"{name}.pairs.base"]
        )
    (table,) = report["tables"]
    assert "sacrebleu" in table["note"]
    assert len(report["samples"]) == 3
    assert report["samples"][0]["prompt"].endswith(" =")
    with pytest.raises(PunaError, match="nothing says how to translate"):
        run(tmp_path, inputs)


def test_forgetting_is_measured_on_documents_alone(tmp_path: Path, models: dict[str, str]) -> None:
    corpora = {"a": corpus(tmp_path / "a", TEXTS), "pairs": pairs(tmp_path / "pairs")}
    with pytest.raises(PunaError, match="corpus 'pairs' cannot show what was forgotten"):
        run(tmp_path, {"models": models, "corpora": corpora}, translation={}, untouched=["a", "pairs"])


def test_limits_draw_documents_by_seed_and_never_by_model(tmp_path: Path, models: dict[str, str]) -> None:
    path = corpus(tmp_path / "a", [f"{text} {n}" for n in range(8) for text in TEXTS])

    def drawn(seed: int, **limits: Any) -> list[str]:
        settings = Evaluate(draws=100, **limits)
        result = evaluate_models({"base": models["base"]}, {"a": path}, settings, seed=seed, dtype="float32")
        documents = result.documents["a"]
        assert documents.of == 40
        assert documents.ids == sorted(documents.ids, key=lambda name: int(name[1:]))
        return documents.texts

    assert len(drawn(0, max_documents=7)) == 7
    assert drawn(0, max_documents=7) == drawn(0, max_documents=7)
    assert drawn(0, max_documents=7) != drawn(1, max_documents=7)
    assert 0 < sum(len(text) for text in drawn(0, max_bytes=200)) <= 200
    assert len(drawn(0, max_bytes=1)) == 1  # one document at least
    assert len(drawn(0, max_bytes=None, max_documents=None)) == 40


def test_one_document_gives_a_figure_and_no_interval(tmp_path: Path, models: dict[str, str]) -> None:
    inputs = {"models": models, "corpora": {"a": corpus(tmp_path / "a", TEXTS[:1])}}
    metrics, report, _ = run(tmp_path, inputs)
    assert "bpb.a.base.low" not in metrics
    assert not any(math.isnan(value) for value in metrics.values())
    assert "low" not in report["intervals"][0]["rows"][1]["change"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baseline": "bse"}, "did you mean 'base'"),
        ({"compare": [["base", "nobody"]]}, "unknown model 'nobody'"),
        ({"untouched": ["x"]}, "unknown corpus 'x'"),
        ({"prompts": ["a", ""]}, "a prompt is empty"),
        ({"prompts": [[{"role": "user"}]]}, "exactly the keys role and content"),
        ({"draws": 1}, "draws"),
        ({"translation": {"format": "hello"}}, "no place for the source"),
    ],
)
def test_mistakes_get_one_clear_message(
    tmp_path: Path, models: dict[str, str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(PunaError, match=message):
        run(tmp_path, {"models": models, "corpora": {"a": corpus(tmp_path / "a", TEXTS)}}, **settings)


def test_there_must_be_something_to_evaluate(tmp_path: Path, models: dict[str, str]) -> None:
    with pytest.raises(PunaError, match="nothing to evaluate on"):
        run(tmp_path, {"models": models})
    folder = tmp_path / "chats"
    row = {"id": "1", "messages": [{"role": "user", "content": "a"}], "source": "s", "language": "en"}
    write_corpus(folder, "messages", [row], provenance=[{"source": "s", "licence": "CC0"}], ledger={})
    with pytest.raises(PunaError, match="cannot be measured"):
        run(tmp_path, {"models": models, "corpora": {"chats": str(folder)}})


def test_the_plan_counts_what_all_models_read_and_write(tiny_llama: Callable[..., Any]) -> None:
    class Device:
        def seconds(self, flops: float, dtype: str) -> float:
            return flops / 1e9

        def read_seconds(self, size: float) -> float:
            return size / 1e9

    spec = tiny_llama().spec
    shapes = SimpleNamespace(
        models={"models.a": spec, "models.b": spec},
        corpora={"corpora.nl": 1000.0, "corpora.en": 50.0},
        device=Device(),
        dtype="float32",
        kinds={"corpora.nl": "documents"},
    )

    plan = get_stage("evaluate").plan
    assert plan is not None
    bare = plan(Evaluate(max_bytes=300), shapes)
    assert bare.tokens == 2 * (100 + 50)  # three bytes a token; the smaller corpus whole
    sampled = plan(Evaluate(max_bytes=300, prompts={"": ["a", "b"]}, sample_tokens=8), shapes)
    assert sampled.tokens == bare.tokens + 2 * 2 * 8
    assert sampled.flops > bare.flops > 0
    assert sampled.seconds > bare.seconds > 0
    translated = plan(Evaluate(max_bytes=300, translation={"rows": 5, "max_tokens": 10}), shapes)
    assert translated.tokens == bare.tokens + 2 * 5 * 10
    shapes.corpora |= {"corpora.a": 500.0, "corpora.b": 500.0}
    shapes.kinds |= {"corpora.a": "sentence_pairs", "corpora.b": "sentence_pairs"}
    twice = plan(Evaluate(max_bytes=300, translation={"rows": 5, "max_tokens": 10}), shapes)
    assert twice.tokens == bare.tokens + 2 * 2 * 5 * 10  # and nothing of them is read as documents
    assert bare.memory > spec.parameter_count() * 4
