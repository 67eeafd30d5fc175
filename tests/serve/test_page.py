from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import puna.serve
from puna.serve.passes import Passes
from tests.serve.little_server import Live, live, tiny_catalog

STATIC = Path(puna.serve.__file__).parent / "static"


def make_run(folder: Path, *, report: bool = True, **about: Any) -> None:
    folder.mkdir(parents=True)
    said = {
        "name": folder.name,
        "title": "A run",
        "scale": "demo",
        "status": "done",
        "started": "2026-01-01T00:00:00+00:00",
        "stages": [],
        **about,
    }
    (folder / "run.json").write_text(json.dumps(said))
    if report:
        (folder / "report.html").write_text(f"<!doctype html><title>{folder.name}</title><p>report</p>")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, something that is none, and a link that leads out."""
    outside = tmp_path_factory.mktemp("outside")
    make_run(outside / "secret")
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "first", title="<script>alert(1)</script>")
    make_run(root / "second", started="2026-02-01T00:00:00+00:00", report=False, status="failed")
    make_run(root / "third & more", started="2026-03-01T00:00:00+00:00")
    claims = {"claims": [{"passed": True}, {"passed": False}, {"passed": True}]}
    (root / "first" / "claims.json").write_text(json.dumps(claims))
    (root / "broken").mkdir()
    (root / "broken" / "run.json").write_text("{}")
    (root / "escape").symlink_to(outside / "secret")
    return root


@pytest.fixture(scope="module")
def server(tiny_tokenizer: Any, runs: Path) -> Iterator[Live]:
    with live(tiny_catalog(tiny_tokenizer), page=True, runs=runs) as found:
        yield found


def test_the_page_comes_with_a_policy_that_allows_nothing_from_elsewhere(server: Live) -> None:
    assert server.http.get("/").headers["location"] == "/ui/"
    page = server.http.get("/ui/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for name in re.findall(r'(?:src|href)="([^"#]+)"', page.text):
        assert server.http.get(f"/ui/{name}").status_code == 200, name
    assert server.http.get("/ui/../settings.py").status_code == 404
    assert server.http.get("/ui/nothing.js").json()["error"]["code"] == "not_found"


def test_the_pages_files_fetch_nothing_and_write_no_markup() -> None:
    for file in STATIC.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", text), file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text), file.name


def test_every_file_of_the_page_is_in_the_package() -> None:
    pyproject = (STATIC.parents[2] / "pyproject.toml").read_text()
    assert '"serve/static/*"' in pyproject


def test_runs_are_listed_the_newest_first(server: Live, runs: Path) -> None:
    found = server.http.get("/runs").json()
    assert found["folder"] == str(runs)
    assert [card["name"] for card in found["data"]] == ["third & more", "second", "first"]
    assert [card["claims"] for card in found["data"]] == [None, None, "2 of 3"]
    assert [bool(card["report"]) for card in found["data"]] == [True, False, True]
    report = server.http.get(found["data"][0]["report"])
    assert "<title>third & more</title>" in report.text
    assert "sandbox" in report.headers["content-security-policy"]
    assert "allow-scripts" not in report.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/runs/escape/report.html",
        "/runs/../report.html",
        "/runs/%2e%2e/report.html",
        "/runs/..%2f..%2fetc/report.html",
        "/runs/first%2f..%2ffirst/report.html",
        "/runs/second/report.html",
        "/runs/first/run.json",
        "/runs/%00/report.html",
        "/runs//etc/report.html",
    ],
)
def test_nothing_outside_the_folder_of_runs_is_served(server: Live, path: str) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", path)  # as it is: httpx would tidy the path up
    answer = connection.getresponse()
    assert answer.status == 404, answer.read()
    connection.close()


def test_without_a_folder_there_are_no_runs(tiny_tokenizer: Any) -> None:
    with live(tiny_catalog(tiny_tokenizer), page=True) as server:
        assert server.http.get("/runs").json() == {"folder": "", "data": []}
        assert server.http.get("/runs/first/report.html").status_code == 404


def test_without_the_page_nothing_of_it_is_served(server: Live, tiny_tokenizer: Any) -> None:
    with live(tiny_catalog(tiny_tokenizer)) as plain:
        assert [plain.http.get(path).status_code for path in ("/", "/ui/", "/runs")] == [404] * 3


def test_a_report_opens_by_its_link_where_there_is_a_key(tiny_tokenizer: Any, runs: Path) -> None:
    with live(tiny_catalog(tiny_tokenizer), page=True, runs=runs, api_key="secret") as guarded:
        links = [card["report"] for card in guarded.http.get("/runs").json()["data"] if card["report"]]
        guarded.http.headers.pop("authorization")
        assert guarded.http.get("/ui/").status_code == 200
        assert guarded.http.get("/runs").status_code == 401
        for link in links:
            assert guarded.http.get(link).status_code == 200
        plain, query = links[1].split("?")
        assert plain == "/runs/first/report.html"
        assert guarded.http.get(plain).status_code == 401
        assert guarded.http.get(f"{plain}?{query[:-1]}0").status_code in (401,) or query.endswith("0")
        assert guarded.http.get(f"/runs?{query}").status_code == 401


def test_a_pass_is_for_one_path_and_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes()
    query = passes.link("/runs/a b/report.html").partition("?")[2].encode()
    assert passes.holds("/runs/a b/report.html", query)
    assert not passes.holds("/runs/b/report.html", query)
    assert not passes.holds("/runs/a b/report.html", b"")
    assert not passes.holds("/runs/a b/report.html", b"until=%C3%A9&pass=%C3%A9")
    assert not Passes().holds("/runs/a b/report.html", query)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3700)
    assert not passes.holds("/runs/a b/report.html", query)
