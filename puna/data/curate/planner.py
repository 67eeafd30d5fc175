"""The order of scores and gates: what drops most for its cost comes first, and nothing else changes.

Between two mappers, scores and gates commute: a score says the same of a document wherever it stands, and
a document that one gate drops is dropped by all orders. So a gate may come earlier, together with the
scores it reads, and what follows has fewer documents to work on. Costs and shares are those of the first
batch of the first shard. Gates are taken greedily: those with the most documents dropped together for each
second that their scores still cost, given those that are worked out by then. What one score pays for counts
together: the gates that read it are free once it is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from puna.data.curate.pipeline import Phase, Step

_LEAST = 1e-9  # seconds; what is worked out already costs next to nothing


def plan(phase: Phase, counts: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The labels of a phase's steps in the order in which they are run."""
    order: list[str] = []
    block: list[Step] = []
    for step in phase.steps:
        if step.kind in ("score", "gate"):
            block.append(step)
        else:
            order += [*_ordered(block, counts), step.label]
            block = []
    return order + _ordered(block, counts)


def _ordered(block: Sequence[Step], counts: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The steps between two mappers: gates by worth, each with its scores before it; then other scores."""
    scores = {name: step for step in block for name in step.columns()}
    gates = [step for step in block if step.gate is not None]
    order: list[str] = []
    batch = (
        max((count["came"] for count in counts.values()), default=0) or 1
    )  # All steps worked on all of it.

    def needed(gate: Step) -> list[str]:
        assert gate.gate is not None
        labels = [scores[name].label for name in gate.gate.signals() if name in scores]
        return [label for label in dict.fromkeys(labels) if label not in order]

    def share(gate: Step) -> float:
        came = counts[gate.label]["came"]
        return counts[gate.label]["dropped"] / came if came else 0.0

    def worth(gate: Step) -> tuple[float, float]:
        paid = set(needed(gate))
        passing = math.prod(1 - share(other) for other in gates if paid.issuperset(needed(other)))
        return (1 - passing) / max(sum(counts[label]["seconds"] for label in paid) / batch, _LEAST), share(
            gate
        )

    while gates:
        best = max(gates, key=worth)  # Of equal ones the pipeline's first.
        order += [*needed(best), best.label]
        gates.remove(best)
    return order + [step.label for step in block if step.label not in order]
