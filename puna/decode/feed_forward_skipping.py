"""Decoding that leaves out feed-forwards of the middle layers once a token's stream saturates.

System S53, FFN-SkipLLM (Jaiswal and others 2024, arXiv:2404.03865); the rule itself is
:class:`puna.model.feed_forward_skip.FeedForwardSkip`. The prompt and the first tokens of the answer
are read in full; from then on the middle's feed-forwards are left out token by token. All attention
runs, so the cache holds every token in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pydantic

from puna.core.errors import PunaError
from puna.core.files import read_json, write_json
from puna.decode.strategy import StrategySettings, strategy
from puna.decode.trace import TraceRow
from puna.model.feed_forward_skip import FeedForwardSkip, SkipPlan

if TYPE_CHECKING:
    from puna.decode.lane import Steps
    from puna.decode.request import Running
    from puna.model.spec import LlamaSpec

_FIELDS = ("first", "last", "threshold", "budget")


@strategy("feed-forward-skip")
class FeedForwardSkipSettings(StrategySettings):
    """Settings of skipping: a plan that calibration wrote, or its four numbers."""

    files: ClassVar[Mapping[str, Callable[[str], object]]] = {"plan": lambda file: read_plan(file)}
    plan: str | None = None
    """File that the stage ``feed_forward_skip`` left; one that says "nothing to skip" skips nothing."""
    first: int | None = pydantic.Field(None, ge=0)
    """First layer of the middle; cold layers before it never skip."""
    last: int | None = pydantic.Field(None, ge=0)
    """Last layer of the middle."""
    threshold: float | None = None
    """Cosine of the stream before and after a feed-forward from which on the next ones are left out."""
    budget: int | None = pydantic.Field(None, ge=0)
    """Feed-forwards that a token leaves out at most."""
    warm_up: int = pydantic.Field(10, ge=0)
    """First tokens of the answer that are read in full."""

    @pydantic.model_validator(mode="after")
    def _one_of_two(self) -> FeedForwardSkipSettings:
        given = [name for name in _FIELDS if getattr(self, name) is not None]
        if self.plan is not None and given:
            raise ValueError(f"plan and {given[0]} are both given: a plan has all four numbers")
        if self.plan is None and len(given) < len(_FIELDS):
            missing = ", ".join(name for name in _FIELDS if name not in given)
            raise ValueError(f"give a plan, or also {missing}")
        return self

    def build(self) -> FeedForwardSkipping:
        """The strategy."""
        if self.plan is not None:
            return FeedForwardSkipping(read_plan(self.plan), self.warm_up)
        numbers: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        return FeedForwardSkipping(FeedForwardSkip(**numbers), self.warm_up)


class FeedForwardSkipping:
    """Plain decoding whose reads leave feed-forwards out; ``skip`` None leaves out none."""

    name: ClassVar[str] = "feed-forward-skip"
    lossless: ClassVar[bool] = False

    def __init__(self, skip: FeedForwardSkip | None, warm_up: int = 10) -> None:
        self.skip, self.warm_up = skip, warm_up

    def run(self, request: Running) -> Steps[None]:
        """Read prompt and first tokens in full, the others with the skip; costs say what was left out."""
        lane = request.lane
        spec = lane.stepper.spec
        if self.skip is not None:
            spec.refuse_twins("the skipping of feed-forwards")
            self.skip.check(len(spec.blocks))
        each = feed_forward_share(spec)
        result = yield from lane.catch_up(request.prompt)
        while True:
            logits = result.logits[-1]
            token = request.law(logits).draw(request.random)
            if request.emit(token, TraceRow(token, cost=1.0 - result.skipped * each), logits):
                return
            skip = self.skip if len(request.ids) > self.warm_up else None
            result = yield from lane.read((token,), skip=skip)


def feed_forward_share(spec: LlamaSpec) -> float:
    """Mean share of a decoder's weights that one layer's feed-forward has, its norm aside."""
    sizes = [3 * spec.hidden_size * block.width for block in spec.blocks if block.feed_forward == "swiglu"]
    return sum(sizes) / max(1, len(sizes)) / spec.parameter_count()


def write_plan(plan: SkipPlan, file: Path) -> Path:
    """Write what calibration found, for the strategy to read."""
    skip = plan.skip
    numbers = None if skip is None else {name: getattr(skip, name) for name in _FIELDS}
    write_json(
        file,
        {
            "skip": numbers,
            "expected_share": plan.expected_share,
            "cosines": list(plan.cosines),
            "reason": plan.reason,
        },
    )
    return file


def read_plan(file: str | Path) -> FeedForwardSkip | None:
    """The skip of a plan's file; None where there is nothing to skip."""
    path = Path(file)
    if not path.is_file():
        raise PunaError("no such plan", where=path, fix="run the stage feed_forward_skip")
    found = read_json(path)
    if not isinstance(found, dict) or "skip" not in found:
        raise PunaError("not a plan of feed-forwards to skip", where=path, expected="a key 'skip'")
    if found["skip"] is None:
        return None
    try:
        return FeedForwardSkip(**{name: found["skip"][name] for name in _FIELDS})
    except (KeyError, TypeError) as error:
        raise PunaError(
            "the plan lacks a number or has a wrong one", where=path, found=error, expected=", ".join(_FIELDS)
        ) from None
