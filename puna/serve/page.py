"""The web page and the reports of runs: a few files, served from memory, and one folder, never left.

The page is plain HTML and JavaScript without anything from elsewhere; its content security policy allows
nothing else. A report is a page of its own making and is opened in a sandbox: it cannot reach the server
with the reader's key.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from puna.core.errors import PunaError
from puna.run.record import Run
from puna.serve import responses
from puna.serve.errors import ApiError
from puna.serve.passes import Passes

_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "X-Frame-Options": "DENY",
}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_REPORT_POLICY = "sandbox allow-popups; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
REPORT = "report.html"


def page_router() -> APIRouter:
    """The page's files at /ui/, and / that leads there."""
    router = APIRouter(include_in_schema=False)
    folder = resources.files("puna.serve") / "static"
    files = {
        entry.name: entry.read_bytes() for entry in folder.iterdir() if Path(entry.name).suffix in _TYPES
    }

    @router.get("/")
    async def root() -> Response:
        return RedirectResponse("/ui/", headers=_SAFE)

    @router.get("/ui")
    async def without_slash() -> Response:
        return RedirectResponse("/ui/", headers=_SAFE)

    @router.get("/ui/{name:path}")
    async def file(name: str) -> Response:
        wanted = name or "index.html"
        if wanted not in files:
            raise ApiError(404, f"the page has no file {wanted!r}", code="not_found")
        headers = {**_SAFE, "Content-Security-Policy": _PAGE_POLICY}
        return Response(files[wanted], media_type=_TYPES[Path(wanted).suffix], headers=headers)

    return router


def runs_router(folder: Path | None, passes: Passes | None) -> APIRouter:
    """The list of runs in ``folder`` and their reports; with ``passes`` the links to them carry one."""
    router = APIRouter(tags=["runs"])
    root = None if folder is None else folder.expanduser().resolve()

    @router.get("/runs", response_model=responses.RunList)
    def runs() -> dict[str, object]:
        cards = [] if root is None else [_card(child, passes) for child in _folders(root)]
        found = [card for card in cards if card is not None]
        found.sort(key=lambda card: str(card["started"]), reverse=True)
        return {"folder": str(folder or ""), "data": found}

    @router.get("/runs/{name}/report.html", include_in_schema=False)
    def report(name: str, request: Request) -> Response:
        file = None if root is None else root / name / REPORT
        if root is None or file is None or not _inside(file, root):
            raise ApiError(404, f"no report of a run {name!r}", code="run_not_found")
        headers = {**_SAFE, "Content-Security-Policy": _REPORT_POLICY}
        return Response(file.read_bytes(), media_type="text/html", headers=headers)

    return router


def _inside(file: Path, root: Path) -> bool:
    """Whether ``file``, links followed, is a file below ``root``: neither dots nor links lead out."""
    try:
        return file.resolve(strict=True).is_relative_to(root) and file.is_file()
    except (OSError, ValueError):
        return False


def _folders(root: Path) -> list[Path]:
    try:
        return [child for child in root.iterdir() if _inside(child / "run.json", root)]
    except OSError:
        return []


def _card(folder: Path, passes: Passes | None) -> dict[str, object] | None:
    """What the list says of a run; None for a folder that is none."""
    try:
        run = Run.open(folder)
        judged = run.claims
    except (PunaError, OSError, ValueError):
        return None
    claims = None
    if judged is not None:
        held = sum(bool(claim.get("passed")) for claim in judged["claims"])
        claims = f"{held} of {len(judged['claims'])}"
    path = f"/runs/{folder.name}/{REPORT}"
    link = quote(path) if passes is None else passes.link(path)
    about = {key: str(run.about.get(key, "")) for key in ("title", "status", "scale", "started")}
    report = link if (folder / REPORT).is_file() else None
    return {"name": folder.name, **about, "claims": claims, "report": report}
