"""Personal data: what is found, what check digits refuse, and what masks leave."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from puna.core import assets
from puna.core.errors import PunaError
from puna.core.stage import validate
from puna.data.curate.operator import apply_map, apply_score, get_operator
from puna.data.curate.pii import KINDS, find, is_card, is_iban
from puna.data.curate.texts import Texts

# Numbers that standards and card schemes publish as examples.
IBANS = ["DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819", "NL91ABNA0417164300"]
CARDS = ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005"]


@pytest.mark.parametrize("iban", IBANS)
def test_an_account_is_one_with_its_check_digits_alone(iban):
    assert is_iban(iban)
    swapped = iban[:-1] + ("1" if iban[-1] != "1" else "2")
    assert not is_iban(swapped)
    assert not is_iban(iban[:-1])
    assert not is_iban("ZZ" + iban[2:])
    assert [kind for *_, kind in find(f"pay {iban} THE sum")] == ["iban"]
    start, end, _ = find(f"pay {iban} THE sum")[0]
    assert f"pay {iban} THE sum"[start:end] == iban


@pytest.mark.parametrize("card", CARDS)
def test_a_card_passes_luhns_test_alone(card):
    assert is_card(card)
    last = str((int(card[-1]) + 1) % 10)
    assert not is_card(card[:-1] + last)
    assert [kind for *_, kind in find(f"card {card}.")] == ["card"]


@given(some.lists(some.integers(0, 9), min_size=12, max_size=18))
def test_luhn_detects_every_single_wrong_digit(digits):
    number = [4, *digits]
    check = next(last for last in range(10) if _luhn([*number, last]))
    right = "".join(map(str, [*number, check]))
    if len(right) > 19 or len(set(right)) == 1:
        return
    assert is_card(right)
    for place in range(1, len(right)):
        wrong = right[:place] + str((int(right[place]) + 3) % 10) + right[place + 1 :]
        assert not is_card(wrong)


def _luhn(digits: list[int]) -> bool:
    total = 0
    for place, digit in enumerate(reversed(digits)):
        doubled = digit * 2 if place % 2 else digit
        total += doubled - 9 if doubled > 9 else doubled
    return total % 10 == 0


def test_cards_of_one_digit_or_another_first_digit_are_none():
    assert not is_card("0000000000000000")
    assert not is_card("4444444444444444")
    assert not is_card("1111111111111117")


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to jan.de-vries+x@mail.example.org today", ["email"]),
        ("@handle and a@b", []),
        ("host 192.168.10.254 up", ["ip"]),
        ("version 1.2.3.4.5 and 256.1.1.1", []),
        ("at 2001:db8::8a2e:370:7334 now", ["ip"]),
        ("at 12:30:45 std::vector f::a", []),
        ("call +31 20 794 0800 or (020) 7946-0018", ["phone", "phone"]),
        ("call 555-123-4567.", ["phone"]),
        ("in 1999-2001 there were 12 345 678 of 2023-04-05", []),
        ("order 1234567890123456", []),
    ],
)
def test_kinds_are_told_apart(text, kinds):
    assert [kind for *_, kind in find(text)] == kinds


def test_scores_count_and_place_what_is_found():
    operator = get_operator("score", "pii.found")
    texts = Texts(["x", f"a@b.org {IBANS[0]} {CARDS[0]}", ""])
    signals = apply_score(operator, texts, operator.settings())
    assert signals["count"].tolist() == [0, 3, 0]
    assert [int(signals[kind][1]) for kind in KINDS] == [1, 1, 1, 0, 0, 0, 0]
    spans = signals["kind"]
    assert spans.document.tolist() == [1, 1, 1]
    assert spans.values.tolist() == [0, 1, 2]
    only = apply_score(operator, texts, operator.settings(kinds=["email"]))
    assert only["count"].tolist() == [0, 1, 0]


# Made up, and put together here, so that nobody takes this file for a leak.
TOKEN = "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiJ4In0." + "c2lnbmF0dXJl"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIB\nAAAA\n-----END RSA " + "PRIVATE KEY-----"
KEYS = [TOKEN, PEM, "AKIA" + "ABCDEFGHIJKLMNOP", "ghp" + "_" + "a1" * 18, "sk-" + "proj-" + "aB" * 20]


@pytest.mark.parametrize("key", KEYS)
def test_secret_keys_that_tell_themselves_are_found_whole(key):
    assert find(f"here: {key}, keep it") == [(6, 6 + len(key), "key")]


@pytest.mark.parametrize(
    "text",
    [
        TOKEN.replace("hbG", "hbH"),  # no JSON in it
        "eyJ0eXAiOiJKV1QifQ.eyJzdWIiOiJ4In0.c2lnbmF0dXJl",  # names no algorithm
        PEM.replace("END RSA", "END EC"),
        PEM.replace("PRIVATE", "PUBLIC"),
        "AKIA" + "ABCDEFGHIJKLMNO",
        "ghp" + "_" + "a1" * 17,
        "sk-" + "aB" * 15,
    ],
)
def test_what_only_begins_like_a_key_is_none(text):
    assert "key" not in [kind for *_, kind in find(text)]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("card 00:1A:2b:3C:4d:5E up", ["mac"]),
        ("card 00-1A-2b-3C-4d-5E", ["mac"]),
        ("00:1A-2b:3C:4d:5E, 00:1A:2b:3C:4d, 00:1A:2b:3C:4d:5E:6F", []),
    ],
)
def test_addresses_of_network_cards(text, kinds):
    assert [kind for *_, kind in find(text, ("mac",))] == kinds


PARTS = ["a@b.org", "192.168.0.1", IBANS[0], CARDS[0], "+31 20 794 0800", " ", "x", ".", "4", "-", "DE", "::"]
PARTS += [KEYS[2], TOKEN, "00:1A:2b:3C:4d:5E", ":", "A"]


@settings(max_examples=100, deadline=None)
@given(some.lists(some.sampled_from(PARTS), max_size=10).map("".join))
def test_masking_is_idempotent_and_keeps_the_rest(text):
    operator = get_operator("map", "pii.mask")
    made = apply_map(operator, Texts([text]), operator.settings())
    masked = made.texts[0] if made.texts[0] is not None else text
    assert apply_map(operator, Texts([masked]), operator.settings()).texts == [None]
    assert (masked == text) == (find(text) == [])
    pieces = re.split("|".join(f"<{kind}>" for kind in KINDS), masked)
    assert re.search(".*".join(map(re.escape, pieces)), text, re.DOTALL)


def test_a_mark_holds_nothing_that_is_masked():
    operator = get_operator("map", "pii.mask")
    with pytest.raises(PunaError, match="mark"):
        validate(operator.settings, {"mark": "x@1"}, where="test")
    made = apply_map(operator, Texts(["a@b.org!"]), operator.settings(mark="[hidden]"))
    assert made.texts == ["[hidden]!"]


def test_unwanted_words_are_the_users(tmp_path: Path):
    listed = tmp_path / "words.txt"
    listed.write_text("darn\n", encoding="utf-8")
    operator = get_operator("score", "toxicity.words")
    texts = Texts(["Darn, the darn dog!", "darned", ""])
    signals = apply_score(operator, texts, operator.settings(words=str(listed)))
    assert signals["count"].tolist() == [2, 0, 0]
    assert signals["ratio"][:2].tolist() == [0.5, 0.0]
    assert numpy.isnan(signals["ratio"][2])


def test_a_list_of_unwanted_words_is_an_asset():
    try:
        assets.fetch("profanity-words")
    except PunaError as error:
        pytest.skip(f"not within reach: {error}")
    operator = get_operator("score", "toxicity.words")
    chosen = operator.settings(words="profanity-words")
    signals = apply_score(operator, Texts(["Damn it, what the hell!", "A damnation of shellfish."]), chosen)
    assert signals["count"].tolist() == [2, 0]
    with pytest.raises(PunaError, match="cannot read a list of words"):
        apply_score(operator, Texts(["a"]), operator.settings(words="profanity-word"))
