"""Decoding strategies on the same prompts: what each wrote, in how many passes of which model.

Passes are counted, not timed: a pass of the target costs 1, one of another model its weights over
the target's, and a head's weights come on top wherever it is asked. That is the cost of a step that
is bound by reading weights, as decoding for one person is; a pass that verifies a draft counts once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.decode.engine import Completion, Engine
from puna.decode.heads import load_head
from puna.decode.request import TARGET
from puna.decode.sampling import Sampling
from puna.decode.speculative import Round, Speculative
from puna.decode.strategy import Strategy, resolve

if TYPE_CHECKING:
    from puna.decode.engine import Prompt
    from puna.decode.request import Running
    from puna.model.llama import Llama


@dataclass
class Counts:
    """Passes and tokens of one strategy over all prompts."""

    rounds: int = 0
    drafted: int = 0
    kept: int = 0
    emitted: int = 0
    scored: int = 0
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def note(self, request: Running, round_: Round) -> None:
        """Count a round."""
        self.rounds += 1
        self.drafted += round_.drafted
        self.kept += round_.kept
        self.emitted += round_.emitted
        self.scored += max(round_.drafted - 1, 0)
        for place, lane in enumerate(request.lanes):
            name = TARGET if place == 0 else "draft"
            self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), lane.sequence.bytes)


@dataclass(frozen=True)
class Outcome:
    """A strategy's completions, one for each prompt, with what they took."""

    completions: list[Completion]
    counts: Counts
    seconds: float
    draft_cost: float
    head_cost: float

    @property
    def tokens(self) -> int:
        """Tokens that were produced."""
        return sum(len(completion.ids) for completion in self.completions)

    @property
    def target_passes(self) -> int:
        """Passes of the target: rounds, or tokens where nothing is drafted."""
        return self.counts.rounds or self.tokens

    @property
    def cost(self) -> float:
        """Passes of the target's size for each token."""
        counts = self.counts
        whole = self.target_passes + counts.drafted * self.draft_cost + counts.scored * self.head_cost
        return whole / self.tokens

    def figures(self) -> dict[str, float]:
        """Figures by their short names."""
        counts = self.counts
        found = {
            "tokens": float(self.tokens),
            "target_passes": float(self.target_passes),
            "draft_passes": float(counts.drafted),
            "cost": self.cost,
            "seconds": self.seconds,
            "lossless": float(all(completion.lossless for completion in self.completions)),
        }
        if counts.rounds:
            found["accepted_length"] = counts.kept / counts.rounds
            found["accepted_share"] = counts.kept / max(counts.drafted, 1)
            found["draft_length"] = counts.drafted / counts.rounds
        for name, size in counts.peak_bytes.items():
            found[f"cache_bytes.{name}"] = float(size)
        return found


def run_strategy(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    chosen: Mapping[str, Any],
    models: Mapping[str, Llama],
) -> Outcome:
    """Complete all prompts with one strategy and count what it takes; ``models`` are those it may use."""
    strategy: Strategy = resolve(chosen)
    counts = Counts()
    if isinstance(strategy, Speculative):
        strategy.on_round = counts.note
    start = time.perf_counter()
    completions = engine.generate(prompts, sampling, strategy)
    seconds = time.perf_counter() - start
    weight = engine.model.spec.parameter_count()
    drafter = {TARGET: engine.model, **models}.get(str(chosen.get("draft", TARGET)))
    draft_cost = 0.0 if drafter is None else drafter.spec.parameter_count() / weight
    head = load_head(chosen["head"]).parameter_count / weight if "head" in chosen else 0.0
    return Outcome(completions, counts, seconds, draft_cost, head)


def with_heads(chosen: Mapping[str, Any], heads: Mapping[str, Path]) -> dict[str, Any]:
    """A strategy's settings with the name of a head turned into its file."""
    settings = dict(chosen)
    if isinstance(settings.get("head"), str):
        if settings["head"] not in heads:
            raise PunaError(
                f"strategy {settings.get('name')!r} names a head that is not among the inputs",
                where="strategies",
                found=settings["head"],
                expected=", ".join(heads) or "an input heads",
            )
        settings["head"] = str(heads[settings["head"]])
    return settings


def same_share(found: Sequence[Completion], expected: Sequence[Completion]) -> float:
    """Share of completions that equal others token by token."""
    pairs = zip(found, expected, strict=True)
    return sum(one.ids == other.ids for one, other in pairs) / len(found)


def correct_share(found: Sequence[Completion], answers: Sequence[str]) -> float:
    """Share of completions that hold the answer to their question, whatever the case."""
    pairs = zip(found, answers, strict=True)
    return sum(answer.casefold() in completion.text.casefold() for completion, answer in pairs) / len(found)
