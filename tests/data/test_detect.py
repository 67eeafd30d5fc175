"""The field's formats are told from their columns, and rows turned into ours."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.data.detect import FORMATS, Languages, detect
from puna.data.kinds import BadRowError, check_row

LANGUAGES = Languages("xx", "en", "nl")
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
WRONG = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Reken."}

GOOD: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("raw text", {"text": "een"}, {"text": "een", "language": "xx"}),
    ("raw text", {"text": "een", "language": "nl"}, {"text": "een", "language": "nl"}),
    ("OpenAI messages", {"messages": [USER, {**ANSWER, "name": None}]}, {"messages": [USER, ANSWER]}),
    (
        "ShareGPT",
        {
            "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
            "system": "Reken.",
        },
        {"messages": [SYSTEM, USER, ANSWER]},
    ),
    ("Alpaca", {"instruction": "2+2?", "output": "4", "input": ""}, {"messages": [USER, ANSWER]}),
    (
        "Alpaca",
        {
            "instruction": "Tel op",
            "input": "2+2",
            "output": "4",
            "system": "Reken.",
            "history": [["Tel op\n1+1", "2"]],
        },
        {
            "messages": [
                SYSTEM,
                {"role": "user", "content": "Tel op\n1+1"},
                {"role": "assistant", "content": "2"},
                {"role": "user", "content": "Tel op\n\n2+2"},
                ANSWER,
            ]
        },
    ),
    ("prompt-completion", {"prompt": "2+2?", "completion": "4"}, {"messages": [USER, ANSWER]}),
    (
        "prompt-completion",
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        {"messages": [SYSTEM, USER, ANSWER]},
    ),
    (
        "preference",
        {"prompt": "2+2?", "chosen": "4", "rejected": [WRONG]},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WRONG]},
    ),
    (
        "implicit preference",
        {"chosen": [USER, ANSWER], "rejected": [USER, WRONG]},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WRONG]},
    ),
    (
        "sentence pairs",
        {"source_text": "four", "target_text": "vier"},
        {"source_text": "four", "target_text": "vier", "source_language": "en", "target_language": "nl"},
    ),
    (
        "translation",
        {"translation": {"en": "four", "nl": "vier", "de": "vier"}},
        {"source_text": "four", "target_text": "vier", "source_language": "en", "target_language": "nl"},
    ),
]


@pytest.mark.parametrize(("name", "raw", "expected"), GOOD)
def test_each_format_is_found_and_its_rows_turned(
    name: str, raw: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = detect(raw)
    assert found.format.name == name
    row = found.convert(raw, LANGUAGES)
    if found.format.kind != "sentence_pairs":
        expected = {"language": "xx", **expected}
    assert row == expected
    check_row(found.format.kind, {**row, "id": "1", "source": "s"})


@given(st.sampled_from(FORMATS), st.sets(st.sampled_from(["score", "meta", "url"])), st.randoms())
def test_more_columns_and_their_order_do_not_matter(format_: Any, more: set[str], order: Any) -> None:
    columns = [*format_.needed, *more]
    order.shuffle(columns)
    found = detect(columns)
    assert found.format == format_ and set(found.unused) == more


@given(st.sampled_from(FORMATS))
def test_renamed_columns_are_found_under_their_own_names(format_: Any) -> None:
    rename = {column: f"my_{column}" for column in format_.needed}
    found = detect(rename.values(), rename=rename)
    assert found.format == format_ and found.mapping == rename


def test_the_decision_names_what_is_used_and_what_is_not() -> None:
    assert str(detect(["body", "url", "language"], rename={"text": "body"})) == (
        "raw text -> documents (text from body, language; not used: url)"
    )


def test_with_a_kind_only_its_formats_are_tried() -> None:
    columns = ["messages", "text"]
    assert detect(columns).format.kind == "messages"
    assert detect(columns, kind="documents").format.name == "raw text"
    with pytest.raises(PunaError, match=r"(?s)no format of preferences.*messages, text.*chosen"):
        detect(columns, kind="preferences")


def test_unknown_columns_are_told_with_the_known_formats() -> None:
    with pytest.raises(
        PunaError, match=r"(?s)data\.jsonl:1.*body, title.*Alpaca: instruction, output.*columns:"
    ):
        detect(["body", "title"], where="data.jsonl:1")
    with pytest.raises(PunaError, match=r"(?s)no column 'boddy'.*did you mean 'body'"):
        detect(["body"], rename={"text": "boddy"})


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({"text": None}, "text"),
        ({"text": ["a"]}, "text"),
        ({"text": ""}, "text"),
        ({"text": "a", "language": 3}, "language"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{**USER, "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]"),
        ({"conversations": {}}, "conversations"),
        ({"conversations": [{"from": "human"}]}, "conversations[0]"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "conversations[0].from"),
        ({"conversations": [{"from": "human", "value": "x"}], "system": 3}, "system"),
        ({"instruction": "", "output": "x"}, "instruction"),
        ({"instruction": "x", "output": 3}, "output"),
        ({"instruction": "x", "output": "y", "input": 3}, "input"),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "history[0]"),
        ({"prompt": 3, "completion": "x"}, "prompt"),
        ({"prompt": "x", "completion": ""}, "completion"),
        ({"prompt": "x", "chosen": "y", "rejected": []}, "rejected"),
        ({"chosen": [USER], "rejected": [USER]}, "rejected"),
        ({"chosen": [USER, ANSWER], "rejected": [ANSWER]}, "rejected"),
        ({"source_text": "x", "target_text": " "}, "target_text"),
        ({"translation": "x"}, "translation"),
        ({"translation": {"en": "x"}}, "translation"),
    ],
)
def test_a_bad_row_is_told_by_its_field(raw: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRowError) as error:
        detect(raw).convert(raw, LANGUAGES)
    assert error.value.field == field
