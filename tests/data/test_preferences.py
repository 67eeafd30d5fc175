"""The stage ``preferences``: right answers beside spoilt ones."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from little_sources import rows_of

from puna.core.errors import PunaError
from puna.core.stage import Context, validate
from puna.data.corpus import Corpus, write_corpus
from puna.data.preferences import repeated, truncated
from puna.data.settings import PreferencesParameters
from puna.data.stages import preferences

NAMES = ("another_answer", "repeated", "truncated", "untranslated")


def pair(number: int) -> dict[str, Any]:
    sides = {"source_text": f"page number {number}", "target_text": f"pagina nummer {number}"}
    return {"id": f"p#{number}", **sides, "source": "p", "source_language": "en", "target_language": "nl"}


def chat(number: int, document: str, **changes: Any) -> dict[str, Any]:
    said = [
        {"role": "user", "content": f"Vertaal: page number {number}"},
        {"role": "assistant", "content": f"pagina nummer {number}"},
    ]
    row = {"id": f"talk/{document}#{number}", "messages": said, "source": "talk", "language": "nl"}
    return {**row, **changes}


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    about = [{"source": "talk", "licence": "BSD"}]
    return write_corpus(folder, kind, rows, provenance=about, ledger={}).path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write(tmp_path / "chats", "messages", [chat(n, f"f{n // 4}") for n in range(80)])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs", "sentence_pairs", [pair(n) for n in range(80)])


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def run(
        *corpora: Path, pairs: Any = (), held_out: Any = (), seed: int = 0, name: str = "made", **given: Any
    ) -> Any:
        inputs = {
            key: {str(number): path for number, path in enumerate(paths)}
            for key, paths in (("messages", corpora), ("pairs", pairs), ("held_out", held_out))
        }
        context = Context(name=name, out=tmp_path / name, inputs=inputs, seed=seed)
        return preferences(context, validate(PreferencesParameters, given, where="recipe"))

    return run


def said(row: dict[str, Any], side: str) -> str:
    (message,) = row[side]
    assert message["role"] == "assistant"
    return str(message["content"])


def test_the_answer_is_chosen_and_each_way_to_spoil_it_is_drawn(make: Any, chats: Path, pairs: Path) -> None:
    rows = rows_of(make(chats, pairs=[pairs]))
    assert len(rows) == 80
    made: Counter[str] = Counter()
    for row in rows:
        original, _, name = row["id"].rpartition("/")
        number = original.rpartition("#")[2]
        chosen, rejected = said(row, "chosen"), said(row, "rejected")
        assert row["prompt"] == [{"role": "user", "content": f"Vertaal: page number {number}"}]
        assert chosen == f"pagina nummer {number}" and rejected != chosen
        made[name] += 1
        if name == "another_answer":
            assert rejected.startswith("pagina nummer ") and abs(len(rejected) - len(chosen)) <= 1
        elif name == "untranslated":
            assert rejected == f"page number {number}"
        elif name == "repeated":
            assert rejected == chosen + 4 * f" {number}"
        else:
            assert rejected == "pagina"
    assert set(made) == set(NAMES) and min(made.values()) >= 10


def test_weights_of_corruptions_are_followed(make: Any, chats: Path) -> None:
    outcome = make(chats, corruptions={"repeated": 9, "truncated": 1})
    made = Counter(row["id"].rpartition("/")[2] for row in rows_of(outcome))
    assert made["repeated"] > 60 > 20 > made["truncated"] > 0


def test_without_pairs_nothing_is_left_untranslated(make: Any, chats: Path) -> None:
    made = {row["id"].rpartition("/")[2] for row in rows_of(make(chats))}
    assert made == {"another_answer", "repeated", "truncated"}


def test_the_draw_depends_on_the_seed_alone(make: Any, chats: Path) -> None:
    first, again, other = (
        rows_of(make(chats, seed=seed, name=name)) for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert first == again != other


def test_what_applies_to_no_answer_leaves_the_draw_to_the_others(make: Any, tmp_path: Path) -> None:
    word = [{"role": "user", "content": "Zeg hoi"}, {"role": "assistant", "content": "hoi"}]
    chats = write(tmp_path / "one", "messages", [chat(0, "x", messages=word)])
    weights = {"truncated": 1000, "another_answer": 1000, "repeated": 0.001}
    (row,) = rows_of(make(chats, corruptions=weights))
    assert row["id"].endswith("/repeated") and said(row, "rejected") == "hoi hoi hoi hoi hoi"
    with pytest.raises(PunaError, match="no row is left"):
        make(chats, name="none", corruptions={"truncated": 1})


def test_another_answer_is_never_one_to_the_same_request(make: Any, tmp_path: Path) -> None:
    def asked(number: int, request: str) -> dict[str, Any]:
        answer = {"role": "assistant", "content": f"ja {number}"}
        return chat(number, "x", messages=[{"role": "user", "content": request}, answer])

    rows = [asked(number, "Wat?") for number in range(5)]
    chats = write(tmp_path / "same", "messages", [*rows, asked(7, "Wie?")])
    found = rows_of(make(chats, corruptions={"another_answer": 1}))
    assert {said(row, "rejected") for row in found if "#7" not in row["id"]} == {"ja 7"}


def test_conversations_without_an_answer_are_counted(make: Any, tmp_path: Path) -> None:
    hello, hi = {"role": "user", "content": "hoi"}, {"role": "assistant", "content": "dag lieve mensen"}
    unfit = [[hello], [hi], [hello, hi, hello], [{"role": "system", "content": "x"}, hi]]
    talks = [chat(n, "x", messages=said) for n, said in enumerate([*unfit, [hello, hi, hello, hi]])]
    outcome = make(write(tmp_path / "unfit", "messages", talks))
    (row,) = rows_of(outcome)
    assert row["prompt"] == [hello, hi, hello] and row["chosen"] == [hi]
    ledger = Corpus.open(outcome.outputs["train"]).meta["ledger"]
    assert {name: (t["read"], t["kept"]) for name, t in ledger.items()} == {
        f"{tmp_path.name}/unfit": (5, 1),
        "rejected answers": (1, 1),
    }


def test_a_share_held_out_keeps_documents_and_their_answers_apart(make: Any, chats: Path) -> None:
    outcome = make(chats, held_out_share=0.3)
    sides = {side: rows_of(outcome, side) for side in ("train", "held_out")}
    assert sum(map(len, sides.values())) == 80
    documents = {side: {row["id"].partition("#")[0] for row in rows} for side, rows in sides.items()}
    assert documents["train"] and documents["held_out"]
    assert not documents["train"] & documents["held_out"]
    answers = {side: {said(row, "chosen") for row in rows} for side, rows in sides.items()}
    for side, other in (("train", "held_out"), ("held_out", "train")):
        assert not {said(row, "rejected") for row in sides[side]} & answers[other]


def test_held_out_corpora_are_held_out_and_their_words_not_trained_on(make: Any, tmp_path: Path) -> None:
    def long(number: int, word: str) -> dict[str, Any]:
        words = " ".join(f"{word}{n}" for n in range(14))
        said = [{"role": "user", "content": "Vertel"}, {"role": "assistant", "content": words}]
        return chat(number, "x", messages=said)

    train = write(tmp_path / "train", "messages", [long(0, "a"), long(1, "b")])
    apart = write(tmp_path / "apart", "messages", [long(2, "a"), long(3, "c")])
    outcome = make(train, held_out=[apart])
    assert [row["id"].partition("/repeated")[0].partition("/trunc")[0] for row in rows_of(outcome)] == [
        "talk/x#1"
    ]
    assert len(rows_of(outcome, "held_out")) == 2
    assert outcome.metrics["dropped.train.13_words_in_a_row_held_out"] == 1
    with pytest.raises(PunaError, match="held_out_share"):
        make(train, held_out=[apart], name="both", held_out_share=0.1)
    with pytest.raises(PunaError, match="shares 13 words"):
        make(train, held_out=[apart], name="error", leak="error")
    report = make(train, held_out=[apart], name="report", leak="report")
    assert len(rows_of(report)) == 2 and report.metrics["leak.rows"] == 1


def test_provenance_is_that_of_the_conversations(make: Any, chats: Path) -> None:
    corpus = Corpus.open(make(chats).outputs["train"])
    assert corpus.meta["licences"] == ["BSD"] and corpus.kind == "preferences"


def test_untranslated_and_pairs_go_together(make: Any, chats: Path, pairs: Path) -> None:
    with pytest.raises(PunaError, match="go together"):
        make(chats, corruptions={"untranslated": 1})
    with pytest.raises(PunaError, match="go together"):
        make(chats, pairs=[pairs], corruptions={"repeated": 1})
    with pytest.raises(PunaError, match="a corpus of another kind"):
        make(pairs)


@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=30))
def test_spoilt_answers_differ_from_the_answer_and_keep_its_beginning(words: list[str]) -> None:
    answer = " ".join(words)
    assert repeated(answer).startswith(f"{answer} ") and repeated(answer).endswith(words[-1])
    half = truncated(answer)
    if len(words) == 1:
        assert half is None
    else:
        assert half is not None and answer.startswith(f"{half} ")
