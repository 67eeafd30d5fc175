"""Presets of Data-Juicer and Setu: each threshold once more, both sides of each, and pages around some."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy
import pytest

from puna.core.errors import PunaError
from puna.data.corpus import write_corpus
from puna.data.curate.curation import Curation
from puna.data.curate.execute import execute
from puna.data.curate.gates import passes
from puna.data.curate.pipeline import load_pipeline, preset_names
from puna.data.curate.settings import CurateParameters
from puna.data.curate.texts import Texts
from puna.data.curate.tune import as_yaml, tuned_gates

# Per gate: the least and the most that passes, both inclusive, as the released recipes have them; what a
# recipe leaves out is the operator's own default, 10 for lengths and counts.
RECIPES: dict[str, dict[str, tuple[float | None, float | None]]] = {
    "data-juicer-refine-cc": {
        "letters and digits": (0.7508, 0.8591),
        "mean line": (10, 1500),
        "repeated characters": (None, 0.3),
        "flagged words": (None, 0.0015),
        "language": (0.793, None),
        "longest line": (10, 5000),
        "special characters": (0.15, 0.35),
        "length": (10, 58187),
        "words": (20, 11529),
        "repeated words": (None, 0.2962),
    },
    "data-juicer-refine-c4": {
        "letters and digits": (0.65, 0.9),
        "mean line": (10, 3000),
        "repeated characters": (None, 0.3),
        "language": (0.6, None),
        "longest line": (10, 4000),
        "special characters": (None, 0.4),
        "words": (20, 10000),
        "repeated words": (None, 0.231),
    },
    "data-juicer-refine-wiki": {
        "letters and digits": (0.6, 0.884),
        "mean line": (10, 192),
        "repeated characters": (None, 0.4),
        "flagged words": (None, 0.0019),
        "language": (0.689, None),
        "longest line": (10, 1630),
        "special characters": (None, 0.5),
        "length": (10, 18221),
        "words": (20, 6086),
        "repeated words": (None, 0.3),
    },
    "data-juicer-refine-book": {
        "letters and digits": (0.55, 0.854),
        "mean line": (10, 500),
        "repeated characters": (None, 0.2),
        "flagged words": (None, 0.00047),
        "language": (0.2, None),
        "longest line": (10, 13381),
        "special characters": (None, 0.5),
        "words": (1000, 539754),
        "repeated words": (None, 0.194),
    },
    "data-juicer-refine-arxiv": {
        "letters and digits": (0.516, 0.915),
        "mean line": (10, 682),
        "repeated characters": (None, 0.3),
        "flagged words": (None, 0.00076),
        "longest line": (10, 4000),
        "special characters": (None, 0.6),
        "length": (10, 350000),
        "words": (20, 100000),
        "repeated words": (None, 0.574),
    },
    "data-juicer-refine-stackexchange": {
        "letters and digits": (0.35, 0.943),
        "mean line": (20, 400),
        "repeated characters": (None, 0.4),
        "flagged words": (None, 0.01),
        "language": (0.1, None),
        "longest line": (80, None),
        "special characters": (0.232, 0.7),
        "length": (200, None),
        "words": (100, None),
        "repeated words": (None, 0.8),
    },
    "data-juicer-sft": {
        "letters and digits": (0.1, None),
        "repeated characters": (None, 0.6),
        "flagged words": (None, 0.017),
        "longest line": (20, None),
        "length": (30, None),
    },
}


@pytest.mark.parametrize("preset", RECIPES)
def test_bounds_are_the_recipes_from_both_sides(preset):
    gates = {gate.name: gate for gate in load_pipeline(preset).gates()}
    duplicates = {"near duplicates", "duplicates"} & set(gates)
    assert set(gates) - duplicates == set(RECIPES[preset])
    for name, (least, most) in RECIPES[preset].items():
        for limit, out in ((least, -math.inf), (most, math.inf)):
            values = numpy.array([limit, math.nextafter(limit or 0, out)], dtype=float)
            if limit is not None:
                passing = passes(gates[name], {gates[name].signal: values}, ["", ""])
                assert passing.tolist() == [True, False], name
    for name in duplicates:
        values = numpy.array([0.0, 1.0, numpy.nan])
        passing = passes(gates[name], {gates[name].signal: values}, [""] * 3)
        assert passing.tolist() == [True, False, True]


LANGUAGES = ["as", "bn", "brx", "doi", "en", "gu", "hi", "kn", "ks", "kok", "mai", "ml", "mni", "mr"]
LANGUAGES += ["ne", "or", "pa", "sa", "sat", "sd", "ta", "te", "ur"]
# What is flagged: lines and words up to a number, shares from a number on; both inclusive.
FLAGS = {
    "few lines": ("up to", 4, {"as": 3, "brx": 3, "gu": 3}),
    "short lines": ("up to", 5, {"gu": 4}),
    "other scripts": ("from", 0.05, {"as": 0.03, "brx": 0.06, "gu": 0.06}),
    "repeated words": ("from", 0.4, {"hi": 0.5, "kn": 0.5, "gu": 0.3}),
    "repeated characters": ("from", 0.2, {"as": 0.1}),
}


@pytest.mark.parametrize("preset", ["setu", "setu-flags", "setu-ocr"])
def test_limits_of_languages_from_both_sides(preset):
    gates = {gate.name: gate for gate in load_pipeline(preset).gates()}
    for name, (side, general, own) in FLAGS.items():
        if preset == "setu-ocr" and name.startswith("repeated"):
            assert name not in gates
            continue
        for language in LANGUAGES:
            limit = own.get(language, general)
            values = numpy.array([math.nextafter(limit, -math.inf), limit, math.nextafter(limit, math.inf)])
            expected = [False, False, True] if side == "up to" else [True, False, False]
            passing = passes(gates[name], {gates[name].signal: values}, [language] * 3)
            assert passing.tolist() == expected, (name, language)


def test_symbols_and_unsure_script_from_both_sides():
    gates = {gate.name: gate for gate in load_pipeline("setu-ocr").gates()}
    for name, limit in {"symbols": 0.2, "unsure script": 0.3}.items():
        values = numpy.array([math.nextafter(limit, 0), limit])
        assert passes(gates[name], {gates[name].signal: values}, ["", ""]).tolist() == [True, False]


def test_every_language_has_its_preset():
    assert {f"setu-{tag}" for tag in LANGUAGES} <= set(preset_names())
    for tag in LANGUAGES:
        labels = [step.label for step in load_pipeline(f"setu-{tag}").steps]
        assert ("language" in labels) != ("language.given" in labels)


def hindi(sentences: int, words: int) -> str:
    letters = "कखगघचछजझटठडढतथदधनपफबभमयरलवसह"
    made = ("".join(part) for part in itertools.product(letters, repeat=3))
    return "\n".join(" ".join(itertools.islice(made, words)) + "।" for _ in range(sentences))


def decided(preset: str, texts: list[str], languages: list[str]) -> list[str]:
    steps = [step for step in load_pipeline(preset).steps if step.kind != "global"]
    steps = [step for step in steps if step.gate is None or not step.gate.signal.startswith("dedup.")]
    return execute(steps, Texts(texts, languages)).dropped


def test_documents_around_setus_limits():
    # What is left behind the last delimiter counts as a line, too: 4 sentences are 5 lines, one of one word.
    texts = [hindi(3, 12), hindi(4, 12), hindi(40, 5), hindi(40, 6)]
    assert decided("setu-flags", texts, ["hi"] * 4) == ["few lines", "", "short lines", ""]
    assert decided("setu-flags", texts[:1], ["as"]) == [""]  # 4 lines are enough there.


def prose(words: int) -> str:
    vocabulary = ("".join(part) for part in itertools.product("etaoinsr", repeat=4))
    return " ".join(itertools.islice(vocabulary, words))


def test_documents_around_a_recipes_number_of_words():
    pipeline = load_pipeline("data-juicer-refine-cc", gates={"language": {"minimum": 0}})
    steps = [step for step in pipeline.steps if step.kind != "global"]
    steps = [step for step in steps if step.gate is None or not step.gate.signal.startswith("dedup.")]
    assert execute(steps, Texts([prose(19), prose(20)])).dropped == ["words", ""]


def test_flagged_words_drop_only_with_a_list(tmp_path: Path):
    listed = tmp_path / "flagged.txt"
    listed.write_text("eeee\n", encoding="utf-8")
    text = prose(100)  # One word of 100 is on the list: more than 0.0015.
    for settings, reason in (
        ({}, ""),
        ({"data_juicer.flagged_words": {"words": str(listed)}}, "flagged words"),
    ):
        pipeline = load_pipeline(
            "data-juicer-refine-cc", settings=settings, gates={"language": {"minimum": 0}}
        )
        steps = [step for step in pipeline.steps if step.kind != "global"]
        steps = [step for step in steps if step.gate is None or not step.gate.signal.startswith("dedup.")]
        assert execute(steps, Texts([text])).dropped == [reason]


def test_bounds_are_tuned_from_what_a_pool_stores(tmp_path):
    rows = [{"id": str(n), "text": prose(20 + n), "source": "made", "language": "en"} for n in range(100)]
    write_corpus(tmp_path / "corpus", "documents", rows, provenance=[], ledger={})
    steps = [
        {"score": "data_juicer.words"},
        {"gate": {"name": "words", "signal": "data_juicer.words.count", "minimum": 10, "maximum": 50}},
    ]
    settings = {"sources": [{"format": "corpus", "path": str(tmp_path / "corpus")}], "pipeline": steps}
    made = CurateParameters(**settings, short_circuit=False, executor="here")
    pool = Curation(made, tmp_path / "pool").run()
    deviation = float(numpy.arange(20, 120).std(ddof=1))
    tuned = tuned_gates(pool, 2.0)
    assert tuned["words"] == pytest.approx({"minimum": 69.5 - 2 * deviation, "maximum": 69.5 + 2 * deviation})
    assert "words: {minimum: 11.477, maximum: 127.523}" in as_yaml(tuned)
    with pytest.raises(PunaError, match="above 0"):
        tuned_gates(pool, 0)
    pool.meta["short_circuit"] = True
    with pytest.raises(PunaError, match="short_circuit=false"):
        tuned_gates(pool)
