"""The stage ``corpus`` from sources to split, checked corpora."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from little_sources import entry, po, rows_of
from rich.console import Console

from puna.core import assets
from puna.core.errors import PunaError
from puna.core.stage import Context, all_stages, get_stage, validate
from puna.data.corpus import Corpus
from puna.data.describe import describe
from puna.data.settings import CorpusParameters
from puna.data.stages import corpus

LONG = "een twee drie vier vijf zes zeven acht negen tien elf twaalf dertien"
NL = "locale/nl/LC_MESSAGES"


@pytest.fixture
def two(write: Any) -> list[dict[str, str]]:
    """Two catalogues that share a short message and, inside longer ones, a run of words."""
    a = po(
        entry("Save", "Opslaan"), entry("a", f"Eerst {LONG}."), entry("b", "Alleen hier"), entry("c", "Naam")
    )
    b = po(
        entry("Save", "Opslaan"), entry("x", f"{LONG} en meer"), entry("n", "Naam"), entry("d", "Ook anders")
    )
    return [
        {"path": str(write("a.po", a)), "name": "a", "licence": "MIT"},
        {"path": str(write("b.po", b)), "name": "b"},
    ]


def test_messages_become_documents_without_what_is_held_out(make: Any, two: Any, tmp_path: Path) -> None:
    outcome, context = make(sources=[{**s, "language": "nl"} for s in two], held_out={"sources": ["b"]})
    assert rows_of(outcome) == [{"id": "a/a.po#2", "text": "Alleen hier", "source": "a", "language": "nl"}]
    assert [row["text"] for row in rows_of(outcome, "held_out")] == [
        f"Opslaan\n{LONG} en meer\nNaam\nOok anders"
    ]
    assert outcome.metrics == {
        "rows.train": 1,
        "words.train": 2,
        "bytes.train": 11,
        "dropped.train.also_held_out": 2,
        "dropped.train.13_words_in_a_row_held_out": 1,
        "rows.held_out": 1,
        "words.held_out": 19,
        "bytes.held_out": len(f"Opslaan\n{LONG} en meer\nNaam\nOok anders"),
        "leak.checked": 1,
        "leak.rows": 0,
    }
    made = Corpus.open(outcome.outputs["train"])
    assert list(made.meta["ledger"]) == [
        "a: read",
        "a: duplicates",
        "a: shared with held-out",
        "a: joined, shared with held-out",
    ]
    assert made.meta["ledger"]["a: duplicates"]["read"] == made.meta["ledger"]["a: read"]["kept"] == 4
    entry_ = made.meta["provenance"][0]
    assert (entry_["source"], entry_["format"], entry_["licence"], entry_["rows"]) == (
        "a",
        "gettext",
        "MIT",
        1,
    )
    titles = [table["title"] for table in context.report["tables"]]
    assert titles == ["Corpus", "Read, kept, dropped", "Leak check: 13 words in a row"]
    assert json.dumps(context.report)


def test_leaks_can_be_reported_or_be_an_error_instead(make: Any, two: Any, capsys: Any) -> None:
    told = {"sources": two, "language": "nl", "held_out": {"sources": ["b"]}}
    outcome, context = make(**told, leak="report")
    assert outcome.metrics["leak.rows"] == 1 and LONG in rows_of(outcome)[0]["text"]
    assert f"a/a.po#1 and b/b.po#0: {LONG}" in capsys.readouterr().err.replace("\n", " ").replace("  ", " ")
    assert context.report["tables"][2]["rows"][1] == ["a/a.po#1", "b/b.po#0", LONG]
    with pytest.raises(PunaError, match=r"(?s)a/a\.po#1: training text shares 13 words.*b/b\.po#0"):
        make(**told, leak="error")
    assert make(**told, leak="error", leak_words=14)[0].metrics["leak.rows"] == 0


def test_every_option_of_the_stage_changes_what_comes_out(make: Any, two: Any) -> None:
    told = {"sources": two, "language": "nl", "held_out": {"sources": ["b"]}}

    def made(**options: Any) -> list[str]:
        return [row["text"] for row in rows_of(make(**{**told, **options})[0])]

    assert made(deduplicate=False) == ["Opslaan\nAlleen hier\nNaam"]
    assert made(deduplicate=False, document_characters=8) == ["Opslaan", "Alleen hier", "Naam"]
    assert made(deduplicate=False, document_characters=None) == ["Opslaan", "Alleen hier", "Naam"]
    assert made(deduplicate=False, min_words=2) == ["Alleen hier"]
    assert made(deduplicate=False, max_characters=7) == ["Opslaan\nNaam"]
    assert len(made(leak_words=14)[0]) > 70
    assert made(held_out={"sources": []}, document_characters=None)[-1] == "Ook anders"
    assert rows_of(make(**{**told, "language": "nl-BE"})[0])[0]["language"] == "nl-BE"


def test_pairs_are_split_and_compared_as_pairs(make: Any, two: Any) -> None:
    outcome, _ = make(kind="sentence_pairs", sources=two, language="nl", held_out={"sources": ["b"]})
    pairs = [(row["source_text"], row["target_text"]) for row in rows_of(outcome)]
    assert pairs == [("b", "Alleen hier"), ("c", "Naam")]
    assert outcome.metrics["dropped.train.also_held_out"] == 1


@pytest.fixture
def lines(write: Any) -> str:
    return str(write("lines.jsonl", [{"text": f"regel {number}"} for number in range(200)]))


def test_a_share_of_the_rows_is_held_out_and_none_is_lost(make: Any, lines: str) -> None:
    outcome, _ = make(sources=[{"path": lines}], held_out={"share": 0.25})
    train, held_out = ({row["id"] for row in rows_of(outcome, side)} for side in ("train", "held_out"))
    assert len(train | held_out) == 200 and not train & held_out and 30 < len(held_out) < 70
    again, _ = make("again", sources=[{"path": lines}], held_out={"share": 0.25})
    other, _ = make("other", sources=[{"path": lines}], held_out={"share": 0.25}, seed=1)
    own, _ = make("own", sources=[{"path": lines}], held_out={"share": 0.25, "seed": 0}, seed=1)
    prints = [Corpus.open(made.outputs["train"]).fingerprint for made in (outcome, again, other, own)]
    assert prints[0] == prints[1] == prints[3] != prints[2]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from(["a b", "c", "d e f", " ", "a b"]), min_size=1, max_size=12), st.integers(0, 3)
)
def test_counts_add_up_over_all_steps(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], min_words: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    source = {"path": str(folder / "a.jsonl"), "on_bad_row": "skip"}
    values = {"sources": [source], "min_words": min_words}
    parameters = validate(CorpusParameters, values, where="x")
    try:
        outcome = corpus(Context("c", folder / "out", inputs={}), parameters)
    except PunaError as error:
        assert "no row is left" in str(error) or "no known format" in str(error) or "empty" in str(error)
        return
    metrics = outcome.metrics
    dropped = sum(value for name, value in metrics.items() if name.startswith("dropped"))
    assert metrics["rows.train"] + dropped == len(rows)


def test_without_anything_held_out_there_is_one_corpus(make: Any, lines: str) -> None:
    outcome, context = make(sources=[{"path": lines, "name": "l"}])
    assert list(outcome.outputs) == ["train"] and "leak.rows" not in outcome.metrics
    assert [table["title"] for table in context.report["tables"]] == ["Corpus", "Read, kept, dropped"]
    assert rows_of(outcome)[0] == {
        "id": "l/lines.jsonl:1",
        "text": "regel 0",
        "source": "l",
        "language": "und",
    }


def test_mistakes_in_sources_and_split_are_told(make: Any, lines: str, two: Any) -> None:
    with pytest.raises(PunaError, match="same name"):
        make(sources=[{"path": lines}, {"path": lines}])
    with pytest.raises(PunaError, match=r"(?s)gives no messages.*documents or sentence_pairs"):
        make(kind="messages", sources=two, language="nl")
    with pytest.raises(PunaError, match="did you mean 'lines'"):
        make(sources=[{"path": lines}], held_out={"sources": ["line"]})
    with pytest.raises(PunaError, match=r"(?s)train: no row is left"):
        make(sources=[{"path": lines}], held_out={"sources": ["lines"]})
    with pytest.raises(PunaError, match=r"(?s)held_out: no row is left"):
        make(sources=[{"path": lines, "limit": 3}], held_out={"share": 0.0001})


def test_the_limit_of_a_source_holds_over_both_sides(make: Any, lines: str) -> None:
    outcome, _ = make(sources=[{"path": lines, "limit": 50}], held_out={"share": 0.3})
    assert outcome.metrics["rows.train"] + outcome.metrics["rows.held_out"] == 50


def test_a_plan_goes_by_what_is_expected_or_by_the_size_of_plain_files(write: Any) -> None:
    plan = get_stage("corpus").plan
    assert plan is not None
    source = {"path": str(write("a.txt", "x" * 4000))}
    assert plan(validate(CorpusParameters, {"sources": [source]}, where="x"), None).tokens == 1000
    values = {"sources": [{"asset": "django"}], "expected_tokens": {"train": 500, "held_out": 100}}
    cost = plan(validate(CorpusParameters, values, where="x"), None)
    assert cost.tokens == 600 and cost.corpora == {"train": 500, "held_out": 100}
    with pytest.raises(PunaError, match="expected_tokens"):
        plan(validate(CorpusParameters, {"sources": [{"asset": "django"}]}, where="x"), None)


def test_the_stage_says_which_files_it_reads(write: Any, wheel: Any) -> None:
    reads = get_stage("corpus").reads
    assert reads is not None
    text, po_ = write("a.txt", "x"), write("po/nl.po", po(entry("a", "A")))
    sources = [{"path": str(text)}, {"path": str(po_.parent), "format": "gettext"}, {"asset": "django"}]
    parameters = validate(CorpusParameters, {"sources": sources}, where="x")
    assert list(reads(parameters)) == [assets.CATALOGUE, text, po_]


def test_the_room_registers_its_stages() -> None:
    stages = {name for name, stage in all_stages().items() if stage.function.__module__ == "puna.data.stages"}
    assert stages == {
        "corpus",
        "curate",
        "duplicate_checks",
        "infill",
        "instructions",
        "curation_checks",
        "juicer_checks",
        "next_word_labels",
        "planted",
        "preferences",
        "sample",
        "setu_checks",
        "table_questions",
        "task_mixture",
        "web_archive",
    }


def test_a_corpus_is_described_with_counts_lengths_and_first_rows(make: Any, two: Any) -> None:
    outcome, _ = make(sources=two, language="nl", held_out={"sources": ["b"]}, leak="report")
    screen = Console(width=120, record=True)
    for part in describe(Corpus.open(outcome.outputs["train"]), rows=1):
        screen.print(part)
    shown = screen.export_text()
    for words in (
        "documents",
        "MIT",
        "nl",
        "16 to 31",
        "a: duplicates",
        "also held out 2",
        "a/a.po#1",
        "Eerst een",
    ):
        assert words in shown, words


@pytest.mark.slow
@pytest.mark.parametrize("asset", ["django", "jupyterlab-nl"])
def test_real_catalogues_are_read(make: Any, asset: str) -> None:
    try:
        assets.fetch(asset)
    except PunaError as error:
        pytest.skip(f"not in the cache and not to be had: {error.message}")
    outcome, _ = make(kind="sentence_pairs", sources=[{"asset": asset}], language="nl")
    assert outcome.metrics["rows.train"] > 300
    made = Corpus.open(outcome.outputs["train"])
    assert made.meta["provenance"][0]["sha256"] == assets.describe(asset).source.sha256  # type: ignore[union-attr]
    assert made.meta["licences"] == ["BSD-3-Clause"]
