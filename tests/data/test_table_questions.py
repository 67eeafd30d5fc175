"""Planted questions have the answers that they say, and nothing of them leaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.core.stage import Context, get_stage, validate
from puna.data.tables import planting
from puna.data.tables.columns import gain, informative, mutual_information
from puna.data.tables.grouping import group, k_means
from puna.data.tables.making import make
from puna.data.tables.questions import NO, YES, Question, read, write
from puna.data.tables.settings import TableQuestions
from puna.data.tables.table import Table

CITIES = ("Amsterdam", "Rotterdam", "Utrecht", "Groningen", "Maastricht")
TABLE = Table(
    "little",
    ("name", "city", "zip"),
    [
        {
            "name": f"person{number} {'abcdefghij'[number % 10] * 3}",
            "city": CITIES[number % 5],
            "zip": f"{1000 + number}",
        }
        for number in range(120)
    ],
)


@settings(deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=500), min_size=1), st.integers(0, 50))
def test_a_misspelling_differs_by_more_than_letter_case(value: str, seed: int) -> None:
    generator = numpy_generator(seed, "test")
    if not any(letter.isalnum() for letter in value):
        with pytest.raises(PunaError, match="without letters"):
            planting.misspelt(value, generator)
        return
    found = planting.misspelt(value, generator)
    assert found.casefold() != value.casefold() and abs(len(found) - len(value)) <= 1


def test_planted_errors_are_in_no_other_cell_and_the_share_is_exact() -> None:
    made = planting.error_questions(TABLE, ["city"], 60, share=0.3, seed=1)
    wrong = [question for question in made if question.answer == YES]
    assert len(wrong) == 18
    assert all(question.records[0]["city"] not in CITIES for question in wrong)
    assert all(question.records[0]["city"] in CITIES for question in made if question.answer == NO)
    names = [question.records[0]["name"] for question in made]
    assert len(set(names)) == len(names)  # a row serves once


def test_a_seed_plants_the_same_and_another_seed_others() -> None:
    def draw(seed: int) -> list[Question]:
        return planting.duplicate_questions(TABLE, TABLE.columns, 20, share=0.5, edits=1, seed=seed)

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_planted_duplicates_differ_in_the_edited_cells_alone() -> None:
    by_name = {row["zip"]: row for row in TABLE.rows}
    for question in planting.duplicate_questions(TABLE, ["name", "city"], 30, share=0.5, edits=1, seed=0):
        first, second = question.records
        changed = sum(first[column] != second[column] for column in TABLE.columns)
        if question.answer == YES:
            assert changed == 1 and first["zip"] == second["zip"] and by_name[first["zip"]] in (first, second)
        else:
            assert first["zip"] != second["zip"]


def test_gaps_are_empty_and_the_choices_are_the_commonest_values() -> None:
    skewed = Table("t", TABLE.columns, [*TABLE.rows, *(dict(row, city="Utrecht") for row in TABLE.rows[:20])])
    made = planting.imputation_questions(skewed, "city", 40, choices=3, seed=0)
    for question in made:
        assert question.records[0]["city"] is None
        assert question.choices[0] == "Utrecht" and len(question.choices) == 3
        assert question.answer in question.choices


def test_attributes_of_a_schema_share_no_value_of_one_half() -> None:
    made = planting.schema_questions(TABLE, 40, share=0.5, values=2, seed=0)
    pairs = {"Nm": "name", "Cty": "city", "Zp": "zip"}
    for question in made:
        names = {str(row["name"]) for row in question.records}
        (short,) = names & set(pairs)
        (full,) = names - {short}
        assert (pairs[short] == full) == (question.answer == YES)


def test_examples_are_balanced_and_are_not_asked() -> None:
    made = planting.error_questions(TABLE, ["city", "name"], 50, share=0.2, seed=0)
    ordered = planting.as_examples(made, 6)
    examples = [question for question in ordered if question.role == "example"]
    assert ordered[:6] == examples and len(ordered) == 50
    assert [question.answer for question in examples].count(YES) == 3
    shown = {question.records[0]["zip"] for question in examples}
    assert shown.isdisjoint(question.records[0]["zip"] for question in ordered[6:])
    with pytest.raises(PunaError, match="too few"):
        planting.as_examples(made, 51)


def test_reasons_say_how_two_rows_compare() -> None:
    said = planting.compared(
        {"a": "Anna", "b": "x", "c": "one", "d": None}, {"a": "anna", "b": "y", "c": "onee", "d": "z"}
    )
    assert said == "A agree; c are alike; b differ." or said.casefold() == "a agree; c are alike; b differ."


def test_questions_come_back_from_their_file(tmp_path: Path) -> None:
    made = planting.as_examples(planting.error_questions(TABLE, ["city"], 9, share=0.5, seed=0), 3)
    odd = Question("error_detection", ({"a": "line\u2028break", "b": None},), "a")
    write([*made, odd], tmp_path / "q.jsonl")
    assert read(tmp_path / "q.jsonl") == [*made, odd]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a line of JSON"),
        ("[]", "not a question"),
        ({"task": "guess", "records": []}, "error_detection"),
        ({"task": "imputation", "records": [{"a": 3}], "column": "a"}, "texts and nulls"),
        ({"task": "imputation", "records": [{"a": "x"}], "column": "b"}, "names a column"),
        ({"task": "entity_matching", "records": [{"a": "x"}]}, "about 2 rows"),
        ({"task": "imputation", "records": [{"a": "x"}], "column": "a", "extra": 1}, "not a question"),
        ({"task": "entity_matching", "records": [{}, {}], "answer": "Maybe"}, "none of the choices"),
        ({"task": "entity_matching", "records": [{}, {}], "role": "both"}, "role 'both'"),
        ({"task": "entity_matching", "records": [{}, {}], "choices": [1]}, "list of texts"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: Any, said: str) -> None:
    good = json.dumps({"task": "entity_matching", "records": [{}, {}]})
    text = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "q.jsonl").write_text(f"{good}\n{text}\n")
    with pytest.raises(PunaError) as caught:
        read(tmp_path / "q.jsonl")
    assert "line 2" in str(caught.value) and said in str(caught.value)


def test_mutual_information_against_its_definition() -> None:
    assert mutual_information("aabb", "xxyy") == pytest.approx(1.0)
    assert mutual_information("aabb", "xyxy") == pytest.approx(0.0)


def test_noise_columns_tell_nothing_and_telling_ones_are_found() -> None:
    rng = numpy_generator(0, "test")
    made = []
    for number in range(60):
        same = number % 2 == 0
        key = str(int(rng.integers(10**6)))
        other = key if same else str(int(rng.integers(10**6)))
        made.append(Question("entity_matching", ({"key": key}, {"key": other}), answer=YES if same else NO))
    noisy = planting.with_noise(made, 6, 0)
    assert len(noisy[0].records[0]) == 7
    assert informative(noisy, 0) == ["key"]
    assert gain(noisy, "key", 0) > 0.3


def test_where_no_column_tells_anything_all_are_kept() -> None:
    unlabelled = [Question("entity_matching", ({"a": "1", "b": "2"}, {"a": "1", "b": "2"}))]
    assert informative(unlabelled, 0) == ["a", "b"]


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from(["random", "clusters"]), st.integers(0, 5))
def test_every_question_is_in_one_group_of_the_size(count: int, size: int, how: Any, seed: int) -> None:
    asked = [Question("error_detection", ({"a": f"value {number}"},), "a") for number in range(count)]
    groups = group(asked, size, how, seed)
    assert sorted(place for places in groups for place in places) == list(range(count))
    assert all(len(places) == size for places in groups[:-1]) and 1 <= len(groups[-1]) <= size


def test_clusters_put_alike_rows_together() -> None:
    kinds = ["aaaa bbbb cccc", "dddd eeee ffff", "1111 2222 3333", "wxyz vuts rqpo"]
    asked = [Question("error_detection", ({"a": kinds[number % 4]},), "a") for number in range(40)]

    def mixed(how: Any) -> int:
        groups = group(asked, 10, how, 0)
        return sum(len({asked[place].records[0]["a"] for place in places}) for places in groups)

    assert mixed("clusters") == 4 < mixed("random")


def test_k_means_finds_separate_clouds() -> None:
    rng = numpy_generator(0, "clouds")
    points = rng.normal(size=(60, 3)) * 0.01 + rng.permutation(60)[:, None] % 3
    labels = k_means(points, 3, rng)
    assert all(len(set(labels[points[:, 0].round() == cloud])) == 1 for cloud in range(3))
    assert len(set(labels)) == 3


def test_a_table_of_the_users_is_asked_about_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("name,city,size\nann,Utrecht,3\nbob,,4\ncid,Utrecht,\ndan,Ede,3\n")
    common: dict[str, Any] = {"table": str(file), "planted": False}

    gaps = make(TableQuestions(task="imputation", about=("city",), examples=2, choices=2, **common), 0)
    assert [question.role for question in gaps] == ["example", "example", "asked"]
    assert gaps[2].records == ({"name": "bob", "city": None, "size": "4"},) and gaps[2].answer is None
    assert gaps[2].choices == ("Utrecht", "Ede")

    cells = make(TableQuestions(task="error_detection", about=("city",), **common), 0)
    assert [question.records[0]["name"] for question in cells] == ["ann", "cid", "dan"]

    pairs = make(TableQuestions(task="entity_matching", about=("size",), **common), 0)
    assert [tuple(row["name"] for row in question.records) for question in pairs] == [("ann", "dan")]

    both = make(TableQuestions(task="schema_matching", other=str(file), **common), 0)
    assert len(both) == 9 and both[0].records[0] == {"name": "name", "values": "ann; bob; cid"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"task": "imputation", "table": "x"}, "one column"),
        ({"task": "schema_matching", "table": "x", "planted": False}, "other"),
        ({"task": "error_detection", "table": "x", "planted": False, "examples": 2}, "only imputation"),
        ({"task": "error_detection", "table": "x", "other": "y"}, "other is for"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(PunaError, match=said):
        validate(TableQuestions, values, where="test")


def test_the_stage_writes_questions_and_counts_them(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    lines = [f"{row['name']},{row['city']},{row['zip']}" for row in TABLE.rows]
    file.write_text("name,city,zip\n" + "\n".join(lines) + "\n")
    parameters = TableQuestions(
        task="entity_matching", table=str(file), questions=20, examples=4, noise_columns=2, share=0.25
    )
    outcome = get_stage("table_questions").function(Context("q", tmp_path, {}, seed=1), parameters)
    counts = {"asked": 20.0, "examples": 4.0, "rows": 120.0 + 48.0, "broken_rows": 0.0}
    assert outcome.metrics == {**counts, "yes": pytest.approx(0.2)}
    assert len(read(outcome.outputs["questions"])) == 24
