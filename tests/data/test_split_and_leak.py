"""Held-out text is chosen by document, and what training shares with it is found."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.data.fragments import Seen, join_fragments
from puna.data.leak import LeakCheck, ngrams, words
from puna.data.ledger import Ledger, Tally, unbalanced
from puna.data.sources import Item
from puna.data.split import HeldOut, make_split

names = st.text(min_size=1, max_size=8)


@given(names, names, st.floats(0, 0.99), st.integers(0, 99))
def test_a_document_is_on_one_side_only_and_always_the_same(
    source: str, document: str, share: float, seed: int
) -> None:
    split = make_split(HeldOut(share=share), [source], seed)
    sides = [split.side(source, held_out=held_out)(document) for held_out in (True, False)]
    assert sorted(sides) == [False, True]
    assert split.is_held_out(source, document) == sides[0]


def test_the_share_of_documents_is_about_what_was_asked_and_depends_on_the_seed() -> None:
    def held_out(seed: int) -> set[int]:
        split = make_split(HeldOut(share=0.2), ["s"], seed)
        return {number for number in range(2000) if split.is_held_out("s", str(number))}

    assert 330 < len(held_out(0)) < 470
    assert held_out(0) == held_out(0) != held_out(1)


def test_more_share_only_adds_documents() -> None:
    little, much = (make_split(HeldOut(share=share), ["s"], 0) for share in (0.1, 0.3))
    documents = [str(number) for number in range(500)]
    assert all(much.is_held_out("s", name) for name in documents if little.is_held_out("s", name))


def test_whole_sources_are_held_out_by_name_and_the_own_seed_wins() -> None:
    split = make_split(HeldOut(sources=["b"], seed=5), ["a", "b"], 1)
    assert split.seed == 5
    assert split.is_held_out("b", "x") and not split.is_held_out("a", "x")
    with pytest.raises(PunaError, match="did you mean 'plone'"):
        make_split(HeldOut(sources=["plon"]), ["plone"], 0)


def numbered(start: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(start, start + count))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 30))
def test_a_shared_run_is_found_exactly_when_it_is_long_enough(before: int, after: int, shared: int) -> None:
    check = LeakCheck()
    check.add("h", [numbered(0, shared)])
    training = " ".join(["x"] * before) + " " + numbered(0, shared).upper() + "! " + " ".join(["y"] * after)
    assert check.check("t", [training]) == (shared >= 13)
    assert (check.checked, check.leaking) == (1, int(shared >= 13))


def test_what_leaks_is_told_with_both_rows_and_the_words() -> None:
    check = LeakCheck(3)
    check.add("held/1", ["Een twee, drie vier"])
    check.check("train/1", ["los"])
    check.check("train/2", ["nul EEN twee drie"])
    assert check.examples == [{"train": "train/2", "held_out": "held/1", "words": "een twee drie"}]
    assert str(check) == (
        "leak check: 1 of 2 training rows share 3 words in a row with held-out rows\n"
        "  train/2 and held/1: een twee drie"
    )
    assert check.runs == 2 and "leak: drop" in str(check.error())


def test_runs_do_not_go_over_the_border_of_two_texts() -> None:
    check = LeakCheck(4)
    check.add("h", ["a b", "c d"])
    assert not check.check("t", ["a b c d"])


def test_scripts_without_spaces_are_cut_into_characters() -> None:
    assert words("我们 are 你好, it's ไทย") == ["我", "们", "are", "你", "好", "it", "s", "ไ", "ท", "ย"]
    assert words("한국어 여름") == ["한국어", "여름"]
    assert len(list(ngrams("今天天气很好我们去公园散步吧", 13))) == 2


def items(*rows: str, document: str = "d", fragment: bool = True) -> list[Item]:
    return [Item(document, {"text": text, "language": "nl"}, n, fragment) for n, text in enumerate(rows)]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.text("xyz", min_size=1, max_size=9), st.booleans())))
def test_joining_keeps_all_text_in_order_and_mixes_no_documents(pieces: list[tuple[str, str, bool]]) -> None:
    pieces = sorted(pieces, key=lambda piece: piece[0])
    given_ = [Item(d, {"text": t, "language": "nl"}, n, f) for n, (d, t, f) in enumerate(pieces)]
    joined = list(join_fragments(given_, 12))
    for document in "ab":
        before = [
            line for item in given_ if item.document == document for line in item.row["text"].split("\n")
        ]
        after = [
            line for item in joined if item.document == document for line in item.row["text"].split("\n")
        ]
        assert before == after
    several = [item for item in joined if "\n" in item.row["text"]]
    assert all(len(item.row["text"]) < 12 for item in several)
    assert len({item.key for item in joined}) == len(joined)


def test_fragments_fill_documents_of_about_the_size_and_others_stay_alone() -> None:
    joined = list(join_fragments(items("een", "twee", "drie", "een heel lange regel"), 10))
    assert [item.row["text"] for item in joined] == ["een\ntwee", "drie", "een heel lange regel"]
    assert [item.key for item in joined] == ["d#0", "d#2", "d#3"]
    alone = items("een", "twee", fragment=False)
    assert list(join_fragments(alone, 100)) == alone


def test_each_text_is_kept_once_and_held_out_text_is_not_trained_on() -> None:
    seen, held, train = Seen(), Tally("rows"), Tally("rows")
    list(seen.filter(items("een", "een", "twee"), "documents", held, held_out=True))
    kept = list(seen.filter(items("twee", "drie", "drie", " drie "), "documents", train, held_out=False))
    assert [item.row["text"] for item in kept] == ["drie"]
    assert held.dropped == Counter({"duplicate": 1})
    assert train.dropped == Counter({"duplicate": 2, "also held out": 1})
    assert unbalanced({"held": held.as_json(), "train": train.as_json()}) is None


def test_a_ledger_adds_up_or_names_the_step_that_does_not() -> None:
    ledger = Ledger()
    ledger.step("read", "rows").keep()
    ledger.step("read", "rows").drop("short")
    ledger.step("joined", "documents").drop("short")
    assert ledger.dropped() == Counter({"short": 2}) and unbalanced(ledger.as_json()) is None
    ledger["joined"].kept += 1
    assert unbalanced(ledger.as_json()) == "joined"
