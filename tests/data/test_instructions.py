"""The stage ``instructions``: conversations out of pairs, by tasks that the recipe gives."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from little_sources import rows_of

from puna.core.errors import PunaError
from puna.core.stage import Context, validate
from puna.data.corpus import Corpus, write_corpus
from puna.data.instructions import filled
from puna.data.settings import InstructionsParameters
from puna.data.stages import instructions

TASKS = {
    "there": {"ask": ["Vertaal: {source}", "Zeg in het Nederlands: {source}"], "answer": "{target}"},
    "back": {"ask": ["Translate: {target}"], "answer": "{source}", "system": "Be exact."},
}


def pair(number: int, **changes: Any) -> dict[str, Any]:
    tags = {"source": "app", "source_language": "en", "target_language": "nl"}
    sides = {"source_text": f"page number {number}", "target_text": f"pagina nummer {number}"}
    return {"id": f"app/a.po#{number}", **sides, **tags, **changes}


def chat(number: int, document: str = "x") -> dict[str, Any]:
    said = [{"role": "user", "content": f"hoi {number}"}, {"role": "assistant", "content": f"dag {number}"}]
    return {"id": f"talk/{document}#{number}", "messages": said, "source": "talk", "language": "nl"}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [pair(number) for number in range(60)]
    about = [{"source": "app", "licence": "MIT"}]
    return write_corpus(tmp_path / "pairs", "sentence_pairs", rows, provenance=about, ledger={}).path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    rows = [chat(number, document=f"f{number // 4}") for number in range(40)]
    about = [{"source": "talk", "licence": "BSD"}]
    return write_corpus(tmp_path / "chats", "messages", rows, provenance=about, ledger={}).path


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def run(name: str = "made", *, inputs: dict[str, Any], seed: int = 0, **parameters: Any) -> Any:
        context = Context(name=name, out=tmp_path / name, inputs=inputs, seed=seed)
        return instructions(context, validate(InstructionsParameters, parameters, where="recipe"))

    return run


def test_each_pair_becomes_one_conversation_of_a_drawn_task_and_phrasing(make: Any, pairs: Path) -> None:
    outcome = make(inputs={"pairs": {"p": pairs}}, tasks=TASKS)
    rows = {row["id"]: row for row in rows_of(outcome)}
    assert len(rows) == 60
    tasks = Counter(name.rpartition("/")[2] for name in rows)
    assert 15 < tasks["there"] < 45 and tasks.total() == 60
    openings = Counter(row["messages"][0]["content"].partition(":")[0] for row in rows.values())
    assert set(openings) == {"Vertaal", "Zeg in het Nederlands", "Be exact."}
    back = next(row for name, row in rows.items() if name.endswith("back"))
    number = back["messages"][1]["content"].split()[-1]
    assert back == {
        "id": f"app/a.po#{number}/back",
        "messages": [
            {"role": "system", "content": "Be exact."},
            {"role": "user", "content": f"Translate: pagina nummer {number}"},
            {"role": "assistant", "content": f"page number {number}"},
        ],
        "source": "app",
        "language": "en",
    }
    assert Corpus.open(outcome.outputs["train"]).meta["licences"] == ["MIT"]


def test_the_draw_depends_on_the_seed_alone(make: Any, pairs: Path) -> None:
    told: dict[str, Any] = {"inputs": {"pairs": {"p": pairs}}, "tasks": TASKS}
    first, again, other = make("1", **told), make("2", **told), make("3", **told, seed=1)
    prints = [Corpus.open(made.outputs["train"]).fingerprint for made in (first, again, other)]
    assert prints[0] == prints[1] != prints[2]


def test_every_option_of_the_stage_changes_what_comes_out(make: Any, pairs: Path, chats: Path) -> None:
    both = {"pairs": {"p": pairs}, "messages": {"c": chats}}

    def rows(**options: Any) -> list[dict[str, Any]]:
        return rows_of(make(inputs=both, **{"tasks": TASKS, **options}))

    def from_pairs(found: list[dict[str, Any]]) -> int:
        return sum(row["source"] == "app" for row in found)

    assert len(rows()) == 100
    assert from_pairs(rows(every_task=True)) == 120
    weighted = {**TASKS, "back": {**TASKS["back"], "weight": 1e9}}
    assert all(row["id"].endswith("back") for row in rows(tasks=weighted) if row["source"] == "app")
    assert {row["language"] for row in rows(language="fy") if row["source"] == "app"} == {"fy"}
    assert len(rows(min_words=4)) == 40
    assert len(rows(max_characters=20)) == 40
    assert from_pairs(rows(limit=7)) == 7
    shared = rows(limit=30, messages_share=0.25)
    assert (len(shared), from_pairs(shared)) == (40, 30)
    assert len(rows(messages_share=0.9)) == 100


def test_what_is_left_out_is_counted(make: Any, pairs: Path, chats: Path) -> None:
    outcome = make(
        inputs={"pairs": {"p": pairs}, "messages": {"c": chats}}, tasks=TASKS, limit=10, messages_share=0.5
    )
    assert outcome.metrics["rows.train"] == 20
    assert outcome.metrics["dropped.train.over_the_limit"] == 50 + 30


def test_a_conversation_that_is_too_long_is_counted_though_another_of_its_pair_fits(
    make: Any, pairs: Path, chats: Path
) -> None:
    inputs = {"pairs": {"p": pairs}, "messages": {"c": chats}}
    tasks = {**TASKS, "there": {"ask": ["Zeg in het Nederlands alsjeblieft: {source}"], "answer": "{target}"}}
    outcome = make(inputs=inputs, tasks=tasks, every_task=True, max_characters=55, min_words=2)
    names = Counter(row["id"].rpartition("/")[2] for row in rows_of(outcome) if row["source"] == "app")
    assert names == {"back": 60}
    assert outcome.metrics["dropped.train.too_long"] == 60
    ledger = Corpus.open(outcome.outputs["train"]).meta["ledger"]
    counts = {(tally["unit"], tally["read"], tally["kept"]) for tally in ledger.values()}
    assert counts == {("rows", 60, 60), ("conversations", 120, 60), ("rows", 40, 40)}


def test_chats_alone_need_no_task_and_are_only_shuffled(make: Any, chats: Path) -> None:
    rows = rows_of(make(inputs={"messages": {"c": chats}}))
    assert sorted(rows, key=lambda row: row["id"]) == sorted(
        Corpus.open(chats).rows(), key=lambda row: row["id"]
    )
    assert rows != list(Corpus.open(chats).rows())


def test_held_out_corpora_become_held_out_conversations_and_their_words_are_not_trained_on(
    make: Any, pairs: Path, tmp_path: Path
) -> None:
    long = " ".join(f"w{number}" for number in range(13))
    apart = [pair(1, id="other/b.po#1", target_text=f"nieuw {long}"), pair(2, id="other/b.po#2")]
    held = write_corpus(tmp_path / "held", "sentence_pairs", apart, provenance=[], ledger={}).path
    rows = [pair(3), pair(4, target_text=f"{long} oud")]
    train = write_corpus(tmp_path / "train", "sentence_pairs", rows, provenance=[], ledger={}).path
    inputs = {"pairs": {"p": train}, "held_out": {"h": held}}
    outcome = make(inputs=inputs, tasks=TASKS)
    assert [row["id"].rpartition("/")[0] for row in rows_of(outcome)] == ["app/a.po#3"]
    assert len(rows_of(outcome, "held_out")) == 2
    assert outcome.metrics["dropped.train.13_words_in_a_row_held_out"] == 1
    assert outcome.metrics["leak.rows"] == 0
    assert make("report", inputs=inputs, tasks=TASKS, leak="report").metrics["leak.rows"] == 1
    assert make("more", inputs=inputs, tasks=TASKS, leak_words=14).metrics["rows.train"] == 2
    with pytest.raises(PunaError, match="shares 13 words"):
        make("error", inputs=inputs, tasks=TASKS, leak="error")


def test_a_share_is_held_out_by_source_document(make: Any, chats: Path) -> None:
    outcome = make(inputs={"messages": {"c": chats}}, held_out_share=0.4)
    sides = [
        {row["id"].partition("#")[0] for row in rows_of(outcome, side)} for side in ("train", "held_out")
    ]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 10
    assert outcome.metrics["rows.train"] + outcome.metrics["rows.held_out"] == 40


def test_mistakes_in_inputs_and_tasks_are_told(make: Any, pairs: Path, chats: Path, tmp_path: Path) -> None:
    text = {"id": "1", "text": "x", "source": "s", "language": "nl"}
    documents = write_corpus(tmp_path / "d", "documents", [text], provenance=[], ledger={}).path
    for inputs, parameters, words in (
        ({}, {}, "need pairs or messages"),
        ({"pairs": {"p": pairs}}, {}, "no task tells"),
        ({"pairs": {"p": chats}}, {"tasks": TASKS}, "another kind"),
        ({"messages": {"c": chats}, "held_out": {"h": documents}}, {}, "held out can be pairs or messages"),
        ({"messages": {"c": chats}, "held_out": {"h": chats}}, {"held_out_share": 0.1}, "of no use"),
        ({"pairs": {"p": pairs}}, {"tasks": {"t": {"ask": ["Vertaal"]}}}, "holds neither"),
        ({"pairs": {"p": pairs}}, {"tasks": {"t": {"ask": ["{target}?"]}}}, "already holds its answer"),
        ({"pairs": {"p": pairs}}, {"tasks": {"t": {"ask": ["{source}"], "answer": "x"}}}, "the answer holds"),
    ):
        with pytest.raises(PunaError, match=words):
            make(inputs=inputs, **parameters)


def test_braces_in_the_text_and_the_template_stay() -> None:
    row = pair(1, source_text="{target} of {0} {name}")
    assert filled("{x} {source} {}", row) == "{x} {target} of {0} {name} {}"
