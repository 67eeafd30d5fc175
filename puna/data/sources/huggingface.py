"""Datasets from a hub or in its local layout, through the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pydantic

from puna.core.errors import PunaError
from puna.data.kinds import UNDETERMINED, BadRowError
from puna.data.sources.common import Item, Reading, SourceSettings, source
from puna.data.sources.files import convert_rows


class HuggingfaceSettings(SourceSettings):
    """A dataset by its id; rows are streamed."""

    format: Literal["huggingface"] = "huggingface"
    id: str
    """The dataset's id, or a local folder in the hub's layout."""
    configuration: str | None = None
    """Which of its configurations, where it has several."""
    split: str = "train"
    """Which of its splits."""
    revision: str | None = None
    """Commit or tag; without it the newest, which may change."""
    columns: dict[str, str] = pydantic.Field(default_factory=dict)
    """From a name that a format uses to the dataset's own name of that column."""
    task_column: str | None = None
    """A column that names the task of a row: caps by task go by it."""
    language: str | None = None
    """Language tag of the text, where a row does not tell its own."""
    source_language: str = UNDETERMINED
    """Language tag of the source side of sentence pairs."""
    target_language: str = UNDETERMINED
    """Language tag of the target side of sentence pairs."""

    def default_name(self) -> str:
        """The last part of the id."""
        return self.id.rstrip("/").rpartition("/")[2]


@source(HuggingfaceSettings, "documents", "messages", "preferences", "sentence_pairs")
def read_huggingface(settings: HuggingfaceSettings, reading: Reading) -> Iterator[Item]:
    """A dataset's split: a row is a source document."""
    try:
        import datasets
    except ImportError:
        raise PunaError(
            "datasets from a hub need the library datasets", fix="pip install puna[hub]"
        ) from None
    try:
        dataset = datasets.load_dataset(
            settings.id,
            settings.configuration,
            split=settings.split,
            revision=settings.revision,
            streaming=True,
        )
    except Exception as error:  # the library raises errors of many kinds, its own and others'
        raise PunaError(
            "the dataset cannot be opened",
            where=settings.id,
            found=f"{type(error).__name__}: {error}",
            fix="check id, configuration, split and network",
        ) from None
    if dataset.info.license:
        reading.facts["licence"] = dataset.info.license
    reading.facts["id"] = settings.id
    reading.facts["revision"] = settings.revision or "newest"
    return convert_rows(settings, reading, _numbered(dataset, settings.id), settings.split)


def _numbered(dataset: Any, where: str) -> Iterator[tuple[str, Any | BadRowError]]:
    rows = iter(dataset)
    number = 0
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as above
            told = f"{type(error).__name__}: {error}"
            raise PunaError(
                "the dataset cannot be read on", where=f"{where}, row {number}", found=told
            ) from None
        yield str(number), row
