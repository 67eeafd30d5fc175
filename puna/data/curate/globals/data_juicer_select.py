"""Data-Juicer's selectors as global operators (S50, arXiv:2309.02033).

A selector sees a field of every document that came to it and says of each whether it is selected; a gate
on ``selected`` drops the others. Fields are those a reader kept beside the text, with dots for fields
inside fields, or ``language``, ``url``, and ``text_length``. Where Data-Juicer takes the smaller of a share
and a number, so is it here; all selectors keep the order of documents. Best tenths by a stored signal need
no selector: a gate has quantiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pydantic
from numpy.typing import NDArray

from puna.core import seeds
from puna.core.stage import Parameters
from puna.data.curate.fields import field_values, number_of
from puna.data.curate.operator import Resolved, Sketch, SketchColumns, global_operator
from puna.data.curate.scores.data_juicer_characters import SOURCE
from puna.data.curate.texts import Texts, hashes_of

_SIGNALS = {"selected": "1 if the document is selected, else 0"}


class AmountSettings(Parameters):
    """How much is selected: of a share and a number the one that selects less."""

    share: float | None = pydantic.Field(None, ge=0, le=1)
    """Share that is selected."""
    number: pydantic.PositiveInt | None = None
    """Number that is selected."""

    @pydantic.model_validator(mode="after")
    def _some(self) -> AmountSettings:
        if self.share is None and self.number is None:
            raise ValueError("give a share, a number or both")
        return self

    def of(self, total: int) -> int:
        """How many of ``total`` are selected."""
        amounts = [total if self.share is None else int(self.share * total)]
        return min([*amounts, total if self.number is None else self.number])


class FieldAmountSettings(AmountSettings):
    """Which field, from which end, and how much."""

    field: str
    """Name of the field, with dots for what is inside another; or text_length."""
    largest: bool = True
    """Select from the largest (or most frequent) on; else from the smallest."""


class RangeSettings(Parameters):
    """Which field, and which part of the documents in its order."""

    field: str
    """Name of the field, with dots for what is inside another; or text_length."""
    lower_share: float | None = pydantic.Field(None, ge=0, le=1)
    """Share of the documents that lie below."""
    upper_share: float | None = pydantic.Field(None, ge=0, le=1)
    """Share of the documents up to the highest one."""
    lower_rank: pydantic.PositiveInt | None = None
    """Number of documents that lie below; with a share the larger of both counts."""
    upper_rank: pydantic.PositiveInt | None = None
    """Number of documents up to the highest one; with a share the smaller of both counts."""

    @pydantic.model_validator(mode="after")
    def _both(self) -> RangeSettings:
        if self.lower_share is None and self.lower_rank is None:
            raise ValueError("no lower bound")
        if self.upper_share is None and self.upper_rank is None:
            raise ValueError("no upper bound")
        return self


class TagSettings(Parameters):
    """Which field, and which of its values."""

    field: str
    """Name of the field, with dots for what is inside another."""
    tags: list[str | float | None] = pydantic.Field(min_length=1)
    """Values of documents that are selected."""


class RandomSettings(AmountSettings):
    """How much, and the seed."""

    seed: int = 0
    """Seed of the draw."""


def _numbers(texts: Texts, field: str) -> NDArray[numpy.float64]:
    if field == "text_length":
        return texts.lengths.astype(numpy.float64)
    numbers = (number_of(value) for _, value in field_values(texts, field))
    return numpy.fromiter(numbers, numpy.float64, texts.count)


def _split(selected: NDArray[numpy.bool_], sketches: Sequence[Sketch]) -> Iterator[Resolved]:
    start = 0
    for sketch in sketches:
        stop = start + sketch.count
        yield Resolved({"selected": selected[start:stop].astype(numpy.float64)})
        start = stop


def _joined(sketches: Sequence[Sketch], name: str) -> NDArray[Any]:
    columns = [sketch.read(name) for sketch in sketches]
    return numpy.concatenate(columns) if columns else numpy.zeros(0)


class _NumberOperator:
    """Sketches a number per document."""

    def sketch(self, texts: Texts, settings: Any) -> SketchColumns:
        """The field's numbers; nan without one."""
        return {"number": _numbers(texts, settings.field)}


@global_operator("data_juicer.top", settings=FieldAmountSettings, signals=_SIGNALS, source=SOURCE)
class Top(_NumberOperator):
    """Selects the documents with the largest numbers in a field (``topk_specified_field_selector``).

    Of equal ones the earlier is selected; documents without a number come last. Memory: 24 bytes each.
    """

    def resolve(
        self, sketches: Sequence[Sketch], settings: FieldAmountSettings, work: Path
    ) -> Iterator[Resolved]:
        """What is selected, shard by shard."""
        numbers = _joined(sketches, "number")
        keys = numpy.nan_to_num(-numbers if settings.largest else numbers, nan=numpy.inf)
        selected = numpy.zeros(len(numbers), dtype=bool)
        selected[numpy.argsort(keys, kind="stable")[: settings.of(len(numbers))]] = True
        return _split(selected & ~numpy.isnan(numbers), sketches)


@global_operator("data_juicer.range", settings=RangeSettings, signals=_SIGNALS, source=SOURCE)
class Range(_NumberOperator):
    """Selects a part of the documents in the order of a field (``range_specified_field_selector``).

    Documents without a number are never selected and do not count. Memory: 24 bytes each.
    """

    def resolve(self, sketches: Sequence[Sketch], settings: RangeSettings, work: Path) -> Iterator[Resolved]:
        """What is selected, shard by shard."""
        numbers = _joined(sketches, "number")
        total = int((~numpy.isnan(numbers)).sum())
        lower = max(int((settings.lower_share or 0) * total), settings.lower_rank or 0)
        upper = total if settings.upper_share is None else int(settings.upper_share * total)
        upper = max(min(upper, settings.upper_rank or total), lower)
        selected = numpy.zeros(len(numbers), dtype=bool)
        selected[numpy.argsort(numbers, kind="stable")[:total][lower:upper]] = True
        return _split(selected, sketches)


class _ValueOperator:
    """Sketches a hash of a field's value per document."""

    def sketch(self, texts: Texts, settings: Any) -> SketchColumns:
        """Hashes of the values as JSON says them; documents without the field share one of their own."""
        values = field_values(texts, settings.field)
        return {"value": hashes_of([_spelt(value) if present else "" for present, value in values])}


def _spelt(value: Any) -> str:
    """A value as a string that differs where values differ; whole numbers are the same as 1 and 1.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{'bool' if isinstance(value, bool) else type(value).__name__}:{value}"


@global_operator("data_juicer.frequency", settings=FieldAmountSettings, signals=_SIGNALS, source=SOURCE)
class Frequency(_ValueOperator):
    """Selects documents by how frequent their value is (``frequency_specified_field_selector``).

    Shares and numbers are of different values; of equally frequent ones the earlier counts as more
    frequent. Documents without the field have one value together. Memory: about 40 bytes each.
    """

    def resolve(
        self, sketches: Sequence[Sketch], settings: FieldAmountSettings, work: Path
    ) -> Iterator[Resolved]:
        """What is selected, shard by shard."""
        values = _joined(sketches, "value")
        _, first, inverse, counts = numpy.unique(
            values, return_index=True, return_inverse=True, return_counts=True
        )
        order = numpy.lexsort((first, -counts if settings.largest else counts))
        chosen = numpy.zeros(len(counts), dtype=bool)
        chosen[order[: settings.of(len(counts))]] = True
        return _split(chosen[inverse] if len(values) else numpy.zeros(0, dtype=bool), sketches)


@global_operator("data_juicer.tags", settings=TagSettings, signals=_SIGNALS, source=SOURCE)
class Tags(_ValueOperator):
    """Selects documents with one of some values in a field (``tags_specified_field_selector``)."""

    def resolve(self, sketches: Sequence[Sketch], settings: TagSettings, work: Path) -> Iterator[Resolved]:
        """What is selected, shard by shard."""
        wanted = hashes_of([_spelt(tag) for tag in settings.tags])
        return _split(numpy.isin(_joined(sketches, "value"), wanted), sketches)


@global_operator("data_juicer.random", settings=RandomSettings, signals=_SIGNALS, source=SOURCE)
class Random:
    """Selects documents at random (``random_selector``). Memory: 16 bytes each."""

    def sketch(self, texts: Texts, settings: RandomSettings) -> SketchColumns:
        """Nothing but that there are documents."""
        return {"one": numpy.ones(texts.count, dtype=numpy.int8)}

    def resolve(self, sketches: Sequence[Sketch], settings: RandomSettings, work: Path) -> Iterator[Resolved]:
        """What is selected, shard by shard."""
        total = sum(sketch.count for sketch in sketches)
        generator = seeds.numpy_generator(settings.seed, "data_juicer.random", total)
        selected = numpy.zeros(total, dtype=bool)
        selected[generator.choice(total, size=settings.of(total), replace=False)] = True
        return _split(selected, sketches)
