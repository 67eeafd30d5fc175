"""The page of a pool and the commands that look into it."""

from __future__ import annotations

import json
import re

import numpy
import pytest
from typer.testing import CliRunner

from puna.cli import app
from puna.core.stage import Context, validate
from puna.data.corpus import Corpus
from puna.data.curate.analyze import _histogram
from puna.data.curate.layout import read_table
from puna.data.curate.pool import Pool
from puna.data.curate.report import examples, trace
from puna.data.curate.settings import CurateParameters
from puna.data.stages import curate
from puna.pools import data_app
from puna.run.report.flow import histogram, sankey
from puna.run.report.pool import write_pool_page


@pytest.fixture
def stage_folder(tmp_path):
    texts = ["too short", "a document <b>of</b> five words", "another document of some six words"] * 4
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "broken\n")
    given = {"sources": [{"path": str(file)}], "pipeline": "example", "executor": "here"}
    curate(Context("c", tmp_path / "out", {}), validate(CurateParameters, given, where="test"))
    return tmp_path / "out"


def test_the_page_tells_flow_examples_and_distributions(stage_folder):
    page = write_pool_page(Pool.open(stage_folder), stage_folder / "a.html").read_text()
    for words in ("13 documents read", "8 kept", "words: 4 (30.8% of all)", "not readable: 1", "too short"):
        assert words in page
    assert "text.sizes.words" in page and "at least 5" in page
    assert "<b>of</b>" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_heights_of_a_flow_are_in_proportion():
    drawn = str(sankey([("half", 50, 100), ("tenth", 5, 50)], 45))
    heights = [float(found) for found in re.findall(r'height="([\d.]+)"', drawn)]
    assert heights[0] / heights[1] == pytest.approx(50 / 45, rel=0.01)
    assert str(sankey([], 0)) == ""


def test_a_histogram_shows_the_bounds_of_gates_and_what_they_drop():
    def lost(bounds, **how):
        drawn = str(histogram([0.0, 1.0, 2.0, 3.0], [3, 1, 2], {"words": bounds}, x="words", **how))
        assert "words: " in drawn
        return [kind == "lost" for kind in re.findall("<rect[^>]*class='([^']*)'", drawn)]

    assert lost({"minimum": 1.0}) == [True, False, False]
    assert lost({"maximum": 1.0}) == [False, False, True]  # 1 itself passes
    assert lost({"below": 1.0}) == [False, True, True]
    assert lost({"minimum": 1.0, "maximum": 1.5}, logarithmic=True) == [True, False, True]
    assert str(histogram([], [], {}, x="words")) == ""


def test_a_wide_range_of_whole_numbers_has_a_logarithmic_axis():
    values = numpy.array([0.0, 1, 1, 3, 50, 400, 99999])
    counts, edges = _histogram(values, 0.0, 1e5, True, True)
    assert sum(counts) == len(values) and edges == sorted(set(edges))
    assert counts[:2] == [1, 2] and edges[:3] == [0, 1, 2]
    drawn = str(histogram(edges, counts, {}, x="words", logarithmic=True))
    assert all(f">{tick}<" in drawn for tick in ("0", "1", "10", "100", "1k", "10k", "100k"))


@pytest.fixture
def pages_pool(tmp_path):
    """A page that is too short, one that passes, and one that a mapper cuts short before a second gate."""
    for name, text in (("a", "too short"), ("b", "of this page enough is left"), ("c", "a x x x x x")):
        (tmp_path / f"{name}.html").write_text(f"<html><body><p>{text}</p></body></html>")
    steps = [
        {"extract": "html.resiliparse"},
        {"score": "text.sizes"},
        {"gate": {"name": "words", "signal": "text.sizes.words", "minimum": 5}},
        {"map": "data_juicer.remove_words_with", "settings": {"substrings": ["x"]}},
        {"score": "text.sizes", "as": "after"},
        {"gate": {"name": "left", "signal": "after.words", "minimum": 5, "null": "keep"}},
    ]
    given = {"sources": [{"path": str(tmp_path / "*.html")}], "pipeline": steps, "executor": "here"}
    curate(Context("c", tmp_path / "out", {}), validate(CurateParameters, given, where="test"))
    return Pool.open(tmp_path / "out")


def test_texts_are_shown_as_the_gate_saw_them(pages_pool):
    shown = {example.gate: example.text for example in examples(pages_pool)}
    assert shown == {"words": "too short", "left": "a"}
    ids = {example.gate: example.id for example in examples(pages_pool)}
    assert {gate: trace(pages_pool, ids[gate]).text.strip() for gate in ids} == shown


def test_a_trace_tells_gates_that_were_not_come_to(pages_pool):
    ids = {example.gate: example.id for example in examples(pages_pool)}
    results = {gate: [judged.result for judged in trace(pages_pool, ids[gate]).gates] for gate in ids}
    assert results == {"words": ["dropped", "not come to"], "left": ["passed", "dropped"]}
    kept = trace(pages_pool, next(id_ for id_ in _ids(pages_pool) if id_ not in ids.values()))
    assert kept.reason == "" and {judged.result for judged in kept.gates} == {"passed"}
    assert [judged.bounds for judged in kept.gates] == ["at least 5", "at least 5 (or null)"]


def _ids(pool):
    files = sorted((pool.path / "documents").glob("*.parquet"))
    return [one for file in files for one in read_table(file, ["id"])["id"].to_pylist()]


def test_the_commands(stage_folder):
    run = CliRunner()
    told = run.invoke(data_app, ["analyze", str(stage_folder)])
    assert told.exit_code == 0 and (stage_folder / "analysis.html").is_file()
    told = run.invoke(data_app, ["trace", str(stage_folder), "texts/texts.jsonl:0"])
    assert told.exit_code == 0
    for words in (
        "dropped by: words",
        "text.sizes.words",
        "at least 5",
        "│ dropped │",
        "begins:",
        "too short",
    ):
        assert words in told.output
    told = run.invoke(data_app, ["trace", str(stage_folder), "nobody"])
    assert "no document has this id" in str(told.exception)


def test_presets_and_operators_are_listed():
    run = CliRunner()

    def told(*words):
        outcome = run.invoke(data_app, words, env={"COLUMNS": "200"})
        return outcome.output if outcome.exit_code == 0 else str(outcome.exception)

    assert "setu-hi" in told("presets") and "arXiv:2112.11446" in told("presets")
    shown = told("presets", "setu")
    assert "setu.statistics.lines: more than 4; as: more than 3" in shown and "minimum 0.9, always" in shown
    assert "did you mean 'gopher'" in told("presets", "gofer")
    assert "data_juicer.words" in told("operators") and "gopher.words" not in told("operators", "c4")
    shown = told("operators", "pii.mask")
    assert "pii.mask.masked" in shown and "kinds" in shown
    assert "unknown operator 'gopher.word'" in told("operators", "gopher.word")


def test_other_bounds_over_the_pool_of_an_earlier_run(stage_folder, tmp_path):
    """As docs/curate.md has it: the pool that a stage left goes into another one by its path."""
    bounds = "gates={words: {minimum: 1}}"
    words = ["stage", "curate", "--out", str(tmp_path / "again"), "--in", f"pool={stage_folder / 'pool'}"]
    told = CliRunner().invoke(app, [*words, "pipeline=example", bounds, "executor=here"])
    assert told.exit_code == 0, told.exception
    assert Corpus.open(tmp_path / "again" / "corpus").count == 12
