"""Web archives out of packages, and curation of one with a model that another stage made."""

from __future__ import annotations

import pytest

from puna.core.errors import PunaError
from puna.core.stage import Context
from puna.data import web_archive
from puna.data.corpus import Corpus
from puna.data.curate.settings import CurateParameters
from puna.data.curate.stage import run
from puna.data.web_archive import PageSource, WebArchiveParameters, write_web_archive

PAGE = "<html><head><title>{0}</title></head><body><main><p>{0} is a page of words.</p></main></body></html>"


@pytest.fixture
def pages(tmp_path, monkeypatch):
    folder = tmp_path / "asset"
    (folder / "deep").mkdir(parents=True)
    for name in ("one", "two", "deep/three"):
        (folder / f"{name}.html").write_text(PAGE.format(name.title()), encoding="utf-8")
    (folder / "style.css").write_text("p {}", encoding="utf-8")
    monkeypatch.setattr(web_archive.assets, "fetch", lambda name: folder)
    return tmp_path


def curated(pages, file, **inputs):
    parameters = CurateParameters(
        pipeline=[{"extract": "html.resiliparse"}, {"score": "text.sizes"}], executor="here"
    )
    context = Context("curate", pages / "out", {"archive": str(file), **inputs})
    return run(context, parameters)


def test_pages_are_written_as_a_crawl_and_read_again(pages):
    source = PageSource(asset="docs", times=2)
    told = write_web_archive(WebArchiveParameters(pages=[source]), pages / "pages.warc.gz")
    assert told["pages"] == 6
    outcome = curated(pages, pages / "pages.warc.gz")
    assert outcome.metrics["documents.kept"] == 6
    assert outcome.metrics["documents.dropped"] == 0
    texts = [text.strip() for text in Corpus.open(outcome.outputs["corpus"]).texts()]
    assert texts[:3] == [
        "Deep/Three is a page of words.",
        "One is a page of words.",
        "Two is a page of words.",
    ]
    assert texts[3:] == texts[:3]


def test_an_archive_is_the_same_every_time(pages):
    parameters = WebArchiveParameters(
        pages=[PageSource(asset="docs", under="deep"), PageSource(asset="docs", limit=1)]
    )
    files = [pages / "a.warc.gz", pages / "b.warc.gz"]
    assert [write_web_archive(parameters, file)["pages"] for file in files] == [2, 2]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_folder_without_pages_is_told(pages):
    parameters = WebArchiveParameters(pages=[PageSource(asset="docs", under="nowhere")])
    with pytest.raises(PunaError, match="no HTML page lies there"):
        write_web_archive(parameters, pages / "pages.warc.gz")


def test_a_model_for_an_operator_that_is_not_there_is_told(pages):
    write_web_archive(WebArchiveParameters(pages=[PageSource(asset="docs")]), pages / "pages.warc.gz")
    with pytest.raises(PunaError, match="quality_fasttext"):
        curated(pages, pages / "pages.warc.gz", models={"quality_fastext": "model"})
