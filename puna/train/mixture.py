"""Which packed rows a run takes from which source: by tokens, a function of settings, seed and feedback.

A run is a sequence of portions: its phases, its epochs, the stretches between two changes of the
weights, or, without any of these, the whole run. Within a portion the next row comes from the source
that is furthest behind its share of the tokens so far, so the shares hold at every moment but for
about a row: not documents are mixed, nor rows, but tokens. Each source is a permutation of its rows
drawn from (seed, source, pass), or, sorted, their order in the corpus.

A portion of a number of tokens ends with the row that reaches it: it holds at least that many, and
fewer than that without its last row. A run of max_tokens does so as a whole. A portion of a number of
steps ends where the next row would begin another step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from puna.core.errors import PunaError, unknown_name
from puna.core.seeds import numpy_generator
from puna.train.settings import Feedback, Mixture

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NOISE = 1e-9  # differences of perplexity changes below this share of the largest are rounding
_LARGEST_LOSS = 80.0  # exp of more says no more


@dataclass(frozen=True)
class Limits:
    """Where a run ends: at most one of these is given."""

    epochs: int | None = None
    max_steps: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class _Place:
    """Where a portion begins: rows taken of each source, tokens and steps of the run so far."""

    taken: tuple[int, ...]
    tokens: int = 0
    steps: int = 0


class MixedRows:
    """Draws the portions of a run. ``of[row]`` is the place of the row's source in ``names``.

    ``history`` holds the held-out losses by source that were measured before each portion; only
    feedback reads it. A source that runs out is an error when its portion is drawn.
    """

    def __init__(
        self,
        settings: Mixture,
        names: Sequence[str],
        of: NDArray[numpy.int64],
        lengths: NDArray[numpy.int64],
        *,
        limits: Limits,
        batch_tokens: int,
        seed: int,
        shuffled: bool = True,
    ) -> None:
        self.settings = settings
        self.names = tuple(names)
        self.limits = limits
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.shuffled = shuffled
        self.history: Sequence[Mapping[str, float]] = ()
        self._of = of
        self._rows = [numpy.flatnonzero(of == number) for number in range(len(self.names))]
        self._lengths: list[int] = lengths.tolist()
        self._shortest = min(self._lengths)
        self.available = [int(lengths[rows].sum()) for rows in self._rows]
        self._places = [_Place((0,) * len(self.names))]
        self._orders: dict[int, tuple[tuple[int, int], NDArray[numpy.int64]]] = {}
        check_names(settings, self.names)

    @property
    def portions(self) -> int | None:
        """Number of portions, or None if the limit alone decides when the run ends."""
        settings = self.settings
        if settings.phases:
            return len(settings.phases)
        if settings.feedback is not None and self.limits.max_steps is not None:
            return math.ceil(self.limits.max_steps / settings.feedback.every_steps)
        if settings.epoch_tokens is not None:
            limited = self.limits.max_steps is not None or self.limits.max_tokens is not None
            return None if limited else self.limits.epochs or 1
        return 1

    def follow(self, history: Sequence[Mapping[str, float]]) -> None:
        """Go by this history from now on; it grows as the run goes on."""
        self.history = history
        del self._places[1:]

    def rows(self, portion: int) -> NDArray[numpy.int64]:
        """The rows of a portion, in order."""
        while len(self._places) <= portion:
            self._places.append(self._draw(len(self._places) - 1)[1])
        rows, end = self._draw(portion)
        if len(self._places) == portion + 1:
            self._places.append(end)
        return rows

    def weights(self, portion: int) -> list[float]:
        """The share of each source in a portion; they add up to 1."""
        settings = self.settings
        given = settings.phases[portion].weights if settings.phases else settings.weights
        plain = self.available if given is None else [given.get(name, 0.0) for name in self.names]
        total = sum(plain)
        weights = [weight / total for weight in plain]
        if settings.feedback is not None:
            for before, now in zip(self.history[:portion], self.history[1 : portion + 1], strict=False):
                weights = updated(weights, self.names, before, now, settings.feedback)
        return weights

    def _budget(self, portion: int, place: _Place) -> tuple[float, float]:
        """(tokens, steps) that a portion may hold; infinity where nothing limits it."""
        settings, limits = self.settings, self.limits
        tokens = math.inf if settings.epoch_tokens is None else float(settings.epoch_tokens)
        if settings.phases:
            phase = settings.phases[portion]
            if phase.tokens is not None:
                tokens = phase.tokens
            else:
                tokens = self._phase_end(portion + 1) - self._phase_end(portion)
        if limits.max_tokens is not None:
            tokens = min(tokens, limits.max_tokens - place.tokens)
        steps = math.inf if limits.max_steps is None else limits.max_steps - place.steps
        if settings.feedback is not None:
            steps = min(steps, settings.feedback.every_steps)
        return tokens, steps

    def _phase_end(self, phases: int) -> int:
        """Tokens of the run at the end of so many phases by share."""
        share = sum(phase.share or 0.0 for phase in self.settings.phases[:phases])
        return round(share * (self.limits.max_tokens or 0))

    def _draw(self, portion: int) -> tuple[NDArray[numpy.int64], _Place]:
        """The rows of a portion, and where the next one begins."""
        place = self._places[portion]
        weights = self.weights(portion)
        budget, most_steps = self._budget(portion, place)
        taken = [0] * len(self.names) if self.settings.draw != "next" else list(place.taken)
        active = sorted((n for n, weight in enumerate(weights) if weight > 0), key=lambda n: -weights[n])
        used = [0] * len(self.names)
        rows: list[int] = []
        total = steps = in_step = 0
        while total < budget and steps < most_steps:
            if steps + 1 == most_steps and self.batch_tokens - in_step < self._shortest:
                break
            source = max(active, key=lambda n: weights[n] * total - used[n])
            row = self._next(source, taken[source], portion)
            if row is None:
                if self.settings.when_short == "stop":
                    break
                raise self._short(source, portion, place.tokens + total)
            length = self._lengths[row]
            if in_step + length > self.batch_tokens:
                steps, in_step = steps + 1, 0
                if steps == most_steps:
                    break
            rows.append(row)
            taken[source] += 1
            used[source] += length
            total += length
            in_step += length
        steps += in_step > 0
        found = self._reordered(numpy.array(rows, dtype=numpy.int64), portion)
        return found, _Place(tuple(taken), place.tokens + total, place.steps + steps)

    def _next(self, source: int, number: int, portion: int) -> int | None:
        """Row ``number`` of a source, counted through all its passes; None if there is none."""
        rows = self._rows[source]
        through, place = divmod(number, len(rows))
        if through >= self.settings.passes(self.names[source]):
            return None
        if not self.shuffled:
            return int(rows[place])
        drawn = portion if self.settings.draw == "anew" else 0
        key, order = self._orders.get(source, ((-1, -1), rows))
        if key != (drawn, through):
            purpose = ("train", "mixture", self.names[source], drawn, through)
            order = numpy_generator(self.seed, *purpose).permutation(rows)
            self._orders[source] = ((drawn, through), order)
        return int(order[place])

    def _reordered(self, rows: NDArray[numpy.int64], portion: int) -> NDArray[numpy.int64]:
        """With draw ``same``, the rows of each source in another order in every epoch but the first."""
        if self.settings.draw != "same" or portion == 0 or not self.shuffled:
            return rows
        found = rows.copy()
        for number, name in enumerate(self.names):
            places = numpy.flatnonzero(self._of[rows] == number)
            order = numpy_generator(self.seed, "train", "mixture again", name, portion).permutation(places)
            found[places] = rows[order]
        return found

    def _short(self, source: int, portion: int, tokens: int) -> PunaError:
        name, passes = self.names[source], self.settings.passes(self.names[source])
        share = self.weights(portion)[source]
        return PunaError(
            f"source {name!r} has no row left: it has {self.available[source]:,} tokens"
            + (f", {passes} passes of them" if passes > 1 else ""),
            where="mixture",
            found=f"a share of {share:.1%} of more than the {tokens:,} tokens drawn until then",
            fix=f"lower its share or the tokens of the run; allow {passes + 1} passes by "
            f"mixture.repeat: {{{name}: {passes + 1}}}; or set mixture.when_short: stop",
        )


def updated(
    weights: Sequence[float],
    names: Sequence[str],
    before: Mapping[str, float],
    now: Mapping[str, float],
    feedback: Feedback,
) -> list[float]:
    """Weights after one round: times ``1 + strength * importance * change``, made to add up to 1.

    ``change`` is how a source's perplexity on held-out text changed in the round, less the mean
    change of all, divided by the largest of these differences: between -1 and 1. The rule is that
    of Chen et al. 2024 (Llama-3-SynE, topic mixture); how they normalise is not told, this way equal
    changes move nothing whatever the importance. A source of no importance keeps its weight, and its
    change is none of the others' business: a language that is new falls faster than any topic drifts.
    Losses are nats per token.
    """
    importance = {name: feedback.importance.get(name, 1.0) for name in names}
    changes = {name: _perplexity(now[name]) - _perplexity(before[name]) for name in names if importance[name]}
    mean = sum(changes.values()) / max(len(changes), 1)
    apart = {name: change - mean for name, change in changes.items()}
    largest = max(map(abs, apart.values()), default=0.0)
    if largest <= _NOISE * max(map(abs, changes.values()), default=0.0):
        return list(weights)
    factors = {
        name: 1 + feedback.strength * importance[name] * difference / largest
        for name, difference in apart.items()
    }
    moved = [weight * factors.get(name, 1.0) for name, weight in zip(names, weights, strict=True)]
    shared, grown = (
        sum(weight for name, weight in zip(names, side, strict=True) if name in factors)
        for side in (weights, moved)
    )
    scale = shared / grown if grown else 1.0
    return [weight * scale if name in factors else weight for name, weight in zip(names, moved, strict=True)]


def _perplexity(loss: float) -> float:
    if math.isnan(loss):
        raise PunaError(
            "held-out loss is not a number: there is nothing to weigh by", where="mixture.feedback"
        )
    return math.exp(min(loss, _LARGEST_LOSS))


def check_names(settings: Mixture, names: Sequence[str]) -> None:
    """Refuse names that are no source, and a source that nothing is said about."""
    importance = settings.feedback.importance if settings.feedback else {}
    repeat = settings.repeat if isinstance(settings.repeat, dict) else {}
    said: list[tuple[str, Mapping[str, object]]] = [("weights", settings.weights or {})]
    said += [(f"phases[{n}].weights", phase.weights) for n, phase in enumerate(settings.phases)]
    said += [("caps", settings.caps), ("feedback.importance", importance), ("repeat", repeat)]
    for place, values in said:
        for name in values:
            if name not in names:
                raise unknown_name("source", name, names, where=f"mixture.{place}")
    weighed = {name for place, values in said if "weights" in place for name in values}
    left_out = [name for name in names if name not in weighed]
    if weighed and left_out:
        raise PunaError(
            f"source {left_out[0]!r} has no weight",
            where="mixture.phases" if settings.phases else "mixture.weights",
            fix=f"say {left_out[0]}: 0 to leave it out",
        )
