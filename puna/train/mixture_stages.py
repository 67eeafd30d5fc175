"""The stage ``mixture_checks``: what a mixture comes to, and what its feedback promises (S20)."""

from __future__ import annotations

import pydantic

from puna.core.stage import Context, Cost, Outcome, Parameters, stage
from puna.train.settings import Feedback, Phase


class MixtureChecks(Parameters):
    """Parameters of the stage ``mixture_checks``."""

    phases: tuple[Phase, ...] = pydantic.Field(min_length=1)
    """Phases by tokens, as in a mixture; their volumes are told by source."""
    feedback: Feedback
    """The rule that is checked."""
    topics: int = pydantic.Field(11, ge=2)
    """Topics of a mixture that it is checked on."""
    draws: int = pydantic.Field(1000, ge=1)
    """Mixtures and changes drawn by the seed."""

    @pydantic.model_validator(mode="after")
    def _in_tokens(self) -> MixtureChecks:
        if any(phase.tokens is None for phase in self.phases):
            raise ValueError("phases say tokens here, not share: shares of what?")
        return self


@stage(
    "mixture_checks",
    parameters=MixtureChecks,
    plan=lambda parameters, shapes: Cost(tokens=0.0, seconds=1.0),
)
def mixture_checks(context: Context, parameters: MixtureChecks) -> Outcome:
    """Tell the tokens of each source over all phases, and try the feedback's rule on drawn mixtures.

    Time grows with the draws; nothing is trained.
    """
    from puna.train.mixture_checks import run

    return run(context, parameters)
