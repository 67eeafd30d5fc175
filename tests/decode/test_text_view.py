"""One model's tokens of a shared text: they always spell it, and change as little as it does."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from puna.decode.text_view import TextView, words_of

TEXTS = st.text(st.sampled_from("the catmdn,.\n é😀"), max_size=30)


def test_a_view_spells_the_text_it_follows(tiny_tokenizer: Any) -> None:
    view = TextView(tiny_tokenizer)
    for text in ("the cat", "the cat sat on", "the cat sat", "the mat", "", " then"):
        view.follow(text)
        assert view.text == text
        assert tiny_tokenizer.decode(view.ids) == text


@settings(deadline=None, max_examples=200)
@given(data=st.data(), texts=st.lists(TEXTS, min_size=1, max_size=6))
def test_whatever_is_written_the_tokens_spell_the_text(
    tiny_tokenizer: Any, data: st.DataObject, texts: list[str]
) -> None:
    view = TextView(tiny_tokenizer)
    for text in texts:
        keep = data.draw(st.integers(0, len(view.text)))
        # Bytes that make no character show as U+FFFD, which is not what they would be spelt as.
        view.follow(view.text[:keep].replace("\ufffd", "?") + text)
        assert tiny_tokenizer.decode(view.ids) == view.text
        for token in data.draw(st.lists(st.integers(4, 319), max_size=5)):
            view.push(token)
        assert tiny_tokenizer.decode(view.ids[: view.whole()]) == view.text


def test_own_tokens_stay_as_they_were_chosen(tiny_tokenizer: Any) -> None:
    view = TextView(tiny_tokenizer)
    chosen = [*tiny_tokenizer.encode("t"), *tiny_tokenizer.encode("he"), *tiny_tokenizer.encode(" cat")]
    assert chosen != tiny_tokenizer.encode("the cat")  # the tokenizer itself would not spell it so
    for token in chosen:
        view.push(token)
    view.follow("the cat sat")
    assert view.ids[: len(chosen)] == chosen
    view.follow("the cat")
    assert view.ids == chosen


def test_a_word_that_another_ended_is_spelt_as_one(tiny_tokenizer: Any) -> None:
    view = TextView(tiny_tokenizer)
    view.follow("on th")
    view.follow("on the mat")
    assert view.ids == tiny_tokenizer.encode("on the mat")


def test_a_character_that_has_not_ended_has_no_text_and_is_given_up(tiny_tokenizer: Any) -> None:
    view = TextView(tiny_tokenizer)
    first, *rest = tiny_tokenizer.encode("é")
    assert rest
    assert view.push(first) == ""
    assert (view.text, view.whole(), len(view.ids)) == ("", 0, 1)
    assert [view.push(token) for token in rest][-1] == "é"
    assert view.whole() == len(view.ids)
    view.push(first)
    view.follow("é")
    assert view.ids == [first, *rest]


def test_a_peek_changes_nothing(tiny_tokenizer: Any) -> None:
    view = TextView(tiny_tokenizer)
    view.follow("the")
    first, *rest = tiny_tokenizer.encode(" é")
    view.push(first)
    before = (view.text, [*view.ids], view.whole())
    assert view.peek(rest[0]) == ""
    assert view.peek(*tiny_tokenizer.encode("x")) == "x"
    assert (view.text, view.ids, view.whole()) == before


def test_words_begin_with_a_space_and_are_cut_between_pieces_only() -> None:
    pieces = ["Th", "e", " cat", " s", "at", ".", "\n", "  ", " on"]
    words = ["".join(pieces[place] for place in word) for word in words_of(pieces)]
    assert words == ["The", " cat", " sat.\n", "  ", " on"]
    assert words_of([]) == []
    assert words_of([" only"]) == [[0]]


def test_a_continuation_gets_no_space_of_its_own() -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from puna.text.tokenizer import Tokenizer

    core = tokenizers.Tokenizer(
        models.BPE({"<unk>": 0, "</s>": 1, "▁": 2, "a": 3, "b": 4, "▁a": 5}, [("▁", "a")], unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = Tokenizer(core, {"eos_token": "</s>", "unk_token": "<unk>"})
    assert tokenizer.encode("ab") == [5, 4]
    assert tokenizer.encode_continuation("ab") == [3, 4]
    assert tokenizer.encode_continuation(" ab") == [5, 4]
