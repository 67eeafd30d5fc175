"""Nudging by scripted voices, exactly; then with models of two vocabularies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.decode.nudging import (
    NudgingSettings,
    Piece,
    Written,
    converse,
    without_trailing_repeats,
)

Policy = Callable[[str], tuple[str | None, float]]
"""What follows a text, None to stop, and how likely it is."""


class Scripted:
    """A voice that follows a policy over strings; it never reads anything, so it never yields."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.asked: list[str] = []

    def next(self, text: str) -> Any:
        self.asked.append(text)
        said, probability = self.policy(text)
        return Piece(None if said is None else 0, said or "", probability)
        yield

    def write(self, text: str, tokens: int, *, confidence: float = 0.0, first: Piece | None = None) -> Any:
        pieces: list[Piece] = []
        while True:
            piece = first if first is not None and not pieces else (yield from self.next(text))
            if piece.token is None:
                return Written(pieces, "stop")
            if piece.probability < confidence and piece is not first:
                return Written(pieces, "unsure")
            pieces.append(piece)
            text += piece.text
            if len(pieces) == tokens:
                return Written(pieces, "full")


def recite(said: Sequence[str], probability: float = 1.0, stops: bool = True) -> Policy:
    """Say the pieces one after the other, whoever said those before; then stop."""

    def policy(text: str) -> tuple[str | None, float]:
        place = 0
        while text and place < len(said) and text.startswith(said[place]):
            text = text[len(said[place]) :]
            place += 1
        if place == len(said):
            return (None if stops else " more"), probability
        return said[place][len(text) :] if said[place].startswith(text) else said[place], probability

    return policy


def answer(base: Policy, nudger: Policy, limit: int = 200, **settings: Any) -> list[tuple[str, str]]:
    """Who wrote what; the last row says whether the nudger stopped."""
    written: list[tuple[str, str]] = []

    def write(source: str, pieces: Sequence[Piece]) -> bool:
        written.append((source, "".join(piece.text for piece in pieces)))
        return sum(len(text) for _, text in written) >= limit

    steps = converse(Scripted(base), Scripted(nudger), NudgingSettings(**settings), write)
    with pytest.raises(StopIteration) as end:
        next(steps)
    written.append(("end", str(end.value.value)))
    return written


def text_of(written: list[tuple[str, str]]) -> str:
    return "".join(text for _, text in written[:-1])


NUDGER = recite(["The", " cap", "ital", " of", " France", " is", " Paris", "."])


def test_at_confidence_0_the_first_word_is_forced_and_the_base_does_the_rest() -> None:
    base = recite(["The", " town", " is", " big", ".", "\n"], probability=0.01, stops=False)
    written = answer(base, recite(["The", " cat", *[" x"] * 20]), limit=40, confidence=0.0)
    assert written[0] == ("nudge", "The")
    assert {source for source, _ in written[1:-1]} == {"base"}
    assert text_of(written).startswith("The town is big.\n more more")


def test_above_confidence_1_without_the_prefix_rule_the_text_is_the_nudgers_own() -> None:
    words = ["One", " two", ",", " th", "ree", " four", ".", "\nFi", "ve", " six"] * 5
    written = answer(
        recite(["One", " two", " three"]),
        recite(words),
        confidence=1.1,
        prefix_rule=False,
        limit=10_000,
    )
    assert text_of(written) == "".join(words)
    assert {source for source, _ in written[:-1]} == {"nudge"}
    assert written[-1] == ("end", "True")


@given(
    st.lists(st.sampled_from(["a", " b", "c", " ", "  d", "\n", " e."]), min_size=1, max_size=40),
    st.integers(1, 20),
)
def test_however_long_a_nudge_is_the_nudgers_text_comes_out_whole(words: list[str], tokens: int) -> None:
    def base(text: str) -> tuple[str | None, float]:
        return "z", 0.5

    def nudger(text: str) -> tuple[str | None, float]:
        place = 0
        while text:
            text = text[len(words[place]) :]
            place += 1
        return (words[place], 1.0) if place < len(words) else (None, 1.0)

    written = answer(
        base, nudger, 10_000, confidence=1.1, prefix_rule=False, nudge_tokens=tokens, same_nudges=50
    )
    assert text_of(written) == "".join(words)
    assert written[-1] == ("end", "True")


def test_the_base_resumes_where_its_next_token_begins_the_nudgers_next_word() -> None:
    def base(text: str) -> tuple[str | None, float]:
        if text == "The capital of":
            return " Fr", 0.05  # hardly likely, yet how " France" begins
        return {"The capital of Fr": ("ance!", 0.9)}.get(text, (" what", 0.1))

    written = answer(base, NUDGER, limit=25, nudge_tokens=7)
    assert written[:2] == [("nudge", "The capital of"), ("base", " France!")]
    unruled = answer(base, NUDGER, prefix_rule=False, limit=25, nudge_tokens=7)
    assert ("base", " France!") not in unruled


def test_the_base_resumes_where_it_is_confident_of_another_word() -> None:
    def base(text: str) -> tuple[str | None, float]:
        return {"The capital": (" city", 0.3), "The capital city": (" is", 0.29)}.get(text, (" what", 0.1))

    written = answer(base, NUDGER, limit=12, confidence=0.3, nudge_tokens=7)
    assert written[:2] == [("nudge", "The capital"), ("base", " city")]


def test_if_the_base_never_qualifies_all_words_but_the_last_are_taken() -> None:
    def base(text: str) -> tuple[str | None, float]:
        return " what", 0.1

    written = answer(base, NUDGER, nudge_tokens=4, limit=10_000)
    assert written[:2] == [("nudge", "The capital"), ("nudge", " of France is")]
    assert text_of(written) == "The capital of France is Paris."


def test_a_nudge_of_one_word_is_taken_whole() -> None:
    written = answer(recite(["q"], 0.1), recite(["Super", "cali", "fragi", "listic", " yes"]), nudge_tokens=3)
    assert written[0] == ("nudge", "Supercalifragi")


def test_the_nudger_ends_the_answer_and_the_base_cannot() -> None:
    base = recite(["The"], probability=0.99)  # sure that the answer ends after the first word
    written = answer(base, NUDGER, nudge_tokens=4, limit=10_000)
    assert text_of(written) == "The capital of France is Paris."
    assert written[-1] == ("end", "True")
    assert {source for source, _ in written[:-1]} == {"nudge"}


def test_a_burst_is_cut_at_the_first_token_that_is_not_likely_enough() -> None:
    def base(text: str) -> tuple[str | None, float]:
        likely = {"The": 0.9, "The town": 0.8, "The town is": 0.2}
        said = {"The": " town", "The town": " is", "The town is": " odd"}
        return said.get(text, "?"), likely.get(text, 0.0)

    assert answer(base, NUDGER, limit=12, nudge_tokens=7)[1] == ("base", " town is")


def test_a_base_that_goes_in_circles_hands_back() -> None:
    def base(text: str) -> tuple[str | None, float]:
        return " na", 1.0

    written = answer(base, recite(["Oh", *[f" w{i}" for i in range(30)]]), limit=400, burst_tokens=4)
    assert [source for source, _ in written[:4]] == ["nudge", "base", "nudge", "base"]


def test_the_same_nudge_again_and_again_ends_the_answer() -> None:
    def stuck(text: str) -> tuple[str | None, float]:
        return " so", 1.0

    written = answer(lambda text: (" no", 0.0), stuck, nudge_tokens=1, limit=10_000)
    assert written == [("nudge", " so")] * 3 + [("end", "False")]


def test_rounds_and_the_caller_end_the_answer() -> None:
    many = recite([f" w{i}" for i in range(500)])
    assert len(answer(lambda text: (" no", 0.0), many, rounds=7, limit=10_000)) == 7 + 1
    assert len(answer(lambda text: (" no", 0.0), many, limit=1)) == 1 + 1


def test_the_base_is_asked_before_each_later_word_and_never_before_the_first() -> None:
    base = Scripted(lambda text: (" no", 0.0))
    nudger = Scripted(recite(["A", " b", "c", " d", " e"]))
    settings = NudgingSettings(rounds=1, nudge_tokens=5)
    steps = converse(base, nudger, settings, lambda source, pieces: False)
    with pytest.raises(StopIteration):
        next(steps)
    assert base.asked == ["A", "A bc", "A bc d"]


def test_trailing_repeats_of_thirty_characters_are_cut_off() -> None:
    run = "this is a line of thirty chars"
    assert len(run) == 30
    assert without_trailing_repeats("Well, " + run * 4) == "Well, " + run
    assert without_trailing_repeats("Well, " + run * 2 + "!") == "Well, " + run * 2 + "!"
    assert without_trailing_repeats("Well, " + run[1:] * 2) == "Well, " + run[1:] * 2
    assert without_trailing_repeats("") == ""
