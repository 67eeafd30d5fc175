"""Evaluation sets in training text: runs of words and whole texts, against a plain definition."""

from __future__ import annotations

import json
import re

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.data.corpus import write_corpus
from puna.data.curate.operator import apply_map, apply_score, get_operator
from puna.data.curate.texts import Texts

_WORDS = st.lists(st.sampled_from(["A", "b", "c-", "d.", "é"]), max_size=9).map(" ".join)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(text: str, size: int) -> list[tuple[str, ...]]:
    found = words(text)
    return [tuple(found[i : i + size]) for i in range(len(found) - size + 1)]


def scores(documents, sets, **chosen):
    operator = get_operator("score", "decontaminate.ngrams")
    return apply_score(operator, Texts(documents), operator.settings(sets=sets, **chosen))


@given(documents=st.lists(_WORDS, min_size=1, max_size=4), held=st.lists(_WORDS, min_size=1, max_size=4))
@settings(max_examples=60)
def test_matches_shares_and_whole_texts_are_as_defined(tmp_path_factory, documents, held):
    held = [*held, "z z z z"]  # The set has one text that is long enough.
    file = tmp_path_factory.mktemp("set") / "set.txt"
    file.write_text("\n".join(held), encoding="utf-8")
    found = scores(documents, [str(file)], ngram=4, shortest=2)
    longer = {run for text in held for run in runs(text, 4)}
    exact = {tuple(words(text)) for text in held if 2 <= len(words(text)) < 4}
    for place, document in enumerate(documents):
        known = words(document)
        hits = [(i, 4) for i, run in enumerate(runs(document, 4)) if run in longer]
        hits += [(i, n) for n in (2, 3) for i, run in enumerate(runs(document, n)) if run in exact]
        covered = {i + k for i, n in hits for k in range(n)}
        whole = {tuple(words(t)) for t in held if len(words(t)) >= 2}
        inside = sum(any(run == text for run in runs(document, len(text))) for text in whole)
        assert found["matches"][place] == len(hits)
        assert found["texts"][place] == inside
        if known:
            assert found["share"][place] == pytest.approx(len(covered) / len(known))
        else:
            assert numpy.isnan(found["share"][place])


def test_thirteen_words_in_common_are_found_and_twelve_are_not(tmp_path):
    question = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    (tmp_path / "set.jsonl").write_text(json.dumps({"q": question, "choices": ["yes", "no"]}) + "\n")
    sets = [str(tmp_path / "set.jsonl")]
    twelve = " ".join(question.split()[:12])
    found = scores([f"Say: {question.upper()}!", f"{twelve} thirteen,", twelve, "nothing"], sets)
    assert found["matches"].tolist() == [2, 1, 0, 0]
    assert found["texts"].tolist() == [1, 0, 0, 0]
    spans = found["overlaps"]
    assert (spans.document.tolist(), spans.values.tolist()) == ([0, 1], [14, 13])
    assert spans.starts.tolist() == [5, 0]


def test_corpora_are_evaluation_sets_too(tmp_path):
    messages = [{"role": "user", "content": "a b c d e f g h"}, {"role": "assistant", "content": "x"}]
    row = {"id": "1", "messages": messages, "source": "s", "language": "en"}
    write_corpus(
        tmp_path / "set", "messages", [row], provenance=[{"source": "s", "licence": "none"}], ledger={}
    )
    assert scores(["A b c, d e f g h?"], [str(tmp_path / "set")])["texts"].tolist() == [1]


def test_what_is_shared_is_cut_with_its_surroundings(tmp_path):
    (tmp_path / "set.txt").write_text("alpha beta gamma delta\n")
    operator = get_operator("map", "decontaminate.cut")
    shared = "alpha beta gamma delta"
    chosen = operator.settings(
        sets=[str(tmp_path / "set.txt")], ngram=4, shortest=4, window=2, shortest_piece=3
    )
    documents = [f"long start 1 {shared} 2 long end", "clean", f"a {shared}", f"aaaa {shared} {shared} zz"]
    made = apply_map(operator, Texts(documents), chosen)
    assert made.texts == ["long start \n long end", None, "", "aaa"]
    assert made.signals["pieces"].tolist() == [2, 1, 0, 1]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("set.csv", "a", "not an evaluation set"),
        ("none.txt", None, "file not found"),
        ("set.txt", "too short", "long enough"),
        ("set.jsonl", "{", "line 1"),
    ],
)
def test_sets_that_cannot_be_used_are_told(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(PunaError, match=says):
        scores(["a"], [str(tmp_path / name)])
