"""The page of a pool and the commands that look into it."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from puna.core.stage import Context, validate
from puna.data.curate.pool import Pool
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


def test_a_histogram_shows_the_bounds_of_gates():
    drawn = str(histogram([0.0, 1.0, 2.0], [3, 1], {"words": {"minimum": 1.0}}, x="words"))
    assert drawn.count("<rect") == 2 and "words: minimum 1" in drawn
    assert str(histogram([], [], {}, x="words")) == ""


def test_the_commands(stage_folder):
    run = CliRunner()
    told = run.invoke(data_app, ["analyze", str(stage_folder)])
    assert told.exit_code == 0 and (stage_folder / "analysis.html").is_file()
    told = run.invoke(data_app, ["trace", str(stage_folder), "texts/texts.jsonl:0"])
    assert told.exit_code == 0
    for words in ("dropped by: words", "text.sizes.words", "at least 5", "too short"):
        assert words in told.output
    told = run.invoke(data_app, ["trace", str(stage_folder), "nobody"])
    assert "no document has this id" in str(told.exception)
