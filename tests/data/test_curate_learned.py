"""Classifiers and importance: equal to the library and to definitions, and able to tell texts apart."""

from __future__ import annotations

import inspect
import json.decoder
import math
import pydoc_data.topics
import random
import re
import subprocess
import sys
from collections import Counter

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage
from puna.data.corpus import write_corpus
from puna.data.curate.gates import Gate, quantile_bounds
from puna.data.curate.learned.fasttext_model import FastTextModel
from puna.data.curate.learned.files import area_under_curve
from puna.data.curate.learned.importance import ImportanceModel
from puna.data.curate.learned.lookup import HashTable
from puna.data.curate.learned.settings import ImportanceParameters
from puna.data.curate.operator import apply_score, get_operator
from puna.data.curate.texts import Texts, hashes_of

fasttext = pytest.importorskip("fasttext")


def pieces(text: str) -> list[str]:
    return [piece for piece in text.split("\n\n") if len(piece) > 80]


def two_sides() -> tuple[list[str], list[str]]:
    """Paragraphs of Python's reference, and pieces of its library's source code."""
    prose = [piece for topic in pydoc_data.topics.topics.values() for piece in pieces(topic)]
    code = [
        piece
        for module in (json.decoder, inspect, random, subprocess)
        for piece in pieces(inspect.getsource(module))
    ]
    draw = random.Random(3)
    return draw.sample(prose, 600), draw.sample(code, 600)


PROSE, CODE = two_sides()


def corpus(folder, texts, name):
    rows = [{"id": f"{name}/{i}", "text": t, "source": name, "language": "en"} for i, t in enumerate(texts)]
    made = write_corpus(
        folder / name, "documents", rows, provenance=[{"source": name, "licence": "PSF"}], ledger={}
    )
    return made.path


# Lookups, areas


@given(st.sets(st.integers(0, 2**64 - 1), max_size=40), st.lists(st.integers(0, 2**64 - 1), max_size=10))
def test_a_table_knows_the_places_of_its_keys(keys, others):
    ordered = numpy.array(sorted(keys), dtype=numpy.uint64)
    asked = numpy.array([*ordered.tolist(), *others], dtype=numpy.uint64)
    by_hand = [sorted(keys).index(value) if value in keys else -1 for value in asked.tolist()]
    assert HashTable(ordered).places(asked).tolist() == by_hand


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=8), st.lists(st.integers(0, 4), min_size=1, max_size=8)
)
def test_the_area_is_the_chance_of_the_positive_to_be_above(positive, negative):
    by_hand = numpy.mean([[(p > n) + (p == n) / 2 for n in negative] for p in positive])
    assert area_under_curve(numpy.array(positive, float), numpy.array(negative, float)) == pytest.approx(
        by_hand
    )


# fastText


@pytest.mark.parametrize(("ngrams", "least"), [(1, 1), (2, 1), (3, 2)])
def test_probabilities_are_those_of_the_library(tmp_path, ngrams, least):
    odd = "naïve 中文 Ω😀 " + "x" * 300 + " " + "é" * 257
    lines = [f"__label__a {text}" for text in [*PROSE[:200], odd]] + [
        f"__label__b {text}" for text in CODE[:200]
    ]
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(line.replace("\n", " ") for line in lines) + "\n")
    library = fasttext.train_supervised(
        str(file), wordNgrams=ngrams, minCount=least, bucket=3000, dim=8, thread=1, verbose=0
    )
    model = FastTextModel.of_library(library, where="test")
    texts = [*PROSE[200:300], *CODE[200:300], "", "\n \t", odd, odd + " ÿ unknown", "a\0b\vc\fd\re"]
    found = model.probabilities(Texts(texts))
    labels, probabilities = library.predict([text.replace("\n", " ") for text in texts], k=2)
    for row, names, values in zip(found, labels, probabilities, strict=True):
        by_library = {
            name.removeprefix("__label__"): value for name, value in zip(names, values, strict=True)
        }
        # The library adds .00001 to every probability that it tells.
        assert row == pytest.approx([by_library[label] - 1e-5 for label in model.labels], abs=1e-6)
    model.save(tmp_path / "model.safetensors")
    assert numpy.array_equal(
        FastTextModel.load(tmp_path / "model.safetensors").probabilities(Texts(texts)), found
    )
    library.save_model(str(tmp_path / "model.bin"))
    assert numpy.allclose(FastTextModel.load(tmp_path / "model.bin").probabilities(Texts(texts)), found)


def test_a_model_with_subwords_is_refused(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("__label__a one two\n__label__b three four\n" * 5)
    library = fasttext.train_supervised(str(file), minn=2, maxn=3, bucket=50, dim=2, thread=1, verbose=0)
    with pytest.raises(PunaError, match="whole words"):
        FastTextModel.of_library(library, where="test")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier trained by the stage on 400 texts of each side, and its metrics."""
    folder = tmp_path_factory.mktemp("classifier")
    stage = get_stage("quality_classifier")
    inputs = {
        "wanted": {"prose": corpus(folder, PROSE[:400], "prose")},
        "other": {"code": corpus(folder, CODE[:400], "code")},
    }
    parameters = stage.parameters(buckets=20_000, dimensions=16, epochs=25)
    return [
        stage.function(Context(name, folder / name, inputs, seed=4), parameters) for name in ("one", "two")
    ]


def test_the_classifier_tells_texts_apart_that_it_has_not_seen(classifier):
    outcome = classifier[0]
    assert outcome.metrics["auc"] >= 0.9
    assert outcome.metrics["texts.wanted"] == 360
    operator = get_operator("score", "quality.fasttext")
    chosen = operator.settings(model=str(outcome.outputs["model"]))
    texts = Texts([*PROSE[400:], *CODE[400:]])
    found = apply_score(operator, texts, chosen)["probability"]
    assert area_under_curve(found[:200], found[200:]) >= 0.9


def test_two_trainings_with_one_seed_are_equal(classifier):
    one, two = (outcome.outputs["model"].read_bytes() for outcome in classifier)
    assert one == two


def test_a_gate_by_quantile_keeps_the_best_tenth(classifier):
    operator = get_operator("score", "quality.fasttext")
    chosen = operator.settings(model=str(classifier[0].outputs["model"]))
    texts = Texts([*PROSE, *CODE])
    found = apply_score(operator, texts, chosen)["probability"]
    gate = Gate(name="quality", signal="quality.fasttext.probability", quantile_minimum=0.9)
    kept = found >= quantile_bounds(gate, found, numpy.full(texts.count, ""))[""]["minimum"]
    assert kept.mean() == pytest.approx(0.1, abs=0.005)
    assert kept[:600].sum() > 5 * kept[600:].sum()


def test_an_unknown_label_and_a_missing_model_are_told(classifier, tmp_path):
    operator = get_operator("score", "quality.fasttext")
    model = str(classifier[0].outputs["model"])
    with pytest.raises(PunaError, match="no label 'hq'"):
        apply_score(operator, Texts(["a"]), operator.settings(model=model, label="hq"))
    with pytest.raises(PunaError, match="puna stage quality_classifier"):
        apply_score(operator, Texts(["a"]), operator.settings(model=str(tmp_path / "none.safetensors")))
    importance = get_operator("score", "dsir.importance")
    with pytest.raises(PunaError, match="another kind"):
        apply_score(importance, Texts(["a"]), importance.settings(model=model))


def test_too_few_texts_are_told(tmp_path):
    stage = get_stage("quality_classifier")
    few, enough = corpus(tmp_path, PROSE[:5], "few"), corpus(tmp_path, CODE[:20], "enough")
    inputs = {"wanted": {"a": few}, "other": {"b": enough}}
    with pytest.raises(PunaError, match="too few texts"):
        stage.function(Context("x", tmp_path / "x", inputs), stage.parameters())


# Importance


def test_scores_are_sums_of_log_ratios(tmp_path):
    parameters = ImportanceParameters(buckets=97)
    model = ImportanceModel.fit(PROSE[:50], CODE[:50], parameters)
    texts = [PROSE[60], CODE[60], "one", "", "a, a"]
    plain, with_length = model.scores(Texts(texts))

    def features(text: str) -> list[int]:
        words = [int(h) for h in hashes_of(re.findall(r"\w+|[^\w\s]+", text))] if text else []
        pairs = Texts([text]).words("word_punct").ngrams(2).hashes.tolist()
        return [value % 97 for value in (*words, *pairs)]

    counts = [
        Counter(bucket for text in side for bucket in features(text)) for side in (PROSE[:50], CODE[:50])
    ]
    lengths = [
        numpy.mean([len(re.findall(r"\w+|[^\w\s]+", text)) for text in side])
        for side in (PROSE[:50], CODE[:50])
    ]
    for place, text in enumerate(texts):
        if not text:
            assert numpy.isnan(plain[place])
            continue
        p, q = ({b: c / sum(count.values()) for b, c in count.items()} for count in counts)
        by_hand = sum(math.log(p.get(b, 0) + 1e-8) - math.log(q.get(b, 0) + 1e-8) for b in features(text))
        assert plain[place] == pytest.approx(by_hand)
        n = len(re.findall(r"\w+|[^\w\s]+", text))
        poisson = [math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) + 1e-8 for mean in lengths]
        assert with_length[place] == pytest.approx(by_hand + math.log(poisson[0] / poisson[1]))


def test_importance_tells_the_domain_and_is_the_same_in_every_process(tmp_path):
    stage = get_stage("importance_model")
    inputs = {
        "target": {"prose": corpus(tmp_path, PROSE[:400], "prose")},
        "source": {"code": corpus(tmp_path, CODE[:400], "code")},
    }
    outcome = stage.function(Context("x", tmp_path / "x", inputs), stage.parameters())
    assert outcome.metrics["auc"] >= 0.9
    made = outcome.outputs["model"]
    operator = get_operator("score", "dsir.importance")
    texts = [*PROSE[400:], *CODE[400:]]
    found = apply_score(operator, Texts(texts), operator.settings(model=str(made)))
    for signal in found.values():
        assert area_under_curve(signal[:200], signal[200:]) >= 0.9
    program = (
        "import sys; from puna.data.curate.learned.importance import ImportanceModel; "
        "from puna.data.curate.texts import Texts; "
        "print(ImportanceModel.load(sys.argv[1]).scores(Texts([sys.argv[2]]))[0][0])"
    )
    other = subprocess.run(
        [sys.executable, "-c", program, str(made), texts[0]], capture_output=True, text=True, check=True
    )
    assert round(float(other.stdout), 8) == found["log_ratio"][0]
