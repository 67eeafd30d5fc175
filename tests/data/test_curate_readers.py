"""Readers: what each format gives, cut into parts, and what is wrong with one record alone."""

from __future__ import annotations

import gzip
import io
import json
import zipfile

import pyarrow
import pyarrow.parquet
import pydantic
import pytest

from puna.core.errors import PunaError
from puna.core.stage import Parameters, validate
from puna.data.curate import readers, records
from puna.data.curate.operator import BadDocument, get_operator
from puna.data.curate.records import Limits
from puna.data.curate.sources import PoolSource, reader_of


class Holder(Parameters):
    source: PoolSource


def read(limits=None, **source):
    settings = validate(Holder, {"source": source}, where="test").source
    reader = reader_of(settings)
    limits = limits or Limits()
    return [record for part in reader.parts(settings) for record in reader.read(settings, part, limits)]


def lines(texts):
    return "".join(
        json.dumps({"text": text, "url": f"http://{n}"}) + "\n" for n, text in enumerate(texts)
    ).encode()


def packed(path, content):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines_plain_and_packed(tmp_path, name):
    texts = ["one", "zwei\nLines", "三"]
    found = read(path=packed(tmp_path / name, lines(texts)), language="en", meta_columns=["url"])
    assert [record.text for record in found] == texts
    assert [record.url for record in found] == ["http://0", "http://1", "http://2"]
    assert {record.language for record in found} == {"en"}
    assert json.loads(found[1].meta) == {"url": "http://1"}


@pytest.mark.parametrize("size", [1, 7, 30, 31, 64, 10_000])
def test_a_file_cut_into_ranges_gives_every_line_once(tmp_path, monkeypatch, size):
    monkeypatch.setattr(readers, "_RANGE", size)
    texts = [str(number) * (number % 9) for number in range(25)]
    found = read(path=packed(tmp_path / "a.jsonl", lines(texts)))
    assert [record.text for record in found] == texts
    assert len({record.key for record in found}) == len(texts)


def test_bad_lines_fail_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PIECE", 64)
    content = b"\n".join(
        [
            b'{"text": "good"}',
            b'{"text": "\xff\xfe"}',
            b'{"text": "\\ud800"}',
            b'{"text": 3}',
            b'{"other": ""}',
            b"[]",
            b"{",
            b'{"text": "' + b"x" * 500 + b'"}',
            b'{"text": "' + b"y" * 90 + b'"}',
            b"",
            b'{"text": "good again"}',
        ]
    )
    found = read(Limits(document_bytes=80), path=packed(tmp_path / "a.jsonl", content))
    assert [record.text for record in found if not record.failed] == ["good", "good again"]
    assert [record.failed.split(":")[0] for record in found if record.failed] == [
        "not UTF-8",
        "the text holds half a surrogate pair",
        "column 'text' is no text",
        "column 'text' is missing",
        "the line is no object",
        "not valid JSON",
        "larger than 80 bytes",
        "larger than 80 bytes",
    ]
    assert len({record.key for record in found}) == len(found)


def test_what_unpacks_to_too_much_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_FREE_BYTES", 100_000)
    content = lines(["good"]) + b'{"text": "' + b"x" * 50_000_000
    found = read(Limits(document_bytes=1000), path=packed(tmp_path / "a.jsonl.gz", content))
    assert [record.text for record in found] == ["good", None]
    assert "unpacks to more than" in found[1].failed


def test_a_packed_file_that_ends_too_early_keeps_what_came(tmp_path):
    content = gzip.compress(lines([str(number) for number in range(30_000)]))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content[: len(content) // 2])
    found = read(path=str(path))
    assert 1000 < len(found) < 30_000
    assert [record.text for record in found[:-1]] == [str(number) for number in range(len(found) - 1)]
    assert "cannot be" in found[-1].failed or "not valid JSON" in found[-1].failed


def test_parquet_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_ROWS", 4)
    texts = [f"text {number}" for number in range(11)]
    table = pyarrow.table({"body": [*texts[:-1], None], "language": ["nl"] * 11})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    found = read(path=str(tmp_path / "a.parquet"), text_column="body")
    assert [record.text for record in found] == [*texts[:-1], None]
    assert [record.key for record in found] == [f"a.parquet:{number}" for number in range(11)]
    assert found[0].language == "nl" and found[-1].failed == "column 'body' is no text"
    with pytest.raises(PunaError, match="say which holds the text"):
        read(path=str(tmp_path / "a.parquet"))


def test_plain_text_whole_and_by_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\nthree")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    found = read(path=str(tmp_path / "*.txt"))
    assert [(record.key, record.text) for record in found] == [
        ("a.txt", "one\ntwo\n\nthree"),
        ("b.txt", None),
    ]
    assert [record.text for record in read(path=str(tmp_path / "a.txt"), split="line")] == [
        "one",
        "two",
        "three",
    ]


def test_warc_files_give_pages_and_texts(tmp_path):
    writer = pytest.importorskip("fastwarc.warc")
    page, wet = b"<html><body><p>Hello</p></body></html>", "Größe".encode()

    def record(kind, content, http=None, media="text/plain"):
        made = writer.WarcRecord()
        made.init_headers(record_type=kind, record_urn=b"a")
        made.headers["WARC-Target-URI"] = "http://example.org/"
        made.headers["Content-Type"] = "application/http; msgtype=response" if http else media
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {http}\r\n\r\n".encode() if http else b""
        made.set_bytes_content(head + content)
        return made

    types = writer.WarcRecordType
    with (tmp_path / "a.warc").open("wb") as stream:
        for made in (
            record(types.response, page, http="text/html; charset=utf-8"),
            record(types.response, b"\x89PNG", http="image/png"),
            record(types.request, b"GET / HTTP/1.1\r\n\r\n"),
            record(types.conversion, wet),
            record(types.response, page + b" " * 5000, http="text/html"),
        ):
            made.write(stream)
    found = read(Limits(document_bytes=1000), path=str(tmp_path / "a.warc"))
    assert [(one.content, one.media, one.text) for one in found[:2]] == [
        (page, "html", None),
        (None, "", "Größe"),
    ]
    assert found[0].url == "http://example.org/"
    assert found[2].failed == "larger than 1,000 bytes"
    assert len(found) == 3


def test_html_and_its_text(tmp_path):
    page = "<html><head><title>t</title></head><body><nav><a>menu</a></nav><p>Größe of it</p></body></html>"
    (tmp_path / "a.html").write_bytes(page.encode("latin-1"))
    (found,) = read(path=str(tmp_path / "a.html"))
    assert found.media == "html"
    pytest.importorskip("resiliparse")
    operator = get_operator("extract", "html.resiliparse")
    assert operator.function(found.content, operator.settings()).strip() == "Größe of it"
    assert "menu" in operator.function(found.content, operator.settings(main_content=False))
    with pytest.raises(BadDocument, match="empty"):
        operator.function(b"  ", operator.settings())


def test_pdf_and_its_text(tmp_path):
    pyplot = pytest.importorskip("matplotlib.figure")
    pytest.importorskip("pypdfium2")
    figure = pyplot.Figure()
    figure.text(0.1, 0.5, "Hello llama")
    figure.savefig(tmp_path / "a.pdf")
    (found,) = read(path=str(tmp_path / "a.pdf"))
    operator = get_operator("extract", "pdf.pdfium")
    assert operator.function(found.content, operator.settings()).strip() == "Hello llama"
    with pytest.raises(BadDocument, match="not a readable"):
        operator.function(b"%PDF-1.4 broken", operator.settings())


def test_boxes_of_scanned_pages_are_kept_beside_an_empty_text(tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("1.json", '{"pages": []}')
        archive.writestr("2.json", "{")
        archive.writestr("readme.txt", "no")
    (tmp_path / "a.zip").write_bytes(content.getvalue())
    good, bad = read(path=str(tmp_path / "a.zip"), format="ocr")
    assert (good.text, good.meta) == ("", '{"pages": []}')
    assert bad.failed.startswith("not valid JSON")


def test_a_damaged_archive_of_boxes_fails_as_one_wherever_the_damage_is(tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.json", '{"pages": [], "more": [1, 2, 3, 1, 2, 3]}')
    told = set()
    for place in range(len(content.getvalue())):
        damaged = bytearray(content.getvalue())
        damaged[place] ^= 0xFF
        (tmp_path / "a.zip").write_bytes(damaged)
        told |= {record.failed for record in read(path=str(tmp_path / "a.zip"), format="ocr")}
    assert any(failed and failed.startswith("the archive cannot be read") for failed in told)


def test_other_sources_are_read_as_they_are(tmp_path):
    (tmp_path / "a.csv").write_text("text,language\nhello,en\n")
    (found,) = read(path=str(tmp_path / "a.csv"))
    assert (found.text, found.language) == ("hello", "en")


def test_a_source_that_is_none_is_told(tmp_path):
    with pytest.raises(PunaError, match="no file has this path"):
        read(path=str(tmp_path / "none.jsonl"))
    with pytest.raises(PunaError, match="did you mean 'text_column'"):
        read(path="a.jsonl", text_colum="a")
    assert pydantic.TypeAdapter(PoolSource).validate_python({"path": "a.warc.wet.gz"}).format == "warc"


@pytest.mark.parametrize("path", ["a/*.warc*", "a/*.warc.gz", "a/b.wet.?z"])
def test_a_glob_tells_the_format(path):
    assert validate(Holder, {"source": {"path": path}}, where="test").source.format == "warc"


def test_what_a_name_does_not_tell_is_told(tmp_path):
    with pytest.raises(PunaError, match=r"add format: one of archive.*jsonl.*ocr.*warc"):
        validate(Holder, {"source": {"path": "a.xyz"}}, where="test")
    with pytest.raises(PunaError, match="is a folder, but no corpus"):
        validate(Holder, {"source": {"path": str(tmp_path)}}, where="test")
