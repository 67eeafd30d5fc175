"""The LaTeX sources of an archive, merged (S50, ``latex_merge_tex_mapper`` of modelscope/data-juicer)."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator

import pydantic

from puna.core.archives import UNREADABLE
from puna.core.stage import Parameters
from puna.data.curate.operator import BadDocument, extractor


class ArchiveSettings(Parameters):
    """What is read."""

    separator: str = "\n\n"
    """What stands between two files."""
    file_bytes: pydantic.PositiveInt = 50 << 20
    """Files that are larger are left out."""
    total_bytes: pydantic.PositiveInt = 100 << 20
    """Most bytes of all files; those behind are left out."""


@extractor(
    "data_juicer.latex_archive",
    media="archive",
    settings=ArchiveSettings,
    source="arXiv:2309.02033, modelscope/data-juicer",
)
def latex_archive(content: bytes, settings: ArchiveSettings) -> str:
    """The files *.tex of a tar or zip archive, in its order, one behind another.

    Sizes are held to while unpacking, whatever the archive says of them.
    """
    parts: list[str] = []
    left = settings.total_bytes
    for unpacked in _files(content, settings):
        if len(unpacked) > settings.file_bytes:
            continue
        if len(unpacked) > left:
            break
        left -= len(unpacked)
        parts.append(unpacked.decode("utf-8", errors="replace"))
    if not parts:
        raise BadDocument("the archive holds no LaTeX source of a fitting size")
    return settings.separator.join(parts)


def _files(content: bytes, settings: ArchiveSettings) -> Iterator[bytes]:
    """The unpacked files, each read no further than one byte beyond the most."""
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for name in archive.namelist():
                    if name.endswith(".tex"):
                        with archive.open(name) as file:
                            yield file.read(settings.file_bytes + 1)
            return
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:*") as tar:
            for member in tar:
                opened = tar.extractfile(member) if member.isfile() and member.name.endswith(".tex") else None
                if opened is not None:
                    yield opened.read(settings.file_bytes + 1)
    except UNREADABLE as error:
        raise BadDocument(f"not a readable archive: {error}") from None
