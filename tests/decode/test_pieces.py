from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from puna.decode.pieces import TextPieces


def run(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    pieces = TextPieces(tokenizer.decode, stop)
    got = []
    for token in ids:
        got.append(pieces.push(token))
        if pieces.stopped:
            break
    return [*got, pieces.finish()], pieces.stopped


@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_joined_pieces_are_the_text_and_no_piece_breaks_a_character(tiny_tokenizer: Any, text: str) -> None:
    got, _ = run(tiny_tokenizer, tiny_tokenizer.encode(text))
    assert "".join(got) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in got)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 319), max_size=40))
def test_any_ids_give_the_tokenizers_own_decoding(tiny_tokenizer: Any, ids: list[int]) -> None:
    got, _ = run(tiny_tokenizer, ids)
    assert "".join(got) == tiny_tokenizer.decode(ids)
    "".join(got).encode()  # valid UTF-8


def test_a_character_of_four_bytes_comes_when_its_last_byte_is_there(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer.encode("a𝄞b")
    assert len(ids) == 6
    assert run(tiny_tokenizer, ids)[0] == ["a", "", "", "", "𝄞", "b", ""]


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer.encode("a𝄞")[:-1]
    assert run(tiny_tokenizer, ids)[0] == ["a", "", "", "", "\N{REPLACEMENT CHARACTER}"]


@settings(deadline=None)
@given(text=st.text("ab\n", max_size=30), stops=st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3))
def test_text_is_cut_before_the_first_stop_string(tiny_tokenizer: Any, text: str, stops: list[str]) -> None:
    got, stopped = run(tiny_tokenizer, tiny_tokenizer.encode(text), tuple(stops))
    # The first to be complete wins, as the text grows character by character.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not ends:
        assert "".join(got) == text
        assert not stopped
    else:
        first_complete = min(ends)[0]
        assert stopped
        assert "".join(got) == text[: min(start for end, start in ends if end == first_complete)]


def test_what_may_begin_a_stop_string_waits(tiny_tokenizer: Any) -> None:
    assert run(tiny_tokenizer, tiny_tokenizer.encode("x#y##z"), ("##",)) == (
        ["x", "", "#y", "", "", ""],
        True,
    )
    assert run(tiny_tokenizer, tiny_tokenizer.encode("x#"), ("##",)) == (["x", "", "#"], False)


def test_a_decoder_that_eats_leading_spaces_keeps_the_spaces_between_words() -> None:
    words = ["▁the", "▁cat", "s", "▁", "▁sat"]

    def decode(ids: Any) -> str:  # as sentencepiece decoders do
        return "".join(words[token] for token in ids).replace("▁", " ").removeprefix(" ")

    pieces = TextPieces(decode)
    assert [pieces.push(token) for token in range(5)] == ["the", " cat", "s", " ", " sat"]
