"""Gates: decisions over stored signals. A gate is data; there is no code per gate.

``minimum`` and ``maximum`` belong to what passes, ``above`` and ``below`` do not. A document whose signal
is null is dropped, unless the gate says that it is kept. Bounds may differ by language, and may be given
as quantiles: they are then found over the stored values of all documents that come to the gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy
import pydantic
from numpy.typing import NDArray

from puna.core.stage import Parameters
from puna.data.curate.operator import Spans
from puna.data.curate.segments import ratio

Reduction = Literal["mean", "share", "max", "min", "sum", "count"]
_BOTH = ("minimum", "maximum")  # that may be equal


class Bounds(Parameters):
    """What passes; of each pair at most one."""

    minimum: float | None = None
    """Least that passes."""
    maximum: float | None = None
    """Most that passes."""
    above: float | None = None
    """What passes is more than this."""
    below: float | None = None
    """What passes is less than this."""
    quantile_minimum: float | None = pydantic.Field(None, ge=0, le=1)
    """Share of the documents below the least that passes, such as 0.9 for the best tenth."""
    quantile_maximum: float | None = pydantic.Field(None, ge=0, le=1)
    """Share of the documents up to the most that passes."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        for one, other in (("minimum", "above"), ("maximum", "below")):
            given = [key for key in (one, other, f"quantile_{one}") if getattr(self, key) is not None]
            if len(given) > 1:
                raise ValueError(f"{given[0]} and {given[1]} bound the same side")
        low = next(((key, v) for key in ("minimum", "above") if (v := getattr(self, key)) is not None), None)
        high = next(((key, v) for key in ("maximum", "below") if (v := getattr(self, key)) is not None), None)
        if low and high and (low[1] > high[1] or (low[1] == high[1] and (low[0], high[0]) != _BOTH)):
            raise ValueError(f"nothing passes: {low[0]} {low[1]:g}, {high[0]} {high[1]:g}")
        return self

    def given(self) -> dict[str, float]:
        """The bounds that are set, by key."""
        return {key: value for key in Bounds.model_fields if (value := getattr(self, key)) is not None}


class Condition(Bounds):
    """A signal and what of it passes."""

    signal: str
    """Full name of a stored signal: the step's name and the signal's."""
    reduce: Reduction | None = None
    """How spans become one number: mean, min, max, sum and count of their values (null ones left out), or
    share: the sum of value times characters by the characters of the document."""


class Gate(Condition):
    """Drops the documents whose signal is out of bounds."""

    name: str = pydantic.Field(min_length=1)
    """The reason told for what it drops."""
    null: Literal["keep", "drop"] = "drop"
    """What happens to a document whose signal is null."""
    languages: dict[str, Bounds] = pydantic.Field(default_factory=dict)
    """Bounds of documents in one language, by its tag: those given replace the ones above."""
    by_language: bool = False
    """Whether quantiles are those of the documents in one language."""
    when: Condition | None = None
    """Only documents that pass this are looked at; the others pass the gate."""

    @pydantic.model_validator(mode="after")
    def _bounded(self) -> Self:
        if not self.given() and not self.languages:
            raise ValueError(f"no bound: give one of {', '.join(Bounds.model_fields)}")
        if self.when is not None and not self.when.given():
            raise ValueError("when: no bound")
        quantiles = [bounds for bounds in (*self.languages.values(), self.when) if bounds is not None]
        if any(key.startswith("quantile") for bounds in quantiles for key in bounds.given()):
            raise ValueError("quantiles bound the gate itself, neither a language's bounds nor when")
        return self

    @property
    def needs_all(self) -> bool:
        """Whether its bounds are known only when all documents were seen."""
        return self.quantile_minimum is not None or self.quantile_maximum is not None

    def signals(self) -> list[str]:
        """Full names of the signals it reads."""
        read = [self, *([self.when] if self.when is not None else [])]
        beside = [characters_of(c.signal.rpartition(".")[0]) for c in read if c.reduce == "share"]
        return [condition.signal for condition in read] + beside


Found = Mapping[str, Mapping[str, float]]
"""Bounds that quantiles came to, by language ("" for all), then by key: minimum, maximum."""


def passes(
    gate: Gate,
    signals: Mapping[str, NDArray[numpy.float64] | Spans],
    languages: Sequence[str],
    found: Found | None = None,
) -> NDArray[numpy.bool_]:
    """[count] whether each document passes; ``found`` are the bounds of a gate by quantiles.

    Beside a signal of spans there are the characters of each document as its step saw them.
    """
    values = reduced(gate, signals, len(languages))
    passing = numpy.ones(len(languages), dtype=bool)
    for mask, bounds in _by_language(gate, languages, found or {}):
        passing[mask] = _within(values[mask], bounds)
    passing[numpy.isnan(values)] = gate.null == "keep"
    if gate.when is not None:
        asked = reduced(gate.when, signals, len(languages))
        passing |= ~(_within(asked, gate.when.given()) & ~numpy.isnan(asked))
    return passing


def bounds_for(gate: Gate, language: str, found: Found | None = None) -> dict[str, float]:
    """The bounds that hold for documents in ``language``."""
    bounds = {key: value for key, value in gate.given().items() if not key.startswith("quantile")}
    by_quantile = found or {}
    bounds |= by_quantile.get(language if gate.by_language else "", {})
    own = gate.languages.get(language)
    for key, value in own.given().items() if own is not None else ():
        for other in ("minimum", "above") if key in ("minimum", "above") else ("maximum", "below"):
            bounds.pop(other, None)
        bounds[key] = value
    return bounds


def quantile_bounds(gate: Gate, values: NDArray[numpy.float64], languages: NDArray[Any]) -> Found:
    """The bounds that a gate's quantiles come to over ``values`` [n] of documents in ``languages`` [n].

    A bound is one of the values: the least that no smaller share of them lies below or at.
    """
    groups = sorted(set(languages.tolist())) if gate.by_language else [""]
    found: dict[str, dict[str, float]] = {}
    for group in groups:
        chosen = values[languages == group] if gate.by_language else values
        chosen = chosen[~numpy.isnan(chosen)]
        if not len(chosen):
            continue
        sides = {"minimum": gate.quantile_minimum, "maximum": gate.quantile_maximum}
        found[group] = {
            side: float(numpy.quantile(chosen, share, method="inverted_cdf"))
            for side, share in sides.items()
            if share is not None
        }
    return found


def characters_of(label: str) -> str:
    """The name under which the characters of documents are stored as the step ``label`` saw them."""
    return f"{label}#characters"


def reduced(
    condition: Condition, signals: Mapping[str, NDArray[numpy.float64] | Spans], count: int
) -> NDArray[numpy.float64]:
    """[count] one number per document of a signal; spans are reduced as the condition says."""
    values = signals[condition.signal]
    if not isinstance(values, Spans):
        return values
    known = ~numpy.isnan(values.values)
    document, numbers = values.document[known], values.values[known]
    filled = numpy.bincount(document, minlength=count)
    if condition.reduce == "count":
        return filled.astype(numpy.float64)
    if condition.reduce in ("max", "min"):
        result = numpy.full(count, numpy.nan)
        (numpy.fmax if condition.reduce == "max" else numpy.fmin).at(result, document, numbers)
        return result
    if condition.reduce == "share":
        covered = (values.ends - values.starts)[known] * numbers
        lengths = signals[characters_of(condition.signal.rpartition(".")[0])]
        assert not isinstance(lengths, Spans)
        return ratio(numpy.bincount(document, covered, minlength=count), lengths)
    total = numpy.bincount(document, numbers, minlength=count)
    if condition.reduce == "mean":
        return ratio(total, filled)
    return numpy.where(filled > 0, total, numpy.nan)


def _within(values: NDArray[numpy.float64], bounds: Mapping[str, float]) -> NDArray[numpy.bool_]:
    passing = numpy.ones(len(values), dtype=bool)
    if "minimum" in bounds:
        passing &= values >= bounds["minimum"]
    if "maximum" in bounds:
        passing &= values <= bounds["maximum"]
    if "above" in bounds:
        passing &= values > bounds["above"]
    if "below" in bounds:
        passing &= values < bounds["below"]
    return passing


def _by_language(
    gate: Gate, languages: Sequence[str], found: Found
) -> list[tuple[NDArray[numpy.bool_] | slice, dict[str, float]]]:
    """Masks of documents and the bounds that hold for them; together they cover every document."""
    if not gate.languages and not gate.by_language:
        return [(slice(None), bounds_for(gate, "", found))]
    tags = numpy.array(languages, dtype=object)
    return [(tags == tag, bounds_for(gate, tag, found)) for tag in sorted(set(languages))]
