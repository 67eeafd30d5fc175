"""An n-gram model estimated here: its probabilities add up, KenLM reads it, and it ranks a domain first."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import write_corpus
from puna.data.curate.learned.ngram_model import BEGIN, END, UNKNOWN, NgramModel

kenlm = pytest.importorskip("kenlm")
NOUNS, VERBS = ["cat", "dog", "bird", "fish"], ["sees", "hears", "likes"]


def lines(seed: int, count: int, nouns: list[str]) -> list[str]:
    generator = numpy_generator(seed, "lines")
    return [
        f"the {nouns[generator.integers(len(nouns))]} {VERBS[generator.integers(3)]} "
        f"a {nouns[generator.integers(len(nouns))]}"
        for _ in range(count)
    ]


def opened(model: NgramModel, folder: Path) -> kenlm.Model:
    model.save(folder / "model.arpa")
    config = kenlm.Config()
    config.show_progress = False
    return kenlm.Model(str(folder / "model.arpa"), config)


def probability(model: kenlm.Model, context: list[str], word: str) -> float:
    state, after = kenlm.State(), kenlm.State()
    model.BeginSentenceWrite(state)
    for given in context:
        model.BaseScore(state, given, after)
        state, after = after, kenlm.State()
    return 10 ** model.BaseScore(state, word, after)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_the_words_behind_any_context_add_up_to_one(tmp_path: Path, order: int) -> None:
    read = opened(NgramModel.fit(lines(0, 60, NOUNS), order), tmp_path)
    words = ["the", "a", *NOUNS, *VERBS, END, UNKNOWN]
    for context in (
        [],
        ["the"],
        ["the", "cat"],
        ["a", "bird", "the"],
        ["nobody", "sees"],
        ["likes", "likes"],
    ):
        assert sum(probability(read, context, word) for word in words) == pytest.approx(1, abs=1e-4)


def test_discounts_and_interpolation_are_those_of_the_formula() -> None:
    # Two lines: "a b" and "a c". Too few counts for discounts: 0.5, 1, 1.5.
    model = NgramModel.fit(["a b", "a c"], 2)
    assert model.fallbacks == 2
    unigrams, bigrams = model.probabilities
    # Words before: a has <s>; b has a; c has a; </s> has b and c. Discounts 0.5 three times and 1 once,
    # of 5 in all, spread evenly over a, b, c, </s> and <unk>.
    spread = 2.5 / 5 / 5
    assert 10 ** unigrams[("b",)] == pytest.approx(0.5 / 5 + spread)
    assert 10 ** unigrams[(END,)] == pytest.approx(1 / 5 + spread)
    assert 10 ** unigrams[(UNKNOWN,)] == pytest.approx(spread)
    # <s> a stands twice: its discount is 1, of 2; a b once of two, each discounted by 0.5.
    assert 10 ** bigrams[(BEGIN, "a")] == pytest.approx((2 - 1) / 2 + 1 / 2 * 10 ** unigrams[("a",)])
    assert 10 ** bigrams[("a", "b")] == pytest.approx((1 - 0.5) / 2 + 1 / 2 * 10 ** unigrams[("b",)])
    assert 10 ** model.backoffs[1][("a",)] == pytest.approx(0.5)


def test_what_was_seen_is_likelier_than_the_same_words_in_another_order(tmp_path: Path) -> None:
    read = opened(NgramModel.fit(lines(1, 200, NOUNS), 3), tmp_path)
    seen = "the cat sees a dog"
    for other in itertools.islice(itertools.permutations(seen.split()), 1, None, 17):
        assert read.score(seen) > read.score(" ".join(other))


def run(folder: Path, reference: list[str], other: list[str] | None = None, **parameters: object) -> Outcome:
    def corpus(name: str, texts: list[str]) -> Path:
        rows = [
            {"id": f"{n}", "text": text, "source": name, "language": "en"} for n, text in enumerate(texts)
        ]
        about = [{"source": name, "licence": "MIT"}]
        return write_corpus(folder / name, "documents", rows, provenance=about, ledger={}).path

    inputs = {"reference": {"domain": corpus("domain", reference)}}
    if other is not None:
        inputs["other"] = {"web": corpus("web", other)}
    stage = get_stage("ngram_model")
    given = validate(stage.parameters, parameters, where="test")
    return stage.function(Context("ngrams", folder / "out", inputs, seed=0), given)


def test_text_of_the_domain_is_told_from_other_text(tmp_path: Path) -> None:
    outcome = run(tmp_path, lines(2, 200, NOUNS), lines(3, 100, ["car", "ship", "plane", "cat"]))
    assert outcome.metrics["auc"] > 0.85
    assert outcome.metrics["texts.reference"] == 180 and outcome.metrics["texts.other"] == 100
    assert outcome.metrics["perplexity.held_out"] < outcome.metrics["perplexity.other"]
    assert outcome.outputs["model"].is_file()


def test_a_reference_of_one_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="too few texts"):
        run(tmp_path, ["alone"])


def test_a_reference_without_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="no word to learn from"):
        NgramModel.fit(["", " \n "], 3)
