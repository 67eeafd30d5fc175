from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import finished_run
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.run.card import write_card
from puna.run.look import look_at
from puna.run.report import charts, plot_before_after, write_report
from puna.run.report.gather import gather

_VOID = {"meta", "br"}


class Page(HTMLParser):
    """Collects a page's text, attributes and headings, and checks that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finished_run.make(tmp_path / "run")


@pytest.fixture
def page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_the_page_asks_for_nothing_from_anywhere(run: Path, page: Page) -> None:
    loading = [found for found in page.attributes if found[1] in ("src", "srcset", "data", "action")]
    assert not loading
    links = [value for tag, name, value in page.attributes if name == "href"]
    assert [link for link in links if not link.startswith("#")] == ["https://arxiv.org/abs/2412.07633"]
    text = write_report(run).read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|<script|<link|<iframe|<img", text)


@pytest.mark.parametrize(
    "expected",
    [
        "ChocoLlama: Lessons Learned From Teaching Llamas Dutch",  # what
        ["221.7", "s", "3.7", "min"][2],  # timing
        "2 of 4 hold",
        "Dutch bits per byte fall by at least 10%",
        "unknown metric 'x'",
        "1.991 → 1.651",
        "-13.5% to -11.1%",  # interval
        "De hoofdstad van Nederland is Amsterdam. De pagina is <b>niet</b> gevonden.",
        "(nothing)",  # an empty sample
        "wagtail",  # provenance
        "BSD-3-Clause, GPL-3.0-or-later",
        "68,100",
        "SmolLM2-135M-Instruct by Hugging Face",  # what the asset is
        "lora: {use: train",  # exact recipe
        "puna run chocollama --set lora.learning_rate=1e-3",
        "2.13.0",
        "0123456789abcdef",  # commit
        "feedfeedfeedfeed",  # fingerprint
        "Learning rate",
    ],
)
def test_the_page_shows_what_was_done_on_what_and_what_came_of_it(page: Page, expected: str) -> None:
    assert expected in page.text


def test_text_from_outside_is_never_markup(run: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    for file in (run / "evaluate" / "stage.json", run / "run.json", run / "claims.json"):
        said = file.read_text()
        for word in (
            "De hoofdstad van Nederland is",
            "Lessons Learned",
            "unknown metric",
            "Before and after",
        ):
            said = said.replace(word, json.dumps(word + evil)[1:-1])
        said = said.replace('"lora"', json.dumps("lora" + evil)) if file.parent.name == "evaluate" else said
        file.write_text(said)
    text = write_report(run).read_text(encoding="utf-8")
    assert "<script" not in text
    assert html.escape("<script>alert(1)</script>") in text
    Page(text)


@pytest.mark.parametrize("stages", [(), ("dutch",), ("dutch", "lora")])
@pytest.mark.parametrize("status", ["running", "failed", "stopped"])
def test_unfinished_runs_are_shown_as_far_as_they_got(
    tmp_path: Path, status: str, stages: tuple[str, ...]
) -> None:
    run = finished_run.make(tmp_path / "run", status=status, stages=stages)
    (run / "evaluate.work").mkdir()
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert status in page.text
    assert "unfinished" in page.text
    assert ("not run" in page.text) == (len(stages) < 2)


def test_a_training_that_was_cut_short_shows_its_curve_so_far(tmp_path: Path) -> None:
    run = finished_run.make(tmp_path / "run", status="stopped", stages=("dutch",))
    (run / "lora.work").mkdir()
    lines = [
        {"step": n, "kind": "train", "tokens": 100 * n, "loss": 3.0 / n, "learning_rate": 0.1} for n in (1, 2)
    ]
    log = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "kin'
    (run / "lora.work" / "metrics.jsonl").write_text(log)
    assert [title for title, _ in gather(run).stages[1].charts] == ["Loss so far", "Learning rate so far"]
    assert "Loss so far" in Page(write_report(run).read_text(encoding="utf-8")).text


def test_a_run_without_its_recipe_still_has_a_report(run: Path) -> None:
    (run / "run.yaml").unlink()
    assert "1.991 → 1.651" in Page(write_report(run).read_text(encoding="utf-8")).text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="not a run folder"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("run.json", "{}"), ("run.json", "[1]"), ("claims.json", "[]"), ("claims.json", '{"claims": 1}')],
)
def test_a_broken_run_is_told_with_its_file(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(PunaError, match=rf"{name}: not the "):
        write_report(run)
    with pytest.raises(PunaError, match=rf"{name}: not the "):
        list(look_at(str(run)))


def test_a_report_written_twice_is_the_same(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


points = st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)), max_size=30)


names = st.text(st.characters(max_codepoint=0x2FFF, exclude_categories=["Cc", "Cs"]), max_size=8)


@given(st.dictionaries(names, points, max_size=8))
def test_line_charts_of_any_numbers_are_well_formed_and_inside_their_frame(series: dict[str, Any]) -> None:
    drawn = charts.line_chart(series, x="<tokens>", y="loss & more")
    if not any(series.values()):
        assert drawn == ""
        return
    places = [_floats(line.get("points", "")) for line in _parse(drawn).iter("polyline")]
    for x, y in zip(*[iter(value for place in places for value in place)] * 2, strict=True):
        assert -0.2 <= x <= 520.2
        assert -0.2 <= y <= 240.2


@given(st.lists(st.tuples(st.floats(-0.9, 9), st.floats(0, 0.5) | st.none()), min_size=1, max_size=12))
def test_interval_charts_colour_only_what_excludes_zero(values: list[tuple[float, float | None]]) -> None:
    rows = [
        charts.Row("nl", f"m{number}", value, *(() if half is None else (value - half, value + half)))
        for number, (value, half) in enumerate(values)
    ]
    dots = [
        dot.get("class")
        for dot in _parse(charts.interval_chart(rows, x="change", zero="base")).iter("circle")
    ]
    for dot, (value, half) in zip(dots, values, strict=True):
        sure = half is not None and abs(value) > half
        assert dot == (("better" if value < 0 else "worse") if sure else "unclear")


@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12))
def test_ticks_cover_the_range_with_few_round_numbers(first: float, second: float) -> None:
    low, high = sorted((first, second))
    found = charts.ticks(low, high, 5)
    assert found == sorted(set(found))
    assert 2 <= len(found) <= 9
    slack = 1e-6 * max(abs(low), abs(high), 1e-12)
    assert found[0] <= low + slack
    assert found[-1] >= high - slack


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (12345, "12.35k"),
        (61440.0, "61.44k"),
        (1.5e6, "1.5M"),
        (0.001, "0.001"),
        (9.5e-4, "0.00095"),
        (3e-5, "3e-5"),
        (-2.5, "-2.5"),
    ],
)
def test_numbers_are_short(value: float, expected: str) -> None:
    assert charts.short(value) == expected


def test_the_plot_is_a_picture_of_some_size(run: Path, tmp_path: Path) -> None:
    path = plot_before_after(run, tmp_path / "plots" / "before_after.png")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") > 800  # width in pixels


def test_a_run_that_measured_nothing_has_no_plot(tmp_path: Path) -> None:
    run = finished_run.make(tmp_path / "run", stages=("dutch",))
    with pytest.raises(PunaError, match="measured"):
        plot_before_after(run, tmp_path / "plot.png")


def test_the_card_has_a_head_that_a_hub_reads(run: Path) -> None:
    _, head, body = write_card(run, run / "lora" / "model").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "base_model": ["smollm2-135m-instruct"],
        "language": ["nl"],
        "datasets": ["wagtail"],
        "tags": ["puna", "llama", "chocollama", "S01"],
    }
    for expected in (
        "| nl | 1.746 | 1.991 | -12.3% | -13.5% to -11.1% |",  # results with interval
        "2. **lora** (`train`, 222 s): learning_rate 0.001",  # what was done
        "lora: {use: train",  # exact recipe
        "torch 2.13.0",
        "eprint = {2412.07633}",
        "| dutch.train | documents | 412 |",
        "## Limits",
    ):
        assert expected in body
    assert "dutch.held_out" not in body  # no stage of this model drew on it


def test_a_card_is_only_for_models_of_the_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="no stage"):
        write_card(run, tmp_path)


def _parse(drawn: str) -> ElementTree.Element:
    return ElementTree.fromstring(drawn)


def _floats(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", text)]
