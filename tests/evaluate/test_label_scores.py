"""Scores of labels by hand: strict entities, accuracy, macro F1, the majority."""

from __future__ import annotations

import pytest

from puna.evaluate.label_scores import entities, entity_f1, has_entities, majority, score


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("O B-X I-X O", [(1, 3, "X")]),
        ("B-X B-X I-X", [(0, 1, "X"), (1, 3, "X")]),
        ("I-X I-X O", []),  # nothing begins: strict
        ("O I-X B-X", [(2, 3, "X")]),
        ("B-X I-Y I-X", [(0, 1, "X")]),  # I-Y goes on with nothing, nor does the I-X behind it
        ("B-X O I-X", [(0, 1, "X")]),
        ("B-X I-X B-Y I-Y", [(0, 2, "X"), (2, 4, "Y")]),
        ("B-A-B I-A-B", [(0, 2, "A-B")]),
        ("O O", []),
    ],
)
def test_entities_of_strict_iob2(labels: str, found: list[tuple[int, int, str]]) -> None:
    assert entities(labels.split()) == found


def tags(text: str) -> list[str]:
    return text.split()


def test_entity_f1_wants_both_ends_and_the_type() -> None:
    true = [tags("B-X I-X O B-Y"), tags("O B-X")]
    assert entity_f1(true, true) == 1.0
    short = [tags("B-X O O B-Y"), tags("O B-X")]  # two of three found, three said
    assert entity_f1(short, true) == pytest.approx(2 / 3)
    typed = [tags("B-Y I-Y O B-Y"), tags("O O")]  # one of three, two said
    assert entity_f1(typed, true) == pytest.approx(2 * 1 / (2 + 3))
    assert entity_f1([["O"] * 4, ["O"] * 2], true) == 0.0


def test_scores_of_texts() -> None:
    true = [["good"], ["good"], ["bad"], ["so-so"]]
    said = [["good"], ["bad"], ["bad"], ["good"]]
    found = score(said, true)
    assert found.accuracy == 0.5 and found.entity_f1 is None
    # good: 1 hit, 2 said, 2 true; bad: 1, 2, 1; so-so: none.
    assert found.macro_f1 == pytest.approx((0.5 + 2 / 3 + 0) / 3)
    assert found.metrics(".x") == {"accuracy.x": 0.5, "macro_f1.x": pytest.approx(found.macro_f1)}
    assert score(majority(true, {"bad": 1, "good": 2}), true).accuracy == 0.5
    assert majority([["x", "y"]], {"b": 1, "a": 1}) == [["a", "a"]]


def test_a_word_without_a_label_counts_as_wrong() -> None:
    found = score([["B-X", "", ""]], [["B-X", "O", "B-X"]])
    assert found.accuracy == pytest.approx(1 / 3) and found.entity_f1 == pytest.approx(2 / 3)


def test_what_counts_as_labels_of_entities() -> None:
    assert has_entities(["O", "B-X", "I-X"]) and has_entities(["B-X"])
    assert not has_entities(["O"]) and not has_entities(["NN", "B-X"]) and not has_entities(["I-X", "O"])
    assert not has_entities(["good", "bad"])
