"""S20: volumes of a mixture in phases, and the topic controller tried on drawn mixtures, arXiv:2407.18743.

What a run of training goes by, :func:`puna.train.mixture.updated`, is what is tried here.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy

from puna.core.seeds import numpy_generator
from puna.core.stage import Context, Outcome
from puna.train.mixture import updated
from puna.train.settings import Feedback, Phase

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from puna.train.mixture_stages import MixtureChecks


def run(context: Context, parameters: MixtureChecks) -> Outcome:
    """The stage."""
    planned = volumes(parameters.phases)
    found = {f"volume.{name}": tokens for name, tokens in planned.items()}
    found |= rule(parameters.feedback, parameters.topics, parameters.draws, context.seed)
    rows = [[name, f"{tokens:,.0f}"] for name, tokens in planned.items()]
    table = {"title": "Tokens by source", "columns": ["source", "tokens"], "rows": rows}
    context.report.setdefault("tables", []).append(table)
    return Outcome(metrics=found)


def volumes(phases: Sequence[Phase]) -> dict[str, float]:
    """Tokens of each source over all phases; sums are taken exactly."""
    found: dict[str, Fraction] = {}
    for phase in phases:
        weights = {name: Fraction(str(weight)) for name, weight in phase.weights.items()}
        for name, weight in weights.items():
            share = (phase.tokens or 0) * weight / sum(weights.values())
            found[name] = found.get(name, Fraction(0)) + share
    return {name: float(tokens) for name, tokens in found.items()}


def rule(feedback: Feedback, topics: int, draws: int, seed: int) -> dict[str, float]:
    """Over drawn mixtures and drawn losses before and after a round:

    * ``sum``: how far the new shares' sum is from 1 at most
    * ``equal``: how far a share moves at most where all perplexities change by the same
    * ``worst``: in how many draws the topic whose perplexity rose most did not gain share
    * ``best``: and the one whose perplexity rose least, or fell most, did not lose any
    """
    generator = numpy_generator(seed, "mixture checks")
    names = [f"topic {number}" for number in range(topics)]
    # Importance is given by name: of drawn topics there is none, and every one has the same.
    plain = Feedback(every_steps=feedback.every_steps, strength=feedback.strength)
    found = {"sum": 0.0, "equal": 0.0, "worst": 0.0, "best": 0.0}
    for _ in range(draws):
        shares = generator.dirichlet([1.0] * topics).tolist()
        before = generator.uniform(1.0, 5.0, topics)
        after = before + generator.normal(0.0, 0.3, topics)
        moved = updated(shares, names, _named(names, before), _named(names, after), plain)
        found["sum"] = max(found["sum"], abs(sum(moved) - 1))
        risen = numpy.log(numpy.exp(before) + generator.uniform(0.0, 1.0))  # all perplexities by as much
        same = updated(shares, names, _named(names, before), _named(names, risen), plain)
        pairs = zip(same, shares, strict=True)
        found["equal"] = max(found["equal"], *(abs(new - old) for new, old in pairs))
        changes = numpy.exp(after) - numpy.exp(before)
        worst, best = int(changes.argmax()), int(changes.argmin())
        found["worst"] += moved[worst] <= shares[worst]
        found["best"] += moved[best] >= shares[best]
    return found


def _named(names: Sequence[str], values: NDArray[numpy.float64]) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))
