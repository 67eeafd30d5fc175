"""The page of all proofs: one row for each system, with a link to its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from puna.core.files import write_text
from puna.run.report.page import environment

if TYPE_CHECKING:
    from puna.run.prove_all import Overview


def write_proofs_page(overview: Overview, file: Path) -> Path:
    """Write the table as one HTML file, and return its path; links are relative to its folder."""
    write_text(file, environment().get_template("proofs.html.j2").render(overview=overview))
    return file
