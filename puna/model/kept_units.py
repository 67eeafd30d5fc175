"""Which units of a whole decoder a pruned one holds, kept beside its weights.

Without it a pruned model is a smaller one like any other: what was trained on it cannot be put back where it
came from. The file lies in the model's folder; training and merging make other models, and leave it out.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from puna.core.errors import PunaError
from puna.core.files import read_json, write_json
from puna.model.units import Kept

FILE = "kept_units.json"


def write_kept(folder: Path, kept: Kept) -> None:
    """Write down what of the whole decoder the model in ``folder`` holds."""
    write_json(folder / FILE, dataclasses.asdict(kept))


def read_kept(folder: Path) -> Kept:
    """What :func:`write_kept` wrote; a folder without it is an error."""
    file = folder / FILE
    if not file.is_file():
        raise PunaError(
            "it is not written down which units of the whole model this one holds",
            where=folder,
            found=f"no {FILE}",
            expected="the folder that the stage prune wrote",
            fix="give the pruned model itself, not what was trained from it; if the file is lost, prune "
            "again with the same seed and settings",
        )
    try:
        return Kept.from_json(read_json(file))
    except (KeyError, TypeError):
        raise PunaError(
            "this does not say which units are kept", where=file, fix="prune again, or restore the file"
        ) from None
